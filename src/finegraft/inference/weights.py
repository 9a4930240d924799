"""A model's weights as decoding wants them: adapters merged, q/k/v and gate/up stacked.

What: ``unfit`` says why a model cannot be decoded here, ``merge`` copies its weights into one
buffer, ``fingerprint`` tells whether they have changed since. How: the model is only read; a LoRA
is added to a copy in float32 and rounded once, so the parameters that train on are never touched.
Constraint: every module must be of the class that the family is known by, without hooks and without
an instance forward; anything else is refused with a reason. Trade-off: the copy takes as much
memory as the layers do (the embedding and a plain head are shared), and in return nothing has to be
subtracted again, which would not give the same bits.

Shapes: d hidden, h query heads, k key heads, f features of a head, n intermediate, v vocabulary; a
size with an underscore is padded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finegraft.kernels.rotary import one_half
from finegraft.models import swap
from finegraft.models.families._decoder import sliding_window

LANES = 16  # padding of every matrix and vector, in elements
_HUGE_PAGE = 2 << 20  # bytes
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ALLOWED = {
    "layer": _LAYER_PARTS | {"resid_attn_dropout", "resid_mlp_dropout"},
    "attention": {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"},
}
_MOVING_ANGLES = ("dynamic", "longrope")  # their frequencies depend on the length reached


def padded(size: int) -> int:
    """The next multiple of ``LANES``."""
    return -(-size // LANES) * LANES


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, in elements."""

    d: int
    h: int
    k: int
    f: int
    n: int
    v: int
    eps: float
    scale: float

    @property
    def qkv(self) -> int:
        """Rows of the stacked projection."""
        return (self.h + 2 * self.k) * self.f


@dataclass(frozen=True)
class Layer:
    """One layer; matrices are padded views of the buffer, vectors float32 and padded.

    Attributes:
        gate_up: [2 n_, d_]; the rows of up begin at n_.
        window: Columns that a token sees, itself included; 0: all.
    """

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor]
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    biases: tuple[torch.Tensor | None, ...]  # of qkv, out, gate_up, down
    window: int


@dataclass(frozen=True)
class Weights:
    """All of a decoder, ready to run."""

    shape: Shape
    layers: tuple[Layer, ...]
    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor
    head_bias: torch.Tensor | None
    rotary: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices and of the caches."""
        return self.embedding.dtype

    @torch.no_grad()
    def angles(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin [positions, r], float32."""
        like = torch.zeros(1)
        cos, sin = self.rotary(like, torch.arange(positions)[None])
        return one_half(cos), one_half(sin)


def unfit(core: Any) -> str | None:
    """Return why this causal model is decoded by transformers, or None."""
    from finegraft.models.families import FAMILIES

    if not hasattr(core, "config") or not hasattr(core, "get_output_embeddings"):
        return "not a transformers causal language model"
    kind = core.config.get_text_config().model_type
    if kind not in FAMILIES.names():
        return f"no family file for model_type '{kind}'"
    return FAMILIES.get(kind).refuses(core.config) or _structure(core, kind) or _hooked(core)


def _structure(core: Any, kind: str) -> str | None:
    name = swap.stock_class(core).__name__
    prefix = name.removesuffix("ForCausalLM")
    if prefix == name or not hasattr(core, "model"):
        return f"{name} is not a causal language model with one decoder"
    decoder = core.model
    modules = [(core, "ForCausalLM"), (decoder, "Model"), (decoder.rotary_emb, "RotaryEmbedding")]
    modules.append((decoder.norm, "RMSNorm"))
    for layer in decoder.layers:
        parts = {
            "layer": {n for n, _ in layer.named_children()},
            "attention": {n for n, _ in layer.self_attn.named_children()},
            "mlp": {n for n, _ in layer.mlp.named_children()},
        }
        if _LAYER_PARTS - parts["layer"]:
            return f"a layer of {sorted(parts['layer'])}"
        for part, names in parts.items():
            if names - _ALLOWED[part]:
                return f"its {part} has {', '.join(sorted(names - _ALLOWED[part]))}"
        modules += [(layer, "DecoderLayer"), (layer.self_attn, "Attention"), (layer.mlp, "MLP")]
        modules += [(layer.input_layernorm, "RMSNorm"), (layer.post_attention_layernorm, "RMSNorm")]
    for module, suffix in modules:
        found = swap.stock_class(module)
        where = f"transformers.models.{kind}."
        if found.__name__ != prefix + suffix or not found.__module__.startswith(where):
            return f"{found.__name__} stands where {prefix}{suffix} is known"
    if getattr(decoder.rotary_emb, "rope_type", "default") in _MOVING_ANGLES:
        return f"rotary angles of type {decoder.rotary_emb.rope_type} change with the length"
    return _matrices(core)


