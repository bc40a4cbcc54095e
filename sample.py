"""Print text from a trained model: free, from a prompt, or filling gaps.

    python sample.py -mdir=RUN_DIR --prompt "the ___ is sweet"

A template is a list with one entry a position: the id of a given token, or what may be drawn there (FREE, ...).
"""

import json
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from tqdm import tqdm

import bfn
import cli
import data
from model import load

FREE, GAP, WORD_START, WORD_REST = -1, -2, -3, -4  # any text; no end of text; first, later token of a word
GAP_MARK = r"___(?:\{(\d+)\})?"
STATE_SIZE = 1 << 24  # elements of the state (B, L, K) in a batch: a few tensors of 64 MB each


# ---------------------------------------------------------------- templates


@lru_cache(maxsize=4)
def allowed_tokens(tokenizer):
    """Which tokens may be drawn at each kind of position: (5, K) bool, indexed by minus the kind; 0 is given, anything."""
    K = len(tokenizer)
    pieces = [tokenizer.id_to_piece(i) for i in range(K)]
    text = torch.tensor(
        [not (tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)) for i in range(K)]
    )
    spaced = torch.tensor([piece.startswith("\u2581") for piece in pieces])
    whole = torch.tensor([not tokenizer.is_byte(i) and pieces[i] != "\u2581" for i in range(K)])
    allowed = torch.stack([torch.ones_like(text), text, text, text & spaced & whole, text & ~spaced & whole])
    if tokenizer.eos_id() >= 0:
        allowed[-FREE, tokenizer.eos_id()] = True
    allowed[~allowed.any(1)] = text  # a vocabulary without spaces, say
    return allowed


@lru_cache(maxsize=4)
def space_style(tokenizer):
    """Whether some token is a space and more, and whether some token continues a word -> (bool, bool).

    (True, True) for subwords, (False, True) for characters, (True, False) for whole words.
    """
    text = [i for i in range(len(tokenizer)) if not (tokenizer.is_control(i) or tokenizer.is_unknown(i))]
    pieces = [tokenizer.id_to_piece(i) for i in text if not tokenizer.is_byte(i)]
    return any(len(p) > 1 and p[0] == "\u2581" for p in pieces), any(p[0] != "\u2581" for p in pieces)


def continue_text(text, tokenizer):
    """Tokens of a text after a gap, for a tokenizer that puts a space before every text. Raises ValueError if it must."""
    ids = tokenizer.encode(text.removeprefix(" "))
    if ids and not text.startswith(" "):
        if tokenizer.id_to_piece(ids[0]) != "\u2581":
            raise ValueError(f"this tokenizer cannot join {text!r} to a gap: put a space between them")
        ids = ids[1:]
    return ids


def shorten(prompt):
    """A prompt as error messages show it."""
    return ascii(prompt) if len(prompt) <= 60 else ascii(prompt[:60]) + "..."


def parse_prompt(prompt, tokenizer, word_lengths, rng):
    """Turn text with gaps into a template -> (template without bos and eos, whether it had a gap).

    ___ is one word, of as many tokens as a random word of the training text has; ___{3} is three tokens. A space
    before a gap belongs to the gap's first token where the tokenizer joins them. Raises ValueError for a gap that is
    written otherwise, and for text that is not Unicode.
    """
    if re.search(r"____|___\{(?!\d+\})", prompt):
        raise ValueError(f"{shorten(prompt)}: a gap is ___ or ___{{N}}")
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError(f"{shorten(prompt)} is not UTF-8: convert it, say with iconv")
    (joins, continues), prefix = space_style(tokenizer), data.adds_prefix(tokenizer)
    texts = re.split(GAP_MARK, prompt)  # text, count or None, text, ...
    template = []
    for i, text in enumerate(texts):
        if i % 2 == 0:
            space = text.endswith(" ") or (not text and i == 0 and prefix)
            body = text.removesuffix(" ")  # the tokenizer may strip it
            template += tokenizer.encode(body) if i == 0 or not prefix else continue_text(body, tokenizer)
            if body != text and not joins:
                template.append(tokenizer.piece_to_id("\u2581"))
        elif text is not None:
            template += [GAP] * min(int(text), 1_000_000)
        else:
            n = rng.choices(range(len(word_lengths)), word_lengths)[0] if continues else 1
            if joins:
                template += [WORD_START if space else WORD_REST] + [WORD_REST] * (n - 1)
            else:
                template += [WORD_REST] * max(1, n - 1)  # the space is counted in n and stands outside
    return template, len(texts) > 1


