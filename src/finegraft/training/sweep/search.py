"""Which values to try next, and which runs to stop early: Optuna, asked one trial at a time.

What: ``propose`` gives the values of a trial and a judge that says when it is hopeless. How: for
every trial a study is made anew in memory from the results so far; the sampler (TPE) is seeded with
the trial's number. Constraint: a search that was stopped proposes what it would have proposed,
because nothing but results and seed decide; so no database is kept. Trade-off: telling Optuna every
result again for each trial, milliseconds beside minutes of training.

Units: the place in a run is its share done, in thousandths, so that runs of other lengths compare.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finegraft.core.errors import ConfigError
from finegraft.training.sweep.space import Axis, grid

TRIALS = 20
RANDOM_TRIALS = 5  # before the sampler learns from results
BEFORE_PRUNING = 3  # finished trials, whose median others have to beat
PLACES = 1000
_DRAWS = 50  # for values that were not tried yet
Values = dict[str, Any]


@dataclass(frozen=True)
class Past:
    """A trial that is done.

    Attributes:
        curve: Place in the run to loss.
        loss: At the end; of a pruned or failed one None.
        pruned: Whether it was stopped early.
    """

    values: Values
    curve: Mapping[int, float]
    loss: float | None
    pruned: bool = False


@dataclass
class Judge:
    """Says whether a trial is worse than the median of those before it, at the same place."""

    trial: Any
    heard: set[int] = field(default_factory=set)
    hopeless: bool = False

    def hear(self, place: int, loss: float) -> None:
        """Take in a loss; the end of a run is no place to stop at."""
        if place in self.heard or place >= PLACES:
            return
        self.heard.add(place)
        self.trial.report(loss, place)
        with _quiet():
            self.hopeless = self.hopeless or self.trial.should_prune()


def require_optuna() -> None:
    """Raises ConfigError FG-SWEEP-004 where optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "FG-SWEEP-004",
            "--search optuna needs optuna, which is not installed",
            allowed="a grid of listed values without it",
            fix="pip install 'finegraft[sweep]', or leave out --search",
        ) from error


def propose(
    space: Sequence[Axis],
    past: Sequence[Past],
    seed: int,
    begun: Values | None = None,
) -> tuple[Values, Judge]:
    """The next trial.

    Args:
        space: What is varied.
        past: The trials before it, in their order.
        seed: Of the whole search.
        begun: Values of a trial that was stopped in the middle, which goes on.

    Returns:
        Values that were not tried before, if there are any, and the judge of their run.
    """
    tried = [one.values for one in past]
    with _quiet():
        for draw in range(1 if begun else _DRAWS):
            trial = _ask(space, past, seed + (len(past) + 1) * PLACES + draw, begun)
            if trial.params not in tried:
                return _in_order(space, trial.params), Judge(trial)
        untried = _untried(space, tried)
        if untried is not None:
            trial = _ask(space, past, seed, untried)
        return _in_order(space, trial.params), Judge(trial)


def _untried(space: Sequence[Axis], tried: Sequence[Values]) -> Values | None:
    if any(axis.ends for axis in space):
        return None
    return next((values for values in grid(space) if values not in tried), None)


def _ask(space: Sequence[Axis], past: Sequence[Past], seed: int, begun: Values | None) -> Any:
    import optuna

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=BEFORE_PRUNING),
    )
    distributions = {axis.key: _distribution(axis) for axis in space}
    state = optuna.trial.TrialState
    for one in past:
        failed = one.loss is None and not one.pruned
        study.add_trial(
            optuna.trial.create_trial(
                state=state.FAIL if failed else state.PRUNED if one.pruned else state.COMPLETE,
                value=one.loss,
                params=one.values,
                distributions=distributions,
                intermediate_values=dict(one.curve),
            )
        )
    if begun:
        study.enqueue_trial(begun)
    return study.ask(distributions)


def _distribution(axis: Axis) -> Any:
    from optuna import distributions as kinds

    if axis.ends is None:
        return kinds.CategoricalDistribution(axis.values)
    low, high = axis.ends
    if axis.whole:
        return kinds.IntDistribution(int(low), int(high), log=axis.logarithmic)
    return kinds.FloatDistribution(low, high, log=axis.logarithmic)


def _in_order(space: Sequence[Axis], values: Values) -> Values:
    return {axis.key: values[axis.key] for axis in space}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what optuna tells about studies of its own, and its advice."""
    log = logging.getLogger("optuna")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
