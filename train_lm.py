"""Train a GPT from scratch, with softmax or linear attention, on text or on associative recall.

    python train_lm.py                                  without a GPU: Python's own source, minutes
    python train_lm.py                                  with one: the paper's 124M, WikiText-103
    python train_lm.py --attention softmax --data FOLDER_OR_FILE
    python train_lm.py --attention hedgehog,softmax     alternate over the layers
    python train_lm.py --data recall --attention elu    the paper's associative recall
    python train_lm.py --resume                         go on after Ctrl-C, a kill or a crash
    python train_lm.py --sample "def main("             continue a prompt with the model in --out
    torchrun --nproc_per_node=8 train_lm.py             the same batches on 8 GPUs

From top to bottom: options, a training step, checkpoints, the training loop, sampling. OUT
gets checkpoint.pt, log.jsonl (a line an evaluation) and result.json (also the last line printed).
"""

import contextlib
import functools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from command_line import claimed, one_line_errors, option, parse
from gpt import GPT, replayed
from hedgehog import FEATURE_MAPS, GPTConfig, make_mix
from tasks import gpt2_encoding, load_data, write_whole

# --- options --------------------------------------------------------------------------------------


@dataclass
class Options:
    """The command line: --n-layer for n_layer. A preset (PRESETS) has other defaults for some."""
    # what to train on
    data: str = option("", "stdlib (default without a GPU), wikitext103 (with one), recall, a text "
                       "file, or a folder of {train,valid,test}.txt, .bin or wiki.*.{raw,tokens}")
    data_dir: str = option("data", "where downloads and tokens are kept")
    tokenizer: str = option("", "default: gpt2 for wiki.*, else bytes", choices=["gpt2", "bytes"])
    # the model; these fields go to GPTConfig by name
    preset: str = option("", "tiny (default without a GPU), small or gpt2 (default with one)")
    attention: str = option("hedgehog", "softmax, " + ", ".join(FEATURE_MAPS)
                            + "; a,b: these take turns over the layers")
    feature_dim: int = option(0, "columns of a learned map's W; 0: as many as the head dim", 0)
    position: str = option("learned", "most presets have rotary", choices=["learned", "rotary"])
    n_layer: int = option(4, "blocks", 1)
    n_head: int = option(2, "heads of a block", 1)
    n_embd: int = option(128, "width", 1)
    block_size: int = option(128, "training context in tokens", 1)
    dropout: float = option(0.0, "on embeddings and block outputs", 0, 1)
    # the training
    steps: int = option(1300, "optimizer steps, or give --epochs", 0)
    epochs: float = option(0.0, "passes over the data, instead of --steps", 0, 1e6)
    batch_size: int = option(8, "sequences of one step, over all GPUs", 1)
    micro_batch: int = option(16, "sequences at once on a GPU: less memory, the same step", 1)
    lr: float = option(3e-3, "peak learning rate; falls to a tenth over all steps", 0, 1e3)
    warmup: float = option(0.02, "share of the steps in which the rate rises", 0, 1)
    weight_decay: float = option(0.1, "of matrices", 0, 1e3)
    grad_clip: float = option(1.0, "largest gradient norm; 0: any", 0)
    eval_every: int = option(650, "steps between evaluations, each with a checkpoint", 1)
    seed: int = option(0, "of weights and data order", 0, 2**63 - 1)
    # the machine
    device: str = option("", "cuda if there is one, else cpu")
    precision: str = option("", "bf16 where the GPU has it, else fp32", choices=["bf16", "fp32"])
    compile: bool = option(None, "torch.compile and, on one GPU, CUDA graphs (default with a GPU)")
    recompute: bool = option(False, "make activations again in backward: less memory, more time")
    # the run
    out: str = option("", "its folder (out/DATA-ATTENTION)")
    resume: bool = option(False, "go on with the run in --out, with its options")
    overwrite: bool = option(False, "replace the run in --out")
    sample: str = option(None, "continue this prompt with the model in --out, instead of training")
    sample_tokens: int = option(0, "tokens of the sample; 0: up to the end of a context", 0)
    temperature: float = option(0.8, "of the sample; 0 takes the likeliest token", 0, 1e3)
    top_k: int = option(50, "sample among so many tokens", 1)

    replaces = {"epochs": {"steps": 0}, "steps": {"epochs": 0.0}}   # of these two one is given

    def __post_init__(self):
        """Defaults that depend on the machine."""
        cuda = self.device.startswith("cuda") if self.device else torch.cuda.is_available()
        self.device = self.device or ("cuda" if cuda else "cpu")
        self.data = self.data or ("wikitext103" if cuda else "stdlib")
        bf16 = cuda and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
        self.precision = self.precision or ("bf16" if bf16 else "fp32")
        self.compile = cuda if self.compile is None else self.compile
        self.out = self.out or f"out/{Path(self.data).resolve().name}-{self.attention}"
        tiny = GPTConfig(n_head=1, n_embd=64, attention=self.attention)     # no misspelt name
        if self.feature_dim and not any(True for name in self.attention.split(",")
                                        for _ in make_mix(name, tiny).parameters()):
            raise ValueError(f"--feature-dim is for maps with a W, not for {self.attention}")


