"""Our side of `ega bench peers`: its models, data, protocol and errors. The peer library is not installed here, so its side is not tested:
RecBole is stood in for by a program that answers the protocol, and no speed is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import peers
from benchmarks.sequential import Interactions, training_length
from cli.bench import bench

ANSWERS = """
import json, sys
said = json.loads({said!r})
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps(said.get(request["do"], {{"seconds": 0.01, "count": request.get("steps", 1)}})), flush=True)
"""


def stand_in(folder: Path, said: dict[str, object]) -> Path:
    """An executable in the place of the peer's Python: it takes the program's path and answers as told."""
    (folder / "answers.py").write_text(ANSWERS.format(said=json.dumps(said)))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "answers.py"}"\n')
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def data() -> Interactions:
    return peers.shared_users(peers.drawn_interactions(0))


def test_without_a_peer_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install -r benchmarks/peers.txt"):
        bench("peers", quick=True)
    with pytest.raises(FileNotFoundError, match="--peer-python .*nowhere is no file; make one with"):
        bench("peers", quick=True, peer_python=tmp_path / "nowhere")
    with pytest.raises(peers.PeerError, match="No module named 'recbole'.*; make one with"):  # the real program, under a Python without RecBole
        bench("peers", quick=True, peer_python=Path(sys.executable))
    assert (peers.PROGRAM.parent / "peers.txt").is_file()


def test_a_peer_that_fails_ends_or_reads_other_data_is_named(tmp_path: Path, data: Interactions) -> None:
    with pytest.raises(peers.PeerError, match="the peer failed at 'prepare': ValueError: odd"):
        bench("peers", quick=True, peer_python=stand_in(tmp_path, {"prepare": {"error": "ValueError: odd"}}))
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho broken loader >&2\n")
    silent.chmod(0o755)
    with pytest.raises(peers.PeerError, match="ended or answered no JSON.*\n.*broken loader"):
        bench("peers", quick=True, peer_python=silent)
    with pytest.raises(ValueError, match="the two sides read different data: samples"):
        bench("peers", quick=True, peer_python=stand_in(tmp_path, {"prepare": {"items": data.count, "samples": 1, "versions": {}}}))


def test_both_models_are_measured_in_turn(tmp_path: Path, data: Interactions) -> None:
    samples = int((training_length(data) - 1).sum())
    out = tmp_path / "peers.json"
    assert bench("peers", out, quick=True, peer_python=stand_in(tmp_path, {"prepare": {"items": data.count, "samples": samples, "versions": {"recbole": "stand-in"}}})) == 0
    result = json.loads(out.read_text())
    assert [(row["model"], row["per second"]) for row in result["table"]] == [(model, what) for model in ("SASRec", "DIN") for what in peers.MEASURED.values()]
    for row in result["table"]:
        assert row["ours"] > 0 and row["RecBole"] > 0 and row["ratio, median of pairs"] > 0
    assert result["versions"]["RecBole"] == {"recbole": "stand-in"} and " --peer-python " in result["command"]


def test_atomic_files_hold_the_interactions_in_order(tmp_path: Path, data: Interactions) -> None:
    peers.atomic_files(data, tmp_path)
    table = pd.read_csv(tmp_path / "interactions" / "interactions.inter", sep="\t")
    assert list(table.columns) == ["user_id:token", "item_id:token", "timestamp:float"]
    for user in (0, data.users - 1):
        rows = table[table["user_id:token"] == user].sort_values("timestamp:float")
        assert rows["item_id:token"].tolist() == data.items[data.start[user] : data.start[user + 1]].tolist()


def test_users_too_short_for_both_protocols_are_left_out() -> None:
    short = Interactions(np.array([5, 6, 7, 9, 5, 9, 7]), np.array([0, 3, 7]), 9)
    kept = peers.shared_users(short)
    assert kept.users == 1 and kept.items.tolist() == [3, 1, 3, 2] and kept.count == 3
    with pytest.raises(ValueError, match="no user has 4 items"):
        peers.shared_users(Interactions(np.array([1, 2]), np.array([0, 2]), 2))


@pytest.mark.parametrize("model", ["SASRec", "DIN"])
def test_our_batches_hold_the_past_of_their_targets_and_training_lowers_the_loss(model: str, data: Interactions) -> None:
    ours = peers.Ours(model, data, peers.QUICK, 0)
    histories, target, *labels = ours.batch()
    assert histories.shape == (peers.QUICK.batch, peers.QUICK.length) and len(target) == peers.QUICK.batch
    assert bool((histories[:, -1] != 0).all())  # every target has a past
    positive = target if model == "SASRec" else target[labels[0] == 1]
    follows = {(int(a), int(b)) for u in range(data.users) for a, b in zip(data.items[data.start[u] :], data.items[data.start[u] + 1 : data.start[u + 1] - 2], strict=False)}
    assert {(int(a), int(b)) for a, b in zip(histories[: len(positive), -1], positive, strict=True)} <= follows
    first = ours.train(2)["loss"]
    assert ours.train(60)["loss"] < first
    assert ours.score(2)["count"] > 0 and not torch.is_inference_mode_enabled()


def test_the_interval_of_a_median_has_its_level() -> None:
    """Order statistics: with 15 pairs the 4th and the 12th value (binomial tail 0.0176); with 5 the extremes, which hold less."""
    assert peers.median_interval(15) == (3, 11) and peers.median_interval(5) == (0, 4)
    rng = np.random.default_rng(0)
    low, high = peers.median_interval(15)
    drawn = np.sort(rng.normal(size=(4000, 15)), axis=1)
    assert 0.95 <= ((drawn[:, low] < 0) & (drawn[:, high] > 0)).mean() <= 0.985
