"""Reading a folder of logs that may be broken: every file is tried, every problem is noted, nothing raises.

`marketplace.logs.read_table` is for data that passed and stops at the first problem. Here each file becomes one row of
`LoadedLogs.files`, and whatever can still be read becomes `LoadedLogs.tables`, so that one run names all that is wrong.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from marketplace.logs import MANIFEST, LogError, manifest_of, read_file
from marketplace.schema import FORMAT_VERSION, OPTIONAL_TABLES, TABLES, Table

DAY = "_day"
"""Helper column of every loaded table: days since 1970 of the row's partition folder (not of its timestamp)."""

PROBLEMS = ("unreadable", "missing_columns", "extra_columns", "wrong_types", "changed")
"""Problem columns of `LoadedLogs.files`: plain words, '' for none."""

_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError)
"""What pyarrow raises on damaged files: its own kinds, and others from damaged lengths and names. `LogError` is a ValueError."""


@dataclass(frozen=True)
class LoadedLogs:
    """What could be read.

    `files`: one row a file with table, file (relative path), day (ISO; '' if the folder is misnamed), rows and `PROBLEMS`.
    `tables`: the rows; a column is there only if every readable file of its table has it (or it has a default), plus `DAY`. An optional
    table is there only if its folder is.
    `data_hash`: sha256 over all files, '' if the folder cannot even be listed.
    """

    root: Path
    files: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    data_hash: str


def load_logs(root: Path) -> LoadedLogs:
    """Read every `<root>/<table>/day=*/*.parquet` as far as possible."""
    rows: list[dict] = []
    tables: dict[str, pd.DataFrame] = {}
    for table in (*TABLES.values(), *(table for table in OPTIONAL_TABLES.values() if (root / table.name).is_dir())):
        parts: list[pa.Table] = []
        for path in sorted((root / table.name).glob("*/*.parquet")):
            if path.name.startswith("."):
                continue
            row = {"table": table.name, "file": path.relative_to(root).as_posix(), "day": "", "rows": 0} | dict.fromkeys(PROBLEMS, "")
            data = _read(path, table, row)
            rows.append(row)
            if data is not None:
                parts.append(data)
        tables[table.name] = _together(parts, table)
    data_hash = _compare_with_manifest(root, rows)
    return LoadedLogs(root, pd.DataFrame(rows, columns=["table", "file", "day", "rows", *PROBLEMS]).astype({"rows": "int64"}), tables, data_hash)


def _read(path: Path, table: Table, row: dict) -> pa.Table | None:
    """The file's rows with the day of its folder; notes problems in `row`; None if nothing can be used."""
    try:
        day = dt.date.fromisoformat(path.parent.name.removeprefix("day="))
    except ValueError:
        row["unreadable"] = f"its folder {path.parent.name!r} is not named day=YYYY-MM-DD"
        return None
    row["day"] = day.isoformat()
    try:
        names = pq.read_schema(path).names
        present = [column.name for column in table.columns if column.name in names or column.default is not None]
        row["missing_columns"] = ", ".join(name for name in table.names if name not in present)
        row["extra_columns"] = ", ".join(name for name in names if name not in table.names)
        try:
            data = read_file(path, table.name, present) if present else None
        except LogError:
            data = _read_column_by_column(path, table, present, row)
    except _DAMAGE as error:
        row["unreadable"] = f"truncated or damaged: {_first_line(error)}"
        return None
    if data is None:
        return None
    row["rows"] = data.num_rows
    return data.append_column(DAY, pa.repeat(pa.scalar((day - dt.date(1970, 1, 1)).days, pa.int32()), data.num_rows))


def _read_column_by_column(path: Path, table: Table, present: list[str], row: dict) -> pa.Table | None:
    """Find which columns do not fit the schema; keep those whose values can still be checked (nulls, castable types)."""
    wrong, columns = [], {}
    raw = pq.read_table(path, columns=present, page_checksum_verification=True, partitioning=None)
    for name in raw.column_names:
        try:
            columns[name] = read_file(path, table.name, [name])[name]
        except LogError as error:
            if not (pa.types.is_integer(raw[name].type) and raw[name].null_count):  # nulls have their own rule
                wrong.append(str(error).removeprefix(f"{path}: "))
            try:
                columns[name] = raw[name].cast(table[name].dtype)
            except pa.ArrowException:
                continue
    row["wrong_types"] = "; ".join(wrong)
    return pa.table(columns) if columns else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _together(parts: list[pa.Table], table: Table) -> pd.DataFrame:
    shared = [name for name in (*table.names, DAY) if parts and all(name in part.column_names for part in parts)]
    if not shared:
        return pd.DataFrame()
    return pa.concat_tables([part.select(shared) for part in parts]).to_pandas()


def _compare_with_manifest(root: Path, rows: list[dict]) -> str:
    """Note files that were changed, added or lost since the manifest was written; returns the folder's data hash."""
    by_file = {row["file"]: row for row in rows}

    def note(table: str, file: str, problem: str) -> None:
        if file not in by_file:
            by_file[file] = {"table": table, "file": file, "day": "", "rows": 0} | dict.fromkeys(PROBLEMS, "")
            rows.append(by_file[file])
        by_file[file]["changed"] = problem

    try:
        found = manifest_of(root)
    except (LogError, OSError) as error:
        note("", str(root.name), _first_line(error))
        return ""
    path = root / MANIFEST
    if not path.exists():
        return str(found["data_hash"])
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        recorded, version = dict(manifest["files"]), manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        note("", MANIFEST, f"it is not a manifest: {_first_line(error)}")
        return str(found["data_hash"])
    if version != FORMAT_VERSION:
        note("", MANIFEST, f"format version {version}, this release reads {FORMAT_VERSION}")
    for name in sorted(set(recorded) | set(found["files"])):
        table = name.split("/")[0]
        if name not in found["files"]:
            note(table, name, "it is in the manifest but not in the folder")
        elif name not in recorded:
            note(table, name, "it is in the folder but not in the manifest")
        elif recorded[name] != found["files"][name]:
            note(table, name, "sha256 or size differs from the manifest: changed or damaged after it was written")
    return str(found["data_hash"])
