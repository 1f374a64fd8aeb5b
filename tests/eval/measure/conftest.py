"""Tiny models with the built-in tokenizer, as it is or without the special tokens that it adds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = Path(__file__).parents[3] / "recipes" / "demo" / "model"
TOKENIZERS = {"bos": (), "both": (), "eos": ("post_processor",), "none": ("post_processor", "eos_token")}  # what is taken away
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 4096}
TINY = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 4080, "eos_token_id": 4081}


def add_tokenizer(folder: Path, kind: str = "bos") -> None:
    """Put the built-in tokenizer into a folder; it adds BOS, of kind `both` EOS too, of kind `eos` neither, and kind `none` has none."""
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    for part in TOKENIZERS[kind]:
        if part in tokenizer:
            tokenizer[part] = None
        settings.pop(part, None)
    if kind == "both":
        template, name = tokenizer["post_processor"]["processors"][1], settings["eos_token"]
        template["single"].append({"SpecialToken": {"id": name, "type_id": 0}})
        template["special_tokens"][name] = {"id": name, "ids": [4081], "tokens": [name]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def put_tokenizer() -> Callable[..., None]:
    """Put the built-in tokenizer into a folder: see `add_tokenizer`."""
    return add_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """Make a folder with a tiny random model, once for each kind: a config's class and fields, and what its tokenizer adds."""
    made: dict[str, Path] = {}

    def make(config: str = "LlamaConfig", tokenizer: str = "bos", dtype: str = "float32", **fields: object) -> Path:
        import torch
        import transformers

        key = repr((config, tokenizer, dtype, fields))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            torch.manual_seed(len(made))
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**TINY | fields))
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(std=0.3)  # so that its guesses differ from token to token
            model.to(getattr(torch, dtype)).save_pretrained(folder)
            add_tokenizer(folder, tokenizer)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def copy(tmp_path) -> Callable[..., Path]:
    """Copy a model's folder, so that it may be changed."""
    return lambda folder, name="copy": Path(shutil.copytree(folder, tmp_path / name))
