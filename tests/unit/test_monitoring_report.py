"""Drift names what moved and nothing else; the report is one self-contained page with the same numbers as its JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
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
    html = result.report.read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", html)
    assert "@import" not in html
    assert "<script" not in html
    assert "&lt;b&gt;test" in html
    assert html.index("<h1>") < html.index("<table") < html.index("<svg") < html.index("Segments") < html.index("Drift against")
    assert result.analysis.verdict.headline in html
    assert len(html) < 200_000
    assert (result.report.parent / "evidently.html").stat().st_size < 4_700_000  # to be mailed: 5 MB at most, whatever the number of arms and days
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S).lower().replace("significan", "")


HARNESS = """<!doctype html><body style="margin:0"><iframe id="page" src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe><pre id="seen"></pre><script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement, box = (id) => page.getElementById(id).getBoundingClientRect();
  const cut = [...page.querySelectorAll(".card *")].filter((e) => e.getBoundingClientRect().right > e.closest(".card").getBoundingClientRect().right + 1).map((e) => e.outerHTML.slice(0, 99));
  const rows = [...page.querySelectorAll("#lifts .lift")].map((cell) => cell.getBoundingClientRect().bottom);
  document.getElementById("seen").textContent = JSON.stringify({{verdict: box("verdict").bottom, lifts: box("lifts").top, trend: box("trend").bottom, lift_rows: rows, cut: cut, overflow: root.scrollWidth - root.clientWidth}});
}};</script>"""


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_in_a_browser_the_first_screen_answers_the_question(report, tmp_path, width, height):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    result, _ = report
    page = tmp_path / "harness.html"
    page.write_text(HARNESS.format(page=result.report.resolve().as_uri(), width=width, height=height))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=4000", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([browser, *options, "--window-size=1400,1000", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1])
    assert seen["overflow"] <= 0, "the page must not scroll sideways"
    assert seen["verdict"] < seen["lifts"] < height
    assert len(seen["lift_rows"]) == 4 and max(seen["lift_rows"]) < height, "every lift and its interval"
    assert seen["cut"] == [], "no text leaves its card"
    if width > 760:
        assert seen["trend"] < height + 40


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


def test_amounts_that_differ_by_rounding_alone_do_not_end_the_report(report, tmp_path):
    """Bids that never move: log(bid) minus its earlier mean is one number and its last bits."""
    from monitoring import evidently_report
    from monitoring.verdict import ExperimentPlan

    result, _ = report
    moved = np.where(np.arange(300) % 2, 0.25, np.nextafter(0.25, 1))
    now, before = (pd.DataFrame({"value": value, "day": pd.Timestamp("2026-03-01"), "unit": np.arange(300)}) for value in (moved, np.zeros(300)))
    column = drift.DriftColumn("bid change", "bid", "numeric", now, before)
    row = drift.measure(column, drift.DriftConfig())
    snapshot = evidently_report.write(tmp_path, result.analysis, ExperimentPlan(), [column], [row], drift.DriftConfig())
    assert row.drifted and next(v["value"] for v in snapshot["metrics"] if v["metric_name"].startswith("ValueDrift")) > row.threshold


def test_completeness_is_the_least_share_and_an_empty_experiment_is_complete():
    assert completeness_of({"impressions": 990, "clicks": 10, "purchases": 0}, {"impressions": 1000, "clicks": 10, "purchases": 0}) == 0.99
    assert completeness_of({"impressions": 0, "clicks": 0, "purchases": 0}, {"impressions": 0, "clicks": 0, "purchases": 0}) == 1.0


def test_missing_logs_are_a_clear_error(tmp_path):
    with pytest.raises(LogError, match="requests"):
        monitor(tmp_path / "nothing", tmp_path / "out")


def test_the_workspace_keeps_a_snapshot_of_every_report_under_panels_that_find_it(report, tmp_path):
    from evidently.ui.workspace import Workspace

    from monitoring import evidently_report
    from monitoring.verdict import ExperimentPlan

    result, _ = report
    sides = [pd.DataFrame({"value": np.random.default_rng(n).lognormal(0, 1, n), "day": pd.Timestamp("2026-03-01"), "unit": 1}) for n in (700, 400)]
    column = drift.DriftColumn("catalogue: bid", "bid", "numeric", *sides)
    row = drift.measure(column, drift.DriftConfig())
    for _ in range(2):
        evidently_report.write(tmp_path / "out", result.analysis, ExperimentPlan(), [column], [row], drift.DriftConfig(), tmp_path / "workspace", "a report")
    workspace = Workspace.create(str(tmp_path / "workspace"))
    (project,) = workspace.list_projects()
    assert project.name == evidently_report.PROJECT
    assert len(workspace.list_runs(project.id)) == 2
    labels = ("arm", "part", "metric_name", "column")
    stored = {(str(m.params["type"]), *(m.params.get(label) for label in labels)) for m in _stored_metrics(workspace, project)}
    for panel in evidently_report.panels(ExperimentPlan(), ["catalogue: bid"]):
        for shown in panel.values:  # noqa: PD011 - a panel's metrics
            assert (shown.metric, *(shown.metric_labels.get(label) for label in labels)) in stored, panel.title


def _stored_metrics(workspace, project):
    snapshot = workspace.get_run(project.id, workspace.list_runs(project.id)[0])
    return [value.metric_value_location.metric for value in snapshot.metric_results.values()]
