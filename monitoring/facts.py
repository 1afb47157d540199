"""From logged events to facts: one row an impression, one row a user. Replays and disorder never change a number.

An event stream delivers at least once and in any order. Every rule here is a reduction over keys (request_id, slot), so duplicates,
shuffling and clicks that arrive before their impression leave the result as it is; what does not fit is counted, never dropped in silence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from marketplace import logs

KEY = ["request_id", "slot"]
EVENT_COLUMNS = ["kind", *KEY, "event_timestamp", "order_value"]
"""Columns of raw outcome events; `kind` is "click" or "purchase"."""

CLOCK_TOLERANCE_SECONDS = 3600.0
"""A click stamped this long before its impression is a skewed clock and counts; earlier ones cannot belong to it."""


@dataclass(frozen=True)
class Counts:
    """What was seen and what did not fit; for the first block of any honest report."""

    requests: int = 0
    impressions: int = 0
    clicks: int = 0
    purchases: int = 0
    duplicate_requests: int = 0
    duplicate_impressions: int = 0
    duplicate_events: int = 0
    conflicting_impressions: int = 0
    """Same request and slot, another ad: one of the two was never shown."""
    orphan_impressions: int = 0
    """No such request."""
    orphan_clicks: int = 0
    """No such impression."""
    orphan_purchases: int = 0
    """No counted click before it."""
    late_events: int = 0
    """After the attribution window."""
    skewed_events: int = 0
    """Stamped before their impression, within the clock tolerance; counted at the impression's time."""
    impossible_events: int = 0
    """Stamped before their impression by more than the tolerance; not counted."""
    prices_above_bid: int = 0
    users_in_two_arms: int = 0


@dataclass(frozen=True)
class Facts:
    """De-duplicated traffic. `impressions` carry `arm`, `city_id`, `day`, `revenue` (payment if clicked) and `gmv` (order value if bought)."""

    requests: pd.DataFrame
    impressions: pd.DataFrame
    counts: Counts


def events_of(impressions: pd.DataFrame) -> pd.DataFrame:
    """The click and purchase events that rows of the impressions table carry, as EVENT_COLUMNS."""
    parts = []
    for kind in ("click", "purchase"):
        rows = impressions.loc[impressions[kind] == 1, [*KEY, "click_timestamp", "event_timestamp", "order_value"]]
        stamped = rows.assign(kind=kind, event_timestamp=rows["click_timestamp"].fillna(rows["event_timestamp"]))
        parts.append(stamped[EVENT_COLUMNS])
    return pd.concat(parts, ignore_index=True)


def _comparable(values: pd.Series) -> np.ndarray:
    """A column as numbers in the same order: NumPy sorts them several times faster than pandas sorts frames."""
    if isinstance(values.dtype, pd.DatetimeTZDtype):
        return values.astype(np.int64).to_numpy()
    return values.to_numpy() if pd.api.types.is_numeric_dtype(values) else pd.factorize(values, sort=True)[0]


def _first_by_key(frame: pd.DataFrame, key: list[str], order: list[str]) -> pd.DataFrame:
    """One row a key, sorted by it: the least by `order`, whatever order the rows came in."""
    columns = [_comparable(frame[name]) for name in [*key, *order]]
    rows = np.lexsort(columns[::-1])
    new = np.ones(len(frame), bool)
    new[1:] = np.any([column[rows[1:]] != column[rows[:-1]] for column in columns[: len(key)]], axis=0)
    return frame.take(rows[new]).reset_index(drop=True)


