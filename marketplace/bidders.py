"""Learning bidders: advertisers that adapt their bids to what they earn, in a market of separable scores and cascade clicks.

Every advertiser knows its value per click and multiplies it by a number of its own. After a round of requests it looks at what a little
more and a little less would have earned on the same requests, and moves that way. Under truthful prices the best multiplier is 1 whatever
the others do; under generalised second and first prices it is below 1. Nothing is told to the bidders but their own utility.

Shapes: R requests, N ads, K slots, T rounds. Money in currency per click; utility in currency per request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from auction import batch
from auction.critical import step_prices_everywhere
from auction.pacing import pace
from marketplace.click_model import reading_probability

Rule = Literal["critical", "gsp", "first_price"]
RULES: tuple[Rule, ...] = ("critical", "gsp", "first_price")
LOWEST, HIGHEST = 0.05, 2.0
"""Range of a multiplier."""


@dataclass(frozen=True)
class BidderMarket:
    """One city's ads and requests, as the truth has them."""

    value: np.ndarray
    """[N] what a click is worth to the advertiser."""
    probability: np.ndarray
    """[R, N] p: click probability of an ad that is read; also what the platform ranks by."""
    continuation: np.ndarray
    """[R, N] c: probability of reading on past an ad."""
    reserve: np.ndarray
    """[N] least price per click."""
    slots: int
    """K."""

    def take(self, requests: np.ndarray) -> BidderMarket:
        return BidderMarket(self.value, self.probability[requests], self.continuation[requests], self.reserve, self.slots)


@dataclass(frozen=True)
class Chances:
    """What every ad would get in every slot while the others bid as they do, [R, N, K]."""

    theta: np.ndarray
    """Critical bids."""
    ctr: np.ndarray
    """Click probability in the slot, 0 where no bid reaches it."""
    critical: np.ndarray
    """Truthful price; inf where never reached."""
    next_score: np.ndarray
    """p * bid of the ad that would stand below."""


@dataclass(frozen=True)
class Learned:
    """A market of learning bidders over T rounds under one rule."""

    multipliers: np.ndarray
    """[T + 1, N] bid / value before each round and after the last."""
    weight: np.ndarray
    """[N] share of the clicks when all bid their values: whose multiplier matters."""
    revenue: np.ndarray
    """[T] per request."""
    welfare: np.ndarray
    """[T] value of the clicks per request."""
    spent: np.ndarray
    """[N] expected spend of all rounds together, currency."""
    pacing: np.ndarray
    """[N] pacing multiplier after the last round; 1 without a budget."""

    @property
    def mean_multiplier(self) -> np.ndarray:
        """[T + 1], weighted by clicks."""
        return np.asarray(self.multipliers @ self.weight)


