"""Run folders with untrained networks, for the commands that read them."""

import hashlib

import torch

import data
from model import BFNTransformer, Config, save_checkpoint

WORDS = {
    "word_lengths": [0, 3, 1],
    "lengths": [0, 0, 0, 0, 0, 1, 5, 9],
    "args": {"sequence_length": 32, "data_path": None, "val_path": "val.txt"},
}


def make_run(folder, kind, text):
    """A run folder with an untrained network of random weights."""
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    (folder / "tokenizer.model").write_bytes(data.train_tokenizer(folder / "text.txt", kind, 300))
    tokenizer = data.load_tokenizer(folder / "tokenizer.model")
    torch.manual_seed(0)
    config = Config(K=len(tokenizer), beta1=0.3, d_model=32, n_layers=1, n_heads=2)
    model = BFNTransformer(config)
    torch.nn.init.normal_(model.linear_out.weight)
    save_checkpoint(
        folder / "best.pt",
        dict(
            WORDS,
            config=vars(config),
            tokenizer_hash=hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest(),
            emas=[model.state_dict()],
            step=1,
            loss_by_time=None,
        ),
    )
    return folder
