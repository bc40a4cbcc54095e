"""Measure how well a model of the built-in language is steered, and how well it proof-reads.

    python -m experiments.steering proofread -mdir=runs/demo
    python -m experiments.steering corpus --output=runs/labels.tsv
    python train.py -d=runs/labels.tsv --labelled --tokenizer=word --preset=toy --max_steps=1500 \\
        -mdir=runs/labels
    python -m tools.classify -mdir=runs/demo -d=runs/labels.tsv --output=runs/labels.pt
    python -m experiments.steering labels -mdir=runs/labels
    python -m experiments.steering labels -mdir=runs/demo --classifier=runs/labels.pt

Its grammar is known, and so is the label of a sentence: the number of the subject, "report", or the
name that comes twice. `corpus` writes sentences, each with its label.
"""

import random
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from common import cli
from common.files import replacing
from common.noise import mix_seed
from experiments.tables import table
from sample import Sampler
from sampling import guidance, proofread
from text import toy

WEIGHTS = 0.0, 0.5, 1.0, 2.0, 4.0  # of guidance by the label
SCALES = 0.0, 1.0, 2.0, 4.0, 8.0  # of a classifier
COLUMNS = "method | strength | label right, % | grammatical, % | distinct, % | calls per text"


def with_s(words):
    """List words, and after these the same words with an s."""
    return [*words, *(word + "s" for word in words)]


KINDS = [  # words that stand in each other's place in a sentence, right or wrong
    [*with_s(toy.TRANSITIVE), *with_s(toy.INTRANSITIVE)],
    [*with_s(toy.PEOPLE), *toy.THINGS],
    [*toy.FEMALE, *toy.MALE],
    ["she", "he"],
    ["her", "his"],
]


def corrupt(words, rng):
    """Replace one word by another of its kind, so that the sentence is wrong -> words, position."""
    while True:
        d = rng.randrange(len(words))
        kind = next((kind for kind in KINDS if words[d] in kind), [words[d]])
        others = [word for word in kind if word != words[d]]
        if others:
            wrong = [*words[:d], rng.choice(others), *words[d + 1 :]]
            if not toy.is_grammatical(" ".join(wrong)):
                return wrong, d


def best_possible(words, d):
    """How often the likeliest word at position d is the true one, for a perfect model."""
    p = [toy.probability([*words[:d], word, *words[d + 1 :]]) for word in toy.vocabulary()]
    return max(p) / sum(p)


def measure_proofreading(sampler, n, seed):
    """Proof-read n sentences with one wrong word each -> {what: share}."""
    rng, found = random.Random(seed), Counter()
    for _ in tqdm(range(n), unit="text", disable=None):
        words = toy.sample(rng)
        wrong, d = corrupt(words, rng)
        read = proofread.surprises(sampler, " ".join(wrong))
        order = sorted(range(len(read)), key=lambda i: -read[i].bits)
        first = read[d].suggestions[0][0].strip()
        repaired = toy.is_grammatical(" ".join([*words[:d], first, *words[d + 1 :]]))
        found.update({
            "the wrong word is the most surprising": order[0] == d,
            "it is among the three most surprising": d in order[:3],
            "the first suggestion for it is the true word": first == words[d],
            "the first suggestion for it makes the sentence right": repaired,
            "the true word is the likeliest, for a perfect model": best_possible(words, d),
        })  # fmt: skip
    return {name: total / n for name, total in found.items()}


def label_of(words):
    """The label of a grammatical sentence, a list of words: "one", "many", "report" or a name."""
    if "that" in words:
        return "report"
    if words[0] in toy.FEMALE + toy.MALE:
        return words[0]
    subject = next(word for word in words if word.removesuffix("s") in toy.PEOPLE)
    return "many" if subject.endswith("s") else "one"


LABELS = ["one", "many", "report", *toy.FEMALE, *toy.MALE]


def labelled_corpus(n, seed):
    """Draw sentences with their labels -> str of label<TAB>sentence lines."""
    lines = toy.corpus(n, seed).splitlines()
    return "".join(f"{label_of(line.split())}\t{line}\n" for line in lines)


