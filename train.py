"""Adversarial training of diffusion models: Algorithm 1 of the paper, its losses, and plain DDPM beside them.

    python train.py --data shapes --p 0.9 --sigma 0.2                              # small network, any machine
    torchrun train.py --data cifar10 --p 0.9 --sigma 0.2                           # the paper's Robust_adv
    torchrun --nproc_per_node 8 train.py --data cifar10 --method ddpm --out runs/ddpm
    python train.py --data cifar10 --p 0.9 --sigma 0.2 --method ambient --flags conf1                   # Table 5's baseline
    python train.py --data cifar10 --init cifar10_uncond_50M_500K.pt --schedule cosine --timesteps 4000 --learn-sigma

The same command again goes on from the last checkpoint. RUN/checkpoint.pt is what sample.py and the others take.
"""

import argparse
import functools
import json
import math
import os
import resource
import signal
import statistics
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Images, Progress, UserError, as_bytes, atomic_write, command_line, noise_estimate, save_grid, sha256_of
from sample import generator, image_noise, sample, split_output, stream_seed
from unet import (PRESETS, Schedule, UNet, at, expand, in_bfloat16, load_checkpoint, network_of, save_checkpoint,
                  start_processes)

FLAG_STREAM = 0x5EED    # of the draws of wrong flags (conf1), apart from the corruption's own
GRID = 36               # images of a sample grid, made with 50 DDIM steps
# What may change between two runs of the same training: how it is run and for how long, not what is learned.
FREE = {"steps", "microbatch", "save_every", "sample_every", "compile"}


# --------------------------------------------------------------------------------------------------------- the losses

def radius(schedule, t, beta, omega=2.0, gamma=8 / 255):
    """r_beta(t) of Eq. 7: the half-width of delta's ball, in units of eps. t, beta [B...] -> [B...]."""
    s = schedule.sqrt_one_minus_alpha_bar[t]
    return (s**omega + gamma * beta) / s                                            # Eq. 7


def regularisation_weight(schedule, t, beta, r, lam=0.3, lam_units="x"):
    """lambda_t = lambda sqrt(3) / (beta R), R the ball's radius in units of x_t (`x`) or of eps (`eps`). -> [B...]."""
    R = schedule.sqrt_one_minus_alpha_bar[t] * r if lam_units == "x" else r
    return lam * math.sqrt(3) / (beta * R)


def total_weight(schedule, t, lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255):
    """1 + lambda_t at beta = 1: how heavily the two terms of the loss at t weigh together. t [B...] -> [B...]."""
    one = torch.ones_like(t, dtype=schedule.sqrt_one_minus_alpha_bar.dtype)
    return 1 + regularisation_weight(schedule, t, one, radius(schedule, t, one, omega, gamma), lam, lam_units)


def timesteps(schedule, t, chance, reg_share=1.0, balance=False, *regularisation):
    """The timesteps of some rows, and the factor of their loss. t uniform and chance ~ U[0, 1), both [B...] -> both [B...].

    Beyond the paper, whose own are t and 1; regularisation: lam, lam_units, omega, gamma. A share below 1 has few rows for a
    regulariser whose weight differs 20-fold: their t are drawn from q(t) ~ 1 + lambda_t and their loss is divided by
    q(t) / uniform, which has the same expectation and less noise. With `--balance` every t weighs the same: the factor is
    1 / (1 + lambda_t), which leaves the minimiser at every t what it is, but no t drowns the others' gradients, as
    16 / beta^2 near t = 0 does.
    """
    if balance:
        return t, 1 / total_weight(schedule, t, *regularisation)
    if reg_share == 1:
        return t, torch.ones_like(chance)
    weight = total_weight(schedule, torch.arange(len(schedule), device=t.device), *regularisation)          # [..., T]
    below = weight.cumsum(dim=-1)
    t = torch.searchsorted(below / below[..., -1:], chance.contiguous())
    return t, weight.mean(dim=-1, keepdim=True) / weight.gather(-1, t)


def weighed(terms, factor, reg_share):
    """The terms of `training_loss` with the factor of `timesteps`; the regulariser of a share stands for that of all."""
    return {name: factor * term / (reg_share if name == "reg" else 1) for name, term in terms.items()}


