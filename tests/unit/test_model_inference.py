"""The serving path against the plain network: the same numbers, whatever the configuration, chunk or thread count."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_tiny import random_batch, random_pool, tiny_network

from marketplace import schema
from model.bundle import Bundle
from model.ega_v1.engine import RankingEngine
from model.ega_v1.inference import Encoded, Execution, WholeCity
from model.ega_v1.mechanism import allocate_scored, contenders
from model.ega_v1.network import Batch, EgaV1

CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {}, {"qkv_activation": "none"}, {"fusion": "late"}, {"fusion": "din"}, {"cross_features": True}, {"exact_behaviours": 0}, {"fusion_after": (1,)},
    {"fusion_after": (2,)}, {"gcf_on_ads": False}, {"target_attention": False}, {"context_attention": False}, {"affinity": "additive"},
    {"affinity": "multiplicative"}, {"auction_blocks": 2}, {"blocks": 4, "fusion_after": (1, 3, 4), "exact_behaviours": 0, "qkv_activation": "none"},
)  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "the engine's own threads must not change the setting of others"
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(network: EgaV1, batch: Batch, **execution: Any) -> Encoded:
    whole = WholeCity(network, Execution(**execution))
    return whole.encode(whole.prepare(batch.ad_fields, batch.ad_place), batch.user_fields, batch.context_fields, batch.behaviours, batch.request_place)


def reference(network: EgaV1, batch: Batch) -> Encoded:
    with torch.inference_mode():
        h, user = network.encode(batch)
        return Encoded(h, user, network.click_head(h, user), *network.generator(h, batch.ad_mask, user))


def largest_difference(ours: Encoded, theirs: Encoded) -> float:
    """Over h, clicks, affinities and slopes, each relative to its largest entry."""
    return max(
        float((mine - plain).abs().max() / plain.abs().max().clamp(min=1e-30))
        for mine, plain in ((getattr(ours, name), getattr(theirs, name)) for name in ("h", "user", "click", "affinity", "slopes"))
    )  # fmt: skip


@pytest.mark.parametrize("change", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("ads", [1, 700])
def test_float32_equals_the_plain_network(change: dict[str, Any], ads: int, threads: int) -> None:
    network, batch = tiny_network(**change), random_batch(1, ads, seed=ads, padded=False)
    for chunk in (50, 4096):
        assert largest_difference(run(network, batch, dtype="float32", chunk=chunk), reference(network, batch)) < 1e-5


@pytest.mark.parametrize("change", CONFIGURATIONS, ids=str)
def test_bfloat16_is_near_the_plain_network(change: dict[str, Any]) -> None:
    network, batch = tiny_network(**change), random_batch(1, 300, padded=False)
    difference = largest_difference(run(network, batch, dtype="bfloat16", chunk=64), reference(network, batch))
    assert 1e-7 < difference < 0.03  # 0: it ran in float32


@pytest.mark.parametrize("exact", [0, 3, 200], ids="one by one up to {}".format)
@pytest.mark.parametrize("real", [0, 2, 3, 40, 150], ids="{} behaviours".format)
def test_histories_of_every_length_equal_the_plain_network(real: int, exact: int, threads: int) -> None:
    """Padding is cut, and behaviours run through the sweeps, only where neither decides anything."""
    network, batch = tiny_network(exact_behaviours=exact, qkv_activation="none"), random_batch(1, 300, behaviours=150, seed=real, padded=False)
    batch.behaviours = torch.where(torch.arange(150)[:, None] < real, batch.behaviours.clamp(min=1), schema.PADDING)
    assert largest_difference(run(network, batch, dtype="float32", chunk=64), reference(network, batch)) < 1e-5


def test_the_engines_threads_compute_alone() -> None:
    """Each takes its own run of ads: were every one of them to share its products again, they would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    whole = WholeCity(tiny_network(), Execution(dtype="float32"))
    assert whole._pool is not None and set(whole._pool.map(lambda _: torch.get_num_threads(), range(20))) == {1}
    assert whole.alone(torch.get_num_threads) == 1 and torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_equal_requests_get_equal_bits_and_another_request_between_leaves_no_trace(threads: int) -> None:
    whole = WholeCity(tiny_network(), Execution(dtype="float32", chunk=100))
    city, other = random_batch(1, 600, seed=1, padded=False), random_batch(1, 600, seed=2, padded=False)
    cache = whole.prepare(city.ad_fields, city.ad_place)

    def clicks(batch: Batch) -> torch.Tensor:
        return whole.encode(cache, batch.user_fields, batch.context_fields, batch.behaviours, batch.request_place).click.clone()

    first = clicks(city)
    assert not torch.equal(clicks(other), first)
    assert torch.equal(clicks(city), first)
    assert torch.equal(whole.prepare(city.ad_fields, city.ad_place).states, cache.states)


