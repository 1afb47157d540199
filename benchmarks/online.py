"""The paper's online A/B test on fresh traffic: `ega bench table4`.

MCA and EGA-V1 are trained by the pipeline on the logs of one simulated world, pass the gates into one store, and serve each its arm over HTTP while
the world's users ask, click and buy. Observed lifts come from the services' logs as in any experiment; true lifts from the market's click
probabilities of the pages that were really shown.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from benchmarks.tables import DEFAULT, NAMES, QUICK, provenance, say

if TYPE_CHECKING:
    from marketplace.worlds import World
    from monitoring.experiment import DriverConfig
    from monitoring.report import MonitorResult
    from pipelines.config import RunConfig

PAPER_TABLE4 = {"ctr": 5.2, "rpm": 13.6, "roi": 3.1, "response_ms": 2.2}
"""Paper, online A/B test: change of EGA-V1 against MCA, %."""

AA_REQUESTS = 3000
"""Requests of the A/A test before: enough to find a broken split or log, and short."""

GATED_REQUESTS = 10000
"""Test requests on which the gates judge revenue, of the default configuration: the other tables' 800 leave an interval of +-4 % around a lift whose
lower bound must exceed -1 %."""

CONTROL, TREATMENT = "control", "ega"


@dataclass(frozen=True)
class Arms:
    """One experiment of the table."""

    name: str
    tags: dict[str, str]
    """Exact tag of the model behind each arm."""
    prices: dict[str, str]
    """Price rule of an arm; of the others the one that the gates chose."""
    salt: str
    most_requests: int | None


Drive = Callable[..., "MonitorResult"]
"""(run, home, monitoring, driver, price_modes, title): serve both arms, send the users, judge; `ega ab` (cli.ab.execute)."""


def table4(drive: Drive, config: Path | None = None, data: Path | None = None, seed: int | None = None, quick: bool = False) -> dict[str, Any]:
    """Table 4: CTR, RPM, ROI and response time of EGA-V1 against MCA; first an A/A test of the chain. ValueError when the gates refuse a model.

    Two comparisons: both arms at the prices that the gates chose (critical or learned ones), and MCA charging GSP as published. Bids are truthful in both,
    and truthful GSP overcharges: what it earns more than the first comparison's MCA no advertiser would go on paying.
    """
    from pipelines.config import load_run_config

    path, started = config or (QUICK if quick else DEFAULT), time.monotonic()
    setting = load_run_config(path, seed=seed)
    if config is None and not quick:
        setting = replace(setting, evaluation=replace(setting.evaluation, requests=GATED_REQUESTS))
    if setting.world is None:
        raise ValueError(f"{path} names no world; an A/B test needs users, and a truth to compare with")
    with tempfile.TemporaryDirectory(prefix="ega-table4-") as folder, contextlib.redirect_stdout(sys.stderr):
        world, run = _market(setting, Path(folder), data)
        home = Path(folder) / "home" / setting.name
        tags, chosen = _approved(setting, run, home)
        driver, found = setting.experiment.driver, {}
        for arms in _experiments(tags, driver):
            say(f"seed {setting.seed}: A/B test, {arms.name}")
            policies = replace(driver, control_policy=arms.tags[CONTROL], treatment_policy=arms.tags[TREATMENT], salt=arms.salt, most_requests=arms.most_requests)
            monitoring = replace(setting.experiment.monitor, plan=replace(setting.experiment.monitor.plan, control=CONTROL, treatment=TREATMENT, others={}))
            result = drive(run, home, monitoring, policies, arms.prices, f"table 4: {arms.name}")
            found[arms.name] = _read(world, run / "experiment", result)
    labels = {tag: NAMES[kind] for kind, tag in tags.items()}
    return {
        **provenance(path, [setting.seed], (time.monotonic() - started) / 60), "table": _lifts(found), "second_table": _arm_rows(found, labels), "approved": {NAMES[kind]: tag for kind, tag in tags.items()}, "gated_requests": setting.evaluation.requests,
        "price_modes": {NAMES[kind]: mode for kind, mode in chosen.items()}, "experiments": found, "paper": {name: f"{value:+.1f} %" for name, value in PAPER_TABLE4.items()},
    }  # fmt: skip


def _experiments(tags: dict[str, str], driver: DriverConfig) -> Iterator[Arms]:
    both = {CONTROL: tags["mca"], TREATMENT: tags["ega_v1"]}
    least = min(driver.most_requests or AA_REQUESTS, AA_REQUESTS)
    yield Arms("A/A: MCA in both arms", {CONTROL: tags["mca"], TREATMENT: tags["mca"]}, {}, f"{driver.salt}-aa", least)
    yield Arms("prices of the gates", both, {}, driver.salt, driver.most_requests)
    yield Arms("MCA charges GSP", both, {CONTROL: "gsp"}, driver.salt, driver.most_requests)


def _market(config: RunConfig, folder: Path, data: Path | None) -> tuple[World, Path]:
    """World and logs, as `ega run` leaves them in a run's folder."""
    from marketplace.worlds import build_world

    run = folder / "runs" / "market"
    say(f"seed {config.seed}: logs of {config.name}")
    world = build_world(config.world, config.seed, data)
    world.write_logs(run / "logs")
    world.save(run / "world")
    return world, run