def _matrices(core: Any) -> str | None:
    """Why some matrix cannot be copied out, or None."""
    embedding = _chosen(core.get_input_embeddings())
    if type(embedding) is not nn.Embedding:
        return f"the embedding is a {type(embedding).__name__}"
    if embedding.weight.dtype not in (torch.bfloat16, torch.float32):
        return f"weights in {embedding.weight.dtype}"
    linears = [core.get_output_embeddings()]
    for layer in core.model.layers:
        linears += [m for m in _projections(layer) if m is not None]
    for module in map(_chosen, linears):
        reason = _adapted(module)
        base = module if reason is None and type(module) is nn.Linear else _base(module)
        if reason is None and type(base) is not nn.Linear:
            reason = f"a linear layer is a {type(base).__name__}"
        if reason is None and base.weight.dtype != embedding.weight.dtype:
            reason = "weights of several dtypes"
        if reason is None and base.weight.device.type != "cpu":
            reason = f"weights on {base.weight.device.type}"
        if reason is not None:
            return reason
    return None


def _base(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _is_lora(module: nn.Module) -> bool:
    from finegraft.adapters.lora import FastLoraLinear

    return isinstance(module, FastLoraLinear.stock_class)


def _adapted(module: Any) -> str | None:
    """Why the adapters on a linear layer cannot be merged into a copy, or None."""
    if type(module) is nn.Linear:
        return None
    if not _is_lora(module):
        return f"a linear layer is a {type(module).__name__}"
    for name in () if module.disable_adapters else module.active_adapters:
        if name in module.lora_variant:
            return "a LoRA variant"
        if module.lora_bias.get(name):
            return "a LoRA with bias"
    return None


def _chosen(module: Any) -> Any:
    """The module that runs where peft trains a copy of it (``modules_to_save``) or rows of it."""
    if hasattr(module, "token_adapter"):
        return module.token_adapter.base_layer
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in module.active_adapters if name in copies]
    return copies[active[0]] if active and not module.disable_adapters else module.original_module


def _table(module: Any) -> torch.Tensor:
    """The weight of an embedding or head, with the rows in it that peft trains beside it."""
    adapter = getattr(module, "token_adapter", None)
    if adapter is None or adapter.disable_adapters or adapter.merged:
        return _chosen(module).weight.detach()
    return adapter.get_merged_weights(adapter.active_adapters).detach()


