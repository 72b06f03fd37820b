"""Every table and figure of the paper from what the other scripts wrote: OUT/README.md, the claims at its end.

    python report.py --runs runs/quick                              # results/README.md and its figures
    python report.py --runs runs/paper --out results-paper

Takes every run below RUNS by what its log and scores say of themselves, not by its name; runs below RUNS/limits are for
the table of the price alone. Only the paper's own numbers are written here (`PAPER`); what has not run is a dash.
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import statistics
from collections import Counter, namedtuple
from pathlib import Path

from PIL import Image, ImageDraw

from data import UserError, atomic_write, command_line

NAMES = {"cifar10": "CIFAR-10", "celeba": "CelebA", "lsun_bedroom": "LSUN Bedroom", "imagenet64": "ImageNet-64"}
METHODS = {"ddpm": "DDPM", "ran": "Robust_ran", "adv": "Robust_adv", "inv": "Inv_adv", "ambient": "noise-aware"}
COLOURS = {"ddpm": "#0072B2", "ran": "#009E73", "adv": "#D55E00", "inv": "#CC79A7"}     # told apart by the colour-blind
NOISES, ATTACKS, PERCENT = [(0, 0), (0.9, 0.1), (0.9, 0.2)], ["fgsm", "pgd", "eot", "noise", "drift"], [25, 50, 75, 100]
TOY_FIGURES = ["fig2a", "fig2b", "fig2c", "fig6-right", "fig10", "fig11"]
DISTANCES = ["FID", "FD-inception", "FD-exact", "FD-pixels"]                            # the first one found is shown
DASH = "–"


# ------------------------------------------------------------------------------- a cell: records, and what selects them

def of(method, p, sigma, **more):
    """What selects a model's samples: of the sampler's usual number of steps, not attacked, unless `more` says else."""
    where = dict(method=method, p=p, sigma=sigma, lam=None if method in ("ddpm", "ambient") else 0.3, tuned=False,
                 flags=None, attack=None, percent=None, sampler="ddpm")
    return where | ({} if "steps" in more else {"usual": True}) | more


def matching(records, where):
    """The records that have all values of `where`."""
    return [r for r in records if all(r.get(name) == value for name, value in where.items())]


def cell(records, number, where):
    """-> (mean, sample deviation or None, count) of a number over the records that match, or None: not measured."""
    values = [r.get(number) for r in matching(records, where)]
    values = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def price_of(method):
    """What selects the runs whose measured cost of a training step is the paper's: regulariser on the whole batch."""
    return dict(method=method, sampler=None, reg_share=1.0)


# ---------------------------------------------------------------------------------------------- the paper's own numbers

PAPER = [dict(price_of("adv"), data=None, cost=2.5)]                                    # section 3.1


def _paper(data, selectors, numbers):
    """Adds the paper's FID/IS of a data set, one for each selector."""
    for where, text in zip(selectors, numbers.split(), strict=True):
        PAPER.append(dict(where, data=data, **dict(zip(("FID", "IS"), map(float, text.split("/"))))))


TABLE2 = [of(m, *noise, sampler=s) for noise in NOISES for s in ("ddpm", "ddim") for m in ("ddpm", "adv")]
_paper("cifar10", TABLE2, "7.2/8.95 28.68/7.04 11.62/8.36 31.20/6.38 58.05/6.93 24.70/7.21 59.28/6.89 25.48/6.85 "
       "102.68/4.19 24.81/7.07 105.43/4.09 24.93/6.69")                                 # Table 2
_paper("celeba", TABLE2, "3.49/2.61 19.83/2.13 6.19/2.61 17.59/2.18 54.90/2.40 14.54/2.09 41.29/2.48 17.98/2.22 "
       "96.03/2.65 16.53/2.11 89.28/2.62 20.24/2.20")                                   # Table 2
_paper("lsun_bedroom", TABLE2, "9.90/2.31 57.13/2.34 27.00/3.15 48.80/2.39 53.81/3.33 44.07/2.35 50.53/3.19 48.90/3.96 "
       "95.85/4.08 44.27/2.50 82.20/4.39 61.98/3.66")                                   # Table 2
_paper("imagenet64", [of(m, *noise) for noise in NOISES[1:] for m in ("ddpm", "adv")], "97.6 83.8 129.4 80.3")   # 3.1
_paper("cifar10", [of("ran", *noise) for noise in NOISES[1:]], "79.21/5.21 68.04/4.34")                # Table 1, top
for method in ("ddpm", "adv"):                              # Table 1's 1000 steps are Table 2's, see 3.3
    matching(PAPER, dict(of(method, 0, 0), data="cifar10"))[0]["steps"] = 1000
_paper("cifar10", [of(m, 0, 0, steps=n) for m in ("ddpm", "adv") for n in (300, 500)],
       "224.38/3.33 28.07/8.46 37.89/6.39 24.34/7.53")                                  # Table 1, bottom
_paper("cifar10", [of("inv", 0, 0)], "356.9")                                           # 2.3
_paper("cifar10", [of(m, 0, 0, attack=a, percent=k) for a in ATTACKS[:3] for m in ("ddpm", "adv") for k in PERCENT],
       "49.8 131.7 190.4 243.4 19.29 52.0 90.7 127.7 55.7 134.5 200.3 248.1 22.7 55.8 98.1 128.6 "
       "57.6 132.7 195.99 248.6 25.9 61.2 100.2 132.6")                 # Fig. 8b; which data is not stated
_paper("celeba", [of(m, *noise, tuned=True) for noise in NOISES[1:] for m in ("ddpm", "adv")],
       "65.4/2.6 23.3/2.1 100.68/2.7 25.8/2.1")                                         # Table 4
_paper("cifar10", [of("ambient", *noise, flags=f) for noise in NOISES for f in ("conf1", "conf2")],
       "14.0 14.9 94.5 102.7 109.7 105.3")                                              # Table 5


# ----------------------------------------------------------------------------------- the tables and the claims, as data

def noise_name(p, sigma):
    """The training data's corruption in words."""
    return f"{100 * p:g} % with σ {sigma:g}" if p else "clean"


