"""Starts the service as a child process, the way `bentoml serve` does it anywhere, and stops it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

from model.bundle import BundleError, signing_key
from serving.settings import SETTINGS_VARIABLE, STARTUP_ERROR_VARIABLE, ServingConfig, SettingsError, save_settings
from serving.store import placed

TARGET = "serving.service:Ranker"
_QUIET = {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1"}


class StartError(RuntimeError):
    """The service did not become ready; the text says why."""


@dataclass(frozen=True)
class Running:
    """A service that is ready."""

    url: str
    process: subprocess.Popen[bytes]
    config: ServingConfig
    models: dict[str, str]
    """Tag by place when it started."""


def resolve(config: ServingConfig) -> dict[str, str]:
    """Verified tags by place; the worker verifies them again. Raises ApprovalError if no approved, unaltered model can be served."""
    if not any(arm.policy == "model" for arm in config.arms):
        return {}
    try:
        key = signing_key(config.key_home)
    except BundleError as error:
        raise SettingsError(str(error)) from error
    return {place: entry.tag for place, entry in placed(config, key).items()}


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_service(
    config: ServingConfig, host: str = "127.0.0.1", port: int = 0, log: Path | None = None, wait_seconds: float = 180.0
) -> Iterator[Running]:
    """A ready service for the length of the block; port 0 takes a free one. `log` receives the child's output (default: stderr).

    Refuses before anything is started when the model is not approved or was altered (ApprovalError); the worker checks again.
    Raises StartError when the service does not become ready.
    """
    models = resolve(config)
    port = port or free_port(host)
    _check_port(host, port)
    if config.admin_port:
        _check_port(config.admin_host, config.admin_port)
    folder = config.home / "serving"
    settings = save_settings(config, folder / f"settings-{port}.json")
    complaint = folder / f"startup-error-{port}.txt"
    complaint.unlink(missing_ok=True)
    environment = os.environ | _QUIET | {SETTINGS_VARIABLE: str(settings.absolute()), STARTUP_ERROR_VARIABLE: str(complaint.absolute())}
    environment["BENTOML_HOME"] = str((config.home / "bentoml").absolute())
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "bentoml", "serve", TARGET, "--working-dir", str(root), "--host", host, "--port", str(port)]
    output = open(log, "ab") if log else None  # noqa: SIM115 - closed below, after the child
    try:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output or sys.stderr, stderr=output or sys.stderr, start_new_session=True)
        try:
            url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104 - compared, not bound
            _wait_ready(url, process, complaint, wait_seconds)
            yield Running(url, process, config, models)
        finally:
            stop(process)
    finally:
        if output:
            output.close()
        settings.unlink(missing_ok=True)
        complaint.unlink(missing_ok=True)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port or stop what uses it") from error


def _wait_ready(url: str, process: subprocess.Popen[bytes], complaint: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    opener = build_opener(ProxyHandler({}))
    while time.monotonic() < deadline:
        if complaint.exists():
            raise StartError(f"the service refused to start: {complaint.read_text().strip()}")
        if process.poll() is not None:
            raise StartError(f"the service ended with exit code {process.returncode} before it was ready; its output says why")
        try:
            with opener.open(f"{url}/readyz", timeout=2.0) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            pass
        time.sleep(0.1)
    raise StartError(f"the service was not ready within {wait_seconds:g} s")


def stop(process: subprocess.Popen[bytes], patience_seconds: float = 15.0) -> None:
    """SIGTERM, so that requests in flight end; after the patience SIGKILL to the child and its workers."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience_seconds)
        except BaseException as error:  # too slow, or the user insists: nothing of ours may live on
            kill(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the child and its workers, which are in process groups of their own."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for worker in family:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(family)
