"""Programs written for minGPT's modules, run with nothing changed but where the names come from.

Each is a script that imports `mingpt.model` and `mingpt.trainer`. The shim below gives these names to our modules.
"""

import sys
import types

import pytest
import torch

from kvcache_lib import fast, gpt, mingpt, trainer

TRAIN = """
# Train on a task of one's own, with callbacks, then generate; a configuration in minGPT's way.
import torch
from torch.utils.data import Dataset
from mingpt.model import GPT
from mingpt.trainer import Trainer

class Echo(Dataset):
    def __len__(self): return 64
    def get_vocab_size(self): return 2
    def get_block_size(self): return 7
    def __getitem__(self, i):
        bits = torch.tensor([int(b) for b in f"{i:06b}"])
        text = torch.cat([bits, bits[-1:]])
        y = text[1:].clone(); y[:5] = -1
        return text[:-1], y

data = Echo()
config = GPT.get_default_config()
config.model_type = None
config.n_layer, config.n_head, config.n_embd = 2, 2, 16
config.vocab_size, config.block_size = data.get_vocab_size(), data.get_block_size()
model = GPT(config)
settings = Trainer.get_default_config()
settings.max_iters, settings.batch_size, settings.learning_rate, settings.device = 40, 16, 1e-2, "cpu"
trainer = Trainer(settings, model, data)
losses = []
trainer.set_callback("on_batch_end", lambda t: losses.append((t.iter_num, t.loss.item(), t.iter_dt)))
trainer.run()
assert [n for n, _, _ in losses] == list(range(40)) and losses[-1][1] < losses[0][1]
model.eval()
out = model.generate(torch.zeros(3, 6, dtype=torch.long), 1, do_sample=False)
assert out.shape == (3, 7)
"""

CACHE_CHECK = """
# The cache homework's way: a list as long as the configuration says, from the caller's own configuration.
import torch
from mingpt.model import GPT

config = GPT.get_default_config()
config.model_type = "gpt-nano"
config.vocab_size, config.block_size = 50, 32
config.embd_pdrop = config.resid_pdrop = config.attn_pdrop = 0.0
model = GPT(config).eval()
kv_cache = [None] * config.n_layer
assert len(kv_cache) == model.n_layer == len(model.transformer.h) == 3
x = torch.randint(0, 50, (2, 8))
logits, loss = model(x, targets=x)
assert logits.shape == (2, 8, 50) and loss.item() > 0
if hasattr(model, "generate_kv"):
    full, _, kv_cache = model(x, kv_cache=kv_cache)
    torch.testing.assert_close(full, logits)
    more = torch.cat([x, torch.randint(0, 50, (2, 1))], 1)
    last, _, kv_cache = model(more, kv_cache=kv_cache)
    torch.testing.assert_close(last[:, -1], model(more)[0][:, -1])
    assert torch.equal(model.generate_kv(x, 40), model.generate(x, 40))
"""

LORA = """
# LoRA: settings of its own in the configuration, layers replaced, only the new weights trained.
import torch, torch.nn as nn
from mingpt.model import GPT
from mingpt.trainer import Trainer

class LoRALinear(nn.Linear):
    def __init__(self, layer, r, alpha):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.lora_A = nn.Parameter(torch.randn(r, layer.in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scale = alpha / r
    def forward(self, x):
        return super().forward(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

class LoRAGPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn.c_attn = LoRALinear(block.attn.c_attn, self.config.lora_r, self.config.lora_alpha)
        for name, p in self.named_parameters():
            p.requires_grad = "lora_" in name

config = GPT.get_default_config()
config.merge_from_dict(dict(model_type="gpt-nano", vocab_size=7, block_size=8, lora_r=2, lora_alpha=4))
model = LoRAGPT(config)
before = {n: p.clone() for n, p in model.named_parameters()}
text = torch.arange(9) % 7
data = torch.utils.data.TensorDataset(text[None, :8], text[None, 1:])
settings = Trainer.get_default_config()
settings.device, settings.max_iters, settings.batch_size, settings.learning_rate = "cpu", 30, 4, 1e-2
settings.log_every = 10
losses = []
trainer = Trainer(settings, model, data)
trainer.add_callback("on_batch_end", lambda t: losses.append(t.loss.item()))
trainer.run()
changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
assert changed and all("lora_" in n for n in changed) and losses[-1] < losses[0]
model.eval()
if hasattr(model, "generate_kv"):
    prompt = torch.tensor([[0, 1, 2]])
    assert torch.equal(model.generate_kv(prompt, 12), model.generate(prompt, 12))
"""

