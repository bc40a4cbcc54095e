"""What only a GPU does: flex attention, bfloat16, compiled fused operations.

`BFN_TEST_CUDA=1 python -m pytest tests/test_cuda.py`.
"""

import sys
from functools import partial

import pytest
import torch

import bfn
import sample
import train
from common import cli
from common.noise import draw_keys, noise, uniform
from model import BFNTransformer, Config, Form
from text import toy
from training import fused, optim
from training.checkpoint import State

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU and BFN_TEST_CUDA=1")

B, L, K = 4, 256, 3001


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = BFNTransformer(Config(K, 0.01, d_model=128, n_layers=2, n_heads=4)).to(DEVICE)
    model.use(Form(bf16=True))
    for block in model.blocks:
        for matrix in (block.attention.out.weight, block.mlp.down.weight, model.linear_out.weight):
            torch.nn.init.normal_(matrix, std=0.05)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    segment_ids = 1 + (torch.rand(B, L, generator=generator) < 0.05).cumsum(1)
    given = torch.rand(B, L, generator=generator) < 0.2
    return torch.randint(K, (B, L), generator=generator), segment_ids, given


def gradients(model, batch, is_fused=False):
    """Loss and gradients of a step on fixed noise."""
    model.zero_grad(set_to_none=True)
    model.use(model.form._replace(fused=is_fused))
    loss = train.accumulate_gradients(model, [batch], [3], DEVICE)
    return loss.item(), torch.cat(
        [p.grad.flatten().float() for p in model.parameters() if p.requires_grad]
    )


def assert_alike(ours, reference, tolerance=0.03):
    """Equal up to the rounding of bfloat16."""
    assert ours[0] == pytest.approx(reference[0], rel=tolerance)
    assert (ours[1] - reference[1]).norm() < tolerance * reference[1].norm()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(fused.CHUNK, "cuda", 1)


def test_fused_operations_equal_the_plain_ones(model, batch, small_chunks):
    assert_alike(gradients(model, batch, is_fused=True), gradients(model, batch))


def test_compiled_chunks_equal_those_that_are_not(model, batch, small_chunks):
    reference = gradients(model, batch, is_fused=True)
    model.form = model.form._replace(compiled=True)
    assert_alike(gradients(model, batch, is_fused=True), reference)


@pytest.mark.parametrize("recompute", [False, True])
def test_flex_attention_equals_a_boolean_mask_without_compiling_again(model, batch, recompute):
    reference = gradients(model, batch)
    model.use(model.form._replace(compiled=True, flex=True, recompute=recompute))
    assert_alike(gradients(model, batch), reference)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            assert_alike(gradients(model, batch), reference)


def test_noise_is_that_of_the_cpu():
    keys = draw_keys(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        noise(keys.to(DEVICE), K).cpu(), noise(keys, K), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(uniform(keys.to(DEVICE)).cpu(), uniform(keys))


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_every_sampler_runs(model, sampler):
    ids = torch.zeros(3, 20, dtype=torch.long, device=DEVICE)
    network = partial(model, segment_ids=torch.ones_like(ids))
    controls = bfn.Controls(sampler, 5, corrections=2)
    drawn, calls = bfn.sample(network, ids, ids.bool(), model.config.s1, K, controls)
    assert drawn.device.type == DEVICE.type and (calls <= 7).all()


def test_the_commands_train_go_on_and_sample(tmp_path, monkeypatch, capsys):
    """Rows of 256 make attention flex; a word vocabulary leaves nothing fused; then fused."""
    (tmp_path / "corpus.txt").write_text(toy.corpus(2000))
    flags = "-slen=256 -mdim=64 -nl=2 -nh=2 -bsz=4 -lgi=5 -svi=5 -vli=5 -nex=2 -wus=2"
    flags += f" -d={tmp_path / 'corpus.txt'}"
    for form in ("off", "on"):
        for n_steps in (5, 10):
            argv = [
                "train.py",
                *flags.split(),
                f"-mdir={tmp_path / form}",
                f"--fused={form}",
                f"--max_steps={n_steps}",
            ]
            monkeypatch.setattr(sys, "argv", [*argv, "--tokenizer=word"])
            cli.run(train.main)
        monkeypatch.setattr(
            sys, "argv", ["sample.py", f"-mdir={tmp_path / form}", "--num_samples=2", "--steps=3"]
        )
        capsys.readouterr()
        cli.run(sample.main)
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_step_waits_for_the_device_nowhere(model, batch):
    args = train.complete(train.flags().parse_args(["-d=none", "--max_steps=9"]))
    state = State(model, optim.make_optimizers(model, args), [])
    args.ema_rate = []
    model.use(model.form._replace(fused=True))

    def step():
        train.accumulate_gradients(model, [batch], [3], DEVICE)
        train.update_weights(state, args)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
