"""The network of the flow: a FiLM-conditioned transformer that reads distributions over the vocabulary.

    theta        (B, L, K)  input distribution: softmax of the state, or the one-hot of a given token
    t            (B, L)     time in [0, 1] of each position
    segment_ids  (B, L)     segment of each position in a packed row, 0 = padding: the one source of the attention mask
    h, hidden    (B, L, D)  residual stream before and after the body
    logits       (B, L, K)  p = softmax(logits) is the prediction for each position

The forward pass has three parts: `embed` (theta -> h), `body` (h -> hidden), `head` (hidden -> logits).
"""

import hashlib
import math
import os
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import kernels

FORMAT = 4  # of the checkpoint file and the network in it
AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}  # elements of the largest tensors: 8 MB fit a CPU's cache, ten of 256 MB a GPU
compiled_block_mask = torch.compile(create_block_mask, dynamic=False)  # as it stands, it makes the whole L x L mask


@dataclass(frozen=True)
class Config:
    K: int  # vocabulary size
    beta1: float  # beta(1), the accuracy that the flow reaches at t = 1
    d_model: int = 1024
    n_layers: int = 8
    n_heads: int = 8
    dropout: float = 0.0

    def __post_init__(self):
        if self.d_model % (2 * self.n_heads) or self.d_model == 2 * self.n_heads:
            raise ValueError(f"model_dim {self.d_model} is not an even multiple, from 4, of num_heads {self.n_heads}")

    @property
    def s1(self):
        """sqrt(K beta1): the square root of the evidence's accuracy at t = 1."""
        return math.sqrt(self.K * self.beta1)

    @property
    def d_time(self):
        """Width of the time embedding."""
        return max(self.d_model // 4, 16)


def rows_at_once(length, config, device):
    """How many rows of a length a network had best read at a time without gradient."""
    return max(1, AT_ONCE[device.type] // (length * max(config.K, 4 * config.d_model, length)))


class TimeEmbedding(nn.Module):
    """Sines and cosines of t at octave-spaced frequencies, through one hidden layer: (B, L) -> (B, L, d_time)."""

    def __init__(self, d_time, n_octaves=8):
        super().__init__()
        frequencies = math.pi / 2 * 2.0 ** torch.arange(n_octaves)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * n_octaves, d_time), nn.SiLU(), nn.Linear(d_time, d_time), nn.SiLU())

    def forward(self, t):
        angle = t[..., None] * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class PlaceEmbedding(nn.Module):
    """Where a position stands in its segment, counted from both ends: segment_ids (B, L) -> (B, L, D).

    Rotary attention sees differences of positions alone; the ends tell the network how long the text is.
    """

    def __init__(self, d_model, n_octaves=8):
        super().__init__()
        frequencies = math.pi / 2.0 ** torch.arange(n_octaves)  # half-periods of 1 to 128 positions
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear = nn.Linear(4 * n_octaves, d_model)

    def forward(self, segment_ids):
        i = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
        change = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = F.pad(change, (1, 0), value=True)
        ends = F.pad(change, (0, 1), value=True)
        first = torch.where(starts, i, 0).cummax(1).values
        last = torch.where(ends, i, i.shape[1]).flip(1).cummin(1).values.flip(1)
        angle = torch.stack([i - first, last - i], -1)[..., None] * self.frequencies  # (B, L, 2, n_octaves)
        return self.linear(torch.cat([angle.sin(), angle.cos()], -1).flatten(2))


class FiLM(nn.Module):
    """RMS-normalise, then scale by (1 + gamma) and shift by beta, both read from the time embedding [Perez et al. 2017]."""

    def __init__(self, d_model, d_time):
        super().__init__()
        self.linear = nn.Linear(d_time, 2 * d_model)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h, time):
        scale, shift = self.linear(time).chunk(2, -1)
        h = F.rms_norm(h, h.shape[-1:])
        return h + h * scale + shift  # 1 + scale would lose small scales in bfloat16


