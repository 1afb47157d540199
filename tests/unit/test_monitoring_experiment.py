"""The A/B driver against a tiny real HTTP server: retries, order per user, exact accounting, and giving up."""

from __future__ import annotations

import json
import socket
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from marketplace.schema import REQUESTS
from monitoring import experiment
from monitoring.experiment import DriverConfig, ExperimentError, FaultConfig, HabitConfig, run_experiment

START = pd.Timestamp("2026-03-01 12:00:00.123456", tz="UTC")


class World:
    """60 requests of 9 users; the first ad of every page is clicked, and bought from on even requests."""

    def live_requests(self) -> pd.DataFrame:
        count = 60
        rows = dict.fromkeys(REQUESTS.names, 0)
        frame = pd.DataFrame(rows, index=range(count)).assign(
            request_id=np.arange(count) + 1, user_id=np.arange(count) % 9, event_timestamp=START + pd.to_timedelta(np.arange(count), unit="m"), slots=3, arm="none", model_version="none"
        )
        return frame.sample(frac=1.0, random_state=1).reset_index(drop=True)

    def organic_items(self, request_ids):
        return pd.DataFrame({name: [] for name in ("poi_id", "category_id", "latitude", "longitude")})

    def respond(self, row, page_ad_ids, creative_ids, above=None):
        first = np.arange(len(page_ad_ids)) == 0
        bought = first & (row.request_id % 2 == 0)
        return SimpleNamespace(
            click=first,
            click_delay_seconds=np.where(first, 5.0, np.nan),
            purchase=bought,
            purchase_delay_seconds=np.where(bought, 60.0, np.nan),
            order_value=np.where(bought, 12.5, 0.0),
            creative_click=np.zeros(len(first), bool),
            organic_click=np.zeros(0, bool),
            organic_click_delay_seconds=np.zeros(0),
        )


class MixedWorld(World):
    """Two organic results a page, of which the second is clicked; the creative of the last ad is opened; every third page finds no ads."""

    def organic_items(self, request_ids):
        return pd.DataFrame({"poi_id": [11, 12], "category_id": [1, 2], "latitude": [1.0, 2.0], "longitude": [3.0, 4.0]})

    def respond(self, row, page_ad_ids, creative_ids, above=None):
        assert above is not None and len(above) == len(page_ad_ids)
        response = super().respond(row, page_ad_ids, creative_ids)
        response.creative_click = np.arange(len(page_ad_ids)) == len(page_ad_ids) - 1
        response.organic_click, response.organic_click_delay_seconds = np.array([False, True]), np.array([np.nan, 7.25])
        return response


class Service:
    """Answers like the ranking service; `faults` maps a call number (1, 2, ...) to a status, or 'drop' to cut the connection."""

    def __init__(self, faults=None, always=None):
        self.calls, self.asked, self.events, self.headers = 0, defaultdict(list), {}, []
        lock, faults = threading.Lock(), faults or {}
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # header and body in one packet: else every answer waits for a delayed ACK

            def do_POST(self):  # noqa: N802 - the base class wants this name
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.calls += 1
                    fault = always or faults.get(service.calls)
                    service.headers.append(self.headers.get("Authorization"))
                    if fault == "drop":
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    status, answer = (fault, {"error": "busy"}) if fault else (200, service.answer(self.path, body))
                payload = json.dumps(answer).encode()
                self.send_response(status)
                if status in (429, 503):
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if path == "/v1/events":
            for event in body["events"]:
                self.events[(event["type"], event["request_id"], event.get("slot", event.get("rank")))] = event
            return {"accepted": len(body["events"]), "duplicates": 0, "rejected": []}
        self.asked[body["user_id"]].append(body["timestamp"])
        shown = () if "organic" in body and body["request_id"] % 3 == 0 else (1, 2, 3)
        ads = [{"slot": s, "ad_id": 100 + s, "creative_id": 1, "price": 0.5, "pctr": 0.1, "bid": 1.0, "above": 0} for s in shown]
        return {"request_id": body["request_id"], "model_version": "v", "arm": "ega" if body["user_id"] % 2 else "control", "city_id": 0, "ads": ads, "degraded": []}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_all_requests_are_sent_once_in_order_and_accounted_for(tmp_path):
    with Service() as service:
        summary = run_experiment(World(), service.url, tmp_path, DriverConfig(workers=3), progress=False, token="secret")  # noqa: S106
    assert (summary.requests, summary.answered, summary.errors, summary.retries) == (60, 60, 0, 0)
    assert (summary.impressions, summary.clicks, summary.purchases, summary.events_failed) == (180, 60, 30, 0)
    assert all(times == sorted(times) for times in service.asked.values())
    assert set(service.headers) == {"Bearer secret"}
    click, purchase = service.events[("click", 2, 1)], service.events[("purchase", 2, 1)]
    assert pd.Timestamp(click["timestamp"]) == START + pd.Timedelta(65, "s")
    assert pd.Timestamp(purchase["timestamp"]) - pd.Timestamp(click["timestamp"]) == pd.Timedelta(60, "s")
    assert purchase["order_value"] == 12.5
    responses = pd.read_parquet(tmp_path / "responses.parquet")
    assert len(responses) == 60
    assert (responses["response_ms"] > 0).all()
    stored = json.loads((tmp_path / "experiment.json").read_text())
    assert stored["arms"]["control"]["answered"] + stored["arms"]["ega"]["answered"] == 60