def mean_square(x, t):
    """The squared norms of Eq. 3 to 8 as means over pixels and channels: x [B..., *], t [B...] -> [B...]."""
    return x.square().flatten(t.ndim).mean(dim=t.ndim)


def fgsm(predict, x_t, t, eps_hat, delta, r, s):
    """delta_adv of Eq. 8: one step of the fast gradient sign method from the random start delta, kept inside the ball.

    predict(x, t) -> eps_theta; x_t, eps_hat, delta [B..., *]; r, s broadcasting against them: the radius in units of eps,
    and sqrt(1 - alpha_bar), which takes delta into units of x_t.
    """
    delta = delta.detach().requires_grad_()
    J = (predict(x_t + s * delta, t) - eps_hat.detach()).square().sum()             # a sum: the sign ignores its scale
    gradient, = torch.autograd.grad(J, delta)                                       # no parameter's gradient is computed
    return torch.clamp(delta.detach() + r / math.sqrt(3) * gradient.sign(), -r, r)  # Eq. 8


def training_loss(model, schedule, x_0, t, eps, beta, u, method="adv", lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255):
    """The terms of Eq. 6 (`adv`, `ran`), Eq. 14 (`inv`) or Eq. 3 (`ddpm`), sample by sample: one step of Algorithm 1.

    model(x_t, t) -> eps_theta, or eps_theta and v with learned variance. x_0 [B..., *] data; t [B...] timesteps;
    eps ~ N(0, I) and u ~ U[-1, 1] like x_0; beta ~ U[0.5, 2] like t: all randomness is the caller's.
    -> dict of [B...]: `ddpm`; `reg`, lambda_t included, unless the method is ddpm; `vlb` with learned variance.
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

    radius_t = radius(schedule, t, beta, omega, gamma)                              # [B...]
    r, s = expand(radius_t, x_t), at(schedule.sqrt_one_minus_alpha_bar, t, x_t)     # [B..., 1 ...]
    delta = r * u                                                                   # delta_ran ~ U[-r, r]
    if method != "ran":
        delta = fgsm(predict, x_t, t, eps_hat, delta, r, s)                         # Eq. 8
    eps_hat_delta = predict(x_t + s * delta, t)                                     # at Eq. 7's perturbed x_t
    # Both outputs carry gradient: each has to move towards the other.
    target = eps_hat if method == "inv" else eps_hat + delta                        # Eq. 14 (invariance), Eq. 6 (equivariance)
    lam_t = regularisation_weight(schedule, t, beta, radius_t, lam, lam_units)
    terms["reg"] = lam_t * mean_square(eps_hat_delta - target, t)                   # Eq. 6
    return terms


def ambient_loss(model, schedule, y, t, eps, sigma_n):
    """The noise-aware baseline of Table 5 (Daras et al. 2024a for a network that predicts eps), sample by sample.

    y [B, *] data with noise of a KNOWN deviation sigma_n [B], 0 for a clean sample, whose loss is Eq. 3's. y is only ever
    diffused further: timesteps with less noise than y has itself teach nothing. -> dict of [B]: `ddpm`.
    """
    sigma_t = schedule.sqrt_one_minus_alpha_bar[t] / schedule.sqrt_alpha_bar[t]     # the noise of x_t / sqrt(alpha_bar)
    usable = sigma_t > sigma_n
    keep = torch.where(usable, 1 - (sigma_n / sigma_t).square(), 1.0)               # 1 - rho: the share that eps adds
    x_t = at(schedule.sqrt_alpha_bar, t, y) * (y + expand(sigma_t * keep.sqrt(), y) * eps)
    eps_hat, _ = split_output(model(x_t, t), x_t)
    return {"ddpm": usable * keep * mean_square(eps - expand(keep.sqrt(), y) * eps_hat, t)}


def assumed_noise(images, flags, sigma_known):
    """What the noise-aware baseline is told of every image: its deviation sigma_known or 0. -> float32 [N].

    flags: `oracle` the truth; `conf1` each image's flag is right with probability 1 - p, decided once; `conf2` all noisy.
    """
    noisy = np.ones(len(images), bool)
    if flags != "conf2":
        noisy = images.corrupted(np.arange(len(images))) & (images.sigma > 0)
    if flags == "conf1":
        noisy ^= np.random.default_rng([images.data_seed, FLAG_STREAM]).random(len(images)) < images.p
    return np.float32(sigma_known) * noisy.astype(np.float32)


def variational_bound(schedule, x_0, x_t, t, eps_hat, v):
    """The term of L_vlb at t in bits per dimension: it trains the variance (Nichol & Dhariwal 2021, L_hybrid). -> [B]."""
    small, log_variance = schedule.log_variance("small", x_t, t), schedule.log_variance("learned", x_t, t, v)
    mean = schedule.posterior_mean(schedule.predicted_x0(x_t, t, eps_hat), x_t, t)
    divergence = 0.5 * (log_variance - small - 1 + (small - log_variance).exp() + (-log_variance).exp()
                        * (schedule.posterior_mean(x_0, x_t, t) - mean).square())   # KL of two Gaussians
    # At t = 0 it is the likelihood of x_0's byte: the Gaussian's mass between half a level below and half a level above.
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    above = torch.where(x_0 > 0.999, 1.0, normal.cdf(x_0 + 1 / 255))
    below = torch.where(x_0 < -0.999, 0.0, normal.cdf(x_0 - 1 / 255))
    surprise = -(above - below).clamp(min=1e-12).log()
    return torch.where(expand(t == 0, x_t), surprise, divergence).flatten(1).mean(dim=1) / math.log(2)


# ------------------------------------------------------------------------------------------------- Algorithm 1's draws

def draw(seed, step, batch, shape, timesteps, device):
    """The randomness of one step for the whole batch, a function of (seed, step) alone, whoever computes which part.

    -> t [batch] in 0 ... timesteps-1, beta [batch] ~ U[0.5, 2], eps ~ N(0, I), u ~ U[-1, 1], both [batch, *shape], and
    chance [batch] ~ U[0, 1), for `timesteps`.
    """
    g = generator(seed, step, device)
    t = torch.randint(timesteps, (batch,), generator=g, device=device)
    beta = 0.5 + 1.5 * torch.rand(batch, generator=g, device=device)
    eps = torch.randn(batch, *shape, generator=g, device=device)
    u = 2 * torch.rand(batch, *shape, generator=g, device=device) - 1
    return t, beta, eps, u, torch.rand(batch, generator=g, device=device)


def regularised_rows(rows, reg_share, method):
    """Which rows of the batch carry the regulariser: one in 1 / reg_share. -> [(rows, method)], the others as `ddpm`.

    Images and draws are new in every step, so that fixed rows are a random share of them. A share is computed by
    itself, and not as a part of one pass over all rows: dropout has one mask for all passes over a row.
    """
    every = 1 if method in ("ddpm", "ambient") else round(1 / reg_share)
    parts = [([row for row in rows if row % every == 0], method), ([row for row in rows if row % every], "ddpm")]
    return [(part, method) for part, method in parts if part]


def index_of(rows):
    """Row numbers as what to index with: a slice where they are evenly spaced, which is a view and sends a GPU nothing."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    return slice(rows[0], rows[-1] + 1, step) if rows == list(range(rows[0], rows[-1] + 1, step)) else rows


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order of the images in an epoch: a permutation of all `count`."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(seed, step, batch, count):
    """Which images make up the batch of a step: every image once an epoch, in a fresh order. -> int64 [batch]."""
    return np.array([epoch_order(seed, k // count, count)[k % count] for k in range(step * batch, (step + 1) * batch)])


# -------------------------------------------------------------------------------------------------------- the training

class Trainer:
    """Network, EMA, optimiser and step counter of one process: the state that a checkpoint holds, and what advances it."""

    def __init__(self, config, microbatch, compile, process):
        self.config, self.settings, self.process = config, config["training"], process
        self.schedule = Schedule.named(**config["process"]).to(process.device)
        torch.manual_seed(self.settings["seed"])                        # the same initial weights in every process
        self.model = UNet(**config["network"]).to(process.device, memory_format=torch.channels_last)
        self.network = torch.compile(self.model) if compile else self.model
        if self.settings["amp"]:
            self.network = in_bfloat16(self.network, process.device)
        self.parameters = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.settings["lr"], weight_decay=0.0, fused=True)
        self.step, self.ema_updates = 0, 0
        share = self.settings["batch"] // process.world
        self.rows = range(process.rank * share, (process.rank + 1) * share)     # this process's part of the global batch
        self.microbatch = min(microbatch or share, share)

    def losses(self, x_0, rows, noise, method, sigma_n=None):
        """The loss terms of some rows of the global batch, x_0 their images: scalars, summed over rows / batch.

        sigma_n [rows]: what `ambient` is told of them.
        """
        settings = self.settings
        t, beta, eps, u, chance = (part[index_of(list(rows))] for part in noise)
        reg_share = 1.0 if method in ("ddpm", "ambient") else settings["reg_share"]

        def network(x, t):
            if self.config["network"]["dropout"]:           # one mask for all passes of a step, or Eq. 6 measures dropout
                torch.manual_seed(stream_seed(settings["seed"], self.step * settings["batch"] + rows[0]))
            return self.network(x, t)

        regularisation = [settings[name] for name in ("lam", "lam_units", "omega", "gamma")]
        t, factor = timesteps(self.schedule, t, chance, reg_share, settings["balance"], *regularisation)
        if method == "ambient":
            terms = ambient_loss(network, self.schedule, x_0, t, eps, sigma_n)
        else:
            terms = training_loss(network, self.schedule, x_0, t, eps, beta, u, method, *regularisation)
        return {name: term.sum() / settings["batch"] for name, term in weighed(terms, factor, reg_share).items()}

    def noise(self, shape):
        """Algorithm 1's draws for the whole batch of the step that comes next."""
        return draw(self.settings["seed"], self.step, self.settings["batch"], shape, len(self.schedule), self.process.device)

    def advance(self, x_0, sigma_n=None):
        """One step of Algorithm 1 on x_0 [rows, C, H, W], this process's part of the batch. -> its loss terms, tensors.

        sigma_n [rows]: for the method `ambient`, see `assumed_noise`.
        """
        noise, totals = self.noise(x_0.shape[1:]), {}
        self.optimizer.zero_grad()
        for part, method in regularised_rows(self.rows, self.settings["reg_share"], self.settings["method"]):
            for rows in (part[first:first + self.microbatch] for first in range(0, len(part), self.microbatch)):
                here = index_of([row - self.rows.start for row in rows])
                terms = self.losses(x_0[here], rows, noise, method, None if sigma_n is None else sigma_n[here])
                sum(terms.values()).backward()
                totals = {name: totals.get(name, 0) + terms[name].detach() if name in terms else totals[name]
                          for name in totals | terms}
        if self.process.world > 1:                          # one sum for everything: gradients, then the losses
            sent = [p.grad for p in self.parameters] + list(totals.values())
            flat = torch.cat([part.flatten() for part in sent])
            dist.all_reduce(flat)
            parts = flat.split([part.numel() for part in sent])
            for p, part in zip(self.parameters, parts):
                p.grad.copy_(part.view_as(p))
            totals = dict(zip(totals, (part[0] for part in parts[len(self.parameters):])))
        self.optimizer.step()
        self.step += 1
        self.ema_updates += 1
        decay = min(self.settings["ema"], (1 + self.ema_updates) / (10 + self.ema_updates))     # or it starts as noise
        torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        return totals

    def cost(self, x_0, method):
        """Seconds of a loss and its gradients per image, measured on x_0 without any effect on the training."""
        noise, seconds = self.noise(x_0.shape[1:]), []
        parts = regularised_rows(range(len(x_0)), self.settings["reg_share"], method)
        for _ in range(4):
            began = time.perf_counter()
            for rows, method in parts:
                sum(self.losses(x_0[index_of(rows)], rows, noise, method).values()).backward()
            if self.process.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:]) / len(x_0)    # the first one warms up

    def ema_weights(self):
        """The EMA as a state dict."""
        return dict(zip((name for name, _ in self.model.named_parameters()), self.ema))

    def grid(self, path):
        """Draws GRID samples of the EMA weights into a PNG: 50 DDIM steps, the same seeds every time."""
        self.model.eval()
        data, network = self.config["data"], self.config["network"]
        noise = image_noise(0, range(GRID), (network["in_channels"], network["size"], network["size"]), self.process.device)
        schedule = Schedule.named(**self.config["process"]).respaced(min(50, len(self.schedule))).to(self.process.device)
        images = sample(lambda x, t: torch.func.functional_call(self.model, self.ema_weights(), (x, t)), schedule, noise,
                        "ddim", clamp=(data["low"], data["high"]))
        save_grid(as_bytes(images.permute(0, 2, 3, 1).cpu().numpy()), path)
        self.model.train()

    def state(self):
        """What a checkpoint holds."""
        return dict(config=self.config, step=self.step, ema_updates=self.ema_updates, model=self.model.state_dict(),
                    ema=self.ema_weights(), optimizer=self.optimizer.state_dict())

    def load(self, checkpoint, resume):
        """Takes over a checkpoint: to go on with its run, or to start another run from it (step 0, own learning rate).

        A bare public state dict gives the weights alone.
        """
        weights = checkpoint.get("model", checkpoint)
        self.model.load_state_dict(weights)
        for average, name in zip(self.ema, self.ema_weights()):
            average.copy_(checkpoint.get("ema", checkpoint)[name])
        if "optimizer" in checkpoint:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.ema_updates = checkpoint["ema_updates"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"]
        if resume:
            self.step = checkpoint["step"]


# --------------------------------------------------------------------------------------------------- the command line

# Training by size of network: the paper's (its codebase's, where it is silent), and one that a CPU finishes.
DEFAULTS = {"paper": dict(steps=500_000, batch=128, lr=1e-4, ema=0.9999),
            "small": dict(steps=2_000, batch=64, lr=1e-3, ema=0.995)}


def arguments():
    """The command line, parsed and checked as far as it can be without files."""
    parser = argparse.ArgumentParser(description="Train a diffusion model, adversarially (adv), with random perturbations "
                                     "(ran), with invariance (inv), or plainly (ddpm).", epilog=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the run (default runs/DATA-METHOD); the same command again resumes it")
    add("--steps", type=int, help="training steps in all (default 500000; 2000 for the small network)")
    add("--batch", type=int, help="images a step, over all processes (default 128; small 64)")
    add("--microbatch", type=int, help="images at a time in one process: less memory, the same result (default: all)")
    add("--lr", type=float, help="AdamW's learning rate (default 1e-4; small 1e-3)")
    add("--ema", type=float, help="decay of the average of the weights (default 0.9999; small 0.995)")
    add("--seed", type=int, default=0, help="seed of weights, noise and order (default 0)")
    add("--init", type=Path, help="start from this checkpoint: ours, with its optimiser, or improved-diffusion's")
    add("--amp", action="store_true", help="bfloat16 autocast in the network")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)")
    add("--sample-every", type=int, default=0, help="steps between sample grids (default 0: only at the end)")
    group = parser.add_argument_group("the method (section 2)")
    add = group.add_argument
    add("--method", choices=["adv", "ran", "inv", "ddpm", "ambient"], default="adv",
        help="Eq. 6 with adversarial or random delta, Eq. 14, Eq. 3, or Table 5's noise-aware baseline (default adv)")
    add("--lam", type=float, default=0.3, help="lambda, the strength of the regulariser (default 0.3)")
    add("--lam-units", choices=["x", "eps"], default="x", help="lambda_t = lambda sqrt(3) / (beta R): R in units of x_t "
        "(default) or of eps")
    add("--omega", type=float, default=2.0, help="Eq. 7's exponent (default 2)")
    add("--gamma", type=float, default=8 / 255, help="Eq. 7's bias (default 8/255)")
    add("--reg-share", type=float, default=1.0, help="share of the batch on which the regulariser is computed, 1, 1/2, 1/3 "
        "...: a step costs (3 + 5 share) / 3 of DDPM's (default 1, the paper's; below it, and without --balance, its t are "
        "drawn where lambda_t is large, and reweighted)")
    add("--balance", action="store_true", help="divide adv's, ran's or inv's loss at t by 1 + lambda_t: the same minimiser, "
        "and high noise levels are learnt much sooner (default: the paper's sum)")
    add("--flags", choices=["oracle", "conf1", "conf2"], default="oracle", help="what ambient is told of each image's noise: "
        "the truth, a flag that is wrong with probability p, or that all are noisy (default oracle)")
    add("--sigma-known", type=float, help="the deviation that ambient is told (default --sigma, or 0.1 where that is 0)")
    group = parser.add_argument_group("the data (prepared by data.py)")
    add = group.add_argument
    add("--data", default="shapes", help="name of a data set (default shapes)")
    add("--size", type=int, help="image size (default: the data set's usual one)")
    add("--data-dir", type=Path, default=Path("data"), help="where data.py put it (default data/)")
    add("--p", type=float, default=0.0, help="share of the images that is corrupted (default 0; the paper: 0.9)")
    add("--sigma", type=float, default=0.0, help="deviation of their noise, in [-1, 1] units (the paper: 0.1, 0.2)")
    add("--data-seed", type=int, default=0, help="seed of the corruption (default 0)")
    group = parser.add_argument_group("the network and the process (defaults: the data set's, see PRESETS in unet.py)")
    add = group.add_argument
    integers = lambda text: tuple(int(part) for part in text.split(","))
    add("--preset", choices=list(PRESETS), help="another data set's network, or `small`")
    add("--channels", type=int, help="width of the first level")
    add("--res-blocks", type=int, help="residual blocks a level")
    add("--mult", type=integers, help="width of each level in units of --channels, e.g. 1,2,2,2")
    add("--attn", type=integers, help="resolutions with attention, e.g. 16,8")
    add("--heads", type=int, help="attention heads")
    add("--dropout", type=float, help="dropout in the residual blocks")
    add("--learn-sigma", action="store_true", default=None, help="learn the variance too (Nichol & Dhariwal's L_hybrid)")
    add("--timesteps", type=int, help="T (default 1000)")
    add("--schedule", choices=["linear", "cosine"], help="noise schedule (default linear)")
    args = parser.parse_args()

    args.preset = args.preset or (args.data if args.data in PRESETS else "small")
    for name, value in DEFAULTS["small" if args.preset == "small" else "paper"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / f"{args.data}-{args.method}"
    for name in ("steps", "batch", "microbatch", "save_every", "lr", "lam", "gamma", "reg_share", "sigma_known", "channels",
                 "res_blocks", "heads"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be positive")
    for name, low, high in [("p", 0, 1), ("sigma", 0, math.inf), ("ema", 0, 1), ("dropout", 0, 1), ("omega", 1, math.inf),
                            ("sample_every", 0, math.inf)]:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    args.balance = args.balance and args.method not in ("ddpm", "ambient")      # their loss has one term
    if args.method != "ambient":
        args.flags = args.sigma_known = None
    elif args.sigma_known is None:
        args.sigma_known = args.sigma or 0.1
    every, world = round(1 / args.reg_share), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world:
        raise UserError(f"--batch {args.batch}: is not a multiple of the {world} processes")
    if every < 1 or abs(every * args.reg_share - 1) > 1e-2 or args.batch % (world * every):
        raise UserError(f"--reg-share {args.reg_share}: must be 1, 1/2, 1/3 ..., and whole images of each of the {world} "
                        f"process(es)' share of --batch {args.batch}")
    args.reg_share = 1 / every
    return args


def configuration(args, images, init):
    """The run as plain values in four groups: what a checkpoint says of itself."""
    chosen = {name: getattr(args, name) for name in ("channels", "res_blocks", "mult", "attn", "heads", "dropout",
                                                     "learn_sigma") if getattr(args, name) is not None}
    network = dict(size=images.size, in_channels=images.shape[0], learn_sigma=False, scale_shift=True) | PRESETS[args.preset]
    process = dict(schedule=args.schedule or "linear", timesteps=args.timesteps or 1000)
    network |= chosen
    if init is not None:                                    # the file decides; flags may only agree with it
        if "config" in init:
            network, process = init["config"]["network"], init["config"]["process"]
        else:
            network |= network_of(init, images.size, network["heads"])
        asked = chosen | {name: getattr(args, name) for name in ("schedule", "timesteps") if getattr(args, name) is not None}
        asked["size"] = images.size
        for name, value in asked.items():
            if name != "dropout" and (network | process)[name] != value:
                raise UserError(f"--init {args.init}: its {name} is {(network | process)[name]}, not {value}")
        network["dropout"] = chosen.get("dropout", network["dropout"])
    if args.method == "ambient" and network["learn_sigma"]:
        raise UserError("--method ambient: the baseline learns no variance; leave out --learn-sigma, or take another --init")
    data = dict(name=args.data, size=images.size, count=len(images), p=args.p, sigma=args.sigma, data_seed=args.data_seed,
                low=float(images.low), high=float(images.high), float_data=images.array.dtype != np.uint8)
    training = {name: getattr(args, name) for name in (
        "method", "lam", "lam_units", "omega", "gamma", "reg_share", "balance", "flags", "sigma_known", "batch", "lr", "ema",
        "amp", "seed")} | dict(init=args.init and str(args.init))
    return dict(network=network, process=process, data=data, training=training)


def check_same(out, there, now):
    """Refuses to go on with a run that another command began, naming every setting that differs."""
    differing = [f"{name} was {there[group].get(name)} and is now {value}" for group in now
                 for name, value in now[group].items() if there[group].get(name) != value]
    if differing:
        raise UserError(f"--out {out} holds another run: {'; '.join(differing)}. Give the same settings, or another --out")


def check_processes_agree(config, process):
    """Refuses to train where the processes were given different commands, as machines of one job can be."""
    if process.world > 1:
        mine = zlib.crc32(json.dumps(config, sort_keys=True).encode())
        all_of_them = [torch.zeros((), dtype=torch.int64) for _ in range(process.world)]
        dist.all_gather(all_of_them, torch.tensor(mine))
        if len(set(map(int, all_of_them))) > 1:
            raise UserError("the processes were given different settings or data: the same command is needed on every machine")


def open_log(path, step):
    """log.jsonl, ready for appending, without the lines that a killed run wrote after its last checkpoint."""
    kept = []
    if step and path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
    return open(path, "a", buffering=1)


def peak_memory(device):
    """Peak memory of this process in GiB: the GPU's, or the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def main():
    """Trains until args.steps, resuming where a checkpoint is."""
    args = arguments()
    images = Images(args.data, args.size, args.data_dir, args.p, args.sigma, args.data_seed)
    if args.batch > len(images):
        raise UserError(f"--batch {args.batch}: {args.data} has only {len(images)} images")
    init = load_checkpoint(args.init) if args.init else None
    config = configuration(args, images, init)
    saved = load_checkpoint(args.out) if (args.out / "checkpoint.pt").exists() else None
    if saved is not None:
        check_same(args.out, saved["config"], config)
        if saved["step"] >= args.steps:
            print(f"{args.out}/checkpoint.pt is at step {saved['step']} already: nothing to do (--steps {args.steps})")
            return
    process = start_processes()
    torch.set_float32_matmul_precision("high")              # TF32 where there is a GPU
    check_processes_agree(config, process)
    trainer = Trainer(config, args.microbatch, args.compile, process)
    if saved or init:
        trainer.load(saved or init, resume=saved is not None)
    del saved, init
    first = process.rank == 0
    log = None

    def say(text):
        if first:
            print(text, flush=True)

    def record(**values):
        if first:
            log.write(json.dumps(values) + "\n")

    assumed = assumed_noise(images, args.flags, args.sigma_known) if args.method == "ambient" else None

    def read(step):
        """This process's images of a step, and what `ambient` is told of them, on their way to the device."""
        index = batch_indices(args.seed, step, args.batch, len(images))[trainer.rows.start:trainer.rows.stop]
        batch = [torch.from_numpy(images.read(index))] + ([] if assumed is None else [torch.from_numpy(assumed[index])])
        return [part.pin_memory() if process.device.type == "cuda" else part for part in batch]

    def save():
        if first:
            save_checkpoint(args.out / "checkpoint.pt", trainer.state())

    reader = ThreadPoolExecutor(1)                          # reads the next batch while the network works
    upcoming = reader.submit(read, trainer.step)
    # On a CPU, where a large network takes minutes a batch, some 16 images of 32x32; the whole batch of small ones.
    count = trainer.microbatch if process.device.type == "cuda" else max(8, round(1 / args.reg_share), 16 * 32**2 // images.size**2)
    few = upcoming.result()[0][:count - count % round(1 / args.reg_share) or count]
    plain = trainer.cost(few.to(process.device), "ddpm")
    seconds = plain if args.method in ("ddpm", "ambient") else trainer.cost(few.to(process.device), args.method)
    price = f"x{seconds / plain:.2f} a plain DDPM step" + (" (the paper says x2.5)" if args.method == "adv" else "")
    estimate = seconds * len(trainer.rows) * (args.steps - trainer.step) / 60
    some = images.read(np.arange(min(len(images), 1000, 1 + 1000 * 32**2 // images.size**2)))    # LSUN's 1000 fill gigabytes
    method = f", lambda {args.lam} ({args.lam_units} units), omega {args.omega}, gamma {args.gamma:.4f}, on {args.reg_share:g} of the batch"
    if args.method == "ambient":
        method = f", sigma {args.sigma_known} known, {100 * (assumed > 0).mean():.1f} % of the images taken for noisy ({args.flags})"
    say(f"data      {args.data} {images.size}x{images.size}, {len(images)} images, {100 * args.p:g} % of them with noise of "
        f"sigma {args.sigma} (data seed {args.data_seed}); noise estimate {noise_estimate(some).mean():.3f}\n"
        f"network   {sum(p.numel() for p in trainer.parameters) / 1e6:.2f} M parameters ({args.preset})"
        f"{f', from {args.init}' if args.init else ''}; {config['process']['schedule']} schedule, T = {len(trainer.schedule)}\n"
        f"method    {args.method}{'' if args.method == 'ddpm' else method}{', balanced' if args.balance else ''}: {price}\n"
        f"training  steps {trainer.step} to {args.steps}, batch {args.batch} on {process.world} {process.device.type} "
        f"process(es), {'bfloat16' if args.amp else 'float32'}: about {estimate:.0f} minutes\n"
        f"output    {args.out}/checkpoint.pt every {args.save_every} steps, log.jsonl, sample grids")
    log = open_log(args.out / "log.jsonl", trainer.step) if first else None
    record(step=trainer.step, event="start", config=config, world=process.world, device=process.device.type,
           torch=torch.__version__, cost=seconds / plain,
           code={name: sha256_of(Path(__file__).with_name(name))[:12] for name in ("train.py", "sample.py", "unet.py", "data.py")})

    stop = []

    def on_signal(number, frame):                           # finish the step and save; a second signal kills
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    log_every = 50 if process.device.type == "cuda" else 1  # reading a loss makes the host wait for the GPU
    sums, counted, began, began_at = {}, 0, time.perf_counter(), trainer.step
    broken = torch.full((), math.inf, device=process.device)    # the first step with a loss that is not finite
    progress = Progress(args.steps - began_at, "steps", "training") if first else None
    while trainer.step < args.steps:
        batch = [part.to(process.device, non_blocking=True) for part in upcoming.result()]
        upcoming = reader.submit(read, trainer.step + 1)
        terms = trainer.advance(*batch)
        step = trainer.step
        sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
        counted += 1
        broken = torch.where(sum(terms.values()).isfinite(), broken, broken.clamp(max=step))
        stopping = torch.tensor(float(bool(stop)))
        if process.world > 1:
            dist.all_reduce(stopping)                       # on the CPU: all leave after the same step
        last = step == args.steps or bool(stopping)
        saving = last or step % args.save_every == 0
        if not (saving or step % log_every == 0):
            continue
        if math.isfinite(float(broken)):
            good = f"the last good checkpoint is {args.out}/checkpoint.pt" if (args.out / "checkpoint.pt").exists() else "none was saved"
            raise UserError(f"the loss of step {int(broken)} is not finite; {good}. Try a lower --lr, or without --amp")
        losses = {name: float(total) / counted for name, total in sums.items()}
        rate = (step - began_at) * args.batch / (time.perf_counter() - began)
        sums, counted = {}, 0
        record(step=step, **losses, images_per_s=round(rate, 2))
        if first:
            progress.update(step - began_at, **losses)
        if saving:
            save()
        if first and (step == args.steps or args.sample_every and step % args.sample_every == 0):
            trainer.grid(args.out / f"samples-{step:08d}.png")
        if stopping:
            say(f"\nstopped by a signal after step {step}: saved {args.out}/checkpoint.pt; the same command goes on")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    if first:
        progress.close()
    say(f"made {args.out}/checkpoint.pt (step {trainer.step}) and {args.out}/samples-{trainer.step:08d}.png: {rate:.1f} images/s, "
        f"peak memory {peak_memory(process.device):.2f} GiB a process, a step costs {price}\n"
        f"next: python sample.py {args.out} --n 64 --out {args.out}/samples.npz")


if __name__ == "__main__":
    command_line(main)
