"""Off-policy estimates: what a policy's pages would earn, from logs of another policy that explored and wrote down its propensities.

For users without a simulator: the model's own forecast (direct method), inverse propensity and doubly robust side by side.
Shape letters: R requests, K slots. Pages hold ad ids, -1 where a slot is empty. A reward is a click (CTR), or a click times
the price that the *target* policy would charge for it (RPM): a price is a known function of the request, clicks are what is unknown.

The target shows one page a request, so a logged request tells about it only as far as both pages agree. How far they must
agree for the click in slot k is an assumption about readers (`Structure`):
- `cascade`: on slots 1..k, weight prod_{j<=k} 1/p_j (McInerney et al. 2020, RIPS). Unbiased whatever ads do to the ads
  below them, as long as clicks do not depend on ads further down.
- `slot`: on slot k alone, weight 1/p_k (Li et al. 2018, item-position model). Assumes that a click depends on ad and slot only;
  far more of the log counts.
Both need support: the logging policy must be able to show what the target shows. Then the mean weight is 1; a mean weight whose
interval stays below 1 says that part of the target's pages was never to be seen, and no estimate here knows what they would earn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from model.evaluation.metrics import mean_and_interval

Structure = Literal["cascade", "slot"]
STRUCTURES: tuple[Structure, ...] = ("cascade", "slot")


@dataclass(frozen=True)
class LoggedPages:
    """What was shown and what followed.

    page int [R, K] ad ids, -1 empty; propensity [R, K], probability of this ad in this slot given the slots above
    (`impressions.propensity`), anything where empty; click [R, K] 0 or 1; user [R], the unit of the intervals.
    """

    page: np.ndarray
    propensity: np.ndarray
    click: np.ndarray
    user: np.ndarray

    def __post_init__(self) -> None:
        if not (self.page.shape == self.propensity.shape == self.click.shape) or self.page.ndim != 2 or len(self.user) != len(self.page):
            raise ValueError(f"page, propensity and click must be [R, K] and user [R], got {self.page.shape}, {self.propensity.shape}, {self.click.shape} and {self.user.shape}")
        shown = self.propensity[self.page >= 0]
        bad = shown[~((shown > 0) & (shown <= 1))]
        if len(bad):
            raise ValueError(f"propensities of shown ads must lie in (0, 1], got {bad[0]}; without logged propensities there is no off-policy estimate")


def weights(logged: LoggedPages, target_RK: np.ndarray, structure: Structure) -> np.ndarray:
    """Importance weight of each request's slot, [R, K]: 0 where the pages disagree (or the target's slot is empty)."""
    agree = (logged.page == target_RK) & (target_RK >= 0)
    ratio = np.where(agree, 1.0 / np.where(logged.page >= 0, logged.propensity, 1.0), 0.0)
    return np.cumprod(ratio, axis=1) if structure == "cascade" else ratio


def estimate(logged: LoggedPages, target_RK: np.ndarray, value_RK: np.ndarray, forecast_RK: np.ndarray, structure: Structure = "cascade") -> dict[str, Any]:
    """Expected reward of a request under the target policy, each estimate as [mean, low, high], 95 % clustered by user.

    Args: target_RK, the target's pages; value_RK, worth of a click in each of its slots (1 for CTR, its price for RPM);
    forecast_RK, a model's click probabilities of the target's pages, for the direct and the doubly robust estimates.
    Returns: `direct`, forecasts alone; `ips`, unbiased but wild; `snips`, self-normalised by the sum of the weights, slot by
    slot; `clipped`, self-normalised with weights capped at sqrt(R) (Ionides 2008), a little biased and much calmer; `dr`, doubly
    robust (Dudik et al. 2014): forecast plus weighted error of the forecast, right if either propensities or forecasts are;
    `dr_clipped`, the same with capped, self-normalised weights. Where no logged page agrees with the target's, `snips` and `clipped`
    are NaN and the doubly robust ones are the forecast, uncorrected: read them with `mean_weight`.
    For each slot `mean_weight` ([mean, low, high]) and `effective_sample_size`, (sum w)^2 / sum w^2 requests.
    """
    shown = target_RK >= 0
    value, forecast = np.where(shown, value_RK, 0.0), np.where(shown, forecast_RK, 0.0)
    reward, expected = logged.click * value, forecast * value
    weight = weights(logged, target_RK, structure)
    capped = np.minimum(weight, math.sqrt(len(weight)))
    per_request = {
        "direct": expected.sum(1),
        "ips": (weight * reward).sum(1),
        "snips": _normalised(weight, reward, shown),
        "clipped": _normalised(capped, reward, shown),
        "dr": (expected + weight * (reward - expected)).sum(1),
        "dr_clipped": expected.sum(1) + _normalised(capped, reward - expected, shown & capped.any(0)),
    }
    result: dict[str, Any] = {name: list(mean_and_interval(values, logged.user)) for name, values in per_request.items()}
    square = np.square(weight).sum(0)
    result["effective_sample_size"] = (np.square(weight.sum(0)) / np.where(square > 0, square, 1.0)).tolist()
    result["mean_weight"] = [list(mean_and_interval(weight[:, k], logged.user, over=shown[:, k].astype(np.float64))) for k in range(weight.shape[1])]
    return result


def _normalised(weight_RK: np.ndarray, reward_RK: np.ndarray, shown_RK: np.ndarray) -> np.ndarray:
    """Linearised contributions [R] of sum_k share_k * (sum_i w r / sum_i w): their mean is the estimate, their spread its error (delta method)."""
    total, share = weight_RK.mean(0), shown_RK.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (weight_RK * reward_RK).mean(0) / total
        terms = ratio * shown_RK + share * weight_RK * (reward_RK - ratio) / total
    return np.where(share > 0, terms, 0.0).sum(1)
