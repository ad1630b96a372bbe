"""The notebooks as a reader sees them: in JupyterLab, in a browser."""

import json
import shutil
from pathlib import Path

import pytest
from lab import browser_page, jupyter_lab, needs_chromium, open_notebook, run_all

ROOT = Path(__file__).parents[1]
NUMBERED = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A copy of the notebooks, so that nothing here can change the real ones; `all.ipynb` has what all of them show."
    root, scratch = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in ROOT.glob("benchmark_results.*"):
        shutil.copy(path, root)
    whole = json.loads(NUMBERED[0].read_text())
    whole["cells"] = []
    for path in NUMBERED:
        prose = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
        whole["cells"] += [cell | {"id": f"{path.stem[:2]}-{i}"} for i, cell in enumerate(prose)]
    (root / "all.ipynb").write_text(json.dumps(whole))
    with jupyter_lab(root, scratch) as url, browser_page() as page:
        yield page, url


@needs_chromium
def test_every_formula_and_table_renders(lab):
    "All notebooks' text on one page: to open them one by one takes a kernel each."
    page, url = lab
    open_notebook(page, url, "all.ipynb")
    formulas = sum(path.read_text().count("$$") // 2 for path in NUMBERED)
    page.wait_for_function(
        f"document.querySelectorAll('.jp-MarkdownOutput mjx-container[display]').length >= {formulas}",
        timeout=120_000,
    )
    assert page.locator("mjx-merror").all_inner_texts() == []
    texts = page.locator(".jp-MarkdownOutput").all_inner_texts()
    raw = [text for text in texts if "$" in text or "\\mathsf" in text or "|:--" in text]
    assert not raw, f"not rendered: {raw}"
    wide = page.evaluate(
        """[...document.querySelectorAll('.jp-MarkdownOutput table')]
            .filter(t => t.scrollWidth > t.parentElement.clientWidth).map(t => t.innerText)"""
    )
    assert not wide, f"wider than their cells: {wide}"
    assert page.errors == []


@needs_chromium
def test_the_first_notebook_runs_from_the_top(lab):
    page, url = lab
    open_notebook(page, url, "nbs/00_named_tensors.ipynb")
    assert run_all(page) == []
    assert page.locator(".jp-OutputArea img").count() >= 5
    assert page.errors == []
