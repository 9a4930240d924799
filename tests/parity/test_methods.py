"""The contract of tuning methods: every one in the registry, both tasks, 32 and 4 bits.

A file that is added to ``finegraft/adapters`` is tested here without a change. Encoders classify;
decoders generate, and classify in the slow part. What a method says that it cannot do
(``not_mergeable``, ``not_quantized``, ``not_packed``, ``not_identity``) must be so, and be refused
with that reason.
"""

from __future__ import annotations

import re

import methods_tiny as t
import pytest
import torch
from methods_tiny import IDS, MASK, Case

from finegraft import FastClassifier, FastLanguageModel, adapters
from finegraft.core.errors import AdapterError, FinegraftError
from finegraft.models import quantize

QUICK = (("llama", "causal"), ("bert", "classes"))
MORE = (("llama", "classes"), ("gemma3_text", "causal"), ("qwen3", "classes"))
UNPADDED = torch.tensor([[5, 9, 33, 2, 77, 8], [7, 7, 12, 30, 4, 21]])
NEAR = {"rtol": 1e-4, "atol": 2e-5}


def cases() -> list:
    """Methods themselves on the usual bases first; variants and other bases are slow."""
    made = []
    for bases, slow in ((QUICK, False), (MORE, True)):
        for name in adapters.names():
            method = adapters.find(name)[0]
            for family, task in bases:
                for bits in (32,) if method.not_quantized else (32, 4):
                    case = Case(name, family, task, bits)
                    rest = slow or name not in adapters.METHODS.names()
                    marks = [pytest.mark.slow] if rest else []
                    made.append(pytest.param(case, id=str(case), marks=marks))
    return made


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in {family for family, _ in (*QUICK, *MORE)}:
        t.save_base(family, folder / family)
    return folder


