"""White-box attacks on the sampling trajectory: Algorithms 2 to 4, and two that look beyond one step.

    python attack.py runs/cifar10-adv --steps-attacked 250 --out fgsm.npz                        # Algorithm 2
    python attack.py runs/cifar10-adv --attack pgd --steps-attacked 25% --out pgd.npz            # Algorithm 3
    python attack.py runs/cifar10-adv --attack eot --as-printed --steps-attacked 25% --out e.npz # Algorithm 4
    python attack.py runs/cifar10-adv --attack drift --steps-attacked 100% --out drift.npz
    python attack.py runs/cifar10-adv --sampler heun --attack trajectory --steps-attacked 1 --where first \\
        --eps-scale 0.1 --out x_T.npz             # x_T alone, by the gradient through all 35 evaluations
    torchrun --nproc_per_node 8 attack.py RUN --steps-attacked 500 --num-samples 50000 --out fgsm500.npz

Takes the flags of sample.py and makes the images of the same seeds: with --steps-attacked 0 they are
sample.py's, bit for bit. Beside OUT.npz, which fid.py scores, it writes OUT.npz.attack.json: how far the
attack moved the images from those that the same noise gives without it, and how far random signs of the same
size do. sigma(t), the size of a perturbation, is that of a DDPM step between the timesteps visited: the fewer
--steps, the larger.
"""

import common                                               # first: it answers Ctrl-C while others load

import functools
import math
import time
from collections import Counter
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

from common import (UserError, check_out, check_ranges, command_line, generator, image_noise, parser_of,
                    write_json)
from sample import add_arguments, generate, idle_in_sampling, open_job, reverse_step, say_idle
from unet import at

ITERATED = "pgd", "eot", "trajectory"                       # the attacks of N steps each
MARGIN = 1.05         # moving the images less than this many times as far as noise of equal size is no attack


# --------------------------------------------------------------------------------------------- the algorithms
#
# One attacked step each. step(x, z=None) -> sample.Reverse is the reverse step from x at this t, z its noise;
# normal() draws a standard normal tensor like x_t; gradient(L, x) is that of L(x) [B] with respect to the
# state x = x_t + delta, where the undisturbed state is held constant. scale is beyond the paper: the radius
# in units of sigma(t), 1 there. -> x_t^adv, like x_t [B, C, H, W].

def fgsm(step, x_t, normal, gradient, phi=1.0, scale=1.0):
    """Algorithm 2: the whole radius along the gradient's sign, taken at a random start beside x_t."""
    here = step(x_t)                                                    # mu(x_t, x0_hat) and sigma(t)
    radius = scale * here.sigma

    def L(x):
        return squared(here.mean - step(x).mean)

    x = x_t + phi * radius * normal()                                   # x'_t = x_t + delta
    return x_t + radius * gradient(L, x).sign()                         # x_t^adv


def pgd(step, x_t, normal, gradient, phi=1.0, scale=1.0, N=20, stride=2.5, as_printed=False):
    """Algorithm 3: N steps along the gradient's sign, inside the ball. as_printed: delta is not moved but
    overwritten, by radius / N, and projected at the end alone."""
    here = step(x_t)
    radius = scale * here.sigma

    def L(x):
        return squared(here.mean - step(x).mean)

    delta = phi * radius * normal()                                     # delta_0
    for _ in range(N):
        sign = gradient(L, x_t + delta).sign()
        if as_printed:
            delta = radius / N * sign
        else:
            delta = torch.clamp(delta + stride * radius / N * sign, -radius, radius)
    return x_t + torch.clamp(delta, -radius, radius)


