"""Turn a trained softmax Transformer into a Hedgehog one, and measure why it works.

    python distill.py                                   trains a small teacher first: minutes
    python distill.py --teacher out/stdlib-softmax      a run of train_lm.py --attention softmax
    python distill.py --attention t2r --no-distill      another map; without stage 1
    python distill.py --attention hedgehog,softmax      convert every other layer
    python distill.py --lora 8                          stage 2 by low-rank adapters
    python distill.py --task listops                    the same for a classifier, an encoder
    python distill.py --task FOLDER --teacher RUN       GLUE's train.tsv and dev.tsv
    python distill.py --teacher gpt2 --data TEXT        a model of Hugging Face: name, folder, GGUF
    python distill.py --analyze RUN --plot figures/     entropy, monotonicity, KL by layer and map

The paper's section 4: every attention layer gets a feature map, which first learns to give
softmax's attention weights (stage 1, all else frozen); then linear attention takes softmax's place
and the whole model is finetuned (stage 2). Below: options, the two stages, adapters, tables;
analysis.py measures. OUT gets log.jsonl, result.json, and teacher/, stage1/, stage2/, softmax/ and
with ListOps scratch/: checkpoints of train_lm.py, which samples from those of text and goes on with
them, or for a model of Hugging Face folders that transformers opens.
"""

import copy
import functools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import train_lm
from analysis import analyze, measure, put, run_layers, watching
from command_line import claimed, one_line_errors, option, parse
from gpt import GPT
from hedgehog import GPTConfig, SoftmaxAttention, attention_kl, softmax_attention_weights
from linear import linear_attention_weights
from tasks import (Classification, Images, Responses, glue, gpt2_encoding, listops, load_data,
                   matthews)
from train_lm import autocast, identity, set_rate

# --- options --------------------------------------------------------------------------------------


@dataclass
class Options(train_lm.Options):
    """train_lm.py's options and these. --attention is what the layers are converted to. A teacher
    of train_lm.py gives its shape and, without --task, data and batch size."""
    data: str = option("", "stdlib, wikitext103, a text file, a folder, or responses in a .jsonl")
    preset: str = option("", "tiny (default without a GPU), small (with one) or gpt2; --task and "
                         "--teacher choose listops, glue or hf")
    position: str = option("learned", "of a teacher that is trained", choices=["learned", "rotary"])
    epochs: float = option(0.0, "passes over the data, instead of --teacher-steps", 0, 1e6)
    teacher: str = option("", "softmax run of train_lm.py on text, or a model of transformers by "
                          "name, folder or GGUF file (default: one is trained)")
    teacher_steps: int = option(1300, "of a teacher that is trained, or give --epochs", 0)
    teacher_lr: float = option(3e-3, "its learning rate", 0, 1e3)
    distill: bool = option(True, "stage 1")
    distill_steps: int = option(400, "of stage 1", 1)
    distill_batch_size: int = option(0, "sequences of a step of stage 1; 0: --batch-size", 0)
    distill_lr: float = option(3e-2, "learning rate of stage 1", 0, 1e3)
    steps: int = option(400, "of stage 2 and of softmax's finetuning", 1)
    lr: float = option(1e-3, "peak learning rate of both", 0, 1e3)
    baseline: bool = option(True, "finetune softmax alike")
    lora: int = option(0, "rank of adapters on q, k, v and output projections; with them stage 2 "
                       "trains nothing else but the maps. 0: it trains all", 0)
    lora_alpha: float = option(16.0, "their alpha", 0, 1e6)
    task: str = option("", "instead of text: listops, a folder in GLUE's layout, or one of images")
    listops_low: int = option(10, "expressions have more tokens; Long Range Arena: 500", 0)
    listops_high: int = option(50, "and fewer; Long Range Arena: 2000", 3)
    listops_examples: int = option(20000, "to train on; Long Range Arena: 96000", 1)
    rouge: int = option(100, "validation prompts to answer, with --data FILE.jsonl", 1)
    analyze: str = option("", "print KL, entropy and monotonicity of a run by layer and map")
    plot: str = option("", "folder for the figures of --analyze (needs matplotlib)")

    replaces = {"epochs": {"teacher_steps": 0}, "teacher_steps": {"epochs": 0.0}}

    def __post_init__(self):
        out = self.out
        super().__post_init__()
        name = Path(self.task or self.data).resolve().name
        self.out = out or f"out/distill-{name}-{self.attention}"


