"""The stepper without a browser: what is recorded, what is drawn, what the controls do."""

import gc
import pickle

import ipywidgets
import numpy as np
import pytest
import torch
from conftest import make_pair
from torch import nn

from kvcache_lib.attention import CausalSelfAttention_kv
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPTConfig
from kvcache_lib.recording import attention_weights, step_cost, total_cost
from kvcache_lib.shapes import Panel, Pixels, Text
from kvcache_lib.stepper import (
    AGAIN,
    CacheStepper,
    TraceStepper,
    View,
    cache_panel,
    frames,
    headline,
    html,
    key_steps,
    namer,
    picture,
    row_states,
    trace,
    trace_layer,
    trace_rows,
    visible,
)

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "These tensors are so small that several threads only wait for each other."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    return make_pair(n_layer=3, n_head=2, n_embd=8, vocab_size=11, block_size=12)


@pytest.fixture(scope="module")
def recorded(models):
    return trace(models[0], PROMPT, 8)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def kinds(pic):
    return [getattr(shape, "kind", "") for panel in pic.panels.values() for shape in panel.shapes]


# --- what is recorded


@pytest.mark.parametrize("settings", [{}, dict(do_sample=True, top_k=5, temperature=0.8)])
def test_the_text_is_that_of_generate_kv(models, settings):
    torch.manual_seed(5)
    want = models[0].generate_kv(PROMPT, 8, **settings)[0].tolist()
    state = torch.get_rng_state()
    seeded = trace(models[0], PROMPT, 8, seed=5, **settings)
    assert torch.equal(torch.get_rng_state(), state), "a seed leaves torch's generator alone"
    torch.manual_seed(5)
    unseeded = trace(models[0], PROMPT, 8, **settings)
    assert list(seeded.text) == list(unseeded.text) == want
    assert [step.taken for step in seeded.steps] == want[8:]


def test_every_row_weight_and_choice_is_the_baselines(models, recorded):
    "Against the baseline, which encodes each window by itself: all steps, layers, heads and positions, in float64."
    baseline, seen = models[1], []
    handles = [
        hook
        for block in baseline.transformer.h
        for hook in (
            block.attn.c_attn.register_forward_hook(lambda m, args, out: seen.append(out[0])),
            block.attn.attn_dropout.register_forward_pre_hook(lambda m, args: seen.append(args[0][0])),
        )
    ]
    for number, step in enumerate(recorded.steps, 1):
        seen.clear()
        logits, _ = baseline(torch.tensor([recorded.text[step.start : step.start + step.S]]))
        for layer in (1, 2, 3):
            qkv, weights = seen[2 * layer - 2 : 2 * layer]
            for head in (1, 2):
                want = torch.stack([z[:, 4 * head - 4 : 4 * head] for z in qkv.split(8, dim=1)])
                torch.testing.assert_close(torch.stack(list(recorded.rows(number, layer, head))), want)
                torch.testing.assert_close(recorded.weights(number, layer, head), weights[head - 1])
                torch.testing.assert_close(recorded.weights(number, layer, head, at=[0, 5]), weights[head - 1][[0, 5]])
            torch.testing.assert_close(recorded.newest_weights(number, layer), weights[:, -1])
        p = logits[0, -1].softmax(dim=0)
        assert dict(step.top) == pytest.approx({token: p[token].item() for token in p.topk(5).indices.tolist()})
    for handle in handles:
        handle.remove()


def test_steps_past_the_block(recorded):
    assert [(s.P, s.T, s.start) for s in recorded.steps] == [(0, 8, 0)] + [(P, 1, 0) for P in (8, 9, 10, 11)] + [
        (0, 12, start) for start in (1, 2, 3)
    ]


def test_it_is_plain_data(recorded):
    again = pickle.loads(pickle.dumps(recorded))
    assert again.steps == recorded.steps and html(again, 3) == html(recorded, 3)


def test_the_model_stays_as_it_was(models):
    model = models[0]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trace(model, PROMPT, 3)
    with pytest.raises(ValueError):
        trace(model.train(), PROMPT, 3)  # dropout is on
    assert model.training, "train or eval is the caller's"
    model.eval()
    assert hooks(model) == 0
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_hundred_traces_leave_nothing(models):
    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    trace(models[0], PROMPT, 2)
    before = tensors()
    for _ in range(100):
        trace(models[0], PROMPT, 2)
    assert tensors() == before and hooks(models[0]) == 0


