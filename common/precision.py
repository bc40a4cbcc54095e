"""In which precision sampling and evaluation call a trained network."""

from functools import partial

import torch


def reads_in_bf16(device):
    """Whether a network is called in bfloat16 on a device: only on GPUs with instructions for it.

    Its figures are those of float32 within their errors (experiments/RECORD.md).
    """
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def network_of(model, segment_ids):
    """Make the network(theta, t) -> logits that bfn.py calls for a batch: segment_ids (B, L).

    In bfloat16, only the network's matrices are multiplied in it: the state of the flow and all
    probabilities stay float32.
    """
    network = partial(model, segment_ids=segment_ids)
    device = segment_ids.device
    autocast = torch.autocast(device.type, torch.bfloat16)
    return autocast(network) if reads_in_bf16(device) else network
