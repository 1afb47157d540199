"""Sizes of EGA (V2). What it shares with EGA-V1 (width, heads, feed_forward, slots) is said once, in the run's `model` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass

if TYPE_CHECKING:
    from model.ega_v2.tokenizer import TokenizerConfig

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@config_dataclass(frozen=True, config=_STRICT)
class SearchConfig:
    """Width of the search and weight of money."""

    beams: int = Field(64, ge=1, le=4096)
    """R, pages that are kept while they are built (paper: 64)."""
    alpha: float = Field(1.2, ge=0, le=10)
    """Exponent of the normalised bid in a code's weight (paper: 1.2); 0: bids do not count."""
    beta: float = Field(2.0, gt=0, le=1e6)
    """Weight of a code without bid, as of organic items (paper: 2)."""
    bid_of_prefix: Literal["max", "mean"] = "max"
    """What stands for the bids of a prefix's items: the greatest (paper), or their mean (its ablation)."""


@config_dataclass(frozen=True, config=_STRICT)
class V2Config:
    """What only EGA (V2) reads."""

    behaviours: int = Field(64, ge=1)
    """L, newest behaviours that are read (paper: 256); as many as the features keep, or fewer."""
    encoder_blocks: int = Field(3, ge=1)
    """Blocks of the encoder (paper: 3)."""
    decoder_blocks: int = Field(3, ge=1)
    """Blocks of the POI decoder (paper: 3)."""
    multi_token: bool = True
    """Creatives have a decoder of their own (multi-token prediction); false: their codes stand among those of the POIs in one sequence (ablation)."""
    reward_blocks: int = Field(2, ge=1)
    """Blocks of the reward model."""
    tower_hidden: tuple[int, ...] = (128, 32, 10)
    """Hidden layers of the reward towers and of the payment network (paper: 128, 32, 10)."""
    poi_layers: int = Field(3, ge=1, le=8)
    """C, codes of a POI (paper: 3)."""
    poi_codes: int = Field(64, ge=2)
    """W, codes a layer of POIs (paper: 1024)."""
    creative_layers: int = Field(3, ge=1, le=8)
    """E, codes of a creative (paper: 3)."""
    creative_codes: int = Field(64, ge=2)
    """W of creatives."""
    creative_width: int = Field(16, ge=1)
    """Numbers of a creative's embedding in the logs."""
    organic_items: int = Field(5, ge=0)
    """O, organic items on a page beside its ads."""
    least_use: float = Field(0.8, ge=0, le=1)
    """Health gate: share of each layer's codes that some item has, at least."""
    most_collisions: float = Field(0.05, ge=0, le=1)
    """Health gate: share of distinguishable items that share their tuple with another, below this."""

    probes: int = Field(2, ge=1, le=64)
    """Bids drawn below its own at which the page is generated again for each displayed ad, where implicit prices are charged: more make the single price steadier, not its expectation truer."""
    search: SearchConfig = SearchConfig()
    """The search that proposes pages, while policy and payments are trained and in service."""

    def tokenizer(self, what: str, seed: int) -> TokenizerConfig:
        """Of "poi" or "creative"."""
        from model.ega_v2.tokenizer import TokenizerConfig  # here: pipelines read this file and need neither scikit-learn nor torch

        return TokenizerConfig(
            layers=getattr(self, f"{what}_layers"), codes=getattr(self, f"{what}_codes"), seed=seed, least_use=self.least_use, most_collisions=self.most_collisions
        )
