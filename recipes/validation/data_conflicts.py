"""Rules about what an Axolotl config trains and is evaluated on: datasets, streams, packing. Opens no dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .axolotl_schema import load_keys
from .hardware import attention
from .names import nearest

Config = dict[str, Any]

TEXTS = ("datasets", "test_datasets", "pretraining_dataset")

FILE_TYPES = (  # what the datasets library reads files as
    *("json", "csv", "parquet", "arrow", "text", "pandas", "xml", "hdf5", "webdataset", "lance", "eval"),
    *("imagefolder", "audiofolder", "videofolder", "pdffolder", "niftifolder"),
)
SUFFIXES = {"jsonl": "json", "ndjson": "json", "json.gz": "json", "tsv": "csv", "txt": "text", "pickle": "pandas", "image": "imagefolder"}


def data_faults(config: Config) -> Iterator[str]:
    """Name what is wrong with datasets and what depends on them; much of it Axolotl would ignore silently."""
    for rule in (_data, _dataset_types, _streaming, _evaluation, _packing):
        yield from rule(config)


def entries(config: Config, key: str) -> list[Config]:
    """The mappings in a list of datasets; what is no mapping is left to keys.py."""
    found = config.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def number(value: Any) -> float | None:
    """A number, or the number that a text stands for, as pydantic reads it; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _data(config: Config) -> Iterator[str]:
    if not config.get("datasets") and not config.get("pretraining_dataset") and "datasets" not in config:
        yield "datasets: missing; give datasets, or pretraining_dataset to stream"
    for key in TEXTS:
        for place, entry in enumerate(entries(config, key)):
            if not entry.get("path") and entry.get("type") != "_synthetic":
                yield f"{key}[{place}].path: missing; give a folder, a file or a Hub id"
            kind = entry.get("ds_type")
            if isinstance(kind, str) and kind and kind not in FILE_TYPES and "/" not in kind:
                hint = f"; write {SUFFIXES[kind]}" if kind in SUFFIXES else nearest(kind, FILE_TYPES)
                yield f"{key}[{place}].ds_type: {kind!r} is no kind of file that datasets loads{hint}"
            if entry.get("shards") and entry.get("preprocess_shards"):
                yield f"{key}[{place}].shards: not together with preprocess_shards"


def _dataset_types(config: Config) -> Iterator[str]:
    """Only for plain training: each kind of reinforcement learning has types of its own."""
    if config.get("rl"):
        return
    known = load_keys()["names"]["dataset_type"]
    for key in TEXTS:
        for place, entry in enumerate(entries(config, key)):
            value = entry.get("type")
            if not isinstance(value, str):
                continue
            head = re.split("[.:]", value)[0]
            own = "." in value and head not in {re.split("[.:]", name)[0] for name in known}  # a module of the user's or a plugin's
            if value.startswith("sharegpt"):
                yield f"{key}[{place}].type: sharegpt is gone; write chat_template"
            elif value == "pretrain" and key != "pretraining_dataset":
                yield f"{key}[{place}].type: pretrain reads pretraining_dataset; write completion"
            elif value not in known and not own and not (":" in value and head in known):
                yield f"{key}[{place}].type: {value!r} is no prompt strategy of Axolotl{nearest(value, known)}"


def _streaming(config: Config) -> Iterator[str]:
    stream = "pretraining_dataset" if config.get("pretraining_dataset") else "streaming"
    if not config.get(stream):
        return
    if not config.get("max_steps"):
        yield f"max_steps: missing; a stream ({stream}) has no end"
    if config.get("val_set_size"):
        yield f"val_set_size: cannot be split off a stream ({stream}); give test_datasets"
    if config.get("dataset_exact_deduplication"):
        yield "dataset_exact_deduplication: not available for a stream"
    if stream == "streaming" and config.get("sample_packing") and len(entries(config, "datasets")) > 1:
        yield "datasets: Axolotl packs a stream of one dataset only"
    if stream == "streaming" and not config.get("sample_packing") and config.get("test_datasets"):
        yield "test_datasets: not read while streaming without sample_packing; write sample_packing: true or stream nothing"
    texts = entries(config, "pretraining_dataset")
    if len(texts) > 1:
        yield "pretraining_dataset: Axolotl reads the first entry only, silently; give one"
    for entry in texts[:1]:
        for key in ("field", "revision", "shards"):
            if entry.get(key) and not (key == "field" and entry[key] == (entry.get("text_column") or "text")):
                yield f"pretraining_dataset[0].{key}: not read from a stream" + ("; write text_column" if key == "field" else "")
        packed_completion = config.get("sample_packing") and entry.get("type") == "completion"
        if packed_completion and entry.get("text_column") not in (None, "text"):
            yield "pretraining_dataset[0].text_column: not read with type: completion and sample_packing; write type: pretrain"


def _evaluation(config: Config) -> Iterator[str]:
    evaluated = config.get("val_set_size") or config.get("test_datasets") or config.get("do_bench_eval")
    if not evaluated:
        for key in ("eval_steps", "early_stopping_patience", "load_best_model_at_end"):
            if config.get(key):
                yield f"{key}: there is nothing to evaluate on; give val_set_size or test_datasets"
        if config.get("eval_strategy") not in (None, "no"):
            yield "eval_strategy: there is nothing to evaluate on; give val_set_size or test_datasets"
        if config.get("lr_scheduler") in ("reduce_lr_on_plateau", "greedy"):
            yield f"lr_scheduler: {config['lr_scheduler']} follows the evaluation loss; give val_set_size or test_datasets"
    if config.get("save_strategy") == "best" and not config.get("metric_for_best_model"):
        yield "metric_for_best_model: missing; save_strategy: best needs it, like eval_loss"
    if config.get("early_stopping_patience") and evaluated and not (config.get("save_steps") and config.get("eval_steps")):
        yield "early_stopping_patience: needs save_steps and eval_steps, the second a divisor of the first"
    yield from _best_model(config)


def _best_model(config: Config) -> Iterator[str]:
    saves, evals = _interval(config, "save_steps", "saves_per_epoch"), _interval(config, "eval_steps", "evals_per_epoch")
    if config.get("load_best_model_at_end") and config.get("save_strategy") != "best" and not (saves and evals):
        needs = "save_steps and eval_steps, or saves_per_epoch and evals_per_epoch that make more than one in a run"
        yield f"load_best_model_at_end: Axolotl ignores it silently without {needs}"
    wanted = config.get("load_best_model_at_end") or config.get("early_stopping_patience")
    if wanted and saves and evals and saves % evals:
        key = "eval_steps" if config.get("eval_steps") else "evals_per_epoch"
        yield f"{key}: {evals:.4g} does not divide {saves:.4g} (save_steps); the best model would not be among the saved ones"


def _interval(config: Config, steps: str, per_epoch: str) -> float | None:
    """Steps, or a share of the run, between two saves or evaluations, reckoned as Axolotl does: to the last bit."""
    times, epochs = number(config.get(per_epoch)), number(config.get("num_epochs", 1))
    if times and epochs and times * epochs > 1:
        return 1.0 / (times * epochs)
    return number(config.get(steps))


def _packing(config: Config) -> Iterator[str]:
    if not config.get("sample_packing") or config.get("rl"):
        return
    wanted = attention(config)
    if wanted is None or (wanted not in load_keys()["names"]["packing_attention"] and "/" not in wanted):
        yield f"attn_implementation: {wanted or 'unset'} lets packed samples see each other; write flash_attention_2 or sdpa"
