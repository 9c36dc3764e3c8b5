"""Tasks: what a model is trained on and judged by. Text, recall, ListOps, GLUE, responses, images.

A task has

    batch(split, indices)           tensors for the model: inputs, targets and perhaps a key_mask
    num_examples(split)             how many indices there are
    num_targets(split, indices)     over how many targets the model's loss of a batch is a mean
    metrics(split, loss, accuracy)  what one reports of a mean loss in nats, as a dict
    figure                          the name of the metric to judge a model by
    name, tokenizer, splits         what a run's results say; split -> its data
    vocab_size or classes           how many tokens or classes the model tells apart

with the splits "train", "valid" and perhaps "test". `load_data` makes the tasks of text and recall.
"""

import contextlib
import hashlib
import http.client
import json
import math
import os
import platform
import random
import statistics
import sysconfig
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
WIKITEXT_LINES = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
WIKITEXT_URLS = ["https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                 "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/"
                 "wikitext-103-raw-v1.zip"]


# --- text -----------------------------------------------------------------------------------------


class Text:
    """Token ids in splits, cut into examples of block_size tokens that each predict the next one.

    splits: "train", "valid" and perhaps "test" -> array of token ids, unsigned integers.
    counts: split -> {"words": .., "bytes": ..} as far as known; words are separated by white space.
    """
    figure = "perplexity"

    def __init__(self, name, tokenizer, vocab_size, splits, counts, block_size):
        self.name, self.tokenizer, self.vocab_size = name, tokenizer, vocab_size
        self.splits, self.counts, self.block_size = splits, counts, block_size
        if not {"train", "valid"} <= set(splits):
            raise ValueError(f"{name}: a train and a valid split are needed, found only "
                             + ", ".join(splits))
        for split, tokens in splits.items():
            if len(tokens) <= block_size:
                raise ValueError(f"{name}: the {split} split has {len(tokens)} tokens, a context "
                                 f"needs {block_size + 1}: more text or a smaller --block-size")
            if int(tokens.max()) >= vocab_size:
                raise ValueError(f"{name}: the {split} split holds token {tokens.max()}, its "
                                 f"vocabulary ends at {vocab_size - 1}: tokenise it again")

    def num_examples(self, split):
        """All whole ones to train on; to evaluate on, the ragged last one too."""
        whole, rest = divmod(len(self.splits[split]) - 1, self.block_size)
        return whole + (split != "train" and rest > 0)

    def num_targets(self, split, indices):
        tokens = len(self.splits[split]) - 1
        return sum(min(self.block_size, tokens - i * self.block_size) for i in indices)

    def batch(self, split, indices):
        """Inputs and targets (B, T) of the examples; targets are -1 past the end of the split."""
        T = self.block_size
        x = torch.zeros(len(indices), T, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, i in enumerate(indices):
            window = self.splits[split][i * T:(i + 1) * T + 1].astype(np.int64)
            x[row, :len(window) - 1] = torch.from_numpy(window[:-1])
            y[row, :len(window) - 1] = torch.from_numpy(window[1:])
        return x, y

    def metrics(self, split, loss, accuracy):
        """Perplexity is per token. Perplexity per word and bits per byte divide the summed loss by
        the words and bytes of the split, where these are known. Accuracy is a share of 1."""
        total, count = loss * (len(self.splits[split]) - 1), self.counts.get(split, {})
        out = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}
        if self.tokenizer != "bytes" and count.get("words"):
            out["perplexity_per_word"] = math.exp(min(total / count["words"], 700))
        if count.get("bytes"):
            out["bits_per_byte"] = total / count["bytes"] / math.log(2)
        return out


def load_data(o, encoding=None):
    """The task that --data names, by the options data, data_dir, tokenizer and block_size.
    `encoding` is another tokenizer than bytes or GPT-2's, with what tokenise() uses of it."""
    if o.data == "recall":
        return Recall(o.block_size)
    if (Path(o.data) / "train.bin").exists():
        return load_bins(Path(o.data), Path(o.data).resolve().name, o)
    return tokenise(*read_text(o), o, encoding)


