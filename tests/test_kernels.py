"""The fused operations against the plain ones on the same noise, and the noise itself."""

import math
from functools import partial

import pytest
import torch

import bfn
import kernels
from model import BFNTransformer, Config

# ---------------------------------------------------------------- noise


def test_noise_is_standard_normal():
    """By its moments, its tails and the largest distance of its distribution function (Kolmogorov and Smirnov's)."""
    torch.manual_seed(0)
    eps = kernels.noise(kernels.draw_keys(1000), 1001).double().flatten()
    n = len(eps)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        error = eps.pow(power).std().item() / math.sqrt(n)
        assert eps.pow(power).mean().item() == pytest.approx(moment, abs=4 * error)
    assert (eps.abs() > 4).sum().item() == pytest.approx(n * math.erfc(4 / math.sqrt(2)), abs=30)
    steps = torch.arange(n) / n
    assert (torch.special.ndtr(eps.sort().values) - steps).abs().max() < 1.95 / math.sqrt(n)  # p = 0.001


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 500), (0, 501), (7, 250)])
def test_neighbours_in_tokens_and_vocabulary_are_independent(shift):
    """Of the numbers and of their squares: Box and Muller's pairs share a radius."""
    torch.manual_seed(1)
    eps = kernels.noise(kernels.draw_keys(1000), 1000)
    a, b = eps[shift[0] :, shift[1] :], eps[: 1000 - shift[0], : 1000 - shift[1]]
    for x, y in ((a, b), (a.square() - 1, b.square() - 1)):
        z = (x * y).mean() * math.sqrt(a.numel()) / (x.std() * y.std())
        assert abs(z) < 4


def test_noise_depends_on_its_own_keys_alone():
    keys = kernels.draw_keys(3, 5)
    together = kernels.noise(keys, 7)
    assert together.shape == (3, 5, 7) and torch.equal(together[1, 2], kernels.noise(keys[1, 2], 7))
    assert not torch.equal(together[0, 0], together[0, 1])


def test_noise_is_box_and_mullers_rule():
    """Sine and cosine are polynomials of ours."""
    torch.manual_seed(2)
    keys = kernels.draw_keys(100)
    i = torch.arange(500, dtype=torch.int32)
    u = kernels._mix(i + keys[:, :1]).double().abs().float().double() / 2**31
    angle = kernels._mix(i ^ keys[:, 1:]).double() * math.pi / 2**31
    radius = (-2 * u.log()).sqrt()
    expected = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
    assert (kernels.noise(keys, 1000) - expected).abs().max() < 2e-5


def test_noise_is_finite_for_every_hash(monkeypatch):
    """Also for those where Box and Muller's logarithm would be that of 0."""
    hashes = torch.tensor([-(2**31), -(2**31) + 64, -1, 0, 1, 2**31 - 1], dtype=torch.int32)
    monkeypatch.setattr(kernels, "_mix", lambda x: hashes.expand(*x.shape[:-1], 6))
    assert (kernels.noise(kernels.draw_keys(2), 12).abs() < 6.7).all()


def test_uniform_numbers_have_many_digits_and_stay_below_one(monkeypatch):
    torch.manual_seed(0)
    u = kernels.uniform(kernels.draw_keys(100_000))
    steps = torch.arange(100_000) / 100_000
    assert (u.sort().values - steps).abs().max() < 1.95 / math.sqrt(100_000) and u.unique().numel() == 100_000
    assert ((u * 2**30) % 1).std() > 0.28  # of U(0, 1): 0.289
    monkeypatch.setattr(kernels, "_mix", lambda x: torch.full_like(x, 2**31 - 1))
    assert kernels.uniform(kernels.draw_keys(1)) < 1


# ---------------------------------------------------------------- equal to the plain operations


