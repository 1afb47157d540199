"""The four stages of EGA-V1 (paper Sec. 4) on request samples.

pretrain (Eq. 20) -> reward (Eq. 21, twice: training and evaluation evaluator) -> rlaf (Eq. 22-23) -> payment (Eq. 24).
Shape letters: B requests, N candidates, M sampled candidates, K slots, D width, G misreports.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor
from torch.nn import functional as F

from marketplace import schema
from model.ega_v1.mechanism import Bidding, Pages, Pool, allocate, learned_prices, page_logits, truthful, try_bids
from model.ega_v1.network import AD_COLUMNS, PAGE_COLUMNS, Batch, EgaV1, Evaluator, NetworkConfig, RankingModel, allocation_scores
from model.ega_v2.stages import V2TrainingConfig
from model.evaluation.metrics import auc, deviation, log_loss
from model.kinds import create
from model.layers import in_float32, masked_bce, take
from model.training.calibration import ExposedLogits, level_for
from model.training.data import City, Samples, TrainingBatch, geo_table, vocabulary_sizes
from model.training.loop import Device, LoopConfig, StageResult, run_stage

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@config_dataclass(frozen=True, config=_STRICT)
class PretrainConfig(LoopConfig):
    """Stage 1: set-aware pCTR on exposed and unexposed candidates."""

    purchase_weight: float = Field(0.2, ge=0)
    """Weight of the auxiliary purchase task."""
    exposed_weight: float = Field(4.0, gt=0)
    """Weight of an exposed candidate in the loss; unexposed ones count 1. K exposed stand against N_s unexposed."""
    inclusion_correction: Literal["log_q", "none"] = "log_q"
    """How sampled unexposed candidates are corrected: subtract their log inclusion probability, or not at all."""
    slot_bias: bool = True
    """Beyond the paper: exposed ads get a learned term for their slot, so that q is not credited with what the slot did."""
    hidden_ids: float = Field(0.05, ge=0, lt=1)
    """Probability that an ad's id, its advertiser or its place is hidden in a step, each by itself: the rows of unknown ids learn what a
    new ad is worth. Without it their random start decides."""
    calibration_requests: int = Field(800, ge=1)
    """Validation requests, spread over time, seen among the whole city when the level of pCTR is set after training."""


@config_dataclass(frozen=True, config=_STRICT)
class RewardConfig(LoopConfig):
    """Stage 2: evaluators on exposed pages, RecFormer frozen."""

    purchase_weight: float = Field(0.2, ge=0)
    """Weight of the purchase task."""
    steps: int = Field(500, ge=0)
    """Most optimiser steps."""
    batch: int = Field(256, ge=1)
    """Requests a step."""
    learning_rate: float = Field(5e-4, gt=0)
    """Adam's peak rate."""
    weight_decay: float = Field(0.3, ge=0)
    """Decoupled weight decay; clicks are few and an evaluator that learns noise is what RLAF exploits."""
    examination_deviation: float = Field(1.0, gt=0)
    """Standard deviation, in logits, of the Gaussian prior on every weight of the examination term."""
    hidden_ids: float = Field(0.05, ge=0, lt=1)
    """As in stage 1, of the ids that the examination term reads."""
    validate_every: int = Field(50, ge=1)
    """Steps between validations."""
    requests: int = Field(8000, ge=0)
    """Training requests used, spread over its days; 0: all."""


@config_dataclass(frozen=True, config=_STRICT)
class RlafConfig(LoopConfig):
    """Stage 3: the generator learns from the evaluator's reading of its pages."""

    candidates: int = Field(256, ge=8)
    """Most candidates of a request; larger cities keep half by q*b and half at random."""
    steps: int = Field(200, ge=0)
    """Most optimiser steps."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam's peak rate."""
    validate_every: int = Field(10, ge=1)
    """Steps between validations: what the evaluators have to teach is learned quickly, what comes later is their noise."""
    requests: int = Field(4096, ge=0)
    """Training requests used, newest first; 0: all."""
    kl: float = Field(0.1, ge=0)
    """Weight of KL(policy || separable policy), per slot."""
    entropy: float = Field(0.0, ge=0)
    """Weight of the entropy bonus, per slot."""


