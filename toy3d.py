"""The paper's "in vitro" experiments: points in 3-D whose true distribution is known (sections 2.2, 3.1, 3.3, C.2, D).

    python toy3d.py                                         # everything: table, claims and figures into results/
    python toy3d.py --data oblique-plane --noise inlier --method adv
    python toy3d.py --sweep lam                             # noise removed against variance lost; both readings of lambda_t
    python toy3d.py --sweep omega
    python toy3d.py --sweep reg-share                       # the regulariser on a share of the batch: price and quality

The loss is train.py's, the sampler sample.py's, the attack attack.py's. All networks of a method (data sets, noises, seeds,
and in a sweep the values of lambda or omega) train side by side in one batched network.
"""

import argparse
import functools
import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attack import attacked_steps, fgsm, next_state
from data import Progress, UserError, atomic_write, command_line
from sample import generator, image_noise, sample
from train import draw, radius, regularised_rows, timesteps, training_loss, weighed
from unet import Schedule, at, timestep_embedding

DATA, NOISES, METHODS = ["oblique-plane", "3-gaussians"], ["clean", "inlier", "outlier"], ["ddpm", "ran", "adv", "inv"]
NAMES = {"ddpm": "DDPM", "ran": "Robust_ran", "adv": "Robust_adv", "inv": "Inv_adv",
         "data": "training data", "truth": "true score"}
T = 1000                                # linear schedule
ORANGE = "#D55E00"
INLIER_P, INLIER_SIGMA = 0.9, 0.3       # share of the points and deviation of their Gaussian noise, in original units
OUTLIER_P, GRID = 0.2, 16               # share of the points, and how many grid points along an edge of the bounding cube
POINTS, HELD_OUT = 8192, 1 << 20        # training points of a network, each drawn and corrupted once; seed of other points
SWEEPS = {"lam": [0.03, 0.1, 0.3, 0.5, 1.0], "omega": [1.0, 1.5, 2.0, 3.0, 4.0],
          "reg_share": [1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16]}
SCORE_T, FIELD = 100, 21                # where score fields are compared, and on how many points an edge they are drawn
TRACES, EVERY = 256, 10                 # trajectories kept for the figures, and every how many steps they are looked at
ATTACKED, VICTIMS = 250, 64             # attacked steps of T, and samples attacked
# Seeds of the streams of random numbers other than training's (seed, step); the index is the network's own seed
POINT_STREAM, ORDER_STREAM, WEIGHT_STREAM, SAMPLE_STREAM, ATTACK_STREAM = range(101, 106)
LEFT, INSIDE = 0.5 ** 0.5 * torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)


class Cell(NamedTuple):
    """One network: what it is trained on, how, and the seed of all its randomness."""
    data: str
    noise: str
    method: str
    seed: int
    lam: float = 0.3
    lam_units: str = "x"
    omega: float = 2.0
    reg_share: float = 1.0


# ----------------------------------------------------------------------------------------------------------- the data

@functools.cache
def distribution(name):
    """A clean data set of section 2.2 as a mixture of Gaussians in original units, float64.

    -> means [K, 3]; every mode has `deviation` in all directions that the projector `inside` [3, 3] leaves; centre [3] and
    scale standardise it; low and high [3] are its bounding cube; from a distance of `stray` a point belongs nowhere;
    basis [2, 3], origin [3], labels and reach of the plane it is drawn in; flow: which coordinate of it a heat map shows.
    """
    eye = torch.eye(3, dtype=torch.float64)
    if name == "oblique-plane":         # x + y + z = 30; deviation 1 along the plane, so that noise of 0.3 is strong
        means, normal = torch.full((1, 3), 10.0, dtype=torch.float64), torch.full((3,), 3 ** -0.5, dtype=torch.float64)
        d = SimpleNamespace(means=means, inside=eye - torch.outer(normal, normal), deviation=1.0, stray=0.9, origin=means[0],
                            basis=torch.stack([LEFT, normal]), labels=("along the plane (data units)", "distance from the plane (data units)"), flow=1,
                            reach=2.5)
    else:
        means = torch.tensor([[10, 10, 10], [20, 20, 20], [10, 30, 30]], dtype=torch.float64)
        d = SimpleNamespace(means=means, inside=eye, deviation=0.25, stray=1.5, origin=torch.zeros_like(means[0]),
                            basis=torch.stack([eye[0], INSIDE]), labels=("x (data units)", "(y + z) / √2 (data units)"), flow=0, reach=20.0)
    d.covariance, d.centre = d.deviation ** 2 * d.inside, means.mean(dim=0)
    d.scale = (d.covariance.trace() / 3 + (means - d.centre).square().mean(dim=0).mean()).sqrt().item()
    middle, half = (means.amax(0) + means.amin(0)) / 2, (means.amax(0) - means.amin(0)).max() / 2
    half = half + 3.5 * d.covariance.diagonal().max().sqrt()
    d.low, d.high = middle - half, middle + half
    return d


