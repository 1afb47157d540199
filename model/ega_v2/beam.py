"""Bid-weighted constrained beam search over whole pages of POIs and creatives.

A page is built slot by slot: the codes of a POI, which item of that tuple, the codes of its creative. Every step asks a decoder for the
logits of the next code, allows only codes below which something legal lies, and weights them by the bids that they lead to:
z = softmax(logit + log w), w = (greatest normalised bid among the legal items below the prefix)^alpha + beta. Legal are active ads not yet on
the page, and of the organic items only the next one in their order, which bids 0. All creatives of an ad share its bid, so among them
w would cancel and is left out.

Same inputs, same bytes: scores are float64, quantised where they are compared, and ties go by the better parent beam, then by code.
Shape letters: B requests, R beams, K slots, N ads, O organic items, C codes of a POI, E codes of a creative, W codes a layer, M children of a node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor

from model.ega_v2.trie import Trie, gather_nodes, override

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class SearchError(ValueError):
    """Inputs from which no page can be built; the message says which."""


@config_dataclass(frozen=True, config=_STRICT)
class SearchConfig:
    """Width of the search and weight of money."""

    beams: int = Field(64, ge=1, le=4096)
    """R, pages that are kept while they are built (paper: 64)."""
    alpha: float = Field(1.2, ge=0, le=10)
    """Exponent of the normalised bid in a code's weight (paper: 1.2); 0: bids do not count."""
    beta: float = Field(2.0, gt=0, le=1e6)
    """Weight of a code without bid, as of organic items (paper: 2)."""
    bid_of_prefix: Literal["max", "mean"] = "max"
    """What stands for the bids of a prefix's items: the greatest (paper), or their mean (its ablation)."""


class Decoder(Protocol):
    """What the search asks of a model. It keeps the state of every beam; rows are [B, R]."""

    def poi_logits(self, previous_BR: Tensor | None) -> Tensor:
        """Append each beam's last POI code (None: the page is empty) and return the logits of its next POI code, [B, R, W]."""
        ...

    def creative_logits(self, poi_BRC: Tensor, previous_BR: Tensor | None) -> Tensor:
        """Logits of the next creative code of the POI just completed, [B, R, W]; `previous_BR` is the last creative code, None before the first."""
        ...

    def keep(self, parent_BR: Tensor) -> None:
        """Beam r goes on from what was beam parent[r]."""
        ...


class Catalogue:
    """A city's active ads and their creatives as two tries. The second has one subtree an ad: its first layer is the ad itself."""

    def __init__(
        self,
        poi_codes_NC: npt.ArrayLike,
        poi_codes: int,
        creative_ad_M: npt.ArrayLike,
        creative_codes_ME: npt.ArrayLike,
        creative_codes: int,
        ad_keys_N: npt.ArrayLike | None = None,
        creative_keys_M: npt.ArrayLike | None = None,
    ) -> None:
        """POI codes of N ads; owner and codes of M creatives; keys break ties within a tuple (e.g. `auction.tie_keys`), default: the index.

        Raises SearchError unless every ad has a creative; TrieError for codes out of range.
        """
        poi, owner, creative = np.asarray(poi_codes_NC), np.asarray(creative_ad_M), np.asarray(creative_codes_ME)
        if owner.ndim != 1 or len(owner) != len(creative):
            raise SearchError(f"creatives need one owner each: {creative.shape[0]} tuples, owners of shape {owner.shape}")
        if without := sorted(set(range(len(poi))) - set(owner.tolist())):
            raise SearchError(f"every ad needs a creative; {len(without)} have none, the first is ad {without[0]}")
        if len(poi) == 0 and len(owner):
            raise SearchError("creatives without ads")
        self.poi = Trie(poi, [poi_codes] * poi.shape[1], ad_keys_N)
        self.creative = Trie(np.concatenate([owner[:, None], creative], 1), [max(1, len(poi)), *[creative_codes] * creative.shape[1]], creative_keys_M)


@dataclass(frozen=True)
class Offers:
    """What B requests may show. `bid` alone carries money; nothing here depends on a page."""

    bid: Tensor
    """[B, N] per click, over the city's median bid; finite, >= 0."""
    active: Tensor
    """[B, N] bool: may be shown to this request."""
    value: Tensor
    """[B, N] bid * pCTR: which of several ads with one tuple is shown."""
    organic: Tensor
    """[B, O, C] POI codes of the organic items in their order; -1 behind the last."""
    organic_creative: Tensor
    """[B, O, E] codes of their creatives; -1: it has none."""

    def rows(self, part: slice) -> Offers:
        """Some of the requests."""
        return Offers(self.bid[part], self.active[part], self.value[part], self.organic[part], self.organic_creative[part])


