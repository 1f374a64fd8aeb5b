"""A config.json of another make than it should be: one line that names the fault, never a traceback; and what is another spelling."""

import json
from dataclasses import replace

import pytest

gguf = pytest.importorskip("gguf")

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.errors import DowncycleError  # noqa: E402
from downcycle.surgery.gguf.export import plan_gguf, write_gguf  # noqa: E402

LLAMA31 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


def changed(**fields):
    demo = open_checkpoint("demo")
    return replace(demo, config={**demo.config, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": None}, "config.json has hidden_size 'None', where a number is needed"),
        ({"num_attention_heads": "four"}, "config.json has num_attention_heads 'four'"),
        ({"num_attention_heads": True}, "config.json has num_attention_heads 'True'"),
        ({"num_attention_heads": 0}, "num_attention_heads '0', where a whole number from 1 on is needed"),
        ({"num_key_value_heads": [2]}, "num_key_value_heads"),
        ({"head_dim": -32}, "head_dim '-32'"),
        ({"head_dim": 32.5}, "head_dim '32.5'"),
        ({"vocab_size": float("nan")}, "vocab_size 'nan'"),
        ({"intermediate_size": 1 << 40}, "intermediate_size"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"max_position_embeddings": 1e30}, "max_position_embeddings"),
        ({"rms_norm_eps": None}, "config.json has rms_norm_eps 'None', where a number is needed"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps '1e.300'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "config.json lacks factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta 'big'"),
        ({"rope_parameters": {**LLAMA31, "original_max_position_embeddings": None}}, "original_max_position_embeddings 'None'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "config.json lacks low_freq_factor"),
        ({"rope_parameters": {**LLAMA31, "high_freq_factor": 1.0, "original_max_position_embeddings": 64}}, "no such rope"),
        ({"rope_parameters": {**LLAMA31, "factor": 0, "original_max_position_embeddings": 64}}, "no such rope"),
        ({"rope_parameters": {**YARN, "factor": None}}, "factor"),
        ({"rope_parameters": {**YARN, "attention_factor": "a"}}, "attention_factor"),
        ({"rope_parameters": [1, 2]}, "demo/config.json: lacks, or has an unusable, part"),
    ],
)
def test_what_is_no_number_is_named(fields, says):
    with pytest.raises(DowncycleError, match=says) as caught:
        plan_gguf(changed(**fields), "f16")
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_written_whole(tmp_path):
    model = changed(max_position_embeddings=1e3, hidden_size=128.0, rms_norm_eps=1)
    write_gguf(model, tmp_path / "model.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {
        key: (fields[f"llama.{key}"].types[0].name, fields[f"llama.{key}"].contents()) for key in ("context_length", "embedding_length")
    }
    assert found == {"context_length": ("UINT32", 1000), "embedding_length": ("UINT32", 128)}
    epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
    assert (epsilon.types[0].name, epsilon.contents()) == ("FLOAT32", 1.0)


def test_the_command_says_it_in_one_line(refused, tmp_path):
    pytest.importorskip("torch")
    import shutil

    from downcycle.surgery.checkpoint import DEMO_FOLDER

    shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_attention_heads": "four"}))
    assert "num_attention_heads 'four'" in refused("gguf", tmp_path / "model", "--out", tmp_path / "model.gguf", "--type", "f16")
    assert not (tmp_path / "model.gguf").exists()
