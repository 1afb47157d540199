"""Training stages of EGA (V2) on tensors in memory: tokenize, pretrain.

Shape letters: B requests, K slots, C codes of a POI, E codes of a creative. Equation numbers are V2's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor

from model.ega_v2.network import EgaV2, History, generation_losses
from model.ega_v2.tokenizer import Features, Tokenizer, TokenizerConfig, TokenizerError, fit, require_healthy
from model.training.loop import Device, LoopConfig, StageResult, run_stage

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
        """Some of the requests."""
        index = torch.from_numpy(rows)
        return Sequences(History(*(values[index] for values in vars(self.history).values())), self.poi[index], self.creative[index])


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
