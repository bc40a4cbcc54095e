"""Print text from a trained model: free, from a prompt, or filling gaps.

    python sample.py -mdir=RUN_DIR --prompt "the ___ is sweet"

A template is a list with one entry a position: the id of a given token, or what may be drawn there (FREE, ...).
"""

import json
import os
import random
import re
import sys
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


# ---------------------------------------------------------------- generation


def generate(model, tokenizer, templates, n_steps, seed, first=0, watch=None):
    """Yield a list of ids for each template, batch by batch.

    Template i draws its noise from (seed, first + i), whatever its neighbours. watch(t, p) sees every step of the
    first batch.
    """
    device, K = next(model.parameters()).device, model.config.K
    allowed = allowed_tokens(tokenizer).to(device)
    rows = max(1, STATE_SIZE // (K * max(map(len, templates), default=1)))
    for start in range(0, len(templates), rows):
        batch = templates[start : start + rows]
        lengths = [len(template) for template in batch]
        padded = torch.tensor([t + [0] * (max(lengths) - len(t)) for t in batch], device=device)
        segment_ids = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
        seeds = [bfn.mix_seed(seed, first + start + i) for i in range(len(batch))]
        ids = bfn.sample_ancestral(
            partial(model, segment_ids=segment_ids),
            padded.clamp(min=0),
            cond_mask=padded >= 0,
            s1=model.config.s1,
            K=K,
            n_steps=n_steps,
            allowed=allowed[(-padded).clamp(min=0)],
            lengths=lengths,
            generators=[torch.Generator(device).manual_seed(s) for s in seeds],
            watch=watch if start == 0 else None,
        )
        yield from (row[:n] for row, n in zip(ids.tolist(), lengths, strict=True))


def decode(tokenizer, ids):
    """ids -> one line of text, up to the first eos."""
    if tokenizer.eos_id() in ids:
        ids = ids[: ids.index(tokenizer.eos_id())]
    return " ".join(tokenizer.decode([i for i in ids if i != tokenizer.bos_id()]).splitlines())


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    p.add_argument("--checkpoint", choices=["best", "last"], default="best", help="best by validation, or last (best)")
    p.add_argument("--prompt", action="append", default=[], help="beginning of a text, or a text with gaps; repeatable")
    p.add_argument("--prompt_file", help="file with one prompt a line")
    p.add_argument("--num_samples", type=cli.count, default=8, help="samples for each prompt (8)")
    p.add_argument("--length", type=cli.count, help="tokens, bos and eos included (drawn from the training lengths)")
    p.add_argument("--steps", type=cli.count, default=100, help="sampling steps; network calls are one more (100)")
    p.add_argument("--seed", type=int, default=0, help="a sample depends on the seed and its number alone (0)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    p.add_argument("--output", help="also write JSON lines with prompt, text and ids to this file")
    p.add_argument("--trace", action="store_true", help="show the first sample at every step, on standard error")
    return p


def main():
    args = flags().parse_args()
    model, tokenizer, run = load(args.model_dir, args.checkpoint, cli.device(args.device))
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        prompts += [piece.text for piece in data.read_pieces(args.prompt_file)]
        if not prompts:
            raise ValueError(f"no prompts in {args.prompt_file}")
    unique = prompts
    prompts = [prompt for prompt in prompts or [""] for _ in range(args.num_samples)]
    templates = [
        make_template(prompt, tokenizer, run, bfn.mix_seed(args.seed, i), args.length) for i, prompt in enumerate(prompts)
    ]
    for prompt in unique:
        if data.unknown_bytes(re.sub(GAP_MARK, " ", prompt), tokenizer):
            print(f"the tokenizer does not know all characters or words of {shorten(prompt)}", file=sys.stderr)
    n = len(templates[0])

    def show(t, p):
        print(f"t = {t:.3f}  {decode(tokenizer, p[0, :n].argmax(-1).tolist())}", file=sys.stderr)

    texts = generate(model, tokenizer, templates, args.steps, args.seed, watch=show if args.trace else None)
    with open(args.output or os.devnull, "w", encoding="utf-8") as output:
        for prompt, ids in zip(prompts, tqdm(texts, total=len(prompts), unit="sample", disable=None), strict=True):
            text = decode(tokenizer, ids)
            print(text, flush=True)
            print(json.dumps(dict(prompt=prompt, text=text, ids=ids), ensure_ascii=False), file=output, flush=True)


if __name__ == "__main__":
    cli.run(main)
