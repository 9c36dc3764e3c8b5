"""The tables of README.md and figures/README.md, made from the raw results in results.jsonl.

    python tests/tables.py      rewrites what is between <!-- table KIND DATA --> and <!-- end -->

A line of figures/results.jsonl is the OUT/result.json of a run of train_lm.py or distill.py, or the
last line that bench_generation.py or bench_training.py prints. KIND is a key of TABLES below. DATA,
if given, are the data sets that the table is about.

A gap is in nats per byte above softmax. Where the tokens are GPT-2's, and only there, it is also in
per cent of the perplexity per token. A conversion is compared with softmax that the same run
finetuned from the same teacher in as many steps; if it did not, "-" is printed.
"""

import json
import math
import re
import textwrap
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
OPTIONS = "--exp-temperature", "--feature-dim", "--qk-init"     # they are part of a row's name
STAGES = ("softmax, the teacher", "swapped", "stage 1", "stage 2", "softmax, finetuned",
          "from scratch")
# What is compared, the table, column and rows to take it from, and the paper's gap: perplexities
# of 20.8 for 18.6 and of 16.7 for 15.8, and about 4.5 bytes a token.
HEADLINE = [
    ("associative recall, % right", "scratch", "% right", {"data": "recall"}, "-"),
    ("from scratch, 124M on enwiki-88m (H200), perplexity per token", "scratch", "perplexity",
     {"data": "enwiki-88m"}, "0.025; 11.8 %"),
    ("from scratch, 0.9M on Python's source, 8,400 steps (CPU), perplexity per byte", "scratch",
     "perplexity", {"data": "stdlib-3.11.7", "steps": "8,400"}, "-"),
    ("the 124M model converted, softmax finetuned alike (H200), perplexity per token",
     "conversions", "stage 2", {"data": "enwiki-88m", "steps": "250 + 2,400"}, "0.012; 5.7 %"),
    ("0.9M converted, softmax finetuned alike (CPU), perplexity per byte", "conversions",
     "stage 2", {"data": "stdlib-3.11.7", "date": "2026-11-27"}, "-")]


def results(path=ROOT / "figures" / "results.jsonl"):
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(digits, *values):
    """The mean and, of several values, their standard deviation; "-" if a value is missing."""
    if None in values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def gap(loss, softmax_loss, data, lines):
    """The cells of a gap between two losses in nats per token; any of them may be missing."""
    nats = per_cent = None
    # Any model that was trained on the same data tells how many bytes a token has.
    trained = [r["valid"] for r in lines
               if r["data"] == data and "bits_per_byte" in r.get("valid", {})]
    if None not in (loss, softmax_loss) and trained:
        token_bytes = trained[0]["loss"] / (trained[0]["bits_per_byte"] * math.log(2))
        nats = (loss - softmax_loss) / token_bytes
        if token_bytes > 1.01:                  # it is 1 where the tokens are bytes
            per_cent = 100 * math.expm1(loss - softmax_loss)
    return {"nats per byte above softmax": number(3, nats), "% per token": number(1, per_cent)}


def scratch(chosen, lines):
    """A row for each model that was trained; of runs with the same seed the last one counts."""
    found = {}
    for r in chosen:
        options = [o for o in re.split(r" (?=--)", r["command"]) if o.startswith(OPTIONS)]
        key = r["data"], r["steps"], r["config"]["position"], " ".join([r["attention"], *options])
        found.setdefault(key, {})[r["seed"]] = r
    loss = {key: mean(r["valid"]["loss"] for r in found[key].values()) for key in found}
    rows = []
    for key in sorted(found, key=lambda key: (*key[:2], loss[key])):
        data, steps, position, attention = key
        runs = list(found[key].values())
        rows.append({
            "map": attention, "data": data, "positions": position, "steps": f"{steps:,}",
            "parameters": f"{runs[0]['parameters'] / 1e6:.1f} M", "seeds": str(len(runs)),
            "% right": number(1, *(100 * r["valid"]["accuracy"] for r in runs)),
            "perplexity": number(2, *(r["valid"].get("perplexity") for r in runs)),
            "of the test": number(2, *(r["test"].get("perplexity") for r in runs)),
            **gap(loss[key], loss.get((*key[:3], "softmax")), data, lines)})
    return rows


