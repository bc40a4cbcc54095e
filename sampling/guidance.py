"""Steer a sampler by what its network answers. A guided network is a network for any sampler.

    theta  (B, L, K)  float32  input distribution
    t      (B, L)     float32  time of each position
    z      (B, L, K)  float32  log theta: the state of the flow, up to a constant per position
"""

import torch
import torch.nn.functional as F
from torch import nn

import bfn
from common.files import replacing

CLASSIFIER_FORMAT = 1  # format of the file of a classifier
WIDTH = 128  # channels of a classifier's head
N_POOLS = 4  # averages over the positions in it
SMALLEST = 1e-37  # a probability whose logarithm is finite
LARGEST = 50.0  # nats by which a guide may lower a token


def by_function(network, guide, scale):
    """Steer towards a large guide(z, t) -> log p(label | z), (B,) -> network(theta, t).

    To first order in each token:

        p(x | z, label) is proportional to p(x | z) exp(scale (d log p(label | z) / dz_x) / theta_x)

    The exponent is how log p(label | z) changes if theta becomes the one-hot of x [as in Nisonoff
    et al. 2024, arXiv 2406.01572, for other noise]. It is kept below -scale log p(label | z), which
    no token can gain. Any differentiable function will do, such as a reward minus its maximum.
    """

    def guided(theta, t):
        log_p = network(theta, t).float().log_softmax(-1)
        with torch.enable_grad():
            z = theta.clamp(min=SMALLEST).log().requires_grad_()
            log_label = guide(z, t)
            (slope,) = torch.autograd.grad(log_label.sum(), z)
        most = (-scale * log_label.detach()).clamp(min=0)[:, None, None]
        return log_p + (scale * slope / theta.clamp(min=SMALLEST)).clamp(min=-LARGEST).minimum(most)

    return guided


@torch.no_grad()
def fit_lengths(options, model, prompt):
    """Multiply the weights of a Prompt by p(label | length, given tokens)^scale -> Prompt.

    So by Bayes' rule a text gets a length that texts of this label have.
    """
    K = model.config.K
    device = next(model.parameters()).device
    log_p = []
    for template in prompt.templates:
        ids = torch.tensor([template], device=device)
        theta = torch.full((*ids.shape, K), 1 / K, device=device)
        t = torch.zeros(ids.shape, device=device)
        theta, t = bfn.clamp_given(theta, t, ids.clamp(min=0), ids >= 0)
        log_p.append(options.scale * options.guide(theta.clamp(min=SMALLEST).log(), t).item())
    return prompt.weighted(log_p)


# ---------------------------------------------------------------- a classifier


class Classifier(nn.Module):
    """Label noisy texts: theta (B, L, K), t (B, L), segment_ids (B, L) -> log p (B, n_labels).

    The frozen network's first and last hidden states, through one layer, averaged with learned
    weights (N_POOLS times).
    """

    def __init__(self, model, labels):
        super().__init__()
        # In a list: its weights are not this module's.
        self.model, self.labels = [model], list(labels)
        D = 2 * model.config.d_model
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, WIDTH)
        self.pool = nn.Linear(WIDTH, N_POOLS)
        self.out = nn.Linear(N_POOLS * WIDTH, len(self.labels))

    def forward(self, theta, t, segment_ids=None):
        segment_ids = torch.ones_like(t, dtype=torch.long) if segment_ids is None else segment_ids
        (model,) = self.model
        first = model.embed(theta)
        last = model.body(first, t, segment_ids)
        hidden = F.gelu(self.up(self.norm(torch.cat([first, last], -1))))
        weight = self.pool(hidden).masked_fill((segment_ids == 0)[..., None], -torch.inf).softmax(1)
        return self.out((weight.transpose(1, 2) @ hidden).flatten(1)).log_softmax(-1)

    def guide(self, label):
        """Make the function (z, t) -> log p(label | z) for `by_function`. Raises ValueError."""
        if label not in self.labels:
            known = ", ".join(self.labels)
            raise ValueError(f"the classifier knows no label {label!r}, only {known}")
        return lambda z, t: self(z.softmax(-1), t)[:, self.labels.index(label)]


def save_classifier(path, classifier, tokenizer_hash):
    """Write the head and its labels whole or not at all."""
    (model,) = classifier.model
    state = dict(
        classifier=CLASSIFIER_FORMAT,
        labels=classifier.labels,
        tokenizer_hash=tokenizer_hash,
        config=vars(model.config).copy(),
    )
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(dict(**state, head=classifier.state_dict()), file)


def load_classifier(path, sampler):
    """Read a classifier for a Sampler. Raises ValueError for another file, or of another model."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        same = saved["classifier"] == CLASSIFIER_FORMAT
        config, labels, head = saved["config"], saved["labels"], saved["head"]
        is_list = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        is_finite = all(weight.isfinite().all() for weight in head.values())
        if not (is_list and is_finite and len(set(labels)) == len(labels)):
            raise ValueError("labels are no texts, or weights are not finite")
    except PermissionError:
        raise
    except FileNotFoundError:
        raise ValueError(f"no classifier at {path}: train one with tools.classify") from None
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        message = f"{path} is damaged, or no file of tools.classify ({type(error).__name__})"
        raise ValueError(message) from None
    same = same and saved["tokenizer_hash"] == sampler.run["tokenizer_hash"]
    if not same or config != vars(sampler.model.config):
        raise ValueError(f"{path} is of another model: train one for this run with tools.classify")
    classifier = Classifier(sampler.model, labels).to(sampler.device)
    try:
        classifier.load_state_dict(head)
    except (RuntimeError, AttributeError):
        raise ValueError(f"{path} is damaged: train it again with tools.classify") from None
    return classifier.eval()
