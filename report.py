"""Every table and figure of the paper, from what the other scripts left below RUNS.

    python report.py --runs runs/quick                      # runs/quick/README.md and its figures
    python report.py --runs runs/quick --tables table2 fig8 --out results
    python report.py --runs runs/price --tables price       # beyond the paper, only where asked for

Every score says itself how its samples were made; the names of runs and folders mean nothing. The paper's
own numbers, which stand beside ours, are in paper.csv. What has not run is a dash.
"""

import common                                               # first: it answers Ctrl-C while others load

import contextlib
import csv
import functools
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import UserError, atomic_write, check_out, command_line, parser_of, pyplot, save_figure

DATA = {"cifar10": "CIFAR-10", "celeba": "CelebA", "lsun_bedroom": "LSUN Bedroom",
        "imagenet64": "ImageNet-64"}
METHODS = {"ddpm": "DDPM", "ran": "Robust_ran", "adv": "Robust_adv", "inv": "Inv_adv"}
COLOURS = {"ddpm": "#0072B2", "ran": "#009E73", "adv": "#D55E00", "inv": "#CC79A7"}     # for every eye
CLEAN, *NOISY = NOISES = ["clean", "90 % with σ 0.1", "90 % with σ 0.2"]       # as `noise_name` has it
ATTACKS = ["fgsm", "pgd", "pgd as printed", "eot", "eot as printed", "noise", "drift"]
PERCENT = [25, 50, 75, 100]                                 # of the sampling steps
BESIDE = {"FID": "IS", "FD-inception": "IS", "FD-exact": "ρ", "FD-pixels": "noise estimate"}
QUALITY, NOISE_LEFT = ["distance", "beside"], ["distance", "ρ"]         # see `names_of`
EXACT = ", closed form"                                     # after the name of a number: gaussian.py's
DASH = "–"


# --------------------------------------------------------------------- a cell of a table, and what selects it

def of(method, noise, **more):
    """What selects a model's samples: the paper's lambda, trained from scratch, Eq. 4 with the usual number
    of steps, no attack, unless `more` says otherwise."""
    where = dict(method=method, noise=noise, lam=None if method in ("ddpm", "ambient") else 0.3, flags=None,
                 tuned=False, sampler="ddpm", attack=None, percent=None)
    return where | ({} if "steps" in more else {"usual": True}) | more


def noise_name(p, sigma):
    """The training data's corruption in words; p or sigma alone corrupts nothing."""
    return f"{100 * p:g} % with σ {sigma:g}" if p and sigma else CLEAN


def matching(records, where):
    """The records that have all the values of `where`."""
    return [r for r in records if all(r.get(name) == value for name, value in where.items())]


def cell(records, number, where):
    """(mean, sample deviation or None, count) of a number in the records that match; None: not measured."""
    values = [r[number] for r in matching(records, where) if number in r]
    values = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def mark_usual(records):
    """Marks as `usual`, for each data set and sampler, the number of steps that most records have (of two,
    the larger); attacked samples apart. -> records."""
    def group(r):
        return r["data"], r["size"], r["sampler"], r["percent"] is None

    counts = {}
    for r in records:
        counts.setdefault(group(r), Counter())[r["steps"] or 0] += 1
    for r in records:
        own = counts[group(r)]
        r["usual"] = (r["steps"] or 0) == max(own, key=lambda steps: (own[steps], steps))
    return records


@functools.cache
def read_paper():
    """paper.csv -> a record for each of its rows, in the paper's order, with the names of `of`."""
    with open(Path(__file__).with_name("paper.csv"), newline="", encoding="utf-8") as file:
        rows = [{name: text or None for name, text in row.items()} for row in csv.DictReader(file)]
    for r in rows:
        for name in ("p", "sigma", "lam", "steps", "steps_attacked", "value"):
            r[name] = r[name] and float(r[name])
        r["percent"] = r["steps_attacked"] and 100 * r["steps_attacked"] / r["steps"]
        r.update({"noise": noise_name(r["p"], r["sigma"]), "tuned": r["trained"] == "fine-tuned",
                  "size": None, r["metric"]: r["value"]})
    return mark_usual(rows)


def paper(number, where):
    """The paper's own number, from the first place that prints it, or None. Which reading of its attacks it
    measured is not known: its numbers stand beside both."""
    where = where | dict(attack=(where.get("attack") or "").removesuffix(" as printed") or None)
    return next((r[number] for r in matching(read_paper(), where) if number in r), None)


# ---------------------------------------------------------------------------------- what the stages have left

# What the paper does not vary: samples made otherwise stay out of its tables.
STANDARD = dict(lam_units=["x"], omega=[2], gamma=[8 / 255], ema=[True], where=["spread"], phi=[1, None],
                variance=[None, "large", "learned"], eps_scale=[1], stride=[2.5, None])


@contextlib.contextmanager
def reading(path, script):
    """A file that is damaged or not what `script` writes becomes one line."""
    try:
        yield
    except Exception as error:                              # whatever a foreign value may lead to
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path}: damaged, or not what {script} writes ({reason}); make it again") from error


def whole(text):
    """A whole number of a JSON file. ValueError for one that no float holds."""
    if len(text) > 19:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def opened(path, limit=1 << 26):
    """A text file, open to be read. ValueError where it is longer than ours are, or not a regular file, which
    may never end."""
    if not path.is_file():
        raise ValueError("not a regular file")
    if path.stat().st_size > limit:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than {limit:,}")
    return open(path, encoding="utf-8")


def load(path):
    """The value in a JSON file of ours."""
    with opened(path) as file:
        return json.load(file, parse_int=whole)


KINDS = {str: "data noise method weighting network variant sampler device",
         (str, type(None)): "flags attack",
         int: "size batch seed step n steps",
         (int, float): "reg_share seconds cost",
         (int, float, type(None)): "lam iters draws percent memory"}


def checked(record):
    """The record, whose values are now known to be of the kinds that tables and figures take, or
    TypeError."""
    for kind, names in KINDS.items():
        for name in names.split():
            if name in record and not isinstance(record[name], kind):
                raise TypeError(f"{name} is {record[name]!r}")
    return record


