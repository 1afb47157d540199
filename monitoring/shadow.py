"""Shadow mode: a policy answered the requests of users who saw another one's pages. No user reacted to it, so there is no verdict.

What can be compared is what the two policies say and cost: shared ads, predicted clicks and revenue (each by its own model), prices over
bids, response times. Both answered the same requests, so differences are paired by user (F8).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from marketplace import logs
from monitoring import ab_designs, page

QUANTITIES = {"pctr": "Predicted clicks per page", "revenue": "Predicted revenue per page", "price_over_bid": "Price over bid", "response_ms": "Response time, ms"}


@dataclass(frozen=True)
class ShadowRow:
    """One quantity of both policies, means per page, and its paired lift."""

    label: str
    shown: float
    shadow: float
    lift: float
    lift_low: float
    lift_high: float


@dataclass(frozen=True)
class ShadowResult:
    """What the comparison found and where it wrote it."""

    report: Path
    json: Path
    requests: int
    users: int
    common: float
    """Share of the shown ads that the shadow's page has too."""
    degraded: float
    """Share of the shadow's answers that were degraded."""
    rows: list[ShadowRow]

    def text(self) -> str:
        """For the terminal."""
        lines = [f"shadow: {self.requests:,} requests of {self.users:,} users answered by both; {100 * self.common:.0f} % of the ads in common, {100 * self.degraded:.1f} % degraded"]
        lines += [f"  {row.label:34}{page.number(row.shown):>12}{page.number(row.shadow):>12}   {page.percent(row.lift)} ({page.percent(row.lift_low)} to {page.percent(row.lift_high)})" for row in self.rows]
        return "\n".join([*lines, f"  Report: {self.report}"])


def compare(folder: Path, control: str, treatment: str, title: str) -> ShadowResult:
    """Compare the pages in `<folder>/shadow.parquet`; writes `report.html` and `shadow.json` there. Raises LogError if nothing was answered."""
    frame = pd.read_parquet(Path(folder) / "shadow.parquet")
    if frame["user_id"].nunique() < 2:
        raise logs.LogError(f"{folder}/shadow.parquet has answers for {frame['user_id'].nunique()} users; two are needed")
    _, user = np.unique(frame["user_id"], return_inverse=True)
    pages = np.bincount(user).astype(float)
    rows = []
    for name, label in QUANTITIES.items():
        shown, shadow = (np.bincount(user, frame[f"{name}_{side}"]) for side in ("shown", "shadow"))
        known = shown.sum() > 0
        lift = ab_designs.paired_lift(shown, pages, shadow, pages) if known else None
        rows.append(ShadowRow(label, shown.sum() / pages.sum(), shadow.sum() / pages.sum(), *((lift.value, lift.low, lift.high) if lift else (math.nan,) * 3)))
    common = float(frame["common"].sum() / max(1, frame["ads_shown"].sum()))
    result = ShadowResult(Path(folder) / "report.html", Path(folder) / "shadow.json", len(frame), len(pages), common, float(frame["degraded_shadow"].mean()), rows)
    record = {**asdict(result), "report": result.report.name, "json": result.json.name, "rows": [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()} for row in rows]}
    logs.write_bytes(result.json, (json.dumps(record, indent=1) + "\n").encode())
    cells = [[escape(r.label), page.number(r.shown), page.number(r.shadow), f"<b>{page.percent(r.lift)}</b> <small>{page.percent(r.lift_low)} to {page.percent(r.lift_high)}</small>"] for r in rows]
    sentence = (
        f"{treatment} answered the {len(frame):,} requests of {len(pages):,} users of {control} unseen: {100 * common:.0f} % of the ads in common, "
        f"{100 * result.degraded:.1f} % of its answers degraded. Predictions are each policy's own; nobody reacted to these pages, so they decide nothing."
    )
    logs.write_bytes(result.report, page.plain_page(title, f"Shadow of {treatment}", sentence, ["", control, treatment, "difference, paired by user, 95 % interval"], cells).encode())
    return result
