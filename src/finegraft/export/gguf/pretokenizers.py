"""Which of llama.cpp's splitting rules a byte-level tokenizer uses.

What: ``detect`` returns the name that goes into ``tokenizer.ggml.pre``. How: for each rule that we
know a reference splitter is built, and the one that cuts a probe text exactly as the model's own
tokenizer does is the answer; how the tokenizer's file spells the rule does not matter. Constraint:
a rule that matches none is an error, for a wrong one changes token ids without any sign. Trade-off:
llama.cpp knows some fifty names, many of them the same rule; one name for each rule is enough.

llama.cpp composes no characters: a tokenizer that normalises to NFC differs on decomposed text.
"""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

from finegraft.core.errors import ExportError

logger = logging.getLogger(__name__)

_APOSTROPHES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*"
_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

# (name, expressions that isolate one after the other, GPT-2's own rule last, ignore_merges)
_RULES: tuple[tuple[str, tuple[str, ...], bool, bool], ...] = (
    ("gpt-2", (), True, False),
    ("smollm", (r"\p{N}",), True, False),
    ("llama-bpe", (f"{_APOSTROPHES}|{_WORD}|\\p{{N}}{{1,3}}|{_REST}",), False, True),
    ("dbrx", (f"{_APOSTROPHES}|{_WORD}|\\p{{N}}{{1,3}}|{_REST}",), False, False),
    ("qwen2", (f"{_APOSTROPHES}|{_WORD}|\\p{{N}}|{_REST}",), False, False),
    (
        "qwen35",
        (
            _APOSTROPHES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
        False,
    ),
    ("tekken", (f"{_CASED}|{_CAPITALS}|\\p{{N}}|{_SLASH}",), False, True),
    (
        "gpt-4o",
        (f"{_CASED}{_APOSTROPHES}?|{_CAPITALS}{_APOSTROPHES}?|\\p{{N}}{{1,3}}|{_SLASH}",),
        False,
        False,
    ),
    (
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            _CJK,
            _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
        False,
    ),
)
# Every place where two rules can part: runs of digits, apostrophes in both cases, marks before
# letters, line ends after marks, runs of blanks, capitals, Chinese, joined accents, emoji.
PROBE = (
    "Hello hello HELLO heLLo, it's IT'S we'LL they'd o'clock 'tis x'T 1 22 333 4444 55555 1234567 "
    "v2.5b3 a1b22c333 ３４ ²³  two   three    \tfour \n five\n\n\nsix \r\n seven   \n\n  eight\t\t "
    'nine... (ten) [eleven]/{twelve}//\n/ "thirteen" #fourteen_fifteen !?!\nsixteen ---\n\n_x '
    "$100 50% a+b=c <tag/> file.txt http://x.org/y?z=1 camelCaseWord XMLHttp ÄÖÜß éclair e\u0301te "
    "नमस्ते สวัสดี 中文字符 日本語カナ 한국어 русский العربية 🙂👍🏽 👨‍👩‍👧 \u00a0nbsp\u3000wide ǅ  \n"
    " end   "
)


@functools.cache
def _references() -> dict[str, tuple[Any, bool]]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    found = {}
    for name, expressions, gpt2, ignore_merges in _RULES:
        splits = [Split(Regex(expression), "isolated") for expression in expressions]
        bytes_of = ByteLevel(add_prefix_space=False, use_regex=gpt2)
        found[name] = (Sequence([*splits, bytes_of]), ignore_merges)
    return found


def names() -> list[str]:
    """The names that ``detect`` can return."""
    return [rule[0] for rule in _RULES]


def detect(tokenizer: Any, given: str | None = None) -> str:
    """Return llama.cpp's name for the rule by which ``tokenizer`` splits text.

    Args:
        tokenizer: A ``tokenizers.Tokenizer`` with a byte-level BPE model.
        given: The name, if the caller knows it; nothing is compared then.

    Raises:
        ExportError: FG-EXPORT-007, no rule that we know splits like it.
    """
    if given:
        return given
    _check_normalizer(tokenizer)
    parts = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE) if tokenizer.pre_tokenizer else None
    ignores = bool(json.loads(tokenizer.to_str())["model"].get("ignore_merges"))
    matching = [
        (ignore_merges == ignores, name)
        for name, (reference, ignore_merges) in _references().items()
        if reference.pre_tokenize_str(PROBE) == parts
    ]
    if not matching:
        raise _unknown("its way of splitting text is none that llama.cpp is known to have")
    same, name = max(matching, key=lambda match: match[0])
    if not same:
        logger.warning(
            "llama.cpp splits as this tokenizer does under the name '%s', which looks whole words "
            "up %s merging; rare words may be cut differently",
            name,
            "without" if not ignores else "by",
        )
    return name


def _check_normalizer(tokenizer: Any) -> None:
    if tokenizer.normalizer is None:
        return
    kind = json.loads(tokenizer.to_str())["normalizer"]
    if kind == {"type": "NFC"}:
        logger.info("llama.cpp does not normalise to NFC: decomposed characters get other tokens")
        return
    if tokenizer.normalizer.normalize_str(PROBE) != PROBE:
        raise _unknown(f"it rewrites text before splitting ({json.dumps(kind)[:200]})")


def _unknown(reason: str) -> ExportError:
    return ExportError(
        "FG-EXPORT-007",
        f"the tokenizer has no name in llama.cpp: {reason}",
        allowed=", ".join(names()),
        fix="if you know llama.cpp's name for it pass pre_tokenizer='...'; token ids then need "
        "checking",
    )
