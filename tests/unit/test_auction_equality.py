"""Fast against reference, single against batch, predicted against re-run: on thousands of drawn markets."""

from __future__ import annotations

import numpy as np
import pytest

import auction
from auction import batch
from auction.reference import reference_critical_prices, reference_greedy_allocation, reference_gsp_prices, reference_regret


def draw(rng, n, k, ties=False, shape=()):
    """A market; with `ties`, values on a coarse grid so that equal scores abound."""
    if ties:
        pctr, bids = rng.integers(1, 4, (*shape, n)) / 4, rng.integers(0, 4, (*shape, n)) / 2
        return pctr, bids, rng.integers(0, 3, (*shape, n, k)) / 4, np.ones((*shape, n, k))
    return rng.beta(2, 20, (*shape, n)), rng.lognormal(0, 0.5, (*shape, n)), rng.normal(0, 0.03, (*shape, n, k)), np.exp(rng.normal(0, 0.3, (*shape, n, k)))


def pairwise_ctr(rng, pctr):
    """General externalities: every ad above multiplies the CTR by its own factor, so CTR may rise in a worse slot."""
    effect = np.exp(rng.normal(0, 0.5, (len(pctr), len(pctr))))
    return lambda page: np.array([pctr[ad] * np.prod(effect[page[:slot], ad]) for slot, ad in enumerate(page)])


@pytest.mark.parametrize("ties", [False, True])
def test_pages_equal_reference_on_thousands_of_markets(ties):
    rng = np.random.default_rng(0)
    for n, k in ((1, 1), (2, 3), (7, 3), (30, 4), (40, 2)):  # 30 and 40 exceed the shortlist
        pctr, bids, affinity, slopes = draw(rng, n, k, ties, (300,))
        eligible = rng.random((300, n)) < 0.8
        keys = auction.tie_keys(rng.permutation(1000)[:n], "salt")
        pages = batch.greedy_pages(pctr, bids, affinity, slopes, k, eligible, keys)
        for i in range(300):
            expected = reference_greedy_allocation(pctr[i], bids[i], affinity[i], slopes[i], k, eligible[i], keys)
            assert pages[i][pages[i] >= 0].tolist() == expected
            if i < 40:
                assert auction.greedy_allocation(pctr[i], bids[i], affinity[i], slopes[i], k, eligible[i], keys).tolist() == expected


