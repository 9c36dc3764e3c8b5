"""Times generation after ever longer contexts: tokens a second, and bytes kept for each sequence.

    python tests/bench_generation.py                on a GPU a 124M model, without one a small one
    python tests/bench_generation.py --model NAME   a Llama or GPT-2 of transformers, in bf16; its
                                                    softmax is transformers' own, with its own cache

Random tokens, 16 sequences side by side, 32 steps, as PyTorch runs them one by one. The last line
is JSON.
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


def own(attention, device):
    """A GPT with random weights as a function (tokens, start, cache) -> logits, cache."""
    size = {} if device == "cuda" else dict(n_layer=4, n_head=2, n_embd=128)
    torch.manual_seed(0)
    model = GPT(GPTConfig(attention=attention, position="rotary", **size)).to(device).eval()
    if device == "cuda":
        model.bfloat16()

    def step(idx, start, caches):
        x, caches = model.hidden(idx, caches or [None] * model.config.n_layer, start)
        return model.lm_head(x[:, -1]), caches

    return step, lambda caches: sum(x.nbytes for cache in caches for x in cache)


def of_transformers(name, attention, device):
    """The same for a model of transformers, softmax or converted to maps as they start."""
    import hf
    from transformers.cache_utils import Cache, DynamicCache

    model = hf.load(name, device=device).eval()
    model.hf.bfloat16()
    if attention == "softmax":
        model.hf.set_attn_implementation("sdpa")
    else:
        model.convert(attention)

    def step(idx, start, cache):
        if cache is None:
            cache = DynamicCache() if attention == "softmax" else Cache(
                layer_class_to_replicate=hf.StateLayer)
        out = model.hf(idx, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits, cache

    def kept(cache):
        return sum(x.nbytes for layer in cache.layers for x in (
            (layer.keys, layer.values) if attention == "softmax" else layer.state))

    return step, kept


@torch.no_grad()
def time_generation(step, kept, attention, contexts, batch, device):
    table = []
    for context in contexts:
        idx = torch.randint(256, (batch, context + 36), device=device)
        x, cache = step(idx[:, :context], 0, None)
        kept_bytes = kept(cache) // batch
        for i in range(context, context + 36):
            if i == context + 4:                            # the first ones warm up
                float(x.sum())                              # waits for the device
                start = time.perf_counter()
            x, cache = step(idx[:, i:i + 1], i, cache)
        float(x.sum())
        speed = 32 * batch / (time.perf_counter() - start)
        table.append({"attention": attention, "context": context, "bytes": kept_bytes,
                      "tokens_per_second": round(speed)})
        print(f"{attention:12}{context:>10,} tokens{kept_bytes:>16,} bytes{speed:>12,.0f} tokens/s",
              flush=True)
    return table


if __name__ == "__main__":
    gpu, begin = torch.cuda.is_available(), time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+",
                        default=[1024, 4096, 16384, 65536] if gpu else [128, 512, 2048])
    parser.add_argument("--batch", type=int, default=16, help="sequences at once")
    parser.add_argument("--model", help="a model of transformers: name, folder or GGUF file")
    args = parser.parse_args()
    device, rows = "cuda" if gpu else "cpu", []
    for attention in ("softmax", "hedgehog"):
        functions = of_transformers(args.model, attention, device) if args.model else own(
            attention, device)
        rows += time_generation(*functions, attention, args.contexts, args.batch, device)
    print(json.dumps({"generation": rows, "batch": args.batch, "model": args.model or "own",
                      "data": "random tokens", "seconds": round(time.perf_counter() - begin, 1),
                      "seed": 0, "device": torch.cuda.get_device_name() if gpu else "cpu",
                      "torch": torch.__version__, "date": str(date.today()),
                      "command": shlex.join(["python", *sys.argv])}))
