"""The texts say what the code says: blocks run, quoted lines and names exist, tables are made.

    python tests/test_tutorial.py       runs the blocks and puts their output into tutorial.md
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")          # before kernel.py is imported
import distill
import tables

TEXTS = ["tutorial.md", "README.md", "figures/README.md"]
SOURCES = "".join((ROOT / f"{name}.py").read_text()
                  for name in ("linear", "kernel", "hedgehog", "gpt", "tasks", "command_line",
                               "train_lm", "analysis", "distill", "hf", "tests/bench_kernel",
                               "tests/bench_generation", "tests/bench_training", "tests/tables",
                               "tests/drills", "tests/gap", "tests/places"))
# A python block and, directly after it, what it prints, if anything.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*^```text\n(.*?)^```\n)?", re.M | re.S)


def outputs(text):
    """(line, expected, printed) of each python block, executed in order in one namespace."""
    namespace = {"__name__": "tutorial"}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        code = compile("\n" * (line - 1) + match[1], "tutorial.md", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        yield line, match[2] or "", printed.getvalue()


@pytest.mark.parametrize("file", ["tutorial.md", "README.md"])
def test_blocks_print_what_is_shown(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                             # whatever a block wrote would stay here
    # A block sets this where it is not set yet; on a GPU's machine other tests must not see it.
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    text, threads = (ROOT / file).read_text(), torch.get_num_threads()
    try:
        blocks = list(outputs(text))
    finally:
        torch.set_num_threads(threads)                      # the tutorial's first block wants one
    assert len(blocks) == text.count("```python") >= 1
    for line, expected, printed in blocks:
        if find_spec("triton") is None:                     # then blocks print less
            printed = printed.replace("no Triton here\n", "")
            expected = expected[:len(printed)]
        assert printed == expected, f"{file}, block at line {line}"
    assert not list(tmp_path.iterdir())


def test_a_wrong_output_is_noticed():
    text = "```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n"
    assert [(a, b) for _, a, b in outputs(text)] == [("", ""), ("3\n", "2\n")]


def missing(text):
    """The options, files and names in inline code that the repository does not have."""
    blocks = "".join(re.findall(r"^```python.*?^```$", text, flags=re.M | re.S))
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(distill.Options)}
    known |= {f"--no-{name[2:]}" for name in known} | {"--nproc_per_node", "--help"}
    known |= set(re.findall(r'add_argument\("(--[a-z-]+)', SOURCES))
    for span in (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)):
        for option in re.findall(r"(?<!\S)--[a-z][a-z_-]*", span):
            if option not in known:
                yield option
        for path in re.findall(r"(?<!\S)[\w./-]+\.(?:py|md|jsonl)\b", span):
            if not (ROOT / path).exists() and path not in SOURCES + "samsum.jsonl":
                yield path
        if re.fullmatch(r"[A-Za-z_][\w.]*_[\w.]*(\(\))?", span):        # a name with an underscore
            yield from (word for word in re.findall(r"\w+", span) if word not in SOURCES + blocks)


@pytest.mark.parametrize("file", TEXTS[:2])
def test_names_exist(file):
    assert not list(missing((ROOT / file).read_text()))


def test_wrong_names_are_noticed():
    wrong = ["--atention", "kernels.py", "hedgehog_atention", "Attention.wach_it"]
    assert all(list(missing(f"`{name}`")) for name in wrong)
    assert not list(missing("`--attention elu` `kernel.py` `hedgehog_attention` `x W`"))


@pytest.mark.parametrize("file", TEXTS)
def test_links_lines_and_tables(file):
    text = (ROOT / file).read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", prose):
        assert ((ROOT / file).parent / path).exists(), path
    assert not [x for x in text.splitlines() if len(x) > 100 and not x.startswith("|")]
    assert tables.rewrite(text, tables.results()) == text, "run python tests/tables.py"
    assert text.count("<!-- table ") == text.count("<!-- end -->"), "a table lost its first line"


if __name__ == "__main__":
    path = ROOT / "tutorial.md"
    shown = iter([printed for _, _, printed in outputs(path.read_text())])

    def with_output(match):
        printed = next(shown)
        return f"```python\n{match[1]}```\n" + (f"```text\n{printed}```\n" if printed else "")

    path.write_text(BLOCK.sub(with_output, path.read_text()))
