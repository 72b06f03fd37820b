"""Data sets: prepared once into one .npy file, then read through a memory map and corrupted while reading.

    python data.py cifar10                                  # downloads 170 MB; data/cifar10-32.npy and .json
    python data.py cifar10 --split test                     # data/cifar10-test-32.npy, opened as --data cifar10-test
    python data.py celeba --src img_align_celeba.zip        # centre crop 140, then 64
    python data.py lsun_bedroom --src bedroom.zip           # 256
    python data.py imagenet64 --src Imagenet64_train_npz/   # train_data_batch_*.npz, or a folder or zip of images
    python data.py mine --src photos/ --size 64             # any folder, zip or uncompressed tar of images
    python data.py shapes                                   # drawn here, nothing to download
    python data.py subspace --images shapes                 # linearised images, whose distribution is known exactly
"""
import argparse
import collections
import colorsys
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = dict(cifar10=32, celeba=64, lsun_bedroom=256, imagenet64=64, butterflies=32, shapes=32, subspace=32)
CIFAR10 = dict(urls=["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"], size=170_052_171,
               sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
BY_HAND = {  # what a script cannot fetch, and where it is
    "celeba": "img_align_celeba.zip from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "lsun_bedroom": "the 303,125-image sample (a zip) from https://www.kaggle.com/datasets/jhoward/lsun_bedroom",
    "imagenet64": "the 64 x 64 .npz files (or the original images) from https://image-net.org, after signing in",
    "butterflies": "huggan/smithsonian_butterflies_subset from https://huggingface.co, as image files, not parquet",
}
SUFFIXES, FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"), ("JPEG", "PNG", "WEBP", "BMP", "PPM")
MAX_PIXELS, MAX_BYTES = 1 << 26, 1 << 28  # one image with more than 67 megapixels or 268 MB is refused, not decoded
MAX_BROKEN = 100  # without --skip-broken, stop looking for more


# 1. Errors, files, progress ------------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake in a flag or in a file from outside: shown as one line, without a traceback."""


def _is_first_process():
    return os.environ.get("RANK", "0") == "0"


def command_line(main):
    """Run main(). UserError: '<script>: error: <message>' on stderr (under torchrun by rank 0 only), exit status 2.
    Ctrl-C: exit status 130."""
    try:
        main()
    except UserError as error:
        if _is_first_process():
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary Path in the same folder, with the same suffix. On success it is fsynced and becomes `path` in
    one step; on an exception it is removed; what a killed run leaves is overwritten by the next. UserError if the
    folder cannot be written, the disk is full, or another process is writing the same file."""
    path = Path(path)
    partial = path.with_name(".partial-" + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        lock = open(partial, "ab")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with lock:  # the lock ends with the process, however that ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"cannot write {path}: another process is writing it") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"cannot write {path}: {error.strerror}") from error
            raise


def sha256_of(path):
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(urls, path, sha256, size):
    """Fetch a file of `size` bytes with a known SHA-256 from the first of `urls` that has it, unless `path` is that
    file already. Returns the Path. UserError names all the sources and where to put the file by hand."""
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
    raise UserError(f"could not download {path.name} ({'; '.join(failures)}). Fetch it by hand from one of these "
                    f"sources and put it at {path} (sha256 {sha256})")


class Progress:
    """Progress on stderr with rate and remaining time: in place every 0.5 s on a terminal, else a line every 10 s.
    Silent in all processes but the first."""

    def __init__(self, total, unit="images", label=""):
        self.total, self.unit, self.label, self.done = total, unit, label, 0
        self.begin = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    @property
    def rate(self):
        """Units per second so far."""
        return self.done / max(time.monotonic() - self.begin, 1e-9)

    def _show(self, text, end="\n"):
        if _is_first_process():
            print(f"\r\x1b[K{text}" if self.terminal else text, end=end, file=sys.stderr, flush=True)

    def update(self, done, **values):
        """`done` units are finished; `values` (name=number or text) are shown beside."""
        self.done = done
        if time.monotonic() - self.shown >= (0.5 if self.terminal else 10):
            self.shown, left = time.monotonic(), int((self.total - done) / max(self.rate, 1e-9))
            extra = "".join(f"  {k} {v:.4g}" if isinstance(v, float) else f"  {k} {v}" for k, v in values.items())
            self._show(f"{self.label}: {done:,}/{self.total:,} {self.unit}  {self.rate:.4g}/s  {left // 3600}:"
                       f"{left // 60 % 60:02}:{left % 60:02} left{extra}", end="" if self.terminal else "\n")

    def close(self):
        """Show the final line."""
        self._show(f"{self.label}: {self.done:,} {self.unit}, {self.rate:.4g}/s, {time.monotonic() - self.begin:.1f} s")


def as_bytes(x):
    """Images in [-1, 1], any shape, to uint8: round((x + 1) * 127.5), clipped. Truncation would darken them.
    UserError if a value is not finite."""
    x = np.asarray(x, dtype=np.float32)
    if not np.isfinite(x).all():
        raise UserError("the images hold values that are not finite (NaN or infinity)")
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def save_grid(images, path, columns=None):
    """Write uint8 images [N, H, W, 3] as one PNG, row by row, `columns` to a row (default: about square)."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    grid = np.full((math.ceil(count / columns) * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        grid[top:top + height, left:left + width] = image
    with atomic_write(path) as partial:
        Image.fromarray(grid).save(partial, format="PNG")


def noise_estimate(images):
    """Noise standard deviation of each image (Immerkaer 1996), in the units of the pixels: array or tensor [N, 3, H, W] -> [N].

    The mask [[1,-2,1],[-2,4,-2],[1,-2,1]] does not see smooth structure. Its mean absolute response is scaled to be the
    standard deviation if the image is white Gaussian noise, and averaged over the channels. Texture counts as noise."""
    x = 1.0 * images                                 # bytes become floats
    x = x[..., :-2, :] - 2 * x[..., 1:-1, :] + x[..., 2:, :]
    x = x[..., :-2] - 2 * x[..., 1:-1] + x[..., 2:]  # [N, 3, H-2, W-2]
    return math.sqrt(math.pi / 2) / 6 * abs(x).mean(axis=(1, 2, 3))


# 2. A prepared data set ----------------------------------------------------------------------------------------------

def _files(name, size, folder):
    return [Path(folder) / f"{name}-{size}{end}" for end in (".npy", ".json", "-truth.npz")]


class Images:
    """A prepared data set [N, 3, H, W], read through a memory map, with the corruption of the paper's Table 2.

    y = x + sigma z in [-1, 1] units, not clipped and not quantised, for a share p of the images. The coin and
    z ~ N(0, 1) belong to the image: they depend on (data_seed, image index) and nothing else, so every epoch and
    process reads the same bytes, and the images corrupted at p = 0.5 are among those corrupted at p = 0.9.

    Attributes: name, size, shape (3, H, W), array (uint8; float32 for subspace), low and high (range of the clean data,
    to which x0 is clamped), info (the .json file). size None means the paper's size. UserError if the data set is not
    prepared or is damaged, or if p, sigma or data_seed is out of range. Threads may share an object."""

    def __init__(self, name, size=None, data_dir="data", p=0.0, sigma=0.0, data_seed=0):
        if not (0 <= p <= 1 and 0 <= sigma < math.inf and data_seed >= 0):
            raise UserError(f"--p {p} --sigma {sigma} --data-seed {data_seed}: p is a share from 0 to 1, sigma a "
                            "standard deviation in [-1, 1] pixel units, the seed not negative")
        base, split = re.fullmatch("(.*?)(?:-(test|val))?", name).groups()
        size = size or SIZES.get(base)
        if not size:
            raise UserError(f"--data {name}: --size is needed (only {', '.join(SIZES)} have a size of their own)")
        self.name, self.size, self.shape, self.p, self.sigma, self.data_seed = name, size, (3, size, size), p, sigma, data_seed
        array, info, self._truth = _files(name, size, data_dir)
        if not (array.exists() and info.exists()):
            src = "" if base in ("cifar10", "shapes", "subspace") else " --src FOLDER_OR_ARCHIVE"
            raise UserError(f"{array} is not prepared: run python data.py {base}{src} --size {size}"
                            f"{f' --split {split}' if split else ''} --out {data_dir}")
        try:
            self.info = json.loads(info.read_text())
            self.array = np.lib.format.open_memmap(array, mode="r")
            self.low, self.high = float(self.info["low"]), float(self.info["high"])
            found = (str(self.array.dtype), *self.array.shape)
            stated = (self.info["dtype"], self.info["count"], *self.shape)
            if found != stated:
                raise ValueError(f"{found} instead of {stated}")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"{array} or {info.name} is damaged ({error}): delete both, prepare them again") from error
        # Four random words an image, row i a function of (data_seed, i) alone: three start its noise, one is its coin.
        self._words = np.random.Philox(data_seed).random_raw(4 * len(self.array)).reshape(-1, 4)

    def __len__(self):
        return len(self.array)

    def corrupted(self, indices):
        """The coins of the images at `indices` [B], True for a share p: bool [B]."""
        return (self._words[indices, 3] >> np.uint64(11)) * 2.0 ** -53 < self.p

    def read(self, indices):
        """The images at `indices` [B] as float32 [B, 3, H, W] in [-1, 1] (subspace: its own units), corrupted."""
        indices = np.asarray(indices)
        x = self.array[indices]  # [B, 3, H, W]
        if x.dtype == np.uint8:
            x = x.astype(np.float32)
            x -= 127.5
            x /= 127.5
        rows = np.flatnonzero(self.corrupted(indices)) if self.sigma else ()
        if not len(rows):
            return x
        # Starting one generator anew takes 3 us an image, making a new one 55 (the noise itself: 42). SFC64 counts its
        # steps in its state: streams that start at the same count never meet unless they are the same from the start.
        bits, z = np.random.SFC64(0), np.empty(self.shape, np.float32)
        normal, state = np.random.Generator(bits).standard_normal, bits.state
        starts = self._words[indices[rows]]  # [rows, 4]
        starts[:, 3] = 1  # the count
        for row, start in zip(rows, starts):
            state["state"]["state"] = start
            bits.state = state
            normal(dtype=np.float32, out=z)
            z *= self.sigma
            x[row] += z
        return x

    def truth(self):
        """The distribution of a subspace data set, x = mean + (a * scale) @ components with a ~ N(0, 1): a dict of
        float64 mean [D], components [k, D] (orthonormal rows) and scale [k], D = 3 H W. UserError for other sets."""
        try:
            with np.load(self._truth, allow_pickle=False) as file:
                return {key: file[key] for key in ("mean", "components", "scale")}
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"--data {self.name}: the distribution of subspace only is known ({error})") from error


