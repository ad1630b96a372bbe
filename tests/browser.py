"""Start JupyterLab or Voila and look at it with Chromium. For the browser tests, which skip where Chromium is missing."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

REPO = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")


def write_notebook(path: Path, *cells: str) -> None:
    "A notebook of these code cells, not run yet."
    kernel = dict(name="python3", display_name="Python 3", language="python")
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def private_environment(tmp: Path) -> dict:
    "The environment for a Jupyter program that keeps to folders under `tmp` and imports the package from this checkout."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "JPY_"))}
    names = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime", IPYTHONDIR="ipython")
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {name: str(tmp / folder) for name, folder in names.items()} | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serving(arguments: list, path: str, tmp: Path):
    "Run `python arguments…` until the caller is done; yields the address, once `path` answers there."
    port, log = free_port(), tmp / "server.log"
    arguments = [sys.executable, *(argument.format(port=port) for argument in arguments)]
    with log.open("w") as out:
        server = subprocess.Popen(arguments, env=private_environment(tmp), stdout=out, stderr=subprocess.STDOUT, cwd=tmp)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url + path, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url: str, server, log: Path, seconds: float = 90) -> None:
    "Ask for `url` until it answers; RuntimeError with the end of the log if it doesn't."
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=30).close()
            return
        except OSError as e:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no answer from {url}: {e}\n{log.read_text()[-3000:]}") from e
            time.sleep(0.2)


def jupyter_lab(root: Path, tmp: Path):
    "JupyterLab on `root`, without its news dialog."
    (tmp / "config/labconfig").mkdir(parents=True)
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (tmp / "config/labconfig/page_config.json").write_text(json.dumps(disabled))
    flags = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--IdentityProvider.token=", "--ServerApp.port_retries=0"]
    flags += ["--KernelManager.transport_encryption=auto", "--port={port}", f"--ServerApp.root_dir={root}"]
    return serving(["-m", "jupyterlab", *flags], "/api/status", tmp)


def voila(notebook: Path, tmp: Path):
    "Voila, showing one notebook."
    flags = ["--no-browser", "--port={port}", "--Voila.ip=127.0.0.1", "--KernelManager.transport_encryption=auto"]
    return serving(["-m", "voila", str(notebook), *flags], "/voila/static/voila.js", tmp)


@contextlib.contextmanager
def browser():
    "Chromium, driven by Playwright."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def open_notebook(page, url: str, name: str) -> None:
    "Open a notebook in JupyterLab and wait for its kernel."
    page.goto(f"{url}/doc/tree/{name}", timeout=90_000)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=90_000)
    page.evaluate("""async () => {
        const panel = window.jupyterapp.shell.currentWidget;
        await panel.context.ready; await panel.sessionContext.ready; await panel.sessionContext.session.kernel.info }""")


def run_all(page) -> None:
    "Run all cells, and wait for them."
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
