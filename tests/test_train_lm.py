"""train_lm.py from its command line: every kind of data, resuming, several processes, errors."""

import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import train_lm
from hedgehog import FEATURE_MAPS

SCRIPT = Path(train_lm.__file__)
SHAPE = ("--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 "
         "--micro-batch 2 --position learned").split()
TINY = [*SHAPE, *"--steps 6 --eval-every 2 --sample-tokens 5".split()]
LINES = "".join(f"line {i} of {i * i % 97} words\n" for i in range(400))


@pytest.fixture(autouse=True)
def on_a_cpu_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")          # for the processes that tests start


@pytest.fixture
def text():
    Path("text.txt").write_text(LINES)
    return "text.txt"


@pytest.fixture
def small_bpe(monkeypatch):
    """A real tiktoken encoding that needs no download: the 256 bytes and two merges."""
    ranks = {bytes([i]): i for i in range(256)} | {b"li": 256, b"ne": 257}
    encoding = tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                                 special_tokens={})
    monkeypatch.setattr(train_lm, "gpt2_encoding", lambda: encoding)


def run(capsys, *args):
    """Runs main; returns the exit code, standard output and standard error."""
    capsys.readouterr()
    try:
        code = train_lm.main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def result(capsys, *args):
    code, out, err = run(capsys, *args)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def failure(capsys, *args):
    """The one line that a user error prints."""
    code, out, err = run(capsys, *args)
    assert code == 2
    line = err.splitlines()[-1]
    assert "error: " in line and len([x for x in err.splitlines() if "rror" in x]) == 1
    return line


def options(**more):
    return train_lm.Options(**dict(dict(device="cpu", precision="fp32", compile=False,
                                        block_size=16), **more))


