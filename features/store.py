"""The feature store of one home: opening it, point-in-time joins, online reads, pushes, the catalogue and ad embeddings.

The store lives in `<home>/feast/`: `registry.db`, `online.db` (or Redis: `EGA_REDIS`) and the Parquet sources under `data/`. Feast
(slow to import) is imported inside functions. Types of every source derive from `marketplace.schema`.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.encoding import HISTORY_ARRAYS, PROFILE_COLUMNS, Histories, Profiles
from marketplace.logs import with_defaults, write_bytes, write_parquet
from marketplace.schema import ADS, BEHAVIOURS, CREATIVES, IMPRESSIONS, TIMESTAMP, USERS

if TYPE_CHECKING:
    from feast import FeatureStore

REPOSITORY = Path(__file__).resolve().parents[1] / "feature_repo"
REDIS_VARIABLE = "EGA_REDIS"
"""Environment variable that moves the online rows to Redis: 'host:port[,db=N][,password=...][,ssl=true]', one database a home."""
PUSH_SOURCE = "user_behaviors_push"
RANKING_SERVICE = "ega_v1_ranking"
VIEWS = ("user_profile", "user_behaviors", "ad_catalog", "ad_creatives", "ad_embeddings")
SNAPSHOT = "snapshot.json"
EMBEDDING_VERSIONS_KEPT = 3
"""Model versions whose ad embeddings stay in the offline view."""

_CREATED = pa.field("created", TIMESTAMP, nullable=False)
_LISTS = {name: pa.list_(pa.from_numpy_dtype(np.dtype(dtype))) for name, dtype in HISTORY_ARRAYS.items()}

SOURCES: dict[str, pa.Schema] = {
    "user_profile": USERS.arrow.append(_CREATED),
    "user_behaviors": pa.schema(
        [USERS["event_timestamp"].field(), USERS["user_id"].field(), _CREATED, pa.field("behaviour_count", pa.int64(), nullable=False)]
        + [pa.field(name, dtype, nullable=False) for name, dtype in _LISTS.items()]
    ),
    "ad_catalog": pa.schema(
        [*ADS.arrow, *(pa.field(name, pa.int64(), nullable=False) for name in ("impressions", "clicks")), IMPRESSIONS["creative_id"].field().with_name("shown_creative_id"), _CREATED]
    ),
    "ad_creatives": CREATIVES.arrow.append(_CREATED),
    "ad_embeddings": pa.schema(
        [ADS["event_timestamp"].field(), ADS["ad_id"].field(), _CREATED, pa.field("embedding", pa.list_(pa.float32())), pa.field("model_version", pa.string())]
    ),
}
"""Columns and types of the Parquet file behind each view. Lists of `user_behaviors` are stored with a fixed width L.

`created` is when the platform knew the row; the logs are written as things happen, so it is the row's own time."""


def feast_folder(home: Path) -> Path:
    return Path(home) / "feast"


def source_path(home: Path, view: str) -> Path:
    """The Parquet file behind a view."""
    return feast_folder(home) / "data" / f"{view}.parquet"


_TOKENS = threading.Lock()
_NAMED_BY_CONTENT_BYTES = 100_000


def _name_arrays_by_identity() -> None:
    """Stop Dask from hashing whole columns to name each step of a join.

    Feast calls `persist` a dozen times, and each names its data by content: with 45,000 rows of seven arrays that took minutes a
    step (object columns are pickled), and half of a join's time for plain numbers. A random name takes none. Names only serve to
    share equal graphs, so results cannot change.
    """
    from dask.tokenize import normalize_token

    with _TOKENS:
        by_content = normalize_token.dispatch(np.ndarray)
        if getattr(by_content, "by_identity", False):
            return

        def name(array: np.ndarray) -> Any:
            return uuid.uuid4().hex if array.dtype.hasobject or array.nbytes > _NAMED_BY_CONTENT_BYTES else by_content(array)

        name.by_identity = True  # type: ignore[attr-defined]
        normalize_token.register(np.ndarray, name)


