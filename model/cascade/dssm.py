"""DSSM: a tower for the request, a tower for the ad, one dot product (Huang et al., CIKM 2013)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.layers import MLP


class Dssm(nn.Module):
    """Two towers over embeddings that the caller made. The request's tower reads e_u and the mean of the behaviours.

    Shape letters: B requests, N ads, L behaviours, D width.
    """

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.request = MLP(2 * width, hidden, width)
        self.ad = MLP(width, hidden, width)

    def request_vectors(self, user_BD: Tensor, behaviours_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, D]; masked behaviours change nothing, and a request without any reads zeros."""
        real = mask_BL.unsqueeze(-1)
        mean = torch.where(real, behaviours_BLD, 0.0).sum(1) / real.sum(1).clamp(min=1)
        return self.request(torch.cat([user_BD, mean], -1))

    def ad_vectors(self, ad_BND: Tensor) -> Tensor:
        """[B, N, D]: no request enters, so a city's are computed once."""
        return self.ad(ad_BND)

    @staticmethod
    def scores(request_BD: Tensor, ad_BND: Tensor) -> Tensor:
        """[B, N]; one city's ads (batch 1) serve all requests."""
        return (ad_BND @ request_BD.unsqueeze(-1)).squeeze(-1) / math.sqrt(request_BD.shape[-1])