@dataclass(frozen=True)
class Pages:
    """R pages of each request, best first; a page that does not exist has score -inf and only empty slots."""

    score: Tensor
    """[B, R] log chance of the page: the sum of all log z."""
    ad: Tensor
    """[B, R, K] ad in the slot, -1 none."""
    creative: Tensor
    """[B, R, K] its creative, -1 none."""
    organic: Tensor
    """[B, R, K] place of the organic item in its order, -1 none."""
    poi_codes: Tensor
    """[B, R, K, C], -1 in empty slots."""
    creative_codes: Tensor
    """[B, R, K, E], -1 in empty slots and where an organic item has no creative."""
    poi_log_z: Tensor
    """[B, R, K] log z of the POI's codes in its slot."""
    creative_log_z: Tensor
    """[B, R, K] log z of the creative's codes."""


def search(decoder_of: Callable[[slice], Decoder], catalogue: Catalogue, offers: Offers, slots: int, config: SearchConfig, requests_at_once: int = 1) -> Pages:
    """Pages of B requests. `decoder_of` makes a decoder for some of the requests.

    One request at a time every operation has the same shape whatever the company, so the result is the same to the bit in any batch; 64 beams fill a
    CPU as it is. More at once save launches on a GPU and are equal up to the rounding of the network's matrix products.
    """
    _check(catalogue, offers, slots)
    parts = [slice(start, min(start + requests_at_once, len(offers.bid))) for start in range(0, len(offers.bid), requests_at_once)]
    found = [_Search(decoder_of(part), catalogue, offers.rows(part), slots, config).run() for part in parts]
    return Pages(*(torch.cat(column) for column in zip(*(vars(pages).values() for pages in found), strict=True)))


def _check(catalogue: Catalogue, offers: Offers, slots: int) -> None:
    """SearchError where shapes or numbers cannot be meant."""
    batch, ads = len(offers.bid), catalogue.poi.items
    if slots < 1 or batch < 1:
        raise SearchError(f"a search needs requests and slots, got {batch} and {slots}")
    for name in ("bid", "active", "value"):
        if (shape := tuple(getattr(offers, name).shape)) != (batch, ads):
            raise SearchError(f"{name} must have shape {(batch, ads)} [requests, ads], got {shape}")
    organic = offers.organic.shape[1]
    for name, width in (("organic", catalogue.poi.depth), ("organic_creative", catalogue.creative.depth - 1)):
        if (shape := tuple(getattr(offers, name).shape)) != (batch, organic, width):
            raise SearchError(f"{name} must have shape {(batch, organic, width)} [requests, organic items, codes], got {shape}")
    for name in ("bid", "value"):
        wrong = ~(torch.isfinite(getattr(offers, name)) & (getattr(offers, name) >= 0)) & offers.active
        if bool(wrong.any()):
            request, ad = wrong.nonzero()[0].tolist()
            raise SearchError(f"{name} must be finite and >= 0, got {float(getattr(offers, name)[request, ad])} for ad {ad} of request {request}")
    real = (offers.organic >= 0).all(-1)
    if bool((real[:, 1:] & ~real[:, :-1]).any()) or bool((real != (offers.organic >= 0).any(-1)).any()):
        raise SearchError("organic codes must be whole tuples, followed by -1 only")
    if bool((offers.organic >= torch.tensor(catalogue.poi.sizes)).any()) or bool((offers.organic_creative >= torch.tensor(catalogue.creative.sizes[1:])).any()):
        raise SearchError("organic items have codes that the decoder does not know")


def quantise(scores: Tensor) -> Tensor:
    """float64 scores rounded to 30 mantissa bits, as `auction.ties.quantise`: what differs by float noise alone becomes equal."""
    bits = (scores + 0.0).view(torch.int64)
    return ((bits + (1 << 21)) & ~((1 << 22) - 1)).view(torch.float64)


