"""Train a classifier of noisy texts, so that samples can be steered to a label.

    python -m tools.classify -mdir=RUN_DIR -d=LABELLED.tsv --output=CLASSIFIER.pt
    python sample.py -mdir=RUN_DIR --classifier=CLASSIFIER.pt --label=food --scale=2

Each line of the text is `label<TAB>text`. The network of the run is frozen. A small head reads its
hidden states, for the same noisy inputs and times as in training. It must recognise a text before
the text is finished.

    log_p  (B, n_labels)  log-probabilities of the labels of each text
"""

import collections
import random
import shlex
from itertools import count, islice
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import bfn
import data
from common import files
from data import pad
from sample import Sampler
from sampling.guidance import Classifier, load_classifier, save_classifier
from text.reading import read_pieces
from training.times import draw_times

BATCH = 32  # texts
HELD_OUT_SHARE = 0.1
ACCURACY_TIMES = 0.0, 0.2, 0.4, 0.6, 0.8, 1.0  # at which the accuracy is measured


def read_labelled(path, sampler):
    """Read a text of label<TAB>text lines -> list of (label, ids).

    Raises ValueError for fewer than two labels, and for a line without a tab or that is too long.
    """
    examples = []
    for piece in read_pieces(path, "labelled"):
        name = f"{path}, example {piece.number + 1}"
        if not piece.text.strip():
            raise ValueError(f"{name} has a label and no text")
        examples.append((piece.label, sampler.encode(piece.text, name)))
    labels = collections.Counter(label for label, _ in examples)
    if len(labels) < 2 or min(labels.values()) < 2:
        rare = ", ".join(f"{label} ({n})" for label, n in labels.items()) or "none"
        needed = "two or more labels with at least two texts each"
        raise ValueError(f"{path} needs {needed}, here: {rare}")
    return examples


def split(examples, seed):
    """Hold out a tenth of each label's examples, at least one -> the others, those held out."""
    shuffled = random.Random(seed).sample(examples, len(examples))
    train, held_out = [], []
    for label in sorted({label for label, _ in examples}):
        own = [example for example in shuffled if example[0] == label]
        n = max(1, round(HELD_OUT_SHARE * len(own)))
        held_out += own[:n]
        train += own[n:]
    return train, held_out


def batches(examples, seed):
    """Yield shuffled batches of examples for ever."""
    for epoch in count():
        order = random.Random(f"{seed} {epoch}").sample(examples, len(examples))
        for i in range(0, len(order), BATCH):
            yield order[i : i + BATCH]


def read_noisy(classifier, examples, sampler, seen, t=None):
    """Draw a noisy view of examples and label it -> log p (B, n_labels), labels (B,).

    seen: a function of segment_ids, see `data.draw_seen`; bos is given besides. t: the time of all
    evidence, or None for times as in training.
    """
    ids, segment_ids = pad([ids for _, ids in examples], sampler.device)
    seen = seen(segment_ids)
    drawn, _ = draw_times(segment_ids, seen)
    t = drawn if t is None else torch.full_like(drawn, t)
    cond_mask = (segment_ids == 0) | (ids == sampler.tokenizer.bos) | (seen == data.GIVEN)
    config = sampler.model.config
    theta = bfn.flow(ids, t, config.s1, config.K).softmax(-1)
    labels = torch.tensor([classifier.labels.index(label) for label, _ in examples])
    log_p = classifier(*bfn.clamp_given(theta, t, ids, cond_mask), segment_ids)
    return log_p, labels.to(sampler.device)


def train(sampler, examples, labels, n_steps, seed):
    """Train a head on the frozen network -> Classifier."""
    torch.manual_seed(seed)
    sampler.model.requires_grad_(False)
    classifier = Classifier(sampler.model, labels).to(sampler.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_steps)
    rng = np.random.default_rng(seed)

    def seen(segment_ids):
        drawn = data.draw_seen(segment_ids.cpu().numpy(), rng, progress=0.5)
        return torch.from_numpy(drawn).to(sampler.device)

    steps = islice(batches(examples, seed), n_steps)
    bar = tqdm(steps, total=n_steps, desc="training", unit="step", disable=None)
    for batch in bar:
        log_p, wanted = read_noisy(classifier, batch, sampler, seen)
        loss = F.nll_loss(log_p, wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier, examples, sampler, t, seed):
    """Share of examples whose label is the likeliest at time t."""
    torch.manual_seed(seed)
    right = 0
    for i in range(0, len(examples), BATCH):
        batch = examples[i : i + BATCH]
        log_p, labels = read_noisy(classifier, batch, sampler, torch.zeros_like, t)
        right += (log_p.argmax(1) == labels).sum().item()
    return right / len(examples)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    p.add_flags("-mdir --seed --device")
    add("-d", "--data_path", type=cli.path, required=True,
        help="text file, each line label<TAB>text")
    add("--output", type=cli.path, required=True,
        help="file for the classifier; a classifier that is there is replaced")
    add("--steps", type=cli.count, default=500, help=f"training steps of {BATCH} texts (500)")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    sampler = Sampler.load(args.model_dir, device=args.device)
    known = "a classifier of this model"
    files.check_output(args.output, lambda path: load_classifier(path, sampler), known)
    if sampler.tokenizer.labels:
        advice = "sample.py --label steers it without a classifier"
        raise ValueError(f"{args.model_dir} was trained with --labelled: {advice}")
    examples = read_labelled(args.data_path, sampler)
    train_examples, held_out = split(examples, args.seed)
    labels = collections.Counter(label for label, _ in examples)
    listed = f"{len(labels)} labels: {', '.join(sorted(labels))}"
    print(f"{len(train_examples)} texts to train on, {len(held_out)} held out; {listed}")
    classifier = train(sampler, train_examples, sorted(labels), args.steps, args.seed)
    most = max(labels.values()) / len(examples)
    print(f"accuracy on held-out texts by time (the most frequent label: {most:.1%})")
    for t in ACCURACY_TIMES:
        print(f"  t = {t:.1f}   {accuracy(classifier, held_out, sampler, t, args.seed):6.1%}")
    save_classifier(Path(args.output), classifier, sampler.run["tokenizer_hash"])
    words = [f"-mdir={args.model_dir}", f"--classifier={args.output}", f"--label={min(labels)}"]
    print(f"next: {shlex.join(['python', 'sample.py', *words])}")


if __name__ == "__main__":
    cli.run(main)