def facts(config):
    """How a model was trained, by its configuration: a flat record with the names of `of`. `variant` is what
    else makes two models incomparable."""
    data, training, network = config["data"], config["training"], config["network"]
    apart = {"method", "seed", "init", "lam", "flags", "sigma_known"}
    if training["method"] in ("ddpm", "ambient"):           # these are there, and mean nothing
        training = training | dict(lam=None, reg_share=1.0)
        apart |= {"lam_units", "omega", "gamma"}
    same = {name: value for name, value in training.items() if name not in apart}
    names = ("method", "lam", "flags", "reg_share", "weighting", "seed", "batch")
    return checked({name: training[name] for name in names} | dict(
        data=data["name"], size=data["size"], noise=noise_name(data["p"], data["sigma"]),
        tuned=training["init"] is not None, network=f"{network['channels']} × {tuple(network['mult'])}",
        variant=json.dumps([same, network, config["process"], data["data_seed"]], sort_keys=True)))


def numbers_of(result):
    """What a score file of fid.py, memorize.py or attack.py measured, by the names that the tables show."""
    names = {"is_mean": "IS", "rho_mean": "ρ", "psnr": "PSNR (dB)", "variance_kept": "variance kept",
             "noise_mean": "noise estimate", "rms": "displacement", "rms_noise": "by random signs as large"}
    numbers = {names[key]: value for key, value in result.items() if key in names}
    more = {}
    if result.get("metric") == "memorisation":
        own, histogram = result["generated"], result["histogram"]
        numbers = {"share ≥ 0.9": own["share"], "mean similarity": own["mean"],
                   "95th percentile": own["p95"]}
        edges, *counts = (np.array(histogram[name], float) for name in ("edges", "generated", "train"))
        if edges.ndim != 1 or {each.shape for each in counts} != {(len(edges) - 1,)}:
            raise ValueError("a histogram whose edges do not fit")
        more = {"features": str(result["features"]), "histogram": [edges, *counts]}
    elif "metric" in result:
        numbers = {result["metric"]: result["value"]} | numbers if result["metric"] in BESIDE else {}
        if numbers and result.get("closed_form"):
            numbers |= {f"{names.get(key, result['metric'])}{EXACT}": value for key, value
                        in result["closed_form"].items() if key in names or key == "value"}
            more = {"rule": str(result["closed_form"]["closed_form"])}
    if not numbers:
        raise ValueError("no number that is known")
    for name, value in numbers.items():
        if not isinstance(value, (int, float, type(None))):
            raise TypeError(f"{name} is {value!r}")
    return numbers | more


def read_score(path):
    """A score file -> a record: `facts`, how the samples were made, the numbers. `left` in it: why it has no
    place in a table, or None."""
    with reading(path, "fid.py, memorize.py or attack.py"):
        result = load(path)
        numbers, made = numbers_of(result), result["protocol"]
        if not (made and made["config"]["training"]):       # a folder of images, or a public checkpoint's
            shown = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, (int, float)))
            return dict(path=path, left=f"not of a model of train.py: {shown}")
        attack, r = made["attack"] or {}, facts(made["config"])
        settings = {"ema": made["ema"], "variance": made["variance"]} | attack
        if r["lam"] is not None:
            settings |= {name: made["config"]["training"][name] for name in ("lam_units", "omega", "gamma")}
        odd = [f"{k} is {v}" for k, v in settings.items() if v not in STANDARD.get(k, [v])]
        name, percent = None, None
        if attack:
            percent = round(100 * attack["steps_attacked"] / made["steps"])
            name = attack["name"] + (" as printed" if attack["as_printed"] else "") if percent else None
        r["variant"] += json.dumps(attack)
        return checked(r | numbers | dict(
            path=path, left=odd[0] if odd else None, odd=", ".join(odd), measures=sorted(numbers),
            step=made["step"], n=made["num_samples"], sampler=made["sampler"], steps=made["steps"],
            attack=name, percent=percent, iters=attack.get("iters"), draws=attack.get("eot"),
            picture=path.with_name(Path(result["samples"]).stem + ".png")))


def read_benchmark(path):
    """What train.py --benchmark measured -> a record for each method; cost: as a multiple of DDPM's step."""
    with reading(path, "train.py --benchmark"):
        result = load(path)
        config, methods = result["config"], result["methods"]
        return [checked(facts(config | dict(training=config["training"] | dict(method=method))) | dict(
            seconds=own["seconds"], cost=own["seconds"] / methods["ddpm"]["seconds"], memory=own["peak_gib"],
            device=result["device"])) for method, own in methods.items()]


def read_log(path):
    """A run's log.jsonl -> [its `facts` and sample grids, (step, file)]; [] if it died before its start."""
    with reading(path, "train.py"), opened(path, 1 << 30) as file:
        lines = (json.loads(text, parse_int=whole) for text in file
                 if text.endswith("\n"))                    # the last one may still be in writing
        events = [checked(line) for line in lines if line.get("event")]
        grids = {line["step"]: path.with_name(Path(line["file"]).name) for line in events
                 if line["event"] == "grid"}
        return [facts(line["config"]) | dict(grids=sorted(grids.items())) for line in events
                if line["event"] == "start"][-1:]


def read_toy(path):
    """What toy3d.py measured and judged -> its table and figures (Markdown, files), and claims."""
    names = {"rms": "rms distance", "median": "median distance", "kept": "variance kept",
             "score_error": "error of the score"}
    exact = {"rms": "rms, closed form", "kept": "kept, closed form"}
    with reading(path, "toy3d.py"):
        toy = load(path)
        protocol, records, claims = toy["protocol"], toy["records"], toy["claims"]
        together = list(dict.fromkeys((r["data"], r["noise"]) for r in records))
        records = sorted(records, key=lambda r: together.index((r["data"], r["noise"])))
        rows = [[r["data"], r["name"], *(show(None if r[name][0] is None else r[name]) for name in names),
                 *(show(r["closed_form"] and (r["closed_form"][name], None)) for name in exact)]
                for r in records]
        text = ("{}. Scale: {steps:,} steps of {batch} points, {num_samples} samples, {seeds} seed(s), ± "
                "their sample deviation{}.\n\n{}").format(
            path.stem, in_words(str(protocol["weighting"])),
            markdown(["data", "configuration", *names.values(), *exact.values()], rows), **protocol)
        claims_table(claims)                                # whether they are what `judge` gives
        Counter(c["verdict"].split(" (")[0] for c in claims)
        figures = [path.with_name(Path(name).stem + ".png") for name in protocol["figures"]]
        return SimpleNamespace(text=text, claims=claims, sweep=str(protocol["sweep"] or ""),
                               figures=[file for file in figures if file.is_file()])


