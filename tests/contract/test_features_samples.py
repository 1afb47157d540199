"""Sample folders: every array against a plain-loop reading of the logs, byte for byte repeatable, nothing learned after the training days."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from logs_fixture import tiny_logs

from features.build import build_features, microseconds
from features.encoding import FIRST_CODE, Vocabulary, encode_ads
from features.sampling import SamplingConfig, sample_requests
from marketplace.logs import read_table, write_table
from marketplace.schema import ACTION_PURCHASE, ACTION_VISIT, SAMPLE_ARRAYS, TEST, TRAIN, UNKNOWN, VALIDATION

CONFIG = SamplingConfig(unexposed=6, validation_days=1, test_days=1, targets=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    logs = tiny_logs(folder / "logs", seed=11)
    build_features(logs, folder / "home", behaviours=6)
    info = sample_requests(logs, folder / "home", folder / "out", CONFIG, seed=5)
    arrays = {array.name: np.load(folder / "out" / f"{array.name}.npy", mmap_mode="r") for array in SAMPLE_ARRAYS}
    return folder, logs, info, arrays


def chosen_by_hand(logs: Path) -> dict[int, dict[int, bool]]:
    """request_id -> {ad_id: bought}, in order of choice, read off the logs with loops."""
    ads, behaviours, impressions = (read_table(logs, name) for name in ("ads", "behaviours", "impressions"))
    behaviours = behaviours.sort_values(["event_timestamp", "behaviour_id"])
    poi_of = dict(zip(ads["ad_id"], ads["poi_id"], strict=True))
    answer: dict[int, dict[int, bool]] = {}
    for request in read_table(logs, "requests").itertuples():
        shown = {poi_of[ad] for ad in impressions.loc[impressions["request_id"] == request.request_id, "ad_id"]}
        today = ads[(ads["event_timestamp"].dt.date == request.event_timestamp.date()) & (ads["city_id"] == request.city_id)]
        mine = behaviours[(behaviours["session_id"] == request.session_id) & (behaviours["user_id"] == request.user_id) & (behaviours["event_timestamp"] >= request.event_timestamp)]
        found: dict[int, bool] = {}
        for event in mine.itertuples() if request.session_id else ():
            if event.action != ACTION_VISIT and event.poi_id in shown:
                continue
            for ad in sorted(today.loc[today["poi_id"] == event.poi_id, "ad_id"]):
                found[ad] = found.get(ad, False) or event.action == ACTION_PURCHASE
        answer[request.request_id] = found
    return answer


def test_arrays_have_the_shapes_and_types_of_the_schema(made):
    _, _, info, arrays = made
    sizes = {"A": info.ads, "T": len(info.days), "R": sum(info.requests.values()), "K": 3, "M": 9, "L": 6, "P": 3, "F_ad": 7, "F_user": 3, "F_context": 3, "F_behaviour": 8, "2": 2}
    for array in SAMPLE_ARRAYS:
        assert arrays[array.name].dtype == array.dtype and arrays[array.name].shape == tuple(sizes[letter] for letter in array.shape.split()), array.name
    group = {"ad_fields": "ad", "user_fields": "user", "context_fields": "context", "behaviours": "behaviour"}
    for name, field_group in group.items():
        values = arrays[name].reshape(-1, arrays[name].shape[-1])
        assert (values.max(axis=0) < list(info.field_sizes[field_group].values())).all() and values.min() >= 0


def test_requests_exposures_and_ads_against_the_logs(made):
    _, logs, info, arrays = made
    requests = read_table(logs, "requests").set_index("request_id").loc[arrays["request_id"]]
    np.testing.assert_array_equal(arrays["time"], microseconds(requests["event_timestamp"]) // 10**6)
    assert (np.diff(arrays["time"]) >= 0).all()
    np.testing.assert_array_equal(arrays["split"], np.array([TRAIN] * 3 + [VALIDATION, TEST])[arrays["day"]])
    assert [info.days[day] for day in arrays["day"]] == requests["event_timestamp"].dt.strftime("%Y-%m-%d").tolist()
    impressions = read_table(logs, "impressions").set_index(["request_id", "slot"])
    for row, request in enumerate(arrays["request_id"]):
        for slot in range(3):
            logged = impressions.loc[(request, slot + 1)]
            assert arrays["ad_id"][arrays["candidate"][row, slot]] == logged["ad_id"]
            assert (arrays["click"][row, slot], arrays["purchase"][row, slot]) == (logged["click"], logged["purchase"])
            assert (arrays["exposed_bid"][row, slot], arrays["exposed_payment"][row, slot]) == (logged["bid"], logged["payment"])
            assert arrays["propensity"][row, slot] == np.float32(logged["propensity"]) and arrays["log_inclusion"][row, slot] == 0
    ads = read_table(logs, "ads")
    for day, name in enumerate(info.days):
        today = ads[ads["event_timestamp"].dt.strftime("%Y-%m-%d") == name].set_index("ad_id")["bid"]
        np.testing.assert_array_equal(arrays["bid"][day], [today.get(ad, np.nan) for ad in arrays["ad_id"]])


def test_labels_and_targets_of_ads_chosen_elsewhere(made):
    _, logs, info, arrays = made
    chosen, seen, corrected = chosen_by_hand(logs), 0, 0
    for row, request in enumerate(arrays["request_id"]):
        expected = chosen[request]
        target = [arrays["ad_id"][ad] for ad in arrays["target"][row] if ad >= 0]
        assert len(target) == min(3, len(expected)) and set(target) <= set(expected)
        candidates = [arrays["ad_id"][ad] if ad >= 0 else None for ad in arrays["candidate"][row]]
        for place in range(3, 9):
            ad = candidates[place]
            assert arrays["click"][row, place] == (ad in expected) and arrays["purchase"][row, place] == expected.get(ad, False)
            if ad in expected:
                corrected += arrays["log_inclusion"][row, place] < 0  # its chance as an ad that was not chosen
                seen += 1
        missing = [ad for ad in expected if ad not in candidates]
        assert not missing, "positives elsewhere are always among the candidates"
    assert seen == info.positives["unexposed"] > 20
    assert corrected > 0.9 * seen, "a correction that differed by label would bias every probability"


def test_unexposed_ads_are_active_of_the_city_distinct_and_never_exposed(made):
    _, _, _, arrays = made
    for row in range(len(arrays["request_id"])):
        candidate = arrays["candidate"][row]
        real = candidate[candidate >= 0]
        assert len(set(real)) == len(real) and (arrays["ad_city"][real] == arrays["city"][row]).all()
        assert np.isfinite(arrays["bid"][arrays["day"][row], real]).all()
        active = (np.isfinite(arrays["bid"][arrays["day"][row]]) & (arrays["ad_city"] == arrays["city"][row])).sum()
        assert (candidate[3:] >= 0).sum() == min(6, active - 3) and (np.diff(candidate[3:][candidate[3:] >= 0]) > 0).all()
        inclusion = arrays["log_inclusion"][row, 3:]
        assert (inclusion <= 0).all() and np.isfinite(inclusion).all()


def test_without_kept_positives_they_are_drawn_like_any_other(made, tmp_path):
    folder, logs, kept, _ = made
    free = sample_requests(logs, folder / "home", tmp_path / "out", SamplingConfig(unexposed=6, validation_days=1, test_days=1, keep_unexposed_positives=False), seed=5)
    assert 0 < free.positives["unexposed"] < kept.positives["unexposed"]
    label, inclusion = (np.load(tmp_path / "out" / f"{name}.npy")[:, 3:] for name in ("click", "log_inclusion"))
    assert (label == 1).any() and (inclusion == 0).all()  # drawn without regard to the label: nothing to correct


def test_same_seed_same_bytes_and_the_manifest_matches(made, tmp_path):
    folder, logs, info, _ = made
    again = sample_requests(logs, folder / "home", tmp_path / "out", CONFIG, seed=5)
    assert again == info
    first, second = (json.loads((out / "manifest.json").read_text()) for out in (folder / "out", tmp_path / "out"))
    assert first == second and set(first["files"]) == {f"{array.name}.npy" for array in SAMPLE_ARRAYS} | {"vocab.json", "samples.json"}
    for name, record in first["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (record["sha256"], record["size"])
    sample_requests(logs, folder / "home", tmp_path / "out", CONFIG, seed=6)  # an existing folder is replaced as a whole
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]["candidate.npy"] != first["files"]["candidate.npy"]
    assert not list(tmp_path.glob(".*.part"))


def test_nothing_is_learned_after_the_training_days(made, tmp_path):
    """Altering the test day's behaviours changes neither vocabulary nor candidates of training requests nor popularity."""
    _, logs, _, arrays = made
    later = tmp_path / "logs"
    shutil.copytree(logs, later)
    behaviours = read_table(logs, "behaviours")
    last = behaviours["event_timestamp"].dt.date == behaviours["event_timestamp"].dt.date.max()
    behaviours.loc[last, "poi_id"] = 777_777
    (later / "manifest.json").unlink()
    write_table(later, "behaviours", behaviours[last])
    build_features(later, tmp_path / "home", behaviours=6)
    sample_requests(later, tmp_path / "home", tmp_path / "out", CONFIG, seed=5)
    vocabulary = Vocabulary.load(tmp_path / "out" / "vocab.json")
    assert vocabulary.to_json() == Vocabulary.load(made[0] / "out" / "vocab.json").to_json() and vocabulary.index("poi", np.array([777_777]))[0] == UNKNOWN
    before = arrays["split"] != TEST
    for name in ("candidate", "click", "log_inclusion", "behaviours", "user_fields", "context_fields"):
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{name}.npy")[before], arrays[name][before], err_msg=name)


def test_ads_as_served_are_encoded_as_trained(made):
    from features.store import load_catalogue

    folder, _, _, arrays = made
    vocabulary = Vocabulary.load(folder / "out" / "vocab.json")
    current = load_catalogue(folder / "home")
    row = np.searchsorted(arrays["ad_id"], current["ad_id"])
    np.testing.assert_array_equal(encode_ads(vocabulary, current), arrays["ad_fields"][row])
    assert (arrays["ad_fields"][:, 0] >= FIRST_CODE).all()


def test_clear_errors(made, tmp_path):
    folder, logs, _, _ = made
    other = tiny_logs(tmp_path / "other", seed=12)
    with pytest.raises(ValueError, match="was built from other logs"):
        sample_requests(other, folder / "home", tmp_path / "out", CONFIG, seed=5)
    with pytest.raises(FileNotFoundError, match="build the features first"):
        sample_requests(logs, tmp_path / "nowhere", tmp_path / "out", CONFIG, seed=5)
    with pytest.raises(ValueError, match="leave none for training"):
        sample_requests(logs, folder / "home", tmp_path / "out", SamplingConfig(validation_days=3, test_days=2), seed=5)
