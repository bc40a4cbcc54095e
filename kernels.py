"""Fused operations for large vocabularies: nothing of size (tokens, K) outlives a chunk of tokens.

Written plainly, a step passes some thirty times over (tokens, K) numbers and keeps ten of them for its gradient. Here a
token's noise is a function of two integers, computed wherever it is needed and forgotten.

    ids         (N,)            int64    tokens, rows and positions flattened
    keys        (N, 2)          int32    what a token's noise is computed from
    s           (N,)            float32  s1 t
    h, hidden   (N, D)                   input to the projection; output of the body
    E, W, bias  (K, D), (K, D), (K,)     embeddings; weights and bias of the output

Under autocast the matrices are multiplied in its dtype, and what they are made of is rounded to it; noise, softmax and
sums are float32.
"""

import torch
import torch.nn.functional as F

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements (tokens, K) of a chunk
LEAST_TOKENS = 128  # a full chunk has a multiple of these: smaller products spend their time rereading the embeddings
LARGEST_S = 13.0  # exp(z - s^2) overflows beyond
# cos(pi x) and sin(pi x) / x by powers of x^2, the highest first, for |x| <= 1, to 2e-6: a third of the operations that
# the functions themselves take on a GPU
COSINE = -0.02057725, 0.2296504, -1.332369, 4.058041, -4.934745, 0.9999992
SINE = -0.006089475, 0.08074782, -0.5985506, 2.549998, -5.167699, 3.141593
compiled = {}  # the functions of a chunk in their compiled form; empty, they run as they are written

# ---------------------------------------------------------------- noise


def draw_keys(*shape, device="cpu", generator=None):
    """Draw keys from a generator, torch's default one if None -> (*shape, 2) int32."""
    return torch.randint(-(2**31), 2**31 - 1, (*shape, 2), dtype=torch.int32, device=device, generator=generator)


def nth_keys(keys, n):
    """The n-th keys of a sequence that begins with `keys` -> as `keys`."""
    return keys ^ _mix(_mix(torch.arange(2 * n, 2 * n + 2, dtype=torch.int32, device=keys.device)))


def _mix(x):
    """Scramble the bits of int32 numbers [the 32-bit finaliser "lowbias32", Wellons 2018]."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D  # int32 products wrap; the masks make the shifts unsigned
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _polynomial(x, coefficients):
    """Horner's rule."""
    total = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total.mul_(x).add_(c)
    return total


