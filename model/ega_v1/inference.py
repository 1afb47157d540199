"""One request over a whole city in few sweeps over its ads: what serving runs. The plain reference is `EgaV1.encode_from` with the
heads and the generator; tests hold the two to the same numbers.

Exact savings (MODEL.md's names): ad states up to the first fusion, and there the target attention's queries and the context attention's
keys, belong to the city and are kept; clusters are gathered as S^T X and projected afterwards (C rows instead of N) wherever no activation
stands between; the click head's user half and the slot tokens' projections are multiplied once a request; purchases are predicted only
for ads that can matter; a history is read without its padding, and where it is long by the same halves of a block. Every sweep finishes one block and gathers the clusters of the next while a chunk of ads is in the cache.

Shape letters: N ads of the city, n ads of a chunk, L behaviours, C clusters, K slots, D width, F fields. One request at a time.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from marketplace import schema
from model.ega_v1.network import Batch, EgaV1, RankingModel, RecFormer, cross_features
from model.layers import ClusterAttention, ClusterBlock, Clusters, CrossAttention, Dice, FeedForward, PointwiseBlock

Result = TypeVar("Result")
LEAST_ADS = 256
"""Ads that are worth a thread of their own."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@config_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Execution:
    """How a model is run, never what it computes: pages and prices agree up to rounding."""

    path: Literal["fast", "reference"] = "fast"
    """The sweeps of `model.ega_v1.inference`, or the plain network."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the network runs; allocation and prices are always on the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the ads' matrix products; auto: bfloat16 on a GPU and on CPUs with AMX, float32 elsewhere. Sums and residuals stay float32."""
    chunk: int = Field(1024, ge=1)
    """Ads at a time on a CPU, so that what a block needs stays in its cache: so many in float32, twice as many in bfloat16. A GPU takes the whole city at once."""

    def resolved(self) -> torch.dtype:
        """The dtype that `auto` stands for on this machine."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.bfloat16 if self.device == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False) else torch.float32


class _Recording:
    """A function of tensors, run once and from then on replayed by torch without the interpreter, and so without its lock: hundreds of operations of a few
    microseconds each would otherwise ask for that lock a thousand times a request, against every other thread of a service.

    TorchScript, although torch no longer develops it: torch.compile needs a C++ compiler where the service runs, torch.export goes through Python at every
    operation. What `run` returns may hold tensors, None and tuples of them; nothing in it may depend on the inputs' values but through tensors. Replays
    share their buffers: one at a time, and a result is valid until the next.
    """

    def __init__(self, run: Callable[..., Any], example: tuple[Tensor, ...]) -> None:
        def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
            leaves: list[Tensor] = []
            self._shape = _flatten(run(*inputs), leaves)
            return tuple(leaves)

        self._inputs = [x.shape for x in example]
        with _scratch.fresh(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Python numbers, all of them sizes, are taken for constants
            # What torch.jit.trace does, but for keeping every recording, with the tensors in it, until the process ends.
            graph, _ = torch._C._create_graph_by_tracing(flat, example, lambda value: "", True, False, None, [])
            self._replay = torch._C._create_function_from_graph("recording", graph)
        for _ in range(2):  # torch rewrites it after the first, for as long as some requests take
            self._replay(*example)

    def fits(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether it was recorded for inputs of these shapes."""
        return [x.shape for x in inputs] == self._inputs

    def __call__(self, *inputs: Tensor) -> Any:
        return _unflatten(self._shape, iter(self._replay(*inputs)))


def _flatten(value: Any, leaves: list[Tensor]) -> Any:
    """Append the tensors of a nest of tuples; returns the nest with True for each."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return True
    return None if value is None else tuple(_flatten(part, leaves) for part in value)


def _unflatten(shape: Any, leaves: Iterator[Tensor]) -> Any:
    if shape is True:
        return next(leaves)
    return None if shape is None else tuple(_unflatten(part, leaves) for part in shape)


@dataclass(frozen=True)
class CityCache:
    """What one model knows of a city's ads before any request; immutable."""

    states: Tensor
    """[N, D] float32, up to the first fusion."""
    query: Tensor | None
    """[N, D] queries of the first target attention; None without one."""
    context: Clusters | None
    """Keys of the first context attention; None without one."""
    ad_fields: Tensor
    """[1, N, F_ad]."""
    ad_place: Tensor
    """[1, N, 2]."""
    recording: _Recording | None = None
    """Of a request's pass over these ads; see `WholeCity.record`."""


