"""Arithmetic in Z_p and Z_q, vectorised over uint64 arrays.

p = 2q + 1 with p and q prime, so Z_p has elements of order q: `exp` maps Z_q into Z_p by x -> omega**x, which turns
sums into products.  (Mirage, OSDI'25, section 5, uses the same pair of fields at 8 bits.)
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

P = 2147483579
Q = 1073741789

FEW = 96

Words = NDArray[np.uint64]
U = np.uint64


def add(a: Words, b: Words, modulus: int) -> Words:
    return (a + b) % U(modulus)


def subtract(a: Words, b: Words, modulus: int) -> Words:
    return (a + (U(modulus) - b)) % U(modulus)


def multiply(a: Words, b: Words, modulus: int) -> Words:
    # both operands are below 2**31, so the product fits 64 bits
    return a * b % U(modulus)


def power(base: Words, exponent: Words | int, modulus: int) -> Words:
    """`base ** exponent`, by squaring; operands broadcast."""
    result: Words
    if isinstance(exponent, int):
        first = np.asarray(base, dtype=U) % U(modulus)
        result = first if exponent else np.ones_like(first)
        for bit in f"{exponent:b}"[1:]:
            result = result * result % U(modulus)
            if bit == "1":
                result = result * first % U(modulus)
        return result
    b, e = np.broadcast_arrays(np.asarray(base, dtype=U) % U(modulus), np.asarray(exponent, dtype=U))
    result = np.ones(b.shape, dtype=U)
    b, e = b.copy(), e.copy()
    while e.any():
        result = np.where((e & U(1)).astype(bool), result * b % U(modulus), result)
        b = b * b % U(modulus)
        e = e >> U(1)
    return result


def inverse(a: Words, modulus: int) -> Words:
    """`1 / a`; the inverse of 0 comes out as 0, so callers resample when a denominator is 0.  By Fermat, where there
    are many; Euclid is faster for a few."""
    if a.size <= FEW:
        return np.array([pow(x, -1, modulus) if x % modulus else 0 for x in a.ravel().tolist()], dtype=U).reshape(
            a.shape
        )
    return power(a, modulus - 2, modulus)


def rational(numerator: int, denominator: int, modulus: int) -> int:
    """A rational number as a field element.  Raises ZeroDivisionError if the modulus divides the denominator."""
    if denominator % modulus == 0:
        raise ZeroDivisionError(f"{denominator} is zero modulo {modulus}")
    return numerator * pow(denominator, -1, modulus) % modulus


def seed_of(*key: object) -> int:
    """64 bits from a key: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def order_q_element(*key: object) -> int:
    """A random element of Z_p of order q: a square other than 1."""
    root = 2 + seed_of("omega", *key) % (P - 3)
    return root * root % P


def random_words(key: object, shape: tuple[int, ...], modulus: int) -> Words:
    """Uniform in 1 .. modulus - 1."""
    return np.random.default_rng(seed_of("random", key, modulus)).integers(1, modulus, size=shape, dtype=U)


def keyed_hash(x: Words, key: object, modulus: int) -> Words:
    """A pseudo-random function of x (splitmix64's finaliser over a keyed offset), reduced to the field."""
    with np.errstate(over="ignore"):
        z = x * U(0x9E3779B97F4A7C15) + U(seed_of("hash", key))
        z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
        return (z ^ (z >> U(31))) % U(modulus)
