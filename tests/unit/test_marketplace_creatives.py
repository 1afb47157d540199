"""Creatives and organic results in the market: the truth is what users do, the order is kept, and without them nothing changes."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace import organic
from marketplace.creatives import CreativeConfig, best_creatives
from marketplace.logs import has_table, read_table, write_table
from marketplace.organic import OrganicConfig
from marketplace.synthetic import SyntheticConfig
from marketplace.validation import validate_logs
from marketplace.worlds import World, WorldConfig, build_world

PLAIN = WorldConfig(slots=3, synthetic=SyntheticConfig(users=300, places_per_city=300, ads_per_city=60, log_days=5, live_days=1))
RICH = dataclasses.replace(PLAIN, creatives=CreativeConfig(per_ad=3), organic=OrganicConfig(items=4))


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> tuple[World, Path]:
    world, logs = build_world(RICH, 3), tmp_path_factory.mktemp("rich") / "logs"
    world.write_logs(logs)
    return world, logs


def pages_of(logs: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Request ids, and [R, K] ads, creatives and organic items above, as logged."""
    shown, results = read_table(logs, "impressions"), read_table(logs, "organic")
    requests = np.unique(shown["request_id"])
    ads, creatives, above = (np.full((len(requests), 3), fill) for fill in (-1, -1, 0))
    row, slot = np.searchsorted(requests, shown["request_id"]), shown["slot"].to_numpy() - 1
    ads[row, slot], creatives[row, slot] = shown["ad_id"], shown["creative_id"]
    taken = np.zeros((len(requests), 8), bool)
    taken[np.searchsorted(requests, results["request_id"]), results["position"]] = True
    for row, free in enumerate(~taken[:, 1:]):
        place = np.flatnonzero(free)[:3]
        above[row] = place - np.arange(3)
    return requests, ads, creatives, above


def test_expected_clicks_are_what_users_do(rich) -> None:
    world, logs = rich
    requests, ads, creatives, above = pages_of(logs)
    p, c = world.page_truth(requests, ads, creatives, above)
    chance = p * np.cumprod(np.concatenate([np.ones((len(c), 1)), c[:, :-1]], axis=1), axis=1)
    for expected, table in ((chance, "impressions"), (world.organic_clicks(requests, ads, above), "organic")):
        clicks = read_table(logs, table)["click"].sum()
        assert abs(clicks - expected.sum()) < 4 * np.sqrt((expected * (1 - expected)).sum())
    assert world.respond_pages(requests, ads, creatives, above).click.sum() == read_table(logs, "impressions")["click"].sum()


def test_the_logs_pass_and_say_what_was_shown(rich, tmp_path) -> None:
    world, logs = rich
    assert validate_logs(logs, tmp_path).passed
    creatives, shown = read_table(logs, "creatives"), read_table(logs, "impressions")
    assert len(creatives) == 3 * 60 and creatives["embedding"].map(len).eq(16).all()
    owner = creatives.set_index("creative_id")["ad_id"]
    assert (owner[shown["creative_id"]].to_numpy() == shown["ad_id"].to_numpy()).all()
    assert (shown["creative_id"] % 3).value_counts(normalize=True).min() > 0.1
    clicked = read_table(logs, "behaviours").query("action == 2")
    assert set(clicked["creative_id"]) <= set(creatives["creative_id"]) | {0} and (clicked["creative_id"] > 0).any()
    items = world.organic_items(np.unique(shown["request_id"])).set_index(["request_id", "rank"])
    logged = read_table(logs, "organic").set_index(["request_id", "rank"])
    pd.testing.assert_series_equal(logged["poi_id"].sort_index(), items["poi_id"].sort_index())


def test_creatives_move_clicks_as_tastes_say(rich) -> None:
    world, logs = rich
    requests, ads, _, above = pages_of(logs)
    first = world._ad["creative_id"][world.ad_rows(ads)]
    p = np.stack([world.page_truth(requests, ads, first + which, above)[0] for which in range(3)])
    assert (p.std(0) > 0.001).mean() > 0.5
    assert not np.array_equal(p[0].argsort(1), p[1].argsort(1))
    with pytest.raises(ValueError, match="is not one of ad"):
        world.page_truth(requests[:1], ads[:1], first[:1] + 3)


@pytest.mark.parametrize(
    ("column", "poison", "rule"),
    [
        ("position", lambda values: values[::-1], "organic-order-kept"),
        ("request_id", lambda values: values + 10**12, "organic-of-known-requests"),
    ],
)
def test_bad_organic_rows_are_named(rich, tmp_path, column, poison, rule) -> None:
    import shutil

    logs = tmp_path / "logs"
    shutil.copytree(rich[1], logs)
    (logs / "manifest.json").unlink()
    frame = read_table(logs, "organic")
    frame[column] = poison(frame[column].to_numpy())
    write_table(logs, "organic", frame)
    assert rule in {failure.rule for failure in validate_logs(logs, tmp_path / "out").failures}