def top(scores_BX: Tensor, count: int) -> Tensor:
    """Positions [B, count] of the greatest scores, greatest first; of equal ones the lower position. X >= count.

    `torch.topk` leaves open which of equal values it takes, so it only finds the threshold.
    """
    rounded = quantise(scores_BX)
    least = rounded.topk(count, -1).values[:, -1:]
    above, level = rounded > least, rounded == least
    chosen = above | (level & (torch.cumsum(level, -1) <= count - above.sum(-1, keepdim=True)))
    index = chosen.nonzero()[:, 1].view(len(scores_BX), count)
    order = torch.gather(rounded, 1, index).sort(dim=-1, descending=True, stable=True).indices
    return torch.gather(index, 1, order)


def log_z(logit: Tensor, weight: Tensor, legal: Tensor) -> Tensor:
    """log softmax(logit + log w) over the legal choices of the last dimension, float64; -inf elsewhere."""
    shifted = torch.where(legal, logit.double() + torch.log(weight), -torch.inf)
    return torch.where(legal, shifted - torch.logsumexp(shifted, -1, keepdim=True), -torch.inf)


@dataclass
class _Choices:
    """Codes that may come next, for every beam; the last column is the organic item's where no ad shares its code."""

    code: Tensor
    """[B, R, M + 1]"""
    node: Tensor
    """[B, R, M + 1] where each leads to in the trie; null off it."""
    legal: Tensor
    """[B, R, M + 1]"""
    bid: Tensor
    """[B, R, M + 1] greatest or mean bid behind the code; 0 where nothing lies there but an organic item."""