def _import_feast() -> None:
    """Import Feast without typeguard, which recompiles every method of Feast's classes at import: half of 10 seconds of CPU, in
    every step and service that opens a store. Its checks are for who calls Feast by hand; ours is called from typed code."""
    import typeguard

    checked = typeguard.typechecked
    typeguard.typechecked = lambda target=None, **_: (lambda function: function) if target is None else target
    try:
        import feast  # noqa: F401
    finally:
        typeguard.typechecked = checked


def open_store(home: Path, patience_seconds: float | None = None) -> FeatureStore:
    """The feature store of a home, from feature_repo/feature_store.yaml with its files under `<home>/feast/`.

    With EGA_REDIS set the online rows are in Redis (feature_store_redis.yaml). `patience_seconds`: longest wait for Redis, and no
    retries, so that a read that cannot succeed ends (retries take 8 s); None waits as Feast does, right for bulk writes.
    """
    import yaml

    _import_feast()
    from feast import FeatureStore, RepoConfig

    _name_arrays_by_identity()
    folder = feast_folder(home).resolve()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    redis = os.environ.get(REDIS_VARIABLE)
    config = yaml.safe_load((REPOSITORY / ("feature_store_redis.yaml" if redis else "feature_store.yaml")).read_text())
    config["registry"]["path"] = f"sqlite:///{folder / 'registry.db'}"
    if redis:
        limits = "" if patience_seconds is None else f",socket_timeout={patience_seconds},socket_connect_timeout={patience_seconds},retry=null"
        config["online_store"]["connection_string"] = redis + limits
    else:
        config["online_store"]["path"] = str(folder / "online.db")
    return FeatureStore(config=RepoConfig(**config, repo_path=folder))


def apply_definitions(store: FeatureStore) -> None:
    """Register feature_repo/definitions.py, as `feast apply` does."""
    from feature_repo import definitions

    store.apply(definitions.OBJECTS)


def check_store(store: FeatureStore) -> None:
    """Raise RuntimeError unless every view is registered: an empty or cut registry answers None for everything, without an error."""
    found = {view.name for view in store.list_feature_views()}
    missing = [name for name in VIEWS if name not in found]
    if missing:
        raise RuntimeError(f"feature store {store.config.repo_path} lacks the views {', '.join(missing)}; build the features again (`ega run`)")


def join_as_of(store: FeatureStore, rows: pd.DataFrame, features: list[str], keys: list[str]) -> pd.DataFrame:
    """Feature values as of each row's event_timestamp; keeps every row and its order. One feature view per call.

    The file offline store drops rows that share key and time or that precede the first value, and reorders the rest
    (feast issue 6787); a value corrected later must not leak either. Hence the distinct ask, the merge and the count.
    """
    asked = rows[[*keys, "event_timestamp"]].drop_duplicates()
    found = store.get_historical_features(entity_df=asked, features=features, filter_by_created_timestamp=True).to_df()
    joined = rows.merge(found, on=[*keys, "event_timestamp"], how="left", validate="m:1")
    if len(joined) != len(rows):
        raise RuntimeError(f"point-in-time join of {features[0].split(':')[0]} returned {len(joined)} rows for {len(rows)}")
    return joined


def _history_from(count: Sequence[int | None], columns: dict[str, Sequence[Any]], length: int) -> Histories:
    """Histories of width `length` from one list (or None) a row and array; longer lists lose their oldest, shorter are padded."""
    empty = Histories.empty(len(count), length)
    known = np.array([value is not None and value == value for value in count], bool)  # NaN is not equal to itself
    rows = np.flatnonzero(known)
    if len(rows):
        empty.count[rows] = np.minimum(np.array([count[row] for row in rows], np.int64), length)
        for name, dtype in HISTORY_ARRAYS.items():
            stored = np.stack([np.asarray(columns[name][row], dtype) for row in rows])
            width = min(stored.shape[1], length)
            getattr(empty, name)[rows, :width] = stored[:, :width]
    return empty


def _profile_from(columns: dict[str, Sequence[Any]]) -> Profiles:
    rows = len(columns["age_band"])
    profiles = Profiles.unknown(rows)
    known = np.array([value is not None and value == value for value in columns["age_band"]], bool)
    profiles.known[known] = True
    for name in PROFILE_COLUMNS:
        getattr(profiles, name)[known] = [value for value, real in zip(columns[name], known, strict=True) if real]
    return profiles


