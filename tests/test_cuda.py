"""What only a GPU does: flex attention, bfloat16, compiled fused operations. `BFN_TEST_CUDA=1 python -m pytest tests/test_cuda.py`."""

import sys

import pytest
import torch

import bfn
import cli
import kernels
import sample
import toy
import train
from model import BFNTransformer, Config
from times import Times

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU and BFN_TEST_CUDA=1")

B, L, K = 4, 256, 3001


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = BFNTransformer(Config(K, 0.01, d_model=128, n_layers=2, n_heads=4)).to(DEVICE)
    for block in model.blocks:
        for matrix in (block.attention.out.weight, block.forward_layer.down.weight, model.linear_out.weight):
            torch.nn.init.normal_(matrix, std=0.05)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    segment_ids = 1 + (torch.rand(B, L, generator=generator) < 0.05).cumsum(1)
    given = torch.rand(B, L, generator=generator) < 0.2
    return torch.randint(K, (B, L), generator=generator), segment_ids, given


def gradients(model, batch, fused=False):
    """Loss and gradients of a step on fixed noise."""
    model.zero_grad(set_to_none=True)
    loss = train.accumulate_gradients(model, [batch], [3], DEVICE, Times("stratified", 0.5, DEVICE), fused)
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def assert_alike(ours, reference, tolerance=0.03):
    """Equal up to bfloat16: the gradients' difference is short beside them."""
    assert ours[0] == pytest.approx(reference[0], rel=tolerance)
    assert (ours[1] - reference[1]).norm() < tolerance * reference[1].norm()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(kernels.CHUNK, "cuda", 1)


def test_fused_operations_equal_the_plain_ones(model, batch, small_chunks):
    assert_alike(gradients(model, batch, fused=True), gradients(model, batch))


def test_compiled_chunks_equal_the_written_ones(model, batch, small_chunks, monkeypatch):
    written = gradients(model, batch, fused=True)
    monkeypatch.setattr(kernels, "compiled", {})
    kernels.compile_chunks()
    assert_alike(gradients(model, batch, fused=True), written)


@pytest.mark.parametrize("recompute", [False, True])
def test_flex_attention_equals_a_boolean_mask_without_compiling_again(model, batch, recompute):
    reference = gradients(model, batch)
    model.flex, model.recompute = True, recompute
    for part in (model.convolution, *model.blocks):
        part.compile()
    assert_alike(gradients(model, batch), reference)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            assert_alike(gradients(model, batch), reference)


def test_noise_is_that_of_the_cpu():
    keys = kernels.draw_keys(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernels.noise(keys.to(DEVICE), K).cpu(), kernels.noise(keys, K), atol=1e-4, rtol=1e-4)
    assert torch.equal(kernels.uniform(keys.to(DEVICE)).cpu(), kernels.uniform(keys))


@pytest.mark.parametrize("solver", ["commit", *bfn.SOLVERS])
def test_every_solver_runs(model, solver):
    ids = torch.zeros(3, 20, dtype=torch.long, device=DEVICE)
    network = lambda theta, t: model(theta, t, torch.ones_like(ids))
    times = bfn.time_grid(solver, 5)
    drawn, calls = bfn.sample(network, ids, ids.bool(), model.config.s1, K, times, solver, corrections=2)
    assert drawn.device.type == DEVICE.type and (calls <= 7).all()


def test_the_commands_train_go_on_and_sample(tmp_path, monkeypatch, capsys):
    """Rows of 256, so that attention is flex; a word vocabulary, so that nothing is fused; then fused."""
    (tmp_path / "corpus.txt").write_text(toy.corpus(2000))
    flags = f"-d={tmp_path / 'corpus.txt'} -slen=256 -mdim=64 -nl=2 -nh=2 -bsz=4 -lgi=5 -svi=5 -vli=5 -nex=2 -wus=2"
    for fused in ("off", "on"):
        for n_steps in (5, 10):
            argv = ["train.py", *flags.split(), f"-mdir={tmp_path / fused}", f"--fused={fused}", f"--max_steps={n_steps}"]
            monkeypatch.setattr(sys, "argv", [*argv, "--tokenizer=word"])
            cli.run(train.main)
        monkeypatch.setattr(sys, "argv", ["sample.py", f"-mdir={tmp_path / fused}", "--num_samples=2", "--steps=3"])
        capsys.readouterr()
        cli.run(sample.main)
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_step_waits_for_the_device_nowhere(model, batch):
    args = train.complete(train.flags().parse_args(["-d=none", "--max_steps=9"]))
    state = train.State(model, train.make_optimizers(model, args), [], Times("learned", 0.5, DEVICE))
    args.ema_rate = []

    def step():
        train.accumulate_gradients(model, [batch], [3], DEVICE, state.times, fused=True)
        train.update_weights(state, args)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
