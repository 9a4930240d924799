"""Loss masks of every chat template, token by token: single and several turns, system, tools.

A ``+`` stands before what is trained and ``¦`` between tokens. The texts were checked against the
formats that the model's makers describe.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tiny import SPECIAL, assistant, pieces, tiny, user
from tokenizers import Regex, pre_tokenizers

from finegraft.core.errors import DataError
from finegraft.data.chat_templates import get_chat_template, template_names
from finegraft.data.prepare import IGNORE, prepare
from finegraft.data.render import render, render_prompt
from finegraft.data.responses import detect_markers, marker_ids, mask_outside_responses

SENTENCES, GEMMA = ("<s>", "</s>"), ("<bos>", "<eos>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>")
NO_BOS = (None, "<|endoftext|>")
ENDS = {  # BOS and EOS of each family
    "alpaca": SENTENCES,
    "chatml": NO_BOS,
    "gemma": GEMMA,
    "gemma-3": GEMMA,
    "llama-2": SENTENCES,
    "llama-3": LLAMA_3,
    "llama-3.1": LLAMA_3,
    "mistral": SENTENCES,
    "phi-3": ("<s>", "<|endoftext|>"),
    "phi-4": NO_BOS,
    "qwen-2.5": NO_BOS,
    "vicuna": SENTENCES,
    "zephyr": SENTENCES,
}
OWN = [
    *("<s>", "</s>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>"),
    *("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_sep|>"),
    "<|system|>",
]
HEADER = "<|start_header_id|>¦{}¦<|end_header_id|>¦\n\n¦"
ASSISTANT = HEADER.format("assistant")
# How Llama-3 splits a text: line ends stay together, whatever follows them.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "<|im_start|>¦system¦\n¦You¦<|im_end|>¦\n¦<|im_start|>¦user¦\n¦hello¦<|im_end|>¦\n¦"
    "<|im_start|>¦assistant¦\n¦+world¦+<|im_end|>¦\n¦<|im_start|>¦user¦\n¦bye¦<|im_end|>¦\n¦"
    "<|im_start|>¦assistant¦\n¦+bye¦+ now¦+<|im_end|>¦\n"
)
GEMMAS = (
    "<bos>¦<start_of_turn>¦user¦\n¦You¦\n¦\n¦hello¦<end_of_turn>¦\n¦<start_of_turn>¦m¦o¦d¦el¦\n¦"
    "+world¦+<end_of_turn>¦\n¦<start_of_turn>¦user¦\n¦bye¦<end_of_turn>¦\n¦<start_of_turn>¦"
    "m¦o¦d¦el¦\n¦+bye¦+ now¦+<end_of_turn>¦\n"
)
AFTER_SYSTEM = (
    HEADER.format("user") + "hello¦<|eot_id|>¦" + ASSISTANT + "+world¦+<|eot_id|>¦"
    "" + HEADER.format("user") + "bye¦<|eot_id|>¦" + ASSISTANT + "+bye¦+ now¦+<|eot_id|>"
)
PINNED = {
    "alpaca": "<s>¦You¦\n¦\n¦###¦ ¦I¦n¦st¦r¦u¦c¦t¦i¦o¦n¦:¦\n¦hello¦\n¦\n¦###¦ ¦R¦e¦s¦p¦o¦n¦s¦e¦:¦\n"
    "¦+world¦+</s>¦\n¦\n¦###¦ ¦I¦n¦st¦r¦u¦c¦t¦i¦o¦n¦:¦\n¦bye¦\n¦\n¦###¦ ¦R¦e¦s¦p¦o¦n¦s¦e¦:¦\n"
    "¦+bye¦+ now¦+</s>¦\n\n",
    "chatml": CHATML,
    "gemma": GEMMAS,
    "gemma-3": GEMMAS,
    "llama-2": "<s>¦[¦I¦N¦S¦T¦]¦ ¦<¦<¦S¦Y¦S¦>¦>¦\n¦You¦\n¦<¦<¦/¦S¦Y¦S¦>¦>¦\n¦\n¦hello¦ ¦[¦/¦"
    "I¦N¦S¦T¦]¦"
    "+ world¦+ ¦+</s>¦<s>¦[¦I¦N¦S¦T¦]¦ bye¦ ¦[¦/¦I¦N¦S¦T¦]¦+ bye¦+ now¦+ ¦+</s>",
    "llama-3": "<|begin_of_text|>¦" + HEADER.format("system") + "You¦<|eot_id|>¦" + AFTER_SYSTEM,
    "llama-3.1": "<|begin_of_text|>¦"
    + HEADER.format("system")
    + "C¦u¦t¦t¦i¦n¦g¦ ¦K¦now¦l¦e¦d¦g¦e¦ ¦D¦a¦t¦e¦:¦ ¦D¦e¦c¦em¦b¦er¦ ¦2¦0¦2¦3¦\n¦T¦o¦d¦a¦y¦ ¦"
    "D¦a¦t¦e¦:¦ "
    "¦2¦6¦ ¦J¦u¦l¦ ¦2¦0¦2¦4¦\n\n¦You¦<|eot_id|>¦" + AFTER_SYSTEM,
    "mistral": "<s>¦[¦I¦N¦S¦T¦]¦ You¦\n¦\n¦hello¦ ¦[¦/¦I¦N¦S¦T¦]¦+ world¦+</s>¦[¦I¦N¦S¦T¦]¦"
    " bye¦ ¦[¦/"
    "¦I¦N¦S¦T¦]¦+ bye¦+ now¦+</s>",
    "phi-3": "<s>¦<|system|>¦\n¦You¦<|end|>¦\n¦<|user|>¦\n¦hello¦<|end|>¦\n¦<|assistant|>¦"
    "\n¦+world¦"
    "+<|end|>¦\n¦<|user|>¦\n¦bye¦<|end|>¦\n¦<|assistant|>¦\n¦+bye¦+ now¦+<|end|>¦\n",
    "phi-4": "<|im_start|>¦system¦<|im_sep|>¦You¦<|im_end|>¦<|im_start|>¦user¦<|im_sep|>¦hello¦"
    "<|im_end|>¦<|im_start|>¦assistant¦<|im_sep|>¦+world¦+<|im_end|>¦<|im_start|>¦user¦<|im_sep|>¦"
    "bye¦<|im_end|>¦<|im_start|>¦assistant¦<|im_sep|>¦+bye¦+ now¦+<|im_end|>",
    "qwen-2.5": CHATML,
    "vicuna": "<s>¦You¦ ¦U¦S¦E¦R¦:¦ hello¦ ¦A¦S¦S¦I¦S¦T¦A¦N¦T¦:¦+ world¦+</s>¦U¦S¦E¦R¦:¦"
    " bye¦ ¦A¦S¦S¦I"
    "¦S¦T¦A¦N¦T¦:¦+ bye¦+ now¦+</s>",
    "zephyr": "<|system|>¦\n¦You¦</s>¦\n¦<|user|>¦\n¦hello¦</s>¦\n¦<|assistant|>¦\n¦+world¦"
    "+</s>¦\n¦"
    "<|user|>¦\n¦bye¦</s>¦\n¦<|assistant|>¦\n¦+bye¦+ now¦+</s>¦\n",
}
PAIR = [user("hello"), assistant("world")]
TURNS = [{"role": "system", "content": "You"}, *PAIR, user("bye"), assistant("bye now")]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
CALLING = [
    user("hello"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "now"},
    assistant("world"),
]


def family(name: str) -> Any:
    """A tokenizer with the family's own tokens and template."""
    tokenizer = tiny(None, bos_token=None, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": OWN})
    tokenizer.bos_token, tokenizer.eos_token = ENDS[name]
    if name.startswith("llama-3"):
        split = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
        spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spelt])
    return get_chat_template(tokenizer, name)


