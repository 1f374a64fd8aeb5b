"""A child's name: its parent's, the size replaced by what is left."""

import random
from pathlib import Path

import pytest

from downcycle import Checkpoint, Tensor
from downcycle.surgery.naming import child_name, format_size


def model(name: str, elements: int, layers: int = 2) -> Checkpoint:
    return Checkpoint(
        name, {"num_hidden_layers": layers}, {f"x{i}": Tensor("U8", (elements if i == 0 else 0,), lambda: [b""]) for i in range(layers)}
    )


@pytest.mark.parametrize(
    ("parent", "before", "after", "child"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, 6_285_365_248, "Llama-3-6B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, 6_285_365_248, "Llama-3-6B-Instruct"),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400, 749_275_136, "Llama-3.2-749M"),
        ("Qwen/Qwen2.5-0.5B", 494_032_768, 300_000_000, "Qwen2.5-300M"),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008, 100_000_000, "SmolLM2-100M"),
        ("bigscience/bloom-560m", 560_000_000, 280_000_000, "bloom-280m"),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192, 34_488_324_096, "Llama-2-34b-hf"),
        ("packed/Llama-2-70b-AWQ", 9_000_000_000, 4_500_000_000, "Llama-2-35b-AWQ"),
        ("openai-community/gpt2", 100, 50, "gpt2-2L"),
        ("demo", 100, 50, "demo-2L"),
        ("Meta-Llama-3-8B", 100, 100, "Llama-3-8B-2L"),
        ("not-Meta-Llama-3-8B", 100, 75, "not-Meta-Llama-3-6B"),
        ("/models/Meta-Llama-3-8B/", 8_030_261_248, 6_285_365_248, "Llama-3-6B"),
        ("../models/x/../Meta-Llama-3-8B", 8_030_261_248, 6_285_365_248, "Llama-3-6B"),
        ("a model, 8B", 4, 2, "a model, 4B"),
    ],
)
def test_names(parent, before, after, child):
    assert child_name(model(parent, before), model("any", after)) == child


def test_a_folder_given_as_dots_has_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "My-8B" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "My-8B" / "inside")
    assert child_name(model("..", 4), model("any", 2)) == "My-4B"
    assert child_name(model(".", 4), model("any", 2)) == "inside-2L"


def test_a_child_is_never_named_like_its_parent():
    rng = random.Random(5)
    for _ in range(2000):
        name = f"M-{rng.choice(['0', '0.5', '1', '1.7', '8', '70', '405'])}{rng.choice('bBmM')}"
        after = rng.randint(1, 1000)
        child = child_name(model(name, 1000), model("any", after))
        assert child != name
        assert child == Path(child).name


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (6.26e9, "6B"),
        (2.94e9, "2.9B"),
        (2.96e9, "3B"),
        (1.2e9, "1.2B"),
        (1e9, "1B"),
        (9.996e8, "1B"),
        (9.99e8, "999M"),
        (1.34e8, "134M"),
        (5e5, "0.5M"),
    ],
)
def test_sizes(count, text):
    assert format_size(count) == text
    assert format_size(count, upper=False) == text.lower()
