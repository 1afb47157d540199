"""Training and replay on another device than the CPU: nothing lies on the wrong one, and the same comes out."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from far_device import FAR, far_device
from model_tiny import CASCADE, NETWORK, TRAINING
from pydantic import ValidationError
from samples_fixture import learnable, tiny_samples

from benchmarks import tables
from benchmarks.pages import v2
from benchmarks.tables import QUICK, market
from cli.run import WRONG_CALL, run_command
from marketplace import schema
from model.ega_v1.network import NetworkConfig
from model.evaluation.evaluate import evaluate_candidate
from model.evaluation.gates import GateConfig
from model.evaluation.replay import EvaluationConfig, Incumbent
from model.kinds import STAGES
from model.training import loop, stages
from model.training.checkpoint import save_checkpoint
from model.training.data import Samples
from model.training.loop import Device
from model.training.run import stage_fingerprint, train_stage
from model.training.stages import TrainingConfig, build_network, encode_city
from pipelines.config import RunConfig

CONFIGURATIONS = {
    "ega_v1": replace(NETWORK, cross_features=True, auction_blocks=2), "clustered": replace(NETWORK, exact_behaviours=0, qkv_activation="none", fusion_after=(1,)), "fs_ltr": replace(CASCADE, cross_features=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnable(tiny_samples(tmp_path_factory.mktemp("device") / "samples", requests=240, ads=40))


def on(device: str) -> TrainingConfig:
    """TRAINING on a device, be it none that a configuration may name."""
    config = replace(TRAINING)
    object.__setattr__(config, "device", device)
    return config


def trained_and_replayed(samples: Path, model: NetworkConfig, device: str, root: Path) -> tuple[str, dict[str, list[float]], dict[str, Any]]:
    """sha256 of the final weights, the losses of every stage, and the metrics of the test days."""
    config = on(device)
    records = [train_stage(stage, samples, model, config, root / "stages", root / "checkpoints", seed=5).result for stage in STAGES[model.kind]]
    losses = {record["stage"]: [entry["loss"] for part in (record, *record["parts"].values()) for entry in part["history"][1:]] for record in records}
    metrics = evaluate_candidate(samples, root / "stages", model, config, EvaluationConfig(requests=40, batch=8, calibration_requests=50), GateConfig(), root / "evaluation", 5)
    return records[-1]["sha256"], losses, metrics


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_and_replay_far_from_the_cpu_give_what_the_cpu_gives(samples: Path, tmp_path: Path, name: str) -> None:
    _, losses, metrics = trained_and_replayed(samples, CONFIGURATIONS[name], "cpu", tmp_path / "cpu")
    with far_device():
        _, far_losses, far_metrics = trained_and_replayed(samples, CONFIGURATIONS[name], str(FAR), tmp_path / "far")
    assert far_losses.keys() == losses.keys()
    for stage, found in losses.items():
        assert far_losses[stage] == pytest.approx(found, rel=1e-3), stage
    assert numbers(far_metrics["ranking"]) == pytest.approx(numbers(metrics["ranking"]), rel=1e-2)
    assert far_metrics["policies"].keys() == metrics["policies"].keys()
    for policy, row in metrics["policies"].items():
        assert numbers(far_metrics["policies"][policy]) == pytest.approx(numbers(row), rel=1e-2)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, float)}


LEARNING = {"steps": 24, "validate_every": 8, "learning_rate": 1e-2}
REPRESENTATIONS = ("recall", "prerank", "pretrain", "relabel")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_stages_under_autocast_learn_in_bfloat16_what_they_learn_in_float32(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The CPU's autocast, which is nearly the GPU's (that keeps softmax and layer norm in float32): no layer mixes dtypes, and the losses fall as far."""
    model, losses = CONFIGURATIONS[name], {}
    learning = replace(TRAINING, **{stage: replace(getattr(TRAINING, stage), **LEARNING) for stage in REPRESENTATIONS})
    for precision, autocast in (("float32", nullcontext), ("bfloat16", lambda: torch.autocast("cpu", torch.bfloat16))):
        monkeypatch.setattr(Device, "autocast", lambda self, autocast=autocast: autocast())
        records = [
            train_stage(stage, samples, model, learning, tmp_path / precision, tmp_path / f"{precision}-checkpoints", seed=5).result for stage in STAGES[model.kind] if stage in REPRESENTATIONS
        ]  # fmt: skip
        losses[precision] = np.array([[entry["loss"] for entry in part["history"][1:]] for record in records for part in (record, *record["parts"].values())])
    fall = losses["float32"][:, 0] - losses["float32"][:, -1]
    assert (losses["bfloat16"] != losses["float32"]).all() and (fall > 0).all()
    assert (np.abs(losses["bfloat16"] - losses["float32"]) < 0.5 * fall[:, None]).all()


