"""Document attention in Triton: online softmax, nothing of size t x t, no atomics.

What: the contract of the reference with ``softcap``. How: a host-made table names the document of
every tile, so that no program meets a tile of another document; forward saves one log-sum-exp a
row and head; backward recomputes the scores twice, once by query tiles for dq and once by key
tiles for dk and dv, which sum over the query heads of their group inside one program. Tiles that
are visible as a whole run without a mask. A shared beginning is read by all documents, and its keys
sum over all their queries. Constraint: float32, bfloat16 and float16, sums in
float32, same bits on every run. Trade-off: head widths are filled up to a power of two (80 and 96
compute as 128), and recomputing costs backward 7 products instead of 5, for which dq needs no
atomics.

Source: FlashAttention-2, https://arxiv.org/abs/2307.08691; soft-capping, arXiv:2408.00118.

Shapes: t tokens, h heads, k key heads, f features, r rows of the tile that a program owns, s rows
of the tiles that it reads in turn. Scores are in units of ln 2, because exp2 is the cheaper one.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from finegraft.kernels import _gpu
from finegraft.kernels.document_attention import tiles
from finegraft.kernels.document_attention.layout import Documents
from finegraft.kernels.document_attention.rectangles import Angles
from finegraft.kernels.rotary.triton import rotary

# The document of a tile: its start, its end and the tile's first row.
_TABLE_COLUMNS = tl.constexpr(3)
_NEVER = tl.constexpr(-1e30)  # below every score; infinity minus infinity would be nan


@triton.jit
def _tanh(x):
    """tanh, which Triton's own language lacks, within 3 rounding steps of float32."""
    z = x * x
    # Least squares on abs(x) < 0.6, where 1 - 2 / (e + 1) would cancel.
    small = -0.0058310695060516116
    small = small * z + 0.020744130007560747
    small = small * z - 0.05376947155497147
    small = small * z + 0.13331768144158135
    small = small * z - 0.33333292713712037
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(x), 20.0)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, x + x * z * small, tl.where(x < 0, -large, large))


@triton.jit
def _load(base, rows, stride, end, features, WIDTH: tl.constexpr):
    """Rows below ``end`` of one head as [rows, features]; zeros elsewhere."""
    inside = (rows < end)[:, None] & (features < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + features[None, :], inside, 0.0)


@triton.jit
def _store(base, x, rows, stride, end, features, WIDTH: tl.constexpr):
    """Write the rows below ``end`` of one head."""
    inside = (rows < end)[:, None] & (features < WIDTH)[None, :]
    at = base + rows.to(tl.int64)[:, None] * stride + features[None, :]
    tl.store(at, x.to(base.dtype.element_ty), inside)


