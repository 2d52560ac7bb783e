"""What the tests of this folder share: seed and thread of test_mamba.py, the scripts in examples/,
a Hub on this machine and no other network; and where there is no GPU, the interpreter of Triton,
which reads its switch when it is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parent))  # for `import hub`
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from hub import Hub

from test_mamba import the_same_numbers_in_every_run  # noqa: F401  a fixture


def pytest_runtest_setup(item):
    needed = any(mark.kwargs.get("needed") for mark in item.iter_markers("gpu"))
    if needed and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub that the client of this process uses: fill `hub.repositories`."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.stop()
