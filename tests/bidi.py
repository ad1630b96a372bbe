"""Firefox, driven over WebDriver BiDi, which it speaks by itself. Playwright would need a Firefox of its own."""

import contextlib
import json
import shutil
import subprocess

import pytest
from lab import free_port

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
needs_firefox = pytest.mark.skipif(not FIREFOX, reason="no Firefox on the PATH (Debian: apt-get install firefox-esr)")
KEYS = {"ArrowLeft": "\ue012", "ArrowRight": "\ue014", "Home": "\ue011", "End": "\ue010", "Tab": "\ue004"}


class Page:
    "One tab of a Firefox."

    def __init__(self, socket):
        self.socket, self.number = socket, 0
        self.send("session.new", capabilities={})
        self.context = self.send("browsingContext.getTree")["contexts"][0]["context"]

    def send(self, method, **params):
        "Send a command and wait for its result. Raises RuntimeError for an error."
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                if answer["type"] == "error":
                    raise RuntimeError(answer["message"])
                return answer["result"]

    def goto(self, url):
        self.send("browsingContext.navigate", context=self.context, url=url, wait="complete")

    def resize(self, width, height):
        self.send("browsingContext.setViewport", context=self.context, viewport=dict(width=width, height=height))

    def evaluate(self, function):
        "The value of a JavaScript function, through JSON. A promise is waited for."
        call = f"Promise.resolve(({function})()).then(JSON.stringify)"
        got = self.send("script.evaluate", expression=call, target=dict(context=self.context), awaitPromise=True)
        if got["type"] == "exception":
            raise RuntimeError(got["exceptionDetails"]["text"])
        return json.loads(got["result"].get("value", "null"))

    def press(self, *keys):
        down_up = [dict(type=kind, value=KEYS.get(key, key)) for key in keys for kind in ("keyDown", "keyUp")]
        actions = [dict(type="key", id="keys", actions=down_up)]
        self.send("input.performActions", context=self.context, actions=actions)

    def screenshot(self):
        return self.send("browsingContext.captureScreenshot", context=self.context)["data"]


@contextlib.contextmanager
def firefox_page(profile):
    "A page in Firefox, without a window."
    websocket = pytest.importorskip("websocket")
    port = free_port()
    (profile / "user.js").write_text('user_pref("browser.shell.checkDefaultBrowser", false);\n')
    command = [FIREFOX, "--headless", "--no-remote", "--profile", str(profile), f"--remote-debugging-port={port}", "about:blank"]
    with open(profile / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    socket = websocket.create_connection(f"ws://127.0.0.1:{port}/session", timeout=60, suppress_origin=True)
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
            yield Page(socket)
        finally:
            process.terminate()
            process.wait(30)
