"""White-box attacks on the sampling trajectory: Algorithms 2 to 4, sign noise as large, and an attack that adds up.

    python attack.py runs/robust --steps-attacked 250 --n 50000 --out fgsm250.npz             # Algorithm 2, the default
    python attack.py runs/robust --attack pgd --steps-attacked 25% --steps 100 --out pgd.npz  # Algorithm 3
    python attack.py runs/robust --attack drift --steps-attacked 100% --where first --out drift.npz
    torchrun --nproc_per_node 8 -- attack.py runs/robust --attack eot --steps-attacked 500 --n 50000 --out eot.npz

Takes the flags of sample.py and makes the images of the same seeds: with --steps-attacked 0 they are sample.py's, bit
for bit. Beside OUT.npz, which fid.py scores, it writes OUT.attack.json: how far the attack moved the images from those
that the same noise gives without it, and how far random signs of the same size do.
"""
import argparse
import json
import math
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

from data import UserError, atomic_write, command_line
from sample import add_arguments, ddim_step, ddpm_step, generate, image_noise, reverse_distribution
from unet import at, load_checkpoint

ATTACK_SEED = 1 << 16   # added to --seed: the attack's own random draws, image by image, apart from the sampler's
STRIDE = 2.5            # step of Algorithms 3 and 4 in units of radius / N. The paper prints 1: N steps are then worth
                        # half the ball's width, what starts on the wrong side stays inside, and PGD ends below FGSM
MARGIN = 1.05           # moving the images less than this many times as far as noise of equal size is no attack


# ------------------------------------------------------------------------------------------------------ the algorithms

def next_state(model, schedule, x, i, sampler, variance, clamp, z=None):
    """One step from x, by ONE evaluation of the network -> x_{t-1}, sigma(t), x0_hat.

    x [B, C, H, W]; i [B] indices into the schedule; z [B, C, H, W] or [e, B, C, H, W]: the noise of Eq. 4, without
    which x_{t-1} is the posterior mean of section A.2. DDIM has no noise. sigma(t) = exp(0.5 log_variance) is the
    deviation of DDPM's reverse step (Algorithm 3) with both samplers: DDIM's own is 0, and so would be the ball.
    """
    out = model(x, schedule.timesteps[i])
    answer = lambda x, t: out                               # what the steps below see as the network
    _, log_variance, x0_hat = reverse_distribution(answer, schedule, x, i, variance, clamp)
    if sampler == "ddim":
        state = ddim_step(answer, schedule, x, i, clamp)
    else:
        state = ddpm_step(answer, schedule, x, i, torch.zeros_like(x) if z is None else z, variance, clamp)
    return state, torch.exp(0.5 * log_variance), x0_hat


def fgsm(slope, start, radius):
    """Algorithm 2: the whole radius along the gradient's sign, taken at the random start. -> delta like start.

    slope(delta) -> gradient of the cost; radius: the paper's sigma(t), a tensor that broadcasts against start.
    """
    return radius * slope(start).sign()


def pgd(slope, start, radius, iters):
    """Algorithms 3 and 4: iters steps along the gradient's sign, each projected to [-radius, radius]. Like `fgsm` else.

    As printed, Algorithm 3 overwrites delta in every step: what is left is one step, of radius / iters.
    """
    delta = start
    for _ in range(iters):
        delta = torch.clamp(delta + STRIDE * radius / iters * slope(delta).sign(), -radius, radius)
    return delta