PRESETS = {
    # A laptop: minutes.
    "tiny": dict(position="rotary"),
    # One GPU: minutes; one pass over the data.
    "small": dict(n_layer=6, n_head=6, n_embd=384, block_size=1024, position="rotary", steps=0,
                  epochs=1.0, batch_size=16, lr=2e-3, eval_every=200),
    # The paper's WikiText-103 model. The budget is that of the same lab's recipe (H3, Hyena).
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.1, steps=0,
                 epochs=100.0, batch_size=512, lr=6e-4, eval_every=500),
    # --data recall: minutes on two cores.
    "recall": dict(n_layer=2, n_head=1, n_embd=64, block_size=63, position="rotary", steps=8000,
                   batch_size=32, micro_batch=32, lr=1e-3, eval_every=1000),
}
# Options that --resume may change; the others are the checkpoint's.
CHANGEABLE = set("""data data_dir steps epochs micro_batch lr warmup weight_decay grad_clip
    eval_every device precision compile recompute out resume overwrite sample sample_tokens
    temperature top_k""".split())


def resumed(values, given):
    """With --resume the checkpoint's options, of which only some may be given anew."""
    if not given.get("resume"):
        return values
    if given.get("overwrite"):
        raise ValueError("--resume goes on with a run, --overwrite replaces it: give one of them")
    o = Options(**values | given)
    saved = load_checkpoint(o.out)["options"]
    for key in given.keys() - CHANGEABLE:
        if given[key] != saved[key]:
            raise ValueError(f"--{key.replace('_', '-')} {given[key]}: the run to --resume has "
                             f"{saved[key] or 'its default'}, which cannot change; another "
                             "--out starts anew")
    moved = o.device.split(":")[0] != saved["device"].split(":")[0]     # to a GPU, or from one
    return {key: saved[key] for key in saved
            if key != "device" and not (moved and key in ("precision", "compile"))} | {"out": o.out}


NOT_FINITE = ("the {} is {} at step {}: try a lower --lr or --precision fp32; the last checkpoint "
              "is untouched")


# --- one step, one evaluation ---------------------------------------------------------------------


def rank():
    """The place of this process among torchrun's; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(o, *values):
    total = torch.tensor(values, dtype=torch.float64)
    if world() > 1:
        total = total.to(o.device)
        dist.all_reduce(total)
    return total.tolist()


def start(o):
    """Checks the device, and joins torchrun's processes if it started this one."""
    try:
        torch.zeros(1, device=o.device).tolist()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {o.device}: {str(e).splitlines()[0]}")
    if o.device.startswith("cuda:"):                        # cuda:1 is where all else looks, too
        torch.cuda.set_device(o.device)
    if o.precision == "bf16":                               # what autocast leaves in fp32 uses tf32
        torch.set_float32_matmul_precision("high")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if o.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait while the first process downloads and tokenises.
        dist.init_process_group("nccl" if o.device == "cuda" else "gloo",
                                timeout=timedelta(hours=2))


def device_name(o):
    name = (torch.cuda.get_device_name() if o.device.startswith("cuda")
            else f"{o.device}, {torch.get_num_threads()} threads")
    return f"{world()} x {name}" if world() > 1 else name


def autocast(o):
    return torch.autocast(torch.device(o.device).type, torch.bfloat16, o.precision == "bf16")


