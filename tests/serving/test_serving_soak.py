"""The long proofs of the service, `make soak`: overload, swaps under load, kill -9 under load, Redis faults, hostile clients, drain.

Each drives a real service over HTTP. Ratios within one run; absolute times only where a promise of the interface says so.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from serving_world import BODY, catalogue, served_home, tiny_bundle, vocabulary_of
from test_serving_features import Redis
from test_serving_http import HOSTILE

from benchmarks.latency import QUICKSTART
from benchmarks.load import Answer, Client, bodies_of, closed_loop, load, open_loop, quantile
from features.store import REDIS_VARIABLE
from model.bundle import signing_key
from serving.event_log import read_impressions, read_requests
from serving.launch import Running, free_port, kill, running_service
from serving.settings import Arm, ServingConfig, save_settings
from serving.store import approve_bundle, approved, write_gate_record

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900), pytest.mark.xdist_group("serving_soak")]
ARMS = (Arm(name="ega", policy="model"),)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.pop("EGA_SIGNING_KEY", None)
    return served_home(tmp_path_factory.mktemp("ega"))


@pytest.fixture
def own(home: Path, tmp_path: Path) -> Path:
    """A copy of the home, with its key."""
    shutil.copytree(home.parent, tmp_path / "ega")
    return tmp_path / "ega" / home.name


def settings_of(home: Path, **fields: Any) -> ServingConfig:
    return ServingConfig(home=home, arms=ARMS, admin_port=free_port(), **fields)


def second_model(home: Path, seed: int = 1) -> str:
    """Another approved model in the store, not live yet in a running service; returns its tag."""
    key, bundle, record = signing_key(home.parent), home.parent / f"bundle{seed}", home.parent / f"gate{seed}.json"
    tiny_bundle(bundle, seed, vocabulary_of(catalogue()), key)
    write_gate_record(record, bundle, {"ic": {"approved": True, "reason": "test"}}, key)
    return approve_bundle(bundle, record, home, key)


async def _post(url: str, path: str, body: bytes) -> tuple[int, Any]:
    client = Client(url)
    status, text = await client.post(path, body)
    client.close()
    return status, json.loads(text) if text else None


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return asyncio.run(_post(url, path, json.dumps(body).encode()))


def worker_of(service: Running) -> psutil.Process:
    """The process that ranks: the largest below the launcher."""
    return max(psutil.Process(service.process.pid).children(recursive=True), key=lambda process: process.memory_info().rss)


def assert_on_record(config: ServingConfig, answers: list[Answer]) -> None:
    """Every answered page is in the log once, with all its impressions."""
    shown = {answer.request_id: answer.ads for answer in answers if answer.status == 200}
    logged = read_requests(config.event_log)["request_id"]
    impressions = read_impressions(config.event_log)
    assert not logged.duplicated().any() and not impressions.duplicated(["request_id", "slot"]).any()
    counts = impressions.groupby("request_id").size()
    assert [request for request, ads in shown.items() if counts.get(request, 0) != ads] == []
    assert set(shown) <= set(logged)


class Background:
    """Open-loop load on a thread, until it has run its time."""

    def __init__(self, url: str, bodies: list[bytes], rate: float, seconds: float) -> None:
        self.answers: list[Answer] = []
        self._thread = threading.Thread(target=lambda: self.answers.extend(asyncio.run(open_loop(url, bodies, rate, seconds, np.random.default_rng(0)))))
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> list[Answer]:
        self._thread.join()
        return self.answers


def capacity_of(service: Running, bodies: list[bytes]) -> float:
    asyncio.run(closed_loop(service.url, bodies, 2.0, 1))
    return sum(answer.status == 200 for answer in asyncio.run(closed_loop(service.url, bodies, 5.0, 2))) / 5.0


# -- overload ---------------------------------------------------------------------------------------------------------


def test_ten_times_overload(tmp_path: Path) -> None:
    """With as many ads a city and a model of the size that the promise is made for: refusals cost the same whatever a page costs."""
    home = served_home(tmp_path / "ega", ads=6000, network=QUICKSTART)
    found = load(home, 60.0, settings=ServingConfig(home=home, arms=ARMS), say=print)
    print(json.dumps(found, indent=1, default=str))
    assert found["other_statuses"] == 0 and found["records_missing"] == 0 and found["records_twice"] == 0
    assert found["goodput_ratio"] >= 0.8 and found["p99_ratio_overload_to_unloaded"] <= 3.0 and found["recovery_s"] <= 2.0


# -- swaps ------------------------------------------------------------------------------------------------------------


def test_fifty_swaps_in_a_minute_at_half_load(own: Path, tmp_path: Path) -> None:
    config = settings_of(own, feature_deadline_ms=1_000.0)
    rng = np.random.default_rng(1)
    bodies = [json.dumps({**json.loads(body), "timestamp": 1780315200.0}).encode() for body in bodies_of(own, 40, rng)]
    admin = f"http://127.0.0.1:{config.admin_port}"
    with running_service(config, log=tmp_path / "log") as service:
        first = service.models["live"]
        tags = [first, second_model(own)]
        offline: dict[str, list[Any]] = {}
        for tag in tags:  # what each version answers while nothing moves
            assert post(admin, "/v1/models/activate", {"tag": tag})[0] == 200
            pages = [post(service.url, "/v1/rank", json.loads(body)) for body in bodies]
            assert {page["model_version"] for _, page in pages} == {tag[7:]}
            offline[tag[7:]] = [page["ads"] for _, page in pages]
        assert offline[tags[0][7:]] != offline[tags[1][7:]]
        capacity = capacity_of(service, bodies)
        worker = worker_of(service)
        memory = worker.memory_info().rss
        seen: list[tuple[int, int, Any]] = []

        async def traffic(seconds: float) -> list[Answer]:
            """open_loop, keeping whole pages."""
            client, answers = Client(service.url), []

            async def one(turn: int, due: float) -> None:
                status, text = await client.post("/v1/rank", bodies[turn % len(bodies)])
                answers.append(Answer(due, time.perf_counter(), status))
                seen.append((turn % len(bodies), status, json.loads(text) if text else None))

            due, turn, started, tasks = 0.0, 0, time.perf_counter(), []
            while (due := due + float(rng.exponential(2.0 / capacity))) < seconds:
                await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
                tasks.append(asyncio.create_task(one(turn, started + due)))
                turn += 1
            await asyncio.gather(*tasks)
            client.close()
            return answers

        usual = asyncio.run(traffic(15.0))
        during: list[Answer] = []
        thread = threading.Thread(target=lambda: during.extend(asyncio.run(traffic(60.0))))
        started, took = time.perf_counter(), []
        thread.start()
        for swap in range(50):
            status, done = post(admin, "/v1/models/activate", {"tag": tags[swap % 2]})
            assert status == 200, done
            took.append(done["seconds"])
            time.sleep(max(0.0, started + (swap + 1) * 1.2 - time.perf_counter()))
        swapping = time.perf_counter() - started
        file = approved(own, tags[0], signing_key(own.parent)).folder / "model.safetensors"  # tags[1] is live
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert post(admin, "/v1/models/activate", {"tag": tags[0]})[0] == 409
        file.write_bytes(whole)
        began = time.perf_counter()
        assert post(admin, "/v1/models/rollback", {})[0] == 200
        rolled_back = time.perf_counter() - began
        thread.join()
        grown = worker.memory_info().rss / memory
    versions = Counter(page["model_version"] for _, status, page in seen if status == 200)
    wrong = [turn for turn, status, page in seen if status == 200 and page["ads"] != offline[page["model_version"]][turn]]
    figures = {
        "pages_unlike_their_version": len(wrong), "capacity_per_s": capacity, "swaps": 50, "seconds": swapping, "median_swap_s": float(np.median(took)), "rollback_s": rolled_back, "pages": dict(versions),
        "p99_ratio": quantile(during, 0.99) / quantile(usual, 0.99), "memory_ratio": grown, "statuses": dict(Counter(status for _, status, _ in seen)),
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    assert wrong == [] and versions.keys() == offline.keys() and grown < 1.25
    assert {status for _, status, _ in seen} == {200}


# -- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["ranking process", "worker", "service"])
def test_kill_9_under_load_loses_no_answered_page(who: str, own: Path, tmp_path: Path) -> None:
    """The ranking process and the HTTP worker come back by themselves; of the whole service nothing is left, and another one goes on with the log."""
    whole = who == "service"
    config = settings_of(own, feature_deadline_ms=1_000.0)
    bodies = bodies_of(own, 200, np.random.default_rng(2))
    answers: list[Answer] = []
    for _ in range(2):
        with running_service(config, log=tmp_path / "log", wait_seconds=300) as service:
            rate = 0.5 * capacity_of(service, bodies)
            background = Background(service.url, bodies, rate, 12.0 if whole else 60.0)
            time.sleep(4.0)
            if whole:
                kill(service.process)
            else:
                ranking = worker_of(service)
                (ranking if who == "ranking process" else ranking.parent()).kill()  # type: ignore[union-attr]
            answers += background.end()
            if not whole:
                deadline = time.monotonic() + 120
                while post(service.url, "/v1/rank", BODY)[0] != 200:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
        statuses = Counter(answer.status for answer in answers)
        assert statuses[200] > 0 and set(statuses) <= {0, 200, 429, 503}, statuses
        assert_on_record(config, answers)
    print({"statuses": dict(statuses)})


@pytest.mark.parametrize("candidates", [1, 80_000])
def test_a_ranking_process_that_hangs_is_replaced(candidates: int, own: Path, tmp_path: Path) -> None:
    """Its requests get a refusal before the framework gives them up, and the next ones pages; also where a body does not fit into the buffer on the way."""
    with running_service(settings_of(own), log=tmp_path / "log") as service:
        hung = worker_of(service)
        hung.suspend()
        began = time.perf_counter()
        assert post(service.url, "/v1/rank", BODY | {"candidates": list(range(1000, 1000 + candidates))})[0] == 503 and time.perf_counter() - began < 30
        while post(service.url, "/v1/rank", BODY)[0] != 200:
            assert time.perf_counter() - began < 90
            time.sleep(0.2)
        assert not hung.is_running() and worker_of(service).pid != hung.pid


def test_workers_end_with_their_supervisor(own: Path, tmp_path: Path) -> None:
    config = settings_of(own)
    with running_service(config, log=tmp_path / "log") as service:
        worker = worker_of(service)
        service.process.kill()
        service.process.wait()
        worker.wait(60)
    with running_service(config, log=tmp_path / "log") as service:  # the admin port is free again
        assert post(service.url, "/v1/rank", BODY)[0] == 200


def test_sigterm_under_load_resets_nobody_who_heeds_connection_close(own: Path, tmp_path: Path) -> None:
    config = settings_of(own, feature_deadline_ms=1_000.0, drain_seconds=3.0)
    bodies = bodies_of(own, 200, np.random.default_rng(3))
    with running_service(config, log=tmp_path / "log") as service:
        rate = 0.5 * capacity_of(service, bodies)
        background = Background(service.url, bodies, rate, 5.0)
        time.sleep(3.0)
        service.process.terminate()
        not_ready = None
        while background.running:
            with socket.create_connection(service.url.removeprefix("http://").split(":"), timeout=5) as probe:
                probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                not_ready = not_ready or probe.recv(100).startswith(b"HTTP/1.1 503")
            time.sleep(0.2)
        answers = background.end()  # all were sent before the drain ended
        service.process.wait(60)
    statuses = Counter(answer.status for answer in answers)
    print(dict(statuses))
    assert not_ready and set(statuses) <= {200, 429} and statuses[200] > 0
    assert_on_record(config, answers)


# -- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(own: Path) -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt install redis-server)")
    server = Redis(own)
    os.environ[REDIS_VARIABLE] = f"127.0.0.1:{server.port},db=0"
    rebuild(own)
    try:
        yield server
    finally:
        del os.environ[REDIS_VARIABLE]
        server.process.send_signal(signal.SIGCONT)
        server.stop()


def rebuild(home: Path) -> None:
    script = "import sys; from pathlib import Path; from features.build import build_features; build_features(Path(sys.argv[1]), Path(sys.argv[2]), behaviours=16)"
    subprocess.run([sys.executable, "-c", script, str(home.parent / "logs"), str(home)], check=True, cwd=Path(__file__).parents[2])


def test_redis_faults_under_load(redis: Redis, own: Path, tmp_path: Path) -> None:
    """Stopped, killed, emptied, each under load: every page is answered, in time, and the reasons go away by themselves."""
    config = settings_of(own)
    bodies = bodies_of(own, 200, np.random.default_rng(4))

    def stop() -> None:
        redis.process.send_signal(signal.SIGSTOP)

    def go_on() -> None:
        redis.process.send_signal(signal.SIGCONT)

    def start_anew() -> None:
        redis.start()
        rebuild(own)

    faults: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "stopped": (stop, go_on), "killed": (redis.stop, start_anew), "emptied": (lambda: redis.command("FLUSHALL"), lambda: rebuild(own)),
    }  # fmt: skip
    with running_service(config, log=tmp_path / "log") as service:
        rate = 0.4 * capacity_of(service, bodies)
        usual = asyncio.run(open_loop(service.url, bodies, rate, 10.0, np.random.default_rng(5)))
        for name, (hurt, mend) in faults.items():
            background = Background(service.url, bodies, rate, 10.0)
            time.sleep(2.0)
            hurt()
            answers = background.end()
            mend()
            statuses, slower = Counter(answer.status for answer in answers), quantile(answers, 0.95) / quantile(usual, 0.95)
            deadline = time.monotonic() + 30
            while (page := post(service.url, "/v1/rank", {**BODY, "user_id": 3})[1])["degraded"]:
                assert time.monotonic() < deadline, page["degraded"]
                time.sleep(0.1)
            print(name, dict(statuses), f"p95 ratio to usual {slower:.2f}", f"recovered {30 - (deadline - time.monotonic()):.1f} s after it was mended")
            assert set(statuses) <= {200, 429} and statuses[429] <= 0.02 * len(answers), name


# -- hostile clients --------------------------------------------------------------------------------------------------


def test_slow_clients_starve_nobody_and_memory_stays_flat(own: Path, tmp_path: Path) -> None:
    """300 slow bodies and 300 slow headers held open, 200 bodies of 10 MB, while honest requests go on."""
    config = settings_of(own, feature_deadline_ms=1_000.0)
    bodies = bodies_of(own, 50, np.random.default_rng(6))
    with running_service(config, log=tmp_path / "log") as service:
        host, port = service.url.removeprefix("http://").split(":")
        asyncio.run(closed_loop(service.url, bodies, 5.0, 1))
        usual = asyncio.run(closed_loop(service.url, bodies, 5.0, 1))
        worker = worker_of(service)
        memory = worker.memory_info().rss
        head = b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        held = []
        for start in [head + b"Content-Length: 100\r\n\r\n{"] * 300 + [head + b"X-Slow: "] * 300:
            connection = socket.create_connection((host, int(port)), timeout=30)
            connection.sendall(start)
            held.append(connection)
        honest = asyncio.run(closed_loop(service.url, bodies, 5.0, 1))
        assert {answer.status for answer in honest} == {200}
        for connection in held[:300]:
            assert connection.recv(30).startswith(b"HTTP/1.1 408")
        for connection in held:
            connection.close()
        refused = []
        for _ in range(200):
            connection = socket.create_connection((host, int(port)), timeout=30)
            began = time.perf_counter()
            connection.sendall(head + b"Content-Length: 10000000\r\n\r\n" + b" " * 10_000_000)
            assert connection.recv(30).startswith(b"HTTP/1.1 413")
            refused.append(time.perf_counter() - began)
            connection.close()
        assert {answer.status for answer in asyncio.run(closed_loop(service.url, bodies, 3.0, 1))} == {200}
        grown = worker.memory_info().rss - memory
    print({"honest p50 ratio": quantile(honest, 0.5) / quantile(usual, 0.5), "413 of 10 MB, p99 s": float(np.quantile(refused, 0.99)), "grown_MB": grown / 2**20})
    assert grown < 50 * 2**20


def test_hostile_bodies_are_refused_in_a_tenth_of_a_second(own: Path, tmp_path: Path) -> None:
    """The corpus of test_serving_http over and over: 4xx, quickly, and memory as before."""
    bodies = {name: text.encode() if isinstance(text, str) else text for name, text in HOSTILE.items() if len(text) < 4_000_000}
    slowest: dict[str, float] = {}
    with running_service(settings_of(own, feature_deadline_ms=1_000.0), log=tmp_path / "log") as service:

        async def ask_all(rounds: int) -> list[tuple[str, int, float]]:
            client, found = Client(service.url), []
            for name in [*bodies] * rounds:
                began = time.perf_counter()
                status, _ = await client.post("/v1/rank", bodies[name])
                found.append((name, status, time.perf_counter() - began))
            client.close()
            return found

        asyncio.run(ask_all(3))
        worker = worker_of(service)
        memory = worker.memory_info().rss
        found = asyncio.run(ask_all(20))
        grown = worker.memory_info().rss - memory
        assert {status for _, status, _ in found} <= {400, 413, 422}
        for name in bodies:
            slowest[name] = float(np.median([seconds for asked, _, seconds in found if asked == name]))
    worst = max(slowest, key=lambda name: slowest[name])
    print({"bodies": len(bodies), "slowest": worst, "median_ms": 1e3 * slowest[worst], "grown_MB": grown / 2**20})
    assert slowest[worst] < 0.1 and grown < 50 * 2**20


def test_schemathesis_finds_no_server_error(own: Path, tmp_path: Path) -> None:
    """Requests drawn from the OpenAPI file, valid and not: no 5xx, and every answer has a documented status, type and shape."""
    if shutil.which("schemathesis", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("schemathesis is not installed (pip install -e '.[dev]')")
    config = settings_of(own, feature_deadline_ms=1_000.0)
    document = Path(__file__).parents[2] / "docs" / "openapi.json"
    with running_service(replace(config, arms=(Arm(name="control", policy="bootstrap", share=1.0), Arm(name="ega", policy="model"))), log=tmp_path / "log") as service:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [
            str(Path(sys.executable).parent / "schemathesis"), "run", str(document), "--url", service.url, "--checks", checks, "--max-examples", "300",
            "--seed", "1", "--no-color", "--generation-database", "none", "--exclude-path", "/metrics",
        ]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_PROXY": "*"}, cwd=tmp_path)
        print(found.stdout[-3000:])
        assert found.returncode == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


# -- the bento --------------------------------------------------------------------------------------------------------


def test_the_bento_serves_with_nothing_but_its_own_requirements(own: Path, tmp_path: Path) -> None:
    root, python = Path(__file__).parents[2], tmp_path / "venv" / "bin" / "python"
    environment = os.environ | {"BENTOML_HOME": str(tmp_path / "store"), "BENTOML_DO_NOT_TRACK": "True", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    (tmp_path / "store").mkdir()
    subprocess.run([sys.executable, "-m", "bentoml", "build", str(root)], check=True, env=environment, capture_output=True)
    bento = next(path.parent for path in (tmp_path / "store" / "bentos" / "ranker").glob("*/bento.yaml"))
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    installed = subprocess.run([python, "-m", "pip", "install", "-q", "-r", str(bento / "env" / "python" / "requirements.txt")], env=environment, capture_output=True, text=True)
    if installed.returncode and "connection" in installed.stderr.lower():
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr[-2000:]
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout.lower()
    assert not any(name in listed for name in ("kfp", "great", "evidently"))
    port = free_port()
    settings = save_settings(settings_of(own), tmp_path / "settings.json")
    command = [python, "-m", "bentoml", "serve", str(bento), "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment | {"EGA_SERVING": str(settings)}, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while (answer := post_or_none(f"http://127.0.0.1:{port}")) is None or answer[0] != 200:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        assert len(answer[1]["ads"]) == 5 and answer[1]["model_version"] != "bootstrap-1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def post_or_none(url: str) -> tuple[int, Any] | None:
    try:
        return post(url, "/v1/rank", BODY)
    except OSError:
        return None
