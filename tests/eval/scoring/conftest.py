"""Tiny Llamas with the built-in tokenizer, texts, and the whole model in memory as the oracle of what is measured layer by layer."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = Path(__file__).parents[3] / "recipes" / "demo" / "model"
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}
TINY = SIZES | {"max_position_embeddings": 64, "bos_token_id": 4080, "eos_token_id": 4081}
SENTENCE = "the model reads one layer at a time and says how much of each text it could foretell when some other part is gone"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """Make a folder with a tiny random Llama, once for each kind; return it."""
    made: dict[tuple[int, int], Path] = {}

    def make(layers: int = 6, width: int = 32) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        if (layers, width) not in made:
            folder = made[layers, width] = tmp_path_factory.mktemp("tiny")
            torch.manual_seed(layers)
            model = LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width))
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(std=0.15) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.1)
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(MODEL / name, folder)
        return made[layers, width]

    return make


@pytest.fixture
def copy(tmp_path) -> Callable[..., Path]:
    """Copy a model's folder, so that it may be changed."""
    return lambda folder, name="copy": Path(shutil.copytree(folder, tmp_path / name))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Thirty documents of about forty tokens, none like another."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = SENTENCE.split()
    rows = [" ".join(words[place * (number + 3) % 23] + str(number % 7) * (place % 5 == 0) for place in range(40)) for number in range(30)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def study(text) -> Callable[..., object]:
    """Open the study of a folder."""

    def make(folder: Path, **options: object):
        from downcycle import open_checkpoint
        from downcycle.eval.scoring.commands import Measuring, open_study

        given = {"samples": 10, "length": 24, "calibrate": str(text)} | options
        return replace(open_study(open_checkpoint(folder), Measuring(**given)), device="cpu")

    return make


@pytest.fixture
def loads(monkeypatch) -> list[int | None]:
    """Note every part of a model that is loaded: a layer's number, or None, the frame."""
    from downcycle.surgery.importance.parts import Parts

    seen: list[int | None] = []
    load = Parts._load
    monkeypatch.setattr(Parts, "_load", lambda self, number, tensors: seen.append(number) or load(self, number, tensors))
    return seen


class Whole:
    """A whole Llama in memory, in float64, run one sample at a time. Knows nothing of the package."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
        self.layers = list(self.model.model.layers)

    def run(self, ids, dropped=()):
        """Return the logits [tokens, vocabulary] and the hidden states in front of each layer and behind the last."""
        import torch

        kept = [layer for number, layer in enumerate(self.layers) if number not in dropped]
        self.model.model.layers, states = torch.nn.ModuleList(kept), []
        hooks = [layer.register_forward_pre_hook(lambda module, given: states.append(given[0][0])) for layer in kept]
        hooks.append(kept[-1].register_forward_hook(lambda module, given, output: states.append(output[0])))
        logits = self.model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        return logits, states

    def loss(self, samples, dropped=()) -> float:
        """Return the mean loss of all scored tokens."""
        sums = [self.nats(one, dropped) for one in samples]
        return math.fsum(map(float, sums)) / sum(one.scored for one in samples)

    def nats(self, sample, dropped=()):
        """Return the sum of -ln p over a sample's scored tokens."""
        import torch

        chances = self.run(sample.ids, dropped)[0].log_softmax(-1)
        ids = torch.as_tensor(sample.ids)
        return -chances[sample.given - 1 : -1].gather(1, ids[sample.given :, None]).sum()


@pytest.fixture(scope="session")
def whole() -> Callable[..., Whole]:
    return Whole
