"""Which maps of a model become ternary: a rule on module names. Loads nothing.

All linear maps of decoder layers do; embeddings, head, norms, routers and experts that transformers stacks into one tensor do not. A
pattern is a regular expression, found anywhere in a module's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DowncycleError
from ..stack import OTHER_TOWERS, STACK_WORDS

IN_LAYER = re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, STACK_WORDS))})[0-9]+\.")
NEVER = re.compile(r"(?:^|\.)(?:gate|router|wg|[a-z_]*expert_gate|experts)(?:\.|$)|router")


@dataclass(frozen=True)
class Rule:
    """include: patterns of names that become ternary too. exclude: of names that do not, whatever else says so."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what is no regular expression."""
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise DowncycleError(f"{pattern!r}: is no regular expression ({error}); dots and stars mean something in one") from error

    def takes(self, module: str) -> bool:
        """Whether the linear map of this name becomes ternary."""
        if any(re.search(pattern, module) for pattern in self.exclude):
            return False
        if any(re.search(pattern, module) for pattern in self.include):
            return True
        return bool(IN_LAYER.search(module)) and not OTHER_TOWERS.search(module) and not NEVER.search(module)
