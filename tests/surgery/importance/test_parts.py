"""A model in parts gives what the whole model gives, however it is stored and loaded; what cannot be taken apart is refused in one line."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from downcycle import DowncycleError, keep_layers, load_model, open_checkpoint, write  # noqa: E402
from downcycle.surgery.checkpoint import Tensor  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, run_paths  # noqa: E402
from downcycle.surgery.importance.pruned import find_stack  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402

from hub_server import connected  # noqa: E402
from tiny_models import DEPTH, stand_in_for_timm, tiny_model  # noqa: E402

IDS = torch.randint(10, 60, (2, 11), generator=torch.Generator().manual_seed(4))
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def through(parts, ids=IDS, depth=DEPTH):
    """Run all layers, and return what each returned, and the logits."""
    state, hidden = None, []
    with torch.inference_mode():
        for number in range(depth):
            state = parts.step(parts.layer(number), number, ids, state)
            hidden.append(state.hidden)
        return hidden, parts.logits(ids, state)


def outputs(model, ids=IDS, depth=DEPTH):
    """The oracle: the same of a whole model, by hooks."""
    hidden = []
    hooks = [
        layer.register_forward_hook(
            lambda module, given, output: hidden.append((output[0] if isinstance(output, tuple) else output).clone())
        )
        for layer in model.get_submodule(find_stack(model, depth))
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return hidden, logits


def agree(checkpoint, model, ids=IDS, depth=DEPTH, tolerance=0.0, **options):
    """Compare a checkpoint in parts with a whole model."""
    for got, wanted in zip(
        [*(found := through(Parts(checkpoint, **options), ids, depth))[0], found[1]],
        [*(known := outputs(model, ids, depth))[0], known[1]],
        strict=True,
    ):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 2), (1, 13), (3, 13), (4, 2), (1, 1)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "zamba2", "mixtral"])
def test_every_shape_of_a_batch(tiny, whole, family, shape):
    ids = torch.randint(10, 60, shape, generator=torch.Generator().manual_seed(5))
    agree(open_checkpoint(tiny(family)), whole(tiny(family)).model, ids, tolerance=1e-5)


@pytest.mark.parametrize("columns", [[0], [3, 4, 9], [10]])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_logits_of_some_columns(tiny, family, columns):
    parts = Parts(open_checkpoint(tiny(family)))
    with torch.inference_mode():
        state = None
        for number in range(DEPTH):
            state = parts.step(parts.layer(number), number, IDS, state)
        torch.testing.assert_close(parts.logits(IDS, state, torch.tensor(columns)), parts.logits(IDS, state)[:, columns])


# How a model is stored and loaded.


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("held", ["bfloat16", "float16", "float32"])
def test_dtypes(tiny, stored, held):
    folder = tiny("llama", stored)
    agree(open_checkpoint(folder), load_model(open_checkpoint(folder), dtype=getattr(torch, held)), dtype=getattr(torch, held))


def test_the_stored_dtype_is_kept_where_none_is_asked_for(tiny):
    folder = tiny("llama", "bfloat16")
    agree(open_checkpoint(folder), load_model(open_checkpoint(folder), dtype=torch.bfloat16))


def test_tied_embeddings_in_several_files(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_model("llama").config.to_diff_dict(), "tie_word_embeddings": True})).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3 and "lm_head.weight" not in open_checkpoint(tmp_path).tensors
    agree(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize("family", ["llama", "mixtral", "glm4_moe"])
def test_a_cut_that_was_never_written(tiny, tmp_path, family):
    child = keep_layers(open_checkpoint(tiny(family)), [0, 2, 3, 7])
    agree(child, AutoModelForCausalLM.from_pretrained(write(child, tmp_path / "child"), dtype=torch.float32), depth=4, tolerance=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_cut_of_computed_tensors(tmp_path):
    """Gemma 3n holds some tensors of all layers in one, which a cut computes anew."""
    stand_in_for_timm()
    model = tiny_model("gemma3n")
    model.save_pretrained(tmp_path / "parent")
    child = keep_layers(open_checkpoint(tmp_path / "parent"), [0, 1, 2, 3, 4, 5])
    assert any(not hasattr(tensor.data, "source") for tensor in child.tensors.values())
    whole_child = type(model).from_pretrained(write(child, tmp_path / "child")).eval()
    agree(child, whole_child, depth=6, tolerance=1e-5)


def test_a_computed_weight_of_a_layer_and_of_the_rest(tiny):
    checkpoint = open_checkpoint(tiny())
    changed = {}
    for name in ("model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight"):
        known = checkpoint.tensors[name]
        twice = (torch.frombuffer(bytearray().join(known.chunks()), dtype=torch.float32) * 2).numpy().tobytes()
        changed[name] = Tensor(known.dtype, known.shape, lambda twice=twice: [twice])
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **changed})
    agree(checkpoint, load_model(checkpoint))


def test_a_merged_adapter_that_was_never_written(tmp_path):
    pytest.importorskip("peft")
    import tiny_adapters

    from downcycle import merge_adapter

    base, adapter = tiny_adapters.make(tmp_path, "llama", target_modules=["q_proj", "down_proj", "lm_head"])
    merged = merge_adapter(open_checkpoint(base), adapter)
    agree(merged, AutoModelForCausalLM.from_pretrained(write(merged, tmp_path / "merged"), dtype=torch.float32))


@pytest.mark.parametrize("held", ["stored", "bf16"])
def test_a_repo_on_the_hub(tiny, tmp_path, monkeypatch, held):
    """Its files are fetched whole, once; then layers are read from the local cache."""
    from downcycle.eval.measure.loading import fetch, load_options

    monkeypatch.setenv("DOWNCYCLE_CACHE", str(tmp_path / "cache"))
    with connected(monkeypatch, tmp_path / "hub") as hub:
        hub.add("ann/tiny", tiny())
        checkpoint = open_checkpoint("ann/tiny")
        fetch(checkpoint)
        before = len(hub.asked())
        local = open_checkpoint(tiny())
        options = load_options(local, held, "cpu")
        agree(checkpoint, load_model(local, **options), **options)
        assert len(hub.asked()) == before


# Packed weights.


WIDE = {"num_hidden_layers": 4, "vocab_size": 64, "num_attention_heads": 4, "hidden_size": 64, "ffn_dim": 128, "intermediate_size": 128}


@pytest.fixture(scope="module", params=["LlamaConfig", "OPTConfig"])
def wide(request, tmp_path_factory):
    """Models wide enough for NF4, whose blocks are 64 numbers."""
    config = getattr(transformers, request.param)(**WIDE, word_embed_proj_dim=64)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def packed(model, start=""):
    return {start + name for name, weight in model.named_parameters() if hasattr(weight, "quant_state")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nf4_with_double_quantisation(wide, dtype, caplog):
    """What stays unpacked, such as the head, is the same in the parts as in the whole."""
    pytest.importorskip("bitsandbytes")
    options = {"quantization_config": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16), "dtype": getattr(torch, dtype)}
    model = AutoModelForCausalLM.from_pretrained(wide, **options)
    caplog.clear()
    parts = Parts(open_checkpoint(wide), **options)
    own = set().union(*(packed(parts.layer(number), f"{parts.frame.stack_name}.{number}.") for number in range(4)))
    assert own == packed(model) and len(own) >= 6 * 4
    assert not packed(parts.frame)
    agree(open_checkpoint(wide), model, depth=4, **options)
    assert not caplog.records


@pytest.mark.parametrize("quantizer", [NF4, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_a_checkpoint_that_is_packed_already(wide, tmp_path, quantizer):
    pytest.importorskip("bitsandbytes")
    quantised = AutoModelForCausalLM.from_pretrained(wide, quantization_config=BitsAndBytesConfig(**quantizer), dtype=torch.float32)
    quantised.save_pretrained(tmp_path)
    assert any("absmax" in name or "SCB" in name for name in open_checkpoint(tmp_path).tensors)
    agree(open_checkpoint(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), depth=4, dtype="auto")
    child = keep_layers(open_checkpoint(tmp_path), [0, 3])
    agree(child, load_model(child, dtype="auto"), depth=2, dtype="auto")


# What is read, and what stays in memory.


def test_resident_layers_are_loaded_once_and_give_the_same(tiny, batches, tmp_path):
    checkpoint = open_checkpoint(tiny("gemma3_text"))
    paths = [WHOLE, frozenset({2}), frozenset({2, 5})]
    runs = []
    for resident in (False, True):
        parts = Parts(checkpoint, resident=resident)
        runs += [run_paths(parts, batches, paths, States(tmp_path / f"{resident}{again}")) for again in range(2)]
        assert parts.loads == (DEPTH if resident else 2 * DEPTH)
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("family", ["llama", "zamba2", "mixtral", "opt"])
def test_a_layer_goes_when_its_turn_is_over(tiny, batches, tmp_path, monkeypatch, family):
    """By counting references alone: what waits for the collector of cycles would add up."""
    parts, alive, most = Parts(open_checkpoint(tiny(family))), weakref.WeakSet(), []
    load = Parts.layer

    def watched(self, number):
        layer = load(self, number)
        alive.add(layer)
        most.append(len(alive))
        return layer

    monkeypatch.setattr(Parts, "layer", watched)
    gc.collect()
    gc.disable()
    try:
        run_paths(parts, batches, [WHOLE, frozenset({0, 1}), frozenset({4})], States(tmp_path / "states"))
        frame = weakref.ref(parts.frame)
        parts.release()
        assert frame() is None
    finally:
        gc.enable()
    assert len(most) >= DEPTH and max(most) <= 2 and not alive


def test_a_layer_holds_its_own_weights_and_no_others(tiny):
    parts = Parts(open_checkpoint(tiny()))
    sizes = {name: tensor for name, tensor in load_file(tiny() / "model.safetensors").items() if ".layers.5." in name}
    held = {f"model.layers.5.{name}": weight for name, weight in parts.layer(5).named_parameters()}
    assert {name: weight.tolist() for name, weight in held.items()} == {name: weight.tolist() for name, weight in sizes.items()}
    rest = {name for name, weight in parts.frame.named_parameters() if not weight.is_meta}
    assert rest == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_files_stay_as_they_are(tiny, tmp_path):
    shutil.copytree(tiny(), tmp_path / "copy")
    before = (tmp_path / "copy" / "model.safetensors").read_bytes()
    with torch.no_grad():
        for weight in Parts(open_checkpoint(tmp_path / "copy")).layer(0).parameters():
            weight.zero_()
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == before


# Numbers that are not finite.


def spoiled(folder, target, name, number, dtype=torch.float32):
    shutil.copytree(folder, target)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(target / "model.safetensors").items()}
    tensors[name].view(-1)[number] = {torch.float32: float("nan")}.get(dtype, 6e4)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return open_checkpoint(target)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "model.layers.3.mlp.up_proj.weight",
            "the output of layer 3 is not finite, as its weight mlp.up_proj.weight holds NaN or infinity",
        ),
        ("model.layers.0.input_layernorm.weight", "the output of layer 0 is not finite, as its weight input_layernorm.weight holds"),
        ("model.embed_tokens.weight", "the output of the embeddings is not finite, as its weight model.embed_tokens.weight holds"),
        ("model.norm.weight", "the output of the final norm or the head is not finite, as its weight model.norm.weight holds"),
        ("lm_head.weight", "the output of the final norm or the head is not finite, as its weight lm_head.weight holds"),
    ],
)
def test_nan_in_a_weight_is_named(tiny, batches, tmp_path, name, says):
    place = int(batches[0].ids[0, 0]) * 32 + 1 if "embed" in name else 5
    checkpoint = spoiled(tiny(), tmp_path / "m", name, place)
    with pytest.raises(DowncycleError, match=f"m: {says}") as refusal:
        run_paths(Parts(checkpoint), batches, [WHOLE], States(tmp_path / "states"))
    assert "\n" not in str(refusal.value)


def test_nan_in_a_layer_that_a_path_drops_is_no_matter(tiny, whole, batches, tmp_path):
    checkpoint = spoiled(tiny(), tmp_path / "m", "model.layers.3.mlp.up_proj.weight", 5)
    path = frozenset({3})
    found = run_paths(Parts(checkpoint), batches, [path], States(tmp_path / "states"))
    assert [one.nats for one in found[path]] == pytest.approx([nats for nats, *_ in whole(tiny()).losses(batches, path)], rel=1e-5)


def test_overflow_in_float16_is_told_from_a_bad_weight(tiny, batches, tmp_path):
    shutil.copytree(tiny(), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 3e4
    tensors["model.layers.2.mlp.up_proj.weight"] *= 3e4
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(
        DowncycleError, match="the output of layer 2 is not finite: numbers grow beyond what float16 holds; try --load bf16"
    ):
        run_paths(Parts(checkpoint, dtype=torch.float16), batches, [WHOLE], States(tmp_path / "states"))
    run_paths(Parts(checkpoint, dtype=torch.float32), batches, [WHOLE], States(tmp_path / "wide"))


# What cannot be taken apart.


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_that_comes_with_a_model_is_not_run(tiny, tmp_path):
    shutil.copytree(tiny(), tmp_path / "m")
    edit(tmp_path / "m", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (tmp_path / "m" / "modeling_mine.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(
        DowncycleError, match="m: cannot be run layer by layer, as its Python code, which comes with it, is not run; choose"
    ):
        Parts(open_checkpoint(tmp_path / "m", trust_remote_code=True))


def test_code_is_not_needed_where_transformers_has_the_family(tiny, tmp_path):
    shutil.copytree(tiny(), tmp_path / "m")
    edit(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    agree(open_checkpoint(tmp_path / "m", trust_remote_code=True), AutoModelForCausalLM.from_pretrained(tiny()))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_with_a_decoder_is_refused(tmp_path, family):
    sizes = {"d_model": 16, "vocab_size": 40, "decoder_start_token_id": 0}
    if family == "t5":
        config = transformers.T5Config(**sizes, d_ff=32, d_kv=8, num_heads=2, num_layers=3)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    else:
        layers = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = transformers.BartConfig(**sizes, **layers, encoder_ffn_dim=32, decoder_ffn_dim=32)
        transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(DowncycleError, match="as it is an encoder with a decoder, and does not run on text alone; choose with") as refusal:
        Parts(open_checkpoint(tmp_path))
    assert "\n" not in str(refusal.value)


def test_an_adapter_is_refused(tmp_path):
    pytest.importorskip("peft")
    import tiny_adapters

    _, adapter = tiny_adapters.make(tmp_path, "llama", target_modules=["q_proj"])
    with pytest.raises(DowncycleError, match="adapter") as refusal:
        Parts(open_checkpoint(adapter))
    assert "\n" not in str(refusal.value)


def test_weights_that_are_missing_are_not_made_up(tiny, batches, tmp_path):
    checkpoint = open_checkpoint(tiny())
    less = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "model.layers.4.mlp.up_proj.weight"}
    with pytest.raises(DowncycleError, match=r"lacks model.layers.4.mlp.up_proj.weight, which a LlamaForCausalLM needs"):
        run_paths(Parts(replace(checkpoint, tensors=less)), batches, [WHOLE], States(tmp_path / "states"))
    less = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "model.norm.weight"}
    with pytest.raises(DowncycleError, match=r"lacks model.norm.weight, which a LlamaForCausalLM needs"):
        run_paths(Parts(replace(checkpoint, tensors=less)), batches, [WHOLE], States(tmp_path / "other"))