def eot(step, x_t, normal, gradient, xi, sqrt_alpha_bar, phi=1.0, scale=1.0, N=20, e=5, stride=2.5,
        as_printed=False):
    """Algorithm 4: PGD against the mean over e draws of the step's noise; xi is the noise that the step will
    take.

    as_printed: steps of radius / N, and sqrt(alpha_bar) before delta, which makes the attack vanish in noisy
    states. The cost is |x_{t-1} - x_{t-1}^adv|^2 in both: the printed one, of x_t, does not depend on the
    network.
    """
    here = step(x_t, xi)
    radius = scale * here.sigma
    factor, stride = (sqrt_alpha_bar, 1.0) if as_printed else (1.0, stride)

    def L(x):
        # The draws do not enter the network, so one pass serves them all: its gradient is the mean of theirs.
        zeta = torch.stack([normal() for _ in range(e)])                # [e, B, C, H, W]
        return squared(here.x - step(x, zeta).x).mean(dim=0)

    delta = phi * radius * normal()                                     # delta_0
    for _ in range(N):
        sign = gradient(L, x_t + factor * delta).sign()
        delta = torch.clamp(delta + stride * radius / N * sign, -radius, radius)
    return x_t + factor * delta


def drift(step, x_t, normal, gradient, x0_hat_clean, phi=1.0, scale=1.0):
    """Beyond the paper: FGSM, away from where the undisturbed trajectory would be by now, so that steps add
    up."""
    radius = scale * step(x_t).sigma

    def L(x):
        return squared(x0_hat_clean - step(x).x0_hat)

    x = x_t + phi * radius * normal()
    return x_t + radius * gradient(L, x).sign()


def trajectory(step, x_t, normal, gradient, rest, x_0_clean, phi=1.0, scale=1.0, N=20, stride=2.5):
    """Beyond the paper: PGD through rest(x) -> x_0, the rest of the reverse process, away from the image in
    which the undisturbed trajectory ends. From x_T on, that is the whole sampler."""
    radius = scale * step(x_t).sigma

    def L(x):
        return squared(x_0_clean - rest(x))

    delta = phi * radius * normal()                                     # delta_0
    for _ in range(N):
        sign = gradient(L, x_t + delta).sign()
        delta = torch.clamp(delta + stride * radius / N * sign, -radius, radius)
    return x_t + delta


def random_signs(step, x_t, normal, gradient, scale=1.0):
    """The control: as large as FGSM's perturbation, its signs random."""
    return x_t + scale * step(x_t).sigma * normal().sign()


def squared(difference):
    """|difference|^2 of every image: [..., B, C, H, W] -> [..., B]."""
    return difference.square().flatten(-3).sum(dim=-1)


