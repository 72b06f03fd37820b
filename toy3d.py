"""The paper's "in vitro" experiments: points in 3-D whose true distribution is known (sections 2.2, 3.1, 3.3,
C.2, D).

    python toy3d.py                                         # everything: table, claims and figures
    python toy3d.py --data oblique-plane --noise inlier --method adv
    python toy3d.py --sweep lam                             # noise removed against variance lost
    python toy3d.py --sweep omega

Writes OUT/toy3d.json (a sweep: toy3d-lam.json ...), which report.py reads, and figures beside it.
The loss is train.py's, the sampler sample.py's, the attack attack.py's. All networks of a method (data sets,
noises, seeds, and in a sweep the values of lambda or omega) train side by side in one batched network.
"""

import common                                               # first: it answers Ctrl-C while others load

import functools
import itertools
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attack import attacked_steps, fgsm, gradient_of, random_signs
from common import (Progress, UserError, check_out, check_ranges, command_line, generator, image_noise,
                    parser_of, pyplot, save_figure, write_json)
from gaussian import predicted_plane
from report import DASH, LESS, METHODS, judge, show
from sample import reverse_step, sample, say_idle
from train import draw, radius, training_loss
from unet import Schedule, at, timestep_embedding

DATA, NOISES = ["oblique-plane", "3-gaussians"], ["clean", "inlier", "outlier"]
T = 1000                                # linear schedule
INLIER_P, INLIER_SIGMA = 0.9, 0.3       # share of the points, and deviation of their noise in data units
OUTLIER_P, GRID = 0.2, 16               # share of the points; grid points along an edge of the bounding cube
POINTS, HELD_OUT = 8192, 2048           # a network's training points; clean points to compare at
SWEEPS = {"lam": [0.03, 0.1, 0.3, 0.5, 1.0], "omega": [1.0, 1.5, 2.0, 3.0, 4.0]}
SCORE_T, FIELD = 100, 21                # where scores are compared; points along an edge of a score field
TRACES, EVERY = 256, 10                 # trajectories kept, and every how many steps they are looked at
ATTACKED, VICTIMS = 250, 64             # attacked steps of T, and samples attacked
PATHS, DOTS, BINS, ORANGE = 3, 768, 50, "#D55E00"       # trajectories, points, and bins in a panel


class Setup(NamedTuple):
    """One network: what it is trained on, how, and the seed of all its randomness."""
    data: str
    noise: str
    method: str
    seed: int
    lam: float = 0.3
    lam_units: str = "x"
    omega: float = 2.0


# --------------------------------------------------------------------------------------------------- the data

@functools.cache
def distribution(name):
    """A clean data set of section 2.2 as a mixture of Gaussians in data units, float64.

    means [K, 3]; every mode has `deviation` in the directions that the projector `inside` [3, 3] leaves, so
    covariance [3, 3]; centre [3] and scale standardise it; low, high [3]: its bounding cube; from a distance
    of `stray` on, a point belongs nowhere.
    It is drawn in the plane with `basis` [2, 3] through origin [3], up to `reach` from the cube's middle; a
    heat map shows coordinate `flow` of it.
    """
    eye = torch.eye(3, dtype=torch.float64)
    if name == "oblique-plane":         # x + y + z = 30; deviation 1 along it, so that noise of 0.3 is strong
        normal = torch.full((3,), 3**-0.5, dtype=torch.float64)
        along = 0.5**0.5 * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
        means = torch.full((1, 3), 10.0, dtype=torch.float64)
        d = SimpleNamespace(means=means, inside=eye - torch.outer(normal, normal), deviation=1.0, stray=0.9,
                            basis=torch.stack([along, normal]), origin=means[0], reach=2.5, flow=1,
                            labels=("along the plane (data units)", "distance from the plane (data units)"))
    else:
        means = torch.tensor([[10, 10, 10], [20, 20, 20], [10, 30, 30]], dtype=torch.float64)
        diagonal = 0.5**0.5 * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
        d = SimpleNamespace(means=means, inside=eye, deviation=0.25, stray=1.5,
                            basis=torch.stack([eye[0], diagonal]), origin=0 * means[0], reach=20.0, flow=0,
                            labels=("x (data units)", "(y + z) / √2 (data units)"))
    d.covariance, d.centre = d.deviation**2 * d.inside, means.mean(dim=0)
    d.scale = (d.covariance.trace() / 3 + (means - d.centre).square().mean(dim=0).mean()).sqrt().item()
    middle, extent = (means.amax(0) + means.amin(0)) / 2, (means.amax(0) - means.amin(0)).max()
    half = extent / 2 + 3.5 * d.covariance.diagonal().max().sqrt()
    d.low, d.high = middle - half, middle + half
    return d


