"""The notebooks as a reader sees them: in JupyterLab, in a browser."""

import shutil
from pathlib import Path

import pytest
from lab import browser_page, jupyter_lab, needs_chromium, open_notebook, run_all

ROOT = Path(__file__).parents[1]
NUMBERED = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A copy of the notebooks, so that nothing here can change the real ones."
    root, scratch = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in ROOT.glob("benchmark_results.*"):
        shutil.copy(path, root)
    with jupyter_lab(root, scratch) as url, browser_page() as page:
        yield page, url


@needs_chromium
@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_every_formula_and_table_renders(lab, path):
    page, url = lab
    open_notebook(page, url, f"nbs/{path.name}")
    prose = page.locator(".jp-MarkdownOutput")
    formulas = path.read_text().count("$$") // 2
    if formulas:
        page.wait_for_function(
            f"document.querySelectorAll('.jp-MarkdownOutput mjx-container[display]').length >= {formulas}",
            timeout=30_000,
        )
    assert page.locator("mjx-merror").count() == 0
    text = " ".join(prose.all_inner_texts())
    assert "$" not in text and "\\mathsf" not in text and "|:--" not in text
    wide = page.evaluate(
        "[...document.querySelectorAll('.jp-MarkdownOutput table')].some(t => t.scrollWidth > t.parentElement.clientWidth)"
    )
    assert not wide, "a table is wider than its cell"
    assert page.errors == []


@needs_chromium
def test_the_first_notebook_runs_from_the_top(lab):
    page, url = lab
    open_notebook(page, url, "nbs/00_named_tensors.ipynb")
    assert run_all(page) == []
    assert page.locator(".jp-OutputArea img").count() >= 5
    assert page.errors == []
