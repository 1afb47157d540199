"""Off-policy estimates against truths known by enumeration: unbiased, doubly robust, honest about support."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from model.evaluation.off_policy import STRUCTURES, LoggedPages, estimate, weights

ADS, SLOTS, EPSILON = 4, 3, 0.4
ATTRACTION = np.array([0.5, 0.3, 0.2, 0.4])
CONTINUE = np.array([0.3, 0.9, 0.6, 0.7])
BEST = np.array([0, 1, 2, 3])
"""Order in which the logging policy likes the ads when it does not explore."""
TARGET = np.array([3, 0, 1])
PRICE = np.array([2.0, 0.5, 1.0])


def cascade_ctr(page: np.ndarray) -> np.ndarray:
    """Click probability of each slot: attraction times what the ads above leave of the reader."""
    return ATTRACTION[page] * np.concatenate([[1.0], np.cumprod(CONTINUE[page])[:-1]])


def position_ctr(page: np.ndarray) -> np.ndarray:
    return ATTRACTION[page] * 0.7 ** np.arange(SLOTS)


def propensities(page: np.ndarray) -> np.ndarray:
    """Epsilon-greedy, given the slots above."""
    left, result = list(BEST), []
    for ad in page:
        result.append((1 - EPSILON) * (ad == left[0]) + EPSILON / len(left))
        left.remove(ad)
    return np.array(result)


PAGES = np.array(list(itertools.permutations(range(ADS), SLOTS)))
CHANCE = np.array([propensities(page).prod() for page in PAGES])


def enumerated(ctr) -> tuple[LoggedPages, np.ndarray]:
    """Every (page, clicks) that can be logged, once, and its probability; the mean of an unbiased estimator's terms under it is the truth."""
    outcomes = np.array(list(itertools.product((0, 1), repeat=SLOTS)))
    page = np.repeat(PAGES, len(outcomes), axis=0)
    click = np.tile(outcomes, (len(PAGES), 1))
    q = np.array([ctr(row) for row in page])
    chance = np.repeat(CHANCE, len(outcomes)) * np.where(click == 1, q, 1 - q).prod(1)
    return LoggedPages(page, np.array([propensities(row) for row in page]), click, np.arange(len(page))), chance


def drawn(requests: int, rng: np.random.Generator, ctr=cascade_ctr) -> LoggedPages:
    at = rng.choice(len(PAGES), requests, p=CHANCE)
    page = PAGES[at]
    click = (rng.random(page.shape) < np.array([ctr(row) for row in PAGES])[at]).astype(int)
    return LoggedPages(page, np.array([propensities(row) for row in PAGES])[at], click, np.arange(requests))


def same(value: np.ndarray, requests: int) -> np.ndarray:
    return np.broadcast_to(value, (requests, SLOTS))


def test_the_chances_add_up() -> None:
    assert CHANCE.sum() == pytest.approx(1)
    assert enumerated(cascade_ctr)[1].sum() == pytest.approx(1)


@pytest.mark.parametrize("value", [np.ones(SLOTS), PRICE])
@pytest.mark.parametrize("forecast", [np.zeros(SLOTS), np.array([0.9, 0.1, 0.4])])
def test_inverse_propensity_and_doubly_robust_are_unbiased_under_a_cascade(value: np.ndarray, forecast: np.ndarray) -> None:
    """Exact expectations over everything that can be logged, whatever the forecast says."""
    logged, chance = enumerated(cascade_ctr)
    weight = weights(logged, same(TARGET, len(chance)), "cascade")
    truth = float((cascade_ctr(TARGET) * value).sum())
    assert chance @ (weight * logged.click * value).sum(1) == pytest.approx(truth, rel=1e-12)
    assert chance @ (forecast * value + weight * (logged.click - forecast) * value).sum(1) == pytest.approx(truth, rel=1e-12)
    np.testing.assert_allclose(chance @ weight, 1.0)


def test_slot_weights_are_right_without_a_cascade_and_wrong_with_one() -> None:
    for ctr, right in ((position_ctr, True), (cascade_ctr, False)):
        logged, chance = enumerated(ctr)
        weight = weights(logged, same(TARGET, len(chance)), "slot")
        normalised = (chance @ (weight * logged.click)) / (chance @ weight)
        assert np.allclose(normalised, ctr(TARGET)) == right


def test_doubly_robust_survives_wrong_propensities_when_the_forecast_is_right() -> None:
    logged, chance = enumerated(cascade_ctr)
    wrong = LoggedPages(logged.page, np.clip(logged.propensity**2, 0.01, 1), logged.click, logged.user)
    weight, q = weights(wrong, same(TARGET, len(chance)), "cascade"), cascade_ctr(TARGET)
    assert chance @ (q + weight * (logged.click - q)).sum(1) == pytest.approx(q.sum(), rel=1e-12)
    assert chance @ (weight * logged.click).sum(1) != pytest.approx(q.sum(), rel=0.05)


