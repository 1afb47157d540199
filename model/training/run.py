"""One training stage from files to files: samples and the previous stage's weights in, weights and a history out.

Layout: `<out>/<stage>/model.safetensors` and `<out>/<stage>/result.json`; checkpoints under `<checkpoints>/<stage>/`. A finished
stage whose inputs did not change is not trained again, so a resumed run goes straight to where it was killed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter
from safetensors.torch import load as load_tensors

from marketplace import schema
from model.bundle import sha256_of, state_bytes, write_atomic
from model.ega_v1.network import NetworkConfig, RankingModel
from model.ega_v2.training import run_stage as run_v2
from model.kinds import STAGES, previous_stage
from model.training.cascade import rank_stage, train_relabel, train_tower
from model.training.data import Samples
from model.training.loop import Device, StageResult
from model.training.stages import TrainingConfig, build_network, pretrain, train_payment, train_reward, train_rlaf


@dataclass(frozen=True)
class StageFiles:
    """Where a finished stage lies."""

    weights: Path
    result: dict[str, Any]


def train_stage(
    stage: str, samples_folder: Path, network_config: NetworkConfig, config: TrainingConfig, out: Path, checkpoints: Path, seed: int
) -> StageFiles:
    """Train one stage or find it done; raises if the previous stage is missing."""
    previous = previous_stage(network_config.kind, stage)
    folder = Path(out) / stage
    fingerprint = stage_fingerprint(stage, samples_folder, network_config, config, out, seed)
    if (done := finished(folder, fingerprint)) is not None:
        return done
    where = Device(config.device, config.threads)
    where.enter(network_config.kind)
    samples = Samples(samples_folder, where.name)
    for split, name in ((schema.TRAIN, "training"), (schema.VALIDATION, "validation")):
        if len(samples.split_rows(split)) == 0:
            raise ValueError(f"stage {stage}: {samples_folder} has no {name} requests that showed an ad; log more days or move the split days")
    network = build_network(network_config, samples, seed).to(where.name)
    if previous is not None:
        network.load_state_dict(load_tensors((Path(out) / previous / "model.safetensors").read_bytes()))
    result = _run(stage, network, samples, config, Path(checkpoints) / stage, where, fingerprint)
    weights = state_bytes(network)
    record = {
        "stage": stage, "fingerprint": fingerprint, "sha256": hashlib.sha256(weights).hexdigest(), "best_step": result.best_step,
        "best_score": result.best_score, "steps": result.steps, "history": result.history,
        "parts": {name: {"best_step": part.best_step, "best_score": part.best_score, "steps": part.steps, "history": part.history} for name, part in result.parts.items()},
    }  # fmt: skip
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_atomic(folder / "model.safetensors", weights)
        write_atomic(folder / "result.json", json.dumps(record, indent=1).encode())
    if dist.is_initialized():
        dist.barrier()  # the next stage reads these files in every process
    return StageFiles(folder / "model.safetensors", record)


def stage_fingerprint(stage: str, samples_folder: Path, network_config: NetworkConfig, config: TrainingConfig, out: Path, seed: int) -> dict[str, Any]:
    """Everything the stage's weights depend on: samples, network, its own config, seed and the previous stage's weights."""
    before, previous = previous_stage(network_config.kind, stage), ""
    if before is not None:
        path = Path(out) / before / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"stage {stage} needs {path}; train {before} first")
        previous = sha256_of(path)
    return {
        "samples": sha256_of(Path(samples_folder) / "manifest.json") if (Path(samples_folder) / "manifest.json").exists() else sha256_of(Path(samples_folder) / "samples.json"),
        "network": TypeAdapter(NetworkConfig).dump_python(network_config, mode="json"),
        "config": json.loads(json.dumps(asdict(getattr(config.ega_v2 if network_config.kind == "ega_v2" else config, stage)))), "threads": config.threads, "seed": seed, "previous": previous,
        **({} if config.device == "cpu" else {"device": config.device}),
    }  # fmt: skip


def finished(folder: Path, fingerprint: dict[str, Any]) -> StageFiles | None:
    """The stage's files when they are whole and made from these very inputs."""
    result, weights = folder / "result.json", folder / "model.safetensors"
    if not (result.is_file() and weights.is_file()):
        return None
    try:
        record = json.loads(result.read_text())
        same = record["fingerprint"] == fingerprint and record["sha256"] == sha256_of(weights)
    except (ValueError, KeyError, TypeError):  # damaged: the last checkpoint gives the stage again
        return None
    return StageFiles(weights, record) if same else None


def load_stage(stage: str, samples: Samples, network_config: NetworkConfig, out: Path, seed: int) -> RankingModel:
    """The network as a finished stage left it, in evaluation mode, where the samples go."""
    network = build_network(network_config, samples, seed).to(samples.device)
    network.load_state_dict(load_tensors((Path(out) / stage / "model.safetensors").read_bytes()))
    return network.eval()


def load_final(samples: Samples, network_config: NetworkConfig, out: Path, seed: int) -> RankingModel:
    """The trained network: as its kind's last stage left it."""
    return load_stage(STAGES[network_config.kind][-1], samples, network_config, out, seed)


def _run(stage: str, network: RankingModel, samples: Samples, config: TrainingConfig, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    if network.config.kind == "ega_v2":
        return run_v2(stage, network, samples, config.ega_v2, folder, device, fingerprint)
    if stage in ("recall", "prerank"):
        return train_tower(network, samples, getattr(config, stage), stage, folder, device, fingerprint)
    if stage == "relabel":
        return train_relabel(network, samples, config.relabel, config.pretrain, folder, device, fingerprint)
    if stage == "pretrain" and network.config.kind != "ega_v1":
        return rank_stage(network, samples, config.pretrain, folder, device, fingerprint)
    if stage == "pretrain":
        return pretrain(network, samples, config.pretrain, folder, device, fingerprint)
    if stage in ("reward", "evaluation"):
        return train_reward(network, samples, getattr(config, stage), stage, folder, device, fingerprint)
    if stage == "rlaf":
        return train_rlaf(network, samples, config.rlaf, folder, device, fingerprint)
    return train_payment(network, samples, config.payment, folder, device, fingerprint)

