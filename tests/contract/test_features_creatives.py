"""Creatives and organic results on their way into samples and the feature store: what the logs say, row for row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from features.build import build_features
from features.sampling import SamplingConfig, sample_requests
from features.store import join_as_of, load_catalogue, load_creatives, open_store
from marketplace.creatives import CreativeConfig
from marketplace.logs import read_table
from marketplace.organic import OrganicConfig
from marketplace.schema import PAGE_ARRAYS
from marketplace.synthetic import SyntheticConfig
from marketplace.worlds import WorldConfig, build_world

L = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("creatives")
    config = WorldConfig(
        slots=3, synthetic=SyntheticConfig(users=120, places_per_city=200, ads_per_city=40, log_days=5, live_days=1),
        creatives=CreativeConfig(per_ad=3, width=4), organic=OrganicConfig(items=2),
    )  # fmt: skip
    build_world(config, 5).write_logs(folder / "logs")
    build_features(folder / "logs", folder / "home", behaviours=L)
    sample_requests(folder / "logs", folder / "home", folder / "out", SamplingConfig(unexposed=5), seed=5)
    arrays = {path.stem: np.load(path) for path in (folder / "out").glob("*.npy")}
    return folder / "logs", folder / "home", arrays


def test_every_array_has_its_type(made) -> None:
    for array in PAGE_ARRAYS:
        assert made[2][array.name].dtype == np.dtype(array.dtype) and made[2][array.name].ndim == len(array.shape.split())


def test_exposed_creatives_and_layouts_are_the_logged_ones(made) -> None:
    logs, _, arrays = made
    shown, organic = read_table(logs, "impressions"), read_table(logs, "organic")
    row = np.searchsorted(np.sort(arrays["request_id"]), shown["request_id"])
    row = np.argsort(arrays["request_id"])[row]
    slot = shown["slot"].to_numpy() - 1
    np.testing.assert_array_equal(arrays["creative_id"][arrays["exposed_creative"][row, slot]], shown["creative_id"])
    np.testing.assert_array_equal(arrays["creative_click"][row, slot], shown["creative_click"])
    np.testing.assert_array_equal(arrays["creative_ad"][arrays["exposed_creative"][row, slot]], arrays["candidate"][row, slot])
    vectors = read_table(logs, "creatives").set_index("creative_id")["embedding"]
    np.testing.assert_array_equal(arrays["creative_embedding"], np.stack(vectors.loc[arrays["creative_id"]].to_list()))

    above = shown.merge(organic[["request_id", "position"]], on="request_id")
    at = pd.Series(arrays["above"][row, slot] + shown["slot"].to_numpy(), index=pd.MultiIndex.from_frame(shown[["request_id", "slot"]]))
    before = above[above["position"] < at.loc[pd.MultiIndex.from_frame(above[["request_id", "slot"]])].to_numpy()].groupby(["request_id", "slot"]).size()
    np.testing.assert_array_equal(arrays["above"][row, slot], before.reindex(pd.MultiIndex.from_frame(shown[["request_id", "slot"]])).fillna(0))

    row = np.argsort(arrays["request_id"])[np.searchsorted(np.sort(arrays["request_id"]), organic["request_id"])]
    np.testing.assert_array_equal(arrays["place_id"][arrays["organic_place"][row, organic["rank"] - 1]], organic["poi_id"])
    np.testing.assert_array_equal(arrays["organic_click"][row, organic["rank"] - 1], organic["click"])


def test_histories_name_places_and_creatives(made) -> None:
    logs, _, arrays = made
    done = read_table(logs, "behaviours").sort_values(["event_timestamp", "behaviour_id"])
    times = pd.to_datetime(arrays["time"], unit="s", utc=True)
    creatives = 0
    for row in range(0, len(times), 17):
        exact = read_table(logs, "requests").set_index("request_id").loc[arrays["request_id"][row], "event_timestamp"]
        mine = done[(done["user_id"] == arrays["user_id"][row]) & (done["event_timestamp"] < exact)].iloc[::-1][:L]
        place, creative = arrays["behaviour_place"][row], arrays["behaviour_creative"][row]
        assert (place[len(mine) :] == -1).all()
        assert arrays["place_id"][place[: len(mine)]].tolist() == mine["poi_id"].tolist()
        assert np.where(creative[: len(mine)] >= 0, arrays["creative_id"][creative[: len(mine)]], 0).tolist() == mine["creative_id"].tolist()
        creatives += (creative >= 0).sum()
    assert creatives > 0


def test_next_places_are_the_sessions_later_visits(made) -> None:
    logs, _, arrays = made
    requests, done = read_table(logs, "requests").set_index("request_id"), read_table(logs, "behaviours")
    found = 0
    for row in range(0, len(arrays["request_id"]), 11):
        asked = requests.loc[arrays["request_id"][row]]
        rest = done[(done["session_id"] == asked["session_id"]) & (done["event_timestamp"] >= asked["event_timestamp"]) & (done["action"] == 1)]
        wanted = rest.sort_values(["event_timestamp", "behaviour_id"])["poi_id"].tolist()[: arrays["next_place"].shape[1]]
        places = arrays["next_place"][row]
        assert arrays["place_id"][places[places >= 0]].tolist() == wanted
        found += len(wanted)
    assert found > 10


def test_the_selector_knows_only_the_days_before(made) -> None:
    logs, home, arrays = made
    shown = read_table(logs, "impressions")
    day = shown["event_timestamp"].dt.floor("D")
    days = sorted(day.unique())
    current = load_catalogue(home).set_index("ad_id")["shown_creative_id"]
    for number, before in [(index, day < when) for index, when in enumerate(days)] + [(None, day >= days[0])]:
        known = shown[before]
        of_ad = known.groupby("ad_id")["click"].mean()
        for ad in (arrays["ad_id"] if number is not None else current.index.to_numpy())[::7]:
            own = arrays["creative_id"][arrays["creative_ad"] == np.searchsorted(arrays["ad_id"], ad)]
            mine = known[known["ad_id"] == ad]
            rates = [(mine.loc[mine["creative_id"] == c, "click"].sum() + 50 * of_ad.get(ad, 0.0)) / ((mine["creative_id"] == c).sum() + 50) for c in own]
            chosen = current[ad] if number is None else arrays["creative_id"][arrays["shown_creative"][number, np.searchsorted(arrays["ad_id"], ad)]]
            assert rates[own.tolist().index(chosen)] == pytest.approx(max(rates))


def test_embeddings_come_out_of_the_store_as_they_went_in(made) -> None:
    logs, home, _ = made
    logged = read_table(logs, "creatives").sort_values("creative_id", ignore_index=True)
    found = load_creatives(home)
    np.testing.assert_array_equal(np.stack(found["embedding"].to_list()), np.stack(logged["embedding"].to_list()))
    asked = logged[["creative_id"]].iloc[:3].assign(event_timestamp=logged["event_timestamp"].max() + pd.Timedelta(days=1))
    joined = join_as_of(open_store(home), asked, ["ad_creatives:embedding", "ad_creatives:ad_id"], ["creative_id"])
    np.testing.assert_array_equal(np.stack(joined["embedding"].to_list()), np.stack(logged["embedding"].iloc[:3].to_list()))
