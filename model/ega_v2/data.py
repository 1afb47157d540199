"""Request samples as EGA (V2) reads them: histories in codes, logged pages with labels, and what a request may show.

Shape letters: B requests, L behaviours, P places of a page (ads and organic items in reading order), K ads of a page, O organic items,
N ads of a city, M their creatives, C codes of a POI, E codes of a creative, X items asked about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from auction.ties import tie_keys
from marketplace import schema
from model.ega_v2 import inputs
from model.ega_v2.allocation import ItemFeatures
from model.ega_v2.beam import Catalogue, Offers
from model.ega_v2.model import BEHAVIOUR_FIELDS, EgaV2Model
from model.ega_v2.network import NONE, History, PageItems
from model.ega_v2.stages import Sequences
from model.training.data import City, Samples

BEHAVIOUR_COLUMNS = [index for name in BEHAVIOUR_FIELDS for index, field in enumerate(schema.BEHAVIOUR_FIELDS) if field.name == name]
HOUR_COLUMN = next(index for index, field in enumerate(schema.BEHAVIOUR_FIELDS) if field.name == "hour_distance")


@dataclass(frozen=True)
class LoggedPages:
    """Pages as they were shown, in reading order, with what users did; labels of places that hold nothing are 0."""

    items: PageItems
    mask: Tensor
    """[B, P] places that hold an ad or an organic item."""
    click: Tensor
    creative_click: Tensor
    purchase: Tensor
    ad_row: np.ndarray
    """[B, P] row of the ad table, -1: organic or empty."""


@dataclass(frozen=True)
class CityOffers:
    """The active ads of a city and day, and their creatives, as the search wants them."""

    city: City
    catalogue: Catalogue
    creative_rows: np.ndarray
    """[M] rows of the table of creatives."""
    creative_owner: np.ndarray
    """[M] place of the owner among the city's ads."""


