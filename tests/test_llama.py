"""The decoder of today: its settings, its groups, its bytes, and that it is used as GPT_fast is. Equality with transformers is in test_checkpoint."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvcache_lib.buffer import KVBuffer
from kvcache_lib.cost import cache_bytes, step_cost
from kvcache_lib.llama import Llama, LlamaConfig, grouped_attention
from kvcache_lib.mingpt import GPTConfig

EXACT = dict(rtol=0, atol=0)
CLOSE = dict(rtol=0, atol=1e-11)
SIZES = dict(n_layer=2, n_head=6, n_embd=24, vocab_size=13, block_size=20)


def large(config=None, **settings):
    model = Llama(config or LlamaConfig(**SIZES | settings)).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
def test_grouped_heads_are_heads_with_the_same_keys(n_kv_head):
    "Their keys' weights written once for each head of a group: full heads, the same logits; and every step the same."
    model = large(n_kv_head=n_kv_head, qk_norm=True, qkv_bias=True)
    full = large(qk_norm=True, qkv_bias=True)
    state = model.state_dict()
    for name in [name for name in state if ".c_attn." in name]:
        q, k, v = state[name].split(model.transformer.h[0].attn.sizes)
        k, v = (z.unflatten(0, (n_kv_head, -1)).repeat_interleave(6 // n_kv_head, dim=0).flatten(0, 1) for z in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    idx = torch.randint(13, (2, 20))
    want = full(idx)[0].detach()
    torch.testing.assert_close(model(idx)[0].detach(), want, **CLOSE)
    for _ in range(10):
        buffer, got = model.new_buffer(2, capacity=1), []
        for end in [*sorted(torch.randperm(19)[:6].add(1).tolist()), 20]:
            got.append(model(idx[:, :end], kv_cache=buffer)[0])
        torch.testing.assert_close(torch.cat(got, 1), want, **CLOSE)


def test_attention_of_one_query_is_the_last_row_of_all():
    q, k, v = torch.randn(2, 6, 9, 4), torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4)
    torch.testing.assert_close(grouped_attention(q[:, :, -1:], k, v), grouped_attention(q, k, v)[:, :, -1:])


@pytest.mark.parametrize("kind", [dict(n_kv_head=1), dict(n_kv_head=2, head_size=10), dict(n_kv_head=3, window=7), dict(window=5, sinks=3)], ids=str)
def test_bytes_and_multiplications_are_as_predicted(kind):
    model = large(**kind, n_hidden=40)
    c, idx = model.config, torch.randint(13, (3, 20))
    for n in (1, 6, 20):
        buffer = model.new_buffer(3, capacity=n)
        model.step(idx[:, :n], buffer)
        held = sum(t.nbytes for layer in buffer.to_lists() for t in layer)
        assert cache_bytes(c, n, batch=3, itemsize=8) == held == buffer.nbytes
        assert step_cost(c, 1, n, batch=3, itemsize=8).cache_bytes == held
    weights = [p for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name]
    assert step_cost(c, 1, 5, itemsize=8).weight_bytes == sum(p.nbytes for p in weights)
    if not c.sinks:  # those scores are computed in two parts
        for new, seq in ((1, 20), (4, 20), (3, 3)):
            buffer = model.new_buffer(3)
            if seq > new:
                model.step(idx[:, : seq - new], buffer)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model.step(idx[:, :seq], buffer)
            assert counter.get_total_flops() == 2 * step_cost(c, new, seq, 3, 8, all_logits=True).macs
    if c.window:
        assert cache_bytes(c, 10**6) == cache_bytes(c, 20)
    else:
        with pytest.raises(ValueError, match="at most 20 tokens"):
            cache_bytes(c, 21)


@pytest.mark.parametrize("window", [None, 6])
def test_every_way_of_generating_writes_the_same(window):
    model, idx = large(n_kv_head=2, window=window), torch.randint(13, (2, 5))
    for settings in (dict(), dict(do_sample=True, temperature=2.0, top_k=5), dict(eos_token=3)):
        texts = []
        for generate in (model.generate, model.generate_kv):
            generator = torch.Generator().manual_seed(3)
            texts.append(generate(idx, 24, **settings, generator=generator))
            generator.manual_seed(3)
            parts = list(generate(idx, 24, **settings, generator=generator, stream=True))
            torch.testing.assert_close(torch.cat([idx, *parts], dim=1), texts[-1], **EXACT)
        torch.testing.assert_close(*texts, **EXACT)
    assert model.generate_kv(idx, 0).shape == idx.shape
    with pytest.raises(ValueError, match="expected tokens from 0 to 12"):
        model.generate_kv(idx + 9, 3)


def test_it_learns():
    model = Llama(LlamaConfig(**SIZES, n_kv_head=2, tied=True, qk_norm=True, window=8))
    x = torch.randint(13, (4, 20))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model(x[:, :-1], x[:, 1:])[1]
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is not None for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_layer_with_a_hook_or_another_one_is_called():
    model, idx = large(n_kv_head=2), torch.randint(13, (1, 6))
    seen = []
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.ln_2", "transformer.h.1.mlp.c_proj", "transformer.ln_f", "lm_head"]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
    model.step(idx, model.new_buffer())
    assert seen == names
    model = large()
    model.transformer.h[0].mlp.c_proj = nn.Identity()
    with pytest.raises(RuntimeError):
        model.step(idx, model.new_buffer())


REFUSED = {
    "groups": (dict(n_kv_head=4), "n_kv_head must divide n_head, got n_kv_head=4 and n_head=6"),
    "more keys": (dict(n_kv_head=12), "n_kv_head must divide n_head, got n_kv_head=12"),
    "no keys": (dict(n_kv_head=0), "n_kv_head ≥ 1, got 0"),
    "odd": (dict(n_embd=18), "expected an even head_size, got 3"),
    "width": (dict(n_embd=25), "n_head must divide n_embd"),
    "hidden": (dict(n_hidden=0), "n_hidden ≥ 1"),
    "dropout": (dict(attn_pdrop=0.1), "no dropout"),
    "theta": (dict(theta=0.0), "theta > 0, got 0"),
    "eps": (dict(eps=-1.0), "eps > 0, got -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_sense(case):
    changes, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        Llama(LlamaConfig(**SIZES | changes))


def test_what_else_is_refused():
    model, idx = large(n_kv_head=2), torch.randint(13, (1, 6))
    with pytest.raises(TypeError, match="expected a LlamaConfig, got GPTConfig"):
        Llama(GPTConfig(**SIZES))
    with pytest.raises(TypeError, match="expected a KVBuffer"):
        model(idx, kv_cache=[None, None])
    with pytest.raises(ValueError, match="2 heads of 4.*got one of 2 layers, batch 1, 6 heads of 4"):
        model.step(idx, KVBuffer(GPTConfig(**SIZES), dtype=torch.float64))
    with pytest.raises(MemoryError, match="a Llama of these sizes"):
        Llama(LlamaConfig(**SIZES | dict(n_embd=6 * 2**20, n_layer=2**20)))
    with pytest.raises(AttributeError, match="did you mean 'n_kv_head'"):
        LlamaConfig(**SIZES).n_kv_heads = 2


def test_the_configuration_that_was_given_stays():
    config = LlamaConfig(**SIZES)
    model = Llama(config)
    assert config.n_kv_head is None and (model.config.n_kv_head, model.config.head_size, model.config.n_hidden) == (6, 4, 64)
    again = Llama(model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config and copy.deepcopy(model).config == model.config
    assert Llama(LlamaConfig(**SIZES | dict(n_embd=768, n_head=12))).config.n_hidden == 2048


def test_parts_of_a_step_can_be_left_out():
    model, idx = large(n_kv_head=2), torch.randint(13, (2, 9))
    want, loss = model(idx, idx)
    buffer = model.new_buffer(2)
    torch.testing.assert_close(model.step(idx, buffer, last_only=True)[0], want[:, -1:].detach(), **CLOSE)
    got, again = model.step(idx.int(), buffer, targets=idx, compute_first=True)
    torch.testing.assert_close((got, again), (want.detach(), loss.detach()), **CLOSE)
    assert model.num_params() == sum(p.numel() for p in model.parameters())
