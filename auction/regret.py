"""Ex-post regret, exactly: what an ad could gain by lying about its value, with the page generated again under every lie.

Utility of an ad = (value - price) * CTR when displayed, else 0. A rule whose price rate does not read the own bid makes utility a step
function of that bid, with steps at the critical bids: one evaluation in each of the K + 1 intervals between them is exact, for winners and
losers. A rule that reads the own bid (first price, payment networks) needs a search inside every interval as well (`search_points`). Every
misreport is really run through the rule, so a reported regret is never an overestimate.

Shapes: N candidate ads, K slots, A audited ads, M runs of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from auction import batch as batched
from auction.checks import AuctionInputError, Bools, Floats, Ints, as_floats, as_mask, as_reserves, check_range
from auction.classic import vcg_prices

PAPER_GRID: tuple[float, ...] = tuple(j / 5 for j in range(1, 11))
"""gamma, misreports as multiples of the bid in EGA-V1's metric: 0.2, 0.4, .. 2.0."""

_ROWS_PER_RUN = 1024
"""Misreports evaluated at once; bounds memory."""


class Outcome(NamedTuple):
    """What a rule answers: the page, its prices per click and the CTR of its ads. [K'] each, or [M, K] with pages padded by -1."""

    page: Any
    price: Any
    ctr: Any


class Rule(Protocol):
    """Allocation and payment as one function: bids [N] -> Outcome (or a plain tuple of its three arrays).

    A rule may also have `batch(bids [M, N]) -> Outcome of [M, K]` (much faster), `thresholds(bids [N]) -> [N, K]`, the critical bids of
    every ad, and `price_ignores_own_bid`. Without them the rule is called once per misreport, thresholds are found by bisection on the own
    slot, and every interval is searched.
    """

    def __call__(self, bids: Floats, /) -> Any: ...


@dataclass(frozen=True)
class Regret:
    """Regret of the audited ads of one request, [A] each. Money in currency per request (utility = (value - price) * CTR)."""

    ads: Ints
    """Row of the ad."""
    slot: Ints
    """Slot held with the bids as played; -1 for a loser."""
    value: Floats
    """Value per click."""
    bid: Floats
    """Bid as played (the truthful one, when bids = values)."""
    utility: Floats
    """With the bids as played."""
    best_utility: Floats
    """With the best misreport found."""
    best_bid: Floats
    """That misreport."""
    gain: Floats
    """best_utility - utility, >= 0: the ex-post regret."""
    grid_gain: Floats
    """The gain that the paper's grid of misreports finds; never above `gain`."""

    @property
    def winner(self) -> Bools:
        return np.asarray(self.slot >= 0, dtype=np.bool_)

    @property
    def psi(self) -> Psi:
        return psi([self])

    @property
    def psi_exact(self) -> float:
        return self.psi.psi_exact

    @property
    def psi_loser(self) -> float:
        return self.psi.psi_loser

    @property
    def psi_paper(self) -> float:
        return self.psi.psi_paper

    def explain(self) -> str:
        """The most profitable lie, in words."""
        if len(self.ads) == 0 or float(self.gain.max()) <= 0.0:
            return f"none of {len(self.ads)} ads gains by misreporting its bid"
        worst = int(np.argmax(self.gain))
        place = f"shown in slot {int(self.slot[worst])}" if self.slot[worst] >= 0 else "not shown"
        verb = "overbidding" if self.best_bid[worst] > self.bid[worst] else "shading"
        return (
            f"ad in row {int(self.ads[worst])} ({place}) gains {self.gain[worst]:.6g} per request by {verb}: bid {self.best_bid[worst]:.6g} instead of "
            f"{self.bid[worst]:.6g}, utility {self.best_utility[worst]:.6g} instead of {self.utility[worst]:.6g}"
        )


@dataclass(frozen=True)
class Psi:
    """Regret relative to utility, over any number of requests; always shown side by side."""

    psi_exact: float
    """Sum of displayed ads' regret / sum of their utility; the headline. inf when utility is 0 and regret is not."""
    psi_loser: float
    """Sum of the gains of ads that are not displayed / sum of the displayed ads' utility."""
    psi_paper: float
    """EGA-V1's metric: mean over displayed ads of grid regret / utility; coarse, winners only. Ads without utility are left out."""
    displayed: int
    """Displayed ads counted."""
    losers: int
    """Other ads counted."""
    without_utility: int
    """Displayed ads left out of psi_paper because their utility is not positive."""