def profiles_as_of(store: FeatureStore, user_ids: np.ndarray, time_us: np.ndarray) -> Profiles:
    """Profiles that held at each row's time (a profile holds from its own instant on)."""
    rows = pd.DataFrame({"user_id": user_ids, "event_timestamp": pd.to_datetime(time_us, unit="us", utc=True)})
    joined = join_as_of(store, rows, [f"user_profile:{name}" for name in PROFILE_COLUMNS], ["user_id"])
    return _profile_from({name: joined[name].to_numpy() for name in PROFILE_COLUMNS})


def histories_as_of(store: FeatureStore, user_ids: np.ndarray, time_us: np.ndarray, behaviours: int) -> Histories:
    """The newest `behaviours` of each user strictly before each row's time.

    The join itself is inclusive; asking one microsecond earlier (the logs' resolution) leaves out what happened in the same instant.
    """
    rows = pd.DataFrame({"user_id": user_ids, "event_timestamp": pd.to_datetime(np.asarray(time_us, np.int64) - 1, unit="us", utc=True)})
    names = ["behaviour_count", *HISTORY_ARRAYS]
    joined = join_as_of(store, rows, [f"user_behaviors:{name}" for name in names], ["user_id"])
    return _history_from(joined["behaviour_count"].to_numpy(), {name: joined[name].to_numpy() for name in HISTORY_ARRAYS}, behaviours)


@dataclass(frozen=True)
class UserFeatures:
    """Online features of R users; a user without a profile or behaviours has the documented defaults."""

    profiles: Profiles
    histories: Histories
    newest_us: np.ndarray
    """int64 [R], time of the newest known behaviour in microseconds since 1970 UTC, 0 for none; callers apply their own age limit."""

    @classmethod
    def unknown(cls, behaviours: int, rows: int = 1) -> UserFeatures:
        """The default for unknown users, and for reads that failed."""
        return cls(Profiles.unknown(rows), Histories.empty(rows, behaviours), np.zeros(rows, np.int64))


def read_users(store: FeatureStore, user_ids: Sequence[int], behaviours: int = 64) -> UserFeatures:
    """Online features of R users in one read, in the given order; unknown users get the default."""
    names = [f"user_profile:{name}" for name in PROFILE_COLUMNS] + [f"user_behaviors:{name}" for name in ("behaviour_count", *HISTORY_ARRAYS)]
    found = store.get_online_features(features=names, entity_rows=[{"user_id": int(user)} for user in user_ids]).to_dict()
    histories = _history_from(found["behaviour_count"], found, behaviours)
    newest = histories.time_us[:, 0].copy() if behaviours else np.zeros(len(user_ids), np.int64)
    return UserFeatures(_profile_from(found), histories, newest)


def read_user(store: FeatureStore, user_id: int, behaviours: int = 64) -> UserFeatures | None:
    """Online features of one user as arrays of one row, or None for a user that the store does not know."""
    found = read_users(store, [user_id], behaviours)
    return found if found.profiles.known[0] or found.histories.count[0] else None


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def history_table(user_ids: np.ndarray, histories: Histories) -> pa.Table:
    """Rows of the `user_behaviors` source: one state a row, dated by its newest behaviour; fixed-width lists."""
    when = pa.array(histories.time_us[:, 0]).cast(TIMESTAMP)
    columns: dict[str, pa.Array] = {"event_timestamp": when, "user_id": pa.array(user_ids, pa.int64()), "created": when, "behaviour_count": pa.array(histories.count)}
    for name in HISTORY_ARRAYS:
        values = getattr(histories, name)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])
    return pa.table({name: columns[name] for name in SOURCES["user_behaviors"].names})


