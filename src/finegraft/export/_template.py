"""An Ollama TEMPLATE read off a tokenizer's own chat template.

What: ``derive`` renders conversations of unique words with the Jinja template and reads what stands
between them; ``Turns.go`` writes it in Go's text/template, over ``.Messages``. How: text before and
after each role's words, what opens a conversation with and without a system text, what asks for an
answer. Constraint: no template is parsed; what was read is rendered again beside Jinja, and a
conversation that differs is refused or told. Trade-off: what depends on the words themselves (a
date, reasoning that is left out later) is told, not expressed.

Ollama joins neighbouring messages of one role with an empty line before it renders.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from finegraft.core.errors import ExportError

Message = dict[str, str]
_PAD = " \n\t"
# text/template cannot strip: this strips one byte from either end and calls itself
_TRIM = (
    '{{ define "trim" }}{{ if . }}{{ $end := len (slice . 1) }}'
    '{{ if eq (slice . 0 1) " " "\\n" "\\t" "\\r" }}{{ template "trim" (slice . 1) }}'
    '{{ else if eq (slice . $end) " " "\\n" "\\t" "\\r" }}{{ template "trim" (slice . 0 $end) }}'
    "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}"
)
_USERS, _ANSWERS = ("QxUserOneXq", "QxUserTwoXq", "QxUserTreXq"), ("QxBotOneXq", "QxBotTwoXq")
_SYSTEM = "QxSystemXq"


@dataclass(frozen=True)
class Turn:
    """What stands before and after the words of a role."""

    before: str
    after: str


@dataclass(frozen=True)
class Turns:
    """A chat template as Ollama can express it.

    Attributes:
        first: Before the first user's words where there is no system text.
        user: Of the user's later turns.
        assistant: Of the assistant's turns.
        ask: After the last turn, so that an answer follows.
        opening: Before the system text, and between it and the first user's words; None where the
            template takes no system text.
        system: Of a system turn wherever it stands; None where it only opens a conversation.
        trimmed: Roles whose words are stripped.
        bos: Begin-of-sequence text that Ollama puts in front itself, or nothing.
        differences: What differs from the Jinja template, for people.
    """

    first: str
    user: Turn
    assistant: Turn
    ask: str
    opening: Turn | None
    system: Turn | None
    trimmed: frozenset[str]
    bos: str
    differences: tuple[str, ...] = ()

    @property
    def head(self) -> str | None:
        """What precedes the first turn, whoever speaks; None where the first user's differs."""
        ends = [self.first] + ([self.opening.after] if self.opening else [])
        if not all(text.endswith(self.user.before) for text in ends):
            return None
        return self.first.removesuffix(self.user.before)

    def render(self, messages: Sequence[Message]) -> str:
        """What ``go`` renders, for comparing with Jinja."""
        system, messages = collate(messages)
        system = self._words("system", system)
        out, opened = "", False
        for i, message in enumerate(messages):
            role, last = message["role"], i == len(messages) - 1
            words = self._words(role, message["content"])
            if self.system is not None:
                if i == 0:
                    out += self._system_head() if role == "system" else str(self.head)
            elif not opened and role == "user":
                opened = True
                out += self._opened(system)
            elif not opened and role == "assistant" and self.head is not None:
                opened = True
                out += self._opened(system).removesuffix(self.user.before) + self.assistant.before
            elif role in ("user", "assistant"):
                out += self._turn(role).before
            if self.system is not None and role in ("system", "user", "assistant"):
                out += self._turn(role).before
            if role in ("user", "assistant") or (role == "system" and self.system):
                out += words
                out += "" if last and role == "assistant" else self._turn(role).after
            out += self.ask if last and role != "assistant" else ""
        return out

    def _words(self, role: str, text: str) -> str:
        return text.strip(" \n\t\r") if role in self.trimmed else text

    def _turn(self, role: str) -> Turn:
        found = {"user": self.user, "assistant": self.assistant, "system": self.system}[role]
        assert found is not None
        return found

    def _opened(self, system: str) -> str:
        if system and self.opening:
            return self.opening.before + system + self.opening.after
        return self.first

    def _system_head(self) -> str:
        assert self.opening is not None and self.system is not None
        return self.opening.before.removesuffix(self.system.before)

    def go(self) -> str:
        """The TEMPLATE.

        Source: https://pkg.go.dev/text/template, and Ollama's documentation of templates.
        """
        define = _TRIM if self.trimmed else ""
        body = self._everywhere() if self.system is not None else self._at_the_start()
        return define + body

    def _everywhere(self) -> str:
        """System texts are turns of their own."""
        parts = [
            "{{ range $i, $_ := .Messages }}",
            _LAST,
            _if(
                "eq $i 0",
                _if('eq .Role "system"', literal(self._system_head()), literal(self.head)),
            ),
        ]
        chain = '{{ if eq .Role "system" }}' + self._go_turn("system")
        parts += [chain, *self._go_speakers('{{ else if eq .Role "user" }}', "")]
        return "".join(parts)

    def _at_the_start(self) -> str:
        """System texts are gathered in front of the first turn."""
        opening = self._go_opening(self.user.before if self.head is not None else "")
        parts = ["{{ $new := true }}{{ range $i, $_ := .Messages }}", _LAST]
        before = literal(self.user.before)
        if self.head is not None:
            new = opening + "{{ $new = false }}"
            parts.append(_if('and $new (ne .Role "system")', new))
        else:
            before = _if("$new", opening + "{{ $new = false }}", before)
        parts += self._go_speakers('{{ if eq .Role "user" }}', before)
        return "".join(parts)

    def _go_opening(self, cut: str) -> str:
        first = literal(self.first.removesuffix(cut))
        if self.opening is None:
            return first
        words = '{{ template "trim" $.System }}' if "system" in self.trimmed else "{{ $.System }}"
        after = literal(self.opening.after.removesuffix(cut))
        return _if("$.System", literal(self.opening.before) + words + after, first)

    def _go_speakers(self, user: str, before: str) -> list[str]:
        """The turns of user and assistant, what asks for an answer, and the ends."""
        return [
            user,
            self._go_turn("user", before or None),
            '{{ else if eq .Role "assistant" }}',
            literal(self.assistant.before),
            self._go_words("assistant"),
            _if("not $last", literal(self.assistant.after)),
            "{{ end }}",
            _if('and $last (ne .Role "assistant")', literal(self.ask)),
            "{{ end }}",
        ]

    def _go_turn(self, role: str, before: str | None = None) -> str:
        turn = self._turn(role)
        before = literal(turn.before) if before is None else before
        return before + self._go_words(role) + literal(turn.after)

    def _go_words(self, role: str) -> str:
        return '{{ template "trim" .Content }}' if role in self.trimmed else "{{ .Content }}"


