"""Drift names what moved and nothing else; the report is one self-contained page with the same numbers as its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import monitoring_traffic
import numpy as np
import pandas as pd
import pytest

from marketplace.logs import LogError
from monitoring import drift
from monitoring.report import EXIT_CODES, MonitorConfig, completeness_of, monitor

HALVES = {"control": 0.5, "ega": 0.5}


def measured(**changes):
    """Drift rows of a live period with `changes` against the clean reference, without the page."""
    from monitoring.facts import build_facts

    tables = monitoring_traffic.traffic(1, days=2, users=800, first_day=6, arms=HALVES)
    for name, change in changes.items():
        tables[name] = change(tables[name])
    reference = monitoring_traffic.traffic(0, days=6, users=800)
    live, past = (build_facts(t["requests"], t["impressions"]) for t in (tables, reference))
    columns = drift.watched_columns(
        live, drift.LogTables(tables["ads"], tables["users"]), past, drift.LogTables(reference["ads"], reference["users"]), ("control", "ega"), drift.DriftConfig()
    )
    return {row.name: row for row in (drift.measure(column, drift.DriftConfig()) for column in columns)}


def drifted(rows):
    return {name for name, row in rows.items() if row.drifted}


def test_a_clean_period_raises_no_alarm():
    rows = measured()
    assert drifted(rows) == set()
    assert {row.group for row in rows.values()} == {"feature", "score", "bid", "price"}


def test_raised_bids_are_named_with_their_days():
    rows = measured(ads=lambda f: f.assign(bid=f["bid"] * 1.3), impressions=lambda f: f.assign(bid=f["bid"] * 1.3))
    assert drifted(rows) == {"catalogue: bid", "bid of shown ads, control", "bid over the ad's earlier bid, control", "bid over the ad's earlier bid, ega"}
    assert rows["catalogue: bid"].days == ["2026-03-07", "2026-03-08"]


def test_a_constant_feature_and_shifted_scores_are_named():
    rows = measured(users=lambda f: f.assign(age_band=0))
    assert drifted(rows) == {"user age band"}
    assert rows["user age band"].constant and rows["user age band"].days == ["2026-03-07", "2026-03-08"]
    assert "pctr, control" in drifted(measured(impressions=lambda f: f.assign(pctr=(f["pctr"] * 1.5).clip(0, 1).astype(np.float32))))


def test_a_policy_is_not_compared_with_another_one():
    rows = measured(requests=lambda f: f.assign(model_version="other"))
    assert "pctr, control" not in rows
    assert "pctr, ega, against its first day" in rows


def test_the_quick_distance_of_the_thresholds_is_evidentlys():
    generator = np.random.default_rng(4)
    codes, amounts = [generator.integers(0, 6, n) for n in (300, 500)], [generator.lognormal(0, 1, n) for n in (300, 500)]
    assert drift._quick_distance(*codes, "categorical") == pytest.approx(drift.distance(*codes, "categorical"), rel=1e-9)
    assert drift._quick_distance(*amounts, "numeric") == pytest.approx(drift.distance(*amounts, "numeric"), rel=1e-9)


def test_few_rows_make_no_statement():
    column = drift.DriftColumn("x", "feature", "numeric", *(pd.DataFrame({"value": np.arange(10.0), "day": pd.Timestamp("2026-03-01"), "unit": 1}) for _ in range(2)))
    row = drift.measure(column, drift.DriftConfig())
    assert not row.drifted
    assert "too few rows" in row.note


def test_noise_of_small_samples_raises_the_threshold():
    generator = np.random.default_rng(0)

    def frame(days, users):
        day = np.repeat(pd.date_range("2026-03-01", periods=days).to_numpy(), users * 20)
        unit = np.tile(np.repeat(np.arange(users), 20), days)
        return pd.DataFrame({"value": generator.normal(0, 1, (days, users)).repeat(20, axis=1).ravel(), "day": day, "unit": unit})

    row = drift.measure(drift.DriftColumn("x", "feature", "numeric", frame(1, 12), frame(8, 12)), drift.DriftConfig())
    assert row.threshold > 0.2  # twelve people are no sample, whatever their rows
    assert not row.drifted


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("monitor")
    monitoring_traffic.write(root / "reference", monitoring_traffic.traffic(0, days=6, users=800))
    tables = monitoring_traffic.traffic(1, days=2, users=800, first_day=6, arms=HALVES, click_lift=0.6)
    monitoring_traffic.write(root / "live", tables)
    result = monitor(root / "live", root / "out", MonitorConfig(), root / "reference", title="<b>test</b>")
    return result, tables


def test_the_page_is_self_contained_small_and_leads_with_the_verdict(report):
    result, _ = report
    html = result.report.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", html)
    assert "@import" not in html
    assert "<script" not in html
    assert "&lt;b&gt;test" in html
    assert html.index("<h1>") < html.index("<table") < html.index("<svg") < html.index("Segments") < html.index("Drift against")
    assert result.analysis.verdict.headline in html
    assert len(html) < 200_000
    assert (result.report.parent / "evidently.html").stat().st_size < 5_000_000
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S).lower().replace("significan", "")


def test_the_json_holds_the_numbers_of_the_logs(report):
    result, tables = report
    record = json.loads(result.json.read_text())
    shown = tables["impressions"].merge(tables["requests"][["request_id", "arm"]], on="request_id")
    for arm, rows in shown.groupby("arm"):
        assert record["arms"][arm]["ctr"] == pytest.approx(100 * rows["click"].mean(), rel=1e-12)
        assert record["arms"][arm]["rpm"] == pytest.approx(1000 * (rows["click"] * rows["payment"]).mean(), rel=1e-12)
        assert record["arms"][arm]["roi"] == pytest.approx(rows["order_value"].sum() / (rows["click"] * rows["payment"]).sum(), rel=1e-12)
    assert record["cuped"]["lift"] != record["lifts"]["rpm"]["lift"]
    assert record["severity"] == result.severity
    assert result.exit_code == EXIT_CODES[result.severity]
    assert result.report.parent == Path(result.json).parent


def test_evidently_shows_the_same_lift_and_the_same_drift_scores(report):
    result, tables = report
    from monitoring import evidently_report
    from monitoring.verdict import ExperimentPlan

    generator = np.random.default_rng(2)
    sides = [pd.DataFrame({"value": generator.integers(0, 5, n), "day": pd.Timestamp("2026-03-01"), "unit": 1}) for n in (300, 900)]
    other = [pd.DataFrame({"value": generator.lognormal(0, 1, n), "day": pd.Timestamp("2026-03-01"), "unit": 1}) for n in (700, 400)]
    columns = [drift.DriftColumn("code", "feature", "categorical", *sides), drift.DriftColumn("amount", "bid", "numeric", *other)]
    rows = [drift.measure(column, drift.DriftConfig()) for column in columns]
    out = result.report.parent / "again"
    snapshot = evidently_report.write(out, result.analysis, ExperimentPlan(), columns, rows, drift.DriftConfig())
    values = {metric["metric_name"]: metric["value"] for metric in snapshot["metrics"]}
    for row in rows:
        assert next(v for k, v in values.items() if k.startswith(f"ValueDrift(column={row.name},")) == pytest.approx(row.score, rel=1e-12)
    shown = next(v for k, v in values.items() if k.startswith("AbPart(") and "metric_name=rpm" in k and "part=lift_low" in k)
    assert shown == pytest.approx(result.analysis.result["lifts"]["rpm"]["lift_low"], rel=1e-12)
    assert {test["status"].name for test in snapshot["tests"]} <= {"SUCCESS", "FAIL"}
    assert list(out.iterdir()) == [out / "evidently.html"]


def test_completeness_is_the_least_share_and_an_empty_experiment_is_complete():
    assert completeness_of({"impressions": 990, "clicks": 10, "purchases": 0}, {"impressions": 1000, "clicks": 10, "purchases": 0}) == 0.99
    assert completeness_of({"impressions": 0, "clicks": 0, "purchases": 0}, {"impressions": 0, "clicks": 0, "purchases": 0}) == 1.0


def test_missing_logs_are_a_clear_error(tmp_path):
    with pytest.raises(LogError, match="requests"):
        monitor(tmp_path / "nothing", tmp_path / "out")