def gradient_of(L, x):
    """The gradient of L(x) [B] with respect to x [B, C, H, W], image by image, and nothing else. -> gradient,
    L(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = L(x)
        gradient, = torch.autograd.grad(value.sum(), x)
    return gradient, value.detach()


def reverse_process(model, schedule, x_t, i, noise, how):
    """x_0 [B, C, H, W] by the steps i, i - 1 ... 0 from x_t; noise: the z of every step, by its index. Of a
    gradient's graph one step is in memory at a time, and the states between them: each step runs again in the
    backward pass."""
    def following(x, k):
        return reverse_step(model, schedule, x, k, noise[k], **how).x

    for k in range(i, -1, -1):
        x_t = checkpoint(following, x_t, k, use_reentrant=False, preserve_rng_state=False)
    return x_t


def attacked_steps(total, count, where, seed=0):
    """Which `count` of the `total` steps are attacked: a set of indices into the schedule, which sampling
    descends.

    where: `spread` (the middles of count equal parts), `first` (the noisiest), `last`, or `random` (one draw
    per seed).
    """
    if where == "random":
        return set(torch.randperm(total, generator=generator("attacked steps", seed))[:count].tolist())
    order = {"first": range(total - 1, -1, -1), "last": range(total),
             "spread": [(2 * k + 1) * total // (2 * count) for k in range(count)]}[where]
    return set(order[:count])


# -------------------------------------------------------------------------------- along a sampling trajectory

class TrajectoryAttack:
    """What `sample` calls before every step, for the images of one shard: attacks the chosen steps, and
    measures.

    From the first attacked step on two trajectories of the same noise run beside the attacked one: `clean`,
    which is left alone, and `control`, moved at the same steps by as much, pixel by pixel, with random signs.
    asked: name, phi, iters, eot, stride, as_printed, eps_scale of the command line; steps: those that are
    attacked.
    """

    def __init__(self, asked, steps, model, schedule, how, indices, seed):
        self.asked, self.steps, self.model, self.schedule, self.how = asked, steps, model, schedule, how
        self.indices, self.seed, self.draws = indices, seed, None
        self.clean = self.control = None
        self.sums, self.began = Counter(), time.perf_counter()

    def __call__(self, x_t, i, z):
        """x_t [B, C, H, W] on its way into step i, attacked where that is one of the chosen. Steps
        descend."""
        if self.clean is None and i in self.steps:
            self.draws = image_noise("attack", self.seed, self.indices, x_t.shape[1:], x_t.device)
            self.clean = self.control = x_t
            if self.asked["name"] == "trajectory":
                self.z = self.noise_of_steps(x_t)
                self.x_0_clean = reverse_process(self.model, self.schedule, x_t, i, self.z, self.how)
        if self.clean is None:
            return x_t
        following = functools.partial(reverse_step, self.model, self.schedule, i=i, **self.how)
        clean = following(self.clean, z=z)
        if i in self.steps:
            x_adv = self.attacked(x_t, i, z, clean.x0_hat)
            self.control = self.control + (x_adv - x_t).abs() * next(self.draws).sign()
            x_t = x_adv
        self.clean, self.control = clean.x, following(self.control, z=z).x
        return x_t

    def noise_of_steps(self, x_t):
        """The z [B, C, H, W] of every step by its index, as `sample` will draw them; None but for ddpm."""
        if self.how["sampler"] != "ddpm":
            return [None] * len(self.schedule)
        noise = image_noise("sample", self.seed, self.indices, x_t.shape[1:], x_t.device)
        next(noise)                                                     # x_T
        return [next(noise).to(x_t) for _ in range(len(self.schedule))][::-1]

    def attacked(self, x_t, i, z, x0_hat_clean):
        """x_t^adv [B, C, H, W] by the algorithm asked for; its passes and its gradients are summed."""
        asked, one = self.asked, Watched(self.model, self.schedule, i, self.how)
        ball = dict(phi=asked["phi"], scale=asked["eps_scale"])
        iterated = ball | {"N": asked["iters"], "stride": asked["stride"]}
        arguments = one.step, x_t, lambda: next(self.draws), one.gradient
        if asked["name"] == "fgsm":
            x_adv = fgsm(*arguments, **ball)
        elif asked["name"] == "pgd":
            x_adv = pgd(*arguments, **iterated, as_printed=asked["as_printed"])
        elif asked["name"] == "eot":
            sqrt_alpha_bar = at(self.schedule.sqrt_alpha_bar, i, x_t)
            x_adv = eot(*arguments, z, sqrt_alpha_bar, e=asked["eot"], **iterated,
                        as_printed=asked["as_printed"])
        elif asked["name"] == "drift":
            x_adv = drift(*arguments, x0_hat_clean, **ball)
        elif asked["name"] == "trajectory":
            def rest(x):
                return reverse_process(one.network, self.schedule, x, i, self.z, self.how)
            x_adv = trajectory(*arguments, rest, self.x_0_clean, **iterated)
        else:
            x_adv = random_signs(*arguments, scale=asked["eps_scale"])
        self.sums.update(steps=1, attacked=len(x_t), forwards=one.forwards, backwards=one.backwards)
        self.measure(one, x_t, x_adv)
        return x_adv

    def measure(self, one, x_t, x_adv):
        """Adds up how large the perturbation is, whether it left the ball, and how far it climbed."""
        moved = (x_adv - x_t).abs()                         # as the sampler gets it, rounding included
        radius = (self.asked["eps_scale"] * one.sigma).expand_as(x_t)
        self.add(radius=radius.flatten(1).mean(dim=1),
                 size=(moved / radius).square().flatten(1).mean(dim=1).sqrt(),
                 outside=(moved > radius + 1e-6 * (1 + x_t.abs())).flatten(1).any(dim=1))
        if one.gradients:
            self.sums["gradients"] += one.gradients * len(x_t)
            self.add(zero=one.zero, broken=one.broken, start=one.start, end=one.cost(x_adv),
                     kept=((x_adv - x_t).sign() == (one.x - x_t).sign()).double().flatten(1).mean(dim=1))

    def add(self, **values):
        """Adds up values [B] where they are: the host does not wait for the device before the last step."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.double().sum()

    def measures(self, x_0):
        """The sums as plain numbers, once the attacked images x_0 [B, H, W, C], a NumPy array, are
        finished."""
        x_0 = torch.from_numpy(x_0)
        ends = self.clean, self.control
        clean, control = (x_0 if x is None else x.permute(0, 2, 3, 1).cpu() for x in ends)
        self.add(moved=(x_0 - clean).flatten(1).norm(dim=1), control=(control - clean).flatten(1).norm(dim=1))
        self.sums.update(seconds=time.perf_counter() - self.began)
        return {name: float(value) for name, value in self.sums.items()} | {"pixels": x_0[0].numel()}


