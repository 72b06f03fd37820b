"""report.py: every number in its own cell, claims that turn with them, and the paper's numbers as printed."""

import csv
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import report
from common import UserError

PAPER_CSV = Path(report.__file__).with_name("paper.csv")
SUBSPACE = "subspace 4×4"
BEATS = "adv beats DDPM, 90 % with σ 0.2, DDPM sampling"


# --------------------------------------------------- files as the stages leave them, and reading README.md

def configuration(method="adv", p=0.9, sigma=0.2, name="subspace", size=4, **training):
    """A checkpoint's configuration."""
    own = dict(method=method, lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255, reg_share=1.0,
               weighting="paper", flags=None, sigma_known=None, batch=64, lr=1e-3, ema=0.99, amp=False,
               seed=0, init=None)
    return dict(network=dict(channels=32, mult=[1], sigma_data=training.pop("sigma_data", None)),
                process=dict(schedule="linear", timesteps=1000),
                data=dict(name=name, size=size, count=100, p=p, sigma=sigma, data_seed=0),
                training=own | training)


def attacked(name, percent, steps=100, **more):
    """The part of a protocol that attack.py writes."""
    return dict(name=name, steps_attacked=percent * steps // 100, where="spread", phi=1.0, iters=20, eot=5,
                stride=2.5, as_printed=False, eps_scale=1.0) | more


