"""Every table and figure of the paper, from what the other scripts left below RUNS.

    python report.py --runs runs/quick                      # runs/quick/README.md and its figures
    python report.py --runs runs/quick --tables table2 fig8 --out results
    python report.py --runs runs/speed --tables speed       # beyond the paper, only where asked for

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

from common import (UserError, atomic_write, check_out, command_line, parser_of, pyplot,
                    save_figure)

DATA = {"cifar10": "CIFAR-10", "celeba": "CelebA", "lsun_bedroom": "LSUN Bedroom",
        "imagenet64": "ImageNet-64"}
METHODS = {"ddpm": "DDPM", "ran": "Robust_ran", "adv": "Robust_adv", "inv": "Inv_adv"}
COLOURS = {"ddpm": "#0072B2", "ran": "#009E73", "adv": "#D55E00", "inv": "#CC79A7"}     # for every eye
MODEL_COLOURS = {METHODS[method]: colour for method, colour in COLOURS.items()}
CLEAN, *NOISY = NOISES = ["clean", "90 % with σ 0.1", "90 % with σ 0.2"]       # as `noise_name` has it
ATTACKS = ["fgsm", "pgd", "pgd as printed", "eot", "eot as printed", "noise", "drift"]
PERCENT = [25, 50, 75, 100]                                 # of the sampling steps
BESIDE = {"FID": "IS", "FD-inception": "IS", "FD-exact": "ρ", "FD-pixels": "noise estimate"}
QUALITY, NOISE_LEFT = ["distance", "beside"], ["distance", "ρ"]         # see `names_of`
THREE = "FD-exact", "ρ", "variance kept"
EXACT = ", closed form"                                     # after the name of a number: gaussian.py's
DASH, NOT_YET = "–", "Not measured yet."


# --------------------------------------------------------------------- a cell of a table, and what selects it

def of(method, noise, sampler="ddpm", **more):
    """What selects a model's samples: the paper's lambda, trained from scratch, Eq. 4 with the usual number
    of steps or what takes its place (see `mark_usual`), no attack, unless the arguments say otherwise."""
    where = dict(method=method, noise=noise, lam=None if method in ("ddpm", "ambient") else 0.3, flags=None,
                 tuned=False, attack=None, percent=None)
    return where | (dict(sampler=sampler) if "steps" in more else dict(usual=sampler)) | more


def noise_name(p, sigma, corruption="gaussian"):
    """The training data's corruption in words; p or sigma alone corrupts nothing, but for outliers."""
    if corruption == "outliers":
        return f"{100 * p:g} % outliers"
    kind = "" if corruption == "gaussian" else f"{corruption} "
    return f"{100 * p:g} % with {kind}σ {sigma:g}" if p and sigma else CLEAN


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


def pair(records, number, where):
    """The cell of a number, and that of its closed form, which is the same for all seeds."""
    form = cell(records, number + EXACT, where)
    return cell(records, number, where), form and (form[0], None, form[2])


def distinct(records, *names):
    """Every combination of these values that there is, as dicts; None comes first."""
    found = {tuple(r[name] for name in names) for r in records}
    return [dict(zip(names, way)) for way in sorted(found, key=lambda way: [(v is not None, v) for v in way])]


def mark_usual(records):
    """Marks as `usual` for ddpm or ddim, for each data set, the number of steps that most records have (of
    two, the larger); attacked samples apart. Heun's is ddpm's where more records have it than any number of
    DDPM's steps. -> records."""
    groups = {}
    for r in records:
        place = "ddpm" if r["sampler"] == "heun" else r["sampler"]
        groups.setdefault((r["data"], r["size"], place, r["percent"] is None), []).append(r)
    for (_, _, place, _), own in groups.items():
        counts = Counter((r["sampler"] != "heun", r["steps"] or 0) for r in own)
        usual = max(counts, key=lambda way: (counts[way], way))
        for r in own:
            r["usual"] = place if (r["sampler"] != "heun", r["steps"] or 0) == usual else None
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
        data=data["name"], size=data["size"],
        noise=noise_name(data["p"], data["sigma"], data.get("corruption", "gaussian")),
        tuned=training["init"] is not None, network=f"{network['channels']} × {tuple(network['mult'])}",
        precondition=network.get("sigma_data") is not None,
        variant=json.dumps([same, network, config["process"], data["data_seed"]], sort_keys=True)))


def numbers_of(result):
    """What a score file of fid.py, memorize.py or attack.py measured, by the names that the tables show."""
    names = {"is_mean": "IS", "rho_mean": "ρ", "psnr": "PSNR (dB)", "variance_kept": "variance kept",
             "noise_mean": "noise estimate", "rms": "displacement", "rms_noise": "by random signs as large"}
    numbers, more = {names[key]: value for key, value in result.items() if key in names}, {}
    if result.get("metric") == "memorisation":
        histogram = result["histogram"]
        numbers, yardstick = ({"share ≥ 0.9": own["share"], "mean similarity": own["mean"], "95th percentile":
                               own["p95"]} for own in (result["generated"], result["train"]))
        edges, *counts = (np.array(histogram[name], float) for name in ("edges", "generated", "train"))
        if edges.ndim != 1 or {each.shape for each in counts} != {(len(edges) - 1,)}:
            raise ValueError("a histogram whose edges do not fit")
        more = {"features": str(result["features"]), "histogram": [edges, *counts],
                "yardstick": {number: float(value) for number, value in yardstick.items()}}
    elif "metric" in result:
        names["value"], form = result["metric"], result.get("closed_form")
        numbers = {result["metric"]: result["value"]} | numbers if result["metric"] in BESIDE else {}
        if numbers and form:
            numbers |= {names[key] + EXACT: value for key, value in form.items() if key in names}
            more = {"rule": str(form["closed_form"])}
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
        if percent:                                         # of 0 % of the steps it is none
            name = attack["name"] + (" as printed" if attack["as_printed"] else "")
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
        config, methods, records = result["config"], result["methods"], []
        for method, own in methods.items():
            model = facts(config | dict(training=config["training"] | dict(method=method)))
            records.append(checked(model | dict(
                device=result["device"], seconds=own["seconds"], memory=own["peak_gib"],
                cost=own["seconds"] / methods["ddpm"]["seconds"])))
        return records


def read_log(path):
    """A run's log.jsonl -> [its `facts` and sample grids, (step, file)]; [] if it died before its start."""
    with reading(path, "train.py"), opened(path, 1 << 30) as file:
        lines = (json.loads(text, parse_int=whole) for text in file if text.endswith("\n"))  # or in writing
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
        text = ("{}. Scale: {steps:,} steps of {batch} points; {num_samples} samples, "
                "{seeds} seed(s), ± their sample deviation.\n\n{}").format(
            path.stem, markdown(["data", "configuration", *names.values(), *exact.values()], rows),
            **protocol)
        claims_table(claims)                                # whether they are what `judge` gives
        claims.sort(key=lambda c: VERDICTS.index(c["verdict"]))
        figures = [path.with_name(Path(name).stem + ".png") for name in protocol["figures"]]
        return SimpleNamespace(text=text, claims=claims, sweep=str(protocol["sweep"] or ""),
                               figures=[file for file in figures if file.is_file()])