# 3. The sources: generators of the number of images, then of (name, payload) -----------------------------------------

def _image_files(src, split):
    """A folder, zip or tar. Payload: path, bytes, or the error in their place. Nothing is unpacked to disk: the names
    in an archive are only labels."""
    try:
        if src.is_dir():
            found = (Path(folder, file) for folder, _, files in os.walk(src) for file in files)
            members, read = {path.relative_to(src).as_posix(): (0, str(path)) for path in found}, str
        elif zipfile.is_zipfile(src):
            archive = zipfile.ZipFile(src)
            members, read = {m.filename: (m.file_size, m) for m in archive.infolist()}, archive.read
        else:
            archive = tarfile.open(src, "r:")  # a compressed one could not be read in the order of the names
            members = {m.name: (m.size, m) for m in archive if m.isreg()}
            read = lambda member: archive.extractfile(member).read()  # noqa: E731
    except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
        raise UserError(f"--src {src} is not a folder, a whole zip or a whole uncompressed tar ({error})") from error
    hidden = re.compile(r"(^|/)(\.[^./]|__MACOSX/)")
    names = sorted(name for name in members if name.lower().endswith(SUFFIXES) and not hidden.search(name))
    if not names:
        raise UserError(f"--src {src} holds no images ({' '.join(SUFFIXES)})")
    folders = {part for name in names for part in name.split("/")[:-1]} & {"train", "test", "val"}
    if folders or split != "train":
        names = [name for name in names if split in name.split("/")[:-1]]
        if not names:
            raise UserError(f"--src {src} has no folder {split!r} of images, only {sorted(folders) or 'others'}")
    yield len(names)
    for name in names:
        size, member = members[name]
        try:
            yield name, read(member) if size <= MAX_BYTES else ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        except Exception as error:  # zipfile and tarfile raise almost anything on a damaged member
            yield name, error


