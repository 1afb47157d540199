"""Input checks and currency rounding, shared by every rule: a NaN that enters an auction leaves it as somebody's money."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class AuctionInputError(ValueError):
    """An input that no auction can be run on; the message names the array, the position and the valid range."""


def as_floats(name: str, value: Any, shape: tuple[int | None, ...], minimum: float | None = None, maximum: float | None = None) -> Floats:
    """`value` as finite float64 of `shape` (None: any length); raises AuctionInputError with the first bad position."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise AuctionInputError(f"{name} must be numeric: {error}") from error
    if array.ndim != len(shape) or any(want is not None and have != want for have, want in zip(array.shape, shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise AuctionInputError(f"{name} must have shape ({wanted}), got {array.shape}")
    check_range(name, array, minimum, maximum)
    return array


def check_range(name: str, array: Floats, minimum: float | None = None, maximum: float | None = None) -> None:
    """Raise AuctionInputError unless every entry is finite and within [minimum, maximum]."""
    if array.size == 0:
        return
    low, high = float(array.min()), float(array.max())  # a NaN anywhere makes both NaN
    if math.isfinite(low) and math.isfinite(high) and (minimum is None or low >= minimum) and (maximum is None or high <= maximum):
        return
    bad = ~np.isfinite(array)
    if minimum is not None:
        bad |= array < minimum
    if maximum is not None:
        bad |= array > maximum
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    bounds = "finite" + ("" if minimum is None else f" and >= {minimum:g}") + ("" if maximum is None else f" and <= {maximum:g}")
    place = f" at {where[0] if len(where) == 1 else where}" if where else ""
    raise AuctionInputError(f"{name} must be {bounds}, got {float(array[where])!r}{place}")


def as_mask(name: str, value: Any, shape: tuple[int, ...]) -> Bools:
    """`value` as a boolean array of `shape`; None means all true."""
    if value is None:
        return np.ones(shape, dtype=np.bool_)
    array = np.asarray(value)
    if array.dtype != np.bool_ or array.shape != shape:
        raise AuctionInputError(f"{name} must be boolean of shape {shape}, got {array.dtype} of shape {array.shape}")
    return array


def as_page(name: str, value: Any, n_ads: int) -> Ints:
    """`value` as a page: int rows in [0, n_ads), no ad twice."""
    array = np.asarray(value)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise AuctionInputError(f"{name} must be a vector of row numbers, got {array.dtype} of shape {array.shape}")
    if int(array.min()) < 0 or int(array.max()) >= n_ads:
        raise AuctionInputError(f"{name} must hold rows in [0, {n_ads}), got {array.tolist()}")
    if len(set(array.tolist())) != len(array):
        raise AuctionInputError(f"{name} shows an ad twice: {array.tolist()}")
    return array.astype(np.int64)


def as_reserves(value: Any, n_ads: int) -> Floats:
    """A scalar or [N] reserve, currency per click, as [N]."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim == 0:
        array = np.full(n_ads, float(array))
    return as_floats("reserve", array, (n_ads,), minimum=0.0)


def round_down(price: Floats, currency_step: float, reserve: Floats | float, bid: Floats | float) -> Floats:
    """Charge for an exact price: the largest multiple of `currency_step` not above it, kept within [reserve, bid].

    A price within 1e-9 of a step below the next multiple counts as that multiple, so that float noise costs nobody a cent. A reserve
    that is no multiple of the step is charged as it stands. Step 0 charges the exact price. All in currency per click.
    """
    if not math.isfinite(currency_step) or currency_step < 0.0:
        raise AuctionInputError(f"currency_step must be finite and >= 0, got {currency_step!r}")
    charged = np.asarray(price, dtype=np.float64)
    if currency_step > 0.0:
        steps = np.floor(charged / currency_step + 1e-9)
        per_unit = round(1.0 / currency_step)
        # 3 / 10 is 0.3, 3 * 0.1 is not
        charged = steps / per_unit if per_unit and abs(per_unit * currency_step - 1.0) < 1e-12 else steps * currency_step
    return np.minimum(np.maximum(charged, reserve), bid)
