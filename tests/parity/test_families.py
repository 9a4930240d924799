"""Every family against its stock model: loss and every gradient of ragged documents in float64.

The stock model sees each document alone; ours sees all of them in one flat batch.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from finegraft.adapters import lora
from finegraft.models import causal_loss, families, swap
from finegraft.training.collate import Collator

# Encoders have their own tests.
DECODERS = [
    n for n in families.FAMILIES.names() if hasattr(families.FAMILIES.get(n).tiny(), "lm_head")
]
LENGTHS = (5, 23, 1, 40, 17, 300)


def documents(vocabulary: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for n in LENGTHS:
        ids = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        cut = n // 3
        rows.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return rows


def beginning(vocabulary: int, tokens: int = 11) -> list[dict[str, list[int]]]:
    """Rows that begin alike and go on differently, the last one right after the first label."""
    rows = [row for row in documents(vocabulary) if len(row["input_ids"]) <= 40]
    first = torch.randint(3, vocabulary, (tokens,)).tolist()
    for row in rows:
        row["labels"] = [-100] * tokens + row["labels"]
        row["input_ids"] = first + row["input_ids"]
    return rows


def stock_step(model, rows, dtype):
    model = copy.deepcopy(model).to(dtype).train()
    total = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    loss = torch.zeros((), dtype=dtype)
    for row in rows:
        labels = torch.tensor([row["labels"]])
        if (labels[:, 1:] != -100).any():
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].to(dtype)
            part = torch.nn.functional.cross_entropy(
                logits[0], labels[0, 1:], ignore_index=-100, reduction="sum"
            )
            loss = loss + part / total
    return backward(model, loss)


def fast_step(model, rows, dtype, masters=None, batch=None):
    model = copy.deepcopy(model).to(dtype)
    for parameter in model.parameters():
        if masters is not None and parameter.requires_grad:
            parameter.data = parameter.data.to(masters)
    assert causal_loss.apply(model) and families.apply(model)
    assert families.is_padding_free(model)
    if masters is not None:
        assert lora.accelerate(model)
    model.train()
    batch = batch or Collator(0, flat=True)(rows)
    return backward(model, model(**batch, use_cache=False).loss)


def backward(model, loss):
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def made(name):
    torch.manual_seed(4)
    return families.FAMILIES.get(name).tiny().eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_flat_batch_equals_each_document_alone(name, dtype):
    model = made(name).to(dtype).double()
    rows = documents(model.config.vocab_size)
    truth = stock_step(model, rows, torch.float64)
    stock = stock_step(model, rows, dtype)
    ours = fast_step(model, rows, dtype)
    assert truth.keys() == ours.keys()
    # The stock norm computes in float32 whatever it is given, so its float64 is good to 1e-6.
    eps = 2e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
    for key, exact in truth.items():
        theirs, mine = stock[key].double() - exact, ours[key].double() - exact
        assert mine.norm() <= 2 * theirs.norm() + eps * exact.norm(), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_shared_beginning_has_the_gradients_of_computing_it_in_every_row(name, dtype):
    model = made(name).to(dtype).double()
    rows = beginning(model.config.vocab_size)
    batch = Collator(0, flat=True, share_prefix=True)(rows)
    assert 10 <= int(batch["prefix_length"]) <= 11
    assert batch["input_ids"].shape[1] < sum(len(row["input_ids"]) for row in rows)
    truth = stock_step(model, rows, torch.float64)
    stock = stock_step(model, rows, dtype)
    shared = fast_step(model, rows, dtype, batch=batch)
    eps = 2e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
    for key, exact in truth.items():
        theirs, mine = stock[key].double() - exact, shared[key].double() - exact
        assert mine.norm() <= 2 * theirs.norm() + eps * exact.norm(), key


PAD = {"input_ids": 0, "labels": -100, "attention_mask": 0}


def padded(rows, side):
    width = max(len(row["input_ids"]) for row in rows)
    batch = {name: [] for name in PAD}
    for row in rows:
        row = {**row, "attention_mask": [1] * len(row["input_ids"])}
        for name, value in PAD.items():
            fill = [value] * (width - len(row[name]))
            batch[name].append(row[name] + fill if side == "right" else fill + row[name])
    return {name: torch.tensor(values) for name, values in batch.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_ordinary_padded_batches_take_the_flat_path(name, side):
    """What a stock trainer feeds: rows with a mask, labels at the model."""
    model = made(name)
    rows = [row for row in documents(model.config.vocab_size) if len(row["input_ids"]) > 1]
    for row in rows:
        row["labels"][0] = -100
    truth = stock_step(model, rows, torch.float64)
    batch = padded(rows, side)
    ours = fast_step(model, rows, torch.float64, batch=batch)
    for key, exact in truth.items():
        assert (ours[key].double() - exact).norm() <= 4e-6 * (exact.norm() + 1), key
    model.eval()
    families.apply(model)
    states = model.model(
        batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    swap.undo(model)
    stock = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(
        states.last_hidden_state[kept], stock.last_hidden_state[kept], rtol=1e-4, atol=1e-5
    )


def test_packed_rows_of_a_stock_collator_take_the_flat_path():
    """[1, t] with restarting positions and no mask, as trl's padding-free collator gives."""
    model = made("llama")
    rows = documents(131)
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    labels = torch.tensor([[label for row in rows for label in [-100, *row["labels"][1:]]]])
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    truth = stock_step(model, rows, torch.float64)
    ours = fast_step(model, rows, torch.float64, batch=batch)
    for key, exact in truth.items():
        assert (ours[key].double() - exact).norm() <= 4e-6 * (exact.norm() + 1), key


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "qkv_proj", "down_proj"]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_adapters_get_the_gradients_of_plain_peft(name, dtype, targets):
    """A frozen base, adapters with float32 master weights: what training runs."""
    base = made(name).to(dtype).double()
    names = dict(base.named_modules())
    if targets != "all-linear":
        targets = [t for t in targets if any(n.endswith(t) for n in names)]
    torch.manual_seed(6)
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
    plain = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for parameter in plain.parameters():
        if parameter.requires_grad:  # exact in every precision that is compared
            parameter.data = (parameter.data / 4).bfloat16().double()
    rows = documents(base.config.vocab_size)
    truth = stock_step(plain, rows, torch.float64)
    stock = stock_step(plain, rows, dtype)
    ours = fast_step(plain, rows, dtype, masters=torch.float32 if dtype.itemsize < 4 else dtype)
    eps = 2e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
    compared = [key for key, exact in truth.items() if exact is not None]
    assert len(compared) > 8 and all("lora" in key for key in compared if key != "loss")
    for key in compared:
        theirs, mine = stock[key].double() - truth[key], ours[key].double() - truth[key]
        assert mine.norm() <= 2 * theirs.norm() + eps * truth[key].norm(), key


@pytest.mark.parametrize("name", DECODERS)
def test_swap_keeps_keys_generates_the_same_and_is_undone(name):
    model, before = made(name), made(name)
    assert families.apply(model) > 0
    assert list(model.state_dict()) == list(before.state_dict())
    ids = torch.tensor([[5, 9, 33, 2, 77, 8]])
    expected = before.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
    swap.undo(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_hidden_states_of_every_layer_come_from_the_stock_forward():
    model = made("llama")
    ids = torch.tensor([[5, 9, 33, 2]])
    expected = model(ids, output_hidden_states=True).hidden_states
    families.apply(model)
    found = model(ids, output_hidden_states=True).hidden_states
    assert len(found) == 3
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_unknown_family_trains_stock_and_says_why():
    from transformers import OPTConfig, OPTForCausalLM

    size = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=99, word_embed_proj_dim=32, **size))
    assert families.apply(model) == 0 and not families.is_padding_free(model)
    assert "no family file for model_type 'opt'" in swap.summary(model)


def test_checkpointing_gives_the_same_gradients():
    model, again = made("llama"), made("llama")
    rows = documents(131)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    plain, recomputed = fast_step(model, rows, torch.float32), fast_step(again, rows, torch.float32)
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key])
