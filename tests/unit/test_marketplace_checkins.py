"""The check-ins world, the converter and the counting baselines, on tiny folders of the published schemas."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from marketplace_tiny import checkins_config, write_checkins_folder

from marketplace.checkins import CheckinsConfig, is_private, read_checkins
from marketplace.counting import SCORERS, hour_weighted, most_visited, popularity
from marketplace.logs import data_hash, read_table, verify_manifest
from marketplace.tsmc import convert_checkins
from marketplace.worlds import World, WorldConfig, build_world


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkins_folder(tmp_path_factory.mktemp("city"), seed=1)


@pytest.fixture(scope="module")
def world(data: Path) -> World:
    return build_world(checkins_config(), 3, data)


@pytest.fixture(scope="module")
def logs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    world.write_logs(folder)
    return folder


def test_homes_are_visited_but_never_advertised(data: Path, logs: Path) -> None:
    _, pois = read_checkins(data)
    private = set(pois["poi_id"][is_private(pois)])
    assert private
    assert not private & set(read_table(logs, "ads")["poi_id"])
    assert private & set(read_table(logs, "behaviours")["poi_id"])


def test_requests_precede_the_check_in_of_their_session_and_do_not_know_its_place(data: Path, logs: Path) -> None:
    requests, visits = read_table(logs, "requests"), read_table(logs, "behaviours").query("action == 1")
    assert len(requests) >= 500
    following = requests.merge(visits, on="session_id", suffixes=("", "_visit"))
    assert following["request_id"].nunique() == len(requests)
    lead = (following["event_timestamp_visit"] - following["event_timestamp"]).dt.total_seconds()
    assert lead.min() >= 0.5
    assert lead.max() <= 20 * 60 + 2
    before = pd.merge_asof(
        requests, visits.sort_values("event_timestamp"), on="event_timestamp", by="user_id", allow_exact_matches=False, suffixes=("", "_last")
    )
    known = before["latitude_last"].notna()
    assert known.mean() > 0.9
    np.testing.assert_allclose(before.loc[known, "latitude"], before.loc[known, "latitude_last"])
    np.testing.assert_allclose(before.loc[known, "longitude"], before.loc[known, "longitude_last"])


def test_history_reaches_back_and_ids_survive(data: Path, logs: Path) -> None:
    checkins, _ = read_checkins(data)
    visits, requests = read_table(logs, "behaviours").query("action == 1"), read_table(logs, "requests")
    assert visits["event_timestamp"].min() == checkins["event_timestamp"].min()
    assert set(visits["poi_id"]) <= set(checkins["poi_id"])
    assert set(requests["user_id"]) <= set(checkins["user_id"])
    assert verify_manifest(logs)["extra"]["world"] == "checkins"
    assert 0.03 < verify_manifest(logs)["extra"]["ctr"] < 0.12


def test_live_share_and_window(world: World) -> None:
    total = len(world.state.requests)
    assert total >= 600
    assert 0.05 * total < len(world.live_requests()) < 0.25 * total
    assert max(world.state.log_days) < min(world.state.live_days)


def test_the_place_visited_next_attracts_most(world: World) -> None:
    ads = world.ad_table()
    state = world.state.requests
    live = world.live_requests()
    intent = world.state.pois["poi_id"].to_numpy()[state["intent_poi_row"].to_numpy()[world.request_rows(live["request_id"])]]
    column = ads.reset_index().set_index("poi_id")["index"].reindex(intent)
    known = column.notna().to_numpy()
    p = world.truth(live[known], ads["ad_id"].to_numpy()).click_probability
    wanted = p[np.arange(known.sum()), column[known].astype(int)]
    assert wanted.mean() > 2.5 * p.mean()


def test_same_bytes_for_the_same_seed_and_for_wider_ids(data: Path, logs: Path, tmp_path: Path) -> None:
    wide = write_checkins_folder(tmp_path / "wide", seed=1, id_type="int64")
    build_world(checkins_config(), 3, wide).write_logs(tmp_path / "logs")
    assert data_hash(tmp_path / "logs") == data_hash(logs)


@pytest.mark.parametrize(("users", "places", "checkins"), [(3, 12, 60), (200, 30, 900), (10, 400, 3000)])
def test_cities_of_other_sizes_work(tmp_path: Path, users: int, places: int, checkins: int) -> None:
    folder = write_checkins_folder(tmp_path / "city", seed=users, users=users, places=places, checkins=checkins)
    build_world(checkins_config(timezone="Asia/Tokyo"), 1, folder).write_logs(tmp_path / "logs")
    requests = read_table(tmp_path / "logs", "requests")
    assert (requests["utc_offset_minutes"] == 540).all()


def test_folders_that_are_no_check_ins_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkins\.parquet is missing"):
        read_checkins(tmp_path)
    folder = write_checkins_folder(tmp_path / "city", seed=0)
    pois = pd.read_parquet(folder / "pois.parquet")
    pois.drop(columns="lat").to_parquet(folder / "pois.parquet")
    with pytest.raises(ValueError, match="'lat' is missing"):
        read_checkins(folder)
    pois.assign(lat=123.0).to_parquet(folder / "pois.parquet")
    with pytest.raises(ValueError, match="lat must lie"):
        read_checkins(folder)
    pois.assign(poi_id=pois["poi_id"].astype(str)).to_parquet(folder / "pois.parquet")
    with pytest.raises(ValueError, match="whole number"):
        read_checkins(folder)
    pois.assign(category="Home (private)").to_parquet(folder / "pois.parquet")
    with pytest.raises(ValueError, match="nothing to advertise"):
        build_world(checkins_config(), 1, folder)
    with pytest.raises(ValueError, match="timezone"):
        CheckinsConfig(timezone="Mars/Olympus")


LINES = """470\t49bbd6c0f964a520f4531fe3\t4bf58dd8d48988d127951735\tArts & Crafts Store\t40.719810\t-74.002581\t-240\tTue Apr 03 18:00:09 +0000 2012
979\t4a43c0aef964a520c6a61fe3\t4bf58dd8d48988d1df941735\tBridge\t40.606800\t-74.044170\t-240\tTue Apr 03 18:00:25 +0000 2012
69\t4c5cc7b485a1e21e00d35711\t4bf58dd8d48988d103941735\tHome (private)\t40.716162\t-73.883070\t-240\tTue Apr 03 18:02:24 +0000 2012
470\t4c5cc7b485a1e21e00d35711\t4bf58dd8d48988d103941735\tHome (private)\t40.716162\t-73.883070\t-240\tWed Apr 04 18:02:24 +0000 2012
"""


def test_converter_reads_the_published_format(tmp_path: Path) -> None:
    (tmp_path / "tsmc.txt").write_bytes(LINES.replace("Bridge", "Caf\xe9").encode("latin-1"))
    assert convert_checkins(tmp_path / "tsmc.txt", tmp_path / "out") == {"users": 3, "pois": 3, "checkins": 4}
    checkins, pois = read_checkins(tmp_path / "out")
    assert checkins["user_id"].tolist() == [1, 2, 2, 3]  # 69, 470, 470, 979
    assert checkins["event_timestamp"].iloc[1] == pd.Timestamp("2012-04-03 18:00:09", tz="UTC")
    assert sorted(pois["category"]) == ["Arts & Crafts Store", "Café", "Home (private)"]
    assert convert_checkins(tmp_path / "tsmc.txt", tmp_path / "out", min_poi_checkins=2) == {"users": 2, "pois": 1, "checkins": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no check-ins"),
        ("1\t2\n", "line 1: 2 fields"),
        (LINES.replace("40.606800", "north"), "line 2: lat"),
        (LINES.replace("-73.883070", "-273.8"), "line 3: lon"),
        (LINES.replace("Wed Apr 04", "soon"), "line 4: time"),
    ],
)
def test_converter_names_the_line_that_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tsmc.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        convert_checkins(tmp_path / "tsmc.txt", tmp_path / "out")


def reference_hour_weighted(visits: pd.DataFrame, request: pd.Series, pois: list[int]) -> list[float]:
    """EVALUATION.md's formula in plain loops."""
    offset = pd.Timedelta(minutes=int(request["utc_offset_minutes"]))
    past = visits[(visits["user_id"] == request["user_id"]) & (visits["event_timestamp"] < request["event_timestamp"])].sort_values("event_timestamp")
    score, now = dict.fromkeys(pois, 0.0), request["event_timestamp"] + offset
    for visit in past.itertuples():
        then = visit.event_timestamp + offset
        apart = abs((then - then.normalize()).total_seconds() - (now - now.normalize()).total_seconds()) / 3600
        weight = np.exp(-min(apart, 24 - apart) / 2) * (1.0 if (then.weekday() >= 5) == (now.weekday() >= 5) else 0.5)
        if visit.poi_id in score:
            score[visit.poi_id] += weight * np.exp(-(now - then).total_seconds() / 86400 / 60)
    places = past["poi_id"].tolist()
    moves = [after for here, after in zip(places[:-1], places[1:], strict=True) if places and here == places[-1]]
    for after in moves:
        if after in score:
            score[after] += 0.5 / len(moves)
    return [score[poi] for poi in pois]


