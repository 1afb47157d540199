"""Pages of EGA (V2) for live requests from a verified bundle: what serving calls. The same pages as `model.ega_v2.replay` gives for samples.

NumPy in, NumPy out; money in currency. Shape letters: N ads of the city, G creatives, K ads of the page, L behaviours, O organic items, E numbers of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from auction.implicit import draws, probe_bids
from auction.receipt import charge
from auction.ties import tie_keys
from marketplace import schema
from model.bundle import Bundle
from model.ega_v2 import inputs
from model.ega_v2.allocation import ItemFeatures
from model.ega_v2.beam import Catalogue, Offers
from model.ega_v2.data import BEHAVIOUR_COLUMNS, HOUR_COLUMN, ranks
from model.ega_v2.model import EgaV2Model
from model.ega_v2.network import NONE, History
from model.ega_v2.payment import Rule, prices, probed, shown_pages


class UnknownCreatives(ValueError):
    """The city's ads have no creatives to choose from; the message says which."""


@dataclass(frozen=True)
class Creatives:
    """All creatives, ascending by id."""

    creative_id: np.ndarray
    """[G]"""
    ad_id: np.ndarray
    """[G]"""
    embedding: np.ndarray
    """[G, E] float32"""


@dataclass(frozen=True)
class Places:
    """Places; a place that training has not seen has index UNKNOWN and gets codes from category and position."""

    index: np.ndarray
    """[X] in the model's vocabulary of POIs."""
    poi_id: np.ndarray
    category_id: np.ndarray
    position: np.ndarray
    """[X, 2] in degrees."""


@dataclass(frozen=True)
class Visits:
    """A user's behaviours before the request, newest first; zeros behind the last."""

    places: Places
    """[L]"""
    creative_id: np.ndarray
    """[L] the creative that led there, 0 none."""
    count: int
    """How many of the L there are."""

    @property
    def real(self) -> np.ndarray:
        """[1, L]"""
        return (np.arange(len(self.creative_id)) < self.count)[None]


@dataclass(frozen=True)
class CityPages:
    """What the search needs of a city's active ads under one model; immutable."""

    ad_id: np.ndarray
    """[N]"""
    ads: Places
    catalogue: Catalogue
    creatives: Creatives
    """Of all cities: a history may name any."""
    creative_codes: torch.Tensor
    """[G, codes]"""
    mine: np.ndarray
    """[M] rows of `creatives` that belong to these ads."""


@dataclass(frozen=True)
class GeneratedPage:
    """A priced page of K' ads, top first."""

    rows: np.ndarray
    """Rows among the city's ads."""
    creative_id: np.ndarray
    above: np.ndarray
    """Organic items above each ad."""
    pctr: np.ndarray
    """Click probability on this page."""
    price: np.ndarray
    """Charge per click, reserve <= price <= bid."""
    next_score: np.ndarray
    """bid * pCTR of the next ad in this ad's place, currency: what GSP divides by the own `pctr`."""
    network_price: np.ndarray | None
    """The payment network's price before rounding, currency per click; None unless it charges."""
    probe_ctr: np.ndarray | None
    """[K', draws] click probability at bids drawn below its own; None unless prices are implicit."""
    log_chance: float
    """log z of the whole page in the search."""
    price_mode: str


