"""unet.py, sample.py and train.py against improved-diffusion, the field's code, on values made by rules.

Networks are too large to ship: their weights are functions of their names, images and noise of their shapes,
and what improved-diffusion computes from them stands here. It ran in float64 with its casts to float32 (of
norms and tables) lifted, so that the digits are nobody's rounding. As it is, in float32, it gives these
numbers to 1e-5, but for its DDIM step at t = 1, a difference of near-equal numbers (1e-4), and the likelihood
at t = 0 (see there).
"""

import math
import zlib

import pytest
import torch

import sample
import train
from unet import Schedule, UNet

PRECISIONS = {torch.float64: 1e-9, torch.float32: 1e-5}     # the kit's formulas, and what it runs in


# -------------------------------------------------------------------------------------------------- the rules

def wave(rate, *shape):
    """Values that look random and need no generator: sin(rate k^2) for k = 1, 2, ... -> float64 [shape]."""
    k = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)
    return torch.sin(rate * k * k).view(shape)


def weights(state_dict):
    """Random weights, each seeded by its key: none is zero, and activations keep their size."""
    made = {}
    for key, value in state_dict.items():
        z = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        made[key] = z / math.sqrt(value[0].numel()) if value.ndim > 1 else 0.1 * z + key.endswith("weight")
    return made


def network(x, t):
    """A cheap stand-in: x [B, 3, H, W], t [B] -> eps_hat and v [B, 6, H, W], v beyond -1 ... 1."""
    t = t.to(x.dtype)[:, None, None, None]
    eps_hat = torch.tanh(x + 0.5 * x.roll((1, 1), (1, 3))) + 0.3 * torch.sin(t)
    return torch.cat([eps_hat, 1.5 * torch.sin(x.roll(2, 3) + t)], dim=1)


TIMES = torch.tensor([0, 1, 500, 999])                      # of a batch of four images
X_T = 1.2 * wave(0.37, 4, 3, 4, 4)
X_0 = (1.3 * wave(0.71, 4, 3, 4, 4)).clamp(-1, 1)
X_0 = (X_0 * 127.5 + 127.5).round() / 127.5 - 1             # of bytes, 0 and 255 among them
EPS = 1.2 * wave(0.29, 4, 3, 4, 4)
Z = [wave(0.11 + 0.01 * step, 4, 3, 4, 4) for step in range(10)]


def distance(x, expected):
    """How far images [B, 3, H, W] are from the numbers [B] expected of them: the most, in units of a norm.

    The number of an image is a sum over all of its pixels, each with a weight of its own.
    """
    numbers = (x.double() * wave(0.53, *x.shape[1:])).flatten(1).sum(dim=1)
    miss = numbers - torch.tensor(expected, dtype=torch.float64)
    return float((miss.abs() / x.double().flatten(1).norm(dim=1)).max())


# ------------------------------------------------------------------------------------------------ the network

