"""Heat maps of accuracy over length and depth."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(path: Path, task: str, cells: Sequence[dict[str, Any]], chance: float) -> None:
    """Write a PNG to `path` with the model's accuracy and the bigram's in each cell.

    Args:
        cells: with `length` (tokens), `depth`, `accuracy` and `bigram_accuracy` (0 to 1).
        chance: accuracy of a guess.
    """
    from matplotlib.figure import Figure

    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    by_cell = {(cell["depth"], cell["length"]): cell for cell in cells}
    figure = Figure(figsize=(3 + 1.1 * len(lengths), 1.5 + 0.6 * len(depths)), layout="constrained")
    axes = figure.subplots()
    grid = [[by_cell[depth, length]["accuracy"] for length in lengths] for depth in depths]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(title=f"{task}, chance {chance:.2g}", xlabel="tokens", ylabel="depth")
    for (row, depth), (column, length) in itertools.product(enumerate(depths), enumerate(lengths)):
        cell = by_cell[depth, length]
        text = f"{cell['accuracy']:.0%}\nbigram {cell['bigram_accuracy']:.0%}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="solved")
    figure.savefig(path, dpi=150)
