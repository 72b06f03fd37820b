"""Sampling: Eq. 4 (DDPM) and DDIM from a checkpoint, image by image reproducible, on any number of processes.

    python sample.py runs/robust --n 64 --out samples.npz
    python sample.py runs/robust --n 50000 --sampler ddim --steps 250 --out ddim.npz
    torchrun --nproc_per_node 8 -- sample.py runs/robust --n 50000 --batch 500 --out samples.npz
    python sample.py cifar10_uncond_50M_500K.pt --size 32 --schedule cosine --timesteps 4000 --steps 500 --out public.npz

Writes the images (uint8, N x H x W x 3, under `arr_0`; float32 in data units for `subspace` data), their protocol, and a
grid of the first of them as a PNG. Image i depends on the seed and on i alone. A killed run goes on where it stopped.
The `--` keeps torchrun from taking `--n` for one of its own flags.
"""

import argparse
import json
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from data import Progress, UserError, as_bytes, atomic_write, command_line, noise_estimate, save_grid, sha256_of
from unet import at, expand, in_bfloat16, load_model, start_processes

NOISE_BLOCK = 8         # steps of noise drawn at a time for one image: fewer, larger draws


# ---------------------------------------------------------------------------------------------------------- the steps

def reverse_distribution(model, schedule, x_t, i, variance="large", clamp=(-1.0, 1.0)):
    """p_theta(x_{t-1} | x_t): -> mean, log_variance, x0_hat, each like x_t or broadcasting against it.

    x_t [B, C, H, W]; i [B] indices into the schedule, whose `timesteps` are what the network is told; variance `large`,
    `small` or `learned` (the network's second half of channels); clamp: the range of x0_hat, or None.
    """
    eps_hat, v = split_output(model(x_t, schedule.timesteps[i]), x_t)
    x0_hat = schedule.predicted_x0(x_t, i, eps_hat)
    if clamp is not None:
        x0_hat = x0_hat.clamp(*clamp)
    mean = schedule.posterior_mean(x0_hat, x_t, i)          # Eq. 4's bracket, and equal to it where nothing is clamped
    return mean, schedule.log_variance(variance, x_t, i, v), x0_hat


def split_output(out, x_t):
    """The network's output as (eps_hat, v): v is None where the variance is not learned."""
    if out.shape == x_t.shape:
        return out, None
    return out.chunk(2, dim=1)


def ddpm_step(model, schedule, x_t, i, z, variance="large", clamp=(-1.0, 1.0)):
    """x_{t-1} of Eq. 4; z [B, C, H, W] is its standard normal noise, left out at the last step (i = 0)."""
    mean, log_variance, _ = reverse_distribution(model, schedule, x_t, i, variance, clamp)
    return mean + expand((i > 0).float(), x_t) * torch.exp(0.5 * log_variance) * z       # Eq. 4


def ddim_step(model, schedule, x_t, i, clamp=(-1.0, 1.0)):
    """x_{t-1} of DDIM with eta = 0 (Song et al. 2021a); eps is derived again from the clamped x0_hat."""
    _, _, x0_hat = reverse_distribution(model, schedule, x_t, i, clamp=clamp)
    eps_hat = (x_t - at(schedule.sqrt_alpha_bar, i, x_t) * x0_hat) / at(schedule.sqrt_one_minus_alpha_bar, i, x_t)
    return (at(schedule.sqrt_alpha_bar_prev, i, x_t) * x0_hat
            + at(schedule.sqrt_one_minus_alpha_bar_prev, i, x_t) * eps_hat)


def stream_seed(seed, index):
    """A seed for the random stream of one image, or of one training step: within a seed, no two indices share one.

    The CPU's Mersenne twister takes no more than 32 bits of seed; the factor keeps different seeds far apart in these.
    """
    return (seed * 0x9E3779B1 + index) % 2**32


def generator(seed, index, device="cpu"):
    """The random generator of `stream_seed(seed, index)`."""
    return torch.Generator(device).manual_seed(stream_seed(seed, index))


def image_noise(seed, indices, shape, device="cpu"):
    """Yields x_T, then the z of one step after the other: each [B, *shape], row k a function of (seed, indices[k]) alone."""
    generators = [generator(seed, index, device) for index in indices]
    while True:
        yield from torch.stack([torch.randn(NOISE_BLOCK, *shape, generator=g, device=device) for g in generators], dim=1)


