"""A cascade as one model with the interface of EgaV1: recall (SASRec) -> pre-ranking (DSSM) -> ranking (DIN) -> auction by q*b.

Each stage sees only what the one before handed on, reads each ad by itself, and has embeddings of its own. Neither recall nor
pre-ranking reads a bid, so the own bid decides nothing before the auction and critical prices are exact for the ads that reach it.
Shape letters: B requests, N ads, K slots, L behaviours, M ads that reach ranking, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.cascade.din import Din
from model.cascade.dssm import Dssm
from model.cascade.sasrec import SasRec
from model.ega_v1.network import Batch, Evaluator, HybridFeatures, NetworkConfig, RankingModel, VocabularySizes
from model.layers import in_float32, take

TOWERS = ("recall", "prerank")


class Recall(nn.Module):
    """SASRec over the behaviours, oldest first, with the request's own context as the newest token; an ad is scored by a dot product."""

    def __init__(self, config: NetworkConfig, sizes: VocabularySizes, geo_table: Tensor | None) -> None:
        super().__init__()
        self.features = HybridFeatures(config, sizes, geo_table)
        self.sequence = SasRec(1, config.width, config.cascade.blocks, config.heads, config.cascade.behaviours + 1)

    def request_vectors(self, batch: Batch) -> Tensor:
        tokens, mask = self.features.behaviours(batch.behaviours, self.features.user(batch.user_fields, batch.context_fields))
        return self.sequence.encode_newest(tokens.flip(1), mask.flip(1))

    def ad_vectors(self, ad_fields: Tensor) -> Tensor:
        return self.features.ads(ad_fields)

    scores = staticmethod(Dssm.scores)


class Prerank(nn.Module):
    """DSSM with embeddings of its own."""

    def __init__(self, config: NetworkConfig, sizes: VocabularySizes, geo_table: Tensor | None) -> None:
        super().__init__()
        self.features = HybridFeatures(config, sizes, geo_table)
        self.towers = Dssm(config.width, config.cascade.tower_hidden)

    def request_vectors(self, batch: Batch) -> Tensor:
        user = self.features.user(batch.user_fields, batch.context_fields)
        return self.towers.request_vectors(user, *self.features.behaviours(batch.behaviours, user))

    def ad_vectors(self, ad_fields: Tensor) -> Tensor:
        return self.towers.ad_vectors(self.features.ads(ad_fields))

    scores = staticmethod(Dssm.scores)


class SlotEvaluator(nn.Module):
    """What a cascade believes of a page: each ad's own logit and a term of its slot, whatever else is shown.

    `slot` [2, K] holds the terms of clicks and of purchases (`Cascade.freeze_slots`).
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.register_buffer("slot", torch.zeros(2, slots))

    def forward(
        self, h_BKD: Tensor, codes_BK2: Tensor, user_BD: Tensor, click_logit_BK: Tensor, purchase_logit_BK: Tensor, mask_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of pCTR and pCVR, [B, K] each; the arguments of `Evaluator`."""
        click, purchase = self.slot[:, : click_logit_BK.shape[1]]
        return click_logit_BK + click, purchase_logit_BK + purchase


