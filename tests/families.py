"""The proof that a cut of any causal-LM family is exact or refused, and the table of verdicts, FAMILIES.md.

The oracle knows nothing of the package: it runs the parent in memory with its dropped layers passing their input on. The package's
child is loaded by stock transformers. `python tests/families.py --write` makes the table anew, with the newest transformers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from downcycle.surgery.checkpoint import open_checkpoint
from downcycle.surgery.errors import DowncycleError
from downcycle.surgery.layers import keep_layers
from downcycle.surgery.write import write

from tiny_models import DEPTH, FAMILIES, NEW, TOKENS, VARIANTS, Config, inputs, logits, stand_in_for_timm, tiny_model

TABLE = Path(__file__).parents[1] / "FAMILIES.md"
CUTS = {"the first 6": [0, 1, 2, 3, 4, 5], "0, 1, 4, 5, 7": [0, 1, 4, 5, 7], "2, 3, 4, 6": [2, 3, 4, 6]}

TOWERS = re.compile("vision|visual|image|audio|vqmodel|text_encoder|depth_decoder|img_processor")
STACKS = {
    "blt": r"global_transformer\.layers$",
    "hrm_text": r"[HL]_module\.layers$",
    "xlm": r"transformer\.(attentions|layer_norm1|ffns|layer_norm2)$",
}
DELETED = ("inkling2_text", "reformer", "rwkv")  # families whose model looks at its layers while it runs them
CARRIED = {  # what a layer hands to the next one beside hidden states
    "glm_moe_dsa": ("prev_topk_indices",),
    "hy_v4": ("prev_topk_indices",),
    "xlstm": ("state",),
    "zaya": ("prev_router_hidden_states",),
}
# Families whose own class cannot make a model, and what it says.
NOT_BUILT = dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "layer types producing a cache") if NEW else {}
# Other spellings of what a tiny model's config says, as checkpoints on the Hub have them in place of explicit lists.
SPELLINGS: dict[str, Config] = {
    "deepseek_v4": {"compress_ratios": [128, 128, 128, 4, 128, 4, 128, 4], "num_hash_layers": 3},
    "glm_moe_dsa": {"index_topk_pattern": "FFSFSSFS"},
    "inkling_text": {"local_layer_ids": [0, 1, 2, 3, 4, 6, 7], "dense_mlp_idx": 2},
    "kimi_linear": {"linear_attn_config": {"full_attn_layers": [2, 5, 8], "kda_layers": [1, 3, 4, 6, 7]}},
    "minimax_m3_vl_text": {
        "sparse_attention_config": {"sparse_attention_freq": [0, 1, 0, 1, 1, 0, 1, 0]},
        "moe_layer_freq": [0, 1, 0, 1, 1, 0, 1, 1],
    },
    "modernbert-decoder": {"global_attn_every_n_layers": 2},
    "nemotron_h": {"hybrid_override_pattern": "ME*-*EME"},
    "qwen3_next": {"full_attention_interval": 2},
}


# The oracle.


def oracle(parent: PreTrainedModel, kept: list[int]) -> Tensor:
    """Return the logits of the parent without its other layers."""
    with without_layers(parent, sorted(set(range(DEPTH)) - set(kept))):
        return logits(parent)


def idle_layers(model: PreTrainedModel) -> list[int]:
    """Return the layers without which the logits stay what they are: a test that has such a layer proves nothing."""
    whole = logits(model)
    return [layer for layer in range(DEPTH) if torch.allclose(oracle(model, [*range(layer), *range(layer + 1, DEPTH)]), whole, atol=1e-4)]


def _stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Return the list of decoder layers, or the parallel lists that one layer is spread over."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == DEPTH}
    wanted = STACKS.get(model.config.model_type)
    chosen = [module for name, module in found.items() if (re.search(wanted, name) if wanted else not TOWERS.search(name))]
    assert wanted or len(chosen) == 1, f"which of {list(found)} holds the decoder layers of {model.config.model_type}?"
    return chosen


@contextmanager
def without_layers(model: PreTrainedModel, dropped: list[int]) -> Iterator[None]:
    """Let these decoder layers pass their input on, or take them out where the model's own loop looks at the layers."""
    lists = _stacks(model)
    if model.config.model_type in DELETED:
        with _deleted(model, lists[0], dropped):
            yield
        return
    layers = [one[layer] for one in lists for layer in dropped]
    try:
        for layer in layers:
            layer.forward = _passing_on(layer, model.config.model_type)
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _deleted(model: PreTrainedModel, layers: nn.ModuleList, dropped: list[int]) -> Iterator[None]:
    everything = list(layers)
    unscale = getattr(model.base_model, "_rescale_layers", lambda: None)  # RWKV halves its weights at inference, by position
    model.train()
    unscale()
    layers._modules = {str(new): everything[old] for new, old in enumerate(sorted(set(range(DEPTH)) - set(dropped)))}
    model.eval()
    try:
        yield
    finally:
        model.train()
        unscale()
        layers._modules = {str(index): layer for index, layer in enumerate(everything)}
        model.eval()


