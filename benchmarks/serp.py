"""Click perplexity on real result pages: `ega bench serp --data DIR`.

The page-aware evaluator of EGA-V1 (Eq. 18, with its examination term) against the strongest count: slot x smoothed query-url CTR.
Nothing but the query, the urls and their order is read: no click of the page itself, no time, no mouse.
Shape letters: P pages, K slots, D width, V rows of an id table.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from model.ega_v1.network import Evaluator, NetworkConfig, VocabularySizes
from model.evaluation.metrics import mean_and_interval

PAGES = "pages.tsv.gz"
PUBLISHED_DBN, PUBLISHED_COUNT = 1.3333, 1.3219
"""Perplexities that EVALUATION.md quotes, on a split that it does not name: of a dynamic Bayesian network and of slot x smoothed query-url CTR."""
LABELS = {"slot": "slot alone", "count": "slot x query-url CTR", "evaluator": "evaluator"}
SMOOTHING = (1.0, 2.0, 3.0, 5.0, 10.0)
"""Prior clicks that the counting baseline may choose from on the development pages."""


@dataclass(frozen=True)
class Pages:
    """P result pages: codes of the query [P] and of url and (query, url) [P, K] from 0 on, clicks 0 or 1 [P, K]."""

    query: np.ndarray
    url: np.ndarray
    pair: np.ndarray
    click: np.ndarray

    def take(self, rows: np.ndarray) -> Pages:
        return Pages(self.query[rows], self.url[rows], self.pair[rows], self.click[rows])


def read_pages(data: Path) -> Pages:
    """`pages.tsv.gz` (in a folder, or the file itself): query, urls in slot order, clicks; further columns are not read."""
    path = data / PAGES if data.is_dir() else data
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; --data names the folder that holds {PAGES} (query, urls and clicks of a page, tab-separated)")
    query, url, click = [], [], []
    with gzip.open(path, "rt") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) < 3:
                raise ValueError(f"{path}, line {number}: expected query, urls and clicks separated by tabs, got {len(fields)} field(s)")
            query.append(fields[0])
            url.append(fields[1].split())
            click.append(fields[2].split())
            if not len(url[-1]) == len(click[-1]) == len(url[0]):
                raise ValueError(f"{path}, line {number}: {len(url[-1])} urls and {len(click[-1])} clicks; every page must have {len(url[0])} of both")
    clicks = np.array(click)
    if not np.isin(clicks, ("0", "1")).all():
        raise ValueError(f"{path}: clicks must be 0 or 1")
    _, query_code = np.unique(query, return_inverse=True)
    _, url_code = np.unique(np.array(url), return_inverse=True)
    url_code = url_code.reshape(clicks.shape)
    _, pair = np.unique(query_code[:, None] * (url_code.max() + 1) + url_code, return_inverse=True)
    return Pages(query_code, url_code, pair.reshape(clicks.shape), (clicks == "1").astype(np.float32))


def cross_entropy(probability_PK: np.ndarray, click_PK: np.ndarray) -> np.ndarray:
    """Bits of every slot, [P, K]."""
    p = np.clip(np.asarray(probability_PK, np.float64), 1e-9, 1 - 1e-9)
    return -np.where(click_PK > 0, np.log2(p), np.log2(1 - p))


def perplexity(bits_PK: np.ndarray) -> tuple[float, float]:
    """2 ^ mean bits over all slots, and the mean over slots of 2 ^ the slot's mean bits (which is how click-model papers often print it)."""
    return float(2 ** bits_PK.mean()), float((2 ** bits_PK.mean(0)).mean())


def slot_times_ctr(train: Pages, test: Pages, prior_clicks: float) -> np.ndarray:
    """Slot CTR x (clicks of the query-url pair + a) / (clicks expected from its slots + a), [P, K]."""
    slot = train.click.mean(0, dtype=np.float64)
    rows = int(max(train.pair.max(), test.pair.max())) + 1
    clicked = np.bincount(train.pair.ravel(), train.click.ravel(), minlength=rows)
    expected = np.bincount(train.pair.ravel(), np.broadcast_to(slot, train.click.shape).ravel(), minlength=rows)
    return slot * (clicked[test.pair] + prior_clicks) / (expected[test.pair] + prior_clicks)


@dataclass(frozen=True)
class Settings:
    """Priors and training. Standard deviations are those of Gaussian priors, in logits."""

    query: float = 0.4
    """Of a query's level: some searches end without a click."""
    query_slope: float = 0.4
    """Of its slope down the page."""
    query_first: float = 0.5
    """Of what its first slot has beyond that: navigational queries."""
    url: float = 0.4
    """Of a url, whatever the query."""
    pair: float = 0.4
    """Of a url for a query."""
    examination: float = 0.2
    """Of what a query-url pair or a url leaves of the attention for the slots below."""
    width: int = 16
    """D of the evaluator."""
    steps: int = 60
    """Optimiser steps at most, each on all pages; the development pages say how many."""
    development_share: float = 0.15
    """Of the training pages, held out to choose the number of steps and the baseline's smoothing."""


