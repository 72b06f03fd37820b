"""The noise-predicting network, the noise schedule, and checkpoints: what every other stage is built on.

    model = UNet(size=32, **PRESETS["cifar10"])                     # eps_theta, randomly initialised
    schedule = Schedule.named("linear", 1000)                       # Eq. 1 and 2
    model, schedule, config, step = load_model("runs/cifar10-adv")  # or a public state dict

The network is the U-Net of Nichol & Dhariwal (2021), the paper's codebase, and reads its state dicts key by
key.
"""

import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, atomic_write, is_first_process

# Networks by data set. The paper keeps those of its codebase; "small" trains on a CPU. CelebA's is not stated
# there: 64x64 images take ImageNet-64's network.
PRESETS = {
    "cifar10": dict(channels=128, res_blocks=3, mult=(1, 2, 2, 2), attn=(16, 8), heads=4, dropout=0.3),
    "celeba": dict(channels=128, res_blocks=3, mult=(1, 2, 3, 4), attn=(16, 8), heads=4, dropout=0.0),
    "imagenet64": dict(channels=128, res_blocks=3, mult=(1, 2, 3, 4), attn=(16, 8), heads=4, dropout=0.0),
    "lsun_bedroom": dict(channels=128, res_blocks=2, mult=(1, 1, 2, 2, 4, 4), attn=(16,), heads=1,
                         dropout=0.0, scale_shift=False),
    "small": dict(channels=32, res_blocks=1, mult=(1, 2, 2), attn=(8,), heads=2, dropout=0.0),
}


# ------------------------------------------------------------------------------------------------ the network