def test_hour_weighted_equals_its_formula(logs: Path) -> None:
    behaviours, requests = read_table(logs, "behaviours"), read_table(logs, "requests").tail(25)
    pois = sorted(set(behaviours["poi_id"]))[::-1][:40]
    found = hour_weighted(behaviours, requests, np.array(pois))
    visits = behaviours[behaviours["action"] == 1].sort_values(["user_id", "event_timestamp", "behaviour_id"])
    expected = [reference_hour_weighted(visits, request, pois) for _, request in requests.iterrows()]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_counting_sees_only_the_past_and_stays_calm_about_strangers(logs: Path) -> None:
    behaviours, requests = read_table(logs, "behaviours"), read_table(logs, "requests").head(30)
    pois = np.unique(behaviours["poi_id"])
    future = behaviours[behaviours["event_timestamp"] < requests["event_timestamp"].max()]
    for scorer in (most_visited, hour_weighted):
        np.testing.assert_array_equal(scorer(behaviours, requests, pois), scorer(future, requests, pois))
        assert not scorer(behaviours, requests.assign(user_id=10**12), pois).any()
    assert popularity(behaviours, requests, pois).shape == (30, len(pois))
    counted = most_visited(behaviours, requests.tail(1), pois).sum()
    past = behaviours.query("action == 1 and user_id == @requests.user_id.iloc[-1]")
    assert counted == (past["event_timestamp"] < requests["event_timestamp"].iloc[-1]).sum()


