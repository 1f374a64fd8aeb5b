"""The plugins of this package and the keys that they add to Axolotl's, in the form of axolotl_keys.json; imports none of them."""

from __future__ import annotations

from typing import Any

from ...surgery.ternary.record import RECORD

TERNARY = "downcycle.recipes.plugins.TernaryPlugin"
SECTION = RECORD  # its key is called as the section that it leaves in the config.json of what was trained

PATTERNS = {"type": "array", "items": {"type": "string"}}
DISTILL = {
    "type": "object",
    "properties": {
        "weight": {"type": "number", "minimum": 0, "maximum": 1},
        "temperature": {"type": "number", "exclusiveMinimum": 0},
        "teacher": {"type": ["string", "null"]},
    },
}
OWN: dict[str, dict[str, Any]] = {
    TERNARY: {
        SECTION: {
            "type": "object",
            "properties": {
                "schedule": {"enum": ["linear", "ramp", "exponential", "sigmoid"]},
                "warmup_steps": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
                "k": {"type": ["number", "null"]},  # its range is the schedule's to say
                "include": PATTERNS,
                "exclude": PATTERNS,
                "norm": {"type": "boolean"},
                "distill": {"anyOf": [DISTILL, {"type": "null"}]},
            },
        }
    }
}