class _Normalise(torch.autograd.Function):
    """Group normalisation of x [B, C, H, W] with a weight and a bias [B, 1, C] of its own for every sample.

    PyTorch's CPU kernel takes up to five times as long on channels_last tensors with few channels a group,
    and is a quarter of a training step. Here every pass over the pixels is a matrix product with ones or an
    elementwise product.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1).reshape(B, H * W, C)                      # a view of a channels_last tensor
        x = x - _group_mean(_pixel_sum(x), groups, H * W)         # centred first: the variance stays accurate
        rstd = (_group_mean(_pixel_sum(x * x), groups, H * W) + eps).rsqrt()            # [B, 1, C]
        ctx.save_for_backward(x, rstd, weight)
        ctx.groups = groups
        return torch.addcmul(bias, x, rstd * weight).view(B, H, W, C).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, dy):
        x, rstd, weight = ctx.saved_tensors
        B, C, H, W = dy.shape
        dy = dy.permute(0, 2, 3, 1).reshape(B, H * W, C)
        d_bias = _pixel_sum(dy)
        d_weight = _pixel_sum(dy * x) * rstd
        mean_1 = _group_mean(d_bias * weight, ctx.groups, H * W)            # over a group, of d x_hat and of
        mean_2 = _group_mean(d_weight * weight, ctx.groups, H * W)          # d x_hat * x_hat
        dx = torch.addcmul(-rstd * mean_1, dy, rstd * weight).addcmul_(x, -rstd.square() * mean_2)
        return dx.view(B, H, W, C).permute(0, 3, 1, 2), d_weight, d_bias, None, None


def _pixel_sum(x):
    """[B, HW, C] -> [B, 1, C]."""
    return torch.bmm(x.new_ones(len(x), 1, x.shape[1]), x)


def _group_mean(channel_sums, groups, pixels):
    """Sums over the pixels [B, 1, C] -> the mean of each channel's group over pixels and channels [B, 1,
    C]."""
    mean = channel_sums.unflatten(2, (groups, -1)).mean(dim=3, keepdim=True) / pixels
    return mean.expand(-1, -1, -1, channel_sums.shape[2] // groups).flatten(2)


class GroupNorm(nn.GroupNorm):
    """GroupNorm over 32 groups in float32, then optionally * (1 + scale) + shift, each [B, C]: [B, C, H, W]
    -> the same."""

    def __init__(self, channels):
        super().__init__(32, channels)

    def forward(self, x, scale=None, shift=None):
        weight, bias = self.weight.expand(len(x), 1, -1), self.bias.expand(len(x), 1, -1)       # [B, 1, C]
        if scale is not None:
            scale, shift = 1 + scale.float()[:, None], shift.float()[:, None]
            weight, bias = weight * scale, torch.addcmul(shift, bias, scale)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cpu":
                return _Normalise.apply(x.float(), weight, bias, self.num_groups, self.eps).to(x.dtype)
            h = F.group_norm(x.float(), self.num_groups, None, None, self.eps)
            weight, bias = (part.transpose(1, 2)[..., None] for part in (weight, bias))         # [B, C, 1, 1]
            return torch.addcmul(bias, h, weight).to(x.dtype)


def _zeroed(module):
    """A layer that starts at zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice around the time embedding, plus a skip connection: [B, in, H, W] -> [B, out,
    H, W]."""

    def __init__(self, in_channels, out_channels, embedding, dropout, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(GroupNorm(in_channels), nn.SiLU(),
                                       nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(),
                                        nn.Linear(embedding, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(GroupNorm(out_channels), nn.SiLU(), nn.Dropout(dropout),
                                        _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.skip_connection = (nn.Identity() if in_channels == out_channels
                                else nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x, emb):
        h = self.in_layers(x)
        emb = self.emb_layers(emb)                                  # [B, out], or twice that with scale_shift
        if self.scale_shift:
            h = self.out_layers[0](h, *emb.chunk(2, dim=1))
        else:
            h = self.out_layers[0](h + emb.to(h.dtype)[:, :, None, None])
        return self.skip_connection(x) + self.out_layers[1:](h)


class Attention(nn.Module):
    """Self-attention over the pixels, with a skip connection: [B, C, H, W] -> the same."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)     # 1-D convolutions only for their state-dict shape
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = F.linear(tokens, self.qkv.weight[:, :, 0], self.qkv.bias)     # [B, HW, 3C]
        # improved-diffusion splits the heads first, then q, k, v within a head: another order loads but
        # computes nonsense
        qkv = qkv.view(B, H * W, self.heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)                                      # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        h = F.linear(h, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def timestep_embedding(t, channels):
    """Sinusoidal embedding of the integer timesteps t [B]: cosines, then sines, of geometric frequencies ->
    [B, channels]."""
    half = channels // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * k / half)                # [B, half]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """eps_theta(x_t, t): x_t [B, in_channels, size, size], t [B] integers in 0 ... T-1 -> [B, out, size,
    size].

    out is in_channels, or twice that with `learn_sigma`: eps, then the interpolation v of the log variance.
    `attn` lists the resolutions that get attention, `mult` the width of each level in units of `channels`;
    every level but the last halves the resolution. Raises UserError where size and mult, or channels and
    heads, do not fit.
    """

    def __init__(self, size, channels, res_blocks, mult, attn, heads, dropout=0.0, learn_sigma=False,
                 scale_shift=True, in_channels=3):
        super().__init__()
        if size % 2 ** (len(mult) - 1):
            raise UserError(f"--size {size}: {len(mult)} levels (--mult) need a multiple of "
                            f"{2 ** (len(mult) - 1)}")
        if channels % 32:
            raise UserError(f"--channels {channels}: must be a multiple of 32, the groups of GroupNorm")
        if any(channels * m % heads for m in mult):
            raise UserError(f"--heads {heads}: does not divide the widths {[channels * m for m in mult]}")
        self.channels, embedding = channels, 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(),
                                        nn.Linear(embedding, embedding))

        def block(in_width, out_width, resolution):
            layers = [ResBlock(in_width, out_width, embedding, dropout, scale_shift)]
            if resolution in attn:
                layers.append(Attention(out_width, heads))
            return nn.ModuleList(layers)

        width, resolution = channels, size
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])])
        skips = [width]
        for level, m in enumerate(mult):
            for _ in range(res_blocks):
                self.input_blocks.append(block(width, channels * m, resolution))
                width = channels * m
                skips.append(width)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)
                resolution //= 2

        self.middle_block = nn.ModuleList([ResBlock(width, width, embedding, dropout, scale_shift),
                                           Attention(width, heads),
                                           ResBlock(width, width, embedding, dropout, scale_shift)])

        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(res_blocks + 1):
                layers = block(width + skips.pop(), channels * m, resolution)
                width = channels * m
                if level > 0 and i == res_blocks:
                    layers.append(Upsample(width))
                    resolution *= 2
                self.output_blocks.append(layers)

        out_channels = in_channels * (2 if learn_sigma else 1)
        self.out = nn.Sequential(GroupNorm(width), nn.SiLU(),
                                 _zeroed(nn.Conv2d(width, out_channels, 3, padding=1)))

    def forward(self, x, t):
        emb = self.time_embed(timestep_embedding(t, self.channels))         # [B, 4 * channels]

        def run(layers, h):
            for layer in layers:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            return h

        h, skips = x.contiguous(memory_format=torch.channels_last), []      # convolutions are fastest in NHWC
        for layers in self.input_blocks:
            h = run(layers, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, skips.pop()], dim=1))
        return self.out(h).float()


def in_bfloat16(network, device):
    """The network under bfloat16 autocast: its forward passes alone, so that gradients, losses and sampler
    are float32."""
    def run(x, t):
        with torch.autocast(device.type, torch.bfloat16):
            return network(x, t)
    return run


# ----------------------------------------------------------------------------------------- the noise schedule

def expand(values, x):
    """One value per sample, shaped to broadcast against x: values [B...], x [B..., *] -> [B..., 1 ...]."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def at(table, t, x):
    """table[t], shaped to broadcast against x: table [T], t [B...], x [B..., *] -> [B..., 1 ...]."""
    return expand(table[t], x)


