"""Next-item ranking on public interaction files: `ega bench sequential --data DIR`.

Protocol of Kang & McAuley (2018): a user's last item is the test, the one before the validation, all earlier ones are for training.
Shape letters: U users, I items, B sequences, L items of a sequence, T training positions, S shared negatives, N candidates, D width.
Item codes are 1..I; 0 is padding. Sequences are right-aligned, oldest first.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from model.cascade.sasrec import SasRec
from model.evaluation.metrics import mean_and_interval
from model.layers import ClusterBlock

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

    @cached_property
    def touched(self) -> np.ndarray:
        """user * (I + 1) + item of everything that a user touched, ascending."""
        return np.unique(np.repeat(np.arange(self.users), self.length) * (self.count + 1) + self.items)

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
    try:
        table = pd.read_csv(path, sep=r"\s+", header=None, dtype=str, comment="#")
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty; it must hold lines `user item` in time order") from None
    if table.shape[1] != 2 or bool(table.isna().any(axis=None)):
        raise ValueError(f"{path}: every line must be `user item`, separated by white space; found {table.shape[1]} columns")
    user, _ = pd.factorize(table[0])
    item, names = pd.factorize(table[1])
    order = np.argsort(user, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(user))])
    return Interactions((item + 1)[order].astype(np.int64), start, len(names))


def draw_negatives(data: Interactions, users: np.ndarray, rng: np.random.Generator, count: int = NEGATIVES) -> np.ndarray:
    """`count` items for each user, uniform over those the user never touched, with replacement; [U, count]."""
    own = data.touched
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
    """How many of the others do not score below: a tie, and NaN, falls against the target."""
    return np.count_nonzero(~(scores_BN < target_B[:, None]), axis=1)


def gains(rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HR@10 and NDCG@10 of each user from ranks that start at 0."""
    hit = rank < CUT
    return hit.astype(np.float64), np.where(hit, 1.0 / np.log2(rank + 2.0), 0.0)


@dataclass(frozen=True)
class Sizes:
    """What every model of item sequences is given here."""

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
    learning_rate: float = 1e-3
    """Adam's."""


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes and training of both models."""

    negatives: int = 512
    """S, uniform negatives that all positions of a batch share."""
    positions: int = 2048
    """Training positions in a batch, about: those of whole histories for SASRec, one a history for EGA-V1's encoder. Of histories longer than 50 items fewer."""
    tokens: int = 2_500_000
    """Items that an epoch reads at most: of larger files either model learns from a random part of the positions, another one every epoch."""
    epochs: int = 100
    """At most."""
    average: float = 0.998
    """Of the weights over steps: the running mean keeps this share of itself a step, is what validation and test see, and is kept."""
    left_out: float = 0.1
    """Share of a history's items but the newest that EGA-V1's encoder does not see in training. (SASRec, which learns from all positions of one pass, would
    lose them as targets.)"""
    patience: int = 5
    """Validations without a better NDCG@10 before training stops."""
    every: int = 2
    """Epochs between validations."""
    validation_users: int = 5000
    """Users of a validation."""
    full_ranking_users: int = 3000
    """Users whose held-out item is also ranked among all items."""


def next_item_loss(state_TD: Tensor, target_T: Tensor, item: nn.Embedding, items: int, negatives: int, rng: np.random.Generator) -> Tensor:
    """Cross-entropy of the next item against S uniform ones that stand for all, mean over T; their logits come less the log of how often
    an item is expected among the S (log-Q correction), and one that is the next item itself does not count."""
    drawn = torch.from_numpy(rng.integers(1, items + 1, negatives))
    scores = (state_TD @ item(drawn).T + math.log(items / negatives)).masked_fill(target_T.unsqueeze(1) == drawn, float("-inf"))
    positive = (state_TD * item(target_T)).sum(-1, keepdim=True)
    return -torch.log_softmax(torch.cat([positive, scores], 1), 1)[:, 0].mean()


