"""FID and Inception Score, with the kit's own Inception network; two Frechet distances that need no network.

    python fid.py samples.npz --ref cifar10                       # FID and IS; cifar10 as prepared by data.py
    torchrun --nproc_per_node 8 fid.py samples.npz --ref cifar10    # the same number from eight processes
    python fid.py folder_of_png/ --ref cifar10_stats.npz  # statistics as pytorch-fid and clean-fid write them
    python fid.py samples.npz --ref cifar10 --features pixels       # FD-pixels: coarse, but needs no weights
    python fid.py a.npz b.npz c.npz --ref cifar10               # one after the other, the network loaded once
    python fid.py samples.npz --ref subspace                        # FD-exact, rho and PSNR of Fig. 3

SAMPLES and --ref are an .npz (images under `arr_0`), a .npy, a folder, zip or tar of images, a statistics
file (.npz with `mu` and `sigma`), or the name of a prepared data set (a file or folder of that name comes
first). Only a distance on the features of the published Inception weights is called FID. IS takes the images
in order, split after split.
"""

import common                                               # first: it answers Ctrl-C while others load

import functools
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import lapack

from common import (Progress, UserError, all_sum, atomic_write, check_out, check_ranges, command_line,
                    download, gather, is_first_process, noise_estimate, parser_of, sha256_of, start_processes,
                    together, write_json)
from data import (Images, Source, array_header, array_source, check_range, check_regular, files_told,
                  image_members, is_deep, open_image, reading, split_folders, steps, to_bytes)
from gaussian import predicted

RESIZE = {"inception": "TF1 bilinear to 299", "pixels": "box to 8"}
DIMENSIONS = {"inception": 2048, "pixels": 192}


# ----------------------------------------------------- what is judged: images from anywhere, read as a stream

