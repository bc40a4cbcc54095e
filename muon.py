"""Muon for the matrices of the transformer's layers: momentum, orthogonalised [Jordan et al. 2024].

torch.optim.Muon orthogonalises in bfloat16, one matrix after another: on a CPU without bfloat16 units a step of the
demonstration took 20 times as long. Here it is float32 (TF32 where allowed), all matrices of one shape at once.
"""

import torch

# Odd quintics a x + b x^3 + c x^5, each with the least largest distance from 1 on the range that the one before leaves of
# [0.003, 1]; four leave [0.8, 1.2] [after Amsel et al. 2025, arXiv 2505.16932]. Three on [0.01, 1] learn less.
QUINTICS = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)
MARGIN = 1.01  # beyond 1 the quintics grow fast: a norm must not be rounded below the largest singular value


def orthogonalise(X):
    """Push the singular values of matrices (n, rows <= columns) towards 1, all of one matrix at once."""
    X = X / (MARGIN * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in QUINTICS:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def orthogonalise_by_gram(X):
    """`orthogonalise` by the small square X X^T alone, half the work for wide matrices; it needs all of float32's digits."""
    X = X / (MARGIN * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    A, product = X @ X.mT, None
    for i, (a, b, c) in enumerate(QUINTICS):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        product = P if product is None else P @ product
        if i + 1 < len(QUINTICS):
            A = P @ A @ P
    return product @ X


class Muon(torch.optim.Optimizer):
    """Updates of the size that AdamW's have, 0.2 sqrt(longer side) times an orthogonal matrix [Liu et al. 2025].

    As in torch's fused optimizers, a device scalar `found_inf` of 1 leaves weights and momentum as they are.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                self._step_together(same, group)

    def _step_together(self, params, group):
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momentum = torch.stack([self.state[p]["momentum"] for p in params])
        gradient = torch.stack([p.grad for p in params]).nan_to_num(0, 0, 0)
        momentum += keep * (1 - group["momentum"]) * (gradient - momentum)
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov's look ahead
        tall = update.shape[-2] > update.shape[-1]
        far_from_square = max(update.shape[1:]) >= 2 * min(update.shape[1:])
        orthogonal = orthogonalise_by_gram if far_from_square and not update.is_cuda else orthogonalise
        update = orthogonal(update.mT).mT if tall else orthogonal(update)
        rate = keep * group["lr"]
        for p, m, u in zip(params, momentum, update, strict=True):
            self.state[p]["momentum"].copy_(m)
            p.mul_(1 - rate * group["weight_decay"]).sub_(rate * 0.2 * max(p.shape) ** 0.5 * u)
