"""EGA (V2)'s network: causality, masks, gradients, stepwise equal to whole, reward and payment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from torch.nn import functional as F
from v2_tiny import NETWORK, SIZES, history, market, network, page, page_items

from model.bundle import state_bytes
from model.ega_v2.beam import search
from model.ega_v2.config import SearchConfig
from model.ega_v2.network import Decoding, EgaV2, NetworkConfig, generation_losses

SLOTS, LAYERS, PARTS = NETWORK.slots, SIZES.poi_layers, SIZES.creative_layers


def test_weights_survive_storage() -> None:
    """No tensor is stored twice, and the same weights give the same bytes."""
    model, other = network(0), network(1)
    data = state_bytes(model)
    other.load_state_dict(load(data))
    assert state_bytes(other) == data and len(load(data)) == len(list(model.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Encoder


def test_padding_is_ignored_and_only_the_newest_behaviours_are_read() -> None:
    model, seen = network(), history(3, 6)
    whole = model.encode(seen)
    empty = (seen.poi < 0)[..., :1]
    padded = replace(seen, creative=torch.where(empty, 1, seen.creative), fields=torch.where(empty, 2, seen.fields))
    mask = whole.mask.unsqueeze(-1)
    torch.testing.assert_close(model.encode(padded).token * mask, whole.token * mask)
    longer = history(3, 9, seed=1)
    recent = replace(longer, poi=longer.poi[:, 3:], creative=longer.creative[:, 3:], fields=longer.fields[:, 3:])
    assert torch.equal(model.encode(longer).token, model.encode(recent).token)
    short = replace(seen, poi=seen.poi[:, 4:], creative=seen.creative[:, 4:], fields=seen.fields[:, 4:])
    filled = replace(seen, poi=torch.where(torch.arange(6)[None, :, None] < 4, -1, seen.poi))
    torch.testing.assert_close(model.encode(short).token[:, -2:], model.encode(filled).token[:, -2:])
    assert whole.token.shape == (3, 7, NETWORK.width) and bool(torch.isfinite(whole.token).all())


def test_a_user_without_history_is_still_somebody() -> None:
    model, seen = network(), history(2, 6)
    nobody = replace(seen, poi=torch.full_like(seen.poi, -1), user=torch.tensor([[1], [2]]))
    memory = model.encode(nobody)
    assert memory.mask.sum().item() == 2 and bool(torch.isfinite(memory.token).all())
    assert not torch.allclose(memory.token[0, 0], memory.token[1, 0])


@pytest.mark.parametrize("what", ["poi", "creative", "fields", "user"])
def test_every_part_of_a_history_is_read(what: str) -> None:
    model, seen = network(), history(1, 6)
    values = getattr(seen, what)
    changed = replace(seen, **{what: torch.where(values == 1, 2, 1)})
    assert not torch.allclose(model.encode(changed).token[:, 0], model.encode(seen).token[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Decoders


def test_a_code_sees_what_is_before_it_and_nothing_else() -> None:
    """POI codes see POI codes only; creative codes see all POIs up to their own and the creative codes before, but for the last of each."""
    model, (poi, creative) = network(), page(1, full=True)
    memory = model.encode(history(1))
    before = model.page_logits(memory, poi, creative)
    for slot in range(SLOTS):
        for layer in range(LAYERS):
            changed = poi.clone()
            changed[0, slot, layer] = (changed[0, slot, layer] + 1) % SIZES.poi_codes
            after = model.page_logits(memory, changed, creative)
            moved = (after.poi - before.poi).abs().amax(-1).flatten() > 1e-6
            place = slot * LAYERS + layer
            assert not bool(moved[: place + 1].any()) and bool(moved[place + 1 :].all())
            moved = (after.creative - before.creative).abs().amax((0, 2, 3)) > 1e-6
            assert not bool(moved[:slot].any()) and bool(moved[slot:].all())
        for part in range(PARTS):
            changed = creative.clone()
            changed[0, slot, part] = (changed[0, slot, part] + 1) % SIZES.creative_codes
            after = model.page_logits(memory, poi, changed)
            assert torch.equal(after.poi, before.poi)
            moved = (after.creative - before.creative).abs().amax(-1).flatten() > 1e-6
            place = slot * PARTS + part
            assert moved.tolist() == [False] * (place + 1) + [part + 1 < PARTS] * (SLOTS * PARTS - place - 1)


def test_in_one_sequence_a_code_sees_all_codes_before_it() -> None:
    """Without multi-token prediction: POI, creative, POI, creative ... and no decoder beside."""
    model, (poi, creative) = network(multi_token=False), page(1, full=True)
    assert not any("creative_blocks" in name or name.startswith("join") for name, _ in model.named_parameters())
    memory = model.encode(history(1))

    def codes(pages: torch.Tensor, creatives: torch.Tensor) -> torch.Tensor:
        found = model.page_logits(memory, pages, creatives)
        return torch.cat([F.pad(found.poi, (0, SIZES.creative_codes)), F.pad(found.creative, (0, SIZES.poi_codes))], 2).flatten(0, 2)

    before = codes(poi, creative)
    for place in range(SLOTS * (LAYERS + PARTS)):
        slot, layer = divmod(place, LAYERS + PARTS)
        changed, other = poi.clone(), creative.clone()
        if layer < LAYERS:
            changed[0, slot, layer] = (changed[0, slot, layer] + 1) % SIZES.poi_codes
        else:
            other[0, slot, layer - LAYERS] = (other[0, slot, layer - LAYERS] + 1) % SIZES.creative_codes
        moved = (codes(changed, other) - before).abs().amax(-1) > 1e-6
        assert not bool(moved[: place + 1].any()) and bool(moved[place + 1 :].all())


def test_empty_slots_change_nothing_before_them() -> None:
    model, (poi, creative) = network(), page(2, full=True)
    memory = model.encode(history(2))
    whole = model.page_logits(memory, poi, creative)
    cut_poi, cut_creative = poi.clone(), creative.clone()
    cut_poi[:, 2:], cut_creative[:, 2:] = -1, -1
    cut = model.page_logits(memory, cut_poi, cut_creative)
    short = model.page_logits(memory, poi[:, :2], creative[:, :2])
    for part in ("poi", "creative"):
        assert torch.equal(getattr(cut, part)[:, :2], getattr(whole, part)[:, :2])
        torch.testing.assert_close(getattr(short, part), getattr(whole, part)[:, :2])


@torch.no_grad()
@pytest.mark.parametrize("multi_token", [True, False])
def test_step_by_step_equals_whole_pages_however_the_beams_are_shuffled(multi_token: bool) -> None:
    model, beams, requests = network(multi_token=multi_token), 5, 2
    memory = model.encode(history(requests))
    generator = torch.Generator().manual_seed(0)
    decoding = Decoding(model, memory, beams, SLOTS)
    poi = torch.full((requests, beams, SLOTS, LAYERS), -1)
    creative = torch.full((requests, beams, SLOTS, PARTS), -1)
    row = torch.arange(requests).unsqueeze(1)
    seen: dict[tuple[str, int, int], torch.Tensor] = {}

    def keep(codes: torch.Tensor, slot: int, layer: int, count: int) -> torch.Tensor:
        nonlocal poi, creative, seen
        parent = torch.randint(0, beams, (requests, beams), generator=generator)
        decoding.keep(parent)
        poi, creative = poi[row, parent], creative[row, parent]
        seen = {place: logits[row, parent] for place, logits in seen.items()}
        codes = {"poi": poi, "creative": creative}[codes]
        codes[:, :, slot, layer] = torch.randint(0, count, (requests, beams), generator=generator)
        return codes[:, :, slot, layer]

    previous = last = None
    for slot in range(SLOTS):
        for layer in range(LAYERS):
            seen["poi", slot, layer] = decoding.poi_logits(previous, None if layer else last)
            previous = keep("poi", slot, layer, SIZES.poi_codes)
        last = None
        for part in range(PARTS):
            seen["creative", slot, part] = decoding.creative_logits(poi[:, :, slot], last)
            last = keep("creative", slot, part, SIZES.creative_codes)
        previous = poi[:, :, slot, -1]
    for beam in range(beams):
        whole = model.page_logits(memory, poi[:, beam], creative[:, beam])
        for (kind, slot, layer), logits in seen.items():
            torch.testing.assert_close(logits[:, beam], getattr(whole, kind)[:, slot, layer], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_prefix_is_computed_once_however_many_beams_have_it() -> None:
    """Six beams of two requests: the first request's share a prefix, the second's are three; logits are those of pages of their own."""
    model = network()
    memory = model.encode(history(2))
    first = torch.tensor([[1] * 6, [0, 1, 2, 2, 1, 0]])
    decoding = Decoding(model, memory, 6, SLOTS)
    decoding.poi_logits(None, None)
    assert decoding.poi.count == 1
    logits = decoding.poi_logits(first, None)
    assert decoding.poi.count == 3
    for beam in range(6):
        codes = torch.zeros(2, 1, LAYERS, dtype=torch.int64)
        codes[:, 0, 0] = first[:, beam]
        torch.testing.assert_close(logits[:, beam], model.page_logits(memory, codes, codes[..., :PARTS]).poi[:, 0, 1], rtol=1e-4, atol=1e-5)
    many = Decoding(model, model.encode(history(1)), 2, SLOTS, batch=3)
    many.poi_logits(None, None)
    many.poi_logits(torch.tensor([[0, 1], [1, 0], [0, 0]]), None)
    assert many.poi.count == 2


def test_a_longer_page_than_the_network_knows_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="3 searches were asked for one request, and the memory is of 2"):
        Decoding(model, model.encode(history(2)), 2, SLOTS, batch=3)
    with pytest.raises(ValueError, match="5 slots"):
        Decoding(model, model.encode(history(1)), 2, SLOTS + 1)


@torch.inference_mode()
def test_pages_of_a_network_do_not_depend_on_the_batch() -> None:
    """Alone, in company, in another order: the same bits, scores included."""
    model, (catalogue, offers), seen = network(), market(4, 20), history(4)
    config = SearchConfig(beams=6)

    def run(part: slice) -> dict[str, torch.Tensor]:
        return vars(search(model.decoder(seen.rows(part), config.beams, 3), catalogue, offers.rows(part), 3, config))

    whole = run(slice(None))
    for request in range(4):
        alone = run(slice(request, request + 1))
        assert all(torch.equal(alone[name][0], whole[name][request]) for name in whole)
    backwards = search(model.decoder(type(seen)(*(x.flip(0) for x in vars(seen).values())), 6, 3), catalogue, type(offers)(*(x.flip(0) for x in vars(offers).values() if x is not None)), 3, config)
    assert all(torch.equal(values.flip(0), whole[name]) for name, values in vars(backwards).items())
    together = search(model.decoder(seen, 6, 3), catalogue, offers, 3, config, requests_at_once=4)
    torch.testing.assert_close(together.score, whole["score"], rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_losses_are_mean_cross_entropies_of_the_codes_that_are_there() -> None:
    model, (poi, creative) = network(), page(5)
    logits = model.page_logits(model.encode(history(5)), poi, creative)
    ntp, mtp = generation_losses(logits, poi, creative)
    for found, table, codes in ((ntp, logits.poi, poi), (mtp, logits.creative, creative)):
        terms = [-F.log_softmax(table[place], -1)[codes[place]] for place in zip(*(codes >= 0).nonzero().unbind(1), strict=True)]
        torch.testing.assert_close(found, torch.stack(terms).mean())
    assert bool((creative < 0).any()) and bool((poi < 0).any())
    nothing = generation_losses(logits, torch.full_like(poi, -1), torch.full_like(creative, -1))
    assert [float(loss) for loss in nothing] == [0.0, 0.0]


def test_what_is_not_there_has_no_gradient() -> None:
    model, (poi, creative) = network(), page(5)
    logits = model.page_logits(model.encode(history(5)), poi, creative)
    logits.poi.retain_grad()
    logits.creative.retain_grad()
    sum(generation_losses(logits, poi, creative)).backward()
    for table, codes in ((logits.poi, poi), (logits.creative, creative)):
        size = table.grad.abs().amax(-1)
        assert bool((size[codes < 0] == 0).all()) and bool((size[codes >= 0] > 0).all())


def test_every_parameter_of_a_stage_learns_and_no_other() -> None:
    model, (poi, creative) = network(), page(8)
    stages = {stage: model.enter_stage(stage) for stage in ("reward", "payment", "rlaf", "pretrain")}
    assert sum(len(parameters) for parameters in stages.values()) == len(list(model.parameters()))
    sum(generation_losses(model.page_logits(model.encode(history(8)), poi, creative), poi, creative)).backward()
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    assert not [named[id(p)] for p in stages["pretrain"] if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert all(p.grad is None for stage in ("reward", "payment", "rlaf") for p in stages[stage])
    model.zero_grad()
    parameters = model.enter_stage("reward")
    rewards = model.reward(model.encode(history(8)), page_items(8))
    sum(logit.square().sum() for logit in vars(rewards).values()).backward()
    assert not [named[id(p)] for p in parameters if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert all(p.grad is None for p in stages["pretrain"])


def test_the_creative_loss_teaches_the_poi_decoder() -> None:
    """Multi-token prediction: L_MTP reaches the POI decoder through h."""
    model, (poi, creative) = network(), page(3, full=True)
    generation_losses(model.page_logits(model.encode(history(3)), poi, creative), poi, creative)[1].backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.poi_blocks.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Reward model and payments


def test_rewards_depend_on_the_order_and_on_the_company() -> None:
    model, items = network(), page_items(1, full=True)
    memory = model.encode(history(1))
    before = model.reward(memory, items)
    swap = torch.tensor([1, 0, 2, 3])
    swapped = model.reward(memory, type(items)(*(values[:, swap] for values in vars(items).values())))
    other = items.poi.clone()
    other[0, 3, 0] = (other[0, 3, 0] + 1) % SIZES.poi_codes
    company = model.reward(memory, replace(items, poi=other))
    for tower in vars(before):
        assert not torch.allclose(getattr(swapped, tower)[:, swap], getattr(before, tower))
        assert not torch.allclose(getattr(company, tower)[:, :3], getattr(before, tower)[:, :3])


@pytest.mark.parametrize("what", ["creative", "organic", "poi_features", "creative_features"])
def test_every_part_of_an_item_is_read(what: str) -> None:
    model, items = network(), page_items(1, full=True)
    memory = model.encode(history(1))
    values = getattr(items, what)
    changed = ~values if what == "organic" else (values + 1) % SIZES.creative_codes if what == "creative" else values + 1
    assert not torch.allclose(model.reward(memory, replace(items, **{what: changed})).poi_click, model.reward(memory, items).poi_click)


def test_empty_slots_of_a_page_are_ignored() -> None:
    model, items = network(), page_items(6)
    memory = model.encode(history(6))
    empty = (items.poi < 0).any(-1)
    assert bool(empty.any())
    junk = replace(items, creative=torch.where(empty.unsqueeze(-1), 1, items.creative), poi_features=torch.where(empty.unsqueeze(-1), 9.0, items.poi_features))
    for tower in ("poi_click", "creative_click", "purchase"):
        torch.testing.assert_close(getattr(model.reward(memory, junk), tower)[~empty], getattr(model.reward(memory, items), tower)[~empty])
    nothing = replace(items, poi=torch.full_like(items.poi, -1))
    assert bool(torch.isfinite(model.reward(memory, nothing).poi_click).all())


def test_an_untrained_tower_says_the_prior() -> None:
    torch.manual_seed(0)
    model = EgaV2(NETWORK, SIZES, prior_ctr=0.03)
    rewards = model.reward(model.encode(history(2)), page_items(2))
    for tower in vars(rewards).values():
        torch.testing.assert_close(torch.sigmoid(tower), torch.full_like(tower, 0.03))


def test_payments_lie_between_reserve_and_bid_and_organic_items_pay_nothing() -> None:
    model = network()
    states = model.reward.states(model.encode(history(50)), page_items(50, slots=3))
    generator = torch.Generator().manual_seed(1)
    bid = torch.randn(50, 3, generator=generator).exp() * (torch.rand(50, 3, generator=generator) < 0.7)
    reserve, exposure = 0.6 * bid * torch.rand(50, 3, generator=generator), torch.rand(50, 3, generator=generator)
    rival, pivot = (2 * bid * torch.rand(50, 3, generator=generator) for _ in range(2))
    price = model.payment(states, bid, exposure, reserve, rival, pivot)
    assert bool((price <= bid).all()) and bool((price >= reserve).all()) and bool((price[bid == 0] == 0).all())
    assert bool((price[bid > 0] > 0).all()) and len(price[bid > 0].unique()) > 50
    assert torch.equal(model.payment(states, bid, exposure, bid + 1, rival, pivot), bid)
    louder = bid.clone()
    louder[:, 0] += 5
    assert not torch.allclose(model.payment(states, louder, exposure, reserve, rival, pivot)[:, 1], price[:, 1])
    assert not torch.allclose(model.payment(states, bid, exposure, reserve, 0.1 * rival, pivot), price)


@pytest.mark.parametrize(("change", "message"), [({"heads": 3}, "multiple of heads"), ({"tower_hidden": ()}, "tower_hidden"), ({"slots": 0}, "slots"), ({"unknown": 1}, "unknown")])
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        NetworkConfig(**change)
