"""The process that ranks, beside the one that speaks HTTP. Python runs one thread of a process at a time: in one process, answering ten refusals for every
page would take that turn from the pages. What crosses is what crosses HTTP, JSON there and back, over sockets that nobody else can open.

`Backend` is the side of the HTTP worker; `python -m serving.backend` the other one, a `Ranking` with all it holds and the admin port.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import Empty, LifoQueue
from typing import TYPE_CHECKING, Any

from serving import metrics
from serving.errors import Refusal, error_body
from serving.logs import configure
from serving.messages import EventsRequest, RankRequest
from serving.settings import ServingConfig, load_settings

if TYPE_CHECKING:
    from serving.admin import AdminServer
    from serving.assembly import Assembled
    from serving.ranking import Ranking

logger = logging.getLogger("ega.serving")

CALLS = 2
"""Requests in work at once."""
_LOAD_SECONDS = 600
"""To load and warm up; beyond, it is stuck."""
_PATIENCE_SECONDS = 25
"""A call that takes longer is stuck: less than the framework's own timeout, so that the process is replaced before the caller is told."""
_SEND_SECONDS = 5
"""To take a part of a request; a process that reads nothing is stuck, and two parts are tried."""
_END_SECONDS = 6.0
"""To finish and close what is open, when told to end."""
_PORT_SECONDS = 10.0
"""To wait for the admin port: a predecessor that was killed may be about to let go of it."""
_PR_SET_PDEATHSIG = 1
_READY, _FAILED, _CHANGING, _CHANGED = b"ready", b"failed:", b"changing", b"changed"


class BackendError(RuntimeError):
    """The ranking process could not load what it needs, and could not another time; the text says why."""


class BackendLost(RuntimeError):
    """The ranking process ended, or did not end loading, and did not say why: another one may come further."""


