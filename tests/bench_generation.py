"""Times generation after ever longer contexts: tokens a second, and bytes kept for each sequence.

    python tests/bench_generation.py                on a GPU a 124M model, without one a small one
    python tests/bench_generation.py --model NAME   a Llama or GPT-2 of transformers, in bf16; its
                                                    softmax is transformers' own, with its own cache

Random tokens, 32 steps of 1, 16 or 64 sequences side by side. The last line is JSON.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpt import GPT
from hedgehog import GPTConfig
from train_lm import stamped


def own(attention, device):
    """A GPT with random weights as a function (prompt, length) -> a function that takes one token
    after the other up to this length, and the bytes that the prompt left behind."""
    size = {} if device == "cuda" else dict(n_layer=4, n_head=2, n_embd=128)
    torch.manual_seed(0)
    model = GPT(GPTConfig(attention=attention, position="rotary", **size)).to(device).eval()
    if device == "cuda":
        model.bfloat16()

    def prefill(idx, length):
        caches = model.hidden(idx, [None] * model.config.n_layer)[1]
        kept = sum(x.nbytes for cache in caches for x in cache)
        return model.stepper(caches, idx.size(1), length), kept

    return prefill


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

    def prefill(idx, length):
        cache = DynamicCache() if attention == "softmax" else Cache(
            layer_class_to_replicate=hf.StateLayer)

        def step(idx):
            return model.hf(idx, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

        step(idx)
        return step, sum(x.nbytes for layer in cache.layers for x in (
            (layer.keys, layer.values) if attention == "softmax" else layer.state))

    return prefill


@torch.no_grad()
def time_generation(prefill, attention, contexts, batches, device):
    table = []
    for context, batch in ((context, batch) for batch in batches for context in contexts):
        idx = torch.randint(256, (batch, context), device=device)
        try:
            step, kept = prefill(idx, context + 36)
            for i in range(36):
                if i == 4:                                  # the first ones warm up
                    float(x.sum())                          # waits for the device
                    start = time.perf_counter()
                x = step(idx[:, i:i + 1])
            float(x.sum())
        except torch.cuda.OutOfMemoryError:
            print(f"{attention:12}{batch:>5} x {context:,} tokens: out of memory", flush=True)
            continue
        finally:
            step = None                                     # its graph and caches
            torch.cuda.empty_cache()
        speed = 32 * batch / (time.perf_counter() - start)
        table.append({"attention": attention, "context": context, "batch": batch,
                      "bytes": kept // batch, "tokens_per_second": round(speed)})
        print(f"{attention:12}{batch:>5} x {context:>10,} tokens{kept // batch:>16,} bytes"
              f"{speed:>12,.0f} tokens/s", flush=True)
    return table


if __name__ == "__main__":
    gpu, begin = torch.cuda.is_available(), time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+",
                        default=[1024, 4096, 16384, 65536] if gpu else [128, 512, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64] if gpu else [1, 16],
                        help="sequences at once")
    parser.add_argument("--model", help="a model of transformers: name, folder or GGUF file")
    args = parser.parse_args()
    device, rows = "cuda" if gpu else "cpu", []
    for attention in ("softmax", "hedgehog"):
        prefill = of_transformers(args.model, attention, device) if args.model else own(
            attention, device)
        rows += time_generation(prefill, attention, args.contexts, args.batches, device)
    print(stamped({"generation": rows, "model": args.model or "own", "data": "random tokens",
                   "seed": 0, "seconds": round(time.perf_counter() - begin, 1),
                   "device": torch.cuda.get_device_name() if gpu else "cpu"}))
