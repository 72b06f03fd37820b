"""Sampling: Eq. 4 (DDPM), DDIM and Heun's method from a checkpoint, image by image reproducible, on any
number of processes.

    python sample.py runs/shapes-adv --num-samples 64 --out samples.npz
    python sample.py runs/cifar10-adv --num-samples 50000 --sampler ddim --steps 250 --out ddim.npz
    python sample.py runs/cifar10-adv --num-samples 50000 --sampler heun --out heun.npz     # 35 evaluations
    torchrun --nproc_per_node 8 sample.py runs/cifar10-adv --num-samples 50000 --batch 500 --out samples.npz
    python sample.py cifar10_uncond_50M_500K.pt --size 32 --schedule cosine --timesteps 4000 --steps 500

Writes the images (uint8, N x H x W x 3, under `arr_0`; float32 in data units for `subspace` data), the whole
story of how they were made (JSON, under `protocol`), and a grid of the first of them as a PNG. Image i
depends on the seed and on i alone. A killed run goes on where it stopped.
"""

import common                                               # first: it answers Ctrl-C while others load

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from checkpoints import load_model
from common import (NOISE_BLOCK, Progress, UserError, as_bytes, atomic_write, check_disk, check_memory,
                    check_out, check_ranges, command_line, image_noise, is_first_process, locked,
                    noise_estimate, parser_of, protocol_in, save_grid, sha256_of, start_processes)
from unet import at, in_bfloat16

PATIENCE = 600          # seconds that a process waits for another without a sign of life
HEARTBEAT = 5           # seconds between the signs of life of one that others wait for

# -------------------------------------------------------------------------------------------------- the steps

class Reverse(NamedTuple):
    """What one step of the reverse process gives: x_{t-1}; its mean; sigma(t), the deviation of DDPM's step;
    x0_hat."""
    x: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor
    x0_hat: torch.Tensor


def split_output(out, x_t):
    """The network's output as (eps_hat, v): v is None where the variance is not learned."""
    if out.shape == x_t.shape:
        return out, None
    return out.chunk(2, dim=1)


def reverse_step(model, schedule, x_t, i, z=None, sampler="ddpm", variance="large", clamp=(-1.0, 1.0)):
    """One step of the reverse process, by one evaluation of the network, or Heun's two -> Reverse.

    x_t [B, C, H, W]; i: the index into the schedule; z [..., B, C, H, W]: Eq. 4's standard normal noise,
    which the last step (i = 0) leaves out; without it x_{t-1} is the mean. sampler: `ddpm`; `ddim` with eta =
    0 (Song et al. 2021a), which has no noise; or `heun` (Karras et al. 2022), DDIM's step with the mean of
    the eps_hat at its two ends, but for the last. variance: `large`, `small` or `learned`. clamp: the range
    of every x0_hat, or None. The x0_hat given back is that of x_t.
    """
    def denoised(x, i):
        eps_hat, v = split_output(model(x, schedule.t[i].expand(len(x))), x)
        x0_hat = schedule.predicted_x0(x, i, eps_hat)                               # section A.2
        return x0_hat if clamp is None else x0_hat.clamp(*clamp), v

    def implied_eps(x, i, x0_hat):                                            # again, from the clamped x0_hat
        return (x - at(schedule.sqrt_alpha_bar, i, x) * x0_hat) / at(schedule.sqrt_one_minus_alpha_bar, i, x)

    def with_less_noise(x0_hat, eps_hat):
        return (at(schedule.sqrt_alpha_bar_prev, i, x_t) * x0_hat
                + at(schedule.sqrt_one_minus_alpha_bar_prev, i, x_t) * eps_hat)

    x0_hat, v = denoised(x_t, i)
    sigma = torch.exp(0.5 * schedule.log_variance(variance, x_t, i, v))             # Algorithm 3, line 2
    if sampler == "ddpm":
        mean = schedule.posterior_mean(x0_hat, x_t, i)      # Eq. 4's bracket, equal where nothing is clamped
        x = mean if z is None else mean + (i > 0) * sigma * z                       # Eq. 4
        return Reverse(x, mean, sigma, x0_hat)
    eps_hat = implied_eps(x_t, i, x0_hat)
    mean = with_less_noise(x0_hat, eps_hat)
    if sampler == "heun" and i > 0:
        eps_hat = (eps_hat + implied_eps(mean, i - 1, denoised(mean, i - 1)[0])) / 2
        mean = with_less_noise(schedule.predicted_x0(x_t, i, eps_hat), eps_hat)
    return Reverse(mean, mean, sigma, x0_hat)


