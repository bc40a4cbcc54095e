"""Embedding and loss for large vocabularies without a (tokens, K) tensor: a reader may skip this file.

It computes the same numbers as the plain form in train.py, chunk by chunk: a token's noise follows from its keys, so it is
computed wherever it is needed and forgotten. switches.py compares both forms when a run starts.

    ids         (B, L)          int64    tokens
    keys        (B, L, 2)       int32    what a token's noise is computed from
    predicted   (n,)            int64    the predicted positions, counted through the batch; all others see a one-hot
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
LEAST_TOKENS = 128  # chunks are multiples of this: smaller products spend their time reading the embeddings again
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
        """Cut the predicted tokens into chunks -> (index (n,), ids (size,), t (size,), keys (size, 2)) of each.

        The compiled form always sees the same `size`, so it is compiled once: the last chunk is padded.
        """
        n = len(self.predicted)
        size = max(1, CHUNK[self.ids.device.type] // K // LEAST_TOKENS) * LEAST_TOKENS
        size = min(size, 1 << max(0, n - 1).bit_length())  # powers of two: few different sizes
        for index in self.predicted.split(size):
            tokens = self.ids.flatten()[index], self.t.flatten()[index], self.keys.flatten(0, 1)[index]
            yield index, *(pad(x, size) if self.compiled else x for x in tokens)


def pad(x, size):
    """Append zeros along the first dimension up to `size`."""
    return x if len(x) == size else F.pad(x, (0, 0) * (x.ndim - 1) + (0, size - len(x)))


# ---------------------------------------------------------------- what is done to a chunk of n tokens


def evidence(ids, t, keys, s1, K):
    """Compute the flow z = s eps + s^2 e_x, s = s1 t, of n tokens -> its `halves` (n, K - K // 2), (n, K // 2).

    Kept in halves, as the noise comes: if they were joined here, the compiler would write the noise to memory.
    """
    s, k = s1 * t[:, None], torch.arange(K, dtype=torch.int32, device=ids.device)
    is_x = [part == ids.int()[:, None] for part in halves(k)]
    return [s * eps + torch.where(x, s * s, 0.0) for eps, x in zip(noise_halves(keys, K), is_x, strict=True)]


def theta_times_sum(ids, t, keys, s1, K, dtype):
    """Compute exp(z - s^2), which is theta times its sum -> halves of theta in dtype, sums (n,) float32."""
    first, second = (torch.exp(z - (s1 * t).square()[:, None]) for z in evidence(ids, t, keys, s1, K))
    return first.to(dtype), second.to(dtype), first.sum(-1) + second.sum(-1)


def loss_and_gradient(linear, bias, ids, t, keys, scale, s1):
    """Compute bfn.training_loss for logits = linear + bias + z, and the gradient of its sum weighted by scale (n,).

    linear (n, K) -> losses (n,) float32, gradient with respect to linear (n, K).
    """
    z = evidence(ids, t, keys, s1, linear.shape[-1])
    logits = torch.cat([x.float() + b + half for x, b, half in zip(halves(linear, -1), halves(bias), z, strict=True)], -1)

    def weighted_sum(logits):
        losses = bfn.training_loss(logits.log_softmax(-1), ids, t, s1)
        return (scale * losses).sum(), losses

    gradient, losses = torch.func.grad(weighted_sum, has_aux=True)(logits)  # also that with respect to linear
    return losses, gradient.to(linear.dtype)


compiled_theta_times_sum = torch.compile(theta_times_sum, dynamic=False)
compiled_loss_and_gradient = torch.compile(loss_and_gradient, dynamic=False)


# ---------------------------------------------------------------- the two operations


class ThetaToH(torch.autograd.Function):
    """theta @ E (B, L, D) from E (K, D) and a Noisy batch; positions that are not predicted have a one-hot theta."""

    @staticmethod
    def forward(ctx, E, noisy):
        h = F.embedding(noisy.ids, E).to(matmul_dtype(E))
        flat_h, parts, sums = h.flatten(0, 1), halves(E.to(h.dtype)), []
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
        noisy, (K, _) = ctx.noisy, ctx.shape
        flat_dh, dE = dh.flatten(0, 1), dh.new_zeros(ctx.shape, dtype=torch.float32)
        call = compiled_theta_times_sum if noisy.compiled else theta_times_sum
        for (index, *tokens), total in zip(noisy.chunks(K), ctx.sums, strict=True):
            first, second, _ = call(*tokens, noisy.s1, K, dh.dtype)
            d = (flat_dh[index] / total).to(dh.dtype)
            for weight, part in zip((first, second), halves(dE), strict=True):
                add_product(part, weight[: len(index)].T, d)
        dE.index_add_(0, noisy.ids.flatten(), flat_dh.float().index_fill(0, noisy.predicted, 0.0))
        return dE, None


class HiddenToLoss(torch.autograd.Function):
    """bfn.training_loss of log_softmax(hidden W^T + bias + z), summed with weights scale (B, L).

    -> the weighted sum, and the losses (B, L) without gradient, 0 where nothing is predicted. The gradients are computed
    along with the loss, so that the logits of a chunk are forgotten at once.
    """

    @staticmethod
    def forward(ctx, hidden, W, bias, scale, noisy):
        x, scale = hidden.flatten(0, 1).to(matmul_dtype(hidden)), scale.flatten()
        cast, losses = W.to(x.dtype), torch.zeros_like(scale)
        dx, dW, d_bias = torch.zeros_like(x), torch.zeros_like(W), torch.zeros_like(bias)
        call = compiled_loss_and_gradient if noisy.compiled else loss_and_gradient
        with torch.autocast(W.device.type, enabled=False):
            for index, *tokens in noisy.chunks(len(W)):
                size, n = len(tokens[0]), len(index)
                each, d = call(pad(x[index] @ cast.T, size), bias, *tokens, pad(scale[index], size), noisy.s1)
                losses[index], d = each[:n], d[:n]
                dx[index] = d @ cast
                add_product(dW, d.T, x[index])
                d_bias += d.sum(0, dtype=d_bias.dtype)
        ctx.save_for_backward(dx.view_as(hidden), dW, d_bias)
        weighted_sum, losses = (losses * scale).sum(), losses.view(hidden.shape[:2])
        ctx.mark_non_differentiable(losses)
        return weighted_sum, losses

    @staticmethod
    def backward(ctx, d_sum, _):
        return *(gradient * d_sum for gradient in ctx.saved_tensors), None, None


def matmul_dtype(x):
    """The dtype that autocast multiplies matrices in on x's device, or x's own without autocast."""
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
