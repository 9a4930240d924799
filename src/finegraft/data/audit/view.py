"""One row as the audit sees it: prompt, answer, and what is wrong with its structure.

How: the format's own ``to_messages``, which is what training uses; only where that refuses a row is
it looked at field by field. Constraint: nothing here raises for a bad row, whatever is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finegraft.core.errors import DataError
from finegraft.data.audit.checks import phrases, structure
from finegraft.data.audit.reading import Bad, Layout, excerpt, fitting
from finegraft.data.conversation import TEXT_ROLE, Message
from finegraft.data.formats._fields import SPEAKERS

_MAX_NESTED = 40


@dataclass(slots=True)
class View:
    """A row's texts.

    Attributes:
        head: Everything before the last answer.
        tail: The last answer, raw text, or label.
        answers: All answers; empty for labels.
        codes: Checks of the structure that hit, with words about the place.
        label: Name of the label, of classification.
        calls: Tool calls, which tell rows apart and are not searched.
    """

    head: str = ""
    tail: str = ""
    answers: str = ""
    codes: list[tuple[str, str]] = field(default_factory=list)
    label: str | None = None
    calls: str = ""


def view_of(row: Any, layout: Layout) -> View:
    """Look at one row."""
    if isinstance(row, Bad):
        return View(codes=[(row.code, row.says)])
    if not isinstance(row, Mapping):
        return View(codes=[(structure.NOT_OBJECT, f"{type(row).__name__}")])
    if layout.columns is not None:
        return _labelled(row, layout)
    try:
        messages = layout.format.to_messages(row)  # type: ignore[union-attr]
    except (DataError, RecursionError) as error:
        other = _other_layout(row) if layout.several else None
        return view_of(row, other) if other else _refused(row, layout, error)
    view = _seen(messages)
    if view.tail == "nan" or view.head == "nan" or view.head.endswith("\nnan"):
        view.codes += [(structure.NULL, f"{key} is NaN") for key, v in row.items() if v != v]
    if view.tail and phrases.no_content(view.tail):
        view.codes.append((phrases.NO_CONTENT, excerpt(view.tail)))
    return view


def _other_layout(row: Mapping[str, Any]) -> Layout | None:
    """The one layout that a row of another file fits."""
    fits = [Layout(name, fmt) for name, fmt in fitting(row).items()]
    return fits[0] if len(fits) == 1 else None


def _seen(messages: list[Message]) -> View:
    if len(messages) == 2 and messages[0]["role"] == "user" and messages[1]["role"] == "assistant":
        head, tail = messages[0].get("content") or "", messages[1].get("content") or ""
        view = View(head, tail, tail)
        if not head.strip():
            view.codes.append((structure.EMPTY if not head else structure.BLANK, "the prompt"))
        elif tail and head.strip() == tail.strip():
            view.codes.append((structure.ECHO, excerpt(head)))
        if "tool_calls" in messages[1]:
            _calls(messages[1], view)
            view.calls = str(messages[1]["tool_calls"])
        return view
    if messages and messages[0]["role"] == TEXT_ROLE:
        text = messages[0]["content"]
        return View("", text, text)
    return _talk(messages)


def _talk(messages: list[Message]) -> View:
    texts = [str(m.get("content") or "") for m in messages]
    roles = [m["role"] for m in messages]
    said = [i for i, role in enumerate(roles) if role == "assistant"]
    codes = _turns(messages, roles, texts)
    for message in messages:
        if message.get("tool_calls"):
            _calls(message, view := View())
            codes += view.codes
    if not said:
        return View("\n".join(texts), "", "", [*codes, (structure.NO_ANSWER, ", ".join(roles[:6]))])
    last = said[-1]
    head, tail = "\n".join(texts[:last]), texts[last]
    if last and roles[last - 1] == "user" and tail and texts[last - 1].strip() == tail.strip():
        codes.append((structure.ECHO, excerpt(tail)))
    calls = "".join(str(m["tool_calls"]) for m in messages if m.get("tool_calls"))
    return View(head, tail, "\n".join(texts[i] for i in said), codes, calls=calls)


def _turns(messages: list[Message], roles: list[str], texts: list[str]) -> list[tuple[str, str]]:
    codes = []
    if roles[0] == "system" and not texts[0].strip():
        codes.append((structure.EMPTY_SYSTEM, "message 1"))
    before = ""
    for i, role in enumerate(roles):
        if role == "user" and not texts[i].strip():
            codes.append((structure.BLANK if texts[i] else structure.EMPTY, f"message {i + 1}"))
        calls = i > 0 and bool(messages[i - 1].get("tool_calls"))
        fine = {
            "system": i == 0,
            "user": before in ("", "system", "assistant") and not calls,
            "assistant": before in ("user", "tool"),
            "tool": before in ("assistant", "tool"),
        }.get(role, True)
        if not fine and not any(code == structure.ORDER for code, _ in codes):
            words = f"message {i + 1} is the {role}'s after {before or 'nothing'}"
            codes.append((structure.ORDER, words))
        before = role
    if "assistant" in roles and roles[-1] in ("user", "tool"):
        codes.append((structure.UNANSWERED, f"message {len(roles)} is the {roles[-1]}'s"))
    return codes


def _calls(message: Mapping[str, Any], view: View) -> None:
    """Arguments of tool calls, which are an object or JSON of one."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        given = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(given, str):
            try:
                json.loads(given)
            except (json.JSONDecodeError, RecursionError):
                view.codes.append((structure.TOOL_JSON, excerpt(given)))