def test_a_killed_stage_resumes_far_from_the_cpu_to_the_same_bytes(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CONFIGURATIONS["ega_v1"]
    with far_device():
        for stage in STAGES[model.kind]:
            whole = train_stage(stage, samples, model, on(str(FAR)), tmp_path / "whole", tmp_path / "whole-checkpoints", seed=5)
            with monkeypatch.context() as patch:
                saved: list[int] = []

                def save(folder: Path, step: int, *rest: Any, saved: list[int] = saved) -> None:
                    save_checkpoint(folder, step, *rest)
                    saved.append(step)
                    if step == 4:
                        raise KeyboardInterrupt

                patch.setattr(loop, "save_checkpoint", save)
                with pytest.raises(KeyboardInterrupt):
                    train_stage(stage, samples, model, on(str(FAR)), tmp_path / "stages", tmp_path / "checkpoints", seed=5)
            assert saved == [0, 4]
            again = train_stage(stage, samples, model, on(str(FAR)), tmp_path / "stages", tmp_path / "checkpoints", seed=5)
            assert again.result["sha256"] == whole.result["sha256"]


def test_an_incumbent_is_read_where_the_candidate_is(samples: Path, tmp_path: Path) -> None:
    """An incumbent comes from a bundle, on the CPU; its ids are translated there."""
    model, found = CONFIGURATIONS["ega_v1"], Samples(samples)
    older = Incumbent(build_network(model, found, 2).eval(), {name: ids[::2] for name, ids in found.vocabulary.items()}, "critical", "a" * 12)
    for stage in STAGES[model.kind]:
        train_stage(stage, samples, model, TRAINING, tmp_path / "stages", tmp_path / "checkpoints", seed=5)
    with far_device():
        evaluate_candidate(samples, tmp_path / "stages", model, on(str(FAR)), EvaluationConfig(requests=8, batch=4), GateConfig(), tmp_path / "evaluation", 5, older)
    result = SimpleNamespace(per_request=pd.read_parquet(tmp_path / "evaluation" / "per_request.parquet"))
    assert set(result.per_request["policy"]) >= {"incumbent", "logged", "ega_v1/critical"}


def test_the_far_device_tells_what_a_gpu_would_refuse() -> None:
    with far_device() as far:
        x = torch.ones(2, 3).to(far)
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="force=True"):
            x.numpy()
        with pytest.raises(RuntimeError, match="no deterministic implementation"):
            x.cumsum(1)
        assert x.numpy(force=True).sum() == float(x.sum()) == 6.0
        assert x[:, [0, 2]].cpu().shape == (2, 2)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_a_device_that_is_none_is_refused_by_name(device: str) -> None:
    with pytest.raises(ValidationError, match="device"):
        TrainingConfig(device=device)


def test_a_gpu_that_is_not_there_is_said_before_anything_is_read(tmp_path: Path, samples: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.device is cuda:97, but PyTorch .* sees \d+ GPUs here; set it to cpu"):
        train_stage("pretrain", samples, NETWORK, on("cuda:97"), tmp_path / "stages", tmp_path / "checkpoints", seed=5)
    assert not (tmp_path / "stages").exists() and not (tmp_path / "checkpoints").exists()


def test_several_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes train together on CPUs only"):
        Device("cuda").enter("ega_v1")


def test_tables_use_all_processors_and_one_gpu_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for device, expected in (("cpu", (8, 2)), ("cuda", (1, 2))):
        assert tables._at_once(RunConfig(name="a", training=TrainingConfig(threads=2, device=device))) == expected


def test_ega_v2_says_that_it_trains_on_the_cpu(tmp_path: Path, samples: Path) -> None:
    said = r"training\.device is cuda, but model\.kind ega_v2 trains on the CPU only"
    with pytest.raises(ValueError, match=said):
        train_stage("tokenize", samples, replace(NETWORK, kind="ega_v2"), on("cuda"), tmp_path / "stages", tmp_path / "checkpoints", seed=5)
    config = tmp_path / "there.yaml"
    config.write_text((QUICK.parent / "tables_v2.yaml").read_text().replace("training:", "training:\n  device: cuda"))
    with pytest.raises(ValueError, match=said):
        v2(config)


def test_a_run_and_a_table_ask_for_their_gpu_before_they_make_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "there.yaml"
    config.write_text(QUICK.read_text().replace("name: ci", "name: there").replace("training:", "training:\n  device: cuda:97"))
    monkeypatch.setenv("EGA_HOME", str(tmp_path / "home"))
    assert run_command(config, None, None, None, "v1", tmp_path / "runs", None, True) == WRONG_CALL
    assert "error: training.device is cuda:97" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "home").exists()
    with pytest.raises(ValueError, match=r"training\.device is cuda:97"), market(config, 7, None):
        pass


def test_a_large_city_goes_through_the_network_a_few_requests_at_a_time(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Samples(samples)
    rows = found.split_rows(schema.TRAIN)
    whole = encode_city(build_network(NETWORK, found, 1), found, rows, 1000, seed=3)
    monkeypatch.setattr(stages, "MOST_TOKENS", 100)  # two requests of 40 ads
    assert {len(requests) for requests, _, _ in stages.city_batches(found, rows)} == {1, 2}
    few = encode_city(build_network(NETWORK, found, 1), found, rows, 1000, seed=3)
    assert np.array_equal(few.requests, whole.requests)
    torch.testing.assert_close((few.h, few.click), (whole.h, whole.click))


def test_the_cpu_leaves_no_trace_in_the_fingerprint_and_another_device_does(samples: Path, tmp_path: Path) -> None:
    of = {device: stage_fingerprint("pretrain", samples, NETWORK, on(device), tmp_path, 5) for device in ("cpu", "cuda", "cuda:1")}
    assert "device" not in of["cpu"]
    assert of["cuda"] == {**of["cpu"], "device": "cuda"} and of["cuda:1"] != of["cuda"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_on_a_gpu_is_the_same_twice_and_near_the_cpu(samples: Path, tmp_path: Path, name: str) -> None:
    """What learns representations computes in bfloat16 there, so near means near; what stands on it is not compared."""
    model = CONFIGURATIONS[name]
    _, losses, _ = trained_and_replayed(samples, model, "cpu", tmp_path / "cpu")
    there, gpu_losses, _ = trained_and_replayed(samples, model, "cuda", tmp_path / "gpu")
    again, _, _ = trained_and_replayed(samples, model, "cuda", tmp_path / "again")
    assert there == again
    for stage in {"recall", "prerank", "pretrain"} & losses.keys():
        assert gpu_losses[stage] == pytest.approx(losses[stage], rel=0.05)
