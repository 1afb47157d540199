"""What the reward model reads of items beside their codes, in plain NumPy: the same functions for samples and for live requests.

Shape letters: B requests, X items asked about, L behaviours, A ads, E numbers of a creative's embedding.
"""

from __future__ import annotations

import numpy as np

from marketplace.schema import distance_km

PRIOR_IMPRESSIONS = 50.0
"""Weight of the city's click rate in an ad's smoothed one, impressions."""
USUAL_LOG_ODDS = -3.0
"""Log odds of a click on an ad of which nothing is known: only its order among ads of one tuple matters."""
_NEAR_HOURS = 2


def log_odds(impressions: np.ndarray, clicks: np.ndarray) -> np.ndarray:
    """[A] log odds of the smoothed click rate of a city's active ads over those of all of them; counts up to the start of the day."""
    overall = np.clip(clicks.sum() / max(impressions.sum(), 1.0), 1e-4, 0.5)
    rate = (clicks + PRIOR_IMPRESSIONS * overall) / (impressions + PRIOR_IMPRESSIONS)
    return np.log(rate / (1 - rate)) - np.log(overall / (1 - overall))


def click_prior(odds: np.ndarray) -> np.ndarray:
    """[A] chance of a click by `log_odds` alone: which of several ads with one tuple is shown."""
    return 1.0 / (1.0 + np.exp(-(odds + USUAL_LOG_ODDS)))


def rows_of(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of ids of any shape in ascending `known`; -1 for others."""
    if not len(known):
        return np.full(np.shape(wanted), -1, np.int64)
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[at] == wanted, at, -1)


def item_features(
    here: np.ndarray, place: np.ndarray, category: np.ndarray, position: np.ndarray, behaviour_place: np.ndarray, behaviour_category: np.ndarray, hours_apart: np.ndarray,
    odds: np.ndarray, impressions: np.ndarray, is_ad: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """ITEM_FEATURES [B, X, F] float32: distance, the user's own visits there and to its category, visits around this hour, and what is known of the ad.

    Args: here [B, 2] and position [B, X, 2] in degrees; place [B, X] and behaviour_place [B, L], any ids of places, -1 none; category
    [B, X], behaviour_category [B, L]; hours_apart [B, L] between the hour of the behaviour and now; odds, impressions, is_ad
    [B, X] of ads. All 0 where there is no item.
    """
    real, known = place >= 0, behaviour_place >= 0
    km = distance_km(here[:, None, 0], here[:, None, 1], position[..., 0], position[..., 1])
    same = (behaviour_place[:, None, :] == place[:, :, None]) & known[:, None, :]
    alike = (behaviour_category[:, None, :] == category[:, :, None]) & known[:, None, :]
    now = same & (hours_apart <= _NEAR_HOURS)[:, None, :]
    columns = (
        np.log1p(km), np.log1p(same.sum(-1)), alike.sum(-1) / np.maximum(known.sum(-1), 1)[:, None], np.log1p(now.sum(-1)),
        np.where(is_ad, odds, 0.0), np.where(is_ad, np.log1p(impressions) / 8.0, 0.0), is_ad,
    )  # fmt: skip
    return np.stack([np.where(real, column, 0.0) for column in columns], -1).astype(np.float32)


def liked(embedding: np.ndarray, some: np.ndarray) -> np.ndarray:
    """[B, E] sum of the embeddings [B, L, E] of the creatives of past clicks over the root of their number; 0 without any. some [B, L]: which there are."""
    total = (embedding * some[..., None]).sum(1, dtype=np.float32)
    return total / np.sqrt(np.maximum(some.sum(1, keepdims=True), 1)).astype(np.float32)


def creative_features(embedding: np.ndarray, liked_BE: np.ndarray) -> np.ndarray:
    """[B, X, E + 1] float32 of creatives [B, X, E] (0 where there is none): the embedding, and how it agrees with what the user liked."""
    return np.concatenate([embedding, (embedding * liked_BE[:, None, :]).sum(-1, keepdims=True)], -1).astype(np.float32)