@torch.no_grad()
def sample(model, schedule, noise, sampler="ddpm", variance="large", clamp=(-1.0, 1.0), attack=None):
    """x_0 [B, C, H, W] from the whole reverse process; noise yields x_T and then one z per step, as `image_noise` does.

    attack(x_t, step) -> x_t: called before every step with its index into the schedule, len(schedule) - 1 first.
    """
    x_t = next(noise)
    for step in reversed(range(len(schedule))):
        if attack is not None:
            x_t = attack(x_t, step)
        i = torch.full((len(x_t),), step, device=x_t.device)
        if sampler == "ddpm":
            x_t = ddpm_step(model, schedule, x_t, i, next(noise), variance, clamp)
        else:
            x_t = ddim_step(model, schedule, x_t, i, clamp)
    return x_t


# --------------------------------------------------------------------------------------------------- the command line

def add_arguments(parser):
    """The flags of every script that samples."""
    parser.add_argument("run", help="train.py's --out folder, or a checkpoint file (ours or improved-diffusion's)")
    parser.add_argument("--n", type=int, default=64, help="number of images (default 64; the paper's FID takes 50000)")
    parser.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="Eq. 4, or DDIM with eta = 0")
    parser.add_argument("--steps", type=int, help="sampling steps (default: all timesteps for ddpm, 250 for ddim)")
    parser.add_argument("--variance", choices=["large", "small", "learned"],
                        help="of Eq. 4's noise: beta, the posterior's, or the network's own (default: learned where "
                             "the network has it, else large)")
    parser.add_argument("--batch", type=int, default=128, help="images at a time, per process (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of this seed and i (default 0)")
    parser.add_argument("--raw", action="store_true", help="the trained weights themselves instead of their EMA")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast in the network")
    parser.add_argument("--out", type=Path, default=Path("samples.npz"), help="the .npz to write (default samples.npz)")
    public = parser.add_argument_group("a public state dict does not say these; a checkpoint of train.py does")
    public.add_argument("--size", type=int, help="image size")
    public.add_argument("--heads", type=int, default=4, help="attention heads (default 4)")
    public.add_argument("--schedule", choices=["linear", "cosine"], default="linear", help="noise schedule")
    public.add_argument("--timesteps", type=int, default=1000, help="T (default 1000)")


def generate(args, attacker=None, extra=None):
    """Samples args.n images into args.out, in shards that are kept until the .npz is whole; the work of all processes.

    args: the flags of `add_arguments`. attacker(model, schedule, indices, variance, clamp) -> what `sample` takes as its
    attack, for the images of these indices; extra: what it adds to the protocol. UserError where a flag does not fit.
    """
    if args.n < 1 or args.batch < 1:
        raise UserError(f"--n {args.n} --batch {args.batch}: both must be at least 1")
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: the name must end in .npz")
    process = start_processes(join=False)                   # shards need no collective: nothing can time out
    model, schedule, config = load_model(args.run, args.raw, args.size, args.heads, args.schedule, args.timesteps)
    steps = args.steps or (len(schedule) if args.sampler == "ddpm" else min(250, len(schedule)))
    schedule = schedule.respaced(steps)
    learned = config["network"]["learn_sigma"]
    variance = args.variance or ("learned" if learned else "large")
    if variance == "learned" and not learned:
        raise UserError(f"--variance learned: the network of {args.run} does not predict its variance; large or small")
    file = args.run if Path(args.run).is_file() else Path(args.run) / "checkpoint.pt"
    data, size = config["data"], config["network"]["size"]
    protocol = dict(checkpoint=str(file), sha256=sha256_of(file), step=config["step"], data=data["name"], size=size,
                    p=data["p"], sigma=data["sigma"], method=config["training"].get("method", "?"), n=args.n,
                    sampler=args.sampler, steps=steps, variance=variance if args.sampler == "ddpm" else None,
                    ema=not args.raw, seed=args.seed, amp=args.amp, batch=args.batch, **config["process"], **(extra or {}))
    shards = Shards(args.out, protocol, process.rank == 0)
    if process.rank == 0:
        print(f"{args.n} images of {data['name']} {size}x{size} from {file} (step {config['step']}, "
              f"{'raw' if args.raw else 'EMA'} weights): {args.sampler}, {steps} steps, {process.world} process(es) on "
              f"{process.device.type}", flush=True)
    model, schedule, clamp = model.to(process.device), schedule.to(process.device), (data["low"], data["high"])
    if args.amp:
        model = in_bfloat16(model, process.device)
    todo = [k for k in range(process.rank, len(shards), process.world) if not shards.path(k).exists()]
    progress = Progress(sum(len(shards.indices(k)) for k in todo), "images", "sampling")
    for k in todo:
        indices = shards.indices(k)
        noise = image_noise(args.seed, indices, (config["network"]["in_channels"], size, size), process.device)
        attack = attacker and attacker(model, schedule, indices, variance, clamp)
        x_0 = sample(model, schedule, noise, args.sampler, variance, clamp, attack)
        x_0 = x_0.permute(0, 2, 3, 1).cpu().numpy()         # [B, H, W, C]
        shards.write(k, x_0 if data["float_data"] else as_bytes(x_0))
        progress.update(progress.done + len(x_0))
    if process.rank == 0:
        progress.close()
        first = shards.join()
        print(f"made {args.out} and {args.out.with_suffix('.png')}: {args.n} images, {progress.rate:.2f} images/s a process; "
              f"noise estimate of the first {len(first)}: {noise_estimate(first).mean():.3f}")


