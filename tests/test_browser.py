"""In real browsers: the notebooks in JupyterLab, and the stepper there, in Voila and as an exported page.

One Chromium shows all of it, and one JupyterLab serves all notebooks: to start them takes longer than most of the tests.
"""

import base64
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from bidi import firefox_page, needs_firefox
from conftest import long
from lab import browser_page, free_port, jupyter_lab, needs_chromium, open_notebook, run_all, wait_until_up
from nbconvert import HTMLExporter

from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPTConfig
from kvcache_lib.stepper import TraceStepper, trace, trace_rows, traces
from kvcache_lib.stepper.pictures import View, headline, reason, row_states, visible

ROOT = Path(__file__).parents[1]
NUMBERED = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
SHOTS = os.environ.get("KVCACHE_SHOTS")  # a folder; the tests leave screenshots there for you to look at

MODEL = """
import torch
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPTConfig
torch.manual_seed(2)
model = GPT_kv(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=10, block_size=12)).eval()
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.25 * torch.randn_like(p))
idx = torch.tensor([[3, 1, 4, 1, 5, 9]])
"""
STEPPER = "from kvcache_lib.stepper import CacheStepper\nstepper = CacheStepper(model, idx, 9)\nstepper"
WHERE = 'print("where", stepper.step, stepper.layer, stepper.head, stepper.cache, stepper.race)'
FILLER = "print('\\n'.join(map(str, range(60))))"
HOST = "[data-kvcache]"


@pytest.fixture(scope="module")
def recorded():
    names = {}
    exec(MODEL, names)
    return trace(names["model"], names["idx"], 9)


def write_notebook(path, *sources):
    "A notebook of these cells, code where they are text, not run yet."
    kernel = dict(name="python3", display_name="Python 3", language="python")
    cells = [nbformat.v4.new_markdown_cell("# A test")] + [nbformat.v4.new_code_cell(source) if isinstance(source, str) else source for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def shoot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SHOTS}/{name}.png")


# What the stepper shows, read from its shadow.
SHOWN = """() => {
    const host = document.querySelector('[data-kvcache]'), root = host.shadowRoot, text = e => e.textContent;
    const cells = [...root.querySelectorAll('svg .seen')].map(c => [+c.dataset.j, +c.dataset.i, +c.querySelector('title').textContent]);
    return {data: {...host.dataset}, head: text(root.querySelector('.head')), why: text(root.querySelector('.why')), note: text(root.querySelector('.note')),
        rows: [...root.querySelectorAll('.row')].map(r => [r.classList[2], text(r.querySelector('.token')), text(r.querySelector('.number'))]),
        lost: root.querySelectorAll('.row.lost').length, masked: root.querySelectorAll('svg .masked').length, cells,
        say: text(root.querySelector('.say')), counters: [...root.querySelectorAll('.left tbody td')].map(text)};
}"""


def assert_shows(got, recorded, step, view=View()):
    "What is shown is what the trace holds: sentences, states, names, every weight."
    here, cache = recorded.steps[step - 1], view.cache
    assert {k: got["data"][k] for k in ("step", "layer", "head", "cache")} == dict(
        step=str(step), layer=str(view.layer), head=str(view.head), cache=str(cache).lower()
    )
    assert (got["head"], got["why"]) == (headline(recorded, step, view), reason(recorded, step, view))
    states, rows = row_states(recorded, step, cache), visible(here.S, recorded.length, 16)
    weights = recorded.weights(step, view.layer, view.head)
    newest = [f"{w:.2f}" for w in weights[-1].tolist()]
    assert got["rows"] == [
        [states[i], str(recorded.text[here.start + i]) if i < here.S else "", newest[i] if i < here.S else ""] for i in rows
    ]
    first = here.P if cache else 0
    assert [c[:2] for c in got["cells"]] == [[j, i] for j in range(first, here.S) for i in range(j + 1)]
    assert [c[2] for c in got["cells"]] == pytest.approx([weights[j, i].item() for j, i, _ in got["cells"]], abs=6e-5)
    assert got["masked"] == sum(here.S - 1 - j for j in range(first, here.S))
    assert got["lost"] == (recorded.lost(step) if cache else 0)


