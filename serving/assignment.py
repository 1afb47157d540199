"""Which arm answers a user: a stable hash, so that a user never changes arm and no state is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from serving.settings import Arm


def assign_arm(user_id: int, salt: str, arms: Sequence[Arm]) -> str:
    """Name of the user's arm: sha256 of salt and user id as a number in [0, 1), cut by the arms' cumulative shares.

    Args: user_id; salt of the experiment; arms with shares >= 0, not all 0, in a fixed order.
    Returns: the same arm for the same arguments, on any machine, in any process.
    """
    digest = hashlib.sha256(f"{salt}:{user_id}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(arm.share for arm in arms)
    reached = 0.0
    for arm in arms:
        reached += arm.share
        if point < reached:
            return arm.name
    return next(arm.name for arm in reversed(arms) if arm.share > 0)