class Watched:
    """One attacked step: the `step` and the `gradient` that an algorithm takes, watched while it takes them.

    forwards, backwards: passes through the network. sigma: of the state x_t itself, where every algorithm
    looks first. Of the gradients: their number, the first one's x and cost `start` [B], the function `cost`,
    and how many of an image's were zero or broken [B].
    """

    def __init__(self, model, schedule, i, how):
        self.model, self.schedule, self.i, self.how, self.sigma = model, schedule, i, how, None
        self.forwards = self.backwards = self.gradients = self.zero = self.broken = 0

    def step(self, x, z=None):
        """The reverse step from x [B, C, H, W] with the noise z -> sample.Reverse."""
        state = reverse_step(self.network, self.schedule, x, self.i, z, **self.how)
        if self.sigma is None:
            self.sigma = state.sigma
        return state

    def network(self, x, t):
        """The network, its passes counted."""
        self.forwards += 1
        out = self.model(x, t)
        if out.requires_grad:
            out.register_hook(self.count_backward)
        return out

    def count_backward(self, gradient):
        """Called when a gradient passes into the network."""
        self.backwards += 1

    def gradient(self, L, x):
        """`gradient_of`, seen."""
        gradient, value = gradient_of(L, x)
        if not self.gradients:
            self.x, self.start, self.cost = x, value, L
        self.gradients += 1
        self.zero = self.zero + (gradient == 0).flatten(1).all(dim=1)
        self.broken = self.broken + ~gradient.isfinite().flatten(1).all(dim=1)
        return gradient


# ------------------------------------------------------------------------------------------------- the report

def needed(protocol):
    """The forward and backward passes of an attacked step besides the step itself, as the algorithms have
    them. `drift` and `trajectory` take x0_hat and x_0 of the undisturbed trajectory besides, which runs
    anyway. Heun's step, but for the last, has two evaluations, of which x0_hat is the first's alone."""
    asked, sampler = protocol["attack"], protocol["sampler"]
    if asked["name"] == "trajectory":                       # each step ahead forwards, again, and backwards
        heun = sampler == "heun"
        chosen = attacked_steps(protocol["steps"], asked["steps_attacked"], asked["where"], protocol["seed"])
        ahead = sum(2 * i + 1 if heun else i + 1 for i in chosen) / len(chosen)
        return 1 + heun + 2 * asked["iters"] * ahead, asked["iters"] * ahead
    if asked["name"] in ("pgd", "eot"):
        forwards, backwards = asked["iters"] + 1, asked["iters"]
    else:
        forwards, backwards = {"noise": (1, 0), "fgsm": (2, 1), "drift": (2, 1)}[asked["name"]]
    if sampler == "heun":
        return 2 * forwards, backwards if asked["name"] == "drift" else 2 * backwards
    return forwards, backwards


