"""`ega ab`: simulated users against live services, two or more arms, then the report."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marketplace.worlds import World
    from monitoring.experiment import DriverConfig, ExperimentSummary
    from monitoring.report import MonitorConfig, MonitorResult
    from monitoring.shadow import ShadowResult
    from monitoring.verdict import ExperimentPlan
    from serving.settings import Arm, PriceMode, ServingConfig


class AbError(RuntimeError):
    """The experiment cannot start; the text says what is missing."""


@dataclass(frozen=True)
class Experiment:
    """What is to be driven and judged."""

    run: Path
    """Folder of a finished run: its `world/` has the users and the live days, its `logs/` are the reference period; `experiment/` is written."""
    home: Path
    """State of the named configuration; the approved model and the event log live there."""
    monitoring: MonitorConfig
    driver: DriverConfig
    title: str = "Experiment"
    serving: ServingConfig | None = None
    """Settings of the services to start; arms and salt are set from the plan."""
    price_modes: dict[str, PriceMode] = field(default_factory=dict)
    """Price rule of an arm that has a service of its own (its policy is a tag); the other arms charge by `serving`."""
    url: str | None = None
    """A service that runs already; None: services are started for the experiment."""
    token: str | None = None
    """Bearer token of that service."""
    progress: bool = True


def _set_aside(home: Path) -> None:
    """Move an earlier event log away: request ids are idempotency keys, so a second experiment would get the first one's pages back."""
    events = home / "events"
    if not events.is_dir() or not any(events.iterdir()):
        return
    _check_unused(home)
    number = 1
    while (home / f"events-{number}").exists():
        number += 1
    events.rename(home / f"events-{number}")
    print(f"The event log of earlier traffic was kept as {home / f'events-{number}'}", file=sys.stderr)


def _check_unused(home: Path) -> None:
    """Raises AbError while another service writes this home's event log."""
    import psutil

    from serving.settings import SETTINGS_VARIABLE

    for process in psutil.process_iter():
        try:
            settings = process.environ().get(SETTINGS_VARIABLE)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue  # another user's process, or one that has just ended
        if settings is not None and Path(settings).parent == home / "serving":
            raise AbError(f"a service of {home} is running (process {process.pid}) and writes the event log there; stop it, or drive it with --url")


KINDS = ("bootstrap", "model")
"""Policies that one service can hold beside each other; any other policy is the exact tag of a model, which gets a service of its own."""


@dataclass(frozen=True)
class _Services:
    """What the driver talks to, and whose event logs are the experiment's."""

    url: str
    homes: list[Path]
    address: Callable[[int], str] | None = None
    shadow_url: str | None = None


def _policies(plan: ExperimentPlan, driver: DriverConfig) -> dict[str, str]:
    """Policy of every arm of the plan. Raises AbError where the two do not fit."""
    if set(driver.other_policies) != set(plan.others):
        named = ", ".join(sorted(set(driver.other_policies) ^ set(plan.others)))
        raise AbError(f"arms {named}: experiment.driver.other_policies must name a policy for exactly the arms of experiment.monitor.plan.others")
    return {plan.control: driver.control_policy, plan.treatment: driver.treatment_policy, **driver.other_policies}


def _arm(name: str, policy: str, share: float) -> tuple[Arm, str]:
    """An arm of a service and, for an exact model, its tag."""
    from serving.settings import Arm

    return (Arm(name, policy, share), "") if policy in KINDS else (Arm(name, "model", share), policy)


def _own_home(home: Path, folder: Path) -> Path:
    """A home with the stores of another one and an event log of its own: request ids are keys, and two services must not share them."""
    folder.mkdir(parents=True)
    for name in ("feast", "bentoml"):
        (folder / name).symlink_to((home / name).resolve(), target_is_directory=True)
    return folder


def _settings_of(arm: Arm, tag: str, home: Path, folder: Path, base: ServingConfig, price_mode: str | None = None) -> ServingConfig:
    """Settings of a service that runs one arm."""
    return replace(
        base, home=_own_home(home, folder / arm.name), signing_home=base.key_home, model_tag=tag or base.model_tag, arms=(arm,), price_mode=price_mode or base.price_mode
    )


def _check_prices(price_modes: dict[str, PriceMode], policies: dict[str, str], own_services: bool) -> None:
    """Raises AbError for a price rule that no service would follow."""
    for arm in price_modes:
        if arm not in policies:
            raise AbError(f"price_modes names arm {arm!r}; the plan's arms are {', '.join(policies)}")
        if not own_services or policies[arm] == "bootstrap":
            raise AbError(f"price_modes: arm {arm!r} has no service of its own that a model's prices could be set for; name its policy by an exact tag, and leave --url and shadow out")