# Of a table: the paper's data sets, what its rows are called, the rows with what selects them, and the numbers shown
# (None: the data set's own, see `merits`; "...": these and more).
Table = namedtuple("Table", "text names labels rows numbers", defaults=(None,))
FIG3 = [(label, noise, of(m, *noise, lam=lam)) for noise in NOISES[:2] for label, m, lam in (
    ("DDPM", "ddpm", None), ("Robust_ran", "ran", 0.3), ("Robust_adv", "adv", 0.3), ("Inv_adv, λ 0.3", "inv", 0.3),
    ("Inv_adv, λ 0.03", "inv", 0.03))]
TABLES = {
    "fig3": Table("Fig. 3: data on a linear subspace", ["subspace"], ["training data", "model"],
                  [((noise_name(*n), label), where) for label, n, where in FIG3], ["PSNR (dB)", "ρ", "FD-exact"]),
    "table1top": Table("Table 1, top: random against adversarial perturbation", ["cifar10"], ["training data", "model"],
                       [((noise_name(*n), METHODS[m]), of(m, *n)) for n in NOISES[1:] for m in ("ran", "adv")]),
    "table1bottom": Table("Table 1, bottom: fewer steps, clean data (the paper's 1000 are Table 2's)", ["cifar10"],
                          ["steps", "model"], [((n, METHODS[m]), of(m, 0, 0, steps=n)) for n in (300, 500, 1000)
                                               for m in ("ddpm", "adv")]),
    "table2": Table("Table 2, and ImageNet from 3.1", list(NAMES), ["training data", "sampling", "model"], [
        ((noise_name(w["p"], w["sigma"]), w["sampler"].upper(), METHODS[w["method"]]), w) for w in TABLE2]),
    "cost": Table("3.1: cost of a training step, as a multiple of DDPM's, mean of all runs", [None], ["model"],
                  [([METHODS[m]], price_of(m)) for m in ("ddpm", "ran", "inv", "adv")], ["cost"]),
    "inv": Table("2.3: invariance instead of equivariance, clean data", ["cifar10"], ["model"],
                 [([METHODS[m]], of(m, 0, 0)) for m in ("ddpm", "adv", "inv")]),
    "fig6": Table("Fig. 6 left: similarity to the nearest training image, clean data", ["cifar10"], ["model"],
                  [([METHODS[m]], of(m, 0, 0)) for m in ("ddpm", "adv")],
                  ["share ≥ 0.9", "mean similarity", "95th percentile"]),
    "fig7": Table("Fig. 7, 25: λ", ["lsun_bedroom"], ["training data", "λ"],
                  [((noise_name(*n), lam), of("adv", *n, lam=lam)) for n in NOISES for lam in (0.1, 0.2, 0.3)],
                  ["...", "variance kept"]),
    "fig8": Table("Fig. 8b: attacks on the sampling trajectory, clean data (`noise`: random signs; `drift`: ours). "
                  "Displacement: rms a pixel, from the same noise's images without attack", ["cifar10"],
                  ["attack", "steps attacked", "model"],
                  [((a or "none", f"{k or 0} %", METHODS[m]), of(m, 0, 0, attack=a, percent=k)) for a, k in
                   [(None, 0), *itertools.product(ATTACKS, PERCENT)] for m in ("ddpm", "adv")],
                  ["...", "displacement", "by random signs as large"]),
    "table4": Table("Table 4: fine-tuned against from scratch", ["celeba"], ["training data", "model", "trained"],
                    [((noise_name(*n), METHODS[m], "fine-tuned" if t else "from scratch"), of(m, *n, tuned=t))
                     for n in NOISES[1:] for t in (True, False) for m in ("ddpm", "adv")]),
    "table5": Table("Table 5: noise-aware training", ["cifar10"], ["training data", "model"], [
        ((noise_name(*n), label), where) for n in NOISES for label, where in [(METHODS["adv"], of("adv", *n)), *(
            (f"noise-aware, {f}", of("ambient", *n, flags=f)) for f in ("oracle", "conf1", "conf2"))]]),
}
EVERY = "a < b at 25, 50, 75, 100 % (first the a's)"
# How far a rule is from breaking: it holds where this is above 0. The letters are the claim's cells in their order.
RULES = {
    "a < b": lambda a, b: b - a,
    "a > b > c": lambda a, b, c: min(a - b, b - c),
    "a − b < c − d": lambda a, b, c, d: c - d - (a - b),
    "|a − b| < b / 10": lambda a, b: b / 10 - abs(a - b),
    "|a − b| < |a − c|": lambda a, b, c: abs(a - c) - abs(a - b),
    "a within 20 % of 2.5": lambda a: 0.5 - abs(a - 2.5),
    EVERY: lambda *v: min(b - a for a, b in zip(v[:4], v[4:])),
}
# numbers: "distance"; "noise" (also ρ, where it is known); "left" (ρ, or else the distance); or names.
Claim = namedtuple("Claim", "text place numbers rule cells names", defaults=(["cifar10"],))
CLAIMS = [
    *(Claim(f"adv beats DDPM, {noise_name(*n)}, {s.upper()} sampling", "Table 2", "noise", "a < b",
            [of("adv", *n, sampler=s), of("ddpm", *n, sampler=s)]) for n in NOISES[1:] for s in ("ddpm", "ddim")),
    *(Claim(f"from σ 0.1 to 0.2 adv loses less than DDPM, {s.upper()} sampling", "3.1, Table 2", "noise",
            "a − b < c − d", [of(m, *n, sampler=s) for m in ("adv", "ddpm") for n in NOISES[:0:-1]])
      for s in ("ddpm", "ddim")),
    *(Claim(f"on clean data DDPM beats adv, {s.upper()} sampling", "Table 2", "distance", "a < b",
            [of("ddpm", 0, 0, sampler=s), of("adv", 0, 0, sampler=s)]) for s in ("ddpm", "ddim")),
    *(Claim(f"adv beats ran, {noise_name(*n)}", "Table 1, top", "noise", "a < b", [of("adv", *n), of("ran", *n)])
      for n in NOISES[1:]),
    *(Claim(f"ran too beats DDPM, {noise_name(*n)}", "3.1, Table 1, 2", "noise", "a < b",
            [of("ran", *n), of("ddpm", *n)]) for n in NOISES[1:]),
    *(Claim(f"{n} steps instead of 1000 cost adv less than DDPM", "3.3, Table 1", "distance", "a − b < c − d",
            [of(m, 0, 0, steps=k) for m in ("adv", "ddpm") for k in (n, 1000)]) for n in (300, 500)),
    *(Claim(f"adv beats DDPM at {n} steps, clean data", "Table 1, bottom", "distance", "a < b",
            [of("adv", 0, 0, steps=n), of("ddpm", 0, 0, steps=n)]) for n in (300, 500)),
    Claim("adv is better with 500 steps than with 1000, clean data", "3.3", "distance", "a < b",
          [of("adv", 0, 0, steps=500), of("adv", 0, 0, steps=1000)]),
    Claim("invariance fails, clean data", "2.3", "noise", "a < b", [of("ddpm", 0, 0), of("inv", 0, 0)]),
    *(Claim(f"invariance with λ {lam} fails, {noise_name(*n)}", "Fig. 3", ["ρ", "FD-exact"], "a < b",
            [of("ddpm", *n), of("inv", *n, lam=lam)], ["subspace"]) for n in NOISES[:2] for lam in (0.3, 0.03)),
    Claim("invariance fails less with a smaller λ, 90 % with σ 0.1", "2.3, Fig. 3", ["ρ", "FD-exact"], "a < b",
          [of("inv", 0.9, 0.1, lam=0.03), of("inv", 0.9, 0.1)], ["subspace"]),
    *(claim for m in ("ran", "adv") for claim in (
        Claim(f"{m} beats DDPM in ρ, 90 % with σ 0.1", "3.1, Fig. 3", ["ρ"], "a < b",
              [of(m, 0.9, 0.1), of("ddpm", 0.9, 0.1)], ["subspace"]),
        Claim(f"{m} beats DDPM in PSNR, 90 % with σ 0.1", "3.1, Fig. 3", ["PSNR (dB)"], "a < b",
              [of("ddpm", 0.9, 0.1), of(m, 0.9, 0.1)], ["subspace"]),
        Claim(f"{m} is like DDPM on clean data", "3.1, Fig. 3", ["PSNR (dB)"], "|a − b| < b / 10",
              [of(m, 0, 0), of("ddpm", 0, 0)], ["subspace"]))),
    Claim("a training step of adv costs 2.5 of DDPM", "3.1", ["cost"], "a within 20 % of 2.5", [price_of("adv")],
          [None]),
    Claim("ran costs less than adv", "3.1", ["cost"], "a < b", [price_of("ran"), price_of("adv")], [None]),
    Claim("adv memorises less, clean data", "3.2, Fig. 6", ["share ≥ 0.9", "mean similarity"], "a < b",
          [of("adv", 0, 0), of("ddpm", 0, 0)]),
    *(Claim(f"noise left falls from λ 0.1 over 0.2 to 0.3, {noise_name(*n)}", "F.3, Fig. 7, 25", "left", "a > b > c",
            [of("adv", *n, lam=lam) for lam in (0.1, 0.2, 0.3)], ["lsun_bedroom"]) for n in NOISES[1:]),
    *(claim for a in ATTACKS[:3] for claim in (
        Claim(f"adv withstands {a} better than DDPM", "3.4, Fig. 8b", "distance", EVERY,
              [of(m, 0, 0, attack=a, percent=k) for m in ("adv", "ddpm") for k in PERCENT]),
        Claim(f"{a} on 100 % instead of 25 % of the steps costs adv less than DDPM", "3.4, Fig. 8b", "distance",
              "a − b < c − d", [of(m, 0, 0, attack=a, percent=k) for m in ("adv", "ddpm") for k in (100, 25)]))),
    *(Claim(f"adv fine-tuned is nearer to adv from scratch than to DDPM, {noise_name(*n)}", "F.2, Table 4", "noise",
            "|a − b| < |a − c|", [of("adv", *n, tuned=True), of("adv", *n), of("ddpm", *n)]) for n in NOISES[1:]),
    *(Claim(f"adv beats noise-aware training, {f}, {noise_name(*n)}", "G, Table 5", "noise", "a < b",
            [of("adv", *n), of("ambient", *n, flags=f)]) for n in NOISES[1:] for f in ("conf1", "conf2")),
    *(Claim(f"noise-aware training, {f}, beats adv on clean data", "Table 5", "distance", "a < b",
            [of("ambient", 0, 0, flags=f), of("adv", 0, 0)]) for f in ("conf1", "conf2")),
]


