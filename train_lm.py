"""Train a GPT from scratch, with softmax or linear attention, on text or on associative recall.

    python train_lm.py                                  without a GPU: Python's own source, minutes
    python train_lm.py                                  with one: the paper's 124M, WikiText-103
    python train_lm.py --attention softmax --data FOLDER_OR_FILE
    python train_lm.py --data recall --attention elu    the paper's associative recall
    python train_lm.py --resume                         go on after Ctrl-C, a kill or a crash
    python train_lm.py --sample "def main("             continue a prompt from the checkpoint
    torchrun --nproc_per_node=8 train_lm.py             the same global batch on 8 GPUs

In this file: data, batches, evaluation, checkpoints, the training loop, the command line. OUT gets
checkpoint.pt, log.jsonl (a line an evaluation) and result.json (also the last line printed).
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import platform
import shlex
import signal
import sys
import sysconfig
import time
import urllib.request
import zipfile
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hedgehog import FEATURE_MAPS, GPT, GPTConfig

# Shape and budget by hardware; --batch-size is the sequences of one optimizer step over all GPUs.
PRESETS = {
    # A laptop: minutes.
    "tiny": dict(n_layer=4, n_head=2, n_embd=128, block_size=128, batch_size=8, micro_batch=8,
                 steps=1300, lr=3e-3, dropout=0.0, eval_every=650),
    # One GPU: minutes; one pass over the data.
    "small": dict(n_layer=6, n_head=6, n_embd=384, block_size=1024, batch_size=16, micro_batch=16,
                  epochs=1, lr=1e-3, dropout=0.0, eval_every=200),
    # The paper's WikiText-103 model. The budget is that of the same lab's recipe (H3, Hyena).
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=512, micro_batch=16,
                 epochs=100, lr=6e-4, dropout=0.1, eval_every=500),
    # --data recall: minutes on two cores.
    "recall": dict(n_layer=2, n_head=1, n_embd=64, block_size=63, batch_size=32, micro_batch=32,
                   steps=8000, lr=1e-3, dropout=0.0, eval_every=1000, position="rotary"),
}

SPLITS = ("train", "valid", "test")
WIKITEXT_LINES = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
WIKITEXT_URLS = ["https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                 "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/"
                 "wikitext-103-raw-v1.zip"]


class UserError(Exception):
    """Something that the user can mend: printed as one line, exit code 2."""


# --- data -----------------------------------------------------------------------------------------


class Text:
    """Token ids in splits, cut into examples of block_size tokens that each predict the next one.

    splits: "train", "valid" and perhaps "test" -> uint16 array of token ids.
    counts: split -> {"words": .., "bytes": ..} as far as known; words are what white space parts.
    """

    def __init__(self, name, tokenizer, vocab_size, splits, counts):
        self.name, self.tokenizer, self.vocab_size = name, tokenizer, vocab_size
        self.splits, self.counts = splits, counts

    def examples(self, split, block_size):
        """How many: all whole ones to train on, the ragged last one too to evaluate on."""
        whole, rest = divmod(len(self.splits[split]) - 1, block_size)
        return whole + (split != "train" and rest > 0)

    def batch(self, split, indices, block_size):
        """Inputs and targets (B, T) of the examples; targets are -1 past the end of the split."""
        x = torch.zeros(len(indices), block_size, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, i in enumerate(indices):
            window = self.splits[split][i * block_size:(i + 1) * block_size + 1].astype(np.int64)
            x[row, :len(window) - 1] = torch.from_numpy(window[:-1])
            y[row, :len(window) - 1] = torch.from_numpy(window[1:])
        return x, y

    def figures(self, split, loss, accuracy):
        """What one reports of a mean loss in nats over all tokens of a split but its first.

        Perplexity per token; per word and bits per byte share the summed loss out among all words
        and bytes of the split, where their number is known.
        """
        total = loss * (len(self.splits[split]) - 1)
        count = self.counts.get(split, {})
        out = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}
        if self.tokenizer != "bytes" and count.get("words"):
            out["perplexity_per_word"] = math.exp(min(total / count["words"], 700))
        if count.get("bytes"):
            out["bits_per_byte"] = total / count["bytes"] / math.log(2)
        return out


class Recall:
    """Associative recall (the paper's Table 12): which value came after this key?

        x   c 7 a 3 f 9 a 3 c 7 f      10,000 sequences to train on, 2,000 others to test on, each
        y   . . . . . . 3 . 7 . 9      with its own key -> value table, its keys 1 to 16 of 16

    Training predicts every value whose key came before ("." is -1), evaluation the last one only.
    The sequences with few keys are what lets recall be learned in minutes.
    """
    name, tokenizer, vocab_size, keys = "recall", "recall", 32, 16
    sizes = {"train": 10_000, "valid": 2_000, "test": 2_000}

    def __init__(self, block_size):
        if block_size % 2 == 0 or block_size < 3:
            raise UserError(f"--data recall: --block-size {block_size} must be odd and above 1: "
                            "key-value pairs and a key")
        self.splits = {}
        for seed, (split, n) in enumerate(self.sizes.items()):
            rng = np.random.default_rng(seed)
            table = rng.integers(self.keys, self.vocab_size, (n, self.keys))
            own = rng.permuted(np.tile(np.arange(self.keys), (n, 1)), axis=1)
            count = rng.integers(1, self.keys + 1, (n, 1))
            keys = np.take_along_axis(own, rng.integers(0, count, (n, block_size // 2 + 1)), axis=1)
            keys[:, -1] = rng.permuted(keys[:, :-1], axis=1)[:, 0]  # ask for a key that came
            values = np.take_along_axis(table, keys, axis=1)
            rows = np.stack([keys, values], axis=2).reshape(n, -1)
            self.splits[split] = rows.astype(np.uint8)      # key, value, ..., key, value

    def examples(self, split, block_size):
        return self.sizes[split]

    def batch(self, split, indices, block_size):
        rows = torch.from_numpy(self.splits[split][indices].astype(np.int64))
        x, y = rows[:, :-1], rows[:, 1:].clone()
        keys = rows[:, ::2]                                 # (B, pairs)
        ask = (keys.unsqueeze(2) == keys.unsqueeze(1)).tril(-1).any(2)
        if split != "train":
            ask[:, :-1] = False
        y[:, ::2].masked_fill_(~ask, -1)                    # values stand at even places of y
        y[:, 1::2] = -1
        return x, y

    def figures(self, split, loss, accuracy):
        return {"loss": loss, "accuracy": accuracy}


def load_stdlib(tokenizer, data_dir):
    """The Python standard library's source on this machine, without its own tests.

    2 % of the files are valid, 2 % test, by a hash of the path: a file never changes its split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = {split: [] for split in SPLITS}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skip & set(name.parts):
            bucket = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 50
            files[{0: "valid", 1: "test"}.get(bucket, "train")].append(path.read_bytes())
    raw = {split: b"".join(texts) for split, texts in files.items()}
    return from_raw(f"stdlib-{platform.python_version()}", tokenizer or "bytes", raw, data_dir)


def load_path(path, tokenizer, data_dir):
    """A folder of {train,valid,test} .bin, .txt or wiki.*.{raw,tokens} files, or one text file."""
    if path.is_file():
        text = path.read_bytes()                            # 90, 5 and 5 %, cut at line ends
        places = [len(text) * part // 20 for part in (18, 19)]
        cuts = [0, *(text.find(b"\n", place) + 1 or place for place in places), len(text)]
        raw = {split: text[a:b] for split, a, b in zip(SPLITS, cuts, cuts[1:])}
    elif (path / "train.bin").exists():
        return from_bins(path, path.resolve().name)
    else:
        patterns = [p for p in ("wiki.{}.raw", "wiki.{}.tokens", "{}.txt")
                    if (path / p.format("train")).exists()]
        if not patterns:
            raise UserError(f"--data {path} is neither a text file nor a folder with train.bin, "
                            "train.txt, wiki.train.raw or wiki.train.tokens")
        files = {split: path / patterns[0].format(split) for split in SPLITS}
        raw = {split: file.read_bytes() for split, file in files.items() if file.exists()}
        if patterns[0].startswith("wiki"):
            tokenizer = tokenizer or "gpt2"
    return from_raw(path.resolve().name, tokenizer or "bytes", raw, data_dir)


def from_raw(name, tokenizer, raw, data_dir):
    """Text from split -> bytes; GPT-2 tokens are kept in data_dir for the next time."""
    counts = {split: {"bytes": len(text), "words": len(text.split())}
              for split, text in raw.items()}
    if tokenizer == "bytes":
        splits = {split: np.frombuffer(text, np.uint8) for split, text in raw.items()}
        return Text(name, "bytes", 256, splits, counts)
    digest = hashlib.sha256()
    for text in raw.values():
        digest.update(hashlib.sha256(text).digest())
    cache = data_dir / "tokens" / f"{name}-{digest.hexdigest()[:12]}"
    if not cache.exists():
        encoding = gpt2_encoding()
        part = Path(f"{cache}.part-{os.getpid()}")
        part.mkdir(parents=True, exist_ok=True)
        for split, text in raw.items():
            lines = text.decode(errors="replace").split("\n")
            lines = [line + "\n" for line in lines[:-1]] + lines[-1:]
            with open(part / f"{split}.bin", "wb") as f, \
                    tqdm(total=len(lines), unit="line", desc=f"tokenise {split}") as bar:
                for i in range(0, len(lines), 4096):        # line by line, many at a time
                    for ids in encoding.encode_ordinary_batch(lines[i:i + 4096]):
                        f.write(np.array(ids, np.uint16).tobytes())
                    bar.update(min(4096, len(lines) - i))
        meta = {"tokenizer": "gpt2", "vocab_size": encoding.n_vocab, "dtype": "uint16", **counts}
        (part / "meta.json").write_text(json.dumps(meta, indent=1))
        part.rename(cache)                                  # whole, or not there at all
    return from_bins(cache, name)


def from_bins(folder, name):
    """{train,valid,test}.bin, uint16 token ids, and meta.json beside them."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer, vocab_size = meta["tokenizer"], meta["vocab_size"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / 'meta.json'} is missing or names no tokenizer and vocab_size")
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        if path.exists():
            if path.stat().st_size == 0 or path.stat().st_size % 2:
                raise UserError(f"{path} is empty or cut off: make it again (uint16 token ids)")
            splits[split] = np.memmap(path, np.uint16, mode="r")
    return Text(name, tokenizer, vocab_size, splits, {s: meta.get(s, {}) for s in splits})


def gpt2_encoding():
    try:
        import tiktoken                                     # only this tokenizer needs it
        return tiktoken.get_encoding("gpt2")
    except Exception as e:                                  # whatever its HTTP library raises
        raise UserError(f"tiktoken does not give GPT-2's vocabulary ({type(e).__name__}): go "
                        "online once, set TIKTOKEN_CACHE_DIR to a filled cache, or use "
                        "--tokenizer bytes")


def load_wikitext103(tokenizer, data_dir):
    """WikiText-103 raw: unpacked in data_dir, or from the zip there, or downloaded once."""
    folder = data_dir / "wikitext-103-raw"
    archive = data_dir / "wikitext-103-raw-v1.zip"
    if not folder.exists():
        if not archive.exists():
            download(WIKITEXT_URLS, archive)
        part = Path(f"{folder}.part-{os.getpid()}")
        part.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(archive) as z:
                for split in SPLITS:
                    member = z.read(f"{folder.name}/wiki.{split}.raw")
                    (part / f"wiki.{split}.raw").write_bytes(member)
        except (zipfile.BadZipFile, KeyError):
            raise UserError(f"{archive} is not WikiText-103's zip: delete it and start again")
        part.rename(folder)
    for split, lines in WIKITEXT_LINES.items():
        found = (folder / f"wiki.{split}.raw").read_bytes().count(b"\n")
        if found != lines:
            raise UserError(f"{folder}/wiki.{split}.raw has {found:,} lines and not {lines:,}: "
                            "delete the folder and start again")
    return load_path(folder, tokenizer, data_dir)


def download(urls, path):
    """The first of the urls that answers, to path; a download cut short leaves nothing at path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, errors = Path(f"{path}.part-{os.getpid()}"), []
    for url in urls:
        try:                                                # 403 for urllib's own User-Agent
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
            with urllib.request.urlopen(request, timeout=30) as r, open(part, "wb") as f:
                size = int(r.headers.get("Content-Length", 0))
                with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                    while block := r.read(1 << 20):
                        f.write(block)
                        bar.update(len(block))
                if size and f.tell() != size:
                    raise OSError(f"only {f.tell():,} of {size:,} bytes came")
            part.rename(path)
            return
        except (OSError, http.client.HTTPException) as e:   # URLError and time-outs are OSErrors
            errors.append(str(e))
            part.unlink(missing_ok=True)
    raise UserError(f"cannot download {path.name} ({'; '.join(errors)}): put it at {path}, or use "
                    "--data stdlib, which needs no download")


def load_data(args):
    """The dataset that --data names, checked; of several processes the first one prepares it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        dist.barrier()
    data_dir, size = Path(args.data_dir), args.block_size
    if args.data == "recall":
        data = Recall(size)
    elif args.data == "stdlib":
        data = load_stdlib(args.tokenizer, data_dir)
    elif args.data == "wikitext103":
        data = load_wikitext103(args.tokenizer, data_dir)
    else:
        data = load_path(Path(args.data), args.tokenizer, data_dir)
    if not {"train", "valid"} <= set(data.splits):
        raise UserError(f"--data {args.data}: a train and a valid split are needed, found only "
                        + ", ".join(data.splits))
    for split, tokens in data.splits.items():
        if len(tokens) <= size and data.tokenizer != "recall":
            raise UserError(f"--data {args.data}: the {split} split has {len(tokens)} tokens, one "
                            f"context needs {size + 1}: give more text or a smaller --block-size")
        if int(tokens.max()) >= data.vocab_size:
            raise UserError(f"--data {args.data}: the {split} split holds token {tokens.max()}, "
                            f"its vocabulary ends at {data.vocab_size - 1}: tokenise it again")
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return data


def bigram_bits_per_byte(data):
    """Validation bits per byte of P(byte | byte before), add-one counts on the training split."""
    pair = {split: 256 * tokens[:-1].astype(np.int64) + tokens[1:]
            for split, tokens in data.splits.items()}
    counts = np.bincount(pair["train"], minlength=256 * 256).reshape(256, 256) + 1
    p = counts / counts.sum(1, keepdims=True)
    return float(-np.log2(p.ravel()[pair["valid"]]).mean())


# --- training -------------------------------------------------------------------------------------


class Machine:
    """Where this process runs: its device and precision, its place among torchrun's processes."""

    def __init__(self, device, precision):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and self.world > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(name)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {name}: {str(e).splitlines()[0]}")
        cuda = self.device.type == "cuda"
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = precision or ("bf16" if bf16 else "fp32")
        if self.precision == "bf16":                        # what autocast leaves in fp32 uses tf32
            torch.set_float32_matmul_precision("high")
        if self.world > 1:
            if cuda:
                torch.cuda.set_device(self.device)
            # The others wait while the first process downloads and tokenises.
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
        name = (torch.cuda.get_device_name(self.device) if cuda
                else f"{name}, {torch.get_num_threads()} threads")
        self.name = f"{self.world} x {name}" if self.world > 1 else name

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def sum(self, *values):
        """Each number summed over all processes."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()


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


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), fused=True)


def backward(model, data, examples, args, machine):
    """Gradients of the mean loss over this process's examples, a micro-batch at a time."""
    total = 0.0
    for i in range(0, len(examples), args.micro_batch):
        micro = examples[i:i + args.micro_batch]
        x, y = (t.to(machine.device) for t in data.batch("train", micro, args.block_size))
        # Gradients are averaged over processes once, at the last micro-batch.
        wait = isinstance(model, DistributedDataParallel) and i + len(micro) < len(examples)
        with model.no_sync() if wait else contextlib.nullcontext():
            with machine.autocast():
                loss = model(x, y)[1] * (len(micro) / len(examples))
            loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def evaluate(model, data, split, args, machine):
    """data.figures of the whole split."""
    model.eval()
    loss, right, n = 0.0, 0, 0
    mine = range(machine.rank, data.examples(split, args.block_size), machine.world)
    for i in tqdm(range(0, len(mine), args.micro_batch), desc=split, leave=False,
                  disable=machine.rank > 0):
        x, y = (t.to(machine.device)
                for t in data.batch(split, mine[i:i + args.micro_batch], args.block_size))
        with machine.autocast():
            logits, mean = model(x, y)
        targets = int((y >= 0).sum())
        loss += float(mean) * targets
        right += int((logits.argmax(-1) == y).sum())
        n += targets
    model.train()
    loss, right, n = machine.sum(loss, right, n)
    return data.figures(split, loss / n, right / n)


def save_checkpoint(path, state):
    """Written beside path and renamed, so that path always holds a whole checkpoint."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({str(e).splitlines()[0]}): make room or choose "
                        "another --out; the checkpoint before it is untouched")


def checkpoint_state(model, optimizer, progress, identity, machine):
    """All that --resume and --sample need. `progress` is what train() counts, no_progress() at
    first; `identity` (see run_identity) is what a resumed run has to agree on."""
    state = {"config": asdict(model.config), "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "progress": progress, "identity": identity,
             "rng": torch.get_rng_state()}
    if machine.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(machine.device)
    return state


def run_identity(args, data, config):
    """What --resume does not change. The other options may, and hold from there on."""
    return {"data": data.name, "tokenizer": data.tokenizer, "seed": args.seed,
            "batch_size": args.batch_size, **asdict(config)}


def no_progress():
    return {"step": 0, "seconds": 0.0, "losses": [], "valid": None, "evaluations": 0}


def load_checkpoint(path):
    """What checkpoint_state made; "config" as a GPTConfig."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "config": GPTConfig(**state["config"])}
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train first, or name the run with --out")
    except Exception as e:              # torch.load has no exception of its own for a damaged file
        raise UserError(f"{path} is cut off or not a checkpoint of this program "
                        f"({type(e).__name__}): delete it and train again")


def resume(path, identity, model, optimizer, machine):
    """Puts model, optimizer and random numbers back to where they were; returns the progress."""
    state = load_checkpoint(path)
    for key, value in identity.items():
        if state["identity"].get(key) != value:
            raise UserError(f"{path} has {key} {state['identity'].get(key)}, this run has {value}: "
                            "give the options that it was started with, or another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    progress, log = state["progress"], path.with_name("log.jsonl")
    if machine.rank > 0:                                    # the random numbers saved are rank 0's
        return progress
    torch.set_rng_state(state["rng"])
    if machine.device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], machine.device)
    if log.exists():                                        # drop what is newer than the checkpoint
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:progress["evaluations"]]))
    return progress


