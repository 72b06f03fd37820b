"""train.py as a stage: command line, run folder, resume, processes, signals, checkpoints. Its method:
test_core.py."""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
import unet
from checkpoints import FIRST, load_checkpoint, load_model, save_checkpoint
from common import UserError, command_line, locked
from conftest import HERE, TINY
from data import Images

DDPM = "--method", "ddpm"                                   # where the method does not matter: the cheapest
LIKE_ONE = dict(paper=[], share=["--reg-share", 0.5])       # that processes and microbatches must not change


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Four images instead of 36 in a grid: seconds saved. Training takes the signals; they are given back."""
    monkeypatch.setattr(train, "GRID", 4)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(shapes, out, *more):
    """The flags of a tiny training on corrupted shapes: one level, and eight timesteps, so that a grid takes
    eight passes."""
    network = *TINY, "--mult", 1, "--attn", 8, "--schedule", "cosine", "--timesteps", 8
    data = "--data-dir", shapes, "--p", 0.9, "--sigma", 0.2
    return [str(part) for part in (*network, *data, "--out", out, *more)]


def like_one(shapes, out, name):
    """The flags of a run of LIKE_ONE."""
    return flags(shapes, out, "--steps", 3, "--lr", 1e-4, "--batch", 4, *LIKE_ONE[name])


def two_process_jobs(folder, shapes):
    """The runs of LIKE_ONE with two processes; two machines without a common folder; and what they must not
    do."""
    jobs = [(f"train-{name}", "train", like_one(shapes, folder / f"train-{name}", name)) for name in LIKE_ONE]
    apart = like_one(shapes, folder / "machine-{rank}", "paper")
    torch.save(unet.UNet(8, 32, 1, (1,), (8,), 2).state_dict(), folder / "init-0.pt")     # no init-1.pt
    (folder / "swapped-1").mkdir()
    (folder / "swapped-1" / "checkpoint.pt").touch()
    return [*jobs, ("stopped", "train", [*apart, "--steps", "2"]), ("resumed", "train", apart),
            ("init", "train", [*like_one(shapes, folder / "init", "paper"), "--init",
                               folder / "init-{rank}.pt"]),
            ("benchmark", "train", [*like_one(shapes, folder / "benchmark", "paper"), "--benchmark"]),
            ("swapped", "train", flags(shapes, folder / "swapped-{rank}", "--steps", 2)),
            ("seeds", "train", flags(shapes, folder / "disagree", "--steps", 2, "--seed", "{rank}")),
            ("lengths", "train", flags(shapes, folder / "disagree", "--steps", "2{rank}"))]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A finished adversarial training of four steps, uninterrupted."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "GRID", 4)
        train.main(flags(shapes, out, "--steps", 4, "--save-every", 2))
    return out


def tensors(out):
    """All tensors of a run's checkpoint as one dict: weights, EMA, optimiser."""
    c = load_checkpoint(out)
    moments = {f"{k}.{name}": v for k, state in c["optimizer"]["state"].items() for name, v in state.items()}
    weights = {f"{kind}.{name}": v for kind in ("model", "ema") for name, v in c[kind].items()}
    return weights | moments


def assert_same(found, expected):
    """Bit for bit."""
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def difference(found, expected, kind):
    """||found - expected|| / ||expected|| over all tensors whose name has `kind` in it."""
    a, b = (torch.cat([v.detach().double().flatten() for k, v in sorted(d.items()) if kind in k])
            for d in (found, expected))
    return float((a - b).norm() / b.norm())


def log_of(out):
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out):
    """The lines of log.jsonl that are steps."""
    return [line for line in log_of(out) if "event" not in line]


# -------------------------------------------------------------------------------------------- stop and resume

