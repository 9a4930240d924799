"""``generate`` of a causal model, with its token loop on our decoder.

What: a subclass of the model's own class whose greedy, sampling and prompt-lookup loops run on
merged weights, a preallocated cache and a compiled step. How: transformers' ``generate`` still
reads every argument and builds the processors and stopping criteria; only the loop it ends in is
replaced, on this one instance (``attach``). Constraint: whatever the loop does not reproduce
exactly (beams, assistants, requested scores, a cache of the caller's, right padding, training mode)
goes to the stock loop in the same call; so does a model that ``weights.unfit`` refuses or whose
float32 logits a probe finds different. Trade-off: the merged copy is made again when a weight or an
adapter has changed, 0.1 s for 135M parameters, and looking costs 0.05 s a call.

Shapes: b rows, t tokens of the longest prompt, n tokens so far, v vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn

from finegraft.inference import weights as reader
from finegraft.inference.lookup import Lookup
from finegraft.inference.session import COMPILED_TOKENS, Session
from finegraft.kernels import _loops
from finegraft.models import swap

logger = logging.getLogger(__name__)

_PROBE = (5, 11, 3, 7, 2, 13)  # tokens, modulo the vocabulary
_UNDERSTOOD = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_REQUESTS = ("return_dict_in_generate", "cache_implementation", "prefill_chunk_size")


@dataclass
class _State:
    """What is known about one model."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    mark: tuple[Any, ...] | None = None
    weights: reader.Weights | None = None
    probed: bool = False
    differs: str | None = None  # found by the probe; a model that computes something else stays so
    refused: str | None = None  # the reason that was logged last


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