def train(args, data, machine):
    """The whole run. Returns the model and the result, which is None after Ctrl-C."""
    out = Path(args.out)
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    try:
        config = GPTConfig(vocab_size=data.vocab_size, **{
            key: getattr(args, key) for key in ("block_size", "n_layer", "n_head", "n_embd",
                                                "dropout", "attention", "position",
                                                "exp_temperature", "feature_dim",
                                                "qk_init")})
    except ValueError as e:
        raise UserError(str(e))
    torch.manual_seed(args.seed)
    raw_model = GPT(config).to(machine.device)
    torch.manual_seed(args.seed + machine.rank)             # other dropout in each process
    optimizer = adamw(raw_model.parameter_groups(args.weight_decay), args.lr)
    identity, progress = run_identity(args, data, config), no_progress()
    if args.resume:
        progress = resume(checkpoint, identity, raw_model, optimizer, machine)
    elif checkpoint.exists() and not args.overwrite:
        raise UserError(f"{out} holds a run already: --resume goes on with it, --overwrite "
                        "replaces it, --out DIR keeps both")
    elif machine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for old in (checkpoint, log, out / "result.json"):
            old.unlink(missing_ok=True)
    compiled = torch.compile(raw_model) if args.compile else raw_model
    model = DistributedDataParallel(compiled) if machine.world > 1 else compiled
    if machine.rank == 0:
        print_header(args, data, machine, compiled)

    def save():
        if machine.rank == 0:
            save_checkpoint(checkpoint, checkpoint_state(raw_model, optimizer, progress, identity,
                                                         machine))

    interrupted = []                    # Ctrl-C is noted at once and acted upon between two steps
    before = signal.getsignal(signal.SIGINT)
    if machine.world == 1:
        signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    n, tokens_per_step = data.examples("train", args.block_size), args.batch_size * args.block_size
    with tqdm(total=args.steps * tokens_per_step, initial=progress["step"] * tokens_per_step,
              unit="tok", unit_scale=True, disable=machine.rank > 0, desc="train") as bar:
        start = time.perf_counter()
        while progress["step"] < args.steps and not interrupted:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress["step"], args.steps, args.lr, args.warmup)
            examples = example_order(progress["step"], args.batch_size, n, args.seed)
            loss = backward(model, data, examples[machine.rank::machine.world], args, machine)
            torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress["losses"].append(loss)
            progress["step"] += 1
            bar.update(tokens_per_step)
            evaluation = (progress["step"] % args.eval_every == 0
                          or progress["step"] == args.steps)
            if evaluation or progress["step"] % 10 == 1:    # reading a loss waits for the device
                losses = progress["losses"] = [float(x) for x in progress["losses"]]
                mean = machine.sum(sum(losses) / len(losses))[0] / machine.world
                bar.set_postfix_str(f"loss {losses[-1]:.3f}")
                if not math.isfinite(mean):
                    raise UserError(f"the loss is {mean} at step {progress['step']}: try a lower "
                                    "--lr or --precision fp32; the last checkpoint is untouched")
            if evaluation:
                progress["seconds"] += time.perf_counter() - start
                progress["valid"] = evaluate(raw_model, data, "valid", args, machine)
                progress["losses"] = []
                progress["evaluations"] += 1
                if machine.rank == 0:
                    line = {"step": progress["step"], "tokens": progress["step"] * tokens_per_step,
                            "train_loss": mean, "valid": progress["valid"],
                            "seconds": round(progress["seconds"], 1)}
                    with open(log, "a") as f:
                        f.write(json.dumps(line) + "\n")
                    bar.write(f"step {line['step']:>6}  train loss {mean:.4f}  valid "
                              + "  ".join(f"{k} {v:.4f}" for k, v in line["valid"].items()))
                save()
                start = time.perf_counter()
    signal.signal(signal.SIGINT, before)
    if interrupted and progress["step"] < args.steps:
        progress["losses"] = [float(x) for x in progress["losses"]]
        progress["seconds"] += time.perf_counter() - start
        save()
        again = [a for a in sys.argv if a not in ("--resume", "--overwrite")] + ["--resume"]
        print(f"stopped and saved at step {progress['step']}; to go on: python "
              f"{shlex.join(again)}")
        return raw_model, None
    tokens = progress["step"] * tokens_per_step
    result = {"attention": args.attention, "data": data.name, "tokenizer": data.tokenizer,
              "parameters": count_parameters(raw_model),
              "steps": progress["step"], "tokens": tokens, "valid": progress["valid"]}
    if "test" in data.splits:
        result["test"] = evaluate(raw_model, data, "test", args, machine)
    result |= {"seconds": round(progress["seconds"], 1),
               "tokens_per_second": round(tokens / (progress["seconds"] or math.inf)),
               "device": machine.name, "precision": machine.precision, "seed": args.seed,
               "config": asdict(config)}
    if machine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(machine.device)
        result["peak_memory_gib"] = round(peak / 2**30, 2)
    return raw_model, result


