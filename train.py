"""Adversarial training of diffusion models: Algorithm 1 of the paper, its losses, and plain DDPM beside them.

    python train.py --data shapes --p 0.9 --sigma 0.2                             # small network, any machine
    torchrun train.py --data cifar10 --p 0.9 --sigma 0.2                              # the paper's Robust_adv
    torchrun --nproc_per_node 8 train.py --data cifar10 --method ddpm --out runs/ddpm
    python train.py --data cifar10 --p 0.9 --sigma 0.2 --method ambient --flags conf1     # Table 5's baseline
    python train.py --data cifar10 --init public.pt --schedule cosine --timesteps 4000 --learn-sigma
    python train.py --p 0.9 --sigma 0.2 --precondition --weighting edm          # beyond the paper: quicker
    python train.py --data cifar10 --batch 16 --benchmark                  # what a step costs on this machine

The same command again goes on from the last checkpoint. RUN/checkpoint.pt is what sample.py and the others
take.
"""

import common                                               # first: it answers Ctrl-C while others load

import contextlib
import functools
import json
import math
import os
import resource
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import beyond
from checkpoints import load_checkpoint, misfit, network_of, previous_of, save_checkpoint
from common import (POSITIVE, Progress, UserError, as_bytes, atomic_write, broadcast, check_disk,
                    check_memory, check_out, check_ranges, command_line, gather, generator, image_noise,
                    locked, noise_estimate, parser_of, save_grid, sha256_of, start_processes, stream_seed,
                    together, write_json)
from data import Images
from sample import sample, say_idle, split_output
from unet import PRESETS, Schedule, at, built, expand, in_bfloat16

GRID = 36               # images of a sample grid, made with 50 DDIM steps: sample.py's of seed 0
SEEN = "training-images.png"    # the first images as the network sees them, noise and all
STREAMS = 2       # raised when a run's random numbers change: a run that another version began is not resumed


# ------------------------------------------------------------------------------------------------- the losses

def radius(schedule, t, beta, omega=2.0, gamma=8 / 255):
    """r_beta(t) of Eq. 7: the half-width of delta's ball, in units of eps. t, beta [B...] -> [B...]."""
    s = schedule.sqrt_one_minus_alpha_bar[t]
    return (s**omega + gamma * beta) / s                                            # Eq. 7


def lambda_t(schedule, t, beta, lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255):
    """The regulariser's weight lambda_t = lambda sqrt(3) / (beta R), R the radius of delta's ball in units of
    x_t (lam_units `x`) or of eps (`eps`). t, beta [B...] -> [B...]."""
    R = radius(schedule, t, beta, omega, gamma)
    if lam_units == "x":
        R = schedule.sqrt_one_minus_alpha_bar[t] * R
    return lam * math.sqrt(3) / (beta * R)


def mean_square(x, t):
    """The squared norms of Eq. 3 to 8 as means over pixels and channels: x [B..., *], t [B...] -> [B...]."""
    return x.square().flatten(t.ndim).mean(dim=t.ndim)


def adversarial(predict, x_t, t, eps_hat, delta, r, s):
    """delta_adv of Eq. 8: one step of the fast gradient sign method from the random start delta, kept inside
    the ball.

    predict(x, t) -> eps_theta; x_t, eps_hat, delta [B..., *]; r, s broadcasting against them: the radius in
    units of eps, and sqrt(1 - alpha_bar), which takes delta into units of x_t.
    """
    delta = delta.detach().requires_grad_()
    J = (predict(x_t + s * delta, t) - eps_hat.detach()).square().sum()    # a sum: the sign ignores its scale
    gradient, = torch.autograd.grad(J, delta)                                     # no parameter's is computed
    return torch.clamp(delta.detach() + r / math.sqrt(3) * gradient.sign(), -r, r)  # Eq. 8


def training_loss(model, schedule, x_0, t, eps, beta, u, method="adv", lam=0.3, lam_units="x", omega=2.0,
                  gamma=8 / 255):
    """The terms of Eq. 6 (`adv`, `ran`), Eq. 14 (`inv`) or Eq. 3 (`ddpm`), sample by sample: the body of
    Algorithm 1.

    model(x_t, t) -> eps_theta, or eps_theta and v with learned variance. x_0 [B..., *] data; t [B...]
    timesteps; eps ~ N(0, I) and u ~ U[-1, 1] like x_0; beta ~ U[0.5, 2] like t: all randomness is the
    caller's.
    -> dict of [B...]: `ddpm`; `reg`, lambda_t included, unless the method is ddpm; `vlb` with learned
    variance.
    """
    x_t = schedule.noised(x_0, t, eps)                                              # Eq. 2
    eps_hat, v = split_output(model(x_t, t), x_t)
    terms = {"ddpm": mean_square(eps_hat - eps, t)}                                 # Eq. 3
    if v is not None:
        terms["vlb"] = len(schedule) / 1000 * variational_bound(schedule, x_0, x_t, t, eps_hat.detach(), v)
    if method == "ddpm":
        return terms

    def predict(x, t):
        return split_output(model(x, t), x)[0]

    r = expand(radius(schedule, t, beta, omega, gamma), x_t)                        # [B..., 1 ...]
    s = at(schedule.sqrt_one_minus_alpha_bar, t, x_t)                               # [B..., 1 ...]
    delta = r * u                                                                   # delta_ran ~ U[-r, r]
    if method != "ran":
        delta = adversarial(predict, x_t, t, eps_hat, delta, r, s)                  # Eq. 8
    eps_hat_delta = predict(x_t + s * delta, t)                                    # at x_t^adv of Algorithm 1
    # Both outputs carry gradient: each has to move towards the other.
    target = eps_hat if method == "inv" else eps_hat + delta                     # Eq. 14; Eq. 6: equivariance
    weight = lambda_t(schedule, t, beta, lam, lam_units, omega, gamma)
    terms["reg"] = weight * mean_square(eps_hat_delta - target, t)                  # Eq. 6
    return terms


