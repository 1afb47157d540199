"""The cascades: their networks against plain versions, what each stage may see, stage labels, calibration, serving."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_tiny import CASCADE, NETWORK, SIZES, TRAINING, random_batch
from samples_fixture import learnable, tiny_samples

from components.candidate import off_policy_rows
from marketplace import schema
from model.bundle import load_bundle, write_bundle
from model.cascade.config import CascadeConfig
from model.cascade.din import ActivationUnit
from model.cascade.dssm import Dssm
from model.cascade.network import TOWERS, Cascade
from model.ega_v1.engine import RankingEngine
from model.ega_v1.mechanism import allocate, prices
from model.evaluation.evaluate import what_moved
from model.evaluation.plots import curve_page
from model.evaluation.replay import EvaluationConfig, replay
from model.kinds import STAGES, create, previous_stage
from model.training.cascade import pairwise_loss, priorities, tower_loss, tower_metrics
from model.training.data import Samples
from model.training.run import load_final, load_stage, train_stage
from model.training.stages import PAGE_INPUTS, encode_city, encode_exposed, newest, pretrain_metrics

LEARNING = replace(TRAINING, pretrain=replace(TRAINING.pretrain, steps=40, learning_rate=1e-2), relabel=replace(TRAINING.relabel, learning_rate=1e-2))


def tiny_cascade(seed: int = 0, **change: object) -> Cascade:
    """Shaken as `tiny_network` is."""
    torch.manual_seed(seed)
    network = Cascade(replace(CASCADE, **change), SIZES)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """FS-LTR: all stages, and MCA's as far as they go."""
    root = tmp_path_factory.mktemp("cascade")
    folder = learnable(tiny_samples(root / "samples", requests=160, ads=30, unexposed=8))
    threads = torch.get_num_threads()
    for stage in STAGES["fs_ltr"]:
        train_stage(stage, folder, CASCADE, LEARNING, root / "stages", root / "checkpoints", seed=5)
    torch.set_num_threads(threads)
    samples = Samples(folder)
    return SimpleNamespace(folder=folder, samples=samples, stages=root / "stages", network=load_final(samples, CASCADE, root / "stages", 5))


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("count", [4, 8])  # few ads for the hidden units, and many: two ways to compute the same
def test_the_split_activation_unit_equals_the_concatenated_one(count: int) -> None:
    """DIN's unit reads (ad, behaviour, ad - behaviour, ad * behaviour) through one layer; splitting that layer changes nothing."""
    torch.manual_seed(0)
    unit = ActivationUnit(6, (5, 3)).eval()
    ads, behaviours = torch.randn(2, count, 6), torch.randn(2, 7, 6)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    # One weight [5, 24] over the concatenation: the difference adds its part to the ad's and takes it from the behaviour's.
    difference = torch.randn(5, 6)
    whole = torch.cat([unit.candidate.weight - difference, unit.behaviour.weight + difference, difference, unit.product.weight], 1)
    a, b = ads[:, :, None].expand(-1, -1, 7, -1), behaviours[:, None].expand(-1, count, -1, -1)
    x = torch.cat([a, b, a - b, a * b], -1) @ whole.T + unit.candidate.bias
    expected = unit.rest(unit.dice(x.reshape(2, 7 * count, 5))).reshape(2, count, 7) * mask.unsqueeze(1)
    found = unit(ads, torch.ones(2, count, dtype=torch.bool), behaviours, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_both_ways_of_the_activation_unit_train_alike() -> None:
    """Output, gradients and Dice's statistics, with padding among behaviours and ads and a request without any behaviour."""
    torch.manual_seed(0)
    ads, behaviours = torch.randn(3, 6, 6), torch.randn(3, 7, 6)
    mask, ad_mask = torch.arange(7) < torch.tensor([[7], [3], [0]]), torch.arange(6) < torch.tensor([[6], [4], [6]])
    factored, pairs = ActivationUnit(6, (5, 3)), ActivationUnit(6, (5, 3))
    pairs.load_state_dict(factored.state_dict())
    seen = []
    for unit, call in ((factored, factored._factored), (pairs, pairs._pairs)):
        inputs = ads.clone().requires_grad_(), behaviours.clone().requires_grad_()
        out = call(inputs[0], ad_mask, inputs[1], mask)
        (out * ad_mask.unsqueeze(2)).square().sum().backward()
        seen.append([out, *(x.grad for x in inputs), *(weight.grad for weight in unit.parameters()), unit.dice.mean, unit.dice.variance])
    assert seen[0][0].abs().sum() > 0 and (seen[1][0][2] == 0).all()
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_towers_read_padding_never_and_each_ad_by_itself() -> None:
    torch.manual_seed(0)
    towers = Dssm(8, (6,))
    user, behaviours = torch.randn(3, 8), torch.randn(3, 5, 8)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5])
    changed = torch.where(mask.unsqueeze(-1), behaviours, torch.nan)
    torch.testing.assert_close(towers.request_vectors(user, behaviours, mask), towers.request_vectors(user, changed, mask))
    network, batch = tiny_cascade(), random_batch(padded=False)
    few = replace(batch, ad_fields=batch.ad_fields[:, :5], ad_mask=batch.ad_mask[:, :5], ad_place=batch.ad_place[:, :5])
    with torch.no_grad():
        for stage in ("recall", "prerank"):
            torch.testing.assert_close(network.tower_scores(stage, batch)[:, :5], network.tower_scores(stage, few))
        torch.testing.assert_close(network.encode(batch)[0][:, :5], network.encode(few)[0])


