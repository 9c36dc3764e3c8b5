"""The tables of README.md and figures/README.md, made from the raw results in results.jsonl.

    python tests/tables.py      rewrites what is between <!-- table KIND WORDS --> and <!-- end -->

A line of figures/results.jsonl is the OUT/result.json of a run of train_lm.py or distill.py, or the
last line that bench_generation.py prints. KIND is headline (README.md's), recall, scratch, budget
(softmax, Hedgehog and its gate on the CPU's text, by steps), distill, gap (a line for each
conversion on enwiki), teachers (what is left after those on the CPU's text, by teacher), speed (of
short training runs) or generation; WORDS, if any, choose the tables whose title has all of them.
Gaps of models of bytes are in nats per byte, of GPT-2 tokens in per cent of perplexity per token.
"""

import json
import math
import re
import shlex
import textwrap
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
# The paper's, as transcribed; hedgehog's two are from memory of it. Perplexities: WikiText-103.
PAPER_RECALL = {"softmax": "100", "taylor": "100", "hedgehog": "100", "elu": "17",
                "performer": "17", "cosformer": "17", "exp --exp-temperature 2": "solves it"}
PAPER_PERPLEXITY = {"softmax": 18.6, "hedgehog": 20.8, "elu": 25.6, "performer": 26.8}
# Options that make no other row: they are in the title, or the result does not depend on them.
ALIKE = set("""--attention --data --data-dir --tokenizer --preset --seed --steps --epochs --n-layer
    --n-embd --dropout --batch-size --micro-batch --eval-every --out --device --compile
    --no-compile --resume --overwrite""".split())


def results(path=ROOT / "figures" / "results.jsonl"):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def title(r):
    """The kind of table that a result belongs to, and which one."""
    if "generation" in r:
        return "generation", r["device"]
    if "rows" in r:
        return "distill", f"{r['data']}, {r['command']}."
    if r.get("data") == "recall":
        return "recall", "recall"
    layers, width, steps = r["config"]["n_layer"], r["config"]["n_embd"], r["steps"]
    if steps < 100:
        return "speed", f"{layers} layers of width {width}"
    dropout = f", dropout {r['config']['dropout']}" if r["config"]["dropout"] else ""
    return "scratch", (f"{r['data']}, {layers} layers of width {width}, {steps:,} steps of "
                       f"{r['tokens'] // steps:,} tokens{dropout}")


def name(r):
    """Its attention, with the options that make a difference."""
    options = re.split(r" (?=--)", r["command"])[1:]
    return " ".join([r["attention"], *sorted(
        o for o in options if re.split("[ =]", o)[0] not in ALIKE)])


def runs(lines):
    """Name -> its runs, the last one of each seed."""
    rows = {}
    for r in lines:
        rows.setdefault(name(r), {})[r["seed"]] = r
    return {name: list(by_seed.values()) for name, by_seed in rows.items()}


def spread(values):
    values = list(values)
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def markdown(head, rows, lines):
    """The table, and with what, on what and when it was made."""
    def together(key):
        return ", ".join(sorted({str(r[key]) for r in lines}))

    words = shlex.split(lines[-1]["command"])               # of a path far away only the name
    command = shlex.join(w.rsplit("/", 1)[1] if w.startswith(("/", "../")) else w for w in words)
    low, high = (f"{round(f(r['seconds'] for r in lines)):,}" for f in (min, max))
    which = "" if len(lines) == 1 else f" (one of {len(lines)} runs)"
    note = (f"Command `{command}`{which}; {low}{f' to {high}' if high != low else ''} seconds; "
            f"{together('device')}; torch {together('torch')}; data {together('data')}; seed "
            f"{together('seed')}; {together('date')}.")
    align = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows)) + "\n\n" + (
        textwrap.fill(note, 100, break_on_hyphens=False))


def recall(title, lines):
    rows = []
    for name, by in runs(lines).items():
        attention = name.split()[0]
        paper = PAPER_RECALL.get(name if attention == "exp" else attention, "")
        rows.append([name, f"{by[0]['steps']:,}", str(len(by)),
                     spread(100 * r["valid"]["accuracy"] for r in by), paper])
    rows.sort(key=lambda row: -float(row[3].split()[0]))
    return markdown(["attention", "steps", "seeds", "recalled, %", "the paper"], rows, lines)


