"""Data sets: prepared once into one .npy file, then read through a memory map and corrupted while reading.

    python data.py cifar10                                  # downloads 170 MB; data/cifar10-32.npy and .json
    python data.py cifar10 --split test                     # data/cifar10-test-32.npy: --data cifar10-test
    python data.py celeba --src img_align_celeba.zip        # centre crop 140, then 64
    python data.py lsun_bedroom --src bedroom.zip           # 256
    python data.py imagenet64 --src Imagenet64_train_npz/   # train_data_batch_*.npz, or images
    python data.py mine --src photos/ --size 64             # any folder, zip or uncompressed tar of images
    python data.py shapes                                   # drawn here, nothing to download
    python data.py subspace --images shapes                 # linearised images, their distribution known
"""

import collections
import colorsys
import concurrent.futures
import contextlib
import functools
import hashlib
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
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from common import (Progress, UserError, atomic_write, check_ranges, command_line, download, locked,
                    parser_of, write_json)

SIZES = dict(cifar10=32, celeba=64, lsun_bedroom=256, imagenet64=64, butterflies=32, shapes=32, subspace=32)
DRAWN = dict(shapes=10_000, subspace=50_000)                # sets made here: their number of images
CIFAR10 = dict(urls=["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"], size=170_052_171,
               sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
BY_HAND = {                                                 # what a script cannot fetch, and where it is
    "celeba": "img_align_celeba.zip from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "lsun_bedroom": "its 303,125-image sample (a zip), https://www.kaggle.com/datasets/jhoward/lsun_bedroom",
    "imagenet64": "the 64 x 64 .npz files (or the images) from https://image-net.org, after signing in",
    "butterflies": "huggan/smithsonian_butterflies_subset from https://huggingface.co, as image files",
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX/)")
MAX_PIXELS, MAX_BYTES = 1 << 26, 1 << 28                    # of one image: 67 megapixels, 268 MB
MAX_BROKEN = 100                                            # without --skip-broken, stop looking for more


# ---------------------------------------------------------------------------------------- a prepared data set

def prepared_files(name, size, folder):
    """The Paths of a data set's images, the .json about them and, of subspace, their distribution."""
    return [Path(folder) / f"{name}-{size}{end}" for end in (".npy", ".json", "-truth.npz")]


class Images:
    """A prepared data set [N, 3, H, W], read through a memory map, corrupted as in the paper's Table 2.

    y = x + sigma z in [-1, 1] units, not clipped and not quantised, for a share p of the images. The coin and
    z ~ N(0, 1) belong to the image: they depend on (data_seed, image index) and nothing else, so every epoch
    and process reads the same bytes, and the images corrupted at p = 0.5 are among those at p = 0.9.

    Attributes: name, size, shape (3, H, W), array (uint8; float32 for subspace), low and high (range of the
    clean data, to which x0 is clamped), info (the .json file), p, sigma, data_seed. size None means the
    paper's. UserError if the data set is not prepared or is damaged, or if p, sigma or data_seed is out of
    range. Threads may share an object.
    """

    def __init__(self, name, size=None, data_dir="data", p=0.0, sigma=0.0, data_seed=0):
        if not (0 <= p <= 1 and 0 <= sigma < math.inf and data_seed >= 0):
            raise UserError(f"--p {p} --sigma {sigma} --data-seed {data_seed}: p is a share from 0 to 1, "
                            "sigma a standard deviation in [-1, 1] pixel units, the seed not negative")
        base, split = re.fullmatch("(.*?)(?:-(test|val))?", name).groups()
        size = size or SIZES.get(base)
        if not size:
            raise UserError(f"--data {name}: --size is needed (only {', '.join(SIZES)} have a default)")
        self.name, self.size, self.shape = name, size, (3, size, size)
        self.p, self.sigma, self.data_seed = p, sigma, data_seed
        array, info, self._truth = prepared_files(name, size, data_dir)
        if not (array.exists() and info.exists()):
            src = "" if base in DRAWN or base == "cifar10" else " --src FOLDER_OR_ARCHIVE"
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
            raise UserError(f"{array} or {info.name} is damaged ({error}): delete both, prepare them "
                            "again") from error
        # Row i, a function of (data_seed, i) alone: three words that start image i's noise, and its coin.
        self._words = np.random.Philox(data_seed).random_raw(4 * len(self.array)).reshape(-1, 4)

    def __len__(self):
        return len(self.array)

    def corrupted(self, indices):
        """The coins of the images at `indices` [B], True for a share p: bool [B]."""
        return (self._words[indices, 3] >> np.uint64(11)) * 2.0 ** -53 < self.p

    def read(self, indices):
        """The images at `indices` [B], corrupted: float32 [B, 3, H, W] in [-1, 1] (subspace: its units)."""
        indices = np.asarray(indices)
        x = self.array[indices]                                                          # [B, 3, H, W]
        if x.dtype == np.uint8:
            x = x.astype(np.float32)
            x -= 127.5
            x /= 127.5
        rows = np.flatnonzero(self.corrupted(indices)) if self.sigma else ()
        if not len(rows):
            return x
        # Starting one generator anew takes 3 us an image, making a new one 55 (the noise itself: 42). SFC64
        # counts its steps in its state: streams that start at the same count meet only if their starts agree.
        bits, z = np.random.SFC64(0), np.empty(self.shape, np.float32)
        normal, state = np.random.Generator(bits).standard_normal, bits.state
        starts = self._words[indices[rows]]                                              # [rows, 4]
        starts[:, 3] = 1                                    # the count
        for row, start in zip(rows, starts):
            state["state"]["state"] = start
            bits.state = state
            normal(dtype=np.float32, out=z)
            z *= self.sigma
            x[row] += z
        return x

    def truth(self):
        """The distribution of a subspace data set, x = mean + (a * scale) @ components with a ~ N(0, 1).

        -> a dict of float64 mean [D], components [k, D] (orthonormal rows) and scale [k], D = 3 H W.
        UserError for other sets.
        """
        try:
            with np.load(self._truth, allow_pickle=False) as file:
                return {key: file[key] for key in ("mean", "components", "scale")}
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"--data {self.name}: the distribution of subspace only is known "
                            f"({error})") from error


