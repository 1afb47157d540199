"""Platt scaling of click logits: slopes and levels that are known, and little belief in few clicks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from model.training.calibration import ANY_SPREAD, SLOPE_SPREAD, ExposedLogits, level_for

SLOT = np.array([0.6, 0.1, -0.7])


def clicked(requests: int, slope: float, level: float, seed: int = 0) -> ExposedLogits:
    """Pages whose true click log-odds are slope * logit + level + the slot's term; the whole city reads everything .4 lower."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-2.5, 1.0, (requests, len(SLOT)))
    mask = rng.random(logit.shape) < 0.9
    click = (rng.random(logit.shape) < expit(slope * logit + level + SLOT)) & mask
    few = np.arange(0, requests, 3)
    return ExposedLogits(logit, click.astype(float), mask, few, logit[few] - 0.4, mask[few])


@pytest.mark.parametrize("slope", [0.5, 1.0, 1.6])
@pytest.mark.parametrize("of_order", [False, True])
def test_the_slope_of_many_clicks_is_found(slope: float, of_order: bool) -> None:
    assert clicked(200_000, slope, 0.3).slope(SLOT, of_order) == pytest.approx(slope, abs=0.02)


def test_of_an_order_it_is_logistic_regression_with_a_weak_prior() -> None:
    seen = clicked(300, 0.8, 0.0)
    x = seen.sampled[seen.mask]
    peer = LogisticRegression(C=ANY_SPREAD**2, tol=1e-10, max_iter=1000).fit(((x - x.mean()) / x.std())[:, None], seen.click[seen.mask])
    assert seen.slope(np.zeros(3), of_order=True) * x.std() == pytest.approx(float(peer.coef_[0, 0]), rel=1e-4)


def test_few_clicks_leave_the_slope_near_one() -> None:
    few = [clicked(12, 1.0, 0.0, seed) for seed in range(40)]
    of_order, of_probability = (np.array([seen.slope(SLOT, kind) for seen in few]) for kind in (True, False))
    assert np.abs(of_probability - 1).max() < 0.5 < np.abs(of_order - 1).max()
    nothing = replace(few[0], click=np.zeros_like(few[0].click))
    assert nothing.slope(SLOT, of_order=True) == nothing.slope(SLOT) == 1.0


def test_clicks_that_the_score_separates_make_it_not_certain() -> None:
    seen = clicked(50, 1.0, 0.0)
    separated = replace(seen, click=(seen.sampled > np.sort(seen.sampled[seen.mask])[-4]).astype(float))
    assert 0 < separated.slope(np.zeros(3), of_order=True) * seen.sampled[seen.mask].std() < 2 * ANY_SPREAD
    assert 1 < separated.slope(np.zeros(3)) < 1 + 3 * SLOPE_SPREAD


@pytest.mark.parametrize("slot", [0.0, SLOT])
def test_the_level_makes_mean_pctr_the_click_rate_among_the_whole_city(slot: float | np.ndarray) -> None:
    seen = clicked(5000, 1.0, 0.8)
    level = seen.level(slot)
    # Everything read in the city is .4 lower than among the sampled candidates, and that is all.
    assert level == pytest.approx(level_for((seen.sampled + slot)[seen.mask], seen.click[seen.mask].mean()) + 0.4, abs=1e-9)
    assert expit(seen.affine(1.0, level).sampled + slot - 0.4)[seen.mask].mean() == pytest.approx(seen.click[seen.mask].mean(), rel=1e-9)


def test_a_level_is_found_however_far_it_lies() -> None:
    logits = np.array([-400.0, -399.0, -380.0])
    assert expit(logits + level_for(logits, 0.2)).mean() == pytest.approx(0.2)
    assert level_for(logits, 0.0) == level_for(np.empty(0), 0.5) == 0.0