@pytest.mark.parametrize("faults", [FaultConfig(), FaultConfig(duplicates=0.5, delay=0.3)])
def test_creatives_opened_and_organic_clicks_are_sent_and_counted_apart(tmp_path, faults):
    with Service() as service:
        summary = run_experiment(MixedWorld(), service.url, tmp_path, DriverConfig(workers=2, faults=faults), progress=False)
    assert (summary.impressions, summary.clicks, summary.purchases, summary.creative_clicks, summary.organic_clicks) == (120, 40, 20, 40, 60)
    assert summary.events_failed == 0 and len(service.events) == 160
    assert {key[2] for key in service.events if key[0] == "creative_click"} == {3} and {key[2] for key in service.events if key[0] == "organic_click"} == {2}
    clicked, opened = service.events[("organic_click", 3, 2)], service.events[("creative_click", 2, 3)]
    assert set(clicked) == {"type", "request_id", "rank", "timestamp"} and pd.Timestamp(clicked["timestamp"]) == START + pd.Timedelta(127.25, "s")
    assert opened["ad_id"] == 103 and pd.Timestamp(opened["timestamp"]) == START + pd.Timedelta(60, "s")


def test_a_bad_day_takes_organic_clicks_and_opened_creatives_too(tmp_path):
    with Service() as service:
        summary = run_experiment(MixedWorld(), service.url, tmp_path, DriverConfig(workers=2, habits=HabitConfig(day_drift=0.9)), progress=False)
    assert 0 < summary.organic_clicks < 60 and 0 < summary.creative_clicks < 40


def test_busy_answers_and_cut_connections_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "LONGEST_WAIT_SECONDS", 0.01)
    with Service(faults={2: 429, 3: 503, 7: "drop", 20: 429, 21: 429}) as service:
        summary = run_experiment(World(), service.url, tmp_path, DriverConfig(workers=2), progress=False)
    assert (summary.answered, summary.errors) == (60, 0)
    assert summary.retries >= 5
    assert (summary.clicks, summary.purchases) == (60, 30)


def test_a_refused_request_is_counted_and_the_rest_goes_on(tmp_path):
    with Service(faults={5: 400}) as service:
        summary = run_experiment(World(), service.url, tmp_path, DriverConfig(workers=1), progress=False)
    assert summary.errors + summary.events_failed == 1
    assert "HTTP 400" in summary.messages[0]


def test_a_service_that_refuses_everything_stops_the_experiment_early(tmp_path):
    with Service(always=422) as service:
        with pytest.raises(ExperimentError, match="HTTP 422"):
            run_experiment(World(), service.url, tmp_path, DriverConfig(workers=2), progress=False)
        assert service.calls <= 2 * experiment.GIVE_UP_ERRORS


def test_no_service_at_all_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "LONGEST_WAIT_SECONDS", 0.0)
    with pytest.raises(ExperimentError, match="requests to http://127.0.0.1:9 failed"):
        run_experiment(World(), "http://127.0.0.1:9", tmp_path, DriverConfig(workers=2), progress=False)


