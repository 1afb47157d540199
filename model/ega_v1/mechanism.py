"""From frozen representations to a priced page: allocation, thresholds, page CTRs and payments of a batch of requests.

Training (stage 4), replay and serving all price through this module. Money is in units of the city's median bid.
Shape letters: B requests, N candidates, K slots, D width. `moved[b, i, l]` is the page on which the ad of slot i sits in
slot l because it bid differently; thresholds theta[b, i, l] say from which bid on (auction.critical).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from auction import batch as auctions
from auction.critical import step_prices_everywhere
from auction.shortlist import prefilter
from auction.ties import quantise
from model.ega_v1.network import RankingModel
from model.layers import take

PriceMode = Literal["critical", "learned", "gsp", "vcg", "first_price"]
PRICE_MODES: tuple[PriceMode, ...] = ("critical", "learned", "gsp", "vcg", "first_price")


def price_modes(network: RankingModel) -> tuple[PriceMode, ...]:
    """The modes that a model can charge by."""
    return PRICE_MODES if network.payment is not None else tuple(mode for mode in PRICE_MODES if mode != "learned")


@dataclass
class Pool:
    """What RecFormer says of R requests, computed once: later stages never change it.

    h [R, N, D], codes [R, N, 2] (network.PAGE_CODES), user [R, D], click and purchase logits [R, N], bid and reserve [R, N],
    mask [R, N], ad_rows [R, N] rows of the ad table (-1 padding), unit [R] the median bid in currency.
    """

    requests: np.ndarray
    h: Tensor
    codes: Tensor
    user: Tensor
    click: Tensor
    purchase: Tensor
    bid: Tensor
    reserve: Tensor
    mask: Tensor
    ad_rows: np.ndarray
    unit: np.ndarray
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors a stage keeps per request; `take` selects them too."""

    @property
    def allowed(self) -> Tensor:
        """[R, N] what an allocation may show: real ads whose bid meets their reserve. Attention sees `mask`, not this."""
        return self.mask & (self.bid >= self.reserve) & (self.bid > 0)

    def tensor(self, values: np.ndarray) -> Tensor:
        """An array where the representations are."""
        return torch.from_numpy(values).to(self.h.device)

    def take(self, index: np.ndarray) -> Pool:
        """The same for some requests, by position."""
        i = self.tensor(np.asarray(index))
        return Pool(
            self.requests[index], self.h[i], self.codes[i], self.user[i], self.click[i], self.purchase[i], self.bid[i], self.reserve[i], self.mask[i],
            self.ad_rows[index], self.unit[index], {name: value[i] for name, value in self.extra.items()},
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What J ads of B requests get in every slot that a bid of theirs can win; float64, padding 0 (thresholds inf)."""

    pages: np.ndarray
    """[B, J] candidate positions of the ads; -1 none. Of displayed ads: the page."""
    moved: np.ndarray
    """[B, J, K, K] the page that is shown with the ad in a slot."""
    theta: np.ndarray
    """[B, J, K] critical bids, non-increasing in the slot."""
    ctr_moved: np.ndarray
    """[B, J, K] pCTR of the ad on `moved`."""
    set_ctr: np.ndarray
    """[B, J] set-aware pCTR."""
    bid: np.ndarray
    """[B, J]."""
    reserve: np.ndarray
    """[B, J]."""
    critical_at: np.ndarray
    """[B, J, K] truthful price per click in every slot; inf where never reached."""


@dataclass(frozen=True, kw_only=True)
class Pages(Audit):
    """Pages of B requests, an audit of the displayed ads (J = K), with everything their prices rest on."""

    ctr: np.ndarray
    """[B, K] evaluator's pCTR on the page."""
    critical: np.ndarray
    """[B, K] truthful price per click."""
    repaired: np.ndarray
    """[B, K] true where a non-monotone CTR had to be repaired (auction.critical)."""
    gsp: np.ndarray
    """[B, K] generalised second price under the set-aware pCTR."""
    next_score: np.ndarray
    """[B, K] set-aware pCTR * bid of the next ad, which `gsp` divides by the own pCTR."""
    runner_up: np.ndarray
    """[B, K] candidate position of the ad that takes the slot if its ad leaves; -1 if none."""
    affinity: np.ndarray
    """[B, K, K] A of the ad of slot i for every slot."""
    slope: np.ndarray
    """[B, K, K] e^{w+M} of the ad of slot i for every slot; its score for slot k is slope * pCTR * bid + affinity."""
    tied: np.ndarray
    """[B, K] whether only the tie key put the ad before its runner-up."""


def page_logits(evaluator: torch.nn.Module, pool: Pool, page_BK: Tensor) -> tuple[Tensor, Tensor]:
    """An evaluator's logits for pages given as candidate positions (-1: no ad). `page_BK` may be [B, P, K]: P pages a request."""
    shape = page_BK.shape
    pages = page_BK.reshape(shape[0], -1)
    index, mask = pages.clamp(min=0), (page_BK >= 0).reshape(-1, shape[-1])
    h, codes = (take(x, index).reshape(-1, shape[-1], x.shape[-1]) for x in (pool.h, pool.codes))
    click, purchase = (torch.gather(x, 1, index).reshape(-1, shape[-1]) for x in (pool.click, pool.purchase))
    user = pool.user.repeat_interleave(h.shape[0] // shape[0], 0)
    clicked, purchased = evaluator(h, codes, user, click, purchase, mask)
    return clicked.reshape(shape), purchased.reshape(shape)


def affinities(network: RankingModel, pool: Pool, slots: int, learned: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A and e^{w+M} of the first slots, [B, N, slots] each; 0 and 1 where the ranking is by q*b."""
    if learned and network.generator is not None:
        affinity, slope = (x[..., :slots].double().numpy(force=True) for x in network.generator(pool.h, pool.mask, pool.user))
        return affinity, slope
    shape = (*pool.mask.shape, slots)
    return np.zeros(shape), np.ones(shape)


@torch.no_grad()
def allocate(
    network: RankingModel, pool: Pool, learned: bool = True, evaluator: torch.nn.Module | None = None, tie_key: np.ndarray | None = None, slots: int | None = None,
    eligible: np.ndarray | None = None,
) -> Pages:  # fmt: skip
    """Greedy pages with their thresholds and truthful prices. `learned=False` ranks by q*b (A = M = 0); `slots` < K fills the
    first slots only, and the prices are those of an auction for these slots. `eligible` [B, N] filters the allocation and nothing
    else: attention always sees `pool.mask`, so neither a filter nor a bid below its reserve can change an affinity."""
    q = torch.sigmoid(pool.click).double().numpy(force=True)
    bids, reserves = pool.bid.double().numpy(force=True), pool.reserve.double().numpy(force=True)
    slots = slots or network.config.slots
    affinity_BNK, slopes_BNK = affinities(network, pool, slots, learned)
    allowed = pool.mask.numpy(force=True) if eligible is None else pool.mask.numpy(force=True) & eligible
    return allocate_scored(pool, q, bids, reserves, affinity_BNK, slopes_BNK, allowed, evaluator or network.evaluator, tie_key)


@torch.no_grad()
def allocate_scored(
    pool: Pool, q: np.ndarray, bids: np.ndarray, reserves: np.ndarray, affinity_BNK: np.ndarray, slopes_BNK: np.ndarray, allowed: np.ndarray,
    evaluator: torch.nn.Module, tie_key: np.ndarray | None = None,
) -> Pages:  # fmt: skip
    """`allocate` from q, A and slopes as they are given, float64 [B, N] and [B, N, K]; `allowed` [B, N] is who may be shown at some bid."""
    eligible = allowed & (bids >= reserves) & (bids > 0)
    found = auctions.counterfactuals(q, bids, affinity_BNK, slopes_BNK, affinity_BNK.shape[-1], eligible, tie_key)
    return price_pages(pool, found, q, bids, reserves, affinity_BNK, slopes_BNK, eligible, evaluator)


def contenders(q: np.ndarray, bids: np.ndarray, affinity_NK: np.ndarray, slopes_NK: np.ndarray, able: np.ndarray, count: int = 0) -> np.ndarray:
    """Rows of one request that `allocate_scored` needs to give the page, thresholds and prices that all N rows would give, ascending.

    The top K + 1 of every slot (auction.shortlist), and the top K + 1 by q * b, which hold the best ad that is not shown: GSP's and VCG's
    last rival. Usually a few dozen of N. With `count` simply the top `count` of each.
    """
    rows, slots = np.flatnonzero(able), affinity_NK.shape[1]
    if len(rows) == 0:
        return np.zeros(1, np.int64)
    if len(rows) < len(q):
        q, bids, affinity_NK, slopes_NK = q[rows], bids[rows], affinity_NK[rows], slopes_NK[rows]
    if count == 0:
        by_score = prefilter(q, bids, affinity_NK, slopes_NK, slots, None)
        return rows[np.union1d(by_score, prefilter(q, bids, 0.0, 1.0, slots, None))]
    if len(rows) <= count:
        return rows
    value = q * bids
    columns = [value, *(slopes_NK[:, slot] * value + affinity_NK[:, slot] for slot in range(slots))]
    return rows[np.unique(np.concatenate([np.argpartition(column, -count)[-count:] for column in columns]))]


def price_pages(
    pool: Pool, found: auctions.Counterfactuals, q: np.ndarray, bids: np.ndarray, reserves: np.ndarray, affinity_BNK: np.ndarray,
    slopes_BNK: np.ndarray, eligible: np.ndarray, evaluator: torch.nn.Module,
) -> Pages:  # fmt: skip
    """CTRs of the pages and their counterfactuals under `evaluator`, and the prices that follow."""
    batch, slots = found.pages.shape
    every = np.concatenate([found.pages[:, None], found.moved.reshape(batch, slots * slots, slots)], 1)
    logit, _ = page_logits(evaluator, pool, pool.tensor(every))
    ctr_all = torch.sigmoid(logit).double().numpy(force=True) * (every >= 0)
    moved = ctr_all[:, 1:].reshape(batch, slots, slots, slots)
    ctr_moved = np.einsum("bill->bil", moved)
    shown = found.pages >= 0
    at = {name: auctions.at_page(values, found.pages) for name, values in (("bid", bids), ("reserve", reserves), ("q", q))}
    # With b = infinity in slot l the price is what the step function gives there: evaluate it for every slot at once.
    critical, repaired = auctions.critical_prices(found.theta, ctr_moved, found.pages, at["bid"], at["reserve"])
    critical_at = np.where(shown[:, :, None], step_prices_everywhere(found.theta, ctr_moved, at["reserve"]), 0.0)
    runner_up = auctions.runner_up_scores(q, bids, found.pages, eligible)
    gsp = auctions.gsp_prices(at["q"], at["bid"], runner_up, at["reserve"]) * shown
    next_score = np.concatenate([(at["q"] * at["bid"])[:, 1:], runner_up[:, None]], 1)
    rival = np.einsum("bii->bi", found.without)
    affinity, slope = (np.take_along_axis(x, np.maximum(found.pages, 0)[:, :, None], 1) for x in (affinity_BNK, slopes_BNK))
    own, other = (own_slot_scores(q * bids, affinity_BNK, slopes_BNK, rows) for rows in (found.pages, rival))
    tied = shown & (rival >= 0) & (quantise(own) == quantise(other))
    return Pages(
        pages=found.pages, moved=found.moved, theta=found.theta, ctr_moved=ctr_moved, set_ctr=at["q"], bid=at["bid"], reserve=at["reserve"],
        critical_at=critical_at, ctr=ctr_all[:, 0], critical=critical, repaired=repaired, gsp=gsp, next_score=next_score, runner_up=rival,
        affinity=affinity, slope=slope, tied=tied,
    )  # fmt: skip


@torch.no_grad()
def audit_losers(network: RankingModel, pool: Pool, pages: Pages, count: int, evaluators: tuple[torch.nn.Module, ...]) -> list[Audit]:
    """The `count` ads a request that come nearest to the page of `allocate`, by bid over critical bid, one audit an evaluator.

    Who is not displayed can only overbid. Under critical prices nobody gains by it whatever the CTRs (every threshold exceeds the value);
    under GSP and learned prices somebody may.
    """
    q, bids = torch.sigmoid(pool.click).double().numpy(force=True), pool.bid.double().numpy(force=True)
    reserves, mask = pool.reserve.double().numpy(force=True), pool.mask.numpy(force=True)
    slots = pages.theta.shape[-1]
    affinity, slopes = affinities(network, pool, slots)
    market = (q, bids, affinity, slopes, pages.pages)
    eligible = pool.allowed.numpy(force=True)
    theta = auctions.critical_bids_of_all(*market, eligible, barred=~mask)
    entry = np.maximum(theta[..., -1], reserves)
    with np.errstate(divide="ignore", invalid="ignore"):
        nearness = np.where(np.isfinite(entry) & (bids > 0), bids / entry, -1.0)
    request, slot = np.nonzero(pages.pages >= 0)
    nearness[request, pages.pages[request, slot]] = -1.0
    order = np.argsort(-nearness, axis=1, kind="stable")[:, :count]
    losers = np.where(np.take_along_axis(nearness, order, 1) > 0, order, -1)
    moved = auctions.pages_with(*market, losers, eligible)
    batch, many = losers.shape
    at = np.maximum(losers, 0)
    theirs = np.where((losers >= 0)[..., None], np.take_along_axis(theta, at[..., None], 1), np.inf)
    theirs = np.where(moved[..., 0] >= 0, theirs, np.inf)
    floor, own, bid = (np.take_along_axis(values, at, 1) * (losers >= 0) for values in (reserves, q, bids))
    flat = pool.tensor(moved.reshape(batch, many * slots, slots))
    audits = []
    for evaluator in evaluators:
        logit, _ = page_logits(evaluator, pool, flat)
        ctr = torch.sigmoid(logit).double().numpy(force=True).reshape(moved.shape) * (moved >= 0)
        ctr = np.einsum("bjll->bjl", ctr)
        audits.append(Audit(
            pages=losers, moved=moved, theta=theirs, ctr_moved=ctr, set_ctr=own, bid=bid, reserve=floor, critical_at=step_prices_everywhere(theirs, ctr, floor),
        ))  # fmt: skip
    return audits


def own_slot_scores(value_BN: np.ndarray, affinity_BNK: np.ndarray, slopes_BNK: np.ndarray, rows_BK: np.ndarray) -> np.ndarray:
    """Allocation score of the ad named for each slot in that slot, [B, K]; value is pCTR * bid."""
    request, slot = np.arange(len(rows_BK))[:, None], np.arange(rows_BK.shape[1])[None]
    rows = np.maximum(rows_BK, 0)
    return slopes_BNK[request, rows, slot] * value_BN[request, rows] + affinity_BNK[request, rows, slot]


def others_bids(page_bids: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """b_{-i}: page bids [..., K] without the entry at `slot` [...], in page order, [..., K-1]."""
    index = np.arange(page_bids.shape[-1] - 1)
    return np.take_along_axis(page_bids, index + (index >= slot[..., None]), -1)


def page_states(pool: Pool, pages: np.ndarray) -> Tensor:
    """h of the ads on pages [B, K]; zero rows where a slot is empty."""
    return take(pool.h, pool.tensor(np.maximum(pages, 0))) * pool.tensor(pages >= 0).unsqueeze(-1)


@dataclass(frozen=True)
class Bidding:
    """What every displayed ad would get for other bids of its own, the page regenerated: [B, K, T] over T trial bids."""

    bid: np.ndarray
    slot: np.ndarray
    """Slot won, -1 none."""
    ctr: np.ndarray
    """pCTR there, 0 if none."""
    critical: np.ndarray
    """Truthful price there."""
    margin: np.ndarray
    """Bid beyond the threshold of the slot won."""
    others: np.ndarray
    """[B, K, T, K-1] bids of the other ads on that page."""


def try_bids(pool: Pool, pages: Audit, trial_BKT: np.ndarray) -> Bidding:
    """Outcome of trial bids of the audited ads, from thresholds and counterfactual pages alone (no re-run needed)."""
    slots = pages.theta.shape[-1]
    shown = (pages.pages >= 0)[:, :, None]
    wins = (pages.theta[:, :, None, :] < trial_BKT[..., None]) & shown[..., None]
    enough = wins.any(-1) & (trial_BKT >= pages.reserve[:, :, None]) & (trial_BKT > 0)
    slot = np.where(enough, wins.argmax(-1), -1)
    at = np.maximum(slot, 0)
    won = slot >= 0

    def pick(values: np.ndarray) -> np.ndarray:
        return np.where(won, np.take_along_axis(values, at, 2), 0.0)

    theta = np.maximum(pick(np.where(np.isfinite(pages.theta), pages.theta, 0.0)), 0.0)  # -inf: won at any bid
    bids = pool.bid.double().numpy(force=True)
    flat = np.maximum(pages.moved, 0).reshape(len(bids), -1)
    moved_bids = np.take_along_axis(bids, flat, 1).reshape(pages.moved.shape) * (pages.moved >= 0)
    page_bids = np.take_along_axis(moved_bids, np.broadcast_to(at[..., None], (*at.shape, slots)), 2)
    others = others_bids(page_bids, at) * won[..., None]
    critical = np.where(np.isfinite(pages.critical_at), pages.critical_at, 0.0)
    return Bidding(trial_BKT, slot, pick(pages.ctr_moved), np.minimum(pick(critical), trial_BKT), np.where(won, trial_BKT - theta, 0.0), others)


def truthful(pool: Pool, pages: Audit) -> Bidding:
    """`try_bids` at the bids as they are, T = 1."""
    return try_bids(pool, pages, pages.bid[:, :, None])


def learned_prices(network: RankingModel, pool: Pool, pages: Audit, bidding: Bidding) -> Tensor:
    """Payment network on trial bids, [B, K, T]; differentiable in the network's weights."""
    trials = bidding.bid.shape[2]
    h = page_states(pool, pages.pages).unsqueeze(2).expand(-1, -1, trials, -1)
    ctr, others, bid, critical, margin = (pool.tensor(x).float() for x in (bidding.ctr, bidding.others, bidding.bid, bidding.critical, bidding.margin))
    others = torch.nn.functional.pad(others, (0, network.config.slots - 1 - others.shape[-1]))  # pages of fewer slots
    reserve = pool.tensor(pages.reserve).float().unsqueeze(2).expand_as(bid)
    return network.payment(h, ctr, others, bid, critical, margin, reserve)


@torch.no_grad()
def slot_clicks(network: RankingModel, slots: int) -> np.ndarray:
    """[slots] what a click-through rate is worth in each slot, 1 in the first and not rising: the slot's term of pre-training.

    VCG needs clicks that are separable, pCTR times this; they are not, which is why `critical` prices and `vcg` is for comparison.
    """
    alpha = torch.exp(network.slot_logits()[:slots].double()).numpy(force=True)
    return np.minimum.accumulate(alpha / alpha[0])


@torch.no_grad()
def prices(network: RankingModel, pool: Pool, pages: Pages, mode: PriceMode) -> np.ndarray:
    """Price per click of every displayed ad, [B, K], in [0, bid]; 0 in empty slots."""
    if mode == "critical":
        value = pages.critical
    elif mode == "gsp":
        value = pages.gsp
    elif mode == "vcg":
        value = auctions.vcg_prices(pages.next_score, slot_clicks(network, pages.pages.shape[1]), pages.set_ctr, pages.bid, pages.reserve)
    elif mode == "first_price":
        value = pages.bid
    elif mode == "learned":
        value = learned_prices(network, pool, pages, truthful(pool, pages))[..., 0].double().numpy(force=True)
        value = np.clip(value, np.minimum(pages.reserve, pages.bid), pages.bid)  # float32 rounding must not exceed the bid
    else:
        raise ValueError(f"price mode {mode!r} is unknown; use one of {', '.join(PRICE_MODES)}")
    return np.where(pages.pages >= 0, value, 0.0)
