"""`ega doctor`: what this installation and its stores look like, what is wrong, and the command that mends it."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
LEAST_FREE_GIB, ENOUGH_FREE_GIB = 1.0, 5.0
"""Below the first nothing can be trained safely; below the second a larger run may not fit. A quickstart run takes well under 1 GiB."""
PORT = 3000

Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    status: Status
    """ok; note: works, but worth knowing; broken: something will fail."""
    text: str
    """What is there."""
    mend: str = ""
    """The command, or the step, that mends it."""


def doctor(home: Path | None = None, port: int = PORT) -> int:
    """Look at everything and print it; returns 1 if something is broken, else 0.

    Args: home: EGA_HOME, default as for `ega run`; port: the one that `ega serve` takes.
    """
    from cli.run import ega_home

    home = (home or ega_home()).resolve()
    broken = notes = 0
    sections = (("environment", environment()), ("state", state(home)), ("port", iter([listening(port)])))
    for title, findings in sections:
        print(title)
        for finding in findings:
            print(f"  {finding.status:<7} {finding.text}", flush=True)
            if finding.mend:
                print(f"          -> {finding.mend}")
            broken += finding.status == "broken"
            notes += finding.status == "note"
    print(f"{broken} broken, {notes} to note" if broken or notes else "nothing is wrong")
    return int(broken > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Environment


def environment(constraints: Path = ROOT / "constraints.txt") -> Iterator[Finding]:
    """Python, the packages against what the project needs and what it was tested with, processors."""
    from importlib import metadata

    from packaging.specifiers import SpecifierSet

    mend = "make env"
    try:
        ours = metadata.metadata("ega")
    except metadata.PackageNotFoundError:
        yield Finding("broken", "the package ega is not installed in this environment", "make env, then .venv/bin/ega doctor")
        return
    version = ".".join(map(str, sys.version_info[:3]))
    needed = ours["Requires-Python"]
    good = version in SpecifierSet(needed)
    yield Finding("ok" if good else "broken", f"Python {version} (needs {needed})", "" if good else "make clean env PYTHON=python3.11")
    yield from packages(metadata.requires("ega") or [], constraints, mend)
    yield Finding("ok", f"{os.cpu_count()} processors")


def packages(requirements: list[str], constraints: Path, mend: str) -> Iterator[Finding]:
    """Directly needed packages: missing or too old is broken, another version than the tested one is worth a note."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    tested = pinned(constraints)
    count, clean = 0, True
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            clean = False
            yield Finding("broken", f"{requirement} is not installed", mend)
            continue
        exact = tested.get(canonicalize_name(requirement.name))
        if not requirement.specifier.contains(found, prereleases=True):
            clean = False
            yield Finding("broken", f"{requirement.name} {found} is installed, {requirement.specifier} is needed", mend)
        elif exact is not None and Version(found).public != exact:
            clean = False
            yield Finding("note", f"{requirement.name} {found} is installed, tested was {exact}", mend)
    if clean:
        yield Finding("ok", f"{count} packages at {'the tested versions' if tested else 'sufficient versions; constraints.txt is not here to compare with'}")


def pinned(constraints: Path) -> dict[str, str]:
    """Exact versions by canonical name; empty if there is no such file (an installed package without its source)."""
    from packaging.utils import canonicalize_name

    if not constraints.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    return {canonicalize_name(name.strip()): version.strip() for name, _, version in (line.partition("==") for line in lines if line)}


# ---------------------------------------------------------------------------------------------------------------------
# State


def state(home: Path) -> Iterator[Finding]:
    """EGA_HOME: disk, signing key, and the stores of every configuration in it."""
    place = next(folder for folder in (home, *home.parents) if folder.is_dir())
    if not os.access(place, os.W_OK):
        yield Finding("broken", f"{place} cannot be written", "set EGA_HOME to a folder of yours")
    yield disk(place)
    if not home.is_dir():
        yield Finding("note", f"{home} (EGA_HOME) does not exist yet: nothing was run here", "ega run config/quickstart.yaml")
        return
    yield signing(home)
    configurations = sorted(folder for folder in home.iterdir() if folder.is_dir())
    if not configurations:
        yield Finding("note", f"{home} holds no configuration's state", "ega run config/quickstart.yaml")
    for folder in configurations:
        yield from stores(folder)


def disk(place: Path) -> Finding:
    """Free space where state is written."""
    free = shutil.disk_usage(place).free / 2**30
    text = f"{free:.1f} GiB free at {place}"
    if free < LEAST_FREE_GIB:
        return Finding("broken", text, "free some space, or set EGA_HOME (and --runs) to another disk")
    return Finding("note", text, "old runs can be deleted: runs/<run-id>") if free < ENOUGH_FREE_GIB else Finding("ok", text)