def expect_shows(page, recorded, step, view=View()):
    page.wait_for_function(f"document.querySelector('{HOST}')?.dataset.step === '{step}'", timeout=20_000)
    assert_shows(page.evaluate(SHOWN), recorded, step, view)


def serious(page):
    "What axe-core finds in the page that is serious or critical, in the stepper."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page, context=HOST, options={"resultTypes": ["violations"]}).response["violations"]
    return [(v["id"], v["nodes"][0]["failureSummary"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A page in a browser, with a JupyterLab at `page.url_of_lab` that serves copies of the notebooks from the folder `page.root`."
    root, scratch = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in ROOT.glob("benchmark_results.*"):
        shutil.copy(path, root)
    write_notebook(root / "stepper.ipynb", MODEL, FILLER, STEPPER, WHERE, FILLER)
    with jupyter_lab(root, scratch) as url, browser_page() as page:
        page.root, page.url_of_lab = root, url
        yield page


# --- the notebooks as a reader sees them


@needs_chromium
def test_every_formula_and_table_renders(server):
    "All notebooks' text on one page, a cell each: to open them one by one takes a kernel each, and each cell an editor."
    page, texts = server, []
    for path in NUMBERED:
        prose = [cell["source"] for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        texts.append(nbformat.v4.new_markdown_cell("\n\n".join(prose)))
    write_notebook(page.root / "all.ipynb", *texts)
    open_notebook(page, page.url_of_lab, "all.ipynb")
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


@long
@needs_chromium
def test_the_first_notebook_runs_from_the_top(server):
    "As the stepper's does, below, and as its cells do without a browser."
    page = server
    open_notebook(page, page.url_of_lab, "nbs/00_named_tensors.ipynb")
    assert run_all(page) == []
    assert page.locator(".jp-OutputArea img").count() >= 5
    assert page.errors == []


# --- the stepper


@pytest.fixture(scope="module")
def lab(server):
    "The stepper's notebook, open in JupyterLab and run."
    page = server
    page.set_viewport_size(dict(width=1400, height=900))
    open_notebook(page, page.url_of_lab, "stepper.ipynb")
    assert run_all(page) == []
    page.locator(f"{HOST} .kvs").wait_for(timeout=60_000)
    return page


def run_cell(page, number):
    "Run a cell by its number; the text it printed."
    return page.evaluate(
        """async number => {
            const panel = window.jupyterapp.shell.currentWidget;
            panel.content.activeCellIndex = number;
            await window.jupyterapp.commands.execute('notebook:run-cell');
            return panel.content.widgets[number].model.outputs.toJSON().map(o => o.text ?? '').flat().join('');
        }""",
        number,
    )


@needs_chromium
def test_keys_stay_in_the_stepper(lab, recorded):
    "In JupyterLab: its keys step, and neither scroll the page nor choose another cell; the kernel follows and leads."
    page = lab
    state = "() => [window.jupyterapp.shell.currentWidget.content.activeCellIndex, document.querySelector('.jp-WindowedPanel-outer').scrollTop]"
    page.locator(f"{HOST} button[aria-label='next step']").click()
    expect_shows(page, recorded, 2)
    before = page.evaluate(state)
    page.keyboard.press("ArrowRight")
    expect_shows(page, recorded, 3)
    page.keyboard.press("End")
    expect_shows(page, recorded, 9)
    focused = "() => document.querySelector('[data-kvcache]').shadowRoot.activeElement?.ariaLabel"
    assert page.evaluate(focused) == "next step", "the focus stays at the last step"
    page.keyboard.press("Home")
    expect_shows(page, recorded, 1)
    assert page.evaluate(state) == before, "the page did not move, and the same cell is chosen"
    page.locator(f"{HOST} .kvs").focus()  # this may scroll to it
    before = page.evaluate(state)
    page.keyboard.press("Space")
    page.wait_for_function(f"+document.querySelector('{HOST}').dataset.step >= 2", timeout=10_000)
    page.keyboard.press("Space")
    assert page.evaluate(state) == before
    page.keyboard.press("Home")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    expect_shows(page, recorded, 2)
    page.locator(f"{HOST} .heads button >> nth=1").click()
    page.locator(f"{HOST} [aria-label=layer] button >> nth=1").click()
    page.locator(f"{HOST} [aria-label=mode] button", has_text="without").click()
    expect_shows(page, recorded, 2, View(1, 1, False))
    assert "where 2 1 1 False False" in run_cell(page, 4)
    page.locator(f"{HOST} [aria-label=mode] button", has_text="race").click()
    page.locator(f"{HOST} button", has_text="measure it in the kernel").click()
    page.wait_for_function("document.querySelector('[data-kvcache]').shadowRoot.querySelector('.source').textContent.includes('measured in this kernel')", timeout=20_000)
    page.locator(f"{HOST} [aria-label=mode] button", has_text="without").click()
    page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets[4].model.sharedModel.setSource('stepper.step, stepper.head, stepper.cache = 7, 0, True')")
    run_cell(page, 4)
    expect_shows(page, recorded, 7, View(1, 0))
    assert page.errors == []


@needs_chromium
@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_widths_and_themes(lab, theme):
    "From 500 to 1600 pixels nothing is cut off; two columns from about 900; nothing jumps; axe finds nothing serious."
    page = lab
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}")
    page.wait_for_function(f"document.body.dataset.jpThemeName === 'JupyterLab {theme}'")
    columns = []
    for width in (600, 1000, 1400, 1660, 560):  # JupyterLab takes 60 to 130 of them
        page.set_viewport_size(dict(width=width, height=900))
        page.locator(f"{HOST} .bar").scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        cut = page.evaluate("""() => { const h = document.querySelector('[data-kvcache]'), frame = h.shadowRoot.querySelector('.kvs'), right = h.getBoundingClientRect().right;
            return [...frame.querySelectorAll('*')].filter(e => e.getClientRects().length && !e.closest('.strip,.written,td,th,.radios.narrow,bdi') && e.getBoundingClientRect().right > right + 1).map(e => e.outerHTML.slice(0, 80)) }""")
        assert cut == [], width
        columns.append(page.evaluate("() => getComputedStyle(document.querySelector('[data-kvcache]').shadowRoot.querySelector('.panels')).gridTemplateColumns.split(' ').length"))
        heights = []
        for key in ["Home"] + ["ArrowRight"] * 8:
            page.locator(f"{HOST} .kvs").focus() if key == "Home" else None
            page.keyboard.press(key)
            heights.append(page.evaluate("() => document.querySelector('[data-kvcache]').offsetHeight"))
        assert len(set(heights)) == 1, (width, heights)
        shoot(page, f"lab_{theme.lower()}_{width}")
    assert columns == [1, 2, 2, 2, 1]
    assert serious(page) == []


@needs_chromium
def test_saved_restarted_reopened_untrusted(lab, recorded):
    "After a restart the page steps on and says so. Opened again, it steps by itself. Not trusted, a picture is there."
    page = lab
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }")
    page.wait_for_function("document.querySelector('[data-kvcache]').shadowRoot.querySelector('.note').textContent.includes('is gone')", timeout=30_000)
    page.locator(f"{HOST} .kvs").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect_shows(page, recorded, 2, View(1, 0))

    saved = page.root / "stepper.ipynb"
    notebook = json.loads(saved.read_text())
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    assert [sorted(o["data"]) for o in outputs] == [["text/html", "text/plain"]] and "widgets" not in notebook["metadata"]
    page.reload()
    page.locator(f"{HOST} .kvs").wait_for(timeout=60_000)
    page.locator(f"{HOST} .kvs").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect_shows(page, recorded, 2)
    assert page.evaluate(SHOWN)["note"].startswith("No kernel")

    notebook["cells"].append(nbformat.v4.new_markdown_cell("Changed by someone else."))
    (page.root / "foreign.ipynb").write_text(json.dumps(notebook))
    open_notebook(page, page.url_of_lab, "foreign.ipynb")
    image = page.locator(".jp-OutputArea img[src^='data:image/png']")
    image.wait_for(timeout=30_000)
    assert page.locator(f"{HOST} .kvs").count() == 0
    assert image.get_attribute("alt").startswith(headline(recorded, 1, View()))
    assert image.evaluate("e => e.naturalWidth") > 300
    shoot(page, "lab_untrusted")


@contextlib.contextmanager
def voila(notebook, scratch):
    "The address of a Voila that shows one notebook."
    port, log = free_port(), scratch / "voila.log"
    flags = ["--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", "--KernelManager.transport_encryption=auto"]
    folders = {f"JUPYTER_{name.upper()}_DIR": str(scratch / name) for name in ("config", "data", "runtime")}
    with open(log, "w") as out:
        command = [sys.executable, "-m", "voila", str(notebook), *flags]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | folders)
        try:
            wait_until_up(f"http://127.0.0.1:{port}/voila/static/voila.js", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def another_page(lab):
    "A page of its own in the browser that is running."
    page = lab.context.browser.new_page(viewport=dict(width=1200, height=1000))
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.close()


@long
@needs_chromium
@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="Voila is not installed: pip install voila")
def test_voila(lab, recorded, tmp_path):
    "With a kernel behind it: an ordinary widget follows the stepper, through the kernel."
    follow = "\nimport ipywidgets as W\nfollower = W.Label('step 1')\nstepper.observe(lambda c: setattr(follower, 'value', f'step {c.new}'), 'step')\nfollower"
    write_notebook(tmp_path / "stepper.ipynb", MODEL, STEPPER, follow)
    with voila(tmp_path / "stepper.ipynb", tmp_path) as url, another_page(lab) as page:
        page.goto(url, timeout=90_000)
        page.locator(f"{HOST} .kvs").wait_for(timeout=90_000)
        page.locator(".widget-label").wait_for(timeout=30_000)
        page.locator(f"{HOST} .kvs").focus()
        page.keyboard.press("ArrowRight")
        expect_shows(page, recorded, 2)
        page.get_by_text("step 2", exact=True).wait_for(timeout=20_000)
        shoot(page, "voila")
        assert page.errors == []


@pytest.fixture(scope="module")
def exported(recorded, tmp_path_factory):
    "A page as nbconvert makes it from a saved notebook."
    folder = tmp_path_factory.mktemp("exported")
    stepper = TraceStepper(recorded)
    output = nbformat.v4.new_output("execute_result", data=stepper._repr_mimebundle_(), execution_count=1)
    stepper.close()
    cell = nbformat.v4.new_code_cell("stepper", outputs=[output], execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "stepper.ipynb")
    page, _ = HTMLExporter().from_filename(str(folder / "stepper.ipynb"))
    (folder / "stepper.html").write_text(page, encoding="utf-8")
    return folder / "stepper.html"


@needs_chromium
def test_exported_page_without_a_network(lab, recorded, exported):
    "Every step, layer, head and mode, from a file; the arithmetic of a token; the race; nothing is asked of the network."
    blocked = []
    with another_page(lab) as page:
        page.context.route(re.compile("^(https?|wss?):"), lambda route: (blocked.append(route.request.url), route.abort()))
        page.goto(exported.as_uri(), wait_until="load")
        page.locator(f"{HOST} .kvs").wait_for(timeout=30_000)
        for layer in (0, 1):
            page.locator(f"{HOST} [aria-label=layer] button >> nth={layer}").click()
            for cache, name in ((True, "with the cache"), (False, "without")):
                page.locator(f"{HOST} [aria-label=mode] button", has_text=name).first.click()
                page.keyboard.press("Home")
                for step in range(1, 10):
                    expect_shows(page, recorded, step, View(layer, 0, cache))
                    page.keyboard.press("ArrowRight")
        page.locator(f"{HOST} [aria-label=mode] button", has_text="with the cache").click()
        page.locator(f"{HOST} .row >> nth=2").hover()
        w = recorded.weights(9, 1, 0)[-1, 2].item()
        q, k, _ = recorded.rows(9, 1, 0)
        said = page.evaluate(SHOWN)["say"].replace("−", "-")
        assert f"= {w:.3f}" in said and f"= {(q[-1] @ k[2]).item():.2f}" in said and "/ √16 = " in said
        page.locator(f"{HOST} .rows").focus()
        for _ in range(3):
            page.keyboard.press("ArrowUp")
        assert f"{recorded.weights(9, 1, 0)[-1, 9].item():.3f} · (" in page.evaluate(SHOWN)["say"].replace("−", "-")
        shoot(page, "exported")

        page.locator(f"{HOST} [aria-label=mode] button", has_text="race").click()
        page.locator(f"{HOST} button[aria-label='play the steps']").click()
        page.wait_for_function("document.querySelector('[data-kvcache]').shadowRoot.querySelector('.head').textContent.includes('times as long')", timeout=20_000)
        cells = page.locator(f"{HOST} .race td").all_text_contents()
        encoded = [sum(s.T for s in recorded.steps), sum(s.S for s in recorded.steps)]
        assert cells[1:3] == [str(n) for n in encoded] or str(encoded[0]) in cells and str(encoded[1]) in cells
        assert "not measured" in page.locator(f"{HOST} .source").text_content()
        shoot(page, "race")
        assert page.errors == []
    assert not [url for url in blocked if "mathjax" not in url.lower() and "require" not in url.lower() and "mermaid" not in url.lower()]


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_bare_page_follows_the_system(lab, recorded, scheme, tmp_path):
    "Where no theme is at hand, the system's colours; no motion where none is wanted; axe finds nothing serious, in the race neither."
    stepper = TraceStepper(recorded, step=2)
    output = stepper._repr_mimebundle_()["text/html"]
    stepper.close()
    ground = {"light": "#ffffff", "dark": "#0d1117"}[scheme]  # GitHub's, for the README's pictures
    style = f"<style>body {{ margin: 8px; background: {ground} }}</style>"
    (tmp_path / "bare.html").write_text(f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Bare</title>{style}<main>{output}</main></html>")
    with another_page(lab) as page:
        page.set_viewport_size(dict(width=1000, height=720))
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.goto((tmp_path / "bare.html").as_uri())
        frame = page.locator(f"{HOST} .kvs")
        frame.wait_for(timeout=30_000)
        expect_shows(page, recorded, 2)
        assert ("dark" in frame.get_attribute("class").split()) == (scheme == "dark")
        assert not page.locator(f"{HOST} input[type=checkbox]").is_checked()
        assert serious(page) == []
        if SHOTS:
            frame.screenshot(path=f"{SHOTS}/stepper_{scheme}.png")  # the README's
        page.locator(f"{HOST} [aria-label=mode] button", has_text="race").click()
        page.keyboard.press("End")
        assert serious(page) == []
        assert page.errors == []


@needs_chromium
def test_long_wide_and_a_batch(lab, tmp_path):
    "60 tokens with long and right-to-left names, 48 layers, 25 heads, two texts: nothing is cut off; each text, layer and head is shown."
    torch.manual_seed(0)
    model = GPT_kv(GPTConfig(n_layer=48, n_head=25, n_embd=50, vocab_size=6, block_size=64)).eval()
    both = traces(model, torch.randint(6, (2, 58)), 3)
    words = ["a", "internationalisation", "שלום", "两", "<b>&", " \n"]
    stepper = TraceStepper(both, vocab=words, step=3, layer=47, head=24)
    (tmp_path / "wide.html").write_text(f"<!doctype html><meta charset='utf-8'>{stepper._repr_mimebundle_()['text/html']}")
    stepper.close()
    with another_page(lab) as page:
        page.set_viewport_size(dict(width=700, height=900))
        page.goto((tmp_path / "wide.html").as_uri())
        page.locator(f"{HOST} .kvs").wait_for(timeout=30_000)
        shown = visible(60, 60, 16)
        for text in (0, 1):
            page.locator(f"{HOST} [aria-label='text of the batch'] button >> nth={text}").click()
            page.keyboard.press("End")
            rows, weights = page.evaluate(SHOWN)["rows"], both[text].weights(3, 47, 24)[-1]
            assert [row[2] for row in rows if row[0] != "gap"] == [f"{weights[i]:.2f}" for i in shown if i is not None]
            hidden = 1 - sum(weights[i].item() for i in shown if i is not None)
            assert float(rows[3][2]) == pytest.approx(hidden, abs=0.006) and rows[3][1] == "45 more"
            names = [words[both[text].text[i]].replace(" ", "␣").replace("\n", "↵") for i in shown if i is not None]
            assert [row[1] for row in rows if row[0] != "gap"] == names
        page.keyboard.press("Home")
        page.locator(f"{HOST} svg .seen[data-j='57'][data-i='1']").click()  # the last token of the prompt asks
        page.locator(f"{HOST} svg .seen[data-j='2'][data-i='1']").click()  # the token at position 2 asks
        want = both[1].weights(1, 47, 24)[2]
        rows = page.evaluate(SHOWN)["rows"]
        assert [row[2] for row in rows[:3]] == [f"{w:.2f}" for w in want[:3].tolist()] and rows[5][2] == "masked"
        page.locator(f"{HOST} [aria-label=layer] button >> nth=6").click()
        page.locator(f"{HOST} .heads button >> nth=11").click()
        data = page.evaluate(SHOWN)["data"]
        assert (data["layer"], data["head"], data["text"]) == ("6", "11", "1")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 700
        shoot(page, "wide")
        assert page.errors == []


@needs_chromium
def test_rows_by_hand_count_from_0(lab, tmp_path):
    "Without a text the tokens are x0, x1, …; places, heads and the words count from 0, as the positions in code do."
    one = trace_rows(torch.eye(3), torch.eye(3), torch.eye(3), [2, 1])
    stepper = TraceStepper(one, step=2)
    (tmp_path / "rows.html").write_text(f"<!doctype html><meta charset='utf-8'>{stepper._repr_mimebundle_()['text/html']}")
    stepper.close()
    with another_page(lab) as page:
        page.goto((tmp_path / "rows.html").as_uri())
        page.locator(f"{HOST} .kvs").wait_for(timeout=30_000)
        got, texts = page.evaluate(SHOWN), lambda selector: page.locator(f"{HOST} {selector}").all_text_contents()
        assert [row[1] for row in got["rows"]] == ["x0", "x1", "x2"]
        assert texts(".row .place") == ["0", "1", "2"] and texts(".strip small") == ["0", "1", "2"]
        assert got["head"] == headline(one, 2, View()) == "Step 2 of 2: token 2 is encoded. The rows of tokens 0–1 are read from the cache."
        assert "Token 2, “x2”, asks. Token 2, “x2”, answers:" in got["say"]
        assert (got["data"]["layer"], got["data"]["head"], got["data"]["text"]) == ("0", "0", "0")
        assert page.errors == []


@long
@needs_firefox
def test_firefox_steps_through_an_exported_page(recorded, exported, tmp_path):
    with firefox_page(tmp_path) as page:
        page.resize(1000, 900)
        page.goto(exported.as_uri())
        for _ in range(100):
            if page.evaluate(f"() => Boolean(document.querySelector('{HOST}')?.shadowRoot)"):
                break
            time.sleep(0.1)
        assert_shows(page.evaluate(SHOWN), recorded, 1)
        page.evaluate(f"() => document.querySelector('{HOST}').shadowRoot.querySelector('.kvs').focus()")
        page.press("ArrowRight", "ArrowRight")
        assert_shows(page.evaluate(SHOWN), recorded, 3)
        page.press("End")
        assert_shows(page.evaluate(SHOWN), recorded, 9)
        assert page.evaluate("() => scrollY") == 0
        if SHOTS:
            (Path(SHOTS) / "firefox.png").write_bytes(base64.b64decode(page.screenshot()))