def _labelled(row: Mapping[str, Any], layout: Layout) -> View:
    which = layout.columns
    assert which is not None
    codes = []
    for name in filter(None, (which.text, which.pair)):
        codes += _text_problem(name, row)
    label = row.get(which.label)
    if which.label not in row:
        codes.append((structure.MISSING, f"'{which.label}'"))
    elif label is None or label != label:
        codes.append((structure.NULL, f"'{which.label}'"))
    elif isinstance(label, str) and not label.strip():
        codes.append((structure.BLANK if label else structure.EMPTY, f"'{which.label}'"))
    head = "\n".join(str(row.get(name) or "") for name in filter(None, (which.text, which.pair)))
    if codes:
        return View(head, codes=codes)
    # spaces are kept: "positive " is another label to those who compare
    name = label if isinstance(label, str) else json.dumps(label, default=str)
    return View(head, name, "", label=name)


def _text_problem(name: str, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    if name not in row:
        return [(structure.MISSING, f"'{name}'")]
    value = row[name]
    if value is None or (isinstance(value, float) and value != value):
        return [(structure.NULL, f"'{name}'")]
    if isinstance(value, str):
        if value.strip():
            return []
        return [(structure.BLANK if value else structure.EMPTY, f"'{name}'")]
    return (
        [] if isinstance(value, int | float) else [(structure.TYPE, f"'{name}' is {_type(value)}")]
    )


def _refused(row: Mapping[str, Any], layout: Layout, error: Exception) -> View:
    """Why a format refused a row, field by field; else in the format's own words."""
    assert layout.format is not None
    codes: list[tuple[str, str]] = []
    for name in layout.format.columns:
        value = row.get(name)
        if isinstance(value, list | tuple):
            codes += _list_problems(name, value)
        elif name not in row and name == "conversations" and "conversation" in row:
            codes += _list_problems("conversation", row["conversation"])
        elif isinstance(value, str | int | float) and name in ("messages", "conversations"):
            codes.append((structure.TYPE, f"'{name}' is {_type(value)}"))
        else:
            codes += _text_problem(name, row)
    if not codes:
        found = error.found if isinstance(error, DataError) else "nested too deeply"
        codes = [(structure.TYPE, found)]
    view = View(codes=list({code: words for code, words in reversed(codes)}.items()))
    # what is there is looked at as well: a row may have two faults
    view.head = "\n".join(_texts(row, 0))
    return view


def _list_problems(name: str, value: Any) -> list[tuple[str, str]]:
    if not value:
        return [(structure.NO_TURNS, f"'{name}'")]
    codes = []
    for i, item in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(item, Mapping):
            codes.append((structure.TYPE, f"'{place}' is {_type(item)}"))
            continue
        role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
        role = item.get(role_key)
        if not isinstance(role, str) or role.lower() not in SPEAKERS:
            codes.append((structure.ROLE, f"'{place}.{role_key}' is {excerpt(repr(role))}"))
        _calls(item, calls := View())
        codes += calls.codes
        text = item.get(text_key)
        if isinstance(text, list) or any(item.get(k) for k in ("tool_calls", "function_call")):
            continue
        if text_key not in item:
            codes.append((structure.MISSING, f"'{place}.{text_key}'"))
        else:
            codes += [
                (c, w.replace(f"'{text_key}'", f"'{place}'"))
                for c, w in _text_problem(text_key, item)
            ]
    return codes


def _texts(value: Any, depth: int) -> list[str]:
    if isinstance(value, str):
        return [value]
    if depth > _MAX_NESTED:
        return []
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item, depth + 1)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item, depth + 1)]
    return []


def _type(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "true or false", str: "text"}.get(
        type(value), type(value).__name__
    )
