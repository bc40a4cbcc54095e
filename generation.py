"""From templates to ids: sample in batches, each text from its own random numbers.

    template     list of L         ids of given tokens, and FREE, GAP, ... where a token is drawn (prompts.py)
    padded       (B, L)     int64  the templates of a batch, 0 after the end of each
    segment_ids  (B, L)     int64  1 within a template, 0 = padding
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

import bfn
import data
import guidance
import parallel
from model import rows_at_once
from noise import Draws, mix_seed
from prompts import FREE, allowed_at, make_hint, make_template, pad
from text import ONE_LINE, decode, one_line
from watch import Trace

DRAFT = bfn.STEP + 1  # the random numbers of the draft: a phase after those of bfn.py
SORTED_BATCHES = 16  # texts are sorted by length within so many batches, then printed in order


@dataclass(frozen=True, eq=False)  # it may hold tensors
class Options(bfn.Controls):
    """How to sample, and what the user knows about the text.

    The defaults are the best we measured (docs/results.md). `sample_batch` fills in hint, hint_time and allowed of Controls.
    """

    corrections: int = 4
    hints: tuple = ()  # of (position, log-odds (K,)), see prompts.parse_hint
    banned: tuple = ()  # ids that are never drawn
    draft: tuple = ()  # ids of a text to edit, with bos and eos
    strength: float = 0.0  # the draft counts as observed at noise level t = strength
    guidance: float = 0.0  # how much more a text should follow its prompt, see guidance.by_prompt
    guide: object = None  # a function (z, t) -> log p of what the text should be, see guidance.by_function
    scale: float = 1.0  # of the guide's slope
    guide_is_exact: bool = False  # the guide is the true log p, not a learned one

    def __post_init__(self):
        in_range = dict(
            sampler=self.sampler in bfn.SAMPLERS,
            steps=isinstance(self.steps, int) and self.steps >= 1,
            corrections=isinstance(self.corrections, int) and self.corrections >= 0,
            temperature=self.temperature > 0,
            top_p=0 < self.top_p <= 1,
            until=self.until >= 0,
            strength=0 <= self.strength < 1,
            guidance=self.guidance >= 0,
            scale=self.scale >= 0,
        )
        if wrong := [f"{name}={getattr(self, name)!r} is out of range" for name, is_right in in_range.items() if not is_right]:
            raise ValueError("; ".join(wrong))


def generate(model, tokenizer, templates, seed, options=Options(), numbers=None):
    """Yield the ids and the number of network calls for each template, in order.

    Template i draws its random numbers from (seed, numbers[i]), or (seed, i) if `numbers` is None: the other templates do
    not change its text.
    """
    seeds = [mix_seed(seed, number) for number in (range(len(templates)) if numbers is None else numbers)]
    longest = max(map(len, templates), default=1)
    batch_size = rows_at_once(longest, model.config, next(model.parameters()).device)
    group_size = SORTED_BATCHES * batch_size
    for i in range(0, len(templates), group_size):
        group = slice(i, i + group_size)
        yield from sample_group(model, tokenizer, templates[group], seeds[group], options, batch_size)


def sample_group(model, tokenizer, templates, seeds, options, batch_size):
    """Sample templates in batches of similar length, which need little padding -> [(ids, calls)] in the given order."""
    by_length = sorted(range(len(templates)), key=lambda i: len(templates[i]))
    samples, start = {}, 0
    while batch := by_length[start : start + batch_size]:
        if options.guide is not None:  # a guide sees no padding: the texts of a batch have the same length
            batch = [i for i in batch if len(templates[i]) == len(templates[batch[0]])]
        start += len(batch)
        drawn = sample_batch(model, tokenizer, [templates[i] for i in batch], [seeds[i] for i in batch], options)
        samples.update(zip(batch, drawn, strict=True))
    return [samples[i] for i in range(len(templates))]


def sample_batch(model, tokenizer, templates, seeds, options):
    """Sample one batch of templates, each from its own seed -> [(ids, calls)]."""
    config, lengths = model.config, [len(template) for template in templates]
    padded, segment_ids = pad(templates, next(model.parameters()).device)
    draws = Draws.seeded(seeds, lengths, padded.device)
    controls = replace(
        options,
        allowed=allowed_at(padded, tokenizer, options.banned),
        hint=combine_evidence(options, tokenizer, config, draws),
        hint_time=options.strength if options.draft else 0.0,
    )
    network, given = partial(model, segment_ids=segment_ids), padded >= 0
    if options.guidance:
        prompt_mask = given & (segment_ids > 0) & (padded != tokenizer.bos_id())
        network = guidance.by_prompt(model, segment_ids, prompt_mask, options.guidance)
    if options.guide is not None:
        network = guidance.by_function(network, options.guide, options.scale, options.guide_is_exact)
    ids, calls = bfn.sample(network, padded.clamp(min=0), given, config.s1, config.K, controls, draws)
    calls *= 2 if options.guidance else 1
    return [(row[:n], c) for row, n, c in zip(ids.tolist(), lengths, calls.tolist(), strict=True)]


def combine_evidence(options, tokenizer, config, draws):
    """Add the log-odds of the hints and of the draft -> (L, K) or (B, L, K), or None if there are neither.

    The draft is observed through the flow at t = strength.
    """
    (B, L, _), device = draws.keys.shape, draws.keys.device
    evidence = []
    if options.hints:
        evidence.append(make_hint(options.hints, L, tokenizer.bos_id() >= 0, config.K).to(device))
    if options.draft:
        draft = torch.tensor(options.draft, device=device).expand(B, L)
        t = torch.full((B, L), options.strength, device=device)
        evidence.append(bfn.flow(draft, t, config.s1, config.K, draws.at(DRAFT, 0).normal(config.K)))
    return sum(evidence) if evidence else None


def generate_long(model, tokenizer, template, limit, seed, options):
    """Write a text longer than `limit`, the trained length -> ids, calls. The template is given tokens, then FREE.

    The text is written in blocks of `limit` tokens, each of which begins with the last limit // 2 tokens so far. It ends
    with the block that has eos.
    """
    ids, calls = [k for k in template if k >= 0], 0
    while len(ids) < len(template) and tokenizer.eos_id() not in ids:
        given = ids[-(limit // 2) :]
        block = given + [FREE] * min(limit - len(given), len(template) - len(ids))
        ((block_ids, block_calls),) = generate(model, tokenizer, [block], mix_seed(seed, len(ids)), options)
        ids, calls = ids + block_ids[len(given) :], calls + block_calls
    return ids, calls


def generate_any_length(model, tokenizer, templates, limit, seed, options, numbers):
    """Yield as `generate` does, for templates of which some are longer than `limit`, the trained length."""
    short = {i: template for i, template in zip(numbers, templates, strict=True) if len(template) <= limit}
    short_samples = generate(model, tokenizer, list(short.values()), seed, options, short)
    for i, template in zip(numbers, templates, strict=True):
        if i in short:
            yield next(short_samples)
        else:
            yield generate_long(model, tokenizer, template, limit, mix_seed(seed, i), options)


def lay_out(text, run):
    """Put a sample on one line if the model was trained on lines: it may have drawn a line break by chance."""
    return one_line(text) if run["args"]["example"] in ONE_LINE else text


def mark_breaks(text):
    """Write a text on one line, with \\n for each line break."""
    return text.replace("\n", "\\n")


def example_texts(model, tokenizer, tokens, run, n, seed):
    """Sample n texts to look at during training -> list.

    Half are free. The others continue the first third, in brackets, of a window of the validation text `tokens`.
    """
    plan = data.plan_validation(tokens, run["args"]["sequence_length"], n)
    free = [make_template("", tokenizer, run, mix_seed(seed, i)) for i in range(n // 2)]
    texts = [decode(tokenizer, ids) for ids, _ in generate(model, tokenizer, free, seed)]
    for i in range(n // 2, n):
        window = i % len(plan.starts)
        start, length = int(plan.starts[window]), int(plan.lengths[window])
        given = tokens.ids[start : start + length // 3].tolist()
        template = given + [FREE] * (length - len(given))
        ((ids, _),) = generate(model, tokenizer, [template], seed, numbers=[i])
        texts.append(f"[{decode(tokenizer, given)}] {decode(tokenizer, ids[len(given) :])}")
    return [lay_out(text, run) for text in texts]


def generate_traced(model, tokenizer, templates, seed, options, numbers, unknown=()):
    """Yield as `generate` does, and show text number 0 at each of its network calls, and as it is printed."""
    if 0 in numbers:
        trace = Trace(tokenizer, unknown=unknown)
        (first,) = generate(model, tokenizer, templates[:1], seed, replace(options, watch=trace))
        trace.close(first[0])
        yield first
        templates, numbers = templates[1:], numbers[1:]
    yield from generate(model, tokenizer, templates, seed, options, numbers)


def generate_in_shares(draw, model, tokenizer, templates, seed, options):
    """Yield as `draw` does, which is one of the functions above. Each process of torchrun does its share, and gets all."""
    mine = parallel.share(range(len(templates)))
    samples = draw(model, tokenizer, parallel.share(templates), seed=seed, options=options, numbers=mine)
    return parallel.in_order(samples, len(templates))
