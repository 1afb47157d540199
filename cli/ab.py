"""`ega ab`: simulated users against the live service, two arms, then the report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marketplace.worlds import World
    from monitoring.experiment import DriverConfig, ExperimentSummary
    from monitoring.report import MonitorConfig, MonitorResult
    from serving.settings import ServingConfig


class AbError(RuntimeError):
    """The experiment cannot start; the text says what is missing."""


def _set_aside(home: Path) -> None:
    """Move an earlier event log away: request ids are idempotency keys, so a second experiment would get the first one's pages back."""
    events = home / "events"
    if not events.is_dir() or not any(events.iterdir()):
        return
    number = 1
    while (home / f"events-{number}").exists():
        number += 1
    events.rename(home / f"events-{number}")
    print(f"The event log of earlier traffic was kept as {home / f'events-{number}'}", file=sys.stderr)


@contextmanager
def _service(url: str | None, settings: ServingConfig, log: Path) -> Iterator[str]:
    """The given service, or one of our own for the length of the block."""
    if url is not None:
        yield url
        return
    from serving.launch import running_service

    _set_aside(settings.home)
    log.parent.mkdir(parents=True, exist_ok=True)
    with running_service(settings, log=log) as service:
        yield service.url


def _export(home: Path, world: World, reference: Path, out: Path) -> None:
    """The service's event log as a complete folder of logs: with catalogue, profiles and the visits that happened meanwhile."""
    import pandas as pd

    from marketplace.logs import read_table
    from serving.event_log import export_logs
    from serving.settings import event_log_path

    requests = world.live_requests()
    first, last = (requests["event_timestamp"].agg(which).floor("D") for which in ("min", "max"))
    days = [day.date() for day in pd.date_range(first, last, freq="D")]
    known = set(world.state.live_days)
    catalogue = pd.concat([world.ad_table(day) for day in days if day in known], ignore_index=True)
    until = last + pd.Timedelta(days=1)
    path = event_log_path(home)
    if not path.exists():
        raise AbError(f"the service's event log {path} does not exist; with --url, --home must be the home that the service runs on")
    export_logs(path, out, first.to_pydatetime(), until.to_pydatetime(), ads=catalogue, users=read_table(reference, "users"), behaviours=world.live_behaviours())


def execute(
    run: Path,
    home: Path,
    monitoring: MonitorConfig | None = None,
    driver: DriverConfig | None = None,
    serving: ServingConfig | None = None,
    url: str | None = None,
    token: str | None = None,
    progress: bool = True,
    title: str = "Experiment",
) -> tuple[ExperimentSummary, MonitorResult]:
    """Serve (unless `url` names a service), drive, export, judge. Everything lands in `<run>/experiment/`.

    Args:
        run: folder of a finished run: its `world/` has the users and the live days, its `logs/` are the reference period.
        home: state of the named configuration; the approved model and the event log live there.
        serving: settings of the service to start; arms and salt are set from the plan.
    Raises AbError, ExperimentError, and the serving errors (ApprovalError without an approved model, StartError).
    """
    from marketplace.worlds import World
    from monitoring.experiment import DriverConfig, run_experiment
    from monitoring.report import MonitorConfig, monitor
    from serving.settings import Arm, ServingConfig

    monitoring, driver = monitoring or MonitorConfig(), driver or DriverConfig()
    reference, out = run / "logs", run / "experiment"
    for folder, what in ((run / "world", "simulated users"), (reference, "logs of the reference period")):
        if not folder.is_dir():
            raise AbError(f"{folder} is missing: `ega ab` needs the {what} of a run that simulated its logs; run `ega run CONFIG` first")
    plan = monitoring.plan
    arms = (Arm(plan.control, "bootstrap", 1 - plan.treatment_share), Arm(plan.treatment, driver.treatment_policy, plan.treatment_share))
    # Features stay those of the reference period: the users' visits of these days are not pushed either, and a repeated experiment starts alike.
    settings = replace(serving or ServingConfig(home=home), home=home, arms=arms, salt=driver.salt, push_events=False)
    if out.exists():
        shutil.rmtree(out)
    world = World.load(run / "world")
    with _service(url, settings, out / "service.log") as base_url:
        summary = run_experiment(world, base_url, out, driver.workers, progress, token, driver.most_requests, driver.seed)
    _export(home, world, reference, out / "logs")
    return summary, monitor(out / "logs", out, monitoring, reference, out, title)


def ab(
    run: Path,
    home: Path,
    monitoring: MonitorConfig | None = None,
    driver: DriverConfig | None = None,
    serving: ServingConfig | None = None,
    url: str | None = None,
    token: str | None = None,
    progress: bool = True,
    title: str = "Experiment",
) -> int:
    """`execute` for the command line: prints the result. Exit code 0 for any finished, readable experiment, 1 error, 3 no approved model, 5 invalid experiment."""
    from cli.monitor import describe
    from marketplace.logs import LogError
    from monitoring.experiment import ExperimentError
    from monitoring.report import EXIT_CODES
    from serving.launch import StartError
    from serving.settings import SettingsError
    from serving.store import ApprovalError

    try:
        summary, result = execute(run, home, monitoring, driver, serving, url, token, progress, title)
    except ApprovalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (AbError, ExperimentError, StartError, SettingsError, LogError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rate = summary.answered / summary.seconds if summary.seconds else 0.0
    print(f"{summary.answered:,} requests answered in {summary.seconds:.0f} s ({rate:.0f}/s), {summary.errors} failed, {summary.clicks:,} clicks, {summary.purchases:,} purchases")
    print(describe(result))
    return EXIT_CODES["critical"] if result.analysis.verdict.code == "invalid" else 0
