"""The closed form: what the method does on Gaussian data; lambda and omega chosen before anything is trained.

    python gaussian.py --data cifar10 --sigma 0.2        # train.py --p 1 --sigma 0.2 would add this noise
    python gaussian.py --data mine --size 64 --noisy --sigma 0.1     # the images have noise of 0.1 already
    python gaussian.py --data mine --size 64 --noisy --leave 0.5     # how much is not known: a range

Prints, for a grid of lambda and omega, how much noise and how much detail the method keeps once its network
is at the optimum of Eq. 6, and advises which to train with; draws the deviation that every direction of the
data keeps.

It takes the images for draws of a Gaussian with their covariance, all of them noisy (p = 1), the network for
the best one that is linear in x_t, directions whose variances are within 10 % for alike (see `optimum`), and
the sampler for Eq. 4 with all of 1000 steps. Images differ: x0 is clamped to [-1, 1]; a network can tell an
edge from noise where a Gaussian has only variances, and clean images among noisy ones (p < 1) from these.
More detail may stay than is said here.
"""

import common                                               # first: it answers Ctrl-C while others load

import functools
import itertools
import math
import time
from pathlib import Path

import numpy as np
from scipy.fft import dctn
from scipy.optimize import brentq
from scipy.special import gammaln, ndtr

from common import (POSITIVE, UserError, check_out, check_ranges, command_line, noise_estimate, parser_of,
                    pyplot, save_figure)
from data import CORRUPTIONS, Images, corrupt
from unet import Schedule

MEAN_1_BETA = math.log(4) / 1.5                             # E[1 / beta], beta ~ U[0.5, 2]
STEP = 1 / math.sqrt(3)                                     # Eq. 8's, in units of the radius r
FACTOR = 3 * ((1 - STEP**3) / 3 + STEP)                     # 3 E[min(u + STEP, 1)^2], u ~ U[0, 1]: 2.540
LAMBDAS, OMEGAS = (0.1, 0.2, 0.3, 0.5, 1.0), (1.0, 2.0, 4.0, 8.0)
SIGMAS = (0.05, 0.1, 0.2)               # where the noise is not known
LARGEST, FLOATS = 3072, 1 << 25         # values of an image for an exact PCA, and values that are read
MAX_T = 100_000                                             # timesteps that a protocol may claim


# ------------------------------------------------------------------------------------------ the best network

def shrinkage(schedule, method="adv", lam=0.3, omega=2.0, gamma=8 / 255, lam_units="x"):
    """c_t [T], float64, where S_t = E[lambda_t delta delta^T] is c_t I: Eq. 6's minimiser is then Eq. 3's for
    data of variance v / (1 + c_t), in every direction.

    `ddpm`, `ambient`: 0. `ran`: always. `adv` and `inv`: where Eq. 8's gradient has the signs of its random
    start, as it has if all directions have the same gain; else `optimum` finds S_t, which is smaller where
    the data are strong. schedule: float64, as `named` makes it. lam, omega, gamma, lam_units: train.py's; its
    --reg-share and --weighting leave the minimiser as it is.
    """
    s = schedule.sqrt_one_minus_alpha_bar.numpy()                                   # [T]
    if method in ("ddpm", "ambient"):
        return np.zeros_like(s)
    # delta = r u, E[u^2] = 1/3; lambda_t = lambda sqrt(3) / (beta s r); s r = s^omega + gamma beta (Eq. 7)
    c = lam * (s**omega * MEAN_1_BETA + gamma) / (math.sqrt(3) * s**2)
    return c * (s if lam_units == "eps" else 1) * (1 if method == "ran" else FACTOR)


