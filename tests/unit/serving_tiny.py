"""A server in a thread, a tiny model behind it, and an engine that does as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import training_tiny
import uvicorn

from finegraft.core.errors import FinegraftError
from finegraft.serving.app import build
from finegraft.serving.engines import Ask, Embedded, Engine, Piece, Served
from finegraft.serving.engines._contract import CHAT, COMPLETIONS, EMBEDDINGS
from finegraft.serving.run import bind

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_model(folder: Path, **changes: Any) -> Path:
    """A random llama with a chat template."""
    changes = {"initializer_range": 0.3, **changes}  # smaller ones say nothing at all
    model, tokenizer = training_tiny.llama(**changes), training_tiny.tokenizer()
    tokenizer.chat_template = CHATML
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int) -> Path:
    """A random LoRA on it that says something else."""
    import torch

    from finegraft import adapters, opening

    opened = opening.open_model(base)
    torch.manual_seed(seed)
    model = adapters.attach(opened.model, "lora", r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    opening.write_note(model, folder)
    return folder


@contextlib.contextmanager
def running(engine: Engine, **options: Any) -> Iterator[str]:
    """Serve an engine on a free port; yields ``http://127.0.0.1:PORT``."""
    listener = bind("127.0.0.1", 0)
    started, servers, failed = threading.Event(), [], []

    async def main() -> None:
        try:
            await engine.start()
            config = uvicorn.Config(
                build(engine, **options), log_config=None, lifespan="off", access_log=False
            )
            server = uvicorn.Server(config)
            servers.append((server, asyncio.get_running_loop()))
            asyncio.get_running_loop().call_later(0.05, started.set)
            await server.serve(sockets=[listener])
        except FinegraftError as error:
            failed.append(error)  # raised again by whoever waits
            started.set()
        finally:
            await engine.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    started.wait(60)
    if failed:
        raise failed[0]
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        servers[0][0].should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        listener.close()


def send(
    url: str,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """One request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} if data is not None else {}
    try:
        connection.request(
            method or ("GET" if data is None else "POST"), path, data, {**sent, **(headers or {})}
        )
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def code(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    """Status and our code of an error answer, which must have the API's shape."""
    error = json.loads(answer[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer[0], error["code"]


def wait_for(condition: Any, seconds: float = 5.0) -> float:
    """Seconds until ``condition()`` holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - began


class Scripted:
    """Says ``words``, waiting ``pause`` seconds before each."""

    features = frozenset({CHAT, COMPLETIONS, EMBEDDINGS})

    def __init__(self, words: int = 3, pause: float = 0.0, slots: int = 2):
        self.words, self.pause, self.slots = words, pause, slots
        self.served = (Served("scripted"), Served("tuned", "scripted"))
        self.open = 0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        self.open += 1
        try:
            for number in range(self.words):
                await asyncio.sleep(self.pause)
                yield Piece(text=f"{ask.model}{number} ")
            yield Piece(reason="stop", prompt_tokens=1, completion_tokens=self.words)
        finally:
            self.open -= 1

    async def embed(self, model: str, texts: list[str | list[int]]) -> Embedded:
        return Embedded([[1.0, 0.0] for _ in texts], len(texts))
