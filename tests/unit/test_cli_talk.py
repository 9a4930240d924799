"""Generating and chatting, with a stand-in for the model behind real command lines."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finegraft.cli import talk
from finegraft.cli.main import app
from finegraft.core.errors import DataError
from finegraft.inference import generate

runner = CliRunner()


@pytest.fixture
def asked(monkeypatch):
    """Every conversation that reached the model, with its options."""
    seen = []

    def complete(model, tokenizer, conversations, **options):
        seen.extend((list(c), options) for c in conversations)
        return [c[-1]["content"].upper() for c in conversations]

    def stream(model, tokenizer, messages, **options):
        seen.append((list(messages), options))
        yield from messages[-1]["content"].upper()

    monkeypatch.setattr(talk, "load", lambda out, name, four_bit: ("model", "tokenizer"))
    monkeypatch.setattr(generate, "complete", complete)
    monkeypatch.setattr(generate, "stream", stream)
    return seen


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_generate_prints_the_answer_alone(asked):
    done = runner.invoke(app, ["generate", "m", "hello [b]there[/b]"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "HELLO [B]THERE[/B]\n"


def test_generate_json_takes_prompts_and_a_file(asked, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("second\n\nthird\n")
    words = ["--file", str(file), "--system", "be brief", "--max-new-tokens", "5", "--json"]
    done = runner.invoke(app, ["generate", "m", "first", *words])
    prompts = ["first", "second", "third"]
    assert json.loads(done.stdout) == {
        "model": "m",
        "outputs": [{"prompt": p, "text": p.upper()} for p in prompts],
    }
    system = {"role": "system", "content": "be brief"}
    assert [messages for messages, _ in asked] == [[system, user(p)] for p in prompts]
    assert asked[0][1]["max_new_tokens"] == 5
    assert asked[0][1]["temperature"] == 0.0


def test_generate_reads_standard_input(asked):
    done = runner.invoke(app, ["generate", "m", "--file", "-"], input="a\nb\n")
    assert done.stdout == "> a\nA\n> b\nB\n"


@pytest.mark.parametrize("words", [[], ["--file", "/no/such/file"]])
def test_generate_without_a_prompt_loads_nothing(monkeypatch, words):
    monkeypatch.setattr(talk, "load", lambda *_: pytest.fail("the model was loaded"))
    done = runner.invoke(app, ["generate", "m", *words, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "FG-CLI-005"


def test_a_piped_chat_has_turns_that_build_on_each_other(asked):
    done = runner.invoke(app, ["chat", "m", "--json"], input="hi\n\nmore\n")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "model": "m",
        "turns": [{"user": "hi", "assistant": "HI"}, {"user": "more", "assistant": "MORE"}],
    }
    assert asked[1][0] == [user("hi"), assistant("HI"), user("more")]


def test_a_piped_chat_prints_the_answers(asked):
    assert runner.invoke(app, ["chat", "m"], input="hi\nmore\n").stdout == "HI\nMORE\n"


def test_commands_of_a_chat(asked):
    lines = "/system be kind\none\n/reset\ntwo\n/system\nthree\n/exit\nfour\n"
    done = runner.invoke(app, ["chat", "m", "--system", "first"], input=lines)
    kind = {"role": "system", "content": "be kind"}
    assert [messages for messages, _ in asked] == [
        [kind, user("one")],
        [kind, user("two")],
        [user("three")],
    ]
    assert "FOUR" not in done.stdout
    assert "/reset" in runner.invoke(app, ["chat", "m"], input="/what\n").stdout


def chat(console=None):
    return talk.Chat("m", "t", console or Console(file=io.StringIO()), True, {})


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch):
    closed = []

    def stream(*_, **__):
        try:
            yield "half "
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(generate, "stream", stream)
    lines = iter(["question"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    one = chat()
    one.run()
    assert one.messages == [user("question"), assistant("half ")]
    assert closed
    assert "[stopped]" in one.console.file.getvalue()


def test_ctrl_c_in_a_pipe_ends_the_command(monkeypatch, asked):
    def stream(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(generate, "stream", stream)
    assert runner.invoke(app, ["chat", "m"], input="hi\n").exit_code == 130


def test_a_conversation_that_is_too_long_does_not_end_the_chat(monkeypatch):
    def stream(*_, **__):
        raise DataError("FG-GEN-001", "prompt 0 has 9000 tokens", fix="/reset")
        yield

    monkeypatch.setattr(generate, "stream", stream)
    one = chat()
    one._answer("question")
    assert "FG-GEN-001" in one.console.file.getvalue()
    assert one.messages == [] and one.turns == []
    one.interactive = False
    with pytest.raises(DataError, match="FG-GEN-001"):
        one._answer("question")


def test_chat_checks_its_numbers_before_it_loads(monkeypatch):
    monkeypatch.setattr(talk, "load", lambda *_: pytest.fail("the model was loaded"))
    done = runner.invoke(app, ["chat", "m", "--top-p", "0", "--json"], input="hi\n")
    assert json.loads(done.stdout)["error"]["code"] == "FG-GEN-002"