class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] (ddof 1) of the features of `count` images (None: not known)."""
    label: str
    path: Path
    count: Any
    mean: np.ndarray
    covariance: np.ndarray


def open_source(name, size=None, data_dir="data"):
    """SAMPLES or --ref as a Source or as Statistics, else UserError; size: of a data set given by name."""
    path = Path(name)
    if not os.path.exists(name):                            # False for a name too long, too
        if len(path.parts) != 1 or path.suffix.lower() in (".npy", ".npz", ".zip", ".tar"):
            raise UserError(f"{name}: no such file or folder")
        try:
            return prepared_source(Images(name, size, data_dir), data_dir)
        except UserError as error:
            raise UserError(f"{name}: no such file or folder, and no prepared data set: {error}") from error
    check_regular(path, name)
    with reading(path):
        if os.path.isdir(path) or path.suffix.lower() not in (".npy", ".npz"):
            return _folder_or_archive(path.resolve())       # "." has no name
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if {"mu.npy", "sigma.npy"} <= set(archive.namelist()):
                    return _statistics(path, archive)
    return array_source(path)


def prepared_source(images, data_dir):
    """The clean images of an `Images` object as a Source."""
    def read(start, stop, batch):
        for i, j in steps(start, stop, batch, images.array[0].nbytes):
            yield images.array[i:j].transpose(0, 2, 3, 1)
    label = f"{images.name}-{images.size}"

    def key():
        with reading(f"{label}.json"):
            return str(images.info["sha256"])
    truth = images.truth() if images.array.dtype.kind == "f" else None
    return Source(label, Path(data_dir) / label, len(images), images.shape[1:], images.array.dtype, read, key,
                  truth=truth)


def _folder_or_archive(path):
    """A folder, zip or tar of images, by name. All headers are read first: cheap, and finds most faults."""
    names, payload, left = image_members(path)
    kinds, told = split_folders(names)[1:]
    if len(set(kinds.values())) > 1:
        raise UserError(f"{path} holds images of several splits, or classes so called: {told(kinds)}. Give "
                        "one folder, or prepare a data set: data.py's --split says what it takes")

    def picture(name, decode):
        with reading(f"{path}/{name}"), open_image(payload(name)) as image:
            if image.mode not in ("RGB", "P") or "transparency" in image.info or is_deep(image):
                deep = ", of 16 bits" if is_deep(image) else ""
                raise UserError(f"{path}/{name} is of mode {image.mode}{deep}; "
                                "opaque colour images (RGB) of 8 bits are expected")
            return np.asarray(image.convert("RGB")) if decode else (image.height, image.width)
    size = picture(names[0], False)
    for name in names:
        if (found := picture(name, False)) != size:
            raise UserError(f"{path} has mixed sizes (height, width): {names[0]} is {size}, {name} {found}")

    def read(start, stop, batch):
        for i, j in steps(start, stop, batch, 3 * size[0] * size[1]):
            yield np.stack([picture(name, True) for name in names[i:j]])

    def key():
        digest = hashlib.sha256()
        for name in names:
            content = payload(name)
            content = content.read_bytes() if isinstance(content, Path) else content
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()
    note = f"{path.name}: {files_told(len(names), left)}" if left else ""
    return Source(path.name, path, len(names), size, np.dtype(np.uint8), read, key, note=note)


def _statistics(path, archive):
    found = {}                                              # read from the headers, before memory is taken
    for member in archive.infolist():
        if member.filename in ("mu.npy", "sigma.npy", "n.npy"):
            with archive.open(member) as file:
                found[member.filename[:-4]] = array_header(file, path, member.file_size)
    (mu, _, mu_type), (sigma, _, sigma_type) = found["mu"], found["sigma"]
    n, *_ = found.get("n", [()])
    if (len(mu) != 1 or mu[0] not in DIMENSIONS.values() or sigma != 2 * mu or n != ()
            or {mu_type.kind, sigma_type.kind} != {"f"}):
        features = ", ".join(f"{size} of {name}" for name, size in DIMENSIONS.items())
        raise UserError(f"{path}: mu is {mu_type} {mu} and sigma {sigma_type} {sigma}; floats [D] and [D, D] "
                        f"are expected, D the number of features: {features}")
    with np.load(path, allow_pickle=False) as file:
        mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        count = int(file["n"]) if "n" in file else None
    if not (max(abs(mean).max(), abs(covariance).max()) < 1e100 and covariance.diagonal().min() >= 0
            and np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9)):
        raise UserError(f"{path}: mu and sigma are no mean and covariance "
                        "(not finite, too large, not symmetric or negative)")
    return Statistics(path.name, path, count, mean, covariance)


def check_pair(samples, reference):
    """UserError where two Sources cannot be compared: other sizes or units, a range that is none of ours."""
    if samples.size != reference.size:
        raise UserError(f"{samples.label} holds images of {samples.size}, {reference.label} of "
                        f"{reference.size} (height, width): choose others, or another --size")
    if not reference.truth:
        check_range(samples)
        check_range(reference)
    elif samples.dtype.kind != "f":
        raise UserError(f"{samples.label} holds {samples.dtype}: "
                        f"floats in the units of {reference.label} are expected")


def batches(source, batch, process):
    """Yields (index of the first image, images [B, H, W, 3]) of this process's part; shows progress."""
    first, last = (source.count * (process.rank + i) // process.world for i in (0, 1))
    label = source.label if process.world == 1 else f"{source.label}, one of {process.world} parts"
    progress, done = Progress(last - first, "images", label), first
    for images in source.read(first, last, batch):
        yield done, images
        done += len(images)
        progress.update(done - first)
    progress.close()


# -------------------------------------------------------------------------------------- the Inception network

WEIGHTS = dict(
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", size=95_628_359, urls=[
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"])

# A block takes x [B, C, H, W] and layers(x, *chain), which applies one convolution after another, each with
# batch norm and ReLU: (name in the weights file, channels, height, width, stride). Without height and width
# it is 1 x 1; without a stride it keeps the size, with one it has no padding.


def _average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _mixed_5(x, layers, pooled):
    return torch.cat([
        layers(x, ("branch1x1", 64)),
        layers(x, ("branch5x5_1", 48), ("branch5x5_2", 64, 5, 5)),
        layers(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)),
        layers(_average(x), ("branch_pool", pooled))], 1)


def _mixed_6a(x, layers):
    return torch.cat([
        layers(x, ("branch3x3", 384, 3, 3, 2)),
        layers(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3, 2)),
        F.max_pool2d(x, 3, 2)], 1)


