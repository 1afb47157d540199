"""Reference answers of the A/B statistics: frozen from outside libraries and hand calculation, plus laws and a small A/A simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats import false_discovery_control

from monitoring import ab_stats

EXACT = {"rel": 1e-10}


@pytest.fixture(scope="module")
def welch_arms():
    return ab_stats.mean_from_summary(0.41, 3.9, 3407), ab_stats.mean_from_summary(0.70, 6.2, 3461)


def test_r1_welch_absolute(welch_arms):
    got = ab_stats.difference(*welch_arms)
    assert [got.low, got.high] == pytest.approx([0.04537789255929, 0.53462210744071], rel=1e-10)
    assert got.p_value == pytest.approx(0.02015840264359, **EXACT)
    assert got.degrees == pytest.approx(5841.742032, rel=1e-9)


def test_r1_relative_delta_and_log(welch_arms):
    delta = ab_stats.lift_delta(*welch_arms)
    assert delta.value == pytest.approx(0.7073170731707317, **EXACT)
    assert delta.standard_error == pytest.approx(0.3787943616681428, **EXACT)
    assert [delta.low, delta.high] == pytest.approx([-0.03526008906612, 1.44989423540758], rel=1e-10)
    assert delta.p_value == pytest.approx(0.06191182745618, **EXACT)
    log = ab_stats.lift(*welch_arms)
    assert [log.low, log.high] == pytest.approx([0.10516869613303, 1.63754447492004], **EXACT)
    assert log.p_value == ab_stats.difference(*welch_arms).p_value


def test_r1_denominator_too_weak_for_a_relative_lift(welch_arms):
    weakness = ab_stats.denominator_weakness(*welch_arms)
    assert weakness == pytest.approx(0.102, abs=5e-4)
    assert weakness > ab_stats.WEAK_DENOMINATOR


def test_fieller_solves_its_quadratic_and_agrees_with_p(welch_arms):
    a, b = welch_arms
    got, absolute = ab_stats.lift_fieller(a, b), ab_stats.difference(a, b)
    t = stats.t.ppf(0.975, absolute.degrees)
    for lift in (got.low, got.high):
        ratio = 1 + lift
        assert (b.value - ratio * a.value) ** 2 == pytest.approx(t**2 * (b.variance + ratio**2 * a.variance), rel=1e-10)
    assert (got.low > 0) == (absolute.p_value < 0.05)


def test_r2_always_valid(welch_arms):
    a, b = welch_arms
    users = a.users + b.users
    absolute = ab_stats.difference(a, b)
    got = ab_stats.always_valid(absolute.value, absolute.standard_error**2, users, 5000)
    assert [got.low, got.high] == pytest.approx([-0.08941009553834556, 0.6694100955383455], **EXACT)
    assert got.p_value == pytest.approx(0.2907445591859732, **EXACT)
    delta = ab_stats.lift_delta(a, b)
    got = ab_stats.always_valid(delta.value, delta.standard_error**2, users, 5000)
    assert [got.low, got.high] == pytest.approx([-0.4444237691289097, 1.859057915470373], **EXACT)
    assert got.p_value == pytest.approx(0.6986728582483058, **EXACT)
    unit = ab_stats.always_valid(0.0, 1 / 5000, 5000, 5000)
    assert unit.high == pytest.approx(0.04292433718826846, **EXACT)


def test_always_valid_p_is_alpha_exactly_at_the_bound_and_costs_the_stated_price():
    half = ab_stats.always_valid(0.0, 0.01, 3000, 5000).high
    assert ab_stats.always_valid(half, 0.01, 3000, 5000).p_value == pytest.approx(0.05, rel=1e-12)
    fixed = stats.norm.ppf(0.975) * 0.1
    assert ab_stats.always_valid(0.0, 0.01, 5000, 5000).high / fixed == pytest.approx(1.5486, abs=1e-4)


CONTROL = {"n": 2023, "y": 4038, "yy": 10098, "x": 1073, "xx": 2073, "xy": 2648, "r": 10602.60, "rr": 243736.4268}
TREATMENT = {"n": 1977, "y": 3920, "yy": 9698, "x": 1133, "xx": 2121, "xy": 2730, "r": 11328.43, "rr": 278029.8889}


def _mean(arm, total, square):
    return ab_stats.ratio_from_sums(arm["n"], arm[total], arm["n"], arm[square], arm["n"], arm[total])


@pytest.mark.parametrize(("total", "square", "lift", "p"), [("y", "yy", -0.006634744, 0.67402072), ("x", "xx", 0.08048664, 0.11773178), ("r", "rr", 0.09331816, 0.12306989)])
def test_r3_means_per_user(total, square, lift, p):
    got = ab_stats.lift(_mean(CONTROL, total, square), _mean(TREATMENT, total, square))
    assert got.value == pytest.approx(lift, rel=1e-6)
    assert got.p_value == pytest.approx(p, rel=1e-6)


def test_r3_ratio_of_sums():
    a, b = (ab_stats.ratio_from_sums(arm["n"], arm["x"], arm["y"], arm["xx"], arm["yy"], arm["xy"]) for arm in (CONTROL, TREATMENT))
    assert [a.value, b.value] == pytest.approx([0.2657256067, 0.2890306122], rel=1e-9)
    got = ab_stats.lift(a, b)
    assert got.value == pytest.approx(0.08770327, rel=1e-6)
    assert [got.low, got.high] == pytest.approx([-0.00894418, 0.19377576], rel=1e-6)
    assert got.p_value == pytest.approx(0.0762375998, rel=1e-6)
    assert ab_stats.sample_ratio_p([2023, 1977], [0.5, 0.5]) == pytest.approx(0.46702758, rel=1e-6)


def test_ratio_from_rows_equals_the_printed_formula():
    generator = np.random.default_rng(3)
    y = generator.poisson(8, 500) + 1.0
    x = generator.binomial(y.astype(int), 0.1).astype(float)
    got, cov = ab_stats.ratio_per_user(x, y), np.cov(x, y)
    printed = (cov[0, 0] / y.mean() ** 2 - 2 * x.mean() * cov[0, 1] / y.mean() ** 3 + x.mean() ** 2 * cov[1, 1] / y.mean() ** 4) / 500
    assert got.variance == pytest.approx(printed, rel=1e-10)


@pytest.mark.parametrize(("counts", "p"), [([500, 600], 0.0025688315270227116), ([500, 500], 1.0), ([821588, 815482], 1.8217928726191858e-06)])
def test_r5_sample_ratio(counts, p):
    assert ab_stats.sample_ratio_p(counts, [0.5, 0.5]) == pytest.approx(p, **EXACT)


def test_sample_ratio_bayes_factor_alarms_on_a_gross_mismatch_only():
    alarm = -math.log(ab_stats.SRM_ALARM)
    assert ab_stats.sample_ratio_log_bayes([5000, 5000], [0.5, 0.5]) < 0
    assert ab_stats.sample_ratio_log_bayes([821588, 815482], [0.5, 0.5]) < ab_stats.sample_ratio_log_bayes([60000, 50000], [0.5, 0.5])
    assert ab_stats.sample_ratio_log_bayes([60000, 50000], [0.5, 0.5]) > alarm


P_VALUES = [0.005, 0.06, 0.007, 0.04, 0.01, 0.03]


@pytest.mark.parametrize(
    ("method", "expected"),
    [("bh", [0.02, 0.06, 0.02, 0.048, 0.02, 0.045]), ("by", [0.049, 0.147, 0.049, 0.1176, 0.049, 0.11025]), ("holm", [0.03, 0.09, 0.035, 0.09, 0.04, 0.09])],
)
def test_r6_multiplicity(method, expected):
    assert ab_stats.adjust_p_values(P_VALUES, method) == pytest.approx(expected, **EXACT)


def test_multiplicity_equals_scipy_on_drawn_vectors():
    generator = np.random.default_rng(4)
    for _ in range(50):
        p = generator.random(generator.integers(1, 20)) ** 3
        for method in ("bh", "by"):
            np.testing.assert_allclose(ab_stats.adjust_p_values(p, method), false_discovery_control(p, method=method), rtol=1e-12)


def test_r7_two_proportions():
    a, b = ((share, share * (1 - share) / 100) for share in (0.4, 0.5))
    d, error = b[0] - a[0], math.sqrt(a[1] + b[1])
    plain = ab_stats.difference(ab_stats.Estimate(*a, 10**12), ab_stats.Estimate(*b, 10**12))  # Welch at infinity is the unpooled z test
    assert [plain.value, plain.low, plain.high, plain.p_value] == pytest.approx([0.1, -0.03719748, 0.23719748, 0.15312745], abs=1e-7)
    assert (d, error) == pytest.approx((plain.value, plain.standard_error), rel=1e-12)


def test_r7_planned_looks():
    bounds = ab_stats.planned_look_bounds([0.25, 0.5, 0.75, 1.0])
    assert bounds == pytest.approx([2.95516685, 2.55932127, 2.30081406, 2.09191342], abs=1e-4)
    assert ab_stats.planned_look_bounds([1.0]) == pytest.approx([stats.norm.ppf(0.975)], abs=1e-9)


def test_r9_cuped_by_hand():
    x, y = [1, 0, 3, 2, 2, 1, 4, 3], [10, 5, 20, 12, 11, 6, 18, 14]
    x0, y0 = [1, 1, 2, 2, 1, 1, 3, 2], [9, 6, 15, 14, 10, 7, 17, 12]
    a, b = slice(0, 4), slice(4, 8)
    arrays = [np.array(column, float) for column in (x, y, x0, y0)]
    got = ab_stats.cuped(*((arrays[i][arm], arrays[i + 1][arm]) for arm in (a, b) for i in (0, 2)))
    assert got.theta == pytest.approx(1.059639084507, rel=1e-10)
    assert [got.a.value, got.b.value] == pytest.approx([0.136222314545, 0.195891185623], rel=1e-10)
    absolute = ab_stats.difference(got.a, got.b)
    assert absolute.standard_error == pytest.approx(0.027411867003, rel=1e-10)
    assert absolute.degrees == pytest.approx(3.809239775, rel=1e-9)
    assert absolute.p_value == pytest.approx(0.098503236827, rel=1e-10)
    assert ab_stats.lift(got.a, got.b).value == pytest.approx(0.4380256735, rel=1e-9)
    plain = ab_stats.lift(ab_stats.ratio_per_user(arrays[0][a], arrays[1][a]), ab_stats.ratio_per_user(arrays[0][b], arrays[1][b]))
    assert (plain.value, plain.p_value) == pytest.approx((0.5986394558, 0.038085499), rel=1e-8)


def test_cuped_without_any_history_changes_nothing():
    x, y, zero = np.array([1.0, 0, 2]), np.array([3.0, 4, 5]), np.zeros(3)
    got = ab_stats.cuped((x, y), (zero, zero), (x, y), (zero, zero))
    assert got.a == ab_stats.ratio_per_user(x, y)
    assert got.theta == 0


@pytest.mark.parametrize(("lift", "users"), [(0.01, 317098), (0.02, 80062), (0.05, 13189), (0.10, 3457)])
def test_sample_size_table_and_its_inverse(lift, users):
    assert ab_stats.users_needed(2.0, lift) == users
    assert ab_stats.least_detectable_lift(2.0, users, users) == pytest.approx(lift, rel=1e-3)


def test_a_missing_arm_is_unknown_not_an_exception():
    nobody, some = ab_stats.ratio_from_sums(0, 0, 0, 0, 0, 0), ab_stats.Estimate(0.1, 1e-4, 100)
    for compare in (ab_stats.difference, ab_stats.lift, ab_stats.lift_delta, ab_stats.lift_fieller):
        got = compare(nobody, some)
        assert math.isnan(got.value)
        assert math.isnan(got.p_value)


def _simulated_users(generator, users):
    """Per-user impressions and clicks with a click rate that differs between users and goes with their activity."""
    activity = generator.gamma(2.0, 1.0, users)
    impressions = generator.poisson(5 * activity) * 4 + 4
    rate = generator.beta(2, 30, users) * (0.5 + 0.5 * activity)
    return impressions.astype(float), generator.binomial(impressions, np.minimum(rate, 1.0)).astype(float)


def test_a_a_user_unit_holds_its_level_and_impression_unit_does_not():
    generator = np.random.default_rng(7)
    false_user = false_impression = 0
    for _ in range(400):
        arms = [_simulated_users(generator, 400) for _ in range(2)]
        a, b = (ab_stats.ratio_per_user(clicks, impressions) for impressions, clicks in arms)
        false_user += ab_stats.difference(a, b).p_value < 0.05
        naive = [ab_stats.Estimate(e.value, e.value * (1 - e.value) / impressions.sum(), 10**9) for e, (impressions, _) in zip((a, b), arms, strict=True)]
        false_impression += ab_stats.difference(*naive).p_value < 0.05
    assert 0.025 <= false_user / 400 <= 0.085  # binomial 99.5 % band around 5 %
    assert false_impression / 400 > 0.10


def test_welch_equals_scipy_on_drawn_rows():
    generator = np.random.default_rng(11)
    for _ in range(20):
        a, b = generator.normal(1.0, 1.0, generator.integers(5, 60)), generator.normal(1.2, 3.0, generator.integers(5, 60))
        got = ab_stats.difference(*(ab_stats.ratio_per_user(x, np.ones(len(x))) for x in (a, b)))
        reference = stats.ttest_ind(b, a, equal_var=False)
        interval = reference.confidence_interval(0.95)
        assert [got.p_value, got.degrees, got.low, got.high] == pytest.approx([reference.pvalue, reference.df, interval.low, interval.high], rel=1e-8)


def test_sample_ratio_equals_scipy_for_any_number_of_arms():
    got = ab_stats.sample_ratio_p([310, 290, 420], [0.3, 0.3, 0.4])
    assert got == pytest.approx(stats.chisquare([310, 290, 420], np.array([0.3, 0.3, 0.4]) * 1020).pvalue, rel=1e-10)


def test_sample_ratio_bayes_factor_is_the_dirichlet_multinomial():
    counts, shares = [530, 470], [0.5, 0.5]
    law = stats.dirichlet_multinomial([50.0, 50.0], 1000)
    plain = stats.multinomial(1000, shares)
    assert ab_stats.sample_ratio_log_bayes(counts, shares) == pytest.approx(law.logpmf(counts) - plain.logpmf(counts), rel=1e-8)


def test_planned_looks_spend_what_they_may():
    """The bounds' crossing probabilities by simulation of the score process: alpha t^2 is spent up to each look."""
    times, bounds = np.array([0.25, 0.5, 0.75, 1.0]), ab_stats.planned_look_bounds([0.25, 0.5, 0.75, 1.0])
    steps = np.random.default_rng(13).normal(0.0, np.sqrt(0.25), (400_000, 4)).cumsum(axis=1) / np.sqrt(times)
    crossed = np.maximum.accumulate(np.abs(steps) > bounds, axis=1).mean(axis=0)
    assert crossed == pytest.approx([0.003125, 0.0125, 0.028125, 0.05], abs=0.0012)
