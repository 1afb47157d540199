"""The Evidently report: our verdict and arms as custom metrics, drift of every watched column. Displays results, computes no inference of its own.

Evidently takes seconds to import, so only `report` imports this module, and inside a function. A metric's fields are its identity, therefore
the numbers come from the data (per-user sums) in `calculate`. An absent arm gives NaN, which fails its tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.core.metric_types import SingleValueCalculation, SingleValueMetric
from evidently.legacy.model.widget import BaseWidgetInfo
from evidently.legacy.renderers.html_widgets import CounterData, counter
from evidently.metrics import ValueDrift
from evidently.sdk.models import DashboardPanelPlot, PanelMetric
from evidently.tests import gte, lte
from evidently.ui.workspace import Workspace

from monitoring import ab_stats
from monitoring.drift import METHODS, DriftColumn, DriftConfig, DriftRow, side_by_side
from monitoring.facts import SUMS
from monitoring.verdict import HEADLINE, METRICS, Analysis, ExperimentPlan, Metric, Verdict, arm_estimate

CHECKS = {"calibration": Metric("Predicted over observed clicks", "predicted", "clicks"), "charged_over_critical": Metric("Charged over critical price", "charged", "critical")}
"""Of each arm, beside the METRICS; NaN where the logs do not tell."""
KNOWN = METRICS | CHECKS
PARTS = {"lift": "value", "lift_low": "low", "lift_high": "high", "p": "p_value"}


def _users(data: Dataset) -> pd.DataFrame:
    frame = data.as_dataframe()
    return frame.loc[frame["arm"].notna()]


class VerdictShown(SingleValueMetric):
    """Share of planned users reached, with the verdict as its widget; the first thing on the page."""

    headline: str
    sentence: str
    planned: int


class VerdictShownCalculation(SingleValueCalculation[VerdictShown]):
    def calculate(self, context: Any, current_data: Dataset, reference_data: Dataset | None) -> Any:
        result = self.result(len(_users(current_data)) / self.metric.planned)
        widget: BaseWidgetInfo = counter(title="Verdict", counters=[CounterData(label=self.metric.sentence, value=self.metric.headline)])
        result.widget = [widget]
        return result

    def display_name(self) -> str:
        return "Users reached, share of the plan"


class ArmValue(SingleValueMetric):
    """A metric of one arm: ratio of sums over users."""

    arm: str
    metric_name: str


class ArmValueCalculation(SingleValueCalculation[ArmValue]):
    def calculate(self, context: Any, current_data: Dataset, reference_data: Dataset | None) -> Any:
        metric = KNOWN[self.metric.metric_name]
        return self.result(arm_estimate(_users(current_data), self.metric.arm, metric.numerator, metric.denominator).value * metric.scale)

    def display_name(self) -> str:
        metric = KNOWN[self.metric.metric_name]
        return f"{metric.label}{', ' + metric.unit if metric.unit else ''}, arm {self.metric.arm}"


class AbPart(SingleValueMetric):
    """One number of a comparison: lift, a bound of its interval, or p."""

    control: str
    treatment: str
    metric_name: str
    part: str


class AbPartCalculation(SingleValueCalculation[AbPart]):
    def calculate(self, context: Any, current_data: Dataset, reference_data: Dataset | None) -> Any:
        metric, users = METRICS[self.metric.metric_name], _users(current_data)
        arms = (arm_estimate(users, arm, metric.numerator, metric.denominator) for arm in (self.metric.control, self.metric.treatment))
        return self.result(float(getattr(ab_stats.lift(*arms), PARTS[self.metric.part])))

    def display_name(self) -> str:
        return f"{METRICS[self.metric.metric_name].label}: {self.metric.part.replace('_', ' ')} of {self.metric.treatment} over {self.metric.control} (0.01 is 1 %)"


def _metrics(plan: ExperimentPlan, verdict: Verdict, planned: int, columns: list[DriftColumn], rows: dict[str, DriftRow], priced: bool) -> list[Any]:
    arms = {"control": plan.control, "treatment": plan.treatment}
    shown: list[Any] = [VerdictShown(headline=verdict.headline, sentence=verdict.sentence, planned=planned)]
    for name in HEADLINE:
        shown += [ArmValue(arm=arm, metric_name=name) for arm in plan.shares]
        low = AbPart(**arms, metric_name=name, part="lift_low", tests=[gte(-plan.guardrails[name])] if name in plan.guardrails else None)
        shown += [AbPart(**arms, metric_name=name, part="lift"), low, AbPart(**arms, metric_name=name, part="lift_high")]
    shown += [ArmValue(arm=arm, metric_name="calibration") for arm in plan.shares]
    if priced:
        shown += [ArmValue(arm=arm, metric_name="charged_over_critical", tests=[lte(1 + plan.overcharge_margin)]) for arm in plan.treatments]
    shown += [ValueDrift(column=c.name, method=METHODS[c.kind], threshold=rows[c.name].threshold) for c in columns]
    return shown


def write(
    out: Path,
    analysis: Analysis,
    plan: ExperimentPlan,
    columns: list[DriftColumn],
    drift_rows: list[DriftRow],
    config: DriftConfig,
    workspace: Path | None = None,
    title: str = "Experiment",
) -> dict[str, Any]:
    """Write `evidently.html` (static, self-contained) into `out`, add the snapshot to the workspace, and return it as a dict.

    Args: analysis, for its per-user table and its verdict; columns and their measured rows (columns with too few rows are left out).
    """
    rows = {row.name: row for row in drift_rows}
    columns = [column for column in columns if rows[column.name].note == ""]
    current, reference = side_by_side(columns, config) if columns else (pd.DataFrame(), pd.DataFrame())
    priced = "critical" in analysis.users
    sums = [*SUMS, *(["charged", "critical"] if priced else [])]
    table = analysis.users[["arm", *sums]].reset_index(drop=True)
    current = pd.concat([current, table], axis=1)
    reference = pd.concat([reference, table.iloc[:0]], axis=1)
    definition = DataDefinition(
        numerical_columns=[*sums, *[c.name for c in columns if c.kind == "numeric"]], categorical_columns=["arm", *[c.name for c in columns if c.kind == "categorical"]]
    )
    report = Report(_metrics(plan, analysis.verdict, analysis.result["planned_users"], columns, rows, priced), include_tests=True, metadata={"verdict": analysis.verdict.headline})
    with warnings.catch_warnings():
        # Evidently divides by the number of rows of each column; the per-user sums have none in the reference, by design.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="evidently")
        before = Dataset.from_pandas(reference, data_definition=definition) if columns else None
        last = max(analysis.days["day"], default=None)
        snapshot = report.run(Dataset.from_pandas(current, data_definition=definition), before, timestamp=None if last is None else pd.Timestamp(last).to_pydatetime(), name=title)
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".evidently.part.html"
    try:
        snapshot.save_html(str(part))
        part.replace(out / "evidently.html")
    finally:
        part.unlink(missing_ok=True)
    if workspace is not None:
        _add_to(workspace, snapshot, plan, [column.name for column in columns])
    return snapshot.dict()


PROJECT = "EGA experiments"


def _add_to(folder: Path, snapshot: Any, plan: ExperimentPlan, watched: list[str]) -> None:
    """Add a snapshot to the workspace's project; a new project gets its panels."""
    workspace = Workspace.create(str(folder))
    found = [project for project in workspace.list_projects() if project.name == PROJECT]
    project = found[0] if found else workspace.create_project(PROJECT, description="A/B tests and drift: one snapshot a report, dated by its last day")
    if not found:
        for panel in panels(plan, watched):
            project.dashboard.add_panel(panel)
        project.save()
    workspace.add_run(project.id, snapshot)