def read_runs(runs, out, key):
    """Everything below a folder. -> scores, benchmarks, logs, toys; records: the scores that the tables show,
    see `pool`; claims: [], to be filled; out: the folder of the figures; plt: pyplot or None."""
    if not runs.is_dir():
        raise UserError(f"--runs {runs}: no such folder; `bash run_all.sh` makes runs/quick or runs/paper")
    files = [f for f in sorted(runs.rglob("*.json*")) if not f.name.startswith(".")]    # those are in writing
    scores = [read_score(f) for f in files if re.search(r"\.(attack|memorize|fid|fd-[a-z]+)\.json$", f.name)]
    benchmarks = [r for f in files if f.name == "benchmark.json" for r in read_benchmark(f)]
    logs = [r for f in files if f.name == "log.jsonl" for r in read_log(f)]
    toys = [read_toy(f) for f in files if re.fullmatch(r"toy3d.*\.json", f.name)]
    if not (scores or benchmarks or logs or toys):
        raise UserError(f"--runs {runs}: no scores, benchmark.json, log.jsonl or toy3d.json in it; "
                        "`bash run_all.sh` makes them")
    return SimpleNamespace(scores=scores, benchmarks=benchmarks, logs=logs, toys=toys,
                           records=pool(scores, key), claims=[], out=out, plt=pyplot())


KEY = ("data", "size", "noise", "method", "lam", "flags", "tuned", "sampler", "steps", "attack", "percent")
PRICE = ("reg_share", "weighting", "network", "step")         # what tells apart the rows of `price`


def pool(scores, key):
    """One way to train and sample for each cell, in all its seeds: of several, that with the regulariser on
    most of the batch, then trained longest, then of most seeds, then of most samples. -> new records, with
    `cell` and `usual`. Of a way and seed that are there twice, the first counts."""
    cells, kept = {}, []
    for r in scores:
        if not r["left"]:
            ways = cells.setdefault(tuple(r[name] for name in key), {})
            way = ways.setdefault((r["reg_share"], r["step"], r["n"], r["variant"]), {})
            way.setdefault((r["seed"], *r["measures"]), r)
    for name, ways in cells.items():
        best = max(ways, key=lambda way: (way[0], way[1], len({seed for seed, *_ in ways[way]}), way[2]))
        kept += [dict(r, cell=name) for r in ways[best].values()]
    return mark_usual(kept)


# ----------------------------------------------------------------------------------------------------- tables

def columns(records, rows, names, numbers):
    """The data sets that a table or claim shows, as dict(data, size): those of the paper's (`names`) that are
    measured, or else any; of either only what fills more than half as many rows as the fullest does."""
    numbers, filled = {*numbers} | ({*BESIDE} if "distance" in numbers else set()), Counter()
    for where in rows:
        filled.update({(r["data"], r["size"]) for r in matching(records, where) if numbers & {*r}})
    full = sorted((data for data in filled if 2 * filled[data] > max(filled.values())),
                  key=lambda data: ([*DATA, data[0]].index(data[0]), data))
    chosen = [data for data in full if data[0] in names] or full or [([*names, "subspace"][0], None)]
    return [dict(data=data, size=size) for data, size in chosen]


def names_of(records, data, numbers):
    """The numbers that a data set has of those wanted, at least one: `distance` is the Fréchet distance that
    it has (FID before others), `beside` is what goes with that."""
    found = {name for r in matching(records, data) for name in r}
    distance = next((d for d in BESIDE if d in found), "FID" if data["data"] in DATA else "FD-exact")
    wanted = [{"distance": distance, "beside": BESIDE[distance]}.get(name, name) for name in numbers]
    return list(dict.fromkeys(name for name in wanted if name in found)) or wanted[:1]


def table(records, names, labels, rows, numbers=QUALITY):
    """Markdown: a line for each of rows [(labels, where)], a column for each data set of ours, and one for
    each of the paper's, `names`."""
    wheres, used, theirs = [where for _, where in rows], [], []
    ours = [(data, names_of(records, data, numbers)) for data in columns(records, wheres, names, numbers)]
    for data in [dict(data=name) for name in names if "distance" in numbers]:
        known = [n for n in ("FID", "IS") if any(paper(n, where | data) for where in wheres)]
        theirs += [(data, known)] if known else []
    exact = [(data, [f"{n}{EXACT}" for n in known]) for data, known in ours]
    exact = [(data, known) for data, known in exact
             if {*known} & {name for r in matching(records, data) for name in r}]
    header = [f"{whose} ({' / '.join(known)}, {label_of(data)})".replace(EXACT, "")
              for whose, sets in (("ours", ours), ("closed form", exact), ("paper", theirs))
              for data, known in sets]
    lines = []
    for texts, where in rows:
        line = [joined(show(cell(records, n, where | data)) for n in known) for data, known in ours + exact]
        line += [joined(plain(paper(n, where | data)) for n in known) for data, known in theirs]
        lines.append([*texts, *line])
        used += [r for data, known in ours for r in matching(records, where | data) if {*known} & {*r}]
    return f"{scale(used)}\n\n{markdown([*labels, *header], lines)}"


def markdown(header, rows):
    """A table of Markdown; a cell's | would end it."""
    return "".join("| " + " | ".join(str(text).replace("|", "\\|") for text in line) + " |\n"
                   for line in [header, ["---"] * len(header), *rows])


def digits(x):
    """A number to three significant digits, without an exponent."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}" if x else "0"


def show(found):
    """A cell as text."""
    if found is None:
        return DASH
    return digits(found[0]) + (f" ± {digits(found[1])}" if found[1] is not None else "")


def plain(value):
    """The paper's number as text."""
    return DASH if value is None else f"{value:g}"


def joined(texts):
    """Several numbers in one cell of a table; nothing measured is one dash."""
    texts = list(texts)
    return DASH if {*texts} == {DASH} else " / ".join(texts)


def label_of(data):
    """A data set's name as it is printed."""
    size = data.get("size")
    return DATA.get(data["data"], str(data["data"])) + (f" {size}×{size}" if size else "")


def in_words(*weightings):
    """Those of beyond.py that are not the paper's alone, for a caption."""
    return "" if weightings == ("paper",) else f", weighting {', '.join(weightings)}"


def sampler_name(sampler):
    """--sampler as a table has it."""
    return "Heun" if sampler == "heun" else sampler.upper()


def span(values):
    """The smallest and the largest of some numbers."""
    values = sorted({v for v in values if v is not None})
    return " to ".join(dict.fromkeys(f"{v:,}" for v in values[:1] + values[-1:])) or DASH


