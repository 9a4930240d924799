"""One decoding step of a Llama-shaped model as a single compiled loop; imported on first use.

What: embedding, every layer and the head for m tokens, in one parallel region: between the product
of one token and the next there is no Python and no torch call. How: each thread owns rows of every
weight matrix and keeps its own copy of the residual stream, which it normalises itself, so that a
layer needs six barriers; the products are written as vector instructions here because they decide
the speed. Constraint: matrices are padded to 4 rows and 16 columns, vectors to 16 with zeros;
weights and caches are bfloat16 or float32, everything else is float32; a sum's order depends
neither on m nor on the number of threads, so a token checked among others gets the bits that it
gets alone. Trade-off: weights are read at the speed of memory up to about 16 tokens; beyond that a
matrix unit wins.

Measured on SmolLM2-135M, bfloat16, two cores: products alone 10.3 ms a token, 15 ms without the
prefetch, 16 to 24 ms through torch; 14 ms for eight tokens.

Shapes: m tokens, d hidden, h query heads, k key heads, f features of a head, r half of the rotated
features, n intermediate, v vocabulary; an ``x_`` stride is the padded size of ``x``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

from finegraft.kernels._compile import (
    exp,
    halves,
    integers,
    narrow,
    real,
    share,
    singles,
    thread,
    wide,
)

LANES, BLOCK = 16, 4  # floats of a vector, rows that are multiplied together
ARGUMENTS, PER_LAYER = 36, 15  # addresses and sizes, in the order of ``session``

_barrier = types.ExternalFunction("GOMP_barrier", types.void())
_compiled = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)  # 3 s less to compile
_single, _long, _int = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_vector = ir.VectorType(_single, LANES)


class _Products:
    """Writes the instructions of ``dots``: rows x tokens sums, kept in registers."""

    def __init__(self, builder: Any, rows: int, tokens: int, half: bool):
        self.b, self.rows, self.tokens, self.half = builder, rows, tokens, half

    def function(self, name: str, kind: Any) -> Any:
        module = self.b.module
        return module.globals.get(name) or ir.Function(module, kind, name)

    def fma(self) -> Any:
        return self.function("llvm.fma.v16f32", ir.FunctionType(_vector, [_vector] * 3))

    def at(self, base: Any, index: Any, size: int, kind: Any) -> Any:
        offset = self.b.mul(index, ir.Constant(_long, size))
        return self.b.inttoptr(self.b.add(base, offset), kind.as_pointer())

    def starts(self, base: Any, stride: Any, count: int, size: int) -> list[Any]:
        steps = (self.b.mul(stride, ir.Constant(_long, i * size)) for i in range(count))
        return [self.b.add(base, step) for step in steps]

    def weight(self, row: Any, j: Any, ahead: Any) -> Any:
        """Sixteen weights as float32; asks for the same columns of the block after this one."""
        b, size = self.b, 2 if self.half else 4
        byte = ir.IntType(8).as_pointer()
        fetch = ir.FunctionType(ir.VoidType(), [byte, _int, _int, _int])
        where = self.at(row, b.add(j, ahead), size, ir.IntType(8))
        options = [ir.Constant(_int, value) for value in (0, 2, 1)]  # read, second cache, data
        b.call(self.function("llvm.prefetch.p0i8", fetch), [where, *options])
        return self.load(row, j)

    def load(self, base: Any, j: Any) -> Any:
        """Sixteen stored numbers as float32."""
        b = self.b
        if not self.half:
            return b.load(self.at(base, j, 4, _vector), align=4)
        short = ir.VectorType(ir.IntType(16), LANES)
        long = ir.VectorType(_int, LANES)
        bits = b.zext(b.load(self.at(base, j, 2, short), align=2), long)
        return b.bitcast(b.shl(bits, ir.Constant(long, [16] * LANES)), _vector)

    def multiply(self, w: Any, w_: Any, x: Any, x_: Any, n: Any, out: Any, out_: Any) -> None:
        """out[t, r] = w[r] . x[t]."""
        b, pairs = self.b, [(r, t) for r in range(self.rows) for t in range(self.tokens)]
        fma = self.fma()
        fold = ir.FunctionType(_single, [_single, _vector])
        fold = self.function("llvm.vector.reduce.fadd.v16f32", fold)
        rows = self.starts(w, w_, self.rows, 2 if self.half else 4)
        tokens = self.starts(x, x_, self.tokens, 4)
        ahead = b.mul(w_, ir.Constant(_long, BLOCK))
        before = b.block
        loop, done = b.append_basic_block("columns"), b.append_basic_block("sums")
        b.branch(loop)
        b.position_at_end(loop)
        j = b.phi(_long)
        j.add_incoming(ir.Constant(_long, 0), before)
        sums = {pair: b.phi(_vector) for pair in pairs}
        weights = [self.weight(row, j, ahead) for row in rows]
        inputs = [b.load(self.at(t, j, 4, _vector), align=4) for t in tokens]
        new = {(r, t): b.call(fma, [weights[r], inputs[t], sums[r, t]]) for r, t in pairs}
        following = b.add(j, ir.Constant(_long, LANES))
        j.add_incoming(following, loop)
        for pair in pairs:
            sums[pair].add_incoming(ir.Constant(_vector, [0.0] * LANES), before)
            sums[pair].add_incoming(new[pair], loop)
        b.cbranch(b.icmp_signed("<", following, n), loop, done)
        b.position_at_end(done)
        for r, t in pairs:
            start = ir.Constant(_single, 0.0)
            total = b.call(fold, [start, new[r, t]], fastmath=("reassoc",))
            index = b.add(b.mul(out_, ir.Constant(_long, t)), ir.Constant(_long, r))
            b.store(total, self.at(out, index, 4, _single), align=4)

    def combine(self, parts: Any, v: Any, v_: Any, count: Any, out: Any) -> None:
        """out[:16 rows] = sum over ``count`` of parts[c] * v[c, :16 rows]."""
        b, before = self.b, self.b.block
        loop, done = b.append_basic_block("column"), b.append_basic_block("store")
        b.branch(loop)
        b.position_at_end(loop)
        c = b.phi(_long)
        c.add_incoming(ir.Constant(_long, 0), before)
        sums = [b.phi(_vector) for _ in range(self.rows)]
        part = b.load(self.at(parts, c, 4, _single), align=4)
        empty = ir.Constant(_vector, ir.Undefined)
        first = b.insert_element(empty, part, ir.Constant(_int, 0))
        mask = ir.Constant(ir.VectorType(_int, LANES), [0] * LANES)
        part = b.shuffle_vector(first, empty, mask)
        place, after = b.mul(c, v_), b.add(c, ir.Constant(_long, 1))
        for i, total in enumerate(sums):
            value = self.load(v, b.add(place, ir.Constant(_long, i * LANES)))
            new = b.call(self.fma(), [part, value, total])
            total.add_incoming(ir.Constant(_vector, [0.0] * LANES), before)
            total.add_incoming(new, loop)
            sums[i] = new
        c.add_incoming(after, loop)
        b.cbranch(b.icmp_signed("<", after, count), loop, done)
        b.position_at_end(done)
        for i, total in enumerate(sums):
            b.store(total, self.at(out, ir.Constant(_long, i * LANES), 4, _vector), align=4)


def _dots(rows: int, tokens: int) -> Any:
    """Make the function for a block of ``rows`` weight rows and ``tokens`` inputs."""

    @intrinsic
    def dots(typing: Any, kind: Any, w: Any, w_: Any, x: Any, x_: Any, n: Any, out: Any, out_: Any):
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            half = kind.dtype == types.uint16
            _Products(builder, rows, tokens, half).multiply(*values[1:])
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 7), generate

    return dots


_dots_1x1, _dots_4x1, _dots_4x2, _dots_4x4 = _dots(1, 1), _dots(4, 1), _dots(4, 2), _dots(4, 4)
_dots_2x8 = _dots(2, 8)  # 16 sums: four rows would need all 32 registers and spill


def _mix(vectors: int) -> Any:
    """Make the function for ``vectors`` vectors of features."""

    @intrinsic
    def mix(typing: Any, kind: Any, parts: Any, v: Any, v_: Any, count: Any, out: Any):
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            half = kind.dtype == types.uint16
            _Products(builder, vectors, 1, half).combine(*values[1:])
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 5), generate

    return mix


_mix_1, _mix_4 = _mix(1), _mix(4)


def _view(kind, address, size):
    """[size] elements of the weights' kind at an address."""