# -------------------------------------------------------------------------------------------- what the stages have left

@contextlib.contextmanager
def _reading(path, script):
    """A file that is damaged or not what `script` writes becomes one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged, or not what {script} writes ({reason}); make it again") from error


def read_lines(path):
    """The objects of a file of JSON lines; a last line without its end is one that is still being written."""
    *lines, rest = path.read_text().split("\n")
    found = [json.loads(line) for line in lines]
    with contextlib.suppress(ValueError):
        found += [json.loads(rest)]
    return found


def read_run(path, runs):
    """The record of a run from its log.jsonl; `variant` is what else makes two runs incomparable."""
    with _reading(path, "train.py"):
        lines = read_lines(path)
        start = ([line for line in lines if line.get("event") == "start"] or [None])[-1]
        if start is None:                                   # killed before its first step
            return None
        config = start["config"]
        data, training, network = config["data"], config["training"], config["network"]
        clean = not (data["p"] and data["sigma"])           # the one without the other corrupts nothing
        method, regularised = training["method"], training["method"] not in ("ddpm", "ambient")
        same = {k: v for k, v in training.items() if k not in ("method", "seed", "init", "lam", "flags", "sigma_known")}
        return dict(
            path=path.parent, limits=path.relative_to(runs).parts[0] == "limits", data=data["name"], size=data["size"],
            p=0 if clean else data["p"], sigma=0 if clean else data["sigma"], method=method,
            lam=training["lam"] if regularised else None, tuned=training.get("init") is not None,
            flags=training.get("flags"), reg_share=training.get("reg_share", 1.0) if regularised else 1.0,
            balance=bool(training.get("balance")), seed=training["seed"], batch=training["batch"],
            step=lines[-1]["step"], network=f"{network['channels']} × {tuple(network['mult'])}",
            cost=start.get("cost"), sampler=None,
            settings={k: training.get(k) for k in ("lam_units", "omega", "gamma")} if regularised else {},
            variant=json.dumps([same, network, config["process"], data.get("data_seed")], sort_keys=True))


def read_score(path, kind):
    """Numbers and protocol in what fid.py, attack.py or memorize.py wrote of one file of samples."""
    with _reading(path, {"attack": "attack.py", "memorize": "memorize.py"}.get(kind, "fid.py")):
        result = json.loads(path.read_text())
        if kind == "attack":
            return {"displacement": result["rms"], "by random signs as large": result["rms_noise"]}, result
        if kind == "memorize":
            own = result["generated"]
            return {"share ≥ 0.9": own["share"], "mean similarity": own["mean"], "95th percentile": own["p95"],
                    "memory": result}, result["protocol"]
        names = {"is_mean": "IS", "rho_mean": "ρ", "psnr": "PSNR (dB)", "variance_kept": "variance kept",
                 "noise_mean": "noise estimate"}
        if not (result["metric"] in DISTANCES and isinstance(result["protocol"], dict)):
            raise ValueError(f"metric {result['metric']!r}")
        return {result["metric"]: result["value"], **{new: result[old] for old, new in names.items() if old in result},
                "label": result["samples"], "reference": result["reference"]}, result["protocol"]


# What the paper does not vary: samples made otherwise stay out of its tables.
STANDARD = dict(lam_units=["x"], omega=[2], gamma=[8 / 255], ema=[True], variance=[None, "large", "learned"],
                where=["spread"], eps_scale=[1], phi=[1])


def load(runs):
    """Everything below the folder. -> records of samples and of runs (sampler None), {path: why it is left out}."""
    found = {path.parent: read_run(path, runs) for path in sorted(runs.rglob("log.jsonl"))}
    left = {path: "has not begun to train" for path, run in found.items() if run is None}
    found = {path: run for path, run in found.items() if run}
    records, samples = list(found.values()), {}
    for path in sorted(runs.rglob("*.json")):
        name = re.fullmatch(r"(.+?)(?:\.npz|\.npy|\.zip)?\.(attack|memorize|fid|fd-[a-z]+)\.json", path.name)
        if name:
            numbers, protocol = read_score(path, name[2])
            known = samples.setdefault(path.with_name(name[1]), ({}, {}))
            known[0].update(numbers)
            known[1].update(protocol)
    for path, (numbers, made) in samples.items():
        run = found.get(path.parent)
        if not made:                                        # images that no model of ours made: a yardstick
            data, _, size = numbers["reference"].rpartition("-")
            records.append(dict(numbers, data=data, size=int(size) if size.isdigit() else None, yardstick=True))
            continue
        if run is None or any(made.get(k, run[k]) != run[k] for k in ("data", "size", "method")):
            left[path] = "made by a run other than the one whose log.jsonl is beside it"
            continue
        settings = run["settings"] | {k: made[k] for k in STANDARD if k in made}
        odd = [k for k, v in settings.items() if v not in STANDARD[k]]
        if odd:
            left[path] = f"{odd[0]} is {settings[odd[0]]}"
            continue
        attack = made.get("attack") if made.get("steps_attacked") else None
        records.append(run | numbers | dict(
            path=path, cost=None, sampler=made["sampler"], steps=made["steps"], n=made.get("n"), attack=attack,
            percent=round(100 * made["steps_attacked"] / made["steps"]) if "steps_attacked" in made else None,
            step=made.get("step", run["step"])))
    return records, left


KEY = ("data", "size", "p", "sigma", "method", "lam", "tuned", "flags", "sampler", "steps", "attack", "percent")
PRICE = ("reg_share", "balance", "network", "step")         # what tells apart the rows of the table of the price


def pool(records, key, left):
    """One configuration for each cell, apart from seeds: the one trained longest, then that of most seeds; any other
    goes into `left`. Marks as `usual` each data set's most frequent number of sampling steps (of two, the larger)."""
    cells, steps, kept = {}, {}, [r for r in records if r["sampler"] is None]
    for r in (r for r in records if r["sampler"]):
        variants = cells.setdefault(tuple(r[k] for k in key), {})
        variants.setdefault((r["step"], r["variant"], r["n"]), {}).setdefault(r["seed"], []).append(r)
    for variants in cells.values():
        best = max(variants, key=lambda v: (v[0], len(variants[v]), v[2] or 0))
        for variant, seeds in variants.items():
            for same in seeds.values():
                if variant == best:
                    kept.append(dict(same[0], cell=tuple(same[0][k] for k in key)))
                left |= {r["path"]: "another has its cell" for r in same[variant == best:]}
    group = lambda r: (r["data"], r["size"], r["sampler"], r.get("percent") is None)
    for r in kept:
        steps.setdefault(group(r), Counter())[r.get("steps") or 0] += 1
    for r in kept:
        counts = steps[group(r)]
        r["usual"] = r["sampler"] is not None and r["steps"] == max(counts, key=lambda n: (counts[n], n))
    return kept


