"""Next-item ranking on public interaction files: `ega bench sequential --data DIR`.

Protocol of Kang & McAuley (2018): a user's last item is the test, the one before the validation, all earlier ones are for training.
Shape letters: U users, I items, B sequences, L items of a sequence, T training positions, S shared negatives, N candidates, D width.
Item codes are 1..I; 0 is padding. Sequences are right-aligned, oldest first.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from model.cascade.sasrec import SasRec
from model.ega_v1.network import NetworkConfig, RecFormer
from model.layers import SplitHead

NEGATIVES = 100
"""Items drawn uniformly, without the user's own, that the held-out item is ranked against."""
CUT = 10
"""HR and NDCG count the first 10."""


@dataclass(frozen=True)
class Interactions:
    """Item codes of every user in time order, one after another: user u has items[start[u]:start[u + 1]]."""

    items: np.ndarray
    start: np.ndarray
    count: int
    """I, distinct items."""

    @property
    def users(self) -> int:
        return len(self.start) - 1

    @property
    def length(self) -> np.ndarray:
        return np.diff(self.start)

    def before(self, users: np.ndarray, held_out: int, length: int) -> np.ndarray:
        """The last `length` items of each user before the last `held_out`, right-aligned, [U, length]."""
        end = self.start[users + 1] - held_out
        at = end[:, None] + np.arange(-length, 0)
        return np.where(at >= self.start[users][:, None], self.items[at.clip(min=0)], 0)

    def held(self, users: np.ndarray, held_out: int) -> np.ndarray:
        """The item that stands `held_out` places from the end (1: the last), [U]."""
        return self.items[self.start[users + 1] - held_out]


def read_interactions(data: Path) -> Interactions:
    """A file of `user item` lines in time order (plain or .gz), or a folder with one as interactions.txt(.gz)."""
    path = data
    if data.is_dir():
        found = [data / name for name in ("interactions.txt.gz", "interactions.txt") if (data / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{data} holds no interactions.txt.gz (lines `user item` in time order); name such a folder or file with --data")
        path = found[0]
    elif not data.is_file():
        raise FileNotFoundError(f"{data} is neither a file nor a folder; --data names the folder that holds interactions.txt.gz")
    table = pd.read_csv(path, sep=r"\s+", header=None, dtype=str, comment="#")
    if table.shape[1] != 2 or bool(table.isna().any(axis=None)):
        raise ValueError(f"{path}: every line must be `user item`, separated by white space; found {table.shape[1]} columns")
    user, _ = pd.factorize(table[0])
    item, names = pd.factorize(table[1])
    order = np.argsort(user, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(user))])
    return Interactions((item + 1)[order].astype(np.int64), start, len(names))


def draw_negatives(data: Interactions, users: np.ndarray, rng: np.random.Generator, count: int = NEGATIVES) -> np.ndarray:
    """`count` items for each user, uniform over those the user never touched, with replacement; [U, count]."""
    own = np.unique(np.repeat(np.arange(data.users), data.length) * (data.count + 1) + data.items)
    if int(data.length.max()) >= data.count:
        raise ValueError("a user touched every item; nothing is left to rank the held-out one against")
    drawn = rng.integers(1, data.count + 1, (len(users), count))
    while True:
        key = users[:, None] * (data.count + 1) + drawn
        at = np.searchsorted(own, key).clip(max=len(own) - 1)
        again = own[at] == key
        if not again.any():
            return drawn
        drawn[again] = rng.integers(1, data.count + 1, int(again.sum()))


def ranks(scores_BN: np.ndarray, target_B: np.ndarray) -> np.ndarray:
    """How many of the others score at least as high: a tie falls against the target."""
    return np.count_nonzero(scores_BN >= target_B[:, None], axis=1)


