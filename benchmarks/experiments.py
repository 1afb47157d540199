"""Proofs of the experiment statistics on the simulated market: `ega bench ab`, `ega bench alarms`, `ega bench events`.

Users of simulated worlds are split again and again; the lifts are known because they are made: a control click is taken away with probability
1 - 1/(1 + lift), so that the treatment's CTR and RPM are higher by exactly that in expectation and its ROI is the same. Shapes: U users, D days.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

RATIOS = {"ctr": ("clicks", "imps"), "rpm": ("revenue", "imps"), "roi": ("gmv", "revenue")}
SUMS = ("imps", "clicks", "revenue", "gmv")


@dataclass(frozen=True)
class Traffic:
    """Per-user daily sums of one world [U, D], and its clicks: who, when, what was paid and ordered."""

    sums: dict[str, np.ndarray]
    click_user: np.ndarray
    click_day: np.ndarray
    click_revenue: np.ndarray
    click_gmv: np.ndarray

    @property
    def users(self) -> int:
        return len(self.sums["imps"])

    def period(self, days: slice, users: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Sums [U] over days, of some users."""
        rows = slice(None) if users is None else users
        return {name: self.sums[name][rows, days].sum(axis=1) for name in SUMS}


def market_traffic(seed: int, users: int, days: int) -> Traffic:
    """A world's traffic under the logging policy; users who ask for nothing are not of it."""
    from marketplace import logs
    from marketplace.synthetic import SyntheticConfig
    from marketplace.worlds import WorldConfig, build_world

    config = WorldConfig(synthetic=SyntheticConfig(users=users, cities=3, ads_per_city=120, places_per_city=180, log_days=days, live_days=0))
    with tempfile.TemporaryDirectory() as folder:
        build_world(config, seed).write_logs(Path(folder) / "logs")
        shown = logs.read_table(Path(folder) / "logs", "impressions", columns=["event_timestamp", "user_id", "payment", "click", "order_value"])
    _, user = np.unique(shown["user_id"], return_inverse=True)
    day = ((shown["event_timestamp"] - shown["event_timestamp"].min().floor("D")) // pd.Timedelta(days=1)).to_numpy()
    click, revenue, gmv = shown["click"].to_numpy(np.float64), (shown["payment"] * shown["click"]).to_numpy(), shown["order_value"].to_numpy()
    cell, shape = user * days + day, (user.max() + 1, days)
    weights = {"imps": np.ones(len(shown)), "clicks": click, "revenue": revenue, "gmv": gmv}
    sums = {name: np.bincount(cell, weight, shape[0] * days).reshape(shape) for name, weight in weights.items()}
    clicked = click > 0
    return Traffic(sums, user[clicked], day[clicked], revenue[clicked], gmv[clicked])


def _thinned(traffic: Traffic, days: slice, lift: float, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Sums [U] of a control that would have had `lift` less: each click is kept with probability 1 / (1 + lift)."""
    chosen = np.arange(traffic.sums["imps"].shape[1])[days]
    kept = np.isin(traffic.click_day, chosen) & (generator.random(len(traffic.click_user)) < 1 / (1 + lift))
    user = traffic.click_user[kept]
    sums = {"imps": traffic.sums["imps"][:, days].sum(axis=1), "clicks": np.bincount(user, minlength=traffic.users).astype(float)}
    return sums | {name: np.bincount(user, values[kept], traffic.users) for name, values in (("revenue", traffic.click_revenue), ("gmv", traffic.click_gmv))}


def ab(
    worlds: int = 5, splits: int = 200, users: int = 10_000, days: int = 14, seed: int = 0, lift: float = 0.052, progress: bool = True,
    traffic: Callable[[int, int, int], Traffic] = market_traffic,
) -> dict[str, Any]:  # fmt: skip
    """A/A error, coverage of a known lift, error of daily peeking, and power at the planned size; `worlds` x `splits` experiments of each kind.

    The first half of the days is the users' past, the second half the test.
    """
    from monitoring import ab_stats

    generator = np.random.default_rng([seed, 1])
    half = days // 2
    past_days, test_days = slice(0, half), slice(half, days)
    p_values: dict[str, list[float]] = {f"{name}{suffix}": [] for name in RATIOS for suffix in ("", "_cuped")}
    covered: dict[str, list[bool]] = {f"{name}{suffix}": [] for name in RATIOS for suffix in ("", "_cuped")}
    impression_level, naive, sequence, found, found_cuped, planned, correlations = [], [], [], [], [], [], []
    bar = tqdm(total=worlds * splits, desc="experiments", disable=not progress)
    for world in range(worlds):
        data = traffic(1000 * (seed + 1) + world, users, days)
        now, past = data.period(test_days), data.period(past_days)
        pilot = ab_stats.ratio_per_user(past["clicks"], past["imps"])
        wanted = ab_stats.plan_users(pilot, lift)
        if 2 * wanted > data.users:
            raise ValueError(f"the planner asks for {2 * wanted:,} users, the world has {data.users:,}; give it more users or days")
        planned.append(wanted)
        for _ in range(splits):
            order = generator.permutation(data.users)
            a, b = order[: data.users // 2], order[data.users // 2 :]
            thin = _thinned(data, test_days, lift, generator)
            for name, (x, y) in RATIOS.items():
                sides = [ab_stats.ratio_per_user(now[x][side], now[y][side]) for side in (a, b)]
                p_values[name].append(ab_stats.difference(*sides).p_value)
                lower = ab_stats.ratio_per_user(thin[x][a], thin[y][a])
                covered[name].append(_holds(ab_stats.lift(lower, sides[1]), 0.0 if name == "roi" else lift))
                pairs = [(now[x][side], now[y][side]) for side in (a, b)], [(past[x][side], past[y][side]) for side in (a, b)]
                adjusted = ab_stats.cuped(pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1])
                p_values[f"{name}_cuped"].append(ab_stats.difference(adjusted.a, adjusted.b).p_value)
                known = ab_stats.cuped((thin[x][a], thin[y][a]), pairs[1][0], pairs[0][1], pairs[1][1])
                covered[f"{name}_cuped"].append(_holds(ab_stats.lift(known.a, known.b), 0.0 if name == "roi" else lift))
                if name == "rpm":
                    correlations.append(adjusted.correlation)
            impression_level.append(_impression_level(now, a, b))
            wrong = _peeked(data, a, b, range(half, days))
            naive.append(wrong[0])
            sequence.append(wrong[1])
            few_a, few_b = order[:wanted], order[wanted : 2 * wanted]
            sides = [ab_stats.ratio_per_user(sums["clicks"][side], sums["imps"][side]) for sums, side in ((thin, few_a), (now, few_b))]
            found.append(ab_stats.difference(*sides).p_value < 0.05 and sides[1].value > sides[0].value)
            history = [(past["clicks"][side], past["imps"][side]) for side in (few_a, few_b)]
            adjusted = ab_stats.cuped((thin["clicks"][few_a], thin["imps"][few_a]), history[0], (now["clicks"][few_b], now["imps"][few_b]), history[1])
            found_cuped.append(ab_stats.difference(adjusted.a, adjusted.b).p_value < 0.05 and adjusted.b.value > adjusted.a.value)
            bar.update()
    bar.close()
    table = [
        {
            "metric": name,
            "experiments": len(p),
            "false positives, %": 100 * float(np.mean(np.array(p) < 0.05)),
            "uniform, KS p": float(stats.kstest(p, "uniform").pvalue),
            "coverage of the known lift, %": 100 * float(np.mean(covered[name])),
        }
        for name, p in p_values.items()
    ]
    return {
        "users_per_arm": users // 2,
        "test_days": days - half,
        "lift": lift,
        "impression_level_false_positives_percent": 100 * float(np.mean(impression_level)),
        "peeking_daily_fixed_test_ever_wrong_percent": 100 * float(np.mean(naive)),
        "peeking_daily_always_valid_ever_wrong_percent": 100 * float(np.mean(sequence)),
        "planned_users_per_arm": int(np.mean(planned)),
        "power_at_the_planned_size_percent": 100 * float(np.mean(found)),
        "power_with_cuped_percent": 100 * float(np.mean(found_cuped)),
        "cuped_correlation_rpm": float(np.mean(correlations)),
        "table": table,
    }


def _holds(comparison: Any, truth: float) -> bool:
    return bool(comparison.low <= truth <= comparison.high)


def _impression_level(now: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> bool:
    """The mistaken z-test on impressions as if they were independent; it is here to fail."""
    (x_a, y_a), (x_b, y_b) = ((now["clicks"][side].sum(), now["imps"][side].sum()) for side in (a, b))
    share = (x_a + x_b) / (y_a + y_b)
    return bool(abs(x_a / y_a - x_b / y_b) > 1.959964 * math.sqrt(share * (1 - share) * (1 / y_a + 1 / y_b)))


def _peeked(data: Traffic, a: np.ndarray, b: np.ndarray, days: range) -> tuple[bool, bool]:
    """Whether a look after each day ever finds a CTR difference: (the fixed test, the always-valid one), in an A/A test."""
    from monitoring import ab_stats

    wrong_fixed = wrong_sequence = False
    for last in days:
        sums = data.period(slice(days[0], last + 1))
        sides = []
        for side in (a, b):
            seen = side[sums["imps"][side] > 0]
            sides.append(ab_stats.ratio_per_user(sums["clicks"][seen], sums["imps"][seen]))
        wrong_fixed |= ab_stats.difference(*sides).p_value < 0.05
        users = sides[0].users + sides[1].users
        if users >= ab_stats.SEQUENTIAL_LEAST_USERS:
            delta = ab_stats.lift_delta(*sides)
            wrong_sequence |= ab_stats.always_valid(delta.value, delta.standard_error**2, users, data.users).p_value < 0.05
    return bool(wrong_fixed), bool(wrong_sequence)


# ---------------------------------------------------------------------------------------------------------------------
# Alarms: what is named, and what is not


def _half(users: pd.Series) -> np.ndarray:
    """Arms of an A/A test by a hash of the user."""
    ids, inverse = np.unique(users, return_inverse=True)
    arm = np.array([int(hashlib.sha256(f"alarms:{user}".encode()).hexdigest()[:8], 16) < 2**31 for user in ids])
    return np.where(arm, "control", "ega")[inverse]


Tables = dict[str, pd.DataFrame]


def _scaled_bids(tables: Tables, _: np.random.Generator) -> Tables:
    money = tables["impressions"].assign(bid=tables["impressions"]["bid"] * 1.3, payment=tables["impressions"]["payment"] * 1.3)
    return {**tables, "impressions": money, "ads": tables["ads"].assign(bid=tables["ads"]["bid"] * 1.3, reserve=tables["ads"]["reserve"] * 1.3)}


def _without_clicks(shown: pd.DataFrame, lost: np.ndarray) -> pd.DataFrame:
    """Impressions whose outcomes are taken away where `lost`."""
    kept = ~lost
    return shown.assign(
        click=shown["click"] * kept, purchase=shown["purchase"] * kept, order_value=shown["order_value"] * kept, click_timestamp=shown["click_timestamp"].where(kept)
    )


def _halved_city(tables: Tables, generator: np.random.Generator) -> Tables:
    city = tables["requests"].set_index("request_id")["city_id"].reindex(tables["impressions"]["request_id"]).to_numpy()
    lost = (city == 1) & (generator.random(len(city)) < 0.5)
    return {**tables, "impressions": _without_clicks(tables["impressions"], lost)}


def _constant_age(tables: Tables, _: np.random.Generator) -> Tables:
    return {**tables, "users": tables["users"].assign(age_band=np.int32(3))}


def _off_calibration(tables: Tables, _: np.random.Generator) -> Tables:
    return {**tables, "impressions": tables["impressions"].assign(pctr=(tables["impressions"]["pctr"] * 1.2).clip(0, 1).astype(np.float32))}


def _short_arm(tables: Tables, generator: np.random.Generator) -> Tables:
    """3 % of the pages of arm ega are not in the log; clients saw them."""
    requests = tables["requests"]
    lost = set(requests.loc[(requests["arm"] == "ega") & (generator.random(len(requests)) < 0.03), "request_id"])
    return {**tables, **{name: tables[name][~tables[name]["request_id"].isin(lost)] for name in ("requests", "impressions")}}


def _click_fraud(tables: Tables, generator: np.random.Generator) -> Tables:
    """The ads of an advertiser at the upper decile of size get clicks on a third of their impressions."""
    shown = tables["impressions"]
    owner = shown["ad_id"].map(tables["ads"].drop_duplicates("ad_id").set_index("ad_id")["advertiser_id"])
    sizes = owner.value_counts()
    fraud = (owner == sizes[sizes >= sizes.quantile(0.9)].index[-1]).to_numpy() & (generator.random(len(shown)) < 0.33)
    return {**tables, "impressions": shown.assign(click=np.where(fraud, 1, shown["click"]).astype(np.int32), click_timestamp=shown["click_timestamp"].where(~fraud | (shown["click"] == 1), shown["event_timestamp"]))}


INJECTED: dict[str, tuple[Callable[[Tables, np.random.Generator], Tables], str]] = {
    "bids x1.3": (_scaled_bids, "catalogue: bid"),
    "CTR of city 1 halved": (_halved_city, "CTR of city 1 "),
    "age band constant": (_constant_age, "user age band is constant"),
    "calibration off by 20 %": (_off_calibration, "Calibration of "),
    "arm ega short by 3 %": (_short_arm, "Arm ega"),
    "click fraud at one advertiser": (_click_fraud, "CTR of advertiser "),
}
"""Change: (what it does to one day's tables, what the report must say)."""


def _beginning(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " \N{HORIZONTAL ELLIPSIS}"


def alarms(worlds: int = 1, clean_days: int = 20, users: int = 3000, seed: int = 0, progress: bool = True, reference_days: int = 14) -> dict[str, Any]:
    """Daily reports on clean traffic (no alarm may be raised) and on one day of each injected change (it must be named)."""
    from marketplace import logs
    from marketplace.synthetic import SyntheticConfig
    from marketplace.worlds import WorldConfig, build_world
    from monitoring.drift import LogTables
    from monitoring.facts import build_facts
    from monitoring.report import MonitorConfig, look

    config, rows, raised = MonitorConfig(), [], []
    synthetic = SyntheticConfig(users=users, cities=4, ads_per_city=200, places_per_city=300, log_days=14 + reference_days + clean_days, live_days=0)
    for world in range(worlds):
        with tempfile.TemporaryDirectory() as folder:
            build_world(WorldConfig(unlogged_days=14, synthetic=synthetic), 2000 * (seed + 1) + world).write_logs(Path(folder) / "logs")
            whole = {name: logs.read_table(Path(folder) / "logs", name) for name in ("requests", "impressions", "ads", "users", "behaviours")}
        day_of = {name: frame["event_timestamp"].dt.floor("D") for name, frame in whole.items()}
        days = np.sort(day_of["requests"].unique())

        def cut(wanted: Any, whole: Tables = whole, day_of: dict[str, pd.Series] = day_of) -> Tables:
            return {name: frame if name == "users" else frame[day_of[name].isin(wanted)] for name, frame in whole.items()}

        def tables_of(tables: Tables) -> LogTables:
            return LogTables(tables["ads"], tables["users"], tables["behaviours"])

        reference = cut(days[:reference_days])
        before, past = build_facts(reference["requests"], reference["impressions"]), tables_of(reference)
        responses = None
        for day in tqdm(days[reference_days:], desc="clean days", disable=not progress):
            today = cut([day])
            today["requests"] = today["requests"].assign(arm=_half(today["requests"]["user_id"]))
            found = look(build_facts(today["requests"], today["impressions"]), tables_of(today), before, past, config)
            raised.append([*found.analysis.verdict.reasons, *found.alarms] if found.alarms or found.analysis.verdict.code == "invalid" else [])
            if day == days[reference_days]:
                injected = today
                responses = today["requests"][["request_id", "user_id", "arm"]].assign(response_ms=10.0, degraded=False)
        for name, (change, named) in tqdm(INJECTED.items(), desc="changes", disable=not progress):
            changed = change(injected, np.random.default_rng([seed, world]))
            found = look(build_facts(changed["requests"], changed["impressions"]), tables_of(changed), before, past, config, responses)
            texts = [*found.analysis.verdict.reasons, *found.alarms]
            said = next((text for text in texts if named in text), "")
            rows.append({"change": name, "world": world, "named": bool(said), "alarms": len(texts), "said": _beginning(said)})
    return {
        "users": users,
        "requests_per_day": int(len(injected["requests"])),
        "clean_days": len(raised),
        "clean_days_with_an_alarm": sum(bool(texts) for texts in raised),
        "stated_rate_per_day_and_family": config.drift.false_alarm_rate,
        "false_alarms": [text for texts in raised for text in texts][:5],
        "table": rows,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Events: speed and memory of the join


def write_raw_events(folder: Path, events: int, generator: np.random.Generator, most_copies: int = 1) -> dict[str, float]:
    """Raw traffic of about `events` impressions, clicks and purchases over four days, in any order and up to `most_copies` times; returns the true sums."""
    from marketplace import logs
    from marketplace.schema import IMPRESSIONS, REQUESTS
    from monitoring.store import write_events

    pages, slots, days = int(events / 5.4), 5, 4
    start = pd.Timestamp("2026-03-01", tz="UTC")
    time_of = start + pd.to_timedelta(generator.integers(0, days * 86_400 * 1_000_000, pages), unit="us")
    user = generator.integers(0, max(2, pages // 8), pages)
    requests = pd.DataFrame(dict.fromkeys(REQUESTS.names, 0), index=range(pages)).assign(
        request_id=np.arange(pages) + 10**9, event_timestamp=pd.Series(time_of).astype("datetime64[us, UTC]"), user_id=user, city_id=1, slots=slots,
        arm=np.where(user % 2 == 0, "control", "ega"), model_version="bootstrap-1",
    )  # fmt: skip
    shown = requests.loc[requests.index.repeat(slots), ["request_id", "event_timestamp", "user_id"]].reset_index(drop=True)
    count = len(shown)
    shown = shown.assign(
        slot=np.tile(np.arange(1, slots + 1), pages), ad_id=generator.integers(0, 2000, count), creative_id=1, bid=2.0, payment=generator.uniform(0.1, 2.0, count),
        pctr=0.06, propensity=1.0, click=0, click_timestamp=pd.Series(pd.NaT, index=range(count), dtype="datetime64[us, UTC]"), purchase=0, order_value=0.0, creative_click=0,
    )[IMPRESSIONS.names]  # fmt: skip
    clicked = shown[generator.random(count) < 0.06]
    delay = pd.to_timedelta(generator.integers(1, 3000, len(clicked)), unit="s")
    clicks = clicked[["request_id", "slot"]].assign(kind="click", event_timestamp=clicked["event_timestamp"] + delay, order_value=0.0)
    bought = clicks[generator.random(len(clicks)) < 0.33]
    purchases = bought.assign(kind="purchase", event_timestamp=bought["event_timestamp"] + pd.Timedelta(60, "s"), order_value=generator.uniform(1, 90, len(bought)))
    outcomes = pd.concat([purchases, clicks], ignore_index=True)
    truth = {"impressions": count, "clicks": len(clicks), "purchases": len(purchases), "revenue": float(clicked["payment"].sum()), "gmv": float(purchases["order_value"].sum())}
    for name, frame in (("requests", requests[REQUESTS.names]), ("impressions", shown)):
        delivered = _delivered(frame, generator, most_copies)
        for day, rows in delivered.groupby(delivered["event_timestamp"].dt.date):
            import pyarrow as pa

            table = pa.Table.from_pandas(rows, schema=logs.table_of(name).arrow, preserve_index=False)
            logs.write_parquet(folder / name / f"day={day}" / "part-0.parquet", table)
    write_events(folder, _delivered(outcomes, generator, most_copies))
    return truth


def _delivered(frame: pd.DataFrame, generator: np.random.Generator, most_copies: int) -> pd.DataFrame:
    copies = generator.integers(1, most_copies + 1, len(frame))
    return frame.loc[frame.index.repeat(copies)].sample(frac=1.0, random_state=generator).reset_index(drop=True)


def peak_bytes() -> int:
    """The most memory that this process has held. Not getrusage: Linux hands a child the peak of the process that started it."""
    return 1024 * int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))


def join_and_measure(folder: Path) -> dict[str, float]:
    """Join a folder of raw traffic in this process; seconds, peak memory in GB, and the sums that came out."""
    from monitoring.facts import per_user, read_facts
    from monitoring.store import update

    begun, worked = time.perf_counter(), time.process_time()
    counts = update(folder, folder / "store").counts
    joined, worked = time.perf_counter(), time.process_time() - worked
    users = per_user(read_facts(folder / "store"))
    return {
        "seconds_join": joined - begun, "processor_seconds_join": worked, "seconds_per_user_sums": time.perf_counter() - joined, "peak_gb": peak_bytes() / 1e9, "impressions": counts.impressions,
        "clicks": counts.clicks, "purchases": counts.purchases, "duplicates": counts.duplicate_events + counts.duplicate_impressions + counts.duplicate_requests,
        "revenue": float(users["revenue"].sum()), "gmv": float(users["gmv"].sum()),
    }  # fmt: skip


def events(count: int = 1_000_000, most_copies: int = 1, seed: int = 0) -> dict[str, Any]:
    """Join about `count` distinct raw events from Parquet into clean logs, and sum them per user, in a process of its own: its time and its memory."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        truth = write_raw_events(Path(folder), count, np.random.default_rng(seed), most_copies)
        code = f"import json; from pathlib import Path; from benchmarks.experiments import join_and_measure; print(json.dumps(join_and_measure(Path({folder!r}))))"
        answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        measured = json.loads(answer.stdout.splitlines()[-1])
    exact = all(measured[name] == truth[name] for name in ("impressions", "clicks", "purchases"))
    exact = exact and all(math.isclose(measured[name], truth[name], rel_tol=1e-9) for name in ("revenue", "gmv"))
    return {"events": truth["impressions"] + truth["clicks"] + truth["purchases"], "most_copies": most_copies, **measured, "equal_to_the_truth": exact}


def joins(seed: int = 0) -> dict[str, Any]:
    """A million distinct events, each delivered once, and each one to five times."""
    return {"table": [events(most_copies=copies, seed=seed) for copies in (1, 5)]}


EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {"ab": ab, "alarms": alarms, "events": joins}
