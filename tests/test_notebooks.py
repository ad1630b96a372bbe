"""What a reader of the committed notebooks would trip over."""

import json
import re
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
NUMBERED = [p for p in NOTEBOOKS if p.parent == ROOT / "nbs"]
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
by_number = pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)


def cells(path, cell_type):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == cell_type]


def text(path):
    return "\n\n".join("".join(c["source"]) for c in cells(path, "markdown"))


@by_name
def test_committed_outputs(path):
    code = cells(path, "code")
    outputs = [o for c in code for o in c["outputs"]]
    assert outputs, "committed without outputs: run make notebooks"
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "something was printed to stderr"
    assert path.stat().st_size <= 200_000
    assert "widgets" not in json.loads(path.read_text())["metadata"]


@by_number
def test_no_output_links_to_a_notebook(path):
    "The site makes pages of the links in the text; in an output such a link would lead nowhere there."
    written = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells(path, "code") for o in c["outputs"]]
    assert not [link for z in written for link in re.findall(r"\]\([^)]*\.ipynb[^)]*\)", z)]


@by_number
def test_a_cell_that_draws_shows_its_picture(path):
    for cell in cells(path, "code"):
        if re.search(r"^fig\b.* = figure\(", "".join(cell["source"]), re.M):
            shown = "".join(str(output.get("data", {})) for output in cell["outputs"])
            assert "<img" in shown or "image/png" in shown, "".join(cell["source"])[:80]


@by_name
def test_no_path_of_a_machine(path):
    here = [f"{folder}/" for folder in (ROOT, Path.home(), tempfile.gettempdir(), "/home", "/Users")]
    assert [folder for folder in here if folder in path.read_text()] == []


@by_name
def test_formulas_render_on_github_too(path):
    prose = text(path)
    assert not re.search(r"\\(newcommand|operatorname|def)\b", prose), "GitHub refuses TeX macros"
    assert all(not block.strip("\n").count("\n\n") for block in prose.split("$$")[1::2]), (
        "a blank line inside $$"
    )
    assert prose.count("$$") % 2 == 0
    for line in prose.split("\n"):
        if "$$" in line:
            assert line.strip() == "$$", "$$ stands on a line of its own"


@by_number
def test_opening_and_close(path):
    prose = text(path)
    assert prose.startswith("# ")
    assert re.search(r"^> \w", prose, re.M), "no `>` line for the module's docstring"
    for part in (
        "**You will learn**",
        "**Time:**",
        "**You need:**",
        "## Summary",
        "## Questions to take away",
    ):
        assert part in prose
    assert len(re.findall(r"^\d\. ", prose.split("## Questions to take away")[1], re.M)) in (2, 3)


def anchors(path):
    titles = re.findall(r"^#+ (.+)$", text(path), re.M)
    return {re.sub(r"[`*]", "", title).strip().replace(" ", "-") for title in titles}


@by_name
def test_links_between_notebooks_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#:]+\.ipynb)(?:#([^)]+))?\)", text(path)):
        assert (path.parent / target).exists(), target
        if anchor:
            assert anchor in anchors(path.parent / target), f"{target}#{anchor}"


@by_number
def test_the_last_word_leads_on(path):
    following = NUMBERED[NUMBERED.index(path) + 1 :]
    if following:
        assert f"]({following[0].name})" in text(path).split("## Questions to take away")[1]
