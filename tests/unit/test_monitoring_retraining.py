"""Reference and traffic as one folder: nothing lost, nothing twice, optional tables included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from marketplace.creatives import CreativeConfig
from marketplace.logs import LogError, days_of, has_table, read_table, write_table
from marketplace.organic import OrganicConfig
from marketplace.schema import OPTIONAL_TABLES, TABLES
from marketplace.synthetic import SyntheticConfig
from marketplace.validation import validate_logs
from marketplace.worlds import WorldConfig, build_world
from monitoring.retraining import merge_logs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    config = WorldConfig(
        slots=3, synthetic=SyntheticConfig(users=80, places_per_city=120, ads_per_city=30, log_days=5, live_days=1),
        creatives=CreativeConfig(per_ad=2, width=4), organic=OrganicConfig(items=2),
    )  # fmt: skip
    logs = tmp_path_factory.mktemp("whole") / "logs"
    build_world(config, 2).write_logs(logs)
    return logs


def part(whole: Path, out: Path, first: int, last: int) -> Path:
    """Days first .. last - 1 of requests, impressions, ads and organic results; all of the other tables."""
    days = days_of(whole, "requests")
    shutil.copytree(whole, out)
    (out / "manifest.json").unlink()
    for name in ("requests", "impressions", "ads", "organic"):
        for day in [*days[:first], *days[last:]]:
            shutil.rmtree(out / name / f"day={day}")
    return out


def test_two_parts_that_overlap_give_the_whole(whole, tmp_path) -> None:
    reference, traffic = part(whole, tmp_path / "reference", 0, 3), part(whole, tmp_path / "traffic", 2, 5)
    merge_logs(reference, traffic, tmp_path / "merged")
    for name, table in (TABLES | OPTIONAL_TABLES).items():
        one, two = (read_table(folder, name).sort_values(list(table.key), ignore_index=True) for folder in (tmp_path / "merged", whole))
        pd.testing.assert_frame_equal(one, two, obj=name)
    assert validate_logs(tmp_path / "merged", tmp_path / "out").passed


def test_without_optional_tables_none_appear(whole, tmp_path) -> None:
    folders = part(whole, tmp_path / "reference", 0, 3), part(whole, tmp_path / "traffic", 3, 5)
    for folder in folders:
        for name in OPTIONAL_TABLES:
            shutil.rmtree(folder / name)
    assert set(merge_logs(*folders, tmp_path / "merged")) == set(TABLES)
    assert not any(has_table(tmp_path / "merged", name) for name in OPTIONAL_TABLES)


def test_traffic_of_another_platform_and_an_old_folder_are_refused(whole, tmp_path) -> None:
    reference, traffic = part(whole, tmp_path / "reference", 0, 3), part(whole, tmp_path / "traffic", 2, 5)
    requests = read_table(traffic, "requests")
    write_table(traffic, "requests", requests.assign(request_id=requests["request_id"] + 10**9))
    with pytest.raises(LogError, match="none in common"):
        merge_logs(reference, traffic, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "merged").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        merge_logs(reference, traffic, tmp_path / "merged")