@pytest.mark.parametrize("crosses", [False, True])
def test_only_what_prerank_hands_on_is_ranked(crosses: bool) -> None:
    network, batch = tiny_cascade(cross_features=crosses), random_batch(ads=24)
    also = torch.tensor([[0, 3]] * 6)
    with torch.no_grad():
        states = network.city_states(batch.ad_fields, batch.ad_mask)
        recalled, ranked = network.handed_on(states, batch)
        h, user, reached = network.survey(states, batch, also)
        whole, _ = network.encode(batch)
        scores = network.tower_scores("recall", batch)
    assert torch.equal(reached, ranked) and bool((ranked <= recalled).all()) and bool((recalled <= batch.ad_mask).all())
    real = batch.ad_mask.sum(1)
    assert recalled.sum(1).tolist() == real.clamp(max=12).tolist() and ranked.sum(1).tolist() == real.clamp(max=8).tolist()
    for row in range(6):  # brute force: nobody outside has a higher score than anybody inside
        inside, outside = scores[row][recalled[row]], scores[row][batch.ad_mask[row] & ~recalled[row]]
        assert len(outside) == 0 or inside.min() >= outside.max()
    read = reached.clone()
    read.scatter_(1, also, True)
    torch.testing.assert_close(h[read], whole[read], atol=1e-5, rtol=1e-5)
    assert bool((h[~read] == 0).all()) and user.shape == (6, 16)


def test_a_citys_ads_serve_all_requests_and_old_behaviours_are_not_read() -> None:
    network, batch = tiny_cascade(), random_batch(padded=False)
    one = replace(batch, ad_fields=batch.ad_fields[:1], ad_mask=batch.ad_mask[:1], ad_place=batch.ad_place[:1])
    spread = replace(batch, **{name: getattr(batch, name)[:1].expand(6, *getattr(batch, name).shape[1:]) for name in ("ad_fields", "ad_mask", "ad_place")})
    old = batch.behaviours.clone()
    old[:, CASCADE.cascade.behaviours :] = schema.UNKNOWN
    with torch.no_grad():
        for left, right in zip(network.survey(network.city_states(one.ad_fields, one.ad_mask), one), network.survey(network.city_states(spread.ad_fields, spread.ad_mask), spread), strict=True):
            torch.testing.assert_close(left, right)
        torch.testing.assert_close(network.encode(batch)[0], network.encode(replace(batch, behaviours=old))[0])


def test_a_stage_cannot_hand_on_more_than_it_was_given() -> None:
    with pytest.raises(ValueError, match="prerank 30 must not exceed recall 20"):
        CascadeConfig(recall=20, prerank=30)
    with pytest.raises(ValueError, match="stage 'rlaf' is not one of mca; its stages are recall, prerank, pretrain, evaluation"):
        previous_stage("mca", "rlaf")