_LAST = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"


def _if(condition: str, then: str, otherwise: str = "") -> str:
    """A branch, or nothing where both sides are empty."""
    if not then and not otherwise:
        return ""
    middle = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    return f"{{{{ if {condition} }}}}{then}{middle}{{{{ end }}}}"


def literal(text: str | None) -> str:
    """``text`` in a TEMPLATE: as it is, or as a Go string where a parser would change it.

    Ollama's Modelfile drops what Go does not print, and Go reads two braces as a command.
    """
    text = text or ""
    plain = all(c in " \n" or unicodedata.category(c)[0] in "LMNPS" for c in text)
    if plain and "{{" not in text and not text.endswith("{") and '""' not in text:
        return text
    return '{{ "' + "".join(_escaped(c) for c in text) + '" }}'


def _escaped(character: str) -> str:
    known = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "{": "\\u007b"}
    if character in known:
        return known[character]
    if character == " " or unicodedata.category(character)[0] in "LMNPS":
        return character
    return f"\\U{ord(character):08x}"


def collate(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """What Ollama makes of a conversation: its system texts, and neighbours of one role joined."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    found: list[Message] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1] = {**message, "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append(dict(message))
    return system, found


# --- reading a Jinja template ---------------------------------------------------------------------


def derive(tokenizer: Any) -> Turns:
    """Read a tokenizer's chat template.

    Args:
        tokenizer: From transformers; its ``chat_template`` is rendered, never parsed.

    Raises:
        ExportError: FG-EXPORT-070 it has no chat template, FG-EXPORT-071 one that Ollama cannot
            express.
    """
    if not tokenizer.chat_template:
        raise ExportError(
            "FG-EXPORT-070",
            "the tokenizer has no chat template, and Ollama chats",
            allowed="a tokenizer with a chat template",
            fix="finegraft.get_chat_template(tokenizer, 'chatml') sets one; train with it",
        )
    turns, told = _read(tokenizer)
    for name, messages in conversations():
        if turns.opening is None and any(m["role"] == "system" for m in messages):
            continue
        expected = jinja(tokenizer, messages)
        if expected is not None and expected != turns.bos + turns.render(messages):
            if name in _ESSENTIAL:
                raise _refuse(f"{name} are rendered otherwise than their parts", expected)
            told.append(f"{name} are rendered otherwise")
    if "strftime_now" in str(tokenizer.chat_template):
        told.append("the date stays that of the export")
    return Turns(**{**vars(turns), "differences": tuple(told)})


def jinja(
    tokenizer: Any, messages: Sequence[Message], ask: bool = True, **options: Any
) -> str | None:
    """What the tokenizer renders; None where its template refuses the conversation."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, **options
            )
        )
    except TemplateError:
        return None


