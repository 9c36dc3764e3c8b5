"""Times the kernels beside softmax attention, the chunked form and flash-linear-attention.

    python tests/bench_kernel.py                            the table, on one GPU
    python tests/bench_kernel.py --plot figures/kernel.png  and a drawing of it (needs matplotlib)

Medians in ms of CUDA graphs, so that no time of Python is in them, and the memory that a call takes
beyond its results. The same number of tokens is cut into ever fewer and longer sequences. The last
line is JSON.
"""

import argparse
import sys
import time
from datetime import date
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent.parent))
from hedgehog import hedgehog_features
from kernel import SMALL, fused_attention, gpu
from linear import chunked_linear_attention
from train_lm import stamped


def contenders(with_fla):
    """What is compared: name -> function of q, k, v, w_q, w_k."""
    def softmax(backend, q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    def chunked(q, k, v, w_q, w_k):
        return chunked_linear_attention(hedgehog_features(q, w_q), hedgehog_features(k, w_k), v)[0]

    functions = {
        "kernel": lambda *xs: fused_attention(*xs)[0],
        "softmax, cuDNN": lambda q, k, v, *_: softmax(SDPBackend.CUDNN_ATTENTION, q, k, v),
        "softmax, flash": lambda q, k, v, *_: softmax(SDPBackend.FLASH_ATTENTION, q, k, v),
        "chunked": chunked,
    }
    if with_fla:
        from fla.ops.linear_attn import chunk_linear_attn

        features = torch.compile(hedgehog_features)

        def fla(q, k, v, w_q, w_k):     # (B, T, H, ..) there; its first calls tune for minutes
            q, k = (features(x, w).transpose(1, 2) for x, w in ((q, w_q), (k, w_k)))
            return chunk_linear_attn(q, k, v.transpose(1, 2), normalize=True)[0].transpose(1, 2)

        functions["fla"] = fla
    return functions


def median_ms(function):
    """Of replays of a CUDA graph, or of plain calls where a function cannot be captured."""
    function()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        function = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
    return triton.testing.do_bench(function, return_mode="median")


def measure(function, T, tokens, H, d, dtype):
    """ms forward, ms forward + backward, and the MiB that these take at their peak beyond the
    output and the gradients."""
    inputs = [torch.randn(max(1, tokens // T), T, H, d, device="cuda", dtype=dtype).transpose(1, 2)
              for _ in range(3)]
    inputs += [torch.randn(H, d, d, device="cuda").div(d**0.5).to(dtype) for _ in range(2)]
    inputs, dy = [x.requires_grad_() for x in inputs], torch.randn_like(inputs[0])

    def both():
        return torch.autograd.grad(function(*inputs), inputs, dy, allow_unused=True)

    with torch.no_grad():
        forward = median_ms(lambda: function(*inputs))
    total = median_ms(both)
    torch.cuda.reset_peak_memory_stats()
    results = torch.cuda.memory_allocated() + 4 * dy.nbytes
    both()
    return forward, total, (torch.cuda.max_memory_allocated() - results) / 2**20


def benchmark(functions, lengths, tokens=65536, H=12, d=64, dtype=torch.bfloat16):
    x = torch.empty(2**30, device="cuda", dtype=dtype)
    bandwidth = 2 * x.nbytes / triton.testing.do_bench(lambda: x.clone(), return_mode="median")
    del x
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__},"
          f" {date.today()}; a copy moves {bandwidth / 1e9:.2f} TB/s\n"
          f"{tokens} tokens, {H} heads of {d}, {dtype}\n{'T':32}"
          + "".join(f"{T:9,}" for T in lengths))
    table = {}
    for name, function in functions.items():
        table[name] = [measure(function, T, tokens, H, d, dtype) for T in lengths]
        for i, what in enumerate(("forward", "forward + backward", "MiB")):
            print(f"{f'{name}: {what}':32}"
                  + "".join(f"{row[i]:9.{0 if i == 2 else 3}f}" for row in table[name]), flush=True)
    return table


def plot(table, lengths, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for i, (axis, title) in enumerate(zip(axes, ("forward", "forward + backward"))):
        for name, rows in table.items():
            axis.loglog(lengths, [row[i] for row in rows], "o-", label=name)
        axis.set(title=title, xlabel="sequence length", ylabel="ms")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", metavar="PATH", help="draw the table, e.g. figures/kernel.png")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(9, 17)])
    parser.add_argument("--fla", action="store_true", help="flash-linear-attention, too")
    args = parser.parse_args()
    if not torch.cuda.is_available() or gpu()[0] < SMALL:
        sys.exit("this needs an NVIDIA GPU with bf16")
    begin = time.perf_counter()
    table = benchmark(contenders(args.fla), args.lengths)
    if args.plot:
        plot(table, args.lengths, args.plot)
    print(stamped({"kernel": table, "lengths": args.lengths, "data": "random tokens", "seed": 0,
                   "device": torch.cuda.get_device_name(),
                   "seconds": round(time.perf_counter() - begin, 1)}))
