"""Where a transformer layer's attention and MLP end, by how its modules are called.

What: expressions for whole module paths that bottleneck adapters and IA3 use as ``target_modules``
when none are given. How: one row per layout of names; the row whose MLP ends are found in the model
is its layout, whatever the model is called. Constraint: what a row finds is written into the saved
adapter, so that a changed row never changes an adapter. Trade-off: a layout that is not listed
needs ``target_modules``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from finegraft.core.errors import AdapterError


@dataclass(frozen=True)
class Sites:
    """Names below one layer, as expressions.

    Attributes:
        attention: Linear layer that ends the attention.
        mlp: Linear layer that ends the MLP.
        attention_block: What is given the attention's input and adds to the residual.
        mlp_block: The same of the MLP.
        keys_values: Linear layers of keys and values (with the query where they are one).
    """

    attention: str
    mlp: str
    attention_block: str
    mlp_block: str
    keys_values: str


_LAYOUTS = (
    # Llama, Mistral, Qwen, Gemma; Phi-3
    Sites(
        r"self_attn\.o_proj",
        r"mlp\.down_proj",
        "self_attn",
        "mlp",
        r"self_attn\.(k_proj|v_proj|qkv_proj)",
    ),
    # BERT, RoBERTa: the module that takes the half's input back in is called output
    Sites(
        r"attention\.output\.dense",
        r"output\.dense",
        r"attention\.output",
        "output",
        r"attention\.self\.(key|value)",
    ),
    # DistilBERT
    Sites(r"attention\.out_lin", r"ffn\.lin2", "attention", "ffn", r"attention\.(k_lin|v_lin)"),
    # GPT-2
    Sites(r"attn\.c_proj", r"mlp\.c_proj", "attn", "mlp", r"attn\.c_attn"),
    # Phi
    Sites(r"self_attn\.dense", r"mlp\.fc2", "self_attn", "mlp", r"self_attn\.(k_proj|v_proj)"),
    # GPT-NeoX
    Sites(
        r"attention\.dense",
        r"mlp\.dense_4h_to_h",
        "attention",
        "mlp",
        r"attention\.query_key_value",
    ),
)


def below_layers(*names: str) -> str:
    """An expression for the paths of modules called ``names`` inside numbered layers."""
    return rf"(?:.*\.)?\d+\.(?:{'|'.join(names)})"


def match(model: nn.Module) -> Sites | None:
    """Return the layout of ``model``, None when its names are in no row."""
    paths = [
        name.replace(".base_layer", "")
        for name, module in model.named_modules()
        if hasattr(module, "weight") or hasattr(module, "base_layer")
    ]
    for sites in _LAYOUTS:
        ends = re.compile(below_layers(sites.mlp)), re.compile(below_layers(sites.attention))
        if all(any(end.fullmatch(path) for path in paths) for end in ends):
            return sites
    return None


def find(model: nn.Module, method: str) -> Sites:
    """Return the layout of ``model``.

    Raises:
        AdapterError: FG-ADAPT-025, its names are in no row.
    """
    found = match(model)
    if found is not None:
        return found
    core = getattr(model, "config", None)
    raise AdapterError(
        "FG-ADAPT-025",
        f"method '{method}' does not know where attention and MLP of a {type(model).__name__} "
        f"end (model_type '{getattr(core, 'model_type', 'unknown')}')",
        allowed="layers named as in Llama, Phi, BERT, DistilBERT, GPT-2 or GPT-NeoX",
        fix="name the output layers yourself, target_modules=['o_proj', 'down_proj'] for instance",
    )
