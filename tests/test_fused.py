"""The fused operations against the plain form, and the check that a run makes at its start."""

import pytest
import torch
from untrained import random_network

import bfn
import data
import train
from common.noise import draw_keys, noise
from model import BFNTransformer, Config, Form
from training import forms, fused

CPU = torch.device("cpu")


def problem(K, B=3, L=13, D=6, s1=4.0):
    """Parameters and a noisy batch, with tokens 0 and K - 1, t = 0 and 1, a third not predicted."""
    torch.manual_seed(K)
    E, W = torch.randn(K, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
    bias = torch.randn(K, requires_grad=True)
    ids, t, keys = torch.randint(K, (B, L)), torch.rand(B, L), draw_keys(B, L)
    ids[0, :4], t[0, 0], t[0, 1] = torch.tensor([0, K - 1, 0, K - 1]), 0.0, 1.0
    predicted = (torch.arange(B * L) % 3 != 2).nonzero().squeeze(1)
    return E, W, bias, fused.Noisy(ids, t, keys, predicted, s1)


def is_predicted(noisy):
    mask = torch.zeros(noisy.ids.numel(), dtype=torch.bool)
    mask[noisy.predicted] = True
    return mask.view_as(noisy.ids)


@pytest.fixture(params=[(fused.LEAST_TOKENS, 1), (16, 1), (16, 16)])
def chunk(request, monkeypatch):
    """One chunk, several of which the last is short, and these with padded rows, as on a GPU."""
    least_tokens, aligned = request.param
    monkeypatch.setitem(fused.CHUNK, "cpu", 1)
    monkeypatch.setattr(fused, "LEAST_TOKENS", least_tokens)
    monkeypatch.setitem(fused.ALIGNED, "cpu", aligned)


@pytest.mark.parametrize("K", [2, 3, 28, 1001, 1011, 50_257])
def test_theta_to_h_equals_theta_times_the_embeddings(K, chunk):
    E, _, _, noisy = problem(K)
    theta = bfn.flow(noisy.ids, noisy.t, noisy.s1, K, noise(noisy.keys, K)).softmax(-1)
    theta, _ = bfn.clamp_given(theta, noisy.t, noisy.ids, ~is_predicted(noisy))
    plain, found = theta @ E, fused.ThetaToH.apply(E, noisy)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    upstream = torch.randn_like(plain)
    expected, found = (torch.autograd.grad(h, E, upstream)[0] for h in (plain, found))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("K", [2, 3, 28, 1001, 1011, 50_257])
@pytest.mark.parametrize("entropy_weight", [0.0, 5.0])
def test_hidden_to_loss_equals_the_plain_loss(K, entropy_weight, chunk, monkeypatch):
    monkeypatch.setattr(bfn, "CROSS_ENTROPY", entropy_weight)
    _, W, bias, noisy = problem(K)
    hidden = torch.randn(*noisy.ids.shape, W.shape[1], requires_grad=True)
    scale, mask = torch.rand(noisy.ids.shape), is_predicted(noisy)
    scale[0, 5:8] = 0.0  # of no weight
    theta = bfn.flow(noisy.ids, noisy.t, noisy.s1, K, noise(noisy.keys, K)).softmax(-1)
    logits = hidden @ W.T + bias + theta.clamp(min=1e-37).log()
    losses = mask * bfn.training_loss(logits.log_softmax(-1), noisy.ids, noisy.t, noisy.s1)
    found = fused.HiddenToLoss.apply(hidden, W, bias, scale, noisy)
    torch.testing.assert_close(found, (scale * losses).sum(), atol=1e-4, rtol=1e-4)
    inputs = hidden, W, bias
    plain = torch.autograd.grad(3 * (scale * losses).sum(), inputs)
    gradients = torch.autograd.grad(3 * found, inputs)
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def setup(K=1001):
    """A network of random weights and a packed batch with given tokens and padding."""
    model = random_network(
        Config(K=K, beta1=bfn.auto_beta1(K), d_model=32, n_layers=2, n_heads=2), std=0.1
    )
    ids = torch.randint(K, (3, 13))
    segment_ids = torch.tensor([[1] * 5 + [2] * 8, [1] * 13, [1] * 4 + [2] * 3 + [0] * 6])
    seen = torch.randint(4, (3, 13)) * (segment_ids > 0)
    return model, (ids, segment_ids, seen)


def loss_and_gradients(model, batch, is_fused):
    """Loss, and the gradient of every parameter."""
    model.form = model.form._replace(fused=is_fused)
    model.zero_grad(set_to_none=True)
    loss = train.accumulate_gradients(model, [batch], [1], CPU)
    return loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_fused_step_equals_a_plain_one_in_loss_and_all_gradients(recompute):
    model, batch = setup()
    expected, gradients = loss_and_gradients(model, batch, is_fused=False)
    model.use(Form(recompute=recompute))
    found, gradients_found = loss_and_gradients(model, batch, is_fused=True)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients_found, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_under_autocast_the_fused_loss_is_near_that_of_float32(chunk):
    model, batch = setup()
    expected, gradients = loss_and_gradients(model, batch, is_fused=True)
    model.use(Form(bf16=True, written=True))
    found, gradients_found = loss_and_gradients(model, batch, is_fused=True)
    assert found != expected
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    for a, b in zip(gradients_found, gradients, strict=True):
        assert (a - b).norm() < 0.05 * b.norm() + 1e-6


def test_nothing_of_size_tokens_times_vocabulary_is_kept_for_the_gradient(monkeypatch):
    model, batch = setup()
    monkeypatch.setattr(fused, "LEAST_TOKENS", 16)
    monkeypatch.setitem(fused.CHUNK, "cpu", 16 * 1001)

    def stand_in(linear, bias, ids, t, keys, scale, s1):
        """torch.func.grad takes no hooks; what it keeps is gone when it returns."""
        return torch.zeros(()), torch.zeros_like(linear)

    monkeypatch.setattr(fused, "loss_and_gradient", stand_in)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss_and_gradients(model, batch, is_fused=False)
        assert any(shape[-1:] == (1001,) and len(shape) > 1 for shape in kept)
        kept.clear()
        loss_and_gradients(model, batch, is_fused=True)
    assert {shape for shape in kept if 1001 in shape} <= {(1001, 32), (1001,)}


@pytest.mark.parametrize("K", [pytest.param(1000, marks=pytest.mark.slow), 1001])
def test_compiled_chunks_equal_the_others_and_are_compiled_once(K, monkeypatch):
    """Several chunks, the last one short, and vocabularies with and without equal halves."""
    monkeypatch.setitem(fused.CHUNK, "cpu", 1)
    monkeypatch.setattr(fused, "LEAST_TOKENS", 16)
    torch._dynamo.reset()
    model, (ids, segment_ids, cond_mask) = setup(K)
    expected = loss_and_gradients(model, (ids, segment_ids, cond_mask), is_fused=True)
    model.use(Form(compiled=True))
    found = loss_and_gradients(model, (ids, segment_ids, cond_mask), is_fused=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n_given in (3, 8):  # another number of predicted tokens
            loss_and_gradients(model, (ids, segment_ids, cond_mask.roll(n_given)), is_fused=True)
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("compiled, last", [(False, 10_000 % 128), (True, 128)])
def test_chunks_cover_the_predicted_tokens_in_order(compiled, last):
    ids = torch.arange(20_000).view(2, -1)
    predicted = torch.arange(10_000) * 2
    noisy = fused.Noisy(ids, ids / 20_000, draw_keys(2, 10_000), predicted, 5.0, compiled)
    index, tokens, t, keys = zip(*noisy.chunks(32_000), strict=True)
    assert torch.cat(index).equal(predicted) and torch.cat(tokens)[:10_000].equal(predicted)
    assert len(tokens[0]) == 128 and len(tokens[-1]) == len(t[-1]) == len(keys[-1]) == last


def test_attention_without_a_mask_gives_the_same_numbers():
    model, (_, segment_ids, _) = setup(K=11)
    theta, t = torch.randn(3, 13, 11).softmax(-1), torch.rand(3, 13)
    with torch.no_grad():  # flex attention has no gradient on CPUs
        plain = model(theta, t, segment_ids)
        model.use(Form(flex=True))
        torch.testing.assert_close(model(theta, t, segment_ids), plain, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- edits of the plain form


def another_flow(ids, t, s1, K, eps=None, flow=bfn.flow):
    """Half the noise."""
    return flow(ids, t, s1, K, (torch.randn(*ids.shape, K) if eps is None else eps) / 2)


def another_clamp(theta, t, ids, cond_mask, clamp_given=bfn.clamp_given):
    """Given positions show the next token."""
    return clamp_given(theta, t, (ids + 1) % theta.shape[-1], cond_mask)


def another_embedding(self, theta):
    """theta^2 instead of theta."""
    return self.project(theta.square() @ self.embedding.weight)


def another_head(self, hidden, theta):
    """No evidence skip."""
    return self.linear_out(hidden)


def another_forward(self, theta, t, segment_ids):
    """The output scaled."""
    return 1.01 * self.head(self.body(self.embed(theta), t, segment_ids), theta)


def another_loss(log_p, ids, t, s1):
    """Only the cross-entropy."""
    return bfn.cross_entropy(log_p, ids)


EDITS = [
    (bfn, "flow", another_flow),
    (bfn, "clamp_given", another_clamp),
    (BFNTransformer, "embed", another_embedding),
    (BFNTransformer, "head", another_head),
    (BFNTransformer, "forward", another_forward),
    (bfn, "training_loss", another_loss),
    (
        bfn,
        "squared_error_loss",
        lambda log_p, ids, t, s1: 2 * s1 * t * (1 - log_p.exp().square().sum(-1)),
    ),
    (bfn, "cross_entropy", lambda log_p, ids: -2 * bfn.pick(log_p, ids)),
    (bfn, "CROSS_ENTROPY", 1.0),
]


def arguments(*more):
    return train.complete(
        train.flags().parse_args(["-d=none", "-mdim=32", "-nl=2", "-nh=2", "--compile=off", *more])
    )


def trained_losses(form, K=1500):
    """Losses of three steps with --fused=FORM, from random weights in every layer."""
    model, (ids, segment_ids, seen) = setup(K)
    batch = ids, segment_ids, seen % data.HIDDEN  # an edit changes little where nothing is seen
    args = arguments(f"--fused={form}", "--max_steps=3", "-lr=0.01")
    state = train.build(train.make_config(args, K), args, CPU)
    state.model.load_state_dict(model.state_dict())
    forms.choose_form(state, batch, args, CPU, train.accumulate_gradients)
    state.model.use(state.model.form._replace(bf16=False))  # on every CPU the same
    losses = []
    for state.step in range(3):
        loss = train.accumulate_gradients(state.model, [batch], [state.step], CPU)
        losses.append(loss.item())
        train.update_weights(state, args)
    return losses, state.model.form.fused


@pytest.mark.parametrize("owner, name, edit", EDITS, ids=[name for _, name, _ in EDITS])
def test_an_edit_of_the_plain_form_is_followed_by_fused_training_or_refused(
    owner, name, edit, monkeypatch, capsys
):
    before, _ = trained_losses("off")
    monkeypatch.setattr(owner, name, edit)
    expected, _ = trained_losses("off")
    assert expected != pytest.approx(before, rel=1e-3)
    try:
        found, is_fused = trained_losses("on")
        assert is_fused and found == pytest.approx(expected, rel=1e-3)
    except ValueError as error:
        assert name not in (
            "training_loss",
            "squared_error_loss",
            "cross_entropy",
            "CROSS_ENTROPY",
        )  # these are followed
        assert "--fused=off" in str(error) and "\n" not in str(error)
    capsys.readouterr()
    found, is_fused = trained_losses("auto")
    assert found == pytest.approx(expected, rel=1e-3)
    assert is_fused or "as with --fused=off" in capsys.readouterr().err


@pytest.mark.parametrize("low, high", [(0.0, 0.98), (0.02, 1.0), (0.05, 1.0)])
def test_an_edit_that_only_matters_near_the_ends_of_time_is_refused(low, high, monkeypatch):
    flow = bfn.flow
    monkeypatch.setattr(
        bfn, "flow", lambda ids, t, s1, K, eps=None: flow(ids, t.clamp(low, high), s1, K, eps)
    )
    with pytest.raises(ValueError, match="--fused=off"):
        trained_losses("on")


def test_an_embedding_with_dropout_is_refused(monkeypatch):
    plain = BFNTransformer.embed
    monkeypatch.setattr(
        BFNTransformer,
        "embed",
        lambda self, theta: torch.dropout(plain(self, theta), 0.5, self.training),
    )
    with pytest.raises(ValueError, match="--fused=off"):
        trained_losses("on")


def test_without_an_edit_the_check_passes_for_every_vocabulary_and_number_of_heads():
    for K, n_heads in ((2, 1), (1001, 3), (32_000, 8)):
        model = BFNTransformer(
            Config(K=K, beta1=bfn.auto_beta1(K), d_model=8 * n_heads, n_layers=1, n_heads=n_heads)
        )
        before = torch.get_rng_state()
        assert forms.can_fuse(model, arguments("--fused=on"), CPU, train.accumulate_gradients)
        assert torch.equal(torch.get_rng_state(), before)


def test_fusing_is_refused_where_its_numbers_would_overflow():
    model = BFNTransformer(Config(K=1001, beta1=0.2, d_model=32, n_layers=1, n_heads=2))
    with pytest.raises(ValueError, match=r"sqrt\(K beta\) below 13.*14\.1.*--fused=off"):
        forms.can_fuse(model, arguments("--fused=on"), CPU, train.accumulate_gradients)
    assert not forms.can_fuse(model, arguments("--fused=auto"), CPU, train.accumulate_gradients)


def test_all_batches_are_cut_into_chunks_of_one_size():
    sizes = set()
    for n in (5, 40, 64):
        predicted = torch.arange(64)[:n]
        noisy = fused.Noisy(
            torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, 16),
            torch.zeros(4, 16, 2, dtype=torch.int32), predicted, 3.0, compiled=True,
        )  # fmt: skip
        sizes |= {len(ids) for _, ids, *_ in noisy.chunks(1000)}
    assert len(sizes) == 1
