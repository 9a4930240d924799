"""Learn only what stands between a response marker and the next instruction marker.

What: the pure part of Unsloth's ``train_on_responses_only``, for rows that were tokenised as raw
text; conversations get exact masks from ``render`` instead. How: a marker is looked for as token
ids, in each way in which the tokenizer writes it after a newline, a space or a letter. Constraint:
labels only ever become -100, none is added. Trade-off: a marker that a user typed counts as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from finegraft.core.errors import DataError
from finegraft.data.prepare import IGNORE
from finegraft.data.render import stop_token_ids
from finegraft.data.spans import render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE = ("", "\n", "\n\n", " ", "a", "a\n", "a\n\n")
_AFTER = ("", "a")
_SENTINELS = ("qzqfirst", "qzqsecond", "qzqthird", "qzqfourth")


def mask_outside_responses(
    input_ids: Sequence[int],
    labels: Sequence[int],
    instruction_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
) -> list[int]:
    """Return the labels with -100 outside responses.

    Args:
        input_ids: One row.
        labels: Its labels; what is -100 already stays so.
        instruction_ids: Variants of the marker before an instruction, from ``marker_ids``.
        response_ids: Variants of the marker before a response.

    Returns:
        Labels of the same length, kept from after a response marker up to the next instruction
        marker or the end of the row.
    """
    out = [IGNORE] * len(input_ids)
    keeping, at = False, 0
    while at < len(input_ids):
        response = _match(input_ids, at, response_ids)
        if response:
            keeping = True
            at += response
            continue
        instruction = _match(input_ids, at, instruction_ids)
        if instruction:
            keeping = False
            at += instruction
            continue
        if keeping:
            out[at] = labels[at]
        at += 1
    return out


def _match(ids: Sequence[int], at: int, variants: Sequence[Sequence[int]]) -> int:
    """Length of the longest variant that begins at ``at``, else 0."""
    fits = (len(v) for v in variants if v and list(ids[at : at + len(v)]) == list(v))
    return max(fits, default=0)


def marker_ids(tokenizer: PreTrainedTokenizerBase, part: str) -> list[list[int]]:
    """Return the token ids that a marker has, one list for each way of writing it.

    Args:
        tokenizer: Any; with a fast one the marker is also read in context, where its first or
            last characters may belong to a neighbouring token.
        part: The marker, ``<|im_start|>assistant\\n`` say.

    Raises:
        DataError: FG-DATA-015, an empty marker.
    """
    if not part.strip():
        raise _no_markers("the marker is empty")
    found = {tuple(tokenizer(part, add_special_tokens=False)["input_ids"])}
    if tokenizer.is_fast:
        found |= set(_in_context(tokenizer, part))
    return [list(ids) for ids in sorted(found, key=lambda ids: (-len(ids), ids))]


def _in_context(tokenizer: PreTrainedTokenizerBase, part: str) -> Iterator[tuple[int, ...]]:
    for before in _BEFORE:
        for after in _AFTER:
            text = before + part + after
            out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            first, last = len(before), len(before) + len(part)
            inside = [
                (i, span)
                for i, span in zip(out["input_ids"], out["offset_mapping"], strict=True)
                if first <= span[0] < span[1] <= last
            ]
            # Whitespace at the edges may merge outward; nothing else of the marker may be missing.
            if inside and text[inside[0][1][0] : inside[-1][1][1]].strip() == part.strip():
                yield tuple(i for i, _ in inside)


def detect_markers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the instruction and the response marker of the tokenizer's chat template.

    Raises:
        DataError: FG-DATA-015, no template, or one whose turns have no markers.
    """
    if not tokenizer.chat_template:
        raise _no_markers("the tokenizer has no chat template")
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": s} for r, s in zip(roles, _SENTINELS, strict=True)]
    text = render_text(messages, tokenizer)
    places = [text.find(sentinel) for sentinel in _SENTINELS]
    if -1 in places or places != sorted(places):
        raise _no_markers("the chat template does not show the turns in order")
    ends = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_token_ids(tokenizer)]

    def between(turn: int) -> str:
        gap = text[places[turn] + len(_SENTINELS[turn]) : places[turn + 1]]
        after_end = max((gap.rfind(end) + len(end) for end in ends if end in gap), default=0)
        return gap[after_end:].lstrip().rstrip(" ")

    instruction, response = between(1), between(0)
    if not instruction or not response or instruction == response:
        raise _no_markers("the chat template marks no turns")
    return instruction, response


def _no_markers(problem: str) -> DataError:
    return DataError(
        "FG-DATA-015",
        f"cannot tell instructions from responses: {problem}",
        allowed="both markers as they stand in the text",
        fix='instruction_part="<|im_start|>user\\n", response_part="<|im_start|>assistant\\n"',
    )
