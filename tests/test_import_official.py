"""Published weights: the network gives the published output and loss; commands read the run folder.

    PYTHONPATH=FOLDER BFN_OFFICIAL_CODE=FOLDER python -m pytest tests/test_import_official.py

also compares it with a clone of github.com/nnaisense/bayesian-flow-networks in FOLDER, commit
b62568e.
"""

import importlib.util
import json
import math
import os
import sys

import pytest
import torch
from untrained import make_run

import bfn
from common import cli
from evaluation import bounds
from experiments import import_official
from text import cache, toy
from text.tokenizer import load_tokenizer
from training import checkpoint

L, D, HEADS = 8, 16, 2
OF_A_BLOCK = {
    "ln_1.weight": (D,),
    "ln_1.bias": (D,),
    "attn.c_attn.weight": (3 * D, D),
    "attn.c_attn.bias": (3 * D,),
    "attn.c_proj.weight": (D, D),
    "attn.c_proj.bias": (D,),
    "ln_2.weight": (D,),
    "ln_2.bias": (D,),
    "mlp.c_fc.weight": (4 * D, D),
    "mlp.c_fc.bias": (4 * D,),
    "mlp.c_proj.weight": (D, 4 * D),
    "mlp.c_proj.bias": (D,),
}
SHAPES = {  # of what the published code saves for two layers, in its order
    "net.input_adapter.pos_embedding": (L, D),
    "net.input_adapter.inp_embedding.weight": (D, 27),
    "net.input_adapter.inp_embedding.bias": (D,),
    "net.input_adapter.t_embedding.weight": (D, 1),
    "net.input_adapter.t_embedding.bias": (D,),
    **{
        f"net.transformer.h.{i}.{name}": shape
        for i in range(2)
        for name, shape in OF_A_BLOCK.items()
    },
    "net.transformer.ln_f.weight": (D,),
    "net.transformer.ln_f.bias": (D,),
    "net.lm_head.weight": (27, 2 * D),
    "net.lm_head.bias": (27,),
}


def made_up_weights():
    """Weights that are the same everywhere, and the published positions: {name: tensor}."""
    sines = [
        [(math.cos if c % 2 else math.sin)(i / 1000 ** (c / D)) for c in range(D)] for i in range(L)
    ]
    weights = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        numbers = torch.arange(math.prod(shape), dtype=torch.float64)
        weights[name] = (numbers * (i + 1) ** 0.5).sin().view(shape).float()
    return {**weights, "net.input_adapter.pos_embedding": torch.tensor(sines)}


def with_unknown(theta, share=0.0):
    """Add the unknown token to input distributions over 27 characters: (..., 27) -> (..., 28)."""
    return torch.cat([(1 - share) * theta, torch.full_like(theta[..., :1], share)], -1)


@pytest.fixture
def saved(tmp_path):
    """A file of weights as the published code saves them."""
    torch.save(made_up_weights(), tmp_path / "ema.pt")
    return tmp_path / "ema.pt"


@pytest.fixture
def network(saved):
    """The network of these weights."""
    return import_official.build_network(saved, HEADS)[0]


@pytest.fixture
def run_command(monkeypatch, capsys):
    """A function that runs the command with some words -> standard output."""
    for module in import_official.OTHER.values():
        monkeypatch.setattr(module, "load", module.load)  # which the command replaces

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["import_official.py", *map(str, words)])
        cli.run(import_official.main)
        return capsys.readouterr().out

    return run


# ---------------------------------------------------------------- the network


def test_the_logits_are_those_of_the_published_code(network):
    """The numbers come from the published code with the same weights and input."""
    theta = (
        (3 * torch.arange(2 * L * 27, dtype=torch.float64).cos()).view(2, L, 27).softmax(-1).float()
    )
    logits = network(with_unknown(theta), torch.tensor([[0.2], [0.9]]).expand(2, L))
    first, last = torch.tensor(
        [[7.391412, 3.877662, -5.033218, -8.452844], [-1.268843, -5.706979, -3.286514, 2.516087]]
    )
    torch.testing.assert_close(logits[0, 0, :4], first, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[1, 7, 23:27], last, atol=2e-5, rtol=0)


