"""Times training steps, by default of the 124M model at ever longer contexts, 65,536 tokens each.

    python tests/bench_training.py                          softmax and hedgehog
    python tests/bench_training.py --nanogpt model.py       beside nanoGPT, whose file this is
    python tests/bench_training.py --preset small --position rotary --contexts 1024 --tokens 16384

Random tokens, bf16, compiled, no dropout; medians of 16 timings of 4 steps each, after 5 steps;
launched by Python or, with --graph, replayed as a CUDA graph. The last line is JSON.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_lm
from gpt import GPT
from hedgehog import GPTConfig


class RandomTokens:
    """What train_lm.take_step uses of a task."""

    def __init__(self, block_size):
        self.block_size = block_size

    def num_examples(self, split):
        return 10**6

    def num_targets(self, split, indices):
        return len(indices) * self.block_size

    def batch(self, split, indices):
        return torch.randint(50257, (2, len(indices), self.block_size))


def model_of(name, T, args):
    if name != "nanogpt":
        shape = {key: train_lm.PRESETS[args.preset][key] for key in ("n_layer", "n_head", "n_embd")}
        return GPT(GPTConfig(attention=name, block_size=T, position=args.position, **shape))
    spec = importlib.util.spec_from_file_location("nanogpt", args.nanogpt)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(block_size=T, vocab_size=50304, bias=False, dropout=0.0))


def time_steps(name, T, args):
    """Median seconds of a step, those of the first, and the peak memory in GiB."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    raw = model_of(name, T, args).to("cuda")
    if args.recompute:
        raw.recompute_activations()
    model, task = torch.compile(raw), RandomTokens(T)
    optimizer = train_lm.adamw(raw.parameters(), 1e-4)
    o = train_lm.Options(batch_size=args.tokens // T, micro_batch=args.micro // T, device="cuda",
                         compile=args.graph)
    backward = train_lm.backward_of(model, o)
    seconds = []
    for step in range(21):
        repeats = 1 if step < 5 else 4                      # so that steps can overlap
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            loss = train_lm.take_step(model, optimizer, task, step, o, backward)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / repeats)
        if step >= 5 and sum(seconds) > seconds[0] + args.limit:
            break
    assert torch.isfinite(loss)
    return statistics.median(seconds[5:]), seconds[0], torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--attentions", nargs="+", default=["softmax", "hedgehog"])
    parser.add_argument("--nanogpt", default="", help="nanoGPT's model.py")
    parser.add_argument("--preset", default="gpt2", help="whose layers, heads and width")
    parser.add_argument("--position", default="learned", help="or rotary")
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph")
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--micro", type=int, default=0, help="of a micro-batch (default: all)")
    parser.add_argument("--limit", type=float, default=20, help="seconds of a measurement")
    parser.add_argument("--recompute", action="store_true", help="make activations again")
    args, rows, begin = parser.parse_args(), [], time.perf_counter()
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU")
    args.micro = args.micro or args.tokens
    torch.set_float32_matmul_precision("high")
    for T in args.contexts:
        for name in (["nanogpt"] if args.nanogpt else []) + args.attentions:
            seconds, first, gib = time_steps(name, T, args)
            rows.append({"model": name, "context": T, "ms": round(1000 * seconds, 1),
                         "tokens_per_second": round(args.tokens / seconds),
                         "first_step_seconds": round(first, 1), "peak_memory_gib": round(gib, 2)})
            print(rows[-1], flush=True)
    print(train_lm.stamped({
        "training": rows, "tokens": args.tokens, "micro": args.micro, "recompute": args.recompute,
        "preset": args.preset, "position": args.position, "graph": args.graph,
        "data": "random tokens", "seed": 0, "device": torch.cuda.get_device_name(),
        "seconds": round(time.perf_counter() - begin, 1)}))
