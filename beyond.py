"""What the paper does not have: the regulariser on a share of the batch, and the two terms weighed alike at
every t.

    python train.py --data cifar10 --p 0.9 --sigma 0.2 --reg-share 0.25 --balance

Without these flags nothing here has an effect. train.py and toy3d.py call `plan`, in one line between the
draws of Algorithm 1 and its loss. What it buys: results/price.md.
"""

import torch

from common import UserError


def add_arguments(parser):
    """The flags of train.py for what is beyond the paper."""
    add = parser.add_argument_group("beyond the paper (see beyond.py)").add_argument
    add("--reg-share", type=float, default=1.0, help="share of the batch on which the regulariser is "
        "computed, 1, 1/2, 1/3 ...: a step costs (3 + 5 share) / 3 of DDPM's (default 1, the paper's)")
    add("--balance", action="store_true", help="divide the loss at t by 1 + lambda_t: the same minimiser, "
        "and high noise levels are learnt much sooner (default: the paper's sum)")


def rounded_share(reg_share, batch, world):
    """--reg-share as exactly 1, 1/2, 1/3 ... UserError if it is none, or not whole rows of every process's
    batch."""
    every = round(1 / reg_share)
    if reg_share > 1 or abs(every * reg_share - 1) > 1e-2 or batch % (world * every):
        raise UserError(f"--reg-share {reg_share}: must be 1, 1/2, 1/3 ..., and whole images of each of the "
                        f"{world} process(es)' part of --batch {batch}")
    return 1 / every


def plan(lam_t, t, chance, method, reg_share=1.0, balance=False):
    """Which timesteps the rows of a batch get, how their loss is weighed, and which of them are regularised.

    lam_t [..., T]: lambda_t at beta = 1; t uniform and chance ~ U[0, 1), both [..., B].
    -> t [..., B]; weight [..., B], the factor of every term of a row's loss; and the parts of the batch, each
    (rows, method, factor of lambda). By default: t, 1, and one part, all rows.

    A share below 1: few rows are regularised, with lambda / share, and they stand for all. lambda_t differs
    20-fold over t, so their t are drawn from q(t) ~ 1 + lambda_t and weighed by uniform / q(t): the same
    expectation, less noise. Balanced: the weight is 1 / (1 + lambda_t). That leaves the minimiser at every t
    what it is, but no t drowns the others' gradients, as 16 / beta^2 near t = 0 does.
    """
    rows, weight = t.shape[-1], torch.ones_like(chance)
    if method in ("ddpm", "ambient"):                       # their loss has one term
        return t, weight, [(slice(0, rows), method, 1.0)]
    few = round(reg_share * rows)                   # images and draws are new in every step: any rows will do
    regularised, plain = (slice(0, few), method, 1 / reg_share), (slice(few, rows), "ddpm", 1.0)
    total = 1 + lam_t                                     # [..., T]: how heavily the two terms weigh together
    if reg_share < 1 and not balance:
        below = total.cumsum(dim=-1)
        drawn = torch.searchsorted(below / below[..., -1:], chance[..., :few].contiguous())
        t = torch.cat([drawn, t[..., few:]], dim=-1)
        factor = total.mean(dim=-1, keepdim=True) / total.gather(-1, drawn)             # uniform / q(t)
        weight = torch.cat([factor, weight[..., few:]], dim=-1)
    elif balance:
        weight = 1 / total.gather(-1, t)
    return t, weight, [regularised, plain] if few < rows else [regularised]