def read_text(o):
    """What --data names: its name, split -> bytes, and its tokenizer unless one is given."""
    path = Path(o.data)
    if o.data == "stdlib":
        return f"stdlib-{platform.python_version()}", read_stdlib(), "bytes"
    if o.data == "wikitext103":
        path = wikitext103(Path(o.data_dir))
    name = path.resolve().name
    if path.suffix == ".jsonl":
        raise ValueError(f"--data {path}: prompts and responses are for distill.py --teacher and a "
                         "model of Hugging Face")
    if path.is_file():                                      # 90, 5 and 5 %, cut at line ends
        text = path.read_bytes()
        places = [len(text) * part // 20 for part in (18, 19)]
        for i in range(2):
            while text[places[i]:places[i] + 1] and 0x80 <= text[places[i]] < 0xC0:
                places[i] += 1                              # not inside a character of UTF-8
        a, b = (text.find(b"\n", place) + 1 for place in places)
        a, b = (a, b) if 0 < a < b < len(text) else places
        return name, {"train": text[:a], "valid": text[a:b], "test": text[b:]}, "bytes"
    for pattern in ("wiki.{}.raw", "wiki.{}.tokens", "{}.txt"):
        files = {split: path / pattern.format(split) for split in SPLITS}
        if files["train"].exists():
            return name, {split: file.read_bytes() for split, file in files.items()
                          if file.exists()}, "gpt2" if pattern.startswith("wiki") else "bytes"
    raise ValueError(f"--data {path} is not stdlib, wikitext103 or recall, nor a text file, nor a "
                     "folder with train.bin, train.txt, wiki.train.raw or wiki.train.tokens")


def read_stdlib():
    """The Python standard library's source on this machine, without its own tests and tables.

    Of 25 modules one is valid, one test, by a hash of the name. So a module is in the same split in
    every version, and files of a package, which repeat each other, are in one split.
    """
    root, texts = Path(sysconfig.get_paths()["stdlib"]), {split: [] for split in SPLITS}
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
            "encodings", "pydoc_data"}                      # the last two were made by programs
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skip & set(name.parts) and not name.stem.startswith("_sysconfigdata"):
            module = name.parts[0].removesuffix(".py")
            bucket = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 25
            texts[{0: "valid", 1: "test"}.get(bucket, "train")].append(path.read_bytes())
    return {split: b"".join(parts) for split, parts in texts.items()}


def wikitext103(data_dir):
    """The folder of WikiText-103 raw: unpacked here, or from the zip here, or downloaded once."""
    folder, archive = data_dir / "wikitext-103-raw", data_dir / "wikitext-103-raw-v1.zip"
    data_dir.mkdir(parents=True, exist_ok=True)
    for url in WIKITEXT_URLS:
        if not folder.exists() and not zipfile.is_zipfile(archive):     # none, or one cut off
            with contextlib.suppress(OSError, http.client.HTTPException):
                torch.hub.download_url_to_file(url, str(archive))
    try:
        if not folder.exists():
            zipfile.ZipFile(archive).extractall(data_dir)
        for split, lines in WIKITEXT_LINES.items():
            if (folder / f"wiki.{split}.raw").read_bytes().count(b"\n") != lines:
                raise ValueError(f"{folder}/wiki.{split}.raw has not {lines:,} lines")
    except (FileNotFoundError, ValueError, zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise ValueError(f"no WikiText-103 ({e}): remove {folder} and put the zip at {archive}, or "
                         "use --data stdlib, which needs no download")
    return folder


def tokenise(name, raw, tokenizer, o, encoding=None):
    """Text from split -> bytes; tokens, unless bytes, are kept in data_dir for the next time."""
    counts = {s: {"bytes": len(text), "words": len(text.split())} for s, text in raw.items()}
    tokenizer = encoding.name if encoding else o.tokenizer or tokenizer
    if tokenizer == "bytes":
        splits = {split: np.frombuffer(text, np.uint8) for split, text in raw.items()}
        return Text(name, "bytes", 256, splits, counts, o.block_size)
    which = getattr(encoding, "fingerprint", tokenizer)     # names are not unique
    digest = hashlib.sha256(repr([which, "pieces", *((s, hashlib.sha256(text).digest())
                                               for s, text in raw.items())]).encode()).hexdigest()
    cache = Path(o.data_dir) / "tokens" / f"{name}-{digest[:12]}"
    if not (cache / "meta.json").exists():                  # which is written last
        encoding = encoding or gpt2_encoding()
        dtype = "uint16" if encoding.n_vocab <= 2**16 else "uint32"
        for split, text in raw.items():
            try:
                pieces = list(pieces_of(text.decode()))
            except UnicodeDecodeError as e:
                raise ValueError(f"{name}, {split}: byte {e.start:,} is not UTF-8; --tokenizer "
                                 "bytes takes any text")
            ids = [np.zeros(0, dtype)]
            for i in tqdm(range(0, len(pieces), 64), desc=f"tokenise {split}"):
                for piece in encoding.encode_ordinary_batch(pieces[i:i + 64]):
                    ids.append(np.array(piece, dtype))
            write_whole(cache / f"{split}.bin", lambda f: f.write(np.concatenate(ids).tobytes()))
        meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "dtype": dtype, **counts}
        write_whole(cache / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))
    return load_bins(cache, name, o)


