"""Scoring pages by the market's truth: expected clicks, welfare and revenue of any policy on the same requests.

Nothing is drawn, so two policies are compared without luck. Units: sums over the page, per request; currency as in the
logs. Confidence intervals treat the user as the unit (ABSTATS F1, F3, F8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from marketplace.click_model import page_click_probability
from marketplace.worlds import World

PAGE_COLUMNS = ("policy", "request_id", "slot", "ad_id", "bid", "payment", "pctr")
"""What `score_pages` wants: one row per ad on a page."""
CHOSEN_COLUMNS = ("creative_id", "above")
"""What it reads where a policy chose it: the creative, and how many organic items stand above the ad. Else the ad's first creative, and alternating."""

METRICS = ("clicks", "welfare", "bid_welfare", "revenue")
"""Expected per request: sum of q, q * value, q * bid, q * payment over the page; q is the true click probability."""


def score_pages(world: World, pages: pd.DataFrame) -> pd.DataFrame:
    """Expected outcome of every page; one row per (policy, request_id): user_id, slots, METRICS, predicted_clicks, organic_clicks.

    Args: pages, with PAGE_COLUMNS; slots 1..K' without gaps in each page; `pctr` the policy's own prediction for the slot.
    Raises ValueError for missing columns, requests or ads that are not of this world, gaps, and an ad shown twice.
    """
    missing = [name for name in PAGE_COLUMNS if name not in pages]
    if missing:
        raise ValueError(f"pages lack column {missing[0]!r}; wanted {', '.join(PAGE_COLUMNS)}")
    pages = pages.sort_values(["policy", "request_id", "slot"], ignore_index=True)
    if not len(pages):
        return pd.DataFrame(columns=["policy", "request_id", "user_id", "slots", *METRICS, "predicted_clicks"])
    page_number = pages.groupby(["policy", "request_id"], sort=False).ngroup().to_numpy()
    first = np.flatnonzero(np.diff(page_number, prepend=-1))
    place = np.arange(len(pages)) - first[page_number]
    if (pages["slot"].to_numpy() != place + 1).any():
        wrong = pages.iloc[int(np.argmax(pages["slot"].to_numpy() != place + 1))]
        raise ValueError(f"page of request {wrong['request_id']} ({wrong['policy']}): slots must be 1..K' without gaps or repeats")
    if pages.duplicated(["policy", "request_id", "ad_id"]).any():
        wrong = pages[pages.duplicated(["policy", "request_id", "ad_id"])].iloc[0]
        raise ValueError(f"page of request {wrong['request_id']} ({wrong['policy']}) shows ad {wrong['ad_id']} twice")

    def on_page(values: np.ndarray, fill: float) -> np.ndarray:
        grid = np.full((len(first), place.max() + 1), fill, np.asarray(values).dtype)
        grid[page_number, place] = values
        return grid

    ad_ids = on_page(pages["ad_id"].to_numpy(np.int64), -1)
    scored = pages.loc[first, ["policy", "request_id"]].reset_index(drop=True)
    creatives, above = (on_page(pages[name].to_numpy(np.int64), -1) if name in pages else None for name in CHOSEN_COLUMNS)
    if above is not None:
        above = np.maximum.accumulate(above, axis=1)  # empty slots follow the last ad
    probability, reading_on = world.page_truth(scored["request_id"], ad_ids, creatives, above)
    q = page_click_probability(probability, reading_on)
    value = np.zeros(ad_ids.shape)
    value[ad_ids >= 0] = world.values_per_click(ad_ids[ad_ids >= 0])
    scored["user_id"] = world.user_ids(scored["request_id"])
    scored["slots"] = (ad_ids >= 0).sum(axis=1)
    scored["clicks"] = q.sum(axis=1)
    scored["welfare"] = (q * value).sum(axis=1)
    scored["bid_welfare"] = (q * on_page(pages["bid"].to_numpy(np.float64), 0.0)).sum(axis=1)
    scored["revenue"] = (q * on_page(pages["payment"].to_numpy(np.float64), 0.0)).sum(axis=1)
    scored["organic_clicks"] = world.organic_clicks(scored["request_id"], ad_ids, above).sum(axis=1)
    scored["predicted_clicks"] = on_page(pages["pctr"].to_numpy(np.float64), 0.0).sum(axis=1)
    return scored


