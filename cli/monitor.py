"""`ega monitor`: a report on logged traffic; the exit code tells how serious it is."""

from __future__ import annotations

import errno
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monitoring.report import MonitorConfig, MonitorResult


def describe(result: MonitorResult) -> str:
    """The result for a terminal: verdict, reasons, the headline lifts, where the page is."""
    from monitoring.page import interval_name, number, percent, shown_first

    record = result.analysis.result
    control, treatment = list(record["arms"])[0], record["treatment"]
    lines = ["", result.analysis.verdict.headline, f"  {result.analysis.verdict.sentence}", *[f"  - {reason}" for reason in result.analysis.verdict.reasons], ""]
    lines.append(f"  {'':34}{control:>12}{treatment:>12}   lift ({interval_name(record)})")
    lines.append(f"  {'Users':34}{number(record['arms'][control]['users']):>12}{number(record['arms'][treatment]['users']):>12}")
    for name in shown_first(record):
        row = record["lifts"][name]
        relative = f"{percent(row['lift'])} ({percent(row['lift_low'])} to {percent(row['lift_high'])})"
        absolute = f"difference {number(row['difference'])} ({number(row['difference_low'])} to {number(row['difference_high'])})".replace("-", "\N{MINUS SIGN}")
        lift = percent(math.nan) if not math.isfinite(row["difference"]) else relative if row["relative_is_safe"] else absolute
        lines.append(f"  {row['label']:34}{number(row['control']):>12}{number(row['treatment']):>12}   {lift}")
    for arm, other in list(record["treatments"].items())[1:]:
        row = other["lifts"][record["primary"]]
        lines.append(f"  {arm}: {row['label'].split(',')[0]} {percent(row['lift'])} ({percent(row['lift_low'])} to {percent(row['lift_high'])}). {other['verdict']['headline']}.")
    lines.append("")
    lines += [f"  ! {text}" for text in result.alarms] or [f"  No alarm: {len(result.drift)} quantities, the arms' calibration and the click rates of all segments are as before."]
    lines.append(f"  Report: {result.report}")
    return "\n".join(lines)


def monitor(
    run: Path | None = None,
    traffic: Path | None = None,
    reference: Path | None = None,
    out: Path | None = None,
    config: MonitorConfig | None = None,
    title: str = "Experiment",
    workspace: Path | None = None,
    train: Callable[[Path], int] | None = None,
) -> int:
    """Judge the experiment of a run, or any folder of logs with two arms.

    Args: run, a run folder (its `experiment/` is judged against its `logs/`); traffic, a folder of logs instead; reference, logs of the period before;
    out, where the report goes (default: the run's `experiment/`, or `report/` beside the traffic); workspace, Evidently workspace that gets a snapshot;
    train, what starts the training pipeline on a folder of logs where the alarms call for it (its exit code is then returned).
    Returns 0 nothing to act on, 4 drift or calibration alarm, 5 invalid experiment or harm, 1 error, 2 wrong call.
    """
    if (run is None) == (traffic is None):
        print("error: give either a run folder (--run) or a folder of logs (--traffic)", file=sys.stderr)
        return 2
    from marketplace.logs import LogError
    from monitoring.report import monitor as judge

    experiment = None
    if run is not None:
        experiment, traffic = run / "experiment", run / "experiment" / "logs"
        out = out or experiment
        reference = reference or (run / "logs" if (run / "logs").is_dir() else None)
    if traffic is None or not traffic.is_dir():
        mend = "`ega ab` writes it" if run is not None else "give a folder of logs (docs/data.md) or the folder of a run with an experiment"
        print(f"error: {traffic} is not a folder; {mend}", file=sys.stderr)
        return 1
    if (traffic / "run.json").is_file():
        print(f"error: {traffic} is a run without an experiment; `ega ab CONFIG --run {traffic.name}` makes one", file=sys.stderr)
        return 1
    try:
        out = out or traffic.parent / "report"
        result = judge(traffic, out, config, reference, experiment, title, workspace)
        print(describe(result))
        if train is None:
            return result.exit_code
        if not result.retraining:
            print("  No retraining: " + ("nothing that a training can answer has moved" if result.severity != "critical" else "traffic of a broken or harmful experiment is not learnt from"))
            return result.exit_code
        if reference is None:
            raise ValueError("a retraining needs the logs of the period before: give a reference")
        from monitoring.retraining import training_logs

        logs = training_logs(reference, result.traffic, out)
    except (LogError, ValueError, OSError) as error:
        full = f"; make room for {out} and run it again" if isinstance(error, OSError) and error.errno == errno.ENOSPC else ""
        print(f"error: {error}{full}", file=sys.stderr)
        return 1
    print(f"  Retraining because of {', '.join(result.retraining)}, on {logs}")
    return train(logs)