class Fused(CausalSelfAttention_kv):
    "Another way to write it: PyTorch's own attention, the cache a tuple, the argument named."

    def forward(self, x, kv_cache=None):
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        if kv_cache:
            k, v = torch.cat((kv_cache[0], k), 1), torch.cat((kv_cache[1], v), 1)
        T, S = q.size(1), k.size(1)
        heads = [z.view(1, -1, self.n_head, q.size(2) // self.n_head).transpose(1, 2) for z in (q, k, v)]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        y = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape)), (k, v)


def with_attention(attention_class, models):
    block = type("Block", (GPT_kv.block_class,), {"attention_class": attention_class})
    model = type("Model", (GPT_kv,), {"block_class": block})(models[0].config).double().eval()
    model.load_state_dict(models[0].state_dict())
    return model


def test_a_class_of_your_own(models, recorded):
    mine = trace(with_attention(Fused, models), PROMPT, 8)
    assert mine.text == recorded.text
    for layer in (1, 2, 3):
        torch.testing.assert_close(mine.weights(8, layer, 2), recorded.weights(8, layer, 2))


class Unshifted(CausalSelfAttention_kv):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, self.bias[:, :, : q.size(1), : k.size(1)])


class Forgets(CausalSelfAttention_kv):
    def forward(self, x, kv_cache=None):
        y, cache = super().forward(x, kv_cache)
        return y, [t[:, -x.size(1) :] for t in cache]


class Spoils(CausalSelfAttention_kv):
    def forward(self, x, kv_cache=None):
        y, (k, v) = super().forward(x, kv_cache)
        return y, [k + 0.1 * (kv_cache is not None), v]


@pytest.mark.parametrize("wrong, message", [(Unshifted, "mask"), (Forgets, "expected the layer"), (Spoils, "unchanged")])
def test_a_wrong_layer_is_refused_with_a_reason(models, wrong, message):
    model = with_attention(wrong, models)
    with pytest.raises(ValueError, match=message):
        trace(model, PROMPT, 3)
    assert hooks(model) == 0


class Recomputes(GPT_kv):
    "generate_kv that never uses its cache."

    def generate_kv(self, idx, max_new_tokens, *args):
        for _ in range(max_new_tokens):
            logits, _, _ = self(idx, kv_cache=[None] * self.config.n_layer)
            idx = torch.cat([idx, logits[:, -1:].argmax(2)], dim=1)
        return idx


def test_a_cache_that_is_not_used_is_seen(models):
    model = Recomputes(models[0].config).double().eval()
    wasteful = trace(model, PROMPT, 3)
    assert [step.T for step in wasteful.steps] == [8, 9, 10]
    assert "did not use it" in picture(wasteful, 2).reason


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 4, 1]])
def test_a_layer_in_chunks(models, chunks):
    attn, x = models[0].transformer.h[0].attn, torch.randn(1, 8, 8, dtype=torch.float64)
    layer = trace_layer(attn, x, chunks)
    assert [step.T for step in layer.steps] == chunks and hooks(attn) == 0
    whole = trace_layer(attn, x, [8])
    torch.testing.assert_close(layer.weights(len(chunks), 1, 2), whole.weights(1, 1, 2))
    assert "choice" not in picture(layer, 1).panels and len(picture(layer, 1).counters) == 3


def test_half_precision():
    model = GPT_kv(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=11, block_size=12)).eval().bfloat16()
    half = trace(model, PROMPT, 3)
    assert half.itemsize == 2 and "kvs" in html(half, 3)


# --- errors


@pytest.mark.parametrize(
    "idx, count, settings, error",
    [
        (torch.zeros(1, 13, dtype=torch.long), 2, {}, ValueError),
        (PROMPT.expand(2, -1), 2, {}, ValueError),
        (PROMPT, 0, {}, ValueError),
        (PROMPT + 9, 2, {}, ValueError),
        (PROMPT.float(), 2, {}, TypeError),
        (PROMPT, 2, dict(temperature=0), ValueError),
    ],
)
def test_bad_generation(models, idx, count, settings, error):
    with pytest.raises(error):
        trace(models[0], idx, count, **settings)
    assert hooks(models[0]) == 0