# Two channels a group or more: with one, the bias of a convolution before a norm does not matter.
NETWORKS = {
    "scale-shift": (
        dict(size=8, in_channels=3, channels=64, res_blocks=1, mult=(1, 2), attn=(4,), heads=2,
             learn_sigma=True, scale_shift=True),
        [-0.0951379, 1.48649, -0.394675, 1.56798, -0.287944, 0.177027, -0.0252932, -0.421428],
        15.2507, 0.0382671,
        {"time_embed.0.weight": 0.082048, "input_blocks.0.0.weight": 0.175812, "out.2.bias": 0.168008,
         "input_blocks.1.0.emb_layers.1.weight": 0.100291, "middle_block.1.qkv.weight": 0.0986169,
         "output_blocks.0.0.skip_connection.weight": 0.385423, "middle_block.1.norm.bias": 0.0121907}),
    "additive": (
        dict(size=12, in_channels=1, channels=64, res_blocks=2, mult=(1, 1, 2), attn=(6,), heads=1,
             learn_sigma=False, scale_shift=False),
        [-0.316941, -0.121367, -0.109828, 0.0293352, 0.534999, -0.241889, 0.133939, -0.367215],
        8.50884, 0.0487893,
        {"time_embed.0.weight": 0.123603, "input_blocks.0.0.weight": 0.166537, "out.2.bias": 0.445652,
         "input_blocks.1.0.emb_layers.1.weight": 0.117258, "middle_block.1.qkv.weight": 0.0358325,
         "output_blocks.0.0.skip_connection.weight": 0.138561, "middle_block.1.norm.bias": 0.00533042}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    """Catches public weights that load and compute nonsense (the order of q, k, v and heads, of scale and
    shift, of sin and cos, of skips), a parameter under another key, and wrong gradients of the kit's norm."""
    config, outputs, norm, slope, gradients = NETWORKS[name]
    made = UNet(**config)
    made.load_state_dict(weights(made.state_dict()))
    x = (1.2 * wave(0.37, 2, config["in_channels"], config["size"], config["size"])).float().requires_grad_()
    out = made(x, torch.tensor([2, 205]))
    out.square().mean().backward()
    some = out.detach().flatten()[::out.numel() // 8 + 1]
    assert some.tolist() == pytest.approx(outputs, rel=3e-5, abs=1e-5)
    assert float(out.detach().norm()) == pytest.approx(norm, rel=2e-5)
    assert float(x.grad.norm()) == pytest.approx(slope, rel=5e-5)
    slopes = {key: float(p.grad.norm()) for key, p in made.named_parameters() if key in gradients}
    assert slopes == pytest.approx(gradients, rel=5e-5)


# ----------------------------------------------------------------------------------------------- the schedule

# Each table at step 0, 500 and 999 of all 1000; 1 and 150 of 300; 499 of 500.
TABLES = {
    "linear": {
        "beta": [0.0001, 0.01005995995996, 0.02, 0.0004194612534596, 0.029877289985563, 0.039580478478478],
        "alpha_bar": [0.9999, 0.077796658365024, 4.0358297653757e-05, 0.99948058069267, 0.077012477393648,
                      4.0358297653757e-05],
        "alpha_bar_prev": [1, 0.078587242881778, 4.1181936381384e-05, 0.9999, 0.079384264071606,
                           4.2021529914157e-05],
        "coefficient_x0": [1, 0.0030580570756296, 0.00012835148717225, 0.80751769129496, 0.0091203726545031,
                           0.00025658691062879],
        "coefficient_xt": [0, 0.99410435075673, 0.98994867826752, 0.19248230346042, 0.98241706903585,
                           0.98000832985938],
        "posterior_variance": [0, 0.01005133577891, 0.019999983526561, 8.0755807020788e-05, 0.029800514778287,
                               0.039580412644293],
        "log_variance_small": [-9.8167251352957, -4.6000497399849, -3.9120238291005, -9.424080684877,
                               -3.5132296111808, -3.2294209132862]},
    "cosine": {
        "beta": [4.1284224821969e-05, 0.003155691441585, 0.999, 0.00015299088861653, 0.0094372614294334,
                 0.9997499993929],
        "alpha_bar": [0.99995871577518, 0.4922851724488, 2.4287669070349e-09, 0.99980573120267,
                      0.4907268301503, 2.428766907035e-09],
        "alpha_bar_prev": [1, 0.49384359044064, 2.4287669070349e-06, 0.99995871577518, 0.49540206898802,
                           9.7150440361699e-06],
        "coefficient_x0": [1, 0.0043678668995263, 0.0015568917154902, 0.78750541843459, 0.013042897978343,
                           0.0031161173207562],
        "coefficient_xt": [0, 0.99535627945523, 0.031622699874135, 0.21249458077555, 0.98613338622033,
                           0.015811253928865],
        "posterior_variance": [0, 0.0031460051254635, 0.99899757608819, 3.2512221871038e-05,
                               0.009350625310021, 0.99974028920577],
        "log_variance_small": [-10.734082532465, -5.7616218451473, -0.0010029266746732, -10.33389448175,
                               -4.6723120598407, -0.00025974452492074]},
}
SPACED = {300: ([0, 3, 7, 10, 13, 17, 20, 23], 4231062859), 500: ([0, 2, 4, 6, 8, 10, 12, 14], 638087266)}


@pytest.mark.parametrize("name", TABLES)
def test_schedules(name):
    """Catches a wrong coefficient, logarithm or first step in any table, and respacing that visits other
    timesteps or does not keep alpha_bar there."""
    full = Schedule.named(name, 1000)
    half, short = full.respaced(500), full.respaced(300)
    picked = [(full, 0), (full, 500), (full, 999), (short, 1), (short, 150), (half, 499)]
    tables = {table: [float(getattr(schedule, table)[i]) for schedule, i in picked] for table in TABLES[name]}
    for table, expected in TABLES[name].items():
        assert tables[table] == pytest.approx(expected, rel=1e-12, abs=1e-15), table
    for schedule, i in picked:
        for table in ("alpha_bar", "alpha_bar_prev"):
            value, root, other = (float(getattr(schedule, prefix + table)[i])
                                  for prefix in ("", "sqrt_", "sqrt_one_minus_"))
            assert root**2 == pytest.approx(value, rel=1e-12)
            assert other**2 == pytest.approx(1 - value, rel=1e-12)
    for schedule in (short, half):
        first, checksum = SPACED[len(schedule)]
        assert schedule.t[:8].tolist() == first
        assert zlib.crc32(schedule.t.numpy().tobytes()) == checksum


# ------------------------------------------------------------------------------------------ the reverse steps

STEPS = {
    "linear": {
        "mean": [3.4253431257, -2.8094896617, -3.4025264273, 4.4953398957],
        "mean, no clamp": [3.6940465537, -3.1369950169, -3.3984512892, 4.5627643924],
        "x0_hat": [3.4253431257, -2.5316884177, -1.5915418668, 6.8682369827],
        "x0_hat, no clamp": [3.6940465537, -3.1322944339, -0.25895124652, 532.17961609],
        "ddim": [3.4253431257, -2.9437338667, -3.4187844737, 4.5405334062],
        "ddim, no clamp": [3.6940465537, -3.1393411338, -3.4167413173, 4.5744159297],
        "small": [0.037971215419, 0.037971215419, 0.51551483523, 0.72718363378],
        "large": [0.037971215419, 0.056308627523, 0.51573594713, 0.72718393326],
        "learned": [0.041400815097, 0.056018291332, 0.51573672352, 0.72718357984],
        "ddpm": [3.4253431257, -2.7359131036, -3.2259222184, 4.4104265584],
        "respaced mean": [3.4253431257, -2.6579595567, -3.3693664776, 4.4073383489],
        "respaced sigma": [0.047405119413, 0.053524337853, 0.88767018075, 1.246335044],
        "ddim loop": [4.3581152419, -3.7454321097, -1.9190220031, 6.3818631264],
        "ddpm loop": [1.7212451003, -5.1280553998, 3.5857612243, 1.863916657]},
    "cosine": {
        "mean": [3.4233249393, -2.8063293089, -3.4080808807, 0.15426307669],
        "mean, no clamp": [3.6997033699, -3.1391496751, -3.4077615918, 106.94747694],
        "x0_hat": [3.4233249393, -2.5054312702, -1.4063215263, 6.8682369827],
        "x0_hat, no clamp": [3.6997033699, -3.1360339408, -1.333222028, 68600.729199],
        "ddim": [3.4233249393, -2.9433325124, -3.415636236, 4.5504520889],
        "ddim, no clamp": [3.6997033699, -3.1405975397, -3.4154763427, 108.07009149],
        "small": [0.024002300625, 0.024002300625, 0.28840912033, 5.1393890423],
        "large": [0.024002300625, 0.034928209298, 0.28885277422, 5.1393952773],
        "learned": [0.026325851481, 0.034741551706, 0.28885426933, 5.1393879192],
        "ddpm": [3.4233249393, -2.7606293033, -3.3092595325, -0.4458665653],
        "respaced mean": [3.4233249393, -2.6450568887, -3.3815004703, 0.079963626841],
        "respaced sigma": [0.030179618736, 0.033350305369, 0.49726426621, 5.1416149182],
        "ddim loop": [4.0835462773, -3.7566980384, -2.49997152, 6.4327818728],
        "ddpm loop": [-0.058712470282, -3.5911328979, 1.473104144, 0.7170286615]},
}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", STEPS)
def test_reverse_steps(name, dtype):
    """Catches swapped coefficients, a clamp at the wrong place, eps_hat not taken again from the clamped
    x0_hat, a learned variance with other ends (at t = 0 the upper is log beta too), noise in the last step,
    and a respaced process that tells the network the index instead of the timestep."""
    full = Schedule.named(name, 1000)

    def ready(schedule):
        return schedule if dtype == torch.float64 else schedule.to("cpu")

    def step(schedule, steps, z=None, **how):
        rows = [sample.reverse_step(network, ready(schedule), X_T[row, None].to(dtype), i,
                                    z if z is None else z[row, None], **how)
                for row, i in enumerate(steps)]
        return sample.Reverse(*(torch.cat([part.expand(1, *part.shape[1:]) for part in parts])
                                for parts in zip(*rows)))

    spaced = step(full.respaced(300), [0, 1, 150, 299], variance="learned")
    got = {"ddpm": step(full, TIMES.tolist(), Z[0].to(dtype), variance="learned").x,
           "respaced mean": spaced.mean, "respaced sigma": spaced.sigma}
    for suffix, clamp in ("", (-1.0, 1.0)), (", no clamp", None):
        ddpm = step(full, TIMES.tolist(), clamp=clamp)
        got |= {f"mean{suffix}": ddpm.mean, f"x0_hat{suffix}": ddpm.x0_hat,
                f"ddim{suffix}": step(full, TIMES.tolist(), sampler="ddim", clamp=clamp).x}
    for variance in ("small", "large", "learned"):
        got[variance] = step(full, TIMES.tolist(), variance=variance).sigma.expand_as(X_T)
    ten = ready(full.respaced(10))
    noise = iter([X_T.to(dtype)] + [z.to(dtype) for z in Z])
    got["ddpm loop"] = sample.sample(network, ten, noise, variance="learned")
    got["ddim loop"] = sample.sample(network, ten, iter([X_T.to(dtype)]), sampler="ddim")
    assert got.keys() == STEPS[name].keys()
    misses = {what: distance(x, STEPS[name][what]) for what, x in got.items()}
    assert not {what: miss for what, miss in misses.items() if not miss < PRECISIONS[dtype]}


# --------------------------------------------------------------------------------------- the learned variance

BOUNDS = {"linear": [2.6345857122, 0.83690900619, 0.0014181670991, 0.0020712275232],
          "cosine": [2.0582226737, 0.80073549698, 0.0017288541211, 101.34104194]}


@pytest.mark.parametrize("dtype, rel, tolerance", [(torch.float64, 1e-9, 0), (torch.float32, 1e-5, 2e-5)])
@pytest.mark.parametrize("name", BOUNDS)
def test_variational_bound(name, dtype, rel, tolerance):
    """Catches nats for bits, a sum for a mean, the divergence the wrong way round, and at t = 0 a byte's
    wrong width or closed end. There improved-diffusion ran with the exact normal distribution, like the kit,
    instead of its tanh approximation, which differs by less than 0.001 bits here."""
    schedule = Schedule.named(name, 1000)
    if dtype == torch.float32:
        schedule = schedule.to("cpu")
    x_0 = X_0.to(dtype)
    x_t = schedule.noised(x_0, TIMES, EPS.to(dtype))
    eps_hat, v = network(x_t, TIMES).chunk(2, dim=1)
    bound = train.variational_bound(schedule, x_0, x_t, TIMES, eps_hat, v)
    assert bound.tolist() == pytest.approx(BOUNDS[name], rel=rel, abs=tolerance)