@dataclass(frozen=True)
class Encoded:
    """What the auction needs of one request. Tensors live in the engine's buffers until its next request."""

    h: Tensor
    """[1, N, D] high-order representations, float32."""
    user: Tensor
    """[1, D] e_u."""
    click: Tensor
    """[1, N] set-aware click logits, float32."""
    affinity: Tensor
    """[1, N, K] A, float32."""
    slopes: Tensor
    """[1, N, K] e^{w+M}, float32."""
    reached: Tensor | None = None
    """[1, N] which ads an earlier stage of a cascade lets into the auction; None: all."""
    again: Callable[[Tensor], Encoded] | None = None
    """The same for the ads at rows [M] in float32, from the clusters of this request; None where that would change nothing."""


class _Scratch(threading.local):
    """Buffers of a thread, one a purpose, that every chunk writes anew: fresh memory would cost a page fault every 4 KiB."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, purpose: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, width], valid until the same purpose is asked for again in this thread."""
        key = (purpose, width, dtype, device)
        if key not in self.kept or len(self.kept[key]) < rows:
            self.kept[key] = torch.empty(rows, width, dtype=dtype, device=device)
        return self.kept[key][:rows]

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Buffers of its own for what runs in here."""
        kept, self.kept = self.kept, {}
        try:
            yield
        finally:
            self.kept = kept


_scratch = _Scratch()


class _Product:
    """x W^T + b in the engine's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype).T  # [in, out], a view of the layer's own memory in float32
        self.bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if bias is None else bias.detach().to(dtype)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> _Product:
        return cls(layer.weight, layer.bias, dtype)

    def __call__(self, x: Tensor, purpose: str) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, out=_scratch(purpose, len(x), len(self.bias), x.dtype, x.device))


class _Gate:
    """Dice as x * gate(x), in float32, with its constants multiplied out."""

    def __init__(self, dice: Dice, rows: slice = slice(None)) -> None:
        self.scale = torch.rsqrt(dice.variance + dice.epsilon)[rows]
        self.shift = -dice.mean[rows] * self.scale
        self.alpha = dice.alpha.detach()[rows]
        self.rest = 1.0 - self.alpha

    def __call__(self, x: Tensor) -> Tensor:
        gate = _scratch("gate", len(x), x.shape[1], torch.float32, x.device)
        torch.addcmul(self.shift, x, self.scale, out=gate).sigmoid_()
        return torch.addcmul(self.alpha, gate, self.rest, out=gate)


class _Norm:
    """LayerNorm in float32, handed on in the engine's dtype."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.epsilon, self.dtype = norm.weight.detach(), norm.bias.detach(), norm.eps, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], self.weight, self.bias, self.epsilon).to(self.dtype)


def _prototypes(prototypes_CD: Tensor, dtype: torch.dtype) -> Tensor:
    """[D, C] with the logits' scale multiplied in."""
    return (prototypes_CD.detach() / math.sqrt(prototypes_CD.shape[1])).to(dtype).T


