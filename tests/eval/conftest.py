"""Measurements are kept apart for each test."""

import pytest


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    monkeypatch.setenv("DOWNCYCLE_CACHE", str(folder))
    return folder