def test_each_stage_learns_its_own_parameters() -> None:
    network = tiny_cascade()
    sets = {stage: {id(p) for p in network.enter_stage(stage)} for stage in STAGES["mca"]}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == len(list(network.parameters()))
    relabel = {id(p) for p in network.enter_stage("relabel")}
    assert relabel == sets["pretrain"] - {id(network.unexposed), id(network.slot_bias)}  # the towers learn their part by themselves


# ---------------------------------------------------------------------------------------------------------------------
# Losses and labels


def test_tower_loss_estimates_the_softmax_over_all_ads() -> None:
    """Averaged over draws, the sampled partition function is that of the whole city."""
    rng = np.random.default_rng(0)
    ads, chance = 40, 0.3
    score = rng.normal(0, 1, ads)
    whole = np.exp(score).sum()
    partition = []
    for _ in range(4000):
        drawn = np.flatnonzero(rng.random(ads - 1) < chance) + 1  # ad 0 is chosen and always in the sample
        batch = SimpleNamespace(
            click=torch.tensor([[1.0] + [0.0] * len(drawn)]), inputs=SimpleNamespace(ad_mask=torch.ones(1, len(drawn) + 1, dtype=torch.bool)),
            exposed=torch.zeros(1, len(drawn) + 1, dtype=torch.bool), log_inclusion=torch.full((1, len(drawn) + 1), float(np.log(chance))),
        )  # fmt: skip
        logits = torch.tensor(score[[0, *drawn]])[None]
        partition.append(float(torch.exp(tower_loss(logits, batch))) * np.exp(score[0]))
    mean, error = np.mean(partition), np.std(partition) / np.sqrt(len(partition))
    assert abs(mean - whole) < 4 * error


def test_pairwise_loss_is_the_mean_over_pairs_of_different_priority() -> None:
    rng = np.random.default_rng(0)
    score, priority = rng.normal(0, 1, (3, 6)), rng.integers(0, 7, (3, 6))
    priority[2] = 2  # no pair
    expected = []
    for s, p in zip(score[:2], priority[:2], strict=True):
        pairs = [np.log1p(np.exp(s[j] - s[i])) for i in range(6) for j in range(6) if p[i] > p[j] > 0]
        expected.append(np.mean(pairs))
    assert float(pairwise_loss(torch.tensor(score), torch.tensor(priority))) == pytest.approx(np.mean(expected))


def test_priorities_say_what_the_cascade_did(trained: SimpleNamespace) -> None:
    teacher = load_stage("pretrain", trained.samples, CASCADE, trained.stages, 5)
    rows = trained.samples.split_rows(schema.TRAIN)[:40]
    label = priorities(teacher, trained.samples, rows)
    pool = encode_city(teacher, trained.samples, rows, 1 << 30, 0)
    candidate = np.asarray(trained.samples.candidate[rows])
    assert set(np.unique(label[candidate >= 0])) <= {1, 2, 3, 4, 5, 6} and (label[candidate < 0] == 0).all()
    assert (label[np.asarray(trained.samples.click[rows]) > 0] == 6).all()
    slots = trained.samples.slots
    for row in range(len(rows)):
        ranked = set(pool.ad_rows[row][pool.mask[row].numpy()])
        for ad, priority in zip(candidate[row, slots:], label[row, slots:], strict=True):
            if ad >= 0 and priority < 6:
                assert (ad in ranked) is (priority in (3, 4))
        assert ((label[row, :slots] >= 5) | (candidate[row, :slots] < 0)).all()


