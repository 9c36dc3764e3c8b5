"""train_lm.py from its command line: every kind of data, resuming, several processes, errors."""

import http.server
import io
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import gap
import tasks
import train_lm
from gpt import GPT, Block
from hedgehog import FEATURE_MAPS, GPTConfig

SHAPE = ("--data text.txt --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 "
         "--micro-batch 2 --position learned --sample-tokens 5")
TINY = f"{SHAPE} --out o --steps 6 --eval-every 2"
LONG = f"{SHAPE} --steps 60 --eval-every 5 --dropout 0.1"
RECALL = "--data recall --block-size 15 --out o"
LINES = "".join(f"line {i} of {i * i % 97} words\n" for i in range(400))


@pytest.fixture(autouse=True)
def on_a_cpu_beside_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")          # for the processes that tests start
    Path("text.txt").write_text(LINES)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)    # not a run's, for pytest


@pytest.fixture
def small_bpe(monkeypatch):
    """A real tiktoken encoding that needs no download: the 256 bytes and two merges."""
    ranks = {bytes([i]): i for i in range(256)} | {b"li": 256, b"ne": 257}
    encoding = tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                                 special_tokens={})
    for module in (tasks, train_lm):
        monkeypatch.setattr(module, "gpt2_encoding", lambda: encoding)


@pytest.fixture
def few_recall(monkeypatch):
    monkeypatch.setattr(tasks.Recall, "sizes", {"train": 40, "valid": 20, "test": 20})


def run(*args):
    """Runs main on a command line in pieces; returns exit code, standard output and error."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = train_lm.main(shlex.split(" ".join(args)))
    return code, out.getvalue(), err.getvalue()


def result(*args):
    """Runs main, which succeeds; returns what it prints last."""
    code, out, err = run(*args)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def failure(*args):
    """Runs main, which fails; returns the one line that it prints on that."""
    code, _, err = run(*args)
    *before, line = err.splitlines()
    assert code == 2 and "error: " in line and "rror" not in "".join(before)
    return line


def options(**more):
    return train_lm.Options(**dict(data="text.txt", device="cpu", block_size=16) | more)


def small_gpt(**more):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=2, n_embd=16, **more))


def log(out):
    """The log without the times."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def write_bins(ids, **meta):
    """A folder d of token ids; returns options to train on it."""
    Path("d").mkdir(exist_ok=True)
    for split in tasks.SPLITS:
        ids.tofile(f"d/{split}.bin")
    Path("d/meta.json").write_text(json.dumps(meta))
    return f"{TINY} --data d --out p"


# --- data -----------------------------------------------------------------------------------------


def test_text_file():
    code, out, err = run(TINY)
    assert code == 0 and "train: 100%" in err
    assert "the [prompt]" in out and "softmax's cache would be" in out and "bigram" not in out
    r = json.loads(out.splitlines()[-1])
    assert r == json.loads(Path("o/result.json").read_text())
    assert r["tokens"] == 6 * 4 * 16 and r["steps"] == 6 and r["attention"] == "hedgehog"
    assert r["lr"] == train_lm.Options().lr
    assert [line["step"] for line in log("o")] == [2, 4, 6] and log("o")[-1]["valid"] == r["valid"]
    assert {"seconds", "tokens_per_second", "device", "torch", "seed", "test", "command"} <= set(r)


