"""The live event log: every answered page and everything that users did with it, exactly once, on disk before the answer leaves.

SQLite in WAL mode, one transaction a page or batch of events. With `synchronous=FULL` (the default) a committed page survives
power loss; with NORMAL it survives a killed process, and power loss may take the last commits with it. Torn tails of the WAL
are dropped by SQLite's own checksums. Frames in the schema's columns come out again, so that live traffic is training input.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from marketplace.logs import with_defaults, write_manifest, write_table
from marketplace.schema import ACTION_CLICK, ACTION_PURCHASE, BEHAVIOURS, IMPRESSIONS, ORGANIC, REQUESTS, Table

SCHEMA_VERSION = 4
"""`user_version` of the database; 1 lacked `billing`, 2 lacked `event.pushed` and `shadow`, 3 lacked `organic`: all are brought up when opened; others are refused."""

_TABLES = """
CREATE TABLE IF NOT EXISTS request (
  request_id INTEGER PRIMARY KEY, body_sha256 TEXT NOT NULL, time_us INTEGER NOT NULL, received_us INTEGER NOT NULL,
  user_id INTEGER NOT NULL, session_id INTEGER NOT NULL, city_id INTEGER NOT NULL, latitude REAL NOT NULL, longitude REAL NOT NULL,
  utc_offset_minutes INTEGER NOT NULL, slots INTEGER NOT NULL, arm TEXT NOT NULL, model_version TEXT NOT NULL,
  price_mode TEXT NOT NULL, degraded TEXT NOT NULL, latency_ms REAL NOT NULL, answer TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS request_time ON request (time_us);
CREATE TABLE IF NOT EXISTS impression (
  request_id INTEGER NOT NULL, slot INTEGER NOT NULL, time_us INTEGER NOT NULL, user_id INTEGER NOT NULL, ad_id INTEGER NOT NULL,
  creative_id INTEGER NOT NULL, poi_id INTEGER NOT NULL, category_id INTEGER NOT NULL, latitude REAL NOT NULL, longitude REAL NOT NULL,
  bid REAL NOT NULL, payment REAL NOT NULL, pctr REAL NOT NULL, propensity REAL NOT NULL, receipt TEXT NOT NULL,
  PRIMARY KEY (request_id, slot)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS organic (
  request_id INTEGER NOT NULL, rank INTEGER NOT NULL, position INTEGER NOT NULL, poi_id INTEGER NOT NULL, category_id INTEGER NOT NULL,
  latitude REAL NOT NULL, longitude REAL NOT NULL, PRIMARY KEY (request_id, rank)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS billing (
  request_id INTEGER NOT NULL, slot INTEGER NOT NULL, billed REAL NOT NULL, PRIMARY KEY (request_id, slot)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS event (
  request_id INTEGER NOT NULL, slot INTEGER NOT NULL, type TEXT NOT NULL, time_us INTEGER NOT NULL, received_us INTEGER NOT NULL,
  order_value REAL NOT NULL, pushed INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (request_id, slot, type)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shadow (
  request_id INTEGER NOT NULL, model_version TEXT NOT NULL, latency_ms REAL NOT NULL, page TEXT NOT NULL,
  PRIMARY KEY (request_id, model_version)) WITHOUT ROWID;
"""
_INDICES = "CREATE INDEX IF NOT EXISTS event_unpushed ON event (received_us) WHERE pushed = 0;"

# `event.slot` is the rank of the organic result where the type is organic_click.
# `billing` holds the few clicks that cost less than the impression's payment, because a budget ended: 0 to payment, currency.
_SPENT = """
SELECT i.ad_id, SUM(COALESCE(b.billed, i.payment)) FROM event e JOIN impression i ON i.request_id = e.request_id AND i.slot = e.slot
LEFT JOIN billing b ON b.request_id = e.request_id AND b.slot = e.slot
WHERE e.type = 'click' AND e.time_us >= ? AND e.time_us < ? GROUP BY i.ad_id
"""
_SHOWN_AD = "SELECT ad_id, time_us, payment FROM impression WHERE request_id = ? AND slot = ?"
_SHOWN_ORGANIC = "SELECT NULL, r.time_us, 0.0 FROM organic o JOIN request r ON r.request_id = o.request_id WHERE o.request_id = ? AND o.rank = ?"
_IS_BEHAVIOUR = """(e.type IN ('click', 'organic_click') OR (e.type = 'purchase' AND EXISTS (
  SELECT 1 FROM event c WHERE c.request_id = e.request_id AND c.slot = e.slot AND c.type = 'click')))"""
"""Clicks, and purchases whose click is known; opening a creative is none (marketplace.worlds logs none either)."""
_DAY_US = 86_400_000_000

_CLICK, _PURCHASE, _CREATIVE, _ORGANIC = "click", "purchase", "creative_click", "organic_click"
_LOCK_WAIT_SECONDS = 3.0
"""Longest wait for another writer of the file before a page is refused."""


class EventLogError(RuntimeError):
    """The event log cannot be used; the text says why."""


class DuplicateRequest(Exception):
    """The request id is in the log already; the stored answer is attached."""

    def __init__(self, stored: StoredAnswer) -> None:
        super().__init__("request_id is in the event log already")
        self.stored = stored


@dataclass(frozen=True)
class StoredAnswer:
    """What was answered under a request id."""

    body_sha256: str
    """Identity of the request's content: the same id with another body is a conflict."""
    answer: dict[str, Any]
    """The response as it was sent."""


@dataclass(frozen=True)
class PageRecord:
    """One answered page. Times are UTC; arrays run over the slots shown, top first."""

    request_id: int
    body_sha256: str
    time: datetime
    received: datetime
    user_id: int
    session_id: int
    city_id: int
    latitude: float
    longitude: float
    utc_offset_minutes: int
    slots: int
    arm: str
    model_version: str
    price_mode: str
    degraded: tuple[str, ...]
    latency_ms: float
    answer: dict[str, Any]
    ad_id: np.ndarray
    creative_id: np.ndarray
    poi_id: np.ndarray
    category_id: np.ndarray
    ad_latitude: np.ndarray
    ad_longitude: np.ndarray
    bid: np.ndarray
    payment: np.ndarray
    pctr: np.ndarray
    propensity: np.ndarray
    receipts: list[dict[str, Any]]
    organic: Sequence[tuple[int, int, int, float, float]] = ()
    """(position on the whole page from 1, poi_id, category_id, latitude, longitude) of the page's organic results in their order."""


@dataclass(frozen=True)
class EventRecord:
    """An event as it came in. `time` None: when it was received."""

    type: Literal["click", "purchase", "creative_click", "organic_click"]
    request_id: int
    slot: int | None
    """None for an organic_click, which has a rank."""
    ad_id: int | None
    time: datetime | None
    order_value: float
    rank: int | None = None

    @property
    def place(self) -> int:
        """Slot of the ad or rank of the organic result: with request and type the event's key."""
        place = self.rank if self.type == _ORGANIC else self.slot
        if place is None:
            raise ValueError(f"{self.type} of request {self.request_id} lacks its {'rank' if self.type == _ORGANIC else 'slot'}")
        return place


Outcome = Literal["accepted", "duplicate", "unknown_impression", "ad_mismatch"]


def microseconds(time: datetime) -> int:
    """Whole microseconds since 1970, exact (float seconds are not)."""
    delta = time - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _connect(path: Path, synchronous: str) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=_LOCK_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in range(SCHEMA_VERSION + 1):
            raise EventLogError(f"{path} has format {version}, this release writes {SCHEMA_VERSION}; move it away or export it with its own release")
        # Events of a log before format 3 count as pushed: nobody pushed them then, and their users' features have moved on.
        upgrade = "ALTER TABLE event ADD COLUMN pushed INTEGER NOT NULL DEFAULT 0;UPDATE event SET pushed = 1;" if version in (1, 2) else ""
        connection.executescript(f"BEGIN IMMEDIATE;{_TABLES}{upgrade}{_INDICES}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise EventLogError(f"{path} cannot be used as the event log: {error}") from error
    except EventLogError:
        connection.close()
        raise
    return connection


class EventLog:
    """Writer of one process; several processes may write the same file. Safe to call from several threads."""

    def __init__(self, path: Path, synchronous: Literal["full", "normal"] = "full", budgets: Mapping[int, float] | None = None) -> None:
        """`budgets`: most that the clicks of an ad may cost in a UTC day, currency, by ad id; a click beyond is free."""
        self.path = Path(path)
        self.budgets = dict(budgets or {})
        self._spent: dict[int, dict[int, float]] = {}
        self._lock = threading.Lock()
        self._connection = _connect(self.path, synchronous.upper())

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def stored(self, request_id: int) -> StoredAnswer | None:
        """The answer given under this request id, if any."""
        with self._lock:
            return self._stored(request_id)

    def _stored(self, request_id: int) -> StoredAnswer | None:
        row = self._connection.execute("SELECT body_sha256, answer FROM request WHERE request_id = ?", (request_id,)).fetchone()
        return StoredAnswer(row[0], json.loads(row[1])) if row else None

    def write_page(self, page: PageRecord) -> None:
        """Store a page, its impressions and its organic results in one transaction; returns when it is durable.

        Raises DuplicateRequest, with nothing written, when the id is in the log: whoever comes second returns the first answer.
        """
        time_us = microseconds(page.time)
        request = (
            page.request_id, page.body_sha256, time_us, microseconds(page.received), page.user_id, page.session_id, page.city_id, page.latitude,
            page.longitude, page.utc_offset_minutes, page.slots, page.arm, page.model_version, page.price_mode, json.dumps(page.degraded),
            page.latency_ms, json.dumps(page.answer, allow_nan=False),
        )  # fmt: skip
        columns = (page.ad_id, page.creative_id, page.poi_id, page.category_id, page.ad_latitude, page.ad_longitude, page.bid, page.payment)
        measures = (np.asarray(page.pctr, np.float64), np.asarray(page.propensity, np.float64))
        listed = [column.tolist() for column in (*columns, *measures)]
        receipts = [json.dumps(receipt, allow_nan=False) for receipt in page.receipts]
        impressions = [
            (page.request_id, slot, time_us, page.user_id, *values, receipt)
            for slot, (*values, receipt) in enumerate(zip(*listed, receipts, strict=True), start=1)
        ]
        with self._lock, _Transaction(self._connection):
            stored = self._stored(page.request_id)
            if stored is not None:
                raise DuplicateRequest(stored)
            self._connection.execute(f"INSERT INTO request VALUES ({','.join('?' * 17)})", request)
            self._connection.executemany(f"INSERT INTO impression VALUES ({','.join('?' * 15)})", impressions)
            self._connection.executemany("INSERT INTO organic VALUES (?,?,?,?,?,?,?)", [(page.request_id, rank, *item) for rank, item in enumerate(page.organic, start=1)])

    def spent_since(self, midnight: datetime) -> dict[int, float]:
        """What each ad with a budget was charged for the clicks of the UTC day that begins then, currency."""
        with self._lock:
            return dict(self._spent_on(microseconds(midnight) // _DAY_US))

    def _spent_on(self, day: int) -> dict[int, float]:
        """Spend by ad of a day since 1970, read once and then kept up by this process; only ads with a budget."""
        if day not in self._spent:
            rows = self._connection.execute(_SPENT, (day * _DAY_US, (day + 1) * _DAY_US)).fetchall()
            self._spent[day] = {ad: spent for ad, spent in rows if ad in self.budgets}
        return self._spent[day]

    def _bill(self, request_id: int, slot: int, ad_id: int, payment: float, time_us: int) -> None:
        """Charge a click against the day's budget; what the budget does not hold is not charged."""
        spent = self._spent_on(time_us // _DAY_US)
        billed = min(payment, max(self.budgets[ad_id] - spent.get(ad_id, 0.0), 0.0))
        if billed < payment:
            self._connection.execute("INSERT OR REPLACE INTO billing VALUES (?,?,?)", (request_id, slot, billed))
        spent[ad_id] = spent.get(ad_id, 0.0) + billed

    def write_events(self, events: Sequence[EventRecord], received: datetime) -> list[Outcome]:
        """Store events in one transaction; returns what became of each, in order. Repeats change nothing.

        An event before its impression (a client's clock) is moved to the impression's time.
        """
        try:
            return self._write_events(events, microseconds(received))
        except BaseException:
            self._spent.clear()  # what was billed in memory was rolled back on disk
            raise

    def _write_events(self, events: Sequence[EventRecord], received_us: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        with self._lock, _Transaction(self._connection):
            for event in events:
                place = event.place
                shown = self._connection.execute(_SHOWN_ORGANIC if event.type == _ORGANIC else _SHOWN_AD, (event.request_id, place)).fetchone()
                if shown is None:
                    outcomes.append("unknown_impression")
                elif event.ad_id is not None and event.ad_id != shown[0]:
                    outcomes.append("ad_mismatch")
                else:
                    time_us = max(shown[1], received_us if event.time is None else microseconds(event.time))
                    value = event.order_value if event.type == _PURCHASE else 0.0
                    limited = event.type == _CLICK and shown[0] in self.budgets
                    if limited:
                        self._spent_on(time_us // _DAY_US)  # as it was before this click
                    pushed = int(event.type == _CREATIVE)  # no behaviour: nothing waits for the feature store
                    written = self._connection.execute(
                        "INSERT OR IGNORE INTO event VALUES (?,?,?,?,?,?,?)", (event.request_id, place, event.type, time_us, received_us, value, pushed)
                    ).rowcount
                    if written and limited:
                        self._bill(event.request_id, place, shown[0], shown[2], time_us)
                    outcomes.append("accepted" if written else "duplicate")
        return outcomes

    def unpushed(self, most: int = 1_000) -> tuple[pd.DataFrame, list[tuple[int, int, str]]]:
        """(BEHAVIOURS of the oldest events that the online feature store lacks, keys of those events for `mark_pushed`).

        A purchase without its click is no behaviour yet: it has a key and no row, and counts again once the click is known.
        """
        with self._lock:
            found = self._connection.execute(
                f"SELECT request_id, slot, type FROM event e WHERE pushed = 0 AND {_IS_BEHAVIOUR} ORDER BY received_us LIMIT ?", (most,)  # noqa: S608
            ).fetchall()
            keys = [(int(request), int(slot), str(kind)) for request, slot, kind in found]
            if not keys:
                return pd.DataFrame(), []
            names = ",".join(f"({request},{slot},'{kind}')" for request, slot, kind in keys)  # whole numbers and types of our own
            chosen = f"(e.request_id, e.slot, e.type) IN (VALUES {names})"
            frame = pd.read_sql_query(_BEHAVIOURS.format(where=chosen), self._connection)
        return _behaviours(frame), keys

    def mark_pushed(self, keys: Sequence[tuple[int, int, str]]) -> None:
        """The online feature store has these events now."""
        with self._lock, _Transaction(self._connection):
            self._connection.executemany("UPDATE event SET pushed = 1 WHERE request_id = ? AND slot = ? AND type = ?", keys)

    def write_shadow(self, request_id: int, model_version: str, latency_ms: float, page: list[dict[str, Any]]) -> None:
        """What another model would have shown for an answered request; a repeat changes nothing."""
        with self._lock, _Transaction(self._connection):
            self._connection.execute("INSERT OR IGNORE INTO shadow VALUES (?,?,?,?)", (request_id, model_version, latency_ms, json.dumps(page, allow_nan=False)))


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK on any exception."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.execute("ROLLBACK" if kind else "COMMIT")


# ---------------------------------------------------------------------------------------------------------------------
# Reading: frames in the schema's columns and types


def _read(path: Path, query: str, parameters: Iterable[Any] = ()) -> pd.DataFrame:
    if not Path(path).exists():
        raise EventLogError(f"there is no event log at {path}; serve some requests first")
    with closing(sqlite3.connect(f"file:{Path(path).absolute()}?mode=ro", uri=True, timeout=10.0)) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise EventLogError(f"{path} has format {version}, this release reads {SCHEMA_VERSION}; a service that opens it brings earlier formats up")
        return pd.read_sql_query(query, connection, params=tuple(parameters))


def _window(since: datetime | None, until: datetime | None, column: str) -> tuple[str, list[int]]:
    """SQL condition for times in [since, until), None = unbounded."""
    parts, values = ["1"], []
    if since is not None:
        parts.append(f"{column} >= ?")
        values.append(microseconds(since))
    if until is not None:
        parts.append(f"{column} < ?")
        values.append(microseconds(until))
    return " AND ".join(parts), values


def _times(micros: pd.Series) -> pd.Series:
    """UTC timestamps of whole microseconds since 1970; nulls stay nulls (nullable integers: a float would lose microseconds)."""
    return pd.to_datetime(micros.astype("Int64"), unit="us", utc=True).astype("datetime64[us, UTC]")


def _conform(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """The table's columns in its order and types."""
    frame = with_defaults(frame, table)
    kinds = {column.name: column.dtype.to_pandas_dtype() for column in table.columns if not str(column.dtype).startswith(("timestamp", "string"))}
    return frame[table.names].astype(kinds)


def read_requests(path: Path, since: datetime | None = None, until: datetime | None = None) -> pd.DataFrame:
    """REQUESTS of the event log, request time in [since, until), in time order."""
    where, values = _window(since, until, "time_us")
    frame = _read(path, f"SELECT * FROM request WHERE {where} ORDER BY time_us, request_id", values)  # noqa: S608 - no outside text
    frame["event_timestamp"] = _times(frame["time_us"])
    return _conform(frame, REQUESTS)


def read_service_facts(path: Path, since: datetime | None = None, until: datetime | None = None) -> pd.DataFrame:
    """What the logs' schema has no column for, one row a request: request_id, received (UTC), latency_ms, price_mode, degraded (list of str)."""
    where, values = _window(since, until, "time_us")
    query = f"SELECT request_id, received_us, latency_ms, price_mode, degraded FROM request WHERE {where} ORDER BY time_us, request_id"  # noqa: S608
    frame = _read(path, query, values)
    frame["received"] = _times(frame.pop("received_us"))
    frame["degraded"] = frame["degraded"].map(json.loads)
    return frame


_JOINED = """
SELECT i.*, c.time_us AS click_us, p.time_us AS purchase_us, p.order_value AS order_value, b.billed AS billed, o.type IS NOT NULL AS creative_click
FROM impression i
LEFT JOIN billing b ON b.request_id = i.request_id AND b.slot = i.slot
LEFT JOIN event c ON c.request_id = i.request_id AND c.slot = i.slot AND c.type = 'click'
LEFT JOIN event p ON p.request_id = i.request_id AND p.slot = i.slot AND p.type = 'purchase'
LEFT JOIN event o ON o.request_id = i.request_id AND o.slot = i.slot AND o.type = 'creative_click'
WHERE {where} ORDER BY i.time_us, i.request_id, i.slot
"""


def read_impressions(path: Path, since: datetime | None = None, until: datetime | None = None) -> pd.DataFrame:
    """IMPRESSIONS of the event log, with clicks, purchases and opened creatives joined. A purchase counts once its click is known, an opened
    creative by itself; `payment` is what the click was charged, less than its receipt says where a budget ended."""
    where, values = _window(since, until, "i.time_us")
    frame = _read(path, _JOINED.format(where=where), values)
    clicked = frame["click_us"].notna()
    bought = clicked & frame["purchase_us"].notna()
    frame["event_timestamp"] = _times(frame["time_us"])
    frame["payment"] = frame["billed"].where(frame["billed"].notna(), frame["payment"]).astype(float)
    frame["click"] = clicked.astype(int)
    frame["click_timestamp"] = _times(frame["click_us"])
    frame["purchase"] = bought.astype(int)
    frame["order_value"] = frame["order_value"].where(bought, 0.0)
    return _conform(frame, IMPRESSIONS)


def read_organic(path: Path, since: datetime | None = None, until: datetime | None = None) -> pd.DataFrame:
    """ORGANIC of the event log, with clicks joined; pages whose request named organic results, request time in [since, until)."""
    where, values = _window(since, until, "r.time_us")
    frame = _read(path, _ORGANIC_JOINED.format(where=where), values)
    frame["event_timestamp"] = _times(frame["time_us"])
    return _conform(frame, ORGANIC)


_ORGANIC_JOINED = """
SELECT o.*, r.time_us, r.user_id, e.type IS NOT NULL AS click
FROM organic o JOIN request r ON r.request_id = o.request_id
LEFT JOIN event e ON e.request_id = o.request_id AND e.slot = o.rank AND e.type = 'organic_click'
WHERE {where} ORDER BY r.time_us, o.request_id, o.rank
"""


def read_behaviours(path: Path, since: datetime | None = None, until: datetime | None = None) -> pd.DataFrame:
    """BEHAVIOURS that the clicks and purchases on ads and the clicks on organic results are, event time in [since, until).

    `behaviour_id` is a hash of (request_id, slot or rank, type) with bit 62 set: stable over exports and apart from small ids of other sources.
    """
    where, values = _window(since, until, "e.time_us")
    return _behaviours(_read(path, _BEHAVIOURS.format(where=where), values))


_BEHAVIOURS = f"""
SELECT e.request_id, e.slot, e.type, e.time_us, r.user_id, r.session_id, COALESCE(i.poi_id, o.poi_id) AS poi_id,
  COALESCE(i.category_id, o.category_id) AS category_id, COALESCE(i.latitude, o.latitude) AS latitude,
  COALESCE(i.longitude, o.longitude) AS longitude, COALESCE(i.creative_id, 0) AS creative_id
FROM event e JOIN request r ON r.request_id = e.request_id
LEFT JOIN impression i ON e.type <> 'organic_click' AND i.request_id = e.request_id AND i.slot = e.slot
LEFT JOIN organic o ON e.type = 'organic_click' AND o.request_id = e.request_id AND o.rank = e.slot
WHERE {{where}} AND {_IS_BEHAVIOUR} ORDER BY e.time_us, e.request_id, e.slot, e.type
"""


def _behaviours(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of _BEHAVIOURS as the behaviours table."""
    frame["event_timestamp"] = _times(frame["time_us"])
    frame["action"] = np.where(frame["type"] == _PURCHASE, ACTION_PURCHASE, ACTION_CLICK)
    names = zip(frame["request_id"], frame["slot"], frame["type"], strict=True)
    frame["behaviour_id"] = np.array([_behaviour_id(*name) for name in names], dtype=np.int64)
    return _conform(frame, BEHAVIOURS)


def read_shadow(path: Path) -> pd.DataFrame:
    """Shadow pages, one row an ad: request_id, model_version, latency_ms, slot, ad_id, pctr, price."""
    frame = _read(path, "SELECT * FROM shadow ORDER BY request_id, model_version")
    rows = [
        {"request_id": request, "model_version": version, "latency_ms": latency, "slot": slot, **ad}
        for request, version, latency, page in frame.itertuples(index=False)
        for slot, ad in enumerate(json.loads(page), start=1)
    ]
    return pd.DataFrame(rows, columns=["request_id", "model_version", "latency_ms", "slot", "ad_id", "pctr", "price"])


def _behaviour_id(request_id: int, slot: int, kind: str) -> int:
    digest = hashlib.sha256(f"{request_id}:{slot}:{kind}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2 | 1 << 62


def read_receipts(path: Path, since: datetime | None = None, until: datetime | None = None) -> list[dict[str, Any]]:
    """Price receipts of the ads shown, one JSON object each, in time and slot order."""
    where, values = _window(since, until, "time_us")
    frame = _read(path, f"SELECT receipt FROM impression WHERE {where} ORDER BY time_us, request_id, slot", values)  # noqa: S608
    return [json.loads(receipt) for receipt in frame["receipt"]]


def export_logs(path: Path, out: Path, since: datetime | None = None, until: datetime | None = None, **tables: pd.DataFrame | None) -> dict[str, int]:
    """Write live traffic as a folder of logs (`ega run CONFIG --logs OUT`); returns rows written by table.

    The event log knows requests, impressions, organic results (a table only where there were any) and behaviours (clicks on both, purchases).
    A complete folder also needs the catalogue, the profiles and, where ads have several, the creatives: pass them as `ads=`, `users=` and
    `creatives=` frames in the schema's columns (`features.store.load_creatives` gives the creatives; None: none), or add them to the folder. Further behaviours (visits from elsewhere) may be passed as `behaviours=`; they are joined by `behaviour_id`.
    """
    frames = {
        "requests": read_requests(path, since, until),
        "impressions": read_impressions(path, since, until),
        "behaviours": read_behaviours(path, since, until),
    }
    organic = read_organic(path, since, until)
    if len(organic):
        frames["organic"] = organic
    tables = {name: frame for name, frame in tables.items() if frame is not None}
    if "behaviours" in tables:
        joined = pd.concat([with_defaults(tables.pop("behaviours"), BEHAVIOURS)[BEHAVIOURS.names], frames["behaviours"]], ignore_index=True)
        frames["behaviours"] = joined.drop_duplicates("behaviour_id", keep="last", ignore_index=True)
    frames |= tables
    for name, frame in frames.items():
        if len(frame):
            write_table(out, name, frame)
    rows = {name: len(frame) for name, frame in frames.items()}
    write_manifest(out, {"source": "event log", "rows": rows})
    return rows