def log(out):
    """The log without the times."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# --- data -----------------------------------------------------------------------------------------


def test_text_file(capsys, text):
    code, out, err = run(capsys, "--data", text, "--out", "o", *TINY)
    assert code == 0 and "train: 100%" in err
    assert "the [prompt]" in out and "softmax's cache would be" in out
    r = json.loads(out.splitlines()[-1])
    assert r == json.loads(Path("o/result.json").read_text())
    assert r["tokens"] == 6 * 4 * 16 and r["steps"] == 6 and r["attention"] == "hedgehog"
    assert [line["step"] for line in log("o")] == [2, 4, 6]
    assert log("o")[-1]["valid"] == r["valid"]
    assert {"seconds", "tokens_per_second", "device", "torch", "seed", "test"} <= set(r)
    data = train_lm.load_data(options(data=text))
    assert b"".join(data.splits[s].tobytes() for s in train_lm.SPLITS) == LINES.encode()
    assert abs(len(data.splits["valid"]) / len(LINES) - 0.05) < 0.01


def test_figures_cover_the_whole_split(capsys, text):
    """Perplexity and bits per byte against a sum over the split token by token."""
    r = result(capsys, "--data", text, "--out", "o", *TINY)
    gpt, _ = train_lm.load_model("o", "cpu")
    tokens = train_lm.load_data(options(data=text)).splits["valid"].astype(np.int64)
    tokens, nats = torch.from_numpy(tokens), []
    for i in range(0, len(tokens) - 1, 16):
        window = tokens[i:i + 17]
        logits = gpt(window[None, :-1])[0][0].log_softmax(-1)
        nats += (-logits.gather(1, window[1:, None])).flatten().tolist()
    assert len(nats) == len(tokens) - 1
    assert r["valid"]["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert r["valid"]["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    assert r["valid"]["bits_per_byte"] == pytest.approx(sum(nats) / np.log(2) / len(tokens),
                                                        rel=1e-5)


@pytest.mark.parametrize("pattern", ["wiki.{}.raw", "wiki.{}.tokens", "{}.txt"])
def test_folder_of_text(capsys, small_bpe, pattern):
    Path("d").mkdir()
    for split in ("train", "valid"):                        # a test split is not needed
        (Path("d") / pattern.format(split)).write_text(LINES)
    r = result(capsys, "--data", "d", "--out", "o", *TINY)
    assert "test" not in r
    if pattern == "{}.txt":
        assert r["tokenizer"] == "bytes"
        return
    assert r["tokenizer"] == "gpt2" and "perplexity_per_word" in r["valid"]
    cached, = Path("data/tokens").iterdir()
    before = (cached / "train.bin").stat().st_mtime_ns
    tokens = np.fromfile(cached / "train.bin", np.uint16)
    assert train_lm.gpt2_encoding().decode(tokens.tolist()) == LINES and tokens.max() == 257
    words = r["valid"]["perplexity_per_word"]
    assert np.log(words) == pytest.approx(r["valid"]["loss"] * (len(tokens) - 1)
                                          / len(LINES.split()))
    result(capsys, "--data", "d", "--out", "o", "--overwrite", *TINY)
    assert (cached / "train.bin").stat().st_mtime_ns == before


def test_folder_of_bins(capsys, small_bpe):
    Path("d").mkdir()
    ids = np.random.default_rng(0).integers(0, 258, 1000)
    for split in ("train", "valid", "test"):
        ids.astype(np.uint16).tofile(f"d/{split}.bin")
    Path("d/meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 258,
                                               "valid": {"words": 200, "bytes": 4000}}))
    r = result(capsys, "--data", "d", "--out", "o", *TINY)
    assert r["config"]["vocab_size"] == 258 and "bits_per_byte" in r["valid"]
    Path("d/meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 256}))
    assert "vocabulary ends at 255" in failure(capsys, "--data", "d", "--out", "p", *TINY)
    for meta in ({"tokenizer": "x", "vocab_size": 300, "dtype": "float32"}, ["x"], {}):
        Path("d/meta.json").write_text(json.dumps(meta))
        assert "meta.json" in failure(capsys, "--data", "d", "--out", "p", *TINY)
    Path("d/meta.json").unlink()
    assert "meta.json" in failure(capsys, "--data", "d", "--out", "p", *TINY)
    Path("d/meta.json").write_text(json.dumps({"tokenizer": "x", "vocab_size": 70000,
                                               "dtype": "uint32"}))
    for split in ("train", "valid"):                        # as the file says, and not as uint16
        (ids + 60000).astype(np.uint32).tofile(f"d/{split}.bin")
    Path("d/test.bin").unlink()
    data = train_lm.load_data(options(data="d"))
    assert (data.splits["train"] == ids + 60000).all()
    Path("d/valid.bin").write_bytes(b"")
    assert "has 0 tokens" in failure(capsys, "--data", "d", "--out", "p", *TINY)


def test_stdlib(capsys):
    code, out, _ = run(capsys, "--data", "stdlib", "--out", "o", *SHAPE, "--steps", 2,
                       "--eval-every", 2, "--block-size", 64, "--micro-batch", 64)
    assert code == 0 and "stdlib-3" in out
    a, b = (train_lm.read_stdlib() for _ in range(2))
    assert a == b
    assert len(a["train"]) > 50 * len(a["valid"]) * 0.3 and len(a["test"]) > 10_000


def test_recall_task():
    data = train_lm.Recall(63)
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
def test_recall_with_every_attention(capsys, attention, monkeypatch):
    monkeypatch.setattr(train_lm.Recall, "sizes", {"train": 40, "valid": 20, "test": 20})
    r = result(capsys, "--data", "recall", "--attention", attention, "--out", "o", "--steps", 2,
               "--block-size", 15)
    assert 0 <= r["test"]["accuracy"] <= 1


def test_recall_is_learned(capsys, monkeypatch):
    monkeypatch.setattr(train_lm.Recall, "keys", 2)
    monkeypatch.setattr(train_lm.Recall, "vocab_size", 4)
    r = result(capsys, "--data", "recall", "--out", "o", "--steps", 400, "--block-size", 9,
               "--n-head", 2, "--lr", 3e-3)
    assert r["test"]["accuracy"] > 0.9               # guessing is right half of the time


# --- WikiText-103's download ----------------------------------------------------------------------


@pytest.fixture
def wikitext(monkeypatch):
    """A small zip with the real one's layout behind a local server: /whole, /cut, /missing."""
    with zipfile.ZipFile("w.zip", "w") as z:
        for split in train_lm.SPLITS:
            z.writestr(f"wikitext-103-raw/wiki.{split}.raw", LINES)
    whole = Path("w.zip").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing" or "urllib" in self.headers["User-Agent"].lower():
                return self.send_error(403)
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:100] if self.path == "/cut" else whole)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(train_lm, "WIKITEXT_LINES", dict.fromkeys(train_lm.SPLITS, 400))

    def use(*paths):
        urls = [f"http://127.0.0.1:{server.server_port}/{path}" for path in paths]
        monkeypatch.setattr(train_lm, "WIKITEXT_URLS", urls)
    yield use
    server.shutdown()


