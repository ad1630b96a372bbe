"""Build the site: `python docs/site/build.py`, into build/site/html. `--only 00 10` takes just these notebooks."""

import argparse
import inspect
import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import sources  # noqa: E402

PARTS = (("The course", 0, 6), ("Deeper", 7, 9), ("Beyond", 10, 99))


def write(path: Path, text: str) -> None:
    "Write a page if it has changed: what has not, Sphinx need not read again."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def games() -> dict:
    "The living steppers of the first page: of the kept model of text, as it writes."
    from kvcache_lib.gpt import GPT_kv
    from kvcache_lib.kept import kept_tokenizer, text_model
    from kvcache_lib.stepper import CacheStepper
    from kvcache_lib.stepper.payload import page
    from kvcache_lib.text import encode

    model, tokenizer, found = text_model(GPT_kv).eval(), kept_tokenizer(), {}
    for name, prompt, count, step, race in (("stepper", "The cache is read", 6, 2, False), ("race", "The cache", 40, 1, True)):
        stepper = CacheStepper(model, encode(tokenizer, prompt), count, vocab=tokenizer, step=step)
        found[name] = page(stepper.packed, stepper.filmstrip([step]), "", dict(step=step, layer=0, head=0, cache=True, race=race, text=0))
        stepper.close()
    return found


def parts(notebooks: list) -> str:
    "The list of the notebooks, as tables and as the site's contents."
    text = ""
    for title, first, last in PARTS:
        chosen = [(path, sources.about(path)) for path in notebooks if first <= int(path.stem[:2]) <= last]
        if chosen:
            rows = [f"| {a['number']} | [{a['title']}]({path.name}) | {a['line']} | {a['minutes']} |" for path, a in chosen]
            lines = [f"{a['number']} {a['title']} <{path.stem}>" for path, a in chosen]
            table = ["| | notebook | what it does | minutes |", "|:--|:--|:--|--:|", *rows]
            tree = ["```{toctree}", ":hidden:", f":caption: {title}", "", *lines, "```"]
            text += "\n".join([f"## {title}", "", *table, "", *tree, "", ""])
    return text + "```{toctree}\n:hidden:\n:caption: The library\n\napi/index\n```\n"


def modules() -> list:
    lib = ROOT / sources.CFG["lib_path"]
    paths = [p for p in sorted(lib.rglob("*.py")) if p.name != "_modidx.py" and p != lib / "__init__.py"]
    return [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]


def summary(module: str) -> tuple:
    "`(the first line of a module's docstring, the notebook it comes from)`, read without importing it."
    import ast

    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    line = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    edited = text.partition("File to edit: ")[2].partition("\n")[0].rstrip(".").strip()
    return line, edited[edited.find(sources.CFG["nbs_path"] + "/") :] if edited else ""


def reference(wanted: list) -> dict:
    "The pages of the reference: {name: reStructuredText}."
    found, rooms = {}, {}
    lib = sources.CFG["lib_name"]
    for module in wanted:
        name = module.removeprefix(lib + ".")
        line, notebook = summary(module)
        folder = name.split(".")[0] if (ROOT / lib / name.split(".")[0]).is_dir() else ""
        rooms.setdefault(folder, []).append((name, line))
        origin = ""
        if notebook:
            numbered = Path(notebook).name[:1].isdigit()
            origin = f"From :doc:`/{Path(notebook).stem}`." if numbered else f"From `{notebook} <{sources.HOME}/blob/{sources.CFG['branch']}/{notebook}>`__."
        title = name.replace("_", r"\_")
        found[f"api/{name}.rst"] = (
            f"{title}\n{'=' * len(title)}\n\n{origin}\n\n.. automodule:: {module}\n   :members:\n   :show-inheritance:\n"
            + ("   :ignore-module-all:\n" if (ROOT / Path(*module.split("."))).is_dir() else "")
        )
    text = "API reference\n=============\n\nMade from the docstrings. What people read comes first, then the tools, room by room.\n"
    from apidocs import inline

    for folder in sorted(rooms):
        heading = f"{folder}/" if folder else "The rooms"
        text += f"\n{heading}\n{'-' * len(heading)}\n\n"
        text += "".join(f"* :doc:`{name}`: {inline(line)}\n" for name, line in rooms[folder])
        text += "\n.. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name, _ in rooms[folder])
    return found | {"api/index.rst": text}


def lay_out(source: Path, notebooks: list, chosen: list) -> None:
    "Write all pages into a folder, and remove pages that are no longer made."
    words = dict(home=sources.HOME, repo=sources.CFG["repo"], branch=sources.CFG["branch"], parts=parts(notebooks))
    index = (HERE / "index.md").read_text(encoding="utf-8")
    for name, value in words.items():
        index = index.replace("{" + name + "}", value)
    pages = {"index.md": index, **{f"{name}.html": html for name, html in games().items()}, **reference(chosen)}
    pages |= {path.name: json.dumps(sources.page(path, notebooks), ensure_ascii=False, indent=1) for path in notebooks}
    for name, text in pages.items():
        write(source / name, text)
    for path in [p for p in source.rglob("*") if p.is_file() and p.relative_to(source).as_posix() not in pages]:
        path.unlink()


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__))
    parser.add_argument("--only", nargs="+", metavar="NN", help="the numbers of the notebooks; and only the modules they export")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--colab", type=Path, metavar="FOLDER", help="just write the notebooks for Colab there")
    args = parser.parse_args(arguments)
    notebooks = [p for p in sources.NOTEBOOKS if not args.only or p.stem[:2] in args.only]
    if not notebooks:
        parser.error(f"expected numbers among {', '.join(p.stem[:2] for p in sources.NOTEBOOKS)}, got {' '.join(args.only)}")
    if args.colab:
        for path in notebooks:
            write(args.colab / path.name, json.dumps(sources.for_colab(path), ensure_ascii=False, indent=1) + "\n")
        return 0
    from sphinx.cmd.build import main as sphinx

    stems = {p.stem for p in notebooks}
    chosen = [m for m in modules() if not args.only or Path(summary(m)[1]).stem in stems]
    lay_out(args.out / "source", notebooks, chosen)
    flags = ["-q", "-W", "--keep-going", "-j", "auto", "-c", str(HERE), "-d", str(args.out / "doctrees")]
    return sphinx([*flags, str(args.out / "source"), str(args.out / "html")])


if __name__ == "__main__":
    sys.exit(main())
