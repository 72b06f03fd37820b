"""Data sets: prepared once into one .npy file, then read through a memory map and corrupted while reading.

    python data.py cifar10                                  # downloads 170 MB; data/cifar10-32.npy and .json
    python data.py cifar10 --split test                     # data/cifar10-test-32.npy: --data cifar10-test
    python data.py celeba --src img_align_celeba.zip        # centre crop 140, then 64
    python data.py lsun_bedroom --src bedroom.zip           # 256
    python data.py imagenet64 --src Imagenet64_train_npz/   # train_data_batch_*.npz, or images
    python data.py mine --src photos/ --size 64             # any folder, zip or uncompressed tar of images
    python data.py mine --src photos.npz --size 64          # or .npy: [N, H, W, 3] or [N, 3, H, W]
    python data.py shapes                                   # drawn here, nothing to download
    python data.py subspace --images shapes                 # linearised images, their distribution known

Where all folders at the top of --src are called train, test or val, train is taken; where deeper ones are,
--split must say it. What is not taken of a source is counted, and said.
"""

import common                                               # first: it answers Ctrl-C while others load

import collections
import colorsys
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import stat
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import scipy.ndimage
from PIL import Image, UnidentifiedImageError

from common import (Progress, UserError, as_bytes, atomic_write, check_disk, check_out, check_ranges,
                    command_line, download, locked, parser_of, protocol_in, sha256_of, write_json)

SIZES = dict(cifar10=32, celeba=64, lsun_bedroom=256, imagenet64=64, butterflies=32, shapes=32, subspace=32)
CORRUPTIONS = "gaussian", "impulse", "outliers", "blur"      # the paper's, and others
DRAWN = dict(shapes=10_000, subspace=50_000)                # sets made here: their number of images
CIFAR10 = dict(urls=["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"], size=170_052_171,
               sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
BY_HAND = {                                                 # what a script cannot fetch, and where it is
    "celeba": "img_align_celeba.zip from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "lsun_bedroom": "its 303,125-image sample (a zip), https://www.kaggle.com/datasets/jhoward/lsun_bedroom",
    "imagenet64": "the 64 x 64 .npz files (or the images) from https://image-net.org, after signing in",
    "butterflies": "huggan/smithsonian_butterflies_subset from https://huggingface.co, as image files",
}
# Pillow's formats of ordinary pictures. Others run programs (EPS), are scientific or bear no mark (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000", "QOI", "PCX", "SGI")
SPLITS = dict(train="train", test="test", val="val", valid="val", validation="val")     # of folders' names
HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX/)")
MAX_PIXELS, MAX_BYTES = 1 << 26, 1 << 28                    # of one image: 67 megapixels, 268 MB
BLOCK_BYTES, FLYING_BYTES = 1 << 26, 1 << 28                # of images on their way to and from the workers
ALIGNED = (178, 218)                                        # width and height of CelebA's aligned images
MAX_BROKEN = 100                                            # without --skip-broken, stop looking for more
OBJECTS = ("Python objects, that is code, which was not run: save the images as files, or as one "
           ".npy of uint8 [N, H, W, 3], with a program that you trust")
