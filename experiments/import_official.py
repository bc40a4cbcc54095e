"""Evaluate and sample the published text8 network: text8_ema.pt, Graves et al. 2023.

    git clone https://github.com/nnaisense/bayesian-flow-networks     with git-lfs
    python -m experiments.import_official text8_ema.pt runs/text8
    tail -c 5000000 text8 > text8.test.txt
    python -m experiments.import_official evaluate -mdir=runs/text8 -d=text8.test.txt --all
    python -m experiments.import_official sample -mdir=runs/text8 --sampler=ancestral --steps=1000

The second line writes the weights and a tokenizer as a run folder. The last two are evaluate.py and
sample.py, with all of their flags, and the published network instead of that of model.py.

In its training all positions of a row had the same time, and nothing was given. The bound and the
solvers keep to that. Exact likelihoods, prompts, and the samplers pace and commit show the network
what it has not been trained on.

    theta      (B, L, 28)  input distribution over the 27 characters and the unknown token
    t          (B, L)      time
    h          (B, L, D)   residual stream
    logits     (B, L, 28)
"""

import io
import os
import string
import sys
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

import evaluate
import sample
from common import cli
from common.files import file_hash
from model import Config, attend, segment_positions
from training.checkpoint import load, save_checkpoint

CHARACTERS = " " + string.ascii_lowercase  # of text8, in the order of the published ids
BETA1 = 0.75**2  # beta(1) of the published text8 network
UNKNOWN = 30.0  # -log p of the unknown token, nats
TABLE = "input_adapter.pos_embedding"  # names of published weights
INPUT = "input_adapter.inp_embedding.weight"
OTHER = dict(evaluate=evaluate, sample=sample)  # commands that read a run folder


# ---------------------------------------------------------------- the network


def position_sines(position, d_model):
    """Sines at even, cosines at odd channels c of position / 1000^(c / D): (B, L) -> (B, L, D)."""
    c = torch.arange(d_model, device=position.device)
    angle = position[..., None] / torch.pow(1000, c / d_model)
    return torch.where(c % 2 == 0, angle.sin(), angle.cos())


class Block(nn.Module):
    """A layer of GPT-2: attention, then an MLP: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        D, self.n_heads = d_model, n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(D, 3 * D), c_proj=nn.Linear(D, D)))
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(D, 4 * D), c_proj=nn.Linear(4 * D, D)))

    def forward(self, h, mask):
        qkv = self.attn.c_attn(self.ln_1(h)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_heads, L, D / n_heads) each
        h = h + self.attn.c_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return h + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(h)), approximate="tanh"))


class OfficialNetwork(nn.Module):
    """The published network, whose parameters have the published names.

    theta (B, L, K), t (B, L), segment_ids (B, L) -> logits (B, L, K). The last token is unknown
    text, which every SentencePiece model has and this network does not. Of a softmax over all
    tokens, the share of the others is a softmax over the others: it reads the published flow.
    """

    def __init__(self, config):
        super().__init__()
        n_characters, D = config.K - 1, config.d_model
        self.config = config
        embeddings = dict(inp_embedding=nn.Linear(n_characters, D), t_embedding=nn.Linear(1, D))
        self.input_adapter = nn.ModuleDict(embeddings)
        blocks = nn.ModuleList(Block(D, config.n_heads) for _ in range(config.n_layers))
        self.transformer = nn.ModuleDict(dict(h=blocks, ln_f=nn.LayerNorm(D)))
        self.lm_head = nn.Linear(2 * D, n_characters)

    def forward(self, theta, t, segment_ids=None):
        """Compute the logits. Without segment_ids, each row is one segment."""
        if segment_ids is None:
            segment_ids = torch.ones_like(t, dtype=torch.long)
        theta = theta[..., :-1] / theta[..., :-1].sum(-1, keepdim=True).clamp(min=1e-37)
        position, _ = segment_positions(segment_ids)
        inputs = self.input_adapter.inp_embedding(2 * theta - 1)
        inputs = inputs + self.input_adapter.t_embedding(2 * t[..., None] - 1)
        h = inputs = inputs + position_sines(position, self.config.d_model)
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        for block in self.transformer.h:
            h = block(h, mask)
        logits = self.lm_head(torch.cat([self.transformer.ln_f(h), inputs], -1))
        return torch.cat([logits, logits.logsumexp(-1, keepdim=True) - UNKNOWN], -1)


# ---------------------------------------------------------------- weights to a run folder


def read_weights(path):
    """Read a file that the published code has saved -> {name without "net.": tensor}.

    Raises ValueError if it is missing, damaged or holds something else.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no file of weights at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch.load checks no sums
                raise zipfile.BadZipFile(part)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return {name.removeprefix("net."): weight.float() for name, weight in weights.items()}
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        message = f"{path} is damaged or no file of published weights ({type(error).__name__})"
        raise ValueError(f"{message}: fetch it again, from a git repository with git-lfs") from None