@torch.no_grad()
def sample(model, schedule, noise, sampler="ddpm", variance="large", clamp=(-1.0, 1.0), attack=None):
    """x_0 [B, C, H, W] from the whole reverse process.

    noise yields x_T and then, for ddpm, the z of one step after the other, as `image_noise` does. attack(x_t,
    i, z) -> x_t: called before every step with its index into the schedule, len(schedule) - 1 first, and the
    noise that the step will take (None but for ddpm).
    """
    x_t = next(noise)
    for i in reversed(range(len(schedule))):
        z = next(noise) if sampler == "ddpm" else None
        if attack is not None:
            x_t = attack(x_t, i, z)
        x_t = reverse_step(model, schedule, x_t, i, z, sampler, variance, clamp).x
    return x_t


# -------------------------------------------------------------------------------- from a checkpoint to a file

def add_arguments(parser):
    """The flags of every script that samples."""
    add = parser.add_argument
    add("run", help="train.py's --out folder, or a checkpoint file (ours or improved-diffusion's)")
    add("--num-samples", type=int, default=64, help="number of images (default 64; the paper's FID: 50000)")
    add("--sampler", choices=["ddpm", "ddim", "heun"], default="ddpm", help="Eq. 4, DDIM with eta = 0, or "
        "Heun's method as in EDM, which evaluates the network twice a step (default ddpm)")
    add("--steps", type=int, help="sampling steps (default: all timesteps for ddpm, 250 for ddim, 18 for "
        "heun)")
    add("--variance", choices=["large", "small", "learned"], help="of Eq. 4's noise: beta, the posterior's, "
        "or the network's own (default: learned where the network has it, else large)")
    add("--batch", type=int, default=128, help="images at a time, per process (default 128)")
    add("--seed", type=int, default=0, help="image i is a function of this seed and i (default 0)")
    add("--raw", action="store_true", help="the trained weights themselves instead of their EMA")
    add("--amp", action="store_true", help="bfloat16 autocast in the network")
    add("--out", type=Path, default=Path("samples.npz"), help="the .npz to write (default samples.npz)")
    public = parser.add_argument_group("what a public state dict does not say, and a checkpoint of ours does")
    public.add_argument("--size", type=int, help="image size")
    public.add_argument("--heads", type=int, help="attention heads (default 4)")
    public.add_argument("--schedule", choices=["linear", "cosine"], help="noise schedule (default linear)")
    public.add_argument("--timesteps", type=int, help="T (default 1000)")


def say_idle(parser, argv, idle):
    """Says of every flag of a command line that has no effect there why, a line each on stderr. idle: (names
    of flags, why) for those that have none."""
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv))))      # stays None: not given
    given = vars(parser.parse_args(argv, blank))
    for names, why in idle:
        for name in names:
            if given[name] is not None and is_first_process():
                print(f"--{name.replace('_', '-')} has no effect {why}", file=sys.stderr, flush=True)


def idle_in_sampling(args):
    """Of the flags of `add_arguments`, for `say_idle`."""
    return [(["variance"], f"on --sampler {args.sampler}")] if args.sampler != "ddpm" else []


def default_steps(sampler, T):
    """The sampling steps of a process of T, where --steps does not say."""
    return dict(ddpm=T, ddim=min(250, T), heun=min(18, T))[sampler]


