"""EGA (V2) as a kind of model: its configuration, frozen codebooks beside the network, and what places and items look like to both.

The codebooks are buffers of the model, so that a bundle carries the tokenizer it was trained with and a new ad gets its codes from it.
Shape letters: Q places, G creatives, F features, C codes of a POI, E codes of a creative, W codes a layer, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from marketplace import schema
from model.ega_v2.network import NONE, EgaV2, NetworkConfig, RewardModel, TokenSizes
from model.ega_v2.tokenizer import Codes, Features, Health, Tokenizer, TokenizerConfig, fit, require_healthy

if TYPE_CHECKING:
    from model.ega_v1.network import NetworkConfig as ModelConfig
    from model.ega_v1.network import VocabularySizes

CATEGORY_WIDTH = 8
"""Numbers that stand for a category in the features of a place."""
AUDIENCE_WIDTH = 9
"""Numbers that stand for who goes to a place, and for how many visits it has."""
PLACE_WIDTH = 2 + CATEGORY_WIDTH + AUDIENCE_WIDTH
_KM = 2.0
"""Kilometres that count in a place's features as much as one number of its category."""
_CATEGORY, _AUDIENCE, _VISITS = 0.5, 0.5, 0.3
"""Length of the vectors that stand for category and audience, and weight of log(1 + visits)."""
KM_PER_DEGREE = 111.195

ITEM_FEATURES = ("log_km", "log_visits", "category_share", "same_hour_visits", "log_odds", "log_impressions", "is_ad")
"""What the reward model reads of a POI beside its codes; see `model.ega_v2.data.item_features`."""
BEHAVIOUR_FIELDS = ("category", "action", "age", "hour_distance", "weekday_match", "distance")
"""Fields of a behaviour beside its codes, of `schema.BEHAVIOUR_FIELDS`."""


