"""Where one language model loses against another: which of the next tokens it guesses worse.

    python tests/gap.py SOFTMAX_RUN OTHER_RUN                   runs of train_lm.py on one text
    python tests/gap.py SOFTMAX_RUN OTHER_RUN --plot gap.png    and a drawing (needs matplotlib)
    python tests/gap.py SOFTMAX OTHER --data TEXT --block-size 1024     models of transformers

On the validation split, by the token's place in the context, by how much of the text before it
is a repetition, and by how often it occurs. The last line is JSON.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import distill
import train_lm
from command_line import parse

PLACES = [0, 16, 64, 256, 512, 1024]        # a group goes from one number up to the next
LENGTHS = [0, 1, 3, 5, 9, 17]
QUARTERS = [0.0, 0.25, 0.5, 0.75]


def repeated(x):
    """How long the longest piece of each row of x (N, T) is that ends at a token and was there
    before, further left in the row: 0 for a new token, 1 for a token seen before that followed
    another one there. Recall is what a model needs for the long ones."""
    N, T = x.shape
    length, match = np.zeros((N, T), np.int32), np.zeros((N, T + 1), np.int32)
    for i in range(1, T):                   # match[:, j + 1]: tokens alike up to i and up to j < i
        match[:, 1:i + 1] = (match[:, :i] + 1) * (x[:, i:i + 1] == x[:, :i])
        length[:, i] = match[:, 1:i + 1].max(1)
    return length


@torch.no_grad()
def losses(model, xs, ys):
    """-log p of each target, (N, T), nan where there is none."""
    rows, model, device = [], model.eval(), next(model.parameters()).device
    for x, y in zip(xs.to(device).split(8), ys.to(device).split(8)):
        log_p = model(x)[0].log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        rows.append(-log_p.masked_fill(y < 0, torch.nan).cpu())
    return torch.cat(rows).numpy()


def groups(values, edges, softmax, other):
    """For each group of tokens: from which value on, its share of all tokens, both mean losses, and
    its share of the whole gap."""
    total, lines = (other - softmax).sum(), []
    for low, high in zip(edges, [*edges[1:], np.inf]):
        chosen = (values >= low) & (values < high)
        if chosen.any():
            a, b = softmax[chosen], other[chosen]
            lines.append({"from": low, "tokens": chosen.mean(), "softmax": a.mean(),
                          "other": b.mean(), "share_of_gap": (b - a).sum() / total})
    return [{key: round(float(x), 4) for key, x in line.items()} for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs=2, help="softmax first")
    parser.add_argument("--data", help="their text, if it has moved or they know none")
    parser.add_argument("--block-size", help="tokens of a context, of models of transformers")
    parser.add_argument("--examples", type=int, default=400, help="contexts, evenly spaced")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", default="", metavar="PATH")
    args = parser.parse_args()
    models = []
    for run in args.runs:                   # as distill.py --analyze RUN has it
        given = {"--analyze": run, "--device": args.device, "--data": args.data,
                 "--block-size": args.block_size}
        o = parse(distill.Options, distill.PRESETS, distill.preset_for, distill.from_teacher, "",
                  [x for item in given.items() if item[1] for x in item])
        task, model, _ = distill.load(run, o)
        models.append(model)
    n = task.num_examples("valid")
    x, y = task.batch("valid", range(0, n, max(1, n // args.examples)))
    a, b = (losses(model, x, y) for model in models)

    tokens = task.splits["valid"].astype(np.int64)
    counts = np.bincount(tokens, minlength=task.vocab_size)
    order = counts.argsort()[::-1]          # rank 0.25: a quarter of the text is more frequent
    rank = np.zeros(task.vocab_size)
    rank[order] = (counts[order].cumsum() - counts[order]) / counts.sum()
    real = y.numpy() >= 0
    text = np.concatenate([x[:, :1].numpy(), y.numpy()], axis=1)
    place = np.broadcast_to(np.arange(y.size(1)), y.shape)
    kinds = {"place in the context": (place, PLACES),
             "longest repetition that ends here": (repeated(text)[:, 1:], LENGTHS),
             "share of the text that is more frequent": (rank[y.numpy()], QUARTERS)}
    found = {kind: groups(values[real], edges, a[real], b[real])
             for kind, (values, edges) in kinds.items()}
    for kind, lines in found.items():
        print(f"{kind:>40} {'tokens':>8} {'softmax':>8} {'other':>8} {'gap':>8} {'of the gap':>11}")
        for g in lines:
            print(f"{g['from']:>40g} {g['tokens']:8.1%} {g['softmax']:8.3f} {g['other']:8.3f} "
                  f"{g['other'] - g['softmax']:8.3f} {g['share_of_gap']:11.1%}")
    print(train_lm.stamped({
        "gap": found, "data": task.name, "device": train_lm.device_name(o), "seed": o.seed,
        "softmax": float(a[real].mean()), "other": float(b[real].mean())}))
    if args.plot:
        plot(found, args.plot)


def plot(found, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(12, 3.2), sharey=True)
    for axis, (kind, lines) in zip(axes, found.items()):
        axis.bar([f"{g['from']:g}" for g in lines], [g["other"] - g["softmax"] for g in lines])
        axis.set(xlabel=f"{kind}, from")
    axes[0].set(ylabel="nats above softmax")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
