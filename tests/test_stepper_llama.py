"""The stepper on the decoder of today: grouped heads, rotary positions, a window's ring, sinks."""

import json
import zlib

import numpy as np
import pytest
import torch
from lab import browser_page, needs_chromium
from test_stepper import hooks, unpacked

from kvcache_lib import cost
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.rotary import visible
from kvcache_lib.stepper import CacheStepper, TraceStepper, View, filmstrip, step_cost, trace, traces
from kvcache_lib.stepper.payload import pack
from kvcache_lib.stepper.pictures import LEFT, described, headline, key_steps, row_states

CLOSE = dict(rtol=0, atol=1e-12)
KINDS = {
    "each head its own": {},
    "two groups": dict(n_kv_head=2, qk_norm=True, qkv_bias=True),
    "one for all, wide heads": dict(n_kv_head=1, head_size=14),
    "window": dict(n_kv_head=2, window=5),
    "window of one": dict(window=1),
    "sinks": dict(n_kv_head=2, window=4, sinks=2),
    "window as long as the block": dict(window=16),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(**kind):
    model = Llama(LlamaConfig(**dict(n_layer=2, n_head=4, n_embd=24, vocab_size=11, block_size=16) | kind)).eval().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    model = made(**KINDS[request.param])
    idx = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    return model, idx, traces(model, idx, 14)


def test_recorded_weights_times_values_are_what_the_model_computes(kind):
    "What goes into each layer's last product, in every step, head and new position."
    model, idx, recorded = kind
    mixed, layers = [], [block.attn for block in model.transformer.h]
    handles = [attn.c_proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0].detach().clone())) for attn in layers]
    text = model.generate_kv(idx, 14)
    for handle in handles:
        handle.remove()
    assert len(mixed) == 14 * len(layers)
    heads, hs = model.config.n_head, model.config.head_size
    for b, one in enumerate(recorded):
        assert list(one.text) == text[b].tolist()
        for number, step in enumerate(one.steps, 1):
            for layer in range(len(layers)):
                want = mixed[len(layers) * (number - 1) + layer][b].unflatten(1, (heads, hs))
                for head in range(heads):
                    got = one.weights(number, layer, head, at=range(step.P, step.S)) @ one.rows(number, layer, head)[2]
                    torch.testing.assert_close(got, want[:, head], **CLOSE)
                torch.testing.assert_close(one.newest_weights(number, layer), torch.stack([one.weights(number, layer, h)[-1] for h in range(heads)]), **CLOSE)


