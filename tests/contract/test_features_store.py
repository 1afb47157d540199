"""The feature store: what training reads as of a request equals what serving reads online, bit for bit; nothing from the future."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from logs_fixture import tiny_logs

from features import build as build_module
from features.build import build_features, catalogue_table, microseconds, read_events
from features.encoding import HISTORY_ARRAYS, Vocabulary, encode_requests
from features.store import (
    REPOSITORY,
    SOURCES,
    UserFeatures,
    check_store,
    histories_as_of,
    join_as_of,
    load_ad_embeddings,
    load_catalogue,
    open_store,
    profiles_as_of,
    publish_ad_embeddings,
    push_behaviours,
    read_snapshot,
    read_user,
    read_users,
)
from marketplace.logs import read_table, write_table
from marketplace.schema import BEHAVIOURS, USERS, VOCABULARIES, geo_cell

L = 6
"""Short enough that users have more behaviours than fit."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    return tiny_logs(tmp_path_factory.mktemp("logs"), seed=3)


@pytest.fixture(scope="module")
def built(logs, tmp_path_factory) -> tuple[Path, object]:
    home = tmp_path_factory.mktemp("home")
    build_features(logs, home, behaviours=L)
    return home, open_store(home)


def assert_same(left, right) -> None:
    for name in (*HISTORY_ARRAYS, "count"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), name


def brute_force(events: pd.DataFrame, user: int, time_us: int) -> pd.DataFrame:
    mine = events[(events["user_id"] == user) & (events["time_us"] < time_us)]
    return mine.sort_values(["time_us", "behaviour_id"]).iloc[::-1].head(L)


def users_of(logs: Path) -> np.ndarray:
    return np.unique(np.concatenate([read_table(logs, table)["user_id"].to_numpy() for table in ("users", "requests")]))


def test_training_sees_only_what_came_strictly_before(logs, built):
    requests, events = read_table(logs, "requests"), read_events(logs)
    times = microseconds(requests["event_timestamp"])
    found = histories_as_of(built[1], requests["user_id"].to_numpy(), times, L)
    instants = set(zip(events["user_id"], events["time_us"], strict=True))
    assert any(pair in instants for pair in zip(requests["user_id"], times, strict=True)), "the fixture holds behaviours in a request's very instant"
    for row, (user, time) in enumerate(zip(requests["user_id"], times, strict=True)):
        expected = brute_force(events, user, time)
        assert found.count[row] == len(expected)
        for name in HISTORY_ARRAYS:
            np.testing.assert_array_equal(getattr(found, name)[row], [*expected[name], *[0] * (L - len(expected))])


def test_profiles_hold_from_their_instant_on(logs, built):
    users = read_table(logs, "users")
    changed = users[users["event_timestamp"] == users["event_timestamp"].max()].iloc[0]
    instant = changed["event_timestamp"].value // 1000
    found = profiles_as_of(built[1], np.full(3, changed["user_id"]), np.array([instant - 1, instant, 0]))
    assert found.age_band[1] == 9 != found.age_band[0] and found.known.tolist() == [True, True, False]


def test_offline_equals_online_bit_for_bit_and_after_encoding(logs, built):
    _, store = built
    users = users_of(logs)
    later = np.full(len(users), microseconds(read_table(logs, "behaviours")["event_timestamp"]).max() + 1)
    online = read_users(store, users.tolist(), L)
    histories, profiles = histories_as_of(store, users, later, L), profiles_as_of(store, users, later)
    assert_same(histories, online.histories)
    for name in vars(profiles):
        assert getattr(profiles, name).tobytes() == getattr(online.profiles, name).tobytes(), name
    requests = read_table(logs, "requests")
    ads = read_table(logs, "ads")
    words = Vocabulary.learn(
        {name: [ads[f"{name}_id"].to_numpy()] for name in VOCABULARIES if name != "geo"} | {"geo": [geo_cell(ads["latitude"].to_numpy(), ads["longitude"].to_numpy())]}
    )
    place = [requests[name].to_numpy()[: len(users)] for name in ("latitude", "longitude")]
    offset = np.full(len(users), -300)
    offline_encoded = encode_requests(words, profiles, histories, *place, later, offset)
    for row, user in enumerate(users):
        part = slice(row, row + 1)
        one = read_user(store, int(user), L) or UserFeatures.unknown(L)
        served = encode_requests(words, one.profiles, one.histories, place[0][part], place[1][part], later[part], offset[part])
        for name, values in served.items():
            assert values.tobytes() == offline_encoded[name][part].tobytes(), (name, user)


