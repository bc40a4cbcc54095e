"""Compare samplers at equal numbers of network calls, in a table that plot.py quality draws.

    python -m experiments.samplers -mdir=runs/demo
    python -m experiments.samplers -mdir=RUN_DIR -d=VALID.txt --num_samples=64 --length=128
    python -m experiments.samplers -mdir=runs/demo --calls=20 --temperatures 0.6 0.8

The texts of each sampler are compared with equally many held-out texts, by the figures of
evaluation/quality.py with bootstrap intervals. For a model of the built-in language, their grammar
is checked too.

"pace" is the default of sample.py, with a third of the calls, at most four, for corrections. It and
"commit" make fewer calls than asked for if a text has fewer tokens. A lower temperature makes texts
better and less diverse: with --temperatures, the picture shows the frontier of both.
"""

import json
import math
import shlex
import time
from itertools import product
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
from tqdm import tqdm

import bfn
import evaluate
from common import files, parallel
from evaluation import quality
from experiments.tables import table
from sampling.generate import DEFAULT, Options, generate
from sampling.prompts import make_template
from text import cache, toy
from text.reading import Corpus
from training.checkpoint import load

# ---------------------------------------------------------------- sampling


def measure(texts, reference, is_toy, seed):
    """Compute the figures of texts, of the built-in language also the grammatical share."""
    measured = quality.figures(texts, reference, seed)
    if is_toy:
        p = sum(map(toy.is_grammatical, texts)) / len(texts)
        margin = 1.96 * math.sqrt(p * (1 - p) / len(texts))
        measured = {"grammatical": (p, p - margin, p + margin)} | measured
    return measured


def sample(model, tokenizer, job, templates, seed):
    """Sample with a job (sampler, calls, temperature) -> texts, calls per text, seconds."""
    sampler, calls, temperature = job
    corrections = min(DEFAULT.corrections, calls // 3) if sampler == "pace" else 0
    steps = calls - corrections
    if getattr(bfn.SAMPLERS[sampler], "func", None) is bfn.solve:
        steps -= 1  # solvers make one call more
    options = Options(bfn.Controls(sampler, steps, corrections, temperature))
    begin = time.perf_counter()
    samples = list(generate(model, tokenizer, templates, seed, options))
    seconds = time.perf_counter() - begin
    calls_per_text = sum(calls for _, calls in samples) / len(samples)
    return [tokenizer.decode(ids) for ids, _ in samples], calls_per_text, seconds


def record(job, figures, n_texts=0, calls_per_text=0, seconds=0):
    """Collect what results.json keeps of a job (sampler, calls, temperature)."""
    result = dict(zip(("sampler", "calls", "temperature"), job, strict=True), figures=figures)
    return result | dict(n_texts=n_texts, calls_per_text=calls_per_text, seconds=seconds)


def summarise(results):
    """Lay out results -> Markdown lines."""
    rows = []
    for r in results:
        job = [r["sampler"], f"{r['calls_per_text']:.4g}", f"{r['temperature']:g}"]
        figures = [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in r["figures"].values()]
        texts_per_s = f"{r['n_texts'] / r['seconds']:.1f}" if r["seconds"] else ""
        rows.append([*job, *figures, texts_per_s])
    return table(["sampler", "calls", "temperature", *results[0]["figures"], "texts/s"], rows)


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    p.add_flags("-mdir --seed --device --cache_dir")
    add("-d", "--data_path", type=cli.path,
        help="held-out text (the validation text of the model)")
    add("--corpus", type=cli.path,
        help="training text that samples are compared with (the one of the model)")
    add("--samplers", nargs="+", choices=bfn.SAMPLERS, default=[*bfn.SAMPLERS],
        help="samplers to compare (all)")
    add("--calls", nargs="+", type=cli.several, default=[5, 10, 20, 50, 100],
        help="numbers of network calls (5 10 20 50 100)")
    add("--temperatures", nargs="+", type=cli.positive, default=[],
        help="temperatures of the output, besides 1")
    add("--num_samples", type=cli.several, default=256, help="texts per sampler (256)")
    add("--length", type=cli.several,
        help="longest text, in tokens (the sequence length of the training)")
    add("--output", type=cli.path, default="runs/samplers",
        help="folder for results.json and results.md (runs/samplers)")
    return p


def held_out_texts(args, run, tokenizer, corpus):
    """Choose texts from -d, or from the validation text -> texts, their lengths in tokens."""
    trained = run["args"]["sequence_length"]
    window = args.length or trained
    if window > trained:
        message = f"--length={window}, but the model was trained on texts of at most"
        raise ValueError(f"{message} {trained} tokens")
    text, part = corpus, "val"
    if path := args.data_path or run["args"]["val_path"]:
        text, part = Corpus(path, run["args"]["text_field"]), "all"
    tokens = cache.load_corpus(text, tokenizer, args.cache_dir, part, run["args"]["example"])
    return quality.choose_texts(tokens, window, args.num_samples, args.seed)


def main(argv=None):
    args = flags().parse_args(argv)
    device = parallel.find_device(args.device)
    model, tokenizer, run = load(args.model_dir, device=device)
    is_toy, folder = run["args"]["data_path"] is None, Path(args.output)
    files.check_folder(folder, "results.json", lambda p: "sampler" in json.loads(p.read_text())[0])
    corpus, part = evaluate.find_corpus(args, tokenizer, run)
    real, lengths = held_out_texts(args, run, tokenizer, corpus)
    reference = quality.Reference.fit(corpus, tokenizer, part, run["args"]["example"])
    templates = [make_template("", tokenizer, run, i, n) for i, n in enumerate(lengths)]
    figures = measure(real, reference, is_toy, args.seed)
    results = [record(("held-out text", 0, 1.0), figures, len(real))]
    jobs = dict.fromkeys(product(args.samplers, args.calls, (1.0, *args.temperatures)))
    for job in tqdm(jobs, disable=None):
        texts, *spent = sample(model, tokenizer, job, templates, args.seed)
        figures = measure(texts, reference, is_toy, args.seed)
        results.append(record(job, figures, len(texts), *spent))
        # all can take hours, so each result is kept
        files.write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
    lines = summarise(results)
    files.write_whole(folder / "results.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    print("as a picture: python plot.py quality", shlex.quote(str(folder / "results.json")))


if __name__ == "__main__":
    cli.run(main)
