"""The one place where token ids and loss masks are made.

What: a conversation becomes token ids and, for each of them, whether it is learnt; a prompt becomes
the ids that generation starts from. How: the tokenizer's own chat template gives the text; an
answers' characters come from ``spans`` and are mapped to tokens by the tokenizer's offsets.
Constraint: what precedes an answer in training is, id by id, what inference feeds; where the
tokenizer would merge across that border, prompt and answer are tokenised apart. The end of a turn
is learnt, what follows it is not: generation has stopped there. Trade-off: the text before each
answer is tokenised a second time to prove it; with such a tokenizer the starts of earlier answers
in a row stay apart, which a prompt for a later one does not do.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finegraft.core.errors import DataError
from finegraft.data.conversation import TEXT_ROLE, Message
from finegraft.data.spans import Span, Tools, answer_spans, render_text, say_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "finegraftprobe"


@dataclass(frozen=True)
class Rendered:
    """Token ids and, for each, whether it is learnt."""

    input_ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class _Plan:
    """Text to tokenise. Spans are characters of ``text``, each one answer to learn."""

    text: str
    spans: tuple[Span, ...]
    everything: bool
    with_bos: bool
    closes: bool  # the text ends an answer, so an end token has to stand there


@dataclass(frozen=True)
class _Tokens:
    ids: list[int]
    begins: list[int] | None  # character at which each token begins; None without offsets


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool | None = None,
    tools: Tools = None,
) -> Rendered:
    """Return the ids of a conversation and which of them are learnt.

    Args:
        messages: Messages with role and content, or one message of the role ``text``. An assistant
            message with ``weight`` 0 is read but not learnt.
        tokenizer: Its chat template is used; without one, a single question and answer are
            joined as they are.
        completion_only: Learn the answers only. None: yes where there is an answer. False: learn
            every token. Raw text is always learnt whole.
        tools: JSON schemas of tools for the template.

    Raises:
        DataError: FG-DATA-005 no messages, FG-DATA-008 several turns without a chat template,
            FG-DATA-011 the template refuses the conversation.
    """
    return render_batch([messages], tokenizer, completion_only=completion_only, tools=[tools])[0]


def render_batch(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool | None = None,
    tools: Sequence[Tools] | None = None,
    names: Sequence[str] | None = None,
) -> list[Rendered]:
    """``render`` for many conversations, with one call of the tokenizer.

    Args:
        conversations: Lists of messages.
        tokenizer: As in ``render``.
        completion_only: As in ``render``.
        tools: JSON schemas of tools for each conversation.
        names: What errors call each conversation, ``row 3`` say; None: nothing.

    Raises:
        DataError: as ``render``.
    """
    ends = stop_token_ids(tokenizer)
    end_texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in ends]
    plans = []
    for number, messages in enumerate(conversations):
        given = tools[number] if tools is not None else None
        try:
            plans.append(_plan(messages, tokenizer, completion_only, given, end_texts))
        except DataError as error:
            if names is None:
                raise
            found = f"{names[number]}: {error.found}"
            raise DataError(error.code, found, allowed=error.allowed, fix=error.fix) from error
    texts = [plan.text for plan in plans]
    heads = [plan.text[:start] for plan in plans for start, _ in plan.spans]
    tokens = _encode(texts + heads, tokenizer)
    head_ids = iter(tokens[len(texts) :])
    return [
        _assemble(
            plan,
            whole,
            [t.ids for t in itertools.islice(head_ids, len(plan.spans))],
            tokenizer,
            frozenset(ends),
        )
        for plan, whole in zip(plans, tokens, strict=False)
    ]


def render_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools = None
) -> list[int]:
    """Return the ids that generation starts from.

    Args:
        messages: The conversation so far, without the answer that is asked for.
        tokenizer: As in ``render``.
        tools: JSON schemas of tools for the template.

    Raises:
        DataError: FG-DATA-005, FG-DATA-008 and FG-DATA-011, as ``render``.
    """
    text = render_prompt_text(messages, tokenizer, tools)
    ids = _encode([text], tokenizer)[0].ids
    return ids if _uses_template(messages, tokenizer) else _with_bos(ids, tokenizer)


def render_prompt_text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools = None
) -> str:
    """Return the text that generation starts from, with the generation prompt.

    After a template it is complete: tokenise it with ``add_special_tokens=False``. Raw text and
    prompts without a template come back as they are and take the tokenizer's BOS.

    Raises:
        DataError: FG-DATA-005, FG-DATA-008 and FG-DATA-011, as ``render``.
    """
    _require_messages(messages)
    if _uses_template(messages, tokenizer):
        return render_text(messages, tokenizer, tools, prompt=True)
    if len(messages) == 1 and messages[0]["role"] in (TEXT_ROLE, "user"):
        return str(messages[0]["content"])
    raise _no_template(messages)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the tokenizer's EOS and what its template ends turns with.

    Phi-3 and Llama-3 end a turn with a token that is not always the tokenizer's EOS.
    """
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            tail = render_text(probe, tokenizer).rpartition(_PROBE)[2]
        except DataError:
            return sorted(ends)  # a template for other roles; its rows will say what it refuses
        single = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        ends |= single & set(_encode([tail], tokenizer)[0].ids)
    return sorted(ends)


