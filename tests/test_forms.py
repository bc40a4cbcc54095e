"""The check of how a step is computed: what is fast must be right, or it is not used."""

import copy
import os
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model as model_file
import train
from model import BFNTransformer, Config, Form
from training import forms, optim, speed

CPU = torch.device("cpu")


def problem(*flags, K=30):
    """A new state of a small network, and what else `choose_form` takes."""
    small = ["-d=none", "-mdim=32", "-nl=2", "-nh=2", "-slen=8", "-bsz=2", "--max_steps=3"]
    args = train.complete(train.flags().parse_args([*small, *flags]))
    state = train.build(train.make_config(args, K), args, CPU)
    segment_ids = torch.tensor([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2])
    batch = torch.randint(K, (2, 8)), segment_ids, torch.zeros(2, 8, dtype=torch.bool)
    return state, (batch, args, CPU, train.accumulate_gradients)


def chosen(*flags, **sizes):
    """The form that a run with these flags uses."""
    state, rest = problem(*flags, **sizes)
    forms.choose_form(state, *rest)
    return state.model.form


class Spoil(torch.autograd.Function):
    """Pass a tensor on, and multiply its gradient by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.fixture
def compile_by(monkeypatch):
    """A function that puts attend(plain attend, *inputs) into the programs that `compile` makes."""

    def put(attend):
        changed = partial(attend, model_file.attend)

        def compile(part):
            def forward(*inputs):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(model_file, "attend", changed)
                    return type(part).forward(part, *inputs)

            part.forward = forward

        monkeypatch.setattr(torch.nn.Module, "compile", compile)

    with torch.compiler.set_stance("force_eager"):
        yield put


@pytest.fixture(params=["not finite", "off by", "no such instruction"])
def reason(request, compile_by):
    """What is said of a compiler that gives NaN, or twice the gradients of q and k, or raises."""

    def attend(plain, q, k, *rest):
        if request.param == "no such instruction":
            raise RuntimeError("no such instruction")
        factor = float("nan") if request.param == "not finite" else 2.0
        return plain(Spoil.apply(q, factor), Spoil.apply(k, factor), *rest)

    compile_by(attend)
    return request.param


@pytest.mark.parametrize("K", [30, 1500])
def test_a_compiler_that_is_wrong_is_not_used_and_one_line_says_why(
    reason, K, monkeypatch, capsys
):
    monkeypatch.setattr(speed, "fast_bf16", lambda device: False)  # also where a CPU has it
    assert chosen("--compile=on", K=K) == Form(fused=K >= forms.FUSED_FROM)
    error = capsys.readouterr().err
    assert reason in error and "compiled" in error and error.count("\n") == 1


def test_a_missing_compiler_is_named_and_other_faults_by_their_cause():
    outer = RuntimeError("backend='inductor' raised:\nE: No working C++ compiler found in x: g++")
    assert forms.compiler_fault(outer) == "no C++ compiler (g++) was found"
    outer = RuntimeError("backend='inductor' raised:")
    outer.inner_exception = KeyError("u0")
    assert forms.compiler_fault(outer) == "torch.compile failed (KeyError: 'u0')"
    assert forms.compiler_fault(ValueError()) == "torch.compile failed"


def test_a_fault_of_compiled_attention_in_bfloat16_costs_neither_of_them(
    compile_by, monkeypatch, capsys
):
    """What torch 2.13 makes for CPUs with avx512_bf16 gives NaN in the gradients of q and k."""

    def attend(plain, q, k, v, mask, written):
        factor = float("nan") if written and torch.is_autocast_enabled("cpu") else 1.0
        return plain(Spoil.apply(q, factor), Spoil.apply(k, factor), v, mask, written)

    compile_by(attend)
    monkeypatch.setattr(speed, "fast_bf16", lambda device: True)
    monkeypatch.setattr(forms.Check, "seconds", lambda check, form: 2 - form.compiled - form.bf16)
    assert chosen("--compile=on") == Form(bf16=True, compiled=True)
    assert "attention.qkv.weight is not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fastest", [Form(compiled=True), Form(bf16=True, written=True), Form(bf16=True, compiled=True)]
)
def test_of_the_forms_that_are_right_the_fastest_is_used(fastest, compile_by, monkeypatch):
    compile_by(
        lambda plain, q, *rest: plain(
            Spoil.apply(q, float("nan") if rest[-1] and q.dtype != torch.float32 else 1.0), *rest
        )
    )
    monkeypatch.setattr(speed, "fast_bf16", lambda device: True)
    monkeypatch.setattr(forms.Check, "seconds", lambda check, form: float(form != fastest))
    assert chosen("--compile=on") == fastest


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_right_is_used_without_a_word(bf16, compile_by, monkeypatch, capsys):
    compile_by(lambda plain, *rest: plain(*rest))
    monkeypatch.setattr(speed, "fast_bf16", lambda device: bf16)
    wanted = Form(fused=True, bf16=bf16, compiled=True, written=bf16, recompute=True)
    assert chosen("--compile=on", "--recompute", K=1500) == wanted
    assert capsys.readouterr().err == ""


def test_a_wrong_gram_form_is_not_used(monkeypatch, capsys):
    right = optim.orthogonalise_by_gram
    monkeypatch.setattr(optim, "orthogonalise_by_gram", lambda X: 1.01 * right(X))
    state, rest = problem()
    forms.choose_form(state, *rest)
    assert not state.optimizers[1].fast
    assert "fast way is wrong for matrices" in capsys.readouterr().err
    X = torch.randn(1, 16, 64)
    assert optim.orthogonalise(X, fast=False).equal(optim.orthogonalise_directly(X))


def test_the_check_leaves_random_numbers_weights_and_gradients_alone(compile_by):
    compile_by(lambda plain, *rest: plain(*rest))
    state, rest = problem("--compile=on")
    before = torch.get_rng_state()
    weights = [p.clone() for p in state.model.parameters()]
    forms.choose_form(state, *rest)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, state.model.parameters(), weights))
    assert all(p.grad is None for p in state.model.parameters())


def test_a_form_that_is_wrong_in_another_process_is_wrong_here(monkeypatch):
    state, (batch, _, device, accumulate) = problem()
    check = forms.Check(BFNTransformer, state.model.config, Form(), batch, device, accumulate)
    assert check.fault(Form(recompute=True)) is None
    monkeypatch.setattr(forms.parallel, "total", lambda count: count + 1)
    assert "another process" in check.fault(Form(recompute=True))


def test_programs_for_other_cpus_are_not_loaded(monkeypatch):
    """A cache that the user names stays."""
    folders = []
    for kind in ("AVX2", "NO AVX"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=kind: kind)
        forms.keep_caches_apart()
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folders[0].endswith("_AVX2") and folders[1].endswith("_NO_AVX")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    forms.keep_caches_apart()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


# ---------------------------------------------------------------- the speed of a step


class Slow(torch.optim.AdamW):
    """Its first step is slow, as where memory is allocated."""

    n_steps = 0

    def step(self):
        time.sleep(0.0 if self.n_steps else 0.5)
        self.n_steps += 1
        return super().step()


def warmed_up(optimizer):
    """What `forms.warm_up` does with one matrix -> seconds, the matrix."""
    w = torch.nn.Parameter(torch.ones(4, 4))
    model = torch.nn.ParameterList([w])
    state = SimpleNamespace(model=model, optimizers=[optimizer(list(model), lr=0.1, fused=True)])
    args = SimpleNamespace(accumulation_steps=1, shard=False)

    def accumulate(model, *_):
        model[0].sum().backward()
        return torch.zeros(())

    seconds = forms.warm_up(state, None, args, torch.device("cpu"), accumulate)
    assert not state.optimizers[0].state
    return seconds, w


def test_a_slow_first_update_is_not_taken_for_the_usual_one():
    seconds, w = warmed_up(Slow)
    assert seconds < 0.1 and torch.equal(w, torch.ones(4, 4))


def test_an_optimizer_that_does_not_skip_bad_steps_is_refused():
    with pytest.raises(ValueError, match="AdamW does not skip bad steps: give it fused=True"):
        forms.check_optimizers([torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])])


# ---------------------------------------------------------------- another device


@pytest.mark.parametrize("form", [Form(), Form(fused=True)], ids=str)
def test_a_step_waits_for_no_number_and_stays_on_its_device(form, monkeypatch):
    """Tensors on the device "meta" have no numbers: to read one is an error, as is to mix devices.

    So neither will make a step on a GPU fail or wait.
    """
    meta = torch.device("meta")
    monkeypatch.setattr(train, "to_device", lambda x, device: x.to(device))
    monkeypatch.setattr(train.torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(forms.fused, "matmul_dtype", lambda x: x.dtype)
    monkeypatch.setitem(forms.fused.CHUNK, "meta", 1 << 10)
    monkeypatch.setitem(forms.fused.ALIGNED, "meta", 16)
    model = BFNTransformer(Config(60, 0.1, 32, 2, 2)).to(meta)
    model.use(form)
    segment_ids = 1 + (np.random.default_rng(0).random((4, 16)) < 0.1).cumsum(1)
    seen = data.draw_seen(segment_ids, np.random.default_rng(0), progress=0.6)
    batch = torch.zeros(4, 16, dtype=torch.long), *map(torch.from_numpy, (segment_ids, seen))
    loss = train.accumulate_gradients(model, [batch], [0], meta)
    args = train.complete(train.flags().parse_args(["-d=none", "--max_steps=9"]))
    args.ema_rate = [0.9]
    muon = optim.make_optimizers(model, args)[1]  # torch's fused AdamW knows no such device
    state = SimpleNamespace(model=model, optimizers=[muon], emas=[copy.deepcopy(model)], step=1)
    norm = train.update_weights(state, args)
    assert loss.device == norm.device == model.embedding.weight.device == meta
    with pytest.raises(RuntimeError):
        loss.item()
