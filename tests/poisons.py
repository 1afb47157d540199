"""Ways to spoil a folder of logs, for tests: each function changes a copied folder on disk as a faulty export would.

`POISONS` maps a name to (function, rule that must name it). Files are rewritten with the types they had, and the manifest
(if there is one) is written again, as the owner of the faulty export would have done; only damage after the export
(`truncated file`, `flipped bit`) leaves the manifest alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from marketplace.logs import MANIFEST, write_manifest
from marketplace.schema import TABLES

Change = Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]
Poison = Callable[[Path, np.random.Generator], None]


def files_of(root: Path, table: str) -> list[Path]:
    """The table's Parquet files in day order."""
    return sorted((root / table).glob("day=*/*.parquet"))


def rewrite(root: Path, table: str, change: Change, rng: np.random.Generator, files: slice = slice(None)) -> None:
    """Apply `change` to the rows of each file (of the day-ordered `files`) and write it in place."""
    for path in files_of(root, table)[files]:
        frame = change(pq.read_table(path, partitioning=None).to_pandas(), rng)
        fields = [TABLES[table][name].field().with_nullable(True) for name in frame.columns]
        pq.write_table(pa.Table.from_pandas(frame, schema=pa.schema(fields), preserve_index=False), path, write_page_checksum=True)


def manifest_again(root: Path) -> None:
    """Write the manifest again if the folder has one."""
    if (root / MANIFEST).exists():
        write_manifest(root, {})


def _poison(table: str, change: Change, files: slice = slice(None)) -> Poison:
    def apply(root: Path, rng: np.random.Generator) -> None:
        rewrite(root, table, change, rng, files)
        manifest_again(root)

    return apply


def _some(frame: pd.DataFrame, rng: np.random.Generator, share: float) -> np.ndarray:
    """Row labels of a random share of the rows, one at least."""
    return rng.choice(frame.index.to_numpy(), max(1, round(share * len(frame))), replace=False)


def _set(column: str, value: object, share: float) -> Change:
    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        frame.loc[_some(frame, rng, share), column] = value
        return frame

    return change


def _scale(column: str, factor: float, share: float = 1.0) -> Change:
    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        rows = _some(frame, rng, share)
        frame.loc[rows, column] = frame.loc[rows, column] * factor
        return frame

    return change


def _repeat(share: float) -> Change:
    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        return pd.concat([frame, frame.loc[_some(frame, rng, share)]], ignore_index=True)

    return change


