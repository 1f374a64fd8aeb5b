"""What the files of a checkpoint are called, and which of them belong to a model."""

from fnmatch import fnmatch
from pathlib import PurePosixPath

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
README = "README.md"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LINEAGE = "downcycle.json"
LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")  # how the names of licence texts begin
QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

# What a tokenizer's vocabulary is in, by every name that one of transformers gives to its files.
VOCABULARIES = (
    *("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.spm", "bpe.codes", "byte_maps.json"),
    *("dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json", "target_vocab.json", "*.tokenizer", "word_pronunciation.json"),
    "word_shape.json",
)
# What belongs to a model besides weights and config. Anything else in the folder (optimizer states, logs, keys) stays behind.
SMALL_FILES = (
    *(GENERATION, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "chat_template*"),
    *("chat_templates/*", "additional_chat_templates/*", "*processor_config.json", *QUANTIZER_FILES),
    *(f"{name}*" for name in LEGAL),
    *VOCABULARIES,
)
CODE_FILES = ("*.py",)
PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "consolidated*.pth", "tf_model.h5", "flax_model.msgpack")


def belongs(path: str, with_code: bool = False) -> bool:
    """Whether a file is one of a model's small ones, by its path below the model's folder; its code may lie one folder deeper."""
    if with_code and path.count("/") <= 1 and any(fnmatch(path, pattern) for pattern in CODE_FILES):
        return True
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in SMALL_FILES)


def is_licence_text(path: str) -> bool:
    """Whether a file at the top of a folder is the text of a licence, by its name."""
    return "/" not in path and path.upper().startswith(("LICENSE", "LICENCE", "COPYING"))


def leads_out(path: str) -> bool:
    """Whether a file of this name could lie outside the folder that it belongs to."""
    parts = PurePosixPath(path)
    return parts.is_absolute() or ".." in parts.parts or "\\" in path
