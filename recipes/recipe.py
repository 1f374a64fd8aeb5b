"""A recipe: the Axolotl YAML that heals one model, on one text, on one machine. Made from a preset, and never without a check.

Makes values and text; writes no file, loads no weight, and needs neither torch nor Axolotl.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from ..surgery.checkpoint import Checkpoint
from ..surgery.errors import DowncycleError
from ..surgery.naming import folder_name
from .machine import Fit, Machine, check_machine, fit, parallel_settings
from .memory import ModelSize, model_size
from .model_keys import check_trained, pad_token, tail_parameters, ternary_keys, unfit_keys
from .presets import LIGER, PRESETS, Preset, Setting
from .text_source import TextSource, find_text
from .validation.check import check_keys
from .validation.conflicts import conflicts
from .validation.model_faults import model_faults, positions
from .validation.own_plugins import SECTION
from .validation.ternary import base_notes

ENOUGH_TOKENS = 1_000_000_000  # what a stream, which has no end, is trained on
USER = "set by you"


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, how; `recipe_text` in recipe_text.py spells it as YAML."""

    preset: str
    settings: Mapping[str, Setting]
    base_model: str
    size: ModelSize
    machine: Machine
    fit: Fit
    text: TextSource

    @property
    def config(self) -> dict[str, Any]:
        """The keys and values, as Axolotl reads them."""
        return {key: setting.value for key, setting in self.settings.items()}


