"""What moved is named on its first day, and clean traffic raises nothing."""

from __future__ import annotations

import monitoring_traffic
import numpy as np
import pandas as pd
import pytest

from benchmarks.experiments import INJECTED, ab, alarms
from monitoring import ab_stats, integrity, segments
from monitoring.drift import LogTables
from monitoring.facts import build_facts
from monitoring.report import look

HALVES = {"control": 0.5, "ega": 0.5}
USERS = 3000


@pytest.fixture(scope="module")
def past():
    tables = monitoring_traffic.traffic(0, days=6, users=USERS)
    return build_facts(tables["requests"], tables["impressions"]), LogTables(tables["ads"], tables["users"])


def _looked(tables, past, responses=None):
    found = look(build_facts(tables["requests"], tables["impressions"]), LogTables(tables["ads"], tables["users"]), *past, responses=responses)
    return found, [*found.analysis.verdict.reasons, *found.alarms]


def _day():
    return monitoring_traffic.traffic(1, days=1, users=USERS, first_day=6, arms=HALVES)


@pytest.mark.parametrize("name", list(INJECTED))
def test_an_injected_change_is_named_within_its_first_day(name, past):
    change, named = INJECTED[name]
    tables = _day()
    responses = tables["requests"][["request_id", "user_id", "arm"]].assign(response_ms=10.0, degraded=False)
    found, texts = _looked(change(tables, np.random.default_rng(5)), past, responses)
    assert any(named in text for text in texts), texts
    assert found.severity in ("warning", "critical")
    # Drift calls for a training; fraud, faults and broken logs are never learnt from. A city that clicks half as much may or may not put
    # the whole day's calibration off.
    if name != "CTR of city 1 halved":
        assert bool(found.retraining) == (name in ("bids x1.3", "calibration off by 20 %"))


def test_clean_days_raise_no_alarm_and_call_for_no_training(past):
    found, _ = _looked(_day(), past)
    assert (found.alarms, found.retraining, found.changes) == ([], [], [])


def test_a_city_that_loses_under_one_arm_only_is_named_with_its_arm(past):
    tables = _day()
    city = tables["requests"].set_index("request_id").loc[tables["impressions"]["request_id"], ["city_id", "arm"]].to_numpy()
    lost = (city[:, 0] == 2) & (city[:, 1] == "ega") & (np.random.default_rng(1).random(len(city)) < 0.6)
    from benchmarks.experiments import _without_clicks

    _, texts = _looked({**tables, "impressions": _without_clicks(tables["impressions"], lost)}, past)
    assert any("ega loses CTR per impression in city 2" in text for text in texts), texts


def test_lost_impressions_and_requests_are_named_with_their_arm(past):
    tables, rng = _day(), np.random.default_rng(2)
    arm = tables["requests"].set_index("request_id").loc[tables["impressions"]["request_id"], "arm"].to_numpy()
    thinned = tables["impressions"][~((arm == "ega") & (rng.random(len(arm)) < 0.03))]
    found, texts = _looked({**tables, "impressions": thinned}, past)
    assert found.analysis.verdict.code == "invalid"
    assert any(text.startswith("Arm ega:") and "impressions are missing from their pages" in text for text in texts)
    fewer = tables["requests"][~((tables["requests"]["arm"] == "ega") & (rng.random(len(tables["requests"])) < 0.03))]
    found, texts = _looked({**tables, "requests": fewer}, past)
    assert any("impressions have no request in the log" in text for text in texts)


def test_a_split_that_breaks_in_one_city_is_named():
    tables = monitoring_traffic.traffic(1, days=1, users=USERS, first_day=6, arms=HALVES)
    away = (tables["requests"]["arm"] == "ega") & (tables["requests"]["city_id"] == 3) & (tables["requests"]["user_id"] % 4 == 0)
    found = look(build_facts(tables["requests"][~away], tables["impressions"]), LogTables(tables["ads"], tables["users"]))
    assert any(text.startswith("In city 3 users are not split as planned") for text in found.analysis.verdict.reasons)