def test_estimates_are_their_textbook_formulas() -> None:
    logged = drawn(500, np.random.default_rng(0))
    target, value, forecast = (same(x, 500) for x in (TARGET, PRICE, np.array([0.3, 0.2, 0.1])))
    weight = np.zeros((500, SLOTS))
    for i in range(500):  # in plain loops
        product = 1.0
        for k in range(SLOTS):
            product *= (logged.page[i, k] == TARGET[k]) / logged.propensity[i, k]
            weight[i, k] = product
    result, reward = estimate(logged, target, value, forecast), logged.click * PRICE
    direct = (forecast * value).sum(1).mean()
    capped = np.minimum(weight, np.sqrt(500))
    expected = {
        "direct": direct,
        "ips": (weight * reward).sum(1).mean(),
        "snips": ((weight * reward).sum(0) / weight.sum(0)).sum(),
        "clipped": ((capped * reward).sum(0) / capped.sum(0)).sum(),
        "dr": direct + (weight * (reward - forecast * value)).sum(1).mean(),
        "dr_clipped": direct + ((capped * (reward - forecast * value)).sum(0) / capped.sum(0)).sum(),
    }
    assert {name: result[name][0] for name in expected} == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(result["effective_sample_size"], weight.sum(0) ** 2 / (weight**2).sum(0))
    np.testing.assert_allclose([row[0] for row in result["mean_weight"]], weight.mean(0))


@pytest.mark.parametrize("name", ["ips", "snips", "dr", "dr_clipped"])
def test_intervals_cover_the_truth(name: str) -> None:
    rng, truth = np.random.default_rng(1), float((cascade_ctr(TARGET) * PRICE).sum())
    inside = 0
    for _ in range(200):
        _, low, high = estimate(drawn(3000, rng), same(TARGET, 3000), same(PRICE, 3000), same(np.array([0.2, 0.2, 0.2]), 3000))[name]
        inside += low <= truth <= high
    assert 178 <= inside <= 199, inside  # 95 % of 200 is 190, binomial standard deviation 3.1; heavy weights cost a little


def test_self_normalised_estimates_never_leave_the_range_of_rewards() -> None:
    logged = drawn(40, np.random.default_rng(2))
    logged.click[:] = 1
    for structure in STRUCTURES:
        result = estimate(logged, same(BEST[:SLOTS], 40), same(np.ones(SLOTS), 40), same(np.zeros(SLOTS), 40), structure)
        assert result["snips"] == pytest.approx([SLOTS] * 3)  # every click is 1: no spread either


def test_a_user_counts_once_however_many_requests_she_makes() -> None:
    logged = drawn(400, np.random.default_rng(3))
    twice = LoggedPages(*(np.repeat(x, 2, axis=0) for x in (logged.page, logged.propensity, logged.click, logged.user)))
    arguments = [same(TARGET, 800), same(PRICE, 800), same(np.full(SLOTS, 0.2), 800)]
    one, two = estimate(logged, *(x[:400] for x in arguments)), estimate(twice, *arguments)
    for name in ("ips", "snips", "dr"):
        assert two[name] == pytest.approx(one[name], rel=1e-9)


def test_without_support_there_is_no_estimate_and_the_mean_weight_says_so() -> None:
    rng = np.random.default_rng(4)
    logged = drawn(300, rng)
    target = np.full((300, SLOTS), 77)  # an ad that the logging policy never shows
    result = estimate(logged, target, same(PRICE, 300), same(np.full(SLOTS, 0.1), 300))
    assert np.isnan(result["snips"][0]) and np.isnan(result["clipped"][0]) and result["ips"] == [0.0, 0.0, 0.0]
    assert result["dr_clipped"][0] == result["dr"][0] == result["direct"][0]
    assert result["mean_weight"] == [[0.0, 0.0, 0.0]] * SLOTS and result["effective_sample_size"] == [0.0] * SLOTS
    assert result["direct"][0] == pytest.approx(0.1 * PRICE.sum())


def test_empty_slots_earn_nothing() -> None:
    logged = drawn(2000, np.random.default_rng(5))
    short = np.where(np.arange(SLOTS) < 1, same(TARGET, 2000), -1)
    result = estimate(logged, short, same(np.ones(SLOTS), 2000), same(np.full(SLOTS, 0.5), 2000))
    assert result["direct"][0] == pytest.approx(0.5)
    for name in ("ips", "snips", "dr"):
        assert result[name][1] <= ATTRACTION[TARGET[0]] <= result[name][2]


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, float("nan")])
def test_impossible_propensities_are_refused(bad: float) -> None:
    logged = drawn(5, np.random.default_rng(6))
    propensity = logged.propensity.copy()
    propensity[2, 1] = bad
    with pytest.raises(ValueError, match="propensities of shown ads"):
        LoggedPages(logged.page, propensity, logged.click, logged.user)