# --------------------------------------------------------------------------------- images, wherever they lie

def image_members(src):
    """The images of a folder, zip or uncompressed tar, a Path -> names, read.

    names: their sorted POSIX paths inside, chosen by suffix, without hidden files and __MACOSX. read(name):
    the Path of a file in a folder, or the bytes of an archive's member (ValueError, before they are read,
    if they are more than MAX_BYTES; zipfile and tarfile raise almost anything on a damaged one). Nothing is
    unpacked to disk: the names in an archive are only labels. UserError if src is none of these, is damaged
    or holds no images.
    """
    try:
        if src.is_dir():
            files = (Path(folder, file) for folder, _, names in os.walk(src) for file in names)
            members = {file.relative_to(src).as_posix(): (0, file) for file in files}
            content = Path
        elif zipfile.is_zipfile(src):
            archive = zipfile.ZipFile(src)
            members = {member.filename: (member.file_size, member) for member in archive.infolist()}
            content = archive.read
        else:
            archive = tarfile.open(src, "r:")               # a compressed one has no order but its own
            members = {member.name: (member.size, member) for member in archive if member.isreg()}
            content = lambda member: archive.extractfile(member).read()  # noqa: E731
    except Exception as error:                              # zipfile and tarfile raise almost anything
        raise UserError(f"{src} is not a folder, a whole zip or a whole uncompressed tar "
                        f"({error})") from error
    names = sorted(name for name in members if name.lower().endswith(SUFFIXES) and not HIDDEN.search(name))
    if not names:
        raise UserError(f"{src} holds no images ({' '.join(SUFFIXES)})")

    def read(name):
        size, member = members[name]
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        return content(member)
    return names, read


def open_image(payload):
    """The image in a file, a Path or bytes, as a PIL image that is not yet decoded.

    ValueError if its header states more than MAX_PIXELS; Pillow raises almost anything if it is broken or
    none of FORMATS.
    """
    image = Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    return image


# ------------------- the sources: each returns the number of images and an iterator of their (name, payload)

