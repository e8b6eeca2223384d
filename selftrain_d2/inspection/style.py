"""Colours of all pictures, light and dark, and how a picture is written."""

from __future__ import annotations

import os
from pathlib import Path

from cycler import cycler
from matplotlib.figure import Figure

from selftrain_d2.files import whole_file

# Okabe and Ito's palette, told apart with every kind of colour vision; the lighter half for dark photos.
YELLOW, SKY_BLUE, VERMILION, WHITE = "#F0E442", "#56B4E9", "#E8601C", "#FFFFFF"
BLUE, GREEN, ORANGE, GREY = "#0072B2", "#009E73", "#D55E00", "#666666"


def _theme(background: str, text: str, muted: str, grid: str, colors: list[str]) -> dict:
    return {
        "figure.facecolor": background,
        "savefig.facecolor": background,
        "axes.facecolor": background,
        "text.color": text,
        "axes.labelcolor": text,
        "axes.titlecolor": text,
        "axes.edgecolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
        "hatch.color": muted,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.prop_cycle": cycler(color=colors),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.size": 8,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "legend.frameon": False,
    }


#: matplotlib settings, for ``rc_context``. C0 to C3: the data, its comparison, a third curve, the muted one.
THEMES = {
    "light": _theme("#FFFFFF", "#1C2128", GREY, "#E4E4E4", [BLUE, ORANGE, GREEN, "#B4BAC2"]),
    "dark": _theme("#1B1F26", "#E3E7EC", "#9AA4B0", "#343B45", [SKY_BLUE, "#F0934E", "#3CC79B", "#565F6B"]),
}


def shortened(name: str, most: int = 16) -> str:
    """A class name that fits a small picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a picture whole or not at all; the path's suffix gives the format.

    Raises:
        InputError: see ``files.whole_file``.
    """
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi="figure", format=Path(path).suffix[1:])
