"""`monitor`: a folder of logged traffic in, a verdict, one HTML page and one JSON file out.

Writes `report.html` (self-contained), `evidently.html` (drift distributions) and `ab_result.json` into the output folder.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from marketplace import logs
from monitoring import drift, page, segments, store
from monitoring.drift import DriftColumn, DriftConfig, DriftRow, LogTables
from monitoring.facts import Counts, Facts, read_facts
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
    traffic: Path
    """The clean logs that were judged: input of a training."""
    analysis: Analysis
    drift: list[DriftRow]
    alarms: list[str]
    retraining: list[str]

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


def _prices(folder: Path | None) -> pd.DataFrame | None:
    """Charged and critical price of every ad shown, where the service's receipts were kept."""
    path = None if folder is None else folder / "prices.parquet"
    return pd.read_parquet(path) if path is not None and path.is_file() else None


def _driver_records(folder: Path | None) -> tuple[pd.DataFrame | None, dict[str, Any] | None]:
    if folder is None or not (folder / "experiment.json").is_file():
        return None, None
    return pd.read_parquet(folder / "responses.parquet"), json.loads((folder / "experiment.json").read_text())


def _alarms(analysis: Analysis, rows: list[DriftRow], changes: list[segments.RateChange], plan: ExperimentPlan, rate: float) -> list[str]:
    """What moved, in words: the features, segments, arms and days by name."""
    result = analysis.result
    alarms = list(result["traffic_alarms"])
    alarms += result["calibration_alarms"]
    named = " ".join(result["calibration_alarms"])
    for record in result["calibration"]:
        if record["alarm"] and f"arm {record['arm']} " not in named:
            ratio, expected = record["predicted_over_observed"], record["expected"]
            alarms.append(f"Calibration: arm {record['arm']} predicts {ratio:.2f} clicks for each one observed; {expected:.2f} was expected.")
    alarms += segments.summarise(changes)
    for record in result["segments"]:
        if record["lift_high"] < -segments.LEAST_CHANGE / 2 and record.get("p_adjusted", 1.0) < rate:
            size = f"{100 * record['lift']:.0f} %".replace("-", "\N{MINUS SIGN}")
            alarms.append(f"{plan.treatment} loses {record['label'].split(',')[0]} in {record['dimension']} {record['segment']}: {size} (adjusted p = {record['p_adjusted']:.2g}).")
    drifted = [row for row in rows if row.drifted]
    if drifted:
        alarms.append(f"Drift in {len(drifted)} of {len(rows)} watched quantities: {'; '.join(_moved(row) for row in drifted)}.")
    return alarms


def _moved(row: DriftRow) -> str:
    since = f", first on {row.days[0]}" if row.days else ""
    if row.constant:
        return f"{row.name} is constant{since}"
    return f"{row.name} ({row.reference_summary.split(' (')[0]} \N{RIGHTWARDS ARROW} {row.current_summary.split(' (')[0]}{since})"


def retraining_reasons(analysis: Analysis, rows: list[DriftRow], changes: list[segments.RateChange]) -> list[str]:
    """Alarms that a training on the new traffic can answer. Bought clicks and constant features are faults to mend: nothing may be learnt from them."""
    if any(change.change > 0 and change.dimension in ("advertiser", "ad", "user") for change in changes) or any(row.constant for row in rows):
        return []
    reasons = [f"drift of {row.name}" for row in rows if row.drifted]
    return reasons + (["calibration"] if analysis.result["calibration_alarms"] or any(record["alarm"] for record in analysis.result["calibration"]) else [])


def _joined(traffic: Path, out: Path, window_hours: float) -> tuple[Path, Counts | None]:
    """The traffic as clean logs, and what a join of raw records counted. A folder with raw `events/` is joined first, into `<out>/logs`, days that changed only."""
    if not (traffic / "events").is_dir():
        return traffic, store.counts_of(traffic)
    return out / "logs", store.update(traffic, out / "logs", window_hours).counts


@plain_dataclass(frozen=True)
class Findings:
    """What was found in the traffic, before anything is written."""

    analysis: Analysis
    severity: Severity
    alarms: list[str]
    retraining: list[str]
    """Why a training on the new traffic is called for; empty if it is not."""
    columns: list[DriftColumn]
    drift: list[DriftRow]
    changes: list[segments.RateChange]
    note: str
    """How the drift was measured."""


