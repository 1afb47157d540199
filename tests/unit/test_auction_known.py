"""Answers that nobody here wrote: every number is from AUCTION.md of the specification or the paper named beside it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import auction
from auction import batch, critical
from auction.myerson import VirtualValue
from auction.reference import reference_vcg_positions

PCTR = np.array([0.1, 0.1, 0.2, 0.05])
BIDS = np.array([5.0, 4.0, 1.5, 6.0])
AFFINITY = np.array([[0.0, 0.0], [0.05, 0.0], [0.0, 0.12], [0.0, 0.0]])
POSITION = np.array([1.0, 0.6])
CONTINUATION = np.array([0.5, 0.9, 0.6, 0.8])


def position_ctr(page):
    return PCTR[page] * POSITION[: len(page)]


def cascade_ctr(page):
    return PCTR[page] * np.concatenate([[1.0], np.cumprod(CONTINUATION[page[:-1]])])


@pytest.mark.parametrize(
    ("page_ctr", "expected"),
    [(position_ctr, [4.32, 1.4]), (cascade_ctr, [4.23, 1.4]), (lambda page: PCTR[page], [4.2, 1.4])],
    ids=["position", "cascade", "flat"],
)
def test_golden_page_thresholds_and_prices(page_ctr, expected):
    """AUCTION.md, 'Greedy with affinity, golden case'."""
    page = auction.greedy_allocation(PCTR, BIDS, AFFINITY, 1.0, 2)
    assert page.tolist() == [0, 2]
    pricing = auction.critical_prices(PCTR, BIDS, AFFINITY, 1.0, page, page_ctr)
    np.testing.assert_allclose(pricing.theta, [[4.5, 4.2], [2.5, 1.4]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(pricing.price, expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(pricing.price, pricing.critical_price)
    assert pricing.runner_up.tolist() == [1, 1]
    assert pricing.reachable.all()
    assert not pricing.repaired.any()
    assert not pricing.tied.any()


@pytest.mark.parametrize("slope", [2.0, np.full((4, 2), 2.0)], ids=["scalar", "array"])
def test_golden_case_with_slopes(slope):
    """Weight 2 with affinity doubled is the same auction."""
    page = auction.greedy_allocation(PCTR, BIDS, 2.0 * AFFINITY, slope, 2)
    pricing = auction.critical_prices(PCTR, BIDS, 2.0 * AFFINITY, slope, page, position_ctr)
    np.testing.assert_allclose(pricing.price, [4.32, 1.4], atol=1e-12)


def optimal_revenue(phi, n):
    """Expected optimal revenue of n iid bidders: E[max(0, phi(highest value))] (Myerson 1981), by Gauss-Legendre over quantiles."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    total = 0.0
    sold_at_reserve = 1.0 - float(phi._distribution.cdf(phi.reserve))
    for low, high in itertools.pairwise(np.geomspace(1e-13, sold_at_reserve, 60)):
        sold = 0.5 * (low + high) + 0.5 * (high - low) * nodes
        value = np.array([phi(float(phi._distribution.ppf(1.0 - q))) for q in sold])
        total += float((value * n * (1.0 - sold) ** (n - 1) * weights).sum()) * 0.5 * (high - low)
    return total


