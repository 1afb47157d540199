"""Payments of EGA (V2) at the level of POIs: what an ad would gain by another bid when the page is generated anew, and the network that learns from it.

A page that is searched for has no thresholds, and its CTRs need not rise with a bid, though they nearly always do. So the truthful price is an implicit one (`auction.implicit`),
from the page generated anew at drawn bids, and regret is measured, over the bids that are tried.
Shape letters: Q requests, K ads of a page, G trial bids, X trial offers to one request, S draws, P places of a page, D width; "..." any leading dimensions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor

from model.ega_v2.allocation import ItemFeatures, items_of
from model.ega_v2.beam import Catalogue, Offers, Pages, best_page, search
from model.ega_v2.config import SearchConfig
from model.ega_v2.network import Decoding, EgaV2, History, Memory, RewardModel
from model.training.loop import Device, LoopConfig, StageResult, run_stage

Rule = Literal["learned", "implicit", "gsp", "first_price"]
RULES: tuple[Rule, ...] = get_args(Rule)


@config_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class PaymentConfig(LoopConfig):
    """Stage 5: the payment network under a regret constraint (an augmented Lagrangian, as of EGA-V1)."""

    steps: int = Field(300, ge=0)
    """Most optimiser steps."""
    batch: int = Field(32, ge=1)
    """Requests a step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Adam's peak rate."""
    validate_every: int = Field(50, ge=1)
    """Steps between validations."""
    requests: int = Field(96, ge=1)
    """Training requests, newest first; each is answered once for every displayed ad and trial bid."""
    validation_requests: int = Field(32, ge=1)
    """Validation requests."""
    multiplier: float = Field(2.0, ge=0)
    """lambda at the start."""
    most_multiplier: float = Field(50.0, gt=0)
    """lambda at most: pages are searched for, so that some regret is left whatever is charged, and without a bound nothing but it would count."""
    rho: float = Field(5.0, gt=0)
    """Quadratic penalty, and step of lambda."""
    identity_weight: float = Field(20.0, ge=0)
    """Weight of the distance to Myerson's prices on the regenerated pages (`identity_prices`), in expected payments; 0: regret alone, as printed."""
    psi_target: float = Field(0.015, gt=0)
    """Regret over utility, displayed ads and losers together, at which revenue starts to decide which weights are kept."""
    losers: int = Field(2, ge=0)
    """Ads a request, next to those displayed, that try other bids too: of other proposed pages, best first."""
    misreports: tuple[float, ...] = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.7, 2.5)
    """Bids tried, as factors of the value, ascending, the value itself among them; Myerson's prices run straight between them."""

    def __post_init__(self) -> None:
        if not self.misreports or self.misreports[0] <= 0 or any(low >= high for low, high in zip(self.misreports, self.misreports[1:], strict=False)):
            raise ValueError(f"misreports must ascend and be above 0, got {self.misreports}")
        if 1.0 not in self.misreports:
            raise ValueError(f"misreports must hold 1, the truth, got {self.misreports}")


@dataclass(frozen=True)
class Shown:
    """Pages as payments see them; money over the city's median bid, 0 in organic and empty places."""

    state: Tensor
    """[..., P, D] what the reward model's attention made of every item."""
    bid: Tensor
    """[..., P]"""
    ctr: Tensor
    """[..., P] chance of a click, by the reward model that chose the page."""
    judged: Tensor
    """[..., P] the same by another judge; equal to `ctr` where none was asked."""
    exposure: Tensor
    """[..., P] z of the POI times that chance."""
    reserve: Tensor
    """[..., P]"""
    rival: Tensor
    """[..., P] bid * chance of a click of the next ad if it stood in this place: the one below (the two change places), below the last the best ad
    of the other proposed pages (instead of it); 0 where there is none."""
    pivot: Tensor
    """[..., P] what the others of the page lose by this ad, per click: Clarke's price if the proposed pages were all there are and no bid changed them."""

    def take(self, index: Tensor) -> Shown:
        """Some of the requests."""
        return Shown(*(values[index] for values in vars(self).values()))


