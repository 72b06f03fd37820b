"""Does a model repeat its training images? Section 3.2 and Fig. 6 (left).

    python memorize.py s.npz --data cifar10                       # DINOv2 ViT-B/14, fetched once (346 MB)
    python memorize.py s.npz --data cifar10 --weights dinov2_vitb14_pretrain.pth --hub-dir dinov2 # no network
    python memorize.py s.npz --data cifar10 --features pixels     # not DINOv2: finds copies, needs no weights
    python memorize.py cifar10-test --data cifar10                # what images give that no model has made

The similarity of an image is the cosine between its features and those of its nearest training image, of all
of them. The yardstick is the same for the training images, each with the nearest OTHER one. The paper reads
0.9 and above as the same image. The training images are the clean ones, whatever the model was trained on.
DINOv2 wants a GPU: one CPU core takes about two seconds an image (dinov2_vits14: half a second). The training
set's features are kept.

DINOv2's code comes from github.com/facebookresearch/dinov2, at one fixed revision, and is RUN here; --hub-dir
runs a copy of yours instead. Its weights are checked by their sha256. Writes the result as JSON, and a PNG of
the closest pairs: each generated image with its nearest training image to its right.
"""

import common                                               # first: it answers Ctrl-C while others load

import contextlib
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import (Progress, UserError, as_bytes, check_ranges, command_line, download, parser_of, save_grid,
                    sha256_of, start_processes)
from data import Images, Source, to_bytes
from fid import (batches, cached, check_default_out, check_pair, fact, hash_of, open_source, prepared_source,
                 publish, told)

REPOSITORY, REVISION = "facebookresearch/dinov2", "e1277af2ba9496fbadf7aec6eba56e8d882d1e35"
WEIGHTS = {
    "dinov2_vitb14": dict(sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
                          size=346_378_731),
    "dinov2_vits14": dict(sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
                          size=88_283_115),
}
SAME = 0.9                              # section 3.2: from here on it is roughly the same image
EDGES = np.linspace(-1, 1, 101).round(2)                # of the histogram's bins; 0.9 is one of them
BLOCK = 4096                            # similarities are computed BLOCK x BLOCK at a time: 67 MB
PAIRS = 32                              # closest pairs in the picture
MAX_BYTES = 16_000_000_000              # of the features of both sets, which stay in memory


# ----------------------------------------------------------------------------------------------- the features

def dino_input(images, device="cpu"):
    """uint8 [B, H, W, 3] -> float32 [B, 3, 224, 224]: antialiased bicubic, ImageNet's mean and deviation."""
    x = torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 255  # bicubic overshoots
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
    mean, deviation = imagenet[..., None, None]
    return (x - mean) / deviation


def load_dino(name, weights, hub_dir, data_dir, device):
    """-> extract(images [B, H, W, 3], label) -> CLS tokens, float32 [B, D]; and what identifies the code run.

    name: a key of WEIGHTS. weights, hub_dir: the weights file and the repository's folder, or None to fetch
    them. Raises UserError: neither there nor to be had, or not the published weights, or code that does not
    take them.
    """
    url = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
    clone = f"a clone of https://github.com/{REPOSITORY}"
    by_hand = f"Without a network, --weights takes the file {url} and --hub-dir {clone}"
    if hub_dir and not (Path(hub_dir) / "hubconf.py").is_file():
        raise UserError(f"--hub-dir {hub_dir}: no hubconf.py in it; {clone} has one")
    if weights and not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file; {url} is it")
    if weights and (found := sha256_of(weights)) != WEIGHTS[name]["sha256"]:
        raise UserError(f"--weights {weights}: its sha256 is {found}, "
                        f"not {WEIGHTS[name]['sha256']}, that of {url}")
    if not weights:
        try:
            weights = download(urls=[url], path=Path(data_dir) / f"{name}_pretrain.pth", **WEIGHTS[name])
        except UserError as error:
            raise UserError(f"{error}. {by_hand}") from error
    os.environ["XFORMERS_DISABLED"] = "1"           # the same arithmetic whether or not xformers is installed
    where = Path(hub_dir).resolve() if hub_dir else f"{REPOSITORY}:{REVISION}"
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # it warns that there is no xformers
            # torch.hub's own validation knows heads of branches only; a full hash names one content,
            # whoever serves it.
            model = torch.hub.load(str(where), name, source="local" if hub_dir else "github", trust_repo=True,
                                   skip_validation=True, verbose=False, pretrained=False)
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
    except Exception as error:                             # foreign code, a network, a cache folder: anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: no {name} that takes the published weights ({type(error).__name__}: "
                        f"{reason}). {by_hand}") from error
    model, code = model.eval().float().to(device), where
    if hub_dir:                                             # the copy may not be what its folder's name says
        code = f"local copy, sha256 {hash_of([sha256_of(path) for path in sorted(where.rglob('*.py'))])}"
    return lambda images, label: model(dino_input(np.array(to_bytes(images, label)), device)), code


