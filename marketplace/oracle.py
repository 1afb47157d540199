"""The best that any policy could do on a request, by the market's truth: limits that the tables measure against.

The cascade makes them exact: a page earns sum over slots of g_k * product of c over the ads above, g = p * w. For one set of ads the
best order is by falling g / (1 - c) (an exchange argument), so the best page of K slots is a dynamic programme over the ads in that
order. The oracle knows p and c of the very request, the user's next visit included; no policy does, so the limits are bounds from above.

Shapes: R requests, N ads, K slots. Money in currency per request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import lognorm

from auction.myerson import Distribution, virtual_value
from marketplace.click_model import reading_probability
from marketplace.worlds import World

_CELLS = 1 << 22
"""Cells [R, N] of truth held at once."""


@dataclass(frozen=True)
class BestPages:
    """The best page of every request."""

    pages: np.ndarray
    """[R, K] columns of the ads in slot order; -1 pads."""
    total: np.ndarray
    """[R], what the page earns; 0 where no ad earns anything."""


def best_pages(gain: Any, continuation: Any, slots: int) -> BestPages:
    """The page of at most `slots` ads with the greatest sum of g_k * product of c above, exactly.

    Args: gain [R, N], g = p * w of an ad that is read; ads with g <= 0 are never shown. continuation [R, N], c in [0, 1].
    Raises ValueError for shapes that differ, numbers that are not finite and c outside [0, 1].
    """
    g, c = _checked(gain, continuation, slots)
    kept = _undominated(g, c, slots)
    found = _best(np.take_along_axis(g, kept, 1), np.take_along_axis(c, kept, 1), slots)
    columns = np.where(found.pages >= 0, np.take_along_axis(kept, np.maximum(found.pages, 0), 1), -1)
    return BestPages(columns, found.total)


def vcg_revenue(gain: Any, continuation: Any, slots: int) -> tuple[BestPages, np.ndarray]:
    """The best page, and what VCG collects for it [R]: each ad pays the welfare that the others lose by its presence."""
    g, c = _checked(gain, continuation, slots)
    kept = _undominated(g, c, slots + 1)  # one dominator more: a displayed ad is taken away
    g, c = np.take_along_axis(g, kept, 1), np.take_along_axis(c, kept, 1)
    found = _best(g, c, slots)
    paid = np.zeros(len(g))
    rows = np.arange(len(g))
    shown = found.pages >= 0
    own = np.where(shown, np.take_along_axis(g, np.maximum(found.pages, 0), 1), 0.0)
    own *= reading_probability(np.where(shown, np.take_along_axis(c, np.maximum(found.pages, 0), 1), 1.0))
    for slot in range(slots):
        without = g.copy()
        without[rows[shown[:, slot]], found.pages[shown[:, slot], slot]] = 0.0
        others = _best(without, c, slots).total
        paid += np.where(shown[:, slot], others - (found.total - own[:, slot]), 0.0)
    columns = np.where(shown, np.take_along_axis(kept, np.maximum(found.pages, 0), 1), -1)
    return BestPages(columns, found.total), paid


def _checked(gain: Any, continuation: Any, slots: int) -> tuple[np.ndarray, np.ndarray]:
    g, c = np.asarray(gain, np.float64), np.asarray(continuation, np.float64)
    if g.ndim != 2 or g.shape != c.shape:
        raise ValueError(f"gain and continuation must be [R, N] alike, got {g.shape} and {c.shape}")
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    if not np.isfinite(g).all() or not ((c >= 0) & (c <= 1)).all():
        raise ValueError("gain must be finite and continuation lie in [0, 1]")
    return np.maximum(g, 0.0), c


def _undominated(g: np.ndarray, c: np.ndarray, dominators: int) -> np.ndarray:
    """Columns [R, M] that hold every ad with fewer than `dominators` others that are at least as good in both g and c.

    Where an ad of a page has K dominators, one of them is not on the page and can take its place at no loss: pruning is exact.
    Layers of the Pareto frontier are peeled: an ad of layer L has at least L - 1 dominators. About 65 of 100,000 ads are left.
    """
    order = np.lexsort((-c, -g), axis=1)
    sorted_c = np.take_along_axis(c, order, 1)
    left = np.take_along_axis(g, order, 1) > 0.0
    kept = np.zeros_like(left)
    for _ in range(dominators):
        candidate = np.where(left, sorted_c, -1.0)
        best_before = np.maximum.accumulate(candidate, axis=1)
        best_before = np.concatenate([np.full((len(g), 1), -1.0), best_before[:, :-1]], axis=1)
        layer = left & (candidate > best_before)
        kept |= layer
        left &= ~layer
    width = max(1, int(kept.sum(1).max(initial=0)))
    place = np.argsort(~kept, axis=1, kind="stable")[:, :width]  # the kept ones first; what fills up earns nothing extra
    return np.take_along_axis(order, place, 1)


def _best(g: np.ndarray, c: np.ndarray, slots: int) -> BestPages:
    """Dynamic programme: value[k] of the best page of at most k slots from the ads not yet passed, from the last ad to the first."""
    requests, ads = g.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = np.where(g > 0.0, g / (1.0 - c), -1.0)
    order = np.argsort(-rank, axis=1, kind="stable")
    g, c = np.take_along_axis(g, order, 1), np.take_along_axis(c, order, 1)
    value = np.zeros((requests, slots + 1))
    taken = np.zeros((ads, requests, slots + 1), bool)
    for ad in range(ads - 1, -1, -1):
        with_it = g[:, ad, None] + c[:, ad, None] * value[:, :-1]
        better = (with_it > value[:, 1:]) & (g[:, ad, None] > 0.0)
        taken[ad, :, 1:] = better
        value[:, 1:] = np.where(better, with_it, value[:, 1:])
    pages = np.full((requests, slots), -1)
    free, filled, rows = np.full(requests, slots), np.zeros(requests, int), np.arange(requests)
    for ad in range(ads):
        here = taken[ad, rows, free]
        pages[rows[here], filled[here]] = order[here, ad]
        filled += here
        free -= here
    return BestPages(pages, value[:, slots].copy())


@dataclass(frozen=True)
class Limits:
    """Per request [R], by the market's truth."""

    welfare: np.ndarray
    """W*: the greatest expected value of clicks that a page can have. Under the stress model an upper bound: p without substitution."""
    welfare_reached: np.ndarray
    """What that page earns in truth: equals `welfare` but for the stress model, where W* lies between the two."""
    vcg_revenue: np.ndarray
    """What VCG collects at W*, values known."""
    optimal_revenue: np.ndarray
    """R*: the greatest sum of virtual values. Its mean is the most that any truthful auction can collect on average over values (Myerson 1981)."""