def test_models_that_cannot_be_shown(models):
    with pytest.raises(ValueError, match="with a KV cache"):
        trace(models[1], PROMPT, 2)
    other = nn.Linear(2, 2)
    other.generate_kv = lambda *args: None
    with pytest.raises(ValueError, match="built as GPT"):
        trace(other, PROMPT, 2)


@pytest.mark.parametrize("where", [dict(layer=0), dict(layer=4), dict(head=3), dict(step=0), dict(step=9), dict(rows=2)])
def test_out_of_range(recorded, where):
    widgets = len(ipywidgets.widgets.widget._instances)
    with pytest.raises(ValueError, match=f"expected {next(iter(where))}"):
        TraceStepper(recorded, **where)
    assert len(ipywidgets.widgets.widget._instances) == widgets


def test_chunks_and_names():
    K = torch.eye(4)
    for chunks in ([], [2, 1], [0, 4], [4.0]):
        with pytest.raises(ValueError, match="chunks"):
            trace_rows(K, K, K, chunks)
    with pytest.raises(ValueError, match="one shape"):
        trace_rows(K, K, K[:3], [4])
    assert [namer(v, 3)(2) for v in (None, "abc", {2: "two"}, lambda t: t * 2)] == ["2", "c", "two", "4"]
    assert namer({0: "zero"}, 3)(2) == "2"
    with pytest.raises(ValueError):
        namer("ab", 3)
    with pytest.raises(TypeError):
        namer(3, 3)


# --- what is drawn


def test_row_states(recorded):
    assert row_states(recorded, 1, True) == ["new"] * 8 + ["none"] * 4
    assert row_states(recorded, 3, True) == ["read"] * 9 + ["new"] + ["none"] * 2
    assert row_states(recorded, 3, False) == [AGAIN] * 9 + ["new"] + ["none"] * 2
    assert row_states(recorded, 6, True) == ["new"] * 12
    assert row_states(recorded, 6, False) == [AGAIN] * 11 + ["new"]


@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("cache", [True, False])
def test_the_picture_holds_the_real_numbers(recorded, step, cache):
    view = View(layer=2, head=2, cache=cache, names="abcdefghijk".__getitem__)
    pic, here = picture(recorded, step, view), recorded.steps[step - 1]
    first = here.P if cache else 0
    _, k, v = (z.float().numpy() for z in recorded.rows(step, 2, 2))
    rows = [s.values for s in pic.panels["cache"].shapes if isinstance(s, Pixels)]
    for matrix in (k, v):
        assert all(any(np.array_equal(row[None], shown) for shown in rows) for row in matrix)
    weights = recorded.weights(step, 2, 2).numpy()
    shown = [s.values[0] for s in pic.panels["attention"].shapes if isinstance(s, Pixels)][: here.S - first]
    for j, row in zip(range(first, here.S), shown, strict=True):
        np.testing.assert_allclose(row, weights[j, : j + 1], rtol=1e-5)
    assert kinds(pic).count("masked") == (here.S - first if first < here.S - 1 else 1) - 1
    assert kinds(pic).count("read") == (here.P if cache else 0)
    assert kinds(pic).count("new") + kinds(pic).count("again") == pic.data["encoded"]
    assert kinds(pic).count("struck") == (12 if cache and step > 5 else 0)
    assert bool(pic.reason) == (cache and step > 5)
    words = [s.s for s in pic.panels["text"].shapes if isinstance(s, Text)]
    assert "abcdefghijk"[here.taken] == words[-2]
    assert all(panel.alt for panel in pic.panels.values())


def test_masked_cells_when_several_tokens_are_appended(models):
    layer = trace_layer(models[0].transformer.h[0].attn, torch.randn(1, 6, 8, dtype=torch.float64), [3, 2, 1])
    boxes = [s for s in picture(layer, 2).panels["attention"].shapes if getattr(s, "kind", "") == "masked"]
    cells = boxes[0].h
    assert [box.w / cells for box in boxes] == pytest.approx([1])  # the fourth token may not see the fifth
    captions = [s.s for s in picture(layer, 2).panels["attention"].shapes if isinstance(s, Text)]
    assert "grey is masked: j sees i ≤ P + j, with P = 3" in captions


