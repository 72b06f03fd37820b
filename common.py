"""What every stage shares: errors, files, progress, processes, random streams, pictures.

Nothing here knows a model or a data set, and nothing here imports another file of the kit.
"""

import os
import signal
import sys

if os.name != "posix" or sys.version_info < (3, 10):
    sys.exit("Linux or macOS, and Python 3.10 or newer, are needed; "
             f"this is {sys.platform}, Python {sys.version.split()[0]}")
# Imports take seconds. A script of this folder begins with this one: until `command_line` is called Ctrl-C
# ends it without a traceback. Elsewhere common.py is a library, and leaves Ctrl-C as it was.
script = getattr(sys.modules["__main__"], "__file__", None)
if (script and os.path.dirname(os.path.realpath(script)) == os.path.dirname(os.path.realpath(__file__))
        and signal.getsignal(signal.SIGINT) == signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
import io
import json
import math
import shutil
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

NOISE_BLOCK = 8                                             # steps of noise drawn at a time for one image
POSITIVE = (sys.float_info.min, math.inf)                   # a range for `check_ranges`


# -------------------------------------------------------------------------------- errors and the command line

class UserError(Exception):
    """A mistake in a flag or in a file from outside: shown as one line, without a traceback."""


def is_first_process():
    """Whether this process speaks for all of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


class Stream(io.FileIO):
    """stdout or stderr, whose reader may leave (`| head -1`) or whose disk may fill up: the text is lost
    then, and nothing else."""

    def write(self, data):
        """-> the bytes that are done with, written or lost."""
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def open_streams():
    """Gives a script stdout and stderr that take any text, in any locale, and never fail."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:       # closed (`2>&-`): a data file would be given it
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):           # not one that a test has put there
            setattr(sys, name, io.TextIOWrapper(
                io.BufferedWriter(Stream(fd, "w", closefd=False)), encoding=stream and stream.encoding,
                errors="backslashreplace", line_buffering=True))


def check_environment():
    """UserError unless RANK and WORLD_SIZE are those of one of several processes, or of one alone."""
    world = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if world == "1" else "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        found = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in ("RANK", "WORLD_SIZE"))
        raise UserError(f"{found} in the environment: there is no such process. torchrun sets both; to work "
                        "alone: unset RANK WORLD_SIZE")


def _leave(number, frame):
    """Answers a signal by SystemExit, so that locks and partial files are removed. Another one, as where a
    whole job is told and then torchrun tells its processes again, must not cut that short."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    if is_first_process():
        with contextlib.suppress(OSError):                  # print could be interrupted by itself
            os.write(2, f"{Path(sys.argv[0]).name}: ended by {signal.Signals(number).name}\n".encode())
    sys.exit(128 + number)


def _line_of(error):
    """The line for an error, or None: a bug keeps its traceback."""
    text = " ".join(str(error).splitlines())                # a file's name may have a newline
    if isinstance(error, UserError):
        return text
    if isinstance(error, dist.DistError) or "/gloo/transport/" in text:     # gloo raises a plain RuntimeError
        return ("another process has ended or does not answer, see its message; the same command goes on "
                f"({text[:150]})")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"out of memory: try a smaller --batch, or train.py's --microbatch ({text[:150]})"
    return None


def command_line(main):
    """Runs main() as a script, and exits: with status 2 and '<script>: error: <message>' on stderr for a
    UserError, with 130 for Ctrl-C, with 128 + number for SIGTERM and SIGHUP (unless ignored, as by nohup)."""
    open_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _leave)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:   # since the imports: see above
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = grouped = None
    try:
        check_environment()
        main()
    except (UserError, MemoryError, RuntimeError) as error:
        if (message := _line_of(error)) is None:
            raise
        status, who = 2, ""
        if "TORCHELASTIC_RUN_ID" in os.environ and not is_first_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)       # if the first process has met it too, it says so, and torchrun ends this one
            who = f"process {os.environ['RANK']}: "
        print(f"{Path(sys.argv[0]).name}: error: {who}{message}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second one ends what may still have to end
    except SystemExit as leaving:                           # after --help, or of a training that has saved
        status = leaving.code
    finally:
        if grouped := dist.is_initialized():
            dist.destroy_process_group()
    if grouped:                 # Once in some 100 runs the interpreter's end aborts otherwise, all work done:
        sys.stdout.flush()      # "terminate called without an active exception", by a thread of the group's.
        os._exit(status or 0)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, once from all processes."""

    def error(self, message):
        """Called by argparse, which expects that it does not return."""
        raise UserError(f"{message}; see --help")