def gains(schedule, V, S, method="adv"):
    """A_t of the best network that is linear in x_t, eps_hat = A_t (x_t - sqrt(alpha_bar) mean).

    V [D, D], the covariance of the training data, noise included, and S_t [T, D, D] -> [T, D, D]; or, of
    directions that do not mix, variances V [k] and S_t [T, k] -> [T, k].

    With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar): Eq. 6 is E|A x_t - eps|^2 + E[lambda_t |(s A - I)
    delta|^2], its gradient A (a^2 V + s^2 I) - s I + (s A - I) s S. In Eq. 14 (`inv`) the last term is
    s^2 A S. Over all functions the minimiser of Eq. 6 is not quite linear; its gain is within 1.3 % of this.
    """
    a2, s = (table.numpy().reshape(-1, *[1] * V.ndim)
             for table in (schedule.alpha_bar, schedule.sqrt_one_minus_alpha_bar))
    one = np.eye(len(V)) if V.ndim == 2 else 1.0
    above, below = s * (one + (0 if method == "inv" else S)), a2 * V + s**2 * (one + S)
    return above @ np.linalg.inv(below) if V.ndim == 2 else above / below


def optimum(schedule, V, weights=None, method="adv", **regulariser):
    """`gains` where S_t is what this very network's gradients make of it: the fixed point of Eq. 8 and Eq. 6.

    regulariser: as in `shrinkage`. V [D, D]: for few dimensions, by quadrature over delta_ran. V [k]: of
    directions that are each spread over many pixels; weights [k]: how many directions of this variance there
    are (1). They are taken to stay alike; tiny differences among many would grow from step to step.
    """
    start, c = (shrinkage(schedule, name, **regulariser).reshape(-1, *[1] * V.ndim)
                for name in (method, "ran"))
    S = start * (np.eye(len(V)) if V.ndim == 2 else np.ones(len(V)))
    weights = np.ones(len(V)) if weights is None else weights
    for _ in range(50 if method in ("adv", "inv") else 0):
        A = gains(schedule, V, S, method)
        new = c * (signs_of_many(A, weights) if V.ndim == 1 else signs_of_few(A))
        done, S = (np.abs(new - S) < 2e-3 * (1 + np.abs(S))).all(), new
        if done:
            break
    return gains(schedule, V, S, method)


def signs_of_few(A):
    """3 E[w w^T] of Eq. 8's w = delta_adv / r = clamp(u + STEP sign(A^T A u), -1, 1), u ~ U[-1, 1]^D, by the
    same Sobol points for all A [T, D, D] -> [T, D, D]. J of Eq. 8 is |s A delta|^2."""
    from scipy.stats import qmc         # here: it takes half a second, and fid.py needs none of it
    u = 2 * qmc.Sobol(A.shape[-1], seed=0).random_base2(11) - 1                     # [N, D]
    w = (np.clip(u + STEP * np.sign(u @ A_t.T @ A_t), -1, 1) for A_t in A)          # each [N, D]
    return np.stack([3 * w_t.T @ w_t / len(u) for w_t in w])


def signs_of_many(A, weights):
    """The same for directions with gains A [T, k], each of them spread over many pixels -> [T, k].

    At a pixel (A^T A u)_i = m u_i + o_i, m the mean of the gains squared; o_i, a sum over many other pixels,
    is Gaussian. What is linear in w = p u + q o + rest is w's part along a direction, p + q (gain^2 - m); the
    rest is white. Equal gains: o = 0, and this is FACTOR. A strong direction has a small gain: the signs
    leave it out.
    """
    square = A**2
    mean = (square @ weights / weights.sum())[:, None]
    excess = square / mean - 1                                                      # m = 1
    tau = np.sqrt(excess**2 @ weights / weights.sum() / 3)[:, None] + 1e-6          # the deviation of o
    y = (np.arange(64) + 0.5) / 64
    u, du = y**3, 3 * y**2 / 64                     # of 0 ... 1, dense at 0, where signs turn; w(-u) = -w(u)
    up, down, same = np.minimum(u + STEP, 1), u - STEP, ndtr(u / tau)               # of probability `same`
    w_u = (same * up + (1 - same) * down) @ (u * du)                                # E[w u]
    w_o = np.exp(-0.5 * (u / tau)**2) @ ((up - down) * du) / math.sqrt(2 * math.pi)     # E[w o] / tau
    w_w = (same * up**2 + (1 - same) * down**2) @ du                                # E[w^2]
    p, q, rest = 3 * w_u, w_o / tau[:, 0], w_w - 3 * w_u**2 - w_o**2                # each [T]
    return (p[:, None] + q[:, None] * excess)**2 + 3 * rest[:, None]


