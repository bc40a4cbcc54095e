"""Muon, the schedule and the averaged weights."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from common import parallel
from model import BFNTransformer, Config
from training import optim
from training.optim import Muon, orthogonalise_by_gram, orthogonalise_directly

ARGS = SimpleNamespace(learning_rate=0.003, weight_decay=0.1)


def test_the_learning_rate_rises_falls_and_never_rises_again():
    args = SimpleNamespace(max_steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [optim.learning_rate(step, args) for step in range(120)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2
    assert all(a >= b for a, b in pairwise(rates[10:])) and 0 < rates[99] < 0.03 and rates[100] == 0
    assert rates[55] == pytest.approx(1)  # half way down


def test_weight_decay_is_on_matrices_only_and_every_parameter_is_in_one_group():
    model = BFNTransformer(Config(K=4, beta1=1.0, d_model=32, n_layers=2, n_heads=2))
    groups = [
        group
        for optimizer in optim.make_optimizers(model, ARGS)
        for group in optimizer.param_groups
    ]
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (ARGS.weight_decay if p.ndim >= 2 else 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, trained))


@pytest.mark.parametrize("form", [orthogonalise_directly, orthogonalise_by_gram])
def test_orthogonalised_matrices_have_singular_values_near_one(form):
    """All that are above 0.003 of the matrix's norm."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 20))[0] for n in (20, 50))
    values = torch.logspace(0, -2.2, 20)
    X = U @ torch.diag(values / values.norm()) @ V.T
    values = torch.linalg.svdvals(form(torch.stack([X, 7 * X])))
    assert 0.79 < values.min() and values.max() < 1.21


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 64), (1, 1, 5)])
def test_both_ways_to_orthogonalise_give_the_same(shape):
    """For singular values of four orders of magnitude, some of them zero."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -4, shape[1])
    values[shape[1] // 2 + 1 :: 3] = 0
    X = U * values @ Vh
    torch.testing.assert_close(
        orthogonalise_by_gram(X), orthogonalise_directly(X.double()).float(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("shape", [(8, 8), (8, 40)])
def test_a_muon_update_is_an_orthogonal_matrix_of_adamws_size(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    Muon([p], lr=0.5, weight_decay=0.0).step()
    values = torch.linalg.svdvals(p.detach()) / (0.5 * 0.2 * max(shape) ** 0.5)
    assert 0.75 < values.min() and values.max() < 1.25
    U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(p.detach().flatten(), -(U @ Vh).flatten(), dim=0)
        > 0.98
    )


def test_rows_of_muon_updates_are_even_on_average_as_in_normuons_formula():
    torch.manual_seed(0)
    start = torch.randn(40, 8)
    p = torch.nn.Parameter(start.clone())
    muon = Muon([p], lr=0.5, weight_decay=0.0)
    momentum, second, wanted = torch.zeros(40, 8), torch.zeros(40), start.clone()
    for step in range(1, 5):
        p.grad = torch.randn(40, 8) * torch.logspace(-2, 0, 40)[:, None]
        muon.step()
        momentum = 0.95 * momentum + 0.05 * p.grad
        update = optim.orthogonalise((0.05 * p.grad + 0.95 * momentum)[None])[0]
        second = 0.95 * second + 0.05 * update.square().mean(1)
        even = update / (second / (1 - 0.95**step)).sqrt()[:, None]
        size = 0.5 * 0.2 * 40**0.5 * update.norm()
        wanted -= size * even / even.norm()
        torch.testing.assert_close(p.detach(), wanted)
        if step == 1:
            norms = (p.detach() - start).norm(dim=1)
            torch.testing.assert_close(norms, norms.mean().expand(40))


def test_muon_goes_on_from_a_checkpoint_without_the_average_of_rows():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(40, 8))
    p.grad = torch.randn(40, 8)
    muon = Muon([p], lr=0.5, weight_decay=0.0)
    muon.step()
    state = muon.state_dict()
    momentum = state["state"][0]["momentum"].clone()
    del state["state"][0]["rows"]
    resumed, before = Muon([p], lr=0.5, weight_decay=0.0), p.detach().clone()
    resumed.load_state_dict(state)
    resumed.step()
    torch.testing.assert_close(resumed.state[p]["momentum"], momentum * 0.95 + p.grad * 0.05)
    norms = (p.detach() - before).norm(dim=1)
    torch.testing.assert_close(norms, norms.mean().expand(40))


def test_processes_share_the_matrices_by_their_cost():
    shapes = [(3, 64, 64), (4, 64, 256), (4, 192, 64), (1, 8, 8)]
    owners = optim.share_by_cost(list(map(torch.Size, shapes)), 4)
    assert [len(ranks) for ranks in owners] == [3, 4, 4, 1] and sorted(owners[1]) == sorted(
        owners[2]
    ) == [0, 1, 2, 3]
    assert (
        len({*owners[0], *owners[3]}) == 4
    )  # the process without a square matrix gets the smallest one


def test_each_process_orthogonalises_its_share_and_the_shares_make_up_the_whole(monkeypatch):
    torch.manual_seed(0)
    stacks = [torch.randn(3, 8, 8), torch.randn(2, 16, 4), torch.randn(1, 4, 16)]
    whole = list(optim.orthogonalise_in_shares(stacks))
    monkeypatch.setattr(parallel, "size", lambda: 4)
    monkeypatch.setattr(parallel, "exchange", lambda matrices, owners: None)
    n_done = 0
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        share = optim.orthogonalise_in_shares([X.clone() for X in stacks])
        for before, after, wanted in zip(stacks, share, whole, strict=True):
            is_done = (after != before).any(-1).any(-1)
            torch.testing.assert_close(after[is_done], wanted[is_done])
            n_done += int(is_done.sum())
    assert n_done == 6  # each matrix once


def test_averages_start_fast_and_then_follow_their_rate():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for step, kept in ((0, 0.1), (90, 0.91), (10**6, 0.99)):
        with torch.no_grad():
            model.weight.fill_(1.0), ema.weight.fill_(0.0)
        optim.average_weights(ema, model, 0.99, step)
        assert ema.weight.item() == pytest.approx(1 - kept, abs=1e-4)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 64, 256)])
def test_muon_in_bfloat16_points_the_same_way(shape):
    torch.manual_seed(0)
    X = torch.randn(shape)
    low, plain = optim.orthogonalise_in_bf16(X), optim.orthogonalise_directly(X)
    assert low.dtype == torch.float32
    assert torch.cosine_similarity(low.flatten(), plain.flatten(), 0) > 0.9996
