"""attack.py as a stage: command line, shards, processes, what it reports. Its algorithms: test_core.py."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import attack
import sample
from common import UserError, command_line, image_noise
from test_sample import checkpoint
from unet import Schedule, at

FLOATS = dict(name="subspace", low=-1.0, high=1.0, float_data=True)         # images without rounding to bytes
COMMON = ["--num-samples", 3, "--batch", 2, "--steps", 4, "--seed", 1]
TWICE = ["--num-samples", 5, "--batch", 2, "--steps", 4, "--attack", "eot", "--iters", 2, "--eot", 3,
         "--steps-attacked", "50%"]                         # by one process and by two


def two_process_jobs(folder, shapes):
    """The attacked images of TWICE."""
    return [("attack", "attack", [checkpoint(folder / "random-floats", data=FLOATS), *TWICE, "--out",
                                  folder / "attacked.npz"])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with random weights."""
    return checkpoint(tmp_path_factory.mktemp("random-floats"), data=FLOATS)


def made_by(script, run, out, *argv):
    """The images that a script makes, and their protocol."""
    script.main([str(part) for part in (run, "--out", out, *argv)])
    with np.load(out, allow_pickle=False) as archive:
        return archive["arr_0"], json.loads(str(archive["protocol"]))


def report_of(out):
    """OUT.npz.attack.json. NaN and infinity are not JSON, and are not read."""
    def refuse(word):
        raise AssertionError(f"{word} in JSON")
    return json.loads(out.with_name(f"{out.name}.attack.json").read_text(), parse_constant=refuse)


def norms(difference):
    """The L2 norm of every image."""
    return np.linalg.norm(difference.reshape(len(difference), -1).astype(float), axis=1)


# ------------------------------------------------------------------------------ what is attacked and reported

@pytest.mark.parametrize("sampler, data", [("ddpm", FLOATS), ("ddim", FLOATS), ("ddpm", {})])
def test_no_attacked_step_is_sample_py(sampler, data, tmp_path):
    """--steps-attacked 0: sample.py's images bit for bit, in floats and in bytes, and a report that nothing
    moved."""
    run = checkpoint(tmp_path / "run", data=data)
    common = [*COMMON, "--sampler", sampler]
    images, protocol = made_by(sample, run, tmp_path / "a.npz", *common)
    unmoved, attacked = made_by(attack, run, tmp_path / "b.npz", *common, "--steps-attacked", 0)
    assert images.dtype == unmoved.dtype and np.array_equal(images, unmoved)
    assert {name for name in protocol if protocol[name] != attacked[name]} == {"attack"}
    report = report_of(tmp_path / "b.npz")
    assert report["rms"] == report["rms_noise"] == report["outside"] == 0
    assert report["forwards"] is report["size"] is report["cost_end"] is report["zero_gradients"] is None


@pytest.fixture(scope="module")
def unattacked(run, tmp_path_factory):
    """The images of COMMON by sample.py."""
    return made_by(sample, run, tmp_path_factory.mktemp("unattacked") / "a.npz", *COMMON)[0]


@pytest.mark.parametrize("name, forwards, backwards", [
    ("fgsm", 2, 1), ("pgd", 4, 3), ("eot", 4, 3), ("drift", 2, 1), ("trajectory", 10, 4.5),
    ("noise", 1, 0)])
def test_report_of_an_attack(name, forwards, backwards, run, unattacked, tmp_path, capsys):
    """The distances are those between the files of attack.py and sample.py; the passes those of Algorithms 2
    to 4 with N = 3, and of `trajectory` through 2 steps and 1. Catches an undisturbed trajectory with other
    noise, wrong means, and passes not counted or counted twice."""
    argv = [*COMMON, "--iters", 3, "--eot", 2, "--eps-scale", 0.5, "--steps-attacked", 2, "--where", "last"]
    images, protocol = made_by(attack, run, tmp_path / "a.npz", *argv, "--attack", name)
    said = capsys.readouterr().out
    report = report_of(tmp_path / "a.npz")
    moved = norms(images - unattacked)
    assert report["l2"] == pytest.approx(moved.mean(), rel=1e-5) and moved.min() > 0
    assert report["rms"] == pytest.approx(moved.mean() / np.sqrt(3 * 8 * 8), rel=1e-5)
    assert (report["forwards"], report["backwards"]) == (forwards, backwards)
    assert attack.needed(protocol) == (forwards, backwards)
    assert f"{forwards} forwards and {backwards} backwards an attacked step" in said
    own = dict(phi=None if name == "noise" else 1.0, iters=None, eot=None, stride=None)    # None: it has none
    own |= dict(iters=3, stride=2.5) if name in ("pgd", "eot", "trajectory") else {}
    own |= dict(eot=2) if name == "eot" else {}
    assert protocol["attack"] == own | dict(name=name, steps_attacked=2, where="last", as_printed=False,
                                            eps_scale=0.5)
    assert report["samples"] == "a.npz" and report["protocol"] == protocol and report["n"] == 3
    assert report["seconds_per_image"] > 0 and report["outside"] == 0 and 0 < report["size"] <= 1 + 1e-5
    if name == "noise":
        assert report["zero_gradients"] is report["broken_gradients"] is None and not report["cost_end"]
    else:
        assert report["zero_gradients"] == report["broken_gradients"] == 0
        assert 0 < report["signs_of_start"] < 1 and report["cost_end"] > report["cost_start"] > 0