def standardised(data, x):
    """Data units -> what the network sees, float32."""
    d = distribution(data)
    return ((x - d.centre) / d.scale).float()


def original(data, x):
    """The inverse of `standardised`, float64."""
    d = distribution(data)
    return d.centre + d.scale * x.double()


def training_points(data, noise, seed, count=POINTS, purpose="toy points"):
    """Points of a data set, corrupted once and for all: [count, 3] in data units, float64."""
    d, g = distribution(data), generator(purpose, seed)

    def normal():
        return torch.randn(count, 3, generator=g, dtype=torch.float64)

    x = d.means[torch.randint(len(d.means), (count,), generator=g)] + d.deviation * normal() @ d.inside
    coin = torch.rand(count, 1, generator=g)
    if noise == "inlier":
        x = torch.where(coin < INLIER_P, x + INLIER_SIGMA * normal(), x)
    elif noise == "outlier":
        grid = torch.randint(GRID, (count, 3), generator=g) / (GRID - 1)
        x = torch.where(coin < OUTLIER_P, d.low + (d.high - d.low) * grid, x)
    return x


def true_score(data, x_t, alpha_bar):
    """The score of the clean data after diffusion: x_t [..., 3] standardised, alpha_bar a float -> [..., 3],
    float64. With Eq. 2 a mode N(m, C) becomes N(sqrt(alpha_bar) m, alpha_bar C + (1 - alpha_bar) I)."""
    d = distribution(data)
    means = alpha_bar**0.5 * (d.means - d.centre) / d.scale                                         # [K, 3]
    covariance = (alpha_bar * d.covariance / d.scale**2
                  + (1 - alpha_bar) * torch.eye(3, dtype=torch.float64))                            # [3, 3]
    difference = means - x_t.double()[..., None, :]                                              # [..., K, 3]
    scores = difference @ torch.linalg.inv(covariance)                              # of each mode alone
    likelihood = torch.softmax(-0.5 * (difference * scores).sum(dim=-1), dim=-1)                    # [..., K]
    return (likelihood[..., None] * scores).sum(dim=-2)


def slice_of(data, alpha_bar):
    """A square grid in the plane that a data set is drawn in, diffused without noise: x_t [FIELD^2, 3]
    standardised, row by row from below."""
    d, steps = distribution(data), torch.linspace(-1, 1, FIELD, dtype=torch.float64)
    offset = d.reach * torch.cartesian_prod(steps, steps).flip(1) @ d.basis
    return alpha_bar**0.5 * standardised(data, (d.low + d.high) / 2 + offset)


# ------------------------------------------------------------------------- networks side by side, Algorithm 1

class Networks(nn.Module):
    """S multilayer perceptrons eps_theta side by side: x [S, B, 3], t [S, B] or [S] -> [S, B, 3].

    The first layer is scaled and shifted by the time: without the scale, thin modes take twice the training.
    """

    def __init__(self, seeds, width=64, hidden=3, embedding=32):
        super().__init__()
        self.register_buffer("embedding", timestep_embedding(torch.arange(T), embedding))     # [T, embedding]

        def uniform(index, rows, columns, fan_in):          # as nn.Linear starts, each network from its seed
            streams = [generator("toy weights", seed, index) for seed in seeds]
            draws = torch.stack([torch.rand(rows, columns, generator=g) for g in streams])
            return nn.Parameter((2 * draws - 1) / fan_in**0.5)

        sizes = list(enumerate(itertools.pairwise([3] + [width] * hidden + [3])))
        self.weights = nn.ParameterList(uniform(2 * k, a, b, a) for k, (a, b) in sizes)
        self.biases = nn.ParameterList(uniform(2 * k + 1, 1, b, a) for k, (a, b) in sizes)
        self.time = uniform(2 * len(sizes), embedding, 2 * width, embedding)

    def forward(self, x, t):
        time = torch.bmm(self.embedding[t.reshape(len(x), -1)], self.time)          # [S, B or 1, 2 width]
        scale, shift = time.chunk(2, dim=2)
        h = torch.baddbmm(self.biases[0], x, self.weights[0]) * (1 + scale) + shift
        for weight, bias in zip(self.weights[1:], self.biases[1:]):
            h = torch.baddbmm(bias, F.relu(h), weight)
        return h


def draws_of(setups, step, batch):
    """The randomness of one training step, which depends on a network's seed and the step alone.

    -> the points of its batch, as indices [S, B], and what train.py's `draw` gives, with S in front.
    """
    own = {}
    for seed in {s.seed for s in setups}:
        order = torch.randint(POINTS, (batch,), generator=generator("toy order", seed, step))
        own[seed] = order, *draw(seed, step, batch, (3,), T, "cpu")
    return map(torch.stack, zip(*(own[s.seed] for s in setups)))


