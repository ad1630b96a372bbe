"""How much the stepper puts into a page, and how fast it draws there: `python tests/stepper_speed.py`. Needs Chromium."""

import statistics
import tempfile
from pathlib import Path

import torch
from lab import browser_page

from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPTConfig
from kvcache_lib.stepper import CacheStepper

STEPS = """async () => {
    const frame = document.querySelector('[data-kvcache]').shadowRoot.querySelector('.kvs'), times = [];
    for (let n = 0; n < 160; n++) {
        const start = performance.now();
        frame.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true, composed: true}));
        frame.offsetHeight;  // has the browser lay it out, too
        times.push(performance.now() - start);
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    }
    return times;
}"""
DRAWN = """new MutationObserver((_, watch) => {
    if (document.querySelector('[data-kvcache]')?.shadowRoot) { window.drawn = performance.now(); watch.disconnect() }
}).observe(document, {subtree: true, childList: true, attributes: true})"""


def main():
    torch.manual_seed(0)
    model = GPT_kv(GPTConfig(model_type="gpt-mini", vocab_size=100, block_size=256)).eval()
    stepper = CacheStepper(model, torch.randint(100, (1, 20)), 180)
    output = stepper._repr_mimebundle_()["text/html"]
    print(f"gpt-mini, 200 tokens: {len(output) / 1e6:.2f} MB of HTML")
    with tempfile.TemporaryDirectory() as folder, browser_page() as page:
        path = Path(folder) / "page.html"
        path.write_text(f"<!doctype html><meta charset='utf-8'><main>{output}</main>")
        page.add_init_script(DRAWN)
        page.goto(path.as_uri())
        page.locator("[data-kvcache] .kvs").wait_for(timeout=60_000)
        page.wait_for_timeout(500)
        print(f"first picture {page.evaluate('window.drawn'):.0f} ms after the page was asked for")
        times = sorted(page.evaluate(STEPS))
        print(f"a step: median {statistics.median(times):.1f} ms, fastest {times[0]:.1f}, nine in ten below {times[143]:.1f}")


if __name__ == "__main__":
    main()
