"""Raw traffic to clean logs, a day at a time: each record once, outcomes joined, what did not fit counted.

Input is what a platform collects: folders `requests/` and `impressions/` in the schema of the logs and `events/` with EVENTS, partitioned by
the day of the record's own time, with any number of copies in any order. Output is a folder in the schema of the training logs, so that
monitored traffic is the next run's input. A day is written again only when one of its inputs changed, and `store.json` keeps the digests and
the counts. Days that do not fit in memory are joined in buckets of request ids, as Dask tasks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from marketplace import logs
from marketplace.schema import IMPRESSIONS, OPTIONAL_TABLES, REQUESTS, TIMESTAMP
from monitoring.facts import Counts, build_facts, join_events

EVENTS = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
        pa.field("event_timestamp", TIMESTAMP, nullable=False),
        pa.field("order_value", pa.float64(), nullable=False),
    ]
)
"""Raw outcome events: kind "click" or "purchase"; order_value in currency, 0 for clicks."""

STATE = "store.json"
ROWS_AT_ONCE = 500_000
"""Rows of one task; a day with more is joined in buckets of request ids."""
LOOK_BACK_DAYS = 7
"""An event whose impression is older than this counts as an orphan, not as late."""


@dataclass(frozen=True)
class Update:
    """What an update did."""

    days: list[date]
    """Days of the store, in order."""
    written: list[date]
    """Those that were joined (again) now."""
    counts: Counts
    """Over all days of the store."""


def _files(raw: Path, table: str, days: Iterable[date]) -> list[Path]:
    return [file for day in days for file in sorted((raw / table / f"day={day}").glob("*.parquet")) if not file.name.startswith(".")]


def write_events(root: Path, events: pd.DataFrame, name: str = "part-0") -> None:
    """Write raw events as `<root>/events/day=YYYY-MM-DD/<name>.parquet` by the day of their own time; a file of the same name is replaced."""
    wrong = sorted(set(events["kind"]) - {"click", "purchase"})
    if wrong:
        raise logs.LogError(f"events: kind must be click or purchase, got {wrong[0]!r}")
    for day, rows in events.groupby(events["event_timestamp"].dt.date):
        table = pa.Table.from_pandas(rows[EVENTS.names], schema=EVENTS, preserve_index=False)
        logs.write_parquet(Path(root) / "events" / f"day={day}" / f"{name}.parquet", table)


_DEFAULTS = {column.name: column.default for column in IMPRESSIONS.columns if column.default is not None}


def _read(files: list[Path], schema: pa.Schema, bucket: int, buckets: int) -> pd.DataFrame:
    """Rows of the files whose request id falls into a bucket, batch by batch; page checksums are verified."""
    parts = []
    for file in files:
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                lacking = [name for name in schema.names if name not in parquet.schema_arrow.names]
                if missing := [name for name in lacking if name not in _DEFAULTS]:
                    raise logs.LogError(f"{file}: column {missing[0]!r} is missing; wanted {', '.join(schema.names)}")
                for batch in parquet.iter_batches(columns=[name for name in schema.names if name not in lacking]):
                    table = pa.Table.from_batches([batch])
                    for name in lacking:
                        table = table.append_column(name, pa.repeat(pa.scalar(_DEFAULTS[name], schema.field(name).type), len(table)))
                    table = table.select(schema.names).cast(schema)
                    if buckets > 1:
                        table = table.filter(pc.equal(pc.bit_wise_and(table["request_id"], buckets - 1), bucket))
                    parts.append(table)
        except (pa.ArrowInvalid, OSError) as error:
            raise logs.LogError(f"{file}: cannot be read as Parquet of the wanted columns (truncated or damaged file?): {error}") from error
    return (pa.concat_tables(parts) if parts else schema.empty_table()).to_pandas()


def _span(day: date, before: int, after: int) -> list[date]:
    return [day + timedelta(days=shift) for shift in range(-before, after + 1)]


def _inputs(raw: Path, day: date, window_hours: float) -> dict[str, list[Path]]:
    """Files that a day's facts depend on: a page may be shown after its request's midnight, a click comes up to the window later, a clock may be an hour early."""
    return {
        "requests": _files(raw, "requests", _span(day, 1, 0)),
        "impressions": _files(raw, "impressions", [day]),
        "events": _files(raw, "events", _span(day, 1, ceil(window_hours / 24))),
        "nearby": _files(raw, "impressions", _span(day, LOOK_BACK_DAYS, 1)),
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(raw: Path, inputs: dict[str, list[Path]], window_hours: float) -> str:
    lines = [f"window {window_hours}"]
    for files in inputs.values():
        for file in files:
            lines.append(f"{file.relative_to(raw)} {_sha256(file)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _join_bucket(raw: Path, out: Path, day: date, window_hours: float, bucket: int, buckets: int) -> Counts:
    """One task: the facts of a day's bucket, written as a part of the day; returns what was counted."""
    inputs = _inputs(raw, day, window_hours)
    start, end = (pd.Timestamp(day, tz="UTC") + pd.Timedelta(days=shift) for shift in (0, 1))
    requests = _read(inputs["requests"], REQUESTS.arrow, bucket, buckets)
    impressions = _read(inputs["impressions"], IMPRESSIONS.arrow, bucket, buckets)
    events = _read(inputs["events"], EVENTS, bucket, buckets)
    facts = build_facts(requests, impressions, window_hours, events)
    today = requests[(requests["event_timestamp"] >= start) & (requests["event_timestamp"] < end)]
    unique = facts.requests[(facts.requests["event_timestamp"] >= start) & (facts.requests["event_timestamp"] < end)]
    for table, rows in (("requests", unique), ("impressions", facts.impressions)):
        if not _files(raw, table, [day]):
            continue  # a day after the last page, on which late clicks arrived
        arrow = logs.table_of(table).arrow
        written = pa.Table.from_pandas(rows[arrow.names].sort_values(["event_timestamp", "request_id"], kind="stable"), schema=arrow, preserve_index=False)
        logs.write_parquet(out / table / f"part-{bucket}.parquet", written.replace_schema_metadata(None))
    # What became of the events of this day, whichever day their impression is of.
    own = events[(events["event_timestamp"] >= start) & (events["event_timestamp"] < end)]
    tally = Counts()
    if len(own):
        nearby = _read(inputs["nearby"], pa.schema([IMPRESSIONS[name].field() for name in ("request_id", "slot", "event_timestamp", "ad_id", "payment", "bid")]), bucket, buckets)
        _, tally = join_events(nearby, own, window_hours)
    counted = facts.counts
    return Counts(
        requests=len(unique),
        impressions=len(facts.impressions),
        clicks=int(facts.impressions["click"].sum()),
        purchases=int(facts.impressions["purchase"].sum()),
        duplicate_requests=len(today) - len(unique),
        duplicate_impressions=counted.duplicate_impressions,
        duplicate_events=tally.duplicate_events,
        conflicting_impressions=counted.conflicting_impressions,
        orphan_impressions=counted.orphan_impressions,
        orphan_clicks=tally.orphan_clicks,
        orphan_purchases=tally.orphan_purchases,
        late_events=tally.late_events,
        skewed_events=tally.skewed_events,
        impossible_events=tally.impossible_events,
        prices_above_bid=counted.prices_above_bid,
    )


