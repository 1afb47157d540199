"""`ega models`: which model serves. Through the admin port of a running service, or, when none runs, in the store for its next start."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from cli.run import REJECTED, ega_home
from model.bundle import signing_key
from pipelines.config import load_run_config
from serving.settings import ADMIN_TOKEN_VARIABLE, ServingConfig
from serving.store import NO_MODEL, ApprovalError, approve_bundle, decide, decisions, previous_tag

_PATIENCE_SECONDS = 300.0


class NotRunning(Exception):
    """No service answers on an admin port of this home."""


def _home(config: Path) -> Path:
    return ega_home() / load_run_config(config).name


def _service(home: Path, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask the running service; raises NotRunning, or ApprovalError with the reason of a refusal."""
    file = home / "serving" / "admin.json"
    if not file.exists():
        raise NotRunning
    url = json.loads(file.read_text())["url"]
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get(ADMIN_TOKEN_VARIABLE):
        headers["Authorization"] = f"Bearer {token}"
    request = Request(url + path, None if body is None else json.dumps(body).encode(), headers, method=method)  # noqa: S310 - our own file names it
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=_PATIENCE_SECONDS) as answer:
            return dict(json.loads(answer.read()))
    except HTTPError as error:
        raise ApprovalError(f"{json.loads(error.read())['error']['message']} (the service at {url})") from error
    except URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):  # a service that was killed left its address behind
            raise NotRunning from error
        raise OSError(f"the service at {url} does not answer: {error.reason}") from error


def list_models(config: Path, as_json: bool) -> int:
    """Print the approved models; exit code 1 if one of them must not be served."""
    from serving.live import describe

    home = _home(config)
    try:
        rows, source = _service(home, "GET", "/v1/models")["models"], "as served now"
    except NotRunning:
        key = signing_key(home.parent)
        decided = {decision.place: decision.tag.partition(":")[2] for decision in decisions(home, key)}
        rows, source = describe(ServingConfig(home=home), key, decided), "no service runs: as decided for the next start"
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"no approved model in {home / 'bentoml'}; run the pipeline until its gates approve one")
    else:
        print(f"{home.name}, {source}:")
        for row in rows:
            print(f"  {row['error']}" if "error" in row else f"  {row['tag']}  approved {row['approved_at']}  prices {row['price_mode']:<9} {', '.join(row['places']) or '-'}")
    return int(any("error" in row for row in rows))


def approve(config: Path, run: Path) -> int:
    """Approve the bundle of a run; exit code 3 when its gate record does not."""
    home = _home(config)
    try:
        tag = approve_bundle(run / "bundle", run / "gate.json", home, signing_key(home.parent))
    except ApprovalError as error:
        return _refused(error)
    print(f"{tag} is approved. A running service keeps its model until: ega models activate {config} {tag}")
    return 0


def activate(config: Path, tag: str, place: str) -> int:
    """Make a model live; exit code 3 when it is refused."""
    home, tag = _home(config), NO_MODEL if tag == "none" else tag
    return _change(home, "/v1/models/activate", {"tag": tag, "place": place}, lambda key: decide(home, key, tag, place))


def rollback(config: Path, place: str) -> int:
    """Back to the model before; exit code 3 when there is none."""
    home = _home(config)
    return _change(home, "/v1/models/rollback", {"place": place}, lambda key: decide(home, key, previous_tag(home, key, place), place, rollback=True))


def _change(home: Path, path: str, body: dict[str, Any], offline: Any) -> int:
    try:
        try:
            done = _service(home, "POST", path, body)
            print(f"{done['place']}: {done['tag'] or 'none'} is live after {done['seconds']:.2f} s")
        except NotRunning:
            made = offline(signing_key(home.parent))
            print(f"{made.place}: {made.tag or 'none'} from the next start on; no service with an admin port runs on {home}")
    except ApprovalError as error:
        return _refused(error)
    return 0


def _refused(error: ApprovalError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return REJECTED