@pytest.mark.parametrize("externality", ["position", "pairwise"])
def test_prices_equal_reference(externality):
    rng = np.random.default_rng(1)
    repaired = displayed = 0
    for _ in range(250):
        n, k = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        pctr, bids, affinity, slopes = draw(rng, n, k)
        reserve = rng.choice([0.0, 0.5, 1.0]) * rng.random(n)
        eligible = rng.random(n) < 0.9
        keys = auction.tie_keys(np.arange(n), "s")
        page_ctr = pairwise_ctr(rng, pctr) if externality == "pairwise" else (lambda page, p=pctr: p[page] * 0.7 ** np.arange(len(page)))
        page = auction.greedy_allocation(pctr, bids, affinity, slopes, k, eligible & (bids >= reserve), keys)
        pricing = auction.critical_prices(pctr, bids, affinity, slopes, page, page_ctr, reserve, eligible, keys)
        price, theta = reference_critical_prices(pctr, bids, affinity, slopes, page.tolist(), page_ctr, reserve, eligible, keys)
        np.testing.assert_allclose(pricing.price, price, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(pricing.theta, np.array(theta).reshape(len(page), len(page)), rtol=1e-12, atol=1e-12)
        assert auction.broken_law(page, pctr[page], pricing.price, bids, reserve, eligible, k) is None
        for slot, ad in enumerate(page):
            assert auction.is_truthful(pricing.price[slot], pricing.theta[slot], pricing.ctr[slot], slot + 1, reserve[ad], bids[ad])
        repaired, displayed = repaired + int(pricing.repaired.sum()), displayed + len(page)
    assert (repaired == 0) if externality == "position" else 0.02 < repaired / displayed < 0.5


def test_batch_prices_equal_single():
    rng = np.random.default_rng(2)
    b, n, k = 120, 40, 4
    pctr, bids, affinity, slopes = draw(rng, n, k, shape=(b,))
    keys = auction.tie_keys(np.arange(n))
    reserve = rng.random((b, n))
    eligible = bids >= reserve
    eligible[:5, 3:] = False  # fewer ads than slots
    market = batch.counterfactuals(pctr, bids, affinity, slopes, k, eligible, keys)
    np.testing.assert_array_equal(market.pages, batch.greedy_pages(pctr, bids, affinity, slopes, k, eligible, keys))
    np.testing.assert_array_equal(market.theta, batch.critical_bids(pctr, bids, affinity, slopes, market.pages, eligible, keys))
    np.testing.assert_array_equal(market.moved, batch.counterfactual_pages(pctr, bids, affinity, slopes, market.pages, eligible, keys))
    np.testing.assert_array_equal(market.without, batch.pages_without(pctr, bids, affinity, slopes, market.pages, eligible, keys))
    decay = 0.7 ** np.arange(k)
    ctr = batch.at_page(pctr, market.pages)[:, :, None] * decay
    bid, floor = batch.at_page(bids, market.pages), batch.at_page(reserve, market.pages)
    price, repaired = batch.critical_prices(market.theta, ctr, market.pages, bid, floor)
    gsp = batch.gsp_prices(batch.at_page(pctr, market.pages), bid, batch.runner_up_scores(pctr, bids, market.pages, eligible), floor)
    assert not repaired.any()
    for i in range(b):
        page = market.pages[i][market.pages[i] >= 0]
        one = auction.critical_prices(
            pctr[i], bids[i], affinity[i], slopes[i], page, lambda shown, i=i: pctr[i][shown] * decay[: len(shown)], reserve[i], eligible[i], keys
        )
        m = len(page)
        np.testing.assert_array_equal(price[i, :m], one.price)
        np.testing.assert_array_equal(market.theta[i, :m, :m], one.theta)
        np.testing.assert_array_equal(gsp[i, :m], auction.gsp_prices(pctr[i], bids[i], page, reserve[i], eligible=eligible[i]))
        assert (price[i, m:] == 0).all()
        for own in range(m):
            without = reference_greedy_allocation(pctr[i], bids[i], affinity[i], slopes[i], k, eligible[i] & (np.arange(n) != page[own]), keys)
            assert market.without[i, own][market.without[i, own] >= 0].tolist() == without
            if i % 6 == 0:
                for slot in range(m):
                    moved = reference_greedy_allocation(pctr[i], bids[i], affinity[i], slopes[i], k, eligible[i], keys, forced=(int(page[own]), slot))
                    assert market.moved[i, own, slot][:m].tolist() == moved


def test_gsp_equals_reference():
    rng = np.random.default_rng(3)
    for _ in range(300):
        n, k = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        pctr, bids, _, _ = draw(rng, n, k)
        reserve = rng.random(n)
        page = auction.greedy_allocation(pctr, bids, 0.0, 1.0, k, bids >= reserve)
        np.testing.assert_allclose(auction.gsp_prices(pctr, bids, page, reserve), reference_gsp_prices(pctr, bids, page.tolist(), reserve), rtol=1e-14)


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_predict_the_slot_on_100_000_triples(ties):
    """Issue: the slot predicted from theta equals the re-run allocation, winners and losers, zero mismatches."""
    rng = np.random.default_rng(4)
    b, n, k, misreports = 5_000, 14, 3, 20
    pctr, bids, affinity, slopes = draw(rng, n, k, ties, (b,))
    keys = auction.tie_keys(np.arange(n))
    pages = batch.greedy_pages(pctr, bids, affinity, slopes, k, None, keys)
    theta = batch.critical_bids_of_all(pctr, bids, affinity, slopes, pages, None, keys)
    ad = rng.integers(0, n, b)
    own = theta[np.arange(b), ad]
    mismatches = 0
    for trial in range(misreports):
        near = np.where(np.isfinite(own), own, 1.0)[np.arange(b), rng.integers(0, k, b)]
        bid = np.maximum(near * (1 + rng.choice([-1e-6, 1e-6, -0.1, 0.1], b)), 0.0) if trial % 2 else rng.lognormal(0, 0.7, b)
        lied = bids.copy()
        lied[np.arange(b), ad] = bid
        shown = batch.greedy_pages(pctr, lied, affinity, slopes, k, None, keys) == ad[:, None]
        slot = np.where(shown.any(axis=1), shown.argmax(axis=1), k)
        at_edge = (np.abs(own - bid[:, None]) <= 1e-8 * np.maximum(1.0, bid[:, None])).any(axis=1)  # there the tie key decides
        predicted = (own >= bid[:, None]).sum(axis=1)
        mismatches += int((predicted != slot)[~at_edge].sum())
        assert ties or not at_edge.all()
    assert mismatches == 0


@pytest.mark.parametrize("ties", [False, True])
def test_pages_with_a_loser_equal_a_rerun(ties):
    """A loser that bids between two of its thresholds gets that slot, on the page that `pages_with` says."""
    rng = np.random.default_rng(11)
    b, n, k = 300, 9, 4
    pctr, bids, affinity, slopes = draw(rng, n, k, ties, (b,))
    eligible = rng.random((b, n)) < 0.7
    eligible[:5, 3:] = False  # pages with empty slots
    keys = auction.tie_keys(np.arange(n))
    pages = batch.greedy_pages(pctr, bids, affinity, slopes, k, eligible, keys)
    theta = batch.critical_bids_of_all(pctr, bids, affinity, slopes, pages, eligible, keys, barred=np.zeros((b, n), bool))
    shown = (pages[:, :, None] == np.arange(n)).any(axis=1)
    losers = np.argsort(np.where(shown, 2.0, rng.random((b, n))), axis=1)[:, :3]
    losers = np.where(np.take_along_axis(shown, losers, axis=1), -1, losers)
    found = batch.pages_with(pctr, bids, affinity, slopes, pages, losers, eligible, keys)
    compared = 0
    for request, j, slot in np.argwhere(found[..., 0] >= 0):
        ad = losers[request, j]
        low, high = theta[request, ad, slot], np.inf if slot == 0 else theta[request, ad, slot - 1]
        bid = max(low, 0.0) + (1.0 if np.isinf(high) else 0.5 * (high - max(low, 0.0)))
        if not low + 1e-6 < bid < high - 1e-6:
            continue  # no bid wins this slot
        lied, present = bids[request : request + 1].copy(), eligible[request : request + 1].copy()
        lied[0, ad], present[0, ad] = bid, True
        again = batch.greedy_pages(pctr[request : request + 1], lied, affinity[request : request + 1], slopes[request : request + 1], k, present, keys)[0]
        np.testing.assert_array_equal(found[request, j, slot], again)
        compared += 1
    assert compared > 500
    with pytest.raises(auction.AuctionInputError, match="must not be on the page"):
        batch.pages_with(pctr, bids, affinity, slopes, pages, pages[:, :1], eligible, keys)


@pytest.mark.parametrize("kind", ["position", "cascade"])
def test_no_misreport_gains_on_a_200_point_grid(kind):
    """With position-only and cascade CTR the greedy page with critical prices is exactly truthful, for winners and losers."""
    rng = np.random.default_rng(5)
    regrets = []
    for _ in range(6):
        n, k = 8, 3
        pctr, bids, affinity, slopes = draw(rng, n, k)
        continuation = rng.random(n)

        def ctr(pages, p=pctr, c=continuation):
            above = np.cumprod(np.where(pages >= 0, c[pages], 1.0), axis=1)
            reach = 0.6 ** np.arange(pages.shape[1]) if kind == "position" else np.concatenate([np.ones((len(pages), 1)), above[:, :-1]], axis=1)
            return p[pages] * reach

        rule = auction.GreedyRule(pctr, affinity, slopes, k, ctr, reserve=0.3 * rng.random(n), tie_key=auction.tie_keys(np.arange(n)))
        regrets.append(auction.exact_regret(rule, bids, bids, gammas=tuple(np.linspace(0.02, 4.0, 200))))
    assert max(float(r.gain.max()) for r in regrets) < 1e-9
    result = auction.psi(regrets)
    assert result.psi_exact < 1e-9
    assert result.psi_loser < 1e-9
    assert result.displayed == 18
    assert regrets[0].explain().startswith(("none of 8", "ad in row"))


@pytest.mark.parametrize("mode", ["gsp", "first_price", "vcg", "critical"])
def test_exact_regret_dominates_brute_force(mode):
    """Regret is not below a brute force over a grid of bids, and the paper's grid is not above it."""
    rng = np.random.default_rng(6)
    n, k = 6, 3
    pctr, bids, affinity, _ = draw(rng, n, k)
    page_ctr = pairwise_ctr(rng, pctr)

    def ctr(pages):
        return np.array([np.pad(page_ctr(page[page >= 0]), (0, int((page < 0).sum()))) for page in pages])

    rule = auction.GreedyRule(pctr, affinity, 1.0, k, ctr, mode=mode, slot_ctr=[1.0, 0.6, 0.3])
    regret = auction.exact_regret(rule, bids, bids)
    assert (regret.grid_gain <= regret.gain).all()
    for ad in range(n):
        assert regret.gain[ad] >= reference_regret(rule, bids, bids, ad, np.linspace(1e-3, 2 * bids.max(), 60)) - 1e-6


def test_bisection_finds_the_same_thresholds():
    rng = np.random.default_rng(7)
    n, k = 6, 2
    pctr, bids, affinity, slopes = draw(rng, n, k)
    rule = auction.GreedyRule(pctr, affinity, slopes, k, lambda pages: pctr[pages] * 0.5 ** np.arange(k), mode="gsp", reserve=0.2)
    known = auction.exact_regret(rule, bids, bids)
    black_box = auction.exact_regret(lambda b: tuple(rule(b)), bids, bids)
    np.testing.assert_allclose(black_box.gain, known.gain, atol=1e-9)


def test_utility_under_another_ctr_model():
    """Priced with one CTR model and judged with another, truthfulness is no longer exact; both numbers come out."""
    rng = np.random.default_rng(8)
    n, k = 8, 3
    pctr, bids, affinity, slopes = draw(rng, n, k)

    def model(pages):
        return pctr[pages] * 0.8 ** np.arange(k)

    def world(pages):
        return pctr[pages] * 0.3 ** np.arange(k)

    inside = auction.exact_regret(auction.GreedyRule(pctr, affinity, slopes, k, model), bids, bids)
    outside = auction.exact_regret(auction.GreedyRule(pctr, affinity, slopes, k, model, utility_ctr=world), bids, bids)
    assert inside.psi_exact < 1e-9
    assert outside.psi_exact > 1e-4
    own = auction.GreedyRule(pctr, affinity, slopes, k, model, mode=lambda b, market, ctr: 0.5 * batch.at_page(b, market.pages))
    assert auction.exact_regret(own, bids, bids, search_points=5).psi_exact > 0.01
