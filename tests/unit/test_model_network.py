"""The EGA-V1 network: switches, where bids may enter, starting points, payments, caching, the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tiny import NETWORK, SIZES, random_batch, random_pool, tiny_network
from samples_fixture import tiny_samples

from marketplace import schema
from model import layers
from model.bundle import Bundle
from model.ega_v1.engine import RankingEngine
from model.ega_v1.mechanism import PRICE_MODES, allocate, learned_prices, page_logits, prices, truthful, try_bids
from model.ega_v1.network import AD_COLUMNS, BEHAVIOUR_COLUMNS, PAGE_COLUMNS, Batch, EgaV1, Evaluator, NetworkConfig, cross_features, geo_prior
from model.layers import Dice
from model.training.data import Samples
from model.training.stages import build_network, encode_city, greedy_page, newest, separable_scores

SWITCHES: list[dict[str, Any]] = [
    {},
    {"gcf_on_ads": False},
    {"fusion": "late"},
    {"fusion": "din"},
    {"target_attention": False},
    {"context_attention": False},
    {"fusion": "din", "target_attention": False},
    {"qkv_activation": "none"},
    {"affinity": "additive"},
    {"affinity": "multiplicative"},
    {"cross_features": True},
    {"examination": False},
    {"payment_form": "rate"},
    {"payment_inputs": "literal", "payment_form": "rate"},
    {"exact_behaviours": 0},
    {"slots": 1, "heads": 1, "blocks": 1, "fusion_after": (1,), "head_hidden": (8,)},
]


def take(batch: Batch, rows: slice | list[int]) -> Batch:
    return Batch(**{name: getattr(batch, name)[rows] for name in Batch.__dataclass_fields__})


@pytest.mark.parametrize("change", SWITCHES, ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()) or "default")
def test_every_switch_runs_forward_and_backward(change: dict[str, Any]) -> None:
    network = tiny_network(**change).train()
    batch, slots = random_batch(), network.config.slots
    h, user = network.encode(batch)
    click, purchase = network.heads(h, user)
    affinity, slopes = network.generator(h, batch.ad_mask, user)
    page = torch.arange(slots).expand(len(h), -1)
    page_click, page_purchase = network.evaluator(h[:, :slots], batch.ad_fields[:, :slots, PAGE_COLUMNS], user, click[:, :slots], purchase[:, :slots], page >= 0)
    at = (len(h), slots)
    bid = torch.ones(at)
    payment = network.payment(h[:, :slots], page_click.sigmoid(), torch.ones(*at, slots - 1), bid, bid / 2, bid / 2, bid / 4)
    parts = (click[batch.ad_mask], purchase[batch.ad_mask], affinity[batch.ad_mask], slopes[batch.ad_mask], page_click, page_purchase, payment)
    assert all(bool(torch.isfinite(part).all()) for part in parts)
    sum(part.square().mean() for part in parts).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    unread = {name.split(".")[0] for name, _ in network.named_parameters()} - {name.split(".")[0] for name in gradients}
    assert unread <= {"unexposed", "slot_bias", "evaluation_evaluator"}  # read by the pre-training loss, and by nobody here


@torch.no_grad()
@pytest.mark.parametrize("change", SWITCHES, ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()) or "default")
def test_some_ads_are_encoded_as_among_all(change: dict[str, Any]) -> None:
    network, batch = tiny_network(noise=0.3, **change).eval(), random_batch()
    only = torch.stack([torch.randperm(int(mask.sum()))[:3] for mask in batch.ad_mask])
    whole, user = network.encode(batch)
    some, same_user = network.encode(batch, only)
    torch.testing.assert_close(some, layers.take(whole, only), rtol=1e-5, atol=1e-5)
    assert torch.equal(user, same_user)


def test_without_cluster_attention_no_ad_sees_another() -> None:
    batch = random_batch(requests=2, padded=False)
    for gcf in (True, False):
        network = tiny_network(gcf_on_ads=gcf, context_attention=False)
        changed = replace_fields(batch, 3)
        same = torch.equal(network.encode(changed)[0][:, :3], network.encode(batch)[0][:, :3])
        assert same is not gcf


def replace_fields(batch: Batch, first: int) -> Batch:
    fields = batch.ad_fields.clone()
    fields[:, first:] = fields[:, first:].flip(1)
    fields[:, first:, 0] = 2
    return Batch(**{**vars(batch), "ad_fields": fields})


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"fusion": "late"}, {"cross_features": True}, {"exact_behaviours": 0}])
def test_a_request_alone_equals_the_request_in_a_batch(change: dict[str, Any]) -> None:
    network, batch = tiny_network(**change), random_batch(requests=8)
    h, user = network.encode(batch)
    click, _ = network.heads(h, user)
    affinity, slopes = network.generator(h, batch.ad_mask, user)
    for i in range(8):
        one = take(batch, [i])
        alone, person = network.encode(one)
        real = batch.ad_mask[i]
        torch.testing.assert_close(alone[0][real], h[i][real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(network.click_head(alone, person)[0][real], click[i][real], rtol=1e-5, atol=1e-5)
        a, s = network.generator(alone, one.ad_mask, person)
        torch.testing.assert_close(a[0][real], affinity[i][real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s[0][real], slopes[i][real], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_ads_and_behaviours_change_nothing() -> None:
    network, batch = tiny_network(exact_behaviours=0), random_batch(requests=4)
    click = network.heads(*network.encode(batch))[0]
    junk = Batch(**vars(batch))
    junk.ad_fields = torch.where(batch.ad_mask.unsqueeze(-1), batch.ad_fields, torch.full_like(batch.ad_fields, 3))
    assert torch.equal(network.heads(*network.encode(junk))[0][batch.ad_mask], click[batch.ad_mask])
    longer = Batch(**vars(batch))
    longer.behaviours = torch.nn.functional.pad(batch.behaviours, (0, 0, 0, 3))
    torch.testing.assert_close(network.heads(*network.encode(longer))[0][batch.ad_mask], click[batch.ad_mask], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"fusion": "late"}, {"fusion": "din"}, {"fusion_after": (2,)}])
def test_cached_city_states_equal_the_full_forward(change: dict[str, Any]) -> None:
    network, batch = tiny_network(**change), random_batch(requests=5, padded=False)
    city = Batch(**{**vars(batch), "ad_fields": batch.ad_fields[:1], "ad_mask": batch.ad_mask[:1], "ad_place": batch.ad_place[:1]})
    states = network.city_states(city.ad_fields, city.ad_mask)
    assert states.shape[0] == 1
    cached, user = network.encode_from(states, city)
    full, _ = network.encode(Batch(**{**vars(batch), "ad_fields": batch.ad_fields[:1].expand(5, -1, -1), "ad_mask": batch.ad_mask[:1].expand(5, -1)}))
    torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-5)
    assert cached.shape[0] == user.shape[0] == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_samples(tmp_path_factory.mktemp("network") / "samples", requests=80, ads=30, unexposed=10)


def test_a_bid_is_never_a_feature(folder: Path, tmp_path: Path) -> None:
    """Other bids and reserves in the samples: representations, pCTR, affinities and slopes keep every bit."""
    other = tiny_samples(tmp_path / "samples", requests=80, ads=30, unexposed=10)
    for name in ("bid", "reserve", "exposed_bid", "exposed_payment"):
        values = np.load(other / f"{name}.npy")
        np.save(other / f"{name}.npy", values * np.random.default_rng(1).lognormal(0, 1, values.shape))
    seen = []
    for samples in (Samples(folder), Samples(other)):
        network = build_network(NETWORK, samples, seed=4)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
        pool = encode_city(network, samples, newest(samples.split_rows(schema.TRAIN), 20), 1 << 30, 0)
        assert not torch.allclose(pool.bid, torch.ones_like(pool.bid))
        seen.append((pool.h, pool.click, pool.purchase, *network.generator(pool.h, pool.mask, pool.user), pool.bid))
    for mine, theirs in zip(*(values[:-1] for values in seen), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(seen[0][-1], seen[1][-1])


def test_an_untrained_generator_ranks_by_ctr_times_bid() -> None:
    network = tiny_network(noise=0.0)
    pool = random_pool(network)
    mine, separable = allocate(network, pool), allocate(network, pool, learned=False)
    np.testing.assert_array_equal(mine.pages, separable.pages)
    np.testing.assert_allclose(mine.critical, separable.critical, rtol=1e-6)
    score = (pool.click.sigmoid() * pool.bid).masked_fill(~pool.mask | (pool.bid < pool.reserve), -1).numpy()
    np.testing.assert_array_equal(mine.pages, np.argsort(-score, 1)[:, : network.config.slots])
    assert torch.equal(greedy_page(separable_scores(network, pool, network.generator.weight()), pool.mask), torch.from_numpy(np.argsort(-(pool.click.sigmoid() * pool.bid * pool.mask).numpy(), 1)[:, :5]))


def test_a_trained_generator_does_not_rank_by_ctr_times_bid() -> None:
    """The test above would be empty if affinities never mattered."""
    network = tiny_network(noise=1.0)
    pool = random_pool(network)
    assert (allocate(network, pool).pages != allocate(network, pool, learned=False).pages).any()


@pytest.mark.parametrize(("kind", "free"), [("additive", "slopes"), ("multiplicative", "affinity")])
def test_affinity_switch_leaves_the_other_part_at_its_start(kind: str, free: str) -> None:
    network = tiny_network(noise=0.5, affinity=kind)
    pool = random_pool(network)
    affinity, slopes = network.generator(pool.h, pool.mask, pool.user)
    if free == "affinity":
        assert torch.equal(affinity, torch.zeros_like(affinity))
        assert slopes.std() > 0
    else:
        torch.testing.assert_close(slopes, network.generator.weight().exp().expand_as(slopes))
        assert affinity.std() > 0


def test_bid_weight_is_clamped() -> None:
    network = tiny_network()
    for value, expected in ((99.0, 5.0), (-99.0, -5.0), (1.5, 1.5)):
        network.generator.bid_log_weight.data.fill_(value)
        assert float(network.generator.weight()) == expected


@pytest.mark.parametrize("examination", [True, False])
def test_evaluator_starts_at_the_set_aware_logits(examination: bool) -> None:
    network = tiny_network(noise=0.0, examination=examination)
    pool = random_pool(network)
    page = torch.from_numpy(allocate(network, pool).pages)
    click, purchase = page_logits(network.evaluator, pool, page)
    start = np.log1p(np.exp(Evaluator.EXAMINATION_START)) if examination else 0.0
    down = (-start * torch.arange(page.shape[1])).expand(page.shape) * (page >= 0)  # every ad starts with the same effect on those below
    torch.testing.assert_close(click, pool.click.gather(1, page) + down)
    torch.testing.assert_close(purchase, pool.purchase.gather(1, page) + down)


@torch.no_grad()
def test_evaluator_reads_the_page_and_nothing_behind_its_end() -> None:
    network = tiny_network(noise=0.5)
    pool = random_pool(network, padded=False)
    page = torch.tensor([3, 1, 4, 7, 2]).expand(12, -1)
    whole = page_logits(network.evaluator, pool, page)[0]
    swapped = page_logits(network.evaluator, pool, page[:, [1, 0, 2, 3, 4]])[0]
    torch.testing.assert_close(whole[:, 2:], swapped[:, 2:])  # the same ads above, whatever their order
    assert bool((swapped[:, 1] < whole[:, 0]).all() and (swapped[:, 0] > whole[:, 1]).all())  # an ad that moves down loses, up gains
    paper = tiny_network(noise=0.5, examination=False).evaluator
    read, other = page_logits(paper, pool, page)[0], page_logits(paper, pool, page[:, [1, 0, 2, 3, 4]])[0]
    assert not torch.allclose(read[:, 2:], other[:, 2:], atol=1e-4)  # attention with slots reads the order above
    short = torch.where(torch.arange(5) < 3, page, -1)
    cut = page_logits(network.evaluator, pool, short)[0]
    assert not torch.allclose(cut[:, :3], whole[:, :3], atol=1e-4)  # so do neighbours
    h, mask = pool.h[:, :5].clone(), (torch.arange(5) < 3).expand(12, -1)
    codes, rest = pool.codes[:, :5].clone(), (pool.user, pool.click[:, :5], pool.purchase[:, :5], mask)
    first = network.evaluator(h, codes, *rest)[0]
    h[:, 3:], codes[:, 3:] = 99.0, 1
    assert torch.equal(network.evaluator(h, codes, *rest)[0][:, :3], first[:, :3])
    nothing = page_logits(network.evaluator, pool, torch.full_like(page, -1))[0]
    assert bool(torch.isfinite(nothing).all())


@torch.no_grad()
@pytest.mark.parametrize("examination", [True, False])
def test_the_user_vector_is_read_in_the_papers_form_only(examination: bool) -> None:
    """e_u holds the weekday, and logs hold few days."""
    network = tiny_network(noise=0.5, examination=examination)
    pool = random_pool(network, padded=False)
    page = torch.tensor([3, 1, 4, 7, 2]).expand(12, -1)
    before = page_logits(network.evaluator, pool, page)[0]
    pool.user = pool.user + 1.0
    assert torch.equal(page_logits(network.evaluator, pool, page)[0], before) == examination


@torch.no_grad()
def test_examination_is_the_sum_over_the_ads_above() -> None:
    network = tiny_network(noise=0.5)
    evaluator = network.evaluator
    h, mask = torch.randn(3, 5, network.config.width), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2] = False
    codes = torch.stack([torch.randint(1, 40, (3, 5)), torch.randint(1, 8, (3, 5))], -1)
    ad, category = (evaluator.examination_tables[name].weight[codes[..., i], 0] for i, name in enumerate(("ad", "category")))
    weight = h @ evaluator.examination.weight[0] + ad + category
    own = -torch.nn.functional.softplus(evaluator.EXAMINATION_GAIN * weight + evaluator.EXAMINATION_START) * mask
    expected = torch.stack([own[:, :slot].sum(1) for slot in range(5)], 1)
    left = evaluator.attention_left(h, codes, mask)
    torch.testing.assert_close(left, expected)
    assert bool((left[:, 0] == 0).all())
    assert bool((left.diff(dim=1) <= 0).all())  # it never rises down the page
    plain = tiny_network(noise=0.5, examination=False).evaluator
    assert plain.examination is None
    assert bool((plain.attention_left(h, codes, mask) == 0).all())


@torch.no_grad()
def test_examination_prior_is_a_gaussian_in_logits() -> None:
    evaluator = tiny_network(noise=0.5).evaluator
    weights = torch.cat([evaluator.examination.weight.flatten(), *(table.weight.flatten() for table in evaluator.examination_tables.values())])
    for deviation in (0.5, 2.0):
        gaussian = torch.distributions.Normal(0.0, deviation)
        expected = gaussian.log_prob(torch.zeros(())) * len(weights) - gaussian.log_prob(evaluator.EXAMINATION_GAIN * weights).sum()
        torch.testing.assert_close(evaluator.examination_prior(deviation), expected)
    assert float(tiny_network(noise=0.5, examination=False).evaluator.examination_prior(1.0)) == 0.0


@torch.no_grad()
def test_several_pages_of_a_request_are_read_one_by_one() -> None:
    network = tiny_network(noise=0.5)
    pool = random_pool(network, padded=False)
    pages = torch.stack([torch.randperm(14)[:5] for _ in range(36)]).reshape(12, 3, 5)
    pages[3, 1, 4] = -1
    together = page_logits(network.evaluator, pool, pages)[0]
    for i in range(3):
        alone = page_logits(network.evaluator, pool, pages[:, i])[0]
        torch.testing.assert_close(together[:, i], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_literal_payment_rate_is_blind_to_the_own_bid_and_aware_is_not() -> None:
    for inputs in ("literal", "aware"):
        network = tiny_network(noise=0.5, payment_inputs=inputs, payment_form="rate").payment
        h, ctr, others = torch.randn(6, 16), torch.rand(6), torch.rand(6, 4)
        rates = [network(h, ctr, others, bid * torch.ones(6), torch.rand(6) * 0 + 0.1, bid * torch.ones(6) - 0.1, torch.zeros(6)) / bid for bid in (1.0, 3.0)]
        assert torch.allclose(*rates, rtol=1e-6) is (inputs == "literal")


def test_payment_starts_above_the_critical_price() -> None:
    network = tiny_network(noise=0.0)
    pool = random_pool(network)
    pages = allocate(network, pool)
    price = learned_prices(network, pool, pages, truthful(pool, pages))[..., 0].detach().numpy()
    np.testing.assert_allclose(price, np.minimum(1.2 * pages.critical, pages.bid), rtol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 5])
@pytest.mark.parametrize("mode", PRICE_MODES)
def test_prices_of_every_mode_lie_between_reserve_and_bid(mode: str, slots: int) -> None:
    network = tiny_network(noise=0.8)
    pool = random_pool(network)
    pages = allocate(network, pool, slots=slots)
    shown = pages.pages >= 0
    price = prices(network, pool, pages, mode)
    assert pages.pages.shape[1] == slots and shown.any()
    assert (price >= pages.reserve)[shown].all() and (price <= pages.bid)[shown].all() and (price[~shown] == 0).all()
    assert (pages.bid >= pages.reserve)[shown].all()


def test_unknown_price_mode_is_refused() -> None:
    network = tiny_network()
    pool = random_pool(network)
    with pytest.raises(ValueError, match="price mode 'vickrey' is unknown"):
        prices(network, pool, allocate(network, pool), "vickrey")


def test_dice_moves_in_pretraining_only() -> None:
    network = tiny_network()
    for stage in ("pretrain", "reward", "evaluation", "rlaf", "payment"):
        learns = {id(parameter) for parameter in network.enter_stage(stage)}
        network.train()
        assert learns == {id(p) for p in network.parameters() if p.requires_grad} and learns
        moving = [name for name, layer in network.named_modules() if isinstance(layer, Dice) and not layer.frozen]
        assert bool(moving) is (stage == "pretrain") and not any(name.startswith("generator") for name in moving)
    sets = {stage: {id(p) for p in network.enter_stage(stage)} for stage in ("pretrain", "reward", "evaluation", "rlaf", "payment")}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == len(list(network.parameters()))


def test_shared_tables_start_aligned_between_ads_and_behaviours() -> None:
    network = EgaV1(NETWORK, SIZES)
    ad = [field.name for field in schema.AD_FIELDS].index("poi") * 8
    behaviour = [field.name for field in schema.BEHAVIOUR_FIELDS].index("poi") * 8
    features = network.features
    assert torch.equal(features.ad_linear.weight[:, ad : ad + 8], features.behaviour_linear.weight[:, behaviour : behaviour + 8])
    assert all(bool((table.weight[schema.PADDING] == 0).all()) for table in features.tables.values())


def test_geo_prior_knows_distance() -> None:
    places = np.array([[np.nan, np.nan], [np.nan, np.nan], [40.70, -74.0], [40.702, -74.0], [40.9, -73.7]])
    table = geo_prior(places, 64, torch.Generator().manual_seed(0))
    near, far = float(table[2] @ table[3]), float(table[2] @ table[4])
    assert near > 0.8 * float(table[2] @ table[2]) and abs(far) < 0.5 * float(table[2] @ table[2])
    assert bool(torch.isfinite(table).all()) and geo_prior(places, 7, torch.Generator().manual_seed(0)).shape == (5, 7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": 18, "heads": 4}, "multiple of heads"),
        ({"fusion_after": (3,)}, "within 1..2"),
        ({"fusion_after": ()}, "must name blocks"),
        ({"head_hidden": ()}, "at least one hidden width"),
        ({"payment_inputs": "literal"}, "set payment_form: rate"),
        ({"slots": 0}, "greater than or equal to 1"),
        ({"affinity": "cubic"}, "additive"),
        ({"widht": 16}, "widht"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_built(change: dict[str, Any], says: str) -> None:
    good = {name: getattr(NETWORK, name) for name in NetworkConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=says):
        NetworkConfig(**{**good, **change})


# ---------------------------------------------------------------------------------------------------------------------
# Engine


@pytest.fixture(scope="module")
def engine() -> RankingEngine:
    return RankingEngine(Bundle("0" * 12, tiny_network(noise=0.5), {}, {}, {"price_mode": "learned"}, {}))


def market(ads: int = 20, seed: int = 0) -> dict[str, Any]:
    batch, rng = random_batch(1, ads, seed=seed, padded=False), np.random.default_rng(seed)
    return {
        "user_fields": batch.user_fields[0].numpy(), "context_fields": batch.context_fields[0].numpy(), "behaviours": batch.behaviours[0].numpy(),
        "request_place": batch.request_place[0].numpy(), "bids": rng.lognormal(0, 0.5, ads), "reserves": np.full(ads, 0.05), "eligible": rng.random(ads) < 0.9,
    }  # fmt: skip


def city_of(engine: RankingEngine, ads: int = 20, order: np.ndarray | None = None) -> Any:
    batch, order = random_batch(1, ads, padded=False), np.arange(ads) if order is None else order
    return engine.prepare_city(100 + order, batch.ad_fields[0].numpy()[order], batch.ad_place[0].numpy()[order])


@pytest.mark.parametrize("mode", [None, *PRICE_MODES])
def test_engine_prices_within_bounds_and_in_currency(engine: RankingEngine, mode: str | None) -> None:
    city, request = city_of(engine), market()
    page = engine.rank(city, **request, price_mode=mode)
    assert page.price_mode == (mode or "learned") and len(page.rows) == 5
    assert request["eligible"][page.rows].all()
    for price in (page.price, page.critical_price):
        assert (price >= request["reserves"][page.rows]).all() and (price <= request["bids"][page.rows]).all()
    scaled = engine.rank(city, **{**request, "bids": 7 * request["bids"], "reserves": 7 * request["reserves"]}, price_mode=mode)
    np.testing.assert_array_equal(scaled.rows, page.rows)
    np.testing.assert_allclose(scaled.price, 7 * page.price, rtol=1e-5)
    np.testing.assert_array_equal(scaled.pctr, page.pctr)


def test_engine_is_blind_to_the_order_of_candidates(engine: RankingEngine) -> None:
    order, request = np.random.default_rng(3).permutation(20), market()
    page = engine.rank(city_of(engine), **request)
    moved = engine.rank(city_of(engine, order=order), **{**request, **{name: request[name][order] for name in ("bids", "reserves", "eligible")}})
    np.testing.assert_array_equal(order[moved.rows], page.rows)
    np.testing.assert_allclose(moved.price, page.price, rtol=1e-4)


def test_filters_and_fewer_slots_leave_click_probabilities_alone(engine: RankingEngine) -> None:
    city, request = city_of(engine), market()
    page = engine.rank(city, **request)
    fewer = engine.rank(city, **request, slots=2)
    np.testing.assert_array_equal(fewer.rows, page.rows[:2])
    np.testing.assert_array_equal(fewer.set_pctr, page.set_pctr[:2])
    kept = request["eligible"] & (np.arange(20) != page.rows[-1]) & (np.arange(20) != page.rows[-2])
    filtered = engine.rank(city, **{**request, "eligible": kept})
    np.testing.assert_array_equal(filtered.rows[:3], page.rows[:3])
    np.testing.assert_array_equal(filtered.set_pctr[:3], page.set_pctr[:3])


def test_raising_the_own_bid_never_worsens_the_own_slot(engine: RankingEngine) -> None:
    city, request = city_of(engine), market(seed=5)
    unit = float(np.median(request["bids"]))
    for ad in np.flatnonzero(request["eligible"])[:6]:
        slots = []
        for factor in (0.3, 0.7, 1.0, 1.6, 4.0):
            bids = request["bids"].copy()
            bids[ad] *= factor
            rows = engine.rank(city, **{**request, "bids": bids}, price_mode="critical", bid_unit=unit).rows.tolist()
            slots.append(rows.index(ad) if ad in rows else 99)
        assert slots == sorted(slots, reverse=True)


def test_engine_refuses_nonsense_and_answers_an_empty_market(engine: RankingEngine) -> None:
    city, request = city_of(engine), market()
    with pytest.raises(ValueError, match="slots must be between 1 and 5"):
        engine.rank(city, **request, slots=6)
    with pytest.raises(ValueError, match="bid_unit"):
        engine.rank(city, **request, bid_unit=float("nan"))
    with pytest.raises(ValueError, match="at least one ad"):
        engine.prepare_city(np.zeros(0, np.int64), np.zeros((0, 7), np.int32), np.zeros((0, 2), np.float32))
    empty = engine.rank(city, **{**request, "eligible": np.zeros(20, bool)})
    assert len(empty.rows) == len(empty.price) == 0
    one = engine.rank(city, **{**request, "eligible": np.arange(20) == 4}, price_mode="critical")
    assert one.rows.tolist() == [4] and one.price[0] == pytest.approx(0.05)
    assert RankingEngine(Bundle("0" * 12, engine.network, {}, {}, {"price_mode": "free"}, {})).default_price_mode == "critical"


def test_trial_bids_below_the_reserve_win_nothing() -> None:
    network = tiny_network(noise=0.5)
    pool = random_pool(network)
    pages = allocate(network, pool)
    trial = np.concatenate([np.zeros((*pages.bid.shape, 1)), 0.999 * pages.reserve[..., None], np.full((*pages.bid.shape, 1), 1e6)], -1)
    bidding = try_bids(pool, pages, trial)
    assert (bidding.slot[..., :2] == -1).all() and (bidding.ctr[..., :2] == 0).all()
    # A huge bid takes the best slot that any bid can reach, never none.
    assert (bidding.slot[..., 2] >= 0)[pages.pages >= 0].all()


def test_cross_features_equal_plain_counting() -> None:
    batch = random_batch(requests=4, ads=9, behaviours=12, seed=3)
    poi, category = (AD_COLUMNS.index(name) for name in ("poi", "category"))
    batch.ad_fields[..., poi], batch.ad_fields[..., category] = batch.ad_fields[..., poi] % 5 + 1, batch.ad_fields[..., category] % 3 + 1
    real = batch.behaviours[..., 0] != schema.PADDING
    history = {name: batch.behaviours[..., BEHAVIOUR_COLUMNS.index(name)] for name in ("poi", "category", "action")}
    history["poi"].copy_((history["poi"] % 5 + 1) * real)
    history["category"].copy_((history["category"] % 3 + 1) * real)
    history["action"].copy_(torch.where(torch.rand(real.shape) < 0.7, schema.ACTION_VISIT, schema.ACTION_CLICK) + schema.FIRST_CODE)
    crosses = cross_features(batch.ad_fields, batch.behaviours, batch.ad_place, batch.request_place)
    found = 0
    for b, n in np.ndindex(4, 9):
        for column, name, scale in ((0, "poi", 1.0), (1, "category", 2.0)):
            wanted = batch.ad_fields[b, n, poi if name == "poi" else category]
            count = sum(
                bool(real[b, j]) and history[name][b, j] == wanted and history["action"][b, j] == schema.ACTION_VISIT + schema.FIRST_CODE for j in range(12)
            )
            assert float(crosses[b, n, column]) == pytest.approx(np.log1p(int(count)) / scale, rel=1e-6)
            found += int(count)
    assert found > 20