class PageData:
    """One sample folder in the codes of one model."""

    def __init__(self, samples: Samples, model: EgaV2Model) -> None:
        require_pages(samples, model)
        self.samples, self.model = samples, model
        self.place_codes = torch.from_numpy(model.poi_tokens(place_index(samples), samples.place_category, samples.place_position))
        self.creative_codes = torch.from_numpy(model.creative_tokens(samples.creative_embedding))
        self.embedding = np.array(samples.creative_embedding, np.float32)
        self._offers: dict[tuple[int, int], CityOffers] = {}

    @cached_property
    def log_odds(self) -> np.ndarray:
        """[T, A] of each day's active ads: log odds of the smoothed click rate over those of all active ads of the city; 0 for ads that are not active."""
        samples = self.samples
        shown, clicks, city = np.asarray(samples.ad_impressions), np.asarray(samples.ad_clicks), np.asarray(samples.ad_city)
        result = np.zeros(shown.shape)
        active = np.isfinite(np.asarray(samples.bid))
        for day, ads in enumerate(active):
            for one in np.unique(city):
                mine = ads & (city == one)
                result[day, mine] = inputs.log_odds(shown[day, mine], clicks[day, mine])
        return result

    def history(self, rows: np.ndarray) -> History:
        """Histories of requests, newest last."""
        samples = self.samples
        place, creative = (torch.from_numpy(np.array(values[rows][:, ::-1])).long() for values in (samples.behaviour_place, samples.behaviour_creative))
        fields = samples.behaviour_inputs(rows)[:, : place.shape[1]].flip(1)[..., BEHAVIOUR_COLUMNS]
        return History(
            torch.where(place.unsqueeze(-1) >= 0, self.place_codes[place.clamp(min=0)], NONE),
            torch.where(creative.unsqueeze(-1) >= 0, self.creative_codes[creative.clamp(min=0)], NONE),
            fields, samples.user_inputs(rows),
        )  # fmt: skip

    def sequences(self, rows: np.ndarray, slots: int) -> Sequences:
        """What the generator shall learn to write: what users chose, first what they clicked on the page, then where they went in that session.

        Requests after which nothing was chosen teach nothing and are left out. The creative is that of a clicked ad; elsewhere there is none.
        """
        samples = self.samples
        ad = np.asarray(samples.candidate[rows, : samples.slots])
        clicked = (np.asarray(samples.click[rows, : samples.slots]) > 0) & (ad >= 0)
        organic = np.asarray(samples.organic_place[rows])
        place = np.concatenate(
            [
                np.where(clicked, np.asarray(samples.ad_place_row)[np.maximum(ad, 0)], -1),
                np.where(np.asarray(samples.organic_click[rows]) > 0, organic, -1),
                np.asarray(samples.next_place[rows]),
            ],
            axis=1,
        )
        creative = np.full(place.shape, -1)
        creative[:, : samples.slots] = np.where(clicked, np.asarray(samples.exposed_creative[rows]), -1)
        place, creative = _distinct_first(place, creative, slots)
        some = place[:, 0] >= 0
        place_, creative_ = (torch.from_numpy(values[some]) for values in (place, creative))
        return Sequences(
            self.history(rows[some]),
            torch.where(place_.unsqueeze(-1) >= 0, self.place_codes[place_.clamp(min=0)], NONE),
            torch.where(creative_.unsqueeze(-1) >= 0, self.creative_codes[creative_.clamp(min=0)], NONE),
        )

    def logged_pages(self, rows: np.ndarray) -> LoggedPages:
        """The pages of requests as they were shown."""
        samples = self.samples
        ad, organic = np.asarray(samples.candidate[rows, : samples.slots]), np.asarray(samples.organic_place[rows])
        creative, above = np.asarray(samples.exposed_creative[rows]), np.asarray(samples.above[rows], np.int64)
        items, at_ad = self.pages_of(rows, ad, creative, above)
        _, at_item = places_of_page(ad >= 0, above, organic.shape[1])
        real = ad >= 0
        click = _page(at_ad, at_item, np.asarray(samples.click[rows, : samples.slots]) * real, np.asarray(samples.organic_click[rows]), 0)
        purchase, opened = (_page(at_ad, at_item, np.asarray(values) * real, np.zeros(organic.shape), 0) for values in (samples.purchase[rows, : samples.slots], samples.creative_click[rows]))
        ad_row = _page(at_ad, at_item, ad, np.full(organic.shape, -1), -1)
        mask = (items.poi >= 0).all(-1)
        return LoggedPages(items, mask, *(torch.from_numpy(np.asarray(x, np.float32)) for x in (click, opened, purchase)), ad_row)

    def pages_of(self, rows: np.ndarray, ad: np.ndarray, creative: np.ndarray, above: np.ndarray) -> tuple[PageItems, np.ndarray]:
        """Pages of ads [B, K] and their creatives (rows of their tables, -1 none) with `above` [B, K] organic items before each, among the organic items of requests
        `rows`; and the places [B, K] of the ads on them."""
        samples, organic = self.samples, np.asarray(self.samples.organic_place[rows])
        at_ad, at_item = places_of_page(ad >= 0, above, organic.shape[1])
        none = np.full(organic.shape, -1)
        place = _page(at_ad, at_item, np.where(ad >= 0, np.asarray(samples.ad_place_row)[np.maximum(ad, 0)], -1), organic, -1)
        return self.page_items(rows, place, _page(at_ad, at_item, creative, none, -1), _page(at_ad, at_item, ad, none, -1)), at_ad

    def page_items(self, rows: np.ndarray, place: np.ndarray, creative: np.ndarray, ad_row: np.ndarray) -> PageItems:
        """Pages [B, P] by rows of places, creatives and ads (-1: none) as the reward model reads them."""
        place_, creative_ = torch.from_numpy(place.astype(np.int64)), torch.from_numpy(creative.astype(np.int64))
        return PageItems(
            poi=torch.where(place_.unsqueeze(-1) >= 0, self.place_codes[place_.clamp(min=0)], NONE),
            creative=torch.where(creative_.unsqueeze(-1) >= 0, self.creative_codes[creative_.clamp(min=0)], NONE),
            organic=torch.from_numpy((place >= 0) & (ad_row < 0)),
            poi_features=self.item_features(rows, place, ad_row), creative_features=self.creative_features(rows, creative),
        )  # fmt: skip

    def item_features(self, rows: np.ndarray, place: np.ndarray, ad_row: np.ndarray) -> Tensor:
        """`inputs.item_features` [B, X, F] of items [B, X] by rows of places and ads (-1: organic)."""
        samples, at, ad = self.samples, np.maximum(place, 0), np.maximum(ad_row, 0)
        behaviour, category, day = np.asarray(samples.behaviour_place[rows]), np.asarray(samples.place_category), np.asarray(samples.day[rows])[:, None]
        return torch.from_numpy(inputs.item_features(
            np.asarray(samples.request_place[rows], np.float64), place, category[at], np.asarray(samples.place_position)[at], behaviour, category[np.maximum(behaviour, 0)],
            np.asarray(samples.behaviours[rows][:, :, HOUR_COLUMN]) - schema.FIRST_CODE, self.log_odds[day, ad], np.asarray(samples.ad_impressions)[day, ad], ad_row >= 0,
        ))  # fmt: skip

    def creative_features(self, rows: np.ndarray, creative: np.ndarray) -> Tensor:
        """`inputs.creative_features` [B, X, width + 1] of creatives [B, X] by row (-1: none)."""
        shown = np.where((creative >= 0)[..., None], self.embedding[np.maximum(creative, 0)], np.float32(0))
        seen = np.asarray(self.samples.behaviour_creative[rows])
        return torch.from_numpy(inputs.creative_features(shown, inputs.liked(self.embedding[np.maximum(seen, 0)], seen >= 0)))

    def city_offers(self, day: int, city: int) -> CityOffers:
        """The active ads of a city on a day as tries."""
        key = (int(day), int(city))
        if key not in self._offers:
            samples, found = self.samples, self.samples.city(day, city)
            position = np.full(len(samples.ad_id), -1)
            position[found.rows] = np.arange(len(found.rows))
            owner = position[np.asarray(samples.creative_ad)]
            mine = np.flatnonzero(owner >= 0)
            catalogue = Catalogue(
                self.place_codes[torch.from_numpy(np.asarray(samples.ad_place_row)[found.rows]).long()].numpy(), self.model.tokens.poi_codes, owner[mine],
                self.creative_codes[torch.from_numpy(mine)].numpy(), self.model.tokens.creative_codes, ranks(tie_keys(np.asarray(samples.ad_id)[found.rows])),
            )  # fmt: skip
            self._offers[key] = CityOffers(found, catalogue, mine, owner[mine])
        return self._offers[key]

    def offers(self, rows: np.ndarray, found: CityOffers, most_ads: int) -> tuple[Offers, ItemFeatures]:
        """What requests of one city and day may show, and what the reward model reads of it. Bids are over the city's median."""
        samples, ads = self.samples, found.city.rows
        batch = len(rows)
        bid = np.broadcast_to(found.city.bid, (batch, len(ads)))
        organic = np.asarray(samples.organic_place[rows])
        organic_ = torch.from_numpy(organic.astype(np.int64))
        codes = torch.where(organic_.unsqueeze(-1) >= 0, self.place_codes[organic_.clamp(min=0)], NONE)
        day = int(samples.day[rows[0]])
        prior = inputs.click_prior(self.log_odds[day, ads])
        offers = Offers(
            torch.from_numpy(bid.copy()), torch.from_numpy(bid >= found.city.reserve), torch.from_numpy(bid * prior), codes,
            torch.full((*organic.shape, self.model.tokens.creative_layers), NONE), most_ads,
        )  # fmt: skip
        place = np.broadcast_to(np.asarray(samples.ad_place_row)[ads], (batch, len(ads)))
        none = np.full(organic.shape, -1)
        features = ItemFeatures(
            self.item_features(rows, place, np.broadcast_to(ads, place.shape)),
            self.creative_features(rows, np.broadcast_to(found.creative_rows, (batch, len(found.creative_rows)))),
            self.item_features(rows, organic, none), self.creative_features(rows, none),
        )  # fmt: skip
        return offers, features

    def groups(self, rows: np.ndarray, most_ads: int) -> Iterator[tuple[np.ndarray, History, Catalogue, Offers, ItemFeatures]]:
        """Requests by city and day, with their histories and what they may show."""
        samples = self.samples
        key = np.stack([np.asarray(samples.day[rows]), np.asarray(samples.city_code[rows])], 1)
        for day, city in np.unique(key, axis=0):
            mine = rows[(key == (day, city)).all(1)]
            found = self.city_offers(int(day), int(city))
            offers, features = self.offers(mine, found, most_ads)
            yield mine, self.history(mine), found.catalogue, offers, features


