"""Shares of images, such as 34 of 200, with their intervals."""

import math

from medart_core.evaluation.measured import MARGIN


def interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score (E. B. Wilson, JASA 22, 1927): within [0, 1], also for 0 hits."""
    share, z2 = hits / count, MARGIN**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = MARGIN / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