def summary(measures, protocol):
    """The measures of all shards as one dict: means over the images and, but for the distances, over the
    attacked steps; None where nothing was counted, or it is not finite. L2 of an image, rms of a pixel."""
    sums, n = Counter(), protocol["num_samples"]
    for shard in measures:
        sums.update(shard)
    pixels = sums["pixels"] / len(measures)

    def mean(name, count):
        measured = name in sums and sums[count] and math.isfinite(sums[name])
        return sums[name] / sums[count] if measured else None

    return dict(
        n=n, seconds_per_image=sums["seconds"] / n, forwards=mean("forwards", "steps"),
        backwards=mean("backwards", "steps"), outside=sums["outside"], radius=mean("radius", "attacked"),
        size=mean("size", "attacked"),
        signs_of_start=mean("kept", "attacked"), zero_gradients=mean("zero", "gradients"),
        broken_gradients=mean("broken", "gradients"), cost_start=mean("start", "attacked"),
        cost_end=mean("end", "attacked"), l2=sums["moved"] / n, rms=sums["moved"] / n / math.sqrt(pixels),
        l2_noise=sums["control"] / n, rms_noise=sums["control"] / n / math.sqrt(pixels))


def sentences(result, protocol):
    """The lines that say what the numbers of `summary` mean."""
    r, asked = SimpleNamespace(**result), protocol["attack"]
    name, count = asked["name"] + (" as printed" if asked["as_printed"] else ""), asked["steps_attacked"]
    yield (f"attack     {name} on {count} of {protocol['steps']} {protocol['sampler']} steps "
           f"({asked['where']}), {r.seconds_per_image:.3g} s an image, measurements included")
    if not count:
        return
    yield ("cost       {:g} forwards and {:g} backwards an attacked step besides the step itself (the "
           "algorithm needs {:g} and {:g})".format(r.forwards, r.backwards, *needed(protocol)))
    yield (f"ball       {r.outside:g} perturbations outside {asked['eps_scale']:g} sigma(t), on average "
           f"{r.radius:.3g} in units of x_t; rms size {r.size:.3f} of it")
    if asked["name"] != "noise":
        trust = "" if r.zero_gradients + r.broken_gradients < 0.01 else ": DO NOT TRUST THIS ATTACK"
        yield f"gradient   {r.zero_gradients:.2%} zero everywhere, {r.broken_gradients:.2%} not finite{trust}"
        costs = "not finite: DO NOT TRUST THIS ATTACK"
        if r.cost_start is not None and r.cost_end is not None:
            climbs = "" if r.cost_end > r.cost_start else ": IT DOES NOT CLIMB"
            costs = f"{r.cost_start:.4g} at the random start, {r.cost_end:.4g} at the end{climbs}"
        yield f"objective  {costs}; {r.signs_of_start:.1%} of the signs are the start's"
    yield (f"moved      rms {r.rms:.4f} a pixel, L2 {r.l2:.3f} an image, from the undisturbed images of the "
           "same noise")
    if asked["name"] != "noise":
        verdict = "" if r.rms >= MARGIN * r.rms_noise and r.rms > 0 else ": NO MORE THAN NOISE"
        times = r.rms / r.rms_noise if r.rms_noise else 0.0         # both are 0 where every gradient was
        yield (f"noise      of the same sizes, its signs random, moves them by rms {r.rms_noise:.4f}: "
               f"the attack by {times:.2f} times that{verdict}")


# ------------------------------------------------------------------------------------------- the command line

def attacked_count(text, total):
    """--steps-attacked, a number or a percentage of the `total` sampling steps, as a number; UserError if
    neither."""
    try:
        asked = float(text[:-1]) * total / 100 if text.endswith("%") else int(text)
    except ValueError:
        asked = -1
    if not 0 <= asked <= total:
        raise UserError(f"--steps-attacked {text}: must be 0 to {total}, the steps sampled, or a percentage "
                        "like 25%")
    count = math.floor(asked + 0.5)
    if asked and not count:
        raise UserError(f"--steps-attacked {text}: is less than half a step of the {total} sampled; at least "
                        f"{math.ceil(500000 / total) / 10000:g}% is needed")
    return count


