"""The sections of a card that say what a model is, how it was made and used, what it cannot do, and what its licence asks.

Writes Markdown from facts; what is not known is not mentioned.
"""

from __future__ import annotations

import json

from ...recipes.commands import RECIPE
from ...surgery.checkpoint import DEMO
from ...surgery.choose import format_layers
from ...surgery.filenames import LINEAGE, is_licence_text
from ...surgery.lineage import MERGE, TERNARY
from ...surgery.quantizer import packed_by
from ...surgery.weights import is_ternary
from ...terminal import format_bytes, layer_map
from ..origin import Step
from ..report.compare import score_rows
from ..report.numbers import join_words, write_count, write_share
from .choosing import what_was_folded, why_kept
from .facts import Facts, own_version
from .licences import duties, known_licence
from .metadata import pipeline_tag
from .papers import papers, software
from .parents import Parent
from .redact import name_of, scrub
from .ternary_text import CONVERT, RUN, is_converted, learnt, limitation, state, weights
from .training_text import eval_losses, texts_in_words
from .wording import bullets, model_link, paragraphs, plain

LAYERS_PICTURE = "figures/layers.png"


def summary(facts: Facts) -> str:
    """Say what the model is, in one paragraph, and show the line that its licence asks for."""
    known = known_licence(facts.licence)
    built = f"**{known.built_with}**" if known and known.built_with else ""
    builtin = f"`{DEMO}` is the built-in model of downcycle." if facts.parent and facts.parent.name == DEMO else ""
    return paragraphs([f"# {plain(facts.title)}", built, " ".join(filter(None, [_what(facts), _state(facts), builtin]))])


def making(facts: Facts) -> str:
    """Say what was done to the parent, step by step, and draw which layers are left."""
    if not facts.origin.steps:
        return ""
    steps: list[str] = []
    for step in facts.origin.steps:
        steps += [learnt(facts)] if step.operation == TERNARY and learnt(facts) else []
        steps.append(_step(step, facts))
    if facts.adapter is None and not facts.origin.is_healed and facts.training and not is_converted(facts):
        steps.append(learnt(facts) or "**Train** what was left, as described below.")
    lines = [f"{place}. {step}" for place, step in enumerate(steps, 1)]
    made = ""
    if facts.made_with and LINEAGE in facts.files:
        made = f"Made with downcycle {plain(facts.made_with)}. `{LINEAGE}` holds what is needed to make it again."
    return paragraphs(["## How it was made", "\n".join(lines), _layer_map(facts), weights(facts), made])


