"""common.py: what every stage relies on."""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import torch
from PIL import Image

import common
from common import POSITIVE, UserError, atomic_write, check_ranges, generator, stream_seed

PURPOSES = "weights", "order", "flags", "train", "dropout", "sample", "attack"


# ------------------------------------------------------------------------------- errors and the command line

@pytest.fixture
def signals():
    """Gives back what `command_line` makes of the signals, the default before it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


@pytest.mark.parametrize("end, status", [(None, 0), (UserError("--p"), 2), (KeyboardInterrupt(), 130)])
def test_the_group_of_processes_is_closed(end, status, monkeypatch, signals):
    """Catches a group that is left open, however a script ends, and the interpreter's own end after it."""
    left = []

    def main():
        common.dist.init_process_group("gloo", store=common.dist.HashStore(), rank=0, world_size=1)
        if end:
            raise end
    monkeypatch.setattr(common.os, "_exit", left.append)
    try:
        with pytest.raises(SystemExit):
            common.command_line(main)
        assert left == [status] and not common.dist.is_initialized()
    finally:
        if common.dist.is_initialized():
            common.dist.destroy_process_group()


def test_command_line(monkeypatch, capsys, signals):
    """Catches a traceback for a user's mistake or another process's end, a wrong exit status, a mistake that
    all of torchrun's processes print or, where only one met it, none, and a variable left behind that makes
    errors vanish."""
    def wrong():
        raise UserError("--p is wrong")

    def stopped():
        raise KeyboardInterrupt
    waited = []
    monkeypatch.setattr(common.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    for environment, text in ({}, "--p is wrong"), (dict(RANK="1", WORLD_SIZE="2"), "--p is wrong"), (
            dict(RANK="0", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="a"), "--p is wrong"), (
            dict(RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="a"), "process 1: --p is wrong"):
        for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert not waited                                   # the last one gives the first the time to speak
        with pytest.raises(SystemExit) as leaving:
            common.command_line(wrong)
        assert leaving.value.code == 2 and capsys.readouterr().err == f"train.py: error: {text}\n"
    assert waited == [3]
    for main, status in ((stopped, 130), (lambda: sys.exit(143), 143), (lambda: None, None)):
        with pytest.raises(SystemExit) as leaving:
            common.command_line(main)
        assert leaving.value.code == status and capsys.readouterr().err == ""
    for bug in (lambda: 1 / 0, lambda: torch.zeros(2) @ torch.zeros(3)):       # it keeps its traceback
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            common.command_line(bug)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for large in (lambda: torch.empty(2**60), lambda: np.empty(2**55)):
        with pytest.raises(SystemExit) as leaving:
            common.command_line(large)
        assert leaving.value.code == 2
        assert re.fullmatch("train.py: error: out of memory: try a smaller.*\n", capsys.readouterr().err)

    def left(error):
        raise error
    for error in (RuntimeError("[/a/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1."),
                  torch.distributed.DistBackendError("NCCL error: remote process exited")):
        with pytest.raises(SystemExit) as leaving:
            common.command_line(lambda: left(error))
        assert leaving.value.code == 2
        said = "train.py: error: another process has ended or does not answer, see its message; .*\n"
        assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_clean_up(number, tmp_path, monkeypatch, capfd, signals):
    """Catches locks and partial files that a signal leaves, a second signal that ends the cleaning, an end
    without a word or with another status, and a signal answered that nohup has ignored."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/sample.py"])
    monkeypatch.delenv("RANK", raising=False)

    def main():
        with common.locked(tmp_path / "lock", ""), atomic_write(tmp_path / "a") as partial:
            partial.write_bytes(b"half")
            try:
                os.kill(os.getpid(), number)
                pytest.fail("it goes on")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        common.command_line(main)
    assert leaving.value.code == 128 + number and os.listdir(tmp_path) == []
    assert capfd.readouterr().err == f"sample.py: ended by {number.name}\n"
    signal.signal(number, signal.SIG_IGN)
    with pytest.raises(SystemExit) as leaving:
        common.command_line(lambda: os.kill(os.getpid(), number))
    assert leaving.value.code is None


@pytest.mark.parametrize("rank, world, refused", [
    (None, None, False), ("0", None, False), ("0", "1", False), (None, "1", False), ("1", "2", False),
    ("1", None, True), ("1", "1", True), ("2", "2", True), (None, "2", True), ("-1", "2", True),
    ("x", "2", True), ("0", "", True)])
def test_environment(rank, world, refused, monkeypatch):
    """Catches a process that takes itself for one of several by what another job has left, and one of several
    that is refused."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset RANK WORLD_SIZE") if refused else contextlib.nullcontext():
        common.check_environment()


