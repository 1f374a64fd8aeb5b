"""Tiny models on disk, samples of different lengths, and the whole model as the oracle of what is run layer by layer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from downcycle.surgery.importance.calibration import Batch, Sample, make_batches

SHAPES = [(13, 1), (13, 1), (13, 4), (13, 1), (9, 8), (2, 1), (2, 1), (2, 1)]  # tokens of a sample, and how many are given


@pytest.fixture(scope="session")
def batches() -> list[Batch]:
    """Samples of 13, 9 and 2 tokens, of five documents, in batches of 3, 1, 1 and 3."""
    random = np.random.default_rng(3)
    samples = [Sample(random.integers(10, 60, tokens), given, number % 5) for number, (tokens, given) in enumerate(SHAPES)]
    return make_batches(samples, 40)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """Make a folder with a tiny model of a family, as tests/tiny_models.py has them, once for each dtype."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str = "llama", dtype: str = "float32") -> Path:
        import torch

        from tiny_models import tiny_model

        if (family, dtype) not in made:
            made[family, dtype] = tmp_path_factory.mktemp(family)
            tiny_model(family).to(getattr(torch, dtype)).save_pretrained(made[family, dtype])
        return made[family, dtype]

    return make


class Whole:
    """A whole model in memory, whose layers can be passed over."""

    def __init__(self, model):
        self.model = model.eval()

    def logits(self, ids, path=()):
        """[samples, tokens] -> [samples, tokens, vocabulary], without some layers."""
        import torch

        import families

        with torch.no_grad(), families.without_layers(self.model, sorted(path)):
            return self.model(input_ids=torch.as_tensor(ids), use_cache=False).logits

    def hidden(self, ids):
        """Return h_0 ... h_L, all before the final norm."""
        import torch

        from downcycle.surgery.importance.pruned import find_stack

        last = []
        layers = self.model.get_submodule(find_stack(self.model, self.model.config.num_hidden_layers))
        hook = layers[-1].register_forward_hook(lambda module, given, output: last.append(output))
        with torch.no_grad():
            states = self.model(input_ids=torch.as_tensor(ids), use_cache=False, output_hidden_states=True).hidden_states
        hook.remove()
        return [*states[:-1], *last]

    def losses(self, batches, path=()):
        """Return the loss of each sample on a path, by its tokens one by one: nats, how many, document."""
        import torch

        found = []
        for batch in batches:
            chances = self.logits(batch.ids, path).double().log_softmax(-1)
            for row, given, document in zip(range(len(batch.ids)), batch.given, batch.documents, strict=True):
                tokens = batch.ids[row]
                nats = [-chances[row, place - 1, tokens[place]].item() for place in range(given, len(tokens))]
                found.append((torch.tensor(nats, dtype=torch.float64).sum().item(), len(nats), document))
        return found


@pytest.fixture(scope="session")
def whole() -> Callable[..., Whole]:
    """Load a folder with stock transformers."""

    def load(folder: Path, **options):
        import torch
        from transformers import AutoModelForCausalLM

        return Whole(AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}))

    return load
