"""Let a model answer rows, and score the right answers.

What: ``questions`` cuts the last answer off each conversation, ``examine`` generates answers to
what is left and computes the loss of what was cut off. How: prompts and losses come from the one
renderer in ``data.render``; answers are greedy, so that they can be repeated. Constraint: the rows
are not changed, and none is dropped: a row without an answer has a loss and no reference.
Trade-off: only the last answer of a long conversation is asked for; the loss counts all of them.

Shapes: n rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finegraft.core.errors import DataError
from finegraft.data.conversation import TEXT_ROLE, Message
from finegraft.data.render import render_batch, render_prompt
from finegraft.data.spans import Tools
from finegraft.inference.evaluate._contract import Answered
from finegraft.inference.generate import complete
from finegraft.inference.score import IGNORED, row_losses

LEAST_TOKENS, MOST_TOKENS = 16, 512  # of an answer, where nobody says how long it may be
_ROOM = 1.5  # an answer may be so much longer than the longest right one

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rows:
    """Conversations as a model is examined on them.

    Attributes:
        conversations: Whole, with the right answers.
        tools: JSON schemas of tools for each.
        heads: What is asked, the last answer left out; None where there is none.
        prompts: The last message of each head, or the whole head as text where it has several.
        references: The last answer; None where there is none.
    """

    conversations: list[list[Message]]
    tools: list[Tools] | None
    heads: list[list[Message] | None]
    prompts: list[str]
    references: list[str | None]

    def __len__(self) -> int:
        return len(self.conversations)


def questions(
    conversations: Sequence[Sequence[Message]], tools: Sequence[Tools] | None = None
) -> Rows:
    """Cut the last answer off each conversation that ends with one in words."""
    heads: list[list[Message] | None] = []
    prompts, references = [], []
    for messages in conversations:
        last = messages[-1] if messages else {}
        said = last.get("content")
        if last.get("role") == "assistant" and isinstance(said, str) and said.strip():
            head = list(messages[:-1])
            heads.append(head)
            prompts.append(_as_text(head))
            references.append(said)
        else:
            heads.append(None)
            prompts.append("")
            references.append(None)
    return Rows(
        [list(messages) for messages in conversations],
        list(tools) if tools is not None else None,
        heads,
        prompts,
        references,
    )


def _as_text(messages: Sequence[Message]) -> str:
    """One message as it is, several with their roles in front."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n".join(f"{m.get('role')}: {m.get('content') or ''}" for m in messages)


def longest_answer(tokenizer: Any, rows: Rows) -> int:
    """Tokens that an answer may have: half as many again as the longest right one."""
    texts = [text for text in rows.references if text is not None]
    if not texts:
        return LEAST_TOKENS
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    wanted = math.ceil(_ROOM * max(map(len, ids))) + 8
    return min(max(wanted, LEAST_TOKENS), MOST_TOKENS)


def examine(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    max_length: int,
    max_new_tokens: int | None,
    completion_only: bool | None = None,
    with_answers: bool = True,
    with_losses: bool = True,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> Answered:
    """Answer the rows greedily and score the right answers.

    Args:
        model: A causal language model; its training flags are restored afterwards.
        tokenizer: The tokenizer that belongs to it.
        rows: From ``questions``.
        max_length: Tokens of a row that the loss is computed on, as in training.
        max_new_tokens: Longest answer; None: as ``longest_answer`` says.
        completion_only: Which tokens the loss is of, as in training.
        with_answers: Generate answers, which takes most of the time.
        with_losses: Compute losses.
        batch_size: Rows at a time.
        on_progress: Called with what is being done, how many rows are done, and of how many.

    Raises:
        DataError: FG-EVAL-010, a prompt that fills the model's context; those of rendering.
    """
    answers, losses = [""] * len(rows), None
    asked = [i for i, head in enumerate(rows.heads) if head is not None]
    if with_losses:
        losses = _losses(
            model, tokenizer, rows, max_length, completion_only, batch_size, on_progress
        )
    if with_answers and asked:
        _require_room(model, tokenizer, rows, asked)
        said = complete(
            model,
            tokenizer,
            [rows.heads[i] or [] for i in asked],
            tools=[rows.tools[i] for i in asked] if rows.tools else None,
            max_new_tokens=max_new_tokens or longest_answer(tokenizer, rows),
            batch_size=batch_size,
            on_progress=on_progress and (lambda done, of: on_progress("answering", done, of)),
        )
        for place, text in zip(asked, said, strict=True):
            answers[place] = text
    return Answered(rows.prompts, rows.references, answers, losses)


def _losses(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    max_length: int,
    completion_only: bool | None,
    batch_size: int,
    on_progress: Progress | None,
) -> np.ndarray:
    """Nats and tokens of each row, [n, 2]."""
    rendered = render_batch(
        rows.conversations,
        tokenizer,
        completion_only=completion_only,
        tools=rows.tools,
        names=[f"row {number}" for number in range(1, len(rows) + 1)],
    )
    ids = [row.input_ids[:max_length] for row in rendered]
    labels = [
        [token if learnt else IGNORED for token, learnt in zip(own, row.trained, strict=False)]
        for own, row in zip(ids, rendered, strict=True)
    ]
    sums, tokens = row_losses(
        model,
        ids,
        labels,
        batch_size=batch_size,
        on_progress=on_progress and (lambda done, of: on_progress("scoring", done, of)),
    )
    if not any(tokens):
        raise DataError(
            "FG-SCORE-001",
            f"none of the {len(rows)} held-out rows has a token to score",
            allowed="rows with an answer of at least one token",
            fix="pass rows with answers, or a larger max_length so that answers are not cut off",
        )
    return np.stack([np.asarray(sums), np.asarray(tokens, dtype=np.float64)], axis=1)


def _require_room(model: Any, tokenizer: Any, rows: Rows, asked: Sequence[int]) -> None:
    """Raises DataError FG-EVAL-010 for a prompt that leaves no room for an answer."""
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    limit = getattr(config, "max_position_embeddings", None)
    for place in asked if limit else ():
        head = rows.heads[place] or []
        if not head or head[0].get("role") == TEXT_ROLE:
            continue
        length = len(render_prompt(head, tokenizer, rows.tools[place] if rows.tools else None))
        if length >= limit:
            raise DataError(
                "FG-EVAL-010",
                f"the prompt of row {place + 1} has {length:,} tokens",
                allowed=f"at most {limit - 1:,}, which is what the model can read",
                fix="shorten or remove that row, or leave out what is generated: "
                "--metrics loss,perplexity",
            )