class Shards:
    """The images of one .npz while they are being made: shard k is a file with images k*batch ... of them.

    The files live in OUT.shards beside OUT, with the protocol that they belong to; another protocol is refused.
    """

    def __init__(self, out, protocol, first):
        self.out, self.protocol, self.folder = out, protocol, Path(f"{out}.shards")
        note = self.folder / "protocol.json"
        while not first and not note.exists():              # the first process decides for all
            time.sleep(0.1)
        if note.exists() and (there := json.loads(note.read_text())) != protocol:
            name = next(k for k in protocol if there.get(k) != protocol[k])
            raise UserError(f"{self.folder}: holds shards of another run ({name} {there.get(name)}, now "
                            f"{protocol[name]}); finish that run, delete the folder, or choose another --out")
        if first:
            with atomic_write(note) as temporary:
                temporary.write_text(json.dumps(protocol))

    def __len__(self):
        return -(-self.protocol["n"] // self.protocol["batch"])

    def indices(self, k):
        """The image indices of shard k."""
        return range(k * self.protocol["batch"], min((k + 1) * self.protocol["batch"], self.protocol["n"]))

    def path(self, k):
        """The file of shard k."""
        return self.folder / f"{k:06d}.npy"

    def write(self, k, images):
        """Keeps the finished images [B, H, W, C] of shard k."""
        with atomic_write(self.path(k)) as temporary, open(temporary, "wb") as file:
            np.save(file, images)

    def join(self):
        """Waits for the shards of all processes, streams them into the .npz, draws the grid, removes the folder.

        -> the images of the first shard, float [B, C, H, W] in [-1, 1] or data units.
        """
        for k in range(len(self)):
            while not self.path(k).exists():                # a process that dies takes this one with it: torchrun's work
                time.sleep(0.2)
        first = np.load(self.path(0), allow_pickle=False)
        header = dict(descr=np.lib.format.dtype_to_descr(first.dtype), fortran_order=False,
                      shape=(self.protocol["n"], *first.shape[1:]))
        with atomic_write(self.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for k in range(len(self)):
                    member.write(np.ascontiguousarray(np.load(self.path(k), allow_pickle=False)).tobytes())
            with archive.open("protocol.npy", "w") as member:
                np.lib.format.write_array(member, np.array(json.dumps(self.protocol)), allow_pickle=False)
        save_grid(first[:64] if first.dtype == np.uint8 else as_bytes(first[:64]), self.out.with_suffix(".png"))
        shutil.rmtree(self.folder)
        return (first / 127.5 - 1 if first.dtype == np.uint8 else first).transpose(0, 3, 1, 2)


def main():
    """Samples as the command line says."""
    parser = argparse.ArgumentParser(description="Sample images from a checkpoint.", epilog=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    generate(parser.parse_args())


if __name__ == "__main__":
    command_line(main)
