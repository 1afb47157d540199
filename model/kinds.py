"""The kinds of model: which class a configuration names, and the stages that train it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from model.ega_v1.network import NetworkConfig, RankingModel, VocabularySizes
    from model.ega_v2.model import EgaV2Model

STAGES: dict[str, tuple[str, ...]] = {
    "ega_v1": ("pretrain", "reward", "evaluation", "rlaf", "payment"),
    "mca": ("recall", "prerank", "pretrain", "evaluation"),
    "fs_ltr": ("recall", "prerank", "pretrain", "relabel", "evaluation"),
}
"""In training order. `pretrain` trains what ranks, by the same loss for all; `reward` and `evaluation` are the two evaluators of stage 2."""

BENCH_STAGES: dict[str, tuple[str, ...]] = {"ega_v2": ("tokenize", "pretrain", "reward", "evaluation", "rlaf", "payment")}
"""Of kinds that `ega bench` trains and the pipeline does not serve."""


def stages_of(kind: str) -> tuple[str, ...]:
    """The stages of any kind, in training order."""
    return (STAGES | BENCH_STAGES)[kind]


def create(config: NetworkConfig, sizes: VocabularySizes, geo_table: Tensor | None = None, prior_ctr: float = 0.05) -> RankingModel | EgaV2Model:
    """A model of `config.kind`, freshly initialised."""
    from model.cascade.network import Cascade  # here: pipelines read STAGES and need no torch
    from model.ega_v1.network import EgaV1
    from model.ega_v2.model import EgaV2Model

    if config.kind == "ega_v2":
        return EgaV2Model(config, sizes, prior_ctr)
    return (EgaV1 if config.kind == "ega_v1" else Cascade)(config, sizes, geo_table, prior_ctr)


def previous_stage(kind: str, stage: str) -> str | None:
    """The stage whose weights `stage` starts from; None for the first. Raises for a stage that this kind does not have."""
    stages = stages_of(kind)
    if stage not in stages:
        raise ValueError(f"stage {stage!r} is not one of {kind}; its stages are {', '.join(stages)}")
    at = stages.index(stage)
    return stages[at - 1] if at else None