def _mixed_6(x, layers, c):
    return torch.cat([
        layers(x, ("branch1x1", 192)),
        layers(x, ("branch7x7_1", c), ("branch7x7_2", c, 1, 7), ("branch7x7_3", 192, 7, 1)),
        layers(x, ("branch7x7dbl_1", c), ("branch7x7dbl_2", c, 7, 1), ("branch7x7dbl_3", c, 1, 7),
               ("branch7x7dbl_4", c, 7, 1), ("branch7x7dbl_5", 192, 1, 7)),
        layers(_average(x), ("branch_pool", 192))], 1)


def _mixed_7a(x, layers):
    return torch.cat([
        layers(x, ("branch3x3_1", 192), ("branch3x3_2", 320, 3, 3, 2)),
        layers(x, ("branch7x7x3_1", 192), ("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1),
               ("branch7x7x3_4", 192, 3, 3, 2)),
        F.max_pool2d(x, 3, 2)], 1)


def _mixed_7(x, layers, pooled):
    three = layers(x, ("branch3x3_1", 384))
    double = layers(x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3, 3))
    return torch.cat([
        layers(x, ("branch1x1", 320)),
        layers(three, ("branch3x3_2a", 384, 1, 3)), layers(three, ("branch3x3_2b", 384, 3, 1)),
        layers(double, ("branch3x3dbl_3a", 384, 1, 3)), layers(double, ("branch3x3dbl_3b", 384, 3, 1)),
        layers(pooled, ("branch_pool", 192))], 1)


def _network(x, convolution):
    """x [B, 3, 299, 299] -> [B, 2048, 8, 8], by convolution(x, name, channels, height, width, stride)."""
    def block(name):
        def layers(x, *chain):
            for layer, channels, *shape in chain:
                x = convolution(x, name + layer, channels, *shape)
            return x
        return layers
    x = block("")(x, ("Conv2d_1a_3x3", 32, 3, 3, 2), ("Conv2d_2a_3x3", 32, 3, 3, 1),
                  ("Conv2d_2b_3x3", 64, 3, 3))
    x = F.max_pool2d(x, 3, 2)                                                                # [B, 64, 73, 73]
    x = block("")(x, ("Conv2d_3b_1x1", 80), ("Conv2d_4a_3x3", 192, 3, 3, 1))
    x = F.max_pool2d(x, 3, 2)                                                               # [B, 192, 35, 35]
    for name, pooled in (("Mixed_5b.", 32), ("Mixed_5c.", 64), ("Mixed_5d.", 64)):
        x = _mixed_5(x, block(name), pooled)                                                # [B, 288, 35, 35]
    x = _mixed_6a(x, block("Mixed_6a."))                                                    # [B, 768, 17, 17]
    for name, c in (("Mixed_6b.", 128), ("Mixed_6c.", 160), ("Mixed_6d.", 160), ("Mixed_6e.", 192)):
        x = _mixed_6(x, block(name), c)
    x = _mixed_7a(x, block("Mixed_7a."))                                                     # [B, 1280, 8, 8]
    x = _mixed_7(x, block("Mixed_7b."), _average(x))
    return _mixed_7(x, block("Mixed_7c."), F.max_pool2d(x, 3, 1, 1))   # max: a slip of 2015 that FID inherits


def _convolve(x, weight, bias, stride):
    padding = 0 if stride else (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, stride or 1, padding).relu_()


def inception_shapes():
    """The state dict that the network takes, name -> shape (`num_batches_tracked` is left out)."""
    shapes = {}

    def convolution(x, name, channels, height=1, width=1, stride=None):
        shape = shapes[f"{name}.conv.weight"] = (channels, x.shape[1], height, width)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{key}"] = (channels,)
        return _convolve(x, torch.empty(shape, device="meta"), None, stride)
    features = _network(torch.empty(1, 3, 299, 299, device="meta"), convolution)
    return {**shapes, "fc.weight": (1008, features.shape[1]), "fc.bias": (1008,)}