@config_dataclass(frozen=True, config=_STRICT)
class PaymentConfig(LoopConfig):
    """Stage 4: the payment network under a regret constraint."""

    candidates: int = Field(256, ge=8)
    """As in stage 3."""
    steps: int = Field(200, ge=0)
    """Most optimiser steps."""
    batch: int = Field(64, ge=1)
    """Requests a step."""
    validate_every: int = Field(40, ge=1)
    """Steps between validations."""
    requests: int = Field(2048, ge=0)
    """Training requests used, newest first; 0: all."""
    validation_requests: int = Field(512, ge=1)
    """Validation requests used."""
    schedule: Literal["lagrangian", "log_budget"] = "lagrangian"
    """How regret is paid for: Eq. 24's multipliers with a quadratic penalty, or one multiplier that follows a shrinking budget of
    regret over revenue on a log scale (Ivanov et al. 2022)."""
    rho: float = Field(5.0, gt=0)
    """rho, quadratic penalty and step of the multipliers."""
    multiplier: float = Field(2.0, ge=0)
    """lambda at the start, one a slot."""
    budget: tuple[float, float] = (0.05, 0.001)
    """Of log_budget: regret over revenue allowed at the first step and at the last, falling geometrically."""
    psi_target: float = Field(0.005, gt=0)
    """Regret over utility at which revenue starts to decide which weights are kept."""
    misreports: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.1, 1.2, 1.5, 2.0)
    """gamma, bids tried as factors of the value; the regenerated page decides what they win."""

    def __post_init__(self) -> None:
        if not 0 < self.budget[1] <= self.budget[0]:
            raise ValueError(f"payment budget {self.budget} must be (first, last) with 0 < last <= first")


@config_dataclass(frozen=True, config=_STRICT)
class TowerConfig(LoopConfig):
    """Recall and pre-ranking of a cascade."""

    hidden_ids: float = Field(0.05, ge=0, lt=1)
    """As in stage 1."""
    recall_at: int = Field(50, ge=1)
    """k of the Recall@k that stops training."""


@config_dataclass(frozen=True, config=_STRICT)
class RelabelConfig(TowerConfig):
    """FS-LTR: all stages of a cascade trained again, each by itself, on what a cascade did with every sampled ad."""

    learning_rate: float = Field(5e-4, gt=0)
    """Adam's peak rate."""


@config_dataclass(frozen=True, config=_STRICT)
class TrainingConfig:
    """The stages of every kind of model; a kind reads what its stages need (model.kinds)."""

    recall: TowerConfig = TowerConfig()
    """Cascades: SASRec."""
    prerank: TowerConfig = TowerConfig()
    """Cascades: DSSM."""
    relabel: RelabelConfig = RelabelConfig()
    """FS-LTR."""
    pretrain: PretrainConfig = PretrainConfig()
    """Stage 1; of a cascade, its ranking network."""
    reward: RewardConfig = RewardConfig()
    """Stage 2, training evaluator."""
    evaluation: RewardConfig = RewardConfig(seed=2)
    """Stage 2, evaluation evaluator."""
    rlaf: RlafConfig = RlafConfig()
    """Stage 3."""
    payment: PaymentConfig = PaymentConfig()
    """Stage 4."""
    ega_v2: V2TrainingConfig = V2TrainingConfig()
    """The stages of EGA (V2)."""
    threads: int = Field(2, ge=1)
    """CPU threads of every stage; part of the result."""
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$")
    """Where every stage trains: cpu, cuda, or cuda:N. Part of the result. EGA (V2) trains on the CPU only."""


def build_network(config: NetworkConfig, samples: Samples, seed: int) -> RankingModel:
    """A freshly initialised network for a sample folder; equal seeds give equal bytes."""
    torch.manual_seed(seed)
    sizes = vocabulary_sizes(samples.vocabulary)
    shown, elsewhere = samples.prior_rates
    network = create(config, sizes, geo_table(samples.vocabulary, config.embedding, seed), prior_ctr=shown)
    if config.kind == "ega_v2":
        return network
    with torch.no_grad():
        network.unexposed_start.fill_(float(torch.logit(torch.tensor(elsewhere)) - torch.logit(torch.tensor(shown))))
    return network


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1


def pretrain_loss(network: RankingModel, batch: TrainingBatch, config: PretrainConfig) -> Tensor:
    """Eq. 20 over K exposed and N_s unexposed candidates, a mean over requests divided by K, with the purchase task.

    An unexposed ad is in the sample with probability pi_i when the user did not choose it and surely when the user did, so its
    sampled log-odds exceed the true ones by -log pi_i, whatever its label; adding that to the logit leaves q calibrated. A learned curve
    (`RankingModel.unexposed_logits`) separates "chosen elsewhere" from "clicked when shown", so that q is the probability of a click *when
    shown*.
    """
    h, user = network.encode(batch.inputs)
    total: Tensor = torch.zeros((), device=h.device)
    mask = batch.inputs.ad_mask
    logits = in_float32(network.heads, h, user)
    for index, (logit, label, weight) in enumerate(zip(logits, (batch.click, batch.purchase), (1.0, config.purchase_weight), strict=True)):
        correction = batch.log_inclusion if config.inclusion_correction == "log_q" else 0.0
        shown = in_slot(network, logit) if config.slot_bias else logit
        logit = torch.where(batch.exposed, shown, network.unexposed_logits(logit, index) - correction)
        losses = F.binary_cross_entropy_with_logits(logit, label, reduction="none") * torch.where(batch.exposed, config.exposed_weight, 1.0)
        total = total + weight * (losses * mask).sum() / (len(batch.requests) * network.config.slots)
    return total


HIDDEN_TOGETHER = (("ad", "creative"), ("advertiser",), ("poi",))
"""Ad fields that are new together."""


