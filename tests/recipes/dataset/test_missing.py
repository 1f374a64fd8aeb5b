"""Without the libraries of the `data` extra, the error says what to install, and nothing is written."""

import importlib.util

import pytest

from downcycle import DowncycleError
from downcycle.recipes.dataset.make import Request, make_dataset


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is not None, reason="datatrove is installed")
def test_names_what_to_install(tmp_path):
    with pytest.raises(DowncycleError, match=r"needs datatrove.*pip install 'downcycle\[data\]'"):
        make_dataset(tmp_path / "out", Request(1))
    assert not any(tmp_path.iterdir())