def test_waits_follow_retry_after_and_never_exceed_the_cap():
    assert experiment._wait_seconds("2", 0) == 2.0
    assert experiment._wait_seconds("3600", 0) == experiment.LONGEST_WAIT_SECONDS
    assert experiment._wait_seconds("-1", 0) == 0.0
    assert experiment._wait_seconds("nan", 0) == experiment.LONGEST_WAIT_SECONDS
    assert experiment._wait_seconds("Wed, 21 Oct 2026 07:28:00 GMT", 1) == pytest.approx(0.1)


def test_a_limit_keeps_whole_users():
    requests = World().live_requests()
    kept = experiment.draw_users(requests, 30, seed=3)
    assert 0 < len(kept) <= 30
    whole = requests["user_id"].value_counts()
    assert all(whole[user] == count for user, count in kept["user_id"].value_counts().items())
    assert experiment.draw_users(requests, None, seed=3) is requests


def _sums(summary):
    return summary.clicks, summary.purchases, summary.events_failed


def test_duplicates_delays_and_wrong_clocks_change_no_count(tmp_path):
    faults = FaultConfig(duplicates=0.7, delay=0.5, clock_skew_seconds=30.0)
    with Service() as service:
        summary = run_experiment(World(), service.url, tmp_path, DriverConfig(workers=2, faults=faults), progress=False)
    assert _sums(summary) == (60, 30, 0)
    assert len(service.events) == 90
    assert summary.duplicates > 30 and summary.delayed > 20 and summary.lost == 0
    drift = [pd.Timestamp(e["timestamp"]) - START - pd.Timedelta(e["request_id"] - 1, "m") - pd.Timedelta(5, "s") for key, e in service.events.items() if key[0] == "click"]
    assert len({abs(d) for d in drift}) > 20
    assert max(abs(d) for d in drift) <= pd.Timedelta(30, "s")


def test_lost_events_were_made_but_never_arrive(tmp_path):
    with Service() as service:
        summary = run_experiment(World(), service.url, tmp_path, DriverConfig(workers=2, faults=FaultConfig(loss=0.3)), progress=False)
    assert _sums(summary) == (60, 30, 0)
    assert 0 < summary.lost < 60
    assert len(service.events) == 90 - summary.lost


def test_faults_are_the_same_on_every_run_whatever_the_workers(tmp_path):
    lost = []
    for workers in (1, 3):
        with Service() as service:
            run_experiment(World(), service.url, tmp_path, DriverConfig(workers=workers, faults=FaultConfig(loss=0.3)), progress=False)
        lost.append(set(service.events))
    assert lost[0] == lost[1]


def test_curiosity_adds_clicks_to_the_treatment_only_and_a_bad_day_takes_some_away(tmp_path):
    with Service() as service:
        run_experiment(World(), service.url, tmp_path, DriverConfig(workers=2, habits=HabitConfig(novelty=10.0)), progress=False, treatments=["ega"])
        extra = [key for key in service.events if key[0] == "click" and key[2] != 1]
        assert extra and all((key[1] - 1) % 9 % 2 for key in extra)  # odd users are in arm ega
    with Service() as service:
        summary = run_experiment(World(), service.url, tmp_path, DriverConfig(workers=2, habits=HabitConfig(day_drift=0.9)), progress=False)
    assert 0 < summary.clicks < 60
    assert summary.purchases <= summary.clicks


def test_arms_with_services_of_their_own_get_their_users_and_events(tmp_path):
    with Service() as even, Service() as odd:
        summary = run_experiment(World(), even.url, tmp_path, DriverConfig(workers=2), progress=False, address=lambda user: odd.url if user % 2 else even.url)
    assert {user % 2 for user in even.asked} == {0} and {user % 2 for user in odd.asked} == {1}
    assert len(even.events) + len(odd.events) == summary.clicks + summary.purchases
    assert not set(even.events) & set(odd.events)


def test_a_shadow_is_asked_everything_and_told_nothing(tmp_path):
    with Service() as shown, Service() as shadow:
        summary = run_experiment(World(), shown.url, tmp_path, DriverConfig(workers=2), progress=False, shadow_url=shadow.url)
    assert (summary.answered, summary.clicks) == (60, 60)
    assert sum(len(times) for times in shadow.asked.values()) == 60
    assert shadow.events == {}
    compared = pd.read_parquet(tmp_path / "shadow.parquet")
    assert len(compared) == 60
    assert (compared["common"] == 3).all()
    np.testing.assert_allclose(compared["revenue_shadow"], 3 * 0.1 * 0.5)