def _cifar10_records(src, split):
    """The binary version of CIFAR-10, a tar archive. Payload: uint8 [3, 32, 32] (after a label byte in the file)."""
    wanted = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    try:
        with tarfile.open(src, "r:*") as archive:
            blobs = {Path(member.name).name: archive.extractfile(member).read() for member in archive
                     if member.isreg() and Path(member.name).name in wanted and member.size <= MAX_BYTES}
    except Exception as error:  # tarfile raises almost anything on a damaged archive
        raise UserError(f"--src {src} is neither a folder nor a whole zip or tar archive ({error})") from error
    for name in wanted:
        if len(blobs.get(name, "")) != 10_000 * 3073:
            raise UserError(f"--src {src}: {name} has {len(blobs.get(name, '')):,} bytes, not 30,730,000; needed is "
                            "cifar-10-binary.tar.gz (not the python or matlab version), or images")
    yield 10_000 * len(wanted)
    for name in wanted:
        for i, record in enumerate(np.frombuffer(blobs[name], np.uint8).reshape(-1, 3073)):
            yield f"{name} record {i}", record[1:].reshape(3, 32, 32)


def _npz_rows(files):
    """Downsampled ImageNet. Payload: uint8 [3, 64, 64], a row of `data`; streamed, for a file unpacks to 1.6 GB."""
    streams = []
    for file in files:
        try:
            stream = zipfile.ZipFile(file).open("data.npy")
            np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if dtype != np.uint8 or fortran or shape[1:] != (12288,) or shape[0] < 1:
                raise ValueError(f"`data` is {dtype} {shape}, not uint8 [N, 12288]")
        except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        streams.append((file.name, stream, shape[0]))
    yield sum(rows for _, _, rows in streams)
    for name, stream, rows in streams:
        for row in range(rows):
            try:
                yield f"{name} row {row}", np.frombuffer(stream.read(12288), np.uint8).reshape(3, 64, 64)
            except Exception as error:  # zipfile raises almost anything on a damaged member
                yield f"{name} row {row}", error


