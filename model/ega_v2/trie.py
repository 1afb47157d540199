"""Prefix trie of a city's active items, as tensors: which code may follow, and what the best bid behind it is.

Items are sorted by their code tuple, so every prefix is a range of items and the children of a node are a range of nodes. Nodes are
numbered level by level: the root is 0, `null` (one past the last) has neither items nor children. Nothing loops over items, nodes or beams.
Shape letters: B requests, R beams, N items, C layers of codes, V nodes with null, M largest family of a level; "..." any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class TrieError(ValueError):
    """Codes that no trie can be built of; the message says which."""


@dataclass(frozen=True)
class Children:
    """The children of some nodes, ascending by code, padded to the largest family of their level."""

    node: Tensor
    """[..., M] ids; null where there is no further child."""
    code: Tensor
    """[..., M] their codes; 0 where there is none."""
    real: Tensor
    """[..., M] true where there is one."""


class Trie:
    """Items by their code tuples. Items that share a tuple lie in one leaf, in the order of their keys."""

    def __init__(self, codes_NC: npt.ArrayLike, sizes: Sequence[int], keys_N: npt.ArrayLike | None = None) -> None:
        """Build from tuples [N, C]; layer c has codes 0..sizes[c]-1. `keys_N` [N] orders the items of a leaf (default: their index).

        Raises TrieError where a code is out of range, keys are not distinct, or the tuples do not fit 63 bits.
        """
        table = np.asarray(codes_NC)
        self.sizes, self.depth = tuple(sizes), len(sizes)
        if table.ndim != 2 or table.shape[1] != self.depth or not np.issubdtype(table.dtype, np.integer):
            raise TrieError(f"codes must be integers of shape [items, {self.depth}], got {table.dtype} of shape {table.shape}")
        bad = np.flatnonzero(((table < 0) | (table >= np.array(sizes))).any(1))
        if len(bad):
            raise TrieError(f"codes must be at least 0 and below {list(sizes)}; item {bad[0]} has {table[bad[0]].tolist()}")
        if math.prod(sizes) >= 2**63:
            raise TrieError(f"tuples of {list(sizes)} codes do not fit a 64-bit key; take fewer codes or layers")
        self.items = len(table)
        ties = np.arange(self.items) if keys_N is None else np.asarray(keys_N)
        if ties.shape != (self.items,) or len(np.unique(ties)) != self.items:
            raise TrieError(f"keys must be {self.items} distinct numbers, one an item")
        radix = np.array([math.prod(sizes[layer + 1 :]) for layer in range(self.depth)], np.int64)
        keys = table.astype(np.int64) @ radix
        order = np.lexsort((ties, keys))
        self.order = torch.from_numpy(order)
        """[N] item at each sorted position."""
        self.position = torch.empty_like(self.order)
        """[N] sorted position of each item."""
        self.position[self.order] = torch.arange(self.items)
        self._number(keys[order], radix)

    def _number(self, keys_N: npt.NDArray[np.int64], radix_C: npt.NDArray[np.int64]) -> None:
        """Nodes, their offsets and their ancestors from the sorted keys."""
        first, code, above = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.zeros(self.items, np.int64)]
        start, children = [0, 1], []
        for level in range(self.depth):
            prefix = keys_N // radix_C[level]
            new = np.diff(prefix, prepend=-1) != 0
            above.append(start[-1] + np.cumsum(new) - 1)
            children.append(above[-1][first[-1]] if self.items else np.full(len(first[-1]), start[-1]))
            first.append(np.flatnonzero(new))
            code.append(prefix[first[-1]] % self.sizes[level])
            start.append(start[-1] + len(first[-1]))
        self.null = start[-1]
        self.level_start = start
        """First node of levels 0..C, then null."""
        bounds = torch.from_numpy(np.concatenate([*children, np.full(len(first[-1]) + 2, self.null)]))
        self.first_child, self.end_child = bounds[:-1], bounds[1:]
        """[V] the children of node n are first_child[n] .. end_child[n] - 1."""
        self.first = torch.from_numpy(np.concatenate([*first, [self.items]]))
        """[V] first sorted position below the node."""
        self.end = torch.from_numpy(np.concatenate([*(np.append(part[1:], self.items) for part in first), [self.items]]))
        """[V] one past the last sorted position below the node."""
        self.code = torch.from_numpy(np.concatenate([*code, [0]]))
        """[V] last code of the node's prefix."""
        parent = np.concatenate([[-1], *(node[at] for node, at in zip(above, first[1:], strict=False))])
        self._width = max(self.sizes)
        self._parent_and_code = torch.from_numpy(parent * self._width + np.concatenate(code))
        """[V - 1] ascending, as nodes are numbered level by level and by code within a family; -width for the root."""
        self.ancestor = torch.from_numpy(np.stack(above, 1))
        """[N, C + 1] the node of every level above a sorted position."""
        families = self.end_child - self.first_child
        self.fan_out = [max(1, int(families[a:b].max())) if b > a else 1 for a, b in zip(start, start[1:-1], strict=False)]
        """M of levels 0..C-1, at least 1."""
        leaves = slice(start[-2], start[-1])
        self.leaf_size = int((self.end[leaves] - self.first[leaves]).max()) if self.items else 0
        """Most items of a leaf."""

    def children(self, node: Tensor, level: int, spare: int = 0) -> Children:
        """Children of nodes [...], all of one level (or null); with `spare` more columns that hold none."""
        index = self.first_child[node].unsqueeze(-1) + torch.arange(self.fan_out[level] + spare)
        real = index < self.end_child[node].unsqueeze(-1)
        index = torch.where(real, index, self.null)
        return Children(index, self.code[index], real)

    def child(self, node: Tensor, code: Tensor) -> Tensor:
        """The child of each node [...] by its code [...]; null where there is none."""
        key = node * self._width + code
        found = torch.searchsorted(self._parent_and_code, key).clamp(max=self.null - 1)
        return torch.where(self._parent_and_code[found] == key, found, self.null)

    def next_codes(self, node_B: Tensor, level: int, maxima_BV: Tensor) -> Tensor:
        """Which codes may follow, [B, ..., W] bool: those below which `maxima` is finite, that is an active item lies; node is [B, ...]."""
        found = self.children(node_B, level)
        alive = torch.isfinite(gather_nodes(maxima_BV, found.node))
        mask = torch.zeros(*node_B.shape, self.sizes[level], dtype=torch.uint8)
        return mask.scatter_reduce_(-1, found.code, alive.byte(), "amax").bool()

    def items_below(self, leaf: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted positions of the items of leaves [...], padded to the largest leaf, and which of them are real: [..., S] each."""
        index = self.first[leaf].unsqueeze(-1) + torch.arange(self.leaf_size)
        real = index < self.end[leaf].unsqueeze(-1)
        return torch.where(real, index, 0), real

    def sort(self, values_BN: Tensor) -> Tensor:
        """Values of items from the caller's order into the trie's."""
        return values_BN[:, self.order]

    def maxima(self, sorted_BN: Tensor) -> Tensor:
        """Greatest value below every node, [B, V], of values at sorted positions (-inf: not active); -inf at null.

        A segment maximum in O(N): every level is reduced from the level below.
        """
        batch, levels = len(sorted_BN), [sorted_BN]
        for level in reversed(range(self.depth + 1)):
            begin, end = self.level_start[level], self.level_start[level + 1]
            below = self.first[end : self.level_start[level + 2]] if level < self.depth else slice(None)
            parent = self.ancestor[:, level][below] - begin
            levels.append(sorted_BN.new_full((batch, end - begin), -torch.inf).scatter_reduce(1, parent.expand(batch, -1), levels[-1], "amax"))
        return torch.cat([*reversed(levels[1:]), sorted_BN.new_full((batch, 1), -torch.inf)], 1)

    def sums(self, sorted_BN: Tensor) -> Tensor:
        """Sum below every node, [B, V], of values at sorted positions; 0 at null. Items elsewhere never move a sum, not even by rounding."""
        batch, levels = len(sorted_BN), []
        for level in range(self.depth + 1):
            begin, end = self.level_start[level], self.level_start[level + 1]
            parent = (self.ancestor[:, level] - begin).expand(batch, -1)
            levels.append(sorted_BN.new_zeros(batch, end - begin).scatter_add(1, parent, sorted_BN))
        return torch.cat([*levels, sorted_BN.new_zeros(batch, 1)], 1)

    def maxima_without(self, maxima_BV: Tensor, sorted_BN: Tensor, used_BRS: Tensor) -> Tensor:
        """`maxima` of the nodes above used items, without any of a beam's used items: [B, R, S, C], levels 1..C.

        `used_BRS` are sorted positions, -1 for none. Only the families of these nodes are read, from the leaves upwards, so the cost does not
        grow with the number of items.
        """
        used = torch.where(used_BRS >= 0, used_BRS, 0)
        above = torch.where((used_BRS >= 0).unsqueeze(-1), self.ancestor[used], self.null)
        position, real = self.items_below(above[..., -1])
        real &= (position.unsqueeze(-1) != used_BRS[:, :, None, None]).all(-1)
        values = torch.where(real, gather_nodes(sorted_BN, position), -torch.inf)
        corrected = [values.amax(-1)]
        for level in reversed(range(1, self.depth)):
            node = above[..., level]
            values = gather_nodes(maxima_BV, self.children(node, level, spare=1).node)
            column = above[..., level + 1].unsqueeze(2) - self.first_child[node].unsqueeze(-1)
            override(values, column, node.unsqueeze(-1) == node.unsqueeze(2), corrected[-1].unsqueeze(2))
            corrected.append(values[..., :-1].amax(-1))
        return torch.stack(corrected[::-1], -1)


def gather_nodes(values_BV: Tensor, index: Tensor) -> Tensor:
    """Values [B, V] at positions [B, ...]."""
    return torch.gather(values_BV, 1, index.flatten(1)).view(index.shape)


def override(values: Tensor, column: Tensor, valid: Tensor, new: Tensor) -> None:
    """Write `new` [..., S] into `column` [..., S] of `values` [..., M] where `valid`; the last column of `values` is spoilt.

    Columns met twice are given equal values.
    """
    index = torch.where(valid, column, values.shape[-1] - 1)
    values.scatter_(-1, index, new.expand(index.shape))