@triton.jit
def _scores(a, b, factor, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of the rows of ``a`` with the rows of ``b``, soft-capped, in units of ln 2."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION) * factor
    if CAPPED:
        s = cap * _tanh(s)
    return s


@triton.jit
def _visible(queries, keys, end, window, WINDOWED: tl.constexpr):
    """Whether a query sees a key: before ``end``, not later than itself, inside the window."""
    seen = (keys < end) & (keys <= queries)
    if WINDOWED:
        seen = seen & (queries - keys < window)
    return seen


@triton.jit
def _forward_part(
    q, top, total, acc, k_base, v_base, k_stride, v_stride, lo, hi, end, queries, features,
    factor, cap, window, MASKED: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys from ``lo`` to ``hi`` into the online softmax of one query tile."""
    for at in range(lo, hi, S):
        keys = at + tl.arange(0, S)
        k = _load(k_base, keys, k_stride, end, features, WIDTH)
        s = _scores(q, k, factor, cap, CAPPED, PRECISION)  # [r, s]
        if MASKED:
            seen = _visible(queries[:, None], keys[None, :], end, window, WINDOWED)
            s = tl.where(seen, s, _NEVER)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        if MASKED:  # a row that has seen nothing yet has its top at _NEVER too
            p = tl.where(seen, p, 0.0)
        old = tl.exp2(top - new)
        total = total * old + tl.sum(p, 1)
        v = _load(v_base, keys, v_stride, end, features, WIDTH)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
        top = new
    return top, total, acc


@triton.jit
def _key_ranges(start, first, window, R: tl.constexpr, S: tl.constexpr, WINDOWED: tl.constexpr):
    """First key of a query tile; where its unmasked tiles begin; where they end."""
    lo = start
    inner = lo
    if WINDOWED:
        lo = tl.maximum(start, first - window + 1)
        # The tile's last query sees from first + r - window on.
        inner = lo + tl.cdiv(tl.maximum(first + R - window - lo, 0), S) * S
    outer = inner + tl.maximum(first + 1 - inner, 0) // S * S
    return lo, inner, outer


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token,
    factor, cap, window, prefix, GROUPS: tl.constexpr, WIDTH: tl.constexpr, FILLED: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: output [r, f] and log-sum-exp [r]."""
    entry = table_ptr + _TABLE_COLUMNS * tl.program_id(0)
    start, end, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    head = tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, R)
    features = tl.arange(0, FILLED)
    k_base = k_ptr + head // GROUPS * k_head
    v_base = v_ptr + head // GROUPS * v_head
    q = _load(q_ptr + head * q_head, queries, q_token, end, features, WIDTH)
    top = tl.full([R], _NEVER, tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, FILLED], tl.float32)
    if SHARED:  # the shared beginning comes before the document's own tokens
        before = tl.where(start == 0, 0, prefix)
        top, total, acc = _forward_part(
            q, top, total, acc, k_base, v_base, k_token, v_token, 0, before, before,
            queries + before, features, factor, cap, window, True, WIDTH, S, False, CAPPED,
            PRECISION,
        )  # fmt: skip
    lo, inner, outer = _key_ranges(start, first, window, R, S, WINDOWED)
    hi = tl.minimum(end, first + R)
    if WINDOWED:
        top, total, acc = _forward_part(
            q, top, total, acc, k_base, v_base, k_token, v_token, lo, tl.minimum(inner, hi), end,
            queries, features, factor, cap, window, True, WIDTH, S, WINDOWED, CAPPED, PRECISION,
        )  # fmt: skip
    top, total, acc = _forward_part(
        q, top, total, acc, k_base, v_base, k_token, v_token, inner, outer, end,
        queries, features, factor, cap, window, False, WIDTH, S, WINDOWED, CAPPED, PRECISION,
    )  # fmt: skip
    top, total, acc = _forward_part(
        q, top, total, acc, k_base, v_base, k_token, v_token, outer, hi, end,
        queries, features, factor, cap, window, True, WIDTH, S, WINDOWED, CAPPED, PRECISION,
    )  # fmt: skip
    total = tl.where(queries < end, total, 1.0)  # rows behind the document may have seen nothing
    _store(out_ptr + head * WIDTH, acc / total[:, None], queries, out_token, end, features, WIDTH)
    tl.store(lse_ptr + head * tokens + queries, top + tl.log2(total), queries < end)


@triton.jit
def _slope(ds, s, cap, CAPPED: tl.constexpr):
    """Gradient of the scores through the soft cap."""
    if CAPPED:
        ratio = s / cap
        ds = ds * (1.0 - ratio * ratio)
    return ds


