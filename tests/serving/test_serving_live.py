"""Models in their places: decisions on disk, swaps under load, corrupted models that never go live, rollback, shadow, the admin port."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving_world import BODY, KEY, NOW, catalogue, tiny_bundle, vocabulary_of
from starlette.testclient import TestClient

from serving.admin import AdminServer, application
from serving.catalogue import split_by_city
from serving.event_log import EventLog, read_shadow
from serving.live import Busy, LiveModels, Refused
from serving.messages import RankRequest
from serving.metrics import MODEL_LIVE
from serving.policies import Model, Policy, load_model
from serving.ranking import Ranking
from serving.settings import Arm, ServingConfig, SettingsError
from serving.store import (
    ApprovalError,
    Approved,
    approve_bundle,
    approved,
    decide,
    decisions,
    find_live_model,
    live_model,
    placed,
    previous_tag,
    write_gate_record,
)
from serving.users import UserReader

GOOD = {"ic": {"approved": True, "reason": "psi_exact=0.01"}}
ARMS = (Arm(name="control", policy="bootstrap", share=0.0), Arm(name="ega", policy="model"), Arm(name="other", policy="model", share=0.0))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, vocabulary = tmp_path_factory.mktemp("bundles"), vocabulary_of(catalogue())
    for seed in range(3):
        tiny_bundle(folder / str(seed), seed, vocabulary)
        write_gate_record(folder / f"{seed}.json", folder / str(seed), GOOD, KEY)
    return [folder / str(seed) for seed in range(3)]


def approve(home: Path, bundle: Path) -> str:
    return approve_bundle(bundle, bundle.with_suffix(".json"), home, KEY)


def ask(user: int = 7, **fields: object) -> RankRequest:
    return RankRequest.model_validate({**BODY, "user_id": user, "timestamp": NOW, **fields})


class Served:
    """A Ranking with LiveModels over real bundles and a real store, without a feature store."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.config = ServingConfig(home=home, arms=ARMS, events_synchronous="normal", push_events=False, **settings)
        self.loads = 0
        loaded = {place: self.load(entry) for place, entry in placed(self.config, KEY).items()}
        log = EventLog(self.config.event_log, "normal")
        self.ranking = Ranking(self.config, split_by_city(catalogue()), {"model": loaded["live"], "bootstrap": loaded["live"]}, UserReader(lambda user: None, 5.0), log)
        self.models = LiveModels(self.config, KEY, self.ranking, self.load, loaded)
        self.ranking.warm_up()

    def load(self, entry: Approved) -> Policy:
        self.loads += 1
        return load_model(entry.folder, KEY, "critical", False, 16, 1, self.config.currency_step)

    def close(self) -> None:
        self.models.close()
        self.ranking.close()


@pytest.fixture
def served(bundles: list[Path], tmp_path: Path) -> Iterator[Served]:
    approve(tmp_path, bundles[0])
    served = Served(tmp_path)
    yield served
    served.close()


# -- decisions --------------------------------------------------------------------------------------------------------


def test_decisions_and_rollbacks_are_a_stack_on_record(bundles: list[Path], tmp_path: Path) -> None:
    a, b, c = (approve(tmp_path, bundle) for bundle in bundles)
    assert live_model(tmp_path, KEY).tag == c and previous_tag(tmp_path, KEY) == b
    decide(tmp_path, KEY, b, rollback=True)
    assert live_model(tmp_path, KEY).tag == b and previous_tag(tmp_path, KEY) == a
    decide(tmp_path, KEY, a, rollback=True)
    with pytest.raises(ApprovalError, match="nothing to roll back"):
        previous_tag(tmp_path, KEY)
    decide(tmp_path, KEY, c)
    assert previous_tag(tmp_path, KEY) == a
    assert [(d.action, d.tag) for d in decisions(tmp_path, KEY)] == [("approve", a), ("approve", b), ("approve", c), ("rollback", b), ("rollback", a), ("activate", c)]
    assert [d.sequence for d in decisions(tmp_path, KEY)] == [1, 2, 3, 4, 5, 6]