class _Gather:
    """S^T V over all ads for C prototypes, S = softmax over the ads of y P^T / sqrt(D), in one sweep.

    exp needs a shift only against overflow, so the largest logits of the first ads serve for all: sums are then at least 1, and an ad
    whose logit exceeds that by more than 88 makes them infinite, which the caller sees in its outputs.
    """

    def __init__(self, prototypes_DC: Tensor) -> None:
        self.prototypes = prototypes_DC
        self.shift: Tensor | None = None

    def add(self, y: Tensor, values: Tensor) -> None:
        """A chunk: y [n, D] is what the prototypes see, values [n, V] what is averaged."""
        if self.shift is None:
            weight = y @ self.prototypes
            self.shift = -weight[:256].amax(0)
            weight.add_(self.shift).exp_()
            self.sum, self.total = (weight.T @ values).float(), weight.sum(0, dtype=torch.float32)
            return
        weight = torch.addmm(self.shift, y, self.prototypes, out=_scratch("weight", len(y), len(self.shift), y.dtype, y.device)).exp_()
        if weight.dtype == torch.float32:
            self.sum.addmm_(weight.T, values)
        else:
            self.sum += weight.T @ values
        self.total += weight.sum(0, dtype=torch.float32)

    def merge(self, other: _Gather) -> None:
        """Add what another thread gathered over other ads."""
        assert self.shift is not None and other.shift is not None
        shift = torch.minimum(self.shift, other.shift)
        for part in (self, other):
            fade = torch.exp((shift - part.shift).float())
            part.sum, part.total = part.sum * fade.unsqueeze(1), part.total * fade
        self.shift, self.sum, self.total = shift, self.sum + other.sum, self.total + other.total

    def mean(self) -> Tensor:
        """[C, V] float32, the clusters."""
        return self.sum / self.total.unsqueeze(1)