def _passing_on(layer: nn.Module, model_type: str) -> Any:
    """Return a forward that gives what it is given, in the type that the layer's own forward gives."""
    own = type(layer).forward
    names = list(inspect.signature(own).parameters)[1:]
    carried = CARRIED.get(model_type, ())

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given[names[0]]
        if model_type == "xlm":  # parts of a layer: a residual gets nothing added, a norm passes on
            nothing = torch.zeros_like(hidden)
            return hidden if isinstance(layer, nn.LayerNorm) else (nothing,) if "Attention" in type(layer).__name__ else nothing
        with torch.no_grad():
            real = own(layer, *args, **kwargs)
        if isinstance(real, Tensor):
            return hidden
        return (hidden, *(given.get(name) for name in carried), *real[1 + len(carried) :])

    return forward


# The proof.


class Verdict(NamedTuple):
    """What became of one cut: exact, refused (the reason names a field), or wrong (it says what broke)."""

    status: str
    reason: str = ""


class Parent(NamedTuple):
    """A tiny checkpoint on disk, the same loaded by stock transformers, the ways to load it, and whether it has layers beyond its depth."""

    folder: Path
    model: PreTrainedModel
    loaders: list[Any]
    caches: bool
    beyond: bool


def make_parent(name: str, folder: Path) -> Parent:
    """Save a tiny model of a family (or variant), with a multi-token prediction layer where the family has one, and load it."""
    if name == "gemma3n":
        stand_in_for_timm()
    model = tiny_model(name)
    model.save_pretrained(folder)
    beyond = _add_layer_beyond(model, folder)
    loaded = _load(type(model), folder, beyond)
    assert not idle_layers(loaded)
    loaders: list[Any] = [type(model)]
    with suppress(Exception):
        same = type(_load(AutoModelForCausalLM, folder, beyond)) is type(model)
        loaders = [AutoModelForCausalLM] if same else [type(model), AutoModelForCausalLM]
    return Parent(folder, loaded, loaders, _caches(loaded), beyond)


