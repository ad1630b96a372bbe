"""Checkpoints against transformers: what it wrote is read, what we write it reads, and the logits are the same."""

import inspect
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers

from kvcache_lib import checkpoint
from kvcache_lib.checkpoint import load, save
from kvcache_lib.fast import GPT_fast
from kvcache_lib.formats import config_of
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.kept import kept_tokenizer
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.mingpt import GPT, GPTConfig
from kvcache_lib.text import encode

transformers = pytest.importorskip("transformers")
VOCAB, BLOCK = 61, 40
SIZES = dict(
    vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
    max_position_embeddings=BLOCK, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
KINDS = {
    "gpt2": (transformers.GPT2Config, dict(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=6, n_positions=BLOCK, bos_token_id=None, eos_token_id=None)),
    "llama": (transformers.LlamaConfig, SIZES | dict(head_dim=10)),
    "mistral": (transformers.MistralConfig, SIZES | dict(sliding_window=7)),
    "qwen2": (transformers.Qwen2Config, SIZES | dict(tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, SIZES | dict(head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
}
EXACT = dict(rtol=0, atol=0)


def theirs(kind, **changes):
    "A model of transformers with weights large enough that a wrong one shows."
    config_class, settings = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**(settings | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    "`(their model, its folder, in three files, our model)`."
    model, folder = theirs(request.param), tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder, max_shard_size="40kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, folder, load(folder).model


def tokens(n, batch=2):
    return torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    model, _, ours = pair
    idx = tokens(BLOCK)
    want = model(idx).logits
    assert want.abs().max() > 1
    near = dict(rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(idx)[0], want, **near)
    buffer, cache, ours_cut, theirs_cut, start = ours.new_buffer(2), None, [], [], 0
    for end in (9, 10, 11, 12, 25, 26, BLOCK):
        ours_cut.append(ours.step(idx[:, :end], buffer)[0])
        out = model(idx[:, start:end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        theirs_cut.append(out.logits)
    torch.testing.assert_close(torch.cat(ours_cut, 1), want, **near)
    torch.testing.assert_close(torch.cat(ours_cut, 1), torch.cat(theirs_cut, 1), **near)


@torch.no_grad()
def test_a_left_padded_batch_of_theirs_is_our_rows_one_by_one(pair):
    model, _, ours = pair
    lengths = (5, 12, 20)
    texts = [tokens(n, 1) for n in lengths]
    padded = torch.zeros(3, 20, dtype=torch.int64)
    mask = torch.zeros(3, 20, dtype=torch.int64)
    for row, text in enumerate(texts):
        padded[row, -text.size(1) :], mask[row, -text.size(1) :] = text[0], 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=places).logits
    for row, text in enumerate(texts):
        torch.testing.assert_close(ours(text)[0][0], logits[row, -text.size(1) :], rtol=0, atol=1e-4)


def test_the_same_text_is_written(pair):
    model, _, ours = pair
    idx = tokens(6, 1)
    want = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False, pad_token_id=0)
    for generate in (ours.generate, ours.generate_kv):
        torch.testing.assert_close(generate(idx, 20), want, **EXACT)


def test_round_trips_are_exact(pair, tmp_path):
    model, folder, ours = pair
    save(ours, tmp_path / "a")
    want = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    torch.testing.assert_close(load_file(tmp_path / "a" / "model.safetensors"), want, **EXACT)
    again = load(tmp_path / "a").model
    assert again.config == ours.config
    torch.testing.assert_close(dict(again.state_dict()), dict(ours.state_dict()), **EXACT)
    back, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(back) is type(model) and not any(notes[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), **EXACT)
    idx = tokens(BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(idx).logits, model(idx).logits, **EXACT)


def test_models_of_our_own_travel(tmp_path):
    sizes = dict(n_layer=2, n_head=4, n_embd=16, vocab_size=11, block_size=12)
    for n, model in enumerate((
        GPT_kv(GPTConfig(**sizes)),
        Llama(LlamaConfig(**sizes, n_kv_head=2, tied=True)),
        Llama(LlamaConfig(**sizes, window=5, qk_norm=True, n_hidden=24)),
    )):  # fmt: skip
        model = model.eval().bfloat16()
        save(model, tmp_path / str(n))
        again = load(tmp_path / str(n)).model
        torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), **EXACT)
        assert again.config == model.config and not again.training
        assert load(tmp_path / str(n), torch.float64).model.lm_head.weight.dtype == torch.float64
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(n), dtype=torch.float32).eval()
        idx = torch.randint(11, (1, 12))
        with torch.no_grad():
            torch.testing.assert_close(back(idx).logits, model.float()(idx)[0], rtol=0, atol=1e-4)
    tied = load(tmp_path / "1").model
    assert tied.lm_head.weight is tied.transformer.wte.weight


REFUSED = {  # what config.json says: what the error says
    "kind": (dict(model_type="mamba"), "model_type among gpt2, llama, .* got 'mamba'"),
    "head": (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "rope": (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling = .*yarn"),
    "old rope": (dict(rope_scaling={"type": "linear", "factor": 4.0}), "rope_scaling = .*linear"),
    "act": (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "quantized": (dict(quantization_config={"quant_method": "fp8"}), "quantization_config = .*fp8"),
    "lacking": (dict(hidden_size=None), "lacks hidden_size"),
    "groups": (dict(num_key_value_heads=4), "n_kv_head must divide n_head, got n_kv_head=4 and n_head=6"),
    "odd": (dict(head_dim=9), "even head_size, got 9"),
    "rope as a word": (dict(rope_scaling="yarn"), "rope_scaling = 'yarn'"),
    "rope as a list": (dict(rope_parameters=[1]), r"rope_parameters = \[1\]"),
    "llama3 rope": (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "rope_parameters = .*llama3"),
    "both names of a rope": (dict(rope_scaling={"rope_type": "default", "type": "linear"}), "rope_scaling = .*linear"),
    "rope of each kind of layer": (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_parameters = .*full_attention"),
    "tied": (dict(tie_word_embeddings="no"), "tie_word_embeddings = 'no'"),
    "window of 0": (dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=0), "sliding_window ≥ 1, got 0"),
    "window": (dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window="wide"), "sliding_window to be a whole number, got 'wide'"),
    "theta": (dict(rope_theta=float("inf"), rope_parameters=None), "theta > 0, got inf"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    theirs("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_cannot_compute_is_named_before_anything_is_read(folder, tmp_path, case):
    changes, says = REFUSED[case]
    settings = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    with pytest.raises((ValueError, TypeError), match=says):
        load(tmp_path)  # there are no weights at all


def test_windows_of_some_layers_only(tmp_path):
    c, settings = KINDS["qwen3"]
    for changes in (dict(max_window_layers=1), dict(layer_types=["sliding_attention", "full_attention"])):
        config = c(**settings, use_sliding_window=True, sliding_window=5, **changes)
        with pytest.raises(ValueError, match="one kind of attention in all layers"):
            config_of(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    config = c(**settings, use_sliding_window=True, sliding_window=5, max_window_layers=0)
    assert config_of(config.to_dict()).window == 5


def test_tensors_that_do_not_fit_are_named_before_there_is_memory(folder, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("memory was taken")

    tensors = load_file(folder / "model.safetensors")
    q, up = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    shutil.copy(folder / "config.json", tmp_path)
    wrong = {k: t for k, t in tensors.items() if k != up} | {"model.extra": torch.ones(1), q: tensors[q][:-1], "model.norm.weight": torch.ones(48).long()}
    save_file(wrong, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch, "empty", forbidden)
    with pytest.raises(ValueError) as e:
        load(tmp_path)
    for part in (f"1 missing: {up}", "1 surplus: model.extra", f"1 of another shape: {q} (59, 48) for (60, 48)", "1 not of floating point: model.norm.weight I64"):
        assert part in str(e.value)
    monkeypatch.undo()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="model.safetensors to be a file of safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing is unpickled"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {q: "../model.safetensors"}}))
    with pytest.raises(ValueError, match="which is not in"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", ""])
def test_a_path_that_is_none(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="expected a folder"):
        load(name)


def test_a_name_is_fetched_by_huggingface_hub(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: asked.append((name, file)) or str(folder / file))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(folder))
    load("someone/llama")
    assert asked[0] == ("someone/llama", "config.json") and not any("bin" in pattern for pattern in asked[1])

    def offline(*args):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ValueError, match="no folder 'gpt2' here, and huggingface.co gives none: no network"):
        load("gpt2")


def test_what_save_refuses(tmp_path):
    sizes = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=12)
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="nothing is written over"):
        save(Llama(LlamaConfig(**sizes)), tmp_path)
    with pytest.raises(ValueError, match="sinks=2"):
        save(Llama(LlamaConfig(**sizes, window=4, sinks=2)), tmp_path / "new")
    with pytest.raises(TypeError, match="expected a GPT or a Llama, got Linear"):
        save(torch.nn.Linear(2, 2), tmp_path / "new")
    with pytest.raises(ValueError, match="eos_token"):
        save(Llama(LlamaConfig(**sizes)), tmp_path / "new", eos_token=11)
    model = GPT_fast(GPTConfig(**sizes))
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises((ValueError, KeyError)):
        save(model, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_command_streams_the_same_text_both_ways(tmp_path, capfd):
    tokenizer = kept_tokenizer()
    vocab = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = Llama(LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=vocab, block_size=64))
    save(model, tmp_path / "m", tokenizer, eos_token=3)
    loaded = load(tmp_path / "m")
    assert loaded.eos_token == 3 and isinstance(loaded.tokenizer, Tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs("A cache holds keys.")["input_ids"] == tokenizer.encode("A cache holds keys.").ids
    assert checkpoint.main([str(tmp_path / "m"), "A cache", "--tokens", "12", "--cache", "both", "--top-k", "9"]) == 0
    out, err = capfd.readouterr()
    first, second = out.rstrip("\n").split("\nA cache")
    assert first == "A cache" + second and len(second) > 5
    lines = err.strip().split("\n")
    assert [line.split(":")[0] for line in lines] == ["with the cache", "without a cache"]
    assert all("12 tokens, the first after" in line and "tokens per second" in line for line in lines)
    for bad, says in ((["", "x"], "expected a folder"), ([str(tmp_path / "m"), ""], "at least one token"), ([str(tmp_path / "m"), "x", "--temperature", "0"], "temperature > 0")):
        assert checkpoint.main(bad) == 2
        assert says in capfd.readouterr().err


def test_before_the_first_piece_there_is_one_prefill_and_nothing_else(tmp_path, monkeypatch, capfd):
    "Counted: every pass through the model, every token that is encoded, every text that is tokenized."
    tokenizer, prompt = kept_tokenizer(), "A cache holds keys and values."
    t = len(tokenizer.encode(prompt).ids)
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.get_vocab_size(), block_size=64)
    for model in (Llama(LlamaConfig(**sizes, n_kv_head=1)), GPT_fast(GPTConfig(**sizes))):
        events = []
        model.eval().transformer.ln_f.register_forward_hook(lambda module, args, out: events.append(out.size(1)))
        model.transformer.wte.register_forward_hook(lambda module, args, out: events.append(f"{out.size(1)} encoded"))
        monkeypatch.setattr("kvcache_lib.text.encode", lambda *args: events.append("tokenized") or encode(*args))
        monkeypatch.setattr(checkpoint, "print", lambda text="", **more: events.append("shown" if text else "end"), raising=False)
        says = checkpoint.write(model, tokenizer, prompt, 5, True, None)
        events = [event for n, event in enumerate(events) if not (event == "shown" and events[n - 1] == "shown")]
        assert events[:4] == ["tokenized", "shown", f"{t} encoded", 1], "the prompt is shown, encoded once, and only its last logits are made"
        counted = [event for event in events if event not in ("shown", "end")]
        assert counted == ["tokenized", f"{t} encoded", 1] + ["1 encoded", 1] * 4
        assert "5 tokens, the first after" in says
        assert "of one prefill" in checkpoint.write(model, tokenizer, prompt, 2, True, None, prefill=True)
        monkeypatch.undo()


def index_of(changes):
    return lambda place, names: (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changes(names)}))


BROKEN = {  # what is done to a checkpoint, and what the error says
    "cut short": (lambda place, names: (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:-1]), "model.safetensors to be a file of safetensors"),
    "cut in the header": (lambda place, names: (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:50]), "model.safetensors to be a file of safetensors"),
    "a missing part": (index_of(lambda names: {n: "model-00001-of-00002.safetensors" for n in names}), "model-00001-of-00002.safetensors, which is not in .*all must be there"),
    "a path outside": (index_of(lambda names: {n: "../outside.safetensors" for n in names}), "../outside.safetensors, which is not in .*must name files beside it"),
    "an absolute path": (index_of(lambda names: {n: "/etc/passwd" for n in names}), "/etc/passwd, which is not in"),
    "an index without names": (index_of(lambda names: list(names)), "expected a weight_map"),
    "settings too deep": (lambda place, names: (place / "config.json").write_text("[" * 100_000), "expected JSON in config.json"),
    "more layers than could be": (
        lambda place, names: (place / "config.json").write_text((place / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 2000000000')),
        "2,000,000,000 layers, and the files hold 21 tensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint(folder, tmp_path, case):
    damage, says = BROKEN[case]
    shutil.copytree(folder, tmp_path / "m")
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    damage(tmp_path / "m", load_file(folder / "model.safetensors"))
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "m")


def test_what_the_command_is_given(tmp_path, capfd):
    tokenizer = kept_tokenizer()
    model = GPT_fast(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.get_vocab_size(), block_size=16))
    path = str(save(model, tmp_path / "m", tokenizer))
    stripping = Tokenizer.from_str(tokenizer.to_str())
    stripping.normalizer = normalizers.Strip()
    blank = str(save(model, tmp_path / "blank", stripping))
    (tmp_path / "m" / "tokenizer.json").rename(tmp_path / "kept.json")
    bare = shutil.copytree(path, tmp_path / "bare")
    (tmp_path / "kept.json").rename(tmp_path / "m" / "tokenizer.json")
    for given, says in (
        ([path, "x", "--seed", str(2**70)], "seed ≤"),
        ([path, "x", "--tokens", "-1"], "max_new_tokens ≥ 0, got -1"),
        ([blank, "   "], "a text of at least one token, got '   '"),
        ([str(bare), "x"], "no tokenizer.json"),
    ):
        assert checkpoint.main(given) == 2
        out, err = capfd.readouterr()
        assert says in err and not out
    assert checkpoint.main([path, "word " * 40, "--tokens", "3"]) == 0, "the last tokens of a longer prompt are seen"
    run = f"{sys.executable} -c 'from kvcache_lib.checkpoint import main; raise SystemExit(main())' {path} word --tokens 300 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {run}"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "w", "")