def read_runs(args, key):
    """Everything below --runs. -> scores, benchmarks, logs, toys; records: the scores that the tables show,
    see `pool`; shown: their files; claims: [], to be filled; plt: pyplot or None; out: args'."""
    runs = args.runs
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
    records = pool(scores, key)
    return SimpleNamespace(scores=scores, benchmarks=benchmarks, logs=logs, toys=toys, records=records,
                           shown={r["path"] for r in records}, claims=[], plt=pyplot(), out=args.out)


KEY = ("data", "size", "noise", "method", "lam", "flags", "tuned", "sampler", "steps", "attack", "percent")
COSTED = ("data", "size", "method", "network", "precondition", "batch", "reg_share")    # a training step
SPEED = ("weighting", "precondition", "network", "reg_share", "step")         # and of the rows of `speed`


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
    def text(whose, number, where):
        if whose == "paper":
            return plain(paper(number, where))
        found, form = pair(records, number, where)
        return show(found if whose == "ours" else form)

    wheres, used = [where for _, where in rows], []
    ours = [(data, names_of(records, data, numbers)) for data in columns(records, wheres, names, numbers)]
    groups = [("ours", data, known) for data, known in ours]           # a column for each
    for data, known in ours:
        if any(number + EXACT in r for r in matching(records, data) for number in known):
            groups.append(("closed form", data, known))
    for data in [dict(data=name) for name in names if "distance" in numbers]:
        if known := [n for n in ("FID", "IS") if any(paper(n, where | data) for where in wheres)]:
            groups.append(("paper", data, known))
    header = [f"{whose} ({' / '.join(known)}, {label_of(data)})" for whose, data, known in groups]
    lines = []
    for texts, where in rows:
        lines.append([*texts, *(joined(text(whose, number, where | data) for number in known)
                                for whose, data, known in groups)])
        used += [r for data, known in ours for r in matching(records, where | data) if {*known} & {*r}]
    place = " Heun's sampling takes the place of DDPM's." if any(r["sampler"] == "heun" for r in used) else ""
    return f"{scale(used)}{place}\n\n{markdown([*labels, *header], lines)}"


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


def with_form(found, form):
    """The two of `pair` as text."""
    return show(found) + (f" ({show(form)})" if form else "")


def text_of(records, number, where):
    """A number as text, its closed form in brackets."""
    return with_form(*pair(records, number, where))


def with_forms(numbers):
    """The head of columns of `text_of`."""
    return [f"{number} (closed form)" for number in numbers]


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


def sampler_name(sampler):
    """--sampler as a table has it."""
    return "Heun" if sampler == "heun" else sampler.upper()


def sampling(where):
    """How samples were made, in words."""
    return f"{sampler_name(where['sampler'])} {where['steps']}"


def span(values):
    """The smallest and the largest of some numbers."""
    values = sorted({v for v in values if v is not None})
    return " to ".join(dict.fromkeys(f"{v:,}" for v in values[:1] + values[-1:])) or DASH


def scale(used):
    """The caption: what the numbers of a table were measured on."""
    if not used:
        return NOT_YET
    text = []
    for data in dict.fromkeys(map(label_of, used)):
        here = [r for r in used if label_of(r) == data]
        networks, weightings = (sorted({r[name] for r in here}) for name in ("network", "weighting"))
        shares = sorted({r["reg_share"] for r in here if r["lam"] is not None}) or [1]
        own = (f"{data}: network {', '.join(networks)}, trained for {span(r['step'] for r in here)} steps of "
               f"{span(r['batch'] for r in here)} images")
        if shares != [1]:
            own += f", regulariser on {' or '.join(map(plain, shares))} of them"
        if weightings != ["paper"]:
            own += f", weighting {', '.join(weightings)}"
        if any(r["precondition"] for r in here):
            own += ", preconditioned"
        own += f"; {span(r['n'] for r in here)} samples"
        for name in dict.fromkeys(r["sampler"] for r in here):
            own += f", {sampler_name(name)} {span(r['steps'] for r in here if r['sampler'] == name)} steps"
        text.append(own)
    seeds = Counter(name for name, _ in {(r["cell"], r["seed"]) for r in used}).values()
    text.append(f"{span(seeds)} seed(s)" + (", ± their sample deviation" if max(seeds) > 1 else ""))
    return f"Scale: {'; '.join(text)}."


# ----------------------------------------------------------------------------------------------------- claims

VERDICTS = HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot show"
# The letters are a claim's cells in their order. The rule holds where what comes out is above 0.
LESS = "a < b", lambda a, b: b - a
FALLS = "a > b > c", lambda a, b, c: min(a - b, b - c)
LOSES_LESS = "a − b < c − d", lambda a, b, c, d: c - d - (a - b)
ALIKE = "|a − b| < b / 10", lambda a, b: b / 10 - abs(a - b)
NEARER = "|a − b| < |a − c|", lambda a, b, c: abs(a - c) - abs(a - b)
COSTS = "a within 20 % of 2.5", lambda a: 0.5 - abs(a - 2.5)
EVERYWHERE = "a < e, b < f, c < g, d < h", lambda *v: min(y - x for x, y in zip(v[:4], v[4:]))


def verdict_of(margin, cells):
    """-> one of VERDICTS, and why nothing can be shown, or "". As `judge` says."""
    if any(found is None or found[0] is None for found in cells):
        return OPEN, "not measured"
    means = [mean for mean, *_ in cells]
    if not any(means):
        return OPEN, "all are 0"
    points = 9 if len(cells) < 4 else 2         # a rule of more numbers is monotone in each: its ends suffice
    moved = []
    for mean, deviation, _ in cells:
        by = abs(mean) / 10 if deviation is None else deviation
        moved.append(np.linspace(mean - by, mean + by, points).tolist())
    holds = margin(*means) > 0
    if any((margin(*values) > 0) != holds for values in itertools.product(*moved)):
        return OPEN, "within the deviations"
    return HOLDS if holds else FAILS, ""


def judge(claim, place, shown, rule, margin, cells, exact=()):
    """Whether a claim of the paper holds of measured numbers -> a row of the table of claims, plain values.

    place: where in the paper; shown: the data and number in words; cells: (mean, sample deviation or None of
    one seed, count) each, or None where nothing was measured; exact: their closed forms, or None where there
    is none. The rule, in words, holds where margin(*means) > 0. See CLAIMS for `verdict`; `why`: what leaves
    it open; `closed_form`: its verdict on the closed forms, or None.
    """
    verdict, why = verdict_of(margin, cells)
    predicted = verdict_of(margin, [(x, 0.0, 1) for x in exact])[0] if exact and None not in exact else None
    means, deviations = ([found and found[k] for found in cells] for k in (0, 1))
    return dict(claim=claim, place=place, shown=shown, rule=rule, values=means, deviations=deviations,
                verdict=verdict, why=why, closed_form=predicted)


def claim(results, text, place, numbers, rule, *wheres):
    """Judges a claim on every data set and number that can show it: rows of results.claims, with the paper's
    own numbers as `paper`."""
    number, records = "FID" if numbers[0] == "distance" else numbers[0], results.records
    theirs = {name: [paper(number, where | dict(data=name)) for where in wheres] for name in DATA}
    theirs = {name: values for name, values in theirs.items() if None not in values}
    for data in columns(records, wheres, theirs, numbers):
        says = []
        for name, values in theirs.items():
            if name == data["data"] or data["data"] not in theirs:
                note = "" if rule[1](*values) > 0 else " (against its own claim)"
                says.append(f"{number} {DATA[name]}: {', '.join(map(plain, values))}{note}")
        for own in names_of(records, data, numbers):
            cells, forms = zip(*(pair(records, own, where | data) for where in wheres))
            exact = [form and form[0] for form in forms]
            results.claims.append(judge(text, place, f"{label_of(data)}, {own}", *rule, cells, exact)
                                  | dict(paper="; ".join(says)))