def sampled_covariance(schedule, A, steps=None, sampler="ddpm", variance="large"):
    """Covariance of the samples of a linear network without a clamp: A [T, D, D] -> [D, D], or, of directions
    that do not mix, A [T, k] -> variances [k].

    steps, sampler, variance: as in sample.py (default: all steps, Eq. 4, `large`), which starts at N(0, I).
    """
    respaced = schedule.respaced_by_noise if sampler == "heun" else schedule.respaced
    short, matrix = respaced(steps or len(schedule)), A.ndim == 3
    A, one = A[short.t.numpy()], np.eye(A.shape[1]) if matrix else np.ones(A.shape[1])
    table = {name: values.numpy().reshape(-1, *[1] * (A.ndim - 1)) for name, values in vars(short).items()}

    def step(eps_hat):
        x0_hat = (one - table["sqrt_one_minus_alpha_bar"] * eps_hat) / table["sqrt_alpha_bar"]
        if sampler == "ddpm":
            return table["coefficient_x0"] * x0_hat + table["coefficient_xt"] * one                 # Eq. 4
        return table["sqrt_alpha_bar_prev"] * x0_hat + table["sqrt_one_minus_alpha_bar_prev"] * eps_hat

    M, b = step(A), np.zeros(len(short))
    if sampler == "heun":                                   # with the mean of eps_hat here and after the step
        after = np.matmul(A[:-1], M[1:]) if matrix else A[:-1] * M[1:]
        M = step(np.concatenate([A[:1], (A[1:] + after) / 2]))
    elif sampler == "ddpm":
        b = getattr(short, f"log_variance_{variance}").exp().numpy()
        b[0] = 0                                            # no noise in the last step
    C = one                                                 # x_T ~ N(0, I)
    for M_i, b_i in zip(M[::-1], b[::-1]):
        C = (M_i @ C @ M_i.T if matrix else M_i**2 * C) + b_i * one
    return C


# ------------------------------------------------------------------------------- beside what others measure

def frechet(scale, mean, C):
    """The Frechet distance of N(mean [k], C [k, k]) to N(0, scale^2), scale [k]."""
    overlap = np.sqrt(np.linalg.eigvalsh(scale[:, None] * C * scale).clip(0))
    return (mean**2).sum() + np.trace(C) + (scale**2).sum() - 2 * overlap.sum()


