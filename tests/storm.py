"""A kill storm: every stage is killed by SIGKILL at random times and started again, and must lose nothing.

    python tests/storm.py                               # 100 kills in all: about 15 minutes on two idle cores
    python tests/storm.py --kills 30 --seed 1 --out /tmp/storm

Each stage runs once undisturbed. Then the same command runs into another folder, where each start is killed
at a random moment, three of four after the imports; of two processes the kill hits torchrun, one rank, or
all. Half of the next starts come at once, while processes of the killed one may still live. A start must go
on, or refuse with one line while those live; what is finished must equal the undisturbed run bit by bit, and
no other file may be left. A run that is finished before it is killed begins again from an empty folder.

A line a stage: kills; finished runs, each compared; starts refused while others lived; failures (a status,
traceback or refusal that should not be, a start without an end, processes that stay); values that differ or
are missing; files left over; how long a killed start's processes lived on at most. Exit status 1 if anything
failed, differs or is left over: OUT/lost/ then holds each such folder. Not collected by pytest.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

KIT = Path(__file__).resolve().parents[1]
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
TRAIN = ("train.py --size 8 --channels 32 --res-blocks 1 --mult 1 --attn 8 --schedule cosine --timesteps 4 "
         "--batch 8 --steps 20 --save-every 2 --sample-every 4 --p 0.9 --sigma 0.2 "
         "--data-dir {undisturbed}/data")
SAMPLE = "sample.py {undisturbed}/train --num-samples 48 --batch 2"
ATTACK = "attack.py {undisturbed}/train --num-samples 16 --batch 2 --steps-attacked 50%"
# name: the command without --out, the processes, what --out names inside the stage's folder; each reads what
# the undisturbed runs before it made
STAGES = {
    "data": ("data.py shapes --size 8 --num-samples 4000 --workers 2", 1, ""),
    "data-folder": ("data.py mine --src {undisturbed}/images --size 8 --workers 2", 1, ""),
    "data-subspace": ("data.py subspace --size 8 --num-samples 20000 --components 5 --workers 2", 1, ""),
    "train": (TRAIN, 1, ""),
    "train-two": (TRAIN, 2, ""),
    "train-init": (TRAIN + " --seed 1 --init {undisturbed}/train/checkpoint.pt", 1, ""),
    "train-share": (TRAIN + " --reg-share 0.25", 1, ""),
    "sample": (SAMPLE, 1, "samples.npz"),
    "sample-two": (SAMPLE, 2, "samples.npz"),
    "attack": (ATTACK, 1, "attacked.npz"),
    "attack-two": (ATTACK, 2, "attacked.npz"),
}
COLUMNS = "kills", "finished", "refusals", "failures", "differences", "leftovers"
REFUSAL = re.compile(r"^\w+\.py: error: .+$", re.MULTILINE)


# -------------------------------------------------------------------------------------------------- processes

class Process(NamedTuple):
    """A line of ps."""
    pid: int
    parent: int
    command: str


def processes():
    """All processes in order of pid, but for those that have ended and were not waited for."""
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,command="], capture_output=True,
                             text=True, errors="replace", check=True).stdout
    fields = [line.split(None, 3) for line in listing.splitlines() if len(line.split(None, 3)) == 4]
    return sorted(Process(int(pid), int(parent), command) for pid, parent, state, command in fields
                  if not state.startswith("Z"))


def family(pid):
    """A process and all that it started, the first first."""
    everyone = processes()
    found = [process for process in everyone if process.pid == pid]
    for process in found:                                   # grows while it is walked through
        found += [child for child in everyone if child.parent == process.pid]
    return found


def kill(found):
    """SIGKILL to all of these that are still there."""
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def start(command, count, *more):
    """Starts a stage's command with more flags. -> Popen, the file that gets its stderr."""
    script, *flags = command.split()
    command = [sys.executable, *(TORCHRUN if count == 2 else ()), str(KIT / script), *flags, *map(str, more)]
    errors = tempfile.TemporaryFile("w+")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors,
                            env=os.environ | dict(OMP_NUM_THREADS="1")), errors