def use(facts: Facts) -> str:
    """Show how transformers loads the model."""
    kind = {"text-generation": "AutoModelForCausalLM", "image-text-to-text": "AutoModelForImageTextToText"}.get(pipeline_tag(facts) or "")
    if kind is None:
        return ""
    dtype = f', dtype="{facts.dtype}"' if facts.dtype else ""
    trust = ", trust_remote_code=True" if facts.config.get("auto_map") else ""
    tokenizer = any(name.startswith("tokenizer") or name.endswith(".model") for name in facts.files)
    lines = [f"from transformers import {kind}{', AutoTokenizer' if tokenizer else ''}"]
    if facts.adapter is not None:
        base = facts.parents[0] if facts.parents else None
        if base is None or base.name == DEMO:
            return ""
        lines = ["from peft import PeftModel", *lines, "", f"base = {kind}.from_pretrained({_quoted(base.hub_id or base.name)}{dtype})"]
        lines += [f"model = PeftModel.from_pretrained(base, {_quoted(facts.name)})"]
    else:
        lines += ["", f"model = {kind}.from_pretrained({_quoted(facts.name)}{dtype}{trust})"]
    if tokenizer:
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({_quoted(facts.name)}{trust})"]
    if tokenizer and kind == "AutoModelForCausalLM":
        lines += ['inputs = tokenizer("The best thing about a small model is", return_tensors="pt")']
        lines += ['output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=50)']
        lines += ["print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    return paragraphs(["## How to use it", "```python\n" + "\n".join(lines) + "\n```", RUN if is_ternary(facts.config) else ""])


def limitations(facts: Facts) -> str:
    """Say what is true of every model whose layers were dropped, and what the known facts add."""
    parent = _named(facts.parent) if facts.parent else "its parent"
    lines = limitation(facts)
    if facts.origin.kept is not None:
        if not facts.is_healed:
            lines.append("**It was not trained after the cut.** Expect broken text: layers read what they were never trained on.")
        lines += [
            f"Dropping layers takes away knowledge and skill. What needs many steps, such as arithmetic and reasoning, suffers most and "
            f"comes back last; do not expect the scores of {parent}.",
            f"It has the biases and faults of {parent}. If that was tuned to follow instructions or to refuse, "
            "this may be weakened; it was not tested here.",
        ]
    lines += _measured_losses(facts)
    if facts.training:
        languages = {text.language for text in facts.training.texts}
        if len(languages) == 1 and (language := languages.pop()):
            lines.append(f"It was trained further on text in one language (`{plain(language)}`) only; others were not refreshed.")
        length, positions = facts.training.config.get("sequence_len"), facts.config.get("max_position_embeddings")
        if isinstance(length, int) and isinstance(positions, int) and length < positions:
            lines.append(f"It was trained further on sequences of up to {length:,} tokens; its config allows {positions:,}.")
    return paragraphs(["## Limitations", bullets(lines)]) if lines else ""


def licence(facts: Facts) -> str:
    """Name the licence and what it asks of those who hand the model on."""
    if not facts.licence:
        return ""
    known = known_licence(facts.licence)
    alike = [parent for parent in facts.parents if parent.licence == facts.licence]
    named = f", as that of {_named(alike[-1])}" if alike else ""
    if known is None:
        return paragraphs(["## Licence", f"`{plain(facts.licence)}`{named}."])
    title = f"[{known.title}]({known.link})" if known.link else known.title
    built = f"**{known.built_with}**" if known.built_with else ""
    asked = duties(known, any(map(is_licence_text, facts.files)))
    return paragraphs(["## Licence", f"{title}{named}.", built, bullets(asked)])


def citation(facts: Facts) -> str:
    """Give the parent's own citations, where they are known, this package, and the papers that were used."""
    parents = [entry for parent in facts.parents for entry in parent.citations]
    tool = [software(facts.made_with or own_version())] if facts.origin.steps else []
    cited = list(dict.fromkeys([*parents, *tool, *papers(facts)]))
    return paragraphs(["## Citation", "```bibtex\n" + scrub("\n\n".join(cited)) + "\n```"]) if cited else ""


def _named(parent: Parent) -> str:
    return model_link(parent.hub_id, parent.name)


def _what(facts: Facts) -> str:
    name, parent = f"**{plain(facts.title)}**", facts.parent
    kept, depth = facts.origin.kept, facts.origin.depth
    if facts.adapter is not None:
        rank = f" of rank {facts.adapter['r']}" if isinstance(facts.adapter.get("r"), int) else ""
        base = f" for {_named(facts.parents[0])}" if facts.parents else ""
        cut = f", which is {_named(parent)} with {len(kept)} of its {depth} decoder layers" if parent and kept else ""
        return f"{name} is a {'DoRA' if facts.adapter.get('use_dora') else 'LoRA'} adapter{rank}{base}{cut}. It is no model by itself."
    size = f"{_size(facts)} in {facts.layers} decoder layers"
    if parent is None:
        return f"{name} is a model of {size}."
    if kept is None:
        how = " with ternary weights" if is_converted(facts) else ", trained further"
        return f"{name} is {_named(parent)}{how}: {size}."
    if len(set(kept)) < len(kept):
        return f"{name} is made of the decoder layers of {_named(parent)}, {len(kept)} of them where that has {depth}: {_size(facts)}."
    return f"{name} is {_named(parent)} with {len(kept)} of its {depth} decoder layers: {_size(facts)}."


def _size(facts: Facts) -> str:
    if packed_by(facts.config) and not is_ternary(facts.config):
        return f"{format_bytes(facts.nbytes)} of packed weights"
    packed = f"; packed in {format_bytes(facts.nbytes)}" if is_ternary(facts.config) else ""
    return f"{write_count(facts.parameters).replace(' ', '')} parameters ({facts.parameters:,}{packed})"


def _state(facts: Facts) -> str:
    """Say whether it was healed, and on what, with the losses that tell how well."""
    if ternary := state(facts):
        return ternary
    if facts.origin.kept is None or facts.adapter is not None:
        return ""
    if not facts.is_healed:
        heals = f" Where it was made, `{RECIPE}` beside it is a recipe for that." if RECIPE in facts.files else ""
        return f"It was not trained after the cut: it is a starting point for continued pretraining, and of no use as it is.{heals}"
    if facts.training is None:
        return "After the cut it was healed by training it further."
    on = f" on {texts_in_words(facts.training)}" if facts.training.texts else ""
    losses = eval_losses(facts.training)
    fell = f"; its loss on held-out text went from {losses[0]:.4f} to {losses[-1]:.4f}" if len(losses) > 1 else ""
    return f"After the cut it was healed: trained further{on}{fell}."


def _step(step: Step, facts: Facts) -> str:
    if step.operation == MERGE:
        rank = facts.training.config.get("lora_r") if facts.training else None
        ranked = f" of rank {rank}" if isinstance(rank, int) else ""
        name = step.adapter if step.adapter_revision else name_of(step.adapter)
        merged = model_link(step.adapter if step.adapter_revision else None, name)
        described = "" if learnt(facts) else ", trained as described below"
        return f"**Merge** the adapter {merged}{ranked}{described}: each weight W became W + BA, rounded once."
    if step.operation == TERNARY:
        return CONVERT
    source = next((parent for parent in facts.parents if parent.hub_id == step.parent or parent.name == name_of(step.parent)), None)
    named = _named(source) if source else _named(facts.parent) if step == facts.origin.steps[0] and facts.parent else ""
    revision = f" (revision `{step.revision[:12]}`)" if step.revision else ""
    folded = what_was_folded(step)
    copied = "copied byte for byte but for what is named here" if folded else "copied byte for byte"
    cut = f"**Cut** {named}{revision} to its layers {format_layers(list(step.layers))}, {copied}, and renumbered."
    return " ".join(filter(None, [cut.replace("  ", " "), why_kept(step), folded]))


def _layer_map(facts: Facts) -> str:
    kept, depth = facts.origin.kept, facts.origin.depth
    if kept is None or depth is None:
        return ""
    picture = f"![Layers kept and dropped]({LAYERS_PICTURE})" if LAYERS_PICTURE in facts.files else ""
    dropped = sorted(set(range(depth)) - set(kept))
    key = "█ kept, ░ dropped" + (", a digit: kept so often" if len(set(kept)) < len(kept) else "")
    legend = f"kept {format_layers(list(kept))}; dropped {format_layers(dropped) or 'none'}; numbered from 0 in the parent ({key})"
    return paragraphs([picture, f"```text\n{layer_map(depth, kept)}\n```", f"Layers {legend}."])


def _measured_losses(facts: Facts) -> list[str]:
    """Name the benchmarks that lost most against the first model measured."""
    if not facts.results or not facts.measured or facts.measured is facts.results.baseline:
        return []
    place = facts.results.models.index(facts.measured)
    shares = [(share, row.title) for row in score_rows(facts.results) if row.tasks == 1 and (share := row.retained(place)) is not None]
    lost = sorted(share_title for share_title in shares if share_title[0] < 1)[:2]
    if not lost:
        return []
    named = join_words([f"{plain(title)} ({write_share(share)} left)" for share, title in lost])
    return [f"Of what was measured, it lost most on {named}."]


def _quoted(name: str) -> str:
    return json.dumps(scrub(name), ensure_ascii=False)