@pytest.mark.parametrize(("n", "revenue"), [(1, 1 / 4), (2, 5 / 12), (3, 17 / 32), (4, 49 / 80), (5, 43 / 64)])
def test_myerson_uniform_revenue(n, revenue):
    """AUCTION.md: n iid U[0,1], reserve 1/2, revenue 2n/(n+1)(1-2^-(n+1)) - (1-2^-n)."""
    assert 2 * n / (n + 1) * (1 - 2.0 ** -(n + 1)) - (1 - 2.0**-n) == pytest.approx(revenue, abs=1e-15)
    phi = VirtualValue(auction.Uniform())
    assert phi.reserve == pytest.approx(0.5, abs=1e-15)
    assert phi.ironed == ()
    assert optimal_revenue(phi, n) == pytest.approx(revenue, abs=1e-9)
    drawn = np.random.default_rng(7).random((4000, n))
    paid = np.array([auction.myerson_optimal(values, auction.Uniform())[1] for values in drawn])
    assert abs(paid.mean() - revenue) < 3 * paid.std() / math.sqrt(len(paid))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_second_price_uniform_revenue(n):
    """AUCTION.md: without reserve (n-1)/(n+1); GSP and VCG with one slot are the second price auction."""
    drawn = np.random.default_rng(11).random((500, n))
    paid = []
    for values in drawn:
        page = auction.greedy_allocation(np.ones(n), values, 0.0, 1.0, 1)
        gsp = auction.gsp_prices(np.ones(n), values, page)[0]
        assert gsp == auction.vcg_position_prices(values, [1.0])[0]
        paid.append(gsp)
    assert abs(np.mean(paid) - (n - 1) / (n + 1)) < 3 * np.std(paid) / math.sqrt(len(paid))


def test_myerson_exponential():
    """AUCTION.md: exponential values, mean 3, n=3: optimum 2.751693 with reserve 3, second price 2.5."""
    phi = VirtualValue(auction.Exponential(3.0))
    assert phi.reserve == pytest.approx(3.0, abs=1e-12)
    assert optimal_revenue(phi, 3) == pytest.approx(2.751693, abs=5e-7)
    # Sampled by our own second price. 20 seeds pooled: seed 3 alone, with 200,000 draws, lies 3.4 standard errors off (1 of the first 200 does).
    values = np.concatenate([np.random.default_rng(seed).exponential(3.0, (5_000, 3)) for seed in range(20)])
    ones = np.ones_like(values)
    pages = batch.greedy_pages(ones, values, 0.0, 1.0, 1)
    paid = batch.gsp_prices(batch.at_page(ones, pages), batch.at_page(values, pages), batch.runner_up_scores(ones, values, pages))[:, 0]
    assert abs(paid.mean() - 2.5) < 3 * paid.std() / math.sqrt(len(paid))
    for row in values[:200]:
        winner, price = auction.myerson_optimal(row, auction.Exponential(3.0))
        first, second = int(np.argmax(row)), float(np.sort(row)[1])
        assert (winner, price) == ((first, pytest.approx(max(3.0, second), abs=1e-12)) if row[first] >= 3.0 else (-1, 0.0))


class TwoBlocks:
    """Hartline's bimodal example: uniform on [0, 3] with probability 3/4, on (3, 8] with 1/4 (Mechanism Design and Approximation, ch. 3)."""

    def cdf(self, x):
        return np.where(np.asarray(x) <= 3.0, np.clip(x, 0.0, 3.0) / 4.0, 0.75 + (np.clip(x, 3.0, 8.0) - 3.0) / 20.0)

    def pdf(self, x):
        x = np.asarray(x)
        return np.where((x < 0.0) | (x > 8.0), 0.0, np.where(x <= 3.0, 0.25, 0.05))

    def ppf(self, q):
        q = np.asarray(q, dtype=np.float64)
        return np.where(q <= 0.75, 4.0 * q, 3.0 + 20.0 * (q - 0.75))


