"""What is read off a chat template for Ollama, what is refused, what is told."""

from __future__ import annotations

import pytest
from test_data_tiny import CHATML, tiny

from finegraft.core.errors import ExportError
from finegraft.data.chat_templates import get_chat_template, template_names
from finegraft.export import _template

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
