"""Experiments: variants change what they say, and commands write results."""

import argparse
import json
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from exact import ExactNetwork, draw, random_joint
from untrained import make_run

import bfn
import data
import model as model_file
import train
from experiments import compare, samplers
from text import toy
from text.reading import Corpus
from training import checkpoint, optim

PATCHED = [
    (model_file.BFNTransformer, "__init__ head attention_mask forward"),
    (model_file.Convolution, "forward"),
    (train, "BFNTransformer"),
    (bfn, "CROSS_ENTROPY clamp_given predict predict_noisy squared_error_loss reconstruction_loss"),
    (data, "draw_seen EASY_SHARE HIDDEN_SHARE OWN_SHARE"),
    (optim, "make_optimizers"),
]


@pytest.fixture
def unpatched(monkeypatch):
    """Restore after the test what variants change."""
    for owner, names in PATCHED:
        for name in names.split():
            monkeypatch.setattr(owner, name, getattr(owner, name))


def test_the_probabilities_of_the_autoregressive_baseline_sum_to_one(unpatched):
    """Over all sequences, so its loss is a likelihood and can be compared with the bound."""
    compare.autoregressive(SimpleNamespace())
    torch.manual_seed(0)
    network = train.BFNTransformer(
        model_file.Config(K=3, beta1=0.5, d_model=32, n_layers=2, n_heads=2)
    )
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.cartesian_prod(*[torch.arange(3)] * 4)
    packed = torch.cat([ids.flip(0), ids], 1)  # two segments per row
    segment_ids = torch.tensor([1] * 4 + [2] * 4).expand_as(packed)
    nothing = torch.zeros_like(packed, dtype=torch.bool)
    with torch.no_grad():
        t = torch.rand(packed.shape)
        log_p = bfn.predict_noisy(
            partial(network, segment_ids=segment_ids), packed, t, nothing, 1.0, 3
        )
        loss = bfn.training_loss(log_p, packed, t, 1.0)
    for segment in (loss[:, :4], loss[:, 4:]):
        assert (-segment.sum(-1)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_bound_of_masked_diffusion_is_that_of_the_exact_network(unpatched):
    """The mean of the cross-entropy over all shares of unknown tokens is then -log P."""
    compare.masked(SimpleNamespace())
    sequences, probabilities = random_joint()
    ids = draw(sequences, probabilities, 40_000)
    torch.manual_seed(0)
    t = ((torch.rand(()) + torch.arange(len(ids)) / len(ids)).frac())[:, None].expand(ids.shape)
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    log_p = bfn.predict_noisy(ExactNetwork(sequences, probabilities), ids, t, nothing, 6.0, 4)
    loss = bfn.training_loss(log_p, ids, t, 6.0).sum(1)
    truth = -probabilities.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)]
    excess = loss - truth
    assert excess.mean().item() == pytest.approx(0, abs=4 * (excess.std() / len(ids) ** 0.5).item())


def test_every_variant_but_base_changes_something(unpatched):
    for name, variant in compare.VARIANTS.items():
        args = SimpleNamespace(
            learning_rate=1.0, batch_size=8, weight_decay=0.0
        )
        before = (
            dict(vars(args)),
            [getattr(owner, n) for owner, names in PATCHED for n in names.split()],
        )
        variant(args)
        after = (
            dict(vars(args)),
            [getattr(owner, n) for owner, names in PATCHED for n in names.split()],
        )
        assert (before == after) == (name == "base"), name
        for (owner, n), value in zip(
            ((o, n) for o, names in PATCHED for n in names.split()), before[1], strict=True
        ):
            setattr(owner, n, value)


@pytest.mark.slow
def test_a_comparison_writes_a_table_a_picture_and_the_weights_of_base(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text(toy.corpus(300))
    sizes = f"-mdim=32 -nl=1 -nh=2 -bsz=4 --cache_dir={tmp_path / 'cache'}"
    words = [f"-d={tmp_path / 'corpus.txt'}", f"--output={tmp_path / 'out'}", "--tokens=2000,4000"]
    words += [f"--flags=--preset=toy --tokenizer=word {sizes}"]
    names = ["base", "masked weight_decay=0"]
    compare.main([*names, *words])
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["budget"], r["name"]) for r in records] == [*product([2000, 4000], names)]
    for r in records:
        assert r["budget"] <= r["n_tokens"] < r["budget"] + 600
        assert len(r["curve"]) == compare.N_POINTS
        assert r["lowest_bits_per_char"] == min(bound for *_, bound, _ in r["curve"])
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "results.md").read_text() == printed and printed.count("|") > 20
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000
    network, tokenizer, run = checkpoint.load(tmp_path / "out" / "base-0")
    assert len(tokenizer) == network.config.K and run["step"] > 0 and len(run["loss_by_time"]) > 1