def training_points(data, noise, seed, count=POINTS):
    """Points of a data set, corrupted once and for all: [count, 3] in original units, float64."""
    d, g = distribution(data), generator(POINT_STREAM, seed)
    normal = lambda: torch.randn(count, 3, generator=g, dtype=torch.float64)
    x = d.means[torch.randint(len(d.means), (count,), generator=g)] + d.deviation * normal() @ d.inside
    coin = torch.rand(count, 1, generator=g)
    if noise == "inlier":
        x = torch.where(coin < INLIER_P, x + INLIER_SIGMA * normal(), x)
    elif noise == "outlier":
        grid = torch.randint(GRID, (count, 3), generator=g) / (GRID - 1)
        x = torch.where(coin < OUTLIER_P, d.low + (d.high - d.low) * grid, x)
    return x


def true_score(data, x_t, alpha_bar):
    """The score of the clean data after diffusion: x_t [..., 3] standardised, alpha_bar a float -> [..., 3], float64.

    With Eq. 2 every mode N(m, C) becomes N(sqrt(alpha_bar) m, alpha_bar C + (1 - alpha_bar) I).
    """
    d = distribution(data)
    means = alpha_bar ** 0.5 * (d.means - d.centre) / d.scale                                       # [K, 3]
    covariance = alpha_bar * d.covariance / d.scale ** 2 + (1 - alpha_bar) * torch.eye(3, dtype=torch.float64)
    difference = means - x_t.double()[..., None, :]                                                 # [..., K, 3]
    pull = difference @ torch.linalg.inv(covariance)                                                # each mode's own score
    share = torch.softmax(-0.5 * (difference * pull).sum(dim=-1), dim=-1)                           # [..., K]
    return (share[..., None] * pull).sum(dim=-2)


def slice_of(data, alpha_bar):
    """A square grid in the plane that a data set is drawn in: x_t [FIELD ** 2, 3] standardised, row by row from below."""
    d, steps = distribution(data), torch.linspace(-1, 1, FIELD, dtype=torch.float64)
    offset = d.reach * torch.cartesian_prod(steps, steps).flip(1) @ d.basis
    return alpha_bar ** 0.5 * standardised(data, (d.low + d.high) / 2 + offset)


# ----------------------------------------------------------------------------------- networks side by side, trained

class Networks(nn.Module):
    """S multilayer perceptrons eps_theta side by side: x [S, B, 3], t [S, B] or [S] -> [S, B, 3].

    The first layer is scaled and shifted by the time (without the scale, thin modes take twice the training).
    """

    def __init__(self, seeds, width=64, hidden=3, embedding=32):
        super().__init__()
        self.register_buffer("embedding", timestep_embedding(torch.arange(T), embedding))           # [T, embedding]

        def uniform(layer, rows, columns, fan_in):          # PyTorch's default for nn.Linear, each network from its seed
            draws = [torch.rand(rows, columns, generator=generator(WEIGHT_STREAM + 10 * layer, seed)) for seed in seeds]
            return nn.Parameter((2 * torch.stack(draws) - 1) / fan_in ** 0.5)

        sizes = [3] + [width] * hidden + [3]
        self.weights = nn.ParameterList(uniform(k, a, b, a) for k, (a, b) in enumerate(itertools.pairwise(sizes)))
        self.biases = nn.ParameterList(uniform(k, 1, b, a) for k, (a, b) in enumerate(itertools.pairwise(sizes), 10))
        self.time = uniform(20, embedding, 2 * width, embedding)

    def forward(self, x, t):
        time = torch.bmm(self.embedding[t.reshape(len(x), -1)], self.time)                          # [S, B or 1, 2 width]
        scale, shift = time.chunk(2, dim=2)
        h = torch.baddbmm(self.biases[0], x, self.weights[0]) * (1 + scale) + shift
        for weight, bias in zip(self.weights[1:], self.biases[1:]):
            h = torch.baddbmm(bias, F.relu(h), weight)
        return h