def scale(used):
    """The caption: what the numbers of a table were measured on."""
    if not used:
        return "Not measured yet."
    text = []
    for data in dict.fromkeys(map(label_of, used)):
        here = [r for r in used if label_of(r) == data]
        shares = sorted({r["reg_share"] for r in here if r["lam"] is not None}) or [1]
        text.append(f"{data}: network {', '.join(sorted({r['network'] for r in here}))}, trained for "
                    f"{span(r['step'] for r in here)} steps of {span(r['batch'] for r in here)} images"
                    + (f", regulariser on {' or '.join(map(plain, shares))} of them" if shares != [1] else "")
                    + in_words(*sorted({r["weighting"] for r in here}))
                    + f"; {span(r['n'] for r in here)} samples, " + ", ".join(
                        f"{sampler_name(name)} {span(r['steps'] for r in here if r['sampler'] == name)} steps"
                        for name in dict.fromkeys(r["sampler"] for r in here)))
    seeds = Counter(name for name, _ in {(r["cell"], r["seed"]) for r in used}).values()
    text.append(f"{span(seeds)} seed(s)" + (", ± their sample deviation" if max(seeds) > 1 else ""))
    return f"Scale: {'; '.join(text)}."


# ----------------------------------------------------------------------------------------------------- claims

# The letters are a claim's cells in their order. The rule holds where what comes out is above 0.
LESS = "a < b", lambda a, b: b - a
FALLS = "a > b > c", lambda a, b, c: min(a - b, b - c)
LOSES_LESS = "a − b < c − d", lambda a, b, c, d: c - d - (a - b)
ALIKE = "|a − b| < b / 10", lambda a, b: b / 10 - abs(a - b)
NEARER = "|a − b| < |a − c|", lambda a, b, c: abs(a - c) - abs(a - b)
COSTS = "a within 20 % of 2.5", lambda a: 0.5 - abs(a - 2.5)
EVERYWHERE = "a < e, b < f, c < g, d < h", lambda *v: min(y - x for x, y in zip(v[:4], v[4:]))


def judge(claim, place, shown, rule, margin, cells):
    """Whether a claim of the paper holds of measured numbers -> a row of the table of claims, plain values.

    place: where in the paper; shown: the data and number in words; cells: (mean, sample deviation or None,
    count) each, or None where nothing was measured. The rule, in words, holds where margin(*means) > 0;
    "within the seeds' spread": moving the means by their deviations can turn it.
    """
    means, deviations = ([found and found[k] for found in cells] for k in (0, 1))
    if None in means:
        verdict = "not measured"
    elif not any(means):
        verdict = "not decided (all 0)"
    else:
        holds = margin(*means) > 0
        moved = itertools.product(*((m - (d or 0), m + (d or 0)) for m, d in zip(means, deviations)))
        verdict = "holds" if holds else "does not hold"
        if any((margin(*values) > 0) != holds for values in moved):
            verdict += " (within the seeds' spread)"
    return dict(claim=claim, place=place, shown=shown, rule=rule, values=means, deviations=deviations,
                verdict=verdict)


def at_optimum(shown, found, predicted):
    """Whether training has reached what gaussian.py says of the method: found, a cell, against one number ->
    as `judge`."""
    rule = "|a − b| < b / 20, or a's deviation over seeds"
    spread = max(predicted / 20, (found and found[1]) or 0)
    cells = [found and (found[0], None, found[2]), (predicted, None, 1)]
    return judge("training is at the method's optimum", "closed form", shown, rule,
                 lambda a, b: spread - abs(a - b), cells) | dict(deviations=[found and found[1], None])


def claim(results, text, place, numbers, rule, *wheres):
    """Judges a claim on every data set and number that can show it: rows of results.claims, with the paper's
    own numbers as `paper`."""
    number, records = "FID" if numbers[0] == "distance" else numbers[0], results.records
    theirs = {name: [paper(number, where | dict(data=name)) for where in wheres] for name in DATA}
    theirs = {name: values for name, values in theirs.items() if None not in values}
    for data in columns(records, wheres, theirs, numbers):
        says = [f"{number} {DATA[name]}: {', '.join(map(plain, values))}"
                + ("" if rule[1](*values) > 0 else " (against its own claim)")
                for name, values in theirs.items() if name == data["data"] or data["data"] not in theirs]
        for own in names_of(records, data, numbers):
            cells = [cell(records, own, where | data) for where in wheres]
            results.claims.append(judge(text, place, f"{label_of(data)}, {own}", *rule, cells)
                                  | dict(paper="; ".join(says)))


def claims_table(claims):
    """The rows of `judge` as Markdown."""
    def ours(c):
        return ", ".join(show(None if mean is None else (mean, deviation))
                         for mean, deviation in zip(c["values"], c["deviations"], strict=True))

    return markdown(["claim", "paper", "rule", "data, number", "paper's numbers", "ours", ""], [
        [c["claim"], c["place"], c["rule"], c["shown"], c.get("paper") or "no number", ours(c), c["verdict"]]
        for c in claims])


# --------------------------------------------------------------------------------------------------- pictures

def link(name):
    """A figure of README.md."""
    return f"\n![{name}]({name}.png)\n"


def chart(results, name, figure):
    """Writes a matplotlib figure. -> its link."""
    save_figure(figure, results.out / f"{name}.png")
    return link(name)