@triton.jit
def _queries_part(
    dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, lo, hi, end, queries, features,
    factor, cap, window, MASKED: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys from ``lo`` to ``hi`` give to the gradient of one query tile."""
    for at in range(lo, hi, S):
        keys = at + tl.arange(0, S)
        k = _load(k_base, keys, k_stride, end, features, WIDTH)
        v = _load(v_base, keys, v_stride, end, features, WIDTH)
        s = _scores(q, k, factor, cap, CAPPED, PRECISION)  # [r, s]
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            seen = _visible(queries[:, None], keys[None, :], end, window, WINDOWED)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = _slope(p * (dp - delta[:, None]), s, cap, CAPPED)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token,
    scale, factor, cap, window, prefix,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, FILLED: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dq [r, f], and delta = rowsum(do * out) [r]."""
    entry = table_ptr + _TABLE_COLUMNS * tl.program_id(0)
    start, end, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    head = tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, R)
    features = tl.arange(0, FILLED)
    k_base = k_ptr + head // GROUPS * k_head
    v_base = v_ptr + head // GROUPS * v_head
    q = _load(q_ptr + head * q_head, queries, q_token, end, features, WIDTH)
    do = _load(do_ptr + head * WIDTH, queries, out_token, end, features, WIDTH)
    out = _load(out_ptr + head * WIDTH, queries, out_token, end, features, WIDTH)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * tokens + queries, delta, queries < end)
    # A row behind the document gets p = 0 whatever its scores are.
    lse = tl.load(lse_ptr + head * tokens + queries, queries < end, 1e30)
    dq = tl.zeros([R, FILLED], tl.float32)
    if SHARED:
        before = tl.where(start == 0, 0, prefix)
        dq = _queries_part(
            dq, q, do, lse, delta, k_base, v_base, k_token, v_token, 0, before, before,
            queries + before, features, factor, cap, window, True, WIDTH, S, False, CAPPED,
            PRECISION,
        )  # fmt: skip
    lo, inner, outer = _key_ranges(start, first, window, R, S, WINDOWED)
    hi = tl.minimum(end, first + R)
    if WINDOWED:
        dq = _queries_part(
            dq, q, do, lse, delta, k_base, v_base, k_token, v_token, lo, tl.minimum(inner, hi),
            end, queries, features, factor, cap, window, True, WIDTH, S, WINDOWED, CAPPED,
            PRECISION,
        )  # fmt: skip
    dq = _queries_part(
        dq, q, do, lse, delta, k_base, v_base, k_token, v_token, inner, outer,
        end, queries, features, factor, cap, window, False, WIDTH, S, WINDOWED, CAPPED, PRECISION,
    )  # fmt: skip
    dq = _queries_part(
        dq, q, do, lse, delta, k_base, v_base, k_token, v_token, outer, hi,
        end, queries, features, factor, cap, window, True, WIDTH, S, WINDOWED, CAPPED, PRECISION,
    )  # fmt: skip
    _store(dq_ptr + head * WIDTH, dq * scale, queries, out_token, end, features, WIDTH)