def make_template(prompt, tokenizer, run, seed, length=None):
    """Complete a prompt to a template of a whole text, drawing lengths from the training text's.

    A prompt with gaps is the whole text; one without is continued. Raises ValueError where it does not fit.
    """
    rng = random.Random(seed)
    bos, eos = ([i] if i >= 0 else [] for i in (tokenizer.bos_id(), tokenizer.eos_id()))
    body, closed = parse_prompt(prompt, tokenizer, run["word_lengths"], rng)
    limit = run["args"]["sequence_length"]
    if closed:
        template = bos + body + eos
        if all(kind >= 0 for kind in template):
            raise ValueError(f"{shorten(prompt)} has a gap of no tokens: nothing is left to sample")
        limit = length or limit
        if len(template) > limit:
            raise ValueError(f"{shorten(prompt)} takes {len(template)} tokens, the model was trained on {limit}")
        return template
    given = bos + body
    if length is None:
        weights = [n * (i > len(given)) for i, n in enumerate(run["lengths"])]
        length = rng.choices(range(len(weights)), weights)[0] if any(weights) else limit
    if length <= len(given):
        raise ValueError(
            f"{shorten(prompt)} takes {len(given)} tokens and leaves nothing of length {length}: raise --length"
        )
    return given + [FREE] * (length - len(given))


# ---------------------------------------------------------------- what the user knows


def find_token(text, tokenizer):
    """The one token of a text, with a space before it or without -> its ids. Raises ValueError where there is none."""
    ids = {tokenizer.piece_to_id(piece) for piece in (text, "\u2581" + text)} - {tokenizer.unk_id()}
    if not ids:
        pieces = " ".join(tokenizer.encode(text, out_type=str))
        raise ValueError(f"{text!r} is not one token of this tokenizer, but {pieces}: name single tokens")
    return sorted(ids)


def parse_hint(text, tokenizer):
    """ "3:cat=0.7,dog=0.3" -> position, log-odds (K,).

    Odds are what was observed at the position: 0.7 for cat, 0.3 for dog, the rest to 1 spread over all other tokens, and a
    ten-thousandth at the least, as nothing is certain. Raises ValueError for what is written otherwise.
    """
    position, colon, odds = text.partition(":")
    pairs = [pair.rpartition("=") for pair in odds.split(",")]
    try:
        shares, position = {word: float(share) for word, _, share in pairs}, int(position)
        if not colon or position < 0 or not all(0 < share <= 1 for share in shares.values()) or sum(shares.values()) > 1.001:
            raise ValueError
    except ValueError:
        raise ValueError(f"--hint {text}: write POSITION:TOKEN=SHARE,TOKEN=SHARE, shares of at most 1 together") from None
    K = len(tokenizer)
    hint = torch.full((K,), math.log(max(1e-4, 1 - sum(shares.values())) / K))
    for word, share in shares.items():
        hint[find_token(word, tokenizer)] = math.log(share)
    return position, hint


def make_hint(hints, templates, bos, K):
    """Parsed hints [(position, log-odds)] -> hint for a batch of templates (B, L, K). Positions count the text's tokens."""
    hint = torch.zeros(len(templates), max(map(len, templates)), K)
    for position, odds in hints:
        for row, template in zip(hint, templates, strict=True):
            if position + bos >= len(template):
                raise ValueError(f"a hint is for token {position}, a text has {len(template) - bos}: raise --length")
            row[position + bos] += odds
    return hint


# ---------------------------------------------------------------- generation


