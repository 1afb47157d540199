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
    "ega_v2": ("tokenize", "pretrain", "reward", "evaluation", "rlaf", "payment"),
}
"""In training order. `pretrain` trains what ranks (EGA-V1 and the cascades, by one loss) or writes pages (EGA (V2)); `reward` and `evaluation` are two models of
clicks on pages: the one that chooses and prices, and the one that judges."""


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
    stages = STAGES[kind]
    if stage not in stages:
        raise ValueError(f"stage {stage!r} is not one of {kind}; its stages are {', '.join(stages)}")
    at = stages.index(stage)
    return stages[at - 1] if at else None