def parser_of(doc):
    """A Parser whose --help begins with the script's docstring, which shows its commands."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def check_ranges(args, **ranges):
    """Refuses the first flag that lies outside its range, ends included: name=(low, high). A flag of None is
    not given.

    Raises UserError that names flag, value and range. NaN and infinity lie outside of every range.
    """
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and abs(value) < math.inf):
            wanted = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be "
                            f"{'positive' if (low, high) == POSITIVE else wanted}")


# ------------------------------------------------------------------------------------------------------ files

def _take(lock):
    """Whether this process now has the lock of an open file; it has where the file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary Path in the same folder, with the same suffix. On success it is fsynced and becomes
    `path` in one step; on an exception it is removed; what a killed run leaves is overwritten by the next.
    UserError if the folder or the file cannot be written, the disk is full, or another process is writing the
    same file; other errors of the caller's own pass."""
    path = Path(path)
    partial = path.with_name(".partial-" + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        lock = open(partial, "ab")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with lock:                                             # the lock ends with the process, however that ends
        if not _take(lock):
            raise UserError(f"cannot write {path}: another process is writing it")
        written = False
        try:
            yield partial
            written = True
            with open(partial, "rb") as file:
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP):    # some file systems have none
                        raise
            os.replace(partial, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
            if isinstance(error, OSError) and (written or error.errno in full):
                raise UserError(f"cannot write {path}: {error.strerror}") from error
            raise


@contextlib.contextmanager
def locked(file, message, wait=False):
    """One process at a time is inside, for the same file, until it leaves or ends in any way. Another one
    waits, saying the message, or is refused with it as UserError. The file is removed, and its folder where
    that was made for it and is empty. Where the file system has no locks, nobody is kept out.
    """
    file, lock, said = Path(file), None, False
    new = not file.parent.exists()
    while lock is None or not os.fstat(lock.fileno()).st_nlink:    # the one before removed what we waited for
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = open(file, "ab")
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from error
        if not _take(lock):
            if not wait:
                lock.close()
                raise UserError(message)
            if not said:                                    # where several wait, it can be taken again
                print(message, file=sys.stderr, flush=True)
            said = True
            fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if new:
                with contextlib.suppress(OSError):          # it is not empty
                    file.parent.rmdir()


def check_out(path, flag="--out"):
    """Refuses, before the work, a file that could not be written after it: UserError names flag and
    reason."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{flag} {path}: is a folder; a file's name is needed")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:                                # a name that is too long
        raise UserError(f"{flag} {path}: {error.strerror}") from error
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: the folder {folder} cannot be written")


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


def write_json(path, value):
    """Writes a value as JSON, atomically. ValueError where it holds a NaN or an infinity, which are not
    JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def protocol_in(archive):
    """The protocol in an .npz, open as a ZipFile: how its images were made, as a dict. An exception of any
    kind where it has none, or none of ours: over 1 MB, no JSON object, numbers that are not finite."""
    member = archive.getinfo("protocol.npy")
    if member.file_size > 1 << 20:
        raise ValueError(f"a protocol of {member.file_size:,} bytes")
    with archive.open(member) as file:
        content = io.BytesIO(file.read(1 << 20))            # the header may lie
    protocol = json.loads(str(np.lib.format.read_array(content, allow_pickle=False)))
    if not isinstance(protocol, dict):
        raise ValueError("its protocol is not a JSON object")
    json.dumps(protocol, allow_nan=False)                   # results, which repeat it, are strict JSON
    return protocol


def sha256_of(path):
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(urls, path, sha256, size):
    """Fetches a file of `size` bytes with a known SHA-256 from the first of `urls` that has it, unless `path`
    is that file already. -> its Path. UserError names all the sources and where to put the file by hand."""
    path, failures = Path(path), []
    if path.exists():
        if sha256_of(path) == sha256:
            return path
        raise UserError(f"{path} is not the file expected (its sha256 is not {sha256}): delete it")
    for url in urls:
        try:
            with (atomic_write(path) as partial, open(partial, "wb") as file,
                  urllib.request.urlopen(url, timeout=30) as answer):
                progress = Progress(size // 1_000_000, "MB", f"download {path.name}")
                while file.tell() <= size and (block := answer.read(1 << 20)):
                    file.write(block)
                    progress.update(file.tell() // 1_000_000)
                file.flush()
                if sha256_of(partial) != sha256:
                    raise ValueError(f"{file.tell():,} bytes, not the {size:,} with the right sha256")
                progress.close()
            return path
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error or type(error).__name__}")
    raise UserError(f"could not download {path.name} ({'; '.join(failures)}). Fetch it by hand from one of "
                    f"these sources and put it at {path} (sha256 {sha256})")


class Progress:
    """Progress on stderr with rate and remaining time: in place every 0.5 s on a terminal, else a line every
    10 s. Silent in all processes but the first."""

    def __init__(self, total, unit="images", label=""):
        self.total, self.unit, self.label, self.done = total, unit, label, 0
        self.begin = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    @property
    def rate(self):
        """Units per second so far."""
        return self.done / max(time.monotonic() - self.begin, 1e-9)

    def _show(self, text, end="\n"):
        if is_first_process():
            print(f"\r\x1b[K{text}" if self.terminal else text, end=end, file=sys.stderr, flush=True)

    def update(self, done, **values):
        """`done` units are finished; `values` (name=number or text) are shown beside."""
        self.done = done
        if time.monotonic() - self.shown >= (0.5 if self.terminal else 10):
            self.shown, left = time.monotonic(), int((self.total - done) / max(self.rate, 1e-9))
            shown = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.values()]
            extra = "".join(f"  {name} {text}" for name, text in zip(values, shown))
            self._show(f"{self.label}: {done:,}/{self.total:,} {self.unit}  {self.rate:.4g}/s  "
                       f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left{extra}",
                       end="" if self.terminal else "\n")

    def close(self):
        """Shows the final line."""
        seconds = time.monotonic() - self.begin
        self._show(f"{self.label}: {self.done:,} {self.unit}, {self.rate:.4g}/s, {seconds:.1f} s")


# -------------------------------------------------------------------------------------------------- processes

def start_processes(join=True, tf32=True):
    """-> rank, world, device, tf32 of this process: one process as it stands, or one of torchrun's.

    join: whether torchrun's processes form a group, as collectives need. tf32: whether a GPU may multiply in
    TF32; what is returned says whether it does, for the protocol. UserError where srun has started several
    tasks that do not know of each other.
    """
    number, tasks = os.environ.get("SLURM_PROCID", "0"), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and (number, tasks) != ("0", "1"):         # a batch script is task 0 of 1
        raise UserError(f"this is task {number} of several that srun has started, and without RANK and "
                        "WORLD_SIZE each of them would work alone: let srun start one torchrun a node, or "
                        "set RANK=0 WORLD_SIZE=1 to work alone")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
        if not (local.isdecimal() and int(local) < count):
            raise UserError(f"LOCAL_RANK={local}: there are {count} GPUs here, for as many processes")
        device = torch.device("cuda", int(local))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    if join and world > 1 and not dist.is_initialized():
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        if "TORCHELASTIC_RUN_ID" not in os.environ:         # nobody has seen to it that all are there
            print(f"process {rank} of {world}: waits for the others at {where}", file=sys.stderr, flush=True)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:         # variables that are missing; nobody there
            raise UserError(f"RANK={rank} WORLD_SIZE={world}: found no other process at {where} "
                            f"({str(error).splitlines()[0]}); torchrun starts them all") from error
    return SimpleNamespace(rank=rank, world=world, device=device, tf32=tf32 and device.type == "cuda")


def gather(value):
    """The `value` of every process, in order of rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """The `value` of the first process, in every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_sum(tensor):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def together(work):
    """work() in every process -> what it gives here; a UserError in one is raised in all, so that none waits
    for one that has gone."""
    mistake = result = None
    try:
        result = work()
    except UserError as error:
        mistake = str(error)
    for mistake in gather(mistake):
        if mistake:
            raise UserError(mistake)
    return result


# --------------------------------------------------------------------------------------------- random streams

@functools.lru_cache(maxsize=4096)
def _stream_of(purpose, seed):
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest(), "big")