def category_vectors(category: np.ndarray) -> np.ndarray:
    """A unit vector for each category code, [Q, CATEGORY_WIDTH]: a function of the code alone, so that a new category has one too."""
    codes, at = np.unique(np.asarray(category, np.int64), return_inverse=True)
    vectors = np.stack([np.random.default_rng([int(code), 17]).standard_normal(CATEGORY_WIDTH) for code in codes]) if len(codes) else np.zeros((0, CATEGORY_WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[at]


def audiences(user: np.ndarray, place: np.ndarray, places: int, seed: int) -> np.ndarray:
    """Who goes where, [Q, AUDIENCE_WIDTH]: unit singular vectors of log(1 + visits) of users to places, and log(1 + visits) of all. Zeros without visits.

    Args: user, place [V], ids of users and rows of places, one pair a visit.
    """
    from scipy.sparse import csr_matrix
    from sklearn.utils.extmath import randomized_svd  # seconds of import that only a fit needs

    users, row = np.unique(user, return_inverse=True)
    count = csr_matrix((np.ones(len(place)), (place, row)), shape=(places, max(1, len(users))))
    count.sum_duplicates()
    count.data = np.log1p(count.data)
    found = np.zeros((places, AUDIENCE_WIDTH))
    found[:, -1] = _VISITS * np.log1p(np.bincount(place, minlength=places))
    rank = min(AUDIENCE_WIDTH - 1, min(count.shape) - 1)
    if rank >= 1 and count.nnz:
        u, s, _ = randomized_svd(count, rank, random_state=seed)
        length = np.linalg.norm(u * s, axis=1, keepdims=True)
        found[:, :rank] = np.where(length > 1e-9, _AUDIENCE * u * s / np.maximum(length, 1e-9), 0.0)
    return found


def place_features(category: np.ndarray, position: np.ndarray, origin: np.ndarray, audience: np.ndarray | None = None) -> Features:
    """What the POI tokenizer reads of places: kilometres north and east of `origin` (degrees), the category, and who goes there. [Q, PLACE_WIDTH]

    Without an audience (a place that is new) the rest is known from its first day on, so that a new ad gets codes from the frozen codebooks.
    """
    north = (position[:, 0] - origin[0]) * KM_PER_DEGREE
    east = ((position[:, 1] - origin[1] + 180.0) % 360.0 - 180.0) * KM_PER_DEGREE * np.cos(np.radians(origin[0]))
    known = np.zeros((len(category), AUDIENCE_WIDTH)) if audience is None else audience
    return np.concatenate([np.stack([north, east], 1) / _KM, _CATEGORY * category_vectors(category), known], axis=1)


def core_config(config: ModelConfig) -> NetworkConfig:
    """The network's own configuration, of the run's `model` section."""
    v2 = config.ega_v2
    return NetworkConfig(
        width=config.width, heads=config.heads, feed_forward=config.feed_forward, behaviours=v2.behaviours, slots=config.slots + v2.organic_items,
        encoder_blocks=v2.encoder_blocks, decoder_blocks=v2.decoder_blocks, multi_token=v2.multi_token, reward_blocks=v2.reward_blocks, tower_hidden=v2.tower_hidden,
    )  # fmt: skip


class EgaV2Model(nn.Module):
    """Codebooks, network, a second reward model for evaluation, and the vocabulary's sizes."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes, prior_ctr: float = 0.05) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        v2, fields = config.ega_v2, {field.name: field for field in schema.BEHAVIOUR_FIELDS}
        self.tokens = TokenSizes(
            poi_layers=v2.poi_layers, poi_codes=v2.poi_codes, creative_layers=v2.creative_layers, creative_codes=v2.creative_codes,
            behaviour_fields=tuple(sizes.rows(fields[name]) for name in BEHAVIOUR_FIELDS),
            user_fields=tuple(sizes.rows(field) for field in (*schema.USER_FIELDS, *schema.CONTEXT_FIELDS)),
            poi_features=len(ITEM_FEATURES), creative_features=v2.creative_width + 1,
        )  # fmt: skip
        core = core_config(config)
        self.core = EgaV2(core, self.tokens, prior_ctr)
        self.evaluation = RewardModel(core, self.tokens, prior_ctr)
        """Learned from other days than `core.reward`: the judge of pages that were chosen by it."""
        self.register_buffer("poi_books", torch.zeros(v2.poi_layers, v2.poi_codes, PLACE_WIDTH))
        self.register_buffer("creative_books", torch.zeros(v2.creative_layers, v2.creative_codes, v2.creative_width))
        self.register_buffer("origin", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("known_codes", torch.full((sizes.poi, v2.poi_layers), NONE))
        """Codes of the vocabulary's places, by their index there; -1 where the tokenizer never saw the place."""

    def poi_tokens(self, index: np.ndarray, category: np.ndarray, position: np.ndarray) -> Codes:
        """Codes [Q, C] of places by vocabulary index, category code and position [Q, 2] in degrees: as fitted, and of new places by what is known of them."""
        codes = self.known_codes.numpy()[index]
        new = (codes < 0).any(1)
        if new.any():
            features = place_features(np.asarray(category)[new], np.asarray(position, np.float64)[new], self.origin.numpy())
            codes[new] = _encoder(self.poi_books).encode(features)
        return codes

    def creative_tokens(self, embedding: Features) -> Codes:
        """Codes [G, E] of creatives by embedding."""
        return _encoder(self.creative_books).encode(embedding)

    def fit_tokenizers(self, index: np.ndarray, category: np.ndarray, position: np.ndarray, audience: np.ndarray, embedding: Features, seed: int) -> dict[str, Health]:
        """Fit both codebooks on a catalogue's places and creatives and keep them; TokenizerError where one is not healthy.

        Args: of places, index [Q] in the vocabulary (UNKNOWN ones get no code of their own), category [Q], position [Q, 2] in degrees and audience
        [Q, AUDIENCE_WIDTH]; embedding of creatives.
        """
        self.origin.copy_(torch.from_numpy(np.median(np.asarray(position, np.float64), axis=0)))
        places = place_features(category, np.asarray(position, np.float64), self.origin.numpy(), audience)
        found = {}
        for what, features, books in (("poi", places, self.poi_books), ("creative", embedding, self.creative_books)):
            tokenizer = fit(features, self.config.ega_v2.tokenizer(what, seed))
            require_healthy(tokenizer, f"tokenizer of {what}s (model.ega_v2.{what}_codes, {what}_layers)")
            books.copy_(torch.from_numpy(tokenizer.codebooks))
            found[what] = tokenizer.health
        known = index >= schema.FIRST_CODE
        self.known_codes[torch.from_numpy(index[known]).long()] = torch.from_numpy(_encoder(self.poi_books).encode(places[known]))
        return found

    def enter_stage(self, stage: str) -> list[nn.Parameter]:
        """Freeze all but the stage's parameters; returns those."""
        self.requires_grad_(False)
        parameters = list(self.evaluation.parameters()) if stage == "evaluation" else self.core.stage_parameters(stage)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters


def _encoder(books: Tensor) -> Tokenizer:
    return Tokenizer(books.numpy(), TokenizerConfig(layers=books.shape[0], codes=books.shape[1]), health=None)  # type: ignore[arg-type]  # only `encode` is used
