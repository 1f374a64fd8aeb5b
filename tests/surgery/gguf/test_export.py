"""Whole files: what a reader finds in them, what llama.cpp and transformers compute with them, and that none is ever half made."""

import json
import shutil
import struct

import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
pytest.importorskip("xllamacpp")

import numpy as np  # noqa: E402

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.errors import DowncycleError  # noqa: E402
from downcycle.surgery.gguf import export  # noqa: E402
from downcycle.surgery.gguf.check import check_gguf  # noqa: E402
from downcycle.surgery.gguf.export import plan_gguf, write_gguf  # noqa: E402
from downcycle.surgery.header import DTYPE_BITS  # noqa: E402
from downcycle.surgery.staging import staging_path  # noqa: E402
from downcycle.surgery.ternary.ternarize import ternarize  # noqa: E402

import llama_cpp  # noqa: E402

PROMPT = list(range(100, 140))
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NEW_NAMES = {
    **dict(zip(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), MATRICES, strict=True)),
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def numbers_of(tensor):
    return gguf.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))


def renamed(name):
    """The oracle of names, spelled for Llamas."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, *_, part, _ = name.split(".")
    return f"blk.{layer}.{NEW_NAMES[part]}.weight"


def turned(values, name, heads):
    """The oracle of rows: in each head, the two halves that transformers turns together become neighbours."""
    count = heads["q" if "attn_q" in name else "k"] if "attn_q" in name or "attn_k" in name else 0
    if not count:
        return values
    size = len(values) // count
    order = [head * size + half * size // 2 + pair for head in range(count) for pair in range(size // 2) for half in range(2)]
    return values[order]


def by_hand(folder):
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    stored = {renamed(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    return {name: turned(tensor.float().numpy(), name, heads) for name, tensor in stored.items()}


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_floats_are_what_they_were(kind, wide, tmp_path):
    written = write_gguf(open_checkpoint(wide["float"]), tmp_path / "model.gguf", kind)
    found, expected = tensors_of(written.path), by_hand(wide["float"])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        stored = (
            values if kind == "f32" or values.ndim == 1 else torch.tensor(values).to(torch.bfloat16 if kind == "bf16" else torch.float16)
        )
        assert found[name].tensor_type.name == ("F32" if values.ndim == 1 else kind.upper())
        assert np.array_equal(numbers_of(found[name]), stored if kind == "f32" or values.ndim == 1 else stored.float().numpy())
    assert bool(written.notes) == (kind == "f16")  # bf16 was in the file
    assert written.nbytes == written.path.stat().st_size
    assert written.kinds == ({"f32": 21} if kind == "f32" else {kind: 16, "f32": 5})


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "f32"])
def test_ternary_weights_of_both_conventions(kind, linear, wide, tmp_path):
    path = tmp_path / "model.gguf"
    written = write_gguf(open_checkpoint(wide[linear]), path, kind)
    found, latent = tensors_of(path), by_hand(wide["float"])
    for name, values in latent.items():
        got = numbers_of(found[name])
        if any(f".{part}." in name for part in MATRICES):
            scale = np.float32(np.abs(values.astype(np.float64)).mean())
            codes = np.clip(np.round(values / scale), -1, 1)
            assert found[name].tensor_type.name == kind.upper()
            assert np.array_equal(np.sign(got), codes)
            assert np.abs(np.abs(got[codes != 0]) / scale - 1).max() < (2**-11 if kind != "f32" else 1e-6)
        elif values.ndim > 1 and kind != "f32":
            assert np.array_equal(got, values.astype(np.float16).astype(np.float32))
        else:
            assert np.array_equal(got, values)
    assert written.kinds == ({"f32": 21} if kind == "f32" else {kind: 14, "f16": 2, "f32": 5})


def test_all_programs_agree_on_a_ternary_model(wide, scores, tmp_path, monkeypatch, quiet):
    """Within what 8-bit activations change: stock transformers rounds them by token, llama.cpp by block, floats not at all."""
    from transformers import AutoModelForCausalLM as Model

    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    kinds = ("tq2_0", "tq1_0", "f32")
    for kind in kinds:
        write_gguf(open_checkpoint(wide["bitlinear"]), tmp_path / f"{kind}.gguf", kind)
    (stock,) = scores(Model.from_pretrained(wide["bitlinear"], dtype=torch.float32).eval(), [PROMPT])
    loaded = {kind: Model.from_pretrained(tmp_path, gguf_file=f"{kind}.gguf", dtype=torch.float32).eval() for kind in ("tq2_0", "f32")}
    floats = {kind: scores(model, [PROMPT])[0] for kind, model in loaded.items()}
    native = {kind: np.array(llama_cpp.run(tmp_path / f"{kind}.gguf", [PROMPT], 4096)["scores"][0]) for kind in kinds}
    spread = stock.std()
    assert np.abs(native["f32"] - floats["f32"]).max() < 1e-3 * spread
    assert np.abs(floats["tq2_0"] - floats["f32"]).max() < 0.02 * spread  # the scale in float16
    for kind in ("tq2_0", "tq1_0"):
        assert np.abs(native[kind] - stock).max() < 0.2 * spread
        assert native[kind].argmax() == stock.argmax()
    assert np.array_equal(native["tq2_0"], native["tq1_0"])


def test_weights_that_are_ternary_in_floats_give_the_same_file(wide, tmp_path, quiet):
    from transformers import AutoModelForCausalLM as Model

    write_gguf(open_checkpoint(wide["autobitlinear"]), tmp_path / "f32.gguf", "f32")
    write_gguf(open_checkpoint(wide["autobitlinear"]), tmp_path / "packed.gguf", "tq2_0")
    Model.from_pretrained(tmp_path, gguf_file="f32.gguf", dtype=torch.float32).save_pretrained(tmp_path / "floats")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "floats" / name).write_bytes((wide["float"] / name).read_bytes())
    write_gguf(open_checkpoint(tmp_path / "floats"), tmp_path / "floats.gguf", "tq2_0")
    first, second = tensors_of(tmp_path / "packed.gguf"), tensors_of(tmp_path / "floats.gguf")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name].data, second[name].data) for name in first)


def test_a_value_that_was_never_written_is_exported(wide, tmp_path):
    source = open_checkpoint(wide["float"])
    write_gguf(ternarize(source), tmp_path / "value.gguf", "tq2_0")
    write_gguf(open_checkpoint(wide["bitlinear"]), tmp_path / "file.gguf", "tq2_0")
    first, second = tensors_of(tmp_path / "value.gguf"), tensors_of(tmp_path / "file.gguf")
    assert all(np.array_equal(first[name].data, second[name].data) for name in first)


def spelled_places(path):
    """Read the places and types of tensors from the header by hand, since no reader knows I2_S."""
    data = path.read_bytes()
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    place = 24

    def take(form):
        nonlocal place
        (value,) = struct.unpack_from("<" + form, data, place)
        place += struct.calcsize(form)
        return value

    def text():
        nonlocal place
        size = take("Q")
        place += size
        return data[place - size : place].decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take({0: "B", 1: "b", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}[kind])

    fields = {text(): value(take("I")) for _ in range(keys)}
    found = {}
    for _ in range(tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))]
        found[name] = (shape, take("I"), take("Q"))
    start = (place + 31) // 32 * 32
    return fields, {name: (shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}, data


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
def test_i2_s_lies_as_bitnet_cpp_documents_it(linear, wide, tmp_path):
    path = write_gguf(open_checkpoint(wide[linear]), tmp_path / "model.gguf", "i2_s").path
    fields, found, data = spelled_places(path)
    assert (fields["general.architecture"], fields["general.file_type"]) == ("llama", 40)
    for name, values in by_hand(wide["float"]).items():
        shape, kind, place = found[name]
        assert shape == list(reversed(values.shape))
        if not any(f".{part}." in name for part in MATRICES):
            assert kind == (0 if values.ndim == 1 else 1)
            continue
        assert kind == 36
        scale = np.float32(np.abs(values.astype(np.float64)).mean())
        codes = (np.clip(np.round(values / scale), -1, 1) + 1).astype(np.uint8).reshape(-1, 4, 32)
        expected = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
        assert data[place : place + values.size // 4] == expected.tobytes()
        (stored,) = struct.unpack_from("<f", data, place + values.size // 4)
        assert abs(stored / scale - 1) < 1e-6
        assert data[place + values.size // 4 + 4 : place + values.size // 4 + 32] == bytes(28)


def test_narrow_matrices_stay_f16_and_llama_cpp_runs_them(saved, tmp_path, quiet):
    _, folder = saved("llama", hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    path = tmp_path / "model.gguf"
    written = write_gguf(ternarize(open_checkpoint(folder)), path, "tq2_0")
    assert written.kinds == {"tq2_0": 6, "f16": 3, "f32": 3}
    assert written.notes[0] == "1 matrices stay F16, as their inputs are no multiple of 256: blk.0.ffn_down.weight"
    assert len(llama_cpp.run(path, [PROMPT], 4096)["scores"][0]) == 4096


def test_llama_31s_factors_are_those_of_transformers(saved, tmp_path, quiet):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model, folder = saved("llama", head_dim=64, rope_parameters={**rope, "original_max_position_embeddings": 128})
    found = tensors_of(write_gguf(open_checkpoint(folder), tmp_path / "model.gguf", "f16").path)["rope_freqs.weight"]
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    assert np.allclose(plain / numbers_of(found), model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)


def test_metadata(tmp_path):
    path = write_gguf(open_checkpoint("demo"), tmp_path / "model.gguf", "f16").path
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    expected = {
        **{"general.architecture": "llama", "general.name": "demo", "general.file_type": 1, "general.quantization_version": 2},
        **{"llama.block_count": 12, "llama.context_length": 2048, "llama.embedding_length": 128, "llama.feed_forward_length": 384},
        **{"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32},
        **{"llama.rope.dimension_count": 32, "llama.rope.freq_base": 500000.0, "llama.vocab_size": 4096},
        **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 4080},
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_what_becomes_of_the_scales_is_said(wide, tmp_path):
    scales = {name: np.float64(np.abs(values.astype(np.float64)).mean()) for name, values in by_hand(wide["float"]).items()}
    largest = max(abs(float(np.float16(s)) / s - 1) for name, s in scales.items() if any(f".{part}." in name for part in MATRICES))
    *_, note = write_gguf(open_checkpoint(wide["bitlinear"]), tmp_path / "a.gguf", "tq2_0").notes
    assert note == f"the scales of 14 ternary tensors were rounded to float16, which changes them by {100 * largest:.2g}% at most"
    assert largest > 1e-5
    assert not any("scales" in note for note in write_gguf(open_checkpoint(wide["bitlinear"]), tmp_path / "b.gguf", "f32").notes)


# Refusals.


def test_raw_floats_are_not_ruined(wide, tmp_path):
    with pytest.raises(DowncycleError, match="holds no ternary weights.*downcycle ternarize"):
        write_gguf(open_checkpoint(wide["float"]), tmp_path / "model.gguf", "tq2_0")
    assert not list(tmp_path.iterdir())


def test_a_model_too_narrow_for_a_type_is_refused(tmp_path):
    with pytest.raises(DowncycleError, match="no matrix has a multiple of 256 inputs, which tq2_0 needs"):
        write_gguf(ternarize(open_checkpoint("demo")), tmp_path / "model.gguf", "tq2_0")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"quant_method": "bitnet", "use_rms_norm": True}, "has a norm before its ternary maps"),
        ({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}, "quantization_mode online"),
        ({"quant_method": "gptq"}, "packed by gptq"),
    ],
)
def test_other_packings_are_refused(how, says, wide, tmp_path):
    from dataclasses import replace

    model = open_checkpoint(wide["float"])
    with pytest.raises(DowncycleError, match=says):
        write_gguf(replace(model, config={**model.config, "quantization_config": how}), tmp_path / "model.gguf", "f16")


def test_a_bias_that_is_scaled_is_refused(wide, tmp_path):
    from dataclasses import replace

    model = open_checkpoint(wide["autobitlinear"])
    bias = {"model.layers.0.self_attn.q_proj.bias": model.tensors["model.norm.weight"]}
    with pytest.raises(DowncycleError, match="self_attn.q_proj has a bias, which AutoBitLinear scales"):
        write_gguf(replace(model, tensors={**model.tensors, **bias}), tmp_path / "model.gguf", "f16")


def test_floats_beneath_ternary_weights_are_told_apart(wide, tmp_path):
    from dataclasses import replace

    model = open_checkpoint(wide["float"])
    trained = replace(model, config={**model.config, "downcycle_ternary": {"schedule": "linear", "strength": 1.0}})
    (note,) = write_gguf(trained, tmp_path / "a.gguf", "bf16").notes
    assert "these are the floats beneath them" in note
    assert write_gguf(model, tmp_path / "b.gguf", "bf16").notes == ()


def test_tensors_too_many_or_of_another_kind_are_refused(tmp_path):
    from dataclasses import replace

    model = open_checkpoint("demo")
    first = next(iter(model.tensors.values()))
    for name, says in (("model.layers.0.self_attn.extra.weight", "has no place for"), ("model.layers.0.q.rms_norm.weight", "has a norm")):
        with pytest.raises(DowncycleError, match=says):
            write_gguf(replace(model, tensors={**model.tensors, name: first}), tmp_path / "model.gguf", "f16")
    odd = replace(first, dtype="F8_E4M3")
    assert DTYPE_BITS[odd.dtype] == 8
    with pytest.raises(DowncycleError, match="holds F8_E4M3"):
        write_gguf(replace(model, tensors={**model.tensors, "model.embed_tokens.weight": odd}), tmp_path / "model.gguf", "f16")


# Files.


def test_what_stands_there_is_kept_unless_it_may_be_replaced(tmp_path):
    model, out = open_checkpoint("demo"), tmp_path / "model.gguf"
    out.write_bytes(b"GGUF, but mine")
    with pytest.raises(DowncycleError, match="exists already"):
        write_gguf(model, out, "f16")
    assert out.read_bytes() == b"GGUF, but mine"
    write_gguf(model, out, "f16", overwrite=True)
    assert tensors_of(out)
    (tmp_path / "note").write_text("precious")
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "folder").mkdir()
    for name, says in (("note", "no GGUF file"), ("link", "symbolic link"), ("folder", "no file")):
        with pytest.raises(DowncycleError, match=says):
            write_gguf(model, tmp_path / name, "f16", overwrite=True)
    assert (tmp_path / "note").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "model.gguf", "note"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_a_run_that_is_stopped_leaves_what_was_there(fault, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_bytes(b"GGUF before")

    def stop(count):
        raise fault

    with pytest.raises(fault):
        write_gguf(open_checkpoint("demo"), out, "f16", overwrite=True, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert out.read_bytes() == b"GGUF before"


def test_two_runs_do_not_write_one_file(tmp_path):
    import fcntl

    out = tmp_path / "model.gguf"
    with open(staging_path(out), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DowncycleError, match="another run is writing it"):
            write_gguf(open_checkpoint("demo"), out, "f16")
    assert [path.name for path in tmp_path.iterdir()] == [staging_path(out).name]
    write_gguf(open_checkpoint("demo"), out, "f16")  # what a killed run left is taken over
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_full_disk_is_said_before_and_while_it_fills(disk, monkeypatch):
    folder = disk("size=4m")
    with pytest.raises(DowncycleError, match="MB are needed and .* MB are free"):
        write_gguf(open_checkpoint("demo"), folder / "model.gguf", "f16")
    plenty = shutil.disk_usage(folder)._replace(free=1 << 40)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: plenty)
    with pytest.raises(DowncycleError, match="model.gguf is not written: the disk is full; free some space"):
        write_gguf(open_checkpoint("demo"), folder / "model.gguf", "f16")
    assert list(folder.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_found(wide, tmp_path):
    from zlib import crc32

    for kind in ("tq2_0", "i2_s"):
        model, path = open_checkpoint(wide["bitlinear"]), tmp_path / f"{kind}.gguf"
        write_gguf(model, path, kind)
        tensors = plan_gguf(model, kind).tensors
        sums = {tensor.name: crc32(b"".join(tensor.chunks())) for tensor in tensors}
        check_gguf(path, tensors, sums)
        data = bytearray(path.read_bytes())
        data[-40 * 1024] ^= 1
        path.write_bytes(data)
        with pytest.raises(DowncycleError, match="is not what was written"):
            check_gguf(path, tensors, sums)
