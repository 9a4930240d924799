"""One contender of cpu_decode in a process of its own, generating only when told to.

What: loads the model with its adapter, then runs one task per line on stdin. Constraint: while it
waits it uses no processor time. Protocol: a JSON line on stdout per event; ``one``, ``eight`` and
``rewrite`` on stdin name the task, an empty line ends it.
"""

from __future__ import annotations

import argparse
import json
import time

import _worker


def inputs(job: dict, task: str) -> dict:
    """Ids and mask, padded on the left, the same for everybody."""
    import torch

    rows = job["prompts"][task]
    width = max(map(len, rows))
    ids = [[job["pad"]] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generator(job: dict, model, lookup: int | None = None):
    """Greedy answers of a fixed length, so that everybody does the same work.

    Lookup is for a single stream; eight are answered without it.
    """
    import torch

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    core.generation_config.eos_token_id = None
    core.generation_config.pad_token_id = job["pad"]

    def run(task: str) -> list[list[int]]:
        ask = inputs(job, task)
        new = job["tokens"][task]
        more = {"prompt_lookup_num_tokens": lookup} if len(ask["input_ids"]) == 1 else {}
        with torch.no_grad():
            out = model.generate(**ask, max_new_tokens=new, do_sample=False, **more)
        return out[:, ask["input_ids"].shape[1] :].tolist()

    return run


def stock(job: dict, merged: bool):
    """Peft's own ``generate``."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    model = PeftModel.from_pretrained(model, job["adapter"])
    return generator(job, (model.merge_and_unload() if merged else model).eval())


def finegraft(job: dict, lookup: int | None = None):
    """The call that a user's script makes."""
    from finegraft import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(job["adapter"], dtype=job["dtype"])
    return generator(job, FastLanguageModel.for_inference(model), lookup)


def linears(job: dict):
    """The model's products alone, one after another, as torch computes them."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]

    def run(task: str) -> list[list[int]]:
        rows = len(job["prompts"][task])
        x = {w.shape[1]: torch.randn(rows, w.shape[1]).to(w.dtype) for w in weights}
        with torch.inference_mode():
            for _ in range(job["tokens"][task]):
                for w in weights:
                    F.linear(x[w.shape[1]], w)
        return []

    return run


def reading(job: dict):
    """The bytes of the model's products, read once a token: what memory allows."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    size = sum(m.weight.numel() * m.weight.element_size() for m in layers)
    memory = torch.ones(size // 4, dtype=torch.float32)

    def run(task: str) -> list[list[int]]:
        for _ in range(job["tokens"][task]):
            memory.sum()
        return []

    return run


CONTENDERS = {
    "peft-unmerged": lambda job: stock(job, merged=False),
    "peft-merged": lambda job: stock(job, merged=True),
    "finegraft": finegraft,
    "finegraft-lookup": lambda job: finegraft(job, job["lookup"]),
    "linears": linears,
    "reading": reading,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("job")
    chosen = parser.parse_args()
    with open(chosen.job, encoding="utf-8") as file:
        job = json.load(file)
    import torch

    torch.set_num_threads(job["threads"])
    run = CONTENDERS[chosen.contender](job)
    _worker.say(event="ready")
    while task := _worker.wait():
        started = time.perf_counter()
        out = run(task)
        seconds = time.perf_counter() - started
        _worker.say(event="task", seconds=seconds, memory=_worker.memory_bytes(), out=out)


if __name__ == "__main__":
    # Libraries print to stdout as they like; the protocol has a descriptor of its own.
    import os

    _worker.OUT = os.dup(1)
    os.dup2(2, 1)
    main()