def _get(array, j):
    """An element as float32."""


def _fit(kind, value):
    """A float32 as an element of the kind."""


@overload(_view, inline="always")
def _(kind, address, size):
    if kind.dtype == types.uint16:
        return lambda kind, address, size: halves(address, size)
    return lambda kind, address, size: singles(address, size)


@overload(_get, inline="always")
def _(array, j):
    if array.dtype == types.uint16:
        return lambda array, j: wide(array[j])
    return lambda array, j: array[j]


@overload(_fit, inline="always")
def _(kind, value):
    if kind.dtype == types.uint16:
        return lambda kind, value: narrow(value)
    return lambda kind, value: value


@_compiled
def _product(kind, size, w, w_, first, end, x, x_, out, out_, bias, m):
    """out[t, row] = w[row] . x[t] + bias[row] for blocks ``first`` to ``end`` of rows."""
    for block in range(first, end):
        row = block * BLOCK
        base, to, t = w + size * w_ * row, out + 4 * row, 0
        while m - t >= 8:
            at, into = x + 4 * x_ * t, to + 4 * out_ * t
            _dots_2x8(kind, base, w_, at, x_, w_, into, out_)
            _dots_2x8(kind, base + 2 * size * w_, w_, at, x_, w_, into + 8, out_)
            t += 8
        if m - t >= 4:
            _dots_4x4(kind, base, w_, x + 4 * x_ * t, x_, w_, to + 4 * out_ * t, out_)
            t += 4
        if m - t >= 2:
            _dots_4x2(kind, base, w_, x + 4 * x_ * t, x_, w_, to + 4 * out_ * t, out_)
            t += 2
        if m - t >= 1:
            _dots_4x1(kind, base, w_, x + 4 * x_ * t, x_, w_, to + 4 * out_ * t, out_)
    if bias != 0:
        b = singles(bias, end * BLOCK)
        for t in range(m):
            y = singles(out + 4 * out_ * t, end * BLOCK)
            for row in range(first * BLOCK, end * BLOCK):
                y[row] += b[row]


