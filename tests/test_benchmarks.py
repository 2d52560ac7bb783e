"""The benchmark of the CPU: it runs in tiny sizes, and it measures what it says."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("cpu")


def test_a_dry_run_measures_every_system_that_is_installed_and_writes_nothing(
    cpu, monkeypatch, capsys
):
    files = {path: path.stat().st_mtime for path in HERE.glob("*.*")}
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--dry-run", "--threads", "1"])
    cpu.main()
    assert files == {path: path.stat().st_mtime for path in HERE.glob("*.*")}
    out, err = capsys.readouterr()
    for title in ("decode, a token", "prefill", "forward and backward", "token"):
        assert f"\n| {title}" in out
    for peer in ("transformers", "mambapy"):
        assert (f"{peer} is not installed: left out" in err) != (f"\n| {peer}, " in out)


def test_the_peak_of_tensors_counts_what_is_held_at_a_time(cpu):
    held = torch.ones(1000)  # before the run: not counted

    def run():
        for size in (3000, 5000, 2000):  # one after the other
            torch.zeros(size)
        return [held + 1 for _ in range(4)]  # together, but less

    assert cpu.peak_of_tensors(run) == pytest.approx(5000 * 4, abs=256)
