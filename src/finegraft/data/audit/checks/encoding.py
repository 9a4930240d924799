"""Texts that were damaged on their way: wrong decodings, control characters, left-over escapes.

How: mojibake is recognised and undone by ftfy; the rest are single characters and short patterns.
"""

from __future__ import annotations

import html
import re

import ftfy
from ftfy.badness import is_bad

from finegraft.data.audit._contract import Check, Scan

MOJIBAKE, LOST, CONTROL, INVISIBLE, ENTITY, ESCAPED, TAG, SURROGATE = (
    f"FG-CHECK-{n:03d}" for n in range(60, 68)
)

CONTROL_BYTES = bytes([*range(9), 11, 12, *range(14, 32), 127])
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# A first byte of UTF-8 and one that goes on, both read as Windows-1252 or Latin-1. ftfy's own look
# takes 170 us for 1,000 characters with umlauts, so only what has such a pair gets it.
_PAIR = re.compile(
    "[\u00c2-\u00f4][\x80-\xbf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030"
    "\u0160\u2039\u0152\u017d\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a"
    "\u0153\u017e\u0178]"
)
_SUSPECTS = re.compile(
    "[\x80-\x9f\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\ufffd\ud800-\udfff]"
)
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|nbsp|apos|rsquo|lsquo|ldquo|rdquo|#\d{2,5}|#x[0-9a-fA-F]{2,5});"
)
_ESCAPED = re.compile(
    r"(?:\A|(?<=[\w.,:;!?)\]\"'\u201d]))(?:\\r)?\\n(?:\\n)*(?=[A-Z0-9*\u2022-]|\s*\Z)|\\u[0-9a-fA-F]{4}"
)
_TAG = re.compile(
    r"</(?:p|div|span|a|td|tr|table|ul|ol|li|b|i|em|strong|h[1-6]|font|body)>|<br ?/?>"
)
_MARKUP_WORDS = re.compile(
    r"html|css|xml|```|<!doctype|javascript|jsx|react|\btags?\b|svg|entit|escap|markup|regex",
    re.IGNORECASE,
)


def suspect(text: str) -> bool:
    """Whether a text that is not ASCII is worth the slower looks."""
    return _SUSPECTS.search(text) is not None or _PAIR.search(text) is not None


def slower(text: str) -> list[tuple[str, int]]:
    """Codes of what is damaged in a suspect text, each with its place."""
    found = []
    for code, pattern in ((CONTROL, _CONTROL), (INVISIBLE, _INVISIBLE), (SURROGATE, _SURROGATE)):
        match = pattern.search(text)
        if match:
            found.append((code, match.start()))
    if "\ufffd" in text:
        found.append((LOST, text.index("\ufffd")))
    halves = any(code == SURROGATE for code, _ in found)
    if not halves and _PAIR.search(text) is not None and is_bad(text):
        mended = mend_mojibake(text)
        if mended != text:
            pairs = zip(text, mended, strict=False)
            found.append((MOJIBAKE, next((i for i, (a, b) in enumerate(pairs) if a != b), 0)))
    return found


def control(text: str) -> int | None:
    """Place of the first control character of a text, None without one."""
    match = _CONTROL.search(text)
    return match.start() if match else None


def mend_mojibake(text: str) -> str:
    """The text as it was before it was decoded wrongly; other characters are left alone."""
    return "".join(ftfy.fix_encoding(line) for line in text.splitlines(keepends=True))


def _prose(match: re.Match[str]) -> bool:
    """Not a text about HTML, in which entities and tags belong."""
    text = match.string
    return _MARKUP_WORDS.search(text) is None and text.count("</") < 12


def _left_over(match: re.Match[str]) -> bool:
    """A backslash and n where a line should end: not in quotes, code, formulas or paths."""
    begin = match.string.rfind("\n", 0, match.start()) + 1
    text, at = match.string[begin:].partition("\n")[0], match.start() - begin
    if "`" in text or "$" in text or "\\t" in text or re.search(r"\\[a-mo-qs-z]{2,}\b", text):
        return False
    before = text[:at]
    return before.count('"') % 2 == 0 and "print" not in before and "escape" not in text.lower()