def test_myerson_irregular_is_ironed():
    """phi = 2v-4 on [0,3], 2v-8 above; equal areas give the slope 2(sqrt5-1)/(sqrt5+1), ends (slope+4)/2 and (slope+8)/2 (solved by hand)."""
    phi = VirtualValue(TwoBlocks())
    slope = 2 * (math.sqrt(5) - 1) / (math.sqrt(5) + 1)
    assert len(phi.ironed) == 1
    assert phi.ironed[0].virtual_value == pytest.approx(slope, abs=1e-9)
    assert phi.ironed[0].low == pytest.approx((slope + 4) / 2, abs=1e-9)
    assert phi.ironed[0].high == pytest.approx((slope + 8) / 2, abs=1e-9)
    assert phi.reserve == pytest.approx(2.0, abs=1e-12)
    grid = [phi(v) for v in np.linspace(0.0, 8.0, 2001)]
    assert (np.diff(grid) >= -1e-12).all()
    blocks = TwoBlocks()
    low, high = phi.ironed[0].low, phi.ironed[0].high
    assert auction.myerson_optimal([3.0, 4.0], blocks) == (0, pytest.approx(low, abs=1e-9))  # a tie on the ironed interval: lower index
    assert auction.myerson_optimal([3.0, 6.0], blocks) == (1, pytest.approx(high, abs=1e-9))  # must beat it strictly
    assert auction.myerson_optimal([6.0, 3.0], blocks) == (0, pytest.approx(low, abs=1e-9))
    assert auction.myerson_optimal([5.0, 6.0], blocks) == (1, pytest.approx(5.0, abs=1e-9))


def test_myerson_asymmetric():
    """U[0,1] against U[0,2] (Myerson 1981): phi1 = 2v-1, phi2 = 2v-2; the stronger bidder must beat the weaker by 1/2."""
    both = [auction.Uniform(0, 1), auction.Uniform(0, 2)]
    assert auction.myerson_optimal([0.9, 1.3], both) == (0, pytest.approx(0.8, abs=1e-12))
    assert auction.myerson_optimal([0.8, 1.5], both) == (1, pytest.approx(1.3, abs=1e-12))
    assert auction.myerson_optimal([0.4, 1.5], both) == (1, pytest.approx(1.0, abs=1e-12))
    assert auction.myerson_optimal([0.4, 0.9], both) == (-1, 0.0)


def test_myerson_identity_on_a_smooth_allocation():
    """AUCTION.md: x(b) = sigma(3(b-1)), b = 1.5 -> payment 0.6754197388."""
    assert auction.myerson_payment(lambda b: 1.0 / (1.0 + np.exp(-3.0 * (b - 1.0))), 1.5) == pytest.approx(0.6754197388, abs=5e-11)


def test_implicit_prices_are_myersons_in_expectation():
    """The same allocation through `implicit_price`: many draws of one request, and single draws of many requests."""
    clicks, bid = lambda b: 1.0 / (1.0 + np.exp(-3.0 * (b - 1.0))), 1.5
    drawn = auction.draws(7, 11, 20_000)
    price = auction.implicit_price(bid, 0.0, clicks(bid), clicks(auction.probe_bids(bid, 0.0, drawn)))
    assert price * clicks(bid) == pytest.approx(0.6754197388, abs=1e-5)
    single = np.array([auction.draws(request, 11, 1) for request in range(4_000)])
    prices = auction.implicit_price(np.full(4_000, bid), np.zeros(4_000), np.full(4_000, clicks(bid)), clicks(auction.probe_bids(np.full(4_000, bid), np.zeros(4_000), single)))
    assert prices.mean() * clicks(bid) == pytest.approx(0.6754197388, abs=4 * prices.std() * clicks(bid) / np.sqrt(4_000))
    assert np.array_equal(auction.draws(7, 11, 3), auction.draws(7, 11, 3)) and not np.array_equal(auction.draws(7, 11, 3), auction.draws(8, 11, 3))
    # Nobody competes: the reserve. Chances that fall with the bid stop at it. An ad that is shown only at its own bid pays that.
    assert auction.implicit_price(4.0, 0.5, 0.2, [0.2, 0.2]) == pytest.approx(0.5) and auction.implicit_price(4.0, 0.5, 0.1, [0.3, 0.2]) == 0.5
    assert auction.implicit_price(4.0, 0.5, 0.2, [0.0, 0.0]) == 4.0
    for wrong in ((4.0, 5.0, 0.2, [0.1]), (4.0, 0.5, 0.0, [0.1]), (np.nan, 0.5, 0.2, [0.1]), (4.0, 0.5, 0.2, [-0.1])):
        with pytest.raises(auction.AuctionInputError, match="implicit price needs"):
            auction.implicit_price(*wrong)
    with pytest.raises(auction.AuctionInputError, match="at least one draw"):
        auction.draws(1, 1, 0)


