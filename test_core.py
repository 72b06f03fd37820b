"""The method against independent truths: formulas in float64, closed forms, finite differences.

    bash run_all.sh test              # sets all up, then this file and tests/, which has the stages around it
    python -m pytest -q test_core.py    # the network, the losses, Algorithm 1, the sampler, Algorithms 2 to 4
"""

import contextlib
import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attack
import beyond
import common
import gaussian
import sample
import train
import unet
from checkpoints import network_of
from common import UserError, generator, image_noise
from data import Images
from unet import PRESETS, Schedule, UNet

TINY = dict(channels=32, res_blocks=1, mult=(1, 2), attn=(4,), heads=2)
TINIEST = TINY | dict(mult=(1,), attn=(8,))                 # where what is around the network is tested


def difference(a, b):
    """||a - b|| / ||b||."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def randomised(network, seed=0):
    """A network with random values in every parameter, those that start at zero too."""
    torch.manual_seed(seed)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network


# ------------------------------------------------------------------------------------------------ the network

def test_residual_block_with_additive_embedding():
    """The path without scale-shift at width 64, two channels a group, against the formula in float64."""
    block = randomised(unet.ResBlock(32, 64, 16, dropout=0.0, scale_shift=False))
    x, emb = torch.randn(2, 32, 6, 6), torch.randn(2, 16)
    w = {k: v.double() for k, v in block.state_dict().items()}
    h = F.silu(F.group_norm(x.double(), 32, w["in_layers.0.weight"], w["in_layers.0.bias"]))
    h = F.conv2d(h, w["in_layers.2.weight"], w["in_layers.2.bias"], padding=1)
    h = h + (F.silu(emb.double()) @ w["emb_layers.1.weight"].T + w["emb_layers.1.bias"])[:, :, None, None]
    h = F.silu(F.group_norm(h, 32, w["out_layers.0.weight"], w["out_layers.0.bias"]))
    h = F.conv2d(h, w["out_layers.3.weight"], w["out_layers.3.bias"], padding=1)
    skip = F.conv2d(x.double(), w["skip_connection.weight"], w["skip_connection.bias"])
    assert difference(block(x, emb), skip + h) < 1e-5


def test_group_norm_values_and_gradients():
    """The kit's own normalisation: values against PyTorch's in float64, gradients against finite
    differences."""
    # a mean far from 0: no cancellation
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64, requires_grad=True) + 50
    weight = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    expected = F.group_norm(x, 4) * weight.transpose(1, 2)[..., None] + bias.transpose(1, 2)[..., None]
    for normalise in (unet._Normalise.apply, unet._normalise_on_gpu):
        assert difference(normalise(x, weight, bias, 4, 1e-5), expected) < 1e-9
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: unet._Normalise.apply(*v, 4, 1e-5), (x, weight, bias))
    single = torch.randn(2, 64, 8, 8) + 100
    assert difference(unet.GroupNorm(64)(single), F.group_norm(single.double(), 32)) < 1e-4


def test_attention_splits_heads_first():
    """Attention by its formula, head by head: the order (head, then q k v) that public weights need."""
    attention = randomised(unet.Attention(64, heads=2)).double()
    attention.norm.float()                                  # GroupNorm is float32 by design
    x = torch.randn(2, 64, 3, 3)
    weight, bias = attention.norm.weight.double(), attention.norm.bias.double()
    tokens = F.group_norm(x.double(), 32, weight, bias).flatten(2)
    qkv = attention.qkv.weight[:, :, 0] @ tokens + attention.qkv.bias[:, None]             # [2, 192, 9]
    out = []
    for head in qkv.chunk(2, dim=1):
        q, k, v = head.chunk(3, dim=1)                      # each [2, 32, 9]
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(32), dim=2)
        out.append(v @ weights.transpose(1, 2))
    projected = attention.proj_out.weight[:, :, 0] @ torch.cat(out, 1) + attention.proj_out.bias[:, None]
    assert difference(attention.float()(x), x + projected.view(x.shape)) < 1e-5


def test_timestep_embedding():
    """cos then sin of t 10000^(-k/half), by hand for t = 7 and width 8."""
    angles = [7 * 10000 ** (-k / 4) for k in range(4)]
    expected = torch.tensor([[math.cos(a) for a in angles] + [math.sin(a) for a in angles]])
    assert torch.allclose(unet.timestep_embedding(torch.tensor([7]), 8), expected, atol=1e-6)


def test_bfloat16_is_the_same_network_up_to_its_precision():
    """Autocast touches the convolutions alone: near the float32 output, float32 itself, and gradients
    flow."""
    network = randomised(UNet(size=8, **TINY))
    x, t = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([3, 700])
    out = unet.in_bfloat16(network, torch.device("cpu"))(x, t)
    assert out.dtype == torch.float32 and 1e-6 < difference(out, network(x, t)) < 0.03
    slope, = torch.autograd.grad(out.square().sum(), x)
    assert difference(slope, torch.autograd.grad(network(x, t).square().sum(), x)[0]) < 0.1


@pytest.mark.parametrize("learn_sigma, schedule", [(False, "linear"), (True, "cosine")])
def test_preconditioned_output_is_edms(learn_sigma, schedule):
    """Karras et al.'s D = c_skip x + c_out F(c_in x) of x = x_t / sqrt(alpha_bar), their Table 1 in float64,
    F the same weights without it, and eps = (x - D) / sigma. Catches a wrong c, t of another row, v scaled
    too. A new network, F = 0, must be the closed form's for data of that variance. bfloat16: near it."""
    exact, sigma_data, t = Schedule.named(schedule, 1000), 0.4, torch.tensor([0, 60, 500, 990])
    network = UNet(size=8, learn_sigma=learn_sigma, sigma_data=sigma_data, schedule=exact, **TINY)
    x = torch.randn(4, 3, 8, 8)
    gains = gaussian.gains(exact, np.array([sigma_data**2]), np.zeros((1000, 1)))[t, 0]
    assert difference(network(x, t)[:, :3], torch.from_numpy(gains).view(4, 1, 1, 1) * x) < 1e-6
    plain = UNet(size=8, learn_sigma=learn_sigma, **TINY)
    plain.load_state_dict(randomised(network).state_dict())                 # the table is not in it
    alpha_bar = exact.alpha_bar[t].view(4, 1, 1, 1)
    sigma, clean = ((1 - alpha_bar) / alpha_bar).sqrt(), x / alpha_bar.sqrt()
    root = (sigma**2 + sigma_data**2).sqrt()
    c_skip, c_out, c_in = sigma_data**2 / root**2, sigma * sigma_data / root, 1 / root
    F_x = plain((c_in * clean).float(), t).double()
    eps = (clean - c_skip * clean - c_out * F_x[:, :3]) / sigma
    out = network(x, t)
    assert difference(out, torch.cat([eps, F_x[:, 3:]], dim=1)) < 1e-5 and out.dtype == torch.float32
    half = unet.in_bfloat16(network, torch.device("cpu"))(x, t)
    assert half.dtype == torch.float32 and 1e-6 < difference(half, out) < 0.03


def test_presets_have_the_published_sizes():
    """Tensors and parameters of the CIFAR-10 network, fixed and learned variance, as improved-diffusion has
    them."""
    with torch.device("meta"):
        fixed, learned = (UNet(size=32, learn_sigma=learn, **PRESETS["cifar10"]) for learn in (False, True))
    assert len(fixed.state_dict()) == 446
    assert sum(p.numel() for p in fixed.parameters()) == 52_542_979
    assert sum(p.numel() for p in learned.parameters()) == 52_546_438


@pytest.mark.parametrize("preset, size", [
    ("cifar10", 32), ("imagenet64", 64), ("lsun_bedroom", 256), ("small", 32)])
