"""The click model's known answers and the bootstrap policy."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

import auction
from marketplace.bootstrap import BootstrapConfig, BootstrapPolicy, choose_with_exploration
from marketplace.click_model import ClickConfig, calibrate_base, page_click_probability, substitution_from_below


def policy(ads: int = 30, seed: int = 0, **config: float) -> tuple[BootstrapPolicy, np.ndarray]:
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, 500, ads)
    made = BootstrapPolicy(
        1000 + rng.permutation(ads), 40 + 0.05 * rng.random(ads), -74 + 0.05 * rng.random(ads), shown, rng.binomial(shown, 0.1), BootstrapConfig(**config)
    )
    return made, rng.lognormal(0.0, 0.8, ads)


def test_cascade_oracle_of_the_auction_specification() -> None:
    """AUCTION.md: p (.3, .2, .25), continuation (.5, .9, .6), value 10 each, K=2 -> page (1, 0), value 4.7."""
    p, c, best = np.array([0.3, 0.2, 0.25]), np.array([0.5, 0.9, 0.6]), {}
    for first in range(3):
        for second in range(3):
            if first != second:
                page = [first, second]
                best[first, second] = 10 * page_click_probability(p[page], c[page]).sum()
    assert max(best, key=best.get) == (1, 0)
    assert best[1, 0] == pytest.approx(4.7)


def test_stress_model_counts_same_category_ads_below_only() -> None:
    p = substitution_from_below(np.full((1, 4), 0.8), np.array([[1, 2, 1, 1]]), 0.5)
    assert p.tolist() == [[0.2, 0.8, 0.4, 0.8]]


def test_calibration_meets_its_target_and_says_when_it_cannot() -> None:
    rng, config = np.random.default_rng(1), ClickConfig(mean_ctr=0.06)
    utility, pressure, reading = rng.standard_normal((500, 5)), rng.random((500, 5)), rng.uniform(0.5, 0.97, (500, 5))
    base = calibrate_base(utility, pressure, reading, 1.0, config)
    from marketplace.click_model import attraction

    assert page_click_probability(attraction(utility, pressure, base, config), reading).mean() == pytest.approx(0.06, abs=1e-9)
    with pytest.raises(ValueError, match="cannot be reached"):
        calibrate_base(utility, pressure, reading, 1.0, ClickConfig(mean_ctr=0.85))


@pytest.mark.parametrize("bad", [{"mean_ctr": 0.0}, {"externality": -1.0}, {"substitution_below": 1.0}, {"unknown": 1}, {"substitutes": 0}])
def test_bad_click_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValidationError):
        ClickConfig(**bad)


def test_without_exploration_the_page_is_the_best_by_score_at_gsp_prices() -> None:
    made, bids = policy(exploration=0.0, recall=1000)
    page = made.rank(40.01, -73.99, bids, None, 5, np.random.default_rng(0))
    inverse = np.argsort(made._order)
    pctr = np.exp(made.log_pctr(np.array([40.01]), np.array([-73.99]))[0].astype(np.float64))[inverse]
    assert page.rows.tolist() == np.argsort(-pctr * bids)[:5].tolist()
    assert page.propensity.tolist() == [1.0] * 5
    np.testing.assert_allclose(page.price, auction.gsp_prices(pctr, bids, page.rows), rtol=1e-12)
    np.testing.assert_array_equal(page.pctr, pctr[page.rows])


def test_short_catalogues_reserves_and_eligibility() -> None:
    made, bids = policy(ads=6)
    reserve = np.array([0.0, 1e5, 0.0, 0.0, 0.0, 0.0])
    page = made.rank(40.0, -74.0, bids, np.array([True, True, False, True, True, True]), 5, np.random.default_rng(0), reserve)
    assert sorted(page.rows.tolist()) == [0, 3, 4, 5]
    empty = made.rank(40.0, -74.0, bids, np.zeros(6, bool), 5, np.random.default_rng(0))
    assert len(empty.rows) == len(empty.price) == 0
    nothing = BootstrapPolicy(*(np.empty(0) for _ in range(5))).rank(40.0, -74.0, np.empty(0), None, 5, np.random.default_rng(0))
    assert len(nothing.rows) == 0
    nan = made.rank(40.0, -74.0, np.array([np.nan, -1.0, 0.0, 1.0, np.inf, 2.0]), None, 5, np.random.default_rng(0))
    assert sorted(nan.rows.tolist()) == [3, 5]


def test_order_of_the_catalogue_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    ids, shown = np.arange(50), rng.integers(0, 100, 50)
    columns = [40 + 0.1 * rng.random(50), -74 + 0.1 * rng.random(50), shown, shown // 10]
    bids, shuffle = rng.random(50) + 0.1, rng.permutation(50)
    page = BootstrapPolicy(ids, *columns).rank(40.0, -74.0, bids, None, 5, np.random.default_rng(7))
    other = BootstrapPolicy(ids[shuffle], *(column[shuffle] for column in columns)).rank(40.0, -74.0, bids[shuffle], None, 5, np.random.default_rng(7))
    assert ids[page.rows].tolist() == ids[shuffle][other.rows].tolist()
    np.testing.assert_allclose(page.price, other.price, rtol=1e-6)


def test_logged_propensities_are_the_frequencies_with_which_ads_are_chosen() -> None:
    score, draws = np.tile([3.0, 2.0, 1.0, 0.5], (40_000, 1)), np.random.default_rng(0).random((40_000, 2, 2))
    index, propensity, _ = choose_with_exploration(score, draws, 0.4)
    for ad in range(4):
        expected = 0.6 * (ad == 0) + 0.4 / 4
        assert propensity[index[:, 0] == ad, 0] == pytest.approx(expected)
        assert (index[:, 0] == ad).mean() == pytest.approx(expected, abs=0.01)
    after_best = index[:, 0] == 0
    assert (index[after_best, 1] == 1).mean() == pytest.approx(0.6 + 0.4 / 3, abs=0.01)


def test_wrong_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="unique"):
        BootstrapPolicy(np.array([1, 1]), *(np.zeros(2) for _ in range(4)))
    with pytest.raises(ValidationError):
        BootstrapConfig(exploration=1.0)