def conversions(chosen, lines):
    """A row for each map that distill.py put into a teacher; of runs on one day the last counts."""
    rows = {}
    for r in chosen:
        models, options = {}, r["options"]
        for row in r["rows"]:
            model, _, stage = row["name"].rpartition(", ")
            models.setdefault(model, {})[row["name"] if model == "softmax" else stage] = row
        softmax = models.pop("softmax")
        extra = [f" --{key.replace('_', '-')} {options[key]}" for key in ("feature_dim", "lora")
                 if options.get(key)]
        for model, own in models.items():
            found = {stage: (softmax | own).get(stage, {}) for stage in STAGES}
            ends = [found[stage].get("perplexity") for stage in ("stage 2", "softmax, finetuned")]
            first = f"{options['distill_steps']} + " if found["stage 1"] else ""
            row = {
                "map": "".join([model, *extra]), "data": r["data"], "date": r["date"],
                "steps": f"{first}{options['steps']:,}",
                **{stage: number(2, found[stage].get(r["figure"])) for stage in STAGES},
                **gap(*(x and math.log(x) for x in ends), r["data"], lines),
                **{key: ", ".join(number(digits, found[stage].get(key.lower())) for stage in stages)
                   for key, digits, stages in (("KL", 3, STAGES[1:4]), ("entropy", 2, STAGES[:4]),
                                               ("monotonicity", 2, STAGES[1:4]))}}
            rows[tuple(row.values())[:5]] = row     # map, data, date, steps, teacher
    return sorted(rows.values(), key=lambda row: (
        row["data"], float(row["softmax, the teacher"]), float(row["stage 2"])))


def training(chosen, lines):
    """A row for each context: tokens a second and the peak of memory of each model."""
    rows = {}
    for x in (x for r in chosen for x in r["training"]):
        row = rows.setdefault(x["context"], {"context": f"{x['context']:,}"})
        row |= {f"{x['model']}, tokens/s": f"{x['tokens_per_second']:,}",
                f"{x['model']}, GiB": f"{x['peak_memory_gib']:.1f}"}
    return [rows[key] for key in sorted(rows)]


def generation(chosen, lines):
    """A row for each model, number of sequences and context."""
    rows = {}
    for r, x in ((r, x) for r in chosen for x in r["generation"]):
        model = f"{r['model']} ({r['device']})"
        row = rows.setdefault((model, x["batch"], x["context"]), {
            "model": model, "sequences": str(x["batch"]), "context": f"{x['context']:,}"})
        row |= {f"{x['attention']}, tokens/s": f"{x['tokens_per_second']:,}",
                f"{x['attention']}, bytes a sequence": f"{x['bytes']:,}"}
    return [rows[key] for key in sorted(rows)]


def headline(chosen, lines):
    """Softmax and Hedgehog: rows of the other tables, beside the paper's gap."""
    rows = []
    for what, kind, column, values, paper in HEADLINE:
        make, fits = TABLES[kind]
        table = {row["map"]: row for row in make(list(filter(fits, lines)), lines)
                 if values.items() <= row.items()}
        hedgehog = table["hedgehog"]
        softmax = table.get("softmax", {column: hedgehog.get("softmax, finetuned")})
        rows.append({"": what, "softmax": softmax[column], "Hedgehog": hedgehog[column],
                     **{key: hedgehog[key] for key in gap(None, None, None, [])},
                     "the paper's gap": paper})
    return rows


# Kind of table -> what makes its rows, and whether a result is one of those that it is made of.
TABLES = {
    "headline": (headline, lambda r: True),
    "scratch": (scratch, lambda r: "valid" in r and r["steps"] >= 100),
    "training": (training, lambda r: "training" in r),
    "generation": (generation, lambda r: "generation" in r),
    "conversions": (conversions, lambda r: "rows" in r and "gguf" not in r["command"]
                    and r["options"].get("attention") != "softmax")}


def note(lines):
    """A sentence about the runs that a table was made of."""
    def together(key, between=", "):
        return between.join(sorted({r[key] for r in lines}))

    seconds = [r["seconds"] for r in lines]
    return textwrap.fill(
        f"These {len(lines)} runs took {min(seconds):,.0f} to {max(seconds):,.0f} seconds "
        f"({together('device', ' and ')}; torch {together('torch')}; {together('date')}).", 100)


def rewrite(text, lines):
    def table(match):
        kind, data = match.groups()
        make, fits = TABLES[kind]
        chosen = [r for r in lines if fits(r) and (not data or r["data"] in data.split())]
        rows = make(chosen, lines)
        head = [key for key in rows[0] if any(row.get(key, "-") != "-" for row in rows)]
        align = ["---"] + ["--:"] * (len(head) - 1)
        cells = [head, align, *([row.get(key, "-") for key in head] for row in rows)]
        body = ["| " + " | ".join(line) + " |" for line in cells]
        if kind != "headline":
            body += ["", note(chosen)]
        return "\n".join([f"<!-- table {kind}{data} -->", *body, "<!-- end -->"])

    return re.sub(r"<!-- table (\w+)(.*?) -->.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    for path in (ROOT / "README.md", ROOT / "figures" / "README.md"):
        path.write_text(rewrite(path.read_text(), results()))
