"""What watching costs: a training's tokens a second with 200 listeners on its page and without.

What: one training of the demo model, started by the page's server; windows with and without open
streams take turns, and the training's own events say how many tokens each window had. Beside it,
the time in which the page opens a run of 200,000 events. How: server, training and listeners are
three processes; the listeners are sockets that one loop reads and throws away. Constraint: the
listeners run on the same machine, so what they cost counts too. Trade-off: windows of some seconds
are noisy; they are compared in pairs, with the interval of a bootstrap over the pairs.

    python benchmarks/ui_listeners.py             about three minutes

Units: seconds, tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-m", "finegraft.cli.main"]
EVENTS = 200_000
WARM_STEPS = 40  # the first ones compile a kernel for each new shape


class Page:
    """The server, signed in to."""

    def __init__(self, address: str, pid: int):
        self.process = psutil.Process(pid)
        self.port = int(address.split(":")[2].partition("/")[0])
        self.cookie = ""
        token = address.partition("#token=")[2]
        self.cookie = self.ask("POST", "/api/session", {"token": token})[1].partition(";")[0]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[Any, str]:
        """The answer and the cookie that came with it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Cookie": self.cookie, "Content-Type": "application/json"}
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status >= 400:
                raise SystemExit(f"{method} {path}: {text.decode()}")
            return json.loads(text or b"null"), answer.getheader("Set-Cookie") or ""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Page]:
    """Run ``finegraft ui`` over a folder."""
    words = ["ui", "--workspace", str(folder), "--port", "0", "--no-open", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen([*COMMAND, *words], text=True, **pipes) as process:
        assert process.stdout is not None
        try:
            yield Page(json.loads(process.stdout.readline())["address"], process.pid)
        finally:
            process.terminate()


async def listener(page: Page, path: str, counts: dict[str, int]) -> None:
    """One reader, until it is cancelled."""
    reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nCookie: {page.cookie}\r\n\r\n"
    writer.write(head.encode())
    try:
        while data := await reader.read(1 << 16):
            counts["events"] += data.count(b'"type":"step"')
            counts["batches"] += data.count(b"event: events")
    finally:
        writer.close()


async def listening(page: Page, path: str, count: int, seconds: float) -> dict[str, int]:
    """Hold streams open for a while; returns what all of them read."""
    counts = {"events": 0, "batches": 0}
    tasks = [asyncio.create_task(listener(page, path, counts)) for _ in range(count)]
    await asyncio.sleep(seconds)
    broken = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {**counts, "broken": len(broken)}


def steps_of(file: Path) -> list[dict[str, Any]]:
    """The steps that a training has told so far."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.startswith('{"type": "step"')]


def rate(steps: list[dict[str, Any]], begin: float, end: float) -> float:
    """Tokens a second of the steps that lie wholly between two times."""
    tokens = seconds = 0.0
    for before, step in itertools.pairwise(steps):
        if begin <= before["time"] and step["time"] <= end:
            took = step["time"] - before["time"]
            tokens += step["tokens_per_second"] * took
            seconds += took
    return tokens / seconds if seconds else float("nan")


def training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Windows by turns, on one training."""
    with served(folder) as page:
        data, _ = page.ask("POST", "/api/data/sample")
        settings = {
            "model": args.model,
            "data": data["path"],
            "max_steps": 100_000,
            "max_length": 128,
            "save_steps": 100_000,
            "report_rows": 0,
            "output": "watched",
        }
        job, _ = page.ask("POST", "/api/jobs", {"kind": "train", "settings": settings})
        file = folder / "runs" / "watched" / "events.jsonl"
        try:
            while len(steps_of(file)) < WARM_STEPS:
                told, _ = page.ask("GET", f"/api/jobs/{job['id']}")
                if told["state"] != "running":
                    raise SystemExit(told["output"])
                time.sleep(0.5)
            windows = _windows(args, page, file)
        finally:
            page.ask("POST", f"/api/jobs/{job['id']}/stop")
        while page.ask("GET", f"/api/jobs/{job['id']}")[0]["state"] == "running":
            time.sleep(0.2)
    return _compared(windows, steps_of(file))


def _windows(args: argparse.Namespace, page: Page, file: Path) -> list[dict[str, Any]]:
    found = []
    for number in range(2 * args.pairs):
        watched = number % 2 == (number // 2) % 2  # which of a pair is first changes
        place = file.stat().st_size
        path = f"/api/runs/watched/stream?from={place}"
        begin, used = time.time(), _busy(page)
        if watched:
            read = asyncio.run(listening(page, path, args.listeners, args.seconds))
        else:
            time.sleep(args.seconds)
            read = {}
        end = time.time()
        shares = [(b - a) / (end - begin) for a, b in zip(used, _busy(page), strict=True)]
        found.append(
            {"watched": watched, "begin": begin, "end": end, "read": read, "shares": shares}
        )
    return found


def _busy(page: Page) -> list[float]:
    """Processor seconds of the server and of the listeners so far."""
    times = [process.cpu_times() for process in (page.process, psutil.Process())]
    return [one.user + one.system for one in times]


def _compared(windows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> dict[str, Any]:
    for window in windows:
        window["rate"] = rate(steps, window["begin"], window["end"])
    pairs = [windows[i : i + 2] for i in range(0, len(windows), 2)]
    ratios = []
    for pair in pairs:
        by = {window["watched"]: window["rate"] for window in pair}
        ratios.append(by[True] / by[False])
    chance = random.Random(0)
    means = sorted(statistics.mean(chance.choices(ratios, k=len(ratios))) for _ in range(4000))
    read = [window["read"] for window in windows if window["read"]]
    return {
        "alone": statistics.mean(w["rate"] for w in windows if not w["watched"]),
        "watched": statistics.mean(w["rate"] for w in windows if w["watched"]),
        "cost": 1 - statistics.mean(ratios),
        "cost_95": [1 - means[int(0.975 * len(means))], 1 - means[int(0.025 * len(means))]],
        "ratios": ratios,
        "core": {
            name: [
                statistics.mean(w["shares"][i] for w in windows if w["watched"] == on)
                for on in (False, True)
            ]
            for i, name in enumerate(("server", "listeners"))
        },
        "read": read,
        "steps": len(steps),
    }


def opening(folder: Path) -> dict[str, float]:
    """Seconds in which the page has list, run and curves of a long run, first and again."""
    run = folder / "runs" / "long"
    run.mkdir(parents=True)
    chance = random.Random(0)
    with open(run / "events.jsonl", "w", encoding="utf-8") as out:
        for number in range(1, EVENTS + 1):
            out.write(json.dumps(_step(number, chance.random())) + "\n")
    with served(folder) as page:
        found = []
        for _ in range(2):
            began = time.perf_counter()
            for path in ("/api/runs", "/api/runs/long", "/api/runs/long/series?points=600"):
                page.ask("GET", path)
            found.append(time.perf_counter() - began)
    megabytes = (run / "events.jsonl").stat().st_size / 1e6
    return {"first": found[0], "again": found[1], "megabytes": megabytes}


def _step(number: int, loss: float) -> dict[str, Any]:
    return {
        "type": "step",
        "time": 1.0 + number,
        "step": number,
        "total_steps": EVENTS,
        "loss": loss,
        "learning_rate": 1e-4,
        "grad_norm": loss / 2,
        "tokens_per_second": 400.0,
        "memory_bytes": 10**9 + number,
        "seconds": float(number),
        "eta_seconds": 1.0,
        "next_save_step": EVENTS,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--listeners", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a window")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        opened = opening(Path(name) / "long")
        found = training(args, Path(name) / "train")
    if args.json:
        print(json.dumps({"opening": opened, **found}))
        return
    print(
        f"a run of {EVENTS:,} events ({opened['megabytes']:.0f} MB) opens in "
        f"{opened['first']:.2f} s, again in {opened['again']:.2f} s"
    )
    low, high = found["cost_95"]
    print(
        f"{args.listeners} listeners: {found['watched']:.0f} tokens/s, without "
        f"{found['alone']:.0f}: cost {found['cost']:.1%} (95%: {low:.1%} to {high:.1%}, "
        f"{args.pairs} pairs of {args.seconds:g} s)"
    )
    for name, (idle, busy) in found["core"].items():
        print(f"{name}: {idle:.1%} of a core without, {busy:.1%} with")
    print(f"ratios: {', '.join(f'{ratio:.3f}' for ratio in found['ratios'])}")
    print(f"each window of listeners read: {found['read']}")


if __name__ == "__main__":
    main()
