"""Half of a 95 % interval of a mean, by Student's t:  t s / sqrt(n)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

# two-sided 97.5 % points, by degrees of freedom from 1; more of them take the last, which is wider
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def half_interval(values: Sequence[float]) -> float:
    """In the unit of the values; infinite for a single one."""
    if len(values) < 2:
        return math.inf
    return _T[min(len(values) - 1, len(_T)) - 1] * stdev(values) / math.sqrt(len(values))
