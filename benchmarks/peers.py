"""Training and scoring speed of our SASRec and DIN beside a peer library's: `ega bench peers --peer-python PATH`.

The peer is RecBole (Zhao et al., CIKM 2021). It runs in a process of its own with a Python of its own (its pins do not fit ours), is commanded line
by line, and waits while we work. Chunks of steps of ours and theirs alternate, so what else the machine does falls on both; a ratio is of two chunks
that follow each other. Shape letters: B rows, L items of a history, N candidates, I items, D width.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.anchors import find_data
from benchmarks.sequential import Interactions, Sizes, draw_negatives, read_interactions, training_length
from model.cascade.din import Din
from model.cascade.sasrec import SasRec

PROGRAM = Path(__file__).with_name("peer_recbole.py")
HOW_TO = (
    "make one with\n  python3.11 -m venv .peers && .peers/bin/pip install -r benchmarks/peers.txt\n"
    "and run: ega bench peers --peer-python .peers/bin/python   (docs/measuring.md)"
)


class PeerError(RuntimeError):
    """The peer's process cannot do what it was asked to; the text says why."""


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes and training, the same on both sides. D is also the width of SASRec's feed-forward layers, of DIN's activation unit and of the layer after it;
    every batch is padded to L, and only SASRec drops out."""

    batch: int = 512
    """B, rows of a training step: (history, next item); of DIN half of them with a drawn item and label 0."""
    candidates: int = 100
    """Drawn items that DIN scores beside the held-out one."""
    scoring_users: int = 256
    """Histories scored at once by SASRec, against all items."""
    din_scoring_users: int = 32
    """Histories scored at once by DIN, each against its candidates."""
    prepared: int = 12
    """Training batches made before the clock runs; steps go round them."""
    prepared_scoring: int = 4
    """Batches to be scored, likewise."""
    rounds: int = 15
    """Pairs of chunks."""
    chunk_seconds: float = 1.0
    """Length of a chunk on the slower side, about."""


class OurDin(nn.Module):
    """Our DIN over item codes, with one linear layer as head: the layers of RecBole's with mlp_hidden_size [D]."""

    def __init__(self, items: int, settings: Settings) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, settings.width, padding_idx=0)
        self.din = Din(settings.width, (settings.width,))
        self.head = nn.Linear(settings.width, 1)
        self.register_buffer("user", torch.zeros(1, settings.width))  # RecBole's reads no user feature either

    def forward(self, history_BL: Tensor, items_BN: Tensor) -> Tensor:
        """Logits [B, N]."""
        h = self.din(self.item(items_BN), torch.ones_like(items_BN, dtype=torch.bool), self.item(history_BL), history_BL != 0, self.user)
        return self.head(h).squeeze(-1)


