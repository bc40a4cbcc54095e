"""Train the network of the published code for comparison.

    git clone https://github.com/nnaisense/bayesian-flow-networks OFFICIAL
    PYTHONPATH=OFFICIAL python -m experiments.official --code=OFFICIAL --minutes=12 \\
        -d=wiki8.train.txt --val_path=wiki8.valid.txt

The flow, the loss and the network are the published ones, unchanged except for their size: 4 layers
of width 256. The batches, the learning rate schedule, the averaging and the evaluation are this
project's. The published learning rate of 1e-4 is for runs of days; the default here is 1e-3. The
result is added to those of compare.py.

The published code is imported from PYTHONPATH. This runs on the CPU, and only for a corpus of one
line, because the published network cannot read packed rows.
"""

import copy
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import torch

import bfn
import data
import train
from common import cli
from common.noise import mix_seed
from evaluation import bounds
from experiments import compare
from training import optim


def load_official(code):
    """Import the published code -> its model.py, CategoricalFactory, GPT, TextInputAdapter.

    Its model.py has the name of another here. Raises ValueError if PYTHONPATH is not `code`.
    """
    path = Path(code) / "model.py"
    if not path.exists():
        raise ValueError(f"no model.py in {code}: give --code a clone of the published code")
    spec = importlib.util.spec_from_file_location("official_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        adapters = importlib.import_module("networks.adapters")
        networks = importlib.import_module("networks.transformer")
        probability = importlib.import_module("probability")
    except ImportError as error:
        raise ValueError(f"{error}: start this command with PYTHONPATH={code}") from None
    return module, probability.CategoricalFactory, networks.GPT, adapters.TextInputAdapter


def check_one_text_per_row(segment_ids):
    """Raise ValueError if a row holds more than one text."""
    if (segment_ids > 1).any():
        message = "the published network cannot separate two texts in one row"
        raise ValueError(f"{message}: give a corpus of one line")


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("--code", type=cli.path, required=True, help="folder with a clone of the published code")
    add("-lr", "--learning_rate", type=cli.positive, default=1e-3, help="peak learning rate (1e-3)")
    add("--seed", type=cli.natural, default=0, help="seed of all random numbers (0)")
    compare.add_flags(add)
    p.set_defaults(minutes=12.0, flags="--preset=laptop --tokenizer=char -slen=128 -bsz=16")
    return p


def build(args, sizes, K):
    """Build the published network, flow and loss -> their BFN, which computes it, an optimizer.

    sizes: flags of train.py. K: tokens of the vocabulary.
    """
    official, CategoricalFactory, GPT, TextInputAdapter = load_official(args.code)
    L, D = sizes.sequence_length, sizes.model_dim
    torch.manual_seed(args.seed)
    adapters = dict(
        input_adapter=TextInputAdapter(vocab_size=K, seq_len=L, output_size=D), output_adapter=None
    )
    net = GPT(adapters, K, sizes.num_layers, sizes.num_heads, D, skip=True)
    flow = official.DiscreteBayesianFlow(n_classes=K, max_sqrt_beta=math.sqrt(bfn.auto_beta1(K)))
    loss = official.DiscreteBayesianFlowLoss(flow, CategoricalFactory())
    groups = net.get_optim_groups(0.01)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    return official.BFN(net, flow, loss), optimizer


def as_network(average, K, d_model):
    """Wrap the averaged weights so that they can be called like this project's network."""

    def network(theta, t, segment_ids):
        check_one_text_per_row(segment_ids)
        return average(theta, t)

    network.config = SimpleNamespace(K=K, d_model=d_model, s1=math.sqrt(K * bfn.auto_beta1(K)))
    return network


def train_official(args, sizes, text):
    """Train on the text that compare.prepare returned -> the record of the run."""
    tokenizer, tokens, val = text
    K, L, bos_id = len(tokenizer), sizes.sequence_length, tokenizer.bos_id()
    model, optimizer = build(args, sizes, K)
    average = copy.deepcopy(model.net)
    network = as_network(average, K, sizes.model_dim)
    loader = data.Loader(tokens, L, sizes.batch_size, args.seed, bos_id)
    budget = compare.Budget(args.minutes, args.tokens)
    n_steps = 0

    def step():
        nonlocal n_steps
        ids, segment_ids, _ = loader.batch(n_steps)
        check_one_text_per_row(segment_ids)
        torch.manual_seed(mix_seed(args.seed, n_steps, 0))
        optimizer.zero_grad(set_to_none=True)
        model(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 5.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * compare.rate_share(budget.progress)
        optimizer.step()
        optim.average_weights(average, model.net, 0.999, n_steps)
        n_steps += 1
        return int((segment_ids > 0).sum())

    def measure():
        return compare.measure_bound(network, bounds.Text(val, L, bos_id), torch.device("cpu"))

    curve = compare.spend(budget, step, measure, "official")
    return compare.record("official", args.seed, model.net, curve)


def main(argv=None):
    args = flags().parse_args(argv)
    folder = Path(args.output)
    sizes = compare.run_flags(args)
    text = compare.prepare(sizes, folder)
    train.fit_rows(sizes, text[1])
    compare.add_record(train_official(args, sizes, text), folder)
    print((folder / "results.md").read_text(), end="")


if __name__ == "__main__":
    cli.run(main)
