"""Small models with the built-in model's tokenizer, as folders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[3] / "recipes" / "demo" / "model"
VOCAB = 4096
SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 4080, "eos_token_id": 4081, "pad_token_id": None},
}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def make_model(family: str, seed: int = 1, **fields: Any):
    """Return a random model of a family: matrices from N(0, 0.15), vectors moved by N(0, 0.1)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[family](**{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            moved = torch.randn(value.shape, generator=random)
            value.copy_(moved * 0.15 if value.ndim > 1 else value + moved * 0.1)
    return model


def save_model(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    return folder


def next_scores(model, prompts: list[list[int]]):
    """Return the logarithms of the next token's probabilities, as numpy [vocab] for each prompt."""
    import torch

    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].float(), -1).numpy() for prompt in prompts]


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[..., Any]:
    """Make a model of a family in a new folder; return both."""

    def make(family: str, name: str = "model", dtype: str = "float32", **fields: Any):
        torch = pytest.importorskip("torch")
        model = make_model(family, **fields).to(getattr(torch, dtype))
        return model, save_model(model, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def scores() -> Callable[..., Any]:
    return next_scores


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> dict[str, Path]:
    """A bf16 Llama whose matrices have multiples of 256 inputs, and what ternarize makes of it in both conventions."""
    torch = pytest.importorskip("torch")
    from downcycle.surgery.checkpoint import open_checkpoint
    from downcycle.surgery.ternary.ternarize import ternarize
    from downcycle.surgery.write import write

    root = tmp_path_factory.mktemp("wide")
    save_model(make_model("llama", **WIDE).to(torch.bfloat16), root / "float")
    for linear in ("bitlinear", "autobitlinear"):
        write(ternarize(open_checkpoint(root / "float"), linear=linear), root / linear)
    return {path.name: path for path in root.iterdir()}