def test_a_variant_of_flags_changes_these_flags_only_and_not_the_text():
    words = "batch_size=7 weight_decay=0.25", "--flags=-nl=2", "-d=a.txt"
    args = compare.flags().parse_args(words)
    changed, usual = compare.run_flags(args, *args.variants, seed=3), compare.run_flags(args)
    assert changed.num_layers == 2
    assert changed.data_path == usual.data_path == "a.txt"
    assert vars(changed) == vars(usual) | dict(batch_size=7, weight_decay=0.25, seed=3)


def test_a_variant_may_have_functions_and_flags(unpatched):
    name = compare.variant("masked dropout_prob=0.25")
    args = compare.run_flags(compare.flags().parse_args([name]), name)
    before = bfn.predict_noisy
    compare.change(name, args)
    assert args.dropout_prob == 0.25 and bfn.predict_noisy is not before


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no variant"),
        (" ", "is no variant"),
        ("masked nothing", "nothing is no variant"),
        ("masked autoregressive", "is two models"),
        ("vocab_size=4096", "the same for all variants"),
        ("masked seed=3", "the same for all variants"),
    ],
)
def test_a_variant_that_is_none_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        compare.variant(text)


def test_the_flags_of_a_variant_count_more_than_its_functions(unpatched):
    name = compare.variant("adamw learning_rate=0.25")
    args = compare.run_flags(compare.flags().parse_args([name]), name)
    compare.change(name, args)
    assert args.learning_rate == 0.25


def test_the_preset_is_that_of_training():
    args = compare.flags().parse_args(["base", "-d=a.txt", "--flags=--device=cpu"])
    assert compare.run_flags(args).preset == train.DEFAULT_PRESET["cpu"]


def test_flags_that_a_comparison_does_not_use_are_refused():
    for flag in ("-acc=2", "-wus=0", "-ep=3"):
        args = compare.flags().parse_args(["base", f"--flags={flag}"])
        with pytest.raises(ValueError, match="has no use here"):
            compare.run_flags(args)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    args = compare.flags().parse_args(["base", "--tokens=100"])
    there = dict(name="base", seed=0, budget=100, curve=[]) | compare.settings(args)
    (tmp_path / "results.json").write_text(json.dumps([there]))
    for words in (["--tokens=100", "--flags=-nl=2"], ["--minutes=3"], ["--tokens=9", "-d=a.txt"]):
        with pytest.raises(ValueError, match="give another --output"):
            compare.main(["base", f"--output={tmp_path}", *words])


@pytest.mark.parametrize("name, message", [("gone", "gone is no variant"), ("gone=1", "--gone")])
def test_a_variant_that_does_not_exist_is_refused_before_anything_is_trained(
    tmp_path, name, message
):
    with pytest.raises(ValueError, match=message):
        compare.main(["base", name, f"--output={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_of_samplers_writes_a_table_and_a_picture(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(1000))
    command = f"-mdir={run_dir} --corpus={run_dir / 'text.txt'} --cache_dir={tmp_path / 'cache'}"
    command += f" -d={run_dir / 'text.txt'} --output={tmp_path / 'out'} --num_samples=8"
    command += " --temperatures 1e-3 --calls 2 4"
    samplers.main([*command.split(), "--samplers", "pace", "commit", "ode2"])
    held_out, *results = json.loads((tmp_path / "out" / "results.json").read_text())
    jobs = [(r["sampler"], r["calls"], r["temperature"]) for r in results]
    names = "pace", "commit", "ode2"
    assert jobs == [(sampler, n, T) for sampler in names for n in (2, 4) for T in (1.0, 1e-3)]
    assert all(r["calls_per_text"] <= r["calls"] for r in results)
    entropies = [r["figures"]["word entropy (bits)"][0] for r in results]
    pairs = zip(entropies[::2], entropies[1::2], strict=True)
    assert all(sharp < plain for plain, sharp in pairs)
    assert held_out["figures"]["grammatical"][0] == 1
    assert capsys.readouterr().out.count("| ode2 |") == 4
    with pytest.raises(
        ValueError, match="--length=33, but the model was trained on texts of at most"
    ):
        samplers.main([*command.split(), "--length=33"])


def test_samplers_are_compared_with_the_validation_text_of_the_run(tmp_path):
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(100))
    _, tokenizer, run = checkpoint.load(run_dir)
    (tmp_path / "val.txt").write_text("the king sees the boat\n" * 9)
    run["args"]["val_path"] = str(tmp_path / "val.txt")
    corpus = Corpus(str(run_dir / "text.txt"))
    args = samplers.flags().parse_args([f"-mdir={run_dir}", f"--cache_dir={tmp_path / 'cache'}"])
    texts, _ = samplers.held_out_texts(args, run, tokenizer, corpus)
    assert {line for text in texts for line in text.split("\n")} == {"the king sees the boat"}