def chances(market: BidderMarket, bids: np.ndarray) -> Chances:
    """Slots, click probabilities and prices open to every ad, displayed or not, at any own bid."""
    p = market.probability
    shape = p.shape
    bids_RN = np.broadcast_to(bids, shape)
    eligible = np.broadcast_to((bids >= market.reserve) & (bids > 0), shape)
    found = batch.counterfactuals(p, bids_RN, 0.0, 1.0, market.slots, eligible)
    theta = batch.critical_bids_of_all(p, bids_RN, 0.0, 1.0, found.pages, eligible, barred=np.zeros(shape, bool))

    def down_the_page(pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(reading probability, score) of the slots of pages [R, ..., K]; an empty slot is read past and scores 0."""
        flat = pages.reshape(len(pages), -1)
        reading_on, score = (
            np.where(flat >= 0, np.take_along_axis(values, np.maximum(flat, 0), 1), fill).reshape(pages.shape)
            for values, fill in ((market.continuation, 1.0), (p * bids, 0.0))
        )
        return reading_probability(reading_on), score

    read, score = down_the_page(found.pages)  # a loser's rivals are those displayed
    read_RNK, next_RNK = (np.repeat(values[:, None], shape[1], 1) for values in (read, score))
    request, slot = np.nonzero(found.pages >= 0)
    own = found.pages[request, slot]
    read, score = down_the_page(found.without)  # a displayed ad's rivals are those of the page without it
    read_RNK[request, own], next_RNK[request, own] = read[request, slot], score[request, slot]
    ctr = np.where(np.isfinite(theta) | (theta == -np.inf), p[:, :, None] * read_RNK, 0.0)
    floor = np.broadcast_to(market.reserve, shape)
    return Chances(theta, ctr, step_prices_everywhere(np.maximum(theta, 0.0), ctr, floor), next_RNK)


def outcomes(market: BidderMarket, open_to: Chances, bids: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and price per click [R, N] of every ad for own bids [N], the others' as they were when `open_to` was computed."""
    slot = (open_to.theta >= bids[None, :, None]).sum(-1)
    won = (slot < market.slots) & (bids >= market.reserve) & (bids > 0)
    at = np.minimum(slot, market.slots - 1)[..., None]
    ctr, critical, following = (np.take_along_axis(values, at, -1)[..., 0] for values in (open_to.ctr, open_to.critical, open_to.next_score))
    if rule == "critical":
        price = np.where(np.isfinite(critical), critical, 0.0)
    elif rule == "gsp":
        price = np.maximum(following / np.maximum(market.probability, 1e-300), market.reserve)
    elif rule == "first_price":
        price = np.broadcast_to(bids, ctr.shape)
    else:
        raise ValueError(f"rule {rule!r} is unknown; use one of {', '.join(RULES)}")
    return np.where(won, ctr, 0.0), np.where(won, np.minimum(price, bids), 0.0)


def learn(
    market: BidderMarket, rule: Rule, rounds: int = 150, requests: int = 64, step: float = 0.2, start: float = 0.6, seed: int = 0, learns: np.ndarray | None = None,
    budget: np.ndarray | None = None,
) -> Learned:  # fmt: skip
    """Let bidders adapt for some rounds of `requests` random requests each.

    step: first relative change that a bidder tries; it falls with the square root of time. start: multiplier before the first
    round. learns [N]: who adapts; the others bid their values (default: all adapt). budget [N]: expected spend allowed over all rounds,
    inf: no limit; bids are paced to it and an ad whose money is spent is out.
    """
    rng = np.random.default_rng(seed)
    adapts = np.ones(len(market.value), bool) if learns is None else np.asarray(learns, bool)
    multiplier = np.where(adapts, start, 1.0)
    limit = np.full(len(market.value), np.inf) if budget is None else np.asarray(budget, np.float64)
    pacing, spent = np.ones(len(limit)), np.zeros(len(limit))
    history, revenue, welfare = [multiplier], [], []
    for time in range(rounds):
        today = market.take(rng.integers(0, len(market.probability), requests))
        allowed = pacing * (spent < limit)
        open_to = chances(today, allowed * multiplier * market.value)
        factor = 1.0 + step / np.sqrt(1.0 + 0.1 * time)
        tried = np.stack([multiplier, multiplier / factor, multiplier * factor]).clip(LOWEST, HIGHEST)
        utility = np.zeros(tried.shape)
        for row, own in enumerate(tried):
            clicks, price = outcomes(today, open_to, allowed * own * market.value, rule)
            utility[row] = ((market.value - price) * clicks).mean(0)
            if row == 0:
                revenue.append(float((price * clicks).sum(1).mean()))
                welfare.append(float((market.value * clicks).sum(1).mean()))
                spent = spent + (price * clicks).sum(0)
        gain = utility - utility[0]
        best = np.where(gain.max(0) > 1e-12 * market.value, gain.argmax(0), 0)  # nothing to gain: nobody moves
        multiplier = np.where(adapts, tried[best, np.arange(len(best))], 1.0)
        history.append(multiplier)
        pacing = pace(pacing, spent, limit, (time + 1) / rounds)
    clicks, _ = outcomes(market, chances(market, market.value), market.value, "critical")
    total = clicks.sum(0)
    return Learned(np.stack(history), total / max(float(total.sum()), 1e-300), np.array(revenue), np.array(welfare), spent, pacing)
