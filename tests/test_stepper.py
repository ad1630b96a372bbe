"""The stepper without a browser: what is recorded, what the page is given, what the widget keeps."""

import gc
import json
import pickle
import re
import zlib

import ipywidgets
import numpy as np
import pytest
import torch
from conftest import make_pair
from torch import nn

from kvcache_lib import cost
from kvcache_lib.attention import CausalSelfAttention_kv
from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPTConfig
from kvcache_lib.stepper import (
    CacheStepper,
    TraceStepper,
    View,
    attention_weights,
    namer,
    step_cost,
    total_cost,
    trace,
    trace_layer,
    trace_rows,
    traces,
)
from kvcache_lib.stepper.payload import front_end, kind_of, pack, shortened
from kvcache_lib.stepper.pictures import AGAIN, described, filmstrip, headline, key_steps, reason, row_states, visible
from kvcache_lib.stepper.widget import measured_steps

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


def unpacked(data):
    "What the page is told, and the numbers of each run of each text, (3, n_layer, S, C)."
    data = zlib.decompress(data)
    at = 4 + int.from_bytes(data[:4], "little")
    told, runs = json.loads(data[4:at]), []
    L, C, nh = told["n_layer"], told["n_embd"], told["n_head"]
    dtype = {"float32": "<f4", "float16": "<f2", "int8": "i1"}[told["dtype"]]

    def take(dtype, *shape):
        nonlocal at
        count = int(np.prod(shape))
        values = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += values.nbytes
        return values.astype("f8")

    for text in told["texts"]:
        for S in text["runs"]:
            scale = take("<f4", 3, L, S, nh, 1) if told["dtype"] == "int8" else 1
            runs.append((take(dtype, 3, L, S, nh, C // nh) * scale).reshape(3, L, S, C))
    assert at == len(data)
    return told, runs


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
        for layer in (0, 1, 2):
            qkv, weights = seen[2 * layer : 2 * layer + 2]
            for head in (0, 1):
                want = torch.stack([z[:, 4 * head : 4 * head + 4] for z in qkv.split(8, dim=1)])
                torch.testing.assert_close(torch.stack(list(recorded.rows(number, layer, head))), want)
                torch.testing.assert_close(recorded.weights(number, layer, head), weights[head])
                torch.testing.assert_close(recorded.weights(number, layer, head, at=[0, 5]), weights[head][[0, 5]])
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
    assert again.steps == recorded.steps and pack([again]) == pack([recorded])


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
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    trace(models[0], PROMPT, 2)
    before = tensors()  # held, so that no later tensor can have the place in memory of one that is gone
    known = {id(t) for t in before}
    for _ in range(100):
        trace(models[0], PROMPT, 2)
    assert [t for t in tensors() if id(t) not in known] == [] and hooks(models[0]) == 0


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
    for layer in (0, 1, 2):
        torch.testing.assert_close(mine.weights(8, layer, 1), recorded.weights(8, layer, 1))


def test_the_fast_gpt_and_a_batch(models, recorded):
    "GPT_fast, whose cache is written in place; two texts at once; each as the exercise's GPT alone."
    fast = GPT_fast(models[0].config).double().eval()
    fast.load_state_dict(models[0].state_dict())
    other = torch.tensor([[2, 7, 1, 8, 2, 8, 1, 8]])
    alone = trace(models[0], other, 8)
    for model in (models[0], fast):
        both = traces(model, torch.cat([PROMPT, other]), 8)
        for got, want in zip(both, (recorded, alone), strict=True):
            assert got.text == want.text
            assert [(s.P, s.T, s.start, s.run) for s in got.steps] == [(s.P, s.T, s.start, s.run) for s in want.steps]
            for a, b in zip(got.runs, want.runs, strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(got.steps, want.steps, strict=True):
                assert dict(a.top) == pytest.approx(dict(b.top))
    assert hooks(fast) == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers(kind):
    "With absolute positions, and with rotary ones and shared heads: each step's weights are the model's own."
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=11, bos_token_id=1, eos_token_id=2)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=20, n_embd=16, n_layer=2, n_head=4, **sizes)
    else:
        config = transformers.LlamaConfig(
            max_position_embeddings=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, **sizes,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    implementation, habits = model.config._attn_implementation, model.generation_config
    habits.eos_token_id = list(range(11))  # every token would end the text
    seen = traces(model, torch.cat([PROMPT, PROMPT.flip(1)]), 5)
    assert model.config._attn_implementation == implementation and model.generation_config is habits and hooks(model) == 0
    want = PROMPT
    for _ in range(5):
        want = torch.cat([want, model(want).logits[:, -1:].argmax(dim=2)], dim=1)
    assert list(seen[0].text) == want[0].tolist()
    assert [(s.P, s.T) for s in seen[0].steps] == [(0, 8)] + [(P, 1) for P in range(8, 12)]
    model.set_attn_implementation("eager")
    for one in seen:
        out = model(torch.tensor([one.text[:12]]), output_attentions=True)
        for layer in (0, 1):
            for head in (0, 1, 2, 3):
                torch.testing.assert_close(one.weights(5, layer, head), out.attentions[layer][0, head])
        p = out.logits[0, -1].softmax(dim=0)
        assert dict(one.steps[-1].top) == pytest.approx({token: p[token].item() for token, _ in one.steps[-1].top})
    assert step_cost(seen[0], 2).cache_bytes_read == 2 * 2 * 8 * (16 if kind == "gpt2" else 8) * 8
    assert (step_cost(seen[0], 2).macs is None) == (kind == "llama")
    with pytest.raises(ValueError, match="at most 20 tokens"):
        trace(model, PROMPT, 14)


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
    assert "did not use it" in reason(wasteful, 2, View())


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 4, 1]])
def test_a_layer_in_chunks(models, chunks):
    attn, x = models[0].transformer.h[0].attn, torch.randn(1, 8, 8, dtype=torch.float64)
    layer = trace_layer(attn, x, chunks)
    assert [step.T for step in layer.steps] == chunks and hooks(attn) == 0
    whole = trace_layer(attn, x, [8])
    torch.testing.assert_close(layer.weights(len(chunks), 0, 1), whole.weights(1, 0, 1))
    told, _ = unpacked(pack([layer]))
    assert told["texts"][0]["steps"][0]["top"] == [] and not told["seconds"]
    assert [n is None for n in told["texts"][0]["steps"][0]["cost"][0]] == [False, True, True, False, False]


