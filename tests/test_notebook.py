"""demo.ipynb runs from top to bottom without a network, and shows what is committed.

pytest tests/test_notebook.py
python tests/test_notebook.py      # runs the notebook and stores its outputs
"""

import copy
import importlib.machinery
import importlib.util
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


def execute(notebook, cache: Path):
    """A copy of the notebook with fresh outputs, run without a network."""
    import matplotlib.font_manager  # noqa: F401  builds its font cache here, and not in a cell
    from nbclient import NotebookClient

    # An empty cache of the Hub: a model that this machine has downloaded must not be found.
    dropped = r"HF_|HUGGINGFACE|MPLBACKEND|PYTHONPATH"
    surroundings = {k: v for k, v in os.environ.items() if not re.match(dropped, k)}
    fresh = copy.deepcopy(notebook)
    options = {"kernel_name": "python3", "resources": {"metadata": {"path": str(ROOT)}}}
    # No times of day are stored, nor slow printing in pieces, nor warnings of the kernel.
    options |= {"timeout": 120, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(fresh, extra_arguments=["--log-level=40"], **options)
    with client.setup_kernel(env={**surroundings, **NO_NETWORK, "HF_HOME": str(cache)}):
        for index, cell in enumerate(fresh.cells):
            client.execute_cell(cell, index)
    return fresh


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def figures(cell) -> list[str]:
    images = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [image for image in images if image]


@pytest.fixture(scope="module")
def committed():
    for name in ("ipykernel", "matplotlib", "nbclient", "nbformat"):
        if importlib.util.find_spec(name) is None:
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up(f'{name} is missing: pip install -e ".[test]"')
    return importlib.import_module("nbformat").read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def fresh(committed, tmp_path_factory):
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
        assert all(5_000 < len(image) < 130_000 for image in figures(old)), old.id


def test_the_first_cell_finds_the_project_or_says_what_to_do(tmp_path, committed, monkeypatch):
    """From above, below and elsewhere, where an unrelated folder may have the name."""
    folder, cell = tmp_path / "above" / "mamba", code_cells(committed)[0].source
    for name in ("mamba.py", "generate.py", "examples", "checkpoints/shakespeare"):
        (folder / name).mkdir(parents=True)
    ours = importlib.machinery.ModuleSpec("mamba", None, origin=str(folder / "mamba.py"))
    starts = [(folder / start, None) for start in (".", "checkpoints/shakespeare", "..")]
    for start, found in (*starts, (tmp_path, ours)):
        monkeypatch.chdir(start)
        monkeypatch.setattr("importlib.util.find_spec", {"mamba": found}.get)
        exec(cell, {})
        assert Path.cwd() == folder
    (folder / "generate.py").rmdir()
    with pytest.raises(FileNotFoundError, match=r"beside mamba\.py, gen.*, examples, .*!git clone"):
        exec(cell, {})


OF_A_MACHINE = r"(?<!\w)/\w+/|[A-Z]:\\|\d\d:\d\d|\d{4}-\d\d-\d\d|0x\w{6}"


def test_cells_are_short_and_their_outputs_say_nothing_about_the_machine(committed, fresh):
    """No warnings, paths, dates or times of day; no metadata but the kernel's name."""
    cells = [*enumerate(code_cells(committed), start=1), *enumerate(code_cells(fresh), start=1)]
    for count, cell in cells:
        assert len([line for line in cell.source.splitlines() if line]) <= 12, cell.id
        assert cell.execution_count == count and cell.metadata == {}, cell.id
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", f"{cell.id}: {output.get('text')}"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(OF_A_MACHINE, text), f"{cell.id}: {text}"
    assert set(committed.metadata) == {"kernelspec"}
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
