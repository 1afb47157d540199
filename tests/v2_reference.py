"""A plain-Python reading of the page search of EGA (V2), a decoder that is a table, and random markets for both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from model.ega_v2.beam import Catalogue, Offers

PRIME = 1_000_003


def mix(state: int | Tensor, code: int | Tensor) -> int | Tensor:
    """A hash of a history and its next code; the same for numbers and tensors."""
    return (state * 31 + code + 2) % PRIME


def table_logit(state: int | Tensor, code: int | Tensor) -> float | Tensor:
    """A logit in [-2, 2) that looks random but is a function of history and code."""
    drawn = (state * 7919 + (code + 1) * 104_729 * (state % 97 + 1)) % PRIME
    return (drawn.double() if isinstance(drawn, Tensor) else drawn) / PRIME * 4 - 2


class TableDecoder:
    """`beam.Decoder` whose logits are a function of everything chosen so far: any order of beams, any company, the same numbers."""

    def __init__(self, seeds_B: list[int], beams: int, poi_codes: int, creative_codes: int) -> None:
        self.state = torch.tensor(seeds_B).unsqueeze(1).expand(-1, beams).clone()
        self.request = torch.arange(len(seeds_B)).unsqueeze(1)
        self.poi_codes, self.creative_codes = poi_codes, creative_codes

    def _logits(self, codes: int) -> Tensor:
        return table_logit(self.state.unsqueeze(-1), torch.arange(codes))

    def poi_logits(self, previous_BR: Tensor | None, creative_BR: Tensor | None) -> Tensor:
        if previous_BR is not None:
            self.state = mix(self.state, previous_BR)
        return self._logits(self.poi_codes)

    def creative_logits(self, poi_BRC: Tensor, previous_BR: Tensor | None) -> Tensor:
        self.state = mix(self.state, poi_BRC.sum(-1) if previous_BR is None else previous_BR)
        return self._logits(self.creative_codes)

    def keep(self, parent_BR: Tensor) -> None:
        self.state = self.state[self.request, parent_BR]


@dataclass(frozen=True)
class Market:
    """One request in plain lists."""

    poi: list[tuple[int, ...]]
    creatives: list[tuple[int, tuple[int, ...]]]
    """(ad, codes)"""
    bid: list[float]
    active: list[bool]
    value: list[float]
    organic: list[tuple[int, ...]]
    organic_creative: list[tuple[int, ...]]
    keys: list[int]
    poi_codes: int
    creative_codes: int
    layers: int = 2
    parts: int = 2
    most_ads: int | None = None

    def catalogue(self) -> Catalogue:
        return Catalogue(
            np.array(self.poi, np.int64).reshape(-1, self.layers), self.poi_codes, np.array([ad for ad, _ in self.creatives], np.int64),
            np.array([codes for _, codes in self.creatives], np.int64).reshape(-1, self.parts), self.creative_codes, np.array(self.keys),
        )  # fmt: skip

    def offers(self) -> Offers:
        return Offers(
            torch.tensor([self.bid], dtype=torch.float64), torch.tensor([self.active], dtype=torch.bool), torch.tensor([self.value], dtype=torch.float64),
            torch.tensor([self.organic]).long().view(1, -1, self.layers), torch.tensor([self.organic_creative]).long().view(1, -1, self.parts),
            self.most_ads,
        )  # fmt: skip

    def with_bid(self, ad: int, bid: float) -> Market:
        return replace(self, bid=[bid if i == ad else b for i, b in enumerate(self.bid)], value=[v * bid / self.bid[ad] if i == ad else v for i, v in enumerate(self.value)])


@dataclass(frozen=True)
class Page:
    """A page so far; slots are (kind, index, POI codes, creative codes)."""

    slots: tuple[tuple[str, int, tuple[int, ...], tuple[int, ...]], ...] = ()
    log: float = 0.0
    state: int = 0
    poi_log: tuple[float, ...] = field(default=())


def random_market(seed: int, ads: int = 5, organics: int = 2, codes: int = 3) -> Market:
    """Few codes, so that tuples are shared, prefixes are crowded and organic items lie where ads lie."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 4, ads)
    shown = [tuple(rng.integers(0, codes, 2).tolist()) for _ in range(organics)]
    bid = np.round(rng.exponential(1.0, ads), 3) + 0.001
    return Market(
        poi=[tuple(rng.integers(0, codes, 2).tolist()) for _ in range(ads)],
        creatives=[(ad, tuple(rng.integers(0, codes, 2).tolist())) for ad in range(ads) for _ in range(count[ad])],
        bid=bid.tolist(),
        active=(rng.random(ads) < 0.8).tolist(),
        value=(bid * rng.choice([0.0, 0.5, 1.0], ads, p=[0.1, 0.4, 0.5])).tolist(),
        organic=shown,
        organic_creative=[tuple(rng.integers(0, codes, 2).tolist()) if rng.random() < 0.7 else (-1, -1) for _ in shown],
        keys=rng.permutation(ads).tolist(),
        poi_codes=codes,
        creative_codes=codes,
    )


