"""Shares of images, such as 34 of 200, with their intervals."""

import math

from medart_core.evaluation.measured import MARGIN


def share(hits: int, count: int) -> tuple[float, float, float]:
    """A share and its 95 % interval by Wilson's score (JASA 22, 1927): within [0, 1], and wide also for 0 hits."""
    value, z2 = hits / count, MARGIN**2
    centre = (value + z2 / (2 * count)) / (1 + z2 / count)
    half = MARGIN / (1 + z2 / count) * math.sqrt(value * (1 - value) / count + z2 / (4 * count**2))
    # In exact numbers the interval lies in [0, 1] and holds the value.
    return value, max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