@pytest.fixture(scope="module")
def attacked(run, tmp_path_factory):
    """The image of one attacked step of three, by the flags besides, as floats; each made once."""
    folder, known = tmp_path_factory.mktemp("attacked"), {}

    def images(*argv):
        if argv not in known:
            common = "--num-samples", 1, "--steps", 3, "--iters", 2, "--steps-attacked", 1
            known[argv] = made_by(attack, run, folder / f"{len(known)}.npz", *common, *argv)[0]
        return known[argv]
    return images


@pytest.mark.parametrize("name, argv", [
    ("fgsm", ["--phi", 2]), ("fgsm", ["--eps-scale", 0.5]), ("fgsm", ["--where", "first"]),
    ("fgsm", ["--where", "last"]), ("fgsm", ["--steps-attacked", "75%"]),
    ("fgsm", ["--seed", 3]),
    ("fgsm", ["--raw"]), ("pgd", ["--stride", 1]), ("pgd", ["--iters", 3]),
    ("trajectory", ["--stride", 1]), ("trajectory", ["--iters", 3]), ("trajectory", ["--phi", 2]),
    ("pgd", ["--as-printed"]), ("eot", ["--eot", 1]), ("eot", ["--as-printed"])])
def test_every_flag_reaches_the_attack(name, argv, attacked):
    """Catches a flag that stands in the protocol and is ignored: each gives another image, by far more than
    rounding."""
    farthest = float(np.abs(attacked("--attack", name, *argv) - attacked("--attack", name)).max())
    assert farthest > 1e-3