def claims_table(claims):
    """The rows of `judge` as Markdown."""
    def ours(c):
        return ", ".join(show(None if mean is None else (mean, deviation))
                         for mean, deviation in zip(c["values"], c["deviations"], strict=True))

    header = ["claim", "paper", "rule", "data, number", "paper's numbers", "ours", "closed form", ""]
    return markdown(header, [[c["claim"], c["place"], c["rule"], c["shown"], c.get("paper") or "no number",
                              ours(c), c["closed_form"] or DASH, c["why"]] for c in claims])


def claims_text(claims):
    """The sentence that counts the claims, and their section: a table for each verdict."""
    groups = {verdict: [c for c in claims if c["verdict"] == verdict] for verdict in VERDICTS}
    said = "of the claims {} hold, {} do not hold, {} cannot be shown at this scale".format(
        *map(len, groups.values()))
    opposite = sum({c["verdict"], c["closed_form"]} == {HOLDS, FAILS} for c in claims)
    text = f"{CLAIMS}\n\n{said.capitalize()}; of {opposite} the closed form says the opposite.\n\n"
    return said, text + "\n".join(f"### {verdict.capitalize()}: {len(own)}\n\n{claims_table(own)}"
                                  for verdict, own in groups.items() if own)


# --------------------------------------------------------------------------------------------------- pictures

def link(name):
    """A figure of README.md."""
    return f"\n![{name}]({name}.png)\n"


def chart(results, name, figure):
    """Writes a matplotlib figure. -> its link."""
    save_figure(figure, results.out / f"{name}.png")
    return link(name)


def curves(results, name, panels, xlabel, ylabel="", xscale="log"):
    """A panel for each of {title: {label: [(x, cell or None, closed form or None)]}} that has a label; closed
    forms are dashed, y is logarithmic. A model has its colour, and open marks with something in brackets
    behind its name. -> the link, or "" where there is nothing, or no matplotlib."""
    panels = {title: lines for title, lines in panels.items() if lines}
    if not results.plt or not panels:
        return ""
    figure, axes = results.plt.subplots(1, len(panels), figsize=(3.2 * len(panels) + 0.6, 3.6), squeeze=False,
                                        sharey=bool(ylabel), layout="constrained")
    for ax, (title, lines) in zip(axes[0], panels.items()):
        for k, (label, points) in enumerate(lines.items()):
            method, bracket, _ = label.partition(" (")
            colour = MODEL_COLOURS.get(method, f"C{k}")
            measured = [(x, found) for x, found, _ in points if found]
            ax.errorbar([x for x, _ in measured], [found[0] for _, found in measured],
                        [found[1] or 0 for _, found in measured], fmt="o:" if bracket else "o-", color=colour,
                        capsize=2, markersize=4, markerfacecolor="white" if bracket else colour, label=label)
            exact = [(x, form[0]) for x, _, form in points if form]
            if exact:
                ax.plot([x for x, _ in exact], [y for _, y in exact], "--", color=colour)
                ax.plot([], [], "--", color="grey", label="closed form")    # in the legend, of no one model
        ax.set(xscale=xscale, yscale="log", title=title, xlabel=xlabel)
        ax.tick_params(which="minor", labelsize=6)          # of less than a decade: they would meet
        if xscale == "linear":
            ax.set_xticks(sorted({x for points in lines.values() for x, *_ in points}))
    axes[0, 0].set_ylabel(ylabel)
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels())}
    fit = max(1, int(13 * figure.get_figwidth() / (6 + max(map(len, handles), default=0))))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=fit, fontsize=8)
    return chart(results, name, figure)


