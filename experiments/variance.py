"""Measure what the drawing of times does to the variance of the training loss and of its gradient, batch by batch.

    python experiments/variance.py -mdir=runs/demo

The weights are a trained run's, the batches fixed; noise and times are drawn again and again. The variance of the
gradient is the trace of its covariance.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bfn
import cli
import data
import train
from checkpoint import read_checkpoint
from model import BFNTransformer, Config
from noise import mix_seed
from text import load_tokenizer
from times import Times


def variance(model, batches, times, n_draws, bar):
    """Draw losses and gradients -> variance of the loss, trace of the gradient's covariance, means over the batches."""
    loss_variance = trace = 0.0
    for b, batch in enumerate(batches):
        losses, gradients = [], []
        for n in range(n_draws):
            model.zero_grad(set_to_none=True)
            seeds = [mix_seed("variance", b, n)]
            losses.append(train.accumulate_gradients(model, [batch], seeds, torch.device("cpu"), times))
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
            bar.update()
        loss_variance += torch.stack(losses).var().item() / len(batches)
        trace += torch.stack(gradients).var(0).sum().item() / len(batches)
    return loss_variance, trace


def main():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    p.add_argument("--n_batches", type=cli.count, default=4, help="batches (4)")
    p.add_argument("--n_draws", type=cli.several, default=32, help="draws of noise and times for each (32)")
    p.add_argument("--cross_entropy", type=cli.non_negative, default=bfn.CROSS_ENTROPY, help="its weight in the loss (5)")
    args = p.parse_args()
    bfn.CROSS_ENTROPY = args.cross_entropy
    run_dir = Path(args.model_dir)
    run = read_checkpoint(run_dir / "last.pt")
    flags, model = run["args"], BFNTransformer(Config(**run["config"]))
    model.load_state_dict(run["model"])
    corpus = flags["data_path"] or run_dir / "corpus.txt"
    part = "all" if flags["val_path"] else "train"
    tokens = data.load_corpus(corpus, run_dir / "tokenizer.model", flags["cache_dir"], part)
    bos_id = load_tokenizer(run_dir / "tokenizer.model").bos_id()
    loader = data.Loader(tokens, flags["sequence_length"], flags["batch_size"], flags["seed"], bos_id)
    batches = [loader.batch(n) for n in range(args.n_batches)]
    results = {}
    with tqdm(total=3 * args.n_batches * args.n_draws, unit="draw", disable=None) as bar:
        for kind in ("uniform", "stratified", "learned"):
            times = Times(kind, 0.0)
            times.curve.copy_(run["times"])
            results[kind] = variance(model, batches, times, args.n_draws, bar)
    print("| times | variance of the loss | ratio | trace of the gradient's covariance | ratio |\n" + "|---" * 5 + "|")
    for kind, (loss, gradient) in results.items():
        ratios = [uniform / x for uniform, x in zip(results["uniform"], (loss, gradient), strict=True)]
        print(f"| {kind} | {loss:.5f} | {ratios[0]:.2f} | {gradient:.5f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    cli.run(main)
