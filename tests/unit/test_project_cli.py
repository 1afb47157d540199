"""The outside of the project: `ega --help`, `ega doctor`, `ega submit`, and that the README's commands exist."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from cli import doctor as doctor_module
from cli.doctor import doctor, packages, pinned
from cli.main import app
from cli.submit import SubmitError, submit
from pipelines.config import load_run_config

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"run", "simulate", "convert-checkins", "compile", "submit", "serve", "models", "ab", "monitor", "bench", "results", "doctor", "replay-price", "replay-day"}
CI = ROOT / "config" / "ci.yaml"

# ---------------------------------------------------------------------------------------------------------------------
# --help


def test_help_lists_every_command_and_loads_no_heavy_library():
    script = """
import sys
sys.argv = ["ega", "--help"]
from cli.main import main
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "feast", "kfp", "bentoml", "great_expectations", "evidently", "pandas", "numpy", "pyarrow", "matplotlib"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert set(re.findall(r"^  ([a-z-]+)  ", found.stdout.partition("Commands:")[2], re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command):
    found = CliRunner().invoke(app, [command, "--help"])
    assert found.exit_code == 0 and "Usage" in found.output


def test_without_arguments_help_is_shown():
    assert "Commands:" in CliRunner().invoke(app, []).output


# ---------------------------------------------------------------------------------------------------------------------
# README and Makefile


def shown_commands() -> list[list[str]]:
    """`ega ...` and `make ...` lines of the README and the guides, as words."""
    lines = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "README.md"):
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            lines += [line.partition("#")[0].split() for line in block.splitlines()]
    return [words for words in lines if words and words[0] in ("ega", "make", ".venv/bin/ega")]


def test_commands_in_the_documents_exist():
    group = typer.main.get_command(app)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = shown_commands()
    assert any(words[0] == "make" for words in shown) and any(words[0] != "make" for words in shown)
    for program, *words in shown:
        if program == "make":
            assert {word for word in words if re.fullmatch("[a-z]+", word)} <= targets, words
            continue
        assert words[0] in group.commands, words
        options = {option for parameter in group.commands[words[0]].params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, words


def test_links_and_files_in_the_documents_exist():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
        for config in re.findall(r"config/[a-z_0-9]+\.yaml", path.read_text()):
            assert (ROOT / config).is_file(), f"{path.name} names {config}"


def test_make_knows_its_targets():
    found = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert {"env", "run", "test", "soak", "bench", "serve", "lint", "clean"} <= {line.split()[0] for line in found.stdout.splitlines() if line}


# ---------------------------------------------------------------------------------------------------------------------
# doctor


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("EGA_SIGNING_KEY", raising=False)
    return tmp_path / "home"


def test_doctor_finds_nothing_broken_before_the_first_run(home, capsys):
    assert doctor(home, port=0) == 0
    out = capsys.readouterr().out
    assert "nothing was run here" in out and "ega run config/quickstart.yaml" in out and "0 broken" in out
    assert not home.exists()


def test_doctor_wants_the_signing_key_private(home, capsys):
    home.mkdir()
    (home / "signing.key").write_text("ab" * 32)
    (home / "signing.key").chmod(0o644)
    assert doctor(home, port=0) == 1
    assert f"chmod 600 {home / 'signing.key'}" in capsys.readouterr().out
    (home / "signing.key").chmod(0o600)
    assert doctor(home, port=0) == 0
    (home / "signing.key").write_text("not hexadecimal")
    assert doctor(home, port=0) == 1
    assert "cannot be used" in capsys.readouterr().out


def test_doctor_reads_the_stores_of_every_configuration(home, capsys):
    sys.path.insert(0, str(ROOT / "tests" / "serving"))
    try:
        from serving_world import KEY, tiny_bundle
    finally:
        sys.path.pop(0)
    from features.store import apply_definitions, open_store
    from serving.event_log import EventLog
    from serving.settings import event_log_path
    from serving.store import approve_bundle, write_gate_record

    bundle, place = home.parent / "bundle", home / "tiny"
    place.mkdir(parents=True)
    (home / "signing.key").write_text(KEY.hex())
    (home / "signing.key").chmod(0o600)
    tiny_bundle(bundle)
    write_gate_record(home.parent / "gate.json", bundle, {"ic": {"approved": True, "reason": "fine"}}, KEY)
    tag = approve_bundle(bundle, home.parent / "gate.json", place, KEY)
    store = open_store(place)
    apply_definitions(store)
    EventLog(event_log_path(place)).close()
    assert doctor(home, port=0) == 0
    out = capsys.readouterr().out
    assert f"tiny: {tag} approved and verified" in out and "feature store with 5 views" in out and "event log with 0 pages" in out
    with sqlite3.connect(event_log_path(place)) as connection:
        connection.execute("PRAGMA user_version = 3")
    assert doctor(home, port=0) == 0
    assert "the next `ega serve` brings it up" in capsys.readouterr().out

    weights = place / "bentoml" / "models" / "ega-v1" / tag.split(":")[1] / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with sqlite3.connect(event_log_path(place)) as connection:
        connection.execute("PRAGMA user_version = 99")
    shutil.rmtree(place / "feast")
    (place / "feast").mkdir()
    assert doctor(home, port=0) == 1
    out = capsys.readouterr().out
    assert "not the file that was signed" in out and "version 99" in out and "lacks the views" in out and "3 broken" in out


def test_doctor_notes_a_taken_port(home, capsys):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        assert doctor(home, port=taken.server_port) == 0
    assert "is taken" in capsys.readouterr().out


def test_doctor_says_when_the_disk_is_nearly_full(home, monkeypatch):
    monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 100, 2**28))
    assert doctor(home, port=0) == 1


