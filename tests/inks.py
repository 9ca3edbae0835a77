"""How much is really drawn: share of pixels inside an axes that are not background, as printed in black and white."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def grey(figure: Figure, axes: Axes) -> np.ndarray:
    """(H, W) luminance in [0, 1] of the inside of `axes`, frame left out, as rendered."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255.0
    box = axes.get_window_extent()
    height = pixels.shape[0]
    top, bottom = int(height - box.y1) + 3, int(height - box.y0) - 3
    return (pixels @ [0.2126, 0.7152, 0.0722])[top:bottom, int(box.x0) + 3 : int(box.x1) - 3]


def ink(figure: Figure, axes: Axes) -> float:
    """Share of the pixels inside `axes` that are clearly darker than white paper and than a faint grid."""
    return float((grey(figure, axes) < 0.85).mean())