@dataclass(frozen=True)
class Options:
    """How to sample; the defaults are the best we measured (README)."""

    solver: str = "commit"
    steps: int = 32
    curve: list | None = None  # loss by time, for a learned time grid
    temperature: float = 1.0
    top_p: float = 1.0
    argmax: bool = False
    until: float = 0.0  # nats
    hints: tuple = ()  # (position, log-odds (K,))
    banned: tuple = ()  # ids
    draft: tuple = ()  # ids of a text, of which there is as much evidence as the flow brings until `strength`
    strength: float = 0.0


def generate(model, tokenizer, templates, seed, options=Options(), first=0, watch=None):
    """Yield ids and network calls for each template, batch by batch.

    Template i draws its noise from (seed, first + i), whatever its neighbours; texts of like length share a batch.
    watch(t, p, given) sees every call of the first batch.
    """
    K, longest = model.config.K, max(map(len, templates), default=1)
    rows = max(1, STATE_SIZE // (K * longest))
    for start in range(0, len(templates), 16 * rows):  # sorted by length, a few batches at a time
        group = range(start, min(start + 16 * rows, len(templates)))
        order, done = sorted(group, key=lambda i: len(templates[i])), {}
        for at in range(0, len(order), rows):
            batch = order[at : at + rows]
            seeds = [bfn.mix_seed(seed, first + i) for i in batch]
            watch_now = watch if start == at == 0 else None
            done.update(zip(batch, sample_batch(model, tokenizer, [templates[i] for i in batch], seeds, options, watch_now)))
        yield from (done[i] for i in group)


def sample_batch(model, tokenizer, templates, seeds, options, watch=None):
    """Sample templates side by side, each from its own seed -> [(ids, calls)]."""
    device, K, s1 = next(model.parameters()).device, model.config.K, model.config.s1
    lengths = [len(template) for template in templates]
    padded = torch.tensor([t + [0] * (max(lengths) - len(t)) for t in templates], device=device)
    segment_ids = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
    draws = bfn.Draws(lengths, [torch.Generator(device).manual_seed(s) for s in seeds], device)
    allowed, hint = allowed_tokens(tokenizer).to(device).clone(), None
    allowed[1:, list(options.banned)] = False
    allowed = allowed[(-padded).clamp(min=0)]
    if options.hints:
        hint = make_hint(options.hints, templates, tokenizer.bos_id() >= 0, K).to(device)
    if options.draft:
        draft = torch.tensor(options.draft, device=device).expand(padded.shape)
        t = torch.full(padded.shape, options.strength, device=device)
        evidence = bfn.flow(draft, t, s1, K, draws.normal((*padded.shape, K)))
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
        draws=draws,
        watch=watch,
    )
    return [(row[:n], c) for row, n, c in zip(ids.tolist(), lengths, calls.tolist(), strict=True)]


