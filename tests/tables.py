"""The tables of README.md and figures/README.md, made from the raw results in results.jsonl.

    python tests/tables.py      rewrites what is between <!-- table KIND DATA --> and <!-- end -->
    python tests/tables.py --plot figures/curve.png     draws how the gap falls with training

A line of figures/results.jsonl is the OUT/result.json of a run of train_lm.py or distill.py, with
"edit" if that was not the code as it is, or the last line that distill.py --analyze, gap.py or a
bench_*.py prints. KIND is a key of TABLES below. DATA, if given, are the data sets that the table
is about.

A gap is in nats per byte above softmax, from scratch softmax at the best of its rates, over the
seeds that both have. Where the tokens are GPT-2's, and in SmolLM2's own table, it is also in per
cent of the perplexity per token. A conversion is compared with softmax that was finetuned from the
same teacher in as many steps on the same batches, at the best of the rates tried, or with the
teacher itself if that is better; if none was finetuned, "-" is printed. "batch" are the sequences
of a step, in "4 + 32" those of stages 1 and 2.
"""

import json
import math
import re
import sys
import textwrap
from pathlib import Path
from statistics import linear_regression, mean, stdev

ROOT = Path(__file__).parent.parent
OPTIONS = "--exp-temperature", "--feature-dim", "--qk-init"             # parts of a row's name
# Columns that go into the sentence under a table whose rows are alike in them.
SETTINGS = ("data", "positions", "heads", "contexts", "steps", "batch", "rate", "parameters",
            "seeds", "card")
STAGES = ("softmax, the teacher", "swapped", "stage 1", "stage 2", "softmax at best",
          "from scratch")
# What is compared, the table, column and rows to take it from, the map, and the paper's gap:
# perplexities of 20.8 for 18.6 and of 16.7 for 15.8, and about 4.5 bytes a token.
HEADLINE = [
    ("associative recall, % right", "scratch", "% right", {"data": "recall"},
     "hedgehog", "-"),
    ("from scratch, 30M on Wikipedia, 1,681 M tokens (H200), perplexity per token", "scratch",
     "perplexity", {"data": "enwiki-88m", "steps": "102,624"}, "hedgehog", "0.025; 11.8 %"),
    ("from scratch, 124M on Wikipedia, 600 M tokens (H200), perplexity per token", "scratch",
     "perplexity", {"data": "enwiki-88m", "steps": "18,312"}, "hedgehog", "0.025; 11.8 %"),
    ("SmolLM2-135M converted, W twice as wide, softmax finetuned as long (H200), "
     "perplexity per token of its own", "checkpoint", "stage 2", {"steps": "8,000 + 6,000"},
     "hedgehog --feature-dim 128", "0.012 (GPT-2)"),
    ("a 124M model of 176 M tokens converted, softmax finetuned as long (H200), "
     "perplexity per token",
     "conversions", "stage 2", {"data": "enwiki-88m", "batch": "4 + 32", "rate": "0.0006"},
     "hedgehog", "0.012; 5.7 %")]
# Of SmolLM2's tokens in the validation split, which no model here was trained on from scratch.
SMOLLM2_BYTES = 1436165 / 323236


def results(path=ROOT / "figures" / "results.jsonl"):
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(digits, *values):
    """The mean and, of several values, their standard deviation; "-" if a value is missing."""
    if None in values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def bytes_per_token(data, lines):
    """Any model that was trained on the data tells. None if there is none, or no bytes."""
    for r in lines:
        if r["data"] == data and "bits_per_byte" in r.get("valid", {}):
            return r["valid"]["loss"] / (r["valid"]["bits_per_byte"] * math.log(2))


def gap(losses, softmax_losses, token_bytes):
    """The cells of a gap between losses in nats per token, by seed; any of them may be missing."""
    if None in (*losses, *softmax_losses, token_bytes):
        return {"nats per byte above softmax": "-", "% per token": "-"}
    nats = [x - y for x, y in zip(losses, softmax_losses)]
    of_gpt2 = token_bytes > 1.01                # it is 1 where the tokens are bytes
    return {"nats per byte above softmax": number(3, *(x / token_bytes for x in nats)),
            "% per token": number(1, *(100 * math.expm1(x) for x in nats)) if of_gpt2 else "-"}


