"""FID and Inception Score, with the project's own Inception network; two Frechet distances that need no network.

    python fid.py samples.npz --ref cifar10                         # FID and IS; cifar10 as prepared by data.py
    torchrun --nproc_per_node 8 fid.py samples.npz --ref cifar10    # the same number from eight processes
    python fid.py folder_of_png/ --ref cifar10_stats.npz            # statistics as pytorch-fid and clean-fid write them
    python fid.py samples.npz --ref cifar10 --features pixels       # FD-pixels: coarse, but needs no weights
    python fid.py a.npz b.npz c.npz --ref cifar10                   # one after the other, the network loaded once
    python fid.py samples.npz --ref subspace                        # FD-exact, rho and PSNR of Fig. 3

SAMPLES and --ref are an .npz (images under `arr_0`), a .npy, a folder or zip of images, a statistics file (.npz with
`mu` and `sigma`), or the name of a prepared data set (a file or folder of that name comes first). Only a distance on
the features of the published Inception weights is called FID. IS takes the images in order, split after split.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import lapack

from data import (FORMATS, MAX_PIXELS, SUFFIXES, Images, Progress, UserError, as_bytes, atomic_write, command_line, download,
                  noise_estimate, sha256_of)
from unet import start_processes

RESIZE = {"inception": "TF1 bilinear to 299", "pixels": "box to 8"}
DIMENSIONS = {"inception": 2048, "pixels": 192}


# --------------------------------------------------------------- what is judged: images from anywhere, read as a stream

# Images to be read in order: label, for people; path; count, size (H, W) and dtype; read(start, stop, batch), which
# yields arrays [B, H, W, 3]; key(), a hash of the content; protocol, a dict that came with them; truth, of a subspace.
Source = collections.namedtuple("Source", "label path count size dtype read key protocol truth", defaults=({}, None))
Statistics = collections.namedtuple("Statistics", "label path count mean covariance")


@contextlib.contextmanager
def _reading(label):
    """Whatever a damaged file raises while it is read becomes one line."""
    try:
        yield
    except (OSError, ValueError, EOFError, SyntaxError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError,
            RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(f"{label}: damaged or unreadable ({error or type(error).__name__})") from error


def open_source(name, size=None, data_dir="data"):
    """SAMPLES or --ref as a Source or as Statistics; size: of a data set that is given by name. Raises UserError."""
    path = Path(name)
    if not path.exists():
        if path.suffix or len(path.parts) != 1:
            raise UserError(f"{name}: no such file or folder")
        try:
            return _prepared(Images(name, size, data_dir), Path(data_dir))
        except UserError as error:
            raise UserError(f"{name}: no such file or folder, and no prepared data set: {error}") from error
    with _reading(path):
        if path.is_dir() or path.suffix == ".zip":
            return _image_files(path.resolve())             # "." has no name
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                members = {member.filename: member.file_size for member in archive.infolist()}
                protocol = _protocol(archive) if "protocol.npy" in members else {}
            if "mu.npy" in members and "sigma.npy" in members:
                return _statistics(path)
            if "arr_0.npy" not in members:
                raise UserError(f"{path} holds {', '.join(members) or 'nothing'}; images are expected under arr_0, or "
                                "statistics under mu and sigma")
            return _array(path, lambda: zipfile.ZipFile(path).open("arr_0.npy"), members["arr_0.npy"], protocol)
        if path.suffix == ".npy":
            return _array(path, lambda: open(path, "rb"), path.stat().st_size, {})
    raise UserError(f"{path}: neither an .npz, a .npy, a zip nor a folder of images")


def _protocol(archive):
    member = archive.getinfo("protocol.npy")
    if member.file_size > 1 << 20:
        raise ValueError(f"a protocol of {member.file_size:,} bytes")
    protocol = json.loads(str(np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)))
    if not isinstance(protocol, dict):
        raise ValueError("its protocol is not a JSON object")
    return protocol


def _prepared(images, folder):
    def read(start, stop, batch):
        for i in range(start, stop, batch):
            yield images.array[i:min(i + batch, stop)].transpose(0, 2, 3, 1)
    label = f"{images.name}-{images.size}"
    truth = images.truth() if images.array.dtype.kind == "f" else None
    return Source(label, folder / label, len(images), images.shape[1:], images.array.dtype, read,
                  lambda: images.info["sha256"], truth=truth)


def _array(path, open_member, length, protocol):
    """An array [N, H, W, 3] in a file of `length` bytes, read as a stream: an .npz cannot be memory-mapped."""
    with open_member() as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        offset = file.tell()
    if len(shape) == 3 or len(shape) == 4 and shape[3] == 1:
        raise UserError(f"{path} holds greyscale images, {dtype} {shape}; colour images [N, H, W, 3] are expected")
    if len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
        order = " in Fortran order" if fortran else ""
        raise UserError(f"{path} holds {dtype} {shape}{order}; images [N, H, W, 3] are expected")
    if dtype != np.uint8 and dtype.kind != "f":
        raise UserError(f"{path} holds {dtype}; uint8 images, or float images in [-1, 1], are expected")
    row = int(np.prod(shape[1:])) * dtype.itemsize
    if length < offset + shape[0] * row:
        raise UserError(f"{path} is truncated: it ends in image {(length - offset) // row:,} of {shape[0]:,}")

    def read(start, stop, batch):
        with _reading(path), open_member() as file:
            file.seek(offset + start * row)
            for i in range(start, stop, batch):
                images = min(batch, stop - i)
                yield np.frombuffer(file.read(images * row), dtype).reshape(images, *shape[1:])
    return Source(path.name, path, shape[0], shape[1:3], dtype, read, lambda: sha256_of(path), protocol)


def _image_files(path):
    """A folder or zip of images, by name. All headers are read first: that is cheap and finds most faults."""
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    found = archive.namelist() if archive else [p.relative_to(path).as_posix() for p in path.rglob("*")]
    names = sorted(name for name in found if name.lower().endswith(SUFFIXES)
                   and not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    if not names:
        raise UserError(f"{path}: no images in it ({' '.join(SUFFIXES)})")

    def open_file(name):
        return archive.open(name) if archive else open(path / name, "rb")

    def picture(name, decode):
        with _reading(f"{path}/{name}"), open_file(name) as file, Image.open(file, formats=FORMATS) as image:
            if image.mode != "RGB":
                kind = "greyscale" if image.mode in ("L", "LA", "1", "I", "I;16") else "not RGB"
                raise UserError(f"{path}/{name} is {kind} (mode {image.mode}); opaque colour images are expected")
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}/{name} has {image.width} x {image.height} pixels, too many")
            return np.asarray(image) if decode else (image.height, image.width)
    size = picture(names[0], False)
    for name in names:
        if (found := picture(name, False)) != size:
            raise UserError(f"{path} has mixed sizes (height, width): {names[0]} is {size}, {name} {found}")

    def read(start, stop, batch):
        for i in range(start, stop, batch):
            yield np.stack([picture(name, True) for name in names[i:min(i + batch, stop)]])

    def key():
        digest = hashlib.sha256()
        for name in names:
            with open_file(name) as file:
                digest.update(hashlib.sha256(file.read()).digest())
        return digest.hexdigest()
    return Source(path.name, path, len(names), size, np.dtype(np.uint8), read, key)


def _statistics(path):
    with np.load(path, allow_pickle=False) as file:
        mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        count = int(file["n"]) if "n" in file else None
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise UserError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}; [D] and [D, D] are expected")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: mu or sigma holds values that are not finite")
    if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9) or covariance.diagonal().min() < 0:
        raise UserError(f"{path}: sigma is not a covariance matrix (not symmetric, or a negative variance)")
    return Statistics(path.name, path, count, mean, covariance)


def to_bytes(images, label):
    """uint8 images as they are; float images in [-1, 1] rounded to uint8; UserError for another range and for NaN."""
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())    # NaN if any value is
    if not np.isfinite([low, high]).all():
        raise UserError(f"{label} holds values that are not finite (NaN or infinity)")
    if low < -1 or high > 1:
        raise UserError(f"{label} holds float images from {low:.4g} to {high:.4g}: [-1, 1], or uint8, is expected")
    return as_bytes(images)


# ------------------------------------------------------------------------------------------------ the Inception network

WEIGHTS = dict(sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", size=95_628_359, urls=[
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"])


def _narrow(pooled):
    return ["branch1x1:64", "branch5x5_1:48 branch5x5_2:64:5x5",
            "branch3x3dbl_1:64 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3", f"avg branch_pool:{pooled}"]


def _factored(c):
    return ["branch1x1:192", f"branch7x7_1:{c} branch7x7_2:{c}:1x7 branch7x7_3:192:7x1",
            f"branch7x7dbl_1:{c} branch7x7dbl_2:{c}:7x1 branch7x7dbl_3:{c}:1x7 branch7x7dbl_4:{c}:7x1 "
            "branch7x7dbl_5:192:1x7",
            "avg branch_pool:192"]


def _wide(pool):
    return ["branch1x1:320", "branch3x3_1:384 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1",
            "branch3x3dbl_1:448 branch3x3dbl_2:384:3x3 branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1",
            f"{pool} branch_pool:192"]


# Each block of the network: its name, and its branches, whose outputs are joined. A branch is a chain of stages:
# convolutions `name:channels:kernel` (1x1 where none is given; size-keeping padding, or /stride and no padding) and 3x3
# pools `avg` and `max`; a|b runs both and joins them. 7c's max pool is a slip of the 2015 network that FID inherits.
INCEPTION = [
    ("", ["Conv2d_1a_3x3:32:3x3/2 Conv2d_2a_3x3:32:3x3/1 Conv2d_2b_3x3:64:3x3 max/2 "
          "Conv2d_3b_1x1:80 Conv2d_4a_3x3:192:3x3/1 max/2"]),
    ("Mixed_5b.", _narrow(32)), ("Mixed_5c.", _narrow(64)), ("Mixed_5d.", _narrow(64)),
    ("Mixed_6a.", ["branch3x3:384:3x3/2", "branch3x3dbl_1:64 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3/2", "max/2"]),
    ("Mixed_6b.", _factored(128)), ("Mixed_6c.", _factored(160)), ("Mixed_6d.", _factored(160)),
    ("Mixed_6e.", _factored(192)),
    ("Mixed_7a.", ["branch3x3_1:192 branch3x3_2:320:3x3/2", "branch7x7x3_1:192 branch7x7x3_2:192:1x7 "
                   "branch7x7x3_3:192:7x1 branch7x7x3_4:192:3x3/2", "max/2"]),
    ("Mixed_7b.", _wide("avg")), ("Mixed_7c.", _wide("max")),
]


@functools.cache
def _parse(stage):
    """A stage of the table -> name, channels, kernel, stride, padding (a pool has no channels)."""
    text, _, stride = stage.partition("/")
    name, *rest = text.split(":")
    kernel = tuple(map(int, rest[1].split("x"))) if len(rest) > 1 else (1, 1) if rest else (3, 3)
    padding = (0, 0) if stride else tuple(k // 2 for k in kernel)
    return name, int(rest[0]) if rest else None, kernel, int(stride or 1), padding


def _walk(x, step, join):
    """Sends x through the whole table: step(x, block name, stage) -> x, join([x, ...]) -> x."""
    for block, branches in INCEPTION:
        ends = []
        for branch in branches:
            h = x
            for stage in branch.split():
                h = join([step(h, block, part) for part in stage.split("|")])
            ends.append(h)
        x = join(ends)
    return x


def inception_shapes():
    """The state dict that the network takes, name -> shape (the published file holds `num_batches_tracked` as well)."""
    shapes = {}

    def step(channels, block, stage):
        name, out, kernel, _, _ = _parse(stage)
        if out is None:
            return channels
        shapes[f"{block}{name}.conv.weight"] = (out, channels, *kernel)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{block}{name}.bn.{key}"] = (out,)
        return out
    features = _walk(3, step, sum)
    return {**shapes, "fc.weight": (1008, features), "fc.bias": (1008,)}


@functools.cache
def _interpolation(n, size=299):
    """TF1's bilinear interpolation from n to `size` points as a matrix [size, n]: source = destination * n / size."""
    source = torch.arange(size, dtype=torch.float32) * (torch.tensor(float(n)) / size)
    low = source.floor().long()
    share, rows, matrix = source - low, torch.arange(size), torch.zeros(size, n)
    matrix[rows, low] = 1 - share
    matrix[rows, (low + 1).clamp(max=n - 1)] += share
    return matrix


