"""Which maps of a model become ternary: a rule on module names. Loads nothing.

All linear maps of decoder layers do, and the head where it is asked for; embeddings, norms, routers and experts that transformers stacks
into one tensor never do. A pattern is a regular expression, found anywhere in a module's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..adapter.names import is_embedding
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
        if NEVER.search(module) or is_embedding(module):
            return False
        if any(re.search(pattern, module) for pattern in self.include):
            return True
        return bool(IN_LAYER.search(module)) and not OTHER_TOWERS.search(module)

    def idle(self, modules: Iterable[str]) -> list[str]:
        """Return the patterns that take or leave out none of these linear maps: a slip, or a wish that cannot be granted."""
        names = list(modules)
        taken = [name for name in names if self.takes(name)]
        asked = [(pattern, taken) for pattern in self.include] + [(pattern, names) for pattern in self.exclude]
        return [pattern for pattern, some in asked if not any(re.search(pattern, name) for name in some)]
