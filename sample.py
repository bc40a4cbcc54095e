"""Print text from a trained model: free, continuing a prompt, filling gaps, editing a draft, with odds for tokens.

python sample.py -mdir=RUN_DIR --prompt "the ___ is sweet"

    template     list of L         ids of given tokens, and FREE, GAP, ... where a token is drawn (prompts.py)
    padded       (B, L)     int64  the templates of a batch, 0 after the end of each
    segment_ids  (B, L)     int64  1 within a template, 0 = padding
"""

import json
import os
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cli  # isort: skip - first, because of Ctrl-C
import torch
from tqdm import tqdm

import bfn
import data
from checkpoint import RUN_FILES, load
from lengths import fit_lengths
from model import rows_at_once
from noise import Draws, mix_seed
from prompts import (
    FREE,
    allowed_at,
    candidates,
    check_hints,
    check_unicode,
    find_ids,
    make_hint,
    make_template,
    pad,
    parse_hint,
    read_breaks,
    read_prompts,
    unknown_pieces,
    warn_unknown,
)
from text import add_marks, decode, one_line
from watch import Trace

DRAFT = bfn.STEP + 1  # the random numbers of the draft: a phase after those of bfn.py
SEPARATOR = "-" * 20  # printed after each text of several lines
SORTED_BATCHES = 16  # texts are sorted by length within so many batches, then printed in order

# ---------------------------------------------------------------- generation


@dataclass(frozen=True, eq=False)  # it may hold tensors
class Options(bfn.Controls):
    """How to sample, and what the user knows about the text. The defaults are the best we measured (RESULTS.md).

    `sample_batch` fills in hint, hint_time and allowed of Controls.
    """

    corrections: int = 4
    hints: tuple = ()  # of (position, log-odds (K,)), see prompts.parse_hint
    banned: tuple = ()  # ids that are never drawn
    draft: tuple = ()  # ids of a text to edit, with bos and eos
    strength: float = 0.0  # the draft counts as observed at noise level t = strength


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
    samples = {}
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
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
    network = partial(model, segment_ids=segment_ids)
    ids, calls = bfn.sample(network, padded.clamp(min=0), padded >= 0, config.s1, config.K, controls, draws)
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


def generate_any_length(model, tokenizer, templates, limit, seed, options):
    """Yield as `generate` does, for templates of which some are longer than `limit`, the trained length."""
    short = [i for i, template in enumerate(templates) if len(template) <= limit]
    short_samples = generate(model, tokenizer, [templates[i] for i in short], seed, options, numbers=short)
    for i, template in enumerate(templates):
        if len(template) <= limit:
            yield next(short_samples)
        else:
            yield generate_long(model, tokenizer, template, limit, mix_seed(seed, i), options)


def lay_out(text, run):
    """Put a sample on one line if the model was trained on lines: it may have drawn a line break by chance."""
    return one_line(text) if run["args"]["example"] == "line" else text


def mark_breaks(text):
    """Write a text on one line, with \\n for each line break."""
    return text.replace("\n", "\\n")


def example_texts(model, tokenizer, tokens, run, n, seed):
    """Sample n texts to look at during training -> list.

    Half are free. The others continue the first third, in brackets, of a window of the validation text `tokens`.
    """
    plan = data.plan_validation(tokens, run["args"]["sequence_length"])
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


# ---------------------------------------------------------------- watching