def join_events(impressions: pd.DataFrame, events: pd.DataFrame, window_hours: float) -> tuple[pd.DataFrame, Counts]:
    """Shown ads with their outcomes, each once, sorted by key.

    Args:
        impressions: IMPRESSIONS columns, any order, any number of copies; their own clicks and purchases are ignored.
        events: EVENT_COLUMNS, likewise.
        window_hours: attribution window, from the impression.
    A purchase counts only with a counted click.
    """
    shown = _first_by_key(impressions, KEY, ["event_timestamp", "ad_id"])
    if "creative_click" in shown and len(shown) < len(impressions):  # a copy written before the creative was opened must not hide that it was
        opened = impressions.loc[impressions["creative_click"] == 1, [*KEY, "ad_id"]]
        shown["creative_click"] = pd.MultiIndex.from_frame(shown[[*KEY, "ad_id"]]).isin(pd.MultiIndex.from_frame(opened)).astype(shown["creative_click"].dtype)
    unique = _first_by_key(events, ["kind", *KEY], ["event_timestamp", "order_value"])
    ads = len(shown) if len(shown) == len(impressions) else len(impressions.drop_duplicates([*KEY, "ad_id"]))
    outcome = {kind: unique.loc[unique["kind"] == kind, [*KEY, "event_timestamp", "order_value"]] for kind in ("click", "purchase")}
    base = shown.drop(columns=["click", "click_timestamp", "purchase", "order_value"], errors="ignore")
    tally = {"orphan_clicks": 0, "orphan_purchases": 0, "late_events": 0, "skewed_events": 0, "impossible_events": 0}
    for kind, rows in outcome.items():
        renamed = rows.rename(columns={"event_timestamp": f"{kind}_at", "order_value": f"{kind}_value"})
        base = base.merge(renamed, on=KEY, how="left", validate="one_to_one")
        tally[f"orphan_{kind}s"] = len(rows) - int(base[f"{kind}_at"].notna().sum())
        delay = (base[f"{kind}_at"] - base["event_timestamp"]).dt.total_seconds()
        late, impossible = delay > window_hours * 3600, delay < -CLOCK_TOLERANCE_SECONDS
        skewed = (delay < 0) & ~impossible
        for name, mask in (("late_events", late), ("skewed_events", skewed), ("impossible_events", impossible)):
            tally[name] += int(mask.sum())
        base[f"{kind}_at"] = base[f"{kind}_at"].where(~(late | impossible), pd.NaT)
    clicked = base["click_at"].notna()
    bought = base["purchase_at"].notna() & clicked
    tally["orphan_purchases"] += int((base["purchase_at"].notna() & ~clicked).sum())
    base["click"], base["purchase"] = clicked.astype(np.int32), bought.astype(np.int32)
    base["click_timestamp"] = base["click_at"].where(base["click_at"].isna() | (base["click_at"] >= base["event_timestamp"]), base["event_timestamp"])
    base["order_value"] = base["purchase_value"].where(bought, 0.0).astype(np.float64)
    counts = Counts(
        impressions=len(shown),
        clicks=int(clicked.sum()),
        purchases=int(bought.sum()),
        duplicate_impressions=len(impressions) - len(shown),
        duplicate_events=len(events) - len(unique),
        conflicting_impressions=ads - len(shown),
        prices_above_bid=int((shown["payment"] > shown["bid"]).sum()),
        **tally,
    )
    return base[list(impressions.columns)], counts


def build_facts(requests: pd.DataFrame, impressions: pd.DataFrame, window_hours: float = 24.0, events: pd.DataFrame | None = None) -> Facts:
    """Facts from the REQUESTS and IMPRESSIONS tables, plus raw `events` that have not been merged into the impressions yet."""
    carried = events_of(impressions)
    outcomes = carried if events is None or events.empty else pd.concat([carried, events[EVENT_COLUMNS]], ignore_index=True)
    joined, counts = join_events(impressions, outcomes, window_hours)
    unique = _first_by_key(requests, ["request_id"], ["event_timestamp"])
    facts = joined.merge(unique[["request_id", "arm", "city_id"]], on="request_id", how="inner", validate="many_to_one")
    facts["day"] = facts["event_timestamp"].dt.floor("D")
    facts["revenue"], facts["gmv"] = facts["payment"] * facts["click"], facts["order_value"] * facts["purchase"]
    arms = unique.loc[unique["arm"] != "none", ["user_id", "arm"]].drop_duplicates()
    counts = replace(
        counts,
        requests=len(unique),
        duplicate_requests=len(requests) - len(unique),
        orphan_impressions=len(joined) - len(facts),
        users_in_two_arms=int((arms["user_id"].value_counts() > 1).sum()),
    )
    return Facts(unique.assign(day=unique["event_timestamp"].dt.floor("D")), facts, counts)


def read_facts(folder: Path, window_hours: float = 24.0) -> Facts:
    """`build_facts` on a folder of logs."""
    return build_facts(logs.read_table(folder, "requests"), logs.read_table(folder, "impressions"), window_hours)


SUMS = ["requests", "imps", "clicks", "revenue", "gmv", "predicted"]
"""Per-user sums; `predicted` is the sum of pctr."""


def per_user(facts: Facts, by: list[str] | None = None) -> pd.DataFrame:
    """One row per (arm, user) and whatever `by` adds (columns of requests and impressions alike, e.g. "day"): SUMS and `first_exposure`.

    Users who were answered but saw no ad keep zeros: they were randomised. Users seen in two arms are left out (and counted in `Counts`).
    """
    keys = ["arm", "user_id", *(by or [])]
    asked = facts.requests.groupby(keys, observed=True).agg(requests=("request_id", "size"), first_exposure=("event_timestamp", "min"))
    shown = facts.impressions.groupby(keys, observed=True).agg(
        imps=("slot", "size"), clicks=("click", "sum"), revenue=("revenue", "sum"), gmv=("gmv", "sum"), predicted=("pctr", "sum")
    )
    users = asked.join(shown, how="left").reset_index()
    users[SUMS] = users[SUMS].fillna(0.0).astype(np.float64)
    arms = facts.requests.loc[facts.requests["arm"] != "none", ["user_id", "arm"]].drop_duplicates()
    crossed = arms.loc[arms["user_id"].duplicated(), "user_id"]
    return users[~users["user_id"].isin(crossed)].reset_index(drop=True)