def of_samples(scale, mean, C, count):
    """The mean `frechet` of `count` draws of N(mean, C): that of the distributions, and what so few draws
    add. By simulation, the same every time."""
    rng, root = np.random.default_rng(0), np.linalg.cholesky(C + 1e-12 * np.eye(len(C)))
    draws = (mean + rng.standard_normal((count, len(C))) @ root.T for _ in range(max(4, 40_000 // count)))
    return float(np.mean([frechet(scale, x.mean(axis=0), np.cov(x, rowvar=False)) for x in draws]))


def corrupted_moments(truth, corruption, sigma):
    """Mean [D] and covariance [D, D] of subspace images that are all corrupted as `data.corrupt` does it."""
    mean, root = truth["mean"], truth["scale"][:, None] * truth["components"]       # [D], [k, D]
    D, side = len(mean), math.isqrt(len(mean) // 3)
    if corruption == "outliers":
        return np.zeros(D), np.eye(D) / 3
    if corruption == "blur":                                # is linear
        mean, *root = (corrupt(x.reshape(3, side, side), corruption, sigma, None).ravel()
                       for x in (mean, *root))
        return mean, np.array(root).T @ np.array(root)
    same = np.kron(np.ones((3, 3)), np.eye(side * side))    # of impulse: where two values are of one pixel
    second = root.T @ root + np.outer(mean, mean)
    second = (1 - sigma)**2 * second + same * sigma * ((1 - sigma) * second + 1)
    return (1 - sigma) * mean, second - (1 - sigma)**2 * np.outer(mean, mean)


def samples_of_kind(schedule, truth, corruption, sigma, sampling, **regulariser):
    """What a network gives back of subspace images that are all corrupted alike: the samples' mean less the
    truth's [D], their covariance inside the subspace [k, k], their variance outside, summed.

    sampling: steps, sampler and variance. regulariser: as in `shrinkage`, and its method.
    """
    known, D = len(truth["scale"]), len(truth["mean"])
    if corruption == "gaussian":                            # white: the data's own directions stay apart
        V, weights = np.append(truth["scale"]**2, 0.0) + sigma**2, np.append(np.ones(known), D - known)
        C = sampled_covariance(schedule, optimum(schedule, V, weights, **regulariser), *sampling)
        return np.zeros(D), np.diag(C[:-1]), (D - known) * C[-1]
    mean, V = corrupted_moments(truth, corruption, sigma)
    V, directions = np.linalg.eigh(V)                                               # [D], [D, D]
    V = V.clip(1e-8)                                        # blurred images have no variance in most of them
    C = V * deviation_kept(schedule, V, sampling=sampling, **regulariser)**2
    inside = truth["components"] @ directions                                       # [k, D]
    inside = inside * C @ inside.T
    return mean - truth["mean"], inside, C.sum() - np.trace(inside)


def predicted(truth, protocol, count=None):
    """What fid.py should find on the samples of a protocol, by its keys: value, fd_inside, fd_outside,
    rho_mean, psnr, variance_kept; `closed_form` says how: `exact`; of `adv` `fixed point`;
    `rule for 0 < p < 1`; of other corruptions than Gaussian noise `covariance`, which is all that is seen.

    truth: the distribution of the subspace data, as `Images.truth`; count: of the samples, None: so many that
    it adds nothing to the distances. `limit`: value without what it adds. None where there is no closed form:
    other images, methods (`inv` lives on its clamp) or a learned variance, an attack, no protocol of ours,
    other corruptions of large images. Left out: the clamp, and the mean of x_T, which is 0 and not 0.006 of
    the data's.

    Rule: a network that can tell clean images from corrupted ones, as the many directions outside the
    subspace let it, filters each as its own kind. (Where it cannot, take the data's overall covariance.)

    The fixed point takes like directions to stay alike. A network trained with noise of 0.2 on all images
    (p = 1) did not keep to it at t < 30: a few directions drew Eq. 8's signs to themselves, and the others
    kept more noise.
    """
    D, known = len(truth["mean"]), len(truth["scale"])
    try:
        config, steps, attack = (protocol[key] for key in ("config", "steps", "attack"))
        training, data, process = (config[key] for key in ("training", "data", "process"))
        regulariser = {key: training[key] for key in ("method", "lam", "lam_units", "omega", "gamma")}
        T, p, sigma, how = (process["timesteps"], data["p"], data["sigma"],
                            (protocol["sampler"], protocol["variance"]))
        corruption = data.get("corruption", "gaussian")
        if (regulariser["method"] not in ("ddpm", "ran", "adv") or attack or data["name"] != "subspace"
                or corruption not in CORRUPTIONS or (corruption != "gaussian" and D > LARGEST)
                or how not in (("ddpm", "large"), ("ddpm", "small"), ("ddim", None), ("heun", None))
                or not isinstance(steps, int) or not 2 <= steps <= T <= MAX_T or not 0 <= p <= 1
                or min(sigma, *(regulariser[key] for key in ("lam", "omega", "gamma"))) < 0):
            return None
        schedule = Schedule.named(process["schedule"], T)
    except (KeyError, TypeError, UserError):                # a foreign protocol may hold anything
        return None
    outside = max(1, D - known)                             # directions that the clean data do not have
    chi = math.sqrt(2) * math.exp(gammaln((outside + 1) / 2) - gammaln(outside / 2))    # mean norm of N(0, I)
    mean, C, beside, rho = np.zeros(known), np.zeros((known, known)), 0.0, 0.0
    for share, kind, level in ((p, corruption, sigma), (1 - p, "gaussian", 0.0)):
        if share:
            shift, own, left = samples_of_kind(schedule, truth, kind, level, (steps, *how), **regulariser)
            along = truth["components"] @ shift                                     # [k]
            left += (shift**2).sum() - (along**2).sum()     # about the true mean, as rho is
            mean, C = mean + share * along, C + share * (own + np.outer(along, along))
            beside, rho = beside + share * left, rho + share * math.sqrt(left / outside) * chi
    C, beside = C - np.outer(mean, mean), float(beside)
    if not np.abs(C).max() < 1e30:                          # of numbers that nobody trains with
        return None
    inside = limit = float(frechet(truth["scale"], mean, C))
    if count:
        inside = of_samples(truth["scale"], mean, C, count)
    found = {"value": inside + beside, "limit": limit + beside, "fd_inside": inside, "fd_outside": beside,
             "rho_mean": float(rho), "psnr": 10 * math.log10(4 / max(beside / D, 1e-12)),
             "variance_kept": float(np.trace(C) / (truth["scale"]**2).sum())}
    if not np.isfinite([*found.values()]).all():
        return None
    how = "fixed point" if regulariser["method"] == "adv" else "exact"
    how = how if p in (0, 1) or not sigma else "rule for 0 < p < 1"
    return found | {"closed_form": how if corruption == "gaussian" else "covariance"}


def predicted_plane(covariance, inside, scale, noise, schedule, **regulariser):
    """What toy3d.py should find on a plane in 3-D -> dict of `rms`, the distance from it, and `kept`, the
    variance along it over the true one.

    covariance [3, 3] of the clean points and the projector `inside` [3, 3] onto the plane, in data units, of
    which `scale` is the network's unit; noise: its variance, averaged over clean and noisy points (p sigma^2:
    in 3-D they cannot be told apart). regulariser: as in `shrinkage`.
    """
    V = (np.asarray(covariance) + noise * np.eye(3)) / scale**2
    C = scale**2 * sampled_covariance(schedule, optimum(schedule, V, **regulariser))
    along = np.trace(C @ inside)
    return {"rms": math.sqrt(max(np.trace(C) - along, 0.0)), "kept": float(along / np.trace(covariance))}


# ------------------------------------------------------------------------------------------------- a data set

def spectrum(images):
    """The directions of an image set -> their variances [D], ascending; a text that says how they were found;
    and the images' mean `noise_estimate`. Of a random part of a large set, the same every time."""
    count, D = min(len(images), max(FLOATS // math.prod(images.shape), 2)), math.prod(images.shape)
    x = images.read(np.sort(np.random.default_rng(0).choice(len(images), count, replace=False)))
    noise = float(noise_estimate(x[::-(-count // 1000)]).mean())                    # x [N, 3, H, W]
    x -= x.mean(axis=0)
    if D <= LARGEST and count >= 2 * D:
        x = x.reshape(count, D)
        variances, how = np.linalg.eigvalsh((x.T @ x).astype(np.float64) / count).clip(0), "exact PCA"
    else:                                                   # nearly those of a PCA, at any size
        x = dctn(x, axes=(2, 3), norm="ortho", overwrite_x=True)
        colours = np.linalg.eigh(np.einsum("nchw,ndhw->cd", x, x))[1]
        variances = np.square(np.einsum("nchw,cd->ndhw", x, colours)).mean(axis=0, dtype=np.float64)
        variances, how = np.sort(variances, axis=None), "cosine transform in three uncorrelated colours"
    return variances, f"{how} of {count:,} of the {len(images):,} images", noise


def deviation_kept(schedule, V, method="adv", sampling=(), **regulariser):
    """Of the directions of training data with variances V [D], ascending: the samples' deviations over them
    [D]. Directions whose variances are within 10 % are taken for alike, and between such kinds it is
    interpolated. sampling: what `sampled_covariance` takes of it."""
    _, kind, count = np.unique(np.floor(10 * np.log(V / V[0])), return_inverse=True, return_counts=True)
    mean = np.bincount(kind, V) / count                                             # [kinds]
    A = optimum(schedule, mean, count, method, **regulariser)
    C = sampled_covariance(schedule, A, *sampling)
    return np.interp(np.log(V), np.log(mean), np.sqrt(C / mean))


def outcome(kept, signal, sigma):
    """What it means to keep these shares [D] of the deviations of directions with variances signal [D],
    ascending, and noise of deviation sigma in each -> dict.

    `left`: of the noise's deviation, in the weakest direction. `half`: the weakest signal, as a deviation, in
    a direction that keeps half. `kept`: the signal's variance that is kept, over all (of what a direction
    keeps, the signal's part is that in the data; fid.py's variance kept has the noise's part with it). `fd`:
    the Frechet distance of the samples' Gaussian to the signal's.
    """
    half = math.sqrt(signal[(kept >= 0.5).argmax()]) if kept.max() >= 0.5 else math.inf
    return dict(left=kept[0], half=half, kept=(signal * kept**2).sum() / signal.sum(),
                fd=((kept * np.sqrt(signal + sigma**2) - np.sqrt(signal))**2).sum())


def lambda_that_leaves(schedule, leave, V, omega):
    """The lambda with which the weakest direction keeps this share of its deviation, to 0.5 %; None outside
    0.001 to 100."""
    @functools.cache                                        # brentq begins with the ends again
    def excess(log_lam):
        return deviation_kept(schedule, V, lam=math.exp(log_lam), omega=omega)[0] - leave

    low, high = math.log(1e-3), math.log(100)
    return math.exp(brentq(excess, low, high, xtol=5e-3)) if excess(low) > 0 > excess(high) else None


# ------------------------------------------------------------------------------------------- the command line

def advice(args, sigma, found):
    """Sentences and a command, of {(lambda, omega): outcome}: what is nearest to the clean images comes
    first."""
    wanted = f"To leave {100 * args.leave:g} % of noise of {sigma:g}"
    if not found:
        return f"{wanted}, no lambda from 0.001 to 100 will do."
    found = dict(sorted(found.items(), key=lambda item: item[1]["fd"]))
    best, *others = [f"lambda {lam:.2g} with omega {omega:g} (detail kept {100 * r['kept']:.1f} %, Frechet "
                     f"distance {r['fd']:.3g})" for (lam, omega), r in found.items()]
    (lam, omega), corrupt = next(iter(found)), "" if args.noisy else f" --p 1 --sigma {sigma:g}"
    command = (f"    python train.py --data {args.data} --size {args.size}{corrupt} --lam {lam:.2g} "
               f"--omega {omega:g}")
    return "\n".join([f"{wanted}, best is {best}:", command, *(f"  then {each}" for each in others)])


def draw(path, plt, title, signal, sigma, curves):
    """Deviation kept against a direction's deviation in the clean data: {label: `deviation_kept`}, the data's
    spectrum behind, and a line at the noise's deviation. -> the path."""
    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    behind, low, high = ax.twinx(), 0.01, max(3, 1.01 * math.sqrt(signal[-1]))
    deviations = np.sqrt(signal).clip(low)
    behind.hist(deviations, np.geomspace(low, high, 40), color="0.85")
    behind.set(ylabel=f"the clean data's directions (grey; all below {low} at {low})")
    ax.set_zorder(1)                                        # before the spectrum
    ax.patch.set_visible(False)
    colours = ["black", *plt.cm.viridis(np.linspace(0, 0.9, len(curves) - 1))]
    for (label, curve), colour in zip(curves.items(), colours):
        ax.plot(deviations, curve, color=colour, label=label, linestyle="--" if "ω" in label else "-")
    ax.axvline(sigma, color="#D55E00", linestyle=":", label="the noise")
    ax.set(xscale="log", xlim=(low, high), ylim=(0, 1.1), xlabel="deviation of a direction in the clean data",
           ylabel="share of its deviation, noise included, in the samples", title=title)
    ax.legend(fontsize=8, loc="lower right")
    return save_figure(figure, path)


def arguments(argv):
    """The command line, checked."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", default="shapes", help="name of a data set prepared by data.py (default shapes)")
    add("--size", type=int, help="image size (default: the data set's usual one)")
    add("--data-dir", type=Path, default=Path("data"), help="where data.py put it (default data/)")
    add("--sigma", type=float, help="deviation of the noise, of [-1, 1] (default: "
        f"{', '.join(map(str, SIGMAS))}, one after the other)")
    add("--noisy", action="store_true", help="the prepared images have this noise already (default: train.py "
        "is to add it)")
    add("--leave", type=float, default=0.25, help="share of the noise's deviation that may stay (default "
        "0.25)")
    add("--out", type=Path, help="the figure (default gaussian-DATA-SIZE.png)")
    args = parser.parse_args(argv)
    check_ranges(args, size=POSITIVE, sigma=POSITIVE, leave=(0.01, 1))
    return args


def main(argv=None):
    """Reads a spectrum, prints tables and advice, draws."""
    args, began = arguments(argv), time.perf_counter()
    images = Images(args.data, args.size, args.data_dir)
    args.size, sigmas = images.size, [args.sigma] if args.sigma else [*SIGMAS]
    args.out = args.out or Path(f"gaussian-{args.data}-{args.size}.png")
    check_out(args.out)
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: the name must end in .png")
    variances, how, noise = spectrum(images)
    if not variances.any():
        raise UserError(f"--data {args.data}: its images do not differ from each other")
    usual = math.sqrt(np.median(variances))
    impossible = [sigma for sigma in sigmas if args.noisy and sigma > 1.5 * usual]
    reason = (f"noise of {' and '.join(f'{sigma:g}' for sigma in impossible)} would be in every direction, "
              f"and half of those of {args.data} have deviations below {usual:.2g}")
    if impossible == sigmas:
        raise UserError(f"--noisy: {reason}")
    print(f"{args.data} {args.size}x{args.size}: {how}; deviations of its {len(variances):,} directions from "
          f"{math.sqrt(variances[0]):.3g} to\n{math.sqrt(variances[-1]):.3g}; noise estimate {noise:.3f} "
          "(texture counts as noise). Assumed: Gaussian data, all of them noisy (p = 1);\nRobust_adv, its "
          "best linear network; linear schedule, 1000 DDPM steps, variance large. Images\ndiffer, and may "
          "keep more detail: see --help\n" + (f"Left out: {reason}\n" if impossible else ""))
    schedule = Schedule.named("linear", 1000)
    for sigma in [sigma for sigma in sigmas if sigma not in impossible]:
        signal = (variances - sigma**2).clip(0) if args.noisy else variances
        V, shown, found = signal + sigma**2, {}, {}
        print(f"{f'noise of {sigma:g}':22}noise left  detail kept   half from  Frechet distance")
        for omega, lam in [(0, 0), *itertools.product(OMEGAS, LAMBDAS)]:
            kept = deviation_kept(schedule, V, **dict(lam=lam, omega=omega) if lam else dict(method="ddpm"))
            r, name = outcome(kept, signal, sigma), f"lambda {lam:<5g} omega {omega:g}" if lam else "DDPM"
            print(f"{name:22}{100 * r['left']:8.0f} %{100 * r['kept']:11.1f} %{r['half']:12.2g}"
                  f"{r['fd']:18.3g}")
            if omega in (0, 2):
                shown[f"λ {lam:g}" if lam else "DDPM"] = kept
        for omega in OMEGAS:
            if lam := lambda_that_leaves(schedule, args.leave, V, omega):
                kept = deviation_kept(schedule, V, lam=lam, omega=omega)
                found[lam, omega] = outcome(kept, signal, sigma)
                if omega == OMEGAS[-1]:
                    shown[f"λ {lam:.2g}, ω {omega:g}"] = kept
        print(advice(args, sigma, found) + "\n")
    print("noise left: of its deviation, in the weakest direction; detail kept: of the signal's variance;\n"
          "half from: the weakest signal, by its deviation, in a direction that keeps half; Frechet\n"
          "distance: of all pixels' Gaussian, to the clean images' (fid.py's FD-pixels: of 8x8 pixels)")
    if plt := pyplot():
        title = f"{args.data} {args.size}×{args.size}, noise of {sigma:g}; ω 2, where not said"
        print(f"made {draw(args.out, plt, title, signal, sigma, shown)}", end=" ")
    print(f"in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    command_line(main)
