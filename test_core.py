"""The kit against independent truths: closed forms, float64 formulas, finite differences, other implementations' values.

    python -m pytest -q test_core.py            # under three minutes on two cores; `bash run_all.sh test` sets all up first
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

import attack
import data
import fid
import memorize
import report
import sample
import toy3d
import train
import unet
from data import Images, UserError, command_line
from toy3d import Cell, Networks
from unet import PRESETS, Schedule, UNet

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"                             # reference values of other implementations, where they are at hand
TINY = dict(channels=32, res_blocks=1, mult=(1, 2), attn=(4,), heads=2)
TINY_FLAGS = "--channels 32 --res-blocks 1 --mult 1,2 --attn 4 --heads 2 --size 8 --batch 8".split()

torch.set_num_threads(1)                                # small tensors: a second thread only waits


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """Four images instead of 36 at the end of a training in this process: seconds saved."""
    monkeypatch.setattr(train, "GRID", 4)


def golden(name):
    """A file of reference values, or a skipped test."""
    path = SHARED / "golden" / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return torch.load(path, weights_only=True)


def difference(a, b):
    """||a - b|| / ||b||."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def call(monkeypatch, module, *argv):
    """Runs a script's main() in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.main()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def command(script, *argv, processes=1):
    """The command line of a script, under torchrun where it takes several processes; `--` as torchrun would claim --n."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    return [*launch, str(HERE / script), *map(str, argv)]


def run(script, *argv, processes=1, check=True):
    """Runs a script in processes of its own. -> the finished process, with its output as text."""
    done = subprocess.run(command(script, *argv, processes=processes), capture_output=True, text=True, timeout=170,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with a prepared data set: 64 shapes of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("data")
    run("data.py", "shapes", "--n", 64, "--size", 8, "--out", folder)
    return folder


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A finished tiny adversarial training of four steps, uninterrupted."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run("train.py", *flags(shapes, out, "--steps", 4, "--save-every", 2))
    return out


def flags(shapes, out, *more):
    """The flags of a tiny training on corrupted shapes."""
    return [*TINY_FLAGS, "--data", "shapes", "--data-dir", shapes, "--p", 0.9, "--sigma", 0.2, "--out", out, *more]


def randomised(network, seed=0):
    """A network with random values in every parameter, those that start at zero too."""
    torch.manual_seed(seed)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network


# ------------------------------------------------------------------------------------------------------------- unet.py

def test_unet_matches_improved_diffusion():
    """Outputs and gradients of the field's network, every tensor random: any wrong layer, order or key."""
    g = golden("unet_A.pt")
    network = UNet(**unet.network_of(g["state_dict"], size=16, heads=2))
    network.load_state_dict(g["state_dict"])
    x = g["x"].clone().requires_grad_()
    out = network(x, g["t"])
    out.square().mean().backward()
    assert difference(out, g["out"]) < 1e-5
    assert difference(x.grad, g["grad_x"]) < 1e-5
    grads = dict(network.named_parameters())
    large = {k: v for k, v in g["grad_params"].items() if v.norm() > 1e-6}     # the others vanish at one channel a group
    assert len(large) > 80
    assert max(difference(grads[k].grad, v) for k, v in large.items()) < 5e-5


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
    """The project's own normalisation: values against PyTorch's in float64, gradients against finite differences."""
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64, requires_grad=True) + 50      # a mean far from 0: no cancellation
    weight = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    expected = F.group_norm(x, 4) * weight.transpose(1, 2)[..., None] + bias.transpose(1, 2)[..., None]
    assert difference(unet._Normalise.apply(x, weight, bias, 4, 1e-5), expected) < 1e-9
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: unet._Normalise.apply(*v, 4, 1e-5), (x, weight, bias))
    single = torch.randn(2, 64, 8, 8) + 100
    assert difference(unet.GroupNorm(64)(single), F.group_norm(single.double(), 32)) < 1e-4


def test_attention_splits_heads_first():
    """Attention by its formula, head by head: the order (head, then q k v) that public weights need."""
    attention = randomised(unet.Attention(64, heads=2)).double()
    attention.norm.float()                                  # GroupNorm is float32 by design
    x = torch.randn(2, 64, 3, 3)
    tokens = F.group_norm(x.double(), 32, attention.norm.weight.double(), attention.norm.bias.double()).flatten(2)
    qkv = attention.qkv.weight[:, :, 0] @ tokens + attention.qkv.bias[:, None]             # [2, 192, 9]
    out = []
    for head in qkv.chunk(2, dim=1):
        q, k, v = head.chunk(3, dim=1)                      # each [2, 32, 9]
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(32), dim=2)
        out.append(v @ weights.transpose(1, 2))
    expected = x + (attention.proj_out.weight[:, :, 0] @ torch.cat(out, 1) + attention.proj_out.bias[:, None]).view(x.shape)
    assert difference(attention.float()(x), expected) < 1e-5


def test_timestep_embedding():
    """cos then sin of t 10000^(-k/half), by hand for t = 7 and width 8."""
    angles = [7 * 10000 ** (-k / 4) for k in range(4)]
    expected = torch.tensor([[math.cos(a) for a in angles] + [math.sin(a) for a in angles]])
    assert torch.allclose(unet.timestep_embedding(torch.tensor([7]), 8), expected, atol=1e-6)


def test_bfloat16_is_the_same_network_up_to_its_precision():
    """Autocast touches the convolutions alone: near the float32 output, float32 itself, and gradients flow."""
    network = randomised(UNet(size=8, **TINY))
    x, t = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([3, 700])
    out = unet.in_bfloat16(network, torch.device("cpu"))(x, t)
    assert out.dtype == torch.float32 and 1e-6 < difference(out, network(x, t)) < 0.03
    slope, = torch.autograd.grad(out.square().sum(), x)
    assert difference(slope, torch.autograd.grad(network(x, t).square().sum(), x)[0]) < 0.1


def test_presets_have_the_published_sizes():
    """Tensors and parameters of the CIFAR-10 network, fixed and learned variance, as improved-diffusion has them."""
    with torch.device("meta"):
        fixed, learned = UNet(size=32, **PRESETS["cifar10"]), UNet(size=32, learn_sigma=True, **PRESETS["cifar10"])
    assert len(fixed.state_dict()) == 446
    assert sum(p.numel() for p in fixed.parameters()) == 52_542_979
    assert sum(p.numel() for p in learned.parameters()) == 52_546_438


@pytest.mark.parametrize("preset, size", [("cifar10", 32), ("imagenet64", 64), ("lsun_bedroom", 256), ("small", 32)])
def test_architecture_is_read_off_a_bare_state_dict(preset, size):
    """Every preset, from its tensors alone."""
    with torch.device("meta"):
        state = UNet(size=size, learn_sigma=preset == "cifar10", **PRESETS[preset]).state_dict()
    found = unet.network_of(state, size, PRESETS[preset]["heads"])
    expected = dict(size=size, in_channels=3, scale_shift=True, learn_sigma=preset == "cifar10") | PRESETS[preset]
    assert found == {k: v for k, v in expected.items() if k != "dropout"}


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_match_improved_diffusion(name):
    """Every table to 1e-12 in float64, the whole process and the respaced ones."""
    pairs = dict(beta="betas", alpha_bar="alphas_cumprod", alpha_bar_prev="alphas_cumprod_prev",
                 sqrt_alpha_bar="sqrt_alphas_cumprod", sqrt_one_minus_alpha_bar="sqrt_one_minus_alphas_cumprod",
                 coefficient_x0="posterior_mean_coef1", coefficient_xt="posterior_mean_coef2",
                 posterior_variance="posterior_variance", log_variance_small="posterior_log_variance_clipped")
    spaced = golden("space_timesteps.pt")
    full = Schedule.named(name, 1000)
    cases = [(full, golden("schedules.pt")[name])]
    for steps in (300, 500):
        assert torch.equal(full.respaced(steps).timesteps, spaced[f"[{steps}]"])
        cases.append((full.respaced(steps), spaced[f"spaced/{name}/[{steps}]"]))
    for schedule, reference in cases:
        for ours, theirs in pairs.items():
            assert torch.allclose(getattr(schedule, ours), reference[theirs], rtol=1e-12, atol=1e-15), ours


def test_schedule_in_closed_form():
    """The ends of both schedules, beta scaled with T, and alpha_bar kept by respacing: without any file."""
    linear = Schedule.named("linear", 1000)
    assert float(linear.beta[0]) == 1e-4 and float(linear.beta[-1]) == pytest.approx(0.02, rel=1e-14)
    assert float(linear.alpha_bar[1]) == pytest.approx((1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999), rel=1e-14)
    assert float(Schedule.named("linear", 100).beta[-1]) == pytest.approx(0.2, rel=1e-14)
    cosine = Schedule.named("cosine", 10)
    assert float(cosine.alpha_bar[4]) == pytest.approx(math.cos(0.508 / 1.008 * math.pi / 2) ** 2
                                                       / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rel=1e-12)
    short = linear.respaced(300)
    assert short.timesteps[:4].tolist() == [0, 3, 7, 10] and short.timesteps[-2:].tolist() == [996, 999]
    assert torch.allclose(short.alpha_bar, linear.alpha_bar[short.timesteps], rtol=1e-12)
    assert float(short.log_variance_large[1]) == pytest.approx(math.log(1 - linear.alpha_bar[3] / linear.alpha_bar[0]))
    # the variance of q(x_{t-1} | x_t, x_0), from Bayes' rule for two Gaussians: 1 / (alpha / beta + 1 / (1 - alpha_bar_prev))
    beta, before = linear.beta[500], 1 - linear.alpha_bar[499]
    assert float(linear.posterior_variance[500]) == pytest.approx(float(1 / ((1 - beta) / beta + 1 / before)), rel=1e-12)


def test_checkpoints_survive_and_damage_is_named(tmp_path):
    """The file before the last is kept; one flipped byte, a cut file, a pickle and a stranger are refused by name."""
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        unet.save_checkpoint(path, dict(config={}, step=step, model={"w": torch.arange(1000.0)}, ema={}))
    assert unet.load_checkpoint(tmp_path)["step"] == 2
    assert unet.load_checkpoint(tmp_path / "checkpoint-previous.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-previous.pt", "checkpoint.pt"]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.float32(500).tobytes())] ^= 1
    for damaged in (bytes(flipped), whole[:len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="checkpoint.pt: damaged.*checkpoint-previous.pt"):
            unet.load_checkpoint(tmp_path)
    torch.save({"config": print}, path)                     # a pickled function: weights_only must refuse it
    with pytest.raises(UserError, match="damaged"):
        unet.load_checkpoint(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="neither"):
        unet.load_checkpoint(path)
    with pytest.raises(UserError, match="no such checkpoint"):
        unet.load_checkpoint(tmp_path / "nowhere")


def test_public_state_dict_is_sampled(tmp_path, monkeypatch):
    """A bare state dict needs --size, then gives float-identical outputs to the network it came from."""
    network = randomised(UNet(size=8, **TINY))
    torch.save(network.state_dict(), tmp_path / "public.pt")
    with pytest.raises(UserError, match="--size"):
        unet.load_model(tmp_path / "public.pt")
    loaded, schedule, config = unet.load_model(tmp_path / "public.pt", size=8, heads=2, schedule="cosine", timesteps=40)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 39])
    assert torch.equal(loaded(x, t), network(x, t)) and len(schedule) == 40
    call(monkeypatch, sample, tmp_path / "public.pt", "--size", 8, "--heads", 2, "--schedule", "cosine", "--timesteps", 40,
         "--n", 3, "--steps", 4, "--out", tmp_path / "public.npz")
    assert np.load(tmp_path / "public.npz")["arr_0"].shape == (3, 8, 8, 3)


# ----------------------------------------------------------------------------------------------------------- sample.py

@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_reverse_steps_match_improved_diffusion(name):
    """Posterior mean, variance and x0_hat, one DDIM step, a respaced step and a 50-step DDIM loop, clamped and not."""
    weights, g = golden("unet_A.pt")["state_dict"], golden("diffusion_A.pt")
    network = UNet(**unet.network_of(weights, size=16, heads=2))
    network.load_state_dict(weights)
    network.eval()
    full, x, i = Schedule.named(name, 1000), g["x"], g["t"]
    schedule = full.to("cpu")

    def close(ours, theirs, limits=(1e-5,) * 4):
        return all(difference(a, b) < limit for a, b, limit in zip(ours.expand(theirs.shape), theirs, limits))

    with torch.no_grad():
        for clip, clamp in ((True, (-1, 1)), (False, None)):
            for variance in ("small", "large"):
                reference = g[f"p_mean_variance/{name}/FIXED_{variance.upper()}/clip={clip}"]
                mean, log_variance, x0_hat = sample.reverse_distribution(network, schedule, x, i, variance, clamp)
                assert close(mean, reference["mean"]) and close(x0_hat, reference["pred_xstart"])
                assert close(log_variance, reference["log_variance"])
            # At t = 1 the reference derives eps by a float32 cancellation: float64 is as far from it as we are.
            limits = (1e-5, 1e-4 if clip else 1e-5, 1e-5, 1e-5)
            assert close(sample.ddim_step(network, schedule, x, i, clamp), g[f"ddim/{name}/clip={clip}"]["sample"], limits)
            ddim50 = full.respaced(golden("space_timesteps.pt")["ddim50"]).to("cpu")
            loop = sample.sample(network, ddim50, iter([x]), "ddim", clamp=clamp)
            assert close(loop, g[f"ddim50_loop/{name}/clip={clip}"])
        reference = g[f"spaced300_p_mean_variance/{name}/FIXED_SMALL/clip=True"]
        i = torch.as_tensor(reference["index"]).expand(4)
        mean, _, _ = sample.reverse_distribution(network, full.respaced(300).to("cpu"), x, i, "small")
        assert close(mean, reference["mean"])


def test_eq4_in_closed_form():
    """One reverse step without a clamp is Eq. 4 as printed; the last step adds no noise; v interpolates log variances."""
    schedule = Schedule.named("linear", 1000)
    x, eps, z = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    for t in (700, 0):
        i = torch.tensor([t, t])
        beta, alpha_bar = float(schedule.beta[t]), float(schedule.alpha_bar[t])
        expected = (x - beta / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(1 - beta) + (t > 0) * math.sqrt(beta) * z   # Eq. 4
        assert difference(sample.ddpm_step(lambda x, t: eps, schedule, x, i, z, "large", None), expected) < 1e-10
    v = torch.full_like(x, -1.0)
    v[1] = 0.0
    _, log_variance, _ = sample.reverse_distribution(lambda x, t: torch.cat([eps, v], 1), schedule, x, torch.tensor([700, 700]),
                                                     "learned")
    beta = float(schedule.beta[700])
    small = math.log(beta * (1 - float(schedule.alpha_bar[699])) / (1 - float(schedule.alpha_bar[700])))
    assert float(log_variance[0, 0, 0, 0]) == pytest.approx(small)
    assert float(log_variance[1, 0, 0, 0]) == pytest.approx((small + math.log(beta)) / 2)


def test_sampler_reproduces_a_known_gaussian():
    """With the exact eps of N(0.3, 0.5^2) data, 1000 DDPM steps end at that Gaussian."""
    schedule = Schedule.named("linear", 1000).to("cpu")

    def exact(x, t):                                        # E[eps | x_t] for Gaussian data
        a, s = unet.at(schedule.sqrt_alpha_bar, t, x), unet.at(schedule.sqrt_one_minus_alpha_bar, t, x)
        return s * (x - 0.3 * a) / (a**2 * 0.25 + s**2)

    x = sample.sample(exact, schedule, sample.image_noise(0, range(20), (3, 16, 16)), clamp=None)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_noise_belongs_to_the_image():
    """The stream of image 5 whatever it is drawn with; another image, another seed and the next step differ."""
    alone, together = sample.image_noise(3, [5], (3, 4, 4)), sample.image_noise(3, [9, 5], (3, 4, 4))
    steps = [(next(alone), next(together)) for _ in range(20)]
    assert all(torch.equal(a[0], b[1]) and not torch.equal(b[0], b[1]) for a, b in steps)
    assert len({float(a.sum()) for a, _ in steps}) == 20
    assert not torch.equal(next(sample.image_noise(4, [5], (3, 4, 4))), steps[0][0])
    assert len({sample.stream_seed(0, i) for i in range(100_000)}) == 100_000


def test_samples_do_not_depend_on_batch_or_processes(trained, tmp_path, monkeypatch):
    """Batch 2, batch 5, and two processes: the same images; the protocol tells how they were made."""
    common = [trained, "--n", 5, "--steps", 5, "--seed", 1]
    call(monkeypatch, sample, *common, "--batch", 2, "--out", tmp_path / "a.npz")
    call(monkeypatch, sample, *common, "--batch", 5, "--out", tmp_path / "b.npz")
    run("sample.py", *common, "--batch", 2, "--out", tmp_path / "c.npz", processes=2)
    a, b, c = (np.load(tmp_path / f"{name}.npz", allow_pickle=False) for name in "abc")
    assert a["arr_0"].shape == (5, 8, 8, 3) and a["arr_0"].dtype == np.uint8
    assert np.array_equal(a["arr_0"], c["arr_0"])
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1       # one level: float32 rounding at a boundary
    protocol = json.loads(str(a["protocol"]))
    assert (protocol["sampler"], protocol["steps"], protocol["variance"], protocol["step"], protocol["ema"], protocol["method"]
            ) == ("ddpm", 5, "large", 4, True, "adv")
    assert (tmp_path / "a.png").exists() and not (tmp_path / "a.npz.shards").exists()
    assert len(np.unique(a["arr_0"].reshape(5, -1), axis=0)) == 5


def test_sampling_resumes_from_finished_shards(trained, tmp_path, monkeypatch):
    """A run killed after its first shard: the shard is used, not made again; another protocol is refused."""
    common = [trained, "--n", 4, "--steps", 3, "--batch", 2, "--out", tmp_path / "s.npz"]
    real, calls = sample.sample, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, sample, *common)
    assert not (tmp_path / "s.npz").exists()
    with pytest.raises(UserError, match="seed 0, now 1"):
        call(monkeypatch, sample, *common, "--seed", 1)
    call(monkeypatch, sample, *common)
    assert len(calls) == 3                                  # the second shard alone was made again
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (4, 8, 8, 3)


@pytest.mark.parametrize("argv, message", [
    (["--n", 0], "--n 0"), (["--out", "s.png"], "must end in .npz"), (["--steps", 1001], "--steps 1001"),
    (["--steps", 1], "2 to 1000"), (["--variance", "learned"], "does not predict its variance")])
def test_sample_refuses(trained, tmp_path, monkeypatch, argv, message):
    """Each wrong flag, by its name, before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, sample, trained, *argv)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ train.py

def linear_case(seed=0, batch=4, dims=3):
    """A linear eps_theta(x) = x W^T, for which Eq. 6 to 8 and 14 can be written down, in float64, with all its draws."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    W = normal(dims, dims).requires_grad_()
    t = torch.tensor([0, 51, 400, 999])[:batch]
    beta = 0.5 + 1.5 * torch.rand(batch, generator=g, dtype=torch.float64)
    u = 2 * torch.rand(batch, dims, generator=g, dtype=torch.float64) - 1
    return W, normal(batch, dims), t, normal(batch, dims), beta, u


@pytest.mark.parametrize("method, lam_units", [("adv", "x"), ("adv", "eps"), ("ran", "x"), ("inv", "x"), ("ddpm", "x")])
def test_losses_by_hand(method, lam_units):
    """Eq. 2, 3, 6, 7, 8, 14 and lambda_t in numpy, value and gradient: signs, targets, units, both outputs with gradient."""
    W, x_0, t, eps, beta, u = linear_case()
    schedule = Schedule.named("linear", 1000)
    terms = train.training_loss(lambda x, t: x @ W.T, schedule, x_0, t, eps, beta, u, method, 0.7, lam_units, 2.0, 8 / 255)
    gradient, = torch.autograd.grad(sum(term.sum() for term in terms.values()), W)

    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)[t.numpy()]
    s = np.sqrt(1 - alpha_bar)
    r = (s**2 + 8 / 255 * beta.numpy()) / s                                             # Eq. 7
    x_t = np.sqrt(alpha_bar)[:, None] * x_0.numpy() + s[:, None] * eps.numpy()          # Eq. 2
    delta = u.numpy() * r[:, None]
    w = W.detach().numpy()
    if method in ("adv", "inv"):
        slope = delta @ w.T @ w                             # of || s W delta ||^2, up to a positive factor
        delta = np.clip(delta + r[:, None] / np.sqrt(3) * np.sign(slope), -r[:, None], r[:, None])      # Eq. 8
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
        numeric[k] = (sum(part.sum() for part in loss(w + step)) - sum(part.sum() for part in loss(w - step))) / 2e-5
    assert np.allclose(gradient, numeric, rtol=1e-6, atol=1e-6)


def test_radius_has_the_papers_check_values():
    """r(0), its minimum and r(999) for omega 2, gamma 8/255, beta 1; lambda_t near t = 0 is 16 / beta^2."""
    schedule = Schedule.named("linear", 1000)
    t, ones = torch.arange(1000), torch.ones(1000, dtype=torch.float64)
    r = train.radius(schedule, t, ones)
    assert float(r[0]) == pytest.approx(3.15, abs=5e-3) and int(r.argmin()) == 51
    assert float(r[51]) == pytest.approx(0.354, abs=5e-4) and float(r[999]) == pytest.approx(1.03, abs=5e-3)
    lam = train.regularisation_weight(schedule, t, 2 * ones, train.radius(schedule, t, 2 * ones))
    assert float(lam[0]) == pytest.approx(0.3 * math.sqrt(3) / (2 * (1e-4 + 16 / 255)), rel=1e-6)