@dataclass(frozen=True)
class Audit:
    """Truthful pages of Q requests, and what the page becomes when one of A ads, displayed or not, bids something else."""

    truth: Shown
    """[Q, ...]"""
    ad: Tensor
    """[Q, A] ad among those of its city, the displayed ones first in page order; -1 none."""
    place: Tensor
    """[Q, A] where it stands on the truthful page, -1: nowhere."""
    value: Tensor
    """[Q, A] what a click is worth to it."""
    trial_bid: Tensor
    """[Q, A, G] ascending; one of them is the value."""
    trial: Shown
    """[Q, A, G, ...]"""
    trial_place: Tensor
    """[Q, A, G] where the ad then stands, -1: nowhere."""

    def take(self, index: Tensor) -> Audit:
        """Some of the requests."""
        return Audit(self.truth.take(index), self.ad[index], self.place[index], self.value[index], self.trial_bid[index], self.trial.take(index), self.trial_place[index])


@torch.no_grad()
def shown_pages(
    network: EgaV2, memory: Memory, catalogue: Catalogue, offers: Offers, features: ItemFeatures, reserve: Tensor, config: SearchConfig, best_of_beam: bool = True,
    judge: RewardModel | None = None,
) -> tuple[Shown, Pages, Pages]:  # fmt: skip
    """The page that each of B offers to one request leads to, for payments and as the search has it ([B, 1, P]), and all proposed ones ([B, R, P]).

    `memory` and `features` of that one request; `reserve` [N], over the city's median bid. `best_of_beam` false: the likeliest page, which no
    reward model has chosen. `judge` reads the same pages.
    """
    pages, chance, worth, best = _chosen(network, memory, catalogue, offers, features, config, best_of_beam)
    rows = torch.arange(len(best))
    rival = _rivals(network, memory, pages, best, offers, features)
    found = Pages(*(values[rows, best].unsqueeze(1) for values in vars(pages).values()))
    ad = found.ad[:, 0]
    states = network.reward.states(memory, items_of(_as_one(found), features, 0))
    bid, ctr = _bids(offers, found)[:, 0], chance[rows, best] * (ad >= 0)
    judged = ctr if judge is None else _chances(judge, memory, found, features)[:, 0] * (ad >= 0)
    floor = torch.where(ad >= 0, reserve[ad.clamp(min=0)], 0.0)
    pivot = _pivots(pages, worth.sum(-1), worth, best) / ctr.clamp(min=1e-12)
    shown = Shown(states, *(values.float() for values in (bid, ctr, judged, found.poi_log_z[:, 0].exp() * ctr, floor, rival, torch.minimum(pivot, bid))))
    return shown, found, pages


def _chosen(
    network: EgaV2, memory: Memory, catalogue: Catalogue, offers: Offers, features: ItemFeatures, config: SearchConfig, best_of_beam: bool
) -> tuple[Pages, Tensor, Tensor, Tensor]:
    """The proposed pages of B offers to one request, chance of a click and bid * chance [B, R, P], and which page is chosen [B]."""
    batch, slots = len(offers.bid), network.config.slots
    pages = search(lambda _: Decoding(network, memory, config.beams, slots, batch), catalogue, offers, slots, config, requests_at_once=batch)
    chance = _chances(network.reward, memory, pages, features)
    worth = chance * _bids(offers, pages)
    return pages, chance, worth, best_page(pages, worth.sum(-1) if best_of_beam else pages.score)


def _trials(offers: Offers, liar: Tensor, bid: Tensor, reserve: Tensor) -> Offers:
    """The offers of one request once more for each of X bids: ad liar[x] bids bid[x]. A bid below the reserve is none."""
    count = len(liar)
    bids = offers.bid.repeat(count, 1)
    bids[torch.arange(count), liar] = bid.to(bids.dtype)
    worth = offers.value / offers.bid.clamp(min=1e-12)
    return Offers(
        bids, offers.active.expand(count, -1) & (bids >= reserve), bids * worth, offers.organic.expand(count, -1, -1), offers.organic_creative.expand(count, -1, -1), offers.most_ads
    )


