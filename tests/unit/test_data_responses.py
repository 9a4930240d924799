"""Markers in raw text: the part behind train_on_responses_only."""

from __future__ import annotations

import pytest
from test_data_tiny import CHATML, assistant, tiny, user

from finegraft.core.errors import DataError
from finegraft.data.chat_templates import get_chat_template, template_names
from finegraft.data.conversation import TEXT_ROLE
from finegraft.data.render import render
from finegraft.data.responses import detect_markers, marker_ids, mask_outside_responses

TURNS = [user("hello"), assistant("world"), user("bye"), assistant("now")]


def test_labels_between_response_and_instruction() -> None:
    #      I  i  R   R  a  b  I  i  R   R  c
    ids = [1, 5, 2, 3, 7, 8, 1, 6, 2, 3, 9]
    out = mask_outside_responses(ids, ids, [[1]], [[2, 3]])
    assert out == [-100, -100, -100, -100, 7, 8, -100, -100, -100, -100, 9]


def test_labels_are_only_ever_removed() -> None:
    assert mask_outside_responses([2, 7, 8], [2, -100, 8], [[1]], [[2]]) == [-100, -100, 8]
    assert mask_outside_responses([7, 8], [7, 8], [[1]], [[2]]) == [-100, -100]
    assert mask_outside_responses([], [], [[1]], [[2]]) == []


def test_the_longest_variant_wins() -> None:
    assert mask_outside_responses([2, 3, 7], [2, 3, 7], [[1]], [[2], [2, 3]]) == [-100, -100, 7]


@pytest.mark.parametrize("name", template_names())
def test_detected_markers_mask_raw_text_like_render(name: str) -> None:
    tokenizer = get_chat_template(tiny(None, bos_token=None, eos_token="<|endoftext|>"), name)
    instruction, response = detect_markers(tokenizer)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    raw = render([{"role": TEXT_ROLE, "content": text}], tokenizer)
    out = mask_outside_responses(
        raw.input_ids,
        raw.input_ids,
        marker_ids(tokenizer, instruction),
        marker_ids(tokenizer, response),
    )
    learnt = tokenizer.decode([i for i in out if i != -100])
    end = tokenizer.eos_token
    assert "".join(learnt.split()) == f"world{end}now{end}"


def test_chatml_markers_are_unsloths() -> None:
    assert detect_markers(tiny()) == ("<|im_start|>user\n", "<|im_start|>assistant\n")


def test_marker_variants_with_and_without_context() -> None:
    tokenizer = tiny()
    plain = tokenizer("### now", add_special_tokens=False)["input_ids"]
    variants = marker_ids(tokenizer, "### now")
    assert plain in variants
    assert [len(v) for v in variants] == sorted((len(v) for v in variants), reverse=True)
    # After another newline, the first one of this marker belongs to a token that begins before it.
    inner = tokenizer("\n### now", add_special_tokens=False)["input_ids"]
    assert inner in marker_ids(tokenizer, "\n\n### now")
    assert inner not in marker_ids(tokenizer, "### now")


def test_no_markers() -> None:
    with pytest.raises(DataError, match=r"FG-DATA-015.*no chat template"):
        detect_markers(tiny(None))
    with pytest.raises(DataError, match=r"FG-DATA-015.*marks no turns"):
        detect_markers(tiny("{% for m in messages %}{{ m['content'] }} {% endfor %}"))
    with pytest.raises(DataError, match=r"FG-DATA-015.*in order"):
        detect_markers(tiny(CHATML.replace("m['content']", "'x'")))
    with pytest.raises(DataError, match=r"FG-DATA-015.*empty"):
        marker_ids(tiny(), "\n")