@triton.jit
def _keys_part(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_stride, do_stride, lo, hi, end, keys,
    features, factor, cap, window, MASKED: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the queries from ``lo`` to ``hi`` of one head give to one key tile."""
    for at in range(lo, hi, S):
        queries = at + tl.arange(0, S)
        q = _load(q_base, queries, q_stride, end, features, WIDTH)
        do = _load(do_base, queries, do_stride, end, features, WIDTH)
        lse = tl.load(lse_base + queries, queries < end, 1e30)
        delta = tl.load(delta_base + queries, queries < end, 0.0)
        s = _scores(k, q, factor, cap, CAPPED, PRECISION)  # [r, s]: keys by queries
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            seen = _visible(queries[None, :], keys[:, None], end, window, WINDOWED)
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = _slope(p * (dp - delta[None, :]), s, cap, CAPPED)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, dk_token,
    scale, factor, cap, window, prefix,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, FILLED: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head: dk and dv [r, f], summed over its query heads."""
    entry = table_ptr + _TABLE_COLUMNS * tl.program_id(0)
    start, end, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    key_head = tl.program_id(1).to(tl.int64)
    keys = first + tl.arange(0, R)
    features = tl.arange(0, FILLED)
    k = _load(k_ptr + key_head * k_head, keys, k_token, end, features, WIDTH)
    v = _load(v_ptr + key_head * v_head, keys, v_token, end, features, WIDTH)
    dk = tl.zeros([R, FILLED], tl.float32)
    dv = tl.zeros([R, FILLED], tl.float32)
    inner = tl.minimum(first + (R + S - 1) // S * S, end)  # from here on no query is too early
    outer, hi = end, end
    if WINDOWED:
        hi = tl.minimum(end, first + R - 1 + window)  # the tile's last key is seen until here
        outer = inner + tl.maximum(tl.minimum(first + window, end) - inner, 0) // S * S
    for group in range(GROUPS):
        head = key_head * GROUPS + group
        q_base, do_base = q_ptr + head * q_head, do_ptr + head * WIDTH
        lse_base, delta_base = lse_ptr + head * tokens, delta_ptr + head * tokens
        dk, dv = _keys_part(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, out_token,
            first, inner, end, keys, features, factor, cap, window, True,
            WIDTH, S, WINDOWED, CAPPED, PRECISION,
        )  # fmt: skip
        dk, dv = _keys_part(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, out_token,
            inner, outer, end, keys, features, factor, cap, window, False,
            WIDTH, S, WINDOWED, CAPPED, PRECISION,
        )  # fmt: skip
        if WINDOWED:
            dk, dv = _keys_part(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, out_token,
                outer, hi, end, keys, features, factor, cap, window, True,
                WIDTH, S, WINDOWED, CAPPED, PRECISION,
            )  # fmt: skip
        if SHARED:  # a key of the shared beginning is seen by all queries behind it
            behind = tl.where(start == 0, prefix, tokens)
            dk, dv = _keys_part(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, out_token,
                behind, tokens, tokens, keys, features, factor, cap, window, False,
                WIDTH, S, False, CAPPED, PRECISION,
            )  # fmt: skip
    _store(dk_ptr + key_head * WIDTH, dk * scale, keys, dk_token, end, features, WIDTH)
    _store(dv_ptr + key_head * WIDTH, dv, keys, dk_token, end, features, WIDTH)


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    angles: Angles | None = None,
) -> torch.Tensor:
    """Same contract as the reference; differentiable in ``query``, ``key`` and ``value``.

    Args:
        query: [t, h, f], any strides whose last is 1 without a copy.
        key: [t, k, f], k a divisor of h.
        value: [t, k, f].
        documents: Lengths that sum to t; a shared beginning is computed once.
        scale: Factor on the scores.
        window: A token sees itself and ``window - 1`` tokens before it; None: all before it.
        softcap: Scores become ``softcap * tanh(scores / softcap)`` before the mask.
        angles: cos and sin [t, r] by which query and key are rotated first, in a kernel of its own.

    Returns:
        [t, h, f], contiguous.

    Raises:
        ConfigError: FG-KERNEL-001 a dtype or device that it cannot take, FG-KERNEL-002 shapes that
            do not belong together, or a window together with a shared beginning.

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # in one dtype, as autocast does around torch's attention
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        with torch.autocast(kind, enabled=False):
            return document_attention(q, k, v, documents, scale, window, softcap, angles)
    _check(query, key, value, documents, window)
    if angles is not None:
        query, key = rotary(query, *angles), rotary(key, *angles)
    out: torch.Tensor = _DocumentAttention.apply(
        query, key, value, documents, scale, window, softcap
    )
    return out


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    window: int | None,
) -> None:
    _gpu.require("document_attention", query, key, value)
    t, h, f = query.shape
    _gpu.require_shape(
        "document_attention",
        documents.tokens == t
        and key.shape == value.shape == (t, key.shape[1], f)
        and h % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype,
        f"query {query.dtype} {list(query.shape)}, key {key.dtype} {list(key.shape)}, value "
        f"{value.dtype} {list(value.shape)}, documents of {documents.tokens} tokens",
        "query [t, h, f], key and value [t, k, f] of the same dtype, h a multiple of k, documents "
        "of t tokens",
    )
    longest = documents.lengths[0] + max(documents.lengths[1:]) if documents.shared else 0
    _gpu.require_shape(
        "document_attention",
        window is None or window >= longest,
        f"a window of {window} tokens over documents of {longest} with a shared beginning",
        "a window that no document reaches, or documents without a shared beginning",
    )


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Setting(NamedTuple):
    """What all three kernels are told; ``factor`` and ``cap`` as the kernels use them."""

    documents: Documents
    scale: float
    factor: float
    cap: float
    window: int
    prefix: int
    heads: int
    key_heads: int
    width: int
    windowed: bool
    capped: bool

    def launch(
        self, kernel: Any, like: torch.Tensor, by_key: bool, sums: int, own: int, *args: Any
    ) -> None:
        """Run ``kernel`` over all tiles of all heads; ``args`` come before the settings."""
        filled = max(_gpu.power_of_2(self.width), 16)  # a product of tensor cores is 16 deep
        tile = tiles.tile(like.device, filled, like.element_size(), sums, own)
        table = tiles.table(
            self.documents.lengths, tile.owned, not by_key, self.prefix > 0, like.device
        )
        grid = (table.shape[0], self.key_heads if by_key else self.heads)
        on_device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
        with on_device:
            kernel[grid](
                *(table if arg is _TABLE else arg for arg in args),
                self.factor,
                self.cap,
                self.window,
                self.prefix,
                GROUPS=self.heads // self.key_heads,
                WIDTH=self.width,
                FILLED=filled,
                R=tile.owned,
                S=tile.read,
                WINDOWED=self.windowed,
                CAPPED=self.capped,
                SHARED=self.prefix > 0,
                # As torch's own float32 products; TF32 would lose 13 of 24 bits.
                PRECISION="ieee",
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


_TABLE = object()  # stands for the table among the arguments of a launch


def _setting(
    query: torch.Tensor,
    key: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> _Setting:
    log2_e = math.log2(math.e)
    return _Setting(
        documents=documents,
        scale=scale,
        factor=scale * log2_e if softcap is None else scale / softcap,
        cap=1.0 if softcap is None else softcap * log2_e,
        window=window or 0,
        prefix=documents.lengths[0] if documents.shared else 0,
        heads=query.shape[1],
        key_heads=key.shape[1],
        width=query.shape[2],
        windowed=window is not None
        and not documents.shared  # checked: no document reaches the window then
        and window < max(documents.lengths, default=0),
        capped=softcap is not None,
    )


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: Documents,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        q, k, v = _dense(query), _dense(key), _dense(value)
        setting = _setting(q, k, documents, scale, window, softcap)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        if out.numel():
            strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], out.stride(0))
            setting.launch(
                _forward, q, False, 1, 1, q, k, v, out, lse, _TABLE, q.shape[0], *strides
            )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.setting = setting
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        do, setting = grads[0].contiguous(), ctx.setting
        dq, delta = torch.empty_like(out), torch.empty_like(lse)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty_like(dk)
        if out.numel():
            strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], out.stride(0))
            # First, because it also writes the delta that the second kernel reads.
            setting.launch(
                _backward_queries, q, False, 1, 2,
                q, k, v, out, do, lse, delta, dq, _TABLE, q.shape[0], *strides, setting.scale,
            )  # fmt: skip
            if any(ctx.needs_input_grad[1:3]):
                setting.launch(
                    _backward_keys, q, True, 2, 2,
                    q, k, v, do, lse, delta, dk, dv, _TABLE, q.shape[0], *strides, dk.stride(0),
                    setting.scale,
                )  # fmt: skip
        wanted = ctx.needs_input_grad
        return (
            *(g if w else None for g, w in zip((dq, dk, dv), wanted, strict=False)),
            *[None] * 4,
        )