def attacked_steps(total, count, where, seed=0):
    """Which `count` of the `total` steps are attacked: a set of indices into the schedule, which sampling descends.

    where: `spread` (the middles of count equal parts), `first` (the noisiest), `last`, or `random` (one draw per seed).
    """
    if where == "random":
        return set(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())
    order = {"first": range(total - 1, -1, -1), "last": range(total),
             "spread": [(2 * k + 1) * total // (2 * count) for k in range(count)]}[where]
    return set(order[:count])


# Forward and backward passes of an attacked step besides the step itself, N being --iters. `drift` takes x0_hat of the
# undisturbed trajectory besides, which runs anyway.
NEEDED = {"noise": lambda N: (1, 0), "fgsm": lambda N: (2, 1), "pgd": lambda N: (N + 1, N), "eot": lambda N: (N + 1, N),
          "drift": lambda N: (2, 1)}


# ------------------------------------------------------------------------------------------ along a sampling trajectory

class TrajectoryAttack:
    """What `sample` calls before every step, for the images of one shard: attacks the chosen steps, and measures.

    From the first attacked step on two trajectories of the same noise run beside the attacked one: `clean`, which is
    left alone, and `control`, moved at the same steps by as much, pixel by pixel, with random signs. The last call
    writes the shard's sums to `path`. settings: attack, phi, iters, eot, eps_scale, sampler, seed of the command line.
    """

    def __init__(self, settings, steps, path, model, schedule, indices, variance, clamp):
        self.settings, self.steps, self.path, self.indices = settings, steps, path, indices
        self.model, self.schedule, self.rule = model, schedule, (settings.sampler, variance, clamp)
        self.clean = self.control = self.noise = None
        self.passes, self.sums, self.began = Counter(), Counter(), time.perf_counter()

    def __call__(self, x_t, step):
        """x_t [B, C, H, W] on its way into step `step`, attacked where that is one of the chosen. Steps descend."""
        if self.noise is None:
            shape, device = x_t.shape[1:], x_t.device
            self.noise = image_noise(self.settings.seed, self.indices, shape, device)   # the sampler's, once more
            self.draws = image_noise(self.settings.seed + ATTACK_SEED, self.indices, shape, device)
            next(self.noise)                                                            # x_T
        i = torch.full((len(x_t),), step, device=x_t.device)
        z = next(self.noise) if self.settings.sampler == "ddpm" else None               # the noise of this step
        if step in self.steps and self.clean is None:
            self.clean = self.control = x_t
        if self.clean is not None:
            self.clean, _, clean_x0_hat = self.next_state(self.clean, i, z)
            if step in self.steps:
                x_adv = self.attacked(x_t, i, z, clean_x0_hat)
                self.control = self.control + (x_adv - x_t).abs() * next(self.draws).sign()
                x_t = x_adv
            self.control = self.next_state(self.control, i, z)[0]
        if step == 0:
            self.finish(self.next_state(x_t, i, z)[0])
        return x_t

    def next_state(self, x, i, z):
        """`next_state` for a trajectory of this shard, not counted as a cost of the attack."""
        return next_state(self.model, self.schedule, x, i, *self.rule, z)

    def counted(self, x, t):
        """The network, its passes counted."""
        self.passes["forwards"] += 1
        out = self.model(x, t)
        if out.requires_grad:
            out.register_hook(lambda gradient: self.passes.update(["backwards"]))
        return out

    def attacked(self, x_t, i, z, clean_x0_hat):
        """x_t^adv [B, C, H, W]: x_t, moved by no more than eps_scale sigma(t) in every pixel.

        i [B]; z [B, C, H, W]: the noise of this step; clean_x0_hat [B, C, H, W]: x0_hat of the undisturbed trajectory.
        """
        settings, eot = self.settings, self.settings.attack == "eot"
        look = lambda x, z=None: next_state(self.counted, self.schedule, x, i, *self.rule, z)
        state, sigma, _ = look(x_t, z if eot else None)     # Algorithm 4 keeps the noise of the step, its xi
        radius = settings.eps_scale * sigma
        scale = at(self.schedule.sqrt_alpha_bar, i, x_t) if eot else 1.0    # Algorithm 4: x_t + sqrt(alpha_t) delta
        draw = next(self.draws)
        start = settings.phi * radius * draw                # delta ~ N(0, phi^2 sigma(t)^2)
        costs = []

        def cost(delta):
            """What the attack raises, [B]: how far delta [B, C, H, W] moves the next state (drift: x0_hat), squared."""
            x = x_t + scale * delta
            if settings.attack == "drift":
                distance = look(x)[2] - clean_x0_hat        # from where this image would be by now, not from this step
            elif eot:
                # The draws do not enter the network, so one pass serves them all: its gradient is the mean of theirs.
                zeta = torch.stack([next(self.draws) for _ in range(settings.eot)])         # [e, B, C, H, W]
                distance = look(x, zeta)[0] - state
            else:
                distance = look(x)[0] - state
            return distance.square().flatten(-3).sum(dim=-1).reshape(-1, len(x_t)).mean(dim=0)

        def slope(delta):
            """The cost's gradient with respect to delta, and nothing else; its graph ends here."""
            with torch.enable_grad():
                delta = delta.detach().requires_grad_()
                value = cost(delta)
                gradient, = torch.autograd.grad(value.sum(), delta)
            costs.append(value.detach())
            self.sums["gradients"] += len(value)
            self.add(zero=(gradient == 0).flatten(1).all(dim=1), broken=~gradient.isfinite().flatten(1).all(dim=1))
            return gradient

        if settings.attack == "noise":
            delta = radius * draw.sign()
        elif settings.attack in ("pgd", "eot"):
            delta = pgd(slope, start, radius, settings.iters)
        else:
            delta = fgsm(slope, start, radius)
        x_adv = x_t + scale * delta

        self.sums.update(self.passes, steps=1, attacked=len(x_t))       # what follows is measurement
        if costs:
            self.add(start=costs[0], end=cost(delta))
        self.passes.clear()
        moved = (x_adv - x_t).abs()                         # as the sampler gets it, rounding included
        self.add(size=(moved / radius).square().flatten(1).mean(dim=1).sqrt(),
                 kept=(delta.sign() == draw.sign()).double().flatten(1).mean(dim=1),
                 outside=(moved > scale * radius + 1e-6 * (1 + x_t.abs())).flatten(1).any(dim=1))
        return x_adv

    def add(self, **values):
        """Adds up values [B] where they are: the host does not wait for the device before the last step."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.double().sum()

    def finish(self, x_0):
        """Measures the finished images x_0 [B, C, H, W] against the undisturbed ones, and writes the shard's sums."""
        clean, control = (x_0, x_0) if self.clean is None else (self.clean, self.control)
        self.add(moved=(x_0 - clean).flatten(1).norm(dim=1), control=(control - clean).flatten(1).norm(dim=1))
        self.sums["seconds"] = time.perf_counter() - self.began
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps({name: float(value) for name, value in self.sums.items()}
                                            | {"pixels": x_0[0].numel()}))


# ---------------------------------------------------------------------------------------------------------- the report

def report(folder, out, n, batch, asked):
    """Joins the shards' sums in `folder` into OUT.attack.json, says what they mean, removes the folder. -> its dict.

    asked: attack, steps_attacked and the other settings, which go into the file too. Means are over the images and, but
    for the distances, over the attacked steps; None where nothing was counted.
    """
    sums = Counter()
    for first in range(0, n, batch):
        path = folder / f"{first:06d}.json"
        if not path.exists():
            raise UserError(f"{path} is missing: {out} is whole, but what the attack did to it is not known; delete "
                            f"{folder} and run again")
        shard = json.loads(path.read_text())
        pixels = shard.pop("pixels")
        sums.update(shard)

    def mean(name, count):
        return sums[name] / sums[count] if sums[count] else None

    result = asked | dict(
        n=n, seconds_per_image=sums["seconds"] / n,
        forwards=mean("forwards", "steps"), backwards=mean("backwards", "steps"),
        outside=sums["outside"], size=mean("size", "attacked"), signs_of_start=mean("kept", "attacked"),
        zero_gradients=mean("zero", "gradients"), broken_gradients=mean("broken", "gradients"),
        cost_start=mean("start", "attacked"), cost_end=mean("end", "attacked"),
        l2=sums["moved"] / n, rms=sums["moved"] / n / math.sqrt(pixels),
        l2_noise=sums["control"] / n, rms_noise=sums["control"] / n / math.sqrt(pixels))
    file = out.with_suffix(".attack.json")
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    shutil.rmtree(folder)
    print("\n".join(sentences(SimpleNamespace(**result))))
    print(f"made {file}; next, how far the images are from the data: python fid.py {out} --ref DATA")
    return result


def sentences(r):
    """The lines in which `report` says what its numbers r mean."""
    yield (f"attack     {r.attack} on {r.steps_attacked} of {r.steps} {r.sampler} steps ({r.where}), "
           f"{r.seconds_per_image:.3g} s an image, measurements included")
    if not r.steps_attacked:
        return
    forwards, backwards = NEEDED[r.attack](r.iters)
    yield (f"cost       {r.forwards:g} forwards and {r.backwards:g} backwards an attacked step besides the step itself "
           f"(the algorithm needs {forwards} and {backwards})")
    yield f"ball       {r.outside:g} perturbations outside {r.eps_scale:g} sigma(t); rms size {r.size:.3f} of it"
    if r.attack != "noise":
        trust = "" if r.zero_gradients + r.broken_gradients < 0.01 else ": DO NOT TRUST THIS ATTACK"
        yield f"gradient   {r.zero_gradients:.2%} zero everywhere, {r.broken_gradients:.2%} not finite{trust}"
        climbs = "" if r.cost_end > r.cost_start else ": IT DOES NOT CLIMB"
        yield (f"objective  {r.cost_start:.4g} at the random start, {r.cost_end:.4g} at the end{climbs}; "
               f"{r.signs_of_start:.1%} of the signs are the start's")
    yield f"moved      rms {r.rms:.4f} a pixel, L2 {r.l2:.3f} an image, from the undisturbed images of the same noise"
    if r.attack != "noise":
        verdict = "" if r.rms >= MARGIN * r.rms_noise and r.rms > 0 else ": NO MORE THAN NOISE"
        times = r.rms / r.rms_noise if r.rms_noise else 0.0         # both are 0 where every gradient was
        yield (f"noise      of the same sizes, its signs random, moves them by rms {r.rms_noise:.4f}: "
               f"the attack by {times:.2f} times that{verdict}")


# --------------------------------------------------------------------------------------------------- the command line

def attacked_count(text, total):
    """--steps-attacked, a number or a percentage of the `total` sampling steps, as a number; UserError if neither."""
    try:
        count = round(float(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        count = -1
    if not 0 <= count <= total:
        raise UserError(f"--steps-attacked {text}: must be 0 to {total}, the steps sampled, or a percentage like 25%")
    return count


def sampling_steps(args):
    """How many steps `generate` will take: known before it begins."""
    checkpoint = load_checkpoint(args.run)
    timesteps = checkpoint["config"]["process"]["timesteps"] if "config" in checkpoint else args.timesteps
    return args.steps or (timesteps if args.sampler == "ddpm" else min(250, timesteps))


def arguments():
    """The command line, parsed and checked."""
    parser = argparse.ArgumentParser(description="Attack the sampling trajectory of a diffusion model, and measure how "
                                     "far it is pushed off course.", epilog=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add = parser.add_argument_group("the attack (section 3.4, appendices A.2 to A.4)").add_argument
    add("--attack", choices=list(NEEDED), default="fgsm", help="Algorithm 2, 3 or 4 (fgsm, pgd, eot); random signs "
        "(noise); the one that adds up over the trajectory (drift). Default fgsm")
    add("--steps-attacked", required=True, help="how many of the --steps, or a percentage of them such as 25%%")
    add("--where", choices=["spread", "first", "last", "random"], default="spread", help="which steps: evenly spread "
        "(default), the first ones sampled, which are the noisiest, the last ones, or a random choice")
    add("--phi", type=float, default=1.0, help="deviation of the random start in units of sigma(t) (default 1)")
    add("--iters", type=int, default=20, help="N of Algorithms 3 and 4 (default 20)")
    add("--eot", type=int, default=5, help="e of Algorithm 4: noise draws an iteration (default 5)")
    add("--eps-scale", type=float, default=1.0, help="radius of the ball in units of sigma(t) (default 1, the paper's)")
    args = parser.parse_args()
    for name in ("phi", "iters", "eot", "eps_scale"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be positive")
    if args.attack == "eot" and args.sampler == "ddim":
        raise UserError("--attack eot --sampler ddim: DDIM draws no noise to average over; take --attack pgd")
    return args


def main():
    """Samples under attack as the command line says."""
    args = arguments()
    steps = sampling_steps(args)
    count = attacked_count(args.steps_attacked, steps)
    chosen = attacked_steps(steps, count, args.where, args.seed)
    folder = Path(f"{args.out}.attack")                     # shard by shard, beside sample.py's own

    def attacker(model, schedule, indices, variance, clamp):
        path = folder / f"{indices[0]:06d}.json"
        return TrajectoryAttack(args, chosen, path, model, schedule, indices, variance, clamp)

    asked = dict(attack=args.attack, steps_attacked=count, where=args.where, phi=args.phi, iters=args.iters,
                 eot=args.eot, eps_scale=args.eps_scale)
    generate(args, attacker, asked)
    if os.environ.get("RANK", "0") == "0":                  # it has waited for the shards of all processes
        report(folder, args.out, args.n, args.batch, asked | dict(steps=steps, sampler=args.sampler, seed=args.seed))


if __name__ == "__main__":
    command_line(main)
