"""From a history to the chosen page: against every proposed page judged alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from v2_tiny import SIZES, history, market, network

from model.ega_v2.allocation import Allocation, ItemFeatures, allocate
from model.ega_v2.beam import Offers, Pages, log_chances, search
from model.ega_v2.config import SearchConfig
from model.ega_v2.network import PageItems

REQUESTS, ADS, ORGANICS, SLOTS, CONFIG = 3, 9, 2, 3, SearchConfig(beams=7)


def features(seed: int = 0, ads: int = ADS) -> ItemFeatures:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((REQUESTS, ads, SIZES.poi_features), (REQUESTS, 2 * ads, SIZES.creative_features), (REQUESTS, ORGANICS, SIZES.poi_features), (REQUESTS, ORGANICS, SIZES.creative_features))
    return ItemFeatures(*(torch.randn(shape, generator=generator) for shape in shapes))


@torch.inference_mode()
def test_the_most_valuable_of_the_proposed_pages_is_chosen() -> None:
    model, (catalogue, offers), seen, known = network(), market(REQUESTS, ADS, ORGANICS), history(REQUESTS), features()
    found = allocate(model, seen, catalogue, offers, known, SLOTS, CONFIG)
    pages = search(model.decoder(seen, CONFIG.beams, SLOTS), catalogue, offers, SLOTS, CONFIG)
    for request in range(REQUESTS):
        values = []
        for beam in range(CONFIG.beams):
            ads, organic, creatives = (values_[request, beam].tolist() for values_ in (pages.ad, pages.organic, pages.creative))
            poi = torch.stack([known.poi[request, a] if a >= 0 else known.organic[request, o] for a, o in zip(ads, organic, strict=True)])
            creative = torch.stack([known.creative[request, c] if c >= 0 else known.organic_creative[request, o] for c, o in zip(creatives, organic, strict=True)])
            items = PageItems(pages.poi_codes[request, beam][None], pages.creative_codes[request, beam][None], torch.tensor([[o >= 0 for o in organic]]), poi[None], creative[None])
            ctr = torch.sigmoid(model.reward(model.encode(seen.rows(slice(request, request + 1))), items).poi_click[0])
            values.append(sum(float(offers.bid[request, a]) * float(ctr[slot]) for slot, a in enumerate(ads) if a >= 0))
            if beam == int(found.beam[request]):
                torch.testing.assert_close(found.poi_ctr[request].float(), ctr)
                assert (found.ad[request].tolist(), found.organic[request].tolist(), found.creative[request].tolist()) == (ads, organic, creatives)
                torch.testing.assert_close(found.poi_chance[request], pages.poi_log_z[request, beam].exp())
        assert values[int(found.beam[request])] == pytest.approx(max(values), rel=1e-6) == pytest.approx(float(found.value[request]), rel=1e-5)
    assert len(set(found.beam.tolist())) > 1 or int(found.beam[0]) != 0  # the reward model had something to say


@torch.inference_mode()
def test_company_changes_no_bit() -> None:
    model, (catalogue, offers), seen, known = network(), market(REQUESTS, ADS, ORGANICS), history(REQUESTS), features()
    whole = allocate(model, seen, catalogue, offers, known, SLOTS, CONFIG)
    for request in range(REQUESTS):
        part = slice(request, request + 1)
        alone = allocate(model, seen.rows(part), catalogue, offers.rows(part), ItemFeatures(*(values[part] for values in vars(known).values())), SLOTS, CONFIG)
        assert all(torch.equal(values[0], vars(whole)[name][request]) for name, values in vars(alone).items())


@torch.inference_mode()
def test_bids_move_pages_and_never_the_chance_of_a_click() -> None:
    """The same page is read alike whatever was bid for it."""
    model, (catalogue, offers), seen, known = network(), market(1, ADS, ORGANICS), history(1), features()
    only = replace(offers, active=torch.arange(ADS)[None] < 1, organic=offers.organic[:, :0], organic_creative=offers.organic_creative[:, :0])
    found: list[Allocation] = [allocate(model, seen, catalogue, replace(only, bid=only.bid * factor), replace(known, organic=known.organic[:, :0], organic_creative=known.organic_creative[:, :0]), SLOTS, SearchConfig(beams=1)) for factor in (1.0, 50.0)]
    assert found[0].ad.tolist() == found[1].ad.tolist() == [[0, -1, -1]]
    assert torch.equal(found[0].poi_ctr, found[1].poi_ctr) and bool((found[0].poi_ctr[:, 1:] == 0).all())
    assert float(found[1].value) == pytest.approx(50 * float(found[0].value))


@torch.inference_mode()
def test_organic_items_alone_make_a_page_worth_nothing() -> None:
    model, (catalogue, offers), seen = network(), market(1, 4, ORGANICS), history(1)
    found = allocate(model, seen, catalogue, replace(offers, active=torch.zeros_like(offers.active)), features(ads=4), SLOTS, CONFIG)
    assert found.organic.tolist() == [[0, 1, -1]] and float(found.value) == 0.0 and bool((found.poi_ctr[:, :2] > 0).all())
    bare, _ = market(1, 0, ORGANICS)
    nothing = Offers(offers.bid[:, :0], offers.active[:, :0], offers.value[:, :0], offers.organic, offers.organic_creative)
    assert allocate(model, seen, bare, nothing, features(ads=0), SLOTS, CONFIG).organic.tolist() == [[0, 1, -1]]


def test_a_step_along_the_gradient_makes_a_page_likelier() -> None:
    """What a policy gradient does: the search's own log z, now with gradients, from whole pages at once."""
    model, (catalogue, offers), seen = network(), market(REQUESTS, ADS, ORGANICS), history(REQUESTS)
    with torch.inference_mode():
        found = search(model.decoder(seen, CONFIG.beams, SLOTS), catalogue, offers, SLOTS, CONFIG)
    pages = Pages(*(values[:, 2:3].clone() for values in vars(found).values()))

    def chances() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.page_logits(model.encode(seen), pages.poi_codes[:, 0], pages.creative_codes[:, 0])
        return log_chances(logits.poi.unsqueeze(1), logits.creative.unsqueeze(1), catalogue, offers, pages, CONFIG)

    before = chances()
    torch.testing.assert_close(before[0], pages.poi_log_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before[1], pages.creative_log_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(before).sum(-1), pages.score, rtol=1e-4, atol=1e-5)
    optimiser = torch.optim.SGD(model.enter_stage("pretrain"), lr=0.01)
    (-sum(before).sum()).backward()
    optimiser.step()
    assert float(sum(chances()).sum()) > float(sum(before).sum()) + 0.01
