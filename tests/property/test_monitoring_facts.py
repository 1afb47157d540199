"""Replays and disorder never change a metric: the facts of a delivered stream equal those of the clean one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.schema import IMPRESSIONS, REQUESTS
from monitoring import facts as monitoring_facts

START = pd.Timestamp("2026-03-01", tz="UTC")


def world(seed: int, requests: int = 40, slots: int = 3):
    """Clean requests, impressions without outcomes, and outcome events."""
    generator = np.random.default_rng(seed)
    users = generator.integers(0, 12, requests)
    asked = pd.DataFrame(
        {
            "request_id": np.arange(requests) + 100,
            "event_timestamp": START + pd.to_timedelta(generator.integers(0, 3 * 86400, requests), unit="s"),
            "user_id": users,
            "session_id": 0,
            "city_id": 1,
            "latitude": 40.0,
            "longitude": -73.0,
            "utc_offset_minutes": -300,
            "slots": slots,
            "arm": np.where(users % 2 == 0, "bootstrap", "model"),
            "model_version": "x",
        }
    )[REQUESTS.names]
    shown = asked.loc[asked.index.repeat(slots), ["request_id", "event_timestamp", "user_id"]].reset_index(drop=True)
    count = len(shown)
    shown = shown.assign(
        slot=np.tile(np.arange(1, slots + 1), requests),
        ad_id=generator.integers(0, 50, count),
        creative_id=1,
        bid=2.0,
        payment=generator.uniform(0.1, 2.0, count),
        pctr=np.float32(0.1),
        propensity=np.float32(1.0),
        click=0,
        click_timestamp=pd.Series(pd.NaT, index=range(count), dtype="datetime64[us, UTC]"),
        purchase=0,
        order_value=0.0,
        creative_click=0,
    )[IMPRESSIONS.names]
    clicked = shown[generator.random(count) < 0.3]
    clicks = clicked[["request_id", "slot"]].assign(
        kind="click", event_timestamp=clicked["event_timestamp"] + pd.to_timedelta(generator.integers(1, 3000, len(clicked)), unit="s"), order_value=0.0
    )
    bought = clicks[generator.random(len(clicks)) < 0.4]
    purchases = bought.assign(kind="purchase", event_timestamp=bought["event_timestamp"] + pd.Timedelta(60, "s"), order_value=generator.uniform(1, 90, len(bought)))
    return asked, shown, pd.concat([clicks, purchases], ignore_index=True)[monitoring_facts.EVENT_COLUMNS]


def replay(frame: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    copies = generator.integers(1, 6, len(frame))
    return frame.loc[frame.index.repeat(copies)].sample(frac=1.0, random_state=generator).reset_index(drop=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), delivery=st.integers(0, 10**6))
def test_replayed_and_shuffled_streams_give_exactly_the_same_facts(seed, delivery):
    asked, shown, events = world(seed)
    generator = np.random.default_rng(delivery)
    clean = monitoring_facts.build_facts(asked, shown, events=events)
    noisy = monitoring_facts.build_facts(replay(asked, generator), replay(shown, generator), events=replay(events, generator))
    pd.testing.assert_frame_equal(clean.impressions, noisy.impressions)
    pd.testing.assert_frame_equal(clean.requests, noisy.requests)
    pd.testing.assert_frame_equal(monitoring_facts.per_user(clean), monitoring_facts.per_user(noisy))
    assert clean.counts.clicks == noisy.counts.clicks == (events["kind"] == "click").sum()
    assert clean.counts.duplicate_impressions == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_outcomes_already_merged_into_the_rows_equal_outcomes_sent_as_events(seed):
    asked, shown, events = world(seed)
    from_events = monitoring_facts.build_facts(asked, shown, events=events)
    merged = from_events.impressions[IMPRESSIONS.names]
    again = monitoring_facts.build_facts(asked, pd.concat([merged, shown.sample(frac=0.5, random_state=1)], ignore_index=True))
    pd.testing.assert_frame_equal(from_events.impressions, again.impressions)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_does_not_fit_is_counted_and_changes_nothing(seed):
    asked, shown, events = world(seed)
    clean = monitoring_facts.build_facts(asked, shown, events=events)
    free = shown.merge(events[["request_id", "slot"]].drop_duplicates(), on=["request_id", "slot"], how="left", indicator=True)
    row = free[free["_merge"] == "left_only"].iloc[0]
    stray = pd.DataFrame(
        [
            {"kind": "click", "request_id": 999_999, "slot": 1, "event_timestamp": START, "order_value": 0.0},
            {"kind": "click", "request_id": row["request_id"], "slot": row["slot"], "event_timestamp": row["event_timestamp"] + pd.Timedelta(25, "h"), "order_value": 0.0},
            {"kind": "purchase", "request_id": row["request_id"], "slot": row["slot"], "event_timestamp": row["event_timestamp"] + pd.Timedelta(1, "h"), "order_value": 9.0},
        ]
    )
    got = monitoring_facts.build_facts(asked, shown, events=pd.concat([events, stray], ignore_index=True))
    pd.testing.assert_frame_equal(clean.impressions, got.impressions)
    assert (got.counts.orphan_clicks, got.counts.late_events, got.counts.orphan_purchases) == (1, 1, 1)


@pytest.mark.parametrize(("seconds", "counted", "field"), [(-60, True, "skewed_events"), (-7200, False, "impossible_events")])
def test_clock_skew_never_makes_a_negative_delay(seconds, counted, field):
    asked, shown, _ = world(1)
    row = shown.iloc[0]
    event = pd.DataFrame([{"kind": "click", "request_id": row["request_id"], "slot": row["slot"], "event_timestamp": row["event_timestamp"] + pd.Timedelta(seconds, "s"), "order_value": 0.0}])
    got = monitoring_facts.build_facts(asked, shown, events=event)
    assert got.counts.clicks == int(counted)
    assert getattr(got.counts, field) == 1
    delay = (got.impressions["click_timestamp"] - got.impressions["event_timestamp"]).dt.total_seconds()
    assert not (delay < 0).any()


def test_orphan_impressions_conflicts_and_two_armed_users_are_counted_and_left_out():
    asked, shown, events = world(2)
    stray = shown.iloc[[0]].assign(request_id=555_555)
    conflict = shown.iloc[[1]].assign(ad_id=777, event_timestamp=shown["event_timestamp"].iloc[1] + pd.Timedelta(1, "s"))
    other_arm = asked.iloc[[0]].assign(request_id=888, arm="model" if asked["arm"].iloc[0] == "bootstrap" else "bootstrap")
    got = monitoring_facts.build_facts(pd.concat([asked, other_arm], ignore_index=True), pd.concat([shown, stray, conflict], ignore_index=True), events=events)
    assert (got.counts.orphan_impressions, got.counts.conflicting_impressions, got.counts.users_in_two_arms) == (1, 1, 1)
    assert asked["user_id"].iloc[0] not in set(monitoring_facts.per_user(got)["user_id"])
