"""Measure on the built-in language, where grammar and labels are known, how well a model is steered and proof-reads.

    python -m experiments.steering proofread -mdir=runs/demo
    python -m experiments.steering corpus --output=runs/labels.tsv        its sentences, each with its label
    python train.py -d=runs/labels.tsv --labelled --tokenizer=word --preset=toy --max_steps=1500 -mdir=runs/labels
    python -m tools.classify -mdir=runs/demo -d=runs/labels.tsv --output=runs/labels.pt
    python -m experiments.steering labels -mdir=runs/labels
    python -m experiments.steering labels -mdir=runs/demo --classifier=runs/labels.pt

The label is a function of the sentence: the number of the subject, "report", or the name that comes twice.
"""

import json
import random
from pathlib import Path

import torch
from tqdm import tqdm

from common import cli, drawing
from common.files import replacing
from common.noise import mix_seed
from sample import Sampler
from sampling import guidance, proofread
from text import toy

ROOT = Path(__file__).resolve().parent.parent




WEIGHTS = 0.0, 0.5, 1.0, 2.0, 4.0  # of guidance by the label
SCALES = 0.0, 1.0, 2.0, 4.0, 8.0  # of a classifier
KINDS = [  # words that stand in each other's place in a sentence, right or wrong
    [*toy.TRANSITIVE, *(word + "s" for word in toy.TRANSITIVE), *toy.INTRANSITIVE, *(word + "s" for word in toy.INTRANSITIVE)],
    [*toy.PEOPLE, *(word + "s" for word in toy.PEOPLE), *toy.THINGS],
    [*toy.FEMALE, *toy.MALE],
    ["she", "he"],
    ["her", "his"],
]


def corrupt(words, rng):
    """Replace one word by another of its kind, so that the sentence is not grammatical -> words, position of the word."""
    while True:
        d = rng.randrange(len(words))
        others = [word for kind in KINDS if words[d] in kind for word in kind if word != words[d]]
        if others:
            wrong = [*words[:d], rng.choice(others), *words[d + 1 :]]
            if not toy.is_grammatical(" ".join(wrong)):
                return wrong, d


def best_possible(words, d):
    """How often the likeliest word at position d, given all others, is the true one: that of a perfect model."""
    p = {word: toy.probability([*words[:d], word, *words[d + 1 :]]) for word in toy.vocabulary()}
    return max(p.values()) / sum(p.values())


def measure_proofreading(sampler, n, seed):
    """Proof-read n sentences with one wrong word each -> {what: share}."""
    rng, found = random.Random(seed), []
    for _ in tqdm(range(n), unit="text", disable=None):
        words = toy.sample(rng)
        wrong, d = corrupt(words, rng)
        read = proofread.surprises(sampler, " ".join(wrong))
        order = sorted(range(len(read)), key=lambda i: -read[i].bits)
        first = read[d].suggestions[0][0].strip()
        repaired = toy.is_grammatical(" ".join([*words[:d], first, *words[d + 1 :]]))
        found.append((order[0] == d, d in order[:3], first == words[d], repaired, best_possible(words, d)))
    names = (
        "the wrong word is the most surprising",
        "it is among the three most surprising",
        "the first suggestion for it is the true word",
        "the first suggestion for it makes the sentence right",
        "the true word is the likeliest, for a perfect model",
    )
    return {name: sum(column) / n for name, column in zip(names, zip(*found, strict=True), strict=True)}


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
    return "".join(f"{label_of(line.split())}\t{line}\n" for line in toy.corpus(n, seed).splitlines())


def judge(samples, wanted):
    """Judge (text, calls) samples, the wanted label of each -> {what: figure}."""
    texts = [text.rpartition("\t")[2] for text, _ in samples]
    good = [toy.is_grammatical(text) for text in texts]
    hits = [ok and label_of(text.split()) == label for text, ok, label in zip(texts, good, wanted, strict=True)]
    words = [tuple(text.split()[1:]) for text in texts]  # without the first word, which the label may say
    figures = dict(right=sum(hits), grammatical=sum(good), distinct=len(set(words)), calls=sum(calls for _, calls in samples))
    return {name: value / len(texts) for name, value in figures.items()}


def measure_labels(sampler, classifier, n, seed):
    """Sample n texts of each label at each strength -> list of figures.

    Without a classifier the label begins the prompt, and the strength is the weight W of guidance. Rejection: free samples of
    which those with the wanted label are kept.
    """
    rows, wanted = [], [label for label in LABELS for _ in range(n)]
    free = [(text, calls) for text, _, calls in sampler.stream([""] * len(wanted), seed)]
    texts = [text.rpartition("\t")[2] for text, _ in free]
    found = [label_of(text.split()) for text in texts if toy.is_grammatical(text)]
    figures = judge(free, wanted)
    tries = sum(len(texts) / max(1, found.count(label)) for label in LABELS) / len(LABELS)  # until a text has its label
    rows.append(figures | dict(method="rejection", strength=0.0, right=1.0, calls=figures["calls"] * tries))
    for strength in tqdm(SCALES if classifier else WEIGHTS, unit="strength", disable=None):
        samples = []
        for label in LABELS:
            steered = dict(guide=classifier.guide(label), scale=strength) if classifier else dict(label=label, guidance=strength)
            drawn = sampler.stream([""] * n, mix_seed(seed, label), **steered)
            samples += [(text, calls) for text, _, calls in drawn]
        rows.append(dict(judge(samples, wanted), method="classifier" if classifier else "label", strength=strength))
    return rows


def label_table(rows):
    """Lay out the figures of `measure_labels` -> lines of Markdown."""
    lines = ["| method | strength | label right, % | grammatical, % | distinct, % | calls per text |", "|---|---|---|---|---|---|"]
    return lines + [
        f"| {r['method']} | {r['strength']:g} | {r['right']:.1%} | {r['grammatical']:.1%} | {r['distinct']:.1%} | {r['calls']:.1f} |"
        for r in rows
    ]


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
    add("--output", type=cli.path,
        help="corpus: file to write; labels: FILE.json, with a picture next to it")
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
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1))
        x = [r["strength"] for r in rows[1:]]
        series = {what: (x, [100 * r[what] for r in rows[1:]]) for what in ("right", "grammatical", "distinct")}
        name = "scale" if classifier else "W"
        drawing.lines(Path(args.output).with_suffix(".png"), series, name, "% of samples", "steering by a classifier" if classifier else "steering by a label that is given")


if __name__ == "__main__":
    cli.run(main)
