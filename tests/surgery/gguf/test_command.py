"""`downcycle gguf` as a user meets it."""

import json

import pytest

pytest.importorskip("gguf")
pytest.importorskip("torch")  # `wide` is made with it


def test_it_says_what_it_wrote(downcycle, tmp_path):
    out = tmp_path / "demo.gguf"
    code, said, told = downcycle("gguf", "demo", "--out", out, "--type", "f16")
    assert (code, said) == (0, f"{out}\n")
    size = out.stat().st_size
    assert told.splitlines() == [
        "note: 144 of 2,646,016 numbers of 48 tensors were rounded to F16",
        f"86 f16, 25 f32 tensors, {size / 1e6:.3g} MB",
    ]


def test_json(downcycle, wide, tmp_path):
    out = tmp_path / "model.gguf"
    code, said, told = downcycle("gguf", wide["bitlinear"], "--out", out, "--type", "tq2_0", "--json")
    facts = json.loads(said)
    assert (code, told) == (0, "")
    assert facts["tensors"] == {"tq2_0": 14, "f16": 2, "f32": 5}
    assert (facts["out"], facts["bytes"], facts["type"]) == (str(out), out.stat().st_size, "tq2_0")
    again = downcycle("gguf", wide["bitlinear"], "--out", out, "--type", "f32", "--overwrite", "--json")
    assert json.loads(again.out)["tensors"] == {"f32": 21}


def test_i2_s_warns(downcycle, wide, tmp_path):
    code, _, told = downcycle("gguf", wide["bitlinear"], "--out", tmp_path / "model.gguf", "--type", "i2_s")
    assert code == 0
    assert told.startswith("warning: I2_S is experimental: only bitnet.cpp on x86 reads it")


def test_refusals_are_one_line(refused, tmp_path):
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    (tmp_path / "note").write_bytes(b"note")
    out = tmp_path / "model.gguf"
    assert "--type q4_0: no such type; choose one of f32, f16" in refused("gguf", "demo", "--out", out, "--type", "q4_0")
    assert "exists already" in refused("gguf", "demo", "--out", tmp_path / "there.gguf", "--type", "f16")
    assert "no GGUF file" in refused("gguf", "demo", "--out", tmp_path / "note", "--type", "f16", "--overwrite")
    assert "no matrix has a multiple of 256 inputs" in refused("gguf", "demo", "--out", out, "--type", "tq1_0")
    assert "choose a folder that can be written" in refused("gguf", "demo", "--out", tmp_path / "note" / "x.gguf", "--type", "f16")
