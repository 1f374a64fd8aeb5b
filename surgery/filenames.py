"""What the files of a checkpoint are called, and which of them belong to a model."""

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LINEAGE = "downcycle.json"
QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

# What belongs to a model besides weights and config. Anything else in the folder (optimizer states, logs, keys) stays behind.
SMALL_FILES = (
    GENERATION, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "*.jinja", "chat_template*", "chat_templates/*", "additional_chat_templates/*", "*processor_config.json",
    *QUANTIZER_FILES, "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
CODE_FILES = ("*.py",)
PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "consolidated*.pth", "tf_model.h5", "flax_model.msgpack")
