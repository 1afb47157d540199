"""Paired policies, days as shocks and exact tests: reference answers, equal forms, and coverage on drawn users."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from monitoring import ab_designs, ab_stats


@pytest.mark.parametrize(("method", "p"), [("barnard", 0.5306371027666), ("boschloo", 0.4000169399363), ("fisher", 0.3999948918154)])
def test_r8_exact_tests(method, p):
    assert ab_designs.exact_shares_p(19, 53, 13, 47, method) == pytest.approx(p, abs=1e-9)
    assert ab_designs.exact_shares_p(13, 47, 19, 53, method) == pytest.approx(p, rel=0.02)  # the tables' two-sided sets differ a little when mirrored


def test_fisher_is_the_hypergeometric_sum():
    """The two-sided p adds every table with the same margins that is no likelier than the one seen."""
    law = stats.hypergeom(20, 9, 8)
    chance = law.pmf(np.arange(9))
    assert ab_designs.exact_shares_p(6, 8, 3, 12, "fisher") == pytest.approx(chance[chance <= law.pmf(6) * (1 + 1e-9)].sum(), rel=1e-10)


def test_exact_tests_refuse_what_is_no_share():
    with pytest.raises(ValueError, match="cases must lie"):
        ab_designs.exact_shares_p(5, 4, 1, 4)
    with pytest.raises(ValueError, match="method"):
        ab_designs.exact_shares_p(1, 4, 1, 4, "chi2")


def _users(generator, count=400):
    activity = generator.gamma(2.0, 1.0, count)
    shown = generator.poisson(5 * activity) + 1.0
    return generator.binomial(shown.astype(int), np.minimum(generator.beta(3, 30, count) * activity, 0.9)).astype(float), shown


def test_f8_identical_policies_differ_by_exactly_nothing():
    x, y = _users(np.random.default_rng(0))
    got = ab_designs.paired_lift(x, y, x, y)
    assert (got.value, got.low, got.high, got.p_value) == (0.0, 0.0, 0.0, 1.0)
    boot = ab_designs.paired_lift_bootstrap(x, y, x, y, np.random.default_rng(1), 200)
    assert (boot.value, boot.low, boot.high) == (0.0, 0.0, 0.0)


def test_f8_bootstrap_and_delta_agree_and_pairing_pays():
    generator = np.random.default_rng(2)
    x, y = _users(generator, 2000)
    more = x + generator.binomial(1, 0.05, len(x))
    delta = ab_designs.paired_lift(x, y, more, y)
    boot = ab_designs.paired_lift_bootstrap(x, y, more, y, generator)
    assert boot.value == pytest.approx(delta.value, rel=1e-12)
    assert boot.standard_error == pytest.approx(delta.standard_error, rel=0.08)
    assert [boot.low, boot.high] == pytest.approx([delta.low, delta.high], abs=0.3 * delta.standard_error)
    unpaired = ab_stats.lift_delta(ab_stats.ratio_per_user(x, y), ab_stats.ratio_per_user(more, y))
    assert unpaired.standard_error > 3 * delta.standard_error


def test_f8_covers_a_known_lift():
    """True lift +10 % by construction: each click is doubled with probability 0.1."""
    generator, hits = np.random.default_rng(3), 0
    for _ in range(300):
        x, y = _users(generator, 300)
        got = ab_designs.paired_lift(x, y, x + generator.binomial(x.astype(int), 0.1), y)
        hits += got.low <= 0.1 <= got.high
    assert 0.91 <= hits / 300 <= 0.98


def test_f8_over_seeds_is_students_interval():
    lifts = [0.04, 0.06, 0.05, 0.07, 0.03]
    got, reference = ab_designs.lift_over_seeds(lifts), stats.ttest_1samp(lifts, 0.0)
    interval = reference.confidence_interval(0.95)
    assert [got.low, got.high, got.p_value] == pytest.approx([interval.low, interval.high, reference.pvalue], rel=1e-12)


def test_clustering_by_single_observations_is_the_plain_variance():
    z = np.random.default_rng(4).normal(size=50)
    assert ab_designs.cluster_variance(z, np.arange(50)) == pytest.approx(z.var(ddof=1) / 50, rel=1e-12)


def test_f9_equals_the_printed_formula_in_plain_loops():
    generator = np.random.default_rng(5)
    user, day, z = generator.integers(0, 9, 120), generator.integers(0, 5, 120), generator.normal(size=120)

    def printed(groups):
        parts = {}
        for value, group in zip(z - z.mean(), groups, strict=True):
            parts[group] = parts.get(group, 0.0) + value
        return len(parts) / (len(parts) - 1) * sum(part**2 for part in parts.values()) / len(z) ** 2

    cells = list(zip(user.tolist(), day.tolist(), strict=True))
    expected = max(printed(user.tolist()) + printed(day.tolist()) - printed(cells), printed(user.tolist()), printed(day.tolist()))
    assert ab_designs.user_day_variance(z, user, day) == (pytest.approx(expected, rel=1e-12), 4)


def test_f9_covers_where_users_alone_do_not():
    """A treatment effect that differs from day to day: the interval must hold the mean effect over days, not that of these days."""
    generator, days, users = np.random.default_rng(6), 10, 300
    hits_days = hits_users = 0
    for _ in range(200):
        treated = np.repeat(generator.random(users) < 0.5, days)
        day, user = np.tile(np.arange(days), users), np.repeat(np.arange(users), days)
        shock = generator.normal(0.0, 0.15, days)
        x = generator.poisson(np.exp(1.0 + treated * shock[day])).astype(float)
        y = np.ones(len(x))
        got = ab_designs.lift_with_day_shocks(x, y, treated, user, day)
        hits_days += got.low <= np.expm1(0.15**2 / 2) <= got.high
        sums = np.bincount(user, x)
        arms = [ab_stats.ratio_per_user(sums[treated[::days] == side], np.full((treated[::days] == side).sum(), float(days))) for side in (False, True)]
        plain = ab_stats.lift(*arms)
        hits_users += plain.low <= np.expm1(0.15**2 / 2) <= plain.high
    assert hits_days / 200 >= 0.90
    assert hits_users / 200 <= 0.85


def test_one_day_says_nothing_about_days():
    got = ab_designs.lift_with_day_shocks(np.ones(4), np.ones(4), [0, 0, 1, 1], np.arange(4), np.zeros(4))
    assert np.isnan(got.value)