class Schedule:
    """The forward process q(x_t | x_0) of Eq. 1 and 2, and its posterior q(x_{t-1} | x_t, x_0).

    beta [N] in float64: the variance added at step i (the paper's sigma(t) in Eq. 1); t [N]: what the network
    is told at step i, which differs from i once steps are left out. Every table is float64 [N] on the CPU;
    `to(device)` casts once, to float32.
    """

    def __init__(self, beta, t):
        self.beta, self.t = beta, t
        self.alpha_bar = torch.cumprod(1 - beta, dim=0)                     # Eq. 2: alpha_t of the paper
        self.alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.sqrt_alpha_bar = self.alpha_bar.sqrt()
        self.sqrt_one_minus_alpha_bar = (1 - self.alpha_bar).sqrt()
        self.sqrt_alpha_bar_prev = self.alpha_bar_prev.sqrt()
        self.sqrt_one_minus_alpha_bar_prev = (1 - self.alpha_bar_prev).sqrt()
        # Section A.2: mean = coefficient_x0 * x_0 + coefficient_xt * x_t, variance = beta (1 -
        # alpha_bar_prev) / (1 - alpha_bar)
        self.coefficient_x0 = beta * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar)
        self.coefficient_xt = (1 - self.alpha_bar_prev) * (1 - beta).sqrt() / (1 - self.alpha_bar)
        self.posterior_variance = beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        # The posterior variance of the last step is 0, its logarithm is not: the second step's stands in.
        second = self.posterior_variance[min(1, len(beta) - 1)]
        self.log_variance_small = torch.cat([second[None], self.posterior_variance[1:]]).log()
        self.log_variance_large = torch.cat([second[None], beta[1:]]).log()
        self.log_beta = beta.log()                       # where a learned variance ends: at the last step too

    @classmethod
    def named(cls, schedule, timesteps):
        """`linear`: beta from 1e-4 to 0.02, scaled by 1000/T; `cosine`: alpha_bar = cos^2 (Nichol &
        Dhariwal)."""
        if timesteps < 2:
            raise UserError(f"--timesteps {timesteps}: at least 2 are needed")
        if schedule == "linear":
            scale = 1000 / timesteps
            if 0.02 * scale >= 1:
                raise UserError(f"--timesteps {timesteps}: the linear schedule needs more than 20")
            beta = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
        elif schedule == "cosine":
            u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        else:
            raise UserError(f"--schedule {schedule}: known are linear and cosine")
        return cls(beta, torch.arange(timesteps))

    def __len__(self):
        return len(self.beta)

    def respaced(self, steps):
        """The process that visits `steps` evenly spaced timesteps, round(i (T-1) / (steps-1)), both ends
        kept: beta is 1 - alpha_bar / alpha_bar of the one visited before. UserError where steps is not in 2
        ... T."""
        if not 1 < steps <= len(self):
            raise UserError(f"--steps {steps}: this model has {len(self)} timesteps, so 2 to {len(self)} can "
                            "be sampled")
        i = torch.arange(steps, dtype=torch.float64)
        visited = (i * (len(self) - 1) / (steps - 1)).round().long()
        alpha_bar = self.alpha_bar[visited]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return Schedule(1 - alpha_bar / previous, self.t[visited])

    def to(self, device):
        """The same tables as float32 on a device."""
        moved = object.__new__(Schedule)
        for name, table in vars(self).items():
            setattr(moved, name, table.to(device, torch.float32 if table.is_floating_point() else None))
        return moved

    def noised(self, x_0, t, eps):
        """x_t of Eq. 2: x_0 and eps [B..., *], t [B...]."""
        s = at(self.sqrt_one_minus_alpha_bar, t, x_0)
        return at(self.sqrt_alpha_bar, t, x_0) * x_0 + s * eps                          # Eq. 2

    def predicted_x0(self, x_t, t, eps):
        """x0_hat of section A.2: Eq. 2 solved for x_0, the clean image that x_t and a predicted eps imply."""
        return (x_t - at(self.sqrt_one_minus_alpha_bar, t, x_t) * eps) / at(self.sqrt_alpha_bar, t, x_t)

    def posterior_mean(self, x_0, x_t, t):
        """mu tilde of section A.2: the mean of q(x_{t-1} | x_t, x_0)."""
        return at(self.coefficient_x0, t, x_t) * x_0 + at(self.coefficient_xt, t, x_t) * x_t

    def log_variance(self, variance, x_t, t, v=None):
        """Of the reverse step: `large`, `small`, or `learned`, v [B, *] in -1 ... 1 between small and beta
        (Nichol & Dhariwal). -> [B, 1 ...] or, learned, like x_t."""
        if variance == "learned":
            share = (v + 1) / 2
            return share * at(self.log_beta, t, x_t) + (1 - share) * at(self.log_variance_small, t, x_t)
        return at({"large": self.log_variance_large, "small": self.log_variance_small}[variance], t, x_t)


