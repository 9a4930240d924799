"""Held-out loss: how surprised the model is by the right answers, in nats a token."""

from __future__ import annotations

from finegraft.inference.evaluate._contract import Metric, losses_of, mean

METRIC = Metric(
    about="mean negative log-likelihood of the reference, in nats a token",
    sums=losses_of,
    total=mean,
    better="less",
    reads="losses",
)
