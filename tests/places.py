"""How a map's weights and a model's loss change when the same tokens stand at other positions.

    python tests/places.py out/distill-stdlib-hedgehog/stage1       for runs with rotary positions

The first half of every tenth validation context is put at positions from 0, from half a context,
from a whole one, which the model has not seen, and from four. Of a distilled map (stage1) KL is
that of its weights from softmax's, "moved" that from its own weights at 0, means over layers and
queries; the loss is the model's, in nats per token. The last line is JSON.
"""

import sys
from pathlib import Path
from statistics import mean

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))
import distill
import train_lm
from analysis import put, watching
from command_line import parse
from hedgehog import SoftmaxAttention, attention_kl, softmax_attention_weights


@torch.no_grad()
def main(run):
    o = parse(distill.Options, distill.PRESETS, distill.preset_for, distill.from_teacher, "",
              ["--analyze", run])
    task, model, _ = distill.load(run, o)
    layers, half, found, at_0 = model.attention_layers(), o.block_size // 2, [], {}
    mixes = [layer.mix for layer in layers]
    x, y = (z[:, :half] for z in task.batch("valid", range(0, task.num_examples("valid"), 10)))
    for start in (0, half, 2 * half, 8 * half):
        kl, moved = [], []

        def look(i, q, k, positions, causal, key_mask):
            weights = mixes[i].weights(q, k, positions, causal)
            kl.append(float(attention_kl(softmax_attention_weights(q, k, causal), weights)))
            moved.append(float(attention_kl(at_0.setdefault(i, weights), weights)))

        put(mixes, layers)
        logits = model.lm_head(model.hidden(x, None, start)[0])[..., :task.vocab_size]
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        put([SoftmaxAttention() for _ in layers], layers)   # every layer sees the teacher's q and k
        with watching(layers, look):
            model.hidden(x, None, start)
        found.append({"start": start, "kl": mean(kl), "moved": mean(moved), "loss": float(loss)})
        print(f"from {start:5}  KL {mean(kl):.3f}  moved {mean(moved):.3f}  loss {loss:.3f}")
    print(train_lm.stamped({"places": found, "run": run, "data": task.name, "seed": o.seed,
                            "device": train_lm.device_name(o)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