class Inception:
    """The Inception network of FID: uint8 images [B, H, W, 3] -> features [B, 2048], logits without bias [B, 1008].

    state: a state dict with exactly the names and shapes of `inception_shapes()` (`num_batches_tracked` beside them is
    ignored), else UserError, which calls it `label`. Always in float32 (no TF32, no autocast), always as in eval mode.
    """

    def __init__(self, state, device="cpu", label="the weights"):
        shapes = inception_shapes()
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise UserError(f"{label}: not a state dict (names to tensors)")
        given = {k: tuple(v.shape) for k, v in state.items() if not k.endswith(".bn.num_batches_tracked")}
        for key in [*shapes, *given]:
            if shapes.get(key) != given.get(key):
                raise UserError(f"{label}: {key} is {given.get(key, 'missing')}, the Inception network of FID has "
                                f"{shapes.get(key, 'no such tensor')}")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.device, self.folded = torch.device(device), {}
        for key in shapes:
            if key.endswith(".conv.weight"):                # batch norm in eval mode is affine: fold it, in float64
                name = key.removesuffix(".conv.weight")
                gain, bias, mean, var = (state[f"{name}.bn.{k}"].double()
                                         for k in ("weight", "bias", "running_mean", "running_var"))
                gain = gain / torch.sqrt(var + 1e-3)
                weight = (state[key].double() * gain[:, None, None, None]).float()
                self.folded[name] = (weight.to(self.device, memory_format=torch.channels_last),
                                     (bias - mean * gain).float().to(self.device))
        self.fc = state["fc.weight"].float().to(self.device)
        for name, tensors in {**self.folded, "fc": (self.fc,)}.items():
            if not all(v.isfinite().all() for v in tensors):
                raise UserError(f"{label}: {name} holds values that are not finite, or a negative variance")

    def _step(self, x, block, stage):
        name, channels, kernel, stride, padding = _parse(stage)
        if name == "max":
            return F.max_pool2d(x, kernel, stride, padding)
        if name == "avg":
            return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=False)
        return F.conv2d(x, *self.folded[block + name], stride, padding).relu_()

    @torch.inference_mode()
    def __call__(self, images):
        with torch.autocast(self.device.type, enabled=False):
            x = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2).float()             # [B, 3, H, W]
            # (x - 128) / 128 is exact on bytes and commutes with interpolation: cheaper before it.
            x = self._resize((x - 128) / 128).contiguous(memory_format=torch.channels_last)     # [B, 3, 299, 299]
            x = _walk(x, self._step, lambda h: torch.cat(h, 1) if len(h) > 1 else h[0])         # [B, 2048, 8, 8]
            features = x.mean((2, 3))
            return features, features @ self.fc.T

    def _resize(self, x):
        rows, columns = (_interpolation(n).to(self.device) for n in x.shape[2:])
        return rows @ (x @ columns.T)


