"""The whole path on the built-in model: cut, heal by really training, merge, prove, and measure what was lost and won back.

Uses public functions only: how layers are cut, recipes made and weights merged it refuses to know.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from pathlib import Path

from ..recipes.demo.corpus import read_text
from ..recipes.training import Progress, Step, losses, train
from ..surgery.adapter.merge import merge_adapter
from ..surgery.checkpoint import DEMO, DEMO_FOLDER, Checkpoint, open_checkpoint
from ..surgery.choose import first
from ..surgery.errors import DowncycleError
from ..surgery.layers import keep_layers
from ..surgery.staging import target_path
from ..surgery.verify import verify
from ..surgery.write import write
from .measure.perplexity import perplexity

RESULT = "losses.json"
KEEP = 9  # of 12 layers
STEPS = 120  # of 2048 tokens: seven tenths of the text
LOGGED = 4  # steps between two points of the curve
WINDOW = 512  # tokens, in training and in measuring
# Against the preset, which is laid out for billions of weights: three million take a far larger rate. No memory needs saving.
SETTINGS = {
    "sequence_len": WINDOW,
    "learning_rate": 5e-3,
    "gradient_checkpointing": False,
    "saves_per_epoch": 1,
}


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What a demo measured, in nats per token of held-out text, and where its files are.

    recovered: the share of the loss that the cut added and healing took away again. curve: (optimiser step, training loss).
    """

    parent_loss: float
    cut_loss: float
    healed_loss: float
    recovered: float
    seconds: float
    steps: int
    layers: tuple[int, int]  # of parent and child
    child: str
    recipe: str
    adapter: str
    healed: str
    picture: str
    curve: list[tuple[int, float]]


def run_demo(out: str | Path, *, steps: int = STEPS, progress: Progress = lambda step: None) -> DemoResult:
    """Cut the built-in model, heal the child with QLoRA through Axolotl, merge, and measure each on text that none has seen.

    Everything is made in the new folder `out`: the models child and healed, axolotl.yaml, healing.jsonl, training with the adapter and
    Axolotl's log, loss.png, losses.json (this result).

    Args:
        steps: of the optimiser, 2048 tokens each.
        progress: called at each stage and each sign of life from Axolotl.
    Raises:
        DowncycleError: the folder exists, a package is not installed, or the training failed.
    """
    began = time.monotonic()
    out = _new_folder(out)
    progress(Step("cutting the built-in model"))
    parent = open_checkpoint(DEMO)
    child = open_checkpoint(write(keep_layers(parent, first(parent.num_layers, KEEP)), out / "child"))
    verify(out / "child")
    progress(Step("loading torch"))
    parent_loss = _loss(parent, "the parent", progress)
    cut_loss = _loss(child, "the cut", progress)
    recipe = _write_recipe(child, out, steps)
    adapter = train(recipe, progress=progress)
    progress(Step("merging"))
    healed = open_checkpoint(write(merge_adapter(child, adapter), out / "healed"))
    verify(out / "healed")
    healed_loss = _loss(healed, "the healed model", progress)
    result = DemoResult(
        parent_loss=parent_loss,
        cut_loss=cut_loss,
        healed_loss=healed_loss,
        recovered=(cut_loss - healed_loss) / (cut_loss - parent_loss),
        seconds=round(time.monotonic() - began, 1),
        steps=steps,
        layers=(parent.num_layers, child.num_layers),
        child=str(out / "child"),
        recipe=str(recipe),
        adapter=str(adapter),
        healed=str(out / "healed"),
        picture=str(out / "loss.png"),
        curve=losses(adapter),
    )
    draw_losses(result)
    (out / RESULT).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    return result


def loss_lines(result: DemoResult, sign: str = "█", width: int = 40) -> list[str]:
    """Return a bar chart in text: the held-out loss of parent and cut, that of training at up to ten steps, and of the healed model."""
    every = -(-len(result.curve) // 10)
    rows = [(f"parent, {result.layers[0]} layers", result.parent_loss), (f"cut to {result.layers[1]} layers", result.cut_loss)]
    rows += [(f"  training text, step {step}", loss) for step, loss in result.curve[every - 1 :: every]]
    rows += [(f"healed, {result.layers[1]} layers", result.healed_loss)]
    highest, longest = max(loss for _, loss in rows), max(len(name) for name, _ in rows)
    return [f"{name:<{longest}}  {loss:6.3f}  {sign * max(1, round(width * loss / highest))}" for name, loss in rows]


def draw_losses(result: DemoResult) -> None:
    """Draw the training's loss over its steps, with the held-out losses of parent, cut and healed model as lines, into the PNG it names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*result.curve, strict=True), color="0.5", linewidth=1.2, label="training text")
    last = result.curve[-1][0]
    lines = {
        f"cut to {result.layers[1]} layers": (result.cut_loss, "tab:red"),
        f"healed, {result.recovered:.0%} won back": (result.healed_loss, "tab:green"),
        f"parent, {result.layers[0]} layers": (result.parent_loss, "tab:blue"),
    }
    for label, (loss, colour) in lines.items():
        axes.axhline(loss, color=colour, linestyle="--", linewidth=1.5)
        axes.annotate(f"{label}: {loss:.2f}", (last, loss), xytext=(0, 4), textcoords="offset points", ha="right", color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title="Healing a cut model: loss on held-out text (dashed) and while training", xlabel="optimiser step", ylabel="nats per token"
    )
    axes.set_ylim(min(result.parent_loss, *(loss for _, loss in result.curve)) - 0.3, None)
    axes.margins(x=0.01)
    axes.legend(loc="center right", frameon=False)
    figure.savefig(result.picture, dpi=120)


def _new_folder(out: str | Path) -> Path:
    """Make the folder; what is missing is told before anything is done."""
    lacking = [name for name in ("axolotl", "bitsandbytes", "matplotlib", "peft", "torch") if importlib.util.find_spec(name) is None]
    if lacking:
        raise DowncycleError(f"the demo really trains, and lacks {', '.join(lacking)}: pip install 'downcycle[train,eval]'")
    out = target_path(out)
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        what = "holds a demo that was interrupted" if (out / "child").is_dir() and not (out / RESULT).exists() else "exists already"
        raise DowncycleError(f"--out {out}: {what}; delete it, or give another folder") from error
    return out


def _write_recipe(child: Checkpoint, out: Path, steps: int) -> Path:
    """Write the healing text, one document a line, and the recipe that trains on it."""
    from ..recipes.machine import Machine
    from ..recipes.recipe import make_recipe
    from ..recipes.recipe_text import recipe_text

    documents = read_text(DEMO_FOLDER.parent / "healing.txt")
    (out / "healing.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    paths = {"output_dir": str(out / "training"), "dataset_prepared_path": str(out / "training" / "prepared")}
    overrides = SETTINGS | paths | {"max_steps": steps, "logging_steps": min(LOGGED, steps)}
    recipe = make_recipe(
        child, str(out / "child"), "qlora", dataset=str(out / "healing.jsonl"), machine=Machine(gpus=0), batch=4, overrides=overrides
    )
    path = out / "axolotl.yaml"
    path.write_text(recipe_text(recipe, str(path)))
    return path


def _loss(checkpoint: Checkpoint, what: str, progress: Progress) -> float:
    """Mean cross entropy of a model in nats per token of the built-in held-out text, in windows as long as those of the training."""
    stage = Step(f"measuring {what}")
    progress(stage)
    measured = perplexity(checkpoint, length=WINDOW, stride=WINDOW, progress=lambda what, done, total: progress(stage))
    return measured.loss
