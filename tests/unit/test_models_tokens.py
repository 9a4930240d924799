"""Tokenizer and embedding grow together; what was there keeps its bits."""

from __future__ import annotations

import copy

import pytest
import torch
from training_tiny import llama, tokenizer

from finegraft.core.errors import AdapterError, ConfigError, FinegraftError
from finegraft.models import causal_loss, tokens

NEW = ["<customer>", "<order>", "(⁄ ⁄•⁄ω⁄•⁄ ⁄)"]


def grown(model, tok, new=NEW, **how):
    added = tokens.extend(tok, new)
    return added, tokens.grow(model, tok, added, **how)


def tables(model):
    head = model.get_output_embeddings()
    return model.get_input_embeddings().weight, head.weight


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("fast", [True, False], ids=["swapped", "stock"])
def test_exact_vocabularies_grow_by_what_is_new(tied, fast):
    tok = tokenizer()
    model = llama(vocab_size=len(tok), tie_word_embeddings=tied)
    if fast:
        causal_loss.apply(model)
    before = [table.clone() for table in tables(model)]
    size, ends = len(tok), copy.deepcopy(model.generation_config.to_dict())
    added, rows = grown(model, tok)
    assert rows == list(added.ids) == [size, size + 1, size + 2] == tokens.new_rows(model)
    assert len(tok) == model.config.vocab_size == model.vocab_size == size + 3
    assert model.generation_config.to_dict() == ends and model.config.eos_token_id == 2
    for table, old in zip(tables(model), before, strict=True):
        assert table.shape[0] == size + 3
        assert torch.equal(table[:size], old)
        torch.testing.assert_close(table[size:], old.mean(0).expand(3, -1))
    assert (tables(model)[0] is tables(model)[1]) == tied == tokens.is_tied(model)
    head = model.get_output_embeddings()
    assert head.out_features == size + 3
    for token, index in zip(NEW, rows, strict=True):
        assert tok.encode(token, add_special_tokens=False) == [index]
    ids = torch.tensor([[5, *rows]])
    assert model(input_ids=ids).logits.shape == (1, 4, size + 3)


def test_spare_rows_of_a_padded_matrix_are_used_first():
    tok = tokenizer()
    spare, size = 2, len(tok) + 2
    model = llama(vocab_size=size)
    before = tables(model)[0].clone()
    _, rows = grown(model, tok)
    assert rows == [size - 2, size - 1, size] and model.config.vocab_size == size + 1
    table = tables(model)[0]
    assert torch.equal(table[: size - spare], before[: size - spare])
    mean = before[: size - spare].mean(0)  # the spare rows are no words
    torch.testing.assert_close(table[size - spare :], mean.expand(3, -1))
    assert not torch.equal(table[size - spare : size], before[size - spare :])


def test_a_matrix_with_room_keeps_its_size():
    tok = tokenizer()
    model = llama(vocab_size=len(tok) + 40)
    grown(model, tok)
    assert tables(model)[0].shape[0] == model.config.vocab_size == len(tok) - 3 + 40


def test_random_rows_are_spread_like_the_others_and_leave_the_global_state():
    tok = tokenizer()
    model = llama(vocab_size=len(tok), initializer_range=0.3)
    state = torch.random.get_rng_state()
    _, rows = grown(model, tok, [f"<{i}>" for i in range(200)], method="random")
    assert torch.equal(torch.random.get_rng_state(), state)
    table = tables(model)[0]
    old, new = table[: rows[0]], table[rows]
    torch.testing.assert_close(new.std(), old.std(), rtol=0.1, atol=0)
    again, other = llama(vocab_size=rows[0], initializer_range=0.3), tokenizer()
    grown(again, other, [f"<{i}>" for i in range(200)], method="random")
    assert torch.equal(tables(again)[0], table)


def test_interpolation_blends_the_mean_with_the_old_pieces():
    tok = tokenizer()
    pieces = tok.encode("hello world", add_special_tokens=False)
    assert len(pieces) > 1
    for share in (0.0, 0.25, 1.0):
        tok = tokenizer()
        model = llama(vocab_size=len(tok))
        old = tables(model)[0].clone()
        _, (row,) = grown(model, tok, ["hello world"], method="interpolation", interpolation=share)
        expected = (1 - share) * old.mean(0) + share * old[pieces].mean(0)
        torch.testing.assert_close(tables(model)[0][row], expected)