def make_recipe(
    model: Checkpoint,
    base_model: str,
    preset: str = "qlora",
    *,
    dataset: str | TextSource | None = None,
    machine: Machine | None = None,
    parallel: str = "auto",
    ray: bool = False,
    batch: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Make the recipe that heals a model.

    Args:
        model: the child, written or not. base_model: the folder or Hub id that the recipe names for it.
        dataset: folder, file or Hub id (`USER/NAME:CONFIG`), or a source already described [default: the preset's].
        machine: [default: the GPUs that the preset was laid out for, of unknown memory].
        parallel: auto, ddp, fsdp2 or zero3. ray: launch through Ray.
        batch: sequences in one optimiser step, over all GPUs.
        overrides: keys set by the user, with dots into nested ones; they win over everything, and None takes a key out.
    Raises:
        DowncycleError: no such preset or data set, it does not fit the machine, or keys that contradict each other; says why.
    """
    if preset not in PRESETS:
        raise DowncycleError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    try:
        base_model.encode()
    except UnicodeEncodeError as error:
        raise DowncycleError(f"{base_model!r}: a name that is not Unicode cannot stand in YAML; rename the folder") from error
    chosen = PRESETS[preset]
    machine = machine or Machine(gpus=chosen.gpus)
    check_machine(machine, parallel)
    if not isinstance(dataset, TextSource):
        dataset = find_text(dataset or chosen.dataset, streaming="streaming" in chosen.settings)
    if chosen.goes_on:
        check_trained(model, preset)
    settings = dict(chosen.settings) | _model_settings(model, base_model, preset, chosen) | _text_settings(dataset, chosen)
    settings = _adapt(settings, model, machine, preset)
    size = model_size(model)
    if size.packed:
        raise DowncycleError(f"{base_model}: its weights are quantised already, and cannot be trained; cut and heal the unquantised model")
    overrides = overrides or {}
    values = {key: setting.value for key, setting in _override(settings, overrides).items()}
    _check_values(values)
    split = fit(size, values, machine, batch=batch, default=chosen.batch, micro_batch=chosen.micro_batch, parallel=parallel)
    settings |= _machine_settings(split, values, machine, ray)
    settings |= _amount_settings(settings, split, values, dataset)
    settings = _override(settings, overrides)
    recipe = Recipe(preset, settings, base_model, size, machine, split, dataset)
    _check(recipe, model)
    return recipe


def _model_settings(model: Checkpoint, base_model: str, preset: str, chosen: Preset) -> dict[str, Setting]:
    name = folder_name(base_model).lower()
    own = {"qlora": name, "llama-3-6b": f"{name}-published", "ternary": f"{name}-1.58", "ternary-long": f"{name}-long"}
    outputs = own.get(preset, f"{name}-{preset}")
    settings = {"base_model": Setting(base_model), "output_dir": Setting(f"outputs/{outputs}")}
    if "streaming" not in chosen.settings:
        settings["dataset_prepared_path"] = Setting(f"outputs/{name}-prepared")
    if pad := pad_token(model):
        settings["special_tokens"] = Setting({"pad_token": pad}, "one that the vocabulary has: a new one would grow the embeddings")
    if chosen.trained_layers:
        last = min(chosen.trained_layers, model.num_layers)
        settings["unfrozen_parameters"] = Setting(tail_parameters(model, last), "regular expressions; Axolotl takes a dot for a dot")
    if SECTION in chosen.settings and (kept := ternary_keys(model)):
        planned = chosen.settings[SECTION]
        settings[SECTION] = Setting(planned.value | kept, f"{planned.why}; the rest as base_model was trained")
    if (longest := positions(model)) and longest < chosen.settings["sequence_len"].value:
        settings["sequence_len"] = Setting(longest, "as long as the model's positions go")
    return settings


def _text_settings(text: TextSource, chosen: Preset) -> dict[str, Setting]:
    if "streaming" in chosen.settings:
        return {"pretraining_dataset": Setting([text.train])}
    settings = {"datasets": Setting([text.train])}
    if text.test:
        settings |= {"test_datasets": Setting([text.test], "held out by `downcycle data`"), "val_set_size": Setting(0)}
    return settings


def _adapt(settings: dict[str, Setting], model: Checkpoint, machine: Machine, preset: str) -> dict[str, Setting]:
    """Take out what the model's family or the machine has not, or put what it has in its place."""
    config = model.config.get("text_config") or model.config
    for key in unfit_keys(str(config.get("model_type")), settings, machine.gpus):
        if settings[key].value is not False:
            del settings[key]
    if "plugins" in settings and not any(key.startswith("liger_") for key in settings):
        others = [name for name in settings.pop("plugins").value if name != LIGER]
        settings |= {"plugins": Setting(others)} if others else {}
    if machine.ampere:
        return settings
    settings.pop("tf32", None)
    settings["attn_implementation"] = Setting("sdpa", "flash attention 2 needs a GPU of sm_80 or newer")
    settings["bf16"] = Setting(False)
    if machine.gpus and "adapter" not in settings:
        way = "take a GPU of sm_80 or newer" if SECTION in settings else "take --preset qlora"
        raise DowncycleError(f"--preset {preset}: {machine.arch} has no bf16, and fp16 is no good for whole weights; {way}")
    if machine.gpus:
        return settings | {"fp16": Setting(True, f"{machine.arch} has no bf16")}
    for key in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"):
        if "adapter" in settings:
            settings[key] = Setting(False, "Triton kernels need a GPU")
    if "paged" in str(settings["optimizer"].value):
        settings["optimizer"] = Setting("adamw_torch", "there is no GPU memory to page out of")
    if settings.get("load_in_4bit"):
        for key in ("test_datasets", "evals_per_epoch", "eval_sample_packing", "eval_batch_size"):
            settings.pop(key, None)
        settings["val_set_size"] = Setting(
            0, "with NF4, an evaluation makes all later gradients wrong on CPUs with AVX512-BF16, and no error says so"
        )
    return settings


def _machine_settings(split: Fit, values: dict[str, Any], machine: Machine, ray: bool) -> dict[str, Setting]:
    parts = f"x {split.replicas} GPUs " if split.replicas > 1 else ""
    settings = {
        "micro_batch_size": Setting(split.micro_batch),
        "gradient_accumulation_steps": Setting(split.accumulation, f"{parts}x micro-batch: {split.batch} sequences in one step"),
    }
    settings |= {key: Setting(value) for key, value in parallel_settings(split.parallel, values).items()}
    if split.parallel == "fsdp2" and "paged" in str(values["optimizer"]):
        settings["optimizer"] = Setting("adamw_torch_fused", "its state is sharded already; bitsandbytes' paged one is not made for FSDP2")
    if ray:
        if machine.world == 1:
            raise DowncycleError("--ray: needs several GPUs; leave it out for one, and for a CPU")
        settings |= {
            "use_ray": Setting(True),
            "ray_num_workers": Setting(machine.world),
            "resources_per_worker": Setting({"GPU": 1}),
        }
    return settings


def _amount_settings(settings: Mapping[str, Setting], split: Fit, values: dict[str, Any], text: TextSource) -> dict[str, Setting]:
    """The keys that follow how much text there is: how many steps there are, and whether what is held out fills packed batches."""
    amount, step = {}, split.batch * values["sequence_len"]
    if steps := settings.get("max_steps"):  # those of the preset
        amount["max_steps"] = Setting(steps.value, f"{steps.why}; {steps.value * step:,} tokens here")
    elif "streaming" in settings:
        tokens = text.tokens or ENOUGH_TOKENS
        amount["max_steps"] = Setting(max(1, tokens // step), f"{tokens:,} tokens; a stream has no end")
    held_out = text.held_out if text.test else (text.tokens or 0) * (values.get("val_set_size") or 0)
    if settings.get("eval_sample_packing") and (held_out or 0) < 4 * split.replicas * values["sequence_len"]:
        amount["eval_sample_packing"] = Setting(False, "the held-out text might not fill packed batches")
    return amount


def _override(settings: Mapping[str, Setting], overrides: Mapping[str, Any]) -> dict[str, Setting]:
    changed = dict(settings)
    for key, value in overrides.items():
        _set(changed, key, value)
    return changed


def _set(settings: dict[str, Setting], key: str, value: Any) -> None:
    """Set a key, with dots a nested one (a number for a place in a list); None takes it out."""
    first, *rest = key.split(".")
    if not rest:
        if value is None:
            settings.pop(first, None)
        else:
            settings[first] = Setting(value, USER)
        return
    whole = deepcopy(settings[first].value) if first in settings else {}
    if not whole and rest[0].isdecimal():
        raise DowncycleError(f"--set {key}: there is no list {first} here; set it whole")
    inner = whole
    for part in rest[:-1]:
        inner = inner[_place(inner, part, key)] if isinstance(inner, list) else inner.setdefault(part, {})
    last = _place(inner, rest[-1], key)
    if value is None:
        inner.pop(last, None) if isinstance(inner, dict) else inner.pop(last)
    else:
        inner[last] = value
    settings[first] = Setting(whole, USER)


def _place(inner: Any, part: str, key: str) -> Any:
    if isinstance(inner, dict):
        return part
    if isinstance(inner, list) and part.isdecimal() and int(part) < len(inner):
        return int(part)
    raise DowncycleError(f"--set {key}: there is no {part!r} to set in {str(inner)[:60]!r}")


def _check_values(values: dict[str, Any]) -> None:
    """Refuse values of the wrong kind before they are reckoned with."""
    if faults := check_keys(values):
        raise DowncycleError("; ".join(faults))
    length = values.get("sequence_len")
    if type(length) is not int or length < 1:
        raise DowncycleError(f"sequence_len {length!r}: give a number of tokens, like 4096")


def _check(recipe: Recipe, model: Checkpoint) -> None:
    """Refuse a recipe with a fault, which only keys that the user set can have, or one that undoes an earlier ternary training."""
    config = recipe.config
    faults = [
        *check_keys(config),
        *conflicts(config, recipe.machine.gpus * recipe.machine.nodes, recipe.machine.arch),
        *model_faults(config, model),
        *base_notes(config, model.config, model.name),
    ]
    if faults:
        raise DowncycleError("; ".join(faults))
