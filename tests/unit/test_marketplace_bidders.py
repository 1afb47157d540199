"""Learning bidders: what they are told is what a rerun auction gives, and they learn what auction theory says."""

from __future__ import annotations

import numpy as np
import pytest

import auction
from marketplace.bidders import RULES, BidderMarket, chances, learn, outcomes


def market(ads: int = 14, requests: int = 400, slots: int = 3, seed: int = 3, reserve: float = 0.05) -> BidderMarket:
    rng = np.random.default_rng(seed)
    shape = (requests, ads)
    return BidderMarket(rng.lognormal(0, 0.4, ads), rng.beta(2, 8, shape), rng.uniform(0.5, 0.97, shape), np.full(ads, reserve), slots)


@pytest.mark.parametrize(("ads", "slots", "reserve"), [(9, 3, 0.3), (4, 4, 0.0), (3, 5, 0.2), (7, 1, 0.8)])
def test_outcomes_of_own_bids_equal_a_rerun(ads: int, slots: int, reserve: float) -> None:
    rng = np.random.default_rng(ads)
    m = market(ads, 25, slots, seed=ads, reserve=reserve)
    bids = m.value * rng.uniform(0.4, 1.3, ads)
    open_to = chances(m, bids)
    shown = 0
    for own in (bids, *(m.value * rng.uniform(0.1, 2.5, ads) for _ in range(6))):
        found = {rule: outcomes(m, open_to, own, rule) for rule in RULES}
        for request, ad in np.ndindex(len(m.probability), ads):
            p, c = m.probability[request], m.continuation[request]
            changed = bids.copy()
            changed[ad] = own[ad]
            eligible = (changed >= m.reserve) & (changed > 0)
            page = auction.greedy_allocation(p, changed, 0.0, 1.0, slots, eligible)
            clicks, price = np.zeros(ads), {rule: np.zeros(ads) for rule in RULES}

            def ctr(rows: np.ndarray, p: np.ndarray = p, c: np.ndarray = c) -> np.ndarray:
                return p[rows] * np.cumprod(np.append(1.0, c[rows][:-1]))

            if len(page):
                clicks[page] = ctr(page)
                price["critical"][page] = auction.critical_prices(p, changed, 0.0, 1.0, page, ctr, m.reserve, eligible).critical_price
                price["gsp"][page] = auction.gsp_prices(p, changed, page, m.reserve, eligible=eligible)
                price["first_price"][page] = changed[page]
            for rule in RULES:
                assert found[rule][0][request, ad] == pytest.approx(clicks[ad], rel=1e-9)
                assert found[rule][1][request, ad] == pytest.approx(price[rule][ad], rel=1e-7)
            shown += int(clicks[ad] > 0)
    assert shown > 100


@pytest.mark.parametrize("start", [0.6, 1.0, 1.5])
def test_truthful_prices_teach_the_truth_and_the_others_teach_shading(start: float) -> None:
    learned = {rule: learn(market(), rule, rounds=80, start=start) for rule in RULES}
    final = {rule: result.mean_multiplier[-20:].mean() for rule, result in learned.items()}
    assert final["critical"] == pytest.approx(1.0, abs=0.03)
    assert final["gsp"] < 0.9
    assert final["first_price"] < 0.7
    if start == 1.0:
        assert (learned["critical"].multipliers == 1.0).all()  # who bids the truth finds nothing better
    assert learned["critical"].welfare[-20:].mean() > learned["first_price"].welfare[-20:].mean()


def test_truthful_bidders_stay_truthful() -> None:
    m = market()
    adapts = np.arange(len(m.value)) % 2 == 0
    result = learn(m, "gsp", rounds=30, learns=adapts)
    assert (result.multipliers[:, ~adapts] == 1.0).all()
    assert not np.allclose(result.multipliers[-1, adapts], 0.6)
    assert result.weight.sum() == pytest.approx(1.0)
    again = learn(m, "gsp", rounds=30, learns=adapts)
    np.testing.assert_array_equal(again.multipliers, result.multipliers)


def test_budgets_are_paced_over_the_day() -> None:
    m = market()
    free = learn(m, "critical", rounds=60, start=1.0, learns=np.zeros(14, bool))
    limit = np.where((np.arange(14) < 5) & (free.spent > 1.0), 0.5 * free.spent, np.inf)
    paced = learn(m, "critical", rounds=60, start=1.0, learns=np.zeros(14, bool), budget=limit)
    round_of_all = free.spent / 60
    assert (paced.spent <= limit + 4 * round_of_all).all()  # at most what is spent before money is counted again
    limited = np.isfinite(limit)
    assert limited.sum() > 2 and (paced.spent[limited] > 0.8 * limit[limited]).all()  # and budgets are used
    assert (paced.pacing[~limited] == 1.0).all() and (paced.pacing[limited] < 1.0).all()
    assert (free.pacing == 1.0).all()


def test_an_unknown_rule_is_named() -> None:
    m = market()
    with pytest.raises(ValueError, match="rule 'vickrey' is unknown; use one of critical"):
        outcomes(m, chances(m, m.value), m.value, "vickrey")  # type: ignore[arg-type]