def strip(results, name, rows, side=300):
    """Rows of titled pictures [(title, file), ...] as one PNG, each fitted into a square. -> its link."""
    rows = [row for row in rows if row]
    if not rows:
        return ""
    sheet = Image.new("RGB", (max(map(len, rows)) * (side + 8) - 8, len(rows) * (side + 20) - 4), "white")
    for i, row in enumerate(rows):
        for j, (title, file) in enumerate(row):
            with reading(file, "sample.py or train.py"), Image.open(file, formats=["PNG"]) as opened:
                picture = opened.convert("RGB")
            factor, filtered = side / max(picture.size), Image.Resampling.LANCZOS
            if factor > 1:                                  # by whole pixels, which stay sharp
                factor, filtered = int(factor), Image.Resampling.NEAREST
            picture = picture.resize([max(1, int(n * factor)) for n in picture.size], filtered)
            sheet.paste(picture, (j * (side + 8), i * (side + 20) + 16))
            ImageDraw.Draw(sheet).text((j * (side + 8), i * (side + 20) + 2), title, fill="black")
    with atomic_write(results.out / f"{name}.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return link(name)


def kinds_of(records):
    """The data sets and corruptions trained on: [(what selects one, the end of a file name)]."""
    names = ("data", "size", "noise")
    kinds = sorted({tuple(r[name] for name in names) for r in records})
    return [(dict(zip(names, kind)), re.sub(r"(?a)[^\w.]+", "-", "-".join(map(str, kind)))) for kind in kinds]


def sample_strips(results, name, models, least):
    """A strip of sample grids for each kind of data; models: {title: what else `of` takes}. -> links."""
    text = ""
    for kind, tail in kinds_of(results.records):
        row = []
        for title, more in models.items():
            found = sorted(matching(results.records, of(**more, **kind)), key=lambda r: r["seed"])
            row += [(title, r["picture"]) for r in found if r["picture"].is_file()][:1]
        text += strip(results, f"{name}-{tail}", [row] if len(row) >= least else [])
    return text


# ----------------------------------------------- the tables, in the paper's order; each -> its title and text

def toy3d(results):
    """What toy3d.py has measured, drawn and judged."""
    text = ""
    for found in sorted(results.toys, key=lambda found: found.sweep):           # the paper's figures first
        results.claims += found.claims
        text += found.text
        for file in found.figures:
            with atomic_write(results.out / file.name) as temporary:
                temporary.write_bytes(file.read_bytes())
            text += link(file.stem)
        text += "\n"
    return "3-D data: Fig. 2, 6 right, 10, 11 (the paper has figures only)", text or "Not measured yet."


def fig3(results):
    """PSNR and distance to the subspace on which the data lie."""
    numbers, noises = ["PSNR (dB)", "ρ", "FD-exact"], NOISES[:2]
    models = {"DDPM": ("ddpm", {}), "Robust_ran": ("ran", {}), "Robust_adv": ("adv", {}),
              "Inv_adv, λ 0.3": ("inv", {}), "Inv_adv, λ 0.03": ("inv", dict(lam=0.03))}
    rows = [((noise, label), of(method, noise, **more))
            for noise in noises for label, (method, more) in models.items()]
    for noise, lam in itertools.product(noises, (0.3, 0.03)):
        claim(results, f"invariance with λ {lam} fails, {noise}", "Fig. 3", ["ρ", "FD-exact"],
              LESS, of("ddpm", noise), of("inv", noise, lam=lam))
    noisy = NOISY[0]
    claim(results, f"invariance fails less with a smaller λ, {noisy}", "2.3, Fig. 3",
          ["ρ", "FD-exact"], LESS, of("inv", noisy, lam=0.03), of("inv", noisy))
    for m in ("ran", "adv"):
        claim(results, f"{m} beats DDPM in ρ, {noisy}", "3.1, Fig. 3", ["ρ"], LESS,
              of(m, noisy), of("ddpm", noisy))
        claim(results, f"{m} beats DDPM in PSNR, {noisy}", "3.1, Fig. 3", ["PSNR (dB)"], LESS,
              of("ddpm", noisy), of(m, noisy))
        claim(results, f"{m} is like DDPM on clean data", "3.1, Fig. 3", ["PSNR (dB)"], ALIKE,
              of(m, CLEAN), of("ddpm", CLEAN))
    return "Fig. 3: data on a linear subspace", (
        table(results.records, ["subspace"], ["training data", "model"], rows, numbers)
        + bars(results, rows, numbers[:2]))


def bars(results, rows, numbers):
    """Fig. 3's bars, a panel for each number and training data. -> the link, or ""."""
    data = columns(results.records, [where for _, where in rows], ["subspace"], numbers)[0]
    if not results.plt or not any(cell(results.records, numbers[0], where | data) for _, where in rows):
        return ""
    noises = list(dict.fromkeys(noise for (noise, _), _ in rows))
    figure, axes = results.plt.subplots(len(noises), len(numbers), figsize=(8, 5.5), layout="constrained")
    for (i, noise), (j, number) in itertools.product(enumerate(noises), enumerate(numbers)):
        shown = [(label, where) for (own, label), where in rows if own == noise]
        for k, (label, where) in enumerate(shown):
            if found := cell(results.records, number, where | data):
                axes[i, j].bar(k, found[0], yerr=found[1], color=COLOURS[where["method"]], capsize=3,
                               hatch="//" if where["lam"] == 0.03 else "")
        labels = [re.sub("_|, ", "\n", label) for label, _ in shown]
        axes[i, j].set_xticks(range(len(shown)), labels, fontsize=8)
        axes[i, j].set(ylabel=number, title=f"{label_of(data)}, {noise}")
    return chart(results, "fig3", figure)


def table1_top(results):
    """The two perturbations on noisy data."""
    for noise in NOISY:
        claim(results, f"adv beats ran, {noise}", "Table 1, top", NOISE_LEFT, LESS,
              of("adv", noise), of("ran", noise))
        claim(results, f"ran too beats DDPM, {noise}", "3.1, Tables 1 and 2", NOISE_LEFT, LESS,
              of("ran", noise), of("ddpm", noise))
    return "Table 1, top: random against adversarial perturbation", table(
        results.records, ["cifar10"], ["training data", "model"],
        [((noise, METHODS[m]), of(m, noise)) for noise in NOISY for m in ("ran", "adv")])


def table1_bottom(results):
    """Fewer sampling steps on clean data."""
    ddpm, adv = ({n: of(m, CLEAN, steps=n) for n in (300, 500, 1000)} for m in ("ddpm", "adv"))
    for n in (300, 500):
        claim(results, f"{n} steps instead of 1000 cost adv less than DDPM", "3.3, Table 1", ["distance"],
              LOSES_LESS, adv[n], adv[1000], ddpm[n], ddpm[1000])
        claim(results, f"adv beats DDPM at {n} steps, clean data", "Table 1, bottom", ["distance"], LESS,
              adv[n], ddpm[n])
    claim(results, "adv is better with 500 steps than with 1000, clean data", "3.3", ["distance"], LESS,
          adv[500], adv[1000])
    return "Table 1, bottom: fewer steps, clean data (the paper's 1000 are Table 2's)", table(
        results.records, ["cifar10"], ["steps", "model"],
        [((n, METHODS[m]), where[n]) for n in ddpm for m, where in (("ddpm", ddpm), ("adv", adv))])


def table2(results):
    """DDPM and Robust_adv at three corruptions, with both samplers; ImageNet-64 as section 3.1 has it."""
    for s in ("ddpm", "ddim"):
        ddpm, adv = ([of(m, noise, sampler=s) for noise in NOISES] for m in ("ddpm", "adv"))
        for k in (1, 2):
            claim(results, f"adv beats DDPM, {NOISES[k]}, {s.upper()} sampling", "Table 2",
                  NOISE_LEFT, LESS, adv[k], ddpm[k])
        claim(results, f"from σ 0.1 to 0.2 adv loses less than DDPM, {s.upper()} sampling", "3.1, Table 2",
              NOISE_LEFT, LOSES_LESS, adv[2], adv[1], ddpm[2], ddpm[1])
        claim(results, f"on clean data DDPM beats adv, {s.upper()} sampling", "Table 2", ["distance"], LESS,
              ddpm[0], adv[0])
    imagenet = matching(results.records, dict(data="imagenet64"))
    return "Table 2, and ImageNet-64 from 3.1", table(
        results.records, ["cifar10", "celeba", "lsun_bedroom"], ["training data", "sampling", "model"],
        [((noise, s.upper(), METHODS[m]), of(m, noise, sampler=s))
         for noise in NOISES for s in ("ddpm", "ddim") for m in ("ddpm", "adv")]) + "\n" + table(
        imagenet, ["imagenet64"], ["training data, ImageNet-64", "model"],
        [((noise, METHODS[m]), of(m, noise)) for noise in NOISY for m in ("ddpm", "adv")])


def cost(results):
    """A training step with the regulariser on the whole batch, by train.py --benchmark."""
    names, lines = ("data", "size", "network", "batch", "device"), []
    whole = matching(results.benchmarks, dict(method="adv", reg_share=1.0))
    for setting in sorted({tuple(r[name] for name in names) for r in whole}):
        own = dict(zip(names, setting), reg_share=1.0)
        label = f"{label_of(own)}, network {own['network']}, batch {own['batch']}, {own['device']}"
        found = {m: [cell(results.benchmarks, n, own | dict(method=m)) for n in ("seconds", "cost", "memory")]
                 for m in ("ddpm", "ran", "adv")}
        lines += [[label, METHODS[m], *map(show, cells), plain(paper("cost", dict(method=m)))]
                  for m, cells in found.items()]
        results.claims += [
            judge("a training step of adv costs 2.5 of DDPM's", "3.1", label, *COSTS, [found["adv"][1]])
            | dict(paper="2.5"),
            judge("ran costs less than adv", "3.1", label, *LESS, [found["ran"][1], found["adv"][1]])]
    return "3.1: cost of a training step", markdown(
        ["measured on", "model", "seconds", "× DDPM's", "peak memory (GiB)", "paper (× DDPM's)"],
        lines) if lines else "Not measured yet."


def invariance(results):
    """Eq. 5's invariance on clean data."""
    claim(results, "invariance fails, clean data", "2.3", NOISE_LEFT, LESS,
          of("ddpm", CLEAN), of("inv", CLEAN))
    return "2.3: invariance instead of equivariance, clean data", table(
        results.records, ["cifar10"], ["model"],
        [([METHODS[m]], of(m, CLEAN)) for m in ("ddpm", "adv", "inv")])


def samples(results):
    """The same seeds of two models side by side."""
    models = {"DDPM": dict(method="ddpm"), "Robust_adv": dict(method="adv"),
              "Robust_adv, 500 steps": dict(method="adv", steps=500)}
    return ("Fig. 4, 5, 12 to 23: samples of the same seeds side by side",
            sample_strips(results, "samples", models, least=1) or "Not made yet.")


def fig6(results):
    """How near generated images come to training images."""
    claim(results, "adv memorises less, clean data", "3.2, Fig. 6", ["share ≥ 0.9", "mean similarity"], LESS,
          of("adv", CLEAN), of("ddpm", CLEAN))
    rows = [([METHODS[m]], of(m, CLEAN)) for m in ("ddpm", "adv")]
    text = table(results.records, ["cifar10"], ["model"], rows,
                 ["share ≥ 0.9", "mean similarity", "95th percentile"])
    data = columns(results.records, [where for _, where in rows], ["cifar10"], ["histogram"])[0]
    seen = [r for _, where in rows for r in matching(results.records, where | data) if "histogram" in r]
    features = ", ".join(sorted({r["features"] for r in seen})) or DASH
    text += f"\nFeatures that are compared (the paper: DINOv2): {features}.\n"
    if results.plt and seen:
        figure, ax = results.plt.subplots(figsize=(5.5, 3.5), layout="constrained")
        edges, _, train = seen[0]["histogram"]
        lines = {METHODS[r["method"]]: (r["histogram"][1], COLOURS[r["method"]], "-") for r in seen}
        lines["training images"] = train, "black", ":"
        for label, (counts, colour, style) in lines.items():
            share = [100 * count / max(1, sum(counts)) for count in counts]
            ax.stairs(share, edges, label=label, color=colour, linestyle=style)
        ax.axvline(0.9, color="grey", linewidth=0.8)
        ax.set(xlabel=f"similarity to the nearest training image ({features})", ylabel="% of the images",
               title=f"{label_of(data)}, clean")
        ax.legend()
        text += chart(results, "fig6", figure)
    return "Fig. 6 left: similarity to the nearest training image, clean data", text


def fig7(results):
    """What lambda does."""
    lams = (0.1, 0.2, 0.3)
    for noise in NOISY:
        claim(results, f"noise left falls from λ 0.1 over 0.2 to 0.3, {noise}", "F.3, Fig. 7, 25",
              ["ρ", "noise estimate"], FALLS, *(of("adv", noise, lam=lam) for lam in lams))
    return "Fig. 7, 25: λ", table(
        results.records, ["lsun_bedroom"], ["training data", "λ"],
        [((noise, lam), of("adv", noise, lam=lam)) for noise in NOISES for lam in lams],
        [*QUALITY, "variance kept"]) + sample_strips(
            results, "fig7", {f"lambda {lam}": dict(method="adv", lam=lam) for lam in lams}, least=2)


def fig8(results):
    """Attacks on some of the sampling steps, clean data."""
    for attack in ATTACKS[:5]:
        adv, ddpm = ({k: of(m, CLEAN, attack=attack, percent=k) for k in PERCENT} for m in ("adv", "ddpm"))
        claim(results, f"adv withstands {attack} better than DDPM, at 25, 50, 75 and 100 %", "3.4, Fig. 8b",
              ["distance"], EVERYWHERE, *adv.values(), *ddpm.values())
        claim(results, f"{attack} on 100 % instead of 25 % of the steps costs adv less than DDPM",
              "3.4, Fig. 8b", ["distance"], LOSES_LESS, adv[100], adv[25], ddpm[100], ddpm[25])
    rows = [((attack or "none", f"{k} %", METHODS[m]), of(m, CLEAN, attack=attack, percent=k))
            for attack, k in [(None, 0), *itertools.product(ATTACKS, PERCENT)] for m in ("ddpm", "adv")]
    attacked = [r for r in results.records if r["attack"]]
    return "Fig. 8b: attacks on the sampling trajectory, clean data", (
        table(results.records, ["cifar10"], ["attack", "steps attacked", "model"], rows,
              [*QUALITY, "displacement", "by random signs as large"])
        + f"\npgd and eot: {span(r['iters'] for r in attacked)} iterations; eot: "
        f"{span(r['draws'] for r in attacked)} draws; as printed: Algorithms 3 and 4 but for 4's cost; "
        "noise: random signs; drift: ours. Displacement: rms a pixel, from the same noise's images without "
        "attack.\n"
        + attack_curves(results, rows))


def attack_curves(results, rows):
    """Fig. 8's curves: the distance over the share of the steps, random signs beside. -> the link, or ""."""
    data = columns(results.records, [where for _, where in rows], ["cifar10"], ["distance"])[0]
    number = names_of(results.records, data, ["distance"])[0]
    attacks = [a for a in ATTACKS if a != "noise" and matching(results.records, data | dict(attack=a))]
    if not results.plt or not attacks:
        return ""
    figure, axes = results.plt.subplots(1, len(attacks), figsize=(2.6 * len(attacks) + 0.6, 3), sharey=True,
                                        layout="constrained", squeeze=False)
    for ax, attack in zip(axes[0], attacks):
        for m, (name, style) in itertools.product(("ddpm", "adv"), {"noise": "o:", attack: "s-"}.items()):
            attacked = {k: of(m, CLEAN, attack=name, percent=k) | data for k in PERCENT}
            cells = {k: cell(results.records, number, where) for k, where in attacked.items()}
            cells = {k: found for k, found in cells.items() if found}
            ax.errorbar([*cells], [y for y, *_ in cells.values()], [d or 0 for _, d, _ in cells.values()],
                        fmt=style, color=COLOURS[m], capsize=2, markersize=4,
                        fillstyle="none" if name == "noise" else "full",
                        label=METHODS[m] + (", random signs" if name == "noise" else ""))
        ax.set(xlabel="% of the steps attacked", title=attack, xticks=PERCENT)
    axes[0, 0].set(yscale="log", ylabel=f"{number}, {label_of(data)}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return chart(results, "fig8", figure)


def fig24(results):
    """Up to five sample grids along the longest training of each model."""
    text = ""
    for kind, tail in kinds_of(results.logs):
        rows = []
        for method, lam in (("ddpm", None), ("adv", 0.3)):
            runs = matching(results.logs, kind | dict(method=method, lam=lam, tuned=False))
            grids = [grid for grid in max((r["grids"] for r in runs), key=lambda g: g[-1:], default=[])
                     if grid[1].is_file()]
            chosen = sorted({round(i * (len(grids) - 1) / 4) for i in range(5)}) if grids else []
            rows.append([(f"{METHODS[method]}, step {grids[i][0]:,}", grids[i][1]) for i in chosen])
        text += strip(results, f"fig24-{tail}", rows, side=180)
    return "Fig. 24: the same seeds along training", text or "Not made yet."


def table4(results):
    """DDPM's training with the regulariser at its end, against training with it from the start."""
    for noise in NOISY:
        claim(results, f"adv fine-tuned is nearer to adv from scratch than to DDPM, {noise}",
              "F.2, Table 4", NOISE_LEFT, NEARER,
              of("adv", noise, tuned=True), of("adv", noise), of("ddpm", noise))
    return "Table 4: fine-tuned against from scratch", table(
        results.records, ["celeba"], ["training data", "model", "trained"],
        [((noise, METHODS[m], how), of(m, noise, tuned=how == "fine-tuned"))
         for noise in NOISY for how in ("fine-tuned", "from scratch") for m in ("ddpm", "adv")])


def table5(results):
    """Noise-aware training, told the truth (oracle), wrong flags (conf1), or that all are noisy (conf2)."""
    for f in ("conf1", "conf2"):
        for noise in NOISY:
            claim(results, f"adv beats noise-aware training, {f}, {noise}", "G, Table 5",
                  NOISE_LEFT, LESS, of("adv", noise), of("ambient", noise, flags=f))
        claim(results, f"noise-aware training, {f}, beats adv on clean data", "Table 5", ["distance"], LESS,
              of("ambient", CLEAN, flags=f), of("adv", CLEAN))
    models = {METHODS["adv"]: ("adv", {})} | {f"noise-aware, {f}": ("ambient", dict(flags=f))
                                              for f in ("oracle", "conf1", "conf2")}
    return "Table 5: noise-aware training", table(
        results.records, ["cifar10"], ["training data", "model"],
        [((noise, label), of(method, noise, **more)) for noise in NOISES
         for label, (method, more) in models.items()])


def price(results):
    """Beyond the paper: the regulariser's share of the batch against cost and quality."""
    text = ""
    for kind, tail in kinds_of(r for r in results.records if r["reg_share"] < 1):
        here = [r for method, lam in (("ddpm", None), ("adv", 0.3))
                for r in matching(results.records, kind | dict(method=method, lam=lam, tuned=False))]
        numbers, rows = names_of(here, kind, [*QUALITY, "PSNR (dB)", "noise estimate"]), []
        ways = {tuple(r[name] for name in ("lam", "step", "network", "weighting", "reg_share")) for r in here}
        ways = sorted(ways, key=lambda way: (way[0] or 0, *way[1:4], -way[4]))
        for lam, step, network, weighting, share in ways:
            method = "adv" if lam else "ddpm"
            own = of(method, **kind, step=step, network=network, weighting=weighting, reg_share=share)
            measured = {name: own[name] for name in ("data", "size", "network", "method", "reg_share")}
            cells = [cell(results.benchmarks, "cost", measured), *(cell(here, n, own) for n in numbers),
                     cell(here, "displacement", own | dict(attack="fgsm", percent=100))]
            rows.append(([METHODS[method], plain(share) if lam else DASH, weighting, network,
                          f"{step:,}"], cells))
        title = f"{label_of(kind)}, {kind['noise']}"
        header = ["cost of a step (× DDPM's)", *numbers, "displacement"]
        text += f"{title}. {scale(here)}\n\n"
        text += markdown(["model", "share", "weighting", "network", "steps trained", *header],
                         [[*labels, *map(show, cells)] for labels, cells in rows])
        text += scatter(results, tail, title, header, rows) + "\n"
    return "The price (beyond the paper): the regulariser on a share of the batch", (
        text + "Displacement: by FGSM on all steps, rms a pixel." if text else "Not measured yet.")


def with_closed_form(results):
    """The scores that `optimum` shows, those with settings that no other table takes among them."""
    return [r for r in results.scores if "rule" in r and not r["attack"]]


def optimum(results):
    """Networks on subspace data beside what gaussian.py says of the method: how far their training came."""
    numbers, names = ("FD-exact", "ρ", "variance kept"), (
        "data", "size", "noise", "method", "lam", "odd", "tuned", "step", "sampler", "steps", "rule")
    found, rows = {}, []
    for r in with_closed_form(results):
        way = tuple(r[name] for name in names)
        found.setdefault((way, r["seed"]), dict(r, cell=way))
    found = list(found.values())
    for way in dict.fromkeys(sorted((r["cell"] for r in found), key=str)):
        where = dict(zip(names, way))
        pairs = [(cell(found, n, where), cell(found, n + EXACT, where)) for n in numbers]
        model = METHODS[where["method"]] + (f", λ {where['lam']}" if where["lam"] else "") + (
            f", {where['odd']}" if where["odd"] else "") + (", fine-tuned" if where["tuned"] else "")
        sampling = f"{sampler_name(where['sampler'])} {where['steps']}"
        rows.append([label_of(where), where["noise"], model, f"{where['step']:,}", sampling,
                     *(f"{show(ours)} ({show((form[0], None))})" for ours, form in pairs), where["rule"]])
        results.claims.append(at_optimum(", ".join([*rows[-1][:5], numbers[0]]), pairs[0][0], pairs[0][1][0]))
    header = ["data", "training data", "model", "steps trained", "sampling",
              *(f"{n} (closed form)" for n in numbers), "rule"]
    return "The closed form (beyond the paper): how near training is to the method's optimum", (
        f"{scale(found)} What is far from it is a training to be mended, and no fact about the method.\n\n"
        f"{markdown(header, rows)}" if rows else "Not measured yet.")


def scatter(results, tail, title, header, rows):
    """Every number of `price` over the cost of a step. -> the link, or ""."""
    if not results.plt:
        return ""
    count = len(header) - 1                                 # at least a distance and the displacement
    figure, axes = results.plt.subplots(1, count, figsize=(3 * count, 3), layout="constrained")
    for k, ax in enumerate(axes, 1):
        shown = [(labels, cells[0], cells[k]) for labels, cells in rows if cells[0] and cells[k]]
        for (model, share, weighting, *_), x, y in shown:
            ax.errorbar(x[0], y[0], y[1], x[1], capsize=2, fmt="o" if weighting == "paper" else "s",
                        color=COLOURS["ddpm" if share == DASH else "adv"])
            ax.annotate(model if share == DASH else share, (x[0], y[0]), (4, 4), fontsize=7,
                        textcoords="offset points")
        sizes = [y[0] for _, _, y in shown] or [1]
        far = max(sizes) > 20 * min(sizes) > 0
        ax.set(xlabel=header[0], ylabel=header[k], yscale="log" if far else "linear")
    figure.suptitle(f"{title}; beside each point the share, squares: not the paper's weighting", fontsize=9)
    return chart(results, f"price-{tail}", figure)


# ------------------------------------------------------------------------------------------- the command line

TABLES = {one.__name__: one for one in (
    toy3d, fig3, table1_top, table1_bottom, table2, cost, invariance, samples, fig6, fig7, fig8, fig24,
    table4, table5, optimum, price)}


def origin(args):
    """What README.md begins with: the command, commit, date and machine, without a path of this machine."""
    def short(path):
        path = path.resolve()
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name

    tables = " ".join(args.tables)
    command = f"python report.py --runs {short(args.runs)} --out {short(args.out)} --tables {tables}"
    commit, processor = "unknown", platform.processor() or platform.machine()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent, check=True,
                              capture_output=True, text=True)
        commit = done.stdout.strip()
    with contextlib.suppress(OSError, StopIteration):       # Linux has a better name
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n")
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"Made by `{command}` at commit {commit}, {time.strftime('%Y-%m-%d')}, on {platform.system()}, "
            f"{processor}, {os.cpu_count()} cores, {device}.")