def test_an_approval_after_a_rollback_is_the_newest_decision(bundles: list[Path], tmp_path: Path) -> None:
    a, _ = (approve(tmp_path, bundle) for bundle in bundles[:2])
    decide(tmp_path, KEY, a, rollback=True)
    assert approve(tmp_path, bundles[2]) == live_model(tmp_path, KEY).tag and live_model(tmp_path, KEY).sequence == 4


@pytest.mark.parametrize("change", [{"tag": "ega-v1:000000000000"}, {"sequence": 9}, {"place": "shadow"}])
def test_an_altered_or_replayed_decision_is_refused(bundles: list[Path], tmp_path: Path, change: dict[str, Any]) -> None:
    a, _ = (approve(tmp_path, bundle) for bundle in bundles[:2])
    decide(tmp_path, KEY, a)
    file = next((tmp_path / "bentoml" / "decisions").iterdir())
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ApprovalError, match="signature"):
        live_model(tmp_path, KEY)


def test_an_old_decision_put_back_under_a_newer_name_is_refused(bundles: list[Path], tmp_path: Path) -> None:
    a, b = (approve(tmp_path, bundle) for bundle in bundles[:2])
    decide(tmp_path, KEY, a)
    decide(tmp_path, KEY, b)
    folder = tmp_path / "bentoml" / "decisions"
    (folder / "00000009.json").write_bytes((folder / "00000003.json").read_bytes())
    with pytest.raises(ApprovalError, match="another decision"):
        live_model(tmp_path, KEY)


@pytest.mark.parametrize("tag", ["ega-v1:000000000000", "ega-v1:latest", "../x", ""])
def test_only_approved_models_can_be_decided_on(bundles: list[Path], tmp_path: Path, tag: str) -> None:
    approve(tmp_path, bundles[0])
    with pytest.raises(ApprovalError, match="refused"):
        decide(tmp_path, KEY, tag)
    assert len(decisions(tmp_path, KEY)) == 1


def test_of_two_rollbacks_at_once_one_wins(bundles: list[Path], tmp_path: Path) -> None:
    for bundle in bundles:
        approve(tmp_path, bundle)
    target = previous_tag(tmp_path, KEY)
    outcomes: list[str] = []

    def roll() -> None:
        try:
            decide(tmp_path, KEY, target, rollback=True)
            outcomes.append("won")
        except ApprovalError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=roll) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("won") == 1 and sum("came first" in outcome for outcome in outcomes) == 3


# -- swaps ------------------------------------------------------------------------------------------------------------