def _payload(read, *which):
    """read(*which), or in its place the error: one damaged image is told, or left out, with the others."""
    try:
        return read(*which)
    except Exception as error:                              # zipfile and tarfile raise almost anything
        return error


def _image_files(src, split):
    """The split of a folder, zip or tar. Payload: the Path or the bytes of an image file."""
    names, read = image_members(src)
    folders = {part for name in names for part in name.split("/")[:-1]} & {"train", "test", "val"}
    if folders or split != "train":
        names = [name for name in names if split in name.split("/")[:-1]]
        if not names:
            found = ", ".join(sorted(folders)) or "others"
            raise UserError(f"--src {src} has no folder {split!r} of images, only {found}")
    return len(names), ((name, _payload(read, name)) for name in names)


def _cifar10_records(src, split):
    """The binary version of CIFAR-10, a tar. Payload: uint8 [3, 32, 32] (after a label byte in the file)."""
    wanted = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    try:
        with tarfile.open(src, "r:*") as archive:
            blobs = {Path(member.name).name: archive.extractfile(member).read() for member in archive
                     if member.isreg() and Path(member.name).name in wanted and member.size <= MAX_BYTES}
    except Exception as error:                              # tarfile raises almost anything
        raise UserError(f"--src {src} is neither a folder nor a whole zip or tar ({error})") from error
    for name in wanted:
        if len(blobs.get(name, "")) != 10_000 * 3073:
            raise UserError(f"--src {src}: {name} has {len(blobs.get(name, '')):,} bytes, not 30,730,000; "
                            "needed is cifar-10-binary.tar.gz (not python or matlab), or images")
    return 10_000 * len(wanted), (
        (f"{name} record {i}", record[1:].reshape(3, 32, 32)) for name in wanted
        for i, record in enumerate(np.frombuffer(blobs[name], np.uint8).reshape(-1, 3073)))


def _npz_rows(files):
    """Downsampled ImageNet. Payload: uint8 [3, 64, 64], a row of `data`, streamed: a file has 1.6 GB."""
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

    def next_row(stream):
        return np.frombuffer(stream.read(12288), np.uint8).reshape(3, 64, 64)
    return sum(count for _, _, count in streams), (
        (f"{name} row {row}", _payload(next_row, stream))
        for name, stream, count in streams for row in range(count))


def _source(name, src, split):
    """The reader that fits: of the data set's own files, or of images."""
    batches = sorted(src.glob(f"{split}_data*.npz"), key=lambda file: (len(file.name), file.name))
    if name == "imagenet64" and batches:
        return _npz_rows(batches)
    if name == "cifar10" and not (src.is_dir() or zipfile.is_zipfile(src)):
        return _cifar10_records(src, split)
    return _image_files(src, split)


# ------------------------------------------------------------------------------------- the work on each image

def _decode(item, size, crop):
    """(name, payload) -> uint8 [3, S, S]: the centre square, of `crop` pixels or the largest, box-filtered.

    What is transparent becomes white; EXIF rotation is ignored, as is usual for these data sets. UserError if
    the image is unusable.
    """
    name, payload = item
    try:
        if isinstance(payload, Exception):
            raise payload
        if isinstance(payload, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(payload.transpose(1, 2, 0)))
        else:
            image = open_image(payload)
        width, height = image.size
        side = crop or min(width, height)
        if not size <= side <= min(width, height):
            raise ValueError(f"{width} x {height} pixels, {side} used, are too few for --size {size}")
        if image.mode.startswith("I"):                      # 16-bit grey, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        # In float: Pillow rounds bytes up after each of its two passes, half a level too bright at 32 -> 16.
        channels = [channel.convert("F").resize((size, size), Image.Resampling.BOX, box)
                    for channel in image.convert("RGB").split()]
        return np.rint(channels).astype(np.uint8)
    except Exception as error:                              # Pillow raises almost anything on a broken file
        raise UserError(f"{name!r} ({error or type(error).__name__})") from error