def judge(samples, wanted):
    """Judge (text, calls) samples, the wanted label of each -> {what: figure}."""
    texts = [text.rpartition("\t")[2] for text, _ in samples]
    good = [toy.is_grammatical(text) for text in texts]
    judged = zip(texts, good, wanted, strict=True)
    hits = [ok and label_of(text.split()) == label for text, ok, label in judged]
    bodies = {text.partition(" ")[2] for text in texts}  # the label may say the first word
    n_calls = sum(calls for _, calls in samples)
    figures = dict(right=sum(hits), grammatical=sum(good), distinct=len(bodies), calls=n_calls)
    return {name: value / len(texts) for name, value in figures.items()}


def measure_rejection(sampler, n, seed):
    """Sample free texts and keep those with the wanted label -> figures."""
    wanted = [label for label in LABELS for _ in range(n)]
    free = [(text, calls) for text, _, calls in sampler.stream([""] * len(wanted), seed)]
    texts = [text.rpartition("\t")[2] for text, _ in free]
    found = [label_of(text.split()) for text in texts if toy.is_grammatical(text)]
    tries = [len(texts) / max(1, found.count(label)) for label in LABELS]  # until a text has it
    figures = judge(free, wanted)
    calls = figures["calls"] * sum(tries) / len(tries)
    return figures | dict(method="rejection", strength=0.0, right=1.0, calls=calls)


def measure_labels(sampler, classifier, n, seed):
    """Sample n texts of each label at each strength -> list of figures; rejection is the first.

    Without a classifier the label begins the prompt, and the strength is the weight W of guidance.
    """
    rows = [measure_rejection(sampler, n, seed)]
    wanted = [label for label in LABELS for _ in range(n)]
    for strength in tqdm(SCALES if classifier else WEIGHTS, unit="strength", disable=None):
        samples = []
        for label in LABELS:
            if classifier:
                steered = dict(guide=classifier.guide(label), scale=strength)
            else:
                steered = dict(label=label, guidance=strength)
            drawn = sampler.stream([""] * n, mix_seed(seed, label), **steered)
            samples += [(text, calls) for text, _, calls in drawn]
        method = dict(method="classifier" if classifier else "label", strength=strength)
        rows.append(judge(samples, wanted) | method)
    return rows


def label_table(rows):
    """Lay out the figures of `measure_labels` -> lines of Markdown."""
    cells = "{method}|{strength:g}|{right:.1%}|{grammatical:.1%}|{distinct:.1%}|{calls:.1f}"
    return table(COLUMNS.split(" | "), [cells.format(**row).split("|") for row in rows])


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("what", choices=["proofread", "corpus", "labels"], help="what to do")
    add("-mdir", "--model_dir", type=cli.path, default="runs/demo",
        help="run folder of the built-in language (runs/demo)")
    add("--classifier", type=cli.path,
        help="labels: file of classify.py; without it, the model must be one of labelled texts")
    add("--n", type=cli.count, help="sentences (500; corpus 60000; labels 40 of each label)")
    add("--seed", type=cli.natural, default=1, help="of the sentences (1)")
    add("--output", type=cli.path, help="corpus: file to write")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    if args.what == "corpus" and not args.output:
        raise ValueError("corpus writes a file: give --output=FILE.tsv")
    if args.what == "corpus":
        with replacing(Path(args.output)) as path:
            path.write_text(labelled_corpus(args.n or 60_000, args.seed))
        return
    sampler = Sampler.load(args.model_dir)
    if args.what == "proofread":
        for name, share in measure_proofreading(sampler, args.n or 500, args.seed).items():
            print(f"{share:6.1%}  {name}")
        return
    torch.manual_seed(0)
    classifier = guidance.load_classifier(args.classifier, sampler) if args.classifier else None
    rows = measure_labels(sampler, classifier, args.n or 40, args.seed)
    print(*label_table(rows), sep="\n")


if __name__ == "__main__":
    cli.run(main)
