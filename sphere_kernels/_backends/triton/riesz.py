"""The energy of a pair and its slopes in fp64, from squared distances; the tile of far pairs in fp32.

A pair is given by ``minus = |unit_i - unit_j|^2``, ``plus = |unit_i + unit_j|^2`` and ``deficit``, the sum of the two
rows' deficits. Near pairs need their squares from differences; see `sphere_kernels._backends.triton.near`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from sphere_kernels._backends.triton.common import EPSILON, deficit_of
from sphere_kernels._common import tiles

NEAR = tl.constexpr(tiles.NEAR)
CLAMP = tl.constexpr(tiles.CLAMP)
PI = tl.constexpr(math.pi)
HALF_PI = tl.constexpr(math.pi / 2)
RIGHT_ANGLE_SLOPE_1 = tl.constexpr(2**-1.5)  # -f_s'(t) / t at t = sqrt(2)
RIGHT_ANGLE_SLOPE_2 = tl.constexpr(0.5)


@triton.jit
def clamped(square):
    """At least `CLAMP`; NaN stays, and what a lower infinity leaves is no plausible number."""
    return tl.where(square - CLAMP < 0.0, (square - square) + CLAMP, square)


@triton.jit
def at_clamp(square):
    """Whether a squared distance is clamped. A comparison would round the constant to fp32, a difference does not."""
    return square - CLAMP <= 0.0


@triton.jit
def riesz_value(square, S: tl.constexpr):
    """``f_s(t)`` from ``t^2``."""
    if S == 0.0:
        return -0.5 * tl.log(square)
    elif S == 1.0:
        return 1.0 / tl.sqrt(square)
    elif S == 2.0:
        return 1.0 / square
    else:
        return tl.exp(tl.log(square) * (-0.5 * S))


@triton.jit
def riesz_slope(square, S: tl.constexpr):
    """``-f_s'(t) / t`` from ``t^2``; zero where the distance is clamped."""
    slope = 1.0 / square if S == 0.0 else S * riesz_value(square, S) / square
    return tl.where(at_clamp(square), 0.0, slope)


@triton.jit
def arcsine_tail(x):
    """``(asin(x) - x) / x`` for ``|x| <= 1/2``, to rounding: the rational function of fdlibm's ``e_asin.c``."""
    z = x * x
    top = 3.47933107596021167570e-05 * z + 7.91534994289814532176e-04
    top = (top * z - 4.00555345006794114027e-02) * z + 2.01212532134862925881e-01
    top = ((top * z - 3.25565818622400915405e-01) * z + 1.66666666666666657415e-01) * z
    bottom = (7.70381505559019352791e-02 * z - 6.88283971605453293030e-01) * z + 2.02094576023350569471e00
    return top / ((bottom * z - 2.40339491173441421878e00) * z + 1.0)


@triton.jit
def angle_from(square):
    """``arccos(g)`` of ``2 - 2 g``, for ``g >= 0``."""
    x = 0.5 * tl.sqrt(tl.where(square < 0.0, 0.0, square))
    # asin(x) = pi/2 - 2 asin(sqrt((1 - x) / 2)) past 1/2
    large = x >= 0.5
    y = tl.where(large, tl.sqrt(tl.where(large, 0.5 - 0.5 * x, 0.25)), x)
    y += y * arcsine_tail(y)
    return 2.0 * tl.where(large, y * -2.0 + HALF_PI, y)


@triton.jit
def supplement(angle):
    """``pi - angle``. In the interpreter a global constant must not stand on the left."""
    return -angle + PI


@triton.jit
def near_of(minus, plus, deficit, ANGULAR: tl.constexpr, HALF_SPACE: tl.constexpr):
    """Whether a pair is near, or one row with the other's negative where that counts."""
    if ANGULAR:
        return tl.where(plus < minus, plus, minus) + deficit < NEAR
    elif HALF_SPACE:
        return (minus < NEAR) | (plus < NEAR)
    else:
        return minus < NEAR


@triton.jit
def pair_value(minus, plus, deficit, S: tl.constexpr, ANGULAR: tl.constexpr, HALF_SPACE: tl.constexpr):
    """Energy of a pair."""
    if ANGULAR:
        flipped = plus < minus
        folded = angle_from(tl.where(flipped, plus, minus) + deficit)
        angle = tl.where(flipped, supplement(folded), folded)
        value = riesz_value(clamped(angle * angle), S)
        if HALF_SPACE:
            other = tl.where(flipped, folded, supplement(folded))
            value += riesz_value(clamped(other * other), S)
    else:
        value = riesz_value(clamped(minus), S)
        if HALF_SPACE:
            value += riesz_value(clamped(plus), S)
    return value


