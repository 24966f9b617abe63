"""Every notebook runs from top to bottom, and is kept without outputs; all begin alike."""

import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
QUICK = "exact_multiplexing"  # The one that trains nothing; the others take minutes.
CORE_SECONDS = 2 * 300  # Five minutes on two cores.


def test_outputs_are_stripped_and_all_find_and_install_the_project_alike():
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    assert QUICK in notebooks
    cells = [cell for notebook in notebooks.values() for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "strip the outputs"
    assert len({notebook.cells[1].source for notebook in notebooks.values()}) == 1
    assert all("(https://colab.research.google.com/)" in notebook.cells[0].source for notebook in notebooks.values())


def finding() -> str:
    """The code that all begin with, without its installation."""
    source = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("%pip"))


@pytest.mark.parametrize("start", ["datamux_jax", "datamux_jax/notebooks", "."])
def test_the_first_cell_finds_the_clone(start, tmp_path, monkeypatch):
    (tmp_path / "datamux_jax" / "notebooks").mkdir(parents=True)
    (tmp_path / "datamux_jax" / "datamux_jax").mkdir()
    (tmp_path / "datamux_jax" / "datamux_jax" / "__init__.py").touch()
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path / start)
    for _ in range(2):  # A cell is run again, too.
        exec(finding(), {})
        assert Path.cwd() == tmp_path / "datamux_jax"


def test_the_first_cell_says_that_there_is_no_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="upload or clone it first"):
        exec(finding(), {})


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[] if path.stem == QUICK else pytest.mark.slow) for path in NOTEBOOKS]
)
@pytest.mark.filterwarnings("default")
def test_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)  # It trains for longer than it compiles.
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import time\nprint(time.process_time())"))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert "image/png" in kinds
    assert float(notebook.cells[-1].outputs[0].text) < CORE_SECONDS
