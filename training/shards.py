"""The matrices of the layers in shards, one for each process [FSDP2]: --shard.

Of a sharded matrix, each process holds some of the rows: of its weights, gradient and momentum. The
whole of a layer is there while the layer computes. Averages are whole in each process, so that
validation, samples and checkpoints are those of a run without shards.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import parallel


def cut(model):
    """Cut the matrices of a network's layers into shards, in place, for several processes."""
    if parallel.size() == 1:
        return
    matrices = set(model.layer_matrices())
    mesh = init_device_mesh(next(model.parameters()).device.type, (parallel.size(),))
    for block in model.blocks:
        others = set(block.parameters()) - matrices
        # True: without it, each block would stay whole until its backward pass
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=others)
        block.set_gradient_divide_factor(1.0)  # add up: the loss has the tokens of all processes
        block.set_force_sum_reduction_for_comms(True)


def local(x):
    """The shard of a tensor that is here; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x):
    """Collect the shards of a tensor from all processes; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x, other):
    """Cut a whole tensor as `other` is cut."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)


def collect(value):
    """Collect all shards in nested dicts and lists -> the same, each whole in the first process.

    In the others, None takes the place of a tensor that was in shards.
    """
    if isinstance(value, dict):
        return {key: collect(part) for key, part in value.items()}
    if isinstance(value, list):
        return [collect(part) for part in value]
    if not isinstance(value, DTensor):
        return value
    value = whole(value)
    return value.cpu() if parallel.rank() == 0 else None


def not_cut(model):
    """List the parameters whose gradients no backward pass adds up over processes."""
    return [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]


def clip_gradients(model, most):
    """Scale gradients down to a norm of at most `most`, as torch's clip_grad_norm_ -> the norm."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    shards = [x.to_local() for x in gradients if isinstance(x, DTensor)]
    if not shards:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    others = [x for x in gradients if not isinstance(x, DTensor)]
    square = torch.nn.utils.get_total_norm(shards).square()
    parallel.add_up([square])
    norm = (square + torch.nn.utils.get_total_norm(others).square()).sqrt()
    torch._foreach_mul_(shards + others, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