LARGE = dict(teacher_steps=0, distill_steps=2000, distill_batch_size=4, steps=400)
PRESETS = {
    # On learned positions attention is easier to mimic than on rotary ones.
    "tiny": dict(position="learned"),
    "small": train_lm.PRESETS["small"] | LARGE | dict(position="learned", teacher_lr=1e-3, lr=1e-3),
    "gpt2": train_lm.PRESETS["gpt2"] | LARGE | dict(teacher_lr=6e-4),
    "listops": dict(n_layer=2, n_head=2, n_embd=128, batch_size=32, teacher_steps=3000,
                    teacher_lr=1e-3, distill_steps=500, distill_lr=1e-2, steps=1000, lr=3e-4),
    "glue": dict(batch_size=32, teacher_lr=1e-4, distill_steps=300, distill_lr=1e-2, steps=1300,
                 lr=1e-4),
    # A model of transformers.
    "hf": dict(block_size=512, batch_size=16, micro_batch=8, teacher_steps=1000, teacher_lr=3e-5,
               distill_steps=1000, distill_lr=1e-2, steps=1000, lr=1e-4, compile=False),
}
SHAPE = "n_layer", "n_head", "n_embd", "position"           # of a model


def preset_for(given):
    if (run := given.get("teacher") or given.get("analyze")) and not is_run(run):
        return "hf"
    if given.get("task"):
        return "listops" if given["task"] == "listops" else "glue"
    return "small" if train_lm.preset_for(given) == "gpt2" else "tiny"


def from_teacher(values, given):
    """The teacher's (or the analysed run's) options for what has to fit to it."""
    run, task = given.get("teacher") or given.get("analyze"), given.get("task")
    shape, batch = {*SHAPE, "dropout"}, set() if task else {"batch_size"}
    own = set().union(*(keys for applies, keys in (
        (run, shape),
        (run and not task, {"epochs", "teacher_steps", "teacher_lr"}),
        (run and not is_run(run), {"tokenizer"}),
        (task, {"data", "tokenizer"}),
        (task == "listops", {"block_size"})) if applies))
    for key in sorted(own & given.keys()):
        raise ValueError(f"--{key.replace('_', '-')}: {task or run} has its own")
    if not run or not is_run(run):
        return values
    state = train_lm.load_checkpoint(run)
    saved = state["options"] | {"tokenizer": state["data"][1]}      # of wiki.*, say, by default
    keys = shape | batch | {"data", "data_dir", "tokenizer", "block_size"}
    return values | {key: saved[key] for key in keys}


# --- the two stages -------------------------------------------------------------------------------
#
# They do not know the model, but for its attention layers, which make y in a submodule `mix`
# (hedgehog.py). While maps learn, softmax stays in `mix` and is watched.


def kl_of_queries(q, k, phi_q, phi_k, r, causal, key_mask, queries):
    teacher = softmax_attention_weights(q, k, causal, key_mask)
    student = linear_attention_weights(phi_q, phi_k, causal, key_mask, r)
    return attention_kl(teacher, student, queries)


@functools.cache
def compiled(function):
    return torch.compile(function)


