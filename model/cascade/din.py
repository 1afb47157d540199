"""DIN: deep interest network (Zhou et al., KDD 2018). Each candidate weighs the behaviours by itself; no candidate sees another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import MLP, Dice


class ActivationUnit(nn.Module):
    """Weight of a behaviour for a candidate: MLP over (candidate, behaviour, their difference, their product), with Dice.

    The first layer is split by its inputs: what reads the candidate alone or the behaviour alone is computed once for each, and
    only the product is computed for every pair.
    """

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.candidate, self.behaviour = nn.Linear(width, hidden[0]), nn.Linear(width, hidden[0], bias=False)
        self.product = nn.Linear(width, hidden[0], bias=False)
        self.dice = Dice(hidden[0])
        self.rest = MLP(hidden[0], hidden[1:], 1)

    def forward(self, ad_BND: Tensor, ad_mask_BN: Tensor, behaviour_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, N, L], 0 for masked behaviours; not normalised, so that the strength of an interest survives (Zhou et al. 2018, Sec. 4.3)."""
        few = ad_BND.shape[1] * int(mask_BL.sum()) < self.product.out_features * mask_BL.numel()
        return (self._pairs if few else self._factored)(ad_BND, ad_mask_BN, behaviour_BLD, mask_BL)

    def _factored(self, ad_BND: Tensor, ad_mask_BN: Tensor, behaviour_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """For many candidates: one weight matrix [D, H] a behaviour, whether it is real or not."""
        batch, ads, width = ad_BND.shape
        length = behaviour_BLD.shape[1]
        # (a * b) W = a (b * W): [B, L, D, H] instead of [B, N, L, D].
        weighted = behaviour_BLD.unsqueeze(-1) * self.product.weight.T
        product = (ad_BND @ weighted.permute(0, 2, 1, 3).reshape(batch, width, -1)).reshape(batch, ads, length, -1)
        x = product + self.candidate(ad_BND).unsqueeze(2) + self.behaviour(behaviour_BLD).unsqueeze(1)
        real = ad_mask_BN.unsqueeze(2) & mask_BL.unsqueeze(1)
        x = self.dice(x.reshape(batch, ads * length, -1), real.reshape(batch, -1))
        return torch.where(mask_BL.unsqueeze(1), self.rest(x).reshape(batch, ads, length), 0.0)

    def _pairs(self, ad_BND: Tensor, ad_mask_BN: Tensor, behaviour_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """For few candidates, or much padding: the products [P, N, D] of the P real behaviours alone."""
        request, at = mask_BL.nonzero(as_tuple=True)
        behaviour_PD = behaviour_BLD[request, at]
        x = self.product(ad_BND[request] * behaviour_PD.unsqueeze(1)) + self.candidate(ad_BND)[request] + self.behaviour(behaviour_PD).unsqueeze(1)
        weight_PN = self.rest(self.dice(x, ad_mask_BN[request])).squeeze(-1)
        return weight_PN.new_zeros(len(mask_BL), mask_BL.shape[1], ad_BND.shape[1]).index_put((request, at), weight_PN).transpose(1, 2)


class Din(nn.Module):
    """Representation h [B, N, D] of every candidate for its request: (ad, its interest, their product, e_u), one layer with Dice."""

    def __init__(self, width: int, attention_hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.unit = ActivationUnit(width, attention_hidden)
        self.item, self.interest, self.match = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.user = nn.Linear(width, width)
        self.dice = Dice(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ad_BND: Tensor, ad_mask_BN: Tensor, behaviour_BLD: Tensor, mask_BL: Tensor, user_BD: Tensor) -> Tensor:
        batch = len(behaviour_BLD)
        ad_BND, ad_mask_BN = ad_BND.expand(batch, -1, -1), ad_mask_BN.expand(batch, -1)
        interest = self.unit(ad_BND, ad_mask_BN, behaviour_BLD, mask_BL) @ torch.where(mask_BL.unsqueeze(-1), behaviour_BLD, 0.0)
        x = self.item(ad_BND) + self.interest(interest) + self.match(ad_BND * interest) + self.user(user_BD).unsqueeze(1)
        return self.norm(self.dice(x, ad_mask_BN))