# --------------------------------------------------------------------------------------- moments, distances and scores

class Moments:
    """Mean and covariance of feature vectors that come in batches, from any number of processes, in float64.

    Batches and processes are joined by their own means and scatter matrices (Chan et al. 1979). Plain sums of outer
    products would lose digits where a feature's mean is large beside its spread; the distance between singular
    covariances, where rounding errors enter by their square roots, feels that. device: where the sums live."""

    def __init__(self, dimensions, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def add(self, features):
        """Takes in a batch [B, D]."""
        x = features.to(self.mean.device, torch.float64)
        mean, count = x.mean(0), self.count + len(x)
        x, step = x - mean, mean - self.mean
        self.scatter.addmm_(x.T, x).addr_(step, step, alpha=self.count * len(x) / count)
        self.mean += step * (len(x) / count)
        self.count = count

    def total(self):
        """-> count, mean [D], covariance [D, D] (ddof 1) over all processes, as numpy; every process must call it."""
        count = sum(share(self.count))
        mean = all_sum(self.mean * self.count) / count
        step = self.mean - mean
        scatter = all_sum(self.scatter.addr(step, step, alpha=self.count))
        return count, mean.cpu().numpy(), (scatter / (count - 1)).cpu().numpy()


def _factor(covariance):
    """[D, D], positive semi-definite -> L [D, rank] with L L^T = covariance, by Cholesky with pivots, which stops at
    the numerical rank: directions that hold rounding errors only are left out, not square-rooted."""
    lower, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """|mean_1 - mean_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of two Gaussians: mean [D], covariance S [D, D], float64.

    With S = L L^T, the trace of the square root is the sum of the singular values of L_1^T L_2. Their squares are the
    eigenvalues of a symmetric matrix, which take a third of the time but cost the smallest ones digits: if that would
    show, the singular values are computed themselves."""
    product = _factor(covariance_1).T @ _factor(covariance_2)                                    # [rank_1, rank_2]
    if product.shape[0] > product.shape[1]:
        product = product.T
    trace = 0.0
    if product.size:
        square = np.linalg.eigvalsh(product @ product.T)
        singular = np.sqrt(np.maximum(square, np.finfo(float).tiny))
        # An error of eps * square[-1] in every square moves its root by that over twice the root.
        if np.finfo(float).eps * square[-1] * (0.5 / singular).sum() > 1e-9 * singular.sum():
            singular = np.linalg.svd(product, compute_uv=False)
        trace = singular.sum()
    step = mean_1 - mean_2
    return float(step @ step + np.trace(covariance_1) + np.trace(covariance_2) - 2 * trace)


class Score:
    """The Inception Score (Salimans et al. 2016) of `count` images in `splits` consecutive splits, in float64."""

    def __init__(self, count, splits, device="cpu"):
        self.ends = torch.tensor([(i + 1) * count // splits for i in range(splits)], device=device)
        # A row per split: its sum of p log p over images and classes, then its sum of p per class.
        self.sums = torch.zeros(splits, 1 + 1008, dtype=torch.float64, device=device)

    def add(self, logits, first):
        """Takes in the logits [B, 1008] of images first, first + 1, ..."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        split = torch.bucketize(first + torch.arange(len(p), device=p.device), self.ends, right=True)
        self.sums.index_add_(0, split, torch.cat([(p * log_p).sum(1, keepdim=True), p], 1))

    def total(self):
        """-> mean and standard deviation over the splits (ddof 0), of all processes; every process must call it."""
        average = all_sum(self.sums) / self.ends.diff(prepend=self.ends.new_zeros(1))[:, None]
        entropy = torch.special.entr(average[:, 1:]).sum(1)                                      # of the marginal
        scores = (average[:, 0] + entropy).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def pixel_features(images):
    """uint8 images [B, H, W, 3] -> their 8 x 8 box averages in [-1, 1], float64 [B, 192]; H, W multiples of 8."""
    x = torch.as_tensor(images).double() / 127.5 - 1
    return x.unflatten(2, (8, -1)).unflatten(1, (8, -1)).mean((2, 4)).flatten(1)


# ---------------------------------------------------------------------------------------------------------- processes

def share(value):
    """The `value` of every process, in order of rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def all_sum(tensor):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def together(work):
    """work() in every process; a UserError in one is raised in all, so that none waits for one that has gone."""
    error = None
    try:
        work()
    except UserError as mistake:
        error = str(mistake)
    for error in share(error):
        if error:
            raise UserError(error)


# ------------------------------------------------------------------------------------------------------- measurements

def _each_batch(source, process, batch, use):
    """use(images [B, H, W, 3], index of the first) for every batch of this process's share of the images."""
    first, last = (source.count * (process.rank + i) // process.world for i in (0, 1))
    label = source.label if process.world == 1 else f"{source.label}, one of {process.world} shares"

    def run():
        progress, done = Progress(last - first, "images", label), first
        for images in source.read(first, last, batch):
            use(images, done)
            done += len(images)
            progress.update(done - first)
        progress.close()
    together(run)


def measure(source, extract, features, process, batch, splits=0):
    """Of a Source, given extract(uint8 [B, H, W, 3]) -> features, logits:

    its Statistics; the IS as (mean, deviation), or None; `noise_estimate` in [-1, 1] units, the mean over its images as bytes.
    """
    moments = Moments(DIMENSIONS[features], process.device)
    noise = torch.zeros((), dtype=torch.float64, device=process.device)
    score = Score(source.count, splits, process.device) if splits else None

    def use(images, first):
        images = np.array(to_bytes(images, source.label))                   # a copy: torch takes no read-only array
        noise.add_(noise_estimate(torch.from_numpy(images).to(process.device).permute(0, 3, 1, 2)).sum() / 127.5)
        x, logits = extract(images)
        moments.add(x)
        if score:
            score.add(logits, first)
    _each_batch(source, process, batch, use)
    return (Statistics(source.label, source.path, *moments.total()), score.total() if score else None,
            all_sum(noise).item() / source.count)


def measure_subspace(source, truth, process, batch):
    """How far samples are from a known Gaussian x = mu + (a * scale) @ U, a ~ N(0, 1), U [k, D] (Fig. 3), as a dict.

    The Frechet distance to it falls into a part inside the subspace, that of the coefficients, and a part outside,
    where the Gaussian has no variance. rho = |x - mu - U^T U (x - mu)|: mean and percentiles. PSNR of x against its
    projection: of the mean squared error, peak 2 (the width of [-1, 1]). variance_kept: inside, found/true."""
    moments, outside = Moments(len(truth["scale"])), torch.zeros(len(truth["mean"]), dtype=torch.float64)
    true = truth["scale"] ** 2
    rho = [np.zeros(0)]                                     # 8 bytes an image, for the percentiles

    def add(images, _):
        x = images.transpose(0, 3, 1, 2).reshape(len(images), -1).astype(np.float64) - truth["mean"]            # [B, D]
        if not np.isfinite(x).all():
            raise UserError(f"{source.label} holds values that are not finite (NaN or infinity)")
        a = x @ truth["components"].T                                                                           # [B, k]
        x -= a @ truth["components"]
        outside.add_(torch.from_numpy(x.sum(0)))
        rho.append(np.linalg.norm(x, axis=1))
        moments.add(torch.from_numpy(a))
    _each_batch(source, process, batch, add)
    rho = np.concatenate(share(np.concatenate(rho)))                                                            # [N]
    count, mean, covariance = moments.total()
    shift = (all_sum(outside) / count).square().sum().item()
    fd_outside = shift + ((rho ** 2).sum() - count * shift) / (count - 1)
    fd_inside = frechet_distance(mean, covariance, np.zeros_like(mean), np.diag(true))
    error = max((rho ** 2).mean() / len(truth["mean"]), 1e-12)                              # at most 126 dB
    return {"value": fd_inside + fd_outside, "fd_inside": fd_inside, "fd_outside": fd_outside, "rho_mean": rho.mean(),
            "rho_percentiles": {str(q): np.percentile(rho, q) for q in (5, 25, 50, 75, 95)},
            "psnr": 10 * np.log10(4 / error), "variance_kept": np.trace(covariance) / true.sum()}


# --------------------------------------------------------------------------------------------------- the command line

def load_inception(path, data_dir, device):
    """-> Inception, sha256 of its weights; path None: the published ones, downloaded by one process per machine."""
    target = Path(path or Path(data_dir) / "pt_inception-2015-12-05-6726825d.pth")

    def fetch():
        if path is None and os.environ.get("LOCAL_RANK", "0") == "0":
            download(path=target, **WEIGHTS)
    together(fetch)
    if not target.is_file():
        raise UserError(f"--weights {target}: no such file")
    try:
        state = torch.load(target, map_location="cpu", weights_only=True)
    except Exception as error:                              # torch.load raises almost anything on a damaged file
        raise UserError(f"{target}: not a whole PyTorch weights file ({str(error)[:100]!r})") from error
    return Inception(state, device, target), sha256_of(target)


def reference_statistics(reference, extract, features, weights, process, batch):
    """The Statistics of a Source, from its cache if there; the cache's name changes with all that it depends on."""
    if isinstance(reference, Statistics):
        return reference
    facts = [reference.key(), features, weights, sha256_of(__file__)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    cache = reference.path.with_name(f"{reference.label}.{features}-{key}.npz")
    if all(share(cache.exists())):
        return open_source(cache)._replace(label=reference.label)
    statistics, *_ = measure(reference, extract, features, process, batch)
    if process.rank == 0:
        try:
            with atomic_write(cache) as partial, open(partial, "wb") as file:
                np.savez(file, mu=statistics.mean, sigma=statistics.covariance, n=statistics.count)
        except UserError as error:                          # a folder that is not ours: slower next time, no more
            print(f"warning: the statistics of {reference.label} are not kept: {error}", file=sys.stderr)
    return statistics


def arguments(argv):
    """The command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", metavar="SAMPLES", nargs="+",
                        help="the images to judge: file, folder or name, see above; several are judged one by one")
    parser.add_argument("--ref", required=True, help="the images to compare with, or their statistics: the same choice")
    parser.add_argument("--features", choices=["inception", "pixels"],
                        help="what the distance is measured on (default inception; no choice for subspace data)")
    parser.add_argument("--weights", help="file with Inception weights (default: the published ones, downloaded once)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time, per process (default 32)")
    parser.add_argument("--splits", type=int, default=10, help="splits of the Inception Score (default 10)")
    parser.add_argument("--size", type=int, help="of a data set given by name (default: as SAMPLES, or the paper's)")
    parser.add_argument("--data-dir", default="data", help="folder of prepared data sets and weights (default data)")
    parser.add_argument("--out", type=Path, help="the result as JSON (default: beside SAMPLES as SAMPLES.fid.json, "
                        ".fd-inception.json, .fd-pixels.json or .fd-exact.json)")
    args = parser.parse_args(argv)
    if args.out and len(args.samples) > 1:
        raise UserError(f"--out {args.out}: is the result of one SAMPLES; {len(args.samples)} are given, leave it out")
    if args.batch < 1 or args.splits < 1:
        raise UserError(f"--batch {args.batch} --splits {args.splits}: both must be at least 1")
    return args


def check(samples, reference, features, args):
    """Refuses what can be refused before any work, as UserError; -> warnings."""
    warnings = []
    for source in (samples, reference):
        if source.count is not None and source.count < 2:
            raise UserError(f"{source.label} holds {source.count} image: a covariance takes at least 2")
        if isinstance(source, Source) and features != "exact":
            head = next(source.read(0, min(source.count, 64), 64))
            if to_bytes(head, source.label).min() >= 128 and head.dtype != np.uint8:
                raise UserError(f"{source.label} holds float images, none negative: [-1, 1], or uint8, is expected")
            if features == "pixels" and (source.size[0] % 8 or source.size[1] % 8):
                raise UserError(f"--features pixels: {source.size}, of {source.label}, are not multiples of 8")
            warnings += [f"{source.label}: {source.count:,} images are fewer than {limit:,}, {effect}" for limit, effect
                         in ((DIMENSIONS[features], "the covariance of their features is singular"),
                             (10_000, "the distance comes out too large")) if source.count < limit]
        elif isinstance(source, Statistics) and len(source.mean) != DIMENSIONS.get(features):
            raise UserError(f"{source.label} holds statistics of {len(source.mean)} features, which do not go with "
                            f"{'the exact distance' if features == 'exact' else '--features ' + features}")
    if isinstance(samples, Source) and isinstance(reference, Source) and samples.size != reference.size:
        raise UserError(f"{samples.label} holds images of {samples.size}, {reference.label} of {reference.size} "
                        "(height, width): choose another --ref or --size")
    if features == "exact" and samples.dtype.kind != "f":
        raise UserError(f"{samples.label} holds {samples.dtype}: floats in the units of {reference.label} are expected")
    if features == "inception" and isinstance(samples, Source) and samples.count < args.splits:
        raise UserError(f"--splits {args.splits}: {samples.label} has only {samples.count} images")
    return warnings


def describe(result):
    """The result and its whole protocol as one line."""
    made = result["protocol"]
    text = [f"{result['metric']} {result['value']:.6g}"]
    if "is_mean" in result:
        text.append(f"IS {result['is_mean']:.5g} \u00b1 {result['is_std']:.2g} ({result['splits']} splits)")
    if "rho_mean" in result:
        percentiles = " ".join(f"{value:.4g}" for value in result["rho_percentiles"].values())
        text += [f"rho {result['rho_mean']:.4g} (5/25/50/75/95 %: {percentiles})", f"PSNR {result['psnr']:.4g} dB",
                 f"variance kept {result['variance_kept']:.4g}"]
    if "noise_mean" in result:
        text.append(f"noise estimate {result['noise_mean']:.4g}")
    text.append(f"N {result['n'] or '?'} of {result['samples']}")
    text += [f"{name} {made[key]}" for key, name in
             (("method", "method"), ("step", "training step"), ("data", "trained on"), ("p", "p"), ("sigma", "sigma"),
              ("ema", "EMA"), ("sampler", "sampler"), ("steps", "steps"), ("variance", "variance")) if key in made]
    text.append(f"reference {result['reference']} N {result['n_reference'] or '?'}")
    text += [f"{key} {result[key]}" for key in ("resize", "weights") if result.get(key)]
    return " | ".join(text)


def evaluate(path, args, process, inception):
    """Measures the images at `path` against args.ref, prints one line and writes it as JSON.

    inception() -> what `load_inception` gives.
    """
    samples = open_source(path, args.size, args.data_dir)
    size = args.size or (samples.size[0] if isinstance(samples, Source) else None)
    reference = open_source(args.ref, size, args.data_dir)
    features = args.features or "inception"
    if isinstance(reference, Source) and reference.truth:
        if args.features:
            raise UserError(f"--features {args.features}: not with {reference.label}, a known Gaussian (FD-exact)")
        features = "exact"
    warnings = check(samples, reference, features, args)
    result = dict(metric=f"FD-{features}", samples=samples.label, n=samples.count, reference=reference.label,
                  n_reference=reference.count, resize=RESIZE.get(features), weights=None,
                  protocol=getattr(samples, "protocol", {}), warnings=warnings, processes=process.world,
                  device=process.device.type)
    if isinstance(reference, Statistics):
        result["reference"] += " (statistics, which do not say their weights and resize)"
    if features == "exact":
        began = time.perf_counter()
        result.update(measure_subspace(samples, reference.truth, process, args.batch))
    else:
        weights, extract = None, lambda images: (pixel_features(images), None)
        if features == "inception" and Source in (type(samples), type(reference)):
            extract, weights = inception()
            result["weights"] = f"sha256 {weights}"
            if weights == WEIGHTS["sha256"]:
                result["metric"] = "FID"
            else:
                result["weights"] += " (not the published ones: not to be called FID)"
        target = reference_statistics(reference, extract, features, weights, process, args.batch)
        began = time.perf_counter()
        if isinstance(samples, Source):
            splits = args.splits if features == "inception" else 0
            samples, score, result["noise_mean"] = measure(samples, extract, features, process, args.batch, splits)
            if score:
                result.update(is_mean=score[0], is_std=score[1], splits=splits)
        if process.rank == 0:
            result["value"] = frechet_distance(samples.mean, samples.covariance, target.mean, target.covariance)
    if result["n"]:
        result["images_per_second"] = result["n"] / (time.perf_counter() - began)
    if process.rank == 0:
        out = args.out or samples.path.with_name(f"{samples.label}.{result['metric'].lower()}.json")
        with atomic_write(out) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(describe(result))
        print(f"wrote {out}; {result.get('images_per_second', 0):.4g} images/s", file=sys.stderr)


def main(argv=None):
    """Judges all args.samples; the network is loaded once."""
    args = arguments(argv)
    process = start_processes()
    inception = functools.cache(lambda: load_inception(args.weights, args.data_dir, process.device))
    failed = 0
    for path in args.samples:
        try:
            evaluate(path, args, process, inception)
        except UserError as error:
            # Of several, the others are still judged; other processes may be waiting for this one, which must then end.
            if len(args.samples) == 1 or process.world > 1:
                raise
            print(f"fid.py: error: {error}", file=sys.stderr)
            failed += 1
    if failed:
        raise UserError(f"{failed} of the {len(args.samples)} SAMPLES could not be judged, see above")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