@torch.no_grad()
def probed(
    network: EgaV2, memory: Memory, catalogue: Catalogue, offers: Offers, features: ItemFeatures, reserve: Tensor, config: SearchConfig, ad: Tensor, bids_KS: Tensor, best_of_beam: bool = True
) -> Tensor:
    """[K, S] chance of a click on each of K ads of one request when it bids bids[k, s] and nobody else changes: 0 where it is not on the page then.

    Arguments as of `shown_pages`, with the offers of that one request: what `auction.implicit_price` is made of.
    """
    if len(ad) == 0:
        return torch.zeros(bids_KS.shape, dtype=torch.float64)
    liar = ad.repeat_interleave(bids_KS.shape[1])
    pages, chance, _, best = _chosen(network, memory, catalogue, _trials(offers, liar, bids_KS.flatten(), reserve), features, config, best_of_beam)
    rows = torch.arange(len(liar))
    found = (chance[rows, best] * (pages.ad[rows, best] == liar.unsqueeze(1))).sum(-1).view(bids_KS.shape)
    return found.float().double()  # as `Shown` keeps chances: where nothing changes with the bid the price is the reserve itself


def _as_one(pages: Pages) -> Pages:
    """The pages [B, R, P] of B offers to one request as so many pages of that request."""
    return Pages(*(values.flatten(0, 1).unsqueeze(0) for values in vars(pages).values()))


def _chances(reward: RewardModel, memory: Memory, pages: Pages, features: ItemFeatures) -> Tensor:
    """[B, R, P] float64 chance of a click on what each place of the pages shows to the one request of `memory`; 0 in empty places.

    Offers that differ in a bid lead to the same pages over and over: each is read once.
    """
    flat = _as_one(pages)
    number: dict[bytes, int] = {}
    shown = torch.cat([flat.ad, flat.creative, flat.organic], -1)[0].numpy()
    page = torch.tensor([number.setdefault(row.tobytes(), len(number)) for row in shown])
    first = torch.empty(len(number), dtype=torch.int64).scatter_(0, page, torch.arange(len(page)))
    items = items_of(Pages(*(values[:, first] for values in vars(flat).values())), features, 0)
    chance = torch.sigmoid(reward(memory, items).poi_click.double()) * (items.poi >= 0).all(-1)
    return chance[page].view(pages.ad.shape)


def _bids(offers: Offers, pages: Pages) -> Tensor:
    """[B, R, P] float64 bid of the ad in each place, 0 elsewhere."""
    bid = torch.gather(offers.bid.double(), 1, pages.ad.clamp(min=0).flatten(1)).view(pages.ad.shape)
    return torch.where(pages.ad >= 0, bid, 0.0)


def _pivots(pages: Pages, value_BR: Tensor, worth_BRP: Tensor, best: Tensor) -> Tensor:
    """[B, P] for each ad of the pages `best` [B]: the others' worth on the best proposed page for them, less theirs on this one; 0 where there is no ad."""
    rows = torch.arange(len(best))
    ad = pages.ad[rows, best]
    own = (worth_BRP.unsqueeze(1) * (pages.ad.unsqueeze(1) == ad[:, :, None, None])).sum(-1)  # [B, P, R]
    others = torch.where(torch.isfinite(pages.score).unsqueeze(1), value_BR.unsqueeze(1) - own, -torch.inf)
    lost = others.amax(-1) - torch.gather(others, 2, best.view(-1, 1, 1).expand(-1, ad.shape[1], 1)).squeeze(-1)
    return torch.where(ad >= 0, lost, 0.0)