def test_flags(capsys):
    """Catches usage and error from every process, a flag that is taken for a longer one, a --help that hides
    the commands."""
    parser = common.parser_of("Doc.\n\n    python a.py")
    parser.add_argument("--num-samples", type=int)
    for argv, said in [(["--num", "3"], "unrecognized arguments: --num 3; see --help"), (
            ["--num-samples", "a"], "argument --num-samples: invalid int value: 'a'; see --help")]:
        with pytest.raises(UserError, match=f"^{said}$"):
            parser.parse_args(argv)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    printed = capsys.readouterr()
    assert "    python a.py\n" in printed.out and printed.err == ""


SCRIPT = """import common
import os, signal
answers = [signal.getsignal(signal.SIGINT) == signal.SIG_DFL]

def main():
    answers.append(signal.getsignal(signal.SIGINT) == signal.default_int_handler)
    common.Progress(1).close()
    print("σ \\udcc3")
    for k in range(3):                  # the reader has left
        print("x" * 10**5)
    with open("data", "w") as data:
        print(*answers, data.fileno() > 2, file=data)
    raise common.UserError("ü \\udcc3")
common.command_line(main)
"""


@pytest.mark.parametrize("streams", ["2>&- | true", ">&- 2> err", "<&- >&- 2>&-", "> /dev/full 2> err"])
def test_streams(streams, tmp_path):
    """Catches a script that dies of a reader who has left, of closed streams, of a locale without umlauts, a
    data file that is given the number of a closed stream, another exit status for any of these, and Ctrl-C
    during the imports that is not left to the system, or main() that is not given it back."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    shutil.copy(common.__file__, tmp_path)
    (tmp_path / "torch").mkdir()                            # a stand-in: the real one takes seconds
    (tmp_path / "torch/__init__.py").write_text("")
    (tmp_path / "torch/distributed.py").write_text("is_initialized = lambda: False\n")
    locale = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    if "full" in streams and not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux's")
    done = subprocess.run(
        ["bash", "-c", f'"$0" script.py {streams}; echo "${{PIPESTATUS[0]}}" > status', sys.executable],
        cwd=tmp_path, env=os.environ | locale, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert (done.stdout, done.stderr, (tmp_path / "status").read_text()) == ("", "", "2\n")
    assert (tmp_path / "data").read_text() == "True True True\n"
    if "err" in streams:
        last = (tmp_path / "err").read_text().splitlines()[-1]
        assert last == r"script.py: error: \xfc \udcc3"


def test_common_comes_first():
    """Catches a script that imports others, which takes seconds, before common.py answers Ctrl-C; and
    common.py, as a library, that takes it from its user."""
    scripts = [file for file in Path(common.__file__).parent.glob("*.py")
               if "\n    command_line(main)\n" in file.read_text(encoding="utf-8")]
    first = {file.name: next(line for line in file.read_text(encoding="utf-8").splitlines()
                             if line.startswith(("import ", "from "))) for file in scripts}
    assert len(first) >= 8 and all(line.startswith("import common ") for line in first.values()), first
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_check_ranges():
    """Catches an end that is left out, NaN or infinity let through, 0 taken for "not given", and a message
    that names another flag or range."""
    args = SimpleNamespace(steps=0, p=1.0, lr=1e-300, seed=None)
    check_ranges(args, steps=(0, 9), p=(0, 1), lr=POSITIVE, seed=(0, 1))
    check_ranges(SimpleNamespace(n=10**400), n=(1, np.inf))
    for flag, value, limits, expected in [
            ("steps", 0, (1, np.inf), "--steps 0: must be at least 1"), ("steps", 10, (0, 9), "from 0 to 9"),
            ("p", 1.01, (0, 1), "--p 1.01: must be from 0 to 1"), ("p", -0.01, (0, 1), "from 0 to 1"),
            ("lr", 0.0, POSITIVE, "--lr 0.0: must be positive"), ("lr", np.nan, POSITIVE, "--lr nan"),
            ("lr", np.inf, POSITIVE, "--lr inf"), ("p", -np.inf, (-np.inf, 1), "--p -inf"),
            ("reg_share", 2, (0, 1), "--reg-share 2:")]:
        with pytest.raises(UserError, match=expected):
            check_ranges(SimpleNamespace(**{flag: value}), **{flag: limits})


# ----------------------------------------------------------------------------------------------------- files

def test_atomic_write(tmp_path):
    """Catches a half-written file under the final name, a temporary file left behind, a temporary name that
    numpy would add .npz to, an old partial that hurts, two writers of one file, a traceback for a folder that
    cannot be written."""
    path = tmp_path / "new" / "a.npz"
    with atomic_write(path) as partial:
        assert partial.parent == path.parent and partial.suffix == ".npz"
        np.savez(partial, x=1)
        assert not path.exists()
        with pytest.raises(UserError, match="another process"):
            with atomic_write(path):
                pass
    assert os.listdir(path.parent) == ["a.npz"]
    good = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        with atomic_write(path) as partial:
            partial.write_bytes(b"half")
            1 / 0
    assert os.listdir(path.parent) == ["a.npz"] and path.read_bytes() == good
    partial.write_bytes(b"left by a killed run" * 100)
    with atomic_write(path) as partial:
        partial.write_bytes(b"new")
    assert os.listdir(path.parent) == ["a.npz"] and path.read_bytes() == b"new"
    for bad in (path / "b.npz", path.parent, Path("/dev/null/a.npz")):
        with pytest.raises(UserError, match=f"cannot write {bad}"):
            with atomic_write(bad):
                pass


@pytest.mark.parametrize("step, number, ours", [
    ("fsync", errno.EIO, True), ("replace", errno.EACCES, True), ("fsync", errno.EINVAL, False)])
def test_errors_of_the_file_system(step, number, ours, tmp_path, monkeypatch):
    """Catches a traceback where the system refuses the file at its end, a file not written where a file
    system only has no fsync, and an error of the caller's own that is taken for one."""
    def refuse(*_):
        raise OSError(number, "no luck")
    with pytest.raises(ConnectionError), atomic_write(tmp_path / "a"):
        raise ConnectionError(number, "the caller's")
    monkeypatch.setattr(common.os, step, refuse)
    with (pytest.raises(UserError, match=f"^cannot write {tmp_path}/a: no luck$") if ours
          else contextlib.nullcontext()), atomic_write(tmp_path / "a") as partial:
        partial.write_bytes(b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if ours else [b"new"])


