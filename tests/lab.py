"""A real JupyterLab, driven by a real Chromium. `pytest.importorskip` and `needs_chromium` skip where either is missing."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium on the PATH (Debian: apt-get install chromium)"
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_up(url, process, log, seconds=60):
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return urllib.request.urlopen(url, timeout=2).close()
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{Path(log).read_text()[-2000:]}")


@contextlib.contextmanager
def jupyter_lab(root, scratch, theme="JupyterLab Light"):
    """The address of a JupyterLab that serves `root`; its settings and data stay in `scratch`.

    Every cell is rendered, on screen or not, so that a test sees whole notebooks.
    """
    settings = {
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
        "@jupyterlab/apputils-extension:themes": {"theme": theme},
    }
    (scratch / "lab").mkdir(parents=True)
    (scratch / "lab" / "overrides.json").write_text(json.dumps(settings))
    (scratch / "config" / "labconfig").mkdir(parents=True)
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (scratch / "config" / "labconfig" / "page_config.json").write_text(json.dumps(quiet))
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    port = free_port()
    options = [
        "--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.port_retries=0", f"--port={port}",
        "--IdentityProvider.token=", f"--ServerApp.root_dir={root}", f"--LabApp.app_settings_dir={scratch / 'lab'}",
        "--KernelManager.transport_encryption=auto",
    ]  # fmt: skip
    with open(scratch / "lab.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {name: str(scratch / folder) for name, folder in folders.items()},
        )  # fmt: skip
        try:
            wait_until_up(f"http://127.0.0.1:{port}/api/status", process, scratch / "lab.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def browser_page(**kwargs):
    "A page in Chromium. `page.errors` collects what goes wrong in it."
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900}, **kwargs)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


def open_notebook(page, url, path):
    "Open a notebook alone on the page and wait until its kernel answers and its cells are rendered."
    page.goto(f"{url}/doc/tree/{path}")
    page.wait_for_function("window.jupyterapp && document.querySelector('.jp-NotebookPanel')", timeout=60_000)
    page.evaluate(
        """async () => {
            const panel = window.jupyterapp.shell.currentWidget;
            await panel.context.ready; await panel.revealed; await panel.sessionContext.ready;
        }"""
    )
    page.locator(".jp-MarkdownOutput").first.wait_for(timeout=60_000)


def run_all(page, seconds=180):
    "Run every cell; the names of the errors in the outputs."
    page.evaluate(
        """async () => {
            const app = window.jupyterapp;
            await app.shell.currentWidget.sessionContext.session.kernel.info;
            await app.commands.execute('notebook:run-all-cells');
        }"""
    )
    idle = "() => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; return k.status === 'idle' }"
    page.wait_for_function(idle, timeout=1000 * seconds)
    return page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap(cell => cell.model.type === 'code'
            ? cell.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue) : [])"""
    )
