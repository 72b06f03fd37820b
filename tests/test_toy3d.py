"""toy3d.py: the 3-D data, the networks side by side, what is measured, claims, table and figures."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import report
import toy3d
from common import UserError
from toy3d import Networks, Setup
from unet import Schedule

PLANE, MODES = toy3d.DATA


# --------------------------------------------------------------------------------------------------- the data

@pytest.mark.parametrize("data", toy3d.DATA)
def test_true_score_is_the_gradient_of_the_diffused_density(data):
    """Catches a mode's covariance left undiffused or unstandardised, and mixture weights that forget the
    exponent."""
    d, alpha_bar, h = toy3d.distribution(data), 0.8, 1e-5
    modes = [scipy.stats.multivariate_normal(math.sqrt(alpha_bar) * ((m - d.centre) / d.scale).numpy(),
                                             alpha_bar * d.covariance.numpy() / d.scale**2 + 0.2 * np.eye(3))
             for m in d.means]

    def log_density(x):
        return np.log(np.mean([mode.pdf(x) for mode in modes], axis=0))

    x = np.random.default_rng(0).normal(size=(50, 3))
    slopes = [(log_density(x + h * e) - log_density(x - h * e)) / (2 * h) for e in np.eye(3)]
    found = toy3d.true_score(data, torch.tensor(x), alpha_bar)
    np.testing.assert_allclose(found, np.stack(slopes, axis=1), rtol=1e-5, atol=1e-6)


def test_distributions_are_the_papers():
    """Catches a wrong plane, mode or deviation, noise of the wrong size or share, outliers off the grid, a
    seed or purpose unused."""
    clean, inlier, outlier = (toy3d.training_points(PLANE, noise, 0, 20_000) for noise in toy3d.NOISES)
    assert torch.allclose(clean.sum(dim=1), torch.tensor(30.0, dtype=torch.float64))
    assert clean.var(dim=0).sum() == pytest.approx(2, rel=0.03)             # deviation 1 in two directions
    off = (inlier.sum(dim=1) - 30).abs() / math.sqrt(3)
    assert off.square().mean().sqrt() == pytest.approx(math.sqrt(0.9) * 0.3, rel=0.02)
    assert (off < 1e-9).double().mean() == pytest.approx(0.1, abs=0.01)
    off = (outlier.sum(dim=1) - 30).abs() / math.sqrt(3)
    assert (off > 1e-9).double().mean() == pytest.approx(0.2, abs=0.02)   # a few grid points lie in the plane
    assert all(len(outlier[off > 1e-9][:, k].unique()) == 16 for k in range(3))
    assert torch.equal(inlier, toy3d.training_points(PLANE, "inlier", 0, 20_000))
    for other in (dict(seed=1), dict(seed=0, purpose="toy held-out points")):
        assert not torch.allclose(inlier, toy3d.training_points(PLANE, "inlier", count=20_000, **other))
    modes = toy3d.training_points(MODES, "clean", 0, 20_000)
    for mean in ([10, 10, 10], [20, 20, 20], [10, 30, 30]):
        near = modes[(modes - torch.tensor(mean)).norm(dim=1) < 2]
        assert len(near) / len(modes) == pytest.approx(1 / 3, abs=0.02)
        assert near.mean(dim=0).tolist() == pytest.approx(mean, abs=0.02)
        assert near.std(dim=0).tolist() == pytest.approx([0.25] * 3, rel=0.03)
    for name in toy3d.DATA:                                                 # unit variance for the network
        x = toy3d.standardised(name, toy3d.training_points(name, "clean", 0))
        assert x.square().sum(dim=1).mean() == pytest.approx(3, rel=0.05)
        assert torch.allclose(toy3d.original(name, x), toy3d.training_points(name, "clean", 0), atol=1e-4)


# ----------------------------------------------------------------------------- networks side by side, trained

def test_networks_are_what_each_would_be_alone():
    """Catches a network that reads a neighbour's weights or time, two layers of the same random numbers, and
    t of one value a network read as one a point."""
    nets, g = Networks([3, 1], width=16), torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 5, 3, generator=g), torch.randint(1000, (2, 5), generator=g)
    out = nets(x, t)
    for k in range(2):
        time = F.linear(nets.embedding[t[k]].double(), nets.time[k].T.double())
        h = F.linear(x[k].double(), nets.weights[0][k].T.double(), nets.biases[0][k, 0].double())
        h = h * (1 + time[:, :16]) + time[:, 16:]
        for w, b in zip(nets.weights[1:], nets.biases[1:]):
            h = F.linear(h.clamp(min=0), w[k].T.double(), b[k, 0].double())
        torch.testing.assert_close(out[k].double(), h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nets(x, torch.tensor([7, 900])), nets(x, torch.tensor([[7] * 5, [900] * 5])))
    assert not torch.allclose(nets.weights[1][0], nets.weights[1][1])
    assert not torch.allclose(nets.weights[1][0], nets.weights[2][0])
    assert torch.equal(nets.weights[1][1], Networks([1], width=16).weights[1][0])


SETUPS = [Setup(PLANE, "inlier", "adv", 0, 0.3), Setup(MODES, "clean", "adv", 1, 0.1, omega=3.0),
          Setup(PLANE, "outlier", "adv", 0, 0.0), Setup(PLANE, "inlier", "adv", 1, 0.3)]


def weights_of(nets, k=0):
    """All weights of network k in one row."""
    return torch.cat([p[k].flatten() for p in nets.parameters()])


def test_training_does_not_depend_on_the_company():
    """Catches randomness keyed by a network's place, gradients averaged over networks, one lambda for all."""
    together = toy3d.train(SETUPS, 6, 16)
    for k, setup in enumerate(SETUPS):
        alone = weights_of(toy3d.train([setup], 6, 16))
        torch.testing.assert_close(weights_of(together, k), alone, rtol=1e-3, atol=1e-5)
    assert (weights_of(together) - weights_of(Networks([0]))).abs().max() > 1e-3


