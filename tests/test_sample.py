"""sample.py as a stage: command line, shards, processes, the .npz and its protocol. Its steps:
test_core.py."""

import contextlib
import copy
import hashlib
import json
import os
import re
import resource
import shutil
import threading
import time
import zipfile
from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import unet
from checkpoints import load_checkpoint, save_checkpoint
from common import UserError, as_bytes, command_line, image_noise, locked

NETWORK = dict(size=8, in_channels=3, channels=32, res_blocks=1, mult=(1,), attn=(8,), heads=2, dropout=0.0,
               learn_sigma=False, scale_shift=True)
DATA = dict(name="shapes", size=8, count=64, p=0.9, sigma=0.2, data_seed=0, low=-1.0, high=1.0,
            float_data=False)
# Without `streams`, as versions before this one wrote it: their runs are sampled, but not gone on with
# (test_train.py).
TRAINING = dict(method="adv", lam=0.3, lam_units="x", omega=2.0, gamma=8 / 255, batch=8, seed=0, init=None)
TWICE = ["--num-samples", 5, "--steps", 5, "--seed", 1, "--batch", 2]       # by one process and by two


def weights(seed, **network):
    """A state dict with random values in every parameter, those that start at zero too."""
    torch.manual_seed(seed)
    made = unet.UNet(**NETWORK | network)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return made.state_dict()


def checkpoint(folder, model=1, ema=2, data={}, timesteps=25, **network):
    """A run's folder whose raw and averaged weights are random, of these seeds. -> the folder."""
    config = dict(network=NETWORK | network, process=dict(schedule="linear", timesteps=timesteps),
                  data=DATA | data, training=TRAINING)
    state = dict(config=config, step=7, model=weights(model, **network), ema=weights(ema, **network))
    save_checkpoint(folder / "checkpoint.pt", state)
    return folder


