"""The paper's tables on our market: `ega bench table1` and its kin. Everything is trained here, on one set of logs a seed.

Every figure comes twice: by the evaluation evaluator of EGA-V1 (the referee of all policies, as in the paper) and by the market's truth.
Per request, as the paper counts offline: eCTR sums click probabilities over the page, eRPM is revenue of 1,000 requests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from marketplace.oracle import Limits
    from marketplace.worlds import World
    from model.cascade.config import CascadeConfig
    from model.ega_v1.network import NetworkConfig, RankingModel
    from model.evaluation.replay import Replay
    from model.training.data import Samples
    from pipelines.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, QUICK = ROOT / "config" / "tables.yaml", ROOT / "config" / "ci.yaml"


Task = partial[dict[str, Any]]
"""Some work of a table: a function of a module with its arguments, so that another process can do it."""


@dataclass(frozen=True)
class Market:
    """One seed's world with its logs sampled, and a folder for what is trained on them."""

    config: RunConfig
    world: World
    samples: Samples
    folder: Path

    @property
    def seed(self) -> int:
        return self.config.seed

    def train(self, name: str, model: NetworkConfig, until: str | None = None, shared: str | None = None) -> RankingModel:
        """A model of this configuration, through `until` or all of its stages. `shared`: a trained one whose stages it begins with."""
        from model.kinds import STAGES
        from model.training.run import load_stage, train_stage

        stages = STAGES[model.kind]
        stages = stages if until is None else stages[: stages.index(until) + 1]
        out = self.folder / name / "stages"
        for stage in stages:
            if shared is not None and (source := self.folder / shared / "stages" / stage).is_dir() and stage != "evaluation":
                shutil.copytree(source, out / stage, dirs_exist_ok=True)
                continue
            say(f"seed {self.seed}: {name}, stage {stage}")
            train_stage(stage, self.samples.folder, model, self.config.training, out, self.folder / name / "checkpoints", self.seed)
        return load_stage(stages[-1], self.samples, model, out, self.seed)

    def replay(self, network: RankingModel) -> Replay:
        """The test days, as a run replays them."""
        from model.evaluation.replay import replay

        return replay(network, self.samples, self.config.evaluation)

    def truth(self, pages: pd.DataFrame) -> pd.DataFrame:
        """Expected outcomes of pages in the market."""
        from marketplace.truth import score_pages

        return score_pages(self.world, pages)

    def limits(self, scored: pd.DataFrame) -> Limits:
        """What the best pages of these requests would earn."""
        from marketplace.oracle import limits

        return limits(self.world, scored["request_id"].unique())


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


@contextmanager
def market(path: Path, seed: int, data: Path | None, change: Callable[[RunConfig], RunConfig] | None = None) -> Iterator[Market]:
    """World, logs, feature store and samples of one seed, in a folder that goes when the work is done; `change` turns a knob first."""
    from benchmarks.anchors import find_data
    from features.build import build_features
    from features.sampling import sample_requests
    from marketplace.worlds import build_world
    from model.training.data import Samples
    from model.training.loop import Device
    from pipelines.config import load_run_config

    data = None if data is None else find_data(path.stem, data)
    config = load_run_config(path, seed=seed)
    config = config if change is None else change(config)
    Device(config.training.device).require(config.model.kind)
    if config.world is None:
        raise ValueError(f"{path} names no world; the tables need a market whose truth is known")
    with tempfile.TemporaryDirectory(prefix="ega-tables-") as folder:
        base = Path(folder)
        say(f"seed {seed}: logs of {path.stem}")
        world = build_world(config.world, seed, data)
        world.write_logs(base / "logs")
        build_features(base / "logs", base / "home", config.features.behaviours, fresh=True)
        sample_requests(base / "logs", base / "home", base / "samples", config.sampling, seed)
        yield Market(config, world, Samples(base / "samples", config.training.device), base)


def provenance(path: Path, seeds: list[int], minutes: float) -> dict[str, Any]:
    """Where a table comes from: configuration, seeds, code, versions, time."""
    import platform

    import torch

    from pipelines.config import load_run_config
    from pipelines.version import code_version

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S607
    return {
        "config": path.name, "seeds": seeds, "git_commit": commit or None, "code_version": code_version(), "python": platform.python_version(),
        "torch": torch.__version__, "numpy": np.__version__, "threads": load_run_config(path).training.threads, "processors": os.cpu_count(), "minutes": minutes,
    }  # fmt: skip


def seeds_of(first: int, count: int) -> list[int]:
    """`count` seeds from the configuration's own on."""
    return list(range(first, first + count))