def trained(chosen):
    """The runs from scratch of each model, one a seed (of several the last), by what they share:
    data, steps, heads, positions, contexts, the map with its options and edit, the rate."""
    found = {}
    for r in chosen:
        options = {o.split()[0]: o for o in re.split(r" (?=--)", r["command"])
                   if o.startswith(OPTIONS)}
        key = (r["data"], r["steps"], r["config"]["n_head"], r["config"]["position"],
               r["config"]["block_size"], " ".join([r["attention"], *options.values()])
               + (f", {r['edit']}" if "edit" in r else ""), r["lr"])
        found.setdefault(key, {})[r["seed"]] = r
    return {key: [runs[seed] for seed in sorted(runs)] for key, runs in found.items()}


def loss_of(runs):
    return mean(r["valid"]["loss"] for r in runs)


def beside_softmax(found, key):
    """The runs of a model of `trained` and those of softmax at the best of its rates, of the seeds
    that both have. Both lists are empty if there are none."""
    rates = [runs for other, runs in found.items() if other[:6] == (*key[:5], "softmax")]
    softmax = {r["seed"]: r for r in min(rates, key=loss_of, default=[])}
    own = [r for r in found[key] if r["seed"] in softmax]
    return own, [softmax[r["seed"]] for r in own]


def scratch(chosen, lines):
    """A row for each model that was trained, by data, width, steps and loss."""
    found, rows = trained(chosen), []
    for key in sorted(found, key=lambda key: (
            key[0], found[key][0]["config"]["n_embd"], key[1], loss_of(found[key]))):
        data, steps, heads, position, contexts, attention, rate = key
        runs, pair = found[key], beside_softmax(found, key)
        rows.append({
            "map": attention, "data": data, "positions": position, "heads": str(heads),
            "contexts": f"{contexts:,}", "steps": f"{steps:,}", "rate": f"{rate:g}",
            "parameters": f"{runs[0]['parameters'] / 1e6:.1f} M",
            "seeds": str(len(runs)),
            "% right": number(1, *(100 * r["valid"]["accuracy"] for r in runs)),
            "steps until half are right": ", ".join(
                f"{r['half_right_at']:,}" if r["half_right_at"] else "never"
                for r in runs if "half_right_at" in r) or "-",
            "perplexity": number(2, *(r["valid"].get("perplexity") for r in runs)),
            "of the test": number(2, *(r["test"].get("perplexity") for r in runs)),
            **gap(*([loss_of(x) if x else None] for x in pair), bytes_per_token(data, lines))})
    return rows


def conversions(chosen, lines):
    """A row for each map that distill.py put into teachers, its own or given ones, one run a seed
    (of several the last)."""
    def alike(r):
        """What softmax has to share; the teacher is told by its figure, to the last digit."""
        return (r["rows"][0][r["figure"]], r["seed"],
                *(r["options"].get(key) for key in ("steps", "batch_size", "lora")))

    best, found = {}, {}
    for r in chosen:
        own = r["options"].get("attention") == "softmax"    # a run that did nothing else
        for row in r["rows"]:
            if row["name"] == "softmax, finetuned" or own and row is r["rows"][-1]:
                choose = min if r["figure"] == "perplexity" else max
                best[alike(r)] = choose(best.get(alike(r), r["rows"][0]), row,
                                        key=lambda x: x[r["figure"]])
    for r in chosen:
        models, options = {}, r["options"]
        if options.get("attention") == "softmax":
            continue
        for row in r["rows"]:
            model, _, stage = row["name"].rpartition(", ")
            models.setdefault(model, {})[row["name"] if model == "softmax" else stage] = row
        softmax = models.pop("softmax") | {STAGES[4]: best.get(alike(r), {})}
        extra = [f" --{key.replace('_', '-')} {options[key]}" for key in ("feature_dim", "lora")
                 if options.get(key)]
        position, batch = options.get("position", "learned"), options.get("batch_size")
        for model, own in models.items():       # older runs do not say position or batch
            steps, batches = f"{options['steps']:,}", str(batch or "-")
            if "stage 1" in own:
                steps = f"{options['distill_steps']:,} + {steps}"
                batches = batch and f"{options.get('distill_batch_size') or batch} + {batch}" or "-"
            key = ("".join([model, *extra]), r["data"], position, steps, batches, options["lr"],
                   bool(options.get("teacher")))
            figures = {stage: (softmax | own).get(stage, {}) for stage in STAGES}
            found.setdefault(key, {})[r["seed"]] = figures, r["figure"]
    rows = []
    for (name, data, position, steps, batches, rate, _), runs in found.items():
        def over_seeds(stage, key=None):
            return [figures[stage].get(key or figure) for figures, figure in runs.values()]

        def of_stages(key, digits, stages):
            return ", ".join("-" if None in over_seeds(stage, key) else
                             f"{mean(over_seeds(stage, key)):.{digits}f}" for stage in stages)

        ends = [[x and math.log(x) for x in over_seeds(stage, "perplexity")]
                for stage in ("stage 2", STAGES[4])]
        rows.append({
            "map": name, "data": data, "positions": position, "steps": steps, "batch": batches,
            "rate": f"{rate:g}", "seeds": str(len(runs)),
            **{stage: number(2, *over_seeds(stage)) for stage in STAGES},
            **gap(*ends, bytes_per_token(data, lines)),
            "KL": of_stages("kl", 3, STAGES[1:4]),
            "entropy": of_stages("entropy", 2, STAGES[:4]),
            "monotonicity": of_stages("monotonicity", 2, STAGES[1:4])})
    return sorted(rows, key=lambda row: (row["data"], row["positions"],
                                         float(row["stage 2"].split()[0])))