def two_process_jobs(folder, shapes):
    """The images of TWICE."""
    return [("sample", "sample", [checkpoint(folder / "random"), *TWICE, "--out", folder / "two.npz"])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with random weights."""
    return checkpoint(tmp_path_factory.mktemp("random"))


def sampled(run, out, *argv):
    """The images that sample.py makes, and their protocol."""
    sample.main([str(part) for part in (run, "--out", out, *argv)])
    with np.load(out, allow_pickle=False) as archive:
        assert sorted(archive) == ["arr_0", "protocol"]
        return archive["arr_0"], json.loads(str(archive["protocol"]))


def by_hand(seed=0, count=3, steps=5, state=2, clamp=(-1.0, 1.0), amp=False, **how):
    """The images of the state dict `state` by sample.sample, without a command line: float [N, 8, 8, 3]."""
    model = unet.UNet(**NETWORK | dict(learn_sigma=how.get("variance") == "learned"))
    model.load_state_dict(weights(state, learn_sigma=how.get("variance") == "learned"))
    model = model.to(memory_format=torch.channels_last)
    if amp:
        model = unet.in_bfloat16(model, torch.device("cpu"))
    full = unet.Schedule.named("linear", 25)
    schedule = full.respaced_by_noise(steps) if how.get("sampler") == "heun" else full.respaced(steps)
    schedule = schedule.to("cpu")
    noise = image_noise("sample", seed, range(count), (3, 8, 8))
    return sample.sample(model, schedule, noise, clamp=clamp, **how).permute(0, 2, 3, 1).numpy()


def far(found, expected):
    """The largest difference of two arrays of bytes, in levels; 1 can be float32 rounding at a boundary."""
    return int(np.abs(found.astype(int) - expected).max())


# -------------------------------------------------------------------------------------------- what is sampled

@pytest.mark.parametrize("argv, how", [
    ([], {}), (["--seed", 4], dict(seed=4)), (["--steps", 25], dict(steps=25)), (["--raw"], dict(state=1)),
    (["--sampler", "ddim"], dict(sampler="ddim")), (["--sampler", "heun"], dict(sampler="heun")),
    (["--variance", "small"], dict(variance="small"))])
def test_every_flag_reaches_the_sampler(argv, how, run, tmp_path):
    """Catches a flag that stands in the protocol and is ignored, --raw and the EMA among them, and truncated
    bytes."""
    argv = ["--num-samples", 3, *([] if "--steps" in argv else ["--steps", 5]), *argv]
    images, protocol = sampled(run, tmp_path / "a.npz", *argv)
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 3)
    assert far(images, as_bytes(by_hand(**how))) <= 1
    assert how == {} or far(images, as_bytes(by_hand())) > 20
    assert protocol["ema"] == ("--raw" not in argv)


def test_amp_reaches_the_network(tmp_path):
    """Catches --amp ignored: near the float32 images, and not the same."""
    run = checkpoint(tmp_path / "run", data=dict(float_data=True))
    images, protocol = sampled(run, tmp_path / "a.npz", "--num-samples", 3, "--steps", 5, "--amp")
    assert images == pytest.approx(by_hand(amp=True), abs=1e-5) and protocol["amp"] is True
    assert 1e-4 < np.abs(images - by_hand()).max() < 0.1


def test_a_learned_variance_is_used_where_there_is_one(tmp_path):
    """Catches sampling with the large variance from a network that predicts its own."""
    run = checkpoint(tmp_path / "run", learn_sigma=True)
    images, protocol = sampled(run, tmp_path / "a.npz", "--num-samples", 3, "--steps", 5)
    assert protocol["variance"] == "learned" and far(images, as_bytes(by_hand(variance="learned"))) <= 1


def test_float_data_keep_their_units(tmp_path):
    """`subspace` data: float32, clamped to their own range. Catches bytes, and the range of images."""
    run = checkpoint(tmp_path / "run", data=dict(name="subspace", low=-0.5, high=0.25, float_data=True))
    images, _ = sampled(run, tmp_path / "a.npz", "--num-samples", 3, "--steps", 5)
    expected = by_hand(clamp=(-0.5, 0.25))
    assert images.dtype == np.float32 and images == pytest.approx(expected, abs=1e-4)
    assert np.abs(expected - by_hand()).max() > 0.1
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("sampler, steps, timesteps, expected", [
    ("ddpm", None, 300, 300), ("ddim", None, 300, 250), ("ddim", None, 25, 25), ("ddpm", 100, 300, 100),
    ("heun", None, 300, 18)])
def test_default_steps(sampler, steps, timesteps, expected, tmp_path):
    """All timesteps for DDPM, 250 for DDIM, 18 for Heun, no more than there are; only DDPM has a variance to
    tell of."""
    parser = ArgumentParser()
    sample.add_arguments(parser)
    run, given = checkpoint(tmp_path, timesteps=timesteps), ["--steps", str(steps)] if steps else []
    job = sample.open_job(parser.parse_args([str(run), "--sampler", sampler, *given]))
    assert len(job.schedule) == job.protocol["steps"] == expected
    assert job.protocol["variance"] == ("large" if sampler == "ddpm" else None)


def test_public_state_dict_is_sampled(tmp_path):
    """A bare state dict needs --size; then it gives the images of the network that it came from, and says
    so."""
    torch.save(weights(5), tmp_path / "public.pt")
    with pytest.raises(UserError, match="public.pt: a bare state dict does not say .* size; pass --size"):
        sampled(tmp_path / "public.pt", tmp_path / "a.npz")
    with pytest.raises(UserError, match="--raw: .*public.pt is a bare state dict, which has one set"):
        sampled(tmp_path / "public.pt", tmp_path / "a.npz", "--size", 8, "--raw")
    argv = ["--size", 8, "--heads", 2, "--timesteps", 25, "--num-samples", 3, "--steps", 5]
    images, protocol = sampled(tmp_path / "public.pt", tmp_path / "a.npz", *argv)
    assert far(images, as_bytes(by_hand(state=5))) <= 1
    config = protocol["config"]
    assert (config["training"], config["data"]["name"], config["network"]["mult"]) == ({}, "?", [1])
    cosine, protocol = sampled(tmp_path / "public.pt", tmp_path / "b.npz", *argv, "--schedule", "cosine")
    assert protocol["config"]["process"] == dict(schedule="cosine", timesteps=25) and far(cosine, images) > 20


def test_the_whole_story_is_in_the_file(run, tmp_path):
    """Catches a protocol that lost a setting: what report.py needs to know of the images is nowhere else."""
    images, protocol = sampled(run, tmp_path / "a.npz", "--num-samples", 3, "--steps", 5, "--batch", 2)
    file = run / "checkpoint.pt"
    cuda = torch.cuda.is_available()
    assert protocol == dict(
        checkpoint=str(file), sha256=hashlib.sha256(file.read_bytes()).hexdigest(), step=7,
        config=dict(network=NETWORK | dict(mult=[1], attn=[8], sigma_data=None),
                    process=dict(schedule="linear", timesteps=25),
                    data=DATA | dict(corruption="gaussian"), training=TRAINING),
        num_samples=3, sampler="ddpm", steps=5, variance="large", ema=True, seed=0, batch=2, amp=False,
        device="cuda" if cuda else "cpu", tf32=cuda, stream="sample", torch=torch.__version__, attack=None)
    grid = np.asarray(Image.open(tmp_path / "a.png"))       # columns of 8 pixels, 2 between them
    assert np.array_equal(grid[:8, :8], images[0]) and np.array_equal(grid[:8, 10:18], images[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


# --------------------------------------------------------------------------------------- shards and processes

def test_samples_do_not_depend_on_batch_or_processes(run, tmp_path, two_processes):
    """Batch 2, batch 5, two processes: catches a stream that belongs to a place in the batch or to a process,
    a shard left out or made twice, and images in another order."""
    folder, results = two_processes
    images, _ = sampled(run, tmp_path / "a.npz", *TWICE)
    assert results["sample"] == ["ok", "ok"]
    with np.load(folder / "two.npz", allow_pickle=False) as two:
        assert np.array_equal(two["arr_0"], images)
    assert far(sampled(run, tmp_path / "b.npz", *TWICE, "--batch", 5)[0], images) <= 1
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    assert not list(folder.glob("*.shards"))


def test_sampling_resumes_from_finished_shards(run, tmp_path, monkeypatch):
    """Killed in its second shard: the first is used, not made again, and never for another protocol."""
    argv, real, made = ["--num-samples", 5, "--steps", 3, "--batch", 2], sample.sample, []

    def dies(*args, **settings):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(sample, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        sampled(run, tmp_path / "s.npz", *argv)
    assert not (tmp_path / "s.npz").exists()
    for other, found in ((["--seed", 1], "seed 0, now 1"), (["--raw"], "ema True, now False"),
                         (["--batch", 3], "batch 2, now 3")):
        with pytest.raises(UserError, match=f"s.npz.shards: holds shards of another run .{found}"):
            sampled(run, tmp_path / "s.npz", *argv, *other)
    assert len(made) == 2
    images, _ = sampled(run, tmp_path / "s.npz", *argv)
    assert len(made) == 4                                   # of three shards: the first was there
    monkeypatch.undo()
    assert np.array_equal(images, sampled(run, tmp_path / "whole.npz", *argv)[0])


def test_a_second_start_on_the_same_samples_is_refused(run, tmp_path):
    """At once: catches two samplers that take away each other's shards."""
    with locked(tmp_path / ".s.npz.lock", "never said"):
        with pytest.raises(UserError, match="another process is making"):
            sampled(run, tmp_path / "s.npz", "--num-samples", 1, "--steps", 3)
    sampled(run, tmp_path / "s.npz", "--num-samples", 1, "--steps", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz", "s.png"]


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:100]),
    lambda path: np.save(path, np.zeros((1, 4, 4, 3), np.uint8)), lambda path: np.save(path, np.uint8(1)),
    lambda path: (path.with_name("protocol.json").unlink(), np.save(path, np.load(path) + 1))])
