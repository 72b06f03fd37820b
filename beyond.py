"""What the paper does not have: the regulariser on a share of the batch, and other weights and draws of t.

    python train.py --data cifar10 --p 0.9 --sigma 0.2 --precondition --weighting edm --reg-share 0.25
    python sample.py runs/cifar10-adv --sampler heun                        # in 35 evaluations
    python train.py --data cifar10 --p 0.9 --sigma 0.2 --weighting balanced --reg-share 0.25  # eps-network

Without these flags nothing here has an effect. train.py calls `plan`, in one line between the draws of
Algorithm 1 and its loss.

A factor of t alone leaves the minimiser at every t what it is, and decides how soon it is reached. 8x8
subspace data, p 0.9, sigma 0.2, adv, 720 steps of 64, a share of 1/4, one seed, FD-exact by Heun's sampler
and by DDPM's in 100 steps (closed form 0.9, 1.6):

                                                        preconditioned      not
    the paper's sum                                     6.4, 7.7            –
    balanced: divided by 1 + c_t                        3.5, 4.3            40, 6.1
    edm: EDM's draws and weights, and 1 + c_t           1.8, 3.2            354, 170

At equal cost, edm, preconditioned, a share of 1 (400 steps) has 3.5, 4.4, of 1/8 (800 steps) 2.2, 3.3.
"""

import torch

from common import UserError
from data import CORRUPTIONS

WEIGHTINGS = "paper", "balanced", "edm"


def add_arguments(parser):
    """The flags of train.py for what is beyond the paper."""
    add = parser.add_argument_group("beyond the paper (see beyond.py)").add_argument
    add("--reg-share", type=float, default=1.0, help="share of the batch on which the regulariser is "
        "computed, 1, 0.5, 0.333 ...: a step of adv takes (3 + 5 share) / 3 of the passes of DDPM's (default "
        "1, the paper's)")
    add("--precondition", action="store_true", help="Karras et al.'s parametrisation of the network, for the "
        "data set's sigma_data: the same minimiser, learnt in far fewer steps")
    add("--corruption", choices=CORRUPTIONS, default="gaussian", help="what befalls a share --p of images: "
        "the paper's noise (default); a share --sigma of the pixels black or white; uniform noise in the "
        "image's place, without --sigma; or blur of deviation 10 --sigma pixels")
    add("--weighting", choices=WEIGHTINGS, default="paper", help="of the loss at t: the paper's sum "
        "(default), that divided by 1 + c_t, or by 1 + c_t with EDM's t and weights. The same minimiser")


def rounded_share(reg_share, batch, world):
    """--reg-share as exactly 1, 1/2, 1/3 ... UserError if it is none, or not whole rows of every process's
    batch."""
    every = round(1 / reg_share)
    if every < 2 and reg_share != 1 or abs(every * reg_share - 1) > 2e-2 or batch % (world * every):
        raise UserError(f"--reg-share {reg_share}: must be 1, 0.5, 0.333 ..., and whole images of each of "
                        f"the {world} process(es)' part of --batch {batch}")
    return 1 / every


def weights(schedule, weighting, sigma_data=None, **regulariser):
    """What `plan` takes for a weighting: the loss's weight at every t, float32 [T], and below which share of
    the draws every t is, float32 [T]; None for a weight of 1, and for uniform draws.

    schedule: float64, on the CPU. sigma_data: the network's, for `edm`. regulariser: as in
    gaussian.shrinkage, which gives c_t: alpha_bar v + (1 - alpha_bar) (1 + c_t) is the loss's curvature along
    data of variance v. `balanced`: 1 / (1 + c_t). `edm`: that times (sigma^2 + sigma_data^2) / sigma_data^2,
    EDM's weight of D in terms of eps; and ln sigma ~ N(-1.2, 1.2^2), at the nearest t.
    """
    if weighting == "paper":
        return None, None
    from gaussian import shrinkage      # here: it loads SciPy, and the paper's training needs none
    weight, below = 1 / (1 + torch.as_tensor(shrinkage(schedule, **regulariser))), None             # [T]
    if weighting == "edm":
        weight = weight * (schedule.noise_level**2 + sigma_data**2) / sigma_data**2
        below = torch.special.ndtr((schedule.between_noise_levels() + 1.2) / 1.2)
        below = torch.cat([below, torch.ones(1)]).float()
    return weight.float(), below


def plan(lam_t, t, chance, method, reg_share=1.0, weight_t=None, below=None):
    """Which timesteps the rows of a batch get, how their loss is weighed, and which of them are regularised.

    lam_t [T]: lambda_t at beta = 1; t uniform and chance ~ U[0, 1), both [B]; weight_t and below: of
    `weights`.
    -> t [B]; weight [B], the factor of every term of a row's loss; and the parts of the batch, each (rows,
    method, factor of lambda). By default: t, 1, and one part, all rows.

    A share below 1: few rows are regularised, with lambda / share, and they stand for all. In the paper's sum
    1 + lambda_t differs 12-fold over t, so their t are drawn from q(t) ~ 1 + lambda_t and weighed by
    uniform / q(t): the same expectation, less noise.
    """
    weight = torch.ones_like(chance)
    if below is not None:
        t = torch.searchsorted(below, (t + chance) / len(below))            # of a uniform number in 0 ... 1
    if weight_t is not None:
        weight = weight_t[t]
    if method in ("ddpm", "ambient"):                       # their loss has one term
        return t, weight, [(slice(0, len(t)), method, 1.0)]
    few = round(reg_share * len(t))                 # images and draws are new in every step: any rows will do
    regularised, plain = (slice(0, few), method, 1 / reg_share), (slice(few, len(t)), "ddpm", 1.0)
    if reg_share < 1 and weight_t is None:
        total = 1 + lam_t                                   # [T]: how heavily the two terms weigh together
        below = total.cumsum(dim=0)
        drawn = torch.searchsorted(below / below[-1], chance[:few].contiguous())
        t = torch.cat([drawn, t[few:]])
        weight = torch.cat([total.mean() / total[drawn], weight[few:]])     # uniform / q(t)
    return t, weight, [regularised, plain] if few < len(t) else [regularised]
