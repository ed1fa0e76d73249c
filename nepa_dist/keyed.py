"""Random seeds as pure functions of what they are for. Nothing to save, nothing to restore, equal on every rank."""

from __future__ import annotations

import hashlib


def keyed_seed(*keys: int | str) -> int:
    """Seed in [0, 2**63) that depends on its arguments alone: (run seed, purpose, step, ...)."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_uniform(*keys: int | str) -> float:
    """Draw in [0, 1) that depends on its arguments alone."""
    return (keyed_seed(*keys) >> 10) / 2**53