def test_swaps_under_load_lose_nothing_and_every_page_is_of_the_version_it_names(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    tags = [served.models.models()[0]["tag"], approve(tmp_path, bundles[1])]
    offline = {}
    for tag in tags:
        entry = approved(tmp_path, tag, KEY)
        served.models.activate(tag)
        offline[entry.version] = {user: served.ranking.rank(ask(user))["ads"] for user in range(5)}
    assert offline[tags[0][7:]] != offline[tags[1][7:]]
    pages: list[tuple[int, dict[str, Any]]] = []
    stop = threading.Event()

    def load(user: int) -> None:
        while not stop.is_set():
            pages.append((user, served.ranking.rank(ask(user))))

    threads = [threading.Thread(target=load, args=(user,)) for user in range(2)]
    for thread in threads:
        thread.start()
    for swap in range(6):
        served.models.activate(tags[swap % 2])
        seen, deadline = len(pages), time.monotonic() + 60
        while len(pages) < seen + 5 and time.monotonic() < deadline:  # pages of this version, and some that the next swap meets half way
            time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(pages) > 20 and {page["model_version"] for _, page in pages} == offline.keys()
    assert [page for user, page in pages if page["ads"] != offline[page["model_version"]][user]] == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json", "manifest.json", "gate_record.json", "approval.json"])
def test_a_corrupted_model_never_goes_live(served: Served, bundles: list[Path], tmp_path: Path, name: str) -> None:
    before = served.ranking.rank(ask())
    tag = approve(tmp_path, bundles[1])
    served.models.activate(before["model_version"] and served.models.models()[1]["tag"])
    file = approved(tmp_path, tag, KEY).folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    count = len(list((tmp_path / "bentoml" / "decisions").iterdir()))
    with pytest.raises(Refused, match="refused"):
        served.models.activate(tag)
    after = served.ranking.rank(ask())
    assert after["model_version"] == before["model_version"] and after["ads"] == before["ads"]
    assert len(list((tmp_path / "bentoml" / "decisions").iterdir())) == count


def test_a_model_that_breaks_a_law_never_goes_live(served: Served, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, tag = served.ranking.rank(ask())["model_version"], approve(tmp_path, bundles[1])
    rank = Model.rank

    def greedy(self: Model, ads: Any, query: Any) -> Any:
        page = rank(self, ads, query)
        return replace(page, price=page.price * 0 + 1e9) if self.version == tag[7:] else page

    monkeypatch.setattr(Model, "rank", greedy)
    with pytest.raises(Refused, match="golden request"):
        served.models.activate(tag)
    assert served.ranking.rank(ask())["model_version"] == before


def test_rollback_returns_to_the_model_before_and_says_when_there_is_none(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    first = served.ranking.rank(ask())
    with pytest.raises(Refused, match="nothing to roll back to"):
        served.models.rollback()
    served.models.activate(approve(tmp_path, bundles[1]))
    assert served.ranking.rank(ask())["model_version"] != first["model_version"]
    served.models.rollback()
    again = served.ranking.rank(ask())
    assert again["model_version"] == first["model_version"] and again["ads"] == first["ads"]
    assert live_model(tmp_path, KEY).version == first["model_version"]  # the next start agrees


def test_an_arm_can_have_a_model_of_its_own_and_give_it_back(bundles: list[Path], tmp_path: Path) -> None:
    a, b = approve(tmp_path, bundles[0]), approve(tmp_path, bundles[1])
    served = Served(tmp_path)
    served.models.activate(a, "arm:other")
    live = served.ranking._live.arms
    assert (live["ega"].version, live["other"].version) == (b[7:], a[7:])
    served.close()
    served = Served(tmp_path)  # decided, so the next start knows it
    assert served.ranking._live.arms["other"].version == a[7:]
    served.models.activate("", "arm:other")
    assert served.ranking._live.arms["other"] is served.ranking._live.arms["ega"]
    assert find_live_model(tmp_path, KEY, "arm:other") is None
    with pytest.raises(Refused, match="no place 'arm:control'"):
        served.models.activate(a, "arm:control")
    with pytest.raises(Refused, match="needs a model"):
        served.models.activate("")
    served.close()


def test_an_arm_named_model_in_the_settings_and_a_pinned_tag(bundles: list[Path], tmp_path: Path) -> None:
    a, b = approve(tmp_path, bundles[0]), approve(tmp_path, bundles[1])
    config = ServingConfig(home=tmp_path, arms=(Arm(name="x", policy="model", model=a), Arm(name="y", policy="model")))
    assert {place: entry.tag for place, entry in placed(config, KEY).items()} == {"arm:x": a, "live": b}
    served = Served(tmp_path, model_tag=a)
    with pytest.raises(Refused, match="pin model_tag"):
        served.models.activate(b)
    served.close()


def test_the_shadow_ranks_along_and_is_never_shown(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    tag = approve(tmp_path, bundles[1])
    before = served.ranking.rank(ask())
    served.models.activate(tag, "shadow")
    pages = [served.ranking.rank(ask()) for _ in range(5)]
    served.ranking._shadow_pool.submit(lambda: None).result()
    assert all(page["ads"] == before["ads"] for page in pages)
    shadow = read_shadow(served.config.event_log)
    assert len(shadow) and set(shadow["model_version"]) == {tag[7:]} and set(shadow["request_id"]) <= {page["request_id"] for page in pages}
    first = shadow[shadow["request_id"] == shadow["request_id"].iloc[0]]
    assert first["slot"].tolist() == [1, 2, 3, 4, 5] and (first["price"] > 0).all()
    again = Served(tmp_path)  # the next start lets it rank along as well
    again.ranking._log.write_shadow = lambda request, version, took, page: written.append(version)  # type: ignore[method-assign]
    written: list[str] = []
    again.ranking.rank(ask())
    again.close()
    assert written == [tag[7:]]
    served.models.activate("", "shadow")
    assert served.ranking._live.shadow is None


def test_the_live_metric_shows_one_version_a_place(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    served.models.activate(approve(tmp_path, bundles[1]))
    served.models.rollback()
    values = {(sample.labels["place"], sample.labels["model_version"]): sample.value for family in MODEL_LIVE.collect() for sample in family.samples}
    old, new = live_model(tmp_path, KEY).version, served.models.models()[0]["tag"][7:]
    assert old != new and values["ega", old] == 1 and values["ega", new] == 0


def test_the_old_model_is_freed_when_its_last_request_ends(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    old = weakref.ref(served.ranking._live.arms["ega"])
    held = served.ranking._live  # a request that is still running
    served.models.activate(approve(tmp_path, bundles[1]))
    gc.collect()
    assert old() is not None
    del held
    gc.collect()
    assert old() is None


def test_one_change_at_a_time(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    tag, entered, go = approve(tmp_path, bundles[1]), threading.Event(), threading.Event()
    load = served.models._load

    def slow(entry: Approved) -> Any:
        entered.set()
        go.wait(10)
        return load(entry)

    served.models._load = slow
    thread = threading.Thread(target=served.models.activate, args=(tag,))
    thread.start()
    entered.wait(10)
    with pytest.raises(Busy):
        served.models.rollback()
    assert served.ranking.rank(ask())["ads"]  # pages go on meanwhile
    go.set()
    thread.join()
    assert served.ranking.rank(ask())["model_version"] == tag[7:]


# -- the admin port ---------------------------------------------------------------------------------------------------


def test_the_admin_port_lists_activates_rolls_back_and_asks_for_its_token(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    first = served.ranking.rank(ask())["model_version"]
    tag = approve(tmp_path, bundles[1])
    with TestClient(application(served.config, served.models, "secret")) as stranger:
        assert stranger.get("/v1/models").status_code == 401 and stranger.post("/v1/models/rollback", json={}).status_code == 401
    with TestClient(application(served.config, served.models, "secret"), headers={"Authorization": "Bearer secret"}) as client:
        assert [(row["tag"][7:], row["places"]) for row in client.get("/v1/models").json()["models"]] == [(tag[7:], []), (first, ["live"])]
        done = client.post("/v1/models/activate", json={"tag": tag}).json()
        assert (done["tag"], done["place"]) == (tag, "live") and served.ranking.rank(ask())["model_version"] == tag[7:]
        assert client.post("/v1/models/rollback", json={}).json()["tag"][7:] == first
        refused = client.post("/v1/models/activate", json={"tag": "ega-v1:0123"})
        assert refused.status_code == 409 and "no model" in refused.json()["error"]["message"]
        for body in ({}, {"tag": 7}, {"tag": tag, "x": 1}):
            assert client.post("/v1/models/activate", json=body).status_code == 422
        assert client.post("/v1/models/activate", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
        assert client.get("/nope").status_code == 404


def test_an_open_admin_port_needs_a_token(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGA_ADMIN_TOKEN", raising=False)
    with pytest.raises(SettingsError, match="EGA_ADMIN_TOKEN"):
        AdminServer(replace(served.config, admin_host="0.0.0.0", admin_port=1), served.models)  # noqa: S104


def test_listing_names_an_entry_that_must_not_be_served(served: Served, bundles: list[Path], tmp_path: Path) -> None:
    tag = approve(tmp_path, bundles[1])
    os.truncate(approved(tmp_path, tag, KEY).folder / "model.safetensors", 100)
    rows = served.models.models()
    assert "not the file that was signed" in rows[0]["error"] and rows[1]["places"] == ["live"]
