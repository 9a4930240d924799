"""Layouts found in the wild: tool calls, speakers, systems, and rows that are for other tasks."""

from __future__ import annotations

import json
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft.core.errors import DataError
from finegraft.data.rows import apply_map, conversations, detect

WEATHER = {"name": "weather", "arguments": {"city": "Rome"}}
CALL = {"type": "function", "function": WEATHER}
ASKED = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def read(row: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    name, layout = detect([row])
    return name, conversations([row], layout)[0]


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        (
            {"id": 1, "system_prompt": "S", "question": "a", "response": "b"},  # OpenOrca
            "question_answer",
            [{"role": "system", "content": "S"}, ASKED, ANSWER],
        ),
        (
            {"instruction": "q", "context": "c", "response": "b", "category": "qa"},  # Dolly
            "alpaca",
            [{"role": "user", "content": "q\n\nc"}, ANSWER],
        ),
        (
            {"instruction": "a", "input": "", "output": "b", "system": "", "history": [["x", "y"]]},
            "alpaca",
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y"},
                *(ASKED, ANSWER),
            ],
        ),
        (
            {"conversation": [{"human": "a", "assistant": "b"}, {"human": "a", "assistant": "b"}]},
            "sharegpt",
            [ASKED, ANSWER, ASKED, ANSWER],
        ),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "a"}]},
            "sharegpt",
            [{"role": "system", "content": "S"}, ASKED],
        ),
        (
            {"system": "S", "messages": [{"role": "system", "content": "T"}, ASKED]},
            "messages",
            [{"role": "system", "content": "T"}, ASKED],
        ),
        (
            {"prompt": "a", "completion": {"from": "gpt", "value": "b"}},
            "prompt_completion",
            [ASKED, ANSWER],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": "a"}]}]},
            "messages",
            [ASKED],
        ),
        (
            {"messages": [ASKED, {**ANSWER, "loss_weight": 0.0}]},
            "messages",
            [ASKED, {**ANSWER, "weight": 0.0}],
        ),
    ],
)
def test_layouts(row: dict[str, Any], name: str, messages: list[dict[str, Any]]) -> None:
    assert read(row) == (name, messages)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [WEATHER]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
        },
        {"from": "function_call", "value": json.dumps(WEATHER)},
        {"from": "tool_call", "value": json.dumps([WEATHER])},
    ],
)
def test_every_spelling_of_a_call_is_one(turn: dict[str, Any]) -> None:
    assert read({"messages": [ASKED, turn]})[1][1] == {"role": "assistant", "tool_calls": [CALL]}


def test_ids_of_calls_are_kept_and_text_beside_them() -> None:
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": [{**CALL, "id": "7"}]}
    assert read({"messages": [ASKED, turn]})[1][1] == turn


def test_a_call_that_is_no_json_stays_text() -> None:
    turn = {"from": "function_call", "value": "weather(Rome)"}
    expected = {"role": "assistant", "content": "weather(Rome)"}
    assert read({"conversations": [turn]})[1] == [expected]


def test_results_of_tools_under_every_name() -> None:
    for speaker in ("tool", "observation", "ipython", "function_response", "tool_response"):
        assert read({"conversations": [{"from": speaker, "value": "1"}]})[1][0]["role"] == "tool"


def test_arguments_that_parquet_filled_with_nulls() -> None:
    calls = [[CALL], [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]]
    rows = [{"messages": [{"role": "assistant", "tool_calls": one}]} for one in calls]
    filled = pyarrow.Table.from_pylist(rows).to_pylist()
    found = conversations(filled, detect(filled)[1])
    assert [row[0]["tool_calls"] for row in found] == calls


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ("oops", r"tool_calls' is not a list of tool calls"),
        ([3], "is not a list of tool calls"),
        ([{"id": "7"}], "has no function with a name"),
        ([{"function": {"name": "f", "arguments": "oops"}}], "is not a JSON object"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], "is not a JSON object"),
    ],
)
def test_broken_calls(calls: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"FG-DATA-012: row 1: .*{said}"):
        read({"messages": [{"role": "assistant", "tool_calls": calls}]})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "output": "b", "history": "x"}, "'history' is str"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"'history\[0\]' is not a pair"),
        ({"conversations": [{"alice": "a"}]}, "a turn with the keys alice"),
    ],
)
def test_broken_extras(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"FG-DATA-012: row 1: .*{said}"):
        read(row)