class _Search:
    """State of all beams of some requests. Every tensor in `state` is [B, R, ...] and follows its beam."""

    def __init__(self, decoder: Decoder, catalogue: Catalogue, offers: Offers, slots: int, config: SearchConfig) -> None:
        self.decoder, self.offers, self.config = decoder, offers, config
        self.poi, self.creative = catalogue.poi, catalogue.creative
        self.batch, self.slots = len(offers.bid), slots
        self.request = torch.arange(self.batch).unsqueeze(1)
        self.bid = torch.where(self.poi.sort(offers.active), self.poi.sort(offers.bid).double(), -torch.inf)
        self.value = quantise(self.poi.sort(offers.value).double())
        self.maxima = self.poi.maxima(self.bid)
        if config.bid_of_prefix == "mean":
            self.sums = self.poi.sums(torch.where(torch.isfinite(self.bid), self.bid, 0.0))
            self.counts = self.poi.sums(torch.isfinite(self.bid).double())
        self.organics = (offers.organic >= 0).all(-1).sum(1)
        self.length = torch.clamp(torch.isfinite(self.bid).sum(1) + self.organics, max=slots)
        """[B] slots that can be filled: every page fills as many, as nothing else limits it."""
        codes, parts = self.poi.depth, self.creative.depth - 1

        def filled(*shape: int) -> Tensor:
            return torch.full((self.batch, config.beams, *shape), -1, dtype=torch.int64)

        self.state: dict[str, Tensor] = {
            "position": filled(slots), "organic": filled(slots), "creative": filled(slots), "poi_codes": filled(slots, codes),
            "creative_codes": filled(slots, parts), "poi_log_z": torch.zeros(self.batch, config.beams, slots, dtype=torch.float64),
            "creative_log_z": torch.zeros(self.batch, config.beams, slots, dtype=torch.float64), "shown": filled() + 1,
        }  # fmt: skip
        self.score = torch.full((self.batch, config.beams), -torch.inf, dtype=torch.float64)
        self.score[:, 0] = 0.0

    def run(self) -> Pages:
        previous = None
        for slot in range(int(self.length.max())):
            open_ = slot < self.length
            self._poi(slot, open_, previous)
            self._item(slot, open_)
            self._creative(slot, open_)
            previous = self.state["poi_codes"][:, :, slot, -1].clamp(min=0)
        state = self.state
        real = torch.isfinite(self.score).unsqueeze(-1)
        position, creative = state["position"], state["creative"]
        ad = torch.where(position >= 0, self.poi.order[position.clamp(min=0)], -1) if self.poi.items else position
        creative = torch.where(creative >= 0, self.creative.order[creative.clamp(min=0)], -1) if self.creative.items else creative
        return Pages(
            score=self.score, ad=torch.where(real, ad, -1), creative=torch.where(real, creative, -1), organic=torch.where(real, state["organic"], -1),
            poi_codes=torch.where(real.unsqueeze(-1), state["poi_codes"], -1), creative_codes=torch.where(real.unsqueeze(-1), state["creative_codes"], -1),
            poi_log_z=torch.where(real, state["poi_log_z"], 0.0), creative_log_z=torch.where(real, state["creative_log_z"], 0.0),
        )  # fmt: skip

    def _poi(self, slot: int, open_: Tensor, previous: Tensor | None) -> None:
        """The codes of the slot's POI."""
        state, shown = self.state, self.state["shown"]
        state["node"] = torch.zeros_like(shown)
        state["on_organic"] = shown < self.organics.unsqueeze(1)
        used = state["position"][:, :, :slot]
        if slot and self.poi.items:
            state["above_used"] = torch.where((used >= 0).unsqueeze(-1), self.poi.ancestor[used.clamp(min=0)], self.poi.null)
            state["without_used"] = self.poi.maxima_without(self.maxima, self.bid, used)
        for layer in range(self.poi.depth):
            logits = self.decoder.poi_logits(previous)
            choices = self._poi_choices(layer)
            weight = choices.bid**self.config.alpha + self.config.beta
            previous = self._advance(logits, choices, weight, open_, "poi_log_z", slot)
            state = self.state
            state["poi_codes"][:, :, slot, layer] = torch.where(open_.unsqueeze(1), previous, -1)
            state["on_organic"] = state["on_organic"] & (previous == self._next_organic()[..., layer])

    def _poi_choices(self, layer: int) -> _Choices:
        """Children of each beam's prefix below which an ad is left, and the next organic item's code."""
        state, trie = self.state, self.poi
        found = trie.children(state["node"], layer)
        best = gather_nodes(self.maxima, found.node)
        count = total = None
        if self.config.bid_of_prefix == "mean":
            total, count = gather_nodes(self.sums, found.node), gather_nodes(self.counts, found.node)
        if "above_used" in state:
            above = state["above_used"]
            below = above[..., layer] == state["node"].unsqueeze(-1)
            column = above[..., layer + 1] - trie.first_child[state["node"]].unsqueeze(-1)
            best = override(best, column, below, state["without_used"][..., layer])
            if count is not None and total is not None:
                count, total = self._less_used(count, total, column, below)
        code = self._next_organic()[..., layer].unsqueeze(-1)
        organic = state["on_organic"].unsqueeze(-1)
        shared = found.real & (found.code == code) & organic
        alone = organic & ~shared.any(-1, keepdim=True)
        legal = torch.cat([torch.isfinite(best) | shared, alone], -1)
        if count is None or total is None:
            bid = best.clamp(min=0.0)
        else:
            bid = total.clamp(min=0.0) / (count + shared).clamp(min=1.0)
        return _Choices(
            code=torch.cat([found.code, code], -1), node=torch.cat([found.node, torch.full_like(code, trie.null)], -1), legal=legal,
            bid=torch.cat([bid, bid.new_zeros(code.shape)], -1),
        )  # fmt: skip

    def _less_used(self, count: Tensor, total: Tensor, column: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """Counts and sums of bids without the used ads; `column` is each used ad's child where `below`."""
        width = count.shape[-1]
        used = self.state["position"][:, :, : column.shape[-1]].clamp(min=0)
        index = torch.where(below, column, width)
        bids = gather_nodes(self.bid, used)
        count = torch.cat([count, count[..., :1]], -1).scatter_add(-1, index, -torch.ones_like(bids))
        total = torch.cat([total, total[..., :1]], -1).scatter_add(-1, index, -bids)
        return count[..., :width], total[..., :width]

    def _next_organic(self) -> Tensor:
        """POI codes of each beam's next organic item, [B, R, C]; of some other where none is left."""
        shown, codes = self.state["shown"], self.offers.organic
        if codes.shape[1] == 0:
            return torch.zeros(*shown.shape, codes.shape[-1], dtype=torch.int64)
        return codes[self.request, shown.clamp(max=codes.shape[1] - 1)].clamp(min=0)

    def _advance(self, logits_BRW: Tensor, choices: _Choices, weight: Tensor, open_: Tensor, log_name: str, slot: int) -> Tensor:
        """Keep the R best continuations of all beams; returns the code that each took, [B, R]. Requests whose pages are full stand still."""
        if not bool(torch.isfinite(logits_BRW).all()):
            raise SearchError("the decoder gave logits that are not finite; its weights or inputs are damaged")
        gained = log_z(torch.gather(logits_BRW, -1, choices.code), weight, choices.legal)
        total = self.score.unsqueeze(-1) + gained
        width = total.shape[-1]
        still = torch.where(torch.arange(width) == 0, self.score.unsqueeze(-1), -torch.inf)
        total = torch.where(open_[:, None, None], total, still).flatten(1)
        place = top(total, self.config.beams)
        parent = place // width
        self.score = torch.gather(total, 1, place)
        gained = torch.gather(gained.flatten(1), 1, place)
        code, node = (torch.gather(values.flatten(1), 1, place) for values in (choices.code, choices.node))
        self.state = {name: values[self.request, parent] for name, values in self.state.items()}
        self.state["node"] = node
        self.state[log_name][:, :, slot] += torch.where(open_.unsqueeze(1) & torch.isfinite(gained), gained, 0.0)
        self.decoder.keep(parent)
        return code

    def _item(self, slot: int, open_: Tensor) -> None:
        """Which item of the tuple: the ad of the greatest value, ties by key; the organic item where no ad is left or none is worth anything."""
        state, trie, node = self.state, self.poi, self.state["node"]
        position, worth = torch.full_like(node, -1), torch.full(node.shape, -torch.inf, dtype=torch.float64)
        if trie.items:
            below, real = trie.items_below(node)
            used = state["position"][:, :, :slot]
            real = real & torch.isfinite(gather_nodes(self.bid, below)) & (below.unsqueeze(-1) != used.unsqueeze(2)).all(-1)
            values = torch.where(real, gather_nodes(self.value, below), -torch.inf)
            at = values.argmax(-1, keepdim=True)  # the first of equal ones: the items of a leaf lie in the order of their keys
            worth = torch.gather(values, -1, at).squeeze(-1)
            position = torch.gather(below, -1, at).squeeze(-1)
        organic = state["on_organic"] & ~(worth > 0) & open_.unsqueeze(1)
        ad = torch.isfinite(worth) & ~organic & open_.unsqueeze(1)
        state["position"][:, :, slot] = torch.where(ad, position, -1)
        state["organic"][:, :, slot] = torch.where(organic, state["shown"], -1)
        state["shown"] = state["shown"] + organic

    def _creative(self, slot: int, open_: Tensor) -> None:
        """The codes of the creative and which creative it is; an organic item has one or none, so nothing is chosen there."""
        state, trie = self.state, self.creative
        position = state["position"][:, :, slot]
        # Every ad has creatives, so the nodes of level 1 are the ads in order.
        state["node"] = torch.where(position >= 0, trie.level_start[1] + self.poi.order[position.clamp(min=0)], trie.null) if trie.items else torch.full_like(position, trie.null)
        previous = None
        for layer in range(trie.depth - 1):
            logits = self.decoder.creative_logits(state["poi_codes"][:, :, slot], previous)
            found = trie.children(state["node"], layer + 1)
            own = self._shown_organic(slot)[..., layer].unsqueeze(-1)
            legal = torch.cat([found.real, (state["organic"][:, :, slot] >= 0).unsqueeze(-1)], -1)
            node = torch.cat([found.node, torch.full_like(own, trie.null)], -1)
            choices = _Choices(torch.cat([found.code, own.clamp(min=0)], -1), node, legal, torch.zeros_like(legal, dtype=torch.float64))
            code = self._advance(logits, choices, torch.ones_like(choices.bid), open_, "creative_log_z", slot)
            none = (state := self.state)["organic"][:, :, slot] >= 0
            none = none & (self._shown_organic(slot)[..., layer] < 0)
            state["creative_codes"][:, :, slot, layer] = torch.where(none | ~open_.unsqueeze(1), -1, code)
            previous = torch.where(none, trie.sizes[layer + 1], code)
        if trie.items:
            state["creative"][:, :, slot] = torch.where(state["node"] < trie.null, trie.first[state["node"]], -1)

    def _shown_organic(self, slot: int) -> Tensor:
        """Creative codes of the organic item in the slot, [B, R, E]; -1 where there is no item or it has no creative."""
        place, codes = self.state["organic"][:, :, slot], self.offers.organic_creative
        if codes.shape[1] == 0:
            return torch.full((*place.shape, codes.shape[-1]), -1)
        return torch.where((place >= 0).unsqueeze(-1), codes[self.request, place.clamp(min=0)], -1)


def best_page(pages: Pages, value_BR: Tensor) -> Tensor:
    """Index [B] of the page of greatest value among those that exist; of equal ones the better beam."""
    return top(torch.where(torch.isfinite(pages.score), value_BR.double(), -torch.inf), 1).squeeze(1)
