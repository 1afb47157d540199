"""Clean logs raise no alarm; what passed can be accepted and compared with; broken folders give failures, not tracebacks."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from poisons import POISONS, manifest_again, rewrite
from pydantic import ValidationError
from validation_logs import TINY, checkins_logs, synthetic_logs

from marketplace.logs import MANIFEST
from marketplace.schema import TABLES
from marketplace.validation import ValidationConfig, accept, laws_of, validate_logs, validation_text
from marketplace.validation_read import load_logs
from marketplace.validation_suites import run_suites


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return synthetic_logs(tmp_path_factory.mktemp("logs") / "clean", seed=1)


@pytest.fixture(scope="module")
def passed(clean, tmp_path_factory):
    return validate_logs(clean, tmp_path_factory.mktemp("out"))


def failures_of(result):
    return [failure.message for failure in result.failures]


@pytest.mark.parametrize("seed", [2, 3])
def test_clean_synthetic_logs_raise_no_alarm(seed, tmp_path, passed):
    accept(passed, tmp_path / "accepted")
    result = validate_logs(synthetic_logs(tmp_path / "logs", seed), tmp_path / "out", accepted=tmp_path / "accepted")
    assert failures_of(result) == []
    assert result.passed


@pytest.mark.parametrize("with_categories", [True, False])
def test_clean_check_ins_logs_raise_no_alarm(with_categories, tmp_path):
    assert failures_of(validate_logs(checkins_logs(tmp_path / "logs", 7, with_categories), tmp_path / "out")) == []


def test_several_cities_raise_no_alarm_but_a_lost_city_does(tmp_path):
    logs = synthetic_logs(tmp_path / "logs", 5, dataclasses.replace(TINY, cities=2))
    assert failures_of(validate_logs(logs, tmp_path / "out")) == []
    rewrite(logs, "requests", lambda frame, _: frame.assign(city_id=np.int32(1)), np.random.default_rng(0))
    manifest_again(logs)
    frames, laws, _ = laws_of(load_logs(logs), ValidationConfig(), dt.datetime.now(dt.UTC), None)
    wanted = {"no-lost-cities", "ad-in-request-city"}
    assert {verdict.law.rule for verdict in run_suites(frames, [law for law in laws if law.rule in wanted]) if not verdict.kept} == wanted


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_seeds_raise_no_alarm(seed, tmp_path):
    assert failures_of(validate_logs(synthetic_logs(tmp_path / "logs", seed), tmp_path / "out")) == []


@pytest.mark.skipif("EGA_DATA" not in os.environ, reason="EGA_DATA is not set; it names the folder that holds nyc/")
def test_real_check_ins_raise_no_alarm(tmp_path):
    from marketplace.checkins import CheckinsConfig
    from marketplace.worlds import WorldConfig, build_world

    world = build_world(WorldConfig(kind="checkins", checkins=CheckinsConfig(requests=4000)), 3, Path(os.environ["EGA_DATA"]) / "nyc")
    world.write_logs(tmp_path / "logs")
    assert failures_of(validate_logs(tmp_path / "logs", tmp_path / "out")) == []


# ---------------------------------------------------------------------------------------------------------------------
# The result


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href")]


def test_data_docs_are_one_file_that_needs_nothing_else(passed):
    page = passed.html.read_text(encoding="utf-8")
    parser = _Links()
    parser.feed(page)
    assert parser.outside == []
    assert "script" not in parser.tags
    assert "passed" in page
    for name in TABLES:
        assert f"{name}: " in page


def test_every_column_of_the_schema_is_checked_for_nulls_types_and_ranges(passed):
    record = json.loads((passed.html.parent / "validation.json").read_text())
    assert record["passed"] and record["laws"] == passed.laws > 200
    page = passed.html.read_text(encoding="utf-8")
    for table in TABLES.values():
        for column in table.columns:
            assert f"<td>{column.name}</td><td>column type</td>" in page
            if not column.nullable:
                assert f"<td>{column.name}</td><td>never missing</td>" in page
            if column.minimum is not None:
                assert f"<td>{column.name}</td><td>values in range</td>" in page


def test_the_text_is_one_line_when_all_is_well_and_names_the_rule_when_not(passed, clean, tmp_path):
    assert validation_text(passed).startswith("validation passed: ") and "\n" not in validation_text(passed)
    logs = tmp_path / "logs"
    shutil.copytree(clean, logs)
    POISONS["payment above bid"][0](logs, np.random.default_rng(0))
    failed = validate_logs(logs, tmp_path / "out")
    assert "FAILED" in validation_text(failed) and "[payment-at-most-bid]" in validation_text(failed)
    assert "FAILED" in failed.html.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["failures"][0]["rule"] == "payment-at-most-bid"
    with pytest.raises(ValueError, match="cannot be accepted"):
        accept(failed, tmp_path / "accepted")


def test_now_is_the_limit_of_timestamps(clean):
    def broken(now: dt.datetime) -> set[str]:
        frames, laws, _ = laws_of(load_logs(clean), ValidationConfig(), now, None)
        return {verdict.law.frame for verdict in run_suites(frames, [law for law in laws if law.rule == "no-future-timestamps"]) if not verdict.kept}

    assert broken(dt.datetime(2025, 9, 3, tzinfo=dt.UTC)) >= {"requests", "impressions", "behaviours", "ads"}
    assert broken(dt.datetime(2025, 9, 7, tzinfo=dt.UTC)) == set()
    with pytest.raises(ValueError, match="time zone"):
        validate_logs(clean, clean.parent / "out", now=dt.datetime(2025, 9, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Against the last accepted logs


def broken_rules(logs: Path, accepted: dict) -> set[str]:
    frames, laws, _ = laws_of(load_logs(logs), ValidationConfig(), dt.datetime.now(dt.UTC), accepted)
    return {verdict.law.rule for verdict in run_suites({"statistics": frames["statistics"]}, laws) if not verdict.kept}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"ads_median_bid": 0.01}, "bid-level"),
        ({"impressions_median_bid": 100.0}, "bid-level"),
        ({"clicks": 100_000, "impressions": 200_000}, "click-rate-as-accepted"),
        ({"clicks": 1_000, "impressions": 100_000}, "click-rate-as-accepted"),
        ({"varied": ["requests.utc_offset_minutes"]}, "no-constant-features"),
    ],
)
def test_a_jump_against_the_accepted_logs_is_found(change, rule, clean, passed):
    accepted = json.loads(json.dumps(passed.statistics))
    assert broken_rules(clean, accepted) == set()
    assert broken_rules(clean, accepted | change) == {rule}


def test_accept_writes_what_the_next_validation_reads_and_a_broken_file_is_a_warning(clean, passed, tmp_path):
    path = accept(passed, tmp_path / "accepted")
    assert json.loads(path.read_text())["data_hash"] == passed.statistics["data_hash"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert accept(passed.statistics, tmp_path / "accepted") == path
    path.write_text('{"format": 1')
    result = validate_logs(clean, tmp_path / "out", accepted=tmp_path / "accepted")
    assert result.passed
    assert [(failure.rule, failure.severity) for failure in result.failures] == [("accepted-statistics-readable", "warning")]
    assert "passed with warnings" in validation_text(result)


# ---------------------------------------------------------------------------------------------------------------------
# Broken folders


def test_an_empty_folder_and_no_folder_are_failures(tmp_path):
    (tmp_path / "logs").mkdir()
    for logs in (tmp_path / "logs", tmp_path / "nowhere"):
        result = validate_logs(logs, tmp_path / "out")
        assert not result.passed
        assert "tables-present" in {failure.rule for failure in result.failures}


def test_files_without_page_checksums_or_manifest_are_fine(clean, tmp_path):
    import pyarrow.parquet as pq

    logs = tmp_path / "logs"
    shutil.copytree(clean, logs)
    (logs / MANIFEST).unlink()
    for path in logs.glob("*/*/*.parquet"):
        pq.write_table(pq.read_table(path, partitioning=None), path)
    assert set(load_logs(logs).files[["unreadable", "missing_columns", "extra_columns", "wrong_types", "changed"]].to_numpy().ravel()) == {""}


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_byte_anywhere_is_noticed(seed, clean, tmp_path):
    rng = np.random.default_rng(seed)
    logs = tmp_path / "logs"
    shutil.copytree(clean, logs)
    files = sorted(logs.glob("*/*/*.parquet"))
    path = files[rng.integers(len(files))]
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(data))
    found = load_logs(logs).files
    assert path.relative_to(logs).as_posix() in set(found.loc[found["changed"] != "", "file"])


def test_no_clicks_at_all_is_a_failure_and_no_traceback(clean, tmp_path):
    logs = tmp_path / "logs"
    shutil.copytree(clean, logs)
    rewrite(logs, "impressions", lambda frame, _: frame.assign(click=np.int32(0), click_timestamp=frame["click_timestamp"].where(frame["slot"] < 0)), np.random.default_rng(0))
    frames, laws, _ = laws_of(load_logs(logs), ValidationConfig(), dt.datetime.now(dt.UTC), None)
    rules = {verdict.law.rule for verdict in run_suites(frames, [law for law in laws if law.kind in ("within", "varies")]) if not verdict.kept}
    assert rules == {"no-constant-features", "no-flipped-labels", "no-click-without-impression"}


def test_a_rule_that_cannot_be_computed_is_a_failure(clean, monkeypatch):
    from marketplace import validation, validation_rules

    def fails(look):
        raise TypeError("no such comparison")

    rule = dataclasses.replace(validation_rules.ROW_RULES[0], check=fails)
    monkeypatch.setattr(validation, "ROW_RULES", (rule,))
    frames, laws, _ = laws_of(load_logs(clean), ValidationConfig(), dt.datetime.now(dt.UTC), None)
    broken = [verdict.law for verdict in run_suites(frames, [law for law in laws if law.kind == "within"]) if not verdict.kept]
    assert [law.rule for law in broken] == ["rules-can-be-checked"]
    assert "no such comparison" in broken[0].says


def test_a_folder_that_is_no_day_and_a_broken_manifest_are_named(clean, tmp_path):
    logs = tmp_path / "logs"
    shutil.copytree(clean, logs)
    next((logs / "ads").glob("day=*")).rename(logs / "ads" / "yesterday")
    (logs / MANIFEST).write_text("[]")
    found = load_logs(logs).files
    assert "not named day=YYYY-MM-DD" in " ".join(found["unreadable"])
    assert "not a manifest" in " ".join(found["changed"])


def test_config_refuses_nonsense():
    for wrong in ({"max_click_rate": 0}, {"bid_factor": 0.5}, {"unknown": 1}, {"constant_minimum_rows": 1}):
        with pytest.raises(ValidationError):
            ValidationConfig(**wrong)


def test_may_be_constant_lifts_the_rule(clean, tmp_path):
    logs = tmp_path / "logs"
    shutil.copytree(clean, logs)
    POISONS["constant feature, pctr"][0](logs, np.random.default_rng(0))

    def broken(config: ValidationConfig) -> bool:
        frames, laws, _ = laws_of(load_logs(logs), config, dt.datetime.now(dt.UTC), None)
        return any(not verdict.kept for verdict in run_suites(frames, [law for law in laws if law.rule == "no-constant-features"]))

    assert broken(ValidationConfig())
    assert not broken(ValidationConfig(may_be_constant=("impressions.pctr",)))
