"""Turn a trained softmax Transformer into a Hedgehog one, and measure why it works.

    python distill.py                                   trains a small teacher first: minutes
    python distill.py --teacher out/stdlib-softmax      a run of train_lm.py --attention softmax
    python distill.py --feature-map t2r --no-distill    another map; without stage 1
    python distill.py --lora 8                          stage 2 by low-rank adapters
    python distill.py --compare                         every map under the same budget
    python distill.py --task listops                    the same for a classifier, an encoder
    python distill.py --task FOLDER --teacher RUN       GLUE's train.tsv and dev.tsv
    python distill.py --analyze RUN --plot figures/     entropy, monotonicity, KL by layer and map
    python distill.py --transfer RUN RUN --data TEXT    do distilled maps hold on other text?

The paper's section 4: every attention layer gets feature maps, which first learn to give softmax's
attention weights (stage 1, all else frozen); then linear attention takes softmax's place and the
whole model is finetuned for a while (stage 2). In this file: the two stages, tasks, tables,
analysis, the command line. OUT gets log.jsonl, result.json, and teacher/, stage1/, stage2/ and
softmax/ with a checkpoint.pt each, from which train_lm.py can sample a text and go on.
"""

import argparse
import contextlib
import json
import math
import random
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import train_lm
from hedgehog import (FEATURE_MAPS, GPT, GPTConfig, attention_kl, entropy, monotonicity,
                      softmax_attention_weights)
from kernel import linear_attention_weights
from train_lm import UserError, amount, positive, whole


# --- the two stages -------------------------------------------------------------------------------
#
# They do not know the model. An attention module is anything with
#
#     feature_map     a FeatureMap
#     causal          bool
#     linear          whether forward() uses the feature map, or softmax with the map standing by
#     watch           None, or what forward() calls with (self, q, k, positions, key_mask), where
#                     q, k (B, H, T, d) are what the weights are made of, after rotary positions
#                     and with k repeated where heads share it; key_mask (B, T) is False at padding
#
# and forward(batch) runs the model that they are in, for stage 2 up to its loss.
# micro_batches(step) yields one optimizer step's batches, each with its share of the examples.


@contextlib.contextmanager
def watching(attentions, watch, linear):
    """Within it, forward passes use linear or softmax attention and call `watch`."""
    before = [a.linear for a in attentions]
    for a in attentions:
        a.linear, a.watch = linear, watch
    try:
        yield
    finally:
        for a, was in zip(attentions, before):
            a.linear, a.watch = was, None


def mimicry_loss(feature_map, q, k, positions, causal=True, key_mask=None, block=256):
    """KL(a || b), a softmax's weights and b the map's, mean over heads and queries.

    The paper's loss (section 4, Appendix A), -sum_j a_ij log b_ij, less softmax's entropy, which no
    map changes: the same gradient, and 0 when they are alike. Only softmax's logits are divided by
    sqrt(d). The weights are made `block` queries at a time and again in backward, instead of being
    kept: memory grows with T * block.
    """
    phi_q, phi_k = feature_map(q, k, positions)             # (B, H, T, F)
    mask = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask

    def part(q, k, phi_q, phi_k, key_mask, queries):
        teacher = softmax_attention_weights(q, k, causal, key_mask)
        student = linear_attention_weights(phi_q, phi_k, causal, key_mask)
        return attention_kl(teacher, student, queries)

    T, total = q.size(2), 0.0
    for i in range(0, T, block):
        rows, keys = slice(i, i + block), slice(0, i + block if causal else T)
        queries = mask[:, rows]                             # padding asks nothing
        total = total + queries.sum() * recompute(
            part, q[:, :, rows], k[:, :, keys], phi_q[:, :, rows], phi_k[:, :, keys],
            mask[:, keys], queries, use_reentrant=False)
    return total / mask.sum()


def distill(attentions, forward, micro_batches, steps, lr, bar):
    """Stage 1: only the maps learn. Returns the optimizer and the mean loss over layers by step.

    Forward passes are the softmax model's own, so every layer sees the teacher's hidden states and
    its loss is its map's alone: gradients are taken layer by layer while the model runs, and none
    goes through it.
    """
    maps = [p for a in attentions for p in a.feature_map.parameters()]
    now = share_now = 0.0

    def look(attention, q, k, positions, key_mask):
        nonlocal now
        q, k = (x.detach().to(maps[0].dtype) for x in (q, k))
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            loss = share_now / len(attentions) * mimicry_loss(
                attention.feature_map, q, k, positions, attention.causal, key_mask)
            loss.backward()
        now = now + loss.detach()

    def learn(batch, share):
        nonlocal now, share_now
        now, share_now = 0.0, share
        with watching(attentions, look, linear=False), torch.no_grad():
            forward(batch)
        return now

    optimizer = torch.optim.AdamW(maps, lr=lr, weight_decay=0.0)
    return optimizer, optimise(optimizer, learn, micro_batches, steps, lr, bar)


