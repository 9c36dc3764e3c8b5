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
analysis, the command line. OUT gets stage1/, stage2/ and softmax/ with a checkpoint.pt that
train_lm.py can sample from and resume, log.jsonl and result.json.
"""

import argparse
import contextlib
import json
import math
import random
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
from train_lm import UserError, at_least, positive, whole


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
# and forward(batch) runs the model that they are in and returns its loss. micro_batches(step) yields
# the batches of one optimizer step, each with its share of the step's examples.


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

    def part(q, k, phi_q, phi_k, key_mask, queries):
        teacher = softmax_attention_weights(q, k, causal, key_mask)
        student = linear_attention_weights(phi_q, phi_k, causal, key_mask)
        return attention_kl(teacher, student, queries)

    T, total, count = q.size(2), 0.0, 0
    mask = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    for i in range(0, T, block):
        rows, keys = slice(i, i + block), slice(0, i + block if causal else T)
        queries = mask[:, rows]                             # padding asks nothing
        n = queries.sum()
        total = total + n * recompute(
            part, q[:, :, rows], k[:, :, keys], phi_q[:, :, rows], phi_k[:, :, keys],
            None if key_mask is None else mask[:, keys], queries, use_reentrant=False)
        count = count + n
    return total / count


def distill(attentions, forward, micro_batches, steps, lr, bar):
    """Stage 1: only the maps learn. Returns the mean loss over layers of each step.

    Forward passes are the softmax model's own, so every layer sees the teacher's hidden states and
    its loss is its map's alone: gradients are taken layer by layer while the model runs, and none
    goes through it.
    """
    maps = [p for a in attentions for p in a.feature_map.parameters()]
    optimizer = torch.optim.AdamW(maps, lr=lr, weight_decay=0.0)
    losses, share, now = [], 1.0, 0.0

    def learn(attention, q, k, positions, key_mask):
        nonlocal now
        q, k = (x.detach().to(maps[0].dtype) for x in (q, k))
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            loss = share / len(attentions) * mimicry_loss(attention.feature_map, q, k, positions,
                                                          attention.causal, key_mask)
            loss.backward()
        now = now + loss.detach()

    with watching(attentions, learn, linear=False), torch.no_grad():
        for step in range(steps):
            now = 0.0
            for batch, share in micro_batches(step):
                forward(batch)
            take_step(optimizer, step, steps, lr)
            losses.append(now)
            advance(bar, losses)
    return torch.stack(losses).tolist() if losses else []


def finetune(groups, forward, micro_batches, steps, lr, bar):
    """Stage 2, and any other training: the parameters in `groups` learn the task itself. Returns
    the optimizer and the loss of each step."""
    optimizer = train_lm.adamw(groups, lr)
    parameters, losses = [p for group in groups for p in group["params"]], []
    for step in range(steps):
        now = 0.0
        for batch, share in micro_batches(step):
            loss = share * forward(batch)
            loss.backward()
            now = now + loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        take_step(optimizer, step, steps, lr)
        losses.append(now)
        advance(bar, losses)
    return optimizer, torch.stack(losses).tolist()


def take_step(optimizer, step, steps, lr):
    for group in optimizer.param_groups:
        group["lr"] = train_lm.learning_rate(step, steps, lr, warmup=0.05)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def advance(bar, losses):
    if len(losses) % 10 == 1:                               # reading a loss waits for the device
        loss = float(losses[-1])
        if not math.isfinite(loss):
            raise UserError(f"{bar.desc}: the loss is {loss} at step {len(losses)}: try a lower "
                            "learning rate or --precision fp32")
        bar.set_postfix_str(f"loss {loss:.3f}")             # stage 1's is the KL
    bar.update()


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


def add_lora(attentions, rank, alpha):
    """Adapters on the query, key, value and output projections; returns their parameters."""
    parameters = []
    for a in attentions:
        for linear, parts in ((a.qkv, 3), (a.proj, 1)):
            adapter = LowRank(linear.weight, rank, alpha, parts)
            parametrize.register_parametrization(linear, "weight", adapter)
            parameters += adapter.parameters()
    return parameters


def merge_lora(attentions):
    """The same model without adapters: W becomes W + alpha / r B A."""
    for a in attentions:
        for linear in (a.qkv, a.proj):
            parametrize.remove_parametrizations(linear, "weight")


# --- tasks: what a model is trained on and judged by ----------------------------------------------


class LanguageModelling:
    """Next tokens of a train_lm.Text; judged by perplexity over the whole validation split."""
    figure, percent = "perplexity", False

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
    percent = True

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
            indices = range(i, min(i + self.args.micro_batch, n))
            idx, _, mask = (x.to(self.machine.device) for x in self.batch("valid", indices))
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
    """Long Range Arena's ListOps (Tay et al., arXiv 2011.04006): nested MIN, MAX, MED, SM of digits.

    Tokens are 0 to 9, the operators 10 to 13 and the closing bracket 14. Expressions with low <
    length < high, no two the same. Returns split -> list of (ids, value).
    """
    rng, seen = random.Random(seed), set()

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
            ids = grow(1)
            if low < len(ids) < high and (key := bytes(ids)) not in seen:
                seen.add(key)
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
        operator = (min, max, lambda x: int(statistics.median(x)), lambda x: sum(x) % 10)[stack.pop() - 10]
        stack.append(operator(digits))
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
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(f"--task {folder}: there is no {name}; listops needs no folder")
        rows = [line.split("\t") for line in lines if line]
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
        labels = labels or sorted({row[label] for row in rows})
        try:
            splits[split] = [(np.array(encode("\n".join(row[i] for i in texts))[:block_size],
                                       np.uint16), labels.index(row[label])) for row in rows]
        except (IndexError, ValueError):
            raise UserError(f"{folder / name}: a line has too few columns or a label that "
                            f"train.tsv does not have")
    return splits, figure


# --- from a teacher to a table --------------------------------------------------------------------


def attention_layers(model):
    return [block.attn for block in model.blocks]


def model_with(config, teacher):
    """A new model of this config with all of the teacher's weights that it has a place for."""
    torch.manual_seed(0)                                    # Performer draws its features
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


