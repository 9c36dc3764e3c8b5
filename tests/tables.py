"""The tables of README.md and tutorial.md, made from the raw results in figures/results.jsonl.

    python tests/tables.py      rewrites what stands between <!-- table KIND WORDS --> and <!-- end -->

A line of results.jsonl is what a run left in OUT/result.json, train_lm.py's or distill.py's. KIND is
recall, scratch or distill; WORDS, if any, choose the tables whose title has all of them.
"""

import json
import re
import shlex
import textwrap
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", ROOT / "tutorial.md"]
# The paper's, as transcribed; hedgehog's two are from memory of it. Perplexities: WikiText-103.
PAPER_RECALL = {"softmax": "100", "taylor": "100", "hedgehog": "100", "elu": "17", "performer": "17",
                "cosformer": "17", "exp --exp-temperature 2": "solves it"}
PAPER_PERPLEXITY = {"softmax": 18.6, "hedgehog": 20.8, "elu": 25.6, "performer": 26.8}
# Options that do not make another row: they are in the title, or change nothing or only the speed.
ALIKE = {"--attention", "--data", "--data-dir", "--tokenizer", "--preset", "--seed", "--steps",
         "--epochs", "--n-layer", "--n-embd", "--batch-size", "--micro-batch", "--eval-every",
         "--out", "--device", "--compile", "--resume", "--overwrite"}


def results(path=ROOT / "figures" / "results.jsonl"):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(kind, lines):
    """title -> Markdown."""
    groups = {}
    for r in lines:
        if "rows" in r:
            title = f"{r['data']}, {r['command']}" if kind == "distill" else None
        elif r.get("data") == "recall":
            title = "recall" if kind == "recall" else None
        else:
            c = r.get("config", {})
            title = (f"{r['data']}, {c['n_layer']} layers of width {c['n_embd']}, {r['steps']:,} "
                     f"steps of {r['tokens'] // r['steps']:,} tokens"
                     if kind == "scratch" and c else None)
        if title is not None:
            groups.setdefault(title, []).append(r)
    make = {"recall": recall, "scratch": scratch, "distill": distill}[kind]
    return {title: make(title, group) for title, group in groups.items()}


def runs(lines):
    """Attention, and options that make a difference -> its runs, the last one of each seed."""
    rows = {}
    for r in lines:
        words = re.split(r" (?=--)", r["command"])[1:]
        apart = [word for word in words if word.split()[0].split("=")[0] not in ALIKE]
        rows.setdefault(" ".join([r["attention"], *sorted(apart)]), {})[r["seed"]] = r
    return {name: list(by_seed.values()) for name, by_seed in rows.items()}


def spread(values, digits):
    values = list(values)
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def markdown(head, rows, note):
    align = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows)) + (
        "\n\n" + note)


def source(lines):
    """With what, on what and when the lines were made."""
    def together(key):
        return ", ".join(sorted({str(r[key]) for r in lines}))

    words = shlex.split(lines[-1]["command"])               # of a path only the name
    command = shlex.join(w.rsplit("/", 1)[1] if w.startswith(("/", "../")) else w for w in words)
    low, high = (round(f(r["seconds"] for r in lines)) for f in (min, max))
    which = "" if len(lines) == 1 else f" (one of {len(lines)} runs)"
    return textwrap.fill(
        f"Command `{command}`{which}; {low:,}{f' to {high:,}' if high > low else ''} seconds; "
            f"{together('device')}; torch {together('torch')}; data {together('data')}; seed "
            f"{together('seed')}; {together('date')}.", 100, break_on_hyphens=False)


def recall(title, lines):
    def paper(name):                                        # of a map, whatever its heads or rate
        return next((figure for options, figure in PAPER_RECALL.items()
                     if name.split()[0] != "exp" and options == name.split()[0]
                     or options == name), "")

    rows = [[name, f"{by[0]['steps']:,}", str(len(by)),
             spread((100 * r["valid"]["accuracy"] for r in by), 1), paper(name)]
            for name, by in runs(lines).items()]
    rows.sort(key=lambda row: -float(row[3].split()[0]))
    return markdown(["attention", "steps", "seeds", "recalled, %", "the paper"], rows, source(lines))


def scratch(title, lines):
    rows, by_name = [], runs(lines)

    def perplexity(name):
        return mean(r["valid"]["perplexity"] for r in by_name[name])

    for name, by in sorted(by_name.items(), key=lambda item: perplexity(item[0])):
        attention, _, options = name.partition(" ")
        same = f"softmax {options}".strip()
        base = same if same in by_name else "softmax"
        gap = f"{100 * (perplexity(name) / perplexity(base) - 1):.1f}" if base in by_name else "-"
        paper = PAPER_PERPLEXITY.get(attention)
        cells = [spread((r[split][key] for r in by), 1) if all(key in r.get(split, {}) for r in by)
                 else "-" for split in ("valid", "test")
                 for key in ("perplexity", "perplexity_per_word")]
        rows.append([name, f"{by[0]['parameters'] / 1e6:.1f} M", str(len(by)), *cells, gap,
                     "" if paper is None else f"{100 * (paper / 18.6 - 1):.1f}"])
    return f"**{title}**\n\n" + markdown(
        ["attention", "parameters", "seeds", "valid", "per word", "test", "per word",
         "above softmax, %", "in the paper, %"], rows, source(lines))


def distill(title, lines):
    r = lines[-1]
    keys = ("kl", "entropy_softmax", "entropy", "monotonicity")
    rows = [[row["name"], f"{row[r['figure']]:.2f}", *(f"{row[key]:.3f}" for key in keys)]
            for row in r["rows"]]
    return f"**{r['data']}**\n\n" + markdown(
        ["model", r["figure"], "KL", "entropy of softmax", "entropy", "monotonicity"], rows,
        source([r]))


def rewrite(text, lines):
    def table(match):
        made = tables(match[1], lines)
        chosen = [made[t] for t in made if all(word in t for word in match[2].split())]
        body = "\n\n".join(chosen) or "*Not measured yet.*"
        return f"<!-- table {match[1]}{match[2]} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\w+)(.*?) -->.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    for path in TEXTS:
        if path.exists():
            path.write_text(rewrite(path.read_text(), results()))
