"""A number as a color."""

import numpy as np

# Viridis (van der Walt and Smith, 2015) at nine places: as bright as it is large, and readable without color vision.
VIRIDIS = [
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
]


def colors(shares: np.ndarray) -> np.ndarray:
    """Return the colors of shares from 0 to 1, (...) -> (..., 3) uint8; gray where a share is NaN."""
    places = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(np.nan_to_num(shares), places, channel) for channel in np.array(VIRIDIS).T]
    found = np.stack(channels, axis=-1)
    found[np.isnan(shares)] = 190
    return found.round().astype(np.uint8)