def test_heads_of_a_group_have_the_same_keys(kind):
    model, _, (one, _) = kind
    assert one.shared == model.config.n_head // model.config.n_kv_head
    for head in range(model.config.n_head):
        first = one.rows(3, 1, head // one.shared * one.shared)
        for ours, theirs in zip(one.rows(3, 1, head)[1:], first[1:]):
            assert torch.equal(ours, theirs)
    assert ("shares its keys" in described(one, 3, View())) == (one.shared > 1)


def test_the_row_that_is_written_over_is_the_rings(kind):
    "Against a buffer: what changed in it at each step, and how many bytes it holds."
    model, idx, recorded = kind
    window = model.config.window
    one, buffer, text = recorded[0], model.new_buffer(2), torch.tensor([t.text for t in recorded])
    if window is None:  # past the block size everything is encoded afresh
        assert [s.P for s in one.steps[-4:]] == [0] * 4 and row_states(one, 14, True)[:16] == ["new"] * 16
        assert "made with the tokens that have left" in described(one, 14, View())
        return
    buffer.data.zero_()  # so that a row that is written changes
    for number, step in enumerate(one.steps, 1):
        before = buffer.data.clone()
        model.step(text[:, : step.S], buffer)
        changed = (buffer.data != before).any(5).any(3).any(2).any(1).any(0).nonzero().flatten().tolist()
        if number > 1:
            assert (step.P, step.T) == (7 + number - 2, 1) and changed == [one.ring_row(step.P)]
            assert one.overwritten(number) == ([step.P - window] if step.P >= window + one.sinks else [])
            if one.overwritten(number):
                assert one.ring_row(step.P) == one.ring_row(step.P - window)
                assert f"takes row {changed[0]} of the ring, in which token {step.P - window} lay" in headline(one, number, View())
        states = row_states(one, number, True)
        assert [i for i, state in enumerate(states) if state == "read"] == [i for i in range(step.P) if i > step.P - window or i < one.sinks]
        assert states.count(LEFT) == step.P - len(one.read(number)) and LEFT not in row_states(one, number, False)
        counted = step_cost(one, number)
        assert 2 * counted.cache_bytes == 2 * cost.cache_bytes(model.config, step.S, itemsize=8)
        assert counted.macs == cost.step_cost(model.config, step.T, step.S, itemsize=8, all_logits=True).macs
    assert step_cost(one, 14).cache_bytes == (buffer.nbytes // 2 if buffer.held == buffer.capacity else cost.cache_bytes(model.config, 20, itemsize=8))
    assert key_steps(one)[0] == 1 and (window == 16 or 2 in key_steps(one))


def test_the_page_gets_the_rows_and_the_window(kind):
    model, _, (one, other) = kind
    told, runs = unpacked_kinds(pack([one, other]))
    assert (told["window"], told["sinks"], told["shared"], told["kinds"]) == (one.window, one.sinks, one.shared, 4 if one.sinks else 3)
    assert told["seconds"] and [s["over"] for s in told["texts"][0]["steps"]] == [one.overwritten(n) for n in range(1, 15)]
    torch.testing.assert_close(torch.tensor(runs[0]), one.runs[0], rtol=1e-3, atol=1e-3)
    if one.sinks:
        film = filmstrip(one, View(1, 3), [14])
        assert film.data[:4] == b"\x89PNG" and "out of sight" in film.alt


def unpacked_kinds(data):
    "`unpacked` knows of q, k and v. A fourth kind is as many layers more."
    raw = zlib.decompress(data)
    size = int.from_bytes(raw[:4], "little")
    told = json.loads(raw[4 : 4 + size])
    if told["kinds"] == 3:
        return unpacked(data)
    numbers = np.frombuffer(raw, {"float32": "<f4", "float16": "<f2"}[told["dtype"]], offset=4 + size).astype("f8")
    shape = 4, told["n_layer"], told["texts"][0]["runs"][0], told["n_embd"]
    return told, [numbers[: int(np.prod(shape))].reshape(shape)]


def test_the_model_stays_as_it_was():
    model = made(n_kv_head=2, window=4, sinks=2)
    stepper = CacheStepper(model, torch.tensor([[1, 2, 3]]), 3)
    assert [len(lane) for lane in stepper.measure()] == [3, 3]
    stepper.close()
    assert hooks(model) == 0 and not any("attend" in vars(block.attn) for block in model.transformer.h)
    assert trace(model, torch.randint(11, (1, 40)), 2).steps[0].T == 40, "a window takes a longer prompt than the block size"
    with pytest.raises(ValueError, match="at most 16 tokens"):
        trace(made(), torch.randint(11, (1, 17)), 2)


@pytest.mark.parametrize("fault", ["row", "mask"])
def test_a_wrong_ring_is_refused(fault, monkeypatch):
    "The row beside the right one is written; a query of the prompt sees all before it."
    model, place = made(n_kv_head=2, window=4, sinks=1), Llama.place

    def beside(self, T, buffer, *more):
        right = place(self, T, buffer, *more)
        if T == 1 and right.rows.start > 0:
            return right._replace(rows=slice(right.rows.start % 4 + 1, right.rows.start % 4 + 2))
        return right

    if fault == "row":
        monkeypatch.setattr(Llama, "place", beside)
    else:
        monkeypatch.setattr("kvcache_lib.llama.visible", lambda queries, keys, window=None, sinks=0: visible(queries, keys))
    with pytest.raises(ValueError, match="is not attention over its own cache"):
        trace(model, torch.randint(11, (1, 8)), 6)
    assert not any("attend" in vars(block.attn) for block in model.transformer.h)


@needs_chromium
def test_the_page_shows_the_ring(tmp_path):
    "Real Chromium: the states, the weights, who is masked, and which row is written over; the same as Python's."
    recorded = trace(made(n_kv_head=2, window=4, sinks=2), torch.tensor([[3, 1, 4, 1, 5]]), 9)
    stepper = TraceStepper(recorded, layer=1, head=3)
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><meta charset='utf-8'><main>{stepper._repr_mimebundle_()['text/html']}</main>", encoding="utf-8")
    stepper.close()
    shown = """() => {
        const root = document.querySelector('[data-kvcache]').shadowRoot, text = e => e.textContent;
        return {head: text(root.querySelector('.head')), keys: text(root.querySelector('.titles b:nth-child(1)')),
            rows: [...root.querySelectorAll('.row')].map(r => [r.classList[2], text(r.querySelector('.number')), r.classList.contains('lost')]),
            titles: [...root.querySelectorAll('.titles b')].map(text), legend: [...root.querySelectorAll('.legend span')].filter(e => !e.hidden).map(text)};
    }"""
    with browser_page() as page:
        errors = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(path.as_uri())
        page.locator("[data-kvcache] .kvs").wait_for(timeout=60_000)
        for number, step in enumerate(recorded.steps, 1):
            got = page.evaluate(shown)
            weights = recorded.newest_weights(number, 1)[3].tolist()
            sees = [recorded.sees(step.S - 1, i) for i in range(step.S)]
            numbers = [f"{w:.2f}" if seen else "masked" for w, seen in zip(weights, sees)] + [""] * (recorded.length - step.S)
            over = recorded.overwritten(number)
            assert got["head"] == headline(recorded, number, View())
            assert got["rows"] == [[s, n, i in over] for i, (s, n) in enumerate(zip(row_states(recorded, number, True), numbers))]
            assert "K of head 1" in got["titles"] and "out of sight" in got["legend"]
            page.locator("[data-kvcache] .kvs").press("ArrowRight")
        assert over and not errors