# What people have that is no source: how its name ends, how the file begins, what it is and what to do.
STRANGE = [
    (r"\.(rar|7z)", (b"Rar!", b"7z\xbc\xaf"), "a .rar or .7z archive: unpack it and give the folder"),
    (r"\.(tgz|tbz2?|txz|gz|bz2|xz|zst)", (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"),
     "compressed as a whole, like a .tar.gz: unpack it (tar xf FILE) and give the folder"),
    (r"data\.mdb", (), "an LSUN lmdb: export its images (python data.py export LMDB --out_dir FOLDER, of "
     "github.com/fyu/lsun) and give that folder"),
    (r"\.parquet", (b"PAR1",), "a parquet table: write their images into a folder as files and give that"),
    (r"\.tfrecords?(-\d+-of-\d+)?", (), "a file of TensorFlow records: write their images into a folder "
     "as files and give that"),
    (r"\.(h5|hdf5|mat)", (b"\x89HDF", b"MATLAB 5.0"), "an HDF5 or MATLAB file: save its images as one .npy "
     "of uint8 [N, H, W, 3] and give that"),
    (r"(^|/)(data_batch_\d|test_batch|batches\.meta)", (), "the python version of CIFAR-10, pickles, that is "
     "code, which was not run: the binary version is needed, cifar-10-binary.tar.gz"),
    (r"\.(pkl|pickle|pth?|ckpt)", tuple(b"\x80%c" % i for i in range(2, 6)),
     f"a pickle of {OBJECTS}"),
    (r"(train|val)_data\w*\.npz", (), "ImageNet's .npz files: python data.py imagenet64 --src FOLDER reads "
     "train_data_batch_1.npz to _10, or with --split val val_data.npz, that lie in FOLDER, unpacked"),
]


# ---------------------------------------------------------------------------------------- a prepared data set

def prepared_files(name, size, folder):
    """The Paths of a data set's images, the .json about them and, of subspace, their distribution."""
    return [Path(folder) / f"{name}-{size}{end}" for end in (".npy", ".json", "-truth.npz")]


def corrupt(x, corruption, sigma, rng):
    """An image x [3, H, W] by a corruption that the paper does not have, -> [3, H, W].

    `impulse`: each pixel is black or white (-1 or 1) with probability sigma. `outliers`: uniform noise on
    [-1, 1] takes the image's place, whatever sigma. `blur`: a Gaussian of deviation 10 sigma pixels.
    """
    if corruption == "impulse":
        u = rng.random(x.shape[1:])                                                      # [H, W]
        return np.where(u < sigma, np.where(u < sigma / 2, -1, 1), x)
    if corruption == "outliers":
        return rng.uniform(-1, 1, x.shape)
    return scipy.ndimage.gaussian_filter(x, (0, 10 * sigma, 10 * sigma))


class Images:
    """A prepared data set [N, 3, H, W], read through a memory map, corrupted as in the paper's Table 2.

    y = x + sigma z in [-1, 1] units, not clipped and not quantised, for a share p of the images. The coin and
    z ~ N(0, 1) belong to the image: they depend on (data_seed, image index) and nothing else, so every epoch
    and process reads the same bytes, and the images corrupted at p = 0.5 are among those at p = 0.9. Other
    corruptions than "gaussian" are beyond the paper, and drawn from the same streams: see `corrupt`.

    Attributes: name, size, shape (3, H, W), array (uint8; float32 for subspace), low and high (range of the
    clean data, to which x0 is clamped), info (the .json file), p, sigma, data_seed, corruption. size None
    means the paper's. UserError if the data set is not prepared or is damaged, or if p, sigma or data_seed is
    out of range; of more than MAX_BYTES, whose hash would take seconds, only the length is checked. Threads
    may share an object.
    """

    def __init__(self, name, size=None, data_dir="data", p=0.0, sigma=0.0, data_seed=0,
                 corruption="gaussian"):
        if not (0 <= p <= 1 and 0 <= sigma < math.inf and data_seed >= 0):
            raise UserError(f"--p {p} --sigma {sigma} --data-seed {data_seed}: p is a share from 0 to 1, "
                            "sigma a standard deviation in [-1, 1] pixel units, the seed not negative")
        if corruption not in CORRUPTIONS or (corruption == "impulse" and sigma > 1):
            raise UserError(f"--corruption {corruption} --sigma {sigma}: {', '.join(CORRUPTIONS)} are known, "
                            "and sigma is impulse's share of the pixels, from 0 to 1")
        base, split = re.fullmatch("(?s)(.*?)(?:-(test|val))?", name).groups()
        size = SIZES.get(base) if size is None else size
        if size is None:
            raise UserError(f"--data {name}: --size is needed (only {', '.join(SIZES)} have a default)")
        self.name, self.size, self.shape = name, size, (3, size, size)
        self.p, self.sigma, self.data_seed, self.corruption = p, sigma, data_seed, corruption
        array, info, self._truth = prepared_files(name, size, data_dir)
        if not (os.path.isfile(array) and os.path.isfile(info)):           # False for a name too long, too
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
            if not -math.inf < self.low <= self.high < math.inf:
                raise ValueError(f"values from {self.low} to {self.high}")
            sha256, end = self.info["sha256"], self.array.offset + self.array.nbytes
            if end != os.path.getsize(array) or (self.array.nbytes <= MAX_BYTES and sha256 !=
                                                 hashlib.sha256(self.array).hexdigest()):
                raise ValueError("not the bytes that data.py wrote")
        except Exception as error:                          # json and numpy raise almost anything
            raise UserError(f"{array} or {info.name} is damaged or not made by data.py ({error}): delete "
                            "both, prepare them again") from error
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
        changes = self.sigma or self.corruption == "outliers"
        rows = np.flatnonzero(self.corrupted(indices)) if changes else ()
        if not len(rows):
            return x
        # Starting one generator anew takes 3 us an image, making a new one 55 (the noise itself: 42). SFC64
        # counts its steps in its state: streams that start at the same count meet only if their starts agree.
        bits, z = np.random.SFC64(0), np.empty(self.shape, np.float32)
        rng, state = np.random.Generator(bits), bits.state
        starts = self._words[indices[rows]]                                              # [rows, 4]
        starts[:, 3] = 1                                    # the count
        for row, start in zip(rows, starts):
            state["state"]["state"] = start
            bits.state = state
            if self.corruption == "gaussian":
                rng.standard_normal(dtype=np.float32, out=z)
                z *= self.sigma
                x[row] += z
            else:
                x[row] = corrupt(x[row], self.corruption, self.sigma, rng)
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
            if self.name != "subspace":
                raise UserError(f"--data {self.name}: the distribution of subspace alone is known") from error
            raise UserError(f"{self._truth} is missing or damaged ({error}): delete it and run python "
                            f"data.py subspace --size {self.size} again") from error


# --------------------------------------------------------------------------------- images, wherever they lie

def check_regular(path, label):
    """UserError that begins with `label` unless path is a folder or a regular file, or a link to one."""
    if not os.path.exists(path):
        raise UserError(f"{label} does not exist")
    if not (os.path.isdir(path) or os.path.isfile(path)):   # a device or a pipe never ends
        raise UserError(f"{label} is neither a regular file nor a folder")


@contextlib.contextmanager
def reading(label):
    """Whatever a damaged file raises while it is read becomes one line, a UserError that names `label`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:                              # numpy, zipfile and Pillow raise almost anything
        raise UserError(f"{label}: damaged or unreadable ({error or type(error).__name__})") from error


def _strange(name, head=b""):
    """What STRANGE says of a file of this name or with this beginning, or None."""
    for ending, magics, text in STRANGE:
        if re.search(f"({ending})$", name, re.IGNORECASE) or head.startswith(magics):
            return text
    return None


def _head(path):
    with open(path, "rb") as file:
        return file.read(16)


@functools.cache
def _formats():
    """Those of FORMATS that this Pillow has: AVIF came with 11.3."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _is_picture(head):
    """Whether a file that begins with these 16 bytes is of one of FORMATS."""
    return any(Image.OPEN[kind][1](head.ljust(16, b"\0")) is True for kind in _formats())


def _folder_files(src, left):
    """Yields (name, Path) of the regular files in a folder, linked folders too; counts in `left` what is no
    file. No folder is entered twice, so that links may go in circles; linked ones are entered last."""
    folders, seen = collections.deque([("", src)]), set()
    while folders:
        name, folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                left["folder linked twice"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(folder))
        except OSError:
            left["unreadable folder"] += 1
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                later = folders.appendleft if entry.is_symlink() else folders.append
                later((f"{name}{entry.name}/", entry.path))
            elif entry.is_file():
                yield name + entry.name, Path(entry.path)
            else:
                left["special file or dead link"] += 1


def _members(src, unpacked=None):
    """What a folder, zip or uncompressed tar holds -> {name: (bytes, member)}, open, Counter of what it holds
    beside regular files. open(member) -> the file. unpacked: the bytes of the tar, in place of the file."""
    members, left = {}, collections.Counter()

    def add(name, *member):
        left["name given twice"] += name in members         # the later one counts, as in unpacking
        members[name] = member
    try:
        if os.path.isdir(src):
            members = {name: (0, path) for name, path in _folder_files(src, left)}
            return members, lambda path: open(path, "rb"), +left
        if unpacked is None and zipfile.is_zipfile(src):
            archive = zipfile.ZipFile(src)
            for member in archive.infolist():
                name = member.filename.replace("\\", "/")   # some of Windows' programs write it
                if stat.S_ISLNK(member.external_attr >> 16):
                    left["link"] += 1
                elif not name.endswith("/"):
                    add(name, member.file_size, member)
            return members, archive.open, +left
        file = None if unpacked is None else io.BytesIO(unpacked)
        archive = tarfile.open(src, "r:", file)             # a compressed one has no order but its own
        for member in archive:
            if member.isreg():
                add(member.name, member.size, member)
            elif not member.isdir():
                left["link or special file"] += 1
        return members, archive.extractfile, +left
    except Exception as error:                              # zipfile and tarfile raise almost anything
        with contextlib.suppress(OSError):
            if text := _strange(src.name, _head(src)):
                raise UserError(f"{src} is {text}") from error
        raise UserError(f"{src} is not a folder, a whole zip or a whole uncompressed tar "
                        f"({error})") from error


def image_members(src):
    """The images of a folder, zip or uncompressed tar, a Path -> names, read, left.

    names: their sorted POSIX paths inside, chosen by suffix (one that Pillow has for FORMATS) or, without a
    suffix, by content; no hidden files and __MACOSX. left: a Counter of the other files by kind.
    read(name): the Path of a file in a folder, or the bytes of an archive's member (ValueError, before they
    are read, if they are more than MAX_BYTES or no picture; zipfile and tarfile raise almost anything on a
    damaged one). Nothing is unpacked to disk: the names in an archive are only labels. UserError if src is
    none of these, is damaged or holds no images.
    """
    members, open_member, left = _members(src)
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}

    def why_not(name):
        suffix = os.path.splitext(name)[1].lower()
        suffix = suffix if re.fullmatch(r"\.\w{1,10}", suffix) else ""          # not '.5 at the lake'
        if HIDDEN.search(name):
            return "hidden"
        if suffix:
            return None if suffix in suffixes else suffix
        with contextlib.suppress(Exception), open_member(members[name][1]) as file:
            return None if _is_picture(file.read(16)) else "without suffix"
        return "unreadable"
    reasons = {name: why_not(name) for name in members}
    names = sorted(name for name, reason in reasons.items() if reason is None)
    left.update(filter(None, reasons.values()))
    if not names:
        some = itertools.islice(sorted(members), 10_000)    # there may be a million
        strange = next(filter(None, map(_strange, some)), None)
        raise UserError(f"{src} holds {strange}" if strange else
                        f"{src} holds no images: {files_told(0, left)}. Read are "
                        f"{' '.join(sorted(suffixes))}")

    def read(name):
        size, member = members[name]
        if isinstance(member, Path):
            return member
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        if getattr(member, "compress_type", 0) not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("not stored or deflated; other methods are not unpacked within bounds")
        with open_member(member) as file:
            if not _is_picture(file.peek(16)[:16]):
                raise ValueError("no image that Pillow reads")
            return file.read(size)                          # a header may lie: it gets no more than it said
    return names, read, left


