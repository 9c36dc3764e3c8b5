"""What attention weights are like in a model: entropy, monotonicity and KL by layer and map.

The q and k of every layer are watched while text runs through the model; what weights a softmax and
the feature maps would make of them is compared layer by layer. distill.py makes its tables with
`measure`; `analyze` and `plot` are its --analyze and --plot.
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import torch

from hedgehog import (FEATURE_MAPS, SoftmaxAttention, attention_kl, entropy, make_mix,
                      monotonicity)
from train_lm import autocast, device_name


def put(mixes, layers):
    for mix, layer in zip(mixes, layers):
        layer.mix = mix


@contextlib.contextmanager
def watching(layers, look):
    """Within it, layer i calls look(i, q, k, positions, causal, key_mask) before it mixes."""
    hooks = [layer.mix.register_forward_pre_hook(
        lambda mix, args, i=i: look(i, *args[:2], *args[3:6])) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_layers(model, idx, targets=None, key_mask=None):
    """Runs the model on a task's batch for those who watch its attention: no logits, no loss."""
    return model.hidden(idx, key_mask=key_mask)


@torch.no_grad()
def measure(model, mixes, task, o):
    """How the weights that `mixes` (one a layer) give compare with softmax's, on the q and k that
    the first 32 validation examples have in the layers of the model as it is. Returns figure ->
    list over layers of means over all queries but padding."""
    layers, softmax, found = model.attention_layers(), SoftmaxAttention(), []

    def look(i, q, k, positions, causal, key_mask):
        with torch.autocast(q.device.type, enabled=False):
            q, k = q.float(), k.float()
            a, b = (m.weights(q, k, positions, causal, key_mask) for m in (softmax, mixes[i]))
            queries = q[:, 0, :, 0].numel() if key_mask is None else key_mask.sum()
            found.append([queries * x for x in (
                attention_kl(a, b, key_mask), entropy(a, key_mask), entropy(b, key_mask),
                monotonicity(b, q, k, causal, key_mask), 1)])

    model.eval()
    size, n = min(8, o.micro_batch), min(32, task.num_examples("valid"))    # T x T: few at a time
    with watching(layers, look), autocast(o):
        for i in range(0, n, size):
            batch = task.batch("valid", range(i, min(i + size, n)))
            run_layers(model, *(x.to(o.device) for x in batch))
    sums = torch.tensor(found).unflatten(0, (-1, len(layers))).sum(0)       # (layers, 5)
    means = sums[:, :4] / sums[:, 4:]
    return dict(zip(("kl", "entropy_softmax", "entropy", "monotonicity"), means.T.tolist()))


def analyze(task, model, stage, o):
    """Tables of KL, entropy and monotonicity, a row for each map and a column for each layer, on
    the q and k of the model, which is from this stage of a conversion; the figures of --plot."""
    layers = model.attention_layers()
    own, maps = [layer.mix for layer in layers], {}
    if stage == "stage1":               # its maps are judged by the q and k that they learned from
        put([SoftmaxAttention() for _ in layers], layers)
    if model.config.attention != "softmax":
        maps[f"{model.config.attention}, trained"] = own
    for name in FEATURE_MAPS:
        config = replace(model.config, attention=name, block_size=max(o.block_size,
                                                                      model.config.block_size))
        torch.manual_seed(0)
        maps[name] = [make_mix(name, config).to(o.device) for _ in layers]
    table = {name: measure(model, mixes, task, o) for name, mixes in maps.items()}
    softmax = next(iter(table.values()))["entropy_softmax"]
    for key, what in (("kl", "KL(softmax || map), nats"), ("entropy", "entropy, nats"),
                      ("monotonicity", "rank correlation with q.k")):
        print(f"{what:36}" + "".join(f"{f'layer {i + 1}':>10}" for i in range(len(layers))))
        if key == "entropy":
            print(f"  {'softmax':34}" + "".join(f"{x:10.3f}" for x in softmax))
        for name, figures in table.items():
            print(f"  {name:34}" + "".join(f"{x:10.3f}" for x in figures[key]))
    if o.plot:
        plot(model, {"softmax": [SoftmaxAttention()] * len(layers), **maps}, task, o,
             {"softmax": {"entropy": softmax}, **table})
    return {"analyze": o.analyze, "data": task.name, "block_size": o.block_size, "layers": table,
            "device": device_name(o)}


@torch.no_grad()
def plot(model, mixes, task, o, table):
    """attention_maps.png, monotonicity.png and entropy.png in o.plot."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("--plot needs matplotlib: pip install matplotlib")
    found = []

    def look(i, q, k, positions, causal, key_mask):
        """Of the head that softmax makes spikiest: q.k / sqrt d and the weights by map, T x T."""
        q, k = q.float(), k.float()
        weights = {name: m[i].weights(q, k, positions, causal) for name, m in mixes.items()}
        h = min(range(q.size(1)), key=lambda h: float(entropy(weights["softmax"][:, h:h + 1])))
        found.append((h, (q @ k.mT)[0, h].cpu().numpy() / math.sqrt(q.size(-1)),
                      {name: w[0, h].cpu().numpy() for name, w in weights.items()}))

    def save_figure(figure, name):
        path = Path(o.plot) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, bbox_inches="tight")
        print(f"wrote {path}")

    model.eval()
    with watching(model.attention_layers(), look):
        run_layers(model, task.batch("valid", [0])[0].to(o.device))
    chosen = sorted({0, len(found) // 2, len(found) - 1})   # first, middle and last layer
    names, T = list(mixes), 64                              # the first 64 tokens can be seen

    figure, axes = plt.subplots(len(chosen), len(names), squeeze=False,
                                figsize=(1.7 * len(names), 1.9 * len(chosen)))
    for line, i in zip(axes, chosen):
        h, _, weights = found[i]
        for axis, name in zip(line, names):
            axis.imshow(weights[name][:T, :T] ** 0.5, vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(name.replace(", ", "\n") if i == chosen[0] else "", fontsize=10)
        line[0].set_ylabel(f"layer {i + 1}, head {h + 1}")
    figure.suptitle("square roots of the attention weights of query (down) and key (right)", y=1.02)
    save_figure(figure, "attention_maps.png")

    _, logits, weights = found[-1]
    columns = math.ceil(len(names) / 2)
    figure, axes = plt.subplots(2, columns, squeeze=False, sharex=True,
                                figsize=(2.2 * columns, 4.4))
    for axis, name in zip(axes.flat, names):
        axis.plot(logits[-1], weights[name][-1], ".")       # all keys of the last query
        axis.set(title=name, xlabel="q.k / sqrt d", ylabel="weight")
    for axis in axes.flat[len(names):]:
        axis.remove()
    figure.tight_layout()
    save_figure(figure, "monotonicity.png")

    figure, axis = plt.subplots(figsize=(6, 4))
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)     # the usual ten would come twice
    for name, figures in table.items():
        style = "ko--" if name == "softmax" else "r*-" if name.endswith("trained") else "o-"
        axis.plot(range(1, len(found) + 1), figures["entropy"], style, label=name)
    axis.set(xlabel="layer", ylabel="mean entropy of the weights, nats",
             xticks=range(1, len(found) + 1))
    axis.legend(bbox_to_anchor=(1, 1))
    save_figure(figure, "entropy.png")