class Ours:
    """One of our models with its prepared batches; the same three measurements as the peer's program."""

    def __init__(self, model: str, data: Interactions, settings: Settings, seed: int) -> None:
        torch.manual_seed(seed)
        self.name, self.data, self.settings, self.rng = model, data, settings, np.random.default_rng(seed)
        length = np.maximum(training_length(data) - 1, 0)
        self.user = np.repeat(np.arange(data.users), length)
        self.end = np.arange(len(self.user)) - np.repeat(np.cumsum(length) - length, length) + data.start[self.user] + 1
        """Row of the item that follows each training history."""
        self.network: SasRec | OurDin = (
            SasRec(data.count + 1, settings.width, settings.blocks, settings.heads, settings.length, settings.dropout) if model == "SASRec" else OurDin(data.count, settings)
        )
        self.optimiser = torch.optim.Adam(self.network.parameters(), settings.learning_rate)
        self.turn = cycle([self.batch() for _ in range(settings.prepared)])
        self.scoring_turn = cycle(self._asked())

    def batch(self) -> tuple[Tensor, ...]:
        """Histories [B, L], next items [B], and for DIN labels [B]."""
        positives = self.settings.batch if self.name == "SASRec" else self.settings.batch // 2
        rows = self.rng.choice(len(self.user), min(positives, len(self.user)), replace=False)
        at = self.end[rows, None] + np.arange(-self.settings.length, 0)
        histories = np.where(at >= self.data.start[self.user[rows], None], self.data.items[at.clip(min=0)], 0)
        target = self.data.items[self.end[rows]]
        if self.name == "SASRec":
            return torch.from_numpy(histories), torch.from_numpy(target)
        drawn = draw_negatives(self.data, self.user[rows], self.rng, 1)[:, 0]
        labels = np.repeat([1.0, 0.0], len(rows)).astype(np.float32)
        return torch.from_numpy(np.concatenate([histories, histories])), torch.from_numpy(np.concatenate([target, drawn])), torch.from_numpy(labels)

    def _asked(self) -> list[tuple[Tensor, Tensor]]:
        users = np.flatnonzero(self.data.length >= 3)
        count = self.settings.scoring_users if self.name == "SASRec" else self.settings.din_scoring_users
        parts = [users[start : start + count] for start in range(0, len(users), count)][: self.settings.prepared_scoring]
        negatives = [draw_negatives(self.data, part, self.rng, self.settings.candidates) for part in parts]
        return [
            (torch.from_numpy(self.data.before(part, 1, self.settings.length)), torch.from_numpy(np.concatenate([self.data.held(part, 1)[:, None], drawn], 1)))
            for part, drawn in zip(parts, negatives, strict=True)
        ]

    def step(self, batch: tuple[Tensor, ...]) -> float:
        """One optimiser step on the loss that the peer has: cross-entropy over all items (SASRec), log-loss (DIN)."""
        self.optimiser.zero_grad()
        if isinstance(self.network, SasRec):
            loss = F.cross_entropy(self.network.scores(self.network.newest(batch[0])), batch[1])
        else:
            loss = F.binary_cross_entropy_with_logits(self.network(batch[0], batch[1].unsqueeze(1))[:, 0], batch[2])
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def train(self, steps: int) -> dict[str, Any]:
        """Optimiser steps on prepared batches."""
        self.network.train()
        started = time.perf_counter()
        losses = [self.step(batch) for batch in islice(self.turn, steps)]
        return {"seconds": time.perf_counter() - started, "count": steps, "loss": losses[-1]}

    def load(self, steps: int) -> dict[str, Any]:
        """Batches made."""
        started = time.perf_counter()
        for _ in range(steps):
            self.batch()
        return {"seconds": time.perf_counter() - started, "count": steps}

    @torch.inference_mode()
    def score(self, steps: int) -> dict[str, Any]:
        """Scores of all items (SASRec), or of the held-out item and its negatives (DIN); counts histories."""
        self.network.eval()
        users, started = 0, time.perf_counter()
        for histories, items in islice(self.scoring_turn, steps):
            if isinstance(self.network, SasRec):
                self.network.scores(self.network.newest(histories))
            else:
                self.network(histories, items)
            users += len(histories)
        return {"seconds": time.perf_counter() - started, "count": users}

    def describe(self) -> dict[str, Any]:
        """What both sides must agree on, as the peer says it."""
        return {"parameters": sum(parameter.numel() for parameter in self.network.parameters()), "items": self.data.count, "samples": len(self.user)}


class Peer:
    """The peer's process: one JSON object a line, there and back."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises PeerError where the peer says that it failed, or ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            said = self.log.read_text(errors="replace").strip().splitlines()[-8:]
            raise PeerError("\n".join([f"the peer's process ended or answered no JSON to {request['do']!r} ({line.strip()[:200]!r}); it said:", *said])) from None
        if "No module named" in str(answer.get("error")):
            raise PeerError(f"{self.process.args[0]} cannot run the peer library ({answer['error']}); {HOW_TO}")  # type: ignore[index]
        if "error" in answer:
            raise PeerError(f"the peer failed at {request['do']!r}: {answer['error']}")
        return answer


@contextmanager
def running_peer(python: Path | None, folder: Path) -> Iterator[Peer]:
    """The peer's program under the interpreter `python`, for the length of the block."""
    if python is None:
        raise ValueError(f"benchmark peers needs the Python in which the peer library is installed; {HOW_TO}")
    if not python.is_file():
        raise FileNotFoundError(f"--peer-python {python} is no file; {HOW_TO}")
    log: IO[str]
    with open(folder / "peer.log", "w") as log:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | {"OMP_WAIT_POLICY": "PASSIVE"}
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own interpreter
                [str(python.absolute()), str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder
            )
        except OSError as error:
            raise PeerError(f"--peer-python {python} cannot be started ({error.strerror}); {HOW_TO}") from error
        try:
            yield Peer(process, folder / "peer.log")
        finally:
            process.kill()
            process.communicate()


def atomic_files(data: Interactions, folder: Path) -> None:
    """RecBole's format: <folder>/interactions/interactions.inter, time being the place in the user's history."""
    import pandas as pd

    (folder / "interactions").mkdir(parents=True)
    user = np.repeat(np.arange(data.users), data.length)
    frame = pd.DataFrame({"user_id:token": user, "item_id:token": data.items, "timestamp:float": np.arange(len(user)) - data.start[user]})
    frame.to_csv(folder / "interactions" / "interactions.inter", sep="\t", index=False)


LEAST = 4
"""Items a user needs for both sides to train on the same positions: of three, RecBole holds out one and our protocol two."""


def shared_users(data: Interactions) -> Interactions:
    """The users with at least `LEAST` items, items numbered anew."""
    kept = data.length >= LEAST
    if not kept.any():
        raise ValueError(f"no user has {LEAST} items or more: nothing to train on but what is held out")
    names, codes = np.unique(data.items[np.repeat(kept, data.length)], return_inverse=True)
    return Interactions(codes.astype(np.int64) + 1, np.concatenate([[0], np.cumsum(data.length[kept])]), len(names))