def problem(K, N=37, D=6, s1=4.0):
    """Parameters and tokens, a third of them given, some of them first or last in the vocabulary."""
    torch.manual_seed(K)
    E, W = torch.randn(K, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
    bias = torch.randn(K, requires_grad=True)
    ids, keys, t = torch.randint(K, (N,)), kernels.draw_keys(N), torch.rand(N)
    ids[:4], t[0], t[1] = torch.tensor([0, K - 1, 0, K - 1]), 0.0, 1.0
    rows = (torch.arange(N) % 3 != 2).nonzero().squeeze(1)
    return E, W, bias, ids, keys, s1 * t, rows


@pytest.fixture(params=[kernels.LEAST_TOKENS, 16])
def chunk(request, monkeypatch):
    """One chunk for all tokens, or several."""
    monkeypatch.setitem(kernels.CHUNK, "cpu", 1)
    monkeypatch.setattr(kernels, "LEAST_TOKENS", request.param)


@pytest.mark.parametrize("K", [2, 3, 28, 1001, 50_257])
def test_the_noisy_embedding_equals_theta_times_e(K, chunk):
    E, _, _, ids, keys, s, rows = problem(K)
    theta = bfn.flow(ids[rows][None], s[rows][None], 1.0, K, kernels.noise(keys[rows], K)[None])[0].softmax(-1)
    plain = E[ids].index_copy(0, rows, theta @ E)
    fused = kernels.noisy_embedding(E, ids, rows, keys[rows], s[rows])
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)
    upstream = torch.randn_like(plain)
    expected, found = (torch.autograd.grad(h, E, upstream)[0] for h in (plain, fused))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("K", [2, 3, 28, 1001, 50_257])
