"""A heat map of accuracy over length and depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(path: Path, title: str, cells: Sequence[dict[str, Any]]) -> None:
    """Write the PNG at `path`; a cell has `length` (tokens), `depth` (0 to 1) and `accuracy` (0 to 1)."""
    from matplotlib.figure import Figure

    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    by_place = {(cell["depth"], cell["length"]): cell["accuracy"] for cell in cells}
    figure = Figure(figsize=(2 + 0.9 * len(lengths), 1.5 + 0.6 * len(depths)), layout="constrained")
    axes = figure.subplots()
    grid = [[by_place[depth, length] for length in lengths] for depth in depths]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(title=title, xlabel="tokens", ylabel="depth")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.0%}", ha="center", va="center")
    figure.colorbar(image, label="solved")
    figure.savefig(path, dpi=150)