def test_architecture_is_read_off_a_bare_state_dict(preset, size):
    """Every preset, from its tensors alone."""
    learn_sigma = preset == "cifar10"
    with torch.device("meta"):
        state = UNet(size=size, learn_sigma=learn_sigma, **PRESETS[preset]).state_dict()
    found = network_of(state, size, PRESETS[preset]["heads"])
    expected = dict(size=size, in_channels=3, scale_shift=True, learn_sigma=learn_sigma) | PRESETS[preset]
    assert found == {k: v for k, v in expected.items() if k != "dropout"} | dict(sigma_data=None)


# ------------------------------------------------------------------------------------ the schedule (Eq. 1, 2)

def test_schedule_in_closed_form():
    """The ends of both schedules, beta scaled with T, alpha_bar kept by respacing, the posterior by Bayes'
    rule."""
    linear = Schedule.named("linear", 1000)
    assert float(linear.beta[0]) == 1e-4 and float(linear.beta[-1]) == pytest.approx(0.02, rel=1e-14)
    assert float(linear.alpha_bar[1]) == pytest.approx((1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999), rel=1e-14)
    assert float(Schedule.named("linear", 100).beta[-1]) == pytest.approx(0.2, rel=1e-14)
    cosine = Schedule.named("cosine", 10)
    middle, start = (math.cos(share / 1.008 * math.pi / 2) ** 2 for share in (0.508, 0.008))
    assert float(cosine.alpha_bar[4]) == pytest.approx(middle / start, rel=1e-12)
    short = linear.respaced(300)
    assert short.t[:4].tolist() == [0, 3, 7, 10] and short.t[-2:].tolist() == [996, 999]
    assert torch.allclose(short.alpha_bar, linear.alpha_bar[short.t], rtol=1e-12)
    respaced_beta = 1 - linear.alpha_bar[3] / linear.alpha_bar[0]
    assert float(short.log_variance_large[1]) == pytest.approx(math.log(respaced_beta))
    beta, before = linear.beta[500], 1 - linear.alpha_bar[499]   # of q(x_{t-1} | x_t, x_0): precisions add up
    by_bayes = float(1 / ((1 - beta) / beta + 1 / before))
    assert float(linear.posterior_variance[500]) == pytest.approx(by_bayes, rel=1e-12)