class Planted(torch.nn.Module):
    """A function of x in the place of a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x)


@pytest.mark.parametrize("function, zero, broken", [
    (lambda x: 0 * x + 100, 1.0, 0.0),                      # x0_hat is far outside of its range
    (lambda x: (0 * x).sqrt(), 0.0, 1.0)])                  # the slope of the root at 0
def test_gradients_that_fake_robustness(function, zero, broken, run, tmp_path, monkeypatch, capsys):
    """Catches a network that looks robust as its gradient is zero or NaN: in the file and in a sentence."""
    load = sample.load_model
    monkeypatch.setattr(sample, "load_model", lambda *args: (Planted(function), *load(*args)[1:]))
    made_by(attack, run, tmp_path / "a.npz", *COMMON, "--steps-attacked", 1, "--where", "last")
    report = report_of(tmp_path / "a.npz")
    assert (report["zero_gradients"], report["broken_gradients"]) == (zero, broken)
    said = capsys.readouterr().out
    assert f"{zero:.2%} zero everywhere, {broken:.2%} not finite: DO NOT TRUST THIS ATTACK" in said


def test_a_cost_that_is_not_finite_is_reported(run, tmp_path, monkeypatch, capsys):
    """Catches a shard that counts as unfinished for its NaN, and is waited for or made again."""
    load, broken = sample.load_model, Planted(lambda x: x * math.nan if x.requires_grad else x)
    monkeypatch.setattr(sample, "load_model", lambda *args: (broken, *load(*args)[1:]))
    monkeypatch.setattr(sample, "PATIENCE", 0)
    made_by(attack, run, tmp_path / "a.npz", *COMMON, "--steps-attacked", 1, "--where", "last")
    assert report_of(tmp_path / "a.npz")["cost_start"] is None
    assert "not finite: DO NOT TRUST THIS ATTACK" in capsys.readouterr().out


def test_sentences_say_where_an_attack_is_none():
    """Means over images and attacked steps of two shards; an attack no better than noise, or that does not
    climb, or that has no gradient, is called that."""
    asked = dict(name="fgsm", steps_attacked=2, where="spread", phi=1.0, iters=20, eot=5, stride=2.5,
                 as_printed=False, eps_scale=1.0)
    shard = dict(steps=2, attacked=20, forwards=4, backwards=2, gradients=20, zero=0, broken=0, size=20.0,
                 kept=15.0, outside=0, radius=5.0, start=10.0, end=30.0, moved=40.0, control=20.0,
                 seconds=5.0, pixels=4)

    def told(**changes):
        protocol = dict(num_samples=20, steps=5, sampler="ddpm", attack=asked | changes.pop("asked", {}))
        result = attack.summary([shard | changes, shard | changes], protocol)
        return result, "\n".join(attack.sentences(result, protocol))

    result, text = told()
    assert result == dict(
        n=20, seconds_per_image=0.5, forwards=2, backwards=1, outside=0, radius=0.25, size=1,
        signs_of_start=0.75, zero_gradients=0, broken_gradients=0, cost_start=0.5, cost_end=1.5, l2=4, rms=2,
        l2_noise=2, rms_noise=1)
    assert "fgsm on 2 of 5 ddpm steps (spread), 0.5 s an image" in text and "by 2.00 times" in text
    bad = ["NO MORE THAN NOISE", "DOES NOT CLIMB", "NOT TRUST"]
    for changes, expected in (
            (dict(), []), (dict(moved=20.5), bad[:1]), (dict(moved=0.0, control=0.0), bad[:1]),
            (dict(end=10.0), bad[1:2]), (dict(zero=4), bad[2:]), (dict(broken=4), bad[2:])):
        assert [words for words in bad if words in told(**changes)[1]] == expected, changes
    assert "pgd as printed on 2" in told(asked=dict(name="pgd", as_printed=True))[1]
    ball = "3 perturbations outside 0.5 sigma(t), on average 0.25 in units of x_t"
    assert ball in told(asked=dict(eps_scale=0.5), outside=1.5)[1]
    alone = told(asked=dict(name="noise"), gradients=0)[1]
    assert "gradient" not in alone and "by rms" not in alone and "1 and 0)" in alone


# --------------------------------------------------------------------------------- through the whole sampler

SCHEDULE = Schedule(torch.full((4,), 0.3, dtype=torch.float64), torch.arange(4))    # x_T is not all noise
MIXING, (AXIS,) = (torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
                   for rows in (12, 1))


def on_x_T(sampler, clamp, x0_hat):
    """The hook of `trajectory` for images 0 to 2, attacked at x_T, whose network predicts x0_hat(x [B, 12])
    as the clean image; x_T [3, 3, 2, 2]; the z of the steps; x_0 as a function of x_T, by sample.sample."""
    def network(x, t):
        a, s = at(SCHEDULE.sqrt_alpha_bar, t, x), at(SCHEDULE.sqrt_one_minus_alpha_bar, t, x)
        return (x - a * x0_hat(x.flatten(1)).view_as(x)) / s

    asked = dict(name="trajectory", phi=1.0, iters=20, stride=2.5, eps_scale=0.2)
    how = dict(sampler=sampler, clamp=clamp, variance="large")
    x_T, *z = (each.double() for each in itertools.islice(image_noise("sample", 5, range(3), (3, 2, 2)), 5))
    return (attack.TrajectoryAttack(asked, {3}, network, SCHEDULE, how, range(3), 5), x_T, z,
            lambda x: sample.sample(network, SCHEDULE, iter([x, *z]), **how))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
def test_the_gradient_goes_through_the_whole_sampler(sampler):
    """Against differences of sample.sample's own images, some of whose x0_hat are clamped. Catches a step,
    half of Heun's, or the clamp left out of the gradient, and a state held constant between two steps."""
    hook, x_T, z, x_0_of = on_x_T(sampler, (-0.9, 0.9), lambda x: torch.tanh(0.4 * x @ MIXING))
    away, started = x_0_of(x_T), x_T + 0.1

    def L(x):
        x_0 = attack.reverse_process(hook.model, SCHEDULE, x, 3, z[::-1], hook.how)
        return attack.squared(away - x_0)

    found, value = attack.gradient_of(L, started)
    assert value.tolist() == pytest.approx(attack.squared(away - x_0_of(started)).tolist(), rel=1e-12)
    pixels = 1e-6 * torch.eye(12, dtype=torch.float64).view(12, 3, 2, 2)
    rise = [attack.squared(away - x_0_of(started + pixel)) - attack.squared(away - x_0_of(started - pixel))
            for pixel in pixels]                                                    # of all images at once
    assert found.flatten(1).T.numpy() == pytest.approx(torch.stack(rise).numpy() / 2e-6, rel=1e-6, abs=1e-8)
    assert found.flatten(1).abs().amax(dim=1).min() > 1e-3 and (away.abs() > 0.9 - 1e-12).any()


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_trajectory_finds_the_optimum_of_the_ball(sampler):
    """A network that answers by what x has along one direction v: every step is a factor there, and x_0 has
    nothing else. What moves it farthest is +-radius sign(v)."""
    gain, v = 0.8, AXIS / AXIS.norm()
    hook, x_T, _, x_0_of = on_x_T(sampler, None, lambda x: gain * (x @ v)[:, None] * v)
    x_adv, factor = hook(x_T, 3, None), 1.0
    for k in (3, 2, 1, 0):
        ab, before = 0.7 ** (k + 1), 0.7 ** k
        eps_hat = (1 - math.sqrt(ab) * gain) / math.sqrt(1 - ab)
        step = math.sqrt(before) * gain + math.sqrt(1 - before) * eps_hat
        if sampler == "heun" and k:
            eps_hat = (eps_hat + step * (1 - math.sqrt(before) * gain) / math.sqrt(1 - before)) / 2
            x0_hat = (1 - math.sqrt(1 - ab) * eps_hat) / math.sqrt(ab)
            step = math.sqrt(before) * x0_hat + math.sqrt(1 - before) * eps_hat
        factor *= step
    radius = 0.2 * math.sqrt(0.3)                                                   # sigma(t)^2 = beta
    moved = (x_adv - x_T).flatten(1)
    assert (moved * torch.sign(moved @ v)[:, None]).numpy() == pytest.approx(
        (radius * v.sign()).expand(3, 12).numpy(), abs=1e-12)
    farthest = factor * radius * float(v.abs().sum())
    assert norms((x_0_of(x_adv) - x_0_of(x_T)).numpy()) == pytest.approx([farthest] * 3, rel=1e-9)


