"""The optimizer: Muon for the matrices of the layers, AdamW for the rest; schedule and averages.

Muon is momentum, orthogonalised [Jordan et al. 2024]. Rows that are short or long on average over
steps are made even [NorMuon, Li et al. 2025, arXiv 2510.05491]. torch.optim.Muon orthogonalises in
bfloat16, one matrix at a time, which is slow on CPUs without bfloat16 units. Here all matrices of a
shape are done at once, in float32 on CPUs and in bfloat16 on GPUs that have it.
"""

import torch
from torch.distributed.tensor import DTensor

from common import parallel
from training.shards import like, local, whole

# Coefficients of a x + b x^3 + c x^5. Applied one after the other, these polynomials map singular
# values in [0.003, 1] to [0.8, 1.2]: each one minimises the largest distance from 1 on the range
# that the one before leaves [after Amsel et al. 2025, arXiv 2505.16932]. Three polynomials for
# [0.01, 1] are cheaper but trained worse (experiments/RECORD.md).
QUINTICS = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)
# Polynomials grow fast beyond 1: a rounded norm must not be below the largest singular value.
MARGIN = 1.01
ROWS_RATE = 0.95  # of NorMuon's second moment, one for each row


def orthogonalise_directly(X):
    """Move all singular values of matrices (n, height, width >= height) close to 1."""
    X = X / (MARGIN * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in QUINTICS:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def orthogonalise_by_gram(X):
    """Do the same on the small matrix X X^T: half the work where X is wide.

    On a CPU it makes a whole training step 12 % faster. It needs full float32, not TF32.
    """
    X = X / (MARGIN * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    A, product = X @ X.mT, None
    for i, (a, b, c) in enumerate(QUINTICS):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        product = P if product is None else P @ product
        if i + 1 < len(QUINTICS):
            A = P @ A @ P
    return product @ X


def orthogonalise_in_bf16(X):
    """Do the same in bfloat16, each product with its sum in one call: for GPUs.

    The cosine to the float32 result is above 0.9996, and 0.999 if the singular values decay fast.
    """
    X = (X / (MARGIN * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for a, b, c in QUINTICS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.float()


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum with even rows, 0.2 sqrt(longer side) times: AdamW's size [Liu 2025].

    As in torch's fused optimizers, a device scalar `found_inf` of 1 leaves weights and moments
    unchanged. fast: orthogonalise in the fastest way for the device, see `orthogonalise`.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.found_inf, self.fast = None, True
        self._step_supports_amp_scaling = True  # torch's name for an optimizer that reads found_inf

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            directions = (self._move_momentum(params, group) for params in by_shape.values())
            updates = orthogonalise_in_shares(directions, self.fast)
            for params, update in zip(by_shape.values(), updates, strict=True):
                self._move_weights(params, update, group)

    def _keep(self):
        """1, or 0 where the step is left out."""
        return 1.0 if self.found_inf is None else 1 - self.found_inf

    def _move(self, name, params, new, rate):
        """Move the moments `name` of n parameters of one shape towards `new` -> all, (n, ...)."""
        for p, x in zip(params, new, strict=True):
            if name not in self.state[p]:
                self.state[p][name] = like(torch.zeros_like(x), p)
        kept = [self.state[p][name] for p in params]
        moments = torch.stack([whole(x) for x in kept])
        moments += self._keep() * (1 - rate) * (new - moments)
        torch._foreach_copy_([local(x) for x in kept], shards_of(moments, params))
        return moments

    def _move_momentum(self, params, group):
        """Move the momentum of n parameters of one shape -> what to orthogonalise, (n, *shape)."""
        gradient = torch.stack([whole(p.grad) for p in params]).nan_to_num(0, 0, 0)
        momentum = self._move("momentum", params, gradient, group["momentum"])
        return gradient.lerp(momentum, group["momentum"])  # Nesterov momentum

    def _even_rows(self, params, update):
        """Divide rows by the root of their average squared norm; each matrix keeps its norm."""
        update = update.contiguous()  # one layout: the same bits in any number of processes
        square = torch.linalg.vector_norm(update, dim=-1, keepdim=True).square()
        factor = (self._move("rows", params, square, ROWS_RATE) + 1e-10).rsqrt()
        new = square * factor.square()
        ratio = square.sum(1, keepdim=True) / new.sum(1, keepdim=True).clamp(min=1e-10)
        return update * (factor * ratio.sqrt())

    def _move_weights(self, params, update, group):
        """Let n parameters of one shape decay, and subtract their update (n, *shape)."""
        rate = self._keep() * group["lr"]
        update = self._even_rows(params, update)
        update = rate * 0.2 * max(update.shape[1:]) ** 0.5 * update
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(weights, shards_of(update, params))


def shards_of(stack, params):
    """Cut whole matrices (n, height, width) as n parameters are -> the shards that are here."""
    return [local(like(x, p)) for x, p in zip(stack, params, strict=True)]


def orthogonalise_in_shares(stacks, fast=True):
    """Orthogonalise stacks of matrices (n, height, width) -> iterator over the results.

    Each process does its share, and all get the same results.
    """
    if parallel.size() == 1:
        yield from (orthogonalise(X, fast) for X in stacks)
        return
    stacks = list(stacks)
    owners = share_by_cost([X.shape for X in stacks], parallel.size())
    for X, ranks in zip(stacks, owners, strict=True):
        if mine := [i for i, rank in enumerate(ranks) if rank == parallel.rank()]:
            X[mine] = orthogonalise(X[mine], fast)
    matrices = [matrix for X in stacks for matrix in X]
    parallel.exchange(matrices, [rank for ranks in owners for rank in ranks])
    yield from stacks


def share_by_cost(shapes, size):
    """Share matrices out over processes -> for each shape (n, height, width), the n ranks.

    The costliest matrices come first. Each one goes to the process with the least work.
    """
    costs = [height * width * min(height, width) for _, height, width in shapes]
    load = [0] * size
    owners = [[] for _ in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        for _ in range(shapes[i][0]):
            owners[i].append(load.index(min(load)))
            load[owners[i][-1]] += costs[i]
    return owners


def orthogonalise(X, fast=True):
    """Orthogonalise matrices (n, height, width). fast: in the fastest way for their device."""
    height, width = X.shape[1:]
    if height > width:
        return orthogonalise(X.mT, fast).mT
    if fast and X.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return orthogonalise_in_bf16(X)
    if fast and width >= 2 * height and not X.is_cuda:
        return orthogonalise_by_gram(X)
    return orthogonalise_directly(X)


def make_adamw(parameters, args):
    """Make AdamW, in the form that reads `found_inf`; weight decay is on matrices only."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=args.weight_decay),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)


def make_optimizers(model, args):
    """Make AdamW and Muon.

    Every optimizer here must skip its step where its `found_inf` is 1.
    """
    matrices = model.layer_matrices()
    in_muon = set(map(id, matrices))
    adamw = make_adamw([p for p in model.parameters() if id(p) not in in_muon], args)
    n = len(matrices)
    if isinstance(matrices[0], DTensor):  # those of one layer at a time are whole
        n //= len(model.blocks)
    layers = [dict(params=matrices[i : i + n]) for i in range(0, len(matrices), n)]
    return [adamw, Muon(layers, lr=args.learning_rate, weight_decay=args.weight_decay)]


def learning_rate(step, args):
    """The learning rate of a step: a linear warm-up, then straight to zero after the last step."""
    warmup = min(args.warmup_steps, args.max_steps // 5)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    return args.learning_rate * max(0.0, (args.max_steps - step) / (args.max_steps - warmup))


def average_weights(ema, model, rate, step):
    """Move the averaged weights towards the model's: ema <- rate ema + (1 - rate) model."""
    rate = min(rate, (1 + step) / (10 + step))  # early averages forget the initial weights sooner
    with torch.no_grad():
        pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
        plain = [pair for pair in pairs if not isinstance(pair[1], DTensor)]
        torch._foreach_lerp_(*zip(*plain, strict=True), 1 - rate)
        for average, p in pairs:
            if isinstance(p, DTensor):
                average.lerp_(whole(p), 1 - rate)  # one at a time is whole