def marked(tokenizer: Any, ids: list[int], trained: list[bool]) -> str:
    words = pieces(tokenizer, ids)
    return "¦".join("+" * flag + word for word, flag in zip(words, trained, strict=True))


def test_every_template_is_pinned() -> None:
    assert sorted(PINNED) == sorted(ENDS) == template_names()


@pytest.mark.parametrize("name", sorted(PINNED))
def test_system_and_two_turns(name: str) -> None:
    tokenizer = family(name)
    rendered = render(TURNS, tokenizer)
    assert marked(tokenizer, rendered.input_ids, rendered.trained) == PINNED[name]
    prompt = render_prompt(TURNS[:-1], tokenizer)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.trained[len(prompt)] and not rendered.trained[len(prompt) - 1]


@pytest.mark.parametrize("name", sorted(PINNED))
def test_a_single_turn(name: str) -> None:
    tokenizer = family(name)
    rendered = render(PAIR, tokenizer)
    words = marked(tokenizer, rendered.input_ids, rendered.trained)
    before, answer = words[: words.index("+")], words[words.index("+") :]
    end = next(token for token in ("<|im_end|>", "<|end|>", *OWN) if "+" + token in answer)
    assert answer.startswith(("+world", "+ world")) and answer.endswith((f"+{end}", "\n"))
    assert PINNED[name][PINNED[name].index("+") :].startswith(answer.rstrip("¦\n")), answer
    assert "hello" in before


@pytest.mark.parametrize("name", sorted(PINNED))
def test_train_on_responses_only(name: str) -> None:
    """Markers give the same mask, and also what stands between an answer's end and the next."""
    tokenizer = family(name)
    ids = render(TURNS, tokenizer).input_ids
    instruction, response = (marker_ids(tokenizer, part) for part in detect_markers(tokenizer))
    labels = mask_outside_responses(ids, ids, instruction, response)
    assert [label in (i, IGNORE) for label, i in zip(labels, ids, strict=True)].count(False) == 0
    expected = re.sub(
        r"(\+<[^¦]+>)((?:¦\n+)+)", lambda m: m[1] + m[2].replace("¦", "¦+"), PINNED[name]
    )
    assert marked(tokenizer, ids, [label != IGNORE for label in labels]) == expected