@functools.cache
def _interpolation(n, device, size=299):
    """TF1's bilinear interpolation from n to `size` points, where source = destination * n / size, as a
    matrix [size, n]."""
    source = torch.arange(size, dtype=torch.float32) * (torch.tensor(float(n)) / size)
    low = source.floor().long()
    upper, rows, matrix = source - low, torch.arange(size), torch.zeros(size, n)
    matrix[rows, low] = 1 - upper
    matrix[rows, (low + 1).clamp(max=n - 1)] += upper
    return matrix.to(device)


class Inception:
    """The Inception network of FID: uint8 images [B, H, W, 3] -> features [B, 2048] and logits [B, 1008]
    without bias.

    state: a state dict with exactly the names and shapes of `inception_shapes()` (`num_batches_tracked`
    beside them is ignored), else UserError, which calls it `label`. In float32 (see `start_processes`),
    always as in eval mode.
    """

    def __init__(self, state, device="cpu", label="the weights"):
        shapes = inception_shapes()
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise UserError(f"{label}: not a state dict (names to tensors)")
        given = {k: tuple(v.shape) for k, v in state.items() if not k.endswith(".bn.num_batches_tracked")}
        for key in [*shapes, *given]:
            if shapes.get(key) != given.get(key):
                raise UserError(f"{label}: {key} is {given.get(key, 'missing')}, the Inception network of "
                                f"FID has {shapes.get(key, 'no such tensor')}")
        self.device, self.folded = torch.device(device), {}
        for key in shapes:
            if key.endswith(".conv.weight"):          # batch norm in eval mode is affine: fold it, in float64
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

    def _convolution(self, x, name, channels, height=1, width=1, stride=None):
        return _convolve(x, *self.folded[name], stride)

    @torch.inference_mode()
    def __call__(self, images):
        x = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2).float()                 # [B, 3, H, W]
        # (x - 128) / 128 is exact on bytes and commutes with interpolation: cheaper before it.
        rows, columns = (_interpolation(n, self.device) for n in x.shape[2:])
        x = rows @ ((x - 128) / 128 @ columns.T)                                            # [B, 3, 299, 299]
        features = _network(x.contiguous(memory_format=torch.channels_last), self._convolution).mean((2, 3))
        return features, features @ self.fc.T


# ------------------------------------------------------------------------------ moments, distances and scores

class Moments:
    """Mean and covariance of feature vectors that come in batches, from any number of processes, in float64.

    Batches and processes are joined by their own means and scatter matrices (Chan et al. 1979). Plain sums of
    outer products would lose digits where a feature's mean is large beside its spread; the distance between
    singular covariances, where rounding errors enter by their square roots, feels that. device: where the
    sums live."""

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
        """-> count, mean [D], covariance [D, D] (ddof 1) over all processes, as numpy; every process must
        call it. UserError where they are not finite."""
        count = sum(gather(self.count))
        mean = all_sum(self.mean * self.count) / count
        step = self.mean - mean
        covariance = all_sum(self.scatter.addr(step, step, alpha=self.count)) / (count - 1)
        if not covariance.isfinite().all():
            raise UserError("the features hold values that are not finite (NaN or infinity), or too large")
        return count, mean.cpu().numpy(), covariance.cpu().numpy()


def _root(covariance):
    """[D, D], positive semi-definite -> L [D, rank] with L L^T = covariance.

    Where the rank is full, Cholesky's lower triangle. That is found for nearly singular matrices, too, with
    rounding errors for digits: the condition number tells. For these, and singular ones, Cholesky with
    pivots, which stops at the numerical rank: directions that hold rounding errors only are left out, not
    square-rooted."""
    lower, failed = lapack.dpotrf(covariance, lower=1)
    largest = abs(covariance).sum(0).max()                  # the 1-norm, which the condition number is of
    if not failed and lapack.dpocon(lower, largest, uplo="L")[0] > len(covariance) * np.finfo(float).eps:
        return lower
    lower, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)
    root = np.empty((len(covariance), rank))
    root[pivots - 1] = np.tril(lower)[:, :rank]
    return root


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """|mean_1 - mean_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of two Gaussians: mean [D], covariance
    S [D, D].

    With S = L L^T, the trace of the square root is the sum of the singular values of L_1^T L_2. Their squares
    are the eigenvalues of L_1^T S_2 L_1, which take half the time but cost the smallest ones digits: if that
    would show, or a covariance is singular, the singular values are computed themselves."""
    root_1, root_2 = _root(covariance_1), _root(covariance_2)
    trace = None
    if root_1.shape == root_2.shape == covariance_1.shape:
        square = np.linalg.eigvalsh(lapack.dsygst(covariance_2, root_1, itype=2, lower=1)[0])
        singular = np.sqrt(np.maximum(square, np.finfo(float).tiny))
        # An error of eps * square[-1] in every square moves its root by that over twice the root.
        if np.finfo(float).eps * square[-1] * (0.5 / singular).sum() <= 1e-9 * singular.sum():
            trace = singular.sum()
    if trace is None:
        trace = np.linalg.svd(root_1.T @ root_2, compute_uv=False).sum()
    step = mean_1 - mean_2
    return float(step @ step + np.trace(covariance_1) + np.trace(covariance_2) - 2 * trace)