def test_unknown_users_and_users_without_behaviours(logs, built):
    store = built[1]
    users = users_of(logs)
    assert read_user(store, 404, L) is None
    silent = read_user(store, int(users[2]), L)
    assert silent.profiles.known[0] and silent.histories.count[0] == 0 and silent.newest_us[0] == 0
    nameless = read_user(store, int(users[1]), L)
    assert nameless is None or not nameless.profiles.known[0]


def test_the_join_keeps_every_row_and_its_order(built, logs):
    requests = read_table(logs, "requests").sample(frac=1.0, random_state=1)
    rows = pd.concat([requests[["user_id", "event_timestamp"]]] * 2 + [pd.DataFrame({"user_id": [404], "event_timestamp": requests["event_timestamp"].iloc[:1]})], ignore_index=True)
    joined = join_as_of(built[1], rows, ["user_behaviors:behaviour_count"], ["user_id"])
    pd.testing.assert_frame_equal(joined[["user_id", "event_timestamp"]], rows, check_dtype=False)
    assert np.isnan(joined["behaviour_count"].iloc[-1])


def split_logs(logs: Path, folder: Path, fraction: float) -> tuple[Path, pd.DataFrame]:
    """A copy of the logs whose behaviours end early, and the behaviours left out."""
    early = folder / "early"
    shutil.copytree(logs, early)
    shutil.rmtree(early / "behaviours")
    events = read_table(logs, "behaviours").sort_values("event_timestamp", kind="stable")
    cut = int(len(events) * fraction)
    write_table(early, "behaviours", events.iloc[:cut])
    return early, events.iloc[cut:]


def test_pushes_lead_to_the_state_that_a_rebuild_finds_and_survive_a_rebuild(logs, built, tmp_path):
    early, rest = split_logs(logs, tmp_path, 0.6)
    home, users = tmp_path / "home", users_of(logs).tolist()
    build_features(early, home, behaviours=L)
    store = open_store(home)
    final = read_users(built[1], users, L).histories
    late, in_time = rest.iloc[::7], rest.drop(rest.index[::7])
    for start in range(0, len(in_time), 40):
        push_behaviours(store, in_time.iloc[start : start + 40].sample(frac=1.0, random_state=start), L)
    push_behaviours(store, late, L)  # the online store keeps the last write: a late event must not bring an old state back
    push_behaviours(store, rest, L)  # delivered twice
    assert_same(read_users(store, users, L).histories, final)

    # A later materialise from logs that end early must not bring the older state back either.
    newest = microseconds(read_table(early, "requests")["event_timestamp"]).max()
    snapshot = build_features(early, home, behaviours=L)
    kept = read_users(open_store(home), users, L).histories
    after = rest[microseconds(rest["event_timestamp"]) > newest]
    for row, user in enumerate(users):
        expected = set(after.loc[after["user_id"] == user, "behaviour_id"].tail(L))
        assert expected <= set(kept.behaviour_id[row].tolist())
    assert snapshot.pushed_again >= after.groupby("user_id").tail(L).shape[0] > 0

    build_features(early, home, behaviours=L, fresh=True)
    assert read_users(open_store(home), users, L).histories.time_us.max() < microseconds(rest["event_timestamp"]).min()


def test_a_push_without_a_column_names_it(built):
    with pytest.raises(ValueError, match="column 'poi_id' is missing"):
        push_behaviours(built[1], pd.DataFrame({name: [1] for name in BEHAVIOURS.names if name != "poi_id"}), L)


def test_reads_go_on_while_views_are_materialised(logs, built):
    home, store = built
    users, stop, errors, reads = users_of(logs).tolist(), threading.Event(), [], []
    before = read_users(store, users, L).histories

    def read() -> None:
        reader = open_store(home)
        while not stop.is_set():
            try:
                assert_same(read_users(reader, users, L).histories, before)
                reads.append(1)
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    build_module._materialise(store, datetime.fromisoformat(read_snapshot(home)["as_of"]))
    stop.set()
    thread.join()
    assert not errors and reads


