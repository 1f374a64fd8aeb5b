"""A packed model that is measured on a CPU runs without a compiler, and leaves compiling to the rest of the process as it was."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from downcycle import keep_layers, open_checkpoint  # noqa: E402
from downcycle.eval.measure.loading import load  # noqa: E402
from downcycle.eval.measure.uncompiled import uncompiled  # noqa: E402
from downcycle.surgery.ternary.ternarize import LINEAR, ternarize  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def compiled(monkeypatch):
    """Count what is compiled."""
    done = []

    def backend(graph, inputs):
        done.append(1)
        return graph.forward

    def count():
        done.clear()
        torch._dynamo.reset()
        torch.compile(lambda x: x * 2, backend=backend)(torch.ones(3))
        return len(done)

    return count


@pytest.mark.parametrize("linear", LINEAR)
def test_what_is_compiled_elsewhere_is_compiled_still(linear, compiled, monkeypatch, tmp_path):
    for name, value in {"PATH": "/nowhere", "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}.items():
        monkeypatch.setenv(name, value)
    with torch.compiler.set_stance("default"):
        before = compiled()
        loaded = load(ternarize(keep_layers(open_checkpoint("demo"), [0, 1]), linear=linear), device="cpu")
        assert compiled() == before == 1
        with torch.inference_mode():
            assert loaded.model(input_ids=torch.arange(5, 20)[None]).logits.isfinite().all()
            loaded.model.generate(torch.arange(5, 20)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert compiled() == 1


def test_other_models_and_devices_are_left_alone(compiled):
    packed = ternarize(open_checkpoint("demo"))
    with torch.compiler.set_stance("default"):
        with uncompiled(open_checkpoint("demo"), "cpu"):
            assert compiled() == 1
        with uncompiled(packed, "cuda:0"):
            assert compiled() == 1
        with uncompiled(packed, "cpu"):
            assert compiled() == 0