def generate_traced(model, tokenizer, templates, seed, options, unknown=()):
    """Yield as `generate` does, and show the first text at each of its network calls, and as it is printed."""
    trace = Trace(tokenizer, unknown=unknown)
    (first,) = generate(model, tokenizer, templates[:1], seed, replace(options, watch=trace))
    trace.close(first[0])
    yield first
    yield from generate(model, tokenizer, templates[1:], seed, options, numbers=range(1, len(templates)))


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    add("--checkpoint", choices=["best", "last"], default="best", help="the best by validation, or the last (best)")
    add("--prompt", action="append", default=[], help="beginning of a text, or a text with gaps ___ or ___{N}; repeatable")
    add("--prompt_file", help="file with one prompt per line")
    add("--num_samples", type=cli.samples, default=8, help="samples per prompt (8)")
    add("--length", type=cli.count, help="tokens per text, with bos and eos (drawn from the training lengths)")
    add("--sampler", "--solver", choices=bfn.SAMPLERS, default=Options.sampler, help="how to sample (%(default)s)")
    add("--steps", type=cli.steps, default=Options.steps, help="most calls that fill the text; the solvers make STEPS + 1 (32)")
    add("--corrections", type=cli.natural, default=Options.corrections, help="further calls of pace that redraw tokens (4)")
    grids = ["uniform", "learned"]
    add("--time_grid", choices=grids, default="uniform", help="solvers: even steps, or small where the loss is large (uniform)")
    add("--temperature", type=cli.positive, default=1.0, help="of the output distribution (1)")
    add("--top_p", type=cli.above_zero_to_one, default=1.0, help="keep the likeliest tokens that sum to this (1)")
    add("--argmax", action="store_true", help="take the likeliest tokens instead of drawing them")
    add("--until", type=cli.non_negative, default=0.0, help="finish a text below this mean entropy, nats per token (0)")
    add("--ban", action="append", default=[], help="a token that is never drawn; repeatable")
    add("--hint", action="append", default=[], help="odds of tokens at a position, such as 3:cat=0.7,dog=0.3; repeatable")
    add("--draft", help="text to edit, treated as if observed at noise level t = --strength")
    add("--strength", type=cli.share, default=0.4, help="noise level t of --draft: a higher value keeps more of it (0.4)")
    add("--seed", type=cli.natural, default=0, help="a sample depends only on the seed and its number (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    add("--output", help="also write prompt, text, ids and network calls to this file, as JSON lines")
    add("--trace", action="store_true", help="show the first sample at each network call, on standard error")
    return p


def read_draft(args, tokenizer, limit):
    """Encode --draft with bos and eos -> ids, () if the flag is not set.

    Raises ValueError for a draft that is empty, longer than `limit`, or next to flags that say what the text is.
    """
    if args.draft is None:
        return ()
    if args.prompt or args.prompt_file or args.length:
        raise ValueError("--draft is the whole text: use it without --prompt, --prompt_file and --length")
    if not args.draft.strip():
        raise ValueError("--draft is empty: give a text")
    draft = add_marks(tokenizer.encode(args.draft), tokenizer)
    if len(draft) > limit:
        raise ValueError(f"--draft takes {len(draft)} tokens, the model was trained on at most {limit}: shorten it")
    return tuple(draft)


def make_options(args, tokenizer, run):
    """Turn flags into Options. Raises ValueError for what the tokenizer or the run does not know."""
    is_learned = args.time_grid == "learned"
    if is_learned and not run["loss_by_time"]:
        raise ValueError("this checkpoint is from before the first validation: use --time_grid=uniform")
    same = "sampler steps corrections temperature top_p argmax until strength".split()
    return Options(
        **{name: getattr(args, name) for name in same},
        curve=run["loss_by_time"] if is_learned else None,
        hints=tuple(parse_hint(hint, tokenizer) for hint in args.hint),
        banned=tuple(k for text in args.ban for k in find_ids(text, tokenizer)),
        draft=read_draft(args, tokenizer, run["args"]["sequence_length"]),
    )


def sample_prompts(args, model, tokenizer, run, prompts, options):
    """Begin to sample -> iterator over (ids, calls), one per prompt. Raises ValueError for what does not fit together."""
    limit = run["args"]["sequence_length"]
    if options.draft:  # only bos is given
        templates = [[k if k == tokenizer.bos_id() else FREE for k in options.draft]] * len(prompts)
    else:
        choices = {p: fit_lengths(model, tokenizer, *candidates(p, tokenizer, run, args.length)) for p in set(prompts)}
        seeds = [mix_seed(args.seed, i) for i in range(len(prompts))]
        templates = [random.Random(seed).choices(*choices[p])[0] for p, seed in zip(prompts, seeds, strict=True)]
    if max(map(len, templates)) > limit:
        if options.hints or args.trace:
            raise ValueError(f"--hint and --trace need texts of at most {limit} tokens, the trained length: lower --length")
        return generate_any_length(model, tokenizer, templates, limit, args.seed, options)
    check_hints(options.hints, templates, tokenizer.bos_id() >= 0)
    draw = partial(generate_traced, unknown=unknown_pieces(prompts[0], tokenizer)) if args.trace else generate
    return draw(model, tokenizer, templates, args.seed, options)


def check_output(args):
    """Raise ValueError if --output would overwrite the prompts or a file of the run."""
    output = Path(args.output or os.devnull).resolve()
    if args.prompt_file and output == Path(args.prompt_file).resolve():
        raise ValueError(f"--output={args.output} is the file of prompts: give another name")
    if output.parent == Path(args.model_dir).resolve() and output.name in RUN_FILES:
        raise ValueError(f"--output={args.output} is a file of the run: give another name")


def main():
    args = flags().parse_args()
    model, tokenizer, run = load(args.model_dir, args.checkpoint, cli.device(args.device))
    args.prompt, args.draft = [read_breaks(text, run) for text in args.prompt], args.draft and read_breaks(args.draft, run)
    for text in [*args.ban, *args.hint, args.draft or ""]:
        check_unicode(text)
    options = make_options(args, tokenizer, run)
    has_file = args.prompt_file is not None
    separator = [] if run["args"]["example"] == "line" else [SEPARATOR]
    prompts = args.prompt + (read_prompts(args.prompt_file, tokenizer, run, args.length) if has_file else [])
    check_output(args)
    prompts = [prompt for prompt in prompts or [""] for _ in range(args.num_samples)]
    samples = sample_prompts(args, model, tokenizer, run, prompts, options)
    warn_unknown([*prompts, args.draft or ""], tokenizer)
    hide_bar = True if args.trace or len(prompts) == 1 else None  # None: show it only in a terminal
    total_calls, path = 0, args.output or os.devnull
    unfinished = path if os.path.exists(path) and not os.path.isfile(path) else f"{path}.part"  # not of a pipe
    with cli.writing(path), open(unfinished, "w", encoding="utf-8") as output:
        bar = tqdm(samples, total=len(prompts), unit="sample", disable=hide_bar)
        for prompt, (ids, calls) in zip(prompts, bar, strict=True):
            text, total_calls = lay_out(decode(tokenizer, ids, unknown_pieces(prompt, tokenizer)), run), total_calls + calls
            with cli.writing("standard output"):
                print(text, *separator, sep="\n", flush=True)
            record = dict(prompt=prompt, text=text, ids=ids, calls=calls)
            print(json.dumps(record, ensure_ascii=False), file=output, flush=True)
    if unfinished != path:
        os.replace(unfinished, path)
    if args.until:
        print(f"{total_calls / len(prompts):.1f} network calls per text", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