def test_bad_embeddings_and_foreign_creatives_are_named(rich, tmp_path) -> None:
    import shutil

    logs = tmp_path / "logs"
    shutil.copytree(rich[1], logs)
    (logs / "manifest.json").unlink()
    frame = read_table(logs, "creatives")
    frame["embedding"] = [np.full(16, np.nan, np.float32), *frame["embedding"].iloc[1:]]
    frame["ad_id"] = frame["ad_id"].to_numpy()[::-1]
    write_table(logs, "creatives", frame)
    assert {"embeddings-usable", "creative-of-the-ad"} <= {failure.rule for failure in validate_logs(logs, tmp_path / "out").failures}


def test_an_ad_without_creatives_is_named(rich, tmp_path) -> None:
    import shutil

    logs = tmp_path / "logs"
    shutil.copytree(rich[1], logs)
    (logs / "manifest.json").unlink()
    shown = set(read_table(logs, "impressions")["ad_id"])
    frame = read_table(logs, "creatives")
    lost = next((ad for ad in frame["ad_id"] if ad not in shown), frame["ad_id"].iloc[-1])
    write_table(logs, "creatives", frame[frame["ad_id"] != lost])
    named = [failure for failure in validate_logs(logs, tmp_path / "out").failures if failure.rule == "ad-has-a-creative"]
    assert len(named) == 1 and str(lost) in named[0].message


def test_without_them_a_world_is_what_it_was(tmp_path) -> None:
    plain = build_world(PLAIN, 3)
    plain.write_logs(tmp_path / "logs")
    assert not has_table(tmp_path / "logs", "creatives") and not has_table(tmp_path / "logs", "organic")
    requests = plain.live_requests()["request_id"].to_numpy()[:20]
    ads = np.tile(plain.ad_table()["ad_id"].to_numpy()[:3], (20, 1))
    assert plain.organic_clicks(requests, ads).shape == (20, 0)
    assert not plain.respond_pages(requests, ads).creative_click.any()
    with pytest.raises(ValueError, match="at most 0"):
        plain.page_truth(requests, ads, above=np.ones((20, 3), int))


def test_a_saved_world_answers_the_same(rich, tmp_path) -> None:
    world, logs = rich
    requests, ads, creatives, above = (values[:50] for values in pages_of(logs))
    world.save(tmp_path / "world")
    again = World.load(tmp_path / "world")
    for one, two in zip(world.page_truth(requests, ads, creatives, above), again.page_truth(requests, ads, creatives, above), strict=True):
        np.testing.assert_array_equal(one, two)


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_positions_and_reach_agree_with_walking_down_the_page(ads, items, seed) -> None:
    rng = np.random.default_rng(seed)
    above = organic.drawn(rng.random((6, ads + items)), ads)
    assert (organic.checked(above, items) == above).all()
    c, o = rng.random((6, ads)), rng.random((6, items))
    ad_place, item_place = organic.positions(above, items)
    past_organic, past_ads = organic.reach(c, o, above)
    for row in range(6):
        page = sorted([*((place, "ad", k) for k, place in enumerate(ad_place[row])), *((place, "item", k) for k, place in enumerate(item_place[row]))])
        assert [place for place, _, _ in page] == list(range(1, ads + items + 1))
        for kind, values, other in (("ad", past_organic[row], o[row]), ("item", past_ads[row], c[row])):
            walked = 1.0
            for _, what, k in page:
                if what == kind:
                    assert values[k] == pytest.approx(walked)
                else:
                    walked *= other[k]


def test_drawn_layouts_are_uniform() -> None:
    uniforms = np.random.default_rng(0).random((60_000, 5))
    _, count = np.unique(organic.drawn(uniforms, 2), axis=0, return_counts=True)
    assert len(count) == len(list(itertools.combinations(range(5), 2)))
    assert abs(count - 6000).max() < 4 * np.sqrt(6000)


def test_the_selector_shrinks_to_the_ads_own_rate() -> None:
    shown, clicks = np.array([[1000, 1000, 2, 0, 0, 0]]), np.array([[50, 80, 2, 0, 0, 0]])
    owner = np.array([0, 0, 0, 1, 1, 1])
    assert best_creatives(shown, clicks, owner, 3, 500.0).tolist() == [[1, 3, -1]]
    assert best_creatives(shown, clicks, owner, 3, 0.01).tolist() == [[2, 3, -1]]
