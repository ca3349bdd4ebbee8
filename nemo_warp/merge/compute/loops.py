"""The merge's inner loops over a slab, in float64, compiled by numba to run without the GIL.

A slab is taken in tiles that stay in the first-level cache. Within a tile the compiler may fuse
multiplications with additions and reorder the additions of an inner product to use vector
instructions, always in the same way: equal inputs give equal bits on machines with the same
instruction set.

Half precision has no arithmetic here, only bit patterns: bfloat16 as uint16, float16 as int16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

TILE = 1024
"""Elements per tile."""


def load() -> None:
    """Have numba load all it needs, about a second of work, before the first slab waits for it."""
    tile, grams = np.empty((1, TILE)), np.empty((1, 1, 1))
    gram(np.zeros((1, 1), np.uint16), np.zeros(1, np.int64), 1, 1, tile, grams)


def _compiled(function: Callable | None = None, **options) -> Callable:
    """Decorator: njit without the GIL, the machine code kept on disk where there is a place."""
    if function is None:
        return lambda function: _compiled(function, **options)
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder that it may write
        return njit(nogil=True, **options)(function)


@intrinsic
def _float_of_half(_context, _bits):
    def generate(_, builder, _signature, arguments):
        # numba has no float16 on the CPU: these two are the processor's own conversions, by LLVM.
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _half_of_float(_context, _value):
    def generate(_, builder, _signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def _widened(element):
    """The float64 that a stored element stands for."""


@overload(_widened, inline="always")
def _widened_by_type(element):
    if element == types.uint16:
        # A bfloat16 is the upper half of a float32.
        return lambda element: np.float64(np.uint32(np.uint32(element) << 16).view(np.float32))
    if element == types.int16:
        return lambda element: np.float64(_float_of_half(element))
    return lambda element: np.float64(element)


def _rounded(value, like):
    """A float64 rounded to the nearest element of the kind that ``like`` holds, ties to even."""


@overload(_rounded, inline="always")
def _rounded_by_type(value, like):
    if like.dtype == types.uint16:

        def to_bfloat16(value, like):
            bits = np.float32(value).view(np.uint32)
            # Half of the last place less one, and one more if that place is odd: ties go to even.
            return np.uint16(np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

        return to_bfloat16
    if like.dtype == types.int16:
        # Through float32, as torch does it. This rounds twice, and can differ from one rounding in
        # the last place where float32 hits a tie.
        return lambda value, like: _half_of_float(np.float32(value))
    if like.dtype == types.float32:
        return lambda value, like: np.float32(value)
    return lambda value, like: value


@_compiled
def gram(inputs, first, length, block, tile, out):
    """Gram matrices of (theta_init, delta_1 ..) over the blocks of a slab.

    Args:
        inputs: [N, ...] stored elements of (theta_init, theta_1 ..).
        first: [N] int64, where the slab begins in each row.
        length: elements of the slab.
        block: elements per block; the last may be shorter.
        tile: [N, TILE] float64 working memory.
        out: [ceil(length / block), N, N] float64 result.
    """
    num_inputs = len(first)
    out[:] = 0.0
    # One matrix per block, summed exactly later: the result does not depend on slabs or threads.
    for begin in range(0, length, block):
        end, sums = min(begin + block, length), out[begin // block]
        for start in range(begin, end, TILE):
            stop = min(start + TILE, end)
            for a in range(num_inputs):
                stored = inputs[a, first[a] + start : first[a] + stop]
                row = tile[a, : stop - start]
                if a == 0:
                    _widen(stored, row)
                else:
                    # Differences first: |theta|^2 is some 10^6 times |delta|^2 for RL policies, so
                    # inner products of deltas taken from those of weights would lose six digits.
                    _widen_difference(stored, tile[0], row)
                for b in range(a + 1):
                    sums[a, b] += _inner_product(row, tile[b])
        for a in range(num_inputs):
            for b in range(a):
                sums[b, a] = sums[a, b]


@_compiled
def combine(inputs, first, coefficients, noise, tile, out, place, length, projections, changed):
    """Merged values for all outputs, rounded, and what rounding did to them.

    Args:
        inputs: [N, ...] stored elements of (theta_init, theta_1 ..).
        first: [N] int64, which of each row to begin with.
        coefficients: [K + 1, N] float64; the last row is the merged task vector.
        noise: None to round to nearest, or [K, length] uint16 to round bfloat16 at random.
        tile: [N + 2, TILE] float64 working memory.
        out: [K, ...] stored elements, the result.
        place: which of each row of ``out`` to begin with.
        length: how many elements.
        projections: [K] float64 result, inner products of the rounded values with the merged
            task vector; not finite if a value was too large for ``out``.
        changed: [K] int64 result, numbers of elements that differ from theta_init.
    """
    num_inputs, num_outputs = len(first), len(projections)
    projections[:], changed[:] = 0.0, 0
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        for n in range(num_inputs):
            _widen(inputs[n, first[n] + start : first[n] + stop], tile[n])
        task_vector = tile[num_inputs, : stop - start]
        values = tile[num_inputs + 1, : stop - start]
        _weigh(tile, coefficients[num_outputs], task_vector)
        for k in range(num_outputs):
            target = out[k, place + start : place + stop]
            alone = _alone(coefficients[k])
            if alone >= 0:  # times 1, plus 0 times the others, would turn -0.0 into 0.0
                exact = tile[alone, : stop - start]
            else:
                exact = values
                _weigh(tile, coefficients[k], exact)
            if noise is None:
                _round(exact, target)
            else:
                _round_at_random(exact, noise[k, start:stop], target)
            projection, count = _compare(target, task_vector, tile[0])
            projections[k] += projection
            changed[k] += count


@_compiled
def _widen(stored, out):
    for i in range(len(stored)):
        out[i] = _widened(stored[i])


@_compiled
def _widen_difference(stored, base, out):
    for i in range(len(stored)):
        out[i] = _widened(stored[i]) - base[i]


@_compiled
def _alone(coefficients):
    """Which input the coefficients copy; -1 if they combine several."""
    found = -1
    for n in range(len(coefficients)):
        if coefficients[n] == 1.0 and found < 0:
            found = n
        elif coefficients[n] != 0.0:
            return -1
    return found


@_compiled(fastmath={"contract"})
def _weigh(rows, coefficients, out):
    """``out`` [length] = sum of coefficients times rows."""
    if len(coefficients) == 2:
        _weigh_two(rows[0], rows[1], coefficients, out)
        return
    a, b, c = rows[0], rows[1], rows[2]
    for i in range(len(out)):  # one pass for two policies, the usual case
        out[i] = coefficients[0] * a[i] + coefficients[1] * b[i] + coefficients[2] * c[i]
    for n in range(3, len(coefficients)):
        row = rows[n]
        for i in range(len(out)):
            out[i] += coefficients[n] * row[i]


@_compiled(fastmath={"contract"})
def _weigh_two(a, b, coefficients, out):
    for i in range(len(out)):
        out[i] = coefficients[0] * a[i] + coefficients[1] * b[i]


@_compiled(fastmath={"reassoc", "contract"})
def _inner_product(a, b):
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_compiled(fastmath={"reassoc", "contract"})
def _compare(stored, task_vector, base):
    """Inner product of stored elements with the task vector, and how many differ from ``base``."""
    projection, count = 0.0, 0
    for i in range(len(stored)):
        value = _widened(stored[i])
        projection += value * task_vector[i]
        count += value != base[i]
    return projection, count


@_compiled
def _round(values, target):
    for i in range(len(target)):
        target[i] = _rounded(values[i], target)


@_compiled
def _round_at_random(values, noise, target):
    """To bfloat16: 16 random bits below the last place are added, then cut off (float32).

    The expectation is the value itself. Zeros stay zeros.
    """
    for i in range(len(target)):
        bits = np.float32(values[i]).view(np.uint32)
        target[i] = np.uint16(np.uint32(bits + noise[i]) >> 16)