def gains(rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HR@10 and NDCG@10 of each user from ranks that start at 0."""
    hit = rank < CUT
    return hit.astype(np.float64), np.where(hit, 1.0 / np.log2(rank + 2.0), 0.0)


@dataclass(frozen=True)
class Settings:
    """Sizes and training of both models."""

    width: int = 64
    """D."""
    blocks: int = 2
    """Transformer blocks; RecFormer's m."""
    heads: int = 2
    """H."""
    length: int = 50
    """L, newest items of a history."""
    dropout: float = 0.5
    """On tokens, attention weights and sub-layers."""
    negatives: int = 512
    """S, uniform negatives that all positions of a batch share."""
    tokens: int = 2048
    """Training positions in a batch of SASRec, about."""
    learning_rate: float = 1e-3
    """Adam's."""
    epochs: int = 100
    """At most."""
    patience: int = 5
    """Validations without a better NDCG@10 before training stops."""
    every: int = 2
    """Epochs between validations."""
    prefixes: int = 32_768
    """Training positions in an epoch of EGA-V1's encoder, each with its own history."""
    batch: int = 128
    """Of them, in a batch."""
    candidates: int = 256
    """Uniform negatives that a batch of EGA-V1's encoder shares."""
    validation_users: int = 5000
    """Users of a validation."""


def sampled_softmax(positive_T: Tensor, negative_TS: Tensor, same_TS: Tensor, items: int) -> Tensor:
    """Cross-entropy of the next item against S uniform ones that stand for all I (log-Q corrected); mean over T."""
    shift = math.log(max(items - 1, 1) / negative_TS.shape[1])
    negative = (negative_TS + shift).masked_fill(same_TS, float("-inf"))
    return -torch.log_softmax(torch.cat([positive_T.unsqueeze(1), negative], 1), 1)[:, 0].mean()


def batches_by_length(length: np.ndarray, tokens: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows in batches of about `tokens` real positions and of like length, so that little of a batch is padding."""
    order = np.lexsort([rng.random(len(length)), length])
    order = order[length[order] > 0]
    chunk = np.cumsum(length[order]) // tokens
    parts = np.split(order, np.flatnonzero(np.diff(chunk)) + 1)
    for number in rng.permutation(len(parts)):
        yield parts[number]


class SasRecRanker:
    """SASRec with its training batches and its scores."""

    name = "SASRec"

    def __init__(self, data: Interactions, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.network = SasRec(data.count + 1, settings.width, settings.blocks, settings.heads, settings.length, settings.dropout)

    def losses(self, rng: np.random.Generator) -> Iterator[Tensor]:
        """One epoch: every training position once, T positions a batch."""
        data, settings = self.data, self.settings
        users = np.flatnonzero(training_length(data) >= 2)
        positions = np.minimum(training_length(data)[users] - 1, settings.length)
        for rows in batches_by_length(positions, settings.tokens, rng):
            longest = int(positions[rows].max())
            sequence = torch.from_numpy(history(data, users[rows], longest + 1))
            state = self.network(sequence[:, :-1])
            real = sequence[:, :-1] != 0
            state, target = state[real], sequence[:, 1:][real]
            negative = torch.from_numpy(rng.integers(1, data.count + 1, settings.negatives))
            scores = state @ self.network.item(negative).T
            positive = (state * self.network.item(target)).sum(-1)
            yield sampled_softmax(positive, scores, target.unsqueeze(1) == negative, data.count)

    def states(self, sequences_BL: Tensor) -> Tensor:
        return self.network(sequences_BL)[:, -1]

    def scores(self, sequences_BL: Tensor, items_BN: Tensor) -> Tensor:
        return self.network.scores(self.states(sequences_BL), items_BN)

    def all_scores(self, sequences_BL: Tensor) -> Tensor:
        return self.network.scores(self.states(sequences_BL))


class TargetAttentionNetwork(nn.Module):
    """EGA-V1's RecFormer with items in place of places: behaviour blocks over the history, target attention of every candidate
    to it, and the pCTR head on h_i. Candidates do not see one another (a list of sampled negatives is not a city)."""

    def __init__(self, items: int, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        config = NetworkConfig(width=width, blocks=settings.blocks, heads=settings.heads, fusion="late", gcf_on_ads=False, exact_behaviours=settings.length + 1)
        self.item = nn.Embedding(items + 1, width, padding_idx=0)
        self.position = nn.Embedding(settings.length, width)
        self.context = nn.Parameter(torch.zeros(1, 1, width))
        self.recformer = RecFormer(config)
        self.user = nn.Parameter(torch.zeros(1, width))
        self.head = SplitHead(width, (width,))
        self.dropout = nn.Dropout(settings.dropout)
        with torch.no_grad():
            self.item.weight.normal_(0.0, 1.0 / math.sqrt(width))
            self.position.weight.normal_(0.0, 1.0 / math.sqrt(width))
            self.item.weight[0].zero_()

    def forward(self, sequences_BL: Tensor, items_BN: Tensor) -> Tensor:
        """Logits [B, N] of candidates [B, N], or [1, N] for the same ones after every sequence."""
        columns = sequences_BL.shape[1]
        tokens = self.dropout(self.item(sequences_BL) + self.position.weight[-columns:])
        tokens = torch.cat([self.context.expand(len(tokens), -1, -1), tokens], 1)
        real = torch.cat([torch.ones_like(sequences_BL[:, :1], dtype=torch.bool), sequences_BL != 0], 1)
        h = self.recformer(self.dropout(self.item(items_BN)), torch.ones_like(items_BN, dtype=torch.bool), tokens, real)
        return self.head(self.dropout(h), self.user)


class TargetAttentionRanker:
    """EGA-V1's encoder with its training batches and its scores."""

    name = "EGA-V1 encoder"

    def __init__(self, data: Interactions, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.network = TargetAttentionNetwork(data.count, settings)

    def losses(self, rng: np.random.Generator) -> Iterator[Tensor]:
        """One epoch: `prefixes` training positions, each drawn with its own history, as many as there are users."""
        data, settings = self.data, self.settings
        ends = np.maximum(training_length(data) - 1, 0)
        total = np.cumsum(ends)
        drawn = rng.choice(int(total[-1]), min(int(total[-1]), settings.prefixes), replace=False)
        user = np.searchsorted(total, drawn, side="right")
        end = data.start[user] + 1 + drawn - (total[user] - ends[user])
        length = np.minimum(end - data.start[user], settings.length)
        order = np.lexsort([rng.random(len(drawn)), length])
        parts = np.array_split(order, max(len(order) // settings.batch, 1))
        for number in rng.permutation(len(parts)):
            rows = parts[number]
            at = end[rows, None] + np.arange(-int(length[rows].max()), 0)
            sequences = torch.from_numpy(np.where(at >= data.start[user[rows], None], data.items[at.clip(min=0)], 0))
            target = torch.from_numpy(data.items[end[rows]])
            negative = torch.from_numpy(rng.integers(1, data.count + 1, settings.candidates))
            logits = self.network(sequences, torch.cat([target, negative]).unsqueeze(0))
            positive = logits[:, : len(rows)].diagonal()
            yield sampled_softmax(positive, logits[:, len(rows) :], target.unsqueeze(1) == negative, data.count)

    def scores(self, sequences_BL: Tensor, items_BN: Tensor) -> Tensor:
        return self.network(sequences_BL, items_BN)


def training_length(data: Interactions) -> np.ndarray:
    """Items of each user that training may read: all but the last two, or all where nothing can be held out."""
    return np.where(data.length >= 3, data.length - 2, data.length)


def history(data: Interactions, users: np.ndarray, length: int) -> np.ndarray:
    """The newest `length` training items, right-aligned."""
    end = data.start[users] + training_length(data)[users]
    at = end[:, None] + np.arange(-length, 0)
    return np.where(at >= data.start[users][:, None], data.items[at.clip(min=0)], 0)


@torch.inference_mode()
def sampled_ranks(ranker: Any, data: Interactions, users: np.ndarray, held_out: int, negatives: np.ndarray, batch: int = 256) -> np.ndarray:
    """Rank of each user's held-out item among its negatives."""
    ranker.network.eval()
    result = []
    for part in np.array_split(np.arange(len(users)), max(len(users) // batch, 1)):
        sequences = torch.from_numpy(data.before(users[part], held_out, ranker.settings.length))
        items = np.concatenate([data.held(users[part], held_out)[:, None], negatives[part]], 1)
        scores = ranker.scores(sequences, torch.from_numpy(items)).numpy()
        result.append(ranks(scores[:, 1:], scores[:, 0]))
    return np.concatenate(result)


def fit(ranker: Any, data: Interactions, settings: Settings, seed: int) -> dict[str, Any]:
    """Train with Adam, stop when the validation's NDCG@10 no longer rises, keep the best weights."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    users = np.flatnonzero(data.length >= 3)
    users = np.sort(rng.choice(users, min(settings.validation_users, len(users)), replace=False))
    negatives = draw_negatives(data, users, rng)
    optimiser = torch.optim.Adam(ranker.network.parameters(), settings.learning_rate, betas=(0.9, 0.98))
    best, kept, since, course = -1.0, None, 0, []
    started = time.perf_counter()
    with tqdm(range(1, settings.epochs + 1), desc=ranker.name, unit="epoch") as bar:
        for epoch in bar:
            ranker.network.train()
            total, count = 0.0, 0
            for loss in ranker.losses(rng):
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                total, count = total + float(loss.detach()), count + 1
            if epoch % settings.every and epoch != settings.epochs:
                continue
            hit, ndcg = (float(x.mean()) for x in gains(sampled_ranks(ranker, data, users, 2, negatives)))
            course.append({"epoch": epoch, "loss": total / count, "hr": hit, "ndcg": ndcg})
            bar.set_postfix(loss=f"{total / count:.3f}", hr=f"{hit:.4f}", ndcg=f"{ndcg:.4f}")
            if ndcg > best:
                best, kept, since = ndcg, copy.deepcopy(ranker.network.state_dict()), 0
            else:
                since += 1
                if since >= settings.patience:
                    break
    ranker.network.load_state_dict(kept)
    return {"epochs": epoch, "seconds": time.perf_counter() - started, "course": course}