def test_a_damaged_shard_is_made_again(damage, run, tmp_path):
    """A shard cut by a crash of the machine, one of other images, and one that nobody says anything of:
    catches it taken for finished, or a traceback."""
    argv = "--num-samples", 2, "--steps", 3, "--batch", 1
    whole, _ = sampled(run, tmp_path / "whole.npz", *argv)
    monkey, join = pytest.MonkeyPatch(), sample.Shards.join

    def dies(self, *_):
        damage(self.path(1))
        raise KeyboardInterrupt

    monkey.setattr(sample.Shards, "join", dies)
    with pytest.raises(KeyboardInterrupt):
        sampled(run, tmp_path / "s.npz", *argv)
    monkey.setattr(sample.Shards, "join", join)
    assert np.array_equal(sampled(run, tmp_path / "s.npz", *argv)[0], whole)


def test_a_shard_that_the_disk_has_no_room_for_is_said(tmp_path):
    """Here a file reaches its size limit, in the last bytes of a small shard. Catches a shard cut short that
    is taken for written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = dict(network=NETWORK, data=DATA)
    shards = sample.Shards(tmp_path / "s.npz", dict(config=config, num_samples=1, batch=1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*000000.npy: File too large"):
            shards.write(0, np.zeros((1, 8, 8, 3), np.uint8))           # 320 bytes with the header
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(shards.folder.iterdir())


def test_finished_samples_are_left_alone(run, tmp_path, capsys, monkeypatch):
    """The same command again, and a process that comes when the first has finished without it: catches work
    done twice, a wait for shards that are gone, and samples of other settings, or a foreign file, that are
    overwritten without a word."""
    argv = "--num-samples", 2, "--steps", 3, "--batch", 1
    images, _ = sampled(run, tmp_path / "s.npz", *argv)
    before = (tmp_path / "s.npz").read_bytes()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        sample.main([str(run), *map(str, argv), "--out", str(tmp_path / "s.npz")])
    monkeypatch.undo()
    assert (tmp_path / "s.npz").read_bytes() == before
    assert capsys.readouterr().out.count("nothing to do") == 1
    with pytest.raises(UserError, match="s.npz: is there already, made otherwise .seed 0, now 1.; delete it"):
        sampled(run, tmp_path / "s.npz", *argv, "--seed", 1)
    assert (tmp_path / "s.npz").read_bytes() == before
    np.savez(tmp_path / "foreign.npz", x=1)
    with pytest.raises(UserError, match="foreign.npz: is there already, made otherwise"):
        sampled(run, tmp_path / "foreign.npz", *argv)


def test_a_wait_for_another_process_ends(run, tmp_path, monkeypatch, capsys):
    """The first of two processes, whose second is dead: a line that names its shard. One that is at work on a
    shard for longer than the first has patience is waited for. Catches a wait without an end, and one that
    ends too early."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sample, "PATIENCE", 0.4)
    monkeypatch.setattr(sample, "HEARTBEAT", 0.05)
    argv = [str(run), *"--num-samples 2 --steps 3 --batch 1 --out".split(), str(tmp_path / "s.npz")]
    with pytest.raises(UserError, match="waited 0.4 s for process 1 to make .*000001.npy: the same command"):
        sample.main(argv)
    protocol = json.loads((tmp_path / "s.npz.shards" / "protocol.json").read_text())
    shards = sample.Shards(tmp_path / "s.npz", protocol)

    def second():
        with shards.alive(1):
            time.sleep(1)
            shards.write(1, np.zeros((1, 8, 8, 3), np.uint8))

    thread = threading.Thread(target=second)
    thread.start()
    sample.main(argv)
    thread.join()
    with np.load(tmp_path / "s.npz", allow_pickle=False) as archive:
        assert not archive["arr_0"][1].any() and archive["arr_0"][0].any()
    assert not (tmp_path / "s.npz.shards").exists()