# --------------------------------------------------------------------------------------- shards and processes

def test_attack_does_not_depend_on_processes_or_interruptions(run, tmp_path, monkeypatch, two_processes):
    """Two processes, another batch, and a run that died after its second shard: the same images and the same
    numbers. Catches measures of a shard lost, counted twice or not its own, and random draws that belong to a
    process."""
    folder, results = two_processes
    assert results["attack"] == ["ok", "ok"]
    made_by(attack, run, tmp_path / "whole.npz", *TWICE)
    made_by(attack, run, tmp_path / "batch.npz", *TWICE, "--batch", 5)
    write, written = sample.Shards.write, []

    def dies(self, k, *rest):
        write(self, k, *rest)
        written.append(k)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample.Shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        made_by(attack, run, tmp_path / "died.npz", *TWICE)
    for other in (["--eot", 4], ["--phi", 2], ["--steps-attacked", "25%"]):
        with pytest.raises(UserError, match="died.npz.shards: holds shards of another run .attack: "):
            made_by(attack, run, tmp_path / "died.npz", *TWICE, *other)
    lost = tmp_path / "died.npz.shards" / "000000.json"
    lost.write_text('{"a')                                  # the images without their measures: made again
    made_by(attack, run, tmp_path / "died.npz", *TWICE)
    assert written == [0, 1, 0, 2]
    with np.load(tmp_path / "whole.npz", allow_pickle=False) as whole:
        images = whole["arr_0"]
    expected = report_of(tmp_path / "whole.npz")
    numbers = [name for name, value in expected.items() if isinstance(value, (int, float))]
    numbers.remove("seconds_per_image")
    assert len(numbers) == 15 and (expected["forwards"], expected["backwards"]) == (3, 2)
    for out in folder / "attacked.npz", tmp_path / "died.npz", tmp_path / "batch.npz":
        rounding = out.stem == "batch"                      # another batch: a sign of almost 0 can flip
        with np.load(out, allow_pickle=False) as other:
            assert other["arr_0"] == pytest.approx(images, abs=0.1 if rounding else 0)
        found = report_of(out)
        for name in numbers:
            assert found[name] == pytest.approx(expected[name], rel=0.05 if rounding else 1e-9), (out, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{end}" for name in ("whole", "batch", "died") for end in ("npz", "png", "npz.attack.json"))


# --------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("argv, expected", [
    ("--steps-attacked -1", "0 to 4"), ("--steps-attacked 5", "--steps-attacked 5: must be 0 to 4"),
    ("--steps-attacked 120%", "0 to 4"), ("--steps-attacked some", "0 to 4"),
    ("--steps-attacked nan%", "0 to 4"), ("--steps-attacked 1 --phi 0", "--phi 0.0: must be from 1e-06"),
    ("--steps-attacked 1 --iters 0", "--iters 0"),
    ("--steps-attacked 1 --eot -2", "--eot -2"), ("--steps-attacked 1 --eps-scale inf", "--eps-scale inf"),
    ("--steps-attacked 1 --stride 0", "--stride 0.0: must be from 1e-06"),
    ("--steps-attacked 12.4%", "--steps-attacked 12.4%: is less than half a step of the 4 .* at least 12.5%"),
    ("--steps-attacked=-1%", "--steps-attacked -1%: must be 0 to 4"),
    ("--steps-attacked 1 --attack eot --eot 100000", "--eot 100000: must be from 1 to 1000"),

    ("--steps-attacked 1 --attack eot --sampler ddim", "--attack eot --sampler ddim: .*--attack pgd"),
    ("--steps-attacked 1 --attack eot --sampler heun", "--attack eot --sampler heun: .*--attack pgd"),
    ("--steps-attacked 1 --as-printed", "--as-printed --attack fgsm: only pgd and eot"),
    ("--steps-attacked 1 --attack trajectory --as-printed", "--as-printed --attack trajectory: only pgd and"),
    ("--steps-attacked 1 --attack pgd --as-printed --stride 2", "--stride 2.0: .* not with --as-printed"),
    ("--steps-attacked 1 --stride 2", "--stride 2.0: is for --attack pgd, eot, trajectory, and"),
    ("--steps-attacked 1 --num-samples 0", "--num-samples 0"),
    ("--steps-attacked 1 --out a.png", "--out a.png: the name must end in .npz")])
