"""How users answer a page of ads: the truth of a world. Policies never see it; it draws the clicks and scores pages.

Cascade: a user reads from the top and goes on past ad j with probability c_{u,j}, so the ad in slot k is clicked with
q_k(page) = p_{u,k} * product over the ads above of c_{u,j}. Candidate-set externality: p falls with the density of
close substitutes among the city's active ads, as a nested logit would have it.

Shapes: R requests, K slots, S substitutes of an ad, U users, C categories.
"""

from __future__ import annotations

import numpy as np
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

MIN_CONTINUATION, MAX_CONTINUATION = 0.5, 0.97
"""c of an ad that satisfies the user entirely, and of one that does not at all."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class ClickConfig:
    """Weights of the user's utility for an ad, in logits, and the knobs of the page model."""

    mean_ctr: float = 0.06
    """Clicks per impression of a top-5 page of the bootstrap policy that the base level is calibrated to."""
    max_probability: float = 0.9
    """p of an ad whose utility is unbounded, in (0, 1]."""
    taste: float = 0.55
    """Weight of the user's taste for the ad's category (taste has unit variance)."""
    quality: float = 0.4
    """Weight of the place's quality (unit variance)."""
    price: float = 0.2
    """Weight of price band times the user's price sensitivity."""
    distance: float = 0.5
    """Weight of log(1 + km) times the user's distance sensitivity."""
    hour: float = 0.45
    """Weight of the category's affinity for the local hour (unit variance)."""
    habit: float = 0.45
    """Weight of log(1 + earlier visits) of the user to the place."""
    intent_category: float = 0.6
    """Added for an ad of the category that the user visits next in the session, times exp(-km between the two / 2)."""
    intent_place: float = 2.0
    """Added for an ad of the very place that the user visits next in the session."""
    appeal: float = 0.2
    """Standard deviation of the ad's own appeal (its creative), known to nobody."""
    externality: float = 0.3
    """Strength of close substitutes among the city's ads; 0 switches the candidate-set externality off."""
    substitutes: int = 20
    """Nearest ads of the same category that count as substitutes of an ad."""
    substitute_km: float = 1.0
    """Distance over which a substitute's weight falls by e."""
    satisfaction_spread: float = 2.2
    """Standard deviation, in logits, of how much categories and ads satisfy a user (and end the reading of the page)."""
    satisfaction_taste: float = 0.5
    """How much the user's taste for the category adds to that, in logits per standard deviation."""
    substitution_below: float = 0.0
    """Stress model: share of p lost for each ad of the same category further down the page; 0 is the pure cascade."""
    day_drift: float = 0.0
    """Standard deviation of each ad's daily random walk of utility, in logits."""
    purchase_rate: float = 0.15
    """Probability that a click leads to an order, for a place of average quality."""

    @model_validator(mode="after")
    def _check(self) -> ClickConfig:
        if not 0 < self.mean_ctr < self.max_probability <= 1:
            raise ValueError(f"0 < mean_ctr < max_probability <= 1 must hold, got {self.mean_ctr} and {self.max_probability}")
        if not 0 <= self.substitution_below < 1:
            raise ValueError(f"substitution_below must lie in [0, 1), got {self.substitution_below}")
        if not 0 < self.purchase_rate < 0.5:
            raise ValueError(f"purchase_rate must lie in (0, 0.5), got {self.purchase_rate}")
        if self.substitutes < 1:
            raise ValueError(f"substitutes must be at least 1, got {self.substitutes}")
        for name in ("externality", "appeal", "satisfaction_spread", "day_drift", "substitute_km"):
            if getattr(self, name) < 0 or (name == "substitute_km" and self.substitute_km == 0):
                raise ValueError(f"{name} must not be negative (substitute_km positive), got {getattr(self, name)}")
        return self


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(logit, np.float64)))


def reading_probability(continuation: np.ndarray) -> np.ndarray:
    """Probability that the user reads as far as each slot: product of c over the ads above. [..., K] -> [..., K]."""
    reach = np.cumprod(np.asarray(continuation, np.float64), axis=-1)
    return np.concatenate([np.ones_like(reach[..., :1]), reach[..., :-1]], axis=-1)


def page_click_probability(probability: np.ndarray, continuation: np.ndarray) -> np.ndarray:
    """q of every slot of a page under the cascade: p_k * product of c_j over the ads above. [..., K] each -> [..., K]."""
    return np.asarray(probability, np.float64) * reading_probability(continuation)


def substitution_from_below(probability: np.ndarray, category: np.ndarray, share: float) -> np.ndarray:
    """Stress model: p times (1 - share) for every ad of the same category further down. probability, category [..., K]."""
    if share == 0.0:
        return probability
    same = category[..., :, None] == category[..., None, :]
    below = np.triu(np.ones(same.shape[-2:], bool), k=1)
    return probability * (1.0 - share) ** (same & below).sum(axis=-1)


def substitution_factor(utility: np.ndarray, pressure: np.ndarray, externality: float) -> np.ndarray:
    """Share of p left beside the substitutes: e_i / (e_i + externality * sum_j w_ij e_j), e = exp(utility / 2).

    Args: utility [...] of the ad in logits; pressure [...], the weighted sum of exp(utility / 2) over its substitutes.
    """
    own = np.exp(0.5 * utility)
    return own / (own + externality * pressure)


def attraction(utility: np.ndarray, pressure: np.ndarray, base: float, config: ClickConfig) -> np.ndarray:
    """p, the click probability of an ad that is read: [...] utility and pressure (see `substitution_factor`) -> [...]."""
    return config.max_probability * sigmoid(base + utility) * substitution_factor(utility, pressure, config.externality)


def continuation(satisfaction: np.ndarray, taste: np.ndarray, config: ClickConfig) -> np.ndarray:
    """c, the probability of reading on past an ad: lower for ads that satisfy, more so to a user who likes the category."""
    satisfied = sigmoid(satisfaction + config.satisfaction_taste * taste)
    return MAX_CONTINUATION - (MAX_CONTINUATION - MIN_CONTINUATION) * satisfied


def calibrate_base(utility: np.ndarray, pressure: np.ndarray, continuation: np.ndarray, past_organic: np.ndarray, config: ClickConfig) -> float:
    """The base level for which pages [R, K] have `mean_ctr` clicks per impression; bisection on the logit.

    Args: past_organic [R, K], probability of reading past the organic items above each ad.
    """
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        mean = (page_click_probability(attraction(utility, pressure, middle, config), continuation) * past_organic).mean()
        low, high = (middle, high) if mean < config.mean_ctr else (low, middle)
    if high > 29.0:
        raise ValueError(f"mean_ctr {config.mean_ctr} cannot be reached with max_probability {config.max_probability} and externality {config.externality}")
    return 0.5 * (low + high)
