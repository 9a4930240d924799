"""The parts below the endpoints: text, choice of tokens, lanes, tools, other servers."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from contextlib import aclosing

import gguf
import numpy as np
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_tiny import code, running, save_adapter, save_model, send

from finegraft import adapters, opening
from finegraft.core.errors import DataError, ModelError
from finegraft.inference.generate import complete
from finegraft.serving.engines import Ask, Options, Piece, Settings, _lanes, _worker, choose
from finegraft.serving.engines import _tools as tools
from finegraft.serving.engines import _upstream as upstream
from finegraft.serving.engines._choose import Chooser
from finegraft.serving.engines._contract import Token
from finegraft.serving.engines._text import Writer
from finegraft.serving.engines.inprocess import _with_calls

HELLO = [{"role": "user", "content": "hello world"}]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.lists(st.text("abü€", min_size=1, max_size=3), max_size=1))
def test_pieces_joined_are_the_text_up_to_the_stop(text, stops):
    writer, said = Writer(Bytes(), stops), []
    for token in text.encode():
        piece = writer.add(token)
        said += [piece.text] if piece else []
        if writer.stopped:
            break
    rest = writer.finish()
    said += [rest.text] if rest else []
    assert "".join(said) == (text.split(stops[0])[0] if stops else text)
    assert writer.stopped == bool(stops and stops[0] in text)


def test_shares_come_with_the_text_they_belong_to():
    writer = Writer(Bytes(), ["abc"])
    pieces = [writer.add(byte, Token(chr(byte), bytes([byte]), 0.0)) for byte in b"xabd"]
    got = [(p.text, "".join(t.text for t in p.tokens)) for p in pieces if p]
    assert got == [("x", "x"), ("abd", "abd")]


def chosen(logits, count=200, **options):
    chooser = Chooser(Options(seed=1, **options), Bytes(), logits.numel())
    return {chooser.choose(logits)[0] for _ in range(count)}


def test_sampling_keeps_to_what_transformers_would_keep():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 2
    wrappers = {
        "top_p": (0.6, TopPLogitsWarper(0.6)),
        "top_k": (5, TopKLogitsWarper(5)),
        "min_p": (0.2, MinPLogitsWarper(0.2)),
    }
    for name, (value, wrapper) in wrappers.items():
        kept = set(wrapper(None, logits[None].clone())[0].isfinite().nonzero().flatten().tolist())
        assert 1 < len(kept) < 60
        assert chosen(logits, 2000, **{name: value}) == kept, name
    best = {int(logits.argmax())}
    assert chosen(logits, temperature=0) == chosen(logits, top_p=1e-6) == best
    assert chosen(logits, top_k=1) == chosen(logits, temperature=1e-9) == best
    assert len(chosen(logits, temperature=50.0)) > 30


def test_sampling_follows_the_shares_and_never_takes_a_share_of_nothing():
    shares = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    chooser = Chooser(Options(seed=3), Bytes(), 6)
    drawn = torch.tensor([chooser.choose(shares.log())[0] for _ in range(4000)])
    counted = drawn.bincount(minlength=6) / len(drawn)
    assert counted[shares == 0].sum() == 0
    torch.testing.assert_close(counted, shares, atol=0.03, rtol=0)


def test_tokens_that_are_parts_of_characters_have_their_own_bytes():
    import training_tiny

    tokenizer = training_tiny.tokenizer()
    chooser = Chooser(Options(), tokenizer, 640)
    text = "hello é € 😀"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)
    assert b"".join(chooser._token(i, 0.0).bytes for i in ids) == text.encode()


def test_a_row_gets_the_same_logits_wherever_and_whenever_it_sits():
    import training_tiny

    from finegraft.inference import weights

    model = training_tiny.llama()
    merged = weights.merge(model)
    prompt = [5, 6, 7, 8]
    alone = _lanes.Slots(merged, 1)
    expected = [alone.begin(0, prompt).clone()]
    expected += [alone.append([0], [token])[0].clone() for token in (9, 10, 11)]
    slots = _lanes.Slots(merged, 3)
    slots.begin(2, list(range(20, 60)))
    slots.append([2], [3])
    got = [slots.begin(0, prompt).clone(), slots.append([0, 2], [9, 4])[0].clone()]
    slots.begin(1, [12, 13])
    got.append(slots.append([0, 1, 2], [10, 1, 2])[0].clone())
    got.append(slots.append([0, 1], [11, 1])[0].clone())
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        stock = model(input_ids=torch.tensor([[*prompt, 9, 10, 11]])).logits[0]
    torch.testing.assert_close(torch.stack(got), stock[3:], rtol=1e-4, atol=1e-4)


def row_for(prompt, said):
    return _lanes.Row(
        prompt=prompt,
        longest=3,
        ends=frozenset(),
        chooser=Chooser(Options(temperature=0), Bytes(), 640),
        writer=Writer(Nothing()),
        give=said.append,
    )


class Nothing:
    def decode(self, ids, **options):
        return "x" * len(ids)


def test_short_prompts_join_together_and_long_ones_one_after_another():
    import training_tiny

    from finegraft.inference import weights

    flushed = []
    for length, expected in ((10, 4), (200, 1)):
        said = []
        lane = _lanes.Joining(weights.merge(training_tiny.llama()), 4, lambda: flushed.append(1))
        for _ in range(5):
            lane.add(row_for([5] * length, said))
        lane.advance()
        assert len(lane.active) == expected
        while lane.busy:
            lane.advance()
        assert [piece.reason for piece in said if piece.reason] == ["length"] * 5
    assert flushed


def test_the_pieces_of_a_token_wake_the_clients_thread_once():
    async def main():
        post, boxes, woken = _worker.Post(), [asyncio.Queue(), asyncio.Queue()], []
        loop = asyncio.get_running_loop()
        post.loop = loop
        with pytest.MonkeyPatch.context() as patch:
            call = loop.call_soon_threadsafe
            patch.setattr(loop, "call_soon_threadsafe", lambda *a: woken.append(a) or call(*a))
            for box in boxes:
                post.put(box, Piece(text="a"))
            post.flush()
            post.flush()
        assert len(woken) == 1
        return [(await box.get()).text for box in boxes]

    assert asyncio.run(main()) == ["a", "a"]


def test_one_thread_loads_and_answers(tmp_path, monkeypatch):
    seen = set()
    for target, name in (
        (opening, "open_model"),
        (_lanes.Slots, "begin"),
        (_lanes.Slots, "append"),
    ):
        inner = getattr(target, name)

        def noted(*words, inner=inner, **more):
            seen.add(threading.get_ident())
            return inner(*words, **more)

        monkeypatch.setattr(target, name, noted)
    with running(choose(Settings(str(save_model(tmp_path / "base"))))) as url:
        assert send(url, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 3})[0] == 200
    assert len(seen) == 1


def test_llama_cpp_never_sees_a_prompt_that_cannot_fit(tmp_path):
    from finegraft.export import gguf as exported

    exported.write(save_model(tmp_path / "base"), tmp_path / "tiny.gguf", "f32")
    with running(choose(Settings(str(tmp_path / "tiny.gguf"), context=64, slots=1))) as url:
        for text, expected in (("hello", 200), ("a b" * 1_000_000, 400)):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
            answer = send(url, "/v1/chat/completions", body)
            assert answer[0] == expected
        assert code(answer) == (400, "FG-SERVE-020")
        answer = send(url, "/v1/completions", {"prompt": "a b" * 1_000_000})
        assert code(answer) == (400, "FG-SERVE-020")


def test_a_model_that_the_decoder_refuses_answers_as_generate_does(tmp_path):
    base = save_model(tmp_path / "base")
    opened = opening.open_model(base)
    torch.manual_seed(3)
    tuned = adapters.attach(opened.model, "prompt", num_virtual_tokens=3)
    for parameter in tuned.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "prompt")
    opened.tokenizer.save_pretrained(tmp_path / "prompt")
    opening.write_note(tuned, tmp_path / "prompt")
    questions = [HELLO, [{"role": "user", "content": "bye now you"}]]
    expected = {}
    for name in ("base", "prompt"):
        loaded = opening.open_model(tmp_path / name)
        expected[name] = complete(loaded.model, loaded.tokenizer, questions, max_new_tokens=12)
    assert expected["base"] != expected["prompt"]
    engine = choose(Settings(str(tmp_path / "prompt")))

    async def ask_all():
        await engine.start()
        try:
            jobs = [(name, q) for name in expected for q in questions]
            texts = await asyncio.gather(*(text_of(engine, name, q, 12) for name, q in jobs))
        finally:
            await engine.stop()
        return {"prompt": texts[2:], "base": texts[:2]}

    assert asyncio.run(ask_all()) == expected
    assert type(engine._voices["prompt"].lane).__name__ == "Together"
    assert type(engine._voices["base"].lane).__name__ == "Joining"


async def text_of(engine, model, messages, longest):
    ask = Ask(model, Options(max_tokens=longest, temperature=0), messages=tuple(messages))
    async with aclosing(engine.answer(ask)) as pieces:
        return "".join([piece.text async for piece in pieces])


def test_a_failing_batch_is_refused_and_the_next_one_answered(tmp_path, monkeypatch):
    engine = choose(Settings(str(save_model(tmp_path / "base"))))
    with running(engine) as url:
        body = {"messages": HELLO, "max_tokens": 3}
        with monkeypatch.context() as patch:

            def fail(*_):
                raise RuntimeError("out of memory")

            patch.setattr(_lanes.Slots, "begin", fail)
            assert code(send(url, "/v1/chat/completions", body)) == (503, "FG-SERVE-023")
        assert send(url, "/v1/chat/completions", body)[0] == 200


CALL = {"name": "look", "arguments": {"at": "moon"}}


@pytest.mark.parametrize(
    ("text", "rest", "count"),
    [
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", "", 1),
        (
            f"Well. <tool_call>{json.dumps(CALL)}</tool_call><tool_call>{json.dumps(CALL)}",
            "Well.",
            2,
        ),
        (json.dumps({"name": "look", "parameters": {"at": "moon"}}), "", 1),
        (json.dumps({"name": "other"}), json.dumps({"name": "other"}), 0),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", 0),
        ("just words", "just words", 0),
        ("[" * 100_000, "[" * 100_000, 0),
    ],
)
def test_tool_calls_are_read_out_of_text(text, rest, count):
    found, calls = tools.parse(text, {"look"})
    assert (found, len(calls)) == (rest, count)
    for number, call in enumerate(calls):
        assert call["index"] == number and call["function"]["name"] == "look"
        assert json.loads(call["function"]["arguments"]) == {"at": "moon"}


def test_an_answer_with_calls_says_so():
    ask = Ask("m", Options(), tools=({"type": "function", "function": {"name": "look"}},))
    said = [Piece(text=json.dumps(CALL)), Piece(reason="stop", completion_tokens=5)]
    piece = _with_calls(said, ask)
    assert (piece.reason, piece.text, piece.completion_tokens) == ("tool_calls", "", 5)
    assert _with_calls([Piece(text="no"), Piece(reason="stop")], ask).reason == "stop"


def test_tools_reach_a_template_that_knows_them(tmp_path):
    base = save_model(tmp_path / "base")
    template = "{% if tools %}{{ tools[0].function.name }} {% endif %}{{ messages[0].content }}"
    (base / "chat_template.jinja").write_text(template)
    with running(choose(Settings(str(base)))) as url:
        offered = [{"type": "function", "function": {"name": "hello world bye"}}]
        plain, with_tools = (
            json.loads(
                send(url, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, **more})[2]
            )
            for more in ({}, {"tools": offered})
        )
        assert with_tools["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
        forced = {"messages": HELLO, "tools": offered, "tool_choice": "required"}
        assert code(send(url, "/v1/chat/completions", forced)) == (400, "FG-SERVE-021")


def test_an_encoder_gives_vectors_that_know_no_padding(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "bye"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), model_max_length=32).save_pretrained(
        tmp_path / "bert"
    )
    with (
        running(choose(Settings(str(tmp_path / "bert")))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client,
    ):
        together = client.embeddings.create(model="bert", input=["hello", "bye world hello world"])
        alone = client.embeddings.create(model="bert", input="hello")
        first, second = (row.embedding for row in together.data)
        assert first == pytest.approx(alone.data[0].embedding, abs=1e-5)
        assert np.linalg.norm(second) == pytest.approx(1, abs=1e-5) and len(second) == 16
        assert together.usage.prompt_tokens == 9
        with pytest.raises(openai.BadRequestError, match="FG-SERVE-018"):
            client.chat.completions.create(model="bert", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="FG-SERVE-020"):
            client.embeddings.create(model="bert", input="hello " * 100)
        with pytest.raises(openai.BadRequestError, match="FG-SERVE-022"):
            client.embeddings.create(model="bert", input="")


def test_a_file_that_llama_cpp_refuses_is_an_error_before_serving(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        pytest.raises(ModelError, match="FG-SERVE-006"),
        running(choose(Settings(str(tmp_path / "odd.gguf")))),
    ):
        pass
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 10)
    with (
        pytest.raises(ModelError, match="FG-MODEL-005"),
        running(choose(Settings(str(tmp_path / "broken.gguf")))),
    ):
        pass


def test_an_engine_that_is_down_or_refuses_is_told_apart():
    async def ask(at):
        question = Ask("m", Options(), prompt="hello")
        return [p async for p in upstream.answer(at, question, upstream.body_of(question))]

    async def against(answer):
        async def serve(reader, writer):
            await reader.readuntil(b"}")
            writer.write(answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await ask(upstream.Address("127.0.0.1", server.sockets[0].getsockname()[1], "k"))

    with pytest.raises(ModelError, match="FG-SERVE-024"):
        asyncio.run(ask(upstream.Address("127.0.0.1", 9, "k")))
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for broken in (b"", b"HTTP/1.1 200 OK\r\n", head + b"5\r\nda", head + b"0\r\n\r\n"):
        with pytest.raises(ModelError, match="FG-SERVE-024"):
            asyncio.run(against(broken))
    refusal = b'{"error": {"message": "no such thing"}}'
    answer = b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(refusal) + refusal
    with pytest.raises(DataError, match=r"FG-SERVE-022(.|\n)*no such thing"):
        asyncio.run(against(answer))


STAND_IN = """
import http.server, json, os, sys
words = sys.argv[1:]
assert words[:3] == ["-m", "vllm.entrypoints.cli.main", "serve"], words
ids = [words[words.index("--served-model-name") + 1]]
ids += [word.partition("=")[0] for word in words[words.index("--lora-modules") + 1:]]
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        assert known and body["model"] in ids and "top_k" not in body
        self.send_response(200); self.end_headers()
        said = [{"delta": {"content": "I am "}}, {"delta": {"content": body["model"]}}]
        for choice in [*said, {"delta": {}, "finish_reason": "stop"}]:
            event = {"choices": [{"index": 0, **choice}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        self.wfile.write(b'data: {"choices": [], "usage": {"prompt_tokens": 3, '
                         b'"completion_tokens": 2}}\\n\\ndata: [DONE]\\n\\n')
http.server.ThreadingHTTPServer(
    ("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def test_vllm_is_started_asked_and_ended(tmp_path):
    base = save_model(tmp_path / "base")
    one = save_adapter(base, tmp_path / "one", 1)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/stand_in.py "$@"\n')
    python.chmod(0o755)
    settings = Settings(
        str(base), adapters={"one": str(one)}, engine="vllm", vllm_python=str(python)
    )
    engine = choose(settings)
    with (
        running(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client,
    ):
        for name in ("base", "one"):
            answer = client.chat.completions.create(model=name, messages=HELLO)
            assert answer.choices[0].message.content == f"I am {name}"
            assert answer.usage.total_tokens == 5
    assert engine._process.returncode is not None
    failing = Settings(str(base), engine="vllm", vllm_python="/bin/false")
    with pytest.raises(ModelError, match="FG-SERVE-007"), running(choose(failing)):
        pass
