"""One run of decoding: caches, a prefill without padding, and steps of a few tokens.

What: ``Session`` holds keys and values of b rows and answers ``prefill``, ``step`` and ``check``
with logits. How: a row's tokens end where the longest prompt ends, as under left padding, so that a
step writes one column; its pads are columns that nobody computes or reads. A step is the compiled
loop of ``step_loops``; its twin in torch is the specification that tests compare with. Constraint:
a token's logits do not depend on the tokens beside it in the step, bit for bit. Trade-off: each 16
tokens read the weights again.

Shapes: b rows, m tokens of a step, t tokens of a prefill, T columns of the caches; letters of sizes
as in ``weights``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from finegraft.inference.weights import LANES, Layer, Weights, padded
from finegraft.kernels import _loops
from finegraft.kernels.document_attention import Documents, document_attention
from finegraft.kernels.rotary import rotate

COMPILED_TOKENS = 16  # of one call; beyond them the inputs outgrow the first cache
# Arguments of the compiled step that move on with every ``COMPILED_TOKENS`` tokens
_PER_TOKEN = {3: "ids", 15: "rows", 16: "columns", 17: "begins", 34: "logits"}
_FIRST_COLUMNS = 256  # capacity beyond the prompt, in columns; doubled when it is used up

# q, k, v [t, heads, f] of a layer to attention's output [t, h, f]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@functools.cache
def _compiled(dtype: torch.dtype) -> int:
    """Address of the compiled step."""
    from finegraft.kernels import _compile

    loops = importlib.import_module("finegraft.inference.step_loops")
    body = loops.step_half if dtype == torch.bfloat16 else loops.step_single
    return _compile.address(body)


class Session:
    """Caches of one batch.

    Args:
        weights: Of the model.
        lengths: Tokens of each row's prompt.
        compiled: False runs the twin in torch, which is several times slower.
    """

    def __init__(self, weights: Weights, lengths: list[int], compiled: bool = True):
        self.weights, self.lengths = weights, lengths
        self.width = max(lengths)  # columns in use
        self.starts = torch.tensor([self.width - length for length in lengths])
        self.compiled = compiled
        self._make_room(self.width + _FIRST_COLUMNS)

    def _make_room(self, columns: int) -> None:
        """Caches [L, b, k, T, f_] and angles for at least ``columns`` columns."""
        w, s = self.weights, self.weights.shape
        old = getattr(self, "keys", None)
        if old is not None and columns <= old.shape[3]:
            return
        capacity = padded(columns if old is None else max(columns, 2 * old.shape[3]))
        size = (len(w.layers), len(self.lengths), s.k, capacity, padded(s.f))
        caches = torch.zeros(size, dtype=w.dtype), torch.zeros(size, dtype=w.dtype)
        if old is not None:
            for new, before in zip(caches, (self.keys, self.values), strict=True):
                new[:, :, :, : before.shape[3]] = before
        self.keys, self.values = caches
        self.cos, self.sin = w.angles(capacity)
        self._step: _CompiledStep | None = None

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Read the prompts, whose lengths are ``lengths``; return logits [b, v] of their ends."""
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        documents = Documents(self.lengths)

        def attend(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            f = q.shape[-1]
            spans = zip(self.starts.tolist(), documents.spans(), strict=True)
            for row, (start, (first, length)) in enumerate(spans):
                for cache, new in ((self.keys, k), (self.values, v)):
                    place = cache[number, row, :, start : start + length, :f]
                    place.copy_(new[first : first + length].transpose(0, 1))
            window = self.weights.layers[number].window or None
            return document_attention(q, k, v, documents, self.weights.shape.scale, window)

        hidden = self._layers(ids, positions, attend)
        ends = torch.tensor([first + length - 1 for first, length in documents.spans()])
        return self._logits(hidden[ends])

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Append one column.

        Args:
            ids: [b], the token of every row.

        Returns:
            Logits [b, v], float32; overwritten by the next step.
        """
        rows = torch.arange(len(self.lengths))
        return self._run(ids, rows, torch.full_like(rows, self.width), 1)

    @torch.no_grad()
    def check(self, ids: torch.Tensor) -> torch.Tensor:
        """Append m tokens to a single row; ``forget`` takes back what is not wanted.

        Returns:
            Logits [m, v] after each of them; overwritten by the next step.
        """
        columns = torch.arange(self.width, self.width + ids.numel())
        return self._run(ids, torch.zeros_like(columns), columns, ids.numel())

    def forget(self, columns: int) -> None:
        """Take back the last columns; what is written next overwrites them."""
        self.width -= columns

    def _run(
        self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, grown: int
    ) -> torch.Tensor:
        self._make_room(self.width + grown)
        self.width += grown
        if not self.compiled:
            return self._torch_step(ids, rows, columns)
        if self._step is None:
            self._step = _CompiledStep(self)
        return self._step(ids, rows, columns)

    def _torch_step(
        self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """The compiled step's twin; new tokens [m] with their cache rows and columns."""
        s, end = self.weights.shape, int(columns.max()) + 1
        every = torch.arange(end)
        starts = self.starts[rows]
        in_order = torch.equal(rows, torch.arange(len(self.lengths)))

        def attend(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            for cache, new in ((self.keys, k), (self.values, v)):
                cache[number][rows, :, columns, : s.f] = new
            keys, values = (
                (cache[number] if in_order else cache[number][rows])[:, :, :end, : s.f]
                for cache in (self.keys, self.values)
            )
            window = self.weights.layers[number].window or end
            seen = (every <= columns[:, None]) & (every > columns[:, None] - window)
            seen &= every >= starts[:, None]
            q = q.view(q.shape[0], s.k, s.h // s.k, s.f)
            scores = (q @ keys.transpose(-1, -2)).float() * s.scale  # [m, k, h / k, T]
            scores.masked_fill_(~seen[:, None, None], float("-inf"))
            return (torch.softmax(scores, -1).to(values.dtype) @ values).flatten(1, 2)

        return self._logits(self._layers(ids, columns - starts, attend))

    def _layers(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [t, d] before the last norm."""
        w, s = self.weights, self.weights.shape
        x = F.embedding(ids, w.embedding)
        cos, sin = self.cos[positions].to(w.dtype), self.sin[positions].to(w.dtype)
        n_ = padded(s.n)
        for number, layer in enumerate(w.layers):
            y = _norm(x, layer.norms[0], s.eps)
            qkv = _linear(y, layer.qkv[: s.qkv], layer.biases[0])
            q, k, v = qkv.view(-1, s.h + 2 * s.k, s.f).split([s.h, s.k, s.k], 1)
            if layer.head_norms is not None:
                q, k = (_norm(z, g, s.eps) for z, g in zip((q, k), layer.head_norms, strict=True))
            out = attend(number, rotate(q, cos, sin, 1), rotate(k, cos, sin, 1), v)
            x = x + _linear(out.reshape(len(x), -1), layer.out[: s.d], layer.biases[1])
            y = _norm(x, layer.norms[1], s.eps)
            gate, up = _linear(y, layer.gate_up, layer.biases[2]).split(n_, -1)
            x = x + _linear(F.silu(gate).mul_(up), layer.down[: s.d], layer.biases[3])
        return x

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        w = self.weights
        y = _norm(hidden, w.norm, w.shape.eps)
        return _linear(y, w.head[: w.shape.v], w.head_bias).float()


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    width = x.shape[-1]
    return F.rms_norm(x, (width,), weight[:width].to(x.dtype), eps)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Product with a padded matrix of which ``x`` covers the real columns."""
    out = F.linear(x, weight[:, : x.shape[-1]])
    return out if bias is None else out.add_(bias[: out.shape[-1]].to(out.dtype))


class _CompiledStep:
    """Buffers and arguments of the compiled step for the caches that a session has now."""

    def __init__(self, session: Session):
        w, s = session.weights, session.weights.shape
        self.vocabulary = s.v
        self.starts = session.starts
        self.threads = torch.get_num_threads()
        self.address = _compiled(w.dtype)
        d_, o_, f_, m = padded(s.d), padded(s.h * s.f), padded(s.f), COMPILED_TOKENS
        capacity = session.keys.shape[3]
        private = 2 * m * d_ + 2 * f_ + capacity + LANES
        most = padded(max(m, len(session.lengths)))
        self.ids, self.rows, self.columns, self.begins = torch.zeros(4, most, dtype=torch.long)
        self.logits = torch.zeros(most, padded(s.v))
        self.layers = torch.tensor(
            [_pointers(layer, session, number) for number, layer in enumerate(w.layers)]
        )
        qkv, attended, delta, gate, up = (
            torch.zeros(m, size) for size in (padded(s.qkv), o_, d_, padded(s.n), padded(s.n))
        )
        workspace = torch.zeros(self.threads, private)
        # Everything whose address is taken stays alive with this object.
        self.alive = (session.keys, session.values, session.cos, session.sin, w)
        self.alive += (qkv, attended, delta, gate, up, workspace)
        values = (
            *(self.layers, len(w.layers), 0, self.ids, w.embedding, s.d, d_, s.h, s.k, s.f, f_),
            *(padded(s.n), session.cos, session.sin, session.cos.shape[1]),
            *(self.rows, self.columns, self.begins, capacity, float(s.eps), float(s.scale)),
            *(workspace, private, qkv, padded(s.qkv), attended, o_, delta, gate, up),
            *(w.norm, w.head, w.head_bias, padded(s.v), self.logits, 0),
        )
        self.arguments = _loops.arguments(values)

    def __call__(
        self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        m = ids.numel()
        self.ids[:m], self.rows[:m], self.columns[:m] = ids, rows, columns
        self.begins[:m] = self.starts[rows]
        for first in range(0, m, COMPILED_TOKENS):
            self.arguments[2] = min(COMPILED_TOKENS, m - first)
            for place, tensor in _PER_TOKEN.items():
                self.arguments[place] = getattr(self, tensor)[first].data_ptr()
            _loops.run(self.address, self.arguments, self.threads)
        return self.logits[:m, : self.vocabulary]


def _pointers(layer: Layer, session: Session, number: int) -> list[int]:
    norms = layer.head_norms or (None, None)
    qkv, out, gate_up, down = layer.biases
    values = (layer.qkv, qkv, layer.out, out, layer.gate_up, layer.down, *layer.norms, *norms)
    caches = (session.keys[number], session.values[number], layer.window, gate_up, down)
    return [_loops.as_int(value) for value in (*values, *caches)]