def sets_for(names, records):
    """The data sets (name, size) that stand for the paper's `names`: these, or all where none of the paper's is."""
    found = sorted({(r["data"], r["size"]) for r in records}, key=lambda s: ([*NAMES, s[0]].index(s[0]), s))
    if names == [None] or not any(s[0] in [*NAMES, *names] for s in found):
        return found or [("subspace", None)]
    return [s for name in names for s in ([f for f in found if f[0] == name] or [(name, None)])]


def merits(records, data, size):
    """The names of the numbers by which samples of a data set are judged: a distance first, under its own name."""
    here = matching(records, dict(data=data, size=size))
    distance = next((d for d in DISTANCES if any(d in r for r in here)), "FID" if data in NAMES else "FD-exact")
    return [distance, *{"FID": ["IS"], "FD-inception": ["IS"], "FD-exact": ["ρ"]}.get(distance, [])]


# --------------------------------------------------------------------------------------------------------- as Markdown

def digits(x):
    """A number to three significant digits, without an exponent."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}" if x else "0"


def show(found):
    """A cell as text."""
    if found is None:
        return DASH
    return digits(found[0]) + (f" ± {digits(found[1])}" if found[1] is not None else "")


def label_of(data, size):
    """A data set's name as it is printed."""
    return NAMES.get(data, data) + (f" {size}×{size}" if size else "")


