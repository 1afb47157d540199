"""Sizes of the cascades. What they share with EGA-V1 (widths, heads, slots, crosses) is said once, in NetworkConfig."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class CascadeConfig:
    """How many ads each stage of a cascade hands on, and its towers."""

    recall: int = Field(400, ge=1)
    """Ads that recall hands to pre-ranking."""
    prerank: int = Field(100, ge=1)
    """Ads that pre-ranking hands to ranking."""
    behaviours: int = Field(100, ge=1)
    """Newest behaviours that the cascade's networks read: their cost grows with N L, where EGA-V1 reads clusters."""
    blocks: int = Field(2, ge=1)
    """Transformer blocks of recall's SASRec."""
    tower_hidden: tuple[int, ...] = (128,)
    """Hidden layers of the two towers of pre-ranking's DSSM."""
    attention_hidden: tuple[int, ...] = (36,)
    """Hidden layers of DIN's activation unit (Zhou et al. 2018)."""

    def __post_init__(self) -> None:
        if self.prerank > self.recall:
            raise ValueError(f"prerank {self.prerank} must not exceed recall {self.recall}: a stage cannot hand on more than it was given")
