"""downcycle: make small language models out of large ones. A checkpoint is a value; every operation returns a new one.

parent = open_checkpoint("meta-llama/Meta-Llama-3-8B")
child = keep_layers(parent, choose(parent.num_layers, 24))
write(child, "Llama-3-6B")
"""

from .surgery.adapter.merge import merge_adapter
from .surgery.checkpoint import Checkpoint, Tensor, open_checkpoint
from .surgery.choose import choose, ends, even, first, parse_layers, tail
from .surgery.describe import describe
from .surgery.errors import DowncycleError
from .surgery.gguf.export import write_gguf
from .surgery.layers import keep_layers
from .surgery.model import load_model
from .surgery.plan import plan_write
from .surgery.ternary.ternarize import ternarize
from .surgery.verify import verify
from .surgery.write import write

__all__ = [
    "Checkpoint",
    "DowncycleError",
    "Tensor",
    "choose",
    "describe",
    "ends",
    "even",
    "first",
    "keep_layers",
    "load_model",
    "merge_adapter",
    "open_checkpoint",
    "parse_layers",
    "plan_write",
    "tail",
    "ternarize",
    "verify",
    "write",
    "write_gguf",
]
