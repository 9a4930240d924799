"""Padding that is not the end, and never a new token."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast

from finegraft.core.errors import ModelError
from finegraft.models.tokenizer import agree, prepare


def toy(*specials, **roles):
    """A tokenizer of six words; ``specials`` follow them, ``roles`` are special-token keywords."""
    words = ["a", "b", "c", "<s>", "</s>", "<|x|>", *specials]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


@pytest.mark.parametrize(
    ("specials", "roles", "pad"),
    [
        (["<pad>"], {"eos_token": "</s>"}, "<pad>"),
        (["<pad>"], {"eos_token": "</s>", "pad_token": "</s>"}, "<pad>"),
        (["<|endoftext|>"], {"eos_token": "</s>", "pad_token": "</s>"}, "<|endoftext|>"),
        (
            ["<unk>", "<|finetune_right_pad_id|>"],
            {"eos_token": "</s>"},
            "<|finetune_right_pad_id|>",
        ),
        (["<unk>"], {"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
        ([], {"eos_token": "</s>", "unk_token": "<|x|>"}, "<|x|>"),
        (["<pad>"], {"eos_token": "</s>", "pad_token": "<|x|>"}, "<|x|>"),
    ],
)
def test_an_existing_token_becomes_pad(specials, roles, pad):
    tokenizer = toy(*specials, **roles)
    size = len(tokenizer)
    assert prepare(tokenizer, None, 77) is tokenizer
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_is_eos is False
    assert len(tokenizer) == size
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "right")


def test_where_nothing_else_exists_pad_is_eos_and_says_so():
    tokenizer = prepare(toy("<|endoftext|>", eos_token="<|endoftext|>"), None, None, "left")
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_is_eos is True
    assert tokenizer.padding_side == "left"


def test_every_end_of_the_model_counts():
    config = LlamaConfig(vocab_size=20, eos_token_id=[4, 6])  # 6 is <|endoftext|>
    tokenizer = prepare(toy("<|endoftext|>", "[PAD]", eos_token="</s>"), config, None)
    assert tokenizer.pad_token == "[PAD]"
    only_ends = prepare(toy("<|endoftext|>", eos_token="</s>"), config, None)
    assert (only_ends.pad_token, only_ends.pad_is_eos) == ("</s>", True)


def test_a_pad_without_an_embedding_row_is_not_taken():
    config = LlamaConfig(vocab_size=7, eos_token_id=4)
    tokenizer = prepare(toy("<unk>", "<pad>", eos_token="</s>"), config, None)
    assert tokenizer.pad_token == "<unk>"  # 6 fits into 7 rows, <pad> would be row 7


def test_no_token_that_could_pad():
    with pytest.raises(ModelError, match="FG-MODEL-012: the tokenizer has neither"):
        prepare(toy(), None, None)


def test_the_model_agrees_and_keeps_its_own_ends():
    sizes = {"vocab_size": 12, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=4, bos_token_id=3))
    model.generation_config.eos_token_id = [4, 5]
    tokenizer = prepare(toy("<pad>", eos_token="</s>"), model.config, 8)
    agree(model, tokenizer)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 6
    assert model.generation_config.eos_token_id == [4, 5]
    model.generation_config.eos_token_id = None
    agree(model, tokenizer)
    assert model.generation_config.eos_token_id == 4
