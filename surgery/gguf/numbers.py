"""Numbers of a config.json as GGUF files hold them: whole ones of 32 bits, others as float32. Knows no family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import DowncycleError

MOST, LARGEST = (1 << 32) - 1, 3e38
FAULTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def whole(config: Mapping[str, Any], name: str) -> int:
    """Return a whole number from 1 on, which a config may spell as 1e5 too.

    Raises:
        DowncycleError: not there, or no such number.
    """
    value = number(config, name)
    if not 1 <= value <= MOST or value != int(value):
        raise _unusable(config, name, "a whole number from 1 on")
    return int(value)


def number(config: Mapping[str, Any], name: str) -> float:
    """Return a number that float32 holds.

    Raises:
        DowncycleError: not there, or no such number.
    """
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise _unusable(config, name, "a number")
    return float(value)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what goes wrong with a file of another make than the known ones into one line that names the file."""
    try:
        yield
    except FAULTS as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise DowncycleError(f"{where}: lacks, or has an unusable, part ({said}); mend it, or fetch it again") from error


def _unusable(config: Mapping[str, Any], name: str, needed: str) -> DowncycleError:
    what = f"has {name} {str(config[name])[:40]!r}" if name in config else f"lacks {name}"
    return DowncycleError(f"config.json {what}, where {needed} is needed; mend it, or fetch it again")
