"""The paper's tables at tiny size, their statistics, and the page that is written from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import tables
from benchmarks.flops import PAPER, appendix, count
from benchmarks.results import write_results
from cli.bench import bench
from model.ega_v1.network import NetworkConfig
from model.evaluation.metrics import auc

pytestmark = pytest.mark.timeout(1200)  # three small trainings; a slow machine is no failure


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ega bench table1 --quick --out`."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("results") / "table1.json"
    assert bench("table1", out, quick=True) == 0
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    return out


def test_table1_compares_three_trained_models_by_evaluator_and_truth(first: Path) -> None:
    result = json.loads(first.read_text())
    assert [row["model"] for row in result["table"]] == ["MCA", "FS-LTR", "EGA-V1"] and result["seeds"] == [7]
    rows = result["per_seed"][0]
    for row in rows.values():
        assert 0 < row["recall"] <= 1 and 0 < row["auc"] < 1 and row["true_erpm"] > 0 and row["psi_exact"] >= 0 and row["welfare_of_limit"] <= 100
    assert rows["mca"]["gap_closed"] == 0 and rows["mca"]["psi_exact"] > rows["ega_v1"]["psi_exact"]  # GSP is not truthful
    for name, entry in result["differences"].items():
        assert entry["low"] <= entry["lift"] <= entry["high"], name
    assert result["command"] == "ega bench table1 --quick" and result["minutes"] > 0


def test_the_page_of_results_holds_what_the_files_say(first: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    assert write_results(first.parent, out) == 1
    page = out.read_text()
    result = json.loads(first.read_text())
    assert "## Table 1: MCA, FS-LTR, EGA-V1" in page and "`ega bench table1 --quick --out results/table1.json`; seeds 7" in page
    assert result["table"][0]["AUC"] in page
    with pytest.raises(FileNotFoundError, match="no results in .*; make some first, e.g. `ega bench table1"):
        write_results(tmp_path / "none", out)


def test_the_auc_difference_is_paired_by_user() -> None:
    rng = np.random.default_rng(0)
    users, labels = np.repeat(np.arange(60), 20), rng.random(1200) < 0.3
    theirs = labels + rng.normal(0, 1.5, 1200)
    same = tables.paired_auc(labels, theirs, theirs, users)
    assert same == {"lift": 0.0, "low": 0.0, "high": 0.0}
    mine = labels + rng.normal(0, 0.8, 1200)
    found = tables.paired_auc(labels, mine, theirs, users)
    assert found["lift"] == pytest.approx(auc(labels, mine) - auc(labels, theirs)) and 0 < found["low"] < found["lift"] < found["high"]


def test_recalls_are_compared_on_requests_with_something_to_find() -> None:
    mine = pd.DataFrame({"request_id": [1, 2, 3, 4], "user_id": [1, 1, 2, 3], "recall": [1.0, 0.5, np.nan, 1.0]})
    theirs = mine.assign(recall=[0.5, 0.5, np.nan, 0.0])
    assert tables.paired_recall(mine, theirs)["lift"] == pytest.approx(0.5)


def test_independent_seeds_are_pooled() -> None:
    found = tables.pooled([{"lift": 0.1, "low": 0.0, "high": 0.2}, {"lift": 0.3, "low": 0.0, "high": 0.6}])
    assert found["lift"] == pytest.approx(0.2) and found["high"] - 0.2 == pytest.approx(np.hypot(0.1, 0.3) / 2) and found["least"] == 0.1


def test_flops_are_counted_on_the_network() -> None:
    """MODEL.md 5: a GCF block on 1e5 ads costs 59 GF; both agree with Eq. 30 up to the small products that it leaves out."""
    config = NetworkConfig(**PAPER, exact_behaviours=0)
    counted = count(config, 100_000, 1_000)
    assert counted["GCF on ads"] / config.blocks == pytest.approx(59e9, rel=0.01)
    assert counted["GCF on ads"] == pytest.approx(appendix(config, 100_000, 1_000)["GCF on ads"], rel=0.1)
    assert counted["target attention"] / 2 == pytest.approx(13.3e9, rel=0.01) and counted["context attention"] == pytest.approx(16.5e9, rel=0.01)
    assert count(config, 20_000, 1_000)["GCF on ads"] * 5 == pytest.approx(counted["GCF on ads"], rel=5e-3)  # linear in N


def test_a_benchmark_names_the_options_that_it_takes() -> None:
    with pytest.raises(ValueError, match="benchmark table1 takes no --steps; only payments can"):
        bench("table1", steps=3)
    with pytest.raises(ValueError, match="benchmark bidders measures a finished run: add --run RUN"):
        bench("bidders")
