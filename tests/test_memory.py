"""The estimate of a training step's memory; what cannot fit is refused before it is allocated."""

import sys

import numpy as np
import pytest
import torch
from test_train import TINY

import data
import train
from common import cli
from model import BFNTransformer, Config, Form
from text import toy
from text.cache import Tokens
from training import memory, run_folder, speed
from training.checkpoint import read_checkpoint

CPU = torch.device("cpu")


def estimate(*flags, K=300, device=CPU):
    """The estimate for these flags, in bytes."""
    args = train.complete(
        train.flags().parse_args(["-d=none", "--preset=laptop", "-slen=128", "-bsz=16", *flags])
    )
    return memory.step_bytes(train.make_config(args, K), args, device)


def kept_bytes(n_layers, bf16, recompute):
    """What autograd keeps of a step, without the weights, in bytes per token."""
    torch.manual_seed(0)
    model = BFNTransformer(Config(11, 1.0, 128, n_layers, 4))
    model.use(Form(bf16=bf16, written=bf16, recompute=recompute))
    weights, sizes, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes.setdefault(storage.data_ptr(), storage.nbytes())
            kept.append(x)  # else another tensor could have its address
        return x

    batch = (
        torch.randint(11, (2, 64)),
        torch.ones(2, 64, dtype=torch.long),
        torch.zeros(2, 64, dtype=torch.bool),
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        patch.setattr(torch.Tensor, "backward", lambda loss: None)
        train.accumulate_gradients(model, [batch], [0], CPU)
    return sum(sizes.values()) / 128


@pytest.mark.parametrize("bf16, recompute", [(False, False), (True, False), (False, True)])
def test_a_layer_keeps_what_the_estimate_says(monkeypatch, bf16, recompute):
    """Where an edit of the network changes this, the constants of memory.py change too."""
    monkeypatch.setattr(speed, "fast_bf16", lambda device: bf16)
    flags = [
        "-d=none",
        "-mdim=128",
        "-nh=4",
        "-bsz=2",
        "-slen=64",
        "--compile=off",
        *["--recompute"] * recompute,
    ]
    args = train.complete(train.flags().parse_args(flags))
    estimated = [
        memory.activation_bytes(Config(11, 1.0, 128, n_layers, 4), args, CPU) / 128
        for n_layers in (2, 3)
    ]
    measured = [kept_bytes(n_layers, bf16, recompute) for n_layers in (2, 3)]
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.15)


def test_what_takes_more_memory_is_estimated_to_take_more(monkeypatch):
    monkeypatch.setattr(speed, "fast_bf16", lambda device: False)
    usual = estimate()
    for more in (
        "-bsz=32",
        "-slen=256",
        "-mdim=512",
        "-nl=8",
        "-ema=0.9,0.99",
        "--compile=off",
        "-acc=2",
    ):
        assert estimate(more) > usual, more
    assert estimate("--recompute") < usual
    assert estimate("--fused=off", K=8000) > estimate(K=8000) + 4 * 16 * 128 * 7000
    large = [estimate("-bsz=1000", f"-slen={length}") / length for length in (128, 256)]
    assert large[1] == pytest.approx(large[0], rel=0.3)
    assert estimate("-bsz=1000000") > 1000e9


def test_the_presets_fit_the_machines_that_they_are_for(monkeypatch):
    monkeypatch.setattr(speed, "fast_bf16", lambda device: device.type == "cuda")
    assert estimate("--compile=off", K=8192) < 2e9
    assert (
        estimate("--preset=base", "-slen=256", "-bsz=64", K=32_000, device=torch.device("cuda"))
        < 24e9
    )


def test_only_what_is_clearly_too_large_is_refused(monkeypatch):
    args = train.complete(train.flags().parse_args(["-d=none", *TINY]))
    config = train.make_config(args, 300)
    needed = memory.step_bytes(config, args, CPU)
    monkeypatch.setattr(memory, "total_bytes", lambda device: needed / memory.MARGIN + 1)
    assert memory.check(config, args, CPU).endswith("takes less")
    monkeypatch.setattr(memory, "total_bytes", lambda device: needed / memory.MARGIN - 1)
    with pytest.raises(
        ValueError,
        match=r"on cpu: a lower -bsz with a higher -acc, --recompute, a lower -slen or a smaller",
    ):
        memory.check(config, args, CPU)
    args.recompute, args.batch_size = True, 1
    monkeypatch.setattr(memory, "total_bytes", lambda device: 1e8)
    with pytest.raises(ValueError, match=r"on cpu: a lower -slen or a smaller --preset takes less"):
        memory.check(config, args, CPU)


