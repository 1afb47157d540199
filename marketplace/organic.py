"""Organic results: what a page shows beside ads, in an order that must be kept. With no organic items a page holds ads alone.

The order is the platform's: popular places nearby that nobody advertises. A page of K ads and O organic items is told by how many
organic items stand above each ad: [R, K], never falling. Shapes: R requests, O items, K ads, P places.
"""

from __future__ import annotations

import numpy as np
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class OrganicConfig:
    """Organic items on a page, and where the logging policy puts ads among them."""

    items: int = 0
    """O, organic items on every page, beside its ads; 0: pages of ads alone."""
    distance_scale_km: float = 3.0
    """Distance over which a place's popularity, as the organic ranking sees it, falls by e."""
    exploration: float = 0.3
    """Probability that the logging policy draws the ads' places on the page, instead of alternating from the top."""

    @model_validator(mode="after")
    def _check(self) -> OrganicConfig:
        if not 0 <= self.items <= 50 or self.distance_scale_km <= 0 or not 0 <= self.exploration <= 1:
            raise ValueError("items must lie in [0, 50], distance_scale_km be positive and exploration lie in [0, 1]")
        return self


def alternating(pages: int, ads: int, items: int) -> np.ndarray:
    """An ad, an organic item, an ad, ...: organic items above each ad [R, K]. The layout of a policy that chooses none."""
    return np.broadcast_to(np.minimum(np.arange(ads), items), (pages, ads))


def drawn(uniforms: np.ndarray, ads: int) -> np.ndarray:
    """A layout drawn uniformly among all: organic items above each ad [R, K]. Args: uniforms [R, K + O], one a place of the page."""
    places = np.sort(np.argsort(uniforms, axis=1)[:, :ads], axis=1)
    return places - np.arange(ads)


def positions(above: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Places on the page, 1 at the top, of ads [R, K] and of organic items [R, O]."""
    ads = above + np.arange(above.shape[1]) + 1
    before = (above[:, None, :] <= np.arange(items)[None, :, None]).sum(-1)  # ads above each organic item
    return ads, before + np.arange(items) + 1


def reach(continuation: np.ndarray, organic_continuation: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of reading past everything of the other kind above: of ads past organic items [R, K], of organic items past ads [R, O]."""
    past_organic = np.cumprod(np.concatenate([np.ones((len(above), 1)), organic_continuation], axis=1), axis=1)
    past_ads = np.cumprod(np.concatenate([np.ones((len(above), 1)), continuation], axis=1), axis=1)
    before = (above[:, None, :] <= np.arange(organic_continuation.shape[1])[None, :, None]).sum(-1)
    return np.take_along_axis(past_organic, above, axis=1), np.take_along_axis(past_ads, before, axis=1)


def checked(above: np.ndarray, items: int) -> np.ndarray:
    """`above` as integers; ValueError unless it never falls and lies in [0, O]."""
    above = np.asarray(above, np.int64)
    if above.ndim != 2 or (above < 0).any() or (above > items).any() or (np.diff(above, axis=1) < 0).any():
        raise ValueError(f"a page says of every ad how many of its {items} organic items stand above it: never falling from the top, at most {items}")
    return above
