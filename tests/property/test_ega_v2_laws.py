"""Laws of EGA (V2)'s trie and page search, on drawn catalogues, masks, bids and organic items."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from v2_reference import TableDecoder, all_pages, mix, random_market, table_logit

from model.ega_v2.beam import Offers, Pages, SearchError, log_chances, search, top
from model.ega_v2.config import SearchConfig
from model.ega_v2.trie import Trie

LAW = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def pages_of(market, slots: int, config: SearchConfig, seed: int = 1) -> Pages:
    def decoder(part: slice) -> TableDecoder:
        return TableDecoder([seed], config.beams, market.poi_codes, market.creative_codes)

    return search(decoder, market.catalogue(), market.offers(), slots, config)


def slots_of(pages: Pages, request: int, beam: int) -> tuple:
    """A found page in the form of the reference."""
    found = []
    for slot in range(pages.ad.shape[-1]):
        ad, organic = int(pages.ad[request, beam, slot]), int(pages.organic[request, beam, slot])
        if ad < 0 and organic < 0:
            break
        codes = tuple(pages.poi_codes[request, beam, slot].tolist()), tuple(pages.creative_codes[request, beam, slot].tolist())
        found.append(("ad", ad, *codes) if ad >= 0 else ("organic", organic, *codes))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# Trie


@LAW
@given(seeds, st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_trie_is_a_dictionary_of_prefixes(seed: int, items: int, depth: int, width: int, used: int) -> None:
    rng = np.random.default_rng(seed)
    codes, keys = rng.integers(0, width, (items, depth)), rng.permutation(items)
    value = np.where(rng.random(items) < 0.7, rng.random(items), -np.inf)
    trie = Trie(codes, [width] * depth, keys)
    values = trie.sort(torch.tensor(value)[None])
    best, total = trie.maxima(values), trie.sums(torch.where(torch.isfinite(values), values, 0.0))
    taken = rng.choice(items, min(used, items), replace=False)
    position = torch.cat([trie.position[torch.from_numpy(taken)], torch.tensor([-1])])[None, None]
    without = trie.maxima_without(best, values, position)
    prefixes: dict[tuple, list[int]] = {}
    for item, row in enumerate(codes.tolist()):
        for level in range(depth + 1):
            prefixes.setdefault(tuple(row[:level]), []).append(item)
    assert trie.null == len(prefixes)

    def walk(node: int, prefix: tuple) -> None:
        level = len(prefix)
        below = prefixes[prefix]
        assert sorted(trie.order[trie.first[node] : trie.end[node]].tolist()) == below
        assert float(best[0, node]) == max(value[below])
        assert float(total[0, node]) == pytest.approx(sum(v for v in value[below] if v > -np.inf))
        for column, item in enumerate(taken):
            if level and tuple(codes[item][:level]) == prefix:
                assert float(without[0, 0, column, level - 1]) == max((value[i] for i in below if i not in taken), default=-np.inf)
        if level == depth:
            position, real = trie.items_below(torch.tensor(node))
            assert trie.order[position[real]].tolist() == sorted(below, key=lambda item: keys[item])
            return
        found = trie.children(torch.tensor(node), level)
        after = sorted({codes[item][level] for item in below})
        assert found.code[found.real].tolist() == after
        allowed = trie.next_codes(torch.tensor([node]), level, best)[0]
        assert [code for code in range(width) if allowed[code]] == [c for c in after if max(value[prefixes[(*prefix, c)]]) > -np.inf]
        for code, child in zip(after, found.node[found.real].tolist(), strict=True):
            assert int(trie.code[child]) == code
            walk(child, (*prefix, code))

    walk(0, ())
    assert bool(torch.isinf(without[0, 0, -1]).all()) and float(best[0, trie.null]) == -np.inf


# ---------------------------------------------------------------------------------------------------------------------
# Search


@LAW
@given(seeds, st.sampled_from([5, 4, 1, 0]), st.integers(0, 2), st.sampled_from([3, 2, 1]), st.sampled_from([(1.2, 2.0), (3.0, 0.01), (0.0, 1.0)]), st.sampled_from(["max", "mean"]), st.sampled_from([None, 2, 1, 0]))
def test_a_wide_beam_finds_every_page_with_its_chance(seed: int, ads: int, organics: int, slots: int, weights: tuple[float, float], of_prefix: str, most_ads: int | None) -> None:
    market = replace(random_market(seed, ads, organics), most_ads=most_ads)
    if not ads + organics:
        return
    alpha, beta = weights
    expected = {page.slots: page for page in all_pages(market, slots, alpha, beta, 1, of_prefix)}
    pages = pages_of(market, slots, SearchConfig(beams=min(4096, len(expected) + 3), alpha=alpha, beta=beta, bid_of_prefix=of_prefix))
    found = {slots_of(pages, 0, beam): beam for beam in range(len(pages.score[0])) if math.isfinite(pages.score[0, beam])}
    assert found.keys() == expected.keys()
    for slots_, beam in found.items():
        assert float(pages.score[0, beam]) == pytest.approx(expected[slots_].log, abs=1e-9)
        assert pages.poi_log_z[0, beam, : len(slots_)].tolist() == pytest.approx(list(expected[slots_].poi_log), abs=1e-9)
        assert float((pages.poi_log_z + pages.creative_log_z)[0, beam].sum()) == pytest.approx(float(pages.score[0, beam]), abs=1e-9)
    assert sum(math.exp(page.log) for page in expected.values()) == pytest.approx(1.0)
    scores = pages.score[0]
    assert bool((scores[:-1] >= scores[1:] - 1e-8).all())


@LAW
@given(seeds, st.integers(1, 30), st.integers(0, 4), st.integers(1, 5), st.integers(1, 9))
def test_every_page_is_lawful(seed: int, ads: int, organics: int, slots: int, beams: int) -> None:
    """No invalid or inactive tuple, no ad twice, the organic order kept, full pages, distinct beams: however narrow the beam."""
    market = random_market(seed, ads, organics, codes=4)
    pages = pages_of(market, slots, SearchConfig(beams=beams), seed)
    length = min(slots, sum(market.active) + organics)
    seen = set()
    for beam in range(beams):
        found = slots_of(pages, 0, beam)
        if not math.isfinite(pages.score[0, beam]):
            assert not found and bool((pages.creative[0, beam] == -1).all()) and bool((pages.poi_codes[0, beam] == -1).all())
            continue
        assert found not in seen and len(found) == length
        seen.add(found)
        shown = [index for kind, index, _, _ in found if kind == "ad"]
        assert len(set(shown)) == len(shown) and all(market.active[ad] for ad in shown)
        assert [index for kind, index, _, _ in found if kind == "organic"] == list(range(length - len(shown)))
        for slot, (kind, index, poi, creative) in enumerate(found):
            own = int(pages.creative[0, beam, slot])
            assert poi == (market.poi if kind == "ad" else market.organic)[index]
            assert market.creatives[own] == (index, creative) if kind == "ad" else (own == -1 and creative == market.organic_creative[index])
    assert math.isfinite(pages.score[0, 0]) and bool((pages.score[0, 1:] <= pages.score[0, :-1] + 1e-8).all())


@FEW
@given(seeds, st.floats(0, 4), st.sampled_from(["max", "mean"]))
def test_the_chance_of_an_ad_never_falls_when_its_own_bid_rises(seed: int, more: float, of_prefix: str) -> None:
    """In every slot, whatever was put above it."""
    market = random_market(seed, ads=5, organics=1)
    ad = seed % 5
    raised = market.with_bid(ad, market.bid[ad] + more)
    chances = []
    for case in (market, raised):
        pages = pages_of(case, 2, SearchConfig(beams=600, bid_of_prefix=of_prefix))
        above: dict[tuple, list[float]] = {}
        first = 0.0
        for beam, score in enumerate(pages.score[0].tolist()):
            found = slots_of(pages, 0, beam)
            if not found:
                continue
            first += math.exp(score) * (found[0][:2] == ("ad", ad))
            if len(found) == 2:
                entry = above.setdefault(found[0], [0.0, 0.0])
                entry[0] += math.exp(score) * (found[1][:2] == ("ad", ad))
                entry[1] += math.exp(score)
        chances.append((first, {slot: won / total for slot, (won, total) in above.items()}))
    (low, low_given), (high, high_given) = chances
    assert high >= low - 1e-12
    for slot in low_given.keys() & high_given.keys():
        assert high_given[slot] >= low_given[slot] - 1e-12


@FEW
@given(seeds, st.integers(2, 4), st.integers(1, 4), st.integers(1, 7))
def test_company_changes_no_bit(seed: int, requests: int, slots: int, beams: int) -> None:
    """A request alone, one by one among others, and together with others: one catalogue, other masks, bids and organic items."""
    market = random_market(seed, 8, 0, codes=3)
    rng = np.random.default_rng(seed)
    others = [random_market(seed + 1 + i, 8, int(rng.integers(0, 4))) for i in range(requests)]
    most = max(len(other.organic) for other in others)
    offers = [other.offers() for other in others]

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, torch.full((1, most - values.shape[1], 2), -1)], 1)

    whole = Offers(
        torch.cat([o.bid for o in offers]), torch.cat([o.active for o in offers]), torch.cat([o.value for o in offers]),
        torch.cat([padded(o.organic) for o in offers]), torch.cat([padded(o.organic_creative) for o in offers]),
    )  # fmt: skip
    catalogue, config = market.catalogue(), SearchConfig(beams=beams)

    def run(offers: Offers, seeds: list[int], at_once: int) -> Pages:
        return search(lambda part: TableDecoder(seeds[part], beams, 3, 3), catalogue, offers, slots, config, at_once)

    together, one_by_one = run(whole, list(range(requests)), requests), run(whole, list(range(requests)), 1)
    for request in range(requests):
        alone = run(offers[request], [request], 1)
        for name, values in vars(alone).items():
            assert torch.equal(values[0], vars(one_by_one)[name][request]), name
            assert torch.equal(values[0], vars(together)[name][request]), name


@FEW
@given(seeds, st.integers(1, 8))
def test_the_order_of_the_catalogue_does_not_matter(seed: int, beams: int) -> None:
    market = random_market(seed, 7, 2)
    order = np.random.default_rng(seed).permutation(7).tolist()
    place = {ad: at for at, ad in enumerate(order)}
    moved = replace(
        market, poi=[market.poi[ad] for ad in order], bid=[market.bid[ad] for ad in order], active=[market.active[ad] for ad in order],
        value=[market.value[ad] for ad in order], keys=[market.keys[ad] for ad in order], creatives=[(place[ad], codes) for ad, codes in market.creatives],
    )  # fmt: skip
    here, there = pages_of(market, 3, SearchConfig(beams=beams)), pages_of(moved, 3, SearchConfig(beams=beams))
    assert torch.equal(here.score, there.score) and torch.equal(here.organic, there.organic) and torch.equal(here.creative_codes, there.creative_codes)
    assert torch.equal(torch.where(here.ad >= 0, torch.tensor([place[ad] for ad in range(7)])[here.ad], -1), there.ad)


@LAW
@given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_top_breaks_ties_by_position(seed: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.choice([-np.inf, -2.0, -1.0, 0.0, 1 / 3], (2, width))
    noisy = scores * (1 + rng.choice([0.0, 1e-14], scores.shape))  # what rounding would do
    found = top(torch.from_numpy(noisy), min(count, width))
    for row, chosen in zip(scores, found.tolist(), strict=True):
        assert chosen == sorted(range(width), key=lambda i: (-row[i], i))[: min(count, width)]


@FEW
@given(seeds, st.integers(0, 6), st.integers(0, 3), st.integers(1, 3), st.sampled_from(["max", "mean"]))
def test_the_chance_of_a_found_page_is_found_again_with_gradients(seed: int, ads: int, organics: int, slots: int, of_prefix: str) -> None:
    market, config = random_market(seed, ads, organics), SearchConfig(beams=9, bid_of_prefix=of_prefix)
    pages = pages_of(market, slots, config, seed)
    state = torch.full((1, 9), seed)
    poi, creative = (torch.zeros(1, 9, slots, 2, 3, dtype=torch.float64) for _ in range(2))
    for slot in range(slots):  # what TableDecoder says of these pages
        for table, codes in ((poi, pages.poi_codes), (creative, pages.creative_codes)):
            for layer in range(2):
                if table is creative and layer == 0:
                    state = mix(state, pages.poi_codes[:, :, slot].sum(-1))
                elif layer or slot:
                    before = codes[:, :, slot, layer - 1] if layer else pages.poi_codes[:, :, slot - 1, -1]
                    state = mix(state, torch.where(before < 0, 3, before))
                table[:, :, slot, layer] = table_logit(state.unsqueeze(-1), torch.arange(3))
    poi.requires_grad_(True)
    creative.requires_grad_(True)
    found = log_chances(poi, creative, market.catalogue(), market.offers(), pages, config)
    torch.testing.assert_close(found[0], pages.poi_log_z)
    torch.testing.assert_close(found[1], pages.creative_log_z)
    if not bool((pages.poi_codes >= 0).any()):
        return  # nothing was shown, so there is nothing to learn
    (found[0].sum() + found[1].sum()).backward()
    for table, codes in ((poi, pages.poi_codes), (creative, pages.creative_codes)):
        assert bool(torch.isfinite(table.grad).all()) and bool((table.grad[codes < 0] == 0).all())
        torch.testing.assert_close(table.grad.sum(-1), torch.zeros(codes.shape, dtype=torch.float64))  # of a softmax
    allowed = {poi for poi, active in zip(market.poi, market.active, strict=True) if active} | set(market.organic)
    if allowed and (2, 2) not in allowed:
        with pytest.raises(SearchError, match="do not allow"):
            log_chances(poi, creative, market.catalogue(), market.offers(), replace(pages, poi_codes=torch.where(pages.poi_codes >= 0, 2, -1)), config)
