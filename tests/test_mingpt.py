"""The baseline: minGPT's interface, names and behaviour."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_pair
from reference import gpt2_logits

from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import (
    GPT,
    PRESETS,
    Block,
    CausalSelfAttention,
    GPTConfig,
    Trainer,
    TrainerConfig,
    next_token,
)
from kvcache_lib.weights import mingpt_state_dict

# What minGPT's state dict holds for one layer, C = 8, a block of 16 and 11 tokens.
LAYER = {
    "ln_1.weight": (8,), "ln_1.bias": (8,), "attn.bias": (1, 1, 16, 16),
    "attn.c_attn.weight": (24, 8), "attn.c_attn.bias": (24,), "attn.c_proj.weight": (8, 8), "attn.c_proj.bias": (8,),
    "ln_2.weight": (8,), "ln_2.bias": (8,),
    "mlp.c_fc.weight": (32, 8), "mlp.c_fc.bias": (32,), "mlp.c_proj.weight": (8, 32), "mlp.c_proj.bias": (8,),
}  # fmt: skip
WHOLE = {
    "transformer.wte.weight": (11, 8), "transformer.wpe.weight": (16, 8),
    "transformer.ln_f.weight": (8,), "transformer.ln_f.bias": (8,), "lm_head.weight": (11, 8),
}  # fmt: skip


SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=16)


@pytest.mark.parametrize("cls", [GPT, GPT_kv, GPT_fast])
def test_state_dict_is_minGPTs_but_for_the_masks(cls):
    model = cls(SMALL)
    theirs = WHOLE | {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
    ours = {name: shape for name, shape in theirs.items() if not name.endswith(".attn.bias")}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == ours
    whole = mingpt_state_dict(model)
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == theirs
    saved = {name: torch.randn(shape) for name, shape in theirs.items()}
    saved |= {name: torch.ones(16, 16).tril()[None, None] for name in theirs if name.endswith(".attn.bias")}
    for strict in (saved, {name: saved[name] for name in ours}):
        model.load_state_dict(strict, strict=True)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(mingpt_state_dict(model), saved, rtol=0, atol=0)


def test_another_mask_is_not_taken_silently():
    model = GPT(SMALL)
    for mask in (torch.ones(1, 1, 16, 16), torch.ones(1, 1, 8, 8).tril()):
        state = model.state_dict() | {"transformer.h.1.attn.bias": mask}
        with pytest.raises(RuntimeError, match=r"h.1.attn.bias: expected a causal mask of shape \(1, 1, 16, 16\)"):
            model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="(?s)Missing key.*Unexpected key"):
        state = model.state_dict()
        state["transformer.h.0.attn.bais"] = state.pop("transformer.ln_f.bias")
        model.load_state_dict(state)


def test_the_mask_takes_little_and_is_not_saved():
    model = GPT(GPTConfig(model_type="gpt-nano", vocab_size=3, block_size=8192))
    parameters = sum(p.nbytes for p in model.parameters())
    assert sum(t.nbytes for t in model.state_dict().values()) <= 1.1 * parameters
    for changed in (model, copy.deepcopy(model), model.double(), model.to("cpu")):
        masks = {block.attn.bias.data_ptr() for block in changed.transformer.h}
        assert len(masks) == 1 and changed.transformer.h[0].attn.bias.dtype == torch.int8


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_built_on_meta_and_filled(how):
    model, idx = GPT(SMALL).eval(), torch.randint(11, (1, 9))
    with torch.device("meta"):
        other = GPT(SMALL).eval()
    if how == "to_empty":
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), strict=True, assign=how == "assign")
    torch.testing.assert_close(other(idx)[0], model(idx)[0])


def test_state_dicts_go_both_ways():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=16)
    plain, cached = GPT(config), GPT_kv(config)
    plain.load_state_dict(cached.state_dict(), strict=True)
    cached.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("n_head,t", [(1, 1), (2, 7), (4, 16)])
def test_forward_equals_an_independent_gpt2(n_head, t):
    _, plain = make_pair(n_layer=3, n_head=n_head)
    idx = torch.randint(11, (3, t))
    logits, loss = plain(idx)
    expected = torch.stack([gpt2_logits(plain.state_dict(), n_head, row) for row in idx])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert loss is None


def test_loss_ignores_minus_one(pair):
    _, plain = pair
    idx, targets = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))
    targets[:, :4] = -1
    logits, loss = plain(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 4:].flatten(0, 1), targets[:, 4:].flatten()))


def test_one_config_builds_two_models_and_is_not_changed():
    config = GPT.get_default_config()
    config.model_type, config.vocab_size, config.block_size = "gpt-nano", 3, 11
    before = copy.deepcopy(config)
    first, second = GPT(config), GPT(config)
    assert config == before
    assert first.num_params() == second.num_params()
    assert GPT(first.config).num_params() == first.num_params()  # a complete configuration is a valid one


def test_presets_have_the_published_sizes():
    # GPT-2 report, table 2 (124M as corrected by OpenAI); one weight matrix for embedding and head there, two here.
    config = GPTConfig(model_type="gpt2", vocab_size=50257, block_size=1024)
    with torch.device("meta"):
        assert GPT(config).num_params() - 50257 * 768 == 124_439_808
    assert PRESETS["gpt2-xl"] == (48, 25, 1600)
    for n_layer, n_head, n_embd in PRESETS.values():
        assert n_embd % n_head == 0


def test_initial_weights():
    model = GPT(GPTConfig(model_type="gpt-mini", vocab_size=128, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / (2 * 6) ** 0.5, rel=0.05)
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert (p == 1).all()


def test_building_a_subclass_builds_the_model_once(monkeypatch):
    built = []
    original = CausalSelfAttention.__init__
    monkeypatch.setattr(
        CausalSelfAttention, "__init__", lambda self, config: (built.append(1), original(self, config))[1]
    )
    GPT_kv(GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=16))
    assert len(built) == 2


def test_only_linear_weights_decay():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=16))
    config = Trainer.get_default_config()
    decayed, others = model.configure_optimizers(config).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "lm_head.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight",
    }  # fmt: skip
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert (decayed["weight_decay"], others["weight_decay"]) == (config.weight_decay, 0.0)


# --- choosing a token ---


def test_next_token_keeps_the_k_likeliest():
    logits = torch.randn(1, 11).repeat(4000, 1)
    drawn = next_token(logits, do_sample=True, top_k=3).flatten()
    assert set(drawn.tolist()) == set(logits[0].topk(3).indices.tolist())


def test_next_token_draws_from_the_tempered_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).repeat(40_000, 1)
    drawn = next_token(logits, temperature=0.5, do_sample=True).flatten()
    torch.testing.assert_close(drawn.bincount() / 40_000, (logits[0] / 0.5).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-30, float("inf")])
def test_no_temperature_overflows(dtype, temperature):
    logits = torch.tensor([[300.0, -250.0, 296.0, -300.0]], dtype=dtype).repeat(400, 1)
    drawn = set(next_token(logits, temperature, do_sample=True).flatten().tolist())
    assert drawn == ({0, 1, 2, 3} if temperature > 1 else {0})
    assert (next_token(logits, temperature) == 0).all()


def test_next_token_leaves_the_logits_alone():
    logits = torch.randn(2, 11)
    before = logits.clone()
    next_token(logits, 0.5, True, 3)
    assert torch.equal(logits, before)


# --- errors ---


@pytest.mark.parametrize(
    "change,says",
    [
        ({"model_type": "gpt3"}, "unknown model_type 'gpt3', expected one of"),
        ({"model_type": "gpt-nano", "n_layer": 4}, "n_layer=4 was given too"),
        ({"vocab_size": 3}, "expected n_layer to be a whole number ≥ 1, got None"),
        (
            {"model_type": "gpt-nano", "vocab_size": None},
            "expected vocab_size to be a whole number ≥ 1, got None",
        ),
        ({"model_type": "gpt-nano", "block_size": 0}, "expected block_size to be a whole number ≥ 1, got 0"),
        ({"n_layer": 1, "n_head": 3, "n_embd": 8}, "n_head must divide n_embd, got n_head=3 and n_embd=8"),
    ],
)
def test_bad_configurations(change, says):
    config = GPTConfig(vocab_size=3, block_size=11)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=says):
        GPT(config)


def test_a_misspelt_setting_is_refused():
    with pytest.raises(AttributeError):
        GPTConfig().n_layers = 3
    with pytest.raises(AttributeError):
        TrainerConfig().lr = 3
    with pytest.raises(AttributeError, match="no setting 'n_embed', did you mean 'n_embd'"):
        GPTConfig().merge_from_dict({"n_embed": 3})


def test_settings_of_ones_own_go_into_the_models_config():
    config = GPTConfig(model_type="gpt-nano", vocab_size=3, block_size=11)
    config.rank, config.n_kv_head = 4, 1
    model = GPT(config)
    assert (model.config.rank, model.config.n_kv_head) == (4, 1) and model.config is not config
    assert model.config.to_dict()["rank"] == 4 and model.config.to_dict()["n_layer"] == 3
    plain = type("Config", (), dict(config.to_dict(), model_type=None))
    assert GPT(plain).config.rank == 4


def test_a_presets_sizes_are_read_from_the_callers_config():
    config = GPT.get_default_config()
    config.model_type, config.vocab_size, config.block_size = "gpt-nano", 3, 11
    assert [None] * config.n_layer == [None] * 3
    config.model_type = "gpt-micro"
    model = GPT(config)
    assert model.n_layer == model.config.n_layer == config.n_layer == 4


@pytest.mark.parametrize("name,value", [("vocab_size", True), ("block_size", 10**20), ("n_embd", 2.0), ("n_head", "3"),
    ("attn_pdrop", 1.5), ("resid_pdrop", float("nan")), ("embd_pdrop", "0.1"), ("model_type", ["gpt-nano"]),
    ("vocab_size", 2**31 - 1)])  # fmt: skip
def test_values_that_make_no_sense(name, value):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=3, block_size=11)
    setattr(config, name, value)
    if value == 2**31 - 1:
        config.n_embd = 2**20
    with pytest.raises((TypeError, ValueError, MemoryError), match=f"{name}|a GPT of these sizes takes"):
        GPT(config)


def test_from_pretrained_is_transformers_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    theirs.save_pretrained(tmp_path)
    idx = torch.randint(11, (2, 9))
    for cls in (GPT, GPT_kv, GPT_fast):
        model = cls.from_pretrained(str(tmp_path)).eval()
        torch.testing.assert_close(model(idx)[0], theirs(idx).logits)


BAD_IDX = [
    (torch.zeros(1, 17, dtype=torch.long), ValueError, "at most 16 tokens, the block size, got 17"),
    (torch.zeros(1, 0, dtype=torch.long), ValueError, r"shape \(B, t\).*got \(1, 0\)"),
    (torch.zeros(0, 3, dtype=torch.long), ValueError, r"got \(0, 3\)"),
    (torch.zeros(4, dtype=torch.long), ValueError, r"got \(4,\)"),
    (torch.zeros(1, 4), TypeError, "whole numbers .* got torch.float32"),
    ([[0, 1]], TypeError, "expected idx to be a tensor of token numbers, got list"),
]


@pytest.mark.parametrize("idx,error,says", BAD_IDX)
@pytest.mark.parametrize("which", [0, 1])
def test_forward_refuses_bad_tokens(pair, which, idx, error, says):
    with pytest.raises(error, match=says):
        pair[which](idx)


@pytest.mark.parametrize("which", [0, 1])
def test_forward_refuses_targets_of_another_shape(pair, which):
    with pytest.raises(ValueError, match=r"targets of idx's shape \(2, 4\), got \(2, 3\)"):
        pair[which](torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "settings,error,says",
    [
        ({"temperature": 0}, ValueError, "temperature > 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature > 0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature > 0, got nan"),
        ({"top_k": 0}, ValueError, "top_k ≥ 1, got 0"),
        ({"top_k": 12}, ValueError, "top_k ≤ 11, the size of the vocabulary, got 12"),
        ({"top_k": True}, TypeError, "top_k to be a whole number, got True"),
        ({"temperature": "1"}, TypeError, "temperature to be a number, got '1'"),
        ({"do_sample": "no"}, TypeError, "do_sample to be True or False, got 'no'"),
        ({"eos_token": 11}, ValueError, "eos_token ≤ 10, got 11"),
        ({"generator": 7}, TypeError, "a torch.Generator, got int"),
        ({"top_k": 2.5}, TypeError, "top_k to be a whole number, got 2.5"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens ≥ 0, got -1"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens to be a whole number, got 1.5"),
        ({"idx": torch.tensor([[0, 11]])}, ValueError, "tokens from 0 to 10, got 0 to 11"),
        ({"idx": torch.tensor([[-1, 3]])}, ValueError, "tokens from 0 to 10, got -1 to 3"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, ValueError, r"got \(1, 0\)"),
        ({"idx": torch.zeros(3)}, TypeError, "got torch.float32"),
        ({"idx": torch.zeros(3, dtype=torch.long)}, ValueError, r"got \(3,\)"),
    ],
)
@pytest.mark.parametrize("generate", ["generate", "generate_kv"])
def test_generation_refuses_bad_arguments_before_any_work(pair, monkeypatch, generate, settings, error, says):
    monkeypatch.setattr(Block, "forward", lambda *args: pytest.fail("the model was run"))
    arguments = {"idx": torch.zeros(1, 3, dtype=torch.long), "max_new_tokens": 4} | settings
    with pytest.raises(error, match=says):
        getattr(pair[0], generate)(**arguments)


# --- the trainer ---


def tiny_data():
    row = torch.arange(16) % 3
    return torch.utils.data.TensorDataset(row[None, :8], row[None, 1:9])


def test_trainer_calls_back_and_learns():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=3, block_size=8))
    config = TrainerConfig(device="cpu", max_iters=60, batch_size=4, learning_rate=1e-2)
    before = copy.deepcopy(config)
    trainer = Trainer(config, model, tiny_data())
    seen, losses = [], []
    trainer.set_callback("on_batch_end", lambda trainer: pytest.fail("replaced, so never called"))
    trainer.set_callback("on_batch_end", lambda trainer: seen.append(trainer.iter_num))
    trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    trainer.run()
    assert seen == list(range(60))
    assert losses[-1] < 0.1 < losses[0]
    assert config == before


def test_trainer_goes_on_until_interrupted():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=3, block_size=8))
    trainer = Trainer(TrainerConfig(device="cpu", batch_size=1), model, tiny_data())

    def stop(trainer):
        if trainer.iter_num == 5:
            raise KeyboardInterrupt

    trainer.set_callback("on_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.iter_num == 5


def test_trainer_refuses_no_iterations():
    with pytest.raises(ValueError, match="max_iters ≥ 1"):
        Trainer(TrainerConfig(max_iters=0), torch.nn.Linear(1, 1), tiny_data())
