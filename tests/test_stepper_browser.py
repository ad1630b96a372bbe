"""The stepper in real JupyterLab, in Voila, and as an exported page, in real Chromium."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from lab import browser_page, free_port, jupyter_lab, needs_chromium, open_notebook, run_all, wait_until_up

from kvcache_lib.shapes import Text
from kvcache_lib.stepper import View, picture, trace

pytestmark = needs_chromium
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
NUMBERS = ".kvs-controls input[type=number]"  # layer, head
COUNT = """
import gc, ipywidgets
gc.collect()
hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
print(f"widgets {len(ipywidgets.widgets.widget._instances)} hooks {hooks}.")
"""


@pytest.fixture(scope="module")
def recorded():
    names = {}
    exec(MODEL, names)
    return trace(names["model"], names["idx"], 9)


def write_notebook(path, *sources):
    "A notebook of these code cells, not run yet."
    kernel = dict(name="python3", display_name="Python 3", language="python")
    cells = [nbformat.v4.new_markdown_cell("# A test")] + [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def shoot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SHOTS}/{name}.png")


def assert_shows(scope, recorded, step, view=View()):
    "The page shows what the trace holds: the sentence, the text and states of every panel, the counters, the alternatives."
    from playwright.sync_api import expect

    want = picture(recorded, step, view)
    panels = want.panels.values()
    card = scope.locator(".kvs")
    expect(card.locator(".head")).to_have_text(want.headline, timeout=20_000)
    for name, value in want.data.items():
        expect(card).to_have_attribute(f"data-{name}", str(value))
    for state in ("new", "again", "read", "none", "struck", "masked"):
        boxes = sum(getattr(shape, "kind", "") == state for panel in panels for shape in panel.shapes)
        assert card.locator(f"rect.{state}").count() == boxes, state
    texts = sorted(shape.s for panel in panels for shape in panel.shapes if isinstance(shape, Text) and shape.s)
    assert sorted(text for text in card.locator("svg text").all_text_contents() if text) == texts
    shown = card.locator("tbody tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
    assert [tuple(row) for row in shown] == want.counters
    for panel in panels:
        assert card.get_by_role("img", name=panel.alt, exact=True).count() == 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The notebook, open in JupyterLab and run."
    root, scratch = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    write_notebook(root / "stepper.ipynb", MODEL, STEPPER, COUNT)
    with jupyter_lab(root, scratch) as url, browser_page() as page:
        page.set_viewport_size(dict(width=1500, height=1150))
        open_notebook(page, url, "stepper.ipynb")
        assert run_all(page) == []
        page.locator(".jp-OutputArea .kvs").wait_for(timeout=60_000)
        yield page


@pytest.fixture
def page(lab, recorded):
    "The notebook with its controls as they were at first: step 1, layer 1, head 1, with the cache."
    lab.get_by_role("button", name="with the cache").click()
    for number in lab.locator(NUMBERS).all():
        number.fill("1")
        number.press("Enter")
    lab.locator(".noUi-handle").first.focus()
    lab.keyboard.press("Home")
    assert_shows(lab, recorded, 1)
    yield lab
    assert lab.errors == []


def test_keyboard_in_jupyterlab(page, recorded):
    page.locator(".noUi-handle").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert_shows(page, recorded, 4)
    page.keyboard.press("ArrowLeft")
    assert_shows(page, recorded, 3)
    page.keyboard.press("End")
    assert_shows(page, recorded, 9)
    page.keyboard.press("Home")
    assert_shows(page, recorded, 1)


def test_every_control_is_reached_with_tab(page, recorded):
    page.get_by_role("button", name="next ▶").focus()
    page.keyboard.press("Enter")
    assert_shows(page, recorded, 2)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.className + ' ' + e.tagName + ' ' + e.textContent.trim())(document.activeElement)"))
    for part in ("noUi-handle", "with the cache", "without"):
        assert any(part in name for name in reached), (part, reached)
    assert sum("INPUT" in name for name in reached) == 2, ("layer and head", reached)
    page.get_by_role("button", name="◀ previous").focus()
    page.keyboard.press("Enter")
    assert_shows(page, recorded, 1)


def test_layer_head_and_cache(page, recorded):
    layer, head = page.locator(NUMBERS).all()
    layer.focus()
    page.keyboard.press("ArrowUp")
    assert_shows(page, recorded, 1, View(layer=2))
    head.fill("2")
    head.press("Enter")
    assert_shows(page, recorded, 1, View(layer=2, head=2))
    page.get_by_role("button", name="next ▶").click()
    page.get_by_role("button", name="without", exact=True).click()
    assert_shows(page, recorded, 2, View(layer=2, head=2, cache=False))
    assert page.locator(".kvs rect.again").count() == 6 and page.locator(".kvs rect.read").count() == 0
    shoot(page, "lab_without_cache")
    page.get_by_role("button", name="with the cache").click()
    assert_shows(page, recorded, 2, View(layer=2, head=2))


def test_play_goes_past_the_block(page, recorded):
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert_shows(page, recorded, 6)
    page.locator(".jupyter-widget-play button, .widget-play button").first.click()
    assert_shows(page, recorded, 9)
    page.wait_for_timeout(1500)  # it plays on until its clock finds no step left
    assert_shows(page, recorded, 9)
    assert page.locator(".kvs .why").text_content().startswith("The text has 14 tokens, the block 12 places.")
    assert page.locator(".kvs rect.struck").count() == 12


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_themes_and_zoom(page, recorded, theme):
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
    page.wait_for_function(f"document.body.dataset.jpThemeName === '{theme}'")
    page.get_by_role("button", name="next ▶").click()
    assert_shows(page, recorded, 2)
    for width, zoom in ((1500, 100), (750, 200)):  # half the width is what zooming to 200 % leaves
        page.set_viewport_size(dict(width=width, height=1150 * width // 1500))
        card = page.locator(".kvs")
        card.scroll_into_view_if_needed()
        look = card.evaluate("e => [getComputedStyle(e).backgroundColor, getComputedStyle(e.querySelector('td')).color]")
        assert look == ["rgb(255, 255, 255)", "rgb(26, 26, 26)"]
        smallest = card.evaluate("""e => Math.min(...[...e.querySelectorAll('svg[role=img]')].flatMap(svg => {
            const shrunk = svg.getBoundingClientRect().width / svg.getAttribute('width');
            return [...svg.querySelectorAll('text')].map(text => shrunk * parseFloat(getComputedStyle(text).fontSize)) }))""")
        assert smallest * zoom / 100 >= 8.5, "the smallest text, in pixels of the screen"
        shoot(page, f"lab_{theme[11:].lower()}_{zoom}")
    page.set_viewport_size(dict(width=1500, height=1150))


def test_running_the_cells_again_keeps_nothing(page):
    output = page.locator(".jp-OutputArea-output pre", has_text="hooks")
    counts = [output.text_content()]
    for _ in range(2):
        page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        output.wait_for(state="detached", timeout=30_000)
        assert run_all(page) == []
        output.wait_for(timeout=30_000)
        counts.append(output.text_content())
    assert len(set(counts)) == 1 and "hooks 0." in counts[0], counts


@contextlib.contextmanager
def another_page(lab):
    "A page of its own in the browser that is running."
    page = lab.context.browser.new_page(viewport=dict(width=1200, height=1000))
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.close()


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


@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="Voila is not installed: pip install voila")
def test_voila(lab, recorded, tmp_path):
    write_notebook(tmp_path / "stepper.ipynb", MODEL + STEPPER)
    with voila(tmp_path / "stepper.ipynb", tmp_path) as url, another_page(lab) as page:
        page.goto(url, timeout=90_000)
        page.locator(".kvs").wait_for(timeout=90_000)
        assert_shows(page, recorded, 1)
        page.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        assert_shows(page, recorded, 2)
        page.locator(NUMBERS).first.focus()
        page.keyboard.press("ArrowUp")
        assert_shows(page, recorded, 2, View(layer=2))
        page.get_by_role("button", name="without", exact=True).click()
        assert_shows(page, recorded, 2, View(layer=2, cache=False))
        shoot(page, "voila")
        assert page.errors == []


def test_exported_page_without_a_network(lab, recorded, tmp_path):
    """Offline, an exported page steps with keys, slider and buttons, switches the cache, and shows the filmstrip.

    What needs a kernel is not there: play, and choosing the layer and the head.
    """
    write_notebook(tmp_path / "stepper.ipynb", MODEL, STEPPER, "stepper.filmstrip()")
    flags = ["--ExecutePreprocessor.store_widget_state=False", "--KernelManager.transport_encryption=auto"]
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "html", *flags, str(tmp_path / "stepper.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]

    blocked = []
    with another_page(lab) as page:
        page.context.route(re.compile("^(https?|wss?):"), lambda route: (blocked.append(route.request.url), route.abort()))
        page.goto((tmp_path / "stepper.html").as_uri(), wait_until="load")
        frame = page.frame_locator("iframe[title='Step through the KV cache']")
        assert_shows(frame, recorded, 1)
        frame.locator("#s").focus()
        page.keyboard.press("ArrowRight")
        assert_shows(frame, recorded, 2)
        frame.get_by_role("button", name="next ▶").click()
        frame.get_by_label("with the cache").uncheck()
        assert_shows(frame, recorded, 3, View(cache=False))
        scrolled, room = frame.locator("html").evaluate("e => [e.scrollHeight, window.innerHeight]")
        assert scrolled <= room, "the frame is as high as the picture"
        assert page.locator("img[src^='data:image/png']").count() == 1, "the filmstrip"
        shoot(page, "exported")
    assert not [url for url in blocked if "widget" in url], "nothing of ours asks the network"