@pytest.mark.parametrize("change", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_a_recorded_pass_gives_the_same_bits(change: dict[str, Any], dtype: Literal["float32", "bfloat16"], one_thread: None) -> None:
    whole = WholeCity(tiny_network(**change), Execution(dtype=dtype, chunk=100))
    batches = [random_batch(1, 700, behaviours=6, seed=seed, padded=False) for seed in range(3)]
    city = whole.prepare(batches[0].ad_fields, batches[0].ad_place)
    recorded = whole.record(city, 6)
    exact = whole.network.config.exact_behaviours
    assert whole.record(city, 6_000) is city and whole.record(city, exact) is city
    assert exact == 0 or whole.record(city, exact - 1) is not city
    if exact == 0:  # what is read of a history depends on its padding
        assert recorded is city
        return
    assert recorded.recording is not None
    rows = torch.tensor([3, 500, 7])
    for batch in [*batches, batches[0]]:
        batch.behaviours[0, 2 + int(batch.behaviours[0, 0, 0]) % 4 :] = schema.PADDING
        inputs = batch.user_fields, batch.context_fields, batch.behaviours, batch.request_place
        for shorter in (False, True):  # a history of another length takes the ordinary way
            asked = (*inputs[:2], inputs[2][:, :5] if shorter else inputs[2], inputs[3])
            plain = whole.encode(city, *asked)
            kept = [getattr(plain, name).clone() for name in ("h", "user", "click", "affinity", "slopes")]
            kept += [] if plain.again is None else [plain.again(rows).h]
            replayed = whole.encode(recorded, *asked)
            ours = [getattr(replayed, name) for name in ("h", "user", "click", "affinity", "slopes")] + ([] if replayed.again is None else [replayed.again(rows).h])
            assert len(kept) == len(ours) and all(torch.equal(a, b) for a, b in zip(kept, ours, strict=True))


@torch.inference_mode()
def test_a_recording_that_nobody_needs_any_more_frees_its_tensors(one_thread: None) -> None:
    """A service that changes models or ads every minute must not grow."""
    batch, whole = random_batch(1, 700, behaviours=6, padded=False), WholeCity(tiny_network(), Execution(dtype="float32"))
    city = whole.record(whole.prepare(batch.ad_fields, batch.ad_place), 6)
    states = weakref.ref(city.states)
    del city
    gc.collect()
    assert states() is None


def test_recorded_passes_of_two_cities_share_no_buffers(one_thread: None) -> None:
    """Two models of a service rank at once, and a third is made ready beside them."""
    batches, passes = [random_batch(1, 700, behaviours=6, seed=seed, padded=False) for seed in range(2)], []
    for batch in batches:
        whole = WholeCity(tiny_network(), Execution(dtype="float32", chunk=100))
        city = whole.record(whole.prepare(batch.ad_fields, batch.ad_place), 6)
        passes.append(lambda whole=whole, city=city, batch=batch: whole.encode(city, batch.user_fields, batch.context_fields, batch.behaviours, batch.request_place).click.clone())
    alone = [each() for each in passes]
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(lambda each=each: [each() for _ in range(50)]) for each in passes]
        while not all(each.done() for each in work):
            whole = WholeCity(tiny_network(), Execution(dtype="float32", chunk=100))
            whole.record(whole.prepare(batches[0].ad_fields, batches[0].ad_place), 6)
        for expected, found in zip(alone, work, strict=True):
            assert all(torch.equal(expected, each) for each in found.result())


def test_logits_beyond_the_fixed_shift_fall_back_to_the_plain_network() -> None:
    """exp overflows where an ad of a later chunk exceeds the first chunk's best logit by more than 88."""
    network, batch = tiny_network(fusion_after=(1,)), random_batch(1, 64, padded=False)
    with torch.no_grad():
        network.recformer.ad_blocks[1].attention.prototypes.mul_(2000.0)
    plain, cache = reference(network, batch), WholeCity(network, Execution(dtype="float32", chunk=8))
    city = cache.prepare(batch.ad_fields, batch.ad_place)
    assert not torch.isfinite(cache._encode(city, batch.user_fields, batch.context_fields, batch.behaviours, batch.request_place).click).all()
    assert largest_difference(run(network, batch, dtype="float32", chunk=8), plain) < 1e-4