class PageModel(nn.Module):
    """Count effects with Gaussian priors (their posterior mode is a smoothed count), and EGA-V1's Evaluator on top: what the page adds."""

    FEATURES = 4

    def __init__(self, pages: Pages, settings: Settings) -> None:
        super().__init__()
        slots = pages.click.shape[1]
        self.deviation = {name: getattr(settings, name) for name in ("query", "query_slope", "query_first", "url", "pair")}
        rows = {"url": pages.url, "pair": pages.pair}
        # Parameters are in units of their priors: one learning rate then suits all.
        self.effects = nn.ParameterDict({name: nn.Parameter(torch.zeros(int(rows.get(name, pages.query).max()) + 1)) for name in self.deviation})
        rate = np.clip(pages.click.mean(0, dtype=np.float64), 1e-4, 1 - 1e-4)
        self.slot = nn.Parameter(torch.from_numpy(np.log(rate / (1 - rate))).float())
        depth = torch.log1p(torch.arange(slots).float())
        self.register_buffer("depth", depth - depth.mean())
        sizes = VocabularySizes(ad=len(self.effects["pair"]), poi=1, advertiser=1, category=len(self.effects["url"]), geo=1, creative=1)
        self.join = nn.Linear(self.FEATURES + slots, settings.width)
        config = NetworkConfig(width=settings.width, slots=slots, auction_blocks=1, heads=2, feed_forward=2, head_hidden=(16,))
        self.evaluator = Evaluator(config, sizes)
        self.examination_deviation = settings.examination

    def forward(self, pages: dict[str, Tensor]) -> Tensor:
        """Click logits [P, K]."""
        query, first = pages["query"], F.one_hot(torch.zeros_like(pages["query"]), len(self.slot))
        effect = {name: self.deviation[name] * values[pages[name if name in ("url", "pair") else "query"]] for name, values in self.effects.items()}
        logit = self.slot + effect["query"].unsqueeze(1) + effect["query_slope"].unsqueeze(1) * self.depth + effect["query_first"].unsqueeze(1) * first + effect["url"] + effect["pair"]
        where = torch.eye(len(self.slot)).expand(len(query), -1, -1)
        h = self.join(torch.cat([pages["counts"], where], -1))
        codes = torch.stack([pages["pair"], pages["url"]], -1)
        mask = torch.ones_like(pages["pair"], dtype=torch.bool)
        return self.evaluator(h, codes, h[:, 0], logit, logit, mask)[0]

    def penalty(self) -> Tensor:
        """-log of the priors, up to a constant."""
        return sum(values.square().sum() for values in self.effects.values()) / 2 + self.evaluator.examination_prior(self.examination_deviation)


def inputs(pages: Pages, seen: Pages, own: int) -> dict[str, Tensor]:
    """Codes and counts of pages. Counts are of *showings* in the training pages, less the page's own (`own` 1 for training pages):
    counts of clicks, even leave-one-out, would give a training page's own label away."""
    def showings(values: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.log1p(np.bincount(of.ravel(), minlength=int(max(of.max(), values.max())) + 1)[values] - own)

    query = np.broadcast_to(showings(pages.query, seen.query)[:, None], pages.url.shape)
    pair, url = showings(pages.pair, seen.pair), showings(pages.url, seen.url)
    counts = np.stack([query, pair, url, np.broadcast_to(pair.mean(1, keepdims=True), pair.shape)], -1)
    return {**{name: torch.from_numpy(getattr(pages, name)) for name in ("query", "url", "pair")}, "counts": torch.from_numpy(counts).float()}


def fit(train: Pages, sizes: Pages, settings: Settings, steps: int, seed: int, watch: Pages | None = None, bar: Callable[[int], Any] | None = None) -> tuple[PageModel, list[float]]:
    """`steps` of Adam on all training pages; with `watch`, its bits a slot after every tenth step."""
    torch.manual_seed(seed)
    model = PageModel(sizes, settings)
    with torch.no_grad():
        rate = train.click.mean(0, dtype=np.float64)
        model.slot.copy_(torch.from_numpy(np.log(rate / (1 - rate))).float())
    groups = [{"params": [*model.effects.values()], "lr": 0.1}, {"params": [model.slot], "lr": 0.02}, {"params": [*model.join.parameters(), *model.evaluator.parameters()], "lr": 0.002}]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 - 0.9 * step / settings.steps)
    data, click = inputs(train, train, 1), torch.from_numpy(train.click)
    seen = None if watch is None else inputs(watch, train, 0)
    course = []
    for step in range(1, steps + 1):
        loss = F.binary_cross_entropy_with_logits(model(data), click, reduction="sum") + model.penalty()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if bar is not None:
            bar(1)
        if watch is not None and seen is not None and step % 10 == 0:
            course.append(float(cross_entropy(probabilities(model, seen), watch.click).mean()))
    return model, course


