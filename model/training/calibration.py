"""Platt scaling of the click logit on validation days: a slope and a level.

Shape letters: R requests, F of them also read among the whole city, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit
from scipy.special import logit as logit_of

SLOPE_SPREAD = 0.25
"""Standard deviation of what is believed of the slope of a network that learned probabilities, around 1, before the validation days are read: with few
clicks it stays there."""

ANY_SPREAD = 3.0
"""Of a network that learned an order alone nothing is believed but this: a standard deviation of its score is worth 0 +- 3 log-odds of a click, so that
clicks which the score happens to separate do not make it certain."""


@dataclass(frozen=True)
class ExposedLogits:
    """Set-aware click logits of the pages that were shown on some requests, as pre-training sees them and as serving does."""

    sampled: np.ndarray
    """[R, K] among the sampled candidates; float64."""
    click: np.ndarray
    """[R, K]"""
    mask: np.ndarray
    """[R, K] where an ad was shown."""
    few: np.ndarray
    """[F] those of the R that were also read among the whole city, spread over time."""
    city: np.ndarray
    """[F, K] among the whole city."""
    city_mask: np.ndarray
    """[F, K]"""

    def affine(self, slope: float, level: float) -> ExposedLogits:
        """The logits times `slope` plus `level`."""
        return replace(self, sampled=slope * self.sampled + level, city=slope * self.city + level)

    def slope(self, slot_K: np.ndarray, of_order: bool = False) -> float:
        """By what to multiply the logits so that clicks are as much likelier as they say: logistic regression with the slots' terms `slot_K` given.

        A normal belief holds it: SLOPE_SPREAD, or ANY_SPREAD of scores that learned an order alone. 1 where nothing can be learned: no click, only
        clicks, or equal logits.
        """
        from scipy.optimize import minimize  # slow to import, and only two stages get here

        x, y, offset = self.sampled[self.mask], self.click[self.mask], np.broadcast_to(slot_K, self.mask.shape)[self.mask]
        if not (0 < y.mean() < 1 and x.std() > 0):
            return 1.0
        centre, scale = x.mean(), x.std()
        standard = (x - centre) / scale
        believed, deviation = (0.0, ANY_SPREAD) if of_order else (scale, SLOPE_SPREAD * scale)

        def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
            off = (weight[0] - believed) / deviation
            logit = weight[0] * standard + weight[1] + offset
            error = expit(logit) - y
            penalty = np.array([off / deviation, 0.0]) / len(x)
            return float(np.mean(np.logaddexp(0.0, logit) - y * logit) + off**2 / (2 * len(x))), np.array([np.mean(error * standard), np.mean(error)]) + penalty

        return float(minimize(loss, np.array([believed, logit_of(y.mean())]), jac=True, method="BFGS").x[0] / scale)

    def level(self, slot_K: np.ndarray | float = 0.0) -> float:
        """What to add to the logits so that mean pCTR equals CTR, seen among the whole city as in serving; in the slots with their terms `slot_K`.

        Two steps, because clicks are rare and whole cities are dear: the level is set against the clicks of all requests among their sampled
        candidates; then, without any click noise, the level that the same pages get among the whole city is set equal to that, on `few`.
        """
        first = level_for((self.sampled + slot_K)[self.mask], float(self.click[self.mask].mean()))
        among_sampled = float(expit((self.sampled + slot_K)[self.few][self.mask[self.few]] + first).mean())
        return level_for((self.city + slot_K)[self.city_mask], among_sampled)


def level_for(logits: np.ndarray, rate: float) -> float:
    """What to add to logits so that the mean probability is `rate`; bisection."""
    if not 0.0 < rate < 1.0 or len(logits) == 0:
        return 0.0
    low, high = logit_of(rate) - logits.max(), logit_of(rate) - logits.min()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(np.mean(expit(logits + middle))) < rate else (low, middle)
    return (low + high) / 2