def _rivals(network: EgaV2, memory: Memory, pages: Pages, best: Tensor, offers: Offers, features: ItemFeatures) -> Tensor:
    """`Shown.rival` [B, P] of the pages `best` [B]. A score of its own place would compare a good place with a bad one."""
    batch, beams, places = pages.ad.shape
    flat = pages.ad.flatten(1)
    variants: list[list[np.ndarray]] = []
    for row in range(batch):
        own = int(best[row]) * places + np.arange(places)
        ads = flat[row].numpy()
        at = np.flatnonzero(ads[own] >= 0)
        mine = []
        for upper, lower in zip(at[:-1], at[1:], strict=True):
            swapped = own.copy()
            swapped[[upper, lower]] = own[[lower, upper]]
            mine.append(swapped)
        if len(at):
            other, first = np.unique(ads, return_index=True)  # the creative that the best page with this ad shows
            for entry in first[(other >= 0) & ~np.isin(other, ads[own])]:
                replaced = own.copy()
                replaced[at[-1]] = entry
                mine.append(replaced)
        variants.append(mine)
    most = max(map(len, variants))
    result = torch.zeros(batch, places, dtype=torch.float64)
    if most == 0:
        return result
    entry = np.zeros((batch, most, places), np.int64)
    for row, mine in enumerate(variants):
        if mine:
            entry[row, : len(mine)] = mine
    index = torch.from_numpy(entry).flatten(1)

    def pick(values: Tensor) -> Tensor:
        rows = values.flatten(1, 2)
        return rows[torch.arange(batch).unsqueeze(1), index].unflatten(1, (most, places))

    changed = Pages(pages.score.new_zeros(batch, most), *(pick(values) for name, values in vars(pages).items() if name != "score"))
    worth = _chances(network.reward, memory, changed, features) * _bids(offers, changed)
    for row, mine in enumerate(variants):
        at = torch.nonzero(flat[row, int(best[row]) * places : (int(best[row]) + 1) * places] >= 0).squeeze(1)
        if len(at):
            steps = torch.arange(len(at) - 1)
            result[row, at[:-1]] = worth[row, steps, at[:-1]]
            if len(mine) > len(at) - 1:
                result[row, at[-1]] = worth[row, len(at) - 1 : len(mine), at[-1]].max()
    return result


@torch.no_grad()
def audit(
    network: EgaV2, history: History, catalogue: Catalogue, offers: Offers, features: ItemFeatures, reserve: Tensor, ads: int, factors: tuple[float, ...], config: SearchConfig, losers: int = 0,
    judge: RewardModel | None = None,
) -> Audit:  # fmt: skip
    """Regenerate the pages of requests of one city and day for every trial bid of the displayed ads, at most `ads`, and of `losers` others.

    `reserve` [N], over the median bid. Losers are the ads of other proposed pages, those of likelier pages first.
    """
    parts = []
    for request in range(len(offers.bid)):
        row = slice(request, request + 1)
        memory, own = network.encode(history.rows(row)), ItemFeatures(*(values[row] for values in vars(features).values()))
        truth, page, proposed = shown_pages(network, memory, catalogue, offers.rows(row), own, reserve, config, judge=judge)
        shown, ad, place = page.ad[0, 0], torch.full((ads + losers,), -1), torch.full((ads + losers,), -1)
        at = (shown >= 0).nonzero().squeeze(1)[:ads]
        place[: len(at)], ad[: len(at)] = at, shown[at]
        others = list(dict.fromkeys(proposed.ad[0].flatten().tolist()))
        near = torch.tensor([other for other in others if other >= 0 and other not in set(shown.tolist())][:losers], dtype=torch.int64)
        ad[ads : ads + len(near)] = near
        liar = ad.clamp(min=0)
        value = torch.where(ad >= 0, offers.bid[request, liar], 0.0)
        lie = torch.tensor(factors, dtype=value.dtype) * value.unsqueeze(1)
        liar = liar.repeat_interleave(len(factors))
        tried = torch.where(ad.repeat_interleave(len(factors)) >= 0, lie.flatten(), offers.bid[request, liar])
        pages, moved, _ = shown_pages(network, memory, catalogue, _trials(offers.rows(row), liar, tried, reserve), own, reserve, config, judge=judge)
        here = (moved.ad[:, 0] == liar.unsqueeze(1)) & (ad >= 0).repeat_interleave(len(factors)).unsqueeze(1)
        where = torch.where(here.any(1), here.int().argmax(1), -1).view(len(ad), len(factors))
        parts.append((truth, ad, place, value.float(), lie.float(), Shown(*(values.unflatten(0, (len(ad), len(factors))) for values in vars(pages).values())), where))
    return Audit(
        Shown(*(torch.cat(values) for values in zip(*(vars(part[0]).values() for part in parts), strict=True))), *(torch.stack([part[at] for part in parts]) for at in (1, 2, 3, 4)),
        Shown(*(torch.stack(values) for values in zip(*(vars(part[5]).values() for part in parts), strict=True))), torch.stack([part[6] for part in parts]),
    )  # fmt: skip


