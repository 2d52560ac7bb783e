"""The README keeps its word: its Python runs as printed, and its commands name what is there."""

import ast
import re
import subprocess
import types
from pathlib import Path

import pytest
import torch
import transformers
from recipes import save_for_transformers

import mamba

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_on_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict = {}
    for indent, block in blocks:
        exec(re.sub(f"^{indent}", "", block, flags=re.MULTILINE), names)
    assert len(capsys.readouterr().out) > 100  # the completion

    # As the table says under it.
    save_for_transformers(names["model"], "mine")
    theirs = transformers.MambaForCausalLM.from_pretrained("mine")
    ids, ours = torch.randint(256, (2, 9)), names["Mamba"].from_pretrained("mine")
    for logits in (theirs(ids).logits, ours(ids)):
        assert torch.allclose(logits, names["model"](ids), rtol=1e-4, atol=1e-5)


def test_the_command_that_strips_the_teaching_leaves_the_program():
    pattern = re.search(r"`grep -v '(.*)' mamba.py", README)[1]
    for path in (ROOT / "mamba.py", ROOT / "generate.py"):
        command, source = ["grep", "-v", pattern, str(path)], path.read_text()
        stripped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "##" not in stripped and stripped.count("\n") < 0.9 * source.count("\n")
        assert ast.dump(ast.parse(stripped)) == ast.dump(ast.parse(source)), "another program"


def test_every_file_that_the_page_links_or_lists_is_there_and_as_long_as_it_says():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    listed = re.findall(r"^\| `([^`]+)` \| ([\d,]*) ?\|", README, re.M)
    names = {*links, *(name for name, _ in listed)}
    assert len(listed) > 9 and [name for name in names if not (ROOT / name).exists()] == []
    for name, lines in listed:
        found = f"{(ROOT / name).read_text().count(chr(10)):,}" if lines else ""
        assert lines == found, name
    length = dict(listed)["mamba.py"]
    assert f"| 1: {length} |" in README  # beside others


## Rows of "How to copy pieces": the names that a row lists, by the first of them.
TABLE = re.search(r"^## How to copy pieces.*?^```", README, re.DOTALL | re.MULTILINE)[0]
ROWS = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| .* \| (.*) \|$", TABLE, re.M)]
PIECES = {names[0]: names for names in ROWS if names}


def copied(names: set[str]) -> types.SimpleNamespace:
    """A module that has the imports of mamba.py and these of its names, each once, as it is."""
    pieces, defined = [], set()
    for node in ast.parse((ROOT / "mamba.py").read_text()).body:
        nodes = node.targets if isinstance(node, ast.Assign) else [node]
        found = {getattr(node, "name", getattr(node, "id", None)) for node in nodes} & names
        if found or isinstance(node, (ast.Import, ast.ImportFrom)):
            pieces.append(node)
        defined |= found
    assert defined == names
    module: dict = {}
    exec(compile(ast.Module(pieces, []), "copied", "exec"), module)
    return types.SimpleNamespace(**module)


def run_piece(module, first: str, rules=("mamba", "dirac")) -> list[torch.Tensor]:
    """What a piece computes, in every way that its row promises."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 9, 3), (2, 9, 3), (3, 4), (2, 9, 4), (2, 9, 4)]
    x, delta, A, B, C = (torch.rand(shape, generator=generator) for shape in shapes)
    piece, inputs = getattr(module, first), (x, delta, -A, B, C)
    if first == "discretize":
        with pytest.raises(ValueError, match="bilinear"):
            piece(delta, -A, B, "typo")
        results = [piece(delta, -A, B, rule) for rule in mamba.RULES]
    elif first == "causal_conv":
        conv1d = torch.nn.Conv1d(3, 3, 4, groups=3)
        conv1d.load_state_dict({"weight": B[0, :3, None, :], "bias": A[:, 0]})
        results = [piece(x, conv1d, C[:, :3, :3]), piece(x[:, 0], conv1d, C[:, :3, :3])]
    elif first == "selective_scan":
        results = [piece(*inputs, A[:, 0], x, scan=scan) for scan in ("auto", "sequential")]
        results += [piece(*inputs, rule=rule) for rule in rules]
        token = (x[:, 0], delta[:, 0], -A, B[:, 0], C[:, 0])
        results += [piece(*token, h0=results[0][1], rule=rule) for rule in rules]
    else:
        results = [piece(*inputs, rule=rule) for rule in rules]
    return [tensor for result in results for tensor in result]


@pytest.mark.parametrize("first", PIECES)
def test_a_piece_works_with_the_names_of_its_row_and_with_none_left_out(first):
    names = set(PIECES[first])
    assert len(names) <= 8 and len(PIECES) == 7
    expected = run_piece(mamba, first)
    for ours, theirs in zip(run_piece(copied(names), first), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in names - {first}:
        with pytest.raises((NameError, AttributeError), match=name):
            run_piece(copied(names - {name}), first)
    if first not in ("discretize", "causal_conv"):
        run_piece(copied(names | {"expm1_over"}), first, rules=("zoh",))
