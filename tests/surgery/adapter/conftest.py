"""A bf16 Llama of 8 layers, a LoRA of two kinds of modules for it, and the line in which a merge is refused."""

import shutil

import pytest

from downcycle import DowncycleError, open_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The folders of both."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tiny_adapters import TWO, make

    return make(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16, target_modules=TWO)


@pytest.fixture
def base(llama):
    return open_checkpoint(llama[0])


@pytest.fixture
def adapter(llama, tmp_path):
    """A copy of that adapter, to be spoilt."""
    return shutil.copytree(llama[1], tmp_path / "adapter")


@pytest.fixture
def refusal():
    """Merge, and return the one line in which that is refused."""
    from downcycle.surgery.adapter.merge import merge_adapter

    def say(base, adapter):
        with pytest.raises(DowncycleError) as raised:
            merge_adapter(base, adapter)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return say