def joined(audits: list[Audit]) -> Audit:
    """Audits of several groups of requests as one."""

    def shown(name: str) -> Shown:
        return Shown(*(torch.cat(values) for values in zip(*(vars(getattr(one, name)).values() for one in audits), strict=True)))

    return Audit(shown("truth"), *(torch.cat([getattr(one, name) for one in audits]) for name in ("ad", "place", "value", "trial_bid")), shown("trial"), torch.cat([one.trial_place for one in audits]))


def prices(network: EgaV2, pages: Shown, rule: Rule) -> Tensor:
    """Price per click of every place [..., P]; reserve <= price <= bid, 0 where there is no ad. `implicit` prices need more than the page: `probed`."""
    if rule == "implicit":
        raise ValueError("implicit prices need the page at other bids: see probed")
    if rule == "first_price":
        return pages.bid
    if rule == "learned":
        lead = pages.bid.shape[:-1]
        flat = Shown(*(values.flatten(0, len(lead) - 1) if len(lead) > 1 else values for values in vars(pages).values()))
        return network.payment(flat.state, flat.bid, flat.exposure, flat.reserve, flat.rival / flat.ctr.clamp(min=1e-12), flat.pivot).view(pages.bid.shape)
    if rule != "gsp":
        raise ValueError(f"rule {rule!r} is unknown; use one of {', '.join(RULES)}")
    return torch.minimum(torch.maximum(pages.rival / pages.ctr.clamp(min=1e-12), pages.reserve), pages.bid)