def _read(tokenizer: Any) -> tuple[Turns, list[str]]:
    told: list[str] = []
    whole = _gaps(tokenizer, "uauau")
    if whole is None:
        raise _refuse("a conversation of five turns is refused or loses words")
    first, to_bot, to_user, *again, end = whole
    single = _gaps(tokenizer, "u")
    if again != [to_bot, to_user] or single != [first, end]:
        raise _refuse("turns are rendered otherwise earlier and later in a conversation")
    after_user = _common((_gaps(tokenizer, "u", ask=False) or [""])[-1], to_bot, end)
    after_bot = _common((_gaps(tokenizer, "ua", ask=False) or [""])[-1], to_user)
    user = Turn(to_user[len(after_bot) :], after_user)
    bot = Turn(to_bot[len(after_user) :], after_bot)
    opening, system = _read_system(tokenizer, [to_bot, to_user, end], first, user, bot, told)
    bos = added_bos(tokenizer)
    if bos:
        starts = [first] + ([opening.before] if opening else [])
        if not all(text.startswith(bos) for text in starts):
            told.append(f"Ollama puts {bos} in front, the template does not")
            bos = ""
        first = first.removeprefix(bos)
        opening = opening and Turn(opening.before.removeprefix(bos), opening.after)
    trimmed = _read_trims(tokenizer, opening is not None, told)
    ask = end[len(after_user) :]
    return Turns(first, user, bot, ask, opening, system, trimmed, bos), told


def _read_system(
    tokenizer: Any, expected: list[str], first: str, user: Turn, bot: Turn, told: list[str]
) -> tuple[Turn | None, Turn | None]:
    """How a system text opens a conversation, and its turn elsewhere."""
    found = _gaps(tokenizer, "suau")
    if found is None or found[2:] != expected:
        told.append("system texts are left out, the template has no place for them")
        return None, None
    opening = Turn(found[0], found[1])
    middle = _gaps(tokenizer, "uasu")
    if middle is None:
        return opening, None
    to_system = middle[2]
    before = to_system.removeprefix(bot.after)
    after = opening.after.removesuffix(user.before)
    same = (
        to_system == bot.after + before
        and opening.before.endswith(before)
        and opening.after == after + user.before == middle[3]
        and first.endswith(user.before)
    )
    return opening, Turn(before, after) if same else None