def run_stage(stage, name, task, model, steps, lr, *first):
    """A stage with its progress bar; `first` is its first argument."""
    def forward(batch):
        with task.machine.autocast():
            return model(*batch)[1]

    model.train(stage is finetune)
    start = time.perf_counter()
    with tqdm(total=steps, unit="step", desc=name) as bar:
        result = stage(*first, forward, lambda step: micro_batches(task, step), steps, lr, bar)
    losses = result[1] if stage is finetune else result
    line = {"stage": name, "steps": steps, "seconds": round(time.perf_counter() - start, 1),
            "loss": [round(x, 4) for x in losses[::max(1, steps // 20)] + losses[-1:]]}
    with open(Path(task.args.out) / "log.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    return result


def train_all(name, task, model, steps, lr):
    """Finetunes all parameters; returns the optimizer."""
    return run_stage(finetune, name, task, model, steps, lr, model.parameter_groups(0.1))[0]


def train_adapters(name, task, model, steps, lr):
    """Finetunes low-rank adapters and nothing else, then merges them."""
    attentions = attention_layers(model.requires_grad_(False))
    groups = [{"params": add_lora(attentions, task.args.lora, task.args.lora_alpha)}]
    run_stage(finetune, name, task, model, steps, lr, groups)
    merge_lora(attentions)
    model.requires_grad_(True)


@torch.no_grad()
def measure(task, model, linear, maps=None, batches=4):
    """How the weights of each layer's map compare with softmax's on the layer's own q and k.

    The q and k are those of validation batches run with linear or softmax attention. Returns
    figure -> list over layers. `maps` (one a layer) are looked at instead of the model's own; where
    there is none, softmax is compared with itself.
    """
    attentions, figures = attention_layers(model), []
    n = task.examples("valid")

    def look(attention, q, k, positions, key_mask):
        q, k = q.float(), k.float()
        m = maps[attentions.index(attention)] if maps else attention.feature_map
        with torch.autocast(q.device.type, enabled=False):
            softmax = weights = softmax_attention_weights(q, k, attention.causal, key_mask)
            if m is not None:
                weights = linear_attention_weights(*m(q, k, positions), attention.causal, key_mask)
            figures.append((attention_kl(softmax, weights, key_mask), entropy(softmax, key_mask),
                            entropy(weights, key_mask),
                            monotonicity(weights, q, k, attention.causal, key_mask)))

    model.eval()
    per = min(8, task.args.micro_batch)
    with watching(attentions, look, linear):
        for i in range(0, min(n, batches * per), per):
            with task.machine.autocast():
                model(*on_device(task, "valid", range(i, min(i + per, n))))
    table = torch.tensor(figures).unflatten(0, (-1, len(attentions))).mean(0)   # (layers, 4)
    return dict(zip(("kl", "entropy_softmax", "entropy", "monotonicity"), table.T.tolist()))


def row(name, task, model, linear):
    """A line of the table: the task's figure, and the means over layers of measure's."""
    figures = measure(task, model, linear)
    return {"name": name, task.figure: task.evaluate(model),
            **{key: sum(x) / len(x) for key, x in figures.items()}}


def print_table(rows, figure):
    print(f"{'':24}{figure:>12}{'KL':>9}{'entropy: softmax':>18}{'linear':>9}{'monotonicity':>14}")
    for r in rows:
        print(f"{r['name']:24}{r[figure]:12.2f}{r['kl']:9.3f}{r['entropy_softmax']:18.3f}"
              f"{r['entropy']:9.3f}{r['monotonicity']:14.3f}")


def save_stage(folder, task, model, optimizer, steps):
    """OUT/folder/checkpoint.pt; train_lm.py --resume goes on from there."""
    path = Path(task.args.out) / folder / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer or train_lm.adamw(model.parameter_groups(0.1), task.args.lr)
    train_lm.save_checkpoint(path, train_lm.checkpoint_state(
        model, optimizer, train_lm.no_progress() | {"step": steps},
        train_lm.run_identity(task.args, task, model.config), task.machine))


def convert(task, teacher, name, stage_1=True, folder="."):
    """The rows of one map: swapped in, after stage 1, after stage 2."""
    args = task.args
    model = model_with(replace(teacher.config, attention=name), teacher)
    attentions = attention_layers(model)
    rows = [row(f"{name}, swapped", task, model, linear=False)]
    if stage_1 and next(attentions[0].feature_map.parameters(), None) is not None:
        run_stage(distill, f"stage 1, {name}", task, model, args.distill_steps, args.distill_lr,
                  attentions)
        rows.append(row(f"{name}, stage 1", task, model, linear=False))
        save_stage(f"{folder}/stage1", task, model, None, 0)
    train_model = train_adapters if args.lora else train_all
    optimizer = train_model(f"stage 2, {name}", task, model, args.steps, args.lr)
    save_stage(f"{folder}/stage2", task, model, optimizer, args.steps)
    return [*rows, row(f"{name}, stage 2", task, model, linear=True)]


def conversion(task, teacher):
    """All that is asked for of one teacher: the rows, printed and returned."""
    args = task.args
    rows = [row("softmax, the teacher", task, teacher, linear=False)]
    if args.compare:
        for name in FEATURE_MAPS:
            rows += convert(task, teacher, name, True, name)
        for name in ("t2r", "hedgehog"):                    # the paper's T2R and "no train"
            folder = f"{name}-no-distill"
            rows += [r | {"name": r["name"].replace(name, folder)}
                     for r in convert(task, teacher, name, False, folder)[1:]]
    else:
        rows += convert(task, teacher, args.feature_map, not args.no_distill)
    softmax = model_with(teacher.config, teacher)
    optimizer = train_all("softmax", task, softmax, args.steps, args.lr)
    save_stage("softmax", task, softmax, optimizer, args.steps)
    rows.append(row("softmax, finetuned", task, softmax, linear=False))
    if task.percent:                                        # the teacher's training, but linear
        model = GPT(replace(teacher.config, attention=args.feature_map)).to(task.machine.device)
        train_all(f"{args.feature_map} from scratch", task, model, args.teacher_steps,
                  args.teacher_lr)
        rows.append(row(f"{args.feature_map}, from scratch", task, model, linear=True))
    print_table(rows, task.figure)
    print("KL(softmax || linear), entropies in nats and monotonicity on the q and k of the softmax "
          "teacher before stage 2, of the model itself after it")
    return rows


def softmax_teacher(path, machine):
    model, state = train_lm.load_model(checkpoint_path(path), machine)
    if model.config.attention != "softmax":
        raise UserError(f"--teacher {path} has {model.config.attention} attention already: give a "
                        "run of train_lm.py --attention softmax")
    return model, state


def checkpoint_path(path):
    path = Path(path)
    return path if path.is_file() else path / "checkpoint.pt"


def text_task(args, machine, model, state):
    """The task of a language model from a checkpoint: the text must be in its tokens."""
    args.block_size = model.config.block_size
    args.batch_size = args.batch_size or state["identity"]["batch_size"]
    args.tokenizer = args.tokenizer or state["identity"]["tokenizer"]
    data = train_lm.load_data(args)
    if (data.tokenizer, data.vocab_size) != (state["identity"]["tokenizer"],
                                             model.config.vocab_size):
        raise UserError(f"--data {args.data} is {data.tokenizer} tokens of {data.vocab_size}, the "
                        f"model was trained on {state['identity']['tokenizer']} of "
                        f"{model.config.vocab_size}: give the --data of the model")
    return LanguageModelling(data, args, machine)


def language_model(args, machine):
    """Task and teacher; without --teacher one is trained by train_lm.py's preset first."""
    if args.teacher:
        model, state = softmax_teacher(args.teacher, machine)
        return text_task(args, machine, model, state), model
    options = ["--attention", "softmax", "--data", args.data, "--data-dir", args.data_dir, "--preset",
               args.preset, "--seed", str(args.seed), "--out", f"{args.out}/teacher", "--overwrite"]
    teacher_args = train_lm.parse_args(
        options + (["--tokenizer", args.tokenizer] if args.tokenizer else []))
    data = train_lm.load_data(teacher_args)
    model, result = train_lm.train(teacher_args, data, machine)
    if result is None:
        raise KeyboardInterrupt
    args.block_size = model.config.block_size
    args.batch_size = args.batch_size or teacher_args.batch_size
    return LanguageModelling(data, args, machine), model


def classifier(args, machine):
    """Task and teacher: ListOps from scratch, GLUE from a language model."""
    args.batch_size = args.batch_size or 32
    if args.task == "listops":
        low, high = args.listops_length
        sizes = {"train": args.listops_examples, "valid": 2000}
        task = Classification("listops", "listops", 15, listops(low, high, sizes), args, machine)
        config = GPTConfig(vocab_size=15, block_size=high, n_layer=2, n_head=4, n_embd=128,
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
        teacher = model_with(replace(model.config, causal=False, num_classes=task.classes), model)
    args.block_size = teacher.config.block_size
    optimizer = train_all("teacher", task, teacher, args.teacher_steps, args.teacher_lr)
    save_stage("teacher", task, teacher, optimizer, args.teacher_steps)
    return task, teacher


# --- analysis -------------------------------------------------------------------------------------


def fresh_maps(model, name, block_size):
    """The map as it starts, for every layer; shapes are the model's."""
    config = replace(model.config, attention=name, block_size=block_size)
    torch.manual_seed(0)
    return [FEATURE_MAPS[name](config).to(next(model.parameters()).device)
            for _ in attention_layers(model)]


def maps_to_compare(model, block_size):
    """name -> a map a layer: the model's own if it is linear, and every map as it starts."""
    own = model.config.attention
    maps = {} if own == "softmax" else {f"{own}, trained": [a.feature_map for a in
                                                            attention_layers(model)]}
    return maps | {name: fresh_maps(model, name, block_size) for name in FEATURE_MAPS}


def analyze(args, machine):
    """Tables of KL, entropy and monotonicity, a row for each map and a column for each layer, on
    the q and k of the model; the figures of --plot."""
    model, state = train_lm.load_model(checkpoint_path(args.analyze), machine)
    task = text_task(args, machine, model, state)
    linear = model.config.attention != "softmax"
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
    attentions, found = attention_layers(model), {}

    def look(attention, q, k, positions, key_mask):
        q, k = q.float(), k.float()
        weights = {"softmax": softmax_attention_weights(q, k, attention.causal)}
        for name, m in maps.items():
            phi = m[attentions.index(attention)](q, k, positions)
            weights[name] = linear_attention_weights(*phi, attention.causal)
        found[attentions.index(attention)] = (q @ k.mT / math.sqrt(q.size(-1)), weights)

    with watching(attentions, look, linear):
        model(*on_device(task, "valid", [0]))
    # the head of each layer that softmax makes spikiest
    spiky = {i: int((-(a := w["softmax"][0]) * a.clamp(min=1e-12).log()).sum(-1).mean(-1).argmin())
             for i, (_, w) in found.items()}
    layers = sorted(found)[::max(1, len(found) // 3)][:3]

    def save(figure, name):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, bbox_inches="tight")
        print(f"wrote {path}")

    names, T = ["softmax", *maps], min(64, task.args.block_size)
    figure, axes = plt.subplots(len(layers), len(names), squeeze=False,
                                figsize=(1.7 * len(names), 1.9 * len(layers)))
    for line, i in zip(axes, layers):
        for axis, name in zip(line, names):
            axis.imshow(found[i][1][name][0, spiky[i], :T, :T].cpu().sqrt(), vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], title=name.replace(", ", "\n") if i == layers[0] else "")
        line[0].set_ylabel(f"layer {i + 1}, head {spiky[i] + 1}")
    save(figure, "attention_maps.png")

    i = layers[-1]
    figure, axes = plt.subplots(2, -(-len(names) // 2), squeeze=False, sharex=True,
                                figsize=(2.2 * -(-len(names) // 2), 4.4))
    for axis, name in zip(axes.flat, names):
        axis.plot(found[i][0][0, spiky[i], -1].cpu(), found[i][1][name][0, spiky[i], -1].cpu(), ".")
        axis.set(title=name, xlabel="q.k / sqrt d", ylabel="weight")
    figure.tight_layout()
    save(figure, "monotonicity.png")

    figure, axis = plt.subplots(figsize=(6, 4))
    for name, figures in table.items():
        axis.plot(range(1, len(found) + 1), figures["entropy"], "o-", label=name)
    axis.set(xlabel="layer", ylabel="mean entropy of the weights, nats")
    axis.legend(bbox_to_anchor=(1, 1))
    save(figure, "entropy.png")


def transfer(args, machine):
    """KL(softmax || map) on --data, which the maps may not know, at growing context lengths."""
    table = {}
    for run in args.transfer:
        model, state = train_lm.load_model(checkpoint_path(run), machine)
        task = text_task(args, machine, model, state)
        limit = model.config.max_length
        lengths = [n for n in args.lengths if limit is None or n <= limit]
        if not lengths:
            raise UserError(f"--lengths: {run} has learned positions up to {limit}; train with "
                            "--position rotary for longer ones")
        maps = maps_to_compare(model, max(args.lengths))
        if run != args.transfer[0]:                         # the untrained ones are there already
            maps = dict([next(iter(maps.items()))])
        for name, m in maps.items():
            label = f"{name} ({run})" if "trained" in name else name
            table[label] = {}
            for args.block_size in lengths:
                batches = max(1, 8192 // args.block_size // 8)
                kl = measure(task, model, False, m, batches)["kl"]
                table[label][args.block_size] = sum(kl) / len(kl)
    print(f"{f'KL, nats, on {task.name}':40}" + "".join(f"{n:>9}" for n in args.lengths))
    for name, kl in table.items():
        print(f"{name:40}" + "".join(f"{kl.get(n, math.nan):9.3f}" for n in args.lengths))
    return {"transfer": list(map(str, args.transfer)), "data": task.name, "kl": table}


# --- command line ---------------------------------------------------------------------------------

DEFAULTS = {    # steps and learning rates by task, for --help's (by task)
    "text": dict(distill_steps=400, distill_lr=3e-2, steps=400, lr=1e-3),
    "listops": dict(teacher_steps=3000, teacher_lr=1e-3, distill_steps=500, distill_lr=1e-2,
                    steps=1000, lr=3e-4),
    "glue": dict(teacher_steps=1300, teacher_lr=1e-4, distill_steps=300, distill_lr=1e-2,
                 steps=1300, lr=1e-4),
}


def parse_args(argv=None):
    amount = at_least(0, float)
    p = train_lm.Parser(description=__doc__.split("\n")[0])
    p.add_argument("--teacher", metavar="RUN", help="softmax run of train_lm.py: its folder or "
                   "checkpoint (default: train one by --preset)")
    p.add_argument("--preset", choices=["tiny", "small", "gpt2"],
                   help="train_lm.py's preset for the teacher (tiny, small with a GPU)")
    p.add_argument("--data", help="text, as train_lm.py takes it")
    p.add_argument("--data-dir", default="data", help="downloads and tokenised text (%(default)s)")
    p.add_argument("--tokenizer", choices=["gpt2", "bytes"], help="the teacher's by default")
    p.add_argument("--task", help="instead of text: listops, or a folder in GLUE's layout")
    p.add_argument("--listops-length", type=whole, nargs=2, default=[10, 50], metavar=("LOW", "HIGH"),
                   help="lengths between these; Long Range Arena's are 500 2000 (10 50)")
    p.add_argument("--listops-examples", type=positive, default=20000,
                   help="to train on; Long Range Arena has 96000 (%(default)s)")
    p.add_argument("--feature-map", default="hedgehog", choices=FEATURE_MAPS, help="(%(default)s)")
    p.add_argument("--no-distill", action="store_true", help="leave stage 1 out")
    p.add_argument("--compare", action="store_true", help="every map, under the same budget")
    p.add_argument("--lora", type=whole, default=0, metavar="RANK",
                   help="stage 2 by adapters of this rank on q, k, v and output projections")
    p.add_argument("--lora-alpha", type=amount, default=16.0, help="adapters' alpha (%(default)s)")
    for name, kind, text in (("teacher-steps", positive, "the teacher's training, with --task"),
                             ("teacher-lr", amount, "its learning rate"),
                             ("distill-steps", positive, "stage 1"),
                             ("distill-lr", amount, "stage 1's learning rate"),
                             ("steps", positive, "stage 2, and softmax's finetuning"),
                             ("lr", amount, "stage 2's learning rate")):
        p.add_argument(f"--{name}", type=kind, help=f"{text} (by task)")
    p.add_argument("--batch-size", type=positive, help="sequences of a step (the teacher's, or 32)")
    p.add_argument("--micro-batch", type=positive, default=16, help="at once (%(default)s)")
    p.add_argument("--analyze", metavar="RUN", help="KL, entropy, monotonicity by layer and map")
    p.add_argument("--plot", metavar="FOLDER", help="with --analyze: three figures")
    p.add_argument("--transfer", metavar="RUN", nargs="+", help="KL of these runs' maps on --data")
    p.add_argument("--lengths", type=positive, nargs="+", default=[128, 256, 512, 1024],
                   help="contexts of --transfer (128 256 512 1024)")
    p.add_argument("--seed", type=whole, default=0, help="of data order and weights (%(default)s)")
    p.add_argument("--device", help="cuda if there is one, else cpu")
    p.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 where the GPU has it")
    p.add_argument("--out", help="folder of the run (out/distill-DATA-MAP)")
    p.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    args = p.parse_args(argv)
    gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    args.data = args.data or ("wikitext103" if gpu else "stdlib")
    args.preset = args.preset or ("small" if gpu else "tiny")
    task = "text" if args.task is None else "listops" if args.task == "listops" else "glue"
    for key, value in DEFAULTS[task].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    name = Path(args.task or args.data).resolve().name
    args.out = args.out or f"out/distill-{name}-{'all' if args.compare else args.feature_map}"
    if args.plot and not args.analyze:
        p.error("--plot draws what --analyze measures: give both")
    if args.listops_length[0] + 1 >= args.listops_length[1]:
        p.error("--listops-length: LOW must be well below HIGH")
    return args


def run(args):
    machine, start = train_lm.Machine(args.device, args.precision), time.perf_counter()
    if args.analyze or args.transfer:
        print(json.dumps((analyze if args.analyze else transfer)(args, machine)))
        return 0
    out = Path(args.out)
    if (out / "result.json").exists() and not args.overwrite:
        raise UserError(f"{out} holds a run already: --overwrite replaces it, --out DIR keeps both")
    out.mkdir(parents=True, exist_ok=True)
    for old in ("log.jsonl", "result.json"):
        (out / old).unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    try:
        task, teacher = (classifier if args.task else language_model)(args, machine)
        rows = conversion(task, teacher)
    except KeyboardInterrupt:
        print(f"stopped; {out} has the stages that were finished")
        return 130
    result = {"data": task.name, "figure": task.figure, "rows": rows, "seed": args.seed,
              "seconds": round(time.perf_counter() - start, 1), "device": machine.name,
              "precision": machine.precision,
              "options": {key: value for key, value in vars(args).items() if value is not None}}
    train_lm.write_result(out, result)
    return 0


def main(argv=None):
    args = parse_args(argv)
    return train_lm.one_line_errors("distill.py", args, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