def centred_pixels(reference, batch):
    """-> extract(images [B, H, W, 3], label) -> float32 [B, D]: their pixels minus the mean of training."""
    every = reference.read(0, reference.count, batch)
    mean = sum(x.sum(0, dtype=np.float64) for x in every) / reference.count
    convert = (lambda images, label: images) if reference.truth else to_bytes     # subspace: in its own units

    def extract(images, label):
        x = convert(images, label) - mean
        return torch.from_numpy(x.astype(np.float32)).flatten(1)
    return extract


@torch.inference_mode()
def features_of(source, extract, batch, process):
    """The features of all images of a Source, float32 [N, D], each of length 1; UserError if not finite."""
    features = None
    for first, images in batches(source, batch, process):
        x = extract(images, source.label)
        if not x.isfinite().all():
            raise UserError(f"{source.label}: images or features hold values that are not finite "
                            "(NaN or infinity)")
        if features is None:
            features = torch.empty(source.count, x.shape[1])
        features[first:first + len(x)] = F.normalize(x, dim=1)
    return features


# ------------------------------------------------------------------------------------------- the similarities

@torch.inference_mode()
def nearest(queries, references, device="cpu", itself=False, block=BLOCK):
    """The largest cosine to any row of references, and that row: float32 [N] in [-1, 1], int64 [N].

    queries [N, D], references [M, D]: rows of length 1; all pairs are compared, block x block at a time.
    itself: the two are the same set, and a row is not its own neighbour.
    """
    similarity, index = torch.empty(len(queries)), torch.empty(len(queries), dtype=torch.int64)
    label = "nearest other training image" if itself else "nearest training image"
    progress = Progress(len(queries), "images", label)
    for i in range(0, len(queries), block):
        x = queries[i:i + block].to(device)
        best = torch.full((len(x),), -2.0, device=device)
        place = torch.zeros(len(x), dtype=torch.int64, device=device)
        for j in range(0, len(references), block):
            cosine = x @ references[j:j + block].to(device).T                   # [block, block]
            if itself and i == j:
                cosine.fill_diagonal_(-2.0)
            value, row = cosine.max(dim=1)
            place = torch.where(value > best, row + j, place)
            best = torch.maximum(value, best)
        similarity[i:i + len(x)], index[i:i + len(x)] = best.clamp(-1, 1), place
        progress.update(i + len(x))
    progress.close()
    return similarity, index


def summary(similarity):
    """Similarities [N] -> their mean, 75th, 90th and 95th percentile, and the share that is at least SAME."""
    s = np.asarray(similarity, dtype=np.float64)
    percentiles = {f"p{q}": float(np.percentile(s, q)) for q in (75, 90, 95)}
    return {"mean": float(s.mean()), **percentiles, "share": float((s >= SAME).mean())}


def training_set(reference, extract, name, facts, batch, process):
    """-> features of the training images [M, D], similarities to the nearest other one [M], if from a file.

    name: of the features; facts: all else that they depend on beside the images. Pixels are not kept.
    """
    features = None

    def compute():
        nonlocal features
        features = features_of(reference, extract, batch, process)
        similarity, _ = nearest(features, features, process.device, itself=True)
        kept = features[:0] if name == "pixels" else features
        return dict(similarity=similarity.numpy(), features=kept.numpy())
    arrays, found = cached(reference, f"memorize-{name}", [*facts, sha256_of(__file__)], compute)
    if found and len(arrays["features"]):
        features = torch.from_numpy(arrays["features"])
    elif found:
        features = features_of(reference, extract, batch, process)
    return features, torch.from_numpy(arrays["similarity"]), found


# ------------------------------------------------------------------------------------------- the command line

def arguments(argv):
    """The command line, parsed."""
    parser = parser_of(__doc__)
    parser.add_argument("samples", metavar="SAMPLES", help="generated images: .npz of sample.py, .npy, "
                        "folder, zip or tar of images, or the name of a prepared data set")
    parser.add_argument("--data", required=True, help="the training images: a data set prepared by data.py")
    parser.add_argument("--features", choices=[*WEIGHTS, "pixels"], default="dinov2_vitb14",
                        help="what is compared (default dinov2_vitb14; pixels is not DINOv2)")
    parser.add_argument("--weights",
                        help="file with DINOv2's weights, NAME_pretrain.pth (default: downloaded once)")
    parser.add_argument("--hub-dir", help=f"folder with a copy of github.com/{REPOSITORY}, whose code is "
                        f"then run (default: torch.hub fetches and RUNS revision {REVISION[:12]})")
    parser.add_argument("--size", type=int,
                        help="of data sets given by name (default: as SAMPLES, or the paper's)")
    parser.add_argument("--data-dir", default="data",
                        help="folder of prepared data sets and weights (default data)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default 64)")
    parser.add_argument("--out", type=Path, help="the result as JSON, the picture beside it as .png "
                        "(default: beside SAMPLES as SAMPLES.memorize.json)")
    args = parser.parse_args(argv)
    check_ranges(args, batch=(1, 10_000), size=(1, math.inf))
    if args.out and args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: the name must end in .json")
    if args.features == "pixels" and (args.weights or args.hub_dir):
        raise UserError("--features pixels takes neither --weights nor --hub-dir")
    return args


