"""The verdict's rules, one situation each, on seeded traffic; and what may never enter an A/B report."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import monitoring_traffic
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

import monitoring
from marketplace.schema import IMPRESSIONS, REQUESTS
from monitoring.facts import build_facts
from monitoring.verdict import ExperimentPlan, analyse, decide

HALVES = {"control": 0.5, "ega": 0.5}


def facts_of(seed=1, arms=None, users=800, days=2, **effects):
    tables = monitoring_traffic.traffic(seed, days=days, users=users, first_day=10, arms=arms or HALVES, **effects)
    return build_facts(tables["requests"], tables["impressions"])


def verdict(facts, completeness=None, responses=None, **plan):
    return analyse(facts, ExperimentPlan(**plan), responses=responses, completeness=completeness).verdict


@pytest.fixture(scope="module")
def even():
    return facts_of()


@pytest.fixture(scope="module")
def strong():
    return facts_of(click_lift=0.6)


def test_identity_of_the_three_lifts(strong):
    lifts = analyse(strong, ExperimentPlan()).result["lifts"]
    assert (1 + lifts["rpm"]["lift"]) == pytest.approx((1 + lifts["ctr"]["lift"]) * (1 + lifts["ppc"]["lift"]), rel=1e-9)


def test_a_clear_win_with_proven_guardrails_ships(strong):
    got = verdict(strong, guardrails={"ctr": 0.02})
    assert got.code == "ship"
    assert "CTR per impression not worse than \N{MINUS SIGN}2 %" in got.sentence


def test_a_clear_win_with_an_unproven_guardrail_is_not_safe_and_says_how_many_users_are_missing(strong):
    got = verdict(strong, guardrails={"roi": 0.001})
    assert got.code == "win_not_safe"
    assert "more users" in got.reasons[0]


def test_a_clear_loss_stops():
    assert verdict(facts_of(click_lift=-0.6)).code == "stop"


def test_below_the_planned_size_it_keeps_running_even_when_it_looks_good(strong):
    got = verdict(strong, planned_users=100_000)
    assert got.code == "keep_running"
    assert "of 100,000 planned users" in got.sentence


def test_the_always_valid_rule_may_ship_before_the_planned_size():
    got = verdict(facts_of(users=2500, click_lift=0.8), planned_users=5000, rule="always_valid", guardrails={})
    assert got.code == "ship"


def test_nothing_shown_is_never_called_no_effect(even):
    got = verdict(even)
    assert got.code == "no_difference"
    assert "The true lift is between" in got.sentence
    assert "no effect" not in got.headline + got.sentence


def test_a_skewed_split_is_invalid_whatever_the_lift():
    got = verdict(facts_of(arms={"control": 0.4, "ega": 0.6}, click_lift=0.6))
    assert got.code == "invalid"
    assert "not split as planned" in got.reasons[0]


def test_an_incomplete_log_is_invalid(strong):
    assert verdict(strong, completeness=0.998).code == "invalid"
    assert verdict(strong, completeness=0.9995).code != "invalid"


def test_users_in_two_arms_are_invalid(strong):
    moved = strong.requests.iloc[:20].assign(request_id=lambda r: r["request_id"] + 50_000_000, arm=lambda r: np.where(r["arm"] == "ega", "control", "ega"))
    got = verdict(build_facts(pd.concat([strong.requests, moved], ignore_index=True)[REQUESTS.names], strong.impressions[[name for name in IMPRESSIONS.names if name in strong.impressions]]))
    assert got.code == "invalid"
    assert "two arms" in got.reasons[0]


def test_one_price_above_its_bid_stops_the_test(strong):
    broken = dataclasses.replace(strong, counts=dataclasses.replace(strong.counts, prices_above_bid=1))
    got = verdict(broken)
    assert got.code == "stop"
    assert "above the bid" in got.headline


def test_a_slow_treatment_breaks_its_guardrail(strong):
    rows = strong.requests[["request_id", "user_id", "arm"]].assign(degraded=False)
    rows["response_ms"] = np.where((rows["arm"] == "ega") & (rows["request_id"] % 4 == 0), 900.0, 20.0)
    got = verdict(strong, responses=rows)
    assert got.code == "stop"
    assert "slower than" in got.sentence


def test_missing_arms_are_named():
    with pytest.raises(ValueError, match="arms found: control, ega"):
        verdict(facts_of(), control="a", treatment="b")


def test_a_missing_measurement_never_ships():
    record = dict.fromkeys(("lift", "lift_low", "lift_high", "p", "always_valid_low", "always_valid_high", "always_valid_p", "p_decides", "least_detectable_lift"), float("nan"))
    assert decide(ExperimentPlan(guardrails={}), {"rpm": record}, [], [], 0, 1000, 1000).code == "no_difference"


@pytest.mark.parametrize("plan", [{"control": "x", "treatment": "x"}, {"guardrails": {"ctr": 1.5}}, {"alpha": 0.0}, {"unknown": 1}, {"guardrails": {"nonsense": 0.1}}])
def test_bad_plans_are_refused(plan):
    with pytest.raises(ValidationError):
        ExperimentPlan(**plan)


def test_the_room_cannot_see_the_simulators_truth():
    """A/B numbers come from observed clicks: no module here imports a world, its click model or its truth."""
    hidden = {"worlds", "truth", "click_model", "state", "synthetic", "checkins"}
    for path in Path(monitoring.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {part for name in names for part in name.split(".")} & hidden, f"{path.name} imports hidden truth"
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            assert called not in {"truth", "page_truth", "score_pages"}, f"{path.name} asks for hidden truth"