def markdown(header, rows):
    """A table of Markdown; a cell's | would end it."""
    line = lambda row: "| " + " | ".join(str(text).replace("|", "\\|") for text in row) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)]) + "\n"


def span(values):
    """The smallest and the largest of some numbers."""
    values = sorted({v for v in values if v is not None})
    return " to ".join(f"{v:,}" for v in {values[0]: 0, values[-1]: 0}) if values else "?"


def scale(used):
    """The caption: what the numbers of a table were measured on."""
    if not used:
        return "Not measured yet."
    text = []
    for data, size in dict.fromkeys((r["data"], r["size"]) for r in used):
        here = matching(used, dict(data=data, size=size))
        made = [f"{name.upper()} {span(r['steps'] for r in here if r['sampler'] == name)} steps"
                for name in ("ddpm", "ddim") if any(r["sampler"] == name for r in here)]
        shares = sorted({r["reg_share"] for r in here if r["lam"]}) or [1]
        text.append(f"{label_of(data, size)}: network {', '.join(sorted({r['network'] for r in here}))}, trained for "
                    f"{span(r['step'] for r in here)} steps of {span(r['batch'] for r in here)} images"
                    + (f", regulariser on {' or '.join(f'{s:g}' for s in shares)} of them" if shares != [1] else "")
                    + (", balanced" if any(r["balance"] for r in here) else "")
                    + (f"; {span(r.get('n') for r in here)} samples, {', '.join(made)}" if made else ""))
    counts = Counter(r["cell"] for r in used if "cell" in r)
    if counts:
        text.append(f"one configuration is {span(counts.values())} seed(s), ± their sample deviation"
                    if max(counts.values()) > 1 else "one seed")
    else:
        text.append(f"{len(used)} run(s) in all, ± the sample deviation of a model's")
    return "Scale: " + "; ".join(text) + "."


def table(chosen, records):
    """A Table with our numbers and the paper's. -> Markdown."""
    sets = sets_for(chosen.names, records)
    numbers = {s: chosen.numbers or merits(records, *s) for s in sets}
    numbers = {s: merits(records, *s) + list(v[1:]) if v[0] == "..." else v for s, v in numbers.items()}
    known = ["FID", "IS"] if (chosen.numbers or ["..."])[0] == "..." else chosen.numbers
    papers = [(name, [n for n in known if any(cell(PAPER, n, w | dict(data=name)) for _, w in chosen.rows)])
              for name in chosen.names]
    papers = [(name, found) for name, found in papers if found]
    header = [*chosen.labels, *(f"ours ({' / '.join(numbers[s])}, {label_of(*s)})" for s in sets),
              *(f"paper ({' / '.join(found)}{', ' + NAMES[name] if name else ''})" for name, found in papers)]
    rows, used = [], []
    for labels, where in chosen.rows:
        ours = [(where | dict(data=s[0], size=s[1]), numbers[s]) for s in sets]
        used += [r for w, names in ours for r in matching(records, w) if any(r.get(n) is not None for n in names)]
        theirs = [[cell(PAPER, n, where | dict(data=name)) for n in found] for name, found in papers]
        rows.append([*labels, *(joined([cell(records, n, w) for n in names]) for w, names in ours),
                     *(joined(values, lambda v: f"{v[0]:g}" if v else DASH) for values in theirs)])
    return f"{scale(used)}\n\n{markdown(header, rows)}"


def joined(cells, text=show):
    """Several numbers in one cell of a table; nothing measured is one dash."""
    return " / ".join(map(text, cells)) if any(cells) else DASH


def verdict(rule, cells):
    """Whether a rule holds of cells: in the means, and with a remark where the seeds' deviations can turn it."""
    if not all(cells):
        return "not measured"
    if not any(c[0] for c in cells):
        return "not decided (all 0)"
    holds = RULES[rule](*(c[0] for c in cells)) > 0
    corners = itertools.product(*((c[0] - (c[1] or 0), c[0] + (c[1] or 0)) for c in cells))
    doubt = any((RULES[rule](*corner) > 0) != holds for corner in corners)
    return ("holds" if holds else "does not hold") + (" (within the seeds' spread)" if doubt else "")


def check_claim(claim, records):
    """A claim on every data set that shows it. -> rows: claim, place, rule, data and number, paper, ours, verdict."""
    number = "FID" if isinstance(claim.numbers, str) else claim.numbers[0]              # Fig. 3 and 6 print no numbers
    theirs = {name: [cell(PAPER, number, where | dict(data=name)) for where in claim.cells] for name in (None, *NAMES)}
    theirs = {name: cells for name, cells in theirs.items() if all(cells)}
    rows = []
    for data, size in sets_for(list(theirs) or claim.names, records):
        distance, *more = merits(records, data, size)
        noise = [n for n in more if n == "ρ"]
        names = {"distance": [distance], "noise": [distance, *noise], "left": noise or [distance]}
        names = names[claim.numbers] if isinstance(claim.numbers, str) else claim.numbers
        papers = []
        for name in [data] if data in theirs else theirs:
            says = ", ".join(f"{c[0]:g}" for c in theirs[name])
            broken = "" if verdict(claim.rule, theirs[name]) == "holds" else " (against its own claim)"
            papers.append(f"{number + ' ' + NAMES[name] + ': ' if name else ''}{says}{broken}")
        for name in names:
            cells = [cell(records, name, where | dict(data=data, size=size)) for where in claim.cells]
            ours = joined(cells).replace(" / ", ", ")
            rows.append([claim.text, claim.place, claim.rule, f"{label_of(data, size)}, {name}",
                         "; ".join(papers) or "no number", ours, verdict(claim.rule, cells)])
    return rows


