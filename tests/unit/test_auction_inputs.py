"""Refusals, rounding, ties, empty pages and speed of the auction."""

from __future__ import annotations

import numpy as np
import pytest

import auction
from auction import batch
from auction.checks import round_down
from auction.ties import RELATIVE_STEP, quantise

PCTR = np.array([0.1, 0.2, 0.3])
BIDS = np.array([3.0, 2.0, 1.0])


def flat(page):
    return PCTR[page]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bids": [1.0, float("nan"), 1.0]}, r"bids must be finite and >= 0, got nan at 1"),
        ({"bids": [1.0, float("inf"), 1.0]}, r"bids must be finite and >= 0, got inf at 1"),
        ({"bids": [1.0, 1.0, -0.5]}, r"bids must be finite and >= 0, got -0.5 at 2"),
        ({"bids": [1.0, 1.0]}, r"bids must have shape \(3\), got \(2,\)"),
        ({"bids": ["a", 1.0, 1.0]}, r"bids must be numeric"),
        ({"pctr": [0.1, 1.2, 0.1]}, r"pctr must be finite and >= 0 and <= 1, got 1.2 at 1"),
        ({"affinity": np.full((3, 2), np.nan)}, r"affinity must be finite, got nan at \(0, 0\)"),
        ({"affinity": np.zeros((3, 1))}, r"affinity must be a scalar or have shape \(3, 2\)"),
        ({"bid_weight": 0.0}, r"bid_weight must be > 0"),
        ({"bid_weight": float("nan")}, r"bid_weight must be finite"),
        ({"bid_weight": np.ones(3)}, r"bid_weight must be a scalar or have shape"),
        ({"n_slots": 0}, r"n_slots must be a whole number >= 1, got 0"),
        ({"eligible": np.ones(3)}, r"eligible must be boolean of shape \(3,\), got float64"),
        ({"tie_key": np.zeros(2, dtype=np.int64)}, r"tie_key must be integer of shape"),
        ({"bid_weight": 1e308, "bids": [1e308, 1.0, 1.0]}, r"a score overflows"),
    ],
)
def test_bad_input_is_refused_with_name_place_and_range(change, message):
    call = {"pctr": PCTR, "bids": BIDS, "affinity": np.zeros((3, 2)), "bid_weight": 1.0, "n_slots": 2, **change}
    with pytest.raises(auction.AuctionInputError, match=message), np.errstate(over="ignore"):
        auction.greedy_allocation(**call)


def test_prices_refuse_a_page_that_is_not_the_greedy_one():
    with pytest.raises(auction.AuctionInputError, match=r"page \[0, 1\] is not the greedy page \[1, 0\]"):
        auction.critical_prices(PCTR, BIDS, 0.0, 1.0, [0, 1], flat)
    with pytest.raises(auction.AuctionInputError, match="shows an ad twice"):
        auction.critical_prices(PCTR, BIDS, 0.0, 1.0, [1, 1], flat)
    with pytest.raises(auction.AuctionInputError, match=r"page_ctr\(page\) must be finite and >= 0, got nan"):
        auction.critical_prices(PCTR, BIDS, 0.0, 1.0, [1, 0], lambda page: page * np.nan)
    with pytest.raises(auction.AuctionInputError, match="below its reserve 2.5"):
        auction.gsp_prices(PCTR, BIDS, [1, 0], 2.5)
    with pytest.raises(auction.AuctionInputError, match="1 pages are not the greedy pages"):
        batch.critical_bids(PCTR[None], BIDS[None], 0.0, 1.0, np.array([[0, 1]]))
    with pytest.raises(auction.AuctionInputError, match="must not rise"):
        auction.vcg_position_prices(BIDS, [0.1, 0.2])