def arguments(argv=None):
    """The command line, parsed and checked."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    add = parser.add_argument_group("the attack (section 3.4, appendices A.2 to A.4)").add_argument
    add("--attack", choices=["fgsm", "pgd", "eot", "drift", "trajectory", "noise"], default="fgsm",
        help="Algorithm 2, 3 or 4 (fgsm, the default, pgd, eot); one that adds up along the way (drift); PGD "
        "on the final image, through all the steps that are left, each twice an iteration (trajectory); "
        "random signs (noise)")
    add("--steps-attacked", required=True, help="how many of the --steps, or a percentage such as 25%%")
    add("--where", choices=["spread", "first", "last", "random"], default="spread", help="which steps: "
        "evenly spread (default), the first, which are the noisiest, the last, or a random choice")
    add("--phi", type=float, default=1.0, help="deviation of the random start, in radii of the ball "
        "(default 1)")
    add("--iters", type=int, default=20, help="N of pgd, eot and trajectory (default 20)")
    add("--eot", type=int, default=5, help="e of Algorithm 4: noise draws an iteration (default 5)")
    add("--stride", type=float, help="step of pgd, eot and trajectory in units of the ball's radius / N "
        "(default 2.5, which reaches the ball's surface from anywhere in it; the paper prints 1)")
    add("--as-printed", action="store_true", help="Algorithms 3 and 4 as the boxes print them: steps of "
        "the radius / N, which overwrite delta in 3, and sqrt(alpha_bar) before delta in 4; not 4's cost, "
        "which does not depend on the network")
    add("--eps-scale", type=float, default=1.0, help="radius of the ball, in sigma(t) (default 1: paper)")
    args = parser.parse_args(argv)
    ball = 1e-6, 1000                                       # more would leave float32's range on the way
    check_ranges(args, phi=ball, iters=(1, 10**6), eot=(1, 1000), stride=ball, eps_scale=ball)
    if args.attack == "eot" and args.sampler != "ddpm":
        raise UserError(f"--attack eot --sampler {args.sampler}: it draws no noise to average over; take "
                        "--attack pgd")
    if args.as_printed and args.attack not in ("pgd", "eot"):
        raise UserError(f"--as-printed --attack {args.attack}: only pgd and eot are printed otherwise")
    if args.stride and (args.as_printed or args.attack not in ITERATED):
        raise UserError(f"--stride {args.stride}: is for --attack {', '.join(ITERATED)}, and not with "
                        "--as-printed")
    on, idle = f"on --attack {args.attack}", idle_in_sampling(args)
    if args.attack not in ITERATED:
        idle.append((["iters"], on))
    if args.attack != "eot":
        idle.append((["eot"], on))
    if args.attack == "noise":
        idle.append((["phi"], on))
    say_idle(parser, argv, idle)
    return args


def asked_for(args, count):
    """The attack as the protocol has it: None for what it does not have."""
    iterated = args.attack in ITERATED
    stride = args.stride or 2.5
    return dict(name=args.attack, steps_attacked=count, where=args.where, eps_scale=args.eps_scale,
                phi=args.phi if args.attack != "noise" else None, as_printed=args.as_printed,
                iters=args.iters if iterated else None, eot=args.eot if args.attack == "eot" else None,
                stride=stride if iterated and not args.as_printed else None)


def main(argv=None):
    """Samples under attack as the command line says."""
    args = arguments(argv)
    file = args.out.with_name(f"{args.out.name}.attack.json")
    check_out(file)
    job = open_job(args)
    total = len(job.schedule)
    count = attacked_count(args.steps_attacked, total)
    asked = job.protocol["attack"] = asked_for(args, count)
    chosen = attacked_steps(total, count, args.where, args.seed)

    def attack_on(indices):
        return TrajectoryAttack(asked, chosen, job.model, job.schedule, job.how, indices, args.seed)

    def finish(measures):
        result = summary(measures, job.protocol)
        write_json(file, dict(samples=args.out.name, **result, protocol=job.protocol))
        print("\n".join(sentences(result, job.protocol)))
        print(f"made {file}; next, how far the images are from the data: python fid.py {args.out} --ref DATA")

    generate(job, args.out, attack_on, finish)


if __name__ == "__main__":
    command_line(main)
