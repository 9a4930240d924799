"""GGUF files: converted once, exactly, or refused."""

import json
import os

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finegraft.core.errors import ModelError
from finegraft.models import gguf as reader
from finegraft.models.locate import locate

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "ĠĠ", "Ċ"]
D, HEADS, KV, FF, LAYERS = 32, 4, 2, 64, 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, quantize="F32", pre="smollm"):
    """A random llama of two layers; returns its tensors as they went in."""
    rng = np.random.default_rng(0)
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(128)
    out.add_embedding_length(D)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FF)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV)
    out.add_rope_dimension_count(D // HEADS)
    out.add_rope_freq_base(100000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(WORDS))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(WORDS)
    out.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    out.add_token_merges(["Ġ Ġ"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(2)
    shapes = {"token_embd.weight": (len(WORDS), D), "output_norm.weight": (D,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (D,),
            f"blk.{i}.ffn_norm.weight": (D,),
            f"blk.{i}.attn_q.weight": (D, D),
            f"blk.{i}.attn_k.weight": (D // HEADS * KV, D),
            f"blk.{i}.attn_v.weight": (D // HEADS * KV, D),
            f"blk.{i}.attn_output.weight": (D, D),
            f"blk.{i}.ffn_gate.weight": (FF, D),
            f"blk.{i}.ffn_up.weight": (FF, D),
            f"blk.{i}.ffn_down.weight": (D, FF),
        }
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    kind = gguf.GGMLQuantizationType[quantize]
    for name, value in tensors.items():
        if value.ndim == 1:
            out.add_tensor(name, value)
        else:
            data = gguf.quants.quantize(value, kind)
            out.add_tensor(name, data, raw_dtype=kind)
            tensors[name] = gguf.quants.dequantize(data, kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return tensors


@pytest.mark.parametrize(
    ("quantize", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")]
)
def test_weights_are_the_files(tmp_path, quantize, dtype):
    tensors = write(tmp_path / "m.gguf", quantize)
    folder = reader.convert(tmp_path / "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    wanted = getattr(torch, dtype)
    assert model.dtype == wanted
    up = torch.from_numpy(tensors["blk.1.ffn_up.weight"]).to(wanted)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, up)
    # q is stored with each head's halves interleaved: undoing it must leave the rows a permutation
    q = torch.from_numpy(tensors["blk.0.attn_q.weight"]).to(wanted)
    halves = q.view(HEADS, D // HEADS // 2, 2, D).transpose(1, 2).reshape(D, D)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, halves)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_configuration_is_clean(tmp_path):
    write(tmp_path / "m.gguf")
    values = json.loads((reader.convert(tmp_path / "m.gguf") / "config.json").read_text())
    assert values["model_type"] == "llama"
    assert values["tie_word_embeddings"] is True
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 100000.0
    assert values["rms_norm_eps"] == 1e-5
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 2)
    assert not [key for key in values if "path" in key or "quant" in key]


@pytest.mark.parametrize(("pre", "pieces"), [("smollm", ["ĠĠ", "1", "2"]), ("gpt-2", None)])
def test_digits_are_split_off_before_the_spaces_where_the_file_says_so(tmp_path, pre, pieces):
    write(tmp_path / "m.gguf", pre=pre)
    tokenizer = AutoTokenizer.from_pretrained(reader.convert(tmp_path / "m.gguf"))
    found = tokenizer.convert_ids_to_tokens(tokenizer("  12").input_ids)
    assert found == (pieces or ["Ġ", "Ġ", "1", "2"])
    assert tokenizer("<|im_start|>a").input_ids == [1, WORDS.index("a")]
    assert tokenizer.model_max_length == 128


def test_the_second_time_reads_the_cache_and_a_changed_file_does_not(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    write(file)
    first = reader.convert(file)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "reader", lambda path: pytest.fail("converted again"))
        assert reader.convert(file) == first
    os.utime(file, ns=(1, 1))
    assert reader.convert(file) != first


def test_locate_takes_gguf_files(tmp_path):
    write(tmp_path / "m.gguf")
    found = locate(tmp_path / "m.gguf")
    assert (found.kind, (found.path / "model.safetensors").is_file()) == ("directory", True)


@pytest.mark.parametrize("keep", [0, 3, 20, 500, 4000, -64])
def test_a_file_cut_off_anywhere_is_refused_and_nothing_is_kept(tmp_path, keep):
    file = tmp_path / "m.gguf"
    write(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*m\.gguf is not a readable GGUF file"):
        reader.convert(file)
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_another_kind_of_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*starts with b'PK"):
        reader.convert(tmp_path / "m.gguf")


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    file = tmp_path / "m.gguf"
    write(file)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"llama", b"lxama"))
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*architecture 'lxama'"):
        reader.convert(file)
