"""Formats, column maps, detection, and the row numbers in errors."""

from __future__ import annotations

from typing import Any

import pytest

from finegraft.core.errors import ConfigError, DataError
from finegraft.data.formats import FORMATS
from finegraft.data.rows import apply_map, conversations, detect, suggest_map, tools_of

NAMES = FORMATS.names()


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    return conversations([row], detect([row])[1])[0]


def test_the_formats_are_found_by_file_name() -> None:
    assert {"alpaca", "messages", "prompt_completion", "sharegpt", "text"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_example_gives_what_is_expected_and_one_format_claims_it(name: str) -> None:
    fmt = FORMATS.get(name)
    assert fmt.to_messages(fmt.example) == fmt.expected
    columns = frozenset(fmt.example)
    assert [n for n, f in FORMATS.items() if f.matches(columns, fmt.example)] == [name]
    assert detect([fmt.example]) == (name, fmt)
    assert detect([fmt.example], name) == (name, fmt)
    assert set(fmt.columns) <= columns


def test_prompt_as_messages_learns_only_the_completion() -> None:
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    found = to_messages(row)
    assert [m.get("weight") for m in found] == [None, 0, None, None]
    assert [m["content"] for m in found] == list("abcd")
    assert "weight" not in row["prompt"][1], "the row itself stays as it was"


def test_alpaca_without_input_and_with_a_text_column() -> None:
    row = {"instruction": "a", "input": "", "output": "b", "text": "### a ### b"}
    assert to_messages(row)[0]["content"] == "a"


def test_numbers_are_written_out() -> None:
    assert to_messages({"prompt": "2 + 2", "completion": 4})[1]["content"] == "4"


def test_messages_keep_tool_calls_and_drop_nulls() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}], "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "1", "name": "f"},
        ]
    }
    assert to_messages(row) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "1", "name": "f"},
    ]


def test_sharegpt_in_either_column_and_either_key() -> None:
    row = {"conversation": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}]}
    assert [m["role"] for m in to_messages(row)] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"prompt": "a", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"text": None}, "'text' is null"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "assistant", "content": ""}]}, r"'messages\[0\].content' is empty"),
        ({"messages": [{"role": "user", "content": None}]}, r"'messages\[0\].content' is null"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, r"'conversations\[0\].value' is empty"),
    ],
)
def test_empty_fields_are_named_with_their_row(row: dict[str, Any], field: str) -> None:
    _, fmt = detect([row])
    with pytest.raises(DataError, match="FG-DATA-005: row 2: the field " + field):
        conversations([fmt.example, row], fmt)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hello"}, "'messages' is str, not a list of messages"),
        ({"messages": ["hello"]}, r"'messages\[0\]' is str, not a message"),
        ({"messages": [{"content": "a"}]}, r"'messages\[0\].role' is missing"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "is dict, not text"),
        ({"prompt": {"a": 1}, "completion": "b"}, "'prompt' is dict, not text"),
    ],
)
def test_malformed_messages(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=r"FG-DATA-012: row 1: .*" + said):
        to_messages(row)


def test_map_renames_and_replaces() -> None:
    rows = [{"q": "a", "prompt": "old", "extra": 1}]
    assert apply_map(rows, {"prompt": "q"}) == [{"prompt": "a", "extra": 1}]
    assert apply_map([{"prompt": 1, "completion": 2}], {"prompt": "completion"}) == [{"prompt": 2}]
    swapped = apply_map(
        [{"prompt": 1, "completion": 2}], {"prompt": "completion", "completion": "prompt"}
    )
    assert swapped == [{"prompt": 2, "completion": 1}]
    assert apply_map(rows, {}) == rows


def test_map_of_an_unknown_column() -> None:
    said = r"FG-DATA-006.*no column 'quesion'(.|\n)*question, answer(.|\n)*--map prompt=question"
    with pytest.raises(DataError, match=said):
        apply_map([{"question": "a", "answer": "b"}], {"prompt": "quesion"})


@pytest.mark.parametrize(
    ("columns", "guess"),
    [
        (["problem", "answer"], "--map prompt=problem --map completion=answer"),
        (["id", "english", "translation_extra"], "--map prompt=english --map completion=transl"),
        (["Q", "A"], "--map prompt=Q --map completion=A"),
        (["prompt", "response"], "--map completion=response"),
        (["sentence", "translation"], "--map prompt=sentence --map completion=translation"),
        (["user_query", "model_reply"], "--map prompt=user_query --map completion=model_reply"),
        (["request", "response"], "--map prompt=request --map completion=response"),
        (["body"], "--map text=body"),
        (["chat"], "--map messages=chat"),
        (["question", "zzz"], "--map prompt=question --map completion=zzz"),
    ],
)
def test_wrong_columns_suggest_a_map(columns: list[str], guess: str) -> None:
    rows = [dict.fromkeys(columns, "x")]
    said = rf"FG-DATA-007.*\({', '.join(columns)}\)(.|\n)*prompt_completion: prompt, completion"
    with pytest.raises(DataError, match=said + r"(.|\n)*" + guess):
        detect(rows)


def test_a_suggested_map_makes_the_rows_fit() -> None:
    rows = [{"english": "a", "translation_extra": "b"}]
    pairs = [part.split("=") for part in str(suggest_map(list(rows[0]))).split() if "=" in part]
    assert detect(apply_map(rows, dict(pairs)))[0] == "prompt_completion"


def test_detect_refuses_none_two_and_unknown() -> None:
    assert suggest_map(["zzz"]) is None
    with pytest.raises(DataError, match=r"FG-DATA-007.*zzz(.|\n)*--map text=<column>"):
        detect([{"zzz": 1}])
    both = [{"prompt": "a", "completion": "b", "messages": []}]
    with pytest.raises(DataError, match=r"FG-DATA-007.*messages, prompt_completion"):
        detect(both)
    assert detect(both, "messages")[0] == "messages"
    with pytest.raises(DataError, match="FG-DATA-007"):
        detect([{"text": "a"}], "alpaca")
    with pytest.raises(DataError, match="FG-DATA-002"):
        detect([])
    with pytest.raises(ConfigError, match=r"FG-CORE-001(.|\n)*did you mean 'alpaca'"):
        detect([{"text": "a"}], "alpca")


def test_tools_column() -> None:
    assert tools_of([{"text": "a"}, {"tools": None}]) is None
    tool = {"name": "f"}
    assert tools_of([{"tools": [tool]}, {}, {"tools": '[{"name": "f"}]'}]) == [[tool], None, [tool]]
    assert tools_of([{"tools": '{"name": "f", "x": null}'}, {"tools": "[]"}]) == [[tool], None]
    assert tools_of([{"tools": ['{"name": "f"}', tool]}]) == [[tool, tool]]
    for wrong in ("oops", "3", 3, ["oops"], [3]):
        with pytest.raises(DataError, match=r"FG-DATA-012: row 2: .*'tools'"):
            tools_of([{}, {"tools": wrong}])
