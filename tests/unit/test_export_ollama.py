"""What is read off a chat template for Ollama, what is refused, what is told."""

from __future__ import annotations

import copy

import export_tiny
import pytest
from gguf import GGUFReader
from test_data_tiny import CHATML, tiny

from finegraft.core.errors import ExportError
from finegraft.data.chat_templates import get_chat_template, template_names
from finegraft.export import _save, _template, ollama

COUNTS = (
    "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
)
THINKS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
DATED = "{% set now = strftime_now('%Y') if strftime_now is defined else '' %}" + CHATML


def test_no_template():
    with pytest.raises(ExportError, match="FG-EXPORT-070: the tokenizer has no chat template"):
        _template.derive(tiny(None))


def test_turns_that_depend_on_their_place_are_refused():
    with pytest.raises(ExportError, match=r"FG-EXPORT-071: .*earlier and later"):
        _template.derive(tiny(COUNTS))


def test_words_that_are_lost_are_refused():
    with pytest.raises(ExportError, match=r"FG-EXPORT-071: .*refused or loses words"):
        _template.derive(tiny("{{ messages[-1]['content'] }}"))


@pytest.mark.parametrize("name", template_names())
def test_our_own_templates_are_expressed_whole(name):
    assert _template.derive(get_chat_template(tiny(), name)).differences == ()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (NO_SYSTEM, "system texts are left out"),
        (THINKS, "answers with reasoning in <think> are rendered otherwise"),
        (DATED, "the date stays that of the export"),
    ],
    ids=["system", "think", "date"],
)
def test_what_cannot_be_expressed_is_told(template, said):
    [told] = _template.derive(tiny(template)).differences
    assert told.startswith(said)


def test_a_bos_that_the_template_lacks_is_told():
    [told] = _template.derive(tiny(adds_bos=True)).differences
    assert told == "Ollama puts <|endoftext|> in front, the template does not"


def test_a_bos_is_left_to_ollama_where_the_tokenizer_adds_it():
    derived = _template.derive(get_chat_template(tiny(adds_bos=True), "llama-3"))
    assert derived.bos == "<|endoftext|>" and derived.bos not in derived.go()
    kept = _template.derive(get_chat_template(tiny(), "llama-3"))
    assert kept.bos == "" and "<|im_start|>" in kept.go()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<|im_end|>\n", "<|im_end|>\n"),
        ("a{{b", '{{ "a\\u007b\\u007bb" }}'),
        ("ends with {", '{{ "ends with \\u007b" }}'),
        ('"""', '{{ "\\"\\"\\"" }}'),
        ("a\u200b\t", '{{ "a\\U0000200b\\U00000009" }}'),
    ],
)
def test_text_that_a_parser_would_change_becomes_a_go_string(text, written):
    assert _template.literal(text) == written


def test_neighbours_are_joined_as_ollama_joins_them():
    talk = [{"role": r, "content": c} for r, c in [("system", "s"), ("user", "a"), ("user", "b")]]
    system, joined = _template.collate([*talk, {"role": "system", "content": "t"}])
    assert system == "s\n\nt" and joined[1] == {"role": "user", "content": "a\n\nb"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose chat template is ChatML, with an adapter that matters."""
    folder = export_tiny.base(tmp_path_factory.mktemp("ollama") / "base")
    made, tokenizer = export_tiny.trained(folder)
    return made, get_chat_template(tokenizer, "chatml")


def test_a_folder_for_ollama_create(model, tmp_path):
    options = {"system": "Speak like Yoda.", "temperature": 0.25, "num_ctx": 64}
    for _ in range(2):  # a second export takes the place of the first
        done = _save.export(
            model, tmp_path, "ollama:q8_0", verify=False, options={**options, "dtype": "float32"}
        )
    assert [one.format for one in done] == ["ollama:q8_0"]
    lines = (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"FROM ./{done[0].path.name}" and done[0].path.is_file()
    text = "\n".join(lines)
    assert f'TEMPLATE """{_template.derive(model[1]).go()}"""' in text
    assert 'SYSTEM """Speak like Yoda."""' in text
    assert {"PARAMETER num_ctx 64", "PARAMETER temperature 0.25"} <= {*lines}
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert GGUFReader(str(done[0].path)).tensors


def test_one_type_a_folder(model, tmp_path):
    with pytest.raises(ExportError, match=r"FG-EXPORT-072.*q8_0, f16"):
        _save.export(model, tmp_path, "ollama:q8_0,ollama:f16", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_a_system_text_that_would_end_itself(model, tmp_path):
    with pytest.raises(ExportError, match="FG-EXPORT-073"):
        ollama.write(model, tmp_path, ["f16"], system='say """ twice')


def test_a_template_that_ollama_cannot_express_stops_before_anything_is_written(model, tmp_path):
    tokenizer = copy.deepcopy(model[1])
    tokenizer.chat_template = None
    with pytest.raises(ExportError, match="FG-EXPORT-070"):
        _save.export((model[0], tokenizer), tmp_path, "ollama", verify=False)
    assert list(tmp_path.iterdir()) == []
