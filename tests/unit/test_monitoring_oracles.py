"""A/B statistics against libraries that know nothing of ours, on drawn users: tea-tasting, statsmodels, SciPy's integrator.

The frozen reference answers stand in test_monitoring_ab_stats.py; here are further ones of the same kind, each from an independent implementation.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import tea_tasting
from scipy import integrate, optimize, stats
from statsmodels.api import OLS
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import confint_proportions_2indep
from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

from monitoring import ab_designs, ab_stats

CLOSE = {"rel": 1e-8}


def drawn(seed: int, users: int = 900) -> pd.DataFrame:
    """Users of two arms with a past: impressions, clicks and revenue now, impressions_0 and clicks_0 before."""
    generator = np.random.default_rng(seed)
    activity = generator.gamma(2.0, 1.0, users)
    rate = generator.beta(3, 30, users)
    frame = pd.DataFrame({"variant": (generator.random(users) < 0.4).astype(int)})
    for suffix in ("", "_0"):
        frame[f"imps{suffix}"] = 1.0 + generator.poisson(5 * activity)
        frame[f"clicks{suffix}"] = generator.binomial(frame[f"imps{suffix}"].astype(int), np.minimum(rate * activity, 0.9)).astype(float)
    frame["revenue"] = frame["clicks"] * generator.lognormal(0.0, 0.6, users) * (1 + 0.2 * frame["variant"])
    return frame


def sides(frame: pd.DataFrame, *columns: str) -> list[list[np.ndarray]]:
    return [[rows[column].to_numpy() for column in columns] for _, rows in frame.groupby("variant")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("numerator", "denominator"), [("clicks", "imps"), ("revenue", "imps"), ("revenue", "clicks")])
def test_ratios_lifts_and_p_equal_tea_tastings(seed, numerator, denominator):
    frame = drawn(seed)
    theirs = tea_tasting.Experiment(m=tea_tasting.RatioOfMeans(numerator, denominator)).analyze(frame)["m"]
    a, b = (ab_stats.ratio_per_user(x, y) for x, y in sides(frame, numerator, denominator))
    difference, lift = ab_stats.difference(a, b), ab_stats.lift(a, b)
    assert [a.value, b.value] == pytest.approx([theirs.control, theirs.treatment], **CLOSE)
    assert [difference.value, difference.low, difference.high] == pytest.approx([theirs.effect_size, theirs.effect_size_ci_lower, theirs.effect_size_ci_upper], **CLOSE)
    assert [lift.value, lift.low, lift.high] == pytest.approx([theirs.rel_effect_size, theirs.rel_effect_size_ci_lower, theirs.rel_effect_size_ci_upper], **CLOSE)
    assert lift.p_value == pytest.approx(theirs.pvalue, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_cuped_equals_tea_tastings(seed):
    frame = drawn(seed)
    theirs = tea_tasting.Experiment(m=tea_tasting.RatioOfMeans("clicks", "imps", numer_covariate="clicks_0", denom_covariate="imps_0")).analyze(frame)["m"]
    now, before = sides(frame, "clicks", "imps"), sides(frame, "clicks_0", "imps_0")
    got = ab_stats.cuped(now[0], before[0], now[1], before[1])
    lift = ab_stats.lift(got.a, got.b)
    assert [got.a.value, got.b.value] == pytest.approx([theirs.control, theirs.treatment], **CLOSE)
    assert [lift.value, lift.low, lift.high, lift.p_value] == pytest.approx([theirs.rel_effect_size, theirs.rel_effect_size_ci_lower, theirs.rel_effect_size_ci_upper, theirs.pvalue], **CLOSE)


def test_r3_on_the_rows_themselves():
    """The data that R3 is the summary of."""
    frame = tea_tasting.make_users_data(rng=42, return_type="pandas")
    theirs = tea_tasting.Experiment(m=tea_tasting.RatioOfMeans("orders", "sessions"), r=tea_tasting.Mean("revenue")).analyze(frame)
    for name, columns in (("m", ("orders", "sessions")), ("r", ("revenue", "one"))):
        a, b = (ab_stats.ratio_per_user(x, y) for x, y in sides(frame.assign(one=1.0), *columns))
        lift = ab_stats.lift(a, b)
        wanted = [theirs[name].rel_effect_size, theirs[name].rel_effect_size_ci_lower, theirs[name].rel_effect_size_ci_upper, theirs[name].pvalue]
        assert [lift.value, lift.low, lift.high, lift.p_value] == pytest.approx(wanted, **CLOSE)


def test_cuped_of_a_mean_is_the_residual_of_a_regression():
    """With a denominator of ones theta is the slope on the past, and rho squared what the past explains."""
    frame = drawn(5).assign(one=1.0)
    now, before = sides(frame, "clicks", "one"), sides(frame, "clicks_0", "one")
    got = ab_stats.cuped(now[0], before[0], now[1], before[1])
    centred = [column.to_numpy() - column.mean() for column in (frame["clicks"], frame["clicks_0"])]
    fit = OLS(centred[0], centred[1]).fit()
    assert got.theta == pytest.approx(float(fit.params[0]), **CLOSE)
    assert got.correlation**2 == pytest.approx(fit.rsquared, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_the_delta_method_is_the_cluster_robust_variance_of_impressions(seed):
    """A ratio of sums is the mean over impressions; its variance with whole users drawn is the sandwich clustered by user (no correction but G/(G-1))."""
    frame = drawn(seed, 300)
    user = np.repeat(np.arange(len(frame)), frame["imps"].astype(int))
    click = np.concatenate([np.arange(n) < k for n, k in zip(frame["imps"].astype(int), frame["clicks"], strict=True)]).astype(float)
    fit = OLS(click, np.ones(len(click))).fit(cov_type="cluster", cov_kwds={"groups": user})
    got = ab_stats.ratio_per_user(frame["clicks"].to_numpy(), frame["imps"].to_numpy())
    assert [got.value, got.variance] == pytest.approx([float(fit.params[0]), float(fit.cov_params()[0, 0])], **CLOSE)


def test_two_way_clustering_is_statsmodels():
    generator = np.random.default_rng(8)
    user, day = generator.integers(0, 30, 500), generator.integers(0, 9, 500)
    z = generator.normal(size=500) + generator.normal(0, 1, 30)[user] + generator.normal(0, 1, 9)[day]
    both, *_ = cov_cluster_2groups(OLS(z, np.ones(500)).fit(), user, day)
    variance, degrees = ab_designs.user_day_variance(z, user, day)
    assert (variance, degrees) == (pytest.approx(float(both[0, 0]), **CLOSE), 8)


def test_log_intervals_of_shares_are_statsmodels():
    """With one impression a user and a normal quantile F3's log interval is Katz's for the ratio of two shares."""
    low, high = confint_proportions_2indep(120, 1000, 90, 1100, method="log", compare="ratio", correction=False)
    many = 10**13  # Welch's quantile is then the normal one
    a, b = (ab_stats.Estimate(k / n, k / n * (1 - k / n) / n, many) for k, n in ((90, 1100), (120, 1000)))
    got = ab_stats.lift(a, b)
    assert [1 + got.low, 1 + got.high] == pytest.approx([low, high], **CLOSE)


def test_fieller_is_the_set_of_lifts_that_the_test_does_not_reject():
    a, b = (ab_stats.ratio_per_user(x, y) for x, y in sides(drawn(2), "revenue", "imps"))
    got, t = ab_stats.lift_fieller(a, b), stats.t.ppf(0.975, ab_stats.difference(a, b).degrees)

    def rejected_by(lift: float) -> float:
        return abs(b.value - (1 + lift) * a.value) - t * math.sqrt(b.variance + (1 + lift) ** 2 * a.variance)

    roots = [optimize.brentq(rejected_by, got.value, edge, xtol=1e-14) for edge in (-0.99, 5.0)]
    assert [got.low, got.high] == pytest.approx(roots, **CLOSE)


@pytest.mark.parametrize(("effect", "users", "planned", "alpha"), [(0.02, 4000, 5000, 0.05), (0.05, 1500, 20_000, 0.05), (0.01, 9000, 9000, 0.01)])
def test_the_always_valid_p_is_the_inverse_of_a_mixture_of_likelihood_ratios(effect, users, planned, alpha):
    """F5 in closed form against Robbins' normal mixture by quadrature: a martingale under no effect, so 1/alpha is crossed with probability alpha at most."""
    variance = 1.0 / users
    rate = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / planned
    score = effect * users / math.sqrt(variance * users)  # sum of the standardised observations
    width = math.sqrt(rate)

    def likelihood_ratio(theta: float) -> float:
        return math.exp(theta * score - users * theta**2 / 2) * stats.norm.pdf(theta, 0.0, width)

    peak = score * rate / (users * rate + 1)
    spread = width / math.sqrt(users * rate + 1)
    mixture = integrate.quad(likelihood_ratio, peak - 12 * spread, peak + 12 * spread, epsabs=0, epsrel=1e-12)[0]
    assert ab_stats.always_valid(effect, variance, users, planned, alpha).p_value == pytest.approx(min(1.0, 1 / mixture), **CLOSE)