def finetune(groups, forward, micro_batches, steps, lr, bar):
    """Stage 2, and any other training: the parameters in `groups` learn the task itself. Returns
    the optimizer and the loss of each step."""
    parameters = [p for group in groups for p in group["params"]]

    def learn(batch, share):
        loss = share * forward(batch)
        loss.backward()
        return loss.detach()

    optimizer = train_lm.adamw(groups, lr)
    return optimizer, optimise(optimizer, learn, micro_batches, steps, lr, bar,
                               lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))


def optimise(optimizer, learn, micro_batches, steps, lr, bar, clip=lambda: None):
    """The steps of a stage, warmed up and then slowed down; learn() leaves gradients and returns
    the loss. Stage 1 does not clip: a common norm would tie the layers together."""
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = train_lm.learning_rate(step, steps, lr, warmup=0.02)
        losses.append(sum(learn(batch, share) for batch, share in micro_batches(step)))
        clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:             # reading a loss waits for the device
            if not math.isfinite(loss := float(losses[-1])):
                raise UserError(f"{bar.desc}: the loss is {loss} at step {step + 1}: try a lower "
                                "learning rate or --precision fp32")
            bar.set_postfix_str(f"loss {loss:.3f}")         # stage 1's is the KL
        bar.update()
    return torch.stack(losses).tolist()