def train(cells, steps, batch, balance=False, lr=3e-3):
    """Trains one network per cell, all of one method, reading of lambda_t and share, side by side by Algorithm 1.

    balance, and a share of the batch that is regularised: see train.py's `timesteps` and `regularised_rows`.
    What becomes of a network depends on its cell alone. -> Networks, without gradients.
    """
    schedule, rows = Schedule.named("linear", T).to("cpu"), torch.arange(len(cells))[:, None]
    seeds, which = seeds_of(cells)
    parts = regularised_rows(range(batch), cells[0].reg_share, cells[0].method)
    points = torch.stack([standardised(c.data, training_points(c.data, c.noise, c.seed)) for c in cells])   # [S, POINTS, 3]
    order = torch.stack([torch.randint(POINTS, (steps, batch), generator=generator(ORDER_STREAM, s)) for s in seeds])
    lam, omega = torch.tensor([[c.lam] for c in cells]), torch.tensor([[c.omega] for c in cells])           # [S, 1]
    regularisation = lam, cells[0].lam_units, omega
    nets = Networks([c.seed for c in cells])
    optimizer = torch.optim.AdamW(nets.parameters(), lr=lr, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = Progress(steps, "steps", f"{cells[0].method} x {len(cells)}")
    for step in range(steps):
        draws = zip(*(draw(seed, step, batch, (3,), T, "cpu") for seed in seeds))
        noise = [torch.stack(part)[which] for part in draws]                                        # [S, B], ... [S, B, 3]
        x_0, loss = points[rows, order[which, step]], 0
        for part, method in parts:
            t, beta, eps, u, chance = (d[:, part] for d in noise)
            reg_share = 1.0 if method == "ddpm" else cells[0].reg_share
            t, factor = timesteps(schedule, t, chance, reg_share, balance and cells[0].method != "ddpm", *regularisation)
            terms = training_loss(nets, schedule, x_0[:, part], t, eps, beta, u, method, *regularisation)
            loss = loss + sum(term.sum() for term in weighed(terms, factor, reg_share).values())
        optimizer.zero_grad()
        (loss / batch).backward()                           # a sum over networks: none sees another's gradient
        optimizer.step()
        rate.step()
        progress.update(step + 1)
    progress.close()
    return nets.requires_grad_(False)


def seeds_of(cells):
    """-> the seeds that occur, and for every cell the position of its own: what depends on the seed alone is drawn once."""
    seeds = sorted({c.seed for c in cells})
    return seeds, torch.tensor([seeds.index(c.seed) for c in cells])


def standardised(data, x):
    """Original units -> what the network sees, float32."""
    d = distribution(data)
    return ((x - d.centre) / d.scale).float()


def original(data, x):
    """The inverse of `standardised`, float64."""
    d = distribution(data)
    return d.centre + d.scale * x.double()


# ---------------------------------------------------------------------------------------------------- what is measured

def errors(data, x):
    """Samples x [N, 3] in original units against the truth -> dict.

    Distance to the plane, or to the nearest mode: `rms`, `median`, share of `strays`. `kept`: variance along the plane, or
    inside a mode, over the true one. `smallest_mode`: the share of samples in the emptiest mode, times their number.
    """
    d = distribution(data)
    if data == "oblique-plane":
        distance, mode = ((x - d.centre) @ d.basis[1]).abs(), torch.zeros(len(x), dtype=torch.long)
    else:
        distance, mode = torch.cdist(x, d.means).min(dim=1)
    near = distance < (math.inf if len(d.means) == 1 else d.stray)
    members = [x[near & (mode == k)] for k in range(len(d.means))]
    spread = [(m @ d.inside).var(dim=0).sum() for m in members if len(m) > 1]
    kept = torch.stack(spread).mean() / d.covariance.trace() if spread else math.nan
    return dict(rms=distance.square().mean().sqrt().item(), median=distance.median().item(), kept=float(kept),
                strays=(distance > d.stray).double().mean().item(),
                smallest_mode=min(len(m) for m in members) * len(members) / len(x))


def lipschitz(model, schedule, x_t, t):
    """Local Lipschitz constant of the denoiser x_t -> x_t - sqrt(1 - alpha_bar) eps_theta = sqrt(alpha_bar) x0_hat: the
    largest singular value of its Jacobian. Perfect equivariance (Eq. 6) would be 0. x_t [S, B, 3], t one timestep -> [S, B]."""
    t = torch.full((len(x_t),), t)
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        denoised = x_t - at(schedule.sqrt_one_minus_alpha_bar, t, x_t) * model(x_t, t)
        rows = [torch.autograd.grad(denoised[..., k].sum(), x_t, retain_graph=True)[0] for k in range(3)]
    return torch.linalg.matrix_norm(torch.stack(rows, dim=-2), ord=2)


def noise_of(stream, cells, n):
    """Yields x_T, then the z of one step after the other: each [S, n, 3], a network's from its own seed."""
    seeds, which = seeds_of(cells)
    return (z[which] for z in image_noise(stream, seeds, (n, 3)))


def thrown(nets, schedule, cells):
    """How far ATTACKED shoves throw a sample: FGSM (Algorithm 2), and random signs of the same size. -> two of [S].

    The rms distance, in original units, from the undisturbed sample of the same noise.
    """
    steps, draws = attacked_steps(len(schedule), ATTACKED, "spread"), noise_of(ATTACK_STREAM, cells, VICTIMS)

    def attack(x_t, step):
        if step not in steps:
            return x_t
        clean, x_t, control = x_t.chunk(3, dim=1)           # three trajectories of the same noise
        following = lambda x: next_state(nets, schedule, x, torch.full((len(x),), step), "ddpm", "large", None)
        state, sigma, _ = following(x_t)

        def slope(delta):
            with torch.enable_grad():
                delta = delta.detach().requires_grad_()
                return torch.autograd.grad((following(x_t + delta)[0] - state).square().sum(), delta)[0]

        start = sigma * next(draws)
        return torch.cat([clean, x_t + fgsm(slope, start, sigma), control + sigma * start.sign()], dim=1)

    noise = (z.repeat(1, 3, 1) for z in noise_of(SAMPLE_STREAM, cells, VICTIMS))
    clean, *others = sample(nets, schedule, noise, clamp=None, attack=attack).chunk(3, dim=1)
    scale = torch.tensor([distribution(c.data).scale for c in cells])
    return [scale * (x - clean).square().sum(dim=2).mean(dim=1).sqrt() for x in others]


def measure(nets, cells, n):
    """Samples n points from every network and compares them with the truth -> for every network:

    its numbers, a dict (COLUMNS); trajectories [T / EVERY + 1, TRACES, 3] in original units; and its score at SCORE_T on
    the grid of `slice_of` [FIELD ** 2, 3], standardised.
    """
    schedule, t = Schedule.named("linear", T), torch.full((len(cells),), SCORE_T)
    alpha_bar, schedule = schedule.alpha_bar[SCORE_T].item(), schedule.to("cpu")
    progress, trace = Progress(T, "steps", f"{cells[0].method} sampling"), []

    def look(x_t, step):
        if (step + 1) % EVERY == 0:                         # T - 1, T - 1 - EVERY, ...
            trace.append(x_t[:, :TRACES])
        progress.update(T - step)
        return x_t

    x_0 = sample(nets, schedule, noise_of(SAMPLE_STREAM, cells, n), clamp=None, attack=look)                # [S, n, 3]
    progress.close()
    slopes = [lipschitz(nets, schedule, x_t[:, :VICTIMS], T - 1 - k * EVERY) for k, x_t in enumerate(trace)]    # of [S, B]
    trace = torch.stack([*trace, x_0[:, :TRACES]])                                                          # [K, S, n, 3]
    score = lambda x: -nets(x.float(), t).double() / (1 - alpha_bar) ** 0.5
    clean = torch.stack([standardised(c.data, training_points(c.data, "clean", HELD_OUT, 2048)) for c in cells])
    x_t = schedule.noised(clean, t, next(noise_of(HELD_OUT, cells, 2048)))                                  # [S, 2048, 3]
    truth = torch.stack([true_score(c.data, x, alpha_bar) for c, x in zip(cells, x_t)])
    error = ((score(x_t) - truth).square().mean(dim=(1, 2)) / truth.square().mean(dim=(1, 2))).sqrt()       # [S]
    fields = score(torch.stack([slice_of(c.data, alpha_bar) for c in cells]))                               # [S, FIELD ** 2, 3]
    numbers = torch.stack([error, torch.stack(slopes).mean(dim=(0, 2)), *thrown(nets, schedule, cells)], dim=1).tolist()
    return [(errors(c.data, original(c.data, x)) | dict(zip(("score_error", "lipschitz", "thrown", "shaken"), row)),
             original(c.data, trace[:, k]), fields[k]) for k, (c, x, row) in enumerate(zip(cells, x_0, numbers))]


# --------------------------------------------------------------------------------------------------- tables and claims

COLUMNS = dict(rms="rms", median="median", strays="strays", kept="variance kept", smallest_mode="least mode",
               score_error="score error", lipschitz="Lipschitz", thrown="thrown by FGSM", shaken="by signs")
# Claim, where in the paper, the number that shows it, and "factor x one configuration < another". The last group is of sweeps.
CLAIMS = [
    ("invariance diverges, clean data", "Fig. 10", "rms", 2, "clean ddpm", "clean inv"),
    ("invariance diverges, inlier noise", "Fig. 2a, 10", "rms", 2, "inlier ddpm", "inlier inv"),
    ("invariance diverges, outliers", "Fig. 2a, 10", "rms", 2, "outlier ddpm", "outlier inv"),
    ("adv unlearns inlier noise", "Fig. 2a, 3.1", "rms", 1, "inlier adv", "inlier ddpm"),
    ("adv suffers less from outliers", "Fig. 2a", "rms", 1, "outlier adv", "outlier ddpm"),
    ("adv unlearns more than ran", "3.1, Table 1", "rms", 1, "inlier adv", "inlier ran"),
    ("adv unlearns more than ran, by the median", "3.1, Table 1", "median", 1, "inlier adv", "inlier ran"),
    ("ran unlearns more than ddpm", "3.1, Table 1", "rms", 1, "inlier ran", "inlier ddpm"),
    ("on clean data adv loses variance", "3.3", "kept", 1, "clean adv", "clean ddpm"),
    ("on clean data adv loses no mode", "3.3", "smallest_mode", 0.5, "clean ddpm", "clean adv"),
    ("adv's score is nearer the truth", "Fig. 2b", "score_error", 1, "inlier adv", "inlier ddpm"),
    ("adv's score is nearer, outliers", "Fig. 2b", "score_error", 1, "outlier adv", "outlier ddpm"),
    ("adv's denoiser is smoother", "2.3, 3.3", "lipschitz", 1, "inlier adv", "inlier ddpm"),
    ("an attack throws adv less", "3.4", "thrown", 1, "inlier adv", "inlier ddpm"),

    ("x: noise left at 0.1 is gone at 0.3", "3, F.3", "rms", 2, "inlier x 0.3", "inlier x 0.1"),
    ("eps: noise left at 0.1 is gone at 0.3", "3, F.3", "rms", 2, "inlier eps 0.3", "inlier eps 0.1"),
    ("x: 0.5 smooths more than 0.3", "3", "kept", 1, "clean x 0.5", "clean x 0.3"),
    ("eps: 0.5 smooths more than 0.3", "3", "kept", 1, "clean eps 0.5", "clean eps 0.3"),
    ("a smaller omega smooths more", "2.4, Fig. 2c", "kept", 1, "clean 1", "clean 4"),
]


def summary(cells, results, sweep):
    """Mean and deviation over seeds -> a record, a dict, for every configuration; CLAIMS know it by its `name`."""
    name, runs = {None: "{noise} {method}", "lam": "{noise} {lam_units} {lam:g}", "omega": "{noise} {omega:g}",
            "reg_share": "{noise} {reg_share:g}"}[sweep], {}
    for cell, (numbers, _, _) in zip(cells, results):
        runs.setdefault(cell._replace(seed=None), []).append(numbers)
    records = []
    for cell, group in runs.items():
        values = {key: [numbers[key] for numbers in group] for key in COLUMNS}
        records.append(cell._asdict() | dict(name=name.format(**cell._asdict()), seed=len(group)) | {
            key: [float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0] for key, v in values.items()})
    return records


def check_claims(records):
    """The claims of the paper for which both configurations have been run -> a dict each: it holds where the two numbers
    are further apart than their deviations."""
    found = []
    for data, (claim, where, key, factor, smaller, larger) in itertools.product(DATA, CLAIMS):
        named = {r["name"]: r[key] for r in records if r["data"] == data}
        if smaller in named and larger in named and (key, data) != ("smallest_mode", "oblique-plane"):
            (a, a_deviation), (b, b_deviation) = named[smaller], named[larger]
            found.append(dict(data=data, claim=claim, where=where, number=key, factor=factor, smaller=smaller, larger=larger,
                              values=[a, b], holds=factor * (a + a_deviation) < b - b_deviation))
    return found


def print_table(rows):
    """Prints rows of strings in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print()


# ------------------------------------------------------------------------------------------------------------ figures

def layouts():
    """The paper's figures as rows of panels: kind, data set, noise, and whose samples, trajectories or scores it shows."""
    plane, noisy, pair = DATA[0], NOISES[1:], ("ddpm", "adv")
    return {
        "fig2a": [[("points", plane, noise, "data"), *(("paths", plane, noise, m) for m in ("ddpm", "inv", "adv"))]
                  for noise in noisy],
        "fig2b": [[("field", data, noise, m) for m in ("truth", *pair)] for data, noise in zip(DATA, noisy)],
        "fig6-right": [[("flow", data, "inlier", m) for m in pair] for data in DATA],
        "fig10": [[(kind, plane, noise, m) for m in ("ddpm", "inv") for kind in ("points", "paths")] for noise in noisy],
        "fig11": [[("flow", data, noise, m) for m in pair] for data in DATA for noise in noisy]}


def draw_panel(axes, kind, data, noise, method, shown):
    """One panel of `layouts`. shown: (data, noise, method) -> trajectories [K, n, 3], original units, and a score field.

    -> what a colour bar can be made of, and its label.
    """
    d, schedule = distribution(data), Schedule.named("linear", T)
    view = lambda x: ((x - d.origin) @ d.basis.T).numpy()                       # [..., 3] -> [..., 2]
    middle, reach = view((d.low + d.high) / 2), d.reach
    axes.set_title(f"{NAMES[method]}: {data}" + ("" if method == "truth" else f", {noise}"), fontsize=9)
    if kind == "flow":
        edges = np.linspace(-reach, reach, 101) + middle[d.flow]
        path = view(shown[data, noise, method][0])[..., d.flow]                 # [K, n]
        density = np.stack([np.histogram(row, edges)[0] for row in path], axis=1) / path.shape[1]
        axes.set(xlabel="t", ylabel=d.labels[d.flow])
        return axes.imshow(100 * density, origin="lower", aspect="auto", cmap="magma", vmax=20,
                           extent=[T, 0, edges[0], edges[-1]]), "% of the samples in a bin"
    axes.set(xlabel=d.labels[0], ylabel=d.labels[1], aspect="equal", xlim=(middle[0] - reach, middle[0] + reach),
             ylim=(middle[1] - reach, middle[1] + reach))
    if kind == "field":
        alpha_bar = schedule.alpha_bar[SCORE_T].item()
        x_t = slice_of(data, alpha_bar)
        score = true_score(data, x_t, alpha_bar) if method == "truth" else shown[data, noise, method][1]
        u, v = view(original(data, x_t / alpha_bar ** 0.5)).T
        arrow = (score @ d.basis.T).numpy() / d.scale                           # per unit of length
        length = np.linalg.norm(arrow, axis=1)
        image = axes.pcolormesh(*(c.reshape(FIELD, FIELD) for c in (u, v, length)), cmap="cividis", shading="nearest")
        axes.quiver(u, v, *(arrow / length.clip(min=1e-12)[:, None]).T, color="white", scale=30, width=0.004)
        return image, "length of the score"
    image = None
    if kind == "paths":
        path = view(shown[data, noise, method][0])[:, :80]                      # [K, up to 80, 2]
        axes.plot(*path.transpose(2, 0, 1), color="grey", linewidth=0.3, alpha=0.5)
        image = axes.scatter(*path.reshape(-1, 2).T, c=np.repeat(np.linspace(T, 0, len(path)), path.shape[1]), s=1, cmap="cividis")
    x = training_points(data, noise, 0, 768) if method == "data" else shown[data, noise, method][0][-1, :768]
    axes.scatter(*view(x).T, s=2, color=ORANGE)
    axes.axhline(0, color="black", linewidth=0.6)                               # the plane
    return image, "t"


def draw_figures(out, cells, results, plt):
    """Draws the paper's figures. -> their paths."""
    shown = {}                                              # the trajectories of all seeds, the score field of the first
    for (data, noise, method, *_), (_, trace, field) in zip(cells, results):
        traces, field = shown.get((data, noise, method), (trace[:, :0], field))
        shown[data, noise, method] = torch.cat([traces, trace], dim=1), field
    paths = []
    for name, rows in layouts().items():
        figure, axes = plt.subplots(len(rows), len(rows[0]), squeeze=False, layout="constrained",
                                    figsize=(3.1 * len(rows[0]), 2.8 * len(rows)))
        for line, row in zip(axes, rows):
            image, label = [draw_panel(ax, *panel, shown) for ax, panel in zip(line, row)][-1]
            figure.colorbar(image, ax=line[-1], label=label)
        paths.append(save(figure, out / f"{name}.png"))
    schedule, t = Schedule.named("linear", T), torch.arange(T)
    figure, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for omega, style in zip(SWEEPS["omega"], ("-", "--", "-.", ":", (0, (1, 4)))):
        R = [schedule.sqrt_one_minus_alpha_bar * radius(schedule, t, beta, omega) for beta in (0.5, 1.0, 2.0)]  # Eq. 7
        line, = ax.plot(t, R[1], linestyle=style, label=f"ω = {omega:g}")
        ax.fill_between(t, R[0], R[2], color=line.get_color(), alpha=0.2)
    ax.set(xlabel="t", ylabel="√(1 − ᾱ) r(t), in units of x_t", title="Perturbation ray, β = 1 (bands: 0.5 to 2)")
    ax.legend()
    return paths + [save(figure, out / "fig2c.png")]


def draw_sweep(path, records, sweep, plt):
    """Draws the trade-off of a sweep: noise left against variance kept, a line per reading of lambda_t. -> the path."""
    figure, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    clean, inlier = ([r for r in records if r["noise"] == noise] for noise in NOISES[:2])
    for units, style in (("x", "o-"), ("eps", "s--")):
        pairs = [(c["kept"], r["rms"], r[sweep]) for c, r in zip(clean, inlier) if r["lam_units"] == units]
        if pairs:
            kept, rms, values = map(np.array, zip(*pairs))
            ax.errorbar(kept[:, 0], rms[:, 0], rms[:, 1], kept[:, 1], fmt=style, capsize=2, label=f"R in units of {units}")
            for x, y, value in zip(kept[:, 0], rms[:, 0], values):
                ax.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    ax.set(xlabel="variance kept, trained on clean data", ylabel="rms distance, trained on inlier noise",
           title=f"{records[0]['data']}: {dict(lam='λ', omega='ω', reg_share='share regularised')[sweep]} beside each point")
    ax.legend()
    return save(figure, path)


def save(figure, path):
    """Writes a matplotlib figure, atomically. -> the path."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path


# --------------------------------------------------------------------------------------------------- the command line

def arguments():
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="The paper's experiments on 3-D data whose distribution is known.",
                                     epilog=__doc__.split("\n\n")[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=DATA, help="one data set (default: both; a sweep: oblique-plane)")
    add("--noise", choices=NOISES, help="one corruption of the training data (default: all; a sweep: clean and inlier)")
    add("--method", choices=METHODS, help="one method (default: all; a sweep: adv)")
    add("--sweep", choices=[name.replace("_", "-") for name in SWEEPS], help="vary lambda, with both readings of lambda_t, "
        "or omega, or the share of the batch that is regularised instead")
    add("--balance", action="store_true", help="divide the loss at t by 1 + lambda_t, see train.py")
    add("--lam", type=float, default=0.3, help="lambda, the strength of the regulariser (default 0.3)")
    add("--lam-units", choices=["x", "eps"], default="x", help="lambda_t = lambda sqrt(3) / (beta R): R in units of x_t "
        "(default) or of eps")
    add("--omega", type=float, default=2.0, help="Eq. 7's exponent (default 2)")
    add("--seeds", type=int, default=3, help="networks a configuration (default 3): every number is a mean over them")
    add("--steps", type=int, default=3000, help="training steps (default 3000)")
    add("--batch", type=int, default=128, help="points a training step (default 128)")
    add("--n", type=int, default=512, help="samples a network (default 512)")
    add("--out", type=Path, default=Path("results"), help="folder for table and figures (default results/)")
    args = parser.parse_args()
    args.sweep = args.sweep and args.sweep.replace("-", "_")
    if args.sweep == "reg_share" and args.batch % 16:
        raise UserError(f"--batch {args.batch}: must be a multiple of 16, for a share of 1/16")
    for name, least in (("seeds", 1), ("steps", 1), ("batch", 1), ("n", VICTIMS), ("lam", 0), ("omega", 1)):
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    return args


def main():
    """Trains, measures, compares with the paper's claims, draws."""
    args, began = arguments(), time.perf_counter()
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        plt = None
        print("no figures: matplotlib is not installed (pip install matplotlib)")
    groups = configurations(args)
    print(f"{sum(map(len, groups))} networks in {len(groups)} groups, {args.steps} steps of {args.batch} points each", flush=True)
    cells, results = [], []
    for group in groups:
        cells += group
        results += measure(train(group, args.steps, args.batch, args.balance), group, args.n)
    records = summary(cells, results, args.sweep)
    claims = check_claims(records)
    balanced = "balance" if args.balance else None
    name = "-".join(["toy3d", *(v.replace("_", "-") for v in (args.sweep, args.data, args.noise, args.method, balanced) if v)])
    protocol = dict(steps=args.steps, batch=args.batch, n=args.n, seeds=args.seeds, balance=args.balance)
    strict = lambda value: [v if math.isfinite(v) else None for v in value] if isinstance(value, list) else value   # no NaN in JSON
    with atomic_write(args.out / f"{name}.json") as temporary:
        temporary.write_text("".join(json.dumps({k: strict(v) for k, v in (record | protocol).items()}) + "\n"
                                     for record in records + claims))
    made = [args.out / f"{name}.json"]
    if plt and args.sweep:
        made.append(draw_sweep(args.out / f"{name}.png", records, args.sweep, plt))
    elif plt and name == "toy3d":
        made += draw_figures(args.out, cells, results, plt)
    number = lambda key, r: f"{r[key][0]:.3f}±{r[key][1]:.3f}"
    print_table([["data", "configuration", *COLUMNS.values()]]
                + [[r["data"], r["name"], *(number(key, r) for key in COLUMNS)] for r in records])
    if claims:
        print_table([["claim", "paper", "data", "comparison", "", "holds"]] + [
            [c["claim"], c["where"], c["data"], f"{COLUMNS[c['number']]}: {c['smaller']} < {c['larger']}" if c["factor"] == 1 else
             f"{COLUMNS[c['number']]}: {c['factor']} x {c['smaller']} < {c['larger']}",
             "{:.3f}, {:.3f}".format(*c["values"]), "yes" if c["holds"] else "NO"] for c in claims])
    print(f"made {', '.join(map(str, made))} in {time.perf_counter() - began:.0f} s")


def configurations(args):
    """The networks that the command line asks for, in groups that train side by side: see `train`."""
    one = lambda chosen, all: [chosen] if chosen else all
    noises, sweep = one(args.noise, NOISES[:2] if args.sweep else NOISES), args.sweep
    varied = [{sweep: value} for value in SWEEPS[sweep]] if sweep in ("lam", "omega") else [{}]
    base = [Cell(data, noise, "", seed, args.lam, "", args.omega)._replace(**change) for data, noise, change, seed in itertools.product(
        one(args.data, DATA[:1] if sweep else DATA), noises, varied, range(args.seeds))]
    return [[cell._replace(method=method, lam_units=units, reg_share=share) for cell in base]
            for method in one(args.method, ["adv"] if sweep else METHODS)
            for units in (("x", "eps") if sweep == "lam" else (args.lam_units,))
            for share in (SWEEPS[sweep] if sweep == "reg_share" else [1.0])]


if __name__ == "__main__":
    command_line(main)