def files_told(used, left):
    """'N images used, M files not (10 .heic, 2 .txt)', from `image_members`' left."""
    kinds = [f"{count:,} {kind}" for kind, count in left.most_common(10)] + ["..."] * (len(left) > 10)
    return f"{used:,} images used" + (f", {left.total():,} files not ({', '.join(kinds)})" if left else "")


def open_image(payload):
    """The image in a file, a Path or bytes, as a PIL image that is not yet decoded.

    ValueError if its header states more than MAX_PIXELS; Pillow raises almost anything if it is broken or
    none of FORMATS.
    """
    with warnings.catch_warnings():                         # what is wrong raises an error, too
        warnings.simplefilter("ignore")
        file = io.BytesIO(payload) if isinstance(payload, bytes) else payload
        try:
            image = Image.open(file, formats=_formats())
        except UnidentifiedImageError as error:             # which shows an object of Python's
            raise ValueError("no image that Pillow reads") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    return image


def is_deep(image):
    """Whether the values of an image, not yet decoded, are of 16 bits or more; Pillow cuts colours to 8."""
    return image.mode.startswith("I") or ";16" in str(getattr(image, "tile", ""))


# ------------------------------------------------------------------------------ arrays of images, as a stream

class Source(NamedTuple):
    """Images [N, H, W, 3], uint8 or float, to be read in order."""
    label: str                                              # for people
    path: Path                                              # where they are; results are written beside
    count: int
    size: tuple                                             # (H, W)
    dtype: np.dtype
    read: Callable                                       # read(start, stop, batch) yields arrays [B, H, W, 3]
    key: Callable                                           # key() -> a hash of the content
    protocol: dict = {}                                     # how they were sampled, if the file says so
    truth: Any = None                                # of subspace data: their distribution, as Images.truth()
    note: str = ""                                          # what was not taken of a folder or archive