def psi(regrets: Iterable[Regret]) -> Psi:
    """Psi over requests: ratios of sums (exact, loser) and the paper's mean of ratios."""
    rows = list(regrets)
    if not rows:
        raise AuctionInputError("psi needs the regret of at least one request")
    winner = np.concatenate([row.winner for row in rows])
    gain, grid, utility = (np.concatenate([getattr(row, name) for row in rows]) for name in ("gain", "grid_gain", "utility"))
    total = float(utility[winner].sum())
    rated = winner & (utility > 0.0)
    return Psi(
        psi_exact=_ratio(float(gain[winner].sum()), total),
        psi_loser=_ratio(float(gain[~winner].sum()), total),
        psi_paper=float((grid[rated] / utility[rated]).mean()) if rated.any() else _ratio(float(grid[winner].sum()), 0.0),
        displayed=int(winner.sum()),
        losers=int((~winner).sum()),
        without_utility=int((winner & ~rated).sum()),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else (float("inf") if part > 0.0 else 0.0)


def exact_regret(
    rule: Rule,
    values: Any,
    bids: Any,
    *,
    thresholds: Any = None,
    ads: Any = None,
    search_points: int | None = None,
    refinements: int = 2,
    max_bid: float | None = None,
    gammas: Sequence[float] = PAPER_GRID,
) -> Regret:
    """Ex-post regret of every audited ad: its best utility over own misreports minus its utility with the bids as played.

    Args:
        rule: see Rule; called with bids in which one ad misreports, it must generate the page again.
        values [N]: value per click. bids [N]: bids as played; truthful regret is bids = values.
        thresholds [A, K] (or [N, K]): critical bids of the audited ads; default: asked of the rule, else found by bisection.
        ads [A]: rows to audit; default all N, losers included.
        search_points: misreports tried in each interval between thresholds. Default: 1 (exact) when the rule says
            `price_ignores_own_bid`, else 9, from the lowest to the highest bid of the interval. GSP is such a rule too: its cap at the bid
            reads it wherever the page is not sorted by pctr * bid. refinements: rounds of as many points around the best one.
        max_bid: highest misreport; default twice the highest of bids, values and finite thresholds.
        gammas: the paper's grid; its misreports are tried as well, so `gain` is never below `grid_gain`.
    """
    values_N = as_floats("values", values, (None,), 0.0)
    bids_N = as_floats("bids", bids, values_N.shape, 0.0)
    ads_A = np.arange(len(bids_N)) if ads is None else np.asarray(ads, dtype=np.int64).reshape(-1)
    if ads_A.size and (ads_A.min() < 0 or ads_A.max() >= len(bids_N)):
        raise AuctionInputError(f"ads must be rows in [0, {len(bids_N)}), got {ads_A.tolist()}")
    points = (1 if getattr(rule, "price_ignores_own_bid", False) else 9) if search_points is None else search_points
    if points < 1 or refinements < 0:
        raise AuctionInputError(f"search_points must be >= 1 and refinements >= 0, got {points}, {refinements}")
    run = _Runner(rule, values_N, bids_N)
    slot, utility = run.as_played(ads_A)

    top = 2.0 * max(float(bids_N.max(initial=0.0)), float(values_N.max(initial=0.0))) if max_bid is None else float(max_bid)
    steps = _thresholds_of(rule, thresholds, ads_A, bids_N, run, top)
    if max_bid is None:
        top = max(top, 2.0 * float(np.where(np.isfinite(steps), steps, 0.0).max(initial=0.0)))
    check_range("max_bid", np.asarray(top), 0.0)

    trials = _trial_bids(steps, top, points)
    grid = bids_N[ads_A][:, None] * np.asarray(gammas, dtype=np.float64)
    own = np.stack([bids_N[ads_A], values_N[ads_A]], axis=1)
    tried = np.concatenate([trials, grid, own], axis=1)
    gained = run.utilities(ads_A, tried)
    grid_best = gained[:, trials.shape[1] : trials.shape[1] + grid.shape[1]].max(axis=1, initial=-np.inf)
    for _ in range(refinements if points > 1 else 0):
        finer = _around_best(tried, gained, points)
        tried = np.concatenate([tried, finer], axis=1)
        gained = np.concatenate([gained, run.utilities(ads_A, finer)], axis=1)
    best = gained.argmax(axis=1)
    pick = np.arange(len(ads_A))
    improved = gained[pick, best] > utility if len(ads_A) else np.zeros(0, dtype=np.bool_)
    best_utility = np.where(improved, gained[pick, best], utility)
    return Regret(
        ads=ads_A,
        slot=slot,
        value=values_N[ads_A],
        bid=bids_N[ads_A],
        utility=utility,
        best_utility=best_utility,
        best_bid=np.where(improved, tried[pick, best], bids_N[ads_A]),
        gain=best_utility - utility,
        grid_gain=np.maximum(grid_best - utility, 0.0),
    )


class _Runner:
    """Runs a rule on bids with one misreport each and reads off slot and utility of the ad that misreports."""

    def __init__(self, rule: Rule, values: Floats, bids: Floats) -> None:
        self._rule, self._values, self._bids = rule, values, bids

    def _outcomes(self, bids_MN: Floats) -> tuple[Ints, Floats]:
        """Pages [M, K] (-1 padded) and (price, ctr) [2, M, K] of M bid vectors."""
        answer = getattr(self._rule, "batch", None)
        if answer is not None:
            page, price, ctr = answer(bids_MN)
            pages = np.asarray(page, dtype=np.int64)
            money = np.stack([np.asarray(price, dtype=np.float64), np.asarray(ctr, dtype=np.float64)])
        else:
            single = [self._rule(bids) for bids in bids_MN]
            longest = max((len(page) for page, _, _ in single), default=0)
            pages = np.full((len(single), longest), -1, dtype=np.int64)
            money = np.zeros((2, len(single), longest))
            for row, (page, price, ctr) in enumerate(single):
                pages[row, : len(page)], money[0, row, : len(page)], money[1, row, : len(page)] = page, price, ctr
        shown = pages >= 0
        money = np.where(shown, money, 0.0)
        check_range("price and ctr of the rule", money, 0.0)
        return pages, money

    def _read(self, ads: Ints, bids_MN: Floats) -> tuple[Ints, Floats]:
        pages, (price, ctr) = self._outcomes(bids_MN)
        here = pages == ads[:, None]
        shown = here.any(axis=1)
        slot = np.where(shown, here.argmax(axis=1) if here.shape[1] else 0, -1)
        gain = np.where(here, (self._values[ads][:, None] - price) * ctr, 0.0).sum(axis=1)
        return slot, gain

    def as_played(self, ads: Ints) -> tuple[Ints, Floats]:
        pages, (price, ctr) = self._outcomes(self._bids[None])
        here = pages[0][None, :] == ads[:, None]
        slot = np.where(here.any(axis=1), here.argmax(axis=1) if here.shape[1] else 0, -1)
        return slot, np.where(here, (self._values[ads][:, None] - price[0]) * ctr[0], 0.0).sum(axis=1)

    def run(self, ads: Ints, own_bids: Floats) -> tuple[Ints, Floats]:
        """Slot and utility [A, T] of every audited ad at every misreport [A, T]."""
        who, bid = np.repeat(ads, own_bids.shape[1]), own_bids.ravel()
        slots, gains = np.full(len(who), -1, dtype=np.int64), np.zeros(len(who))
        for start in range(0, len(who), _ROWS_PER_RUN):
            part = slice(start, start + _ROWS_PER_RUN)
            market = np.repeat(self._bids[None], len(who[part]), axis=0)
            market[np.arange(len(market)), who[part]] = bid[part]
            slots[part], gains[part] = self._read(who[part], market)
        return slots.reshape(own_bids.shape), gains.reshape(own_bids.shape)

    def utilities(self, ads: Ints, own_bids: Floats) -> Floats:
        return self.run(ads, own_bids)[1]

    def bisect(self, ads: Ints, n_slots: int, top: float) -> Floats:
        """Critical bids [A, K] up to `top`, from the own slot's monotonicity in the own bid; +inf where `top` does not win the slot."""
        wanted = np.arange(n_slots)

        def wins(bid: Floats) -> Bools:
            slot, _ = self.run(ads, bid)
            return np.asarray((slot >= 0) & (slot <= wanted), dtype=np.bool_)

        lose, win = np.zeros((len(ads), n_slots)), np.full((len(ads), n_slots), top)
        never, always = ~wins(win), wins(lose)
        for _ in range(52):
            middle = 0.5 * (lose + win)
            above = wins(middle)
            win, lose = np.where(above, middle, win), np.where(above, lose, middle)
        return np.where(never, np.inf, np.where(always, 0.0, win))


def _thresholds_of(rule: Rule, thresholds: Any, ads: Ints, bids: Floats, run: _Runner, top: float) -> Floats:
    if thresholds is None and hasattr(rule, "thresholds"):
        thresholds = rule.thresholds(bids)
    if thresholds is None:
        n_slots = run._outcomes(bids[None])[0].shape[1]
        return run.bisect(ads, n_slots, top)
    steps = np.asarray(thresholds, dtype=np.float64)
    if steps.ndim == 2 and len(steps) == len(bids) and len(ads) != len(bids):
        steps = steps[ads]
    if steps.ndim != 2 or len(steps) != len(ads) or np.isnan(steps).any():
        raise AuctionInputError(f"thresholds must be [{len(ads)}, K] or [{len(bids)}, K] without NaN, got shape {steps.shape}")
    return steps


def _trial_bids(steps: Floats, top: float, points: int) -> Floats:
    """Misreports inside every interval between the thresholds, [A, (K + 1) * points]; one point is the middle, more reach near both ends."""
    edges = np.sort(np.clip(np.concatenate([np.zeros((len(steps), 1)), steps, np.full((len(steps), 1), top)], axis=1), 0.0, top), axis=1)
    inside = np.array([0.5]) if points == 1 else np.linspace(1e-7, 1.0 - 1e-7, points)
    return np.asarray((edges[:, :-1, None] + (edges[:, 1:] - edges[:, :-1])[:, :, None] * inside).reshape(len(steps), -1))


def _around_best(tried: Floats, gained: Floats, points: int) -> Floats:
    """New misreports [A, points] between the neighbours of the best one so far."""
    order = np.argsort(tried, axis=1)
    sorted_bids = np.take_along_axis(tried, order, axis=1)
    at = np.take_along_axis(gained, order, axis=1).argmax(axis=1)
    pick = np.arange(len(tried))
    low, high = sorted_bids[pick, np.maximum(at - 1, 0)], sorted_bids[pick, np.minimum(at + 1, tried.shape[1] - 1)]
    return np.asarray(low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, points + 2)[1:-1])


