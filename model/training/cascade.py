"""Training of the cascades: recall and pre-ranking, ranking by the loss of EGA-V1's stage 1, and FS-LTR's stage labels.

Shape letters: B requests, M sampled candidates, N ads of a city.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from marketplace import schema
from model.cascade.network import TOWERS, Cascade
from model.ega_v1.network import Batch
from model.evaluation.metrics import recall_at
from model.layers import in_float32
from model.training.data import Samples, TrainingBatch
from model.training.loop import Device, StageResult, run_stage
from model.training.stages import (
    PretrainConfig,
    RelabelConfig,
    TowerConfig,
    ahead,
    calibrate_clicks,
    city_batches,
    hide_ids,
    learn_clicks,
    newest,
    places_of,
    pretrain_metrics,
)


def tower_loss(scores_BM: Tensor, batch: TrainingBatch) -> Tensor:
    """Softmax cross-entropy of each chosen ad against all that were not chosen, estimated from the sample.

    An unexposed ad that was not chosen is in the sample with probability pi and stands for 1/pi of its kind; exposed ads stand for
    themselves. Mean over the chosen ads; 0 when nothing was chosen.
    """
    chosen = (batch.click > 0) & batch.inputs.ad_mask
    others = batch.inputs.ad_mask & ~chosen
    logits = scores_BM - torch.where(batch.exposed | chosen, 0.0, batch.log_inclusion)
    rest = logits.masked_fill(~others, float("-inf")).logsumexp(1, keepdim=True)
    losses = torch.logaddexp(rest.expand_as(logits), logits) - logits
    return torch.where(chosen, losses, 0.0).sum() / chosen.sum().clamp(min=1)


@torch.no_grad()
def tower_metrics(network: Cascade, stage: str, samples: Samples, rows: np.ndarray, k: int) -> dict[str, float]:
    """Recall@k over the whole city of what users chose elsewhere in the session, by the scores of one tower; ads that are not active
    count as missed by nobody. `score` is that recall, 0 when there is nothing to find."""
    recalls = []
    for requests, city, inputs in city_batches(samples, rows, 128):
        scores = network.tower_scores(stage, inputs).numpy(force=True)
        targets = [places[places >= 0] for places in (places_of(np.asarray(target), city.rows) for target in samples.target[requests])]
        recalls.append(recall_at(scores, targets, k))
    values = np.concatenate(recalls)
    value = float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
    return {"score": value, f"recall_at_{k}": value}


def train_tower(network: Cascade, samples: Samples, config: TowerConfig, stage: str, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    """Recall or pre-ranking by itself, as cascades are trained."""
    parameters = network.enter_stage(stage)
    rows = newest(samples.split_rows(schema.TRAIN), config.requests)
    check = newest(samples.split_rows(schema.VALIDATION), config.validation_requests)

    def step(chosen: np.ndarray, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = samples.batch(chosen)
        batch.inputs.ad_fields = hide_ids(batch.inputs.ad_fields, config.hidden_ids, noise)
        with device.autocast():
            return tower_loss(network.tower_scores(stage, batch.inputs), batch), {}

    def validate() -> dict[str, float]:
        return tower_metrics(network, stage, samples, check, config.recall_at)

    return run_stage(stage, network, parameters, config, rows, step, validate, folder, {**fingerprint, "config": asdict(config)}, device)


def rank_stage(network: Cascade, samples: Samples, config: PretrainConfig, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    """DIN by the loss, the data, the budget and the calibration of EGA-V1's stage 1."""
    result = learn_clicks(network, samples, config, folder, device, fingerprint)
    calibrate_page(network, samples, config)
    return result


def calibrate_page(network: Cascade, samples: Samples, config: PretrainConfig, of_order: bool = False) -> None:
    """Calibrate q, and freeze the slots' terms at the level where mean pCTR in the slots equals CTR on the validation days.

    Prices and predicted revenue read q in its slot, and where better ads stand in better slots its mean is above that of q alone.
    Purchases keep the terms that they were learned with.
    """
    seen = calibrate_clicks(network, samples, config.calibration_requests, of_order)
    network.freeze_slots()
    network.evaluator.slot[0] += seen.level(network.evaluator.slot[0].double().numpy(force=True))


CLICKED, SHOWN, RANKED_HIGH, RANKED_LOW, COARSE, PRERANK_NEGATIVE = 6, 5, 4, 3, 2, 1
"""Priorities of FS-LTR: what happened to an ad. Ranked ads are split at the median of the ranking score."""