def steps(start, stop, batch, nbytes):
    """(first, end) of each batch from start to stop; smaller ones if images of `nbytes` exceed MAX_BYTES."""
    batch = max(1, min(batch, MAX_BYTES // nbytes))
    return [(i, min(i + batch, stop)) for i in range(start, stop, batch)]


def array_header(file, label, length):
    """Reads the header of an .npy -> shape, whether in Fortran order, dtype; takes no memory for the values.
    UserError for Python objects or more values than `length` bytes hold; ValueError where it is no .npy."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):                                   # later ones allow a header of 4 GB
        raise ValueError(f"version {version} of the .npy format, not (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise UserError(f"{label} holds {OBJECTS}")
    row = math.prod(shape[1:]) * dtype.itemsize
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize > length - file.tell():
        raise UserError(f"{label} is truncated: it ends in image {(length - file.tell()) // row:,} of "
                        f"{shape[0]:,}" if row > 0 else f"{label} is damaged: its shape is {shape}")
    return shape, fortran, dtype


def array_source(path):
    """The images of an .npz, under arr_0, or of an .npy as a Source: uint8, or float in [-1, 1],
    [N, H, W, 3] or [N, 3, H, W]. Streamed: an .npz cannot be memory-mapped. UserError if it holds none."""
    protocol = {}
    with reading(path):
        if text := _strange("", _head(path)):
            raise UserError(f"{path} is {text}")
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                members = {member.filename: member.file_size for member in archive.infolist()}
                if "arr_0.npy" not in members:
                    strange = _strange(path.name)
                    raise UserError(f"{path} is one of {strange}" if strange else
                                    f"{path} holds {', '.join([*members][:9]) or 'nothing'}; images are "
                                    "expected under arr_0")
                protocol = protocol_in(archive) if "protocol.npy" in members else {}
            open_member, length = lambda: zipfile.ZipFile(path).open("arr_0.npy"), members["arr_0.npy"]
        else:
            open_member, length = lambda: open(path, "rb"), path.stat().st_size
        with open_member() as file:
            shape, fortran, dtype = array_header(file, path, length)
            offset = file.tell()
    planes = len(shape) == 4 and shape[3] != 3              # [N, 3, H, W], as data.py and torch have it
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or 0 in shape or fortran:
        order = " in Fortran order" if fortran else ""
        raise UserError(f"{path} holds {dtype} {shape}{order}; colour images [N, H, W, 3] or [N, 3, H, W] "
                        "are expected (of grey ones three equal channels)")
    if dtype != np.uint8 and dtype.kind != "f":
        raise UserError(f"{path} holds {dtype}; uint8 images, or float images in [-1, 1], are expected")
    size, row = shape[2:] if planes else shape[1:3], math.prod(shape[1:]) * dtype.itemsize
    if math.prod(size) > MAX_PIXELS:
        raise UserError(f"{path} holds images of {size} (height, width): more than {MAX_PIXELS:,} pixels")

    def read(start, stop, batch):
        with reading(path), open_member() as file:
            file.seek(offset + start * row)
            for i, j in steps(start, stop, batch, row):
                images = np.frombuffer(file.read((j - i) * row), dtype).reshape(j - i, *shape[1:])
                yield images.transpose(0, 2, 3, 1) if planes else images
    return Source(path.name, path, shape[0], size, dtype, read, lambda: sha256_of(path), protocol)


def to_bytes(images, label):
    """uint8 images as they are; float images in [-1, 1] as uint8; UserError for another range and for NaN."""
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())    # NaN if any value is
    if not np.isfinite([low, high]).all():
        raise UserError(f"{label} holds values that are not finite (NaN or infinity)")
    if low < -1 or high > 1:
        raise UserError(f"{label} holds float images from {low:.4g} to {high:.4g}: "
                        "[-1, 1], or uint8, is expected")
    return as_bytes(images)


def check_range(source):
    """UserError where the first images of a Source are neither bytes nor in [-1, 1], but in [0, 1]."""
    head = next(source.read(0, min(source.count, 64), 64))
    if to_bytes(head, source.label).min() >= 128 and head.dtype != np.uint8:
        raise UserError(f"{source.label} holds float images, none negative: [-1, 1], or uint8, is expected "
                        "(2 x - 1, if they are in [0, 1])")


# - the sources: each returns the number of images, an iterator of their (name, payload), the split and notes

def _payload(read, *which):
    """read(*which), or in its place the error: one damaged image is told, or left out, with the others."""
    try:
        return read(*which)
    except Exception as error:                              # zipfile and tarfile raise almost anything
        return error


def split_folders(names):
    """The folders that can be splits by name (SPLITS), of the images called `names`: those at the top, below
    one that holds all, or, where none of these is called so, of the first level that has one.

    -> the folder of each name ("": it is in none), {folder: its split or None}, told(folders) -> their text.
    """
    paths = [name.split("/") for name in names]
    depth = 0
    while (all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1
           and paths[0][depth].lower() not in SPLITS):
        depth += 1
    level = min((k for path in paths for k, part in enumerate(path[depth:-1], 1) if part.lower() in SPLITS),
                default=1)
    tops = ["/".join(path[depth:-1][:level]) for path in paths]
    counts = collections.Counter(tops)

    def told(some):
        some = sorted(some)
        return ", ".join([f"{counts[top]:,} ({f'folder {top}' if top else 'in no folder'})"
                          for top in some[:5]] + ["..."] * (len(some) > 5))
    return tops, {top: SPLITS.get(top.split("/")[-1].lower()) for top in counts}, told


def _choose(src, names, split):
    """Of the images called `names`, those of a split -> their names, the split, what is said of it.

    split None: train, if all folders at the top are splits, and all, if no folder is; else UserError, as
    where the split is not there.
    """
    tops, kinds, told = split_folders(names)
    if split is None:
        if any(kinds.values()) and not (all(kinds.values()) and "train" in kinds.values()
                                        and not any("/" in top for top in kinds)):
            named = next(top for top in sorted(kinds) if kinds[top])
            raise UserError(f"--src {src} holds images: {told(kinds)}; {named!r} can be a split or a class: "
                            f"--split all takes all, --split {kinds[named]} that folder")
        split = "train" if any(kinds.values()) else "all"
    taken = {top for top in kinds if split in ("all", kinds[top])}
    if not taken:
        raise UserError(f"--src {src} has no folder {split!r} of images, only {told(kinds)}: --split all "
                        "takes all")
    some = sorted(taken)
    some = some[:5] + ["..."] * (len(some) > 5)
    chosen = [name for name, top in zip(names, tops) if top in taken]
    others = told(kinds.keys() - taken)
    return chosen, split, [f"{len(chosen):,} of {len(names):,} images: folder {', '.join(some)}; "
                           f"not: {others or 'none'}"] if split != "all" else []


def _image_files(src, split):
    """The split of a folder, zip or tar. Payload: the Path or the bytes of an image file."""
    every, read, left = image_members(src)
    names, split, notes = _choose(src, every, split)
    items = ((name, _payload(read, name)) for name in names)
    return len(names), items, split, [files_told(len(every), left), *notes]


def _array_images(src, split):
    """All of an .npz or .npy. Payload: uint8 [H, W, 3]."""
    if split not in (None, "all"):
        raise UserError(f"--split {split}: {src} is one array of images, without folders")
    source = array_source(src)
    check_range(source)
    images = (image for block in source.read(0, source.count, 64) for image in to_bytes(block, source.label))
    return source.count, ((f"image {i}", image) for i, image in enumerate(images)), "all", []


def _cifar10_records(src, split):
    """The binary version of CIFAR-10, a tar(.gz) or folder. Payload: uint8 [32, 32, 3] (after a label byte in
    the file). None where src holds no .bin files."""
    unpacked = None
    with reading(f"--src {src}"):
        packed = os.path.isfile(src) and _head(src).startswith(b"\x1f\x8b")
    if packed:
        with reading(f"--src {src}, which should be a whole zip or tar"), gzip.open(src) as file:
            unpacked = file.read(MAX_BYTES + 1)             # it has 184 MB
        if len(unpacked) > MAX_BYTES:
            raise UserError(f"--src {src} unpacks to more than {MAX_BYTES:,} bytes: not CIFAR-10")
    members, open_member, _ = _members(src, unpacked)
    strange = next((name for name in members if name.endswith("data_batch_1")), None)
    if strange and unpacked:
        raise UserError(f"--src {src} holds {_strange(strange)}")
    found = {Path(name).name: member for name, member in members.items() if name.endswith(".bin")}
    if not found and unpacked is None:
        return None
    split, files = split or "train", dict(train=[f"data_batch_{i}.bin" for i in range(1, 6)],
                                          test=["test_batch.bin"])
    wanted, records = files.get(split) or sum(files.values(), []), []
    for name in wanted:
        if name not in found:
            raise UserError(f"--src {src}: {name} is missing; needed is cifar-10-binary.tar.gz (not python "
                            "or matlab), or images")
        with reading(f"--src {src}: {name}"), open_member(found[name][1]) as file:
            content = file.read(30_730_001)
        if len(content) != 30_730_000:
            length = f"{len(content):,}" if len(content) < 30_730_000 else "more"
            raise UserError(f"--src {src}: {name} has {length} bytes, not 30,730,000: fetch it again")
        records.append(np.frombuffer(content, np.uint8).reshape(-1, 3073))
    return 10_000 * len(wanted), (
        (f"{name} record {i}", record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        for name, some in zip(wanted, records) for i, record in enumerate(some)), split, []


def _npz_rows(files, split):
    """Downsampled ImageNet. Payload: uint8 [64, 64, 3], a row of `data`, streamed: a file has 1.6 GB."""
    streams = []
    for file in files:
        check_regular(file, file)
        with reading(file):
            archive = zipfile.ZipFile(file)
            stream = archive.open("data.npy")
            shape, fortran, dtype = array_header(stream, file, archive.getinfo("data.npy").file_size)
            if dtype != np.uint8 or fortran or shape[1:] != (12288,) or shape[0] < 1:
                raise ValueError(f"`data` is {dtype} {shape}, not uint8 [N, 12288]")
        streams.append((file.name, stream, shape[0]))
    there = {file.name for file in files}
    batches = [f"train_data_batch_{i}.npz" for i in range(1, 11)] if split != "val" else []
    missing = [name for name in batches if name not in there]
    notes = [f"{', '.join(sorted(there))} used" + f"; missing: {', '.join(missing)}" * bool(missing)]

    def next_row(stream):
        return np.frombuffer(stream.read(12288), np.uint8).reshape(3, 64, 64).transpose(1, 2, 0)
    return sum(count for _, _, count in streams), (
        (f"{name} row {row}", _payload(next_row, stream))
        for name, stream, count in streams for row in range(count)), split, notes


def _source(name, src, split):
    """The reader that fits: of the data set's own files, of an array, or of images."""
    own = f"{'*' if split == 'all' else split or 'train'}_data*.npz"
    files = [src] if src.match(own) else sorted(src.glob(own), key=lambda file: (len(file.name), file.name))
    if name == "imagenet64" and files:
        return _npz_rows(files, split or "train")
    if src.suffix.lower() in (".npy", ".npz") and os.path.isfile(src):
        return _array_images(src, split)
    return (name == "cifar10" and _cifar10_records(src, split)) or _image_files(src, split)


# ------------------------------------------------------------------------------------- the work on each image

def _decode(item, size, crop):
    """(name, payload) -> uint8 [3, S, S]: the centre square, of `crop` pixels or the largest, box-filtered;
    and the largest upper byte of an image of 16 bits, -1 of another.

    What is transparent becomes white; EXIF rotation is ignored, as is usual for these data sets. UserError if
    the image is unusable.
    """
    name, payload = item
    try:
        if isinstance(payload, Exception):
            raise payload
        if isinstance(payload, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(payload))
        else:
            image = open_image(payload)
        width, height = image.size
        if crop and image.size != ALIGNED:
            raise ValueError(f"{width} x {height} pixels")
        side = crop or min(width, height)
        if not size <= side <= min(width, height):
            raise ValueError(f"{width} x {height} pixels, {side} used, are too few for --size {size}")
        deep = is_deep(image)
        if deep and "transparency" in image.info:           # Pillow loses it, or compares it with 8 bits
            raise ValueError("16 bits and a transparent colour: 8 bits or an alpha channel are needed")
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers, of an unknown range")
        if image.mode.startswith("I"):                      # 16-bit grey, which convert() would clip at 255
            values = np.asarray(image)
            if values.min() < 0 or values.max() >= 1 << 16:
                raise ValueError(f"pixels from {values.min()} to {values.max()}: not of 8 or 16 bits")
            image = Image.fromarray((values >> 8).astype(np.uint8))
        colours = [image.getchannel(band) for band in image.getbands() if band != "A"] if deep else []
        brightest = max((channel.getextrema()[1] for channel in colours), default=-1)
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        # In float: Pillow rounds bytes up after each of its two passes, half a level too bright at 32 -> 16.
        image = image if image.mode == "RGB" else image.convert("RGB")             # which would copy it
        channels = [image.getchannel(i).convert("F").resize((size, size), Image.Resampling.BOX, box)
                    for i in range(3)]
        return np.rint(channels).astype(np.uint8), brightest
    except Exception as error:                              # Pillow raises almost anything on a broken file
        raise UserError(f"{name!r} ({error or type(error).__name__})") from error


def _draw_shapes(item, size):
    """(seed, i) -> image i of the shapes data set, uint8 [3, S, S], and -1, as `_decode` has it: one to three
    flat shapes with soft edges on a smooth gradient. There is no texture, so that the noise a model leaves
    can be seen and measured."""
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
    return np.rint(image * 255).astype(np.uint8).transpose(2, 0, 1), -1


# - preparing: blocks of images: array [b, 3, S, S], descriptions of the broken ones, the largest upper byte

def _start_worker():
    """A worker ends with its parent, however that ends; Ctrl-C and a terminal's end are the parent's."""
    for number, answer in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGHUP, signal.SIG_IGN),
                           (signal.SIGTERM, signal.SIG_DFL)):           # not the parent's, which it inherits
        signal.signal(number, answer)
    warnings.simplefilter("ignore")                         # Pillow's, of images that it reads all the same
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _block(work, items):
    done, broken, brightest = [], [], -1
    for item in items:
        try:
            image, bright = work(item)
            done.append(image)
            brightest = max(brightest, bright)
        except UserError as error:
            broken.append(str(error))
    return np.array(done), broken, brightest