def _approved(config: RunConfig, run: Path, home: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Tags and price modes of MCA and EGA-V1 by kind, both through the whole pipeline into one store.

    MCA comes first: as a newcomer it is judged against the logging policy, and EGA-V1 then against MCA, its incumbent. The other way round the
    revenue gate asks MCA to earn as much as EGA-V1.
    """
    from model.bundle import signing_key
    from pipelines.local import PipelineFailed, home_lock, run_pipeline
    from serving.store import live_model

    home.mkdir(parents=True)
    key, tags, modes = signing_key(home.parent, create=True), {}, {}
    for kind in ("mca", "ega_v1"):
        folder = run.parent / kind
        folder.mkdir()
        say(f"seed {config.seed}: pipeline of {NAMES[kind]}")
        try:
            with home_lock(home):
                verdict = run_pipeline(replace(config, model=replace(config.model, kind=kind)), run / "logs", folder, home, fresh=not tags)
        except PipelineFailed as error:  # its log goes with the folder
            raise RuntimeError("\n".join([*(folder / "pipeline.log").read_text(errors="replace").splitlines()[-30:], f"pipeline of {NAMES[kind]}: {error}"])) from error
        if verdict.startswith("rejected"):
            raise ValueError(f"the gates refused {NAMES[kind]}, and an A/B test serves approved models only; {verdict}. Another seed or longer training may pass, or gates of a --config of your own")
        tags[kind], modes[kind] = verdict, live_model(home, key).price_mode
    return tags, modes


METRICS = {"ctr": "CTR per impression", "rpm": "RPM per 1000 impressions", "roi": "ROI, order value per ad spend", "response_ms": "response time, mean"}


def _read(world: World, folder: Path, result: MonitorResult) -> dict[str, Any]:
    """What one experiment found: lifts as observed and in truth, and what each arm served and charged."""
    record = result.analysis.result
    lifts = {name: {key: record["lifts"][name][key] for key in ("control", "treatment", "lift", "lift_low", "lift_high", "p")} for name in METRICS}
    arms = {}
    for arm in (CONTROL, TREATMENT):
        facts = _service_facts(folder / "homes" / arm)
        arms[arm] = {
            "version": ", ".join(record["arms"][arm]["policies"]), "prices": ", ".join(sorted(facts["price_mode"].unique())), "users": record["arms"][arm]["users"], "requests": len(facts),
            **{name: entry["control" if arm == CONTROL else "treatment"] for name, entry in lifts.items()},
        }  # fmt: skip
    days = sorted({str(day)[:10] for day in result.analysis.days["day"]})
    return {"lifts": lifts, "true_lifts": true_lifts(world, folder / "logs"), "arms": arms, "verdict": result.analysis.verdict.headline, "reasons": result.analysis.verdict.reasons, "days": days}


def _service_facts(home: Path) -> pd.DataFrame:
    from serving.event_log import read_service_facts
    from serving.settings import event_log_path

    return read_service_facts(event_log_path(home))


def true_lifts(world: World, logs: Path) -> dict[str, dict[str, float]]:
    """Lifts of CTR and RPM per impression of the pages that were shown, by the market's click probabilities: no luck of clicks, that of users and requests.

    `logs` holds an experiment's requests with their arms, and impressions. Users as the unit (ABSTATS F1, F3). The market knows no expected order
    value of a page, so there is no true ROI.
    """
    from marketplace.logs import read_table
    from marketplace.truth import score_pages
    from monitoring import ab_stats

    arms = read_table(logs, "requests", columns=["request_id", "arm"])
    pages = read_table(logs, "impressions").merge(arms, on="request_id").rename(columns={"arm": "policy"})
    users = score_pages(world, pages).groupby(["policy", "user_id"])[["clicks", "revenue", "slots"]].sum()
    found = {}
    for name, column in (("ctr", "clicks"), ("rpm", "revenue")):
        a, b = (ab_stats.ratio_per_user(users.loc[arm, column].to_numpy(), users.loc[arm, "slots"].to_numpy()) for arm in (CONTROL, TREATMENT))
        lift = ab_stats.lift(a, b)
        found[name] = {"lift": lift.value, "lift_low": lift.low, "lift_high": lift.high}
    return found


def _lifts(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a metric: the paper's change, then each experiment as observed and in truth."""
    rows = []
    for name, label in METRICS.items():
        row: dict[str, Any] = {"EGA-V1 over MCA": label, "paper": f"{PAPER_TABLE4[name]:+.1f} %"}
        for experiment, entry in found.items():
            row[experiment] = _change(entry["lifts"][name])
            if not experiment.startswith("A/A"):
                row[f"{experiment}, true"] = _change(entry["true_lifts"][name]) if name in entry["true_lifts"] else ""
        rows.append(row)
    return rows


def _change(entry: dict[str, float]) -> str:
    lift, low, high = (100 * entry[key] for key in ("lift", "lift_low", "lift_high"))
    return f"{lift:+.1f} % ({low:+.1f} to {high:+.1f})" if lift == lift else "unknown"


def _verdict(entry: dict[str, Any]) -> str:
    """An experiment's verdict; of a stopped one also what it was stopped for."""
    return ". ".join([entry["verdict"], *(reason.rstrip(".") for reason in entry["reasons"])]) if entry["verdict"].startswith("Stop") else str(entry["verdict"])


def _arm_rows(found: dict[str, dict[str, Any]], labels: dict[str, str]) -> list[dict[str, Any]]:
    """A row an arm: the model that really answered, how it priced, and the levels."""
    kinds = {tag.split(":")[-1]: label for tag, label in labels.items()}
    return [
        {"experiment": name, "arm": arm, "model": kinds.get(values["version"].split(":")[-1], values["version"]), "prices charged": values["prices"], "users": values["users"],
         "requests": values["requests"], "CTR %": values["ctr"], "RPM": values["rpm"], "ROI": values["roi"], "response ms": values["response_ms"], "verdict": _verdict(entry) if arm == TREATMENT else ""}
        for name, entry in found.items() for arm, values in entry["arms"].items()
    ]  # fmt: skip
