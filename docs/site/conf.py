"""Sphinx: the site's settings. `build.py` lays the pages out; `make site` runs it."""

import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import apidocs  # noqa: E402
import sources  # noqa: E402

_cfg = sources.CFG

project, author, copyright = _cfg["lib_name"], _cfg["author"], _cfg["copyright"]
version = release = _cfg["version"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "sphinx.ext.mathjax", "apidocs"]

# Notebooks: what is committed is what is shown.
nb_execution_mode = "off"
nb_number_source_lines = False
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_heading_slug_func = "sources.anchor"  # as in JupyterLab

# The reference: docstrings as they are, see apidocs.py.
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
course_names = {path.stem: sources.names(path) for path in sources.NOTEBOOKS}
python_maximum_signature_line_length = 70
python_use_unqualified_type_names = True
add_module_names = False
default_role = "py:obj"
linkcode_resolve = apidocs.source_of

html_theme = "furo"
html_title = _cfg["lib_name"]
html_static_path = [str(HERE / "_static")]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False}  # ← and → step in the steppers
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would fetch more


def _copy_mathjax(app, error):
    "The two parts of MathJax that pages ask for, from the package that ships it."
    if error is None and app.builder.format == "html":
        origin = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
        target = Path(app.outdir) / "_static" / "mathjax"
        fonts = Path("output/chtml/fonts/woff-v2")
        shutil.copytree(origin / fonts, target / fonts, dirs_exist_ok=True)
        shutil.copy(origin / "tex-chtml.js", target)


def _accessible(app, pagename, templatename, context, doctree):
    "Captions are headings of a level; the lines of a long signature are no list, for they have no terms."
    tree = context.get("furo_navigation_tree")
    if tree:
        context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')
    if "<dl>" in context.get("body", ""):
        lines = re.compile(r"<dl>\s*((?:<dd>.*?</dd>\s*)+)</dl>", re.S)
        context["body"] = lines.sub(lambda m: re.sub(r"<(/?)dd>", r"<\1span>", f'<span class="sig-lines">{m[1]}</span>'), context["body"])


def setup(app):
    app.connect("html-page-context", _accessible, priority=900)  # after furo's own
    app.connect("build-finished", _copy_mathjax)
