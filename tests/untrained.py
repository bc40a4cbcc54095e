"""For tests: untrained networks, their run folders, comparing checkpoints, running a command."""

import sys

import torch

from common import cli
from common.files import file_hash
from model import BFNTransformer, Config
from text.tokenizer import load_tokenizer, train_tokenizer
from training.checkpoint import save_checkpoint

UNICODE = [
    "plain words",
    "  two  spaces  at both ends  ",
    "naïve café, Ελληνικά, 日本語のテキスト, العربية",
    "🙂👩‍👩‍👧 emoji\tand tabs",
    "a\u2028b line and paragraph separators \u2029 stay inside a line",
    "digits 1234567890 and <s> </s> <unk>",
]

WORDS = {
    "word_lengths": [0, 3, 1],
    "lengths": [0, 0, 0, 0, 0, 1, 5, 9],
    "args": {
        "sequence_length": 32, "data_path": None, "val_path": "val.txt", "text_field": "text",
        "ema_rate": [0.9], "beta": 0.3, "model_dim": 32, "num_layers": 1, "num_heads": 2,
        "batch_size": 4, "tokenizer": None, "init_from": None, "vocab_size": None, "max_steps": 1,
        "val_tokens": 1, "preset": "toy",
    },
}


def record(emas, **more):
    """What a checkpoint of a small run holds."""
    config = vars(Config(K=9, beta1=0.3, d_model=32, n_layers=1, n_heads=2))
    of_run = dict(config=config, tokenizer_hash="", step=1, loss_by_time=None, emas=emas)
    return WORDS | of_run | more


def random_network(config, std=0.2):
    """A network with all weights random, also those that start at zero: every part matters."""
    torch.manual_seed(0)
    network = BFNTransformer(config).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return network


def make_run(folder, kind, text, example="line"):
    """A run folder with an untrained network of random weights."""
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer(folder / "text.txt", kind, 300, example)
    )
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    torch.manual_seed(0)
    config = Config(K=len(tokenizer), beta1=0.3, d_model=32, n_layers=1, n_heads=2)
    model = BFNTransformer(config)
    torch.nn.init.normal_(model.linear_out.weight)
    save_checkpoint(
        folder / "best.pt",
        record(
            [model.state_dict()],
            args={**WORDS["args"], "example": example},
            config=vars(config),
            tokenizer_hash=file_hash(folder / "tokenizer.model"),
        ),
    )
    return folder


def equal(a, b):
    """Whether two checkpoints, or parts of them, are the same in every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def run_command(main, monkeypatch, capsys, *argv):
    """Run the main function of a command -> lines of standard output, standard error, exit code."""
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, argv)])
    code = 0
    try:
        cli.run(main)
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    return output.out.splitlines(), output.err, code
