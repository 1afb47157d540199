"""Budgets, pacing and the quality floor: what is spent never exceeds the budget, bids move by past spend only, prices stay lawful."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_world import BODY, NOW, bootstrap_ranking, catalogue, model_ranking

import auction
from auction.pacing import LOWEST, pace
from auction.receipt import difference
from serving.event_log import SCHEMA_VERSION, EventLog, EventLogError, EventRecord, read_impressions, read_receipts
from serving.messages import EventsRequest, RankRequest
from serving.pacing import BudgetError, read_budgets
from serving.settings import ServingConfig, SettingsError, load_settings
from serving.users import UNKNOWN

CITY = catalogue().query("city_id == 0").set_index("ad_id")
MIDNIGHT = datetime(2026, 6, 2, tzinfo=UTC)

amounts = st.lists(st.tuples(st.floats(LOWEST, 1.0), st.floats(0, 1e6), st.floats(1e-3, 1e6) | st.just(float("inf"))), min_size=1, max_size=5)


@given(ads=amounts, elapsed=st.floats(0, 1))
def test_multipliers_stay_in_range_and_fall_with_spend(ads: list[tuple[float, float, float]], elapsed: float) -> None:
    now, spent, budget = (np.array(column) for column in zip(*ads, strict=True))
    after = pace(now, spent, budget, elapsed)
    assert ((after >= LOWEST) & (after <= 1.0)).all() and (after[np.isinf(budget)] == 1.0).all()
    assert (pace(now, spent + 1.0, budget, elapsed) <= after).all()
    if elapsed == 0.0:
        np.testing.assert_array_equal(after[np.isfinite(budget)], now[np.isfinite(budget)])


def test_pacing_meets_a_budget_that_the_day_would_exceed() -> None:
    """Spend proportional to the multiplier, three times the budget at full bids: paced, the money lasts the day."""
    multiplier, spent = np.ones(1), np.zeros(1)
    for step in range(1, 1441):
        spent += 300.0 * multiplier / 1440
        multiplier = pace(multiplier, spent, np.array([100.0]), step / 1440)
    assert spent[0] == pytest.approx(100.0, rel=0.05)


@pytest.mark.parametrize(("arguments", "message"), [(([1.0], [0.0], [0.0], 0.5), "above 0"), (([1.0], [0.0], [1.0], 1.5), "elapsed"), (([1.5], [0.0], [1.0], 0.5), "multiplier")])
def test_bad_pacing_inputs_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(auction.AuctionInputError, match=message):
        pace(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ad,budget\n1,2\n", "columns must be"), ("ad_id,daily_budget\n1,0\n", "line 2"), ("ad_id,daily_budget\n1,5\nx,3\n", "line"), ("ad_id,daily_budget\n1,5\n1,6\n", "named twice"),
     ("ad_id,daily_budget\n1,many\n", "line 2.*many")],
)  # fmt: skip
def test_bad_budget_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "budgets.csv").write_text(text)
    with pytest.raises(BudgetError, match=message):
        read_budgets(tmp_path / "budgets.csv")


def test_budget_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "budgets.csv").write_text("ad_id,daily_budget\n1000,2.5\n1002,7\n")
    assert read_budgets(tmp_path / "budgets.csv") == {1000: 2.5, 1002: 7.0}
    with pytest.raises(BudgetError, match="cannot be read"):
        read_budgets(tmp_path / "none.csv")


def ask(when: datetime, **fields: object) -> RankRequest:
    return RankRequest.model_validate_json(json.dumps({**BODY, "timestamp": when.isoformat(), **fields}))


@pytest.mark.parametrize("arm", ["control", "ega"])
def test_a_day_of_clicks_never_spends_more_than_the_budgets(tmp_path: Path, arm: str) -> None:
    budgets = {int(ad): 12 * float(CITY.loc[ad, "bid"]) for ad in CITY.index[::2]}
    make = bootstrap_ranking if arm == "control" else model_ranking
    ranking = make(tmp_path, budgets=budgets, pacing_interval_seconds=600)
    paced = 0
    for minute in range(0, 24 * 60, 12):
        when = MIDNIGHT + timedelta(minutes=minute)
        answer = ranking.rank(ask(when, user_id=minute))
        events = [{"type": "click", "request_id": answer["request_id"], "slot": ad["slot"], "timestamp": when.isoformat()} for ad in answer["ads"]]
        assert answer["ads"] and answer["degraded"] in ([], [UNKNOWN])
        ranking.events(EventsRequest.model_validate_json(json.dumps({"events": events})))
    impressions = read_impressions(ranking._log.path)
    assert (impressions["payment"] <= impressions["bid"]).all() and (impressions["click"] == 1).all()
    spent = impressions.groupby("ad_id")["payment"].sum()
    for ad, budget in budgets.items():
        assert spent.get(ad, 0.0) <= budget * (1 + 1e-12)
    assert any(spent.get(ad, 0.0) > 0.6 * budget for ad, budget in budgets.items())  # they are used, too
    receipts = read_receipts(ranking._log.path)
    assert [difference(receipt) for receipt in receipts] == [None] * len(receipts)
    for receipt in receipts:
        limited = receipt["ad_id"] in budgets
        assert receipt["price"] <= receipt["paced_bid"] <= receipt["bid"] == CITY.loc[receipt["ad_id"], "bid"]
        assert limited or receipt["paced_bid"] == receipt["bid"]
        paced += receipt["paced_bid"] < receipt["bid"]
    assert paced > 10
    tomorrow = ranking.rank(ask(MIDNIGHT + timedelta(days=1, seconds=1), user_id=3))
    fresh = {receipt["ad_id"]: receipt for receipt in read_receipts(ranking._log.path)[-len(tomorrow["ads"]) :]}
    assert all(receipt["paced_bid"] == receipt["bid"] for receipt in fresh.values())  # a new day, a new budget


def test_a_click_beyond_the_budget_is_charged_what_is_left_and_survives_a_restart(tmp_path: Path) -> None:
    ranking = bootstrap_ranking(tmp_path)
    pages = [ranking.rank(ask(NOW, user_id=user)) for user in range(40)]
    shown = read_impressions(ranking._log.path)
    ad = int(shown["ad_id"].mode()[0])
    clicks = [EventRecord("click", page["request_id"], a["slot"], ad, NOW, 0.0) for page in pages for a in page["ads"] if a["ad_id"] == ad]
    total = float(shown.loc[shown["ad_id"] == ad, "payment"].sum())
    ranking._log.close()
    budget = {ad: 0.4 * total}
    log = EventLog(ranking._log.path, budgets=budget)
    assert set(log.write_events(clicks[:3], NOW)) == {"accepted"} and log.write_events(clicks[:3], NOW) == ["duplicate"] * 3
    log.close()
    again = EventLog(ranking._log.path, budgets=budget)  # what was spent before counts
    again.write_events(clicks, NOW)
    after = read_impressions(again.path)
    mine = after[after["ad_id"] == ad]
    assert mine["click"].all() and mine["payment"].sum() == pytest.approx(0.4 * total)
    assert again.spent_since(NOW.replace(hour=0, minute=0, second=0, microsecond=0)) == {ad: pytest.approx(0.4 * total)}
    untouched = after[after["ad_id"] != ad]
    np.testing.assert_array_equal(untouched["payment"], shown[shown["ad_id"] != ad]["payment"])


def test_a_rolled_back_event_is_not_billed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = bootstrap_ranking(tmp_path, budgets={int(ad): 1e-6 for ad in CITY.index}, pacing_interval_seconds=1e9)
    page = ranking.rank(ask(NOW))
    bad = [EventRecord("click", page["request_id"], 1, None, NOW, 0.0), EventRecord("click", page["request_id"], 2, None, NOW, "no number")]  # type: ignore[arg-type]
    monkeypatch.setattr(ranking._log, "_bill", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        ranking._log.write_events(bad, NOW)
    monkeypatch.undo()
    assert ranking._log.spent_since(NOW.replace(hour=0, minute=0, second=0, microsecond=0)) == {}
    assert read_impressions(ranking._log.path)["click"].sum() == 0


def test_the_quality_floor_filters_on_pctr_and_nothing_else(tmp_path: Path) -> None:
    free = model_ranking(tmp_path / "free")
    everybody = free.rank(ask(NOW, slots=5))
    rank_ctr = sorted(receipt["rank_ctr"] for receipt in read_receipts(free._log.path))
    floor = rank_ctr[2]
    strict = model_ranking(tmp_path / "strict", quality_floor=floor)
    answer = strict.rank(ask(NOW, slots=5))
    receipts = read_receipts(strict._log.path)
    assert receipts and all(receipt["rank_ctr"] >= floor for receipt in receipts)
    kept = [ad["ad_id"] for ad in everybody["ads"] if ad["ad_id"] in {a["ad_id"] for a in answer["ads"]}]
    assert len(kept) >= 3
    nobody = model_ranking(tmp_path / "nobody", quality_floor=0.999999)
    assert nobody.rank(ask(NOW))["ads"] == []
    with pytest.raises(ValueError, match="quality_floor"):
        ServingConfig(home=tmp_path, quality_floor=1.0)


def test_settings_for_a_given_home(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"quality_floor": 0.02, "budgets": "b.csv"}')
    config = load_settings(file, tmp_path)
    assert config.home == tmp_path and config.quality_floor == 0.02 and config.budgets == tmp_path / "b.csv"  # beside the settings
    for text, message in (("[1]", "Input should be"), ("{", "are no JSON"), ('{"floor": 1}', "floor"), ('{"quality_floor": 2}', "quality_floor")):
        file.write_text(text)
        with pytest.raises(SettingsError, match=message):
            load_settings(file, tmp_path)


def test_an_event_log_of_the_format_before_is_named_and_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    EventLog(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("DROP TABLE organic; DROP TABLE billing; DROP TABLE shadow; DROP INDEX IF EXISTS event_unpushed; ALTER TABLE event DROP COLUMN pushed; PRAGMA user_version=1;")
    with pytest.raises(EventLogError, match=f"has format 1, this release reads {SCHEMA_VERSION}"):
        read_impressions(path)
    EventLog(path).close()
    assert len(read_impressions(path)) == 0