def mimicry_loss(feature_map, q, k, positions, causal=True, key_mask=None, block=None,
                 compile=False):
    """KL(a || b), a softmax's weights and b the map's, mean over heads and queries.

    The paper's loss (section 4, Appendix A), -sum_j a_ij log b_ij, less softmax's entropy, which no
    map changes: the same gradient, and 0 when they are alike. Only softmax's logits are divided by
    sqrt(d). The weights are made `block` queries at a time; if that takes several blocks they are
    made again in backward, instead of being kept. By default a block has 2^25 of them, 128 MiB.
    """
    B, H, T, _ = q.shape
    block = block or max(1, 2**25 // (B * H * T))
    part = compiled(kl_of_queries) if compile else kl_of_queries
    if block < T:
        part = functools.partial(recompute, part, use_reentrant=False, preserve_rng_state=False)
    (phi_q, phi_k), r = feature_map(q, k, positions), feature_map.rates()   # (B, H, T, F)
    mask = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    total = 0.0
    for i in range(0, T, block):
        rows, keys = slice(i, i + block), slice(0, i + block if causal else T)
        queries = mask[:, rows]                             # padding asks nothing
        total = total + queries.sum() * part(q[:, :, rows], k[:, :, keys], phi_q[:, :, rows],
                                             phi_k[:, :, keys], r, causal, mask[:, keys], queries)
    return total / mask.sum().clamp(min=1)


def distill(model, mixes, task, o):
    """Stage 1: only the maps in `mixes` (a LinearAttention for each layer) learn. Returns the mean
    KL over the layers that learn at each step.

    Forward passes are the softmax model's own, so every layer sees the teacher's hidden states and
    its loss is its map's alone: gradients are taken layer by layer while the model runs, and none
    goes through it.
    """
    layers, losses = model.attention_layers(), []
    # None where softmax stays, or a map that cannot learn
    maps = [mix.feature_map if list(mix.parameters()) else None for mix in mixes]
    parameters = [p for m in maps if m for p in m.parameters()]
    model.eval()                        # no dropout
    optimizer = torch.optim.AdamW(parameters, lr=o.distill_lr, weight_decay=0.0)

    def backward(share, *batch):
        loss = 0.0
        def learn(i, q, k, positions, causal, key_mask):
            nonlocal loss
            if maps[i] is None:
                return
            q, k = (x.detach().to(parameters[0].dtype) for x in (q, k))
            with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                part = mimicry_loss(maps[i], q, k, positions, causal, key_mask, compile=o.compile)
                part = part * share / sum(map(bool, maps))
                part.backward()
            loss = loss + part.detach()

        with watching(layers, learn), torch.no_grad(), autocast(o):
            run_layers(model, *batch)
        return loss

    backward = train_lm.with_graph(backward, o)
    bar = tqdm(range(o.distill_steps), desc="stage 1")
    for step in bar:
        set_rate(optimizer, step, o.distill_steps, o.distill_lr, o.warmup)
        losses.append(sum(backward(*batch) for batch in micro_batches(task, step, o)))
        optimizer.step()            # gradients are not clipped: that would tie the layers together
        optimizer.zero_grad(set_to_none=False)              # a graph adds to them where they are
        show_loss(bar, losses, "stage 1", o.distill_steps)
    return losses


def finetune(model, task, o, name, steps, lr, groups=None):
    """Stage 2, and any other training: the parameters in `groups`, or all, learn the task itself.
    Returns the optimizer and the loss at each step."""
    optimizer, losses = train_lm.adamw(groups or model.parameter_groups(o.weight_decay), lr), []
    model.train()
    if o.recompute:
        model.recompute_activations()
    torch.compiler.reset()                                  # forget the models before this one
    backward = train_lm.backward_of(torch.compile(model) if o.compile else model, o)
    bar = tqdm(range(steps), desc=name)
    for step in bar:
        set_rate(optimizer, step, steps, lr, o.warmup)
        losses.append(train_lm.take_step(model, optimizer, task, step, o, backward))
        show_loss(bar, losses, name, steps)
    optimizer.zero_grad()                                   # frees the gradients
    return optimizer, losses


def micro_batches(task, step, o):
    """train_lm.batches_of with shares of the tokens: a KL is a mean over queries."""
    order = train_lm.example_order(step, o.batch_size, task.num_examples("train"), o.seed)
    batches = [task.batch("train", order[i:i + o.micro_batch])
               for i in range(0, len(order), o.micro_batch)]
    tokens = [int((batch[2] if len(batch) > 2 else torch.ones_like(batch[0])).sum())
              for batch in batches]
    for batch, n in zip(batches, tokens):
        yield train_lm.to_device((torch.tensor(n / sum(tokens)), *batch), o.device)


def show_loss(bar, losses, name, steps):
    if len(losses) % 10 == 1 or len(losses) == steps:       # reading them waits for the device
        losses[-10:] = map(float, losses[-10:])             # kept as tensors they would pin memory
        if not math.isfinite(loss := losses[-1]):
            raise ValueError(f"{name}: the loss is {loss} at step {len(losses)}: try a lower "
                             "learning rate or --precision fp32")
        bar.set_postfix_str(f"loss {loss:.3f}")


# --- adapters -------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """W + alpha / r B A, B zero at first (LoRA, Hu et al., arXiv 2106.09685, equation 3).

    One pair A (r, in), B (out / parts, r) for each of the `parts` matrices stacked in W (out, in).
    """

    def __init__(self, W, rank, alpha, parts, transposed=False):
        super().__init__()
        out, size = W.T.shape if transposed else W.shape
        self.scale, self.transposed = alpha / rank, transposed
        self.A = nn.Parameter(torch.randn(parts, rank, size, device=W.device) / math.sqrt(size))
        self.B = nn.Parameter(torch.zeros(parts, out // parts, rank, device=W.device))

    def forward(self, W):
        change = self.scale * (self.B @ self.A).flatten(0, 1)
        return W + (change.T if self.transposed else change)


def add_lora(model, rank, alpha):
    """Adapters on the projections; returns their parameters."""
    adapters = []
    for module, parts in model.projections():
        transposed = not isinstance(module, nn.Linear)      # GPT-2 of transformers has W (in, out)
        adapters.append(LowRank(module.weight, rank, alpha, parts, transposed))
        parametrize.register_parametrization(module, "weight", adapters[-1])
    return [p for adapter in adapters for p in adapter.parameters()]


def merge_lora(model):
    """The same model without adapters: W becomes W + alpha / r B A."""
    for module, _ in model.projections():
        parametrize.remove_parametrizations(module, "weight")


# --- from a teacher to a table --------------------------------------------------------------------


def model_with(config, teacher, seed=0):
    """A new model of this config with all of the teacher's weights that it has a place for."""
    torch.manual_seed(seed)
    if not isinstance(teacher, GPT):
        return copy.deepcopy(teacher).convert(config.attention, config.feature_dim)
    model = GPT(config).to(next(teacher.parameters()))      # its device and precision
    model.load_state_dict({name: x for name, x in teacher.state_dict().items()
                           if name in model.state_dict()}, strict=False)
    return model


@torch.no_grad()
def score(model, task, o):
    """A model's figure on the whole validation split."""
    if task.figure != "matthews":
        return train_lm.evaluate(model, task, "valid", o)[task.figure]
    model.eval()
    guesses, n = [], task.num_examples("valid")
    for i in range(0, n, o.micro_batch):
        idx, _, mask = task.batch("valid", range(i, min(i + o.micro_batch, n)))
        with autocast(o):
            logits = model(idx.to(o.device), key_mask=mask.to(o.device))[0]
        guesses += logits.argmax(-1).tolist()
    return 100 * matthews([label for _, label in task.splits["valid"]], guesses)


def row(name, model, mixes, task, o):
    """A line of the table: the figure with `mixes` in the model, and means over layers of what
    measure() finds in the model as it is."""
    layers, figures = model.attention_layers(), measure(model, mixes, task, o)
    before = [layer.mix for layer in layers]
    put(mixes, layers)
    line = {"name": name, task.figure: score(model, task, o),
            **{key: sum(x) / len(x) for key, x in figures.items()}}
    if hasattr(task, "rouge"):
        line |= task.rouge(model, o, lambda steps: tqdm(steps, desc="responses", leave=False))
    put(before, layers)
    log(o, line)
    return line


def log(o, line):
    with open(Path(o.out) / "log.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def train(name, model, task, o, steps, lr, rank=0):
    """finetune() all parameters or, with a rank, the maps and adapters of that rank; saved in
    OUT/NAME, where train_lm.py --resume goes on with a language model of its own."""
    groups = None
    if rank:
        model.requires_grad_(False)
        maps = [p for key, p in model.named_parameters() if "feature_map" in key]
        chosen = [p.requires_grad_() for p in maps + add_lora(model, rank, o.lora_alpha)]
        groups = [{"params": chosen, "weight_decay": 0.0}]
    begin = time.perf_counter()
    optimizer, losses = finetune(model, task, o, name, steps, lr, groups)
    if rank:
        merge_lora(model)
        model.requires_grad_(True)
        optimizer = train_lm.adamw(model.parameter_groups(o.weight_decay), lr)  # without moments
    save(name, model, task, o, optimizer, steps, time.perf_counter() - begin, losses)


def save(name, model, task, o, optimizer, steps, seconds, losses):
    log(o, {"stage": name, "steps": steps, "seconds": round(seconds, 1),
            "loss": [round(x, 4) for x in losses[::max(1, steps // 20)] + losses[-1:]]})
    if not isinstance(model, GPT):
        model.stage = name
        return model.save(f"{o.out}/{name}")
    shape = {x: getattr(model.config, x) for x in (*SHAPE, "dropout", "attention", "feature_dim")}
    done = 0 if name == "stage1" else steps                 # then --resume is stage 2
    train_lm.save_checkpoint(
        replace(o, out=f"{o.out}/{name}", **shape), model, task, optimizer, {"step": done,
        "evaluated": 0, "seconds": 0.0, "losses": [], "valid": None, "stage": name})


def convert(task, teacher, o):
    """The whole comparison, as rows of a table."""
    # The stages draw other batches, each by a seed of its own.
    stage_1 = replace(o, seed=o.seed + 10**6, batch_size=o.distill_batch_size or o.batch_size)
    stage_2 = replace(o, seed=o.seed + 2 * 10**6)
    label = o.attention if o.distill else f"{o.attention}-no-distill"
    config = replace(teacher.config, attention=o.attention, feature_dim=o.feature_dim)
    model = model_with(config, teacher, o.seed)
    layers = model.attention_layers()
    linear, softmax = [layer.mix for layer in layers], [SoftmaxAttention() for _ in layers]
    put(softmax, layers)
    rows = [row("softmax, the teacher", model, softmax, task, o),
            row(f"{label}, swapped", model, linear, task, o)]
    if o.distill and any(list(mix.parameters()) for mix in linear):
        begin = time.perf_counter()
        losses = distill(model, linear, task, stage_1)
        seconds = time.perf_counter() - begin
        rows.append(row(f"{label}, stage 1", model, linear, task, o))
        put(linear, layers)             # what is saved has its maps in place
        optimizer = train_lm.adamw(model.parameter_groups(o.weight_decay), o.lr)
        save("stage1", model, task, stage_2, optimizer, o.distill_steps, seconds, losses)
    put(linear, layers)
    train("stage2", model, task, stage_2, o.steps, o.lr, o.lora)
    rows.append(row(f"{label}, stage 2", model, linear, task, o))
    if o.baseline:
        model = model_with(teacher.config, teacher, o.seed)
        train("softmax", model, task, stage_2, o.steps, o.lr, o.lora)
        rows.append(row("softmax, finetuned", model, softmax, task, o))
    if task.name == "listops":          # as many steps as the teacher and stage 2 together
        torch.manual_seed(o.seed)
        model = GPT(config).to(o.device)
        train("scratch", model, task, o, o.teacher_steps + o.steps, o.teacher_lr)
        mixes = [layer.mix for layer in model.attention_layers()]
        rows.append(row(f"{o.attention}, from scratch", model, mixes, task, o))
    return rows


def print_table(rows, figure):
    print(f"{'':36}{figure:>12}{'KL':>9}{'entropy: softmax':>18}{'linear':>9}{'monotonicity':>14}")
    for r in rows:
        linear = "-" if r["kl"] == 0 else f"{r['entropy']:.3f}"     # it is softmax
        print(f"{r['name']:36}{r[figure]:12.2f}{r['kl']:9.3f}{r['entropy_softmax']:18.3f}"
              f"{linear:>9}{r['monotonicity']:14.3f}")
    for r in rows:
        if "rouge1" in r:
            print(f"{r['name']:36}ROUGE-1, -2, -L {r['rouge1']:.1f} {r['rouge2']:.1f} "
                  f"{r['rougeL']:.1f}")
    print("KL(softmax || linear), entropies in nats and monotonicity on the q and k of the softmax "
          "teacher before stage 2, of the model itself after it")


def load(run, o):
    """A trained model and its task: a run of train_lm.py, or a model of transformers. Returns task,
    model and the name of the stage that it is from, if any."""
    if is_run(run):
        model, state = train_lm.load_model(run, o.device)
        tokenizer, stage = state["data"][1], state["progress"].get("stage", "")
        if model.config.num_classes or o.task and tokenizer not in ("bytes", "gpt2"):
            raise ValueError(f"{run} is a classifier, or not of bytes or GPT-2's tokens for --task")
        model.check_length(o.block_size)
        if o.task:
            return glue_task(o, tokenizer, gpt2_encoding().encode_ordinary
                             if tokenizer == "gpt2" else lambda text: list(text.encode())
                             ), model, stage
        data = load_data(o)
        if (data.tokenizer, data.vocab_size) != (tokenizer, model.config.vocab_size):
            raise ValueError(f"--data {o.data} is {data.tokenizer} tokens of {data.vocab_size}, "
                             f"the model has {tokenizer} tokens of {model.config.vocab_size}")
        return data, model, stage

    import hf                                               # needs transformers
    torch.manual_seed(o.seed)                               # of a new head for the classes
    if o.task:
        of_text = Path(o.task, "train.tsv").exists()
        kind = "SequenceClassification" if of_text else "ImageClassification"
        model = hf.load(run, kind, o.device)                # for its tokenizer and known classes
        if of_text:
            if model.config.causal:
                raise ValueError(f"{run}: --task FOLDER with text is for encoders such as BERT")
            model.check_length(o.block_size)
            task = glue_task(o, "", lambda text: model.tokenizer(
                *text.split("\n", 1), truncation=True, max_length=o.block_size)["input_ids"],
                model.labels)
        else:
            task = Images(o.task, model.tokenizer, model.labels)
        return task, hf.load(run, kind, o.device, task.labels), model.stage
    model = hf.load(run, "CausalLM", o.device)
    model.check_length(o.block_size)
    if o.data.endswith(".jsonl"):
        return Responses(o.data, model.tokenizer, o.block_size), model, model.stage
    data = load_data(o, hf.encoding(model.tokenizer))
    if data.vocab_size != len(model.tokenizer):
        raise ValueError(f"--data {o.data} is tokens of a vocabulary of {data.vocab_size}, the "
                         f"model's has {len(model.tokenizer)}")
    return data, model, model.stage


def is_run(path):
    """Whether this is a run of train_lm.py, its folder or its checkpoint. Not one are a folder of
    transformers, a .gguf file, and what does not exist, which is a model's name."""
    path = Path(path)
    known = path.exists() and path.suffix != ".gguf" and not (path / "config.json").exists()
    return known or path.suffix == ".pt" or (path / "checkpoint.pt").exists()


def glue_task(o, tokenizer, encode, known=()):
    return Classification(Path(o.task).name, tokenizer,
                          *glue(Path(o.task), encode, o.block_size, known))


def listops_task(o):
    """ListOps and a model that has learned nothing yet."""
    sizes = {"train": o.listops_examples, "valid": 2000}
    task = Classification("listops", "listops", listops(o.listops_low, o.listops_high, sizes))
    torch.manual_seed(o.seed)
    return task, GPT(GPTConfig(vocab_size=15, block_size=o.listops_high, n_layer=o.n_layer,
                               n_head=o.n_head, n_embd=o.n_embd, position=o.position,
                               dropout=o.dropout, attention="softmax", causal=False,
                               num_classes=10)).to(o.device)


def train_teacher(o):
    """Trains a softmax model in OUT/teacher by train_lm.py, or finds it there from a run that was
    interrupted, or goes on with it. Returns its folder."""
    shared = {f.name: getattr(o, f.name) for f in fields(train_lm.Options)}
    t = train_lm.Options(**shared | dict(attention="softmax", feature_dim=0, steps=o.teacher_steps,
                                         lr=o.teacher_lr, out=f"{o.out}/teacher"))
    data, begun = load_data(t), Path(t.out, "checkpoint.pt").exists() and not o.overwrite
    if begun:
        state = train_lm.load_checkpoint(t.out)
        saved, now = state["options"] | {"text": state["data"]}, vars(t) | {"text": identity(data)}
        for key in sorted(now.keys() - train_lm.CHANGEABLE | {"data", "steps", "epochs", "lr"}):
            if saved[key] != now[key]:
                raise ValueError(f"{t.out} was trained with {key} {saved[key]}: --overwrite "
                                 "replaces it, --out DIR keeps it")
    if not begun or not Path(t.out, "result.json").exists():
        _, result = train_lm.train(replace(t, resume=begun), data)
        if result is None:
            raise KeyboardInterrupt
        train_lm.write_result(t.out, result)
    return t.out


def prepare(o):
    """Task and teacher. With --task FOLDER the teacher has still to learn it, in run()."""
    if o.task == "listops":
        task, teacher = listops_task(o)
    elif o.task and not o.teacher:
        raise ValueError("--task FOLDER starts from a trained model: give --teacher")
    else:
        task, teacher, _ = load(o.teacher or train_teacher(o), o)
    if set(teacher.config.attentions) != {"softmax"}:
        raise ValueError(f"--teacher {o.teacher} has {teacher.config.attention} attention already: "
                         "give one with softmax, of train_lm.py --attention softmax, say")
    if o.task and o.task != "listops" and isinstance(teacher, GPT):
        teacher = model_with(replace(teacher.config, causal=False, num_classes=task.classes),
                             teacher, o.seed)
    replace(teacher.config, attention=o.attention)          # an error now, not after the training
    return task, teacher


# --- command line ---------------------------------------------------------------------------------


def run(argv):
    o = parse(Options, PRESETS, preset_for, from_teacher, __doc__.split("\n")[0], argv)
    if o.sample is not None or o.resume or "LOCAL_RANK" in os.environ:
        raise ValueError("--sample, --resume and torchrun are train_lm.py's, for OUT/stage2 say")
    if o.data == "recall":
        raise ValueError("--data recall is for train_lm.py: conversions are of text and --task")
    if o.task and o.teacher_steps == 0:
        raise ValueError("--task counts its teacher's training in --teacher-steps, above 0")
    if o.teacher and (o.task == "listops" or o.analyze):
        raise ValueError("--task listops trains its own teacher, and --analyze RUN has none: leave "
                         "--teacher out")
    if o.plot and not o.analyze or o.analyze and o.task:
        raise ValueError("--plot goes with --analyze, and that with text, not with --task")
    if o.task not in ("", "listops") and not Path(o.task).is_dir():
        raise ValueError(f"--task {o.task}: there is no such folder")
    train_lm.start(o)
    if o.analyze:
        print(train_lm.stamped(analyze(*load(o.analyze, o), o)))
        return 0
    out, begin = Path(o.out), time.perf_counter()
    stages = ["stage1", "stage2", "softmax", "scratch"]
    writes = {(out / name).resolve() for name in stages + ["teacher"] * bool(o.task)}
    teacher = Path(o.teacher).resolve()
    if o.teacher and (teacher.parent if teacher.is_file() else teacher) in writes | {out.resolve()}:
        raise ValueError(f"--out {o.out} would overwrite its own teacher: give another one")
    old = ["checkpoint.pt", "result.json"] + ["teacher"] * bool(o.task)
    # Stages are of an interrupted run, unless train_lm.py went on with them.
    old += [f"{name}/log.jsonl" for name in stages] if (out / "log.jsonl").exists() else stages
    if any((out / name).exists() for name in old) and not o.overwrite:
        raise ValueError(f"{o.out} holds a run already: --overwrite or another --out DIR")
    try:
        with claimed(out):
            task, teacher = prepare(o)
            o = replace(o, **{key: getattr(teacher.config, key) for key in SHAPE})
            for name in stages + ["teacher"] * bool(o.task):        # of an earlier run
                shutil.rmtree(out / name, ignore_errors=True)
            for name in ("log.jsonl", "result.json"):
                (out / name).unlink(missing_ok=True)
            if o.task:
                train("teacher", teacher, task, o, o.teacher_steps, o.teacher_lr)
            rows = convert(task, teacher, o)
            line = train_lm.write_result(o.out, {
                "data": task.name, "figure": task.figure, "rows": rows, "seed": o.seed,
                "seconds": round(time.perf_counter() - begin, 1), "precision": o.precision,
                "device": train_lm.device_name(o), "options": vars(o)})
    except KeyboardInterrupt:
        print(f"stopped; {o.out} has what was finished; " + (
            "--overwrite begins anew" if o.task else "the same command begins anew" if o.teacher
            else "the same command goes on, from its teacher; not with --overwrite"))
        return 130
    print_table(rows, task.figure)
    print(line)
    return 0


def main(argv=None):
    return one_line_errors("distill.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