def _mean_with_interval(values: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Mean per request and its 95 % interval, users as the unit (ABSTATS F1 with y = requests of the user)."""
    _, user = np.unique(users, return_inverse=True)
    total, count = np.bincount(user, values), np.bincount(user).astype(np.float64)
    mean = total.sum() / count.sum()
    if len(total) < 2:
        return {"mean": float(mean), "low": float("nan"), "high": float("nan")}
    error = ((total - mean * count) / count.mean()).std(ddof=1) / np.sqrt(len(total))
    half = student.ppf(0.975, len(total) - 1) * error
    return {"mean": float(mean), "low": float(mean - half), "high": float(mean + half)}


def summarise(scored: pd.DataFrame) -> dict[str, Any]:
    """Per policy: requests, users, `ectr_per_request` and `ectr_per_impression`, `erpm_per_1000_requests`, and welfare
    per request; each with mean and 95 % interval clustered by user where it is a mean per request."""
    summary: dict[str, Any] = {}
    for policy, rows in scored.groupby("policy", sort=True):
        users = rows["user_id"].to_numpy()
        revenue = _mean_with_interval(1000.0 * rows["revenue"].to_numpy(), users)
        summary[str(policy)] = {
            "requests": len(rows),
            "users": int(rows["user_id"].nunique()),
            "ectr_per_request": _mean_with_interval(rows["clicks"].to_numpy(), users),
            "ectr_per_impression": float(rows["clicks"].sum() / max(1, rows["slots"].sum())),
            "erpm_per_1000_requests": revenue,
            "welfare_per_request": _mean_with_interval(rows["welfare"].to_numpy(), users),
            "bid_welfare_per_request": _mean_with_interval(rows["bid_welfare"].to_numpy(), users),
            "predicted_over_true_clicks": float(rows["predicted_clicks"].sum() / max(rows["clicks"].sum(), 1e-12)),
        }
    return summary


def paired_lift(scored: pd.DataFrame, control: str, treatment: str, metric: str = "revenue") -> dict[str, float]:
    """Relative lift of a metric's total, treatment over control, on the requests that both answered (ABSTATS F8).

    Returns lift, low, high (95 %, users as the unit), requests, users.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    sides = [scored[scored["policy"] == policy].set_index("request_id") for policy in (control, treatment)]
    for policy, side in zip((control, treatment), sides, strict=True):
        if side.empty:
            raise ValueError(f"no scored page of policy {policy!r}; there are {', '.join(sorted(scored['policy'].unique()))}")
    both = sides[0].join(sides[1], lsuffix="_a", rsuffix="_b", how="inner")
    _, user = np.unique(both["user_id_a"].to_numpy(), return_inverse=True)
    total_a, total_b = (np.bincount(user, both[f"{metric}_{side}"].to_numpy()) for side in "ab")
    if total_a.sum() <= 0:
        raise ValueError(f"policy {control!r} has no {metric} on the shared requests; a relative lift does not exist")
    ratio = total_b.sum() / total_a.sum()
    result = {"lift": float(ratio - 1.0), "low": float("nan"), "high": float("nan"), "requests": len(both), "users": len(total_a)}
    if len(total_a) > 1 and total_b.sum() > 0:
        z = ratio * (total_b / total_b.mean() - total_a / total_a.mean())
        half = student.ppf(0.975, len(z) - 1) * z.std(ddof=1) / np.sqrt(len(z))
        result |= {"low": result["lift"] - float(half), "high": result["lift"] + float(half)}
    return result
