"""The network, and what it knows of a batch.

    theta        (B, L, K)  input distribution of each position
    t            (B, L)     time in [0, 1]
    segment_ids  (B, L)     number of the text in its row: 1, 2, ..., 0 = padding
    h, hidden    (B, L, D)  within the network
    logits       (B, L, K)  output
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint


def segment_starts(segment_ids):
    """Mark the first position of each segment, and of the padding: (B, L) -> (B, L) bool."""
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def segment_positions(segment_ids):
    """Count the tokens since the segment's start and until its end: (B, L) -> two (B, L) int64.

        segment_ids    1 1 1 2 2 0
        since start    0 1 2 0 1 0
        until end      2 1 0 1 0 0

    Padding counts as a segment. This does not wait for the device, nor does `segment_starts`.
    """
    L = segment_ids.shape[1]
    i = torch.arange(L, device=segment_ids.device)
    starts = segment_starts(segment_ids)
    ends = starts.roll(-1, 1)  # one before each start; that of the row moves round to its end
    start = torch.where(starts, i, 0).cummax(1).values
    end = torch.where(ends, i, L).flip(1).cummin(1).values.flip(1)
    return i - start, end - i


BATCH_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}  # of the largest tensor: 8 MB fit into a cache


def rows_at_once(length, config, device):
    """Choose how many rows of a length to read without gradient: what is fastest on the device."""
    largest = length * max(config.K, 4 * config.d_model, length)
    return max(1, BATCH_ELEMENTS[device.type] // largest)


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
            sizes = f"model_dim {self.d_model} and num_heads {self.n_heads} do not fit"
            raise ValueError(f"{sizes}: each head must have an even width of at least 4")

    @property
    def s1(self):
        """sqrt(K beta1): the square root of the evidence's accuracy at t = 1."""
        return math.sqrt(self.K * self.beta1)

    @property
    def d_time(self):
        """Width of the time embedding."""
        return max(self.d_model // 4, 16)


class Form(NamedTuple):
    """How the same numbers are computed. The plain form, all False, is what others must equal."""

    fused: bool = False  # embedding and loss without a (tokens, K) tensor, see training/fused.py
    bf16: bool = False  # autocast: matrices are multiplied in bfloat16
    compiled: bool = False  # the blocks are compiled, and the chunks of the fused form
    flex: bool = False  # flex attention, without an L x L mask; only fast in compiled blocks
    written: bool = False  # attention in bfloat16 is written out: 2 to 3 times as fast on CPUs
    recompute: bool = False  # keep no activations of a block: compute them again for the gradient

    def __str__(self):
        """Name the parts that are used: "bf16, compiled"."""
        return ", ".join(name for name, used in self._asdict().items() if used) or "the plain form"


class TimeEmbedding(nn.Module):
    """Sines and cosines of t in octaves, through one hidden layer: (B, L) -> (B, L, d_time)."""

    def __init__(self, d_time, n_octaves=8):
        super().__init__()
        frequencies = math.pi / 2 * 2.0 ** torch.arange(n_octaves, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)
        up, out = nn.Linear(2 * n_octaves, d_time), nn.Linear(d_time, d_time)
        self.mlp = nn.Sequential(up, nn.SiLU(), out, nn.SiLU())

    def forward(self, t):
        angle = t[..., None] * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class PositionEmbedding(nn.Module):
    """Sines and cosines of the distance to both ends of the segment: (B, L) -> (B, L, D).

    Rotary attention only sees differences of positions; the ends tell how long the text is.
    """

    def __init__(self, d_model, n_octaves=8):
        super().__init__()
        # Half-periods of 1 to 128 positions.
        frequencies = math.pi / 2.0 ** torch.arange(n_octaves, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear = nn.Linear(4 * n_octaves, d_model)

    def forward(self, segment_ids):
        distances = torch.stack(segment_positions(segment_ids), -1)
        angle = distances[..., None] * self.frequencies  # (B, L, 2, n_octaves)
        return self.linear(torch.cat([angle.sin(), angle.cos()], -1).flatten(2))


class FiLM(nn.Module):
    """Normalise h to RMS 1, then scale and shift it as the time says [Perez et al. 2017].

        h (1 + scale) + shift
    """

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
    """Add a depthwise convolution over the nearest positions of the segment: h -> (B, L, D).

    As in Primer [So et al. 2021], but looking both ways. Its weights start at zero.
    """

    offsets = range(-4, 5)

    def __init__(self, d_model):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(self.offsets), d_model))

    def forward(self, h, segment_ids):
        L = h.shape[1]
        reach = max(map(abs, self.offsets))
        padded = F.pad(h, (0, 0, reach, reach))
        padded_ids = F.pad(segment_ids, (reach, reach), value=-1)
        for offset, weight in zip(self.offsets, self.weight, strict=True):
            there = slice(reach + offset, reach + offset + L)
            same = padded_ids[:, there] == segment_ids
            h = h + same[..., None] * weight * padded[:, there]
        return h


# Not compiled, it builds the whole L x L mask.
compiled_block_mask = torch.compile(create_block_mask, dynamic=False)