def clicks_rule(clicks, price):
    """Positions with given clicks, equal quality: page by bid, `price(bids, page)` per click."""
    slots = np.asarray(clicks, dtype=np.float64)

    def rule(bids):
        page = auction.greedy_allocation(np.ones(len(bids)), bids, 0.0, 1.0, min(len(slots), len(bids)))
        return page, price(bids, page), slots[: len(page)]

    return rule


def gsp(bids, page):
    return auction.gsp_prices(np.ones(len(bids)), bids, page)


def test_edelman_ostrovsky_schwarz():
    """AER 97(1), 2007: values 10, 4, 2, clicks 200 and 100: truthful GSP collects 800 + 200, VCG 600 + 200."""
    values = np.array([10.0, 4.0, 2.0])
    page = auction.greedy_allocation(np.ones(3), values, 0.0, 1.0, 2)
    np.testing.assert_allclose(gsp(values, page) * [200, 100], [800, 200], atol=1e-9)
    np.testing.assert_allclose(auction.vcg_position_prices(values, [200, 100]) * [200, 100], [600, 200], atol=1e-9)
    np.testing.assert_allclose(auction.vcg_prices(np.ones(3), values, page, [200, 100]) * [200, 100], [600, 200], atol=1e-9)


def test_gsp_shading_pays_with_close_slots():
    """EOS: clicks 200 and 199, the top bidder's utility rises from 1200 to 1592 by shading."""
    values = np.array([10.0, 4.0, 2.0])
    regret = auction.exact_regret(clicks_rule([200, 199], gsp), values, values)
    assert regret.utility[0] == pytest.approx(1200)
    assert regret.best_utility[0] == pytest.approx(1592)
    assert 2.0 - 1e-8 < regret.best_bid[0] < 4.0  # just under 2 is still a tie, which row 0 wins
    assert regret.explain().startswith("ad in row 0 (shown in slot 0) gains 392")


def test_gsp_truthful_regret():
    """AUCTION.md: values 4, 3, 2, clicks 3, 2, 1: truthful utilities 3, 2, 2; regrets 1, 1, 0."""
    values = np.array([4.0, 3.0, 2.0])
    regret = auction.exact_regret(clicks_rule([3, 2, 1], gsp), values, values)
    np.testing.assert_allclose(regret.utility, [3, 2, 2], atol=1e-12)
    np.testing.assert_allclose(regret.gain, [1, 1, 0], atol=1e-12)
    assert regret.psi_exact == pytest.approx(2 / 7)
    assert regret.psi_loser == 0.0


def test_gsp_inefficient_nash():
    """AUCTION.md: values 16, 15, 14, clicks 3, 2, 1, bids 7, 9, 11: utilities 16, 16, 15, no profitable deviation."""
    regret = auction.exact_regret(clicks_rule([3, 2, 1], gsp), [16.0, 15.0, 14.0], [7.0, 9.0, 11.0])
    np.testing.assert_allclose(regret.utility, [16, 16, 15], atol=1e-12)
    np.testing.assert_allclose(regret.gain, 0.0, atol=1e-12)


