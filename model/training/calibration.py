"""Platt scaling of the click logit on validation days: a slope and a level.

Shape letters: R requests, F of them also read among the whole city, K slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit
from scipy.special import logit as logit_of

SLOPE_SPREAD = 0.25
"""Standard deviation of what is believed of a calibration's slope before the validation days are read, around 1: with few clicks it stays there."""


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

    def slope(self, slot_K: np.ndarray, belief: float) -> float:
        """By what to multiply the logits so that clicks are as much likelier as they say: logistic regression, the slots' terms `slot_K` given.

        A normal belief around 1 of standard deviation `belief` (inf: none). 1 where nothing can be learned: no click, only clicks, or equal logits.
        """
        from scipy.optimize import minimize  # slow to import, and only two stages get here

        x, y, offset = self.sampled[self.mask], self.click[self.mask], np.broadcast_to(slot_K, self.mask.shape)[self.mask]
        if not (0 < y.mean() < 1 and x.std() > 0):
            return 1.0
        centre, scale, weight_of_belief = x.mean(), x.std(), 1.0 / (belief**2 * len(x))

        def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
            standard, off = (x - centre) / scale, weight[0] / scale - 1.0
            logit = weight[0] * standard + weight[1] + offset
            error = expit(logit) - y
            return float(np.mean(np.logaddexp(0.0, logit) - y * logit) + weight_of_belief * off**2 / 2), np.array([np.mean(error * standard) + weight_of_belief * off / scale, np.mean(error)])

        return float(minimize(loss, np.array([scale if math.isfinite(belief) else 0.0, logit_of(y.mean())]), jac=True, method="BFGS").x[0] / scale)

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