@pytest.fixture(scope="module", params=cases())
def run(request, bases, tmp_path_factory):
    case = request.param
    return t.Run(case, bases / case.family, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def plain_peft():
    made = {}

    def find(plugin):
        if plugin not in made:
            made[plugin] = t.PlainPeft(plugin)
        return made[plugin]

    yield find
    for process in made.values():
        process.close()


def test_a_fresh_adapter_is_the_identity_or_says_why_not(run):
    same = torch.allclose(run.fresh_logits, run.base_logits, **NEAR)
    assert same == (run.case.found.not_identity is None)
    if same and not run.case.starts_from_weights:
        assert torch.equal(run.fresh_logits, run.base_logits)


def test_only_the_adapter_and_a_new_head_train(run):
    now = t.trained(run.model)
    moved = [name for name, value in now.items() if not torch.equal(value, run.start[name])]
    assert now.keys() == run.start.keys() and moved
    after = t.plain(run.model)
    same = {name for name, value in run.before.items() if torch.equal(after[name], value)}
    if run.case.found.peft_type is None:
        assert not same & now.keys()
    else:
        assert same == run.before.keys()


def test_saved_and_opened_again_it_says_the_same_to_the_bit(run):
    again, _ = t.reopened(run.case, run.adapter)
    # trainers leave it off; a model that fills a cache rounds at other places
    again.config.use_cache = run.model.config.use_cache
    assert torch.equal(t.logits(again), t.logits(run.model))
    assert not torch.equal(t.logits(again), run.base_logits)
    if run.case.found.peft_type is not None:
        assert t.trained(again).keys() == run.start.keys()
        assert adapters.method_of(again) is run.case.found


def test_disabled_it_leaves_the_base(run):
    if run.case.found.peft_type is None:
        assert not hasattr(run.model, "disable_adapter")
        return
    torch.testing.assert_close(_disabled(run.model), run.base_logits, **NEAR)
    again = t.base(run.case, run.adapter)
    assert torch.equal(_disabled(again), run.base_logits)
    assert not torch.equal(t.logits(again), run.base_logits)


def _disabled(model):
    with model.disable_adapter():
        return t.logits(model)


def test_merged_it_says_the_same_or_refuses(run):
    reason = run.case.found.not_mergeable
    if reason is not None:
        with pytest.raises(FinegraftError):
            adapters.merge_to_16bit(run.model)
        if run.case.found.peft_type is not None:
            with pytest.raises(FinegraftError, match=re.escape(reason)):
                t.base(run.case, run.adapter).merge_and_unload()
        return
    whole = adapters.merge_to_16bit(run.model, base="dequantized", dtype=torch.float32).model
    torch.testing.assert_close(t.logits(whole), t.logits(run.model), **NEAR)
    again = t.base(run.case, run.adapter)
    try:
        merged = again.merge_and_unload()
    except FinegraftError as error:
        assert run.case.bits == 4 and "merge_to_16bit" in str(error)
        return
    if run.case.bits == 32:
        torch.testing.assert_close(t.logits(merged), t.logits(run.model), **NEAR)
        return
    modules = dict(whole.named_modules())
    for name, layer in quantize.quantized_layers(merged).items():  # rounded to 4 bits once more
        expected = modules[name].weight
        error = quantize.dense_weight(layer, torch.float32) - expected
        assert error.norm() < 0.15 * expected.norm(), name


def test_plain_peft_opens_it(run, plain_peft):
    process = plain_peft(not run.case.found.in_peft)
    found = process.logits(run.case, run.base_path, run.adapter, UNPADDED)
    expected = t.logits(t.base(run.case, run.adapter), UNPADDED, torch.ones_like(UNPADDED))
    torch.testing.assert_close(found, expected, **NEAR)


def test_rows_side_by_side_are_the_rows_alone(run, tmp_path):
    if not run.case.causal:
        alone = [t.logits(run.model, IDS[i, :n][None], MASK[i, :n][None]) for i, n in _lengths()]
        torch.testing.assert_close(torch.cat(alone), t.logits(run.model), **NEAR)
        return
    rows = t.rows(run.case)
    alone = t.trainer(run.case, run.model, tmp_path / "a", per_device_eval_batch_size=1)
    expected = alone.evaluate(rows)["eval_loss"]
    together = t.trainer(run.case, run.model, tmp_path / "b", per_device_eval_batch_size=8)
    assert together.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    if run.case.found.not_packed is not None:
        with pytest.raises(AdapterError, match=r"FG-ADAPT-030.*" + run.case.found.not_packed):
            t.trainer(run.case, run.model, tmp_path / "c", packing=True)
        return
    packed = t.trainer(run.case, run.model, tmp_path / "c", packing=True, max_length=32)
    assert max(len(lengths) for lengths in packed.train_dataset["seq_lengths"]) > 1
    packed_loss = packed.evaluate(packed.train_dataset)["eval_loss"]
    assert packed_loss == pytest.approx(expected, rel=1e-5)


def _lengths():
    return enumerate(MASK.sum(1).tolist())


def test_asked_in_between_it_goes_on_as_before(run):
    model, words = t.reopened(run.case, run.adapter)
    door = FastLanguageModel if run.case.causal else FastClassifier
    model = door.for_training(model)
    before, loss = {k: v.clone() for k, v in model.state_dict().items()}, _loss(run, model)
    model = door.for_inference(model)
    if run.case.causal:
        how = {"max_new_tokens": 5, "do_sample": False}
        said = model.generate(input_ids=IDS, attention_mask=MASK, **how)
        assert said.shape[0] == 3
    else:
        said = FastClassifier.predict(model, words, ["w5 w9", "w7"])
        assert all(one.label in t.NAMES for one in said)
    model = door.for_training(model)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(_loss(run, model), loss)


def _loss(run, model):
    labels = IDS.masked_fill(MASK == 0, -100) if run.case.causal else torch.tensor([0, 2, 1])
    return model(input_ids=IDS, attention_mask=MASK, labels=labels).loss.detach()


def test_resumed_it_is_the_run_that_never_stopped(run, tmp_path):
    model = t.attached(run.case, run.base_path)
    trainer = t.trainer(run.case, model, tmp_path)
    saved = run.folder / "run" / f"checkpoint-{t.SAVED}"
    trainer.train(resume_from_checkpoint=str(saved))
    assert trainer.state.global_step == t.STEPS
    now, expected = t.trained(trainer.model), t.trained(run.model)
    assert now.keys() == expected.keys()
    # Where an encoder's LayerNorms train, a second uninterrupted run of two threads differs in the
    # last bit as well; everything else is bit-equal.
    last_bit = 1e-7 if run.case.family == "bert" and run.case.method in ("bitfit", "full") else 0.0
    for name, value in expected.items():
        assert torch.allclose(now[name], value, rtol=last_bit * 10, atol=last_bit), name


@pytest.mark.parametrize("name", adapters.names())
def test_a_quantized_base_is_refused_where_the_method_says_so(name, bases):
    method = adapters.find(name)[0]
    for family, task in QUICK:
        model = t.base(Case(name, family, task, 4), bases / family)
        if method.not_quantized is None:
            assert adapters.attach(model, name) is not model
            continue
        with pytest.raises(AdapterError, match="FG-ADAPT-012.*" + re.escape(method.not_quantized)):
            adapters.attach(model, name)
        assert not any(hasattr(m, "base_layer") for m in model.modules())
