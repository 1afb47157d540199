"""`ega submit`: the training pipeline on a Kubeflow Pipelines backend, with the same arguments as a local run."""

from __future__ import annotations

import socket
import warnings
from datetime import datetime
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

CONNECT_SECONDS = 5.0
"""Longest wait for the endpoint to take a connection."""


class SubmitError(RuntimeError):
    """The run was not submitted; the text says why."""


def submit(host: str, config_path: Path, logs: str, run_id: str | None = None) -> int:
    """Submit a run; returns 0 once the backend took it, raises SubmitError or ConfigError otherwise.

    Args:
        host: endpoint of Kubeflow Pipelines, e.g. http://localhost:8080 behind `kubectl port-forward`.
        config_path: YAML of a named run; its world is not used, as a cluster trains on logs that exist.
        logs: folder of logs as the steps see it, below the mount of the cluster's volume.
        run_id: name of the run and of its folder; default: configuration and time.
    """
    _reach(host)
    from pipelines.arguments import pipeline_arguments
    from pipelines.config import load_run_config
    from pipelines.train_and_approve import MOUNT, SECRET, VOLUME

    config = load_run_config(config_path)
    mount, folder = PurePosixPath(MOUNT), PurePosixPath(logs)
    if not folder.is_relative_to(mount) or ".." in folder.parts:
        raise SubmitError(f"--logs {logs} must lie below {MOUNT}, where the steps see the volume {VOLUME}, e.g. {MOUNT}/logs")
    name = run_id or f"{config.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise SubmitError(f"run id {name!r}: letters, digits, '-', '_' and '.' only")
    identity = _create(host, name, pipeline_arguments(config, folder, mount / "runs" / name, mount / "home" / config.name))
    print(f"submitted {name} as {identity}; it needs the volume claim {VOLUME} and the secret {SECRET} (deploy/README.md)")
    print(f"watch it at {host.rstrip('/')}/#/runs/details/{identity}")
    return 0


def _reach(host: str) -> None:
    """Fail within seconds, and with one line, where the client would retry for minutes."""
    try:
        parts = urlsplit(host if "://" in host else f"https://{host}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an http address")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise SubmitError(f"--host {host}: {error}; give the endpoint of Kubeflow Pipelines, e.g. http://localhost:8080") from error
    try:
        socket.create_connection((parts.hostname, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise SubmitError(
            f"no Kubeflow Pipelines at {host} ({error}); is the endpoint right and reachable? On a cluster: kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80"
        ) from error


def _create(host: str, name: str, arguments: dict[str, object]) -> str:
    """Compile, send, return the backend's id of the run."""
    import tempfile

    import urllib3
    from kfp import Client
    from kfp_server_api import ApiException

    from pipelines.compile import compile_all

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package, _ = compile_all(Path(folder))
        try:
            client = Client(host=host)
            experiment = client.create_experiment("ega")
            run = client.run_pipeline(experiment.experiment_id, name, str(package), arguments)
        except ApiException as error:
            raise SubmitError(f"{host} refused the run: HTTP {error.status} {error.reason}; is it the endpoint of Kubeflow Pipelines 2?") from error
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise SubmitError(f"{host} did not take the run: {error}") from error
    return str(run.run_id)
