"""The pictures of a model card, drawn into its folder by eval/report's figures. Without matplotlib there are none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..results import Results
from .evaluation_text import BARS_PICTURE
from .facts import Facts, describe_result
from .sections import LAYERS_PICTURE
from .ternary_text import TERNARY_PICTURE
from .training_text import LOSS_PICTURE

PICTURES = (LAYERS_PICTURE, LOSS_PICTURE, BARS_PICTURE, TERNARY_PICTURE)


def draw_pictures(facts: Facts, folder: Path) -> list[str]:
    """Draw what there is to draw, and return the paths of what was drawn, below the folder."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from ..report.drawing import save_png
    from ..report.figures import benchmark_bars, layer_map, loss_curve, ternary_figure

    alone = describe_result(facts)
    drawn = {
        LAYERS_PICTURE: layer_map(Results((alone,))) if facts.is_cut else None,
        LOSS_PICTURE: loss_curve(Results((alone,))) if alone.training else None,
        BARS_PICTURE: benchmark_bars(facts.results) if facts.results and facts.measured else None,
        TERNARY_PICTURE: ternary_figure(Results((facts.measured,))) if facts.measured else None,
    }
    done = []
    for path, figure in drawn.items():
        if figure is not None:
            (folder / path).parent.mkdir(exist_ok=True)
            staged = (folder / path).with_suffix(".png.new")
            save_png(figure, staged)
            staged.replace(folder / path)
            done.append(path)
    return done


def drop_pictures(folder: Path, paths: Iterable[str]) -> None:
    """Delete those of these pictures that a folder holds, and the folder below it that held nothing else."""
    for path in paths:
        if (folder / path).is_file():
            (folder / path).unlink()
            with suppress(OSError):
                (folder / path).parent.rmdir()


def found_pictures(folder: Path | None) -> list[str]:
    """Return the pictures that a folder holds, drawn now or earlier."""
    return [path for path in PICTURES if folder and (folder / path).is_file()]
