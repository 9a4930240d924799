"""Where the answers stand in the text that a chat template makes.

What: the text of a conversation and the characters of each answer that is to be learnt. How: an
answer begins where the messages before it, rendered with the generation prompt, end; it stops where
the messages up to it do. Constraint: a template whose earlier turns change once others follow
(thinking that is stripped, say) has no such places; then only the last answer is learnt, in the
text that inference would have had. Trade-off: a template is rendered twice per answer, 20 us each.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import DataError
from finegraft.data.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Any] | None
Span = tuple[int, int]

_log = logging.getLogger(__name__)


def render_text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Tools = None,
    *,
    prompt: bool = False,
) -> str:
    """Return what the tokenizer's chat template makes of the messages.

    Args:
        messages: At least one; the key ``weight`` is ours and kept from the template.
        tokenizer: One with a chat template.
        tools: JSON schemas of tools for the template.
        prompt: End with the generation prompt.

    Raises:
        DataError: FG-DATA-011, the template refuses the conversation.
    """
    from jinja2 import TemplateError

    plain = [{key: m[key] for key in m if key != "weight"} for m in messages]
    try:
        text = tokenizer.apply_chat_template(
            plain,
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(
            "FG-DATA-011",
            f"the chat template refuses a conversation of {roles}: {error}",
            fix="change the rows as it says, or set chat_template to another one",
        ) from error
    return str(text)


def answer_spans(
    messages: Sequence[Message],
    learnt: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tools: Tools,
    ends: Sequence[str],
) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the characters of each answer to learn.

    Args:
        messages: The conversation.
        learnt: Indices of the assistant messages to learn, ascending.
        tokenizer: One with a chat template.
        tools: JSON schemas of tools for the template.
        ends: The tokens that may end an answer, as text.

    Raises:
        DataError: FG-DATA-011, the template refuses the conversation.
    """
    text = render_text(messages, tokenizer, tools)
    spans = _spans(text, messages, learnt, tokenizer, tools, ends)
    if spans is None:
        say_once(
            "the chat template renders earlier turns differently once others follow; "
            "only the last answer of each such conversation is learnt"
        )
        learnt = learnt[-1:]
        text, spans = _last_answer(messages[: learnt[0] + 1], tokenizer, tools)
    for i, (start, stop) in zip(learnt, spans, strict=True):
        words = str(messages[i].get("content") or "").split()[-1:] + _called(messages[i])
        if not all(word in text[start:stop] for word in words):
            raise _hidden()  # templates for images show nothing of plain text, many no tool calls
    return text, spans


def _called(message: Message) -> list[str]:
    """Names of the functions that a message calls."""
    calls = message.get("tool_calls") or []
    return [str(call["function"]["name"]) for call in calls if "function" in call]


def _hidden() -> DataError:
    return DataError(
        "FG-DATA-011",
        "the chat template does not show an answer, so nothing can be learnt from it",
        fix="set chat_template to another one",
    )


def _spans(
    text: str,
    messages: Sequence[Message],
    learnt: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tools: Tools,
    ends: Sequence[str],
) -> list[Span] | None:
    """Characters of each answer in ``text``; None when the template has no stable prefixes."""
    spans = []
    for i in learnt:
        last = i == len(messages) - 1
        try:
            head = render_text(messages[:i], tokenizer, tools, prompt=True) if i else None
            upto = text if last else render_text(messages[: i + 1], tokenizer, tools)
        except DataError:
            return None  # a template that accepts only whole conversations
        if head is None:  # nothing precedes the answer, so there is no prompt to render
            start = max(upto.find(str(messages[0].get("content", "")).strip()), 0)
        elif text.startswith(head) and upto.startswith(head):
            start = len(head)
        else:
            return None
        stop = len(upto) if text.startswith(upto) else _shared_end(text, upto, start, ends)
        if stop is None:
            return None
        spans.append((start, stop))
    return spans


def _shared_end(text: str, upto: str, start: int, ends: Sequence[str]) -> int | None:
    """End of an answer whose rendering goes on differently, as Phi-3's closing EOS does."""
    differs = (i for i, (a, b) in enumerate(zip(text, upto, strict=False)) if a != b)
    shared = text[: next(differs, min(len(text), len(upto)))]
    stops = [at + len(end) for end in ends if (at := shared.rfind(end, start)) >= 0]
    return max(stops, default=None)


def _last_answer(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools
) -> tuple[str, list[Span]]:
    """The conversation up to its last learnt answer, which starts where inference would."""
    whole = render_text(messages, tokenizer, tools)
    head = render_text(messages[:-1], tokenizer, tools, prompt=True) if len(messages) > 1 else ""
    if not whole.startswith(head):
        # DeepSeek's distills prompt with "<think>" and render an answer without it.
        at = whole.rfind(str(messages[-1].get("content", "")).strip())
        if at < 0:
            raise _hidden()
        whole = head + whole[at:]
    return whole, [(len(head), len(whole))]


@functools.cache
def say_once(message: str) -> None:
    """Log a warning the first time that it is met in this process."""
    _log.warning(message)
