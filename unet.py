"""The noise-predicting network and the noise schedule: what every other stage is built on.

    model = UNet(size=32, **PRESETS["cifar10"])                     # eps_theta, randomly initialised
    schedule = Schedule.named("linear", 1000)                       # Eq. 1 and 2
    model, schedule = built(config)                                 # both, of a checkpoint's configuration

The network is the U-Net of Nichol & Dhariwal (2021), the paper's codebase, and reads its state dicts key by
key.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError

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


def _normalise_on_gpu(x, weight, bias, groups, eps):
    """What `_Normalise` does, by PyTorch's kernel, whose answer on CUDA is contiguous, not channels_last."""
    weight, bias = (part.transpose(1, 2)[..., None] for part in (weight, bias))                 # [B, C, 1, 1]
    return torch.addcmul(bias, F.group_norm(x, groups, None, None, eps), weight)


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
            normalise = _Normalise.apply if x.device.type == "cpu" else _normalise_on_gpu
            return normalise(x.float(), weight, bias, self.num_groups, self.eps).to(x.dtype)


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
    `attn` lists the resolutions that get attention (the middle block always does), `mult` the width of each
    level in units of `channels`; every level but the last halves the resolution. `sigma_data`, with the
    schedule in float64: beyond the paper, see `preconditioning`. Raises UserError where size and mult, or
    channels and heads, do not fit.
    """

    def __init__(self, size, channels, res_blocks, mult, attn, heads, dropout=0.0, learn_sigma=False,
                 scale_shift=True, in_channels=3, sigma_data=None, schedule=None):
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
        factors = None if sigma_data is None else preconditioning(schedule, sigma_data)
        self.register_buffer("factors", factors, persistent=False)          # no weights: not in a state dict

    def forward(self, x, t):
        if self.factors is None:
            return self.raw(x, t)
        inside, skip, outside = (expand(factor, x) for factor in self.factors[t].unbind(dim=1))
        out, *v = self.raw(inside * x, t).split(x.shape[1], dim=1)
        return torch.cat([skip * x + outside * out, *v], dim=1)

    def raw(self, x, t):
        """What the layers give: the paper's eps_theta, or F of `preconditioning`."""
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


def preconditioning(schedule, sigma_data):
    """Karras et al. (2022)'s parametrisation in terms of x_t and eps, beyond the paper -> float32 [T, 3]: the
    factors of x_t on its way into the layers F, of x_t in the result, and of F's output.

    sigma_data: the deviation of the data. With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar), sigma = s / a,
    w^2 = s^2 + a^2 sigma_data^2, their denoiser is D = c_skip x_t / a + c_out F(c_in x_t / a), and
        eps_hat = (x_t - a D) / s = s / w^2 x_t - a sigma_data / w F(x_t / w).
    """
    a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar                               # [T]
    w = (s**2 + a**2 * sigma_data**2).sqrt()
    return torch.stack([1 / w, s / w**2, -a * sigma_data / w], dim=1).float()


def built(config, device="cpu"):
    """-> the UNet of a configuration, newly made on a device (`meta`: without memory), and its Schedule."""
    schedule = Schedule.named(**config["process"])
    with torch.device(device):
        return UNet(**config["network"], schedule=schedule), schedule


# ----------------------------------------------------------------------------------------- the noise schedule

def expand(values, x):
    """One value per sample, or one for all, shaped to broadcast against x: values [B...] or [], x [B..., *]
    -> [B..., 1 ...]."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def at(table, t, x):
    """table[t], shaped to broadcast against x: table [T], t [B...] or one index for all, x [B..., *] ->
    [B..., 1 ...]."""
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
        self.noise_level = self.sqrt_one_minus_alpha_bar / self.sqrt_alpha_bar      # sigma of Karras et al.
        self.sqrt_alpha_bar_prev = self.alpha_bar_prev.sqrt()
        self.sqrt_one_minus_alpha_bar_prev = (1 - self.alpha_bar_prev).sqrt()
        # Section A.2: mean = coefficient_x0 * x_0 + coefficient_xt * x_t, variance = beta (1 -
        # alpha_bar_prev) / (1 - alpha_bar)
        self.coefficient_x0 = beta * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar)
        self.coefficient_xt = (1 - self.alpha_bar_prev) * (1 - beta).sqrt() / (1 - self.alpha_bar)
        self.posterior_variance = beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        # The posterior variance of the last step (i = 0) is 0 and has no logarithm: the second's stands in.
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
        kept. UserError where steps is not in 2 ... T."""
        i = torch.arange(self._allowed(steps), dtype=torch.float64)
        return self._visiting((i * (len(self) - 1) / (steps - 1)).round().long())

    def respaced_by_noise(self, steps):
        """The process that visits the `steps` timesteps whose sigma = s / a come nearest to those of Karras
        et al. (2022): sigma^(1/7) in even steps, from the lowest to the last, or to 80 if that is less.
        UserError where steps is not in 2 ... T."""
        first, last = float(self.noise_level[0]), min(float(self.noise_level[-1]), 80.0)
        wanted = torch.linspace(first**(1 / 7), last**(1 / 7), self._allowed(steps), dtype=torch.float64)**7
        nearest = torch.searchsorted(self.between_noise_levels(), wanted.log())
        i = torch.arange(steps)                             # none twice, where many are asked for: moved up,
        visited = i + (nearest - i).cummax(dim=0).values    # and down from the end
        return self._visiting(visited.minimum(i + max(int(nearest[-1]) - (steps - 1), 0)))

    def between_noise_levels(self):
        """ln sigma half way from every timestep to the next: [T - 1], ascending. The t nearest to a sigma is
        the number of them that are below its logarithm."""
        return (self.noise_level[1:].log() + self.noise_level[:-1].log()) / 2

    def _allowed(self, steps):
        """The number of steps; UserError where it is not in 2 ... T."""
        if not 1 < steps <= len(self):
            raise UserError(f"--steps {steps}: this model has {len(self)} timesteps, so 2 to {len(self)} can "
                            "be sampled")
        return steps

    def _visiting(self, visited):
        """The process of some of the timesteps, ascending: beta is 1 - alpha_bar / alpha_bar of the one
        before."""
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
