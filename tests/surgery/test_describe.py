"""The facts of `inspect`, against counts made by hand, and configs of any make."""

import json
from math import prod

import pytest

from downcycle import describe, open_checkpoint


def test_facts(make, tmp_path):
    tensors = make(
        tmp_path / "m", layers=3, dtypes=("BF16", "F32"), config={"layer_types": ["full_attention", "linear_attention", "full_attention"]}
    )
    counts = {name: prod(tensor.shape) for name, tensor in tensors.items()}
    by_dtype = {dtype: sum(counts[name] for name, tensor in tensors.items() if tensor.dtype == dtype) for dtype in ("BF16", "F32")}
    assert describe(open_checkpoint(tmp_path / "m")) == {
        "name": str(tmp_path / "m"),
        "revision": None,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "layers": 3,
        "layer_kinds": {"full_attention": 2, "linear_attention": 1},
        "layer_elements": [sum(n for name, n in counts.items() if name.startswith(f"model.layers.{layer}.")) for layer in range(3)],
        "elements": sum(counts.values()),
        "tensors": 30,
        "bytes": sum(len(tensor.data) for tensor in tensors.values()),
        "dtypes": by_dtype,
        "quantization": None,
        "files": {"chat_template.jinja": 15, "generation_config.json": 21, "tokenizer.json": 43, "tokenizer_config.json": 3},
    }


@pytest.mark.parametrize(
    "value", [5, "abc", True, None, [], [None], [[1]], [{"a": 1}], {}, {"quant_method": "gptq"}, float("nan")], ids=repr
)
@pytest.mark.parametrize("field", ["layer_types", "layers_block_type", "text_config", "architectures", "quantization_config"])
def test_a_field_of_the_wrong_type_is_passed_over(make, tmp_path, downcycle, field, value):
    make(tmp_path / "m", config={field: value})
    facts = describe(open_checkpoint(tmp_path / "m"))
    assert facts["layers"] == 4
    assert facts["elements"] == sum(facts["layer_elements"]) + 2 * 8 * 4 + 4
    assert downcycle("inspect", tmp_path / "m").code == 0
    code, out, err = downcycle("inspect", tmp_path / "m", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["layer_elements"] == facts["layer_elements"]
