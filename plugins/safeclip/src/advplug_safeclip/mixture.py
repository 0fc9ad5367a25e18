"""A mixture of two normal distributions that tells pairs that go together from pairs that do not, and its guards."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Two: TypeAlias = tuple[float, float]

LEAST_SPREAD = 1e-6
"""Standard deviation of the scores below which there is nothing to tell apart."""
LEAST_COMPONENT = 2
"""Pairs that a component stands for, at least; with fewer it describes single outliers."""
NARROWEST = 0.05
"""Least standard deviation of the component that `anchored` fits, in those of pairs that do not go together."""
STEPS, SETTLED = 500, 1e-6
"""Steps of `anchored` at most, and the move of the mean at which it ends."""
_NONE: Two = (float("nan"), float("nan"))
HALF: Two = (0.5, 0.5)


@dataclass(frozen=True)
class Mixture:
    """Two components, the one with the smaller mean first: `means`, `spreads` (standard deviations), `weights`.

    `even`: a posterior counts both alike, whatever their weights. `problem` says why it cannot be used, where it
    cannot.
    """

    means: Two = _NONE
    spreads: Two = _NONE
    weights: Two = _NONE
    even: bool = False
    problem: str | None = None

    def posterior(self, scores: Array) -> Array:
        """How likely each score (N,) is of the component with the larger mean, in [0, 1]; it never
        falls as scores rise.

        Of two normal distributions the wider one wins at both ends, so that the plain posterior can be 1 for pairs that
        match worst of all. It is 0 at and below the smaller mean here, and stays at its peak.
        """
        if self.problem:
            return np.zeros(len(scores))
        made = _bayes(np.minimum(scores, self._peak()), self.means, self.spreads, HALF if self.even else self.weights)
        return np.where(scores > self.means[0], made, 0.0)

    def _peak(self) -> float:
        """Where the odds are highest; infinite where the component with the larger mean is the wider one."""
        small, large = (spread**2 for spread in self.spreads)
        return float("inf") if large >= small else (self.means[1] * small - self.means[0] * large) / (small - large)


def free(scores: Array) -> Mixture:
    """Both components fitted to scores (N,), as SafeCLIP's code does: expectation maximisation from k-means.

    What cannot be fitted, and a fit that collapsed, is a mixture with a problem.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    problem = _unfit(scores)
    if problem:
        return Mixture(problem=problem)
    with warnings.catch_warnings():
        # Further steps would move the components by less than matters to the choice.
        warnings.simplefilter("ignore", ConvergenceWarning)
        made = GaussianMixture(2, random_state=0).fit(scores[:, None])
    order = np.argsort(made.means_[:, 0])
    parts = (made.means_[order, 0], np.sqrt(made.covariances_[order, 0, 0]), made.weights_[order])
    means, spreads, weights = ((float(part[0]), float(part[1])) for part in parts)
    return Mixture(means, spreads, weights, problem=_problem(means, spreads, weights, len(scores)))


def anchored(scores: Array) -> Mixture:
    """The larger component fitted to scores (N,), the smaller one is known: mean 0 and standard deviation 1.

    For scores that say how many standard deviations a pair is from pairs that do not go together. Few pairs of a
    training set are bad, and two free components then split the good ones. For the same reason the weights do not enter
    the posterior, which would call a pair good that is as likely under either. Problems are those of `free`, and
    scores that are no better than those of other pairs.
    """
    problem = _unfit(scores)
    if problem:
        return Mixture(problem=problem)
    mean, spread, weight = float(scores.mean()), max(float(scores.std()), NARROWEST), 0.5
    for _ in range(STEPS):
        part = _bayes(scores, (0.0, mean), (1.0, spread), (1 - weight, weight))
        whole = max(float(part.sum()), 1e-12)
        before, mean = mean, float((part * scores).sum() / whole)
        spread = max(float(np.sqrt((part * (scores - mean) ** 2).sum() / whole)), NARROWEST)
        weight = min(max(whole / len(scores), 1e-9), 1 - 1e-9)
        if abs(mean - before) < SETTLED:
            break
    means, spreads, weights = (0.0, mean), (1.0, spread), (1 - weight, weight)
    problem = "images go together with their own captions no better than with others" if mean < NARROWEST else None
    problem = problem or _problem(means, spreads, (1.0, weight), len(scores))
    return Mixture(means, spreads, weights, True, problem)


def _bayes(scores: Array, means: Two, spreads: Two, weights: Two) -> Array:
    small, large = (
        np.log(w) - np.log(s) - 0.5 * ((scores - m) / s) ** 2 for m, s, w in zip(means, spreads, weights, strict=True)
    )
    made: Array = 1 / (1 + np.exp(np.clip(small - large, -700, 700)))
    return made


def _unfit(scores: Array) -> str | None:
    if len(scores) < 2 * LEAST_COMPONENT:
        return f"{len(scores)} scores are too few for two components"
    if not np.isfinite(scores).all():
        return "a score is no number"
    return "all scores are the same" if scores.std() < LEAST_SPREAD else None


def _problem(means: Two, spreads: Two, weights: Two, amount: int) -> str | None:
    if not np.isfinite([*means, *spreads, *weights]).all():
        return "a component is no number"
    if min(weights) * amount < LEAST_COMPONENT:
        return f"a component stands for fewer than {LEAST_COMPONENT} pairs"
    return "both components have the same mean" if means[1] - means[0] < LEAST_SPREAD else None