def test_counting_baselines_reach_their_published_accuracy() -> None:
    """EVALUATION.md, next-poi: Acc@1/5/10 on the last check-in per user, .239/.522/.625 and .313/.561/.645 (ties fall either way)."""
    folder = Path(os.environ.get("EGA_DATA", "")) / "nyc"
    if not os.environ.get("EGA_DATA") or not folder.exists():
        pytest.skip("EGA_DATA is not set to a folder that holds nyc/ (real check-ins)")
    checkins, pois = read_checkins(folder)
    visits = checkins.assign(action=1, behaviour_id=np.arange(len(checkins)))
    last = visits.groupby("user_id").tail(1)
    asked = last.assign(utc_offset_minutes=-300)
    column = np.searchsorted(pois["poi_id"], last["poi_id"])
    for name, expected in (("most_visited", (0.239, 0.522, 0.625)), ("hour_weighted", (0.313, 0.561, 0.645))):
        score = SCORERS[name](visits.drop(last.index), asked, pois["poi_id"].to_numpy())
        own = score[np.arange(len(score)), column]
        hit = (np.argsort(-score, axis=1, kind="stable")[:, :10] == column[:, None]) & (own > 0)[:, None]
        assert [hit[:, :k].any(axis=1).mean() for k in (1, 5, 10)] == pytest.approx(expected, abs=0.008)


def test_value_spread_lies_among_real_winning_prices() -> None:
    """Standard deviation of log winning price per campaign (iPinYou): the worlds' lognormal values are as spread out as real prices."""
    file = Path(os.environ.get("EGA_DATA", "")) / "bids" / "winning_price_histogram.csv"
    if not os.environ.get("EGA_DATA") or not file.exists():
        pytest.skip("EGA_DATA is not set to a folder that holds bids/ (real winning prices)")
    prices = pd.read_csv(file).query("market_price > 0")
    spread = []
    for _, campaign in prices.groupby("campaign"):
        log, weight = np.log(campaign["market_price"]), campaign["train_impressions"]
        spread.append(np.sqrt(np.average((log - np.average(log, weights=weight)) ** 2, weights=weight)))
    assert min(spread) - 0.05 <= CheckinsConfig().value_spread <= max(spread)
    world = build_world(WorldConfig(), 1)
    assert min(spread) - 0.05 <= np.log(world.state.ads["value"]).std() <= max(spread)


def test_real_check_ins_make_a_world(tmp_path: Path) -> None:
    folder = Path(os.environ.get("EGA_DATA", "")) / "nyc"
    if not os.environ.get("EGA_DATA") or not folder.exists():
        pytest.skip("EGA_DATA is not set to a folder that holds nyc/ (real check-ins)")
    world = build_world(WorldConfig(kind="checkins", checkins=CheckinsConfig(requests=3000, timezone="America/New_York")), 1, folder)
    assert world.write_logs(tmp_path / "logs")["ctr"] == pytest.approx(0.06, abs=0.015)
    assert set(world.live_requests()["utc_offset_minutes"]) <= {-300, -240}
