"""Choose layers by any rule, with data or without. Measures what the rule needs, and knows no more of it."""

from __future__ import annotations

from collections.abc import Sequence

from ...surgery.choose import RULES as WITHOUT_DATA
from ...surgery.choose import choose
from ...surgery.importance.rules import RULES, choose_by, protected_layers
from .measure import HIDDEN, TAYLOR, measure, search
from .study import Study

NEEDS = {"bi": HIDDEN, "angular": HIDDEN, "magnitude": HIDDEN, "taylor": TAYLOR}


def choose_layers(study: Study, rule: str, keep: int, protect: Sequence[int] | None = None) -> list[int]:
    """Return the layers that a rule keeps of a model.

    Args:
        protect: layers that must stay, in place of the rule's own; None: the rule's own.
    Raises:
        DowncycleError: no such rule, what it cannot keep, or what cannot be measured of this model.
    """
    depth = study.checkpoint.num_layers
    if rule in WITHOUT_DATA:
        return choose(depth, keep, rule)
    protected = protected_layers(rule, depth, keep, protect)
    if RULES[rule].choose is None:
        gone = {one.layer for one in search(study, depth - keep, protected)}
        return [layer for layer in range(depth) if layer not in gone]
    found = measure(study, NEEDS[rule])[NEEDS[rule]]
    return choose_by(rule, depth, keep, found[rule] if NEEDS[rule] == HIDDEN else found, protect)