def exact(world: World) -> bool:
    """Whether the limits of this world can be computed."""
    return world.config.creatives.per_ad == 1 and world.config.organic.items == 0


def limits(world: World, request_ids: Any, distribution: Distribution | None = None) -> Limits:
    """Limits of requests of a world over all ads of their city that are active on the day.

    `distribution`: what the platform knows of an advertiser's value; by default the lognormal of the catalogue's own values.
    Raises ValueError for a world of several creatives an ad or of organic results: the dynamic programme knows pages of ads alone.
    """
    if not exact(world):
        raise ValueError("limits are exact for pages of ads with one creative each; this world has several creatives or organic results")
    ids = np.asarray(request_ids, np.int64)
    if distribution is None:
        logs = np.log(world.state.ads["value"].to_numpy())
        distribution = lognorm(s=logs.std(), scale=np.exp(logs.mean()))
    phi = virtual_value(distribution)
    slots = world.config.slots
    result = {name: np.zeros(len(ids)) for name in ("welfare", "welfare_reached", "vcg_revenue", "optimal_revenue")}
    for group, ad_ids in world.active_ads(ids):
        value = world.values_per_click(ad_ids)
        virtual = np.array([phi(float(one)) for one in value])
        step = max(1, _CELLS // max(1, len(ad_ids)))
        for start in range(0, len(group), step):
            part = group[start : start + step]
            truth = world.truth(pd.DataFrame({"request_id": ids[part]}), ad_ids)
            best, paid = vcg_revenue(truth.click_probability * value, truth.continuation, slots)
            result["welfare"][part], result["vcg_revenue"][part] = best.total, paid
            result["optimal_revenue"][part] = best_pages(truth.click_probability * virtual, truth.continuation, slots).total
            shown = np.where(best.pages >= 0, ad_ids[np.maximum(best.pages, 0)], -1)
            p, c = world.page_truth(ids[part], shown)
            worth = np.where(best.pages >= 0, value[np.maximum(best.pages, 0)], 0.0)
            result["welfare_reached"][part] = (p * reading_probability(c) * worth).sum(axis=1)
    return Limits(**result)


def shares(scored: pd.DataFrame, request_ids: Any, found: Limits, baseline: str) -> dict[str, Any]:
    """How near policies come to the limits of the same requests.

    Args: scored as marketplace.truth.score_pages gives it; found = limits(world, request_ids); baseline, the policy whose gap counts.
    Returns: the limits' means and, per policy, `welfare_of_limit` = welfare / W*, `gap_closed` = (welfare - baseline's) / (W* - baseline's)
    and `revenue_of_optimum` = revenue / R*; the last may exceed 1 for rules that are not truthful, as bids are truthful here.
    """
    ids = np.asarray(request_ids, np.int64)
    best, optimal = float(found.welfare.mean()), float(found.optimal_revenue.mean())
    mean = {str(name): rows.set_index("request_id")[["welfare", "revenue"]].reindex(ids, fill_value=0.0).mean() for name, rows in scored.groupby("policy")}
    gap = best - mean[baseline]["welfare"]
    policies = {
        name: {
            "welfare_of_limit": float(row["welfare"] / best), "gap_closed": float((row["welfare"] - mean[baseline]["welfare"]) / gap),
            "revenue_of_optimum": float(row["revenue"] / optimal),
        }
        for name, row in mean.items()
    }  # fmt: skip
    return {
        "requests": len(ids), "baseline": baseline, "welfare_per_request": best, "vcg_revenue_per_1000": 1000 * float(found.vcg_revenue.mean()),
        "optimal_revenue_per_1000": 1000 * optimal, "policies": policies,
    }  # fmt: skip
