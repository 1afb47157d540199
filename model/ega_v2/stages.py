"""Training stages of EGA (V2): tokenize, pretrain, reward, rlaf (policy gradient) and payment.

Shape letters: B requests, K slots, C codes of a POI, E codes of a creative. Equation numbers are V2's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor, nn

from model.ega_v2.allocation import ItemFeatures, allocate, page_values
from model.ega_v2.beam import Catalogue, Offers, Pages, log_chances, search
from model.ega_v2.config import SearchConfig
from model.ega_v2.network import Decoding, EgaV2, History, Memory, RewardModel, Rewards, generation_losses
from model.ega_v2.payment import PaymentConfig
from model.ega_v2.tokenizer import Features, Tokenizer, TokenizerConfig, TokenizerError, fit, require_healthy
from model.evaluation.metrics import auc, deviation, log_loss
from model.layers import masked_bce
from model.training.loop import Device, LoopConfig, StageResult, run_stage

if TYPE_CHECKING:
    from model.ega_v2.data import LoggedPages

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@config_dataclass(frozen=True, config=_STRICT)
class PretrainConfig(LoopConfig):
    """Stage 2: the generator learns which pages follow which histories."""

    learning_rate: float = Field(2.4e-3, gt=0)
    """Adam's peak rate (paper 2.4e-3)."""
    creative_weight: float = Field(1.0, ge=0)
    """Weight of L_MTP beside L_NTP (paper: 1)."""


@dataclass(frozen=True)
class Sequences:
    """Requests and the pages that the generator shall learn to write; codes -1: empty slot, or no creative."""

    history: History
    poi: Tensor
    """[B, K, C]"""
    creative: Tensor
    """[B, K, E]"""

    def __len__(self) -> int:
        return len(self.poi)

    def take(self, rows: np.ndarray) -> Sequences:
        """Some of the requests, without the slots behind the longest of their pages: most users choose few things."""
        index = torch.from_numpy(rows)
        poi, creative = self.poi[index], self.creative[index]
        longest = max(1, int((poi[:, :, 0] >= 0).any(0).sum()))
        return Sequences(History(*(values[index] for values in vars(self.history).values())), poi[:, :longest], creative[:, :longest])


def tokenize(features_NF: Features, config: TokenizerConfig, folder: Path) -> Tokenizer:
    """Stage 1: fit a tokenizer on a catalogue, let it pass its health gate, and keep it in `folder`; one that lies there already is used.

    Raises TokenizerError where the gate fails, or where the folder holds a tokenizer of another configuration.
    """
    if Path(folder).exists():
        tokenizer = Tokenizer.load(folder)
        if tokenizer.config != config:
            raise TokenizerError(f"{folder} holds a tokenizer of another configuration; codes of two tokenizers do not mix: use a new folder")
    else:
        tokenizer = fit(features_NF, config)
        require_healthy(tokenizer)
        tokenizer.save(folder)
    return tokenizer