# ------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(path, checkpoint):
    """Writes one dict of tensors and plain values, atomically; the file that was there stays as
    *-previous.pt."""
    path = Path(path)
    with atomic_write(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:                       # what it makes of a full disk
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"cannot write {path}: is the disk full? ({reason})") from error
        if path.exists():               # a second name for the old file, so that neither name is ever missing
            with atomic_write(previous_of(path)) as link:
                link.unlink(missing_ok=True)
                try:
                    os.link(path, link)
                except OSError:                             # a file system without hard links
                    shutil.copyfile(path, link)


def previous_of(path):
    """Where `save_checkpoint` keeps the file before the last one."""
    return Path(path).with_name(f"{Path(path).stem}-previous.pt")


def _whole(low, high):
    return f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def _number(low, high):
    return f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high


def _wholes(value, high):
    return type(value) is tuple and len(value) <= 12 and all(map(_whole(1, high)[1], value))


_YES_OR_NO = "True or False", lambda v: type(v) is bool

# What the config of a checkpoint has to say, each in words and as a test: no sensible network lies outside.
SCHEMA = dict(
    network=dict(size=_whole(1, 4096), in_channels=("3, for colours", lambda v: type(v) is int and v == 3),
                 channels=_whole(1, 4096), res_blocks=_whole(1, 32), heads=_whole(1, 4096),
                 dropout=_number(0, 0.99),
                 mult=("1 to 12 integers from 1 to 64, as in 1,2,2,2", lambda v: _wholes(v, 64) and bool(v)),
                 attn=("different positive integers, as in 16,8",
                       lambda v: _wholes(v, 4096) and len(set(v)) == len(v)),
                 learn_sigma=_YES_OR_NO, scale_shift=_YES_OR_NO),
    process=dict(schedule=("linear or cosine", lambda v: type(v) is str and v in ("linear", "cosine")),
                 timesteps=_whole(2, 10**6)),
    data=dict(name=("a name", lambda v: type(v) is str), p=_number(0, 1), sigma=_number(0, 1000),
              low=_number(-1e6, 1e6), high=_number(-1e6, 1e6), float_data=_YES_OR_NO),
    training={})