def test_attack_refuses(argv, expected, run, tmp_path, monkeypatch, capsys):
    """Each wrong flag by its name, in one line with status 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        command_line(lambda: attack.main([str(run), "--steps", "4", *argv.split()]))
    assert leaving.value.code == 2
    assert re.fullmatch(f".*: error: .*{expected}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_steps_attacked_is_a_number_or_a_percentage():
    """By hand, on 40 steps."""
    counts = [attack.attacked_count(text, 40) for text in ("25%", "40", "0", "0%", "100%", "2.5%", "1.25%")]
    assert counts == [10, 40, 0, 0, 40, 1, 1]


@pytest.mark.parametrize("argv, expected", [
    ("fgsm --iters 20 --eot 5", {"--iters", "--eot"}), ("pgd --iters 20 --eot 5", {"--eot"}), ("fgsm", set()),
    ("eot --iters 20 --eot 5 --phi 1", set()), ("trajectory --iters 2 --stride 1 --phi 1 --eot 5", {"--eot"}),
    ("noise --phi 1 --iters 3", {"--iters", "--phi"}),
    ("drift --phi 1 --sampler ddim --variance large", {"--variance"})])
def test_flags_without_an_effect_are_said(argv, expected, capsys):
    """Only those that were given, though with the default's value."""
    attack.arguments(["RUN", "--steps-attacked", "1", "--attack", *argv.split()])
    said = capsys.readouterr().err.splitlines()
    assert {line.split(" has no effect ")[0] for line in said} == expected and len(said) == len(expected)


def test_a_report_that_cannot_be_written_is_said_before_the_work(run, tmp_path):
    """A folder in its place: catches an attack of hours without its numbers."""
    (tmp_path / "a.npz.attack.json").mkdir()
    with pytest.raises(UserError, match="--out .*a.npz.attack.json: is a folder"):
        made_by(attack, run, tmp_path / "a.npz", *COMMON, "--steps-attacked", 1)