def test_from_pretrained_reads_as_load_does_and_needs_no_transformers(tmp_path):
    torch.manual_seed(0)
    model = theirs("gpt2")
    model.save_pretrained(tmp_path / "m", max_shard_size="40kB")
    probe = """
import sys
sys.modules["transformers"] = None
import torch
from kvcache_lib.checkpoint import load
from kvcache_lib.gpt import GPT_kv
model = GPT_kv.from_pretrained(sys.argv[1])
want = load(sys.argv[1]).model
assert model.config == want.config
for name, weight in want.state_dict().items():
    assert torch.equal(model.state_dict()[name], weight), name
"""
    done = subprocess.run([sys.executable, "-c", probe, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    for changes, says in ((dict(model_type="llama"), "the model_type gpt2, got 'llama'"), (dict(n_inner=7), "n_inner = 7"), (dict(n_layer=3), "missing: transformer.h.2")):
        (tmp_path / "m" / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ValueError, match=says):
            GPT_kv.from_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["generate", "generate_kv"])
def test_every_model_generates_with_the_same_arguments(name):
    "The names, their order and what they are if left out; those that only have names are `continue_text`'s, whatever the model."
    want = inspect.signature(GPT.generate)
    for cls in (GPT_kv, GPT_fast, Llama):
        assert inspect.signature(getattr(cls, name)).parameters == want.parameters and cls.continue_text is GPT.continue_text