def checkpoint(chosen, lines):
    """A row for each conversion of SmolLM2, beside the best softmax that a run of its own finetuned
    in as many and as large steps, with as large adapters."""
    def alike(r):
        return tuple(r["options"][key] for key in ("steps", "batch_size", "lora"))

    softmax, rows = {}, []
    for r in chosen:
        if r["options"]["attention"] == "softmax":
            softmax[alike(r)] = min(softmax.get(alike(r), math.inf), r["rows"][-1]["perplexity"])
    for r in chosen:
        o, own = r["options"], {row["name"].split(", ")[1]: row for row in r["rows"]}
        if o["attention"] != "softmax":
            best = softmax.get(alike(r))
            extra = [f" --{key.replace('_', '-')} {o[key]}" for key in ("feature_dim", "lora")
                     if o[key]]
            rows.append({
                "map": "".join([o["attention"], *extra]),
                "steps": f"{o['distill_steps']:,} + {o['steps']:,}",
                "batch": f"{o['distill_batch_size']} + {o['batch_size']}", "rate": f"{o['lr']:g}",
                **{stage: number(2, own[stage]["perplexity"]) for stage in STAGES[1:4]},
                STAGES[4]: number(2, best),
                **gap([math.log(own["stage 2"]["perplexity"])], [best and math.log(best)],
                      SMOLLM2_BYTES),
                "KL": ", ".join(number(2, own[stage]["kl"]) for stage in STAGES[1:4]),
                "entropy": ", ".join(number(2, own[stage]["entropy"]) for stage in STAGES[1:4])})
    return sorted(rows, key=lambda row: float(row["stage 2"]))


def transfer(chosen, lines):
    """A row for each map that distill.py --analyze had: KL by length of the contexts, one text /
    another, means over layers and runs."""
    found, texts = {}, sorted({r["data"] for r in chosen}, reverse=True)
    for r in chosen:
        for name, figures in r["layers"].items():
            found.setdefault(name, {}).setdefault((r["block_size"], r["data"]), []).append(
                mean(figures["kl"]))
    return [{"map": name} | {
        f"{size:,}": " / ".join(number(2, mean(kls[size, text])) for text in texts)
        for size, _ in sorted(kls)}
        for name, kls in sorted(found.items(), key=lambda x: not x[0].endswith("trained"))]


def rouge(chosen, lines):
    """A row for each map in a model that answers prompts: ROUGE-1, -2, -L, and KL."""
    rows = []
    for r in chosen:
        own = {row["name"].rpartition(", ")[2]: row for row in r["rows"]}
        row = {"map": r["rows"][-1]["name"].split(", ")[0], "the teacher": "-", "swapped": "-",
               "stage 1": "-", "stage 2": "-"}
        for stage, x in own.items():
            row[stage] = f"{x['rouge1']:.1f}, {x['rouge2']:.1f}, {x['rougeL']:.1f}"
        rows.append(row | {"KL": ", ".join(f"{own[stage]['kl']:.2f}" for stage in list(own)[1:])})
    return rows