def _mend_escaped(text: str) -> str:
    if not any(_left_over(m) for m in _ESCAPED.finditer(text)):
        return text
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\\r\\n", "\n").replace("\\n", "\n")


def _mend_tags(text: str) -> str:
    text = re.sub(r"<br ?/?>|</(?:p|div|tr|li|h[1-6])>", "\n", text)
    return re.sub(
        r"</?(?:p|div|span|a|td|tr|table|ul|ol|li|b|i|em|strong|h[1-6]|font|body)\b[^<>]*>",
        "",
        text,
    )


CHECKS = (
    Check(
        MOJIBAKE,
        "text that was decoded wrongly (mojibake)",
        "warning",
        "UTF-8 was read as Latin-1 or Windows-1252. The model learns to write it so.",
        "Read the source as UTF-8; --fix undoes it with ftfy.",
        "The cafÃ© doesnâ€™t open.",
        "change",
        mend_mojibake,
    ),
    Check(
        LOST,
        "a replacement character (U+FFFD)",
        "warning",
        "A character could not be decoded and is lost.",
        "Take the text from its source again.",
        "The caf\ufffd is open.",
    ),
    Check(
        CONTROL,
        "a control character",
        "warning",
        "Left over from a terminal, a printer or a PDF; invisible, and a token of its own.",
        "--fix removes it.",
        "Chapter 1\\x0c",
        "change",
        lambda text: _CONTROL.sub("", text),
    ),
    Check(
        INVISIBLE,
        "an invisible character",
        "warning",
        "Zero-width spaces, soft hyphens, byte order marks and direction marks split words into "
        "other tokens than inference will see.",
        "--fix removes it.",
        "pass\\u200bword",
        "change",
        lambda text: _INVISIBLE.sub("", text),
    ),
    Check(
        ENTITY,
        "an HTML entity",
        "warning",
        "The text was taken out of a web page without decoding it.",
        "--fix decodes it.",
        "Marks &amp; Spencer",
        "change",
        lambda text: _ENTITY.sub(lambda m: html.unescape(m[0]), text),
    ),
    Check(
        ESCAPED,
        "an escape that was written out",
        "warning",
        "JSON was encoded twice: a backslash and an n stand where a line should end. The model "
        "learns to write them.",
        "--fix puts the characters in.",
        "First line.\\\\nSecond line.",
        "change",
        _mend_escaped,
    ),
    Check(
        TAG,
        "HTML tags in prose",
        "warning",
        "The text was taken out of a web page with its tags.",
        "--fix takes the tags out.",
        "It is <b>open</b>.<br>Come in.",
        "change",
        _mend_tags,
    ),
    Check(
        SURROGATE,
        "half of a character, or bytes that are not UTF-8",
        "error",
        "An emoji was cut in two (a lone surrogate), or the file is not UTF-8 here. Tokenizers "
        "stop at it.",
        "--fix removes it.",
        '"nice \\ud83d"',
        "change",
        lambda text: _SURROGATE.sub("", text),
    ),
)

SCANS = (
    Scan(
        ENTITY,
        _ENTITY,
        (
            "&amp;",
            "&lt;",
            "&gt;",
            "&quot;",
            "&nbsp;",
            "&apos;",
            "&rsquo;",
            "&lsquo;",
            "&ldquo;",
            "&rdquo;",
            "&#x",
        ),
        shapes=("&#00",),
        accept=_prose,
    ),
    Scan(ESCAPED, _ESCAPED, ("\\",), accept=_left_over),
    Scan(
        TAG,
        _TAG,
        (
            "<br>",
            "<br/>",
            "<br />",
            "</p>",
            "</div",
            "</span",
            "</a>",
            "</td",
            "</tr",
            "</ul",
            "</ol",
            "</li",
            "</b>",
            "</i>",
            "</em",
            "</strong",
            "</font",
            "</body",
            "</h1",
            "</h2",
            "</h3",
            "</h4",
            "</h5",
            "</h6",
        ),
        accept=_prose,
    ),
)