def train(setups, steps, batch, lr=3e-3):
    """Algorithm 1 for one network a setup, side by side: all of one method and lam_units.

    What becomes of a network depends on its setup alone. -> Networks, without gradients.
    """
    (method, lam_units), = {(s.method, s.lam_units) for s in setups}
    schedule, nets = Schedule.named("linear", T).to("cpu"), Networks([s.seed for s in setups])
    optimizer = torch.optim.AdamW(nets.parameters(), lr=lr, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    lam, omega = (torch.tensor([[getattr(s, name)] for s in setups]) for name in ("lam", "omega"))  # [S, 1]
    points = torch.stack([standardised(s.data, training_points(s.data, s.noise, s.seed)) for s in setups])
    which = torch.arange(len(setups))[:, None]                                                      # [S, 1]
    progress = Progress(steps, "steps", f"{method} x {len(setups)}")
    for step in range(steps):
        order, t, beta, eps, u, _ = draws_of(setups, step, batch)                       # [S, B] or [S, B, 3]
        terms = training_loss(nets, schedule, points[which, order], t, eps, beta, u, method, lam=lam,
                              lam_units=lam_units, omega=omega)                         # Eq. 8, Eq. 6
        optimizer.zero_grad()
        sum(terms.values()).mean(dim=1).sum().backward()    # summed over networks: each has its own gradient
        optimizer.step()                                                               # theta - eta grad L_AT
        rate.step()
        progress.update(step + 1)
    progress.close()
    return nets.requires_grad_(False)


# ------------------------------------------------------------------------------------------- what is measured

def errors(data, x):
    """Samples x [N, 3] in data units against the truth -> dict.

    Distance to the plane, or to the nearest mode: `rms`, `median`, share of `strays`. `kept`: variance along
    the plane, or inside a mode, over the true one (NaN where no mode has two samples). `smallest_mode`: the
    share of samples in the emptiest mode, times the number of modes.
    """
    d = distribution(data)
    if data == "oblique-plane":
        distance, mode = ((x - d.centre) @ d.basis[1]).abs(), torch.zeros(len(x), dtype=torch.long)
        belongs = distance < math.inf
    else:
        distance, mode = torch.cdist(x, d.means).min(dim=1)
        belongs = distance < d.stray
    members = [x[belongs & (mode == k)] for k in range(len(d.means))]
    variances = [(m @ d.inside).var(dim=0).sum() for m in members if len(m) > 1]
    kept = torch.stack(variances).mean() / d.covariance.trace() if variances else math.nan
    return dict(rms=distance.square().mean().sqrt().item(), median=distance.median().item(), kept=float(kept),
                strays=(distance > d.stray).double().mean().item(),
                smallest_mode=min(map(len, members)) * len(members) / len(x))


def lipschitz(model, schedule, x_t, t):
    """Local Lipschitz constant of the denoiser x_t -> x_t - sqrt(1 - alpha_bar) eps_theta = sqrt(alpha_bar)
    x0_hat: the largest singular value of its Jacobian. Perfect equivariance (Eq. 6) would be 0.

    x_t [S, B, 3], t one timestep -> [S, B].
    """
    t = torch.full((len(x_t),), t)
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        denoised = x_t - at(schedule.sqrt_one_minus_alpha_bar, t, x_t) * model(x_t, t)
        rows = [torch.autograd.grad(denoised[..., k].sum(), x_t, retain_graph=True)[0] for k in range(3)]
    return torch.linalg.matrix_norm(torch.stack(rows, dim=-2), ord=2)


def noise_of(purpose, setups, count):
    """Yields standard normal tensors [S, count, 3] without end, a network's from its own seed."""
    return image_noise(purpose, 0, [s.seed for s in setups], (count, 3))


def thrown(nets, schedule, setups):
    """How far ATTACKED shoves throw a sample: by FGSM (Algorithm 2), and by random signs of the same size ->
    two of [S], rms distances in data units from the undisturbed sample of the same noise."""
    steps = attacked_steps(len(schedule), ATTACKED, "spread")
    draws = noise_of("toy attack", setups, VICTIMS)

    def attack(x_t, i, z):
        if i not in steps:
            return x_t
        one_step = functools.partial(reverse_step, nets, schedule, i=i, clamp=None)
        normal, gradient = (lambda: next(draws)), (lambda L, x: gradient_of(L, x)[0])
        clean, x_t, control = x_t.chunk(3, dim=1)           # three trajectories of the same noise
        x_t = fgsm(one_step, x_t, normal, gradient)
        control = random_signs(one_step, control, normal, gradient)
        return torch.cat([clean, x_t, control], dim=1)

    noise = (z.repeat(1, 3, 1) for z in noise_of("toy victims", setups, VICTIMS))
    clean, *moved = sample(nets, schedule, noise, clamp=None, attack=attack).chunk(3, dim=1)       # [S, n, 3]
    scale = torch.tensor([distribution(s.data).scale for s in setups])
    return [scale * (x - clean).square().sum(dim=2).mean(dim=1).sqrt() for x in moved]


def traced(nets, schedule, setups, count):
    """Samples of every network by Eq. 4 -> x_0 [S, count, 3], and the first TRACES of them on their way
    [T / EVERY + 1, S, TRACES, 3], from x_T to x_0."""
    progress, trace = Progress(T, "steps", f"{setups[0].method} sampling"), []

    def look(x_t, i, z):
        if (i + 1) % EVERY == 0:                            # T - 1, T - 1 - EVERY, ...
            trace.append(x_t[:, :TRACES])
        progress.update(T - i)
        return x_t

    x_0 = sample(nets, schedule, noise_of("toy samples", setups, count), clamp=None, attack=look)
    progress.close()
    return x_0, torch.stack([*trace, x_0[:, :TRACES]])


def learned_scores(nets, schedule, setups):
    """The networks' scores at SCORE_T -> their relative errors [S] on diffused clean points, and the scores
    on the grid of `slice_of` [S, FIELD^2, 3], standardised."""
    alpha_bar, t = schedule.alpha_bar[SCORE_T].item(), torch.full((len(setups),), SCORE_T)

    def score(x_t):
        return -nets(x_t, t).double() / (1 - alpha_bar)**0.5

    clean = [training_points(s.data, "clean", 0, HELD_OUT, "toy held-out points") for s in setups]
    x_0 = torch.stack([standardised(s.data, x) for s, x in zip(setups, clean)])
    x_t = schedule.noised(x_0, t, next(noise_of("toy held-out noise", setups, HELD_OUT)))           # Eq. 2
    truth = torch.stack([true_score(s.data, x, alpha_bar) for s, x in zip(setups, x_t)])           # [S, N, 3]
    error = ((score(x_t) - truth).square().mean(dim=(1, 2)) / truth.square().mean(dim=(1, 2))).sqrt()
    return error, score(torch.stack([slice_of(s.data, alpha_bar) for s in setups]))


def measure(nets, setups, count):
    """Compares `count` samples of every network with the truth -> for every network its numbers, a dict with
    the keys of COLUMNS; trajectories [T / EVERY + 1, TRACES, 3] in data units; and its score field, see
    `learned_scores`."""
    schedule = Schedule.named("linear", T).to("cpu")
    x_0, trace = traced(nets, schedule, setups, count)
    slopes = [lipschitz(nets, schedule, x_t[:, :VICTIMS], T - 1 - k * EVERY)                        # [S, B]
              for k, x_t in enumerate(trace[:-1])]
    error, fields = learned_scores(nets, schedule, setups)
    by_fgsm, by_signs = thrown(nets, schedule, setups)
    slope = torch.stack(slopes).mean(dim=(0, 2))                                                    # [S]
    results = []
    for k, s in enumerate(setups):
        numbers = errors(s.data, original(s.data, x_0[k])) | dict(
            score_error=error[k].item(), lipschitz=slope[k].item(), thrown=by_fgsm[k].item(),
            shaken=by_signs[k].item())
        results.append((numbers, original(s.data, trace[:, k]), fields[k]))
    return results


# ------------------------------------------------------------------------------------------- table and claims

COLUMNS = dict(rms="rms", median="median", strays="strays", kept="variance kept", smallest_mode="least mode",
               score_error="score error", lipschitz="Lipschitz", thrown="thrown by FGSM", shaken="by signs")
TWICE, HALF = ("2 a < b", lambda a, b: b - 2 * a), ("a / 2 < b", lambda a, b: b - a / 2)
# Claim, where in the paper, the number that shows it, the rule, and its a and b. The last group is of sweeps.
CLAIMS = [
    ("invariance diverges, clean data", "Fig. 10", "rms", TWICE, "clean ddpm", "clean inv"),
    ("invariance diverges, inlier noise", "Fig. 2a, 10", "rms", TWICE, "inlier ddpm", "inlier inv"),
    ("invariance diverges, outliers", "Fig. 2a, 10", "rms", TWICE, "outlier ddpm", "outlier inv"),
    ("adv unlearns inlier noise", "Fig. 2a, 3.1", "rms", LESS, "inlier adv", "inlier ddpm"),
    ("adv suffers less from outliers", "Fig. 2a", "rms", LESS, "outlier adv", "outlier ddpm"),
    ("adv unlearns more than ran", "3.1, Table 1", "rms", LESS, "inlier adv", "inlier ran"),
    ("adv unlearns more than ran, by the median", "3.1, Table 1", "median", LESS, "inlier adv", "inlier ran"),
    ("ran unlearns more than ddpm", "3.1, Table 1", "rms", LESS, "inlier ran", "inlier ddpm"),
    ("on clean data adv loses variance", "3.3", "kept", LESS, "clean adv", "clean ddpm"),
    ("on clean data adv loses no mode", "3.3", "smallest_mode", HALF, "clean ddpm", "clean adv"),
    ("adv's score is nearer the truth", "Fig. 2b", "score_error", LESS, "inlier adv", "inlier ddpm"),
    ("adv's score is nearer, outliers", "Fig. 2b", "score_error", LESS, "outlier adv", "outlier ddpm"),
    ("adv's denoiser is smoother", "2.3, 3.3", "lipschitz", LESS, "inlier adv", "inlier ddpm"),
    ("an attack throws adv less", "3.4", "thrown", LESS, "inlier adv", "inlier ddpm"),

    ("x: noise left at 0.1 is gone at 0.3", "3, F.3", "rms", TWICE, "inlier x 0.3", "inlier x 0.1"),
    ("eps: noise left at 0.1 is gone at 0.3", "3, F.3", "rms", TWICE, "inlier eps 0.3", "inlier eps 0.1"),
    ("x: 0.5 smooths more than 0.3", "3", "kept", LESS, "clean x 0.5", "clean x 0.3"),
    ("eps: 0.5 smooths more than 0.3", "3", "kept", LESS, "clean eps 0.5", "clean eps 0.3"),
    ("a smaller omega smooths more", "2.4, Fig. 2c", "kept", LESS, "clean omega 1", "clean omega 4"),
]


def cell(values):
    """Of the numbers of all seeds: mean, sample deviation (None of one seed), count; no mean where one is
    missing."""
    if not all(map(math.isfinite, values)):
        return None, None, len(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def closed_form(setup):
    """What gaussian.py says of a setup's network at its optimum -> `rms` and `kept` of `errors`; None where
    it says nothing: a mixture of Gaussians, outliers, invariance."""
    d = distribution(setup.data)
    if len(d.means) > 1 or setup.noise == "outlier" or setup.method == "inv":
        return None
    noise = INLIER_P * INLIER_SIGMA**2 if setup.noise == "inlier" else 0.0
    regulariser = {name: getattr(setup, name) for name in ("method", "lam", "lam_units", "omega")}
    return predicted_plane(d.covariance.numpy(), d.inside.numpy(), d.scale, noise,
                           Schedule.named("linear", T), **regulariser)


def summary(setups, results, sweep):
    """A record, a dict, for every configuration: its setup with the number of seeds for the seed, the `name`
    by which CLAIMS know it, a `cell` for each of COLUMNS, and its `closed_form`."""
    name = {None: "{noise} {method}", "lam": "{noise} {lam_units} {lam:g}",
            "omega": "{noise} omega {omega:g}"}[sweep]
    of_seeds = {}
    for setup, (numbers, _, _) in zip(setups, results):
        of_seeds.setdefault(setup._replace(seed=None), []).append(numbers)
    return [setup._asdict() | dict(seed=len(numbers), name=name.format(**setup._asdict()),
                                   closed_form=closed_form(setup))
            | {key: cell([own[key] for own in numbers]) for key in COLUMNS}
            for setup, numbers in of_seeds.items()]


def claims_of(records):
    """The claims for which both configurations have been run, as report.py's `judge` gives them."""
    found = []
    for data, (claim, place, key, rule, *names) in itertools.product(DATA, CLAIMS):
        of = {r["name"]: r for r in records if r["data"] == data}
        one_mode = key == "smallest_mode" and data == "oblique-plane"
        if all(name in of for name in names) and not one_mode:
            shown = f"{data}, {COLUMNS[key]}: {', '.join(names)}"
            exact = [(of[name]["closed_form"] or {}).get(key) for name in names]
            found.append(judge(claim, place, shown, *rule, [of[name][key] for name in names], exact))
    return found


def text_of(found):
    """A `cell` as report.py shows it."""
    return show(None if found[0] is None else found)


def print_table(rows):
    """Prints rows of strings in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print()


# ---------------------------------------------------------------------------------------------------- figures

def layouts():
    """The paper's figures as rows of panels: kind, data set, noise, and what it shows: a method's samples,
    trajectories or scores, the training data (`data`) or the true score (`truth`)."""
    plane, noisy, pair, three = DATA[0], NOISES[1:], ("ddpm", "adv"), ("ddpm", "inv", "adv")
    return {
        "fig2a": [[("points", plane, noise, "data"), *(("paths", plane, noise, m) for m in three)]
                  for noise in noisy],
        "fig2b": [[("field", data, noise, m) for m in ("truth", *pair)] for data, noise in zip(DATA, noisy)],
        "fig6-right": [[("flow", data, "inlier", m) for m in pair] for data in DATA],
        "fig10": [[(kind, plane, noise, m) for m in ("ddpm", "inv") for kind in ("points", "paths")]
                  for noise in noisy],
        "fig11": [[("flow", data, noise, m) for noise in noisy for m in pair] for data in DATA]}


def in_plane(d, x):
    """Points in the plane that a distribution d is drawn in: x [..., 3] in data units -> array [..., 2]."""
    return ((x - d.origin) @ d.basis.T).numpy()


def draw_panel(axes, panel, shown):
    """One panel of `layouts`. shown: (data, noise, method) -> trajectories [K, n, 3] in data units, and a
    score field. -> what a colour bar can be made of, and its label."""
    kind, data, noise, method = panel
    d, own = distribution(data), shown.get((data, noise, method))
    title = {"data": "training data", "truth": "true score"} | METHODS
    axes.set_title(f"{title[method]}: {data}" + ("" if method == "truth" else f", {noise}"), fontsize=9)
    middle = in_plane(d, (d.low + d.high) / 2)
    if kind == "flow":
        return draw_flow(axes, d, middle, in_plane(d, own[0]))
    axes.set(xlabel=d.labels[0], ylabel=d.labels[1], aspect="equal",
             xlim=(middle[0] - d.reach, middle[0] + d.reach), ylim=(middle[1] - d.reach, middle[1] + d.reach))
    if kind == "field":
        return draw_field(axes, data, own and own[1])
    points = training_points(data, noise, 0, DOTS) if method == "data" else own[0][-1, :DOTS]
    axes.axhline(0, color="black", linewidth=0.6, zorder=0)                     # the plane
    axes.scatter(*in_plane(d, points).T, s=4, color=ORANGE, linewidths=0,
                 alpha=1 if kind == "points" else 0.4)
    return draw_paths(axes, in_plane(d, own[0][:, :PATHS])) if kind == "paths" else None, "t"


def draw_flow(axes, d, middle, path):
    """The density of a coordinate of the samples over time: path [K, n, 2]. Its colours follow the square
    root, or the wide beginning would be black beside the narrow end."""
    from matplotlib.colors import PowerNorm                 # installed, or nothing would be drawn
    edges = np.linspace(-d.reach, d.reach, BINS + 1) + middle[d.flow]
    density = np.stack([np.histogram(row, edges)[0] for row in path[..., d.flow]], axis=1) / path.shape[1]
    axes.set(xlabel="t", ylabel=d.labels[d.flow])
    return axes.imshow(100 * density, origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
                       norm=PowerNorm(0.5, 0, 50),
                       extent=[T, 0, edges[0], edges[-1]]), "% of the samples in a bin"


def draw_field(axes, data, score):
    """Directions and lengths of a score [FIELD^2, 3] on the grid of `slice_of`, of the true one if None; the
    colours are the same for all scores of a data set."""
    d, alpha_bar = distribution(data), Schedule.named("linear", T).alpha_bar[SCORE_T].item()
    x_t = slice_of(data, alpha_bar)
    x, y = in_plane(d, original(data, x_t / alpha_bar**0.5)).T
    truth = true_score(data, x_t, alpha_bar)
    true_arrows, arrows = (each @ d.basis.T / d.scale for each in (truth, truth if score is None else score))
    length = arrows.norm(dim=1, keepdim=True)                                   # per unit of length
    image = axes.pcolormesh(*(c.reshape(FIELD, FIELD) for c in (x, y, length.numpy())), cmap="cividis",
                            shading="nearest", vmin=0, vmax=true_arrows.norm(dim=1).max().item())
    axes.quiver(x, y, *(arrows / length.clamp(min=1e-12)).T.numpy(), color="white", scale=30, width=0.004)
    return image, "length of the score"


def draw_paths(axes, path):
    """Trajectories [K, n, 2] as lines whose colour is the time, thin while they are noise; their ends are
    marked."""
    from matplotlib.collections import LineCollection       # installed, or nothing would be drawn
    pieces = np.stack([path[:-1], path[1:]], axis=2)                                        # [K - 1, n, 2, 2]
    time, width = (np.repeat(np.linspace(*ends, len(pieces)), path.shape[1]) for ends in ((T, 0), (0.2, 1.3)))
    lines = LineCollection(pieces.reshape(-1, 2, 2), cmap="viridis", linewidths=width)
    lines.set_array(time)
    axes.plot(*path[-1].T, "o", color="black", markersize=3.5, zorder=4)
    return axes.add_collection(lines)


def draw_figures(out, setups, results, plt):
    """Draws the paper's figures. -> their paths."""
    shown = {}                                              # the trajectories of all seeds, the first's score
    for (data, noise, method, *_), (_, trace, field) in zip(setups, results):
        traces, field = shown.get((data, noise, method), (trace[:, :0], field))
        shown[data, noise, method] = torch.cat([traces, trace], dim=1), field
    paths = []
    for name, rows in layouts().items():
        figure, axes = plt.subplots(len(rows), len(rows[0]), squeeze=False, layout="constrained",
                                    figsize=(3.1 * len(rows[0]), 2.8 * len(rows)))
        for line, row in zip(axes, rows):
            image, label = [draw_panel(ax, panel, shown) for ax, panel in zip(line, row)][-1]
            figure.colorbar(image, ax=line[-1], label=label)
        paths.append(save_figure(figure, out / f"{name}.png"))
    return paths + [draw_ray(out / "fig2c.png", plt)]


def draw_ray(path, plt):
    """Fig. 2c: the radius of Eq. 7 in units of x_t, for every omega of the sweep. -> the path."""
    schedule, t = Schedule.named("linear", T), torch.arange(T)
    figure, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for omega, style in zip(SWEEPS["omega"], ("-", "--", "-.", ":", (0, (1, 4)))):
        R = [schedule.sqrt_one_minus_alpha_bar * radius(schedule, t, beta, omega) for beta in (0.5, 1.0, 2.0)]
        line, = ax.plot(t, R[1], linestyle=style, label=f"ω = {omega:g}")
        ax.fill_between(t, R[0], R[2], color=line.get_color(), alpha=0.2)
    ax.set(xlabel="t", ylabel="√(1 − ᾱ) r(t), in units of x_t",
           title="Perturbation ray, β = 1 (bands: 0.5 to 2)")
    ax.legend()
    return save_figure(figure, path)


def draw_sweep(path, records, sweep, plt):
    """Draws the trade-off of a sweep: noise left against variance kept, a line for each reading of lambda_t.
    -> the path."""
    figure, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    for units, style, cross in (("x", "o-", "x:"), ("eps", "s--", "+:")):
        clean, inlier = ([r for r in records if (r["noise"], r["lam_units"]) == (noise, units)]
                         for noise in NOISES[:2])
        if clean:
            kept = np.array([r["kept"] for r in clean], dtype=float)           # mean, deviation or NaN, count
            rms = np.array([r["rms"] for r in inlier], dtype=float)
            ax.errorbar(kept[:, 0], rms[:, 0], rms[:, 1], kept[:, 1], fmt=style, capsize=2,
                        label=f"R in units of {units}")
            exact = [(a["closed_form"]["kept"], b["closed_form"]["rms"]) for a, b in zip(clean, inlier)
                     if a["closed_form"]]
            if exact:
                ax.plot(*zip(*exact), cross, color="grey", label=f"closed form, {units}", zorder=0)
            for x, y, r in zip(kept[:, 0], rms[:, 0], clean):
                ax.annotate(f"{r[sweep]:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    varied = dict(lam="λ", omega="ω")[sweep]
    ax.set(xlabel="variance kept, trained on clean data", ylabel="rms distance, trained on inlier noise",
           title=f"{records[0]['data']}: {varied} beside each point")
    ax.margins(0.12)                                        # room for what is beside the points
    ax.legend()
    return save_figure(figure, path)


# ------------------------------------------------------------------------------------------- the command line

def arguments(argv):
    """The command line, checked; `name`: of the result's file."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", choices=DATA, help="one data set (default: both; a sweep: oblique-plane)")
    add("--noise", choices=NOISES, help="one corruption of the training data (default: all; a sweep "
        "takes clean and inlier)")
    add("--method", choices=METHODS, help="one method (default: all; a sweep: adv)")
    add("--sweep", choices=list(SWEEPS), help="vary lambda, with both readings of lambda_t, or omega")
    add("--lam", type=float, default=0.3, help="lambda, the strength of the regulariser (default 0.3)")
    add("--lam-units", choices=["x", "eps"], default="x", help="lambda_t = lambda sqrt(3) / (beta R): R in "
        "units of x_t (default) or of eps")
    add("--omega", type=float, default=2.0, help="Eq. 7's exponent (default 2)")
    add("--seeds", type=int, default=3, help="networks a configuration, numbers are their means (default 3)")
    add("--steps", type=int, default=3000, help="training steps (default 3000)")
    add("--batch", type=int, default=128, help="points a training step (default 128)")
    add("--num-samples", type=int, default=512, help="samples a network (default 512)")
    add("--out", type=Path, default=Path("runs/toy3d"), help="folder of the results (default runs/toy3d)")
    args = parser.parse_args(argv)
    check_ranges(args, num_samples=(VICTIMS, 10**5), lam=(0, math.inf), omega=(1, math.inf), seeds=(1, 100),
                 steps=(1, 10**7), batch=(1, 10**4))
    if args.sweep and args.noise:
        raise UserError(f"--noise {args.noise}: a sweep compares clean with inlier")
    if args.sweep and args.method == "ddpm":
        raise UserError(f"--sweep {args.sweep} --method ddpm: nothing of DDPM depends on it")
    swept = {"lam": ["lam", "lam_units"], "omega": ["omega"]}.get(args.sweep, [])
    regulariser = ["lam", "lam_units", "omega"] if args.method == "ddpm" else []
    say_idle(parser, argv, [(swept, f"beside --sweep {args.sweep}"), (regulariser, "on --method ddpm")])
    args.name = "-".join(["toy3d", *filter(None, (args.sweep, args.data, args.noise, args.method))])
    check_out(args.out / f"{args.name}.json")
    return args


def configurations(args):
    """The networks that the command line asks for, in groups that train side by side: see `train`."""
    sweep = args.sweep
    data = [args.data] if args.data else DATA[:1] if sweep else DATA
    noises = [args.noise] if args.noise else NOISES[:2] if sweep else NOISES
    methods = [args.method] if args.method else ["adv"] if sweep else METHODS
    units = ["x", "eps"] if sweep == "lam" else [args.lam_units]
    lams = SWEEPS["lam"] if sweep == "lam" else [args.lam]
    omegas = SWEEPS["omega"] if sweep == "omega" else [args.omega]
    beside = list(itertools.product(data, noises, lams, omegas, range(args.seeds)))
    return [[Setup(name, noise, method, seed, lam, unit, omega) for name, noise, lam, omega, seed in beside]
            for method, unit in itertools.product(methods, units)]


def main(argv=None):
    """Trains, measures, compares with the paper's claims, draws."""
    args, began = arguments(argv), time.perf_counter()
    groups, setups, results = configurations(args), [], []
    print(f"{sum(map(len, groups))} networks in {len(groups)} groups, {args.steps} steps of {args.batch} "
          "points each", flush=True)
    for group in groups:
        setups += group
        results += measure(train(group, args.steps, args.batch), group, args.num_samples)
    records = summary(setups, results, args.sweep)
    about_adv = not args.sweep or args.method in (None, "adv")       # the paper's claims on lambda and omega
    claims = claims_of(records) if about_adv else []

    figures = []
    if (args.sweep or args.name == "toy3d") and (plt := pyplot()):
        figures = ([draw_sweep(args.out / f"{args.name}.png", records, args.sweep, plt)] if args.sweep else
                   draw_figures(args.out, setups, results, plt))
    protocol = dict(steps=args.steps, batch=args.batch, num_samples=args.num_samples, seeds=args.seeds,
                    sweep=args.sweep, device="cpu", torch=torch.__version__,
                    figures=[path.name for path in figures])
    write_json(args.out / f"{args.name}.json", dict(protocol=protocol, records=records, claims=claims))

    exact = dict(rms="closed form: rms", kept="variance kept")
    print_table([["data", "configuration", *COLUMNS.values(), *exact.values()]] + [
        [r["data"], r["name"], *(text_of(r[key]) for key in COLUMNS),
         *(show(r["closed_form"] and (r["closed_form"][key], None)) for key in exact)] for r in records])
    if claims:
        print_table([["claim", "paper", "data, number: a, b", "rule", "a, b", "closed form", "verdict"]] + [
            [c["claim"], c["place"], c["shown"], c["rule"],
             ", ".join(map(text_of, zip(c["values"], c["deviations"]))), c["closed_form"] or DASH,
             c["verdict"] + (c["why"] and f": {c['why']}")] for c in claims])
    made = [args.out / f"{args.name}.json", *figures]
    print(f"made {', '.join(map(str, made))} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    command_line(main)
