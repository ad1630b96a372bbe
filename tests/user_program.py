"""What a user of the package may write: it is type-checked, and it runs."""

from collections.abc import Iterator

import torch
from torch import Tensor

import kvcache_lib
from kvcache_lib import GPT, GPT_fast, GPT_kv, GPTConfig, KVBuffer, KVCache, Trainer
from kvcache_lib.cost import StepCost, step_cost
from kvcache_lib.named import NamedTensor, attention
from kvcache_lib.trainer import TrainerConfig


def empty_cache(model: GPT_kv) -> KVCache:
    return [None] * model.n_layer


def continued(model: GPT_fast, prompt: Tensor, n: int) -> Tensor:
    buffer: KVBuffer = model.new_buffer(batch_size=len(prompt))
    logits, _ = model.step(prompt, buffer, last_only=True)
    many = buffer.expand(n)
    texts = prompt.repeat_interleave(n, dim=0)
    for _ in range(3):
        drawn = torch.multinomial(logits[:, -1].softmax(1), 1)
        texts = torch.cat([texts, drawn.repeat_interleave(n // len(drawn) or 1, dim=0)], dim=1)
        logits, _ = model.step(texts, many, last_only=True)
    return texts


def streamed(model: GPT, prompt: Tensor) -> list[list[int]]:
    stream: Iterator[Tensor] = model.generate(prompt, 4, eos_token=2, stream=True)
    return [token.flatten().tolist() for token in stream]


def main() -> None:
    config = GPTConfig(model_type="gpt-nano", vocab_size=11, block_size=16)
    layers: int = config.n_layer
    kv, fast = GPT_kv(config).eval(), GPT_fast(config).eval()
    fast.load_state_dict(kv.state_dict())
    prompt = torch.zeros(1, 3, dtype=torch.long)
    logits, loss, cache = kv(prompt, kv_cache=empty_cache(kv))
    assert len(cache) == layers and loss is None and streamed(fast, prompt)
    assert continued(fast, prompt, 2).shape == (2, 6)
    settings = TrainerConfig(max_iters=1, device="cpu", batch_size=1)
    data = torch.utils.data.TensorDataset(prompt, prompt)
    Trainer(settings, GPT(config), data).run()
    cost: StepCost = step_cost(config, new=1, seq=8)
    q = NamedTensor(torch.ones(2), "key")
    k = NamedTensor(torch.ones(3, 2), "seq", "key")
    v = NamedTensor(torch.ones(3, 4), "seq", "val")
    assert cost.macs > 0 and attention(q, k, v).size("val") == 4 and kvcache_lib.__version__


main()