def test_the_unknown_token_is_neither_read_nor_predicted(network):
    """So the output follows from the flow over 27 characters, and s1 is sqrt(27 beta(1))."""
    theta, t = torch.rand(1, L, 27).softmax(-1), torch.full((1, L), 0.5)
    logits = network(with_unknown(theta), t)
    torch.testing.assert_close(network(with_unknown(theta, 0.7), t), logits)
    assert (logits.softmax(-1)[..., -1] < 1e-12).all() and network.config.K == 28
    assert network.config.s1 == pytest.approx(math.sqrt(27) * 0.75)
    assert network(with_unknown(torch.zeros(1, L, 27), 1.0), t).isfinite().all()


def test_a_packed_row_equals_its_texts_alone(network):
    theta, t = torch.randn(1, L, 28).softmax(-1), torch.rand(1, L)
    packed = network(theta, t, torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]]))
    for begin, end in ((0, 3), (3, 7)):
        alone = network(theta[:, begin:end], t[:, begin:end])
        torch.testing.assert_close(packed[:, begin:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    "BFN_OFFICIAL_CODE" not in os.environ,
    reason="BFN_OFFICIAL_CODE names no clone of the published code",
)
def test_logits_and_losses_equal_those_of_the_published_code(tmp_path):
    published_model = os.path.join(os.environ["BFN_OFFICIAL_CODE"], "model.py")
    spec = importlib.util.spec_from_file_location("official_model", published_model)
    module = importlib.util.module_from_spec(spec)  # a file here is named model.py too
    spec.loader.exec_module(module)
    CategoricalFactory = importlib.import_module("probability").CategoricalFactory
    GPT = importlib.import_module("networks.transformer").GPT
    TextInputAdapter = importlib.import_module("networks.adapters").TextInputAdapter
    torch.manual_seed(0)
    adapter = TextInputAdapter(vocab_size=27, seq_len=32, output_size=48)
    net = GPT(
        dict(input_adapter=adapter, output_adapter=None),
        27,
        n_layer=3,
        n_head=4,
        n_embd=48,
        skip=True,
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    flow = module.DiscreteBayesianFlow(n_classes=27, max_sqrt_beta=0.75)
    published = module.BFN(
        net, flow, module.DiscreteBayesianFlowLoss(flow, CategoricalFactory())
    ).eval()
    torch.save(published.state_dict(), tmp_path / "ema.pt")
    network, row_length = import_official.build_network(tmp_path / "ema.pt", n_heads=4)
    assert row_length == 32

    ids, t = torch.randint(27, (8, 32)), torch.rand(8, 1).expand(8, 32).contiguous()
    nothing, config = torch.zeros(8, 32, dtype=torch.bool), network.config

    def noise():
        torch.manual_seed(1)  # the published flow draws the same numbers, for 27 characters
        return with_unknown(torch.normal(torch.zeros(8, 32, 27), torch.ones(8, 32, 27)))

    with torch.no_grad():
        theta = bfn.flow(ids, t, config.s1, 27, noise()[..., :-1]).softmax(-1)
        torch.testing.assert_close(
            network(with_unknown(theta), t)[..., :-1], net(theta, t), atol=1e-5, rtol=0
        )
        log_p = bfn.predict_noisy(network, ids, t, nothing, config.s1, config.K, noise())
        loss = bfn.squared_error_loss(log_p, ids, t, config.s1).mean()
        reconstruction = bfn.reconstruction_loss(
            network, ids, nothing, config.s1, config.K, noise()
        ).mean()
        torch.manual_seed(1)
        torch.testing.assert_close(loss, published(ids, t), atol=1e-5, rtol=0)
        torch.manual_seed(1)
        torch.testing.assert_close(
            reconstruction, published.compute_reconstruction_loss(ids), atol=1e-5, rtol=0
        )


# ---------------------------------------------------------------- the run folder


def test_the_tokenizer_has_the_published_ids(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(import_official.make_tokenizer())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    text = " abcdefghijklmnopqrstuvwxyz  a "
    assert (
        tokenizer.encode(text) == [*range(27), 0, 0, 1, 0]
        and tokenizer.decode(tokenizer.encode(text)) == text
    )
    assert len(tokenizer) == 28 and tokenizer.encode("A") == [tokenizer.unk] == [27]
    assert tokenizer.bos == tokenizer.eos == -1


def test_the_commands_evaluate_and_sample_use_the_published_network(
    saved, network, tmp_path, run_command
):
    """The figures are those of `bounds.score`. A sample has the trained length."""
    run_dir, text = tmp_path / "run", tmp_path / "text.txt"
    assert "2 layers of width 16" in run_command(saved, run_dir, f"-nh={HEADS}")
    text.write_text("the cat sat on the mat ")
    flags = (
        f"-mdir={run_dir}",
        f"-d={text}",
        "--draws=2",
        "--seed=3",
        "--json",
        f"--cache_dir={tmp_path}",
    )
    figures = json.loads(run_command("evaluate", *flags))
    tokens = cache.load_corpus(text, load_tokenizer(run_dir / "tokenizer.model"), tmp_path)
    work = bounds.Work(torch.device("cpu"))
    scores = bounds.score(network, bounds.Text(tokens, L), work, n_draws=2, seed=3)
    found = figures["L_inf_nats_per_token"], figures["L_rec_nats_per_token"]
    assert (
        found == pytest.approx(scores.nats_per_token, rel=1e-6) and figures["n_tokens_scored"] == 23
    )
    assert figures["bits_per_char"] == pytest.approx(figures["bound_bits_per_token"])

    flags = (f"-mdir={run_dir}", "--sampler=ancestral", "--steps=5", "--num_samples=3")
    samples = run_command("sample", *flags).split("\n")[:-1]
    assert [len(sample) for sample in samples] == [L] * 3 and set("".join(samples)) <= set(
        import_official.CHARACTERS
    )


def test_without_the_published_network_the_run_folder_is_refused(saved, tmp_path):
    import_official.write_run(*import_official.build_network(saved, HEADS), tmp_path / "run")
    with pytest.raises(ValueError, match="do not fit the network in model.py"):
        checkpoint.load(tmp_path / "run")


def damage(path, what):
    """Make another file of a good one."""
    weights = torch.load(path, weights_only=True)
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif what == "a byte changed":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif what == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif what == "no mapping":
        torch.save([1, 2], path)
    elif what == "own checkpoint":
        path.write_bytes(
            (make_run(path.parent / "own", "word", toy.corpus(50)) / "best.pt").read_bytes()
        )
    elif what == "images":
        torch.save({"net.down.weight": torch.ones(3)}, path)
    elif what == "256 tokens":
        torch.save({**weights, "net.input_adapter.inp_embedding.weight": torch.ones(D, 256)}, path)
    elif what == "one less":
        del weights["net.transformer.h.1.attn.c_proj.bias"]
        torch.save(weights, path)
    elif what == "one more":
        torch.save({**weights, "net.more": torch.ones(3)}, path)
    elif what == "learned positions":
        torch.save({**weights, "net.input_adapter.pos_embedding": torch.ones(L, D)}, path)


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "no file of weights at"),
        ("truncated", "is damaged"),
        ("a byte changed", "is damaged"),
        ("pointer", "git-lfs"),
        ("no mapping", "no file of published weights"),
        ("own checkpoint", "no file of published weights"),
        ("images", "it has no input_adapter.inp_embedding.weight"),
        ("256 tokens", r"inp_embedding.weight is \(16, 256\), expected is \(16, 27\)"),
        ("one less", r"h.1.attn.c_proj.bias is missing, expected is \(16,\)"),
        ("one more", r"more is \(3,\), expected is nothing of this name"),
        ("learned positions", "is not the table of sines"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(saved, tmp_path, what, message):
    damage(saved, what)
    with pytest.raises(ValueError, match=message) as caught:
        import_official.build_network(saved, HEADS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250 + len(str(saved))


def test_heads_that_do_not_fit_and_a_folder_with_files_are_refused(
    saved, tmp_path, run_command, capsys
):
    for folder, heads, message in (
        (tmp_path / "run", 3, "num_heads 3"),
        (tmp_path, HEADS, "exists already"),
    ):
        with pytest.raises(SystemExit) as left:
            run_command(saved, folder, f"-nh={heads}")
        error = capsys.readouterr().err
        assert left.value.code == 2 and message in error and error.count("\n") == 1
