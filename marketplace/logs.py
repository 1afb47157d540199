"""Reading and writing folders of logs: day-partitioned Parquet with explicit schemas, page checksums and a manifest.

A folder is `<root>/<table>/day=YYYY-MM-DD/*.parquet` for the tables of `marketplace.schema.TABLES`, those of `OPTIONAL_TABLES`
where there are any, and an optional `manifest.json` with the sha256 and size of every file. Files are written beside their target, synced and renamed, so
that a reader sees the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from marketplace.schema import FORMAT_VERSION, OPTIONAL_TABLES, TABLES, Column, Table

MANIFEST = "manifest.json"
_PARTITION = "day="


class LogError(ValueError):
    """A folder of logs, or one file of it, is not what the schema asks for; the message says what, where and what to do."""


def table_of(name: str) -> Table:
    """The schema of a table; `LogError` for an unknown name."""
    known = TABLES | OPTIONAL_TABLES
    if name not in known:
        raise LogError(f"unknown table {name!r}; the tables are {', '.join(known)}")
    return known[name]


def with_defaults(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """The frame with every column that it lacks and that has a default."""
    lacking = [column for column in table.columns if column.default is not None and column.name not in frame.columns]
    return frame.assign(**{column.name: np.full(len(frame), column.default, column.dtype.to_pandas_dtype()) for column in lacking}) if lacking else frame


def has_table(root: Path, name: str) -> bool:
    """Whether a folder of logs holds a table, e.g. an optional one."""
    return (Path(root) / table_of(name).name).is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_bytes(path: Path, payload: bytes) -> None:
    """Write a file atomically: beside the target, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:  # on a full disk the part would keep what room there is
        part.unlink(missing_ok=True)
        raise


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write one Parquet file atomically, with page checksums; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_bytes(path, sink.getvalue().to_pybytes())