def seconds_of(*arguments):
    """Runs what `start` takes, undisturbed. -> its seconds."""
    began = time.monotonic()
    process, errors = start(*arguments)
    if process.wait():
        errors.seek(0)
        sys.exit(f"fails without a kill: {' '.join(process.args)}\n{errors.read()}")
    return time.monotonic() - began


# ------------------------------------------------------------------------------------------------- comparison

def leaves(value, name=""):
    """The plain values and tensors inside of dicts and lists, each with its path."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}.{key}")
    else:
        yield name, (value.dtype, value.shape, value.numpy().tobytes()) if torch.is_tensor(value) else value


def parts_of(path):
    """What a file holds, {part: value}, without what differs from run to run: times, and a log's starts."""
    if path.is_dir():
        return {}
    if path.suffix == ".pt":
        return dict(leaves(torch.load(path, map_location="cpu", weights_only=True)))
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    if path.name.endswith(".attack.json"):
        return json.loads(path.read_text()) | dict(seconds_per_image=None)
    if path.name == "log.jsonl":
        parts = {}
        for line in map(json.loads, path.read_text().splitlines()):
            kind = line.get("event", "step")
            if kind != "start":                             # a step that is there twice has two values
                parts.setdefault(f"{kind} {line['step']}", []).append(line | dict(images_per_s=None))
        return parts
    return {"bytes": path.read_bytes()}