def to_device(batch, device):
    """Tensors on the device. Python does not wait until a GPU has copied pinned memory."""
    if device.startswith("cuda"):
        return [x.pin_memory().to(device, non_blocking=True) for x in batch]
    return [x.to(device) for x in batch]


@functools.lru_cache(maxsize=2)
def shuffle(n, seed, number):
    return np.random.default_rng((seed, number)).permutation(n)


def example_order(step, batch_size, n, seed):
    """The batch_size examples of a step: each pass over the n examples is a shuffle of its own.

    A function of the step alone, so that a resumed run sees what an uninterrupted one would have.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(shuffle(n, seed, i // n)[i % n]) for i in places]


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` of all steps, then a cosine down to peak / 10."""
    warmup = max(1, round(warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def set_rate(optimizer, step, steps, peak, warmup):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, peak, warmup)


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), fused=True)


def batches_of(task, step, o):
    """Yields (share of the step's targets, *batch) for each micro-batch of this process."""
    examples = example_order(step, o.batch_size, task.num_examples("train"), o.seed)
    mine, targets = examples[rank()::world()], task.num_targets("train", examples)
    for i in range(0, len(mine), o.micro_batch):
        micro = mine[i:i + o.micro_batch]
        share = torch.tensor(task.num_targets("train", micro) / max(1, targets))
        yield to_device((share, *task.batch("train", micro)), o.device)


def backward_of(model, o):
    """A function of what batches_of yields, which adds the gradients of a micro-batch and returns
    its part of the mean loss."""
    def backward(share, *batch):
        with autocast(o):
            loss = model(*batch)[1] * share
        (loss * world()).backward()                         # DDP divides by world()
        return loss.detach()

    return with_graph(backward, o)


def with_graph(function, o):
    """The function, which with --compile on one GPU is `replayed`."""
    use = o.compile and o.device.startswith("cuda") and world() == 1
    return replayed(function) if use else function


def take_step(model, optimizer, task, step, o, backward):
    """One optimizer step on o.batch_size examples, a micro-batch at a time. Returns this process's
    part of the mean loss. `backward` is backward_of(model, o), the same one at each step."""
    total = 0.0
    for i, batch in enumerate(batches_of(task, step, o), 1):
        # Gradients are averaged over processes once, at the last micro-batch.
        wait = world() > 1 and i * o.micro_batch < o.batch_size // world()
        with model.no_sync() if wait else contextlib.nullcontext():
            total = total + backward(*batch)
    if o.grad_clip:
        torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], o.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)                  # a graph adds to them where they are
    return total


@torch.no_grad()
def evaluate(model, task, split, o, interrupted=()):
    """task.metrics of the whole split, or None if `interrupted` is no longer empty."""
    training = model.training
    model.eval()
    loss, right, n = 0.0, 0, 0
    mine = range(rank(), task.num_examples(split), world())
    # The logits of 8,192 tokens are enough to hold at once.
    size = max(1, min(o.micro_batch, 2**13 // getattr(task, "block_size", 1)))
    for i in tqdm(range(0, len(mine), size), desc=split, leave=False, disable=rank() > 0):
        x, y, *mask = to_device(task.batch(split, mine[i:i + size]), o.device)
        with autocast(o):
            logits, mean = model(x, y, *mask)
        targets = int((y >= 0).sum())
        loss += float(mean) * targets if targets else 0.0   # a mean over none is NaN
        right += int((logits.argmax(-1) == y).sum())
        n += targets
        if interrupted:
            break
    model.train(training)
    if interrupted:
        return None
    loss, right, n = sum_over_processes(o, loss, right, n)
    return task.metrics(split, loss / n, right / n)


# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(o, model, data, optimizer, progress):
    """OUT/checkpoint.pt: all that --resume, --sample and distill.py need."""
    state = {"options": {f.name: getattr(o, f.name) for f in fields(Options)},
             "config": asdict(model.config), "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "progress": progress,
             "data": identity(data), "rng": torch.get_rng_state()}
    if o.device.startswith("cuda"):
        state["cuda_rng"] = torch.cuda.get_rng_state()
    write_whole(Path(o.out) / "checkpoint.pt", lambda f: torch.save(state, f))


def identity(data):
    """What makes two datasets the same one: name, tokenizer and the contents of arrays."""
    return [data.name, data.tokenizer, {
        split: zlib.crc32(x) if isinstance(x, np.ndarray) else len(x)
        for split, x in data.splits.items()}]


def load_checkpoint(path):
    """What save_checkpoint wrote; path is the file or its folder."""
    path = Path(path) if Path(path).is_file() else Path(path) / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}: train first, or name the run with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "config": GPTConfig(**state["config"])}
    except ValueError as e:             # of a feature map that is no longer there, say
        raise ValueError(f"{path}: {e}")
    except Exception as e:              # torch.load has no exception of its own for a damaged file
        raise ValueError(f"{path} is cut off or not a checkpoint of this program: {repr(e)[:200]}")


