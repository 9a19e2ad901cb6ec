"""Randomness that belongs to a sample and not to a process.

What is drawn depends on the run's seed, the epoch (or step, or variant) and the sample's id alone: neither workers nor
the number of processes nor a resumed run changes it.
"""

import hashlib

import numpy as np


def seed_of(*parts: str | int) -> int:
    """63 bits that depend on all the parts and their order, such as `("frames", run_seed, epoch, sample_id)`."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def numpy_generator(*parts: str | int) -> np.random.Generator:
    """A generator of its own for every [`seed_of`] the parts."""
    return np.random.default_rng(seed_of(*parts))