@pytest.mark.parametrize("name, T", [("linear", 1000), ("cosine", 4000), ("cosine", 8)])
def test_respaced_by_noise(name, T):
    """Karras et al.'s 18 levels between the lowest and 80, of which a cosine schedule has far more, by their
    Eq. 5; the nearest timesteps by trying all. No step is visited twice where many are asked for, and all are
    where T are."""
    schedule = Schedule.named(name, T)
    alpha_bar = schedule.alpha_bar.numpy()
    sigma = np.sqrt(1 / alpha_bar - 1)
    if T > 18:
        low, high = sigma[0], min(sigma[-1], 80)
        levels = [(high**(1 / 7) + k / 17 * (low**(1 / 7) - high**(1 / 7)))**7 for k in range(18)]
        nearest = [int(np.abs(np.log(sigma / level)).argmin()) for level in levels]
        short = schedule.respaced_by_noise(18)
        assert short.t.tolist() == nearest[::-1] and 70 < sigma[nearest[0]] < 90
        assert torch.allclose(short.alpha_bar, schedule.alpha_bar[short.t], rtol=1e-12)
    for steps in (2, T // 2, T - 1, T):
        visited = schedule.respaced_by_noise(steps).t
        assert len(visited) == steps and bool((visited.diff() > 0).all()) and visited[0] == 0
    for steps in (1, T + 1):
        with pytest.raises(UserError, match=f"--steps {steps}: this model has {T} timesteps"):
            schedule.respaced_by_noise(steps)


# ------------------------------------------------------------------------------------ the losses (Eq. 2 to 8)

def linear_case(seed=0, batch=4, dims=3):
    """A linear eps_theta(x) = x W^T, for which Eq. 6 to 8 and 14 can be written down, in float64, with all
    its draws."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    W = normal(dims, dims).requires_grad_()
    t = torch.tensor([0, 51, 400, 999])[:batch]
    beta = 0.5 + 1.5 * torch.rand(batch, generator=g, dtype=torch.float64)
    u = 2 * torch.rand(batch, dims, generator=g, dtype=torch.float64) - 1
    return W, normal(batch, dims), t, normal(batch, dims), beta, u


@pytest.mark.parametrize("method, lam_units, omega, gamma", [
    ("adv", "x", 2.0, 8 / 255), ("adv", "eps", 2.0, 8 / 255), ("adv", "x", 3.0, 0.1),
    ("ran", "x", 2.0, 8 / 255), ("inv", "x", 2.0, 8 / 255), ("ddpm", "x", 2.0, 8 / 255)])
def test_losses_by_hand(method, lam_units, omega, gamma):
    """Eq. 2, 3, 6, 7, 8, 14 and lambda_t in numpy, value and gradient: signs, targets, units, both outputs'
    gradients."""
    W, x_0, t, eps, beta, u = linear_case()
    schedule = Schedule.named("linear", 1000)
    terms = train.training_loss(lambda x, t: x @ W.T, schedule, x_0, t, eps, beta, u, method, lam=0.7,
                                lam_units=lam_units, omega=omega, gamma=gamma)
    gradient, = torch.autograd.grad(sum(term.sum() for term in terms.values()), W)

    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.numpy()]
    s = np.sqrt(1 - alpha_bar)
    r = (s**omega + gamma * beta.numpy()) / s                                           # Eq. 7
    x_t = np.sqrt(alpha_bar)[:, None] * x_0.numpy() + s[:, None] * eps.numpy()          # Eq. 2
    delta = u.numpy() * r[:, None]
    w = W.detach().numpy()
    if method in ("adv", "inv"):
        slope = delta @ w.T @ w                             # of || s W delta ||^2, up to a positive factor
        delta = np.clip(delta + r[:, None] / np.sqrt(3) * np.sign(slope), -r[:, None], r[:, None])     # Eq. 8
    lam_t = 0.7 * np.sqrt(3) / (beta.numpy() * r * (s if lam_units == "x" else 1))

    def loss(w):
        plain, moved = x_t @ w.T, (x_t + s[:, None] * delta) @ w.T
        target = plain if method == "inv" else plain + delta
        reg = lam_t * ((moved - target) ** 2).mean(1)
        return ((plain - eps.numpy()) ** 2).mean(1), reg if method != "ddpm" else 0 * reg

    assert np.allclose(terms["ddpm"].detach(), loss(w)[0], rtol=1e-10)
    assert ("reg" in terms) == (method != "ddpm")
    if method != "ddpm":
        assert np.allclose(terms["reg"].detach(), loss(w)[1], rtol=1e-10)
    numeric = np.zeros_like(w)
    for k in np.ndindex(*w.shape):
        step = np.zeros_like(w)
        step[k] = 1e-5
        above, below = (sum(part.sum() for part in loss(moved)) for moved in (w + step, w - step))
        numeric[k] = (above - below) / 2e-5
    assert np.allclose(gradient, numeric, rtol=1e-6, atol=1e-6)


def test_radius_has_the_papers_check_values():
    """r(0), its minimum and r(999) for omega 2, gamma 8/255, beta 1; lambda_t near t = 0 is 16 / beta^2."""
    schedule = Schedule.named("linear", 1000)
    t, ones = torch.arange(1000), torch.ones(1000, dtype=torch.float64)
    r = train.radius(schedule, t, ones)
    assert float(r[0]) == pytest.approx(3.15, abs=5e-3) and int(r.argmin()) == 51
    assert float(r[51]) == pytest.approx(0.354, abs=5e-4) and float(r[999]) == pytest.approx(1.03, abs=5e-3)
    expected = 0.3 * math.sqrt(3) / (2 * (1e-4 + 16 / 255))
    assert float(train.lambda_t(schedule, t, 2 * ones)[0]) == pytest.approx(expected, rel=1e-6)


def test_delta_adv_stays_in_the_ball_and_climbs():
    """For every t: inside the ball, at its surface somewhere, and J not below its random start on a nonlinear
    network."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 12)).double()
    predict = lambda x, t: layers(x.flatten(1)).view(x.shape)
    schedule, t = Schedule.named("linear", 1000), torch.arange(1000)
    x_t, u = torch.randn(2, 1000, 3, 2, 2, dtype=torch.float64)
    u = u.clamp(-1, 1)
    r = unet.expand(train.radius(schedule, t, torch.ones(1000, dtype=torch.float64)), x_t)
    s = unet.at(schedule.sqrt_one_minus_alpha_bar, t, x_t)
    delta = train.adversarial(predict, x_t, t, predict(x_t, t), r * u, r, s)
    assert all(p.grad is None for p in layers.parameters()) and not delta.requires_grad
    at_surface = delta.abs().flatten(1).amax(1) > 0.99 * r.flatten()
    assert bool((delta.abs() <= r).all()) and float(at_surface.float().mean()) > 0.9
    J = lambda d: (predict(x_t + s * d, t) - predict(x_t, t)).square().flatten(1).sum(1)
    assert float((J(delta) > J(r * u)).double().mean()) > 0.95

    k = 400         # the step's sign is that of a finite difference of J, where the clamp did not act
    moved = ((delta - r * u)[k] / (r[k] / math.sqrt(3))).flatten()
    for j in range(12):
        step = torch.zeros(1000, 12, dtype=torch.float64)
        step[k, j] = 1e-6
        step = step.view(x_t.shape)
        slope = float((J(r * u + step) - J(r * u - step))[k].detach())
        assert slope * float(moved[j]) >= 0
        at_surface = abs(float(delta[k].flatten()[j])) == pytest.approx(float(r[k]))
        assert abs(float(moved[j])) == pytest.approx(1) or at_surface


@pytest.mark.parametrize("method, factor", [("ran", 1.0), ("adv", 2.540)])
@pytest.mark.parametrize("t", [10, 200])
def test_minimiser_on_gaussian_data(method, factor, t):
    """The closed form: for data of variance v the minimiser of Eq. 6 is Eq. 3's for a variance of v / (1 +
    c_t), with c_t = lambda (s^omega E[1/beta] + gamma) / (sqrt(3) s^2) for random delta, 2.54 times that for
    adversarial ones. There the gradient of the project's own loss vanishes: to 1.5 % of the gain, Monte Carlo
    over 65,536 x 3 draws."""
    v, N, D = 0.04, 1 << 16, 3
    schedule, g = Schedule.named("linear", 1000), torch.Generator().manual_seed(t)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    a2 = schedule.alpha_bar[t]
    s = (1 - a2).sqrt()
    c = factor * 0.3 * (s**2 * math.log(4) / 1.5 + 8 / 255) / (math.sqrt(3) * s**2)
    best = s * (1 + c) / (a2 * v + s**2 * (1 + c))
    gain = best.clone().requires_grad_()
    beta = 0.5 + 1.5 * torch.rand(N, generator=g, dtype=torch.float64)
    u = 2 * torch.rand(N, D, generator=g, dtype=torch.float64) - 1
    x_0, eps = math.sqrt(v) * normal(N, D), normal(N, D)
    steps = torch.full((N,), t)
    terms = train.training_loss(lambda x, _: gain * x, schedule, x_0, steps, eps, beta, u, method)
    slope, = torch.autograd.grad(sum(term.mean() for term in terms.values()), gain, create_graph=True)
    curvature, = torch.autograd.grad(slope, gain)
    # Newton's step: the loss is quadratic
    assert abs(float((slope / curvature).detach())) < 0.015 * float(best)


def test_variational_bound_is_a_likelihood():
    """At t = 0 the 256 bytes share a probability of 1; elsewhere the term is the KL of two Gaussians, here by
    hand."""
    schedule = Schedule.named("linear", 1000)
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
    x_t = torch.full_like(levels, 0.1)
    eps, v = torch.full_like(levels, 0.4), torch.full_like(levels, 0.3)
    bits = train.variational_bound(schedule, levels, x_t, torch.zeros(256, dtype=torch.long), eps, v)
    assert float((2.0 ** -bits).sum()) == pytest.approx(1, abs=1e-6)
    t = 300
    beta, ab, before = (float(a[t]) for a in (schedule.beta, schedule.alpha_bar, schedule.alpha_bar_prev))
    x_0, v = 0.25, -0.5
    small = beta * (1 - before) / (1 - ab)
    variance = math.exp(0.25 * math.log(beta) + 0.75 * math.log(small))
    of_x_t = math.sqrt(1 - beta) * (1 - before) / (1 - ab) * 0.1
    mean = lambda x: math.sqrt(before) * beta / (1 - ab) * x + of_x_t
    x0_hat = (0.1 - math.sqrt(1 - ab) * 0.4) / math.sqrt(ab)
    distance = (mean(x_0) - mean(x0_hat)) ** 2
    kl = 0.5 * (math.log(variance / small) - 1 + small / variance + distance / variance)
    one = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    term = train.variational_bound(schedule, x_0 * one, 0.1 * one, torch.tensor([t]), 0.4 * one, v * one)
    assert float(term) == pytest.approx(kl / math.log(2), rel=1e-9)


def test_learned_variance_ends_at_log_beta():
    """v = 1 is log beta_t, at t = 0 too (-9.21 there, not the stand-in log beta_tilde_1); v = -1 is the
    clipped small."""
    schedule = Schedule.named("linear", 1000)
    one = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    high, low = (schedule.log_variance("learned", one, torch.tensor([0, 500]), sign * one).flatten()
                 for sign in (1, -1))
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    # at t = 0: the second step's
    small = beta[[1, 500]] * (1 - alpha_bar[[0, 499]]) / (1 - alpha_bar[[1, 500]])
    assert high.tolist() == pytest.approx(np.log(beta[[0, 500]]))
    assert float(high[0]) == pytest.approx(-9.21, abs=0.005)
    assert low.tolist() == pytest.approx(np.log(small))


def test_learned_variance_regularises_eps_alone():
    """With six output channels the regulariser sees eps: v far off changes `vlb` and nothing else."""
    schedule = Schedule.named("linear", 1000).to("cpu")
    x_0, eps, u = torch.randn(3, 2, 3, 4, 4).clamp(-1, 1)
    t, beta = torch.tensor([10, 500]), torch.ones(2)
    network = lambda shift: lambda x, t: torch.cat([0.5 * x, torch.tanh(x) + shift], dim=1)
    a, b = (train.training_loss(network(shift), schedule, x_0, t, eps, beta, u) for shift in (0.0, 0.7))
    assert torch.equal(a["ddpm"], b["ddpm"]) and torch.equal(a["reg"], b["reg"])
    assert not torch.allclose(a["vlb"], b["vlb"])
    plain = train.training_loss(lambda x, t: 0.5 * x, schedule, x_0, t, eps, beta, u)
    assert torch.allclose(plain["reg"], a["reg"])


def test_the_variance_is_learnt_by_t_over_1000_of_the_bound():
    """L_hybrid of Nichol & Dhariwal, with their factor for T: catches another one, and a bound that trains
    eps too."""
    schedule, t = Schedule.named("linear", 4000).to("cpu"), torch.tensor([40, 2000])
    x_0, eps, u = torch.randn(3, 2, 3, 4, 4).clamp(-1, 1)
    eps_hat, v = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    loss = train.training_loss(lambda x, t: torch.cat([eps_hat, v], dim=1), schedule, x_0, t, eps,
                               torch.ones(2), u, "ddpm")["vlb"]
    bound = train.variational_bound(schedule, x_0, schedule.noised(x_0, t, eps), t, eps_hat, v)
    assert torch.allclose(loss, 4 * bound)
    of_eps, of_v = torch.autograd.grad(loss.sum(), [eps_hat, v])
    assert not of_eps.any() and of_v.any()


@pytest.mark.parametrize("sigma_n", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("t", [70, 300])
def test_ambient_minimiser_of_a_gaussian(sigma_n, t):
    """Catches any slip in rho or in the noise added: for x ~ N(0, s^2) the best eps_theta is c x_t with c =
    sqrt(1 - alpha_bar) / (alpha_bar s^2 + 1 - alpha_bar), that of CLEAN data, whatever noise y has; and no
    loss where y has more noise than x_t."""
    schedule, g, s, N = Schedule.named("linear", 1000), torch.Generator().manual_seed(t), 0.7, 1 << 18
    normal = lambda: torch.randn(N, 1, generator=g, dtype=torch.float64)
    y = s * normal() + sigma_n * normal()
    steps, eps, known = torch.full((N,), t), normal(), torch.full((N,), sigma_n, dtype=torch.float64)
    a = schedule.alpha_bar[t]
    best = float((1 - a).sqrt() / (a * s**2 + 1 - a))
    c = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    predict = lambda x, t: c * x
    loss = train.ambient_loss(predict, schedule, y, steps, eps, known)["ddpm"].mean()
    if ((1 - a) / a).sqrt() <= sigma_n:
        assert float(loss.detach()) == 0
        return
    first, = torch.autograd.grad(loss, c, create_graph=True)
    second, = torch.autograd.grad(first, c)
    # Newton's step from there is none
    assert float((first / second).detach()) == pytest.approx(0, abs=0.02 * best)
    if sigma_n == 0:
        clean = train.training_loss(predict, schedule, y, steps, eps, torch.ones(N).double(), None, "ddpm")
        assert float(loss.detach()) == pytest.approx(float(clean["ddpm"].mean().detach()), rel=1e-12)


def test_what_the_noise_aware_baseline_is_told(shapes):
    """Catches flags swapped, drawn anew each time, wrong with probability p only among the noisy, or sigma
    forgotten."""
    images = Images("shapes", 8, shapes, 0.75, 0.2, 3)
    truth = images.corrupted(np.arange(len(images)))
    told = {flags: train.assumed_noise(images, flags, 0.25) for flags in ("oracle", "conf1", "conf2")}
    assert np.array_equal(told["oracle"], np.where(truth, np.float32(0.25), 0))
    assert 0 < truth.sum() < len(truth)
    assert (told["conf2"] == 0.25).all()
    assert np.array_equal(told["conf1"], train.assumed_noise(images, "conf1", 0.25))
    many = type("Many", (), dict(corrupted=lambda self, index: index % 4 == 0, p=0.75, sigma=0.2, data_seed=3,
                                 __len__=lambda self: 40_000))()
    wrong = (train.assumed_noise(many, "conf1", 0.25) > 0) != (np.arange(40_000) % 4 == 0)
    assert wrong[::4].mean() == pytest.approx(0.75, abs=0.02)
    assert wrong[1::4].mean() == pytest.approx(0.75, abs=0.02)


# -------------------------------------------------------------------------------------- Algorithm 1 as a step

def trainer(device="cpu", **changes):
    """A Trainer of the tiny network on 8x8 images, in this process."""
    training = dict(method="adv", lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255, batch=4, lr=1e-3,
                    ema=0.99, amp=False, seed=0, reg_share=1.0, weighting="paper")
    network = dict(size=8, dropout=0.0, sigma_data=None, **TINY) | changes.pop("network", {})
    process = dict(schedule="linear", timesteps=1000)
    config = dict(network=network, process=process, data={}, training=training | changes)
    return train.Trainer(config, None, False, SimpleNamespace(rank=0, world=1, device=torch.device(device)))


def gradients(t):
    """All gradients of a Trainer after a step, one vector."""
    return torch.cat([p.grad.flatten() for p in t.parameters])


@pytest.mark.parametrize("method", ["adv", "ran", "inv", "ddpm"])
def test_step_is_algorithm_1(method):
    """One call of advance: the loss of these draws, its gradient and AdamW's first step, which is lr times
    the sign. Catches draws that do not reach the loss, a wrong mean over the batch, settings lost on the way,
    a second step."""
    t = trainer(method=method, lam=0.7, omega=3.0, gamma=0.1, lam_units="eps")
    other = copy.deepcopy(randomised(t.model))
    x_0 = torch.randn(4, 3, 8, 8)
    losses = t.advance(x_0)
    schedule = Schedule.named("linear", 1000).to("cpu")
    step, beta, eps, u, _ = train.draw(0, 0, 4, (3, 8, 8), 1000, "cpu")
    terms = train.training_loss(other, schedule, x_0, step, eps, beta, u, method,
                                lam=0.7, omega=3.0, gamma=0.1, lam_units="eps")
    sum(term.mean() for term in terms.values()).backward()
    means = {name: float(term.detach().mean()) for name, term in terms.items()}
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(means)
    expected = torch.cat([p.grad.flatten() for p in other.parameters()])
    assert difference(gradients(t), expected) < 1e-5
    moved = torch.cat([(p - b).flatten() for p, b in zip(t.parameters, other.parameters())])
    clear = expected.abs() > 1e-3 * expected.abs().max()    # where rounding cannot turn the sign
    assert torch.allclose(moved[clear], -1e-3 * expected[clear].sign(), rtol=1e-2) and t.step == 1


def test_plan_of_beyond_reaches_the_loss(monkeypatch):
    """Catches its t, its weights or its factor of lambda left out of the step, or given to one of the terms
    alone."""
    t = trainer(method="ran")
    asked, weight = torch.tensor([5, 51, 400, 900]), torch.tensor([0.1, 0.7, 2.0, 0.4])
    randomised(t.model)
    monkeypatch.setattr(beyond, "plan", lambda *args: (asked, weight, [(slice(0, 4), "ran", 3.0)]))
    model, x_0 = copy.deepcopy(t.model), torch.randn(4, 3, 8, 8)
    losses = t.advance(x_0)
    _, beta, eps, u, _ = train.draw(0, 0, 4, (3, 8, 8), 1000, "cpu")
    terms = train.training_loss(model, t.schedule, x_0, asked, eps, beta, u, "ran", lam=0.9)
    for name in ("ddpm", "reg"):
        assert float(losses[name]) == pytest.approx(float((weight * terms[name].detach()).mean()), rel=1e-5)


def test_dropout_has_one_mask_for_all_passes():
    """With delta almost 0 the two outputs agree only if the same units are dropped; the masks change with the
    step, and from one microbatch or process to the next."""
    t = trainer(network=dict(dropout=0.5), method="ran", gamma=1e-7, omega=40.0)
    randomised(t.model)
    x, early = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])          # where r is tiny
    network = t.with_one_dropout_mask(slice(0, 4))
    terms = train.training_loss(network, t.schedule, x, early, torch.randn(4, 3, 8, 8), torch.ones(4),
                                torch.ones(4, 3, 8, 8), "ran", gamma=1e-7, omega=40.0)
    assert bool((terms["reg"] < 1e-3 * terms["ddpm"]).all())
    first = network(x, early)
    assert torch.equal(first, network(x, early))
    assert not torch.equal(first, t.with_one_dropout_mask(slice(4, 8))(x, early))
    t.process.rank = 1
    assert not torch.equal(first, t.with_one_dropout_mask(slice(0, 4))(x, early))
    t.process.rank, t.step = 0, 1
    assert not torch.equal(first, t.with_one_dropout_mask(slice(0, 4))(x, early))