@contextmanager
def _services(experiment: Experiment, out: Path) -> Iterator[_Services]:
    """The given service, or our own for the length of the block: one for all arms where it can hold them, else one an arm."""
    from serving.assignment import assign_arm
    from serving.launch import running_service
    from serving.settings import ServingConfig

    home, plan, driver = experiment.home, experiment.monitoring.plan, experiment.driver
    policies = _policies(plan, driver)
    by_tag = experiment.url is None and not driver.shadow and any(policy not in KINDS for policy in policies.values())
    _check_prices(experiment.price_modes, policies, by_tag)
    if experiment.url is not None:
        if driver.shadow:
            raise AbError("shadow mode starts its own services; leave --url out")
        yield _Services(experiment.url, [home])
        return
    # Features stay those of the reference period: the users' visits of these days are not pushed either, and a repeated experiment starts alike.
    base = replace(experiment.serving or ServingConfig(home=home), home=home, push_events=False)
    with ExitStack() as stack:

        def start(settings: ServingConfig, name: str) -> str:
            return stack.enter_context(running_service(settings, log=out / f"{name}.log")).url

        if driver.shadow:
            shown, unseen = (_arm(name, policies[name], 1.0) for name in (plan.control, plan.treatment))
            urls = [start(_settings_of(*pair, home, out / "homes", base), name) for pair, name in ((shown, "service"), (unseen, "shadow"))]
            yield _Services(urls[0], [out / "homes" / plan.control], None, urls[1])
            return
        pairs = [_arm(name, policies[name], share) for name, share in plan.shares.items()]
        arms = [arm for arm, _ in pairs]
        if not by_tag:
            _set_aside(home)
            yield _Services(start(replace(base, home=home, arms=tuple(arms), salt=driver.salt), "service"), [home])
            return
        by_arm = {arm.name: start(_settings_of(arm, tag, home, out / "homes", base, experiment.price_modes.get(arm.name)), f"service-{arm.name}") for arm, tag in pairs}
        yield _Services(by_arm[plan.control], [out / "homes" / arm.name for arm in arms], lambda user_id: by_arm[assign_arm(user_id, driver.salt, arms)])


def _export(homes: list[Path], world: World, reference: Path, out: Path) -> None:
    """The services' event logs as one complete folder of logs: with catalogue, profiles and the visits that happened meanwhile."""
    import pandas as pd

    from marketplace.logs import has_table, read_table, write_manifest, write_table
    from serving.event_log import read_behaviours, read_impressions, read_organic, read_requests
    from serving.settings import event_log_path

    requests = world.live_requests()
    first, last = (requests["event_timestamp"].agg(which).floor("D") for which in ("min", "max"))
    since, until = first.to_pydatetime(), (last + pd.Timedelta(days=1)).to_pydatetime()
    known = set(world.state.live_days)
    tables = {"ads": pd.concat([world.ad_table(day.date()) for day in pd.date_range(first, last, freq="D") if day.date() in known], ignore_index=True)}
    tables |= {name: read_table(reference, name) for name in ("users", "creatives") if has_table(reference, name)}
    paths = [event_log_path(home) for home in homes]
    for path in paths:
        if not path.exists():
            raise AbError(f"the service's event log {path} does not exist; with --url, --home must be the home that the service runs on")
    for name, read in (("requests", read_requests), ("impressions", read_impressions), ("organic", read_organic)):
        tables[name] = pd.concat([read(path, since, until) for path in paths], ignore_index=True)
    clicks = [read_behaviours(path, since, until) for path in paths]
    tables["behaviours"] = pd.concat([world.live_behaviours(), *clicks], ignore_index=True).drop_duplicates("behaviour_id", keep="last", ignore_index=True)
    for name, frame in tables.items():
        if len(frame):
            write_table(out, name, frame)
    write_manifest(out, {"source": "event log", "rows": {name: len(frame) for name, frame in tables.items()}})


def _prices(homes: list[Path], out: Path) -> None:
    """`prices.parquet`: what each shown ad was to pay for a click, and its critical price where the policy knows one (docs/auction.md)."""
    import pandas as pd

    from marketplace.logs import write_bytes
    from serving.event_log import read_receipts
    from serving.settings import event_log_path

    rows = [(r["request_id"], r["slot"], r["price"], r["critical_price"]) for home in homes for r in read_receipts(event_log_path(home))]
    frame = pd.DataFrame(rows, columns=["request_id", "slot", "charged", "critical"]).astype({"critical": "float64"})
    write_bytes(out / "prices.parquet", frame.to_parquet(index=False))