def test_the_same_logs_give_the_same_source_bytes(logs, built, tmp_path):
    build_features(logs, tmp_path, behaviours=L)
    for view in ("user_profile", "user_behaviors", "ad_catalog"):
        assert (tmp_path / "feast" / "data" / f"{view}.parquet").read_bytes() == (built[0] / "feast" / "data" / f"{view}.parquet").read_bytes()


def test_catalogue_counts_only_what_was_known_when_the_day_began(logs, built):
    ads, impressions = read_table(logs, "ads"), read_table(logs, "impressions")
    table = catalogue_table(ads, impressions).to_pandas()
    for row in table.itertuples():
        mine = impressions[impressions["ad_id"] == row.ad_id]
        assert row.impressions == (mine["event_timestamp"] < row.event_timestamp).sum()
        assert row.clicks == ((mine["click"] == 1) & (mine["click_timestamp"] < row.event_timestamp)).sum()
    current = load_catalogue(built[0])
    last = ads[ads["event_timestamp"] == ads["event_timestamp"].max()].sort_values("ad_id")
    np.testing.assert_array_equal(current["ad_id"], last["ad_id"])
    np.testing.assert_array_equal(current["bid"], last["bid"])
    assert current["impressions"].sum() == impressions["ad_id"].isin(last["ad_id"]).sum()


def test_ad_embeddings_come_back_as_published(built):
    home, store = built
    rng = np.random.default_rng(0)
    ids, first = np.array([30, 10, 20]), rng.normal(size=(3, 4)).astype(np.float32)
    when = datetime(2026, 3, 20, tzinfo=UTC)
    publish_ad_embeddings(home, ids, first, "model-1", when)
    publish_ad_embeddings(home, ids, rng.normal(size=(3, 5)).astype(np.float32), "model-2", when.replace(day=21))
    found, matrix, version = load_ad_embeddings(home, "model-1")
    assert found.tolist() == [10, 20, 30] and version == "model-1" and matrix.tobytes() == first[[1, 2, 0]].tobytes()
    assert load_ad_embeddings(home)[2] == "model-2" and load_ad_embeddings(home)[1].shape == (3, 5)
    asked = pd.DataFrame({"ad_id": [20], "event_timestamp": [pd.Timestamp(when) + pd.Timedelta(hours=1)]})
    joined = join_as_of(store, asked, ["ad_embeddings:embedding", "ad_embeddings:model_version"], ["ad_id"])
    assert joined["model_version"][0] == "model-1" and joined["embedding"][0].tobytes() == first[2].tobytes()
    with pytest.raises(ValueError, match="not finite"):
        publish_ad_embeddings(home, ids, np.full((3, 2), np.nan, np.float32), "model-3", when)


def test_views_have_the_types_of_the_schema(built):
    store = built[1]
    views = {view.name: view for view in store.list_feature_views()}
    assert set(views) == set(SOURCES) and views["user_profile"].online and not views["ad_catalog"].online
    wanted = {pa.int32(): "Int32", pa.int64(): "Int64", pa.float64(): "Float64"}
    for field in views["user_profile"].features:
        assert str(field.dtype) == wanted[USERS[field.name].dtype]
    assert {service.name for service in store.list_feature_services()} == {"ega_v1_ranking", "ega_v1_ads"}


def test_configuration_as_parsed_and_an_empty_registry_is_refused(tmp_path):
    written = yaml.safe_load((REPOSITORY / "feature_store.yaml").read_text())
    store = open_store(tmp_path)
    parsed = store.config
    assert parsed.registry.registry_type == "sql" and parsed.registry.serve_features_while_materializing is True
    assert parsed.registry.path.endswith("/feast/registry.db") and Path(parsed.online_store.path).is_relative_to(tmp_path)
    assert parsed.project == written["project"] == "ega" and parsed.online_store.vector_enabled is False
    with pytest.raises(RuntimeError, match="lacks the views user_profile"):
        check_store(store)


def test_feast_apply_on_a_fresh_checkout(tmp_path):
    repository = tmp_path / "feature_repo"
    repository.mkdir()
    for name in ("definitions.py", "feature_store.yaml", ".feastignore", "__init__.py"):
        shutil.copy(REPOSITORY / name, repository)
    done = subprocess.run([Path(sys.executable).with_name("feast"), "apply"], cwd=repository, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for view in SOURCES:
        assert f"Created feature view {view}" in done.stdout
    assert (repository / "registry.db").stat().st_size > 0