def test_ema_warms_up():
    """After the first update the average has weight 2/11 on the start, after the second 3/12 on what it
    was."""
    t = trainer()
    states = [torch.cat([p.detach().flatten() for p in t.parameters])]
    for _ in range(2):
        t.advance(torch.randn(4, 3, 8, 8))
        states.append(torch.cat([p.detach().flatten() for p in t.parameters]))
    average = states[0] * 2 / 11 + states[1] * 9 / 11
    average = average * 3 / 12 + states[2] * 9 / 12
    assert difference(torch.cat([p.flatten() for p in t.ema]), average) < 1e-6
    assert not torch.equal(states[1], states[2])


def test_draws_are_keyed_by_seed_and_step():
    """The same step again gives the same draws; ranges and shapes are Algorithm 1's."""
    t, beta, eps, u, chance = train.draw(0, 7, 4096, (3,), 1000, "cpu")
    again = train.draw(0, 7, 4096, (3,), 1000, "cpu")
    assert all(torch.equal(a, b) for a, b in zip((t, beta, eps, u, chance), again))
    assert not torch.equal(eps, train.draw(0, 8, 4096, (3,), 1000, "cpu")[2])
    assert not torch.equal(eps, train.draw(1, 7, 4096, (3,), 1000, "cpu")[2])
    assert int(t.min()) < 5 and int(t.max()) > 994
    assert float(t.double().mean()) == pytest.approx(499.5, abs=15)
    assert 0.5 <= float(beta.min()) < 0.51 and 1.99 < float(beta.max()) <= 2
    assert float(u.abs().max()) <= 1 and float(u.std()) == pytest.approx(1 / math.sqrt(3), abs=0.01)
    assert float(eps.mean()) == pytest.approx(0, abs=0.05) and float(eps.std()) == pytest.approx(1, abs=0.02)
    assert 0 <= float(chance.min()) < 0.005 and 0.995 < float(chance.max()) < 1


