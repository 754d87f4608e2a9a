"""Makes the polynomials of `exporter/backends/aoti/standalone/cpp/math.cpp`: minimax fits, printed with their errors.

    python tools/fit_functions.py

A fit is Lawson's: least squares at Chebyshev's points, weighted anew where the error is largest, until it is about the
same everywhere. Errors are those of the polynomial before its coefficients are rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
from numpy.polynomial import chebyshev

POINTS, ROUNDS = 4000, 200
Function = Callable[[float], float]

_SQRT, _EXP = mpmath.sqrt, mpmath.exp
_LN2, _QUARTER = math.log(2) / 2 * 1.01, (math.pi / 4 * 1.01) ** 2

FITS: dict[str, tuple[Function, float, float, int, Function]] = {
    "(exp(r) - 1 - r) / r^2": (
        lambda r: (_EXP(r) - 1 - r) / mpmath.mpf(r) ** 2 if abs(r) > 1e-8 else 0.5, -_LN2, _LN2, 4, lambda r: r * r
    ),
    "erf(x) / x of x^2": (
        lambda s: mpmath.erf(_SQRT(s)) / _SQRT(s) if s > 1e-12 else 2 / math.sqrt(math.pi), 0, 1, 6, lambda s: 0.89
    ),
    "-ln erfc(x)": (lambda x: -mpmath.log(mpmath.erfc(x)), 0.99, 3.95, 7, mpmath.erfc),
    "(tanh(x) / x - 1) / x^2 of x^2": (
        lambda s: (mpmath.tanh(_SQRT(s)) / _SQRT(s) - 1) / s if s > 1e-10 else -1 / 3, 0, 0.64**2, 4, lambda s: s
    ),
    "(sin(r) / r - 1) / r^2 of r^2": (
        lambda s: (mpmath.sin(_SQRT(s)) / _SQRT(s) - 1) / s if s > 1e-10 else -1 / 6, 0, _QUARTER, 3, lambda s: s
    ),
    "(cos(r) - 1 + r^2 / 2) / r^4 of r^2": (
        lambda s: (mpmath.cos(_SQRT(s)) - 1 + s / 2) / s**2 if s > 1e-5 else 1 / 24, 0, _QUARTER, 2, lambda s: s * s
    ),
    "(ln(1 + f) - f + f^2 / 2) / f^3": (
        lambda f: (mpmath.log1p(f) - f + mpmath.mpf(f) ** 2 / 2) / mpmath.mpf(f) ** 3 if abs(f) > 1e-6 else 1 / 3,
        2**-0.5 - 1, 2**0.5 - 1, 8, lambda f: f * f,
    ),
}  # fmt: skip
"""A function, from where to where, the degree, and how much an error counts."""


def fit(function: Function, low: float, high: float, degree: int, weight: Function) -> tuple[Any, float]:
    """The coefficients, the constant first, and the largest weighted error."""
    points = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    places = (low + high) / 2 + (high - low) / 2 * points
    values, counts = (np.array([float(each(place)) for place in places]) for each in (function, weight))
    basis, shares = chebyshev.chebvander(points, degree), np.ones(POINTS)
    for _ in range(ROUNDS):
        roots = np.sqrt(shares) * counts
        found, *_ = np.linalg.lstsq(basis * roots[:, None], values * roots, rcond=None)
        errors = np.abs((basis @ found - values) * counts)
        shares = shares * (errors / errors.max() + 1e-3)
        shares /= shares.sum()
    return np.polynomial.Chebyshev(found, [low, high]).convert(kind=np.polynomial.Polynomial).coef, float(errors.max())


if __name__ == "__main__":
    for name, asked in FITS.items():
        coefficients, error = fit(*asked)
        print(f"{name}: {', '.join(f'{value:.9g}f' for value in coefficients)}  (error {error:.1e})")
