"""Log folders: round trip, checksums, manifest, and errors that name file and column."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marketplace.logs import LogError, data_hash, days_of, read_table, verify_manifest, write_manifest, write_table
from marketplace.schema import BEHAVIOURS


def behaviours(rows: int = 6) -> pd.DataFrame:
    time = pd.Timestamp("2025-09-01 22:00", tz="UTC") + pd.to_timedelta(range(rows), unit="h")
    frame = pd.DataFrame({"behaviour_id": range(2**53 + 1, 2**53 + 1 + rows), "event_timestamp": time, "user_id": 1, "session_id": 2, "poi_id": 3, "category_id": 4})
    return frame.assign(action=1, latitude=40.0, longitude=-73.0)


def part(root: Path, day: str = "2025-09-01") -> Path:
    return root / "behaviours" / f"day={day}" / "part-0.parquet"


def test_round_trip_keeps_types_days_and_large_ids(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours().sample(frac=1.0, random_state=0))
    assert days_of(tmp_path, "behaviours") == [date(2025, 9, 1), date(2025, 9, 2)]
    found = read_table(tmp_path, "behaviours")
    assert found["behaviour_id"].tolist() == behaviours()["behaviour_id"].tolist()
    assert pa.Schema.from_pandas(found, preserve_index=False).remove_metadata().types == BEHAVIOURS.arrow.types
    second = read_table(tmp_path, "behaviours", days=[date(2025, 9, 2), date(2030, 1, 1)], columns=["user_id", "event_timestamp"])
    assert list(second.columns) == ["user_id", "event_timestamp"]
    assert len(second) == 4
    assert len(read_table(tmp_path, "behaviours", days=[])) == 0


def test_a_day_written_again_is_replaced(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours())
    write_table(tmp_path, "behaviours", behaviours(1))
    assert len(read_table(tmp_path, "behaviours")) == 1 + 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: frame.drop(columns="poi_id"), "'poi_id' is missing"),
        (lambda frame: frame.assign(latitude=float("nan")), "'latitude' has 6 nulls"),
        (lambda frame: frame.assign(event_timestamp=frame["event_timestamp"].dt.tz_localize(None)), "with time zone"),
        (lambda frame: frame.assign(event_timestamp=pd.Series(pd.NaT, index=frame.index, dtype="datetime64[us, UTC]")), "6 nulls"),
        (lambda frame: frame.assign(user_id="five"), "does not fit the schema"),
        (lambda frame: frame.assign(category_id=2**40), "does not fit the schema"),
    ],
)
def test_writing_refuses_what_the_schema_forbids(tmp_path: Path, change, words: str) -> None:
    with pytest.raises(LogError, match=words):
        write_table(tmp_path, "behaviours", change(behaviours()))


def rewrite(file: Path, change) -> None:
    pq.write_table(change(pq.ParquetFile(file).read()), file)


def test_reading_names_the_file_and_the_missing_column(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours())
    rewrite(part(tmp_path), lambda table: table.drop_columns("poi_id"))
    with pytest.raises(LogError, match=r"day=2025-09-01.*'poi_id' is missing"):
        read_table(tmp_path, "behaviours")


def test_a_column_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours())
    rewrite(part(tmp_path), lambda table: table.drop_columns("creative_id"))
    found = read_table(tmp_path, "behaviours")
    assert found["creative_id"].tolist() == [0] * len(behaviours()) and found["creative_id"].dtype == np.int64
    assert read_table(tmp_path, "behaviours", columns=["creative_id", "user_id"]).columns.tolist() == ["creative_id", "user_id"]


def test_reading_widens_types_without_loss_and_refuses_others(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours())
    narrow = lambda table: table.set_column(2, "user_id", table["user_id"].cast(pa.int32())).set_column(  # noqa: E731
        1, "event_timestamp", table["event_timestamp"].cast(pa.timestamp("ns", tz="America/New_York"))
    )
    rewrite(part(tmp_path), narrow)
    found = read_table(tmp_path, "behaviours")
    pd.testing.assert_frame_equal(found, behaviours().assign(creative_id=0).astype(found.dtypes))
    rewrite(part(tmp_path), lambda table: table.set_column(2, "user_id", table["user_id"].cast(pa.string())))
    with pytest.raises(LogError, match=r"'user_id' has type string, the schema wants int64"):
        read_table(tmp_path, "behaviours")
    rewrite(part(tmp_path), lambda table: table.set_column(2, "user_id", pa.array([1, None], pa.int64())))
    with pytest.raises(LogError, match=r"'user_id' has 1 nulls"):
        read_table(tmp_path, "behaviours")


def test_truncated_and_flipped_files_are_named(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours())
    whole = part(tmp_path).read_bytes()
    part(tmp_path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LogError, match=r"day=2025-09-01.*truncated or damaged"):
        read_table(tmp_path, "behaviours")
    part(tmp_path).write_bytes(whole[:30] + bytes([whole[30] ^ 1]) + whole[31:])
    with pytest.raises(LogError, match="part-0.parquet"):
        read_table(tmp_path, "behaviours")


def test_missing_table_unknown_table_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="table ads is missing"):
        read_table(tmp_path, "ads")
    with pytest.raises(LogError, match="unknown table"):
        read_table(tmp_path, "orders")
    (tmp_path / "ads" / "day=soon").mkdir(parents=True)
    with pytest.raises(LogError, match="not a day partition"):
        read_table(tmp_path, "ads")


def test_manifest_finds_changes_additions_losses_and_other_versions(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours())
    assert verify_manifest(tmp_path)["data_hash"] == data_hash(tmp_path)  # no manifest: the folder is taken as it is
    manifest = write_manifest(tmp_path, {"who": "test"})
    assert verify_manifest(tmp_path) == manifest
    assert manifest["extra"] == {"who": "test"}
    whole = part(tmp_path).read_bytes()
    part(tmp_path).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(LogError, match="differs from the manifest"):
        verify_manifest(tmp_path)
    part(tmp_path).write_bytes(whole)
    extra = tmp_path / "ads" / "day=2025-09-01" / "more.parquet"
    extra.parent.mkdir(parents=True)
    extra.write_bytes(whole)
    with pytest.raises(LogError, match="not in the manifest"):
        verify_manifest(tmp_path)
    extra.unlink()
    part(tmp_path).unlink()
    with pytest.raises(LogError, match="not in the folder"):
        verify_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(LogError, match="format version 99"):
        verify_manifest(tmp_path)


def test_links_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, "behaviours", behaviours())
    (part(tmp_path).parent / "link.parquet").symlink_to(part(tmp_path))
    with pytest.raises(LogError, match="is a link"):
        data_hash(tmp_path)
