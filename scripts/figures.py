"""How the figures of the studies look."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Black, then Okabe and Ito's palette, which colour-blind readers can tell apart."""
_STYLE: Any = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}


@contextmanager
def pyplot() -> Iterator[Any]:
    """``matplotlib.pyplot`` without a display, in this style as long as the context is open."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        yield plt
