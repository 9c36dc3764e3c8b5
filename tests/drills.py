"""Drills that take minutes: runs that are killed, and a fuzz of options and files.

    python tests/drills.py kill         20 kills at random moments; all end like an unbroken run
    python tests/drills.py fuzz 300     so many seconds of wrong options and damaged files

In a folder for the moment. The last line has the figures; the exit code is 1 if something is wrong.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import distill
import train_lm

SHAPE = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --micro-batch 2".split()
TEXT = "".join(f"line {i} of {i * i % 97} words\n" for i in range(400))


def kill():
    """kill -9 while training or saving, until 20 times; then the run may end."""
    Path("text.txt").write_text(TEXT)
    program, rng, kills = [sys.executable, ROOT / "train_lm.py"], random.Random(0), 0
    options = ["--data", "text.txt", *SHAPE, "--steps", "3000", "--eval-every", "10", "--dropout",
               "0.1", "--sample-tokens", "5"]
    subprocess.run([*program, *options, "--out", "whole"], check=True, capture_output=True)
    saved = Path("killed/checkpoint.pt")
    while kills < 20:
        before = saved.stat().st_mtime if saved.exists() else 0
        more = ["--resume"] if saved.exists() else options
        process = subprocess.Popen([*program, *more, "--out", "killed"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not saved.exists() or saved.stat().st_mtime == before:
            time.sleep(0.005)                               # until it trains
        time.sleep(0.4 * rng.random())
        kills += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run([*program, "--resume", "--out", "killed"], check=True, capture_output=True)
    logs = [[json.loads(line) | {"seconds": 0} for line in open(f"{out}/log.jsonl")]
            for out in ("whole", "killed")]
    a, b = (torch.load(f"{out}/checkpoint.pt")["model"] for out in ("whole", "killed"))
    same = logs[0] == logs[1] and all(torch.equal(a[name], b[name]) for name in a)
    print(f"kill: {kills} kills, log and weights {'the same' if same else 'DIFFERENT'}")
    return not same


# --- fuzz -----------------------------------------------------------------------------------------

NUMBERS = ["0", "-1", "1", "2", "3", "0.5", "1e-9", "1e9", "99999999999999999999", "nan", "inf",
           "-inf", "", "x", "1,2", "٣"]
WORDS = ["", "softmax", "hedgehog", "elu", "hedgehog,softmax", ",", "nowhere", "text.txt", "folder",
         "bins", "run", "run/checkpoint.pt", "tiny", "gpt2", "cpu", "meta", "cuda", "fp32", "bf16",
         "rotary", "recall", "listops", "glue", "/dev/null", "\0", "ä" * 300]


def run(program, argv):
    """Exit code and what was printed; an exception that gets out of main() is -1."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            signal.alarm(20)
            code = program.main(argv)
        except SystemExit as e:
            code = e.code
        except TimeoutError:
            code = "too long"
        except BaseException:
            code = -1
            traceback.print_exc()
        finally:
            signal.alarm(0)
    return code, out.getvalue()


def good_files(rng):
    """Everything that a command can be given, tiny and right."""
    Path("text.txt").write_text(TEXT)
    for folder in ("folder", "bins", "glue"):
        Path(folder).mkdir()
    for split in ("train", "valid"):
        Path(f"folder/{split}.txt").write_text(TEXT)
        np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16).tofile(f"bins/{split}.bin")
    Path("bins/meta.json").write_text('{"tokenizer": "own", "vocab_size": 256, "dtype": "uint16"}')
    rows = "".join(f"s\t{i % 2}\t\t{'good' if i % 2 else 'bad'} {i}\n" for i in range(20))
    for name in ("train.tsv", "dev.tsv"):
        Path("glue", name).write_text(rows)
    shutil.copytree("../run", "run")


def damage(path, rng):
    """Cuts a file, changes bytes of it, or puts another file in its place."""
    data = bytearray(path.read_bytes())
    how = rng.randrange(4)
    if how == 0:
        data = data[:rng.randrange(len(data) + 1)]
    elif how == 1:
        for _ in range(rng.choice([1, 10])):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == 2:
        others = [p for p in path.parent.iterdir() if p.is_file()]
        data = bytearray(rng.choice(others).read_bytes())
    path.write_bytes(rng.choice([data, b"[]", b"{}", b"\n"]) if how == 3 else data)


def command(rng):
    """A program and options: one that works, then some of them with other values."""
    program = rng.choice([train_lm, train_lm, distill])
    data = rng.choice(["text.txt", "folder", "bins"])
    argv = {"--data": data, "--out": rng.choice(["o", "run"]), "--steps": "2", "--device": "cpu",
            "--sample-tokens": "3", "--no-compile": None}
    argv |= dict(zip(SHAPE[::2], SHAPE[1::2]))
    if program is distill:
        argv |= {"--teacher": "run", "--distill-steps": "2", "--teacher-steps": "2"}
        argv |= rng.choice([{}, {}, {"--task": "glue"}, {"--analyze": "run"},
                            {"--task": "listops", "--listops-examples": "20"}])
    else:
        argv |= rng.choice([{}, {"--resume": None}, {"--overwrite": None}, {"--sample": "line"}])
    options = program.Options if program is distill else train_lm.Options
    possible = [f for f in fields(options) if f.name != "compile"]      # which takes minutes
    for f in rng.sample(possible, rng.choice([0, 1, 1, 2])):
        name = "--" + f.name.replace("_", "-")
        argv[name] = None if f.type is bool else rng.choice(
            WORDS if f.type is str else NUMBERS)
    return program, [word for item in argv.items() for word in item if word is not None]


def fuzz(seconds, seed=0):
    def too_long(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    rng, codes, found, outside = random.Random(seed), {}, {}, []
    code, out = run(train_lm, ["--data", "text.txt", *SHAPE, "--attention", "softmax", "--steps",
                               "2", "--device", "cpu", "--no-compile", "--out", "run"])
    assert code == 0, out
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shutil.rmtree("case", ignore_errors=True)
        Path("case").mkdir()
        os.chdir("case")
        good_files(rng)
        if rng.random() < 0.6:
            damage(rng.choice([p for p in Path().rglob("*") if p.is_file()]), rng)
        before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
        program, argv = command(rng)
        code, out = run(program, argv)
        codes[code] = codes.get(code, 0) + 1
        line = f"{program.__name__} {' '.join(argv)}"
        if code == -1:
            found.setdefault(out.strip().splitlines()[-1][:100], (line, out))
        own = {argv[i + 1] for i, word in enumerate(argv[:-1]) if word in ("--out", "--data-dir")}
        for path, data in before.items():
            if (not path.exists() or path.read_bytes() != data) and path.parts[0] not in {
                    Path(folder).parts[0] for folder in own if Path(folder).parts}:
                outside.append(f"{path} changed: {line}")
        os.chdir("..")
    for line, out in found.values():
        print(f"--- {line}\n{out[-1500:]}")
    print(*outside, sep="\n")
    print(f"fuzz: {sum(codes.values())} cases in {seconds} s, exit codes {codes}, "
          f"{len(found)} tracebacks, {len(outside)} files of others changed")
    return bool(found or outside)


if __name__ == "__main__":
    drill, *numbers = sys.argv[1:] or [""]
    if drill not in ("kill", "fuzz") or (drill == "kill" and numbers):
        sys.exit(__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("text.txt").write_text(TEXT)
        wrong = kill() if drill == "kill" else fuzz(*map(int, numbers))
        os.chdir("/")
    sys.exit(wrong)
