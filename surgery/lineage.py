"""What downcycle.json says of how a checkpoint was made: one operation on a parent, and what that one says of itself."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .checkpoint import Checkpoint

CUT, MERGE, TERNARY = "cut", "merge", "ternary"


def descend(parent: Checkpoint, operation: str, **own: Any) -> dict[str, Any]:
    """Return the lineage of what an operation makes of a parent: enough to make it again. own: what decides the operation's result."""
    lineage = {
        "downcycle": version("downcycle"),
        **({} if operation == CUT else {"operation": operation}),  # a file that says nothing is of a cut
        "parent": parent.name,
        "revision": parent.revision,
        "fingerprint": parent.fingerprint,
        **own,
    }
    return lineage | ({"parent_lineage": parent.lineage} if parent.lineage else {})
