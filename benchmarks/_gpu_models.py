"""Models with random weights, made on the device, and rows for them: what a contender trains.

What: a transformers model of a given shape, in 16 bits or with its linear layers in NF4, the same
weights for the same seed; a tokenizer of a few words, because trainers ask for one; packed rows of
a sequence that can be learnt. Constraint: nothing is fetched, and nothing passes through the host's
memory. Trade-off: the 16-bit model exists whole before it is quantised, 16 GB for 8B weights.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

import _gpu

# Token ids of the rows: enough for a loss that falls, few enough that it falls within 20 steps.
_STATES = 61
_FIRST_ID = 3


def build(shape: _gpu.Shape, nf4: bool, device: torch.device, seed: int = _gpu.SEED) -> Any:
    """A causal model in bfloat16 on ``device``, frozen; its linear layers in NF4 if asked."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(
            shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.requires_grad_(False)
    if nf4:
        quantize(model)
    return model


def quantize(model: Any) -> None:
    """Put every linear layer but the head into NF4 with double quantisation, one after another."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        if module.bias is not None:
            raise SystemExit(f"{name} has a bias, which no model of this benchmark has")
        weight = module.weight.data
        new = Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
        new.to(weight.device)  # which quantises
        # On CPUs with AVX512-BF16 an evaluation would repack the weights.
        new.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
        module.weight = None
    model.is_loaded_in_4bit = True  # peft and trl ask for it


def tokenizer() -> Any:
    """A tokenizer of the special tokens alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def rows(count: int, tokens: int, seed: int = _gpu.SEED) -> dict[str, list]:
    """Packed rows of exactly ``tokens`` tokens: ids, labels and the lengths of their documents.

    A document starts anywhere and goes on by a fixed rule, so the next token can be learnt.
    """
    generator = random.Random(seed)
    ids, lengths = [], []
    for row in range(count):
        packed: list[int] = []
        documents = _gpu.document_lengths(tokens, seed + row)
        for length in documents:
            state = generator.randrange(_STATES)
            for _ in range(length):
                packed.append(_FIRST_ID + state)
                state = (state * 5 + 7) % _STATES
        ids.append(packed)
        lengths.append(documents)
    return {"input_ids": ids, "labels": [list(row) for row in ids], "seq_lengths": lengths}
