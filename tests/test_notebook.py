"""demo.ipynb runs from top to bottom without a network, and shows what is committed.

pytest tests/test_notebook.py      # with 20 steps of each training
python tests/test_notebook.py      # runs the notebook as it is and stores its outputs
"""

import copy
import importlib.machinery
import importlib.util
import os
import re
import sys
import time
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
    """Run with 20 steps of each training and shorter contexts, which are most of the time."""
    quick, count = copy.deepcopy(committed), 0
    for cell in code_cells(quick):
        cell.source, trainings = re.subn(r"steps=\d+, lr", "steps=20, lr", cell.source)
        cell.source, measured = re.subn(r"arange\(5, 12\)", "arange(5, 7)", cell.source)
        count += trainings + measured
    assert count == 4
    return execute(quick, tmp_path_factory.mktemp("huggingface"))


NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


def words(text: str) -> str:
    return re.sub(" +", " ", NUMBER.sub("#", text))


def test_every_cell_runs_without_a_network_and_shows_what_is_committed(committed, fresh):
    """Rounding errors may differ fivefold, shares and other fractions in their last digit. What was
    trained for fewer steps answers less."""
    for new, old in zip(code_cells(fresh), code_cells(committed), strict=True):
        texts = printed(new), printed(old)
        assert words(texts[0]) == words(texts[1]), f"{old.id} prints another"
        numbers = () if "learners" in old.source else zip(*map(NUMBER.findall, texts), strict=True)
        for a, b in numbers:
            if "e" in a or "e" in b:
                assert 0.2 < float(a) / float(b) < 5, f"{old.id}: {a} where {b} is committed"
            else:
                unit = 10.0 ** -len(b.partition(".")[2]) if "." in b else float("%" in texts[1])
                assert abs(float(a) - float(b)) <= 1.01 * unit, f"{old.id}: {a}, {b} is committed"
        draws = re.search(r"^(show|train)\(", old.source, re.MULTILINE) is not None
        for cell in (new, old):
            assert len(figures(cell)) == draws, f"{old.id} must draw {draws} pictures"
            assert all(5_000 < len(image) < 130_000 for image in figures(cell)), old.id


def test_what_is_said_about_the_outputs_is_true_of_those_that_are_committed(committed):
    """They depend on weights and on training: made anew, they might not show what the text says."""
    said = "".join(printed(cell) for cell in code_cells(committed))

    def row(name: str) -> list[float]:
        line = re.search(rf"^{name} .*", said, re.MULTILINE)[0]
        return [float(number.rstrip("%")) for number in re.findall(r"\d+%|\d\.\d\d", line)]

    for fact in ("a word begins", "a line begins", "in a name"):
        there, elsewhere, scene_there, scene_elsewhere = row(fact)
        assert min(there - elsewhere, scene_there - scene_elsewhere) > 30, fact
    assert row("a line begins")[2] > 80, "the line channel is a memory cell"
    assert row("a vowel")[0] - row("a vowel")[1] < 40, "no channel of vowels"
    right, one_of_three = row("no selection")
    assert row("selection")[0] > 95 and right < 80 and one_of_three > right + 20
    large, small = row("Mamba, 1024 numbers"), row("Mamba, 64 numbers")
    assert min(row("attention")) > 98 and all(a > b for a, b in zip(large, small, strict=True))
    assert all(shares == sorted(shares, reverse=True) for shares in (large, small))
    names = re.findall(r"^(?:GRUMBOL|TAZIRA|Tazira|Grumbol) .*", said, re.MULTILINE)
    new, again = names[:2], names[2:]
    assert all(sum(map(float, name.split()[1:])) > 15 for name in new) and len(again) == 4
    assert all(float(nats) < 0.5 for name in again for nats in name.split()[2:]), "but the first"
    spread, unknown = row("the level itself:")[0], row("no times")[0]
    known, as_input = row("event time")[0], row("gaps as input")[0]
    assert known < as_input < 0.2 and 0.4 < unknown < spread / 2


def test_the_first_cell_finds_the_project_or_says_what_to_do(tmp_path, committed, monkeypatch):
    """From above, below and elsewhere, where an unrelated folder may have the name."""
    folder, cell = tmp_path / "above" / "mamba", code_cells(committed)[0].source
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mamba.py", "generate.py", "examples", "checkpoints/shakespeare"):
        (folder / name).mkdir(parents=True)
    ours = importlib.machinery.ModuleSpec("mamba", None, origin=str(folder / "mamba.py"))
    starts = [(folder / start, None) for start in (".", "checkpoints/shakespeare", "..")]
    for start, found in (*starts, (tmp_path, ours)):
        monkeypatch.chdir(start)
        monkeypatch.setattr("importlib.util.find_spec", {"mamba": found}.get)
        exec(cell, {})
        assert Path.cwd() == folder and sys.path[:2] == [str(folder), str(folder / "examples")]
    (folder / "generate.py").rmdir()
    with pytest.raises(FileNotFoundError, match=r"beside mamba\.py, gen.*, examples, .*!git clone"):
        exec(cell, {})


OF_A_MACHINE = r"(?<!\w)/\w+/|[A-Z]:\\|\d\d:\d\d|\d{4}-\d\d-\d\d|0x\w{6}"


def test_cells_are_short_and_their_outputs_say_nothing_about_the_machine(committed, fresh):
    """No warnings, paths, dates or times of day; no metadata but the kernel's name."""
    cells = [*enumerate(code_cells(committed), start=1), *enumerate(code_cells(fresh), start=1)]
    for count, cell in cells:
        assert len([line for line in cell.source.splitlines() if line]) <= 25, cell.id
        assert cell.execution_count == count and cell.metadata == {}, cell.id
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", f"{cell.id}: {output.get('text')}"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(OF_A_MACHINE, text), f"{cell.id}: {text}"
    for cell in committed.cells:  # a minus sign at the start of a line would begin a list
        assert cell.cell_type == "code" or not re.search(r"[^\n]\n[-+] ", cell.source), cell.id
    assert set(committed.metadata) == {"kernelspec"}
    assert NOTEBOOK.stat().st_size < 1_000_000


def main() -> None:
    """Run demo.ipynb and store its outputs, without timestamps and other metadata."""
    import tempfile

    import nbformat

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        notebook = execute(nbformat.read(NOTEBOOK, as_version=4), Path(cache))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel}
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, NOTEBOOK)
    ran = f"{len(code_cells(notebook))} code cells run in {time.perf_counter() - begun:.0f} s"
    print(f"{NOTEBOOK.name}: {ran}", file=sys.stderr)


if __name__ == "__main__":
    main()