def test_reserve_is_eligibility_and_floor():
    """The reserve of a loser takes it out; a winner alone pays its own reserve, which does not depend on its bid."""
    page = auction.greedy_allocation(PCTR, BIDS, 0.0, 1.0, 2, BIDS >= [0.5, 0.7, 1.5])
    assert page.tolist() == [1, 0]
    pricing = auction.critical_prices(PCTR, BIDS, 0.0, 1.0, page, flat, [0.5, 0.7, 1.5])
    np.testing.assert_allclose(pricing.price, [0.7, 0.5])
    assert (pricing.theta[:, 1] == -np.inf).all()
    np.testing.assert_allclose(pricing.critical_bids, [[1.5, 0.7], [4.0, 0.5]])
    both = auction.priced_page(PCTR, BIDS, 0.0, 1.0, 2, flat, [0.5, 0.7, 1.5])
    np.testing.assert_array_equal(both.price, pricing.price)


def test_empty_pages_and_short_pages():
    none = auction.greedy_allocation(PCTR, BIDS, 0.0, 1.0, 2, np.zeros(3, dtype=bool))
    assert none.tolist() == []
    assert auction.critical_prices(PCTR, BIDS, 0.0, 1.0, none, flat).price.tolist() == []
    assert auction.gsp_prices(PCTR, BIDS, none).tolist() == []
    assert auction.greedy_allocation(np.zeros(0), np.zeros(0), np.zeros((0, 2)), 1.0, 2).tolist() == []
    page = auction.priced_page(PCTR, BIDS, np.zeros((3, 5)), 1.0, 5, flat)
    assert page.page.tolist() == [1, 0, 2]
    assert page.theta.shape == (3, 3)
    assert auction.priced_page(PCTR, BIDS, 0.0, 1.0, 5, flat, reserve=9.0).page.tolist() == []
    assert batch.greedy_pages(PCTR[None], BIDS[None], 0.0, 1.0, 5).tolist() == [[1, 0, 2, -1, -1]]


def test_evaluator_is_called_in_one_batch_of_at_most_11_pages():
    rng = np.random.default_rng(0)
    pctr, bids = rng.random(50), rng.random(50)
    seen = []

    def evaluate(pages):
        seen.append(pages.shape)
        return pctr[pages] * 0.8 ** np.arange(5)

    batched = auction.priced_page(pctr, bids, rng.normal(0, 0.1, (50, 5)), 1.0, 5, flat, page_ctr_batch=evaluate)
    assert len(seen) == 1
    assert seen[0][0] <= 11
    assert batched.price.shape == (5,)


def test_monotone_repair_is_marked_and_stays_between_reserve_and_bid():
    """An ad that is clicked more in the second slot than in the first has no exactly truthful price: the hull gives one, and says so."""
    pctr, bids = np.array([0.5, 0.5, 0.5]), np.array([3.0, 2.0, 1.0])
    pricing = auction.priced_page(pctr, bids, 0.0, 1.0, 2, lambda page: np.array([0.1, 0.4])[: len(page)])
    assert pricing.repaired.tolist() == [True, False]
    np.testing.assert_allclose(pricing.price, [1.0, 1.0])
    assert pricing.ctr[0].tolist() == [0.1, 0.4]


def test_ties_go_by_key_whatever_the_float_noise():
    ids = np.array([11, 5, 7])
    keys = auction.tie_keys(ids, "salt")
    noisy = np.array([0.3, 0.1 * 3, 0.3 * (1 + 1e-13)])
    page = auction.greedy_allocation(np.ones(3), noisy, 0.0, 1.0, 3, None, keys)
    assert page.tolist() == np.argsort(keys).tolist()
    pricing = auction.critical_prices(np.ones(3), noisy, 0.0, 1.0, page[:2], lambda shown: np.ones(len(shown)), tie_key=keys)
    assert pricing.tied.all()
    np.testing.assert_allclose(pricing.price, 0.3, rtol=1e-12)
    assert len({int(auction.tie_keys(ids, str(salt)).argmin()) for salt in range(50)}) == 3  # the salt spreads the wins
    assert len(set(auction.tie_keys(np.arange(100_000)).tolist())) == 100_000


