"""A GPT-2 that shares no code with the package: functions on a state dict, each position computed from the text's start."""

import math

import torch


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu(x):
    return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def attention_row(q, keys, values):
    "One query (hs,) over keys and values (S, hs)."
    scores = torch.mv(keys, q) / math.sqrt(q.numel())
    weights = torch.exp(scores - scores.max())
    return torch.mv(values.T, weights / weights.sum())


def gpt2_logits(state, n_head, tokens):
    "Logits (t, vocab) of one sequence of tokens (t,), for a state dict with minGPT's names."
    p = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    x = p["wte.weight"][tokens] + p["wpe.weight"][: len(tokens)]
    n_layer = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("h."))
    for layer in range(n_layer):
        w = {
            name.removeprefix(f"h.{layer}."): tensor
            for name, tensor in p.items()
            if name.startswith(f"h.{layer}.")
        }
        a = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"])
        qkv = a @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
        q, k, v = qkv.chunk(3, dim=-1)
        hs = x.shape[-1] // n_head
        rows = [
            torch.cat(
                [
                    attention_row(q[t, h : h + hs], k[: t + 1, h : h + hs], v[: t + 1, h : h + hs])
                    for h in range(0, x.shape[-1], hs)
                ]
            )
            for t in range(len(tokens))
        ]
        x = x + torch.stack(rows) @ w["attn.c_proj.weight"].T + w["attn.c_proj.bias"]
        m = layer_norm(x, w["ln_2.weight"], w["ln_2.bias"])
        m = gelu(m @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"])
        x = x + m @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
    return layer_norm(x, p["ln_f.weight"], p["ln_f.bias"]) @ p["lm_head.weight"].T