def _draw_shapes(item, size):
    """(seed, i) -> image i of the shapes data set, uint8 [3, S, S]: one to three flat shapes with soft edges
    on a smooth gradient. There is no texture, so that the noise a model leaves can be seen and measured."""
    rng = np.random.default_rng(item)
    y, x = (np.mgrid[:size, :size] + 0.5) / size            # the scene does not depend on the size
    hue, turn, bright = rng.uniform(), rng.uniform(0, 2 * math.pi), rng.choice([0.3, 0.95])
    first, last = [np.array(colorsys.hsv_to_rgb((hue + shift) % 1, 0.45, bright * rng.uniform(0.75, 1)))
                   for shift in (0, rng.uniform(-0.15, 0.15))]
    ramp = 0.5 + ((x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)) / math.sqrt(2)  # [S, S] in 0 ... 1
    image = first + (last - first) * ramp[..., None]                                    # [S, S, 3] in 0 ... 1
    for _ in range(rng.integers(1, 4)):
        dx, dy, radius = x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8), rng.uniform(0.13, 0.28)
        sides, turn = rng.choice([0, 0, 3, 4, 5, 6]), rng.uniform(0, 2 * math.pi)
        if sides:
            angles = turn + 2 * math.pi * np.arange(sides)[:, None, None] / sides
            distance = (np.cos(angles) * dx + np.sin(angles) * dy).max(axis=0)
            distance -= radius * math.cos(math.pi / sides)
        else:
            distance = np.hypot(dx, dy) - radius            # [S, S], to the outline, negative inside
        cover = np.clip(0.5 - distance * size / 3, 0, 1)[..., None]                     # three pixels wide
        hsv = (hue + rng.uniform(0.2, 0.8)) % 1, rng.uniform(0.55, 0.9), rng.uniform(0.65, 1)
        image += (np.array(colorsys.hsv_to_rgb(*hsv)) - image) * cover * cover * (3 - 2 * cover)
    return np.rint(image * 255).astype(np.uint8).transpose(2, 0, 1)


# ------------------- preparing: blocks of images, each (array [b, 3, S, S], descriptions of the broken ones)