def test_what_does_not_fit_is_said_before_the_work(run, tmp_path, monkeypatch):
    """Shards and .npz on the disk, a batch in the memory: catches a job that ends hours later for that."""
    usage, argv = shutil.disk_usage(tmp_path), ["--num-samples", 100, "--steps", 2]
    for free, fits in ((2 * 100 * 192 - 1, False), (2 * 100 * 192, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="--out .* MiB are needed"):
            sampled(run, tmp_path / "s.npz", *argv)
        assert (tmp_path / "s.npz").exists() == fits
    monkeypatch.setattr(os, "sysconf", lambda name: 2000)           # 4 MB
    with pytest.raises(UserError, match="--batch 5000: needs more than .* MiB of memory, and there are 4"):
        sampled(run, tmp_path / "t.npz", "--num-samples", 9999, "--steps", 2, "--batch", 5000)


def test_waits_end(run, tmp_path, monkeypatch):
    """A second process whose first never comes is told what it waits for; a process without shards does not
    wait; a damaged note is named. Catches a wait without an end."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sample, "PATIENCE", 0.2)
    argv = [str(run), "--steps", "3", "--batch", "1", "--out", str(tmp_path / "s.npz")]
    with pytest.raises(UserError, match="waited 0.2 s for the first process to begin .*s.npz.shards"):
        sample.main([*argv, "--num-samples", "2"])
    sample.main([*argv, "--num-samples", "1"])
    (tmp_path / "s.npz.shards").mkdir()
    (tmp_path / "s.npz.shards" / "protocol.json").write_text('{"half')
    with pytest.raises(UserError, match="protocol.json: damaged .*; delete the folder"):
        sample.main([*argv, "--num-samples", "2"])
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz.shards"]


# --------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("argv, expected", [
    ("--num-samples 0", "--num-samples 0: must be from 1"), ("--batch 0", "--batch 0"),
    ("--steps 26", "--steps 26: .*2 to 25"), ("--steps 1", "--steps 1: must be from 2"),
    ("--steps 0", "--steps 0: must be from 2"),
    ("--heads 7", "--heads 7: .* its heads is 2; leave the flag out"),
    ("--schedule cosine", "its schedule is linear"), ("--timesteps 9", "its timesteps is 25"),
    ("--out s.png", "--out s.png: the name must end in .npz"), ("--out /proc/s.npz", "cannot write /proc"),
    ("--num-samples 1000000000000", "--num-samples 1000000000000: must be from 1 to 1e.09"),
    ("--batch 1000000 --num-samples 1000000", "--batch 1000000: needs more than .* MiB of memory"),
    ("--heads 0", "--heads 0: must be a whole number from 1"), ("--size 0", "--size 0: must be a whole"),
    (f"--out {__file__}/s.npz", "--out .*: .*test_sample.py is a file, not a folder"),
    ("--variance learned", "--variance learned: .*does not predict its variance")])
def test_sample_refuses(argv, expected, run, tmp_path, monkeypatch, capsys):
    """Each wrong flag by its name, in one line with status 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        command_line(lambda: sample.main([str(run), *argv.split()]))
    assert leaving.value.code == 2
    assert re.fullmatch(f".*: error: .*{expected}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["s.npz", "s.png", "s.npz.shards/protocol.json"])
def test_sample_refuses_what_it_cannot_write(name, tmp_path):
    """Folders in the place of its files: said before the model is looked for."""
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"--out .*{name}: is a folder"):
        sample.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "s.npz")])


def test_a_variance_without_an_effect_is_said(run, tmp_path, capsys):
    """DDIM has none: catches --variance ignored without a word, or said where it was not given."""
    argv = [run, tmp_path / "s.npz", "--num-samples", 1, "--steps", 2, "--sampler", "ddim"]
    sampled(*argv)
    assert "no effect" not in capsys.readouterr().err
    sampled(*argv, "--variance", "small")
    assert capsys.readouterr().err.startswith("--variance has no effect on --sampler ddim\n")


def test_weights_that_do_not_fit_are_named(run, tmp_path):
    """Catches weights loaded in part: a tensor too few is said by its name."""
    broken = copy.deepcopy(load_checkpoint(run))
    del broken["ema"]["out.2.bias"]
    torch.save(broken, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="the weights do not fit the network: .*out.2.bias"):
        sample.main([str(tmp_path), "--out", str(tmp_path / "a.npz")])
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        sample.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "a.npz")])