def training(chosen, lines):
    """A row for each context and card: tokens a second and the peak of memory of each model."""
    rows = {}
    for r, x in ((r, x) for r in chosen for x in r["training"]):
        row = rows.setdefault((x["context"], r["device"]), {
            "context": f"{x['context']:,}", "card": r["device"].split()[1]})
        row |= {f"{x['model']}, tokens/s": f"{x['tokens_per_second']:,}",
                f"{x['model']}, GiB": f"{x['peak_memory_gib']:.1f}"}
    return [rows[key] for key in sorted(rows)]


def small(chosen, lines):
    """A row for each way to launch a step of the small model."""
    return [{"one step is": "a replayed graph" if r["graph"] else "launched by Python",
             **{f"{x['model']}, {unit}": f"{x[key]:,}" for x in r["training"]
                for unit, key in (("ms", "ms"), ("tokens/s", "tokens_per_second"))}}
            for r in chosen]


def kernel(chosen, lines):
    """A row for each card and contender, a column for each length of the sequence."""
    lengths = sorted({T for r in chosen for T in r["lengths"]})
    rows = []
    for r in chosen:
        for name, figures in r["kernel"].items():
            at = dict(zip(r["lengths"], figures))
            mib = [x[2] for x in figures if x[2] is not None]
            rows.append({"card": r["device"].split()[1], "attention": name} | {
                f"T = {T:,}": f"{at[T][0]:.3f}, {at[T][1]:.3f}" if T in at else "-"
                for T in lengths} | {"MiB": f"{min(mib):,.0f} to {max(mib):,.0f}" if mib else "-"})
    return rows


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
    for what, kind, column, values, attention, paper in HEADLINE:
        make, fits = TABLES[kind]
        table = {row["map"]: row for row in make(list(filter(fits, lines)), lines)
                 if values.items() <= row.items()}
        hedgehog = table[attention]
        softmax = table.get("softmax", {column: hedgehog.get(STAGES[4])})
        rows.append({"": what, "softmax": softmax[column], "Hedgehog": hedgehog[column],
                     **{key: hedgehog[key] for key in gap([None], [None], None)},
                     "the paper's gap": paper})
    return rows


# Kind of table -> what makes its rows, and whether a result is one of those that it is made of.
TABLES = {
    "headline": (headline, lambda r: True),
    "scratch": (scratch, lambda r: "valid" in r and r["steps"] >= 100),
    "training": (training, lambda r: "training" in r and not r.get("recompute")
                 and r.get("preset", "gpt2") == "gpt2"),
    "small": (small, lambda r: "training" in r and r.get("preset") == "small"),
    "generation": (generation, lambda r: "generation" in r),
    "kernel": (kernel, lambda r: "kernel" in r),
    "checkpoint": (checkpoint, lambda r: "rows" in r and "gguf" in r["command"]
                   and "samsum" not in r["command"]),
    "transfer": (transfer, lambda r: "analyze" in r),
    "rouge": (rouge, lambda r: any("rouge1" in row for row in r.get("rows", []))),
    "conversions": (conversions, lambda r: "rows" in r and "gguf" not in r["command"])}


def note(lines, shared):
    """Sentences about a table: the cells that all of its rows share, and the runs it is made of."""
    def together(key, between=", "):
        return between.join(sorted({r[key] for r in lines}))

    seconds = [r["seconds"] for r in lines if "seconds" in r]
    took = f" and took {min(seconds):,.0f} to {max(seconds):,.0f} seconds" if seconds else ""
    alike = ", ".join(f"{key} {value}" for key, value in shared.items())
    return textwrap.fill(f"All rows: {alike}. " * bool(shared)
                         + f"These {len(lines)} runs are of {together('date')} "
                         f"({together('device', ' and ')}; torch {together('torch')}){took}.", 100)


