"""The model of text: what is kept belongs together, the tokenizer loses nothing, and the stream shows what is generated."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvcache_lib import kept
from kvcache_lib.checks import CheckFailed
from kvcache_lib.corpus import HELD_OUT, corpus_text, course_corpus, documents, read_sections, sections
from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPT, GPTConfig
from kvcache_lib.text import (
    END, UNFINISHED, TextDataset, encode, encode_sections, stream, token_losses, train_text_model, train_tokenizer,
    whole_characters,
)  # fmt: skip

ROOT = kept.FOLDER.parents[1]
TOKENIZER = kept.kept_tokenizer()
LAST = TOKENIZER.get_vocab_size() - 1
lean = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def model():
    return kept.text_model(GPT_fast)


@pytest.fixture(scope="module")
def unseen():
    return encode_sections(TOKENIZER, kept.kept_corpus()[1])


def noisy(seed=0):
    "A model that writes bytes of all kinds, so that its characters often break."
    torch.manual_seed(seed)
    return GPT_kv(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=LAST + 1, block_size=16)).eval()


def decoded(ids) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=False)


# What is kept


def test_the_weights_are_small_and_belong_to_the_corpus_and_the_tokenizer():
    paths = sorted(kept.FOLDER.glob("*.safetensors"))
    assert kept.FOLDER / "learned.safetensors" in paths
    for path in paths:
        assert path.stat().st_size <= 1_000_000
        notes, _ = kept.read_model(path)
        assert {key: notes[key] for key in ("corpus", "tokenizer")} == kept.hashes()
    assert train_tokenizer(kept.kept_corpus()[0]).to_str() == TOKENIZER.to_str()


def test_weights_are_read_exactly(model):
    for name, tensor in load_file(kept.FOLDER / "learned.safetensors").items():
        assert tensor.dtype == torch.float16 and torch.equal(model.state_dict()[name], tensor.float())
    assert not model.training


@pytest.mark.parametrize("name", ["train.txt", "held_out.txt", "tokenizer.json"])
def test_weights_of_another_corpus_or_tokenizer_are_refused(tmp_path, name):
    folder = shutil.copytree(kept.FOLDER, tmp_path / "kept")
    kept.text_model(folder=folder)
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(text.replace("cache", "cash", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="another (corpus|tokenizer) than the one beside it"):
        kept.text_model(folder=folder)


def test_a_file_that_is_none_is_refused(tmp_path):
    folder = shutil.copytree(kept.FOLDER, tmp_path / "kept")
    (folder / "broken.safetensors").write_bytes(b"\x80\x04no pickle is read")
    with pytest.raises(ValueError, match="expected broken.safetensors to be a file of safetensors"):
        kept.text_model(name="broken", folder=folder)
    save_file({"a": torch.zeros(1)}, folder / "bare.safetensors")
    with pytest.raises(ValueError, match="another corpus"):
        kept.text_model(name="bare", folder=folder)
    with pytest.raises(FileNotFoundError, match="no kept model 'rotary2'; there are: bare, broken, draft, learned"):
        kept.text_model(name="rotary2", folder=folder)


def test_what_is_kept_comes_back(tmp_path):
    folder = shutil.copytree(kept.FOLDER, tmp_path / "kept")
    small = noisy()
    kept.keep_model(small, "small", folder=folder, iterations=0)
    back = kept.text_model(name="small", folder=folder)
    assert all(torch.equal(back.state_dict()[k], v.half().float()) for k, v in small.state_dict().items())
    with torch.no_grad():
        small.lm_head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="float16 can hold, got others in lm_head.weight"):
        kept.keep_model(small, "large", folder=folder)
    wide = GPT_kv(GPTConfig(n_layer=1, n_head=1, n_embd=256, vocab_size=LAST + 1, block_size=16))
    with pytest.raises(ValueError, match="at most 1,000,000 bytes"):
        kept.keep_model(wide, "large", folder=folder)
    assert not (folder / "large.safetensors").exists()


def test_a_program_that_is_no_checkout_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "lib" / "text_model")
    assert kept.main(["--iterations", "1"]) == 2
    assert "README.md" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_command_keeps_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for name in documents(ROOT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(kept, "FOLDER", folder := tmp_path / "lib" / "text_model")
    assert kept.main(["--iterations", "1"]) == 0 and "learned.safetensors" in capsys.readouterr().out
    assert kept.kept_corpus(folder) == course_corpus(ROOT)
    notes, _ = kept.read_model(folder / "learned.safetensors")
    assert json.loads(notes["facts"]) == {"iterations": 1}
    kept.text_model(folder=folder)


# The corpus


def test_of_markdown_the_prose_is_left():
    text = "\n\n".join(
        [
            "# A *title*", "One **bold** [link](address.md) of `code`. A $T \\le S$ is left out. But $T$ stays.",
            "```python\nx = 1\n```", "$$\n\\sum x\n$$", "| a | b |\n|:--|--:|", "    indented = code",
            "- The first point of a list.\n- The second point\n  goes on.", "<details><summary>Answer</summary>\n\nFolded text is prose too.\n\n</details>",
            "## Empty", "## Next", "Some more words here.",
        ]
    )  # fmt: skip
    first = "A title\nOne bold link of code. But T stays.\nThe first point of a list.\nThe second point goes on.\nFolded text is prose too."
    assert sections(text) == [first, "Next\nSome more words here."]


def test_nothing_held_out_is_trained_on():
    for train, held_out in (kept.kept_corpus(), course_corpus(ROOT)):
        lines = [line for section in (*train, *held_out) for line in set(section.split("\n")[1:])]
        assert len(lines) == len(set(lines)), "a line that stands in two sections"
    assert set(HELD_OUT) <= set(documents(ROOT))
    assert read_sections(corpus_text(train)) == train


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="to be the course's repository, but it has no README.md"):
        documents(tmp_path)


# The tokenizer


@lean
@given(st.text())
def test_any_text_comes_back(text):
    if text:
        assert decoded(encode(TOKENIZER, text)[0].tolist()) == text
    else:
        with pytest.raises(ValueError, match="at least one token, got ''"):
            encode(TOKENIZER, text)


def test_what_reads_like_the_end_is_text():
    end = TOKENIZER.token_to_id(END)
    ids = encode(TOKENIZER, f"a {END} b")[0].tolist()
    assert end not in ids and decoded(ids) == f"a {END} b"
    assert encode_sections(TOKENIZER, ["a", END]).tolist().count(end) == 2
    assert TOKENIZER.encode_special_tokens is False  # as it was


def test_no_text_of_tokens():
    with pytest.raises(TypeError, match="expected a text, got list"):
        encode(TOKENIZER, ["a"])
    with pytest.raises(ValueError, match=r"UTF-8 can hold, got '\\ud83d' at 2"):
        encode(TOKENIZER, "a \ud83d")
    with pytest.raises(ValueError, match="expected vocab_size ≥ 257, got 256"):
        train_tokenizer(["a"], 256)


# The stream


@lean
@given(st.lists(st.integers(0, LAST), max_size=40), st.lists(st.integers(0, LAST), max_size=5))
def test_pieces_are_what_decode_makes_of_all_tokens(ids, before):
    pieces = list(whole_characters(ids, TOKENIZER))
    assert "".join(pieces) == decoded(ids).rstrip(UNFINISHED)
    assert all(piece and not piece.endswith(UNFINISHED) for piece in pieces)
    before = encode(TOKENIZER, "é" + decoded(before))[0].tolist()  # a prompt is whole
    assert list(whole_characters(ids, TOKENIZER, before)) == pieces


@lean
@given(st.text(st.characters(codec="utf-8", exclude_characters=UNFINISHED), min_size=1))
def test_each_character_comes_with_its_last_token(text):
    "After every token, what was shown is all of the text that is whole so far."
    ids, taken, shown = encode(TOKENIZER, text)[0].tolist(), [], ""

    def feed():
        for i in ids:
            taken.append(i)
            yield i

    for piece in whole_characters(feed(), TOKENIZER):
        shown += piece
        assert text.startswith(shown)
        assert shown == decoded(taken).rstrip(UNFINISHED)
    assert shown == text


class SpacesBetween:
    "A tokenizer like Llama's: a word's space is dropped at the beginning of a text."

    def decode(self, ids, skip_special_tokens):
        return "".join(f" {i}" for i in ids).removeprefix(" ")


def test_spaces_at_the_beginning_of_a_piece_stay():
    assert list(whole_characters([7, 8, 9], SpacesBetween(), [5, 6])) == [" 7", " 8", " 9"]
    assert "".join(whole_characters([7, 8, 9], SpacesBetween())) == "7 8 9"


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("how", [{}, dict(do_sample=True, temperature=1.3, top_k=50)], ids=["greedy", "sampled"])
def test_the_stream_is_what_generate_writes(model, how, cache):
    for writer, prompt in ((model, "The cache"), (noisy(), "é → 😀"), (noisy(1), "x")):
        idx = encode(TOKENIZER, prompt)
        seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
        text = writer.generate(idx, 24, generator=seeds[0], **how)[0, idx.size(1) :].tolist()
        pieces = list(stream(writer, prompt, 24, cache=cache, tokenizer=TOKENIZER, generator=seeds[1], **how))
        assert "".join(pieces) == decoded(text).rstrip(UNFINISHED)
        assert all(piece and not piece.endswith(UNFINISHED) for piece in pieces)


def test_the_end_ends_it_and_is_not_shown(model):
    idx = encode(TOKENIZER, "The cache")
    text = model.generate(idx, 30)[0, idx.size(1) :].tolist()
    end = text[10]
    first = text.index(end)
    assert "".join(stream(model, "The cache", 30, tokenizer=TOKENIZER, eos_token=end)) == decoded(text[:first])


def test_the_end_is_watched_though_it_is_not_shown(model):
    idx = encode(TOKENIZER, "The cache")
    text = model.generate(idx, 30)[0, idx.size(1) :].tolist()
    end = text[len(text) // 2]
    seen = []
    list(stream(model, "The cache", 30, tokenizer=TOKENIZER, eos_token=end, watch=seen.append))
    assert seen == text[: text.index(end) + 1]


def test_it_streams():
    "A piece is there before the next token is computed."
    writer, steps = noisy(), []
    writer.lm_head.register_forward_hook(lambda *args: steps.append(1))
    pieces = stream(writer, "x", 10**6, tokenizer=TOKENIZER)
    assert not steps
    next(pieces)
    assert 1 <= len(steps) <= 8


def test_a_prompt_longer_than_the_block_size_is_continued(model):
    prompt = "word " * 400
    idx = encode(TOKENIZER, prompt)
    assert idx.size(1) > model.block_size
    text = model.generate(idx, 4)[0, -4:].tolist()
    assert "".join(stream(model, prompt, 4, tokenizer=TOKENIZER)) == decoded(text)


def test_bad_calls_are_refused_at_once(model):
    for bad in (dict(prompt=""), dict(prompt=3), dict(max_new_tokens=-1), dict(temperature=0), dict(eos_token=LAST + 1), dict(top_k=0)):
        with pytest.raises((TypeError, ValueError), match="expected"):
            stream(**dict(model=model, prompt="a", max_new_tokens=2, tokenizer=TOKENIZER) | bad)
    plain = GPT(model.config).eval()
    with pytest.raises(TypeError, match=r"a model with generate_kv, got GPT \(cache=False"):
        stream(plain, "a", 2, tokenizer=TOKENIZER)
    assert "".join(stream(plain, "a", 2, tokenizer=TOKENIZER, cache=False)) is not None
    digits = GPT_kv(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=10, block_size=8)).eval()
    with pytest.raises(ValueError, match="expected tokens from 0 to 9"):
        stream(digits, "the cache", 2, tokenizer=TOKENIZER)


# The model


def test_the_kept_model_has_learned_and_reads_what_it_has_not_seen(model, unseen):
    train = encode_sections(TOKENIZER, kept.kept_corpus()[0])
    share = (torch.bincount(train, minlength=LAST + 1) + 1) / (len(train) + LAST + 1)
    unigram = -share.log()[unseen[1:]].mean()
    assert token_losses(model, unseen).mean() < unigram - 1


@pytest.mark.parametrize("cached_class", [GPT_kv, GPT_fast])
def test_the_cache_changes_nothing_on_real_text(unseen, cached_class):
    model = kept.text_model(cached_class).double()
    text, cuts = unseen[None, 300:396], [1, 2, 40, 41, 96]
    with torch.no_grad():
        whole, _ = kept.text_model(GPT).double()(text)
        for stops in (range(1, 97), cuts):
            kv_cache, P = [None] * model.config.n_layer, 0
            for t in stops:
                logits, _, kv_cache = model(text[:, :t], kv_cache=kv_cache)
                torch.testing.assert_close(logits, whole[:, P:t], rtol=0, atol=1e-10)
                P = t


def test_losses_of_a_long_text_are_those_of_its_windows():
    model, tokens = noisy().double(), torch.randint(LAST, (50,))
    size = model.block_size

    def loss(i, first):
        logits, _ = model(tokens[None, first:i])
        return -logits[0, -1].log_softmax(0)[tokens[i]].item()

    slowly = token_losses(model, tokens, stride=1)
    assert slowly.tolist() == pytest.approx([loss(i, max(0, i - size)) for i in range(1, 50)])
    windows = token_losses(model, tokens, stride=size)
    assert windows.tolist() == pytest.approx([loss(i, min((i - 1) // size * size, 49 - size)) for i in range(1, 50)])
    calls: list = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    assert token_losses(model, tokens).shape == (49,) and len(calls) == 6  # 16 tokens, then 8 at a time, then 1
    assert token_losses(model, tokens[:2]).shape == (1,)
    for bad in (tokens[:1], tokens[None]):
        with pytest.raises(ValueError, match="at least two tokens in one row"):
            token_losses(model, bad)
    with pytest.raises(ValueError, match="expected stride ≤ 16, got 17"):
        token_losses(model, tokens, stride=17)


def test_training_is_the_same_again_and_lowers_the_loss(unseen, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.manual_seed(5)
    runs = []
    for _ in range(2):
        small, seen = noisy(), []
        after = torch.get_rng_state()
        losses = train_text_model(small, unseen, 40, batch_size=4, watch=lambda trainer: seen.append(trainer.iter_num))
        assert torch.equal(torch.get_rng_state(), after)
        runs.append((losses, small.state_dict()))
        assert seen == list(range(40)) and not small.training
    assert runs[0][0] == runs[1][0] and all(torch.equal(v, runs[1][1][k]) for k, v in runs[0][1].items())
    assert sum(runs[0][0][-5:]) < sum(runs[0][0][:5]) - 0.5


def test_windows_of_a_text():
    data = TextDataset(torch.arange(6), 4)
    assert [(x.tolist(), y.tolist()) for x, y in (data[i] for i in range(len(data)))] == [
        ([0, 1, 2, 3], [1, 2, 3, 4]), ([1, 2, 3, 4], [2, 3, 4, 5]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"more than 4 tokens in one row, got \(4,\)"):
        TextDataset(torch.arange(4), 4)
