"""What is left of a table's work, and the hours that it takes on this machine: `bash run_all.sh plan` asks.

    bash run_all.sh plan paper table1       # its commands come on stdin, a line each: table, target, command

A command's work is the passes of one image through its network, counted from the command itself, times the
arithmetic of a pass, which is counted as it runs once. A backward pass is two forward ones; one, where the
input's gradient alone is taken, as attacks do. How much of that this machine does in a second is measured,
for every network once: other work on it meanwhile makes the hours too many. Not counted, as they are small
beside it: data sets, scores, sample grids and toy3d.py.
"""

import common                                               # first: it answers Ctrl-C while others load

import contextlib
import functools
import io
import json
import os
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import attack
import sample
import train
from common import UserError, check_ranges, command_line, parser_of, start_processes
from data import SIZES
from unet import UNet

REGULARISER = dict(ddpm=0, ambient=0, ran=3, inv=5, adv=5)  # passes of an image besides the 3 of DDPM's loss
OPTIMISER = 4                                               # arrays as large as the weights in a checkpoint


def configured(args):
    """The configuration of a train.py command, as far as its cost depends on it, without its data set."""
    network, process = train.from_flags(args, args.size or SIZES[args.data], 3,
                                        0.5 if args.precondition else None)
    return dict(network=network, process=process, training=vars(args) | dict(method="ddpm", reg_share=1.0))


@functools.cache
def arithmetic(network, device):
    """Floating-point operations of one image's forward pass, and the number of weights. network: as JSON."""
    network = json.loads(network)
    model, size = UNet(**network | dict(sigma_data=None)).to(device), network["size"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device=device), torch.zeros(1, dtype=torch.long, device=device))
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def parsed(arguments, argv):
    """arguments(argv), without what it says of flags that have no effect."""
    with contextlib.redirect_stderr(io.StringIO()):
        return arguments(argv)


def training_passes(args, steps):
    """Forward passes that so many steps of a train.py command come to."""
    return steps * args.batch * (3 + REGULARISER[args.method] * args.reg_share)


def sampling_passes(args, timesteps, attacked=None):
    """The same of a sample.py command, or, with `attacked` such as "25%", of an attack.py command, which
    follows the undisturbed trajectory and the control besides."""
    steps = args.steps or sample.default_steps(args.sampler, timesteps)
    passes = 2 * steps - 1 if args.sampler == "heun" else steps
    if attacked is not None:
        count = attack.attacked_count(attacked, steps)
        protocol = dict(attack=attack.asked_for(args, count), sampler=args.sampler, steps=steps,
                        seed=args.seed)
        forwards, backwards = attack.needed(protocol) if count else (0, 0)
        passes = (3 if count else 1) * passes + count * (forwards + backwards)
    return args.num_samples * passes


def seconds_of(work, device):
    """Median duration of work(), of at least three calls."""
    seconds = []
    while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def speeds(config, flops, batch, amp, process):
    """This machine's arithmetic a second, in training and in sampling, by DDPM's step and by a forward pass
    of so many images that it takes half a second, at most `batch`; amp: of bfloat16."""
    size, count = config["network"]["size"], 1
    while True:
        training = config["training"] | dict(batch=count, amp=amp)
        trainer = train.Trainer(config | dict(training=training), None, False, process)
        x = torch.zeros(count, 3, size, size, device=process.device)
        trainer.advance(x)                                  # the first is slow
        step = seconds_of(lambda: trainer.advance(x), process.device)
        if step > 0.5 or 2 * count > batch:
            break
        count *= 2
    t = torch.zeros(count, dtype=torch.long, device=process.device)
    with torch.no_grad():
        forward = seconds_of(lambda: trainer.network(x, t), process.device)
    return 3 * flops * count / step, flops * count / forward