class FastDecoding(swap.SavesAsStock):
    """Mixed into a causal model's class; see ``attach``."""

    def _sample(
        self: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy or sampled tokens [b, n], as the stock loop gives them."""
        run = _start(self, input_ids, generation_config, synced_gpus, model_kwargs)
        if run is not None:
            return run.sample(logits_processor, stopping_criteria, generation_config, streamer)
        return super()._sample(  # type: ignore[misc]
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def _assisted_decoding(
        self: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **more: Any,
    ) -> Any:
        """Greedy tokens [1, n] with guesses from the prompt; every other assistant is stock."""
        wanted = generation_config.prompt_lookup_num_tokens
        helpers = ("assistant_model", "assistant_tokenizer", "tokenizer", "inputs_tensor")
        model_kwargs = {name: value for name, value in more.items() if name not in helpers}
        stock = not wanted or generation_config.do_sample or more.get("assistant_model") is not None
        if not stock and len(input_ids) == 1:
            run = _start(self, input_ids, generation_config, synced_gpus, model_kwargs)
            if run is not None:
                return run.look_up(logits_processor, stopping_criteria, streamer, wanted)
        return super()._assisted_decoding(  # type: ignore[misc]
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **more,
        )


@dataclass
class _Run:
    """One call: the prompt and a session that has not read it yet."""

    session: Session
    ids: torch.Tensor  # [b, t]
    prompts: list[list[int]]

    def sample(self, processors: Any, criteria: Any, config: Any, streamer: Any) -> torch.Tensor:
        """The loop of greedy decoding and sampling; stops are the criteria's business."""
        ids, logits = self.ids, self.session.prefill(self.prompts)
        unfinished = torch.ones(len(ids), dtype=torch.long)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        while True:
            scores = processors(ids, logits.clone()) if len(processors) else logits  # [b, v]
            if config.do_sample:
                shares = torch.softmax(scores, dim=-1)
                following = torch.multinomial(shares, num_samples=1).squeeze(1)
            else:
                following = scores.argmax(-1)
            if ends:
                pad = config._pad_token_tensor
                following = torch.where(unfinished.bool(), following, pad)
            ids = torch.cat([ids, following[:, None]], dim=-1)
            unfinished = unfinished & ~criteria(ids, None)
            if streamer is not None:
                streamer.put(following)
            if not unfinished.any():
                break
            logits = self.session.step(following)
        if streamer is not None:
            streamer.end()
        return ids

    def look_up(self, processors: Any, criteria: Any, streamer: Any, most: int) -> torch.Tensor:
        """Greedy decoding of one row that checks guesses; a guess costs no more than a step."""
        ids, logits = self.ids, self.session.prefill(self.prompts)  # [1, t], [1, v]
        book = Lookup(self.prompts[0], min(most, COMPILED_TOKENS - 1))
        guessed: list[int] = []
        while True:
            said, done = [], False
            for place in range(len(guessed) + 1):
                row = logits[place : place + 1]
                scores = processors(ids, row.clone()) if len(processors) else row
                token = scores.argmax(-1)
                ids = torch.cat([ids, token[:, None]], dim=-1)
                said.append(int(token))
                done = bool(criteria(ids, None).all())
                if done or place == len(guessed) or said[-1] != guessed[place]:
                    break
            if streamer is not None:
                streamer.put(ids[:, -len(said) :])
            if done:
                break
            book.learn(len(guessed), len(said) - 1)
            self.session.forget(len(guessed) - (len(said) - 1))
            book.extend(said)
            guessed = book.guess(_left(criteria, ids))
            logits = self.session.check(torch.tensor([said[-1], *guessed]))
        if streamer is not None:
            streamer.end()
        return ids


def _left(criteria: Any, ids: torch.Tensor) -> int:
    """How many tokens are worth guessing before the longest answer ends."""
    longest = criteria.max_length
    return COMPILED_TOKENS if longest is None else max(0, longest - ids.shape[1] - 1)


def _start(
    model: Any, ids: torch.Tensor, config: Any, synced: bool, kwargs: dict[str, Any]
) -> _Run | None:
    """Return a run, or None, with the reason logged, where the stock loop must be taken."""
    reason = _request(model, ids, config, synced, kwargs)
    lengths, reason = (None, reason) if reason else _lengths(ids, kwargs)
    weights = None
    if lengths is not None:
        weights, reason = merged_weights(model)
    if weights is None or lengths is None:
        logger.debug("this call is decoded by transformers: %s", reason)
        return None
    prompts = [row[-length:] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return _Run(Session(weights, lengths), ids, prompts)


def _request(
    model: Any, ids: torch.Tensor, config: Any, synced: bool, kwargs: dict[str, Any]
) -> str | None:
    """Why this call asks for more than tokens, or None."""
    unknown = {name for name, value in kwargs.items() if value is not None} - _UNDERSTOOD
    if unknown:
        return f"{', '.join(sorted(unknown))} is passed"
    for name in _REQUESTS:
        if getattr(config, name, None):
            return f"{name} is set"
    if synced or getattr(config, "is_assistant", False):
        return "another process or model waits for each token"
    if model.training:
        return "the model is in training mode"
    prepare = vars(model).get("prepare_inputs_for_generation")
    if prepare is not None and getattr(prepare, "__self__", None) is not model:
        return "virtual tokens are put in front of the prompt"
    if ids.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return "not on a CPU, or under autocast"
    cache = kwargs.get("past_key_values")
    if not kwargs.get("use_cache", True) or (cache is not None and cache.get_seq_length()):
        return "no cache is wanted, or one that is already filled"
    return None


def _lengths(ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[list[int] | None, str | None]:
    """Tokens of each row under left padding, or why the rows are something else."""
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape or not ids.shape[1]:
        return None, "a mask that is not [b, t]"
    counts = mask.long().sum(-1)
    left = torch.arange(ids.shape[1]) >= ids.shape[1] - counts[:, None]
    if not torch.equal(mask.bool(), left) or int(counts.min()) < 1:
        return None, "rows that are not padded on the left"
    positions = kwargs.get("position_ids")
    if positions is not None:
        expected = torch.where(left, left.long().cumsum(-1) - 1, 0)
        if not torch.equal(torch.where(left, positions, 0), expected):
            return None, "positions that do not count the row's own tokens"
    return counts.tolist(), None


def merged_weights(core: Any) -> tuple[reader.Weights | None, str | None]:
    """Merged weights of the model as it is now, or why there are none."""
    state = _states.setdefault(core, _State())
    with state.lock:
        reason = state.differs or reader.unfit(core) or _loops.missing()
        if reason is None:
            mark = reader.fingerprint(core)
            if state.weights is None or state.mark != mark:
                state.weights, state.mark = None, mark
                reason = _no_room(core)
                state.weights = None if reason else reader.merge(core)
        if reason is None and not state.probed:
            reason = state.differs = _probe(core, state.weights)
            state.probed = reason is None
        if reason is not None:
            state.weights = state.mark = None
            if reason != state.refused:
                logger.info("%s is decoded by transformers: %s", type(core).__name__, reason)
        state.refused = reason
        return state.weights, reason


def _no_room(core: Any) -> str | None:
    shape = reader.shape_of(core)
    size = core.get_input_embeddings().weight.element_size()
    need = size * reader.elements(core, shape)
    free = psutil.virtual_memory().available
    if need <= 0.8 * free:
        return None
    return f"merged weights take {need / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free"


@torch.no_grad()
def _probe(core: Any, weights: Any) -> str | None:
    """Compare with the model's own logits on a few tokens; a reason when they differ.

    In float32 only: transformers' bfloat16 logits of SmolLM2 on these tokens are 9% to 123% away
    from float32's (ours 2% to 17%), so that a difference there says nothing.
    """
    if weights.dtype != torch.float32:
        return None
    ids = [token % weights.shape.v for token in _PROBE]
    expected = core(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    session = Session(weights, [2])
    got = [session.prefill([ids[:2]])[0]]
    got += [session.step(torch.tensor([token]))[0].clone() for token in ids[2:]]
    error = (torch.stack(got) - expected[1:]).norm() / expected[1:].norm()
    limit = 1e-3  # rounding gives 1e-6
    return None if error < limit else f"its logits differ by {error:.1%} from our decoder's"


@functools.cache
def _class(current: type[nn.Module]) -> type[nn.Module]:
    stock = getattr(current, "stock_class", current)
    body = {"stock_class": stock, "without_decoding": current, "__module__": __name__}
    return type(f"FastDecoding{stock.__name__}", (FastDecoding, current), body)


def attach(model: nn.Module) -> str | None:
    """Give the causal model inside ``model`` the fast loop; return why not, or None.

    Args:
        model: Itself or what peft wraps. Nothing is copied before the first ``generate``.
    """
    core = swap.core(model)
    if isinstance(core, FastDecoding):
        return None
    reason = reader.unfit(core) or _loops.missing()
    if reason is None:
        core.__class__ = _class(type(core))
    elif isinstance(core, nn.Module) and not swap.is_swapped(core):
        swap.refuse(core, reason)
    return reason


def detach(model: nn.Module) -> None:
    """Take the fast loop away and free the merged weights."""
    core = swap.core(model)
    if isinstance(core, FastDecoding):
        core.__class__ = type(core).without_decoding
    _states.pop(core, None)


@contextlib.contextmanager
def decoding(model: nn.Module, keep: bool = True) -> Iterator[None]:
    """The fast loop for a block.

    Args:
        keep: Keep the merged weights afterwards, for the next block. Not worth their memory while
            a model trains.
    """
    core = swap.core(model)
    mine = not isinstance(core, FastDecoding) and attach(core) is None
    try:
        yield
    finally:
        if mine and isinstance(core, FastDecoding):
            core.__class__ = type(core).without_decoding
        if not keep:
            _states.pop(core, None)