def _repeat_key(columns: tuple[str, ...], count: int = 3) -> Change:
    """Give some rows the key of another row."""

    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        rows = rng.choice(len(frame), min(2 * count, len(frame) // 2 * 2), replace=False).reshape(2, -1)
        for column in columns:
            frame.loc[frame.index[rows[1]], column] = frame[column].to_numpy()[rows[0]]
        return frame

    return change


def _later(column: str, delta: str, share: float) -> Change:
    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        rows = _some(frame, rng, share)
        frame.loc[rows, column] = frame.loc[rows, column] + pd.Timedelta(delta)
        return frame

    return change


def _flip(share: float, with_times: bool) -> Change:
    """Turn a share of the click labels over; with consistent click times and orders if asked, as a wrong join would."""

    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        rows = _some(frame, rng, share)
        frame.loc[rows, "click"] = (1 - frame.loc[rows, "click"]).astype("int32")
        if with_times:
            clicked = frame["click"] == 1
            frame["click_timestamp"] = frame["click_timestamp"].fillna(frame["event_timestamp"] + pd.Timedelta("9s")).where(clicked)
            frame["purchase"] = frame["purchase"].where(clicked, 0).astype("int32")
            frame["order_value"] = frame["order_value"].where(clicked, 0.0)
        return frame

    return change


def _drop_slot(slot: int) -> Change:
    return lambda frame, rng: frame[~((frame["slot"] == slot) & frame["request_id"].isin(rng.choice(frame["request_id"].unique(), 3)))]


def _orphan_clicks(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Clicks whose request nobody made."""
    extra = frame.loc[_some(frame, rng, 0.01)].copy()
    extra["request_id"] = extra["request_id"] + 10**12
    extra["slot"] = np.int32(1)
    extra = extra.drop_duplicates("request_id")
    extra["click"] = np.int32(1)
    extra["click_timestamp"] = extra["event_timestamp"] + pd.Timedelta("5s")
    return pd.concat([frame, extra], ignore_index=True)


def _behaviour_clicks_alone(root: Path, rng: np.random.Generator) -> None:
    """Clicked impressions vanish (the whole page), their clicks stay in behaviours."""

    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        return frame[~frame["request_id"].isin(frame.loc[frame["click"] == 1, "request_id"].head(5))]

    rewrite(root, "impressions", change, rng)
    manifest_again(root)


def _copied_twice(table: str) -> Poison:
    """A day's file is written a second time beside the first."""

    def apply(root: Path, rng: np.random.Generator) -> None:
        for path in files_of(root, table)[: max(1, len(files_of(root, table)) // 2)]:
            (path.parent / "part-1.parquet").write_bytes(path.read_bytes())
        manifest_again(root)

    return apply


def _bids_times_100(root: Path, rng: np.random.Generator) -> None:
    """Every bid, reserve and payment of all tables times 100: consistent, but in another unit."""
    rewrite(root, "ads", lambda frame, _: frame.assign(bid=frame["bid"] * 100, reserve=frame["reserve"] * 100), rng)
    rewrite(root, "impressions", lambda frame, _: frame.assign(bid=frame["bid"] * 100, payment=frame["payment"] * 100), rng)
    manifest_again(root)


def _remap_ads(root: Path, rng: np.random.Generator) -> None:
    """The shown ads' ids are permuted among the ids of the day."""

    def change(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        ids = frame["ad_id"].unique()
        return frame.assign(ad_id=frame["ad_id"].map(dict(zip(ids, rng.permutation(ids), strict=True))))

    rewrite(root, "impressions", change, rng)
    manifest_again(root)


def _truncate(table: str, keep: float) -> Poison:
    def apply(root: Path, rng: np.random.Generator) -> None:
        path = files_of(root, table)[-1]
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data))])

    return apply


def _flip_bit(table: str) -> Poison:
    """One flipped bit in the middle of a column's data."""

    def apply(root: Path, rng: np.random.Generator) -> None:
        path = files_of(root, table)[-1]
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(data))

    return apply


def _drop_column(column: str) -> Change:
    return lambda frame, _: frame.drop(columns=[column])


def constant_everywhere(table: str, column: str) -> Poison:
    """Every row gets the first row's value."""

    def apply(root: Path, rng: np.random.Generator) -> None:
        value = pq.read_table(files_of(root, table)[0], partitioning=None).to_pandas()[column].iloc[0]
        rewrite(root, table, lambda frame, _: frame.assign(**{column: value}), rng)
        manifest_again(root)

    return apply


def _wrong_type(root: Path, rng: np.random.Generator) -> None:
    for path in files_of(root, "requests"):
        frame = pq.read_table(path, partitioning=None).to_pandas()
        frame["event_timestamp"] = frame["event_timestamp"].astype(str)
        frame.to_parquet(path, index=False)
    manifest_again(root)


def _extra_column(root: Path, rng: np.random.Generator) -> None:
    path = files_of(root, "users")[0]
    frame = pq.read_table(path, partitioning=None).to_pandas()
    frame.assign(sex=1).to_parquet(path, index=False)
    manifest_again(root)


def _no_rows(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    return frame.iloc[:0]


def _lost_table(root: Path, rng: np.random.Generator) -> None:
    for path in files_of(root, "requests"):
        path.unlink()
    manifest_again(root)


POISONS: dict[str, tuple[Poison, str]] = {
    # the fifteen kinds, each in one or more shapes
    "duplicate keys, impressions": (_poison("impressions", _repeat_key(("request_id", "slot")), slice(0, 1)), "no-duplicate-keys"),
    "duplicate keys, behaviours": (_poison("behaviours", _repeat_key(("behaviour_id",)), slice(0, 1)), "no-duplicate-keys"),
    "duplicate keys, requests": (_poison("requests", _repeat_key(("request_id",)), slice(0, 1)), "no-duplicate-keys"),
    "duplicate keys, ads": (_poison("ads", _repeat_key(("ad_id",)), slice(0, 1)), "no-duplicate-keys"),
    "duplicate keys, users": (_poison("users", _repeat_key(("user_id",)), slice(0, 1)), "no-duplicate-keys"),
    "NaN bids, impressions": (_poison("impressions", _set("bid", np.nan, 0.05)), "no-missing-values"),
    "NaN bids, one row of ads": (_poison("ads", _set("bid", np.nan, 0.0), slice(0, 1)), "no-missing-values"),
    "NaN bids, all": (_poison("impressions", _set("bid", np.nan, 1.0)), "no-missing-values"),
    "negative bids, impressions": (_poison("impressions", _scale("bid", -1.0, 0.02)), "no-negative-bids"),
    "negative bids, ads": (_poison("ads", _scale("bid", -1.0, 0.02)), "no-negative-bids"),
    "zero bids, ads": (_poison("ads", _scale("bid", 0.0, 0.02)), "no-negative-bids"),
    "bids x100, impressions": (_poison("impressions", _scale("bid", 100.0)), "bids-match-catalogue"),
    "bids x100, 3 % of impressions": (_poison("impressions", _scale("bid", 100.0, 0.03)), "bids-match-catalogue"),
    "bids x100, ads": (_poison("ads", _scale("bid", 100.0)), "bid-level"),
    "bids x100, one day of ads": (_poison("ads", _scale("bid", 100.0), slice(-1, None)), "bids-steady"),
    "bids x100, 3 % of ads": (_poison("ads", _scale("bid", 100.0, 0.03)), "bids-steady"),
    "bids x100, everywhere": (_bids_times_100, "bid-level"),
    "payment above bid": (_poison("impressions", lambda frame, rng: frame.assign(payment=frame["payment"].where(rng.random(len(frame)) > 0.02, frame["bid"] * 1.5))), "payment-at-most-bid"),
    "payments x100": (_poison("impressions", _scale("payment", 100.0)), "payment-at-most-bid"),
    "payment below the reserve": (_poison("impressions", _set("payment", 0.0, 0.02)), "payment-at-least-reserve"),
    "click without impression, unknown request": (_poison("impressions", _orphan_clicks), "no-click-without-impression"),
    "click without impression, lost page": (_behaviour_clicks_alone, "no-click-without-impression"),
    "future timestamps, impressions": (_poison("impressions", _later("event_timestamp", "400D", 0.01)), "no-future-timestamps"),
    "future timestamps, requests": (_poison("requests", _later("event_timestamp", "30D", 0.01)), "no-future-timestamps"),
    "future timestamps, behaviours": (_poison("behaviours", _later("event_timestamp", "36500D", 0.01)), "no-future-timestamps"),
    "future timestamps, clicks": (_poison("impressions", _later("click_timestamp", "400D", 1.0)), "no-future-timestamps"),
    "future timestamps, users": (_poison("users", _later("event_timestamp", "3650D", 0.05)), "no-future-timestamps"),
    "unknown ads": (_poison("impressions", _set("ad_id", 987_654_321, 0.005)), "no-unknown-ads"),
    "unknown users, requests": (_poison("requests", _set("user_id", 987_654_321, 0.005)), "no-unknown-users"),
    "unknown users, impressions": (_poison("impressions", _set("user_id", 987_654_321, 0.005)), "no-unknown-users"),
    "unknown users, behaviours": (_poison("behaviours", _set("user_id", 987_654_321, 0.005)), "no-unknown-users"),
    "label flip 20 %": (_poison("impressions", _flip(0.2, with_times=False)), "no-flipped-labels"),
    "label flip 20 %, consistent": (_poison("impressions", _flip(0.2, with_times=True)), "no-flipped-labels"),
    "label flip 1 %, consistent": (_poison("impressions", _flip(0.01, with_times=True)), "no-flipped-labels"),
    "constant feature, pctr": (constant_everywhere("impressions", "pctr"), "no-constant-features"),
    "constant feature, category of ads": (constant_everywhere("ads", "category_id"), "no-constant-features"),
    "constant feature, price band": (constant_everywhere("ads", "price_band"), "no-constant-features"),
    "constant feature, category of behaviours": (constant_everywhere("behaviours", "category_id"), "no-constant-features"),
    "constant feature, action": (constant_everywhere("behaviours", "action"), "no-constant-features"),
    "constant feature, latitude of requests": (constant_everywhere("requests", "latitude"), "no-constant-features"),
    "constant feature, home of users": (constant_everywhere("users", "home_latitude"), "no-constant-features"),
    "constant feature, session of behaviours": (_poison("behaviours", _set("session_id", 0, 1.0)), "no-constant-features"),
    "constant feature, age": (_poison("users", _set("age_band", 4, 1.0)), "no-constant-features"),
    "constant feature, city of users": (_poison("users", _set("city_id", 0, 1.0)), "no-lost-cities"),
    "slot gaps, middle": (_poison("impressions", _drop_slot(2)), "no-slot-gaps"),
    "slot gaps, top": (_poison("impressions", _drop_slot(1)), "no-slot-gaps"),
    "slot gaps, shifted": (_poison("impressions", lambda frame, rng: frame.assign(slot=frame["slot"] + (frame["slot"] > 2).astype("int32"))), "no-slot-gaps"),
    "30 % duplicate rows, impressions": (_poison("impressions", _repeat(0.3)), "no-duplicate-rows"),
    "30 % duplicate rows, behaviours": (_poison("behaviours", _repeat(0.3)), "no-duplicate-rows"),
    "30 % duplicate rows, requests": (_poison("requests", _repeat(0.3)), "no-duplicate-rows"),
    "duplicate rows, files written twice": (_copied_twice("impressions"), "no-duplicate-rows"),
    "truncated file, half": (_truncate("impressions", 0.5), "readable-files"),
    "truncated file, last byte": (_truncate("behaviours", 0.999), "readable-files"),
    "truncated file, nothing left": (_truncate("ads", 0.0), "readable-files"),
    "missing column, one file": (_poison("impressions", _drop_column("payment"), slice(0, 1)), "no-missing-columns"),
    "missing column, all files": (_poison("requests", _drop_column("user_id")), "no-missing-columns"),
    "missing column, key": (_poison("impressions", _drop_column("request_id")), "no-missing-columns"),
    # more
    "flipped bit": (_flip_bit("impressions"), "files-as-in-manifest"),
    "remapped ids": (_remap_ads, "creative-of-the-ad"),
    "5 % missing latitude": (_poison("requests", _set("latitude", np.nan, 0.05)), "no-missing-values"),
    "infinite pctr": (_poison("impressions", _set("pctr", np.inf, 0.01)), "values-in-range"),
    "wrong type": (_wrong_type, "column-types"),
    "extra column": (_extra_column, "no-extra-columns"),
    "no rows in a file": (_poison("behaviours", _no_rows, slice(0, 1)), "no-empty-files"),
    "lost table": (_lost_table, "tables-present"),
    "lost day of impressions": (_poison("impressions", _no_rows, slice(-1, None)), "same-days"),
    "rows in a wrong day": (_poison("impressions", _later("event_timestamp", "-3D", 0.01)), "rows-in-their-day"),
    "click before its impression": (_poison("impressions", _later("click_timestamp", "-1h", 1.0)), "click-after-impression"),
    "purchase without click": (_poison("impressions", _set("purchase", 1, 0.05)), "purchase-only-with-click"),
    "order value without purchase": (_poison("impressions", _set("order_value", 9.0, 0.05)), "order-value-only-with-purchase"),
    "ad twice on a page": (
        _poison("impressions", lambda frame, rng: frame.assign(ad_id=frame.groupby("request_id")["ad_id"].transform("first").where(frame["slot"] < 3, frame["ad_id"]))),
        "no-ad-twice-on-a-page",
    ),
}
