"""The README keeps its word: its Python runs as printed, and its commands name what is there."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_on_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        indent = re.match(" *", block)[0]
        exec(re.sub(f"^{indent}", "", block, flags=re.MULTILINE), names)
    assert len(capsys.readouterr().out) > 100  # the completion

    # The last block says that transformers, and this project, load what it writes.
    ids = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = names["model"](ids)
    assert torch.allclose(names["theirs"](ids).logits, expected, rtol=1e-4, atol=1e-5)
    ours = names["Mamba"].from_pretrained("mine")
    assert torch.allclose(ours(ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba.py", "generate.py"])
def test_the_command_that_strips_the_teaching_leaves_the_program(name, tmp_path):
    pattern = re.search(r"^grep -v '(.*)' mamba.py", README, re.MULTILINE)[1]
    command = ["grep", "-v", pattern, str(ROOT / name)]
    stripped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "##" not in stripped
    assert len(stripped.splitlines()) < 0.9 * len((ROOT / name).read_text().splitlines())
    compile(stripped, name, "exec")


def test_the_pieces_that_the_page_names_work_without_the_rest():
    rows = re.findall(r"^\| (?:the disc|a scan|the SSM).*? \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 3
    source, wanted, copied = (ROOT / "mamba.py").read_text(), set(), {}
    tree = ast.parse(source)
    inputs = [torch.randn(2, 9, 3), torch.rand(2, 9, 3), -torch.rand(3, 4)]
    inputs += [torch.randn(2, 9, 4), torch.randn(2, 9, 4)]
    for row in rows:
        wanted |= set(re.findall(r"`(\w+)`", row))
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        pieces = [node for node in tree.body if names_of(node) & wanted]
        assert set().union(*map(names_of, pieces)) == wanted
        copied = {}
        exec(compile(ast.Module([*imports, *pieces], []), "copied", "exec"), copied)
        for name in wanted & {"scan_sequential", "scan_logspace", "scan_chunked", "scan_recompute"}:
            for rule in ("mamba", "zoh", "dirac"):
                assert copied[name](*inputs, rule=rule)[0].shape == (2, 9, 3)
        with pytest.raises(ValueError, match="bilinear"):
            copied["discretize"](*inputs[1:4], "typo")
    for scan in ("auto", "sequential", "logspace", "chunked", "recompute"):
        assert copied["selective_scan"](*inputs, scan=scan)[0].shape == (2, 9, 3)


def names_of(node: ast.stmt) -> set[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()


def test_every_file_that_the_page_links_or_lists_is_there():
    names = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"^\| `([^`]+)` \|", README, re.M)
    assert len(names) > 6
    for name in names:
        if "model" not in name:  # a row of the table of load times
            assert (ROOT / name).exists(), name