class Score:
    """The Inception Score (Salimans et al. 2016) of `count` images in consecutive splits, in float64."""

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
        """-> mean and standard deviation (ddof 0) over the splits; every process must call it."""
        average = all_sum(self.sums) / self.ends.diff(prepend=self.ends.new_zeros(1))[:, None]
        entropy = torch.special.entr(average[:, 1:]).sum(1)                                  # of the marginal
        scores = (average[:, 0] + entropy).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def pixel_features(images):
    """uint8 images [B, H, W, 3], H and W multiples of 8 -> 8 x 8 box means in [-1, 1], float64 [B, 192]."""
    x = torch.as_tensor(images).double() / 127.5 - 1
    return x.unflatten(2, (8, -1)).unflatten(1, (8, -1)).mean((2, 4)).flatten(1)


# ----------------------------------------------------------------------------------------------- measurements

def measure(source, extract, features, process, batch, splits=0):
    """Of a Source, given extract(uint8 [B, H, W, 3]) -> features, logits:

    its Statistics; the IS as (mean, deviation), or None; the mean `noise_estimate`, in [-1, 1] units.
    """
    moments = Moments(DIMENSIONS[features], process.device)
    noise = torch.zeros((), dtype=torch.float64, device=process.device)
    score = Score(source.count, splits, process.device) if splits else None

    def work():
        for first, images in batches(source, batch, process):
            images = np.array(to_bytes(images, source.label))         # a copy: torch takes no read-only array
            x = torch.from_numpy(images).to(process.device)
            noise.add_(noise_estimate(x.permute(0, 3, 1, 2)).sum() / 127.5)
            x, logits = extract(x)
            moments.add(x)
            if score:
                score.add(logits, first)
    together(work)
    return (Statistics(source.label, source.path, *moments.total()), score.total() if score else None,
            all_sum(noise).item() / source.count)


def measure_subspace(source, truth, process, batch):
    """How far samples are from a known Gaussian x = mu + (a * scale) @ U, a ~ N(0, 1), U [k, D] (Fig. 3).

    The Frechet distance to it falls into a part inside the subspace, that of the coefficients, and a part
    outside, where the Gaussian has no variance. rho = |x - mu - U^T U (x - mu)|: mean and percentiles. PSNR
    of x against its projection: of the mean squared error, peak 2 (the width of [-1, 1]). variance_kept:
    inside, found/true. Returns a dict."""
    moments, outside = Moments(len(truth["scale"])), torch.zeros(len(truth["mean"]), dtype=torch.float64)
    true = truth["scale"] ** 2
    rho = [np.zeros(0)]                                     # 8 bytes an image, for the percentiles

    def work():
        for _, images in batches(source, batch, process):
            x = images.transpose(0, 3, 1, 2).reshape(len(images), -1)                                 # [B, D]
            x = x.astype(np.float64) - truth["mean"]
            if not np.isfinite(x).all():
                raise UserError(f"{source.label} holds values that are not finite (NaN or infinity)")
            a = x @ truth["components"].T                                                             # [B, k]
            x -= a @ truth["components"]
            outside.add_(torch.from_numpy(x.sum(0)))
            rho.append(np.linalg.norm(x, axis=1))
            moments.add(torch.from_numpy(a))
    together(work)
    distance = np.concatenate(gather(np.concatenate(rho)))                                               # [N]
    count, mean, covariance = moments.total()
    shift = (all_sum(outside) / count).square().sum().item()
    fd_outside = shift + ((distance ** 2).sum() - count * shift) / (count - 1)
    fd_inside = frechet_distance(mean, covariance, np.zeros_like(mean), np.diag(true))
    error = max((distance ** 2).mean() / len(truth["mean"]), 1e-12)                           # at most 126 dB
    return {"value": fd_inside + fd_outside, "fd_inside": fd_inside, "fd_outside": fd_outside,
            "rho_mean": distance.mean(), "psnr": 10 * np.log10(4 / error),
            "rho_percentiles": {str(q): np.percentile(distance, q) for q in (5, 25, 50, 75, 95)},
            "variance_kept": np.trace(covariance) / true.sum()}


