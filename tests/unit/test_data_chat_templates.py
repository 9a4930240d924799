"""Chat templates by name: exact text, EOS, mapping, system text; ShareGPT columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from test_data_tiny import CHATML, assistant, tiny, user

from finegraft.core.errors import ConfigError
from finegraft.data.chat_templates import get_chat_template, standardize_sharegpt, template_names
from finegraft.data.render import render, render_prompt

TURNS = [user("U1"), assistant("A1"), user("U2"), assistant("A2")]
NO_BOS = {"bos_token": None, "eos_token": "<|endoftext|>"}
EXPECTED = {
    "chatml": "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n",
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\nU1<|endoftext|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|endoftext|>",
    "phi-3": "<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n",
    "gemma": "<start_of_turn>user\nU1<|endoftext|>\n<start_of_turn>model\nA1<|endoftext|>\n",
    "alpaca": "Below is an instruction that describes a task. Write a response that completes "
    "the request.\n\n### Instruction:\nU1\n\n### Response:\nA1<|endoftext|>\n\n",
    "llama-2": "[INST] U1 [/INST] A1 <|endoftext|>",
    "llama-3.1": "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
    "December 2023\nToday Date: 26 Jul 2024\n\n<|endoftext|><|start_header_id|>user"
    "<|end_header_id|>\n\nU1<|endoftext|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "A1<|endoftext|>",
    "phi-4": "<|im_start|>user<|im_sep|>U1<|im_end|><|im_start|>assistant<|im_sep|>A1<|im_end|>",
    "gemma-3": "<start_of_turn>user\nU1<|endoftext|>\n<start_of_turn>model\nA1<|endoftext|>\n",
    "qwen-2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n",
    "mistral": "[INST] U1 [/INST] A1<|endoftext|>",
    "zephyr": "<|user|>\nU1<|endoftext|>\n<|assistant|>\nA1<|endoftext|>\n",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the questions of the user. "
    "USER: U1 ASSISTANT: A1<|endoftext|>",
}


def text(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def test_every_template_is_pinned() -> None:
    assert template_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_exact_text_prompt_prefix_and_mask(name: str) -> None:
    tokenizer = get_chat_template(tiny(None, **NO_BOS), name)
    assert text(tokenizer, TURNS[:2]) == EXPECTED[name]
    prompt = text(tokenizer, TURNS[:3], add_generation_prompt=True)
    assert text(tokenizer, TURNS).startswith(prompt)
    rendered = render(TURNS, tokenizer)
    ids = render_prompt(TURNS[:1], tokenizer)
    assert rendered.input_ids[: len(ids)] == ids
    learnt = [i for i, flag in zip(rendered.input_ids, rendered.trained, strict=True) if flag]
    end = tokenizer.eos_token
    said = tokenizer.decode(learnt).replace(" ", "")
    assert said == f"A1{end}A2{end}"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_system_text_from_either_side(name: str) -> None:
    own = get_chat_template(tiny(None, **NO_BOS), name)
    asked = get_chat_template(tiny(None, **NO_BOS), name, system_message='Say "{{ 1 }}"\né😀')
    spoken = text(own, [{"role": "system", "content": 'Say "{{ 1 }}"\né😀'}, *TURNS])
    assert 'Say "{{ 1 }}"\né😀' in spoken
    assert text(asked, TURNS) == spoken


def test_bos_where_the_family_has_one() -> None:
    for name in ("llama-3", "phi-3", "gemma", "alpaca", "mistral", "vicuna"):
        tokenizer = get_chat_template(tiny(None, bos_token="<|user|>"), name)
        assert text(tokenizer, TURNS).startswith("<|user|>"), name


def test_end_of_turn_in_the_vocabulary_becomes_eos() -> None:
    tokenizer = tiny(None, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    size = len(tokenizer)
    assert get_chat_template(tokenizer, "chatml") is tokenizer
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == size
    kept = get_chat_template(tiny(None, **NO_BOS), "chatml", map_eos_token=False)
    assert kept.eos_token == "<|endoftext|>"


def test_end_of_turn_outside_the_vocabulary_gives_way() -> None:
    tokenizer = tiny(None, **NO_BOS)
    size = len(tokenizer)
    get_chat_template(tokenizer, "gemma")
    assert tokenizer.eos_token == "<|endoftext|>" and len(tokenizer) == size
    assert "<end_of_turn>" not in text(tokenizer, TURNS)
    kept = get_chat_template(tiny(None, **NO_BOS), "gemma", map_eos_token=False)
    assert "<end_of_turn>" in text(kept, TURNS)


def test_own_templates(tmp_path: Path) -> None:
    assert text(get_chat_template(tiny(None), CHATML), TURNS) == text(tiny(), TURNS)
    path = tmp_path / "own.jinja"
    path.write_text("{# end_of_turn: <|end|> #}\n" + CHATML.replace("<|im_end|>", "<|end|>"))
    from_file = get_chat_template(tiny(None), path)
    assert from_file.eos_token == "<|end|>"
    assert text(from_file, TURNS).startswith("<|im_start|>user\nU1<|end|>")
    pair = get_chat_template(tiny(None), (CHATML.replace("im_end", "end"), "<|end|>"))
    assert pair.eos_token == "<|end|>"
    placed = get_chat_template(tiny(None), "{system_message}" + CHATML, system_message="S")
    assert text(placed, TURNS).startswith("S<|im_start|>")


def test_sharegpt_mapping_reads_both_spellings() -> None:
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    tokenizer = get_chat_template(tiny(None), "chatml", mapping)
    told = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "U1"},
        {"from": "gpt", "value": "A1"},
    ]
    plain = [{"role": "system", "content": "S"}, *TURNS[:2]]
    assert text(tokenizer, told) == text(tokenizer, plain) == text(tiny(), plain)
    assert sum(render(plain, tokenizer).trained) == sum(render(plain, tiny()).trained)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("llama", "llama-2"),
        ("llama-3.3", "llama-3.1"),
        ("qwen25", "qwen-2.5"),
        ("gemma3", "gemma-3"),
    ],
)
def test_unsloths_other_names(alias: str, name: str) -> None:
    one, other = (get_chat_template(tiny(None, **NO_BOS), word) for word in (alias, name))
    assert one.chat_template == other.chat_template


def test_gemma_3_takes_turns() -> None:
    tokenizer = get_chat_template(tiny(None, **NO_BOS), "gemma-3")
    with pytest.raises(Exception, match="one after the other"):
        text(tokenizer, [user("a"), user("b")])


def test_llama_31_calls_one_tool_a_turn() -> None:
    tokenizer = get_chat_template(tiny(None, **NO_BOS), "llama-3.1")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    with pytest.raises(Exception, match="one tool a turn"):
        text(tokenizer, [user("a"), {"role": "assistant", "tool_calls": [call, call]}])


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"FG-DATA-010.*'chatm'(.|\n)*did you mean 'chatml'"):
        get_chat_template(tiny(), "chatm")
    with pytest.raises(ConfigError, match="FG-DATA-010"):
        get_chat_template(tiny(), "/no/such/file.jinja")
    with pytest.raises(ConfigError, match=r"FG-DATA-016.*no place for a system message"):
        get_chat_template(tiny(), CHATML, system_message="S")
    with pytest.raises(ConfigError, match=r"FG-DATA-016.*mapping has the key 'rolle'"):
        get_chat_template(tiny(), "chatml", {"rolle": "from"})
    with pytest.raises(ConfigError, match=r"FG-DATA-016.*no EOS token"):
        get_chat_template(tiny(eos_token=None), "zephyr")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_unknown_roles_are_refused(name: str) -> None:
    tokenizer = get_chat_template(tiny(None, **NO_BOS), name)
    with pytest.raises(Exception, match="has no role critic"):
        text(tokenizer, [user("a"), {"role": "critic", "content": "b"}])


def test_standardize_sharegpt() -> None:
    told = [{"from": "system", "value": "S"}, {"from": "human", "value": "a"}]
    told.append({"from": "gpt", "value": "b"})
    found = standardize_sharegpt(datasets.Dataset.from_list([{"conversations": told}]))
    expected = [{"role": "system", "content": "S"}, user("a"), assistant("b")]
    assert found[0]["conversations"] == expected
    assert standardize_sharegpt(found)[0]["conversations"] == expected
    other = datasets.Dataset.from_list([{"text": "a"}])
    assert standardize_sharegpt(other) is other
    odd = datasets.Dataset.from_list([{"conversations": [{"from": "critic", "value": "a"}]}])
    with pytest.raises(ConfigError, match=r"FG-DATA-016.*'critic'"):
        standardize_sharegpt(odd)
    fixed = standardize_sharegpt(odd, aliases_for_user=["critic"])
    assert fixed[0]["conversations"] == [user("a")]
