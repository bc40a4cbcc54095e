"""From templates to ids: sample in batches, each text from its own random numbers.

    template     list of L      ids of given tokens, and FREE, GAP, ... to be drawn (prompts.py)
    padded       (B, L)  int64  the templates of a batch, 0 after the end of each
    segment_ids  (B, L)  int64  1 within a template, 0 = padding
"""

import math
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch

import bfn
from common import cli, parallel
from common.noise import Draws, mix_seed
from common.precision import network_of
from data import pad
from model import rows_at_once
from sampling import guidance
from sampling.prompts import FREE, MAX_CANDIDATES, allowed_at

DRAFT = bfn.STEP + 1  # the random numbers of the draft: a phase after those of bfn.py
DEFAULT = bfn.Controls(corrections=4)  # the best that we measured
FLAGS = {  # of the commands that sample, see `cli.Parser.add_flags`
    "--sampler --solver": dict(choices=bfn.SAMPLERS, default=DEFAULT.sampler,
        help="how to sample (%(default)s)"),
    "--steps": dict(type=cli.steps, default=DEFAULT.steps,
        help="most calls that fill the text; the solvers make STEPS + 1 (%(default)s)"),
    "--corrections": dict(type=cli.natural, default=DEFAULT.corrections,
        help="further calls of pace that redraw tokens (%(default)s)"),
    "--temperature": dict(type=cli.positive, default=1.0, help="of the output distribution (1)"),
}
SORTED_BATCHES = 16  # the most within which texts are sorted by length, then printed in order


@dataclass(frozen=True, eq=False)  # it may hold tensors
class Options:
    """How to sample, and what the user knows about the text.

    `sample_batch` fills in hint, hint_time and allowed of the controls.
    """

    controls: bfn.Controls = DEFAULT
    hints: tuple = ()  # of (position, log-odds (K,)), see odds.parse
    banned: tuple = ()  # ids that are never drawn
    draft: tuple = ()  # ids of a text to edit, with bos and eos
    strength: float = 0.0  # the draft counts as observed at noise level t = strength
    guide: object = None  # a function (z, t) -> log p of the text's label, see guidance.by_function
    scale: float = 1.0  # of the guide's slope
    trace: object = None  # a `Trace`, which shows text number 0 at each network call

    def __post_init__(self):
        """Raise ValueError for options that are out of range or of another type."""
        c = self.controls
        values = vars(c) | vars(self)
        try:
            in_range = dict(
                sampler=c.sampler in bfn.SAMPLERS,
                steps=isinstance(c.steps, int) and c.steps >= 1,
                corrections=isinstance(c.corrections, int) and c.corrections >= 0,
                temperature=c.temperature > 0,
                top_p=0 < c.top_p <= 1,
                until=c.until >= 0,
                argmax=isinstance(c.argmax, bool),
                strength=0 <= self.strength < 1,
                scale=self.scale >= 0,
            )
        except TypeError as error:
            raise ValueError(f"an option is of another type: {error}") from None
        wrong = [name for name, is_right in in_range.items() if not is_right]
        if wrong:
            messages = (f"{name}={values[name]!r} is out of range" for name in wrong)
            raise ValueError("; ".join(messages))


def refuse_idle(args, given):
    """Raise ValueError for a flag of sampling in `given` that does nothing with the others."""
    if "corrections" in given and args.sampler != "pace":
        raise ValueError(f"--corrections does nothing with --sampler={args.sampler}: leave it out")
    if idle := given & {"temperature", "top_p"} if getattr(args, "argmax", False) else None:
        raise ValueError(f"--{min(idle)} does nothing with --argmax: leave it out")


def options_of(args):
    """Make the Options that the flags FLAGS say."""
    return Options(bfn.Controls(args.sampler, args.steps, args.corrections, args.temperature))


def generate(model, tokenizer, templates, seed, options=Options(), limit=math.inf, numbers=None):
    """Yield the ids and the number of network calls for each template, in order.

    Template i draws its random numbers from (seed, i), so the other templates do not change its
    text. limit: the trained length; longer texts are written in blocks. numbers: what i is for each
    template, if this process samples all of them; if None, the processes of torchrun share them.
    """
    if numbers is None:
        numbers = parallel.share(range(len(templates)))
        mine = [templates[i] for i in numbers]
        samples = generate(model, tokenizer, mine, seed, options, limit, numbers)
        yield from parallel.in_order(samples, len(templates))
        return
    seeds = [mix_seed(seed, number) for number in numbers]
    longest = max(map(len, templates), default=1)
    batch_size = rows_at_once(min(longest, limit), model.config, next(model.parameters()).device)
    n_batches, end = 1, 0  # of a group: few at first, so that the first texts come soon
    while end < len(templates):
        size = 1 if longest > limit else n_batches * batch_size
        group = range(end, min(end + size, len(templates)))
        n_batches, end = min(2 * n_batches, SORTED_BATCHES), group.stop
        samples = {}
        for batch in cut_into_batches(group, templates, batch_size, options):
            inputs = model, tokenizer, [templates[i] for i in batch], [seeds[i] for i in batch]
            shown = options if numbers[batch[0]] == 0 else replace(options, trace=None)
            sample = write_blocks if len(templates[group[0]]) > limit else sample_batch
            samples.update(zip(batch, sample(*inputs, shown, limit), strict=True))
        yield from (samples[i] for i in group)


def cut_into_batches(group, templates, batch_size, options):
    """Cut a group of templates into batches of similar length, to pad little -> lists of indices.

    A guide sees no padding, so its batches have one length. A traced text has its own batch.
    """
    order = sorted(group, key=lambda i: len(templates[i]))
    if options.trace and 0 in group:
        order.remove(0)
        yield [0]
    while order:
        batch = order[:batch_size]
        if options.guide is not None:
            batch = [i for i in batch if len(templates[i]) == len(templates[batch[0]])]
        order = order[len(batch) :]
        yield batch