def test_the_limits_of_all_groups_of_a_process_count(tmp_path, monkeypatch):
    """Both versions of cgroups; "max" is no limit, nor is a group that a container does not see."""
    for name, text in {
        "memory.max": "max\n",
        "user/memory.max": "9000\n",
        "user/run/memory.max": "max\n",
        "memory/memory.limit_in_bytes": "8000\n",
        "memory/a/b/memory.limit_in_bytes": "7000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.cgroup_limits("0::/user/run\n", tmp_path) == [9000]
    assert memory.cgroup_limits("9:name=systemd:/x\n4:memory:/a/b\n0::/\n", tmp_path) == [
        7000,
        8000,
    ]
    assert memory.cgroup_limits("4:cpu,memory:/not/seen\n", tmp_path) == [8000]
    whole = memory.total_bytes(CPU)
    assert 1e8 < whole < 1e15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.total_bytes(CPU) == whole / 2


def error_of(tmp_path, monkeypatch, capsys, *flags):
    """Train with flags that must fail -> its error, one line."""
    (tmp_path / "corpus.txt").write_text(toy.corpus(50))
    files = (
        f"-d={tmp_path / 'corpus.txt'}",
        f"-mdir={tmp_path / 'run'}",
        f"--cache_dir={tmp_path / 'cache'}",
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *files, *TINY, "--tokenizer=word", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "sizes", ["-bsz=1000000", "-bsz=2147483647", "-bsz=1 -slen=2000000", "-mdim=200000"]
)
def test_sizes_that_cannot_fit_are_refused_before_anything_is_written_or_read(
    tmp_path, monkeypatch, capsys, sizes
):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 16e9)
    monkeypatch.setattr(run_folder, "prepare_text", None)
    error = error_of(tmp_path, monkeypatch, capsys, *sizes.split())
    assert (
        "a training step takes about" in error
        and "there are 16.0 GB on cpu" in error
        and "--recompute" in error
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["training.lock"]


def test_a_vocabulary_that_cannot_fit_is_refused_before_a_batch_is_read(
    tmp_path, monkeypatch, capsys
):
    totals = iter(
        [16e9, 0.1e9]
    )  # as if the first estimate, without a vocabulary, were small enough
    monkeypatch.setattr(memory, "total_bytes", lambda device: next(totals))
    monkeypatch.setattr(data, "Loader", None)
    assert "there are 0.1 GB" in error_of(tmp_path, monkeypatch, capsys)
    assert (tmp_path / "run" / "tokenizer.model").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
    ],
)
def test_running_out_of_memory_names_the_estimate_and_the_flags(
    tmp_path, monkeypatch, capsys, error
):
    def fail(*anything):
        raise error

    monkeypatch.setattr(train, "accumulate_gradients", fail)
    message = error_of(tmp_path, monkeypatch, capsys)
    assert (
        "out of memory: a training step takes about 0.4 GB, and there are" in message
        and "-bsz" in message
    )


def test_a_form_that_needs_more_memory_than_wanted_recomputes(monkeypatch, capsys):
    args = train.complete(train.flags().parse_args(["-d=none", *TINY]))
    model = BFNTransformer(train.make_config(args, 300))
    memory.fit(model, args, CPU)
    assert not model.form.recompute
    monkeypatch.setattr(memory, "total_bytes", lambda device: 1e6)
    memory.fit(model, args, CPU)
    assert model.form.recompute and "training as with --recompute" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gigabytes, flags, rows, rate",
    [
        (80, ["-ep=14"], 256, 2e-3),
        (48, ["-ep=14"], 128, 2**0.5 * 1e-3),
        (16, [], 64, 1e-3),
        (80, ["-bsz=64"], 64, 1e-3),  # what the user names stays
        (80, ["--max_steps=9", "-lr=0.0005"], 256, 5e-4),
        (80, ["--max_steps=9", "-acc=2"], 128, 2e-3),  # by the tokens of a whole step
        (80, ["-acc=8"], 64, 2e-3),  # no further than the rule was tried
        (80, ["--preset=small"], 32, 1e-3),
        (80, ["-ep=7"], 128, 2**0.5 * 1e-3),  # not below LEAST_STEPS
        (80, ["--minutes=9", "-slen=512"], 128, 2e-3),
    ],
)
def test_a_batch_grows_with_the_memory_of_a_gpu_and_the_learning_rate_with_its_root(
    monkeypatch, gigabytes, flags, rows, rate
):
    monkeypatch.setattr(speed, "fast_bf16", lambda device: True)
    monkeypatch.setattr(memory, "total_bytes", lambda device: gigabytes * 1e9)
    words = ["-d=none", "--preset=base", "-slen=256", *flags]
    for device in ("cuda", "cpu"):
        args = train.flags().parse_args(words)
        args.by_memory = memory.not_named(args)
        train.complete(args)
        train.fit_rows(args, Tokens(None, np.array([0, 300]), 1, 1, 0, "", None))
        usual = args.batch_size, args.learning_rate
        memory.grow_batch(train.make_config(args, 32_000), args, torch.device(device), 10**7)
        found = args.batch_size, args.learning_rate
        assert found == pytest.approx((rows, rate) if device == "cuda" else usual)


@pytest.mark.slow
@pytest.mark.parametrize("named", [[], ["--preset=laptop"]])
def test_a_resumed_run_keeps_the_batch_that_its_memory_allowed(
    tmp_path, monkeypatch, capsys, named
):
    """It may go on with another amount of memory."""
    (tmp_path / "corpus.txt").write_text(toy.corpus(300))
    real = memory.grow_batch
    monkeypatch.setattr(memory, "GROWN", "laptop")
    monkeypatch.setattr(
        memory, "grow_batch", lambda config, args, _, n: real(config, args, torch.device("cuda"), n)
    )
    words = [f"-d={tmp_path / 'corpus.txt'}", f"-mdir={tmp_path / 'run'}", "--tokenizer=word"]
    words += [f"--cache_dir={tmp_path}", "-mdim=32", "-nl=1", "-nh=2", "-nex=0", *named]
    for max_steps, gigabytes in ((1, 80), (2, 1e-3)):
        monkeypatch.setattr(memory, "total_bytes", lambda device, n=gigabytes: n * 1e9)
        monkeypatch.setattr(memory, "check", lambda *inputs: "")
        train.main([*words, f"--max_steps={max_steps}"])
        assert "8,192 per batch, learning rate 0.012," in capsys.readouterr().out
    args = read_checkpoint(tmp_path / "run" / "last.pt")["args"]
    assert (args["batch_size"], args["sequence_length"]) == (128, 64)
