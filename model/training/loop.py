"""The training loop that all stages share: schedule, validation, early stopping, checkpoints, progress.

A stage's result is a function of its config, data and starting weights alone: batches come from (seed, epoch), noise from a
generator that is saved with the checkpoint, and nothing depends on the clock. Killed and resumed, it gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor
from tqdm import tqdm

from model.bundle import sha256_of, state_bytes
from model.training.checkpoint import load_checkpoint, load_optimiser, optimiser_tensors, save_checkpoint, stage_lock
from model.training.data import epoch_order

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@config_dataclass(frozen=True, config=_STRICT)
class LoopConfig:
    """What every stage has: optimiser, length, validation."""

    steps: int = Field(1000, ge=0)
    """Most optimiser steps."""
    batch: int = Field(128, ge=1)
    """Requests a step (over all processes)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam's peak rate (paper 1e-3)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    warmup: int = Field(50, ge=0)
    """Steps of linear warm-up; afterwards the rate falls along a cosine to a tenth."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    validate_every: int = Field(100, ge=1)
    """Steps between validations; a checkpoint follows each."""
    patience: int = Field(4, ge=1)
    """Validations without a better score before the stage stops early."""
    requests: int = Field(0, ge=0)
    """Training requests used, newest first; 0: all."""
    validation_requests: int = Field(2000, ge=1)
    """Validation requests used."""
    seed: int = 1
    """Seed of order, initialisation and noise of this stage."""


@dataclass(frozen=True)
class Device:
    """Where and how to compute."""

    name: str = "cpu"
    threads: int = 2
    """CPU threads; part of the result: one and two threads round differently."""

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast on a GPU, plain float32 on CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.name.startswith("cuda") else nullcontext()

    def require(self, kind: str) -> None:
        """Raises ValueError where there is no such device, or models of this kind cannot train on it."""
        if kind == "ega_v2" and self.name != "cpu":
            raise ValueError(f"training.device is {self.name}, but model.kind ega_v2 trains on the CPU only; set it to cpu")
        if not self.name.startswith("cuda"):
            return
        if _several():
            raise ValueError(f"training.device is {self.name}, but several processes train together on CPUs only; start one process, or set it to cpu")
        count = torch.cuda.device_count()
        if (torch.device(self.name).index or 0) >= count:
            raise ValueError(f"training.device is {self.name}, but PyTorch {torch.__version__} sees {count} GPUs here; set it to cpu, or train where there is one")

    def enter(self, kind: str) -> None:
        """Fix threads and deterministic kernels for this process."""
        self.require(kind)
        torch.set_num_threads(self.threads)
        if _several() and not dist.is_initialized():
            dist.init_process_group("gloo")
        if self.name.startswith("cuda"):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.cuda.set_device(torch.device(self.name).index or 0)  # autocast asks the current one
        torch.set_deterministic_debug_mode("error")  # the same as use_deterministic_algorithms without loading the compiler, which takes seconds
        torch.utils.deterministic.fill_uninitialized_memory = False  # guards against reading garbage; costs 8 % here


def _several() -> bool:
    """Under torchrun with more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: history of (step, loss, metrics), the best step and its score."""

    stage: str
    history: list[dict[str, Any]]
    best_step: int
    best_score: float
    steps: int
    parts: dict[str, StageResult] = field(default_factory=dict)
    """Of a stage that trains several networks, each by itself: how the others ended."""


StepFunction = Callable[[np.ndarray, torch.Generator], tuple[Tensor, dict[str, float]]]
ValidateFunction = Callable[[], dict[str, float]]


def run_stage(
    stage: str,
    network: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    config: LoopConfig,
    rows: np.ndarray,
    step_function: StepFunction,
    validate: ValidateFunction,
    folder: Path,
    fingerprint: dict[str, Any],
    device: Device,
    after_validation: Callable[[dict[str, float]], None] | None = None,
    extra_state: dict[str, Tensor] | None = None,
) -> StageResult:
    """Train `parameters` until `steps` or early stop and leave the best weights in `network`.

    `validate` returns metrics with `score` (higher is better). `extra_state` tensors (e.g. Lagrange multipliers) are
    changed in place by the step function and saved with the rest. `fingerprint` ties checkpoints to their inputs: a folder
    of another config, data or starting point is not resumed but refused.
    """
    if len(rows) == 0:
        raise ValueError(f"stage {stage}: no training requests; the logs need days with impressions before the validation days")
    with stage_lock(folder) if _rank() == 0 else nullcontext():
        _barrier()  # the first process holds the lock for all: whatever was written by a killed run lies still now
        start_sha = hashlib.sha256(state_bytes(network)).hexdigest()
        identity = hashlib.sha256(json.dumps({**fingerprint, "start": start_sha, "stage": stage}, sort_keys=True, default=str).encode()).hexdigest()
        optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        noise = torch.Generator().manual_seed(config.seed)
        extra_state = extra_state or {}
        state: dict[str, Any] = {"step": 0, "history": [], "best_step": -1, "best_score": -math.inf, "waited": 0, "done": False, "loss": []}
        best: dict[str, Tensor] = {}
        if (found := load_checkpoint(folder)) is not None:
            _, tensors, meta = found
            if meta["identity"] != identity:
                raise ValueError(f"stage {stage}: checkpoints in {folder} belong to another config, data or starting model; use a new run or delete the folder")
            state = meta["state"]
            network.load_state_dict({name[8:]: value for name, value in tensors.items() if name.startswith("network.")})
            best = {name[5:]: value for name, value in tensors.items() if name.startswith("best.")}
            load_optimiser(optimiser, tensors)
            noise.set_state(tensors["noise"])
            for name, value in extra_state.items():
                value.copy_(tensors[f"extra.{name}"])
        _barrier()  # all have read the checkpoint before the first process replaces it

        def save() -> None:
            tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
            tensors |= {f"best.{name}": value for name, value in best.items()}
            tensors |= {f"extra.{name}": value for name, value in extra_state.items()}
            save_checkpoint(folder, state["step"], {**tensors, **optimiser_tensors(optimiser), "noise": noise.get_state()}, {"identity": identity, "state": state})

        def judge(loss: float | None) -> None:
            network.eval()
            with torch.no_grad():
                metrics = validate()
            score = metrics["score"]
            state["history"].append({"step": state["step"], "loss": loss, **metrics})
            if math.isfinite(score) and score > state["best_score"]:
                state.update(best_score=score, best_step=state["step"], waited=0)
                best.clear()
                best.update({name: value.detach().cpu().clone() for name, value in network.state_dict().items()})
            else:
                state["waited"] += 1
            if after_validation is not None:
                after_validation(metrics)

        if not state["done"]:
            if not state["history"]:
                judge(None)
                if _rank() == 0:
                    save()
            quiet = {} if _rank() == 0 else {"disable": True}  # left out it is $TQDM_DISABLE's to say
            bar = tqdm(total=config.steps, initial=state["step"], desc=stage, unit="step", file=sys.stderr, mininterval=2.0, **quiet)
            while state["step"] < config.steps and state["waited"] < config.patience:
                _set_rate(optimiser, config, state["step"])
                network.train()
                loss, metrics = step_function(_batch_rows(rows, config, state["step"]), noise)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                _average_gradients(parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
                if not bool(torch.isfinite(norm)):
                    raise FloatingPointError(f"stage {stage}: gradient is not finite at step {state['step']} (loss {float(loss.detach())}); lower the learning rate")
                optimiser.step()
                _average_state([*network.buffers(), *extra_state.values()])
                state["step"] += 1
                state["loss"].append(float(loss.detach()))
                bar.update()
                bar.set_postfix({"loss": f"{state['loss'][-1]:.4f}", **{k: f"{v:.4f}" for k, v in metrics.items()}}, refresh=False)
                if state["step"] % config.validate_every == 0 or state["step"] == config.steps:
                    judge(float(np.mean(state["loss"])))
                    state["loss"] = []
                    bar.set_postfix({"loss": f"{state['history'][-1]['loss']:.4f}", "validation": f"{state['history'][-1]['score']:.4f}"})
                    if _rank() == 0:
                        save()
            bar.close()
            state["done"] = True
            if _rank() == 0:
                save()
        if not best:
            raise ValueError(f"stage {stage}: no validation gave a finite score; the validation days need pages with and without clicks: {state['history'][-1]}")
        network.load_state_dict(best)
        network.eval()
        return StageResult(stage, state["history"], state["best_step"], state["best_score"], state["step"])


def _batch_rows(rows: np.ndarray, config: LoopConfig, step: int) -> np.ndarray:
    """Rows of a step; with several processes each takes its share of the same global batch."""
    per_epoch = max(1, len(rows) // config.batch)
    epoch, position = divmod(step, per_epoch)
    chosen = epoch_order(rows, config.seed, epoch)[position * config.batch : (position + 1) * config.batch]
    return chosen[_rank() :: _world()]


def _set_rate(optimiser: torch.optim.Optimizer, config: LoopConfig, step: int) -> None:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    fade = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / max(1, config.steps)))
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate * warm * fade


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Data parallel: mean of the processes' gradients, in parameter order."""
    if _world() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= _world()


def _average_state(tensors: list[Tensor]) -> None:
    """Data parallel: running statistics and multipliers become the mean of the processes', so that all validate the same network."""
    if _world() > 1:
        for tensor in tensors:
            if tensor.is_floating_point():
                dist.all_reduce(tensor)
                tensor /= _world()


def _barrier() -> None:
    if _world() > 1:
        dist.barrier()


def file_identity(path: Path) -> str:
    """sha256 of a file, for fingerprints."""
    return sha256_of(path)