def print_header(args, data, machine, model):
    """What is about to happen, and how long a trial micro-batch says that it will take."""
    sizes = ", ".join(f"{len(tokens):,} {split}" for split, tokens in data.splits.items())
    print(f"data    {data.name}, {data.tokenizer}: {sizes}")
    if data.tokenizer == "bytes":
        print(f"        a byte-bigram model needs {bigram_bits_per_byte(data):.3f} bits per byte "
              "of valid")
    print(f"model   {args.attention} attention, {count_parameters(model):,} parameters: "
          f"{args.n_layer} layers, {args.n_head} heads, width {args.n_embd}, "
          f"context {args.block_size}")
    trial = [0] * min(args.micro_batch, args.batch_size // machine.world)
    devices = [machine.device] if machine.device.type == "cuda" else []
    for _ in range(2):                                      # the first one warms up
        start = time.perf_counter()
        with torch.random.fork_rng(devices):                # leaves dropout's numbers alone
            float(backward(model, data, trial, args, machine))
        seconds = (time.perf_counter() - start) / len(trial) / machine.world
    model.zero_grad(set_to_none=True)
    print(f"device  {machine.name}, {machine.precision}")
    print(f"budget  {args.steps:,} steps of {args.batch_size * args.block_size:,} tokens; about "
          f"{args.steps * args.batch_size * seconds / 60:,.1f} minutes of training", flush=True)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def sample(model, tokenizer, prompt, args, machine):
    """The prompt, text or token ids, and what the model makes of it; as long as there is room."""
    if tokenizer == "bytes":
        encode, decode = str.encode, lambda ids: bytes(ids).decode(errors="replace")
    elif tokenizer == "gpt2":
        encode, decode = gpt2_encoding().encode_ordinary, gpt2_encoding().decode
    else:
        raise UserError(f"a model of {tokenizer!r} tokens has no text to continue")
    if model.config.num_classes:
        raise UserError("a classifier has no text to continue")
    ids = list(encode(prompt)) if isinstance(prompt, str) else prompt
    limit = model.config.max_length
    new = args.sample_tokens if limit is None else min(args.sample_tokens, limit - len(ids))
    if not ids or new < 1:
        raise UserError(f"a prompt of {len(ids)} tokens: it takes at least 1"
                        + ("" if limit is None else f" and at most {limit - 1}"))
    idx = torch.tensor([ids], device=machine.device)
    try:
        return decode(model.generate(idx, new, args.temperature, args.top_k)[0].tolist())
    except KeyError as e:
        raise UserError(f"the model's token {e} is not in GPT-2's vocabulary")


# --- command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):                               # one line, without the usage
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def at_least(low, kind):
    """An argparse type."""
    def parse(text):
        try:
            if (value := kind(text)) >= low:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {'whole' if kind is int else 'a number'}"
                                         f" and at least {low}")
    return parse