def tiles_of(file, size, count=16):
    """The first images of a grid by common.save_grid, `size` pixels wide -> uint8 [n, size, size, 3]."""
    with reading(file, "sample.py or train.py"), Image.open(file, formats=["PNG"]) as picture:
        grid, step = np.asarray(picture.convert("RGB")), size + 2
        rows, columns = ((length + 2) // step for length in grid.shape[:2])
        places = range(min(count, rows * columns) if size > 0 else 0)
        return np.stack([grid[step * (k // columns):, step * (k % columns):][:size, :size] for k in places])


def strip(results, name, rows):
    """[(title, uint8 images [n, size, size, 3]), ...] below each other as one PNG, 8 images a row, enlarged
    by whole factors to 64 pixels or more; from more than 128 shrunk to that. -> its link, "" of no rows."""
    if not rows:
        return ""
    size = rows[0][1].shape[1]
    side = size * -(-64 // size) if size <= 128 else 128
    how = Image.Resampling.NEAREST if side >= size else Image.Resampling.LANCZOS
    tops = [*itertools.accumulate((16 + (side + 2) * -(-len(images) // 8) for _, images in rows), initial=0)]
    sheet = Image.new("RGB", (8 * (side + 2) - 2, tops[-1] - 2), "white")
    letters = str.maketrans({"λ": "lambda", "ω": "omega", "σ": "sigma"})        # Pillow's font has no Greek
    for (title, images), top in zip(rows, tops):
        ImageDraw.Draw(sheet).text((0, top + 2), title.translate(letters), fill="black")
        for k, image in enumerate(images):
            place = k % 8 * (side + 2), top + 16 + k // 8 * (side + 2)
            sheet.paste(Image.fromarray(image).resize((side, side), how), place)
    with atomic_write(results.out / f"{name}.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return link(name)


def kinds_of(records):
    """The data sets and corruptions trained on: [(what selects one, the end of a file name)]."""
    return [(kind, re.sub(r"(?a)[^\w.]+", "-", "-".join(map(str, kind.values()))))
            for kind in distinct(records, "data", "size", "noise")]


def model_strip(results, name, kind, models):
    """A strip of the images that models [(title, record)] were trained on, and of each one's samples, as far
    as they are there. -> its link, or ""."""
    seen = models[0][1]["picture"].with_name("training-images.png")
    files = [(f"training images, {kind['noise']}", seen), *((title, r["picture"]) for title, r in models)]
    return strip(results, name, [(title, tiles_of(file, kind["size"]))
                                 for title, file in files if file.is_file()])


def sample_strips(results, name, models, least):
    """A strip of samples for each kind of data; models: {title: what else `of` takes}. -> links."""
    text = ""
    for kind, tail in kinds_of(results.records):
        found = []
        for title, more in models.items():
            own = sorted(matching(results.records, of(**more, **kind)), key=lambda r: r["seed"])
            found += [(title, r) for r in own if r["picture"].is_file()][:1]
        if len(found) >= least:
            text += model_strip(results, f"{name}-{tail}", kind, found)
            print(f"made {results.out}/{name}-{tail}.png")
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
    return "3-D data: Fig. 2, 6 right, 10, 11 (the paper has figures only)", text


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
    claim(results, f"invariance fails less with a smaller λ, {noisy}", "2.3, Fig. 3", ["ρ", "FD-exact"], LESS,
          of("inv", noisy, lam=0.03), of("inv", noisy))
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


def costs_of(results, where):
    """What a training step cost by train.py --benchmark: the cells of seconds, of DDPM's steps, of memory."""
    return [cell(results.benchmarks, number, where) for number in ("seconds", "cost", "memory")]


def cost(results):
    """A training step with the regulariser on the whole batch, by train.py --benchmark."""
    lines, on_all = [], matching(results.benchmarks, dict(method="adv", reg_share=1.0))
    for own in distinct(on_all, "data", "size", "network", "precondition", "batch", "device", "reg_share"):
        kind = ", preconditioned" if own["precondition"] else ""
        label = f"{label_of(own)}, network {own['network']}{kind}, batch {own['batch']}, {own['device']}"
        found = {m: costs_of(results, own | dict(method=m)) for m in ("ddpm", "ran", "adv")}
        lines += [[label, METHODS[m], *map(show, cells), plain(paper("cost", dict(method=m)))]
                  for m, cells in found.items()]
        ran, adv = found["ran"][1], found["adv"][1]
        results.claims += [
            judge("a training step of adv costs 2.5 of DDPM's", "3.1", label, *COSTS, [adv])
            | dict(paper="2.5"),
            judge("ran costs less than adv", "3.1", label, *LESS, [ran, adv])]
    return "3.1: cost of a training step", markdown(
        ["measured on", "model", "seconds", "× DDPM's", "peak memory (GiB)", "paper (× DDPM's)"],
        lines) if lines else ""


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
    for r in seen[:1]:
        own = "; ".join(f"{number} {digits(value)}" for number, value in r["yardstick"].items())
        text += f"Training images, each with the nearest other one: {own}.\n"
    if results.plt and seen:
        figure, ax = results.plt.subplots(figsize=(5.5, 3.5), layout="constrained")
        edges, _, train = seen[0]["histogram"]
        filled = [low for r in seen for low, *counts in zip(*r["histogram"]) if any(counts)]
        lines = {METHODS[r["method"]]: (r["histogram"][1], COLOURS[r["method"]], "-") for r in seen}
        lines["training images"] = train, "black", ":"
        for label, (counts, colour, style) in lines.items():
            share = [100 * count / max(1, sum(counts)) for count in counts]
            ax.stairs(share, edges, label=label, color=colour, linestyle=style)
        ax.axvline(0.9, color="grey", linewidth=0.8, label="0.9: the same image, says the paper")
        ax.set(xlim=(min(filled), 1), xlabel=f"similarity to the nearest training image ({features})",
               ylabel="% of the images", title=f"{label_of(data)}, clean")
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
            results, "fig7", {f"λ {lam}": dict(method="adv", lam=lam) for lam in lams}, least=2)


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
    attacked, panels = [r for r in results.records if r["attack"]], {}
    data = columns(results.records, [where for _, where in rows], ["cifar10"], ["distance"])[0]
    number = names_of(results.records, data, ["distance"])[0]
    for attack in ATTACKS:
        if attack != "noise" and matching(attacked, data | dict(attack=attack)):
            panels[attack] = {}
            for a, bracket in {attack: "", "noise": " (random signs)"}.items():
                for m in ("ddpm", "adv"):
                    ways = {k: of(m, CLEAN, attack=a if k else None, percent=k) for k in (0, *PERCENT)}
                    panels[attack][METHODS[m] + bracket] = [
                        (k, cell(results.records, number, way | data), None) for k, way in ways.items()]
    drifting = {"drift": panels.pop("drift", {})}           # on an axis of its own: it is so much stronger
    axes = "% of the steps attacked", f"{number}, {label_of(data)}", "linear"
    return "Fig. 8b: attacks on the sampling trajectory, clean data", (
        table(results.records, ["cifar10"], ["attack", "steps attacked", "model"], rows,
              [*QUALITY, "displacement", "by random signs as large"])
        + f"\npgd and eot: {span(r['iters'] for r in attacked)} iterations; eot: "
        f"{span(r['draws'] for r in attacked)} draws; as printed: Algorithms 3 and 4 but for 4's cost; "
        "noise: random signs; drift: ours. Displacement: rms a pixel, from the same noise's images without "
        "attack; by random signs as large: of other draws than noise's.\n"
        + curves(results, "fig8", panels, *axes) + curves(results, "fig8-drift", drifting, *axes))


def fig24(results):
    """Up to five sample grids along the longest training of each model, the first images of each."""
    text = ""
    for kind, tail in kinds_of(results.logs):
        rows = []
        for method, lam in (("ddpm", None), ("adv", 0.3)):
            runs = matching(results.logs, kind | dict(method=method, lam=lam, tuned=False))
            grids = [grid for grid in max((r["grids"] for r in runs), key=lambda g: g[-1:], default=[])
                     if grid[1].is_file()]
            chosen = sorted({round(i * (len(grids) - 1) / 4) for i in range(5)}) if grids else []
            rows += [(f"{METHODS[method]}, step {grids[i][0]:,}", tiles_of(grids[i][1], kind["size"], 8))
                     for i in chosen]
        text += strip(results, f"fig24-{tail}", rows)
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


def speed(results):
    """Beyond the paper: what each way to train costs and gives, and how soon it is at its closed form."""
    text = ""
    for kind, tail in kinds_of(r for r in results.records if {*r} & {*BESIDE}):
        here = matching(results.records, kind | dict(tuned=False, flags=None))
        numbers, rows = names_of(here, kind, [*QUALITY, "PSNR (dB)", "noise estimate"]), []
        panels = {number: {} for number in numbers}
        scored = [r for r in here if r["method"] in METHODS and r["lam"] in (None, 0.3)
                  and r["percent"] is None and numbers[0] in r]
        for own in distinct(scored, "lam", "method", "batch", "sampler", "steps", *SPEED[:-1]):
            labels = [METHODS[own["method"]], plain(own["reg_share"]) if own["lam"] else DASH,
                      own["weighting"] + (", preconditioned" if own["precondition"] else ""),
                      own["network"], sampling(own)]
            a_step, cost, _ = costs_of(results, {name: (own | kind)[name] for name in COSTED})
            reached = False
            for step in sorted({r["step"] for r in matching(scored, own)}):
                pairs = [pair(scored, n, own | dict(step=step)) for n in numbers]
                seconds = a_step and (step * a_step[0], a_step[1] and step * a_step[1])
                found, form = pairs[0]
                near = found and form and not reached and abs(found[0] - form[0]) <= form[0] / 5
                shown = [with_form(*both) for both in pairs]
                rows.append([*labels, f"{step:,}", show(cost), show(seconds),
                             show(seconds) if near else "", *shown])
                reached = reached or near
                for lines, (found, form) in zip(panels.values(), pairs if seconds else []):
                    lines.setdefault(", ".join(labels), []).append((seconds[0], found, form))
        text += f"{label_of(kind)}, {kind['noise']}. {scale(scored)}\n\n" + markdown(
            ["model", "share", "weighting", "network", "sampling", "steps trained", "a step (× DDPM's)",
             "seconds", "seconds to quality", *with_forms(numbers)], rows)
        text += curves(results, f"speed-{tail}", panels, "seconds of training") + "\n"
    return "Time to quality (beyond the paper)", (
        text + "Seconds: steps × a step's by train.py --benchmark; to quality: until the distance is within "
        "20 % of its closed form." if text else "")


def evaluations(results):
    """Beyond the paper: quality against what a sampler costs."""
    text = ""
    for kind, tail in kinds_of(results.records):
        number, models, panels, lines = names_of(results.records, kind, ["distance"])[0], {}, {}, {}
        here = matching(results.records, kind | dict(flags=None, tuned=False, attack=None, percent=None))
        here = [r for r in here if r["lam"] in (None, 0.3) and r["method"] in ("ddpm", "adv") and number in r]
        for model in distinct(here, "lam", "method", "step", "reg_share", "variant"):
            own = matching(here, model)
            made = Counter(each["sampler"] for each in distinct(own, "sampler", "steps"))
            if sum(n > 1 for n in made.values()) > 1:
                models[METHODS[model["method"]]] = own      # of several the one trained longest
        for name, own in models.items():
            for each in distinct(own, "sampler", "steps"):
                sampler, n = sampler_name(each["sampler"]), each["steps"]
                n = 2 * n - 1 if sampler == "Heun" else n
                found, form = pair(own, number, each)
                label = f"{sampler} sampling"               # DDPM alone is a model, and has its colour
                panels.setdefault(name, {}).setdefault(label, []).append((n, found, form))
                lines.setdefault((sampler, n), {})[name] = with_form(found, form)
        if panels:
            text += f"{label_of(kind)}, {kind['noise']}. {scale(sum(models.values(), []))}\n\n" + markdown(
                ["sampler", "evaluations", *(f"{name}: {number} (closed form)" for name in panels)],
                [[*line, *(lines[line].get(name, DASH) for name in panels)] for line in sorted(lines)])
            text += curves(results, f"evaluations-{tail}", panels, "evaluations an image", number) + "\n"
    return "Quality against network evaluations (beyond the paper)", (
        text + "Heun takes 2 n − 1 evaluations for n steps, the others n." if text else "")


def model_name(where):
    """A model by its method and all that is unusual of it."""
    parts = [METHODS[where["method"]], f"λ {where['lam']}" if where["lam"] else "", where["odd"],
             "fine-tuned" if where["tuned"] else ""]
    return ", ".join(part for part in parts if part)


def optimum(results):
    """Networks on subspace data beside what gaussian.py says of the method: how far their training came."""
    names = "data", "size", "noise", "method", "lam", "odd", "tuned", "step", "sampler", "steps", "rule"
    found, rows, at = {}, [], 0
    for r in results.scores:                                # those left out of other tables among them
        if "rule" in r and not r["attack"]:
            results.shown.add(r["path"])
            way = tuple(r[name] for name in names)
            found.setdefault((way, r["seed"]), dict(r, cell=way))
    for where in distinct(found := [*found.values()], *names):
        pairs = [pair(found, n, where) for n in THREE]
        ours, form = pairs[0]
        reached = ours and form and abs(ours[0] - form[0]) <= max(form[0] / 20, ours[1] or 0)
        ratio = digits(ours[0] / form[0]) if ours and form and form[0] else DASH
        if reached:
            ratio, at = f"**{ratio}**", at + 1
        rows.append([label_of(where), where["noise"], model_name(where), f"{where['step']:,}",
                     sampling(where), ratio,
                     *(with_form(*both) for both in pairs), where["rule"]])
    header = ["data", "training data", "model", "steps trained", "sampling", "FD-exact over its closed form",
              *with_forms(THREE), "rule"]
    return "The closed form (beyond the paper): how near training is to the method's optimum", (
        f"{scale(found)} {at} of the {len(rows)} are at the optimum (bold: FD-exact within 5 % of its closed "
        "form, or the seeds' deviation). Of adv it is the fixed point of network and adversary; the rule for "
        "0 < p < 1: clean and corrupted images are each filtered as their own kind. What is far from it is a "
        f"training to be mended, no fact about the method.\n\n{markdown(header, rows)}" if rows else "")


def real(results):
    """Beyond the paper: what models of the same images leave of the noise, and how that looks."""
    text, names = "", ("lam", "method", "odd", "tuned", "step", "sampler", "steps")
    scores = [r for r in results.scores if "measures" in r]        # of models of train.py
    for kind, tail in kinds_of(scores):
        own = [dict(r, cell=tuple(r[name] for name in names))
               for r in matching(scores, kind | dict(attack=None, flags=None))]
        results.shown |= {r["path"] for r in own}
        numbers, rows, models = names_of(own, kind, QUALITY), [], []
        for where in distinct(own, *names):
            name = model_name(where)
            rows.append([name, f"{where['step']:,}", sampling(where),
                         *(show(cell(own, n, where)) for n in numbers)])
            models.append((name, matching(own, where)[0]))
        text += f"{label_of(kind)}, {kind['noise']}. {scale(own)}\n\n" + markdown(
            ["model", "steps trained", "sampling", *numbers], rows)
        text += (model_strip(results, f"real-{tail}", kind, models) if models else "") + "\n"
    return "Real images (beyond the paper)", text


# ------------------------------------------------ what the paper's readers asked, beyond the paper: one group

ASKED = "odd", "weighting", "precondition", "step"          # what else tells these models apart
RAN, ADV = 0.762, 0.3                                       # the lambdas that are alike at the optimum
OMEGAS = [("ran", 2), *(("adv", omega) for omega in (1, 2, 4, 8))]


def asked(method, noise, omega=2, **more):
    """What selects one model's samples: of subspace data, trained to the end by EDM's weighting, sampled by
    Heun's 18 steps, unless `more` says otherwise."""
    return dict(data="subspace", method=method, noise=noise, lam=dict(ran=RAN, adv=ADV).get(method),
                flags=None, odd="" if omega == 2 else f"omega is {omega:.1f}", weighting="edm",
                sampler="heun", steps=18, attack=None, percent=None, trained="whole") | more


def less(a, b):
    """Whether the cell a is below the cell b, and not within the deviations."""
    return verdict_of(LESS[1], [a, b])[0] == HOLDS


def against(a, b):
    """The cell a beside the cell b, in a word."""
    if not (a and b):
        return "not measured"
    if less(a, b):
        return "lower"
    return "higher" if less(b, a) else "level"


def compared(numbers, cells, others):
    """The cells of these numbers beside the others', as text."""
    return " and ".join(f"its {n} is {against(a, b)} ({show(a)} against {show(b)})"
                        for n, a, b in zip(numbers, cells, others))


def counted(pairs):
    """In how many of [(cell, cell)] the first is below the second, as text."""
    words = [against(a, b) for a, b in pairs if a and b]
    return f"{words.count('lower')} of {len(words)} (higher in {words.count('higher')})"


def regions(cells):
    """{(p, sigma): {name: cell}} -> who wins where, a point of a list for each set of winners: the lowest
    mean, and all that it is not below beyond the deviations."""
    found = {}
    for (p, sigma), own in cells.items():
        own = {name: each for name, each in own.items() if each}
        if len(own) > 1:
            best = min(own, key=lambda name: own[name][0])
            winners = ", ".join(name for name in own if name == best or not less(own[best], own[name]))
            found.setdefault(winners, {}).setdefault(sigma, []).append(f"{p:g}")
    text = ""
    for winners, sigmas in found.items():
        places = "; ".join(f"σ {sigma:g}, p {', '.join(ps)}" for sigma, ps in sorted(sigmas.items()))
        text += f"  - {places}: **{winners}**\n"
    return text or "  - not measured\n"


def question1(results, own):
    """Who wins where, at equal steps and at equal compute."""
    ddpm, ran, adv = (METHODS[m] for m in ("ddpm", "ran", "adv"))
    cheap, *aware = ["Robust_adv at DDPM's compute", "noise-aware (truth)", "noise-aware (wrong flags)",
                     "noise-aware (all noisy)"]
    names, text, maps, wheres = [ddpm, ran, adv, cheap, *aware], "", {}, {}
    for p, sigma in itertools.product((0.3, 0.6, 0.9, 1), (0.05, 0.1, 0.2)):
        noise = noise_name(p, sigma)
        ways = {METHODS[m]: asked(m, noise) for m in ("ddpm", "ran", "adv")}
        ways[cheap] = asked("adv", noise, trained="equal compute")
        ways |= {name: asked("ambient", noise, flags=flags)
                 for name, flags in zip(aware, ("oracle", "conf1", "conf2"))}
        if p == 1:                                          # all wrong: all clean; and all are noisy
            ways |= {aware[1]: ways[ddpm], aware[2]: ways[aware[0]]}
        wheres[p, sigma] = ways
    cells = {place: {name: cell(own, THREE[0], where) for name, where in ways.items()}
             for place, ways in wheres.items()}
    for budget, ours in (("compute", cheap), ("steps", adv)):
        text += f"At equal {budget} {adv} is nearer to the clean data than " + ", than ".join(
            f"{rival} in {counted((each[ours], each[rival]) for each in cells.values())}"
            for rival in (ddpm, *aware)) + " corruptions.\n"
        maps |= {f"equal {budget}: {adv} / {ddpm}": (ours, [ddpm]),
                 f"equal {budget}: {adv} / best noise-aware": (ours, aware)}
    text += "\nWho wins where: the lowest mean, and all that it is not below beyond the deviations.\n\n"
    for budget, ours in (("compute", [ddpm, cheap]), ("steps", [ddpm, ran, adv])):
        for told, race in (("", [*ours, *aware]), (", nobody told the truth", [*ours, *aware[1:]])):
            racing = {}
            for place, ways in wheres.items():
                once = []                                   # one model under two names races once
                for name in race:
                    if all(ways[name] != ways[other] for other in once):
                        once.append(name)
                racing[place] = {name: cells[place][name] for name in once}
            text += f"- Equal {budget}{told}:\n{regions(racing)}"
    for number in THREE:
        text += f"\n{number} (closed form):\n\n" + markdown(["training data", *names], [
            [noise_name(*place), *(text_of(own, number, where) for where in ways.values())]
            for place, ways in wheres.items()])
    return "Compute-matched against noise-aware training", text + (
        "\nTruth: told which images are noisy; wrong flags: each wrong with probability p; at p 1 that is "
        "DDPM, and all noisy is the truth. A noise-aware step costs what DDPM's does. With DDPM's compute "
        "Robust_adv has 5 steps for its 9, by a factor of 1.8 that was fixed before the runs.\n"
        + heat(results, "question1", maps, cells)), [way for ways in wheres.values() for way in ways.values()]


def heat(results, name, maps, cells):
    """{title: (name, rivals)}: maps over p and sigma of the name's number by its best rival's. -> the link,
    or ""."""
    if not results.plt or not any(found for each in cells.values() for found in each.values()):
        return ""
    ps, sigmas = (sorted({place[k] for place in cells}) for k in (0, 1))
    figure, axes = results.plt.subplots(2, len(maps) // 2, figsize=(8.6, 6.4), layout="constrained")
    for ax, (title, (ours, rivals)) in zip(axes.flat, maps.items()):
        ratios = np.full((len(ps), len(sigmas)), np.nan)
        for (i, p), (j, sigma) in itertools.product(enumerate(ps), enumerate(sigmas)):
            found, *beaten = (cells[p, sigma][each] for each in (ours, *rivals))
            if found and any(beaten):
                ratios[i, j] = found[0] / min(each[0] for each in beaten if each)
                ax.text(j, i, digits(ratios[i, j]), ha="center", va="center")
        ax.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-2, vmax=2, alpha=0.7, aspect="auto")
        ax.set_xticks(range(len(sigmas)), [f"σ {sigma:g}" for sigma in sigmas])
        ax.set_yticks(range(len(ps)), [f"p {p:g}" for p in ps])
        ax.set_title(title, fontsize=10)
    figure.suptitle("FD-exact by FD-exact; blue: Robust_adv is nearer to the clean data", fontsize=11)
    return chart(results, name, figure)


def question2(results, own):
    """What lambda and omega take of the noise, and of clean data."""
    noisy, rows, fronts, best, wheres = noise_name(1, 0.2), [], {}, [{}, {}], []
    noise = cell(own, f"ρ{EXACT}", asked("ddpm", noisy))
    quarter = noise and noise[0] / 4
    for method, omega in OMEGAS:
        family = f"{METHODS[method]}, ω {omega}"
        tried = [asked(method, noisy, omega, lam=r["lam"]) for r in distinct(own, "lam") if r["lam"]]
        for here in [where for where in tried if matching(own, where)]:
            clean = here | dict(noise=CLEAN)
            rows.append([family, f"{here['lam']:g}", text_of(own, "ρ", here), text_of(own, THREE[0], here),
                         text_of(own, THREE[0], clean), text_of(own, THREE[2], clean)])
            fronts.setdefault(family, []).append((pair(own, THREE[0], clean), pair(own, "ρ", here)))
            wheres += here, clean
    lines = {(family, k): sorted((y[k][0], x[k][0]) for x, y in points if x[k] and y[k])
             for family, points in fronts.items() for k in (0, 1)}      # (rho, distance), along lambda
    for (family, k), line in lines.items():
        if quarter and line and line[0][0] <= quarter <= line[-1][0]:
            best[k][family] = math.exp(np.interp(math.log(quarter), *np.log(line).T))
    said = []
    for whose, found in zip(("trained networks", "the closed form"), best):
        ranking = sorted((x, family) for family, x in found.items())
        in_words = ", ".join(f"{digits(x)} ({family})" for x, family in ranking)
        said.append(f"{whose} {in_words or 'none comes so far'}")
    text = ("FD-exact on clean data where noise of 0.2 falls to a quarter, the best first: "
            f"{'; '.join(said)}.\nA quarter: of the ρ that DDPM's closed form has, all images noisy; between "
            "two λ, logarithms are interpolated.\n"
            f"DDPM: ρ {text_of(own, 'ρ', asked('ddpm', noisy))}, FD-exact on clean data "
            f"{text_of(own, THREE[0], asked('ddpm', CLEAN))}.\n\n")
    text += markdown(["model", "λ", *with_forms(["ρ, noisy", "FD-exact, noisy", "FD-exact, clean",
                                                 "variance kept, clean"])], rows)
    if results.plt and any(lines.values()):
        figure, ax = results.plt.subplots(figsize=(6.4, 4.8), layout="constrained")
        for (family, k), line in lines.items():
            ax.plot([x for _, x in line], [y for y, _ in line], ("o-", "--")[k],
                    color=f"C{[*fronts].index(family)}", label=None if k else family)
        if quarter:
            ax.axhline(quarter, color="grey", linestyle=":", label="a quarter of the noise")
        ax.set(xscale="log", yscale="log", xlabel="FD-exact, trained on clean data",
               ylabel=f"ρ, trained on {noisy}", title="points: trained, along λ; dashed: closed form")
        ax.legend(fontsize=8)
        text += chart(results, "question2", figure)
    return "The penalty on clean data: λ and ω", text, wheres


def question3(results, own):
    """Whether what gaussian.py advises leaves as much noise as it says."""
    rows, left, wheres = [], [], []
    for data in distinct(own, "data", "size"):
        distance, number = names_of(own, data, ["distance", "beside"])
        for sigma, lam in ((0.1, 0.1), (0.2, 0.3)):
            ways = [way | data for way in (asked("ddpm", CLEAN), asked("ddpm", noise_name(1, sigma)),
                                           asked("adv", noise_name(1, sigma), 8, lam=lam))]
            if not matching(own, ways[2]):
                continue
            shares = []
            for n in (number, number + EXACT):
                found = [cell(own, n, way) for way in ways]
                share = None
                if all(found):
                    clean, ddpm, adv = (mean**2 for mean, *_ in found)
                    share = math.sqrt(max(0, adv - clean) / (ddpm - clean)) if ddpm > clean else None
                shares.append(share)
            if shares[0] is not None:
                left.append(shares[0])
            rows.append([label_of(data), noise_name(1, sigma), f"λ {lam}, ω 8",
                         *(DASH if x is None else f"{100 * x:.0f} %" for x in shares),
                         number, *(text_of(own, number, way) for way in ways),
                         *(text_of(own, distance, way) for way in ways[1:])])
            wheres += ways
    said = (f"{100 * min(left):.0f} % to {100 * max(left):.0f} %, {sum(x <= 0.35 for x in left)} of "
            f"{len(left)} not more than 35 %") if left else "not measured"
    return "λ and ω as gaussian.py advises", (
        f"Advised so as to leave 25 % of the noise's deviation, the trained networks leave {said}.\n\n"
        + markdown(["data", "training data", "advised", "noise left", "closed form", "by", "DDPM, clean data",
                    "DDPM", "as advised", "distance: DDPM", "as advised"], rows)
        + "\nNoise left: √((a² − c²) / (d² − c²)), a: as advised; d: DDPM on the same images; c: on clean "
        "ones. The closed form is of Heun's 18 steps; gaussian.py advises for 1000 of "
        "DDPM's.\n"), wheres


def question4(results, own):
    """Random against adversarial perturbations, by what they cost."""
    noise, numbers, rows, ends, wheres = noise_name(1, 0.2), ("ρ", THREE[0]), [], {}, []
    panels = {number: {} for number in numbers}
    for r in distinct(matching(own, dict(noise=noise, odd="")), "method", "lam", "step"):
        here = asked(r["method"], noise) | r
        del here["trained"]                                 # those of several lengths
        lengths = matching(own, {name: value for name, value in here.items() if name != "step"})
        if len(distinct(lengths, "step")) > 1 and r["lam"] and (found := matching(own, here)):
            _, cost, _ = costs_of(results, {name: found[0][name] for name in COSTED})
            label = f"{METHODS[r['method']]}, λ {r['lam']:g}"
            rows.append([label, f"{r['step']:,}", show(cost), show(cost and (r["step"] * cost[0], None)),
                         *(text_of(own, n, here) for n in numbers)])
            for number, lines in panels.items() if cost else ():
                lines.setdefault(label, []).append((r["step"] * cost[0], *pair(own, number, here)))
            if cost and r["lam"] in (RAN, ADV):             # the longest comes last
                ends[r["method"]] = cost[0], *(cell(own, n, here) for n in numbers)
            wheres.append(here)
    said = "Not measured."
    if len(ends) == 2:
        said = (f"A step of adv costs {digits(ends['adv'][0] / ends['ran'][0])} of one of ran; after as many "
                "steps, with the λ that are alike at the optimum, "
                + compared(numbers, ends["adv"][1:], ends["ran"][1:]) + ".")
    return "Random against adversarial perturbations, by cost", f"{said}\n\n" + markdown(
        ["model", "steps", "a step (× DDPM's)", "cost (steps of DDPM)", *with_forms(numbers)], rows) + curves(
            results, "question4", panels, "cost of the training, in steps of DDPM"), wheres


def question5(results, own):
    """What is unlearnt of other corruptions, and what is not."""
    noises = [noise_name(*kind) for kind in (
        (0.9, 0.2), (0.9, 0.03, "impulse"), (0.1, 0, "outliers"), (0.9, 0.1, "blur"))]
    ways = {noise: [asked(m, noise) for m in ("ddpm", "adv")] for noise in (CLEAN, *noises)}

    def said(number):
        found = {noise: against(*(cell(own, number, way) for way in ways[noise][::-1])) for noise in noises}
        return "; ".join(f"{word} ({', '.join(noise for noise in noises if found[noise] == word)})"
                         for word in dict.fromkeys(found.values()))

    wheres = [way for both in ways.values() for way in both]
    rows = [[way["noise"], METHODS[way["method"]], *(text_of(own, n, way) for n in THREE)] for way in wheres]
    return "Other corruptions", (
        f"Robust_adv's FD-exact is, beside DDPM's, {said(THREE[0])}.\nBy the closed form, which sees nothing "
        f"but what a corruption does to the images' covariance, it is {said(THREE[0] + EXACT)}. The "
        "regulariser can but shrink what varies little: it takes away what a corruption adds, and gives back "
        "nothing that one takes away.\n\n"
        + markdown(["training data", "model", *with_forms(THREE)], rows)), wheres


def question6(results, own):
    """The method on EDM."""
    wheres = [asked(m, noise_name(0.6, 0.1), weighting=weighting, sampler=sampler, steps=steps)
              for weighting in ("edm", "paper") for sampler, steps in (("heun", 18), ("ddpm", 35))
              for m in ("ddpm", "ran", "adv")]
    ddpm, _, adv = ([cell(own, n, way) for n in THREE] for way in wheres[:3])
    rows = [[way["weighting"], sampling(way), METHODS[way["method"]],
             *(text_of(own, n, way) for n in THREE)] for way in wheres]
    return "The method on EDM", (
        "The method on EDM (its network, weighting and sampler), beside DDPM on it: "
        f"{compared(THREE, adv, ddpm)}.\n\nTraining data: {noise_name(0.6, 0.1)}; 35 evaluations an image, "
        "all networks preconditioned.\n\n"
        + markdown(["weighting", "sampling", "model", *with_forms(THREE)], rows)), wheres


def question7(results, own):
    """What survives of robustness under attacks that look beyond one step."""
    rows, panels, wheres, moved, by_signs, distances = [], {}, [], [], [], []
    numbers = "displacement", "by random signs as large", THREE[0]
    kinds = dict(drift=dict(sampler="ddpm", steps=24, percent=100), trajectory=dict(percent=6))     # 1 of 18
    for noise, attack, budget in itertools.product((CLEAN, NOISY[1]), kinds, (0, 0.1, 0.25, 0.5, 1)):
        odd = ["where is first"] if attack == "trajectory" else []
        if budget != 1:
            odd.append(f"eps_scale is {budget}")
        how = kinds[attack] | dict(attack=attack, odd=", ".join(odd))
        if budget == 0:                                     # the same images, not attacked
            how |= dict(attack=None, odd="", percent=0)
        ways = [asked(m, noise, **how) for m in ("ddpm", "ran", "adv")]
        found = [[cell(own, n, way) for n in numbers] for way in ways]
        if any(map(any, found)):                            # a model of the three has any of the numbers
            for way, (far, signs, distance) in zip(ways, found):
                name, lines = METHODS[way["method"]], panels.setdefault(f"{attack}, {noise}", {})
                rows.append([noise, attack, budget, name, show(far), show(signs), show(distance)])
                if budget:
                    lines.setdefault(name, []).append((budget, far, None))
                    lines.setdefault(f"{name} (random signs)", []).append((budget, signs, None))
            if budget:
                for k, pairs in enumerate((moved, by_signs, distances)):
                    pairs.append((found[2][k], found[0][k]))
            wheres += ways
    return "Adaptive attacks", (
        "Of these attacks and budgets, Robust_adv's images are moved less far than DDPM's in "
        f"{counted(moved)}, by random signs as large in {counted(by_signs)}; their FD-exact stays lower in "
        f"{counted(distances)}.\n\n"
        + markdown(["training data", "attack", "ε-scale", "model", *numbers], rows)
        + "\ndrift: on each of 24 DDPM steps; trajectory: on x_T alone, by the gradient through all 18 Heun "
        "steps. ε-scale: of the paper's budget; 0: not attacked. Displacement: rms a pixel.\n"
        + curves(results, "question7", panels, "ε-scale", "displacement")), wheres


def question8(results, own):
    """The overhead in time and memory."""
    rows, ratios = [], {}
    for at in distinct(matching(results.benchmarks, dict(method="adv", precondition=True)),
                       "data", "size", "network", "batch", "device", "reg_share", "precondition"):
        for m in ("ddpm", "ran", "adv"):
            here = at | dict(method=m) | (dict(reg_share=1.0) if m == "ddpm" else {})
            found = costs_of(results, here)
            rows.append([f"{at['size']}×{at['size']}", at["network"], at["batch"], at["device"],
                         plain(at["reg_share"]), METHODS[m], *map(show, found)])
        ratios.setdefault(at["reg_share"], []).append(found[1][0])
    said = "; ".join(f"on {plain(share)} of the batch {digits(min(found))} to {digits(max(found))}"
                     for share, found in sorted(ratios.items()))
    return "Overhead in time and memory", (
        f"A training step of Robust_adv costs, in steps of DDPM, with the regulariser {said}.\n\n" + markdown(
            ["images", "network", "batch", "device", "share", "model", "seconds", "× DDPM's",
             "peak memory (GiB)"], rows)
        + "\nPeak memory: on a CPU the process's so far, PyTorch and all, row after row.\n"), None


def questions(results):
    """Beyond the paper: what its public reviews asked, each answered by a sentence made of the numbers."""
    own, text = pool([dict(r, left=None) for r in results.scores if "measures" in r], KEY + ASKED), ""
    results.shown |= {r["path"] for r in own}
    counts = Counter(r["step"] for r in own)
    full = max(counts, key=lambda step: (counts[step], step), default=0)
    for r in own:                                           # run_all.sh's equal_compute
        r["trained"] = {full: "whole", full * 5 // 9: "equal compute"}.get(r["step"])
    asked_in_order = (question1, question2, question3, question4, question5, question6, question7, question8)
    for k, question in enumerate(asked_in_order, 1):
        title, answer, wheres = question(results, own)
        used = [r for where in distinct(wheres, *wheres[0]) for r in matching(own, where)] if wheres else []
        measured = results.benchmarks if wheres is None else used
        text += (f"### {k}. {title}\n\n{answer if measured else NOT_YET}\n`bash run_all.sh quick "
                 f"question{k}`. {scale(used) if used else ''}\n\n")
    return "What the paper's readers asked (beyond the paper)", text


# ------------------------------------------------------------------------------------------- the command line

TABLES = {one.__name__: one for one in (
    toy3d, fig3, table1_top, table1_bottom, table2, cost, invariance, samples, fig6, fig7, fig8, fig24,
    table4, table5, evaluations, optimum, speed, real, questions)}
APART = "speed", "real", "questions"                        # of runs of their own


def origin(args):
    """What README.md begins with: the command, commit, date and machine, without a path of this machine."""
    def short(path):
        path = path.resolve()
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name

    command = f"python report.py --runs {short(args.runs)} --out {short(args.out)} --tables"
    commit, processor = "unknown", platform.processor() or platform.machine()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent, check=True,
                              capture_output=True, text=True)
        commit = done.stdout.strip()
    with contextlib.suppress(OSError, StopIteration):       # Linux has a better name
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n")
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"Made by `{' '.join([command, *args.tables])}` at commit {commit}, {time.strftime('%Y-%m-%d')}, "
            f"on {platform.system()}, {processor}, {os.cpu_count()} cores, {device}.")


HEADER = f"""{DASH}: not measured. Only a Fréchet distance on the features of the published Inception weights
is an FID. ρ: the noise left outside the data's subspace."""
CLAIMS = """A claim holds or does not hold by its rule, on the means over seeds; letters: the numbers in
their order. It cannot be shown at this scale where moving each mean by up to its deviation over the seeds can
turn it (a number of one seed: by a tenth of itself), where a number was not measured, and where all are 0.
Closed form: what the same rule says of gaussian.py's predictions for these very cells."""


def main(argv=None):
    """Writes OUT/README.md and its figures."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with runs and scores, at any depth")
    parser.add_argument("--out", type=Path, help="folder for README.md and its figures (default: RUNS)")
    parser.add_argument("--tables", nargs="+", default=[name for name in TABLES if name not in APART],
                        help=f"some of {', '.join(TABLES)} (default: all but {', '.join(APART)})")
    args = parser.parse_args(argv)
    args.out = args.out or args.runs
    for name in args.tables:
        if name not in TABLES:
            raise UserError(f"--tables {name}: there is no such table; they are {', '.join(TABLES)}")
    if "speed" in args.tables and len(args.tables) > 1:
        raise UserError("--tables speed: stands alone, it tells runs apart that other tables do not")
    check_out(args.out / "README.md")
    results = read_runs(args, KEY + SPEED if "speed" in args.tables else KEY)
    sections = [TABLES[name](results) for name in TABLES if name in args.tables]
    charts = "" if results.plt else " No charts: matplotlib was not installed."
    sections.insert(0, ("Results", f"{origin(args)}\n\n{HEADER}{charts}"))
    if results.claims:
        said, text = claims_text(results.claims)
        sections.append(("Claims", text))
    left = [f"- `{r['path'].relative_to(args.runs)}`: {r['left'] or 'another has its cell'}"
            for r in results.scores if r["path"] not in results.shown]
    if left:
        sections.append(("Left out", "\n".join(left)))
    with atomic_write(args.out / "README.md") as temporary:
        text = "\n\n".join(f"## {title}\n\n{text.strip() or NOT_YET}" for title, text in sections)
        temporary.write_text(text[1:] + "\n", encoding="utf-8",            # the first title is the page's
                             errors="backslashreplace")     # a name that is not UTF-8
    print(f"made {args.out}/README.md" + (f": {said}" if results.claims else ""))


if __name__ == "__main__":
    command_line(main)
