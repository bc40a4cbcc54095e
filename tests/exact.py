"""The exact network of a small joint distribution: what perfect training would give."""

import torch


def random_joint(K=4, L=3, seed=0, spread=2.0):
    """A random distribution, more peaked for a larger `spread` -> sequences, probabilities.

    (K^L, L), (K^L,)
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.cartesian_prod(*[torch.arange(K)] * L)
    return sequences, (spread * torch.randn(K**L, generator=generator)).softmax(0)


def entropy(probabilities):
    return -(probabilities * probabilities.log()).sum().item()


class ExactNetwork:
    """p_d(k) proportional to the sum over sequences x with x_d = k of P(x) prod_j theta_j(x_j)."""

    def __init__(self, sequences, probabilities):
        K = int(sequences.max()) + 1
        self.sequences, self.log_P = sequences, probabilities.log()
        self.one_hot = torch.nn.functional.one_hot(sequences, K).float()  # (K^L, L, K)

    def __call__(self, theta, t):
        log_theta = theta.clamp(min=1e-37).log()  # (B, L, K)
        joint = self.log_P + torch.einsum("blk,nlk->bn", log_theta, self.one_hot)
        return torch.einsum("bn,nlk->blk", joint.softmax(-1), self.one_hot).log()


def draw(sequences, probabilities, n, seed=0):
    """n independent sequences (n, L)."""
    generator = torch.Generator().manual_seed(seed)
    return sequences[torch.multinomial(probabilities, n, replacement=True, generator=generator)]