def drawn_interactions(seed: int, users: int = 200, items: int = 150) -> Interactions:
    """Histories of 5 to 30 items by popularity, each item at most once: for --quick."""
    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, items + 1)
    histories = [rng.choice(items, rng.integers(5, 31), replace=False, p=weight / weight.sum()) for _ in range(users)]
    names, codes = np.unique(np.concatenate(histories), return_inverse=True)
    return Interactions(codes.astype(np.int64) + 1, np.concatenate([[0], np.cumsum([len(history) for history in histories])]), len(names))


MEASURED = {"train": "training steps", "load": "batches made", "score": "histories scored"}


def paired_rates(ours: Ours, peer: Peer, what: str, settings: Settings) -> tuple[list[float], list[float]]:
    """Rates per second of both sides, chunk by chunk in turn; after a chunk each to warm up and to find its length."""

    def mine(steps: int) -> float:
        found = getattr(ours, what)(steps)
        return float(found["count"] / found["seconds"])

    def theirs(steps: int) -> float:
        found = peer.ask(do=what, model=ours.name, steps=steps)
        return float(found["count"] / found["seconds"])

    mine(2), theirs(2)
    started = time.perf_counter()
    mine(2)
    between = time.perf_counter()
    theirs(2)
    slower = max(between - started, time.perf_counter() - between) / 2
    steps = min(max(2, round(settings.chunk_seconds / slower)), 200)
    rates: tuple[list[float], list[float]] = ([], [])
    for number in tqdm(range(settings.rounds), desc=f"{ours.name}, {MEASURED[what]}", unit="pair", leave=False):
        for side in (0, 1) if number % 2 else (1, 0):
            rates[side].append((mine, theirs)[side](steps))
    return rates


def summary(model: str, what: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """A row: medians of the rates, and the median of the paired ratios with its 95 % interval (order statistics) and the middle half."""
    ratio = np.sort(np.array(ours) / np.array(theirs))
    low, high = median_interval(len(ratio))
    quartiles = np.quantile(ratio, [0.25, 0.75])
    return {
        "model": model, "per second": MEASURED[what], "ours": float(np.median(ours)), "RecBole": float(np.median(theirs)), "ratio, median of pairs": float(np.median(ratio)),
        "95 % interval": f"{ratio[low]:.2f} to {ratio[high]:.2f}", "middle half": f"{quartiles[0]:.2f} to {quartiles[1]:.2f}", "pairs": len(ratio),
    }  # fmt: skip


def median_interval(count: int) -> tuple[int, int]:
    """Ranks, from 0, of the ordered values that hold the median with at least 95 % (binomial); the extremes where there are too few."""
    tail, rank = 0.5**count, 0
    while rank + 1 < count // 2 and tail + math.comb(count, rank + 1) * 0.5**count <= 0.025:
        rank += 1
        tail += math.comb(count, rank) * 0.5**count
    return rank, count - 1 - rank


QUICK = replace(Settings(), width=8, blocks=1, length=10, batch=32, scoring_users=16, din_scoring_users=8, candidates=10, prepared=2, prepared_scoring=2, rounds=3, chunk_seconds=0.01)


def peers(peer_python: Path | None = None, data: Path | None = None, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Steps per second of our SASRec and DIN over RecBole's, paired in one run, on the same interactions, sizes, loss, optimiser and threads."""
    from pipelines.version import code_version

    settings, started = QUICK if quick else Settings(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ega-peers-") as name, running_peer(peer_python, Path(name)) as peer:
        interactions = shared_users(drawn_interactions(seed) if quick and data is None else read_interactions(find_data("peers", data)))
        atomic_files(interactions, Path(name))
        rows, sides, versions = [], {}, {}
        for model in ("SASRec", "DIN"):
            ours = Ours(model, interactions, settings, seed)
            wanted = {**asdict(settings), "threads": torch.get_num_threads(), "seed": seed}
            wanted["scoring_users"] = settings.scoring_users if model == "SASRec" else settings.din_scoring_users
            theirs = peer.ask(do="prepare", model=model, folder=name, settings=wanted)
            versions = theirs.pop("versions")
            sides[model] = {"ours": ours.describe(), "RecBole": theirs}
            for side in ("items", "samples"):
                if theirs[side] != ours.describe()[side]:
                    raise ValueError(f"the two sides read different data: {side} {ours.describe()[side]} here, {theirs[side]} at the peer")
            rows += [summary(model, what, *paired_rates(ours, peer, what, settings)) for what in MEASURED]
    return {
        "users": interactions.users, "items": interactions.count, "interactions": len(interactions.items), "seed": seed, "threads": torch.get_num_threads(), "settings": asdict(settings),
        "sides": sides, "versions": {"ours": {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}, "RecBole": versions},
        "code_version": code_version(), "minutes": (time.perf_counter() - started) / 60, "table": rows,
    }  # fmt: skip
