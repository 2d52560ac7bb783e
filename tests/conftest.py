"""What the tests of this folder share: one thread, a Hub on this machine and no other network.

And where there is no GPU, the interpreter of Triton, which reads its switch when it is imported.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parent))  # for `import hub`

from hub import Hub


def use_endpoint(monkeypatch, url: str, cache: Path) -> None:
    """Let the client of this process talk to url, with a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub that the client of this process uses: fill `hub.repositories`."""
    with Hub() as hub:
        use_endpoint(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors as small as these, threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
