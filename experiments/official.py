"""Train the published code (github.com/nnaisense/bayesian-flow-networks) on the same text for the same minutes.

    git clone https://github.com/nnaisense/bayesian-flow-networks OFFICIAL
    python experiments/official.py --code=OFFICIAL --minutes=12 -d=wiki8.train.txt --val_path=wiki8.valid.txt

Its flow, loss and network are imported and run unchanged, shrunk to 4 layers of width 256; batches and the evaluation
are this project's. Its published learning rate of 1e-4 suits runs of days: here it is 1e-3, falling as a cosine.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from compare import VAL_TOKENS, Budget, prepare, record, spend, table

import bfn
import cli
import data
import evaluate
import train


def load_official(code):
    """Import the published modules, whose names are this project's too -> its `model` module, CategoricalFactory, GPT, TextInputAdapter."""
    sys.path.append(str(code))
    spec = importlib.util.spec_from_file_location("official_model", Path(code) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from networks.adapters import TextInputAdapter
    from networks.transformer import GPT
    from probability import CategoricalFactory

    return module, CategoricalFactory, GPT, TextInputAdapter


def main():
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
    p.add_argument("--output", default="runs/official", help="folder for results.json (runs/official)")
    args = p.parse_args()
    files = [f"-d={args.data_path}", *([f"--val_path={args.val_path}"] if args.val_path else [])]
    flags = train.complete(train.flags().parse_args([*files, *args.flags.split()]))
    tokenizer, tokens, val = prepare(flags, Path(args.output))
    official, CategoricalFactory, GPT, TextInputAdapter = load_official(args.code)
    K, L, D = len(tokenizer), flags.sequence_length, flags.model_dim
    beta1 = bfn.auto_beta1(K)

    torch.manual_seed(args.seed)
    adapter = TextInputAdapter(vocab_size=K, seq_len=L, output_size=D)
    net = GPT(dict(input_adapter=adapter, output_adapter=None), K, flags.num_layers, flags.num_heads, D, skip=True)
    flow = official.DiscreteBayesianFlow(n_classes=K, max_sqrt_beta=math.sqrt(beta1))
    loss = official.DiscreteBayesianFlowLoss(flow, CategoricalFactory())
    model = official.BFN(net, flow, loss)
    optimizer = torch.optim.AdamW(net.get_optim_groups(0.01), lr=args.learning_rate, betas=(0.9, 0.98))
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    loader = data.Loader(tokens, L, flags.batch_size, args.seed, tokenizer.bos_id())
    budget, n_steps = Budget(args.minutes, args.tokens), 0

    def step():
        nonlocal n_steps
        ids, segment_ids, _ = loader.batch(n_steps)
        torch.manual_seed(bfn.mix_seed(args.seed, n_steps, 0))
        optimizer.zero_grad(set_to_none=True)
        model(ids).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        rate = min(1.0, (n_steps + 1) / 100) * (1 + math.cos(math.pi * min(1.0, budget.progress))) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        optimizer.step()
        average.update_parameters(net)
        n_steps += 1
        return int((segment_ids > 0).sum())

    def network(theta, t, segment_ids):
        return average.module(theta, t)

    network.config = SimpleNamespace(K=K, s1=math.sqrt(K * beta1))

    def measure():
        options = dict(n_draws=2, max_tokens=VAL_TOKENS, batch_size=flags.batch_size)
        scores = evaluate.score(network, val, L, tokenizer.bos_id(), torch.device("cpu"), **options)
        return evaluate.likelihood(scores, val, tokenizer.bos_id())

    result = record("official", args.seed, net, spend(budget, step, measure, "official"), tokenizer)
    (Path(args.output) / "results.json").write_text(json.dumps([result], indent=1))
    print("\n".join(table([result])))


if __name__ == "__main__":
    cli.run(main)