def variational_bound(schedule, x_0, x_t, t, eps_hat, v):
    """The term of L_vlb at t in bits per dimension: it trains the variance (Nichol & Dhariwal 2021,
    L_hybrid). -> [B]."""
    small, log_variance = schedule.log_variance("small", x_t, t), schedule.log_variance("learned", x_t, t, v)
    mean = schedule.posterior_mean(schedule.predicted_x0(x_t, t, eps_hat), x_t, t)
    distance = (schedule.posterior_mean(x_0, x_t, t) - mean).square()
    divergence = 0.5 * (log_variance - small - 1 + (small - log_variance).exp()     # KL of two Gaussians
                        + (-log_variance).exp() * distance)
    # At t = 0 it is the likelihood of x_0's byte: the Gaussian's mass between half a level below and half a
    # level above.
    sigma = (0.5 * log_variance).exp()
    above = torch.where(x_0 > 0.999, 1.0, torch.special.ndtr((x_0 + 1 / 255 - mean) / sigma))
    below = torch.where(x_0 < -0.999, 0.0, torch.special.ndtr((x_0 - 1 / 255 - mean) / sigma))
    surprise = -(above - below).clamp(min=1e-12).log()
    return torch.where(expand(t == 0, x_t), surprise, divergence).flatten(1).mean(dim=1) / math.log(2)


def ambient_loss(model, schedule, y, t, eps, sigma_n):
    """The noise-aware baseline of Table 5 (Daras et al. 2024a for a network that predicts eps), sample by
    sample.

    y [B, *] data with noise of a KNOWN deviation sigma_n [B], 0 for a clean sample, whose loss is Eq. 3's. y
    is only ever diffused further: timesteps with less noise than y has itself teach nothing. -> dict of [B]:
    `ddpm`.
    """
    sigma_t = schedule.sqrt_one_minus_alpha_bar[t] / schedule.sqrt_alpha_bar[t]     # of x_t / sqrt(alpha_bar)
    usable = sigma_t > sigma_n
    keep = torch.where(usable, 1 - (sigma_n / sigma_t).square(), 1.0)       # 1 - rho: the share that eps adds
    x_t = at(schedule.sqrt_alpha_bar, t, y) * (y + expand(sigma_t * keep.sqrt(), y) * eps)
    eps_hat, _ = split_output(model(x_t, t), x_t)
    return {"ddpm": usable * keep * mean_square(eps - expand(keep.sqrt(), y) * eps_hat, t)}


def assumed_noise(images, flags, sigma_known):
    """What the noise-aware baseline is told of every image: its deviation sigma_known or 0. -> float32 [N].

    flags: `oracle` the truth; `conf1` an image's flag is right with probability 1 - p, decided once; `conf2`
    all noisy.
    """
    noisy = np.ones(len(images), bool)
    if flags != "conf2":
        noisy = images.corrupted(np.arange(len(images))) & (images.sigma > 0)
    if flags == "conf1":
        coins = np.random.default_rng(stream_seed("flags", images.data_seed))
        noisy ^= coins.random(len(images)) < images.p
    return np.float32(sigma_known) * noisy.astype(np.float32)


# ---------------------------------------------------------------------------------------- Algorithm 1's draws