def test_everybody_ties_at_100_000_ads():
    n = 100_000
    keys = auction.tie_keys(np.arange(n), "x")
    page = auction.greedy_allocation(np.full(n, 0.1), np.ones(n), np.zeros((n, 5)), 1.0, 5, None, keys)
    assert page.tolist() == np.argsort(keys)[:5].tolist()
    pricing = auction.critical_prices(np.full(n, 0.1), np.ones(n), np.zeros((n, 5)), 1.0, page, lambda p: np.full(len(p), 0.1), tie_key=keys)
    np.testing.assert_allclose(pricing.price, 1.0)
    rest = batch.greedy_pages(np.full((3, 500), 0.1), np.ones((3, 500)), 0.0, 1.0, 4, None, keys[:500])
    assert (rest == np.argsort(keys[:500])[:4]).all()


def test_quantise_is_monotone_and_fine():
    scores = np.sort(np.concatenate([np.random.default_rng(0).normal(0, 1, 10_000), [0.0, -0.0, 1e-300, -1e-300, 1e300, -np.inf]]))
    ranks = quantise(scores)
    assert (np.diff(ranks) >= 0)[1:].all()
    finite = np.isfinite(scores)
    assert (np.abs(ranks[finite] - scores[finite]) <= RELATIVE_STEP * np.abs(scores[finite])).all()


def test_rounding_is_down_and_exact_on_the_step():
    exact = np.array([4.329, 4.32, 4.319999999999999, 0.009, 0.3, 2.0])
    charged = round_down(exact, 0.01, 0.0, np.full(6, 9.0))
    assert charged.tolist() == [4.32, 4.32, 4.32, 0.0, 0.3, 2.0]
    assert round_down(np.array([7.9]), 5.0, 0.0, 9.0).tolist() == [5.0]
    assert round_down(np.array([0.057]), 0.01, 0.055, 9.0).tolist() == [0.055]  # a reserve off the step is charged as it stands
    assert round_down(np.array([0.3]), 0.1, 0.0, 0.3).tolist() == [0.3]
    with pytest.raises(auction.AuctionInputError, match="currency_step"):
        round_down(np.array([1.0]), -0.01, 0.0, 9.0)


GOOD = {"page": [2, 0], "pctr": [0.2, 0.1], "price": [0.5, 1.0], "bids": [1.0, 9.0, 1.0], "reserve": [0.0, 0.0, 0.5], "eligible": [True, False, True], "n_slots": 2, "offered": [2.0, 9.0, 1.0]}


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ({}, None), ({"page": [], "pctr": [], "price": []}, None), ({"offered": None}, None),
        ({"n_slots": 1}, "length"), ({"price": [0.5]}, "length"), ({"pctr": [0.5] * 3}, "length"), ({"page": [[2, 0]]}, "length"),
        ({"page": [3, 0]}, "unknown_ad"), ({"page": [-1, 0]}, "unknown_ad"), ({"page": [2.0, 0.0]}, "unknown_ad"), ({"page": [0, 0]}, "repeated_ad"), ({"page": [2, 1]}, "ineligible_ad"),
        ({"pctr": [0.2, float("nan")]}, "pctr"), ({"pctr": [1.1, 0.1]}, "pctr"), ({"pctr": [-0.1, 0.1]}, "pctr"),
        ({"price": [0.5, float("nan")]}, "price_not_finite"), ({"price": [0.5, float("inf")]}, "price_not_finite"), ({"price": [-0.1, 1.0]}, "price_not_finite"),
        ({"price": [0.5, 1.1]}, "price_above_bid"), ({"bids": [float("nan"), 9.0, 1.0]}, "price_above_bid"), ({"price": [0.4, 1.0]}, "price_below_reserve"),
        ({"offered": [0.9, 9.0, 1.0]}, "paced_bid_above_bid"),
    ],
)  # fmt: skip
def test_every_broken_law_has_a_name(change, law):
    assert auction.broken_law(**{**GOOD, **change}) == law


