"""Converter from the published TSMC2014 check-in text (Yang et al. 2014, Foursquare) to a check-ins folder.

A line holds, separated by tabs: user id, venue id, venue category id, venue category name, latitude, longitude, time zone
offset in minutes, and UTC time such as `Tue Apr 03 18:00:09 +0000 2012`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from marketplace.logs import write_parquet

COLUMNS = ("user", "venue", "category_code", "category", "lat", "lon", "offset", "time")
"""Fields of a line, in order."""

_TIME_FORMAT = "%a %b %d %H:%M:%S %z %Y"
_ENCODINGS = ("utf-8", "latin-1")


def read_tsmc(text: Path) -> pd.DataFrame:
    """The check-ins of a TSMC2014 text file: COLUMNS, with `time` as UTC timestamps.

    Raises ValueError naming the line for a wrong number of fields, coordinates out of range, or an unreadable time.
    """
    text = Path(text)
    raw = text.read_bytes()
    for encoding in _ENCODINGS:
        try:
            lines = raw.decode(encoding).split("\n")
            break
        except UnicodeDecodeError:
            continue
    rows = [line.rstrip("\r").split("\t") for line in lines]
    numbers = [number for number, row in enumerate(rows, start=1) if row != [""]]
    rows = [row for row in rows if row != [""]]
    if not rows:
        raise ValueError(f"{text} holds no check-ins; expected lines of {len(COLUMNS)} tab-separated fields")
    for number, row in zip(numbers, rows, strict=True):
        if len(row) != len(COLUMNS):
            raise ValueError(f"{text}, line {number}: {len(row)} fields, expected {len(COLUMNS)}: {', '.join(COLUMNS)}, separated by tabs")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for name, limit in (("lat", 90.0), ("lon", 180.0)):
        value = pd.to_numeric(frame[name], errors="coerce")
        bad = ~value.abs().le(limit)
        if bad.any():
            at = int(np.argmax(bad.to_numpy()))
            raise ValueError(f"{text}, line {numbers[at]}: {name} must lie in [-{limit:g}, {limit:g}] degrees, got {frame[name].iloc[at]!r}")
        frame[name] = value.astype(np.float64)
    time = pd.to_datetime(frame["time"].str.strip(), format=_TIME_FORMAT, utc=True, errors="coerce")
    if time.isna().any():
        at = int(np.argmax(time.isna().to_numpy()))
        raise ValueError(f"{text}, line {numbers[at]}: time must look like 'Tue Apr 03 18:00:09 +0000 2012', got {frame['time'].iloc[at]!r}")
    frame["time"] = time.astype("datetime64[us, UTC]")
    return frame


def convert_checkins(text: Path, out: Path, min_poi_checkins: int = 1, min_user_checkins: int = 1) -> dict[str, int]:
    """Write `checkins.parquet` and `pois.parquet` into `out` from a TSMC2014 text file.

    Users and venues are numbered from 1: users by their id, venues by their id as text. A venue's place and category are those of its
    first line. Args: min_poi_checkins, min_user_checkins, rarer venues, then rarer users, are left out.
    Returns the numbers of users, pois and checkins written.
    """
    frame = read_tsmc(text)
    frame = frame[frame.groupby("venue")["venue"].transform("size") >= min_poi_checkins]
    frame = frame[frame.groupby("user")["user"].transform("size") >= min_user_checkins]
    if frame.empty:
        raise ValueError(f"{text}: no check-in is left with min_poi_checkins {min_poi_checkins} and min_user_checkins {min_user_checkins}")
    numeric = frame["user"].str.fullmatch(r"\d{1,18}").all()
    frame["user_id"] = 1 + np.unique(frame["user"].astype(np.int64) if numeric else frame["user"], return_inverse=True)[1]
    frame["poi_id"] = 1 + np.unique(frame["venue"].to_numpy(str), return_inverse=True)[1]
    pois = frame.drop_duplicates("poi_id").sort_values("poi_id", ignore_index=True)
    category = pois["category"].str.strip()
    pois["category"] = category.where(category != "")
    frame = frame.rename(columns={"time": "timestamp"}).sort_values(["user_id", "timestamp", "poi_id"], kind="stable", ignore_index=True)
    out = Path(out)
    ids = [("user_id", pa.int64()), ("poi_id", pa.int64())]
    checkin_schema = pa.schema([*ids, ("timestamp", pa.timestamp("us", tz="UTC"))])
    poi_schema = pa.schema([ids[1], ("lat", pa.float64()), ("lon", pa.float64()), ("category", pa.string())])
    for name, rows, schema in (("checkins", frame, checkin_schema), ("pois", pois, poi_schema)):
        table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False).replace_schema_metadata(None)
        write_parquet(out / f"{name}.parquet", table)
    return {"users": int(frame["user_id"].nunique()), "pois": len(pois), "checkins": len(frame)}
