"""What the evaluation and publishing steps call: the rooms below brought together, plain functions on folders."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from model.bundle import BundleError, load_bundle, signing_key, verify_bundle
from model.ega_v1.network import NetworkConfig
from model.evaluation.evaluate import bundle_candidate, evaluate_candidate, finite_only
from model.evaluation.gates import GateConfig
from model.evaluation.plots import calibration_svg, lies_svg, number, page, price_scatter_svg, roc_curve, roc_svg, table
from model.evaluation.replay import SEPARABLE, EvaluationConfig, Incumbent
from model.training.stages import TrainingConfig


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class CandidateConfig:
    """What judging a candidate needs to know."""

    model: NetworkConfig = Field(default_factory=NetworkConfig)
    """Kind, sizes and switches."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """How it was trained."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """How it is replayed."""
    gates: GateConfig = Field(default_factory=GateConfig)
    """Thresholds."""


def find_incumbent(home: Path, key: bytes, kind: str) -> Incumbent | None:
    """The newest approved model of a home, or None when nothing was approved yet. A damaged store raises, and so does a live model whose pages
    cannot be compared offline with those of a candidate of `kind`: EGA (V2) places ads among organic results, the others do not."""
    from serving.store import find_live_model

    approved = find_live_model(home, key)
    if approved is None:
        return None
    bundle = load_bundle(approved.folder, key)
    live = bundle.network.config.kind
    if (live == "ega_v2") != (kind == "ega_v2"):
        raise ValueError(f"the live model {approved.version} of {home} is of kind {live}, the candidate of kind {kind}: replay cannot compare their pages. Give the configuration a name of its own, and compare the two by `ega ab`")
    return Incumbent(bundle.network, bundle.vocabulary["tables"], approved.price_mode, approved.version)


def judge_candidate(samples: Path, logs: Path, run_dir: Path, home: Path, config: str, seed: int, weights: str, code_version: str) -> dict[str, Any]:
    """Replay, bundle, sign. Returns the metrics with `approved` and `reason`; a rejected candidate gets its record too."""
    from serving.store import write_gate_record

    parsed = TypeAdapter(CandidateConfig).validate_json(config)
    key = signing_key(home.parent, create=True)
    # A resumed run may find its own model approved already: it must not become its own incumbent.
    verdict_path = run_dir / "gate.json"
    incumbent = find_incumbent(home, key, parsed.model.kind)
    if incumbent is not None and incumbent.version == weights[:12]:
        incumbent = None
    metrics = evaluate_candidate(
        samples, run_dir / "stages", parsed.model, parsed.training, parsed.evaluation, parsed.gates, run_dir / "evaluation", seed, incumbent
    )
    counting_baselines(logs, samples, run_dir, parsed, seed, min(1000, parsed.evaluation.requests))
    info = json.loads((samples / "samples.json").read_text())
    provenance = {"run": run_dir.name, "data_hash": info["data_hash"], "code_version": code_version, "seed": seed}
    version = bundle_candidate(samples, run_dir / "stages", parsed.model, metrics, provenance, run_dir / "bundle", seed, key)
    if version != weights[:12]:
        raise BundleError(f"the evaluated weights {version} are not the trained ones {weights[:12]}")
    gates = {gate["name"]: {name: value for name, value in gate.items() if name != "name"} for gate in metrics["gates"]}
    write_gate_record(verdict_path, run_dir / "bundle", gates, key, metrics["price_mode"])
    failed = [gate["reason"] for gate in metrics["gates"] if not gate["approved"]]
    reason = "; ".join(failed) if failed else "; ".join(gate["reason"] for gate in metrics["gates"])
    return {**metrics, "version": version, "reason": reason}


def counting_baselines(logs: Path, samples_folder: Path, run_dir: Path, config: CandidateConfig, seed: int, most: int = 1000) -> list[dict[str, Any]]:
    """AUC on sampled candidates and Recall@k over the whole city, of the model and of counting baselines (EVALUATION.md, next-poi).

    For validation and test days, at most `most` newest requests each. Counting scores use all behaviours before a request, not only the
    L that the model reads, and ties go by popularity: the strongest form of each baseline. Writes <run_dir>/evaluation/baselines.json.
    """
    from marketplace.counting import SCORERS, popularity
    from marketplace.logs import read_table
    from marketplace.schema import TEST, VALIDATION
    from model.bundle import write_atomic
    from model.evaluation.metrics import auc, mean_and_interval, recall_at
    from model.evaluation.replay import positions_of
    from model.training.data import Samples
    from model.training.run import load_final
    from model.training.stages import newest

    samples = Samples(samples_folder, config.training.device)
    network = load_final(samples, config.model, run_dir / "stages", seed)
    behaviours, requests = read_table(logs, "behaviours"), read_table(logs, "requests").set_index("request_id", drop=False)
    ads = read_table(logs, "ads").drop_duplicates("ad_id").set_index("ad_id")
    pois = ads.loc[np.asarray(samples.ad_id), "poi_id"].to_numpy()
    k = config.evaluation.recall_at
    table: list[dict[str, Any]] = []
    for split, name in ((VALIDATION, "validation"), (TEST, "test")):
        rows = np.sort(newest(samples.split_rows(split), most))
        asked = requests.loc[np.asarray(samples.request_id[rows])]
        crowd = np.asarray(popularity(behaviours, asked, pois), np.float64)
        scores = {label: scorer(behaviours, asked, pois) + (1e-6 * crowd / (crowd.max() + 1) if label != "popularity" else 0) for label, scorer in SCORERS.items()}
        model = _city_scores(network, samples, rows, config.evaluation)
        candidate = np.asarray(samples.candidate[rows])
        active = np.stack([np.isfinite(samples.bid[d]) & (np.asarray(samples.ad_city) == c) for d, c in zip(samples.day[rows], samples.city_code[rows], strict=True)])
        clicks, users = np.asarray(samples.click[rows]), np.asarray(samples.user_id[rows])
        for label, score in {**scores, config.model.kind: model}.items():
            inside = candidate >= 0
            picked = np.take_along_axis(score, np.maximum(candidate, 0), 1)
            recalls = recall_at(np.where(active, score, -np.inf), [positions_of(np.arange(len(pois)), np.asarray(t)) for t in samples.target[rows]], k)
            kept = np.isfinite(recalls)
            mean, low, high = mean_and_interval(recalls[kept], users[kept]) if kept.any() else (float("nan"),) * 3
            table.append({"split": name, "model": label, "auc": auc(clicks[inside], picked[inside]), "recall": mean, "recall_interval": [low, high], "k": k})
    write_atomic(run_dir / "evaluation" / "baselines.json", json.dumps(finite_only(table), indent=1).encode())
    return table


def _city_scores(network: Any, samples: Any, rows: np.ndarray, config: EvaluationConfig) -> np.ndarray:
    """[R, A] what the model ranks ads by: q of every ad; of EGA (V2) log P(POI | S)."""
    import torch

    from model.evaluation.replay import pools_of

    if network.config.kind == "ega_v2":
        from model.ega_v2.data import PageData
        from model.ega_v2.replay import city_scores

        return city_scores(PageData(samples, network), rows)
    scores = np.full((len(rows), len(samples.ad_id)), -1.0)
    for pool in pools_of(network, samples, rows, config):
        at = np.searchsorted(rows, pool.requests)[:, None]
        real = pool.ad_rows >= 0
        scores[np.broadcast_to(at, real.shape)[real], pool.ad_rows[real]] = torch.sigmoid(pool.click).numpy(force=True)[real]
    return scores


def flat_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures a pipeline UI shows; values that could not be measured are left out."""
    mode = metrics["price_mode"]
    policy = f"{metrics['policy']}/{mode}"
    flat = {name: metrics["ranking"][name] for name in ("auc", "auc_exposed", "auc_evaluator", "dev")}
    flat |= {name: value for name, value in metrics["ranking"].items() if name.startswith("recall_at") and not name.endswith("interval")}
    flat |= {"ectr_percent": metrics["policies"][policy]["ectr_percent"], "erpm": metrics["policies"][policy]["erpm"]}
    flat |= {name: metrics["psi"][mode][name] for name in ("psi_exact_model", "psi_exact", "psi_loser")}
    return {name: float(value) for name, value in flat.items() if value is not None and np.isfinite(value)}


