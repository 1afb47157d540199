"""Raw traffic to clean logs: exact under replay and disorder, a day at a time, in any number of buckets, readable as training logs."""

from __future__ import annotations

import dataclasses
import shutil

import monitoring_traffic
import numpy as np
import pandas as pd
import pytest

from benchmarks.experiments import events, write_raw_events
from marketplace import logs
from marketplace.schema import IMPRESSIONS, REQUESTS
from monitoring import store
from monitoring.facts import build_facts, events_of, join_events, per_user, read_facts


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    truth = write_raw_events(folder, 6000, np.random.default_rng(3), most_copies=5)
    return folder, truth


def _whole(folder):
    """Everything in memory, joined at once."""
    frames = {name: store._read(sorted((folder / name).glob("*/*.parquet")), schema, 0, 1) for name, schema in (("requests", REQUESTS.arrow), ("impressions", IMPRESSIONS.arrow), ("events", store.EVENTS))}
    return build_facts(frames["requests"], frames["impressions"], 24.0, frames["events"])


def test_records_delivered_one_to_five_times_in_any_order_count_exactly_once(raw, tmp_path):
    folder, truth = raw
    counts = store.update(folder, tmp_path).counts
    facts = read_facts(tmp_path)
    assert (counts.impressions, counts.clicks, counts.purchases) == (truth["impressions"], truth["clicks"], truth["purchases"])
    assert facts.impressions["revenue"].sum() == pytest.approx(truth["revenue"], rel=1e-12)
    assert facts.impressions["gmv"].sum() == pytest.approx(truth["gmv"], rel=1e-12)
    assert counts.duplicate_events > 0 and counts.duplicate_impressions > 0 and counts.duplicate_requests > 0


def test_days_and_buckets_equal_one_join_of_everything(raw, tmp_path):
    folder, _ = raw
    whole = _whole(folder)
    for rows_at_once in (10**9, 2000):
        out = tmp_path / str(rows_at_once)
        counts = store.update(folder, out, rows_at_once=rows_at_once).counts
        pd.testing.assert_frame_equal(per_user(read_facts(out)), per_user(whole))
        assert dataclasses.replace(counts, users_in_two_arms=0) == dataclasses.replace(whole.counts, users_in_two_arms=0)
    parts = {len(list(day.glob("*.parquet"))) for day in (tmp_path / "2000" / "impressions").iterdir()}
    assert max(parts) > 1


def test_a_second_update_does_nothing_and_new_events_touch_their_days_only(raw, tmp_path):
    folder, _ = raw
    copy, out = tmp_path / "raw", tmp_path / "store"
    shutil.copytree(folder, copy)
    first = store.update(copy, out)
    assert first.written == first.days
    assert store.update(copy, out).written == []
    day = first.days[2]
    shown = logs.read_table(out, "impressions", [day])
    row = shown[shown["click"] == 0].iloc[0]
    late = pd.DataFrame({"kind": "click", "request_id": [row["request_id"]], "slot": [row["slot"]], "event_timestamp": [row["event_timestamp"] + pd.Timedelta(1, "s")], "order_value": 0.0})
    store.write_events(copy, late, name="part-late")
    again = store.update(copy, out)
    assert day in again.written and first.days[0] not in again.written
    assert again.counts.clicks == first.counts.clicks + 1
    pd.testing.assert_frame_equal(per_user(read_facts(out)), per_user(_whole(copy)))


def test_orphans_late_and_impossible_events_are_counted_apart(raw, tmp_path):
    folder, _ = raw
    copy = tmp_path / "raw"
    shutil.copytree(folder, copy)
    before = store.update(copy, tmp_path / "store").counts
    facts = read_facts(tmp_path / "store")
    quiet = facts.impressions[(facts.impressions["click"] == 0) & (facts.impressions["day"] == facts.impressions["day"].min())].iloc[:3]
    stray = quiet[["request_id", "slot"]].assign(kind="click", order_value=0.0)
    stray["event_timestamp"] = quiet["event_timestamp"] + pd.to_timedelta([25, -3, 1], unit="h")
    stray.iloc[2, stray.columns.get_loc("request_id")] = 5
    store.write_events(copy, stray, name="part-stray")
    after = store.update(copy, tmp_path / "store").counts
    assert after.clicks == before.clicks
    assert (after.late_events - before.late_events, after.impossible_events - before.impossible_events, after.orphan_clicks - before.orphan_clicks) == (1, 0 if quiet["event_timestamp"].iloc[1].hour < 3 else 1, 1 if quiet["event_timestamp"].iloc[1].hour >= 3 else 1)


