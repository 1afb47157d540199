"""The page search of EGA (V2) on inputs that are wrong or at the edge, and what it does in cases small enough to say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from v2_reference import TableDecoder
from v2_tiny import market

from model.ega_v2.beam import Catalogue, Offers, Pages, SearchError, best_page, search
from model.ega_v2.config import SearchConfig
from model.ega_v2.trie import Trie, TrieError


class FlatDecoder(TableDecoder):
    """All codes equally likely: what is left are bids."""

    def _logits(self, codes: int) -> torch.Tensor:
        return torch.zeros(*self.state.shape, codes)


def two_ads(bids: list[float], organic: int = 0, config: SearchConfig | None = None, slots: int = 1) -> Pages:
    catalogue = Catalogue(np.array([[0], [1]]), 3, np.array([0, 1]), np.array([[0], [0]]), 1)
    bid = torch.tensor([bids])
    offers = Offers(bid, torch.ones(1, 2, dtype=torch.bool), bid, torch.full((1, organic, 1), 2), torch.zeros(1, organic, 1, dtype=torch.int64))
    config = config or SearchConfig(beams=8)
    return search(lambda part: FlatDecoder([1], config.beams, 3, 1), catalogue, offers, slots, config)


def test_weights_are_the_papers() -> None:
    """z of ads that bid 1 and 4 and of an organic item, logits equal: (1 + 2), (4^1.2 + 2) and 2 over their sum."""
    pages = two_ads([1.0, 4.0], organic=1)
    weight = [4**1.2 + 2, 3.0, 2.0]
    assert pages.ad[0, :3, 0].tolist() == [1, 0, -1] and pages.organic[0, 2, 0] == 0
    torch.testing.assert_close(pages.score[0, :3].exp(), torch.tensor(weight, dtype=torch.float64) / sum(weight))
    assert not bool(torch.isfinite(pages.score[0, 3:]).any())


def test_without_alpha_bids_do_not_count_and_ties_go_by_code() -> None:
    pages = two_ads([1.0, 4.0], config=SearchConfig(beams=2, alpha=0.0))
    assert pages.ad[0, :, 0].tolist() == [0, 1] and pages.score[0].exp().tolist() == pytest.approx([0.5, 0.5])


def test_a_page_ends_where_nothing_is_left() -> None:
    pages = two_ads([1.0, 4.0], organic=1, slots=5)
    assert int(torch.isfinite(pages.score).sum()) == 6  # every order of three items
    assert bool((pages.ad[:, :, 3:] == -1).all()) and bool((pages.organic[:, :, 3:] == -1).all()) and bool((pages.poi_log_z[:, :, 3:] == 0).all())


def test_requests_of_different_lengths_share_a_batch() -> None:
    catalogue, offers = market(2, 4, 0, seed=3)
    offers = replace(offers, active=torch.tensor([[True] * 4, [False, False, True, False]]))
    pages = search(lambda part: TableDecoder([5, 5][part], 30, 5, 4), catalogue, offers, 3, SearchConfig(beams=30), requests_at_once=2)
    assert bool((pages.ad[0, 0] >= 0).all()) and pages.ad[1, 0].tolist() == [2, -1, -1]
    assert sum(math.exp(score) for score in pages.score[1].tolist()) == pytest.approx(1.0)


def test_nothing_to_show_is_an_empty_page() -> None:
    catalogue, offers = market(1, 4, 0)
    pages = search(lambda part: TableDecoder([5], 4, 5, 4), catalogue, replace(offers, active=torch.zeros(1, 4, dtype=torch.bool)), 3, SearchConfig(beams=4))
    assert pages.score[0].tolist() == [0.0, -math.inf, -math.inf, -math.inf] and bool((pages.ad == -1).all())


def test_of_ads_with_one_tuple_the_most_valuable_is_shown_and_then_the_next() -> None:
    catalogue = Catalogue(np.zeros((3, 2), np.int64), 2, np.arange(3), np.zeros((3, 1), np.int64), 1, ad_keys_N=[2, 1, 0])
    offers = Offers(torch.tensor([[5.0, 1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.1, 0.5, 0.5]]), torch.zeros(1, 0, 2).long(), torch.zeros(1, 0, 1).long())
    pages = search(lambda part: TableDecoder([0], 2, 2, 1), catalogue, offers, 3, SearchConfig(beams=2))
    assert pages.ad[0, 0].tolist() == [2, 1, 0]  # equal values go by key


def test_an_organic_item_waits_behind_an_ad_of_its_tuple_that_is_worth_something() -> None:
    catalogue = Catalogue(np.zeros((1, 1), np.int64), 1, [0], np.zeros((1, 1), np.int64), 1)
    for value, first in ((0.5, "ad"), (0.0, "organic")):
        offers = Offers(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.tensor([[value]]), torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 1).long())
        pages = search(lambda part: TableDecoder([0], 2, 1, 1), catalogue, offers, 2, SearchConfig(beams=2))
        assert (int(pages.ad[0, 0, 0]) == 0) == (first == "ad") and (int(pages.organic[0, 0, 1]) == 0) == (first == "ad")


def test_the_best_page_is_the_most_valuable_that_exists() -> None:
    pages = two_ads([1.0, 4.0])
    assert best_page(pages, torch.tensor([[1.0, 2.0, 9, 9, 9, 9, 9, 9]])).tolist() == [1]
    assert best_page(pages, torch.zeros(1, 8)).tolist() == [0]


@pytest.mark.parametrize(("change", "message"), [
    (lambda offers: replace(offers, bid=torch.where(torch.arange(4) == 2, torch.nan, offers.bid)), "bid must be finite and >= 0, got nan for ad 2 of request 0"),
    (lambda offers: replace(offers, value=offers.value - 9), "value must be finite"),
    (lambda offers: replace(offers, active=offers.active[:, :3]), r"active must have shape \(1, 4\)"),
    (lambda offers: replace(offers, organic=offers.organic[..., :2]), "organic must have shape"),
    (lambda offers: replace(offers, organic_creative=offers.organic_creative[:, :1]), "organic_creative must have shape"),
    (lambda offers: replace(offers, organic=torch.tensor([[[-1, -1, -1], [0, 0, 0]]])), "whole tuples"),
    (lambda offers: replace(offers, organic=torch.tensor([[[0, -1, 0], [-1, -1, -1]]])), "whole tuples"),
    (lambda offers: replace(offers, organic=offers.organic + 5), "does not know"),
])  # fmt: skip
def test_offers_that_cannot_be_meant_are_refused(change, message) -> None:
    catalogue, offers = market(1, 4)
    offers = replace(offers, active=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(SearchError, match=message):
        search(lambda part: TableDecoder([0], 4, 5, 4), catalogue, change(offers), 2, SearchConfig(beams=4))


def test_a_broken_decoder_is_noticed() -> None:
    class Broken(TableDecoder):
        def _logits(self, codes: int) -> torch.Tensor:
            return torch.full((*self.state.shape, codes), torch.nan)

    catalogue, offers = market(1, 4)
    with pytest.raises(SearchError, match="not finite"):
        search(lambda part: Broken([0], 4, 5, 4), catalogue, offers, 2, SearchConfig(beams=4))


def test_catalogues_that_cannot_be_meant_are_refused() -> None:
    poi, creative = np.zeros((2, 1), np.int64), np.zeros((2, 1), np.int64)
    with pytest.raises(SearchError, match="first is ad 1"):
        Catalogue(poi, 2, [0, 0], creative, 2)
    with pytest.raises(SearchError, match="one owner each"):
        Catalogue(poi, 2, [0], creative, 2)
    with pytest.raises(TrieError, match="item 1 has"):
        Catalogue(np.array([[0], [2]]), 2, [0, 1], creative, 2)


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.zeros((2, 2)), [3, 3]), "integers"), ((np.zeros(3, int), [3]), "shape"), ((np.zeros((2, 1), int), [3], [0, 0]), "distinct"),
    ((np.zeros((1, 4), int), [2**16] * 4), "64-bit"), ((np.array([[-1]]), [3]), "item 0 has"),
])  # fmt: skip
def test_tries_that_cannot_be_built_say_why(arguments, message) -> None:
    with pytest.raises(TrieError, match=message):
        Trie(*arguments)
