"""Feature snapshots: from a folder of logs to the feature store's sources, registry and online rows.

Legend: U users, S states (a user's history at some time), D days, A ads. Everything is computed from sorted arrays; the same
logs give the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from features.encoding import HISTORY_ARRAYS
from features.store import (
    SOURCES,
    apply_definitions,
    check_store,
    feast_folder,
    gather_histories,
    history_table,
    open_store,
    push_lock,
    push_locked,
    read_users,
    remove_store,
    source_path,
    write_snapshot,
)
from marketplace.creatives import best_creatives
from marketplace.logs import data_hash, has_table, read_table, write_parquet

if TYPE_CHECKING:
    from feast import FeatureStore

DAY_US = 86_400_000_000
_READ_CHUNK = 500


@dataclass(frozen=True)
class FeatureSnapshot:
    """What one `build_features` made; kept as `<home>/feast/snapshot.json`."""

    as_of: str
    """UTC time of the newest row, ISO 8601."""
    behaviours: int
    """L, length of the history arrays."""
    states: int
    """Rows of the user_behaviors source."""
    users: int
    """Users with an online history."""
    catalogue_rows: int
    """Rows of the ad_catalog source."""
    pushed_again: int
    """Behaviours newer than the logs that were pushed again after the materialise."""
    data_hash: str
    """Identity of the logs."""
    seconds: float
    """Wall-clock seconds of the build."""


def microseconds(column: pd.Series) -> np.ndarray:
    """A timestamp column as int64 microseconds since 1970 UTC."""
    return column.dt.as_unit("us").astype("int64").to_numpy()


def rows_before(users: np.ndarray, times: np.ndarray, asked_users: np.ndarray, asked_times: np.ndarray) -> np.ndarray:
    """For each asked (user, time), how many rows of the table sorted by (user, time) come strictly before it. int64.

    Times are replaced by their rank so that (user, time) packs into one integer whatever their sizes.
    """
    known = np.unique(times)
    stride = len(known) + 1
    user_ids = np.unique(users)
    table_key = np.searchsorted(user_ids, users) * stride + np.searchsorted(known, times)
    asked_key = np.searchsorted(user_ids, asked_users) * stride + np.searchsorted(known, asked_times)
    return np.searchsorted(table_key, asked_key)


def read_events(logs: Path) -> pd.DataFrame:
    """All behaviours with user_id, session_id and the HISTORY_ARRAYS columns, sorted by (user, time, behaviour_id)."""
    names = [name for name in HISTORY_ARRAYS if name != "time_us"]
    events = read_table(logs, "behaviours", columns=["event_timestamp", "user_id", "session_id", *names])
    events["time_us"] = microseconds(events.pop("event_timestamp"))
    return events.sort_values(["user_id", "time_us", "behaviour_id"], kind="stable", ignore_index=True)


def state_rows(events: pd.DataFrame, request_users: np.ndarray, request_times: np.ndarray) -> np.ndarray:
    """Rows of `events` at which a state ends: the last row strictly before each request, and every user's last row. Sorted, distinct."""
    users = events["user_id"].to_numpy()
    if not len(users):
        return np.empty(0, np.int64)
    last = rows_before(users, events["time_us"].to_numpy(), request_users, request_times) - 1
    seen = last[(last >= 0) & (users[last] == request_users)]
    final = np.flatnonzero(np.append(users[1:] != users[:-1], True))
    return np.unique(np.concatenate([seen, final]))


def catalogue_table(ads: pd.DataFrame, impressions: pd.DataFrame, creatives: pd.DataFrame | None = None) -> pa.Table:
    """Rows of the `ad_catalog` source: every ad and day, and the last day's ads once more for the day that follows the logs.

    `impressions` and `clicks` of a row count what was known when its day began: shows, and clicks by the time of the click. So does
    `shown_creative_id`, the choice of a selector that looks at one creative by itself: the best smoothed click rate among the ad's `creatives`.
    """
    last = ads["event_timestamp"].max()
    following = ads[ads["event_timestamp"] == last].assign(event_timestamp=last + timedelta(days=1))
    rows = pd.concat([ads, following], ignore_index=True).sort_values(["event_timestamp", "ad_id"], kind="stable", ignore_index=True)
    starts, day = np.unique(microseconds(rows["event_timestamp"]), return_inverse=True)
    ad_ids, ad = np.unique(rows["ad_id"].to_numpy(), return_inverse=True)

    def counts(known: np.ndarray, ids: pd.Series, when: pd.Series) -> np.ndarray:
        """[days + 1, known ids]: events before each day."""
        position = np.minimum(np.searchsorted(known, ids.to_numpy()), len(known) - 1)
        real = known[position] == ids.to_numpy()
        first_day = np.searchsorted(starts, microseconds(when), side="right")  # the first day that starts after the event
        cell = np.bincount(first_day[real] * len(known) + position[real], minlength=(len(starts) + 1) * len(known))
        return cell.reshape(len(starts) + 1, len(known)).cumsum(axis=0)

    clicked = impressions[impressions["click"] == 1]
    when = clicked["click_timestamp"].fillna(clicked["event_timestamp"])
    rows["impressions"] = counts(ad_ids, impressions["ad_id"], impressions["event_timestamp"])[day, ad]
    rows["clicks"] = counts(ad_ids, clicked["ad_id"], when)[day, ad]
    rows["shown_creative_id"] = rows["creative_id"]
    if creatives is not None:
        mine = creatives[creatives["ad_id"].isin(ad_ids)].sort_values("creative_id")
        known, owner = mine["creative_id"].to_numpy(), np.searchsorted(ad_ids, mine["ad_id"].to_numpy())
        shown, clicks = counts(known, impressions["creative_id"], impressions["event_timestamp"]), counts(known, clicked["creative_id"], when)
        best = best_creatives(shown, clicks, owner, len(ad_ids))[day, ad]
        rows["shown_creative_id"] = np.where(best >= 0, known[best], rows["creative_id"])
    rows["created"] = rows["event_timestamp"]
    return pa.Table.from_pandas(rows, schema=SOURCES["ad_catalog"], preserve_index=False).replace_schema_metadata(None)