@torch.inference_mode()
def probabilities(model: PageModel, data: dict[str, Tensor]) -> np.ndarray:
    return torch.sigmoid(model(data)).double().numpy()


def one_split(pages: Pages, settings: Settings, train_rows: np.ndarray, test_rows: np.ndarray, seed: int, bar: Callable[[int], Any] | None = None) -> dict[str, np.ndarray | float]:
    """Bits of the test pages, [P, K], of the slot alone, the counting baseline and the evaluator; all choices are made on development pages."""
    rng = np.random.default_rng([seed, 1])
    shuffled = rng.permutation(train_rows)
    development = max(1, int(settings.development_share * len(shuffled)))
    watch, rest = pages.take(shuffled[:development]), pages.take(shuffled[development:])
    train, test = pages.take(train_rows), pages.take(test_rows)
    smoothing = min(SMOOTHING, key=lambda a: float(cross_entropy(slot_times_ctr(rest, watch, a), watch.click).mean()))
    _, course = fit(rest, pages, settings, settings.steps, seed, watch, bar)
    steps = 10 * (1 + int(np.argmin(course)))
    model, _ = fit(train, pages, settings, steps, seed, bar=bar)
    slot = np.broadcast_to(train.click.mean(0, dtype=np.float64), test.click.shape)
    return {
        "slot": cross_entropy(slot, test.click), "count": cross_entropy(slot_times_ctr(train, test, smoothing), test.click),
        "evaluator": cross_entropy(probabilities(model, inputs(test, train, 0)), test.click), "steps": steps, "smoothing": smoothing,
    }  # fmt: skip


def serp(data: Path, seed: int = 0, quick: bool = False, splits: int = 5) -> dict[str, Any]:
    """Perplexity of unseen pages on several random 80/20 splits; the baseline is fitted and smoothed on the same pages in the same run."""
    pages = read_pages(data)
    settings = Settings(steps=20) if quick else Settings()
    splits = 1 if quick else splits
    if len(pages.query) < 20:
        raise ValueError(f"{data} holds {len(pages.query)} pages; at least 20 are needed to hold some out")
    rows: list[dict[str, Any]] = []
    bits: dict[str, list[np.ndarray]] = {name: [] for name in ("slot", "count", "evaluator")}
    queries: list[np.ndarray] = []
    with tqdm(desc="serp", unit="step") as bar:
        for split in range(splits):
            order = np.random.default_rng([seed, split]).permutation(len(pages.query))
            cut = int(0.8 * len(order))
            found = one_split(pages, settings, order[:cut], order[cut:], seed + split, bar.update)
            for name, values in bits.items():
                values.append(np.asarray(found[name]))
            queries.append(pages.query[order[cut:]])
            bar.set_postfix(split=split, **{name: f"{perplexity(values[-1])[0]:.4f}" for name, values in bits.items()})
            difference = np.asarray(found["evaluator"]).mean(1) - np.asarray(found["count"]).mean(1)
            mean, low, high = mean_and_interval(difference, queries[-1])
            rows.append({
                "split": str(split), "pages": len(order) - cut, **{label: f"{perplexity(np.asarray(found[name]))[0]:.4f}" for name, label in LABELS.items()},
                "bits less than count, 95 %": f"{-mean:.5f} ({-high:.5f} to {-low:.5f})", "steps": found["steps"], "smoothing": found["smoothing"],
            })  # fmt: skip
    mean_of = {name: float(np.mean([perplexity(part)[0] for part in parts])) for name, parts in bits.items()}
    rows.append({"split": "mean", "pages": rows[0]["pages"], **{label: f"{mean_of[name]:.4f}" for name, label in LABELS.items()}, "bits less than count, 95 %": "", "steps": "", "smoothing": ""})
    result: dict[str, Any] = {
        "pages": len(pages.query), "queries": int(pages.query.max()) + 1, "slots": pages.click.shape[1], "seed": seed, "splits": splits,
        "click_rate": float(pages.click.mean()),
        "perplexity_evaluator": mean_of["evaluator"], "perplexity_count": mean_of["count"], "perplexity_slot": mean_of["slot"],
        "splits_below_count": sum(perplexity(mine) < perplexity(count) for mine, count in zip(bits["evaluator"], bits["count"], strict=True)),
        **{f"mean_over_slots_{name}": float(np.mean([perplexity(part)[1] for part in parts])) for name, parts in bits.items()},
        "quoted_count": PUBLISHED_COUNT, "quoted_dbn": PUBLISHED_DBN,
        "spread_of_count_over_splits": float(np.std([perplexity(part)[0] for part in bits["count"]])),
        "config": asdict(settings), "table": rows,
    }  # fmt: skip
    return result