def scratch(title, lines):
    by_name = runs(lines)
    loss = {name: mean(r["valid"]["perplexity"] for r in by) for name, by in by_name.items()}
    rows = []
    for name in sorted(by_name, key=loss.get):
        by, attention = by_name[name], name.split()[0]
        same = name.replace(attention, "softmax", 1)        # softmax with the same options, if run
        base, paper = loss.get(same, loss.get("softmax")), PAPER_PERPLEXITY.get(name)
        rows.append([name, f"{by[0]['parameters'] / 1e6:.1f} M", str(len(by)), *(
            spread(r[split][key] for r in by) if all(key in r.get(split, {}) for r in by) else "-"
            for split in ("valid", "test") for key in ("perplexity", "perplexity_per_word")),
            f"{100 * (loss[name] / base - 1):.1f}" if base else "-",
            f"{100 * (paper / 18.6 - 1):.1f}" if paper else ""])
    return f"**{title}**\n\n" + markdown(
        ["attention", "parameters", "seeds", "valid", "per word", "test", "per word",
         "above softmax, %", "in the paper, %"], rows, lines)


def by_length(length, lines, columns):
    """Cells of a row for each attention and thing measured, a column for each length."""
    lengths = sorted({length(r) for r in lines})
    found = {(r["attention"], length(r)): r for r in lines}
    return [f"{n:,}" for n in lengths], [
        [f"{name}: {what}", *(cell(found[name, n]) if (name, n) in found else "-" for n in lengths)]
        for name in sorted({r["attention"] for r in lines}) for what, cell in columns.items()]


def speed(title, lines):
    head, rows = by_length(lambda r: r["config"]["block_size"], lines, {
        "tokens/s": lambda r: f"{r['tokens_per_second']:,}",
        "peak memory, GiB": lambda r: f"{r['peak_memory_gib']:.1f}"})
    return markdown(["context", *head], rows, lines)


def generation(title, lines):
    r = lines[-1]
    head, rows = by_length(lambda row: row["context"], r["generation"], {
        "tokens/s": lambda row: f"{row['tokens_per_second']:,}",
        "bytes kept": lambda row: f"{row['bytes']:,}"})
    return markdown([f"{r['batch']} sequences", *head], rows, [r])


def compare(r):
    """A row for each map of a run with --compare."""
    by_map = {}
    for row in r["rows"]:
        name, _, stage = row["name"].rpartition(", ")
        by_map.setdefault(name, {})[stage] = row
    best = by_map.pop("softmax")["finetuned"][r["figure"]]

    def cells(key, digits, stages):
        for stage in ("swapped", "stage 1", "stage 2")[:stages]:
            yield f"{found[stage][key]:.{digits}f}" if stage in found else "-"

    rows = []
    for name, found in sorted(by_map.items(), key=lambda x: x[1]["stage 2"][r["figure"]]):
        above = math.log(found["stage 2"][r["figure"]] / best)
        rows.append([name, *cells(r["figure"], 2, 3), f"{above:.3f}", *cells("kl", 2, 3),
                     *cells("entropy", 2, 2), *cells("monotonicity", 2, 2)])
    return f"**{r['data']}, every map**\n\n" + markdown(
        ["map", f"{r['figure']}: swapped", "stage 1", "stage 2", "nats per byte above softmax",
         "KL: swapped", "stage 1", "stage 2", "entropy: swapped", "stage 1",
         "monotonicity: swapped", "stage 1"],
        rows, [r])