HEADER = f"""{DASH}: not measured. Only a Fréchet distance on the features of the published Inception weights
is an FID. ρ: the noise left outside the data's subspace."""
CLAIMS = """A claim holds where its rule does, on the means over seeds; the letters are the numbers in their
order. "Within the seeds' spread": moving the means by their deviations can turn it."""


def main(argv=None):
    """Writes OUT/README.md and its figures."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with runs and scores, at any depth")
    parser.add_argument("--out", type=Path, help="folder for README.md and its figures (default: RUNS)")
    parser.add_argument("--tables", nargs="+", default=[name for name in TABLES if name != "price"],
                        help=f"some of {', '.join(TABLES)} (default: all but price)")
    args = parser.parse_args(argv)
    args.out = args.out or args.runs
    for name in args.tables:
        if name not in TABLES:
            raise UserError(f"--tables {name}: there is no such table; they are {', '.join(TABLES)}")
    if "price" in args.tables and len(args.tables) > 1:
        raise UserError("--tables price: stands alone, it tells runs apart that other tables do not")
    check_out(args.out / "README.md")
    results = read_runs(args.runs, args.out, KEY + PRICE if "price" in args.tables else KEY)
    sections = [TABLES[name](results) for name in TABLES if name in args.tables]
    counts = Counter(c["verdict"].split(" (")[0] for c in results.claims)
    said = (f"of the claims {counts['holds']} hold, {counts['does not hold']} do not, "
            f"{len(results.claims) - counts['holds'] - counts['does not hold']} are not measured")
    charts = "" if results.plt else " No charts: matplotlib was not installed."
    sections.insert(0, ("Results", f"{origin(args)}\n\n{HEADER}{charts}"))
    if results.claims:
        sections.append(("Claims", f"{said.capitalize()}. {CLAIMS}\n\n{claims_table(results.claims)}"))
    shown = {r["path"] for r in results.records}
    if "optimum" in args.tables:
        shown |= {r["path"] for r in with_closed_form(results)}
    left = [f"- `{r['path'].relative_to(args.runs)}`: {r['left'] or 'another has its cell'}"
            for r in results.scores if r["path"] not in shown]
    if left:
        sections.append(("Left out", "\n".join(left)))
    with atomic_write(args.out / "README.md") as temporary:
        text = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections)
        temporary.write_text(text[1:] + "\n", encoding="utf-8",            # the first title is the page's
                             errors="backslashreplace")     # a name that is not UTF-8
    print(f"made {args.out}/README.md" + (f": {said}" if results.claims else ""))


if __name__ == "__main__":
    command_line(main)