@pytest.mark.parametrize("entropy_weight", [0.0, 5.0])
def test_linear_errors_equal_the_plain_losses(K, entropy_weight, chunk):
    _, W, bias, ids, keys, s, _ = problem(K)
    hidden, scale = torch.randn(len(ids), W.shape[1], requires_grad=True), torch.rand(len(ids))
    scale[5:8] = 0.0  # masked
    z = bfn.flow(ids[None], s[None], 1.0, K, kernels.noise(keys, K)[None])[0]
    logits = hidden @ W.T + bias + z.log_softmax(-1)
    losses = bfn.squared_error_loss(logits, ids, s / 4, 4.0) + entropy_weight * bfn.cross_entropy(logits, ids)
    found, each = kernels.linear_errors(hidden, W, bias, ids, keys, s, 4 * s, scale, entropy_weight)
    torch.testing.assert_close(each, losses.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, (scale * losses).sum(), atol=1e-4, rtol=1e-4)
    inputs = hidden, W, bias
    plain = torch.autograd.grad(3 * (scale * losses).sum(), inputs)
    fused = torch.autograd.grad(3 * found, inputs)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def setup(K=1001, **more):
    """A network of random weights and a packed batch with given tokens and padding."""
    torch.manual_seed(0)
    config = Config(K=K, beta1=bfn.auto_beta1(K), d_model=32, n_layers=2, n_heads=2)
    model = BFNTransformer(config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.randint(K, (3, 13))
    segment_ids = torch.tensor([[1] * 5 + [2] * 8, [1] * 13, [1] * 4 + [2] * 3 + [0] * 6])
    cond_mask = (torch.rand(3, 13) < 0.3) & (segment_ids > 0)
    return model, ids, segment_ids, cond_mask


def losses_and_gradients(model, ids, segment_ids, cond_mask, fused):
    torch.manual_seed(1)
    t, keys = torch.rand(ids.shape), kernels.draw_keys(*ids.shape)
    mask = (segment_ids > 0) & ~cond_mask
    scale, K, s1 = mask * torch.rand(ids.shape), model.config.K, model.config.s1
    if fused:
        rows = mask.flatten().nonzero().squeeze(1)
        loss, losses = model.fused_loss(ids, t, cond_mask, segment_ids, rows, keys, scale, 5.0)
    else:
        z = bfn.flow(ids, t, s1, K, kernels.noise(keys, K))
        logits = bfn.predict(partial(model, segment_ids=segment_ids), z.softmax(-1), t, ids, cond_mask)
        losses = mask * (bfn.squared_error_loss(logits, ids, t, s1) + 5 * bfn.cross_entropy(logits, ids))
        loss = (scale * losses).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return loss, losses.detach(), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_fused_loss_of_the_network_equals_the_plain_one(recompute):
    """For packed rows with given tokens and padding: value, losses and the gradient by every parameter."""
    model, *batch = setup()
    expected, each, gradients = losses_and_gradients(model, *batch, fused=False)
    model.recompute = recompute
    found, each_found, gradients_found = losses_and_gradients(model, *batch, fused=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(each_found, each, atol=1e-4, rtol=1e-4)
    for a, b in zip(gradients_found, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_under_autocast_the_fused_loss_is_near_that_of_float32(chunk):
    model, *batch = setup()
    expected, _, gradients = losses_and_gradients(model, *batch, fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, _, gradients_found = losses_and_gradients(model, *batch, fused=True)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    for a, b in zip(gradients_found, gradients, strict=True):
        assert (a - b).norm() < 0.05 * b.norm() + 1e-6


class FusedLoss(torch.nn.Module):
    """The fused loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, segment_ids, cond_mask):
        mask = (segment_ids > 0) & ~cond_mask
        torch.manual_seed(int(ids.sum()))  # a row's own noise
        t, keys = torch.rand(ids.shape), kernels.draw_keys(*ids.shape)
        rows = mask.flatten().nonzero().squeeze(1)
        return self.model.fused_loss(ids, t, cond_mask, segment_ids, rows, keys, mask / 10, 5.0)[0]


def gradients_of_a_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, *batch = setup()
    parallel = torch.nn.parallel.DistributedDataParallel(FusedLoss(model))
    parallel(*(x[rank : rank + 1] for x in batch)).backward()
    torch.save([p.grad for p in model.parameters() if p.requires_grad], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_mean_gradient_of_their_rows(tmp_path):
    torch.multiprocessing.spawn(gradients_of_a_rank, (str(tmp_path),), nprocs=2)
    model, *batch = setup()
    for rank in (0, 1):
        (FusedLoss(model)(*(x[rank : rank + 1] for x in batch)) / 2).backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    for rank in (0, 1):
        for found, gradient in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)


def test_nothing_of_size_tokens_times_vocabulary_is_kept_for_the_gradient(monkeypatch):
    model, ids, *rest = setup()
    monkeypatch.setattr(kernels, "LEAST_TOKENS", 16)
    monkeypatch.setitem(kernels.CHUNK, "cpu", 16 * 1001)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        losses_and_gradients(model, ids, *rest, fused=True)
    of_vocabulary = [shape for shape in kept if 1001 in shape]
    assert set(of_vocabulary) <= {(1001, 32), (1001,)}


@pytest.mark.parametrize("K", [1000, 1001])
def test_compiled_chunks_equal_the_others_and_never_compile_again(K, monkeypatch):
    """Several chunks, the last a short one, and vocabularies with and without equal halves."""
    monkeypatch.setitem(kernels.CHUNK, "cpu", 1)
    monkeypatch.setattr(kernels, "LEAST_TOKENS", 16)
    model, ids, segment_ids, cond_mask = setup(K)
    expected = losses_and_gradients(model, ids, segment_ids, cond_mask, fused=True)
    kernels.compile_chunks()
    try:
        for block in model.blocks:
            block.compile()
        found = losses_and_gradients(model, ids, segment_ids, cond_mask, fused=True)
        with torch.compiler.set_stance("fail_on_recompile"):
            for n_given in (3, 8):  # another number of predicted tokens
                losses_and_gradients(model, ids, segment_ids, cond_mask.roll(n_given), fused=True)
    finally:
        kernels.compiled.clear()
    for a, b in zip((found[0], *found[2]), (expected[0], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_chunks_cover_all_tokens_and_stay_small():
    for kind, n_tokens in (("cpu", 128), ("cuda", 2048)):
        chunks, size = kernels._chunks(10_000, 32_000, torch.device(kind))
        assert size == n_tokens and [i for n in chunks for i in range(n.start, n.stop)] == list(range(10_000))
        assert kernels._chunks(37, 32_000, torch.device(kind)) == ([slice(0, 37)], 64)


def test_attention_without_a_mask_gives_the_same_numbers():
    model, _, segment_ids, _ = setup(K=11)
    theta, t = torch.randn(3, 13, 11).softmax(-1), torch.rand(3, 13)
    with torch.no_grad():  # it has no gradient on CPUs
        plain = model(theta, t, segment_ids)
        model.flex = True
        torch.testing.assert_close(model(theta, t, segment_ids), plain, atol=1e-5, rtol=1e-4)