class Convolution(nn.Module):
    """Add to each channel a learned sum of it over the nearest positions of the segment: (B, L, D) -> (B, L, D).

    Depthwise, as in Primer [So et al. 2021], but to both sides. It is zero at first.
    """

    offsets = range(-4, 5)

    def __init__(self, d_model):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(self.offsets), d_model))

    def forward(self, h, segment_ids):
        L, reach = h.shape[1], max(map(abs, self.offsets))
        padded, padded_ids = F.pad(h, (0, 0, reach, reach)), F.pad(segment_ids, (reach, reach), value=-1)
        for offset, weight in zip(self.offsets, self.weight, strict=True):
            there = slice(reach + offset, reach + offset + L)
            same = padded_ids[:, there] == segment_ids
            h = h + same[..., None] * weight * padded[:, there]
        return h


class Attention(nn.Module):
    """Attention within segments, rotary positions, queries and keys of unit RMS: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, h, mask, rotations):
        qk, v = self.qkv(h).unflatten(-1, (3 * self.n_heads, -1)).transpose(1, 2).split((2 * self.n_heads, self.n_heads), 1)
        q, k = apply_rotary_emb(rotations, F.rms_norm(qk, qk.shape[-1:])).to(v.dtype).chunk(2, 1)  # each (B, H, L, D / H)
        if isinstance(mask, BlockMask):
            attended = flex_attention(q, k, v, block_mask=mask)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with a squared ReLU between them [So et al. 2021]: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model):
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, h):
        h = F.relu(self.up(h))
        return self.down(h * h)  # the derivative of square() is slow on CPUs


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each modulated by the time and added to the stream.

    The feed-forward layer reads what is near as well.
    """

    def __init__(self, d_model, n_heads, d_time, dropout):
        super().__init__()
        self.film_attention, self.film_forward = FiLM(d_model, d_time), FiLM(d_model, d_time)
        self.attention, self.convolution = Attention(d_model, n_heads), Convolution(d_model)
        self.forward_layer = FeedForward(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h, time, segment_ids, mask, rotations):
        h = h + self.dropout(self.attention(self.film_attention(h, time), mask, rotations))
        near = self.convolution(self.film_forward(h, time), segment_ids)
        return h + self.dropout(self.forward_layer(near))