def test_every_image_comes_once_an_epoch():
    """Batches that straddle epochs: each epoch is a permutation of all images, and a fresh one."""
    seen = np.concatenate([train.batch_indices(5, step, 6, 10) for step in range(10)])
    epochs = seen.reshape(6, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


@contextlib.contextmanager
def nothing(*args, **kwargs):
    """Stands in for autocast, which the meta device does not have."""
    yield


@pytest.fixture
def on_meta(monkeypatch):
    """The meta device, on which reading a value raises, as does a tensor of another device: it has no
    autocast, no generators and no fused optimiser, which are stubbed."""
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda parameters, lr, weight_decay, fused: plain(parameters, lr))
    monkeypatch.setattr(torch, "autocast", nothing)
    def stub(purpose, seed, index=0, device="cpu"):
        if torch.device(device).type != "meta":
            raise RuntimeError(f"a generator on {device}")

    for module in (common, train):
        monkeypatch.setattr(module, "generator", stub)
    return torch.device("meta")


META = [dict(method=method) for method in ("adv", "ran", "inv", "ddpm", "ambient")]
META += [dict(method="ambient", weighting="edm", network=dict(sigma_data=0.5)), dict(reg_share=0.5),
         dict(reg_share=0.5, weighting="balanced"),
         dict(weighting="edm", lam_units="eps", network=dict(sigma_data=0.5)),
         dict(network=dict(learn_sigma=True, dropout=0.3)), dict(network=dict(scale_shift=False))]


@pytest.mark.parametrize("changes", META, ids=str)
def test_step_neither_waits_for_the_device_nor_mixes_devices(changes, on_meta):
    """A step of every method, share and variance on the meta device: an .item(), a .tolist(), a test of a
    tensor's value or a tensor left on the CPU raises. On a GPU each would make the host wait, or copy."""
    t = trainer(on_meta, **changes)
    x_0, sigma_n = torch.empty(4, 3, 8, 8, device=on_meta), torch.empty(4, device=on_meta)
    losses = t.advance(x_0, sigma_n)
    assert {loss.device.type for loss in losses.values()} == {"meta"} and t.step == 1


FAULTS = {"item": lambda x: x * float(x.sum()), "bool": lambda x: x if bool((x > 0).all()) else -x,
          "a CPU tensor": lambda x: x * torch.ones(3, 8, 8),
          "a CPU generator": lambda x: x * torch.rand(1, generator=train.generator("x", 0), device="meta")}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_meta_step_catches_what_it_is_for(fault, on_meta, monkeypatch):
    """Four faults planted in the loss: each of them raises."""
    real = train.training_loss

    def faulty(model, schedule, x_0, *rest, **settings):
        return real(model, schedule, fault(x_0), *rest, **settings)

    monkeypatch.setattr(train, "training_loss", faulty)
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer(on_meta).advance(torch.empty(4, 3, 8, 8, device=on_meta))


# ------------------------------------------------------------------------------------------- beyond the paper

def every_lambda(lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255):
    """lambda_t of all t at beta = 1, by its formula: float64 [1000]."""
    s = (1 - Schedule.named("linear", 1000).alpha_bar).sqrt()
    return lam * math.sqrt(3) / (s**omega + gamma) * (1 if lam_units == "x" else s)


def test_by_default_nothing_is_beyond_the_paper():
    """t stays, every weight is 1, all rows are one part with lambda itself; the baselines have no regulariser
    at all."""
    t, chance, lam_t = torch.tensor([3, 900, 7, 7]), torch.rand(4), every_lambda()
    for method in ("adv", "ran", "inv"):
        found, weight, parts = beyond.plan(lam_t, t, chance, method)
        assert found is t and weight.tolist() == [1] * 4 and parts == [(slice(0, 4), method, 1.0)]
    for method in ("ddpm", "ambient"):
        assert beyond.weights(Schedule.named("linear", 1000), "paper", method=method) == (None, None)
        found, weight, parts = beyond.plan(lam_t, t, chance, method, 0.25)
        assert found is t and weight.tolist() == [1] * 4 and parts == [(slice(0, 4), method, 1.0)]


@pytest.mark.parametrize("settings", [{}, dict(lam=1.0, lam_units="eps", omega=3.0, gamma=0.1)], ids=str)
def test_timesteps_of_a_share_are_drawn_where_the_loss_weighs_most(settings):
    """Catches a q(t) that is not that of 1 + lambda_t (its steps shifted by one, say), a factor that is not
    uniform / q(t), and other rows' t or weight touched. The Trainer's own table is checked against the
    formula."""
    N = 200_000
    lam_t = every_lambda(**settings)
    assert torch.allclose(trainer(**settings).lam_t.double(), lam_t, rtol=1e-5)
    chance, uniform = ((torch.arange(N) + 0.5) / N).repeat(4), torch.zeros(4 * N, dtype=torch.long)
    t, weight, parts = beyond.plan(lam_t, uniform, chance, "adv", 0.25)
    assert parts == [(slice(0, N), "adv", 4.0), (slice(N, 4 * N), "ddpm", 1.0)]
    total = 1 + lam_t
    counts = torch.bincount(t[:N], minlength=1000)
    assert (counts - N * total / total.sum()).abs().max() < 3
    torch.testing.assert_close(weight[:N].double(), total.mean() / total[t[:N]], rtol=1e-4, atol=0)
    assert not t[N:].any() and bool((weight[N:] == 1).all())


@pytest.mark.parametrize("weighting", ["balanced", "edm"])
@pytest.mark.parametrize("method, settings", [
    ("adv", {}), ("adv", dict(lam=1.0, lam_units="eps", omega=3.0, gamma=0.1)), ("ran", {}), ("ddpm", {})])
def test_weightings_by_hand(weighting, method, settings):
    """Catches a weight that is not 1 / (1 + c_t), or not EDM's of D, (sigma^2 + sigma_data^2) / (sigma
    sigma_data)^2, in terms of eps, of which D's error is sigma times; one that reaches some rows, or depends
    on more than t, which would move the minimiser; and a Trainer that takes other settings."""
    lam, lam_units, omega, gamma = (settings.get(name, default) for name, default in (
        ("lam", 0.3), ("lam_units", "x"), ("omega", 2.0), ("gamma", 8 / 255)))
    s2 = 1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    c = lam * (s2**(omega / 2) * 0.92420 + gamma) / (math.sqrt(3) * s2)
    c = c * (np.sqrt(s2) if lam_units == "eps" else 1) * dict(adv=2.540, ran=1, ddpm=0)[method]
    sigma, weight = np.sqrt(s2 / (1 - s2)), 1 / (1 + c)
    if weighting == "edm":
        weight = weight * sigma**2 * (sigma**2 + 0.4**2) / (sigma * 0.4)**2
    made = trainer(weighting=weighting, method=method, network=dict(sigma_data=0.4), **settings)
    t, chance = torch.randint(1000, (4096,)), torch.rand(4096)
    for reg_share in (1.0, 0.5):
        found, given, parts = beyond.plan(made.lam_t, t, chance, method, reg_share, *made.tables)
        assert weighting == "edm" or found is t
        assert given.numpy() == pytest.approx(weight[found], rel=1e-3)
        assert len(parts) == (2 if reg_share < 1 and method != "ddpm" else 1)


