"""The notebook of first steps: its cells are real code for the public API, and run from top to bottom."""

import ast
import re

import nbformat
import pytest
from tiny_world import ROOT

import vqdm

NOTEBOOK = nbformat.read(ROOT / "docs" / "first-steps.ipynb", as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_its_cells_compile_and_name_only_the_public_api():
    nbformat.validate(NOTEBOOK)
    nodes = [node for source in CODE for node in ast.walk(ast.parse(source))]
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in modules if name.startswith("vqdm")} == {"vqdm"}
    named = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "vqdm"}
    assert "compress" in named and named <= {"__file__", *vqdm._PUBLIC}


def test_it_is_kept_without_outputs():
    cells = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    from nbclient import NotebookClient

    resources = {"metadata": {"path": str(tmp_path)}}
    done = NotebookClient(NOTEBOOK.copy(), timeout=1200, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert float(re.search(r"PSNR to the original, mean: (.*) dB", text)[1]) > 20
    assert float(re.search(r"compressed: (.*) times smaller", text)[1]) > 3.5
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert list(tmp_path.iterdir()) == []