@pytest.mark.parametrize(("kappa_squared", "lift", "ratio", "power"), [(2.0, 0.02, 1.0, 0.8), (11.3, 0.052, 0.25, 0.9), (0.7, -0.05, 3.0, 0.8)])
def test_sample_sizes_are_statsmodels(kappa_squared, lift, ratio, power):
    wanted = NormalIndPower().solve_power(effect_size=abs(math.log1p(lift)) / math.sqrt(kappa_squared), alpha=0.025, power=power, ratio=ratio, alternative="larger")
    assert ab_stats.users_needed(kappa_squared, lift, ratio, power) == math.ceil(wanted - 1e-6)
    assert ab_stats.least_detectable_lift(kappa_squared, wanted, ratio * wanted, power) == pytest.approx(math.expm1(abs(math.log1p(lift))), **CLOSE)


def test_holm_equals_statsmodels_on_drawn_vectors(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels collects garbage at every Holm, half a second each in a process of this size
    generator = np.random.default_rng(12)
    for _ in range(50):
        p = generator.random(generator.integers(1, 20)) ** 3
        for method, name in (("holm", "holm"), ("bh", "fdr_bh"), ("by", "fdr_by")):
            np.testing.assert_allclose(ab_stats.adjust_p_values(p, method), multipletests(p, method=name)[1], rtol=1e-10)