def test_fgsm_stays_in_the_ball_and_climbs():
    """For every t: inside the ball, at its surface somewhere, and J not below its random start on a nonlinear network."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 12)).double()
    predict = lambda x, t: layers(x.flatten(1)).view(x.shape)
    schedule, t = Schedule.named("linear", 1000), torch.arange(1000)
    x_t, u = torch.randn(2, 1000, 3, 2, 2, dtype=torch.float64)
    u = u.clamp(-1, 1)
    r = unet.expand(train.radius(schedule, t, torch.ones(1000, dtype=torch.float64)), x_t)
    s = unet.at(schedule.sqrt_one_minus_alpha_bar, t, x_t)
    delta = train.fgsm(predict, x_t, t, predict(x_t, t), r * u, r, s)
    assert all(p.grad is None for p in layers.parameters()) and not delta.requires_grad
    assert bool((delta.abs() <= r).all()) and bool((delta.abs().flatten(1).amax(1) > 0.99 * r.flatten()).float().mean() > 0.9)
    J = lambda d: (predict(x_t + s * d, t) - predict(x_t, t)).square().flatten(1).sum(1)
    assert float((J(delta) > J(r * u)).double().mean()) > 0.95

    # the step's sign is that of a finite difference of J, where the clamp did not act
    k = 400
    moved = ((delta - r * u)[k] / (r[k] / math.sqrt(3))).flatten()
    for j in range(12):
        step = torch.zeros(1000, 12, dtype=torch.float64)
        step[k, j] = 1e-6
        step = step.view(x_t.shape)
        slope = float((J(r * u + step) - J(r * u - step))[k].detach())
        assert slope * float(moved[j]) >= 0
        assert abs(float(moved[j])) == pytest.approx(1) or abs(float(delta[k].flatten()[j])) == pytest.approx(float(r[k]))


def test_variational_bound_is_a_likelihood():
    """At t = 0 the 256 bytes share a probability of 1; elsewhere the term is the KL of two Gaussians, here by hand."""
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
    mean = lambda x: math.sqrt(before) * beta / (1 - ab) * x + math.sqrt(1 - beta) * (1 - before) / (1 - ab) * 0.1
    x0_hat = (0.1 - math.sqrt(1 - ab) * 0.4) / math.sqrt(ab)
    kl = 0.5 * (math.log(variance / small) - 1 + small / variance + (mean(x_0) - mean(x0_hat)) ** 2 / variance)
    one = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    term = train.variational_bound(schedule, x_0 * one, 0.1 * one, torch.tensor([t]), 0.4 * one, v * one)
    assert float(term) == pytest.approx(kl / math.log(2), rel=1e-9)


def test_learned_variance_regularises_eps_alone():
    """With six output channels the regulariser sees eps: v far off changes `vlb` and nothing else."""
    schedule = Schedule.named("linear", 1000).to("cpu")
    x_0, eps, u = torch.randn(3, 2, 3, 4, 4).clamp(-1, 1)
    t, beta = torch.tensor([10, 500]), torch.ones(2)
    network = lambda shift: lambda x, t: torch.cat([0.5 * x, torch.tanh(x) + shift], dim=1)
    a, b = (train.training_loss(network(shift), schedule, x_0, t, eps, beta, u) for shift in (0.0, 0.7))
    assert torch.equal(a["ddpm"], b["ddpm"]) and torch.equal(a["reg"], b["reg"]) and not torch.allclose(a["vlb"], b["vlb"])
    plain = train.training_loss(lambda x, t: 0.5 * x, schedule, x_0, t, eps, beta, u)
    assert torch.allclose(plain["reg"], a["reg"])


def trainer(**changes):
    """A Trainer of the tiny network on 8x8 images, in this process."""
    training = dict(method="adv", lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255, batch=4, lr=1e-3, ema=0.99, amp=False, seed=0,
                    reg_share=1.0, balance=False)
    config = dict(network=dict(size=8, dropout=0.0, **TINY) | changes.pop("network", {}), process=dict(schedule="linear", timesteps=1000),
                  data={}, training=training | changes)
    process = type("Process", (), dict(rank=0, world=1, device=torch.device("cpu")))
    return train.Trainer(config, None, False, process)


def test_dropout_has_one_mask_for_all_passes():
    """With delta almost 0 the two outputs agree only if the same units are dropped; the masks change with the step."""
    t = trainer(network=dict(dropout=0.5), method="ran", gamma=1e-7, omega=40.0)
    randomised(t.model)
    x_0, noise = torch.randn(4, 3, 8, 8), t.noise((3, 8, 8))
    noise[0][:] = torch.tensor([1, 2, 3, 4])                # where r is tiny
    first = t.losses(x_0, t.rows, noise, "ran")
    assert float(first["reg"]) < 1e-3 * float(first["ddpm"])
    again = float(t.losses(x_0, t.rows, noise, "ran")["ddpm"])
    t.step = 1
    assert float(first["ddpm"]) == again != float(t.losses(x_0, t.rows, noise, "ran")["ddpm"])


@pytest.mark.parametrize("reg_share, micro", [(1.0, None), (0.5, None), (0.25, 3), (0.125, None)])
def test_regulariser_on_a_share_is_unbiased(reg_share, micro, monkeypatch):
    """Catches a share that is weighted wrongly, left out or counted twice: rows of one kind must give the whole batch's
    gradient at any share; and the DDPM term, which sees every row at every share."""
    t = trainer(batch=8, reg_share=reg_share, method="ran", lam=0.7)
    randomised(t.model)
    t.microbatch = micro or t.microbatch
    monkeypatch.setattr(train, "timesteps", lambda schedule, t, chance, *rest: (t, torch.ones_like(chance)))    # own test
    same = [part[:1].expand_as(part) for part in t.noise((3, 8, 8))]
    t.noise = lambda shape: same                            # eight times the same draws, and the same image
    x_0 = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).expand(8, -1, -1, -1)
    found = t.advance(x_0)
    gradient = torch.cat([p.grad.flatten() for p in t.parameters])
    other = trainer(batch=8, method="ran", lam=0.7)
    randomised(other.model)
    expected = other.losses(x_0, other.rows, same, "ran")
    sum(expected.values()).backward()
    assert difference(gradient, torch.cat([p.grad.flatten() for p in other.parameters])) < 1e-5
    assert all(float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5) for name in ("ddpm", "reg"))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_reaches_the_network(monkeypatch, preset):
    """Catches a preset that the command line cannot build, or a value of it lost on the way."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", preset, "--learn-sigma"])
    images = SimpleNamespace(size=64, shape=(3, 64, 64), low=-1, high=1, array=np.zeros(1, np.uint8))
    images = type("Some", (), dict(vars(images), __len__=lambda self: 1))()
    network = train.configuration(train.arguments(), images, None)["network"]
    assert network == dict(size=64, in_channels=3, scale_shift=True) | PRESETS[preset] | dict(learn_sigma=True)


def test_every_row_is_trained_once_at_any_share(monkeypatch):
    """Catches rows lost between the parts, a process without its share, and a share that depends on the process."""
    whole = train.regularised_rows(range(16), 0.25, "adv")
    assert [(len(rows), method) for rows, method in whole] == [(4, "adv"), (12, "ddpm")]
    halves = [train.regularised_rows(range(first, first + 8), 0.25, "adv") for first in (0, 8)]
    for k in (0, 1):
        assert halves[0][k][0] + halves[1][k][0] == whole[k][0]
    assert sorted(whole[0][0] + whole[1][0]) == list(range(16))
    with pytest.raises(UserError, match="--reg-share 0.25.* each of the 4 process"):
        monkeypatch.setenv("WORLD_SIZE", "4")               # two rows a process: some would have no share of the regulariser
        call(monkeypatch, train, "--batch", 8, "--reg-share", 0.25)
    for method in ("ddpm", "ambient"):
        assert train.regularised_rows(range(16), 0.25, method) == [(list(range(16)), method)]


def test_timesteps_of_a_share_are_drawn_where_the_loss_weighs_most():
    """Catches a q(t) that is not that of 1 + lambda_t (its steps shifted by one, say), a factor that is not uniform / q(t), a
    share's t that ignores lam, omega or its units, and batched networks that take each other's."""
    schedule = unet.Schedule.named("linear", 1000).to("cpu")
    s = (1 - unet.Schedule.named("linear", 1000).alpha_bar).sqrt()
    chance, uniform = (torch.arange(200_000) + 0.5) / 200_000, torch.zeros(200_000, dtype=torch.long)
    settings = [(0.3, "x", 2.0, 8 / 255), (1.0, "eps", 3.0, 0.1)]
    weights = [1 + lam * math.sqrt(3) / (s**omega + gamma) * (1 if units == "x" else s) for lam, units, omega, gamma in settings]
    for each, weight in zip(settings, weights):
        t, factor = train.timesteps(schedule, uniform, chance, 0.25, False, *each)
        counts = torch.bincount(t, minlength=1000)
        assert (counts - 200_000 * weight / weight.sum()).abs().max() < 3
        torch.testing.assert_close(factor, (weight.mean() / weight[t]).float(), rtol=1e-4, atol=0)
    t, factor = train.timesteps(schedule, uniform[None].expand(2, -1), chance.expand(2, -1), 0.25, False,
                                torch.tensor([[0.3], [3.0]]), "x", torch.tensor([[2.0], [4.0]]))
    for row, (lam, omega) in enumerate([(0.3, 2.0), (3.0, 4.0)]):
        alone = train.timesteps(schedule, uniform, chance, 0.25, False, lam, "x", omega)
        assert (t[row] - alone[0]).abs().max() <= 1
        torch.testing.assert_close(factor[row], alone[1], rtol=0.02, atol=0)
    t = torch.tensor([3, 900])
    for balance, share in ((False, 1.0), (True, 0.25)):     # the paper, and where every t weighs the same
        assert torch.equal(train.timesteps(schedule, t, chance[:2], share, balance)[0], t)
    assert train.timesteps(schedule, t, chance[:2])[1].tolist() == [1, 1]


def test_a_share_trains_its_own_timesteps(monkeypatch):
    """Catches the drawn t or its factor kept from the loss, given to rows without the regulariser, or of other settings."""
    other = dict(lam=1.0, lam_units="eps", omega=3.0, gamma=0.1)
    t = trainer(batch=8, reg_share=0.5, method="ran", **other)
    randomised(t.model)
    seen = []
    loss = train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: seen.append((a[3], a[7], loss(*a))) or seen[-1][2])
    noise = t.noise((3, 8, 8))
    x_0 = torch.randn(8, 3, 8, 8)
    for rows, method in train.regularised_rows(t.rows, 0.5, "ran"):
        found = t.losses(x_0[rows], rows, noise, method)
        (there, used, terms), expected = seen.pop(), (noise[0][rows], torch.ones(4))
        if method == "ran":
            expected = train.timesteps(t.schedule, expected[0], noise[4][rows], 0.5, False, *other.values())
        assert used == method and torch.equal(there, expected[0])
        for name, value in found.items():
            share = 0.5 if name == "reg" else 1
            assert float(value) == pytest.approx(float((expected[1] * terms[name]).sum() / share / 8), rel=1e-5)


def test_balance_weighs_the_two_terms_as_a_mean():
    """Catches a weight that is not 1 / (1 + lambda_t) at beta = 1, or that reaches one of the terms alone."""
    schedule = unet.Schedule.named("linear", 1000)
    t = torch.tensor([0, 51, 999])
    s = (1 - schedule.alpha_bar[t]).sqrt()
    expected = 1 / (1 + 0.3 * math.sqrt(3) / (s**2 + 8 / 255))             # R = sqrt(1 - alpha_bar) r = s^2 + gamma
    torch.testing.assert_close(train.timesteps(schedule, t, torch.zeros(3), 1.0, True)[1], expected, rtol=1e-6, atol=0)
    plain, balanced = trainer(method="ran"), trainer(method="ran", balance=True)
    for each in (plain, balanced):
        randomised(each.model)
    x_0, noise = torch.randn(4, 3, 8, 8), plain.noise((3, 8, 8))
    noise[0][:] = 51
    a, b = (each.losses(x_0, each.rows, noise, "ran") for each in (plain, balanced))
    assert all(float(b[name] / a[name]) == pytest.approx(float(expected[1]), rel=1e-5) for name in ("ddpm", "reg"))


@pytest.mark.parametrize("sigma_n", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("t", [70, 300])
def test_ambient_minimiser_of_a_gaussian(sigma_n, t):
    """Catches any slip in rho or in the noise added: for x ~ N(0, s^2) the best eps_theta is c x_t with
    c = sqrt(1 - alpha_bar) / (alpha_bar s^2 + 1 - alpha_bar), that of CLEAN data, whatever noise y has; and no loss where
    y has more noise than x_t."""
    schedule, g, s, N = unet.Schedule.named("linear", 1000), torch.Generator().manual_seed(t), 0.7, 1 << 18
    normal = lambda: torch.randn(N, 1, generator=g, dtype=torch.float64)
    y = s * normal() + sigma_n * normal()
    steps, eps, known = torch.full((N,), t), normal(), torch.full((N,), sigma_n, dtype=torch.float64)
    a = schedule.alpha_bar[t]
    best = float((1 - a).sqrt() / (a * s**2 + 1 - a))
    c = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    loss = train.ambient_loss(lambda x, t: c * x, schedule, y, steps, eps, known)["ddpm"].mean()
    if ((1 - a) / a).sqrt() <= sigma_n:
        assert float(loss) == 0
        return
    first, = torch.autograd.grad(loss, c, create_graph=True)
    second, = torch.autograd.grad(first, c)
    assert float(first / second) == pytest.approx(0, abs=0.02 * best)       # Newton's step from there, a quadratic's, is none
    if sigma_n == 0:
        clean = train.training_loss(lambda x, t: c * x, schedule, y, steps, eps, torch.ones(N).double(), None, "ddpm")["ddpm"]
        assert float(loss) == pytest.approx(float(clean.mean()), rel=1e-12)


def test_what_the_noise_aware_baseline_is_told(shapes):
    """Catches flags swapped, drawn anew each time, wrong with probability p only among the noisy, or sigma forgotten."""
    images = Images("shapes", 8, shapes, 0.75, 0.2, 3)
    truth = images.corrupted(np.arange(len(images)))
    told = {flags: train.assumed_noise(images, flags, 0.25) for flags in ("oracle", "conf1", "conf2")}
    assert np.array_equal(told["oracle"], np.where(truth, np.float32(0.25), 0)) and 0 < truth.sum() < len(truth)
    assert (told["conf2"] == 0.25).all() and np.array_equal(told["conf1"], train.assumed_noise(images, "conf1", 0.25))
    many = type("Many", (), dict(corrupted=lambda self, index: index % 4 == 0, p=0.75, sigma=0.2, data_seed=3, __len__=lambda self: 40_000))()
    wrong = (train.assumed_noise(many, "conf1", 0.25) > 0) != (np.arange(40_000) % 4 == 0)
    assert wrong[::4].mean() == pytest.approx(0.75, abs=0.02) and wrong[1::4].mean() == pytest.approx(0.75, abs=0.02)


def test_ambient_trains_on_what_it_is_told(shapes, tmp_path, monkeypatch, capsys):
    """Catches flags that never reach the loss: told that all are noisy beyond any timestep's noise, nothing is learnt."""
    common = ["--method", "ambient", "--p", 0.9, "--sigma", 0.2, "--steps", 2]
    call(monkeypatch, train, *flags(shapes, tmp_path / "a", *common, "--flags", "conf2", "--sigma-known", 1e6))
    call(monkeypatch, train, *flags(shapes, tmp_path / "b", *common, "--flags", "oracle"))
    lines = {name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in "ab"}
    assert all(line["ddpm"] == 0 for line in lines["a"][1:]) and all(line["ddpm"] > 0.01 for line in lines["b"][1:])
    assert lines["b"][0]["config"]["training"]["sigma_known"] == 0.2 and "100.0 % of the images" in capsys.readouterr().out


def test_ema_warms_up():
    """After the first update the average has weight 2/11 on the start, after the second 3/12 on what it was."""
    t = trainer()
    states = [torch.cat([p.detach().flatten() for p in t.parameters])]
    for _ in range(2):
        t.advance(torch.randn(4, 3, 8, 8))
        states.append(torch.cat([p.detach().flatten() for p in t.parameters]))
    average = states[0] * 2 / 11 + states[1] * 9 / 11
    average = average * 3 / 12 + states[2] * 9 / 12
    assert difference(torch.cat([p.flatten() for p in t.ema]), average) < 1e-6 and not torch.equal(states[1], states[2])


def test_draws_are_keyed_by_seed_and_step():
    """The same step again gives the same draws; ranges and shapes are Algorithm 1's."""
    t, beta, eps, u, chance = train.draw(0, 7, 4096, (3,), 1000, "cpu")
    again = train.draw(0, 7, 4096, (3,), 1000, "cpu")
    assert all(torch.equal(a, b) for a, b in zip((t, beta, eps, u, chance), again))
    assert 0 <= float(chance.min()) < 0.005 and 0.995 < float(chance.max()) < 1
    assert not torch.equal(eps, train.draw(0, 8, 4096, (3,), 1000, "cpu")[2])
    assert int(t.min()) < 5 and int(t.max()) > 994 and float(t.double().mean()) == pytest.approx(499.5, abs=15)
    assert 0.5 <= float(beta.min()) < 0.51 and 1.99 < float(beta.max()) <= 2 and float(u.std()) == pytest.approx(1 / math.sqrt(3), abs=0.01)
    assert float(eps.mean()) == pytest.approx(0, abs=0.05) and float(eps.std()) == pytest.approx(1, abs=0.02)


def test_every_image_comes_once_an_epoch():
    """Batches that straddle epochs: each epoch is a permutation of all images, and a fresh one."""
    seen = np.concatenate([train.batch_indices(5, step, 6, 10) for step in range(10)])
    epochs = seen.reshape(6, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def weights(out):
    """All tensors of a run's checkpoint as one dict: weights, EMA, optimiser."""
    c = unet.load_checkpoint(out)
    moments = {f"{k}.{name}": v for k, state in c["optimizer"]["state"].items() for name, v in state.items()}
    return {f"model.{k}": v for k, v in c["model"].items()} | {f"ema.{k}": v for k, v in c["ema"].items()} | moments


def test_kill_and_resume_is_bit_exact(shapes, trained, tmp_path):
    """kill -9 once a checkpoint is there, then the same command: every tensor as if nothing had happened."""
    argv = flags(shapes, tmp_path / "run", "--steps", 4, "--save-every", 2)
    process = subprocess.Popen(command("train.py", *argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.wait()
    killed_at = unet.load_checkpoint(tmp_path / "run")["step"]
    run("train.py", *argv)
    a, b = weights(tmp_path / "run"), weights(trained)
    assert killed_at == 2 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
             if "event" not in line]
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "run" / "samples-00000004.png").exists()


def test_two_processes_and_microbatches_train_alike(shapes, tmp_path, monkeypatch):
    """20 steps with one process, with two (gloo), and in microbatches of 3: the same weights up to rounding."""
    common = ["--steps", 20, "--method", "adv", "--lr", 1e-4, "--batch", 4]
    call(monkeypatch, train, *flags(shapes, tmp_path / "one", *common))
    call(monkeypatch, train, *flags(shapes, tmp_path / "micro", *common, "--microbatch", 3))
    run("train.py", *flags(shapes, tmp_path / "two", *common), processes=2)
    one = unet.load_checkpoint(tmp_path / "one")["model"]
    for other in ("micro", "two"):
        found = unet.load_checkpoint(tmp_path / other)["model"]
        a, b = (torch.cat([v.flatten() for v in w.values()]) for w in (found, one))
        assert difference(a, b) < 1e-4, other
    last = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()][-1] for name in ("one", "two")]
    assert last[0]["ddpm"] == pytest.approx(last[1]["ddpm"], rel=1e-3) and last[0]["reg"] == pytest.approx(last[1]["reg"], rel=1e-2)


def test_sigterm_saves_and_leaves(shapes, tmp_path):
    """SIGTERM in the middle: the step is finished, saved and named, the exit status says terminated."""
    argv = flags(shapes, tmp_path / "run", "--steps", 100_000)
    process = subprocess.Popen(command("train.py", *argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    log, until = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    step = unet.load_checkpoint(tmp_path / "run")["step"]
    assert 2 < step < 100_000 and f"after step {step}" in out


def test_fine_tuning_starts_from_a_checkpoint(shapes, trained, tmp_path, monkeypatch):
    """--init takes weights, EMA and optimiser of ours, the weights alone of a public file, and refuses another network."""
    call(monkeypatch, train, *flags(shapes, tmp_path / "tuned", "--init", trained, "--steps", 1, "--lr", 1e-9, "--method", "ddpm"))
    before, after = weights(trained), weights(tmp_path / "tuned")
    assert all(difference(after[k], before[k]) < 1e-4 for k in before if k.startswith("model."))
    assert int(after["0.step"]) == 5                        # the optimiser's fourth step was kept, its fifth was made
    torch.save(unet.load_checkpoint(trained)["ema"], tmp_path / "public.pt")
    call(monkeypatch, train, *flags(shapes, tmp_path / "bare", "--init", tmp_path / "public.pt", "--steps", 1, "--lr", 1e-9))
    bare = weights(tmp_path / "bare")
    assert all(difference(bare["model." + k], v) < 1e-4 for k, v in unet.load_checkpoint(trained)["ema"].items())
    with pytest.raises(UserError, match="--init .*res_blocks is 1, not 2"):
        call(monkeypatch, train, *flags(shapes, tmp_path / "wrong", "--init", trained, "--res-blocks", 2))


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, monkeypatch):
    """The step is named, and the last good checkpoint stays."""
    argv = flags(shapes, tmp_path / "run", "--save-every", 1)
    call(monkeypatch, train, *argv, "--steps", 1)
    good, real = weights(tmp_path / "run"), train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: {k: v / (v - v) for k, v in real(*a).items()})
    with pytest.raises(UserError, match="loss of step 2 is not finite; the last good checkpoint is .*checkpoint.pt"):
        call(monkeypatch, train, *argv, "--steps", 3)
    assert all(torch.equal(v, good[k]) for k, v in weights(tmp_path / "run").items())