def contents(folder):
    """What is in a folder, {(name, part of the file): value}; a file that cannot be read has its error."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name, ""] = "is there"
        try:
            found |= {(name, part): value for part, value in parts_of(path).items()}
        except Exception as error:                          # whatever a half-written file leads to
            found[name, ""] = repr(error)
    return found


# -------------------------------------------------------------------------------------------------- the storm

class Storm:
    """The kills of one stage: its row of the table, and what happened since its folder was last empty."""

    def __init__(self, name, command, count, file, folder, rng):
        self.name, self.command, self.count, self.rng = name, command, count, rng
        undisturbed, self.out = folder / "undisturbed" / name, folder / "storm" / name
        self.evidence, self.file = folder / "lost" / name, self.out / file
        self.imports = seconds_of(command, count, "--help")
        self.whole = seconds_of(command, count, "--out", undisturbed / file)
        self.expected, self.row, self.longest = contents(undisturbed), dict.fromkeys(COLUMNS, 0), 0.0
        self.begin_again()

    def begin_again(self):
        """The next start finds no folder."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.story, self.started = [], set()

    def lost(self, text, **counts):
        """Counts what should not be, shows how it came about and keeps the folder."""
        self.row |= {column: self.row[column] + count for column, count in counts.items()}
        print(f"{self.name}: {text}\n    after: {'; '.join(self.story) or 'nothing'}", flush=True)
        if self.out.exists():
            print("    kept:", shutil.copytree(self.out, f"{self.evidence}-{time.time():.0f}"), flush=True)
        self.begin_again()

    def living(self):
        """The processes of the starts so far that still live."""
        return [p for p in processes() if str(self.out) in p.command or (p.pid, p.command) in self.started]

    def await_end(self):
        """Waits until killed starts' processes have ended by themselves."""
        began = time.monotonic()
        while left := self.living():
            if time.monotonic() - began > 2 * self.whole + 15:
                kill(left)
                self.lost(f"these stay: {'; '.join(p.command for p in left)}", failures=1)
            time.sleep(0.1)
        self.longest = max(self.longest, time.monotonic() - began)

    def hit(self, process, after):
        """Kills a running start, or a part of it."""
        everyone = family(process.pid)
        targets = {"it alone": everyone[:1], "all": everyone}
        if self.count == 2:
            ranks = [p for p in everyone if p.parent == process.pid and str(KIT) in p.command]
            targets |= {f"rank {rank}": [p] for rank, p in enumerate(ranks)}
        name = self.rng.choice(sorted(targets))
        kill(targets[name])
        self.started.update((p.pid, p.command) for p in everyone)
        self.story.append(f"{name} killed after {after:.2f} s")
        self.row["kills"] += bool(targets[name])            # it may have ended in this moment

    def once(self, killing):
        """One start. -> whether a run has come to its end, good or bad."""
        if self.rng.random() < 0.5:
            self.await_end()
        others = self.living()
        began = time.monotonic()
        process, errors = start(self.command, self.count, "--out", self.file)
        after = self.rng.uniform(self.imports if self.rng.random() < 0.75 else 0, self.whole)
        try:
            status = process.wait(after if killing else 10 * self.whole + 60)
        except subprocess.TimeoutExpired:
            if killing:
                self.hit(process, after)
            else:
                kill(family(process.pid))
                self.lost("a start without an end", failures=1)
            return not killing
        seconds = time.monotonic() - began
        self.await_end()                                    # what others write is part of what is compared
        errors.seek(0)
        errors = errors.read()
        refusals = REFUSAL.findall(errors)
        # torchrun's own traceback only says that a rank failed
        tracebacks = errors.count("Traceback (most recent") - errors.count("ChildFailedError:")
        if others and not tracebacks and len(refusals) == 1 and status == (1 if self.count == 2 else 2):
            self.row["refusals"] += 1
            self.story.append(f"refused: {refusals[0]}")
            return False
        if status or tracebacks:
            self.lost(f"status {status}{', while others lived' if others else ''}\n{errors}", failures=1)
            return True
        self.row["finished"] += 1
        if not self.story:                                  # undisturbed, too, beside whatever else runs now
            self.whole = seconds
        found = contents(self.out)
        differ = [key for key, value in self.expected.items() if key not in found or found[key] != value]
        left = sorted(found.keys() - self.expected.keys())
        if differ or left:
            self.lost(f"differ or are missing: {differ[:10]}; left over: {left[:10]}",
                      differences=len(differ), leftovers=len(left))
        self.begin_again()
        return True

    def run(self, kills):
        """Kills that many starts, and lets the last run come to its end."""
        while self.row["kills"] < kills:
            self.once(killing=True)
        while not self.once(killing=False):
            pass


def main():
    """All stages, undisturbed and then in the storm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared by the stages (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' times and targets (default 0)")
    parser.add_argument("--out", type=Path, help="a new folder (default: a temporary one, removed if all is "
                        "well)")
    args = parser.parse_args()
    folder = (args.out or Path(tempfile.mkdtemp(prefix="storm-")) / "storm").resolve()
    images, total = folder / "undisturbed" / "images", dict.fromkeys(COLUMNS, 0)
    images.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (500, 24, 32, 3), np.uint8)):
        Image.fromarray(pixels).save(images / f"{i:03}.png")
    print(f"{'stage':14}{'seconds':>9}" + "".join(f"{name:>12}" for name in (*COLUMNS, "lived on")))
    for name, (command, count, file) in STAGES.items():
        command = command.replace("{undisturbed}", str(folder / "undisturbed"))
        storm = Storm(name, command, count, file, folder, random.Random(f"{args.seed} {name}"))
        storm.run(math.ceil(args.kills / len(STAGES)))
        print(f"{name:14}{storm.whole:9.1f}" + "".join(f"{value:12}" for value in storm.row.values())
              + f"{storm.longest:12.1f}", flush=True)
        total = {column: total[column] + value for column, value in storm.row.items()}
    print(f"{'all':23}" + "".join(f"{value:12}" for value in total.values()))
    if total["failures"] + total["differences"] + total["leftovers"]:
        sys.exit(f"something was lost: see {folder}")
    if not args.out:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