# ------------------------------------------------------------------- what is kept and told, memorize.py's too

def hash_of(facts):
    """16 hexadecimal digits of a list of strings and None."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def cached(source, name, facts, compute):
    """-> compute(), a dict of arrays of a Source, from a file beside the source if it is there; if it was.

    The file's name changes with all that the arrays depend on: the images, name and facts (strings)."""
    cache = source.path.with_name(f"{source.label}.{name}-{hash_of([source.key(), name, *facts])}.npz")

    def load():
        with reading(f"{cache}, which can be deleted"), np.load(cache, allow_pickle=False) as file:
            return dict(file)
    if all(gather(os.path.exists(cache))):                  # False for a name too long, too
        return together(load), True
    arrays = compute()
    if is_first_process():
        try:
            with atomic_write(cache) as partial, open(partial, "wb") as file:
                np.savez(file, **arrays)
        except UserError as error:                      # a folder that is not ours: slower next time, no more
            print(f"warning: what was computed of {source.label} is not kept: {error}", file=sys.stderr)
    return arrays, False


def fact(protocol, *keys):
    """protocol[key][key]..., or None: a foreign file's protocol may hold anything, or nothing."""
    for key in keys:
        protocol = protocol.get(key) if isinstance(protocol, dict) else None
    return protocol


def told(protocol):
    """How samples were made, by their protocol: a list of short texts, without what it does not say."""
    facts = {"method": ("config", "training", "method"), "training step": ("step",),
             "trained on": ("config", "data", "name"), "p": ("config", "data", "p"),
             "sigma": ("config", "data", "sigma"), "EMA": ("ema",), "sampler": ("sampler",),
             "steps": ("steps",), "variance": ("variance",), "attack": ("attack", "name"),
             "steps attacked": ("attack", "steps_attacked")}
    return [f"{name} {value}" for name, keys in facts.items() if (value := fact(protocol, *keys)) is not None]