def test_training_takes_the_setups_method_lambda_and_omega():
    """Catches a setting that is not handed on: lambda = 0 must be ddpm, everything else must differ."""
    def trained(**change):
        return weights_of(toy3d.train([SETUPS[0]._replace(**change)], 4, 16))

    ddpm = trained(method="ddpm")
    torch.testing.assert_close(trained(lam=0.0), ddpm, rtol=1e-4, atol=1e-6)
    variants = [ddpm, trained(), trained(lam=1.0), trained(omega=4.0), trained(lam_units="eps"),
                trained(method="ran"), trained(method="inv"), trained(noise="clean"), trained(data=MODES),
                trained(seed=5)]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(variants, 2))


# ------------------------------------------------------------------------------------------- what is measured

def test_errors_of_points_whose_errors_are_known():
    """Catches a distance along an axis instead of the normal, deviations for variances, occupancy of the
    wrong mode."""
    plane = toy3d.training_points(PLANE, "clean", 0)
    shift = torch.where(torch.arange(len(plane)) % 2 == 0, 4.0, -1.0)[:, None] / math.sqrt(3)
    found = toy3d.errors(PLANE, 10 + 0.5 * (plane - 10) + 0.3 * shift)
    assert found["rms"] == pytest.approx(0.3 * math.sqrt(17 / 2)) and found["strays"] == 0.5
    assert found["median"] == pytest.approx(0.3)
    assert found["kept"] == pytest.approx(0.25 * float((plane - 10).square().mean()) * 3 / 2, rel=1e-2)
    found = toy3d.errors(PLANE, plane)
    assert found["rms"] < 1e-9 and found["kept"] == pytest.approx(1, rel=0.03) and found["smallest_mode"] == 1
    modes = toy3d.training_points(MODES, "clean", 0)
    found = toy3d.errors(MODES, modes)
    assert found["rms"] == pytest.approx(0.25 * math.sqrt(3), rel=0.02) and found["strays"] == 0
    assert found["kept"] == pytest.approx(1, rel=0.05)
    assert found["smallest_mode"] == pytest.approx(1, abs=0.05)
    two = modes[modes[:, 1] < 25]
    two[:len(two) // 4] += torch.tensor([0.0, 0.0, 5.0])    # half-way to nowhere: strays, in no mode
    found = toy3d.errors(MODES, two)
    assert found["smallest_mode"] == 0 and found["strays"] == pytest.approx(0.25, abs=1e-3)
    assert found["kept"] == pytest.approx(1, rel=0.05)
    assert math.isnan(toy3d.errors(MODES, modes + 100)["kept"])


def test_lipschitz_constant_of_a_linear_denoiser():
    """Catches the Frobenius norm, a transposed product, eps for the denoiser, one constant for all."""
    schedule = Schedule.named("linear", 1000).to("cpu")
    A = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = toy3d.lipschitz(lambda x, t: x @ A, schedule, torch.randn(2, 4, 3), 300)
    s = schedule.sqrt_one_minus_alpha_bar[300].item()
    for k in range(2):
        expected = np.linalg.svd(np.eye(3) - s * A[k].numpy().astype(float).T, compute_uv=False)[0]
        assert found[k].tolist() == pytest.approx([expected] * 4, rel=1e-5)


def test_attack_throws_a_linear_sampler_as_far_as_computed(monkeypatch):
    """Catches attacked steps that are not ATTACKED many, a shove that is not sigma(t), a disturbed reference
    trajectory, networks that share their noise, and the attack and its control exchanged."""
    schedule, zero = Schedule.named("linear", 1000), lambda x, t: 0 * x
    sigma = (0.5 * schedule.log_variance_large).exp()
    # With eps_theta = 0 a step multiplies by 1 / sqrt(1 - beta), and the best sign is the random start's:
    # both move a sample by random signs.
    steps = [4 * k + 2 for k in range(250)]
    growth = (1 - schedule.beta).rsqrt().cumprod(dim=0)
    expected = (3 * (sigma[steps] * growth[steps]).square().sum()).sqrt().item() * math.sqrt(2 / 3)
    setups = [Setup(PLANE, "clean", "ddpm", seed) for seed in (0, 1)]
    found = torch.stack(toy3d.thrown(zero, schedule.to("cpu"), setups))
    assert found.flatten().tolist() == pytest.approx([expected] * 4, rel=0.15)
    assert len(set(found.flatten().tolist())) == 4
    monkeypatch.setattr(toy3d, "fgsm", lambda one_step, x, normal, gradient: x)
    attacked, control = toy3d.thrown(zero, schedule.to("cpu"), setups)
    assert attacked.tolist() == [0, 0] and control.tolist() == pytest.approx([expected] * 2, rel=0.15)


def test_shoves_follow_the_gradient(monkeypatch):
    """Catches an attack without its gradient: where only one direction of the state matters to the next,
    FGSM's signs agree with that direction, and random signs cancel in it."""
    schedule, u = Schedule.named("linear", 1000), torch.full((3,), 3**-0.5)
    beta, s = schedule.beta[998].item(), math.sqrt(1 - schedule.alpha_bar[998].item())

    def along_u(x, t):          # the next state's mean keeps of x only its part along u
        return s / beta * (x - (x @ u)[..., None] * u)

    monkeypatch.setattr(toy3d, "ATTACKED", 1)
    monkeypatch.setattr(toy3d, "attacked_steps", lambda *_: {998})
    monkeypatch.setattr(toy3d, "sample", lambda nets, schedule, noise, clamp, attack:
                        (attack(next(noise), 998, None) @ u)[..., None] * u)
    setups = [Setup(PLANE, "clean", "ddpm", seed) for seed in (0, 1)]
    sigma = math.sqrt(beta) * math.sqrt(2 / 3)
    attacked, control = toy3d.thrown(along_u, schedule.to("cpu"), setups)
    assert attacked.tolist() == pytest.approx([math.sqrt(3) * sigma] * 2, rel=1e-3)
    assert all(value < 1.3 * sigma for value in control.tolist())


@pytest.mark.parametrize("data", toy3d.DATA)
def test_truth_measures_as_true(data, monkeypatch):
    """Catches any disagreement of units or sign between data, score, sampler and errors: the exact score must
    come out right."""
    for name, value in dict(T=200, SCORE_T=20, ATTACKED=5).items():
        monkeypatch.setattr(toy3d, name, value)
    schedule = Schedule.named("linear", 200)

    def exact(x, t):
        alpha_bar = schedule.alpha_bar[t[0]].item()
        return (-math.sqrt(1 - alpha_bar) * toy3d.true_score(data, x, alpha_bar)).to(x.dtype)

    (numbers, trace, field), = toy3d.measure(exact, [Setup(data, "clean", "ddpm", 0)], 768)
    assert set(numbers) == set(toy3d.COLUMNS)
    assert numbers["score_error"] < 1e-3 and numbers["strays"] == 0
    assert numbers["rms"] == pytest.approx({PLANE: 0, MODES: 0.25 * math.sqrt(3)}[data], abs=0.03)
    assert numbers["kept"] == pytest.approx(1, abs=0.12) and numbers["smallest_mode"] > 0.8
    assert trace.shape == (21, 256, 3) and field.shape == (toy3d.FIELD**2, 3)
    d = toy3d.distribution(data)
    assert (trace[0] - d.centre).std() == pytest.approx(d.scale, rel=0.1)                  # starts as N(0, I)


# ------------------------------------------------------------------------------------------- table and claims

def test_summary_over_seeds():
    """Catches the deviation of a population, seeds of one configuration apart, two configurations as one, and
    a mean that hides a number that is missing."""
    setups = [Setup(PLANE, "inlier", "adv", seed, lam) for lam in (0.1, 0.3) for seed in (0, 1)]
    numbers = dict.fromkeys(toy3d.COLUMNS, 1.0)
    results = [(numbers | dict(rms=rms, kept=kept), None, None)
               for rms, kept in ((1.0, 0.5), (2.0, math.nan), (5.0, 0.5), (5.0, 0.5))]
    first, second = toy3d.summary(setups, results, "lam")
    assert (first["name"], first["seed"], second["name"]) == ("inlier x 0.1", 2, "inlier x 0.3")
    assert first["rms"] == (1.5, pytest.approx(0.5**0.5), 2) and second["rms"] == (5.0, 0.0, 2)
    assert first["kept"] == (None, None, 2) and second["kept"] == (0.5, 0.0, 2)
    assert toy3d.summary(setups[:1], results[:1], None)[0]["rms"] == (1.0, None, 1)


def record(name, data=PLANE, **numbers):
    """A configuration whose numbers are all 1 but those given."""
    noise, method = name.split()
    return dict.fromkeys(toy3d.COLUMNS, (1.0, 0.0, 3)) | dict(
        data=data, name=name, noise=noise, method=method, closed_form=None) | numbers


def test_claims():
    """Catches a claim read the wrong way round, a factor or the deviations forgotten, a claim made up from
    missing runs or numbers, and the data sets mixed."""
    def verdicts(key, *records):
        claims = toy3d.claims_of(list(records))
        return {c["claim"]: (c["verdict"], c["why"], c["closed_form"]) for c in claims
                if f", {toy3d.COLUMNS[key]}:" in c["shown"]}

    def rms(method, mean, deviation=0.0, data=PLANE, exact=None):
        form = exact and dict(rms=exact, kept=1.0)
        return record(f"inlier {method}", data, rms=(mean, deviation, 3), closed_form=form)

    unlearns, diverges = "adv unlearns inlier noise", "invariance diverges, inlier noise"
    holds, fails = ("holds", "", None), ("does not hold", "", None)
    clear = verdicts("rms", rms("ddpm", 0.3, 0.01), rms("adv", 0.05, 0.01), rms("inv", 2.0, 0.5))
    assert clear == {unlearns: holds, diverges: holds}
    close = verdicts("rms", rms("ddpm", 0.3, 0.1), rms("adv", 0.25, 0.1))
    assert close == {unlearns: ("cannot show", "within the deviations", None)}
    assert verdicts("rms", rms("ddpm", 0.05, 0.01), rms("adv", 0.3, 0.01)) == {unlearns: fails}
    assert verdicts("rms", rms("ddpm", 0.3), rms("inv", 0.5)) == {diverges: fails}
    assert verdicts("rms", rms("ddpm", 0.3), rms("adv", 0.1, data=MODES)) == {}
    missing = record("clean adv", kept=(None, None, 3))
    assert set(verdicts("kept", record("clean ddpm"), missing).values()) == {
        ("cannot show", "not measured", None)}
    for share, verdict in ((0.6, holds), (0.4, fails)):     # half of the smallest mode may go
        fewer = record("clean adv", MODES, smallest_mode=(share, 0.0, 3))
        assert verdicts("smallest_mode", record("clean ddpm", MODES), fewer) == {
            "on clean data adv loses no mode": verdict}
    assert verdicts("smallest_mode", record("clean ddpm"), record("clean adv")) == {}       # it has one mode
    for exact, predicted in ((0.2, "holds"), (0.4, "does not hold")):
        assert verdicts("rms", rms("ddpm", 0.3, exact=0.3), rms("adv", 0.1, exact=exact)) == {
            unlearns: ("holds", "", predicted)}


# ------------------------------------------------------------------------------------------- the command line

@pytest.fixture
def short_process(monkeypatch):
    """25 timesteps instead of 1000, two of them attacked, and few samples traced."""
    for name, value in dict(T=25, EVERY=5, SCORE_T=10, ATTACKED=2, VICTIMS=8, TRACES=8).items():
        monkeypatch.setattr(toy3d, name, value)


def toy(out, *flags):
    """Runs the script. -> the files it wrote."""
    toy3d.main([*"--steps 3 --batch 16 --num-samples 16 --seeds 1 --out".split(), str(out), *flags])
    return {path.name for path in out.iterdir()}


def strict(path):
    """A JSON file without NaN and infinity, which are not JSON."""
    def refuse(word):
        raise AssertionError(f"{word} in {path}")
    return json.loads(path.read_text(), parse_constant=refuse)


def test_closed_form_of_a_setup():
    """Catches other data, noise or settings than the network's own, and an answer where there is none; the
    numbers are those that THEORY.md measured, to 5 %."""
    def form(**change):
        return toy3d.closed_form(SETUPS[0]._replace(data=PLANE, noise="inlier", method="adv", **change))

    assert form() == pytest.approx(dict(rms=0.0812, kept=0.882), rel=0.005)     # measured 0.077, 0.878
    assert form(lam=0.1)["rms"] == pytest.approx(0.174, rel=0.01)               # measured 0.159
    assert form(omega=4.0)["rms"] == pytest.approx(0.0964, rel=0.01)            # measured 0.085
    assert form(lam_units="eps")["rms"] > 0.2
    for change in (dict(data=MODES), dict(noise="outlier"), dict(method="inv")):
        assert toy3d.closed_form(SETUPS[0]._replace(**dict(data=PLANE) | change)) is None


def test_everything(short_process, tmp_path, capsys):
    """Catches a run whose records, claims or figures are incomplete, or that report.py does not read."""
    pytest.importorskip("matplotlib")
    figures = {f"{name}.png" for name in ("fig2a", "fig2b", "fig2c", "fig6-right", "fig10", "fig11")}
    assert toy(tmp_path) == {"toy3d.json"} | figures        # after three steps many a number is not finite
    found = strict(tmp_path / "toy3d.json")
    assert len(found["records"]) == 2 * 3 * 4 and len(found["claims"]) == 27
    assert set(found["protocol"]["figures"]) == figures
    protocol = dict(steps=3, batch=16, num_samples=16, seeds=1, sweep=None, device="cpu")
    assert protocol.items() <= found["protocol"].items()
    assert "adv unlearns inlier noise" in capsys.readouterr().out
    read = report.read_toy(tmp_path / "toy3d.json")
    order = report.VERDICTS.index
    assert read.claims == sorted(found["claims"], key=lambda c: order(c["verdict"]))
    assert {path.name for path in read.figures} == figures
    assert "| oblique-plane | inlier adv |" in read.text


def test_panels_show_what_was_sampled():
    """Catches trajectories transposed or drawn backwards, another method's, and a wrong projection."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    path = torch.tensor([[[10, 10, 10], [11, 9, 10]], [[11, 11, 11], [12, 8, 10]], [[9, 9, 9], [10, 10, 10]]])
    path = path.double()                                    # [K, n, 3]
    shown = {(PLANE, "inlier", "adv"): (path, None), (PLANE, "inlier", "ddpm"): (path + 1, None)}
    axes = figure.add_subplot()
    lines, _ = toy3d.draw_panel(axes, ("paths", PLANE, "inlier", "adv"), shown)
    points, = (c for c in axes.collections if c is not lines)
    up, along = 3**0.5, 2**0.5                              # of (1, 1, 1) and of (1, -1, 0)
    expected = np.array([[[0, 0], [0, up]], [[along, 0], [2 * along, 0]], [[0, up], [0, -up]],
                         [[2 * along, 0], [0, 0]]])
    np.testing.assert_allclose(lines.get_segments(), expected, atol=1e-12)
    assert lines.get_array().tolist() == [1000, 1000, 0, 0]
    np.testing.assert_allclose(points.get_offsets(), [[0, -up], [0, 0]], atol=1e-12)
    image, _ = toy3d.draw_panel(figure.add_subplot(), ("flow", PLANE, "inlier", "adv"), shown)
    density = image.get_array()                             # [distance from below, time]
    assert density.shape == (50, 3) and density[25].tolist() == [100, 50, 50]
    assert density[7].tolist() == [0, 0, 50] and density[42].tolist() == [0, 50, 0]     # -1.73, 1.73 of 2.5


@pytest.mark.parametrize("sweep, names", [
    ("lam", [f"{u} {x:g}" for u in ("x", "eps") for x in (0.03, 0.1, 0.3, 0.5, 1)]),
    ("omega", [f"omega {x:g}" for x in (1, 1.5, 2, 3, 4)])])
def test_sweeps(sweep, names, short_process, tmp_path):
    """Catches a sweep that varies another setting, leaves a value out, or writes over the whole run."""
    pytest.importorskip("matplotlib")
    assert toy(tmp_path, "--sweep", sweep) == {f"toy3d-{sweep}.json", f"toy3d-{sweep}.png"}
    found = strict(tmp_path / f"toy3d-{sweep}.json")
    assert {r["name"] for r in found["records"]} == {f"{n} {x}" for n in ("clean", "inlier") for x in names}
    for r in found["records"]:
        assert r["method"] == "adv" and float(r["name"].split()[-1]) == r[sweep]
    units = {r["name"]: r["lam_units"] for r in found["records"]}
    assert all(unit == (name.split()[1] if sweep == "lam" else "x") for name, unit in units.items())
    assert found["protocol"]["figures"] == [f"toy3d-{sweep}.png"] and found["claims"]


@pytest.mark.parametrize("flags", [["--data", "3-gaussians"], ["--method", "inv"]])
def test_sweeps_without_a_closed_form(flags, short_process, tmp_path, monkeypatch):
    """Catches its line drawn of nothing, which matplotlib takes for a point named "x:", and the paper's
    claims on adv judged by another method."""
    pytest.importorskip("matplotlib")
    figures, save = [], toy3d.save_figure
    monkeypatch.setattr(toy3d, "save_figure",
                        lambda figure, path: [figures.append(figure), save(figure, path)][1])
    name = f"toy3d-omega-{flags[1]}"
    assert toy(tmp_path, "--sweep", "omega", *flags) == {f"{name}.json", f"{name}.png"}
    ax = figures[0].axes[0]
    assert "closed form, x" not in ax.get_legend_handles_labels()[1]
    assert "x:" not in [text.get_text() for text in ax.get_yticklabels()]
    claims = strict(tmp_path / f"{name}.json")["claims"]
    assert bool(claims) == ("--data" in flags) and all("3-gaussians" in claim["shown"] for claim in claims)


def test_a_part_without_matplotlib(short_process, monkeypatch, tmp_path, capsys):
    """Catches an import of matplotlib outside the figures' code, a partial run that writes over a whole one,
    and a flag without effect that is not said."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert toy(tmp_path, "--noise", "inlier", "--method", "adv") == {"toy3d-inlier-adv.json"}
    files = toy(tmp_path, "--sweep", "omega", "--omega", "3")
    assert files == {"toy3d-inlier-adv.json", "toy3d-omega.json"}
    said = capsys.readouterr()
    assert "pip install matplotlib" in said.out
    assert said.err.count("--omega has no effect beside --sweep") == 1


@pytest.mark.parametrize("flags, expected", [
    (["--steps", "0"], "--steps 0: must be from 1 to 1e+07"),
    (["--seeds", "0"], "--seeds 0: must be from 1 to 100"),
    (["--batch", "0"], "--batch 0: must be from 1 to 10000"),
    (["--num-samples", "63"], "--num-samples 63: must be from 64 to 100000"),
    (["--num-samples", f"{10**12}"], f"--num-samples {10**12}: must be from 64 to 100000"),
    (["--out", "/dev/null"], "--out /dev/null/toy3d.json: /dev/null is a file, not a folder"),
    (["--lam", "-1"], "--lam -1.0: must be at least 0"),
    (["--lam", "nan"], "--lam nan: must be at least 0"),
    (["--omega", "0.5"], "--omega 0.5: must be at least 1"),
    (["--sweep", "lam", "--noise", "clean"], "--noise clean: a sweep compares clean with inlier"),
    (["--sweep", "lam", "--method", "ddpm"], "--sweep lam --method ddpm: nothing of DDPM depends on it")])
def test_refusals(flags, expected, tmp_path):
    """Catches a bad flag that is found only after the training, or never."""
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        toy3d.main(["--out", str(tmp_path / "no"), *flags])
    assert not (tmp_path / "no").exists()
