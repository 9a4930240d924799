"""The decoder says what transformers says: logits against float64, greedy tokens one for one."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Phi3Config
from transformers import Phi3ForCausalLM as Phi3

from finegraft.inference import decode, weights
from finegraft.inference.session import COMPILED_TOKENS, Session
from finegraft.kernels import _loops
from finegraft.models.families import FAMILIES

VOCABULARY = 131
SIZES = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def llama(**settings):
    sizes = {"hidden_size": 32, "intermediate_size": 56}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes, **settings}))


def partial():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 36, "intermediate_size": 70, "sliding_window": 11}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    return Phi3(Phi3Config(**SIZES, **sizes, **heads, eos_token_id=2, rope_parameters=rope))


def scaled(kind, **settings):
    return llama(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **settings})


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    **{name: functools.partial(lambda n: FAMILIES.get(n).tiny(), name) for name in
       ("llama", "mistral", "phi3", "qwen2", "qwen3")},
    "biases": functools.partial(llama, attention_bias=True, mlp_bias=True),
    "odd sizes": functools.partial(
        llama, hidden_size=30, intermediate_size=41, num_attention_heads=3, num_key_value_heads=1,
        head_dim=6, tie_word_embeddings=True,
    ),
    "wide heads": functools.partial(llama, head_dim=96, vocab_size=144),
    "partial rotary": partial,
    "linear": functools.partial(scaled, "linear", factor=4.0),
    "yarn": functools.partial(scaled, "yarn", factor=4.0, original_max_position_embeddings=128),
    "llama3": functools.partial(scaled, "llama3", original_max_position_embeddings=64, **LLAMA3),
}  # fmt: skip


@functools.cache
def model(name):
    torch.manual_seed(sum(map(ord, name)))
    made = MODELS[name]().eval().float()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:  # biases and norms start at 0 and 1, where a mistake hides
                parameter += 0.2 * torch.randn_like(parameter)
            elif "layers" in name:  # layers that outweigh the embedding say various things
                parameter *= 2
    made.generation_config = GenerationConfig(pad_token_id=0)
    return made


def prompts(*lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def run_steps(made, rows, following, compiled):
    """Logits after the prompts and after each of some given tokens, [steps, b, v]."""
    session = Session(weights.merge(made), [len(row) for row in rows], compiled=compiled)
    out = [session.prefill(rows).clone()]
    out += [session.step(following[:, i]).clone() for i in range(following.shape[1])]
    return torch.stack(out)


def run_stock(made, rows, following):
    """The same from whole forwards, row by row."""
    out = []
    for row, more in zip(rows, following.tolist(), strict=True):
        ids = torch.tensor([row + more])
        with torch.no_grad():
            out.append(made(input_ids=ids, use_cache=False).logits[0, len(row) - 1 :])
    return torch.stack(out, 1)


def test_compiled_steps_run_here():
    """Without them half of this file would compare torch with itself."""
    assert _loops.missing() is None


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_against_float64(name, dtype, compiled):
    rows = prompts(5, 37, 1, 22)
    following = torch.tensor(prompts(9, 9, 9, 9, seed=4))
    single = model(name)
    state = single.state_dict()
    rounded = MODELS[name]().eval().to(dtype)
    rounded.load_state_dict(state)
    exact = MODELS[name]().eval().double()
    exact.load_state_dict({k: v.double() for k, v in rounded.state_dict().items()})
    expected = run_stock(exact, rows, following)
    stock = error(run_stock(rounded, rows, following), expected)
    ours = error(run_steps(rounded, rows, following, compiled), expected)
    assert 0 < ours <= 2 * stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_token_among_others_has_the_bits_it_has_alone(dtype):
    made = MODELS["qwen3"]().eval().to(dtype)
    copied = weights.merge(made)
    (row,) = prompts(40)
    ids = torch.tensor(prompts(COMPILED_TOKENS, seed=5)[0])
    session = Session(copied, [len(row)])
    session.prefill([row])
    together = session.check(ids).clone()
    assert together.shape == (COMPILED_TOKENS, VOCABULARY)
    session.forget(len(ids))
    alone = torch.cat([session.step(ids[i : i + 1]).clone() for i in range(len(ids))])
    assert torch.equal(together, alone)


def test_threads_change_no_bit():
    made, rows = model("qwen2"), prompts(5, 37, 1)
    following = torch.tensor(prompts(4, 4, 4, seed=4))
    one = run_steps(made, rows, following, True)
    torch.set_num_threads(2)
    two = run_steps(made, rows, following, True)
    assert torch.equal(one[1:], two[1:])


def test_a_cache_that_fills_up_is_carried_over():
    made = model("llama")
    rows, following = prompts(9, 4), torch.tensor(prompts(300, 300, seed=6))
    ours = run_steps(made, rows, following, True)
    assert error(ours, run_stock(made, rows, following).double()) < 1e-5


@pytest.mark.parametrize("batch", [1, 8, 20])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name, batch, monkeypatch):
    lengths = (7,) if batch == 1 else [1 + (11 * i) % 29 for i in range(batch)]
    made, inputs = model(name), left_padded(prompts(*lengths))
    free = made.generate(**inputs, max_new_tokens=48, do_sample=False)[:, max(lengths) :]
    end = free[0, 20].item()  # ends the first row somewhere in the middle
    ask = dict(max_new_tokens=48, do_sample=False, eos_token_id=end)
    expected = made.generate(**inputs, **ask)
    runs = runs_of(monkeypatch)
    with decode.decoding(made):
        got = made.generate(**inputs, **ask)
    assert runs
    assert torch.equal(got, expected)
    assert len(set(free[0].tolist())) > 5, "a model that repeats itself would prove nothing"


def runs_of(monkeypatch):
    """The runs of the fast loop; the probe's session is none of them."""
    made, original = [], decode._Run

    def run(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(decode, "_Run", run)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_prompt_lookup_changes_no_token(name, dtype, monkeypatch):
    torch.manual_seed(1)
    made = MODELS[name]().eval().to(dtype)  # as it is initialised it repeats itself, which helps
    made.generation_config = GenerationConfig(pad_token_id=0)
    (pattern,) = prompts(9)
    inputs = left_padded([pattern * 4])
    checked, original = [], Session.check

    def check(session, ids):
        checked.append(len(ids))
        return original(session, ids)

    monkeypatch.setattr(Session, "check", check)
    with decode.decoding(made):
        ask = dict(max_new_tokens=60, do_sample=False)
        said = made.generate(**inputs, **ask)[0, 36:].tolist()
        ask["eos_token_id"] = max(said, key=said.index)  # the token that comes up last
        plain = made.generate(**inputs, **ask)
        looked = made.generate(**inputs, **ask, prompt_lookup_num_tokens=7)
    assert torch.equal(looked, plain)
    assert max(checked) > 1