def budget(lines):
    """Softmax, Hedgehog and its gate on stdlib, as they come, after ever more steps: means."""
    names = "softmax", "hedgehog", "hedgehog_gate"
    by_steps = {n: runs(r for r in lines if r["steps"] == n) for n in {r["steps"] for r in lines}}
    steps = sorted(n for n, by in by_steps.items() if set(names) <= set(by))
    ppl = {n: {which: mean(r["valid"]["perplexity"] for r in by_steps[n][which])
               for which in names} for n in steps}
    rows = []
    for which in names:
        rows.append([which, *(f"{ppl[n][which]:.2f}" for n in steps)])
        if which != "softmax":
            rows.append(["nats per byte above softmax", *(
                f"{math.log(ppl[n][which] / ppl[n]['softmax']):.3f}" for n in steps)])
    return markdown(["steps", *(f"{n:,}" for n in steps)], rows,
                    [r for n in steps for which in names for r in by_steps[n][which]])


def stages(r):
    """Stage -> its row, of a run of distill.py without --compare."""
    return {row["name"].rpartition(", ")[2]: row for row in r["rows"]}


def softmax_alike(r, lines):
    """Perplexity of softmax finetuned alike: a run with --no-baseline has another run's."""
    for other in (r, *lines):
        same = all(other["options"].get(key) == r["options"].get(key)
                   for key in ("teacher", "data", "steps", "lr", "batch_size", "lora"))
        if same and "finetuned" in stages(other):
            return stages(other)["finetuned"]["perplexity"]


def above_softmax(r, lines):
    """Perplexity after stage 2, in per cent above that of softmax finetuned alike."""
    return 100 * (stages(r)["stage 2"]["perplexity"] / softmax_alike(r, lines) - 1)


def distilled(options):
    """Whether there was a stage 1; older lines have another name for the option."""
    return options.get("distill", not options.get("no_distill"))


def conversion(r):
    """The map of a run, with the options that make a difference."""
    o = r["options"]
    words = [o.get("feature_map") or o["attention"], *([] if distilled(o) else ["--no-distill"]),
             *(f"--{key.replace('_', '-')} {o[key]}" for key in ("feature_dim", "lora")
               if o.get(key))]
    return " ".join(words)


def gap(lines):
    """Conversions, closest to softmax first: what is left after each stage."""
    rows = []
    for r in sorted(lines, key=lambda r: above_softmax(r, lines)):
        found = stages(r)
        cells = [f"{found[stage][key]:.{digits}f}" if stage in found else "-"
                 for stage, key, digits in (
                     ("the teacher", "perplexity", 1), ("swapped", "perplexity", 0),
                     ("stage 1", "perplexity", 1), ("stage 1", "kl", 2),
                     ("stage 2", "perplexity", 1))]
        steps = r["options"]["distill_steps"] if distilled(r["options"]) else "-"
        rows.append([conversion(r), f"{steps}", f"{r['options']['steps']:,}", *cells,
                     f"{softmax_alike(r, lines):.1f}", f"{above_softmax(r, lines):.1f}"])
    return markdown(["map", "steps 1", "steps 2", "teacher", "swapped", "stage 1", "its KL",
                     "stage 2", "softmax finetuned", "above it, %"], rows, lines)


def teachers(lines):
    """KL after stage 1, and nats per byte above softmax after stage 2, by teacher."""
    columns = {"teacher": "default", "context-512": "context 512", "softmax-8400": "8,400 steps"}
    table = {}
    for r in lines:
        found, o = stages(r), r["options"]
        steps = f" --steps {o['steps']}" if o["steps"] != 400 else ""
        teacher = Path(o.get("teacher") or "teacher").name
        table.setdefault(conversion(r) + steps, {})[teacher] = (
            f"{found['stage 1']['kl']:.3f}, {math.log(1 + above_softmax(r, lines) / 100):.3f}")
    rows = [[name, *(cells.get(teacher, "-") for teacher in columns)]
            for name, cells in sorted(table.items())]
    return markdown(["map", *columns.values()], rows, lines)


def distill(title, lines):
    r = lines[-1]
    if "--compare" in r["command"]:
        return compare(r)
    rows = [[row["name"], f"{row[r['figure']]:.2f}", *(
        f"{row[key]:.3f}" for key in ("kl", "entropy_softmax", "entropy", "monotonicity"))]
        for row in r["rows"]]
    return f"**{r['data']}**\n\n" + markdown(
        ["model", r["figure"], "KL", "entropy of softmax", "entropy", "monotonicity"], rows, [r])


