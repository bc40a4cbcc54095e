"""Measure how the way times are drawn affects the variance of the training loss and of its gradient.

    python experiments/variance.py -mdir=runs/demo

The weights are those of a trained run. For each of a few fixed batches, noise and times are drawn many times. The variance
of the gradient is the trace of its covariance.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bfn
import cache
import cli
import data
import train
from checkpoint import read_checkpoint
from documents import Corpus
from model import BFNTransformer, Config
from noise import mix_seed
from text import load_tokenizer
from times import Times


def variance(model, batches, times, n_draws, bar):
    """Draw noise and times n_draws times for each batch -> variance of the loss, trace of the gradient's covariance.

    Both are means over the batches. bar: a progress bar.
    """
    loss_variance = trace = 0.0
    for i, batch in enumerate(batches):
        losses, gradients = [], []
        for n in range(n_draws):
            model.zero_grad(set_to_none=True)
            seeds = [mix_seed("variance", i, n)]
            losses.append(train.accumulate_gradients(model, [batch], seeds, torch.device("cpu"), times))
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
            bar.update()
        loss_variance += torch.stack(losses).var().item() / len(batches)
        trace += torch.stack(gradients).var(0).sum().item() / len(batches)
    return loss_variance, trace


def read_run(run_dir, n_batches):
    """Load the newest checkpoint of a run -> model, its first n_batches batches, its curve of the loss by time."""
    run = read_checkpoint(run_dir / "last.pt")
    args, model = run["args"], BFNTransformer(Config(**run["config"]))
    model.load_state_dict(run["model"])
    corpus = Corpus(args["data_path"] or str(run_dir / "corpus.txt"), args["text_field"])
    part = "all" if args["val_path"] else "train"
    tokens = cache.load_corpus(corpus, run_dir / "tokenizer.model", args["cache_dir"], part, args["example"])
    bos_id = load_tokenizer(run_dir / "tokenizer.model").bos_id()
    loader = data.Loader(tokens, args["sequence_length"], args["batch_size"], args["seed"], bos_id)
    return model, [loader.batch(i) for i in range(n_batches)], run["times"]


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("-mdir", "--model_dir", type=cli.path, default="runs/demo",
        help="run folder (runs/demo)")
    p.add_argument("--n_batches", type=cli.count, default=4, help="number of batches (4)")
    p.add_argument("--n_draws", type=cli.several, default=32, help="draws of noise and times for each batch (32)")
    weight_help = "weight of the cross-entropy in the loss (%(default)s)"
    p.add_argument("--cross_entropy", type=cli.non_negative, default=bfn.CROSS_ENTROPY, help=weight_help)
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    bfn.CROSS_ENTROPY = args.cross_entropy
    model, batches, curve = read_run(Path(args.model_dir), args.n_batches)
    results = {}
    with tqdm(total=3 * args.n_batches * args.n_draws, unit="draw", disable=None) as bar:
        for kind in ("uniform", "stratified", "learned"):
            times = Times(kind, 0.0)
            times.curve.copy_(curve)
            results[kind] = variance(model, batches, times, args.n_draws, bar)
    print("| times | variance of the loss | ratio | trace of the gradient's covariance | ratio |\n" + "|---" * 5 + "|")
    for kind, (loss, gradient) in results.items():
        ratios = [uniform / x for uniform, x in zip(results["uniform"], (loss, gradient), strict=True)]
        print(f"| {kind} | {loss:.5f} | {ratios[0]:.2f} | {gradient:.5f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    cli.run(main)
