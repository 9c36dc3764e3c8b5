"""tutorial.md and README.md say what the code says: their blocks run, names exist, tables are made.

    python tests/test_tutorial.py       runs the blocks and puts their output into tutorial.md
"""

import ast
import builtins
import contextlib
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")          # before kernel.py is imported
import distill
import tables
import train_lm

TEXTS = ["tutorial.md", "README.md"]
SOURCES = ["kernel.py", "hedgehog.py", "train_lm.py", "distill.py"]
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


def test_blocks_print_what_is_shown(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                             # whatever a block wrote would stay here
    # A block sets this where it is not set yet; on a GPU's machine other tests must not see it.
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    text, threads = (ROOT / "tutorial.md").read_text(), torch.get_num_threads()
    try:
        blocks = list(outputs(text))
    finally:
        torch.set_num_threads(threads)                      # the first block wants one
    assert len(blocks) == text.count("```python") >= 9
    for line, expected, printed in blocks:
        assert printed == expected, f"tutorial.md, block at line {line}"
    assert not list(tmp_path.iterdir())


def test_quoted_lines_are_in_the_kernel():
    """Blocks marked py are lines of kernel.py, but for their comments."""
    code = [{line.split("#")[0].strip() for line in text.splitlines() if line.strip()} for text in (
        "".join(re.findall(r"^```py\n(.*?)^```$", (ROOT / "tutorial.md").read_text(), re.M | re.S)),
        (ROOT / "kernel.py").read_text())]
    assert code[0] and not code[0] - code[1]


def test_a_wrong_output_is_noticed():
    text = "```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n"
    assert [(a, b) for _, a, b in outputs(text)] == [("", ""), ("3\n", "2\n")]


# --- names ----------------------------------------------------------------------------------------


def options():
    """script -> its --options."""
    found = {file: set(re.findall(r'add_argument\("(--[a-z-]+)', (ROOT / file).read_text()))
             for file in ("kernel.py", "hedgehog.py")}
    for module in (train_lm, distill):
        with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
            module.parse_args(["--help"])
        found[Path(module.__file__).name] = set(re.findall(r"--[a-z-]+", text.getvalue()))
    return found


def vocabulary():
    """Every name in the sources: defined or used, or a string such as a map's or a key's."""
    names = {"python", "torch", "numpy", *dir(builtins), *dir(torch), *dir(torch.Tensor)}
    blocks = "".join(match[1] for match in BLOCK.finditer((ROOT / "tutorial.md").read_text()))
    for source in (*((ROOT / file).read_text() for file in SOURCES), blocks):
        for node in ast.walk(ast.parse(source)):
            names |= {str(getattr(node, key, "")) for key in ("id", "attr", "arg", "name")}
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= set(re.findall(r"\w+", node.value)) if len(node.value) < 30 else set()
    return names


def unknown(span, names, known):
    """What a piece of `inline code` names and the repository does not have."""
    source = "".join((ROOT / file).read_text() for file in SOURCES)
    script = re.search(r"\b(train_lm|distill|kernel|hedgehog)\.py", span)
    after = span[script.end():] if script else span
    for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", after):
        if not any(option in found for file, found in known.items()
                   if script is None or file == script[0]):
            yield option
    paths = re.findall(r"[\w./-]+\.(?:py|md|jsonl|json|png|pt)\b|[\w/-]+/(?!\S)", span)
    yield from (path for path in paths if not (ROOT / path).exists() and path not in source)
    if paths or span.startswith("--"):
        return
    if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", span):      # a name, perhaps dotted
        words = re.findall(r"\w+", span)
    else:                                                   # a formula: what is called or has a _
        words = re.findall(r"\b[A-Za-z]\w+(?=\()|\b[A-Za-z]\w*_\w\w+", span)
    yield from (word for word in words if word not in names)


def spans(text):
    """Inline code, outside of fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}


@pytest.mark.parametrize("file", TEXTS)
def test_names_exist(file):
    names, known = vocabulary(), options()
    missing = {span: list(unknown(span, names, known)) for span in spans((ROOT / file).read_text())}
    assert not {span: words for span, words in missing.items() if words}


def test_wrong_names_are_noticed():
    names, known = vocabulary(), options()
    for span in ("hedgehog_atention", "hedgehog_atention()", "Attention.wach", "--atention",
                 "python distill.py --resume", "python kernel.py --steps 3", "kernels.py",
                 "docs/", "featurs(x, w)", "figures/no.png"):
        assert list(unknown(span, names, known)), span
    for span in ("hedgehog_attention", "Attention.watch", "python train_lm.py --attention elu",
                 "torchrun --nproc_per_node=8 train_lm.py", "tests/", "x W", "S", "kernel.py"):
        assert not list(unknown(span, names, known)), span


@pytest.mark.parametrize("file", TEXTS)
def test_figures_and_links_exist(file):
    text = (ROOT / file).read_text()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (ROOT / path).exists(), path


def test_lines_fit():
    lines = (ROOT / "tutorial.md").read_text().splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", TEXTS)
def test_tables_are_those_of_the_results(file):
    text = (ROOT / file).read_text()
    assert tables.rewrite(text, tables.results()) == text, "run python tests/tables.py"


if __name__ == "__main__":
    path = ROOT / "tutorial.md"
    shown = iter([printed for _, _, printed in outputs(path.read_text())])

    def with_output(match):
        printed = next(shown)
        return f"```python\n{match[1]}```\n" + (f"```text\n{printed}```\n" if printed else "")

    path.write_text(BLOCK.sub(with_output, path.read_text()))