@torch.no_grad()
def priorities(network: Cascade, samples: Samples, rows: np.ndarray) -> np.ndarray:
    """[R, M] what the cascade `network` does with every sampled candidate of `rows` (ascending), whatever was logged of it; 0 padding.

    Clicked or chosen ads 6, shown ones 5; of the rest: handed to ranking 4 (upper half by score) or 3, stopped by
    pre-ranking 2, not recalled 1.
    """
    network.eval()
    result = np.zeros((len(rows), samples.candidate.shape[1]), np.int8)

    def labelled(group: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
        requests, city, inputs = group
        states = network.city_states(inputs.ad_fields, inputs.ad_mask)
        recalled, ranked = network.handed_on(states, inputs)
        candidate = samples.candidate[requests]
        place = np.stack([places_of(row, city.rows) for row in candidate])
        at = samples.tensor(place).clamp(min=0)
        logit = network.click_head(*network.encode_from(states, inputs, at))
        real = place >= 0
        in_recall, in_rank = (torch.gather(mask, 1, at).numpy(force=True) & real for mask in (recalled, ranked))
        score = np.where(in_rank, logit.numpy(force=True), np.nan)
        with np.errstate(all="ignore"):
            middle = np.nanmedian(np.where(in_rank.any(1, keepdims=True), score, 0.0), axis=1, keepdims=True)
        label = np.where(in_rank, np.where(np.nan_to_num(score, nan=-np.inf) >= middle, RANKED_HIGH, RANKED_LOW), np.where(in_recall, COARSE, PRERANK_NEGATIVE))
        label[:, : samples.slots] = SHOWN
        label[np.asarray(samples.click[requests]) > 0] = CLICKED
        label[candidate < 0] = 0
        return requests, label

    for requests, label in ahead(labelled, city_batches(samples, rows), samples.device):
        result[np.searchsorted(rows, requests)] = label
    return result


def pairwise_loss(score_BM: Tensor, priority_BM: Tensor) -> Tensor:
    """Mean over requests of the mean of softplus(s_j - s_i) over all pairs with priority_i > priority_j > 0 (FS-LTR)."""
    higher = (priority_BM.unsqueeze(2) > priority_BM.unsqueeze(1)) & (priority_BM > 0).unsqueeze(1)
    losses = F.softplus(score_BM.unsqueeze(1) - score_BM.unsqueeze(2)) * higher
    pairs = higher.sum((1, 2))
    return (losses.sum((1, 2)) / pairs.clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)


def train_relabel(
    network: Cascade, samples: Samples, config: RelabelConfig, pretraining: PretrainConfig, folder: Path, device: Device, fingerprint: dict[str, Any]
) -> StageResult:
    """FS-LTR: each network learns the order of what the trained cascade did with the sampled ads; then pCTR gets its scale back.

    The networks share nothing, so each is trained by itself and keeps the weights with the best score of its own: Recall@k of a tower, and of DIN
    what `pretrain` is judged by. Step 0 is among them. The result is DIN's, the towers' are its parts.
    """
    rows = newest(samples.split_rows(schema.TRAIN), config.requests)
    check = newest(samples.split_rows(schema.VALIDATION), config.validation_requests)
    priority = samples.tensor(priorities(network, samples, rows))
    place = {int(row): index for index, row in enumerate(rows)}

    def scores(part: str, batch: Batch) -> Tensor:
        return network.tower_scores(part, batch) if part in TOWERS else in_float32(network.click_head, *network.encode(batch))

    def train(part: str, validate: Callable[[], dict[str, float]]) -> StageResult:
        def step(chosen: np.ndarray, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            batch = samples.batch(chosen)
            batch.inputs.ad_fields = hide_ids(batch.inputs.ad_fields, config.hidden_ids, noise)
            with device.autocast():
                return pairwise_loss(scores(part, batch.inputs), priority[[place[int(row)] for row in batch.requests]]), {}

        parameters = network.enter_stage("relabel" if part not in TOWERS else part)
        return run_stage(f"relabel {part}", network, parameters, config, rows, step, validate, folder / part, {**fingerprint, "config": asdict(config)}, device)

    towers = {part: train(part, partial(tower_metrics, network, part, samples, check, config.recall_at)) for part in TOWERS}
    result = train("ranking", lambda: pretrain_metrics(network, samples, check, config.batch))
    if result.best_step > 0:  # else DIN is MCA's, and calibrated
        calibrate_page(network, samples, pretraining, of_order=True)  # a pairwise loss leaves level and spread of a score free
    return replace(result, stage="relabel", parts=towers)
