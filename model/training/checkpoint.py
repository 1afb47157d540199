"""Atomic, hashed, resumable checkpoints: safetensors for tensors, JSON for numbers. Nothing is pickled.

`<folder>/step-<n>.safetensors` holds weights, optimiser moments and generator states; `<folder>/latest.json` names it with
its sha256 and all scalars. The pointer moves only after the file is on disk, so `latest.json` always names a whole file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from model.bundle import write_atomic

FAILPOINT = "EGA_FAILPOINT"
"""Environment variable naming a point at which the process kills itself; only the fault tests set it."""


def failpoint(name: str) -> None:
    """SIGKILL this process when EGA_FAILPOINT names this point (optionally `name@count`: at its count-th passage)."""
    wanted = os.environ.get(FAILPOINT, "")
    if not wanted:
        return
    point, _, count = wanted.partition("@")
    if point == name:
        _passages[name] = _passages.get(name, 0) + 1
        if _passages[name] >= int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


_passages: dict[str, int] = {}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says what to do."""


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write one checkpoint and move the pointer; older files are removed afterwards."""
    folder = Path(folder)
    data = save_tensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    name = f"step-{step:08d}.safetensors"
    failpoint("checkpoint.before")
    write_atomic(folder / name, data)
    failpoint("checkpoint.written")
    record = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "step": step, "meta": meta}
    write_atomic(folder / "latest.json", json.dumps({**record, "check": _check_of(record)}, indent=1).encode())
    failpoint("checkpoint.pointed")
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    for left_over in folder.glob(".*.part"):  # of a process that was killed while writing
        left_over.unlink(missing_ok=True)


def _check_of(record: dict[str, Any]) -> str:
    """sha256 of the pointer's own content: its scalars decide how training goes on, as the tensors do."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The latest checkpoint, or None when there is none."""
    folder = Path(folder)
    pointer = folder / "latest.json"
    if not pointer.exists():
        return None
    try:
        record = json.loads(pointer.read_text())
        whole = record.pop("check") == _check_of(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{pointer} is damaged; delete {folder} to train this stage anew")
    path = folder / record["file"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{pointer} names {record['file']}, which is missing; delete {folder} to train this stage anew") from None
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise CheckpointError(f"{path} is damaged (sha256 differs from latest.json); delete {folder} to train this stage anew")
    return record["step"], load_tensors(data), record["meta"]


@contextmanager
def stage_lock(folder: Path) -> Iterator[None]:
    """One writer a stage: a resumed run waits until an orphan of the killed one has ended. Freed by the system at exit."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is training in {folder}; waiting for it to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts of Adam as named tensors."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimiser_tensors`; learning rates come from the schedule, not from the checkpoint."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, entry = name.split(".", 2)
            state.setdefault(int(index), {})[entry] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