def misfit(settings):
    """Of {name: value} the first setting that SCHEMA does not allow, in words; else None."""
    for name, (says, fits) in (SCHEMA["network"] | SCHEMA["process"] | SCHEMA["data"]).items():
        if name in settings and not fits(settings[name]):
            value = settings[name]
            shown = ",".join(map(str, value)) if type(value) is tuple else str(value)
            return f"{name.replace('_', '-')} {shown[:60]}: must be {says}"
    return None


def load_checkpoint(path):
    """Reads a checkpoint of ours or a bare public state dict onto the CPU, and checks all that is in it.

    `path` is a file or train.py's --out folder. -> a dict: config, step, model and ema (state dicts), and, of
    a run that can go on, ema_updates and optimizer; or the public state dict, taken out of what it is wrapped
    in, which is said. UserError names the file and what is wrong: missing, damaged, of another kind, of
    another network, values that are not finite.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / "checkpoint.pt"
    if not os.path.isfile(path):
        if os.path.islink(path):
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there")
        raise UserError(f"{path}: no such checkpoint; pass train.py's --out folder or a .pt file")
    hint = f"; the one before it is {previous_of(path)}" if previous_of(path).is_file() else ""
    try:
        checkpoint = _unwrapped(_read(path), path)
        _check(checkpoint, path.stat().st_size)
    except (UserError, ValueError) as error:
        said = "".join(c if c.isprintable() else " " for c in str(error).removeprefix("--"))
        raise UserError(f"{path}: {said}{hint}") from error
    return checkpoint


# How files of other kinds begin, and what is to be done with them.
PICKLE = "is a pickle, which could run code and was not loaded; write its state dict with torch.save"
FOREIGN = {b"version https://git-lfs": "is a pointer of Git LFS; git lfs pull fetches the file itself",
           b"<": "is a page of HTML or XML, as a download that failed leaves it",
           b"\x89HDF": "is an HDF5 file; a state dict that torch.save wrote is needed",
           b"\x93NUMPY": "is an array of NumPy, not a checkpoint",
           b"\x1f\x8b": "is compressed by gzip; unpack it first",
           b"\x80\x03": PICKLE, b"\x80\x04": PICKLE, b"\x80\x05": PICKLE}


def _foreign(path):
    """What a file is that torch.save did not write, in words; else None. An exception where it is damaged."""
    with open(path, "rb") as file:
        start = file.read(32)
    for beginning, kind in FOREIGN.items():
        if start.startswith(beginning):
            return kind
    if start[8:10] == b'{"':
        return "is a .safetensors file; read it with safetensors.torch.load_file, write that with torch.save"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.rpartition("/")[2] for info in archive.infolist()}
        if "constants.pkl" in names:
            return "is a TorchScript archive; write its state_dict() with torch.save"
        if "data.pkl" not in names:
            return "is a zip archive that torch.save did not write; a checkpoint or a state dict is needed"
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:            # a bomb?
            return "is a zip archive with compressed members, which torch.save does not write"
        if damaged := archive.testzip():                    # torch.load does not compare the checksums
            raise ValueError(f"checksum of {damaged}")
    return None


def _read(path):
    """What torch.save wrote into a file. ValueError says what else the file is; no code in it is run."""
    try:
        kind = _foreign(path)
        found = None if kind else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except Exception as error:                              # whatever the unpickler makes of foreign bytes
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        if objects := re.search(r"GLOBAL (\S+)", reason):
            raise ValueError(f"it holds Python objects ({objects[1]}), which could run code and were not "
                             "loaded; save its state_dict() with torch.save") from error
        raise ValueError("damaged, truncated or not a PyTorch checkpoint "
                         f"({reason.splitlines()[0][:100]})") from error
    if kind:
        raise ValueError(kind)
    return found


FIRST = "input_blocks.0.0.weight"                           # a state dict is known by it
WRAPPERS = "ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model", "net", "module"


def _unwrapped(found, path):
    """A checkpoint of ours as it is. A state dict out of what others wrap it in, and without what
    torch.compile or DataParallel set before its names, which is said. ValueError where there is none."""
    taken = []
    for _ in range(5):                                      # a dict may hold itself
        if not isinstance(found, dict):
            break
        if {"config", "model", "ema"} <= found.keys() or FIRST in found:
            if taken and is_first_process():
                print(f"{path}: takes the state dict {', '.join(taken)}", flush=True)
            return found
        keys = [key for key in found if isinstance(key, str)]
        prefixes = [key.removesuffix(FIRST) for key in keys if key.endswith("." + FIRST)]
        if len(prefixes) > 1:
            raise ValueError(f"holds several networks ({', '.join(prefixes)[:80]}); save one of them alone")
        if prefixes:
            keys = [key for key in keys if key.startswith(prefixes[0])]
            taken.append(f"of {len(keys)} of {len(found)} names, those with {prefixes[0]!r} before them")
            found = {key.removeprefix(prefixes[0]): found[key] for key in keys}
            continue
        inside = [key for key in WRAPPERS if isinstance(found.get(key), dict)]
        if not inside:
            break
        taken.append(f"under {inside[0]!r}")
        found = found[inside[0]]
    begins = f" (it begins with {str(next(iter(found)))[:60]!r})" if isinstance(found, dict) and found else ""
    raise ValueError(f"neither a checkpoint of train.py nor an improved-diffusion state dict, which has "
                     f"{FIRST}{begins}")


def _check(checkpoint, file_size):
    """ValueError or UserError where a checkpoint of ours, or a state dict, is not what it has to be."""
    if FIRST in checkpoint:
        networks = {"its state dict": checkpoint}
    else:
        networks = {f"its {name}": checkpoint[name] for name in ("model", "ema")}
    for name, state_dict in networks.items():
        _check_tensors(name, state_dict, file_size)
    if FIRST in checkpoint:
        network = network_of(checkpoint, size=4096, heads=1)        # no tensor depends on size and heads
        if wrong := misfit(network):
            raise ValueError(f"its {wrong}")
    else:
        network = _network_of_config(checkpoint)
    with torch.device("meta"):                              # takes no memory, however large
        expected = {key: tuple(tensor.shape) for key, tensor in UNet(**network).state_dict().items()}
    for name, state_dict in networks.items():
        for key in [*state_dict, *expected]:                # first what is too much
            found = tuple(state_dict[key].shape) if key in state_dict else "missing"
            if key not in expected:
                classes = " and only a class-conditional one has" if key == "label_emb.weight" else ""
                raise ValueError(f"the weights do not fit the network: {name} has {key[:80]}, which this "
                                 f"U-Net has not{classes}")
            if found != expected[key]:
                raise ValueError(f"the weights do not fit the network: {key} of {name} is {found} and has to "
                                 f"be {expected[key]}")
        for key, tensor in state_dict.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} of {name} holds values that are not finite (NaN or infinity)")
    if "optimizer" in checkpoint:
        _check_optimizer(checkpoint["optimizer"], list(expected.values()))


def _check_tensors(name, state_dict, file_size):
    """Floating-point numbers by their names, and no more of them than the file can hold."""
    floats = torch.float64, torch.float32, torch.float16, torch.bfloat16
    if not isinstance(state_dict, dict):
        raise ValueError(f"{name} is no dict of tensors")
    for key, tensor in state_dict.items():
        if not (isinstance(key, str) and isinstance(tensor, torch.Tensor) and tensor.dtype in floats
                and tensor.layout == torch.strided and tensor.device.type == "cpu"):
            raise ValueError(f"{str(key)[:80]} of {name} is no tensor of floating-point numbers")
    if sum(tensor.nbytes for tensor in state_dict.values()) > file_size:
        raise ValueError(f"{name} is larger than the file: tensors that share their memory")


def _network_of_config(checkpoint):
    """The arguments of `UNet` that a checkpoint of ours names, once all that it says of itself is checked."""
    config = checkpoint["config"]
    for group, settings in SCHEMA.items():
        values = config.get(group) if isinstance(config, dict) else None
        if not isinstance(values, dict):
            raise ValueError(f"its config has no group {group!r}")
        exact = group in ("network", "process")
        for name in [*settings, *(values if exact else ())]:
            if name not in values or name not in settings:
                raise ValueError(f"its config's group {group!r} has {'no' if name in settings else 'a'} "
                                 f"{str(name)[:60]!r}")
        if wrong := misfit({name: values[name] for name in settings}):
            raise ValueError(f"its {wrong}")
    if config["data"]["low"] >= config["data"]["high"]:
        raise ValueError(f"its low {config['data']['low']} is not below its high {config['data']['high']}")
    for name in ("step", "ema_updates") if "optimizer" in checkpoint else ("step",):
        says, fits = _whole(0, 2**53)
        if not fits(checkpoint.get(name)):
            raise ValueError(f"its {name} {str(checkpoint.get(name))[:60]}: must be {says}")
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its config is more than plain values ({error})") from error
    Schedule.named(**config["process"])
    return config["network"]


def _check_optimizer(optimizer, shapes):
    """AdamW's moments of every parameter, in the order of the network's `shapes`."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    for k, shape in enumerate(shapes):
        moments = state.get(k) if isinstance(state, dict) else None
        moments = moments if isinstance(moments, dict) else {}
        for name, wanted in dict(step=(), exp_avg=shape, exp_avg_sq=shape).items():
            found = moments.get(name)
            if not (isinstance(found, torch.Tensor) and found.dtype == torch.float32
                    and found.layout == torch.strided and found.device.type == "cpu"
                    and found.shape == wanted and found.isfinite().all()):
                raise ValueError(f"its optimizer lacks AdamW's {name} of parameter {k}, finite and of the "
                                 f"shape {wanted}")