def batches_by_length(length: np.ndarray, trained: np.ndarray, positions: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows in batches of like length, so that little of a batch is padding, and of about as many training positions, of which a row has `trained`: every
    position then counts alike."""
    order = np.lexsort([rng.random(len(length)), length])
    order = order[length[order] > 0]
    chunk = np.cumsum(np.maximum(trained, length / 50)[order]) // positions
    parts = np.split(order, np.flatnonzero(np.diff(chunk)) + 1)
    for number in rng.permutation(len(parts)):
        yield parts[number]


def a_part(tokens: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of `most` tokens together, at random; all rows where that is enough."""
    if tokens.sum() <= most:
        return np.arange(len(tokens))
    order = rng.permutation(len(tokens))
    return order[np.cumsum(tokens[order]) <= most]


class SasRecRanker:
    """SASRec with its training batches and its scores."""

    name = "SASRec"

    def __init__(self, data: Interactions, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.network = SasRec(data.count + 1, settings.width, settings.blocks, settings.heads, settings.length, settings.dropout)

    def losses(self, rng: np.random.Generator) -> Iterator[Tensor]:
        """One epoch: every training position once (`Settings.tokens`), T positions a batch."""
        data, settings = self.data, self.settings
        users = np.flatnonzero(training_length(data) >= 2)
        positions = np.minimum(training_length(data)[users] - 1, settings.length)
        part = a_part(positions, settings.tokens, rng)
        users, positions = users[part], positions[part]
        for rows in batches_by_length(positions, positions, settings.positions, rng):
            longest = int(positions[rows].max())
            sequence = torch.from_numpy(history(data, users[rows], longest + 1))
            state = self.network(sequence[:, :-1])
            real = sequence[:, :-1] != 0
            yield next_item_loss(state[real], sequence[:, 1:][real], self.network.item, data.count, settings.negatives, rng)

    def scores(self, sequences_BL: Tensor, items_BN: Tensor) -> Tensor:
        """Scores [B, N] of candidates [B, N], or [1, N] for the same ones after every sequence."""
        state = self.network.newest(sequences_BL)
        return state @ self.network.item(items_BN[0]).T if len(items_BN) == 1 else self.network.scores(state, items_BN)



class BehaviourEncoder(nn.Module):
    """EGA-V1's behaviour blocks (GCF, attended to one by one, as few behaviours are in every model here) over a history of items: the state of the newest
    is scored against the item table, as SASRec's is. Unlike there every item sees the later ones too."""

    def __init__(self, items: int, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.item = nn.Embedding(items + 1, width, padding_idx=0)
        self.position = nn.Embedding(settings.length, width)
        self.blocks = nn.ModuleList(
            ClusterBlock(width, 1, settings.heads, exact_up_to=settings.length, factor=1, qkv_activation="none", dropout=settings.dropout) for _ in range(settings.blocks)
        )
        self.norm, self.dropout, self.left_out = nn.LayerNorm(width), nn.Dropout(settings.dropout), settings.left_out
        with torch.no_grad():
            for table in (self.item, self.position):
                table.weight.normal_(0.0, 1.0 / width)
            self.item.weight[0].zero_()

    def forward(self, sequences_BL: Tensor) -> Tensor:
        """States [B, D] after right-aligned histories; a user without one gets that of padding."""
        columns = sequences_BL.shape[1]
        if self.training:
            sequences_BL = sequences_BL.masked_fill((torch.rand(sequences_BL.shape) < self.left_out) & (torch.arange(columns) < columns - 1), 0)
        x = self.dropout(self.item(sequences_BL) * math.sqrt(self.item.embedding_dim) + self.position.weight[-columns:])
        real = sequences_BL != 0
        real[:, -1] = True  # a row without any key has no softmax
        newest = torch.full((len(x), 1), columns - 1)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, real, newest if number == len(self.blocks) else None)
        return self.norm(x[:, 0])


class BehaviourRanker:
    """EGA-V1's behaviour encoder with its training batches and its scores: SASRec's loss, negatives and budget."""

    name = "EGA-V1 encoder"

    def __init__(self, data: Interactions, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.network = BehaviourEncoder(data.count, settings)

    def losses(self, rng: np.random.Generator) -> Iterator[Tensor]:
        """One epoch: every training position once (`Settings.tokens`), each after its own history, since these blocks see a history whole."""
        data, settings = self.data, self.settings
        positions = np.maximum(training_length(data) - 1, 0)
        first = np.cumsum(positions) - positions
        user = np.repeat(np.arange(data.users), positions)
        end = data.start[user] + 1 + np.arange(len(user)) - first[user]
        length = np.minimum(end - data.start[user], settings.length)
        part = a_part(length, settings.tokens, rng)
        user, end, length = user[part], end[part], length[part]
        for rows in batches_by_length(length, np.ones(len(length)), settings.positions, rng):
            at = end[rows, None] + np.arange(-int(length[rows].max()), 0)
            state = self.network(torch.from_numpy(np.where(at >= data.start[user[rows], None], data.items[at.clip(min=0)], 0)))
            yield next_item_loss(state, torch.from_numpy(data.items[end[rows]]), self.network.item, data.count, settings.negatives, rng)

    def scores(self, sequences_BL: Tensor, items_BN: Tensor) -> Tensor:
        """As SASRec's."""
        state = self.network(sequences_BL)
        return state @ self.network.item(items_BN[0]).T if len(items_BN) == 1 else torch.einsum("bd,bnd->bn", state, self.network.item(items_BN))


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
    """Train with Adam, stop when the validation's NDCG@10 of the averaged weights no longer rises, keep the best of these."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    users = np.flatnonzero(data.length >= 3)
    users = np.sort(rng.choice(users, min(settings.validation_users, len(users)), replace=False))
    negatives = draw_negatives(data, users, rng)
    optimiser = torch.optim.Adam(ranker.network.parameters(), settings.learning_rate, betas=(0.9, 0.98), fused=True)
    network = ranker.network
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.average), use_buffers=True)
    best, kept, since, course = -1.0, None, 0, []
    started = time.perf_counter()
    with tqdm(range(1, settings.epochs + 1), desc=ranker.name, unit="epoch") as bar:
        for epoch in bar:
            ranker.network = network.train()
            total, count = 0.0, 0
            for loss in ranker.losses(rng):
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                averaged.update_parameters(network)
                total, count = total + float(loss.detach()), count + 1
            if epoch % settings.every and epoch != settings.epochs:
                continue
            ranker.network = averaged.module
            hit, ndcg = (float(x.mean()) for x in gains(sampled_ranks(ranker, data, users, 2, negatives)))
            course.append({"epoch": epoch, "loss": total / count, "hr": hit, "ndcg": ndcg})
            bar.set_postfix(loss=f"{total / count:.3f}", hr=f"{hit:.4f}", ndcg=f"{ndcg:.4f}")
            if ndcg > best:
                best, kept, since = ndcg, copy.deepcopy(ranker.network.state_dict()), 0
            else:
                since += 1
                if since >= settings.patience:
                    break
    ranker.network = averaged.module
    ranker.network.load_state_dict(kept)
    return {"epochs": epoch, "seconds": time.perf_counter() - started, "course": course}


class Popularity:
    """Training count of every item: what a model that reads nobody's history knows."""

    def __init__(self, data: Interactions, settings: Settings) -> None:
        self.settings, self.network = settings, nn.Identity()
        length = training_length(data)
        last = np.repeat(data.start[:-1] + length, data.length)
        self.count = torch.from_numpy(np.bincount(data.items[np.arange(len(data.items)) < last], minlength=data.count + 1)).float()

    def scores(self, sequences_BL: Tensor, items_BN: Tensor) -> Tensor:
        return self.count[items_BN].expand(len(sequences_BL), -1)


@torch.inference_mode()
def full_ranks(ranker: Any, data: Interactions, users: np.ndarray, held_out: int, batch: int = 32) -> np.ndarray:
    """Rank of each user's held-out item among all items, the user's earlier ones left out."""
    ranker.network.eval()
    everything, result = torch.arange(data.count + 1).unsqueeze(0), []
    for part in tqdm(np.array_split(users, max(len(users) // batch, 1)), desc="full ranking", leave=False):
        scores = ranker.scores(torch.from_numpy(data.before(part, held_out, ranker.settings.length)), everything).numpy()
        target = data.held(part, held_out)
        own = np.take_along_axis(scores, target[:, None], 1)[:, 0]
        scores[:, 0] = -np.inf
        for row, user in enumerate(part):
            scores[row, data.items[data.start[user] : data.start[user + 1] - held_out]] = -np.inf
        scores[np.arange(len(part)), target] = own  # a repeat of an earlier item stays a target
        result.append(ranks(scores, own) - 1)
    return np.concatenate(result)


MODELS = {"SASRec": SasRecRanker, "EGA-V1 encoder": BehaviourRanker}


def sequential(data: Path, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """HR@10 and NDCG@10 of SASRec and of EGA-V1's encoder on the last item of every user, among 100 sampled negatives and among all items."""
    interactions = read_interactions(data)
    settings = QUICK if quick else settings_for(interactions)
    rng = np.random.default_rng([seed, 1])
    users = np.flatnonzero(interactions.length >= 3)
    if not len(users):
        raise ValueError(f"{data}: no user has three items or more; the last two are held out")
    negatives = draw_negatives(interactions, users, rng)
    asked = np.sort(rng.choice(len(users), min(settings.full_ranking_users, len(users)), replace=False))
    found, trained, rows = {}, {}, []
    for name, model in {"popularity": Popularity, **MODELS}.items():
        torch.manual_seed(seed)
        ranker = model(interactions, settings)
        if name in MODELS:
            trained[name] = fit(ranker, interactions, settings, seed)
            trained[name]["parameters"] = sum(parameter.numel() for parameter in ranker.network.parameters())
        found[name] = (*gains(sampled_ranks(ranker, interactions, users, 1, negatives)), *gains(full_ranks(ranker, interactions, users[asked], 1)))
    for name, values in found.items():
        row: dict[str, Any] = {"model": name}
        for label, value in zip(MEASURES, values, strict=True):
            row[label] = "{:.4f} ({:.4f} to {:.4f})".format(*mean_and_interval(value, np.arange(len(value))))
        row |= {"epochs": trained.get(name, {}).get("epochs", ""), "minutes": f"{trained[name]['seconds'] / 60:.1f}" if name in trained else ""}
        rows.append(row)
    ours, theirs = (found[name] for name in ("EGA-V1 encoder", "SASRec"))
    paired = ["{:+.4f} ({:+.4f} to {:+.4f})".format(*mean_and_interval(a - b, np.arange(len(a)))) for a, b in zip(ours, theirs, strict=True)]
    rows.append({"model": "encoder less SASRec, paired", **dict(zip(MEASURES, paired, strict=True)), "epochs": "", "minutes": ""})
    return {
        "users": interactions.users, "items": interactions.count, "interactions": len(interactions.items), "tested_users": len(users), "full_ranking_users": len(asked),
        "seed": seed, "figures": {name: {label: float(x.mean()) for label, x in zip(MEASURES, values, strict=True)} for name, values in found.items()},
        "training": trained, "config": asdict(settings), "table": rows,
    }  # fmt: skip


MEASURES = ("HR@10 of 101", "NDCG@10 of 101", "HR@10 of all", "NDCG@10 of all")
SETTINGS = Settings(epochs=48, patience=4)
"""Of both models. Sized for about half an hour on two quiet cores, two for large or dense files."""


def settings_for(data: Interactions) -> Settings:
    """SETTINGS with more epochs where there are few positions to learn from; where users have many items, as Kang & McAuley (2018) chose for such data
    (MovieLens): histories of 200, dropout .2."""
    positions = int(np.maximum(training_length(data) - 1, 0).sum())
    settings = replace(SETTINGS, epochs=max(SETTINGS.epochs, math.ceil(POSITIONS / max(positions, POSITIONS // 1000))))
    return replace(settings, length=200, dropout=0.2) if data.length.mean() >= DENSE else settings


DENSE = 50
"""Items a user, on average, from which a file is dense."""
POSITIONS = 9_000_000
"""Training positions that a model passes at least, if its validation goes on rising, or 1,000 epochs."""
QUICK = replace(Settings(), width=8, blocks=1, length=10, epochs=1, validation_users=100, full_ranking_users=100)