def test_packages_that_are_missing_old_or_untested_are_told_apart(tmp_path):
    (tmp_path / "constraints.txt").write_text("# comment\nnumpy==0.1  # why\npydantic==1\n")
    assert pinned(tmp_path / "constraints.txt") == {"numpy": "0.1", "pydantic": "1"}
    found = list(packages(["numpy>=1", "torch>=999", "no-such-package", "absent; extra == 'dev'"], tmp_path / "constraints.txt", "make env"))
    assert [finding.status for finding in found] == ["note", "broken", "broken"]
    assert "tested was 0.1" in found[0].text and ">=999 is needed" in found[1].text and "no-such-package is not installed" in found[2].text
    assert {finding.mend for finding in found} == {"make env"}


# ---------------------------------------------------------------------------------------------------------------------
# submit


class Backend(BaseHTTPRequestHandler):
    """As much of the Kubeflow Pipelines API as submitting takes."""

    received: list[tuple[str, dict]] = []

    def do_GET(self):
        if "healthz" in self.path:
            self._answer({"multi_user": False})
        else:
            self._answer({"experiments": []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append((self.path, body))
        self._answer({"experiment_id": "e1"} if "experiments" in self.path else {"run_id": "r1"})

    def _answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def backend(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    Backend.received = []
    server = HTTPServer(("127.0.0.1", 0), Backend)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_submit_sends_the_pipeline_with_the_runs_arguments(backend, capsys):
    assert submit(backend, CI, "/ega/logs/june", "try-1") == 0
    assert "submitted try-1 as r1" in capsys.readouterr().out
    path, run = Backend.received[-1]
    assert path.startswith("/apis/v2beta1/runs") and run["display_name"] == "try-1"
    parameters = run["runtime_config"]["parameters"]
    assert parameters["logs"] == "/ega/logs/june" and parameters["run_dir"] == "/ega/runs/try-1" and parameters["home"] == "/ega/home/ci"
    assert parameters["behaviours"] == load_run_config(CI).features.behaviours and parameters["fresh"] is False and json.loads(parameters["model"])["width"] == load_run_config(CI).model.width
    spec = run["pipeline_spec"]
    assert spec["pipeline_spec"]["pipelineInfo"]["name"] == "train-and-approve" and "kubernetes" in spec["platform_spec"]["platforms"]


@pytest.mark.parametrize(("logs", "run_id", "message"), [
    ("/data/logs", None, "must lie below /ega"), ("/ega/../etc", None, "must lie below /ega"), ("logs", None, "must lie below /ega"), ("/ega/logs", "a/b", "run id"),
])  # fmt: skip
def test_submit_refuses_what_the_cluster_cannot_see(backend, logs, run_id, message):
    with pytest.raises(SubmitError, match=message):
        submit(backend, CI, logs, run_id)
    assert not Backend.received


@pytest.mark.parametrize(("host", "message"), [("http://127.0.0.1:1", "no Kubeflow Pipelines at"), ("ftp://x", "not an http address"), ("http://127.0.0.1:port", "--host")])
def test_submit_names_an_endpoint_that_cannot_be_reached(host, message):
    with pytest.raises(SubmitError, match=message):
        submit(host, CI, "/ega/logs")


def test_submit_through_the_command_line_is_one_line_and_exit_code_1():
    found = subprocess.run(
        [sys.executable, "-m", "cli.main", "submit", "--host", "http://127.0.0.1:1", "--logs", "/ega/logs", str(CI)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 1 and found.stderr.startswith("error: no Kubeflow Pipelines") and found.stderr.count("\n") == 1