@_compiled
def _norm(x, delta, weight, y, m, d, d_, eps):
    """x += delta (unless 0), y = rms_norm(x) * weight."""
    w = singles(weight, d)
    for t in range(m):
        a, b = singles(x + 4 * d_ * t, d), singles(y + 4 * d_ * t, d)
        if delta != 0:
            plus = singles(delta + 4 * d_ * t, d)
            for j in range(d):
                a[j] += plus[j]
        square = np.float32(0.0)
        for j in range(d):
            square += a[j] * a[j]
        scale = np.float32(1.0) / np.sqrt(square / np.float32(d) + eps)
        for j in range(d):
            b[j] = a[j] * scale * w[j]


@_compiled
def _turn(x, out, weight, f, cos, sin, r, eps):
    """A head's features, normalised where the family does that, rotated; all float32."""
    scale = np.float32(1.0)
    if weight != 0:
        square = np.float32(0.0)
        for j in range(f):
            square += x[j] * x[j]
        scale = np.float32(1.0) / np.sqrt(square / np.float32(f) + eps)
        w = singles(weight, f)
        for j in range(f):
            out[j] = x[j] * scale * w[j]
    else:
        for j in range(f):
            out[j] = x[j]
    for j in range(r):
        one, two = out[j], out[r + j]
        out[j] = one * cos[j] - two * sin[j]
        out[r + j] = two * cos[j] + one * sin[j]


