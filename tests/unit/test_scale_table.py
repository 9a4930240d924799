"""The table of docs/scale.md: from the script, and its counts from real modules."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale_table
from finegraft import adapters
from scale_table import MODELS, RANK, WAYS, settings


def test_the_page_is_what_the_script_makes():
    page = scale_table.PAGE.read_text(encoding="utf-8")
    for name, text in scale_table.pieces().items():
        assert scale_table.written(name, text, page) == page, (
            "python benchmarks/scale_table.py --write"
        )


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_module(name):
    shape = replace(MODELS[name], layers=2)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
        adapted = adapters.attach(model, "lora", r=RANK, target_modules="all-linear")
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == shape.adapter(RANK)


def test_published_sizes():
    billions = {name: round(shape.parameters / 1e9, 1) for name, shape in MODELS.items()}
    assert billions == {"7B": 6.7, "13B": 13.0, "34B": 33.7, "70B": 69.0}


def test_more_processes_need_less_memory_each_and_never_less_than_what_stays_whole():
    for shape in MODELS.values():
        config = settings()
        needs = [
            sum(scale_table.parts(shape, config, count).values())
            for count in scale_table.COUNTS[1:]
        ]
        assert needs == sorted(needs, reverse=True)
        alone = scale_table.parts(shape, config)
        layers = 2 * shape.layers * shape.layer
        rest = sum(alone.values()) - layers
        assert rest < needs[-1] < sum(alone.values())


def test_what_is_sent():
    """7B: 39,976,960 weights of the LoRA in float32, 6,476,005,376 of the layers in 16 bits."""
    shape, config = MODELS["7B"], settings()
    gradients = 4 * 39_976_960
    assert scale_table.sent(shape, config, 2, False) == gradients
    assert scale_table.sent(shape, config, 8, False) == 7 * gradients // 4
    assert scale_table.sent(shape, config, 8, True) == 7 * (gradients + 2 * 6_476_005_376) // 4
    every = settings(full_finetuning=True)
    assert scale_table.sent(shape, every, 2, False) == 2 * 6_738_415_616
    # layers: together twice, gradients handed out once; the rest is added up in a ring
    rest = 6_738_415_616 - 6_476_005_376
    assert scale_table.sent(shape, every, 2, True) == 3 * 6_476_005_376 + 2 * rest


def test_only_what_training_takes_is_called_shardable():
    """The table and the refusals of ``training.distributed`` agree."""
    from finegraft.core.errors import ConfigError
    from finegraft.training.distributed.sharding import require_possible

    for changes in WAYS.values():
        config = settings(**changes, sharding="fsdp2", nproc=2)
        try:
            require_possible(config)
            takes = True
        except ConfigError:
            takes = False
        assert takes == scale_table.can_shard(config), changes