def load_model(path, device):
    """The model of a checkpoint, and the rest of what is in it."""
    state = load_checkpoint(path)
    model = GPT(state["config"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise ValueError(f"{path} has other weights than its config says: train again")
    return model.to(device).eval(), state


# --- training -------------------------------------------------------------------------------------


def train(o, data):
    """The whole run. Returns the model and the result, which is None after Ctrl-C."""
    out, log = Path(o.out), Path(o.out) / "log.jsonl"
    steps = o.steps or math.ceil(o.epochs * data.num_examples("train") / o.batch_size)
    tokens = o.batch_size * o.block_size                    # of a step
    if steps == 0:
        raise ValueError("--steps 0: give --steps or --epochs above 0")
    if o.batch_size % world():
        raise ValueError(f"--batch-size {o.batch_size} is no multiple of the {world()} processes")
    torch.manual_seed(o.seed)
    if o.resume:
        raw_model, state = load_model(out, o.device)
    else:
        raw_model = GPT(GPTConfig(vocab_size=data.vocab_size, **{
            f.name: getattr(o, f.name) for f in fields(GPTConfig) if hasattr(o, f.name)}))
    raw_model.to(o.device).train()
    if o.recompute:
        raw_model.recompute_activations()
    torch.manual_seed(o.seed + rank())                      # other dropout in each process
    optimizer = adamw(raw_model.parameter_groups(o.weight_decay), o.lr)
    progress = {"step": 0, "evaluated": 0, "seconds": 0.0, "losses": [], "valid": None}

    # go on with a run, or make room for a new one
    lines = log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []
    if o.resume:
        if state["data"] != identity(data):
            raise ValueError(f"--data {o.data} is not the text that {out} was trained on")
        optimizer.load_state_dict(state["optimizer"])
        progress |= state["progress"]
        if steps < progress["step"]:
            raise ValueError(f"--steps {steps}: {out} is at step {progress['step']} already")
        if progress["evaluated"] >= steps and (out / "result.json").exists():
            raise ValueError(f"{out} is finished at step {progress['step']}: --steps goes on")
        if rank() == 0:                                     # which saved its random state alone
            torch.set_rng_state(state["rng"])
            if o.device.startswith("cuda") and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"])
        else:                                               # its losses are counted already
            progress["losses"] = [0.0] * len(progress["losses"])
    elif not o.overwrite and (any((out / x).exists() for x in ("checkpoint.pt", "result.json"))
                              or any('"step": ' not in line for line in lines)):    # another log
        raise ValueError(f"{out} holds a run already: --resume goes on with it, --overwrite "
                         "replaces it, --out DIR keeps both")
    if rank() == 0:                                         # drop what is newer than the checkpoint
        kept = [line for line in lines if o.resume and line.endswith("}\n")     # not one cut off
                and json.loads(line)["step"] <= progress["evaluated"]]
        write_whole(log, lambda f: f.write("".join(kept).encode()))
        for old in (out / "result.json", *out.glob("checkpoint.pt.part-*"),     # of a killed run
                    *out.glob("log.jsonl.part-*"), *out.glob("result.json.part-*")):
            old.unlink(missing_ok=True)
        if not o.resume:                                    # what --overwrite replaces
            (out / "checkpoint.pt").unlink(missing_ok=True)
        print_header(o, data, raw_model, steps)

    def save():
        if rank() == 0:
            save_checkpoint(o, raw_model, data, optimizer, progress)

    model = torch.compile(raw_model) if o.compile else raw_model
    model = DistributedDataParallel(model) if world() > 1 else model
    backward = backward_of(model, o)
    optimizer.param_groups[0]["weight_decay"] = o.weight_decay      # of matrices; may be new
    bar = tqdm(total=steps * tokens, initial=progress["step"] * tokens, unit="tok",
               unit_scale=True, disable=rank() > 0, desc="train")
    interrupted, begin = note_interrupts(), time.perf_counter()
    first_step, seconds_before, seconds_of_first = progress["step"], progress["seconds"], 0.0
    while True:
        step = progress["step"]
        if step > progress["evaluated"] and (step % o.eval_every == 0 or step == steps):
            progress["seconds"] += time.perf_counter() - begin
            valid = evaluate(raw_model, data, "valid", o, interrupted)
            if valid is not None:
                if not math.isfinite(valid["loss"]):
                    raise ValueError(NOT_FINITE.format("validation loss", valid["loss"], step))
                loss, n = sum_over_processes(o, sum(progress["losses"]), len(progress["losses"]))
                loss = loss * world() / n if n else None    # None: resumed before the first step
                line = {"step": step, "tokens": step * tokens, "train_loss": loss,
                        "valid": valid, "seconds": round(progress["seconds"], 1)}
                progress |= {"valid": valid, "evaluated": step, "losses": []}
                if rank() == 0:
                    with open(log, "a") as f:
                        f.write(json.dumps(line) + "\n")
                    bar.write(f"step {step:>6}  train loss " + (f"{loss:.4f}" if n else "-")
                              + "  valid " + "  ".join(f"{k} {v:.4f}" for k, v in valid.items()))
                save()
            begin = time.perf_counter()
        if step >= steps or interrupted:
            break
        progress.pop("stage", None)                         # distill.py's, trained further, is none
        set_rate(optimizer, step, steps, o.lr, o.warmup)
        progress["losses"].append(take_step(model, optimizer, data, step, o, backward))
        if step == first_step:
            float(progress["losses"][-1])                   # waits for the device
            seconds_of_first = time.perf_counter() - begin
        progress["step"] = step = step + 1
        bar.update(tokens)
        if step % 10 == 1 or step % o.eval_every == 0 or step == steps or interrupted:
            # reading losses waits for the device
            progress["losses"] = [float(x) for x in progress["losses"]]
            loss, = sum_over_processes(o, progress["losses"][-1])
            bar.set_postfix_str(f"loss {loss:.3f}")
            if not math.isfinite(loss):
                raise ValueError(NOT_FINITE.format("loss", loss, step))
    bar.close()
    test = None
    if "test" in data.splits and not interrupted:
        test = evaluate(raw_model, data, "test", o, interrupted)
    if world() == 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        progress["seconds"] += time.perf_counter() - begin
        progress["losses"] = [float(x) for x in progress["losses"]]
        save()
        command = ["python", "train_lm.py", "--resume", "--out", o.out]
        print(f"stopped and saved at step {progress['step']}; to go on: {shlex.join(command)}")
        return raw_model, None
    timed, seconds = steps - first_step, progress["seconds"] - seconds_before   # since --resume
    if timed > 1:                                           # but for the first, which compiles
        timed, seconds = timed - 1, seconds - seconds_of_first
    result = {"attention": o.attention, "data": data.name, "tokenizer": data.tokenizer,
              "parameters": sum(p.numel() for p in raw_model.parameters()), "steps": steps,
              "tokens": steps * tokens, "lr": o.lr, "valid": progress["valid"],
              **({"test": test} if test else {}), "seconds": round(progress["seconds"], 1),
              "tokens_per_second": round(timed * tokens / seconds) if timed else None,
              "device": device_name(o), "precision": o.precision, "seed": o.seed,
              "config": asdict(raw_model.config)}
    if o.device.startswith("cuda"):
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return raw_model, result


def note_interrupts():
    """A list that the first Ctrl-C fills, which then waits for the end of a step or an evaluation
    batch; the second one ends the program at once."""
    interrupted = []

    def handler(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if world() == 1:                                        # torchrun has a handler of its own
        signal.signal(signal.SIGINT, handler)
    return interrupted


def print_header(o, data, model, steps):
    sizes = ", ".join(f"{len(tokens):,} {split}" for split, tokens in data.splits.items())
    print(f"data    {data.name}, {data.tokenizer}: {sizes}")
    print(f"model   {o.attention} attention, {sum(p.numel() for p in model.parameters()):,} "
          f"parameters: {o.n_layer} layers, {o.n_head} heads, width {o.n_embd}, context "
          f"{o.block_size}, {o.position} positions\ndevice  {device_name(o)}, {o.precision}\n"
          f"budget  {steps:,} steps of {o.batch_size * o.block_size:,} tokens"
          + o.compile * "\ncompile the first step takes half a minute, not counted in tokens/s",
          flush=True)


# --- sampling, the command line -------------------------------------------------------------------


def sample(o, model, tokenizer, prompt):
    """Prints the prompt (text or token ids), how the model goes on, and what that took."""
    if tokenizer not in ("bytes", "gpt2") or model.config.num_classes:
        raise ValueError(f"a model of {tokenizer!r} tokens or a classifier has no text to continue")
    if tokenizer == "bytes":
        encode, decode = str.encode, lambda ids: bytes(ids).decode(errors="replace")
    else:
        encode, decode = gpt2_encoding().encode_ordinary, gpt2_encoding().decode
    ids = list(encode(prompt)) if isinstance(prompt, str) else prompt
    limit = model.config.max_length or math.inf
    new = o.sample_tokens or max(1, model.config.block_size - len(ids))
    new = min(new, limit - len(ids))
    if not ids or new < 1:
        raise ValueError(f"a prompt of {len(ids)} tokens cannot be continued: it has to have one"
                         + f", and fewer than {limit}" * (limit < math.inf))
    idx = torch.tensor([ids], device=o.device)
    torch.manual_seed(o.seed)
    begin = time.perf_counter()
    text = model.generate(idx, new, o.temperature, o.top_k)[0].tolist()
    speed = new / (time.perf_counter() - begin)
    with torch.no_grad():
        caches = model.hidden(idx, [None] * model.config.n_layer)[1]
    kept, per_token = sum(x.nbytes for cache in caches for x in cache), 8 * model.config.n_embd
    beyond = ", the text beyond is longer than anything that it has seen"
    print(f"[{decode(ids)}]{decode(text[len(ids):])}\n\n{new} tokens after the [prompt], "
          f"{speed:,.0f} a second; the model was trained on contexts of {model.config.block_size}"
          + beyond * (len(text) > model.config.block_size))
    if "softmax" not in model.config.attentions:
        print(f"the state is {kept:,} bytes whatever the length; softmax's cache would be "
              f"{per_token * model.config.n_layer * len(text):,} bytes by now")


def stamped(result):
    """The result with its command, date and versions, as a line of JSON."""
    return json.dumps(result | {"command": shlex.join(["python", *sys.argv]),
                                "date": str(date.today()), "torch": torch.__version__,
                                "python": platform.python_version()})


def write_result(out, result):
    """OUT/result.json, a stamped line; returns it."""
    line = stamped(result)
    write_whole(Path(out) / "result.json", lambda f: f.write(line.encode() + b"\n"))
    return line


def preset_for(given):
    cuda = given.get("device", "cuda" if torch.cuda.is_available() else "cpu").startswith("cuda")
    return "recall" if given.get("data") == "recall" else "gpt2" if cuda else "tiny"


def run(argv):
    o = parse(Options, PRESETS, preset_for, resumed, __doc__.split("\n")[0], argv)
    start(o)
    if o.sample is not None:
        model, state = load_model(o.out, o.device)
        sample(o, model, state["data"][1], o.sample)
        return 0
    if rank() > 0:                      # of several processes the first one downloads and tokenises
        dist.barrier()
    data = load_data(o)
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
    with claimed(o.out) if rank() == 0 else contextlib.nullcontext():
        model, result = train(o, data)
        line = write_result(o.out, result) if result and rank() == 0 else ""
    if result is None:
        return 130
    if rank() == 0:
        try:
            prompt = data.batch("valid", [0])[0][0, :min(32, o.block_size // 2)]
            sample(o, model, data.tokenizer, prompt.tolist())
        except (ValueError, KeyError) as e:                 # a token that is in no vocabulary, say
            print(f"no sample: {e}")
        print(line)
    return 0


def main(argv=None):
    return one_line_errors("train_lm.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
