"""The event log: exactly once, durable, and training input again."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_world import NOW, bootstrap_ranking, catalogue

from marketplace.logs import read_table
from marketplace.schema import ACTION_CLICK, ACTION_PURCHASE, BEHAVIOURS, IMPRESSIONS, ORGANIC, REQUESTS
from serving.event_log import (
    DuplicateRequest,
    EventLog,
    EventLogError,
    EventRecord,
    PageRecord,
    export_logs,
    read_behaviours,
    read_impressions,
    read_organic,
    read_receipts,
    read_requests,
    read_service_facts,
)  # fmt: skip


def page(request_id: int, shown: int = 3) -> PageRecord:
    number = np.arange(1, shown + 1)
    return PageRecord(
        request_id=request_id, body_sha256="a" * 64, time=NOW, received=NOW, user_id=2**62, session_id=5, city_id=1, latitude=1.5, longitude=-2.5,
        utc_offset_minutes=-300, slots=5, arm="ega", model_version="0123456789ab", price_mode="critical", degraded=("x",), latency_ms=3.5,
        answer={"request_id": request_id}, ad_id=2**62 + number, creative_id=number, poi_id=number + 10, category_id=number + 20, ad_latitude=number / 7,
        ad_longitude=number / 9, bid=number * 1.1, payment=number * 0.9, pctr=number / 30, propensity=np.ones(shown), receipts=[{"slot": int(n)} for n in number],
    )  # fmt: skip


def test_a_page_comes_back_in_the_schema_and_exactly(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    log = EventLog(path)
    log.write_page(page(2**63 - 1))
    requests, impressions = read_requests(path), read_impressions(path)
    assert list(requests) == REQUESTS.names and list(impressions) == IMPRESSIONS.names
    assert requests["request_id"].tolist() == [2**63 - 1] and requests["user_id"].tolist() == [2**62]
    assert requests["event_timestamp"].iloc[0].to_pydatetime() == NOW
    assert impressions["ad_id"].tolist() == [2**62 + n for n in (1, 2, 3)]
    assert impressions["slot"].tolist() == [1, 2, 3] and impressions["payment"].tolist() == [n * 0.9 for n in (1, 2, 3)]
    assert impressions["click"].tolist() == [0, 0, 0] and impressions["click_timestamp"].isna().all()
    assert read_receipts(path) == [{"slot": 1}, {"slot": 2}, {"slot": 3}]
    facts = read_service_facts(path)
    assert facts["latency_ms"].tolist() == [3.5] and facts["degraded"].tolist() == [["x"]]


ORGANIC_ROWS = ((2, 2**62 + 5, 7, 1.25, -2.25), (4, 12, 8, 1.75, -2.5))
"""Second and fourth on a page of three ads; the second is the place of an ad, too."""


def mixed_page(request_id: int) -> PageRecord:
    return replace(page(request_id), organic=ORGANIC_ROWS)


def event(kind: str, place: int, time: object = NOW, ad_id: int | None = None, request_id: int = 1) -> EventRecord:
    """An event at a slot or, of an organic_click, a rank; purchases are worth 9.5."""
    slot, rank = (None, place) if kind == "organic_click" else (place, None)
    return EventRecord(kind, request_id, slot, ad_id, time, 9.5 if kind == "purchase" else 0.0, rank)  # type: ignore[arg-type]


def test_organic_results_come_back_in_the_schema_with_their_clicks(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db")
    for request_id in (1, 2):
        log.write_page(mixed_page(request_id))
    log.write_page(page(3))
    assert log.write_events([event("organic_click", 2, request_id=2)], NOW) == ["accepted"]
    found = read_organic(log.path)
    assert list(found) == ORGANIC.names and found["request_id"].tolist() == [1, 1, 2, 2] and found["rank"].tolist() == [1, 2, 1, 2]
    assert found["position"].tolist() == [2, 4, 2, 4] and found["poi_id"].tolist() == [2**62 + 5, 12] * 2 and found["click"].tolist() == [0, 0, 0, 1]
    assert found["user_id"].eq(2**62).all() and found["latitude"].tolist() == [1.25, 1.75] * 2
    assert {str(kind) for kind in found["event_timestamp"]} == {str(pd.Timestamp(NOW))}
    assert read_organic(log.path, until=NOW).empty and list(read_organic(log.path, until=NOW)) == ORGANIC.names


def test_an_organic_click_is_a_behaviour_and_opening_a_creative_is_none(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db")
    log.write_page(mixed_page(1))
    log.write_events([event("organic_click", 2), event("click", 2), event("creative_click", 2), event("creative_click", 1)], NOW)
    behaviours = read_behaviours(log.path).set_index("poi_id")
    assert sorted(behaviours.index) == [12, 12] and behaviours["behaviour_id"].nunique() == 2  # slot 2 and rank 2 are the same place, and two clicks
    assert behaviours["action"].eq(ACTION_CLICK).all() and sorted(behaviours["creative_id"]) == [0, 2] and sorted(behaviours["category_id"]) == [8, 22]
    assert behaviours["session_id"].eq(5).all() and behaviours["user_id"].eq(2**62).all()
    pushed, keys = log.unpushed()
    assert sorted(keys) == [(1, 2, "click"), (1, 2, "organic_click")]
    pd.testing.assert_frame_equal(pushed, read_behaviours(log.path))
    log.mark_pushed(keys[:1])
    assert log.unpushed()[1] == keys[1:] and len(log.unpushed()[0]) == 1


def test_opening_a_creative_costs_nothing_and_is_no_click(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db", budgets={2**62 + 1: 10.0, 2**62 + 2: 10.0})
    log.write_page(mixed_page(1))
    log.write_events([event("creative_click", 1), event("creative_click", 2), event("click", 2), event("purchase", 1), event("organic_click", 1)], NOW)
    shown = read_impressions(log.path)
    assert shown["creative_click"].tolist() == [1, 1, 0] and shown["click"].tolist() == [0, 1, 0] and shown["purchase"].tolist() == [0, 0, 0]
    assert shown["click_timestamp"].isna().tolist() == [True, False, True]
    midnight = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
    assert log.spent_since(midnight) == {2**62 + 2: 1.8}
    log.close()
    assert EventLog(log.path, budgets={2**62 + 1: 10.0, 2**62 + 2: 10.0}).spent_since(midnight) == {2**62 + 2: 1.8}  # as a restart reads it


def test_a_request_id_is_written_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db")
    log.write_page(page(1))
    with pytest.raises(DuplicateRequest) as caught:
        log.write_page(replace(page(1, shown=5), organic=ORGANIC_ROWS))
    assert caught.value.stored.answer == {"request_id": 1}
    assert len(read_impressions(log.path)) == 3 and read_organic(log.path).empty


def test_a_page_whose_organic_results_cannot_be_stored_is_not_there_at_all(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db")
    with pytest.raises(sqlite3.Error):
        log.write_page(replace(page(1), organic=(*ORGANIC_ROWS, (5, 13, None, 0.0, 0.0))))  # type: ignore[arg-type]
    assert read_requests(log.path).empty and read_impressions(log.path).empty and read_organic(log.path).empty


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_repeated_and_shuffled_events_count_once(tmp_path: Path, data: st.DataObject) -> None:
    truth = [("click", 1), ("click", 3), ("purchase", 3), ("creative_click", 2), ("creative_click", 3), ("organic_click", 1)]
    sent = data.draw(st.permutations([one for one in truth for _ in range(data.draw(st.integers(1, 5)))]))
    path = tmp_path / f"{os.urandom(8).hex()}.db"
    log = EventLog(path, "normal")
    log.write_page(mixed_page(1))
    outcomes = [log.write_events([event(kind, place, NOW + timedelta(seconds=place))], NOW)[0] for kind, place in sent]
    log.close()
    assert outcomes.count("accepted") == len(truth) and outcomes.count("duplicate") == len(sent) - len(truth)
    impressions = read_impressions(path)
    assert impressions["click"].tolist() == [1, 0, 1] and impressions["purchase"].tolist() == [0, 0, 1]
    assert impressions["order_value"].tolist() == [0.0, 0.0, 9.5]
    assert impressions["creative_click"].tolist() == [0, 1, 1] and read_organic(path)["click"].tolist() == [1, 0]
    assert read_behaviours(path)["action"].tolist() == [ACTION_CLICK, ACTION_CLICK, ACTION_CLICK, ACTION_PURCHASE]


def test_unknown_impressions_wrong_ads_and_early_clocks(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db")
    log.write_page(page(1))
    early = NOW - timedelta(hours=1)
    events = [EventRecord("click", 9, 1, None, None, 0.0), EventRecord("click", 1, 4, None, None, 0.0), EventRecord("click", 1, 1, 77, None, 0.0)]
    outcomes = log.write_events([*events, EventRecord("click", 1, 2, 2**62 + 2, early, 0.0)], NOW)  # type: ignore[list-item]
    assert outcomes == ["unknown_impression", "unknown_impression", "ad_mismatch", "accepted"]
    assert read_impressions(log.path)["click_timestamp"].iloc[1].to_pydatetime() == NOW
    log.write_page(mixed_page(2))
    sent = [event("organic_click", 1), event("organic_click", 3, request_id=2), event("creative_click", 4), event("creative_click", 2, ad_id=77)]
    assert log.write_events(sent, NOW) == ["unknown_impression"] * 3 + ["ad_mismatch"]
    assert log.write_events([event("organic_click", 1, early, request_id=2)], NOW) == ["accepted"]
    clicked = read_behaviours(log.path).query("creative_id == 0")
    assert clicked["event_timestamp"].iloc[0].to_pydatetime() == NOW


def test_a_purchase_counts_once_its_click_is_known(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db")
    log.write_page(page(1))
    log.write_events([EventRecord("purchase", 1, 1, None, NOW, 4.0)], NOW)
    assert read_impressions(log.path)["purchase"].sum() == 0 and read_behaviours(log.path).empty
    log.write_events([EventRecord("click", 1, 1, None, NOW, 0.0)], NOW)
    assert read_impressions(log.path)["order_value"].tolist() == [4.0, 0.0, 0.0] and len(read_behaviours(log.path)) == 2


def test_live_traffic_is_a_folder_of_logs(tmp_path: Path) -> None:
    from serving_world import BODY

    from serving.messages import EventsRequest, RankRequest

    ranking = bootstrap_ranking(tmp_path)
    answer = ranking.rank(RankRequest.model_validate(BODY))
    ranking.events(EventsRequest.model_validate({"events": [{"type": "click", "request_id": answer["request_id"], "slot": 2}]}))
    rows = export_logs(tmp_path / "events" / "events.db", tmp_path / "logs", ads=catalogue())
    assert rows == {"requests": 1, "impressions": 5, "behaviours": 1, "ads": 60}
    impressions = read_table(tmp_path / "logs", "impressions")
    assert impressions["ad_id"].tolist() == [ad["ad_id"] for ad in answer["ads"]] and impressions["click"].tolist() == [0, 1, 0, 0, 0]
    assert impressions["payment"].tolist() == [ad["price"] for ad in answer["ads"]]
    behaviour = read_table(tmp_path / "logs", "behaviours")
    clicked = catalogue().set_index("ad_id").loc[answer["ads"][1]["ad_id"]]
    assert list(behaviour) == BEHAVIOURS.names and behaviour["poi_id"].tolist() == [clicked["poi_id"]]
    assert read_table(tmp_path / "logs", "requests")["model_version"].tolist() == ["bootstrap-1"]


def test_what_was_shown_among_organic_results_and_done_comes_out_as_it_was(tmp_path: Path) -> None:
    """Pages of 0 to 4 organic results; what the export says equals the answers and the events sent, place by place."""
    from serving_world import BODY

    from serving.messages import EventsRequest, RankRequest

    rng, ranking = np.random.default_rng(0), bootstrap_ranking(tmp_path)
    sent, pages = [], {}
    for request_id in range(1, 25):
        items = [{"poi_id": 10**6 + int(k), "category_id": int(k), "latitude": 40.0, "longitude": -74.0 + k / 100} for k in rng.permutation(9)[: request_id % 5]]
        answer = ranking.rank(RankRequest.model_validate({**BODY, "request_id": request_id, "slots": 3, "organic": items}))
        pages[request_id] = (answer, items)
        for ad in answer["ads"]:
            sent += [{"type": kind, "request_id": request_id, "slot": ad["slot"]} for kind in ("click", "creative_click") if rng.random() < 0.4]
        sent += [{"type": "organic_click", "request_id": request_id, "rank": rank} for rank in range(1, len(items) + 1) if rng.random() < 0.4]
    assert ranking.events(EventsRequest.model_validate({"events": sent})).accepted == len(sent)
    creatives = catalogue()[["event_timestamp", "creative_id", "ad_id"]].assign(embedding=[np.ones(2, np.float32)] * 60)
    rows = export_logs(tmp_path / "events" / "events.db", tmp_path / "logs", ads=catalogue(), creatives=creatives)
    found = {name: read_table(tmp_path / "logs", name) for name in ("impressions", "organic", "behaviours", "creatives")}
    assert {name: len(frame) for name, frame in found.items()}.items() <= rows.items()
    done = {(event["type"], event["request_id"], event.get("slot", event.get("rank"))) for event in sent}
    for request_id, (answer, items) in pages.items():
        organic = found["organic"][found["organic"]["request_id"] == request_id]
        whole = dict(zip(organic["position"], organic["poi_id"], strict=True))
        assert list(whole.values()) == [item["poi_id"] for item in items]
        whole |= {ad["slot"] + ad["above"]: ad["ad_id"] for ad in answer["ads"]}
        assert sorted(whole) == list(range(1, len(answer["ads"]) + len(items) + 1))  # every place of the page once
    for kind, table, place, column in (("click", "impressions", "slot", "click"), ("creative_click", "impressions", "slot", "creative_click"), ("organic_click", "organic", "rank", "click")):
        clicked = found[table][found[table][column] == 1]
        assert {(kind, *key) for key in zip(clicked["request_id"], clicked[place], strict=True)} == {key for key in done if key[0] == kind} != set()
    assert len(found["behaviours"]) == found["impressions"]["click"].sum() + found["organic"]["click"].sum()


_WRITER = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from serving.event_log import EventLog
from test_serving_event_log import page
log = EventLog(Path({path!r}))
for request_id in range(1, 100000):
    log.write_page(page(request_id))
    print(request_id, flush=True)
"""


