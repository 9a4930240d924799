"""GGUF files of tiny models: what is in them, what is refused, what a failure leaves."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from test_data_tiny import SPECIAL
from tokenizers import AddedToken, Regex, pre_tokenizers
from training_tiny import llama, tokenizer

from finegraft.core.errors import ExportError, StorageError
from finegraft.export import FORMATS
from finegraft.export import gguf as exporter
from finegraft.export.gguf import architectures, pretokenizers, quantize, types, writer
from finegraft.export.gguf.architectures import rotated


def value(file, key):
    return GGUFReader(file).get_field(key).contents()


def tensors(file):
    return {t.name: t for t in GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def pair():
    return llama(), tokenizer()


@pytest.fixture
def folder(pair, tmp_path):
    model, words = pair
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    words.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- files ---------------------------------------------------------------------------------------


def test_a_folder_of_shards_and_a_model_in_memory_give_the_same_tensors(folder, pair, tmp_path):
    assert len(list(folder.glob("*.safetensors"))) > 1
    a = exporter.write(folder, tmp_path / "a.gguf", "q8_0")[0]
    b = exporter.write(pair, tmp_path / "b.gguf", "Q8-0")[0]
    mine, other = tensors(a.file), tensors(b.file)
    assert mine.keys() == other.keys()
    assert all((mine[name].data == other[name].data).all() for name in mine)
    assert a.bytes == a.file.stat().st_size and a.type == b.type == "q8_0"


def test_several_types_in_one_pass_are_named_after_themselves(folder, tmp_path):
    records = exporter.write(folder, tmp_path / "out", ["f16", "q4_0"], name="mine")
    assert [r.file.name for r in records] == ["mine-F16.gguf", "mine-Q4_0.gguf"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [r.file.name for r in records]
    assert value(records[0].file, "general.name") == "mine"
    assert records[1].bytes < records[0].bytes


def test_the_file_says_what_the_configuration_says(pair, tmp_path):
    file = exporter.write(pair, tmp_path / "m.gguf", "f32")[0].file
    assert value(file, "general.architecture") == "llama"
    assert value(file, "llama.attention.head_count_kv") == 2
    assert value(file, "llama.rope.freq_base") == pair[0].config.rope_parameters["rope_theta"]
    assert value(file, "llama.context_length") == 256
    assert value(file, "general.file_type") == 0
    assert value(file, "tokenizer.chat_template") == pair[1].chat_template
    assert value(file, "tokenizer.ggml.eos_token_id") == 2
    assert value(file, "tokenizer.ggml.add_bos_token") is False
    listed, kinds = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    assert len(listed) == 640 and listed[-1] == "[PAD639]"
    assert kinds[2] == 3 and kinds[-1] == 5  # control, unused


def test_q_and_k_are_reordered_and_undoing_it_gives_them_back(pair, tmp_path):
    file = exporter.write(pair, tmp_path / "m.gguf", "f32")[0].file
    wanted = pair[0].model.layers[0].self_attn.k_proj.weight.detach()
    found = torch.tensor(tensors(file)["blk.0.attn_k.weight"].data)
    assert not torch.equal(found, wanted)
    heads = 2
    back = found.reshape(heads, -1, 2, wanted.shape[1]).transpose(1, 2).reshape(wanted.shape)
    assert torch.equal(back, wanted)
    assert torch.equal(rotated(wanted[:, 0], heads), rotated(wanted, heads)[:, 0])  # a bias


def test_a_tied_head_is_left_out_and_an_untied_one_is_kept(pair, tmp_path):
    file = exporter.write(pair, tmp_path / "tied.gguf", "f32")[0].file
    assert "output.weight" not in tensors(file)
    model = llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)  # untied by hand
    file = exporter.write((model, pair[1]), tmp_path / "untied.gguf", "f32")[0].file
    assert torch.equal(torch.tensor(tensors(file)["output.weight"].data), model.lm_head.weight)


def test_llama_3_frequencies_are_a_tensor(pair, tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = llama(rope_parameters=rope)
    file = exporter.write((model, pair[1]), tmp_path / "m.gguf", "f32")[0].file
    factors = torch.tensor(tensors(file)["rope_freqs.weight"].data)
    plain = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq)


def test_other_ends_of_an_answer_are_told(pair, tmp_path):
    model = llama()
    model.generation_config.eos_token_id = [2, 5]
    file = exporter.write((model, pair[1]), tmp_path / "m.gguf", "f32")[0].file
    assert value(file, "tokenizer.ggml.eot_token_id") == 5


def test_phi_3_is_told_by_its_name_only_where_its_tokens_are(pair, tmp_path):
    """llama.cpp reads the rules for blanks from the name, and fails where the tokens lack."""
    file = exporter.write(pair, tmp_path / "m.gguf", "f32", name="my-Phi-3-tune")[0].file
    assert value(file, "general.name") == "my-phi 3-tune"
    words = tokenizer()
    plain = ["<unk>", "<s>"]
    words.add_tokens([AddedToken(t, special=True) for t in plain], special_tokens=True)
    swallowing = ["</s>", *SPECIAL[1:]]
    words.add_tokens(
        [AddedToken(t, special=True, rstrip=True) for t in swallowing], special_tokens=True
    )
    file = exporter.write((pair[0], words), tmp_path / "m.gguf", "f32", name="mine")[0].file
    assert value(file, "general.name") == "mine (phi-3)"


# --- types ---------------------------------------------------------------------------------------


def layout(layers=16, heads_per_key=1, has_output=True, architecture="llama"):
    return types.Layout(architecture, layers, heads_per_key, has_output)


def kind(label, name, columns=256, **of):
    shape = (8, columns)
    return types.choose([(name, shape)], types.FILE_TYPES[label], layout(**of))[name]


@pytest.mark.parametrize(
    ("label", "name", "of", "wanted"),
    [
        ("q4_k_m", "blk.3.attn_q.weight", {}, Type.Q4_K),
        ("q4_k_m", "blk.0.attn_v.weight", {}, Type.Q6_K),  # first eighth
        ("q4_k_m", "blk.3.attn_v.weight", {}, Type.Q4_K),
        ("q4_k_m", "blk.4.ffn_down.weight", {}, Type.Q6_K),  # every third
        ("q4_k_m", "blk.15.ffn_down.weight", {}, Type.Q6_K),  # last eighth
        ("q4_k_s", "blk.3.attn_v.weight", {}, Type.Q5_K),
        ("q4_k_s", "blk.4.attn_v.weight", {}, Type.Q4_K),
        ("q4_k_m", "blk.11.attn_v.weight", {"layers": 80, "heads_per_key": 8}, Type.Q5_K),
        ("q2_k", "blk.3.attn_v.weight", {"heads_per_key": 4}, Type.Q4_K),
        ("q2_k", "blk.3.attn_v.weight", {"heads_per_key": 2}, Type.Q3_K),
        ("q3_k_m", "blk.1.attn_qkv.weight", {}, Type.Q5_K),
        ("q4_k_m", "output.weight", {}, Type.Q6_K),
        ("q4_k_m", "token_embd.weight", {}, Type.Q4_K),
        ("q4_k_m", "token_embd.weight", {"has_output": False}, Type.Q6_K),
        ("q8_0", "output.weight", {}, Type.Q8_0),
        ("q4_0", "output.weight", {}, Type.Q6_K),
        ("q4_k_m", "blk.3.attn_q.weight", {"columns": 96}, Type.Q5_0),
        ("q5_k_m", "blk.3.attn_q.weight", {"columns": 96}, Type.Q5_1),
        ("q6_k", "blk.3.attn_q.weight", {"columns": 96}, Type.Q8_0),
        ("q2_k", "blk.3.attn_q.weight", {"columns": 96}, Type.Q4_0),
        ("q8_0", "blk.3.attn_q.weight", {"columns": 40}, Type.F16),
        ("f16", "blk.3.attn_norm.weight", {}, Type.F32),
        ("q8_0", "position_embd.weight", {}, Type.F32),
    ],
)
def test_which_tensor_gets_which_type(label, name, of, wanted):
    of = dict(of)
    assert kind(label, name, of.pop("columns", 256), **of) == wanted


def test_pieces_and_threads_change_no_byte(monkeypatch):
    rows = torch.randn(70, 256, generator=torch.Generator().manual_seed(0))
    whole = quantize.encode(rows.numpy(), Type.Q8_0).tobytes()
    monkeypatch.setattr(quantize, "_PIECE", 256 * 9)
    for count in (1, 3):
        with quantize.ThreadPoolExecutor(count) as pool:
            parts = list(quantize.pieces(rows, Type.Q8_0, pool, count))
        assert len(parts) == 8 and b"".join(p.tobytes() for p in parts) == whole


def test_without_libgguf_the_plain_types_have_the_same_bytes(monkeypatch):
    rows = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).numpy()
    plain = [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.F16, Type.BF16]
    first = [quantize.encode(rows, of).tobytes() for of in plain]
    monkeypatch.setattr(quantize, "_library", lambda: None)
    assert [quantize.encode(rows, of).tobytes() for of in plain] == first


# --- what is refused -----------------------------------------------------------------------------


def test_an_unknown_type_names_a_near_one(pair, tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-001.*'q4_km'(.|\n)*q4_k_m") as error:
        exporter.write(pair, tmp_path, "q4_km")
    assert "did you mean" in str(error.value)
    with pytest.raises(ExportError, match=r"FG-EXPORT-001"):
        exporter.write(pair, tmp_path, [])


def test_k_quants_without_libgguf_name_both_ways_out(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "_library", lambda: None)
    wide = llama(hidden_size=256, num_attention_heads=8)
    with pytest.raises(ExportError, match=r"FG-EXPORT-002") as error:
        exporter.write((wide, pair[1]), tmp_path, "q4_k_m")
    assert "libgguf" in str(error.value) and "llama-quantize" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_family(pair, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=640, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ExportError, match=r"FG-EXPORT-003.*gpt2"):
        exporter.write((model, pair[1]), tmp_path)


def test_an_unmerged_adapter(pair, tmp_path):
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ExportError, match=r"FG-EXPORT-004(.|\n)*merge_to_16bit"):
        exporter.write((tuned, pair[1]), tmp_path)
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"FG-EXPORT-004"):
        exporter.write(tmp_path / "adapter", tmp_path)


def test_quantized_weights(folder, tmp_path):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"FG-EXPORT-005"):
        exporter.write(folder, tmp_path / "out")


def test_a_tokenizer_that_is_not_fast(pair, tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-006.*not a fast tokenizer"):
        exporter.write((pair[0], object()), tmp_path)


def test_a_way_of_splitting_that_llama_cpp_lacks(pair, tmp_path):
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[aeiou]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(ExportError, match=r"FG-EXPORT-007(.|\n)*qwen2"):
        exporter.write((pair[0], words), tmp_path)
    file = exporter.write((pair[0], words), tmp_path, "f32", pre_tokenizer="olmo")[0].file
    assert value(file, "tokenizer.ggml.pre") == "olmo"


def test_every_splitting_rule_is_told_from_every_other():
    cuts = {
        name: (str(split.pre_tokenize_str(pretokenizers.PROBE)), ignores)
        for name, (split, ignores) in pretokenizers._references().items()
    }
    assert len(set(cuts.values())) == len(cuts)


def test_more_tokens_than_rows(pair, tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-008.*tokens.*100 rows"):
        exporter.write((llama(vocab_size=100), pair[1]), tmp_path)


def test_a_missing_or_left_over_weight(folder, pair, tmp_path):
    shutil.copy(folder / "model.safetensors.index.json", tmp_path / "kept")
    index = json.loads((tmp_path / "kept").read_text())
    first = index["weight_map"]["model.norm.weight"]
    from safetensors.torch import load_file, save_file

    held = load_file(folder / first)
    lost = next(name for name in held if ".1." in name or ".0." in name)
    save_file({k: v for k, v in held.items() if k != lost}, folder / first)
    with pytest.raises(ExportError, match=r"FG-EXPORT-009.*lacks blk"):
        exporter.write(folder, tmp_path / "out")
    save_file({**held, "model.visual.weight": torch.ones(2)}, folder / first)
    with pytest.raises(ExportError, match=r"FG-EXPORT-009.*model.visual.weight"):
        exporter.write(folder, tmp_path / "out")


def test_a_configuration_that_llama_cpp_computes_otherwise(pair, tmp_path):
    model = llama(hidden_act="gelu")
    with pytest.raises(ExportError, match=r"FG-EXPORT-010.*gelu"):
        exporter.write((model, pair[1]), tmp_path)
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ExportError, match=r"FG-EXPORT-010.*dynamic"):
        exporter.write((model, pair[1]), tmp_path)


def test_too_little_space_is_seen_before_writing(pair, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"FG-EXPORT-011"):
        exporter.write(pair, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_source_that_is_none(tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-012.*no-such-folder"):
        exporter.write("no-such-folder", tmp_path)
    with pytest.raises(ExportError, match=r"FG-EXPORT-012.*int"):
        exporter.write(3, tmp_path)


def test_an_unknown_pooling(pair, tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-013.*'max'"):
        exporter.write(pair, tmp_path, pooling="max")


def test_one_name_for_two_types(pair, tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-014"):
        exporter.write(pair, tmp_path / "m.gguf", ["f16", "q8_0"])


def test_a_failure_while_writing_leaves_the_old_file(pair, tmp_path, monkeypatch):
    file = exporter.write(pair, tmp_path / "m.gguf", "f16")[0].file
    before = file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "append", fail)
    with pytest.raises(StorageError, match=r"FG-DISK-001"):
        exporter.write(pair, tmp_path / "m.gguf", "f16")
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_problems_are_listed_without_writing(pair, tmp_path):
    assert exporter.problems(pair, tmp_path, ["q8_0", "f16"]) == []
    found = exporter.problems((llama(hidden_act="gelu"), pair[1]), tmp_path, ["q8_0", "nope"])
    assert [error.code for error in found] == ["FG-EXPORT-001", "FG-EXPORT-010"]
    assert not list(tmp_path.iterdir())


# --- reading back --------------------------------------------------------------------------------


def test_verify_passes_what_was_written_and_names_what_was_changed(pair, tmp_path):
    for record in exporter.write(pair, tmp_path, ["f32", "q8_0", "q4_0"]):
        assert all(check.ok for check in exporter.verify(pair, record.file)), record
    file = tmp_path / f"{pair[0].config.name_or_path or 'LlamaForCausalLM'}-F32.gguf"
    other = llama(seed=1)
    failed = {c.name: c.cause for c in exporter.verify((other, pair[1]), file) if not c.ok}
    assert list(failed) == ["weights"]
    turned = llama(rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    failed = {c.name: c.cause for c in exporter.verify((turned, pair[1]), file) if not c.ok}
    assert "llama.rope.freq_base" in failed["facts"]
    failed = {
        c.name: c.cause for c in exporter.verify((pair[0], tokenizer_without_template()), file)
    }
    assert "tokenizer.chat_template" in failed["tokenizer"]


def tokenizer_without_template():
    words = tokenizer()
    words.chat_template = None
    return words


def test_a_missing_permutation_is_seen(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "rotated", lambda weight, heads: weight)
    file = exporter.write(pair, tmp_path / "m.gguf", "f32")[0].file
    monkeypatch.undo()
    weights = next(c for c in exporter.verify(pair, file) if c.name == "weights")
    assert not weights.ok and "attn_" in weights.cause


def test_the_format_is_found_by_name():
    found = FORMATS.get("gguf")
    assert found is exporter.FORMAT and "q4_k_m" in found.variants


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    def make(**settings):
        given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **settings}
        return get_peft_model(llama(), LoraConfig(**given))

    return make


def test_an_adapter_has_its_pairs_and_its_scale(adapter, tmp_path):
    tuned = adapter()
    record = exporter.write_lora(tuned, tmp_path, name="mine")
    assert record.file.name == "mine-LoRA-F32.gguf"
    assert value(record.file, "general.type") == "adapter"
    assert value(record.file, "adapter.lora.alpha") == 8
    found = tensors(record.file)
    assert len(found) == 2 * 2 * 2
    a = tuned.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight
    assert torch.equal(torch.tensor(found["blk.1.ffn_up.weight.lora_a"].data), a)


def test_rs_lora_is_written_with_alpha_times_the_root_of_the_rank(adapter, tmp_path):
    record = exporter.write_lora(adapter(use_rslora=True), tmp_path / "a.gguf", type="f16")
    assert value(record.file, "adapter.lora.alpha") == pytest.approx(8 * math.sqrt(4))


def test_a_saved_adapter_needs_its_base(adapter, tmp_path):
    adapter().save_pretrained(tmp_path / "saved")
    with pytest.raises(ExportError, match=r"FG-EXPORT-023"):
        exporter.write_lora(tmp_path / "saved", tmp_path / "a.gguf")
    record = exporter.write_lora(tmp_path / "saved", tmp_path / "a.gguf", base=llama().config)
    assert record.bytes == record.file.stat().st_size


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"rank_pattern": {"up_proj": 2}}, "ranks"),
        ({"alpha_pattern": {"up_proj": 2}}, "alphas"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"bias": "lora_only"}, "biases"),
        ({"trainable_token_indices": [1, 2]}, "rows"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_with_its_name(settings, word, adapter, tmp_path):
    with pytest.raises(ExportError, match=rf"FG-EXPORT-021.*{word}(.|\n)*merge"):
        exporter.write_lora(adapter(**settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_targets_without_a_place(adapter, tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-022.*lora_embedding"):
        exporter.write_lora(adapter(target_modules=["embed_tokens"]), tmp_path)
    with pytest.raises(ExportError, match=r"FG-EXPORT-022.*lm_head"):
        exporter.write_lora(adapter(target_modules=["lm_head"]), tmp_path)


def test_adapters_of_other_methods_and_types(pair, adapter, tmp_path):
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ExportError, match=r"FG-EXPORT-020.*IA3"):
        exporter.write_lora(get_peft_model(llama(), config), tmp_path)
    with pytest.raises(ExportError, match=r"FG-EXPORT-020.*without an adapter"):
        exporter.write_lora(pair[0], tmp_path)
    with pytest.raises(ExportError, match=r"FG-EXPORT-015"):
        exporter.write_lora(adapter(), tmp_path, type="q8_0")
