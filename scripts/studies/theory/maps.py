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
    norms = np.sqrt(squared / squared.max())
    panel.imshow(np.ma.masked_equal(norms, 0), norm=LogNorm(1e-4, 1), cmap="viridis", interpolation="nearest")
    if cut:
        for line in (panel.axhline, panel.axvline):
            line(cut - 0.5, color="white", linewidth=0.8)
    panel.set(xlabel=unit, ylabel=unit)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    panel.set_title(title, fontsize=10)