def test_the_store_is_a_folder_of_training_logs(raw, tmp_path):
    folder, truth = raw
    store.update(folder, tmp_path)
    manifest = logs.verify_manifest(tmp_path)
    assert manifest["data_hash"]
    table = logs.read_table(tmp_path, "impressions")
    assert list(table.columns) == IMPRESSIONS.names
    assert len(table) == truth["impressions"]
    assert not table.duplicated(["request_id", "slot"]).any()


def test_a_store_that_was_stopped_half_way_is_brought_up_again_with_a_manifest_that_fits(raw, tmp_path, monkeypatch):
    """The disk is full at one of the writes: what is there has no manifest, and the next update ends like an undisturbed one."""
    folder, _ = raw
    copy, undisturbed, calls, failing = tmp_path / "raw", tmp_path / "undisturbed", 0, 0
    shutil.copytree(folder, copy)
    logs.write_table(copy, "ads", monitoring_traffic.traffic(0, days=1)["ads"])
    real = logs.write_bytes

    def write(path, payload):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        real(path, payload)

    monkeypatch.setattr(logs, "write_bytes", write)
    store.update(copy, undisturbed)
    wanted, all_calls = logs.data_hash(undisturbed), calls
    for failing in (1, all_calls // 2, all_calls - 1, all_calls):
        out, calls = tmp_path / f"store-{failing}", 0
        with pytest.raises(OSError, match="No space left"):
            store.update(copy, out, workers=1)
        assert not (out / logs.MANIFEST).exists()
        store.update(copy, out)
        assert logs.verify_manifest(out)["data_hash"] == wanted


def test_a_new_day_of_the_catalogue_alone_is_taken_over(raw, tmp_path):
    folder, _ = raw
    copy = tmp_path / "raw"
    shutil.copytree(folder, copy)
    catalogue = monitoring_traffic.traffic(0, days=2)["ads"]
    days = catalogue["event_timestamp"].unique()
    logs.write_table(copy, "ads", catalogue[catalogue["event_timestamp"] == days[0]])
    store.update(copy, tmp_path / "store")
    logs.write_table(copy, "ads", catalogue)
    assert store.update(copy, tmp_path / "store").written == []
    assert len(logs.days_of(tmp_path / "store", "ads")) == 2
    assert logs.verify_manifest(tmp_path / "store")["files"]


def test_an_opened_creative_counts_whichever_copy_came_first():
    shown = monitoring_traffic.traffic(0, days=1, users=5)["impressions"].iloc[:3].assign(creative_click=0)
    opened = shown.assign(creative_click=[0, 1, 0])
    for parts in ([shown, opened], [opened, shown]):
        joined, _ = join_events(pd.concat(parts, ignore_index=True), events_of(shown), 24.0)
        assert joined["creative_click"].tolist() == [0, 1, 0]


def test_unreadable_and_wrong_input_is_named(raw, tmp_path):
    folder, _ = raw
    copy = tmp_path / "raw"
    shutil.copytree(folder, copy)
    file = sorted((copy / "events").glob("*/*.parquet"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(logs.LogError, match="part-0.parquet"):
        store.update(copy, tmp_path / "store")
    with pytest.raises(logs.LogError, match="kind must be"):
        store.write_events(tmp_path, pd.DataFrame({"kind": ["view"], "request_id": 1, "slot": 1, "event_timestamp": pd.Timestamp("2026-03-01", tz="UTC"), "order_value": 0.0}))


@pytest.mark.soak
def test_a_million_events_are_joined_exactly_in_less_than_two_gigabytes():
    measured = events()
    assert measured["equal_to_the_truth"]
    assert measured["peak_gb"] < 2.0
    assert measured["seconds_join"] < 30.0