@contextmanager
def push_lock(store: FeatureStore) -> Iterator[None]:
    """One push at a time over all threads and processes of this home: a push reads a user's state, adds to it and writes it back."""
    with open(Path(store.config.repo_path) / "push.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _merge_histories(stored: Histories, frame: pd.DataFrame, user_ids: np.ndarray, behaviours: int) -> tuple[np.ndarray, Histories]:
    """States of the users with the frame's behaviours added in event order, newest L kept; known behaviours are not added twice."""
    rows, columns = np.nonzero(np.arange(stored.time_us.shape[1]) < stored.count[:, None])
    old = pd.DataFrame({"user_id": user_ids[rows], **{name: getattr(stored, name)[rows, columns] for name in HISTORY_ARRAYS}})
    new = frame.assign(time_us=frame["event_timestamp"].dt.as_unit("us").astype("int64"))[["user_id", *HISTORY_ARRAYS]]
    together = pd.concat([old, new], ignore_index=True).drop_duplicates(["user_id", "behaviour_id"], keep="first")
    return newest_histories(together, behaviours)


def newest_histories(events: pd.DataFrame, behaviours: int) -> tuple[np.ndarray, Histories]:
    """Every user's final state. Args: events with user_id and the HISTORY_ARRAYS columns. Returns: user ids [R] and their histories."""
    events = events.sort_values(["user_id", "time_us", "behaviour_id"], kind="stable")
    users = events["user_id"].to_numpy()
    last = np.flatnonzero(np.append(users[1:] != users[:-1], True))
    return users[last], gather_histories(events, last, behaviours)


def gather_histories(events: pd.DataFrame, last: np.ndarray, behaviours: int) -> Histories:
    """States that end at the given rows of events sorted by (user, time, behaviour_id): the newest `behaviours` up to that row."""
    users = events["user_id"].to_numpy()
    first = np.searchsorted(users, users[last])  # first row of the same user
    row = last[:, None] - np.arange(behaviours)
    real = row >= first[:, None]
    row = np.where(real, row, 0)
    arrays = {name: np.where(real, events[name].to_numpy().astype(dtype)[row], dtype(0)) for name, dtype in HISTORY_ARRAYS.items()}
    return Histories(real.sum(axis=1), **arrays)


def push_behaviours(store: FeatureStore, frame: pd.DataFrame, behaviours: int = 64) -> int:
    """Add behaviours to the online state of their users; returns how many users were written.

    The online store keeps whatever was written last, so a late event must not replace a newer state: each push reads the state,
    merges by (time, behaviour_id), and writes the newest `behaviours`. Safe to repeat: a behaviour_id counts once.

    Args: frame with the columns of the behaviours table, in any order of events.
    """
    frame = with_defaults(frame, BEHAVIOURS)
    missing = [name for name in BEHAVIOURS.names if name not in frame.columns]
    if missing:
        raise ValueError(f"push_behaviours: column {missing[0]!r} is missing; wanted the behaviours table ({', '.join(BEHAVIOURS.names)})")
    if frame.empty:
        return 0
    with push_lock(store):
        return push_locked(store, frame, behaviours)


def push_locked(store: FeatureStore, frame: pd.DataFrame, behaviours: int) -> int:
    """`push_behaviours` for a caller that holds the push lock."""
    from feast.data_source import PushMode

    users = np.unique(frame["user_id"].to_numpy())
    stored = read_users(store, users.tolist(), behaviours).histories
    user_ids, merged = _merge_histories(stored, frame, users, behaviours)
    store.push(PUSH_SOURCE, history_table(user_ids, merged).to_pandas(), to=PushMode.ONLINE)
    return len(user_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Ads


def _read_source(home: Path, view: str, remedy: str) -> pa.Table:
    path = source_path(home, view)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {remedy}")
    return pq.read_table(path, page_checksum_verification=True)


def load_catalogue_days(home: Path) -> pd.DataFrame:
    """The `ad_catalog` view: every ad and day with impressions and clicks counted up to its start, and the day that follows the logs."""
    frame = _read_source(home, "ad_catalog", "build the features first").to_pandas()
    if "shown_creative_id" not in frame:
        raise ValueError(f"{source_path(home, 'ad_catalog')} was written by an earlier release (no column shown_creative_id); build the features again (`ega run`)")
    return frame


def load_catalogue(home: Path) -> pd.DataFrame:
    """The current ads, by ad_id: the newest day of the `ad_catalog` view."""
    frame = load_catalogue_days(home)
    current = frame[frame["event_timestamp"] == frame["event_timestamp"].max()]
    return current.drop(columns="created").sort_values("ad_id", ignore_index=True)


def load_creatives(home: Path) -> pd.DataFrame | None:
    """All creatives by creative_id, as the view `ad_creatives` has them; None where every ad has the one of the catalogue."""
    if not source_path(home, "ad_creatives").exists():
        return None
    return _read_source(home, "ad_creatives", "build the features first").to_pandas().drop(columns="created").sort_values("creative_id", ignore_index=True)


def publish_ad_embeddings(home: Path, ad_ids: np.ndarray, matrix: np.ndarray, model_version: str, when: datetime) -> Path:
    """Write the ad embeddings of a model into the offline view `ad_embeddings`; earlier versions stay (EMBEDDING_VERSIONS_KEPT).

    Args: ad_ids int64 [A]; matrix float32 [A, D], finite; when, the UTC time from which they hold.
    """
    if matrix.ndim != 2 or len(matrix) != len(ad_ids) or matrix.dtype != np.float32:
        raise ValueError(f"ad embeddings must be float32 [A={len(ad_ids)}, D], got {matrix.dtype} {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"ad embedding of ad {ad_ids[~np.isfinite(matrix).all(axis=1)][0]} is not finite")
    if when.tzinfo is None:
        raise ValueError("publish_ad_embeddings: `when` needs a time zone (UTC)")
    order = np.argsort(ad_ids)
    stamp = pa.array([when] * len(ad_ids), TIMESTAMP)
    offsets = pa.array(np.arange(len(ad_ids) + 1, dtype=np.int32) * matrix.shape[1])
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(matrix[order]).ravel()))
    new = pa.table([stamp, pa.array(np.asarray(ad_ids, np.int64)[order]), stamp, lists, pa.array([model_version] * len(ad_ids), pa.string())], schema=SOURCES["ad_embeddings"])
    path = source_path(home, "ad_embeddings")
    if path.exists():
        old = pq.read_table(path, page_checksum_verification=True)
        versions = [version for version in dict.fromkeys(old["model_version"].to_pylist()) if version != model_version][-(EMBEDDING_VERSIONS_KEPT - 1) :]
        new = pa.concat_tables([old.filter(pc.is_in(old["model_version"], pa.array(versions, pa.string()))), new])
    write_parquet(path, new)
    return path


def load_ad_embeddings(home: Path, model_version: str | None = None) -> tuple[np.ndarray, np.ndarray, str]:
    """(ad_ids int64 [A], matrix float32 [A, D], model version) of the given version, by default the one published last."""
    table = _read_source(home, "ad_embeddings", "publish embeddings first")
    versions = list(dict.fromkeys(table["model_version"].to_pylist()))
    wanted = model_version or versions[-1]
    if wanted not in versions:
        raise ValueError(f"no ad embeddings of model version {wanted!r}; there are {', '.join(versions)}")
    rows = table.filter(pc.equal(table["model_version"], wanted)).combine_chunks()
    matrix = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    return rows["ad_id"].to_numpy(), matrix, wanted


def write_snapshot(home: Path, record: dict[str, Any]) -> None:
    write_bytes(feast_folder(home) / SNAPSHOT, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def read_snapshot(home: Path) -> dict[str, Any]:
    """What the last `build_features` of this home recorded."""
    path = feast_folder(home) / SNAPSHOT
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; build the features first")
    return json.loads(path.read_text())


def remove_store(home: Path) -> None:
    """Forget everything that the feature store of a home holds: registry, online rows, sources. Not for a home that is being served."""
    folder = feast_folder(home)
    if os.environ.get(REDIS_VARIABLE):
        store = open_store(home)
        apply_definitions(store)  # rows are found by the registered views
        store.teardown()
    for name in ("registry.db", "online.db"):
        for suffix in ("", "-wal", "-shm", "-journal"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    for view in VIEWS:
        source_path(home, view).unlink(missing_ok=True)
    (folder / SNAPSHOT).unlink(missing_ok=True)
