"""Random numbers that follow from keys: the same again in any order and on any device.

    keys  (..., 2)  int32    two random integers per token: all of its random numbers follow
    eps   (..., K)  float32  standard normal
    u     (...)     float64  uniform in [0, 1)
"""

import hashlib
from operator import index

import torch

# Polynomials in x^2, the highest power first: cos(pi x) and sin(pi x) / x for |x| <= 1, to 2e-6.
# They take a third of the instructions of the functions themselves on a GPU.
COSINE = -0.02057725, 0.2296504, -1.332369, 4.058041, -4.934745, 0.9999992
SINE = -0.006089475, 0.08074782, -0.5985506, 2.549998, -5.167699, 3.141593

# The fractions of 1, 2, 3, ... times this number are spread evenly over (0, 1).
GOLDEN = (5**0.5 - 1) / 2


def whole(x):
    """Turn a whole number of any type into an int. Raises ValueError for anything else."""
    try:
        return int(index(x))
    except TypeError:
        raise ValueError(f"{x!r} is not a whole number") from None


def mix_seed(*parts):
    """Hash several numbers or strings, such as (seed, step, micro-batch) -> int in [0, 2^63).

    5, numpy's 5 and a tensor of 5 are the same number. Raises ValueError for 5.0.
    """
    parts = tuple(x if isinstance(x, str) else whole(x) for x in parts)
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def draw_keys(*shape, device="cpu", generator=None):
    """Draw keys from a generator (torch's default one if None) -> (*shape, 2) int32."""
    options = dict(dtype=torch.int32, device=device, generator=generator)
    return torch.randint(-(2**31), 2**31 - 1, (*shape, 2), **options)


def nth_keys(keys, n):
    """Return the n-th keys of the sequence that starts with `keys` (..., 2) -> (..., 2)."""
    counts = torch.arange(2 * n, 2 * n + 2, dtype=torch.int32, device=keys.device)
    return keys ^ _hash(_hash(counts))


def _hash(x):
    """Scramble the bits of int32 numbers [the 32-bit finaliser "lowbias32", Wellons 2018]."""
    # Products of int32 wrap; the masks make the shifts unsigned.
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _polynomial(x, coefficients):
    """Evaluate a polynomial by Horner's rule, the highest coefficient first."""
    total = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total.mul_(x).add_(c)
    return total


def halves(x, dim=0):
    """Split a dimension of length K into K - K // 2 and K // 2 elements, as `noise_halves` does."""
    K = x.shape[dim]
    return x.split((K - K // 2, K // 2), dim)


def noise_halves(keys, K):
    """Compute the two `halves` of `noise`: keys (..., 2) -> (..., K - K // 2), (..., K // 2).

    Box and Muller's rule gives numbers in pairs: radius cos(angle) goes to the first half, radius
    sin(angle) to the second.
    """
    i = torch.arange(K - K // 2, dtype=torch.int32, device=keys.device)
    # exact where it is small
    u = (_hash(i + keys[..., :1]).float().abs() * 2.0**-31).clamp(min=2.0**-32)
    half_turns = _hash(i ^ keys[..., 1:]).float() * 2.0**-31
    square, radius = half_turns.square(), (-2 * u.log()).sqrt()
    cosine = _polynomial(square, COSINE)
    sine = half_turns * _polynomial(square, SINE)
    return radius * cosine, (radius * sine)[..., : K // 2]


def noise(keys, K):
    """Compute K standard normal numbers per pair of keys: (..., 2) -> (..., K), |eps| < 6.7."""
    return torch.cat(noise_halves(keys, K), -1)


def uniform(keys):
    """Compute a uniform number in [0, 1) of 52 random bits per pair of keys: (..., 2) -> (...)."""
    high, low = _hash(_hash(keys) ^ keys.flip(-1)).double().unbind(-1)
    return (high + 2**31) * 2.0**-32 + ((low + 2**31) / 2**12).floor() * 2.0**-52


def sample_categorical(p, u):
    """Draw tokens by inverting the distribution function: p (..., K), u (...) -> (...)."""
    cdf = p.double().cumsum(-1)
    u = (u.double() * cdf[..., -1])[..., None]  # p sums to 1 only up to rounding
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)


class Draws:
    """A stream of random numbers for each position of a batch: keys (B, L, 2).

    A row's numbers follow from its own keys and from which draw it is, so neighbours and padding do
    not change them.
    """

    def __init__(self, keys):
        self.keys = keys
        self.n_drawn = 0

    @classmethod
    def seeded(cls, seeds, lengths, device="cpu"):
        """Make keys for rows of different lengths, each from its own seed."""
        keys = torch.zeros(len(seeds), max(lengths), 2, dtype=torch.int32)
        for row, seed, n in zip(keys, seeds, lengths, strict=True):
            row[:n] = draw_keys(n, generator=torch.Generator().manual_seed(seed))
        return cls(keys.to(device))

    def at(self, phase, call):
        """Return the stream of one network call: phase and call are numbers >= 0, call < 2^20."""
        return Draws(nth_keys(self.keys, ((phase + 1) << 20) + call))

    def _next_keys(self):
        self.n_drawn += 1
        return nth_keys(self.keys, self.n_drawn)

    def normal(self, K, index=...):
        """Draw standard normal numbers -> (B, L, K), or (n, K) for only the n positions `index`."""
        return noise(self._next_keys()[index], K)

    def tokens(self, p, index=...):
        """Draw a token from p (B, L, K) -> (B, L), or (n,) for only the n positions `index`."""
        return sample_categorical(p[index], uniform(self._next_keys())[index])
