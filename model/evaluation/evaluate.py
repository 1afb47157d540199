"""Judge a trained candidate from files to files: replay, choice of the price mode, gates, bundle.

Writes under `<out>`: metrics.json, per_request.parquet, pages.parquet, plot_<name>.npy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.bundle import write_atomic, write_bundle
from model.ega_v1.network import NetworkConfig
from model.ega_v2.replay import replay_v2
from model.evaluation.gates import GateConfig, choose_price_mode, judge
from model.evaluation.replay import INCUMBENT, EvaluationConfig, Incumbent, replay
from model.kinds import STAGES
from model.training.data import Samples
from model.training.loop import Device
from model.training.run import load_final
from model.training.stages import TrainingConfig


def evaluate_candidate(
    samples_folder: Path, stages: Path, network_config: NetworkConfig, training: TrainingConfig, config: EvaluationConfig, gates: GateConfig,
    out: Path, seed: int, incumbent: Incumbent | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Replay the candidate of `stages` on the test days and judge it; returns (and writes) the metrics with the gates."""
    Device(training.device, training.threads).enter(network_config.kind)
    samples = Samples(samples_folder, training.device)
    network = load_final(samples, network_config, stages, seed)
    if incumbent is not None:
        incumbent.network.to(samples.device)
    result = (replay_v2 if network_config.kind == "ega_v2" else replay)(network, samples, config, incumbent)
    mode = choose_price_mode(result.metrics, gates)
    rival = "logged" if incumbent is None else INCUMBENT
    decisions = judge(result.metrics, result.per_request, mode, rival, gates)
    metrics = {
        **result.metrics, "price_mode": mode, "incumbent": rival if incumbent is None else incumbent.version,
        "gates": [asdict(gate) for gate in decisions], "approved": all(gate.approved is True for gate in decisions), "moved": what_moved(network_config.kind, stages, result.metrics),
    }  # fmt: skip
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, frame in (("per_request", result.per_request), ("pages", result.pages)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink, write_page_checksum=True)
        write_atomic(out / f"{name}.parquet", sink.getvalue().to_pybytes())
    for name, values in result.plots.items():
        np.save(out / f"plot_{name}.npy", values)
    write_atomic(out / "metrics.json", json.dumps(finite_only(metrics), indent=1, allow_nan=False).encode())
    return metrics


def what_moved(kind: str, stages: Path, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Before and after of every stage, for the report: what each stage was meant to move and what it did."""
    history = {stage: json.loads((Path(stages) / stage / "result.json").read_text()) for stage in STAGES[kind]}

    def row(stage: str, what: str, before: float, after: float, better: str, where: str) -> dict[str, Any]:
        good = after > before if better == "higher" else after < before
        return {"stage": stage, "what": what, "before": before, "after": after, "better": better, "improved": bool(good), "where": where}

    def on_validation(stage: str, what: str, key: str, better: str = "higher") -> dict[str, Any]:
        return row(stage, what, history[stage]["history"][0][key], _at_best(history[stage])[key], better, "validation")

    if kind == "ega_v2":
        return [
            on_validation("pretrain", "loss of a POI code (next-token prediction)", "ntp", "lower"), on_validation("pretrain", "loss of a creative code (multi-token prediction)", "mtp", "lower"),
            on_validation("reward", "AUC on exposed ads, reward model", "auc"), on_validation("rlaf", "bid-weighted clicks of the best page, reward model", "value"),
            on_validation("payment", "regret / utility of learned payments (psi)", "psi", "lower"),
        ]  # fmt: skip
    ranking, policies = metrics["ranking"], metrics["policies"]
    auc_rows = {stage: on_validation(stage, "AUC, exposed and unexposed", "auc") for stage in ("pretrain", "relabel") if stage in history}
    if kind != "ega_v1":

        def towers(stage: str | None, records: dict[str, Any]) -> Iterator[dict[str, Any]]:
            for part, name in (("recall", "SASRec"), ("prerank", "DSSM")):
                first, best = records[part]["history"][0], _at_best(records[part])
                key = next(key for key in first if key.startswith("recall_at_"))
                yield row(stage or part, f"{key.replace('recall_at_', 'Recall@')} of {name} alone, whole city", first[key], best[key], "higher", "validation")

        again = [*towers("relabel", history["relabel"]["parts"]), auc_rows["relabel"]] if kind == "fs_ltr" else []
        return [*towers(None, history), auc_rows["pretrain"], *again]
    return [
        auc_rows["pretrain"],
        row("reward", "AUC on exposed ads: set-aware pCTR, evaluator", ranking["auc_exposed"], ranking["auc_evaluator"], "higher", "test"),
        row("reward", "log-loss on exposed ads: set-aware pCTR, evaluator", ranking["log_loss_set"], ranking["log_loss_evaluator"], "lower", "test"),
        row("rlaf", "bid-weighted clicks per 1000 requests: q*b ranking, generator (evaluation evaluator)",
            policies["separable/critical"]["bid_value_per_1000"], policies["ega_v1/critical"]["bid_value_per_1000"], "higher", "test"),
        on_validation("payment", "regret / utility of learned payments (psi)", "psi", "lower"),
    ]  # fmt: skip


def _at_best(record: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in record["history"] if entry["step"] == record["best_step"])


def finite_only(value: Any) -> Any:
    """The same structure with None for NaN and infinity and plain numbers for NumPy's, for strict JSON."""
    if isinstance(value, dict):
        return {name: finite_only(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bundle_candidate(
    samples_folder: Path, stages: Path, network_config: NetworkConfig, metrics: dict[str, Any], provenance: dict[str, Any], out: Path, seed: int, key: bytes
) -> str:
    """Write the signed bundle of the final stage; returns its version."""
    samples = Samples(samples_folder)
    network = load_final(samples, network_config, stages, seed)
    gates = {"price_mode": metrics["price_mode"], "gates": finite_only(metrics["gates"])}
    return write_bundle(out, network, samples.vocabulary_document, gates, provenance, key)

