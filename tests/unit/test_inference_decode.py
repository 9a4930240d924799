"""When the fast loop runs, when it does not, and that the model never notices."""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from finegraft.adapters import lora
from finegraft.inference import decode
from finegraft.inference.modes import for_inference, for_training
from finegraft.models import causal_loss, families, swap

IDS = torch.tensor([[0, 0, 5, 9, 13], [3, 8, 21, 34, 55]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
ASK = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def model():
    torch.manual_seed(2)
    made = families.FAMILIES.get("llama").tiny().eval().float()
    made.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)
    return made


@pytest.fixture
def runs(monkeypatch):
    """The runs of the fast loop: how it is seen which loop ran."""
    made, original = [], decode._Run

    def run(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(decode, "_Run", run)
    return made


def adapted(model, seed=0, **settings):
    """LoRA on every linear layer, far enough from the start to change what is said."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    )
    disturb(wrapped, "default")
    return wrapped.eval()


def disturb(wrapped, name):
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key and name in key:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def same_as_stock(model, runs, *, fast=True, **ask):
    """Compare with the loop of transformers, and tell which loop ran."""
    ask = {**ASK, **ask}
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    with swap.stock(core):
        expected = model.generate(**ask)
    runs.clear()
    got = model.generate(**ask)
    assert bool(runs) is fast
    assert torch.equal(got, expected)
    return got


def test_generate_is_fast_after_for_inference_and_stock_after_for_training(model, runs):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    stock_class = type(model)
    for_inference(model)
    assert type(model).__name__ == "FastDecodingLlamaForCausalLM"
    same_as_stock(model, runs)
    for_training(model)
    assert type(model) is stock_class
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    runs.clear()
    model.generate(**ASK)
    assert not runs


def test_merged_weights_are_freed_by_for_training(model):
    for_inference(model)
    model.generate(**ASK)
    copied = weakref.ref(decode._states[model].weights)
    assert copied() is not None
    for_training(model)
    gc.collect()
    assert copied() is None


def test_the_compact_loss_and_the_fast_loop_share_one_instance(model, runs, tmp_path):
    assert causal_loss.apply(model)
    with_loss = type(model)
    for_inference(model)
    same_as_stock(model, runs)
    (row,) = [row for row in swap.report(model) if row.module == ""]
    assert (row.stock, row.fast) == ("LlamaForCausalLM", "FastDecodingLlamaForCausalLM")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    for_training(model)
    assert type(model) is with_loss
    for_inference(model)
    swap.undo(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    for_training(model)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_an_adapter_is_merged_into_a_copy(model, runs):
    base = for_inference(model).generate(**ASK)
    for_training(model)
    wrapped = adapted(model)
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    for_inference(wrapped)
    assert not torch.equal(same_as_stock(wrapped, runs), base)
    for_training(wrapped)
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters())
    assert wrapped.training


def test_swapped_layers_are_read_like_stock_ones(model, runs):
    families.apply(model)
    wrapped = lora.attach(model)
    disturb(wrapped, "default")
    for_inference(wrapped)
    same_as_stock(wrapped, runs)


def test_a_change_of_weights_is_noticed(model, runs):
    wrapped = adapted(model)
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(9)
    disturb(wrapped, "other")
    for_inference(wrapped.eval())
    answers = [same_as_stock(wrapped, runs)]
    wrapped.set_adapter("other")
    answers.append(same_as_stock(wrapped, runs))
    with wrapped.disable_adapter():
        answers.append(same_as_stock(wrapped, runs))
    wrapped.set_adapter("default")
    assert torch.equal(same_as_stock(wrapped, runs), answers[0])
    wrapped.merge_adapter()
    assert torch.equal(same_as_stock(wrapped, runs), answers[0])
    wrapped.unmerge_adapter()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(-1)
    answers.append(same_as_stock(wrapped, runs))
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == 4


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_step_is_noticed(model, runs, fused):
    """torch's fused AdamW writes weights without moving their version counters."""
    wrapped = for_inference(adapted(model))
    before = same_as_stock(wrapped, runs)
    trained = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(trained, lr=0.3, fused=fused).step()
    assert not torch.equal(same_as_stock(wrapped, runs), before)


def test_a_trained_head_and_embedding_are_used(model, runs):
    wrapped = adapted(model, modules_to_save=["lm_head", "embed_tokens"])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for_inference(wrapped)
    trained = same_as_stock(wrapped, runs)
    with wrapped.disable_adapter():
        assert not torch.equal(same_as_stock(wrapped, runs), trained)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_a_variant_of_lora_keeps_the_stock_loop(model, runs, settings):
    same_as_stock(for_inference(adapted(model, **settings)), runs, fast=False)


def test_sampling_draws_the_tokens_that_transformers_draws(model, runs):
    for_inference(model)
    ask = {**ASK, "do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40}
    ask |= {"repetition_penalty": 1.2, "num_return_sequences": 3}
    torch.manual_seed(4)
    with swap.stock(model):
        expected = model.generate(**ask)
    torch.manual_seed(4)
    assert torch.equal(model.generate(**ask), expected)
    assert len(runs) == 1
    assert len(set(map(tuple, expected.tolist()))) == 6


@pytest.mark.parametrize(
    "ask",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(1, 60))},
        {"bad_words_ids": [[7], [11]], "suppress_tokens": [5, 6]},
        {"input_ids": IDS[1:], "attention_mask": None},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 9},
        {"max_time": 60.0},
    ],
    ids=str,
)
def test_every_processor_and_criterion_still_counts(model, runs, ask):
    same_as_stock(for_inference(model), runs, **ask)