def test_edm_draws_noise_levels_from_its_normal():
    """Catches t shifted by a step, another mean or deviation, regularised rows drawn otherwise, and t outside
    the schedule: of every t as often as the normal of ln sigma has its nearest there."""
    schedule, N = Schedule.named("linear", 1000), 1000
    _, below = beyond.weights(schedule, "edm", 0.5)
    t = torch.arange(1000).repeat(N)
    chance = ((torch.arange(N) + 0.5) / N).repeat_interleave(1000)
    found, _, _ = beyond.plan(every_lambda(), t, chance, "adv", 0.25, torch.ones(1000), below)
    logs = schedule.noise_level.log().numpy()
    for quantile in (0.01, 0.1, 0.5, 0.9, 0.99, 0.9999):
        wanted = -1.2 + 1.2 * float(torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)))
        nearest = int(np.abs(logs - wanted).argmin())
        assert int(found.sort().values[round(quantile * len(found))]) == pytest.approx(nearest, abs=1)
    ends = beyond.plan(every_lambda(), torch.tensor([0, 999]), torch.tensor([0.0, 1 - 2**-24]), "ddpm", 1.0,
                       torch.ones(1000), below)[0]
    assert ends[0] == 0 and 900 < ends[1] < 1000 and len(found) == 10**6


@pytest.mark.parametrize("reg_share, micro", [(1.0, 3), (0.5, None), (0.25, 3), (0.125, None)])
def test_regulariser_on_a_share_is_unbiased(reg_share, micro, monkeypatch):
    """Catches a share that is weighted wrongly, left out or counted twice: rows of one kind give the whole
    batch's gradient at any share and microbatch; and the DDPM term, which sees every row at every share."""
    same = [part[:1].expand(8, *part.shape[1:]) for part in train.draw(0, 0, 8, (3, 8, 8), 1000, "cpu")]
    monkeypatch.setattr(train, "draw", lambda *args: same)  # eight times the same draws, and the same image
    # drawn t: a test of its own
    plan = lambda lam_t, t, *rest: (t, torch.ones(8), beyond_plan(lam_t, t, *rest)[2])
    beyond_plan = beyond.plan
    monkeypatch.setattr(beyond, "plan", plan)
    x_0 = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).expand(8, -1, -1, -1)
    found = []
    for share, microbatch in ((reg_share, micro), (1.0, None)):
        t = trainer(batch=8, reg_share=share, method="ran", lam=0.7)
        randomised(t.model)
        t.microbatch = microbatch or t.microbatch
        found.append((t.advance(x_0), gradients(t)))
    assert difference(found[0][1], found[1][1]) < 1e-5
    for name in ("ddpm", "reg"):
        assert float(found[0][0][name]) == pytest.approx(float(found[1][0][name]), rel=1e-5)


def test_a_share_must_be_whole_rows():
    """1, 1/2, 1/3 ... of every process's part; typed decimals are made exact."""
    assert beyond.rounded_share(0.333, 12, 2) == beyond.rounded_share(0.33, 12, 2) == 1 / 3
    assert beyond.rounded_share(1.0, 3, 3) == 1
    for share, batch, world in [(0.3, 30, 1), (0.99, 30, 1), (0.25, 8, 4), (1.5, 8, 1), (2.0, 8, 1)]:
        with pytest.raises(UserError, match=f"--reg-share {share}: must be 1, 0.5"):
            beyond.rounded_share(share, batch, world)


# ---------------------------------------------------------------------------------------- the sampler (Eq. 4)

def test_eq4_in_closed_form():
    """One reverse step without a clamp is Eq. 4 as printed; the last step adds no noise; v interpolates log
    variances."""
    schedule = Schedule.named("linear", 1000)
    x, eps, z = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    for t in (700, 0):
        beta, alpha_bar = float(schedule.beta[t]), float(schedule.alpha_bar[t])
        mean = (x - beta / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(1 - beta)
        found = sample.reverse_step(lambda x, t: eps, schedule, x, t, z, clamp=None)
        assert difference(found.x, mean + (t > 0) * math.sqrt(beta) * z) < 1e-10                    # Eq. 4
        assert difference(found.mean, mean) < 1e-10
        assert torch.equal(sample.reverse_step(lambda x, t: eps, schedule, x, t, clamp=None).x, found.mean)
    v = torch.full_like(x, -1.0)
    v[1] = 0.0
    found = sample.reverse_step(lambda x, t: torch.cat([eps, v], 1), schedule, x, 700,
                                variance="learned")
    beta = float(schedule.beta[700])
    small = math.log(beta * (1 - float(schedule.alpha_bar[699])) / (1 - float(schedule.alpha_bar[700])))
    log_variance = 2 * found.sigma[:, 0, 0, 0].log()
    assert log_variance.tolist() == pytest.approx([small, (small + math.log(beta)) / 2])


def test_the_mean_is_of_the_clamped_x0():
    """Catches a clamp after the mean: with x0_hat far outside [-1, 1], mean, DDIM step and both halves of
    Heun's are those of x0_hat = 1."""
    schedule, i = Schedule.named("linear", 1000), 500
    x = torch.full((1, 3, 2, 2), 0.3, dtype=torch.float64)
    ab, before, beta = (float(table[500])
                        for table in (schedule.alpha_bar, schedule.alpha_bar_prev, schedule.beta))
    far = lambda x, t: torch.full_like(x, -50.0)
    ddpm, ddim, heun = (sample.reverse_step(far, schedule, x, i, sampler=name)
                        for name in ("ddpm", "ddim", "heun"))
    assert bool((ddpm.x0_hat == 1).all())
    mean = (math.sqrt(before) * beta + math.sqrt(1 - beta) * (1 - before) * 0.3) / (1 - ab)      # section A.2
    assert ddpm.mean.flatten().tolist() == pytest.approx([mean] * 12)
    eps = (0.3 - math.sqrt(ab)) / math.sqrt(1 - ab)
    assert ddim.x.flatten().tolist() == pytest.approx([math.sqrt(before) + math.sqrt(1 - before) * eps] * 12)
    assert torch.allclose(heun.x, ddim.x, rtol=1e-12) and bool((heun.x0_hat == 1).all())


def test_sampler_reproduces_a_known_gaussian():
    """With the exact eps of N(0.3, 0.5^2) data, 1000 DDPM steps end at that Gaussian."""
    schedule = Schedule.named("linear", 1000).to("cpu")

    def exact(x, t):                                        # E[eps | x_t] for Gaussian data
        a, s = unet.at(schedule.sqrt_alpha_bar, t, x), unet.at(schedule.sqrt_one_minus_alpha_bar, t, x)
        return s * (x - 0.3 * a) / (a**2 * 0.25 + s**2)

    x = sample.sample(exact, schedule, image_noise("sample", 0, range(20), (3, 16, 16)), clamp=None)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name, sampler", [
    ("fgsm", "ddpm"), ("fgsm", "ddim"), ("pgd", "ddpm"),
    ("eot", "ddpm"), ("drift", "ddpm"), ("noise", "ddim"), ("fgsm", "heun"), ("trajectory", "ddpm")])
