"""The kinds of numbers that a GGUF tensor may hold here: their ids in files, and their sizes. Imports no numbers."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["f32", "f16", "bf16", "tq1_0", "tq2_0", "i2_s"]


class Type(NamedTuple):
    """id: of a tensor's type, file: of a file that mostly holds that, as ggml numbers them. A block's numbers and bytes; then a tail."""

    id: int
    file: int
    block: int
    size: int
    tail: int = 0

    def nbytes(self, numbers: int) -> int:
        """Size of a tensor in bytes."""
        return numbers // self.block * self.size + self.tail


# I2_S is bitnet.cpp's own; stock llama.cpp gives its number to no type.
TYPES: dict[Kind, Type] = {
    "tq2_0": Type(35, 37, 256, 66),
    "tq1_0": Type(34, 36, 256, 54),
    "f16": Type(1, 1, 1, 2),
    "bf16": Type(30, 32, 1, 2),
    "f32": Type(0, 0, 1, 4),
    "i2_s": Type(36, 40, 128, 32, 32),
}
TERNARY: tuple[Kind, ...] = ("tq2_0", "tq1_0", "i2_s")
