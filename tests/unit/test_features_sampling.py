"""Drawing without replacement: exact law, inclusion probabilities, what may never be drawn, speed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from features import sampling
from features.sampling import SamplingConfig, draw_unexposed, inclusion_scale


def exact_inclusion(weights: np.ndarray, wanted: int) -> np.ndarray:
    """Inclusion probabilities of successive sampling, by enumerating every order of drawing."""
    chance = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), wanted):
        left, p = weights.sum(), 1.0
        for ad in order:
            p *= weights[ad] / left
            left -= weights[ad]
        chance[list(order)] += p
    return chance


def draw(weights: np.ndarray, excluded: np.ndarray, wanted: np.ndarray, seed: int = 0) -> np.ndarray:
    return draw_unexposed(weights, excluded, wanted, inclusion_scale(weights, excluded, wanted), np.random.default_rng(seed))


def test_the_race_follows_successive_sampling():
    weights, requests = np.array([5.0, 1.0, 2.0, 0.5, 3.0, 1.0]), 40_000
    picked = draw(weights, np.full((requests, 1), 1), np.full(requests, 2))
    found = np.bincount(picked.ravel(), minlength=6) / requests
    expected = np.insert(exact_inclusion(np.delete(weights, 1), 2), 1, 0.0)
    assert found[1] == 0 and np.abs(found - expected).max() < 4 * np.sqrt(0.25 / requests)


def test_first_occurrences_and_the_race_draw_by_the_same_law():
    """Large N takes the first distinct draws, with many rows that fall short and are finished by the race; the race alone is the reference."""
    weights, requests = (np.arange(400) % 40 + 1.0) ** 1.5, 20_000
    excluded, wanted = np.tile([399, 5, -1], (requests, 1)), np.full(requests, 60)
    scale = inclusion_scale(weights, excluded, wanted)
    fast = draw_unexposed(weights, excluded, wanted, scale, np.random.default_rng(1))
    assert int(1.1 * scale.max() * weights.sum()) + 16 + 3 <= 200, "this case must take the fast path"
    slow = sampling._race(weights, excluded, wanted, np.random.default_rng(2))
    rates = [np.bincount(picked.ravel(), minlength=400) / requests for picked in (fast, slow)]
    assert np.abs(rates[0] - rates[1]).max() < 5 * np.sqrt(0.5 / requests)
    assert rates[0][[399, 5]].sum() == 0 and np.abs(rates[0] - np.where(np.isin(np.arange(400), [5, 399]), 0, 1 - np.exp(-scale[0] * weights))).max() < 0.02


@pytest.mark.parametrize("ads", [30, 5_000])
def test_draws_are_distinct_eligible_and_complete(ads):
    rng = np.random.default_rng(4)
    weights, requests = (rng.zipf(1.6, ads).clip(max=10_000) + 1.0) ** 0.75, 500
    excluded = np.where(rng.random((requests, 4)) < 0.7, np.array([rng.choice(ads, 4, replace=False) for _ in range(requests)]), -1)
    wanted = rng.integers(0, 29, requests)
    picked = draw(weights, excluded, wanted)
    for row in range(requests):
        mine = picked[row][picked[row] >= 0]
        eligible = ads - (excluded[row] >= 0).sum()
        assert len(set(mine)) == len(mine) == min(wanted[row], eligible) and not set(mine) & set(excluded[row])


def test_inclusion_probabilities_sum_to_the_number_drawn():
    rng = np.random.default_rng(5)
    weights = (rng.zipf(1.4, 3_000).clip(max=10_000) + 1.0) ** 0.75
    excluded = np.where(rng.random((50, 3)) < 0.5, np.array([rng.choice(3_000, 3, replace=False) for _ in range(50)]), -1)
    wanted = rng.integers(1, 2_990, 50)
    wanted[0], wanted[1] = 3_000, 0
    scale = inclusion_scale(weights, excluded, wanted)
    assert np.isinf(scale[0]) and scale[1] == 0
    for row in range(2, 50):
        eligible = np.setdiff1d(np.arange(3_000), excluded[row])
        assert np.isclose((1 - np.exp(-scale[row] * weights[eligible])).sum(), wanted[row], rtol=1e-6)


def test_configuration_is_checked():
    for wrong in ({"unexposed": 0}, {"popularity_power": -1}, {"validation_days": 0}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            SamplingConfig(**wrong)
    with pytest.raises(ValueError, match="leave none for training"):
        sampling._split_of(3, SamplingConfig())
