"""The synthetic world: logs that keep every rule, truth that is the same everywhere, users that answer alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from marketplace_tiny import tiny_config
from pydantic import ValidationError

from marketplace.click_model import page_click_probability
from marketplace.logs import days_of, read_table, verify_manifest
from marketplace.schema import BEHAVIOURS, IMPRESSIONS, REQUESTS, TABLES
from marketplace.synthetic import SyntheticConfig
from marketplace.truth import paired_lift, score_pages, summarise
from marketplace.worlds import World, WorldConfig, build_world


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(tiny_config(), seed=5)


@pytest.fixture(scope="module")
def logs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    world.write_logs(folder / "a")
    return folder / "a"


def test_manifest_verifies_and_describes_the_run(logs: Path) -> None:
    manifest = verify_manifest(logs)
    assert manifest["extra"]["policy"] == "bootstrap-1"
    assert 0.03 < manifest["extra"]["ctr"] < 0.1
    assert {name.split("/")[0] for name in manifest["files"]} == set(TABLES)


def test_click_and_behaviour_times_are_in_order_and_end_with_the_last_log_day(world: World, logs: Path) -> None:
    impressions, requests, behaviours = (read_table(logs, name) for name in ("impressions", "requests", "behaviours"))
    end = pd.Timestamp(world.state.log_days[-1], tz="UTC") + pd.Timedelta(days=1)
    for frame in (impressions, requests, behaviours):
        assert frame["event_timestamp"].max() < end
    clicked = impressions[impressions["click"] == 1]
    assert (clicked["click_timestamp"] > clicked["event_timestamp"]).all()
    assert clicked["click_timestamp"].max() < end
    assert impressions.loc[impressions["click"] == 0, "click_timestamp"].isna().all()
    assert not impressions.loc[impressions["purchase"] == 1, "click"].eq(0).any()
    assert (impressions["order_value"].gt(0) == impressions["purchase"].eq(1)).all()
    joined = behaviours.merge(requests[["session_id", "user_id", "event_timestamp"]], on="session_id", suffixes=("", "_request"))
    assert len(joined) > 100
    assert (joined["event_timestamp"] > joined["event_timestamp_request"]).all()
    assert (joined["user_id"] == joined["user_id_request"]).all()
    assert behaviours["event_timestamp"].min() < pd.Timestamp(world.state.log_days[0], tz="UTC")


def test_clicks_and_orders_on_ads_are_behaviours_of_the_same_session(logs: Path) -> None:
    impressions, requests, behaviours, ads = (read_table(logs, name) for name in ("impressions", "requests", "behaviours", "ads"))
    shown = impressions.merge(requests[["request_id", "session_id"]], on="request_id").merge(ads[["ad_id", "poi_id"]].drop_duplicates(), on="ad_id")
    for action, flag in ((2, "click"), (3, "purchase")):
        expected = shown[shown[flag] == 1][["user_id", "session_id", "poi_id"]].sort_values(["session_id", "poi_id"], ignore_index=True)
        found = behaviours[behaviours["action"] == action][["user_id", "session_id", "poi_id"]].sort_values(["session_id", "poi_id"], ignore_index=True)
        pd.testing.assert_frame_equal(found, expected)
    clicked = impressions[impressions["click"] == 1]["click_timestamp"].sort_values().to_numpy()
    assert (behaviours[behaviours["action"] == 2]["event_timestamp"].sort_values().to_numpy() == clicked).all()


def test_people_repeat_places_by_the_hour(logs: Path) -> None:
    visits = read_table(logs, "behaviours").query("action == 1")
    assert visits.duplicated(["user_id", "poi_id"]).mean() > 0.3
    seconds = visits["event_timestamp"].astype("int64") / 1e6 % 86400
    place = visits.assign(angle=np.exp(2j * np.pi * seconds / 86400)).groupby(["user_id", "poi_id"])["angle"].agg(["mean", "size"]).query("size >= 4")
    user = visits.assign(angle=np.exp(2j * np.pi * seconds / 86400)).groupby("user_id")["angle"].mean()
    assert place["mean"].abs().mean() > user.abs().mean() + 0.1


def test_saved_world_is_the_same_world(world: World, tmp_path: Path) -> None:
    world.save(tmp_path / "world")
    assert {file.suffix for file in (tmp_path / "world").iterdir()} <= {".json", ".npy", ".parquet"}
    loaded = World.load(tmp_path / "world")
    live = world.live_requests()
    pd.testing.assert_frame_equal(loaded.live_requests(), live)
    ads = world.ad_table()["ad_id"].to_numpy()
    for mine, theirs in zip(world.truth(live.head(20), ads), loaded.truth(live.head(20), ads), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(FileNotFoundError, match="world.json"):
        World.load(tmp_path)


def test_live_traffic_follows_the_logs_and_has_the_tables_columns(world: World, logs: Path) -> None:
    live, behaviours = world.live_requests(), world.live_behaviours()
    assert list(live.columns) == REQUESTS.names
    assert list(behaviours.columns) == BEHAVIOURS.names
    end = pd.Timestamp(world.state.log_days[-1], tz="UTC") + pd.Timedelta(days=1)
    assert live["event_timestamp"].min() >= end
    assert behaviours["event_timestamp"].min() >= end
    assert not set(live["request_id"]) & set(read_table(logs, "requests")["request_id"])
    last = read_table(logs, "ads", days=days_of(logs, "ads")[-1:])
    today = world.ad_table()
    assert today["ad_id"].tolist() == last["ad_id"].tolist()
    np.testing.assert_array_equal(today["bid"], last["bid"])


def test_truth_of_all_ads_equals_truth_of_pages(world: World) -> None:
    live = world.live_requests().query("city_id == 2").head(30)
    ads = world.ad_table().query("city_id == 2")["ad_id"].to_numpy()
    truth = world.truth(live, ads)
    assert truth.click_probability.shape == truth.continuation.shape == (30, len(ads))
    columns = np.random.default_rng(0).permuted(np.tile(np.arange(len(ads)), (30, 1)), axis=1)[:, :5]
    p, c = world.page_truth(live["request_id"], ads[columns])
    each = np.arange(30)[:, None]
    np.testing.assert_allclose(truth.click_probability[each, columns], p, rtol=1e-9)
    np.testing.assert_allclose(truth.continuation[each, columns], c, rtol=1e-12)
    assert c.min() >= 0.5
    assert c.max() <= 0.97
    other = world.ad_table().query("city_id == 1")["ad_id"].to_numpy()[:3]
    assert (world.truth(live, other).click_probability == 0).all()


def test_truth_does_not_depend_on_what_else_is_asked(world: World) -> None:
    live, ads = world.live_requests().query("city_id == 1").head(8), world.ad_table().query("city_id == 1")["ad_id"].to_numpy()
    whole, one = world.truth(live, ads), world.truth(live.tail(1), ads[::-1][:4])
    np.testing.assert_allclose(whole.click_probability[-1, ::-1][:4], one.click_probability[0], rtol=1e-12)
    np.testing.assert_array_equal(whole.value[::-1][:4], one.value)


def test_users_answer_by_the_truth_and_with_the_same_luck_under_every_policy(world: World) -> None:
    live = world.live_requests().query("city_id == 1")
    ads = world.ad_table().query("city_id == 1")["ad_id"].to_numpy()
    rng = np.random.default_rng(1)
    pages = np.array([rng.choice(ads, 5, replace=False) for _ in range(len(live))])
    q = page_click_probability(*world.page_truth(live["request_id"], pages))
    many = world.respond_pages(live["request_id"], pages)
    error = np.sqrt((q * (1 - q)).sum())
    assert abs(many.click.sum() - q.sum()) < 4 * error
    row = live.iloc[3]
    single = world.respond(row, pages[3])
    assert single.click.tolist() == many.click[3].tolist()
    np.testing.assert_array_equal(single.click_delay_seconds, many.click_delay_seconds[3])
    swapped = world.respond_pages(live["request_id"], np.concatenate([pages[:, :1], pages[:, :0:-1]], axis=1))
    assert (swapped.click[:, 0] == many.click[:, 0]).all()  # same top ad, same luck
    assert not (many.purchase & ~many.click).any()
    with pytest.raises(ValueError, match="twice"):
        world.respond(row, [ads[0], ads[0]])
    with pytest.raises(ValueError, match="not of this world"):
        world.respond({"request_id": 17}, pages[3])
    with pytest.raises(ValueError, match="ad 17 is not of this world"):
        world.respond(row, [17])


def test_short_pages_and_tuples_are_answered(world: World) -> None:
    row = next(world.live_requests().itertuples())
    assert world.respond(row, []).click.shape == (0,)
    assert world.respond(row, world.ad_table().query("city_id == @row.city_id")["ad_id"].tolist()[:2]).click.shape == (2,)


def test_externality_lowers_p_where_substitutes_are_near() -> None:
    with_, without = (build_world(tiny_config(externality=value), seed=2) for value in (0.5, 0.0))
    live, ads = with_.live_requests().head(40), with_.ad_table()["ad_id"].to_numpy()
    p, free = (np.where(world.truth(live, ads).click_probability > 0, world.truth(live, ads).click_probability, np.nan) for world in (with_, without))
    density = with_._weight_AS[with_.ad_rows(ads)].sum(axis=1)
    loss = np.nanmean(np.log(p / free), axis=0)
    assert np.corrcoef(density, loss)[0, 1] < -0.3


def test_scoring_pages_adds_up(world: World, logs: Path) -> None:
    pages = read_table(logs, "impressions").assign(policy="logged")
    best_first = pages.assign(policy="half", payment=pages["payment"] / 2)
    scored = score_pages(world, pd.concat([pages, best_first]).sample(frac=1.0, random_state=0))
    assert len(scored) == 2 * pages["request_id"].nunique()
    logged = scored[scored["policy"] == "logged"]
    assert (logged["revenue"] <= logged["bid_welfare"] + 1e-12).all()
    assert logged["clicks"].sum() == pytest.approx(pages["click"].sum(), abs=4 * np.sqrt(pages["click"].sum()))
    summary = summarise(scored)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["logged"]["ectr_per_impression"] == pytest.approx(0.06, abs=0.02)
    low, mean, high = (summary["logged"]["erpm_per_1000_requests"][name] for name in ("low", "mean", "high"))
    assert low < mean < high
    assert mean == pytest.approx(2 * summary["half"]["erpm_per_1000_requests"]["mean"])
    lift = paired_lift(scored, "logged", "half")
    assert lift["lift"] == pytest.approx(-0.5)
    assert lift["high"] - lift["low"] < 1e-9  # the same users, the same pages: no luck is left
    same = paired_lift(scored, "logged", "half", "clicks")
    assert same["lift"] == 0.0


def test_scoring_refuses_gaps_repeats_and_missing_columns(world: World, logs: Path) -> None:
    pages = read_table(logs, "impressions").assign(policy="p").head(5)
    with pytest.raises(ValueError, match="without gaps"):
        score_pages(world, pages[pages["slot"] != 2])
    with pytest.raises(ValueError, match="lack column 'bid'"):
        score_pages(world, pages.drop(columns="bid"))
    with pytest.raises(ValueError, match="twice"):
        score_pages(world, pages.assign(ad_id=pages["ad_id"].iloc[0]))
    assert len(score_pages(world, pages.head(0))) == 0


def test_stress_model_and_drift_are_reachable() -> None:
    plain, stressed = build_world(tiny_config(), seed=3), build_world(tiny_config(substitution_below=0.5, day_drift=0.3), seed=3)
    assert np.ptp(stressed.state.drift_DA) > 0
    assert not plain.state.drift_DA.any()
    assert stressed.live_requests().equals(plain.live_requests())


def test_unlogged_days_happen_but_are_not_written(world: World, logs: Path, tmp_path: Path) -> None:
    """The later days are those of the same world without unlogged days, and histories hold the clicks of all."""
    late = World(replace(world.config, unlogged_days=2), world.seed, world.state, world.base)
    late.write_logs(tmp_path / "late")
    for table in ("requests", "impressions", "ads"):
        whole = read_table(logs, table)
        kept = whole["event_timestamp"] >= pd.Timestamp(world.state.log_days[2], tz="UTC")
        assert 0 < kept.sum() < len(whole)
        pd.testing.assert_frame_equal(read_table(tmp_path / "late", table), whole[kept].reset_index(drop=True))
    pd.testing.assert_frame_equal(read_table(tmp_path / "late", "behaviours"), read_table(logs, "behaviours"))
    extra = verify_manifest(tmp_path / "late")["extra"]
    assert extra["days"] == 3 and extra["requests"] == len(read_table(tmp_path / "late", "requests"))
    with pytest.raises(ValueError, match="unlogged_days 5 leaves nothing of 5 log days"):
        World(replace(world.config, unlogged_days=5), world.seed, world.state, world.base).write_logs(tmp_path / "none")


def test_logs_are_never_overwritten(world: World, logs: Path) -> None:
    with pytest.raises(FileExistsError, match="is not empty"):
        world.write_logs(logs)


def test_an_interrupted_simulation_leaves_no_half_folder(world: World, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("marketplace.worlds.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.write_logs(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").mkdir()
    world.write_logs(tmp_path / "logs")
    assert verify_manifest(tmp_path / "logs") == verify_manifest(logs)


def test_wrong_configs_are_refused_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no data folder"):
        build_world(tiny_config(), 1, tmp_path)
    with pytest.raises(ValueError, match="needs a data folder"):
        build_world(WorldConfig(kind="checkins"), 1)
    with pytest.raises(ValidationError, match="places_per_city"):
        SyntheticConfig(ads_per_city=10, places_per_city=5)
    with pytest.raises(ValidationError):
        WorldConfig(slots=0)


def test_pages_shorter_than_the_slots_have_no_gaps(tmp_path: Path) -> None:
    size = SyntheticConfig(users=20, ads_per_city=8, places_per_city=10, categories=3, history_days=2, log_days=2, live_days=1, part_time_ads=0.0)
    config = WorldConfig(synthetic=size, slots=6)
    build_world(config, 1).write_logs(tmp_path / "logs")
    impressions = read_table(tmp_path / "logs", "impressions")
    assert (impressions.groupby("request_id")["slot"].agg(lambda slots: sorted(slots) == list(range(1, len(slots) + 1)))).all()
    assert list(impressions.columns) == IMPRESSIONS.names
    with pytest.raises(ValueError, match="no request finds 6 active ads"):
        build_world(WorldConfig(synthetic=SyntheticConfig(users=20, ads_per_city=4, places_per_city=10, categories=3, history_days=2, log_days=2), slots=6), 1)