class Backend:
    """A ranking process, from its start to its end. Every connection serves one call at a time; the first one carries what is said about the process."""

    def __init__(self) -> None:
        pairs = [Pipe() for _ in range(1 + CALLS)]
        theirs = [there.fileno() for _, there in pairs]
        root = str(Path(__file__).resolve().parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        self._process = subprocess.Popen([sys.executable, "-m", "serving.backend", *map(str, theirs)], env=environment, pass_fds=theirs, stdin=subprocess.DEVNULL)
        for _, there in pairs:
            there.close()
        self._control = pairs[0][0]
        self._free: LifoQueue[Connection] = LifoQueue()
        for here, _ in pairs[1:]:
            with socket.socket(fileno=os.dup(here.fileno())) as side:  # also a full buffer is no reason to wait for ever
                for option, seconds in ((socket.SO_SNDTIMEO, _SEND_SECONDS), (socket.SO_RCVTIMEO, _PATIENCE_SECONDS)):
                    side.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))
            self._free.put(here)

    def wait_ready(self) -> None:
        """Until it has loaded and warmed up everything. Raises BackendError, BackendLost."""
        said, deadline = b"", time.monotonic() + _LOAD_SECONDS
        while said != _READY:
            try:
                if not self._control.poll(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    raise BackendLost(f"it did not become ready within {_LOAD_SECONDS} s")
                said = self._control.recv_bytes()
            except (EOFError, OSError):
                raise BackendLost(f"it ended with exit code {self._process.wait()} while it loaded") from None
            if said.startswith(_FAILED):
                raise BackendError(said.removeprefix(_FAILED).decode())

    def watch(self, changing: threading.Event) -> int:
        """Until it ends; the exit code. `changing` is set while its models change."""
        with suppress(EOFError, OSError):
            while True:
                if self._control.recv_bytes() == _CHANGING:
                    changing.set()
                else:
                    changing.clear()
        changing.clear()
        return self._process.wait()

    def call(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a request; 503 where the process ended over it or was ended because it did not answer."""
        connection = self._free.get()
        try:
            connection.send_bytes(path.encode() + b"\n" + body)
            answer = connection.recv_bytes()
            return int(answer[:3]), answer[3:]
        except (EOFError, OSError) as error:
            if isinstance(error, BlockingIOError):
                logger.error("no answer within %g s; the ranking process is stuck and will be replaced", _PATIENCE_SECONDS)
                self._process.kill()
            connection.close()  # an answer that comes after all must not be the next caller's; otherwise the process ended, and `watch` says so
            return 503, error_body("not_ready", "the service is starting again; try again")
        finally:
            self._free.put(connection)

    def close(self) -> None:
        """Let it end in order, no call may be in work; kill it where it does not."""
        with suppress(Empty):
            for _ in range(CALLS):
                self._free.get(timeout=_END_SECONDS / CALLS).close()
        with suppress(OSError):
            self._control.send_bytes(b"end")
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("the ranking process did not end within %g s and is killed; what it answered is on record", _END_SECONDS)
            self._process.kill()
            self._process.wait()


def end_with_parent(number: int) -> None:
    """Ask Linux for a signal when the process that started this one dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


# -- the other side ---------------------------------------------------------------------------------------------------


def main(control: Connection, calls: list[Connection]) -> None:
    """Load, say so, and answer until told to end or until the HTTP worker is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the worker says when
    end_with_parent(signal.SIGKILL)  # an orphan would hold the admin port that its successor needs; what it answered is on record
    config = load_settings()
    configure(config.log_format)
    try:
        assembled, admin = _start(config, control)
    except Exception as error:
        logger.exception("the service cannot start and stays not ready")
        with suppress(OSError):
            control.send_bytes(_FAILED + str(error).encode())
        os._exit(1)  # threads of what did start would keep it here
    threads = [threading.Thread(target=_serve, args=(call, assembled.ranking), name="calls", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    with suppress(EOFError, OSError):
        control.send_bytes(_READY)
        control.recv_bytes()
    for thread in threads:  # each ends when the worker has closed its connection
        thread.join(_END_SECONDS / 2)
    if admin is not None:
        admin.stop()
    assembled.close()


def _start(config: ServingConfig, control: Connection) -> tuple[Assembled, AdminServer | None]:
    from serving.assembly import assemble  # torch and Feast: seconds

    assembled = assemble(config)
    assembled.ranking.warm_up()
    assembled.feed.start()
    if not config.admin_port or assembled.models is None:
        return assembled, None

    def tell(under_way: bool) -> None:
        with suppress(OSError):
            control.send_bytes(_CHANGING if under_way else _CHANGED)

    assembled.models.tell = tell
    admin = _admin_server(config, assembled)
    admin.start()
    return assembled, admin


def _admin_server(config: ServingConfig, assembled: Assembled) -> AdminServer:
    from serving.admin import AdminServer

    assert assembled.models is not None
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            return AdminServer(config, assembled.models)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _serve(connection: Connection, ranking: Ranking) -> None:
    work: dict[str, Callable[[bytes], Any]] = {
        "rank": lambda body: ranking.rank(RankRequest.model_validate_json(body)),
        "events": lambda body: ranking.events(EventsRequest.model_validate_json(body)).model_dump(mode="json", exclude_none=True),
    }
    with suppress(EOFError, OSError):
        while True:
            path, _, body = connection.recv_bytes().partition(b"\n")
            connection.send_bytes(_answer(work[path.decode()], body))


def _answer(work: Callable[[bytes], Any], body: bytes) -> bytes:
    """Three digits of status, then the body."""
    try:
        return b"200" + json.dumps(work(body), allow_nan=False).encode()
    except Refusal as refusal:
        return str(refusal.status).encode() + error_body(refusal.code, refusal.message, refusal.field)
    except Exception:
        logger.exception("a request failed")
        return b"500" + error_body("internal_error", "an internal error; it was logged")


if __name__ == "__main__":
    metrics.forget_dead_workers()
    ours = [Connection(int(number)) for number in sys.argv[1:]]
    main(ours[0], ours[1:])