def test_wikitext_second_mirror(capsys, wikitext, small_bpe):
    wikitext("missing", "whole")
    r = result(capsys, "--data", "wikitext103", "--out", "o", *TINY)
    assert r["data"] == "wikitext-103-raw" and r["tokenizer"] == "gpt2"
    wikitext("missing")                                     # what is there is not fetched again
    result(capsys, "--data", "wikitext103", "--out", "o2", *TINY)
    assert not [p for p in Path("data").rglob("*.part*")]


@pytest.mark.parametrize("path", ["missing", "cut"])
def test_wikitext_not_to_be_had(capsys, wikitext, path):
    wikitext(path)
    line = failure(capsys, "--data", "wikitext103", "--out", "o", *TINY)
    assert "wikitext-103-raw-v1.zip" in line and "--data stdlib" in line and not Path("o").exists()


def test_wikitext_zip_that_is_there(capsys, wikitext, small_bpe):
    Path("data").mkdir()
    Path("w.zip").rename("data/wikitext-103-raw-v1.zip")
    wikitext("missing")
    result(capsys, "--data", "wikitext103", "--out", "o", *TINY)
    with open("data/wikitext-103-raw/wiki.valid.raw", "a") as f:
        f.write("one more\n")
    assert "has not 400 lines" in failure(capsys, "--data", "wikitext103", "--out", "p", *TINY)


def test_wikitext_broken_zip(capsys, wikitext):
    Path("data").mkdir()
    Path("data/wikitext-103-raw-v1.zip").write_bytes(b"PK no zip")
    assert "put the zip at" in failure(capsys, "--data", "wikitext103", "--out", "o", *TINY)


# --- stopping and going on ------------------------------------------------------------------------


def start(*args, **kwargs):
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for_lines(path, n, process):
    while not (Path(path).exists() and Path(path).read_text().count("\n") >= n):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


LONG = [*SHAPE, "--steps", "60", "--eval-every", "5", "--dropout", "0.1", "--data", "text.txt"]


