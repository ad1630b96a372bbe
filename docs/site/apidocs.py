"""The reference: docstrings as they are, made reStructuredText, and links from the notebooks' text to it."""

import inspect
import re
from importlib import import_module
from pathlib import Path

from docutils import nodes
from sphinx.util.nodes import make_refnode

import sources

NAMES = r"[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*: "
ITEM = re.compile(rf"^(?={NAMES})|^(?=(?:Raises|Returns)\b)", re.M)


def inline(text: str) -> str:
    "A line of a docstring: its `code` as code, or as a link where there is something of that name; all else as text."
    parts = re.split(r"`([^`]+)`", text)
    for n, part in enumerate(parts):
        if n % 2 == 0:
            parts[n] = re.sub(r"([\\*_|`])", r"\\\1", part)
        else:
            name = re.fullmatch(r"[A-Za-z_][\w.]*", part)
            parts[n] = rf"\ :py:obj:`{part}`\ " if name else rf"\ :code:`{part.replace(chr(92), chr(92) * 2)}`\ "
    return "".join(parts)


def rst(docstring: str) -> list:
    """The lines of a docstring as reStructuredText.

    Paragraphs and numbered lists stay. A line, or what follows two spaces, that begins with `name:` becomes an item.
    """
    found = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        if re.match(r"\s+", block) or ">>> " in block:
            found += ["::", "", *("    " + line for line in block.splitlines()), ""]
            continue
        numbered = re.match(r"\d+\. ", block)
        block = re.sub(rf"  (?={NAMES})", "\n", block)
        block = re.sub(r"([.:)]) (?=Raises\b)", r"\1\n", block)
        parts = re.split(r"\n(?=\d+\. )", block) if numbered else ITEM.split(block)
        for part in filter(None, (" ".join(p.split()) for p in parts)):
            name = not numbered and re.match(NAMES, part)
            if name:
                part, rest = name[0][:-2], part[name.end() :]
                found.append(f"* **{inline(part)}**: {inline(rest)}")
            else:
                found += ["", inline(part), ""]
        found.append("")
    return found


def process_docstring(app, what, name, obj, options, lines):
    text = "\n".join(lines)
    lines[:] = [] if text.startswith("Alias for field number") else rst(text)  # which collections.namedtuple writes


def known(env) -> dict:
    "Every name by which an object of the reference is called: its whole name, and those of classes that are alone."
    objects = env.get_domain("py").objects
    short = {}
    for name, entry in objects.items():
        if entry.objtype in ("class", "exception"):
            short.setdefault(name.rsplit(".", 1)[1], []).append(name)
    return {s: full[0] for s, full in short.items() if len(full) == 1} | {name: name for name in objects}


def within(node, *kinds) -> bool:
    "Whether a node lies in one of these kinds, at any depth."
    while node is not None and not isinstance(node, kinds):
        node = node.parent
    return node is not None


def link_names(app, doctree, docname):
    "Where a notebook's text names something of the library as code, it is a link to the reference."
    if docname.startswith("api/"):
        return
    objects = app.env.get_domain("py").objects
    meant = known(app.env) | app.config.course_names.get(docname, {})
    for literal in list(doctree.findall(nodes.literal)):
        if within(literal, nodes.reference, nodes.title):
            continue
        name = re.sub(r"\(.*\)$", "", literal.astext())
        head, _, tail = name.partition(".")
        full = meant.get(name) or (f"{meant[head]}.{tail}" if head in meant else None) or f"kvcache_lib.{name}" * ("." in name)
        full = full if full in objects else home(full)
        if full in objects:
            entry = objects[full]
            link = make_refnode(app.builder, docname, entry.docname, entry.node_id, [literal.deepcopy()], full)
            literal.replace_self(link)


def home(full: str) -> str:
    "Where an object is defined that another module passes on; the same name if there is none."
    module, _, name = (full or "").rpartition(".")
    if not module.startswith("kvcache_lib"):
        return full
    try:
        found = getattr(import_module(module), name)
        return f"{found.__module__}.{found.__qualname__}"
    except (ImportError, AttributeError):
        return full


def source_of(domain: str, info: dict) -> str | None:
    "Where the lines of an object stand in the repository; None for what has none, such as a number."
    found = import_module(info["module"])
    try:
        for name in info["fullname"].split("."):
            found = getattr(found, name)
        found = inspect.unwrap(found.fget if isinstance(found, property) else found)
        file, (lines, first) = Path(inspect.getsourcefile(found)), inspect.getsourcelines(found)
        return f"{sources.HOME}/blob/{sources.CFG['branch']}/{file.relative_to(sources.ROOT).as_posix()}#L{first}-L{first + len(lines) - 1}"
    except (AttributeError, TypeError, OSError, ValueError):
        return None


def setup(app):
    app.add_config_value("course_names", {}, "env", dict)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("doctree-resolved", link_names)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