Keys = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values by head, [1, H, M, E] each, and the mask [1, 1, 1, M]."""


class _Attention:
    """Attention of ads to given keys with output projection, Dice and residual: Eq. 9-10, within a block or across (MIF)."""

    def __init__(self, attention: ClusterAttention | CrossAttention, dtype: torch.dtype) -> None:
        self.heads, self.dtype = attention.heads, dtype
        self.out, self.gate = _Product.of(attention.out, dtype), _Gate(attention.out_dice)

    def keys(self, clusters: Clusters) -> Keys:
        key, value = (x.to(self.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous() for x in (clusters.key_BMD, clusters.value_BMD))
        return key, value, None if clusters.mask_BM is None else clusters.mask_BM[:, None, None]

    def add(self, x: Tensor, query: Tensor, keys: Keys, out: Tensor) -> None:
        """out = x + Dice(f(attention)); all [n, D]."""
        split = query.view(1, len(query), self.heads, -1).transpose(1, 2)
        heads = F.scaled_dot_product_attention(split, keys[0], keys[1], attn_mask=keys[2])
        change = self.out(heads.transpose(1, 2).reshape(query.shape), "change").float()
        torch.addcmul(x, change, self.gate(change), out=out)


class _FeedForward:
    """x += f(LN(x)), Eq. 15."""

    def __init__(self, norm: nn.LayerNorm, layer: FeedForward, dtype: torch.dtype) -> None:
        self.norm, self.up, self.down = _Norm(norm, dtype), _Product.of(layer.up, dtype), _Product.of(layer.down, dtype)

    def add(self, x: Tensor) -> None:
        hidden = self.up(self.norm(x), "hidden").relu_()
        if hidden.dtype == torch.float32:
            x.add_(self.down.bias).addmm_(hidden, self.down.weight)
        else:
            x += self.down(hidden, "change")


class _Block:
    """A GCF block in two halves: what it `gather`s in one sweep over the ads, it attends to when it `finish`es them in the next."""

    def __init__(self, block: ClusterBlock, dtype: torch.dtype) -> None:
        source, width = block.attention, block.attention.qkv.in_features
        self.source, self.dtype = source, dtype
        self.norm, self.prototypes = _Norm(block.norm_attention, dtype), _prototypes(source.prototypes, dtype)
        self.query = _Product(source.qkv.weight[:width], source.qkv.bias[:width], dtype)
        self.project = self.query_gate = self.project_gate = None
        if source.qkv_dice is not None:
            self.project, self.project_gate, self.query_gate = _Product.of(source.qkv, dtype), _Gate(source.qkv_dice), _Gate(source.qkv_dice, slice(0, width))
        self.attention = _Attention(source, dtype)
        self.forward_layer = _FeedForward(block.norm_forward, block.forward_layer, dtype)

    def gather(self, clusters: _Gather, x: Tensor) -> None:
        """Add a chunk to the clusters that `finish` attends to."""
        y = values = self.norm(x)
        if self.project is not None and self.project_gate is not None:
            values = self.project(y, "values")
            values *= self.project_gate(values)
        clusters.add(y, values)

    def keys(self, clusters: _Gather) -> Keys:
        """K' and V' of Eq. 12-14 from what was gathered."""
        mean = clusters.mean().unsqueeze(0)
        surrogate = mean if self.project is not None else self.source.qkv(mean)
        return self.attention.keys(self.source.mix(*surrogate.chunk(3, -1)))

    def finish(self, x: Tensor, keys: Keys) -> None:
        """The block on a chunk, in place."""
        query = self.query(self.norm(x), "query")
        if self.query_gate is not None:
            query *= self.query_gate(query)
        self.attention.add(x, query, keys, out=x)
        self.forward_layer.add(x)


class _Pointwise:
    """The ablation of GCF on ads: nothing to gather."""

    prototypes = None

    def __init__(self, block: PointwiseBlock, dtype: torch.dtype) -> None:
        self.forward_layer = _FeedForward(block.norm, block.forward_layer, dtype)

    def gather(self, clusters: None, x: Tensor) -> None:
        pass

    def keys(self, clusters: None) -> None:
        return None

    def finish(self, x: Tensor, keys: None) -> None:
        self.forward_layer.add(x)


def _block(block: nn.Module, dtype: torch.dtype) -> Any:
    return _Pointwise(block, dtype) if isinstance(block, PointwiseBlock) else _Block(block, dtype)  # type: ignore[arg-type]


class _Fusion:
    """The ads' side of MIF after one block: target attention, and what the behaviours' context attention reads."""

    def __init__(self, recformer: RecFormer, number: int, dtype: torch.dtype) -> None:
        key = str(number)
        self.ad_norm, self.behaviour_norm = recformer.norms[key]  # type: ignore[misc]
        self.target, self.context = (dict(modules.items()).get(key) for modules in (recformer.target, recformer.context))
        self.norm = _Norm(self.ad_norm, dtype)
        self.query = None if self.target is None else _Product.of(self.target.query, dtype)
        self.attention = None if self.target is None else _Attention(self.target, dtype)
        self.prototypes = None if self.context is None else _prototypes(self.context.prototypes, dtype)

    def seen(self, behaviour_BLD: Tensor, mask_BL: Tensor) -> Clusters | None:
        """What ads attend to: the user's behaviours before this fusion."""
        return None if self.target is None else self.target.keys(self.behaviour_norm(behaviour_BLD), mask_BL)

    def keys(self, seen: Clusters | None) -> Keys | None:
        """The same by head, in the engine's dtype."""
        return None if seen is None or self.attention is None else self.attention.keys(seen)

    def add(self, x: Tensor, keys: Keys | None, context: _Gather | None) -> None:
        """Both directions for a chunk of ads, from its states before the fusion."""
        y = self.norm(x)
        if context is not None:
            context.add(y, y)
        if keys is not None and self.query is not None and self.attention is not None:
            self.attention.add(x, self.query(y, "query"), keys, out=x)

    def context_keys(self, clusters: _Gather | None) -> Clusters | None:
        """What behaviours attend to: clusters of the ads before this fusion."""
        return None if clusters is None or self.context is None else cross_keys(self.context, clusters.mean())

    def update(self, behaviour_BLD: Tensor, mask_BL: Tensor, keys: Clusters | None) -> Tensor:
        """The behaviours after context attention."""
        return behaviour_BLD if keys is None or self.context is None else behaviour_BLD + self.context(self.behaviour_norm(behaviour_BLD), mask_BL, keys)


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch runs every operation alone; the other threads of the process keep their setting."""
    before, together = torch.get_num_threads(), threading.Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # a thread takes the process's setting at its first call and would take it over the next line's later
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "ega-ads", initializer=alone)
    list(pool.map(lambda _: together.wait(), range(count)))  # all started: the setting is also what new threads inherit
    torch.set_num_threads(before)
    return pool


def cross_keys(attention: CrossAttention, mean_CD: Tensor) -> Clusters:
    """K' = f_k2(A_k), V' = f_v2(A_v), projected from the C aggregated rows instead of from all tokens."""
    key, value = attention.key_value(mean_CD.unsqueeze(0)).chunk(2, -1)
    return Clusters(attention.key_map(key), attention.value_map(value), None)


class WholeCity:
    """A network made ready to rank whole cities, one request at a time (`lock`).

    On a CPU every thread takes its own run of chunks through a sweep with the library's threads switched off: threads then wait for each
    other once a sweep instead of after every operation, and a chunk stays in the cache of one core. The split is fixed, so equal requests
    get equal bits.
    """

    def __init__(self, network: RankingModel, execution: Execution) -> None:
        if execution.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: cuda needs a CUDA build of torch and a GPU that it can see; use device: cpu")
        self.execution, self.dtype, self.device = execution, execution.resolved(), torch.device(execution.device)
        weights = {id(each): nn.Parameter(each.detach().to(self.device), requires_grad=False) for each in network.parameters()}  # on a CPU the same memory
        self.network = copy.deepcopy(network, weights).to(self.device)
        self.lock = threading.Lock()
        self._threads = torch.get_num_threads() if execution.device == "cpu" else 1
        self._swept = execution.path == "fast" and isinstance(network, EgaV1)
        if not self._swept:
            return
        recformer, generator, head = self.network.recformer, self.network.generator, self.network.click_head
        self.first, self.last = recformer.fusions[0], len(recformer.ad_blocks)
        self._blocks = {number: _block(block, self.dtype) for number, block in enumerate(recformer.ad_blocks, start=1) if number > self.first}
        self._fusions = {number: _Fusion(recformer, number, self.dtype) for number in recformer.fusions}
        self._behaviour_blocks = [_Block(block, self.dtype) for block in recformer.behaviour_blocks]  # type: ignore[arg-type]
        # The same layers for the ads that may reach the page. Views of the same memory where the dtype is float32.
        self._exact_blocks = {number: _block(recformer.ad_blocks[number - 1], torch.float32) for number in self._blocks}
        self._exact_fusions = {number: _Fusion(recformer, number, torch.float32) for number in recformer.fusions}
        self._norm = _Norm(recformer.norm, torch.float32)
        self._slot_prototypes = _prototypes(torch.cat([block[1].prototypes for block in generator.blocks]), self.dtype)  # type: ignore[index,misc]
        self._item = _Product(head.item.weight, None, self.dtype)
        self._rest = [_Product.of(layer, self.dtype) for layer in head.rest.layers]  # type: ignore[arg-type]
        self._buffer = torch.empty(0, device=self.device)
        self._pool = _single_threads(self._threads) if self._threads > 1 else None

    def alone(self, work: Callable[[], Result]) -> Result:
        """`work` in a thread of the engine's own, where torch does every operation alone: what comes before and after the sweeps is hundreds of small
        operations, and to share them among threads costs more than they do. In the calling thread where the plain network runs."""
        if not self._swept or self._pool is None:
            return work()
        return self._pool.submit(torch.inference_mode()(work)).result()

    def _parts(self, ads: int) -> list[list[slice]]:
        """Chunks of even size by thread; few ads are one chunk."""
        chunk = ads if self.device.type == "cuda" else self.execution.chunk * (4 // self.dtype.itemsize)
        threads = min(self._threads, max(1, ads // LEAST_ADS))
        rounds = math.ceil(ads / (threads * chunk))
        edges = [ads * i // (threads * rounds) for i in range(threads * rounds + 1)]
        chunks = [slice(low, high) for low, high in itertools.pairwise(edges)]
        return [chunks[i * rounds : (i + 1) * rounds] for i in range(threads)]

    def _sweep(self, ads: int, prototypes: list[Tensor | None], work: Callable[..., None], alone: bool = False) -> list[Any]:
        """`work(rows, *gathers)` for every chunk; returns what was gathered for each of the prototypes, None for None. `alone`: in the
        calling thread, so that requests go on in the engine's."""

        @torch.inference_mode()
        def run(chunks: list[slice]) -> list[Any]:
            gathers = [None if each is None else _Gather(each) for each in prototypes]
            for rows in chunks:
                work(rows, *gathers)
            return gathers

        parts = self._parts(ads)
        if alone or self._pool is None or len(parts) == 1:
            return run([rows for part in parts for rows in part])
        others = [self._pool.submit(run, part) for part in parts[1:]]  # the first part is this thread's own: see `alone`
        gathered = run(parts[0])
        for other in others:
            for mine, theirs in zip(gathered, other.result(), strict=True):
                if mine is not None:
                    mine.merge(theirs)
        return gathered

    @torch.inference_mode()
    def prepare(self, ad_fields: Tensor, ad_place: Tensor) -> CityCache:
        """What depends on the ads alone, in float32; ad_fields int64 [1, N, F_ad], ad_place float32 [1, N, 2]. Needs no
        lock and none of the engine's threads: requests for another snapshot go on meanwhile."""
        ad_fields, ad_place = ad_fields.to(self.device), ad_place.to(self.device)
        if not self._swept:
            states = self.network.city_states(ad_fields, torch.ones(ad_fields.shape[:2], dtype=torch.bool, device=self.device))
            return CityCache(states[0], None, None, ad_fields, ad_place)
        recformer, ads = self.network.recformer, ad_fields.shape[1]
        x = torch.empty(ads, self.network.config.width, device=self.device)
        fusion = _Fusion(recformer, self.first, torch.float32)
        query = None if fusion.query is None else torch.empty(x.shape, dtype=self.dtype, device=self.device)
        blocks = [_block(block, torch.float32) for block in recformer.ad_blocks[: self.first]]

        def embed(rows: slice, clusters: _Gather | None) -> None:
            x[rows] = self.network.features.ads(ad_fields[0, rows])
            blocks[0].gather(clusters, x[rows])

        (clusters,) = self._sweep(ads, [blocks[0].prototypes], embed, alone=True)
        for block, following in itertools.pairwise([*blocks, None]):
            keys = block.keys(clusters)

            def finish(rows: slice, gather: _Gather | None, block: Any = block, following: Any = following, keys: Any = keys) -> None:
                block.finish(x[rows], keys)
                if following is not None:
                    following.gather(gather, x[rows])
                    return
                y = fusion.norm(x[rows])
                if query is not None and fusion.query is not None:
                    query[rows] = fusion.query(y, "query")
                if gather is not None:
                    gather.add(y, y)

            (clusters,) = self._sweep(ads, [fusion.prototypes if following is None else following.prototypes], finish, alone=True)
        return CityCache(x, query, fusion.context_keys(clusters), ad_fields, ad_place)

    def record(self, city: CityCache, behaviours: int) -> CityCache:
        """The same city with a recording of a request's pass over it, for histories of this length; as it is where a pass is shared among threads, runs
        on a GPU, or depends on the history (`_without_padding`). Needs no lock, as `prepare`."""
        if not self._swept or self._pool is not None or self.device.type != "cpu" or not 0 < behaviours < self.network.config.exact_behaviours:  # the context is a token too
            return city
        widths = (len(schema.USER_FIELDS),), (len(schema.CONTEXT_FIELDS),), (behaviours, len(schema.BEHAVIOUR_FIELDS))
        example = (*(torch.full((1, *width), schema.FIRST_CODE) for width in widths), torch.zeros(1, 2))
        with torch.inference_mode():
            x = torch.empty_like(city.states)
            return replace(city, recording=_Recording(lambda *inputs: self._pass(city, x, *inputs), example))

    @torch.inference_mode()
    def encode(self, city: CityCache, user_fields: Tensor, context_fields: Tensor, behaviours: Tensor, request_place: Tensor) -> Encoded:
        """One request, [1, F_user], [1, F_context], [1, L, F_behaviour], [1, 2]. The caller holds `lock` while it reads the result."""
        inputs = tuple(x.to(self.device) for x in (user_fields, context_fields, behaviours, request_place))
        encoded = self._encode(city, *inputs) if self._swept else self._plain(city, *inputs)
        if self._swept and not bool(torch.isfinite(encoded.click.sum() + encoded.affinity.sum())):
            return self._plain(city, *inputs)
        return encoded

    def _encode(self, city: CityCache, *inputs: Tensor) -> Encoded:
        if city.recording is not None and city.recording.fits(inputs):
            found = city.recording(*inputs)
        else:
            if self._buffer.shape != city.states.shape:
                self._buffer = torch.empty_like(city.states)
            found = self._pass(city, self._buffer, *inputs)
        h, user, click, scores, projected, crossed, trail = found
        encoded = Encoded(h.unsqueeze(0), user, click.unsqueeze(0), *scores)
        if self.dtype == torch.float32:
            return encoded
        return replace(encoded, again=lambda rows: self._again(city, rows, trail, user, crossed, projected))

    def _pass(self, city: CityCache, x: Tensor, user_fields: Tensor, context_fields: Tensor, behaviours: Tensor, request_place: Tensor) -> Any:
        """h, written to x [N, D]; e_u [1, D]; click logits [N]; A and e^{w+M}; and what `_again` reads: slot projections, crossed features, and what was
        attended to from the first fusion on, block by block."""
        network, head, ads = self.network, self.network.click_head, len(city.states)
        click = torch.empty(ads, device=self.device)
        user = network.features.user(user_fields, context_fields)
        behaviours = self._without_padding(behaviours)
        person = head.item.bias.to(self.dtype) + head.user(user)[0].to(self.dtype)
        crossed = None if network.cross is None else cross_features(city.ad_fields, behaviours, city.ad_place, request_place)[0]
        behaviour, mask = network.features.behaviours(behaviours, user)
        for number in range(1, min(self.first, len(self._behaviour_blocks)) + 1):
            behaviour = self._next_behaviour(number, behaviour, mask)

        clusters = slots = None
        trail: list[tuple[Keys | None, Keys | None]] = []
        for number in range(self.first, self.last + 1):
            block, following, fusion = self._blocks.get(number), self._blocks.get(number + 1), self._fusions.get(number)
            keys = None if block is None else block.keys(clusters)
            if block is not None and self._behaviour_blocks:
                behaviour = self._next_behaviour(number, behaviour, mask)
            history = None if fusion is None else fusion.seen(behaviour, mask)
            seen = None if fusion is None else fusion.keys(history)
            if self.dtype != torch.float32:
                exact = self._exact_fusions.get(number)
                trail.append((None if block is None else self._exact_blocks[number].keys(clusters), None if exact is None else exact.keys(history)))

            def advance(rows: slice, gather: _Gather | None, context: _Gather | None, slots: _Gather | None) -> None:
                part = x[rows]
                if block is None:  # noqa: B023 - called within this turn of the loop
                    self._first_fusion(city, rows, part, seen)  # noqa: B023
                else:
                    block.finish(part, keys)  # noqa: B023
                    if fusion is not None:  # noqa: B023
                        fusion.add(part, seen, context)  # noqa: B023
                if following is not None:  # noqa: B023
                    following.gather(gather, part)  # noqa: B023
                elif slots is not None:
                    self._read(part, None if crossed is None else crossed[rows], person, click[rows], slots)

            wanted = [
                None if following is None else following.prototypes,
                None if fusion is None or block is None else fusion.prototypes,
                self._slot_prototypes if number == self.last else None,
            ]
            clusters, context, slots = self._sweep(ads, wanted, advance)
            if fusion is not None:
                behaviour = fusion.update(behaviour, mask, city.context if block is None else fusion.context_keys(context))
        projected = self._projected_slots(user, slots)
        return x, user, click, self._scores(x, projected), projected, crossed, tuple(trail)

    def _without_padding(self, behaviours: Tensor) -> Tensor:
        """[1, L', F] without the padding at the end, as far as that decides nothing: few behaviours are attended to one by one, many by clusters."""
        least = max(1, self.network.config.exact_behaviours)
        if behaviours.shape[1] <= least:
            return behaviours
        real = torch.nonzero(behaviours[0, :, 0] != schema.PADDING)
        return behaviours[:, : max(least, 1 + int(real[-1]) if len(real) else 0)]

    def _next_behaviour(self, number: int, behaviour_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """The behaviours after their own block of this number; in the engine's dtype where there are many and none is padding."""
        block = self.network.recformer.behaviour_blocks[number - 1]
        if behaviour_BLD.shape[1] <= block.attention.exact_up_to or not bool(mask_BL.all()):
            return block(behaviour_BLD, mask_BL)
        swept, x = self._behaviour_blocks[number - 1], behaviour_BLD[0].clone()
        clusters = _Gather(swept.prototypes)
        swept.gather(clusters, x)
        swept.finish(x, swept.keys(clusters))
        return x.unsqueeze(0)

    def _again(
        self, city: CityCache, rows: Tensor, trail: tuple[tuple[Keys | None, Keys | None], ...], user: Tensor, crossed: Tensor | None, projected: Tensor
    ) -> Encoded:
        """The way of some ads through the network once more, in float32. What they attend to is kept: as averages over all ads the
        clusters hold far less rounding than a single ad does."""
        x = city.states[rows]
        for number, (keys, seen) in enumerate(trail, self.first):
            if keys is not None or number > self.first:
                self._exact_blocks[number].finish(x, keys)
            if number in self._exact_fusions:
                self._exact_fusions[number].add(x, seen, None)
        h = self._norm(x)
        if crossed is not None and self.network.cross is not None:
            h += self.network.cross(crossed[rows])
        return Encoded(h.unsqueeze(0), user, self.network.click_head(h.unsqueeze(0), user), *self._scores(h, projected))

    def _first_fusion(self, city: CityCache, rows: slice, x: Tensor, keys: Keys | None) -> None:
        """Ads after the first fusion, from what is kept of the city."""
        fusion = self._fusions[self.first]
        if keys is None or city.query is None or fusion.attention is None:
            x.copy_(city.states[rows])
        else:
            fusion.attention.add(city.states[rows], city.query[rows], keys, out=x)

    def _read(self, x: Tensor, crossed: Tensor | None, person: Tensor, click: Tensor, slots: _Gather) -> None:
        """The final norm of a chunk in place, its click logits, and its part of what slot tokens attend to."""
        h = self._norm(x)
        if crossed is not None and self.network.cross is not None:
            h += self.network.cross(crossed)
        x.copy_(h)
        y = h.to(self.dtype)
        hidden = torch.addmm(person, y, self._item.weight, out=_scratch("head", len(y), len(person), y.dtype, y.device)).relu_()
        for number, layer in enumerate(self._rest[:-1]):
            hidden = layer(hidden, f"head {number}").relu_()
        click.copy_(self._rest[-1](hidden, "click").squeeze(1))
        slots.add(y, y)

    def _projected_slots(self, user: Tensor, slots: _Gather) -> Tensor:
        """[2K, D]: products with h are A and the log of what multiplies e^w."""
        generator = self.network.generator
        means = slots.mean().chunk(len(generator.blocks))
        token = generator.slot_tokens(user, [cross_keys(block[1], mean) for block, mean in zip(generator.blocks, means, strict=True)])  # type: ignore[index,arg-type]
        return torch.cat([generator.add(token), generator.scale(token)], 1)[0] / math.sqrt(token.shape[-1])

    def _scores(self, h: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """A and e^{w+M}, [1, N, K] each, stored slot by slot."""
        affinity, slopes = self.network.generator.combine(*(projected @ h.T).chunk(2))
        return affinity.T.unsqueeze(0), slopes.T.unsqueeze(0)

    def _plain(self, city: CityCache, user_fields: Tensor, context_fields: Tensor, behaviours: Tensor, request_place: Tensor) -> Encoded:
        """The reference, from the same states; also for a request whose softmax over the ads overflows the sweeps' fixed shift."""
        mask = torch.ones(city.ad_fields.shape[:2], dtype=torch.bool, device=self.device)
        batch = Batch(city.ad_fields, mask, city.ad_place, user_fields, context_fields, behaviours, request_place)
        h, user, reached = self.network.survey(city.states.unsqueeze(0), batch)
        slots = (1, h.shape[1], self.network.config.slots)
        scores = (h.new_zeros(slots), h.new_ones(slots)) if self.network.generator is None else self.network.generator(h, mask, user)
        return Encoded(h, user, self.network.click_head(h, user), *scores, reached)