def attend(q, k, v, mask, written=False):
    """softmax(q k^T / sqrt(width of a head)) v, where the mask allows it.

    q, k, v (B, H, L, D / H) -> (B, H, L, D / H). written: see `Form`.
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    if not (written and v.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Attention within segments: (B, L, D) -> (B, L, D). Positions are rotary, q and k of RMS 1."""

    written = False  # see `Form`

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, h, mask, rotations):
        qkv = self.qkv(h).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
        q, k = (apply_rotary_emb(rotations, x).to(v.dtype) for x in (q, k))
        return self.out(attend(q, k, v, mask, self.written).transpose(1, 2).flatten(2))


class MLP(nn.Module):
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
    """One pre-norm layer: attention, then an MLP, both modulated by the time.

    The MLP reads the output of a convolution, so it sees the neighbouring positions too.
    """

    def __init__(self, d_model, n_heads, d_time, dropout):
        super().__init__()
        self.film_attention = FiLM(d_model, d_time)
        self.film_mlp = FiLM(d_model, d_time)
        self.attention = Attention(d_model, n_heads)
        self.convolution = Convolution(d_model)
        self.mlp = MLP(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h, time, segment_ids, mask, rotations):
        h = h + self.dropout(self.attention(self.film_attention(h, time), mask, rotations))
        return h + self.dropout(self.mlp(self.convolution(self.film_mlp(h, time), segment_ids)))


class BFNTransformer(nn.Module):
    """The network: theta (B, L, K), t (B, L), segment_ids (B, L) -> logits (B, L, K)."""

    form = Form()  # training chooses another, see training/forms.py

    def __init__(self, config):
        super().__init__()
        D, d_time = config.d_model, config.d_time
        self.config = config
        self.embedding = nn.Embedding(config.K, D)
        self.project = nn.Linear(D, D)
        self.position = PositionEmbedding(D)
        self.convolution = Convolution(D)
        self.time = TimeEmbedding(d_time)
        self.rotary = RotaryEmbedding(D // config.n_heads, cache_if_possible=False)
        del self.rotary.cached_freqs, self.rotary.dummy  # unused; the rest is in checkpoints
        self.blocks = nn.ModuleList(
            Block(D, config.n_heads, d_time, config.dropout) for _ in range(config.n_layers)
        )
        self.film_out = FiLM(D, d_time)
        self.linear_out = nn.Linear(D, config.K)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def layer_matrices(self):
        """The weight matrices of the attention and MLP layers."""
        parts = [part for block in self.blocks for part in (block.attention, block.mlp)]
        return [p for part in parts for p in part.parameters() if p.ndim == 2]

    def use(self, form):
        """Compute in this form from now on. A compiled network stays compiled."""
        self.form = form
        for block in self.blocks:
            block.attention.written = form.written
        if form.compiled:  # one program for all blocks: much faster to compile than the whole model
            for part in (self.convolution, *self.blocks):
                part.compile()

    def attention_mask(self, segment_ids):
        """Let each position see its own segment -> (B, 1, L, L) bool, or a BlockMask (`flex`)."""
        if not self.form.flex:  # padding sees padding: no row is empty
            return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        B, L = segment_ids.shape

        def same_segment(b, h, q, k):
            return segment_ids[b, q] == segment_ids[b, k]

        create = compiled_block_mask if segment_ids.is_cuda else create_block_mask
        return create(same_segment, B, None, L, L, segment_ids.device)

    def embed(self, theta):
        """theta (B, L, K) -> h (B, L, D): the mean embedding under theta, projected."""
        return self.project(theta @ self.embedding.weight)

    def body(self, h, t, segment_ids):
        """h (B, L, D) -> hidden (B, L, D): the layers."""
        mask = self.attention_mask(segment_ids)
        rotations = self.rotary(torch.arange(h.shape[1], device=h.device))
        time = self.time(t)
        h = h.float() + self.position(segment_ids)  # stays float32 under autocast
        h = self._call(self.convolution, h, segment_ids)
        for block in self.blocks:
            h = self._call(block, h, time, segment_ids, mask, rotations)
        return self.film_out(h, time)

    def _call(self, part, *inputs):
        """Call a part of the network, keeping its activations or, in the form `recompute`, not."""
        if self.form.recompute and torch.is_grad_enabled():
            draws = self.config.dropout > 0
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=draws)
        return part(*inputs)

    def head(self, hidden, theta):
        """hidden (B, L, D) -> logits (B, L, K), by Bayes' rule: the context times the evidence."""
        return self.linear_out(hidden) + theta.clamp(min=1e-37).log()

    def forward(self, theta, t, segment_ids=None):
        """Compute the logits. Without segment_ids, each row is one segment.

        Raises ValueError in eval mode if they are 0 everywhere, except on a GPU: it would wait.
        """
        if segment_ids is None:
            segment_ids = torch.ones_like(t, dtype=torch.long)
        if not (self.training or segment_ids.is_cuda or segment_ids.any()):
            raise ValueError("segment_ids is 0 everywhere, padding: number segments from 1")
        return self.head(self.body(self.embed(theta), t, segment_ids), theta)