positive, whole, amount = at_least(1, int), at_least(0, int), at_least(0, float)


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--data", help="stdlib (default without a GPU), wikitext103 (default with one), "
                   "recall, a folder of {train,valid,test}.txt, .bin or wiki.*, or a text file")
    p.add_argument("--data-dir", default="data", help="downloads and tokenised text (%(default)s)")
    p.add_argument("--tokenizer", choices=["gpt2", "bytes"],
                   help="for text of your own; gpt2 for files named wiki.*, else bytes")
    p.add_argument("--attention", default="hedgehog", choices=["softmax", *FEATURE_MAPS],
                   help="softmax or a feature map (%(default)s)")
    p.add_argument("--exp-temperature", type=amount, default=1.0, help="t of exp (%(default)s)")
    p.add_argument("--feature-dim", type=whole, default=0, help="columns of a learned map's W; 0 "
                   "is the head dim (%(default)s)")
    p.add_argument("--qk-init", type=amount, default=1.0, help="q and k projections start this "
                   "many times as large as in GPT-2 (%(default)s)")
    p.add_argument("--position", choices=["learned", "rotary"], help="positions (preset)")
    p.add_argument("--preset", choices=[name for name in PRESETS if name != "recall"],
                   help="tiny (default without a GPU), small, or gpt2 (default with one): sets "
                   "every option marked (preset); --data recall has its own")
    for name, kind, text in (
            ("n-layer", positive, "blocks"), ("n-head", positive, "heads of a block"),
            ("n-embd", positive, "width"), ("block-size", positive, "context in tokens"),
            ("dropout", amount, "on embeddings and block outputs"),
            ("batch-size", positive, "sequences of one step, over all GPUs"),
            ("micro-batch", positive, "sequences at once on a GPU: less memory, the same step"),
            ("steps", positive, "optimizer steps"), ("lr", amount, "peak learning rate"),
            ("epochs", amount, "passes over the data, instead of --steps"),
            ("eval-every", positive, "steps between evaluations, each with a checkpoint")):
        p.add_argument(f"--{name}", type=kind, help=f"{text} (preset)")
    p.add_argument("--warmup", type=amount, default=0.02, help="share of steps (%(default)s)")
    p.add_argument("--weight-decay", type=amount, default=0.1, help="of matrices (%(default)s)")
    p.add_argument("--grad-clip", type=amount, default=1.0, help="gradient norm (%(default)s)")
    p.add_argument("--seed", type=whole, default=0, help="of weights and data order (%(default)s)")
    p.add_argument("--device", help="cuda if there is one, else cpu")
    p.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 where the GPU has it")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile the training step (default with a GPU)")
    p.add_argument("--out", help="folder of the run (out/DATA-ATTENTION)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    p.add_argument("--sample", metavar="PROMPT", help="continue PROMPT with the model in --out")
    p.add_argument("--sample-tokens", type=positive, default=200, help="how many (%(default)s)")
    p.add_argument("--temperature", type=amount, default=0.8, help="0 is greedy (%(default)s)")
    p.add_argument("--top-k", type=positive, default=50, help="sample among these (%(default)s)")
    args = p.parse_args(argv)
    gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    args.data = args.data or ("wikitext103" if gpu else "stdlib")
    preset = "recall" if args.data == "recall" else args.preset or ("gpt2" if gpu else "tiny")
    if args.epochs == 0:
        p.error("--epochs must be above 0")
    if args.steps and args.epochs:
        p.error("--steps and --epochs: give one of them")
    for key, value in PRESETS[preset].items():
        if getattr(args, key) is None and not (key == "epochs" and args.steps):
            setattr(args, key, value)
    args.position = args.position or "learned"
    args.compile = gpu if args.compile is None else args.compile
    args.out = args.out or f"out/{Path(args.data).resolve().name}-{args.attention}"
    return args


def one_line_errors(program, args, run):
    """run()'s exit code, or 2 and one line on what went wrong and what to do."""
    try:
        return run()
    except UserError as e:
        print(f"{program}: error: {e}", file=sys.stderr)
    except OSError as e:
        print(f"{program}: error: {e.filename or args.out}: {e.strerror}", file=sys.stderr)
    except torch.cuda.OutOfMemoryError:
        print(f"{program}: error: out of GPU memory: give a smaller --micro-batch than "
              f"{args.micro_batch}", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 2


def load_model(path, machine):
    """The model of a checkpoint, and the rest of what is in it."""
    state = load_checkpoint(path)
    model = GPT(state["config"])
    model.load_state_dict(state["model"])
    return model.to(machine.device), state


def write_result(out, result):
    """One line of JSON, with how it was come by: printed, and renamed into OUT/result.json."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    line = json.dumps(result | {"command": command, "date": str(date.today()),
                                "torch": torch.__version__, "python": platform.python_version()})
    part = Path(out) / "result.json.part"
    part.write_text(line + "\n")
    part.replace(Path(out) / "result.json")
    print(line)


def run(args):
    machine = Machine(args.device, args.precision)
    if args.sample is not None:
        model, state = load_model(Path(args.out) / "checkpoint.pt", machine)
        torch.manual_seed(args.seed)
        print(sample(model, state["identity"]["tokenizer"], args.sample, args, machine))
        return 0
    if args.batch_size % machine.world:
        raise UserError(f"--batch-size {args.batch_size} does not divide among "
                        f"{machine.world} processes")
    data = load_data(args)
    if args.epochs:
        args.steps = max(1, math.ceil(args.epochs * data.examples("train", args.block_size)
                                      / args.batch_size))
    model, result = train(args, data, machine)
    if result is None:
        return 130
    if machine.rank == 0:
        try:
            prompt = data.splits["valid"].flatten()[:32].tolist()
            print(f"sample  {sample(model, data.tokenizer, prompt, args, machine)!r}")
        except UserError as e:
            print(f"no sample: {e}")
        write_result(args.out, result)
    return 0


def main(argv=None):
    args = parse_args(argv)
    return one_line_errors("train_lm.py", args, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
