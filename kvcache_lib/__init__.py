"""The KV cache of a decoder-only transformer: derived, built and measured in notebooks.

`GPT` is the baseline, to minGPT's interface. `GPT_kv` is the same model with a KV cache, and `GPT_fast` the same with
fused operations and a cache that is written in place, a `KVBuffer`. They load each other's weights, and generate the
same text. `Llama` is the decoder as it is built today, on the same buffer. `stream` shows a text as it is written.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "GPT": "mingpt",
    "GPTConfig": "config",
    "Trainer": "trainer",
    "TrainerConfig": "trainer",
    "GPT_kv": "gpt",
    "KVCache": "gpt",
    "KVBuffer": "buffer",
    "GPT_fast": "fast",
    "Llama": "llama",
    "LlamaConfig": "llama",
    "stream": "text",
}
__all__ = [
    "GPT", "GPTConfig", "GPT_fast", "GPT_kv", "KVBuffer", "KVCache", "Llama", "LlamaConfig", "Trainer", "TrainerConfig", "stream",
]  # fmt: skip

if TYPE_CHECKING:
    from .buffer import KVBuffer
    from .config import GPTConfig
    from .fast import GPT_fast
    from .gpt import GPT_kv, KVCache
    from .llama import Llama, LlamaConfig
    from .mingpt import GPT
    from .text import stream
    from .trainer import Trainer, TrainerConfig


def __getattr__(name: str) -> Any:
    "The names above, imported when they are first asked for."
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcache_lib' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