def test_full_disk(tmp_path):
    """Catches a traceback, or a partial file, where the disk fills up: here a file reaches its size limit."""
    (tmp_path / "a").write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*a: File too large"):
            with atomic_write(tmp_path / "a") as partial:
                partial.write_bytes(bytes(300_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_a_lock_that_cannot_be_taken_is_named(tmp_path):
    """Catches a message that names the folder, where a folder lies in the lock's place, or cannot be made."""
    (tmp_path / "taken").mkdir()
    for lock in (tmp_path / "taken", Path("/dev/null/lock")):
        with pytest.raises(UserError, match=f"^cannot write {lock}: "):
            with common.locked(lock, "never said"):
                pass


def test_write_json(tmp_path):
    """Catches NaN, which other readers of JSON refuse, in a file, and a file that it has spoilt."""
    common.write_json(tmp_path / "a.json", {"value": [1, None]})
    with pytest.raises(ValueError):
        common.write_json(tmp_path / "a.json", {"value": float("nan")})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": [1, None]}


def test_download(tmp_path):
    """Catches a download that is not verified, sources that are not tried in turn, a partial file that stays,
    a good file fetched again, and a message that does not say where to put the file."""
    content = os.urandom((1 << 21) + 100)                 # the last block is small enough to stay in a buffer
    sha, good, bad = hashlib.sha256(content).hexdigest(), tmp_path / "good", tmp_path / "bad"
    good.write_bytes(content)
    bad.write_bytes(content[:-1])
    out = tmp_path / "out" / "file.bin"
    urls = [(tmp_path / "missing").as_uri(), bad.as_uri(), good.as_uri()]
    assert common.download(urls, out, sha, len(content)) == out and out.read_bytes() == content
    good.unlink()
    assert common.download(urls, out, sha, len(content)) == out
    out.write_bytes(b"other")
    with pytest.raises(UserError, match="delete it"):
        common.download(urls, out, sha, len(content))
    assert out.read_bytes() == b"other"
    out.unlink()
    with pytest.raises(UserError) as error:
        common.download(urls, out, sha, len(content))
    assert all(text in str(error.value) for text in (*urls, str(out), sha)) and os.listdir(out.parent) == []


def test_progress(monkeypatch, capsys):
    """Catches a wrong rate or remaining time, output from every rank, and a flood of lines in a log file."""
    clock = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    progress = common.Progress(100_000, "steps", "training")
    for done in range(0, 201):
        clock[0] = 100 + done / 4
        progress.update(done, loss=0.123456)
    assert progress.rate == pytest.approx(4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and "training: 200/100,000 steps" in lines[-1] and "6:55:50 left" in lines[-1]
    assert "loss 0.1235" in lines[-1] and "4/s" in lines[-1]
    progress.close()
    assert "200 steps" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    clock[0] += 100
    progress.update(300)
    progress.close()
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------- random streams

def test_no_two_random_streams_meet():
    """Catches a purpose or seed that is a shift of another (x_T of image 5 was the noise of step 5), a seed
    cut to 32 bits (seed 2^32 was seed 0), and a change of the streams, which no old sample survives."""
    seeds = {(purpose, seed): stream_seed(purpose, seed)
             for purpose in PURPOSES for seed in [*range(100), 2**32, 2**63]}
    # A GPU's generator takes all 64 bits of the seed, a CPU's 32.
    few = [seeds[purpose, seed] for purpose in PURPOSES for seed in range(3)]
    for bits, chosen in ((64, seeds.values()), (32, few)):
        starts = sorted(seed % 2**bits for seed in chosen)
        gaps = [after - before for before, after in zip(starts, [*starts[1:], starts[0] + 2**bits])]
        assert min(gaps) > 50_000                           # images of the paper's FID
    first = [generator(purpose, 0, index).initial_seed() for purpose in PURPOSES for index in range(1000)]
    assert len(set(first)) == len(first)
    assert stream_seed("sample", 0, 5) == 2902307207075178974 + 5


# --------------------------------------------------------------------------------------- images and pictures

def test_as_bytes():
    """Catches truncation instead of rounding, a missing clip (wrap-around), NaN that becomes a grey level."""
    x = np.linspace(-1.5, 1.5, 4001)
    expected = [min(255, max(0, int(np.floor((v + 1) * 127.5 + 0.5)))) for v in x]
    assert common.as_bytes(x).tolist() == expected and common.as_bytes(x).dtype == np.uint8
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(common.as_bytes(levels.astype(np.float32) / 127.5 - 1), levels)
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="not finite"):
            common.as_bytes(np.array([0, bad]))


def test_noise_estimate():
    """Catches a wrong mask, scale, border or mean over channels: against the formula with a 2-D convolution,
    white noise of known size, and a plane (no noise)."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, [[[[0.1]], [[0.2]], [[0.3]]]], (4, 3, 40, 24))
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    scale = np.sqrt(np.pi / 2) / (6 * 38 * 22)
    expected = [np.mean([scale * np.abs(scipy.signal.convolve2d(channel, mask, "valid")).sum()
                         for channel in image]) for image in x]
    np.testing.assert_allclose(common.noise_estimate(x), expected, rtol=1e-12)
    assert abs(common.noise_estimate(rng.normal(0, 0.2, (8, 3, 64, 64))).mean() - 0.2) < 0.002
    i, j = np.mgrid[:16, :16]
    assert common.noise_estimate(np.broadcast_to(0.01 * i - 0.02 * j + 0.3, (1, 3, 16, 16)))[0] < 1e-12


def test_save_grid(tmp_path):
    """Catches rows and columns exchanged, images in the wrong order, a lossy or rescaled picture."""
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8) * 40
    for columns, name in ((3, "three.png"), (None, "square.png")):
        common.save_grid(images, tmp_path / name, columns)
        grid = np.asarray(Image.open(tmp_path / name))
        assert grid.shape == (4 * 2 + 2, 6 * 3 + 4, 3)
        for k in range(5):
            top, left = k // 3 * 6, k % 3 * 8
            assert (grid[top:top + 4, left:left + 6] == 40 * k).all()
        assert (grid[4:6] == 255).all() and (grid[6:, 16:] == 255).all()
