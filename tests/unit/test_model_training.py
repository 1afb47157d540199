"""Training: what every stage moves, and the arithmetic of losses, rewards, misreports and prices against plain versions."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_tiny import NETWORK, TRAINING, random_pool, tiny_network
from safetensors.torch import load_file
from samples_fixture import learnable, tiny_samples

import auction
from auction.critical import reachable_slots, step_prices, step_prices_everywhere
from marketplace import schema
from model.ega_v1.mechanism import Audit, allocate, audit_losers, others_bids, page_logits, truthful, try_bids
from model.kinds import STAGES as STAGES_OF
from model.training import loop
from model.training.data import Samples, epoch_order
from model.training.loop import Device, LoopConfig, run_stage
from model.training.run import load_stage, train_stage
from model.training.stages import (
    PAGE_INPUTS,
    build_network,
    calibrate_clicks,
    encode_city,
    encode_exposed,
    exposed_logits,
    generator_scores,
    greedy_page,
    hide_ids,
    in_slot,
    logged_pages,
    marginal_rewards,
    misreports,
    payment_metrics,
    policy_metrics,
    pretrain_loss,
    regret_of,
    reward_metrics,
    sample_page,
    spread,
)

STAGES = STAGES_OF["ega_v1"]
STEPS = {"pretrain": 60, "reward": 60, "evaluation": 30, "rlaf": 40, "payment": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All stages on tiny samples, once for the module."""
    root = tmp_path_factory.mktemp("trained")
    folder = learnable(tiny_samples(root / "samples", requests=600, ads=40))
    config = replace(
        TRAINING,
        pretrain=replace(TRAINING.pretrain, steps=STEPS["pretrain"], validate_every=30, learning_rate=4e-3, batch=64),
        reward=replace(TRAINING.reward, steps=STEPS["reward"], validate_every=20, learning_rate=3e-3, batch=64, validation_requests=400),
        evaluation=replace(TRAINING.evaluation, steps=STEPS["evaluation"], validate_every=15, learning_rate=3e-3, batch=64),
        rlaf=replace(TRAINING.rlaf, steps=STEPS["rlaf"], validate_every=10, learning_rate=5e-3, kl=0.0, requests=200, batch=64),
        payment=replace(TRAINING.payment, steps=STEPS["payment"], validate_every=8, learning_rate=1e-2, requests=64, batch=16),
    )
    results = {stage: train_stage(stage, folder, NETWORK, config, root / "stages", root / "checkpoints", seed=5) for stage in STAGES}
    return SimpleNamespace(root=root, folder=folder, samples=Samples(folder), config=config, results=results)


def network_of(trained: SimpleNamespace, stage: str) -> Any:
    return load_stage(stage, trained.samples, NETWORK, trained.root / "stages", seed=5)


# ---------------------------------------------------------------------------------------------------------------------
# What the stages move