class Cascade(RankingModel):
    """MCA or FS-LTR, which differ in training only. `h` is DIN's representation of an ad for a request."""

    def __init__(self, config: NetworkConfig, sizes: VocabularySizes, geo_table: Tensor | None = None, prior_ctr: float = 0.05) -> None:
        super().__init__(config, sizes)
        self.recall = Recall(config, sizes, geo_table)
        self.prerank = Prerank(config, sizes, geo_table)
        self.features = HybridFeatures(config, sizes, geo_table)
        self.din = Din(config.width, config.cascade.attention_hidden)
        self.add_heads(prior_ctr)
        self.evaluator = SlotEvaluator(config.slots)
        self.evaluation_evaluator = Evaluator(config, sizes)
        self.generator = self.payment = None

    def _newest(self, batch: Batch) -> Batch:
        """The batch with the behaviours that a cascade reads."""
        return replace(batch, behaviours=batch.behaviours[:, : self.config.cascade.behaviours])

    def tower(self, stage: str) -> Recall | Prerank:
        """The network of one of TOWERS."""
        return self.recall if stage == "recall" else self.prerank

    def tower_scores(self, stage: str, batch: Batch) -> Tensor:
        """Scores [B, N] of one of TOWERS."""
        tower = self.tower(stage)
        return in_float32(tower.scores, tower.request_vectors(self._newest(batch)), tower.ad_vectors(batch.ad_fields))

    def city_states(self, ad_fields: Tensor, ad_mask: Tensor) -> Tensor:
        """[1, N, 3 D]: the vectors of recall, of pre-ranking, and the embeddings that DIN reads."""
        return torch.cat([self.recall.ad_vectors(ad_fields), self.prerank.ad_vectors(ad_fields), self.features.ads(ad_fields)], -1)

    @property
    def state_width(self) -> int:
        return 3 * self.config.width

    def encode_from(self, ad_states: Tensor, batch: Batch, only_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch = self._newest(batch)
        user = self.features.user(batch.user_fields, batch.context_fields)
        behaviours, mask = self.features.behaviours(batch.behaviours, user)
        ads, ad_mask = ad_states[..., 2 * self.config.width :], batch.ad_mask
        if only_BK is not None:
            ads, ad_mask = take(ads.expand(len(only_BK), -1, -1), only_BK), torch.gather(ad_mask.expand(len(only_BK), -1), 1, only_BK)
        return self.add_crosses(self.din(ads, ad_mask, behaviours, mask, user), batch, only_BK), user

    def handed_on(self, ad_states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, N] each: which ads recall hands to pre-ranking, and which pre-ranking hands to ranking."""
        newest = self._newest(batch)
        vectors = ad_states.split(self.config.width, -1)
        kept = batch.ad_mask.expand(len(batch.user_fields), -1)
        found = []
        for stage, ads, count in zip(TOWERS, vectors, (self.config.cascade.recall, self.config.cascade.prerank), strict=False):
            tower = self.tower(stage)
            scores = tower.scores(tower.request_vectors(newest), ads).masked_fill(~kept, float("-inf"))
            best = scores.topk(min(count, scores.shape[1]), 1).indices
            kept = torch.zeros_like(kept).scatter(1, best, True) & kept
            found.append(kept)
        return found[0], found[1]

    def survey(self, ad_states: Tensor, batch: Batch, also_BK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """DIN reads what pre-ranking hands on, and nothing else reaches the auction."""
        _, reached = self.handed_on(ad_states, batch)
        most = int(reached.sum(1).max())
        rows, read = reached.to(torch.int8).topk(most, 1).indices, reached
        if also_BK is not None:
            rows, read = torch.cat([rows, also_BK], 1), reached.scatter(1, also_BK, True)
        h, user = self.encode_from(ad_states, batch, rows)
        whole = h.new_zeros(len(h), reached.shape[1], h.shape[2]).scatter(1, rows.unsqueeze(-1).expand_as(h), h)
        return torch.where(read.unsqueeze(-1), whole, 0.0), user, reached

    def stage_modules(self, stage: str) -> list[nn.Module]:
        ranking = [self.features, self.din, self.click_head, self.purchase_head, *([self.cross] if self.cross is not None else [])]
        return {"recall": [self.recall], "prerank": [self.prerank], "pretrain": ranking, "relabel": ranking, "evaluation": [self.evaluation_evaluator]}[stage]

    @torch.no_grad()
    def freeze_slots(self) -> None:
        """Hand the slot terms that ranking learned to the evaluator, not rising down the page: prices need an order that pays."""
        self.evaluator.slot.copy_(torch.cummin(self.slot_logits(), 0).values.expand(2, -1))