PriceRule = Callable[[Floats, batched.Counterfactuals, Floats], Any]
"""(bids [M, N], counterfactuals, ctr [M, K, K] of every displayed ad in its own and every lower slot) -> prices [M, K]."""


@dataclass(frozen=True)
class GreedyRule:
    """The greedy page with a pricing mode, as a Rule for exact_regret: one request, any bids.

    `price_ctr` is the CTR model that prices, `utility_ctr` the one that utility is measured with (default the same): the evaluator for
    both, or the evaluator to price and the market's truth to judge. Both map pages [P, K] (-1 padded) to CTRs [P, K] and never see a bid.
    """

    pctr: Floats
    """[N] in [0, 1]."""
    affinity: Any
    """[N, K], or 0.0."""
    bid_weight: Any
    """e^w, or slopes [N, K]."""
    n_slots: int
    """K, slots of the page."""
    price_ctr: Callable[[Ints], Any]
    """CTR model that the critical price uses."""
    mode: str | PriceRule = "critical"
    """critical, gsp, first_price, vcg, or a function that prices."""
    utility_ctr: Callable[[Ints], Any] | None = None
    """CTR model of the utilities; None: price_ctr."""
    reserve: Any = 0.0
    """Scalar or [N]; an ad below it takes no part."""
    eligible: Any = None
    """[N] bool or None."""
    tie_key: Any = None
    """[N] integers or None."""
    slot_ctr: Any = None
    """[K] clicks of the positions, for mode vcg."""

    def __call__(self, bids: Floats, /) -> Outcome:
        page, price, ctr = self.batch(np.asarray(bids, dtype=np.float64)[None])
        shown = page[0] >= 0
        return Outcome(page[0][shown], price[0][shown], ctr[0][shown])

    @property
    def price_ignores_own_bid(self) -> bool:
        """Whether the price is constant while the own slot is: true of critical prices only (GSP and VCG are capped at the bid)."""
        return self.mode == "critical"

    def _market(self, bids_MN: Floats) -> tuple[Floats, Any, Any, Bools]:
        shape = (bids_MN.shape[0], bids_MN.shape[1])

        def spread(array: Any) -> Any:
            array = np.asarray(array, dtype=np.float64)
            return np.broadcast_to(array, (shape[0], *array.shape)) if array.ndim else array

        mask = as_mask("eligible", self.eligible, shape[1:]) & (bids_MN >= as_reserves(self.reserve, shape[1]))
        return np.broadcast_to(self.pctr, shape), spread(self.affinity), spread(self.bid_weight), mask

    def batch(self, bids: Floats) -> Outcome:
        """Outcome [M, K] of M bid vectors [M, N]."""
        bids_MN = as_floats("bids", bids, (None, len(self.pctr)), 0.0)
        pctr_MN, affinity, slopes, eligible = self._market(bids_MN)
        market = batched.counterfactuals(pctr_MN, bids_MN, affinity, slopes, self.n_slots, eligible, self.tie_key)
        pages = market.pages
        reserve = batched.at_page(as_reserves(self.reserve, len(self.pctr)), pages)
        own_bids = batched.at_page(bids_MN, pages)
        if self.mode == "first_price":
            price = own_bids
        elif self.mode == "gsp":
            runner_up = batched.runner_up_scores(pctr_MN, bids_MN, pages, eligible)
            price = batched.gsp_prices(batched.at_page(pctr_MN, pages), own_bids, runner_up, reserve)
        elif self.mode == "vcg":
            price = self._vcg(bids_MN, pages, eligible)
        elif self.mode == "critical":
            price, _ = batched.critical_prices(market.theta, self._own_ctr(market), pages, own_bids, reserve)
        elif callable(self.mode):
            price = as_floats("prices", self.mode(bids_MN, market, self._own_ctr(market)), pages.shape, 0.0)
        else:
            raise AuctionInputError(f"mode must be critical, gsp, first_price, vcg or a function, got {self.mode!r}")
        clicks = np.asarray((self.utility_ctr or self.price_ctr)(pages), dtype=np.float64)
        return Outcome(pages, price, np.where(pages >= 0, clicks, 0.0))

    def _vcg(self, bids_MN: Floats, pages: Ints, eligible: Bools) -> Floats:
        if self.slot_ctr is None:
            raise AuctionInputError("mode vcg needs slot_ctr, the clicks of the positions")
        price = np.zeros(pages.shape)
        for row, page in enumerate(pages):
            shown = page >= 0
            price[row, shown] = vcg_prices(self.pctr, bids_MN[row], page[shown], self.slot_ctr, self.reserve, eligible=eligible[row])
        return price

    def _own_ctr(self, market: batched.Counterfactuals) -> Floats:
        """CTR of every displayed ad in its own and every lower slot, [M, K, K]; 0 elsewhere."""
        n_runs, n_slots = market.pages.shape
        lower = np.triu(np.ones((n_slots, n_slots), dtype=np.bool_))[None] & (market.moved[:, :, :, 0] >= 0)
        run, ad, slot = np.nonzero(lower)
        clicks = np.asarray(self.price_ctr(market.moved[run, ad, slot]), dtype=np.float64)
        ctr = np.zeros((n_runs, n_slots, n_slots))
        ctr[run, ad, slot] = clicks[np.arange(len(run)), slot]
        return ctr

    def thresholds(self, bids: Floats) -> Floats:
        """Critical bids [N, K] of every ad, reserves included."""
        bids_1N = as_floats("bids", bids, (len(self.pctr),), 0.0)[None]
        pctr, affinity, slopes, eligible = self._market(bids_1N)
        barred = ~as_mask("eligible", self.eligible, self.pctr.shape)[None]
        pages = batched.greedy_pages(pctr, bids_1N, affinity, slopes, self.n_slots, eligible, self.tie_key)
        theta: Floats = batched.critical_bids_of_all(pctr, bids_1N, affinity, slopes, pages, eligible, self.tie_key, barred)[0]
        return np.maximum(theta, as_reserves(self.reserve, len(self.pctr))[:, None])