def test_sampler_and_attacks_neither_wait_for_the_device_nor_mix_devices(name, sampler, on_meta):
    """As for a training step: the whole loop on the meta device, attacked and measured."""
    full = Schedule.named("linear", 100)
    network = UNet(size=8, learn_sigma=True, sigma_data=0.5, schedule=full, **TINIEST).to(on_meta)
    schedule = full.respaced(3).to(on_meta)
    hook = attacking(name, {0, 2}, network, schedule, range(2), "learned", (-1.0, 1.0), sampler,
                     iters=1, eot=2)
    noise = common.image_noise("sample", 0, range(2), (3, 8, 8), on_meta)
    x_0 = sample.sample(network, schedule, noise, **hook.how, attack=hook)
    assert x_0.device.type == "meta" and hook.sums["steps"] == 2


# ------------------------------------------------------------------------------------------ Algorithms 2 to 4

ASKED = dict(steps_attacked=3, where="spread", phi=1.0, iters=20, eot=5, stride=2.5, as_printed=False,
             eps_scale=1.0)
LINEAR = 0.4 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# a learned variance, fixed
V = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attacking(name, steps, model, schedule, indices, variance="large", clamp=None, sampler="ddpm", **changes):
    """The hook of one shard, with the command line's defaults."""
    how = dict(sampler=sampler, variance=variance, clamp=clamp)
    return attack.TrajectoryAttack(ASKED | dict(name=name) | changes, steps, model, schedule, how, indices, 3)


def sampled(hook, shape=(3, 8, 8), dtype=torch.float32):
    """-> the images that a hook attacks [B, C, H, W], and its measures."""
    noise = (z.to(dtype) for z in image_noise("sample", 3, hook.indices, shape))
    x_0 = sample.sample(hook.model, hook.schedule, noise, **hook.how, attack=hook)
    return x_0, hook.measures(x_0.permute(0, 2, 3, 1).numpy())


def linear(x, t):
    """eps_theta(x, t) = c(t) x A^T, for which the attacks can be written down: x [B, 3, 2, 2]."""
    return ((1 + t.double() / 1000)[:, None] * (x.flatten(1) @ LINEAR.T)).view_as(x)


def linear_with_variance(x, t):
    """The same with a learned variance that does not depend on x."""
    return torch.cat([linear(x, t), V.view(1, 3, 2, 2).expand_as(x)], dim=1)


@pytest.mark.parametrize("name, sampler, variance, as_printed", [
    ("noise", "ddpm", "small", False), ("fgsm", "ddpm", "large", False), ("fgsm", "ddpm", "learned", False),
    ("fgsm", "ddim", "large", False), ("pgd", "ddpm", "large", False), ("pgd", "ddim", "small", False),
    ("pgd", "ddpm", "large", True), ("eot", "ddpm", "large", False), ("eot", "ddpm", "learned", False),
    ("eot", "ddpm", "large", True), ("drift", "ddpm", "large", False), ("drift", "ddim", "large", False),
    ("fgsm", "heun", "large", False), ("pgd", "heun", "small", False), ("drift", "heun", "large", False),
    ("trajectory", "ddpm", "learned", False), ("trajectory", "ddim", "large", False),
    ("trajectory", "heun", "small", False)])
