"""Embedding and loss for large vocabularies without a (tokens, K) tensor.

It computes the same numbers as the plain form in train.py, chunk by chunk: a token's noise follows
from its keys, so it is computed wherever it is needed and forgotten. forms.py compares both forms
when a run starts.

    ids         (B, L)          int64    tokens
    keys        (B, L, 2)       int32    what a token's noise is computed from
    predicted   (n,)            int64    indices of the predicted positions; others see a one-hot
    h, hidden   (B, L, D)                input to the projection; output of the body
    E, W, bias  (K, D), (K, D), (K,)     embeddings; weights and bias of the output

Under autocast, matrices are multiplied in its dtype; noise, softmax and sums stay float32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import bfn
from common.noise import halves, noise_halves

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements of a chunk's (tokens, K) tensor
LEAST_TOKENS = 128  # chunks are multiples: smaller ones are slow, as each reads the embeddings
ALIGNED = {"cpu": 1, "cuda": 16}  # K is padded to a multiple: halves of rows begin at 16 bytes
LARGEST_S1 = 13.0  # exp(z - s^2) overflows beyond


@dataclass
class Noisy:
    """The noisy tokens of a batch, shared by both operations."""

    ids: torch.Tensor
    t: torch.Tensor  # (B, L)
    keys: torch.Tensor
    predicted: torch.Tensor
    s1: float
    compiled: bool = False  # call the compiled form of what is done to a chunk

    def chunks(self, K):
        """Cut the predicted tokens into chunks -> index (n,), and ids, t, keys of `size` tokens.

        The last chunk is padded for the compiled form, which is so compiled once.
        """
        size = max(1, CHUNK[self.ids.device.type] // K // LEAST_TOKENS) * LEAST_TOKENS
        size = min(size, 1 << (self.ids.numel() - 1).bit_length())  # the same for all batches
        flat = self.ids.flatten(), self.t.flatten(), self.keys.flatten(0, 1)
        for index in self.predicted.split(size):
            yield index, *(pad(x[index], size) if self.compiled else x[index] for x in flat)


def pad(x, size):
    """Append zeros along the first dimension up to `size`."""
    return x if len(x) == size else F.pad(x, (0, 0) * (x.ndim - 1) + (0, size - len(x)))


def aligned(K, device):
    """Round K up to a multiple for which matrix products on the device are fast."""
    return -(-K // ALIGNED[device.type]) * ALIGNED[device.type]


def aligned_halves(x):
    """Split x (K, D) into the halves of `evidence` -> x with zeros appended, its two halves.

    On a GPU, these overlap if K is not aligned: weights for the additional rows must be 0.
    """
    begin, n = len(x) - len(x) // 2, aligned(len(x), x.device)
    x = pad(x, begin + n // 2)
    return x, (x[: n - n // 2], x[begin:])


# ---------------------------------------------------------------- a chunk of n tokens


def evidence(ids, t, keys, s1, K):
    """Compute the flow z = s eps + s^2 e_x, s = s1 t, of n tokens -> its two `halves` (n, ~K / 2).

    As the noise comes in halves: if they were joined, or of two sizes, the compiler would write it
    to memory. On a GPU, each half has -inf appended until K is `aligned`.
    """
    s = s1 * t[:, None]
    begin, size = K - K // 2, aligned(K, ids.device)
    z = []
    for eps, first, end in zip(noise_halves(keys, size), (0, begin), (begin, K), strict=True):
        k = torch.arange(first, first + eps.shape[1], dtype=torch.int32, device=ids.device)
        half = s * eps + torch.where(k == ids.int()[:, None], s * s, 0.0)
        z.append(half if size == K else half.masked_fill(k >= end, -torch.inf))
    return z


def theta_times_sum(ids, t, keys, s1, K, dtype):
    """Compute exp(z - s^2), theta times its sum -> two halves in dtype, sums (n,) float32."""
    z = evidence(ids, t, keys, s1, K)
    first, second = (torch.exp(half - (s1 * t).square()[:, None]) for half in z)
    return first.to(dtype), second.to(dtype), first.sum(-1) + second.sum(-1)


def loss_and_gradient(linear, bias, ids, t, keys, scale, s1):
    """Compute bfn.training_loss for logits = linear + bias + z, summed with weights scale (n,).

    linear (n, K), or with padding -> the sum, its gradient with respect to linear (same shape).
    """
    K = len(bias)
    z = evidence(ids, t, keys, s1, K)
    parts = zip(halves(linear[:, :K], -1), halves(bias), z, strict=True)
    logits = torch.cat([x.float() + b + half[:, : len(b)] for x, b, half in parts], -1)

    def weighted_sum(logits):
        return (scale * bfn.training_loss(logits.log_softmax(-1), ids, t, s1)).sum()

    # The gradient with respect to logits is also that with respect to linear.
    gradient, loss = torch.func.grad_and_value(weighted_sum)(logits)
    gradient = gradient.to(linear.dtype)
    n = linear.shape[1] - K
    return loss, F.pad(gradient, (0, n)) if n else gradient


compiled_theta_times_sum = torch.compile(theta_times_sum, dynamic=False)
compiled_loss_and_gradient = torch.compile(loss_and_gradient, dynamic=False)


# ---------------------------------------------------------------- the two operations


class ThetaToH(torch.autograd.Function):
    """theta @ E (B, L, D) of a Noisy batch; theta is one-hot where nothing is predicted."""

    @staticmethod
    def forward(ctx, E, noisy):
        h = F.embedding(noisy.ids, E).to(matmul_dtype(E))
        flat_h = h.flatten(0, 1)
        _, parts = aligned_halves(E.to(h.dtype))
        sums = []
        call = compiled_theta_times_sum if noisy.compiled else theta_times_sum
        with torch.autocast(E.device.type, enabled=False):
            for index, *tokens in noisy.chunks(len(E)):
                *weights, total = call(*tokens, noisy.s1, len(E), h.dtype)
                average = E.new_zeros(len(index), E.shape[1])
                for weight, part in zip(weights, parts, strict=True):
                    add_product(average, weight[: len(index)], part)
                sums.append(total[: len(index), None])
                flat_h[index] = (average / sums[-1]).to(h.dtype)
        ctx.noisy, ctx.sums, ctx.shape = noisy, sums, E.shape
        return h

    @staticmethod
    def backward(ctx, dh):
        noisy = ctx.noisy
        K = ctx.shape[0]
        flat_dh = dh.flatten(0, 1)
        dE, parts = aligned_halves(dh.new_zeros(ctx.shape, dtype=torch.float32))
        call = compiled_theta_times_sum if noisy.compiled else theta_times_sum
        for (index, *tokens), total in zip(noisy.chunks(K), ctx.sums, strict=True):
            first, second, _ = call(*tokens, noisy.s1, K, dh.dtype)
            d = (flat_dh[index] / total).to(dh.dtype)
            for weight, part in zip((first, second), parts, strict=True):
                add_product(part, weight[: len(index)].T, d)
        dE = dE[:K]
        dE.index_add_(0, noisy.ids.flatten(), flat_dh.float().index_fill(0, noisy.predicted, 0.0))
        return dE, None


class HiddenToLoss(torch.autograd.Function):
    """bfn.training_loss of log_softmax(hidden W^T + bias + z), summed with weights scale (B, L).

    The gradients are computed along with the loss, so that the logits of a chunk are forgotten at
    once. What is not predicted adds nothing.
    """

    @staticmethod
    def forward(ctx, hidden, W, bias, scale, noisy):
        x = hidden.flatten(0, 1).to(matmul_dtype(hidden))
        scale = scale.flatten()
        cast = pad(W.to(x.dtype), aligned(len(W), W.device))
        loss = torch.zeros((), device=W.device)
        dx, dW, d_bias = torch.zeros_like(x), W.new_zeros(cast.shape), torch.zeros_like(bias)
        call = compiled_loss_and_gradient if noisy.compiled else loss_and_gradient
        with torch.autocast(W.device.type, enabled=False):
            for index, *tokens in noisy.chunks(len(W)):
                size, n = len(tokens[0]), len(index)
                linear = pad(x[index] @ cast.T, size)
                of_chunk, d = call(linear, bias, *tokens, pad(scale[index], size), noisy.s1)
                loss += of_chunk
                d = d[:n]
                dx[index] = d @ cast
                add_product(dW, d.T, x[index])
                d_bias += d[:, : len(W)].sum(0, dtype=d_bias.dtype)
        ctx.save_for_backward(dx.view_as(hidden), dW[: len(W)], d_bias)
        return loss

    @staticmethod
    def backward(ctx, d_sum):
        return *(gradient * d_sum for gradient in ctx.saved_tensors), None, None


def matmul_dtype(x):
    """The dtype in which matrices are multiplied: autocast's on x's device, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def add_product(total, a, b):
    """total += a b, multiplied in the dtype of a and b and added in total's own."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, total.dtype, out=total)  # this form is missing on CPUs
    else:
        total += a @ b