@pytest.mark.parametrize(
    "ask",
    [
        {"num_beams": 3},
        {"attention_mask": MASK.flip(1)},
        {"position_ids": torch.arange(5).expand(2, 5)},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=["beams", "right padding", "positions", "no cache", "static cache"],
)
def test_what_the_loop_does_not_do_is_left_to_transformers(model, runs, ask):
    same_as_stock(for_inference(model), runs, fast=False, **ask)


def test_requested_scores_come_from_transformers(model, runs):
    out = for_inference(model).generate(**ASK, output_scores=True, return_dict_in_generate=True)
    assert len(out.scores) == out.sequences.shape[1] - 5
    assert not runs


def test_a_cache_of_the_callers_is_filled_by_transformers(model, runs):
    from transformers import DynamicCache

    for_inference(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[1:, :3], past_key_values=cache)
    model.generate(IDS[1:], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert not runs


def test_dropout_in_training_mode_is_not_passed_over(model, runs):
    for_inference(model)
    model.train()
    model.generate(**ASK)
    assert not runs


def test_a_hook_is_not_passed_over(model, runs):
    for_inference(model)
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    same_as_stock(model, runs, fast=False)
    hook.remove()
    assert len(seen) > 20
    same_as_stock(model, runs)
    model.enable_input_require_grads()
    same_as_stock(model, runs)


def test_a_model_whose_logits_are_something_else_is_refused(model, runs, caplog):
    """A layer that looks right and computes something else is what the probe is for."""
    inner = type(model.model.norm)

    def forward(self, x):
        return inner.forward(self, x) * x.new_ones(()).add(x.abs().mean(-1, keepdim=True))

    body = {"stock_class": inner, "forward": forward}
    model.model.norm.__class__ = type("Other", (inner,), body)
    for_inference(model)
    with caplog.at_level(logging.INFO, "finegraft.inference.decode"):
        runs.clear()
        model.generate(**ASK)
        model.generate(**ASK)
    assert sum("logits differ" in record.message for record in caplog.records) == 1
    assert not runs


def test_an_unknown_family_says_why(runs, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    other = GPT2LMHeadModel(config).eval()
    with caplog.at_level(logging.INFO, "finegraft.inference"):
        for_inference(other)
    assert "no family file for model_type 'gpt2'" in caplog.text
    assert "gpt2" in swap.report(other)[0].reason
    other.generate(IDS, max_new_tokens=3, pad_token_id=0)
    assert not runs


def test_moving_rotary_angles_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    made = families.FAMILIES.get("llama").tiny()
    config = type(made.config)(**{**made.config.to_dict(), "rope_parameters": rope})
    assert "dynamic" in decode.attach(type(made)(config))


def test_a_copy_that_does_not_fit_is_not_made(model, runs, monkeypatch):
    class Full:
        available = 1000

    monkeypatch.setattr(decode.psutil, "virtual_memory", Full)
    same_as_stock(for_inference(model), runs, fast=False)


def test_a_machine_without_compiled_loops_keeps_the_stock_loop(model, runs, monkeypatch):
    monkeypatch.setattr(decode._loops, "missing", lambda: "numba is not installed")
    assert decode.attach(model) == "numba is not installed"
    same_as_stock(for_inference(model), runs, fast=False)


class Pieces(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("lookup", [None, 4])
def test_streamers_see_every_token_once(model, runs, lookup):
    for_inference(model)
    ids = torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]])
    pieces = Pieces()
    out = model.generate(
        ids, max_new_tokens=20, do_sample=False, streamer=pieces, prompt_lookup_num_tokens=lookup
    )
    assert runs and pieces.ended
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces.got]), out[0])


def test_a_text_streamer_in_a_thread(model, runs):
    class Words:
        def decode(self, ids, **_):
            return " ".join(map(str, ids if isinstance(ids, list) else ids.tolist())) + " "

    for_inference(model)
    expected = model.generate(IDS[1:], max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    ask = dict(input_ids=IDS[1:], max_new_tokens=8, do_sample=False, streamer=streamer)
    thread = threading.Thread(target=model.generate, kwargs=ask)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(token) for token in expected]
    assert len(runs) == 2


@pytest.mark.parametrize(
    "ask",
    [{"do_sample": True, "top_k": 1}, {"output_scores": True, "return_dict_in_generate": True}],
)
def test_lookup_beyond_greedy_is_left_to_transformers(model, runs, ask):
    for_inference(model)
    ids = torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]])
    plain = model.generate(ids, max_new_tokens=10, do_sample=False)
    runs.clear()
    out = model.generate(ids, max_new_tokens=10, prompt_lookup_num_tokens=3, **ask)
    assert not runs
    assert torch.equal(out if isinstance(out, torch.Tensor) else out.sequences, plain)


def test_generated_ids_can_be_used_in_training(model):
    """They are ordinary tensors, not ones that autograd refuses."""
    ids = for_inference(model).generate(**ASK)
    for_training(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_a_block_leaves_the_class_and_may_free_the_memory(model, runs):
    stock_class = type(model)
    with decode.decoding(model, keep=True):
        model.generate(**ASK)
    assert runs and type(model) is stock_class
    assert decode._states[model].weights is not None
    with decode.decoding(model, keep=False):
        model.generate(**ASK)
    assert model not in decode._states
