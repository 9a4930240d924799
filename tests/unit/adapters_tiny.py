"""What every tuning method must do, as checks that its tests call on tiny random models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from finegraft import adapters, opening
from finegraft.models import families, swap
from finegraft.models.families import FAMILIES
from finegraft.models.load import load_model

IDS = torch.tensor([[5, 9, 33, 2, 77, 8], [7, 7, 12, 30, 4, 2], [4, 19, 3, 6, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
CLASSES = torch.tensor([0, 2, 1])


def tiny(family: str, seed: int = 0) -> Any:
    """A random model of a family: decoders are causal, encoders classify."""
    torch.manual_seed(seed)
    return FAMILIES.get(family).tiny().eval()


def task(model: nn.Module) -> str:
    return "SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM"


def attached(family: str, method: str, **settings: Any) -> Any:
    model = tiny(family)
    torch.manual_seed(3)
    return adapters.attach(model, method, task_type=task(model), **settings)


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits.detach()[:, :3]


def labels(model: nn.Module) -> torch.Tensor:
    """Classes of the rows, or their tokens where there is no padding."""
    causal = task(swap.core(model)) == "CAUSAL_LM"
    return IDS.masked_fill(MASK == 0, -100) if causal else CLASSES


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(model: nn.Module, seed: int = 1, by: float = 0.2) -> Any:
    """Give what trains some other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape, generator=generator) * by)
    return model


def starts_as_the_identity(family: str, method: str, **settings: Any) -> None:
    model = attached(family, method, **settings)
    assert torch.equal(logits(model), logits(tiny(family)))


def learns_and_leaves_the_base_alone(
    family: str, method: str, prefix: str, lr: float = 0.05, **settings: Any
) -> None:
    """Only parameters called ``prefix`` and the new head train, the loss falls, disable undoes."""
    base, model = tiny(family), attached(family, method, **settings)
    names = trainable(model)
    assert names and all(prefix in name or "modules_to_save" in name for name in names)
    if task(base) == "SEQ_CLS":
        assert any("modules_to_save" in name for name in names)
    optimizer = torch.optim.Adam(names.values(), lr=lr)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=labels(model)).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in names.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(logits(model), logits(base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def reloads_to_the_bit(family: str, method: str, folder: Path, **settings: Any) -> Any:
    """Save, open through peft and through ``opening``; return the model that was saved."""
    model = moved(attached(family, method, **settings))
    expected = logits(model)
    model.save_pretrained(folder)
    opening.write_note(model, folder)
    again = opening.attach_saved(tiny(family), folder, trainable=True)
    assert torch.equal(logits(again), expected)
    assert set(trainable(again)) == set(trainable(model))
    assert adapters.method_of(again) is adapters.find(method)[0]
    frozen = peft.PeftModel.from_pretrained(tiny(family), str(folder))
    assert torch.equal(logits(frozen), expected) and not trainable(frozen)
    return model


_PLAIN = """
import sys, torch, peft
sys.path.insert(0, {here!r})
import adapters_tiny as t
before = set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
assert {kind!r} not in before, "importing finegraft alone must not register"
import finegraft.peft_plugin
model = peft.PeftModel.from_pretrained(t.tiny({family!r}), {folder!r})
torch.save(t.logits(model), {folder!r} + "/logits.pt")
"""


def opens_in_plain_peft(family: str, method: str, kind: str, folder: Path, **settings: Any) -> None:
    """A new process that imports the plug-in opens the folder with peft alone."""
    model = moved(attached(family, method, **settings))
    model.save_pretrained(folder)
    code = _PLAIN.format(
        here=str(Path(__file__).parent), kind=kind, family=family, folder=str(folder)
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(folder / "logits.pt"), logits(model))


def holds_two_adapters(family: str, method: str, folder: Path, **settings: Any) -> None:
    """A second adapter is loaded, switched to, and deleted; the first is what it was."""
    first = moved(attached(family, method, **settings), seed=1)
    second = moved(attached(family, method, **settings), seed=2)
    want = {"default": logits(first), "second": logits(second)}
    assert not torch.equal(want["default"], want["second"])
    second.save_pretrained(folder)
    first.load_adapter(str(folder), adapter_name="second", is_trainable=True)
    assert torch.equal(logits(first), want["default"])
    first.set_adapter("second")
    assert torch.equal(logits(first), want["second"])
    assert trainable(first) and all("second" in name for name in trainable(first))
    first.set_adapter("default")
    assert torch.equal(logits(first), want["default"])
    assert all("default" in name for name in trainable(first))
    first.delete_adapter("default")
    assert torch.equal(logits(first), want["second"])
    assert first.active_adapters == ["second"]
    if not any("modules_to_save" in name for name in trainable(first)) or method == "head":
        assert torch.equal(logits(first.unload()), logits(tiny(family)))  # peft keeps a new head


def merges(family: str, method: str, bits: bool = False, **settings: Any) -> None:
    """Merged logits are the unmerged ones; unmerging restores them."""
    model = moved(attached(family, method, **settings))
    expected = logits(model)
    tolerance = {"rtol": 0, "atol": 0} if bits else {"rtol": 1e-4, "atol": 1e-5}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **tolerance)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **tolerance)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, **tolerance)
    assert type(merged) is type(tiny(family)) and "base_layer" not in str(list(merged.state_dict()))


