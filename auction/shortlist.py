"""The engine under allocation and prices: for every slot only the top K + 1 ads can matter, so everything runs on those few.

Why K + 1 is enough: when slot k is filled, at most k <= K - 1 ads are placed, and a counterfactual run bars one more; of the top
K + 1 ads of the slot at least one is free, and the best free one is among them. That holds for the page itself, for the page
without a given winner, and for the page with that winner put into another slot.

Shapes: B requests, N candidate ads, K slots, M shortlisted ads, W walkers (runs of the greedy rule on one request).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from auction.checks import AuctionInputError, Bools, Floats, Ints, as_floats, as_mask, check_range
from auction.ties import quantise

_BLOCK = 512
"""Ads per block of the pre-filter."""


@dataclass(frozen=True)
class Shortlist:
    """What the greedy rule needs of B requests. Rows are in tie order, so the first maximum is the winner of a tie."""

    rows: Ints
    """[B, M] row of the ad among the N candidates; an ad may stand twice."""
    pctr: Floats
    """[B, M]"""
    slopes: Floats
    """[B, M, K] weight of pctr * bid in the score."""
    affinity: Floats
    """[B, M, K]"""
    scores: Floats
    """[B, M, K], exact; -inf where the ad may not be shown."""
    ranks: Floats
    """[B, M, K] scores quantised for comparison."""


def positive_slots(n_slots: int) -> int:
    """`n_slots` as an int >= 1."""
    if isinstance(n_slots, bool) or int(n_slots) != n_slots or n_slots < 1:
        raise AuctionInputError(f"n_slots must be a whole number >= 1, got {n_slots!r}")
    return int(n_slots)


def as_affinity(affinity: Any, shape: tuple[int, ...], n_slots: int) -> Floats:
    """[..., N, >= n_slots] cut to n_slots, or a scalar; finite."""
    array = np.asarray(affinity, dtype=np.float64)
    if array.ndim:
        if array.ndim != len(shape) + 1 or array.shape[:-1] != shape or array.shape[-1] < n_slots:
            raise AuctionInputError(f"affinity must be a scalar or have shape {(*shape, n_slots)} (or more slots), got {array.shape}")
        array = array[..., :n_slots]
    check_range("affinity", array)
    return array


def as_slopes(name: str, slopes: Any, shape: tuple[int, ...], n_slots: int) -> Floats:
    """A scalar, one number per request ([B] when shape is (B, N)) or [..., N, >= n_slots] cut to n_slots; finite and > 0."""
    array = np.asarray(slopes, dtype=np.float64)
    if array.ndim == len(shape) + 1 and array.shape[:-1] == shape and array.shape[-1] >= n_slots:
        array = array[..., :n_slots]
    elif array.ndim and not (len(shape) == 2 and array.shape == shape[:1]):
        per_request = "" if len(shape) == 1 else f", one number per request ({shape[0]},)"
        raise AuctionInputError(f"{name} must be a scalar{per_request} or have shape {(*shape, n_slots)} (or more slots), got {array.shape}")
    check_range(name, array, minimum=0.0)
    if array.size and float(array.min()) <= 0.0:
        raise AuctionInputError(f"{name} must be > 0, got {float(array.min())!r}: with no weight on the bid there is no auction")
    return array


def _column(array: Floats, slot: int) -> Floats:
    """Entries of one slot, broadcastable to [B, N]."""
    if array.ndim == 3:
        return array[:, :, slot]
    return array[:, None] if array.ndim == 1 else array


def _gather(array: Floats, rows: Ints, n_slots: int) -> Floats:
    """[B, M, K] entries of the shortlisted rows."""
    if array.ndim == 3:
        return np.take_along_axis(array, rows[:, :, None], axis=1)
    return np.broadcast_to(array[:, None, None] if array.ndim == 1 else array, (*rows.shape, n_slots))


def as_tie_keys(tie_key: Any, shape: tuple[int, int]) -> npt.NDArray[Any] | None:
    """[N] or [B, N] integer keys as [B, N]; None (ties go by row) stays None."""
    if tie_key is None:
        return None
    keys = np.asarray(tie_key)
    if not np.issubdtype(keys.dtype, np.integer) or keys.shape not in (shape, shape[1:]):
        raise AuctionInputError(f"tie_key must be integer of shape {shape[1:]} or {shape}, got {keys.dtype} of shape {keys.shape}")
    return np.broadcast_to(keys, shape)


def _top_rows(ranks: Floats, keys: npt.NDArray[Any] | None, count: int) -> Ints:
    """[B, count] rows of the best `count` ads by (rank, lower key, lower row)."""
    n_ads = ranks.shape[1]
    if count >= n_ads:
        return np.broadcast_to(np.arange(n_ads, dtype=np.int64), ranks.shape)
    top = np.argpartition(ranks, n_ads - count, axis=1)[:, n_ads - count :]
    edge = np.take_along_axis(ranks, top, axis=1).min(axis=1, keepdims=True)
    contested = ((ranks >= edge).sum(axis=1) > count) & (edge[:, 0] > -np.inf)
    for request in np.flatnonzero(contested):  # a tie at the edge: argpartition chose by accident
        order = (-ranks[request],) if keys is None else (keys[request], -ranks[request])
        top[request] = np.lexsort(order)[:count]
    return top


def build_shortlist(pctr: Any, bids: Any, affinity: Any, slopes: Any, n_slots: int, eligible: Any, tie_key: Any) -> Shortlist:
    """Check the inputs of B requests ([B, N] and so on) and keep the ads that can matter."""
    n_slots = positive_slots(n_slots)
    pctr_BN = as_floats("pctr", pctr, (None, None), 0.0, 1.0)
    shape = (pctr_BN.shape[0], pctr_BN.shape[1])
    bids_BN = as_floats("bids", bids, shape, 0.0)
    affinity_BNK = as_affinity(affinity, shape, n_slots)
    slopes_BNK = as_slopes("bid_weight", slopes, shape, n_slots)
    eligible_BN = as_mask("eligible", eligible, shape)
    keys = as_tie_keys(tie_key, shape)

    value = pctr_BN * bids_BN
    columns = n_slots if affinity_BNK.ndim == 3 or slopes_BNK.ndim == 3 else 1  # without slot terms all slots rank alike
    tops = []
    for slot in range(columns):
        scores = np.where(eligible_BN, _column(slopes_BNK, slot) * value + _column(affinity_BNK, slot), -np.inf)
        tops.append(_top_rows(quantise(scores), keys, n_slots + 1))
        if tops[-1].shape[1] == shape[1]:
            break  # already every ad
    rows = np.concatenate(tops, axis=1)
    order = np.argsort(rows, axis=1) if keys is None else np.lexsort((rows, np.take_along_axis(keys, rows, axis=1)), axis=1)
    rows = np.take_along_axis(rows, order, axis=1)

    slopes_BMK = _gather(slopes_BNK, rows, n_slots)
    affinity_BMK = _gather(affinity_BNK, rows, n_slots)
    scores_BMK = slopes_BMK * np.take_along_axis(value, rows, axis=1)[:, :, None] + affinity_BMK
    if scores_BMK.size and not np.isfinite(scores_BMK).all():
        raise AuctionInputError("a score overflows: bid_weight * pctr * bid + affinity must stay finite")
    scores_BMK = np.where(np.take_along_axis(eligible_BN, rows, axis=1)[:, :, None], scores_BMK, -np.inf)
    return Shortlist(rows, np.take_along_axis(pctr_BN, rows, axis=1), slopes_BMK, affinity_BMK, scores_BMK, quantise(scores_BMK))


def prefilter(pctr: Any, bids: Any, affinity: Any, slopes: Any, n_slots: int, eligible: Any) -> Ints:
    """Rows of one request that hold every slot's top K + 1 ads, ties included; usually a few dozen of N.

    The (K + 1)-th largest of the block maxima is a lower bound of the (K + 1)-th largest score, found in one pass without a partition.
    """
    n_slots = positive_slots(n_slots)
    pctr_N = as_floats("pctr", pctr, (None,), 0.0, 1.0)
    n_ads = len(pctr_N)
    bids_N = as_floats("bids", bids, (n_ads,), 0.0)
    affinity_NK = as_affinity(affinity, (n_ads,), n_slots)
    slopes_NK = as_slopes("bid_weight", slopes, (n_ads,), n_slots)
    barred = ~as_mask("eligible", eligible, (n_ads,))
    n_blocks = n_ads // _BLOCK
    if n_blocks <= 2 * (n_slots + 1):
        return np.arange(n_ads, dtype=np.int64)

    value = pctr_N * bids_N
    any_barred = bool(barred.any())
    wanted = np.zeros(n_ads, dtype=np.bool_)
    scores = np.empty(n_ads)
    for slot in range(n_slots if affinity_NK.ndim or slopes_NK.ndim else 1):
        np.multiply(value, slopes_NK[:, slot] if slopes_NK.ndim else slopes_NK, out=scores)
        scores += affinity_NK[:, slot] if affinity_NK.ndim else affinity_NK
        if any_barred:
            scores[barred] = -np.inf
        maxima = scores[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        bound = float(np.partition(maxima, n_blocks - n_slots - 1)[n_blocks - n_slots - 1])
        if not np.isfinite(bound):  # too few eligible ads to bound, or an overflow that build_shortlist will name
            return np.arange(n_ads, dtype=np.int64)
        wanted[scores >= bound - 4e-9 * abs(bound)] = True  # wider than a quantisation step
    return np.flatnonzero(wanted)


def shortlist_one(pctr: Any, bids: Any, affinity: Any, slopes: Any, n_slots: int, eligible: Any, tie_key: Any) -> Shortlist:
    """The shortlist of a single request as a batch of one; `rows` are rows of the N candidates."""
    rows = prefilter(pctr, bids, affinity, slopes, n_slots, eligible)
    n_ads = len(np.asarray(pctr))
    keys = as_tie_keys(tie_key, (1, n_ads))

    def pick(array: Any) -> npt.NDArray[Any]:
        return np.asarray(array)[rows][None] if np.asarray(array).ndim else np.asarray(array)

    short = build_shortlist(
        pick(pctr), pick(bids), pick(affinity), pick(slopes), n_slots, None if eligible is None else pick(eligible), None if keys is None else keys[:, rows]
    )
    return Shortlist(rows[short.rows], short.pctr, short.slopes, short.affinity, short.scores, short.ranks)


def run_greedy(short: Shortlist, barred: Ints | None = None, forced_slot: Ints | None = None) -> Ints:
    """Slot by slot argmax of the score, skipping ads already placed, for W walkers of every request.

    Args: barred [B, W], position in the shortlist of an ad that may not win (-1: none); forced_slot [B, W], the slot that is given to
    that ad regardless of its score (K or more: none).
    Returns: positions in the shortlist [B, W, K], -1 once no ad is left.
    """
    n_requests, n_short, n_slots = short.ranks.shape
    if barred is None:
        barred = np.full((n_requests, 1), -1, dtype=np.int64)
    own = np.take_along_axis(short.rows, np.maximum(barred, 0), axis=1) if n_short else barred
    own = np.where(barred >= 0, own, -1)
    taken: Bools = short.rows[:, None, :] == own[:, :, None]
    page = np.full((*barred.shape, n_slots), -1, dtype=np.int64)
    if n_short == 0:
        return page
    for slot in range(n_slots):
        ranks = np.where(taken, -np.inf, short.ranks[:, None, :, slot])
        best = ranks.argmax(axis=2)
        found = np.take_along_axis(ranks, best[:, :, None], axis=2)[:, :, 0] > -np.inf
        chosen = np.where(found, best, -1)
        if forced_slot is not None:
            chosen = np.where(forced_slot == slot, barred, chosen)
        page[:, :, slot] = chosen
        placed = np.where(chosen >= 0, np.take_along_axis(short.rows, np.maximum(chosen, 0), axis=1), -1)
        taken |= short.rows[:, None, :] == placed[:, :, None]
    return page


def to_rows(short: Shortlist, positions: Ints) -> Ints:
    """Shortlist positions [B, ...] as rows of the N candidates; -1 stays."""
    if short.rows.shape[1] == 0:
        return positions
    flat = positions.reshape(positions.shape[0], -1)
    rows = np.take_along_axis(short.rows, np.maximum(flat, 0), axis=1)
    return np.where(flat >= 0, rows, -1).reshape(positions.shape)


def positions_of(short: Shortlist, pages: Ints) -> Ints:
    """Shortlist position of every displayed ad, [B, K]; -1 for padding and for rows that are not in the shortlist."""
    same = (short.rows[:, None, :] == pages[:, :, None]) & (pages[:, :, None] >= 0)
    return np.where(same.any(axis=2), same.argmax(axis=2), -1) if same.shape[2] else np.full(pages.shape, -1, dtype=np.int64)


def critical_bids_of(short: Shortlist, own: Ints) -> tuple[Floats, Ints]:
    """Critical bids theta [B, W, K] of the ads at shortlist positions `own` [B, W] and the page without each, [B, W, K] positions.

    tau_k = (m_k - A_ik) / (slope_ik * pctr_i) with m_k the winning score of slot k without the ad; theta_k = min over l <= k of tau_l.
    -inf: the slot is won at any bid (nobody else is left); +inf: at none (pCTR 0 and not enough affinity).
    """
    without = run_greedy(short, barred=own)
    n_requests, n_walkers, n_slots = without.shape
    at = np.maximum(without, 0)
    request = np.arange(n_requests)[:, None, None]
    slot = np.arange(n_slots)[None, None, :]
    mine = np.maximum(own, 0)[:, :, None]
    rival = np.where(without >= 0, short.scores[request, at, slot], -np.inf)
    affinity = short.affinity[request, mine, slot]
    rate = short.slopes[request, mine, slot] * short.pctr[request, mine]
    with np.errstate(divide="ignore", invalid="ignore"):
        tau = (rival - affinity) / rate
    blind = rate <= 0.0  # pCTR 0: the bid does not move the score, the affinity alone decides
    if blind.any():
        rank, rival_rank = quantise(affinity), quantise(rival)
        wins = (rank > rival_rank) | ((rank == rival_rank) & (mine < at))
        tau = np.where(blind, np.where(wins, -np.inf, np.inf), tau)
    return np.minimum.accumulate(tau, axis=2), without