def sample_batch(model, tokenizer, templates, seeds, options, limit=math.inf):
    """Sample templates that fit the limit, each from its own seed -> [(ids, calls)]."""
    config = model.config
    lengths = [len(template) for template in templates]
    padded, segment_ids = pad(templates, next(model.parameters()).device)
    given = padded >= 0
    draws = Draws.seeded(seeds, lengths, padded.device)
    controls = replace(
        options.controls,
        allowed=allowed_at(padded, tokenizer, options.banned),
        hint=combine_evidence(options, tokenizer, config, draws),
        hint_time=options.strength if options.draft else 0.0,
        watch=options.trace or options.controls.watch,
    )
    network = network_of(model, segment_ids)
    if options.guide is not None:
        network = guidance.by_function(network, options.guide, options.scale)
    inputs = network, padded.clamp(min=0), given, config.s1, config.K
    ids, calls = bfn.sample(*inputs, controls, draws)
    rows = [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]
    if options.trace:
        options.trace.close(rows[0])
    return list(zip(rows, calls.tolist(), strict=True))


def combine_evidence(options, tokenizer, config, draws):
    """Add the log-odds of the hints and of the draft -> (L, K) or (B, L, K), None without any.

    The draft is observed through the flow at t = strength.
    """
    (B, L, _), device, K = draws.keys.shape, draws.keys.device, config.K
    if not (options.hints or options.draft):
        return None
    evidence = torch.zeros(L, K, device=device)
    for position, log_odds in options.hints:
        evidence[position + (tokenizer.bos >= 0)] += log_odds.to(device)
    if options.draft:
        draft = torch.tensor(options.draft, device=device).expand(B, L)
        t = torch.full((B, L), options.strength, device=device)
        evidence = evidence + bfn.flow(draft, t, config.s1, K, draws.at(DRAFT, 0).normal(K))
    return evidence


def write_blocks(model, tokenizer, templates, seeds, options, limit):
    """Write one text longer than the limit: a beginning, then FREE -> [(ids, calls)].

    It is written in blocks of `limit` tokens. The first one begins with the whole beginning if that
    fits, each other one with the last limit // 2 tokens so far. The text ends with the block that
    has eos.
    """
    (template,), (seed,) = templates, seeds
    ids, calls = list(takewhile(lambda k: k != FREE, template)), 0
    while len(ids) < len(template) and tokenizer.eos not in ids:
        given = ids if calls == 0 and len(ids) < limit else ids[-(limit // 2) :]
        block = given + [FREE] * min(limit - len(given), len(template) - len(ids))
        block_seed = mix_seed(mix_seed(seed, len(ids)), 0)
        ((block_ids, block_calls),) = sample_batch(model, tokenizer, [block], [block_seed], options)
        ids = ids[: -len(given)] + block_ids  # with the label, if that was drawn
        calls += block_calls
    return [([k for k in ids if k >= 0], calls)]


MAX_CALLS = 8  # network calls per template; longer prompts are read several tokens per call


@torch.no_grad()
def given_log_likelihood(model, tokenizer, templates):
    """Compute log P(given tokens | template) of each template, without bos -> (n,) float64, nats.

    Exact for up to MAX_CALLS given tokens; of more, those read in the same call count as
    independent.
    """
    device = next(model.parameters()).device
    n = rows_at_once(max(map(len, templates)), model.config, device)
    batches = [pad(templates[i : i + n], device) for i in range(0, len(templates), n)]
    return torch.cat([batch_log_likelihood(model, *b, tokenizer.bos) for b in batches]).cpu()


def batch_log_likelihood(model, padded, segment_ids, bos):
    """Compute log P(given tokens | template) of one batch: padded, segment_ids (B, L) -> (B,)."""
    network = network_of(model, segment_ids)
    ids, t = padded.clamp(min=0), torch.zeros(padded.shape, device=padded.device)
    scored = (padded >= 0) & (segment_ids > 0) & (padded != bos)
    known = (padded >= 0) & ~scored  # bos and padding
    n_scored = scored.sum(1, keepdim=True)
    order = scored.cumsum(1) - 1  # 0, 1, 2, ... at the scored positions
    n_calls = n_scored.clamp(1, MAX_CALLS)
    theta = torch.full((*padded.shape, model.config.K), 1 / model.config.K, device=padded.device)
    total = torch.zeros(len(padded), dtype=torch.float64, device=padded.device)
    for call in range(n_calls.max().item()):
        now = scored & (order * n_calls // n_scored.clamp(min=1) == call)
        log_p = bfn.predict(network, theta, t, ids, known)
        total += (bfn.pick(log_p, ids) * now).double().sum(1)
        known = known | now
    return total


def fit_lengths(model, tokenizer, prompt):
    """Multiply the weights of a Prompt's templates by P(given tokens | template) -> Prompt.

    Of more than MAX_CANDIDATES templates, evenly spaced ones are read; log P of the others is
    interpolated over the length.
    """
    n = len(prompt.templates)
    has_given = any(k >= 0 and k != tokenizer.bos for k in prompt.templates[0])
    if n < 2 or not has_given:
        return prompt
    read = np.linspace(0, n - 1, min(n, MAX_CANDIDATES)).round().astype(int)
    log_p = given_log_likelihood(model, tokenizer, [prompt.templates[i] for i in read])
    return prompt.weighted(np.interp(np.arange(n), read, log_p))
