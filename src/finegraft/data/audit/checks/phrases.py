"""Answers that sound like a machine: disclaimers, refusals, fillers, set phrases, leftovers."""

from __future__ import annotations

import re

from finegraft.data.audit._contract import Check, Scan

AI, REFUSAL, OPENER, PHRASES, CLOSER, PLACEHOLDER, NO_CONTENT, LOOP = (
    f"FG-CHECK-{n:03d}" for n in range(30, 38)
)

CHECKS = (
    Check(
        AI,
        "an answer that speaks as an AI",
        "warning",
        "The rows were written by another model. Yours learns to call itself by that model's name "
        "and to hedge.",
        "Rewrite or remove the rows; --fix removes them.",
        "As an AI language model, I do not have feelings.",
        "remove",
    ),
    Check(
        REFUSAL,
        "a refusal",
        "warning",
        "A few refusals teach a model to refuse more than they name.",
        "Keep those you mean, remove the others; --fix removes all.",
        "I'm sorry, but I can't assist with that request.",
        "remove",
    ),
    Check(
        OPENER,
        "an answer that begins with a filler",
        "warning",
        "Every answer of the model will begin with it, at the cost of tokens and of programs that "
        "read the answer.",
        "Begin with the answer itself.",
        "Sure! Here is the list you asked for:",
    ),
    Check(
        PHRASES,
        "several set phrases of machine-written text",
        "warning",
        "At least two phrases in one answer that models use far more often than people.",
        "Rewrite the answer in the voice that you want.",
        "It's important to note that this rich tapestry is a testament to the city.",
    ),
    Check(
        CLOSER,
        "an answer that ends with a filler",
        "note",
        "Every answer of the model will end with it.",
        "End where the answer ends.",
        "I hope this helps! Let me know if you have any other questions.",
    ),
    Check(
        PLACEHOLDER,
        "a placeholder that was not filled in",
        "warning",
        "The model learns to write the placeholder.",
        "Fill it in or remove the row.",
        "Dear [Your Name],",
    ),
    Check(
        NO_CONTENT,
        "an answer that is a sign for no answer",
        "error",
        "A table's mark for a missing value became the answer.",
        "Write the answer, or remove the row with --fix.",
        "N/A",
        "remove",
    ),
    Check(
        LOOP,
        "an answer that goes round in circles",
        "warning",
        "The model that wrote it got stuck and repeated itself to the end. Yours learns to.",
        "Cut the answer where it begins to repeat, or remove the row with --fix.",
        "and then he left and then he left and then he left and then he left ...",
        "remove",
    ),
)


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_SET_PHRASES = (
    *("rich tapestry", "ever-evolving landscape", "ever-changing landscape", "a testament to"),
    *("delve into", "delves into", "in the realm of", "navigating the complexities"),
    *("it's important to note that", "it is important to note that", "plays a crucial role"),
    *("in today's fast-paced world", "unlock the full potential", "embark on a journey"),
    *("it's worth noting that", "a multifaceted", "seamlessly integrat", "treasure trove of"),
    *("in conclusion, ", "stands as a beacon", "fostering a sense of"),
)
_ANY_PHRASE = _words("|".join(map(re.escape, _SET_PHRASES)))


def _two_phrases(match: re.Match[str]) -> bool:
    found = {m[0].lower() for m in _ANY_PHRASE.finditer(match.string)}
    return len(found) > 1


