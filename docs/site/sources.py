"""What the site and Colab make of a numbered notebook. The notebooks themselves stay as they are."""

import ast
import json
import os
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
_settings = ConfigParser(delimiters=["="], interpolation=None)
_settings.read(ROOT / "settings.ini", encoding="utf-8")
CFG = _settings["DEFAULT"]
REPOSITORY = f"{CFG['user']}/{CFG['repo']}"
HOME = f"https://github.com/{REPOSITORY}"
NOTEBOOKS = sorted((ROOT / CFG["nbs_path"]).glob("[0-9]*.ipynb"))
COLAB_BRANCH = "colab"  # the workflow pushes it: the notebooks with the cell that installs

# Where Colab has no kernel of ours. Without dependencies: Colab pins IPython, and has the rest of what is needed.
INSTALL = """\
# This cell is for Colab: it fetches the course and its package. Run it first, once.
![ -d /content/{repo} ] || git clone -q --depth 1 -b {branch} {home} /content/{repo}
%pip install -q --no-deps /content/{repo}
%pip install -q anywidget einops safetensors tokenizers huggingface-hub
%cd -q /content/{repo}/{nbs}"""


def anchor(title: str) -> str:
    "The anchor of a heading, as JupyterLab makes it."
    return title.strip().replace(" ", "-")


def read(path: Path) -> dict:
    "A notebook, its cells' sources as one text each."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def about(path: Path) -> dict:
    "What the opening of a notebook says: number, title, line, minutes."
    first = read(path)["cells"][0]["source"]
    minutes = re.search(r"\*\*Time:\*\* about (\d+) minutes", first)
    return dict(
        number=path.stem[:2], title=re.match(r"# (.+)", first)[1], line=re.search(r"^> (.+)$", first, re.M)[1], minutes=minutes and int(minutes[1])
    )  # fmt: skip


def outward(markdown: str, pages=NOTEBOOKS) -> str:
    "Links to files that are no pages of the site lead to the repository."
    names = {page.name for page in pages}

    def lead(match):
        if match[1].partition("#")[0] in names:
            return match[0]
        path = os.path.normpath(f"{CFG['nbs_path']}/{match[1]}").replace(os.sep, "/")
        return f"]({HOME}/blob/{CFG['branch']}/{path}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)", lead, markdown)


def opened_in(path: Path) -> str:
    "Where else the notebook can be opened, as a line of HTML."
    file = f"{CFG['nbs_path']}/{path.name}"
    places = {
        "Run it in Colab": f"https://colab.research.google.com/github/{REPOSITORY}/blob/{COLAB_BRANCH}/{file}",
        "Run it on Binder": f"https://mybinder.org/v2/gh/{REPOSITORY}/{CFG['branch']}?urlpath=lab/tree/{file}",
        "See it on GitHub": f"{HOME}/blob/{CFG['branch']}/{file}",
    }
    module = re.search(r"^#\| default_exp (\S+)", "\n".join(c["source"] for c in read(path)["cells"]), re.M)
    if module:
        places["What it exports"] = f"api/{module[1]}.html"
    return '<p class="places">' + "".join(f'<a href="{url}">{name}</a>' for name, url in places.items()) + "</p>"


def page(path: Path, pages=NOTEBOOKS) -> dict:
    "The notebook as the site shows it: without what is for nbdev, with links that lead somewhere, and with its places."
    notebook = read(path)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = outward(cell["source"], pages)
            continue
        cell["source"] = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M)
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = outward("".join(data["text/markdown"]), pages)
    notebook["cells"] = [c for c in notebook["cells"] if c["cell_type"] == "markdown" or c["source"].strip()]
    first = notebook["cells"][0]
    first["source"] = re.sub(r"\A(# .+\n)", lambda m: f"{m[1]}\n{opened_in(path)}\n", first["source"])
    return notebook


def for_colab(path: Path) -> dict:
    "The notebook with a first cell that installs the package."
    notebook = read(path)
    source = INSTALL.format(repo=CFG["repo"], home=HOME, branch=COLAB_BRANCH, nbs=CFG["nbs_path"])
    cell = dict(cell_type="code", id="install", metadata={}, execution_count=None, outputs=[], source=source)
    notebook["cells"].insert(0, cell)
    return notebook


def names(path: Path) -> dict:
    "What the names of the library mean in a notebook: those it imports, and those it exports itself."
    found, module = {}, None
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "code":
            continue
        given = re.search(r"^#\| default_exp (\S+)", cell["source"], re.M)
        module = f"{CFG['lib_name']}.{given[1]}" if given else module
        python = re.sub(r"^\s*[%!].*$", "", cell["source"], flags=re.M)
        for node in ast.walk(ast.parse(python)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(CFG["lib_name"]):
                found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        if module and re.search(r"^#\| export", cell["source"], re.M):
            for node in ast.parse(python).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    found[node.name] = f"{module}.{node.name}"
    return found