def history(trained: SimpleNamespace, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    record = trained.results[stage].result
    return record["history"][0], next(entry for entry in record["history"] if entry["step"] == record["best_step"])


def test_pretraining_raises_validation_auc(trained: SimpleNamespace) -> None:
    first, best = history(trained, "pretrain")
    assert best["auc_exposed"] > max(first["auc_exposed"], 0.5) + 0.05 and best["auc"] > max(first["auc"], 0.5) + 0.05
    losses = [entry["loss"] for entry in trained.results["pretrain"].result["history"][1:]]
    assert losses[-1] < losses[0]


def test_reward_training_lowers_the_log_loss_of_exposed_pages(trained: SimpleNamespace) -> None:
    for stage in ("reward", "evaluation"):
        record = trained.results[stage].result
        assert record["history"][0]["log_loss"] == pytest.approx(record["history"][0]["set_log_loss"], rel=0.1)  # it starts near the set-aware pCTR
    first, best = history(trained, "reward")
    assert best["log_loss"] < first["log_loss"] - 0.01 and best["auc"] > best["set_auc"]  # the slot matters, and only the evaluator sees it
    losses = [entry["loss"] for entry in trained.results["reward"].result["history"][1:]]
    assert losses[-1] < losses[0]


def test_rlaf_raises_the_value_of_its_pages(trained: SimpleNamespace) -> None:
    """Under the reward model it climbs on the training requests themselves; the kept weights never lose on validation."""
    record = trained.results["rlaf"].result
    assert record["best_score"] >= record["history"][0]["generator_evaluation"]
    assert record["history"][0]["generator_evaluation"] == pytest.approx(record["history"][0]["separable_evaluation"], rel=1e-6)
    assert max(entry["generator_reward"] for entry in record["history"]) >= record["history"][0]["generator_reward"]


def test_payment_training_lowers_psi(trained: SimpleNamespace) -> None:
    first, _ = history(trained, "payment")
    last = trained.results["payment"].result["history"][-1]
    assert 0 < last["psi"] < first["psi"]
    assert all(np.isfinite([entry["revenue_share"], entry["psi"]]).all() for entry in trained.results["payment"].result["history"])


def test_every_stage_changes_its_own_weights_only(trained: SimpleNamespace) -> None:
    states = {stage: load_file(trained.results[stage].weights) for stage in STAGES}
    network = build_network(NETWORK, trained.samples, 5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for before, after in itertools.pairwise(STAGES):
        allowed = {names[id(parameter)] for parameter in network.enter_stage(after)}
        changed = {name for name in states[before] if not torch.equal(states[before][name], states[after][name])}
        assert changed <= allowed, f"{after} moved {sorted(changed - allowed)[:3]}"
        if trained.results[after].result["best_step"] > 0 or after in ("reward", "evaluation"):
            assert changed


def test_a_finished_stage_is_not_trained_again_and_a_damaged_one_is(trained: SimpleNamespace) -> None:
    weights = trained.results["payment"].weights
    args = (trained.folder, NETWORK, trained.config, trained.root / "stages", trained.root / "checkpoints", 5)
    stamp, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert train_stage("payment", *args).result == trained.results["payment"].result and weights.stat().st_mtime_ns == stamp
    for damaged in (weights, weights.with_name("result.json")):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 4
        damaged.write_bytes(data[: len(data) - 9])
        assert train_stage("payment", *args).result["sha256"] == trained.results["payment"].result["sha256"]
        assert weights.read_bytes() == content


def test_stages_need_their_predecessor_and_a_name(trained: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train rlaf first"):
        train_stage("payment", trained.folder, NETWORK, TRAINING, tmp_path, tmp_path / "c", 1)
    with pytest.raises(ValueError, match="stages are pretrain"):
        train_stage("distil", trained.folder, NETWORK, TRAINING, tmp_path, tmp_path / "c", 1)


def test_samples_without_validation_days_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_samples(tmp_path / "samples", requests=40)
    np.save(folder / "split.npy", np.zeros(40, np.int8))
    with pytest.raises(ValueError, match="no validation requests"):
        train_stage("pretrain", folder, NETWORK, TRAINING, tmp_path / "o", tmp_path / "c", 1)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def toy(folder: Path, scores: list[float], config: LoopConfig, scale: float = 1.0) -> Any:
    network = tiny_network()
    parameters = network.enter_stage("payment")
    given = iter(scores)

    def step(rows: np.ndarray, noise: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return scale * sum(p.square().sum() for p in parameters), {}

    return network, run_stage("payment", network, parameters, config, np.arange(10), step, lambda: {"score": next(given)}, folder, {}, Device(threads=1))


def test_best_weights_are_kept_and_patience_ends_a_stage(tmp_path: Path) -> None:
    config = LoopConfig(steps=50, batch=2, validate_every=2, patience=2)
    network, result = toy(tmp_path / "a", [0.1, 0.5, 0.4, 0.3, 9.9], config)
    assert (result.best_step, result.best_score, result.steps) == (2, 0.5, 6)
    short, cut = toy(tmp_path / "b", [0.0, 0.5, 0.4], replace(config, patience=1))
    assert cut.best_step == 2 and torch.equal(short.payment.reduce.weight, network.payment.reduce.weight)


def test_a_nan_score_is_never_the_best_and_only_nan_is_an_error(tmp_path: Path) -> None:
    config = LoopConfig(steps=4, batch=2, validate_every=2, patience=9)
    _, result = toy(tmp_path / "a", [0.1, float("nan"), float("inf")], config)
    assert result.best_step == 0
    with pytest.raises(ValueError, match="no validation gave a finite score"):
        toy(tmp_path / "b", [float("nan")] * 3, config)


def test_an_infinite_gradient_stops_the_stage(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 0"):
        toy(tmp_path, [0.1], LoopConfig(steps=2, batch=2), scale=float("inf"))


def test_an_epoch_sees_every_row_once_and_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, config = np.arange(100, 124), LoopConfig(batch=6, seed=3)
    epoch = [loop._batch_rows(rows, config, step) for step in range(4)]
    assert sorted(np.concatenate(epoch)) == rows.tolist()
    assert not np.array_equal(epoch[0], loop._batch_rows(rows, config, 4))
    np.testing.assert_array_equal(epoch_order(rows, 3, 0), epoch_order(rows, 3, 0))
    monkeypatch.setattr(loop, "_world", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(loop, "_rank", lambda rank=rank: rank)
        shares.append(loop._batch_rows(rows, config, 1))
    assert sorted(np.concatenate(shares)) == sorted(epoch[1]) and len(shares[0]) == len(shares[1]) == 3


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["model.training.run"])


def two_stages(root: Path, variables: dict[str, str]) -> None:
    """What every process of torchrun would run."""
    os.environ.update(variables)
    config = replace(TRAINING, reward=replace(TRAINING.reward, steps=4, validate_every=2, requests=120, hidden_ids=0.0))
    for stage in ("pretrain", "reward"):
        train_stage(stage, root / "samples", NETWORK, config, root / "stages", root / "checkpoints", 5)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """The variables torchrun sets; gloo on the loopback. Stage 1 is given and no ids are hidden (each process hides its own), so that
    stage 2 compares step for step."""
    one, two = tmp_path / "one", tmp_path / "two"
    for root in (one, two):
        tiny_samples(root / "samples", requests=240, ads=30, unexposed=8)
    two_stages(one, {})
    (two / "stages").mkdir()
    os.symlink(one / "stages" / "pretrain", two / "stages" / "pretrain")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [_PROCESSES.Process(target=two_stages, args=(two, {**shared, "RANK": str(rank)})) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    single, double = (json.loads((root / "stages" / "reward" / "result.json").read_text()) for root in (one, two))
    assert single["best_step"] == double["best_step"] and single["steps"] == double["steps"]
    for a, b in zip(single["history"], double["history"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=2e-5)
    weights = [load_file(root / "stages" / "reward" / "model.safetensors") for root in (one, two)]
    start = load_file(one / "stages" / "pretrain" / "model.safetensors")
    for name, value in weights[0].items():
        moved = float((value - start[name]).abs().max())
        assert float((value - weights[1][name]).abs().max()) <= 0.02 * moved + 1e-5, name


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_log_q_recovers_the_true_probabilities() -> None:
    """Four kinds of unexposed candidates, chosen by users with probability p, drawn with probability pi unless chosen: the
    expected loss is minimal at p with the correction and at inflated odds without."""
    p, pi = torch.tensor([0.3, 0.1, 0.02, 0.3]), torch.tensor([0.05, 0.5, 0.1, 0.9])
    # Every kind as a positive with weight p and as a sampled negative with weight (1 - p) pi: replicate in that proportion.
    positive, negative = (p * 20_000).round().int(), ((1 - p) * pi * 20_000).round().int()
    kind = torch.cat([torch.arange(4).repeat_interleave(positive), torch.arange(4).repeat_interleave(negative)])
    label = torch.cat([torch.ones(int(positive.sum())), torch.zeros(int(negative.sum()))])
    for correction, expected in (("log_q", p), ("none", p / (p + (1 - p) * pi))):
        logit = torch.zeros(4, requires_grad=True)
        stub = SimpleNamespace(
            encode=lambda inputs: (torch.zeros(1, 1, 1), torch.zeros(1, 1)),
            heads=lambda h, user, logit=logit: (logit[kind][None], logit[kind][None].detach()),
            unexposed_logits=lambda logit, task: logit,
            config=SimpleNamespace(slots=len(kind)),
        )
        batch = SimpleNamespace(
            inputs=SimpleNamespace(ad_mask=torch.ones(1, len(kind), dtype=torch.bool)), click=label[None], purchase=label[None],
            exposed=torch.zeros(1, len(kind), dtype=torch.bool), log_inclusion=torch.log(pi)[kind][None], requests=np.zeros(1),
        )  # fmt: skip
        optimiser = torch.optim.LBFGS([logit], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure(optimiser: Any = optimiser, stub: Any = stub, batch: Any = batch, correction: str = correction) -> torch.Tensor:
            optimiser.zero_grad()
            loss = pretrain_loss(stub, batch, replace(TRAINING.pretrain, inclusion_correction=correction, slot_bias=False))
            loss.backward()
            return loss

        optimiser.step(closure)
        torch.testing.assert_close(torch.sigmoid(logit.detach()), expected, rtol=2e-3, atol=1e-4)


def test_exposed_candidates_are_never_shifted(trained: SimpleNamespace) -> None:
    network = network_of(trained, "pretrain")
    batch = trained.samples.batch(np.arange(12))
    batch.inputs.ad_mask = batch.inputs.ad_mask.clone()
    losses = []
    for shift in (0.0, 3.0):
        network.unexposed_start.fill_(shift)
        alone = replace(batch, click=batch.click, exposed=torch.ones_like(batch.exposed))
        losses.append((float(pretrain_loss(network, alone, TRAINING.pretrain)), float(pretrain_loss(network, batch, TRAINING.pretrain))))
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_batches_carry_the_samples_of_their_requests(trained: SimpleNamespace) -> None:
    samples, rows = trained.samples, np.array([7, 3, 150])
    batch = samples.batch(rows)
    np.testing.assert_array_equal(batch.requests, [3, 7, 150])
    np.testing.assert_array_equal(batch.inputs.ad_fields.numpy(), samples.ad_fields[samples.candidate[batch.requests]])
    np.testing.assert_array_equal(batch.click.numpy(), samples.click[batch.requests])
    assert batch.exposed.sum(1).tolist() == [5, 5, 5] and bool(batch.exposed[:, :5].all())
    for i, row in enumerate(batch.requests):
        unit = np.median(samples.bid[samples.day[row]])
        np.testing.assert_allclose(batch.bid[i, :5].numpy(), samples.exposed_bid[row] / unit, rtol=1e-6)
        np.testing.assert_allclose(batch.bid[i, 5:].numpy(), samples.bid[samples.day[row], samples.candidate[row, 5:]] / unit, rtol=1e-6)
    alone = samples.batch(rows, exposed_only=True)
    np.testing.assert_array_equal(alone.inputs.ad_fields.numpy(), batch.inputs.ad_fields[:, :5].numpy())


def test_prior_rates_undo_the_sampling(trained: SimpleNamespace) -> None:
    samples = trained.samples
    rows = samples.split_rows(schema.TRAIN)
    shown, elsewhere = samples.prior_rates
    assert shown == pytest.approx(samples.click[rows, :5].mean())
    weight = np.where(samples.click[rows, 5:] > 0, 1.0, np.exp(-samples.log_inclusion[rows, 5:].astype(float)))
    assert elsewhere == pytest.approx((weight * samples.click[rows, 5:]).sum() / weight.sum())


def test_another_models_vocabulary_is_spoken_exactly(trained: SimpleNamespace) -> None:
    samples, rng = trained.samples, np.random.default_rng(0)
    theirs = {}
    for name in schema.VOCABULARIES:
        mine = np.array(samples.vocabulary[name])
        kept = np.sort(rng.choice(mine, max(1, len(mine) // 2), replace=False))
        theirs[name] = np.sort(np.concatenate([kept, mine.max() + 1 + np.arange(3)])).tolist()
    other = samples.translate(theirs)
    requests, ads = np.array([2, 9, 30]), np.arange(12)[None]
    here, there = (s.inputs(requests, ads, np.ones((1, 12), bool)) for s in (samples, other))
    for fields, name in ((schema.AD_FIELDS, "ad_fields"), (schema.USER_FIELDS, "user_fields"), (schema.CONTEXT_FIELDS, "context_fields"), (schema.BEHAVIOUR_FIELDS, "behaviours")):
        a, b = getattr(here, name).numpy(), getattr(there, name).numpy()
        for index, field in enumerate(fields):
            for code, translated in zip(a[..., index].ravel(), b[..., index].ravel(), strict=True):
                if not field.vocabulary or code == schema.PADDING:
                    assert translated == code
                    continue
                raw = samples.vocabulary[field.vocabulary][code - schema.FIRST_CODE] if code >= schema.FIRST_CODE else None
                known = raw in theirs[field.vocabulary]
                assert translated == (theirs[field.vocabulary].index(raw) + schema.FIRST_CODE if known else schema.UNKNOWN)
    again = samples.translate(samples.vocabulary).inputs(requests, ads, np.ones((1, 12), bool))
    np.testing.assert_array_equal(again.behaviours, here.behaviours)
    assert not samples._translation  # the original speaks as before


def test_damaged_sample_folders_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_samples(tmp_path / "s", requests=20)
    np.save(folder / "click.npy", np.load(folder / "click.npy").astype(np.float64))
    with pytest.raises(ValueError, match=r"click.npy holds float64.*expected int8 \[R M\]"):
        Samples(folder)
    (folder / "click.npy").unlink()
    with pytest.raises(FileNotFoundError, match="click.npy is missing"):
        Samples(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The whole city


def test_thinning_keeps_the_best_and_never_changes_what_is_kept(trained: SimpleNamespace) -> None:
    network, samples = network_of(trained, "pretrain"), trained.samples
    rows = np.array([3, 40, 41, 200])
    whole, thin = encode_city(network, samples, rows, 1 << 30, 0, batch=3), encode_city(network, samples, rows, 12, 0, batch=2)
    assert whole.ad_rows.shape == (4, 40) and thin.ad_rows.shape == (4, 12)
    score = (whole.click.sigmoid() * whole.bid).numpy()
    for i in range(4):
        assert (np.diff(thin.ad_rows[i]) > 0).all()
        assert set(np.argsort(-score[i])[:6]) <= set(thin.ad_rows[i].tolist())
        torch.testing.assert_close(thin.h[i], whole.h[i, thin.ad_rows[i]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(thin.bid[i], whole.bid[i, thin.ad_rows[i]])
    again = encode_city(network, samples, rows, 12, 0, batch=2)
    np.testing.assert_array_equal(again.ad_rows, thin.ad_rows)
    assert (encode_city(network, samples, rows, 12, 9, batch=2).ad_rows != thin.ad_rows).any()


def test_cities_of_different_size_share_a_pool(tmp_path: Path) -> None:
    folder = tiny_samples(tmp_path / "s", requests=60, ads=30, unexposed=5)
    code = np.where(np.arange(30) < 22, 1, 2).astype(np.int32)
    np.save(folder / "ad_city.npy", code)
    np.save(folder / "city.npy", np.where(np.arange(60) % 3 == 0, 2, 1).astype(np.int32))
    samples = Samples(folder)
    network = tiny_network_for(samples)
    pool = encode_city(network, samples, np.arange(12), 1 << 30, 0)
    np.testing.assert_array_equal(pool.requests, np.arange(12))
    sizes = np.where(np.arange(12) % 3 == 0, 8, 22)
    np.testing.assert_array_equal(pool.mask.sum(1), sizes)
    assert (pool.ad_rows[~pool.mask.numpy()] == -1).all() and bool((pool.bid[~pool.mask] == 0).all())
    for i in range(12):
        assert (code[pool.ad_rows[i][pool.mask[i].numpy()]] == (2 if i % 3 == 0 else 1)).all()
        alone = encode_city(network, samples, np.array([i]), 1 << 30, 0)
        torch.testing.assert_close(alone.click[0], pool.click[i, : sizes[i]], rtol=1e-5, atol=1e-5)
    pages = allocate(network, pool)
    assert (pool.ad_rows[np.arange(12)[:, None], pages.pages] >= 0)[pages.pages >= 0].all()


def tiny_network_for(samples: Samples) -> Any:
    network = build_network(NETWORK, samples, 3)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return network.eval()


def test_logged_pages_are_found_among_the_city(trained: SimpleNamespace) -> None:
    samples, rows = trained.samples, np.arange(10)
    pool = encode_city(network_of(trained, "pretrain"), samples, rows, 1 << 30, 0)
    page = logged_pages(pool, samples)
    np.testing.assert_array_equal(pool.ad_rows[rows[:, None], page], samples.candidate[rows, :5])
    pool.ad_rows[4, 7:] = -1  # a shorter city
    cut = logged_pages(pool, samples)[4]
    np.testing.assert_array_equal(cut, np.where(samples.candidate[4, :5] < 7, samples.candidate[4, :5], -1))


def test_calibration_gives_the_clicks_their_level_and_their_spread(trained: SimpleNamespace) -> None:
    """Of an order alone: whatever the level and the spread of the head, as if it had not been touched."""
    samples, rows = trained.samples, trained.samples.split_rows(schema.VALIDATION)
    found = []
    for slope, level in ((1.0, 0.0), (5.0, 30.0)):
        network = network_of(trained, "pretrain")
        network.scale_clicks(slope, level)
        left = calibrate_clicks(network, samples, len(rows), of_order=True)
        again = exposed_logits(network, samples, rows, len(rows))
        np.testing.assert_allclose(left.sampled, again.sampled, atol=2e-5)
        np.testing.assert_allclose(left.city, again.city, atol=2e-5)
        pool = encode_city(network, samples, rows, 1 << 30, 0)
        logit = pool.click.gather(1, torch.from_numpy(logged_pages(pool, samples)))
        assert float(logit.sigmoid().mean()) == pytest.approx(float(samples.click[pool.requests, :5].mean()), rel=1e-5)
        found.append(logit)
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=2e-3)
    network.scale_clicks(-1.0, 0.0)
    with pytest.raises(ValueError, match="clicks of the validation days fall where the ranking score rises"):
        calibrate_clicks(network, samples, len(rows), of_order=True)


def test_stages_leave_calibrated_probabilities(trained: SimpleNamespace) -> None:
    network, samples = network_of(trained, "payment"), trained.samples
    rows = samples.split_rows(schema.VALIDATION)
    # Set on all validation requests with this many of them seen among the whole city.
    seen = exposed_logits(network, samples, rows, 64)
    assert abs(seen.level()) < 1e-4
    for which, evaluator in (("reward", network.evaluator), ("evaluation", network.evaluation_evaluator)):
        used = spread(rows, getattr(trained.config, which).validation_requests)
        data = encode_exposed(network, samples, used, whole_city=True)
        assert set(reward_metrics(evaluator, data)) >= {"score", "auc", "log_loss", "dev"}
        logit, _ = evaluator(*(data[name] for name in PAGE_INPUTS))
        levels = [float(torch.sigmoid(x)[data["mask"]].mean()) for x in (logit, data["click_logit"])]
        assert levels[0] == pytest.approx(levels[1], rel=1e-4)


def test_slot_term_takes_what_the_slot_did(trained: SimpleNamespace) -> None:
    network, samples = network_of(trained, "pretrain"), trained.samples
    term = network.slot_logits()
    assert float(term.sum()) == pytest.approx(0.0, abs=1e-5)
    assert float(term[0]) > float(term[2]) > float(term[4])  # `learnable` clicks fall with the slot
    logit = torch.zeros(2, samples.candidate.shape[1])
    placed = in_slot(network, logit)
    torch.testing.assert_close(placed[0, :5], term)
    assert bool((placed[:, 5:] == 0).all())  # unexposed ads have no slot

    def gradient(slot_bias: bool) -> torch.Tensor | None:
        network.enter_stage("pretrain")
        network.zero_grad(set_to_none=True)
        config = replace(trained.config.pretrain, slot_bias=slot_bias)
        pretrain_loss(network, samples.batch(samples.split_rows(schema.TRAIN)[:32]), config).backward()
        return network.slot_bias.grad

    assert gradient(False) is None
    assert float(gradient(True).abs().max()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3


def test_sampled_pages_follow_plackett_luce() -> None:
    torch.manual_seed(0)
    score, mask, draws = torch.randn(1, 5, 2), torch.tensor([[True, True, True, True, False]]), 40_000
    page, logp, entropy = sample_page(score.expand(draws, -1, -1), mask.expand(draws, -1), torch.Generator().manual_seed(1))
    first = torch.softmax(score[0, :4, 0], 0)
    for i, j in itertools.permutations(range(4), 2):
        left = [k for k in range(4) if k != i]
        second = torch.softmax(score[0, left, 1], 0)[left.index(j)]
        probability = float(first[i] * second)
        drawn = (page[:, 0] == i) & (page[:, 1] == j)
        assert float(drawn.float().mean()) == pytest.approx(probability, abs=4 * (probability / draws) ** 0.5)
        torch.testing.assert_close(logp[drawn][:1], torch.log(torch.stack([first[i], second]))[None], rtol=1e-5, atol=1e-5)
    assert not bool((page == 4).any())
    for i in range(4):  # the entropy is the mean over both slots, given the first choice
        second = torch.softmax(score[0, [k for k in range(4) if k != i], 1], 0)
        expected = -((first * first.log()).sum() + (second * second.log()).sum()) / 2
        torch.testing.assert_close(entropy[page[:, 0] == i][0], expected, rtol=1e-5, atol=1e-5)


def test_pages_of_a_city_with_fewer_ads_than_slots() -> None:
    """Three ads for five slots: no NaN, no gradient and no reward from the empty slots."""
    network = tiny_network(noise=0.5)
    pool = random_pool(network, requests=6)
    pool.mask[:3, 3:] = False
    score = generator_scores(network, pool).detach().requires_grad_()
    page, logp, entropy = sample_page(score, pool.mask, torch.Generator().manual_seed(0))
    assert bool((page[:3, :3] >= 0).all() and (page[:3, 3:] == -1).all() and (page[3:] >= 0).all())
    assert bool((logp[:3, 3:] == 0).all())
    reward = marginal_rewards(network, pool, score.detach(), page)
    assert bool(torch.isfinite(reward).all())
    (logp.sum() + entropy.sum()).backward()
    assert bool(torch.isfinite(score.grad).all())
    greedy = greedy_page(score.detach(), pool.mask)
    assert bool((greedy[:3, 3:] == -1).all())
    assert (allocate(network, pool).pages[:3, 3:] == -1).all()


@torch.no_grad()
def test_marginal_rewards_equal_plain_loops() -> None:
    network = tiny_network(noise=0.6)
    pool = random_pool(network, requests=5, reserve=0.0)
    score = generator_scores(network, pool)
    page, _, _ = sample_page(score, pool.mask, torch.Generator().manual_seed(3))
    rewards = marginal_rewards(network, pool, score, page)

    def value(request: int, ads: list[int]) -> float:
        one = pool.take(np.array([request]))
        logit = page_logits(network.evaluator, one, torch.tensor([ads]))[0][0]
        return sum(float(pool.bid[request, ad]) * float(torch.sigmoid(z)) for ad, z in zip(ads, logit, strict=True))

    for request, slot in itertools.product(range(5), range(5)):
        free = set(np.flatnonzero(pool.mask[request].numpy())) - {int(page[request, slot])}
        without = []
        for position in range(5):
            best = max(free, key=lambda ad, k=position: float(score[request, ad, k]))
            without.append(int(best))
            free.remove(best)
        assert float(rewards[request, slot]) == pytest.approx(value(request, page[request].tolist()) - value(request, without), abs=2e-5)


def test_policy_metrics_compare_both_policies_under_both_evaluators() -> None:
    network = tiny_network(noise=0.0)
    metrics = policy_metrics(network, random_pool(network), batch=5)
    assert metrics["generator_evaluation"] == pytest.approx(metrics["separable_evaluation"]) == pytest.approx(metrics["score"])
    assert metrics["generator_reward"] == pytest.approx(metrics["generator_evaluation"])  # both evaluators start alike


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4


def test_step_prices_everywhere_equal_the_auctions() -> None:
    """Every slot as the own slot through auction.critical, on monotone and non-monotone click rates, with reserves and jumps."""
    rng, compared = np.random.default_rng(0), 0
    for _ in range(200):
        slots = int(rng.integers(1, 6))
        theta = np.minimum.accumulate(rng.normal(1, 0.7, (3, slots)), axis=1)
        theta[rng.random(3) < 0.2, -1] = -np.inf
        theta[0, : int(rng.integers(0, slots + 1))] = np.inf
        reserve, ctr = 0.8 * rng.random(3), rng.random((3, slots))
        if rng.random() < 0.5:
            ctr = np.sort(ctr, axis=1)[:, ::-1].copy()
        mine = step_prices_everywhere(theta, ctr, reserve)
        for slot in range(slots):
            own = np.full(3, slot)
            level = np.maximum(theta, reserve[:, None])
            upper = np.inf if slot == 0 else level[:, slot - 1]
            open_interval = np.isfinite(level[:, slot]) & (level[:, slot] < upper * (1 - 1e-9))
            price, _ = step_prices(np.where(np.isfinite(theta), theta, np.where(theta > 0, 1e300, -1e300)), ctr, reachable_slots(theta, reserve, own), own, reserve)
            np.testing.assert_allclose(mine[open_interval, slot], price[open_interval], rtol=1e-9)
            compared += int(open_interval.sum())
    assert compared > 800


@pytest.mark.parametrize("who", ["displayed", "losers"])
@pytest.mark.parametrize(("seed", "slots"), [(0, 5), (1, 5), (2, 3), (3, 1)])
def test_trial_bids_give_what_a_rerun_auction_gives(seed: int, slots: int, who: str) -> None:
    """Slots, click rates, rivals and truthful prices of misreports from thresholds alone, against the auction run again."""
    network = tiny_network(seed=seed, noise=0.7)
    pool = random_pool(network, requests=4, ads=11, seed=seed)
    served = allocate(network, pool, slots=slots)
    pages: Audit = served
    rng = np.random.default_rng(seed)
    if who == "losers":
        pages = audit_losers(network, pool, served, 4, (network.evaluator,))[0]
        assert (pages.pages >= 0).sum() > 8 and not (pages.pages[:, :, None] == served.pages[:, None]).any(where=(pages.pages >= 0)[..., None])
    trial = pages.bid[..., None] * rng.uniform(0.1, 3.0 if who == "displayed" else 40.0, (*pages.bid.shape, 6))
    bidding = try_bids(pool, pages, trial)
    with torch.no_grad():
        affinity, slopes = (x[..., :slots].double().numpy() for x in network.generator(pool.h, pool.mask, pool.user))
    q, reserve, mask = torch.sigmoid(pool.click).double().numpy(), pool.reserve.double().numpy(), pool.mask.numpy()
    won = 0
    for b, i, t in np.ndindex(trial.shape):
        ad = pages.pages[b, i]
        if ad < 0:
            assert bidding.slot[b, i, t] == -1
            continue
        bids = pool.bid[b].double().numpy()
        bids[ad] = trial[b, i, t]
        eligible = mask[b] & (bids >= reserve[b]) & (bids > 0)
        page = auction.greedy_allocation(q[b], bids, affinity[b], slopes[b], slots, eligible)
        place = np.flatnonzero(page == ad)
        assert bidding.slot[b, i, t] == (place[0] if len(place) else -1)
        if not len(place):
            assert bidding.ctr[b, i, t] == bidding.critical[b, i, t] == bidding.margin[b, i, t] == 0
            continue
        won += 1

        def ctr(rows: np.ndarray, b: int = b) -> np.ndarray:
            one = pool.take(np.array([b]))
            with torch.no_grad():
                logit = page_logits(network.evaluator, one, torch.from_numpy(np.asarray(rows))[None])[0]
            return torch.sigmoid(logit)[0].double().numpy()

        assert bidding.ctr[b, i, t] == pytest.approx(ctr(page)[place[0]], abs=1e-6)
        pricing = auction.critical_prices(q[b], bids, affinity[b], slopes[b], page, ctr, reserve[b], eligible)
        assert bidding.critical[b, i, t] == pytest.approx(pricing.critical_price[place[0]], rel=1e-4)
        assert bidding.margin[b, i, t] == pytest.approx(bids[ad] - max(pricing.theta[place[0], place[0]], 0.0), rel=1e-6)
        np.testing.assert_allclose(bidding.others[b, i, t], bids[np.delete(page, place[0])], rtol=1e-12)
    assert won > trial.size // (4 if who == "displayed" else 10)


def test_truthful_bidding_is_the_page_itself() -> None:
    network = tiny_network(noise=0.7)
    pool = random_pool(network)
    pages = allocate(network, pool)
    own, shown = truthful(pool, pages), pages.pages >= 0
    np.testing.assert_array_equal(own.slot[..., 0][shown], np.broadcast_to(np.arange(5), shown.shape)[shown])
    np.testing.assert_allclose(own.ctr[..., 0], pages.ctr, atol=1e-6)
    np.testing.assert_allclose(own.critical[..., 0], pages.critical, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(others_bids(pages.bid, np.full(len(pages.bid), 2)), pages.bid[:, [0, 1, 3, 4]])


def test_regret_of_truthful_prices_is_zero_and_of_first_prices_is_not() -> None:
    network = tiny_network(noise=0.0)  # click rates then do not depend on the page: the critical price is exactly truthful
    pool = random_pool(network)
    pages = allocate(network, pool)
    truth, trials = truthful(pool, pages), try_bids(pool, pages, misreports(pages, TRAINING.payment.misreports))
    utility, regret = regret_of(torch.from_numpy(truth.critical).float(), torch.from_numpy(trials.critical).float(), truth, trials)
    assert float(regret.sum()) <= 1e-4 * float(utility.sum()) and float(utility.sum()) > 0
    utility, regret = regret_of(torch.from_numpy(truth.bid).float(), torch.from_numpy(trials.bid).float(), truth, trials)
    assert float(regret.sum()) > 0.05 and float(utility.abs().max()) == 0


def test_payment_score_is_honesty_first_then_revenue() -> None:
    network = tiny_network(noise=0.0)
    pool = random_pool(network)
    strict = payment_metrics(network, pool, replace(TRAINING.payment, psi_target=1e-6))
    loose = payment_metrics(network, pool, replace(TRAINING.payment, psi_target=10.0))
    assert strict["psi"] == loose["psi"] > 0
    assert strict["score"] == pytest.approx(-strict["psi"] / 1e-6) and loose["score"] == loose["revenue_share"] > 1


def test_hidden_ids_are_unknown_and_nothing_else_changes() -> None:
    fields = torch.randint(schema.FIRST_CODE, 40, (50, 60, len(schema.AD_FIELDS)), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    fields[:, 55:] = schema.PADDING
    before = fields.clone()
    hidden = hide_ids(fields, 0.2, torch.Generator().manual_seed(1))
    assert torch.equal(fields, before)
    changed = hidden != before
    assert (hidden[changed] == schema.UNKNOWN).all() and not changed[:, 55:].any()
    share = {field.name: changed[:, :55, column].float().mean().item() for column, field in enumerate(schema.AD_FIELDS)}
    assert {name for name, value in share.items() if value} == {"ad", "creative", "advertiser", "poi"}
    assert all(0.16 < value < 0.24 for value in share.values() if value)
    names = [field.name for field in schema.AD_FIELDS]
    assert torch.equal(changed[..., names.index("ad")], changed[..., names.index("creative")]) and not torch.equal(changed[..., names.index("ad")], changed[..., names.index("poi")])
    assert torch.equal(hide_ids(fields, 0.0, torch.Generator()), before)


def test_spread_covers_the_whole_time() -> None:
    rows = np.arange(100, 200)
    assert spread(rows, 0).tolist() == spread(rows, 100).tolist() == spread(rows, 500).tolist() == rows.tolist()
    few = spread(rows, 7)
    assert len(set(few.tolist())) == 7 and few[0] == 100 and few[-1] == 199 and np.ptp(np.diff(few)) <= 1
    assert spread(rows[:0], 5).tolist() == []