def converted(r, data):
    return (r.get("figure") == "perplexity" and r["data"].startswith(data)
            and "--compare" not in r["command"] and "gguf" not in r["command"])


PAPER_BYTES_PER_TOKEN = 4.5     # about, of GPT-2's tokens on WikiText-103


def headline(lines):
    """Like beside like: softmax, Hedgehog, and nats per byte between them, as in the paper."""
    def last(fits):
        return [r for r in lines if fits(r)][-1]

    def trained(data, attention, steps):
        return last(lambda r: r.get("attention") == attention and r["data"].startswith(data)
                    and r.get("steps") == steps)

    recalled = runs(r for r in lines if r["data"] == "recall")
    rows = [["associative recall, % right", *(
        f"{100 * mean(r['valid']['accuracy'] for r in recalled[a]):.1f}"
        for a in ("softmax", "hedgehog")), "", ""]]
    paper = [f"{math.log(a / b) / PAPER_BYTES_PER_TOKEN:.3f}"
             for a, b in ((20.8, 18.6), (16.7, 15.8))]
    used, per_byte = [], None
    for what, data, steps, theirs in (
            ("from scratch, 124M on enwiki-88m, perplexity per token", "enwiki-88m", 5368,
             paper[0]),
            ("from scratch, 0.9M on Python's source, perplexity per byte", "stdlib", 8400, "")):
        pair = [trained(data, a, steps)["valid"] for a in ("softmax", "hedgehog")]
        used += [trained(data, a, steps) for a in ("softmax", "hedgehog")]
        gap = (pair[1]["bits_per_byte"] - pair[0]["bits_per_byte"]) * math.log(2)
        per_byte = per_byte or pair[0]["loss"] / (pair[0]["bits_per_byte"] * math.log(2))
        rows.append([what, *(f"{x['perplexity']:.2f}" for x in pair), f"{gap:.3f}", theirs])
    for what, r, bytes_per_token, theirs in (
            ("converted, the 124M model", last(lambda r: converted(r, "enwiki") and distilled(
                r["options"]) and r["options"].get("feature_map") == "hedgehog"
                and r["options"]["steps"] == 2400), per_byte, paper[1]),
            ("converted, 0.9M on Python's source", last(
                lambda r: r.get("rows") and r["command"] == "python distill.py"), 1.0, "")):
        a, b = (stages(r)[x]["perplexity"] for x in ("finetuned", "stage 2"))
        rows.append([what, f"{a:.2f}", f"{b:.2f}", f"{math.log(b / a) / bytes_per_token:.3f}",
                     theirs])
        used.append(r)
    return markdown(["", "softmax", "Hedgehog", "nats per byte above softmax", "the paper's"], rows,
                    used)


TITLED = {"recall": recall, "scratch": scratch, "distill": distill, "speed": speed,
          "generation": generation}         # a table for each title
SINGLE = {"headline": (headline, lambda r: True),
          "budget": (budget, lambda r: "attention" in r and r["data"].startswith("stdlib")
                     and r["config"]["position"] == "learned"),
          "gap": (gap, lambda r: converted(r, "enwiki")),
          "teachers": (teachers, lambda r: converted(r, "stdlib"))}     # of the lines that fit


def rewrite(text, lines):
    def table(match):
        kind, words = match.groups()
        if kind in SINGLE:
            make, fits = SINGLE[kind]
            body = make(list(filter(fits, lines)))
        else:
            groups = {}
            for r in lines:
                of, name = title(r)
                if of == kind and all(word in name for word in words.split()):
                    groups.setdefault(name, []).append(r)
            body = "\n\n".join(TITLED[kind](*group) for group in groups.items())
        return (f"<!-- table {kind}{words} -->\n\n{body or '*Not measured yet.*'}\n\n"
                "<!-- end -->")

    return re.sub(r"<!-- table (\w+)(.*?) -->.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    for path in (ROOT / "README.md", ROOT / "figures" / "README.md"):
        path.write_text(rewrite(path.read_text(), results()))
