"""Answers from a model, many at once or as they are written.

What: ``complete`` for lists of conversations, ``stream`` for one. How: prompts come from the one
renderer in ``data.render``; batches are padded on the left here, with the mask and the positions
spelled out, so that ``pad == eos`` and the tokenizer's own padding side do not matter; the tokens
come from the model's ``generate``, whose loop is that of ``decode`` where the model allows it.
Constraint: greedy answers do not depend on the batch they are computed in (float32). Sampling
options that a model's author put in its generation configuration are not used, only its stop
tokens: what is passed is what happens. Trade-off: sampled answers do depend on the batch, because
one random stream serves all of its rows.

Shapes: b rows of a batch, t tokens of its longest prompt.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from finegraft.core.errors import ConfigError, DataError
from finegraft.data.conversation import Message
from finegraft.data.render import render_prompt, stop_token_ids
from finegraft.data.spans import Tools
from finegraft.inference.decode import decoding
from finegraft.inference.modes import answering


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the generation configuration's and the template's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({i for i in (*named, *stop_token_ids(tokenizer)) if i is not None})


def pad_id(tokenizer: Any, stops: list[int]) -> int:
    """A token to fill up with; the model never sees it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stops[0] if stops else 0


def context_length(model: Any) -> int | None:
    """Tokens of prompt and answer together that the model has positions for; None: any number."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def _options(
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    prompt_lookup_num_tokens: int | None,
) -> Any:
    """A generation configuration in which nothing is left for the model's own to fill in.

    Raises:
        ConfigError: FG-GEN-002, a number out of range.
    """
    from transformers import GenerationConfig

    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            "FG-GEN-002",
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}",
            allowed="max_new_tokens >= 1, temperature >= 0 (0: greedy), 0 < top_p <= 1",
            fix="for example max_new_tokens=256, temperature=0.7, top_p=0.9",
        )
    sampling, looked_up = temperature > 0, prompt_lookup_num_tokens
    if looked_up is not None and (looked_up < 1 or sampling):
        raise ConfigError(
            "FG-GEN-002",
            f"prompt_lookup_num_tokens={looked_up}, temperature={temperature}",
            allowed="prompt_lookup_num_tokens >= 1, with temperature=0 (greedy)",
            fix="leave one of them out",
        )
    stops = stop_ids(model, tokenizer)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        temperature=temperature if sampling else 1.0,
        top_p=top_p if sampling else 1.0,
        top_k=0 if sampling else 50,  # 50 is what transformers takes for "unset" when greedy
        min_p=None,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        prompt_lookup_num_tokens=looked_up,
        eos_token_id=stops or None,
        pad_token_id=pad_id(tokenizer, stops),
    )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed`` inside the block; the caller's stream is untouched after it."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def left_padded(prompts: list[list[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """Ids, mask and positions [b, t]; every prompt ends in the last column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
    }