def _decode(item, size, crop):
    """(name, payload) -> uint8 [3, S, S]: the centre square (of `crop` pixels, else the largest), box-downsampled. What
    is transparent becomes white; EXIF rotation is ignored, as is usual for these data sets. UserError if unusable."""
    name, payload = item
    try:
        if isinstance(payload, Exception):
            raise payload
        if isinstance(payload, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(payload.transpose(1, 2, 0)))
        else:
            image = Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
        side = crop or min(width, height)
        if not size <= side <= min(width, height):
            raise ValueError(f"{width} x {height} pixels, {side} used, are too few for --size {size}")
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        # In float, because Pillow rounds bytes up after each of its two passes: half a level too bright at 32 -> 16.
        channels = [channel.convert("F").resize((size, size), Image.Resampling.BOX, box)
                    for channel in image.convert("RGB").split()]
        return np.rint(channels).astype(np.uint8)
    except Exception as error:  # Pillow raises almost anything on a broken file
        raise UserError(f"{name!r} ({error or type(error).__name__})") from error


def _draw_shapes(item, size):
    """(seed, i) -> image i of the shapes data set, uint8 [3, S, S]: one to three flat shapes with soft edges on a
    smooth gradient. There is no texture, so that the noise a model leaves can be seen and measured."""
    rng = np.random.default_rng(item)
    y, x = (np.mgrid[:size, :size] + 0.5) / size  # the scene does not depend on the size
    hue, turn, bright = rng.uniform(), rng.uniform(0, 2 * math.pi), rng.choice([0.3, 0.95])
    first, last = [np.array(colorsys.hsv_to_rgb((hue + shift) % 1, 0.45, bright * rng.uniform(0.75, 1)))
                   for shift in (0, rng.uniform(-0.15, 0.15))]
    ramp = 0.5 + ((x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)) / math.sqrt(2)  # [S, S] in 0 ... 1
    image = first + (last - first) * ramp[..., None]  # [S, S, 3] in 0 ... 1
    for _ in range(rng.integers(1, 4)):
        dx, dy, radius = x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8), rng.uniform(0.13, 0.28)
        sides, turn = rng.choice([0, 0, 3, 4, 5, 6]), rng.uniform(0, 2 * math.pi)
        angles = turn + 2 * math.pi * np.arange(sides)[:, None, None] / max(sides, 1)
        edge = (np.cos(angles) * dx + np.sin(angles) * dy).max(axis=0) - radius * math.cos(math.pi / sides) if sides \
            else np.hypot(dx, dy) - radius  # distance to the outline, negative inside
        cover = np.clip(0.5 - edge * size / 3, 0, 1)[..., None]  # three pixels wide
        colour = colorsys.hsv_to_rgb((hue + rng.uniform(0.2, 0.8)) % 1, rng.uniform(0.55, 0.9), rng.uniform(0.65, 1))
        image += (np.array(colour) - image) * cover * cover * (3 - 2 * cover)
    return np.rint(image * 255).astype(np.uint8).transpose(2, 0, 1)