class PageEngine:
    """One immutable EGA (V2) ready to answer."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.model = cast(EgaV2Model, bundle.network)
        self.slots, self.organic_items = self.model.config.slots, self.model.config.ega_v2.organic_items

    def prepare_city(self, ad_ids: np.ndarray, ads: Places, creatives: Creatives) -> CityPages:
        """Codes and tries of a city's active ads. Recompute when ads or creatives come or go; bids do not matter. New ads get their codes
        from the frozen codebooks. Raises UnknownCreatives where an ad has none, ValueError for embeddings of another width."""
        if len(ad_ids) == 0:
            raise ValueError("a city needs at least one ad")
        width = self.model.config.ega_v2.creative_width
        if creatives.embedding.shape[1] != width:
            raise ValueError(f"creatives have embeddings of {creatives.embedding.shape[1]} numbers, model {self.bundle.version} reads {width}")
        order = np.argsort(ad_ids)
        at = inputs.rows_of(ad_ids[order], creatives.ad_id)
        owner = np.where(at >= 0, order[at], -1)
        mine = np.flatnonzero(owner >= 0)
        mine = mine[np.lexsort((creatives.creative_id[mine], creatives.ad_id[mine]))]
        if len(without := np.setdiff1d(np.arange(len(ad_ids)), owner)):
            raise UnknownCreatives(f"{len(without)} of {len(ad_ids)} ads have no creative, first ad {ad_ids[without[0]]}; add them to the table creatives and build the features again")
        codes = torch.from_numpy(self.model.creative_tokens(creatives.embedding))
        catalogue = Catalogue(
            self._codes(ads).numpy(), self.model.tokens.poi_codes, owner[mine], codes[torch.from_numpy(mine)].numpy(), self.model.tokens.creative_codes,
            ranks(tie_keys(np.asarray(ad_ids, np.int64))),
        )  # fmt: skip
        return CityPages(np.asarray(ad_ids), ads, catalogue, creatives, codes, mine)

    def _codes(self, places: Places) -> torch.Tensor:
        return torch.from_numpy(self.model.poi_tokens(places.index, places.category_id, places.position))

    @torch.inference_mode()
    def rank(
        self,
        request_id: int,
        city: CityPages,
        user_fields: np.ndarray,
        context_fields: np.ndarray,
        behaviours: np.ndarray,
        visits: Visits,
        here: np.ndarray,
        organic: Places,
        impressions: np.ndarray,
        clicks: np.ndarray,
        bids: np.ndarray,
        reserves: np.ndarray,
        eligible: np.ndarray,
        slots: int,
        price_mode: Rule,
        bid_unit: float,
        currency_step: float = 0.0,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> GeneratedPage:
        """The page for one request: at most `slots` ads and all organic items, which keep their order. Implicit prices draw their bids by `request_id`.

        user_fields [F_user], context_fields [F_context], behaviours [L, F_behaviour] as `features.encoding` gives them, of the same
        `visits`; here [2] in degrees; impressions, clicks [N] up to today; bids, reserves [N] currency per click; eligible [N];
        `bid_unit` is the city's median bid. alpha, beta: weight of money in the search, by default the model's. Charges are rounded down to `currency_step`.
        """
        if not 1 <= slots <= self.slots or len(organic.poi_id) > self.organic_items:
            raise ValueError(f"this model makes pages of 1 to {self.slots} ads and at most {self.organic_items} organic items, got {slots} and {len(organic.poi_id)}")
        if not (np.isfinite(bid_unit) and bid_unit > 0):
            raise ValueError(f"bid_unit must be finite and above 0, got {bid_unit}")
        model, network = self.model, self.model.core
        changed = {name: value for name, value in (("alpha", alpha), ("beta", beta)) if value is not None}
        config = replace(model.config.ega_v2.search, **changed)
        odds = inputs.log_odds(np.asarray(impressions, np.float64), np.asarray(clicks, np.float64))
        offers = self._offers(city, organic, odds, np.asarray(bids, np.float64) / bid_unit, np.asarray(reserves, np.float64) / bid_unit, eligible, slots)
        features = self._features(city, visits, behaviours, here, organic, odds, np.asarray(impressions, np.float64))
        reserve = torch.from_numpy(np.asarray(reserves, np.float64) / bid_unit)
        memory = network.encode(self._history(city, visits, behaviours, user_fields, context_fields))
        shown, page, _ = shown_pages(network, memory, city.catalogue, offers, features, reserve, config)
        ad = page.ad[0, 0].numpy()
        at = np.flatnonzero(ad >= 0)
        rows, above = ad[at], at - np.arange(len(at))
        pctr, next_score = (values[0].double().numpy()[at] for values in (shown.ctr, shown.rival))
        learned = prices(network, shown, "learned")[0].double().numpy()[at] * bid_unit if price_mode == "learned" else None
        bid, floor = np.asarray(bids, np.float64)[rows], np.asarray(reserves, np.float64)[rows]
        network_price = None if learned is None else np.clip(learned, floor, bid)
        probe_ctr = None
        if price_mode == "implicit" and len(rows):
            ids = city.ad_id[rows]
            drawn = np.array([draws(request_id, int(one), model.config.ega_v2.probes) for one in ids])
            less = torch.from_numpy(probe_bids(bid, floor, drawn) / bid_unit)
            probe_ctr = probed(network, memory, city.catalogue, offers, features, reserve, config, page.ad[0, 0][at], less).numpy()
        # Charged by the very function that replays receipts, from the numbers that the receipt will hold.
        price = [
            charge(price_mode, k + 1, bid[k], floor[k], None, None, pctr[k], next_score[k] * bid_unit, None if network_price is None else float(network_price[k]), currency_step,
                   probe_ctr=None if probe_ctr is None else probe_ctr[k].tolist()).price
            for k in range(len(rows))
        ]
        creative = city.creatives.creative_id[city.mine[page.creative[0, 0].numpy()[at]]]
        return GeneratedPage(rows, creative, above, pctr, np.array(price, np.float64), next_score * bid_unit, network_price, probe_ctr, float(page.score[0, 0]), price_mode)

    def _history(self, city: CityPages, visits: Visits, behaviours: np.ndarray, user_fields: np.ndarray, context_fields: np.ndarray) -> History:
        """As `PageData.history`: newest last."""
        seen = _seen(city, visits)
        creative = torch.where(torch.from_numpy(seen >= 0).unsqueeze(-1), city.creative_codes[torch.from_numpy(np.maximum(seen, 0))], NONE)
        user = np.concatenate([user_fields, context_fields])
        return History(
            torch.where(torch.from_numpy(visits.real).unsqueeze(-1), self._codes(visits.places).unsqueeze(0), NONE).flip(1), creative.flip(1),
            torch.from_numpy(np.array(behaviours)).long().unsqueeze(0).flip(1)[..., BEHAVIOUR_COLUMNS], torch.from_numpy(user).long().unsqueeze(0),
        )  # fmt: skip

    def _offers(self, city: CityPages, organic: Places, odds: np.ndarray, bid: np.ndarray, reserve: np.ndarray, eligible: np.ndarray, slots: int) -> Offers:
        """As `PageData.offers`."""
        none = torch.full((1, len(organic.poi_id), self.model.tokens.creative_layers), NONE)
        return Offers(
            torch.from_numpy(bid).unsqueeze(0), torch.from_numpy(np.asarray(eligible, bool) & (bid >= reserve)).unsqueeze(0), torch.from_numpy(bid * inputs.click_prior(odds)).unsqueeze(0),
            self._codes(organic).unsqueeze(0), none, slots,
        )  # fmt: skip

    def _features(self, city: CityPages, visits: Visits, behaviours: np.ndarray, here: np.ndarray, organic: Places, odds: np.ndarray, impressions: np.ndarray) -> ItemFeatures:
        """As `PageData.item_features` and `creative_features`."""
        visited, categories = np.where(visits.real, visits.places.poi_id[None], -1), visits.places.category_id[None]
        apart = np.asarray(behaviours, np.int64)[None, :, HOUR_COLUMN] - schema.FIRST_CODE

        def items(places: Places, odds: np.ndarray, impressions: np.ndarray, is_ad: bool) -> torch.Tensor:
            flags = np.full((1, len(places.poi_id)), is_ad)
            return torch.from_numpy(inputs.item_features(
                np.asarray(here, np.float64)[None], places.poi_id[None], places.category_id[None], places.position[None], visited, categories, apart, odds[None], impressions[None], flags,
            ))  # fmt: skip

        nothing = np.zeros(len(organic.poi_id))
        seen = _seen(city, visits)
        taste = inputs.liked(city.creatives.embedding[np.maximum(seen, 0)], seen >= 0)
        width = city.creatives.embedding.shape[1]
        return ItemFeatures(
            items(city.ads, odds, impressions, True), torch.from_numpy(inputs.creative_features(city.creatives.embedding[city.mine][None], taste)),
            items(organic, nothing, nothing, False), torch.from_numpy(inputs.creative_features(np.zeros((1, len(organic.poi_id), width), np.float32), taste)),
        )  # fmt: skip


def _seen(city: CityPages, visits: Visits) -> np.ndarray:
    """[1, L] rows of the creatives that led to the user's behaviours; -1 for none."""
    return inputs.rows_of(city.creatives.creative_id, np.where(visits.real & (visits.creative_id > 0)[None], visits.creative_id[None], -1))
