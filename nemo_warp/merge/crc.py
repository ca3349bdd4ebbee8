"""CRC-32 of a whole from the CRC-32s of its parts, so that parts can be written in any order."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of A + B from that of A, that of B, and the length of B (as zlib's crc32_combine)."""
    return _multiply(_shift(second_bytes), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Product of a and b modulo the CRC polynomial, bits reflected."""
    product, mask = 0, _ONE
    while True:
        if a & mask:
            product ^= b
            if not a & (mask - 1):
                return product
        mask >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1


@lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """x^(8 * num_bytes) modulo the CRC polynomial."""
    result, power, bits = _ONE, _ONE >> 1, 8 * num_bytes
    while bits:
        if bits & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        bits >>= 1
    return result