def test_resume_after_kill_is_the_uninterrupted_run(capsys, text):
    result(capsys, *LONG, "--out", "whole")
    process = start(*LONG, "--out", "killed")
    wait_for_lines("killed/log.jsonl", 4, process)
    process.kill()
    process.wait()
    assert not Path("killed/result.json").exists()
    with open("killed/log.jsonl", "a") as f:                # logged, but not in the checkpoint
        f.write(json.dumps({"step": 59, "train_loss": 0.0}) + "\n")
    Path("killed/checkpoint.pt.part-1").write_bytes(b"killed while saving")
    result(capsys, "--out", "killed", "--resume")
    assert not list(Path("killed").glob("*.part*"))
    assert log("killed") == log("whole")                    # to the last bit
    a, b = (train_lm.load_checkpoint(out)["model"] for out in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ctrl_c_saves_and_says_how_to_go_on(capsys, text):
    result(capsys, *LONG, "--out", "whole")
    process = start(*LONG, "--out", "stopped")
    wait_for_lines("stopped/log.jsonl", 2, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    command = out.splitlines()[-1].split("to go on: python ")[1].split()
    assert command == ["train_lm.py", "--resume", "--out", "stopped"]
    assert start(*command[1:]).wait() == 0
    assert log("stopped") == log("whole")


@pytest.mark.parametrize("when", [0, 2])
def test_ctrl_c_in_an_evaluation(capsys, text, monkeypatch, when):
    """The evaluation at step 10 is done again after --resume, as in the uninterrupted run."""
    args = [*LONG, "--steps", "20", "--eval-every", "10"]
    result(capsys, *args, "--out", "whole")
    evaluate, calls = train_lm.evaluate, []

    def interrupted_at(model, task, split, o, interrupted=()):
        calls.append(split)
        if len(calls) == when + 1:
            interrupted.append(True)
        return evaluate(model, task, split, o, interrupted)

    monkeypatch.setattr(train_lm, "evaluate", interrupted_at)
    assert run(capsys, *args, "--out", "stopped")[0] == 130
    assert calls[-1] == ("valid" if when == 0 else "test")
    r = result(capsys, "--out", "stopped", "--resume")
    assert log("stopped") == log("whole") and r["test"]["loss"] > 0


def test_resumed_options(capsys, text):
    """What may change is applied, what may not is refused by name, the rest is the checkpoint's."""
    result(capsys, "--data", text, "--out", "o", *TINY)
    for args, words in (("--n-layer 2", "--n-layer 2: the run to --resume has 1"),
                        ("--seed 1", "--seed 1"), ("--attention elu", "has hedgehog"),
                        ("--steps 6", "is finished")):
        assert words in failure(capsys, "--out", "o", "--resume", *args.split())
    r = result(capsys, "--out", "o", "--resume", "--steps", 9, "--weight-decay", 0.5, "--n-head", 2)
    saved = train_lm.load_checkpoint("o")["options"]
    assert r["steps"] == 9 and saved["weight_decay"] == 0.5 and saved["data"] == text
    assert [line["step"] for line in log("o")] == [2, 4, 6, 8, 9]
    Path(text).write_text(LINES.replace("line", "row"))     # another text of the same name
    assert "is not the text" in failure(capsys, "--out", "o", "--resume", "--steps", 12)


def test_every_field_of_the_config_is_an_option_that_counts(capsys, text):
    given = dict(n_layer=2, n_head=1, n_embd=24, block_size=8, dropout=0.25, attention="t2r,elu",
                 position="rotary", feature_dim=9)
    config, options = ({f.name for f in fields(cls)} for cls in (train_lm.GPTConfig,
                                                                 train_lm.Options))
    assert config & options == set(given)
    args = [x for k, v in given.items() for x in ("--" + k.replace("_", "-"), v)]
    config = result(capsys, "--data", text, "--out", "o", *TINY, *args)["config"]
    assert {k: config[k] for k in given} == given


def test_batches_do_not_depend_on_where_a_run_was_cut():
    orders = [train_lm.example_order(step, 4, 10, seed=0) for step in range(5)]
    flat = sum(orders, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))    # each pass sees them all
    assert flat[:10] != flat[10:]


def test_checkpoint_errors(capsys, text):
    result(capsys, "--data", text, "--out", "o", *TINY)
    before = Path("o/checkpoint.pt").read_bytes()
    assert "--overwrite" in failure(capsys, "--data", text, "--out", "o", *TINY)
    assert Path("o/checkpoint.pt").read_bytes() == before
    Path("o/checkpoint.pt").write_bytes(before[:len(before) // 2])
    line = failure(capsys, "--data", text, "--out", "o", *TINY, "--resume")
    assert "o/checkpoint.pt is cut off" in line
    assert "no checkpoint" in failure(capsys, "--data", text, "--out", "p", *TINY, "--resume")


def test_full_disk_keeps_the_checkpoint_before(text):
    """A limit on file size fails a write as a full disk does."""
    base = [*TINY, "--data", text, "--out", "o"]
    assert start(*base).wait() == 0
    before = Path("o/checkpoint.pt").read_bytes()
    process = start("--out", "o", "--steps", 8, "--resume", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2)))
    _, err = process.communicate()
    assert process.returncode == 2 and "cannot write o/checkpoint.pt" in err.splitlines()[-1]
    assert Path("o/checkpoint.pt").read_bytes() == before
    assert not list(Path("o").glob("*.part*"))


def test_a_checkpoint_is_renamed_into_place(tmp_path):
    """Not written over: a kill in the middle of that would leave half a file."""
    path = tmp_path / "checkpoint.pt"
    train_lm.write_whole(path, lambda f: torch.save({"step": 1}, f))
    with open(path, "rb") as first:
        train_lm.write_whole(path, lambda f: torch.save({"step": 2}, f))
        assert torch.load(first)["step"] == 1               # the first file is as it was
    assert torch.load(path)["step"] == 2


def test_sample_from_a_checkpoint(capsys, text):
    result(capsys, "--data", text, "--out", "o", *TINY)
    code, out, _ = run(capsys, "--out", "o", "--sample", "line 7", "--sample-tokens", 5)
    assert code == 0 and out.startswith("[line 7]")
    again = run(capsys, "--out", "o", "--sample", "line 7", "--sample-tokens", 5)[1]
    assert again.splitlines()[0] == out.splitlines()[0]
    assert "from 1 to 15" in failure(capsys, "--out", "o", "--sample", "x" * 16)


# --- several processes, errors --------------------------------------------------------------------


def test_training_is_compiled_on_a_gpu_or_if_asked(capsys, text, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    args = ["--data", text, *TINY]
    plain = result(capsys, *args, "--out", "plain")
    assert not compiled
    assert result(capsys, *args, "--out", "fast", "--compile")["valid"] == plain["valid"]
    assert len(compiled) == 1
    assert options(device="cuda", compile=None).compile


def test_two_processes_give_the_losses_of_one(capsys, text):
    args = ["--data", text, *TINY]
    result(capsys, *args, "--out", "one")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", SCRIPT,
                    *args, "--out", "two"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                   capture_output=True)
    one, two = log("one"), log("two")
    assert [line["step"] for line in two] == [2, 4, 6]
    for a, b in zip(one, two):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["valid"] == pytest.approx(b["valid"], rel=1e-5)


@pytest.mark.parametrize("data", ["text", "recall"])
def test_accumulation_gives_the_losses_of_one_batch(capsys, text, data, monkeypatch):
    """In recall sequences have different numbers of targets: micro-batches weigh by these."""
    monkeypatch.setattr(train_lm.Recall, "sizes", {"train": 40, "valid": 20, "test": 20})
    args = (["--data", text, *TINY] if data == "text" else
            [*TINY, "--data", "recall", "--block-size", 15])
    result(capsys, *args, "--out", "one")
    result(capsys, *args, "--out", "two", "--micro-batch", 4)
    result(capsys, *args, "--out", "three", "--micro-batch", 3)
    for other in ("two", "three"):
        for a, b in zip(log("one"), log(other)):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_the_recipe(text):
    """AdamW's betas, decay of matrices only, clipping, warm-up and cosine, evaluation mode."""
    o = options(data=text, batch_size=2, grad_clip=0.5)
    data = train_lm.load_data(o)
    model = train_lm.GPT(train_lm.GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=2,
                                            n_embd=16, dropout=0.5))
    optimizer = train_lm.adamw(model.parameter_groups(0.1), 1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    norms = []
    for clip in (0.5, 0.0):
        step = optimizer.step
        optimizer.step = lambda: norms.append(torch.stack(
            [p.grad.norm() for p in model.parameters()]).norm().item())
        before = torch.random.get_rng_state()
        train_lm.take_step(model, optimizer, data, 0, options(data=text, batch_size=2,
                                                              grad_clip=clip))
        torch.random.set_rng_state(before)
        optimizer.step = step
    assert norms[0] == pytest.approx(0.5, rel=1e-4) and norms[1] > 0.6
    rates = [train_lm.learning_rate(step, 100, 1.0, 0.1) for step in (0, 9, 10, 55, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1], abs=1e-3)
    model.train()
    losses = {train_lm.evaluate(model, data, "valid", o)["loss"] for _ in range(2)}
    assert len(losses) == 1 and model.training              # no dropout, and on again


def test_without_clipping_a_run_trains(capsys, text):
    result(capsys, "--data", text, "--out", "o", *TINY, "--grad-clip", 0)
    assert log("o")[-1]["train_loss"] < log("o")[0]["train_loss"]


def test_a_sample_that_fails_costs_no_result(capsys, text, monkeypatch):
    def fails(*args):
        raise UnicodeEncodeError("charmap", "x", 0, 1, "no such character")
    monkeypatch.setattr(train_lm, "sample", fails)
    r = result(capsys, "--data", text, "--out", "o", *TINY)
    assert r == json.loads(Path("o/result.json").read_text())


def test_a_hybrid_trains(capsys, text):
    r = result(capsys, "--data", text, "--out", "o", *TINY, "--n-layer", 2, "--attention",
               "hedgehog,softmax")
    names = train_lm.load_checkpoint("o")["model"]
    assert r["attention"] == "hedgehog,softmax" and "blocks.0.attn.mix.feature_map.w_q" in names
    assert "blocks.1.attn.mix.feature_map.w_q" not in names


def test_text_that_is_not_utf8(capsys, small_bpe):
    Path("latin.txt").write_bytes(("café\n" * 400).encode("latin-1"))
    line = failure(capsys, "--data", "latin.txt", "--tokenizer", "gpt2", *TINY)
    assert "byte 3 is not UTF-8" in line and "--tokenizer bytes" in line
    result(capsys, "--data", "latin.txt", "--out", "o", *TINY)


@pytest.mark.parametrize("args, words", [
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--steps 0", "--steps"), ("--steps x", "--steps"), ("--lr -1", "--lr"),
    ("--epochs 0", "--steps 0"), ("--dropout 1", "dropout 1.0 is not"), ("--seed -1", "--seed"),
    ("--warmup 100", "--warmup"), ("--temperature inf", "--temperature"), ("--lr nan", "--lr"),
    ("--epochs inf", "--epochs"), ("--seed 18446744073709551616", "--seed"),
    ("--attention linear", "'linear' is not one of"), ("--preset huge", "--preset huge"),
    ("--steps 3 --epochs 2", "not both"),
    ("--n-head 3", "n_embd 16 is not a multiple of n_head 3"),
    ("--device tpu9", "--device tpu9"),
    ("--data nowhere", "nowhere is neither"),
    ("--data recall --block-size 16", "must be odd"),
    ("--block-size 20000", "smaller --block-size"),
    ("--tokenizer gpt2 --data text.txt", "TIKTOKEN_CACHE_DIR"),
])
def test_one_clear_line_and_exit_code_2(capsys, text, monkeypatch, args, words):
    def offline(name):
        raise ConnectionError
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert words in failure(capsys, "--data", text, *SHAPE, *args.split())
    assert not list(Path(".").rglob("*.pt"))


def test_empty_and_incomplete_data(capsys):
    Path("empty.txt").write_text("")
    assert "train split has 0 tokens" in failure(capsys, "--data", "empty.txt", *TINY)
    Path("d").mkdir()
    Path("d/train.txt").write_text(LINES)
    assert "found only train" in failure(capsys, "--data", "d", *TINY)


def test_a_recall_model_has_no_text(capsys):
    args = ["--data", "recall", "--block-size", 15, "--n-layer", 1, "--steps", 1, "--out", "o"]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "prompt" not in out
    assert "no text" in failure(capsys, "--data", "recall", "--out", "o", "--sample", "c 7")


def test_data_smaller_than_a_batch(capsys):
    Path("d").mkdir()
    for split in train_lm.SPLITS:
        (Path("d") / f"{split}.txt").write_text(LINES[:40])     # two examples, batches of four
    result(capsys, "--data", "d", "--out", "o", *TINY)


def test_text_without_line_ends_is_split_too():
    for text in ("x" * 1000, "y" * 880 + "\n" + "x" * 119):
        Path("one.txt").write_text(text)
        splits = train_lm.load_data(options(data="one.txt")).splits
        assert [len(splits[s]) for s in train_lm.SPLITS] == [900, 50, 50]


def test_what_used_to_be_a_traceback(capsys, text, monkeypatch):
    result(capsys, "--data", text, "--out", "o", *TINY)
    assert "--device meta" in failure(capsys, "--data", text, "--device", "meta", *TINY)
    assert "surrogates" in failure(capsys, "--out", "o", "--sample", "\udcff")
    state = torch.load("o/checkpoint.pt")
    state["model"] = {f"_orig_mod.{name}": x for name, x in state["model"].items()}
    torch.save(state, "o/checkpoint.pt")
    assert "other weights" in failure(capsys, "--out", "o", "--sample", "x")

    def interrupted(o):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_lm, "load_data", interrupted)
    assert run(capsys, "--data", text, "--out", "p", *TINY)[0] == 130