def arguments(argv=None):
    """The command line, parsed."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    say_idle(parser, argv, idle_in_sampling(args))
    return args


def open_job(args):
    """The flags of `add_arguments`, checked, and the checkpoint that they name, as what `generate` takes.

    -> process; model, schedule (of the steps taken) and how (sampler, variance, clamp) on its device;
    protocol, the whole story of the images as plain values. Raises UserError where a flag does not fit.
    """
    check_ranges(args, num_samples=(1, 10**9), batch=(1, 10**6), steps=(2, 10**6))
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: the name must end in .npz")
    for path in args.out, args.out.with_suffix(".png"), Path(f"{args.out}.shards") / "protocol.json":
        check_out(path)
    process = start_processes(join=False)                   # shards need no collective: nothing can time out
    model, schedule, config, step = load_model(args.run, args.raw, args.size, args.heads, args.schedule,
                                               args.timesteps)
    T = len(schedule)
    steps = args.steps or default_steps(args.sampler, T)
    schedule = schedule.respaced_by_noise(steps) if args.sampler == "heun" else schedule.respaced(steps)
    learned, data, network = config["network"]["learn_sigma"], config["data"], config["network"]
    maps = network["channels"] * (network["res_blocks"] + 1) + network["in_channels"] * 2 * NOISE_BLOCK
    images = min(args.batch, args.num_samples)
    check_memory(f"--batch {args.batch}", 4 * images * network["size"] ** 2 * maps, process.device)
    variance = args.variance or ("learned" if learned else "large")
    if variance == "learned" and not learned:
        raise UserError(f"--variance learned: the network of {args.run} does not predict its variance; large "
                        "or small")
    file = args.run if Path(args.run).is_file() else Path(args.run) / "checkpoint.pt"
    protocol = dict(checkpoint=str(file), sha256=sha256_of(file), step=step, config=config,
                    num_samples=args.num_samples, sampler=args.sampler, steps=steps,
                    variance=variance if args.sampler == "ddpm" else None, ema=not args.raw, seed=args.seed,
                    batch=args.batch, amp=args.amp, device=process.device.type, tf32=process.tf32,
                    stream="sample", torch=torch.__version__, attack=None)
    model, schedule = model.to(process.device), schedule.to(process.device)
    if args.amp:
        model = in_bfloat16(model, process.device)
    how = dict(sampler=args.sampler, variance=variance, clamp=(data["low"], data["high"]))
    return SimpleNamespace(process=process, model=model, schedule=schedule, how=how,
                           protocol=json.loads(json.dumps(protocol)))       # as it will be read: no tuples


def generate(job, out, attack_on=None, finish=None):
    """Samples the images of a job into `out` on all processes, in shards that are kept until all are there.

    attack_on(indices) -> what `sample` takes as its attack, for the images of these indices, with a method
    measures() -> a dict. finish(measures of all shards): called by the first process before `out` is written,
    so that an `out` that is there is finished.
    """
    first = job.process.rank == 0
    shards = Shards(out, job.protocol)
    if job.process.rank >= max(1, len(shards)):             # more processes than shards
        return
    with contextlib.ExitStack() as stack:
        if first:
            message = f"--out {out}: another process is making it; wait for its end, or choose another --out"
            stack.enter_context(locked(out.with_name(f".{out.name}.lock"), message))
        fill(shards, job, attack_on, finish)


def fill(shards, job, attack_on, finish):
    """Makes the shards of this process, and the first one joins those of all: see `generate`."""
    process, protocol, first, out = job.process, job.protocol, job.process.rank == 0, shards.out
    network, data = (protocol["config"][group] for group in ("network", "data"))
    shape = network["in_channels"], network["size"], network["size"]
    if not shards.begin(first):
        if first:
            print(f"{out} is there already, made with the same settings: nothing to do")
        return
    if first:
        weights = "EMA" if protocol["ema"] else "raw weights"
        print(f"{protocol['num_samples']} images of {data['name']} {shape[1]}x{shape[2]} from "
              f"{protocol['checkpoint']} (step {protocol['step']}, {weights}), {protocol['sampler']}, "
              f"{protocol['steps']} steps, {process.world} process(es) on {process.device.type}", flush=True)
    todo = [k for k in range(process.rank, len(shards), process.world) if not shards.finished(k)]
    progress = Progress(sum(len(shards.indices(k)) for k in todo), "images", "sampling")
    with shards.alive(process.rank) if todo and not first else contextlib.nullcontext():
        for k in todo:
            indices = shards.indices(k)
            noise = image_noise(protocol["stream"], protocol["seed"], indices, shape, process.device)
            attack = attack_on(indices) if attack_on else None
            x_0 = sample(job.model, job.schedule, noise, **job.how, attack=attack)
            x_0 = x_0.permute(0, 2, 3, 1).cpu().numpy()         # [B, H, W, C]
            if not np.isfinite(x_0).all():
                raise UserError(f"{protocol['checkpoint']}: its samples hold values that are not finite")
            shards.write(k, x_0 if data["float_data"] else as_bytes(x_0), attack and attack.measures(x_0))
            progress.update(progress.done + len(x_0))
    if not first:
        return
    progress.close()
    some = shards.join(finish, process.world)
    print(f"made {out} and {out.with_suffix('.png')}: {protocol['num_samples']} images, {progress.rate:.2f} "
          f"images/s a process; noise estimate of the first {len(some)}: {noise_estimate(some).mean():.3f}")


def protocol_of(out):
    """The protocol of a finished .npz of ours, or None where there is none."""
    try:
        with zipfile.ZipFile(out) as archive:
            return protocol_in(archive)
    except Exception:                                       # no such file, or a foreign one: anything
        return None


def wait_for(there, what, advice, signs=lambda: None):
    """Waits until there() is not None -> what it is. What it waits for is said after a while; UserError, with
    advice, once signs() have stayed the same for PATIENCE seconds."""
    began = since = time.monotonic()
    last, said = signs(), False
    while (found := there()) is None:
        now, new = time.monotonic(), signs()
        if new != last:
            last, since = new, now
        if now - since > PATIENCE:
            raise UserError(f"waited {PATIENCE} s for {what}: {advice}")
        if not said and now - began > 10:
            print(f"waits for {what}", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.1)
    return found


def difference(there, now):
    """The first setting in which two protocols differ, in words."""
    there = there if isinstance(there, dict) else {}        # a foreign file's
    for name, value in now.items():
        was = there.get(name)
        if isinstance(was, dict) and isinstance(value, dict) and was != value:
            return f"{name}: {difference(was, value)}"
        if was != value:
            return f"{name} {str(was)[:60]}, now {str(value)[:60]}"
    return "it has more settings"


class Shards:
    """The images of one .npz while they are being made: shard k is a file with images k*batch ... of them.

    The files live in OUT.shards beside OUT, with the protocol that they belong to; another protocol is
    refused.
    """

    def __init__(self, out, protocol):
        self.out, self.protocol, self.folder = out, protocol, Path(f"{out}.shards")
        network, data = (protocol["config"][group] for group in ("network", "data"))
        self.shape = network["size"], network["size"], network["in_channels"]           # of an image
        self.dtype = np.dtype(np.float32 if data["float_data"] else np.uint8)

    def begin(self, first):
        """Begins, or goes on with what is there. -> False where OUT is finished with this protocol already.

        The first process decides for all, and the others wait for it: it may have finished without them.
        UserError where other shards are in the way, or the first process does not come.
        """
        note = self.folder / "protocol.json"

        def begun():
            if protocol_of(self.out) == self.protocol:
                return self.out
            try:
                return json.loads(note.read_text()) if note.exists() else None
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"{note}: damaged ({error}); delete the folder {self.folder}") from error

        there = begun() if first else wait_for(begun, f"the first process to begin {self.folder}", "is it "
                                               "running, on the same folder? RANK and WORLD_SIZE say that "
                                               "there are several")
        if there is self.out:
            if first:                                       # one that was killed may have left it
                shutil.rmtree(self.folder, ignore_errors=True)
            return False
        if first and os.path.lexists(self.out):
            how = difference(protocol_of(self.out), self.protocol)
            raise UserError(f"--out {self.out}: is there already, made otherwise ({how}); delete it, or "
                            "choose another --out")
        if there is None:                                   # shards that nobody knows anything of are no use
            shutil.rmtree(self.folder, ignore_errors=True)
            images = self.protocol["num_samples"] * math.prod(self.shape) * self.dtype.itemsize
            check_disk(self.out, 2 * images)                # the shards, then the .npz
        elif there != self.protocol:
            raise UserError(f"{self.folder}: holds shards of another run "
                            f"({difference(there, self.protocol)}); finish that, delete them, or choose "
                            "another --out")
        if first:
            with atomic_write(note) as temporary:
                temporary.write_text(json.dumps(self.protocol))
        return True

    @contextlib.contextmanager
    def alive(self, rank):
        """Inside, a file of the folder is touched again and again: the process of this rank is at work, on a
        shard that may take an hour."""
        done, file = threading.Event(), self.folder / f"alive-{rank}"

        def touch():
            while not done.wait(HEARTBEAT):
                with contextlib.suppress(OSError):
                    os.utime(file)

        with atomic_write(file) as temporary:
            temporary.touch()
        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def __len__(self):
        return -(-self.protocol["num_samples"] // self.protocol["batch"])

    def indices(self, k):
        """The image indices of shard k."""
        batch = self.protocol["batch"]
        return range(k * batch, min((k + 1) * batch, self.protocol["num_samples"]))

    def path(self, k):
        """The file of shard k; its measures, of an attack, lie beside it."""
        return self.folder / f"{k:06d}.npy"

    def finished(self, k):
        """Whether shard k is there. One that a crash of the machine has damaged is not, and is made again."""
        try:
            shard = np.load(self.path(k), mmap_mode="r", allow_pickle=False)
            if ((shard.shape, shard.dtype) == ((len(self.indices(k)), *self.shape), self.dtype)
                    and (not self.protocol["attack"] or self.measures(k))):
                return True
        except (OSError, ValueError, EOFError, AttributeError):
            pass
        with contextlib.suppress(OSError):                  # it is not there, or a folder
            self.path(k).unlink()
        return False

    def measures(self, k):
        """The measures of an attacked shard, a dict of numbers (a broken network's may be NaN); None where
        they are lost or damaged."""
        try:
            found = json.loads(self.path(k).with_suffix(".json").read_text())
            return found if all(isinstance(value, (int, float)) for value in found.values()) else None
        except (OSError, ValueError, AttributeError, RecursionError):
            return None

    def write(self, k, images, measures=None):
        """Keeps the images [B, H, W, C] of shard k, which is finished once they are there, and its
        measures."""
        if measures:
            with atomic_write(self.path(k).with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(measures))
        content = io.BytesIO()                  # into a file np.save writes by C's stdio, deaf to a full disk
        np.save(content, images)
        with atomic_write(self.path(k)) as temporary:
            temporary.write_bytes(content.getbuffer())

    def signs_of_life(self):
        """Something that changes when a process writes a shard or is alive."""
        with contextlib.suppress(OSError):
            return {file.name: file.stat().st_mtime_ns for file in os.scandir(self.folder)}

    def join(self, finish, world):
        """Waits for the shards of all `world` processes, draws the grid, calls finish(their measures),
        streams them into the .npz, removes the folder. -> the images of the grid, float [B, C, H, W] in
        [-1, 1] or data units."""
        paths = [self.path(k) for k in range(len(self))]
        for k, path in enumerate(paths):
            wait_for(lambda: self.finished(k) or None, f"process {k % world} to make {path}",
                     "the same command goes on with the shards that are there", self.signs_of_life)
        some = [np.load(path, allow_pickle=False) for path in paths[:math.ceil(64 / self.protocol["batch"])]]
        some = np.concatenate(some)[:64]
        save_grid(some if some.dtype == np.uint8 else as_bytes(some), self.out.with_suffix(".png"))
        if finish:
            finish([self.measures(k) for k in range(len(self))])
        header = dict(descr=np.lib.format.dtype_to_descr(some.dtype), fortran_order=False,
                      shape=(self.protocol["num_samples"], *some.shape[1:]))
        with atomic_write(self.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for path in paths:
                    member.write(np.ascontiguousarray(np.load(path, allow_pickle=False)).tobytes())
            with archive.open("protocol.npy", "w") as member:
                np.lib.format.write_array(member, np.array(json.dumps(self.protocol)), allow_pickle=False)
        shutil.rmtree(self.folder)
        return (some / 127.5 - 1 if some.dtype == np.uint8 else some).transpose(0, 3, 1, 2)


def main(argv=None):
    """Samples as the command line says."""
    args = arguments(argv)
    generate(open_job(args), args.out)


if __name__ == "__main__":
    command_line(main)