def _cut(items, length, image_bytes):
    """Yields lists of at most `length` items and BLOCK_BYTES, or of one larger item, each list with its
    bytes: those of the payloads in memory and of the images that are made of them."""
    some, nbytes = [], 0
    for item in items:
        payload = item[1] if isinstance(item[1], (bytes, np.ndarray)) else b""
        more = image_bytes + memoryview(payload).nbytes
        if some and (len(some) == length or nbytes + more > BLOCK_BYTES):
            yield some, nbytes
            some, nbytes = [], 0
        some.append(item)
        nbytes += more
        del item, payload                                   # it may have 268 MB, like the next
        if nbytes > BLOCK_BYTES:
            yield some, nbytes
            some, nbytes = [], 0
    if some:
        yield some, nbytes


def _image_blocks(work, items, size, workers):
    """work on all items, in parallel and in their order, with few of them in memory at a time: at most
    FLYING_BYTES on their way. UserError if the workers cannot be started, or one is killed."""
    image_bytes, pending, flying = 3 * size * size, collections.deque(), 0

    def finished():
        nonlocal flying
        done, nbytes = pending.popleft()
        flying -= nbytes
        return done.result()
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
            for some, nbytes in _cut(items, max(1, min(64, (1 << 21) // image_bytes)), image_bytes):
                large = nbytes > BLOCK_BYTES                # sent to a worker, it would be there four times
                while pending and (large or len(pending) > 2 * workers or flying + nbytes > FLYING_BYTES):
                    yield finished()
                if large:
                    yield _block(work, some)
                else:
                    pending.append((pool.submit(_block, work, some), nbytes))
                    flying += nbytes
                del some
            while pending:
                yield finished()
    except (concurrent.futures.process.BrokenProcessPool, OSError) as error:
        time.sleep(0.5)                                     # told to end with all others, it is our turn now
        raise UserError("a worker process could not start or was killed, as where memory is short "
                        f"({error}): try fewer than --workers {workers}") from error


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
    if variance.sum() < 1e-12:                              # one level of one pixel is more
        raise UserError(f"--images {images.name}: all its images are the same, which span no subspace")
    scale, basis = np.sqrt(variance[:-components - 1:-1]), vectors.T[:-components - 1:-1]  # [k], [k, D]
    with atomic_write(truth) as temporary:
        np.savez(temporary, mean=mean, components=basis, scale=scale)
    share = (scale ** 2).sum() / variance.sum()
    print(f"{truth}: {components} of {width:,} components, {share:.1%} of the variance")
    rng = np.random.default_rng(seed)
    for start in range(0, count, 1000):
        a = rng.standard_normal((min(1000, count - start), components))
        yield (mean + (a * scale) @ basis).astype(np.float32).reshape(-1, *images.shape), [], -1


def _write(path, blocks, dtype, count, size, skip_broken=False, advice="Repair or remove them"):
    """Writes blocks of `count` images in all as one .npy file. -> what the .json says of it. UserError if the
    disk is too small, an image is broken, without skip_broken, with an advice, or all of 16 bits are dark."""
    def header(rows):                                       # as long for any count: it is written twice
        facts = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=(rows, 3, size, size))
        np.lib.format.write_array_header_1_0(file, facts)

    digest, broken, kept, low, high = hashlib.sha256(), [], 0, math.inf, -math.inf
    total, square, brightest = 0.0, 0.0, -1                 # sums of bytes: exact, on every machine
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        check_disk(path, count * 3 * size * size * np.dtype(dtype).itemsize)
        header(count)
        progress = Progress(count, "images", path.stem)
        for block, bad, bright in blocks:
            kept, broken, brightest = kept + len(block), broken + bad, max(brightest, bright)
            if len(block):
                file.write(block)
                digest.update(block)
                low, high = min(low, float(block.min())), max(high, float(block.max()))
                for x in block:
                    x = x.ravel().astype(np.float64)
                    total, square = total + x.sum(), square + x @ x
            progress.update(kept + len(broken))
            if len(broken) >= MAX_BROKEN and not skip_broken:
                break
        some = ", ".join(broken[:5] + ["..."] * (len(broken) > 5))
        problem = f"{len(broken):,} of {kept + len(broken):,} images are unusable: {some}"
        if broken and not (skip_broken and kept):
            otherwise = ", or leave them out with --skip-broken" if kept else ""
            raise UserError(f"{problem}. {advice}{otherwise}")
        if 0 <= brightest < 16:
            raise UserError("no image of 16 bits has a value above 4095: all would be almost black; scale "
                            "them to 8 bits first")
        file.seek(0)
        header(kept)
        progress.close()
    if broken:
        print(problem, file=sys.stderr)
    values = kept * 3 * size * size
    deviation = math.sqrt(max(square / values - (total / values)**2, 0.0))
    low, high, unit = (-1.0, 1.0, 127.5) if dtype == "uint8" else (low, high, 1.0)
    return dict(count=kept, dtype=dtype, low=low, high=high, sha256=digest.hexdigest(), left_out=len(broken),
                sigma_data=deviation / unit)


# ------------------------------------------------------------------------------------------- the command line

def _arguments(argv):
    """The flags, checked, with the defaults of this data set."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("name", help=f"{', '.join(SIZES)}, or a name of your own with --src and --size")
    add("--src", type=Path, help="folder, zip or tar of images, .npz or .npy, or the data set's own files "
        "(default: cifar10 is downloaded, shapes and subspace are drawn)")
    add("--size", type=int, help="height and width in pixels (default: the paper's)")
    add("--split", choices=["train", "test", "val", "all"], help="the part of --src to take; test and val "
        "are saved as NAME-test and NAME-val (default: train, or all if --src has no such folders)")
    add("--num-samples", type=int, help="shapes, subspace: number of images (default: 10000, 50000)")
    add("--seed", type=int, help="shapes, subspace: seed of the drawing (default: 0)")
    add("--images", help="subspace: the prepared data set to linearise (default: shapes)")
    add("--components", type=int, help="subspace: number of principal components (default: 25)")
    add("--out", type=Path, default=Path("data"), help="folder for the result (default: data)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 256),
        help="processes (default: one per core)")
    add("--skip-broken", action="store_true", help="leave out images that are broken or too small")
    args = parser.parse_args(argv)
    name, drawn, linear = args.name, args.name in DRAWN, args.name == "subspace"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"name {name!r}: only letters, digits, '_', '-' and '.', as it becomes a file name")
    for flag, fits in dict(src=not drawn, split=not drawn, num_samples=drawn, seed=drawn, images=linear,
                           components=linear).items():
        if getattr(args, flag) is not None and not fits:
            raise UserError(f"--{flag.replace('_', '-')} is not for {name}")
    largest = 32 if linear else 10**5                       # PCA takes a matrix of (3 size^2)^2 numbers
    check_ranges(args, size=(1, largest), num_samples=(1, 10**12), seed=(0, math.inf),
                 components=(1, math.inf), workers=(1, 256))
    if name not in SIZES and not (args.src and args.size):
        raise UserError(f"{name!r} is none of {', '.join(SIZES)}; a set of your own needs --src and --size")
    if name == "cifar10" and args.split == "val":
        raise UserError("--split val: cifar10 has train and test only")
    if args.src:
        check_regular(args.src, f"--src {args.src}")
    args.size = args.size or SIZES[name]                    # none of these is 0, which is refused above
    if drawn:
        args.num_samples, args.seed = args.num_samples or DRAWN[name], args.seed or 0
    if linear:
        args.images, args.components = args.images or "shapes", args.components or 25
    return args


def _label(src):
    return src.resolve().name + (f", {src.stat().st_size:,} bytes" if src.is_file() else "")


def _settings(args):
    """What the .json says of how the data set was made, as far as the flags tell."""
    name = f"{args.name}-{args.split}" if args.split in ("test", "val") else args.name
    settings = dict(name=name, size=args.size)
    if args.split:
        settings["split"] = args.split
    if args.src:
        settings["source"] = _label(args.src)
    if args.name in DRAWN:
        settings.update(split="train", count=args.num_samples, seed=args.seed, source=args.images or "drawn")
    if args.components:
        settings["components"] = args.components
    return settings


def _is_there(settings, folder, src):
    """Whether the data set is prepared. UserError if that was done with other settings."""
    array, info, truth = prepared_files(settings["name"], settings["size"], folder)
    needed = [array, info, *([truth] if settings["name"] == "subspace" else [])]
    if not all(map(os.path.isfile, needed)):
        return False
    images = Images(settings["name"], settings["size"], folder)
    differ = [f"{key} {images.info.get(key)!r}, now {value!r}" for key, value in settings.items()
              if images.info.get(key) != value]
    if differ:
        raise UserError(f"{array} was made with {'; '.join(differ)}: delete it and {info}, or choose another "
                        "--out")
    print(f"{array} is there: {len(images):,} images (source: "
          f"{images.info.get('source')}, split: {images.info.get('split')})"
          + (f"; --src {src} was not read: to prepare it anew delete {array} and {info}" if src else ""))
    return True


def _lock_of(path):
    """The file that is there while a process is in `_one_at_a_time` for a path."""
    return path.with_name(f".{path.name}.lock")


def _one_at_a_time(path):
    """Other processes that come here for the same path wait until this one has left."""
    return locked(_lock_of(path), f"waiting for another process, which prepares {path}",
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
    facts, advice = {}, "Repair or remove them"
    if args.name == "shapes":
        count, items = args.num_samples, ((args.seed, i) for i in range(args.num_samples))
        work = functools.partial(_draw_shapes, size=args.size)
    else:
        src, archive = args.src, args.out / "cifar-10-binary.tar.gz"
        if not src:                                         # its train and its test set need the same file
            with _one_at_a_time(archive):
                src = download(path=archive, **CIFAR10)
        count, items, split, notes = _source(args.name, src, args.split)
        facts = dict(source=_label(src), split=split, notes=notes)
        for note in notes:
            print(note)
        crop = 140 if args.name == "celeba" else None
        if crop:
            advice = ("Aligned CelebA (178 x 218) is needed; images already cropped are a set of your own: "
                      f"python data.py mine --src {src} --size {args.size}")
        work = functools.partial(_decode, size=args.size, crop=crop)
    blocks = _image_blocks(work, items, args.size, args.workers)
    return facts | _write(array, blocks, "uint8", count, args.size, args.skip_broken, advice)


def main(argv=None):
    """Prepares one data set, unless it is there with the same settings."""
    args = _arguments(argv)
    settings = _settings(args)
    array, info, truth = prepared_files(settings["name"], args.size, args.out)
    if _is_there(settings, args.out, args.src):
        if _lock_of(array).exists():                    # left by one that was killed, or is at its end
            with contextlib.suppress(UserError, OSError), _one_at_a_time(array):    # the folder is read-only
                pass
        return
    if args.name in BY_HAND and not args.src:
        raise UserError(f"{args.name} cannot be downloaded by a script. Get {BY_HAND[args.name]}; then run "
                        f"python data.py {args.name} --src FOLDER_OR_ARCHIVE")
    for path in (array, info):
        check_out(path)
    with _one_at_a_time(array):
        if _is_there(settings, args.out, args.src):         # after waiting
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