def _start_worker():
    """A worker ends with its parent, however that ends; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _block(work, items):
    done, broken = [], []
    for item in items:
        try:
            done.append(work(item))
        except UserError as error:
            broken.append(str(error))
    return np.array(done), broken


def _image_blocks(work, items, size, workers):
    """work on all items, in parallel and in their order, with few of them in memory at a time."""
    length, pending = max(1, min(64, (1 << 21) // (3 * size * size))), collections.deque()
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        while (some := list(itertools.islice(items, length))) or pending:
            if some:
                pending.append(pool.submit(_block, work, some))
            if not some or len(pending) > 2 * workers:
                yield pending.popleft().result()


def _subspace_blocks(images, components, count, seed, truth):
    """The linearised images of the paper's "in vitro" analysis, as float32 blocks.

    PCA of `images`, then draws of x = mean + sum_i scale_i a_i U_i, a ~ N(0, 1). mean, U and scale go to the
    file `truth`.
    """
    width, total, square = math.prod(images.shape), 0.0, 0.0
    progress = Progress(len(images), "images", f"PCA of {images.name}")
    for start in range(0, len(images), 1000):
        x = images.read(np.arange(start, min(start + 1000, len(images))))
        x = x.reshape(-1, width).astype(np.float64)                                      # [b, D]
        total, square = total + x.sum(axis=0), square + x.T @ x                          # [D], [D, D]
        progress.update(start + len(x))
    progress.close()
    mean = total / len(images)
    variance, vectors = np.linalg.eigh(square / len(images) - np.outer(mean, mean))      # ascending
    variance = variance.clip(0)                             # rounding can leave a null direction negative
    scale, basis = np.sqrt(variance[:-components - 1:-1]), vectors.T[:-components - 1:-1]  # [k], [k, D]
    with atomic_write(truth) as temporary:
        np.savez(temporary, mean=mean, components=basis, scale=scale)
    share = (scale ** 2).sum() / variance.sum()
    print(f"{truth}: {components} of {width:,} components, {share:.1%} of the variance")
    rng = np.random.default_rng(seed)
    for start in range(0, count, 1000):
        a = rng.standard_normal((min(1000, count - start), components))
        yield (mean + (a * scale) @ basis).astype(np.float32).reshape(-1, *images.shape), []


def _write(path, blocks, dtype, count, size, skip_broken=False):
    """Writes blocks of `count` images in all as one .npy file. -> what the .json says of it. UserError if the
    disk is too small or, without skip_broken, an image is broken."""
    def header(rows):                                       # as long for any count: it is written twice
        facts = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=(rows, 3, size, size))
        np.lib.format.write_array_header_1_0(file, facts)

    digest, broken, kept, low, high = hashlib.sha256(), [], 0, math.inf, -math.inf
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        needed = count * 3 * size * size * np.dtype(dtype).itemsize
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise UserError(f"{path} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        header(count)
        progress = Progress(count, "images", path.stem)
        for block, bad in blocks:
            kept, broken = kept + len(block), broken + bad
            if len(block):
                file.write(block)
                digest.update(block)
                low, high = min(low, float(block.min())), max(high, float(block.max()))
            progress.update(kept + len(broken))
            if len(broken) >= MAX_BROKEN and not skip_broken:
                break
        some = ", ".join(broken[:5] + ["..."] * (len(broken) > 5))
        problem = f"{len(broken):,} of {kept + len(broken):,} images are unusable: {some}"
        if broken and not (skip_broken and kept):
            otherwise = ", or leave them out with --skip-broken" if kept else ""
            raise UserError(f"{problem}. Repair or remove them{otherwise}")
        file.seek(0)
        header(kept)
        progress.close()
    if broken:
        print(problem, file=sys.stderr)
    low, high = (-1.0, 1.0) if dtype == "uint8" else (low, high)
    return dict(count=kept, dtype=dtype, low=low, high=high, sha256=digest.hexdigest(), left_out=len(broken))


# ------------------------------------------------------------------------------------------- the command line

def _arguments(argv):
    """The flags, checked, with the defaults of this data set."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("name", help=f"{', '.join(SIZES)}, or a name of your own with --src and --size")
    add("--src", type=Path, help="folder, zip or tar of images, or the data set's own files "
        "(default: cifar10 is downloaded, shapes and subspace are drawn)")
    add("--size", type=int, help="height and width in pixels (default: the paper's)")
    add("--split", choices=["train", "test", "val"], help="the part of --src to take; test and val are saved "
        "as NAME-test and NAME-val (default: train, or all if --src has no such folders)")
    add("--num-samples", type=int, help="shapes, subspace: number of images (default: 10000, 50000)")
    add("--seed", type=int, help="shapes, subspace: seed of the drawing (default: 0)")
    add("--images", help="subspace: the prepared data set to linearise (default: shapes)")
    add("--components", type=int, help="subspace: number of principal components (default: 25)")
    add("--out", type=Path, default=Path("data"), help="folder for the result (default: data)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    add("--skip-broken", action="store_true", help="leave out images that are broken or too small")
    args = parser.parse_args(argv)
    name, drawn, linear = args.name, args.name in DRAWN, args.name == "subspace"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"name {name!r}: only letters, digits, '_', '-' and '.', as it becomes a file name")
    for flag, fits in dict(src=not drawn, split=not drawn, num_samples=drawn, seed=drawn, images=linear,
                           components=linear).items():
        if getattr(args, flag) is not None and not fits:
            raise UserError(f"--{flag.replace('_', '-')} is not for {name}")
    largest = 32 if linear else math.inf                    # PCA takes a matrix of (3 size^2)^2 numbers
    check_ranges(args, size=(1, largest), num_samples=(1, math.inf), seed=(0, math.inf),
                 components=(1, math.inf), workers=(1, math.inf))
    if name not in SIZES and not (args.src and args.size):
        raise UserError(f"{name!r} is none of {', '.join(SIZES)}; a set of your own needs --src and --size")
    if name == "cifar10" and args.split == "val":
        raise UserError("--split val: cifar10 has train and test only")
    if args.src and not args.src.exists():
        raise UserError(f"--src {args.src} does not exist")
    args.size, args.split = args.size or SIZES[name], args.split or "train"
    if drawn:
        args.num_samples, args.seed = args.num_samples or DRAWN[name], args.seed or 0
    if linear:
        args.images, args.components = args.images or "shapes", args.components or 25
    return args