def generate_long(model, tokenizer, length, limit, seed, options):
    """Write a text longer than the trained length, block after block, the last half of a block given to the next.

    -> ids, calls. Ends at eos.
    """
    bos = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else []
    text, calls = bos, 0
    while len(text) < length and tokenizer.eos_id() not in text:
        given = text[-(limit // 2) :]
        template = given + [FREE] * min(limit - len(given), length - len(text))
        ((ids, n),) = generate(model, tokenizer, [template], bfn.mix_seed(seed, len(text)), options)
        text, calls = text + ids[len(given) :], calls + n
    return text, calls


def decode(tokenizer, ids):
    """ids -> one line of text, up to the first eos."""
    if tokenizer.eos_id() in ids:
        ids = ids[: ids.index(tokenizer.eos_id())]
    return " ".join(tokenizer.decode([i for i in ids if i != tokenizer.bos_id()]).splitlines())


class Trace:
    """Shows the first sample at every call on standard error, certain tokens bold and uncertain ones dim.

    In place and at a readable pace in a terminal; elsewhere a line a call, without control codes.
    """

    def __init__(self, tokenizer, n, file=sys.stderr):
        self.tokenizer, self.n, self.file, self.terminal, self.lines = tokenizer, n, file, file.isatty(), 0

    def __call__(self, t, p, given):
        p, given = p[0, : self.n].cpu(), given[0, : self.n].tolist()
        ids, certainty = p.argmax(-1).tolist(), p.amax(-1).tolist()
        if not self.terminal:
            print(f"t = {t:.3f}  {decode(self.tokenizer, ids)}", file=self.file)
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
        help=f"steps; network calls, but for commit one more ({defaults.steps})",
    )
    add("--time_grid", choices=["uniform", "learned"], default="uniform", help="even, or steps of equal loss (uniform)")
    add("--temperature", type=cli.positive, default=1.0, help="of the output distribution (1)")
    add("--top_p", type=cli.zero_to_one, default=1.0, help="keep the likeliest tokens that sum to this (1)")
    add("--argmax", action="store_true", help="read out the likeliest tokens at the end, in place of drawing them")
    add("--until", type=cli.non_negative, default=0.0, help="stop a text whose mean entropy is below this, nats a token (0)")
    add("--ban", action="append", default=[], help="a token never to be drawn; repeatable")
    add("--hint", action="append", default=[], help="odds at a token's position, as 3:cat=0.7,dog=0.3; repeatable")
    add("--draft", help="text to edit: the more of it stays, the higher --strength")
    add("--strength", type=cli.share, default=0.4, help="evidence for --draft, as the time that brings as much (0.4)")
    add("--seed", type=int, default=0, help="a sample depends on the seed and its number alone (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--output", help="also write JSON lines with prompt, text, ids and network calls to this file")
    add("--trace", action="store_true", help="show the first sample at every step, on standard error")
    return p


def make_options(args, tokenizer, run):
    """Flags -> Options. Raises ValueError for what the tokenizer or the run does not know."""
    draft = ()
    if args.draft is not None:
        marks = ([i] if i >= 0 else [] for i in (tokenizer.bos_id(), tokenizer.eos_id()))
        draft = tuple(next(marks) + tokenizer.encode(args.draft) + next(marks))
        if args.prompt or args.prompt_file:
            raise ValueError("--draft is the whole text: it goes with neither --prompt nor --prompt_file")
    if args.time_grid == "learned" and "loss_by_time" not in run:
        raise ValueError("this run has no loss by time, being older: use --time_grid=uniform")
    return Options(
        solver=args.solver,
        steps=args.steps,
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


def read_prompts(args):
    """Prompts of the flags -> list. Raises ValueError for a file without any."""
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        prompts += [piece.text for piece in data.read_pieces(args.prompt_file)]
        if not prompts:
            raise ValueError(f"no prompts in {args.prompt_file}")
    return prompts


def main():
    args = flags().parse_args()
    model, tokenizer, run = load(args.model_dir, args.checkpoint, cli.device(args.device))
    options, prompts = make_options(args, tokenizer, run), read_prompts(args)
    for prompt in prompts:
        if data.unknown_bytes(re.sub(GAP_MARK, " ", prompt), tokenizer):
            print(f"the tokenizer does not know all characters or words of {shorten(prompt)}", file=sys.stderr)
    prompts = [prompt for prompt in prompts or [""] for _ in range(args.num_samples)]
    limit = run["args"]["sequence_length"]
    if (args.length or 0) > limit and prompts[0] == "" and not options.draft:
        texts = (
            generate_long(model, tokenizer, args.length, limit, bfn.mix_seed(args.seed, i), options)
            for i in range(len(prompts))
        )
        trace = None
    else:
        seeds = [bfn.mix_seed(args.seed, i) for i in range(len(prompts))]
        templates = [make_template(p, tokenizer, run, s, args.length) for p, s in zip(prompts, seeds, strict=True)]
        if options.draft:
            templates = [[FREE] * len(options.draft)] * len(prompts)
        trace = Trace(tokenizer, len(templates[0])) if args.trace else None
        texts = generate(model, tokenizer, templates, args.seed, options, watch=trace)
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