def test_a_gpu_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="device: cuda needs"):
        WholeCity(tiny_network(), Execution(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("change", CONFIGURATIONS, ids=str)
def test_a_gpu_equals_the_plain_network(change: dict[str, Any]) -> None:
    network, batch = tiny_network(**change), random_batch(1, 700, padded=False)
    found = Encoded(**{name: value.cpu() for name, value in vars(run(network, batch, device="cuda", dtype="float32")).items() if value is not None})
    assert largest_difference(found, reference(network, batch)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def request(ads: int, seed: int) -> dict[str, Any]:
    batch, rng = random_batch(1, 8, seed=seed), np.random.default_rng(seed)
    return {
        "user_fields": batch.user_fields[0].numpy(), "context_fields": batch.context_fields[0].numpy(), "behaviours": batch.behaviours[0].numpy(),
        "request_place": batch.request_place[0].numpy(), "bids": rng.lognormal(0, 0.5, ads), "reserves": rng.uniform(0, 0.6, ads), "eligible": rng.random(ads) < 0.9,
    }  # fmt: skip


def engines(change: dict[str, Any], ads: int, *executions: Execution) -> list[Any]:
    """`rank` of the same model over the same city for each execution."""
    bundle, city = Bundle("0" * 12, tiny_network(noise=0.3, **change), {}, {}, {}, {}), random_batch(1, ads, padded=False)
    ranks = []
    for execution in executions:
        engine = RankingEngine(bundle, execution=execution)
        state = engine.prepare_city(100 + np.arange(ads), city.ad_fields[0].numpy(), city.ad_place[0].numpy())
        ranks.append(lambda engine=engine, state=state, **values: engine.rank(state, **values))
    return ranks


@pytest.mark.parametrize("mode", ["critical", "learned", "gsp", "vcg", "first_price"])
def test_float32_pages_and_prices_equal_those_of_the_plain_network(mode: str) -> None:
    fast, plain = engines({}, 900, Execution(dtype="float32", chunk=128), Execution(path="reference"))
    for seed in range(4):
        ours, theirs = (rank(**request(900, seed), price_mode=mode, slots=5 - seed) for rank in (fast, plain))
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.runner_up, theirs.runner_up)
        for name in ("pctr", "set_pctr", "price", "critical_price", "theta", "slot_ctr", "next_score", "affinity", "slope"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("change", [{}, {"qkv_activation": "none", "cross_features": True, "exact_behaviours": 0}, {"gcf_on_ads": False}], ids=str)
def test_bfloat16_shows_the_same_pages_at_nearly_the_same_pctr(change: dict[str, Any]) -> None:
    """Because the ads that may reach the page are read once more in float32. `ega bench latency` counts this at serving sizes."""
    rounded, plain = engines(change, 900, Execution(dtype="bfloat16", chunk=300), Execution(dtype="float32"))
    same = 0
    for seed in range(25):
        ours, theirs = (rank(**request(900, seed)) for rank in (rounded, plain))
        both, at, there = np.intersect1d(ours.rows, theirs.rows, return_indices=True)
        assert len(both) >= 4
        np.testing.assert_allclose(ours.set_pctr[at], theirs.set_pctr[there], rtol=0.01)
        same += np.array_equal(ours.rows, theirs.rows)
    assert same >= 24


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ads=st.sampled_from([1, 4, 24, 300, 6500]), ties=st.booleans(), able=st.sampled_from([0.0, 0.001, 0.5, 1.0]))
def test_the_contenders_give_the_page_and_prices_of_all_ads(seed: int, ads: int, ties: bool, able: float) -> None:
    rng, network = np.random.default_rng(seed), tiny_network()
    slots = int(rng.integers(1, 6))
    q, bids = rng.beta(2, 20, ads), rng.lognormal(0, 0.5, ads)
    affinity, slopes = rng.normal(0, 0.5, (ads, slots)), rng.lognormal(1, 0.3, (ads, slots))
    if ties:
        q, bids, affinity, slopes = (np.round(values, 1) + 0.1 for values in (q, bids, affinity, slopes))
    reserves, allowed, keys = 0.2 * rng.random(ads), rng.random(ads) < able, rng.permutation(ads)
    pool = random_pool(network, 1, max(ads, 7), seed=seed % 1000, padded=False)
    pool.h, pool.codes, pool.click, pool.purchase = (x[:, :ads] for x in (pool.h, pool.codes, pool.click, pool.purchase))

    def pages(rows: np.ndarray) -> Any:
        picked = pool.take(np.zeros(1, np.int64))
        picked.h, picked.codes, picked.click, picked.purchase = (x[:, torch.from_numpy(rows)] for x in (pool.h, pool.codes, pool.click, pool.purchase))
        market = (x[rows][None] for x in (q, bids, reserves, affinity, slopes, allowed))
        return allocate_scored(picked, *market, network.evaluator, keys[rows])

    rows = contenders(q, bids, affinity, slopes, allowed & (bids >= reserves))
    few, every = pages(rows), pages(np.arange(ads))
    for name in ("pages", "moved", "runner_up"):
        np.testing.assert_array_equal(np.where(getattr(few, name) >= 0, rows[getattr(few, name)], -1), getattr(every, name), err_msg=name)
    shown = every.pages[0] >= 0
    for name in ("theta", "critical", "critical_at", "gsp", "next_score", "ctr", "affinity", "slope", "repaired", "tied"):
        np.testing.assert_allclose(getattr(few, name)[0][shown], getattr(every, name)[0][shown], rtol=1e-6, err_msg=name)