def require_pages(samples: Samples, model: EgaV2Model) -> None:
    """ValueError unless the samples hold creatives, and pages and embeddings of the model's sizes."""
    if not hasattr(samples, "exposed_creative"):
        raise ValueError(f"{samples.folder} was sampled from logs without creatives; model.kind ega_v2 needs the table creatives (docs/data.md)")
    config, items, width = model.config, samples.organic_place.shape[1], samples.creative_embedding.shape[1]
    if samples.slots > config.slots or items > config.ega_v2.organic_items:
        raise ValueError(f"the logs have pages of {samples.slots} ads and {items} organic items, the model reads at most {config.slots} (model.slots) and {config.ega_v2.organic_items} (model.ega_v2.organic_items)")
    if width != config.ega_v2.creative_width:
        raise ValueError(f"creatives have embeddings of {width} numbers, the model reads {config.ega_v2.creative_width}; set model.ega_v2.creative_width: {width}")


def place_index(samples: Samples) -> np.ndarray:
    """Vocabulary index of every place, [Q]; UNKNOWN for those that no training day has seen."""
    at = inputs.rows_of(np.asarray(samples.vocabulary["poi"], np.int64), np.asarray(samples.place_id))
    return np.where(at >= 0, at + schema.FIRST_CODE, schema.UNKNOWN)