def spans(tokenizer: Any, rendered: Any) -> list[str]:
    """What is trained, as texts."""
    found: list[list[int]] = []
    for i, (token, flag) in enumerate(zip(rendered.input_ids, rendered.trained, strict=True)):
        if flag:
            if not i or not rendered.trained[i - 1]:
                found.append([])
            found[-1].append(token)
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize(
    ("name", "call", "result"),
    [
        (
            "qwen-2.5",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
            "<|im_end|>",
            "<|im_start|>user\n<tool_response>\nnow\n</tool_response><|im_end|>\n",
        ),
        (
            "llama-3.1",
            '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>',
            "<|start_header_id|>ipython<|end_header_id|>\n\nnow<|eot_id|>",
        ),
    ],
)
def test_tools_are_read_and_calls_are_learnt(name: str, call: str, result: str) -> None:
    tokenizer = family(name)
    rendered = render(CALLING, tokenizer, tools=[TOOL])
    text = tokenizer.decode(rendered.input_ids)
    end = call[call.rindex("<|") :]
    assert spans(tokenizer, rendered) == [call, "world" + end]
    assert '"name": "get_weather"' in text[: text.index(call)], "the tool stands in the prompt"
    assert result in text
    prompt = render_prompt(CALLING[:1], tokenizer, tools=[TOOL])
    assert rendered.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", sorted(set(PINNED) - {"qwen-2.5", "llama-3.1"}))
def test_a_template_without_calls_refuses_them(name: str) -> None:
    with pytest.raises(DataError, match="FG-DATA-011"):
        render(CALLING, family(name), tools=[TOOL])


def test_two_calls_and_two_results_in_one_turn() -> None:
    tokenizer = family("qwen-2.5")
    result = {"role": "tool", "content": "now"}
    turns = [user("hello"), {"role": "assistant", "tool_calls": [CALL, CALL]}, result, result]
    rendered = render([*turns, assistant("world")], tokenizer, tools=[TOOL])
    text = tokenizer.decode(rendered.input_ids)
    assert spans(tokenizer, rendered)[0].count("<tool_call>") == 2
    assert text.count("<|im_start|>user") == 2 and text.count("<tool_response>") == 2


def test_a_tokenizer_that_joins_line_ends_with_what_follows() -> None:
    """GPT-2's splits "\\n\\n" before a word, so no ids fit the prompts of both answers.

    Each answer follows the ids that its own prompt ends with; the text is the same throughout.
    """
    tokenizer = get_chat_template(tiny(None, bos_token=None, eos_token="<|end|>"), "llama-3")
    rendered = render(TURNS, tokenizer)
    answers = [
        i
        for i in range(1, len(rendered.trained))
        if rendered.trained[i - 1 : i + 1] == [False, True]
    ]
    for turns, first in zip((TURNS[:2], TURNS[:4]), answers, strict=True):
        prompt = render_prompt(turns, tokenizer)
        assert tokenizer.decode(rendered.input_ids[:first]) == tokenizer.decode(prompt)
        assert rendered.input_ids[first - 3 : first] == prompt[-3:]
        assert pieces(tokenizer, prompt[-1:]) == ["\n\n"]


# No special token inside a text: that is a fault of the rows, which the audit reports.
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30
).filter(lambda text: bool(text.strip()) and not any(s in text for s in [*SPECIAL, *OWN]))
CONVERSATIONS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


@settings(max_examples=8, deadline=None)
@given(turns=CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(PINNED))
def test_any_text_is_masked_exactly(name: str, turns: list[tuple[str, str]]) -> None:
    check_mask(name, turns)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(turns=CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(PINNED))
def test_any_text_is_masked_exactly_long(name: str, turns: list[tuple[str, str]]) -> None:
    check_mask(name, turns)


FAMILY = {name: family(name) for name in PINNED}


def check_mask(name: str, turns: list[tuple[str, str]]) -> None:
    """Every answer is learnt whole with its end, nothing else is, and prompts are prefixes."""
    tokenizer = FAMILY[name]
    messages = [m for q, a in turns for m in (user(q), assistant(a))]
    rendered = render(messages, tokenizer)
    learnt = [said.strip() for said in spans(tokenizer, rendered)]
    assert len(learnt) == len(turns)
    for said, (_, answer) in zip(learnt, turns, strict=True):
        whole = re.sub(r"\s+", " ", said)
        assert whole.startswith(re.sub(r"\s+", " ", answer).strip()[:1])
        rest = said.replace(answer.strip(), "", 1).strip()
        assert rest in (*OWN, *SPECIAL), (said, answer)
    for place in range(1, len(messages), 2):
        prompt = render_prompt(messages[:place], tokenizer)
        assert rendered.input_ids[: len(prompt)] == prompt
        assert not rendered.trained[len(prompt) - 1] and rendered.trained[len(prompt)]
    (labels,) = prepare([messages], tokenizer, max_length=1 << 20).labels
    assert [label != IGNORE for label in labels] == rendered.trained
