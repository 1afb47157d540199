"""Stages of EGA (V2) on request samples, for `model.training.run`: which rows, which inputs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from marketplace import schema
from model.ega_v2.data import PageData, place_index, require_pages
from model.ega_v2.model import EgaV2Model, audiences
from model.ega_v2.network import RewardModel
from model.ega_v2.payment import Audit, audit, joined, train_payment
from model.ega_v2.stages import V2TrainingConfig, pretrain, train_reward, train_rlaf
from model.training.data import Samples
from model.training.loop import Device, StageResult


def run_stage(stage: str, model: EgaV2Model, samples: Samples, config: V2TrainingConfig, folder: Path, device: Device, fingerprint: dict[str, Any]) -> StageResult:
    """Train one stage; the best weights are in `model` afterwards."""
    if stage == "tokenize":
        return tokenize(model, samples, config)
    data = PageData(samples, model)
    train, validation = samples.split_rows(schema.TRAIN), samples.split_rows(schema.VALIDATION)
    if stage == "pretrain":
        slots = model.core.config.slots
        return pretrain(model.core, data.sequences(train, slots), data.sequences(validation, slots), config.pretrain, folder, fingerprint, device)
    if stage in ("reward", "evaluation"):
        # As of EGA-V1's evaluators: each learns from every other day, so that their errors are not shared.
        days = np.unique(samples.day[train])
        mine = train[np.isin(samples.day[train], days[(0 if stage == "reward" else 1) :: 2] if len(days) > 1 else days)]
        own = config.reward if stage == "reward" else config.evaluation
        return train_reward(
            model.core, model.core.reward if stage == "reward" else model.evaluation, model.enter_stage(stage), lambda rows: (data.history(rows), data.logged_pages(rows)),
            mine[-own.requests :] if own.requests else mine, validation[-own.validation_requests :], validation, stage, own, folder, fingerprint, device,
        )  # fmt: skip
    if stage == "payment":
        own = config.payment
        return train_payment(
            model.core, audited(data, train[-own.requests :], own.misreports, own.losers), audited(data, validation[-own.validation_requests :], own.misreports, own.losers),
            own, folder, fingerprint, device,
        )  # fmt: skip
    rlaf = config.rlaf
    return train_rlaf(
        model.core, model.enter_stage("rlaf"), lambda rows: data.groups(rows, samples.slots), train[-rlaf.requests :] if rlaf.requests else train,
        validation[-rlaf.validation_requests :], model.core.config.slots, model.config.ega_v2.search, rlaf, folder, fingerprint, device,
    )  # fmt: skip


def audited(data: PageData, rows: np.ndarray, factors: tuple[float, ...], losers: int, judge: RewardModel | None = None) -> Audit:
    """Requests regenerated for every trial bid of every displayed ad and of `losers` others; ordered by day and city, as `data.groups`."""
    samples, network = data.samples, data.model.core
    found = []
    for mine, history, catalogue, offers, features in tqdm(list(data.groups(rows, samples.slots)), desc="trial bids", unit="day", disable=not sys.stderr.isatty()):
        city = data.city_offers(int(samples.day[mine[0]]), int(samples.city_code[mine[0]])).city
        found.append(
            audit(network, history, catalogue, offers, features, torch.from_numpy(city.reserve), samples.slots, factors, data.model.config.ega_v2.search, losers, judge)
        )
    return joined(found)


def tokenize(model: EgaV2Model, samples: Samples, config: V2TrainingConfig) -> StageResult:
    """Stage 1: codebooks of places and creatives; the gate on their health raises TokenizerError."""
    require_pages(samples, model)
    train = samples.split_rows(schema.TRAIN)
    behaviour = np.asarray(samples.behaviour_place[train])
    # A visit stands in the histories of several requests: each (user, place) of the newest history counts as often as it does there.
    _, newest = np.unique(np.asarray(samples.user_id[train])[::-1], return_index=True)
    newest = len(train) - 1 - newest
    user, at = np.nonzero(behaviour[newest] >= 0)
    index, places = place_index(samples), len(samples.place_id)
    who = audiences(np.asarray(samples.user_id[train])[newest][user], behaviour[newest][user, at], places, config.tokenize.seed)
    known = np.flatnonzero(index >= schema.FIRST_CODE)
    found = model.fit_tokenizers(
        index[known], np.asarray(samples.place_category)[known], np.asarray(samples.place_position)[known], who[known], samples.creative_embedding, config.tokenize.seed
    )
    history = [{"step": 0, "score": 0.0, **{f"{what}_{name}": value for what, health in found.items() for name, value in asdict(health).items()}}]
    return StageResult("tokenize", history, best_step=0, best_score=0.0, steps=0)