def _prompts(
    model: Any, tokenizer: Any, conversations: Sequence[Any], tools: Sequence[Tools] | None = None
) -> list[list[int]]:
    """Render the conversations and refuse what the model has no room for.

    Raises:
        DataError: FG-GEN-001, a prompt fills the model's whole context or is empty.
    """
    given = tools or [None] * len(conversations)
    pairs = zip(conversations, given, strict=True)
    prompts = [list(render_prompt(list(messages), tokenizer, own)) for messages, own in pairs]
    limit = context_length(model)
    for number, prompt in enumerate(prompts):
        if not prompt or (limit is not None and len(prompt) >= limit):
            raise DataError(
                "FG-GEN-001",
                f"prompt {number} has {len(prompt)} tokens",
                allowed=f"1 to {limit - 1} tokens" if limit else "at least one token",
                fix="shorten the conversation, or start a new one (/reset in a chat)",
            )
    return prompts


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def complete(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    prompt_lookup_num_tokens: int | None = None,
    tools: Sequence[Tools] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer every conversation.

    Args:
        model: A causal language model; its training flags are restored afterwards.
        tokenizer: The tokenizer that belongs to it; it is not changed.
        conversations: One list of messages each, in any order of length.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Sample from the likeliest tokens that have this share together.
        seed: Makes sampling repeatable for one ``batch_size``.
        batch_size: Conversations at a time.
        prompt_lookup_num_tokens: Guess up to this many tokens from the text so far and check them
            at once. The answer stays the same; answers that repeat their prompt come several times
            faster, one conversation at a time. 10 is a good start; None: off.
        tools: JSON schemas of tools for each conversation, for the template.
        on_progress: Called with how many are answered, and of how many.

    Returns:
        The answers without special tokens, in the order of ``conversations``.

    Raises:
        DataError: FG-GEN-001, a prompt that is empty or fills the model's context.
        ConfigError: FG-GEN-002, a number out of range.
    """
    options = _options(
        model, tokenizer, max_new_tokens, temperature, top_p, prompt_lookup_num_tokens
    )
    prompts = _prompts(model, tokenizer, conversations, tools)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers = [""] * len(prompts)
    if prompt_lookup_num_tokens is not None:
        batch_size = 1
    keep = not model.training  # a model that trains has no memory to spare between answers
    with answering(model), decoding(model, keep), _seeded(seed, model.device):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = left_padded([prompts[i] for i in batch], options.pad_token_id, model.device)
            out = model.generate(**inputs, generation_config=options)
            for i, ids in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[i] = _text(tokenizer, _until_stop(ids, options.eos_token_id))
            if on_progress is not None:
                on_progress(min(start + batch_size, len(order)), len(order))
    return answers


def _until_stop(ids: list[int], stops: list[int] | None) -> list[int]:
    """Drop the first stop token and the padding after it; a pad token may be an ordinary one."""
    ends = (place for place, token in enumerate(ids) if token in (stops or ()))
    return ids[: next(ends, len(ids))]


class _Tokens:
    """The streamer that ``generate`` feeds: prompt first, then one token at a time."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._seen_prompt:
            for token in value.reshape(-1).tolist():
                self.queue.put(token)
        self._seen_prompt = True

    def end(self) -> None:
        """The worker's own end is what closes the queue, so that errors close it as well."""


def _pieces(tokenizer: Any, tokens: Iterator[int], stops: list[int] | None) -> Iterator[str]:
    """Text as it becomes final: bytes of an unfinished character are held back."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        if token in (stops or ()):
            break
        ids.append(token)
        text = _text(tokenizer, ids)
        if not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = _text(tokenizer, ids)[len(shown) :]
    if rest:
        yield rest


def stream(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    prompt_lookup_num_tokens: int | None = None,
) -> Iterator[str]:
    """Answer one conversation piece by piece.

    Closing the iterator, or Ctrl-C while it waits, stops the model after the token it is at; the
    model is never left busy or in another mode than it was.

    Args:
        model: As for ``complete``.
        tokenizer: As for ``complete``.
        messages: The conversation so far.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Sample from the likeliest tokens that have this share together.
        seed: Makes sampling repeatable.
        prompt_lookup_num_tokens: Guess up to this many tokens from the text so far and check them
            at once. The answer stays the same; answers that repeat their prompt come several times
            faster. 10 is a good start; None: off.

    Returns:
        An iterator of text; joined, it is what ``complete`` returns.

    Raises:
        DataError: FG-GEN-001, a prompt that is empty or fills the model's context.
        ConfigError: FG-GEN-002, a number out of range.
    """
    options = _options(
        model, tokenizer, max_new_tokens, temperature, top_p, prompt_lookup_num_tokens
    )
    prompts = _prompts(model, tokenizer, [messages])
    inputs = left_padded(prompts, options.pad_token_id, model.device)
    return _streamed(model, tokenizer, inputs, options, seed)


def _streamed(
    model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], options: Any, seed: int | None
) -> Iterator[str]:
    """Run ``generate`` in a thread and read its tokens through a queue.

    A loop over ``forward`` would need no thread, but models that need more than ``forward`` to
    generate (prefix tuning, say) would answer wrongly in it.
    """
    from transformers import StoppingCriteriaList

    tokens, stopped = _Tokens(), threading.Event()

    def work() -> None:
        halt = StoppingCriteriaList([_Halt(stopped)])
        with _seeded(seed, model.device):
            model.generate(
                **inputs, generation_config=options, streamer=tokens, stopping_criteria=halt
            )

    keep = not model.training
    with answering(model), decoding(model, keep), ThreadPoolExecutor(1, "finegraft-stream") as pool:
        job = pool.submit(work)
        job.add_done_callback(lambda _: tokens.queue.put(None))
        try:
            yield from _pieces(tokenizer, iter(tokens.queue.get, None), options.eos_token_id)
        finally:
            stopped.set()
        job.result()


class _Halt:
    """A stopping criterion that another thread can set."""

    def __init__(self, stopped: threading.Event):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)