def draw(seed, step, batch, shape, T, device):
    """The randomness of one step for the whole batch, a function of (seed, step) alone, whoever computes
    which part.

    -> t [batch] in 0 ... T-1, beta [batch] ~ U[0.5, 2], eps ~ N(0, I), u ~ U[-1, 1], both [batch, *shape],
    and chance [batch] ~ U[0, 1), for beyond.py.
    """
    g = generator("train", seed, step, device)
    t = torch.randint(T, (batch,), generator=g, device=device)
    beta = 0.5 + 1.5 * torch.rand(batch, generator=g, device=device)
    eps = torch.randn(batch, *shape, generator=g, device=device)
    u = 2 * torch.rand(batch, *shape, generator=g, device=device) - 1
    return t, beta, eps, u, torch.rand(batch, generator=g, device=device)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order of the images in an epoch: a permutation of all `count`."""
    return np.random.default_rng(stream_seed("order", seed, epoch)).permutation(count)


def batch_indices(seed, step, batch, count):
    """Which images are the batch of a step: every image once an epoch, in a fresh order. -> int64 [batch]."""
    seen = range(step * batch, (step + 1) * batch)
    return np.array([epoch_order(seed, k // count, count)[k % count] for k in seen])


# ----------------------------------------------------------------------------------------------- the training

class Trainer:
    """Network, EMA, optimiser and step counter of one process: what a checkpoint holds, and what advances it.

    config: the four groups of `configuration`; microbatch: images at a time, None for all; process: of
    `start_processes`.
    """

    def __init__(self, config, microbatch, compile, process):
        self.config, self.settings, self.process = config, config["training"], process
        torch.manual_seed(stream_seed("weights", self.settings["seed"]))        # the same in every process
        model, schedule = built(config)
        self.model = model.to(process.device, memory_format=torch.channels_last)
        self.schedule = schedule.to(process.device)
        self.network = torch.compile(self.model) if compile else self.model
        if self.settings["amp"]:
            self.network = in_bfloat16(self.network, process.device)
        self.parameters = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, self.settings["lr"], weight_decay=0.0, fused=True)
        self.step, self.ema_updates = 0, 0
        self.rows = slice(process.rank, None, process.world)             # of the global batch: this process's
        self.microbatch = microbatch or self.settings["batch"]
        self.regulariser = {name: self.settings[name] for name in ("lam", "lam_units", "omega", "gamma")}
        every_t = torch.arange(len(self.schedule), device=process.device)
        self.lam_t = lambda_t(self.schedule, every_t, torch.ones_like(every_t), **self.regulariser)     # [T]
        tables = beyond.weights(schedule, self.settings["weighting"], config["network"]["sigma_data"],
                                method=self.settings["method"], **self.regulariser)
        self.tables = [table if table is None else table.to(process.device) for table in tables]

    def advance(self, x_0, sigma_n=None):
        """Algorithm 1, once through its loop, on x_0 [rows, C, H, W], this process's part of the batch.

        sigma_n [rows]: for `ambient`, see `assumed_noise`. -> the loss terms, scalars on the device.
        """
        seed, batch, method = (self.settings[name] for name in ("seed", "batch", "method"))
        draws = draw(seed, self.step, batch, x_0.shape[1:], len(self.schedule), self.process.device)
        t, beta, eps, u, chance = (part[self.rows] for part in draws)
        t, weight, parts = beyond.plan(self.lam_t, t, chance, method, self.settings["reg_share"],
                                       *self.tables)         # by default: t, 1, and all rows in one part
        self.optimizer.zero_grad()
        losses = {}
        for rows, method, strength in self.microbatches(parts):
            network = self.with_one_dropout_mask(rows)
            if method == "ambient":
                terms = ambient_loss(network, self.schedule, x_0[rows], t[rows], eps[rows], sigma_n[rows])
            else:
                regulariser = self.regulariser | dict(lam=strength * self.settings["lam"])
                terms = training_loss(network, self.schedule, x_0[rows], t[rows], eps[rows], beta[rows],
                                      u[rows], method, **regulariser)                           # Eq. 8, Eq. 6
            terms = {name: (weight[rows] * term).sum() / batch for name, term in terms.items()}
            sum(terms.values()).backward()
            losses |= {name: losses.get(name, 0) + term.detach() for name, term in terms.items()}
        if self.process.world > 1:
            losses = self.sum_over_processes(losses)
        self.optimizer.step()                                                          # theta - eta grad L_AT
        self.step += 1
        self.ema_updates += 1
        warm_up = (1 + self.ema_updates) / (10 + self.ema_updates)            # or the average starts as noise
        decay = min(self.settings["ema"], warm_up)
        with torch.no_grad():                           # or every average would keep the history of all steps
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        return losses

    def microbatches(self, parts):
        """The parts of `beyond.plan`, none of more than `microbatch` rows."""
        for rows, method, strength in parts:
            for first in range(rows.start, rows.stop, self.microbatch):
                yield slice(first, min(first + self.microbatch, rows.stop)), method, strength

    def with_one_dropout_mask(self, rows):
        """The network, its dropout mask one for all passes over some rows of a step: or Eq. 6 measures it."""
        if not self.config["network"]["dropout"]:
            return self.network
        row = self.process.rank + self.process.world * rows.start               # in the global batch
        seed = stream_seed("dropout", self.settings["seed"], self.step * self.settings["batch"] + row)

        def network(x, t):
            torch.manual_seed(seed)
            return self.network(x, t)
        return network

    def sum_over_processes(self, losses):
        """One sum for everything: gradients, in place, then the losses. -> the losses."""
        sent = [p.grad for p in self.parameters] + list(losses.values())
        flat = torch.cat([part.flatten() for part in sent])
        dist.all_reduce(flat)
        parts = flat.split([part.numel() for part in sent])
        for p, part in zip(self.parameters, parts):
            p.grad.copy_(part.view_as(p))
        last = parts[len(self.parameters):]                 # cloned: a view would keep all of flat alive
        return {name: part[0].clone() for name, part in zip(losses, last)}

    def ema_weights(self):
        """The EMA as a state dict."""
        return dict(zip((name for name, _ in self.model.named_parameters()), self.ema))

    def grid(self):
        """GRID samples of the EMA weights, uint8 [GRID, H, W, C]: 50 DDIM steps, the same seeds every time.
        Every process draws its share: while one drew all, the others could wait until their time is out."""
        self.model.eval()
        rank, world = self.process.rank, self.process.world
        data, network, device = self.config["data"], self.config["network"], self.process.device
        shape = network["in_channels"], network["size"], network["size"]
        mine = range(rank % GRID, GRID, world)
        schedule = Schedule.named(**self.config["process"]).respaced(min(50, len(self.schedule))).to(device)

        def averaged(x, t):
            return torch.func.functional_call(self.model, self.ema_weights(), (x, t))

        images = torch.cat([sample(
            averaged, schedule, image_noise("sample", 0, mine[k:k + self.microbatch], shape, device), "ddim",
            clamp=(data["low"], data["high"])) for k in range(0, len(mine), self.microbatch)])
        self.model.train()
        shares = gather(together(lambda: as_bytes(images.permute(0, 2, 3, 1).cpu().numpy())))
        return np.stack([shares[k % world][k // world] for k in range(GRID)])

    def state(self):
        """What a checkpoint holds."""
        return dict(config=self.config, step=self.step, ema_updates=self.ema_updates, ema=self.ema_weights(),
                    model=self.model.state_dict(), optimizer=self.optimizer.state_dict())

    def load(self, checkpoint, resume):
        """Takes over a checkpoint: to go on with its run, or to start another run from it (step 0, own
        learning rate).

        A bare public state dict gives the weights alone.
        """
        self.model.load_state_dict(checkpoint.get("model", checkpoint))
        for average, name in zip(self.ema, self.ema_weights()):
            average.copy_(checkpoint.get("ema", checkpoint)[name])
        if "optimizer" in checkpoint:                       # its moments; the settings are this command's
            own = self.optimizer.state_dict()
            self.optimizer.load_state_dict(own | dict(state=checkpoint["optimizer"]["state"]))
            self.ema_updates = checkpoint["ema_updates"]
        if resume:
            self.step = checkpoint["step"]


# ------------------------------------------------------------------------------------------- the command line

# Training by size of network: the paper's (its codebase's, where it is silent), and one that a CPU finishes.
DEFAULTS = {"paper": dict(steps=500_000, batch=128, lr=1e-4, ema=0.9999),
            "small": dict(steps=2_000, batch=64, lr=1e-3, ema=0.995)}
NETWORK = "channels", "res_blocks", "mult", "attn", "heads", "dropout", "learn_sigma"      # groups of flags
PROCESS = "schedule", "timesteps"


def given(args, *names):
    """The settings among these that a command line has: {name: value}."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def arguments(argv=None):
    """The command line, parsed and checked as far as it can be without files."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the run (default runs/DATA-METHOD); the same command resumes it")
    add("--steps", type=int, help="training steps in all (default 500000; 2000 for the small network)")
    add("--batch", type=int, help="images a step, over all processes (default 128; small 64)")
    add("--microbatch", type=int, help="images at a time in a process: less memory (default: all)")
    add("--lr", type=float, help="AdamW's learning rate (default 1e-4; small 1e-3)")
    add("--ema", type=float, help="decay of the average of the weights (default 0.9999; small 0.995)")
    add("--seed", type=int, default=0, help="seed of weights, noise and order (default 0)")
    add("--init", type=Path, help="start from a checkpoint: ours with its optimiser, or improved-diffusion's")
    add("--amp", action="store_true", help="bfloat16 autocast in the network")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)")
    add("--sample-every", type=int, default=0, help="steps between sample grids (default 0: only at the end)")
    add("--benchmark", action="store_true", help="train nothing: measure a step of ddpm, ran and adv of this "
        "configuration and write OUT/benchmark.json")
    add = parser.add_argument_group("the method (section 2)").add_argument
    add("--method", choices=["adv", "ran", "inv", "ddpm", "ambient"], default="adv", help="Eq. 6 with "
        "adversarial or random delta, Eq. 14, Eq. 3, or Table 5's noise-aware baseline (default adv)")
    add("--lam", type=float, default=0.3, help="lambda, the strength of the regulariser (default 0.3)")
    add("--lam-units", choices=["x", "eps"], default="x", help="lambda_t = lambda sqrt(3) / (beta R): R in "
        "units of x_t (default) or of eps")
    add("--omega", type=float, default=2.0, help="Eq. 7's exponent (default 2)")
    add("--gamma", type=float, default=8 / 255, help="Eq. 7's bias (default 8/255)")
    add("--flags", choices=["oracle", "conf1", "conf2"], default="oracle", help="what ambient is told of "
        "each image's noise: the truth (default), a flag wrong with probability p, or that all are noisy")
    add("--sigma-known", type=float, help="the deviation that ambient is told (default --sigma, else 0.1)")
    beyond.add_arguments(parser)
    add = parser.add_argument_group("the data (prepared by data.py)").add_argument
    add("--data", default="shapes", help="name of a data set (default shapes)")
    add("--size", type=int, help="image size (default: the data set's usual one)")
    add("--data-dir", type=Path, default=Path("data"), help="where data.py put it (default data/)")
    add("--p", type=float, default=0.0, help="share of the images that is corrupted (default 0; paper: 0.9)")
    add("--sigma", type=float, default=0.0, help="deviation of their noise, of [-1, 1] (paper: 0.1, 0.2)")
    add("--data-seed", type=int, default=0, help="seed of the corruption (default 0)")
    add = parser.add_argument_group("network and process (defaults: PRESETS of unet.py)").add_argument

    def integers(text):
        return tuple(int(part) for part in text.split(","))

    add("--preset", choices=list(PRESETS), help="another data set's network, or `small`")
    add("--channels", type=int, help="width of the first level")
    add("--res-blocks", type=int, help="residual blocks a level")
    add("--mult", type=integers, help="width of each level in units of --channels, e.g. 1,2,2,2")
    add("--attn", type=integers, help="resolutions with attention, e.g. 16,8; the middle block has it "
        "always")
    add("--heads", type=int, help="attention heads")
    add("--dropout", type=float, help="dropout in the residual blocks")
    add("--learn-sigma", action="store_true", default=None, help="learn the variance too (L_hybrid)")
    add("--timesteps", type=int, help="T (default 1000)")
    add("--schedule", choices=["linear", "cosine"], help="noise schedule (default linear)")
    args = parser.parse_args(argv)

    args.network = args.preset or (args.data if args.data in PRESETS else "small")
    for name, value in DEFAULTS["small" if args.network == "small" else "paper"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / f"{args.data}-{args.method}"
    positive, counts = ("lr", "lam", "gamma", "reg_share"), ("steps", "batch", "microbatch", "save_every")
    check_ranges(args, p=(0, 1), sigma=(0, 1000), sigma_known=(1e-6, 1e6), ema=(0, 1), omega=(1, 1000),
                 sample_every=(0, 10**12), **dict.fromkeys(positive, POSITIVE),
                 **dict.fromkeys(counts, (1, 10**12)))
    if args.attn:
        args.attn = tuple(sorted(args.attn, reverse=True))
    if wrong := misfit(given(args, "size", *NETWORK, *PROCESS)):
        raise UserError(f"--{wrong}")
    if args.corruption == "outliers" and args.sigma:
        raise UserError(f"--sigma {args.sigma:g}: --corruption outliers has no deviation; leave it out")
    if args.corruption == "outliers" and not args.p:
        raise UserError("--corruption outliers: --p is needed, the share of the images")
    if args.corruption == "impulse" and args.sigma > 1:
        raise UserError(f"--sigma {args.sigma:g}: is impulse's share of the pixels, from 0 to 1")
    if args.corruption != "gaussian" and args.method == "ambient":
        raise UserError(f"--corruption {args.corruption}: --method ambient is told of Gaussian noise, and of "
                        "no other")
    if bool(args.p) != bool(args.sigma or args.corruption == "outliers"):
        raise UserError(f"--p {args.p:g} --sigma {args.sigma:g}: the one without the other corrupts nothing")
    world, on = int(os.environ.get("WORLD_SIZE", 1)), f"on --method {args.method}"
    if args.batch % world:
        raise UserError(f"--batch {args.batch}: is not a multiple of the {world} processes")
    args.reg_share = beyond.rounded_share(args.reg_share, args.batch, world)
    idle = [] if args.p else [(["data_seed", "corruption"], "without --p")]
    if args.method in ("ddpm", "ambient"):                  # their loss has one term
        if not args.benchmark:                              # which measures ran and adv too
            idle.append((["lam", "lam_units", "omega", "gamma", "reg_share"], on))
        if args.weighting == "balanced":                    # by 1 + 0
            idle.append((["weighting"], on))
    if args.method != "ambient":
        idle.append((["flags", "sigma_known"], on))
    say_idle(parser, argv, idle)
    for name in [name for names, _ in idle for name in names]:      # what has no effect tells no runs apart
        setattr(args, name, parser.get_default(name))
    if args.method != "ambient":
        args.flags = args.sigma_known = None
    elif args.sigma_known is None:
        args.sigma_known = args.sigma or 0.1
    return args


def resolutions(network):
    """The image size at each level of a configured network."""
    return [network["size"] >> level for level in range(len(network["mult"]))]


def from_flags(args, size, channels, sigma_data):
    """The network, of images of this size and so many channels, and the process, by the flags and, where
    these are silent, by preset."""
    network = dict(size=size, in_channels=channels, learn_sigma=False, scale_shift=True,
                   sigma_data=sigma_data)
    process = dict(schedule="linear", timesteps=1000)
    return network | PRESETS[args.network] | given(args, *NETWORK), process | given(args, *PROCESS)


def configuration(args, images, start, resume):
    """The run as plain values in four groups: what a checkpoint says of itself. start: the checkpoint of
    --init, whose network and process the flags may only agree with, or, to `resume`, the run's own; or
    None."""
    sigma_data = sigma_data_of(args, images) if args.precondition else None
    network, process = from_flags(args, images.size, images.shape[0], sigma_data)
    if args.init:
        chosen = dict(PRESETS[args.preset] if args.preset else {}, **given(args, *NETWORK), size=images.size)
        if sigma_data:
            chosen["sigma_data"] = sigma_data
        if "config" in start:
            from_file, process_from_file = start["config"]["network"], start["config"]["process"]
        else:
            from_file, process_from_file = network_of(start, images.size, network["heads"]), process
        if from_file["sigma_data"]:                         # preconditioned: its weights know no other
            chosen.pop("sigma_data", None)
        elif sigma_data and not resume:
            raise UserError(f"--precondition: the network of --init {args.init} is not preconditioned; leave "
                            "the flag out")
        for name, value in (chosen | given(args, *PROCESS)).items():
            if not resume and name != "dropout" and (from_file | process_from_file)[name] != value:
                raise UserError(f"--init {args.init}: its {name} is {(from_file | process_from_file)[name]}, "
                                f"not {value}")
        network, process = network | from_file | chosen, process_from_file | given(args, *PROCESS)
    if args.weighting == "edm" and not network["sigma_data"]:
        raise UserError("--weighting edm: needs --precondition; without it the weights of high noise levels, "
                        "which are hardly drawn, undo the training. Take --weighting balanced")
    sizes = resolutions(network)
    for resolution in args.attn or ():
        if resolution not in sizes:
            raise UserError(f"--attn {resolution}: the network has {', '.join(map(str, sizes))}")
    if args.method == "ambient" and network["learn_sigma"]:
        raise UserError("--method ambient: the baseline learns no variance; leave out --learn-sigma, or take "
                        "another --init")
    data = dict(name=args.data, size=images.size, count=len(images), sha256=images.info["sha256"], p=args.p,
                sigma=args.sigma, corruption=args.corruption, data_seed=args.data_seed, low=images.low,
                high=images.high, float_data=images.array.dtype != np.uint8)
    names = ("method", "lam", "lam_units", "omega", "gamma", "reg_share", "weighting", "flags", "sigma_known",
             "batch", "lr", "ema", "amp", "seed")
    training = {name: getattr(args, name) for name in names}
    training |= dict(init=args.init and str(args.init), streams=STREAMS)
    return dict(network=network, process=process, data=data, training=training)


def sigma_data_of(args, images):
    """The deviation of a data set's values, by its .json. UserError where it does not say."""
    found = images.info.get("sigma_data")
    if found is None or misfit(dict(sigma_data=found)):
        raise UserError(f"--data {args.data}: its .json has sigma_data {found}, and a positive number is "
                        "needed, the deviation of the images' values: delete it and "
                        f"{images.array.filename}, and prepare the set again")
    return found