def test_kill_9_loses_no_acknowledged_page(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    script = _WRITER.format(tests=str(Path(__file__).parent), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
    assert child.stdout is not None
    acknowledged = [int(child.stdout.readline()) for _ in range(40)]
    child.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in child.stdout.read().splitlines() if line]
    child.wait()
    log = EventLog(path)
    assert set(acknowledged) <= set(read_requests(path)["request_id"])
    assert read_impressions(path).groupby("request_id").size().eq(3).all()
    assert log.stored(acknowledged[-1]) is not None


def test_a_torn_wal_tail_drops_only_the_torn_page(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    log = EventLog(path, "normal")
    sizes = []
    wal = Path(f"{path}-wal")
    for request_id in range(1, 6):
        log.write_page(page(request_id))
        sizes.append(wal.stat().st_size)
    main, tail = path.read_bytes(), wal.read_bytes()
    for cut in range(sizes[-2] + 1, sizes[-1], max(1, (sizes[-1] - sizes[-2]) // 12)):
        copy = tmp_path / f"cut-{cut}.db"
        copy.write_bytes(main)
        Path(f"{copy}-wal").write_bytes(tail[:cut])
        assert EventLog(copy).stored(4) is not None
        assert read_requests(copy)["request_id"].tolist() == [1, 2, 3, 4]


def test_events_wait_for_their_push_and_a_purchase_for_its_click(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.db")
    log.write_page(page(1))
    purchase, click = EventRecord("purchase", 1, 2, None, NOW, 9.0), EventRecord("click", 1, 2, None, NOW, 0.0)
    log.write_events([purchase], NOW)
    assert log.unpushed()[1] == []
    log.write_events([click, EventRecord("click", 1, 1, None, NOW, 0.0)], NOW)
    behaviours, keys = log.unpushed()
    assert sorted(keys) == [(1, 1, "click"), (1, 2, "click"), (1, 2, "purchase")]
    assert behaviours.equals(read_behaviours(tmp_path / "events.db"))
    log.mark_pushed(keys[:1])
    assert sorted(log.unpushed()[1]) == sorted(keys[1:]) and len(log.unpushed()[0]) == 2
    assert len(log.unpushed(1)[1]) == 1


def test_a_log_without_organic_results_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    log = EventLog(path)
    log.write_page(page(1))
    log.write_events([event("click", 1)], NOW)
    log.close()
    with closing(sqlite3.connect(path)) as older:
        older.executescript("DROP TABLE organic; PRAGMA user_version=3;")
    with pytest.raises(EventLogError, match="format 3"):
        read_organic(path)
    log = EventLog(path)
    assert log.unpushed()[1] == [(1, 1, "click")] and read_organic(path).empty  # what waited for its push still does
    log.write_page(mixed_page(2))
    assert log.write_events([event("organic_click", 1), event("organic_click", 1, request_id=2), event("creative_click", 1)], NOW) == ["unknown_impression", "accepted", "accepted"]
    assert read_organic(path)["click"].tolist() == [1, 0] and read_impressions(path)["creative_click"].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_log_of_the_format_before_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    log = EventLog(path)
    log.write_page(page(1))
    log.write_events([EventRecord("click", 1, 1, None, NOW, 0.0)], NOW)
    log.close()
    with closing(sqlite3.connect(path)) as older:
        older.executescript("DROP TABLE organic; DROP INDEX event_unpushed; ALTER TABLE event DROP COLUMN pushed; DROP TABLE shadow; PRAGMA user_version=2;")
    with pytest.raises(EventLogError, match="format 2"):
        read_requests(path)
    log = EventLog(path)
    assert log.unpushed()[1] == [] and len(read_behaviours(path)) == 1 and read_impressions(path)["click"].sum() == 1  # its clicks are old news
    log.write_events([EventRecord("click", 1, 2, None, NOW, 0.0)], NOW)
    assert log.unpushed()[1] == [(1, 2, "click")]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.db").write_bytes(b"not a database" * 100)
    with pytest.raises(EventLogError, match="cannot be used"):
        EventLog(tmp_path / "junk.db")
    with sqlite3.connect(tmp_path / "newer.db") as newer:
        newer.execute("PRAGMA user_version=99")
    with pytest.raises(EventLogError, match="format 99"):
        EventLog(tmp_path / "newer.db")
    with pytest.raises(EventLogError, match="no event log"):
        read_requests(tmp_path / "absent.db")


def test_answers_are_plain_json(tmp_path: Path) -> None:
    from serving_world import BODY

    from serving.messages import RankRequest

    ranking = bootstrap_ranking(tmp_path)
    answer = ranking.rank(RankRequest.model_validate({**BODY, "request_id": 3}))
    assert ranking.rank(RankRequest.model_validate({**BODY, "request_id": 3})) == json.loads(json.dumps(answer))
