"""A device that is not the CPU, without one: what would go wrong on a GPU goes wrong here.

Its tensors say that they are on `far` and keep their values in memory. An operation on them gives the CPU's result, but it must not mix them with
tensors of the CPU, read them without a copy to the CPU, or be one that PyTorch refuses on a GPU under deterministic algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("far", backend_module=_Module())
FAR = torch.device("far:0")
aten = torch.ops.aten

MOVES = {aten._to_copy.default, aten.copy_.default}
"""May read one device and write the other."""
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""Give a Python value: a copy that waits for the device."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index_put.default}
"""Take indices of the CPU everywhere."""
TOGETHER = {aten.cat.default, aten.stack.default}
"""Take no scalar of the CPU either."""
NOT_DETERMINISTIC = ("cumsum", "cumprod", "put_", "histc", "bincount", "kthvalue", "median.dim", "nanmedian.dim", "grid_sampler_2d_backward", "reflection_pad1d_backward", "_ctc_loss")
"""Operations that raise on a GPU with `torch.use_deterministic_algorithms` (of the list in its documentation, the ones on floats or indices)."""


class Far(torch.Tensor):
    """A tensor on the far device; `near` holds its values."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR)
        far.near = near
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert a far tensor to numpy; copy it to the CPU first (force=True)")
        return self.detach().cpu().numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a far tensor outside of `far_device`")


# PyTorch moves an index that is a Python list by itself, past every mode.
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("empty_strided", lambda size, stride, dtype=None, layout=None, device=None, pin_memory=None: Far(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1")


@torch.library.impl(_kernels, "_copy_from", "PrivateUse1")
def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    into, out_of = (x.near if isinstance(x, Far) else x for x in (target, source))
    into.copy_(out_of)
    return target


class _Far(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        to_far = "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]) == FAR
        to_near = "device" in kwargs and kwargs["device"] is not None and not to_far
        if not far and not to_far:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if far and func not in MOVES:
            taken = [id(x) for x in args[1] if x is not None] if func in INDEXED else []
            stray = [x for x in tensors if not isinstance(x, Far) and (x.dim() > 0 or func in TOGETHER) and id(x) not in taken]
            if stray:
                raise RuntimeError(f"{func}: tensors on two devices, among them {stray[0].dtype}{list(stray[0].shape)} on the CPU")
            if any(f"{name}.{func._overloadname}".startswith(each) for each in NOT_DETERMINISTIC) and far[0].is_floating_point():
                raise RuntimeError(f"{func} has no deterministic implementation on a GPU")
        if to_far:
            kwargs["device"] = torch.device("cpu")
        near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
        out = func(*near_args, **near_kwargs)
        if func in READS or to_near:
            return out
        if func is aten.copy_.default and not isinstance(args[0], Far):
            return args[0]
        own = {id(x.near): x for x in far}
        return tree_map(lambda x: (own[id(x)] if id(x) in own else Far(x)) if isinstance(x, torch.Tensor) else x, out)


@contextmanager
def far_device() -> Iterator[torch.device]:
    """Within, `to("far:0")` moves a tensor to the far device."""
    with _Far():
        yield FAR