def build_network(path, n_heads, beta1=BETA1):
    """Build the network whose weights are in a file -> OfficialNetwork, length of its rows.

    beta1: beta(1) of the 27 characters. Raises ValueError for the weights of another network.
    """
    weights, other = read_weights(path), f"{path} does not hold the published text8 network"
    if missing := {TABLE, INPUT} - weights.keys():
        raise ValueError(f"{other}: it has no {min(missing)}")
    L, D = weights[TABLE].shape
    n_layers, K = sum(name.endswith("ln_1.weight") for name in weights), len(CHARACTERS) + 1
    config = Config(K, beta1 * (K - 1) / K, D, n_layers, n_heads)  # s1 is that of 27 characters
    network = OfficialNetwork(config)
    if not torch.allclose(weights.pop(TABLE), position_sines(torch.arange(L), D), atol=1e-3):
        raise ValueError(f"{other}: its {TABLE} is not the table of sines")
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            shape = expected.get(name, "nothing of this name")
            given = found.get(name, "missing")
            raise ValueError(f"{other}: {name} is {given}, expected is {shape}")
    network.load_state_dict(weights)
    return network.eval(), L


def make_tokenizer():
    """Make a SentencePiece model with the published ids -> bytes.

    They are 0 for a space to 26 for z, and 27 for all else. SentencePiece numbers characters by how
    often they occur.
    """
    model = io.BytesIO()
    texts = [CHARACTERS[:n] for n in range(1, len(CHARACTERS) + 1)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="char",
        vocab_size=len(CHARACTERS) + 1, unk_id=len(CHARACTERS), bos_id=-1, eos_id=-1,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_run(network, row_length, out_dir):
    """Write a run folder for `checkpoint.load`. Raises ValueError if out_dir has files."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists already: give another folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "tokenizer.model").write_bytes(make_tokenizer())
    run = dict(
        args=dict(sequence_length=row_length, example="line", data_path="text8", val_path=None),
        config=asdict(network.config),
        tokenizer_hash=file_hash(out_dir / "tokenizer.model"),
        lengths=[0] * row_length + [1],  # all texts have this length
        word_lengths=[0, 0] + [1] * 12,  # words of one to twelve letters and a space, all as likely
        step=0,
        loss_by_time=None,
        emas=[network.state_dict()],
    )
    save_checkpoint(out_dir / "best.pt", run)


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("checkpoint", type=cli.path,
        help="file of weights, text8_ema.pt; or evaluate or sample, and their flags")
    add("out_dir", type=cli.path, help="new run folder")
    add("-nh", "--num_heads", type=cli.count, default=12,
        help="attention heads; the weights do not tell (12)")
    add("-b", "--beta", type=cli.positive, default=BETA1,
        help="beta(1); the weights do not tell (%(default)s)")
    return p


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if command := OTHER.get(words[0] if words else None):
        command.load = partial(load, network=OfficialNetwork)
        return command.main(words[1:])
    args = flags().parse_args(words)
    network, row_length = build_network(args.checkpoint, args.num_heads, args.beta)
    write_run(network, row_length, Path(args.out_dir))
    n_weights = sum(weight.numel() for weight in network.parameters())
    config = network.config
    sizes = f"{config.n_layers} layers of width {config.d_model}, {n_weights / 1e6:.1f} million"
    print(f"{args.out_dir}: {sizes} weights, texts of {row_length} characters")


if __name__ == "__main__":
    cli.run(main)