def price_tables(records):
    """The regulariser's share of the batch against cost and quality, beyond the paper: (name, caption, header, rows),
    one for each kind of training data that a run below RUNS/limits has; rows: labels and what `cell` gives."""
    found = []
    for data, size, p, sigma in sorted({(r["data"], r["size"], r["p"], r["sigma"]) for r in records if r["limits"]}):
        base = dict(data=data, size=size, p=p, sigma=sigma, tuned=False)
        here = [r for r in matching(records, base) if r["method"] in ("ddpm", "adv") and r["lam"] in (None, 0.3)]
        wide = merits(records, data, size) + [n for n in ("PSNR (dB)", "noise estimate") if any(n in r for r in here)]
        keys, rows = {(r["method"], *(r[k] for k in PRICE)) for r in here}, []
        for method, *values in sorted(keys, key=lambda k: (k[0] != "ddpm", k[4], k[3], k[2], -k[1])):
            own = base | dict(zip(PRICE, values)) | dict(method=method)
            cells = [cell(here, "cost", own | dict(sampler=None)),
                     *(cell(here, n, own | dict(sampler="ddpm", attack=None, usual=True)) for n in wide),
                     cell(here, "displacement", own | dict(sampler="ddpm", attack="fgsm", percent=100))]
            rows.append(([METHODS[method], DASH if method == "ddpm" else f"{values[0]:g}", "yes" if values[1] else "no",
                          values[2], f"{values[3]:,}"], cells))
        found.append((f"{label_of(data, size)}, {noise_name(p, sigma)}", scale(here),
                      ["model", "share", "balanced", "network", "steps trained", "cost of a step (× DDPM's)", *wide,
                       "displacement (FGSM, 100 % of the steps)"], rows))
    return found


def toys(runs):
    """What toy3d.py wrote below RUNS. -> {file name: (path, records, claims)}."""
    found = {}
    for path in sorted(runs.rglob("toy3d*.json")):
        with _reading(path, "toy3d.py"):
            lines = read_lines(path)
            found[path.stem] = path, [r for r in lines if "claim" not in r], [r for r in lines if "claim" in r]
            if not lines or any("rms" not in r for r in found[path.stem][1]):
                raise ValueError("no records")
    return found


def toy_section(found):
    """toy3d.py's numbers in two compact tables. -> Markdown."""
    pair = lambda r, key: DASH if None in r[key] else show((r[key][0], r[key][1] if r["seed"] > 1 else None, 0))
    text, main = "", found.get("toy3d")
    if main:
        names = {"rms": "rms distance", "kept": "variance kept", "score_error": "relative error of the score"}
        records, first = main[1], main[1][0]
        one = lambda key, **where: next((pair(r, key) for r in matching(records, where)), DASH)
        rows = [[data, noise, names[key], *(one(key, data=data, noise=noise, method=m) for m in COLOURS)]
                for data, noise in dict.fromkeys((r["data"], r["noise"]) for r in records) for key in names]
        text += (f"Scale: the paper's 3-D data, {first['steps']:,} steps of {first['batch']} points, {first['n']} "
                 f"samples, ± the deviation over {first['seed']} seeds. The paper has figures only.\n\n"
                 + markdown(["data", "training data", "number", *(METHODS[m] for m in COLOURS)], rows))
    rows = {}
    for name, (_, records, _) in found.items():
        for r in records if name != "toy3d" else []:
            setting = r["name"].removeprefix(r["noise"] + " ") + (", balanced" if r.get("balance") else "")
            rows.setdefault((name, r["data"], setting), {})[r["noise"]] = r
    if rows:
        shown = [("inlier", "rms"), ("inlier", "median"), ("inlier", "score_error"), ("clean", "kept")]
        text += "\nSweeps (λ with the reading of its units, ω, the regularised share):\n\n" + markdown(
            ["file", "data", "setting", "rms distance (inlier noise)", "median distance", "error of the score",
             "variance kept (clean data)"],
            [[*key, *(pair(r[n], k) if n in r else DASH for n, k in shown)] for key, r in rows.items()])
    return text or "Not measured yet.\n"


def toy_claims(found):
    """The claims that toy3d.py has checked itself, as rows like `check_claim`'s."""
    rows = []
    for name, (path, _, claims) in found.items():
        with _reading(path, "toy3d.py"):
            rows += [[c["claim"], c["where"], f"{c['factor']} × a < b, apart by their deviations",
                      f"{c['data']}, {c['number']}: {c['smaller']}, {c['larger']}", "no number",
                      ", ".join(DASH if v is None else digits(v) for v in c["values"]),
                      "holds" if c["holds"] else "does not hold"] for c in claims]
    return rows


# -------------------------------------------------------------------------------------------------- pictures and charts

def strip(rows, path, side=300):
    """Rows of titled pictures [(title, file), ...] as one PNG, each at most side x side pixels. -> [path], or []."""
    rows = [row for row in rows if row]
    if not rows:
        return []
    sheet = Image.new("RGB", (max(map(len, rows)) * (side + 8) - 8, len(rows) * (side + 20) - 4), "white")
    for i, row in enumerate(rows):
        for j, (title, file) in enumerate(row):
            with _reading(file, "sample.py"), Image.open(file, formats=["PNG"]) as opened:
                picture = opened.convert("RGB")
            factor = side / max(picture.size)               # whole pixels where it grows
            size = [max(1, int(length * (int(factor) if factor > 1 else factor))) for length in picture.size]
            picture = picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
            sheet.paste(picture, (j * (side + 8), i * (side + 20) + 16))
            ImageDraw.Draw(sheet).text((j * (side + 8), i * (side + 20) + 2), title, fill="black")
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return [path]


