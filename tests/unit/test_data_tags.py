"""Marked texts: every layout, tags of words for any tokenizer, and what is wrong with which row."""

from __future__ import annotations

import itertools
import json

import pytest
from test_data_tiny import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finegraft.core.errors import ConfigError, DataError
from finegraft.data import marked, tags
from finegraft.data.tags import IGNORED, Span, Word


def read(rows, names=None, **which):
    return marked.read(rows, marked.columns(rows, **which), names=names)


def found(examples):
    return [
        [(text[s.start : s.end], s.label) for s in spans]
        for text, spans in zip(examples.texts, examples.labels, strict=True)
    ]


WANTED = [[("New York", "city"), ("May 3", "date")], []]
WORDS = [["to", "New", "York", "on", "May", "3"], ["thanks"]]
IOB2 = [["O", "B-city", "I-city", "O", "B-date", "I-date"], ["O"]]


@pytest.mark.parametrize(
    "marks",
    [
        IOB2,
        [["O", "I-city", "I-city", "O", "I-date", "I-date"], ["O"]],
        [["O", "B-city", "E-city", "O", "B-date", "E-date"], ["O"]],
        [["O", "B-city", "L-city", "O", "B-date", "L-date"], ["O"]],
        [["O", "city", "city", "O", "date", "date"], ["O"]],
        ["O B-city I-city O B-date I-date", "O"],
    ],
    ids=["IOB2", "IOB", "IOBES", "BILOU", "plain", "in one text"],
)
def test_words_with_tags_of_any_scheme(marks):
    rows = [{"tokens": w, "ner_tags": t} for w, t in zip(WORDS, marks, strict=True)]
    examples = read(rows)
    assert examples.texts == ["to New York on May 3", "thanks"]
    assert found(examples) == WANTED


def test_numbers_with_names():
    names = ["O", "B-city", "I-city", "B-date", "I-date"]
    rows = [{"words": WORDS[0], "labels": [0, 1, 2, 0, 3, 4]}, {"words": ["thanks"], "labels": [0]}]
    assert found(read(rows, names)) == WANTED
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-033: the rows, row 1: .*0.*class-names"):
        read(rows)
    with pytest.raises(DataError, match=r"FG-CLASS-033: the rows, row 1: the tag 4"):
        read(rows, names[:4])


@pytest.mark.parametrize(
    "marks",
    [
        [{"start": 3, "end": 11, "label": "city"}, {"start": 15, "end": 20, "label": "date"}],
        [{"start": 15, "end": 21, "type": "date"}, {"start": 2, "end": 12, "type": "city"}],
        [[3, 11, "city"], [15, 20, "date"]],
        [{"start": 3, "end": 11, "label": "city", "text": "New York"}, (15, 20, "date")],
    ],
    ids=["objects", "unsorted, with spaces", "lists", "with text"],
)
def test_texts_with_spans(marks):
    rows = [{"text": "to New York on May 3 ", "entities": marks}, {"text": "thanks"}]
    assert found(read(rows)) == WANTED


def test_columns_by_name_and_as_given():
    rows = [{"id": 1, "sentence": "to Rome", "spans": []}]
    assert marked.columns(rows) == marked.Columns("sentence", "spans", False)
    odd = [{"said": ["to", "Rome"], "slots_of": ["O", "B-city"], "tokens": "2"}]
    which = marked.columns(odd, "said", "slots_of")
    assert which == marked.Columns("said", "slots_of", True)
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-002: label_column is 'slot_of'.*slots_of"):
        marked.columns(odd, "said", "slot_of")
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-031: no columns .*\(text, label_id\)"):
        marked.columns([{"text": "a", "label_id": 3}])
    with pytest.raises(DataError, match=r"FG-CLASS-003"):
        marked.columns([{"foo": "a", "bar": 3, "entities": []}])