def test_figures_cover_the_whole_split():
    """Perplexity and bits per byte against a sum over the split token by token."""
    r = result(TINY)["valid"]
    gpt, _ = train_lm.load_model("o", "cpu")
    tokens = torch.from_numpy(tasks.load_data(options()).splits["valid"].astype(np.int64))
    nats, right = [], []
    for i in range(0, len(tokens) - 1, 16):
        window = tokens[i:i + 17]
        logits = gpt(window[None, :-1])[0][0].log_softmax(-1)
        nats += (-logits.gather(1, window[1:, None])).flatten().tolist()
        right += (logits.argmax(1) == window[1:]).tolist()
    assert len(nats) == len(tokens) - 1
    assert r["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert r["accuracy"] == pytest.approx(np.mean(right), abs=1e-3) and any(right)
    assert r["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    assert r["bits_per_byte"] == pytest.approx(sum(nats) / np.log(2) / len(tokens), rel=1e-5)


@pytest.mark.parametrize("text, sizes", [
    (LINES, None),                                          # cut at line ends
    ("x" * 1000, [900, 50, 50]),
    ("y" * 880 + "\n" + "x" * 119, [900, 50, 50]),
    ("y" * 920 + "\n" + "x" * 79, [900, 50, 50]),           # the last line has 90 to 95 %
    ("y" * 920 + "\n" + "x" * 78 + "\n", [900, 50, 50]),
])
def test_splits_of_a_file(text, sizes):
    Path("text.txt").write_text(text)
    splits = [x.tobytes() for x in tasks.load_data(options()).splits.values()]
    assert b"".join(splits) == text.encode()
    if sizes is None:
        assert all(x.endswith(b"\n") and abs(len(x) / len(text) - share) < 0.01
                   for x, share in zip(splits, (0.9, 0.05, 0.05)))
    else:
        assert [len(x) for x in splits] == sizes


def test_text_is_tokenised_in_long_pieces():
    """A tokenizer that marks the start of what it gets, as Llama's does, marks it once."""
    text = "a line\n\n" * 1000 + "no end"
    pieces = list(tasks.pieces_of(text, 1000))
    assert "".join(pieces) == text and len(pieces) == 8
    assert all(piece.endswith("\n") and len(piece) < 1010 for piece in pieces[:-1])
    assert list(tasks.pieces_of("")) == []
    texts = []

    def encode(pieces):
        texts.extend(pieces)
        return [[1] * len(piece) for piece in pieces]
    encoding = SimpleNamespace(name="marking", n_vocab=2, encode_ordinary_batch=encode)
    tasks.load_data(options(), encoding)
    assert "".join(texts) == LINES and len(texts) == 3      # one of each split


def test_tokens_of_a_large_vocabulary():
    encoding = SimpleNamespace(name="large", n_vocab=128_256, encode_ordinary_batch=lambda texts: [
        [128_255] * len(text) for text in texts])
    data = tasks.load_data(options(), encoding)
    assert set(data.splits["train"].tolist()) == {128_255} and data.vocab_size == 128_256


def test_a_file_is_not_cut_inside_a_character(small_bpe):
    for extra in range(3):                                  # three bytes a character
        Path("long.txt").write_text("a" * extra + "\u20ac" * 400)
        assert result(TINY, "--data long.txt --tokenizer gpt2 --overwrite")


@pytest.mark.parametrize("pattern", ["wiki.{}.raw", "wiki.{}.tokens", "{}.txt"])
def test_folder_of_text(small_bpe, pattern):
    Path("d").mkdir()
    for split in ("train", "valid"):                        # a test split is not needed
        Path("d", pattern.format(split)).write_text(LINES)
    r = result(TINY, "--data d")
    assert "test" not in r and r["tokenizer"] == ("bytes" if pattern == "{}.txt" else "gpt2")
    if r["tokenizer"] == "bytes":
        return
    cached, = Path("data/tokens").iterdir()
    before = (cached / "train.bin").stat().st_mtime_ns
    tokens = np.fromfile(cached / "train.bin", np.uint16)
    assert tasks.gpt2_encoding().decode(tokens.tolist()) == LINES and tokens.max() == 257
    assert np.log(r["valid"]["perplexity_per_word"]) == pytest.approx(
        r["valid"]["loss"] * (len(tokens) - 1) / len(LINES.split()))
    result(TINY, "--data d --overwrite")
    assert (cached / "train.bin").stat().st_mtime_ns == before
    (cached / "meta.json").unlink()                         # killed before this, which comes last
    result(TINY, "--data d --overwrite")
    assert (cached / "train.bin").stat().st_mtime_ns != before


def test_folder_of_bins(small_bpe):
    ids = np.random.default_rng(0).integers(0, 258, 1000)
    command = write_bins(ids.astype(np.uint16), tokenizer="gpt2", vocab_size=258,
                         valid={"words": 200, "bytes": 4000, "source": "a wiki"})
    r = result(command)
    assert r["config"]["vocab_size"] == 258 and "bits_per_byte" in r["valid"]
    write_bins((ids + 60000).astype(np.uint32), tokenizer="x", vocab_size=70000, dtype="uint32")
    assert (tasks.load_data(options(data="d")).splits["train"] == ids + 60000).all()
    write_bins(ids.astype(np.uint32), tokenizer="x", vocab_size=258)        # names no dtype
    assert "every second token is 0" in failure(command)
    write_bins(ids.astype(np.uint16), tokenizer="x", vocab_size=258)
    Path("d/valid.bin").write_bytes(b"")
    assert "has 0 tokens" in failure(command)
    Path("d/valid.bin").write_bytes(bytes(1001))
    assert "ends within a token" in failure(command)
    assert "holds tokens of x, not bytes" in failure(command, "--tokenizer bytes")
    Path("d/meta.json").unlink()
    assert "meta.json" in failure(command)


@pytest.mark.parametrize("meta, words", [
    (dict(vocab_size=256), "vocabulary ends at 255"),
    (dict(dtype="float32"), "meta.json"), (dict(dtype=["uint16"]), "meta.json"),
    (dict(vocab_size="many"), "meta.json"),
    (dict(vocab_size=float("inf")), "meta.json"),
    (dict(valid=5), "meta.json"), (dict(valid={"words": "many"}), "meta.json"),
    (["x"], "meta.json"), ({}, "meta.json"),
])
def test_meta_json_that_does_not_fit(meta, words):
    command = write_bins(np.arange(258, dtype=np.uint16))
    if meta and isinstance(meta, dict):
        meta = dict(tokenizer="x", vocab_size=300) | meta
    Path("d/meta.json").write_text(json.dumps(meta))
    assert words in failure(command) and not Path("p").exists()


def test_where_the_gap_between_two_runs_sits(monkeypatch, capsys):
    x = np.random.default_rng(0).integers(0, 3, (2, 40))
    for row, lengths in zip(x, gap.repeated(x)):
        for i, n in enumerate(lengths):
            assert n == max((k for j in range(i) for k in range(1, j + 2)
                             if (row[j - k + 1:j + 1] == row[i - k + 1:i + 1]).all()), default=0)
    loss = [result(SHAPE, f"--steps 6 --attention {name} --out {name}")["valid"]["loss"]
            for name in ("softmax", "hedgehog")]
    monkeypatch.setattr(sys, "argv", ["gap.py", "softmax", "hedgehog"])
    gap.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line["softmax"], line["other"]] == pytest.approx(loss, rel=1e-5)
    assert line["command"] == "python gap.py softmax hedgehog"
    for groups in line["gap"].values():
        for key, total in (("softmax", loss[0]), ("other", loss[1])):
            assert sum(g["tokens"] * g[key] for g in groups) == pytest.approx(total, rel=1e-3)
        assert sum(g["share_of_gap"] for g in groups) == pytest.approx(1, abs=1e-3)


def test_stdlib():
    code, out, _ = run(SHAPE, "--data stdlib --out o --steps 2 --eval-every 2 --block-size 64 "
                       "--micro-batch 64")
    assert code == 0 and "stdlib-3" in out
    a, b = (tasks.read_stdlib() for _ in range(2))
    assert a == b
    assert len(a["train"]) > 10 * len(a["valid"]) and len(a["valid"]) > 50_000
    assert len(a["test"]) > 50_000


def test_stdlib_splits_by_module(monkeypatch):
    for i in range(200):
        for name in ("one", "two"):
            Path(f"lib/m{i}").mkdir(parents=True, exist_ok=True)
            Path(f"lib/m{i}/{name}.py").write_text(f"<m{i}>")
    for name in ("encodings/cp1.py", "m1/tests/test.py", "_sysconfigdata_x.py"):
        Path("lib", name).parent.mkdir(exist_ok=True)
        Path("lib", name).write_text("<left out>")
    monkeypatch.setattr(tasks.sysconfig, "get_paths", lambda: {"stdlib": "lib"})
    splits = tasks.read_stdlib()
    assert all(len(text) > 30 for text in splits.values())
    for i in range(200):
        counts = sorted(text.count(f"<m{i}>".encode()) for text in splits.values())
        assert counts == [0, 0, 2]
    assert b"left out" not in b"".join(splits.values())


def test_recall_task():
    data = tasks.Recall(63)
    x, y = data.batch("train", [0, 1, 2])
    for keys_values, targets in zip(x.tolist(), y.tolist()):
        table = {}
        for t in range(0, 63, 2):
            key = keys_values[t]
            assert 0 <= key < 16 and targets[t] == table.get(key, -1)
            if t + 1 < 63:
                assert targets[t + 1] == -1
                assert table.setdefault(key, keys_values[t + 1]) == keys_values[t + 1]
    _, y = data.batch("valid", range(100))
    assert (y[:, :-1] == -1).all() and (y[:, -1] >= 16).all()
    assert not np.array_equal(data.splits["valid"], data.splits["test"])


@pytest.mark.parametrize("attention", ["softmax", *FEATURE_MAPS])
def test_recall_with_every_attention(few_recall, attention):
    assert 0 <= result(RECALL, "--steps 2 --attention", attention)["test"]["accuracy"] <= 1


def test_recall_is_learned(monkeypatch):
    monkeypatch.setattr(tasks.Recall, "keys", 2)
    monkeypatch.setattr(tasks.Recall, "vocab_size", 4)
    r = result("--data recall --out o --steps 400 --block-size 9 --n-head 2 --lr 3e-3")
    assert r["test"]["accuracy"] > 0.9                      # guessing is right half of the time


# --- WikiText-103's download ----------------------------------------------------------------------


@pytest.fixture
def wikitext(monkeypatch):
    """A small zip with the real one's layout behind a local server: /whole, /cut, /missing."""
    with zipfile.ZipFile("w.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for split in tasks.SPLITS:
            z.writestr(f"wikitext-103-raw/wiki.{split}.raw", LINES)
    whole = Path("w.zip").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing" or "urllib" in self.headers["User-Agent"].lower():
                return self.send_error(403)
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            damaged = whole[:100] + bytes(50) + whole[150:]     # in the first file's data
            self.wfile.write({"/cut": whole[:100], "/damaged": damaged}.get(self.path, whole))

        def log_message(self, *args):
            pass

    def use(*paths):
        urls = [f"http://127.0.0.1:{server.server_port}/{path}" for path in paths]
        monkeypatch.setattr(tasks, "WIKITEXT_URLS", urls)
        return f"{TINY} --data wikitext103"

    monkeypatch.setattr(tasks, "WIKITEXT_LINES", dict.fromkeys(tasks.SPLITS, 400))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield use
        server.shutdown()


@pytest.mark.parametrize("first", ["missing", "cut"])
def test_wikitext_from_the_second_mirror(wikitext, small_bpe, first):
    r = result(wikitext(first, "whole"))
    assert r["data"] == "wikitext-103-raw" and r["tokenizer"] == "gpt2"
    result(wikitext("missing"), "--overwrite")              # what is there is not fetched again
    assert not list(Path("data").rglob("*.part*"))


def test_wikitext_not_to_be_had(wikitext):
    for path in ("missing", "cut", "damaged"):
        line = failure(wikitext(path))
        assert "put the zip at data/wikitext-103-raw-v1.zip" in line and "--data stdlib" in line
    assert not Path("o").exists()


def test_wikitext_zip_that_is_there(wikitext, small_bpe):
    Path("data").mkdir()
    Path("w.zip").rename("data/wikitext-103-raw-v1.zip")
    result(wikitext("missing"))
    with open("data/wikitext-103-raw/wiki.valid.raw", "a") as f:
        f.write("one more\n")
    assert "has not 400 lines" in failure(wikitext("missing"), "--overwrite")


# --- stopping and going on ------------------------------------------------------------------------


def start(*args, **kwargs):
    command = [sys.executable, train_lm.__file__, *shlex.split(" ".join(args))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **kwargs)


def ctrl_c_in(monkeypatch, name, call):
    """Ctrl-C is pressed at the start of this call (from 0) of a function of train_lm.py."""
    real, calls = getattr(train_lm, name), []

    def spy(*args):
        calls.append(args)
        if len(calls) == call + 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(train_lm, name, spy)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_as_if_it_never_was(number):
    """To the last bit of the log and the weights."""
    result(LONG, "--out whole")
    process = start(LONG, "--out o")
    while not Path("o/log.jsonl").exists() or Path("o/log.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate()
    assert not Path("o/result.json").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert out.endswith("to go on: python train_lm.py --resume --out o\n")
    with open("o/log.jsonl", "a") as f:                     # logged, but not in the checkpoint
        f.write(json.dumps({"step": 59, "train_loss": 0.0}) + '\n{"step": 60, "tr')
    Path("o/checkpoint.pt.part-1").write_bytes(b"killed while saving")
    result("--out o --resume")
    assert log("o") == log("whole") and not list(Path("o").glob("*.part*"))
    a, b = (train_lm.load_checkpoint(out)["model"] for out in ("whole", "o"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_run_at_a_time_writes_to_a_folder():
    process = start(LONG, "--out o")
    while not Path("o/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for more in ("--resume", "--overwrite"):
        assert "another process is writing to o" in failure(LONG, "--out o", more)
    process.kill()
    process.communicate()
    result("--out o --resume")                              # a killed one is in nobody's way


def test_the_first_step_does_not_count_for_the_speed(monkeypatch):
    real = train_lm.take_step

    def step(model, optimizer, task, step, *args):
        time.sleep(2.0 if step == 0 else 0.0)               # as if it compiled
        return real(model, optimizer, task, step, *args)

    monkeypatch.setattr(train_lm, "take_step", step)
    r = result(f"{TINY} --data text.txt --steps 4")
    assert r["tokens_per_second"] * r["seconds"] > 1.2 * r["tokens"]
    more = result("--resume --steps 6 --out o")
    assert more["seconds"] >= r["seconds"] and more["tokens_per_second"] > 0


@pytest.mark.parametrize("name, call", [("take_step", 13), ("evaluate", 0), ("evaluate", 2)])
def test_ctrl_c_anywhere_changes_nothing(monkeypatch, name, call):
    """In a step, in a validation and in the test, which --resume does first then."""
    command = f"{LONG} --steps 20 --eval-every 10"
    whole = result(command, "--out whole")
    ctrl_c_in(monkeypatch, name, call)
    assert run(command, "--out o")[0] == 130 and not Path("o/result.json").exists()
    assert len(log("o")) == {0: 0, 13: 1, 2: 2}[call]
    r = result("--out o --resume")
    assert log("o") == log("whole") and r["test"] == whole["test"]


def test_overwritten_is_gone_even_if_the_new_run_is_killed(monkeypatch):
    """Otherwise --resume would go on with the old one."""
    result(TINY)
    with monkeypatch.context() as m:
        m.setattr(train_lm, "take_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(TINY, "--overwrite --seed 1")
    assert not Path("o/result.json").exists()
    assert "no checkpoint" in failure("--out o --resume")


def test_an_interrupted_evaluation_ends_after_a_batch(monkeypatch):
    o, batches = options(micro_batch=4), []
    data = tasks.load_data(o)
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda *args: batches.append(args) or batch(*args))
    assert train_lm.evaluate(small_gpt(), data, "valid", o, [True]) is None and len(batches) == 1
    assert train_lm.evaluate(small_gpt(), data, "valid", o, []) and len(batches) > 4


def test_the_second_ctrl_c_ends_at_once():
    interrupted = train_lm.note_interrupts()
    signal.raise_signal(signal.SIGINT)
    assert interrupted
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_after_training_ctrl_c_is_pythons_own():
    train_lm.train(options(steps=1, out="o"), tasks.load_data(options()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_to_the_step_where_ctrl_c_came(monkeypatch):
    """Its figures are the last step's, not those of the last evaluation."""
    ctrl_c_in(monkeypatch, "take_step", 4)
    assert run(TINY, "--eval-every 3")[0] == 130
    r = result("--out o --resume --steps 5")
    assert [line["step"] for line in log("o")] == [3, 5]
    model, data = train_lm.load_model("o", "cpu")[0], tasks.load_data(options())
    assert r["valid"] == log("o")[-1]["valid"] == train_lm.evaluate(
        model, data, "valid", options(micro_batch=2))


def test_resume_to_a_step_before_the_checkpoint(monkeypatch):
    ctrl_c_in(monkeypatch, "take_step", 4)
    run(TINY, "--eval-every 3")
    assert "--steps 4" in failure("--out o --resume --steps 4")


def test_resumed_options():
    """What may change is applied, what may not is refused by name, the rest is the checkpoint's."""
    result(TINY)
    for args, words in (("--n-layer 2", "--n-layer 2: the run to --resume has 1"),
                        ("--tokenizer bytes", "has its default"), ("--overwrite", "one of them"),
                        ("--seed 1", "--seed 1"), ("--attention elu", "has hedgehog"),
                        ("--data-dir x --steps 6", "is finished"),
                        ("--steps 5", "--steps 5: o is at step 6 already")):
        assert words in failure("--out o --resume", args)
    r = result("--out o --resume --steps 9 --lr 0.01 --warmup 0.5 --n-head 2")
    state = train_lm.load_checkpoint("o")
    assert r["steps"] == 9 and state["options"]["lr"] == 0.01
    assert state["options"]["data"] == "text.txt"
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates == [pytest.approx(train_lm.learning_rate(8, 9, 0.01, 0.5))] * 2
    assert [line["step"] for line in log("o")] == [2, 4, 6, 8, 9]
    Path("o").rename("renamed")                             # text and run have moved
    Path("moved").mkdir()
    Path("text.txt").rename("moved/text.txt")
    assert result("--out renamed --resume --steps 10 --data moved/text.txt")["steps"] == 10
    assert not Path("o").exists()
    Path("moved/text.txt").write_text(LINES.replace("line", "row"))     # another one of this name
    assert "is not the text" in failure("--out renamed --resume --steps 12")


def test_files_of_others_stay():
    Path("o").mkdir()
    Path("o/holiday.part-1").write_text("x")
    Path("o/log.jsonl").write_text('{"mine": 1}\n')
    assert "holds a run already" in failure(TINY)
    assert Path("o/log.jsonl").read_text() == '{"mine": 1}\n'
    result(TINY, "--overwrite")
    assert Path("o/holiday.part-1").exists()


def test_exchanged_splits_are_another_text():
    Path("d").mkdir()
    for split in tasks.SPLITS:
        Path(f"d/{split}.txt").write_text(LINES.replace("line", split))
    result(SHAPE, "--data d --out o --steps 2")
    Path("d/valid.txt").rename("d/x")
    Path("d/test.txt").rename("d/valid.txt")
    Path("d/x").rename("d/test.txt")
    assert "is not the text" in failure("--out o --resume --steps 4")


def test_a_resumed_run_computes_as_before():
    """In its precision, unless it moves to another kind of device."""
    result(TINY, "--precision bf16")
    values, given = dict(preset="tiny"), dict(resume=True, out="o")
    assert train_lm.resumed(values, given)["precision"] == "bf16"
    assert "precision" not in train_lm.resumed(values, given | dict(device="cuda"))
    result("--resume --out o --steps 8")
    assert train_lm.load_checkpoint("o")["options"]["precision"] == "bf16"


def test_a_run_and_a_resumed_one_have_the_weight_decay_given():
    for args, decay in ((TINY, 0.3), ("--out o --resume --steps 9", 0.5)):
        result(args, f"--weight-decay {decay}")
        groups = train_lm.load_checkpoint("o")["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [decay, 0.0]


def test_checkpoint_errors():
    result(TINY)
    before = Path("o/checkpoint.pt").read_bytes()
    assert "--overwrite" in failure(TINY)
    assert Path("o/checkpoint.pt").read_bytes() == before
    assert "no checkpoint" in failure(TINY, "--out p --resume")
    state = torch.load("o/checkpoint.pt")
    state["model"] = {f"_orig_mod.{name}": x for name, x in state["model"].items()}
    torch.save(state, "o/checkpoint.pt")
    for args in ("--sample x", "--resume --steps 9"):
        assert "other weights" in failure("--out o", args)
    state["config"]["attention"] = "gone"
    torch.save(state, "o/checkpoint.pt")
    assert "o/checkpoint.pt: attention 'gone' is not one of" in failure("--out o --sample x")
    Path("o/checkpoint.pt").write_bytes(before[:len(before) // 2])
    assert "o/checkpoint.pt is cut off" in failure(TINY, "--resume")


def test_full_disk_keeps_the_checkpoint_before():
    """A limit on file size fails a write as a full disk does."""
    result(TINY)
    before = Path("o/checkpoint.pt").read_bytes()
    process = start("--out o --steps 8 --resume", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2)))
    _, err = process.communicate()
    assert process.returncode == 2 and "cannot write o/checkpoint.pt" in err.splitlines()[-1]
    assert Path("o/checkpoint.pt").read_bytes() == before
    assert not list(Path("o").glob("*.part*"))


def test_a_checkpoint_is_renamed_into_place(tmp_path):
    """Not written over: a kill in the middle of that would leave half a file."""
    path = tmp_path / "checkpoint.pt"
    tasks.write_whole(path, lambda f: torch.save({"step": 1}, f))
    with open(path, "rb") as first:
        tasks.write_whole(path, lambda f: torch.save({"step": 2}, f))
        assert torch.load(first)["step"] == 1               # the first file is as it was
    assert torch.load(path)["step"] == 2


# --- the sample -----------------------------------------------------------------------------------


def test_sample_from_a_checkpoint():
    result(TINY)

    def text(*args):
        code, out, _ = run("--out o --sample 'line 7' --sample-tokens 5", *args)
        assert code == 0 and out.startswith("[line 7]")
        return out.rsplit("\n\n", 1)[0]
    assert text() == text() and text("--temperature 0") == text("--top-k 1")
    assert text("--temperature 1e-300") == text("--temperature 0")
    assert text("--top-k 1000") == text("--top-k 256")      # there are no more
    assert len({text(), text("--temperature 0"), text("--seed 1")}) == 3
    assert "of 16 tokens cannot be continued" in failure("--out o --sample", "x" * 16)
    assert "of 0 tokens cannot be continued" in failure("--out o --sample ''")
    assert "surrogates" in failure("--out o --sample \udcff")


def test_what_is_said_of_a_sample():
    """Its length, and bytes: 2 heads with S (16, 8) and z (16), or k and v of width 16 a token."""
    result(TINY, "--position rotary")
    out = run("--out o --sample 'line 7' --sample-tokens 20")[1]
    assert "\n20 tokens after" in out and "the text beyond is longer" in out
    assert f"the state is {4 * 2 * 16 * (8 + 1):,} bytes" in out
    assert f"softmax's cache would be {4 * 2 * 16 * (6 + 20):,} bytes" in out
    out = run("--out o --sample 'line 7' --sample-tokens 10")[1]
    assert "\n10 tokens after" in out and "the text beyond" not in out
    assert "\n10 tokens after" in run("--out o --sample 'line 7' --sample-tokens 0")[1]


def test_a_recall_model_has_no_text(few_recall):
    code, out, _ = run(RECALL, "--steps 1")
    assert code == 0 and "prompt" not in out and Path("o/result.json").exists()
    assert "no text" in failure(RECALL, "--sample 'c 7'")


def test_a_sample_that_fails_costs_no_result(monkeypatch):
    def fails(*args):
        raise UnicodeEncodeError("charmap", "x", 0, 1, "no such character")
    monkeypatch.setattr(train_lm, "sample", fails)
    assert result(TINY) == json.loads(Path("o/result.json").read_text())


# --- the training ---------------------------------------------------------------------------------


def test_every_field_of_the_config_is_an_option_that_counts():
    given = dict(n_layer=2, n_head=1, n_embd=24, block_size=8, dropout=0.25, attention="t2r,elu",
                 position="rotary", feature_dim=9)
    config, known = ({f.name for f in fields(x)} for x in (GPTConfig, train_lm.Options))
    assert config & known == set(given)
    args = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    config = result(TINY, *args)["config"]
    assert {name: config[name] for name in given} == given


def test_a_preset_is_the_defaults_of_its_row():
    def parse(*args):
        return vars(train_lm.parse(train_lm.Options, train_lm.PRESETS, train_lm.preset_for,
                                   train_lm.resumed, "", args))
    for name, row in train_lm.PRESETS.items():
        given = dict(preset=name, n_head=7)
        assert parse("--preset", name, "--n-head", "7") == vars(train_lm.Options(**row | given))
    assert parse("--epochs", "2")["steps"] == 0 and parse("--data", "recall")["n_embd"] == 64
    assert parse("--device", "cuda")["preset"] == "gpt2" and parse()["preset"] == "tiny"


def test_a_hybrid_trains():
    code, out, _ = run(TINY, "--n-layer 2 --attention hedgehog,softmax")
    r = json.loads(out.splitlines()[-1])
    assert code == 0 and "the state is" not in out          # softmax's cache grows
    names = train_lm.load_checkpoint("o")["model"]
    assert r["attention"] == "hedgehog,softmax" and "blocks.0.attn.mix.feature_map.w_q" in names
    assert "blocks.1.attn.mix.feature_map.w_q" not in names


def test_batches_do_not_depend_on_where_a_run_was_cut():
    orders = [train_lm.example_order(step, 4, 10, seed=0) for step in range(5)]
    flat = sum(orders, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))    # each pass sees them all
    assert flat[:10] != flat[10:]


def test_data_smaller_than_a_batch():
    Path("text.txt").write_text(LINES[:400])                # 90 examples to train on
    result(TINY, "--block-size 4 --batch-size 256")


def test_the_recipe(monkeypatch):
    """Warm-up and cosine, AdamW's betas, decay of matrices, clipping, evaluation mode."""
    o = options(preset="gpt2")
    assert (o.warmup, o.weight_decay, o.grad_clip) == (0.02, 0.1, 1.0)
    rates = [train_lm.learning_rate(step, 100, 1.0, 0.1) for step in (0, 9, 10, 55, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1], abs=1e-3)
    data, model, norms = tasks.load_data(options()), small_gpt(dropout=0.5), {}
    optimizer = train_lm.adamw(model.parameter_groups(0.1), 1e-3)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0)):
        assert group["weight_decay"] == decay and group["params"]
        assert all((p.dim() == 2) == (decay > 0) for p in group["params"])
    for clip in (0.5, 0.0):
        monkeypatch.setattr(optimizer, "step", lambda: norms.update({clip: torch.stack(
            [p.grad.norm() for p in model.parameters()]).norm().item()}))
        o = options(batch_size=2, grad_clip=clip)
        train_lm.take_step(model, optimizer, data, 0, o, train_lm.backward_of(model, o))
    assert norms[0.5] == pytest.approx(0.5, rel=1e-4) and norms[0.0] > 0.6
    losses = {train_lm.evaluate(model, data, "valid", options())["loss"] for _ in range(2)}
    assert len(losses) == 1 and model.training              # and training goes on with it


def test_gradients_stay_where_a_graph_adds_to_them():
    data, model, o, places = tasks.load_data(options()), small_gpt(), options(batch_size=2), []
    optimizer, backward = train_lm.adamw(model.parameters(), 1e-3), train_lm.backward_of(model, o)
    for step in range(3):
        train_lm.take_step(model, optimizer, data, step, o, backward)
        places.append([p.grad.data_ptr() for p in model.parameters()])
        assert not any(p.grad.any() for p in model.parameters())
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize("compile, device, world, graph", [
    (True, "cuda", 1, True), (True, "cuda:1", 1, True), (False, "cuda", 1, False),
    (True, "cpu", 1, False), (True, "cuda", 2, False)])
def test_where_graphs_are_used(monkeypatch, compile, device, world, graph):
    monkeypatch.setattr(train_lm, "replayed", lambda function: "a graph")
    monkeypatch.setattr(train_lm, "world", lambda: world)
    o = SimpleNamespace(compile=compile, device=device)
    assert train_lm.with_graph("launched", o) == ("a graph" if graph else "launched")


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision(precision, dtype):
    data, model, o = tasks.load_data(options()), small_gpt(), options(precision=precision)
    optimizer, found = train_lm.adamw(model.parameters(), 1e-3), []
    model.blocks[0].attn.proj.register_forward_hook(lambda module, x, y: found.append(y.dtype))
    train_lm.take_step(model, optimizer, data, 0, o, train_lm.backward_of(model, o))
    train_lm.evaluate(model, data, "valid", o)
    assert len(found) > 1 and set(found) == {dtype}


def test_the_training_loss_is_the_mean_since_the_evaluation_before(monkeypatch):
    monkeypatch.setattr(train_lm, "take_step", lambda model, optimizer, data, step, *args: (
        torch.tensor(float(step))))
    result(TINY)
    assert [line["train_loss"] for line in log("o")] == [0.5, 2.5, 4.5]


def test_without_clipping_a_run_trains():
    result(TINY, "--grad-clip 0")
    assert log("o")[-1]["train_loss"] < log("o")[0]["train_loss"]


@pytest.mark.parametrize("every", [1, 2])
def test_weights_that_are_no_numbers_are_not_saved(every):
    """Neither where the loss shows it nor where the evaluation does first."""
    line = failure(SHAPE, f"--out o --steps 4 --lr 1000 --grad-clip 0 --eval-every {every} "
                   "--precision bf16 --weight-decay 1000")
    assert "is untouched" in line and not Path("o/result.json").exists()
    if Path("o/checkpoint.pt").exists():
        state = train_lm.load_checkpoint("o")
        assert all(torch.isfinite(x).all() for x in state["model"].values())
        assert math.isfinite(state["progress"]["valid"]["loss"])


def test_the_test_split_is_tested():
    r = result(TINY)
    model, data = train_lm.load_model("o", "cpu")[0], tasks.load_data(options())
    assert r["test"] == train_lm.evaluate(model, data, "test", options(micro_batch=2)) != r["valid"]


def test_epochs_are_passes_over_the_data():
    data = tasks.load_data(options())
    r = result(SHAPE, "--out o --epochs 0.5")
    assert r["steps"] == pytest.approx(0.5 * data.num_examples("train") / 4, abs=1)


def test_other_dropout_in_each_process(monkeypatch):
    data, seeds = tasks.load_data(options()), []
    monkeypatch.setattr(train_lm, "rank", lambda: 1)
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    train_lm.train(options(seed=7, steps=1, out="o"), data)
    assert seeds == [7, 8]                                  # of the weights, of the dropout


def test_training_is_compiled_on_a_gpu_or_if_asked(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    plain = result(TINY, "--out plain")
    assert not compiled
    assert result(TINY, "--compile")["valid"] == plain["valid"] and len(compiled) == 1
    assert options(device="cuda").compile


def test_activations_are_made_again_if_asked(monkeypatch):
    """Blocks run twice a training step then, and the result is the same."""
    forward, runs = Block.forward, []
    monkeypatch.setattr(Block, "forward", lambda *args: (
        runs.append(torch.is_grad_enabled()), forward(*args))[1])
    plain, once = result(TINY, "--out plain"), sum(runs)
    assert result(TINY, "--recompute")["valid"] == plain["valid"] and sum(runs) == 3 * once > 0


# Sequences of recall have different numbers of targets: micro-batches and processes weigh by these.
@pytest.mark.parametrize("args", ["", f"{RECALL} --batch-size 16 --micro-batch 4 --eval-every 6"])
def test_two_processes_give_the_losses_of_one(args):
    result(TINY, args, "--out one")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    train_lm.__file__, *f"{TINY} {args} --out two".split()], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    one, two = log("one"), log("two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(one, two):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["valid"] == pytest.approx(b["valid"], rel=1e-5)


def test_a_run_of_one_process_goes_on_with_two(monkeypatch):
    """The losses since the last evaluation count once."""
    result(TINY, "--eval-every 6 --out one")
    with monkeypatch.context() as patch:
        ctrl_c_in(patch, "take_step", 3)
        assert run(TINY, "--eval-every 6 --out two")[0] == 130
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    train_lm.__file__, "--resume", "--out", "two"], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    for a, b in zip(log("one"), log("two"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_when_one_process_of_two_is_killed_the_other_ends_in_one_line():
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                            train_lm.__file__, *f"{LONG} --steps 100000".split(), "--out", "o"],
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                           stdout=subprocess.DEVNULL, text=True)
    while not Path("o/checkpoint.pt").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    err = run.communicate(timeout=60)[1]
    assert "another process of this run has ended" in err or "SIGTERM" in err
    assert err.count("Traceback") <= 1 and "train_lm.py\", line" not in err     # torchrun's own


@pytest.mark.parametrize("args", ["", RECALL])
def test_accumulation_gives_the_losses_of_one_batch(few_recall, args):
    for size in "234":
        result(TINY, args, "--out", size, "--micro-batch", size)
    for other in "34":
        for a, b in zip(log("2"), log(other)):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, words", [
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--steps 0", "--steps"), ("--steps x", "--steps"), ("--lr -1", "--lr"),
    ("--epochs 0", "--steps 0"), ("--dropout 1", "dropout 1.0 is not"), ("--seed -1", "--seed"),
    ("--warmup 100", "--warmup"), ("--temperature inf", "--temperature"), ("--lr nan", "--lr"),
    ("--epochs inf", "--epochs"), ("--seed 18446744073709551616", "--seed"),
    ("--steps 99999999999999999999", "--steps"),
    ("--attention linear", "'linear' is not one of"), ("--preset huge", "not one of: tiny, small"),
    ("--steps 3 --epochs 2", "not both"),
    ("--n-head 3", "n_embd 16 is not a multiple of n_head 3"),
    ("--device tpu9", "--device tpu9"), ("--device meta", "--device meta"),
    ("--data nowhere", "nowhere is not stdlib, wikitext103 or recall"),
    ("--data recall --block-size 16", "must be odd"),
    ("--block-size 20000", "smaller --block-size"),
    ("--tokenizer gpt2", "TIKTOKEN_CACHE_DIR"),
    ("--data empty.txt", "train split has 0 tokens"), ("--data d", "found only train"),
])
def test_one_clear_line_and_exit_code_2(monkeypatch, args, words):
    def offline(name):
        raise ConnectionError
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    Path("empty.txt").write_text("")
    Path("d").mkdir()
    Path("d/train.txt").write_text(LINES)
    assert words in failure(SHAPE, args) and not list(Path(".").rglob("*.pt"))


def test_text_that_is_not_utf8(small_bpe):
    Path("text.txt").write_bytes(("café\n" * 400).encode("latin-1"))
    line = failure(TINY, "--tokenizer gpt2")
    assert "byte 3 is not UTF-8" in line and "--tokenizer bytes" in line
    result(TINY)


def test_ctrl_c_before_training(monkeypatch):
    ctrl_c_in(monkeypatch, "load_data", 0)
    code, _, err = run(TINY)
    assert code == 130 and err == "stopped\n"