@_compiled
def _attend(kind, size, q, keys, values, f_, columns, scale, scores, out):
    """out [f_] = softmax(q . keys * scale) . values over ``columns`` columns that lie densely."""
    s, column = singles(scores, columns), 0
    while columns - column >= BLOCK:
        into = scores + 4 * column
        _dots_4x1(kind, keys + size * f_ * column, f_, q, f_, f_, into, 0)
        column += BLOCK
    while column < columns:
        _dots_1x1(kind, keys + size * f_ * column, f_, q, f_, f_, scores + 4 * column, 0)
        column += 1
    top = s[0]
    for c in range(columns):
        top = max(top, s[c])
    total = np.float32(0.0)
    for c in range(columns):
        s[c] = exp((s[c] - top) * scale)
    for c in range(columns):
        total += s[c]
    for c in range(columns):
        s[c] /= total
    j = 0
    while f_ - j >= 4 * LANES:
        _mix_4(kind, scores, values + size * j, f_, columns, out + 4 * j)
        j += 4 * LANES
    while j < f_:
        _mix_1(kind, scores, values + size * j, f_, columns, out + 4 * j)
        j += LANES


@_compiled
def _remember(kind, size, layer, a, scratch, me, threads):
    """Normalise and rotate the new keys, and put keys and values into the caches."""
    m, h, k, f, f_, r = a[2], a[7], a[8], a[9], a[10], a[14]
    qkv, qkv_, capacity = a[23], a[24], a[18]
    rows, columns, starts = integers(a[15], m), integers(a[16], m), integers(a[17], m)
    turned = singles(scratch, f_)
    first, end = share(m * k, me, threads)
    for task in range(first, end):
        t, head = task // k, task % k
        angle = 4 * r * (columns[t] - starts[t])
        cos, sin = singles(a[12] + angle, r), singles(a[13] + angle, r)
        place = size * f_ * ((rows[t] * k + head) * capacity + columns[t])
        key, value = _view(kind, layer[10] + place, f), _view(kind, layer[11] + place, f)
        source = singles(qkv + 4 * (qkv_ * t + (h + head) * f), f)
        _turn(source, turned, layer[9], f, cos, sin, r, real(a[19]))
        given = singles(qkv + 4 * (qkv_ * t + (h + k + head) * f), f)
        for j in range(f):
            key[j] = _fit(kind, turned[j])
            value[j] = _fit(kind, given[j])