# 4. Preparing: decode in parallel, write in order ---------------------------------------------------------------------

def _start_worker():
    """A worker ends with its parent, however that ends; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _run(work, items):
    """(number of items, array [b, 3, S, S] of the good ones, descriptions of the broken ones)."""
    done, broken = [], []
    for item in items:
        try:
            done.append(work(item))
        except UserError as error:
            broken.append(str(error))
    return len(items), np.array(done), broken


def _blocks(work, items, size, workers):
    """_run over all items, in order, in parallel, with few chunks in memory at a time."""
    length, pending = max(1, min(64, (1 << 21) // (3 * size * size))), collections.deque()
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        while (chunk := list(itertools.islice(items, length))) or pending:
            if chunk:
                pending.append(pool.submit(_run, work, chunk))
            if not chunk or len(pending) > 2 * workers:
                yield pending.popleft().result()


def _subspace_blocks(images, components, n, seed, truth):
    """The linearised images of the paper's "in vitro" analysis: PCA of `images`, then n draws of
    x = mean + sum_i scale_i a_i U_i, a ~ N(0, 1), in float32 blocks like _run's. mean, U, scale go to file `truth`."""
    count, width, total, square = len(images), math.prod(images.shape), 0.0, 0.0
    progress = Progress(count, "images", f"PCA of {images.name}")
    for start in range(0, count, 1000):
        x = images.read(np.arange(start, min(start + 1000, count))).reshape(-1, width).astype(np.float64)  # [b, D]
        total, square = total + x.sum(axis=0), square + x.T @ x  # [D], [D, D]
        progress.update(start + len(x))
    progress.close()
    mean = total / count
    variance, vectors = np.linalg.eigh(square / count - np.outer(mean, mean))  # ascending
    variance = variance.clip(0)  # rounding can leave a null direction slightly negative
    scale, basis = np.sqrt(variance[:-components - 1:-1]), vectors.T[:-components - 1:-1]  # [k], [k, D]
    with atomic_write(truth) as partial:
        np.savez(partial, mean=mean, components=basis, scale=scale)
    print(f"{truth}: {components} of {width:,} components, {(scale ** 2).sum() / variance.sum():.1%} of the variance")
    rng = np.random.default_rng(seed)
    for start in range(0, n, 1000):
        a = rng.standard_normal((min(1000, n - start), components))
        yield len(a), (mean + (a * scale) @ basis).astype(np.float32).reshape(-1, *images.shape), []