def pieces_of(text, size=2**17):
    """The text in pieces of some `size` characters that end with a line: long, because a tokenizer
    may treat the start of what it gets, or several line ends, in a way of their own."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def load_bins(folder, name, o):
    """{train,valid,test}.bin, token ids, and meta.json beside them; uint16 if it names no dtype."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer, vocab_size = meta["tokenizer"], int(meta["vocab_size"])
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[meta.get("dtype", "uint16")]
        counts = {split: {key: float(x) for key, x in dict(meta.get(split, {})).items()
                          if key in ("words", "bytes")} for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise ValueError(f"{folder / 'meta.json'} is missing, or names no tokenizer and "
                         "vocab_size, or counts that are no numbers, or another dtype than uint16 "
                         "and uint32")
    if o.tokenizer not in ("", tokenizer):
        raise ValueError(f"{folder} holds tokens of {tokenizer}, not {o.tokenizer}")
    paths = {split: folder / f"{split}.bin" for split in SPLITS}
    for path in paths.values():
        if path.exists() and path.stat().st_size % dtype().itemsize:
            raise ValueError(f"{path} ends within a token of {meta.get('dtype', 'uint16')}")
    splits = {split: np.fromfile(path, dtype) for split, path in paths.items() if path.exists()}
    if any(x.any() and not x[1:4096:2].any() for x in splits.values() if len(x) > 1):
        raise ValueError(f"{folder}: every second token is 0, as in numbers wider than "
                         f"{meta.get('dtype', 'uint16')}: name their dtype in meta.json")
    return Text(name, tokenizer, vocab_size, splits, counts, o.block_size)


def gpt2_encoding():
    try:
        import tiktoken                                     # only this tokenizer needs it
        return tiktoken.get_encoding("gpt2")
    except Exception as e:                                  # whatever its HTTP library raises
        raise ValueError(f"tiktoken does not give GPT-2's vocabulary ({type(e).__name__}): go "
                         "online once, set TIKTOKEN_CACHE_DIR to a filled cache, or use "
                         "--tokenizer bytes")


def write_whole(path, write):
    """write(file) beside path and rename it, so that path always holds a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:                    # torch.save's is a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({str(e).splitlines()[0]}): make room or choose "
                      "another folder; what was there before is untouched")


# --- associative recall ---------------------------------------------------------------------------


class Recall:
    """Associative recall (the paper's Table 12): which value came after this key?

        x   c 7 a 3 f 9 a 3 c 7 f      10,000 sequences to train on, 2,000 others to judge by and
        y   . . . . . . 3 . 7 . 9      2,000 to test on, each with its own key -> value table, its
                                       keys 1 to 16 of 16

    Training predicts every value whose key came before ("." is -1), evaluation the last one only.
    The sequences with few keys are what lets recall be learned in minutes.
    """
    figure = "accuracy"
    name, tokenizer, vocab_size, keys = "recall", "recall", 32, 16
    sizes = {"train": 10_000, "valid": 2_000, "test": 2_000}

    def __init__(self, block_size):
        if block_size % 2 == 0 or block_size < 3:
            raise ValueError(f"--data recall: --block-size {block_size} must be odd and above 1: "
                             "key-value pairs and a key")
        self.splits, self.block_size = {}, block_size
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

    def num_examples(self, split):
        return self.sizes[split]

    def num_targets(self, split, indices):
        return int((self.batch(split, indices)[1] >= 0).sum())

    def batch(self, split, indices):
        rows = torch.from_numpy(self.splits[split][indices].astype(np.int64))
        x, y = rows[:, :-1], rows[:, 1:].clone()
        keys = rows[:, ::2]                                 # (B, pairs)
        ask = (keys.unsqueeze(2) == keys.unsqueeze(1)).tril(-1).any(2)
        if split != "train":
            ask[:, :-1] = False
        y[:, ::2].masked_fill_(~ask, -1)                    # values stand at even places of y
        y[:, 1::2] = -1
        return x, y

    def metrics(self, split, loss, accuracy):
        return {"loss": loss, "accuracy": accuracy}


# --- classification -------------------------------------------------------------------------------


class Classification:
    """Sequences and their classes, a task as Text is one.

    splits: split -> list of (token ids, class). figure: what one is judged by, in per cent.
    labels: the names of the classes, if they have some.
    """

    def __init__(self, name, tokenizer, splits, figure="accuracy", labels=()):
        self.name, self.tokenizer, self.splits, self.figure = name, tokenizer, splits, figure
        self.labels = labels
        self.classes = len(labels) or 1 + max(label for _, label in splits["train"])

    def num_examples(self, split):
        return len(self.splits[split])

    def num_targets(self, split, indices):
        return len(indices)

    def batch(self, split, indices):
        """Token ids (B, T) up to the longest, classes (B), and where there is no padding (B, T)."""
        ids, labels = zip(*(self.splits[split][i] for i in indices))
        ids = [torch.from_numpy(x.astype(np.int64)) for x in ids]
        mask = [torch.ones_like(x, dtype=torch.bool) for x in ids]
        idx, mask = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, mask))
        return idx, torch.tensor(labels), mask

    def metrics(self, split, loss, accuracy):
        return {"loss": loss, "accuracy": 100 * accuracy}


def in_order(labels, known):
    """Names of classes as a list: in the order that a model knows, if it knows the same ones."""
    return list(known) if sorted(labels) == sorted(known) else sorted(labels)


def matthews(labels, guesses):
    """Correlation of two binary sequences; 0 if one of them is constant."""
    if min(np.std(labels), np.std(guesses)) == 0:
        return 0.0
    return float(np.corrcoef(labels, guesses)[0, 1])


def listops(low, high, sizes, seed=0):
    """Long Range Arena's ListOps (Tay et al., arXiv 2011.04006): MIN, MAX, MED, SM of digits.

    Tokens are 0 to 9, the operators 10 to 13 and the closing bracket 14. Expressions with low <
    length < high, no two the same. Returns split -> list of (ids, value).
    """
    rng, seen, tries = random.Random(seed), set(), 0

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
            ids, tries = grow(1), tries + 1
            if tries == 100_000:
                raise ValueError(f"too few expressions are longer than {low} and shorter than "
                                 f"{high}: give other lengths or fewer --listops-examples")
            if low < len(ids) < high and (key := bytes(ids)) not in seen:
                seen.add(key)
                tries = 0
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


def glue(folder, encode, block_size, known=()):
    """GLUE's train.tsv and dev.tsv: split -> list of (ids, class), the figure to judge by, and the
    names of the classes, `in_order` of those `known`.

    The header names the columns, except in CoLA, which has none. Two sentences are joined by a
    newline; what is longer than block_size is cut. Lines with other columns are left out, and
    counted on the screen.
    """
    splits, labels, figure = {}, None, "accuracy"
    for split, name in (("train", "train.tsv"), ("valid", "dev.tsv")):
        text = (folder / name).read_text(encoding="utf-8-sig", errors="replace")
        rows = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
        head = rows[0] if rows else []
        texts = [i for i, column in enumerate(head) if column in TEXT_COLUMNS]
        label = [i for i, column in enumerate(head) if column in LABEL_COLUMNS]
        if texts and label:
            rows, label = rows[1:], label[0]
        elif len(head) == 4 and head[1] in ("0", "1"):      # CoLA: source, label, star, sentence
            texts, label, figure = [3], 1, "matthews"
        else:
            raise ValueError(f"{folder / name}: no columns of text and label are known in its "
                             f"first line: {' | '.join(head)[:60]!r}")
        whole = [row for row in rows if len(row) == len(head)]
        if len(whole) < len(rows):
            print(f"{folder / name}: {len(rows) - len(whole)} of {len(rows)} lines have not "
                  f"{len(head)} columns and are left out")
        labels = labels or in_order({row[label] for row in whole}, known)
        if not whole or not {row[label] for row in whole} <= set(labels):
            raise ValueError(f"{folder / name} has no examples, or labels that train.tsv has not")
        splits[split] = [(np.array((encode("\n".join(row[i] for i in texts)) or [0])[:block_size],
                                   np.uint32), labels.index(row[label])) for row in whole]
    return splits, figure, labels


# --- for models of Hugging Face -------------------------------------------------------------------


class Responses:
    """Prompts and responses from a .jsonl file, a task as Text is one: the loss is over
    the response alone. A line has dialogue and summary, or prompt and response.

    FILE.jsonl is cut into 90 % to train on and 10 % to judge by, unless it is called train.jsonl
    and valid.jsonl lies beside it. A response is cut at half of block_size tokens, and one that is
    generated for ROUGE at 64 or half of the model's positions; long prompts lose their start.
    """
    figure = "perplexity"

    def __init__(self, path, tokenizer, block_size):
        self.name, self.tokenizer, self.model_tokenizer = Path(path).stem, "", tokenizer
        if block_size < 2:
            raise ValueError("--block-size 1 has no room for a prompt and a response")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"--data {path}: the model's tokenizer has no token to end a response")
        self.block_size = block_size
        pairs = self.read(Path(path))
        if Path(path).name == "train.jsonl" and (beside := Path(path).with_name("valid.jsonl")
                                                 ).exists():
            self.splits = {"train": pairs, "valid": self.read(beside)}
        else:
            cut = len(pairs) * 9 // 10
            self.splits = {"train": pairs[:cut], "valid": pairs[cut:]}
        if not all(self.splits.values()):
            raise ValueError(f"{path}: too few examples to train on and to judge by")

    def read(self, path):
        pairs = []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            try:
                x = json.loads(line)
                prompt, response = ((x["prompt"], x["response"]) if "prompt" in x else (
                    f"Summarize this dialog:\n{x['dialogue']}\n---\nSummary:\n", x["summary"]))
                if not isinstance(prompt, str) or not isinstance(response, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: no JSON with prompt and response, or "
                                 "dialogue and summary")
            eos = [self.model_tokenizer.eos_token_id]
            prompt = self.model_tokenizer(prompt)["input_ids"] or eos
            answer = self.model_tokenizer(response, add_special_tokens=False)["input_ids"] + eos
            answer = answer[:self.block_size // 2]
            pairs.append((self.end(prompt, self.block_size - len(answer)), answer, response))
        return pairs

    def end(self, prompt, room):
        """The last tokens of a prompt, and the one that starts a text if it has that."""
        bos = [x for x in prompt[:1] if x == self.model_tokenizer.bos_token_id]
        return bos + prompt[len(bos) + max(0, len(prompt) - room):]

    def num_examples(self, split):
        return len(self.splits[split])

    def num_targets(self, split, indices):
        return sum(len(self.splits[split][i][1]) for i in indices)

    def batch(self, split, indices):
        """Inputs, targets (-1 but for the response) and mask (B, T), padded on the right."""
        rows = [self.splits[split][i][:2] for i in indices]
        T = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        x = torch.zeros(len(rows), T, dtype=torch.long)
        y, mask = torch.full_like(x, -1), torch.zeros_like(x, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):
            ids = torch.tensor(prompt + answer)
            x[i, :len(ids) - 1], mask[i, :len(ids) - 1] = ids[:-1], True
            y[i, len(prompt) - 1:len(ids) - 1] = ids[len(prompt):]
        return x, y, mask

    def metrics(self, split, loss, accuracy):
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}

    def rouge(self, model, o, progress):
        """ROUGE-1, -2, -L (F, per cent) of greedy responses to the validation prompts."""
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            print("no ROUGE: pip install rouge-score")
            return {}
        tokenizer, scores = self.model_tokenizer, []
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (
            tokenizer.eos_token_id)
        asked, most = self.splits["valid"][:o.rouge], model.config.block_size
        room = min(64, max(most // 2, most - max(len(prompt) for prompt, _, _ in asked)))
        asked = [(self.end(prompt, most - room), response) for prompt, _, response in asked]
        for i in progress(range(0, len(asked), o.micro_batch)):
            rows = asked[i:i + o.micro_batch]
            T = max(len(prompt) for prompt, _ in rows)
            idx = torch.full((len(rows), T), pad)
            mask = torch.zeros_like(idx)
            for j, (prompt, _) in enumerate(rows):          # padded on the left: all end together
                idx[j, T - len(prompt):], mask[j, T - len(prompt):] = torch.tensor(prompt), 1
            out = model.hf.generate(idx.to(o.device), attention_mask=mask.to(o.device),
                                    max_new_tokens=room, do_sample=False, pad_token_id=pad,
                                    eos_token_id=tokenizer.eos_token_id)
            for (_, response), ids in zip(rows, out[:, T:]):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                scores.append([x.fmeasure for x in scorer.score(response, text).values()])
        return dict(zip(("rouge1", "rouge2", "rougeL"), (100 * np.mean(scores, axis=0)).tolist()))


class Images(Classification):
    """Folders of images named by their class: FOLDER/train/CLASS and FOLDER/valid/CLASS (or val),
    or FOLDER/CLASS, of which every tenth image is to judge by. Names with a dot first are left out.
    known: names of classes, as of `glue`."""
    figure = "accuracy"

    def __init__(self, folder, processor, known=()):
        self.name, self.tokenizer, self.processor = Path(folder).name, "", processor
        valid = Path(folder, "valid" if Path(folder, "valid").is_dir() else "val")
        split = Path(folder, "train").is_dir() and valid.is_dir()
        roots = dict(train=Path(folder, "train"), valid=valid) if split else dict.fromkeys(
            ("train", "valid"), Path(folder))
        names, others = ({x.name for x in root.glob("[!.]*") if x.is_dir()}
                         for root in roots.values())
        if others - names:
            raise ValueError(f"--task {folder}: {valid.name} has {', '.join(others - names)}, "
                             "train has not")
        self.labels, self.splits = in_order(names, known), {}
        self.classes = len(names)
        for s, root in roots.items():
            files = [(file, label) for label, name in enumerate(self.labels)
                     for file in sorted((root / name).glob("[!.]*"))]
            self.splits[s] = files if split else [
                x for i, x in enumerate(files) if (i % 10 == 9) == (s == "valid")]
            if not self.splits[s]:
                raise ValueError(f"--task {folder}: no images in folders named by their class")

    def batch(self, split, indices):
        """Pixels (B, 3, height, width) by the model's image processor, and classes (B)."""
        from PIL import Image

        files, labels = zip(*(self.splits[split][i] for i in indices))
        images = [Image.open(file).convert("RGB") for file in files]
        return self.processor(images, return_tensors="pt")["pixel_values"], torch.tensor(labels)
