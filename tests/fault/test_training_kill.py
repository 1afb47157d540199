"""Kill -9 in training (RELIABILITY T1): resumed stages end in the same bytes; no damaged checkpoint is ever used."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_tiny import CASCADE, NETWORK, TRAINING
from samples_fixture import tiny_samples

from model.bundle import sha256_of
from model.ega_v1.network import NetworkConfig
from model.kinds import STAGES as STAGES_OF
from model.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, stage_lock
from model.training.run import train_stage

SEED = 5
CASCADE_STAGES = STAGES_OF["fs_ltr"]
STAGES = STAGES_OF["ega_v1"]
POINTS = ("checkpoint.before", "checkpoint.written", "checkpoint.pointed")

# A server that has imported the model forks the processes to be killed: a fraction of a second each instead of a cold start.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["model.training.run"])


def network_of(stage: str) -> NetworkConfig:
    """A tiny configuration of a kind that has the stage."""
    return NETWORK if stage in STAGES else CASCADE


def train(stage: str, samples: Path, out: Path, checkpoints: Path, failpoint: str) -> None:
    """What a child runs."""
    os.environ["EGA_FAILPOINT"] = failpoint
    train_stage(stage, samples, network_of(stage), TRAINING, out, checkpoints, SEED)


def child(stage: str, samples: Path, out: Path, checkpoints: Path, failpoint: str = "") -> multiprocessing.process.BaseProcess:
    process = _PROCESSES.Process(target=train, args=(stage, samples, out, checkpoints, failpoint))
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """Samples, the uninterrupted stages, and the sha256 of every stage's weights."""
    root = tmp_path_factory.mktemp("whole")
    samples = tiny_samples(root / "samples", requests=160, ads=30, unexposed=8)
    digests = {}
    threads = torch.get_num_threads()
    for network, stages in ((CASCADE, CASCADE_STAGES), (NETWORK, STAGES)):  # stages of one name: the digest is EGA-V1's
        for stage in stages:
            digests[stage] = sha256_of(train_stage(stage, samples, network, TRAINING, root / network.kind, root / f"{network.kind}-checkpoints", SEED).weights)
    torch.set_num_threads(threads)
    return samples, root, digests


def started(stages: Path, stage: str, out: Path) -> Path:
    """A run folder in which everything before `stage` is done."""
    order, kind = (STAGES, NETWORK.kind) if stage in STAGES else (CASCADE_STAGES, CASCADE.kind)
    for before in order[: order.index(stage)]:
        shutil.copytree(stages / kind / before, out / before)
    return out


# Checkpoints are saved at steps 0, 4, 8 and at the end: passages 1 to 4 of every point.
KILLS = [("pretrain", f"{point}{count}") for point in POINTS for count in ("", "@2")]
KILLS += [("pretrain", "checkpoint.pointed@4"), ("reward", "checkpoint.written@2"), ("evaluation", "checkpoint.pointed@2"), ("rlaf", "checkpoint.pointed@2"), ("payment", "checkpoint.written@3")]
KILLS += [("recall", "checkpoint.pointed@2"), ("prerank", "checkpoint.written@2")]
KILLS += [("relabel", f"checkpoint.pointed@{count}") for count in (6, 10, 12)]
RELABELLED = ("recall", "prerank", "ranking")
"""Relabelling trains these in turn, four passages each, every one with checkpoints of its own."""


