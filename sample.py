"""Print text from a trained model: free, from a prompt, filling gaps, from a draft, under odds.

python sample.py -mdir=RUN_DIR --prompt "the ___ is sweet"
"""

import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import bfn
import cli
import data
from model import load, rows_at_once
from prompts import FREE, GAP_MARK, allowed_tokens, check_hints, find_token, make_hint, make_template, parse_hint, shorten

RUN_FILES = "tokenizer.model corpus.txt last.pt best.pt metrics.jsonl samples.txt times.png".split()

# ---------------------------------------------------------------- generation


@dataclass(frozen=True)
class Options:
    """How to sample; the defaults are the best we measured (README)."""

    solver: str = "commit"
    steps: int = 32
    corrections: int = 4  # further calls of commit, at most one for two tokens
    curve: list | None = None  # loss by time, for a learned time grid
    temperature: float = 1.0
    top_p: float = 1.0
    argmax: bool = False
    until: float = 0.0  # nats
    hints: tuple = ()  # (position, log-odds (K,))
    banned: tuple = ()  # ids
    draft: tuple = ()  # ids of a text, of which there is as much evidence as the flow brings until `strength`
    strength: float = 0.0


def generate(model, tokenizer, templates, seed, options=Options(), numbers=None, watch=None):
    """Yield ids and network calls for each template, batch by batch.

    Template i draws its noise from (seed, numbers[i]), whatever its neighbours; its number is i if there are none given.
    Texts of like length share a batch.
    watch(t, p, given) sees every call of the first batch.
    """
    numbers = range(len(templates)) if numbers is None else numbers
    longest = max(map(len, templates), default=1)
    rows = rows_at_once(longest, model.config, next(model.parameters()).device)
    for start in range(0, len(templates), 16 * rows):  # sorted by length, a few batches at a time
        group = range(start, min(start + 16 * rows, len(templates)))
        order = sorted(group, key=lambda i: (watch is None or i > 0) * len(templates[i]))  # the one watched is the first
        done = {}
        for at in range(0, len(order), rows):
            batch = order[at : at + rows]
            seeds = [bfn.mix_seed(seed, numbers[i]) for i in batch]
            watch_now = watch if start == at == 0 else None
            done.update(zip(batch, sample_batch(model, tokenizer, [templates[i] for i in batch], seeds, options, watch_now)))
        yield from (done[i] for i in group)


def sample_batch(model, tokenizer, templates, seeds, options, watch=None):
    """Sample templates side by side, each from its own seed -> [(ids, calls)]."""
    device, K, s1 = next(model.parameters()).device, model.config.K, model.config.s1
    lengths = [len(template) for template in templates]
    padded = torch.tensor([t + [0] * (max(lengths) - len(t)) for t in templates], device=device)
    segment_ids = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
    draws = bfn.Draws.seeded(seeds, lengths, device)
    allowed, hint = allowed_tokens(tokenizer).to(device).clone(), None
    allowed[1:, list(options.banned)] = False
    if not allowed.any(1).all():
        raise ValueError("--ban leaves nothing to draw: ban less")
    allowed = allowed[(-padded).clamp(min=0)]
    if options.hints:
        hint = make_hint(options.hints, padded.shape[1], tokenizer.bos_id() >= 0, K).to(device)
    if options.draft:
        draft = torch.tensor(options.draft, device=device).expand(padded.shape)
        t = torch.full(padded.shape, options.strength, device=device)
        evidence = bfn.flow(draft, t, s1, K, draws.normal(K))
        hint = evidence if hint is None else hint + evidence
    ids, calls = bfn.sample(
        partial(model, segment_ids=segment_ids),
        padded.clamp(min=0),
        padded >= 0,
        s1,
        K,
        bfn.time_grid(options.solver, options.steps, options.curve),
        options.solver,
        hint=hint,
        hint_time=options.strength,
        allowed=allowed,
        temperature=options.temperature,
        top_p=options.top_p,
        argmax=options.argmax,
        until=options.until,
        corrections=options.corrections,
        draws=draws,
        watch=watch,
    )
    return [(row[:n], c) for row, n, c in zip(ids.tolist(), lengths, calls.tolist(), strict=True)]