def _add_layer_beyond(model: PreTrainedModel, folder: Path) -> bool:
    """Repeat the last layer beyond the depth, where transformers ignores such a layer as one for multi-token prediction."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if not any(re.fullmatch(r"model\\\.layers\\\.[0-9]+(\\\.)?\.\*", pattern) for pattern in ignored):
        return False
    path = folder / "model.safetensors"
    tensors = load_file(path)
    last = re.compile(rf"(.*\blayers\.){DEPTH - 1}(\..*)")
    extra = {f"{match[1]}{DEPTH}{match[2]}": tensor + 1 for name, tensor in tensors.items() if (match := last.fullmatch(name))}
    save_file({**tensors, **extra}, path, {"format": "pt"})
    return True


def as_on_hub(parent: Parent, folder: Path) -> Parent:
    """Copy a parent with a config.json that leaves out, or spells otherwise, every list that the config class derives by itself."""
    shutil.copytree(parent.folder, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    whole = _read(path, config)
    derived = False
    for section in [config, *(value for value in config.values() if isinstance(value, dict))]:
        section |= SPELLINGS.get(section.get("model_type", ""), {})
        for name in [name for name, value in section.items() if isinstance(value, list) or name == "per_layer_config"]:
            value = section.pop(name)
            if _same(_read(path, config), whole):
                derived = True
            else:
                section[name] = value
    path.write_text(json.dumps(config))
    return parent._replace(folder=folder) if derived else parent


def _read(path: Path, config: Config) -> Config:
    """Return what the config class makes of this config.json; nothing if it refuses it."""
    path.write_text(json.dumps(config))
    with suppress(Exception):
        return CONFIG_MAPPING[config["model_type"]].from_json_file(path).to_dict()
    return {}


def _same(found: Config, whole: Config) -> bool:
    """Say whether a config holds all of another; spellings may stand beside."""
    return all(
        _same(found[name], value) if isinstance(value, dict) and isinstance(found.get(name), dict) else found.get(name, ...) == value
        for name, value in whole.items()
    )


def check(parent: Parent, kept: list[int], out: Path) -> Verdict:
    """Cut a parent, load the child with stock transformers and compare it with the oracle."""
    try:
        write(keep_layers(open_checkpoint(parent.folder), kept), out)
    except DowncycleError as refusal:
        return Verdict("refused", str(refusal))
    expected = oracle(parent.model, kept)
    for loader in parent.loaders:
        try:
            model = _load(loader, out, parent.beyond)
            difference = (logits(model) - expected).abs().max().item()
            caches = _caches(model)
        except Exception as error:  # noqa: BLE001 - whatever stock transformers raises on a bad child
            return Verdict("wrong", f"{loader.__name__}: {type(error).__name__}: {error}")
        if difference != 0:
            return Verdict("wrong", f"{loader.__name__}: logits differ by {difference}")
        if parent.caches and not caches:
            return Verdict("wrong", f"{loader.__name__}: cached generation differs from uncached")
    if parent.beyond and _layer_beyond(out, len(kept)) != _layer_beyond(parent.folder, DEPTH):
        return Verdict("wrong", "the layer beyond the depth did not follow the last one")
    return Verdict("exact")


def _layer_beyond(folder: Path, number: int) -> dict[str, list[float]]:
    named = re.compile(rf".*\blayers\.{number}\.(.*)")
    tensors = load_file(folder / "model.safetensors").items()
    return {match[1]: tensor.flatten().tolist() for name, tensor in tensors if (match := named.fullmatch(name))}


def _load(loader: Any, folder: Path, beyond: bool) -> PreTrainedModel:
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    if beyond:
        depth = len(_layers(model))
        info["unexpected_keys"] = [name for name in info["unexpected_keys"] if f"layers.{depth}." not in name]
    found = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
    assert not found, found
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # aligned anew: the last bit of a product depends on where a file was mapped
    return model.eval()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return next(module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name.endswith("layers"))


def _caches(model: PreTrainedModel) -> bool:
    """Say whether this model generates, and the same with a cache as without: tokens, and logits but for the last bits."""
    with suppress(Exception):  # a family that cannot generate by itself is compared by its logits alone
        given = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long), **inputs(model)}
        cached, uncached = (_generate(model, given, use_cache) for use_cache in (True, False))
        return torch.equal(cached.sequences, uncached.sequences) and torch.allclose(
            torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-3, atol=1e-3
        )
    return False


def _generate(model: PreTrainedModel, given: Config, use_cache: bool) -> Any:
    greedy = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=use_cache)
    greedy.update(return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        return model.generate(**given, generation_config=greedy)


def verdicts(parent: Parent, folder: Path) -> list[Verdict]:
    """Return the verdict of each cut of a family (or variant): the same whether or not its config leaves things to its class."""
    results = [check(parent, kept, folder / f"out-{cut}") for cut, kept in CUTS.items()]
    hub = as_on_hub(parent, folder / "hub")
    if hub is not parent:
        for at, (cut, kept) in enumerate(CUTS.items()):
            again = check(hub, kept, folder / f"hub-{cut}")
            if again.status != results[at].status:
                results[at] = Verdict("wrong", f"{results[at]}, but {again} where the config leaves out what its class derives")
    return results


# The table.


def read_table() -> dict[str, list[str]]:
    """Return the statuses that FAMILIES.md gives, by family."""
    rows = (line.split("|") for line in TABLE.read_text().splitlines() if line.startswith("| `"))
    return {row[1].strip().strip("`"): [cell.strip() for cell in row[3 : 3 + len(CUTS)]] for row in rows}


def make_table() -> str:
    """Return the whole of FAMILIES.md, and show progress on stderr."""
    rows, counts = [], Counter()
    for name in [*FAMILIES, *VARIANTS]:
        print(name, file=sys.stderr)
        results, note = _results(name)
        family = VARIANTS.get(name, (name, {}))[0]
        if name == family:
            counts.update(zip(CUTS, (result.status for result in results), strict=True))
        reasons = "; ".join(dict.fromkeys(filter(None, [*(result.reason for result in results), note]))).replace("|", "/")
        rows.append(" | ".join([f"| `{name}`", FAMILIES[family], *(result.status for result in results), f"{reasons} |"]))
    totals = (", ".join(f"{counts[cut, status]} {status}" for status in ("exact", "refused", "not built")) for cut in CUTS)
    by_cut = "\n".join(f"Layers kept of 0-7: {cut}. Families: {total}.  " for cut, total in zip(CUTS, totals, strict=True))
    return HEADER.format(version=transformers.__version__, count=len(FAMILIES), by_cut=by_cut) + "\n".join(rows) + "\n"


def _results(name: str) -> tuple[list[Verdict], str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            parent = make_parent(name, Path(folder) / "parent")
        except Exception as error:  # noqa: BLE001
            said = " ".join(str(error).split())[:160]
            return [Verdict("not built")] * len(CUTS), f"transformers {transformers.__version__} cannot make this model: {said}"
        return verdicts(parent, Path(folder)), "" if parent.caches else NO_CACHE


NO_CACHE = "compared without a cache: with one, transformers generates other tokens from the parent itself, or none"
HEADER = """\
# Every causal-LM family of transformers, and what a cut makes of it

Generated by `python tests/families.py --write` with transformers {version}; do not edit. `tests/surgery/test_families.py` proves
it again for the families that the installed transformers has.

Of each of the {count} families a random model of 8 small layers is saved, cut in three ways, loaded by stock transformers and compared
with the parent run in memory without its dropped layers.

- **exact**: the logits differ by 0 in float32, and generation with a cache gives the same tokens as without.
- **refused**: an error names what stands in the way, and nothing is written. Another choice of layers may be exact.
- There is no third outcome. The verdict is the same when config.json leaves out all that its class derives from the depth.

{by_cut}

| model type | class | the first 6 | 0, 1, 4, 5, 7 | 2, 3, 4, 6 | what stands in the way |
|-|-|-|-|-|-|
"""


def main() -> None:
    """Print the verdicts of some families, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families or variants; all if none is named")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.write:
        TABLE.write_text(make_table())
        return
    for name in options.names or [*FAMILIES, *VARIANTS]:
        with tempfile.TemporaryDirectory() as folder:
            parent = make_parent(name, Path(folder) / "parent")
            print(name, *(f"{result.status} {result.reason}".strip() for result in verdicts(parent, Path(folder))), sep="\n    ")


if __name__ == "__main__":
    main()