def _check_run(run: Path) -> None:
    for folder, what in ((run / "world", "simulated users"), (run / "logs", "logs of the reference period")):
        if not folder.is_dir():
            raise AbError(f"{folder} is missing: `ega ab` needs the {what} of a run that simulated its logs; run `ega run CONFIG` first")


def execute(experiment: Experiment) -> tuple[ExperimentSummary, MonitorResult | ShadowResult]:
    """Serve (unless a service is given), drive, export, judge. Everything lands in `<run>/experiment/`, which is replaced when the traffic is complete.

    Returns what the clients saw, and the report (in shadow mode: the comparison of pages).
    Raises AbError, ExperimentError, and the serving errors (ApprovalError without an approved model, StartError).
    """
    from marketplace.worlds import World
    from monitoring.experiment import run_experiment
    from monitoring.report import monitor
    from monitoring.shadow import compare
    from monitoring.store import replace_folder

    run, monitoring, driver = experiment.run, experiment.monitoring, experiment.driver
    reference, out, part, plan = run / "logs", run / "experiment", run / "experiment.part", monitoring.plan
    _check_run(run)
    _policies(plan, driver)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    world = World.load(run / "world")
    with _services(experiment, part) as services:
        summary = run_experiment(world, services.url, part, driver, experiment.progress, experiment.token, plan.treatments, services.address, services.shadow_url)
    if driver.shadow:
        replace_folder(part, out)
        return summary, compare(out, plan.control, plan.treatment, experiment.title)
    _export(services.homes, world, reference, part / "logs")
    _prices(services.homes, part)
    replace_folder(part, out)
    return summary, monitor(out / "logs", out, monitoring, reference, out, experiment.title)


def plan_text(experiment: Experiment) -> str:
    """How long to run, before the start: users needed for the lift that is worth acting on, and what the run's users can find."""
    from marketplace.worlds import World
    from monitoring.experiment import draw_users
    from monitoring.facts import per_user, read_facts
    from monitoring.planning import Plan, plan

    run, wanted, driver = experiment.run, experiment.monitoring.plan, experiment.driver
    _check_run(run)
    requests = draw_users(World.load(run / "world").live_requests(), driver.most_requests, driver.seed)
    days = int(requests["event_timestamp"].dt.floor("D").nunique())
    before = read_facts(run / "logs", wanted.window_hours)
    last = sorted(before.requests["day"].unique())[-max(1, days) :]
    recent = type(before)(before.requests[before.requests["day"].isin(last)], before.impressions[before.impressions["day"].isin(last)], before.counts)
    found: Plan = plan(per_user(recent), wanted, requests["user_id"].nunique(), days)
    return found.text()


def ab(experiment: Experiment) -> int:
    """`execute` for the command line: prints the result. Exit code 0 for any finished, readable experiment, 1 error, 3 no approved model, 5 invalid experiment."""
    from cli.monitor import describe
    from marketplace.logs import LogError
    from monitoring.experiment import ExperimentError
    from monitoring.report import EXIT_CODES, MonitorResult
    from pipelines.local import RUN_VARIABLE, AlreadyRunning, end_orphans, home_lock
    from serving.launch import StartError
    from serving.settings import SettingsError
    from serving.store import ApprovalError

    try:
        _check_run(experiment.run)
        with home_lock(experiment.home):
            if left := end_orphans(experiment.run):
                print(f"Ended {left} processes of an experiment that was killed", file=sys.stderr)
            os.environ[RUN_VARIABLE] = str(experiment.run)  # by this mark the next experiment finds the services of one that was killed
            if not experiment.driver.shadow:
                print(plan_text(experiment))
            summary, result = execute(experiment)
    except ApprovalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (AbError, AlreadyRunning, ExperimentError, StartError, SettingsError, LogError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rate = summary.answered / summary.seconds if summary.seconds else 0.0
    print(f"{summary.answered:,} requests answered in {summary.seconds:.0f} s ({rate:.0f}/s), {summary.errors} failed, {summary.clicks:,} clicks, {summary.purchases:,} purchases")
    if not isinstance(result, MonitorResult):
        print(result.text())
        return 0
    print(describe(result))
    return EXIT_CODES["critical"] if result.analysis.verdict.code == "invalid" else 0
