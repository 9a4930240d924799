"""``finegraft serve``: a model behind the OpenAI API, with a chat page.

What: flags become settings of an engine and limits of the server. How: the server says its address
on standard error once it answers; with ``--json`` the one object on standard output comes then, not
at the end, so that a program can wait for it. Constraint: a key is never shown. Trade-off: a key on
the command line can be seen by others on the machine; the environment variable cannot.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from finegraft.cli.help import Help
from finegraft.cli.output import Output, quiet_libraries
from finegraft.cli.talk import FourBit, Json
from finegraft.core.errors import ConfigError
from finegraft.serving.engines import ENGINES, is_gguf

KEY_VARIABLE = "FINEGRAFT_API_KEY"


# Turns of a loop for which a thread of torch waits awake for the others, 300,000 unless set. That
# is best for a machine that does nothing else; where two busy programs more wanted two cores,
# 40 tokens took 11 to 17 s with it, 4 s with 10,000 and 2 s with 1,000.
_SPINS = "3000"


def share_the_machine(model: str) -> None:
    """Let torch's threads sleep sooner in this process, unless the environment says otherwise.

    Only before torch is loaded, which reads it then; llama.cpp has threads of its own.
    """
    if not is_gguf(model) and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def adapters_from(words: list[str]) -> dict[str, str]:
    """Adapters by the id that clients use.

    Raises:
        ConfigError: FG-SERVE-005, a word that is not NAME=FOLDER, or a name used twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not name.strip() or not folder.strip() or name in found:
            raise ConfigError(
                "FG-SERVE-005",
                f"--adapter got {word!r}",
                allowed="NAME=FOLDER, each name once",
                fix="for example --adapter pirate=runs/pirate",
            )
        found[name] = folder
    return found


def serve(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, adapter or model folder, GGUF file, hub name or demo."
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=FOLDER", help="Serve an adapter too; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The id that clients use.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help=", ".join(["auto", *ENGINES.names()]))
    ] = "auto",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Others than this machine need a key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="INT", help="0 takes any free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", help=f"Better: set {KEY_VARIABLE}."),
    ] = None,
    slots: Annotated[
        int, typer.Option("--slots", min=1, max=256, metavar="INT", help="Answers at a time.")
    ] = 8,
    queue: Annotated[
        int, typer.Option("--queue", min=0, metavar="INT", help="Requests that may wait.")
    ] = 64,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=16, metavar="INT", help="Longest prompt with answer, in tokens."
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1.0, metavar="SECONDS", help="Longest request.")
    ] = 600.0,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1024, metavar="BYTES", help="Largest request.")
    ] = 4 << 20,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, metavar="INT", help="Processor threads.")
    ] = None,
    load_in_4bit: FourBit = False,
    vllm_python: Annotated[
        str | None,
        typer.Option("--vllm-python", metavar="PATH", help="Interpreter that has vLLM."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a model over the OpenAI API, with a chat page at /."""
    out: Output = ctx.obj
    from finegraft.serving.engines import Settings
    from finegraft.serving.run import check, require_extra
    from finegraft.serving.run import serve as run

    key = api_key or os.environ.get(KEY_VARIABLE) or None
    settings = Settings(
        model=model,
        name=name,
        adapters=adapters_from(adapter or []),
        engine=engine,
        slots=slots,
        context=context,
        threads=threads,
        load_in_4bit=load_in_4bit,
        vllm_python=vllm_python,
    )
    check(host, key)
    require_extra("fastapi", "uvicorn")
    share_the_machine(model)
    from finegraft.serving.app import Limits

    def ready(url: str, loaded: Any) -> None:
        _tell(out, url, [served.id for served in loaded.served], key is not None)

    def stopping() -> None:
        out.note("finishing open answers; Ctrl-C again ends at once")

    out.note(f"loading {model}")
    with quiet_libraries():
        run(
            settings,
            host=host,
            port=port,
            key=key,
            limits=Limits(waiting=queue, seconds=timeout, most_bytes=max_body),
            ready=ready,
            stopping=stopping,
        )


def _tell(out: Output, url: str, names: list[str], has_key: bool) -> None:
    """Say that the server answers, and where."""
    if out.as_json:
        out.result({"url": url, "models": names}, lambda _: None)
        return
    out.note(f"serving {', '.join(names)}")
    out.note(f"chat page  {url}/")
    out.note(f"API        {url}/v1" + (" (needs the API key)" if has_key else ""))
    out.note("Ctrl-C finishes open answers and ends")


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=Help)(serve)