def places_of_page(ad: np.ndarray, above: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of a page's ads [B, K] and organic items [B, O] in reading order; `ad` says which ads there are, the others come last."""
    above = np.where(ad, above, items)
    at_ad = above + np.arange(above.shape[1])
    before = (above[:, None, :] <= np.arange(items)[None, :, None]).sum(-1)
    return at_ad, before + np.arange(items)


def _page(at_ad: np.ndarray, at_item: np.ndarray, of_ads: np.ndarray, of_items: np.ndarray, empty: float) -> np.ndarray:
    """Values of ads [B, K] and organic items [B, O] in the order of the page, [B, K + O]."""
    values = np.full((len(at_ad), at_ad.shape[1] + at_item.shape[1]), empty, of_ads.dtype)
    np.put_along_axis(values, at_ad, of_ads, axis=1)
    if at_item.shape[1]:
        np.put_along_axis(values, at_item, of_items.astype(values.dtype), axis=1)
    return values


def _distinct_first(place: np.ndarray, creative: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `width` different places of each row, in order, with their creatives; -1 behind."""
    again = np.triu(place[:, None, :] == place[:, :, None], 1).any(1)
    keep = (place >= 0) & ~again
    order = np.argsort(~keep, axis=1, kind="stable")[:, :width]
    kept = np.take_along_axis(keep, order, 1)
    return np.where(kept, np.take_along_axis(place, order, 1), -1), np.where(kept, np.take_along_axis(creative, order, 1), -1)


def ranks(keys: np.ndarray) -> np.ndarray:
    """Ranks of distinct keys: what a trie orders the items of one tuple by."""
    ranks = np.empty(len(keys), np.int64)
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return ranks