def look(
    facts: Facts,
    now: LogTables,
    before: Facts | None = None,
    past: LogTables | None = None,
    config: MonitorConfig | None = None,
    responses: pd.DataFrame | None = None,
    completeness: float | None = None,
    prices: pd.DataFrame | None = None,
) -> Findings:
    """Judge facts against a reference period. Args as `analyse`; `now` and `past`: catalogue, profiles and behaviours of the two periods."""
    config = config or MonitorConfig()
    plan, rate = config.plan, config.drift.false_alarm_rate
    analysis = analyse(facts, plan, responses, completeness, before, rate, prices)
    columns, rows, changes, note = [], [], [], "No reference period was given, so nothing is compared."
    if before is not None and past is not None:
        now = LogTables(past.ads if now.ads.empty else now.ads, past.users if now.users.empty else now.users, now.behaviours)
        columns = drift.watched_columns(facts, now, before, past, tuple(plan.shares), config.drift)
        rows = [drift.measure(column, config.drift, len(columns)) for column in columns]
        changes = segments.rate_changes(facts, now.ads, before, past.ads, tuple(plan.shares), config.drift)
        days = sorted(before.requests["day"].unique())[-config.drift.reference_days :]
        note = (
            f"Reference: {pd.Timestamp(days[0]):%Y-%m-%d} to {pd.Timestamp(days[-1]):%Y-%m-%d}. Alarm: the configured threshold or what clean days of this size show, "
            f"whichever is larger; a clean day raises any alarm in this table with probability {100 * rate:g} %. What a policy shows is compared with the same policy only."
        )
    alarms = _alarms(analysis, rows, changes, plan, rate)
    stopped = analysis.verdict.code in ("invalid", "stop")
    severity: Severity = "critical" if stopped else "warning" if alarms else "ok"
    retraining = [] if stopped else retraining_reasons(analysis, rows, changes)
    return Findings(analysis, severity, alarms, retraining, columns, rows, changes, note)


def monitor(
    traffic: Path,
    out: Path,
    config: MonitorConfig | None = None,
    reference: Path | None = None,
    experiment: Path | None = None,
    title: str = "Experiment",
    workspace: Path | None = None,
) -> MonitorResult:
    """Judge an experiment from its logs.

    Args:
        traffic: folder of logs with `requests` and `impressions` of the experiment; REQUESTS.arm tells the arm. With a folder `events` of raw
            clicks and purchases (monitoring.store) the outcomes are joined first, and `<out>/logs` is then input of the next training.
        out: folder for the report.
        config: plan and drift thresholds.
        reference: folder of logs of the period before (the training logs): pre-period of the users and reference of the drift. None: neither is shown.
        experiment: folder of the driver's `experiment.json` and `responses.parquet`: response times and completeness. None: neither is judged.
        title: first line of the page.
        workspace: folder of an Evidently workspace that gets the snapshot of this report; None: none.
    Raises `LogError` for damaged logs and ValueError if no arm of the plan is in them.
    """
    config = config or MonitorConfig()
    plan = config.plan
    traffic, delivery = _joined(Path(traffic), out, plan.window_hours)
    facts = read_facts(traffic, plan.window_hours)
    if delivery is not None:  # what was merged on the way is gone from the clean logs
        facts = replace(facts, counts=replace(delivery, users_in_two_arms=facts.counts.users_in_two_arms))
    before = None if reference is None else read_facts(reference, plan.window_hours)
    responses, summary = _driver_records(experiment)
    completeness = None if summary is None else completeness_of(asdict(facts.counts), summary)
    first = min(facts.requests["day"]).date() if len(facts.requests) else None
    now, past = drift.read_tables(traffic, first), None if reference is None else drift.read_tables(reference)
    found = look(facts, now, before, past, config, responses, completeness, _prices(experiment))
    result = {
        **found.analysis.result,
        "severity": found.severity,
        "alarms": found.alarms,
        "retraining": found.retraining,
        "drift": [asdict(row) for row in found.drift],
        "rate_changes": [asdict(change) for change in found.changes],
        "days": found.analysis.days.to_dict("records"),
        "service": summary,
    }

    from monitoring import evidently_report  # seconds to import

    snapshot = evidently_report.write(out, found.analysis, plan, found.columns, found.drift, config.drift, workspace, title)
    result["evidently_tests"] = [{"name": test["name"], "status": test["status"].name} for test in snapshot["tests"]]
    html = page.render(result, found.analysis.days, found.drift, found.note, plan, title)
    logs.write_bytes(out / "report.html", html.encode())
    logs.write_bytes(out / "ab_result.json", (json.dumps(_finite(result), indent=1, allow_nan=False) + "\n").encode())
    return MonitorResult(found.severity, out / "report.html", out / "ab_result.json", traffic, found.analysis, found.drift, found.alarms, found.retraining)
