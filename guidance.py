"""Steer a sampler by what its network answers. A guided network is again a network, so every sampler of bfn.py takes it.

    theta  (B, L, K)  float32  input distribution
    t      (B, L)     float32  time of each position
    z      (B, L, K)  float32  log theta: the state of the flow, up to a constant per position
"""

import torch

SMALLEST = 1e-37  # a probability whose logarithm is finite


def by_prompt(model, segment_ids, prompt_mask, weight):
    """Steer towards the prompt, by `weight` W: the network answers with and without it, in one batch of 2 B rows.

        p(x | prompt)^(1 + W) p(x)^-W, normalised for each position

    This is classifier-free guidance [Ho and Salimans 2022, arXiv 2207.12598; for tokens Schiff et al. 2024, arXiv
    2412.10193]. prompt_mask (B, L): the given positions that the second answer does not see -> network(theta, t).
    """
    both_ids = segment_ids.repeat(2, 1)

    def network(theta, t):
        without = theta.masked_fill(prompt_mask[..., None], 1 / theta.shape[-1]), t.masked_fill(prompt_mask, 0.0)
        inputs = (torch.cat(pair) for pair in zip((theta, t), without, strict=True))
        log_p, log_p_without = model(*inputs, both_ids).float().log_softmax(-1).chunk(2)
        return log_p + weight * (log_p - log_p_without)

    return network


def by_function(network, guide, scale):
    """Steer towards states for which guide(z, t) -> log p(label | z), (B,), is large -> network(theta, t).

        p(x | z, label) = p(x | z) + d log p(label | z) / dz

    For scale 1 and an exact guide this is exact: z is e_x with Gaussian noise, so the slope of log p(z) tells the mean of
    e_x (Tweedie's formula), with and without the label. The slope is multiplied by `scale`, and negative p become 0. The
    guide may be any differentiable function, such as a reward.
    """

    def guided(theta, t):
        p = network(theta, t).float().softmax(-1)
        with torch.enable_grad():
            z = theta.clamp(min=SMALLEST).log().requires_grad_()
            (slope,) = torch.autograd.grad(guide(z, t).sum(), z)
        return (p + scale * slope).clamp(min=SMALLEST).log()

    return guided