def test_a_bias_of_the_head_grows_too():
    from transformers import PhiConfig, PhiForCausalLM

    tok = tokenizer()
    model = PhiForCausalLM(
        PhiConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=40, num_hidden_layers=1)
    )
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.bias)
    old = head.bias.clone()
    _, rows = grown(model, tok)
    bias = model.get_output_embeddings().bias
    assert torch.equal(bias[: rows[0]], old)
    torch.testing.assert_close(bias[rows], old.mean().expand(3))


def test_what_exists_is_reported_and_not_added_again(caplog):
    tok = tokenizer()
    model = llama(vocab_size=len(tok))
    grown(model, tok, ["<a>", "<b>", "<a>"])
    size = len(tok)
    assert not caplog.records
    added, rows = grown(model, tok, ["<b>", "<c>"])
    assert "already in the vocabulary, not added again: '<b>'" in caplog.text
    assert added.known == ("<b>",) and added.tokens == ("<c>",) and rows == [size]
    assert len(tok) == model.config.vocab_size == size + 1
    assert tokens.new_rows(model) == [size - 2, size - 1, size]
    _, rows = grown(model, tok, ["<b>"])
    assert rows == [] and len(tok) == size + 1


def test_tokens_that_the_tokenizer_got_elsewhere_get_rows_as_well():
    tok = tokenizer()
    model = llama(vocab_size=len(tok))
    size = len(tok)
    tok.add_tokens(["<elsewhere>"])
    _, rows = grown(model, tok, ["<here>"])
    assert rows == [size, size + 1] and model.config.vocab_size == len(tok) == size + 2


def test_special_or_not_decides_what_decoding_drops():
    tok = tokenizer()
    added = tokens.extend(tok, ["<shown>"], special_tokens=False)
    hidden = tokens.extend(tok, ["<hidden>"], special_tokens=True)
    assert "<shown>" in tok.decode(list(added.ids), skip_special_tokens=True)
    assert "<hidden>" not in tok.decode(list(hidden.ids), skip_special_tokens=True)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("<one>", "FG-TOKEN-001: new_tokens is '<one>', a str"),
        (None, "FG-TOKEN-001: new_tokens is None, a NoneType"),
        (["<one>", 7], "FG-TOKEN-001: new_tokens holds 7, a int"),
        ([], "FG-TOKEN-002: new_tokens is empty"),
        (["<one>", " \n"], r"FG-TOKEN-003: new_tokens holds ' \\n'"),
        ([""], "FG-TOKEN-003: new_tokens holds ''"),
    ],
)
def test_lists_that_cannot_be_added(given, code):
    tok = tokenizer()
    size = len(tok)
    with pytest.raises(ConfigError, match=code):
        tokens.extend(tok, given)
    assert len(tok) == size


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"method": "meen"}, "FG-TOKEN-004: method is 'meen'(.|\n)*did you mean 'mean'"),
        ({"interpolation": 1.5}, "FG-TOKEN-005: interpolation is 1.5"),
    ],
)
def test_starts_that_do_not_exist(how, match):
    model, tok = llama(), tokenizer()
    with pytest.raises(ConfigError, match=match):
        grown(model, tok, **how)


def test_an_embedding_that_cannot_grow_is_refused_before_anything_changes():
    model = llama()

    class Hashed(torch.nn.Module):
        weight = torch.zeros(640, 32)

    model.set_input_embeddings(Hashed())
    with pytest.raises(AdapterError, match=r"FG-TOKEN-006: the embedding of .* is a Hashed"):
        tokens.check_growable(model)
    model = llama(tie_word_embeddings=False)
    model.set_output_embeddings(Hashed())
    with pytest.raises(FinegraftError, match=r"FG-TOKEN-006: the head of .* is a Hashed"):
        tokens.check_growable(model)