def write_table(root: Path, table: str, frame: pd.DataFrame) -> None:
    """Write `frame` as `<root>/<table>/day=YYYY-MM-DD/part-0.parquet`, one file per UTC day of the table's time column.

    Rows are sorted by time and key. A day that is written again is replaced; other days are left alone.
    Raises `LogError` where a column is missing, has another type, or holds a null that the schema forbids.
    """
    schema = table_of(table)
    frame = with_defaults(frame, schema)
    missing = [name for name in schema.names if name not in frame.columns]
    if missing:
        raise LogError(f"table {table}: column {missing[0]!r} is missing from the frame; wanted {', '.join(schema.names)}")
    time = frame[schema.time]
    if not isinstance(time.dtype, pd.DatetimeTZDtype):
        raise LogError(f"table {table}: column {schema.time!r} must be a UTC timestamp with time zone, got {time.dtype}")
    frame = frame.sort_values([schema.time, *[name for name in schema.key if name != schema.time]], kind="stable")
    for column in schema.columns:
        if not column.nullable and frame[column.name].isna().any():
            raise LogError(f"table {table}: column {column.name!r} has {int(frame[column.name].isna().sum())} nulls; it must have a value in every row")
    try:
        arrow = pa.Table.from_pandas(frame[schema.names], schema=schema.arrow, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise LogError(f"table {table}: a column does not fit the schema: {error}") from error
    days = frame[schema.time].dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[D]")
    starts = np.flatnonzero(np.concatenate([[True], days[1:] != days[:-1]])) if len(days) else np.empty(0, np.int64)
    for start, stop in zip(starts, [*starts[1:], len(days)], strict=True):
        write_parquet(Path(root) / table / f"{_PARTITION}{days[start]}" / "part-0.parquet", arrow.slice(start, stop - start))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _day_of(partition: Path) -> date:
    try:
        return date.fromisoformat(partition.name.removeprefix(_PARTITION))
    except ValueError:
        raise LogError(f"{partition}: not a day partition; folders of a table are named {_PARTITION}YYYY-MM-DD") from None


def _partitions(root: Path, table: str) -> dict[date, Path]:
    folder = Path(root) / table_of(table).name
    if not folder.is_dir():
        raise LogError(f"table {table} is missing: there is no folder {folder}; a folder of logs holds {', '.join(TABLES)}")
    found = {_day_of(partition): partition for partition in sorted(folder.iterdir()) if partition.name.startswith(_PARTITION)}
    if not found:
        raise LogError(f"table {table}: {folder} holds no {_PARTITION}YYYY-MM-DD folder")
    return dict(sorted(found.items()))


def days_of(root: Path, table: str) -> list[date]:
    """The UTC days for which a table has a partition, in order."""
    return list(_partitions(root, table))


def _same_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether `found` can be widened to `wanted` without loss, so that a team need not match widths to the letter."""
    if found == wanted:
        return True
    if pa.types.is_timestamp(wanted):
        return pa.types.is_timestamp(found) and found.tz is not None
    if pa.types.is_integer(wanted):
        return pa.types.is_integer(found)
    if pa.types.is_floating(wanted):
        return pa.types.is_floating(found)
    if pa.types.is_string(wanted):
        return pa.types.is_large_string(found) or (pa.types.is_dictionary(found) and _same_kind(found.value_type, wanted))
    if pa.types.is_list(wanted):
        return pa.types.is_nested(found) and hasattr(found, "value_type") and _same_kind(found.value_type, wanted.value_type)
    return False


def _cast(column: Column, values: pa.ChunkedArray, file: Path) -> pa.ChunkedArray:
    if not _same_kind(values.type, column.dtype):
        raise LogError(f"{file}: column {column.name!r} has type {values.type}, the schema wants {column.dtype}")
    if not column.nullable and pa.types.is_integer(column.dtype) and values.null_count:
        raise LogError(f"{file}: column {column.name!r} has {values.null_count} nulls; it must have a value in every row")
    try:
        return values if values.type == column.dtype else values.cast(column.dtype)
    except pa.ArrowInvalid as error:
        raise LogError(f"{file}: column {column.name!r} of type {values.type} does not fit {column.dtype}: {error}") from error


def read_file(file: Path, table: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file in the schema's types, page checksums verified; a column with a default that the file lacks has it in every row.

    Raises `LogError` naming the file and the column.
    """
    schema = table_of(table)
    wanted = [schema[name] for name in (columns or schema.names)]
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            present = set(parquet.schema_arrow.names)
            for column in wanted:
                if column.name not in present and column.default is None:
                    raise LogError(f"{file}: column {column.name!r} is missing; table {table} wants {', '.join(schema.names)}")
            found = parquet.read(columns=[column.name for column in wanted if column.name in present])
    except (pa.ArrowInvalid, OSError) as error:
        raise LogError(f"{file}: cannot be read as Parquet (truncated or damaged file?): {error}; write the file again") from error
    fields = [pa.field(column.name, column.dtype) for column in wanted]
    columns = [
        _cast(column, found[column.name], file) if column.name in present else pa.chunked_array([pa.repeat(pa.scalar(column.default, column.dtype), found.num_rows)])
        for column in wanted
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def read_table(root: Path, table: str, days: Iterable[date] | None = None, columns: list[str] | None = None) -> pd.DataFrame:
    """A log table as a DataFrame in the schema's types, in day order.

    Args: days, the UTC days wanted (all by default; a day without a partition has no rows); columns, a subset of columns.
    Raises `LogError` naming file and column where a column is missing or has a wrong type, or a file is damaged.
    """
    schema = table_of(table)
    partitions = _partitions(Path(root), table)
    wanted = partitions if days is None else {day: partitions[day] for day in sorted(set(days)) if day in partitions}
    files = [file for partition in wanted.values() for file in sorted(partition.glob("*.parquet")) if not file.name.startswith(".")]
    names = columns or schema.names
    if not files:
        return pa.schema([schema[name].field() for name in names]).empty_table().to_pandas()
    return pa.concat_tables([read_file(file, table, columns) for file in files]).to_pandas()


# ---------------------------------------------------------------------------------------------------------------------
# Manifest


def _log_files(root: Path) -> list[Path]:
    files = []
    for table in TABLES | OPTIONAL_TABLES:
        files += [file for file in (Path(root) / table).glob("*/*.parquet") if not file.name.startswith(".")]
    for file in files:
        if file.is_symlink():
            raise LogError(f"{file} is a link; a folder of logs holds plain files only")
    return sorted(files)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _hash_of(files: dict[str, dict[str, Any]]) -> str:
    lines = "".join(f"{name} {record['sha256']}\n" for name, record in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def manifest_of(root: Path) -> dict[str, Any]:
    """The manifest that describes the folder as it is now: format version, sha256 and size of every file, data hash."""
    root = Path(root)
    files = {file.relative_to(root).as_posix(): {"sha256": _sha256(file), "bytes": file.stat().st_size} for file in _log_files(root)}
    if not files:
        raise LogError(f"{root} holds no log files; expected <table>/{_PARTITION}YYYY-MM-DD/*.parquet for {', '.join(TABLES)}")
    return {"format_version": FORMAT_VERSION, "data_hash": _hash_of(files), "files": files}


def write_manifest(root: Path, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `manifest.json` for the folder as it is now and return it. `extra` is kept under that name, as JSON."""
    manifest = manifest_of(root) | {"extra": extra or {}}
    write_bytes(Path(root) / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    return manifest


def verify_manifest(root: Path) -> dict[str, Any]:
    """The manifest, after every file was checked against it; without a manifest file, the one computed now.

    Raises `LogError` for another format version and for any file that is missing, added or changed.
    """
    root = Path(root)
    path = root / MANIFEST
    if not path.exists():
        return manifest_of(root) | {"extra": {}}
    try:
        manifest = json.loads(path.read_text())
        recorded, version = manifest["files"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise LogError(f"{path} is not a manifest ({error}); delete it to take the folder as it is, or write it again") from error
    if version != FORMAT_VERSION:
        raise LogError(f"{path}: format version {version}, this release reads {FORMAT_VERSION}; convert the logs")
    found = manifest_of(root)
    for name in sorted(set(recorded) | set(found["files"])):
        if name not in found["files"]:
            raise LogError(f"{root / name} is in the manifest but not in the folder")
        if name not in recorded:
            raise LogError(f"{root / name} is in the folder but not in the manifest; delete {MANIFEST} to take the folder as it is")
        if recorded[name] != found["files"][name]:
            raise LogError(f"{root / name} differs from the manifest (sha256 or size): it was changed or damaged after it was written")
    return manifest


def data_hash(root: Path) -> str:
    """sha256 over names and contents of all log files; the identity of a training set."""
    return str(manifest_of(root)["data_hash"])