def side_by_side(path: Path, tasks: dict[str, Task], keep: Path | None) -> tuple[list[dict[str, Any]], float]:
    """What every task gives, in their order, and the minutes that all took. As many run at a time, each in a process of its own, as the processors hold at
    the configuration's threads: what is trained does not depend on it. In the folder `keep` each is written down as it ends, so that a stopped table goes
    on where it was: what the same configuration, code and arguments gave is taken from there."""
    from model.bundle import write_atomic
    from model.evaluation.evaluate import finite_only
    from pipelines.config import load_run_config
    from pipelines.version import code_version

    config, code = path.read_text(), code_version()
    of = {name: {"config": config, "code_version": code, "task": [task.func.__name__, *map(str, task.args)]} for name, task in tasks.items()}
    found, minutes, started = {}, 0.0, time.monotonic()
    for name in tasks if keep is not None else ():
        if (record := _kept(keep / f"{name}.json", of[name])) is not None:
            say(f"{name}: from {keep / name}.json")
            found[name] = record["found"]
            minutes += record["minutes"]
    for name, result, took in _run_tasks({name: task for name, task in tasks.items() if name not in found}, *_at_once(load_run_config(path))):
        found[name] = result
        if keep is not None:
            write_atomic(keep / f"{name}.json", json.dumps({"of": of[name], "minutes": took, "found": finite_only(result)}).encode())
    return [found[name] for name in tasks], minutes + (time.monotonic() - started) / 60


def _kept(file: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """What was written down of this very work; None where there is nothing, something else, or something damaged: it is then done again."""
    try:
        record = json.loads(file.read_text())
        return record if record["of"] == of and {"found", "minutes"} <= set(record) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _at_once(config: RunConfig) -> tuple[int, int]:
    """How many tasks run at a time, and the threads of each: as many as the processors hold, and one on a GPU."""
    threads = config.training.threads
    return (os.cpu_count() or 1) // threads if config.training.device == "cpu" else 1, threads


def _run_tasks(tasks: dict[str, Task], most: int, threads: int) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Name, result and minutes of each task as it ends."""
    at_once = min(len(tasks), most)
    if at_once <= 1:
        for name, task in tasks.items():
            yield name, *_timed(task)
        return
    with tempfile.TemporaryDirectory(prefix="ega-tables-") as folder:  # around those of the tasks: what a killed one leaves goes too
        # Bars of several processes would overwrite each other.
        settings = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "TMPDIR": folder}
        before = {name: os.environ.get(name) for name in settings}
        os.environ |= settings
        # A fork would inherit the threads' locks, not the threads.
        pool = ProcessPoolExecutor(at_once, get_context("spawn"), _end_at_once)
        try:
            waiting, running, failure = list(tasks.items()), {}, None
            while running or (waiting and failure is None):
                while waiting and failure is None and len(running) < at_once:  # no more than that: the pool would begin what it holds, whatever happened
                    name, task = waiting.pop(0)
                    running[pool.submit(_timed, task)] = name
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(done)
                    if (error := done.exception()) is None:
                        yield name, *done.result()
                    else:  # what runs beside it ends and is kept
                        failure = failure or error
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(cancel_futures=True)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _end_at_once() -> None:
    """In a process of its own: Ctrl-C ends it, and so does the end of the one that started it."""
    from serving.backend import end_with_parent

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent(signal.SIGTERM)


def _timed(task: Task) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    return task(), (time.monotonic() - started) / 60


def mean_and_deviation(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of every number of rows with the same keys."""
    columns = {key: np.array([row[key] for row in rows], np.float64) for key in rows[0] if isinstance(rows[0][key], int | float)}
    return {key: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else float("nan")} for key, values in columns.items()}