def work_of(lines, device):
    """The commands of run_all.sh -> for each that is counted a dict: table, done, training (whether it is
    one), model (and begins one), images, passes, bytes, and the key and configuration of its network with its
    largest batch. What a training has done before its target is there is not seen."""
    runs, found = {}, []
    for line in lines:
        table, target, command = line.rstrip("\n").split("\t")
        words = command.split()
        script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
        name, argv = words[script], words[script + 1:]
        if name == "train.py" and "--benchmark" not in argv:
            args = parsed(train.arguments, argv)
            config = configured(args)
            network = json.dumps(config["network"], sort_keys=True)
            flops, weights = arithmetic(network, device)
            there = runs.get(str(args.out), {"steps": 0})       # the same run, by an earlier command
            run = runs[str(args.out)] = dict(config=config, flops=flops, network=network, steps=args.steps,
                                             batch=min(args.microbatch or args.batch, args.batch))
            own = dict(training=True, model=there["steps"] == 0, images=0,
                       passes=training_passes(args, args.steps - there["steps"]),
                       bytes=2 * 4 * OPTIMISER * weights if there["steps"] == 0 else 0)
        elif name in ("sample.py", "attack.py"):
            args = parsed((attack if name == "attack.py" else sample).arguments, argv)
            run = runs[str(args.run)]
            config = run["config"]
            passes = sampling_passes(args, config["process"]["timesteps"],
                                     getattr(args, "steps_attacked", None))
            own = dict(training=False, model=False, images=args.num_samples, passes=passes,
                       bytes=3 * args.num_samples * config["network"]["size"]**2)
        else:
            continue
        found.append(run | own | dict(table=table, done=os.path.exists(target),
                                      key=(run["network"], args.amp)))
    return found


def main(argv=None):
    """Prints the plan of the commands on stdin."""
    parser = parser_of(__doc__)
    parser.add_argument("--devices", type=int, default=1, help="GPUs, or lanes of CPU cores, that work side "
                        "by side (default 1)")
    args = parser.parse_args(argv)
    check_ranges(args, devices=(1, 10**6))
    if sys.stdin.isatty():
        raise UserError("stdin: is a terminal, and run_all.sh's commands are needed: bash run_all.sh plan")
    process, speed = start_processes(join=False), {}
    work = work_of(sys.stdin, process.device)
    for each in work:
        if not each["done"] and each["key"] not in speed:
            network, amp = each["config"]["network"], each["key"][1]
            speed[each["key"]] = speeds(each["config"], each["flops"], each["batch"], amp, process)
            print(f"measured: {network['size']}x{network['size']}, {network['channels']} channels, "
                  f"{'bfloat16' if amp else 'float32'}, {each['flops'] / 1e9:.3g} GFLOP an image: "
                  + " and ".join(f"{one / 1e9:,.0f} GFLOP/s {what}" for one, what in zip(speed[each["key"]], (
                          "in training", "in sampling"))), flush=True)
    print(f"\n{'table':13}{'models':>8}{'done':>6}{'images':>13}{'passes (millions)':>19}{'hours':>15}"
          f"{'disk (GB)':>11}")
    total = [0, 0, 0, 0.0, 0.0, 0.0]
    for table in dict.fromkeys(each["table"] for each in work):
        own = [each for each in work if each["table"] == table]
        left = [each for each in own if not each["done"]]
        hours = sum(each["passes"] * each["flops"] / speed[each["key"]][0 if each["training"] else 1]
                    for each in left) / 3600 / args.devices
        row = [sum(each["model"] for each in left), sum(each["model"] and each["done"] for each in own),
               sum(each["images"] for each in left), sum(each["passes"] for each in left) / 1e6, hours,
               sum(each["bytes"] for each in left) / 1e9]
        total = [a + b for a, b in zip(total, row)]
        print(line_of(table, row))
    print(line_of("all", total))
    print(f"\nHours on {args.devices} {process.device.type} device(s) of this machine, if nothing else "
          "runs there, now or then; a table's are without what\nan earlier one makes. A training that has "
          "begun is counted whole. Not counted: data sets, scores, sample grids,\ntoy3d.py, and the few "
          "seconds in which a command starts.")


def line_of(name, row):
    """A row of the table as text."""
    models, done, images, passes, hours, gigabytes = row
    return f"{name:13}{models:8}{done:6}{images:13,}{passes:19,.1f}{hours:15,.2f}{gigabytes:11,.2f}"


if __name__ == "__main__":
    command_line(main)
