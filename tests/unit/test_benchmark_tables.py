"""The paper's tables at tiny size, their statistics, and the page that is written from them."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import online, tables
from benchmarks.flops import PAPER, appendix, count
from benchmarks.results import drawing, orders, write_results
from cli.bench import bench
from model.ega_v1.network import NetworkConfig
from model.evaluation.metrics import auc
from pipelines.config import load_run_config

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
    assert 0 < rows["mca"]["true_erpm_equilibrium"] < rows["mca"]["true_erpm"]  # VCG prices of the same ranking never exceed GSP's
    for rival in ("MCA", "FS-LTR"):
        assert result["differences"][f"true eRPM as published over {rival} with GSP at equilibrium"]["lift"] > result["differences"][f"true eRPM over {rival}, as published"]["lift"]
    assert {f"true {measure}" for name in tables.CASCADES for measure in (f"eRPM over {name}, both critical", f"welfare over {name}")} <= set(result["differences"])
    over = {name: result["differences"][f"true welfare over {name}"]["lift"] for name in ("MCA", "MCA without pre-ranking", "DIN on the whole city")}
    assert len(set(over.values())) == len(over), "20, 30 and all 60 ads of a city reach DIN: other pages"
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
    assert f"![Table 1: MCA, FS-LTR, EGA-V1](../{first.parent.name}/table1.svg)" in page and "true eRPM over MCA, as published" in (first.parent / "table1.svg").read_text()
    for name, entry in result["differences"].items():
        side = "above zero" if entry["low"] > 0 else "below zero" if entry["high"] < 0 else "no difference shown"
        assert f"*{name}*" in next(line for line in page.splitlines() if line.startswith(f"- {side}: "))
    assert orders({"a": {"lift": 1.0, "low": 0.5, "high": 2.0}, "b": {"low": -1.0, "high": 1.0}, "c": {"low": None, "high": None}}) == "- above zero: *a*\n- no difference shown: *b*"
    markets = {"a": {"low": 0.5, "high": 2.0, "markets_low": 0.1, "markets_high": 3.0}, "b": {"low": -2.0, "high": -0.5, "markets_low": -3.0, "markets_high": 0.5}}
    assert orders(markets) == "- above zero: *a* (also in new markets)\n- below zero: *b* (not sure in new markets)"
    assert orders(None) == ""
    with pytest.raises(FileNotFoundError, match="no results in .*; make some first, e.g. `ega bench table1"):
        write_results(tmp_path / "none", out)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "table1.json").write_bytes(b"")
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"damaged/table1\.json is no JSON .*make it again"):
        write_results(tmp_path / "damaged", out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "rows", "drawn"),
    [("table2", ["ega_v1", "-gcf", "-mif", "-auf"], "-mif, true eRPM"), ("table3", [*tables.TABLE3, "EGA-V1, no crosses", "MCA, no crosses", *tables.TRUTHS], "late fusion"),
     ("scaling", ["m", "m", "m_e", "m_e"], "AUC over m"), ("sensitivity", ["as configured"], "as configured, true revenue")],
)  # fmt: skip
def test_the_other_tables_have_a_row_for_every_variant_and_a_plot(name: str, rows: list[str], drawn: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / f"{name}.json"
    assert bench(name, out, quick=True) == 0
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    result = json.loads(out.read_text())
    assert [next(iter(row.values())) for row in result["table"]] == rows and f"<!-- {drawn} -->" in out.with_suffix(".svg").read_text()


def test_the_auc_difference_is_paired_by_user() -> None:
    rng = np.random.default_rng(0)
    users, labels = np.repeat(np.arange(60), 20), rng.random(1200) < 0.3
    theirs = labels + rng.normal(0, 1.5, 1200)
    same = tables.paired_auc(labels, theirs, theirs, users)
    assert same == {"lift": 0.0, "low": 0.0, "high": 0.0}
    mine = labels + rng.normal(0, 0.8, 1200)
    found = tables.paired_auc(labels, mine, theirs, users)
    assert found["lift"] == pytest.approx(auc(labels, mine) - auc(labels, theirs)) and 0 < found["low"] < found["lift"] < found["high"]


def test_the_aucs_of_the_truth_are_those_of_the_markets_probabilities() -> None:
    """Each candidate asked for by itself; and an ad without substitutes is never less attractive."""
    with tables.market(tables.QUICK, 3, None) as place:
        samples = place.samples
        rows = np.sort(np.random.default_rng(0).choice(len(samples.request_id), 60, replace=False))
        found, blind = (tables.true_aucs(place, rows, substitutes) for substitutes in (True, False))
        p, y, q, clicked = [], [], [], []
        for row in rows:
            ids = [int(samples.ad_id[ad]) for ad in samples.candidate[row] if ad >= 0]
            truth = [place.world.truth(pd.DataFrame({"request_id": [samples.request_id[row]]}), np.array([ad])) for ad in ids]
            p += [each.click_probability[0, 0] for each in truth]
            y += [label for label, ad in zip(samples.click[row], samples.candidate[row], strict=True) if ad >= 0]
            reading = 1.0
            for slot, ad in enumerate(samples.candidate[row, : samples.slots]):
                if ad >= 0:
                    q.append(reading * truth[slot].click_probability[0, 0])
                    clicked.append(samples.click[row, slot])
                    reading *= truth[slot].continuation[0, 0]
    assert found["auc"] == pytest.approx(auc(np.array(y), np.array(p))) and found["auc_exposed"] == pytest.approx(auc(np.array(clicked), np.array(q)))
    assert blind["auc"] != found["auc"] and min(*found.values(), *blind.values()) > 0.5


def test_recalls_are_compared_on_requests_with_something_to_find() -> None:
    mine = pd.DataFrame({"request_id": [1, 2, 3, 4], "user_id": [1, 1, 2, 3], "recall": [1.0, 0.5, np.nan, 1.0]})
    theirs = mine.assign(recall=[0.5, 0.5, np.nan, 0.0])
    assert tables.paired_recall(mine, theirs)["lift"] == pytest.approx(0.5)


def test_seeds_run_side_by_side_and_a_stopped_table_goes_on_where_it_was(tmp_path: Path) -> None:
    """In processes of their own; a failure loses no other seed, and what the same configuration gave is read again."""
    config, kept = tmp_path / "config.yaml", tmp_path / "kept"
    shutil.copy(tables.QUICK, config)
    done = {name: partial(dict, value=value) for name, value in (("b", 2.0), ("a", float("nan")))}
    with pytest.raises(ValueError, match="invalid literal"):
        tables.side_by_side(config, {**done, "c": partial(int, "no number"), "d": partial(dict)}, kept)
    (kept / "b.json").write_text((kept / "b.json").read_text().replace("2.0", "3.0"))
    found, minutes = tables.side_by_side(config, {**done, "c": partial(dict, value=5.0)}, kept)
    assert [each["value"] for each in found] == [3.0, None, 5.0] and minutes > 0 and "TQDM_DISABLE" not in os.environ
    assert tables.side_by_side(config, {"b": done["b"]}, None)[0] == [{"value": 2.0}]
    config.write_text(config.read_text() + "# changed\n")
    assert tables.side_by_side(config, {"b": done["b"]}, kept)[0] == [{"value": 2.0}]


def test_kept_work_of_other_arguments_or_damaged_is_done_again(tmp_path: Path) -> None:
    """The same name is not the same work: other data, or --quick before the whole."""
    for value in (1, 2, 2):
        assert tables.side_by_side(tables.QUICK, {"a": partial(dict, [("value", value)])}, tmp_path)[0] == [{"value": value}]
    for text in ("", "[]", '{"of": {}}', '{"of"'):
        (tmp_path / "a.json").write_text(text)
        assert tables.side_by_side(tables.QUICK, {"a": partial(dict, [("value", 2)])}, tmp_path)[0] == [{"value": 2}]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written; name another file"):
        bench("table1", tmp_path, quick=True)


def test_what_has_a_course_or_intervals_is_drawn() -> None:
    lift = {"lift": 0.1, "low": 0.05, "high": 0.2}
    for result, shown in (({"series": {"a line": [1.0, 2.0]}, "axes": ("blocks", "%", ["1", "2"])}, "a line"), ({"differences": {"over MCA": {"GSP": lift}}}, "over MCA, GSP")):
        drawn = drawing(result)
        assert drawn is not None and drawn.startswith("<svg") and f"<!-- {shown} -->" in drawn
    assert drawing({"table": []}) is None and drawing({"differences": {"a": {"low": None, "high": None}}}) is None


def test_independent_seeds_are_pooled() -> None:
    found = tables.pooled([{"lift": 0.1, "low": 0.0, "high": 0.2}, {"lift": 0.3, "low": 0.0, "high": 0.6}])
    assert found["lift"] == pytest.approx(0.2) and found["high"] - 0.2 == pytest.approx(np.hypot(0.1, 0.3) / 2) and found["least"] == 0.1
    # Student's t with one degree of freedom: 12.706 standard errors of .1.
    assert found["markets_high"] - 0.2 == pytest.approx(1.2706, rel=1e-4) and found["markets_low"] == pytest.approx(0.2 - 1.2706, rel=1e-4)
    assert np.isnan(tables.pooled([{"lift": 0.1, "low": 0.0, "high": 0.2}])["markets_low"])


def test_a_table_of_online_changes_says_what_is_unknown() -> None:
    known, unknown = {"lift": 0.052, "lift_low": -0.01, "lift_high": 0.12}, {"lift": np.nan, "lift_low": np.nan, "lift_high": np.nan}
    lifts = {"ctr": known, "rpm": known, "roi": unknown, "response_ms": known}
    rows = online._lifts({"A/A: MCA in both arms": {"lifts": lifts, "true_lifts": {}}, "prices of the gates": {"lifts": lifts, "true_lifts": {"ctr": known, "rpm": known}}})
    assert [row["paper"] for row in rows] == ["+5.2 %", "+13.6 %", "+3.1 %", "+2.2 %"]
    assert rows[0]["prices of the gates"] == rows[0]["prices of the gates, true"] == "+5.2 % (-1.0 to +12.0)"
    assert rows[2]["prices of the gates"] == "unknown" and rows[2]["prices of the gates, true"] == "" and "A/A: MCA in both arms, true" not in rows[0]


def test_a_model_that_the_gates_refuse_ends_table4_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.local.run_pipeline", lambda *arguments, **options: "rejected: eRPM 3 against 4")
    config, run = load_run_config(tables.QUICK), tmp_path / "runs" / "market"
    run.mkdir(parents=True)
    with pytest.raises(ValueError, match="the gates refused MCA, and an A/B test serves approved models only; rejected: eRPM 3 against 4"):
        online._approved(config, run, tmp_path / "home" / "ci")


def test_a_stopped_experiment_says_in_its_row_what_it_was_stopped_for() -> None:
    stopped = {"verdict": "Stop: ega breaks a guardrail", "reasons": ["Charged over critical price +4.0 % (+3.0 % to +5.0 %), limit +1.0 %."]}
    assert online._verdict(stopped) == "Stop: ega breaks a guardrail. Charged over critical price +4.0 % (+3.0 % to +5.0 %), limit +1.0 %"
    assert online._verdict({"verdict": "No difference shown", "reasons": ["Lifts from -5 % to 5 % remain possible."]}) == "No difference shown"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_table4_drives_both_approved_models_with_simulated_users(tmp_path: Path) -> None:
    out = tmp_path / "table4.json"
    assert bench("table4", out, quick=True) == 0
    result = json.loads(out.read_text())
    assert [row["paper"] for row in result["table"]] == ["+5.2 %", "+13.6 %", "+3.1 %", "+2.2 %"] and result["seeds"] == [7]
    same, gates, published = result["experiments"].values()
    versions = {kind: tag.split(":")[1] for kind, tag in result["approved"].items()}
    assert versions["MCA"] != versions["EGA-V1"]
    for entry, treatment, prices in ((same, "MCA", "critical"), (gates, "EGA-V1", "critical"), (published, "EGA-V1", "gsp")):
        assert (entry["arms"]["control"]["version"], entry["arms"]["ega"]["version"]) == (versions["MCA"], versions[treatment])
        assert entry["arms"]["control"]["prices"] == prices and entry["verdict"] != "Invalid: do not read the numbers"
        assert all(arm["requests"] > 0 and arm["users"] > 1 and arm["response_ms"] > 0 for arm in entry["arms"].values())
    # The same users, requests and pages in both comparisons; GSP charges no less than what is truthful.
    assert gates["arms"]["control"]["ctr"] == published["arms"]["control"]["ctr"] and gates["true_lifts"]["ctr"] == published["true_lifts"]["ctr"]
    assert published["true_lifts"]["rpm"]["lift"] < gates["true_lifts"]["rpm"]["lift"]
    assert len(gates["days"]) == 2 and same["true_lifts"]["rpm"]["lift_low"] < 0 < same["true_lifts"]["rpm"]["lift_high"]


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