@pytest.mark.parametrize("argv, message", [
    (["--batch", 65], "--batch 65: shapes has only 64 images"), (["--p", 1.5], "--p 1.5"), (["--sigma", -1], "--sigma -1"),
    (["--lr", 0], "--lr 0"), (["--reg-share", 0.3], "--reg-share 0.3"), (["--reg-share", 0.0625], "--reg-share 0.0625"),
    (["--method", "ambient", "--learn-sigma"], "--learn-sigma"), (["--steps", -5], "--steps -5"), (["--ema", 2], "--ema 2"), (["--data", "nothing"], "nothing"),
    (["--channels", 33], "--channels 33"), (["--mult", "1,2,2,2,2"], "--size 8"), (["--heads", 7], "--heads 7"),
    (["--timesteps", 10], "--timesteps 10"), (["--init", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (["--out", "/proc/run"], "/proc/run")])
def test_train_refuses(shapes, tmp_path, monkeypatch, argv, message):
    """Each wrong flag, by its name, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, train, *flags(shapes, "run", *argv))
    assert not list(tmp_path.iterdir())


def test_train_refuses_another_command_on_the_same_folder(shapes, trained, tmp_path, monkeypatch):
    """Which setting differs is said; a finished run is left alone; a damaged checkpoint is never a fresh start."""
    with pytest.raises(UserError, match="method was adv and is now ran; lam was 0.3 and is now 0.1"):
        call(monkeypatch, train, *flags(shapes, trained, "--method", "ran", "--lam", 0.1))
    before = (trained / "checkpoint.pt").stat().st_mtime_ns
    call(monkeypatch, train, *flags(shapes, trained, "--steps", 4))
    assert (trained / "checkpoint.pt").stat().st_mtime_ns == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes()[:-1000])
    with pytest.raises(UserError, match="checkpoint.pt: damaged"):
        call(monkeypatch, train, *flags(shapes, tmp_path / "run"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--batch 8: is not a multiple of the 3 processes"):
        call(monkeypatch, train, *flags(shapes, tmp_path / "other"))


def test_errors_are_one_line(tmp_path):
    """From the shell: one line on stderr that names the flag, status 2, no traceback; torchrun's processes too."""
    done = run("train.py", "--data", "shapes", "--data-dir", tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: error: ")
    assert "python data.py shapes" in done.stderr


# -------------------------------------------------------------------------------------------------------------- data.py

def store(folder, array, name="toy", **extra):
    """A prepared data set written without data.py: what its two files are, said a second time."""
    folder.mkdir(exist_ok=True)
    size = array.shape[2]
    np.save(folder / f"{name}-{size}.npy", array)
    facts = dict(name=name, size=size, count=len(array), dtype=str(array.dtype), low=-1.0, high=1.0, **extra)
    (folder / f"{name}-{size}.json").write_text(json.dumps(facts))
    return folder


def toy(folder, count=2000, size=8):
    return store(folder, np.random.default_rng(5).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def png(colour, size=(40, 40), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def run_data(*arguments, **options):
    return subprocess.run([sys.executable, str(HERE / "data.py"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, **options)


def finished(folder):
    """Files that look like results."""
    return [file.name for file in folder.glob("*") if not file.name.startswith(".")]


# ------------------------------------------------------------------------------------------------ reading, corruption

def test_read_scale(tmp_path):
    """Catches a wrong scale: /128, /255, an offset, or float64."""
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 64, 3).transpose(0, 2, 1).reshape(4, 3, 8, 8)
    x = Images("toy", 8, store(tmp_path, array)).read([3, 0])
    assert x.dtype == np.float32 and x.shape == (2, 3, 8, 8)
    assert x.min() == -1 and x.max() == 1 and x[0, 0, 7, 7] == 1 and x[1, 0, 0, 0] == -1
    np.testing.assert_allclose(x, array[[3, 0]].astype(np.float64) * 2 / 255 - 1, atol=1e-7)


def test_corruption_belongs_to_the_image(tmp_path):
    """Catches noise keyed by position in the batch, call, epoch or process, and state left in the object by a read."""
    folder = toy(tmp_path, 50)
    images = Images("toy", 8, folder, p=0.9, sigma=0.2, data_seed=3)
    whole = images.read(np.arange(50))
    assert len({row.tobytes() for row in whole}) == 50
    for indices in ([7, 3, 41], [3], list(range(49, -1, -1)), [3, 3]):
        np.testing.assert_array_equal(images.read(indices), whole[indices])
    np.testing.assert_array_equal(images.read(np.arange(50)), whole)
    code = ("import sys, hashlib, numpy as np; sys.path.insert(0, sys.argv[1]); from data import Images; "
            "x = Images('toy', 8, sys.argv[2], 0.9, 0.2, 3).read(np.arange(50)); print(hashlib.sha256(x).hexdigest())")
    other = subprocess.run([sys.executable, "-c", code, str(HERE), str(folder)], capture_output=True, text=True)
    assert other.stdout.strip() == hashlib.sha256(whole).hexdigest(), other.stderr


def test_corruption_of_nothing_is_exact(tmp_path):
    """Catches noise of size zero that still rounds, and a coin with p = 0 that ever falls."""
    folder, every = toy(tmp_path), np.arange(2000)
    clean = Images("toy", 8, folder).read(every)
    for p, sigma in ((0, 0.2), (0.9, 0)):
        np.testing.assert_array_equal(Images("toy", 8, folder, p, sigma).read(every), clean)
    assert not Images("toy", 8, folder, 0, 0.2).corrupted(every).any()
    assert Images("toy", 8, folder, 1, 0.2).corrupted(every).all()


def test_coin_and_noise_do_not_depend_on_p_and_sigma(tmp_path):
    """Catches a coin or z drawn from the same stream as p or sigma decide, a wrong share, and seeds that do nothing."""
    folder, every = toy(tmp_path), np.arange(2000)
    clean = Images("toy", 8, folder).read(every)
    half, most = Images("toy", 8, folder, 0.5, 0.1), Images("toy", 8, folder, 0.9, 0.2)
    a, b = half.corrupted(every), most.corrupted(every)
    assert not (a & ~b).any()
    assert abs(a.mean() - 0.5) < 5 * (0.25 / 2000) ** 0.5 and abs(b.mean() - 0.9) < 5 * (0.09 / 2000) ** 0.5
    z1, z2 = (half.read(every) - clean) / 0.1, (most.read(every) - clean) / 0.2
    np.testing.assert_array_equal((z1 != 0).any(axis=(1, 2, 3)), a)
    np.testing.assert_array_equal((z2 != 0).any(axis=(1, 2, 3)), b)
    np.testing.assert_allclose(z1[a], z2[a], atol=1e-5)
    other = Images("toy", 8, folder, 0.5, 0.1, data_seed=1)
    assert 0.4 < (other.corrupted(every) == a).mean() < 0.6
    both = a & other.corrupted(every)
    assert abs(np.corrcoef((other.read(every) - clean)[both].ravel(), z1[both].ravel())[0, 1]) < 0.03


def test_noise_is_white_and_normal(tmp_path):
    """Catches streams of neighbouring images that overlap or are correlated, clipping, quantising, a bad start of a
    stream (the first values over all images), and a coin that is tied to the noise. Limits are 5 standard deviations."""
    folder, every = toy(tmp_path, 4000), np.arange(4000)
    images = Images("toy", 8, folder, 1, 1)
    y = images.read(every)
    z = (y.astype(np.float64) - Images("toy", 8, folder).read(every)).reshape(4000, 192)
    assert np.abs(y).max() > 4 and len(np.unique(y)) > 0.9 * y.size
    n = z.size
    assert abs(z.mean()) < 5 / n ** 0.5 and abs((z ** 2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z ** 3).mean()) < 5 * (15 / n) ** 0.5 and abs((z ** 4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 1e-5
    for shift in (1, 2, 4, 64):  # of the pixels inside an image, and of the images
        assert abs((z[:, shift:] * z[:, :-shift]).mean()) < 5 / z[:, shift:].size ** 0.5
        assert np.abs((z[shift:] * z[:-shift]).mean(axis=1)).max() < 5.5 / 192 ** 0.5
    for shift in (1, 2, 3):  # an image that is its neighbour a few values later
        assert np.abs((z[1:, :-shift] * z[:-1, shift:]).mean(axis=1)).max() < 5.5 / (192 - shift) ** 0.5
    first = z[:, :16]
    assert np.abs(np.corrcoef(first.T) - np.eye(16)).max() < 5.5 / 4000 ** 0.5
    assert min(scipy.stats.kstest(column, "norm").pvalue for column in first.T) > 1e-6
    for p in (0.25, 0.5, 0.75):
        coin = Images("toy", 8, folder, p, 1).corrupted(every) - p
        for value in (first, (first ** 2 - 1) / 2 ** 0.5):
            assert np.abs(coin @ value).max() < 5 * (4000 * p * (1 - p)) ** 0.5


def test_noise_golden(tmp_path):
    """Catches any change of the corruption, which would give old checkpoints other data: the values were printed once."""
    folder = store(tmp_path, np.full((4, 3, 8, 8), 255, np.uint8))
    x = Images("toy", 8, folder, p=1, sigma=0.5, data_seed=7).read([2])[0, :, 0, 0]
    np.testing.assert_allclose((x - 1) / 0.5, GOLDEN_NOISE, atol=2e-6)
    coins = Images("toy", 8, folder, p=0.5, data_seed=7).corrupted(np.arange(4))
    assert coins.tolist() == GOLDEN_COINS


GOLDEN_NOISE = [0.347347, 0.154186, -0.521118]
GOLDEN_COINS = [True, False, False, True]


def test_float_data_is_read_as_it_is(tmp_path):
    """Catches scaling of float data to [-1, 1], and corruption written into the file."""
    array = np.random.default_rng(0).normal(0, 3, (20, 3, 8, 8)).astype(np.float32)
    folder = store(tmp_path, array)
    np.testing.assert_array_equal(Images("toy", 8, folder).read([4, 2]), array[[4, 2]])
    z = Images("toy", 8, folder, 1, 0.1).read(np.arange(20)) - array
    assert abs(z.std() - 0.1) < 0.005
    np.testing.assert_array_equal(np.load(folder / "toy-8.npy"), array)


def test_images_errors(tmp_path):
    """Catches a traceback, or a message that does not say what to run, for data that is missing, damaged or misnamed."""
    with pytest.raises(UserError, match=r"python data.py cifar10 --size 32 --split test --out"):
        Images("cifar10-test", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"python data.py celeba --src \S+ --size 64"):
        Images("celeba", data_dir=tmp_path)
    with pytest.raises(UserError, match="--size"):
        Images("mine", data_dir=tmp_path)
    folder = toy(tmp_path / "d")
    for p, sigma, seed in ((-0.1, 0, 0), (1.1, 0, 0), (float("nan"), 0, 0), (0, -1, 0), (0, float("inf"), 0), (0, 0, -1)):
        with pytest.raises(UserError, match="--p .* --sigma .* --data-seed"):
            Images("toy", 8, folder, p, sigma, seed)
    whole = (folder / "toy-8.npy").read_bytes()
    for bad in (b"", whole[:1000], whole[:-1], b"PK\x03\x04" + whole):
        (folder / "toy-8.npy").write_bytes(bad)
        with pytest.raises(UserError, match="damaged"):
            Images("toy", 8, folder)
    np.save(folder / "toy-8.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        Images("toy", 8, folder)
    np.save(folder / "toy-8.npy", np.zeros((1999, 3, 8, 8), np.uint8))
    with pytest.raises(UserError, match="damaged"):
        Images("toy", 8, folder)
    (folder / "toy-8.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        Images("toy", 8, folder)


# ------------------------------------------------------------------------------------------------------- small helpers

def test_as_bytes():
    """Catches truncation instead of rounding, a missing clip (wrap-around), and NaN that becomes a grey level."""
    x = np.linspace(-1.5, 1.5, 4001)
    expected = [min(255, max(0, int(np.floor((v + 1) * 127.5 + 0.5)))) for v in x]
    assert data.as_bytes(x).tolist() == expected and data.as_bytes(x).dtype == np.uint8
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(data.as_bytes(levels.astype(np.float32) / 127.5 - 1), levels)
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="not finite"):
            data.as_bytes(np.array([0, bad]))


def test_noise_estimate():
    """Catches a wrong mask, scale, border or mean over channels: against the formula with a 2-D convolution, white noise
    of known size, and a plane (no noise)."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, [[[[0.1]], [[0.2]], [[0.3]]]], (4, 3, 40, 24))
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    expected = [np.mean([np.sqrt(np.pi / 2) / (6 * 38 * 22) * np.abs(scipy.signal.convolve2d(c, mask, "valid")).sum()
                         for c in image]) for image in x]
    np.testing.assert_allclose(data.noise_estimate(x), expected, rtol=1e-12)
    assert abs(data.noise_estimate(rng.normal(0, 0.2, (8, 3, 64, 64))).mean() - 0.2) < 0.002
    i, j = np.mgrid[:16, :16]
    assert data.noise_estimate(np.broadcast_to(0.01 * i - 0.02 * j + 0.3, (1, 3, 16, 16)))[0] < 1e-12


def test_save_grid(tmp_path):
    """Catches rows and columns exchanged, images in the wrong order, a lossy or rescaled picture."""
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8) * 40
    data.save_grid(images, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (4 * 2 + 2, 6 * 3 + 4, 3)
    for k in range(5):
        top, left = k // 3 * 6, k % 3 * 8
        assert (grid[top:top + 4, left:left + 6] == 40 * k).all()
    assert finished(tmp_path) == ["grid.png"] == os.listdir(tmp_path)


def test_progress(tmp_path, monkeypatch, capsys):
    """Catches a wrong rate or remaining time, output from every rank, and a flood of lines in a log file."""
    clock = [100.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: clock[0])
    progress = data.Progress(100_000, "steps", "training")
    for done in range(0, 201):
        clock[0] = 100 + done / 4
        progress.update(done, loss=0.123456)
    assert progress.rate == pytest.approx(4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and "training: 200/100,000 steps" in lines[-1] and "6:55:50 left" in lines[-1]
    assert "0.1235" in lines[-1] and "4/s" in lines[-1]
    progress.close()
    assert "200 steps" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    clock[0] += 100
    progress.update(300)
    progress.close()
    assert capsys.readouterr().err == ""


def test_command_line(monkeypatch, capsys):
    """Catches a traceback for a user's mistake, a wrong exit status, and the message printed by every rank."""
    def wrong():
        raise UserError("--p is wrong")

    def stopped():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    for rank, text in ((None, "train.py: error: --p is wrong\n"), ("0", "train.py: error: --p is wrong\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(SystemExit) as status:
            data.command_line(wrong)
        assert status.value.code == 2 and capsys.readouterr().err == text
    with pytest.raises(SystemExit) as status:
        data.command_line(stopped)
    assert status.value.code == 130
    with pytest.raises(ZeroDivisionError):
        data.command_line(lambda: 1 / 0)


def test_atomic_write(tmp_path):
    """Catches a half-written file under the final name, a temporary file left behind, a temporary name that numpy would
    add .npz to, an old partial that hurts, two writers of one file, and a traceback for a folder that cannot be written."""
    path = tmp_path / "new" / "a.npz"
    with data.atomic_write(path) as partial:
        assert partial.parent == path.parent and partial.suffix == ".npz"
        np.savez(partial, x=1)
        assert not path.exists()
        with pytest.raises(UserError, match="another process"):
            with data.atomic_write(path):
                pass
    assert os.listdir(path.parent) == ["a.npz"]
    good = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        with data.atomic_write(path) as partial:
            partial.write_bytes(b"half")
            1 / 0
    assert os.listdir(path.parent) == ["a.npz"] and path.read_bytes() == good
    partial.write_bytes(b"left by a killed run" * 100)
    with data.atomic_write(path) as partial:
        partial.write_bytes(b"new")
    assert os.listdir(path.parent) == ["a.npz"] and path.read_bytes() == b"new"
    for bad in (path / "b.npz", path.parent, Path("/proc/nowhere/a.npz")):
        with pytest.raises(UserError, match="cannot write"):
            with data.atomic_write(bad):
                pass


def test_full_disk(tmp_path, monkeypatch):
    """Catches a traceback or a partial file when the disk fills up (here: a limit on the size of a file), and a run that
    is begun although the disk is too small."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000)); import sys; sys.path.insert(0, sys.argv.pop(1)); " \
            "import data; data.command_line(data.main)"
    done = subprocess.run([sys.executable, "-c", limit, str(HERE), "shapes", "--n", "200", "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="GB are free"):
        data.main(["shapes", "--n", "4", "--out", str(tmp_path), "--workers", "1"])
    assert os.listdir(tmp_path) == []


def test_download(tmp_path, capsys):
    """Catches a download that is not verified, sources that are not tried in turn, a partial file that stays, a good file
    fetched again, and a message that does not say where to put the file."""
    content = os.urandom((1 << 21) + 100)  # the last block is small enough to stay in a buffer
    sha, good, bad = hashlib.sha256(content).hexdigest(), tmp_path / "good", tmp_path / "bad"
    good.write_bytes(content)
    bad.write_bytes(content[:-1])
    out = tmp_path / "out" / "file.bin"
    urls = [(tmp_path / "missing").as_uri(), bad.as_uri(), good.as_uri()]
    assert data.download(urls, out, sha, len(content)) == out and out.read_bytes() == content
    good.unlink()
    assert data.download(urls, out, sha, len(content)) == out
    out.write_bytes(b"other")
    with pytest.raises(UserError, match="delete it"):
        data.download(urls, out, sha, len(content))
    assert out.read_bytes() == b"other"
    out.unlink()
    with pytest.raises(UserError) as error:
        data.download(urls, out, sha, len(content))
    assert all(text in str(error.value) for text in (*urls, str(out), sha)) and os.listdir(out.parent) == []


# ------------------------------------------------------------------------------------------------------------- sources

def colours(count):
    return {f"{'ab'[i % 2]}/{i * 7 % count:03}.png": png((i, 2 * i % 256, 255 - i)) for i in range(count)}


def test_sources_agree(tmp_path):
    """Catches an order that depends on the archive, the folder or the workers; hidden files, folders and the __MACOSX
    copies read as images; a name in an archive used as a path."""
    files = colours(150)
    expected = np.stack([np.asarray(Image.open(io.BytesIO(files[name])))[:16, :16].transpose(2, 0, 1)
                         for name in sorted(files)])
    extra = {"__MACOSX/a/001.png": b"x", ".hidden.png": b"x", "a/.b.png": b"x", ".git/c.png": b"x", "a/readme.txt": b"x"}
    for name, content in {**files, **extra}.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a/", "")
        for name, content in reversed({**files, **extra}.items()):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, content in {**files, **extra}.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("./a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    shas = set()
    for src, workers in (("folder", 1), ("folder", 3), ("z.zip", 2), ("t.tar", 2)):
        out = tmp_path / f"out-{src}-{workers}"
        data.main(["mine", "--src", str(tmp_path / src), "--size", "16", "--workers", str(workers), "--out", str(out)])
        images = Images("mine", 16, out)
        np.testing.assert_array_equal(images.array, expected)
        shas.add(images.info["sha256"])
    assert shas == {hashlib.sha256(expected.tobytes()).hexdigest()}
    assert images.info["count"] == len(images) == 150 and (images.low, images.high) == (-1, 1)


def test_names_in_an_archive_are_not_paths(tmp_path):
    """Catches a member called ../../x that is written to, or read from, outside the archive."""
    for kind in ("tar", "zip"):
        box = tmp_path / kind
        (box / "deep").mkdir(parents=True)
        names = ["../../evil.png", "/tmp/evil-of-data.png", "../deep/x.png"]
        if kind == "zip":
            with zipfile.ZipFile(box / "deep" / "x.zip", "w") as archive:
                for name in names:
                    archive.writestr(name, png("red"))
        else:
            with tarfile.open(box / "deep" / "x.tar", "w") as archive:
                for name in names:
                    member = tarfile.TarInfo(name)
                    member.size = len(png("red"))
                    archive.addfile(member, io.BytesIO(png("red")))
        data.main(["mine", "--src", str(box / "deep" / f"x.{kind}"), "--size", "8", "--workers", "1",
                   "--out", str(box / "deep" / "out")])
        assert sorted(p.name for p in box.rglob("*") if p.is_file()) == ["mine-8.json", "mine-8.npy", f"x.{kind}"]
        assert (np.load(box / "deep/out/mine-8.npy")[:, 0] == 255).all() and not Path("/tmp/evil-of-data.png").exists()


def test_splits(tmp_path):
    """Catches test images in the training set, and a split that silently falls back to everything."""
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for i, name in enumerate(["x/train/b/1.png", "x/test/a/1.png", "x/train/a/1.png"]):
            archive.writestr(name, png((i, 0, 0)))
    arguments = ["--src", str(tmp_path / "z.zip"), "--size", "8", "--out", str(tmp_path / "out"), "--workers", "1"]
    data.main(["mine", *arguments])
    data.main(["mine", *arguments, "--split", "test"])
    assert Images("mine", 8, tmp_path / "out").array[:, 0, 0, 0].tolist() == [2, 0]
    test = Images("mine-test", 8, tmp_path / "out")
    assert test.array[:, 0, 0, 0].tolist() == [1] and test.info["split"] == "test"
    with pytest.raises(UserError, match="no folder 'val'.*test.*train"):
        data.main(["mine", *arguments, "--split", "val"])


def test_decode_modes(tmp_path):
    """Catches grey, palette, alpha, CMYK and 16-bit images that come out wrong (16-bit clips to white in Pillow)."""
    (tmp_path / "in").mkdir()
    grey16 = Image.fromarray(np.full((8, 8), 0x4080, np.uint16))
    cases = [("1-grey.png", Image.new("L", (8, 8), 77), (77, 77, 77)),
             ("2-rgba.png", Image.new("RGBA", (8, 8), (0, 100, 200, 0)), (255, 255, 255)),
             ("3-rgba.png", Image.new("RGBA", (8, 8), (0, 100, 200, 255)), (0, 100, 200)),
             ("4-half.png", Image.new("LA", (8, 8), (0, 128)), (127, 127, 127)),
             ("5-palette.png", Image.new("RGB", (8, 8), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 20, 30)),
             ("6-cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
             ("7-deep.png", grey16, (0x40, 0x40, 0x40)),
             ("8-one.PNG", Image.new("1", (8, 8), 1), (255, 255, 255))]
    for name, image, _ in cases:
        image.save(tmp_path / "in" / name)
    data.main(["mine", "--src", str(tmp_path / "in"), "--size", "4", "--out", str(tmp_path), "--workers", "1"])
    images = Images("mine", 4, tmp_path)
    assert len(images) == len(cases)
    for row, (name, _, colour) in zip(images.array, cases):
        assert np.abs(row.reshape(3, 16).T.astype(int) - colour).max() <= (2 if name.endswith("jpg") else 0), name


def test_resize_and_crop(tmp_path):
    """Catches another filter than the box (overshoot, blur), a crop off the centre, and CelebA without its crop of 140."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 32, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    data.main(["mine", "--src", str(tmp_path / "a"), "--size", "8", "--out", str(tmp_path), "--workers", "1"])
    expected = pixels[8:40].reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(Images("mine", 8, tmp_path).array[0] - expected).max() <= 0.501
    face = np.zeros((218, 178, 3), np.uint8)
    face[39:179, 19:159] = 255
    face[39:179, 19:29, 0] = 0  # a stripe ten pixels wide at the left of the crop: one column at size 14
    (tmp_path / "b").mkdir()
    Image.fromarray(face).save(tmp_path / "b" / "x.png")
    data.main(["celeba", "--src", str(tmp_path / "b"), "--size", "14", "--out", str(tmp_path), "--workers", "1"])
    x = Images("celeba", 14, tmp_path).array[0]
    assert (x[0, :, 0] == 0).all() and (x[0, :, 1:] == 255).all() and (x[1:] == 255).all()


def test_broken_images(tmp_path):
    """Catches a broken, cut, tiny or enormous image that is silently skipped, shifts its neighbours, ends in a traceback,
    or is decoded into gigabytes; and files left by the refused run."""
    good = {f"{i}.png": png((i, 0, 0), (16, 16)) for i in range(10)}
    noisy = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noisy, "JPEG")
    bomb = bytearray(png(0, (1, 1), "L"))
    bomb[16:24] = (8200).to_bytes(4, "big") * 2  # the size in the header; its checksum is mended below
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    bad = {"3b.png": b"not an image", "5b.jpg": noisy.getvalue()[:2000], "7b.png": png("red", (7, 20)),
           "8b.png": bytes(bomb), "9b.png": b""}
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name, content in {**good, **bad}.items():
            archive.writestr(name, content)
    blob = bytearray((tmp_path / "z.zip").read_bytes())
    blob[blob.index(b"2.png") + 20] ^= 255  # 2.png no longer agrees with its CRC
    (tmp_path / "z.zip").write_bytes(blob)
    arguments = ["mine", "--src", str(tmp_path / "z.zip"), "--size", "8", "--out", str(tmp_path / "out"), "--workers", "2"]
    with pytest.raises(UserError, match="6 of 15 images .*'2.png' .*CRC.*'3b.png'.*'5b.jpg'.*'7b.png' .*7 x 20.*8200 x 8200"
                                        ".*--skip-broken"):
        data.main(arguments)
    assert os.listdir(tmp_path / "out") == []
    data.main([*arguments, "--skip-broken"])
    images = Images("mine", 8, tmp_path / "out")
    assert images.array[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9] and images.info["left_out"] == 6
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        for name, content in bad.items():
            archive.writestr(name, content)
    arguments[2] = str(tmp_path / "none.zip")
    with pytest.raises(UserError, match="5 of 5 images"):
        data.main([*arguments[:-4], "--out", str(tmp_path / "out2"), "--skip-broken"])


def test_wrong_sources(tmp_path, monkeypatch):
    """Catches a traceback, or work begun, for a source that is not there, empty, cut short or of another kind."""
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        for i in range(20):
            archive.writestr(f"{i}.png", png("red"))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "good.zip").read_bytes()[:-300])
    (tmp_path / "text.zip").write_text("hello")
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "good.zip", "1.png")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "t.tar.gz").read_bytes()[:100])
    cases = [(["mine", "--src", "missing", "--size", "8"], "does not exist"),
             (["mine", "--src", "empty", "--size", "8"], "no images"),
             (["mine", "--src", "cut.zip", "--size", "8"], "whole zip"),
             (["mine", "--src", "text.zip", "--size", "8"], "whole zip"),
             (["mine", "--src", "t.tar.gz", "--size", "8"], "uncompressed tar"),
             (["cifar10", "--src", "cut.tar.gz"], "whole zip or tar"),
             (["cifar10", "--src", "t.tar.gz"], "data_batch_1.bin has 0 bytes"),
             (["cifar10", "--split", "val"], "train and test only"),
             (["mine", "--src", "good.zip"], "--size"), (["cifra10"], "none of cifar10"),
             (["../x", "--src", "good.zip", "--size", "8"], "file name"),
             (["shapes", "--n", "0"], "--n is at least 1"), (["cifar10", "--n", "5"], "--n is not for cifar10"),
             (["shapes", "--src", "good.zip"], "--src is not for shapes"), (["shapes", "--workers", "0"], "--workers"),
             (["subspace", "--images", "butterflies"], "python data.py butterflies --src"),
             (["subspace", "--size", "64"], "at most 32"), (["celeba"], "img_align_celeba.zip"),
             (["lsun_bedroom"], "--src"), (["imagenet64"], "image-net.org"), (["butterflies"], "huggan/")]
    monkeypatch.chdir(tmp_path)
    for arguments, text in cases:
        with pytest.raises(UserError, match=text):
            data.main([*arguments, "--out", "out"])
        assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [], arguments
    done = run_data("mine", "--src", tmp_path / "good.zip", "--size", 8, "--out", tmp_path / "good.zip" / "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "data.py: error: cannot write" in done.stderr


def test_cifar10_binary(tmp_path):
    """Catches the label byte read as a pixel, channels or rows exchanged, and batches in the order of the archive."""
    rng = np.random.default_rng(2)
    records = rng.integers(0, 256, (10_000, 3073), dtype=np.uint8)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz", compresslevel=0) as archive:
        for name, content in (("readme.html", b"x"), ("data_batch_1.bin", b"x"), ("test_batch.bin", records.tobytes())):
            member = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data.main(["cifar10", "--src", str(tmp_path / "c.tar.gz"), "--split", "test", "--out", str(tmp_path)])
    images = Images("cifar10-test", data_dir=tmp_path)
    np.testing.assert_array_equal(images.array, records[:, 1:].reshape(-1, 3, 32, 32))
    with pytest.raises(UserError, match="data_batch_1.bin has 1 bytes"):
        data.main(["cifar10", "--src", str(tmp_path / "c.tar.gz"), "--out", str(tmp_path)])


def test_imagenet_npz(tmp_path):
    """Catches rows read with the channels last, batch 10 before batch 2, pickles, and a cut file."""
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 256, (3, 4, 12288), dtype=np.uint8)
    for k, number in enumerate((1, 2, 10)):
        np.savez_compressed(tmp_path / f"train_data_batch_{number}.npz", data=rows[k], labels=np.arange(4))
    data.main(["imagenet64", "--src", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"])
    np.testing.assert_array_equal(Images("imagenet64", data_dir=tmp_path / "out").array, rows.reshape(12, 3, 64, 64))
    last = tmp_path / "train_data_batch_10.npz"
    whole = last.read_bytes()
    for bad, text in ((whole[:-200], "cannot read .*batch_10"), (whole[:20000] + b"\0" * 100 + whole[20100:], "batch_10.npz row")):
        last.write_bytes(bad)
        with pytest.raises(UserError, match=text):
            data.main(["imagenet64", "--src", str(tmp_path), "--out", str(tmp_path / "out2"), "--workers", "1"])
    for array in (np.array([{}], dtype=object), rows[0].astype(np.float32), rows[0][:, :3072]):
        np.savez(last, data=array)
        with pytest.raises(UserError, match="cannot read .*batch_10"):
            data.main(["imagenet64", "--src", str(tmp_path), "--out", str(tmp_path / "out2"), "--workers", "1"])


def test_shapes(tmp_path):
    """Catches an image that depends on more than (seed, i), images that are all alike, and texture or hard edges that
    would hide the noise a model leaves."""
    data.main(["shapes", "--n", "300", "--out", str(tmp_path / "a"), "--workers", "2"])
    data.main(["shapes", "--n", "70", "--out", str(tmp_path / "b"), "--workers", "1"])
    data.main(["shapes", "--n", "70", "--seed", "1", "--out", str(tmp_path / "c"), "--workers", "1"])
    a, b, c = (Images("shapes", data_dir=tmp_path / name) for name in "abc")
    np.testing.assert_array_equal(a.array[:70], b.array)
    assert len({image.tobytes() for image in [*a.array, *c.array]}) == 370
    estimate = data.noise_estimate(a.read(np.arange(300)))
    assert estimate.mean() < 0.008 and estimate.max() < 0.03
    assert (a.array.std(axis=(2, 3)).max(axis=1) > 10).all()  # there is something to see in each


def test_subspace(tmp_path, capsys, monkeypatch):
    """Catches a PCA without the mean, with variances for deviations or components out of order, data that are not on the
    subspace or not Gaussian, a truth that does not belong to them, and a wrong range. Independent: numpy's SVD."""
    data.main(["shapes", "--n", "400", "--size", "8", "--out", str(tmp_path), "--workers", "1"])
    arguments = ["subspace", "--size", "8", "--components", "6", "--n", "2500", "--out", str(tmp_path)]
    data.main(arguments)
    images = Images("subspace", 8, tmp_path)
    truth, x = images.truth(), images.read(np.arange(2500)).reshape(2500, 192).astype(np.float64)
    source = np.load(tmp_path / "shapes-8.npy").reshape(400, 192) / 127.5 - 1
    _, s, v = np.linalg.svd(source - source.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(truth["mean"], source.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(truth["scale"], s[:6] / 20, rtol=1e-4)  # 20 = sqrt(400 images)
    assert np.abs(np.abs((truth["components"] * v[:6]).sum(axis=1)) - 1).max() < 1e-4
    assert f"{(s[:6] ** 2).sum() / (s ** 2).sum():.1%}" in capsys.readouterr().out
    a = (x - truth["mean"]) @ truth["components"].T / truth["scale"]  # [2500, 6]
    assert np.abs(x - truth["mean"] - (a * truth["scale"]) @ truth["components"]).max() < 1e-6
    assert np.abs(a.mean(axis=0)).max() < 5 / 50 and np.abs(np.cov(a.T) - np.eye(6)).max() < 5 * (2 / 2500) ** 0.5
    assert scipy.stats.kstest(a.ravel(), "norm").pvalue > 1e-4
    assert images.low == x.min() < -1 and images.high == x.max() and images.array.dtype == np.float32
    prepare = data.main
    monkeypatch.setattr(data, "main", lambda shapes: prepare([*shapes, "--n", "400"]))
    prepare([*arguments[:-1], str(tmp_path / "again")])  # draws its own shapes
    assert Images("subspace", 8, tmp_path / "again").info["sha256"] == images.info["sha256"]
    with pytest.raises(UserError, match="of subspace only"):
        Images("shapes", 8, tmp_path).truth()


# ------------------------------------------------------------------------------------------------ the run as a whole

def test_same_command_again(tmp_path, capsys):
    """Catches work done twice, other settings silently answered with the old data, and a run that ends without its
    .json (killed between the two files) taken as finished."""
    arguments = ["shapes", "--n", "30", "--size", "8", "--out", str(tmp_path), "--workers", "1"]
    data.main(arguments)
    before = (tmp_path / "shapes-8.npy").stat().st_mtime_ns
    data.main(arguments)
    assert (tmp_path / "shapes-8.npy").stat().st_mtime_ns == before and "is there" in capsys.readouterr().out
    with pytest.raises(UserError, match="n 30, now 31; seed 0, now 2: delete"):
        data.main([*arguments[:1], "--seed", "2", "--n", "31", *arguments[3:]])
    (tmp_path / "shapes-8.json").unlink()
    with pytest.raises(UserError, match="not prepared"):
        Images("shapes", 8, tmp_path)
    data.main([*arguments[:1], "--n", "31", *arguments[3:]])
    assert len(Images("shapes", 8, tmp_path)) == 31


def begin_long_run(folder):
    """A run that takes minutes, as soon as it has written something: (process, ids of its two workers)."""
    run = subprocess.Popen([sys.executable, str(HERE / "data.py"), "shapes", "--n", "1000000", "--size", "8", "--workers",
                            "2", "--out", str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 60
    while not any(file.stat().st_size > 100_000 for file in folder.glob(".*")) and time.time() < deadline:
        time.sleep(0.05)
    return run, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()


def test_killed_run(tmp_path):
    """Catches a killed run that leaves what looks like a result, workers that live on, partial files that pile up, and a
    second run that cannot start."""
    run, workers = begin_long_run(tmp_path)
    try:
        second = run_data("shapes", "--n", "10", "--size", "8", "--out", tmp_path)
        assert second.returncode == 2 and "another process" in second.stderr
        assert len(workers) == 2
        run.kill()
        run.wait()
        assert finished(tmp_path) == [] and len(os.listdir(tmp_path)) == 1
        with pytest.raises(UserError, match="not prepared"):
            Images("shapes", 8, tmp_path)
        deadline = time.time() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        run.kill()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    assert run_data("shapes", "--n", "10", "--size", "8", "--out", tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["shapes-8.json", "shapes-8.npy"]


def test_interrupted_run(tmp_path):
    """Catches Ctrl-C that leaves partial files, ends in a traceback, or has another exit status than 130."""
    run, _ = begin_long_run(tmp_path)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(30) == 130 and "Traceback" not in run.stderr.read() and os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------------------- fid.py

def near(a, b, rtol):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) <= rtol * np.linalg.norm(np.asarray(b))


# ------------------------------------------------------------------------------------------------------------ inception

def inception_by_rule():
    """The weights of ../shared/golden/README.md: a rule instead of a file."""
    state = {}
    for key, shape in fid.inception_shapes().items():
        z = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if key.startswith("fc."):
            state[key] = (0.2 if key == "fc.weight" else 0.1) * z
        elif key.endswith("conv.weight"):
            state[key] = z * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif key.endswith("running_var"):
            state[key] = torch.exp(0.2 * z)
        else:
            state[key] = 0.1 * z + key.endswith("bn.weight")
    return state


@pytest.fixture(scope="module")
def inception():
    return fid.Inception(inception_by_rule())


def images_by_rule(count, height, width):
    i, y, x, c = np.ogrid[:count, :height, :width, :3]
    return (((3 * x * x + 5 * x * y + 7 * y * y) * (i + 1) // 8 + 40 * c * (i + 2) + 31 * i) % 256).astype(np.uint8)


# What torch-fidelity 0.4.0 (float32) computes for 4 images of 32 x 32 and 2 of 40 x 48: |f|, and f projected on
# cos(j k), k = 1, 2, 3; the same of the logits without bias; and its IS of the logits over 2 and 4 splits.
FEATURES = [[49.581037, 33.219729, 0.818771, -17.533109], [54.275847, 37.553928, 1.130864, -18.760416],
            [47.481659, 31.840064, -0.124531, -17.473615], [46.083508, 28.88922, -0.197946, -17.690058],
            [52.609399, 36.940132, 0.454846, -18.588223], [53.533425, 37.247144, -0.771948, -18.745546]]
LOGITS = [[323.077692, -62.660854, -348.524075, 313.381395], [353.822554, -61.882314, -393.025501, 355.702552],
          [309.807102, -44.497446, -328.678586, 288.005811], [300.60994506, -50.689851, -307.852432, 271.366855],
          [342.765433, -57.698788, -374.194688, 328.896305], [349.244020, -53.209276, -372.387773, 347.479533]]
SCORES = {2: (1.002573015769104, 0.00035909911201614797), 4: (1.000808333944041, 0.0013219647587488486)}


def test_inception_agrees_with_torch_fidelity(inception):
    """A wrong layer, pool, padding, eps, resize, order of axes or normalisation; a bias added to the logits."""
    outputs = [inception(images_by_rule(4, 32, 32)), inception(images_by_rule(2, 40, 48))]
    for i, golden in enumerate((FEATURES, LOGITS)):
        found = torch.cat([output[i] for output in outputs]).double().numpy()
        waves = np.cos(np.outer(np.arange(found.shape[1]), [1, 2, 3]))
        found = np.column_stack([np.linalg.norm(found, axis=1), found @ waves])
        # 1e-5 of |f|; the waves have norm sqrt(D / 2).
        assert np.abs(found - golden).max() <= 1e-5 * found[:, 0].min()
    logits = torch.cat([output[1] for output in outputs])
    for splits, golden in SCORES.items():
        score = fid.Score(6, splits)
        score.add(logits, 0)
        assert np.allclose(score.total(), golden, rtol=1e-5, atol=1e-8)


def test_inception_does_not_depend_on_the_batch(inception):
    """Batch statistics instead of the stored ones (train mode)."""
    images = images_by_rule(3, 32, 32)
    alone, _ = inception(images[:1])
    assert near(alone, inception(images)[0][:1], 1e-6)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_against_the_golden_file(inception):
    """As above on real images; the Frechet distance and IS of its features where covariances are singular."""
    golden = torch.load(SHARED / "golden" / "inception.pt", weights_only=True)
    shapes = {key: tuple(shape) for key, shape in golden["keys"].items() if not key.endswith("num_batches_tracked")}
    assert shapes == fid.inception_shapes() and len(golden["keys"]) == 566
    for name, count in (("a", 2), ("b", 2), ("48", 1)):
        features, logits = inception(golden[f"images_{name}"][:count])
        assert near(features, golden[f"features_{name}"][:count], 1e-5)
        if name != "48":
            assert near(logits, golden[f"logits_unbiased_{name}"][:count], 1e-5)
    found = []
    for name in "ab":
        moments, score = fid.Moments(2048), fid.Score(32, 1)
        for first in range(0, 32, 10):
            moments.add(golden[f"features_{name}"][first:first + 10])
            score.add(golden[f"logits_unbiased_{name}"][first:first + 10], first)
        found.append(moments.total()[1:])
        assert abs(score.total()[0] / golden["inception_score_1_split"][name] - 1) <= 1e-9
    assert abs(fid.frechet_distance(*found[1], *found[0]) / golden["fid_exact"] - 1) <= 1e-9
    assert abs(fid.frechet_distance(*found[1], *found[0]) / golden["fid_torch_fidelity"] - 1) <= 1e-5
    assert abs(fid.frechet_distance(*found[0], *found[0])) <= 1e-9


def test_weights_are_checked(tmp_path):
    """A state dict that does not fit, taken without a word; files with num_batches_tracked refused."""
    state = inception_by_rule()
    tracked = {key.replace("running_var", "num_batches_tracked"): torch.tensor(0) for key in state if "_var" in key}
    fid.Inception({**state, **tracked})
    name = "Mixed_6c.branch7x7_2.bn.running_var"
    for bad, words in (({**state, "Mixed_6c.extra": torch.zeros(2)}, "Mixed_6c.extra"),
                       ({k: v for k, v in state.items() if k != name}, f"{name} is missing"),
                       ({**state, "fc.weight": torch.zeros(1000, 2048)}, r"fc.weight is \(1000, 2048\)"),
                       ({**state, name: -torch.ones(160)}, "not finite, or a negative variance"),
                       ({**state, "fc.weight": torch.full((1008, 2048), torch.nan)}, "fc holds values"),
                       ([1, 2], "not a state dict")):
        with pytest.raises(UserError, match=words):
            fid.Inception(bad)
    file = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-700])
    for content in (file.read_bytes(), b"", b"<html>"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="w.pth: not a whole PyTorch weights file"):
            fid.load_inception(file, tmp_path, "cpu")
    with pytest.raises(UserError, match="--weights .*none.pth: no such file"):
        fid.load_inception(tmp_path / "none.pth", tmp_path, "cpu")


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    """A traceback, a missing source or place, half a file left behind."""
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no inception here")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as error:
        fid.load_inception(None, tmp_path, "cpu")
    line = str(error.value)
    for words in ("mseitzer/pytorch-fid/releases", "toshas/torch-fidelity/releases", "6726825d0af5",
                  str(tmp_path / "pt_inception-2015-12-05-6726825d.pth")):
        assert words in line
    assert "\n" not in line and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- moments, Frechet distance and score

def test_moments_from_any_batches():
    """ddof 0; sums that lose all digits where the mean is large beside the spread; batches merged wrongly."""
    x = np.random.default_rng(0).standard_normal((50, 6)) * np.logspace(-3, 0, 6) + 1e6
    truth = np.cov((x - 1e6).T)
    for batch in (1, 7, 50):
        moments = fid.Moments(6)
        for part in torch.from_numpy(x).split(batch):
            moments.add(part)
        count, mean, covariance = moments.total()
        assert count == 50 and np.allclose(mean, x.mean(0), rtol=1e-14)
        assert np.allclose(covariance, truth, rtol=0, atol=1e-7)


def turned(eigenvalues, rotation):
    return rotation * eigenvalues @ rotation.T


@pytest.mark.parametrize("spread", [1, 6, 10])
def test_frechet_distance_in_closed_form(spread):
    """A wrong formula; for commuting covariances it is |m|^2 + sum (sqrt(a) - sqrt(b))^2, here over 1 to 10 decades."""
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    a, b, mean = np.logspace(0, -spread, 40), np.logspace(0.5, -spread, 40), rng.standard_normal(40)
    truth = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = fid.frechet_distance(mean, turned(a, rotation), np.zeros(40), turned(b, rotation))
    assert abs(found - truth) <= 1e-8 * truth
    # 2 x 2, not commuting: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) with M = S T.
    s, t = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.7], [-0.7, 3]])
    root = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    assert abs(fid.frechet_distance(np.zeros(2), s, np.ones(2), t) - (2 + 7 - 2 * root)) <= 1e-12


def test_small_singular_values_keep_their_digits():
    """The digits lost by taking eigenvalues of a square, where half of the variances are 1 and half 1e-11; a set of
    equal images, whose covariance is zero."""
    a = np.repeat([1, 1e-11], 100)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((200, 200)))
    found = fid.frechet_distance(np.zeros(200), turned(a, rotation), np.zeros(200), turned(a * 4, rotation))
    assert abs(found - a.sum()) <= 1e-10                            # (sqrt(a) - sqrt(4 a))^2 = a
    zero = np.zeros((200, 200))
    assert fid.frechet_distance(np.zeros(200), zero, np.zeros(200), turned(a, rotation)) == pytest.approx(a.sum())


def test_fewer_images_than_dimensions():
    """Rounding errors of singular covariances that enter by their square roots; negative distances of equal sets."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((12, 300)) + 5, 1.2 * rng.standard_normal((9, 300)) + 5
    moments = []
    for z in (x, y):
        m = fid.Moments(300)
        m.add(torch.from_numpy(z))
        moments.append(m.total()[1:])
    u, v = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    step = x.mean(0) - y.mean(0)
    truth = step @ step + (u ** 2).sum() + (v ** 2).sum() - 2 * np.linalg.norm(u @ v.T, "nuc")
    assert abs(fid.frechet_distance(*moments[0], *moments[1]) / truth - 1) <= 1e-11
    assert abs(fid.frechet_distance(*moments[0], *moments[0])) <= 1e-11
    near = (moments[0][0], moments[0][1] * (1 + 1e-14))
    assert abs(fid.frechet_distance(*moments[0], *near)) <= 1e-11


def test_inception_score_by_its_definition():
    """A wrong split boundary, an average of logs, ddof 1, a natural or binary logarithm, splits mixed by batches."""
    logits = np.random.default_rng(4).standard_normal((11, 1008)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in (p[:3], p[3:7], p[7:]):           # 3 splits of 11: 0, 11 // 3, 22 // 3, 11
        scores.append(np.exp(np.mean([(q * np.log(q / part.mean(0))).sum() for q in part])))
    score = fid.Score(11, 3)
    for first in range(0, 11, 4):
        score.add(torch.from_numpy(logits[first:first + 4]), first)
    assert np.allclose(score.total(), (np.mean(scores), np.std(scores)), rtol=1e-12)


def test_pixel_features():
    """Pixels averaged across box borders, axes or channels mixed, a wrong scale."""
    images = images_by_rule(2, 16, 32)
    found = fid.pixel_features(images).reshape(2, 8, 8, 3)
    for i, y, x, c in ((0, 0, 0, 0), (1, 7, 3, 2), (1, 2, 5, 1)):
        box = images[i, 2 * y:2 * y + 2, 4 * x:4 * x + 4, c].astype(float)
        assert found[i, y, x, c] == pytest.approx(box.mean() / 127.5 - 1, abs=1e-12)


# -------------------------------------------------------------------------------------------------- the command line

def score(samples, *arguments, out=None):
    """fid.main on the arguments: the JSON that it writes."""
    out = out or Path(samples).with_suffix(".json")
    fid.main([str(a) for a in (samples, *arguments, "--out", out)])
    return json.loads(out.read_text())


@pytest.fixture
def sets(tmp_path):
    """Two sets of images in several forms, and FD-pixels of them from numpy alone."""
    rng = np.random.default_rng(5)
    a, b = (rng.integers(0, high, (count, 16, 16, 3), dtype=np.uint8) for high, count in ((256, 40), (200, 30)))
    np.savez_compressed(tmp_path / "a.npz", a, protocol=np.array(json.dumps(dict(sampler="ddim", steps=250, step=7))))
    np.save(tmp_path / "b.npy", b)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for i, image in enumerate(b):
            file = tmp_path / "folder" / "deeper" / f"{i:03d}.png"
            Image.fromarray(image).save(file)
            archive.write(file, f"x/{i:03d}.png")
    np.savez(tmp_path / "float.npz", b.astype(np.float32) / 127.5 - 1)
    x, y = (fid.pixel_features(z).numpy() for z in (a, b))
    u, v = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    truth = ((x.mean(0) - y.mean(0)) ** 2).sum() + (u ** 2).sum() + (v ** 2).sum() - 2 * np.linalg.norm(u @ v.T, "nuc")
    np.savez(tmp_path / "stats.npz", mu=y.mean(0), sigma=np.cov(y.T))
    return tmp_path, truth


def test_every_form_gives_the_same(sets, capsys):
    """A form read in another order, scale or layout; float images truncated; the protocol lost; called FID; the noise
    estimate in the units of bytes, of one channel or of the last batch."""
    folder, truth = sets
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])[None, :, :, None]
    response = scipy.signal.convolve(np.load(folder / "a.npz")["arr_0"] / 127.5, mask, mode="valid", method="direct")
    noise = np.sqrt(np.pi / 2) / 6 * np.abs(response).mean()
    for ref in ("b.npy", "b.zip", "folder", "float.npz", "stats.npz"):
        result = score(folder / "a.npz", "--ref", folder / ref, "--features", "pixels", "--batch", 7)
        assert result["value"] == pytest.approx(truth, rel=1e-9) and result["metric"] == "FD-pixels"
        assert result["noise_mean"] == pytest.approx(noise, rel=1e-6)
        line = capsys.readouterr().out
        assert "sampler ddim" in line and "steps 250" in line and "training step 7" in line and "N 40 of a.npz" in line
        assert "FID" not in line and line.count("\n") == 1
    assert abs(score(folder / "a.npz", "--ref", folder / "a.npz", "--features", "pixels")["value"]) <= 1e-12


def test_several_samples_are_judged_one_by_one(sets, capsys):
    """Catches a result of one set written beside another, and one --out for several."""
    folder, truth = sets
    names = [str(folder / name) for name in ("a.npz", "b.npy")]
    fid.main([*names, "--ref", names[1], "--features", "pixels", "--data-dir", str(folder)])
    values = [json.loads(Path(f"{name}.fd-pixels.json").read_text())["value"] for name in names]
    assert values == [pytest.approx(truth, rel=1e-9), pytest.approx(0, abs=1e-9)]
    with pytest.raises(UserError, match="--out"):
        fid.main([*names, "--ref", names[1], "--features", "pixels", "--out", str(folder / "out.json")])


def test_cache_of_the_reference(sets):
    """A cache that is not used, or used though the reference has changed."""
    folder, truth = sets
    command = (folder / "a.npz", "--ref", folder / "b.npy", "--features", "pixels")
    score(*command)
    cache, = folder.glob("b.npy.pixels-*.npz")
    with np.load(cache) as file:
        np.savez(cache, mu=file["mu"] + 1, sigma=file["sigma"], n=file["n"])
    assert score(*command)["value"] > truth + 100                     # 192 features one off: the cache was used
    np.save(folder / "b.npy", np.load(folder / "b.npy")[::-1])
    assert score(*command)["value"] == pytest.approx(truth, rel=1e-9)
    assert len(list(folder.glob("b.npy.pixels-*.npz"))) == 2


def test_other_weights_are_not_called_fid(sets, capsys, inception, monkeypatch):
    """A distance on other weights that is called FID; the published ones not recognised; counts or warnings lost."""
    folder, _ = sets
    small = fid.Inception.__new__(fid.Inception)                            # two images are enough here
    small.__dict__.update(inception.__dict__)
    np.savez(folder / "two.npz", images_by_rule(2, 32, 32))
    for weights, name in (("0" * 64, "FD-inception"), (fid.WEIGHTS["sha256"], "FID")):
        monkeypatch.setattr(fid, "load_inception", lambda *args: (small, weights))
        result = score(folder / "two.npz", "--ref", folder / "two.npz", "--splits", 2)
        text = capsys.readouterr()
        assert result["metric"] == name and abs(result["value"]) <= 1e-6 and result["is_mean"] == pytest.approx(1)
        assert text.out.startswith(f"{name} ") and ("not to be called FID" in text.out) == (name != "FID")
        assert weights in text.out and "TF1" in text.out
        assert "fewer than 2,048" in text.err and "fewer than 10,000" in text.err


def test_memory_does_not_grow_with_the_images(tmp_path):
    """An .npz that is read whole: 24 MB here."""
    np.savez_compressed(tmp_path / "many.npz", np.zeros((8000, 32, 32, 3), np.uint8))
    tracemalloc.start()
    source = fid.open_source(tmp_path / "many.npz")
    assert sum(len(images) for images in source.read(0, source.count, 64)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


def bad_files(folder):
    """Bad SAMPLES and the words that must be in the one line that refuses them."""
    rng, good = np.random.default_rng(6), np.zeros((5, 16, 16, 3), np.uint8)
    image = Image.fromarray(good[0])

    def npz(name, array):
        np.savez(folder / name, array)
        return folder / name

    def images(name, *files):
        (folder / name).mkdir()
        for i, file in enumerate(files):
            if isinstance(file, bytes):
                (folder / name / f"{i}.png").write_bytes(file)
            else:
                file.save(folder / name / f"{i}.png")
        return folder / name
    nan = np.zeros((5, 16, 16, 3), np.float32) - 0.5
    nan[4, 0, 0, 0] = np.nan
    yield npz("one.npz", good[:1]), "holds 1 image: a covariance takes at least 2"
    yield npz("grey.npz", good[..., 0]), "holds greyscale images"
    yield npz("grey1.npz", good[..., :1]), "holds greyscale images"
    yield npz("planes.npz", good.transpose(0, 3, 1, 2)), r"\(5, 3, 16, 16\); images \[N, H, W, 3\] are expected"
    yield npz("none.npz", good[:0]), r"\(0, 16, 16, 3\); images"
    yield npz("int.npz", good.astype(np.int64)), "holds int64; uint8"
    yield npz("object.npz", np.full((5, 16, 16, 3), None)), "holds object; uint8"
    yield npz("range.npz", rng.uniform(0, 255, good.shape)), r"float images from .* to 25.*: \[-1, 1\]"
    yield npz("unit.npz", rng.uniform(0, 1, good.shape)), "float images, none negative"
    yield npz("nan.npz", nan), "nan.npz holds values that are not finite"
    yield npz("large.npz", np.zeros((5, 24, 24, 3), np.uint8)), r"of \(24, 24\), ref.npz of \(16, 16\)"
    np.savez(folder / "keys.npz", images=good)
    yield folder / "keys.npz", "holds images.npy; images are expected under arr_0"
    np.savez(folder / "dims.npz", mu=np.zeros(5), sigma=np.eye(5))
    yield folder / "dims.npz", "statistics of 5 features, which do not go with --features pixels"
    np.savez(folder / "sigma.npz", mu=np.zeros(192), sigma=np.eye(191))
    yield folder / "sigma.npz", r"mu is \(192,\) and sigma \(191, 191\)"
    np.savez(folder / "sigmanan.npz", mu=np.zeros(192), sigma=np.full((192, 192), np.nan))
    yield folder / "sigmanan.npz", "mu or sigma holds values that are not finite"
    np.savez(folder / "negative.npz", mu=np.zeros(192), sigma=-np.eye(192))
    yield folder / "negative.npz", "not a covariance matrix"
    np.savez(folder / "protocol.npz", good, protocol=np.array("[1]"))
    yield folder / "protocol.npz", "its protocol is not a JSON object"
    np.save(folder / "cut.npy", good)
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:-1000])
    yield folder / "cut.npy", "cut.npy is truncated: it ends in image 3 of 5"
    (folder / "cut.npz").write_bytes(npz("whole.npz", good).read_bytes()[:2000])
    yield folder / "cut.npz", "cut.npz: damaged or unreadable"
    flipped = bytearray((folder / "whole.npz").read_bytes())
    flipped[2000] ^= 1
    (folder / "flipped.npz").write_bytes(flipped)
    yield folder / "flipped.npz", "flipped.npz: damaged or unreadable .*CRC"
    yield images("empty"), "no images in it"
    yield images("mixed", image, image.resize((8, 8))), r"mixed sizes .*0.png is \(16, 16\), 1.png \(8, 8\)"
    yield images("greys", image, image.convert("L")), "1.png is greyscale"
    yield images("alpha", image, image.convert("RGBA")), "1.png is not RGB .mode RGBA."
    yield images("broken", image, b"not an image"), "broken/1.png: damaged or unreadable"
    whole = images("noise", Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))) / "0.png"
    yield images("half", image, whole.read_bytes()[:500]), "half/1.png: damaged or unreadable"
    yield images("seven", image.resize((7, 7)), image.resize((7, 7))), "are not multiples of 8"
    yield folder / "missing.npz", "missing.npz: no such file or folder"
    (folder / "a.txt").write_text("x")
    yield folder / "a.txt", "neither an .npz, a .npy, a zip nor a folder"
    yield "shapes", "shapes: no such file or folder, and no prepared data set: .*python data.py shapes"


def test_bad_input_is_one_clear_line(tmp_path):
    """A traceback, a wrong number instead of a refusal, a line that does not say what was wrong; files left behind."""
    np.savez(tmp_path / "ref.npz", np.random.default_rng(7).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8))
    for path, words in bad_files(tmp_path):
        with pytest.raises(UserError, match=words) as error:
            fid.main([str(path), "--ref", f"{tmp_path}/ref.npz", "--features", "pixels", "--data-dir", str(tmp_path)])
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("*.json")), path
    good = str(tmp_path / "ref.npz")
    for arguments, words in ((["--splits", "10"], "--splits 10: ref.npz has only 9 images"),
                             (["--batch", "0"], "--batch 0 --splits 10: both"), (["--splits", "0"], "--splits 0")):
        with pytest.raises(UserError, match=words):
            fid.main([good, "--ref", good, *arguments])


# ------------------------------------------------------------------------------------------------------------ subspace

@pytest.fixture
def subspace(tmp_path):
    """A prepared subspace data set of 8 x 8 images with 5 components, and samples that are not quite from it."""
    rng, width = np.random.default_rng(8), 3 * 8 * 8
    basis, _ = np.linalg.qr(rng.standard_normal((width, 5)))
    truth = dict(mean=rng.standard_normal(width), components=basis.T, scale=np.array([3, 2, 1, 0.5, 0.1]))
    x = truth["mean"] + rng.standard_normal((40, 5)) * truth["scale"] @ truth["components"]
    array, info, file = data._files("subspace", 8, tmp_path)
    np.save(array, x.reshape(40, 3, 8, 8).astype(np.float32))
    np.savez(file, **truth)
    info.write_text(json.dumps(dict(name="subspace", size=8, count=40, dtype="float32", sha256="0" * 64,
                                    low=float(x.min()), high=float(x.max()))))
    x = x * 0.9 + 0.05 * rng.standard_normal(x.shape) + 0.02
    np.savez(tmp_path / "s.npz", x.reshape(40, 3, 8, 8).transpose(0, 2, 3, 1).astype(np.float32))
    return tmp_path, truth, x.astype(np.float32).astype(np.float64)


def exact_by_hand(truth, x):
    """FD-exact in all D dimensions, from covariances; rho, PSNR and variance from their definitions."""
    u, mean = truth["components"], truth["mean"]
    y = mean + (x - mean) @ u.T @ u                                                         # the projection
    root = (x - x.mean(0)) / np.sqrt(len(x) - 1)                                            # root^T root = covariance
    true = (u.T * truth["scale"]).T                                                         # [k, D], the same
    value = ((x.mean(0) - mean) ** 2).sum() + (root ** 2).sum() + (true ** 2).sum()
    value -= 2 * np.linalg.norm(root @ true.T, "nuc")
    rho = np.sqrt(((x - y) ** 2).sum(1))
    kept = ((root @ u.T) ** 2).sum() / (truth["scale"] ** 2).sum()
    return value, rho, 10 * np.log10(2 ** 2 / ((x - y) ** 2).mean()), kept


def test_subspace_measures(subspace, capsys):
    """A wrong decomposition, axes of images and components mixed, ddof, a wrong peak; called FID; bytes accepted."""
    folder, truth, x = subspace
    result = score(folder / "s.npz", "--ref", "subspace", "--data-dir", folder, "--batch", 7)
    value, rho, psnr, kept = exact_by_hand(truth, x)
    assert result["metric"] == "FD-exact" and "FID" not in capsys.readouterr().out
    assert result["value"] == pytest.approx(value, rel=1e-9) == result["fd_inside"] + result["fd_outside"]
    assert result["rho_mean"] == pytest.approx(rho.mean(), rel=1e-9)
    for q, percentile in result["rho_percentiles"].items():
        assert percentile == pytest.approx(np.percentile(rho, int(q)), rel=1e-9)
    assert result["psnr"] == pytest.approx(psnr, rel=1e-9) and result["variance_kept"] == pytest.approx(kept, rel=1e-9)
    own = score("subspace", "--ref", "subspace", "--data-dir", folder, "--size", 8, out=folder / "own.json")
    assert own["rho_mean"] < 1e-5 and own["fd_outside"] < 1e-10 and own["psnr"] > 120       # float32 of the very set
    np.savez(folder / "bytes.npz", np.zeros((4, 8, 8, 3), np.uint8))
    for name, more, words in (("bytes.npz", [], "holds uint8: floats in the units of subspace-8"),
                              ("s.npz", ["--features", "pixels"], "not with subspace-8, a known Gaussian")):
        with pytest.raises(UserError, match=words):
            fid.main([str(folder / name), "--ref", "subspace", "--data-dir", str(folder), *more])


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import data, fid, torch, torch.distributed
process = fid.start_processes()                                 # once, for four runs in one launch
fid.start_processes, torch.distributed.destroy_process_group = lambda: process, lambda: None
folder, size = sys.argv[2] + "/", ["--data-dir", sys.argv[2]]
fid.main([folder + "a.npz", "--ref", folder + "b.npy", "--features", "pixels", "--out", folder + "pixels.json"])
fid.main([folder + "s.npz", "--ref", "subspace", "--out", folder + "exact.json", *size])
logits = lambda images: torch.from_numpy(images.reshape(len(images), -1)).repeat(1, 2)[:, :1008] / 99
fid.load_inception = lambda *a: (lambda images: (fid.pixel_features(images), logits(images)), "0" * 64)
sys.argv = ["fid.py"]
fid.DIMENSIONS["inception"] = 192
fid.main([folder + "a.npz", "--ref", folder + "b.npy", "--splits", "3", "--out", folder + "score.json"])
data.command_line(lambda: fid.main([folder + "late", "--ref", folder + "b.npy", "--features", "pixels"]))
"""


def test_two_processes_give_the_result_of_one(sets, subspace, tmp_path):
    """Shares that overlap or miss images, sums of one process only, splits of one process; a process that waits for
    ever, or a line that nobody prints, when the file that only the second process reads is broken."""
    folder, truth = sets
    (folder / "late").mkdir()
    for i in range(70):                                             # more than the head that every process looks at
        Image.fromarray(images_by_rule(1, 16, 16)[0]).save(folder / "late" / f"{i:02d}.png")
    file = folder / "late" / "69.png"                               # the last, in the second process's share
    file.write_bytes(file.read_bytes()[:-60])
    (tmp_path / "driver.py").write_text(DRIVER)
    outcome = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                              tmp_path / "driver.py", HERE, folder], capture_output=True, text=True, timeout=120,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert outcome.returncode != 0 and outcome.stderr.count("fid.py: error: ") == 1, outcome.stderr
    assert "late/69.png: damaged or unreadable" in outcome.stderr
    two = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("pixels", "exact", "score")}
    assert two["pixels"]["value"] == pytest.approx(truth, rel=1e-9) and two["pixels"]["processes"] == 2
    assert two["pixels"]["value"] == pytest.approx(two["score"]["value"], rel=1e-12)
    noise = data.noise_estimate(np.load(folder / "a.npz")["arr_0"].transpose(0, 3, 1, 2) / 127.5).mean()
    assert two["pixels"]["noise_mean"] == pytest.approx(noise, rel=1e-6)
    one = score(folder / "s.npz", "--ref", "subspace", "--data-dir", folder)
    for key in ("value", "rho_mean", "psnr", "variance_kept"):
        assert two["exact"][key] == pytest.approx(one[key], rel=1e-9)
    with np.load(folder / "a.npz") as images:
        logits = torch.from_numpy(images["arr_0"].reshape(40, -1)).repeat(1, 2)[:, :1008] / 99
    whole = fid.Score(40, 3)
    whole.add(logits, 0)
    assert np.allclose(whole.total(), (two["score"]["is_mean"], two["score"]["is_std"]), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ attack.py

# ----------------------------------------------------------------------------------------------------------- attack.py

def attacking(tmp_path, name, steps, model, schedule, indices, variance="large", clamp=None, sampler="ddpm", **changes):
    """The hook of one shard, with the command line's defaults."""
    settings = SimpleNamespace(**dict(attack=name, phi=1.0, iters=20, eot=5, eps_scale=1.0, sampler=sampler, seed=3) | changes)
    return attack.TrajectoryAttack(settings, steps, tmp_path / "sums.json", model, schedule, indices, variance, clamp)


def doubled(seed, indices, shape):
    """The sampler's noise in float64."""
    return (z.double() for z in sample.image_noise(seed, indices, shape))


LINEAR = 0.4 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
V = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)     # a learned variance, fixed


def linear(x, t):
    """eps_theta(x, t) = c(t) x A^T, for which the attacks can be written down: x [B, 3, 2, 2]."""
    return ((1 + t.double() / 1000)[:, None] * (x.flatten(1) @ LINEAR.T)).view_as(x)


def linear_with_variance(x, t):
    """The same with a learned variance that does not depend on x."""
    return torch.cat([linear(x, t), V.view(1, 3, 2, 2).expand_as(x)], dim=1)


@pytest.mark.parametrize("name, sampler, variance", [
    ("noise", "ddpm", "small"), ("fgsm", "ddpm", "large"), ("fgsm", "ddpm", "learned"), ("fgsm", "ddim", "large"),
    ("pgd", "ddpm", "large"), ("pgd", "ddim", "small"), ("eot", "ddpm", "large"), ("eot", "ddpm", "learned"),
    ("drift", "ddpm", "large"), ("drift", "ddim", "large")])
def test_attacks_by_hand(tmp_path, name, sampler, variance):
    """A whole attacked run in numpy: each algorithm's cost, start, step, projection and scale, sigma(t), the noise that the
    undisturbed and the attacked step share, steps that are not attacked, both trajectories beside, distances, passes."""
    schedule, B, N, phi, eps_scale, seed = Schedule.named("linear", 100).respaced(5), 3, 4, 1.5, 0.7, 3
    indices, chosen, shape = range(7, 7 + B), {3, 2, 0}, (3, 2, 2)
    model = linear_with_variance if variance == "learned" else linear
    hook = attacking(tmp_path, name, chosen, model, schedule, indices, variance, None, sampler, phi=phi, iters=N, eot=2,
                     eps_scale=eps_scale)
    x_0 = sample.sample(model, schedule, doubled(seed, indices, shape), sampler, variance, None, hook)

    noise, draws = (sample.image_noise(s, indices, shape) for s in (seed, seed + attack.ATTACK_SEED))
    flat = lambda stream: next(stream).double().flatten(1).numpy()
    A, beta_full = LINEAR.numpy(), np.linspace(10 * 1e-4, 10 * 0.02, 100)
    t = np.array([0, 25, 50, 74, 99])                       # round(i 99 / 4), halves to even
    alpha_bar = np.cumprod(1 - beta_full)[t]
    previous = np.array([1, *alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    small = beta * (1 - previous) / (1 - alpha_bar)
    log_small = np.log([small[1], *small[1:]])
    log_large = np.log([small[1], *beta[1:]])
    share = (V.numpy() + 1) / 2

    def tables(k):
        """-> x0_hat = x @ to_x0, next mean = x @ to_next, sigma(t)."""
        to_x0 = (np.eye(12) - np.sqrt(1 - alpha_bar[k]) * (1 + t[k] / 1000) * A.T) / np.sqrt(alpha_bar[k])
        if sampler == "ddim":
            to_eps = (np.eye(12) - np.sqrt(alpha_bar[k]) * to_x0) / np.sqrt(1 - alpha_bar[k])
            to_next = np.sqrt(previous[k]) * to_x0 + np.sqrt(1 - previous[k]) * to_eps
        else:                                               # section A.2
            to_next = (np.sqrt(previous[k]) * beta[k] * to_x0
                       + np.sqrt(1 - beta[k]) * (1 - previous[k]) * np.eye(12)) / (1 - alpha_bar[k])
        log_sigma2 = {"large": log_large[k], "small": log_small[k], "learned": share * log_large[k] + (1 - share) * log_small[k]}
        return to_x0, to_next, np.exp(0.5 * log_sigma2[variance])

    x = flat(noise)
    clean = control = None
    kept = size = 0
    for k in reversed(range(5)):
        to_x0, to_next, sigma = tables(k)
        xi = flat(noise) * sigma * (k > 0) if sampler == "ddpm" else 0.0            # Eq. 4's noise of this step
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
            elif name == "pgd":                                                     # Algorithm 3
                moved = start
                for _ in range(N):
                    moved = np.clip(moved + 2.5 * r / N * np.sign(moved @ to_next @ to_next.T), -r, r)
            else:                                                                   # Algorithm 4
                delta, root = start, np.sqrt(alpha_bar[k])
                for _ in range(N):
                    gradients = [root * ((root * delta @ to_next + sigma * (k > 0) * flat(draws)) - xi) @ to_next.T
                                 for _ in range(2)]
                    delta = np.clip(delta + 2.5 * r / N * np.sign(np.mean(gradients, axis=0)), -r, r)
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
    sums = json.loads((tmp_path / "sums.json").read_text())
    assert sums["moved"] == pytest.approx(np.linalg.norm(x - clean, axis=1).sum(), rel=1e-6)
    assert sums["control"] == pytest.approx(np.linalg.norm(control - clean, axis=1).sum(), rel=1e-6)
    assert (sums["kept"], sums["size"]) == pytest.approx((kept, size), rel=1e-6)
    assert (sums["steps"], sums["attacked"], sums["pixels"], sums["outside"]) == (3, 9, 12, 0)
    passes = {"noise": (1, 0), "fgsm": (2, 1), "drift": (2, 1), "pgd": (1 + N, N), "eot": (1 + N, N)}[name]
    assert (sums["forwards"] / 3, sums.get("backwards", 0) / 3) == passes == attack.NEEDED[name](N)


@pytest.fixture(scope="module")
def network():
    """A tiny U-Net with random weights, whose parameters ask for gradients."""
    return randomised(UNet(size=8, **TINY)).eval()


@pytest.mark.parametrize("name", ["fgsm", "pgd", "eot", "drift"])
def test_attack_climbs_and_keeps_to_the_state(network, tmp_path, name):
    """On a U-Net, x0_hat clamped: the cost rises over its random start, more so in larger balls; the ball holds; no gradient
    reaches a parameter and no graph leaves the hook; the undisturbed trajectory is sample()'s own."""
    schedule, costs = Schedule.named("linear", 100).respaced(12).to("cpu"), []
    for eps_scale in (0.5, 1.0):
        hook = attacking(tmp_path, name, {3, 2, 1}, network, schedule, range(4), clamp=(-1.0, 1.0), iters=5,
                         eps_scale=eps_scale)
        x_0 = sample.sample(network, schedule, sample.image_noise(3, range(4), (3, 8, 8)), attack=hook)
        clean = sample.sample(network, schedule, sample.image_noise(3, range(4), (3, 8, 8)))
        sums = json.loads((tmp_path / "sums.json").read_text())
        assert sums["moved"] == pytest.approx(float((x_0 - clean).flatten(1).norm(dim=1).sum()), rel=1e-6) and sums["moved"] > 0
        assert sums["end"] > sums["start"] > 0 and sums["outside"] == sums["zero"] == sums["broken"] == 0
        assert 0 < sums["size"] / sums["attacked"] <= 1 + 1e-6
        costs.append(sums["end"])
    assert costs[1] > costs[0]
    assert not x_0.requires_grad and all(p.grad is None for p in network.parameters())


def test_pgd_reaches_at_least_fgsms_cost(network, tmp_path):
    """Algorithm 3 on the step that Algorithm 2 attacks: 20 accumulated steps are worth no less than one whole one."""
    schedule, end = Schedule.named("linear", 100).respaced(8).to("cpu"), {}
    for name in ("fgsm", "pgd"):
        hook = attacking(tmp_path, name, {2}, network, schedule, range(8), clamp=(-1.0, 1.0))
        sample.sample(network, schedule, sample.image_noise(3, range(8), (3, 8, 8)), attack=hook)
        end[name] = json.loads((tmp_path / "sums.json").read_text())["end"]
    assert end["pgd"] >= end["fgsm"]


def test_attack_counts_what_would_fake_robustness(network, tmp_path, monkeypatch):
    """A perturbation outside its ball, Algorithm 4's smaller one too; a gradient that is zero everywhere; one that is NaN."""
    schedule = Schedule.named("linear", 100).respaced(4).to("cpu")

    def sums(name, model, step, clamp=None):
        hook = attacking(tmp_path, name, {step}, model, schedule, range(4), clamp=clamp, iters=3)
        sample.sample(model, schedule, sample.image_noise(3, range(4), (3, 8, 8)), clamp=clamp, attack=hook)
        return json.loads((tmp_path / "sums.json").read_text())

    constant = lambda x, t: 0 * x + 100                     # x0_hat far outside the clamp, and at t = 0 nothing but x0_hat
    found = sums("pgd", constant, 0, (-1.0, 1.0))
    assert (found["zero"], found["broken"], found["gradients"]) == (12, 0, 12)
    assert sums("fgsm", constant, 1, (-1.0, 1.0))["zero"] == 0
    assert sums("fgsm", lambda x, t: torch.where(x > 1, x * float("nan"), x), 2)["broken"] == 4
    monkeypatch.setattr(attack, "fgsm", lambda slope, start, radius: slope(start).sign() * radius * 1.001)
    monkeypatch.setattr(attack, "pgd", lambda slope, start, radius, iters: slope(start).sign() * radius * 1.001)
    assert sums("fgsm", network, 2)["outside"] == 4 and sums("eot", network, 2)["outside"] == 4


@pytest.mark.parametrize("name, sampler", [("fgsm", "ddim"), ("eot", "ddpm"), ("drift", "ddpm")])
def test_attack_belongs_to_the_image(tmp_path, name, sampler):
    """Images 0 to 4 together, and in twos with other neighbours: every random draw of the attack is the image's own."""
    schedule = Schedule.named("linear", 100).respaced(5)

    def attacked(indices):
        hook = attacking(tmp_path, name, {4, 2}, linear, schedule, indices, "large", (-1.0, 1.0), sampler, iters=3)
        return sample.sample(linear, schedule, doubled(3, indices, (3, 2, 2)), sampler, "large", (-1.0, 1.0), hook)

    parts = torch.cat([attacked(indices) for indices in (range(0, 2), range(2, 4), range(4, 5))])
    assert (attacked(range(5)) - parts).abs().max() < 1e-10


def test_attacked_steps():
    """How many, which, no step twice, and that `first` is the first one sampled: the noisiest."""
    for where in ("spread", "first", "last", "random"):
        for total, count in [(100, 0), (100, 1), (100, 25), (100, 33), (7, 7), (1000, 999)]:
            chosen = attack.attacked_steps(total, count, where)
            assert len(chosen) == count and chosen <= set(range(total))
    assert attack.attacked_steps(10, 3, "first") == {9, 8, 7} and attack.attacked_steps(10, 3, "last") == {0, 1, 2}
    quarter = sorted(attack.attacked_steps(100, 25, "spread"))
    assert set(np.diff(quarter)) == {4} and 0 < quarter[0] < 4 and 95 < quarter[-1] < 99
    assert attack.attacked_steps(100, 25, "random", 1) != attack.attacked_steps(100, 25, "random", 2)
    assert attack.attacked_count("25%", 40) == 10 and attack.attacked_count("40", 40) == 40


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_no_attacked_step_is_sample_py(trained, tmp_path, monkeypatch, sampler):
    """--steps-attacked 0: the bytes of sample.py, and a report that says nothing moved."""
    common = [trained, "--n", 3, "--batch", 2, "--steps", 4, "--seed", 1, "--sampler", sampler]
    call(monkeypatch, sample, *common, "--out", tmp_path / "a.npz")
    call(monkeypatch, attack, *common, "--steps-attacked", 0, "--out", tmp_path / "b.npz")
    a, b = (np.load(tmp_path / name, allow_pickle=False) for name in ("a.npz", "b.npz"))
    assert np.array_equal(a["arr_0"], b["arr_0"])
    report = json.loads((tmp_path / "b.attack.json").read_text())
    assert report["rms"] == report["rms_noise"] == 0 and report["forwards"] is None


def test_attack_does_not_depend_on_processes_or_interruptions(trained, tmp_path, monkeypatch):
    """Two processes, and a run that died after its second shard: the same images and the same numbers; nothing is left over."""
    common = [trained, "--n", 5, "--batch", 2, "--steps", 4, "--attack", "eot", "--iters", 2, "--steps-attacked", "50%"]
    call(monkeypatch, attack, *common, "--out", tmp_path / "a.npz")
    run("attack.py", *common, "--out", tmp_path / "b.npz", processes=2)

    write, done = sample.Shards.write, []

    def dying(self, k, images):
        write(self, k, images)
        done.append(k)
        if len(done) == 2:
            raise InterruptedError

    monkeypatch.setattr(sample.Shards, "write", dying)
    with pytest.raises(InterruptedError):
        call(monkeypatch, attack, *common, "--out", tmp_path / "c.npz")
    call(monkeypatch, attack, *common, "--out", tmp_path / "c.npz")
    assert done == [0, 1, 2]
    images = [np.load(tmp_path / f"{name}.npz", allow_pickle=False) for name in "abc"]
    reports = [json.loads((tmp_path / f"{name}.attack.json").read_text()) for name in "abc"]
    for other, found in zip(images[1:], reports[1:]):
        assert np.array_equal(images[0]["arr_0"], other["arr_0"])
        for name, value in reports[0].items():
            if name != "seconds_per_image":
                assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)), name
    assert json.loads(str(images[0]["protocol"]))["steps_attacked"] == reports[0]["steps_attacked"] == 2
    assert reports[0]["forwards"] == 3 and reports[0]["backwards"] == 2 and reports[0]["rms"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{a}.{b}" for a in "abc" for b in ("npz", "png", "attack.json"))


def test_report_says_where_an_attack_is_none(tmp_path, capsys):
    """Means over images and attacked steps; an attack no better than noise, or that does not climb, is called that."""
    def report(**changes):
        shard = dict(steps=2, attacked=20, forwards=4, backwards=2, gradients=20, zero=0, broken=0, size=20.0, kept=15.0, outside=0,
                     start=10.0, end=30.0, moved=40.0, control=20.0, seconds=5.0, pixels=4) | changes
        for first in (0, 10):
            (tmp_path / "o.npz.attack").mkdir(exist_ok=True)
            (tmp_path / "o.npz.attack" / f"{first:06d}.json").write_text(json.dumps(shard))
        asked = dict(attack="fgsm", iters=20, steps_attacked=2, steps=5, where="spread", sampler="ddpm", eps_scale=1.0)
        return attack.report(tmp_path / "o.npz.attack", tmp_path / "o.npz", 20, 10, asked), capsys.readouterr().out

    result, text = report()
    assert (result["l2"], result["rms"], result["l2_noise"], result["forwards"], result["backwards"]) == (4, 2, 2, 2, 1)
    assert (result["cost_start"], result["cost_end"], result["size"], result["seconds_per_image"]) == (0.5, 1.5, 1, 0.5)
    assert result["signs_of_start"] == 0.75
    assert "2.00 times" in text and "NO MORE THAN NOISE" not in text and "NOT CLIMB" not in text
    assert "NO MORE THAN NOISE" in report(moved=20.5)[1] and "NO MORE THAN NOISE" in report(moved=0.0, control=0.0)[1]
    assert "NOT CLIMB" in report(end=10.0)[1]
    assert "NOT TRUST" in report(zero=4)[1] and report(zero=4)[0]["zero_gradients"] == 0.2
    (tmp_path / "o.npz.attack").mkdir()
    with pytest.raises(UserError, match="000000.json is missing"):
        attack.report(tmp_path / "o.npz.attack", tmp_path / "o.npz", 20, 10, {})


@pytest.mark.parametrize("argv, message", [
    (["--steps-attacked", "-1"], "0 to 4"), (["--steps-attacked", "5"], "0 to 4"), (["--steps-attacked", "120%"], "0 to 4"),
    (["--steps-attacked", "some"], "0 to 4"), (["--steps-attacked", "nan%"], "0 to 4"),
    (["--steps-attacked", "1", "--phi", "0"], "--phi 0.0: must be positive"),
    (["--steps-attacked", "1", "--iters", "0"], "--iters 0"), (["--steps-attacked", "1", "--eot", "-2"], "--eot -2"),
    (["--steps-attacked", "1", "--eps-scale", "inf"], "--eps-scale inf"),
    (["--steps-attacked", "1", "--attack", "eot", "--sampler", "ddim"], "--attack pgd"),
    (["--steps-attacked", "1", "--n", "0"], "--n 0")])
def test_attack_refuses(trained, tmp_path, monkeypatch, argv, message):
    """Each wrong flag, by its name, before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, attack, trained, "--steps", 4, *argv)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- memorize.py


def unit(rows, columns, seed):
    """Random rows of length 1, float32, and the same numbers in float64 numpy."""
    x = torch.nn.functional.normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=1)
    return x, x.double().numpy()


def prepare(folder, name, images, **facts):
    """A prepared data set of the images [N, H, W, 3], as data.py leaves it."""
    array = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    np.save(folder / f"{name}-{images.shape[1]}.npy", array)
    info = dict(name=name, count=len(array), dtype=str(array.dtype), low=-1, high=1,
                sha256=hashlib.sha256(array.tobytes()).hexdigest(), **facts)
    (folder / f"{name}-{images.shape[1]}.json").write_text(json.dumps(info))


def pictures(count, seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def memorise(folder, samples, *more, features="pixels", data="mine"):
    """memorize.main on the arguments: the JSON that it writes, which must be strict."""
    flags = ("--data", data, "--features", features, "--data-dir", folder)
    memorize.main([str(a) for a in (folder / samples, *flags, *more)])

    def refuse(text):
        raise ValueError(text)
    return json.loads((folder / f"{samples}.memorize.json").read_text(), parse_constant=refuse)


def cosines(a, b, mean):
    """All cosines between images [N, H, W, 3] and [M, H, W, 3] after subtraction of the mean, float64 [N, M]."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) - mean.reshape(-1) for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@pytest.fixture
def planted(tmp_path):
    """30 training images and 20 samples: sample 4 is training image 17, sample 11 is 29; 3 and 25 of training agree."""
    train, generated = pictures(30, 1), pictures(20, 2)
    train[25] = train[3]
    generated[4], generated[11] = train[17], train[29]
    prepare(tmp_path, "mine", train)
    np.savez(tmp_path / "s.npz", generated, protocol=np.array(json.dumps(dict(method="adv", data="mine", steps=250))))
    return tmp_path, train, generated


@pytest.mark.parametrize("block", [1, 7, 16, 57, 1000])
def test_memorize_nearest_by_brute_force(block):
    """A last block left out; an index counted within its block; the maximum of the last block, or over the queries."""
    (x, x64), (y, y64) = unit(57, 16, 1), unit(83, 16, 2)
    truth = x64 @ y64.T
    similarity, index = memorize.nearest(x, y, block=block)
    assert np.array_equal(index.numpy(), truth.argmax(1))
    assert np.abs(similarity.numpy() - truth.max(1)).max() < 1e-6


@pytest.mark.parametrize("block", [1, 8, 50, 1000])
def test_memorize_leaves_out_the_image_itself_only(block):
    """An image taken for its own neighbour; a copy under another index taken for the image itself."""
    x, x64 = unit(50, 16, 3)
    x[31], x64[31] = x[7], x64[7]
    truth = x64 @ x64.T
    truth[np.arange(50), np.arange(50)] = -np.inf
    similarity, index = memorize.nearest(x, x, itself=True, block=block)
    assert np.array_equal(index.numpy(), truth.argmax(1)) and np.abs(similarity.numpy() - truth.max(1)).max() < 1e-6
    assert (index[7], index[31]) == (31, 7) and similarity[[7, 31]].min() > 1 - 1e-6 and similarity.max() <= 1


def test_memorize_summary_of_known_vectors():
    """Another percentile rule or percentile; 0.9 itself not counted; the share as a count."""
    found = memorize.summary(np.arange(101)[::-1] / 100)
    assert found == pytest.approx(dict(mean=0.5, p75=0.75, p90=0.9, p95=0.95, share=11 / 101), abs=1e-12)
    found = memorize.summary(torch.tensor([0.1, 0.4, 0.95, 0.2], dtype=torch.float64))
    # Linear between the sorted values 0.1 0.2 0.4 0.95, whose ranks are 0, 1/3, 2/3, 1.
    assert found == pytest.approx(dict(mean=0.4125, p75=0.5375, p90=0.785, p95=0.8675, share=0.25), abs=1e-12)


def test_memorize_finds_planted_copies(planted, capsys):
    """A copy not found, or paired with another image; the mean of the samples subtracted, or none; the two sets mixed
    up; a histogram that loses images; pixels passed off as DINOv2; the protocol lost."""
    folder, train, generated = planted
    result = memorise(folder, "s.npz", "--batch", 7)
    mean = train.astype(np.float64).mean(0)
    truth, among = cosines(generated, train, mean), cosines(train, train, mean)
    np.fill_diagonal(among, -np.inf)
    for name, best in (("generated", truth.max(1)), ("train", among.max(1))):
        expected = dict(mean=best.mean(), share=np.mean(best > 0.9),
                        **{f"p{q}": np.quantile(best, q / 100) for q in (75, 90, 95)})
        assert result[name] == pytest.approx(expected, abs=1e-6)
        counts = result["histogram"][name]
        assert sum(counts) == len(best) and sum(counts[95:]) == 2 == round(expected["share"] * len(best))
    assert result["histogram"]["edges"][95] == 0.9 and len(result["histogram"]["edges"]) == 101
    assert {tuple(pair[:2]) for pair in result["closest"][:2]} == {(4, 17), (11, 29)}
    assert result["closest"][2][0] == np.argsort(truth.max(1))[-3] and result["closest"][1][2] > 1 - 1e-6
    assert (result["metric"], result["n"], result["n_train"], result["weights"]) == ("memorisation", 20, 30, None)
    assert result["protocol"] == dict(method="adv", data="mine", steps=250) and result["warnings"] == []
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "pixels (not DINOv2)" in line and result["features"] == "pixels (not DINOv2)"
    assert "method adv" in line and "generated: share >= 0.9 0.1," in line and "train: share >= 0.9 0.06667," in line
    grid = np.asarray(Image.open(folder / "s.npz.memorize.png"))
    for row, column, image in ((0, 0, generated), (0, 1, train), (0, 4, generated), (0, 5, train), (1, 1, train)):
        pair = result["closest"][row * 4 + column // 2]
        tile = grid[row * 10:row * 10 + 8, column * 10:column * 10 + 8]
        assert np.array_equal(tile, image[pair[column % 2]])


def test_memorize_float_samples_and_other_data(planted, capsys):
    """Float samples read in another scale than the training images' bytes; samples of another data set not noticed."""
    folder, _, generated = planted
    expected = memorise(folder, "s.npz")["generated"]
    np.savez(folder / "f.npz", generated.astype(np.float32) / 127.5 - 1, protocol=np.array('{"data": "celeba"}'))
    result = memorise(folder, "f.npz")
    assert result["generated"] == expected and "trained on celeba" in result["warnings"][0]
    assert "trained on celeba" in capsys.readouterr().err
    np.savez(folder / "p.npz", generated, protocol=np.array('{"data": "?"}'))
    assert memorise(folder, "p.npz")["warnings"] == []


def test_memorize_subspace_in_its_own_units(tmp_path):
    """Data units clipped or rounded to bytes, which a Gaussian's exceed."""
    rng = np.random.default_rng(3)
    train, generated = (rng.normal(0, 3, (count, 4, 4, 3)).astype(np.float32) for count in (12, 9))
    prepare(tmp_path, "subspace", train)
    np.savez(tmp_path / "subspace-4-truth.npz", mean=np.zeros(48), components=np.eye(48)[:2], scale=np.ones(2))
    np.savez(tmp_path / "s.npz", generated)
    result = memorise(tmp_path, "s.npz", data="subspace")
    truth = cosines(generated, train, train.astype(np.float64).mean(0))
    assert result["generated"]["mean"] == pytest.approx(truth.max(1).mean(), abs=1e-6)
    assert result["closest"][0][:2] == list(np.unravel_index(truth.argmax(), truth.shape))
    np.savez(tmp_path / "b.npz", pictures(9, 1, 4))
    with pytest.raises(UserError, match="b.npz holds uint8: floats in units of subspace-4"):
        memorise(tmp_path, "b.npz", data="subspace")
    with pytest.raises(UserError, match="--features dinov2_vitb14 is for images; the floats of subspace-4 take pixels"):
        memorise(tmp_path, "s.npz", data="subspace", features="dinov2_vitb14")


def test_memorize_cache_of_the_training_set(planted):
    """A cache that is not used, or used though the training images have changed; one that is damaged, believed."""
    folder, train, _ = planted
    first = memorise(folder, "s.npz")
    cache, = folder.glob("mine-8.memorize-pixels-*.npz")
    with np.load(cache) as file:
        np.savez(cache, similarity=file["similarity"] * 0 + 0.5, features=file["features"])
    again = memorise(folder, "s.npz")
    assert again["train"]["mean"] == 0.5 and again["generated"] == first["generated"]
    assert again["train_from_cache"] and not first["train_from_cache"]
    cache.write_bytes(cache.read_bytes()[:-100])
    with pytest.raises(UserError, match="memorize-pixels-.*npz, which can be deleted: damaged"):
        memorise(folder, "s.npz")
    prepare(folder, "mine", train[::-1])
    assert memorise(folder, "s.npz")["train"] == pytest.approx(first["train"], abs=1e-6)
    assert len(list(folder.glob("mine-8.memorize-*.npz"))) == 2


@pytest.mark.parametrize("size", [8, 32, 256])
def test_memorize_input_of_dino_against_pillow(size):
    """Another interpolation, no antialiasing, values outside of what an image can hold, channels or scale wrong."""
    image = pictures(1, 4, size)[0]
    pale = image // 4 + 96                                  # does not overshoot: Pillow clips between its passes, too
    truth = np.asarray(Image.fromarray(pale).resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    truth = (truth - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = memorize.dino_input(pale[None])
    assert found.shape == (1, 3, 224, 224) and found.dtype == torch.float32
    assert np.abs(found[0].permute(1, 2, 0).numpy() - truth).max() < 1.5 / 255 / 0.224          # Pillow rounds twice
    for value, channel in zip(memorize.dino_input(image[None])[0], ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert (value.min(), value.max()) == pytest.approx([(x - channel[0]) / channel[1] for x in (0, 1)], abs=1e-5)


HUBCONF = """
import torch

class Standin(torch.nn.Module):                 # what it computes can be computed by hand
    def __init__(self, width):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(6, width), torch.nn.Dropout(0.5)
    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224) and x.dtype == torch.float32
        return self.dropout(self.linear(x.unflatten(3, (2, 112)).mean((2, 4)).flatten(1)))

def dinov2_vitb14(*, pretrained=True):
    print("noise on stdout")
    assert not pretrained, "it would fetch weights that nobody checks"
    return Standin(5)

def dinov2_vits14(*, pretrained=True):
    return Standin(4)
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub folder with stand-ins for DINOv2, and `weights.pth` whose sha256 counts as the published one."""
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(HUBCONF)
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(5))
    for name, state in (("weights", dict(weight=weight, bias=torch.zeros(5))), ("short", dict(weight=weight)),
                        ("small", dict(weight=weight[:4], bias=torch.zeros(4)))):
        torch.save({f"linear.{k}": v.clone() for k, v in state.items()}, tmp_path / f"{name}.pth")

    def publish(file, name="dinov2_vitb14"):
        digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        monkeypatch.setitem(memorize.WEIGHTS, name, dict(sha256=digest, size=1000))
        return digest
    return tmp_path, weight.double().numpy(), publish


def test_memorize_dino_from_a_local_hub(planted, hub, capsys):
    """Random weights left in the network; training mode; features not of length 1; a cache shared by two networks; the
    repository's chatter in the result; the weights' hash or the code's not reported."""
    folder, train, generated = planted
    _, weight, publish = hub
    digest = publish("weights.pth")
    flags = ("--weights", folder / "weights.pth", "--hub-dir", folder / "hub")
    result = memorise(folder, "s.npz", *flags, "--batch", 7, features="dinov2_vitb14")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("memorisation on dinov2_vitb14 |") and "DINOv2)" not in out
    assert result["weights"] == digest and result["code"].startswith("local copy, sha256 ")

    def by_hand(images):
        large = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
        x = np.stack([np.asarray(image) for image in large])
        x = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return np.stack([x[:, :, :112].mean((1, 2)), x[:, :, 112:].mean((1, 2))], -1).reshape(-1, 6) @ weight.T
    truth = cosines(by_hand(generated), by_hand(train), np.zeros(5))
    among = cosines(by_hand(train), by_hand(train), np.zeros(5))
    np.fill_diagonal(among, -np.inf)
    for name, best in (("generated", truth.max(1)), ("train", among.max(1))):
        assert result[name]["mean"] == pytest.approx(best.mean(), abs=1e-3)                     # Pillow rounds
        assert result[name]["p75"] == pytest.approx(np.quantile(best, 0.75), abs=1e-3)
    assert {(4, 17), (11, 29)} <= {tuple(pair[:2]) for pair in result["closest"] if pair[2] > 1 - 1e-6}
    cache, = folder.glob("mine-8.memorize-dinov2_vitb14-*.npz")
    with np.load(cache) as file:
        assert file["features"].shape == (30, 5) and np.allclose(np.linalg.norm(file["features"], axis=1), 1)
        np.savez(cache, similarity=file["similarity"], features=-file["features"])
    turned = memorise(folder, "s.npz", *flags, features="dinov2_vitb14")["generated"]
    assert turned["mean"] < result["generated"]["mean"]                                         # the cache was used
    publish("small.pth", "dinov2_vits14")
    small = memorise(folder, "s.npz", "--weights", folder / "small.pth", *flags[2:], features="dinov2_vits14")
    assert small["features"] == "dinov2_vits14" and not small["train_from_cache"]
    (folder / "hub" / "more.py").write_text("x = 1")
    assert not memorise(folder, "s.npz", *flags, features="dinov2_vitb14")["train_from_cache"]  # other code


def test_memorize_refuses_other_weights_and_code(planted, hub, capsys):
    """Weights that are not the published ones, or that leave part of the network random, taken; code run before its
    weights are checked; a traceback of foreign code."""
    folder, publish = planted[0], hub[2]
    digest = publish("weights.pth")

    def refused(words, weights="weights.pth", hub_dir="hub"):
        with pytest.raises(UserError, match=words) as error:
            flags = ("--weights", folder / weights, "--hub-dir", folder / hub_dir)
            memorise(folder, "s.npz", *flags, features="dinov2_vitb14")
        assert "\n" not in str(error.value) and not list(folder.glob("*.memorize*"))
    (folder / "hub" / "hubconf.py").write_text("raise SystemError('code was run')")
    refused(rf"--weights .*short.pth: its sha256 is \w+, not {digest}, that of https://.*_vitb14_pretrain", "short.pth")
    refused("--weights .*none.pth: no such file; https://.*/dinov2_vitb14/dinov2_vitb14_pretrain.pth is it", "none.pth")
    refused("--hub-dir .*empty: no hubconf.py in it; a clone of https://github.com/facebookresearch/dinov2 has one",
            hub_dir="empty")
    refused("no dinov2_vitb14 that takes the published weights .SystemError: code was run.*--hub-dir")
    (folder / "hub" / "hubconf.py").write_text("import torch")
    refused("no dinov2_vitb14 that takes the published weights .RuntimeError: Cannot find callable")
    (folder / "hub" / "hubconf.py").write_text(HUBCONF)
    publish("short.pth")
    refused("RuntimeError: Error.* in loading state_dict .*linear.bias", "short.pth")
    (folder / "code.pth").write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "owned").encode() + b"'\ntR.")
    publish("code.pth")
    refused("no dinov2_vitb14 that takes the published weights", "code.pth")
    assert not (folder / "owned").exists()
    with pytest.raises(UserError, match="--features pixels takes neither --weights nor --hub-dir"):
        memorise(folder, "s.npz", "--hub-dir", folder / "hub")


def test_memorize_without_a_network(planted, hub, monkeypatch):
    """A traceback, no way out named, half a file left behind; a revision that is no full hash; a branch that moves."""
    folder, publish = planted[0], hub[2]

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network here")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as error:
        memorise(folder, "s.npz", features="dinov2_vitb14")
    for words in ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", "--weights takes",
                  str(folder / "dinov2_vitb14_pretrain.pth"), "0b8b82f85de91b42",
                  "--hub-dir a clone of https://github.com/facebookresearch/dinov2"):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and sorted(folder.iterdir()) == before
    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda where, *args, **flags: asked.append((where, flags)) or offline())
    publish("weights.pth")
    with pytest.raises(UserError, match="facebookresearch/dinov2:.* .URLError: .*no network here.*--hub-dir a clone"):
        memorise(folder, "s.npz", "--weights", folder / "weights.pth", features="dinov2_vitb14")
    (where, flags), = asked
    assert len(where.split(":")[1]) == 40 and int(where.split(":")[1], 16) and flags["pretrained"] is False


def test_memorize_bad_input_is_one_clear_line(planted, monkeypatch):
    """A traceback, a number in place of a refusal, work begun before the refusal; files left behind."""
    folder, train, generated = planted
    nan = np.zeros((9, 8, 8, 3), np.float32)
    nan[8, 0, 0, 0] = np.nan
    np.savez(folder / "large.npz", pictures(3, 1, 16))
    np.savez(folder / "unit.npz", np.abs(nan[:3]) + 0.5)
    np.savez(folder / "range.npz", generated.astype(np.float32))
    np.savez(folder / "nan.npz", nan)
    np.savez(folder / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(folder / "odd.npz", generated, protocol=np.array('{"sigma": NaN}'))
    prepare(folder, "one", train[:1])
    for words, *arguments in (
            ("missing.npz: no such file", "missing.npz"), ("holds statistics; images", "stats.npz"),
            (r"large.npz holds images of \(16, 16\), mine-8 of \(8, 8\)", "large.npz", "--size", 8),
            ("mine-16.npy is not prepared: run python data.py mine --src", "large.npz"),
            ("other-8.npy is not prepared", "s.npz", "--data", "other"),
            ("one-8 holds 1 image: the nearest other", "s.npz", "--data", "one"),
            ("unit.npz holds float images, none negative", "unit.npz"),
            ("range.npz holds float images from", "range.npz"),
            ("nan.npz holds values that are not finite", "nan.npz"), ("its protocol holds a number", "odd.npz"),
            ("--batch 0: must be", "s.npz", "--batch", 0),
            ("--out x.png: the name must end", "s.npz", "--out", "x.png")):
        with pytest.raises(UserError, match=words) as error:
            memorise(folder, *arguments)
        assert "\n" not in str(error.value) and not list(folder.glob("*memorize*")), arguments
    monkeypatch.setattr(memorize, "MAX_BYTES", 50 * 4 * 192 - 1)
    with pytest.raises(UserError, match="--features pixels: .* GB of them, more than"):
        memorise(folder, "s.npz")
    monkeypatch.setattr(memorize, "MAX_BYTES", 50 * 4 * 192)
    memorise(folder, "s.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process: start it with python"):
        memorise(folder, "s.npz")


# ------------------------------------------------------------------------------------------------------------- toy3d.py

@pytest.mark.parametrize("data", toy3d.DATA)
def test_toy_true_score_is_the_gradient_of_the_diffused_density(data):
    """Catches a mode's covariance left undiffused or unstandardised, and mixture weights that forget the exponent."""
    d, alpha_bar, h = toy3d.distribution(data), 0.8, 1e-5
    modes = [scipy.stats.multivariate_normal(math.sqrt(alpha_bar) * ((m - d.centre) / d.scale).numpy(),
                                             alpha_bar * d.covariance.numpy() / d.scale**2 + (1 - alpha_bar) * np.eye(3))
             for m in d.means]
    log_density = lambda x: np.log(np.mean([mode.pdf(x) for mode in modes], axis=0))
    x = np.random.default_rng(0).normal(size=(50, 3))
    expected = np.stack([(log_density(x + h * e) - log_density(x - h * e)) / (2 * h) for e in np.eye(3)], axis=1)
    np.testing.assert_allclose(toy3d.true_score(data, torch.tensor(x), alpha_bar), expected, rtol=1e-5, atol=1e-6)


def test_toy_distributions_are_the_papers():
    """Catches a wrong plane, mode or deviation, noise of the wrong size or share, outliers off the grid, a seed unused."""
    clean, inlier, outlier = (toy3d.training_points("oblique-plane", noise, 0, 20_000) for noise in toy3d.NOISES)
    assert torch.allclose(clean.sum(dim=1), torch.tensor(30.0, dtype=torch.float64))
    assert clean.var(dim=0).sum() == pytest.approx(2, rel=0.03)                 # deviation 1 in two directions
    off = (inlier.sum(dim=1) - 30).abs() / math.sqrt(3)
    assert off.square().mean().sqrt() == pytest.approx(math.sqrt(0.9) * 0.3, rel=0.02)
    assert (off < 1e-9).double().mean() == pytest.approx(0.1, abs=0.01)
    off = (outlier.sum(dim=1) - 30).abs() / math.sqrt(3)
    assert (off > 1e-9).double().mean() == pytest.approx(0.2, abs=0.02)         # a few grid points lie in the plane
    assert all(len(outlier[off > 1e-9][:, k].unique()) == 16 for k in range(3))
    assert torch.equal(inlier, toy3d.training_points("oblique-plane", "inlier", 0, 20_000))
    assert not torch.allclose(inlier, toy3d.training_points("oblique-plane", "inlier", 1, 20_000))
    modes = toy3d.training_points("3-gaussians", "clean", 0, 20_000)
    for mean in ([10, 10, 10], [20, 20, 20], [10, 30, 30]):
        near = modes[(modes - torch.tensor(mean)).norm(dim=1) < 2]
        assert len(near) / len(modes) == pytest.approx(1 / 3, abs=0.02)
        assert near.mean(dim=0).tolist() == pytest.approx(mean, abs=0.02)
        assert near.std(dim=0).tolist() == pytest.approx([0.25] * 3, rel=0.03)
    for name in toy3d.DATA:                                                     # unit variance for the network
        x = toy3d.standardised(name, toy3d.training_points(name, "clean", 0))
        assert x.square().sum(dim=1).mean() == pytest.approx(3, rel=0.05)
        assert torch.allclose(toy3d.original(name, x), toy3d.training_points(name, "clean", 0), atol=1e-4)


def test_toy_networks_are_what_each_would_be_alone():
    """Catches a network that reads a neighbour's weights or time, and t of one value a network read as one a point."""
    nets, g = Networks([3, 1], width=16), torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 5, 3, generator=g), torch.randint(1000, (2, 5), generator=g)
    out = nets(x, t)
    for k in range(2):
        time = F.linear(nets.embedding[t[k]].double(), nets.time[k].T.double())
        h = F.linear(x[k].double(), nets.weights[0][k].T.double(), nets.biases[0][k, 0].double())
        h = h * (1 + time[:, :16]) + time[:, 16:]
        for w, b in zip(nets.weights[1:], nets.biases[1:]):
            h = F.linear(h.clamp(min=0), w[k].T.double(), b[k, 0].double())
        torch.testing.assert_close(out[k].double(), h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nets(x, torch.tensor([7, 900])), nets(x, torch.tensor([[7] * 5, [900] * 5])))
    assert not torch.allclose(nets.weights[1][0], nets.weights[1][1])
    assert torch.equal(nets.weights[1][1], Networks([1], width=16).weights[1][0])


CELLS = [Cell("oblique-plane", "inlier", "adv", 0, 0.3), Cell("3-gaussians", "clean", "adv", 1, 0.1, omega=3.0),
         Cell("oblique-plane", "outlier", "adv", 0, 0.0), Cell("oblique-plane", "inlier", "adv", 1, 0.3)]


def weights_of(nets, k):
    return torch.cat([p[k].flatten() for p in nets.parameters()])


def test_toy_training_does_not_depend_on_the_company():
    """Catches randomness keyed by a network's place in the batch, gradients averaged over networks, one lambda for all."""
    together = toy3d.train(CELLS, 6, 16)
    for k, cell in enumerate(CELLS):
        torch.testing.assert_close(weights_of(together, k), weights_of(toy3d.train([cell], 6, 16), 0), rtol=1e-3, atol=1e-5)
    start = weights_of(Networks([0, 0, 1]), 0)
    assert (weights_of(together, 0) - start).abs().max() > 1e-3


def test_toy_training_takes_the_cells_method_lambda_and_omega():
    """Catches a setting that is not handed on: lambda = 0 must be ddpm, everything else must differ."""
    trained = lambda **change: weights_of(toy3d.train([CELLS[0]._replace(**change)], 4, 16), 0)
    ddpm = trained(method="ddpm")
    torch.testing.assert_close(trained(lam=0.0), ddpm, rtol=1e-4, atol=1e-6)
    variants = [ddpm, trained(), trained(lam=1.0), trained(omega=4.0), trained(lam_units="eps"), trained(method="ran"),
                trained(method="inv"), trained(noise="clean"), trained(data="3-gaussians"), trained(seed=5),
                trained(reg_share=0.25), weights_of(toy3d.train(CELLS[:1], 4, 16, balance=True), 0)]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(variants, 2))


def test_toy_share_trains_its_own_timesteps(monkeypatch):
    """Catches the drawn t or its factor kept from the loss of the share, or given to the other points."""
    loss, seen = toy3d.training_loss, []

    def watched(*a):
        seen.append((a[7], a[3]))
        return {name: term * (ignored != a[7]) for name, term in loss(*a).items()}

    monkeypatch.setattr(toy3d, "training_loss", watched)
    ignored, cells = "adv", [CELLS[0]._replace(reg_share=0.25, lam=1.0, lam_units="eps", omega=3.0)]
    expected = weights_of(toy3d.train(cells, 3, 16), 0)     # the share's loss ignored
    ignored, seen = None, []

    def drawn(schedule, t, chance, reg_share, balance, lam, lam_units, omega):
        assert (float(lam), lam_units, float(omega)) == (1.0, "eps", 3.0)
        return (t, 1 + 0 * chance) if reg_share == 1 else (0 * t + 7, 0 * chance)

    monkeypatch.setattr(toy3d, "timesteps", drawn)
    torch.testing.assert_close(weights_of(toy3d.train(cells, 3, 16), 0), expected, rtol=0, atol=0)
    assert [(method, bool((t == 7).all()), t.shape[1]) for method, t in seen] == 3 * [("adv", True, 4), ("ddpm", False, 12)]


def test_toy_errors_of_points_whose_errors_are_known():
    """Catches a distance along an axis instead of the normal, deviations for variances, occupancy of the wrong mode."""
    measured = lambda data, x: {name: float(value) for name, value in toy3d.errors(data, x).items()}
    plane = toy3d.training_points("oblique-plane", "clean", 0)
    moved = 10 + 0.5 * (plane - 10) + 0.3 * torch.where(torch.arange(len(plane)) % 2 == 0, 4.0, -1.0)[:, None] / math.sqrt(3)
    found = measured("oblique-plane", moved)
    assert found["rms"] == pytest.approx(0.3 * math.sqrt(17 / 2)) and found["strays"] == 0.5
    assert found["median"] == pytest.approx(0.3)
    assert found["kept"] == pytest.approx(0.25 * float((plane - 10).square().mean()) * 3 / 2, rel=1e-2)
    found = measured("oblique-plane", plane)
    assert found["rms"] < 1e-9 and found["kept"] == pytest.approx(1, rel=0.03) and found["smallest_mode"] == 1
    modes = toy3d.training_points("3-gaussians", "clean", 0)
    found = measured("3-gaussians", modes)
    assert found["rms"] == pytest.approx(0.25 * math.sqrt(3), rel=0.02) and found["strays"] == 0
    assert found["kept"] == pytest.approx(1, rel=0.05) and found["smallest_mode"] == pytest.approx(1, abs=0.05)
    two = modes[modes[:, 1] < 25]
    two[: len(two) // 4] += torch.tensor([0.0, 0.0, 5.0])                       # half-way to nowhere: strays, in no mode
    found = measured("3-gaussians", two)
    assert found["smallest_mode"] == 0 and found["strays"] == pytest.approx(0.25, abs=1e-3)
    assert found["kept"] == pytest.approx(1, rel=0.05)


def test_toy_lipschitz_constant_of_a_linear_denoiser():
    """Catches the Frobenius norm, a transposed product, eps for the denoiser, and a constant shared over networks."""
    schedule = Schedule.named("linear", 1000).to("cpu")
    A = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = toy3d.lipschitz(lambda x, t: x @ A, schedule, torch.randn(2, 4, 3), 300)
    s = schedule.sqrt_one_minus_alpha_bar[300].item()
    for k in range(2):
        expected = np.linalg.svd(np.eye(3) - s * A[k].numpy().astype(float).T, compute_uv=False)[0]
        assert found[k].tolist() == pytest.approx([expected] * 4, rel=1e-5)


def test_toy_attack_throws_a_linear_sampler_as_far_as_computed():
    """Catches attacked steps that are not ATTACKED many, a shove that is not sigma(t), a disturbed reference trajectory."""
    gain = Schedule.named("linear", 1000)
    sigma = (0.5 * gain.log_variance_large).exp()
    # With eps_theta = 0 a step multiplies by 1 / sqrt(1 - beta), and the best sign is the start's: both shoves are equal.
    steps = sorted(toy3d.attacked_steps(1000, toy3d.ATTACKED, "spread"))
    assert len(steps) == toy3d.ATTACKED
    growth = (1 - gain.beta).rsqrt().cumprod(dim=0)
    expected = (3 * (sigma[steps] * growth[steps]).square().sum()).sqrt().item() * toy3d.distribution("oblique-plane").scale
    cells = [Cell("oblique-plane", "clean", "ddpm", seed) for seed in (0, 1)]
    attacked, control = toy3d.thrown(lambda x, t: 0 * x, gain.to("cpu"), cells)
    torch.testing.assert_close(attacked, control, rtol=1e-3, atol=0)
    assert attacked.tolist() == pytest.approx([expected] * 2, rel=0.15) and attacked[0] != attacked[1]


@pytest.mark.parametrize("data", toy3d.DATA)
def test_toy_truth_measures_as_true(data, monkeypatch):
    """Catches any disagreement of units or sign between data, score, sampler and errors: the exact score must come out right."""
    for name, value in dict(T=200, SCORE_T=20, ATTACKED=50, EVERY=10).items():
        monkeypatch.setattr(toy3d, name, value)
    cells, schedule = [Cell(data, "clean", "ddpm", 0)], Schedule.named("linear", 200)

    def exact(x, t):
        alpha_bar = schedule.alpha_bar[t[0]].item()
        return (-math.sqrt(1 - alpha_bar) * toy3d.true_score(data, x, alpha_bar)).to(x.dtype)

    (numbers, trace, field), = toy3d.measure(exact, cells, 768)
    assert numbers["score_error"] < 1e-3 and numbers["strays"] == 0
    assert numbers["rms"] == pytest.approx({"oblique-plane": 0, "3-gaussians": 0.25 * math.sqrt(3)}[data], abs=0.03)
    assert numbers["kept"] == pytest.approx(1, abs=0.12) and numbers["smallest_mode"] > 0.8
    assert trace.shape == (21, 256, 3) and field.shape == (toy3d.FIELD**2, 3)
    d = toy3d.distribution(data)
    assert (trace[0] - d.centre).std() == pytest.approx(d.scale, rel=0.1)                   # starts as N(0, I)


def test_toy_claims_need_more_than_the_deviations():
    """Catches a claim read the wrong way round, a factor forgotten, deviations ignored, a claim made up from missing runs."""
    record = lambda method, *rms: dict.fromkeys(toy3d.COLUMNS, [1.0, 0.0]) | dict(data="oblique-plane", name=f"inlier {method}", rms=rms)
    holds = lambda *records: {c["claim"]: c["holds"] for c in toy3d.check_claims(list(records)) if c["number"] == "rms"}
    clear = holds(record("ddpm", 0.30, 0.01), record("adv", 0.05, 0.01), record("inv", 2.0, 0.5))
    assert clear == {"adv unlearns inlier noise": True, "invariance diverges, inlier noise": True}
    assert holds(record("ddpm", 0.30, 0.1), record("adv", 0.25, 0.1)) == {"adv unlearns inlier noise": False}
    assert holds(record("ddpm", 0.05, 0.01), record("adv", 0.3, 0.01)) == {"adv unlearns inlier noise": False}
    assert holds(record("ddpm", 0.3, 0.0), record("inv", 0.5, 0.0)) == {"invariance diverges, inlier noise": False}


@pytest.fixture
def short_process(monkeypatch):
    """50 timesteps instead of 1000."""
    for name, value in dict(T=50, EVERY=5, SCORE_T=10, ATTACKED=10).items():
        monkeypatch.setattr(toy3d, name, value)


def run_toy(monkeypatch, out, *flags):
    monkeypatch.setattr(sys, "argv", ["toy3d.py", "--steps", "3", "--batch", "8", "--n", "64", "--seeds", "2", "--out", str(out), *flags])
    toy3d.main()


def test_toy_command_line_writes_table_and_figures(short_process, monkeypatch, tmp_path, capsys):
    """Catches a run whose file, table or figures are missing or incomplete, and a partial run that overwrites a whole one."""
    run_toy(monkeypatch, tmp_path, "--seeds", "1")          # fewer trajectories than a figure shows
    lines = [json.loads(line) for line in (tmp_path / "toy3d.json").read_text().splitlines()]
    records, claims = [r for r in lines if "rms" in r], [r for r in lines if "claim" in r]
    assert len(records) == 2 * 3 * 4 and len(claims) == 27 and records[0]["seeds"] == 1
    # after three steps no point may be near a mode, whose variance is then not a number
    assert all(math.isfinite(v) for r in records for key in toy3d.COLUMNS if key != "kept" for v in r[key])
    assert "NaN" not in (tmp_path / "toy3d.json").read_text()
    assert "holds" in capsys.readouterr().out
    whole = (tmp_path / "toy3d.json").read_bytes()
    for sweep, count in (("lam", 20), ("omega", 10), ("reg-share", 10)):
        run_toy(monkeypatch, tmp_path, "--sweep", sweep, "--batch", "16")
        lines = [json.loads(line) for line in (tmp_path / f"toy3d-{sweep}.json").read_text().splitlines()]
        assert len([r for r in lines if "rms" in r]) == count
    run_toy(monkeypatch, tmp_path, "--data", "3-gaussians", "--noise", "clean", "--method", "ddpm")
    assert (tmp_path / "toy3d.json").read_bytes() == whole and (tmp_path / "toy3d-3-gaussians-clean-ddpm.json").exists()
    pytest.importorskip("matplotlib")
    names = {"fig2a", "fig2b", "fig2c", "fig6-right", "fig10", "fig11", "toy3d-lam", "toy3d-omega", "toy3d-reg-share"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names


def test_toy_without_matplotlib_makes_the_table(short_process, monkeypatch, tmp_path, capsys):
    """Catches an import of matplotlib outside the figures' code."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_toy(monkeypatch, tmp_path, "--noise", "inlier", "--method", "adv")
    assert (tmp_path / "toy3d-inlier-adv.json").exists() and "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--seeds", "0"), ("--n", "1"), ("--lam", "-1"), ("--lam", "nan"), ("--omega", "0.5")])
def test_toy_refuses_bad_numbers(flags, monkeypatch, tmp_path):
    """Catches a bad number found only after the training, or never."""
    monkeypatch.setattr(sys, "argv", ["toy3d.py", "--out", str(tmp_path / "no"), *flags])
    with pytest.raises(toy3d.UserError, match=flags[0]):
        toy3d.main()
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------------------ report.py


def report_run(folder, method="adv", p=0.9, sigma=0.2, seed=0, cost=1.0, step=600, name="subspace", size=4, **settings):
    """A run as train.py leaves it: a log and two sample grids."""
    folder.mkdir(parents=True)
    own = dict(method=method, lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255, batch=64, lr=1e-3, seed=seed, init=None)
    config = dict(network=dict(channels=32, mult=[1]), process=dict(schedule="linear", timesteps=1000),
                  data=dict(name=name, size=size, count=100, p=p, sigma=sigma, data_seed=0), training=own | settings)
    lines = [dict(step=0, event="start", config=config, cost=cost), dict(step=step, ddpm=0.1, images_per_s=5.0)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for k in (step // 2, step):
        Image.fromarray(np.full((22, 22, 3), 99, np.uint8)).save(folder / f"samples-{k:08d}.png")
    return folder


def report_score(run, value, rho=None, metric="FD-exact", samples="ddpm-100", sampler="ddpm", steps=100, attack=None, percent=None,
          n=512, **more):
    """A score as fid.py leaves it beside samples, with attack.py's where they were attacked."""
    first, last = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    config = first["config"]
    own = {} if attack is None else dict(attack=attack, steps_attacked=round(steps * percent / 100), where="spread", eps_scale=1.0,
                                         phi=1.0)
    made = dict(method=config["training"]["method"], data=config["data"]["name"], size=config["data"]["size"], n=n, step=last["step"],
                sampler=sampler, steps=steps, variance="large" if sampler == "ddpm" else None, ema=True, seed=0, **own)
    result = dict(metric=metric, samples=f"{samples}.npz", reference="subspace-4", value=value, protocol=made, **more)
    if rho is not None:
        result |= dict(rho_mean=rho, psnr=20.0, variance_kept=1.0)
    (run / f"{samples}.npz.{metric.lower()}.json").write_text(json.dumps(result))
    Image.fromarray(np.full((22, 22, 3), 55, np.uint8)).save(run / f"{samples}.png")
    if attack:
        (run / f"{samples}.attack.json").write_text(json.dumps(own | dict(steps=steps, sampler=sampler, rms=0.25, rms_noise=0.125)))


def write_report(tmp_path, plt=None):
    """report.py on tmp_path/runs -> README.md, and the claims as {(claim, data and number): row}."""
    rows = report.write(tmp_path / "runs", tmp_path / "out", plt)
    return (tmp_path / "out" / "README.md").read_text(), {(row[0], row[3]): row for row in rows}


def report_section(text, title):
    """The part of README.md under a heading that begins with the title."""
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


def report_line(text, *labels):
    """The only row of a table that begins with these labels -> its other cells."""
    found = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| " + " | ".join(labels) + " |")]
    assert len(found) == 1, found
    return found[0][len(labels):]


def report_pair(tmp_path, adv=(1.0, 0.5), ddpm=(3.0, 2.0)):
    """adv and ddpm at 90 % with sigma 0.2: (FD-exact, rho) of each."""
    for method, (distance, rho) in dict(adv=adv, ddpm=ddpm).items():
        report_score(report_run(tmp_path / "runs" / method, method), distance, rho)


BEATS = "adv beats DDPM, 90 % with σ 0.2, DDPM sampling"


def test_report_puts_every_number_into_its_own_cell(tmp_path):
    """Catches sampler, noise, method, steps or lambda being mixed up, and the paper's numbers in the wrong row."""
    runs, value = tmp_path / "runs", 10
    for noise in report.NOISES:
        for method in ("ddpm", "adv"):
            run = report_run(runs / f"x{value}", method, *noise)
            for sampler in ("ddpm", "ddim"):
                report_score(run, value, 0.5, sampler=sampler, samples=f"s{value}", steps=dict(ddpm=100, ddim=50)[sampler])
                value += 1
    report_score(report_run(runs / "weaker", "adv", 0.9, 0.2, lam=0.1), 77, 7)
    text, _ = write_report(tmp_path)
    table = report_section(text, "Table 2")
    # made in the order noise, method, sampler: 10 ... 21
    for noise, first in zip(("clean", "90 % with σ 0.1", "90 % with σ 0.2"), (10, 14, 18)):
        for method, add in (("DDPM", 0), ("Robust_adv", 2)):
            for sampler, more in (("DDPM", 0), ("DDIM", 1)):
                assert report_line(table, noise, sampler, method)[0] == f"{first + add + more}.0 / 0.500"
    assert report_line(table, "clean", "DDIM", "Robust_adv")[1:] == ["31.2 / 6.38", "17.59 / 2.18", "48.8 / 2.39", "–"]
    assert report_line(table, "90 % with σ 0.2", "DDPM", "DDPM")[1:] == ["102.68 / 4.19", "96.03 / 2.65", "95.85 / 4.08", "129.4"]
    fig7 = report_section(text, "Fig. 7")
    assert report_line(fig7, "90 % with σ 0.2", "0.1")[0] == "77.0 / 7.00 / 1.00"
    assert report_line(fig7, "90 % with σ 0.2", "0.3")[0] == "20.0 / 0.500 / 1.00"
    assert report_line(report_section(text, "Table 1, bottom"), "300", "Robust_adv")[0] == "–"


def test_report_averages_seeds(tmp_path):
    """Catches a deviation with ddof 0 (0.707), the seeds taken as two configurations, or a copy counted as a seed."""
    for seed, (distance, rho) in enumerate([(1.0, 4.0), (3.0, 8.0)]):
        report_score(report_run(tmp_path / "runs" / f"s{seed}", seed=seed), distance, rho)
    report_score(report_run(tmp_path / "runs" / "z-copy", seed=1), 3.0, 8.0)
    text, _ = write_report(tmp_path)
    # mean 2, sample deviation sqrt(((1-2)^2 + (3-2)^2) / 1) = 1.414; rho: mean 6, sqrt(8) = 2.828
    table = report_section(text, "Table 2")
    assert report_line(table, "90 % with σ 0.2", "DDPM", "Robust_adv")[0] == "2.00 ± 1.41 / 6.00 ± 2.83"
    assert "2 seed(s)" in table and "600 steps of 64 images" in table and "512 samples" in table
    assert "z-copy" in report_section(text, "Left out")


def test_report_leaves_what_has_not_run_a_dash(tmp_path):
    """Catches a number invented for a stage that is missing, and its claim decided all the same."""
    report_score(report_run(tmp_path / "runs" / "adv"), 1.0, 0.5)
    report_run(tmp_path / "runs" / "ddpm", "ddpm")            # trained, not sampled
    text, claims = write_report(tmp_path)
    assert report_line(report_section(text, "Table 2"), "90 % with σ 0.2", "DDPM", "DDPM")[0] == "–"
    assert claims[BEATS, "subspace 4×4, FD-exact"][-2:] == ["1.00, –", "not measured"]
    assert {row[1] for row in claims.values() if row[-1] != "not measured"} == {"3.1"}      # the cost, which is in the logs
    assert report_section(text, "Fig. 6 left").count("| – |") == 2 and "Not measured yet." in report_section(text, "Fig. 8b")


def test_report_claim_turns_with_its_numbers(tmp_path):
    """Catches a rule that is upside down, does not look at the numbers, or overlooks the seeds' spread."""
    report_pair(tmp_path)
    _, claims = write_report(tmp_path)
    assert claims[BEATS, "subspace 4×4, FD-exact"][-2:] == ["1.00, 3.00", "holds"]
    assert claims[BEATS, "subspace 4×4, ρ"][-2:] == ["0.500, 2.00", "holds"]
    report_pair(tmp_path / "swapped", adv=(3.0, 2.0), ddpm=(1.0, 0.5))
    _, claims = write_report(tmp_path / "swapped")
    assert claims[BEATS, "subspace 4×4, FD-exact"][-2:] == ["3.00, 1.00", "does not hold"]
    for seed, value in ((1, 8.0), (2, 0.0)):                # adv 4 +- 3.6 > ddpm 3 still, but within the spread
        report_score(report_run(tmp_path / "swapped/runs" / f"{seed}", seed=seed), 1 + value, 0.5)
    _, claims = write_report(tmp_path / "swapped")
    assert claims[BEATS, "subspace 4×4, FD-exact"][-1] == "does not hold (within the seeds' spread)"


def test_report_rules_hold_for_the_paper_itself():
    """Catches a slip in the paper's numbers or a claim turned round: all but two hold of its own numbers. Those are in the
    paper: Table 1's ran, 79.21, is above Table 2's DDPM, 58.05, though the text puts it far below the baselines."""
    decided = {}
    for claim in report.CLAIMS:
        for name in (None, *report.NAMES):
            number = "FID" if isinstance(claim.numbers, str) else claim.numbers[0]
            cells = [report.cell(report.PAPER, number, where | dict(data=name)) for where in claim.cells]
            if all(cells):
                assert all(c[2] == 1 for c in cells)        # one number each
                decided[claim.text, name] = report.verdict(claim.rule, cells)
    assert [k for k, v in decided.items() if v != "holds"] == [("ran too beats DDPM, 90 % with σ 0.1", "cifar10")]
    assert len(decided) == 52                               # counted by hand


def test_report_keeps_the_limits_apart(tmp_path):
    """Catches a run below RUNS/limits in another table, or the table of the price without it or without the main run."""
    runs = tmp_path / "runs"
    report_pair(tmp_path)
    for share in (1.0, 0.25):
        run = report_run(runs / "limits" / f"{share}", cost=1 + share, step=1000, reg_share=share, seed=9)
        report_score(run, 50 + share, 5.0, noise_mean=0.1 * share)
        report_score(run, 60, 6.0, samples="fgsm-100", attack="fgsm", percent=100)
    text, claims = write_report(tmp_path)
    price = report_section(text, "The price")
    assert report_line(price, "Robust_adv", "0.25", "no", "32 × (1,)", "1,000")[:3] == ["1.25", "50.2", "5.00"]
    assert report_line(price, "DDPM", "–", "no", "32 × (1,)", "600")[1] == "3.00"
    assert report_line(price, "Robust_adv", "1", "no", "32 × (1,)", "1,000") == ["2.00", "51.0", "5.00", "20.0", "0.100", "0.250"]
    assert "600 to 1,000 steps of 64 images, regulariser on 0.25 or 1 of them" in price
    rest = text.replace(price, "")
    assert not any(number in rest for number in ("50.2", "51.0", "60.0", "1.25 "))
    assert report_line(report_section(text, "3.1"), "Robust_adv")[0] == "1.00"
    assert claims[BEATS, "subspace 4×4, FD-exact"][-2] == "1.00, 3.00"


def test_report_calls_only_fid_fid(tmp_path):
    """Catches FD-pixels printed as the paper's FID, and FID and FD-pixels of one data set in one column."""
    run = report_run(tmp_path / "runs" / "a", name="cifar10", size=16)
    report_score(run, 29.5, metric="FD-pixels")
    text, claims = write_report(tmp_path)
    assert "ours (FD-pixels, CIFAR-10 16×16)" in report_section(text, "Table 2") and "ours (FID" not in report_section(text, "Table 5")
    assert (BEATS, "CIFAR-10 16×16, FD-pixels") in claims and (BEATS, "CIFAR-10 16×16, FID") not in claims
    report_score(run, 8.25, metric="FID", is_mean=9.5)
    table = report_section(write_report(tmp_path)[0], "Table 2")
    assert report_line(table, "90 % with σ 0.2", "DDPM", "Robust_adv")[0] == "8.25 / 9.50" and "FD-pixels" not in table


def test_report_attacks(tmp_path):
    """Catches an attacked sample taken for an ordinary one, a wrong share, and displacement and control exchanged."""
    for method, base in (("adv", 10), ("ddpm", 20)):
        run = report_run(tmp_path / "runs" / method, method, 0, 0)
        report_score(run, base, 1.0)
        for k in (0, *report.PERCENT):
            report_score(run, base + k - 5 * (k == 0), 1.0, samples=f"fgsm-{k}", attack="fgsm", percent=k, n=128)
    text, claims = write_report(tmp_path)
    table = report_section(text, "Fig. 8b")
    assert report_line(table, "fgsm", "75 %", "Robust_adv") == ["85.0 / 1.00 / 0.250 / 0.125", "90.7"]
    # not attacked: the row is that of the attacks' own protocol, not of the model's usual samples
    assert report_line(table, "none", "0 %", "DDPM")[0] == "15.0 / 1.00 / 0.250 / 0.125" and "512 samples" in report_section(text, "2.3")
    assert claims["adv withstands fgsm better than DDPM", "subspace 4×4, FD-exact"][-1] == "holds"
    both = claims["fgsm on 100 % instead of 25 % of the steps costs adv less than DDPM", "subspace 4×4, FD-exact"]
    assert both[-2:] == ["110, 35.0, 120, 45.0", "does not hold"]           # 75 each: not less


def test_report_tells_runs_apart(tmp_path):
    """Catches fine-tuned taken for trained from scratch, the flags of Table 5 mixed up, eps units among the paper's, and
    samples of another model beside a log."""
    runs = tmp_path / "runs"
    report_score(report_run(runs / "a", init="somewhere"), 11, 1)
    report_score(report_run(runs / "b"), 12, 1)
    for k, flags in enumerate(("oracle", "conf1", "conf2")):
        report_score(report_run(runs / flags, "ambient", flags=flags, sigma_known=0.2), 13 + k, 1)
    report_score(report_run(runs / "c", "adv", 0.9, 0.1, lam_units="eps"), 16, 1)
    run = report_run(runs / "d", "ran", 0.9, 0.1)
    report_score(report_run(runs / "e", "ddpm", 0.9, 0.1), 17, 1)
    (runs / "e" / "ddpm-100.npz.fd-exact.json").rename(run / "ddpm-100.npz.fd-exact.json")
    text, _ = write_report(tmp_path)
    assert report_line(report_section(text, "Table 4"), "90 % with σ 0.2", "Robust_adv", "fine-tuned")[0] == "11.0 / 1.00"
    assert report_line(report_section(text, "Table 4"), "90 % with σ 0.2", "Robust_adv", "from scratch")[0] == "12.0 / 1.00"
    for k, flags in enumerate(("oracle", "conf1", "conf2")):
        assert report_line(report_section(text, "Table 5"), "90 % with σ 0.2", f"noise-aware, {flags}")[0] == f"{13 + k}.0 / 1.00"
    assert report_line(report_section(text, "Table 1, top"), "90 % with σ 0.1", "Robust_adv")[0] == "–"
    assert report_line(report_section(text, "Table 1, top"), "90 % with σ 0.1", "Robust_ran")[0] == "–"
    left = report_section(text, "Left out")
    assert "lam_units is eps" in left and "d/ddpm-100`: made by a run other than" in left


def test_report_memory_and_toys(tmp_path):
    """Catches share and mean exchanged, a claim of toy3d.py lost or turned, and its figures not brought along."""
    for method, shared in (("adv", 0.125), ("ddpm", 0.25)):
        run = report_run(tmp_path / "runs" / method, method, 0, 0)
        report_score(run, 1.0, 0.5)
        own = dict(mean=0.5 if method == "adv" else 0.625, p75=0.6, p90=0.7, p95=0.75, share=shared)
        made = json.loads((run / "ddpm-100.npz.fd-exact.json").read_text())["protocol"]
        (run / "ddpm-100.npz.memorize.json").write_text(json.dumps(dict(
            metric="memorisation", features="pixels", n=8, n_train=9, generated=own, train=own, protocol=made,
            histogram=dict(edges=[-1, 0, 1], generated=[1, 3], train=[2, 2]))))
    toy = tmp_path / "runs" / "toy3d"
    toy.mkdir()
    cell = dict(data="oblique-plane", noise="inlier", method="adv", seed=3, name="inlier adv", rms=[0.0784, 0.005], steps=3000,
                batch=128, n=512, kept=[0.9, 0.01], score_error=[0.3, 0.02])
    said = dict(data="oblique-plane", claim="invariance diverges", where="Fig. 10", number="rms", factor=2, smaller="clean ddpm",
                larger="clean inv", values=[0.5, 0.75], holds=False)
    (toy / "toy3d.json").write_text(json.dumps(cell) + "\n" + json.dumps(said) + "\n")
    (toy / "fig2a.png").write_bytes(b"picture")
    text, claims = write_report(tmp_path)
    assert report_line(report_section(text, "Fig. 6 left"), "Robust_adv")[0] == "0.125 / 0.500 / 0.750"
    assert "(the paper: DINOv2): pixels." in report_section(text, "Fig. 6 left")
    assert claims["adv memorises less, clean data", "subspace 4×4, share ≥ 0.9"][4:] == ["no number", "0.125, 0.250", "holds"]
    assert report_line(text, "oblique-plane", "inlier", "rms distance") == ["–", "–", "0.0784 ± 0.00500", "–"]
    row = claims["invariance diverges", "oblique-plane, rms: clean ddpm, clean inv"]
    assert row[1:3] == ["Fig. 10", "2 × a < b, apart by their deviations"] and row[-2:] == ["0.500, 0.750", "does not hold"]
    assert (tmp_path / "out" / "fig2a.png").read_bytes() == b"picture" and "](fig2a.png)" in text


@pytest.mark.parametrize("name, text", [("adv/ddpm-100.npz.fd-exact.json", "{broken"), ("adv/log.jsonl", '{"event": "start"}\n'),
                                        ("adv/log.jsonl", "nonsense\n"), ("adv/a.attack.json", "[]"),
                                        ("adv/b.npz.fid.json", '{"metric": "distance", "protocol": {}}')])
def test_report_names_a_damaged_file(tmp_path, capsys, name, text):
    """Catches a traceback, or a damaged score passed over in silence, which would be a dash for no reason."""
    report_pair(tmp_path)
    (tmp_path / "runs" / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: write_report(tmp_path))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert str(tmp_path / "runs" / name) in said and not (tmp_path / "out" / "README.md").exists()


def test_report_reads_a_log_that_is_being_written(tmp_path):
    """Catches a report that cannot be made while a training runs, whose last line may be half there, or since one died
    before its first step."""
    (tmp_path / "runs" / "dead").mkdir(parents=True)
    (tmp_path / "runs" / "dead" / "log.jsonl").write_text("")
    report_pair(tmp_path)
    with open(tmp_path / "runs" / "adv" / "log.jsonl", "a") as log:
        log.write('{"step": 601, "dd')
    assert write_report(tmp_path)[1][BEATS, "subspace 4×4, FD-exact"][-1] == "holds"


def test_report_refuses_nothing(tmp_path):
    """Catches an empty report where the folder is misspelt or holds no run."""
    with pytest.raises(UserError, match="no such folder"):
        report.write(tmp_path / "runs", tmp_path / "out", None)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no log.jsonl"):
        report.write(tmp_path / "runs", tmp_path / "out", None)


def test_report_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Catches tables that need matplotlib, and charts missing without a word. Grids come with Pillow alone."""
    report_pair(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["report.py", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    report.main()
    said, text = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "matplotlib is not installed" in said and "matplotlib was not installed" in text
    assert report_line(report_section(text, "Table 2"), "90 % with σ 0.2", "DDPM", "DDPM")[0] == "3.00 / 2.00"
    assert "](samples-subspace-4-p0.9-s0.2.png)" in text and "](fig24-subspace-4-p0.9-s0.2.png)" in text
    with Image.open(tmp_path / "out" / "samples-subspace-4-p0.9-s0.2.png") as sheet:
        assert sheet.size == (608, 316)                     # two of 300 and the gap between


def test_report_figures_are_there(tmp_path):
    """Catches a figure that is linked and not made, or made and not linked, and a leftover temporary file."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    for method in ("adv", "ddpm"):
        for noise in report.NOISES[:2]:
            run = report_run(tmp_path / "runs" / f"{method}{noise[0]}", method, *noise)
            report_score(run, 3.0, 1.0)
            report_score(run, 3.0, 1.0, samples="fgsm-50", attack="fgsm", percent=50)
        run = report_run(tmp_path / "runs/limits" / method, method, seed=3)
        report_score(run, 3.0, 1.0)
    text, _ = write_report(tmp_path, pyplot)
    linked = {part.split(")")[0] for part in text.split("](")[1:]}
    assert linked == {path.name for path in (tmp_path / "out").iterdir()} - {"README.md"}
    assert {"fig3.png", "fig8.png", "price-0.png", "samples-subspace-4-p0-s0.png"} <= linked


# ---------------------------------------------------------------------------------------------------------- run_all.sh

FAKE_PYTHON = """#!/usr/bin/env bash
# Writes down what it is asked to run, and makes the files that it would make.
if [ "$1" = -c ]; then echo 8; exit; fi
while [ $# -gt 0 ] && [[ "$1" != *.py ]]; do shift; done
echo "$*" >> "$COMMANDS"
if [ -n "${BROKEN:-}" ] && [[ "$*" == *$BROKEN* ]]; then echo "no such thing" >&2; exit 2; fi
script=$1 size= steps= out= name=$2
for word in "$@"; do
    case "$last" in --out) out=$word ;; --steps) steps=$word ;; --size) size=$word ;; esac
    last=$word
done
for word in "$@"; do
    if [ "$script" = fid.py ] && [[ "$word" == *.npz ]]; then
        kind=$(case "$*" in *"--ref subspace"*) echo fd-exact ;; *"--features pixels"*) echo fd-pixels ;; *) echo fid ;; esac)
        touch "$word.$kind.json"
    fi
done
case $script in
    train.py) mkdir -p "$out"; touch "$out/samples-$(printf %08d "$steps").png" ;;
    data.py) mkdir -p "$out"; touch "$out/$name-$size.npy" ;;
    memorize.py) touch "$2.memorize.json" ;;
    toy3d.py)
        mkdir -p "$out"
        name=$(case "$*" in *"--sweep "*) echo "-$3" ;; esac)$(case "$*" in *"--data "*) echo "-$5" ;; esac)
        touch "$out/toy3d$name$(case "$*" in *--balance*) echo -balance ;; esac).json" ;;
    report.py | fid.py) ;;
    attack.py) touch "$out" "${out%.npz}.attack.json" ;;
    *) touch "$out" ;;
esac
"""


@pytest.fixture
def run_all(tmp_path):
    """run_all(scale, ...) -> the commands that it gives, its output and its exit status, in a folder without results."""
    (tmp_path / "run_all.sh").write_bytes((HERE / "run_all.sh").read_bytes())
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(*argv, **environment):
        commands = tmp_path / "commands.txt"
        commands.write_text("")
        environment = os.environ | dict(PYTHON=str(tmp_path / "python"), COMMANDS=str(commands), LANES="1") | environment
        done = subprocess.run(["bash", "run_all.sh", *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        return commands.read_text().splitlines(), done.stdout + done.stderr, done.returncode
    return run


@pytest.mark.parametrize("asked", ["quick", "paper", "quick price"])
def test_run_all_gives_commands_that_the_scripts_take(run_all, monkeypatch, asked):
    """Catches a flag that a script does not know or refuses, a model trained twice, a sample before its model, and a
    second run that begins again."""
    commands, out, status = run_all(*asked.split(), TRAIN_FLAGS="--amp")
    assert status == 0, out[-2000:]
    stages = [line for line in commands if not line.startswith("report.py")]
    assert len(stages) > (80 if "price" in asked else 100) and len(set(stages)) == len(stages)
    trained, scripts = [], set()
    for line in commands:
        script, *argv = line.split()
        scripts.add(script)
        monkeypatch.setattr(sys, "argv", [script, *argv])
        module = sys.modules.get(script.removesuffix(".py"))
        if script in ("train.py", "attack.py", "toy3d.py"):
            args = module.arguments()
            trained += [args.out] if script == "train.py" else []
            assert script != "train.py" or args.amp or "price" in asked
        elif script in ("fid.py", "memorize.py"):
            module.arguments(argv)
        elif script == "sample.py":
            parser = sample.argparse.ArgumentParser()
            sample.add_arguments(parser)
            args = parser.parse_args(argv)
        if script in ("attack.py", "sample.py"):
            assert Path(args.run) in trained
        if script == "attack.py":                           # report.py's percentages are exact
            assert attack.attacked_count(args.steps_attacked, args.steps) / args.steps in (0, 0.25, 0.5, 0.75, 1)
    every = {"train.py", "sample.py", "attack.py", "fid.py", "memorize.py", "toy3d.py", "data.py", "report.py"}
    assert scripts >= every - ({"memorize.py"} if "price" in asked else set())
    assert commands[-1].startswith("report.py")
    again, out, status = run_all(*asked.split())
    assert status == 0 and {line.split()[0] for line in again} == {"report.py"}


def test_run_all_goes_on_after_a_failure(run_all):
    """Catches a stage that fails and stops the others or is not reported, and an unknown table or scale."""
    commands, out, status = run_all("quick", "table1", BROKEN="train.py --data subspace --size 4 --data-dir data --method ran")
    assert status == 1 and "These stages failed" in out and "--method ran" in out.split("These stages failed")[1]
    assert any("adv-p0.9-s0.2-seed0/ddpm-100.npz" in line for line in commands if line.startswith("fid.py"))
    for argv, named in ((["quick", "table9"], "'table9' is not a table"), (["dry", "price"], "'price' is not a table"), (["fast"], "'fast' is not known")):
        commands, out, status = run_all(*argv)
        assert status == 2 and named in out and not commands