def test_conll_files(tmp_path):
    text = "-DOCSTART- -X- O O\n\nto TO O\nNew NNP B-city\nYork NNP I-city\n\n\nthanks NN O\n"
    for name, content in (
        ("a.conll", text),
        ("a.txt", text.replace(" ", "\t")),
        ("a.tsv", "\ufeff" + text.replace(" ", "\t")),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        rows = marked.read_file(tmp_path / name)
        assert found(read(rows)) == [[("New York", "city")], []]
    (tmp_path / "b.tsv").write_text("words\ttags\nto Rome\tO B-city\n")
    assert found(read(marked.read_file(tmp_path / "b.tsv"))) == [[("Rome", "city")]]
    (tmp_path / "c.jsonl").write_text(json.dumps({"tokens": ["Rome"], "tags": ["city"]}))
    assert found(read(marked.read_file(tmp_path / "c.jsonl"))) == [[("Rome", "city")]]
    (tmp_path / "d.txt").write_text("to O\nRome\n")
    with pytest.raises(DataError, match=r"FG-CLASS-039: .*d.txt, line 2: 'Rome'"):
        marked.read_file(tmp_path / "d.txt")
    (tmp_path / "d.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"FG-CLASS-039: .*d.txt: no words"):
        marked.read_file(tmp_path / "d.txt")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9\tO\n")
    with pytest.raises(DataError, match=r"FG-CLASS-039: .*d.txt: not UTF-8"):
        marked.read_file(tmp_path / "d.txt")
    with pytest.raises(DataError, match=r"FG-DATA-001"):
        marked.read_file(tmp_path / "none.conll")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"FG-CLASS-032: .*row 2: 2 words and 1 tags"),
        ({"tokens": ["a"], "tags": None}, r"FG-CLASS-032: .*row 2: the column 'tags' holds None"),
        ({"tokens": ["a"], "tags": ["x"]}, r"FG-CLASS-032: .*row 2: the tag 'x' has no B- or I-"),
        ({"tokens": [" "], "tags": ["O"]}, r"FG-CLASS-032: .*row 2: no words"),
    ],
)
def test_rows_of_words_that_are_wrong(row, words):
    with pytest.raises(DataError, match=words):
        read([{"tokens": ["Rome"], "tags": ["B-city"]}, row])


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        ([[0, 9, "city"]], r"FG-CLASS-034: .*row 2: \[0, 9, 'city'\] in a text of 7 characters"),
        ([[4, 3, "city"]], r"FG-CLASS-034: .*row 2"),
        ([[0, 2]], r"FG-CLASS-034: .*row 2: \[0, 2\] is not a span"),
        ([{"start": 3, "end": 7}], r"FG-CLASS-034: .*row 2: .* has no label"),
        ([[2, 3, "city"]], r"FG-CLASS-034: .*row 2: .*nothing but spaces"),
        ("Rome", r"FG-CLASS-034: .*row 2: 'Rome' is not a list"),
        (
            [{"start": 2, "end": 6, "label": "city", "text": "Rome"}],
            r"FG-CLASS-034: .*row 2: characters 2 to 6 are ' Rom', and not 'Rome'",
        ),
        (
            [[0, 7, "trip"], [3, 7, "city"]],
            r"FG-CLASS-035: .*row 2: 'to Rome' \(trip\) and 'Rome' \(city\) overlap",
        ),
    ],
)
def test_rows_of_spans_that_are_wrong(marks, words):
    good = {"text": "to Rome", "entities": [[3, 7, "city"]]}
    with pytest.raises(DataError, match=words):
        read([good, {"text": "to Rome", "entities": marks}])
    with pytest.raises(DataError, match=r"FG-CLASS-004: .*row 2 has no text"):
        read([good, {"text": " ", "entities": []}])


@pytest.mark.parametrize(
    ("given", "spans"),
    [
        ("O O", []),
        ("B-a I-a O B-a", [(0, 2, "a"), (3, 4, "a")]),
        ("B-a B-a", [(0, 1, "a"), (1, 2, "a")]),
        ("I-a I-a I-b", [(0, 2, "a"), (2, 3, "b")]),
        ("B-a I-b", [(0, 1, "a"), (1, 2, "b")]),
        ("O I-a", [(1, 2, "a")]),
        ("B-a E-a I-a", [(0, 2, "a"), (2, 3, "a")]),
        ("S-a S-a U-b", [(0, 1, "a"), (1, 2, "a"), (2, 3, "b")]),
        ("a a O b", [(0, 2, "a"), (3, 4, "b")]),
        ("B-x-ray I-x-ray", [(0, 2, "x-ray")]),
    ],
)
def test_spans_that_tags_stand_for(given, spans):
    assert tags.chunks(given.split()) == spans