def hide_ids(ad_fields_BNF: Tensor, rate: float, noise: torch.Generator) -> Tensor:
    """A copy in which each of HIDDEN_TOGETHER is UNKNOWN with probability `rate`, by request and ad; padding stays."""
    fields = ad_fields_BNF.clone()
    for names in HIDDEN_TOGETHER:
        hidden = torch.rand(fields.shape[:-1], generator=noise).to(fields.device) < rate
        for name in names:
            column = AD_COLUMNS.index(name)
            fields[..., column] = torch.where(hidden & (fields[..., column] >= schema.FIRST_CODE), schema.UNKNOWN, fields[..., column])
    return fields


def in_slot(network: RankingModel, logit_BM: Tensor) -> Tensor:
    """Logits of samples with `RankingModel.slot_logits` added to their first K columns, which hold the exposed ads in slot order."""
    return logit_BM + F.pad(network.slot_logits(), (0, logit_BM.shape[1] - network.config.slots))


@torch.no_grad()
def pretrain_metrics(network: RankingModel, samples: Samples, rows: np.ndarray, batch: int) -> dict[str, float]:
    """AUC on all sampled candidates, on exposed ones, Dev and log-loss on exposed ones, all of q alone.

    `score` is the mean of the AUC on all and of `auc_exposed_in_slot`, which adds the slot's term to q: judged by q alone, a
    model would gain by crediting its ads with the slots that they had.
    """
    q, placed, y, shown, _ = sampled_scores(network, samples, rows, batch)
    result = {
        "auc": auc(y, q), "auc_exposed": auc(y[shown], q[shown]), "auc_exposed_in_slot": auc(y[shown], placed[shown]),
        "dev": deviation(q[shown], y[shown]), "log_loss": log_loss(y[shown], q[shown]),
    }  # fmt: skip
    return {"score": (result["auc"] + result["auc_exposed_in_slot"]) / 2, **result}