def open_both(args):
    """-> samples and training images, each a Source, and the file for the result; UserError for what can be
    refused before any work."""
    samples = open_source(args.samples, args.size, args.data_dir)
    if not isinstance(samples, Source):
        raise UserError(f"{samples.label} holds statistics; images are expected")
    reference = prepared_source(Images(args.data, args.size or samples.size[0], args.data_dir), args.data_dir)
    check_pair(samples, reference)
    if reference.count < 2:
        raise UserError(f"{reference.label} holds {reference.count} image: "
                        "the nearest other one takes at least 2")
    if reference.truth and args.features != "pixels":
        raise UserError(f"--features {args.features} is for images; "
                        f"the floats of {reference.label} take pixels")
    needed = 4 * (samples.count + reference.count) * 3 * math.prod(samples.size)
    if args.features == "pixels" and needed > MAX_BYTES:
        raise UserError(f"--features pixels: {needed / 1e9:.0f} GB of them, more than the "
                        f"{MAX_BYTES / 1e9:.0f} kept in memory; {' and '.join(WEIGHTS)} are smaller")
    beside = samples.path.with_name(f"{samples.label}.memorize.json")
    picture = (args.out or beside).with_suffix(".png")
    if picture.resolve() == samples.path.with_suffix(".png").resolve():
        raise UserError(f"--out {args.out}: its picture would take the place of {picture}, SAMPLES' own; "
                        "another name is needed")
    for suffix in (".json", ".png"):
        check_default_out(args.out and args.out.with_suffix(suffix), beside.with_suffix(suffix))
    return samples, reference, args.out or beside


def closest_pairs(samples, reference, pairs):
    """Pairs of indices -> uint8 [2 * pairs, H, W, 3]: generated, its nearest training image, the next, ..."""
    images = [next(source.read(i, i + 1, 1))[0]
              for pair in pairs for source, i in zip((samples, reference), pair)]
    return np.stack([x if x.dtype == np.uint8 else as_bytes(x) for x in images])


def describe(result):
    """The result and its protocol as one line."""
    text = [f"{result['metric']} on {result['features']}"]
    text += ["{}: share >= {} {share:.4g}, mean {mean:.4g}, 75/90/95 % {p75:.4g} {p90:.4g} {p95:.4g}".format(
        name, SAME, **result[name]) for name in ("generated", "train")]
    return " | ".join([*text, f"N {result['n']} of {result['samples']}", *told(result["protocol"]),
                       f"reference {result['reference']} N {result['n_train']}"])


def main(argv=None):
    """Compares args.samples with the training images, prints one line, writes JSON and picture."""
    args = arguments(argv)
    process, began = start_processes(join=False, tf32=False), time.perf_counter()
    if process.world > 1:
        raise UserError("memorize.py is one process: start it with python, not torchrun")
    samples, reference, out = open_both(args)
    if args.features == "pixels":
        name, weights, code = "pixels (not DINOv2)", None, None
        extract = centred_pixels(reference, args.batch)
    else:
        name, weights = args.features, WEIGHTS[args.features]["sha256"]
        extract, code = load_dino(name, args.weights, args.hub_dir, args.data_dir, process.device)
    trained, yardstick, found = training_set(reference, extract, args.features, [weights, code], args.batch,
                                             process)
    similarity, index = nearest(features_of(samples, extract, args.batch, process), trained, process.device)
    closest = similarity.argsort(descending=True, stable=True)[:PAIRS].tolist()
    pairs = [(i, int(index[i])) for i in closest]
    trained_on = fact(samples.protocol, "config", "data", "name")
    remarks = [samples.note] if samples.note else []
    if trained_on not in (None, "?", args.data):            # ? is a public checkpoint's
        remarks.append(f"{samples.label}: the model was trained on {trained_on}")
    result = dict(
        metric="memorisation", features=name, weights=weights, code=code, samples=samples.label,
        n=samples.count, reference=reference.label, n_train=reference.count, threshold=SAME,
        generated=summary(similarity), train=summary(yardstick),
        histogram=dict(edges=EDGES.tolist(), generated=np.histogram(similarity, EDGES)[0].tolist(),
                       train=np.histogram(yardstick, EDGES)[0].tolist()),
        closest=[[i, j, float(similarity[i])] for i, j in pairs], protocol=samples.protocol, warnings=remarks,
        device=process.device.type, train_from_cache=found, seconds=time.perf_counter() - began)
    images = closest_pairs(samples, reference, pairs)
    save_grid(images, out.with_suffix(".png"), columns=min(8, 2 * len(pairs)))
    publish(result, out, describe(result))


if __name__ == "__main__":
    command_line(main)
