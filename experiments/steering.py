"""Measure on the built-in language, where grammar and probabilities are known, how well a model is steered and proof-reads.

    python experiments/steering.py proofread -mdir=runs/demo
"""

import random
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
import proofread
import toy
from sample import Sampler

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


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("what", choices=["proofread"], help="what to measure")
    add("-mdir", "--model_dir", default="runs/demo", help="run folder of the built-in language (runs/demo)")
    add("--n", type=cli.count, default=500, help="sentences (500)")
    add("--seed", type=cli.natural, default=1, help="of the sentences (1)")
    return p


def main():
    args = flags().parse_args()
    for name, share in measure_proofreading(Sampler.load(args.model_dir), args.n, args.seed).items():
        print(f"{share:6.1%}  {name}")


if __name__ == "__main__":
    cli.run(main)
