"""From a user's history to one page: the search proposes R pages, the reward model picks the most valuable.

Shape letters: B requests, R beams, K slots, N ads, M creatives, O organic items, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.ega_v2.beam import Catalogue, Offers, Pages, best_page, search
from model.ega_v2.config import SearchConfig
from model.ega_v2.network import Decoding, EgaV2, History, Memory, PageItems, RewardModel


@dataclass(frozen=True)
class ItemFeatures:
    """What the reward model reads of items beside their codes; no money among it."""

    poi: Tensor
    """[B, N, F] by ad."""
    creative: Tensor
    """[B, M, F] by creative."""
    organic: Tensor
    """[B, O, F]"""
    organic_creative: Tensor
    """[B, O, F]"""


@dataclass(frozen=True)
class Allocation:
    """The chosen page of every request; -1 and 0 where a slot holds no such item."""

    ad: Tensor
    """[B, K]"""
    creative: Tensor
    """[B, K]"""
    organic: Tensor
    """[B, K] place in the organic order."""
    beam: Tensor
    """[B] which of the proposed pages it is."""
    value: Tensor
    """[B] sum over ads of bid * pCTR of the POI, bids over the city's median."""
    poi_ctr: Tensor
    """[B, K] chance of a click on the POI, on this page."""
    creative_ctr: Tensor
    """[B, K] chance of a click on the creative."""
    purchase_rate: Tensor
    """[B, K] chance of a purchase after a click."""
    poi_chance: Tensor
    """[B, K] z of the POI in its slot."""
    score: Tensor
    """[B] log chance of the page in the search."""


def allocate(network: EgaV2, history: History, catalogue: Catalogue, offers: Offers, features: ItemFeatures, slots: int, config: SearchConfig) -> Allocation:
    """One page a request. Requests are worked on one by one, so the result is the same to the bit in any batch (see `beam.search`)."""
    found = []
    for request in range(len(offers.bid)):
        part = slice(request, request + 1)
        memory = network.encode(history.rows(part))
        pages = search(lambda _, memory=memory: Decoding(network, memory, config.beams, slots), catalogue, offers.rows(part), slots, config)
        found.append(_most_valuable(network, memory, pages, offers.rows(part), items_of(pages, features, request)))
    return Allocation(*(torch.cat(column) for column in zip(*(vars(chosen).values() for chosen in found), strict=True)))


def items_of(pages: Pages, features: ItemFeatures, request: int) -> PageItems:
    """All R pages of one request as the reward model reads them, [R, K, ...]."""

    def rows(own: Tensor, index: Tensor, organic: Tensor, place: Tensor) -> Tensor:
        table = torch.cat([own, organic, own.new_zeros(1, own.shape[1])])
        return table[torch.where(index >= 0, index, torch.where(place >= 0, len(own) + place, len(table) - 1))]

    ad, creative, organic = pages.ad[0], pages.creative[0], pages.organic[0]
    return PageItems(
        poi=pages.poi_codes[0], creative=pages.creative_codes[0], organic=organic >= 0,
        poi_features=rows(features.poi[request], ad, features.organic[request], organic),
        creative_features=rows(features.creative[request], creative, features.organic_creative[request], organic),
    )  # fmt: skip


def page_values(network: EgaV2, memory: Memory, pages: Pages, offers: Offers, features: ItemFeatures, reward: RewardModel | None = None) -> tuple[Tensor, Tensor]:
    """Value of every proposed page, [B, R]: sum over its ads of bid * pCTR, and what each slot adds to it, [B, R, K]; `reward` judges, by default the network's own."""
    found = []
    for request in range(len(offers.bid)):
        part = slice(request, request + 1)
        own = Pages(*(values[part] for values in vars(pages).values()))
        found.append(_read(network.reward if reward is None else reward, Memory(memory.token[part], memory.mask[part]), own, offers.rows(part), items_of(own, features, part.start))[0])
    worth = torch.cat(found)
    return worth.sum(-1), worth


def _read(reward: RewardModel, memory: Memory, pages: Pages, offers: Offers, items: PageItems) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bid * pCTR of every slot of the pages of one request, [1, R, K], and the three rates."""
    rewards = reward(memory, items)
    real = (items.poi >= 0).all(-1).unsqueeze(0)
    poi, creative, purchase = (torch.sigmoid(logit.double()).unsqueeze(0) * real for logit in (rewards.poi_click, rewards.creative_click, rewards.purchase))
    bid = torch.where(pages.ad >= 0, torch.gather(offers.bid.double(), 1, pages.ad.clamp(min=0).flatten(1)).view(pages.ad.shape), 0.0) if offers.bid.shape[1] else poi * 0
    return bid * poi, poi, creative, purchase


def _most_valuable(network: EgaV2, memory: Memory, pages: Pages, offers: Offers, items: PageItems) -> Allocation:
    """The page of one request with the greatest expected value of clicks; of equal ones the better beam."""
    worth, poi, creative, purchase = _read(network.reward, memory, pages, offers, items)
    value = worth.sum(-1)
    beam = best_page(pages, value)
    chosen = [values[:, beam[0]] for values in (pages.ad, pages.creative, pages.organic)]
    real = (items.poi >= 0).all(-1).unsqueeze(0)
    rates = [values[:, beam[0]] for values in (poi, creative, purchase, torch.where(real, pages.poi_log_z.exp(), 0.0))]
    return Allocation(*chosen, beam, value[:, beam[0]], *rates, pages.score[:, beam[0]])