def test_a_killed_run_goes_on_bit_for_bit(shapes, tmp_path):
    """kill -9, then the same command: catches any state that a checkpoint forgets (EMA, its warm-up, AdamW's
    moments, the place in the epoch, the streams), and a log with a step twice."""
    out = tmp_path / "killed"
    command = [sys.executable, HERE / "train.py", *flags(shapes, out, "--steps", 10**6, "--save-every", 2)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.wait()
    steps = load_checkpoint(out)["step"] + 2
    train.main(flags(shapes, out, "--steps", steps, "--save-every", 2))
    train.main(flags(shapes, tmp_path / "whole", "--steps", steps, "--save-every", 2))
    assert_same(tensors(out), tensors(tmp_path / "whole"))
    assert [line["step"] for line in losses_of(out)] == list(range(1, steps + 1))
    assert (out / f"samples-{steps:08d}.png").exists()


def test_a_signal_saves_and_leaves(shapes, trained, tmp_path, monkeypatch, capsys):
    """SIGUSR1 in step 1, SIGTERM in 2, Ctrl-C in 3: that step is finished, saved and named, and the same
    command goes on, to the bit. Catches lines of the log that lie behind the checkpoint and are kept at the
    resume."""
    advance, argv = train.Trainer.advance, flags(shapes, tmp_path / "run", "--steps", 4, "--save-every", 100)
    for step, number in ((1, signal.SIGUSR1), (2, signal.SIGTERM), (3, signal.SIGINT)):

        def interrupted(self, *batch):
            if self.step == step - 1:
                os.kill(os.getpid(), number)
            return advance(self, *batch)

        monkeypatch.setattr(train.Trainer, "advance", interrupted)
        with pytest.raises(SystemExit) as leaving:
            train.main(argv)
        assert leaving.value.code == 128 + number and f"after step {step}: saved" in capsys.readouterr().out
        assert load_checkpoint(tmp_path / "run")["step"] == step
        with open(tmp_path / "run" / "log.jsonl", "a") as log:      # as if a kill had come some steps later
            log.write(json.dumps({"step": step + 1, "ddpm": 1e9}) + "\n" + '{"step": 1, "dd')    # half a line
    monkeypatch.setattr(train.Trainer, "advance", advance)
    train.main(argv)
    assert_same(tensors(tmp_path / "run"), tensors(trained))
    found, expected = (([line["step"], line["ddpm"], line["reg"]] for line in losses_of(out))
                       for out in (tmp_path / "run", trained))
    assert list(found) == list(expected) and len(losses_of(trained)) == 4


def test_a_killed_run_gets_the_grids_that_it_lacks(shapes, trained, tmp_path, monkeypatch, capsys):
    """Killed between a checkpoint, the line of its grid and the picture, which run_all.sh takes for the end:
    the same command draws it. Catches a grid or line that is lost or there twice, a picture before its
    checkpoint, a run that can never be finished, and what it was writing when it was killed left for ever."""
    run, record, grid = tmp_path / "run", train.Log.record, train.Trainer.grid
    argv = flags(shapes, run, "--steps", 4, "--save-every", 2, "--sample-every", 2)
    for step in (2, 4):

        def no_line(self, **values):
            if values == dict(step=step, event="grid", file=train.grid_name(step)):
                raise KeyboardInterrupt
            record(self, **values)

        def no_picture(self):
            if self.step == step:
                raise KeyboardInterrupt
            return grid(self)

        for thing, name, killed in ((train.Log, "record", no_line), (train.Trainer, "grid", no_picture)):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(thing, name, killed)
                train.main(argv)
            assert load_checkpoint(run)["step"] == step and not (run / train.grid_name(step)).exists()
    (run / ".partial-checkpoint-previous.pt").write_bytes(b"half")
    train.main(argv)
    assert not list(run.glob(".partial*"))
    assert "all else was there" in capsys.readouterr().out
    assert (run / train.grid_name(2)).exists()
    assert (run / train.grid_name(4)).read_bytes() == (trained / train.grid_name(4)).read_bytes()
    lines = [(line["step"], line.get("event")) for line in log_of(run) if line.get("event") != "start"]
    assert lines == [(1, None), (2, None), (2, "grid"), (3, None), (4, None), (4, "grid")]
    assert_same(tensors(run), tensors(trained))


def test_other_images_under_the_same_name_are_refused(shapes, trained, tmp_path):
    """Same name, size and count, other content: catches a run that goes on with them."""
    checkpoint = load_checkpoint(trained)
    checkpoint["config"]["data"]["sha256"] = "another"
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", checkpoint)
    with pytest.raises(UserError, match="sha256 was another and is now"):
        train.main(flags(shapes, tmp_path / "run", "--steps", 6))


def test_a_second_start_on_the_same_folder_is_refused(shapes, tmp_path):
    """At once, and without a trace: catches two trainings that write the same checkpoint."""
    with locked(tmp_path / "run" / ".lock", "never said"):
        with pytest.raises(UserError, match="run: another process is training there"):
            train.main(flags(shapes, tmp_path / "run", "--steps", 2))
    assert not (tmp_path / "run").exists()
    train.main(flags(shapes, tmp_path / "run", "--steps", 1))
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_disk_without_links_and_one_that_is_full(trained, tmp_path, monkeypatch):
    """Catches a training that dies at its second save where there are no hard links, and a full disk's
    traceback."""
    def no_links(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2):
        save_checkpoint(tmp_path / "c.pt", load_checkpoint(trained) | dict(step=step))
    assert [load_checkpoint(tmp_path / name)["step"] for name in ("c.pt", "c-previous.pt")] == [2, 1]

    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*c.pt: is the disk full"):
        save_checkpoint(tmp_path / "c.pt", {})
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_finished_run_is_left_alone(shapes, trained, capsys):
    """The same command once more trains nothing and writes nothing."""
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    train.main(flags(shapes, trained, "--steps", 4, "--save-every", 2))
    assert "is at step 4 already: nothing to do" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before


def test_a_loss_that_is_not_finite_stops_the_run(shapes, trained, tmp_path, monkeypatch):
    """The step is named, and the last good checkpoint stays: catches NaN weights saved over it."""
    argv, real = flags(shapes, tmp_path / "run", "--save-every", 1, *DDPM), train.training_loss
    train.main([*argv, "--steps", "2"])
    good = tensors(tmp_path / "run")

    def broken(*args, **settings):
        return {name: term / (term - term) for name, term in real(*args, **settings).items()}

    monkeypatch.setattr(train, "training_loss", broken)
    expected = "the loss or the weights of step 3 are not finite; the last good checkpoint is .*checkpoint.pt"
    with pytest.raises(UserError, match=expected):
        train.main([*argv, "--steps", "4"])
    assert_same(tensors(tmp_path / "run"), good)
    with pytest.raises(UserError, match="the loss or the weights of step 1 are not finite; none was saved"):
        train.main(flags(shapes, tmp_path / "fresh", "--save-every", 1))
    assert not (tmp_path / "fresh" / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(shapes, tmp_path):
    """Catches an update that breaks the weights after a finite loss, and takes a good checkpoint's place."""
    argv = flags(shapes, tmp_path / "run", "--save-every", 1, "--lr", "1e39", *DDPM)
    with pytest.raises(UserError, match="the loss or the weights of step 1 are not finite; none was saved"):
        train.main([*argv, "--steps", "2"])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# --------------------------------------------------------------------------------- processes and microbatches

@pytest.mark.parametrize("name", list(LIKE_ONE))
def test_two_processes_and_microbatches_train_alike(name, shapes, tmp_path, two_processes):
    """The model of one process, of two and of microbatches of 3, up to rounding. Catches rows trained twice
    or never, a gradient averaged where it should be summed, dependence of the draws on the rank, a part
    without its share, and a sample grid put together wrongly."""
    folder, results = two_processes
    assert results[f"train-{name}"] == ["ok", "ok"]
    argv = like_one(shapes, tmp_path / "one", name)
    train.main(argv)
    train.main([*argv, "--microbatch", "3", "--out", str(tmp_path / "micro")])
    one = tensors(tmp_path / "one")
    for other in (folder / f"train-{name}", tmp_path / "micro"):
        assert difference(tensors(other), one, "model.") < 1e-4, other
        assert difference(tensors(other), one, "exp_avg") < 1e-2, other     # AdamW's moments: the gradients
        for found, expected in zip(losses_of(other), losses_of(tmp_path / "one"), strict=True):
            assert found["step"] == expected["step"]
            assert found["ddpm"] == pytest.approx(expected["ddpm"], rel=1e-4)
            assert found["reg"] == pytest.approx(expected["reg"], rel=1e-2)     # a sign of almost 0 can flip
    log = log_of(folder / f"train-{name}")                  # written by one of the two
    assert log[0]["world"] == 2 and [line.get("event") for line in log] == ["start", None, None, None, "grid"]
    pictures = [np.asarray(Image.open(out / train.grid_name(3)), int) for out in (folder / f"train-{name}",
                                                                                  tmp_path / "one")]
    assert pictures[0].shape == pictures[1].shape == (18, 18, 3)            # of four images
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.parametrize("rank, world, drawn", [(0, 1, [0, 1, 2, 3]), (1, 3, [1]), (5, 6, [1])])
def test_a_process_draws_its_share_of_a_grid(rank, world, drawn, trained, monkeypatch):
    """Catches one that draws all of it while the others wait, until their time is out, and one of so many
    that there is no image for it, which must not fail."""
    asked, real = [], train.image_noise

    def noise(purpose, seed, indices, *more):
        asked.extend(indices)
        return real(purpose, seed, indices, *more)
    monkeypatch.setattr(train, "image_noise", noise)
    # The first of three has two images.
    monkeypatch.setattr(train, "gather", lambda share: [share.repeat(2 if world == 3 else 1, 0)] * world)
    process = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
    trainer = train.Trainer(load_checkpoint(trained)["config"], None, False, process)
    assert trainer.grid().shape == (4, 8, 8, 3) and asked == drawn


def test_the_losses_are_not_part_of_the_gradients(monkeypatch):
    """One sum over the processes, of gradients and losses. Catches losses that are views of it: a run that
    holds one holds an array as large as all gradients."""
    parameter = torch.zeros(3, 2)
    parameter.grad = torch.arange(6.0).view(3, 2)
    monkeypatch.setattr(train.dist, "all_reduce", lambda flat: flat.mul_(2))
    losses = train.Trainer.sum_over_processes(
        SimpleNamespace(parameters=[parameter]), dict(ddpm=torch.tensor(7.0), reg=torch.tensor(8.0)))
    assert losses == dict(ddpm=14, reg=16)
    assert torch.equal(parameter.grad, 2 * torch.arange(6.0).view(3, 2))
    assert [loss.untyped_storage().nbytes() for loss in losses.values()] == [4, 4]


def test_processes_with_different_commands_stop(two_processes):
    """Two seeds would train a model that is nobody's, and of two lengths one leaves the other waiting:
    catches an agreement that is never checked."""
    folder, results = two_processes
    for said in results["seeds"] + results["lengths"]:
        assert said.startswith("the processes were given different settings or data")
    assert not (folder / "disagree").exists()


def test_machines_without_a_common_folder_go_on_as_one(two_processes):
    """The first process alone reads and writes: after a stop both go on from its step, with its weights, EMA
    and optimiser, bit for bit as one uninterrupted run. Catches a process that starts anew, or from a file of
    its own."""
    folder, results = two_processes
    assert results["stopped"] == results["resumed"] == ["ok", "ok"]
    assert_same(tensors(folder / "machine-0"), tensors(folder / "train-paper"))
    assert not (folder / "machine-1").exists()
    assert results["init"] == ["ok", "ok"]                  # read by the first, for both
    for said in results["swapped"]:
        assert "process 1 finds a checkpoint there and process 0 does not" in said


def test_benchmark_of_two_processes(two_processes):
    """All take as many steps of a method: catches each deciding by its own clock, whose sums then meet
    another's."""
    folder, results = two_processes
    assert results["benchmark"] == ["ok", "ok"]
    assert json.loads((folder / "benchmark" / "benchmark.json").read_text())["world"] == 2


def test_slurm_tasks_that_do_not_know_of_each_other_stop(shapes, tmp_path, monkeypatch):
    """srun with two tasks and no launcher: catches each of them believing that it is alone."""
    for name, value in dict(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="this is task 0 of several that srun has started"):
        train.main(flags(shapes, tmp_path / "run", "--steps", 2))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- what it is

# What Eq. 7, Eq. 6 and lambda_t give for the new network, whose output is 0: |delta|^2 for a random delta,
# and, as its gradient is 0 too, for an adversarial one; 0 for the invariance of Eq. 14.
@pytest.mark.parametrize("method, lam, units, omega, gamma", [
    ("ran", 0.3, "x", 2.0, 8 / 255), ("adv", 1.0, "eps", 3.0, 0.1), ("inv", 0.3, "x", 2.0, 8 / 255)])
def test_flags_reach_the_first_loss(method, lam, units, omega, gamma, shapes, tmp_path):
    """By hand: catches a setting that is recorded but not used, losses logged of another step, or as sums or
    twice."""
    out, given = tmp_path / "run", ("--lam", lam, "--lam-units", units, "--omega", omega, "--gamma", gamma)
    train.main(flags(shapes, out, "--steps", 1, "--method", method, "--seed", 3, *given))
    t, beta, eps, u, _ = (part.double().numpy() for part in train.draw(3, 0, 8, (3, 8, 8), 8, "cpu"))
    alpha_bar = np.cos((np.arange(9) / 8 + 0.008) / 1.008 * np.pi / 2) ** 2     # Nichol & Dhariwal's cosine
    s = np.sqrt(1 - alpha_bar[1:] / alpha_bar[0])[t.astype(int)]
    r = (s**omega + gamma * beta) / s                                                               # Eq. 7
    lambda_t = lam * math.sqrt(3) / (beta * (s * r if units == "x" else r))
    delta = r[:, None, None, None] * u
    reg = 0 if method == "inv" else (lambda_t * (delta**2).mean(axis=(1, 2, 3))).mean()             # Eq. 6
    line, = losses_of(out)
    assert line["step"] == 1 and line["images_per_s"] > 0
    assert (line["ddpm"], line["reg"]) == pytest.approx(((eps**2).mean(), reg), rel=1e-5)           # Eq. 3


def test_ambient_trains_on_what_it_is_told(shapes, tmp_path, capsys):
    """Catches flags that never reach the loss: told of more noise than any timestep has, nothing is
    learnt."""
    common = "--method", "ambient", "--steps", 1
    train.main(flags(shapes, tmp_path / "a", *common, "--flags", "conf2", "--sigma-known", 1e6))
    assert "100.0 % of the images taken for noisy (conf2)" in capsys.readouterr().out
    train.main(flags(shapes, tmp_path / "b", *common))
    assert losses_of(tmp_path / "a")[0]["ddpm"] == 0 and losses_of(tmp_path / "b")[0]["ddpm"] > 0.01
    assert log_of(tmp_path / "b")[0]["config"]["training"]["sigma_known"] == 0.2        # --sigma's


def test_amp_reaches_the_network(shapes, trained, tmp_path):
    """Catches --amp that is recorded and ignored: the same steps, but for bfloat16's three digits."""
    train.main(flags(shapes, tmp_path / "amp", "--steps", 4, "--amp"))
    found, expected = losses_of(tmp_path / "amp")[3]["ddpm"], losses_of(trained)[3]["ddpm"]
    assert found != expected and found == pytest.approx(expected, rel=0.05)
    assert tensors(tmp_path / "amp")["model.out.2.weight"].dtype == torch.float32       # the weights stay


def test_a_grid_leaves_the_training_alone(shapes, tmp_path):
    """Catches dropout that stays off after a grid, and a grid that takes random numbers from the training."""
    for name, every in (("without", 0), ("with", 1)):
        more = "--dropout", 0.5, "--sample-every", every
        train.main(flags(shapes, tmp_path / name, "--steps", 3, *more, *DDPM))
    assert_same(tensors(tmp_path / "with"), tensors(tmp_path / "without"))
    train.main(flags(shapes, tmp_path / "none", "--steps", 3, *DDPM))           # or the above says nothing
    assert difference(tensors(tmp_path / "none"), tensors(tmp_path / "with"), "model.") > 1e-4


def test_a_grid_shows_the_average(shapes, tmp_path):
    """Pixel by pixel sample.py's picture of the EMA weights, seed 0. Catches a grid of the raw weights, of
    other steps."""
    out, pictures = tmp_path / "run", {}
    train.main(flags(shapes, out, "--steps", 3, "--lr", 0.01, *DDPM))
    for name, more in (("ema", []), ("raw", ["--raw"])):
        sample.main([str(out), "--num-samples", "4", "--batch", "4", "--sampler", "ddim", "--out",
                     str(tmp_path / f"{name}.npz"), *more])
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png"), int)
    grid = np.asarray(Image.open(out / "samples-00000003.png"), int)
    assert np.abs(grid - pictures["ema"]).max() <= 1                # a level: float32 rounding at a boundary
    assert np.abs(grid - pictures["raw"]).max() > 20


def test_the_average_keeps_no_history(trained):
    """Catches an average that autograd records: its graph grows with every step, 100 GB by the paper's last
    one."""
    assert not any(tensor.requires_grad for tensor in tensors(trained).values())


def test_log_and_run_folder(shapes, trained, tmp_path):
    """log.jsonl begins with all that made the run and lists every grid, in order; the checkpoint before the
    last is kept."""
    start, *rest = log_of(trained)
    checkpoint = load_checkpoint(trained)
    assert start["event"] == "start" and start["step"] == 0
    assert start["config"] == json.loads(json.dumps(checkpoint["config"]))
    assert start["config"]["process"] == dict(schedule="cosine", timesteps=8)
    pixels = np.load(shapes / "shapes-8.npy").tobytes()
    assert start["config"]["data"] == dict(
        name="shapes", size=8, count=64, sha256=hashlib.sha256(pixels).hexdigest(), p=0.9, sigma=0.2,
        corruption="gaussian", data_seed=0, low=-1.0, high=1.0, float_data=False)
    training = start["config"]["training"]
    assert (training["method"], training["batch"], training["lr"], training["init"]) == ("adv", 8, 1e-3, None)
    cuda = torch.cuda.is_available()
    assert (start["world"], start["device"], start["tf32"]) == (1, "cuda" if cuda else "cpu", cuda)
    assert start["torch"] == torch.__version__
    assert start["code"]["train.py"] == hashlib.sha256((HERE / "train.py").read_bytes()).hexdigest()[:12]
    lines = [(line["step"], line.get("event")) for line in rest]
    assert lines == [(1, None), (2, None), (3, None), (4, None), (4, "grid")]
    assert (checkpoint["step"], load_checkpoint(trained / "checkpoint-previous.pt")["step"]) == (4, 2)
    assert sorted(file.name for file in trained.iterdir()) == [
        "checkpoint-previous.pt", "checkpoint.pt", "log.jsonl", "samples-00000004.png", "training-images.png"]
    with Image.open(trained / "training-images.png") as opened:     # its corner: the first image, corrupted
        corner = np.asarray(opened)[:8, :8].transpose(2, 0, 1)
    seen = Images("shapes", 8, shapes, 0.9, 0.2).read([0])[0]       # whose truth tests/test_data.py knows
    assert np.abs(corner - np.clip(127.5 * (seen + 1), 0, 255)).max() <= 0.5 + 1e-4
    assert np.abs(corner - np.load(shapes / "shapes-8.npy")[0].astype(float)).mean() > 5
    train.main(flags(shapes, tmp_path / "run", "--steps", 3, "--sample-every", 2, *DDPM))
    grids = [(line["step"], line["file"]) for line in log_of(tmp_path / "run") if line.get("event") == "grid"]
    assert grids == [(2, "samples-00000002.png"), (3, "samples-00000003.png")]
    assert all((tmp_path / "run" / file).exists() for _, file in grids)


def test_benchmark_measures_and_trains_nothing(shapes, trained):
    """benchmark.json beside a run that stays what it was; a step of adv costs more than one of ddpm."""
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    train.main(flags(shapes, trained, "--benchmark", "--batch", 2))
    found = json.loads((trained / "benchmark.json").read_text())
    (trained / "benchmark.json").unlink()
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before
    assert list(found["methods"]) == ["ddpm", "ran", "adv"]
    assert all(cell["seconds"] > 0 and cell["peak_gib"] > 0 for cell in found["methods"].values())
    ddpm, adv = (found["methods"][method]["seconds"] for method in ("ddpm", "adv"))
    assert adv > ddpm                                       # three times the forwards
    assert (found["batch"], found["device"], found["torch"], found["threads"]) == (
        2, "cuda" if torch.cuda.is_available() else "cpu", torch.__version__, torch.get_num_threads())
    assert found["config"]["process"]["timesteps"] == 8


def test_fine_tuning_starts_from_a_checkpoint(shapes, trained, tmp_path):
    """Ours gives weights, EMA and optimiser, a public file its weights alone; the step starts at 0, the
    learning rate is the command's. Catches either part left behind, and the old learning rate, which would
    move the weights."""
    train.main(flags(shapes, tmp_path / "tuned", "--init", trained, "--steps", 1, "--lr", 1e-9, *DDPM))
    before, after = tensors(trained), tensors(tmp_path / "tuned")
    assert difference(after, before, "model.") < 1e-6 and 0 < difference(after, before, "ema.") < 0.1
    assert int(after["0.step"]) == 5                        # four of the optimiser's steps were kept
    assert load_checkpoint(tmp_path / "tuned")["ema_updates"] == 5
    start = log_of(tmp_path / "tuned")[0]
    assert start["step"] == 0 and start["config"]["training"]["init"] == str(trained)
    torch.save(load_checkpoint(trained)["ema"], tmp_path / "public.pt")
    train.main(flags(shapes, tmp_path / "bare", "--init", tmp_path / "public.pt", "--steps", 1, "--lr", 1e-9,
                     *DDPM))
    bare = tensors(tmp_path / "bare")
    averages = {k.replace("ema.", "model."): v for k, v in before.items() if k.startswith("ema.")}
    assert difference(bare, averages, "model.") < 1e-6 and int(bare["0.step"]) == 1


def test_preconditioned_runs(shapes, trained, tmp_path):
    """From the flag to a file and back: the data set's deviation, on the CPU after a load without memory for
    weights, in a grid, a resume to the bit, sample.py, and a fine-tuning that does not ask for it. Catches
    eps_theta of a preconditioned network read as a plain one's, and a second deviation from other data."""
    fast = flags(shapes, tmp_path / "fast", "--precondition", "--weighting", "edm", "--seed", 1)
    train.main([*fast, "--steps", "1"])
    train.main([*fast, "--steps", "2"])
    train.main([*fast, "--steps", "2", "--out", str(tmp_path / "whole")])
    assert_same(tensors(tmp_path / "fast"), tensors(tmp_path / "whole"))
    pixels = np.load(shapes / "shapes-8.npy") / 127.5 - 1
    model, _, config, _ = load_model(tmp_path / "fast")
    assert config["network"]["sigma_data"] == pytest.approx(pixels.std())
    x, t = torch.randn(8, 3, 8, 8), torch.arange(8)
    plain, schedule = unet.built(config | dict(network=config["network"] | dict(sigma_data=None)))
    plain.load_state_dict(model.state_dict())
    a, s, v = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar, pixels.var()
    w = unet.expand((s**2 + a**2 * v).sqrt(), x)
    expected = unet.expand(s, x) / w**2 * x - unet.expand(a, x) * v**0.5 / w * plain((x / w).float(), t)
    torch.testing.assert_close(model(x, t), expected.float(), rtol=1e-3, atol=1e-4)
    sample.main([str(tmp_path / "fast"), "--sampler", "heun", "--steps", "4", "--num-samples", "2", "--out",
                 str(tmp_path / "s.npz")])
    more = flags(shapes, tmp_path / "tuned", "--init", tmp_path / "fast", "--steps", 1, *DDPM)
    train.main(more)
    facts = json.loads((shapes / "shapes-8.json").read_text()) | dict(sigma_data=0.9)      # of other images
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data" / "shapes-8.json").write_text(json.dumps(facts))
    train.main([*more, "--precondition", "--data-dir", str(tmp_path / "data"), "--out",
                str(tmp_path / "asked")])
    assert_same(tensors(tmp_path / "tuned"), tensors(tmp_path / "asked"))
    for name in ("tuned", "asked"):
        assert load_checkpoint(tmp_path / name)["config"]["network"] == config["network"]
    with pytest.raises(UserError, match=r"sigma_data was None and is now 0.45\d* \(see --precondition\)"):
        train.main([*flags(shapes, trained, "--precondition"), "--steps", "5"])


def test_a_data_set_that_was_not_measured(shapes, tmp_path):
    """One of before, whose .json has no sigma_data, does for the paper's training: else a line, not nan."""
    for file in shapes.iterdir():
        shutil.copy(file, tmp_path)
    facts = json.loads((tmp_path / "shapes-8.json").read_text())
    for found in (None, 0.0, "x"):
        (tmp_path / "shapes-8.json").write_text(json.dumps(facts | dict(sigma_data=found)))
        with pytest.raises(UserError, match=f"--data shapes: its .json has sigma_data {found}, .*8.npy, and"):
            train.main(flags(tmp_path, tmp_path / "run", "--steps", 1, "--precondition"))
    train.configuration(train.arguments(flags(tmp_path, "run")), Images("shapes", 8, tmp_path), None, False)


def test_runs_of_before_go_on(shapes, trained, tmp_path):
    """A checkpoint that knows no sigma_data and no corruption goes on, to the bit."""
    old = torch.load(trained / "checkpoint-previous.pt", weights_only=True)
    del old["config"]["network"]["sigma_data"], old["config"]["data"]["corruption"]
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", old)
    train.main(flags(shapes, tmp_path / "run", "--steps", 4, "--save-every", 2))
    assert_same(tensors(tmp_path / "run"), tensors(trained))


def configured(*argv):
    """The configuration of a command line, for 64x64 images."""
    images = SimpleNamespace(size=64, shape=(3, 64, 64), low=-1, high=1, array=np.zeros(1, np.uint8),
                             info=dict(sha256="0"))
    images = type("Some", (), vars(images) | dict(__len__=lambda self: 1))()
    return train.configuration(train.arguments(list(argv)), images, None, False)


@pytest.mark.parametrize("preset", list(unet.PRESETS))
def test_every_preset_reaches_the_network(preset):
    """Catches a preset that the command line cannot build, a value of it lost on the way, a flag that does
    not win."""
    given = dict(size=64, in_channels=3, scale_shift=True, sigma_data=None) | unet.PRESETS[preset]
    given |= dict(learn_sigma=True, dropout=0.25)
    found = configured("--preset", preset, "--learn-sigma", "--dropout", "0.25", "--schedule", "cosine")
    assert found["network"] == given and found["process"] == dict(schedule="cosine", timesteps=1000)


def test_defaults_are_the_papers():
    """METHOD.md's settings where no flag is given; the small ones for the small network."""
    paper = configured("--data", "cifar10", "--p", "0.9", "--sigma", "0.2")
    assert paper["training"] == dict(
        method="adv", lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255, reg_share=1.0,
        weighting="paper", flags=None, sigma_known=None, batch=128, lr=1e-4, ema=0.9999, amp=False, seed=0,
        init=None, streams=train.STREAMS)
    assert paper["process"] == dict(schedule="linear", timesteps=1000)
    assert paper["network"]["channels"] == 128 and paper["network"]["dropout"] == 0.3
    args = train.arguments(["--data", "cifar10", "--method", "ddpm"])
    assert (args.steps, args.out) == (500_000, Path("runs/cifar10-ddpm"))
    small = train.arguments([])
    assert (small.steps, small.batch, small.lr, small.ema) == (2000, 64, 1e-3, 0.995)
    assert small.out == Path("runs/shapes-adv")


# ------------------------------------------------------------------------------------ refusals, damaged files

@pytest.mark.parametrize("argv, expected", [
    ("--batch 65", "--batch 65: shapes has only 64 images"), ("--p 1.5", "--p 1.5: must be from 0 to 1"),
    ("--sigma -1", "--sigma -1"), ("--sigma nan", "--sigma nan"), ("--lr 0", "--lr 0.0: must be positive"),
    ("--steps -5", "--steps -5"), ("--ema 2", "--ema 2"), ("--omega 0.5", "--omega 0.5: must be from 1 to"),
    ("--microbatch 0", "--microbatch 0"), ("--reg-share 0.3", "--reg-share 0.3: must be 1, 0.5"),
    ("--reg-share 0.0625", "--reg-share 0.0625: .*whole images"), ("--channels 33", "--channels 33"),
    ("--mult 1,2,2,2,2", "--size 8"), ("--heads 7", "--heads 7"), ("--mult 0,1", "--mult 0,1: must be"),
    ("--timesteps -5", "--timesteps -5: must be a whole number from 2"),
    ("--attn 5", "--attn 5: the network has 8"), ("--attn 8,8", "--attn 8,8: must be different"),
    ("--mult 1,,2", "--mult: invalid integers value: '1,,2'"), ("--heads 0", "--heads 0: must be a whole"),
    ("--channels 0", "--channels 0: must be a whole"), ("--dropout 1", "--dropout 1.0: .* from 0 to 0.99"),
    ("--size 0", "--size 0: must be a whole"), ("--res-blocks 99", "--res-blocks 99: .* from 1 to 32"),
    ("--steps " + "9" * 400, "--steps 9*: must be from 1"), ("--lr nan", "--lr nan: must be positive"),
    ("--reg-share 1.004", "--reg-share 1.004: must be 1, 0.5"),
    ("--channels 4096 --res-blocks 9", "the network: needs more than .* MiB of memory"),
    ("--preset lsun_bedroom --mult 1,1,2,2,4,4", "--size 8: 6 levels"),
    ("--sigma 0", "--p 0.9 --sigma 0: the one without the other corrupts nothing"),
    ("--corruption outliers", "--sigma 0.2: --corruption outliers has no deviation"),
    ("--corruption outliers --p 0 --sigma 0", "--corruption outliers: --p is needed"),
    ("--corruption impulse --sigma 2", "--sigma 2: is impulse's share of the pixels"),
    ("--corruption blur --sigma 0", "--p 0.9 --sigma 0: the one without the other corrupts nothing"),
    ("--corruption blur --method ambient", "--corruption blur: --method ambient is told of Gaussian noise"),
    ("--p 0.001", "--p 0.001: corrupts none of the 64 images of shapes"),
    ("--schedule linear --timesteps 10", "--timesteps 10"),
    ("--method ambient --learn-sigma", "--method ambient: .*leave out --learn-sigma"),
    ("--data nothing", "nothing"), ("--data-dir nowhere", "python data.py shapes"),
    ("--init nowhere.pt", "nowhere.pt: no such checkpoint"),
    ("--init TRAINED --res-blocks 2", "its res_blocks is 1, not 2"),
    ("--init TRAINED --timesteps 50", "its timesteps is 8, not 50"),
    ("--weighting edm", "--weighting edm: needs --precondition"),
    ("--init TRAINED --precondition", "--precondition: the network of --init .* is not preconditioned"),
    ("--init TRAINED --preset lsun_bedroom", "--init .*: its scale_shift is True, not False"),
    ("--out /proc/run", "cannot write /proc/run")])
def test_train_refuses(argv, expected, shapes, trained, tmp_path, monkeypatch, capsys):
    """Each wrong flag by its name, in one line with status 2, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    more = [str(trained) if part == "TRAINED" else part for part in argv.split()]
    with pytest.raises(SystemExit) as leaving:
        command_line(lambda: train.main(flags(shapes, "run", *more)))
    assert leaving.value.code == 2
    assert re.fullmatch(f".*: error: .*{expected}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, forgotten, expected", [
    ("--method ran --lam 0.1", None, "--out .*: method was adv and is now ran; lam was 0.3 and is now 0.1"),
    ("--p 0.5", None, "p was 0.9 and is now 0.5"), ("--timesteps 50", None, "timesteps was 8 and is now 50"),
    ("--dropout 0.1", None, "dropout was 0.0 and is now 0.1"),
    ("", "streams", "another version of train.py began")])
def test_train_refuses_another_run_on_the_same_folder(argv, forgotten, expected, shapes, trained, tmp_path):
    """Every setting that differs is named, and so is the random stream of an older version's checkpoint,
    which has none."""
    checkpoint = load_checkpoint(trained)
    if forgotten:
        del checkpoint["config"]["training"][forgotten]
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", checkpoint)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match=expected):
        train.main(flags(shapes, tmp_path / "run", *argv.split()))
    assert [file.read_bytes() for file in (tmp_path / "run").iterdir()] == [before]


def as_folder(path, trained):
    path.mkdir()


@pytest.mark.parametrize("file, make, expected", [
    ("checkpoint.pt", as_folder, "--out .*checkpoint.pt: is a folder"),
    ("log.jsonl", as_folder, "--out .*log.jsonl: is a folder"),
    ("samples-00000004.png", as_folder, "--out .*samples-00000004.png: is a folder"),
    ("checkpoint.pt", lambda path, _: path.symlink_to("/gone/c.pt"), "is a link to /gone/c.pt, which is not"),
    ("checkpoint-previous.pt", lambda path, trained: shutil.copy(trained / "checkpoint.pt", path),
     "holds checkpoint-previous.pt and no checkpoint.pt: rename it"),
    ("checkpoint.pt", lambda path, trained: torch.save(load_checkpoint(trained)["ema"], path),
     "checkpoint.pt: is a model and no run that can go on")])
def test_train_refuses_a_folder_that_it_cannot_use(file, make, expected, shapes, trained, tmp_path):
    """Before the work: catches a run that starts anew over what is there, or fails at its first save."""
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / file, trained)
    with pytest.raises(UserError, match=expected):
        train.main(flags(shapes, tmp_path / "run", "--steps", 4))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]


def test_what_the_machine_cannot_do_is_said_before_the_work(shapes, tmp_path, monkeypatch):
    """No compiler, a disk for less than three checkpoints: catches hours of work that cannot be kept."""
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler found\nand more")

    argv = flags(shapes, tmp_path / "run", "--steps", 1)
    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match="--compile: torch.compile does not work here .No working C"):
        train.main([*argv, "--compile"])
    usage = shutil.disk_usage(tmp_path)
    model = 4 * sum(p.numel() for p in unet.UNet(8, 32, 1, (1,), (8,), 2).parameters())
    for free, fits in ((11.9 * model, False), (12.1 * model, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="--out .* MiB are needed"):
            train.main(argv)
        assert (tmp_path / "run").exists() == fits


def test_flags_without_an_effect_are_said(shapes, tmp_path, capsys):
    """Only those that were given: catches one that is ignored without a word, noise about the others, and a
    run that is told apart by what changes nothing."""
    for argv, expected in (
            (["--method", "ddpm", "--lam", "0.5", "--weighting", "balanced", "--flags", "conf1"],
             {"--lam", "--weighting", "--flags"}), (["--method", "ddpm", "--weighting", "edm"], set()),
            (["--method", "ambient", "--weighting", "edm"], set()),
            (["--method", "ambient", "--omega", "2", "--weighting", "balanced"], {"--omega", "--weighting"}),
            (["--p", "0", "--sigma", "0", "--data-seed", "7"], {"--data-seed"}), ([], set())):
        found = train.arguments(flags(shapes, tmp_path, *argv))
        assert found.lam == 0.3 and found.data_seed == 0
        said = capsys.readouterr().err.splitlines()
        assert {line.split(" has no effect ")[0] for line in said} == expected and len(said) == len(expected)


def test_a_run_goes_on_without_its_init(shapes, trained, tmp_path, monkeypatch):
    """The file that fine-tuning began from has gone, or its path is written in another way: the run's own
    checkpoint holds all, to the bit. Another file, or none, is another run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "first")
    tuned = flags(shapes, "run", *DDPM, "--init", "first")
    bare = [*tuned[:tuned.index("--channels")], *tuned[tuned.index("--size"):]]     # the file says the rest
    train.main([*bare, "--out", "whole", "--steps", "2"])
    train.main([*bare, "--steps", "1"])
    for other in ("second", None):
        with pytest.raises(UserError, match=f"init was first and is now {other}"):
            more = ["--steps", "2"] + (["--init", other] if other else [])
            train.main([*tuned[:tuned.index("--init")], *more])
    Path("first").rename("moved")
    with pytest.raises(UserError, match="channels was 32 and is now 64"):
        train.main([*bare, "--steps", "2", "--channels", "64"])
    train.main([*bare, "--steps", "2", "--init", str(tmp_path / "first")])
    assert_same(tensors(Path("run")), tensors(Path("whole")))
    with pytest.raises(UserError, match="first: no such checkpoint"):
        train.main([*bare, "--out", "fresh"])


def test_train_refuses_rows_that_do_not_divide(shapes, tmp_path, monkeypatch):
    """Three processes and a batch of 8, four and a quarter of it: catches a model that depends on their
    number."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--batch 8: is not a multiple of the 3 processes"):
        train.main(flags(shapes, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--reg-share 0.25: .*each of the 4 process"):
        train.main(flags(shapes, tmp_path, "--reg-share", 0.25))


def flipped(whole):
    """A file with one bit of one weight changed."""
    at = whole.index(np.float32(500).tobytes())
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]


@pytest.mark.parametrize("damage", [flipped, lambda whole: whole[:len(whole) // 2], lambda whole: b""])
def test_damaged_checkpoints_are_named(damage, shapes, trained, tmp_path):
    """Never a fresh start, never wrong weights: one bit flipped, a file cut, an empty one; the file before is
    kept."""
    path, whole = tmp_path / "run" / "checkpoint.pt", load_checkpoint(trained)
    whole["model"]["out.2.bias"].fill_(500)
    for step in (1, 2):
        save_checkpoint(path, whole | dict(step=step))
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert load_checkpoint(tmp_path / "run" / "checkpoint-previous.pt")["step"] == 1
    path.write_bytes(damage(path.read_bytes()))
    for read in (lambda: load_checkpoint(path), lambda: train.main(flags(shapes, tmp_path / "run"))):
        with pytest.raises(UserError, match="checkpoint.pt: damaged.* before it is .*checkpoint-previous.pt"):
            read()
    assert sorted(file.name for file in path.parent.iterdir()) == ["checkpoint-previous.pt", "checkpoint.pt"]


class Evil:
    """What a pickle can do when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def archive(*names):
    """The bytes of a zip archive with empty members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, b"")
    return content.getvalue()


@pytest.mark.parametrize("content, expected", [
    ({"config": Evil()}, "it holds Python objects .*could run code and were not loaded; save its state_dict"),
    (torch.nn.Linear(1, 1), "it holds Python objects .torch.nn.modules.linear.Linear."),
    (pickle.dumps({"a": 1}), "is a pickle, which could run code and was not loaded"),
    (b"\x40\0\0\0\0\0\0\0" + b'{"weight":{}}', "is a .safetensors file; .* write that with torch.save"),
    (archive("m/data.pkl", "m/constants.pkl"), "is a TorchScript archive; write its state_dict"),
    (archive("arr_0.npy"), "is a zip archive that torch.save did not write"),
    (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
    (b"<!DOCTYPE html>", "is a page of HTML"), (b"GIF89a", "damaged, truncated or not a PyTorch checkpoint"),
    ({"conv_in.weight": torch.zeros(1)}, "neither a checkpoint of train.py nor .*begins with 'conv_in.w"),
    ({"model": {"model": {}}}, "neither"), (torch.zeros(1), "neither"), ([1], "neither")])
def test_foreign_files_are_refused(content, expected, tmp_path, monkeypatch):
    """A pickle is not executed; a file of something else is called that, and what is needed."""
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("some.pt").write_bytes(content)
    else:
        torch.save(content, "some.pt")
    with pytest.raises(UserError, match=f"some.pt: {expected}") as refused:
        load_checkpoint("some.pt")
    assert "\n" not in str(refused.value) and not Path("executed").exists()


PART = "out.2.bias"


@pytest.mark.parametrize("keys, value, expected", [
    (["step"], -1, "its step -1: must be a whole number"), (["step"], "1\n2", "its step 1 2: must be"),
    (["ema_updates"], None, "its ema_updates None"), (["config"], [], "its config has no group 'network'"),
    (["config", "training"], 3, "its config has no group 'training'"),
    (["config", "network", "heads"], 0, "its heads 0: must be a whole number from 1 to 4096"),
    (["config", "network", "heads"], 5, "heads 5: does not divide the widths"),
    (["config", "network", "channels"], 4096, "do not fit the network: time_embed.0.weight of its model is "),
    (["config", "network", "mult"], "11", "its mult 11: must be 1 to 12 integers"),
    (["config", "network", "in_channels"], 6, "its in-channels 6: must be 3"),
    (["config", "network", "other"], 1, "its config's group 'network' has a 'other'"),
    (["config", "network", "dropout"], math.nan, "its dropout nan: must be a number"),
    (["config", "network", "sigma_data"], 0.0, "its sigma-data 0.0: must be None, or a number from 1e-06"),
    (["config", "process", "schedule"], ["linear"], "its schedule .*must be linear or cosine"),
    (["config", "process", "timesteps"], 10**12, "its timesteps 1000000000000: must be"),
    (["config", "data", "low"], 2.0, "its low 2.0 is not below its high 1.0"),
    (["config", "data", "seen"], torch.zeros(1), "its config is more than plain values"),
    (["ema"], [1], "its ema is no dict of tensors"), (["ema"], {}, "time_embed.0.weight of its ema is missi"),
    (["model", PART], torch.zeros(()), f"{PART} of its model is .. and has to be .3,."),
    (["ema", PART], 3, f"{PART} of its ema is no tensor"),
    (["ema", PART], torch.zeros(3, dtype=torch.int64), f"{PART} of its ema is no tensor of floating"),
    (["ema", PART], torch.zeros(3, device="meta"), f"{PART} of its ema is no tensor of floating"),
    (["ema", PART], torch.zeros(1).expand(10**6, 10**6), "its ema is larger than the file"),
    (["ema", PART], torch.full((3,), math.nan), f"{PART} of its ema holds values that are not finite"),
    (["optimizer"], [], "its optimizer lacks AdamW's step of parameter 0"),
    (["optimizer", "state", 3, "exp_avg"], torch.zeros(1), "optimizer lacks AdamW's exp_avg of parameter 3")])
def test_checkpoints_are_checked_before_use(keys, value, expected, trained, tmp_path):
    """A checkpoint of ours with one thing wrong inside: one line that names it, in little memory, for every
    script. Catches library errors, and weights or settings that are taken as they come."""
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    *path, last = keys
    functools.reduce(dict.__getitem__, path, checkpoint)[last] = value
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=f"checkpoint.pt: .*{expected}") as refused:
        load_checkpoint(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change, expected", [
    ({"label_emb.weight": torch.zeros(10, 128)}, "has label_emb.weight, .*class-conditional"),
    ({FIRST: torch.zeros(32, 6, 3, 3)}, "its in-channels 6: must be 3"),
    ({FIRST: torch.zeros(0, 3, 3, 3)}, "not an improved-diffusion U-Net"),
    ({FIRST: torch.zeros(())}, "not an improved-diffusion U-Net"),
    ({"input_blocks.2.0.x": torch.zeros(1)}, "not an improved-diffusion U-Net: it has no input_blocks.2.0"),
    ({"step": 3}, "step of its state dict is no tensor"), ({"more": torch.zeros(1)}, "state dict has more,")])
def test_other_networks_are_refused(change, expected, trained, tmp_path):
    """A public state dict of another architecture: one line, where network_of met a KeyError or a division by
    zero."""
    torch.save(load_checkpoint(trained)["ema"] | change, tmp_path / "public.pt")
    with pytest.raises(UserError, match=f"public.pt: .*{expected}"):
        load_checkpoint(tmp_path / "public.pt")


def before(prefix, weights):
    """The weights with a prefix before their names."""
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("wrap, expected", [
    (lambda w: before("_orig_mod.", w), "of 88 of 88 names, those with '_orig_mod.'"),
    (lambda w: before("module.", w) | {"n_averaged": torch.tensor(3)}, "of 88 of 89 names"),
    (lambda w: {"epoch": 3, "state_dict": before("model.", w)}, "under 'state_dict', of 88 of 88 names"),
    (lambda w: {"model": {}, "ema": w}, "under 'ema'")])
def test_wrapped_state_dicts_are_taken_out(wrap, expected, trained, tmp_path, capsys):
    """As torch.compile, DataParallel and others save them, and it is said. Catches the wrong one taken."""
    weights = load_checkpoint(trained)["ema"]
    torch.save(wrap(weights), tmp_path / "public.pt")
    assert_same(load_checkpoint(tmp_path / "public.pt"), weights)
    assert f"public.pt: takes the state dict {expected}" in capsys.readouterr().out