def _uses_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.chat_template) and messages[0].get("role") != TEXT_ROLE


def _require_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError(
            "FG-DATA-005", "the conversation holds no messages", fix="remove the empty row"
        )


def _no_template(messages: Sequence[Message]) -> DataError:
    return DataError(
        "FG-DATA-008",
        "the tokenizer has no chat template and the conversation is "
        + ", ".join(str(message.get("role")) for message in messages),
        allowed="one question with one answer, or raw text, when there is no template",
        fix='set chat_template="chatml" (or another name), or call get_chat_template(tokenizer)',
    )


def _plan(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    completion_only: bool | None,
    tools: Tools,
    ends: Sequence[str],
) -> _Plan:
    _require_messages(messages)
    if messages[0].get("role") == TEXT_ROLE:
        return _Plan(str(messages[0]["content"]), (), True, True, True)
    answers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    everything = not answers if completion_only is None else not completion_only
    if not tokenizer.chat_template:
        if [m.get("role") for m in messages] != ["user", "assistant"]:
            raise _no_template(messages)
        question, answer = (str(m.get("content", "")) for m in messages)
        text = question + answer
        return _Plan(text, ((len(question), len(text)),), everything, True, True)
    learnt = [i for i in answers if messages[i].get("weight", 1) != 0]
    text, spans = answer_spans(messages, learnt, tokenizer, tools, ends)
    closes = bool(spans) and spans[-1][1] == len(text)
    return _Plan(text, tuple(spans), everything, False, closes)


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Tokens]:
    if not texts:
        return []
    fast = tokenizer.is_fast
    # verbose=False: rows longer than the model are counted by prepare, not warned about here.
    out = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=fast, verbose=False
    )
    begins = [[b for b, _ in row] for row in out["offset_mapping"]] if fast else [None] * len(texts)
    return [_Tokens(list(i), b) for i, b in zip(out["input_ids"], begins, strict=True)]


def _assemble(
    plan: _Plan,
    whole: _Tokens,
    heads: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
) -> Rendered:
    if all(whole.ids[: len(head)] == head for head in heads):
        firsts = [len(head) for head in heads]
    else:
        whole, firsts = _apart(plan, tokenizer)
    ids = whole.ids
    trained = [plan.everything] * len(ids)
    ended = False
    for first, (start, stop) in zip(firsts, plan.spans, strict=True):
        if whole.begins is None:
            last = first + len(_encode([plan.text[start:stop]], tokenizer)[0].ids)
        else:
            last = bisect.bisect_left(whole.begins, stop)
        found = [i for i in range(first, last) if ids[i] in ends]
        ended = bool(found)
        for i in range(first, found[-1] + 1 if found else last):
            trained[i] = True
    if not plan.spans and tokenizer.eos_token:
        ended = plan.text.rstrip().endswith(str(tokenizer.eos_token))
    if plan.closes and not ended:
        ids, trained = _close(ids, trained, tokenizer)
    if plan.with_bos:
        ids = _with_bos(ids, tokenizer)
        trained = [plan.everything] * (len(ids) - len(trained)) + trained
    return Rendered(ids, trained)


def _apart(plan: _Plan, tokenizer: PreTrainedTokenizerBase) -> tuple[_Tokens, list[int]]:
    """Tokenise up to each answer separately, so that no token reaches over its start."""
    borders = [0, *(start for start, _ in plan.spans), len(plan.text)]
    pieces = _encode([plan.text[a:b] for a, b in itertools.pairwise(borders)], tokenizer)
    ids: list[int] = []
    begins: list[int] | None = []
    firsts = []
    for at, piece in zip(borders, pieces, strict=False):
        firsts.append(len(ids))
        ids += piece.ids
        if piece.begins is None or begins is None:
            begins = None
        else:
            begins += [at + begin for begin in piece.begins]
    return _Tokens(ids, begins), firsts[1:]


def _close(
    ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    if tokenizer.eos_token_id is None:
        say_once("the tokenizer has no EOS token, so the model does not learn where to stop")
        return ids, trained
    return [*ids, int(tokenizer.eos_token_id)], [*trained, True]


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Put BOS in front where the tokenizer does and the text has none yet."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or tokenizer("")["input_ids"][:1] != [bos]:
        return ids
    return [int(bos), *ids]
