"""Every rule again in plain loops that mirror the text: slow, obvious, and what the fast versions are tested against.

Inputs are those of the fast functions, taken as valid. Scores are compared after `auction.ties.quantise`, as the rule says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from auction.ties import quantise


def _entry(array: Any, ad: int, slot: int) -> float:
    values = np.asarray(array, dtype=np.float64)
    return float(values[ad, slot]) if values.ndim else float(values)


def _score(pctr: Any, bids: Any, affinity: Any, bid_weight: Any, ad: int, slot: int) -> float:
    return _entry(bid_weight, ad, slot) * (float(pctr[ad]) * float(bids[ad])) + _entry(affinity, ad, slot)


def _ranks(pctr: Any, bids: Any, affinity: Any, bid_weight: Any, n_slots: int) -> list[list[float]]:
    scores = [[_score(pctr, bids, affinity, bid_weight, ad, slot) for slot in range(n_slots)] for ad in range(len(pctr))]
    ranks: list[list[float]] = quantise(np.array(scores)).tolist()
    return ranks


def reference_greedy_allocation(
    pctr: Any, bids: Any, affinity: Any, bid_weight: Any, n_slots: int, eligible: Any = None, tie_key: Any = None, forced: tuple[int, int] | None = None
) -> list[int]:
    """Slot by slot, the best score among the ads not placed. `forced` (ad, slot) gives that slot to that ad and no other slot."""
    ranks = _ranks(pctr, bids, affinity, bid_weight, n_slots)
    page: list[int] = []
    for slot in range(n_slots):
        if forced is not None and forced[1] == slot:
            page.append(forced[0])
            continue
        best: tuple[float, int, int] | None = None
        for ad in range(len(pctr)):
            if ad in page or (eligible is not None and not eligible[ad]) or (forced is not None and forced[0] == ad):
                continue
            key = int(tie_key[ad]) if tie_key is not None else ad
            offer = (-ranks[ad][slot], key, ad)
            if best is None or offer < best:
                best = offer
        if best is None:
            break
        page.append(best[2])
    return page


def reference_critical_prices(
    pctr: Any,
    bids: Any,
    affinity: Any,
    bid_weight: Any,
    page: Sequence[int],
    page_ctr: Callable[[Any], Any],
    reserve: Any = 0.0,
    eligible: Any = None,
    tie_key: Any = None,
) -> tuple[list[float], list[list[float]]]:
    """Exact prices and critical bids of the displayed ads, one counterfactual run at a time over all ads. pCTR > 0 only."""
    floors = np.broadcast_to(np.asarray(reserve, dtype=np.float64), (len(pctr),))
    allowed = [bool(bids[ad] >= floors[ad]) and (eligible is None or bool(eligible[ad])) for ad in range(len(pctr))]
    prices, thetas = [], []
    for own_slot, ad in enumerate(page):
        others = [allowed[other] and other != ad for other in range(len(pctr))]
        without = reference_greedy_allocation(pctr, bids, affinity, bid_weight, len(page), others, tie_key)
        theta: list[float] = []
        for slot in range(len(page)):
            rival = _score(pctr, bids, affinity, bid_weight, without[slot], slot) if slot < len(without) else -np.inf
            tau = (rival - _entry(affinity, ad, slot)) / (_entry(bid_weight, ad, slot) * float(pctr[ad]))
            theta.append(min([tau, *theta[-1:]]))
        steps = []  # (least bid, clicks) of the own slot and the reachable ones below it
        for slot in range(own_slot, len(page)):
            above = max(theta[slot - 1], floors[ad]) if slot > 0 else np.inf
            least = max(theta[slot], floors[ad])
            if slot == own_slot or least < above * (1.0 - 1e-9):
                shown = reference_greedy_allocation(pctr, bids, affinity, bid_weight, len(page), allowed, tie_key, forced=(ad, slot))
                steps.append((least, float(page_ctr(np.array(shown))[slot])))
        hull = [max(clicks for _, clicks in steps[step:]) for step in range(len(steps))] + [0.0]
        paid = sum(least * (hull[step] - hull[step + 1]) for step, (least, _) in enumerate(steps) if hull[step] > hull[step + 1])
        exact = paid / hull[0] if hull[0] > 0.0 else min(least for least, _ in steps)
        prices.append(min(exact, float(bids[ad])))
        thetas.append(theta)
    return prices, thetas


def reference_gsp_prices(pctr: Any, bids: Any, page: Sequence[int], reserve: Any = 0.0) -> list[float]:
    """Score of the next ad over the own pCTR, within [reserve, bid]. pCTR > 0 only."""
    floors = np.broadcast_to(np.asarray(reserve, dtype=np.float64), (len(pctr),))
    prices = []
    for slot, ad in enumerate(page):
        if slot + 1 < len(page):
            following = pctr[page[slot + 1]] * bids[page[slot + 1]]
        else:
            following = max((pctr[i] * bids[i] for i in range(len(pctr)) if i not in page and bids[i] >= floors[i]), default=0.0)
        prices.append(float(min(bids[ad], max(floors[ad], following / pctr[ad]))))
    return prices


def reference_vcg_positions(bids: Sequence[float], slot_ctr: Sequence[float]) -> list[float]:
    """VCG by its definition: each bidder pays the welfare that the others lose by its presence, found over all assignments."""

    def best(present: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        count = min(len(present), len(slot_ctr))
        return max(
            ((sum(bids[i] * slot_ctr[k] for k, i in enumerate(order)), order) for order in itertools.permutations(present, count)), key=lambda pair: pair[0]
        )

    everyone = sorted(range(len(bids)), key=lambda i: -bids[i])
    welfare, order = best(everyone)
    prices = []
    for slot, bidder in enumerate(order):
        without, _ = best([i for i in everyone if i != bidder])
        owed = without - (welfare - bids[bidder] * slot_ctr[slot])
        prices.append(owed / slot_ctr[slot] if slot_ctr[slot] > 0.0 else 0.0)
    return prices + [0.0] * (len(slot_ctr) - len(prices))


def reference_regret(rule: Callable[[Any], Any], values: Any, bids: Any, ad: int, misreports: Sequence[float]) -> float:
    """Best gain of one ad over the given misreports, one run of the rule each."""

    def utility(bid: float) -> float:
        played = np.array(bids, dtype=np.float64)
        played[ad] = bid
        page, price, ctr = rule(played)
        return next(((float(values[ad]) - float(price[k])) * float(ctr[k]) for k, row in enumerate(page) if row == ad), 0.0)

    return max(0.0, max(utility(bid) for bid in misreports) - utility(float(bids[ad])))
