"""Tokens a second of the engine in the process, beside ``finegraft generate`` of the same batch.

What: 1, 4 and 8 streams over HTTP against as many prompts in one call of ``complete``, greedy, the
same prompts and lengths. How: server and batch are processes of their own that take turns; a turn
is all answers from the first request to the last token, prompts included. Constraint: an answer
that ends early would leave the others more of the machine, so prompts ask for long stories and
every answer must reach its full length. Trade-off: what the clients cost counts against the server.

    python benchmarks/serve_streams.py            about three minutes
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _clients import COMMAND, Counts, Server, stream
from _turns import Contender

THINGS = "a lighthouse,a violin,the winter,a train,two brothers,an old map,a garden,the moon"
PROMPTS = [f"Write a very long story about {thing}." for thing in THINGS.split(",")]


def worker(job: dict) -> None:
    """Answer batches of ``complete`` as standard input says."""
    import torch

    from finegraft import FastLanguageModel
    from finegraft.inference.generate import complete

    torch.set_num_threads(job["threads"])
    model, tokenizer = FastLanguageModel.from_pretrained(job["model"])
    FastLanguageModel.for_inference(model)
    print(json.dumps({"event": "ready"}), flush=True)
    for line in sys.stdin:
        chats = [[{"role": "user", "content": text}] for text in PROMPTS[: int(line)]]
        began = time.monotonic()
        texts = complete(model, tokenizer, chats, max_new_tokens=job["tokens"])
        seconds = time.monotonic() - began
        short = sum(len(tokenizer(text)["input_ids"]) < job["tokens"] * 0.9 for text in texts)
        print(json.dumps({"event": "done", "seconds": seconds, "short": short}), flush=True)


async def at_once(url: str, count: int, tokens: int) -> tuple[float, Counts]:
    """All streams together; return seconds and what came."""
    counts = Counts()
    bodies = [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS[:count]]
    more = {"max_tokens": tokens, "temperature": 0}
    began = time.monotonic()
    ends = await asyncio.gather(*(stream(url, {**body, **more}, counts) for body in bodies))
    seconds = time.monotonic() - began
    if set(ends) != {"whole"}:
        raise SystemExit(f"streams ended as {ends}")
    return seconds, counts


def run(args: argparse.Namespace) -> dict:
    """Take turns; return medians and their ratios."""
    counts = [int(word) for word in args.streams.split(",")]
    found: dict[int, dict[str, list[float]]] = {n: {"serve": [], "generate": []} for n in counts}
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({**vars(args), "worker": None}))
        batch = Contender("generate", job, Path(folder) / "generate.log", Path(__file__).name)
        command = [*COMMAND, args.model, "--port", "0", "--json", "--threads", str(args.threads)]
        server = Server(command, Path(folder) / "serve.log")
        try:
            batch.read()
            for turn in range(args.turns + 1):
                for n in counts:
                    seconds, said = asyncio.run(at_once(server.url, n, args.tokens))
                    other = batch.ask(str(n))
                    if said.tokens < 0.9 * n * args.tokens or other["short"]:
                        raise SystemExit(f"an answer ended early: {said.tokens}, {other}")
                    if turn:  # the first compiles and warms up
                        found[n]["serve"].append(n * args.tokens / seconds)
                        found[n]["generate"].append(n * args.tokens / other["seconds"])
        finally:
            server.stop()
            batch.process.kill()
            batch.process.wait()
    out = {}
    for n, each in found.items():
        pairs = zip(each["serve"], each["generate"], strict=True)
        out[f"{n} streams"] = {
            **{name: round(statistics.median(rates), 1) for name, rates in each.items()},
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            "all": {name: [round(r) for r in rates] for name, rates in each.items()},
        }
    return out


def main() -> None:
    """Command line; two words are a worker, as ``_turns`` starts it."""
    if len(sys.argv) == 3 and sys.argv[1] == "generate":
        worker(json.loads(Path(sys.argv[2]).read_text()))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(run(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