def _plots(run_dir: Path) -> dict[str, np.ndarray]:
    return {path.stem[5:]: np.load(path, allow_pickle=False) for path in sorted((run_dir / "evaluation").glob("plot_*.npy"))}


def roc_points(run_dir: Path, points: int = 100) -> tuple[list[float], list[float], list[float]]:
    """(fpr, tpr, thresholds) for KFP's ROC, thinned; thresholds finite."""
    data = _plots(run_dir)
    fpr, tpr, threshold = roc_curve(data["exposed_click"], data["exposed_pctr"])
    pick = np.unique(np.linspace(0, len(fpr) - 1, points).astype(int))
    return fpr[pick].tolist(), tpr[pick].tolist(), threshold[pick].tolist()


PSI = ("psi_exact", "psi_loser", "psi_paper")
PSI_NOTE = "<p>What ads could gain by lying about their bid, over the utility of the displayed ads; the page is generated again for every lie.</p>"


OFF_POLICY_NOTE = (
    "<p>What the candidate's pages would have earned on the same requests, estimated from what readers did on the logged pages, which are the result "
    "of exploration with known propensities. The forecasts need no log but trust a model; the estimates trust the log and one assumption: that a click depends "
    "on the ads down to its slot (cascade) or on its own ad and slot alone (slot). A mean weight below 1 says which part of the candidate's pages the logging policy "
    "could not have shown: of that part nothing was observed, and a doubly robust figure is then the forecast again. A small effective sample says that the "
    "interval is wide because few logged pages agree.</p>"
)


