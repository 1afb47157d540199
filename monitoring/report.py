"""`monitor`: a folder of logged traffic in, a verdict, one HTML page and one JSON file out.

Writes `report.html` (self-contained), `evidently.html` (drift distributions) and `ab_result.json` into the output folder.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from marketplace import logs
from monitoring import drift, page
from monitoring.drift import DriftConfig, DriftRow
from monitoring.facts import read_facts
from monitoring.verdict import Analysis, ExperimentPlan, analyse

Severity = Literal["ok", "warning", "critical"]
EXIT_CODES: dict[Severity, int] = {"ok": 0, "warning": 4, "critical": 5}
"""Exit code of `ega monitor`; 1 and 2 mean that it failed or was called wrongly, 3 is a rejected candidate of `ega run`."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class MonitorConfig:
    """Everything that `monitor` may be told."""

    plan: ExperimentPlan = Field(default_factory=ExperimentPlan)
    """What was decided before the experiment."""
    drift: DriftConfig = Field(default_factory=DriftConfig)
    """When a shift counts as drift."""


@plain_dataclass(frozen=True)
class MonitorResult:
    """What `monitor` found and where it wrote it."""

    severity: Severity
    report: Path
    json: Path
    analysis: Analysis
    drift: list[DriftRow]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.severity]


def _finite(value: Any) -> Any:
    """JSON has no NaN: unknown numbers become null; NumPy scalars become Python's."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def completeness_of(counts: dict[str, Any], summary: dict[str, Any]) -> float:
    """Least share of the clients' impressions, clicks and purchases (driver's summary) that the facts hold."""
    pairs = [(counts[name], summary[name]) for name in ("impressions", "clicks", "purchases")]
    return min((held / seen for held, seen in pairs if seen), default=1.0)


def _driver_records(folder: Path | None) -> tuple[pd.DataFrame | None, dict[str, Any] | None]:
    if folder is None or not (folder / "experiment.json").is_file():
        return None, None
    return pd.read_parquet(folder / "responses.parquet"), json.loads((folder / "experiment.json").read_text())


def _alarms(analysis: Analysis, rows: list[DriftRow]) -> list[str]:
    alarms = []
    for record in analysis.result["calibration"]:
        if record["alarm"]:
            ratio, expected = record["predicted_over_observed"], record["expected"]
            alarms.append(f"Calibration: arm {record['arm']} predicts {ratio:.2f} clicks for each one observed; {expected:.2f} was expected.")
    drifted = [row for row in rows if row.drifted]
    if drifted:
        named = "; ".join(f"{row.name} ({row.reference_summary.split(' (')[0]} \N{RIGHTWARDS ARROW} {row.current_summary.split(' (')[0]})" for row in drifted)
        alarms.append(f"Drift in {len(drifted)} of {len(rows)} watched quantities: {named}.")
    return alarms


def monitor(traffic: Path, out: Path, config: MonitorConfig | None = None, reference: Path | None = None, experiment: Path | None = None, title: str = "Experiment") -> MonitorResult:
    """Judge an experiment from its logs.

    Args:
        traffic: folder of logs with `requests` and `impressions` of the experiment; REQUESTS.arm tells the arm.
        out: folder for the report.
        config: plan and drift thresholds.
        reference: folder of logs of the period before (the training logs): pre-period of the users and reference of the drift. None: neither is shown.
        experiment: folder of the driver's `experiment.json` and `responses.parquet`: response times and completeness. None: neither is judged.
        title: first line of the page.
    Raises `LogError` for damaged logs and ValueError if no arm of the plan is in them.
    """
    config = config or MonitorConfig()
    plan = config.plan
    facts = read_facts(traffic, plan.window_hours)
    before = None if reference is None else read_facts(reference, plan.window_hours)
    responses, summary = _driver_records(experiment)
    completeness = None if summary is None else completeness_of(asdict(facts.counts), summary)
    analysis = analyse(facts, plan, responses, completeness, before)
    columns, rows = [], []
    note = "No reference period was given, so nothing is compared."
    if before is not None and reference is not None:
        past = drift.read_tables(reference)
        now = drift.read_tables(traffic)
        now = drift.LogTables(past.ads if now.ads.empty else now.ads, past.users if now.users.empty else now.users)
        columns = drift.watched_columns(facts, now, before, past, plan.control, plan.treatment, config.drift)
        rows = [drift.measure(column, config.drift) for column in columns]
        days = sorted(before.requests["day"].unique())[-config.drift.reference_days :]
        note = (
            f"Reference: {pd.Timestamp(days[0]):%Y-%m-%d} to {pd.Timestamp(days[-1]):%Y-%m-%d}. Alarm: the configured threshold, or {config.drift.noise_margin:g} times "
            "what reference days of the same size show against each other, whichever is larger. What a policy shows is compared with the same policy only."
        )
    alarms = _alarms(analysis, rows)
    severity: Severity = "critical" if analysis.verdict.code in ("invalid", "stop") else "warning" if alarms else "ok"
    result = {**analysis.result, "severity": severity, "alarms": alarms, "drift": [asdict(row) for row in rows], "days": analysis.days.to_dict("records"), "service": summary}

    from monitoring import evidently_report  # seconds to import

    snapshot = evidently_report.write(out, analysis.users, plan, analysis.verdict, analysis.result["planned_users"], columns, rows, config.drift)
    result["evidently_tests"] = [{"name": test["name"], "status": test["status"].name} for test in snapshot["tests"]]
    html = page.render(result, analysis.days, rows, note, plan.control, plan.treatment, title, plan.alpha, plan.window_hours, summary)
    logs.write_bytes(out / "report.html", html.encode())
    logs.write_bytes(out / "ab_result.json", (json.dumps(_finite(result), indent=1, allow_nan=False) + "\n").encode())
    return MonitorResult(severity, out / "report.html", out / "ab_result.json", analysis, rows)
