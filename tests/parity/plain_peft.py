"""Opens adapters with transformers and peft, as somebody without finegraft does.

Reads one JSON object a line: base, adapter, labels (0: causal), four_bit, ids, out. Writes the
logits to ``out`` and ``ANSWER ok``, or what went wrong. With ``--plugin`` the plug-in is imported.
"""

from __future__ import annotations

import json
import sys

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)


def opened(asked):
    how = {"dtype": torch.float32}
    if asked["four_bit"]:
        skipped = ["classifier", "score", "pre_classifier", r".*pooler", "lm_head"]
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
        how["device_map"] = "cpu"
    if asked["labels"]:
        kind, how["num_labels"] = AutoModelForSequenceClassification, asked["labels"]
    else:
        kind = AutoModelForCausalLM
    if not asked["adapter_config"]:
        return kind.from_pretrained(asked["adapter"], **how).eval()
    base = kind.from_pretrained(asked["base"], **how).eval()
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # it would answer in bfloat16
            module.support_avx512bf16_for_cpu = False
    return peft.PeftModel.from_pretrained(base, asked["adapter"]).eval()


def answer(asked):
    from pathlib import Path

    asked["adapter_config"] = (Path(asked["adapter"]) / "adapter_config.json").is_file()
    ids = torch.tensor(asked["ids"])
    with torch.no_grad():
        logits = opened(asked)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits = logits if asked["labels"] else logits[:, -ids.shape[1] :].flatten(0, 1)
    torch.save(logits, asked["out"])
    if "--plugin" not in sys.argv and any(name.startswith("finegraft") for name in sys.modules):
        return "finegraft was imported"
    return "ok"


if "--plugin" in sys.argv:
    import finegraft.peft_plugin  # noqa: F401

for line in sys.stdin:
    try:
        said = answer(json.loads(line))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
    print(f"ANSWER {said}", flush=True)