@pytest.mark.parametrize(
    ("row", "code", "fix"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "FG-DATA-034",
            "--map completion=chosen",
        ),
        ({"chosen": [], "rejected": []}, "FG-DATA-034", "--map messages=chosen"),
        (
            {"conversations": [], "chosen": {}, "rejected": {}},
            "FG-DATA-034",
            "--map prompt=conversations --map completion=chosen",
        ),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "FG-DATA-034", "--map prompt=question"),
        (
            {"chosen_messages": [], "rejected_messages": []},
            "FG-DATA-034",
            "--map messages=chosen_messages",
        ),
        ({"messages": [ASKED, ANSWER], "label": False}, "FG-DATA-034", "whose label is true"),
        ({"prompt": "a", "completion": "b", "label": True}, "FG-DATA-034", "whose label is true"),
        ({"text": "a", "label": 1}, "FG-DATA-035", "--task classification"),
        ({"sentence": "a", "sentiment": "pos"}, "FG-DATA-035", "--map prompt=sentence"),
        ({"tokens": ["a"], "ner_tags": [0]}, "FG-DATA-035", "--task token_classification"),
        ({"text": "a", "entities": []}, "FG-DATA-035", "--task token_classification"),
        ({"messages": [ASKED], "images": ["a.jpg"]}, "FG-DATA-037", "remove the column 'images'"),
    ],
)
def test_rows_of_other_tasks_say_what_to_do(row: dict[str, Any], code: str, fix: str) -> None:
    with pytest.raises(DataError, match=rf"{code}: (.|\n)*{fix}"):
        detect([row])


def test_the_mapping_for_preferences_learns_what_was_chosen() -> None:
    row = {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    }
    mapped = apply_map([row], {"prompt": "conversations", "completion": "chosen"})
    assert read(mapped[0]) == ("prompt_completion", [ASKED, ANSWER])
    mapped = apply_map([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"completion": "chosen"})
    assert read(mapped[0])[1] == [ASKED, ANSWER]


def test_columns_that_only_look_like_another_task() -> None:
    assert read({"messages": [ASKED], "images": []})[0] == "messages"
    assert read({"prompt": "a", "completion": "b", "label": "good"})[0] == "prompt_completion"
    assert read({"prompt": "a", "completion": "b", "tags": ["x"]})[0] == "prompt_completion"
    assert read({"text": "a", "source": "web", "tags": ["news"]})[0] == "text"
    assert detect([{"text": "a", "label": 1}], "text")[0] == "text", "asked for by name"


TEXT = st.text(min_size=1, max_size=40).filter(str.strip)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(turns=TURNS, system=st.none() | TEXT)
def test_a_conversation_is_the_same_in_every_layout(
    turns: list[tuple[str, str]], system: str | None
) -> None:
    check_layouts(turns, system)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(turns=TURNS, system=st.none() | TEXT)
def test_a_conversation_is_the_same_in_every_layout_long(
    turns: list[tuple[str, str]], system: str | None
) -> None:
    check_layouts(turns, system)


def check_layouts(turns: list[tuple[str, str]], system: str | None) -> None:
    """Write a conversation in each layout that can hold it and read the same messages back."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    told = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    pairs = [{"human": q, "gpt": a} for q, a in turns]
    rows: list[dict[str, Any]] = [
        {"messages": messages},
        {"conversations": told},
        {"conversation": pairs, "system": system},
        {"messages": json.loads(json.dumps(messages))},
        {
            "instruction": turns[-1][0],
            "output": turns[-1][1],
            "history": [list(pair) for pair in turns[:-1]],
            "system": system,
        },
    ]
    if len(turns) == 1:
        rows.append({"question": turns[0][0], "answer": turns[0][1], "system": system})
        rows.append({"prompt": turns[0][0], "completion": turns[0][1], "system_prompt": system})
    for row in rows:
        assert read(row)[1] == messages
