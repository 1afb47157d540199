"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018), with pre-LN blocks.

Shape letters: B sequences, L items of a sequence, N scored items, D width, H heads. Masks are true where an item is real.
Sequences are right-aligned, oldest first: padding stands in front and the newest item in the last column. (What is kept
newest first with padding behind becomes that by `flip(1)`.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PADDING = 0


class CausalBlock(nn.Module):
    """Causal self-attention and a point-wise feed-forward layer D -> D -> D, pre-LN with residuals and dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, attend_B1LL: Tensor, newest: bool = False) -> Tensor:
        """[B, L, D], or with `newest` the last column alone, [B, 1, D]: the others then serve as keys and values only."""
        batch, _, width = x_BLD.shape
        normed = self.norm_attention(x_BLD)
        if newest:
            x_BLD, attend_B1LL = x_BLD[:, -1:], attend_B1LL[:, :, -1:]
            parts = [F.linear(normed[:, -1:], self.qkv.weight[:width], self.qkv.bias[:width]), *F.linear(normed, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, -1)]
        else:
            parts = list(self.qkv(normed).chunk(3, -1))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=attend_B1LL, dropout_p=self.dropout.p if self.training else 0.0)
        x_BLD = x_BLD + self.dropout(self.out(heads.transpose(1, 2).reshape(batch, -1, width)))
        return x_BLD + self.dropout(self.down(self.dropout(F.relu(self.up(self.norm_forward(x_BLD))))))


class SasRec(nn.Module):
    """Next-item model: the state at a position reads this item and the ones before, and is scored against the item table.

    Args: items, rows of the item table, row 0 being padding; length, the longest sequence; dropout, on tokens, attention
    weights and sub-layers. Positions are learned and counted from the newest end, so the same items give the same states
    whatever the padding in front.
    """

    def __init__(self, items: int, width: int, blocks: int, heads: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.length = length
        self.item = nn.Embedding(items, width, padding_idx=PADDING)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for table in (self.item, self.position):
                table.weight.normal_(0.0, 1.0 / width)
            self.item.weight[PADDING].zero_()

    def forward(self, items_BL: Tensor) -> Tensor:
        """States [B, L, D] after each item of right-aligned sequences; 0 where there is padding."""
        return self.encode_tokens(self.item(items_BL) * math.sqrt(self.item.embedding_dim), items_BL != PADDING)

    def newest(self, items_BL: Tensor) -> Tensor:
        """State [B, D] after the newest item: `forward(items_BL)[:, -1]` without what nobody reads."""
        return self.encode_newest(self.item(items_BL) * math.sqrt(self.item.embedding_dim), items_BL != PADDING)

    def encode_tokens(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """`forward` on tokens that the caller embedded; what masked tokens hold changes nothing. L <= length."""
        x, attend = self._inputs(x_BLD, mask_BL)
        for block in self.blocks:
            x = block(x, attend)
        return torch.where(mask_BL.unsqueeze(-1), self.norm(x), 0.0)

    def encode_newest(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """`encode_tokens(x_BLD, mask_BL)[:, -1]`, [B, D]: the last block computes the newest column alone."""
        x, attend = self._inputs(x_BLD, mask_BL)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, attend, newest=number == len(self.blocks))
        return torch.where(mask_BL[:, -1:], self.norm(x[:, -1]), 0.0)

    def _inputs(self, x_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with their positions, and which attends to which, [B, 1, L, L]."""
        columns = x_BLD.shape[1]
        if columns > self.length:
            raise ValueError(f"sequences of {columns} items do not fit into length {self.length}; keep the newest {self.length}")
        real = mask_BL.unsqueeze(-1)
        # Masked by selection and not by a factor: 0 * NaN would be NaN.
        x = self.dropout(torch.where(real, x_BLD + self.position.weight[self.length - columns :], 0.0))
        causal = torch.ones(columns, columns, dtype=torch.bool, device=x.device).tril()
        # Padding attends to itself alone, since a row without any key has no softmax; nothing real ever reads it.
        attend = (causal & mask_BL.unsqueeze(1)) | torch.eye(columns, dtype=torch.bool, device=x.device)
        return x, attend.unsqueeze(1)

    def scores(self, state_BD: Tensor, items_BN: Tensor | None = None) -> Tensor:
        """Dot products with the item table: [B, N] for items [B, N], or [B, items] with all of it (column 0 is padding)."""
        if items_BN is None:
            return state_BD @ self.item.weight.T
        return torch.einsum("bd,bnd->bn", state_BD, self.item(items_BN))
