"""CRC-32 by Intel's ISA-L, or by zlib: the same values, several times slower."""

from __future__ import annotations

import ctypes

try:
    from isal.isal_zlib import crc32, crc32_combine
except ImportError:  # NVIDIA's containers do not have it
    from zlib import crc32

    # Python's zlib module does not export crc32_combine, which joins parts that several threads
    # read.
    _zlib = ctypes.CDLL("libz.so.1")
    _zlib.crc32_combine.argtypes = [ctypes.c_ulong, ctypes.c_ulong, ctypes.c_long]
    _zlib.crc32_combine.restype = ctypes.c_ulong
    crc32_combine = _zlib.crc32_combine

__all__ = ["crc32", "crc32_combine"]