NO_OFF_POLICY = (
    "<p>None: the logging policy chose neither places among organic results nor creatives, so its logs cannot say what the candidate's choices would have earned.</p>"
)


def off_policy_rows(metrics: dict[str, Any], truth: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """One row a policy, measure and source: what to believe where there is no simulator, and the truth beside it where there is one."""
    table, mode = metrics["off_policy"], metrics["price_mode"]
    measures = (("ectr_percent", "eCTR %", "ectr_per_request", 100.0), ("erpm", "eRPM", "erpm_per_1000_requests", 1.0))
    rows: list[tuple[Any, ...]] = [("logged", label, "counted in the log", table["logged"][name][0], _span(table["logged"][name]), "", "") for name, label, _, _ in measures]
    for policy in (name for name in (f"{metrics['policy']}/{mode}", f"{SEPARABLE}/critical") if name in table["policies"]):  # the cascades have one ranking
        entry = table["policies"][policy]
        for name, label, true_name, scale in measures:
            rows.append((policy, label, "forecast of the evaluator it was trained on", entry[name]["reward_model"], "", "", ""))
            rows.append((policy, label, "forecast of the evaluation evaluator", entry[name]["cascade"]["direct"][0], _span(entry[name]["cascade"]["direct"]), "", ""))
            for structure in ("cascade", "slot"):
                found = entry[name][structure]
                support = f"{number(found['mean_weight'][0][0])} to {number(found['mean_weight'][-1][0])}"
                sample = f"{number(found['effective_sample_size'][0])} to {number(found['effective_sample_size'][-1])}"
                for key, title in OFF_POLICY_NAMES.items():
                    rows.append((policy, label, f"{title}, {structure}", found[key][0], _span(found[key]), support, sample))
            if truth:
                value = truth["policies"][policy][true_name]
                rows.append((policy, label, "TRUTH of the market", scale * value["mean"], _span([scale * value[x] for x in ("mean", "low", "high")]), "", ""))
    return rows


OFF_POLICY_NAMES = {
    "ips": "inverse propensity", "clipped": "self-normalised, clipped", "dr": "doubly robust", "dr_clipped": "doubly robust, clipped",
}  # fmt: skip


def _span(estimate: list[float | None]) -> str:
    low, high = estimate[1:]
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def candidate_sections(run_dir: Path, truth: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """(heading, HTML) pieces about a judged candidate: gates, what moved (also in the market's truth, where there is one),
    policies, prices, calibration, ROC."""
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    data = _plots(run_dir)
    mode = metrics["price_mode"]
    gates = [(g["name"].replace("_", " "), "approved" if g["approved"] else "rejected", g["reason"]) for g in metrics["gates"]]
    moved = [(m["stage"], m["what"], m["where"], m["before"], m["after"], "yes" if m["improved"] else "no") for m in metrics["moved"]]
    for rule in ("critical", "gsp") if truth and SEPARABLE + "/gsp" in metrics["policies"] else ():
        before, after = (truth["policies"][f"{policy}/{rule}"]["erpm_per_1000_requests"]["mean"] for policy in (SEPARABLE, metrics["policy"]))
        moved.append(("rlaf", f"TRUE eRPM at {rule} prices: q*b ranking (affinity zero), generator", "test, market truth", before, after, "yes" if after > before else "no"))
    policies = [
        (name, p["ectr_percent"], p["erpm"], f"{p['erpm_interval'][0]:.4g} to {p['erpm_interval'][1]:.4g}", p["bid_value_per_1000"])
        for name, p in metrics["policies"].items()
    ]
    psi = [
        (name, *(p[f"{kind}_model"] for kind in PSI), *(p[kind] for kind in PSI), "charged" if name == mode else "") for name, p in metrics["psi"].items()
    ]
    ranking = [(name.replace("_", " "), value) for name, value in metrics["ranking"].items() if not isinstance(value, list)]
    return [
        ("Gates", table(("gate", "verdict", "reason"), gates)),
        ("What each stage moved", table(("stage", "measure", "on", "before", "after", "improved"), moved)),
        ("Policies on the test days, by the evaluation evaluator", table(("policy / prices", "eCTR % per request", "eRPM per 1000 requests", "95 % interval", "bid value per 1000"), policies)),
        ("Off-policy check: what the log says of the candidate's pages", NO_OFF_POLICY if metrics["off_policy"] is None else OFF_POLICY_NOTE + table(("policy / prices", "measure", "source", "value", "95 % interval", "mean weight, first to last slot", "effective sample, requests"), off_policy_rows(metrics, truth))),
        ("Incentive compatibility", PSI_NOTE + table(("prices", *(f"{kind}, {judge}" for judge in ("pricing evaluator", "evaluation evaluator") for kind in ("displayed", "losers", "paper's grid")), ""), psi)),
        ("Gain from lying against the own bid: four displayed ads", lies_svg(data, mode) if len(data["lie_ad"]) else "<p>no ad was displayed</p>"),
        ("Ranking and calibration", table(("measure", "value"), ranking)),
        ("Calibration on exposed test ads", calibration_svg(data["exposed_click"], data["exposed_pctr"])),
        ("ROC on exposed test ads", roc_svg(data["exposed_click"], data["exposed_pctr"])),
        *([("Learned price against truthful price", price_scatter_svg(data["critical"], data["learned"]))] if "learned" in data else []),
    ]  # fmt: skip


def candidate_page(run_dir: Path) -> str:
    """The evaluation as one HTML page."""
    return page("Candidate on the test days", candidate_sections(run_dir))


def publish_embeddings(run_dir: Path, home: Path, tag: str) -> tuple[Path, int]:
    """Write the ad states of the run's bundle to the offline view `ad_embeddings`; returns the file and the number of ads."""
    import torch

    from features.store import publish_ad_embeddings
    from model.training.data import Samples

    key = signing_key(home.parent)
    manifest = verify_bundle(run_dir / "bundle", key)
    if tag.split(":")[-1] != manifest["version"]:
        raise BundleError(f"bundle {manifest['version']} in {run_dir} is not the approved {tag}")
    bundle, samples = load_bundle(run_dir / "bundle", key), Samples(run_dir / "samples")
    active = np.isfinite(samples.bid[-1])
    when = datetime.fromtimestamp(int(np.max(samples.time)), UTC)
    if bundle.network.config.kind == "ega_v2":
        from model.ega_v2.data import PageData

        with torch.inference_mode():
            place = torch.from_numpy(np.asarray(samples.ad_place_row)[active].astype(np.int64))
            embedding = bundle.network.core.poi_codes.item(PageData(samples, bundle.network).place_codes[place]).numpy()
        return publish_ad_embeddings(home, np.asarray(samples.ad_id)[active], embedding, manifest["version"], when), int(active.sum())
    fields = torch.from_numpy(np.array(samples.ad_fields)).long()
    states = np.zeros((len(fields), bundle.network.state_width), np.float32)
    with torch.inference_mode():
        for city in np.unique(samples.city_code):
            rows = np.flatnonzero((np.asarray(samples.ad_city) == city) & active)
            if len(rows):
                states[rows] = bundle.network.city_states(fields[rows].unsqueeze(0), torch.ones(1, len(rows), dtype=torch.bool))[0].numpy()
    return publish_ad_embeddings(home, np.asarray(samples.ad_id)[active], states[active], manifest["version"], when), int(active.sum())