def _write(path, blocks, dtype, count, size, skip_broken=False):
    """Write blocks (see _run) as one .npy file and return what the .json says of it. UserError if the disk is too small
    or, without skip_broken, an item is broken."""
    def header(rows):  # numpy pads it to one length whatever the count, so that it can be written again at the end
        facts = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=(rows, 3, size, size))
        np.lib.format.write_array_header_1_0(file, facts)

    digest, broken, seen, kept, low, high = hashlib.sha256(), [], 0, 0, math.inf, -math.inf
    with atomic_write(path) as partial, open(partial, "wb") as file:
        needed, free = count * 3 * size * size * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
        if needed > free:
            raise UserError(f"{path} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        header(count)
        progress = Progress(count, "images", path.stem)
        for number, block, bad in blocks:
            seen, kept, broken = seen + number, kept + len(block), broken + bad
            if len(block):
                file.write(block)
                digest.update(block)
                low, high = min(low, float(block.min())), max(high, float(block.max()))
            progress.update(seen)
            if len(broken) >= MAX_BROKEN and not skip_broken:
                break
        some = ", ".join(broken[:5] + ["..."] * (len(broken) > 5))
        problem = f"{len(broken):,} of {seen:,} images are unusable: {some}"
        if broken and not (skip_broken and kept):
            raise UserError(f"{problem}. Repair or remove them{', or leave them out with --skip-broken' * bool(kept)}")
        file.seek(0)
        header(kept)
        progress.close()
    if broken:
        print(problem, file=sys.stderr)
    low, high = (-1.0, 1.0) if dtype == "uint8" else (low, high)
    return dict(count=kept, dtype=dtype, low=low, high=high, sha256=digest.hexdigest(), left_out=len(broken))


# 5. The command line -------------------------------------------------------------------------------------------------

def _arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"{', '.join(SIZES)}, or a name of your own with --src and --size")
    parser.add_argument("--src", type=Path, help="folder, zip or tar of images, or the data set's own files "
                        "(default: cifar10 is downloaded, shapes and subspace are drawn)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: the paper's)")
    parser.add_argument("--split", choices=["train", "test", "val"], help="the part of --src to take; test and val "
                        "are saved as NAME-test and NAME-val (default: train, or all if --src has no such folders)")
    parser.add_argument("--n", type=int, help="shapes, subspace: number of images (default: 10000, 50000)")
    parser.add_argument("--seed", type=int, help="shapes, subspace: seed of the drawing (default: 0)")
    parser.add_argument("--images", help="subspace: the prepared data set to linearise (default: shapes)")
    parser.add_argument("--components", type=int, help="subspace: number of principal components (default: 25)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for the result (default: data)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that are broken or too small")
    args = parser.parse_args(arguments)
    linear = args.name == "subspace"
    drawn = linear or args.name == "shapes"
    for flag, fits, least in (("src", not drawn, None), ("split", not drawn, None), ("size", True, 1), ("n", drawn, 1),
                              ("seed", drawn, 0), ("images", linear, None), ("components", linear, 1),
                              ("workers", True, 1)):
        value = getattr(args, flag)
        if value is not None and not fits:
            raise UserError(f"--{flag} is not for {args.name}")
        if value is not None and least is not None and value < least:
            raise UserError(f"--{flag} is at least {least}, not {value}")
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise UserError(f"name {args.name!r}: only letters, digits, '_', '-' and '.', as it becomes a file name")
    if args.name not in SIZES and not (args.src and args.size):
        raise UserError(f"{args.name!r} is none of {', '.join(SIZES)}; a data set of your own needs --src and --size")
    if args.name == "cifar10" and args.split == "val":
        raise UserError("--split val: cifar10 has train and test only")
    if args.src and not args.src.exists():
        raise UserError(f"--src {args.src} does not exist")
    return args


