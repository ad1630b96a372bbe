"""What KVBuffer and GPT_fast add. What they share with GPT_kv is in test_cache and test_generate."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_pair
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache_lib import direct
from kvcache_lib.block import Block_kv
from kvcache_lib.fast import GPT_fast, KVBuffer
from kvcache_lib.measure.profiling import peak_bytes
from kvcache_lib.mingpt import GPTConfig

CLOSE = dict(rtol=1e-9, atol=1e-9)
EXACT = dict(rtol=0, atol=0)
B, N_LAYER, N_HEAD, HS, BLOCK = 2, 2, 2, 4, 16


@pytest.fixture(scope="module")
def models():
    "GPT_fast and GPT with the same weights."
    return make_pair(cached_class=GPT_fast)


def random_kv(n, dtype=torch.float64):
    return torch.randn(N_LAYER, 2, B, N_HEAD, n, HS, dtype=dtype)


def tokens(n, batch=B):
    return torch.randint(11, (batch, n))


def filled(model, n, **sizes):
    buffer = model.new_buffer(B, **sizes)
    buffer.append(random_kv(n))
    return buffer


# --- random sequences of append, crop, fork and forward, against the exercise's cache ---


class Branches(RuleBasedStateMachine):
    "Several branches. Each is a text, a buffer, and the exercise's cache, which must say the same."

    @initialize(capacity=st.integers(1, BLOCK), limit=st.integers(1, BLOCK))
    def start(self, capacity, limit):
        torch.manual_seed(0)
        self.oracle, _ = make_pair()
        self.model = GPT_fast(self.oracle.config).eval().double()
        self.model.load_state_dict(self.oracle.state_dict())
        self.limit = max(capacity, limit)
        lists = [[torch.empty(B, 0, 8, dtype=torch.float64) for _ in "kv"] for _ in range(N_LAYER)]
        self.branches = [(tokens(0), self.model.new_buffer(B, capacity, self.limit), lists)]

    def pick(self, data):
        return data.draw(st.integers(0, len(self.branches) - 1), label="branch")

    @rule(data=st.data(), n=st.integers(1, 5))
    def forward(self, data, n):
        i = self.pick(data)
        text, buffer, lists = self.branches[i]
        longer = torch.cat([text, tokens(n)], dim=1)
        if longer.size(1) > self.limit:
            with pytest.raises(ValueError, match="full|block size"):
                self.model(longer, kv_cache=buffer)
            return
        logits, loss, same = self.model(longer, kv_cache=buffer)
        want, _, lists = self.oracle(longer, kv_cache=lists)
        assert same is buffer and loss is None and not logits.requires_grad
        torch.testing.assert_close(logits, want.detach(), **CLOSE)
        self.branches[i] = (longer, buffer, lists)

    @rule(data=st.data(), n=st.integers(1, 5))
    def append(self, data, n):
        i = self.pick(data)
        text, buffer, lists = self.branches[i]
        kv = random_kv(n)
        if text.size(1) + n > self.limit:
            with pytest.raises(ValueError, match="full"):
                buffer.append(kv)
            return
        buffer.append(kv)
        new = kv.transpose(3, 4).flatten(4)  # (n_layer, 2, B, n, C)
        lists = [[torch.cat([t, n], dim=1) for t, n in zip(*both)] for both in zip(lists, new)]
        self.branches[i] = (torch.cat([text, tokens(n)], dim=1), buffer, lists)

    @rule(data=st.data())
    def crop(self, data):
        i = self.pick(data)
        text, buffer, lists = self.branches[i]
        length = data.draw(st.integers(0, text.size(1)), label="length")
        buffer.crop(length)
        self.branches[i] = (text[:, :length], buffer, [[t[:, :length] for t in layer] for layer in lists])

    @precondition(lambda self: len(self.branches) < 4)
    @rule(data=st.data())
    def fork(self, data):
        text, buffer, lists = self.branches[self.pick(data)]
        self.branches.append((text, buffer.fork(), lists))

    @rule(data=st.data())
    def convert(self, data):
        i = self.pick(data)
        text, buffer, lists = self.branches[i]
        copy = KVBuffer.from_lists(buffer.to_lists(), self.model.config, buffer.capacity, self.limit)
        self.branches[i] = (text, copy, lists)

    @invariant()
    def all_branches_hold_what_the_exercise_holds(self):
        for text, buffer, lists in getattr(self, "branches", []):
            assert buffer.length == text.size(1) <= buffer.capacity <= buffer.limit == self.limit
            assert buffer.nbytes == N_LAYER * 2 * B * 8 * buffer.capacity * 8
            torch.testing.assert_close(
                buffer.to_lists(), [[t.detach() for t in layer] for layer in lists], **CLOSE
            )


TestBranches = Branches.TestCase
TestBranches.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


# --- the buffer ---


def test_it_grows_by_doubling_up_to_its_limit(models):
    buffer, capacities = models[0].new_buffer(B, capacity=3, limit=16), []
    for _ in range(16):
        buffer.append(random_kv(1))
        capacities.append(buffer.capacity)
    assert capacities == [3] * 3 + [6] * 3 + [12] * 6 + [16] * 4
    buffer = models[0].new_buffer(B, capacity=2)
    buffer.append(random_kv(9))  # more than twice
    assert buffer.capacity == 9


def test_within_its_capacity_it_stays_in_place(models):
    model, _ = models
    buffer = model.new_buffer(B)
    assert buffer.capacity == BLOCK
    address, text = buffer.data.data_ptr(), tokens(12)
    for stop in (4, 5, 12):
        model(text[:, :stop], kv_cache=buffer)
    assert buffer.data.data_ptr() == address and buffer.length == 12


def test_a_full_buffer_says_so_and_keeps_its_contents(models):
    model, plain = models
    text = tokens(9)
    buffer = model.new_buffer(B, capacity=2, limit=6)
    model(text[:, :6], kv_cache=buffer)
    before, data = buffer.to_lists(), buffer.data
    with pytest.raises(ValueError, match="full: it holds 6 tokens and may hold 6, not 9"):
        model(text, kv_cache=buffer)
    with pytest.raises(ValueError, match="full: it holds 6 tokens and may hold 6, not 7"):
        buffer.append(random_kv(1))
    with pytest.raises(ValueError, match="full: it holds 6 tokens and may hold 6, not 9"):
        model(text, kv_cache=buffer, compute_first=True)
    assert buffer.length == 6 and buffer.data is data
    torch.testing.assert_close(buffer.to_lists(), before, **EXACT)
    buffer.crop(5)
    torch.testing.assert_close(
        model(text[:, :6], kv_cache=buffer)[0][:, -1], plain(text)[0][:, 5].detach(), **CLOSE
    )


def test_forks_written_in_turn_do_not_meet(models):
    model, plain = models
    prompt = tokens(4)
    first = model.new_buffer(B, capacity=4)
    model(prompt, kv_cache=first)
    branches = [[prompt, first], [prompt, first.fork()]]
    for _ in range(5):
        for branch in branches:
            branch[0] = torch.cat([branch[0], tokens(2)], dim=1)
            logits, _, _ = model(branch[0], kv_cache=branch[1])
            torch.testing.assert_close(logits, plain(branch[0])[0][:, -2:].detach(), **CLOSE)


def test_what_lies_beyond_the_length_is_never_read(models):
    model, plain = models
    text = tokens(10)
    buffer = model.new_buffer(B)
    buffer.data.fill_(float("nan"))
    for stop in (3, 4, 10):
        logits, _, _ = model(text[:, :stop], kv_cache=buffer)
        assert logits.isfinite().all()
    torch.testing.assert_close(logits, plain(text)[0][:, 4:].detach(), **CLOSE)


def test_lists_and_back(models):
    model, plain = models
    text = tokens(10)
    _, _, lists = model(text[:, :7], kv_cache=[None] * N_LAYER)
    buffer = KVBuffer.from_lists(lists, model.config)
    assert (buffer.length, buffer.capacity, buffer.data.dtype) == (7, BLOCK, torch.float64)
    torch.testing.assert_close(buffer.to_lists(), [[t.detach() for t in layer] for layer in lists], **EXACT)
    lists[0][0].data.fill_(0)  # nothing is shared
    copy = buffer.to_lists()
    copy[1][1].fill_(0)
    want = plain(text)[0][:, 7:].detach()
    torch.testing.assert_close(model(text, kv_cache=buffer.to_lists())[0].detach(), want, **CLOSE)
    torch.testing.assert_close(model(text, kv_cache=buffer)[0], want, **CLOSE)


def test_no_history_is_kept(models):
    model, _ = models
    text = tokens(7)
    _, _, lists = model(text, kv_cache=[None] * N_LAYER)
    assert lists[0][0].requires_grad
    buffer = KVBuffer.from_lists(lists, model.config, capacity=7)
    buffer.append(random_kv(2).requires_grad_())
    for kept in (buffer, buffer.fork()):
        assert not kept.data.requires_grad and not kept.to_lists()[0][0].requires_grad


def test_made_or_grown_in_inference_mode_it_works_outside(models):
    model, _ = models
    with torch.inference_mode():
        buffer = model.new_buffer(B, capacity=4)
        model(tokens(5), kv_cache=buffer)  # grows to 8
        fork = buffer.fork()
    for kept in (buffer, fork):
        kept.append(random_kv(3))
        assert kept.length == 8


def test_with_one_head_too_the_lists_share_nothing():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=11, block_size=16)
    buffer = KVBuffer(config, batch_size=1)
    buffer.append(torch.randn(1, 2, 1, 1, 3, 8))
    before = buffer.data.clone()
    buffer.to_lists()[0][0].fill_(7)
    torch.testing.assert_close(buffer.data[..., :3, :], before[..., :3, :], **EXACT)


@pytest.mark.parametrize(
    "arguments,error,says",
    [
        (dict(capacity=0), ValueError, "capacity ≥ 1, got 0"),
        (dict(batch_size=0), ValueError, "batch_size ≥ 1, got 0"),
        (dict(limit=0), ValueError, "limit ≥ 1, got 0"),
        (dict(capacity=2.5), TypeError, "capacity to be a whole number, got 2.5"),
        (dict(capacity=9, limit=8), ValueError, "capacity ≤ limit, got 9 and 8"),
        (dict(capacity=17), ValueError, "capacity ≤ limit, got 17 and 16"),
    ],
)
def test_sizes_that_do_not_fit(models, arguments, error, says):
    with pytest.raises(error, match=says):
        models[0].new_buffer(**arguments)


def test_what_a_buffer_refuses(models):
    config = models[0].config
    buffer = filled(models[0], 5)
    before = buffer.to_lists()
    for act, error, says in (
        (lambda: buffer.crop(6), ValueError, "length ≤ 5, the tokens that the buffer holds, got 6"),
        (lambda: buffer.crop(-1), ValueError, "length ≥ 0, got -1"),
        (lambda: buffer.crop(1.0), TypeError, "length to be a whole number"),
        (
            lambda: buffer.append(random_kv(2)[:1]),
            ValueError,
            r"expected keys and values of shape .* got \(1, 2,",
        ),
        (lambda: buffer.append(random_kv(2)[:, :, :1]), ValueError, r"got \(2, 2, 1, 2, 2, 4\)"),
        (lambda: buffer.append(random_kv(2, torch.float32)), ValueError, "torch.float64.*got.*torch.float32"),
        (
            lambda: KVBuffer.from_lists([None] * 2, config),
            ValueError,
            "got None: an empty cache is KVBuffer",
        ),
        (lambda: buffer.extend(-2).__enter__(), ValueError, "n ≥ 0, got -2"),
        (lambda: buffer.extend(1.5).__enter__(), TypeError, "n to be a whole number, got 1.5"),
        (lambda: buffer.append(random_kv(2)[0, 0]), ValueError, "expected keys and values of shape"),
        (lambda: models[0].step(tokens(3), [None] * 2), TypeError, "expected a KVBuffer, got list"),
        (lambda: models[0].step(tokens(9).to("meta"), buffer), ValueError, "idx on cpu, .* got it on meta"),
        (lambda: of(n_embd=10, n_head=3), ValueError, "n_head must divide n_embd, got n_head=3 and n_embd=10"),
        (lambda: KVBuffer.from_lists([], config), ValueError, "2 entries, one for each layer, got 0"),
        (lambda: KVBuffer.from_lists(before[0][0], config), TypeError, "a list of 2 entries.* got Tensor"),
        (lambda: KVBuffer.from_lists([[1, 2]] * 2, config), TypeError, "of tensors, got list"),
        (lambda: KVBuffer.from_lists(before[:1], config), ValueError, "2 entries, one for each layer, got 1"),
        (
            lambda: KVBuffer.from_lists([[k[..., :6], v[..., :6]] for k, v in before], config),
            ValueError,
            "P, 8",
        ),
        (
            lambda: KVBuffer.from_lists([[k, v.float()] for k, v in before], config),
            ValueError,
            "one dtype and device",
        ),
        (lambda: KVBuffer.from_lists(before, config, capacity=3, limit=4), ValueError, "full"),
    ):
        with pytest.raises(error, match=says):
            act()
        assert buffer.length == 5
        torch.testing.assert_close(buffer.to_lists(), before, **EXACT)


# --- the model with a buffer ---


def of(batch=B, dtype=torch.float64, device=None, **changes):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=16)
    for name, value in changes.items():
        setattr(config, name, value)
    return KVBuffer(config, batch, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "buffer,says",
    [
        (lambda: of(batch=3), "batch 2, .* got one of 2 layers, batch 3"),
        (lambda: of(n_layer=3), "expected a buffer of 2 layers, .* got one of 3 layers"),
        (lambda: of(n_head=4), "2 heads of 4, .* 4 heads of 2"),
        (lambda: of(n_embd=16), "2 heads of 4, .* 2 heads of 8"),
        (lambda: of(dtype=torch.float32), "torch.float64 on cpu, got .* torch.float32 on cpu"),
        (lambda: of(device="meta"), "on cpu, got .* on meta"),
    ],
)
def test_a_buffer_of_another_kind_is_refused_before_any_work(models, monkeypatch, buffer, says):
    monkeypatch.setattr(Block_kv, "forward", lambda *args: pytest.fail("the model was run"))
    buffer = buffer()
    data = buffer.data
    with pytest.raises(ValueError, match=says):
        models[0](tokens(3), kv_cache=buffer)
    assert buffer.length == 0 and buffer.data is data


def test_a_text_that_is_not_longer_than_the_buffer_is_refused(models):
    buffer = filled(models[0], 5)
    for n in (4, 5):
        with pytest.raises(ValueError, match=f"longer than the 5 cached tokens, got {n}"):
            models[0](tokens(n), kv_cache=buffer)
    assert buffer.length == 5


@pytest.mark.parametrize("place", ["first layer", "second layer", "logits"])
@pytest.mark.parametrize("compute_first", [False, True])
def test_reuse_after_an_exception_in_the_middle_of_a_step(models, monkeypatch, place, compute_first):
    model, plain = models
    text = tokens(9)
    buffer = model.new_buffer(B, capacity=4)
    model(text[:, :4], kv_cache=buffer)
    before = buffer.to_lists()
    t = model.transformer
    module = {"first layer": t.h[0].ln_2, "second layer": t.h[1].ln_2, "logits": t.ln_f}[place]
    with monkeypatch.context() as m:
        m.setattr(module, "forward", lambda x: (_ for _ in ()).throw(MemoryError("for the test")))
        with pytest.raises(MemoryError):
            model(text, kv_cache=buffer, compute_first=compute_first)
    assert buffer.length == (0 if compute_first else 4)
    if not compute_first:
        torch.testing.assert_close(buffer.to_lists(), before, **EXACT)
    logits, _, _ = model(text, kv_cache=buffer)
    torch.testing.assert_close(logits, plain(text)[0][:, 9 - logits.size(1) :].detach(), **CLOSE)


def test_compute_first_empties_the_buffer(models):
    model, plain = models
    buffer = filled(model, 12)
    text = tokens(6)
    logits, _, same = model(text, kv_cache=buffer, compute_first=True)
    assert same is buffer and buffer.length == 6
    torch.testing.assert_close(logits, plain(text)[0].detach(), **CLOSE)


def test_the_last_logits_alone_and_the_loss(models):
    model, plain = models
    text, targets = tokens(9), tokens(9)
    buffer = model.new_buffer(B)
    model.step(text[:, :4], buffer)
    last, _ = model.step(text, buffer.fork(), last_only=True)
    torch.testing.assert_close(last, plain(text)[0][:, -1:].detach(), **CLOSE)
    _, loss, _ = model(text, targets, kv_cache=buffer)
    want = torch.nn.functional.cross_entropy(plain(text)[0][:, 4:].flatten(0, 1), targets[:, 4:].flatten())
    torch.testing.assert_close(loss, want.detach(), **CLOSE)


def test_two_threads_each_with_its_own_buffer(models):
    model, plain = models
    prompts = [tokens(n, batch=1) for n in (3, 7)]
    wants = [plain.generate(p, 20) for p in prompts]

    def all_right(prompt, want):
        return all(torch.equal(model.generate_kv(prompt, 20), want) for _ in range(10))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(all_right, prompts, wants)) == [True, True]


def test_a_decode_step_allocates_the_same_at_every_length():
    config = GPTConfig(model_type="gpt-nano", vocab_size=11, block_size=2048)
    model = GPT_fast(config).eval()
    peaks = {}
    for T in (600, 2000):
        text = tokens(T, batch=1)
        buffer = model.new_buffer()
        with torch.no_grad():
            _, _, lists = model(text[:, :-1], kv_cache=[None] * 3)
        model.step(text[:, :-1], buffer)
        peaks[T] = [
            peak_bytes(lambda: (buffer.crop(T - 1), model.step(text, buffer))),
            peak_bytes(lambda: torch.no_grad()(model)(text, kv_cache=lists)),
        ]
    (ours, lists), (ours_long, lists_long) = peaks[600], peaks[2000]
    assert 0 < ours == ours_long
    assert lists_long > 3 * lists  # the exercise's cache does grow: this measurement can tell


# --- the operations ---


def test_wide_layers_in_float32_equal_float64():
    config = GPTConfig(n_layer=2, n_head=8, n_embd=512, vocab_size=11, block_size=64)
    model = GPT_fast(config).eval()
    text = tokens(40)
    buffer = model.new_buffer(B)
    got = torch.cat([model.step(text[:, :stop], buffer)[0] for stop in (17, 18, 19, 40)], dim=1)
    want = model.double()(text)[0].detach()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_autocast_reaches_the_wide_layers_too():
    layer, x = torch.nn.Linear(512, 768), torch.randn(1, 1, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert direct.linear(x, layer).dtype == layer(x).dtype == torch.bfloat16


def test_bfloat16_weights_take_half_and_stay_close():
    config = GPTConfig(model_type="gpt-nano", vocab_size=11, block_size=64)
    model = GPT_fast(config).eval()
    text = tokens(30)
    want, whole = model(text)[0].detach(), model.new_buffer(B)
    model = model.to(torch.bfloat16)
    buffer = model.new_buffer(B)
    got = torch.cat([model.step(text[:, :stop], buffer)[0] for stop in (11, 12, 30)], dim=1)
    assert got.dtype == torch.bfloat16 and 2 * buffer.nbytes == whole.nbytes
    error = (got.float() - want).abs().max()
    assert 0 < error < 0.1 * want.std()


@pytest.mark.parametrize("name", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_is_on_in_training_only(name):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=16)
    config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = 0.0
    setattr(config, name, 0.5)
    model, text = GPT_fast(config), tokens(16)
    for train in (True, False):
        model.train(train)
        for caches in ([None, None], [model.new_buffer(B), model.new_buffer(B)]):
            first, second = (model(text, kv_cache=cache)[0] for cache in caches)
            assert torch.equal(first, second) is not train
