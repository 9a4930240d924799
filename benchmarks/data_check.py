"""How fast `finegraft data check` is, and how much memory a million rows take.

    python benchmarks/data_check.py                 rows a second of every stage
    python benchmarks/data_check.py --rows 1000000  one file of that many rows, 1,000 bytes each
    python benchmarks/data_check.py --fuzz 200000   damaged rows; ends with how many it survived

Rows are made: English-like sentences with numbers, names, addresses of the web and a little code.
"""

# ruff: noqa: E501, SIM905
from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from finegraft.data.audit import audit
from finegraft.data.audit.reading import layout_of, rows_of
from finegraft.data.audit.scan import scan

_VERBS = "opens closes reads writes holds finds makes takes keeps turns moves shows meets".split()
_SYLLABLES = "ka re mi to lan ver dos bel tri gan sol fer mun pal quo zen hal ist or und".split()


def words(dice: random.Random, count: int) -> list[str]:
    """A vocabulary of made words."""
    return ["".join(dice.choices(_SYLLABLES, k=dice.randint(1, 4))) for _ in range(count)]


def text(dice: random.Random, vocabulary: list[str], chars: int) -> str:
    """Prose of about ``chars`` characters."""
    parts, size = [], 0
    while size < chars:
        sentence = ["The", *dice.choices(vocabulary, k=dice.randint(4, 14)), dice.choice(_VERBS)]
        if dice.random() < 0.2:
            sentence += ["in", str(dice.randint(1850, 2030))]
        if dice.random() < 0.03:
            sentence += [
                "see",
                f"https://www.{dice.choice(vocabulary)}.org/{dice.choice(vocabulary)}",
            ]
        if dice.random() < 0.02:
            sentence += ["as", "in", f"`{dice.choice(vocabulary)}(x, {dice.randint(1, 9)})`"]
        line = " ".join(sentence) + dice.choice([". ", ". ", "? ", ".\n"])
        parts.append(line)
        size += len(line)
    return "".join(parts).strip()


def make(path: Path, rows: int, chars: int) -> None:
    """A file of JSON lines whose rows have about ``chars`` characters."""
    dice = random.Random(3407)
    vocabulary = words(dice, 8000)
    pool = [text(dice, vocabulary, chars // 4) for _ in range(20_000)]
    with open(path, "w", encoding="utf-8") as out:
        for number in range(rows):
            prompt, *answer = dice.choices(pool, k=4)
            row = {"prompt": f"{number}: {prompt}", "completion": " ".join(answer)}
            out.write(json.dumps(row) + "\n")


def stages(rows: int, chars: int, folder: Path) -> None:
    """Rows a second of reading, cheap checks, near duplicates and everything."""
    path = folder / f"{chars}.jsonl"
    make(path, rows, chars)
    layout = layout_of(path)
    spec = str(path)

    def timed(name: str, work) -> None:
        start = time.perf_counter()
        work()
        print(
            f"{chars:>6} characters  {name:<42} {rows / (time.perf_counter() - start):>10,.0f} rows/s"
        )

    timed("reading", lambda: sum(1 for _ in rows_of(spec)))
    timed("cheap checks, 1 process", lambda: scan(spec, layout, near=False))
    timed("cheap checks, 2 processes", lambda: scan(spec, layout, near=False, processes=2))
    timed("with near duplicates, 1 process", lambda: scan(spec, layout))
    timed("all of the audit, 2 processes", lambda: audit(spec, processes=2))


def tokens(folder: Path, rows: int = 2000) -> None:
    """Rows a second of the tokenizer's stage, with the demo model's tokenizer."""
    from finegraft import opening
    from finegraft.data.audit import judge
    from finegraft.data.audit.tokens import measure
    from finegraft.models.locate import locate

    path = folder / "tokens.jsonl"
    make(path, rows, 1000)
    tokenizer = opening.open_tokenizer(locate("demo"), max_seq_length=1024)
    where = judge.Where(str(path), layout_of(path), None)
    start = time.perf_counter()
    measure(where, rows, tokenizer, 1024)
    print(f"  1000 characters  tokens {rows / (time.perf_counter() - start):>44,.0f} rows/s")


def million(rows: int, folder: Path, processes: int) -> None:
    """One large file: seconds and the peak of memory, all processes together."""
    path = folder / "large.jsonl"
    make(path, rows, 960)
    size = path.stat().st_size
    start = time.perf_counter()
    report = audit(str(path), processes=processes)
    seconds = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(
        f"{rows:,} rows, {size / 1e9:.2f} GB, {processes} processes: {seconds:.0f} s, "
        f"{rows / seconds:,.0f} rows/s; peak {own / 1e6:.2f} GB"
        + (f" and {child / 1e6:.2f} GB in the second process" if processes > 1 else "")
    )
    print(f"verdict: {report.verdict}, {len(report.findings)} findings")


def fuzz(rows: int, folder: Path) -> None:
    """Damaged rows of every layout; nothing may raise."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from planter import fuzzed_lines

    each = 10_000
    start = time.perf_counter()
    for part in range(rows // each):
        path = folder / f"fuzz{part}.jsonl"
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as out:
            out.writelines(line + "\n" for line in fuzzed_lines(each, seed=part))
        report = audit(str(path))
        report.as_dict()
        path.unlink()
    print(f"{rows:,} fuzzed rows in {time.perf_counter() - start:.0f} s without a crash")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=0, help="one file of this many rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fuzz", type=int, default=0, help="this many damaged rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.rows:
            million(given.rows, folder, given.processes)
        elif given.fuzz:
            fuzz(given.fuzz, folder)
        else:
            stages(40_000, 300, folder)
            stages(40_000, 1000, folder)
            tokens(folder)


if __name__ == "__main__":
    main()
