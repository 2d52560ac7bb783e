"""demo.ipynb runs from top to bottom without a network, and shows what is committed.

pytest tests/test_notebook.py
python tests/test_notebook.py      # runs the notebook and stores its outputs
"""

from __future__ import annotations

import base64
import copy
import importlib.machinery
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "demo.ipynb"

# Nothing is reached through these, and nothing waits: port 9 of this machine refuses at once.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
NO_NETWORK |= {name.upper(): address for name, address in NO_NETWORK.items()}


def execute(notebook, cache: Path, folder: Path = ROOT):
    """A copy of the notebook with fresh outputs, run in a folder without a network."""
    import matplotlib.font_manager  # noqa: F401  builds its font cache here, and not in a cell
    from nbclient import NotebookClient

    # An empty cache of the Hub: a model that this machine has downloaded must not be found.
    dropped = r"HF_|HUGGINGFACE|MPLBACKEND|PYTHONPATH"
    surroundings = {k: v for k, v in os.environ.items() if not re.match(dropped, k)}
    fresh = copy.deepcopy(notebook)
    client = NotebookClient(
        fresh,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        timeout=120,
        record_timing=False,  # it would store the time of day with every cell
        coalesce_streams=True,  # else slow printing is stored in pieces
        extra_arguments=["--log-level=40"],  # else the kernel warns about its own TCP ports
    )
    with client.setup_kernel(env={**surroundings, **NO_NETWORK, "HF_HOME": str(cache)}):
        for index, cell in enumerate(fresh.cells):
            client.execute_cell(cell, index)
    return fresh


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def figures(cell) -> list[bytes]:
    images = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [base64.b64decode(image) for image in images if image]


@pytest.fixture(scope="module")
def committed():
    try:
        import ipykernel  # noqa: F401
        import matplotlib  # noqa: F401
        import nbclient  # noqa: F401
        import nbformat
    except ModuleNotFoundError as error:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f'{error.name} is missing: pip install -e ".[test]"')
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def fresh(committed, tmp_path_factory):
    """Fails with the cell and its traceback if a cell raises."""
    return execute(committed, tmp_path_factory.mktemp("huggingface"))


NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")
CAUSE = re.compile(r"(the Hub is out of reach) \(.*\)")  # why is put differently everywhere


def test_every_cell_runs_without_a_network_and_shows_what_is_committed(committed, fresh):
    """Rounding errors may differ fivefold, other fractions in their last digit."""
    for new, old in zip(code_cells(fresh), code_cells(committed), strict=True):
        texts = [CAUSE.sub(r"\1", printed(cell)) for cell in (new, old)]
        assert NUMBER.sub("#", texts[0]) == NUMBER.sub("#", texts[1]), f"{old.id} prints another"
        for a, b in zip(*map(NUMBER.findall, texts), strict=True):
            if "e" in a or "e" in b:
                assert 0.2 < float(a) / float(b) < 5, f"{old.id}: {a} where {b} is committed"
            else:
                unit = 10.0 ** -len(b.partition(".")[2]) if "." in b else 0
                assert abs(float(a) - float(b)) <= 1.01 * unit, f"{old.id}: {a}, {b} is committed"
        assert len(figures(new)) == len(figures(old)) == int("plt.show()" in old.source), old.id
        for image in figures(old):
            assert image.startswith(b"\x89PNG") and 4_000 < len(image) < 100_000, old.id


def test_without_a_network_the_published_model_is_one_sentence(fresh):
    (cell,) = (cell for cell in code_cells(fresh) if "state-spaces/" in cell.source)
    sentence = printed(cell)
    assert sentence.startswith("state-spaces/mamba-370m: ") and sentence.count("\n") == 1, sentence
    assert "the Hub is out of reach" in sentence


def test_a_model_that_ignores_the_time_between_events_is_far_worse(fresh):
    (cell,) = (cell for cell in code_cells(fresh) if "trained(kind)(" in cell.source)
    errors = {kind: float(e) for kind, e in re.findall(r"error, (.+?) +([\d.]+)", printed(cell))}
    assert set(errors) == {"event time", "gaps as input", "no times"}, printed(cell)
    assert errors["event time"] < 0.2 * errors["no times"], errors
    assert errors["gaps as input"] < 0.5 * errors["no times"], errors


def test_the_first_cell_finds_the_project_or_says_what_to_do(tmp_path, committed, monkeypatch):
    """From above, below and elsewhere; the name may be that of an unrelated package or folder."""
    folder, spec = tmp_path / "above" / "mamba", importlib.machinery.ModuleSpec
    for name in ("mamba.py", "generate.py", "examples", "checkpoints/shakespeare"):
        (folder / name).mkdir(parents=True)
    ours = spec("mamba", None, origin=str(folder / "mamba.py"))

    def run_from(start: Path, found) -> Path:
        monkeypatch.chdir(start)
        monkeypatch.setattr("importlib.util.find_spec", {"mamba": found}.get)
        exec(code_cells(committed)[0].source, {})
        return Path.cwd()

    for start in (".", "examples", "checkpoints/shakespeare", ".."):
        assert run_from(folder / start, None) == folder
    assert run_from(tmp_path, ours) == folder
    (folder / "generate.py").rmdir()
    for found in (None, ours, spec("mamba", None)):
        with pytest.raises(FileNotFoundError, match=r"^open this beside .*!git clone.*$") as raised:
            run_from(tmp_path, found)
        assert "mamba.py, generate.py, examples, checkpoints/shakespeare" in str(raised.value)
        assert Path.cwd() == tmp_path


def test_what_the_second_cell_imports_is_that_of_the_project_found(committed, tmp_path):
    """In a kernel, which begins in another folder."""
    (tmp_path / "clone").mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "examples", ROOT / "checkpoints"):
        (tmp_path / "clone" / path.name).symlink_to(path)
    short = copy.deepcopy(committed)
    short.cells = [code_cells(short)[0], code_cells(short)[0].copy()]
    short.cells[1].source = "import generate, mamba\nprint(mamba.__file__, generate.__file__)"
    names = printed(execute(short, tmp_path / "cache", tmp_path).cells[1]).split()
    assert {Path(name).parent for name in names} == {tmp_path / "clone"}


OF_A_MACHINE = r"(?<!\w)/\w+/|[A-Z]:\\|\d\d:\d\d|\d{4}-\d\d-\d\d|0x\w{6}"


@pytest.mark.parametrize("which", ["committed", "fresh"])
def test_cells_are_short_and_their_outputs_say_nothing_about_the_machine(which, request):
    """No warnings, paths, dates or times of day; no metadata but the kernel's name."""
    notebook = request.getfixturevalue(which)
    for count, cell in enumerate(code_cells(notebook), start=1):
        assert len([line for line in cell.source.splitlines() if line]) <= 12, cell.id
        assert cell.execution_count == count and cell.metadata == {}, cell.id
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", f"{cell.id}: {output.get('text')}"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(OF_A_MACHINE, text), f"{cell.id}: {text}"
    if which == "committed":
        assert set(notebook.metadata) == {"kernelspec"}
        assert NOTEBOOK.stat().st_size < 600_000


def main() -> None:
    """Run demo.ipynb and store its outputs, without timestamps and other metadata."""
    import tempfile

    import nbformat

    with tempfile.TemporaryDirectory() as cache:
        notebook = execute(nbformat.read(NOTEBOOK, as_version=4), Path(cache))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel}
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {len(code_cells(notebook))} code cells run", file=sys.stderr)


if __name__ == "__main__":
    main()
