"""Train the published code (github.com/nnaisense/bayesian-flow-networks) on the same text for the same minutes.

    git clone https://github.com/nnaisense/bayesian-flow-networks OFFICIAL
    python experiments/official.py --code=OFFICIAL --minutes=12 -d=wiki8.train.txt --val_path=wiki8.valid.txt

Its flow, loss and network are imported and run unchanged, shrunk to 4 layers of width 256; batches and the evaluation
are this project's, and so are the schedule and the averaging. Its published learning rate of 1e-4 suits runs of days:
here it is 1e-3. On the CPU, for a corpus of one line: the published network knows no packing.
"""

import copy
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from compare import Budget, bound, keep, prepare, rate_share, record, spend

import bfn
import cli
import data
import optim
import train
from noise import mix_seed


def load_official(code):
    """Import the published modules, whose names are this project's too -> `model`, CategoricalFactory, GPT, TextInputAdapter."""
    sys.path.append(str(code))
    spec = importlib.util.spec_from_file_location("official_model", Path(code) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from networks.adapters import TextInputAdapter
    from networks.transformer import GPT
    from probability import CategoricalFactory

    return module, CategoricalFactory, GPT, TextInputAdapter


def check_one_text_a_row(segment_ids):
    """Raise ValueError where a row holds two texts."""
    if (segment_ids > 1).any():
        raise ValueError("the published network cannot keep two texts of a row apart: give a corpus of one line")


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("--code", required=True, help="folder with a clone of the published code")
    p.add_argument("-d", "--data_path", required=True, help="text file")
    p.add_argument("--val_path", help="text file for validation")
    p.add_argument("--minutes", type=cli.positive, default=12.0, help="of training (12)")
    p.add_argument("--tokens", type=cli.count, help="tokens of training, in place of minutes")
    p.add_argument("-lr", "--learning_rate", type=cli.positive, default=1e-3, help="peak learning rate (1e-3)")
    p.add_argument("--seed", type=cli.natural, default=0, help="of everything random (0)")
    p.add_argument(
        "--flags", default="--preset=laptop --tokenizer=char -slen=128 -bsz=16", help="of train.py: text and sizes"
    )
    p.add_argument("--output", default="runs/compare", help="folder of the records (runs/compare)")
    return p


def main():
    args = flags().parse_args()
    files = [f"-d={args.data_path}", *([f"--val_path={args.val_path}"] if args.val_path else [])]
    ours = train.complete(train.flags().parse_args([*files, *args.flags.split()]))
    tokenizer, tokens, val = prepare(ours, Path(args.output))
    official, CategoricalFactory, GPT, TextInputAdapter = load_official(args.code)
    K, L, D = len(tokenizer), ours.sequence_length, ours.model_dim
    beta1 = bfn.auto_beta1(K)

    torch.manual_seed(args.seed)
    adapter = TextInputAdapter(vocab_size=K, seq_len=L, output_size=D)
    net = GPT(dict(input_adapter=adapter, output_adapter=None), K, ours.num_layers, ours.num_heads, D, skip=True)
    flow = official.DiscreteBayesianFlow(n_classes=K, max_sqrt_beta=math.sqrt(beta1))
    loss = official.DiscreteBayesianFlowLoss(flow, CategoricalFactory())
    model = official.BFN(net, flow, loss)
    optimizer = torch.optim.AdamW(net.get_optim_groups(0.01), lr=args.learning_rate, betas=(0.9, 0.98))
    average = copy.deepcopy(net)
    loader = data.Loader(tokens, L, ours.batch_size, args.seed, tokenizer.bos_id())
    budget, n_steps = Budget(args.minutes, args.tokens), 0

    def step():
        nonlocal n_steps
        ids, segment_ids, _ = loader.batch(n_steps)
        check_one_text_a_row(segment_ids)
        torch.manual_seed(mix_seed(args.seed, n_steps, 0))
        optimizer.zero_grad(set_to_none=True)
        model(ids).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate_share(budget.progress)
        optimizer.step()
        optim.average_weights(average, net, 0.999, n_steps)
        n_steps += 1
        return int((segment_ids > 0).sum())

    def network(theta, t, segment_ids):
        check_one_text_a_row(segment_ids)
        return average(theta, t)

    network.config = SimpleNamespace(K=K, d_model=D, s1=math.sqrt(K * beta1))

    def measure():
        return bound(network, val, L, tokenizer.bos_id(), torch.device("cpu"))

    keep(record("official", args.seed, net, spend(budget, step, measure, "official")), Path(args.output))
    print((Path(args.output) / "results.md").read_text(), end="")


if __name__ == "__main__":
    cli.run(main)