def pooled(lifts: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds of paired differences that each have a 95 % interval, with two intervals of that mean: `low` to `high` for these very markets and
    models, by users (seeds are independent), and `markets_low` to `markets_high` for new ones, by seeds (Student's t)."""
    from scipy.stats import t

    values = np.array([lift["lift"] for lift in lifts])
    mean, count = float(values.mean()), len(values)
    half = float(np.sqrt(np.sum([((lift["high"] - lift["low"]) / 2) ** 2 for lift in lifts])) / count)
    wide = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    return {"lift": mean, "low": mean - half, "high": mean + half, "markets_low": mean - wide, "markets_high": mean + wide, "seeds": count, "least": float(values.min())}


def paired_recall(mine: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, float]:
    """Difference of Recall@k on the same requests, interval clustered by user."""
    from model.evaluation.metrics import mean_and_interval

    both = mine.merge(theirs, on=["request_id", "user_id"], suffixes=("", "_b")).dropna()
    if both.empty:
        return {"lift": float("nan"), "low": float("nan"), "high": float("nan")}
    mean, low, high = mean_and_interval((both["recall"] - both["recall_b"]).to_numpy(), both["user_id"].to_numpy())
    return {"lift": mean, "low": low, "high": high}


def paired_auc(labels: np.ndarray, mine: np.ndarray, theirs: np.ndarray, users: np.ndarray, rounds: int = 200) -> dict[str, float]:
    """Difference of AUC on the same candidates; 95 % interval by the bootstrap over users (percentiles)."""
    from model.evaluation.metrics import auc

    _, user = np.unique(users, return_inverse=True)
    order = np.argsort(user, kind="stable")
    ends = np.cumsum(np.bincount(user))
    pieces = np.split(order, ends[:-1])
    draw = np.random.default_rng(0)
    found = []
    for _ in range(rounds):
        pick = np.concatenate([pieces[i] for i in draw.integers(0, len(pieces), len(pieces))])
        found.append(auc(labels[pick], mine[pick]) - auc(labels[pick], theirs[pick]))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return {"lift": auc(labels, mine) - auc(labels, theirs), "low": float(low), "high": float(high)}


def refereed(place: Market, referee: RankingModel, pages: pd.DataFrame) -> pd.DataFrame:
    """eCTR % and eRPM of every policy of `pages` by the referee's evaluation evaluator, seen among the whole city."""
    from model.evaluation.replay import refereed_clicks

    samples = place.samples
    ids, ads = np.asarray(samples.request_id), np.asarray(samples.ad_id)
    by_id = np.argsort(ids)
    rows = []
    for policy, part in pages.groupby("policy", sort=False):
        request = by_id[np.searchsorted(ids[by_id], part["request_id"].to_numpy())]
        asked, at = np.unique(request, return_inverse=True)
        page, payment = np.full((len(asked), samples.slots), -1), np.zeros((len(asked), samples.slots))
        slot = part["slot"].to_numpy() - 1
        page[at, slot] = np.searchsorted(ads, part["ad_id"].to_numpy())
        payment[at, slot] = part["payment"].to_numpy()
        click = refereed_clicks(referee, samples, asked, page)
        rows.append({"policy": policy, "ectr": 100 * click.sum(1).mean(), "erpm": 1000 * (click * payment).sum(1).mean()})
    return pd.DataFrame(rows).set_index("policy")


PAPER_TABLE1 = {
    "mca": {"recall": 0.289, "auc": 0.741, "ectr": 6.043, "erpm": 185.2, "psi": 9.4},
    "fs_ltr": {"recall": 0.426, "auc": 0.743, "ectr": 6.140, "erpm": 194.9, "psi": 9.1},
    "ega_v1": {"recall": 0.513, "auc": 0.754, "ectr": 6.652, "erpm": 217.1, "psi": 2.3},
}
"""Paper, Table 1."""

NAMES = {"mca": "MCA", "fs_ltr": "FS-LTR", "ega_v1": "EGA-V1"}


CASCADES: dict[str, Callable[[CascadeConfig], CascadeConfig]] = {
    "MCA, recall 100 and pre-ranking 50": lambda config: replace(config, recall=100, prerank=50),
    "MCA without pre-ranking": lambda config: replace(config, prerank=config.recall),
    "DIN on the whole city": lambda config: replace(config, recall=1 << 30, prerank=1 << 30),
}
"""MCA with other numbers of ads handed on, which are no part of its training. Without pre-ranking the auction sees every bid that recall leaves: more than a
pre-ranking that reads bids could hand on."""


def _kinds(place: Market) -> dict[str, RankingModel]:
    """MCA, FS-LTR (which goes on from MCA's stages) and EGA-V1 on the same samples."""
    model = place.config.model
    found = {"mca": place.train("mca", replace(model, kind="mca"))}
    found["fs_ltr"] = place.train("fs_ltr", replace(model, kind="fs_ltr"), shared="mca")
    found["ega_v1"] = place.train("ega_v1", replace(model, kind="ega_v1"))
    return found


def _other_cascades(place: Market) -> Iterator[pd.DataFrame]:
    """Pages at critical prices of the trained MCA with the numbers of CASCADES, under their names."""
    from model.training.run import load_stage

    mca = replace(place.config.model, kind="mca")
    for name, change in CASCADES.items():
        say(f"seed {place.seed}: replay of {name}")
        network = load_stage("evaluation", place.samples, replace(mca, cascade=change(mca.cascade)), place.folder / "mca" / "stages", place.seed)
        pages = place.replay(network).pages
        yield pages[pages["policy"] == "mca/critical"].assign(policy=name)


def compare_kinds(place: Market) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """One seed of table 1: a row a model, and EGA-V1's paired differences to both cascades and to CASCADES.

    GSP at its lowest envy-free equilibrium charges the VCG prices of the same ranking (Edelman et al. 2007; Varian 2007): policy `<kind>/vcg`.
    """
    from marketplace import schema
    from marketplace.oracle import shares
    from marketplace.truth import paired_lift
    from model.evaluation.gates import choose_price_mode
    from model.training.stages import newest, sampled_scores

    networks = _kinds(place)
    replays: dict[str, Replay] = {}
    for kind, network in networks.items():
        say(f"seed {place.seed}: replay of {kind}")
        replays[kind] = place.replay(network)
    mode = choose_price_mode(replays["ega_v1"].metrics, place.config.gates)
    published = {"mca": "mca/gsp", "fs_ltr": "fs_ltr/gsp", "ega_v1": f"ega_v1/{mode}"}
    wanted = {*published.values(), *(f"{kind}/{rule}" for kind in networks for rule in ("critical", "vcg"))}
    pages = pd.concat([found.pages[found.pages["policy"].isin(wanted)] for found in replays.values()], ignore_index=True)
    scored = place.truth(pd.concat([pages, *_other_cascades(place)], ignore_index=True))
    judged = refereed(place, networks["ega_v1"], pages)
    limit = shares(scored, scored["request_id"].unique(), place.limits(scored), "mca/critical")["policies"]
    means = scored.groupby("policy")[["clicks", "revenue"]].mean()
    rows, k = {}, place.config.evaluation.recall_at
    for kind, policy in published.items():
        metrics, equal = replays[kind].metrics, f"{kind}/critical"
        psi = metrics["psi"][policy.split("/")[1]]
        rows[kind] = {
            "recall": metrics["ranking"][f"recall_at_{k}"], "auc": metrics["ranking"]["auc"], "ectr": float(judged.loc[policy, "ectr"]), "erpm": float(judged.loc[policy, "erpm"]),
            "true_ectr": 100 * float(means.loc[policy, "clicks"]), "true_erpm": 1000 * float(means.loc[policy, "revenue"]),
            "true_erpm_equilibrium": 1000 * float(means.loc[f"{kind}/vcg", "revenue"]),
            "true_erpm_critical": 1000 * float(means.loc[equal, "revenue"]), "welfare_of_limit": 100 * limit[equal]["welfare_of_limit"],
            "gap_closed": 100 * limit[equal]["gap_closed"], "psi": 100 * psi["psi_paper"], "psi_exact": 100 * psi["psi_exact_model"],
        }  # fmt: skip
    test = newest(place.samples.split_rows(schema.TEST), place.config.evaluation.requests)
    sampled = {kind: sampled_scores(network, place.samples, test, 128) for kind, network in networks.items()}
    lifts: dict[str, dict[str, float]] = {}
    for rival in ("mca", "fs_ltr"):
        mine, theirs = sampled["ega_v1"], sampled[rival]
        lifts[f"Recall@{k} over {NAMES[rival]}"] = paired_recall(replays["ega_v1"].recall, replays[rival].recall)
        lifts[f"AUC over {NAMES[rival]}"] = paired_auc(mine[2], mine[0], theirs[0], mine[4])
        lifts[f"true eRPM over {NAMES[rival]}, both critical"] = paired_lift(scored, f"{rival}/critical", "ega_v1/critical")
        lifts[f"true eRPM over {NAMES[rival]}, as published"] = paired_lift(scored, published[rival], published["ega_v1"])
        lifts[f"true eRPM as published over {NAMES[rival]} with GSP at equilibrium"] = paired_lift(scored, f"{rival}/vcg", published["ega_v1"])
        lifts[f"true welfare over {NAMES[rival]}"] = paired_lift(scored, f"{rival}/critical", "ega_v1/critical", "welfare")
    for name in CASCADES:
        lifts[f"true eRPM over {name}, both critical"] = paired_lift(scored, name, "ega_v1/critical")
        lifts[f"true welfare over {name}"] = paired_lift(scored, name, "ega_v1/critical", "welfare")
    return rows, lifts


def _kinds_of_seed(path: Path, data: Path | None, seed: int) -> dict[str, Any]:
    with market(path, seed, data) as place:
        rows, lifts = compare_kinds(place)
    return {"rows": rows, "lifts": lifts}


def table1(config: Path | None = None, data: Path | None = None, seeds: int = 5, quick: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """Table 1: MCA, FS-LTR and EGA-V1. The cascades charge GSP, as published, and critical prices for equal terms."""
    path, markets = _setting(config, seeds, quick)
    found, minutes = side_by_side(path, {f"seed {seed}": partial(_kinds_of_seed, path, data, seed) for seed in markets}, keep)
    per_seed, lifts = [each["rows"] for each in found], [each["lifts"] for each in found]
    summary = {kind: mean_and_deviation([rows[kind] for rows in per_seed]) for kind in NAMES}
    table = [{"model": NAMES[kind], **{COLUMNS[key]: _spread(value) for key, value in summary[kind].items()}} for kind in NAMES]
    differences = {name: pooled([each[name] for each in lifts]) for name in lifts[0]}
    return {
        **provenance(path, markets, minutes), "table": table, "summary": summary, "differences": differences,
        "second_table": [{"EGA-V1": name, "mean": value["lift"], "95 % interval, these markets": _range(value, "{:+.4f}"), "new markets": _range(value, "{:+.4f}", "markets_"), "least of a seed": value["least"]} for name, value in differences.items()],
        "per_seed": per_seed, "differences_per_seed": lifts, "paper": PAPER_TABLE1,
    }  # fmt: skip


COLUMNS = {
    "recall": "Recall@50", "auc": "AUC", "ectr": "eCTR %, evaluator", "erpm": "eRPM, evaluator", "true_ectr": "eCTR %, true", "true_erpm": "eRPM, true",
    "true_erpm_equilibrium": "eRPM, true, GSP at equilibrium", "true_erpm_critical": "eRPM, true, critical", "welfare_of_limit": "% of best welfare", "gap_closed": "% of gap closed", "psi": "psi %, paper's grid", "psi_exact": "psi %, exact",
}  # fmt: skip
"""Columns of the printed table. "true" is the market's truth; "critical" at critical prices for all; "GSP at equilibrium" at the VCG prices of the own
ranking, which are that equilibrium for a ranking by q*b and a yardstick for EGA-V1's; the gap is MCA's to the best pages."""


def _spread(value: dict[str, float]) -> str:
    return f"{value['mean']:.4g}" + (f" ± {value['sd']:.2g}" if np.isfinite(value["sd"]) else "")


def _setting(config: Path | None, seeds: int, quick: bool) -> tuple[Path, list[int]]:
    """Configuration and seeds of a table."""
    from pipelines.config import load_run_config

    path = config or (QUICK if quick else DEFAULT)
    return path, seeds_of(load_run_config(path).seed, 1 if quick else seeds)


ABLATIONS: dict[str, dict[str, Any]] = {"-gcf": {"gcf_on_ads": False}, "-mif": {"fusion": "din"}}
"""Table 2; -auf is the full model's own ranking by q*b."""


def _ablations(path: Path, data: Path | None, seed: int) -> dict[str, Any]:
    """One seed of table 2: a row a variant, and its true eRPM and welfare against the whole model's on the same requests."""
    from marketplace.truth import paired_lift

    with market(path, seed, data) as place:
        whole = place.train("ega_v1", replace(place.config.model, kind="ega_v1"), until="rlaf")
        pages, aucs = [], {}
        for name, change in {"ega_v1": {}, **ABLATIONS}.items():
            network = whole if name == "ega_v1" else place.train(name, replace(place.config.model, kind="ega_v1", **change), until="rlaf")
            found = place.replay(network)
            aucs[name] = found.metrics["ranking"]["auc"]
            for policy, label in (("ega_v1/critical", name), *([("separable/critical", "-auf")] if name == "ega_v1" else [])):
                pages.append(found.pages[found.pages["policy"] == policy].assign(policy=label))
        aucs["-auf"] = aucs["ega_v1"]
        every = pd.concat(pages, ignore_index=True)
        scored, judged = place.truth(every), refereed(place, whole, every)
    means = scored.groupby("policy")[["clicks", "revenue", "welfare"]].mean()
    names = ["ega_v1", *ABLATIONS, "-auf"]
    rows = {
        name: {"auc": aucs[name], "ectr": float(judged.loc[name, "ectr"]), "erpm": float(judged.loc[name, "erpm"]), "true_ectr": 100 * float(means.loc[name, "clicks"]), "true_erpm": 1000 * float(means.loc[name, "revenue"])}
        for name in names
    }  # fmt: skip
    return {"rows": rows, "lifts": {name: {f"true {title}": paired_lift(scored, "ega_v1", name, metric) for title, metric in (("eRPM", "revenue"), ("welfare", "welfare"))} for name in names[1:]}}


def table2(config: Path | None = None, data: Path | None = None, seeds: int = 5, quick: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """Table 2: EGA-V1 without cluster attention among ads, without mid-fusion, without AucFormer; critical prices for all."""
    path, markets = _setting(config, seeds, quick)
    found, minutes = side_by_side(path, {f"seed {seed}": partial(_ablations, path, data, seed) for seed in markets}, keep)
    per_seed, lifts = [each["rows"] for each in found], [each["lifts"] for each in found]
    summary = {name: mean_and_deviation([rows[name] for rows in per_seed]) for name in per_seed[0]}
    effects = {name: {measure: pooled([each[name][measure] for each in lifts]) for measure in measures} for name, measures in lifts[0].items()}
    against = {
        name: {column: text for measure, entry in measures.items() for column, text in ((f"{measure} against the whole", _lift(entry)), (f"{measure}, new markets", _percents(entry, "markets_")))}
        for name, measures in {"ega_v1": {}, **effects}.items()
    }
    columns = list(against["-auf"])
    table = [
        {"model": name, **{COLUMNS[key]: _spread(value) for key, value in values.items()}, **{column: against[name].get(column, "") for column in columns}}
        for name, values in summary.items()
    ]  # fmt: skip
    return {**provenance(path, markets, minutes), "table": table, "summary": summary, "differences": effects, "per_seed": per_seed, "differences_per_seed": lifts, "paper": PAPER_TABLE2}


PAPER_TABLE2 = {"ega_v1": {"erpm": 217.1, "ectr": 6.652}, "-gcf": {"erpm": 214.8, "ectr": 6.466}, "-mif": {"erpm": 212.5, "ectr": 6.389}, "-auf": {"erpm": 208.0, "ectr": 6.415}}
"""Paper, Table 2 (its printed percentages do not follow from its values)."""

TABLE3: dict[str, dict[str, Any]] = {
    "EGA-V1": {}, "-CA": {"context_attention": False}, "-TA": {"target_attention": False}, "-mif": {"fusion": "din"}, "late fusion": {"fusion": "late"}, "MCA": {"kind": "mca"},
}  # fmt: skip
TRUTHS = {"market's truth": True, "truth without substitutes": False}
"""Rows of table 3 that no model can pass by much: the market's own click probabilities, and the same as if no ad had substitutes in its city."""


def true_aucs(place: Market, rows: np.ndarray, substitutes: bool) -> dict[str, float]:
    """AUC of the market's click probabilities p on the candidates that `pretrain_metrics` judges models on: all of them, and the exposed ones, where p
    counts times the chance of reading so far. Without `substitutes` p is that of an ad alone in its city: the best that a model blind to other ads knows."""
    from marketplace.click_model import reading_probability
    from marketplace.worlds import World
    from model.evaluation.metrics import auc

    world, samples = place.world, place.samples
    if not substitutes:
        world = World(replace(world.config, clicks=replace(world.config.clicks, externality=0.0)), place.seed, world.state, world.base)
    candidate, ids, ads = np.asarray(samples.candidate)[rows], np.asarray(samples.request_id)[rows], np.asarray(samples.ad_id)
    mask, slots = candidate >= 0, samples.slots
    p = np.zeros(candidate.shape)
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        asked, column = np.unique(candidate[part][mask[part]], return_inverse=True)
        cell = np.nonzero(mask[part])
        p[part][cell] = world.truth(pd.DataFrame({"request_id": ids[part]}), ads[asked]).click_probability[cell[0], column]
    page = np.where(mask[:, :slots], ads[candidate[:, :slots]], -1)
    q = p[:, :slots] * reading_probability(world.page_truth(ids, page)[1])
    y, shown = np.asarray(samples.click)[rows], mask[:, :slots]
    return {"auc": auc(y[mask], p[mask]), "auc_exposed": auc(y[:, :slots][shown], q[shown])}


PAPER_TABLE3 = {
    "EGA-V1": (0.754, 0.005), "EGA-V1, no crosses": (0.751, 0.011), "-CA": (0.745, 0.036), "-TA": (0.743, 0.047), "-mif": (0.737, 0.048), "late fusion": (0.741, 0.037),
    "MCA": (0.741, 0.112), "MCA, no crosses": (0.733, 0.131),
}  # fmt: skip
"""Paper, Table 3: AUC and Dev."""


def _parts_removed(path: Path, data: Path | None, seed: int) -> dict[str, Any]:
    """One seed of table 3: AUC among sampled candidates, as in pre-training, and Dev among the whole city, as in serving."""
    import torch

    from marketplace import schema
    from model.evaluation.metrics import auc, calibration_bins, deviation
    from model.training.stages import encode_exposed, newest, sampled_scores

    variants = {name: {**change, "cross_features": True} for name, change in TABLE3.items()}
    variants |= {f"{name}, no crosses": {**TABLE3[name], "cross_features": False} for name in ("EGA-V1", "MCA")}
    rows: dict[str, Any] = {}
    with market(path, seed, data) as place:
        test = newest(place.samples.split_rows(schema.TEST), place.config.evaluation.calibration_requests)
        for name, change in variants.items():
            network = place.train(name, replace(place.config.model, **{"kind": "ega_v1", **change}), until="pretrain")
            q, placed, y, shown, _ = sampled_scores(network, place.samples, test, 128)
            served = encode_exposed(network, place.samples, test, whole_city=True)
            pctr, clicked = (value[served["mask"]].numpy(force=True) for value in (torch.sigmoid(served["click_logit"]), served["click"]))
            predicted, observed, _ = calibration_bins(clicked, pctr)
            rows[name] = {"auc": auc(y, q), "auc_exposed": auc(y[shown], placed[shown]), "dev": deviation(pctr, clicked), "clicks_over_predicted": (observed / predicted).tolist()}
        for name, substitutes in TRUTHS.items():
            rows[name] = {**true_aucs(place, test, substitutes), "dev": float("nan")}
    return rows


def table3(config: Path | None = None, data: Path | None = None, seeds: int = 5, quick: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """Table 3: AUC on sampled candidates and Dev of the set-aware pCTR among the whole city, with and without explicit crosses and with parts of MIF removed;
    below them the AUC of the market's truth, with and without what an ad's substitutes do to it."""
    path, markets = _setting(config, seeds, quick)
    per_seed, minutes = side_by_side(path, {f"seed {seed}": partial(_parts_removed, path, data, seed) for seed in markets}, keep)
    summary = {name: mean_and_deviation([rows[name] for rows in per_seed]) for name in per_seed[0]}
    table = [
        {"model": name, "AUC": _spread(values["auc"]), "AUC, exposed": _spread(values["auc_exposed"]), "Dev": "" if name in TRUTHS else _spread(values["dev"]), "paper: AUC, Dev": " ".join(map(str, PAPER_TABLE3.get(name, ())))}
        for name, values in summary.items()
    ]
    series = {name: np.mean([rows[name]["clicks_over_predicted"] for rows in per_seed], 0).tolist() for name in per_seed[0] if name not in TRUTHS}
    axes = ("tenth of the shown ads, by pCTR", "click rate / mean pCTR", [str(tenth) for tenth in range(1, 11)])
    return {**provenance(path, markets, minutes), "table": table, "summary": summary, "per_seed": per_seed, "series": series, "axes": axes}


def _scaled(path: Path, data: Path | None, seed: int, varied: str, blocks: int) -> dict[str, Any]:
    """One point of the scaling curve."""
    from marketplace import schema
    from model.training.stages import encode_city, newest, policy_metrics, pretrain_metrics

    with market(path, seed, data) as place:
        base = replace(place.config.model, kind="ega_v1")
        test = newest(place.samples.split_rows(schema.TEST), place.config.evaluation.requests)
        auc = value = float("nan")
        if varied == "m":
            model = replace(base, blocks=blocks, fusion_after=(max(1, blocks // 2), blocks) if blocks > 1 else (1,))
            auc = pretrain_metrics(place.train(f"m{blocks}", model, until="pretrain"), place.samples, test, 128)["auc"]
        else:
            model = replace(base, auction_blocks=blocks)
            network = place.train(f"e{blocks}", model, until="rlaf")
            value = policy_metrics(network, encode_city(network, place.samples, test, 1 << 30, 0))["generator_evaluation"]
        return {"seed": seed, "varied": varied, "blocks": blocks, "GFLOP a request": gigaflops(model, place), "AUC": auc, "value per request": value}


def scaling(config: Path | None = None, data: Path | None = None, seeds: int = 1, quick: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """Fig. 5: AUC against the blocks m of RecFormer, and bid-weighted clicks (evaluation evaluator) against the blocks m_e of AucFormer."""
    path, markets = _setting(config, seeds, quick)
    depths = {"m": (1, 2), "m_e": (1, 2)} if quick else {"m": (1, 2, 3, 4), "m_e": (1, 2, 3)}
    points = [(seed, varied, blocks) for varied, many in depths.items() for blocks in many for seed in markets]
    found, minutes = side_by_side(path, {f"seed {seed}, {varied} {blocks}": partial(_scaled, path, data, seed, varied, blocks) for seed, varied, blocks in points}, keep)
    rows = pd.DataFrame(found)
    table = [
        {"varied": varied, "blocks": int(blocks), "GFLOP a request": float(group["GFLOP a request"].mean()),
         **{name: _spread({"mean": group[name].mean(), "sd": group[name].std()}) if group[name].notna().all() else "" for name in ("AUC", "value per request")}}
        for (varied, blocks), group in rows.groupby(["varied", "blocks"], sort=False)
    ]  # fmt: skip
    first = rows[rows["blocks"] == 1].set_index(["seed", "varied"])
    series = {}
    for varied, measure in (("m", "AUC"), ("m_e", "value per request")):
        gain = rows[rows["varied"] == varied].apply(lambda row, measure=measure: 100 * (row[measure] / first.loc[(row["seed"], row["varied"]), measure] - 1), axis=1)
        series[f"{measure} over {varied}"] = gain.groupby(rows["blocks"]).mean().tolist()
    axes = ("blocks", "% over one block", [str(blocks) for blocks in sorted(rows["blocks"].unique())])
    return {**provenance(path, markets, minutes), "table": table, "per_seed": found, "series": series, "axes": axes}


def gigaflops(model: NetworkConfig, place: Market) -> float:
    """Cost of one request over the largest city of the samples."""
    from benchmarks.flops import count

    ads = int(np.bincount(np.asarray(place.samples.ad_city)).max())
    return count(model, ads, int(place.samples.behaviours.shape[1]))["whole request"] / 1e9


def _synthetic(**change: Any) -> Callable[[RunConfig], RunConfig]:
    """A knob of the synthetic city."""
    return lambda config: replace(config, world=replace(config.world, synthetic=replace(config.world.synthetic, **change)))


def _clicks(**change: Any) -> Callable[[RunConfig], RunConfig]:
    """A knob of the click model."""
    return lambda config: replace(config, world=replace(config.world, clicks=replace(config.world.clicks, **change)))


def _towers(share: float) -> Callable[[RunConfig], RunConfig]:
    """A knob of the cascade: recall and pre-ranking trained for a share of their steps."""

    def change(config: RunConfig) -> RunConfig:
        towers = {part: replace(getattr(config.training, part), steps=round(share * getattr(config.training, part).steps)) for part in ("recall", "prerank")}
        return replace(config, training=replace(config.training, **towers))

    return change


KNOBS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "as configured": lambda config: config,
    "recall and pre-ranking trained a quarter as long": _towers(0.25),
    "value spread 0.5": _synthetic(value_spread=0.5),
    "value spread 1.2": _synthetic(value_spread=1.2),
    "satisfaction spread 0: every ad ends the reading alike": _clicks(satisfaction_spread=0.0),
    "no externality of the candidate set": _clicks(externality=0.0),
}
"""What the headline may rest on: how good the cascade's towers are, how values differ, how ads change the worth of the slots below, what set-aware
modelling can see. What the narrow stages throw away is in table 1 (CASCADES)."""


def _under(path: Path, knob: str, seed: int) -> dict[str, dict[str, float]]:
    """EGA-V1 over MCA under one knob and seed."""
    from marketplace.truth import paired_lift

    with market(path, seed, None, KNOBS[knob]) as place:
        pages = []
        for kind, until in (("mca", "pretrain"), ("ega_v1", "rlaf")):
            found = place.replay(place.train(kind, replace(place.config.model, kind=kind), until=until)).pages
            pages.append(found[found["policy"] == f"{kind}/critical"])
        scored = place.truth(pd.concat(pages, ignore_index=True))
    return {f"true {metric}": paired_lift(scored, "mca/critical", "ega_v1/critical", metric) for metric in ("revenue", "welfare")}


def sensitivity(config: Path | None = None, seeds: int = 1, quick: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """The headline, EGA-V1 over MCA at critical prices in truth, under other knobs of the market and of the towers' training."""
    path, markets = _setting(config, seeds, quick)
    knobs = list(KNOBS)[:1] if quick else list(KNOBS)
    found, minutes = side_by_side(path, {f"knob {number}, seed {seed}": partial(_under, path, knob, seed) for number, knob in enumerate(knobs) for seed in markets}, keep)
    per_knob = {knob: found[number * len(markets) : (number + 1) * len(markets)] for number, knob in enumerate(knobs)}
    lifts = {knob: {metric: pooled([each[metric] for each in seeds_found]) for metric in seeds_found[0]} for knob, seeds_found in per_knob.items()}
    table = [{"market": name, **{metric: _lift(entry) for metric, entry in each.items()}} for name, each in lifts.items()]
    return {**provenance(path, markets, minutes), "table": table, "differences": lifts}


def _lift(entry: dict[str, float]) -> str:
    return f"{100 * entry['lift']:+.1f} % ({_percents(entry)})"


def _percents(entry: dict[str, float], of: str = "") -> str:
    return _range({key: 100 * value for key, value in entry.items()}, "{:+.1f}", of)


def _range(entry: dict[str, float], form: str, of: str = "") -> str:
    low, high = entry[f"{of}low"], entry[f"{of}high"]
    return f"{form} to {form}".format(low, high) if np.isfinite(low) else "–"


Table = Callable[..., dict[str, Any]]
TABLES: dict[str, Table] = {"table1": table1, "table2": table2, "table3": table3, "scaling": scaling, "sensitivity": sensitivity}