@torch.no_grad()
def sampled_scores(network: RankingModel, samples: Samples, rows: np.ndarray, batch: int) -> tuple[np.ndarray, ...]:
    """Of all sampled candidates of `rows`, end to end: q, q with the slot's term, click label, whether exposed, and the user."""
    parts = []
    for start in range(0, len(rows), batch):
        b = samples.batch(rows[start : start + batch])
        mask = b.inputs.ad_mask
        logit = network.click_head(*network.encode(b.inputs))
        user = np.broadcast_to(np.asarray(samples.user_id[b.requests])[:, None], mask.shape)
        columns = (torch.sigmoid(logit), torch.sigmoid(in_slot(network, logit)), b.click, b.exposed)
        parts.append((*(column[mask].numpy(force=True) for column in columns), user[mask.numpy(force=True)]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def pretrain(network: RankingModel, samples: Samples, config: PretrainConfig, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    """Stage 1: everything before AucFormer."""
    result = learn_clicks(network, samples, config, folder, device, fingerprint)
    calibrate_clicks(network, samples, config.calibration_requests)
    return result


def learn_clicks(network: RankingModel, samples: Samples, config: PretrainConfig, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    """Stage 1 before its calibration."""
    parameters = network.enter_stage("pretrain")
    rows = newest(samples.split_rows(schema.TRAIN), config.requests)
    check = newest(samples.split_rows(schema.VALIDATION), config.validation_requests)

    def step(chosen: np.ndarray, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = samples.batch(chosen)
        batch.inputs.ad_fields = hide_ids(batch.inputs.ad_fields, config.hidden_ids, noise)
        with device.autocast():
            return pretrain_loss(network, batch, config), {}

    return run_stage(
        "pretrain", network, parameters, config, rows, step, lambda: pretrain_metrics(network, samples, check, config.batch), folder,
        {**fingerprint, "config": asdict(config)}, device,
    )  # fmt: skip


@torch.no_grad()
def exposed_logits(network: RankingModel, samples: Samples, rows: np.ndarray, seen_in_city: int) -> ExposedLogits:
    """`ExposedLogits` of `rows`, `seen_in_city` of them among the whole city."""
    sampled = encode_exposed(network, samples, rows)
    few = spread(np.arange(len(rows)), seen_in_city)
    city = encode_exposed(network, samples, np.sort(rows)[few], whole_city=True)
    return ExposedLogits(
        *(sampled[name].double().numpy(force=True) for name in ("click_logit", "click")), sampled["mask"].numpy(force=True), few,
        city["click_logit"].double().numpy(force=True), city["mask"].numpy(force=True),
    )  # fmt: skip


def calibrate_clicks(network: RankingModel, samples: Samples, seen_in_city: int, of_order: bool = False) -> ExposedLogits:
    """Platt scaling on the validation days: slope and level of the click logit, which learned an order alone if `of_order`. Returns the validation
    days' logits as they are then.

    What a model says of pages that it was trained on is not what it says of new ones: it believes too much in what it learned by heart, which
    ranks q b too little by the bid, and noise in a logit raises the mean of a small probability. Histories grow with time, too.
    """
    seen = exposed_logits(network, samples, samples.split_rows(schema.VALIDATION), seen_in_city)
    slope = seen.slope(network.slot_logits().double().numpy(force=True), of_order)
    if not slope > 0:
        raise ValueError(f"calibration of pCTR: clicks of the validation days fall where the ranking score rises (slope {slope:.3g}); the network learned no order of clicks; train longer")
    level = seen.affine(slope, 0.0).level()
    network.scale_clicks(slope, level)
    return seen.affine(slope, level)


def logged_pages(pool: Pool, samples: Samples) -> np.ndarray:
    """Candidate positions [B, K] of the pages that were really shown; -1 where a slot was empty."""
    return np.stack([places_of(shown, rows) for shown, rows in zip(samples.candidate[pool.requests, : samples.slots], pool.ad_rows, strict=True)])


def places_of(wanted: np.ndarray, ad_rows_N: np.ndarray) -> np.ndarray:
    """Where each of `wanted` (ad rows; -1: none) lies in ascending `ad_rows_N`, whose padding (-1) comes last; -1 where it does not."""
    real = ad_rows_N[ad_rows_N >= 0]
    if len(real) == 0:
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(real, wanted), len(real) - 1)
    return np.where((wanted >= 0) & (real[at] == wanted), at, -1)


def newest(rows: np.ndarray, count: int) -> np.ndarray:
    """The last `count` rows (samples are in time order); all when count is 0."""
    return rows[-count:] if count else rows


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows, evenly over time, all when count is 0: what stands on one day would stand on that day's chance."""
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)] if 0 < count < len(rows) else rows


# ---------------------------------------------------------------------------------------------------------------------
# Frozen representations for the later stages


def ahead(work: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """`work` on every item without gradients, results in order, a few items ahead of the reader.

    As many Python threads as PyTorch has, each computing with one: products this small gain nothing from being split, and a result
    that one thread computed does not depend on how many work beside it. A GPU works through its queue by itself.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1

    def one(item: Any) -> Any:
        with torch.no_grad():
            return work(item)

    if threads == 1:
        yield from map(one, items)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[Any]] = deque()
            for item in items:
                waiting.append(pool.submit(one, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)


MOST_TOKENS = 1 << 20
"""Ads times requests that go through the network together: 10 requests of 100,000 ads are half a gigabyte a tensor at the paper's width, and four times that in a
feed-forward layer."""


def city_batches(samples: Samples, rows: np.ndarray, batch: int = 32) -> Iterator[tuple[np.ndarray, City, Batch]]:
    """Requests [B] of one day and city, with that city and the inputs for its whole active catalogue; fewer than `batch` where a city is large."""
    order = rows[np.lexsort((rows, samples.city_code[rows], samples.day[rows]))]
    place = np.stack([np.asarray(samples.day[order]), np.asarray(samples.city_code[order])], 1)
    ends = np.flatnonzero((place[1:] != place[:-1]).any(1)) + 1
    for group in np.split(order, ends) if len(order) else ():
        city = samples.city(int(samples.day[group[0]]), int(samples.city_code[group[0]]))
        step = max(1, min(batch, MOST_TOKENS // max(1, len(city.rows))))
        for start in range(0, len(group), step):
            requests = group[start : start + step]
            yield requests, city, samples.inputs(requests, city.rows[None], np.ones((1, len(city.rows)), bool))


@torch.no_grad()
def encode_city(network: RankingModel, samples: Samples, rows: np.ndarray, candidates: int, seed: int, batch: int = 32) -> Pool:
    """The whole active city as candidates, as in serving; beyond `candidates` half are kept by q*b and half at random.

    The network always sees the whole city; only what is *kept* for the later stage is thinned.
    """
    network.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    keep = max((min(candidates, len(samples.city(d, c).rows)) for d, c in {(int(samples.day[r]), int(samples.city_code[r])) for r in rows}), default=0)
    draw = np.random.default_rng(seed)

    def encoded(group: tuple[np.ndarray, City, Batch]) -> tuple[Any, ...]:
        requests, city, inputs = group
        shown = samples.tensor(np.stack([places_of(page, city.rows) for page in samples.candidate[requests, : samples.slots]])).clamp(min=0)
        h, user, reached = network.survey(network.city_states(inputs.ad_fields, inputs.ad_mask), inputs, shown)
        return (*group, h, user, reached, *network.heads(h, user))

    for requests, city, inputs, h, user, reached, click, purchase in ahead(encoded, city_batches(samples, rows, batch), samples.device):
        bid = np.broadcast_to(city.bid, click.shape)
        chosen = _thin(torch.sigmoid(click).numpy(force=True) * bid, keep, draw)
        index = samples.tensor(chosen)
        parts.append((
            requests, *(x.numpy(force=True) for x in (take(h, index), user, torch.gather(click, 1, index), torch.gather(purchase, 1, index))),
            city.bid[chosen], city.reserve[chosen], city.rows[chosen], np.full(len(requests), city.unit), inputs.ad_fields[0, :, PAGE_COLUMNS].numpy(force=True)[chosen],
            torch.gather(reached, 1, index).numpy(force=True),
        ))  # fmt: skip
    columns = [_stack([part[i] for part in parts], keep) for i in range(11)]
    back = np.argsort(columns[0], kind="stable")
    requests, h, user, click, purchase, bid, reserve, ad_rows, unit, codes, mask = (column[back] for column in columns)
    real = ad_rows >= 0
    return Pool(
        requests, *(samples.tensor(x) for x in (h, codes * real[..., None], user, click, purchase)), samples.tensor(bid * real).float(), samples.tensor(reserve * real).float(),
        samples.tensor(mask), ad_rows, unit,
    )


def _thin(score: np.ndarray, keep: int, draw: np.random.Generator) -> np.ndarray:
    """Column indices [B, min(keep, N)], ascending: the better half by score, the rest at random."""
    batch, total = score.shape
    if total <= keep:
        return np.tile(np.arange(total), (batch, 1))
    key = draw.random((batch, total))
    best = np.argpartition(-score, keep // 2, axis=1)[:, : keep // 2]
    np.put_along_axis(key, best, -1.0, axis=1)
    return np.sort(np.argpartition(key, keep, axis=1)[:, :keep], axis=1)


def _stack(parts: list[np.ndarray], keep: int) -> np.ndarray:
    """Concatenate along requests; cities with fewer candidates are padded (ad rows with -1, the rest with 0)."""
    if parts[0].ndim == 1 or parts[0].shape[1] == parts[-1].shape[1] == keep and len({p.shape[1:] for p in parts}) == 1:
        return np.concatenate(parts)
    if len({p.shape[1:] for p in parts}) == 1:
        return np.concatenate(parts)
    fill = -1 if parts[0].dtype.kind == "i" else 0
    padded = [np.pad(p, [(0, 0), (0, keep - p.shape[1])] + [(0, 0)] * (p.ndim - 2), constant_values=fill) for p in parts]
    return np.concatenate(padded)


@torch.no_grad()
def encode_exposed(
    network: RankingModel, samples: Samples, rows: np.ndarray, whole_city: bool = False, batch: int = 128, shown: np.ndarray | None = None
) -> dict[str, Tensor]:
    """Frozen representations of the exposed pages of `rows`, in time order: h [R, K, D], codes [R, K, 2] and so on.

    The pages are seen among their sampled candidates, as in pre-training, or among the whole city, as in serving. `shown` [R, K] gives
    other pages (rows of the ad table, -1 none) for ascending `rows`, whole city only; clicks are then those of the logged pages.
    """
    network.eval()
    slots = samples.slots
    rows = np.sort(rows)
    pages = np.asarray(samples.candidate[rows, :slots]) if shown is None else shown
    Part = tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor]

    def in_city(group: tuple[np.ndarray, City, Batch]) -> Part:
        requests, city, inputs = group
        page = samples.tensor(np.stack([places_of(ads, city.rows) for ads in pages[np.searchsorted(rows, requests)]]))
        h, user = network.encode(inputs, page.clamp(min=0))
        return requests, h, user, page >= 0, take(inputs.ad_fields[..., PAGE_COLUMNS].expand(len(page), -1, -1), page.clamp(min=0))

    def in_sample(chosen: np.ndarray) -> Part:
        b = samples.batch(chosen)
        h, user = network.encode(b.inputs)
        return chosen, h[:, :slots].contiguous(), user, b.exposed[:, :slots], b.inputs.ad_fields[:, :slots, PAGE_COLUMNS]

    if whole_city:
        parts = list(ahead(in_city, city_batches(samples, rows), samples.device))
    else:
        parts = list(ahead(in_sample, (rows[start : start + batch] for start in range(0, len(rows), batch)), samples.device))
    order = samples.tensor(np.argsort(np.concatenate([part[0] for part in parts]), kind="stable"))
    h, user, mask, codes = (torch.cat([part[i] for part in parts])[order] for i in (1, 2, 3, 4))
    click, purchase = network.heads(h, user)
    labels = {name: samples.tensor(np.asarray(getattr(samples, name)[rows, :slots])).float() for name in ("click", "purchase")}
    return {"h": h, "codes": codes * mask.unsqueeze(-1), "user": user, "click_logit": click, "purchase_logit": purchase, "mask": mask, **labels}


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2

PAGE_INPUTS = ("h", "codes", "user", "click_logit", "purchase_logit", "mask")
"""What an evaluator reads of `encode_exposed`, in its order."""


def train_reward(
    network: RankingModel, samples: Samples, config: RewardConfig, which: Literal["reward", "evaluation"], folder: Path, device: Device,
    fingerprint: dict[str, Any],
) -> StageResult:
    """Stage 2 (Eq. 21). The two evaluators learn from alternate training days, all of them, so their errors are not shared."""
    parameters = network.enter_stage(which)
    evaluator: Evaluator = network.evaluator if which == "reward" else network.evaluation_evaluator
    train = samples.split_rows(schema.TRAIN)
    days = np.unique(samples.day[train])
    mine = days[(0 if which == "reward" else 1) :: 2] if len(days) > 1 else days
    rows = spread(train[np.isin(samples.day[train], mine)], config.requests)
    # Among the whole city, as the policy's pages will be seen: an evaluator trained among sampled candidates misjudged those by a quarter.
    data = encode_exposed(network, samples, rows, whole_city=True)
    check = encode_exposed(network, samples, spread(samples.split_rows(schema.VALIDATION), config.validation_requests), whole_city=True)
    impressions = int(data["mask"].sum())

    def step(chosen: np.ndarray, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        i = samples.tensor(chosen)
        mask = data["mask"][i]
        page = {name: data[name][i] for name in PAGE_INPUTS}
        hidden = torch.rand(page["codes"].shape, generator=noise).to(samples.device) < config.hidden_ids
        page["codes"] = torch.where(hidden, page["codes"].clamp(max=schema.UNKNOWN), page["codes"])
        click, purchase = evaluator(*page.values())
        loss = masked_bce(click, data["click"][i], mask) + config.purchase_weight * masked_bce(purchase, data["purchase"][i], mask)
        return loss + evaluator.examination_prior(config.examination_deviation) / impressions, {}

    def validate() -> dict[str, float]:
        return reward_metrics(evaluator, check)

    result = run_stage(which, network, parameters, config, np.arange(len(rows)), step, validate, folder, {**fingerprint, "config": asdict(config)}, device)
    with torch.no_grad():  # the level that the set-aware pCTR has on these pages: it stands on the clicks of all validation requests
        logit, _ = evaluator(*(check[name] for name in PAGE_INPUTS))
        level = float(torch.sigmoid(check["click_logit"])[check["mask"]].double().mean())
        evaluator.level += level_for(logit[check["mask"]].double().numpy(force=True), level) / evaluator.EXAMINATION_GAIN
    return result


@torch.no_grad()
def reward_metrics(evaluator: Evaluator, data: dict[str, Tensor]) -> dict[str, float]:
    """AUC, log-loss and Dev of an evaluator on exposed pages beside those of the set-aware pCTR; `score` is -log-loss."""
    mask = data["mask"]
    logit, _ = evaluator(*(data[name] for name in PAGE_INPUTS))
    y, q, base = (x[mask].numpy(force=True) for x in (data["click"], torch.sigmoid(logit), torch.sigmoid(data["click_logit"])))
    return {
        "score": -log_loss(y, q), "auc": auc(y, q), "log_loss": log_loss(y, q), "dev": deviation(q, y),
        "set_auc": auc(y, base), "set_log_loss": log_loss(y, base),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3


def greedy_page(score_BNK: Tensor, mask_BN: Tensor, banned_BN: Tensor | None = None) -> Tensor:
    """Slot by slot argmax without repetition; [B, K] candidate positions, -1 when none is left."""
    free = mask_BN if banned_BN is None else mask_BN & ~banned_BN
    pages = []
    for slot in range(score_BNK.shape[-1]):
        value, best = score_BNK[..., slot].masked_fill(~free, float("-inf")).max(1)
        page = torch.where(torch.isfinite(value), best, -torch.ones_like(best))
        pages.append(page)
        free = free.scatter(1, best.unsqueeze(1), False)
    return torch.stack(pages, 1)


def sample_page(score_BNK: Tensor, mask_BN: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Plackett-Luce: a page [B, K] drawn slot by slot from the masked softmax over ads (Eq. 17's z, our reading), the log
    probabilities of its choices [B, K], and the mean entropy of the slots' distributions [B]."""
    free = mask_BN
    page, log_probability, entropy = [], [], []
    for slot in range(score_BNK.shape[-1]):
        left = free.any(1, keepdim=True)  # a city with fewer ads than slots runs out: position -1, which nothing was learnt from
        logp = torch.log_softmax(score_BNK[..., slot].masked_fill(~free & left, float("-inf")), -1)
        uniform = torch.rand(logp.shape, generator=noise).to(logp.device).clamp(1e-12, 1 - 1e-7)
        choice = (logp.detach() - torch.log(-torch.log(uniform))).argmax(1)
        page.append(torch.where(left[:, 0], choice, -1))
        log_probability.append(logp.gather(1, choice.unsqueeze(1)).squeeze(1) * left[:, 0])
        entropy.append(-(logp.exp() * logp.masked_fill(~free, 0.0)).sum(1))
        free = free.scatter(1, choice.unsqueeze(1), False)
    return torch.stack(page, 1), torch.stack(log_probability, 1), torch.stack(entropy, 1).mean(1)


def page_values(pool: Pool, pages: Tensor, evaluator: Evaluator) -> Tensor:
    """Sum of b*q over the ads of pages [B, K] or [B, P, K] under an evaluator, in units of the median bid."""
    logit, _ = page_logits(evaluator, pool, pages)
    index = pages.clamp(min=0).reshape(len(pages), -1)
    bid = torch.gather(pool.bid, 1, index).reshape(pages.shape) * (pages >= 0)
    return (torch.sigmoid(logit) * bid).sum(-1)


def separable_scores(network: EgaV1, pool: Pool, weight: Tensor) -> Tensor:
    """Scores with A = M = 0: the ranking by q*b, [B, N, K]."""
    return (weight.exp() * torch.sigmoid(pool.click) * pool.bid).unsqueeze(-1).expand(-1, -1, network.config.slots)


def generator_scores(network: EgaV1, pool: Pool) -> Tensor:
    """Eq. 17 scores of the current generator for a pool, [B, N, K]."""
    affinity, slopes = network.generator(pool.h, pool.mask, pool.user)
    return allocation_scores(torch.sigmoid(pool.click), pool.bid, affinity, slopes)


def train_rlaf(network: EgaV1, samples: Samples, config: RlafConfig, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    """Stage 3 (Eq. 22-23): policy gradient with marginal rewards; stops on the evaluation evaluator, not on the training one."""
    parameters = network.enter_stage("rlaf")
    pool = encode_city(network, samples, newest(samples.split_rows(schema.TRAIN), config.requests), config.candidates, config.seed)
    check = encode_city(network, samples, newest(samples.split_rows(schema.VALIDATION), config.validation_requests), config.candidates, config.seed + 1)
    reference = network.generator.weight().detach().clone()

    def step(chosen: np.ndarray, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = pool.take(chosen)
        score = generator_scores(network, batch)
        page, logp, entropy = sample_page(score, batch.allowed, noise)
        with torch.no_grad():
            reward = marginal_rewards(network, batch, score, page)
        centred = (reward - reward.mean()) / reward.std().clamp(min=1e-6)
        loss = -(centred * logp).sum(1).mean() - config.entropy * entropy.mean()
        if config.kl:
            base = separable_scores(network, batch, reference).masked_fill(~batch.mask.unsqueeze(-1), float("-inf"))
            here = score.masked_fill(~batch.mask.unsqueeze(-1), float("-inf"))
            log_here, log_base = torch.log_softmax(here, 1), torch.log_softmax(base, 1)
            gap = (log_here - log_base).masked_fill(~batch.mask.unsqueeze(-1), 0.0)
            loss = loss + config.kl * (log_here.exp() * gap).sum(1).mean()
        return loss, {"reward": float(reward.sum(1).mean()), "w": float(network.generator.weight().detach())}

    def validate() -> dict[str, float]:
        return policy_metrics(network, check)

    return run_stage("rlaf", network, parameters, config, np.arange(len(pool.requests)), step, validate, folder, {**fingerprint, "config": asdict(config)}, device)


def marginal_rewards(network: EgaV1, batch: Pool, score: Tensor, page: Tensor) -> Tensor:
    """Eq. 22: value of the page minus the value of the page generated again without ad i; [B, K]."""
    without = []
    for slot in range(page.shape[1]):
        shown = page[:, slot : slot + 1]
        banned = torch.zeros_like(batch.mask).scatter(1, shown.clamp(min=0), shown >= 0)
        without.append(greedy_page(score, batch.allowed, banned))
    values = page_values(batch, torch.stack([page, *without], 1), network.evaluator)
    return values[:, :1] - values[:, 1:]


@torch.no_grad()
def policy_metrics(network: EgaV1, pool: Pool, batch: int = 256) -> dict[str, float]:
    """Bid-weighted clicks per page (eRPM at first price / 1000, in median bids) and clicks per page of the generator and of
    the separable ranking, under both evaluators; `score` is the generator's value under the evaluation evaluator."""
    totals: dict[str, float] = {}
    for start in range(0, len(pool.requests), batch):
        part = pool.take(np.arange(start, min(start + batch, len(pool.requests))))
        pages = {
            "generator": greedy_page(generator_scores(network, part), part.allowed),
            "separable": greedy_page(separable_scores(network, part, network.generator.weight()), part.allowed),
        }
        for policy, page in pages.items():
            for judge, evaluator in (("reward", network.evaluator), ("evaluation", network.evaluation_evaluator)):
                key = f"{policy}_{judge}"
                totals[key] = totals.get(key, 0.0) + float(page_values(part, page, evaluator).sum())
    metrics = {name: value / len(pool.requests) for name, value in totals.items()}
    return {"score": metrics["generator_evaluation"], **metrics}


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4


def misreports(pages: Pages, factors: tuple[float, ...]) -> np.ndarray:
    """Trial bids [B, K, G+K]: factors of the value, and just above the threshold of every slot, where shading ends."""
    scaled = pages.bid[:, :, None] * np.asarray(factors)
    edge = np.maximum(np.where(np.isfinite(pages.theta), pages.theta, 0.0), pages.reserve[:, :, None]) * (1 + 1e-6)
    return np.concatenate([scaled, np.where(edge > 0, edge, pages.bid[:, :, None])], 2)


def regret_of(price: Tensor, trial_price: Tensor, truth: Bidding, trials: Bidding) -> tuple[Tensor, Tensor]:
    """Truthful utility and ex-post regret [B, K] of displayed ads whose value is their bid, page regenerated.

    price [B, K, 1], trial_price [B, K, T]; units: median bids per request.
    """
    value = torch.from_numpy(truth.bid).float()
    utility = ((value - price) * torch.from_numpy(truth.ctr).float())[..., 0]
    other = (value - trial_price) * torch.from_numpy(trials.ctr).float()
    return utility, torch.relu(other.max(-1).values - utility)


def payment_loss(network: EgaV1, batch: Pool, config: PaymentConfig, multipliers: Tensor, budget: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Eq. 24 on a batch; moves the multipliers lambda [K] by rho * regret, or by the schedule of log_budget, and `budget` [] with it.

    Amounts are divided by the batch's mean bid-weighted clicks a page, so rho and lambda mean the same in every market.
    """
    pages = allocate(network, batch)
    truth, trials = truthful(batch, pages), try_bids(batch, pages, misreports(pages, config.misreports))
    price, trial_price = (learned_prices(network, batch, pages, bidding).cpu() for bidding in (truth, trials))  # money is counted where the auction is
    _, regret = regret_of(price, trial_price, truth, trials)
    clicks = torch.from_numpy(pages.ctr).float()
    scale = float((clicks * torch.from_numpy(pages.bid).float()).sum(1).mean())
    revenue = (price[..., 0] * clicks).sum(1).mean() / scale
    per_slot = regret.mean(0) * network.config.slots / scale
    loss = -(revenue - (multipliers.clone() * per_slot).sum() / network.config.slots)
    with torch.no_grad():
        if config.schedule == "lagrangian":
            multipliers.add_(config.rho * per_slot)
        else:
            over = (per_slot.mean() / revenue.clamp(min=1e-9)).clamp(min=1e-6) / budget
            multipliers.add_(0.1 * config.rho * torch.log(over)).clamp_(min=0.0)
            first, last = config.budget
            budget.mul_((last / first) ** (1 / max(config.steps, 1))).clamp_(min=last)
    if config.schedule == "lagrangian":
        loss = loss + config.rho / 2 * per_slot.square().mean()
    return loss, {"revenue": float(revenue.detach()), "regret": float(per_slot.detach().mean())}


def train_payment(network: EgaV1, samples: Samples, config: PaymentConfig, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    """Stage 4 (Eq. 24): revenue minus lambda*rgt minus rho/2*rgt^2 with the page regenerated under every misreport."""
    parameters = network.enter_stage("payment")
    pool = encode_city(network, samples, newest(samples.split_rows(schema.TRAIN), config.requests), config.candidates, config.seed)
    check = encode_city(network, samples, newest(samples.split_rows(schema.VALIDATION), config.validation_requests), config.candidates, config.seed + 1)
    multipliers = torch.full((network.config.slots,), config.multiplier)
    budget = torch.tensor(config.budget[0])

    def step(chosen: np.ndarray, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return payment_loss(network, pool.take(chosen), config, multipliers, budget)

    def validate() -> dict[str, float]:
        return payment_metrics(network, check, config)

    return run_stage(
        "payment", network, parameters, config, np.arange(len(pool.requests)), step, validate, folder, {**fingerprint, "config": asdict(config)}, device,
        extra_state={"multipliers": multipliers, "budget": budget},
    )  # fmt: skip


@torch.no_grad()
def payment_metrics(network: EgaV1, pool: Pool, config: PaymentConfig, batch: int = 64) -> dict[str, float]:
    """Revenue over truthful revenue, and regret over utility (winners, the trials of training) of the payment network.

    `score` is -psi/target until psi meets its target, then the revenue share: first honest, then profitable.
    """
    sums = np.zeros(4)
    for start in range(0, len(pool.requests), batch):
        part = pool.take(np.arange(start, min(start + batch, len(pool.requests))))
        pages = allocate(network, part)
        truth, trials = truthful(part, pages), try_bids(part, pages, misreports(pages, config.misreports))
        price, trial_price = (learned_prices(network, part, pages, bidding).cpu() for bidding in (truth, trials))
        utility, regret = regret_of(price, trial_price, truth, trials)
        sums += [float((price[..., 0].numpy() * pages.ctr).sum()), float((pages.critical * pages.ctr).sum()), float(regret.sum()), float(utility.sum())]
    revenue_share = sums[0] / sums[1] if sums[1] > 0 else float("nan")
    psi = sums[2] / sums[3] if sums[3] > 0 else float("nan")
    return {"score": revenue_share if psi <= config.psi_target else -psi / config.psi_target, "revenue_share": revenue_share, "psi": psi}