def network_of(state_dict, size, heads):
    """The arguments of `UNet` read off a bare state dict; the image size and the heads leave no trace in the
    tensors. UserError where it is of another kind of network."""
    width = lambda key: state_dict[key].shape[0]
    blocks = {key.split(".")[1] for key in state_dict if key.startswith("input_blocks.")}
    levels, attn = [[]], set()
    try:
        channels, in_channels = state_dict[FIRST].shape[:2]
        for block in range(1, len(blocks)):
            if f"input_blocks.{block}.0.op.weight" in state_dict:
                levels.append([])
            else:
                levels[-1].append(width(f"input_blocks.{block}.0.in_layers.2.weight"))
                if f"input_blocks.{block}.1.qkv.weight" in state_dict:
                    attn.add(size >> (len(levels) - 1))
        return dict(size=size, channels=channels, res_blocks=len(levels[0]),
                    mult=tuple(widths[0] // channels for widths in levels),
                    attn=tuple(sorted(attn, reverse=True)), heads=heads, in_channels=in_channels,
                    learn_sigma=width("out.2.weight") == 2 * in_channels,
                    scale_shift=width("input_blocks.1.0.emb_layers.1.weight") == 2 * levels[0][0])
    except KeyError as error:
        raise UserError(f"not an improved-diffusion U-Net: it has no {error.args[0]}") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError("not an improved-diffusion U-Net: a tensor without axes, or a level without residual "
                        "blocks") from error


def load_model(path, raw=False, size=None, heads=None, schedule=None, timesteps=None):
    """-> UNet in eval mode on the CPU, Schedule, config, step of a checkpoint: the EMA weights, or the raw
    ones.

    size, heads (default 4), schedule (linear) and timesteps (1000) describe a bare public state dict, which
    says nothing of them; a checkpoint of ours knows its own. config has the groups network, process, data and
    training (empty for a public file). UserError where these do not fit the file.
    """
    checkpoint = load_checkpoint(path)
    given = dict(size=size, heads=heads, schedule=schedule, timesteps=timesteps)
    given = {name: value for name, value in given.items() if value is not None}
    if wrong := misfit(given):
        raise UserError(f"--{wrong}")
    if "config" in checkpoint:
        config, state_dict = checkpoint["config"], checkpoint["model" if raw else "ema"]
        for name, value in given.items():
            if (config["network"] | config["process"])[name] != value:
                raise UserError(f"--{name} {value}: {path} is a checkpoint of train.py, its {name} is "
                                f"{(config['network'] | config['process'])[name]}; leave the flag out")
    elif size is None:
        raise UserError(f"{path}: a bare state dict does not say its image size; pass --size "
                        "(and --heads, --schedule, --timesteps)")
    elif raw:
        raise UserError(f"--raw: {path} is a bare state dict, which has one set of weights; leave it out")
    else:
        state_dict, data = checkpoint, dict(name="?", low=-1.0, high=1.0, p=0.0, sigma=0.0, float_data=False)
        config = dict(network=network_of(checkpoint, size, heads or 4), data=data, training={},
                      process=dict(schedule=schedule or "linear", timesteps=timesteps or 1000))
    with torch.device("meta"):                              # its weights are the file's: none are drawn
        model = UNet(**config["network"])
    model.load_state_dict(state_dict, assign=True)
    model = model.float().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, Schedule.named(**config["process"]), config, checkpoint.get("step", 0)


# ------------------------------------------------------------------------------ what a machine has room for

def check_memory(flag, needed, device):
    """UserError, before any of it is taken, if `needed` bytes are more than all the memory of a device."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise UserError(f"{flag}: needs more than {needed / 2**20:,.0f} MiB of memory, and there are "
                        f"{total / 2**20:,.0f}")


def check_disk(out, needed):
    """UserError if `needed` bytes are more than the disk of a file or folder to be written has left."""
    folder = next(parent for parent in [Path(out), *Path(out).absolute().parents] if parent.is_dir())
    disk = shutil.disk_usage(folder)
    if disk.total and needed > disk.free:                   # some file systems do not say
        raise UserError(f"--out {out}: {needed / 2**20:,.0f} MiB are needed there, and the disk has "
                        f"{disk.free / 2**20:,.0f} left")
