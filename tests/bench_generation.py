"""Times generation after ever longer contexts: tokens a second, and bytes kept for each sequence.

    python tests/bench_generation.py        on a GPU a 124M model, without one a small one

Random weights and tokens, 16 sequences side by side, 32 steps. The last line is JSON.
"""

import argparse
import json
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from hedgehog import GPT, GPTConfig


@torch.no_grad()
def time_generation(attention, contexts, batch, device):
    size = {} if device == "cuda" else dict(n_layer=4, n_head=2, n_embd=128)
    torch.manual_seed(0)
    model = GPT(GPTConfig(attention=attention, position="rotary", **size)).to(device).eval()
    if device == "cuda":
        model.bfloat16()
    table = []
    for context in contexts:
        idx = torch.randint(model.config.vocab_size, (batch, context + 36), device=device)
        x, caches = model.hidden(idx[:, :context], [None] * model.config.n_layer)
        kept = sum(x.nbytes for cache in caches for x in cache) // batch
        for i in range(context, context + 36):
            if i == context + 4:                            # the first ones warm up
                float(x.sum())                              # waits for the device
                start = time.perf_counter()
            x, caches = model.hidden(idx[:, i:i + 1], caches, i)
            x = model.lm_head(x)
        float(x.sum())
        speed = 32 * batch / (time.perf_counter() - start)
        table.append({"attention": attention, "context": context, "bytes": kept,
                      "tokens_per_second": round(speed)})
        print(f"{attention:12}{context:>10,} tokens{kept:>16,} bytes{speed:>12,.0f} tokens/s",
              flush=True)
    return table


if __name__ == "__main__":
    gpu, start = torch.cuda.is_available(), time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+",
                        default=[1024, 4096, 16384, 65536] if gpu else [128, 512, 2048])
    parser.add_argument("--batch", type=int, default=16, help="sequences at once")
    args = parser.parse_args()
    rows = [row for attention in ("softmax", "hedgehog") for row in time_generation(
        attention, args.contexts, args.batch, "cuda" if gpu else "cpu")]
    print(json.dumps({"generation": rows, "batch": args.batch, "data": "random tokens",
                      "seconds": round(time.perf_counter() - start, 1), "seed": 0,
                      "device": torch.cuda.get_device_name() if gpu else "cpu",
                      "torch": torch.__version__, "date": str(date.today()),
                      "command": shlex.join(["python", *sys.argv])}))
