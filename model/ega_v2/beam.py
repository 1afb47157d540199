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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.ega_v2.config import SearchConfig
from model.ega_v2.trie import Children, Trie, gather_nodes, override


class SearchError(ValueError):
    """Inputs from which no page can be built; the message says which."""


class Decoder(Protocol):
    """What the search asks of a model. It keeps the state of every beam; rows are [B, R]."""

    def poi_logits(self, previous_BR: Tensor | None, creative_BR: Tensor | None) -> Tensor:
        """Append each beam's last POI code (None: the page is empty) and return the logits of its next POI code, [B, R, W].

        `creative_BR` is the last code of the creative before (-1: none) where a slot begins, else None.
        """
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
    most_ads: int | None = None
    """Most ads on a page; None: as many as it has slots."""

    def rows(self, part: slice) -> Offers:
        """Some of the requests."""
        return Offers(self.bid[part], self.active[part], self.value[part], self.organic[part], self.organic_creative[part], self.most_ads)


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
    if offers.most_ads is not None and offers.most_ads < 0:
        raise SearchError(f"most_ads must not be negative, got {offers.most_ads}")
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

    `torch.topk` leaves open which of equal values it takes, so it only finds the threshold. Raises SearchError where a score is no number.
    """
    rounded = quantise(scores_BX)
    most = rounded.topk(count, -1).values
    if bool(most.isnan().any()):
        raise SearchError("the decoder gave logits that are not finite; its weights or inputs are damaged")
    least = most[:, -1:]
    row, index = (rounded >= least).nonzero().unbind(1)  # a little more than `count` a row, by position
    score = rounded[row, index]
    order = score.sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]  # row by row, greatest first, of equal ones the lower position
    each = torch.bincount(row, minlength=len(rounded))
    start = each.cumsum(0) - each
    return index[order[start.unsqueeze(1) + torch.arange(count)]]


class _Search:
    """State of all beams of some requests. A row of `ints` and `logs` is a beam, B * R of them; `_column` names the parts of `ints`."""

    def __init__(self, decoder: Decoder, catalogue: Catalogue, offers: Offers, slots: int, config: SearchConfig) -> None:
        self.decoder, self.offers, self.config, self.slots = decoder, offers, config, slots
        self.poi, self.creative = catalogue.poi, catalogue.creative
        self.batch, self.beams = len(offers.bid), config.beams
        self.request = torch.arange(self.batch).repeat_interleave(self.beams)
        self.first_row = torch.arange(self.batch).unsqueeze(1) * self.beams
        self.bid = torch.where(self.poi.sort(offers.active), self.poi.sort(offers.bid).double(), -torch.inf)
        self.value = quantise(self.poi.sort(offers.value).double())
        self.maxima = self.poi.maxima(self.bid)
        """Greatest bid below every node."""
        if config.bid_of_prefix == "mean":
            real = torch.isfinite(self.bid)
            self.sums, self.counts = self.poi.sums(torch.where(real, self.bid, 0.0)), self.poi.sums(real.double())
            self.log_weight = self._log_weight(self.maxima, self.sums, self.counts)
        else:
            self.log_weight = self._log_weight(self.maxima)
        """log w of every node; -inf where no ad may be shown."""
        first = self.poi.children(torch.zeros(self.batch, dtype=torch.int64), 0, spare=1)
        self.first = first, gather_nodes(self.log_weight, first.node)
        """What a page's every slot begins with, the same for all beams of a request: the widest step."""
        self.without_bid = torch.tensor(math.log(0.0**config.alpha + config.beta), dtype=torch.float64)
        """log w of what bids 0."""
        self.organics = (offers.organic >= 0).all(-1).sum(1)
        self.most_ads = slots if offers.most_ads is None else offers.most_ads
        self.length = torch.clamp(torch.isfinite(self.bid).sum(1).clamp(max=self.most_ads) + self.organics, max=slots)
        """[B] slots that can be filled: every page fills as many, as nothing else limits it."""
        sizes = {
            "position": slots, "organic": slots, "creative": slots, "poi_codes": slots * self.poi.depth, "creative_codes": slots * (self.creative.depth - 1),
            "node": 1, "on_organic": 1, "shown": 1,
        }  # fmt: skip
        ends = np.cumsum(list(sizes.values())).tolist()
        self._columns = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self.ints = torch.full((self.batch * self.beams, ends[-1]), -1, dtype=torch.int64)
        self._column("shown").zero_()
        self.logs = torch.zeros(self.batch * self.beams, 2 * slots, dtype=torch.float64)
        """log z of the POI of every slot, then of its creative."""
        self.score = torch.full((self.batch, self.beams), -torch.inf, dtype=torch.float64)
        self.score[:, 0] = 0.0

    def _column(self, name: str) -> Tensor:
        """A part of `ints`, [B * R, size]; writing to it changes the beams."""
        return self.ints[:, self._columns[name]]

    def run(self) -> Pages:
        previous = creative = None
        for slot in range(int(self.length.max())):
            self.open = slot < self.length
            self.filling, self.all_open = self.open[self.request], bool(self.open.all())
            self._poi(slot, previous, creative)
            self._item(slot)
            self._creative(slot)
            previous = self._codes("poi_codes", slot)[:, -1].view(self.batch, self.beams).clamp(min=0)
            creative = self._codes("creative_codes", slot)[:, -1].view(self.batch, self.beams)

        def column(name: str, *shape: int) -> Tensor:
            real = torch.isfinite(self.score).view(self.batch, self.beams, *[1] * (1 + len(shape)))
            return torch.where(real, self._column(name).reshape(self.batch, self.beams, self.slots, *shape), -1)

        def item(name: str, trie: Trie) -> Tensor:
            position = column(name)
            return torch.where(position >= 0, trie.order[position.clamp(min=0)], -1) if trie.items else position

        logs = torch.where(torch.isfinite(self.score).unsqueeze(-1), self.logs.view(self.batch, self.beams, -1), 0.0)
        return Pages(
            score=self.score, ad=item("position", self.poi), creative=item("creative", self.creative), organic=column("organic"),
            poi_codes=column("poi_codes", self.poi.depth), creative_codes=column("creative_codes", self.creative.depth - 1),
            poi_log_z=logs[..., : self.slots], creative_log_z=logs[..., self.slots :],
        )  # fmt: skip

    def _codes(self, name: str, slot: int) -> Tensor:
        """Codes of a slot's POI or creative, [B * R, C] or [B * R, E]; writing to it changes the beams."""
        return self._column(name).unflatten(1, (self.slots, -1))[:, slot]

    def _at(self, values_BV: Tensor, index: Tensor) -> Tensor:
        """Values [B, V] at places [B * R, ...] of the beams' own requests."""
        return gather_nodes(values_BV, index.view(self.batch, -1)).view(index.shape)

    # -- POI ----------------------------------------------------------------------------------------------------------

    def _log_weight(self, greatest: Tensor, total: Tensor | None = None, count: Tensor | None = None) -> Tensor:
        """log w of prefixes from the greatest bid below, or from sum and number of the bids; -inf where there is none (greatest -inf)."""
        bid = greatest if total is None or count is None else total / count
        return torch.where(torch.isfinite(greatest), torch.log(bid.clamp(min=0.0) ** self.config.alpha + self.config.beta), -torch.inf)

    def _poi(self, slot: int, previous: Tensor | None, creative: Tensor | None) -> None:
        """The codes of the slot's POI."""
        used, above, without = self._column("position")[:, :slot], None, None
        self._column("node").zero_()
        self._column("on_organic").copy_(self._column("shown") < self.organics[self.request].unsqueeze(1))
        if slot and self.poi.items:
            above = torch.where((used >= 0).unsqueeze(-1), self.poi.ancestor[used.clamp(min=0)], self.poi.null)
            without = self.poi.maxima_without(self.maxima, self.bid, used.view(self.batch, self.beams, -1)).flatten(0, 1)
        for layer in range(self.poi.depth):
            logits = self.decoder.poi_logits(previous, None if layer else creative)
            previous, parent = self._advance(logits, *self._poi_choices(layer, above, without), slot)
            if above is not None and without is not None and layer + 1 < self.poi.depth:
                above, without = above[parent], without[parent]
            code = previous.view(-1)
            self._codes("poi_codes", slot)[:, layer] = torch.where(self.filling, code, -1)
            self._column("on_organic").mul_((code == self._next_organic()[:, layer]).unsqueeze(1))

    def _poi_choices(self, layer: int, above: Tensor | None, without: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes that may come next, where they lead and their log w (-inf: not legal), [B * R, M + 1] each.

        `above` [B * R, S, C + 1] are the nodes above ads already on the page, `without` [B * R, S, C] the greatest bids below these without those
        ads. The last column is the next organic item's, where its code leads off the trie.
        """
        trie, node = self.poi, self._column("node")
        if layer == 0:
            start, weight = self.first
            found, log_weight = Children(*(values[self.request] for values in vars(start).values())), weight[self.request]
        else:
            found = trie.children(node.squeeze(1), layer, spare=1)
            log_weight = self._at(self.log_weight, found.node)
        first = trie.first_child[node]
        if above is not None and without is not None:
            below, best = above[..., layer] == node, without[..., layer]
            new = self._log_weight(best, *self._mean_without(above, above[..., layer + 1])) if self.config.bid_of_prefix == "mean" else self._log_weight(best)
            override(log_weight, above[..., layer + 1] - first, below, new)
        organic = self._column("on_organic") > 0
        code = self._next_organic()[:, layer : layer + 1]
        child = trie.child(node, code)
        shared, column = organic & (child < trie.null), child - first
        override(log_weight, column, shared, self._log_weight_with_organic(log_weight, column, shared, child, above))
        log_weight[:, -1:] = torch.where(organic & ~shared, self.without_bid, -torch.inf)
        if (full := self._full()) is not None:  # nothing but the organic item is left of such a page's choices
            alone = torch.full_like(log_weight, -torch.inf)
            alone[:, -1:] = log_weight[:, -1:]
            override(alone, column, shared, self.without_bid.expand_as(column))
            log_weight = torch.where(full, alone, log_weight)
        found.code[:, -1:] = code
        return found.code, found.node, log_weight

    def _log_weight_with_organic(self, log_weight: Tensor, column: Tensor, shared: Tensor, child: Tensor, above: Tensor | None) -> Tensor:
        """log w [B * R, 1] of the child below which the next organic item lies among ads: one more item, which bids 0."""
        if self.config.bid_of_prefix == "mean":
            total, count = self._mean_without(above, child)
            return torch.log((total / (count + 1)).clamp(min=0.0) ** self.config.alpha + self.config.beta)
        return torch.maximum(torch.gather(log_weight, 1, torch.where(shared, column, 0)), self.without_bid)

    def _mean_without(self, above: Tensor | None, node: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of the bids below nodes [B * R, X] without the ads on the page."""
        total, count = self._at(self.sums, node), self._at(self.counts, node)
        if above is not None:
            position = self._column("position")[:, : above.shape[1]]
            bid = torch.where(position >= 0, self._at(self.bid, position.clamp(min=0)), 0.0)
            taken = (above.unsqueeze(1) == node[:, :, None, None]).any(-1) & (position >= 0).unsqueeze(1)
            total, count = total - (taken * bid.unsqueeze(1)).sum(-1), count - taken.sum(-1)
        return total, count

    def _full(self) -> Tensor | None:
        """[B * R, 1] beams with as many ads as a page may hold; None: there can be no such beam."""
        return None if self.most_ads >= self.slots else (self._column("position") >= 0).sum(1, keepdim=True) >= self.most_ads

    def _next_organic(self) -> Tensor:
        """POI codes of each beam's next organic item, [B * R, C]; of some other where none is left."""
        shown, codes = self._column("shown").squeeze(1), self.offers.organic
        if codes.shape[1] == 0:
            return shown.new_zeros(len(shown), codes.shape[-1])
        return codes[self.request, shown.clamp(max=codes.shape[1] - 1)].clamp(min=0)

    def _item(self, slot: int) -> None:
        """Which item of the tuple: the ad of the greatest value, ties by key; the organic item where no ad is left or none is worth anything."""
        trie, node = self.poi, self._column("node").squeeze(1)
        position, worth = torch.full_like(node, -1), torch.full(node.shape, -torch.inf, dtype=torch.float64)
        if trie.items:
            below, real = trie.items_below(node)
            used = self._column("position")[:, :slot]
            real = real & torch.isfinite(self._at(self.bid, below)) & (below.unsqueeze(-1) != used.unsqueeze(1)).all(-1)
            if (full := self._full()) is not None:
                real = real & ~full
            values = torch.where(real, self._at(self.value, below), -torch.inf)
            at = values.argmax(-1, keepdim=True)  # the first of equal ones: the items of a leaf lie in the order of their keys
            worth, position = torch.gather(values, 1, at).squeeze(1), torch.gather(below, 1, at).squeeze(1)
        organic = (self._column("on_organic").squeeze(1) > 0) & ~(worth > 0) & self.filling
        ad = torch.isfinite(worth) & ~organic & self.filling
        shown = self._column("shown").squeeze(1)
        self._column("position")[:, slot] = torch.where(ad, position, -1)
        self._column("organic")[:, slot] = torch.where(organic, shown, -1)
        if self.offers.organic.shape[1]:
            codes = self.offers.organic_creative[self.request, shown.clamp(max=self.offers.organic.shape[1] - 1)]
            self._codes("creative_codes", slot).copy_(torch.where(organic.unsqueeze(1), codes, -1))
        shown += organic

    # -- creative -----------------------------------------------------------------------------------------------------

    def _creative(self, slot: int) -> None:
        """The codes of the creative and which creative it is; an organic item has one or none, so nothing is chosen there."""
        trie, node, previous = self.creative, self._column("node"), None
        position = self._column("position")[:, slot : slot + 1]
        # Every ad has creatives, so the nodes of level 1 are the ads in order.
        node.copy_(torch.where(position >= 0, trie.level_start[1] + self.poi.order[position.clamp(min=0)], trie.null) if trie.items else torch.full_like(position, trie.null))
        for layer in range(trie.depth - 1):
            logits = self.decoder.creative_logits(self._codes("poi_codes", slot).view(self.batch, self.beams, -1), previous)
            found = trie.children(self._column("node").squeeze(1), layer + 1, spare=1)
            found.real[:, -1] = self._column("organic")[:, slot] >= 0
            found.code[:, -1] = self._codes("creative_codes", slot)[:, layer].clamp(min=0)
            code, _ = self._advance(logits, found.code, found.node, torch.where(found.real, 0.0, -torch.inf), slot, self.slots)
            own, organic = self._codes("creative_codes", slot)[:, layer], self._column("organic")[:, slot] >= 0
            previous = torch.where(organic & (own < 0), trie.sizes[layer + 1], code.view(-1)).view(code.shape)
            own.copy_(torch.where(organic | ~self.filling, own, code.view(-1)))
        if trie.items:
            node = self._column("node").squeeze(1)
            self._column("creative")[:, slot] = torch.where(node < trie.null, trie.first[node], -1)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _advance(self, logits_BRW: Tensor, code: Tensor, node: Tensor, log_weight: Tensor, slot: int, first_log: int = 0) -> tuple[Tensor, Tensor]:
        """Keep the R best continuations of all beams: z = softmax(logit + log w) over each beam's legal codes.

        Returns the code that each took, [B, R], and the row that each came from, [B * R]. Requests whose pages are full stand still.
        """
        width = code.shape[1]
        gained = torch.log_softmax(torch.gather(logits_BRW.flatten(0, 1), 1, code).double() + log_weight, -1).view(self.batch, self.beams, width)
        total = self.score.unsqueeze(-1) + gained
        alive = torch.isfinite(self.score)
        if not bool(alive.all()):  # a beam that does not exist has no legal code, and so no softmax
            total = torch.where(alive.unsqueeze(-1), total, -torch.inf)
        if not self.all_open:
            still = torch.where(torch.arange(width) == 0, self.score.unsqueeze(-1), -torch.inf)
            total = torch.where(self.open[:, None, None], total, still)
        place = top(total.flatten(1), self.beams)
        self.score = torch.gather(total.flatten(1), 1, place)
        parent = place // width
        self.decoder.keep(parent)
        row = (parent + self.first_row).view(-1)
        choice = (place + self.first_row * width).view(-1)
        self.ints, self.logs = self.ints[row], self.logs[row]
        self._column("node").copy_(node.view(-1)[choice].unsqueeze(1))
        gained = gained.view(-1)[choice]
        self.logs[:, first_log + slot] += gained if self.all_open else torch.where(self.filling, gained, 0.0)
        return code.view(-1)[choice].view(place.shape), row


def best_page(pages: Pages, value_BR: Tensor) -> Tensor:
    """Index [B] of the page of greatest value among those that exist; of equal ones the better beam."""
    return top(torch.where(torch.isfinite(pages.score), value_BR.double(), -torch.inf), 1).squeeze(1)


def log_chances(poi_logits_BRKCW: Tensor, creative_logits_BRKEW: Tensor, catalogue: Catalogue, offers: Offers, pages: Pages, config: SearchConfig) -> tuple[Tensor, Tensor]:
    """log z of the POI and of the creative in every slot of given pages, [B, R, K] each; differentiable in the logits.

    What a policy gradient needs: the pages are those of a search with these offers, the logits what the network says of their codes
    (`EgaV2.page_logits`), now with gradients. Legal codes and weights are those of the search, so equal logits give the search's own log z.
    """
    batch, beams, slots = pages.ad.shape
    if poi_logits_BRKCW.shape[:4] != (batch, beams, slots, catalogue.poi.depth) or creative_logits_BRKEW.shape[:4] != (batch, beams, slots, catalogue.creative.depth - 1):
        raise SearchError(f"logits of shapes {tuple(poi_logits_BRKCW.shape)} and {tuple(creative_logits_BRKEW.shape)} do not belong to pages of shape {(batch, beams, slots)}")
    replay = _Replay(_Given(poi_logits_BRKCW, creative_logits_BRKEW), catalogue, offers, slots, SearchConfig(beams, config.alpha, config.beta, config.bid_of_prefix))
    replay.pages = pages
    replay.run()
    steps = slots * (catalogue.poi.depth + catalogue.creative.depth - 1)
    nothing = torch.zeros(batch * beams, dtype=torch.float64)  # of slots that no page fills
    gained = torch.stack([*replay.gained, *[nothing] * (steps - len(replay.gained))], -1).view(batch, beams, slots, -1)
    return gained[..., : catalogue.poi.depth].sum(-1), gained[..., catalogue.poi.depth :].sum(-1)


class _Given:
    """A `Decoder` whose logits are known beforehand."""

    def __init__(self, poi: Tensor, creative: Tensor) -> None:
        self.poi, self.creative = iter(poi.flatten(2, 3).unbind(2)), iter(creative.flatten(2, 3).unbind(2))

    def poi_logits(self, previous_BR: Tensor | None, creative_BR: Tensor | None) -> Tensor:
        return next(self.poi)

    def creative_logits(self, poi_BRC: Tensor, previous_BR: Tensor | None) -> Tensor:
        return next(self.creative)

    def keep(self, parent_BR: Tensor) -> None:
        raise AssertionError("given pages change no places")


class _Replay(_Search):
    """A search that takes the codes of given pages instead of the best; `gained` collects the log z of every step, [B * R]."""

    pages: Pages

    def run(self) -> Pages:
        self.gained: list[Tensor] = []
        self.exists = torch.isfinite(self.pages.score).view(-1)
        return super().run()

    def _advance(self, logits_BRW: Tensor, code: Tensor, node: Tensor, log_weight: Tensor, slot: int, first_log: int = 0) -> tuple[Tensor, Tensor]:
        codes = self.pages.creative_codes if first_log else self.pages.poi_codes
        step = len(self.gained) % (self.poi.depth + self.creative.depth - 1)
        wanted = codes[:, :, slot, step - (self.poi.depth if first_log else 0)].reshape(-1, 1).clamp(min=0)
        taken = (self.filling & self.exists).unsqueeze(1)
        legal = (code == wanted) & torch.isfinite(log_weight)
        if bool((taken & ~legal.any(1, keepdim=True)).any()):
            raise SearchError(f"a page holds a code in slot {slot} that its offers do not allow; pass the offers that it was found with")
        column = legal.int().argmax(1, keepdim=True)
        # Rows without a page have no legal code, and so no softmax and no gradient.
        logits = torch.gather(logits_BRW.flatten(0, 1), 1, code).double() + torch.where(taken, log_weight, 0.0)
        gained = torch.gather(torch.log_softmax(logits, -1), 1, column)
        self.gained.append(torch.where(taken, gained, 0.0).squeeze(1))
        self._column("node").copy_(torch.gather(node, 1, column))
        return torch.gather(code, 1, column).view(self.batch, self.beams), torch.arange(len(code))
