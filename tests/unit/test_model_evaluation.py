"""Metrics, gates, replay: figures against plain or outside versions, and gates that never pass what was not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model_tiny import NETWORK, TRAINING, random_pool, tiny_network
from samples_fixture import tiny_samples
from scipy.stats import mannwhitneyu

import auction
from marketplace import schema
from model.bundle import load_bundle, sha256_of
from model.ega_v1.mechanism import PRICE_MODES, Audit, allocate, audit_losers, prices, slot_clicks, truthful, try_bids
from model.evaluation import plots
from model.evaluation.evaluate import bundle_candidate, evaluate_candidate, finite_only
from model.evaluation.gates import GateConfig, calibration_gate, choose_price_mode, ic_gate, judge, revenue_gate
from model.evaluation.metrics import auc, deviation, log_loss, mean_and_interval, recall_at
from model.evaluation.replay import LIES, EvaluationConfig, Incumbent, positions_of, replay, trial_prices
from model.kinds import STAGES
from model.training.data import Samples
from model.training.run import train_stage
from model.training.stages import build_network

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize("levels", [3, 10_000])
def test_auc_is_the_chance_to_rank_a_click_first_with_ties_half(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, labels = rng.integers(0, levels, 400) / levels, rng.random(400) < 0.3
    positive, negative = scores[labels], scores[~labels]
    pairs = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    assert auc(labels, scores) == pytest.approx(pairs, abs=1e-12)
    assert auc(labels, scores) == pytest.approx(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)), abs=1e-12)


def test_auc_of_one_class_is_not_a_number() -> None:
    assert np.isnan(auc(np.ones(4), np.arange(4))) and np.isnan(auc(np.zeros(4), np.arange(4))) and np.isnan(auc(np.zeros(0), np.zeros(0)))
    assert auc(np.array([0, 1]), np.array([0.1, 0.9])) == 1.0 and auc(np.array([0, 1]), np.array([0.5, 0.5])) == 0.5


def test_recall_counts_targets_among_the_best() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((30, 80))
    targets = [rng.choice(80, int(rng.integers(0, 4)), replace=False) for _ in range(30)]
    for row, value in enumerate(recall_at(scores, targets, 20)):
        best = set(np.argsort(-scores[row])[:20])
        assert np.isnan(value) if not len(targets[row]) else value == pytest.approx(np.mean([t in best for t in targets[row]]))


def test_recall_of_a_constant_score_is_nothing() -> None:
    assert recall_at(np.zeros((1, 80)), [np.array([3])], 50)[0] == 0.0
    assert recall_at(np.zeros((1, 50)), [np.array([3])], 50)[0] == 1.0  # all are among the 50
    assert recall_at(np.full((1, 80), np.nan), [np.array([3])], 50)[0] == 0.0  # and what has no score is not among the best


def test_deviation_and_log_loss_by_hand() -> None:
    assert deviation(np.array([0.2, 0.4]), np.array([0, 1])) == pytest.approx(abs(1 - 0.3 / 0.5))
    assert np.isnan(deviation(np.array([0.2]), np.array([0]))) and np.isnan(deviation(np.zeros(0), np.zeros(0)))
    assert log_loss(np.array([1, 0]), np.array([0.8, 0.4])) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert np.isfinite(log_loss(np.array([1, 0]), np.array([0.0, 1.0])))


def test_interval_equals_a_bootstrap_over_users() -> None:
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 9, 150)
    users = np.repeat(np.arange(150), sizes)
    values = np.repeat(rng.normal(1, 1, 150), sizes) + 0.3 * sizes[users] + rng.normal(0, 0.5, len(users))
    mean, low, high = mean_and_interval(values, users)
    assert mean == pytest.approx(values.mean())
    totals = np.bincount(users, values)
    drawn = rng.integers(0, 150, (4000, 150))
    replicated = totals[drawn].sum(1) / sizes[drawn].sum(1)
    assert (high - low) / 2 == pytest.approx(1.96 * replicated.std(), rel=0.06)
    wrong = 1.96 * values.std() / np.sqrt(len(values))  # what requests as units would claim
    assert (high - low) / 2 > 1.5 * wrong
    order = rng.permutation(len(users))
    assert mean_and_interval(values[order], 1000 - users[order]) == pytest.approx((mean, low, high))


def test_interval_of_one_user_is_unknown() -> None:
    mean, low, high = mean_and_interval(np.array([1.0, 3.0]), np.array([5, 5]))
    assert mean == 2.0 and np.isnan(low) and np.isnan(high)


def test_interval_of_a_ratio() -> None:
    rng = np.random.default_rng(5)
    users = rng.integers(0, 400, 4000)
    clicks = (rng.random(4000) < 0.1).astype(float)
    ratio, low, high = mean_and_interval(np.full(4000, 0.095), users, over=clicks)
    assert ratio == pytest.approx(0.095 * 4000 / clicks.sum()) and low < ratio < high
    totals = np.bincount(users, clicks, minlength=400)
    counts = np.bincount(users, minlength=400)
    drawn = rng.integers(0, 400, (4000, 400))
    replicated = 0.095 * counts[drawn].sum(1) / totals[drawn].sum(1)
    assert (high - low) / 2 == pytest.approx(1.96 * replicated.std(), rel=0.06)
    assert np.isnan(mean_and_interval(np.ones(2), np.array([1, 2]), over=np.zeros(2))).all()


def test_positions_of_rows_among_the_candidates() -> None:
    rows = np.array([2, 5, 9, 14, -1, -1])
    np.testing.assert_array_equal(positions_of(rows, np.array([9, 2, 3, -1, 99, 14])), [2, 0, 3])
    assert len(positions_of(np.array([-1]), np.array([0, -1]))) == 0


def test_roc_curve_ends_and_area() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 30, 500) / 30, rng.random(500) < 0.4
    fpr, tpr, threshold = plots.roc_curve(labels, scores)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and (np.diff(fpr) >= 0).all() and (np.diff(threshold) <= 0).all()
    assert np.isfinite(threshold).all() and len(fpr) == len(np.unique(scores)) + 1
    assert np.trapezoid(tpr, fpr) == pytest.approx(auc(labels, scores), abs=1e-12)
    one, other, _ = plots.roc_curve(np.zeros(3), np.arange(3.0))
    assert np.isfinite(one).all() and np.isfinite(other).all()


def test_plots_are_svg_without_scripts_and_pages_escape_what_they_show() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(200)
    record = {"stage": "pretrain", "best_step": 2, "steps": 4, "history": [{"step": 0, "loss": None, "score": 0.5}, {"step": 2, "loss": 0.7, "score": 0.6}]}
    for svg in (plots.calibration_svg(rng.random(200) < scores, scores), plots.roc_svg(rng.random(200) < scores, scores), plots.price_scatter_svg(scores, scores), plots.curve_svg(record)):
        assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>") and "<script" not in svg
    text = plots.page("<b>", [("a & b", plots.table(("x", "<y>"), [("<script>", 0.5), ("yes", None), (float("nan"), 12345)]))])
    assert "<script>" not in text and "&lt;script&gt;" in text and "12,345" in text and text.count("–") == 2
    assert "<svg" in plots.curve_page(record)


# ---------------------------------------------------------------------------------------------------------------------
# Gates

GATES = GateConfig()
BETTER = GateConfig(minimum_lift=0.0)
"""Must beat the incumbent, not only keep up with it."""
NOT_MEASURED = [float("nan"), float("inf"), float("-inf"), None, "0.01", "x' or True or 'x", [0.01], True, np.nan]


HONEST = {"psi_exact_model": 0.0, "psi_exact": 0.0, "psi_loser_model": 0.0, "psi_loser": 0.0}


@pytest.mark.parametrize("which", sorted(HONEST))
@pytest.mark.parametrize("value", [*NOT_MEASURED, -0.001, -5.0, 0.0301, 1e9])
def test_ic_gate_passes_nothing_but_a_small_measured_psi(value: Any, which: str) -> None:
    gate = ic_gate({**HONEST, which: value}, "critical", GateConfig(psi_limit_independent=0.03))
    assert gate.approved is False and gate.reason
    assert ic_gate({name: zero for name, zero in HONEST.items() if name != which}, "critical", GATES).approved is False


def test_ic_gate_says_how_one_would_gain() -> None:
    worst = {"request_id": 7, "ad_id": 12, "slot": 2, "value": 1.5, "best_bid": 0.9, "utility": 0.1, "gain": 0.02}
    gate = ic_gate({**HONEST, "psi_exact_model": 0.05, "shading_share": 0.9, "worst": worst}, "gsp", GATES)
    assert not gate.approved
    for part in ("90 % of it by shading", "ad 12 in slot 2 of request 7", "1.5", "0.9", "0.02", "by overbidding: 0.00 %"):
        assert part in gate.reason
    assert "80 % of it by overbidding" in ic_gate({**HONEST, "shading_share": 0.2, "worst": worst}, "learned", GATES).reason


@pytest.mark.parametrize("value", [*NOT_MEASURED, -0.001, 0.2001])
def test_calibration_gate_passes_nothing_but_a_small_measured_dev(value: Any) -> None:
    assert calibration_gate(value, GATES).approved is False


def test_gates_pass_what_is_good() -> None:
    for value in (0.0, 0.03, np.float64(0.01)):
        gate = ic_gate({**HONEST, "psi_exact_model": value}, "learned", GATES)
        assert gate.approved is True and gate.value == value and "learned" in gate.reason
    assert calibration_gate(0.02, GATES).approved is True


def frame(policy: str, revenue: np.ndarray, ids: np.ndarray | None = None) -> pd.DataFrame:
    ids = np.arange(len(revenue)) if ids is None else ids
    return pd.DataFrame({"policy": policy, "request_id": ids, "user_id": ids // 3, "revenue": revenue})


def test_revenue_gate_is_paired() -> None:
    """A lift far below the noise of either policy shows once the same requests are compared; an unpaired bound would not see it."""
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 2, 900)
    both = pd.concat([frame("new", 1.02 * base + 0.01 * rng.normal(size=900)), frame("old", base).sample(frac=1.0, random_state=1)])
    gate = revenue_gate(both, "new", "old", GATES)
    assert gate.approved is True and 0.015 < (gate.value or 0) < 0.02
    assert revenue_gate(both, "old", "new", GATES).approved is False
    assert revenue_gate(both, "new", "old", GateConfig(minimum_lift=0.05)).approved is False
    same = pd.concat([frame("new", base), frame("old", base)])
    assert revenue_gate(same, "new", "old", BETTER).approved is False  # equal is not better
    assert revenue_gate(same, "new", "old", GateConfig(minimum_lift=-0.01)).approved is True


@pytest.mark.parametrize(
    "both",
    [
        frame("old", np.ones(9)),
        frame("new", np.ones(9)),
        pd.concat([frame("new", np.ones(9)), frame("old", np.ones(8))]),
        pd.concat([frame("new", np.ones(9)), frame("old", np.ones(9), np.arange(1, 10))]),
        pd.concat([frame("new", np.ones(9)), frame("old", np.zeros(9))]),
        pd.concat([frame("new", np.full(9, np.nan)), frame("old", np.ones(9))]),
        pd.concat([frame("new", np.full(9, np.inf)), frame("old", np.ones(9))]),
        pd.concat([frame("new", 2 * np.ones(9)), frame("old", np.full(9, np.nan))]),
        pd.concat([frame("new", 2 * np.ones(2)), frame("old", np.ones(2))]),  # one user: no interval
    ],
    ids=["no candidate", "no incumbent", "fewer", "others", "no revenue", "nan", "inf", "nan base", "one user"],
)
def test_revenue_gate_refuses_what_cannot_be_compared(both: pd.DataFrame) -> None:
    gate = revenue_gate(both, "new", "old", GATES)
    assert gate.approved is False and gate.value is None and gate.reason


@pytest.mark.parametrize(
    ("psi", "learned", "critical", "mode"),
    [(0.01, 1.0, 1.0, "learned"), (0.01, 0.94, 1.0, "critical"), (0.04, 2.0, 1.0, "critical"), (float("nan"), 2.0, 1.0, "critical"), (-0.01, 2.0, 1.0, "critical"),
     (0.01, float("nan"), 1.0, "critical"), (0.01, 1.0, 0.0, "critical"), (0.01, 1.0, float("nan"), "critical")],
)  # fmt: skip
def test_learned_prices_must_earn_their_place(psi: float, learned: float, critical: float, mode: str) -> None:
    metrics = {"policy": "ega_v1", "psi": {"learned": {**HONEST, "psi_exact_model": psi}}, "policies": {"ega_v1/learned": {"erpm": learned}, "ega_v1/critical": {"erpm": critical}}}
    assert choose_price_mode(metrics, GATES) == mode


def test_finite_only_is_strict_json() -> None:
    value = finite_only({"a": np.float64("nan"), "b": [np.int64(3), float("inf"), {"c": np.bool_(True)}], "d": ("x", 1.5)})
    assert value == {"a": None, "b": [3, None, {"c": True}], "d": ["x", 1.5]}
    json.dumps(value, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# Replay


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Test days replayed by an untrained but shaken network whose two evaluators are one and the same."""
    folder = tiny_samples(tmp_path_factory.mktemp("replay") / "samples", requests=240, ads=30, unexposed=8)
    samples = Samples(folder)
    network = build_network(NETWORK, samples, 2)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(network.named_parameters()):
            if not any(part in name for part in ("evaluator.click", "evaluator.purchase", "evaluator.examination", "evaluator.level")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    network.evaluation_evaluator.load_state_dict(network.evaluator.state_dict())
    return SimpleNamespace(folder=folder, samples=samples, network=network, result=replay(network, samples, EvaluationConfig(batch=16)))


def test_replay_covers_every_policy_on_the_same_test_requests(market: SimpleNamespace) -> None:
    per_request, samples = market.result.per_request, market.samples
    expected = {"logged", *(f"ega_v1/{mode}" for mode in PRICE_MODES), *(f"separable/{mode}" for mode in PRICE_MODES if mode != "learned")}
    assert set(per_request["policy"]) == expected == set(market.result.metrics["policies"])
    test = samples.split_rows(schema.TEST)
    for _, rows in per_request.groupby("policy"):
        np.testing.assert_array_equal(rows["request_id"], samples.request_id[test])
        np.testing.assert_array_equal(rows["user_id"], samples.user_id[test])
    assert market.result.metrics["requests"] == len(test)


def test_tables_of_a_replay_agree(market: SimpleNamespace) -> None:
    """Per-request sums are the sums of page rows; the policy table is their mean."""
    pages, per_request, table = market.result.pages, market.result.per_request, market.result.metrics["policies"]
    pages = pages.assign(revenue=pages["payment"] * pages["pctr"], bid_value=pages["bid"] * pages["pctr"])
    summed = pages.groupby(["policy", "request_id"])[["pctr", "revenue", "bid_value"]].sum()
    stated = per_request.set_index(["policy", "request_id"])
    assert len(summed) == len(stated)
    for mine, theirs in (("pctr", "clicks"), ("revenue", "revenue"), ("bid_value", "bid_value")):
        np.testing.assert_allclose(summed[mine], stated[theirs].loc[summed.index], rtol=1e-5, err_msg=theirs)
    for policy, rows in per_request.groupby("policy"):
        assert table[policy]["erpm"] == pytest.approx(1000 * rows["revenue"].mean())
        assert table[policy]["ectr_percent"] == pytest.approx(100 * rows["clicks"].mean())
        assert table[policy]["erpm_interval"][0] < table[policy]["erpm"] < table[policy]["erpm_interval"][1]


def test_off_policy_estimates_of_a_replay_stand_beside_what_was_forecast(market: SimpleNamespace) -> None:
    """The direct method is the policy table's own figure; the logged row is what was really clicked; weights follow the log's propensities."""
    table, samples = market.result.metrics["off_policy"], market.samples
    rows = samples.split_rows(schema.TEST)
    clicks = np.asarray(samples.click[rows, : samples.slots]) * (np.asarray(samples.candidate[rows, : samples.slots]) >= 0)
    assert table["requests"] == len(rows) and table["logged"]["ectr_percent"][0] == pytest.approx(100 * clicks.sum(1).mean())
    assert set(table["policies"]) == set(market.result.metrics["policies"]) - {"logged"}
    for policy, entry in table["policies"].items():
        for measure, name in (("ectr_percent", "ectr_interval"), ("erpm", "erpm_interval")):
            stated = market.result.metrics["policies"][policy]
            assert entry[measure]["cascade"]["direct"] == pytest.approx([stated[measure], *stated[name]], rel=1e-5)
            assert entry[measure]["reward_model"] == pytest.approx(stated[measure], rel=1e-5)  # both evaluators of this network are one
    pages = market.result.pages[market.result.pages["policy"] == "ega_v1/critical"].set_index(["request_id", "slot"])["ad_id"]
    logged = market.result.pages[market.result.pages["policy"] == "logged"].set_index(["request_id", "slot"])["ad_id"]
    for slot in range(1, samples.slots + 1):  # the fixture's propensities are all 1/2
        agree = (pages.xs(slot, level="slot") == logged.xs(slot, level="slot").reindex(pages.xs(slot, level="slot").index)).mean()
        assert table["policies"]["ega_v1/critical"]["erpm"]["slot"]["mean_weight"][slot - 1][0] == pytest.approx(2 * agree)


def test_pages_of_a_replay_are_valid(market: SimpleNamespace) -> None:
    pages, samples = market.result.pages, market.samples
    assert (pages["payment"] <= pages["bid"] * (1 + 1e-6)).all() and (pages["payment"] >= 0).all()
    assert not pages.duplicated(["policy", "request_id", "slot"]).any() and not pages.duplicated(["policy", "request_id", "ad_id"]).any()
    assert pages["slot"].between(1, 5).all()
    served = pages[pages["policy"] != "logged"]
    np.testing.assert_allclose(served["bid"], samples.bid[-1][np.searchsorted(samples.ad_id, served["ad_id"])], rtol=1e-6)  # currency again
    logged = pages[pages["policy"] == "logged"].sort_values(["request_id", "slot"])
    test = samples.split_rows(schema.TEST)
    np.testing.assert_array_equal(logged["ad_id"], samples.ad_id[samples.candidate[test, :5]].ravel())
    np.testing.assert_allclose(logged["payment"], samples.exposed_payment[test].ravel())
    first = pages[pages["policy"] == "ega_v1/first_price"]
    np.testing.assert_allclose(first["payment"], first["bid"], rtol=1e-12)


def test_critical_prices_are_honest_and_gsp_is_not(market: SimpleNamespace) -> None:
    """The evaluators agree and read no page yet, so critical pricing is exactly truthful; first prices leave winners no utility to divide by."""
    measured = market.result.metrics["psi"]
    psi = {mode: value["psi_exact"] for mode, value in measured.items()}
    assert 0 <= psi["critical"] < 1e-3
    assert psi["gsp"] > 0.01 and psi["learned"] > 0.01
    assert not psi["first_price"] <= GATES.psi_limit and not ic_gate(measured["first_price"], "first_price", GATES).approved
    assert measured["gsp"]["psi_paper"] > 0
    for which in ("psi_loser", "psi_loser_model"):
        assert measured["critical"][which] == 0.0  # every threshold of a loser exceeds its value
        assert measured["gsp"][which] > 0  # the next score on a page with affinities may be below the loser's own
    assert measured["gsp"]["worst"]["gain"] > 0 and 0 <= measured["gsp"]["shading_share"] <= 1


def test_lies_of_a_few_ads_peak_at_the_truth_under_critical_prices(market: SimpleNamespace) -> None:
    lies = {name: market.result.plots[f"lie_{name}"] for name in ("bid", "value", "ad", "slot", *PRICE_MODES)}
    assert lies["bid"].shape == lies["critical"].shape == (4, LIES) and len(set(lies["ad"])) == 4
    at_truth = np.argmin(np.abs(lies["bid"] - lies["value"][:, None]), axis=1)
    np.testing.assert_allclose(lies["bid"][np.arange(4), at_truth], lies["value"])
    for mode in PRICE_MODES:
        np.testing.assert_allclose(lies[mode][np.arange(4), at_truth], 0.0, atol=1e-9)  # gain over the truth
    assert lies["critical"].max() < 1e-6 * lies["value"].max() < lies["gsp"].max()
    assert "<svg" in plots.lies_svg(market.result.plots, "critical")


def test_another_evaluator_shows_regret_that_the_own_does_not(market: SimpleNamespace) -> None:
    network = build_network(NETWORK, market.samples, 2)
    network.load_state_dict(market.network.state_dict())
    with torch.no_grad():
        for parameter in network.evaluation_evaluator.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    psi = replay(network, market.samples, EvaluationConfig(requests=20)).metrics["psi"]
    assert psi["critical"]["psi_exact"] > 1e-3


def test_an_incumbent_that_is_the_candidate_earns_the_same(market: SimpleNamespace) -> None:
    same = Incumbent(market.network, market.samples.vocabulary, "critical", "a" * 12)
    result = replay(market.network, market.samples, EvaluationConfig(requests=24, batch=16), same)
    revenue = result.per_request.pivot_table(index="request_id", columns="policy", values="revenue")
    np.testing.assert_allclose(revenue["incumbent"], revenue["ega_v1/critical"], rtol=1e-6)
    assert not judge(result.metrics, result.per_request, "critical", "incumbent", BETTER)[1].approved  # equal does not beat
    half = {name: values[::2] for name, values in market.samples.vocabulary.items()}
    sizes = type(market.network.sizes)(**{name: len(values) + schema.FIRST_CODE for name, values in half.items()})
    older = Incumbent(type(market.network)(NETWORK, sizes).eval(), half, "critical", "b" * 12)
    other = replay(market.network, market.samples, EvaluationConfig(requests=24, batch=16), older)
    assert np.isfinite(other.per_request["revenue"]).all() and other.metrics["policies"]["incumbent"]["erpm"] > 0


@pytest.mark.parametrize("who", ["displayed", "losers"])
def test_gsp_and_vcg_prices_of_misreports_equal_a_rerun(who: str) -> None:
    network = tiny_network(noise=0.5)
    network.generator.add.weight.data.zero_()
    network.generator.add.bias.data.zero_()
    pool = random_pool(network, requests=4, ads=9, padded=False, reserve=1.2)
    served = allocate(network, pool)
    q, bids, reserve = torch.sigmoid(pool.click).double().numpy(), pool.bid.double().numpy(), pool.reserve.double().numpy()
    affinity, slopes = (x.detach().double().numpy() for x in network.generator(pool.h, pool.mask, pool.user))
    assert not pool.allowed.all()
    pages: Audit = served if who == "displayed" else audit_losers(network, pool, served, 3, (network.evaluator,))[0]
    alpha = slot_clicks(network, 5)
    assert alpha[0] == 1.0 and (np.diff(alpha) <= 0).all() and alpha[-1] > 0
    played = truthful(pool, served)
    for mode in ("gsp", "vcg"):
        np.testing.assert_allclose(trial_prices(network, pool, served, played, mode)[..., 0], prices(network, pool, served, mode), rtol=1e-6)
    trial = pages.bid[:, :, None] * np.array([0.4, 0.8, 1.5, 4.0, 20.0])
    bidding = try_bids(pool, pages, trial)
    mine = {mode: trial_prices(network, pool, pages, bidding, mode) for mode in ("gsp", "vcg")}
    compared = 0
    for b, j, t in np.ndindex(trial.shape):
        ad, changed = pages.pages[b, j], bids[b].copy()
        if ad < 0 or bidding.slot[b, j, t] < 0:
            continue
        changed[ad] = trial[b, j, t]
        eligible = changed >= reserve[b]
        page = auction.greedy_allocation(q[b], changed, affinity[b], slopes[b], 5, eligible)
        place = int(np.flatnonzero(page == ad)[0])
        assert mine["gsp"][b, j, t] == pytest.approx(auction.gsp_prices(q[b], changed, page, reserve[b], eligible=eligible)[place], rel=1e-6)
        assert mine["vcg"][b, j, t] == pytest.approx(auction.vcg_prices(q[b], changed, page, alpha, reserve[b], eligible=eligible)[place], rel=1e-6)
        compared += 1
    assert compared > 20


def test_no_test_days_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    folder = tiny_samples(tmp_path / "samples", requests=40)
    np.save(folder / "split.npy", np.zeros(40, np.int8))
    samples = Samples(folder)
    with pytest.raises(ValueError, match="no test requests.*sampling.test_days"):
        replay(build_network(NETWORK, samples, 1), samples, EvaluationConfig())


def test_a_candidate_from_files_to_a_bundle(market: SimpleNamespace, tmp_path: Path) -> None:
    config = replace(TRAINING, **{stage: replace(getattr(TRAINING, stage), steps=2, validate_every=1) for stage in STAGES["ega_v1"]})
    threads = torch.get_num_threads()
    for stage in STAGES["ega_v1"]:
        last = train_stage(stage, market.folder, NETWORK, config, tmp_path / "stages", tmp_path / "checkpoints", 3)
    arguments = (market.folder, tmp_path / "stages", NETWORK, config, EvaluationConfig(requests=30))
    metrics = evaluate_candidate(*arguments, GATES, tmp_path / "evaluation", 3)
    assert isinstance(metrics["approved"], bool) and {gate["name"] for gate in metrics["gates"]} == {"incentive_compatibility", "revenue", "calibration"}
    assert metrics["incumbent"] == "logged" and list(dict.fromkeys(row["stage"] for row in metrics["moved"])) == ["pretrain", "reward", "rlaf", "payment"]
    written = json.loads((tmp_path / "evaluation" / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in metrics.json"))
    assert written["approved"] == metrics["approved"]
    assert len(pd.read_parquet(tmp_path / "evaluation" / "pages.parquet")) > 0
    impossible = evaluate_candidate(*arguments, GateConfig(psi_limit=-1.0), tmp_path / "no", 3)
    assert impossible["approved"] is False and impossible["price_mode"] == "critical"
    version = bundle_candidate(market.folder, tmp_path / "stages", NETWORK, metrics, {}, tmp_path / "bundle", 3, b"k" * 32)
    assert version == sha256_of(last.weights)[:12] == load_bundle(tmp_path / "bundle", b"k" * 32).version
    torch.set_num_threads(threads)