def add_counts(parts: Iterable[Counts]) -> Counts:
    """The sum, field by field."""
    parts = list(parts)
    return Counts(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(Counts)})


def replace_folder(part: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one; a reader may see neither for a moment, never half."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def _rows(files: list[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += pq.read_metadata(file).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise logs.LogError(f"{file}: cannot be read as Parquet (truncated or damaged file?): {error}; write the file again") from error
    return total


def _event_days(raw: Path) -> set[date]:
    found = set()
    for folder in (raw / "events").glob("day=*"):
        try:
            found.add(date.fromisoformat(folder.name.removeprefix("day=")))
        except ValueError:
            raise logs.LogError(f"{folder}: not a day partition; folders of events are named day=YYYY-MM-DD") from None
    return found


def _state(out: Path) -> dict[str, Any]:
    path = out / STATE
    try:
        return json.loads(path.read_text())["days"] if path.is_file() else {}
    except (ValueError, KeyError) as error:
        raise logs.LogError(f"{path} is not the state of a store ({error}); delete {out} and update it again") from error


def counts_of(folder: Path) -> Counts | None:
    """What the joins of a store counted; None for a folder of logs that `update` did not write."""
    days = _state(Path(folder))
    return add_counts(Counts(**day["counts"]) for day in days.values()) if days else None


def update(raw: Path, out: Path, window_hours: float = 24.0, rows_at_once: int = ROWS_AT_ONCE, workers: int = 2, progress: bool = False) -> Update:
    """Bring the store `out` up to the raw traffic: new and changed days are joined, others are left as they are.

    Args: raw and out, folders, see the module's text; rows_at_once, bound of one task's rows (memory: about 400 bytes a row and worker).
    The other tables of the raw traffic (ads, users, behaviours and the optional ones) are taken over as they are. Raises LogError for damaged files.
    """
    import dask

    raw, out = Path(raw), Path(out)
    days = sorted({day for table in ("requests", "impressions") for day in logs.days_of(raw, table)} | _event_days(raw))
    state, written = _state(out), []
    tables = [table for table in ("ads", "users", "behaviours", *OPTIONAL_TABLES) if (raw / table).is_dir()]
    carried = [(file, out / file.relative_to(raw)) for table in tables for file in sorted((raw / table).glob("*/*.parquet")) if not file.name.startswith(".")]
    changed = [(file, kept) for file, kept in carried if not (kept.is_file() and _sha256(file) == _sha256(kept))]
    for day in tqdm(days, desc="join events", unit="day", disable=not progress):
        inputs = _inputs(raw, day, window_hours)
        digest = _digest(raw, inputs, window_hours)
        if state.get(str(day), {}).get("digest") == digest:
            continue
        (out / logs.MANIFEST).unlink(missing_ok=True)  # whoever is stopped from here on leaves a store without a manifest, never with a wrong one
        rows = _rows(inputs["impressions"] + inputs["events"])
        buckets = 1 << max(0, int(np.ceil(np.log2(max(1, rows) / rows_at_once))))
        part = out / f".{day}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            tasks = [dask.delayed(_join_bucket)(raw, part, day, window_hours, bucket, buckets) for bucket in range(buckets)]
            counts = add_counts(dask.compute(*tasks, scheduler="threads", num_workers=workers))
            for table in (name for name in ("requests", "impressions") if (part / name).is_dir()):
                replace_folder(part / table, out / table / f"day={day}")
        finally:
            shutil.rmtree(part, ignore_errors=True)
        state[str(day)] = {"digest": digest, "counts": asdict(counts)}
        logs.write_bytes(out / STATE, (json.dumps({"days": dict(sorted(state.items()))}, indent=1) + "\n").encode())
        written.append(day)
    if changed:
        (out / logs.MANIFEST).unlink(missing_ok=True)
    for file, kept in changed:
        logs.write_bytes(kept, file.read_bytes())
    if not (out / logs.MANIFEST).is_file():
        logs.write_manifest(out, {"source": "raw traffic", "rows": {"days": len(days)}})
    kept = sorted(date.fromisoformat(day) for day in state)
    return Update(kept, written, add_counts(Counts(**state[str(day)]["counts"]) for day in kept))