def rewrite(text, lines):
    def table(match):
        kind, data = match.groups()
        make, fits = TABLES[kind]
        chosen = [r for r in lines if fits(r) and (not data or r["data"] in data.split())]
        rows = make(chosen, lines)
        shared = {key: rows[0][key] for key in SETTINGS if rows[0].get(key, "-") != "-"
                  and len({row.get(key) for row in rows}) == 1}
        head = [key for key in rows[0] if any(row.get(key, "-") != "-" for row in rows)
                and key not in shared]
        align = ["---"] + ["--:"] * (len(head) - 1)
        cells = [head, align, *([row.get(key, "-") for key in head] for row in rows)]
        body = ["| " + " | ".join(line) + " |" for line in cells]
        if kind != "headline":
            body += ["", note(chosen, shared)]
        return "\n".join([f"<!-- table {kind}{data} -->", *body, "<!-- end -->"])

    return re.sub(r"<!-- table (\w+)(.*?) -->.*?<!-- end -->", table, text, flags=re.S)


def plot_curve(lines, path):
    """Hedgehog's gap against tokens seen per parameter, a line for each text, size and positions,
    all maps at their best rate, with the standard deviation where there are several seeds; for the
    small model of today the rivals' gaps, too. Heads are 64 wide, of several lengths of contexts on
    a text the shortest is drawn. How many tokens the paper's model saw is a guess. Prints the power
    law of each line with four points or more."""
    import matplotlib.pyplot as plt

    found, curves = trained([r for r in lines if TABLES["scratch"][1](r)]), {}
    best, shortest = {}, {}
    for key in sorted(found, key=lambda key: loss_of(found[key])):
        best.setdefault(key[:6], key)
        shortest[key[0]] = min(key[4], shortest.get(key[0], key[4]))
    for key in sorted(best.values()):
        (runs, softmax), token_bytes = beside_softmax(found, key), bytes_per_token(key[0], lines)
        rival = (key[5] in ("performer", "elu", "hedgehog_decay")
                 and key[:4:3] == ("enwiki-88m", "rotary"))
        if ((key[5] == "hedgehog" or rival) and softmax and token_bytes
                and key[4] == shortest[key[0]] and runs[0]["config"]["n_embd"] == 64 * key[2]):
            size, both = softmax[0]["parameters"], [[r["valid"]["loss"] for r in of_map]
                                                    for of_map in (runs, softmax)]
            deviation = math.hypot(*(stdev(x) for x in both if len(x) > 1))
            name = f"{key[5]}, {size / 1e6:.1f}M, {key[0]}, {key[3]}"
            curves.setdefault(name, []).append((
                softmax[0]["tokens"] / size, (mean(both[0]) - mean(both[1])) / token_bytes,
                deviation / token_bytes))
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, (name, points) in enumerate(curves.items()):
        x, y, deviations = zip(*points)
        marker = "os"[i // 10]                  # colours come again after ten lines
        axis.errorbar(x, y, deviations, fmt=f"{marker}-", capsize=3, label=name)
        if len(x) > 3:                          # a straight line here is a power law
            slope, at_1 = linear_regression([math.log(a) for a in x], [math.log(b) for b in y])
            off = max(abs(math.log(b) - at_1 - slope * math.log(a)) for a, b in zip(x, y))
            print(f"{name}: a gap of {math.exp(at_1):.4f} (tokens per parameter)^{slope:.3f}, four "
                  f"times the tokens multiply it by {4 ** slope:.2f}; off by {off:.1%} at most")
    axis.plot(95, math.log(20.8 / 18.6) / 4.5, "k*",
              label="the paper, 125M, WikiText-103 (probably)")
    axis.set(xscale="log", yscale="log", xlabel="tokens (or bytes) seen per parameter",
             ylabel="nats per byte above softmax")
    for scale, ticks in ((axis.xaxis, [2, 5, 10, 20, 50, 100]),
                         (axis.yaxis, [0.01, 0.02, 0.05, 0.1, 0.2])):
        scale.set_ticks(ticks, labels=map(str, ticks))
        scale.set_minor_formatter("")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plot"]:
        plot_curve(results(), sys.argv[2])
    else:
        for path in (ROOT / "README.md", ROOT / "figures" / "README.md"):
            path.write_text(rewrite(path.read_text(), results()))