def pretrain(
    network: EgaV2, training: Sequences, validation: Sequences, config: PretrainConfig, folder: Path, fingerprint: dict[str, Any], device: Device
) -> StageResult:
    """Stage 2: L_NTP + L_MTP (Eq. 27-29). Resumed from `folder` it gives the same bytes; `fingerprint` names the data."""
    parameters = network.enter_stage("pretrain")

    def step(rows: np.ndarray, _: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = training.take(rows)
        with device.autocast():
            logits = network.page_logits(network.encode(batch.history), batch.poi, batch.creative)
        ntp, mtp = generation_losses(logits, batch.poi, batch.creative)
        return ntp + config.creative_weight * mtp, {"ntp": float(ntp.detach()), "mtp": float(mtp.detach())}

    check = validation.take(np.arange(max(0, len(validation) - config.validation_requests), len(validation)))
    first = max(0, len(training) - config.requests) if config.requests else 0
    return run_stage(
        "pretrain", network, parameters, config, np.arange(first, len(training)), step, lambda: pretrain_metrics(network, check, config), folder,
        {**fingerprint, "config": asdict(config)}, device,
    )  # fmt: skip


@torch.no_grad()
def pretrain_metrics(network: EgaV2, data: Sequences, config: PretrainConfig) -> dict[str, float]:
    """L_NTP and L_MTP, and the share of POIs and creatives all of whose codes are the likeliest, given the true ones before. `score` is -loss."""
    sums = np.zeros(4)
    counts = np.zeros(4)
    for start in range(0, len(data), config.batch):
        part = data.take(np.arange(start, min(start + config.batch, len(data))))
        logits = network.page_logits(network.encode(part.history), part.poi, part.creative)
        codes = [(table, code, code >= 0) for table, code in ((logits.poi, part.poi), (logits.creative, part.creative))]
        losses = generation_losses(logits, part.poi, part.creative)
        right = [((table.argmax(-1) == code) & real).all(-1).sum() for table, code, real in codes]
        many = [real.sum() for _, _, real in codes]
        sums += [float(losses[0] * many[0]), float(losses[1] * many[1]), float(right[0]), float(right[1])]
        counts += [float(many[0]), float(many[1]), *(float(real.all(-1).sum()) for _, _, real in codes)]
    ntp, mtp, poi, creative = (sums / np.maximum(counts, 1)).tolist()
    return {"score": -(ntp + config.creative_weight * mtp), "ntp": ntp, "mtp": mtp, "poi_accuracy": poi, "creative_accuracy": creative}


@config_dataclass(frozen=True, config=_STRICT)
class RewardConfig(LoopConfig):
    """Stage 3: the reward model on logged pages, encoder frozen."""

    purchase_weight: float = Field(0.2, ge=0)
    """Weight of the purchase task."""
    creative_weight: float = Field(0.2, ge=0)
    """Weight of the task of opening the creative."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay."""


def train_reward(
    network: EgaV2, model: RewardModel, parameters: list[nn.Parameter], pages: Callable[[np.ndarray], tuple[History, LoggedPages]], rows: np.ndarray, check: np.ndarray, levels: np.ndarray, stage: str,
    config: RewardConfig, folder: Path, fingerprint: dict[str, Any], device: Device,
) -> StageResult:  # fmt: skip
    """Stage 3: clicks on POIs and creatives and purchases of logged pages. `pages` gives histories and pages of request rows; `levels` are those that the
    level of the predictions stands on in the end."""

    def losses(chosen: np.ndarray) -> tuple[Tensor, Rewards, LoggedPages]:
        history, page = pages(chosen)
        with torch.no_grad():
            memory = network.encode(history)
        found = model(memory, page.items)
        ads = page.mask & ~page.items.organic
        loss = masked_bce(found.poi_click, page.click, page.mask)
        loss = loss + config.creative_weight * masked_bce(found.creative_click, page.creative_click, ads)
        return loss + config.purchase_weight * masked_bce(found.purchase, page.purchase, ads & (page.click > 0)), found, page

    def step(chosen: np.ndarray, _: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with device.autocast():
            return losses(chosen)[0], {}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        logits, clicks = [], []
        for start in range(0, len(check), config.batch):
            _, found, page = losses(check[start : start + config.batch])
            ads = page.mask & ~page.items.organic
            logits.append(found.poi_click[ads])
            clicks.append(page.click[ads])
        q, y = torch.sigmoid(torch.cat(logits)).double().numpy(), torch.cat(clicks).numpy()
        return {"score": -log_loss(y, q), "log_loss": log_loss(y, q), "auc": auc(y, q), "dev": deviation(q, y)}

    result = run_stage(stage, network, parameters, config, rows, step, validate, folder, {**fingerprint, "config": asdict(config)}, device)
    _set_level(model, losses, levels, config.batch)
    return result


@torch.no_grad()
def _set_level(model: RewardModel, read: Callable[[np.ndarray], tuple[Tensor, Rewards, LoggedPages]], rows: np.ndarray, batch: int) -> None:
    """Shift the logit of clicks so that predictions on the ads of `rows` sum to their clicks: prices multiply them. As of EGA-V1's evaluators the level
    stands on days that trained nothing else; rows without a click leave it as it is."""
    from model.training.calibration import level_for  # here: it needs scipy, which the service goes without

    logits, clicks = [], 0.0
    for start in range(0, len(rows), batch):
        _, found, page = read(rows[start : start + batch])
        ads = page.mask & ~page.items.organic
        logits.append(found.poi_click[ads].double())
        clicks += float(page.click[ads].sum())
    if clicks == 0:
        return
    logit = torch.cat(logits).numpy()
    model.towers[0].layers[-1].bias += level_for(logit, clicks / len(logit))


@config_dataclass(frozen=True, config=_STRICT)
class RlafConfig(LoopConfig):
    """Stage 4: the generator learns from the reward model's reading of the pages that the search proposes."""

    steps: int = Field(40, ge=0)
    """Most optimiser steps."""
    batch: int = Field(16, ge=1)
    """Requests a step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Adam's peak rate."""
    validate_every: int = Field(10, ge=1)
    """Steps between validations."""
    requests: int = Field(1024, ge=0)
    """Training requests used, newest first; 0: all."""
    validation_requests: int = Field(64, ge=1)
    """Validation requests used."""
    beams: int = Field(16, ge=2)
    """Pages proposed while training."""


def marginal_rewards(pages: Pages, value_BR: Tensor, worth_BRK: Tensor) -> Tensor:
    """What each ad of each page adds: the page's value less that of the best proposed page without the ad; where all proposed pages hold it, its own worth.

    Eq. 31, with the search's own pages as alternatives. Args: value_BR of pages; worth_BRK, bid * pCTR of each slot, 0 in organic and empty ones.
    """
    value = torch.where(torch.isfinite(pages.score), value_BR, -torch.inf)
    holds = (pages.ad[:, :, :, None, None] == pages.ad[:, None, None, :, :]).any(-1)  # [B, R, K, R']: does page R' hold the ad of slot K of page R
    best = torch.where(holds, -torch.inf, value[:, None, None, :]).amax(-1)
    ad = (pages.ad >= 0) & torch.isfinite(pages.score).unsqueeze(-1)
    gain = torch.where(torch.isfinite(best), value.unsqueeze(-1) - best, worth_BRK)
    return torch.where(ad, gain, 0.0)


def train_rlaf(
    network: EgaV2, parameters: list[nn.Parameter], offers: Callable[[np.ndarray], Iterator[tuple[np.ndarray, History, Catalogue, Offers, ItemFeatures]]],
    rows: np.ndarray, check: np.ndarray, slots: int, search_config: SearchConfig, config: RlafConfig, folder: Path, fingerprint: dict[str, Any], device: Device,
) -> StageResult:  # fmt: skip
    """Stage 4 (Eq. 31-32). `offers` groups request rows by city and day and gives what each group may show. Only `poi_policy` and `creative_policy` learn."""
    sampling = replace(search_config, beams=config.beams)

    def step(chosen: np.ndarray, _: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        total, pages_seen, worth = torch.zeros(()), 0, 0.0
        for _, history, catalogue, offer, features in offers(chosen):
            with torch.no_grad():
                memory = network.encode(history)
                pages = search(lambda part, memory=memory: Decoding(network, Memory(memory.token[part], memory.mask[part]), sampling.beams, slots), catalogue, offer, slots, sampling, len(offer.bid))
                value, worth_BRK = page_values(network, memory, pages, offer, features)
                gain = marginal_rewards(pages, value, worth_BRK)
                weight = torch.softmax(pages.score, -1)  # pages that do not exist have weight 0
                mean = (weight.unsqueeze(-1) * gain).sum((1, 2), keepdim=True) / (weight.unsqueeze(-1) * (pages.ad >= 0)).sum((1, 2), keepdim=True).clamp(min=1e-9)
                advantage = torch.where((pages.ad >= 0) & torch.isfinite(pages.score).unsqueeze(-1), gain - mean, 0.0)
            batch, beams = pages.score.shape
            copies = Memory(memory.token.repeat_interleave(beams, 0), memory.mask.repeat_interleave(beams, 0))
            logits = network.page_logits(copies, pages.poi_codes.flatten(0, 1), pages.creative_codes.flatten(0, 1))
            poi, creative = log_chances(logits.poi.unflatten(0, (batch, beams)), logits.creative.unflatten(0, (batch, beams)), catalogue, offer, pages, sampling)
            total = total - (weight.unsqueeze(-1) * advantage * (poi + creative)).sum()
            pages_seen += batch
            worth += float((weight * torch.where(torch.isfinite(pages.score), value, 0.0)).sum())
        return total / max(1, pages_seen), {"value": worth / max(1, pages_seen)}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        best, count = 0.0, 0
        for _, history, catalogue, offer, features in offers(check):
            found = allocate(network, history, catalogue, offer, features, slots, search_config)
            best += float(found.value.sum())
            count += len(found.value)
        return {"score": best / max(1, count), "value": best / max(1, count)}

    return run_stage("rlaf", network, parameters, config, rows, step, validate, folder, {**fingerprint, "config": asdict(config)}, device)


@config_dataclass(frozen=True, config=_STRICT)
class TokenizeConfig:
    """Stage 1: the codebooks."""

    seed: int = 1
    """Seed of the first centres."""


@config_dataclass(frozen=True, config=_STRICT)
class V2TrainingConfig:
    """The stages of EGA (V2), in order."""

    tokenize: TokenizeConfig = TokenizeConfig()
    """Stage 1; sizes and health limits are the model's."""
    pretrain: PretrainConfig = PretrainConfig()
    """Stage 2."""
    reward: RewardConfig = RewardConfig()
    """Stage 3, the reward model."""
    evaluation: RewardConfig = RewardConfig(seed=2)
    """Stage 3, the reward model that judges."""
    rlaf: RlafConfig = RlafConfig()
    """Stage 4."""
    payment: PaymentConfig = PaymentConfig()
    """Stage 5."""
