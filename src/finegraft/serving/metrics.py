"""Counters in the text format that Prometheus reads.

What: requests by endpoint and status, tokens, seconds, and what is going on now. How: integers in a
dictionary, written out on request. Constraint: labels come from a closed set, so that no client can
fill the memory with new ones.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections import Counter

from finegraft.serving.gate import Gate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds


class Metrics:
    """What happened since the server started."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.gone = 0
        self.buckets: Counter[float] = Counter()
        self.seconds, self.answers = 0.0, 0

    def answered(self, seconds: float, prompt_tokens: int, completion_tokens: int) -> None:
        """Count an answer that reached its end."""
        self.tokens["prompt"] += prompt_tokens
        self.tokens["completion"] += completion_tokens
        self.seconds += seconds
        self.answers += 1
        for bound in _BOUNDS:
            self.buckets[bound] += seconds <= bound

    def text(self, gate: Gate) -> str:
        """The page."""
        lines: list[str] = []

        def family(name: str, kind: str, about: str, rows: list[tuple[str, float]]) -> None:
            lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value:g}" for labels, value in rows)

        family(
            "finegraft_requests_total",
            "counter",
            "Requests by endpoint and status.",
            [
                (f'{{endpoint="{endpoint}",status="{status}"}}', count)
                for (endpoint, status), count in sorted(self.requests.items())
            ],
        )
        family(
            "finegraft_tokens_total",
            "counter",
            "Tokens read and written.",
            [(f'{{kind="{kind}"}}', self.tokens[kind]) for kind in ("prompt", "completion")],
        )
        family("finegraft_disconnects_total", "counter", "Clients gone.", [("", self.gone)])
        family("finegraft_requests_running", "gauge", "Being answered.", [("", gate.inside)])
        family("finegraft_requests_waiting", "gauge", "In the queue.", [("", gate.waiting)])
        name = "finegraft_answer_seconds"
        family(name, "histogram", "Time of whole answers.", [])
        lines.extend(f'{name}_bucket{{le="{bound:g}"}} {self.buckets[bound]}' for bound in _BOUNDS)
        lines.append(f'{name}_bucket{{le="+Inf"}} {self.answers}')
        lines += [f"{name}_sum {self.seconds:g}", f"{name}_count {self.answers}"]
        return "\n".join(lines) + "\n"