def generate_long(model, tokenizer, template, limit, seed, options):
    """Write a text longer than the trained length, block after block, the last half of a block given to the next.

    The template is given tokens and then FREE -> ids to the end of the block that has eos, calls.
    """
    text, calls = [k for k in template if k >= 0], 0
    while len(text) < len(template) and tokenizer.eos_id() not in text:
        given = text[-(limit // 2) :]
        block = given + [FREE] * min(limit - len(given), len(template) - len(text))
        ((ids, n),) = generate(model, tokenizer, [block], bfn.mix_seed(seed, len(text)), options)
        text, calls = text + ids[len(given) :], calls + n
    return text, calls


def generate_mixed(model, tokenizer, templates, limit, seed, options):
    """`generate` for templates of which some are longer than the trained length."""
    short = [i for i, template in enumerate(templates) if len(template) <= limit]
    texts = generate(model, tokenizer, [templates[i] for i in short], seed, options, numbers=short)
    for i, template in enumerate(templates):
        if len(template) <= limit:
            yield next(texts)
        else:
            yield generate_long(model, tokenizer, template, limit, bfn.mix_seed(seed, i), options)


def decode(tokenizer, ids):
    """ids -> one line of text, up to the first eos."""
    if tokenizer.eos_id() in ids:
        ids = ids[: ids.index(tokenizer.eos_id())]
    return " ".join(tokenizer.decode([i for i in ids if i != tokenizer.bos_id()]).splitlines())


class Trace:
    """Shows the first sample at every call on standard error, certain tokens bold and uncertain ones dim.

    In place and at a readable pace in a terminal; elsewhere a line a call, without control codes.
    """

    def __init__(self, tokenizer, n, file=None):
        self.tokenizer, self.n, self.file = tokenizer, n, file or sys.stderr
        self.terminal, self.calls, self.lines = self.file.isatty(), 0, 0

    def __call__(self, t, p, given):
        p, given = p[0, : self.n].cpu(), given[0, : self.n].tolist()
        ids, certainty = p.argmax(-1).tolist(), p.amax(-1).tolist()
        if not self.terminal:
            self.calls += 1
            print(f"call {self.calls}  {decode(self.tokenizer, ids)}", file=self.file)
            return
        text, shown, width = "", "", shutil.get_terminal_size().columns
        for i in range(self.n):  # the text up to a token, less the text before it: tokens join without their pieces
            longer = decode(self.tokenizer, ids[: i + 1])
            style = 1 if given[i] or certainty[i] > 0.9 else 2 if certainty[i] < 0.4 else 22  # bold, dim, neither
            shown += f"\x1b[0;{style}m{longer[len(text) :]}"
            text = longer
        back = f"\x1b[{self.lines}A\r\x1b[J" if self.lines else "\r\x1b[J"
        print(f"{back}{shown}\x1b[0m", end="", file=self.file, flush=True)
        self.lines = max(0, len(text) - 1) // width
        time.sleep(0.08)

    def close(self):
        if self.terminal:
            print(file=self.file)


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add, defaults = p.add_argument, Options()
    add("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    add("--checkpoint", choices=["best", "last"], default="best", help="best by validation, or last (best)")
    add("--prompt", action="append", default=[], help="beginning of a text, or a text with gaps; repeatable")
    add("--prompt_file", help="file with one prompt a line")
    add("--num_samples", type=cli.count, default=8, help="samples for each prompt (8)")
    add("--length", type=cli.count, help="tokens, bos and eos included (drawn from the training lengths)")
    add("--solver", choices=["commit", *bfn.SOLVERS], default=defaults.solver, help=f"({defaults.solver})")
    add(
        "--steps",
        type=cli.count,
        default=defaults.steps,
        help=f"steps ({defaults.steps}): so many network calls for commit, at most one a token; one more for the others",
    )
    add(
        "--corrections",
        type=cli.natural,
        default=defaults.corrections,
        help=f"further calls of commit, which draw the least likely tokens anew ({defaults.corrections})",
    )
    add(
        "--time_grid",
        choices=["uniform", "learned"],
        default="uniform",
        help="even, or smaller steps where the loss is (uniform)",
    )
    add("--temperature", type=cli.positive, default=1.0, help="of the output distribution (1)")
    add("--top_p", type=cli.above_zero_to_one, default=1.0, help="keep the likeliest tokens that sum to this (1)")
    add("--argmax", action="store_true", help="read out the likeliest tokens in place of drawing them")
    add("--until", type=cli.non_negative, default=0.0, help="stop a text whose mean entropy is below this, nats a token (0)")
    add("--ban", action="append", default=[], help="a token never to be drawn; repeatable")
    add("--hint", action="append", default=[], help="odds at a token's position, as 3:cat=0.7,dog=0.3; repeatable")
    add("--draft", help="text to edit: the more of it stays, the higher --strength")
    add("--strength", type=cli.share, default=0.4, help="evidence for --draft, as the time that brings as much (0.4)")
    add("--seed", type=cli.natural, default=0, help="a sample depends on the seed and its number alone (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--output", help="also write JSON lines with prompt, text, ids and network calls to this file")
    add("--trace", action="store_true", help="show the first sample at every step, on standard error")
    return p


def make_options(args, tokenizer, run):
    """Flags -> Options. Raises ValueError for what the tokenizer or the run does not know."""
    draft, limit = (), run["args"]["sequence_length"]
    if args.draft is not None:
        bos, eos = ([i] if i >= 0 else [] for i in (tokenizer.bos_id(), tokenizer.eos_id()))
        draft = tuple(bos + tokenizer.encode(args.draft) + eos)
        if args.prompt or args.prompt_file or args.length:
            raise ValueError("--draft is the whole text: it goes with neither prompts nor --length")
        if not args.draft.strip():
            raise ValueError("--draft is empty: give a text")
        if len(draft) > limit:
            raise ValueError(f"--draft takes {len(draft)} tokens, the model was trained on 1 to {limit}")
    if args.time_grid == "learned" and not run["loss_by_time"]:
        raise ValueError("this checkpoint is from before the first validation: use --time_grid=uniform")
    return Options(
        solver=args.solver,
        steps=args.steps,
        corrections=args.corrections,
        curve=run["loss_by_time"] if args.time_grid == "learned" else None,
        temperature=args.temperature,
        top_p=args.top_p,
        argmax=args.argmax,
        until=args.until,
        hints=tuple(parse_hint(hint, tokenizer) for hint in args.hint),
        banned=tuple(i for word in args.ban for i in find_token(word, tokenizer)),
        draft=draft,
        strength=args.strength if draft else 0.0,
    )


def start(args, model, tokenizer, run, prompts, options):
    """Begin to sample the prompts -> texts to come (ids, calls), Trace or None. Raises ValueError for what does not fit."""
    limit, seeds = run["args"]["sequence_length"], [bfn.mix_seed(args.seed, i) for i in range(len(prompts))]
    if options.draft:
        templates = [[k if k == tokenizer.bos_id() else FREE for k in options.draft]] * len(prompts)
    else:
        templates = [make_template(p, tokenizer, run, s, args.length) for p, s in zip(prompts, seeds, strict=True)]
    if max(map(len, templates)) > limit:
        if options.hints or args.trace:
            raise ValueError(f"--hint and --trace are for texts of at most {limit} tokens, as trained: lower --length")
        return generate_mixed(model, tokenizer, templates, limit, args.seed, options), None
    check_hints(options.hints, templates, tokenizer.bos_id() >= 0)
    trace = Trace(tokenizer, len(templates[0])) if args.trace else None
    return generate(model, tokenizer, templates, args.seed, options, watch=trace), trace


def read_prompts(args):
    """Prompts of the flags -> list. Raises ValueError for a file that is missing or has none."""
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        if not os.path.isfile(args.prompt_file):
            raise ValueError(f"no file of prompts at {args.prompt_file}")
        prompts += [piece.text for piece in data.read_pieces(args.prompt_file)]
        if not prompts:
            raise ValueError(f"no prompts in {args.prompt_file}")
    return prompts


def check_output(args):
    """Raise ValueError where --output would write over the prompts or a file of the run."""
    output = Path(args.output or os.devnull).resolve()
    if args.prompt_file and output == Path(args.prompt_file).resolve():
        raise ValueError(f"--output={args.output} is the file of prompts: give another name")
    if output.parent == Path(args.model_dir).resolve() and output.name in RUN_FILES:
        raise ValueError(f"--output={args.output} is a file of the run: give another name")


def main():
    args = flags().parse_args()
    model, tokenizer, run = load(args.model_dir, args.checkpoint, cli.device(args.device))
    options, prompts = make_options(args, tokenizer, run), read_prompts(args)
    check_output(args)
    for text in dict.fromkeys([*prompts, args.draft or ""]):
        if data.unknown_bytes(re.sub(GAP_MARK, " ", text), tokenizer):
            print(f"the tokenizer does not know all characters or words of {shorten(text)}", file=sys.stderr)
    prompts = [prompt for prompt in prompts or [""] for _ in range(args.num_samples)]
    texts, trace = start(args, model, tokenizer, run, prompts, options)
    total = 0
    with open(args.output or os.devnull, "w", encoding="utf-8") as output:
        bar = tqdm(texts, total=len(prompts), unit="sample", disable=None if len(prompts) > 1 and not args.trace else True)
        for prompt, (ids, calls) in zip(prompts, bar, strict=True):
            text, total = decode(tokenizer, ids), total + calls
            if trace:
                trace.close()
                trace = None
            print(text, flush=True)
            line = dict(prompt=prompt, text=text, ids=ids, calls=calls)
            print(json.dumps(line, ensure_ascii=False), file=output, flush=True)
    if args.until:
        print(f"{total / len(prompts):.1f} network calls a text", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