def test_days_on_which_a_policy_predicts_too_much_widen_the_calibrations_range():
    """Reference days off by 6 % at random: the day variance is found, and a day that is 12 % off is no news; without shocks it is none."""
    tables = monitoring_traffic.traffic(0, days=14, users=4000)
    day = tables["impressions"]["event_timestamp"].dt.dayofyear
    shocks = np.random.default_rng(3).normal(0, 0.06, 14)[(day - day.min()).to_numpy()]
    shocked = tables["impressions"].assign(pctr=(tables["impressions"]["pctr"] * np.exp(shocks)).astype(np.float32))
    quiet, loud = (integrity.calibration_day_variance(build_facts(tables["requests"], shown)) for shown in (tables["impressions"], shocked))
    assert quiet < 0.0015 < 0.06**2 / 2 < loud < 2.5 * 0.06**2
    now = build_facts(tables["requests"], tables["impressions"].assign(pctr=(tables["impressions"]["pctr"] * 1.15).astype(np.float32)))
    groups = [("arm none", ("none",), ab_stats.Estimate(1.0, 1e-4, 4000))]
    assert integrity.calibration_by_day(now, groups, 0.1, 0.05, 0.0)
    assert not integrity.calibration_by_day(now, groups, 0.1, 0.05, 0.06**2 * 4)


def test_ads_that_the_catalogue_does_not_know_do_not_end_the_report(past):
    tables = _day()
    strange = {**tables, "ads": tables["ads"].iloc[:0], "impressions": tables["impressions"].assign(ad_id=tables["impressions"]["ad_id"] + 10**6)}
    found, _ = _looked(strange, past)
    assert found.analysis.verdict.code != "invalid"


def test_predictive_p_holds_its_level_on_segments_like_those_of_the_past():
    generator, small = np.random.default_rng(3), 0
    for _ in range(40):
        rate = generator.gamma(4.0, 0.015, 300)
        imps = generator.integers(5, 400, 300).astype(float)
        past_imps = 10 * imps
        _, p = segments.predictive_p(generator.poisson(imps * rate).astype(float), imps, generator.poisson(past_imps * rate).astype(float), past_imps, 1.0)
        small += int((p < 0.001).sum())
    assert small <= 2.5 * 0.001 * 40 * 300  # discrete counts keep it at or below the level


def test_dispersion_is_one_for_poisson_days_and_grows_with_shocks():
    generator = np.random.default_rng(4)

    def counts(shock):
        index = pd.MultiIndex.from_product([range(20), range(14)])
        factor = np.exp(generator.normal(0, shock, 14))[index.get_level_values(1)]
        return pd.DataFrame({"imps": 2000, "clicks": generator.poisson(120 * factor)}, index=index)

    assert segments.dispersion(counts(0.0)) < 1.5
    assert segments.dispersion(counts(0.2)) > 4


@pytest.fixture(scope="module")
def proofs():
    """The proofs of `ega bench ab` at a size for every day: one small world, wide bands."""
    return ab(worlds=1, splits=150, users=1800, days=8, lift=0.15, progress=False)


def test_small_proofs_of_error_coverage_and_power(proofs):
    for row in proofs["table"]:
        assert 0.5 <= row["false positives, %"] <= 11, row
        assert 89 <= row["coverage of the known lift, %"] <= 99.4, row
    assert proofs["impression_level_false_positives_percent"] > 5.5
    assert proofs["peeking_daily_always_valid_ever_wrong_percent"] <= 5
    assert proofs["power_at_the_planned_size_percent"] >= 73


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_experiments_of_each_kind():
    proofs = ab(progress=False)
    for row in proofs["table"]:
        assert 3.7 <= row["false positives, %"] <= 6.4, row
        assert 93.5 <= row["coverage of the known lift, %"] <= 96.5, row
        assert row["uniform, KS p"] > 0.001
    assert proofs["impression_level_false_positives_percent"] > 6.4
    assert proofs["peeking_daily_always_valid_ever_wrong_percent"] < 5
    assert proofs["power_at_the_planned_size_percent"] >= 80


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_clean_days_and_every_change_on_the_market():
    result = alarms(progress=False)
    assert result["clean_days_with_an_alarm"] == 0, result["false_alarms"]
    assert [row["change"] for row in result["table"] if not row["named"]] == []
