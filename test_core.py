"""The kit against independent truths: closed forms, float64 formulas, finite differences, other implementations' values.

    python -m pytest -q test_core.py            # under three minutes on two cores; `bash run_all.sh test` sets all up first
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import sample
import train
import unet
from data import UserError
from unet import PRESETS, Schedule, UNet

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"                             # reference values of other implementations, where they are at hand
TINY = dict(channels=32, res_blocks=1, mult=(1, 2), attn=(4,), heads=2)
TINY_FLAGS = "--channels 32 --res-blocks 1 --mult 1,2 --attn 4 --heads 2 --size 8 --batch 8".split()

torch.set_num_threads(1)                                # small tensors: a second thread only waits


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
    training = dict(method="adv", lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255, batch=4, lr=1e-3, ema=0.99, amp=False, seed=0)
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
    t, beta, eps, u = train.draw(0, 7, 4096, (3,), 1000, "cpu")
    again = train.draw(0, 7, 4096, (3,), 1000, "cpu")
    assert all(torch.equal(a, b) for a, b in zip((t, beta, eps, u), again))
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
    common = ["--steps", 20, "--method", "adv", "--lr", 1e-4]
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
    (["--lr", 0], "--lr 0"), (["--steps", -5], "--steps -5"), (["--ema", 2], "--ema 2"), (["--data", "nothing"], "nothing"),
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