def _write_sources(logs: Path, home: Path, behaviours: int) -> tuple[np.ndarray, int, int, int]:
    """Write the three sources. Returns: users with a history, rows of states and catalogue, newest time of all in microseconds."""
    events = read_events(logs)
    requests = read_table(logs, "requests", columns=["user_id", "event_timestamp"])
    ends = state_rows(events, requests["user_id"].to_numpy(), microseconds(requests["event_timestamp"]))
    users = events["user_id"].to_numpy()[ends]
    write_parquet(source_path(home, "user_behaviors"), history_table(users, gather_histories(events, ends, behaviours)))

    profiles = read_table(logs, "users").sort_values(["user_id", "event_timestamp"], kind="stable")
    profiles["created"] = profiles["event_timestamp"]
    write_parquet(source_path(home, "user_profile"), pa.Table.from_pandas(profiles, schema=SOURCES["user_profile"], preserve_index=False).replace_schema_metadata(None))

    impressions = read_table(logs, "impressions", columns=["event_timestamp", "ad_id", "creative_id", "click", "click_timestamp"])
    creatives = read_table(logs, "creatives") if has_table(logs, "creatives") else None
    catalogue = catalogue_table(read_table(logs, "ads"), impressions, creatives)
    if creatives is not None:
        rows = creatives.sort_values("creative_id", ignore_index=True).assign(created=lambda frame: frame["event_timestamp"])
        write_parquet(source_path(home, "ad_creatives"), pa.Table.from_pandas(rows, schema=SOURCES["ad_creatives"], preserve_index=False).replace_schema_metadata(None))
    write_parquet(source_path(home, "ad_catalog"), catalogue)
    newest = max(microseconds(frame["event_timestamp"]).max(initial=0) for frame in (requests, profiles))
    return np.unique(users), len(ends), len(catalogue), int(max(newest, events["time_us"].max() if len(events) else 0))


def _newer_than(store: FeatureStore, users: np.ndarray, time_us: int, behaviours: int) -> pd.DataFrame:
    """Behaviours in the online store that happened after the logs end, as rows of the behaviours table."""
    found = []
    for start in range(0, len(users), _READ_CHUNK):
        chunk = users[start : start + _READ_CHUNK]
        histories = read_users(store, chunk.tolist(), behaviours).histories
        rows, columns = np.nonzero(histories.time_us > time_us)
        found.append(pd.DataFrame({"user_id": chunk[rows], **{name: getattr(histories, name)[rows, columns] for name in HISTORY_ARRAYS}}))
    newer = pd.concat(found, ignore_index=True) if found else pd.DataFrame({name: [] for name in ("user_id", *HISTORY_ARRAYS)})
    newer["event_timestamp"] = pd.to_datetime(newer.pop("time_us"), unit="us", utc=True)
    return newer.assign(session_id=0)


def build_features(logs: Path, home: Path, behaviours: int = 64, fresh: bool = False, progress: Callable[[str], None] | None = None) -> FeatureSnapshot:
    """Make the feature store of `home` hold what the logs say: sources written, definitions applied, online views materialised.

    Args: logs, a validated folder of logs; behaviours, L, length of a user's history; fresh, forget what the home's store
    held before (simulated worlds: time starts again). Without `fresh`, behaviours that were pushed online after the logs end
    are kept: a materialise would overwrite them with older rows, as the online store keeps what is written last.
    """
    began = time.perf_counter()
    say = progress or (lambda text: None)
    if behaviours < 1:
        raise ValueError(f"behaviours must be at least 1, got {behaviours}")
    served_before = not fresh and feast_folder(home).exists()
    if fresh:
        remove_store(home)
    say("writing sources")
    users, states, catalogue_rows, newest_us = _write_sources(Path(logs), home, behaviours)
    say("applying definitions")
    store = open_store(home)
    apply_definitions(store)
    check_store(store)
    end = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=newest_us)
    with push_lock(store):  # what a service pushes between the read and the materialise would be lost
        newer = _newer_than(store, users, newest_us, behaviours) if served_before else None
        say("materialising")
        _materialise(store, end)
        if newer is not None and len(newer):
            push_locked(store, newer, behaviours)
    snapshot = FeatureSnapshot(
        as_of=end.isoformat(), behaviours=behaviours, states=states, users=len(users), catalogue_rows=catalogue_rows,
        pushed_again=0 if newer is None else len(newer), data_hash=data_hash(logs), seconds=round(time.perf_counter() - began, 3),
    )  # fmt: skip
    write_snapshot(home, asdict(snapshot))
    return snapshot


def _materialise(store: FeatureStore, end: datetime) -> None:
    """Bring the newest row of every user up to `end` into the online store; Feast's progress bars are kept off the terminal."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        store.materialize(datetime(1970, 1, 2, tzinfo=UTC), end, feature_views=["user_profile", "user_behaviors"])