def write_score(folder, config, samples="ddpm-100", sampler="ddpm", steps=100, step=600, attack=None, n=512,
                suffix="fd-exact", **result):
    """A score beside a picture of its samples. result: its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    protocol = dict(checkpoint="x", sha256="0", step=step, config=config, num_samples=n, sampler=sampler,
                    steps=steps, variance="large" if sampler == "ddpm" else None, ema=True, seed=0, batch=64,
                    amp=False, device="cpu", tf32=False, stream="sample", torch="2", attack=attack)
    (folder / f"{samples}.npz.{suffix}.json").write_text(json.dumps(
        dict(samples=f"{samples}.npz", protocol=protocol, **result)))
    side = 4 * config["data"]["size"] + 6                   # 4 by 4 images
    Image.fromarray(np.full((side, side, 3), 55, np.uint8)).save(folder / f"{samples}.png")


def exact(distance, rho):
    """What fid.py measures on subspace data."""
    return dict(metric="FD-exact", value=distance, rho_mean=rho, psnr=20.0, variance_kept=1.0)


def write_pair(runs, adv=(1.0, 0.5), ddpm=(3.0, 2.0)):
    """adv and ddpm at 90 % with sigma 0.2: FD-exact and rho of each."""
    for method, numbers in dict(adv=adv, ddpm=ddpm).items():
        write_score(runs / method, configuration(method), **exact(*numbers))


def write_report(runs, *flags):
    """report.py on a folder -> README.md, and its claims, {(claim, data and number): (numbers, the table that
    the claim stands in and why, if nothing can be shown)}."""
    report.main(["--runs", str(runs), "--out", str(runs.parent / "out"), *flags])
    text = (runs.parent / "out" / "README.md").read_text()
    claims = {}
    for group in text.partition("\n## Claims")[2].partition("\n## ")[0].split("\n### ")[1:]:
        rows = [[part.strip() for part in row.replace("\\|", "¦").strip("|").split("|")]
                for row in group.splitlines() if row.startswith("| ")]
        verdict = group.partition(":")[0].lower()
        claims |= {(row[0], row[3]): (row[5], f"{verdict}: {row[7]}" if row[7] else verdict)
                   for row in rows[2:]}
        assert group.startswith(f"{verdict.capitalize()}: {len(rows) - 2}\n")
    return text, claims


def section(text, title):
    """The part of README.md under a heading that begins with the title."""
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


def cells(text, *labels):
    """The only row of a table that begins with these labels -> its other cells."""
    found = [row.strip("| ").split(" | ") for row in text.splitlines()
             if row.startswith("| " + " | ".join(labels) + " |")]
    assert len(found) == 1, found
    return found[0][len(labels):]


@pytest.fixture(autouse=True)
def no_charts(request, monkeypatch):
    """matplotlib takes a second to import: only the test that is about charts has it."""
    if "charts" not in request.node.name:
        monkeypatch.setattr(report, "pyplot", lambda: None)


# ------------------------------------------------------------------------------- the paper's own numbers

@pytest.mark.parametrize("number, where, printed", [        # read from the PDF
    ("FID", dict(data="cifar10", method="adv", p=0.9, sigma=0.2, sampler="ddim"), 24.93),
    ("IS", dict(data="cifar10", method="ddpm", p=0, sigma=0, sampler="ddpm", steps=1000), 8.95),
    ("FID", dict(data="celeba", method="ddpm", p=0.9, sigma=0.1, sampler="ddim"), 41.29),
    ("IS", dict(data="lsun_bedroom", method="adv", p=0.9, sigma=0.1, sampler="ddim"), 3.96),
    ("FID", dict(data="imagenet64", method="adv", p=0.9, sigma=0.2), 80.3),
    ("IS", dict(data="cifar10", method="ran", sigma=0.2), 4.34),
    ("FID", dict(data="cifar10", method="ddpm", steps=300), 224.38),
    ("FID", dict(data="cifar10", method="inv"), 356.9),
    ("FID", dict(method="ddpm", attack="eot", percent=75), 195.99),
    ("FID", dict(method="adv", attack="pgd", percent=25), 22.7),
    ("FID", dict(data="celeba", method="adv", sigma=0.2, tuned=True), 25.8),
    ("FID", dict(data="cifar10", method="ambient", flags="conf2", sigma=0.1), 102.7),
    ("cost", dict(method="adv"), 2.5)])
def test_paper_csv_has_the_printed_numbers(number, where, printed):
    """Catches a number in the wrong row or column of paper.csv, and one that report.py does not find."""
    assert report.paper(number, where) == printed


def test_paper_csv_has_each_number_once():
    """Catches a row that is there twice, two values for one place, and a repetition unlike the first."""
    with open(PAPER_CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [tuple(v for k, v in row.items() if k not in ("value", "note")) for row in rows]
    assert len(rows) == 143 == len(set(names))              # counted in the PDF
    assert Counter(row["place"] for row in rows) == {
        "2.3": 1, "Table 1 top": 8, "Table 1 bottom": 8, "Table 2": 72, "3.1": 5, "Fig. 8b": 24,
        "Table 4": 16, "Table 5": 9}
    for row, name in zip(rows, names):
        if row["note"].startswith("Table 2's"):
            first = next(r for r, n in zip(rows, names) if n[0] == "Table 2"
                         and all(r[k] == row[k] for k in ("data", "sigma", "method", "sampler", "metric")))
            assert abs(float(first["value"]) - float(row["value"])) < 0.05


def test_rules_hold_for_the_paper_itself(tmp_path):
    """Catches a slip in paper.csv and a claim turned round. The one that breaks is the paper's: Table 1's
    ran, 79.21, is above Table 2's DDPM, 58.05, though the text puts it far below the baselines."""
    with open(PAPER_CSV, newline="") as file:               # the paper's numbers as if we had measured them
        for k, row in enumerate(csv.DictReader(file)):
            if row["metric"] == "FID" and not row["note"].startswith("Table 2's"):
                config = configuration(row["method"], float(row["p"]), float(row["sigma"]), row["data"], 32,
                                       flags=row["flags"] or None,
                                       init="x" if row["trained"] == "fine-tuned" else None)
                attack = row["attack"] and attacked(row["attack"], int(row["steps_attacked"]) // 10, 1000)
                write_score(tmp_path / "runs" / str(k), config, sampler=row["sampler"], attack=attack or None,
                            steps=int(row["steps"] or 250), suffix="fid", metric="FID",
                            value=float(row["value"]))
    text, claims = write_report(tmp_path / "runs")
    decided = {name: verdict for name, (_, verdict) in claims.items() if "not measured" not in verdict}
    broken = ("ran too beats DDPM, 90 % with σ 0.1", "CIFAR-10 32×32, FID")
    assert {name for name, verdict in decided.items() if verdict == "does not hold"} == {broken}
    assert len(decided) == 51                               # counted by hand; the cost has no samples
    assert Counter(decided.values()) == {"holds": 43, "cannot show: within the deviations": 7,
                                         "does not hold": 1}
    found = cells(section(text, "Table 2"), "clean", "DDIM", "Robust_adv")
    assert found == ["31.2", "17.6", "48.8", "31.2 / 6.38", "17.59 / 2.18", "48.8 / 2.39"]
    assert text.count("against its own claim") == 1


# ------------------------------------------------------------------------------------------------ tables

def test_every_number_in_its_own_cell(tmp_path):
    """Catches sampler, noise, method, steps, lambda, flags or fine-tuning being mixed up."""
    runs, value = tmp_path / "runs", 10
    noises = {"clean": (0, 0), "90 % with σ 0.1": (0.9, 0.1), "90 % with σ 0.2": (0.9, 0.2)}
    expected = {}
    for noise, (p, sigma) in noises.items():
        for method, name in (("ddpm", "DDPM"), ("adv", "Robust_adv")):
            for sampler in ("ddpm", "ddim"):
                write_score(runs / str(value), configuration(method, p, sigma), sampler=sampler,
                            steps=dict(ddpm=100, ddim=50)[sampler], **exact(value, 0.5))
                expected[noise, sampler.upper(), name] = f"{value}.0 / 0.500"
                value += 1
    write_score(runs / "one alone", configuration("ran", 0.9, 0), **exact(70, 0.5))         # corrupts nothing
    write_score(runs / "weaker", configuration(lam=0.1), **exact(71, 7))
    write_score(runs / "fewer", configuration("adv", 0, 0), "f", steps=300, **exact(72, 7))
    write_score(runs / "tuned", configuration(init="somewhere"), **exact(73, 7))
    for k, flags in enumerate(("oracle", "conf1", "conf2")):
        write_score(runs / flags, configuration("ambient", flags=flags, sigma_known=0.2), **exact(74 + k, 7))
    write_score(runs / "inv", configuration("inv", 0, 0), **exact(78, 7))
    text, _ = write_report(runs)
    for labels, shown in expected.items():
        assert cells(section(text, "Table 2"), *labels)[0] == shown
    assert cells(section(text, "Fig. 3"), "clean", "Robust_ran")[0] == "20.0 / 0.500 / 70.0"
    assert cells(section(text, "Fig. 7"), "90 % with σ 0.2", "0.1")[0] == "71.0 / 7.00 / 1.00"
    assert cells(section(text, "Fig. 7"), "90 % with σ 0.2", "0.3")[0] == "20.0 / 0.500 / 1.00"
    assert cells(section(text, "Table 1, bottom"), "300", "Robust_adv") == ["72.0 / 7.00", "37.89 / 6.39"]
    assert cells(section(text, "Table 1, bottom"), "300", "DDPM") == ["–", "224.38 / 3.33"]
    assert cells(section(text, "Table 1, bottom"), "1000", "DDPM") == ["–", "7.2 / 8.95"]
    table4 = section(text, "Table 4")
    assert cells(table4, "90 % with σ 0.2", "Robust_adv", "fine-tuned") == ["73.0 / 7.00", "25.8 / 2.1"]
    assert cells(table4, "90 % with σ 0.2", "Robust_adv", "from scratch")[0] == "20.0 / 0.500"
    for k, flags in enumerate(("oracle", "conf1", "conf2")):
        found = cells(section(text, "Table 5"), "90 % with σ 0.2", f"noise-aware, {flags}")
        assert found == [f"{74 + k}.0 / 7.00", ["–", "109.7 / –", "105.3 / –"][k]]
    assert cells(section(text, "2.3"), "Inv_adv") == ["78.0 / 7.00", "356.9 / –"]


def test_seeds_are_pooled_and_other_ways_left_out(tmp_path):
    """Catches a deviation with ddof 0 (0.707), a copy counted as a seed, two ways of training averaged,
    settings that the paper does not vary, and images of no model among ours."""
    runs = tmp_path / "runs"
    for seed, numbers in enumerate([(1.0, 4.0), (3.0, 8.0)]):
        write_score(runs / f"s{seed}", configuration(seed=seed), **exact(*numbers))
    write_score(runs / "z-copy", configuration(seed=1), **exact(3.0, 8.0))
    write_score(runs / "share", configuration(seed=2, reg_share=0.25), **exact(50.0, 8.0))
    write_score(runs / "short", configuration(seed=3), step=500, **exact(60.0, 8.0))
    write_score(runs / "eps", configuration("adv", 0.9, 0.1, lam_units="eps"), **exact(70.0, 8.0))
    write_score(runs / "omega", configuration("ddpm", omega=8.0), **exact(5.0, 2.0))        # nothing to ddpm
    write_score(runs / "usual omega", configuration("ddpm", seed=1), **exact(7.0, 2.0))
    real = dict(exact(0.125, 0), samples="real.npz", protocol={})
    (runs / "real.npz.fd-exact.json").write_text(json.dumps(real))
    text, _ = write_report(runs)
    # mean 2, sample deviation sqrt(((1-2)^2 + (3-2)^2) / 1) = 1.414; rho: mean 6, sqrt(8) = 2.828
    table = section(text, "Table 2")
    assert cells(table, "90 % with σ 0.2", "DDPM", "Robust_adv")[0] == "2.00 ± 1.41 / 6.00 ± 2.83"
    assert cells(table, "90 % with σ 0.2", "DDPM", "DDPM")[0] == "6.00 ± 1.41 / 2.00 ± 0"
    assert "for 600 steps of 64 images; 512 samples, DDPM 100 steps; 2 seed(s), ±" in table
    assert sorted(line[3:] for line in section(text, "Left out").strip().splitlines()) == [
        "eps/ddpm-100.npz.fd-exact.json`: lam_units is eps",
        "real.npz.fd-exact.json`: not of a model of train.py: FD-exact 0.125, ρ 0, PSNR (dB) 20, variance "
        "kept 1",
        "share/ddpm-100.npz.fd-exact.json`: another has its cell",
        "short/ddpm-100.npz.fd-exact.json`: another has its cell",
        "z-copy/ddpm-100.npz.fd-exact.json`: another has its cell"]


def test_what_has_not_run_is_a_dash(tmp_path):
    """Catches a number invented for a stage that is missing or found none, its claim decided all the same,
    and a score that is still in writing taken for a damaged one."""
    write_score(tmp_path / "runs", configuration(), **exact(1.0, 0.5))
    write_score(tmp_path / "runs/nan", configuration("ddpm"), **exact(float("nan"), None))
    (tmp_path / "runs/.partial-a.npz.fid.json").write_text("{")
    text, claims = write_report(tmp_path / "runs")
    assert cells(section(text, "Table 2"), "90 % with σ 0.2", "DDPM", "DDPM")[0] == "–"
    assert claims[BEATS, f"{SUBSPACE}, FD-exact"] == ("1.00, –", "cannot show: not measured")
    assert {verdict for _, verdict in claims.values()} == {"cannot show: not measured"}
    for title in ("Fig. 6 left", "Fig. 8b", "3.1", "3-D data"):
        assert "Not measured yet." in section(text, title)


def test_a_claim_turns_with_its_numbers(tmp_path):
    """Catches a rule that is upside down, does not look at the numbers, or overlooks the seeds' spread."""
    write_pair(tmp_path / "a/runs")
    _, claims = write_report(tmp_path / "a/runs")
    assert claims[BEATS, f"{SUBSPACE}, FD-exact"] == ("1.00, 3.00", "holds")
    assert claims[BEATS, f"{SUBSPACE}, ρ"] == ("0.500, 2.00", "holds")
    write_pair(tmp_path / "b/runs", adv=(3.0, 2.0), ddpm=(1.0, 0.5))
    _, claims = write_report(tmp_path / "b/runs")
    assert claims[BEATS, f"{SUBSPACE}, FD-exact"] == ("3.00, 1.00", "does not hold")
    for seed, value in ((1, 8.0), (2, 0.0)):                # adv 4.3 +- 4.2 > ddpm 1
        write_score(tmp_path / f"b/runs/{seed}", configuration(seed=seed), **exact(1 + value, 0.5))
    _, claims = write_report(tmp_path / "b/runs")
    assert claims[BEATS, f"{SUBSPACE}, FD-exact"][1] == "cannot show: within the deviations"


def test_judge():
    """Catches a claim that is decided without a number or by zeros, deviations that are lost, one seed taken
    for exact, a turn between the ends of the deviations overlooked, and a closed form that is mixed with what
    was measured."""
    less, alike = report.LESS, report.ALIKE
    row = report.judge("c", "Fig. 2", "plane, rms", *less, [(1.0, 0.25, 3), (2.0, None, 1)], [3.0, 2.5])
    assert row == dict(claim="c", place="Fig. 2", shown="plane, rms", rule="a < b", values=[1.0, 2.0],
                       deviations=[0.25, None], verdict="holds", why="", closed_form="does not hold")
    near = "cannot show", "within the deviations"
    for rule, cells, expected in (
            (less, [(1.0, 1.5, 3), (2.0, 0.0, 3)], near),
            (less, [(2.0, 0.0, 3), (2.0, 0.0, 3)], ("does not hold", "")),
            (less, [(1.0, None, 1), (1.2, None, 1)], near),
            (less, [(1.0, None, 1), (1.3, None, 1)], ("holds", "")),
            (less, [(1.3, None, 1), (1.2, 0.0, 2)], near),
            (less, [(1.4, None, 1), (1.2, 0.0, 2)], ("does not hold", "")),
            (less, [(0.0, None, 1), (0.0, 0.0, 2)], ("cannot show", "all are 0")),
            (less, [None, (2.0, None, 1)], ("cannot show", "not measured")),
            (less, [(None, None, 3), (2.0, None, 1)], ("cannot show", "not measured")),
            (alike, [(1.0, 1.0, 3), (1.2, 0.0, 3)], near)):         # 0, 1 and 2 are unlike 1.2
        found = report.judge("", "", "", *rule, cells)
        assert (found["verdict"], found["why"], found["closed_form"]) == (*expected, None)
    assert report.judge("", "", "", *less, [None, None], [1.0, 1.001])["closed_form"] == "holds"
    assert report.judge("", "", "", *less, [None, None], [1.0, None])["closed_form"] is None


def test_only_fid_is_called_fid(tmp_path):
    """Catches FD-pixels printed as the paper's FID, and FID and FD-pixels of one data set in one column."""
    config = configuration(name="cifar10", size=16)
    pixels = dict(metric="FD-pixels", value=29.5, noise_mean=0.25)
    write_score(tmp_path / "runs", config, suffix="fd-pixels", **pixels)
    text, claims = write_report(tmp_path / "runs")
    assert "ours (FD-pixels / noise estimate, CIFAR-10 16×16)" in section(text, "Table 2")
    assert cells(section(text, "Table 2"), "90 % with σ 0.2", "DDPM", "Robust_adv")[0] == "29.5 / 0.250"
    assert "ours (FD-pixels" in section(text, "Table 5") and "ours (FID" not in section(text, "Table 5")
    assert (BEATS, "CIFAR-10 16×16, FD-pixels") in claims and (BEATS, "CIFAR-10 16×16, FID") not in claims
    write_score(tmp_path / "runs", config, suffix="fid", metric="FID", value=8.25, is_mean=9.5)
    table = section(write_report(tmp_path / "runs")[0], "Table 2")
    assert cells(table, "90 % with σ 0.2", "DDPM", "Robust_adv")[0] == "8.25 / 9.50"
    assert "FD-pixels" not in table


def test_data_sets_that_get_a_column(tmp_path):
    """Catches a column for a data set that a table of the paper is not about, or that has one stray run."""
    both = [(0.9, 0.1), (0.9, 0.2)]
    for name, size, noises in (("cifar10", 32, both), ("mine", 8, both), ("stray", 8, both[1:])):
        for k, (method, noise) in enumerate((m, n) for m in ("ran", "adv") for n in noises):
            if name != "stray" or method == "adv":
                config = configuration(method, *noise, name, size)
                write_score(tmp_path / f"runs/{name}{k}", config, **exact(k, 1))
    text, _ = write_report(tmp_path / "runs")
    assert "| model | ours (FD-exact / ρ, CIFAR-10 32×32) | paper" in section(text, "Table 1, top")
    for k in range(4):
        (tmp_path / f"runs/cifar10{k}/ddpm-100.npz.fd-exact.json").unlink()
    text, _ = write_report(tmp_path / "runs")
    assert "| model | ours (FD-exact / ρ, mine 8×8) | paper" in section(text, "Table 1, top")


def test_attacks(tmp_path):
    """Catches an attacked sample taken for an ordinary one, a wrong share, displacement and control swapped,
    the two readings of an algorithm averaged, and a smaller ball among the paper's."""
    for method, base in (("adv", 10), ("ddpm", 20)):
        run, config = tmp_path / "runs" / method, configuration(method, 0, 0)
        write_score(run, config, **exact(base, 1.0))
        for k in (0, 25, 50, 75, 100):
            made = dict(samples=f"fgsm-{k}", attack=attacked("fgsm", k, 48), n=128, steps=48)
            write_score(run, config, **made, **exact(base + k - 5 * (k == 0), 1.0))
            write_score(run, config, **made, suffix="attack", rms=0.25, rms_noise=0.125, n_images=128)
        for printed in (False, True):
            write_score(run, config, f"pgd{printed}", steps=48, **exact(200 + printed, 1),
                        attack=attacked("pgd", 25, 48, as_printed=printed))
    write_score(run, config, "small", steps=48, **exact(300, 1),
                attack=attacked("drift", 25, 48, eps_scale=0.5))
    text, claims = write_report(tmp_path / "runs")
    table = section(text, "Fig. 8b")
    assert cells(table, "fgsm", "75 %", "Robust_adv") == ["85.0 / 1.00 / 0.250 / 0.125", "90.7"]
    # not attacked: the row is that of the attacks' own protocol, not of the model's usual samples
    assert cells(table, "none", "0 %", "DDPM")[0] == "15.0 / 1.00 / 0.250 / 0.125"
    assert "512 samples" in section(text, "2.3") and cells(section(text, "2.3"), "DDPM")[0] == "20.0 / 1.00"
    assert cells(table, "pgd", "25 %", "DDPM") == ["200 / 1.00 / – / –", "55.7"]
    assert cells(table, "pgd as printed", "25 %", "DDPM") == ["201 / 1.00 / – / –", "55.7"]
    assert cells(table, "drift", "25 %", "DDPM") == ["–", "–"]
    assert "eps_scale is 0.5" in section(text, "Left out")
    name = "adv withstands fgsm better than DDPM, at 25, 50, 75 and 100 %", f"{SUBSPACE}, FD-exact"
    assert claims[name] == ("35.0, 60.0, 85.0, 110, 45.0, 70.0, 95.0, 120",
                            "cannot show: within the deviations")
    name = "fgsm on 100 % instead of 25 % of the steps costs adv less than DDPM", f"{SUBSPACE}, FD-exact"
    assert claims[name] == ("110, 35.0, 120, 45.0", "cannot show: within the deviations")      # 75 each


def test_heun_in_the_place_of_ddpm(tmp_path):
    """Catches tables that stay empty, or mix the two, where most models have Heun's samples and a few DDPM's
    as well; Heun's samples in tables of models that have DDPM's; and a caption that does not say."""
    runs = tmp_path / "runs"
    for method, base in (("ddpm", 20.0), ("adv", 10.0)):
        for sigma in (0.0, 0.1, 0.2):
            run, config = runs / f"{method}-{sigma}", configuration(method, 0.9 if sigma else 0.0, sigma)
            made = dict(samples="heun-18", sampler="heun", steps=18)
            write_score(run, config, **made, **exact(base + 10 * sigma, 1))
            write_score(run, config, "ddim-50", "ddim", 50, **exact(base + 30, 1))
            write_score(run, config, "heun-9", "heun", 9, **exact(90 + sigma, 1))
            for steps in (300, 500, 1000) if not sigma else ():
                write_score(run, config, f"ddpm-{steps}", steps=steps, **exact(base + 40 + steps / 100, 1))
    text, claims = write_report(runs)
    table = section(text, "Table 2")
    assert cells(table, "clean", "DDPM", "DDPM")[0] == "20.0 / 1.00"
    assert cells(table, "90 % with σ 0.2", "DDPM", "Robust_adv")[0] == "12.0 / 1.00"
    assert cells(table, "90 % with σ 0.2", "DDIM", "Robust_adv")[0] == "40.0 / 1.00"
    assert claims[BEATS, f"{SUBSPACE}, FD-exact"][0] == "12.0, 22.0"
    said = "Heun's sampling takes the place of DDPM's."
    assert "Heun 18 steps, DDIM 50 steps; 1 seed(s). " + said in table
    fewer = section(text, "Table 1, bottom")
    assert cells(fewer, "300", "Robust_adv")[0] == "53.0 / 1.00" and said not in fewer
    for method, sigma in ((m, s) for m in ("ddpm", "adv") for s in (0.0, 0.1, 0.2)):
        config = configuration(method, 0.9 if sigma else 0.0, sigma)
        write_score(runs / f"{method}-{sigma}", config, **exact(7.0, 1))
    table = section(write_report(runs)[0], "Table 2")       # now as many models have DDPM's
    assert cells(table, "clean", "DDPM", "DDPM")[0] == "7.00 / 1.00" and said not in table


def write_benchmark(folder, seconds, **settings):
    """benchmark.json as train.py --benchmark leaves it. seconds: of a step of ddpm, ran, adv."""
    folder.mkdir(parents=True, exist_ok=True)
    methods = {m: dict(seconds=s, peak_gib=0.5) for m, s in zip(("ddpm", "ran", "adv"), seconds)}
    (folder / "benchmark.json").write_text(json.dumps(dict(
        config=configuration(**settings), device="cpu", torch="2", threads=1, batch=64, methods=methods)))


def test_cost_comes_from_the_benchmarks(tmp_path):
    """Catches seconds shown as a multiple, the cost with a share of the batch taken for the paper's, and two
    parametrisations averaged."""
    write_benchmark(tmp_path / "runs/a", (0.5, 1.0, 1.25))
    write_benchmark(tmp_path / "runs/c", (0.5, 1.5, 2.0), sigma_data=0.5)
    write_benchmark(tmp_path / "runs/b", (0.5, 1.0, 0.75), reg_share=0.25)
    text, claims = write_report(tmp_path / "runs", "--tables", "cost")
    where = f"{SUBSPACE}, network 32 × (1,), batch 64, cpu"
    assert cells(text, where, "Robust_adv") == ["1.25", "2.50", "0.500", "2.5"]
    assert cells(text, where, "Robust_ran") == ["1.00", "2.00", "0.500", "–"]
    other = where.replace(",)", ",), preconditioned")
    assert cells(text, other, "Robust_adv") == ["2.00", "4.00", "0.500", "2.5"]
    assert claims["a training step of adv costs 2.5 of DDPM's", where] == ("2.50", "holds")
    assert claims["ran costs less than adv", where] == ("2.00, 2.50", "holds")


def test_speed_tells_trainings_apart(tmp_path):
    """Catches shares, lengths or parametrisations averaged, the seconds of another share, steps forgotten in
    the seconds, a quality that is reached twice or too early, and the table where it was not asked for."""
    runs = tmp_path / "runs"
    write_pair(runs)
    form = dict(value=40.0, rho_mean=0.5, closed_form="exact")
    for share, seconds in ((1.0, 1.25), (0.25, 0.625)):
        for step, distance in ((500, 55), (1000, 47), (2000, 41)):      # 40 and a fifth are 48
            for sigma_data in (None, 0.5):
                config = configuration(reg_share=share, weighting="balanced", seed=9, sigma_data=sigma_data)
                run = runs / f"{share}-{step}-{sigma_data}"
                write_score(run, config, step=step, closed_form=form,
                            **exact(distance + share + 10 * bool(sigma_data), 5.0))
        write_benchmark(run, (0.5, 1.0, seconds), reg_share=share, weighting="balanced")
    text, _ = write_report(runs, "--tables", "speed")
    made = "balanced", "32 × (1,)", "DDPM 100"
    quick, whole = ("Robust_adv", "0.25", *made), ("Robust_adv", "1", *made)
    tail = ["5.00 (0.500)", "20.0"]
    assert cells(text, *quick, "500") == ["1.25", "312", "", "55.2 (40.0)", *tail]
    assert cells(text, *quick, "1,000") == ["1.25", "625", "625", "47.2 (40.0)", *tail]
    assert cells(text, *quick, "2,000")[1:4] == ["1250", "", "41.2 (40.0)"]
    assert cells(text, *whole, "1,000") == ["2.50", "1250", "1250", "48.0 (40.0)", *tail]
    apart = "Robust_adv", "0.25", "balanced, preconditioned", *made[1:], "2,000"
    assert cells(text, *apart)[:4] == ["–", "–", "", "51.2 (40.0)"]      # not benchmarked
    assert cells(text, "DDPM", "–", "paper", "32 × (1,)", "DDPM 100", "600")[:4] == [
        "1.00 ± 0", "300 ± 0", "", "3.00"]
    assert "of 64 images, regulariser on 0.25 or 1 of them, weighting balanced, paper, preconditi" in text
    assert "Time to quality" not in write_report(runs)[0]


def test_evaluations(tmp_path):
    """Catches steps taken for evaluations, two models in one curve, and a table where one sampler alone has
    several numbers of steps."""
    form = dict(value=2.0, closed_form="exact")
    for step in (600, 1200):
        for sampler, steps in (("heun", 18), ("heun", 9), ("ddim", 50), ("ddim", 10), ("ddpm", 100)):
            write_score(tmp_path / f"runs/{step}", configuration("ddpm", 0, 0), f"{sampler}-{steps}", sampler,
                        steps, step=step, **exact(steps + step, 0.5), closed_form=form)
    write_score(tmp_path / "runs/600", configuration("ddpm", 0, 0), "ddim-20", "ddim", 20, **exact(1, 1))
    for steps in (10, 50):
        own = tmp_path / "runs/adv", configuration("adv", 0, 0), f"ddim-{steps}", "ddim", steps
        write_score(*own, **exact(1, 1))
    table = section(write_report(tmp_path / "runs")[0], "Quality against")
    assert cells(table, "Heun", "35") == ["1218 (2.00)"] and cells(table, "Heun", "17") == ["1209 (2.00)"]
    assert cells(table, "DDIM", "10") == ["1210 (2.00)"] and cells(table, "DDPM", "100") == ["1300 (2.00)"]
    assert "| DDIM | 20 |" not in table and "Robust_adv" not in table and "for 1,200 steps" in table


def test_claims_are_judged_on_the_closed_form_too(tmp_path):
    """Catches a closed form of another cell, one where there is none, and a disagreement not counted."""
    for method, distance, value in (("adv", 1.0, 3.0), ("ddpm", 3.0, 1.0)):
        numbers = exact(distance, distance)
        write_score(tmp_path / "runs" / method, configuration(method), **numbers,
                    closed_form=dict(value=value, rho_mean=value, closed_form="exact"))
        write_score(tmp_path / f"runs/{method}1", configuration(method, 0.9, 0.1), **numbers)
    text, _ = write_report(tmp_path / "runs", "--tables", "table2")
    for claim, forms in ((BEATS, 2 * ["does not hold"]), (BEATS.replace("0.2", "0.1"), ["–", "–"])):
        rows = [row.split(" | ") for row in text.splitlines() if row.startswith(f"| {claim} ")]
        assert [row[-2] for row in rows] == forms           # of FD-exact, of rho
    assert ("Of the claims 4 hold, 0 do not hold, 7 cannot be shown at this scale; of 2 the closed form says "
            "the opposite.") in text


def test_memorisation_and_toy(tmp_path):
    """Catches share and mean exchanged, a claim of toy3d.py lost or turned, its figures not brought along."""
    for method, shared in (("adv", 0.125), ("ddpm", 0.25)):
        own = dict(mean=0.5 if method == "adv" else 0.625, p95=0.75, share=shared)
        write_score(tmp_path / "runs" / method, configuration(method, 0, 0), suffix="memorize",
                    metric="memorisation", features="pixels", generated=own,
                    train=dict(mean=0.375, p95=0.5, share=0.0625),
                    histogram=dict(edges=[-1, 0, 1], generated=[1, 3], train=[2, 2]))
    said = report.judge("invariance diverges", "Fig. 10", "plane, rms", "2 × a < b", lambda a, b: b - 2 * a,
                        [(0.5, 0.0, 3), (0.75, 0.1, 3)])
    record = dict(data="oblique-plane", noise="inlier", method="adv", seed=3, name="inlier adv",
                  rms=[0.0784, 0.005, 3], kept=[0.9, 0.01, 3], median=[None, None, 3],
                  score_error=[0.3, 0.02, 3], closed_form=dict(rms=0.0812, kept=0.882))
    (tmp_path / "runs/toy").mkdir()
    (tmp_path / "runs/toy/fig2a.png").write_bytes(b"picture")
    (tmp_path / "runs/toy/toy3d.json").write_text(json.dumps(dict(
        protocol=dict(steps=3000, batch=128, num_samples=512, seeds=3, sweep=None,
                      figures=["fig2a.png", "lost.png"]), records=[record], claims=[said])))
    text, claims = write_report(tmp_path / "runs")
    assert cells(section(text, "Fig. 6 left"), "Robust_adv")[0] == "0.125 / 0.500 / 0.750"
    assert ("(the paper: DINOv2): pixels.\nTraining images, each with the nearest other one: share ≥ 0.9 "
            "0.0625; mean similarity 0.375; 95th percentile 0.500.") in section(text, "Fig. 6 left")
    assert claims["adv memorises less, clean data", f"{SUBSPACE}, share ≥ 0.9"] == ("0.125, 0.250", "holds")
    found = cells(text, "oblique-plane", "inlier adv")
    assert found == ["0.0784 ± 0.00500", "–", "0.900 ± 0.0100", "0.300 ± 0.0200", "0.0812", "0.882"]
    assert claims["invariance diverges", "plane, rms"] == ("0.500 ± 0, 0.750 ± 0.100", "does not hold")
    assert (tmp_path / "out/fig2a.png").read_bytes() == b"picture"
    assert "](fig2a.png)" in text and "lost" not in text


def test_closed_form_beside_what_was_measured(tmp_path):
    """Catches a prediction in another row or column, one that is averaged with what was measured, and the
    rule for an optimum that is reached: within 5 %, or within the seeds' deviation."""
    form = dict(value=2.0, rho_mean=0.5, psnr=30.0, variance_kept=0.75, closed_form="exact")
    for seed, distance in ((0, 2.0), (1, 2.5)):             # 2.25 ± 0.354 beside 2
        write_score(tmp_path / f"runs/adv{seed}", configuration(p=1.0, seed=seed),
                    **exact(distance, 0.625) | dict(closed_form=form))
    write_score(tmp_path / "runs/ddpm", configuration("ddpm", p=1.0),
                **exact(8.5, 3.0) | dict(closed_form=form | dict(value=8.0)))
    write_score(tmp_path / "runs/omega8", configuration(p=1.0, omega=8.0),
                **exact(1.3, 1.0) | dict(closed_form=form | dict(value=1.25)))
    for run in ("a", "b"):                                  # twice the same, and none in a cell of DDPM's
        write_score(tmp_path / f"runs/{run}", configuration("ddpm", p=1.0), f"heun-18-{run}", "heun", 18,
                    **exact(4.0, 3.0) | dict(closed_form=form | dict(value=5.0)))
    text, claims = write_report(tmp_path / "runs", "--tables", "optimum")
    shown = section(text, "The closed form"), "subspace 4×4", "100 % with σ 0.2"
    assert cells(*shown, "Robust_adv, λ 0.3", "600", "DDPM 100") == [
        "**1.12**", "2.25 ± 0.354 (2.00)", "0.625 ± 0 (0.500)", "1.00 ± 0 (0.750)", "exact"]
    assert cells(*shown, "DDPM", "600", "DDPM 100")[:2] == ["1.06", "8.50 (8.00)"]
    assert cells(*shown, "DDPM", "600", "Heun 18")[:2] == ["0.800", "4.00 (5.00)"]
    found = cells(*shown, "Robust_adv, λ 0.3, omega is 8.0", "600", "DDPM 100")
    assert found[:2] == ["**1.04**", "1.30 (1.25)"]
    assert "2 of the 4 are at the optimum" in text and "Left out" not in text and not claims


# ---------------------------------------------------------------------------------------------- pictures

def test_the_column_of_the_closed_form(tmp_path):
    """Catches a deviation over seeds of what has none, and measured numbers in the prediction's column."""
    form = dict(value=2.0, rho_mean=0.5, psnr=30.0, variance_kept=0.75, closed_form="exact")
    for seed in 0, 1:
        write_score(tmp_path / f"runs/{seed}", configuration(seed=seed),
                    **exact(2.0 + seed, 0.75) | dict(closed_form=form))
    text, _ = write_report(tmp_path / "runs", "--tables", "table1_top")
    assert cells(section(text, "Table 1"), "90 % with σ 0.2", "Robust_adv")[:2] == [
        "2.50 ± 0.707 / 0.750 ± 0", "2.00 / 0.500"]


def test_strips_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Catches strips that need matplotlib, an enlarged picture that is smoothed, and grids that are found by
    their names and not by the log."""
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_pair(tmp_path / "runs")
    grid = np.full((22, 22, 3), 255, np.uint8)              # of 4 by 4 images, each of one grey
    for k in range(16):
        grid[k // 4 * 6:, k % 4 * 6:][:4, :4] = k
    Image.fromarray(grid).save(tmp_path / "runs/ddpm/ddpm-100.png")
    start = dict(event="start", step=0, config=configuration())
    lines = [start, *(dict(event="grid", step=k, file=f"any-{k}.png") for k in (300, 600))]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6'                # still in writing
    (tmp_path / "runs/adv/log.jsonl").write_text(log)
    for name, grey in (("any-300", 1), ("any-600", 2), ("samples-00000900", 3)):
        Image.fromarray(np.full((30, 30, 3), grey, np.uint8)).save(tmp_path / f"runs/adv/{name}.png")
    (tmp_path / "runs/dead").mkdir()
    (tmp_path / "runs/dead/log.jsonl").write_text("")
    text, _ = write_report(tmp_path / "runs")
    assert "matplotlib is not installed" in capsys.readouterr().out and "matplotlib was not installed" in text
    with Image.open(tmp_path / "out/samples-subspace-4-90-with-0.2.png") as opened:
        sheet = np.asarray(opened)                          # a title of 16 pixels and 2 rows of 8, twice
    assert sheet.shape == (2 * (16 + 2 * 66) - 2, 8 * 66 - 2, 3)
    for k in range(16):                                     # DDPM comes first
        own = sheet[16 + k // 8 * 66:, k % 8 * 66:]
        assert (own[:64, :64] == k).all() and (own[64:66, :66] == 255).all()
        assert (own[148:212, :64] == 55).all()
    with Image.open(tmp_path / "out/fig24-subspace-4-90-with-0.2.png") as sheet:
        greys = [set(np.asarray(sheet)[top:top + 64, :64].reshape(-1)) for top in (16, 98)]
        assert sheet.size == (526, 2 * 82 - 2) and greys == [{1}, {2}]
    assert {f"]({path.name})" in text for path in (tmp_path / "out").glob("*.png")} == {True}


def test_training_images_beside_samples(tmp_path):
    """Catches training images that are not those of the run, in disorder or smoothed, and a strip without
    them that fails."""
    images = np.random.default_rng(0).integers(256, size=(36, 8, 8, 3), dtype=np.uint8)
    for name in "a", "b":
        write_score(tmp_path / name / "runs", configuration(name="shapes", size=8), suffix="fd-pixels",
                    metric="FD-pixels", value=1.0)
    common.save_grid(images, tmp_path / "a/runs/training-images.png")
    for name in "a", "b":
        write_report(tmp_path / name / "runs", "--tables", "samples")
    with Image.open(tmp_path / "a/out/samples-shapes-8-90-with-0.2.png") as opened:
        sheet = np.asarray(opened)
    found = [sheet[16 + k // 8 * 66:, k % 8 * 66:][:64:8, :64:8] for k in range(16)]
    assert len(sheet) == 2 * 148 - 2 and np.array_equal(np.stack(found), images[:16])
    assert (sheet[164:228, :64] == 55).all()                # the samples come next
    with Image.open(tmp_path / "b/out/samples-shapes-8-90-with-0.2.png") as sheet:
        assert sheet.size == (526, 146)


def test_real_images_of_every_omega(tmp_path):
    """Catches models of another omega that are left out or averaged with the others, seeds that are not,
    attacked samples among them, pictures of other models than the rows name, and images of no model."""
    for name, grey, more in (("ddpm", 10, dict(method="ddpm")), ("usual", 20, {}),
                             ("omega8", 30, dict(omega=8.0)), ("again", 40, dict(seed=1))):
        config = configuration(name="cifar10", size=16, **more)
        write_score(tmp_path / "runs" / name, config, suffix="fd-pixels", metric="FD-pixels",
                    value=float(grey), noise_mean=0.5)
        common.save_grid(np.full((16, 16, 16, 3), grey, np.uint8), tmp_path / f"runs/{name}/ddpm-100.png")
    write_score(tmp_path / "runs/usual", configuration(name="cifar10", size=16), "f", suffix="fd-pixels",
                attack=attacked("fgsm", 100), metric="FD-pixels", value=99.0)
    (tmp_path / "runs/photos.npz.fd-pixels.json").write_text(json.dumps(dict(
        metric="FD-pixels", value=98.0, protocol={})))      # a folder of images, of no model
    text, _ = write_report(tmp_path / "runs", "--tables", "real")
    table = section(text, "Real images")
    assert cells(table, "DDPM") == ["600", "DDPM 100", "10.0", "0.500"]
    assert cells(table, "Robust_adv, λ 0.3")[2] == "30.0 ± 14.1"            # of 20 and 40
    assert cells(table, "Robust_adv, λ 0.3, omega is 8.0")[2] == "30.0"
    assert "; 1 to 2 seed(s)" in table and "99" not in table
    with Image.open(tmp_path / "out/real-cifar10-16-90-with-0.2.png") as sheet:
        pixels = np.asarray(sheet)
    assert [pixels[16 + 148 * k, 0, 0] for k in range(len(pixels) // 146)] in ([10, 20, 30], [10, 40, 30])


# ----------------------------------------------------------------------------- what the paper's readers asked

def write_asked(runs, method, distance, p=0.9, sigma=0.2, rho=1.0, form=None, step=900, **more):
    """A score of a model of the questions, in a folder of its own; form: the closed form's FD-exact, rho."""
    sampling = {name: more.pop(name) for name in ("sampler", "steps", "attack", "suffix") if name in more}
    corruption, numbers = more.pop("corruption", None), more.pop("numbers", None) or exact(distance, rho)
    usual = dict(weighting="edm", sigma_data=0.5, lam=0.762 if method == "ran" else 0.3, reg_share=0.25)
    config = configuration(method, p, sigma, **usual | more)
    config["data"] |= dict(corruption=corruption) if corruption else {}
    form = dict(closed_form=dict(value=form[0], rho_mean=form[1], closed_form="exact")) if form else {}
    count = len([*runs.glob("*")]) if runs.exists() else 0
    write_score(runs / f"{count}", config, "s", step=step, **dict(sampler="heun", steps=18) | sampling,
                **numbers, **form)


def answer(text, k):
    """The part of README.md that answers question k."""
    return text.split(f"\n### {k}. ")[1].split("\n### ")[0]


def asked(tmp_path):
    """The questions' part of a report on tmp_path/runs."""
    return write_report(tmp_path / "runs", "--tables", "questions")[0]


def test_question_1(tmp_path):
    """Catches a rival's number in another column, the compute-matched model taken for the other, one of
    another weighting or omega among them, a winner within the deviations, conf1 and conf2 counted twice at
    p 1, and a win that is not counted."""
    runs = tmp_path / "runs"
    for seed, more in ((0, 0.0), (1, 0.5)):                 # 0.354 of deviation
        for method, distance in dict(ddpm=9.0, ran=5.0, adv=4.0).items():
            write_asked(runs, method, distance + more, seed=seed)
        write_asked(runs, "adv", 6.0 + more, seed=seed, step=500)
        for flags, distance in dict(oracle=4.25, conf1=12.0, conf2=7.0).items():
            write_asked(runs, "ambient", distance + more, seed=seed, flags=flags)
        write_asked(runs, "adv", 1.0, seed=seed, weighting="paper")
        write_asked(runs, "adv", 30.0, seed=seed, omega=8.0)
        write_asked(runs, "adv", 20.0, seed=seed, step=700)
        for method, distance, flags in (("ddpm", 3.0, None), ("adv", 8.0, None), ("ambient", 2.0, "oracle")):
            write_asked(runs, method, distance + more, p=1, sigma=0.1, seed=seed, flags=flags)
    text = answer(asked(tmp_path), 1)
    assert cells(text.split("\nρ")[0], "90 % with σ 0.2") == [
        f"{x}.25 ± 0.354" if x < 10 else f"{x}.2 ± 0.354" for x in (9, 5, 4, 6)] + [
            "4.50 ± 0.354", "12.2 ± 0.354", "7.25 ± 0.354"]
    assert cells(text.split("\nρ")[0], "100 % with σ 0.1") == [
        "3.25 ± 0.354", "–", "8.25 ± 0.354", "–", "2.25 ± 0.354", "3.25 ± 0.354", "2.25 ± 0.354"]
    assert ("At equal compute Robust_adv is nearer to the clean data than DDPM in 1 of 1 (higher in 0), "
            "than noise-aware (truth) in 0 of 1 (higher in 1), than noise-aware (wrong flags) in 1 of 1 "
            "(higher in 0), than noise-aware (all noisy) in 1 of 1 (higher in 0) corruptions.") in text
    assert ("At equal steps Robust_adv is nearer to the clean data than DDPM in 1 of 2 (higher in 1), "
            "than noise-aware (truth) in 0 of 2 (higher in 1), than noise-aware (wrong flags) in 1 of 2 "
            "(higher in 1), than noise-aware (all noisy) in 1 of 2 (higher in 1) corruptions.") in text
    assert ("- Equal compute:\n  - σ 0.1, p 1; σ 0.2, p 0.9: **noise-aware (truth)**\n"
            "- Equal compute, nobody told the truth:\n  - σ 0.2, p 0.9: **Robust_adv at DDPM's compute**\n"
            "  - σ 0.1, p 1: **noise-aware (all noisy)**\n"
            "- Equal steps:\n  - σ 0.2, p 0.9: **Robust_adv, noise-aware (truth)**\n"
            "  - σ 0.1, p 1: **noise-aware (truth)**\n") in text
    assert "trained for 500 to 900 steps" in text and "2 seed(s)" in text


def test_question_2(tmp_path):
    """Catches clean and noisy data exchanged, an omega in another's frontier, the closed form's quarter for
    the network's, and an interpolation that is not one of logarithms."""
    runs = tmp_path / "runs"
    write_asked(runs, "ddpm", 9.0, p=1, rho=5.0, form=(8.0, 4.0))               # a quarter is 1
    for omega, lam, rho, clean, rho_form, clean_form in (
            (2.0, 0.15, 2.0, 1.0, 4.0, 0.5), (2.0, 0.6, 0.5, 4.0, 0.25, 3.0),
            (8.0, 0.15, 3.0, 1.0, 2.0, 0.25), (8.0, 0.6, 1.5, 2.0, 0.5, 1.0)):
        write_asked(runs, "adv", 7.0, p=1, rho=rho, form=(7.0, rho_form), omega=omega, lam=lam)
        write_asked(runs, "adv", clean, p=0, sigma=0, form=(clean_form, 0.0), omega=omega, lam=lam)
    text = answer(asked(tmp_path), 2)
    # Halfway, in logarithms, from 1 to 4; of the closed form from 0.5 to 3 and from 0.25 to 1.
    assert ("the best first: trained networks 2.00 (Robust_adv, ω 2); the closed form 0.500 (Robust_adv, "
            "ω 8), 1.22 (Robust_adv, ω 2).") in text
    assert cells(text, "Robust_adv, ω 8", "0.6") == [
        "1.50 (0.500)", "7.00 (7.00)", "2.00 (1.00)", "1.00"]
    assert "DDPM: ρ 5.00 (4.00)" in text


def test_question_3(tmp_path):
    """Catches a share of the noise that forgets what DDPM leaves on clean data, another set's or noise's
    DDPM, and the closed form's share for the measured one."""
    runs = tmp_path / "runs"
    for name, suffix in (("subspace", "fd-exact"), ("shapes", "fd-pixels")):
        for method, p, number, form in (
                ("ddpm", 0, 3.0, 0.0), ("ddpm", 1, 5.0, 4.0), ("adv", 1, 3.16228, 1.0)):
            own = dict(name=name, suffix=suffix, **dict(omega=8.0, lam=0.3) if method == "adv" else {})
            own |= dict(form=(1.0, form)) if name == "subspace" else dict(
                numbers=dict(metric="FD-pixels", value=2.0, noise_mean=number / 10))
            write_asked(runs, method, 2.0, p, 0.2 * p, rho=number, **own)
    text = answer(asked(tmp_path), 3)
    assert "the trained networks leave 25 % to 25 %, 2 of 2 not more than 35 %" in text     # √(1 / 16)
    assert cells(text, "shapes 4×4", "100 % with σ 0.2", "λ 0.3, ω 8")[:6] == [
        "25 %", "–", "noise estimate", "0.300", "0.500", "0.316"]
    assert cells(text, SUBSPACE, "100 % with σ 0.2", "λ 0.3, ω 8")[:4] == ["25 %", "25 %", "ρ", "3.00 (0)"]
    assert "| 100 % with σ 0.1 |" not in text


def test_questions_4_and_8(tmp_path):
    """Catches a cost of another method or share, steps for costs, a model of one length as a curve, and the
    cost of share 1 in the sentence of 1/4."""
    runs = tmp_path / "runs"
    for step, distance in ((450, 8.0), (900, 4.0)):
        write_asked(runs, "ran", distance, p=1, step=step)
        write_asked(runs, "adv", distance / 2, p=1, step=step, form=(1.0, 0.5))
    write_asked(runs, "adv", 1.0, p=1, lam=1.2)
    for share, seconds in ((0.25, (0.5, 0.75, 1.0)), (1.0, (0.5, 1.0, 1.5))):
        write_benchmark(runs / f"cost{share}", seconds, p=0, sigma=0, reg_share=share, sigma_data=0.5,
                        weighting="edm")
    text = asked(tmp_path)
    own = answer(text, 4)
    assert cells(own, "Robust_adv, λ 0.3", "450") == ["2.00", "900", "1.00 (0.500)", "4.00 (1.00)"]
    assert cells(own, "Robust_ran, λ 0.762", "900") == ["1.50", "1350", "1.00", "4.00"]
    assert "λ 1.2" not in answer(text, 4)
    assert ("A step of adv costs 1.33 of one of ran; after as many steps, with the λ that are alike at the "
            "optimum, its ρ is level (1.00 against 1.00) and its FD-exact is lower (2.00 against "
            "4.00).") in text
    assert "with the regulariser on 0.25 of the batch 2.00 to 2.00; on 1 of the batch 3.00 to 3.00." in text
    own = "4×4", "32 × (1,)", "64", "cpu"
    assert cells(answer(text, 8), *own, "0.25", "Robust_ran") == ["0.750", "1.50", "0.500"]
    assert cells(answer(text, 8), *own, "1", "Robust_ran")[:2] == ["1.00", "2.00"]


def test_questions_5_to_7(tmp_path):
    """Catches corruptions, weightings, samplers, budgets or attacks averaged or exchanged, a verdict turned
    round, and a question without an answer that shows one."""
    runs = tmp_path / "runs"
    for corruption, p, sigma, ddpm, adv in (("impulse", 0.9, 0.03, 8.0, 4.0), ("outliers", 0.1, 0, 3.0, 6.0),
                                            ("blur", 0.9, 0.1, 5.0, 5.1)):
        forms = ((4.0, 1.0), (5.0, 1.0)) if corruption == "impulse" else (None, None)
        write_asked(runs, "ddpm", ddpm, p, sigma, corruption=corruption, form=forms[0])
        write_asked(runs, "adv", adv, p, sigma, corruption=corruption, form=forms[1])
    text = asked(tmp_path)
    assert ("beside DDPM's, not measured (90 % with σ 0.2); lower (90 % with impulse σ 0.03); higher (10 % "
            "outliers); level (90 % with blur σ 0.1).") in answer(text, 5)
    assert ("covariance, it is not measured (90 % with σ 0.2, 10 % outliers, 90 % with blur σ 0.1); higher (90 "
            "% with impulse σ 0.03).") in answer(text, 5)
    assert cells(answer(text, 5), "10 % outliers", "Robust_adv") == ["6.00", "1.00", "1.00"]
    assert "Not measured yet." in answer(text, 6) and "Not measured yet." in answer(text, 7)
    for k, (weighting, sampler, steps, method) in enumerate([
            ("edm", "heun", 18, "ddpm"), ("edm", "heun", 18, "adv"), ("paper", "heun", 18, "adv"),
            ("paper", "ddpm", 35, "adv"), ("edm", "ddpm", 35, "adv"), ("edm", "heun", 9, "adv")]):
        write_asked(runs, method, 20.0 - 2 * k, 0.6, 0.1, weighting=weighting, sampler=sampler, steps=steps)
    found = answer(asked(tmp_path), 6)
    assert "DDPM on it: its FD-exact is level (18.0 against 20.0) and its ρ is level (1.00 against 1" in found
    assert cells(found, "paper", "DDPM 35", "Robust_adv")[0] == "14.0"
    assert cells(found, "edm", "DDPM 35", "Robust_adv")[0] == "12.0"
    for method, far in (("ddpm", 2.0), ("adv", 1.0)):
        write_asked(runs, method, 0, numbers=exact(far / 2, 1.0), attack=attacked("drift", 0, 24), steps=24,
                    sampler="ddpm")
        for scale in (0.25, 1.0):
            for name, how in (("drift", dict(attack=attacked("drift", 100, 24, eps_scale=scale), steps=24,
                                             sampler="ddpm")),
                              ("trajectory", dict(attack=attacked("trajectory", 100, 1, where="first",
                                                                  eps_scale=scale)))):
                moved = (far + 4 * scale) * (1 if name == "drift" else 10)
                for numbers in (dict(rms=moved, rms_noise=far / 2), exact(moved + 1, 1.0)):
                    write_asked(runs, method, 0, numbers=numbers, **how,
                                suffix="attack" if "rms" in numbers else "fd-exact")
    found = answer(asked(tmp_path), 7)
    assert cells(found, "90 % with σ 0.2", "drift", "0.25", "Robust_adv") == ["2.00", "0.500", "3.00"]
    assert cells(found, "90 % with σ 0.2", "drift", "1", "Robust_adv") == ["5.00", "0.500", "6.00"]
    assert cells(found, "90 % with σ 0.2", "drift", "0", "DDPM") == ["–", "–", "1.00"]
    assert cells(found, "90 % with σ 0.2", "trajectory", "0.25", "DDPM") == ["30.0", "1.00", "31.0"]
    # 2 and 3, 20 and 30: a tenth of each does not bridge them; 5 and 6, 50 and 60 it does.
    assert ("less far than DDPM's in 2 of 4 (higher in 0), by random signs as large in 4 of 4 (higher in 0); "
            "their") in found


def test_charts_are_made_and_linked(tmp_path):
    """Catches a figure that is linked and not made, or made and not linked, one of nothing, and a leftover
    temporary file."""
    pytest.importorskip("matplotlib")
    runs = tmp_path / "runs"
    for method in ("adv", "ddpm"):
        for name, (p, sigma) in dict(clean=(0, 0), noisy=(0.9, 0.1)).items():
            write_score(runs / f"{method}-{name}", configuration(method, p, sigma), **exact(3.0, 1.0))
        config = configuration(method, 0, 0)
        write_score(runs / method, config, "f", attack=attacked("fgsm", 50), **exact(3.0, 1.0))
        write_score(runs / method, config, suffix="memorize", metric="memorisation", features="pixels",
                    generated=dict(mean=0.5, p95=0.75, share=0.1), train=dict(mean=0.4, p95=0.7, share=0.1),
                    histogram=dict(edges=[-1, 0, 1], generated=[1, 3], train=[2, 2]))
    for sampler, steps in (("heun", 9), ("heun", 18), ("ddim", 50), ("ddim", 25)):
        write_score(runs / "adv-clean", configuration("adv", 0, 0), f"{sampler}-{steps}", sampler, steps,
                    **exact(float(steps), 1.0), closed_form=dict(value=2.0, closed_form="exact"))
    text, _ = write_report(runs)
    write_score(runs / "share", configuration("adv", 0, 0, reg_share=0.5), **exact(3.0, 1.0))
    write_benchmark(runs / "share", (0.5, 1.0, 1.25), p=0, reg_share=0.5)
    text += write_report(runs, "--tables", "speed")[0]
    text += asked(tmp_path)
    assert not [*(tmp_path / "out").glob("question*")]      # none of these is a model of the questions
    runs.rename(tmp_path / "others")
    write_asked(runs, "adv", 3.0, 1, 0.2)                   # and nothing of clean data
    assert "question2.png" not in asked(tmp_path)
    for lam, step in ((0.3, 500), (0.3, 900), (0.6, 900)):
        for p in (0, 1):
            write_asked(runs, "adv", 3.0, p, 0.2 * p, rho=1.0, form=(2.0, 1.0), lam=lam, step=step)
    write_asked(runs, "ddpm", 3.0, 1, 0.2, form=(2.0, 4.0))
    write_asked(runs, "ddpm", 0, 0, 0, sampler="ddpm", steps=24, attack=attacked("drift", 100, 24),
                suffix="attack", numbers=dict(rms=1.0, rms_noise=0.5))
    write_benchmark(runs / "cost", (0.5, 1.0, 1.25), p=0, reg_share=0.25, sigma_data=0.5)
    text += asked(tmp_path)
    linked = {part.split(")")[0] for part in text.split("](")[1:]}
    assert linked == {path.name for path in (tmp_path / "out").iterdir()} - {"README.md"}
    assert {"fig3", "fig6", "fig8", "speed-subspace-4-clean", "samples-subspace-4-clean",
            "evaluations-subspace-4-clean", "question1", "question2", "question4",
            "question7"} <= {name.removesuffix(".png") for name in linked}


# --------------------------------------------------------------------------- the command line and errors

def test_readme_says_where_it_comes_from(tmp_path, monkeypatch):
    """Catches a path of this machine in what is shipped, tables written elsewhere than beside the runs, an
    unasked table, and a report that fails where git is not."""
    write_pair(tmp_path / "runs")
    monkeypatch.setenv("PATH", "")
    report.main(["--runs", str(tmp_path / "runs"), "--tables", "table2", "fig7"])
    text = (tmp_path / "runs/README.md").read_text()
    command = "python report.py --runs runs --out runs --tables table2 fig7"
    assert text.startswith(f"# Results\n\nMade by `{command}` at commit unknown, 20")
    assert f" {report.platform.system()}, " in text and "cores" in text and str(tmp_path) not in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Table 2, and ImageNet-64 from 3.1", "## Fig. 7, 25: λ", "## Claims"]


GOOD = "adv/ddpm-100.npz.fd-exact.json"


@pytest.mark.parametrize("flags, file, content, said", [
    ([], None, None, "--runs {runs}: no scores, benchmark.json, log.jsonl or toy3d.json in it"),
    (["--runs", "nowhere"], None, None, "--runs nowhere: no such folder"),
    (["--tables", "table9"], GOOD, None, "--tables table9: there is no such table; they are toy3d, fig3"),
    (["--tables", "speed", "fig3"], GOOD, None, "--tables speed: stands alone"),
    ([], GOOD, "{broken", "{file}: damaged, or not what"),
    ([], "a.npz.attack.json", "[]", "{file}: damaged, or not what"),
    ([], "b.npz.fid.json", '{"metric": "distance", "protocol": {}}', "{file}: damaged, or not what"),
    ([], "c.npz.fid.json", '{"metric": "FID", "value": 1, "protocol": {"config": 3}}', "{file}: damaged, or"),
    ([], "d.npz.fid.json", "[" * 10**5, "{file}: damaged, or not what fid.py"),
    ([], "f.npz.fid.json", '{"metric": "FID", "value": [1], "protocol": {}}', "{file}: damaged, or not what"),
    (["--out", "/dev/null"], GOOD, None, "--out /dev/null/README.md: /dev/null is a file, not a folder"),
    ([], "log.jsonl", "nonsense\n", "{file}: damaged, or not what train.py"),
    ([], "log.jsonl", '{"event": "start"}\n', "{file}: damaged, or not what train.py"),
    ([], "benchmark.json", "{}", "{file}: damaged, or not what train.py --benchmark"),
    ([], "toy3d.json", '{"protocol": {}, "records": [{}], "claims": []}', "{file}: damaged, or not what toy"),
    ([], "toy3d.json", '{"protocol": {}, "records": [], "claims": [{}]}', "{file}: damaged, or not what toy"),
    ([], "adv/ddpm-100.png", "no picture", "{file}: damaged, or not what sample.py")])
def test_refusals(tmp_path, flags, file, content, said):
    """Catches a traceback, and a damaged file passed over in silence, which would be a dash for no reason."""
    runs = tmp_path / "runs"
    runs.mkdir()
    if file:
        write_pair(runs)
    if content:
        (runs / file).write_text(content)
    with pytest.raises(UserError) as error:
        report.main(["--runs", str(runs), *flags])
    assert str(error.value).startswith(said.format(runs=runs, file=runs / (file or ""))), str(error.value)
    assert "\n" not in str(error.value) and not (runs / "README.md").exists()


def test_odd_files(tmp_path):
    """Catches a wait without an end for a pipe, a traceback for a folder, and values of the wrong kind that
    are met only when a table is sorted or a figure is drawn."""
    runs = tmp_path / "runs"
    write_pair(runs)
    good, odd = json.loads((runs / GOOD).read_text()), runs / "odd.npz.fid.json"

    def refused():
        with pytest.raises(UserError, match=f"^{odd}: damaged, or not what") as error:
            report.main(["--runs", str(runs)])
        return str(error.value)

    os.mkfifo(odd)
    assert "not a regular file" in refused()
    odd.unlink()
    odd.mkdir()
    assert "not a regular file" in refused()
    odd.rmdir()
    odd.write_text("")
    os.truncate(odd, 5 * 10**9)                             # which takes no space
    assert "5,000,000,000 bytes" in refused()
    odd.write_text(json.dumps(good | dict(value=10**400)))
    assert "a number of 401 digits" in refused()
    for group, name, value in [("training", "seed", [1]), ("training", "batch", "64"), ("data", "size", None),
                               ("training", "reg_share", {}), ("network", "mult", 3), ("data", "p", "0.9")]:
        config = good["protocol"]["config"]
        changed = config | {group: config[group] | {name: value}}
        odd.write_text(json.dumps(good | dict(protocol=good["protocol"] | dict(config=changed))))
        refused()
    for name in ("steps", "step", "num_samples"):
        odd.write_text(json.dumps(good | dict(protocol=good["protocol"] | {name: "100"})))
        refused()


def test_every_corruption_has_a_name_of_its_own():
    """Catches models of other corruptions averaged as one, and outliers, which have no sigma, as clean."""
    def noise(p, sigma, corruption=None):
        config = configuration(p=p, sigma=sigma)
        return report.facts(config | dict(data=config["data"] | (
            dict(corruption=corruption) if corruption else {})))["noise"]

    assert noise(0.9, 0.2) == noise(0.9, 0.2, "gaussian") == report.NOISY[1]
    assert noise(0, 0, "blur") == report.CLEAN
    kinds = [noise(0.9, 0.2, kind) for kind in ("gaussian", "impulse", "blur")] + [noise(0.9, 0, "outliers")]
    assert len({report.CLEAN, *kinds}) == 5
