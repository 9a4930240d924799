"""Encoders without padding against their stock models, on ragged padded batches.

Loss and every gradient are judged against the stock model in float64: our error is at most twice
the stock model's own in the same precision.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from finegraft.adapters import lora
from finegraft.kernels import dropout as drop
from finegraft.kernels.encoder_attention import Rows, encoder_attention
from finegraft.models import families, swap

NAMES = ("bert", "distilbert", "roberta")
RAGGED = (5, 23, 1, 40, 17, 300)
PAD = 1


def made(name, **changes):
    torch.manual_seed(4)
    model = families.FAMILIES.get(name).tiny().eval()
    if name == "distilbert":  # away from its ReLU's kink, where one rounding decides a gradient
        torch.nn.init.constant_(model.pre_classifier.bias, 5.0)
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


def fast(model):
    model = copy.deepcopy(model)
    assert families.apply(model) > 0
    lora.accelerate(model)
    return model


def batch(lengths=RAGGED, width=None, vocabulary=131):
    generator = torch.Generator().manual_seed(2)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(3, vocabulary, (n,), generator=generator)
        mask[i, :n] = 1
    labels = torch.randint(0, 3, (len(lengths),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def step(model, inputs):
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in grad_of(model)}
    return {"loss": loss.detach(), **grads}


def grad_of(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def compare(model, inputs, dtype):
    model = no_dropout(model).to(dtype).double()  # what that precision can hold
    ours = fast(model).to(dtype)
    errors = {}
    for draw in range(4):  # one draw's error of a short vector may be nothing by luck
        generator = torch.Generator().manual_seed(draw)
        if "input_ids" in inputs:
            ids = torch.randint(3, 131, inputs["input_ids"].shape, generator=generator)
            inputs["input_ids"] = ids.where(inputs["input_ids"] != PAD, PAD)
        truth = step(copy.deepcopy(model), inputs)
        found = (step(copy.deepcopy(m), inputs) for m in (copy.deepcopy(model).to(dtype), ours))
        for theirs, mine, (key, exact) in zip(
            *(given.values() for given in found), truth.items(), strict=True
        ):
            errors.setdefault(key, []).append(
                torch.stack([(theirs - exact).norm(), (mine - exact).norm(), exact.norm()])
            )
    eps = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    totals = {key: torch.stack(norms).norm(dim=0) for key, norms in errors.items()}
    # A softmax does not see a key's bias: its gradient is zero, and what comes out is rounding.
    largest = max(exact for _, _, exact in totals.values())
    for key, (theirs, mine, exact) in totals.items():
        scale = largest if exact < 1e-10 * largest else exact
        assert mine <= 2 * theirs + eps * scale, key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient(name, dtype):
    compare(made(name), batch(), dtype)


TARGETS = {"bert": "query|value|dense", "distilbert": "q_lin|v_lin|lin1", "roberta": "query|value"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_above_a_frozen_base(name, dtype):
    """With a frozen base the projections are one product, and only adapters and head train."""
    targets = rf".*\.({TARGETS[name]})"
    model = lora.attach(
        made(name), r=4, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False
    )
    swap.undo(model)  # ``compare`` needs the stock model too
    compare(model, batch(), dtype)


SHAPES = {"one": (9,), "length-1": (1, 1), "512": (512, 3, 200), "equal": (16, 16), "wide": (4, 7)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, shape):
    inputs = batch(SHAPES[shape], 11 if shape == "wide" else None)
    compare(made(name), inputs, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mask_every_token_counts(name):
    inputs = batch((7, 7))
    del inputs["attention_mask"]
    compare(made(name), inputs, torch.float32)


@pytest.mark.parametrize("given", ["token_type_ids", "position_ids", "inputs_embeds", "holes"])
def test_other_inputs(given):
    model, inputs = made("bert"), batch((12, 30, 4))
    shape = inputs["input_ids"].shape
    if given == "token_type_ids":
        inputs[given] = torch.arange(shape[1]).remainder(2).expand(shape)
    elif given == "position_ids":
        inputs[given] = torch.arange(shape[1]).flip(0).expand(shape)
    elif given == "inputs_embeds":
        ids = inputs.pop("input_ids")
        inputs[given] = model.get_input_embeddings()(ids).detach().double()
        model = model.double()
        compare_dtype = torch.float64
        return compare(model, inputs, compare_dtype)
    else:
        inputs["attention_mask"][:, 2:3] = 0  # hidden in the middle: positions must not close up
    return compare(model, inputs, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_of_the_encoder(name):
    """The base model alone gives every real token its stock state, and zeros to padding."""
    stock = made(name).base_model
    ours = copy.deepcopy(stock)
    assert families.apply(ours) > 0
    inputs = batch()
    del inputs["labels"]
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, found = (m(**inputs).last_hidden_state for m in (stock, ours))
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert found.shape == expected.shape and not found[~real].any()


def other_head(name, kind):
    prefix = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta"}[name]
    config = made(name).config
    config.num_labels = 2 if kind == "QuestionAnswering" else 3
    torch.manual_seed(5)
    return getattr(transformers, f"{prefix}For{kind}")(config).eval()


@pytest.mark.parametrize("kind", ["TokenClassification", "MaskedLM", "QuestionAnswering"])
@pytest.mark.parametrize("name", NAMES)
def test_other_heads_run_without_padding(name, kind):
    model, inputs = other_head(name, kind), batch((5, 23, 1))
    labels, real = inputs.pop("labels"), inputs["attention_mask"].bool()
    if kind == "QuestionAnswering":
        inputs |= {"start_positions": labels * 0, "end_positions": labels * 0}
        del inputs["attention_mask"]  # its loss is over every position, padding too
    else:
        inputs["labels"] = inputs["input_ids"].remainder(3).masked_fill(~real, -100)
    compare(model, inputs, torch.float32)


def test_no_pad_token_reaches_a_matrix_product():
    model = fast(made("bert")).train()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1]))
    model(**batch((5, 60, 9))).loss.backward()
    rows = Rows((5, 60, 9))
    assert rows.filled - rows.tokens < 8
    # The last layer's query, output and MLP are computed for the first tokens only.
    assert [s.numel() for s in seen] == [rows.filled] * 6 + [3, *[rows.filled] * 2] + [3] * 5


@pytest.mark.parametrize("ask", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_states_come_from_the_stock_path(name, ask):
    stock = made(name)
    stock.set_attn_implementation("eager")
    ours, inputs = fast(stock), batch()
    field = ask.removeprefix("output_")
    with torch.no_grad():
        expected = stock(**inputs, **{ask: True})
        found = ours(**inputs, **{ask: True})
    assert len(found[field]) == len(expected[field]) >= 2
    for mine, theirs in zip(found[field], expected[field], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert type(ours.base_model).__name__.startswith("Fast")  # swapped again after the call


def test_left_padding_takes_the_stock_path():
    stock = made("bert")
    ours, inputs = fast(stock), batch((5, 9))
    for key in ("input_ids", "attention_mask"):
        inputs[key] = inputs[key].flip(1)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("name", NAMES)
def test_undo_is_bit_exact_and_keys_stay(name):
    stock, inputs = made(name), batch()
    ours = fast(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        ours(**inputs)
    swap.undo(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    for key, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    for mode in (True, False):
        found = []
        for model in (ours, stock):
            torch.manual_seed(7)
            found.append(model.train(mode)(**inputs).logits)
        assert torch.equal(*found)


def test_a_configuration_without_a_kernel_stays_stock():
    model = made("bert", hidden_act="relu")
    assert families.apply(model) == 0
    assert "activation relu has no kernel" in swap.summary(model)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients_with_dropout(name):
    found = []
    for checkpointing in (False, True):
        model = fast(made(name)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(step(model, batch((5, 9, 30))))
    for key, plain in found[0].items():
        torch.testing.assert_close(found[1][key], plain)


def test_attention_dropout_has_the_exact_gradient():
    rows = Rows((5, 1, 7))
    generator = torch.Generator().manual_seed(6)
    q, k, v = torch.randn(3, rows.filled, 2, 4, generator=generator, dtype=torch.float64)
    noise = torch.randint(-(2**15), 2**15, (rows.scores(2, False),), generator=generator).short()

    def run(q, k, v):
        return encoder_attention(q, k, v, rows, 0.5, False, noise, 0.3)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (q, k, v)])


def test_random_bits_repeat_by_seed_and_are_uniform():
    torch.manual_seed(5)
    first, second = drop.draw((3, 70_001)), drop.draw((3, 70_001))
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # how many threads there are changes nothing
    again = drop.draw((3, 70_001))
    torch.set_num_threads(threads)
    assert torch.equal(first, again) and not torch.equal(first, second)
    counts = torch.bincount((first.long() + 2**15).flatten() // 4096, minlength=16)
    assert ((counts / counts.sum() * 16 - 1).abs() < 0.03).all()  # 5 standard errors
    both = torch.stack([first.flatten(), second.flatten()]).double()
    neighbours = torch.stack([first.flatten()[1:], first.flatten()[:-1]]).double()
    assert max(torch.corrcoef(x)[0, 1].abs() for x in (both, neighbours)) < 0.012
    dropped = drop.apply(torch.ones(3, 70_001), first, 0.1)
    assert abs((dropped == 0).double().mean() - 0.1) < 0.004
    assert abs(dropped.double().mean() - 1) < 0.004


@pytest.mark.parametrize("name", NAMES)
def test_dropout_has_the_stock_distribution(name):
    """Means and spreads of the logits over many draws agree with the stock model's."""
    stock, inputs = made(name).train(), batch((5, 9))
    ours = fast(stock).train()
    assert stock.config.to_dict().get("attention_dropout", 0.1) == 0.1
    torch.manual_seed(11)
    draws = []
    with torch.no_grad():
        for model in (stock, ours):
            draws.append(torch.stack([model(**inputs).logits for _ in range(400)]))
    (mean, other), (spread, second) = ([d.mean(0) for d in draws], [d.std(0) for d in draws])
    assert (mean - other).abs().max() < 5 * (spread / 400**0.5 * 2**0.5).max()
    assert ((second / spread) - 1).abs().max() < 0.25


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_a_stock_trainer_trains(tmp_path, bf16):
    model = fast(made("distilbert"))
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(48):
        ids = torch.randint(40, 131, (3 + i % 9,), generator=generator)
        ids[1] = 10 + i % 3  # the class is written in the row
        rows.append({"input_ids": ids.tolist(), "labels": i % 3})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(), pad_token="[PAD]", model_max_length=32
    )
    args = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        bf16=bf16,
        report_to="none",
        save_strategy="no",
        logging_steps=6,
        learning_rate=3e-3,
        num_train_epochs=8,
        disable_tqdm=True,
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, args, collate, rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.predict(rows).predictions.shape == (48, 3)


def _words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": PAD}, unk_token="[UNK]"))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_as_good_as_stock_autocast(name):
    model, inputs = no_dropout(made(name)), batch((5, 23, 1))
    truth = step(copy.deepcopy(model).double(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock, ours = step(copy.deepcopy(model), inputs), step(fast(model), inputs)
    for key, exact in truth.items():
        if exact.norm() > 1e-6:
            theirs, mine = stock[key].double() - exact, ours[key].double() - exact
            assert mine.norm() <= 2 * theirs.norm() + 1e-3 * exact.norm(), key