@_compiled
def _look_back(kind, size, layer, a, scratch, me, threads):
    """Attention of every new token and head over the columns that it may see."""
    m, h, k, f, f_, r = a[2], a[7], a[8], a[9], a[10], a[14]
    qkv, qkv_, capacity, window = a[23], a[24], a[18], layer[12]
    rows, columns, starts = integers(a[15], m), integers(a[16], m), integers(a[17], m)
    turned, mixed = singles(scratch, f_), singles(scratch + 4 * f_, f_)
    for j in range(f, f_):
        turned[j] = np.float32(0.0)
    first, end = share(m * h, me, threads)
    for task in range(first, end):
        t, head = task // h, task % h
        angle = 4 * r * (columns[t] - starts[t])
        cos, sin = singles(a[12] + angle, r), singles(a[13] + angle, r)
        source = singles(qkv + 4 * (qkv_ * t + head * f), f)
        _turn(source, turned, layer[8], f, cos, sin, r, real(a[19]))
        low = starts[t]
        if window > 0:
            low = max(low, columns[t] - window + 1)
        place = (rows[t] * k + head // (h // k)) * capacity + low
        place = size * f_ * place
        _attend(
            kind,
            size,
            scratch,
            layer[10] + place,
            layer[11] + place,
            f_,
            columns[t] - low + 1,
            real(a[20]),
            scratch + 8 * f_,
            scratch + 4 * f_,
        )
        out = singles(a[25] + 4 * (a[26] * t + head * f), f)
        for j in range(f):
            out[j] = mixed[j]


@_compiled
def _gate(gate, up, n_, m, first, end):
    """gate = silu(gate) * up on a thread's own rows."""
    for t in range(m):
        g, u = singles(gate + 4 * n_ * t, n_), singles(up + 4 * n_ * t, n_)
        for j in range(first * BLOCK, end * BLOCK):
            g[j] = g[j] / (np.float32(1.0) + exp(-g[j])) * u[j]


@_compiled
def _step(kind, size, pointer):
    """See ``finegraft.inference.session`` for the order of the arguments."""
    a = carray(pointer, (ARGUMENTS,))
    me, threads = thread()
    m, d, d_, n_, qkv_, o_ = a[2], a[5], a[6], a[11], a[24], a[26]
    delta, gate, up, eps = a[27], a[28], a[29], real(a[19])
    x = a[21] + 4 * a[22] * me
    y = x + 4 * m * d_
    scratch = y + 4 * m * d_
    ids = integers(a[3], m)
    for t in range(m):
        embedding, residual = _view(kind, a[4] + size * d * ids[t], d), singles(x + 4 * d_ * t, d)
        for j in range(d):
            residual[j] = _get(embedding, j)
        padded = singles(y + 4 * d_ * t, d_)
        for j in range(d, d_):
            padded[j] = np.float32(0.0)
    of_qkv, of_qkv_end = share(qkv_ // BLOCK, me, threads)
    of_d, of_d_end = share(d_ // BLOCK, me, threads)
    of_n, of_n_end = share(n_ // BLOCK, me, threads)
    waiting = np.int64(0)  # what the last layer adds to the residual stream
    for number in range(a[1]):
        w = integers(a[0] + 8 * PER_LAYER * number, PER_LAYER)
        _norm(x, waiting, w[6], y, m, d, d_, eps)
        _product(kind, size, w[0], d_, of_qkv, of_qkv_end, y, d_, a[23], qkv_, w[1], m)
        _barrier()
        _remember(kind, size, w, a, scratch, me, threads)
        _barrier()
        _look_back(kind, size, w, a, scratch, me, threads)
        _barrier()
        _product(kind, size, w[2], o_, of_d, of_d_end, a[25], o_, delta, d_, w[3], m)
        _barrier()
        _norm(x, delta, w[7], y, m, d, d_, eps)
        _product(kind, size, w[4], d_, of_n, of_n_end, y, d_, gate, n_, w[13], m)
        ups, bias = w[4] + size * d_ * n_, w[13] + 4 * n_ if w[13] != 0 else w[13]
        _product(kind, size, ups, d_, of_n, of_n_end, y, d_, up, n_, bias, m)
        _gate(gate, up, n_, m, of_n, of_n_end)
        _barrier()
        _product(kind, size, w[5], n_, of_d, of_d_end, gate, n_, delta, d_, w[14], m)
        _barrier()
        waiting = delta
    _norm(x, waiting, a[30], y, m, d, d_, eps)
    first, end = share(a[33] // BLOCK, me, threads)
    _product(kind, size, a[31], d_, first, end, y, d_, a[34], a[33], a[32], m)


def step_half(pointer):
    """A step on bfloat16 weights and caches."""
    _step(halves(np.int64(0), 1), 2, pointer)


def step_single(pointer):
    """A step on float32 weights and caches."""
    _step(singles(np.int64(0), 1), 4, pointer)