def _normalise(logits: dict[int, float]) -> dict[int, float]:
    total = math.log(sum(math.exp(value) for value in logits.values())) if logits else 0.0
    return {code: value - total for code, value in logits.items()}


def all_pages(market: Market, slots: int, alpha: float, beta: float, seed: int, bid_of_prefix: str = "max", page: Page | None = None) -> Iterator[Page]:
    """Every page that the rules allow, with its log chance: by recursion, from the definitions alone."""
    page = Page(state=seed) if page is None else page
    used = {index for kind, index, _, _ in page.slots if kind == "ad"}
    shown = sum(kind == "organic" for kind, *_ in page.slots)
    most = slots if market.most_ads is None else market.most_ads
    left = [ad for ad in range(len(market.poi)) if market.active[ad] and ad not in used and len(used) < most]
    following = market.organic[shown] if shown < len(market.organic) else None
    if len(page.slots) == slots or (not left and following is None):
        yield page
        return
    state = page.state if not page.slots else mix(page.state, page.slots[-1][2][-1])
    for poi, log, chosen in _pois(market, left, following, (), 0.0, state, alpha, beta, bid_of_prefix):
        here = [ad for ad in left if market.poi[ad] == poi]
        best = min(here, key=lambda ad: (-market.value[ad], market.keys[ad]), default=None)
        organic = poi == following and (best is None or not market.value[best] > 0)
        own = [codes for ad, codes in market.creatives if not organic and ad == best]
        forced = market.organic_creative[shown] if organic else None
        for creative, creative_log, end in _creatives(market, own, forced, (), 0.0, mix(chosen, sum(poi))):
            slot = ("organic", shown, poi, creative) if organic else ("ad", best, poi, creative)
            after = Page((*page.slots, slot), page.log + log + creative_log, end, (*page.poi_log, log))
            yield from all_pages(market, slots, alpha, beta, seed, bid_of_prefix, after)


def _pois(market, left, following, prefix, log, state, alpha, beta, bid_of_prefix):
    """(tuple, log z, state) of every POI tuple that may come next."""
    depth = len(prefix)
    if depth == market.layers:
        yield prefix, log, state
        return
    if prefix:
        state = mix(state, prefix[-1])
    reachable: dict[int, list[float]] = {}
    for ad in left:
        if market.poi[ad][:depth] == prefix:
            reachable.setdefault(market.poi[ad][depth], []).append(market.bid[ad])
    if following is not None and following[:depth] == prefix:
        reachable.setdefault(following[depth], []).append(0.0)
    merge = max if bid_of_prefix == "max" else (lambda bids: sum(bids) / len(bids))
    logits = {code: table_logit(state, code) + math.log(merge(bids) ** alpha + beta) for code, bids in reachable.items()}
    for code, gained in _normalise(logits).items():
        yield from _pois(market, left, following, (*prefix, code), log + gained, state, alpha, beta, bid_of_prefix)


def _creatives(market, own, forced, prefix, log, state):
    """(codes, log z, state) of every creative tuple of the item; an organic item's is given."""
    depth = len(prefix)
    if depth == market.parts:
        yield prefix, log, state
        return
    if prefix:
        state = mix(state, prefix[-1] if prefix[-1] >= 0 else market.creative_codes)
    if forced is not None:
        yield from _creatives(market, own, forced, (*prefix, forced[depth]), log, state)
        return
    codes = {codes[depth] for codes in own if codes[:depth] == prefix}
    for code, gained in _normalise({code: table_logit(state, code) for code in codes}).items():
        yield from _creatives(market, own, forced, (*prefix, code), log + gained, state)