def test_vcg_has_no_regret_and_first_price_has():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    vcg = auction.exact_regret(clicks_rule([3, 2, 1], lambda bids, page: auction.vcg_prices(np.ones(len(bids)), bids, page, [3, 2, 1])), values, values)
    assert vcg.gain.max() < 1e-12
    first = auction.exact_regret(clicks_rule([3, 2, 1], lambda bids, page: auction.first_price(bids, page)), values, values)
    # by paying just above the next threshold: (4-3)*3, (4-2)*2, (4-1)*1 -> 4; (3-2)*2, (3-1)*1 -> 2; (2-1)*1; 0
    np.testing.assert_allclose(first.gain, [4, 2, 1, 0], atol=1e-5)
    assert first.psi_exact == math.inf


def test_vcg_positions_equal_brute_force():
    """p_k alpha_k = sum_{l>=k} b_{l+1}(alpha_l - alpha_{l+1}) against the welfare that the others lose, four bidders among them."""
    rng = np.random.default_rng(5)
    for _ in range(150):
        n, k = int(rng.integers(1, 6)), int(rng.integers(1, 5))
        bids, alpha = rng.random(n) * 10, -np.sort(-rng.random(k))
        np.testing.assert_allclose(auction.vcg_position_prices(bids, alpha), reference_vcg_positions(bids, alpha), atol=1e-9)


def test_four_bidder_position_auction():
    """Solved by hand: bids 8, 6, 4, 2, clicks 10, 5, 2. VCG totals 6*5+4*3+2*2 = 46, 4*3+2*2 = 16, 2*2 = 4; GSP totals 60, 20, 4."""
    bids = np.array([8.0, 6.0, 4.0, 2.0])
    clicks = np.array([10.0, 5.0, 2.0])
    np.testing.assert_allclose(auction.vcg_position_prices(bids, clicks) * clicks, [46, 16, 4], atol=1e-12)
    page = auction.greedy_allocation(np.ones(4), bids, 0.0, 1.0, 3)
    np.testing.assert_allclose(gsp(bids, page) * clicks, [60, 20, 4], atol=1e-12)


def test_cascade_oracle():
    """AUCTION.md: p (.3,.2,.25), continuation (.5,.9,.6), value 10, K=2 -> page (1, 0), value 4.7; multiplicative slopes 1/(1-c) find it."""
    p, c = np.array([0.3, 0.2, 0.25]), np.array([0.5, 0.9, 0.6])
    value = {pair: 10 * (p[pair[0]] + c[pair[0]] * p[pair[1]]) for pair in itertools.permutations(range(3), 2)}
    assert max(value, key=value.get) == (1, 0)
    assert value[(1, 0)] == pytest.approx(4.7)
    page = auction.greedy_allocation(p, np.full(3, 10.0), 0.0, np.stack([1.0 / (1.0 - c), np.ones(3)], axis=1), 2)
    assert page.tolist() == [1, 0]


def test_rounding_never_takes_a_truthful_price_below_the_reserve():
    """Whose critical bids all lie below the reserve pays it exactly: the weighted mean of equal numbers may round to an ulp less."""
    rng = np.random.default_rng(0)
    reserve = rng.random(20_000)
    ctr = np.sort(rng.random((20_000, 3)), axis=1)[:, ::-1] * 10.0 ** rng.integers(-12, 1, (20_000, 1))
    theta = np.sort(rng.random((20_000, 3)), axis=1)[:, ::-1] * reserve[:, None]
    drop = ctr - np.concatenate([ctr[:, 1:], np.zeros((20_000, 1))], axis=1)
    assert ((reserve[:, None] * drop).sum(axis=1) / ctr[:, 0] < reserve).any()  # it does happen
    everything = np.ones((20_000, 3), bool)
    price, repaired = critical.step_prices(theta, ctr, everything, np.zeros(20_000, np.int64), reserve)
    assert (price >= reserve).all() and not repaired.any()
    np.testing.assert_allclose(price, reserve, rtol=1e-15)
    reached = np.concatenate([np.full((20_000, 1), 0.9), np.full((20_000, 2), 0.5)], axis=1)
    assert (critical.step_prices_everywhere(reached, ctr, np.ones(20_000)) >= 1.0).all()