@triton.jit
def angular_slope(minus, plus, deficit, S: tl.constexpr, HALF_SPACE: tl.constexpr):
    """Derivative of a pair's energy in the inner product, and whether the nearer row is the negative one."""
    flipped = plus < minus
    square = tl.where(flipped, plus, minus) + deficit
    folded = angle_from(square)
    angle = tl.where(flipped, supplement(folded), folded)
    slope = angle * riesz_slope(angle * angle, S)
    if HALF_SPACE:
        other = tl.where(flipped, folded, supplement(folded))
        slope -= other * riesz_slope(other * other, S)
    sine = tl.sqrt(square * (1.0 - 0.25 * square))
    return tl.where(at_clamp(folded * folded), 0.0, slope / sine), flipped


@triton.jit
def far_slopes(minus, plus, deficit, S: tl.constexpr, ANGULAR: tl.constexpr, HALF_SPACE: tl.constexpr):
    """Coefficients of unit_j and of unit_i in the derivative of the energy of a pair that is not near."""
    if ANGULAR:
        bulk, _ = angular_slope(minus, plus, deficit, S, HALF_SPACE)
        radial = 0.0 * bulk
    else:
        bulk = riesz_slope(clamped(minus), S)
        radial = -bulk
        if HALF_SPACE:
            other = riesz_slope(clamped(plus), S)
            bulk -= other
            radial -= other
    return bulk, radial


@triton.jit
def near_slopes(minus, plus, deficit, S: tl.constexpr, ANGULAR: tl.constexpr, HALF_SPACE: tl.constexpr):
    """The same for any pair, near parts apart: ``bulk, radial, to_same, to_opposite``.

    The latter two are slopes of ``unit_j - unit_i`` and of ``-unit_j - unit_i``.
    """
    if ANGULAR:
        slope, flipped = angular_slope(minus, plus, deficit, S, HALF_SPACE)
        near = near_of(minus, plus, deficit, ANGULAR, HALF_SPACE)
        # slope unit_j = sign slope (sign unit_j - unit_i) + sign slope unit_i
        bulk = tl.where(near, 0.0, slope)
        close = tl.where(near, slope, 0.0)
        to_same = tl.where(flipped, 0.0, close)
        to_opposite = tl.where(flipped, -close, 0.0)
        radial = to_same + to_opposite
    else:
        slope = riesz_slope(clamped(minus), S)
        to_same = tl.where(minus < NEAR, slope, 0.0)
        bulk = tl.where(minus < NEAR, 0.0, slope)
        radial = -bulk
        to_opposite = 0.0 * slope
        if HALF_SPACE:
            slope = riesz_slope(clamped(plus), S)
            to_opposite = tl.where(plus < NEAR, slope, 0.0)
            far = tl.where(plus < NEAR, 0.0, slope)
            bulk -= far
            radial -= far
    return bulk, radial, to_same, to_opposite


@triton.jit
def far_tile(g, deficit):
    """``u = 1 - t^2 / 2``, what rounding took from it, ``t^2 / 2``, and whether a pair is near; in the dtype of g."""
    u = g + deficit
    half_square = 1.0 - u
    return u, deficit - (u - g), half_square, half_square < 0.5 * NEAR


@triton.jit
def excess(u, rest, half_square, S: tl.constexpr):
    """``f_s(t) / f_s(sqrt 2) - 1`` of a far pair for s = 1 or 2: small, and so is its rounding."""
    if S == 1.0:
        y = tl.rsqrt(half_square)
        return u * y * y / (1.0 + y) + 0.5 * (y * y * y) * rest
    else:
        y = 1.0 / half_square
        return u * y + (y * y) * rest


@triton.jit
def right_angle_slope(half_square, S: tl.constexpr):
    """``-f_s'(t) / t`` of a far pair for s = 1 or 2."""
    if S == 1.0:
        y = tl.rsqrt(half_square)
        return (y * y * y) * RIGHT_ANGLE_SLOPE_1
    else:
        y = 1.0 / half_square
        return (y * y) * RIGHT_ANGLE_SLOPE_2


@triton.jit
def antipode_square(norm, ANGULAR: tl.constexpr):
    """Squared distance of a row to its own negative."""
    if ANGULAR:
        angle = supplement(angle_from(2.0 * deficit_of(norm)))
        return angle * angle
    else:
        ratio = norm / (norm + EPSILON)
        return clamped(4.0 * ratio * ratio)


@triton.jit
def antipode_slope(norm, S: tl.constexpr, ANGULAR: tl.constexpr):
    """Coefficient of the unit row in the gradient of the energy between a row and its own negative."""
    slope = riesz_slope(antipode_square(norm, ANGULAR), S)
    if ANGULAR:
        short = 2.0 * deficit_of(norm)
        sine = tl.sqrt(short * (1.0 - 0.25 * short))
        return -2.0 * slope * supplement(angle_from(short)) / sine
    else:
        return -4.0 * slope
