"""Creatives: several pictures and texts for one ad, which please different users. With one creative an ad this room is empty.

A creative is a vector (its embedding, known to all) and a user has a visual taste (hidden). What the two agree on moves the user's
utility for the ad, and decides whether the user opens the creative itself, which nobody pays for.
Shapes: A ads, M creatives, ordered by ad, U users, F width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

_OF_GROUP, _OF_CATEGORY, _OF_VECTOR = 0.4, 0.4, 0.7
"""Shares of variance: of a visual taste that age and gender explain, of an embedding that the category does, of general appeal that shows in the vector."""

PRIOR_IMPRESSIONS = 50.0
"""Weight of an ad's own click rate in the smoothed click rates of its creatives, in impressions."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class CreativeConfig:
    """How many creatives an ad has, and how much they matter."""

    per_ad: int = 1
    """Creatives of each ad; 1: the ad looks the same to everybody, and nothing is said of creatives in the logs."""
    width: int = 16
    """F, numbers in an embedding."""
    taste: float = 0.6
    """Weight, in logits, of how much the user's visual taste agrees with the creative (unit variance over users)."""
    appeal: float = 0.3
    """Standard deviation, in logits, of what a creative does to everybody."""
    open_rate: float = 0.08
    """Probability that a user who reads an ad opens its creative, where taste and appeal are average."""
    exploration: float = 0.3
    """Probability that the logging policy shows any of the ad's creatives instead of the one with the best smoothed click rate."""
    prior_impressions: float = PRIOR_IMPRESSIONS
    """Weight of the ad's own click rate in that smoothing, in impressions."""

    @model_validator(mode="after")
    def _check(self) -> CreativeConfig:
        if not 1 <= self.per_ad <= 100 or self.width < 1:
            raise ValueError(f"per_ad must lie in [1, 100] and width be at least 1, got {self.per_ad} and {self.width}")
        if self.taste < 0 or self.appeal < 0 or self.prior_impressions <= 0:
            raise ValueError("taste and appeal must not be negative, prior_impressions must be positive")
        if not (0 < self.open_rate < 1 and 0 <= self.exploration <= 1):
            raise ValueError(f"open_rate must lie in (0, 1) and exploration in [0, 1], got {self.open_rate} and {self.exploration}")
        return self


class Creatives(NamedTuple):
    """What the world draws for all ads and users."""

    embedding_MF: np.ndarray
    """float32, unit vectors."""
    appeal_M: np.ndarray
    visual_taste_UF: np.ndarray


def draw_creatives(config: CreativeConfig, ads: pd.DataFrame, users: pd.DataFrame, seed: int) -> Creatives:
    """Creatives of all ads and the users' visual tastes; draws of their own, so that the rest of a world does not depend on them."""
    rng = np.random.default_rng([seed, 3])
    width, category = config.width, np.repeat(ads["category_id"].to_numpy(), config.per_ad)
    of_category = rng.standard_normal((int(category.max(initial=0)) + 1, width))
    vector = np.sqrt(_OF_CATEGORY) * of_category[category] + np.sqrt(1 - _OF_CATEGORY) * rng.standard_normal((len(category), width))
    embedding = vector / np.linalg.norm(vector, axis=1, keepdims=True)
    appeal = np.sqrt(_OF_VECTOR) * embedding @ rng.standard_normal(width) + np.sqrt(1 - _OF_VECTOR) * rng.standard_normal(len(category))
    age, gender = users["age_band"].to_numpy(), users["gender"].to_numpy()
    group = rng.standard_normal((int(age.max(initial=0)) + 1, int(gender.max(initial=0)) + 1, width))
    taste = np.sqrt(_OF_GROUP) * group[age, gender] + np.sqrt(1 - _OF_GROUP) * rng.standard_normal((len(users), width))
    return Creatives(embedding.astype(np.float32), config.appeal * appeal, taste.astype(np.float32))


def best_creatives(shown: np.ndarray, clicks: np.ndarray, owner: np.ndarray, ads: int, prior_impressions: float = PRIOR_IMPRESSIONS) -> np.ndarray:
    """What a selector of its own would show of every ad: row of the creative [D, A], -1 where the ad has none; of equal ones the first.

    It looks at one creative by itself, as cascades do: the click rate, shrunk to the ad's own by `prior_impressions`.
    Args: shown, clicks [D, M], counts so far; owner [M], the ad (0 .. A - 1) of each creative.
    """
    of_ad = np.zeros((2, len(shown), ads))
    for total, count in zip(of_ad, (shown, clicks), strict=True):
        np.add.at(total, (slice(None), owner), count)
    own_rate = of_ad[1] / np.maximum(of_ad[0], 1.0)
    rate = (clicks + prior_impressions * own_rate[:, owner]) / (shown + prior_impressions)
    best = np.full((len(shown), ads), -1, np.int64)
    worst_first = np.lexsort((-np.arange(len(owner)) + np.zeros_like(rate), rate))
    for row, creatives in zip(best, worst_first, strict=True):
        row[owner[creatives]] = creatives  # better ones come later and write over worse
    return best