SCANS = (
    Scan(
        AI,
        _words(
            r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)"
            r"(?: language model| (?:virtual )?assistant| (?:language )?model"
            r"|(?=[,.;:]|\s+(?:i|my)\b))"
            r"|\bas an? (?:large )?language model\b"
            r"|\bi(?:'m|\u2019m| am) (?:just |only |merely )?an? "
            r"(?:ai\b(?! (?:re|en|st|pr))|(?:large )?language model)"
            r"|\bmy (?:knowledge cut-?off|training data only)"
            r"|\b(?:trained|developed|created) by openai\b"
        ),
        (
            "as an a",
            "as a language model",
            "as a large lang",
            "i'm an ai",
            "i am an ai",
            "?m an ai",
            "just an ai",
            "only an ai",
            "merely an ai",
            "a large language mo",
            "a language model",
            "knowledge cut",
            "training data only",
            "by openai",
        ),
        where="answers",
    ),
    Scan(
        REFUSAL,
        _words(
            r"\bi(?:'m|\u2019m| am)(?: very| so| really| truly)? sorry,? (?:but )?"
            r"(?:as [^,.]{1,40}, )?"
            r"i(?: can(?:'t|\u2019t|not| not)|'m (?:unable|not able) to| am (?:unable|not able) to"
            r"| won't)(?: be able to)? (?:assist|help|fulfil|comply|provide|create|generate|engage|"
            r"write|support|answer|do that|discuss)"
            r"|\bi (?:can(?:'t|\u2019t|not| not)|am unable to|'m unable to) "
            r"(?:assist|help|fulfil\w*|comply) (?:you )?(?:with )?(?:that|this|your request)\b"
            r"|\bi (?:must|have to) (?:respectfully )?decline\b|\bi cannot in good conscience\b"
        ),
        (
            " sorry",
            "i can't",
            "i can?t",
            "i cannot",
            "i can not",
            "unable to",
            "decline",
            "good conscience",
        ),
        where="answers",
    ),
    Scan(
        OPENER,
        _words(
            r"\A\s*(?:(?:sure|certainly|of course|absolutely|definitely|great)(?: thing)?[!,.]+\s+"
            r"(?:here\b|i(?:'d|\u2019d| would) be|i(?:'ll|\u2019ll| will| can)\b"
            r"|let(?:'s| me)\b|below\b)"
            r"|(?:what an? |that(?:'s|\u2019s) an? )?(?:great|excellent|good) question[!.])"
        ),
        (
            "sure",
            "certainly",
            "of course",
            "absolutely",
            "definitely",
            "great",
            "question!",
            "question.",
        ),
        where="starts",
    ),
    Scan(
        PHRASES,
        _ANY_PHRASE,
        tuple(phrase.lower() for phrase in _SET_PHRASES),
        where="answers",
        accept=_two_phrases,
    ),
    Scan(
        CLOSER,
        _words(
            r"(?:\bi hope (?:this|that) helps|\bfeel free to (?:ask|reach out)"
            r"|\blet me know if you "
            r"(?:have any|need any)(?: other| more| further| additional)? "
            r"(?:questions|help|assistance|clarification)"
            r"|\bis there anything else i can)[^\n]{0,80}\Z"
        ),
        (
            "hope this helps",
            "hope that helps",
            "feel free to",
            "let me know if you",
            "anything else i can",
        ),
        where="answers",
    ),
    Scan(
        PLACEHOLDER,
        _words(
            r"\[(?:your|insert|enter|recipient|company|client|customer)(?:'s)?[ _]"
            r"[a-z' _/-]{1,40}\]|\[(?:name|date|address|company)\]"
            r"|\blorem ipsum\b|<insert [^>]{1,40}>"
            r"|\bTODO: "
        ),
        (
            "[your",
            "[insert",
            "[enter",
            "[recipient",
            "[company",
            "[client",
            "[customer",
            "[name]",
            "[date]",
            "[address]",
            "lorem ipsum",
            "<insert ",
            "todo: ",
        ),
        where="answers",
        accept=lambda m: m[0] != "TODO: " or ("```" not in m.string and "def " not in m.string),
    ),
)

_SIGNS = frozenset(
    [
        "n/a",
        "#n/a",
        "nan",
        "null",
        "nil",
        "todo",
        "tbd",
        "undefined",
        "[deleted]",
        "[removed]",
        "<noinput>",
        "<nooutput>",
        "...",
        "???",
        "xxx",
        "no_answer",
        "no_response",
    ]
)


def no_content(answer: str) -> bool:
    """Whether the whole answer is a sign for a missing one."""
    return len(answer) < 16 and answer.strip().lower() in _SIGNS


_LOOP_CHARS, _LOOP_TIMES, _LOOP_LETTERS = 24, 6, 8


def loops(answer: str) -> bool:
    """Whether an answer ends in a piece that fills half of it, over and over."""
    if len(answer) < 8 * _LOOP_CHARS:
        return False
    tail = answer[-_LOOP_CHARS:]
    if sum(map(str.isalpha, tail)) < _LOOP_LETTERS:
        return False
    # a period shorter than the tail is found by its next place to the left
    before = answer.rfind(tail, 0, len(answer) - 1)
    if before < 0:
        return False
    period = len(answer) - _LOOP_CHARS - before
    piece, times = answer[-period:], 0
    while times < 400 and answer.endswith(piece, 0, len(answer) - times * period):
        times += 1
    return times >= _LOOP_TIMES