def publish(result, path, line):
    """Writes a result, which holds its warnings, as JSON and prints `line`; all else goes to stderr."""
    write_json(path, result)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(line)
    print(f"wrote {path}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- the command line

def load_inception(path, data_dir, device):
    """-> Inception, sha256 of its weights; path None: the published ones, downloaded once per machine."""
    target = Path(path or Path(data_dir) / "pt_inception-2015-12-05-6726825d.pth")

    def fetch():
        if path is None and os.environ.get("LOCAL_RANK", "0") == "0":
            download(path=target, **WEIGHTS)

    def load():
        if not target.is_file():
            raise UserError(f"--weights {target}: no such file")
        try:
            state = torch.load(target, map_location="cpu", weights_only=True)
        except Exception as error:                       # torch.load raises almost anything on a damaged file
            raise UserError(f"{target}: not a whole PyTorch weights file ({str(error)[:100]!r})") from error
        return Inception(state, device, target), sha256_of(target)
    together(fetch)
    return together(load)


def reference_statistics(reference, extract, features, weights, process, batch):
    """The Statistics of a Source, which are kept beside it."""
    if isinstance(reference, Statistics):
        return reference

    def compute():
        statistics, *_ = measure(reference, extract, features, process, batch)
        return dict(mu=statistics.mean, sigma=statistics.covariance, n=statistics.count)
    arrays, _ = cached(reference, features, [weights, sha256_of(__file__)], compute)
    return Statistics(reference.label, reference.path, int(arrays["n"]), arrays["mu"], arrays["sigma"])


def arguments(argv):
    """The command line, parsed."""
    parser = parser_of(__doc__)
    parser.add_argument("samples", metavar="SAMPLES", nargs="+",
                        help="the images to judge: file, folder or name, see above; "
                        "several are judged one by one")
    parser.add_argument("--ref", required=True,
                        help="the images to compare with, or their statistics: the same choice")
    parser.add_argument("--features", choices=["inception", "pixels"],
                        help="what the distance is measured on "
                        "(default inception; no choice for subspace data)")
    parser.add_argument("--weights",
                        help="file with Inception weights (default: the published ones, downloaded once)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time, per process (default 32)")
    parser.add_argument("--splits", type=int, help="splits of the Inception Score (default 10)")
    parser.add_argument("--size", type=int,
                        help="of a data set given by name (default: as SAMPLES, or the paper's)")
    parser.add_argument("--data-dir", default="data",
                        help="folder of prepared data sets and weights (default data)")
    parser.add_argument("--out", type=Path, help="the result as JSON (default: beside SAMPLES as "
                        "SAMPLES.fid.json, .fd-inception.json, .fd-pixels.json or .fd-exact.json)")
    args = parser.parse_args(argv)
    if args.out and len(args.samples) > 1:
        raise UserError(f"--out {args.out}: is the result of one SAMPLES; "
                        f"{len(args.samples)} are given, leave it out")
    check_ranges(args, batch=(1, 10_000), splits=(1, math.inf), size=(1, math.inf))
    return args


def check_default_out(out, beside):
    """Refuses, before the work, an --out that cannot be written or, where out is None, what takes its place
    beside SAMPLES."""
    check_out(out or beside, "--out" if out else "--out is not given, and the default")


def open_pair(path, args):
    """-> the SAMPLES at path, args.ref, what they are compared on, the score's splits, warnings.

    UserError, before any work, where they cannot be compared."""
    samples = open_source(path, args.size, args.data_dir)
    size = args.size or (samples.size[0] if isinstance(samples, Source) else None)
    reference = open_source(args.ref, size, args.data_dir)
    features, warnings = args.features or "inception", []
    if isinstance(reference, Source) and reference.truth:
        if args.features:
            raise UserError(f"--features {args.features}: not with {reference.label}, "
                            "a known Gaussian (FD-exact)")
        features = "exact"
    for flag in ("weights", "splits"):
        if features != "inception" and getattr(args, flag) is not None:
            raise UserError(f"--{flag} {getattr(args, flag)}: is of the Inception network, which "
                            f"FD-{features} does without")
    if args.size and os.path.exists(path) and os.path.exists(args.ref):
        raise UserError(f"--size {args.size}: is of a data set given by name; "
                        f"{path} and {args.ref} are files")
    check_default_out(args.out, samples.path.with_name(f"{samples.label}.fd-{features}.json"))
    sources = [source for source in (samples, reference) if isinstance(source, Source)]
    for source in (samples, reference):
        if source.count is not None and source.count < 2:
            raise UserError(f"{source.label} holds {source.count} image: a covariance takes at least 2")
        if isinstance(source, Statistics) and len(source.mean) != DIMENSIONS.get(features):
            choice = "the exact distance" if features == "exact" else f"--features {features}"
            raise UserError(f"{source.label} holds statistics of {len(source.mean)} features, which do not "
                            f"go with {choice}")
    if len(sources) == 2:
        check_pair(samples, reference)
    elif sources:
        check_range(*sources)
    splits = 10 if args.splits is None else args.splits
    if features == "inception" and isinstance(samples, Source) and samples.count < splits:
        raise UserError(f"--splits {splits}: {samples.label} has only {samples.count} images")
    warnings += [source.note for source in sources if source.note]
    for source in sources:
        if min(source.size) < 3:
            raise UserError(f"{source.label} holds images of {source.size}: at least (3, 3) is needed")
    for source in sources if features in DIMENSIONS else ():
        if features == "pixels" and (source.size[0] % 8 or source.size[1] % 8):
            raise UserError(f"--features pixels: {source.size}, of {source.label}, are not multiples of 8")
        limits = ((DIMENSIONS[features], "the covariance of their features is singular"),
                  (10_000, "the distance comes out too large"))
        warnings += [f"{source.label}: {source.count:,} images are fewer than {limit:,}, {effect}"
                     for limit, effect in limits if source.count < limit]
    return samples, reference, features, splits, warnings


def describe(result):
    """The result and its whole protocol as one line."""
    text = [f"{result['metric']} {result['value']:.6g}"]
    if "is_mean" in result:
        text.append(f"IS {result['is_mean']:.5g} \u00b1 {result['is_std']:.2g} ({result['splits']} splits)")
    if "rho_mean" in result:
        percentiles = " ".join(f"{value:.4g}" for value in result["rho_percentiles"].values())
        text += [f"rho {result['rho_mean']:.4g} (5/25/50/75/95 %: {percentiles})",
                 f"PSNR {result['psnr']:.4g} dB", f"variance kept {result['variance_kept']:.4g}"]
    if found := result.get("closed_form"):
        text.append(f"closed form ({found['closed_form']}) of as many: {found['value']:.4g}, of endlessly "
                    f"many {found['limit']:.4g}, rho {found['rho_mean']:.4g}, PSNR {found['psnr']:.4g}, kept "
                    f"{found['variance_kept']:.4g}")
    if "noise_mean" in result:
        text.append(f"noise estimate {result['noise_mean']:.4g}")
    text += [f"N {result['n'] or '?'} of {result['samples']}", *told(result["protocol"]),
             f"reference {result['reference']} N {result['n_reference'] or '?'}"]
    text += [f"{key} {result[key]}" for key in ("resize", "weights") if result[key]]
    return " | ".join(text)


def evaluate(path, args, process, inception):
    """Measures the images at `path` against args.ref, prints one line and writes it as JSON.

    inception() -> what `load_inception` gives.
    """
    samples, reference, features, splits, warnings = together(lambda: open_pair(path, args))
    result = dict(metric=f"FD-{features}", samples=samples.label, n=samples.count, reference=reference.label,
                  n_reference=reference.count, resize=RESIZE.get(features), weights=None,
                  protocol=getattr(samples, "protocol", {}), warnings=warnings, processes=process.world,
                  device=process.device.type)
    if isinstance(reference, Statistics):
        result["reference"] += " (statistics, which do not say their weights and resize)"
    if features == "exact":
        began = time.perf_counter()
        result.update(measure_subspace(samples, reference.truth, process, args.batch))
        result["closed_form"] = predicted(reference.truth, result["protocol"], samples.count)
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
        found, began = samples, time.perf_counter()
        if isinstance(samples, Source):
            splits = splits if features == "inception" else 0
            found, score, noise = measure(samples, extract, features, process, args.batch, splits)
            result["noise_mean"] = noise
            if score:
                result.update(is_mean=score[0], is_std=score[1], splits=splits)
        if process.rank == 0:
            result["value"] = frechet_distance(found.mean, found.covariance, target.mean, target.covariance)
    if result["n"]:
        result["images_per_second"] = result["n"] / (time.perf_counter() - began)
    if process.rank == 0:
        out = args.out or samples.path.with_name(f"{samples.label}.{result['metric'].lower()}.json")
        publish(result, out, describe(result))


def main(argv=None):
    """Judges all args.samples; the network is loaded once."""
    args = arguments(argv)
    process = start_processes(tf32=False)
    inception = functools.cache(lambda: load_inception(args.weights, args.data_dir, process.device))
    failed = 0
    for path in args.samples:
        try:
            evaluate(path, args, process, inception)
        except UserError as error:
            # Of several, the others are still judged. Of several processes one may wait for this one: end.
            if len(args.samples) == 1 or process.world > 1:
                raise
            print(f"fid.py: error: {error}", file=sys.stderr)
            failed += 1
    if failed:
        raise UserError(f"{failed} of the {len(args.samples)} SAMPLES could not be judged, see above")


if __name__ == "__main__":
    command_line(main)