def _label(src):
    return src.resolve().name + (f", {src.stat().st_size:,} bytes" if src.is_file() else "")


def main(arguments=None):
    """Prepare one data set, unless it is there with the same settings."""
    args = _arguments(arguments)
    size, split = args.size or SIZES[args.name], args.split or "train"
    name = args.name if split == "train" else f"{args.name}-{split}"
    array, info, truth = _files(name, size, args.out)
    settings = dict(name=name, size=size, split=split)
    if args.name in ("shapes", "subspace"):
        settings.update(n=args.n or {"shapes": 10_000, "subspace": 50_000}[name], seed=args.seed or 0, source="drawn")
    if args.name == "subspace":
        settings.update(components=args.components or 25, source=args.images or "shapes")
    if args.src:
        settings["source"] = _label(args.src)
    if array.exists() and info.exists():
        images = Images(name, size, args.out)
        differ = [f"{key} {images.info.get(key)!r}, now {value!r}" for key, value in settings.items()
                  if images.info.get(key) != value]
        if differ:
            raise UserError(f"{array} was made with {'; '.join(differ)}: delete it and {info}, or choose another --out")
        print(f"{array} is there: {len(images):,} images (source: {images.info['source']})")
        return
    if args.name == "subspace":
        if size > 32:
            raise UserError(f"--size {size}: at most 32 for subspace, whose PCA is of a (3 size size)^2 matrix")
        if settings["source"] == "shapes" and not _files("shapes", size, args.out)[1].exists():
            main(["shapes", "--size", str(size), "--out", str(args.out), "--workers", str(args.workers)])
        images = Images(settings["source"], size, args.out)
        if settings["components"] >= min(len(images), 3 * size * size):
            raise UserError(f"--components {settings['components']}: must be fewer than the {len(images):,} images of "
                            f"{images.name} and their {3 * size * size:,} values")
        blocks = _subspace_blocks(images, settings["components"], settings["n"], settings["seed"], truth)
        facts = _write(array, blocks, "float32", settings["n"], size)
    else:
        work = functools.partial(_decode, size=size, crop=140 if args.name == "celeba" else None)
        if args.name == "shapes":
            work = functools.partial(_draw_shapes, size=size)
            items = itertools.chain([settings["n"]], ((settings["seed"], i) for i in range(settings["n"])))
        elif not args.src and args.name in BY_HAND:
            raise UserError(f"{args.name} cannot be downloaded by a script. Get {BY_HAND[args.name]}; then run "
                            f"python data.py {args.name} --src FOLDER_OR_ARCHIVE")
        else:
            src = args.src or download(path=args.out / "cifar-10-binary.tar.gz", **CIFAR10)
            settings["source"] = _label(src)
            batches = sorted(src.glob(f"{split}_data*.npz"), key=lambda file: (len(file.name), file.name))
            if args.name == "cifar10" and not (src.is_dir() or zipfile.is_zipfile(src)):
                items = _cifar10_records(src, split)
            else:
                items = _npz_rows(batches) if args.name == "imagenet64" and batches else _image_files(src, split)
        count = next(items)
        facts = _write(array, _blocks(work, items, size, args.workers), "uint8", count, size, args.skip_broken)
    with atomic_write(info) as partial:
        partial.write_text(json.dumps({**settings, **facts}, indent=1) + "\n")
    print(f"{array}: {facts['count']:,} images of {size} x {size}, opened with --data {name} --size {size}")


if __name__ == "__main__":
    command_line(main)