def stream_seed(purpose, seed, index=0):
    """A 64-bit seed for the random stream number `index` (an image, a training step) of a purpose and a
    user's seed.

    Purposes and seeds are hashed, so that none is a shift of another; within one, no two indices share a
    stream.
    """
    return (_stream_of(purpose, seed) + index) % 2**64


def generator(purpose, seed, index=0, device="cpu"):
    """The random generator of `stream_seed`. The CPU's takes the lower 32 bits: there the streams of 50,000
    images of two seeds overlap with a probability of 2e-5."""
    return torch.Generator(device).manual_seed(stream_seed(purpose, seed, index))


def image_noise(purpose, seed, indices, shape, device="cpu"):
    """Yields standard normal tensors [B, *shape] without end, row k a function of (purpose, seed, indices[k])
    alone.

    Of the sampler's stream the first is x_T, the next are the z of one step after the other.
    """
    generators = [generator(purpose, seed, index, device) for index in indices]
    while True:
        draws = [torch.randn(NOISE_BLOCK, *shape, generator=g, device=device) for g in generators]
        yield from torch.stack(draws, dim=1)


# ---------------------------------------------------------------------------------------- images and pictures

def as_bytes(x):
    """Images in [-1, 1], any shape, to uint8: round((x + 1) * 127.5), clipped. Truncation would darken them.
    UserError if a value is not finite."""
    x = np.asarray(x, dtype=np.float32)
    if not np.isfinite(x).all():
        raise UserError("the images hold values that are not finite (NaN or infinity)")
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def save_grid(images, path, columns=None):
    """Writes uint8 images [N, H, W, 3] as one PNG, row by row, `columns` to a row (default: about square)."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        grid[top:top + height, left:left + width] = image
    with atomic_write(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


def noise_estimate(images):
    """Noise deviation of each image (Immerkaer 1996), in the units of the pixels: array or tensor [N, 3, H,
    W] -> [N].

    The mask [[1,-2,1],[-2,4,-2],[1,-2,1]] does not see smooth structure. Its mean absolute response is scaled
    to be the deviation if the image is white Gaussian noise, and averaged over the channels. Texture counts
    as noise. NaN for images below 3 x 3."""
    x = 1.0 * images                                        # bytes become floats
    x = x[..., :-2, :] - 2 * x[..., 1:-1, :] + x[..., 2:, :]
    x = x[..., :-2] - 2 * x[..., 1:-1] + x[..., 2:]         # [N, 3, H-2, W-2]
    return math.sqrt(math.pi / 2) / 6 * abs(x).mean(axis=(1, 2, 3))


def pyplot():
    """matplotlib's pyplot, for drawing into files; None, said in one line, where matplotlib is not
    installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        return plt
    except ImportError:
        print("no figures: matplotlib is not installed (pip install matplotlib)")
        return None


def save_figure(figure, path):
    """Writes a matplotlib figure as PNG of 256 colours, atomically, and closes it. -> the path."""
    from matplotlib import pyplot as plt                    # installed, or there would be no figure
    figure.savefig(drawn := io.BytesIO(), dpi=110)
    plt.close(figure)
    with Image.open(drawn) as picture, atomic_write(path) as temporary:
        few = picture.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(temporary, format="PNG", optimize=True)
    return path