def _read_trims(tokenizer: Any, system: bool, told: list[str]) -> frozenset[str]:
    """Roles whose words are stripped."""
    found = set()
    shape = "suau" if system else "uau"
    for role, letter in (("system", "s"), ("user", "u"), ("assistant", "a")):
        if letter not in shape:
            continue
        messages = _messages(shape)
        expected = jinja(tokenizer, messages)
        which = next(m for m in messages if m["role"] == role)
        words = which["content"]
        which["content"] = _PAD + words + _PAD
        padded = jinja(tokenizer, messages)
        if padded == expected:
            found.add(role)
        elif expected is None or padded != expected.replace(words, which["content"]):
            told.append(f"spaces and newlines around the {role}'s words are rendered otherwise")
    return frozenset(found)


def added_bos(tokenizer: Any) -> str:
    """The text of the token that llama.cpp puts in front of every prompt, or nothing."""
    ids = tokenizer("a")["input_ids"]
    own = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if own else ""


def _messages(shape: str) -> list[Message]:
    """A conversation of unique words; ``sua`` is system, user, assistant."""
    users, answers = iter(_USERS), iter(_ANSWERS)
    kinds = {
        "s": lambda: {"role": "system", "content": _SYSTEM},
        "u": lambda: {"role": "user", "content": next(users)},
        "a": lambda: {"role": "assistant", "content": next(answers)},
    }
    return [kinds[letter]() for letter in shape]


def _gaps(tokenizer: Any, shape: str, ask: bool = True) -> list[str] | None:
    """The texts around the words of a conversation; None where words are lost or doubled."""
    messages = _messages(shape)
    text = jinja(tokenizer, messages, ask)
    words = [m["content"] for m in messages]
    parts = re.split("(" + "|".join(words) + ")", text or "")
    return parts[::2] if parts[1::2] == words else None


def _common(whole: str, *others: str) -> str:
    """The common start of all; where that is not ``whole``, it ends with a token or a line."""
    size = 0
    while all(text[: size + 1] == whole[: size + 1] for text in others) and size < len(whole):
        size += 1
    found = whole[:size]
    if found == whole:
        return found
    return found[: max(found.rfind(end) for end in ">]\n") + 1]


def _refuse(reason: str, expected: str | None = None) -> ExportError:
    shown = f" (Jinja gives {expected!r})" if expected else ""
    return ExportError(
        "FG-EXPORT-071",
        f"Ollama cannot express this chat template: {reason}{shown}",
        allowed="turns with the same text around each role's words",
        fix="export gguf and use llama.cpp, which runs the template itself; or train with "
        "get_chat_template(tokenizer, 'chatml')",
    )


_ESSENTIAL = ("conversations with one question", "conversations with several turns")


def conversations() -> list[tuple[str, list[Message]]]:
    """What a derived template is compared on, by what is told of a difference."""

    def talk(*words: str, system: str | None = None) -> list[Message]:
        roles = ("user", "assistant")
        head = [] if system is None else [{"role": "system", "content": system}]
        turns = [{"role": roles[i % 2], "content": w} for i, w in enumerate(words)]
        return head + turns

    return [
        (_ESSENTIAL[0], talk("Why is the sky blue?")),
        (_ESSENTIAL[1], talk("Hello", "Hi.", "And you?", "Well.", "Good.", system=None)),
        ("conversations with a system text", talk("Hi", "Yes?", "Go on", system="Be brief.")),
        ("braces, quotes and other scripts", talk('{{ x }} "a"', "<b>&'\\n", "ü 日本 🙂")),
        ("spaces and newlines around words", talk("  a\n", "\n b ", "\t c\n\n")),
        ("empty texts", talk("a", "", "b")),
        ("answers with reasoning in <think>", talk("a", "<think>\nb\n</think>\n\nc", "d")),
        ("long conversations", talk(*(f"turn {i}" for i in range(21)), system="Count.")),
    ]
