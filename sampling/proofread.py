"""Find what is odd in a text: how much each token surprises a model that sees all others.

    python sample.py -mdir=RUN_DIR --check "the bakers sees the clock"

    ids    (L,)    the text with bos and eos
    log_p  (L, K)  row d: log p of the token at position d, given all other tokens of the text
"""

import json
import math
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

import bfn
from common.precision import network_of
from model import rows_at_once
from sampling import prompts
from text.tokenizer import one_line

N_SHOWN = 3  # surprising tokens of a text, and suggestions for each
ODD, CLEAR = 4.0, 8.0  # bits of surprise: a terminal shows such tokens in yellow, in red


@dataclass
class Surprise:
    """What the model says of one token of a text."""

    token: str
    bits: float  # -log2 p(token | all others)
    suggestions: list  # (text, probability), the likeliest first


@torch.no_grad()
def leave_one_out_log_p(model, ids):
    """Compute log p of each position of a text (L,) with all others given -> (L, K).

    [Salazar et al. 2020, arXiv 1910.14659]
    """
    device = next(model.parameters()).device
    L, K = len(ids), model.config.K
    ids = torch.tensor(ids, device=device)
    others = ~torch.eye(L, dtype=torch.bool, device=device)
    rows = []
    for cond_mask in others.split(rows_at_once(L, model.config, device)):
        theta = torch.full((*cond_mask.shape, K), 1 / K, device=device)
        t = torch.zeros(cond_mask.shape, device=device)
        texts = ids.expand(cond_mask.shape)
        network = network_of(model, torch.ones_like(texts))
        log_p = bfn.predict(network, theta, t, texts, cond_mask)
        rows.append(log_p[~cond_mask])
    return torch.cat(rows).cpu()


def surprises(sampler, text):
    """Read a text -> a Surprise per token, but for bos and eos. Raises ValueError if too long."""
    ids = sampler.encode(text, "the text")
    tokenizer = sampler.tokenizer
    words = [d for d, k in enumerate(ids) if not tokenizer.is_control[k]]  # no bos, eos or label
    if not words:
        raise ValueError("the text to check is empty")
    log_p = leave_one_out_log_p(sampler.model, ids)
    may_stand = prompts.allowed_tokens(tokenizer)[-prompts.GAP]
    n_shown = min(N_SHOWN, int(may_stand.sum()))
    unknown = prompts.unknown_pieces(text, tokenizer)
    found = []
    before = ""
    for i, d in enumerate(words):
        p, best = log_p[d].exp().masked_fill(~may_stand, 0).topk(n_shown)
        likeliest = zip(best.tolist(), p.tolist(), strict=True)
        suggestions = [(tokenizer.decode([j]), share) for j, share in likeliest]
        # What a token reads as depends on those before it.
        so_far = [ids[j] for j in words[: i + 1]]
        text_so_far = one_line(tokenizer.decode(so_far, unknown))
        bits = -log_p[d, ids[d]].item() / math.log(2)
        found.append(Surprise(text_so_far[len(before) :], bits, suggestions))
        before = text_so_far
    return found


def shade(found):
    """Write a text with control codes that show its surprising tokens -> str."""
    red, yellow, plain = "\x1b[0;31m", "\x1b[0;33m", "\x1b[0m"
    colours = [red if s.bits >= CLEAR else yellow if s.bits >= ODD else plain for s in found]
    return "".join(c + s.token for c, s in zip(colours, found, strict=True)) + plain


def suggested(surprise, form):
    """Write the suggestions for a token with their probabilities -> list of str."""
    return [f"{text} {p:{form}}" for text, p in surprise.suggestions]


def report(found, kind):
    """Describe a text -> lines. kind: "terminal", "columns" (every token, with tabs) or "json"."""
    if kind == "json":
        return [json.dumps([vars(s) for s in found], ensure_ascii=False)]
    if kind == "columns":
        rows = [[s.token.strip(" "), f"{s.bits:.2f}", *suggested(s, ".3f")] for s in found]
        return ["\t".join(row) for row in rows] + [""]
    worst = sorted(found, key=lambda s: -s.bits)[:N_SHOWN]
    width = max((len(s.token.strip(" ")) for s in worst), default=0)
    begins = [f"  {s.token.strip(' '):{width}}  {s.bits:5.1f} bits   " for s in worst]
    lines = [begin + "  ".join(suggested(s, ".0%")) for begin, s in zip(begins, worst, strict=True)]
    return [shade(found), *lines]


def run(sampler, args):
    """Print what is odd in the texts of the flags --check and --check_file."""
    texts = [prompts.read_breaks(text, sampler.run) for text in args.check]
    if args.check_file is not None:
        texts += prompts.read_lines(args.check_file, sampler.run).values()
    for text in texts:
        prompts.check_unicode(text)
    prompts.warn_unknown(texts, sampler.tokenizer)
    kind = "json" if args.json else "terminal" if sys.stdout.isatty() else "columns"
    for text in tqdm(texts, unit="text", disable=True if len(texts) == 1 else None):
        print(*report(surprises(sampler, text), kind), sep="\n", flush=True)