class LowRank(nn.Module):
    """W + alpha / r B A, B zero at first (LoRA, Hu et al., arXiv 2106.09685, equation 3).

    One pair A (r, in), B (out / parts, r) for each of the `parts` matrices stacked in W (out, in).
    """

    def __init__(self, W, rank, alpha, parts):
        super().__init__()
        out, size = W.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.randn(parts, rank, size, device=W.device) / math.sqrt(size))
        self.B = nn.Parameter(torch.zeros(parts, out // parts, rank, device=W.device))

    def forward(self, W):
        return W + self.scale * (self.B @ self.A).flatten(0, 1)


def lora_linears(attentions):
    """Query, key and value projections, which are one matrix here, and output projections."""
    return [(linear, parts) for a in attentions for linear, parts in ((a.qkv, 3), (a.proj, 1))]


def add_lora(attentions, rank, alpha):
    """Adapters on these projections; returns their parameters."""
    adapters = []
    for linear, parts in lora_linears(attentions):
        adapters.append(LowRank(linear.weight, rank, alpha, parts))
        parametrize.register_parametrization(linear, "weight", adapters[-1])
    return [p for adapter in adapters for p in adapter.parameters()]


def merge_lora(attentions):
    """The same model without adapters: W becomes W + alpha / r B A."""
    for linear, _ in lora_linears(attentions):
        parametrize.remove_parametrizations(linear, "weight")


# --- tasks: what a model is trained on and judged by ----------------------------------------------


class LanguageModelling:
    """Next tokens of a train_lm.Text; judged by perplexity over the whole validation split."""
    figure = "perplexity"

    def __init__(self, data, args, machine):
        self.data, self.args, self.machine = data, args, machine
        self.name, self.tokenizer = data.name, data.tokenizer

    def examples(self, split):
        return self.data.examples(split, self.args.block_size)

    def batch(self, split, indices):
        return self.data.batch(split, indices, self.args.block_size)

    def evaluate(self, model):
        return train_lm.evaluate(model, self.data, "valid", self.args, self.machine)["perplexity"]


class Classification:
    """Sequences and their classes; judged by accuracy, or Matthews correlation, in per cent."""

    def __init__(self, name, tokenizer, vocab_size, splits, args, machine, figure="accuracy"):
        self.name, self.tokenizer, self.vocab_size = name, tokenizer, vocab_size
        self.splits, self.args, self.machine, self.figure = splits, args, machine, figure
        self.classes = 1 + max(label for _, label in splits["train"])

    def examples(self, split):
        return len(self.splits[split])

    def batch(self, split, indices):
        """Token ids (B, T) up to the longest, classes (B), and where there is no padding (B, T)."""
        chosen = [self.splits[split][i] for i in indices]
        idx = torch.zeros(len(chosen), max(len(ids) for ids, _ in chosen), dtype=torch.long)
        key_mask = torch.zeros_like(idx, dtype=torch.bool)
        for row, (ids, _) in enumerate(chosen):
            idx[row, :len(ids)] = torch.from_numpy(ids.astype(np.int64))
            key_mask[row, :len(ids)] = True
        return idx, torch.tensor([label for _, label in chosen]), key_mask

    @torch.no_grad()
    def evaluate(self, model):
        model.eval()
        guesses, n = [], self.examples("valid")
        for i in tqdm(range(0, n, self.args.micro_batch), desc="valid", leave=False):
            idx, _, mask = on_device(self, "valid", range(i, min(i + self.args.micro_batch, n)))
            with self.machine.autocast():
                guesses += model(idx, key_mask=mask)[0].argmax(-1).tolist()
        labels = [label for _, label in self.splits["valid"]]
        if self.figure == "matthews":
            return 100 * matthews(labels, guesses)
        return 100 * sum(a == b for a, b in zip(labels, guesses)) / n


def matthews(labels, guesses):
    """Correlation of two binary sequences; 0 if one of them is constant."""
    x, y = (np.array(a, float) - np.mean(a) for a in (labels, guesses))
    return float((x * y).sum() / max(np.sqrt((x * x).sum() * (y * y).sum()), 1e-12))


def listops(low, high, sizes, seed=0):
    """Long Range Arena's ListOps (Tay et al., arXiv 2011.04006): MIN, MAX, MED, SM of digits.

    Tokens are 0 to 9, the operators 10 to 13 and the closing bracket 14. Expressions with low <
    length < high, no two the same. Returns split -> list of (ids, value).
    """
    rng, seen, in_vain = random.Random(seed), set(), 0

    def grow(depth):
        if depth >= 10 or rng.random() >= 0.25:
            return [rng.randrange(10)]
        ids = [rng.randrange(10, 14)]
        for _ in range(rng.randint(2, 10)):
            ids += grow(depth + 1)
            if len(ids) >= high:                            # too long already, whatever follows
                break
        return [*ids, 14]

    splits = {}
    for split, size in sizes.items():
        splits[split] = []
        while len(splits[split]) < size:
            ids, in_vain = grow(1), in_vain + 1
            if in_vain == 100_000:
                raise UserError(f"too few expressions are longer than {low} and shorter than "
                                f"{high}: give other lengths or fewer --listops-examples")
            if low < len(ids) < high and (key := bytes(ids)) not in seen:
                seen.add(key)
                in_vain = 0
                splits[split].append((np.array(ids, np.uint8), listops_value(ids)))
    return splits


def listops_value(ids):
    """The digit that an expression in listops' token ids stands for."""
    stack = []
    for token in ids:
        if token != 14:
            stack.append(token)
            continue
        digits = []
        while stack[-1] < 10:
            digits.append(stack.pop())
        operators = min, max, lambda x: int(statistics.median(x)), lambda x: sum(x) % 10
        stack.append(operators[stack.pop() - 10](digits))
    return int(stack[0])


TEXT_COLUMNS = ("sentence", "sentence1", "sentence2", "question", "question1", "question2",
                "#1 String", "#2 String")
LABEL_COLUMNS = ("label", "gold_label", "is_duplicate", "Quality")


def glue(folder, encode, block_size):
    """GLUE's train.tsv and dev.tsv: split -> list of (ids, class), and the figure to judge by.

    The header names the columns, except in CoLA, which has none. Two sentences are joined by a
    newline; what is longer than block_size is cut.
    """
    splits, labels, figure = {}, None, "accuracy"
    for split, name in (("train", "train.tsv"), ("valid", "dev.tsv")):
        try:
            lines = (folder / name).read_text(encoding="utf-8-sig", errors="replace").split("\n")
        except FileNotFoundError:
            raise UserError(f"--task {folder}: there is no {name}; listops needs no folder")
        rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
        head = rows[0] if rows else []
        texts = [i for i, column in enumerate(head) if column in TEXT_COLUMNS]
        label = [i for i, column in enumerate(head) if column in LABEL_COLUMNS]
        if texts and label:
            rows, label = rows[1:], label[0]
        elif len(head) == 4 and head[1] in ("0", "1"):      # CoLA: source, label, star, sentence
            texts, label, figure = [3], 1, "matthews"
        else:
            raise UserError(f"{folder / name}: no columns of text and label are known in its first "
                            f"line: {' | '.join(head)[:60]!r}")
        try:
            labels = labels or sorted({row[label] for row in rows})
            encoded = (encode("\n".join(row[i] for i in texts)) or [0] for row in rows)
            splits[split] = [(np.array(ids[:block_size], np.uint16), labels.index(row[label]))
                             for ids, row in zip(encoded, rows)]
        except (IndexError, ValueError):
            raise UserError(f"{folder / name}: a line has too few columns or a label that "
                            "train.tsv does not have")
        if not rows:
            raise UserError(f"{folder / name} has no examples")
    return splits, figure


# --- from a teacher to a table --------------------------------------------------------------------


def attention_layers(model):
    return [block.attn for block in model.blocks]


def model_with(config, teacher, seed=0):
    """A new model of this config with all of the teacher's weights that it has a place for."""
    torch.manual_seed(seed)
    model = GPT(config).to(next(teacher.parameters()))      # its device and precision
    model.load_state_dict({name: x for name, x in teacher.state_dict().items()
                           if name in model.state_dict()}, strict=False)
    return model


def on_device(task, split, indices):
    return tuple(x.to(task.machine.device) for x in task.batch(split, indices))


def micro_batches(task, step):
    """The examples of one step in pieces of --micro-batch, each with its share of the step."""
    args = task.args
    order = train_lm.example_order(step, args.batch_size, task.examples("train"), args.seed)
    for i in range(0, len(order), args.micro_batch):
        indices = order[i:i + args.micro_batch]
        yield on_device(task, "train", indices), len(indices) / len(order)


def log(task, line):
    with open(Path(task.args.out) / "log.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def run_stage(stage, first, name, task, forward, steps, lr):
    """distill or finetune, of which `first` is the first argument, with its progress bar."""
    def autocast(batch):
        with task.machine.autocast():
            return forward(batch)

    start = time.perf_counter()
    with tqdm(total=steps, unit="step", desc=name) as bar:
        optimizer, losses = stage(first, autocast, lambda step: micro_batches(task, step), steps,
                                  lr, bar)
    log(task, {"stage": name, "steps": steps, "seconds": round(time.perf_counter() - start, 1),
               "loss": [round(x, 4) for x in losses[::max(1, steps // 20)] + losses[-1:]]})
    return optimizer


def hidden(model, idx, targets, key_mask=None):
    """As far as attention layers can be watched: without logits and loss."""
    return model.hidden(idx, key_mask=key_mask)


def mimic(name, task, model, steps, lr):
    """Stage 1 of a GPT."""
    model.eval()
    run_stage(distill, attention_layers(model), name, task, lambda batch: hidden(model, *batch),
              steps, lr)


def train(name, task, model, steps, lr, rank=0):
    """All parameters or, with a rank, adapters and feature maps; returns the optimizer."""
    attentions, groups = attention_layers(model), model.parameter_groups(0.1)
    if rank:
        model.requires_grad_(False)
        maps = [p for a in attentions if a.linear for p in a.feature_map.parameters()]
        adapted = maps + add_lora(attentions, rank, task.args.lora_alpha)
        groups = [{"params": [p.requires_grad_() for p in adapted], "weight_decay": 0.0}]
    model.train()
    torch.compiler.reset()              # what was compiled for other models is of no use here
    forward = torch.compile(model) if task.args.compile else model
    optimizer = run_stage(finetune, groups, name, task, lambda batch: forward(*batch)[1], steps, lr)
    if rank:
        merge_lora(attentions)
        model.requires_grad_(True)
        optimizer = train_lm.adamw(model.parameter_groups(0.1), lr)     # the adapters' is of no use
    return optimizer


def look_at(attention, feature_map, q, k, positions, key_mask=None):
    """q and k in fp32, softmax's weights on them and the map's; softmax's twice without a map."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.float(), k.float()
        softmax = weights = softmax_attention_weights(q, k, attention.causal, key_mask)
        if feature_map is not None:
            weights = linear_attention_weights(*feature_map(q, k, positions), attention.causal,
                                               key_mask)
    return q, k, softmax, weights


@torch.no_grad()
def measure(task, model, linear, maps=None, batches=4):
    """How the weights of each layer's map compare with softmax's on the layer's own q and k.

    The q and k are those of validation batches run with linear or softmax attention. Returns
    figure -> list over layers. `maps` (one a layer) are looked at instead of the model's own; where
    there is none, softmax is compared with itself.
    """
    attentions, figures, n = attention_layers(model), [], task.examples("valid")

    def look(attention, q, k, positions, key_mask):
        m = maps[attentions.index(attention)] if maps else attention.feature_map
        q, k, softmax, weights = look_at(attention, m, q, k, positions, key_mask)
        with torch.autocast(q.device.type, enabled=False):
            figures.append((attention_kl(softmax, weights, key_mask), entropy(softmax, key_mask),
                            entropy(weights, key_mask),
                            monotonicity(weights, q, k, attention.causal, key_mask)))

    model.eval()
    per = min(8, task.args.micro_batch)     # T x T weights: few sequences at a time
    with watching(attentions, look, linear), task.machine.autocast():
        for i in range(0, min(n, batches * per), per):
            hidden(model, *on_device(task, "valid", range(i, min(i + per, n))))
    table = torch.tensor(figures).unflatten(0, (-1, len(attentions))).mean(0)   # (layers, 4)
    return dict(zip(("kl", "entropy_softmax", "entropy", "monotonicity"), table.T.tolist()))


def row(name, task, model, linear):
    """A line of the table: the task's figure, and the means over layers of measure's."""
    figures = measure(task, model, linear)
    line = {"name": name, task.figure: task.evaluate(model),
            **{key: sum(x) / len(x) for key, x in figures.items()}}
    log(task, line)
    return line


def print_table(rows, figure):
    print(f"{'':28}{figure:>12}{'KL':>9}{'entropy: softmax':>18}{'linear':>9}{'monotonicity':>14}")
    for r in rows:
        print(f"{r['name']:28}{r[figure]:12.2f}{r['kl']:9.3f}{r['entropy_softmax']:18.3f}"
              f"{r['entropy']:9.3f}{r['monotonicity']:14.3f}")
    print("KL(softmax || linear), entropies in nats and monotonicity on the q and k of the softmax "
          "teacher before stage 2, of the model itself after it")


def save_stage(folder, task, model, optimizer=None, steps=0):
    """OUT/folder/checkpoint.pt; train_lm.py --resume goes on from there."""
    path = Path(task.args.out) / folder / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer or train_lm.adamw(model.parameter_groups(0.1), task.args.lr)
    state = train_lm.checkpoint_state(model, optimizer, train_lm.no_progress() | {"step": steps},
                                      train_lm.run_identity(task.args, task, model.config),
                                      task.machine)
    train_lm.save_checkpoint(path, state | {"stage": path.parent.name})


def convert(task, teacher, name, stage_1=True, folder="."):
    """The rows of one map: swapped in, after stage 1, after stage 2."""
    args, label = task.args, name if stage_1 else f"{name}-no-distill"
    config = replace(teacher.config, attention=name, feature_dim=args.feature_dim)
    model = model_with(config, teacher, args.seed)
    rows = [row(f"{label}, swapped", task, model, linear=False)]
    if stage_1 and next(attention_layers(model)[0].feature_map.parameters(), None) is not None:
        mimic(f"stage 1, {label}", task, model, args.distill_steps, args.distill_lr)
        rows.append(row(f"{label}, stage 1", task, model, linear=False))
        save_stage(f"{folder}/stage1", task, model)
    optimizer = train(f"stage 2, {label}", task, model, args.steps, args.lr, args.lora)
    save_stage(f"{folder}/stage2", task, model, optimizer, args.steps)
    return [*rows, row(f"{label}, stage 2", task, model, linear=True)]


def conversion(task, teacher):
    """All that is asked for of one teacher: the rows, printed and returned."""
    args = task.args
    rows = [row("softmax, the teacher", task, teacher, linear=False)]
    if args.compare:
        for name in FEATURE_MAPS:
            rows += convert(task, teacher, name, True, name)
        for name in ("t2r", "hedgehog"):                    # the paper's T2R and "no train"
            rows += convert(task, teacher, name, False, f"{name}-no-distill")
    else:
        rows += convert(task, teacher, args.feature_map, not args.no_distill)
    models = []
    if not args.no_baseline:
        models.append(("softmax", "softmax, finetuned",
                       model_with(teacher.config, teacher, args.seed), args.steps, args.lr,
                       args.lora))
    if task.name == "listops":          # as many steps as the teacher and stage 2 together
        torch.manual_seed(args.seed)
        model = GPT(replace(teacher.config, attention=args.feature_map,
                            feature_dim=args.feature_dim)).to(task.machine.device)
        models.append(("scratch", f"{args.feature_map}, from scratch", model,
                       args.teacher_steps + args.steps, args.teacher_lr, 0))
    for folder, name, model, steps, lr, rank in models:
        optimizer = train(name, task, model, steps, lr, rank)
        save_stage(folder, task, model, optimizer, steps)
        rows.append(row(name, task, model, linear=folder == "scratch"))
    print_table(rows, task.figure)
    return rows


def load_run(path, machine):
    """Model and state of a language model's run: its folder or its checkpoint."""
    path = Path(path)
    model, state = train_lm.load_model(path if path.is_file() else path / "checkpoint.pt", machine)
    if model.config.num_classes or state["identity"]["tokenizer"] not in ("bytes", "gpt2"):
        raise UserError(f"{path} is not a model of text: give a run of train_lm.py on text")
    return model, state


def softmax_teacher(path, machine):
    model, state = load_run(path, machine)
    if model.config.attention != "softmax":
        raise UserError(f"--teacher {path} has {model.config.attention} attention already: give a "
                        "run of train_lm.py --attention softmax")
    return model, state


def text_task(args, machine, model, state):
    """The task of a language model from a checkpoint: the text must be in its tokens."""
    identity = state["identity"]
    args.block_size = model.config.block_size
    args.batch_size = args.batch_size or identity["batch_size"]
    args.tokenizer = identity["tokenizer"]
    data = train_lm.load_data(args)
    if (data.tokenizer, data.vocab_size) != (args.tokenizer, model.config.vocab_size):
        raise UserError(f"--data {args.data} is {data.tokenizer} tokens of {data.vocab_size}, the "
                        f"model was trained on {args.tokenizer} of {model.config.vocab_size}: give "
                        "the --data of the model")
    if args.default_data and data.name != identity["data"]:
        raise UserError(f"the model was trained on {identity['data']}: name the text with --data")
    return LanguageModelling(data, args, machine)


def language_model(args, machine):
    """Task and teacher; without --teacher, train_lm.py trains one in OUT/teacher first, goes on
    with one that was interrupted, or finds it finished."""
    if not args.teacher:
        args.teacher = f"{args.out}/teacher"
        folder = Path(args.teacher)
        if args.overwrite or not (folder / "result.json").exists():
            options = ["--attention", "softmax", "--preset", args.preset, "--data", args.data,
                       "--data-dir", args.data_dir, "--seed", str(args.seed), "--out", args.teacher]
            for name in ("tokenizer", "device", "precision"):
                if getattr(args, name):
                    options += [f"--{name}", getattr(args, name)]
            if args.overwrite:
                options.append("--overwrite")
            elif (folder / "checkpoint.pt").exists():
                options.append("--resume")
            if code := train_lm.main(options):
                raise SystemExit(code)
    model, state = softmax_teacher(args.teacher, machine)
    task = text_task(args, machine, model, state)
    clear(args)
    return task, model


def classifier(args, machine):
    """Task and teacher: ListOps from scratch, GLUE from a language model."""
    args.batch_size = args.batch_size or 32
    if args.task == "listops":
        low, high = args.listops_length
        sizes = {"train": args.listops_examples, "valid": 2000}
        task = Classification("listops", "listops", 15, listops(low, high, sizes), args, machine)
        config = GPTConfig(vocab_size=15, block_size=high, n_layer=2, n_head=2, n_embd=128,
                           attention="softmax", causal=False, num_classes=10)
        torch.manual_seed(args.seed)
        teacher = GPT(config).to(machine.device)
    else:
        if not args.teacher:
            raise UserError("--task FOLDER starts from a language model: give --teacher RUN")
        model, state = softmax_teacher(args.teacher, machine)
        tokenizer = state["identity"]["tokenizer"]
        encode = str.encode if tokenizer == "bytes" else train_lm.gpt2_encoding().encode_ordinary
        splits, figure = glue(Path(args.task), lambda text: list(encode(text)),
                              model.config.block_size)
        task = Classification(Path(args.task).name, tokenizer, model.config.vocab_size, splits,
                              args, machine, figure)
        teacher = model_with(replace(model.config, causal=False, num_classes=task.classes), model,
                             args.seed)
    args.block_size = teacher.config.block_size
    clear(args)
    optimizer = train("teacher", task, teacher, args.teacher_steps, args.teacher_lr)
    save_stage("teacher", task, teacher, optimizer, args.teacher_steps)
    return task, teacher


def clear(args):
    """Removes an earlier run from OUT, now that all that this one needs is there."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for old in ("log.jsonl", "result.json"):
        (out / old).unlink(missing_ok=True)
    for old in ("stage1", "stage2", "softmax", "scratch"):
        shutil.rmtree(out / old, ignore_errors=True)


# --- analysis -------------------------------------------------------------------------------------


def fresh_maps(model, name, block_size):
    """The map as it starts, for every layer; shapes are the model's."""
    config = replace(model.config, attention=name, block_size=block_size)
    torch.manual_seed(0)
    return [FEATURE_MAPS[name](config).to(next(model.parameters()).device)
            for _ in attention_layers(model)]


def maps_to_compare(model, block_size):
    """name -> a map a layer: the model's own if it is linear, and every map as it starts."""
    own = [a.feature_map for a in attention_layers(model)]
    maps = {} if own[0] is None else {f"{model.config.attention}, trained": own}
    return maps | {name: fresh_maps(model, name, block_size) for name in FEATURE_MAPS}


def runs_linear(model, state):
    """After stage 1 a model still is its softmax teacher, with maps standing by."""
    return model.config.attention != "softmax" and state.get("stage") != "stage1"


def analyze(args, machine):
    """Tables of KL, entropy and monotonicity, a row for each map and a column for each layer, on
    the q and k of the model; the figures of --plot."""
    model, state = load_run(args.analyze, machine)
    task, linear = text_task(args, machine, model, state), runs_linear(model, state)
    maps = maps_to_compare(model, model.config.block_size)
    table = {name: measure(task, model, linear, m) for name, m in maps.items()}
    softmax = next(iter(table.values()))["entropy_softmax"]
    for key, what in (("kl", "KL(softmax || map), nats"), ("entropy", "entropy, nats"),
                      ("monotonicity", "rank correlation with q.k")):
        print(f"{what:28}" + "".join(f"{f'layer {i + 1}':>10}" for i in range(len(softmax))))
        if key == "entropy":
            print(f"  {'softmax':26}" + "".join(f"{x:10.3f}" for x in softmax))
        for name, figures in table.items():
            print(f"  {name:26}" + "".join(f"{x:10.3f}" for x in figures[key]))
    if args.plot:
        plot(task, model, linear, maps, {"softmax": {"entropy": softmax}, **table}, args.plot)
    return {"analyze": str(args.analyze), "layers": table}


@torch.no_grad()
def plot(task, model, linear, maps, table, folder):
    """attention_maps.png, monotonicity.png and entropy.png in folder."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("--plot needs matplotlib: pip install matplotlib")
    attentions, found = attention_layers(model), []

    def look(attention, q, k, positions, key_mask):
        """Of the head that softmax makes spikiest: q.k / sqrt d and the weights by map, T x T."""
        q, k, softmax, _ = look_at(attention, None, q, k, positions)
        h = min(range(q.size(1)), key=lambda h: float(entropy(softmax[:, h:h + 1])))
        weights = {"softmax": softmax[0, h].cpu().numpy()}
        for name, m in maps.items():
            m = m[attentions.index(attention)]
            weights[name] = look_at(attention, m, q, k, positions)[3][0, h].cpu().numpy()
        found.append((h, (q @ k.mT)[0, h].cpu().numpy() / math.sqrt(q.size(-1)), weights))

    model.eval()
    with watching(attentions, look, linear):
        hidden(model, *on_device(task, "valid", [0]))
    chosen = sorted({0, len(found) // 2, len(found) - 1})   # first, middle and last layer

    def save(figure, name):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, bbox_inches="tight")
        print(f"wrote {path}")

    names, T = ["softmax", *maps], 64                       # the first 64 tokens can be seen
    figure, axes = plt.subplots(len(chosen), len(names), squeeze=False,
                                figsize=(1.7 * len(names), 1.9 * len(chosen)))
    for line, i in zip(axes, chosen):
        h, _, weights = found[i]
        for axis, name in zip(line, names):
            axis.imshow(weights[name][:T, :T] ** 0.5, vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[],
                     title=name.replace(", ", "\n") if i == chosen[0] else "")
        line[0].set_ylabel(f"layer {i + 1}, head {h + 1}")
    figure.suptitle("square roots of the attention weights of query (down) and key (right)", y=1.02)
    save(figure, "attention_maps.png")

    _, logits, weights = found[chosen[-1]]
    figure, axes = plt.subplots(2, -(-len(names) // 2), squeeze=False, sharex=True,
                                figsize=(2.2 * -(-len(names) // 2), 4.4))
    for axis, name in zip(axes.flat, names):
        axis.plot(logits[-1], weights[name][-1], ".")       # all keys of the last query
        axis.set(title=name, xlabel="q.k / sqrt d", ylabel="weight")
    for axis in axes.flat[len(names):]:
        axis.remove()
    figure.tight_layout()
    save(figure, "monotonicity.png")

    figure, axis = plt.subplots(figsize=(6, 4))
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)     # the usual ten would come twice
    for name, figures in table.items():
        style = "ko--" if name == "softmax" else "r*-" if name.endswith("trained") else "o-"
        axis.plot(figures["entropy"], style, label=name)
    axis.set(xlabel="layer", ylabel="mean entropy of the weights, nats",
             xticks=range(len(found)), xticklabels=range(1, len(found) + 1))
    axis.legend(bbox_to_anchor=(1, 1))
    save(figure, "entropy.png")


def transfer(args, machine):
    """KL(softmax || map) on --data, which the maps may not know, at growing context lengths."""
    table = {}
    for run in args.transfer:
        model, state = load_run(run, machine)
        task, limit = text_task(args, machine, model, state), model.config.max_length
        lengths = [n for n in args.lengths if limit is None or n <= limit]
        if not lengths:
            raise UserError(f"--lengths: {run} has learned positions up to {limit}; train with "
                            "--position rotary for longer ones")
        for args.block_size in lengths:
            maps = maps_to_compare(model, max(args.block_size, model.config.block_size))
            for name, m in maps.items():
                if name.endswith("trained"):
                    name = f"{name} ({run})"
                elif run != args.transfer[0]:
                    continue                                # on the first run's q and k only
                tokens = 8192                               # as many at each length
                kl = measure(task, model, runs_linear(model, state), m,
                             max(1, tokens // args.block_size // min(8, args.micro_batch)))["kl"]
                table.setdefault(name, {})[args.block_size] = sum(kl) / len(kl)
    print(f"{f'KL, nats, on {task.name}':40}" + "".join(f"{n:>9}" for n in args.lengths))
    for name, kl in table.items():
        print(f"{name:40}" + "".join(f"{kl[n]:9.3f}" if n in kl else f"{'-':>9}"
                                     for n in args.lengths))
    return {"transfer": list(map(str, args.transfer)), "data": task.name, "kl": table}


# --- command line ---------------------------------------------------------------------------------

DEFAULTS = {
    "text": dict(distill_steps=400, distill_lr=3e-2, steps=400, lr=1e-3),
    "listops": dict(teacher_steps=3000, teacher_lr=1e-3, distill_steps=500, distill_lr=1e-2,
                    steps=1000, lr=3e-4),
    "glue": dict(teacher_steps=1300, teacher_lr=1e-4, distill_steps=300, distill_lr=1e-2,
                 steps=1300, lr=1e-4),
}


def parse_args(argv=None):
    p = train_lm.Parser(description=__doc__.split("\n")[0])
    p.add_argument("--teacher", metavar="RUN", help="softmax run of train_lm.py on text: its "
                   "folder or checkpoint (default: one is trained, listops has its own)")
    p.add_argument("--preset", choices=["tiny", "small", "gpt2"], help="train_lm.py's preset for a "
                   "teacher that is trained here (tiny, small with a GPU)")
    p.add_argument("--data", help="the teacher's text, as train_lm.py takes it and with its "
                   "default; with --transfer any text")
    p.add_argument("--data-dir", default="data", help="downloads and tokenised text (%(default)s)")
    p.add_argument("--tokenizer", choices=["gpt2", "bytes"],
                   help="of a teacher that is trained here; else the teacher's")
    p.add_argument("--task", help="instead of text: listops, or a folder in GLUE's layout")
    p.add_argument("--listops-length", type=whole, nargs=2, default=[10, 50],
                   metavar=("LOW", "HIGH"), help="expressions are longer than LOW and shorter than "
                   "HIGH tokens; Long Range Arena's 500 2000 (10 50)")
    p.add_argument("--listops-examples", type=positive, default=20000,
                   help="to train on; Long Range Arena has 96000 (%(default)s)")
    p.add_argument("--feature-map", default="hedgehog", choices=FEATURE_MAPS, help="(%(default)s)")
    p.add_argument("--feature-dim", type=whole, default=0, help="columns of a learned map's W; 0 "
                   "is the head dim (%(default)s)")
    p.add_argument("--no-distill", action="store_true", help="leave stage 1 out")
    p.add_argument("--no-baseline", action="store_true", help="leave softmax's own finetuning out, "
                   "where another run has it")
    p.add_argument("--compare", action="store_true", help="every map with the same steps, and "
                   "those of T2R and Hedgehog without stage 1")
    p.add_argument("--lora", type=whole, default=0, metavar="RANK", help="stage 2 trains the maps "
                   "and adapters of this rank on q, k, v and output projections, nothing else")
    p.add_argument("--lora-alpha", type=amount, default=16.0, help="adapters' alpha (%(default)s)")
    for key, kind, text in (("teacher_steps", positive, "of the teacher, with --task"),
                            ("teacher_lr", amount, "learning rate of the teacher, with --task"),
                            ("distill_steps", positive, "of stage 1"),
                            ("distill_lr", amount, "learning rate of stage 1"),
                            ("steps", positive, "of stage 2 and of softmax's finetuning"),
                            ("lr", amount, "learning rate of these")):
        values = ", ".join(f"{task} {d[key]}" for task, d in DEFAULTS.items() if key in d)
        p.add_argument(f"--{key.replace('_', '-')}", type=kind, help=f"{text} ({values})")
    p.add_argument("--batch-size", type=positive,
                   help="sequences of a step (the teacher's; 32 with --task)")
    p.add_argument("--micro-batch", type=positive, default=16,
                   help="sequences at once: less memory, the same step (%(default)s)")
    p.add_argument("--analyze", metavar="RUN", help="KL, entropy, monotonicity by layer and map")
    p.add_argument("--plot", metavar="FOLDER", help="with --analyze: three figures (matplotlib)")
    p.add_argument("--transfer", metavar="RUN", nargs="+", help="KL of these runs' maps on --data")
    p.add_argument("--lengths", type=positive, nargs="+", default=[128, 256, 512, 1024],
                   help="contexts of --transfer (128 256 512 1024)")
    p.add_argument("--seed", type=whole, default=0, help="of data order and weights (%(default)s)")
    p.add_argument("--device", help="cuda if there is one, else cpu")
    p.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 where the GPU has it")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile stage 2 (default with a GPU, for models of text)")
    p.add_argument("--out", help="folder of the run (out/distill-DATA-MAP, MAP all if compared)")
    p.add_argument("--overwrite", action="store_true",
                   help="replace the run in --out and the teacher trained there")
    args = p.parse_args(argv)
    gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    args.default_data = args.data is None
    args.data = args.data or ("wikitext103" if gpu else "stdlib")
    args.preset = args.preset or ("small" if gpu else "tiny")
    args.compile = gpu and args.task is None if args.compile is None else args.compile
    task = "text" if args.task is None else "listops" if args.task == "listops" else "glue"
    for key, value in DEFAULTS[task].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    name = Path(args.task or args.data).resolve().name
    args.out = args.out or f"out/distill-{name}-{'all' if args.compare else args.feature_map}"
    for wrong, message in (
            (args.plot and not args.analyze, "--plot draws what --analyze measures: give both"),
            (args.compare and args.no_distill, "--compare has rows without stage 1 already: leave "
             "--no-distill out"),
            ((args.analyze or args.transfer) and args.task, "--analyze and --transfer are for runs "
             "on text: leave --task out"),
            (args.analyze and args.transfer, "--analyze and --transfer: give one of them"),
            (args.data == "recall", "--data recall is no text: train_lm.py has it"),
            (args.listops_length[0] + 1 >= args.listops_length[1],
             "--listops-length: LOW must be well below HIGH")):
        if wrong:
            p.error(message)
    return args


def run(args):
    machine, start = train_lm.Machine(args.device, args.precision), time.perf_counter()
    if machine.world > 1:
        raise UserError("distill.py runs in one process: start it without torchrun")
    if args.analyze or args.transfer:
        print(json.dumps((analyze if args.analyze else transfer)(args, machine)))
        return 0
    if (Path(args.out) / "result.json").exists() and not args.overwrite:
        raise UserError(f"{args.out} holds a run already: --overwrite replaces it, --out DIR keeps "
                        "both")
    options = {key: value for key, value in vars(args).items() if value is not None}
    try:
        task, teacher = (classifier if args.task else language_model)(args, machine)
        rows = conversion(task, teacher)
    except KeyboardInterrupt:
        print(f"stopped; {args.out} has what was finished, and the same command goes on with the "
              "teacher")
        return 130
    train_lm.write_result(args.out, {
        "data": task.name, "figure": task.figure, "rows": rows, "seed": args.seed,
        "seconds": round(time.perf_counter() - start, 1), "device": machine.name,
        "precision": machine.precision, "options": options})
    return 0


def main(argv=None):
    args = parse_args(argv)
    return train_lm.one_line_errors("distill.py", args, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