def signing(home: Path) -> Finding:
    """The key that gate records and bundles are signed with: there, hexadecimal, and for its owner's eyes only."""
    from model.bundle import BundleError, signing_key

    path = home / "signing.key"
    if not path.exists() and not os.environ.get("EGA_SIGNING_KEY"):
        return Finding("note", f"no signing key yet ({path})", "the first `ega run` makes it; to use another one's models, copy their key or set EGA_SIGNING_KEY")
    try:
        key = signing_key(home)
    except (BundleError, ValueError, OSError) as error:
        where = "EGA_SIGNING_KEY" if os.environ.get("EGA_SIGNING_KEY") else str(path)
        return Finding("broken", f"the signing key in {where} cannot be used: {error}", "restore it from a backup; without it no approved model can be verified")
    if os.environ.get("EGA_SIGNING_KEY"):
        return Finding("ok", f"signing key of {8 * len(key)} bits from EGA_SIGNING_KEY")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding("broken", f"{path} can be read by others: they could sign models", f"chmod 600 {path}")
    return Finding("ok", f"signing key of {8 * len(key)} bits, readable by its owner only")


def stores(home: Path) -> Iterator[Finding]:
    """Feature store, approved models and event log of one configuration."""
    yield from feature_store(home)
    yield from models(home)
    yield from events(home)


def feature_store(home: Path) -> Iterator[Finding]:
    """Every view registered, and the online store readable."""
    folder = home / "feast"
    mend = f"ega run with the configuration {home.name} builds it again"
    if not folder.is_dir():
        yield Finding("note", f"{home.name}: no feature store yet", mend)
        return
    from features.store import VIEWS, check_store, open_store

    try:
        check_store(open_store(home))
        with closing(read_only(folder / "online.db")) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except Exception as error:  # noqa: BLE001 - whatever Feast or SQLite say of a broken file is the finding
        yield Finding("broken", f"{home.name}: {first_line(error)}", mend)
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    yield Finding("ok", f"{home.name}: feature store with {len(VIEWS)} views, {size:,.0f} MiB")


def models(home: Path) -> Iterator[Finding]:
    """The model that would be served: approved, signed, unaltered."""
    from model.bundle import BundleError, signing_key
    from serving.store import ApprovalError, find_live_model

    if not (home / "bentoml" / "models").is_dir():
        yield Finding("note", f"{home.name}: no approved model", f"ega run with the configuration {home.name}, until its gates approve one")
        return
    try:
        newest = find_live_model(home, signing_key(home.parent))
    except (BundleError, ApprovalError, ValueError, OSError) as error:
        yield Finding("broken", f"{home.name}: {first_line(error)}", f"nothing unverified is served; approve a model again: ega run with the configuration {home.name}")
        return
    if newest is None:
        yield Finding("note", f"{home.name}: no approved model", f"ega run with the configuration {home.name}, until its gates approve one")
    else:
        yield Finding("ok", f"{home.name}: {newest.tag} approved and verified, prices {newest.price_mode}")


def events(home: Path) -> Iterator[Finding]:
    """The live event log: readable, of this version, and how large."""
    from serving.event_log import SCHEMA_VERSION
    from serving.settings import event_log_path

    path = event_log_path(home)
    if not path.exists():
        return
    aside = f"move {path.parent} away; the next `ega serve` starts a new log"
    try:
        with closing(read_only(path)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            pages = connection.execute("SELECT count(*) FROM request").fetchone()[0]
    except sqlite3.Error as error:
        yield Finding("broken", f"{home.name}: the event log {path} cannot be read: {error}", aside)
        return
    if 0 < version < SCHEMA_VERSION:
        yield Finding("note", f"{home.name}: the event log has version {version}, this code reads {SCHEMA_VERSION}", "the next `ega serve` brings it up")
        return
    if version != SCHEMA_VERSION:
        yield Finding("broken", f"{home.name}: the event log has version {version}, this code reads {SCHEMA_VERSION}", aside)
        return
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 2**20
    yield Finding("ok", f"{home.name}: event log with {pages:,} pages, {size:,.1f} MiB")


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing and creates nothing."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=3.0)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def listening(port: int) -> Finding:
    """Whether `ega serve` would get its port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding("note", f"127.0.0.1:{port} is taken ({error.strerror}): a service may be running", "ega serve --port 0 takes a free one")
    return Finding("ok", f"127.0.0.1:{port} is free for `ega serve`")