def outcomes(network: EgaV2, found: Audit, rule: Rule, judged: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Expected payment and utility as played, [Q, A] each, 0 for ads not displayed, and the utility of every trial bid [Q, A, G].

    Pages and prices are the reward model's; with `judged` the other judge says how often they are clicked. of `implicit` prices the expectations
    by Myerson's identity (`identity_prices`), which single draws reach wherever the chance of a click does not fall with the bid; where it does, a draw stops at the reserve.
    """
    clicks = (found.truth.judged, found.trial.judged) if judged else (found.truth.ctr, found.trial.ctr)
    shown, at = found.place >= 0, found.place.clamp(min=0)
    there = found.trial_place.clamp(min=0).unsqueeze(-1)
    ctr, trial_ctr = torch.gather(clicks[0], 1, at), torch.gather(clicks[1], -1, there).squeeze(-1)
    if rule == "implicit":
        trial_price, _ = identity_prices(found)
        truth = (found.trial_bid - found.value.unsqueeze(-1)).abs().argmin(-1, keepdim=True)
        price = torch.gather(trial_price, -1, truth).squeeze(-1)
    else:
        price, trial_price = torch.gather(prices(network, found.truth, rule), 1, at), torch.gather(prices(network, found.trial, rule), -1, there).squeeze(-1)
    gained = torch.where(found.trial_place >= 0, (found.value.unsqueeze(-1) - trial_price) * trial_ctr, 0.0)
    return price * ctr * shown, (found.value - price) * ctr * shown, gained


def regret_of(utility: Tensor, gained: Tensor) -> Tensor:
    """[Q, A] what the best trial bid gains over the truth, never below 0."""
    return (gained.amax(-1) - utility).clamp(min=0.0)


@torch.no_grad()
def psi_of(network: EgaV2, found: Audit, rule: Rule) -> dict[str, float]:
    """psi: regret over utility, sums over all displayed ads; `losers`: gains of the others over the same; and revenue a request over the median bid."""
    paid, utility, gained = outcomes(network, found, rule)
    regret, total, shown = regret_of(utility, gained), float(utility.sum()), found.place >= 0
    psi, losers = (float(part.sum()) / total if total > 0 else float("nan") for part in (regret * shown, regret * ~shown))
    return {"psi": psi, "losers": losers, "revenue": float(paid.sum()) / len(found.place)}


def identity_prices(found: Audit) -> tuple[Tensor, Tensor]:
    """Myerson's price per click of every trial bid, and the clicks that it is for: [Q, A, G] each.

    p(b) x(b) = b x(b) - the integral of x from the reserve to b, x being what regeneration gave, straight between the bids that were tried: the expected implicit price, and what
    the payment network learns from.
    """
    there = found.trial_place.clamp(min=0).unsqueeze(-1)
    real = found.trial_place >= 0
    clicks, reserve = (torch.where(real, torch.gather(values, -1, there).squeeze(-1), 0.0) for values in (found.trial.ctr, found.trial.reserve))
    bid = found.trial_bid
    floor = torch.minimum(torch.where(real, reserve, torch.inf).amin(-1, keepdim=True), bid[..., :1])
    first = clicks[..., :1] * (bid[..., :1] - floor)
    steps = (clicks[..., 1:] + clicks[..., :-1]) / 2 * (bid[..., 1:] - bid[..., :-1])
    area = torch.cat([first, first + steps.cumsum(-1)], -1)
    return torch.minimum(torch.maximum(bid - area / clicks.clamp(min=1e-12), reserve), bid), clicks


def train_payment(network: EgaV2, training: Audit, check: Audit, config: PaymentConfig, folder: Path, fingerprint: dict[str, Any], device: Device) -> StageResult:
    """Stage 5: revenue less lambda * regret less rho / 2 * regret^2 (means a request); lambda follows the regret that is left."""
    parameters = network.enter_stage("payment")
    multiplier = torch.tensor(config.multiplier)

    target, clicks = identity_prices(training)
    wanted = (clicks > 0) & (training.ad >= 0).unsqueeze(-1)

    def step(chosen: np.ndarray, _: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        part = torch.from_numpy(chosen)
        mine = training.take(part)
        paid, utility, gained = outcomes(network, mine, "learned")
        regret = regret_of(utility, gained)
        revenue, lost = paid.sum() / len(chosen), regret.sum() / len(chosen)
        price = torch.gather(prices(network, mine.trial, "learned"), -1, mine.trial_place.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        off = (torch.abs(price - target[part]) * clicks[part] * wanted[part]).sum() / len(chosen) / len(config.misreports)
        loss = config.identity_weight * off - revenue + multiplier.clone() * lost + 0.5 * config.rho * lost**2
        with torch.no_grad():
            multiplier.add_(config.rho * lost.detach()).clamp_(max=config.most_multiplier)
        return loss, {"psi": float(regret.detach().sum() / utility.detach().sum().clamp(min=1e-9)), "off": float(off.detach())}

    def validate() -> dict[str, float]:
        found = psi_of(network, check, "learned")
        worst = found["psi"] + found["losers"]
        return {"score": found["revenue"] if worst <= config.psi_target else -worst / config.psi_target, **found}

    return run_stage(
        "payment", network, parameters, config, np.arange(len(training.place)), step, validate, folder, {**fingerprint, "config": asdict(config)}, device, extra_state={"multiplier": multiplier}
    )