def test_half_precision():
    model = GPT_kv(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=11, block_size=12)).eval().bfloat16()
    half = trace(model, PROMPT, 3)
    assert half.itemsize == 2 and len(unpacked(pack([half]))[1]) == 1


# --- errors


@pytest.mark.parametrize(
    "idx, count, settings, error",
    [
        (torch.zeros(1, 13, dtype=torch.long), 2, {}, ValueError),
        (PROMPT.expand(2, -1), 2, {}, ValueError),
        (torch.zeros(0, 4, dtype=torch.long), 2, {}, ValueError),
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


@pytest.mark.parametrize("where", [dict(layer=-1), dict(layer=3), dict(head=2), dict(step=0), dict(step=9), dict(text=1), dict(rows=2)])
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


def test_the_page_gets_what_was_recorded(recorded):
    "Every number, within float32; the words, states and choices of every step."
    told, runs = unpacked(pack([recorded], "abcdefghijk".__getitem__))
    assert told["dtype"] == "float32"
    for got, want in zip(runs, recorded.runs, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    (text,) = told["texts"]
    assert "".join(told["names"][str(token)] for token in text["tokens"]) == "".join("abcdefghijk"[t] for t in recorded.text)
    for number, (got, want) in enumerate(zip(text["steps"], recorded.steps, strict=True), 1):
        assert (got["P"], got["T"], got["start"], got["run"], got["taken"]) == (want.P, want.T, want.start, want.run, want.taken)
        assert dict(map(tuple, got["top"])) == pytest.approx(dict(want.top), abs=1e-5)
        assert got["cost"][1][0] == want.S and got["seconds"][0] <= got["seconds"][1]
        assert bool(got["why"]) == (number > 5) and got["lost"] == (12 if number > 5 else 0)


def test_fewer_bits_where_they_do_not_show():
    torch.manual_seed(0)
    assert [kind_of(n) for n in (20_000, 20_001, 3_000_000, 3_000_001)] == ["float32", "float16", "float16", "int8"]
    with pytest.raises(ValueError, match="40,000,000.*got 40,000,001"):
        kind_of(40_000_001)
    for tokens, atol in ((300, 2e-3), (40_000, 2e-2)):  # float16, int8
        q, k, v = torch.randn(3, tokens, 32)
        told, (run,) = unpacked(pack([trace_rows(q, k, v, [tokens])]))
        assert told["dtype"] == {300: "float16", 40_000: "int8"}[tokens]
        np.testing.assert_allclose(run[0, 0, :9], q[:9].numpy(), atol=atol)
        np.testing.assert_allclose(run[2, 0, -9:], v[-9:].numpy(), atol=atol)


def test_the_counters_add_up(recorded):
    for cache in (True, False):
        parts = [step_cost(recorded, s, cache) for s in range(1, 9)]
        assert total_cost(recorded, 8, cache).macs == sum(part.macs for part in parts)
    assert total_cost(recorded, 8).tokens == 8 + 4 + 36 and total_cost(recorded, 8, cache=False).tokens == 8 + 9 + 10 + 11 + 4 * 12
    counted = cost.step_cost(GPTConfig(n_layer=3, n_head=2, n_embd=8, vocab_size=11, block_size=12), 1, 10, itemsize=8)
    assert (step_cost(recorded, 3).macs, step_cost(recorded, 3).bytes_moved) == (counted.macs, counted.bytes), "as in notebook 08"
    assert step_cost(recorded, 3).cache_bytes == 2 * 3 * 10 * 8 * 8  # k and v, layers, rows, C, bytes of a float64
    assert step_cost(recorded, 3).cache_bytes_read == 2 * 3 * 9 * 8 * 8


@pytest.mark.parametrize("limit", [6, 10, 16])
def test_a_long_text_is_windowed(limit):
    for S in range(1, 501):
        rows = visible(S, 500, limit)
        assert len(rows) == limit and S - 1 in rows and len(set(rows)) == limit
        there = [i for i in rows if i is not None]
        assert there == sorted(there) and there[-1] < 500 and rows.count(None) <= 1


def test_long_and_wide():
    "500 tokens, 48 layers and 25 heads fit in a page, in words of any length."
    torch.manual_seed(0)
    trace_of = trace_rows(*torch.randn(3, 500, 4), [496, 1, 1, 1, 1])
    wide = torch.randn(3, 48, 500, 100)
    many = type(trace_of)(trace_of.steps, (wide,), 25, text=tuple(range(500)))
    told, (run,) = unpacked(pack([many], lambda token: "שלום " * token))
    assert run.shape == (3, 48, 500, 100) and told["names"]["7"] == "שלום " * 7
    assert len(filmstrip(many, View(47, 24, names=lambda token: "word" * token), [5]).data) < 60_000


def test_names_cannot_break_the_page(recorded):
    stepper = TraceStepper(recorded, vocab=lambda token: "</script><img src=x onerror=alert(1)>'\"&$")
    page = stepper._repr_mimebundle_()["text/html"]
    assert page.count("<script>") == page.count("</script>") == 1 and page.count("<img ") == 1 and "onerror" not in page.split("src='data")[1]
    stepper.close()


def test_key_steps(recorded):
    assert key_steps(recorded) == [1, 2, 5, 6]
    assert key_steps(trace_rows(torch.eye(3), torch.eye(3), torch.eye(3), [2, 1])) == [1, 2]


def test_pictures(recorded):
    film = filmstrip(recorded)
    assert film.data[:4] == b"\x89PNG" and len(film.data) < 100_000 and "Step 6 of 8" in film.alt and "every cached row is void" in film.alt
    assert described(recorded, 3, View()).startswith(headline(recorded, 3, View()))
    one = trace_rows(torch.eye(3), torch.eye(3), torch.eye(3), [2, 1])
    assert filmstrip(one, steps=[2]).data == filmstrip(one, steps=[2]).data, "the same bytes each time"


# --- the widget, without a browser


def test_traits(models):
    stepper = CacheStepper(models[0], PROMPT, 8, vocab="abcdefghijk", step=2)
    assert (stepper.layer, stepper.head, stepper.text) == (0, 0, 0), "as in code"
    stepper.step, stepper.layer, stepper.head, stepper.cache = 8, 2, 1, False
    assert (stepper.view.layer, stepper.view.head, stepper.view.cache, stepper.view.names(2)) == (2, 1, False, "c")
    for name, limits in dict(step="1 to 8", layer="0 to 2", head="0 to 1", text="0 to 0").items():
        with pytest.raises(ValueError, match=f"expected {name} from {limits}, got 9"):
            setattr(stepper, name, 9)
    assert (stepper.step, stepper.layer) == (8, 2)
    assert stepper.data == b"", "sent only where a front end wants it"
    stepper.wanted = True
    assert stepper.data == stepper.packed
    stepper.close()


def test_the_race_can_be_measured(models):
    stepper = CacheStepper(models[0], PROMPT, 4)
    assert stepper.measurable and not TraceStepper(stepper.trace).measurable
    stepper.measuring = True
    assert [len(lane) for lane in stepper.measured] == [4, 4] and not stepper.measuring and min(map(min, stepper.measured)) > 0
    assert hooks(models[0]) == 0
    stepper.close()
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.generation_config.eos_token_id = list(range(11))
    assert [len(lane) for lane in measured_steps(theirs, PROMPT, 3)] == [3, 3]


def test_closing_leaves_no_widget(models):
    before = set(ipywidgets.widgets.widget._instances)
    stepper = CacheStepper(models[0], PROMPT, 2)
    assert set(ipywidgets.widgets.widget._instances) > before
    stepper.close()
    stepper.layout.close()
    assert set(ipywidgets.widgets.widget._instances) == before and stepper.trace is None


def test_the_output_is_whole_by_itself(recorded, monkeypatch):
    "HTML with a picture and a script: no widget's number, which would lead nowhere later. The same bytes each time, if static."
    stepper = TraceStepper(recorded, step=3)
    live = stepper._repr_mimebundle_()
    assert set(live) == {"text/html", "text/plain"} and stepper.key in live["text/html"]
    monkeypatch.setenv("KVCACHE_STATIC", "1")
    static = stepper._repr_mimebundle_()
    assert static == TraceStepper(recorded, step=3)._repr_mimebundle_() and stepper.key not in static["text/html"]
    assert re.search("<img alt='Step 3 of 8: token 9", static["text/html"]) and len(static["text/html"]) < 100_000
    assert "http" not in static["text/html"]
    stepper.close()


def test_the_front_end_is_one_module():
    module = front_end()
    assert module.count("export default") == 1 and "import " not in re.sub(r"//.*", "", module).replace("import(", "")
    assert len(shortened(module)) < len(module) and "http" not in module


def test_attention_weights_by_hand():
    "Two equal keys share the weight; a masked one gets none."
    q, k = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    torch.testing.assert_close(attention_weights(q, k, torch.tensor([1])), torch.tensor([[0.5, 0.5, 0.0]]))
    assert "Layer 0, head 0. Rows 0–2 computed now." in described(trace_rows(k, k, k, [3]), 1, View())
