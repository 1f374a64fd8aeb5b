"""What a card says of ternary weights: how they came about, whether the model learnt them, what is needed to run them.

Writes Markdown from facts; of a model that was not converted here, nothing.
"""

from __future__ import annotations

from ...surgery.lineage import TERNARY
from ...surgery.ternary.record import is_latent
from ...surgery.ternary.warmup import SCHEDULES
from ..report.numbers import join_words, write_share
from ..results import all_layers
from .facts import Facts
from .training_text import eval_losses, texts_in_words
from .wording import paragraphs

TERNARY_PICTURE = "figures/ternary.png"
CONVERT = (
    "**Convert** the linear maps of its decoder layers to ternary weights (BitNet b1.58, arXiv 2402.17764): each weight is -s, 0 "
    "or s, where s is the mean absolute weight of its matrix. Stored in 2 bits, and run with 8-bit activations."
)
RUN = (
    "Transformers needs accelerate for these weights. It compiles their unpacking: on a CPU, `TORCH_COMPILE_DISABLE=1` gives the same "
    "results without a C++ compiler, and faster."
)


def is_converted(facts: Facts) -> bool:
    """Whether the weights of a model were made ternary here."""
    return facts.adapter is None and any(step.operation == TERNARY for step in facts.origin.steps)


def is_beneath(facts: Facts) -> bool:
    """Whether the weights are the floats beneath ternary ones, as training saves them."""
    return facts.adapter is None and is_latent(facts.config, facts.name)


def learnt(facts: Facts) -> str:
    """Say as a step of the making that the model was trained with ternary weights; empty where it was not."""
    record = facts.record if is_converted(facts) or is_beneath(facts) else None
    if record is None:
        return ""
    how = f", on the schedule `{record.schedule}`" if record.schedule in SCHEDULES else ""
    below = ", as described below" if facts.training else ""
    return f"**Train** all of it while its weights become ternary: λ went from 0 to {record.strength:.4g}{how}{below}."


def state(facts: Facts) -> str:
    """Say whether the ternary weights were learnt."""
    if is_beneath(facts):
        fell = _fell(facts).replace("; its loss", "; with ternary weights its loss")
        return (
            f"It was trained with ternary weights{fell}. Its files hold the floating-point weights beneath them, from which training can "
            "go on; they are not the model that was trained, which `downcycle ternarize` makes of them."
        )
    if not is_converted(facts):
        return ""
    record = facts.record
    if record is None:
        return "Its ternary weights were not learnt but rounded: it is of no use but for measuring what that costs."
    far = "" if record.whole else f", but not to the end: λ reached {record.strength:.4g} of 1"
    on = f" on {texts_in_words(facts.training)}" if facts.training and facts.training.texts else ""
    return f"Its ternary weights were learnt by training it further{on}{far}{_fell(facts)}."


def _fell(facts: Facts) -> str:
    losses = eval_losses(facts.training) if facts.training else []
    return f"; its loss on held-out text went from {losses[0]:.4f} to {losses[-1]:.4f}" if len(losses) > 1 else ""


def weights(facts: Facts) -> str:
    """Say how many of the weights are -1, 0 and 1, and what rounding changed, where that was counted; show it layer by layer."""
    if not facts.measured or not facts.measured.ternary:
        return ""
    whole = all_layers(facts.measured.ternary)
    shares = [f"{write_share(count / whole.weights)} are {value}" for value, count in ((-1, whole.minus), (0, whole.zero), (1, whole.plus))]
    error = (
        "" if whole.error is None else f"; |W - sT| / |W| is {write_share(whole.error)}, where W are the weights that were rounded to sT"
    )
    said = f"Of its {whole.weights:,} ternary weights {join_words(shares)}{error}."
    picture = f"![Weights by value in each layer, and what rounding changed]({TERNARY_PICTURE})" if TERNARY_PICTURE in facts.files else ""
    return paragraphs([said, picture])


def limitation(facts: Facts) -> list[str]:
    """Say what rounding without training, or with too little, does."""
    if not is_converted(facts) or (facts.record and facts.record.whole):
        return []
    if facts.record is None:
        return ["**It was never trained with ternary weights.** Expect text without sense: rounding changed about half of what they held."]
    return [
        f"**Its training ended before its weights were wholly ternary** (λ = {facts.record.strength:.4g}). Expect worse than it measured."
    ]