def test_attacks_by_hand(name, sampler, variance, as_printed):
    """A whole attacked run in numpy: each algorithm's cost, start, step, projection and scale, sigma(t), the
    noise that the undisturbed and the attacked step share, steps that are not attacked, both trajectories
    beside, distances, passes."""
    schedule, B, N, phi, eps_scale, stride = Schedule.named("linear", 100).respaced(5), 3, 4, 0.4, 0.7, 0.9
    indices, chosen, shape = range(7, 7 + B), {3, 2, 0}, (3, 2, 2)
    model = linear_with_variance if variance == "learned" else linear
    hook = attacking(name, chosen, model, schedule, indices, variance, None, sampler, phi=phi, iters=N, eot=2,
                     eps_scale=eps_scale, stride=stride, as_printed=as_printed)
    x_0, sums = sampled(hook, shape, torch.float64)

    noise, draws = (image_noise(purpose, 3, indices, shape) for purpose in ("sample", "attack"))
    flat = lambda stream: next(stream).double().flatten(1).numpy()
    A, beta_full = LINEAR.numpy(), np.linspace(10 * 1e-4, 10 * 0.02, 100)
    t = np.array([0, 25, 50, 74, 99])                       # round(i 99 / 4), halves to even
    alpha_bar = np.cumprod(1 - beta_full)[t]
    previous = np.array([1, *alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    small = beta * (1 - previous) / (1 - alpha_bar)
    log_small = np.log([small[1], *small[1:]])
    log_large = np.log([small[1], *beta[1:]])
    v = (V.numpy() + 1) / 2

    def tables(k):
        """-> x0_hat = x @ to_x0, next mean = x @ to_next, sigma(t)."""
        to_x0 = (np.eye(12) - np.sqrt(1 - alpha_bar[k]) * (1 + t[k] / 1000) * A.T) / np.sqrt(alpha_bar[k])
        if sampler != "ddpm":
            to_eps = (np.eye(12) - np.sqrt(alpha_bar[k]) * to_x0) / np.sqrt(1 - alpha_bar[k])
            to_next = np.sqrt(previous[k]) * to_x0 + np.sqrt(1 - previous[k]) * to_eps
            if sampler == "heun" and k:                     # d (x / a) / d sigma = eps, by the trapezoid rule
                mean = (to_eps + to_next @ ((1 + t[k - 1] / 1000) * A.T)) / 2
                sigmas = np.sqrt(1 / alpha_bar - 1)
                to_next = np.sqrt(previous[k]) * (np.eye(12) / np.sqrt(alpha_bar[k])
                                                  + (sigmas[k - 1] - sigmas[k]) * mean)
        else:                                               # section A.2
            to_next = (np.sqrt(previous[k]) * beta[k] * to_x0
                       + np.sqrt(1 - beta[k]) * (1 - previous[k]) * np.eye(12)) / (1 - alpha_bar[k])
        log_sigma2 = {"large": log_large[k], "small": log_small[k],
                      "learned": v * np.log(beta[k]) + (1 - v) * log_small[k]}
        return to_x0, to_next, np.exp(0.5 * log_sigma2[variance])

    x = flat(noise)
    clean = control = None
    kept = size = 0
    for k in reversed(range(5)):
        to_x0, to_next, sigma = tables(k)
        xi = flat(noise) * sigma * (k > 0) if sampler == "ddpm" else 0.0          # Eq. 4's noise of this step
        if k in chosen:
            clean = x if clean is None else clean
            control = x if control is None else control
            r, draw = eps_scale * sigma, flat(draws)
            start = phi * r * draw
            if name == "noise":
                moved = r * np.sign(draw)
            elif name == "fgsm":                                                    # Algorithm 2
                moved = r * np.sign(start @ to_next @ to_next.T)
            elif name == "drift":
                moved = r * np.sign((x + start - clean) @ to_x0 @ to_x0.T)
            elif name == "trajectory":                      # the process's rest: x_0 = x_t @ to_end + ...
                to_end, moved = functools.reduce(np.matmul, (tables(j)[1] for j in range(k, -1, -1))), start
                for _ in range(N):
                    sign = np.sign((x + moved - clean) @ to_end @ to_end.T)
                    moved = np.clip(moved + stride * r / N * sign, -r, r)
            elif name == "pgd":                                                     # Algorithm 3
                moved = start
                for _ in range(N):
                    sign = np.sign(moved @ to_next @ to_next.T)
                    moved = r / N * sign if as_printed else np.clip(moved + stride * r / N * sign, -r, r)
            else:                                                                   # Algorithm 4
                delta = start
                root, step = (np.sqrt(alpha_bar[k]), 1) if as_printed else (1, stride)
                for _ in range(N):
                    gradients = [((root * delta @ to_next + sigma * (k > 0) * flat(draws)) - xi) @ to_next.T
                                 for _ in range(2)]
                    delta = np.clip(delta + step * r / N * np.sign(np.mean(gradients, axis=0)), -r, r)
                moved = root * delta
                flat(draws), flat(draws)                    # the cost at the end, measured
            control = control + np.abs(moved) * np.sign(flat(draws))
            kept += (np.sign(moved) == np.sign(draw)).mean(axis=1).sum()
            size += np.sqrt(((moved / r) ** 2).mean(axis=1)).sum()
            x = x + moved
        x = x @ to_next + xi
        if clean is not None:
            clean, control = clean @ to_next + xi, control @ to_next + xi
    assert x_0.flatten(1).numpy() == pytest.approx(x, rel=1e-9, abs=1e-9)
    assert sums["moved"] == pytest.approx(np.linalg.norm(x - clean, axis=1).sum(), rel=1e-6)
    assert sums["control"] == pytest.approx(np.linalg.norm(control - clean, axis=1).sum(), rel=1e-6)
    assert sums["size"] == pytest.approx(size, rel=1e-6)
    assert sums.get("kept", kept) == pytest.approx(kept, rel=1e-6)
    assert (sums["steps"], sums["attacked"], sums["pixels"], sums["outside"]) == (3, 9, 12, 0)
    if name == "trajectory":            # forwards, again and backwards through 4, 3 and 1 steps to the end
        looks, ahead = (5, 7 + 5 + 1) if sampler == "heun" else (3, 4 + 3 + 1)
        assert (sums["forwards"], sums["backwards"]) == (looks + 2 * N * ahead, N * ahead)
        assert torch.equal(hook.x_0_clean, hook.clean)      # foreseen, with the noise that sample() then drew
        return
    passes = {"noise": (1, 0), "fgsm": (2, 1), "drift": (2, 1), "pgd": (1 + N, N), "eot": (1 + N, N)}[name]
    if sampler == "heun":                                   # two evaluations in steps 3 and 2, one in step 0
        assert sums["forwards"] == 5 * passes[0]
        assert sums["backwards"] == passes[1] * (3 if name == "drift" else 5)
        passes = 2 * passes[0], passes[1] * (1 if name == "drift" else 2)
    else:
        assert (sums["forwards"] / 3, sums["backwards"] / 3) == passes
    assert passes == attack.needed(dict(attack=hook.asked, sampler=sampler))


@pytest.fixture(scope="module")
def network():
    """A tiny U-Net with random weights, whose parameters ask for gradients."""
    return randomised(UNet(size=8, **TINIEST)).eval()


@pytest.mark.parametrize("name", ["fgsm", "pgd", "eot", "drift", "trajectory"])
def test_attack_climbs_and_keeps_to_the_state(network, name):
    """On a U-Net, x0_hat clamped: the cost rises over its random start, more so in larger balls; the ball
    holds; no gradient reaches a parameter and no graph leaves the hook; the undisturbed trajectory is
    sample()'s own."""
    schedule, costs = Schedule.named("linear", 100).respaced(12).to("cpu"), []
    clean = sample.sample(network, schedule, image_noise("sample", 3, range(4), (3, 8, 8)))
    for eps_scale in (0.5, 1.0):
        x_0, sums = sampled(attacking(name, {2, 1}, network, schedule, range(4), clamp=(-1.0, 1.0),
                                      iters=3, eps_scale=eps_scale))
        assert sums["moved"] == pytest.approx(float((x_0 - clean).flatten(1).norm(dim=1).sum()), rel=1e-6)
        assert sums["end"] > sums["start"] > 0 and sums["outside"] == sums["zero"] == sums["broken"] == 0
        assert sums["moved"] > 0 and 0 < sums["size"] / sums["attacked"] <= 1 + 1e-6
        costs.append(sums["end"])
    assert costs[1] > costs[0]
    assert not x_0.requires_grad and all(p.grad is None for p in network.parameters())


def test_pgd_reaches_at_least_fgsms_cost(network):
    """Algorithm 3 on the step that Algorithm 2 attacks: 20 accumulated steps are worth no less than one whole
    one, and as printed far less."""
    schedule = Schedule.named("linear", 100).respaced(8).to("cpu")
    end = {(name, printed): sampled(attacking(name, {2}, network, schedule, range(8), clamp=(-1.0, 1.0),
                                              as_printed=printed))[1]["end"]
           for name, printed in (("fgsm", False), ("pgd", False), ("pgd", True))}
    assert end["pgd", False] >= end["fgsm", False] > 10 * end["pgd", True]


def test_attack_counts_what_would_fake_robustness(network, monkeypatch):
    """A perturbation outside its ball; a gradient that is zero everywhere; one that is NaN."""
    schedule = Schedule.named("linear", 100).respaced(4).to("cpu")
    sums = lambda name, model, step, clamp=None: sampled(
        attacking(name, {step}, model, schedule, range(4), clamp=clamp, iters=3))[1]
    constant = lambda x, t: 0 * x + 100        # x0_hat far outside the clamp, and at t = 0 nothing but x0_hat
    found = sums("pgd", constant, 0, (-1.0, 1.0))
    assert (found["zero"], found["broken"], found["gradients"]) == (12, 0, 12)
    assert sums("fgsm", constant, 1, (-1.0, 1.0))["zero"] == 0
    assert sums("fgsm", lambda x, t: torch.where(x > 1, x * float("nan"), x), 2)["broken"] == 4
    real = attack.fgsm
    too_far = lambda step, x_t, *rest, **ball: x_t + 1.001 * (real(step, x_t, *rest, **ball) - x_t)
    monkeypatch.setattr(attack, "fgsm", too_far)
    assert sums("fgsm", network, 2)["outside"] == 4


@pytest.mark.parametrize("name, sampler", [
    ("fgsm", "ddim"), ("eot", "ddpm"), ("drift", "ddpm"), ("trajectory", "ddpm")])
def test_attack_belongs_to_the_image(name, sampler):
    """Images 0 to 4 together, and in twos with other neighbours: every random draw of the attack is the
    image's own."""
    schedule = Schedule.named("linear", 100).respaced(5)
    hook = lambda indices: attacking(name, {4, 2}, linear, schedule, indices, "large", (-1.0, 1.0), sampler,
                                     iters=3)
    attacked = lambda indices: sampled(hook(indices), (3, 2, 2), torch.float64)[0]
    parts = torch.cat([attacked(indices) for indices in (range(0, 2), range(2, 4), range(4, 5))])
    assert (attacked(range(5)) - parts).abs().max() < 1e-10


def test_attacked_steps():
    """How many, which, no step twice, and that `first` is the first one sampled: the noisiest."""
    for where in ("spread", "first", "last", "random"):
        for total, count in [(100, 0), (100, 1), (100, 25), (100, 33), (7, 7), (1000, 999)]:
            chosen = attack.attacked_steps(total, count, where)
            assert len(chosen) == count and chosen <= set(range(total))
    assert attack.attacked_steps(10, 3, "first") == {9, 8, 7}
    assert attack.attacked_steps(10, 3, "last") == {0, 1, 2}
    quarter = sorted(attack.attacked_steps(100, 25, "spread"))
    assert set(np.diff(quarter)) == {4} and 0 < quarter[0] < 4 and 95 < quarter[-1] < 99
    assert attack.attacked_steps(100, 25, "random", 1) != attack.attacked_steps(100, 25, "random", 2)
    assert attack.attacked_count("25%", 40) == 10 and attack.attacked_count("40", 40) == 40


def test_streams_of_image_5():
    """The noise of image 5 whatever it is drawn with; another image, seed, purpose and the next step
    differ."""
    alone, both = image_noise("sample", 3, [5], (3, 4, 4)), image_noise("sample", 3, [9, 5], (3, 4, 4))
    steps = [(next(alone), next(both)) for _ in range(20)]
    assert all(torch.equal(a[0], b[1]) and not torch.equal(b[0], b[1]) for a, b in steps)
    assert len({float(a.sum()) for a, _ in steps}) == 20
    others = [image_noise("sample", 4, [5], (3, 4, 4)), image_noise("attack", 3, [5], (3, 4, 4))]
    assert not any(torch.equal(next(other), steps[0][0]) for other in others)
    assert not torch.equal(torch.randn(8, generator=generator("train", 0, 5)),
                           torch.randn(8, generator=generator("sample", 0, 5)))
