"""A loaded model is the one that stock libraries load so; what is too large is refused with figures, or runs from its file."""

import json
import math
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from downcycle import DowncycleError, keep_layers, load_model, open_checkpoint  # noqa: E402
from downcycle.eval.measure.loading import LOADS, find_device, load, load_tokenizer, needed_bytes  # noqa: E402
from downcycle.eval.measure.memory import free_memory  # noqa: E402
from downcycle.recipes.memory import GIB  # noqa: E402

from hub_server import connected  # noqa: E402

TOKENS = torch.arange(100, 150)[None]


def logits(model) -> "torch.Tensor":
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(DowncycleError) as refused:
        call(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes(tiny, stored):
    """As stored, whatever the config says of it; or as asked."""
    checkpoint = open_checkpoint(tiny(dtype=stored))
    checkpoint = replace(checkpoint, config={**checkpoint.config, "dtype": "float64"})
    loaded = load(checkpoint, device="cpu")
    assert str(loaded.model.dtype) == f"torch.{stored}"
    assert (loaded.load, str(loaded.device), loaded.checkpoint) == ("stored", "cpu", checkpoint)
    assert not loaded.model.training
    for how, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found = load(checkpoint, how, device="cpu").model
        expected = AutoModelForCausalLM.from_pretrained(tiny(dtype=stored), dtype=dtype)
        assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_bitsandbytes(how):
    """The built-in model: its matrices are wide enough to be quantised in blocks."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_8bit=True) if how == "int8" else BitsAndBytesConfig(load_in_4bit=True, **nf4)
    checkpoint = open_checkpoint("demo")
    folder = next(iter(checkpoint.tensors.values())).data.source.folder
    expected = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    found = load(checkpoint, how, device="cpu").model
    assert isinstance(found.model.layers[3].mlp.up_proj, Linear8bitLt if how == "int8" else Linear4bit)
    assert torch.equal(logits(found), logits(expected))
    assert not torch.equal(logits(found), logits(load(checkpoint, device="cpu").model))


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantised_checkpoint_is_loaded_as_it_is(tiny, tmp_path, copy, how):
    pytest.importorskip("bitsandbytes")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**{"load_in_8bit": True} if how == "int8" else nf4)
    folder = copy(tiny(dtype="bfloat16", hidden_size=64, intermediate_size=128))
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(load(checkpoint, device="cpu").model), logits(expected))
    for other in LOADS[1:]:
        said = refusal(load, checkpoint, other, device="cpu")
        assert said == f"--load {other}: the weights of {folder} are packed by bitsandbytes already; leave --load out"


def ternary(folder) -> dict[str, "torch.Tensor"]:
    """Pack the matrices of a model's layers as transformers' bitnet has them; return its weights with what the packed ones stand for."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        dense[name] = weight
        if "_proj" in name:
            scale = weight.abs().mean().clamp(min=1e-5)
            codes = (weight / scale).round().clamp(-1, 1)
            dense[name] = codes * scale
            rows = (codes + 1).to(torch.uint8).view(4, -1, weight.shape[1])
            tensors[name] = rows[0] | rows[1] << 2 | rows[2] << 4 | rows[3] << 6
            tensors[name.replace("weight", "weight_scale")] = (1 / scale).reshape(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def rounded(module, given):
    """What BitLinear makes of its input: 8 bits for each token."""
    scale = 127 / given[0].abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return ((given[0] * scale).round().clamp(-128, 127) / scale,)


def test_packed_ternary(tiny, copy, tmp_path, monkeypatch):
    """Without a compiler: the dense model with the weights that the codes stand for, each input of theirs rounded to 8 bits."""
    for name, value in {"PATH": "/nowhere", "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}.items():
        monkeypatch.setenv(name, value)
    folder = copy(tiny())
    dense = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    dense.load_state_dict(ternary(folder))
    for name, module in dense.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
    checkpoint = open_checkpoint(folder)
    found, expected = logits(load(checkpoint, device="cpu").model), logits(dense)
    # An input that lies between two of the 256 steps may fall on either side.
    assert (found - expected).abs().median() < 1e-3 * expected.abs().mean()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
    assert "packed by bitnet already" in refusal(load, checkpoint, "bf16")


def huge(folder, gib: int):
    """A Llama whose file says that it is so large, nearly all of it one matrix, and takes no room: a hole."""
    folder.mkdir()
    rows = gib * GIB // 2 // 64
    shapes = {"model.embed_tokens.weight": [8, 64], "lm_head.weight": [8, 64], "model.norm.weight": [64]}
    shapes |= {f"model.layers.0.self_attn.{part}_proj.weight": [64, 64] for part in "qkvo"}
    header, size = {}, 0
    for name, shape in (shapes | {"model.layers.0.mlp.up_proj.weight": [rows, 64]}).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size := size + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def test_too_large(tmp_path):
    """The figure that is needed, the one that is there, and what would fit; nothing of the file is read."""
    free = free_memory("cpu") / GIB
    gib = int(free * 1.4) + 1
    checkpoint = huge(tmp_path / "huge", gib)
    said = refusal(load, checkpoint, device="cpu")
    figures = re.fullmatch(rf"{tmp_path}/huge: needs about (\S+) GiB as stored, and cpu has (\S+) GiB free; what would fit: (.*)", said)
    assert float(figures[1]) == pytest.approx(gib * 1.05 + 0.5, rel=0.01)
    assert float(figures[2]) == pytest.approx(free, rel=0.3)
    assert re.fullmatch(r"--load int8 \(.* GiB\), or --load nf4 \(.* GiB\), or --offload", figures[3])
    said = refusal(load, checkpoint, "fp32", device="cpu")
    assert float(re.search("about ([0-9.]+) GiB as fp32", said)[1]) == pytest.approx(2.1 * gib + 0.5, rel=0.01)


def test_too_large_for_anything_but_its_file(tmp_path):
    checkpoint = huge(tmp_path / "huge", int(free_memory("cpu") / GIB * 6) + 1)
    assert refusal(load, checkpoint, device="cpu").endswith("; what would fit: --offload")
    pytest.importorskip("bitsandbytes")
    said = refusal(load, checkpoint, "nf4", device="cpu", offload=True)
    assert said.endswith(
        "; --offload cannot help: bitsandbytes' nf4 must lie in the device's memory; it needs a machine with more memory, or fewer layers"
    )


OFFLOADED = """
import sys
import torch
from downcycle import open_checkpoint
from downcycle.eval.measure import loading

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

loading.load(open_checkpoint("demo"))
for folder, how, free, out in zip(*[iter(sys.argv[1:])] * 4):
    loading.free_memory = lambda device: int(free)
    before = anonymous()
    loaded = loading.load(open_checkpoint(folder), how, device="cpu", offload=True)
    most = anonymous()
    with torch.inference_mode():
        for layer in loaded.model.model.layers:
            layer.register_forward_hook(lambda *given: globals().update(most=max(most, anonymous())))
        logits = loaded.model(torch.arange(100, 150)[None], use_cache=False).logits.float()
    print(most - before, loaded.model.dtype, len(list(loading.cache_folder().glob("offload-*/*"))) > 0, flush=True)
    torch.save(logits, out)
    del loaded, layer
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_offload_keeps_memory_small(tiny, tmp_path, cache):
    """With a third of the weights' memory: mapped where their bytes are used as they are, else from a converted copy on the disk."""
    llama = tiny(dtype="bfloat16", hidden_size=256, intermediate_size=3072, num_hidden_layers=12)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 4}  # all of them: kernels of one shape
    mixtral = tiny("MixtralConfig", dtype="bfloat16", hidden_size=256, intermediate_size=512, num_hidden_layers=28, **experts)
    cases, arguments = [(llama, "stored", False), (llama, "fp32", True), (mixtral, "stored", True)], []
    sizes = [open_checkpoint(folder).nbytes * (2 if how == "fp32" else 1) for folder, how, _ in cases]
    for place, (folder, how, _) in enumerate(cases):
        arguments += [folder, how, sizes[place] // 3 + GIB // 2, tmp_path / f"logits{place}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    run = subprocess.run([sys.executable, "-c", OFFLOADED, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for place, (line, (folder, how, from_disk)) in enumerate(zip(run.stdout.splitlines(), cases, strict=True)):
        used, dtype, on_disk = line.split()
        assert int(used) < sizes[place] * (0.6 if from_disk else 0.3), (line, sizes)
        assert (dtype, on_disk) == ("torch.float32" if how == "fp32" else "torch.bfloat16", str(from_disk))
        expected = load_model(open_checkpoint(folder), dtype=getattr(torch, dtype.removeprefix("torch.")))
        assert torch.allclose(torch.load(tmp_path / f"logits{place}"), logits(expected), rtol=1e-5, atol=1e-4)
    assert not list(cache.glob("offload-*"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with connected(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_from_the_hub(tiny, copy, hub):
    """Files that a checkpoint uses are fetched once, at its commit; others never, and a second time nothing is."""
    folder = copy(tiny(num_hidden_layers=8))
    (folder / "README.md").write_text("much to read")
    (folder / "optimizer.pt").write_bytes(b"0" * 1000)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    commit = hub.add("ann/tiny", folder)
    child = keep_layers(open_checkpoint("ann/tiny"), [0, 2])
    needed = {tensor.data.path for tensor in child.tensors.values()}
    assert needed < set(shards)
    found = logits(load(child, device="cpu").model)
    assert torch.equal(found, logits(load_model(keep_layers(open_checkpoint(folder), [0, 2]))))
    whole = [request for request in hub.asked() if request.method == "GET" and not request.range and "/resolve/" in request.path]
    assert all(f"/resolve/{commit}/" in request.path for request in whole)
    assert not hub.asked("*README.md") and not hub.asked("*optimizer.pt")
    for name in set(shards) - needed:
        assert not [request for request in hub.asked(f"*{name}") if not request.range]
    before = hub.sent("*/resolve/*") + hub.sent("/cdn/*")
    again = keep_layers(open_checkpoint("ann/tiny", commit), [0, 2])
    headers = hub.sent("*/resolve/*") + hub.sent("/cdn/*") - before
    assert torch.equal(logits(load(again, device="cpu").model), found)
    assert hub.sent("*/resolve/*") + hub.sent("/cdn/*") - before == headers


def test_the_hub_fails(tiny, hub):
    hub.add("ann/tiny", tiny())
    checkpoint = open_checkpoint("ann/tiny")
    hub.fail("*/resolve/*", status=403)
    assert "ann/tiny" in refusal(load, checkpoint, device="cpu")


def test_tokenizers(tiny, copy):
    found = load_tokenizer(open_checkpoint(tiny()))
    assert found("A tale.")["input_ids"][0] == found.bos_token_id == 4080
    folder = copy(tiny())
    (folder / "tokenizer.json").write_text('{"broken": ')
    said = refusal(load_tokenizer, open_checkpoint(folder))
    assert said.startswith(f"{folder}: its tokenizer: cannot be loaded (") and "fetch its files again" in said
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer (tokenizer.json, " in refusal(load, open_checkpoint(folder))


def test_devices():
    assert find_device("cpu") == "cpu"
    assert find_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    for device in ("cuda:99", "tpu", "cuda:x", ""):
        assert f"device {device}: not there; this machine has cpu and " in refusal(find_device, device)


def test_needs_grow_with_the_dtype(tiny):
    checkpoint = open_checkpoint("demo")
    sizes = [needed_bytes(checkpoint, how) for how in ("nf4", "int8", "bf16", "fp32")]
    assert sizes == sorted(sizes)
    assert needed_bytes(checkpoint, "stored") == sizes[2]
    assert sizes[3] - sizes[2] == pytest.approx(checkpoint.nbytes * 1.05)
    assert sizes[2] == pytest.approx(checkpoint.nbytes * 1.05 + GIB / 2 + 4096 * 2048 * 6)
