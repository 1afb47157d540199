"""`ega ab` on real services: several arms, an A/A test under delivery faults, a shadow, and models side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from serving_world import tiny_bundle, vocabulary_of

from cli import ab
from marketplace import logs
from marketplace.creatives import CreativeConfig
from marketplace.organic import OrganicConfig
from marketplace.synthetic import SyntheticConfig
from marketplace.validation import validate_logs
from marketplace.worlds import WorldConfig, build_world
from monitoring.experiment import DriverConfig, FaultConfig
from monitoring.report import MonitorConfig
from monitoring.retraining import merge_logs
from monitoring.verdict import ExperimentPlan

GATES = {"ic": {"approved": True, "reason": "test"}, "revenue": {"approved": True, "reason": "test"}}


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """A run with a tiny world of ads with creatives among organic results, and a home with its feature store: (run, home)."""
    from features.build import build_features
    from model.bundle import signing_key

    root = tmp_path_factory.mktemp("ab")
    run, home = root / "run", root / "ega" / "tiny"
    world = build_world(
        WorldConfig(
            synthetic=SyntheticConfig(users=80, ads_per_city=40, places_per_city=60, categories=5, history_days=4, log_days=3, live_days=2),
            creatives=CreativeConfig(per_ad=2, width=4), organic=OrganicConfig(items=2),
        ), 5
    )  # fmt: skip
    world.write_logs(run / "logs")
    world.save(run / "world")
    build_features(run / "logs", home, behaviours=16)
    signing_key(home.parent, create=True)
    return run, home


def _drive(run: Path, home: Path, monitoring: MonitorConfig, driver: DriverConfig):
    return ab.execute(ab.Experiment(run, home, monitoring, driver, progress=False))


def _approved(home: Path, run: Path, seed: int) -> str:
    from model.bundle import signing_key
    from serving.store import approve_bundle, write_gate_record

    key = signing_key(home.parent, create=False)
    bundle, record = home.parent / f"bundle-{seed}", home.parent / f"gate-{seed}.json"
    tiny_bundle(bundle, seed=seed, vocabulary=vocabulary_of(logs.read_table(run / "logs", "ads")), key=key)
    write_gate_record(record, bundle, GATES, key)
    return str(approve_bundle(bundle, record, home, key))


def test_three_arms_of_one_policy_under_delivery_faults_show_no_difference_and_lose_nothing(market, tmp_path):
    run, home = market
    driver = DriverConfig(workers=2, control_policy="bootstrap", treatment_policy="bootstrap", other_policies={"third": "bootstrap"}, faults=FaultConfig(duplicates=0.5, delay=0.4, clock_skew_seconds=30))
    plan = ExperimentPlan(treatment="second", others={"third": 1 / 3})
    summary, result = _drive(run, home, MonitorConfig(plan=plan), driver)
    record = json.loads(result.json.read_text())
    assert set(record["arms"]) == {"control", "second", "third"} and set(record["treatments"]) == {"second", "third"}
    assert record["completeness"] == 1.0
    assert (record["counts"]["impressions"], record["counts"]["clicks"], record["counts"]["purchases"]) == (summary.impressions, summary.clicks, summary.purchases)
    assert summary.duplicates > 0 and summary.delayed > 0 and summary.errors == 0
    assert result.analysis.verdict.code in ("no_difference", "win_not_safe")
    assert "third" in result.report.read_text()
    # The traffic is input of the next training: complete, with its manifest, and as good as the logs that the market wrote.
    traffic = result.report.parent / "logs"
    assert logs.verify_manifest(traffic)["data_hash"]
    organic, shown, behaviours = (logs.read_table(traffic, name) for name in ("organic", "impressions", "behaviours"))
    assert (summary.organic_clicks, summary.creative_clicks) == (organic["click"].sum(), shown["creative_click"].sum())
    assert min(summary.organic_clicks, summary.creative_clicks) > 0 and record["counts"]["clicks"] == shown["click"].sum()
    clicked = behaviours[behaviours["action"] == 2]
    assert len(clicked) == shown["click"].sum() + organic["click"].sum() and (clicked["creative_id"] == 0).sum() == organic["click"].sum()
    assert set(organic["request_id"]) == set(logs.read_table(traffic, "requests")["request_id"])
    assert [failure for failure in validate_logs(traffic, tmp_path / "validation").failures if failure.severity == "critical"] == []
    merge_logs(run / "logs", traffic, tmp_path / "merged")
    assert logs.days_of(tmp_path / "merged", "organic") == logs.days_of(tmp_path / "merged", "requests")


def test_lost_clicks_make_the_experiment_invalid(market):
    run, home = market
    driver = DriverConfig(workers=2, treatment_policy="bootstrap", faults=FaultConfig(loss=0.2))
    summary, result = _drive(run, home, MonitorConfig(), driver)
    assert summary.lost > 0
    assert result.analysis.verdict.code == "invalid"
    assert any("of what the clients saw" in reason for reason in result.analysis.verdict.reasons)


def test_the_plan_says_what_the_users_can_find(market, capsys):
    run, home = market
    text = ab.plan_text(ab.Experiment(run, home, MonitorConfig(), DriverConfig()))
    assert "RPM per 1000 impressions decides" in text and "expect it unproven" in text


def test_arms_that_do_not_fit_the_plan_are_named(market):
    run, home = market
    with pytest.raises(ab.AbError, match="third"):
        _drive(run, home, MonitorConfig(plan=ExperimentPlan(others={"third": 0.3})), DriverConfig())


@pytest.mark.parametrize(("prices", "url", "named"), [
    ({"nobody": "gsp"}, None, "names arm 'nobody'; the plan's arms are control, ega"),
    ({"control": "gsp"}, None, "arm 'control' has no service of its own"),
    ({"ega": "gsp"}, "http://127.0.0.1:1", "leave --url and shadow out"),
])  # fmt: skip
def test_a_price_rule_that_no_service_would_follow_is_named(market, prices, url, named):
    run, home = market
    driver = DriverConfig(treatment_policy="ega-v1:0123456789ab")
    with pytest.raises(ab.AbError, match=named):
        ab.execute(ab.Experiment(run, home, MonitorConfig(), driver, price_modes=prices, url=url, progress=False))


@pytest.mark.soak
def test_two_models_run_beside_each_other_and_as_a_shadow(market):
    run, home = market
    tags = [_approved(home, run, seed) for seed in (0, 1)]
    plan = ExperimentPlan(treatment="first", others={"second": 1 / 3})
    driver = DriverConfig(workers=2, treatment_policy=tags[0], other_policies={"second": tags[1]})
    summary, result = _drive(run, home, MonitorConfig(plan=plan), driver)
    assert summary.errors == 0
    policies = {arm: record["policies"] for arm, record in result.analysis.result["arms"].items()}
    assert policies["control"] == ["bootstrap-1"] and len({policies["first"][0], policies["second"][0], "bootstrap-1"}) == 3
    assert result.analysis.result["completeness"] == 1.0

    summary, shadow = _drive(run, home, MonitorConfig(plan=ExperimentPlan(treatment="first")), DriverConfig(workers=2, treatment_policy=tags[0], shadow=True))
    assert summary.errors == 0 and shadow.requests == summary.answered
    compared = pd.read_parquet(shadow.report.parent / "shadow.parquet")
    assert set(compared["model_version_shadow"]) == {policies["first"][0]}
    assert "decide nothing" in shadow.report.read_text()