def _projections(layer: Any) -> tuple[Any, ...]:
    """q, k, v (or qkv, None, None), o, gate, up (or gate_up, None), down."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        inputs = (attention.qkv_proj, None, None)
    else:
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    if hasattr(mlp, "gate_up_proj"):
        gates = (mlp.gate_up_proj, None)
    else:
        gates = (mlp.gate_proj, mlp.up_proj)
    return (*inputs, attention.o_proj, *gates, mlp.down_proj)


def _hooked(core: nn.Module) -> str | None:
    """Hooks and replaced forwards would be passed over, so they are a reason against."""
    for name, module in core.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' and peft's hook for checkpointing, which does nothing without gradients
        names = {getattr(hook, "__name__", "") for hook in hooks}
        if names - {"make_inputs_require_grads", "make_inputs_require_grad"}:
            return f"a hook on {name or 'the model'}"
        if "forward" in vars(module):
            return f"the forward of {name or 'the model'} was replaced"
    return None


def fingerprint(core: nn.Module) -> tuple[Any, ...]:
    """A value that changes when what ``merge`` would give has changed.

    Frozen parameters are known by address and version counter. Those that train are also summed
    up, because torch's fused optimizers write without moving the counter.
    """
    state: list[Any] = []
    written: list[torch.Tensor] = []
    for module in core.modules():
        if hasattr(module, "active_adapters") and hasattr(module, "base_layer"):
            merged = tuple(getattr(module, "merged_adapters", ()))
            scaling = tuple(sorted(getattr(module, "scaling", {}).items()))
            state.append((tuple(module.active_adapters), module.disable_adapters, merged, scaling))
        elif hasattr(module, "modules_to_save"):
            state.append((tuple(module.active_adapters), module.disable_adapters))
    for name, tensor in [*core.named_parameters(), *core.named_buffers()]:
        version = 0 if tensor.is_inference() else tensor._version
        state.append((tensor.data_ptr(), version, tensor.dtype))
        if tensor.requires_grad or "lora_" in name:
            written.append(tensor.detach())
    sums = torch.stack(torch._foreach_norm(written)) if written else torch.empty(0)
    return (tuple(state), sums.float().numpy().tobytes())


@torch.no_grad()
def _effective(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear layer with its active adapters in it."""
    if hasattr(module, "token_adapter"):
        bias = _chosen(module).bias
        return _table(module), None if bias is None else bias.detach()
    module = _chosen(module)
    base = _base(module)
    weight, bias = base.weight.detach(), base.bias
    if base is not module and not module.disable_adapters:
        wanted = [n for n in module.active_adapters if n in module.lora_A]
        added = [n for n in wanted if n not in module.merged_adapters]
        if added:
            total = weight.float()
            for name in added:
                total = total + module.get_delta_weight(name).float()
            weight = total.to(weight.dtype)
    return weight, None if bias is None else bias.detach()


