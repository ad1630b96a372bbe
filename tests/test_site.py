"""The site: what its pages hold, and how they behave in a browser. `make site-test` looks at all pages, `make test-long` at a few."""

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import LONG
from lab import browser_page, needs_chromium

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "site"))
import sources  # noqa: E402

WHOLE = os.environ.get("KVCACHE_SITE")  # a site that is built already, to be looked at whole
SHOTS = os.environ.get("KVCACHE_SHOTS")
needs_sphinx = pytest.mark.skipif(importlib.util.find_spec("myst_nb") is None, reason="needs the extra `site`")
by_number = pytest.mark.parametrize("path", sources.NOTEBOOKS, ids=lambda p: p.stem)


@by_number
def test_a_page_leads_only_where_there_is_something(path):
    notebook = sources.page(path, sources.NOTEBOOKS[:2])  # as if there were two pages: all other links lead to the repository
    text = "\n".join(c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")
    outputs = [o["data"]["text/markdown"] for c in notebook["cells"] for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    inside = 0
    for target in re.findall(r"\]\((?!#)([^)\s]+)\)", "\n".join([text, *outputs])):
        if target.startswith(sources.HOME):
            file = urlsplit(target).path.removeprefix(urlsplit(f"{sources.HOME}/blob/{sources.CFG['branch']}/").path)
            assert (ROOT / file).is_file(), target
            inside += 1
        else:
            assert target.startswith("https://") or target.partition("#")[0] in {p.name for p in sources.NOTEBOOKS[:2]}, target
    assert inside or path == sources.NOTEBOOKS[0] or "](" not in text
    code = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(source.strip() and not re.search(r"^#\|", source, re.M) for source in code)
    assert text.count('class="places"') == 1 and path.name in text.split("</p>")[0]
    assert text.startswith(f"# {sources.about(path)['title']}\n") and sources.about(path)["minutes"]


def test_the_notebooks_for_colab_begin_with_the_cell_that_installs():
    for path in sources.NOTEBOOKS:
        first, *others = sources.for_colab(path)["cells"]
        assert others == sources.read(path)["cells"]
        assert f"git clone -q --depth 1 -b {sources.COLAB_BRANCH} {sources.HOME} /content/{sources.CFG['repo']}" in first["source"]
        assert "{" not in first["source"] and first["cell_type"] == "code"
    workflow = (ROOT / ".github/workflows/site.yml").read_text(encoding="utf-8")
    assert f"refs/heads/{sources.COLAB_BRANCH}\n" in workflow


def test_binder_and_the_workflow_take_the_pytorch_that_was_tested():
    tested = re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    for file in (".binder/requirements.txt", ".github/workflows/site.yml"):
        assert re.findall(r"torch==[\d.]+", (ROOT / file).read_text(encoding="utf-8")) == [tested]
    assert "learn_requirements" in sources.CFG and "'.[learn]'" in (ROOT / ".binder/postBuild").read_text(encoding="utf-8")


def test_names_of_a_notebook_are_those_it_imports_and_exports():
    (gpt,) = [sources.names(p) for p in sources.NOTEBOOKS if p.stem == "04_gpt"]
    assert gpt["GPT_kv"] == "kvcache_lib.gpt.GPT_kv" and gpt["Block_kv"] == "kvcache_lib.block.Block_kv"


@needs_sphinx
def test_docstrings_become_lists_of_their_names():
    from apidocs import rst

    text = "A cost, `2 * a_b`, of `step`.\n\nidx: (B, t) *tokens*.  out_: |S|, or\nNone. Raises ValueError if not.\n\n1. One\n   more.\n2. Two."
    assert [line for line in rst(text) if line] == [
        r"A cost, \ :code:`2 * a_b`\ , of \ :py:obj:`step`\ .",
        r"* **idx**: (B, t) \*tokens\*.",
        r"* **out\_**: \|S\|, or None.",
        "Raises ValueError if not.",
        "1. One more.",
        "2. Two.",
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the built site: a part of it, unless there is a whole one."
    if WHOLE:
        return Path(WHOLE)
    if not LONG:
        pytest.skip("to build it takes a while: make site-test, or KVCACHE_LONG=1")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs/site/build.py"), "--only", "00", "03", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr[-3000:]
    return out / "html"


class Links(HTMLParser):
    "The ids of a page, and what it refers to."

    def __init__(self, text):
        super().__init__()
        self.ids, self.targets = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given.get("id"), given.get("name")}
        self.targets += [(tag, given[key]) for key in ("href", "src") if given.get(key)]


@needs_sphinx
def test_links_within_the_site_lead_somewhere(site):
    pages = {p.resolve(): Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    assert len(pages) > 8
    checked = 0
    for path, page in pages.items():
        for tag, target in page.targets:
            url = urlsplit(target)
            if url.scheme == "data" or url.scheme and tag == "a":
                continue
            assert not url.scheme and not url.netloc, f"{path.name} loads {target}"
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert there.is_file(), f"{path.name}: {target}"
            if url.fragment and there.suffix == ".html":
                assert unquote(url.fragment) in pages[there].ids, f"{path.name}: {target}"
            checked += 1
    assert checked > 300


@contextlib.contextmanager
def served(folder):
    "The address of a server of a folder."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(site):
    "A page that notes what it asks for: `asked`, and what of it fails."
    with served(site) as url, browser_page() as page:
        page.url_of_site, page.asked, page.failed = url, [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("requestfailed", lambda request: page.failed.append(request.url))
        page.on("response", lambda response: page.failed.append(response.url) if response.status >= 400 else None)
        yield page


def opened(page, name, width=1200):
    page.set_viewport_size(dict(width=width, height=900))
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.goto(page.url_of_site + name, wait_until="load")
    page.wait_for_function("""async () => { await window.MathJax?.startup?.promise;
        return [...document.querySelectorAll('[data-kvcache]')].every(host => host.shadowRoot?.querySelector('.kvs')) }""")
    settle(page)


def settle(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")


def shoot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SHOTS}/site_{name}.png")


@needs_sphinx
@needs_chromium
def test_every_page(site, browser):
    "Nothing leaves the site or is missing; axe finds nothing serious, light or dark; on a phone nothing scrolls sideways."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = []
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    names = names if WHOLE else ["index.html", "03_block.html", "api/block.html"]
    glyphs = dict(exclude=[["mjx-math"]])  # what MathJax draws, and hides from screen readers; beside it is MathML for them
    for name in names:
        opened(browser, name)
        for width, scheme in ((1200, "light"), (390, "dark")):
            browser.set_viewport_size(dict(width=width, height=900))
            browser.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            settle(browser)
            wide = browser.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                found.append((name, width, f"{wide} pixels wide"))
            violations = axe.run(browser, context=glyphs, options={"resultTypes": ["violations"]}).response["violations"]
            for v in violations:
                if v["impact"] in ("serious", "critical"):
                    found.append((name, scheme, v["id"], len(v["nodes"]), v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"][:300]))
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        (Path(SHOTS) / "site_requests.txt").write_text("\n".join(browser.asked) + "\n")
    assert found == []
    assert browser.errors == [] and browser.failed == []
    inside = [url for url in browser.asked if url.startswith((browser.url_of_site, "blob:" + browser.url_of_site, "data:"))]
    assert len(inside) == len(browser.asked) > 2 * len(names), [url for url in browser.asked if url not in inside]


@needs_sphinx
@needs_chromium
def test_the_first_page_plays(browser):
    "Its stepper steps, its race ends with the same text; both are dark where the page is."
    page = browser
    opened(page, "index.html")
    step, race = page.locator("[data-kvcache]").nth(0), page.locator("[data-kvcache]").nth(1)
    before = step.get_attribute("data-step")
    step.locator("button[aria-label='next step']").click()
    assert step.get_attribute("data-step") == str(int(before) + 1)
    assert "read from the cache" in step.locator(".head").text_content()
    race.locator("button[aria-label='play the steps']").click()
    race.locator(".head", has_text="times as long").wait_for(timeout=20_000)
    assert "dark" not in step.locator(".kvs").get_attribute("class").split()
    page.evaluate("document.body.dataset.theme = 'dark'")
    page.wait_for_function("[...document.querySelectorAll('[data-kvcache]')].every(h => h.shadowRoot.querySelector('.kvs.dark'))")
    shoot(page, "first_dark")
    assert page.errors == []


@needs_sphinx
@needs_chromium
def test_a_notebook_page(browser):
    "00: contents on both sides, the next page, formulas with the site's own fonts, folds, a stepper, links to the reference."
    page = browser
    opened(page, "00_named_tensors.html", 1500)
    assert page.locator(".sidebar-tree a.current").is_visible() and page.locator(".toc-tree a").count() > 8
    assert page.locator(".related-pages a.next-page").get_attribute("href").endswith(".html")
    assert page.locator("mjx-container").count() > 20
    assert [u for u in page.asked if u.endswith(".woff")] and page.evaluate("document.fonts.check('12px MJXTEX')")
    folded = page.locator("div.cell details").first
    assert not folded.locator("pre").first.is_visible()
    folded.locator("summary").click()
    assert folded.locator("pre").first.is_visible()
    answer = page.locator("details:has(> summary:text-is('Answer'))").first
    assert not answer.locator("p").first.is_visible() and answer.evaluate("e => e.open = true")
    assert answer.locator("p").first.is_visible()
    host = page.locator("[data-kvcache]").first
    host.locator("button[aria-label='next step']").click()
    assert host.get_attribute("data-step") == "3"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("article details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("article details:not([open])").count() > 0


@needs_sphinx
def test_the_text_links_to_the_reference(site):
    targets = {target for _, target in Links((site / "03_block.html").read_text(encoding="utf-8")).targets}
    assert {"api/block.html", "api/block.html#kvcache_lib.block.Block_kv.forward"} <= targets


@needs_sphinx
@needs_chromium
def test_the_search_finds(browser):
    opened(browser, "search.html?q=softmax")
    browser.locator("#search-results li a").first.wait_for(timeout=20_000)
    assert any("00_named" in a.get_attribute("href") for a in browser.locator("#search-results li a").all())


@pytest.mark.skipif(not WHOLE, reason="takes two minutes and a package index: `make site-test`")
def test_the_cell_that_installs_in_a_clean_environment(tmp_path):
    "As in Colab: IPython 7 and what Colab has, nothing of ours; then notebook 00 runs."
    repository = tmp_path / "origin"
    subprocess.run(["git", "clone", "-q", str(ROOT), repository], check=True)
    subprocess.run(["git", "checkout", "-q", "-B", sources.COLAB_BRANCH], cwd=repository, check=True)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    given = ["ipython==7.34.0", "ipywidgets==7.7.1", "torch==2.13.0", "numpy", "matplotlib", "pillow", "tqdm", "setuptools", "wheel"]
    subprocess.run([venv / "bin/python", "-m", "pip", "install", "-q", *given], check=True)
    notebook = sources.for_colab(ROOT / "nbs/00_named_tensors.ipynb")
    install = notebook["cells"][0]["source"]
    notebook["cells"][0]["source"] = install.replace("/content/", f"{tmp_path}/content/").replace(sources.HOME, repository.as_uri())
    end = dict(notebook["cells"][0], id="end", source="import pathlib, kvcache_lib\nassert 'site-packages' in kvcache_lib.__file__\npathlib.Path('../ended').touch()")
    notebook["cells"].append(end)
    (tmp_path / "colab.ipynb").write_text(json.dumps(notebook))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{venv}/bin:{os.environ['PATH']}", "MPLBACKEND": "agg"}
    ran = subprocess.run([venv / "bin/ipython", "colab.ipynb"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert (tmp_path / "content" / sources.CFG["repo"] / "ended").exists(), (ran.stdout + ran.stderr)[-3000:]