def _halves(x, dim=0):
    """Cut a dimension of length K where the noise's pairs do, into K - K // 2 and K // 2."""
    K = x.shape[dim]
    return x.split((K - K // 2, K // 2), dim)


def _noise_halves(keys, K):
    """Standard normal numbers as a function of the keys alone, by Box and Muller's rule: (..., 2) -> the two `_halves`."""
    i = torch.arange(K - K // 2, dtype=torch.int32, device=keys.device)
    u = (_mix(i + keys[..., :1]).float().abs() * 2.0**-31).clamp(min=2.0**-32)  # exact where it is small
    half_turns = _mix(i ^ keys[..., 1:]).float() * 2.0**-31
    square, radius = half_turns.square(), (-2 * u.log()).sqrt()
    return radius * _polynomial(square, COSINE), (radius * (half_turns * _polynomial(square, SINE)))[..., : K // 2]


def noise(keys, K):
    """Standard normal numbers as a function of the keys alone: (..., 2) -> (..., K) float32.

    The same for every device and chunk but for rounding. |eps| < 6.7.
    """
    return torch.cat(_noise_halves(keys, K), -1)


def uniform(keys):
    """Uniform numbers in [0, 1) of 52 bits as a function of the keys: (..., 2) -> (...) float64."""
    high, low = _mix(_mix(keys) ^ keys.flip(-1)).double().unbind(-1)
    return (high + 2**31) * 2.0**-32 + ((low + 2**31) / 2**12).floor() * 2.0**-52


# ---------------------------------------------------------------- what is done to a chunk


def _evidence(keys, ids, s, K):
    """z = s eps + s^2 e_x, in halves: put together here, a compiler would write the noise to memory.

    keys (n, 2), ids (n,), s (n,) -> (n, K - K // 2), (n, K // 2).
    """
    s, k = s[:, None], torch.arange(K, dtype=torch.int32, device=ids.device)
    is_x = [part == ids.int()[:, None] for part in _halves(k)]
    return [s * eps + torch.where(x, s * s, 0.0) for eps, x in zip(_noise_halves(keys, K), is_x, strict=True)]


def _weights(keys, ids, s, K, dtype):
    """exp(z - s^2), theta but for its sum, s < 13 -> halves (n, K - K // 2) and (n, K // 2) of dtype, sums (n,) float32."""
    first, second = (torch.exp(z - (s * s)[:, None]) for z in _evidence(keys, ids, s, K))
    return first.to(dtype), second.to(dtype), first.sum(-1) + second.sum(-1)


def _errors(linear, keys, ids, s, squared_weight, scale, bias, entropy_weight):
    """Losses of logits = linear + bias + z, and scale times their gradient by the logits.

    loss = a |e_x - p|^2 - c log p_x
    d loss / d logits_j = 2 a p_j (p_j - e_j - (sum_k p_k^2 - p_x)) + c (p_j - e_j)

    -> losses (n,) float32, gradient (n, K) in linear's dtype.
    """
    K, a, c = linear.shape[-1], squared_weight[:, None], entropy_weight
    parts = zip(_halves(linear, -1), _halves(bias), _evidence(keys, ids, s, K), strict=True)
    logits = torch.cat([x.float() + b + z for x, b, z in parts], -1)
    logits = logits - logits.amax(-1, keepdim=True)
    e_x = (torch.arange(K, dtype=torch.int32, device=ids.device) == ids.int()[:, None]).float()
    p = logits.exp()
    total = p.sum(-1, keepdim=True)
    p = p / total
    p_x, squares, log_p_x = (x.sum(-1, keepdim=True) for x in (p * e_x, p * p, logits * e_x))
    losses = a * (1 - 2 * p_x + squares) - c * (log_p_x - total.log())
    gradient = 2 * a * p * (p - e_x - (squares - p_x)) + c * (p - e_x)
    return losses.squeeze(-1), (scale[:, None] * gradient).to(linear.dtype)


def compile_chunks():
    """Compile what is done to a chunk: half the time on a CPU, a fraction of the memory traffic on a GPU."""
    for function in (_weights, _errors):
        compiled[function] = torch.compile(function, dynamic=False)


def _chunks(n, K, device):
    """Cut n tokens into chunks -> slices, the size of all but the last."""
    size = max(1, CHUNK[device.type] // K // LEAST_TOKENS) * LEAST_TOKENS
    size = min(size, 1 << max(0, n - 1).bit_length())  # there are few powers of two, so few programs
    return [slice(i, min(i + size, n)) for i in range(0, n, size)], size


def _call(function, size, tokens, *rest):
    """Call a chunk's function; the compiled one always sees `size` tokens, so that there is one program."""
    if function not in compiled:
        return function(*tokens, *rest)
    n = len(tokens[0])
    if n < size:
        tokens = [F.pad(x, (0, 0) * (x.ndim - 1) + (0, size - n)) for x in tokens]
    return tuple(x[:n] for x in compiled[function](*tokens, *rest))


def _matmul_dtype(x):
    """The dtype that autocast multiplies matrices of x's device in, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _add_product(total, a, b):
    """total += a b, multiplied in the dtype of a and b and added in total's own."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, total.dtype, out=total)  # what CPUs do not have
    else:
        total += a @ b


# ---------------------------------------------------------------- the two operations


class _NoisyEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, E, ids, rows, keys, s):
        h = F.embedding(ids, E).to(_matmul_dtype(E))
        cast, sums = _halves(E.to(h.dtype)), E.new_empty(len(rows))
        chunks, size = _chunks(len(rows), len(E), E.device)
        with torch.autocast(E.device.type, enabled=False):
            for n in chunks:
                first, second, sums[n] = _call(_weights, size, (keys[n], ids[rows[n]], s[n]), len(E), h.dtype)
                average = E.new_zeros(len(first), E.shape[1])
                for w, e in zip((first, second), cast, strict=True):
                    _add_product(average, w, e)
                h[rows[n]] = (average / sums[n, None]).to(h.dtype)
        ctx.save_for_backward(ids, rows, keys, s, sums)
        ctx.shape = E.shape
        return h

    @staticmethod
    def backward(ctx, dh):
        ids, rows, keys, s, sums = ctx.saved_tensors
        dE = dh.new_zeros(ctx.shape, dtype=torch.float32)
        chunks, size = _chunks(len(rows), len(dE), dE.device)
        for n in chunks:
            first, second, _ = _call(_weights, size, (keys[n], ids[rows[n]], s[n]), len(dE), dh.dtype)
            d = (dh[rows[n]] / sums[n, None]).to(dh.dtype)
            for w, part in zip((first, second), _halves(dE), strict=True):
                _add_product(part, w.T, d)
        dE.index_add_(0, ids, dh.float().index_fill(0, rows, 0.0))
        return dE, None, None, None, None


def noisy_embedding(E, ids, rows, keys, s):
    """theta @ E: for the tokens `rows` of theta = softmax(s eps + s^2 e_x), for all others of the one-hot -> (N, D).

    rows (n,) int64; keys (n, 2) and s (n,) are those rows' own. Differentiable by E.
    """
    return _NoisyEmbedding.apply(E, ids, rows, keys, s)


class _LinearErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, W, bias, ids, keys, s, squared_weight, scale, entropy_weight):
        hidden = hidden.to(_matmul_dtype(hidden))
        cast, losses = W.to(hidden.dtype), W.new_empty(len(ids))
        d_hidden, dW, d_bias = torch.empty_like(hidden), torch.zeros_like(W), torch.zeros_like(bias)
        chunks, size = _chunks(len(ids), len(W), W.device)
        with torch.autocast(W.device.type, enabled=False):
            for n in chunks:
                tokens = (hidden[n] @ cast.T, *(x[n] for x in (keys, ids, s, squared_weight, scale)))
                losses[n], d = _call(_errors, size, tokens, bias, entropy_weight)
                d_hidden[n] = d @ cast
                _add_product(dW, d.T, hidden[n])
                d_bias += d.sum(0, dtype=d_bias.dtype)
        ctx.save_for_backward(d_hidden, dW, d_bias)
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx, d_sum, _):
        return *(gradient * d_sum for gradient in ctx.saved_tensors), *[None] * 6


def linear_errors(hidden, W, bias, ids, keys, s, squared_weight, scale, entropy_weight):
    """Loss of p = softmax(hidden W^T + bias + z), weighted and summed -> scalar, and losses (N,) without gradient.

        sum_n scale_n loss_n,    loss = squared_weight |e_x - p|^2 - entropy_weight log p_x

    z = s eps + s^2 e_x is the evidence. squared_weight and scale are (N,), entropy_weight a number. Gradients by hidden,
    W and bias are computed along with the loss, chunk by chunk.
    """
    return _LinearErrors.apply(hidden, W, bias, ids, keys, s, squared_weight, scale, entropy_weight)