def test_names_of_tags():
    examples = read([{"text": "to Rome 3", "spans": [[3, 7, "city"], [8, 9, "date"]]}])
    assert tags.names_for(examples) == ("O", "B-city", "I-city", "B-date", "I-date")
    given = tags.names_for(examples, ["O", "B-date", "I-date", "city"])
    assert given == ("O", "B-date", "I-date", "B-city", "I-city")
    assert tags.counts(examples) == {"city": 1, "date": 1}
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-037: the rows, row 1: unknown tag 'city'"):
        tags.names_for(examples, ["date"])
    with pytest.raises(DataError, match=r"(?s)FG-CLASS-037: .*row 1: .*'date'.*'data'"):
        tags.require_known(examples, ["O", "B-city", "I-city", "B-data", "I-data"])
    with pytest.raises(DataError, match=r"FG-CLASS-038: the rows: no word"):
        tags.names_for(read([{"text": "to", "spans": []}]))


def test_where_words_begin():
    def cut(text):
        places = [*sorted(tags.beginnings(text)), len(text)]
        return [text[a:b].strip() for a, b in itertools.pairwise(places)]

    assert "|".join(cut("Don't pay $12.50, at 10am!")) == "Don|'|t|pay|$|12|.|50|,|at|10am|!"
    assert cut("去北京 on 5月") == ["去", "北", "京", "on", "5", "月"]
    assert cut("नमस्ते दिल्ली") == ["नमस्ते", "दिल्ली"]


def test_chinese_words_are_joined_without_spaces():
    text, places = marked.join(["去", "北京", "by", "train", "明天"])
    assert text == "去北京 by train 明天"
    assert [text[a:b] for a, b in places] == ["去", "北京", "by", "train", "明天"]


def wordpieces(lower=True):
    vocabulary = ["[UNK]", "to", "bar", "##ton", "on", "3", "##pm", ".", "é", "e"]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=lower)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def test_the_first_sub_token_carries_the_tag():
    text = "to Barton on 3pm."
    tokens = wordpieces()(text, return_offsets_mapping=True)
    seen = tags.words(text, tokens["offset_mapping"])
    assert seen == [Word(0, 0, 2), Word(1, 3, 9), Word(3, 10, 12), Word(4, 13, 16), Word(6, 16, 17)]
    ids = {"O": 0, "B-city": 1, "I-city": 2, "B-time": 3, "I-time": 4}
    marks, odd = tags.encode([Span(3, 9, "city"), Span(13, 17, "time")], seen, ids, 7)
    assert marks == [0, 1, IGNORED, 0, 3, IGNORED, 4] and odd == 0


def test_byte_tokens_with_spaces_and_several_for_one_letter():
    text = "hello world 😀 bye"
    offsets = tiny()(text, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) > 4
    seen = tags.words(text, offsets)
    assert [text[w.start : w.end] for w in seen] == ["hello", "world", "😀", "bye"]
    assert tags.words(" a b", [(0, 2), (2, 4)]) == [Word(0, 1, 2), Word(1, 3, 4)]


def test_spans_that_do_not_fit_the_words_teach_nothing():
    seen = [Word(0, 0, 2), Word(1, 3, 9), Word(2, 10, 13)]
    ids = {"O": 0, "B-x": 1, "I-x": 2}
    assert tags.encode([Span(3, 8, "x")], seen, ids, 3) == ([0, IGNORED, 0], 1)
    assert tags.encode([Span(10, 20, "x")], seen, ids, 3) == ([0, 0, IGNORED], 0)  # cut off
    assert tags.encode([Span(30, 40, "x")], seen, ids, 3) == ([0, 0, 0], 0)
    assert tags.words("xbarton on", [(4, 7), (8, 10)]) == [Word(1, 8, 10)]  # the rest of a word


def test_a_tokenizer_without_offsets():
    with pytest.raises(ConfigError, match=r"FG-CLASS-040: object does not say"):
        tags.require_offsets(object())
    tags.require_offsets(tiny())