def open_images(args, first):
    """-> the Images of a training; UserError where they are too few, or the run's folder cannot be
    written."""
    if first:                                               # which alone writes
        for name in "checkpoint.pt", "checkpoint-previous.pt", "log.jsonl", SEEN, grid_name(args.steps):
            check_out(args.out / name)
    images = Images(args.data, args.size, args.data_dir, args.p, args.sigma, args.data_seed,
                    args.corruption)
    if args.batch > len(images):
        raise UserError(f"--batch {args.batch}: {args.data} has only {len(images)} images")
    if args.p and not images.corrupted(np.arange(len(images))).any():
        raise UserError(f"--p {args.p:g}: corrupts none of the {len(images)} images of {args.data}")
    return images


def open_start(args, first):
    """What a run starts from, read by the first process, for all of them: -> the checkpoint in args.out and
    True, to go on with it; or that of --init, or None, and False.

    UserError where others have a checkpoint and the first process has none, or it is no run's.
    """
    path = args.out / "checkpoint.pt"
    found = gather(not args.benchmark and os.path.lexists(path))
    if any(found) and not found[0]:
        raise UserError(f"--out {args.out}: process {found.index(True)} finds a checkpoint there and process "
                        "0 does not; process 0 reads and writes it: start that on the machine that has it")
    if not first:
        return None
    if not found[0]:
        if previous_of(path).exists() and not args.benchmark:
            raise UserError(f"--out {args.out} holds {previous_of(path).name} and no {path.name}: rename it "
                            f"to {path.name} to go on from there, or delete it")
        return load_checkpoint(args.init) if args.init else None, False
    saved = load_checkpoint(path)
    if not {"config", "optimizer"} <= saved.keys():
        raise UserError(f"{path}: is a model and no run that can go on; start from it with --init, and "
                        "choose another --out")
    return saved, True