class _Buffer:
    """Zeroed memory, on huge pages where the system has them, given out piece by piece.

    Reading 270 MB a token takes 8.7 ms on huge pages and 10.3 ms on small ones.
    """

    def __init__(self, elements: int, dtype: torch.dtype):
        bytes_ = elements * dtype.itemsize
        memory = mmap.mmap(-1, -(-bytes_ // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE)
        if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        skip = -whole.data_ptr() % _HUGE_PAGE
        self.free = whole[skip : skip + bytes_].view(dtype)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        size = rows * columns
        taken, self.free = self.free[:size], self.free[size:]
        return taken.view(rows, columns)


def _vector(parts: Iterator[tuple[int, torch.Tensor | None]], size: int) -> torch.Tensor | None:
    """float32 [size] with each part at its place; None when every part is."""
    found = [(place, part) for place, part in parts if part is not None]
    if not found:
        return None
    out = torch.zeros(padded(size))
    for place, part in found:
        out[place : place + part.numel()] = part.float()
    return out


def shape_of(core: Any) -> Shape:
    """Sizes read from the modules themselves."""
    config, attention = core.config, core.model.layers[0].self_attn
    layer = core.model.layers[0]
    embedding = _chosen(core.get_input_embeddings()).weight
    return Shape(
        d=embedding.shape[1],
        h=config.num_attention_heads,
        k=config.num_key_value_heads,
        f=attention.head_dim,
        n=config.intermediate_size,
        v=_base(_chosen(core.get_output_embeddings())).weight.shape[0],
        eps=layer.input_layernorm.variance_epsilon,
        scale=attention.scaling,
    )


def elements(core: Any, shape: Shape) -> int:
    """Size of the copy that ``merge`` makes."""
    d_, n_ = padded(shape.d), padded(shape.n)
    layer = padded(shape.qkv) * d_ + d_ * padded(shape.h * shape.f) + 3 * n_ * d_
    head = 0 if _shared_head(core, shape) else padded(shape.v) * d_
    return int(len(core.model.layers) * layer + head)


def _shared_head(core: Any, shape: Shape) -> bool:
    """A plain head whose size needs no padding is read where it is."""
    head = core.get_output_embeddings()
    if hasattr(head, "token_adapter"):
        return False
    head = _chosen(head)
    fits = shape.v % LANES == 0 and shape.d % LANES == 0
    return type(head) is nn.Linear and fits and head.weight.is_contiguous()


@torch.no_grad()
def merge(core: Any) -> Weights:
    """Copy the weights of a fit model; see ``unfit``."""
    shape = shape_of(core)
    embedding = _table(core.get_input_embeddings()).contiguous()
    buffer = _Buffer(elements(core, shape), embedding.dtype)
    layers = tuple(_merge_layer(layer, shape, buffer) for layer in core.model.layers)
    head, bias = _effective(core.get_output_embeddings())
    if not _shared_head(core, shape):
        copy = buffer.matrix(padded(shape.v), padded(shape.d))
        copy[: shape.v, : shape.d] = head
        head = copy
    return Weights(
        shape=shape,
        layers=layers,
        embedding=embedding,
        norm=_vector(iter([(0, core.model.norm.weight)]), shape.d),
        head=head,
        head_bias=_vector(iter([(0, bias)]), shape.v),
        rotary=core.model.rotary_emb,
    )


def _merge_layer(layer: Any, shape: Shape, buffer: _Buffer) -> Layer:
    q, k, v, o, gate, up, down = _projections(layer)
    d_, n_ = padded(shape.d), padded(shape.n)
    stacks = {
        "qkv": (buffer.matrix(padded(shape.qkv), d_), _places(shape, q, k, v)),
        "out": (buffer.matrix(d_, padded(shape.h * shape.f)), [(0, *_effective(o))]),
        "gate_up": (buffer.matrix(2 * n_, d_), _gates(shape, gate, up)),
        "down": (buffer.matrix(d_, n_), [(0, *_effective(down))]),
    }
    for matrix, parts in stacks.values():
        for place, weight, _ in parts:
            matrix[place : place + weight.shape[0], : weight.shape[1]] = weight
    attention = layer.self_attn
    head_norms = None
    if hasattr(attention, "q_norm"):
        pair = (attention.q_norm.weight, attention.k_norm.weight)
        head_norms = tuple(_vector(iter([(0, w)]), shape.f) for w in pair)
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return Layer(
        **{name: matrix for name, (matrix, _) in stacks.items()},
        norms=tuple(_vector(iter([(0, w)]), shape.d) for w in norms),
        head_norms=head_norms,
        biases=tuple(
            _vector(((place, bias) for place, _, bias in parts), matrix.shape[0])
            for matrix, parts in stacks.values()
        ),
        window=sliding_window(attention) or 0,
    )


def _places(shape: Shape, q: Any, k: Any, v: Any) -> list[tuple[int, Any, Any]]:
    """Row, weight and bias of each part of qkv."""
    if k is None:
        return [(0, *_effective(q))]
    first, second = shape.h * shape.f, (shape.h + shape.k) * shape.f
    return [(0, *_effective(q)), (first, *_effective(k)), (second, *_effective(v))]


def _gates(shape: Shape, gate: Any, up: Any) -> list[tuple[int, Any, Any]]:
    """Row, weight and bias of gate and up; up begins at the padded row."""
    n_ = padded(shape.n)
    if up is not None:
        return [(0, *_effective(gate)), (n_, *_effective(up))]
    weight, bias = _effective(gate)
    biases = (None, None) if bias is None else bias.split(shape.n)
    return [
        (place, w, b) for place, w, b in zip((0, n_), weight.split(shape.n), biases, strict=True)
    ]