def test_only_the_implicit_price_is_implicit():
    """5 - (5 - 1) * (.05 + .03) / 2 / .1 = 3.4."""
    case = {"probe_ctr": [0.05, 0.03], "ctr": 0.1, "reserve": 1.0, "paced_bid": 5.0}
    assert float(auction.implicit_price(5.0, 1.0, 0.1, [0.05, 0.03])) == pytest.approx(3.4) and auction.is_implicit(3.4, **case)
    assert auction.is_implicit(3.38, **case, currency_step=0.05) and not auction.is_implicit(3.34, **case, currency_step=0.05) and not auction.is_implicit(3.41, **case, currency_step=0.05)
    for price in (3.39999, 3.40001, 5.0, 1.0):
        assert not auction.is_implicit(price, **case)
    assert auction.is_implicit(1.0, **{**case, "probe_ctr": [0.3, 0.3]}) and auction.is_implicit(5.0, **{**case, "probe_ctr": [0.0]})
    assert not auction.is_implicit(3.4, **{**case, "probe_ctr": []}) and not auction.is_implicit(3.4, **{**case, "ctr": 0.0})


def test_only_the_truthful_price_is_truthful():
    """Golden case of AUCTION.md, ad 0 in slot 1: theta (4.5, 4.2), CTR (1, .6), price .4 * 4.5 + .6 * 4.2 = 4.32."""
    case = {"theta": [4.5, 4.2], "ctr": [1.0, 0.6], "slot": 1, "reserve": 0.0, "paced_bid": 5.0}
    assert auction.is_truthful(4.32, **case) and auction.is_truthful(4.3, **case, currency_step=0.05) and auction.is_truthful(4.5, **{**case, "reserve": 4.5})
    for price in (5.0, 4.5, 4.32001, 4.31999, 4.2, 0.0):
        assert not auction.is_truthful(price, **case)
    assert not auction.is_truthful(4.26, **case, currency_step=0.05) and not auction.is_truthful(4.33, **case, currency_step=0.05)
    assert auction.is_truthful(1.4, [9.0, 1.4], [0.5, 0.6], 2, 0.0, 4.0)  # what a better slot would bring plays no part
    assert auction.is_truthful(4.2, [4.5, 4.2], [0.6, 1.0], 1, 0.0, 5.0)  # clicks that rise in a worse slot: the monotone hull
    assert auction.is_truthful(2.0, [2.0, 2.0], [1.0, 0.1], 1, 0.0, 5.0)  # no bid wins the second slot
    assert auction.is_truthful(1.0, [None, 1.0], [0.0, 0.0], 2, 0.0, 5.0) and not auction.is_truthful(0.9, [None, 1.0], [0.0, 0.0], 2, 0.0, 5.0)  # never clicked


def test_one_pass_prices_equal_two_calls_at_100_000_ads():
    rng = np.random.default_rng(0)
    n, k = 100_000, 5
    pctr, bids, affinity, keys = rng.beta(2, 30, n), rng.lognormal(0, 0.5, n), rng.normal(0, 0.02, (n, k)), auction.tie_keys(np.arange(n))

    def ctr(pages):
        return pctr[pages] * 0.8 ** np.arange(k)

    page = auction.greedy_allocation(pctr, bids, affinity, 1.0, k, None, keys)
    two_calls = auction.critical_prices(pctr, bids, affinity, 1.0, page, ctr, tie_key=keys, page_ctr_batch=ctr)
    one_pass = auction.priced_page(pctr, bids, affinity, 1.0, k, ctr, tie_key=keys, page_ctr_batch=ctr)
    np.testing.assert_array_equal(two_calls.price, one_pass.price)