def relabel(trained: SimpleNamespace, root: Path, **told: list[int]) -> SimpleNamespace:
    """FS-LTR's last stage, its validations after 0, 4 and 8 steps scored as told."""
    shutil.copytree(trained.stages / "pretrain", root / "pretrain")

    def ranked(*arguments: object) -> dict[str, float]:
        return {**pretrain_metrics(*arguments), "score": float(told["ranking"].pop(0))}

    def found(network: Cascade, part: str, *arguments: object) -> dict[str, float]:
        return {**tower_metrics(network, part, *arguments), "score": float(told[part].pop(0))}

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.training.cascade.tower_metrics", found)
        patch.setattr("model.training.cascade.pretrain_metrics", ranked)
        record = train_stage("relabel", trained.folder, CASCADE, LEARNING, root, root / "checkpoints", seed=5).result
    torch.set_num_threads(threads)
    return SimpleNamespace(stages=root, record=record)


@pytest.fixture(scope="module")
def relabelled(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Recall is best after 4 steps, pre-ranking before the first, DIN after 8."""
    return relabel(trained, tmp_path_factory.mktemp("relabelled"), recall=[1, 3, 2], prerank=[3, 1, 2], ranking=[1, 2, 3])


def moved(trained: SimpleNamespace, stages: Path) -> set[str]:
    """Parts of MCA that relabelling changed."""
    before, after = (load_stage(stage, trained.samples, CASCADE, folder, 5).state_dict() for stage, folder in (("pretrain", trained.stages), ("relabel", stages)))
    return {name.split(".")[0] for name, weight in after.items() if not torch.equal(weight, before[name])}


def test_every_network_of_fs_ltr_keeps_what_was_best_for_it(trained: SimpleNamespace, relabelled: SimpleNamespace) -> None:
    record = relabelled.record
    assert {name: (part["best_step"], part["best_score"]) for name, part in record["parts"].items()} == {"recall": (4, 3.0), "prerank": (0, 3.0)}
    assert (record["best_step"], record["best_score"]) == (8, 3.0)
    parts, after = moved(trained, relabelled.stages), load_stage("relabel", trained.samples, CASCADE, relabelled.stages, 5)
    assert {"recall", "din", "click_head"} <= parts and not parts & {"prerank", "evaluation_evaluator", "slot_bias"}
    check = newest(trained.samples.split_rows(schema.VALIDATION), LEARNING.relabel.validation_requests)
    for part, best in (("recall", 4), ("prerank", 0)):
        told = next(entry for entry in record["parts"][part]["history"] if entry["step"] == best)
        metrics = tower_metrics(after, part, trained.samples, check, LEARNING.relabel.recall_at)
        assert {name: told[name] for name in metrics if name != "score"} == {name: value for name, value in metrics.items() if name != "score"}
    # The calibration afterwards leaves the order as it is.
    assert pretrain_metrics(after, trained.samples, check, 64)["auc"] == pytest.approx(record["history"][-1]["auc"], abs=1e-6)


def test_a_ranking_that_its_labels_do_not_help_stays_calibrated_as_it_was(trained: SimpleNamespace, tmp_path: Path) -> None:
    found = relabel(trained, tmp_path, recall=[1, 2, 3], prerank=[1, 2, 3], ranking=[3, 2, 1])
    assert found.record["best_step"] == 0 and moved(trained, found.stages) == set(TOWERS)


def test_the_report_shows_every_network_of_relabelling(trained: SimpleNamespace, relabelled: SimpleNamespace) -> None:
    assert curve_page(relabelled.record).count("<svg") == 3
    rows = what_moved("fs_ltr", trained.stages, {"ranking": {}, "policies": {}})
    assert [row["stage"] for row in rows] == ["recall", "prerank", "pretrain", "relabel", "relabel", "relabel"]
    assert [row["what"].split(",")[0] for row in rows[3:]] == ["Recall@10 of SASRec alone", "Recall@10 of DSSM alone", "AUC"]
    assert all(row["before"] == before["after"] for row, before in zip(rows[3:5], rows[:2], strict=True))  # it starts where MCA ended


@pytest.mark.parametrize("stage", ["pretrain", "relabel"])
def test_pctr_in_the_slots_has_the_level_of_clicks(trained: SimpleNamespace, relabelled: SimpleNamespace, stage: str) -> None:
    """Of validation days among the whole city, as a page is priced: MCA's after ranking, FS-LTR's after its labels."""
    samples, rows = trained.samples, trained.samples.split_rows(schema.VALIDATION)
    assert len(rows) <= LEARNING.pretrain.calibration_requests
    network = load_stage(stage, samples, CASCADE, trained.stages if stage == "pretrain" else relabelled.stages, 5)
    terms, (clicks, purchases) = network.slot_logits(), network.evaluator.slot
    assert float(terms[0] - terms[-1]) > 0.3
    data = encode_exposed(network, samples, rows, whole_city=True)
    click, purchase = network.evaluator(*(data[name] for name in PAGE_INPUTS))
    clicked = float(data["click"][data["mask"]].mean())
    assert float(click.sigmoid()[data["mask"]].mean()) == pytest.approx(clicked, rel=1e-4)
    assert float(data["click_logit"].sigmoid()[data["mask"]].mean()) == pytest.approx(clicked, rel=1e-4)  # q alone has its own level
    assert float(clicks[0] - terms[0]) < -1e-3  # unequal slots raise the mean of a small probability
    torch.testing.assert_close(purchase, data["purchase_logit"] + purchases)
    assert (purchases.diff() <= 0).all() and purchases[0] == terms[0]
    torch.testing.assert_close(clicks - clicks[0], purchases - purchases[0])


# ---------------------------------------------------------------------------------------------------------------------
# The same house


def test_replay_judges_a_cascade_by_the_same_measures(trained: SimpleNamespace) -> None:
    result = replay(trained.network, trained.samples, EvaluationConfig(requests=24, batch=16))
    assert result.metrics["policy"] == "fs_ltr" and set(result.metrics["psi"]) == {"critical", "gsp", "vcg", "first_price"}
    assert set(result.metrics["policies"]) == {"logged", *(f"fs_ltr/{mode}" for mode in result.metrics["psi"])}
    # Separable clicks that do not rise down the page: critical prices are exactly truthful for who reaches the auction.
    assert result.metrics["psi"]["critical"]["psi_exact_model"] == pytest.approx(0.0, abs=1e-9)
    assert result.metrics["psi"]["gsp"]["psi_exact_model"] > 0
    # The run's report reads them too, though a cascade has no ranking by q*b beside its own.
    assert {row[0] for row in off_policy_rows({**result.metrics, "price_mode": "critical"}, None)} == {"logged", "fs_ltr/critical"}


def test_the_engine_serves_the_page_of_the_replay(trained: SimpleNamespace, tmp_path: Path) -> None:
    key = b"k" * 32
    write_bundle(tmp_path / "bundle", trained.network, trained.samples.vocabulary_document, {"price_mode": "critical"}, {}, key)
    bundle = load_bundle(tmp_path / "bundle", key)
    assert isinstance(bundle.network, Cascade) and bundle.manifest["kind"] == "fs_ltr"
    engine, samples = RankingEngine(bundle), trained.samples
    row = int(samples.split_rows(schema.TEST)[0])
    city = samples.city(int(samples.day[row]), int(samples.city_code[row]))
    state = engine.prepare_city(np.asarray(samples.ad_id)[city.rows], np.asarray(samples.ad_fields)[city.rows], np.asarray(samples.ad_place)[city.rows])
    assert state.cache.states.shape[-1] == bundle.network.state_width == 48
    page = engine.rank(
        state, samples.user_fields[row], samples.context_fields[row], samples.behaviours[row], samples.request_place[row], city.bid * city.unit,
        city.reserve * city.unit, np.ones(len(city.rows), bool), bid_unit=city.unit,
    )  # fmt: skip
    pool = encode_city(bundle.network, samples, np.array([row]), 1 << 30, 0)
    pages = allocate(bundle.network, pool, tie_key=state.tie_key)
    assert page.rows.tolist() == pages.pages[0][pages.pages[0] >= 0].tolist()
    np.testing.assert_allclose(page.price, prices(bundle.network, pool, pages, "critical")[0][: len(page.rows)] * city.unit, rtol=1e-6)


def test_create_makes_the_kind_that_is_named() -> None:
    assert type(create(CASCADE, SIZES)) is Cascade and type(create(NETWORK, SIZES)).__name__ == "EgaV1"