CUSTOM_CONFIG = """
# A configuration class of one's own, without inheriting, and a checkpoint saved and loaded again.
import io, torch
from mingpt.model import GPT

class Config:
    model_type = None
    n_layer = 1; n_head = 4; n_embd = 32
    embd_pdrop = resid_pdrop = attn_pdrop = 0.0
    tie_weights = True
    def __init__(self, vocab, block):
        self.vocab_size, self.block_size = vocab, block

class Tied(GPT):
    def __init__(self, config):
        super().__init__(config)
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

model = Tied(Config(20, 16)).eval()
file = io.BytesIO()
torch.save(model.state_dict(), file); file.seek(0)
other = Tied(Config(20, 16)).eval()
other.load_state_dict(torch.load(file, weights_only=True))
assert other.lm_head.weight is other.transformer.wte.weight
x = torch.randint(20, (1, 5))
assert torch.equal(model.generate(x, 20, top_k=5), other.generate(x, 20, top_k=5))
whole = io.BytesIO()
torch.save(model, whole); whole.seek(0)
"""

SURGERY = """
# Evaluation under autocast and no_grad, freezing, a longer block cut down, and an optimizer of one's own.
import copy, math, torch, torch.nn as nn
from mingpt.model import GPT, CausalSelfAttention, Block, NewGELU

config = GPT.get_default_config()
config.model_type, config.vocab_size, config.block_size = "gpt-micro", 12, 32
model = GPT(config)
assert sum(isinstance(m, CausalSelfAttention) for m in model.modules()) == 4
assert isinstance(model.transformer.h[0], Block) and isinstance(model.transformer.h[0].mlp.act, NewGELU)
optimizer = model.configure_optimizers(type("T", (), dict(learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)))
assert len(optimizer.param_groups) == 2
x = torch.randint(12, (4, 16))
for _ in range(3):
    logits, loss = model(x[:, :-1], x[:, 1:])
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
frozen = copy.deepcopy(model).eval().requires_grad_(False)
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    assert math.isfinite(frozen(x[:, :-1], x[:, 1:])[1].item())
small = copy.deepcopy(model).eval()
small.block_size = 16
small.transformer.wpe.weight = nn.Parameter(small.transformer.wpe.weight[:16])
for block in small.transformer.h:
    block.attn.bias = block.attn.bias[:, :, :16, :16]
torch.testing.assert_close(small(x)[0], model.eval()(x)[0])
names = [n for n in model.state_dict() if not n.endswith("attn.masked_bias")]
assert "transformer.h.3.attn.c_attn.weight" in names and "lm_head.weight" in names
"""

SAMPLER = """
# A sampler and a perplexity of one's own, beam search by hand, and a probe that reads attention's inputs.
import torch
from torch.nn import functional as F
from mingpt.model import GPT

config = GPT.get_default_config()
config.model_type, config.vocab_size, config.block_size = "gpt-nano", 10, 24
model = GPT(config)
model.eval()
device = next(model.parameters()).device
@torch.no_grad()
def sample(x, steps, top_p):
    for _ in range(steps):
        window = x if x.size(1) <= model.block_size else x[:, -model.block_size:]
        logits, _ = model(window)
        probs, order = F.softmax(logits[:, -1, :] / 0.8, dim=-1).sort(descending=True)
        probs[probs.cumsum(-1) - probs > top_p] = 0
        x = torch.cat((x, order.gather(1, torch.multinomial(probs, 1))), dim=1)
    return x
assert sample(torch.zeros(2, 1, dtype=torch.long, device=device), 30, 0.9).shape == (2, 31)
beams = [(0.0, [1])]
for _ in range(5):
    grown = []
    for score, text in beams:
        logits, _ = model(torch.tensor([text]))
        top = logits[0, -1].log_softmax(0).topk(3)
        grown += [(score + s.item(), text + [t.item()]) for s, t in zip(*top)]
    beams = sorted(grown, reverse=True)[:4]
assert len(beams[0][1]) == 6
seen = []
handles = [b.attn.register_forward_hook(lambda m, i, o: seen.append(i[0].shape)) for b in model.transformer.h]
model(torch.zeros(1, 5, dtype=torch.long))
assert len(seen) == 3 and seen[0] == (1, 5, 48)
n_params = sum(p.numel() for p in model.transformer.parameters())
assert n_params == sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel()
"""

PROGRAMS = {
    "train and generate": TRAIN, "the cache's self-checks": CACHE_CHECK, "LoRA": LORA,
    "custom config": CUSTOM_CONFIG, "surgery": SURGERY, "samplers and probes": SAMPLER,
}  # fmt: skip


@pytest.mark.parametrize("cls", [mingpt.GPT, gpt.GPT_kv, fast.GPT_fast], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(monkeypatch, name, cls):
    shim = {"mingpt": types.ModuleType("mingpt"), "mingpt.trainer": trainer}
    shim["mingpt.model"] = types.SimpleNamespace(**vars(mingpt) | {"GPT": cls})
    for module, content in shim.items():
        monkeypatch.setitem(sys.modules, module, content)
    main = types.ModuleType("program")
    monkeypatch.setitem(sys.modules, "program", main)  # where pickle looks for its classes
    torch.manual_seed(3)
    exec(compile(PROGRAMS[name], f"<{name}>", "exec"), vars(main))