def panels(plan: ExperimentPlan, watched: Sequence[str] = ()) -> list[DashboardPanelPlot]:
    """Trends over snapshots: every headline metric by arm, its lift with the interval, calibration, and the drift scores of the columns `watched`."""

    def panel(title: str, subtitle: str, values: list[PanelMetric], size: str = "half") -> DashboardPanelPlot:
        return DashboardPanelPlot(title=title, subtitle=subtitle, size=size, values=values, plot_params={"plot_type": "line"})

    def by_arm(name: str) -> list[PanelMetric]:
        return [PanelMetric(metric=ArmValue.__name__, metric_labels={"arm": arm, "metric_name": name}, legend=arm) for arm in plan.shares]

    shown = []
    for name in HEADLINE:
        lifts = [
            PanelMetric(metric=AbPart.__name__, metric_labels={"metric_name": name, "part": part}, legend=text)
            for part, text in (("lift", "lift"), ("lift_low", "lower bound"), ("lift_high", "upper bound"))
        ]
        metric = METRICS[name]
        shown.append(panel(metric.label + (f", {metric.unit}" if metric.unit else ""), "by arm", by_arm(name)))
        shown.append(panel(f"{metric.label}: lift", f"of {plan.treatment} over {plan.control} with its 95 % interval; 0.1 is 10 %", lifts))
    shown.append(panel(CHECKS["calibration"].label, "by arm", by_arm("calibration")))
    if watched:
        scores = [PanelMetric(metric=ValueDrift.__name__, metric_labels={"column": name}, legend=name) for name in watched]
        shown.append(panel("Drift", "distance of each quantity from the reference period; the report has the thresholds", scores, "full"))
    return shown


def serve(folder: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Evidently's own UI on a workspace, until it is stopped. Our metrics are known there because this module is imported."""
    from evidently.ui.service.app import run_local

    run_local(host=host, port=port, workspace=str(folder))