def check_same_run(args, there, now):
    """UserError where the config `there`, of the checkpoint in args.out, is not that of this command, naming
    every setting that differs."""
    if there["training"].get("streams") != STREAMS:
        raise UserError(f"--out {args.out} holds a run that another version of train.py began, with other "
                        "random streams: sample from it, start from it with --init, or choose another --out")

    def same(name, was, value):
        if name == "init" and was and value:                # two ways to write a path
            return os.path.abspath(str(was)) == os.path.abspath(value)
        return was == value

    notes = dict(init=": give the path as before, the file itself is not needed any more",
                 sigma_data=" (see --precondition)",
                 sha256=": other images, or prepared by another version of Pillow: copy them from there")
    differing = [f"{name} was {there[group].get(name)} and is now {value}{notes.get(name, '')}"
                 for group in now for name, value in now[group].items()
                 if not same(name, there[group].get(name), value)]
    if differing:
        raise UserError(f"--out {args.out} holds another run: {'; '.join(differing)}. Give the same "
                        "settings, or another --out")


def check_room(args, config, process):
    """UserError, before the work, where the network, a batch or the checkpoints do not fit the machine."""
    network = config["network"]
    model = 4 * sum(p.numel() for p in built(config, "meta")[0].parameters())           # bytes
    rows = min(args.microbatch or args.batch, args.batch // process.world)
    maps = 4 * network["size"] ** 2 * network["channels"] * (network["res_blocks"] + 1)
    check_memory("the network", 5 * model, process.device)  # weights, gradients, EMA, AdamW's moments
    check_memory(f"--batch {args.batch} (see --microbatch)", 5 * model + rows * maps, process.device)
    if process.rank == 0 and not args.benchmark:
        files = args.out / "checkpoint.pt", previous_of(args.out / "checkpoint.pt")
        there = {file.stat().st_ino: file.stat().st_size for file in files if file.exists()}
        check_disk(args.out, 3 * 4 * model - sum(there.values()))               # two, and the next one


def check_compiler(device):
    """UserError where torch.compile does not work, as without a compiler for C++: tried on a trifle."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(2, device=device))
    except Exception as error:                              # of many kinds
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"--compile: torch.compile does not work here ({lines[0][:160]}); leave the flag "
                        "out") from error


def peak_memory(device):
    """Peak memory of this process in GiB: the GPU's, or the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def benchmark(args, config, images, process):
    """Measures a training step of ddpm, ran and adv, each in a Trainer of its own -> what OUT/benchmark.json
    holds.

    seconds: median of a few steps of --batch images. peak_gib: of a CPU it is this process's so far, the
    reason for the order of the methods.
    """
    methods = {}
    for method in ("ddpm", "ran", "adv"):
        trainer = Trainer(config | dict(training=config["training"] | dict(method=method)), args.microbatch,
                          args.compile, process)
        index = batch_indices(args.seed, 0, args.batch, len(images))[trainer.rows]
        x_0, seconds = torch.from_numpy(images.read(index)).to(process.device), []
        if process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        while len(seconds) < 3 or broadcast(len(seconds) < 20 and sum(seconds) < 10):       # all take as many
            began = time.perf_counter()
            trainer.advance(x_0)
            if process.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        methods[method] = dict(seconds=statistics.median(seconds[1:]), peak_gib=peak_memory(process.device))
        del trainer
    return dict(config=config, device=process.device.type, torch=torch.__version__, world=process.world,
                threads=torch.get_num_threads(), batch=args.batch, methods=methods)


class Log:
    """RUN/log.jsonl and the terminal, written by the first process alone."""

    def __init__(self, path, step, first):
        self.first = first
        if first:
            kept = []       # not what a killed run wrote after its last checkpoint, or of a grid not drawn
            if step and path.exists():
                for line in path.read_text(errors="replace").splitlines():
                    with contextlib.suppress(Exception):            # half written, foreign
                        found = json.loads(line)
                        picture = path.with_name(grid_name(found["step"]))
                        drawn = found.get("event") != "grid" or picture.exists()
                        kept += [line] if found["step"] <= step and drawn else []
            with atomic_write(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
            self.path, self.file = path, open(path, "a", buffering=1)

    def record(self, **values):
        """A line of the file."""
        if self.first:
            try:
                self.file.write(json.dumps(values) + "\n")
            except OSError as error:                        # the disk is full
                raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def say(self, text):
        """A line for people."""
        if self.first:
            print(text, flush=True)


def describe(args, config, trainer, images, assumed):
    """The lines that a training begins with."""
    parameters = sum(p.numel() for p in trainer.parameters) / 1e6
    some = np.arange(min(len(images), 1 + 1000 * 32**2 // images.size**2))          # a few megabytes of them
    noise, network = noise_estimate(images.read(some)).mean(), config["network"]
    attention = ", ".join(str(size) for size in resolutions(network) if size in network["attn"])
    attention = f"attention at {attention} and in the middle" if attention else "attention in the middle"
    share = "" if args.reg_share == 1 else f", on {args.reg_share:g} of the batch"
    method = (f", lambda {args.lam} ({args.lam_units} units), omega {args.omega}, gamma {args.gamma:.4f}"
              f"{share}")
    if args.method == "ddpm":
        method = ""
    if args.method == "ambient":
        method = (f", sigma {args.sigma_known} known, {100 * (assumed > 0).mean():.1f} % of the images taken "
                  f"for noisy ({args.flags})")
    origin = f"from {args.init}" if args.init else args.network
    if network["sigma_data"]:
        attention += f", preconditioned for data of deviation {network['sigma_data']:.3g}"
    weighting = "" if args.weighting == "paper" else f", weighting {args.weighting}"
    return (f"data      {args.data} {images.size}x{images.size}, {len(images)} images, {100 * args.p:g} % of "
            f"them with {'noise' if args.corruption == 'gaussian' else args.corruption}"
            f"{'' if args.corruption == 'outliers' else f' of sigma {args.sigma}'} (data seed "
            f"{args.data_seed}); noise estimate {noise:.3f}\n"
            f"network   {parameters:.2f} M parameters ({origin}), {attention}; "
            f"{config['process']['schedule']} schedule, T = {len(trainer.schedule)}\n"
            f"method    {args.method}{method}{weighting}\n"
            f"training  steps {trainer.step} to {args.steps}, batch {args.batch} on {trainer.process.world} "
            f"{trainer.process.device.type} process(es), {'bfloat16' if args.amp else 'float32'}\n"
            f"output    {args.out}/checkpoint.pt every {args.save_every} steps, log.jsonl, sample grids, "
            f"{SEEN}")


def grid_name(step):
    """The file of a sample grid in a run's folder."""
    return f"samples-{step:08d}.png"


def grid_is_due(args, step):
    """Whether a sample grid is drawn after this step: the last, or one of --sample-every."""
    return step >= args.steps or args.sample_every and step % args.sample_every == 0


def draw_grid(args, trainer, log):
    """Says in the log that there is a sample grid of the step that the training is at, draws it in all
    processes, and writes it: where the picture is, the step's checkpoint and line are too. run_all.sh takes
    the last one for the run's end."""
    together(lambda: log.record(step=trainer.step, event="grid", file=grid_name(trainer.step)))
    images = trainer.grid()
    together(lambda: log.first and save_grid(images, args.out / grid_name(trainer.step)))


def run(args, trainer, images, assumed, log):
    """Algorithm 1's loop until args.steps or a signal, with its reading ahead, losses, checkpoints and
    grids."""
    process, checkpoint = trainer.process, args.out / "checkpoint.pt"

    def read(step):
        """This process's images of a step, and what `ambient` is told of them, on their way to the device."""
        index = batch_indices(args.seed, step, args.batch, len(images))[trainer.rows]
        batch = [images.read(index)] if assumed is None else [images.read(index), assumed[index]]
        batch = [torch.from_numpy(part) for part in batch]
        return [part.pin_memory() if process.device.type == "cuda" else part for part in batch]

    stop = []

    def on_signal(number, frame):                           # finish the step and save; a second Ctrl-C kills
        stop.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):   # a terminal's, Slurm's
        if signal.getsignal(number) != signal.SIG_IGN:      # as nohup has it
            signal.signal(number, on_signal)

    reader = ThreadPoolExecutor(1)                          # reads the next batch while the network works
    upcoming = reader.submit(read, trainer.step)
    log_every = 50 if process.device.type == "cuda" else 1  # reading a loss makes the host wait for the GPU
    sums, counted, began, began_at = {}, 0, time.perf_counter(), trainer.step
    broken = torch.full((), math.inf, device=process.device)   # the first step with a loss that is not finite
    progress = Progress(args.steps - began_at, "steps", "training")
    while trainer.step < args.steps:                        # Algorithm 1: repeat ... until convergence
        batch = [part.to(process.device, non_blocking=True) for part in upcoming.result()]      # x_0 ~ D
        upcoming = reader.submit(read, trainer.step + 1)
        losses = trainer.advance(*batch)
        step = trainer.step
        sums = {name: sums.get(name, 0) + loss for name, loss in losses.items()}
        counted += 1
        broken = torch.where(sum(losses.values()).isfinite(), broken, broken.clamp(max=step))
        stopping = torch.tensor(float(bool(stop)))
        if process.world > 1:
            dist.all_reduce(stopping)                       # on the CPU: all leave after the same step
        last = step == args.steps
        saving = last or bool(stopping) or step % args.save_every == 0
        drawing = grid_is_due(args, step)
        if not (saving or drawing or step % log_every == 0):
            continue
        if saving and not torch.stack([p.isfinite().all() for p in trainer.parameters]).all():
            broken.clamp_(max=step)                         # by the update that followed a finite loss
        if math.isfinite(float(broken)):
            good = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "none was saved"
            raise UserError(f"the loss or the weights of step {int(broken)} are not finite; {good}. Try a "
                            "lower --lr, or without --amp")
        means = {name: float(total) / counted for name, total in sums.items()}
        rate = (step - began_at) * args.batch / (time.perf_counter() - began)
        sums, counted = {}, 0
        log.record(step=step, **means, images_per_s=round(rate, 2))
        progress.update(step - began_at, **means)
        if saving:
            together(lambda: log.first and save_checkpoint(checkpoint, trainer.state()))
        if last:
            progress.close()
        if drawing:
            draw_grid(args, trainer, log)
        if stopping:
            log.say(f"\nstopped by a signal after step {step}: saved {checkpoint}; the same command goes on")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    log.say(f"made {checkpoint} (step {trainer.step}) and {args.out / grid_name(trainer.step)}: {rate:.1f} "
            f"images/s, peak memory {peak_memory(process.device):.2f} GiB a process\n"
            f"next: python sample.py {args.out} --num-samples 64 --out {args.out}/samples.npz")


def main(argv=None):
    """Trains until args.steps, resuming where a checkpoint is."""
    args = arguments(argv)
    process = start_processes()
    first = process.rank == 0
    images = together(lambda: open_images(args, first))
    asked = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    if len(set(gather(json.dumps([asked, images.info["sha256"]], sort_keys=True)))) > 1:
        raise UserError("the processes were given different settings or data: the same command is needed on "
                        "every machine")
    if args.compile:
        together(lambda: check_compiler(process.device))
    message = f"--out {args.out}: another process is training there; wait for it, or choose another --out"
    with contextlib.ExitStack() as stack:
        if not args.benchmark:
            together(lambda: first and stack.enter_context(locked(args.out / ".lock", message)))
            for file in args.out.glob(".partial-checkpoint*") if first else ():     # a killed run was at it
                file.unlink()
        start, resume = broadcast(together(lambda: open_start(args, first)))
        config = configuration(args, images, start, resume)
        if resume:
            check_same_run(args, start["config"], config)
        finished = resume and start["step"] >= args.steps
        if not finished:
            together(lambda: check_room(args, config, process))
        if args.benchmark:
            result = benchmark(args, config, images, process)
            if first:
                write_json(args.out / "benchmark.json", result)
                print(json.dumps(result["methods"], indent=1) + f"\nmade {args.out}/benchmark.json")
            return
        drawing = resume and grid_is_due(args, start["step"]) and broadcast(    # killed before it was drawn
            not (args.out / grid_name(start["step"])).exists())
        if finished and not drawing:
            if first:
                print(f"{args.out}/checkpoint.pt is at step {start['step']} already: nothing to do (--steps "
                      f"{args.steps})")
            return
        trainer = together(lambda: Trainer(config, args.microbatch, args.compile, process))
        if start:
            trainer.load(start, resume)
        del start                                           # gigabytes, of large networks
        assumed = assumed_noise(images, args.flags, args.sigma_known) if args.method == "ambient" else None
        log = together(lambda: Log(args.out / "log.jsonl", trainer.step, first))
        if drawing:
            draw_grid(args, trainer, log)
        if finished:
            log.say(f"made {args.out / grid_name(trainer.step)}: all else was there")
            return
        log.say(describe(args, config, trainer, images, assumed))
        code = {f"{name}.py": sha256_of(Path(__file__).with_name(f"{name}.py"))[:12]
                for name in "train beyond gaussian unet checkpoints sample data common".split()}
        seen = images.read(np.arange(min(GRID, len(images)))).transpose(0, 2, 3, 1)     # [36, H, W, C]
        together(lambda: first and save_grid(as_bytes(seen), args.out / SEEN))
        log.record(step=trainer.step, event="start", config=config, world=process.world, tf32=process.tf32,
                   device=process.device.type, torch=torch.__version__, code=code)
        run(args, trainer, images, assumed, log)


if __name__ == "__main__":
    command_line(main)
