"""``finegraft generate`` and ``finegraft chat``.

What: answers of a model, an adapter or a run in the terminal. How: the model comes from
``FastLanguageModel``, answers from ``inference.generate``; a chat is a list of messages that grows.
Constraint: Ctrl-C stops an answer, not the program; Ctrl-D ends it. A pipe is answered line by
line. Trade-off: what was said of a stopped answer stays in the conversation, as it was read.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from finegraft.cli.help import Help
from finegraft.cli.output import Output, only_warnings, quiet_libraries
from finegraft.core.errors import ConfigError, DataError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run, adapter or model folder, hub name or demo.")
]
Longest = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="INT", help="Longest answer, in tokens.")
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", min=0.0, metavar="NUMBER", help="Above 0 samples; 0 takes the likeliest."
    ),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", metavar="NUMBER", help="Sample from the likeliest with this share."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="INT", help="Makes sampling repeatable.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Quantize the base while loading.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

HELP = """\
/system TEXT  set the system message and start anew (no TEXT: remove it)
/reset        start anew
/exit         leave (Ctrl-D as well); Ctrl-C stops an answer"""


def load(out: Output, name: str, load_in_4bit: bool) -> tuple[Any, Any]:
    """Load a model for answering, with a spinner in a terminal."""
    with out.busy(f"loading {name}"), quiet_libraries(), only_warnings():
        from finegraft.fast import FastLanguageModel

        # no length: a chat may use all the positions that the model has
        model, tokenizer = FastLanguageModel.from_pretrained(
            name, max_seq_length=None, load_in_4bit=load_in_4bit
        )
        FastLanguageModel.for_inference(model)
    return model, tokenizer


def _prompts(words: list[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then one for each line of the file that is not empty.

    Raises:
        DataError: FG-CLI-005, no prompt at all or a file that cannot be read.
    """
    prompts = list(words)
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                "FG-CLI-005", f"cannot read {file}: {error}", fix="--file with a text file, or -"
            ) from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DataError(
            "FG-CLI-005",
            "there is no prompt",
            allowed="prompts in quotes, or --file with one a line (- reads standard input)",
            fix='finegraft generate MODEL "your question"',
        )
    return prompts


def _show_outputs(outputs: list[dict[str, str]], to: Console) -> None:
    for output in outputs:
        if len(outputs) > 1:
            to.print(f"> {output['prompt']}", style="dim", markup=False, soft_wrap=True)
        to.print(output["text"], markup=False, soft_wrap=True)


def generate(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to answer.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="One prompt a line; - is standard input."),
    ] = None,
    max_new_tokens: Longest = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    system: System = None,
    load_in_4bit: FourBit = False,
    as_json: Json = False,
) -> None:
    """Answer prompts, several at a time."""
    out: Output = ctx.obj
    prompts = _prompts(prompt or [], file)
    loaded, tokenizer = load(out, model, load_in_4bit)
    from finegraft.inference.generate import complete

    head = [{"role": "system", "content": system}] if system else []
    with out.busy(f"answering {len(prompts)} prompts"), quiet_libraries():
        texts = complete(
            loaded,
            tokenizer,
            [[*head, {"role": "user", "content": text}] for text in prompts],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    pairs = zip(prompts, texts, strict=True)
    outputs = [{"prompt": asked, "text": said} for asked, said in pairs]
    out.result({"model": model, "outputs": outputs}, lambda to: _show_outputs(outputs, to))


@dataclass
class Chat:
    """A conversation in the terminal.

    Attributes:
        console: Where answers are written.
        interactive: A person is typing; errors are shown and the chat goes on.
        options: Keyword arguments of ``inference.generate.stream``.
        turns: What was asked and answered, for ``--json``.
    """

    model: Any
    tokenizer: Any
    console: Console
    interactive: bool
    options: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def run(self) -> None:
        """Read lines and answer them until the input ends or somebody says /exit."""
        if self.interactive:
            self.console.print("Type a message; /help lists commands.", style="dim")
        while True:
            try:
                line = input("> " if self.interactive else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.console.print("\n(Ctrl-D or /exit leaves)", style="dim")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/system":
            self.system = rest.strip() or None
            self.reset()
        elif name == "/reset":
            self.reset()
        else:
            if name != "/help":
                self.console.print(f"unknown command {name}", style="yellow", markup=False)
            self.console.print(HELP, style="dim", markup=False)

    def _answer(self, line: str) -> None:
        from finegraft.inference.generate import stream

        asked = [*self.messages, {"role": "user", "content": line}]
        said: list[str] = []
        try:
            with contextlib.closing(
                stream(self.model, self.tokenizer, asked, **self.options)
            ) as pieces:
                for piece in pieces:
                    said.append(piece)
                    self.console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.console.out(" [stopped]", end="", highlight=False)
        except DataError as error:
            if not self.interactive:
                raise
            self.console.print(str(error), style="red", markup=False)
            return
        self.console.out("")
        answer = "".join(said)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self.turns.append({"user": line, "assistant": answer})


def chat(
    ctx: typer.Context,
    model: Model,
    system: System = None,
    max_new_tokens: Longest = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    load_in_4bit: FourBit = False,
    as_json: Json = False,
) -> None:
    """Talk with a model in the terminal."""
    out: Output = ctx.obj
    if not 0 < top_p <= 1:
        raise ConfigError(
            "FG-GEN-002", f"top_p is {top_p}", allowed="0 < top_p <= 1", fix="--top-p 0.9"
        )
    loaded, tokenizer = load(out, model, load_in_4bit)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows; lines can still be typed there
            import readline  # noqa: F401  (arrow keys and history in input())
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options |= {"top_p": top_p, "seed": seed}
    talk = Chat(loaded, tokenizer, out.human, interactive, options, system)
    with quiet_libraries():
        talk.run()
    out.result({"model": model, "turns": talk.turns}, lambda _: None)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(cls=Help)(chat)
    app.command(cls=Help)(generate)