def grids(records, where, title):
    """The sample grid of the first seed of the samples that match, as a row of `strip`, or an empty one."""
    found = sorted(matching(records, where), key=lambda r: r["seed"])
    files = [r["path"].with_name(r["path"].name + ".png") for r in found]
    return [(title, file) for file in files if file.exists()][:1]


def pictures(records, out):
    """Sample grids side by side, and along training and lambda. -> {section: [paths]}."""
    made = {"samples": [], "fig24": [], "fig7": []}
    for data, size in sets_for([None], records):
        for p, sigma in sorted({(r["p"], r["sigma"]) for r in matching(records, dict(data=data, size=size))}):
            here, tail = matching(records, dict(data=data, size=size, p=p)), f"{data}-{size}-p{p:g}-s{sigma:g}.png"
            row = [x for m in ("ddpm", "adv") for x in grids(here, of(m, p, sigma), METHODS[m])]
            row += grids(here, of("adv", p, sigma, steps=500), "Robust_adv, 500 steps")
            made["samples"] += strip([row], out / f"samples-{tail}")
            row = [x for lam in (0.1, 0.2, 0.3) for x in grids(here, of("adv", p, sigma, lam=lam), f"lambda {lam}")]
            made["fig7"] += strip([row] if len(row) > 1 else [], out / f"fig7-{tail}")
            rows = []
            for m in ("ddpm", "adv"):
                trained = matching(here, of(m, p, sigma, sampler=None, usual=False))
                trained = sorted(trained, key=lambda r: (-r["step"], r["seed"]))[:1]
                files = [f for r in trained for f in sorted(r["path"].glob("samples-*.png")) if f.stem[8:].isdigit()]
                kept = sorted({round(i * (len(files) - 1) / 4) for i in range(5)}) if files else []
                rows.append([(f"{METHODS[m]}, step {int(files[i].stem[8:])}", files[i]) for i in kept])
            made["fig24"] += strip(rows, out / f"fig24-{tail}", side=180)
    return made


def charts(records, prices, out, plt):
    """The charts of whatever has been measured. -> {section: [paths]}."""
    made, subspace, main = {}, sets_for(["subspace"], records)[0], sets_for(["cifar10"], records)[0]

    def save(name, figure):
        with atomic_write(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)
        made.setdefault(name.split("-")[0], []).append(out / f"{name}.png")

    at = lambda where, number, data: cell(records, number, where | dict(data=data[0], size=data[1]))
    if any(at(where, "ρ", subspace) for _, _, where in FIG3):
        figure, axes = plt.subplots(2, 2, figsize=(8, 5.5), layout="constrained")
        for line, noise in zip(axes, NOISES[:2]):
            for ax, number in zip(line, ("PSNR (dB)", "ρ")):
                bars = [(label, where, at(where, number, subspace)) for label, n, where in FIG3 if n == noise]
                for i, (_, where, found) in enumerate(bars):
                    if found:
                        ax.bar(i, found[0], yerr=found[1], color=COLOURS[where["method"]], capsize=3,
                               hatch="//" if where["lam"] == 0.03 else "")
                ax.set_xticks(range(len(bars)), [re.sub("_|, ", "\n", label) for label, _, _ in bars], fontsize=8)
                ax.set(ylabel=number, title=f"{label_of(*subspace)}, {noise_name(*noise)}")
        save("fig3", figure)
    seen = [(m, r["memory"]) for m in ("ddpm", "adv")
            for r in matching(records, of(m, 0, 0) | dict(data=main[0], size=main[1])) if "memory" in r]
    if seen:
        figure, ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
        one = {METHODS[m]: (result["histogram"], "generated", COLOURS[m], "-") for m, result in reversed(seen)}
        one["training images"] = (seen[0][1]["histogram"], "train", "black", ":")
        for label, (histogram, name, colour, style) in one.items():
            share = [100 * count / max(1, sum(histogram[name])) for count in histogram[name]]
            ax.stairs(share, histogram["edges"], label=label, color=colour, linestyle=style)
        ax.axvline(0.9, color="grey", linewidth=0.8)
        ax.set(xlabel=f"similarity to the nearest training image ({seen[0][1]['features']})",
               ylabel="% of the images", title=f"{label_of(*main)}, clean")
        ax.legend()
        save("fig6", figure)
    number = merits(records, *main)[0]
    attacks = [a for a in ATTACKS if a != "noise" and matching(records, dict(attack=a, data=main[0], size=main[1]))]
    if attacks:
        figure, axes = plt.subplots(1, len(attacks), figsize=(2.6 * len(attacks) + 0.6, 3), layout="constrained",
                                    sharey=True, squeeze=False)
        for ax, attack in zip(axes[0], attacks):
            for m, (name, style) in itertools.product(("ddpm", "adv"), {"noise": "o:", attack: "s-"}.items()):
                found = [(k, at(of(m, 0, 0, attack=name, percent=k), number, main)) for k in PERCENT]
                found = [(k, *value) for k, value in found if value]
                if found:
                    x, y, deviation, _ = zip(*found)
                    ax.errorbar(x, y, [d or 0 for d in deviation], fmt=style, color=COLOURS[m], capsize=2, markersize=4,
                                fillstyle="none" if name == "noise" else "full",
                                label=METHODS[m] + (", random signs" if name == "noise" else ""))
            ax.set(xlabel="% of the steps attacked", title=attack, xticks=PERCENT)
        axes[0][0].set_yscale("log")
        axes[0][0].set_ylabel(f"{number}, {label_of(*main)}")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        save("fig8", figure)
    for k, (title, _, header, rows) in enumerate(prices):
        wide = header[6:]
        figure, axes = plt.subplots(1, len(wide), figsize=(3 * len(wide), 3), layout="constrained", squeeze=False)
        for ax, (i, label) in zip(axes[0], enumerate(wide, 1)):
            for (model, share, balanced, *_), cells in rows:
                if cells[0] and cells[i]:
                    plain = model == METHODS["ddpm"]
                    ax.errorbar(cells[0][0], cells[i][0], cells[i][1], cells[0][1], capsize=2,
                                fmt="s" if balanced == "yes" else "o", color=COLOURS["ddpm" if plain else "adv"])
                    ax.annotate(model if plain else share, (cells[0][0], cells[i][0]), (4, 4), fontsize=7,
                                textcoords="offset points")
            sizes = [cells[i][0] for _, cells in rows if cells[0] and cells[i]]
            far = sizes and max(sizes) > 20 * min(sizes) > 0
            ax.set(xlabel="cost of a step (× DDPM's)", ylabel=label.split(" (FGSM")[0], yscale="log" if far else "linear")
        figure.suptitle(f"{title}; beside each point the share, squares: balanced", fontsize=9)
        save(f"price-{k}", figure)
    return made