class BFNTransformer(nn.Module):
    """The network: theta (B, L, K), t (B, L), segment_ids (B, L) -> logits (B, L, K)."""

    flex = False  # attend without an L x L mask, which wants compiled blocks
    recompute = False  # keep no activations within a block: compute them again for the gradient

    def __init__(self, config):
        super().__init__()
        D, d_time = config.d_model, config.d_time
        self.config = config
        self.embedding = nn.Embedding(config.K, D)
        self.project = nn.Linear(D, D)
        self.place = PlaceEmbedding(D)
        self.convolution = Convolution(D)
        self.time = TimeEmbedding(d_time)
        self.rotary = RotaryEmbedding(D // config.n_heads, cache_if_possible=False)
        self.blocks = nn.ModuleList(Block(D, config.n_heads, d_time, config.dropout) for _ in range(config.n_layers))
        self.film_out = FiLM(D, d_time)
        self.linear_out = nn.Linear(D, config.K)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def layer_matrices(self):
        """The weights of attention and feed-forward layers."""
        return [p for block in self.blocks for part in (block.attention, block.forward_layer) for p in part.parameters()]

    def attention_mask(self, segment_ids):
        """Which positions (column) a position (row) sees, those of its segment: (B, 1, L, L) bool, or a BlockMask."""
        if self.flex:
            B, L = segment_ids.shape

            def same_segment(b, h, q, k):
                return segment_ids[b, q] == segment_ids[b, k]

            create = compiled_block_mask if segment_ids.is_cuda else create_block_mask
            return create(same_segment, B, None, L, L, segment_ids.device)
        return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # padding sees padding: no empty row

    def embed(self, theta):
        """theta -> h: the average of the embeddings under theta, projected to the model's width."""
        return self.project(theta @ self.embedding.weight)

    def body(self, h, t, segment_ids):
        """h -> hidden: the layers, each position attending to its own segment."""
        mask = self.attention_mask(segment_ids)
        rotations = self.rotary(torch.arange(h.shape[1], device=h.device))
        time = self.time(t)
        h = h.float() + self.place(segment_ids)  # under autocast too, the stream is float32
        call = lambda part, *inputs: part(*inputs)
        if self.recompute and torch.is_grad_enabled():
            call = partial(checkpoint, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
        h = call(self.convolution, h, segment_ids)
        for block in self.blocks:
            h = call(block, h, time, segment_ids, mask, rotations)
        return self.film_out(h, time)

    def head(self, hidden, theta):
        """hidden -> logits, by Bayes' rule: what the context says of each token, times the evidence theta for it."""
        return self.linear_out(hidden) + theta.clamp(min=1e-37).log()

    def forward(self, theta, t, segment_ids):
        return self.head(self.body(self.embed(theta), t, segment_ids), theta)

    def fused_loss(self, ids, t, cond_mask, segment_ids, rows, keys, scale, entropy_weight):
        """The training loss of a batch without a (tokens, K) tensor, for the flow with the noise of `keys` (B, L, 2).

            sum over predicted positions of scale (squared_error_loss + entropy_weight cross_entropy)

        rows (n,) are the predicted positions, counted through the batch. scale (B, L) -> scalar, and the losses (B, L)
        without gradient, 0 where nothing is predicted.
        """
        ids, keys, t_rows, scale = ids.flatten(), keys.flatten(0, 1)[rows], t.flatten()[rows], scale.flatten()[rows]
        s = self.config.s1 * t_rows
        h = self.project(kernels.noisy_embedding(self.embedding.weight, ids, rows, keys, s)).view(*t.shape, -1)
        hidden = self.body(h, t.masked_fill(cond_mask, 1.0), segment_ids).flatten(0, 1)[rows]
        output = self.linear_out.weight, self.linear_out.bias
        squared_weight = self.config.s1 * s  # s1^2 t
        loss, losses = kernels.linear_errors(hidden, *output, ids[rows], keys, s, squared_weight, scale, entropy_weight)
        return loss, torch.zeros_like(t).flatten().index_copy(0, rows, losses).view_as(t)


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path, checkpoint):
    """Write a checkpoint whole or not at all: temporary file, fsync, rename. Raises OSError where it cannot."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}. Earlier checkpoints are intact: make room, run again") from error


def read_checkpoint(path):
    """Read a checkpoint -> dict of plain types and of tensors on the CPU.

    Raises ValueError for a missing or damaged file, or one of another format.
    """
    if not os.path.isfile(path):
        other = Path(path).with_name("last.pt")
        hint = (
            "nothing is validated yet, take --checkpoint=last"
            if other.is_file()
            else "train first, or give another run folder"
        )
        raise ValueError(f"no checkpoint at {path}: {hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch.load itself checks no sums
                raise zipfile.BadZipFile(part)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = int(checkpoint["format"])
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        best = Path(path).with_name("best.pt")
        hint = f"rename {best}, if that is whole, to last.pt" if best.is_file() and best != Path(path) else "use another"
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}): {hint}") from None
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, this code reads {FORMAT}: use the code that wrote it, or another run folder"
        )
    return checkpoint


def load(run_dir, which="best", device="cpu", ema=-1):
    """Load a trained model: `model, tokenizer, run = load("runs/demo")`.

    which is "best" by validation or "last"; ema is the index of a weight average, the last by default. `model.config` is
    the Config, and run the rest of the checkpoint: "args" of the training, "step", "lengths" and "word_lengths" of the text.
    Raises ValueError for a missing or damaged checkpoint or a tokenizer that is not the one of the training.
    """
    run = read_checkpoint(Path(run_dir) / f"{which}.pt")
    path = Path(run_dir) / "tokenizer.model"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != run["tokenizer_hash"]:
        raise ValueError(f"{path} is missing or not the tokenizer that {run_dir} was trained with: put that one back")
    model = BFNTransformer(Config(**run["config"]))
    if not -len(run["emas"]) <= ema < len(run["emas"]):
        raise ValueError(f"{run_dir} has {len(run['emas'])} weight averages, counted from 0: there is no {ema}")
    model.load_state_dict(run["emas"][ema])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return model.to(device).eval(), tokenizer, {k: v for k, v in run.items() if k not in ("model", "emas", "optimizers")}