@pytest.mark.parametrize(("stage", "failpoint"), KILLS)
def test_killed_and_resumed_gives_the_same_bytes(whole: tuple[Path, Path, dict[str, str]], tmp_path: Path, stage: str, failpoint: str) -> None:
    samples, stages, digests = whole
    out = started(stages, stage, tmp_path / "stages")
    killed = child(stage, samples, out, tmp_path / "checkpoints", failpoint)
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert not (out / stage / "model.safetensors").exists()
    passage = int(failpoint.partition("@")[2] or 1)
    folder = tmp_path / "checkpoints" / stage / (RELABELLED[(passage - 1) // 4] if stage == "relabel" else "")
    found = load_checkpoint(folder)  # raises if what the pointer names is not whole
    assert (found is None) is (failpoint in ("checkpoint.before", "checkpoint.written"))
    if found is not None:
        assert found[0] < 8 or passage % 4 == 0
    weights = train_stage(stage, samples, network_of(stage), TRAINING, out, tmp_path / "checkpoints", SEED).weights
    assert sha256_of(weights) == digests[stage]
    assert (out / stage / "result.json").read_bytes() == (stages / network_of(stage).kind / stage / "result.json").read_bytes()  # the whole course
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "latest.json", "step-00000008.safetensors"]


def test_killed_at_a_random_moment(whole: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    """As soon as the first checkpoint lies there: anywhere between two saves."""
    samples, stages, digests = whole
    pointer = tmp_path / "checkpoints" / "pretrain" / "latest.json"
    running = child("pretrain", samples, tmp_path / "stages", tmp_path / "checkpoints")
    end = time.monotonic() + 60
    while not pointer.exists() and running.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    running.kill()
    running.join(60)
    assert running.exitcode == -signal.SIGKILL
    assert load_checkpoint(pointer.parent) is not None
    assert sha256_of(train_stage("pretrain", samples, NETWORK, TRAINING, tmp_path / "stages", tmp_path / "checkpoints", SEED).weights) == digests["pretrain"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "stage"
    save_checkpoint(folder, 3, {"a": torch.arange(60.0), "b": torch.zeros(2, 3, dtype=torch.uint8)}, {"identity": "x", "state": {"best_score": float("-inf"), "loss": [0.1]}})
    return folder


def test_checkpoint_round_trip(checkpoint: Path) -> None:
    found = load_checkpoint(checkpoint)
    assert found is not None
    step, tensors, meta = found
    assert step == 3 and torch.equal(tensors["a"], torch.arange(60.0)) and tensors["b"].dtype == torch.uint8
    assert meta == {"identity": "x", "state": {"best_score": float("-inf"), "loss": [0.1]}}
    assert load_checkpoint(checkpoint / "other") is None


@pytest.mark.parametrize("name", ["step-00000003.safetensors", "latest.json"])
def test_a_damaged_checkpoint_is_refused_wherever_it_is_damaged(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    data = path.read_bytes()
    before = load_checkpoint(checkpoint)
    assert before is not None
    used = 0
    for offset in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << (offset % 8)
        path.write_bytes(flipped)
        try:
            after = load_checkpoint(checkpoint)
        except CheckpointError as error:
            assert "to train this stage anew" in str(error)
        else:
            assert name == "latest.json" and after is not None and after[2] == before[2] and after[0] == before[0], offset  # white space
            used += 1
    assert used < 0.1 * len(data)
    for size in (0, 1, 8, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="to train this stage anew"):
            load_checkpoint(checkpoint)


def test_a_missing_checkpoint_is_refused(checkpoint: Path) -> None:
    (checkpoint / "step-00000003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="which is missing"):
        load_checkpoint(checkpoint)


def test_half_a_file_of_a_killed_writer_is_never_named_and_swept_up(checkpoint: Path) -> None:
    (checkpoint / ".step-00000009.safetensors.77.part").write_bytes(b"half")
    (checkpoint / "step-00000009.safetensors").write_bytes(b"whole, but never pointed at")
    found = load_checkpoint(checkpoint)
    assert found is not None and found[0] == 3
    save_checkpoint(checkpoint, 4, {"a": torch.zeros(1)}, {})
    assert sorted(path.name for path in checkpoint.iterdir()) == ["latest.json", "step-00000004.safetensors"]


@pytest.mark.parametrize("change", ["seed", "steps", "samples", "network"])
def test_checkpoints_of_another_run_are_not_resumed(whole: tuple[Path, Path, dict[str, str]], tmp_path: Path, change: str) -> None:
    samples, stages, digests = whole
    train_stage("pretrain", samples, NETWORK, TRAINING, tmp_path / "stages", tmp_path / "checkpoints", SEED)
    config = replace(TRAINING, pretrain=replace(TRAINING.pretrain, steps=6)) if change == "steps" else TRAINING
    network = replace(NETWORK, heads=4) if change == "network" else NETWORK
    if change == "samples":
        samples = tiny_samples(tmp_path / "samples", seed=9, requests=160, ads=30, unexposed=8)
        info = json.loads((samples / "samples.json").read_text())
        assert info["data_hash"] == "tiny-9"
    with pytest.raises(ValueError, match="belong to another config, data or starting model"):
        train_stage("pretrain", samples, network, config, tmp_path / "stages", tmp_path / "checkpoints", SEED + (change == "seed"))


def test_a_second_trainer_waits_for_the_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        with stage_lock(tmp_path):
            order.append("second")
            inside.set()

    with stage_lock(tmp_path):
        waiter = threading.Thread(target=second)
        waiter.start()
        assert not inside.wait(0.3)
        order.append("first")
    waiter.join(10)
    assert order == ["first", "second"]
    assert "another process is training in" in capfd.readouterr().out