# --------------------------------------------------------------------------------------------------- the command line

def write(runs, out, plt):
    """Reads RUNS, writes OUT/README.md and its figures. -> the rows of the table of claims. plt: pyplot, or None."""
    if not runs.is_dir():
        raise UserError(f"--runs {runs}: no such folder; `bash run_all.sh` makes runs/quick or runs/paper")
    toy = toys(runs)
    loaded, left = load(runs)
    if not loaded and not any(runs in path.parents for path, _, _ in toy.values()):
        raise UserError(f"--runs {runs}: no log.jsonl of a training, and no toy3d.json; `bash run_all.sh` makes them")
    given = [r for r in loaded if "yardstick" in r]
    models = [r for r in loaded if "yardstick" not in r]
    records = pool([r for r in models if not r["limits"]], KEY, left)
    limited = {tuple(r[k] for k in KEY[:4]) for r in models if r["limits"]}
    prices = price_tables(pool([r for r in models if tuple(r[k] for k in KEY[:4]) in limited], KEY + PRICE, left))
    made = pictures(records, out)
    for name in [*TOY_FIGURES, *(name for name in toy if name != "toy3d")]:
        folder = toy[name if name in toy else "toy3d"][0].parent if toy else out
        if (folder / f"{name}.png").exists() and toy:
            if folder != out:
                with atomic_write(out / f"{name}.png") as temporary:
                    temporary.write_bytes((folder / f"{name}.png").read_bytes())
            made.setdefault("toy", []).append(out / f"{name}.png")
    if plt:
        for name, paths in charts(records, prices, out, plt).items():
            made[name] = made.get(name, []) + paths
    figures = lambda name, none="": "".join(f"\n![{path.stem}]({path.name})\n" for path in made.get(name, [])) or none
    section = lambda *names: "\n".join(f"## {TABLES[n].text}\n\n{table(TABLES[n], records)}{figures(n)}" for n in names)
    none = "\nNot made yet.\n"
    claims = [row for claim in CLAIMS for row in check_claim(claim, records)] + toy_claims(toy)
    counts = Counter(row[-1].split(" (")[0] for row in claims)
    yard = "".join(f"\nYardstick, {r['label']}: {joined([cell([r], n, {}) for n in TABLES['fig3'].numbers])}\n"
                   for r in given if "ρ" in r)
    features = ", ".join(sorted({str(r["memory"]["features"]) for r in records if "memory" in r})) or DASH
    shown = lambda rows: [[*labels, *map(show, cells)] for labels, cells in rows]
    price = "\n".join(f"{title}. {caption}\n\n{markdown(header, shown(rows))}"
                      for title, caption, header, rows in prices) or "Not measured yet.\n"
    parts = [
        f"# Results\n\nMade by `python report.py --runs {runs} --out {out}` from the files of the runs. {DASH}: not "
        "measured. Only a Fréchet distance on the features of the published Inception weights is an FID. ρ: the noise "
        f"left outside the data's subspace. Of the claims at the end {counts['holds']} hold, {counts['does not hold']} "
        f"do not, {counts['not measured']} are not measured."
        + ("" if plt else " No charts: matplotlib was not installed."),
        f"## 3-D data: Fig. 2, 6 right, 10, 11\n\n{toy_section(toy)}{figures('toy')}",
        section("fig3") + yard, section("table1top", "table1bottom", "table2", "cost", "inv"),
        f"## Fig. 4, 5, 12 to 23: samples of the same seeds side by side\n{figures('samples', none)}",
        section("fig6") + f"\nFeatures that are compared (the paper: DINOv2): {features}.\n", section("fig7", "fig8"),
        f"## Fig. 24: the same seeds along training\n{figures('fig24', none)}",
        section("table4", "table5"),
        "## The price (beyond the paper)\n\nThe regulariser on a share of the batch: what it costs and buys.\n\n"
        f"{price}{figures('price')}",
        "## Claims\n\nA claim holds where its rule does, on the means over seeds; \"within the seeds' spread\": moving "
        "the means by their deviations can turn it. The letters are the numbers in their order.\n\n"
        + markdown(["claim", "paper", "rule", "data, number", "paper's numbers", "ours", ""], claims)]
    if left:
        parts.append("## Left out\n\n" + "".join(f"- `{path}`: {why}\n" for path, why in sorted(left.items())))
    with atomic_write(out / "README.md") as temporary:
        temporary.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts))
    return claims


def main():
    """Collects what the command line says."""
    parser = argparse.ArgumentParser(description="Collect what all stages wrote into tables, figures and claims.",
                                     epilog=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with the runs and their scores, at any depth")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write (default results/)")
    args = parser.parse_args()
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        plt = None
        print("no charts: matplotlib is not installed (pip install matplotlib); tables and sample grids are made")
    counts = Counter(row[-1].split(" (")[0] for row in write(args.runs, args.out, plt))
    print(f"made {args.out}/README.md: of the claims {counts['holds']} hold, {counts['does not hold']} do not, "
          f"{counts['not measured']} are not measured")


if __name__ == "__main__":
    command_line(main)