def swapped_equals_stock(family: str, method: str, **settings: Any) -> None:
    """Fast families give the adapter the logits and gradients of the stock modules."""
    models = []
    for fast in (False, True):
        model = moved(attached(family, method, **settings))
        if fast:
            assert families.apply(model) > 0
        if task(model.get_base_model()) == "CAUSAL_LM":
            model.train()  # encoders have dropout, and take the fast path in eval mode too
        out = model(input_ids=IDS, attention_mask=MASK, labels=labels(model), use_cache=False)
        out.loss.backward()
        model.out = out.logits.detach()
        if out.logits.dim() == 3:  # places without a token hold anything
            model.out = model.out[MASK.bool()]
        models.append(model)
    stock, fast = models
    torch.testing.assert_close(fast.out, stock.out, rtol=1e-4, atol=1e-5)
    for name, p in trainable(stock).items():
        other = dict(fast.named_parameters())[name]
        torch.testing.assert_close(other.grad, p.grad, rtol=2e-3, atol=1e-5, msg=name)


def four_bit(family: str, folder: Path, dense: tuple[str, ...] = ("classifier",)) -> Any:
    """A 4-bit base of a family, in float32, wide enough for blocks of 64."""
    config = FAMILIES.get(family).tiny().config
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(0)
    model = type(FAMILIES.get(family).tiny())(type(config)(**{**config.to_dict(), **wide}))
    model.save_pretrained(folder)
    return opened_four_bit(folder, task(model), dense)


def opened_four_bit(folder: Path, kind: str, dense: tuple[str, ...] = ("classifier",)) -> Any:
    name = "sequence-classification" if kind == "SEQ_CLS" else "causal"
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[*dense, "lm_head"]
    )
    return load_model(folder, task=name, quantization_config=how, dtype="float32", device_map="cpu")


def works_on_four_bits(family: str, method: str, folder: Path, **settings: Any) -> Any:
    """Identity, gradients, reload and disable on a 4-bit base; return the moved model."""
    base = four_bit(family, folder / "base")
    plain = logits(base)
    model = adapters.attach(base, method, task_type=task(base), **settings)
    assert torch.equal(logits(model), plain)
    moved(model)
    model.train()
    model(input_ids=IDS, attention_mask=MASK, labels=labels(model)).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())
    model.eval()
    expected = logits(model)
    assert not torch.equal(expected, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(folder / "adapter")
    fresh = opened_four_bit(folder / "base", task(model.get_base_model()))
    again = opening.attach_saved(fresh, folder / "adapter")
    assert torch.equal(logits(again), expected)
    return model