def test_the_counters_add_up(recorded):
    for cache in (True, False):
        parts = [step_cost(recorded, s, cache) for s in range(1, 9)]
        assert total_cost(recorded, 8, cache).macs == sum(part.macs for part in parts)
    assert total_cost(recorded, 8).tokens == 8 + 4 + 36 and total_cost(recorded, 8, cache=False).tokens == 8 + 9 + 10 + 11 + 4 * 12
    assert step_cost(recorded, 3).cache_bytes == 2 * 3 * 10 * 8 * 8  # k and v, layers, rows, C, bytes of a float64
    assert step_cost(recorded, 3).cache_bytes_read == 2 * 3 * 9 * 8 * 8


@pytest.mark.parametrize("limit", [6, 10, 16])
def test_a_long_text_is_windowed(limit):
    for S in range(1, 501):
        rows = visible(S, 500, limit)
        assert len(rows) == limit and S - 1 in rows and len(set(rows)) == limit
        there = [i for i in rows if i is not None]
        assert there == sorted(there) and there[-1] < 500 and rows.count(None) <= 1


def test_five_hundred_tokens():
    torch.manual_seed(0)
    model = GPT_kv(GPTConfig(n_layer=1, n_head=12, n_embd=96, vocab_size=20, block_size=502)).eval()
    long = trace(model, torch.randint(20, (1, 500)), 4)
    for step in range(1, 5):
        panels = picture(long, step).panels
        assert all(panel.width <= 640 and panel.height <= 640 for panel in panels.values())
        bars = [float(s.s) for s in panels["cache"].shapes if isinstance(s, Text) and s.s.count(".") == 1 and s.s[0] in "01"]
        assert sum(bars) == pytest.approx(1, abs=0.1), "the gap says how much it holds"
        assert len(html(long, step)) < 60_000


def test_names_cannot_break_the_page(recorded):
    page = html(recorded, 3, View(names=lambda t: "<b>'\"&$"))
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert Panel(10, 10, (), "a 'quoted' <alt>").svg().count("'") == 2 * 8


def test_key_steps(recorded):
    assert key_steps(recorded) == [1, 2, 5, 6]
    assert key_steps(trace_rows(torch.eye(3), torch.eye(3), torch.eye(3), [2, 1])) == [1, 2]


# --- the widget, without a browser


def test_controls(models):
    stepper = CacheStepper(models[0], PROMPT, 8, vocab="abcdefghijk")
    recorded = stepper.trace
    assert stepper.back.disabled and not stepper.forward.disabled
    stepper.forward.click()
    assert headline(recorded, 2, stepper.view) in stepper.picture.value
    stepper.layer.value, stepper.head.value, stepper.cache.value = 3, 2, False
    assert stepper.picture.value == html(recorded, 2, stepper.view)
    assert (stepper.view.layer, stepper.view.head, stepper.view.cache) == (3, 2, False)
    stepper.slider.value = 8
    stepper.forward.click()
    assert stepper.value == 8 and stepper.forward.disabled
    stepper.close()


def test_closing_leaves_no_widget(models):
    before = set(ipywidgets.widgets.widget._instances)
    stepper = CacheStepper(models[0], PROMPT, 2)
    assert set(ipywidgets.widgets.widget._instances) > before
    stepper.close()
    assert set(ipywidgets.widgets.widget._instances) == before and stepper.trace is None


def test_what_is_saved_without_a_kernel(recorded, monkeypatch):
    stepper = TraceStepper(recorded)
    assert set(stepper._repr_mimebundle_()) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    monkeypatch.setenv("KVCACHE_STATIC", "1")
    bundle = stepper._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and bundle == stepper._repr_mimebundle_(), "the same bytes each time"
    stepper.close()
    page = frames(recorded)
    assert "http" not in page.replace("http-equiv", "") and page.count("<iframe") == 1


def test_filmstrip(recorded):
    film = TraceStepper(recorded).filmstrip()
    assert film.data[:4] == b"\x89PNG" and len(film.data) < 100_000 and "Step 6 of 8" in film.alt


def test_attention_weights_by_hand():
    "Two equal keys share the weight; a masked one gets none."
    q, k = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    torch.testing.assert_close(attention_weights(q, k, torch.tensor([1])), torch.tensor([[0.5, 0.5, 0.0]]))
    assert cache_panel(trace_rows(k, k, k, [3]), 1, View()).alt.startswith("Layer 1, head 1.")
