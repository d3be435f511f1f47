"""Maps of blocks, and the talk's name, for the studies of its theory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

TALK = "Towards Quantifying the Hessian Structure of Neural Networks (Y. Zhang, talk, 2025)"


def draw_map(panel: Axes, squared: npt.NDArray[np.float64], title: str, cut: int = 0, unit: str = "block") -> None:
    """Norms over the largest, four decades; what is zero stays white; a line after the first `cut`."""
    norms, size = pooled(np.sqrt(squared / squared.max())), len(squared) - 0.5
    shown = np.ma.masked_equal(norms, 0)
    panel.imshow(shown, norm=LogNorm(1e-4, 1), cmap="viridis", interpolation="nearest", extent=(-0.5, size, size, -0.5))
    if cut:
        for line in (panel.axhline, panel.axvline):
            line(cut - 0.5, color="white", linewidth=0.8)
    panel.set(xlabel=unit, ylabel=unit)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    panel.set_title(title, fontsize=10)


def pooled(norms: npt.NDArray[np.float64], cells: int = 180) -> npt.NDArray[np.float64]:
    """The largest norm in each of at most so many cells a side: a diagonal stays, also where pixels are few."""
    each = -(-len(norms) // cells)
    starts = np.arange(0, len(norms), each)
    return np.maximum.reduceat(np.maximum.reduceat(norms, starts, axis=0), starts, axis=1)