def _label(src):
    return src.resolve().name + (f", {src.stat().st_size:,} bytes" if src.is_file() else "")


def _settings(args):
    """What the .json says of how the data set was made, as far as the flags tell."""
    name = args.name if args.split == "train" else f"{args.name}-{args.split}"
    settings = dict(name=name, size=args.size, split=args.split)
    if args.src:
        settings["source"] = _label(args.src)
    if args.name in DRAWN:
        settings.update(count=args.num_samples, seed=args.seed, source=args.images or "drawn")
    if args.components:
        settings["components"] = args.components
    return settings


def _is_there(settings, folder):
    """Whether the data set is prepared. UserError if that was done with other settings."""
    array, info, _ = prepared_files(settings["name"], settings["size"], folder)
    if not (array.exists() and info.exists()):
        return False
    images = Images(settings["name"], settings["size"], folder)
    differ = [f"{key} {images.info.get(key)!r}, now {value!r}" for key, value in settings.items()
              if images.info.get(key) != value]
    if differ:
        raise UserError(f"{array} was made with {'; '.join(differ)}: delete it and {info}, or choose another "
                        "--out")
    print(f"{array} is there: {len(images):,} images (source: {images.info['source']})")
    return True


def _one_at_a_time(path):
    """Other processes that come here for the same path wait until this one has left."""
    return locked(path.with_name(f".{path.name}.lock"), f"waiting for another process, which prepares {path}",
                  wait=True)


def _prepare_subspace(args, array, truth):
    if args.images == "shapes" and not prepared_files("shapes", args.size, args.out)[1].exists():
        main(["shapes", "--size", str(args.size), "--out", str(args.out), "--workers", str(args.workers)])
    images = Images(args.images, args.size, args.out)
    if args.components >= min(len(images), 3 * args.size ** 2):
        raise UserError(f"--components {args.components}: must be fewer than the {len(images):,} images of "
                        f"{images.name} and their {3 * args.size ** 2:,} values")
    blocks = _subspace_blocks(images, args.components, args.num_samples, args.seed, truth)
    return _write(array, blocks, "float32", args.num_samples, args.size)


def _prepare_images(args, array):
    if args.name == "shapes":
        count, items = args.num_samples, ((args.seed, i) for i in range(args.num_samples))
        work, source = functools.partial(_draw_shapes, size=args.size), "drawn"
    else:
        src, archive = args.src, args.out / "cifar-10-binary.tar.gz"
        if not src:                                         # its train and its test set need the same file
            with _one_at_a_time(archive):
                src = download(path=archive, **CIFAR10)
        count, items = _source(args.name, src, args.split)
        crop = 140 if args.name == "celeba" else None
        work, source = functools.partial(_decode, size=args.size, crop=crop), _label(src)
    blocks = _image_blocks(work, items, args.size, args.workers)
    return dict(source=source) | _write(array, blocks, "uint8", count, args.size, args.skip_broken)


def main(argv=None):
    """Prepares one data set, unless it is there with the same settings."""
    args = _arguments(argv)
    settings = _settings(args)
    if _is_there(settings, args.out):
        return
    if args.name in BY_HAND and not args.src:
        raise UserError(f"{args.name} cannot be downloaded by a script. Get {BY_HAND[args.name]}; then run "
                        f"python data.py {args.name} --src FOLDER_OR_ARCHIVE")
    array, info, truth = prepared_files(settings["name"], args.size, args.out)
    with _one_at_a_time(array):
        if _is_there(settings, args.out):                   # after waiting
            return
        if args.name == "subspace":
            facts = _prepare_subspace(args, array, truth)
        else:
            facts = _prepare_images(args, array)
        write_json(info, settings | facts)
    print(f"{array}: {facts['count']:,} images of {args.size} x {args.size}, opened with --data "
          f"{settings['name']} --size {args.size}")


if __name__ == "__main__":
    command_line(main)
