"""fid.py against torch-fidelity's values, closed forms and numpy, and what it refuses."""

import functools
import hashlib
import io
import json
import tarfile
import tracemalloc
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from PIL import Image

import fid
from common import UserError

PROTOCOL = {"step": 7, "sampler": "ddim", "steps": 250, "variance": None, "ema": True,
            "config": {"training": {"method": "adv"}, "data": {"name": "mine", "p": 0.9, "sigma": 0.2}},
            "attack": {"name": "pgd", "steps_attacked": 30}}


def nuclear(x, y):
    """The Frechet distance of x [N, D] and y [M, D] without covariances: exact where these are singular."""
    u, v = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    return (((x.mean(0) - y.mean(0)) ** 2).sum() + (u ** 2).sum() + (v ** 2).sum()
            - 2 * np.linalg.norm(u @ v.T, "nuc"))


def statistics(x):
    """Mean and covariance of x [N, D], by Moments."""
    moments = fid.Moments(x.shape[1])
    moments.add(torch.as_tensor(x))
    return moments.total()[1:]


# -------------------------------------------------------------------------------------------------- inception

@functools.cache
def inception_by_rule():
    """Weights by rule, not from a file: each tensor is standard normal, by torch's CPU generator seeded with
    the CRC-32 of its name, then scaled, shifted or made positive by what the name says it is."""
    state = {}
    for key, shape in fid.inception_shapes().items():
        z = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if key.startswith("fc."):
            state[key] = (0.2 if key == "fc.weight" else 0.1) * z
        elif key.endswith("conv.weight"):
            state[key] = z * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif key.endswith("running_var"):
            state[key] = torch.exp(0.2 * z)
        else:
            state[key] = 0.1 * z + key.endswith("bn.weight")
    return state


@pytest.fixture(scope="session")
def inception():
    return fid.Inception(inception_by_rule())


@pytest.fixture(scope="session")
def outputs(inception):
    """Features [6, 2048] and logits [6, 1008] of six images by rule, float64."""
    both = [inception(images_by_rule(4, 32, 32)), inception(images_by_rule(2, 40, 48))]
    return [torch.cat(parts).double().numpy() for parts in zip(*both)]


def images_by_rule(count, height, width):
    i, y, x, c = np.ogrid[:count, :height, :width, :3]
    rings = (3 * x * x + 5 * x * y + 7 * y * y) * (i + 1) // 8
    return ((rings + 40 * c * (i + 2) + 31 * i) % 256).astype(np.uint8)


# What torch-fidelity 0.4.0 (float32) computes with these weights for 4 images of 32 x 32 and 2 of 40 x 48:
# |f|, and f projected on cos(j k), k = 1, 2, 3; the same of the logits without bias; its IS of the logits
# over 2 and 4 splits; its FID of the first three images and the last three.
FEATURES = [[49.581037, 33.219729, 0.818771, -17.533109], [54.275847, 37.553928, 1.130864, -18.760416],
            [47.481659, 31.840064, -0.124531, -17.473615], [46.083508, 28.88922, -0.197946, -17.690058],
            [52.609399, 36.940132, 0.454846, -18.588223], [53.533425, 37.247144, -0.771948, -18.745546]]
LOGITS = [[323.077692, -62.660854, -348.524075, 313.381395],
          [353.822554, -61.882314, -393.025501, 355.702552],
          [309.807102, -44.497446, -328.678586, 288.005811],
          [300.60994506, -50.689851, -307.852432, 271.366855],
          [342.765433, -57.698788, -374.194688, 328.896305],
          [349.244020, -53.209276, -372.387773, 347.479533]]
SCORES = {2: (1.002573015769104, 0.00035909911201614797), 4: (1.000808333944041, 0.0013219647587488486)}
FID = 3.3681218849844967
# Of the reference's state dict: sha256 of the JSON of its 472 names and shapes in order (without
# num_batches_tracked).
KEYS = "579c09ebb0c6f0f4c9f0a51099479eb353aaee1969adaaf05fbc5cefaa1f987e"


def test_inception_agrees_with_torch_fidelity(outputs):
    """A wrong layer, pool, padding, eps, resize, order of axes or normalisation; a bias added to logits."""
    for found, golden in zip(outputs, (FEATURES, LOGITS)):
        waves = np.cos(np.outer(np.arange(found.shape[1]), [1, 2, 3]))
        found = np.column_stack([np.linalg.norm(found, axis=1), found @ waves])
        # 1e-5 of |f|; the waves have norm sqrt(D / 2).
        assert np.abs(found - golden).max() <= 1e-5 * found[:, 0].min()


def test_scores_agree_with_torch_fidelity(outputs):
    """IS with other splits or another deviation; a Frechet distance of other quantities than FID's."""
    features, logits = outputs
    for splits, golden in SCORES.items():
        score = fid.Score(6, splits)
        score.add(torch.from_numpy(logits), 0)
        assert np.allclose(score.total(), golden, rtol=1e-5, atol=1e-8)
    found = fid.frechet_distance(*statistics(features[:3]), *statistics(features[3:]))
    # 3e-5: torch-fidelity's own rounding errors, by square roots
    assert found == pytest.approx(FID, rel=3e-5)
    assert found == pytest.approx(nuclear(features[:3], features[3:]), rel=1e-10)


def test_inception_does_not_depend_on_the_batch(inception, outputs):
    """Batch statistics instead of the stored ones (train mode)."""
    alone, _ = inception(images_by_rule(4, 32, 32)[1:2])
    assert np.linalg.norm(alone.numpy() - outputs[0][1]) <= 1e-6 * np.linalg.norm(outputs[0][1])


def test_weights_are_checked(tmp_path):
    """A state dict that does not fit, taken without a word; files with num_batches_tracked refused."""
    shapes = sorted([name, list(shape)] for name, shape in fid.inception_shapes().items())
    assert hashlib.sha256(json.dumps(shapes).encode()).hexdigest() == KEYS
    state = inception_by_rule()
    tracked = {key.replace("running_var", "num_batches_tracked"): torch.tensor(0)
               for key in state if "_var" in key}
    assert len(state | tracked) == 566
    name = "Mixed_6c.branch7x7_2.bn.running_var"
    broken = {**state, **tracked, name: -torch.ones(160), "fc.weight": torch.full((1008, 2048), torch.nan)}
    for bad, words in (({**state, "Mixed_6c.extra": torch.zeros(2)}, "Mixed_6c.extra"),
                       ({k: v for k, v in state.items() if k != name}, f"{name} is missing"),
                       ({**state, "fc.weight": torch.zeros(1000, 2048)}, r"fc.weight is \(1000, 2048\)"),
                       (broken, "Mixed_6c.branch7x7_2 holds values that are not finite, "
                        "or a negative variance"),
                       ({**broken, name: state[name]}, "fc holds values that are not finite"),
                       ([1, 2], "not a state dict")):
        with pytest.raises(UserError, match=words):
            fid.Inception(bad)
    file = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-700])
    for content in (file.read_bytes(), b"", b"<html>", b"cos\nsystem\n(S'touch owned'\ntR."):
        file.write_bytes(content)
        with pytest.raises(UserError, match="w.pth: not a whole PyTorch weights file"):
            fid.load_inception(file, tmp_path, "cpu")
    with pytest.raises(UserError, match="--weights .*none.pth: no such file"):
        fid.load_inception(tmp_path / "none.pth", tmp_path, "cpu")


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    """A traceback, a missing source or place, half a file left behind."""
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no inception here")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as error:
        fid.load_inception(None, tmp_path, "cpu")
    line = str(error.value)
    for words in ("mseitzer/pytorch-fid/releases", "toshas/torch-fidelity/releases", "6726825d0af5",
                  str(tmp_path / "pt_inception-2015-12-05-6726825d.pth")):
        assert words in line
    assert "\n" not in line and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ moments, Frechet distance and score

def test_moments_from_any_batches():
    """ddof 0; sums that lose all digits where the mean is large beside the spread;
    batches merged wrongly; infinity."""
    x = np.random.default_rng(0).standard_normal((50, 6)) * np.logspace(-3, 0, 6) + 1e6
    truth = np.cov((x - 1e6).T)
    for batch in (1, 7, 50):
        moments = fid.Moments(6)
        for part in torch.from_numpy(x).split(batch):
            moments.add(part)
        count, mean, covariance = moments.total()
        assert count == 50 and np.allclose(mean, x.mean(0), rtol=1e-14)
        assert np.allclose(covariance, truth, rtol=0, atol=1e-7)
    moments.add(torch.tensor([[torch.inf] * 6]))
    with pytest.raises(UserError, match="features hold values that are not finite"):
        moments.total()


def turned(eigenvalues, rotation):
    return rotation * eigenvalues @ rotation.T


@pytest.mark.parametrize("spread", [1, 6, 10])
def test_frechet_distance_in_closed_form(spread):
    """A wrong formula; for commuting covariances it is |m|^2 + sum (sqrt(a) - sqrt(b))^2,
    here over 1 to 10 decades."""
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    a, b, mean = np.logspace(0, -spread, 40), np.logspace(0.5, -spread, 40), rng.standard_normal(40)
    truth = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = fid.frechet_distance(mean, turned(a, rotation), np.zeros(40), turned(b, rotation))
    assert abs(found - truth) <= 1e-9 * truth
    # 2 x 2, not commuting: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) with M = S T.
    s, t = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.7], [-0.7, 3]])
    root = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    assert abs(fid.frechet_distance(np.zeros(2), s, np.ones(2), t) - (2 + 7 - 2 * root)) <= 1e-12


def test_small_singular_values_keep_their_digits():
    """The digits lost by taking eigenvalues of a square, where half of the variances are 1 and half 1e-11; a
    set of equal images, whose covariance is zero."""
    a = np.repeat([1, 1e-11], 100)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((200, 200)))
    found = fid.frechet_distance(np.zeros(200), turned(a, rotation), np.zeros(200), turned(a * 4, rotation))
    assert abs(found - a.sum()) <= 1e-10                            # (sqrt(a) - sqrt(4 a))^2 = a
    zero = np.zeros((200, 200))
    found = fid.frechet_distance(np.zeros(200), zero, np.zeros(200), turned(a, rotation))
    assert found == pytest.approx(a.sum())


@pytest.mark.parametrize("count, other", [(12, 9), (300, 299), (300, 600), (301, 301), (310, 20)])
def test_as_few_images_as_dimensions(count, other):
    """Rounding errors of singular covariances that enter by their square roots (Cholesky may "succeed" on
    them); negative distances of equal sets. A rank of 300 takes 301 images."""
    rng = np.random.default_rng(count)
    x, y = rng.standard_normal((count, 300)) + 5, 1.2 * rng.standard_normal((other, 300)) + 5
    a, b = statistics(x), statistics(y)
    assert abs(fid.frechet_distance(*a, *b) / nuclear(x, y) - 1) <= 1e-11
    assert abs(fid.frechet_distance(*a, *a)) <= 1e-10
    assert abs(fid.frechet_distance(*a, a[0], a[1] * (1 + 1e-14))) <= 1e-10


def test_nearly_singular_covariances():
    """Pivots that are rounding errors, square-rooted: Cholesky succeeds on this matrix of rank 150 of 200."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 150)) @ rng.standard_normal((150, 200))
    s = np.cov(x.T) + 2e-13 * np.eye(200)
    np.linalg.cholesky(s)
    truth = np.sqrt(np.linalg.eigvalsh(s)[50:]).sum()           # of (S * 1)^(1/2); the other 50 weigh 2e-5
    found = fid.frechet_distance(np.zeros(200), s, np.zeros(200), np.eye(200))
    assert abs((np.trace(s) + 200 - found) / 2 - truth) <= 1e-9 * truth


def test_inception_score_by_its_definition():
    """A wrong split boundary, an average of logs, ddof 1, a natural or binary logarithm,
    splits mixed by batches."""
    logits = np.random.default_rng(4).standard_normal((11, 1008)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in (p[:3], p[3:7], p[7:]):           # 3 splits of 11: 0, 11 // 3, 22 // 3, 11
        scores.append(np.exp(np.mean([(q * np.log(q / part.mean(0))).sum() for q in part])))
    score = fid.Score(11, 3)
    for first in range(0, 11, 4):
        score.add(torch.from_numpy(logits[first:first + 4]), first)
    assert np.allclose(score.total(), (np.mean(scores), np.std(scores)), rtol=1e-12)


def test_pixel_features():
    """Pixels averaged across box borders, axes or channels mixed, a wrong scale."""
    images = images_by_rule(2, 16, 32)
    found = fid.pixel_features(images).reshape(2, 8, 8, 3)
    for i, y, x, c in ((0, 0, 0, 0), (1, 7, 3, 2), (1, 2, 5, 1)):
        box = images[i, 2 * y:2 * y + 2, 4 * x:4 * x + 4, c].astype(float)
        assert found[i, y, x, c] == pytest.approx(box.mean() / 127.5 - 1, abs=1e-12)


# ------------------------------------------------------------------------------------------- the command line

def score(samples, *arguments, out=None):
    """fid.main on the arguments: the JSON that it writes."""
    out = out or Path(samples).with_suffix(".json")
    fid.main([str(a) for a in (samples, *arguments, "--out", out)])
    return json.loads(out.read_text())


def write_sets(folder):
    """Two sets of images in several forms. -> FD-pixels of them, from numpy alone."""
    rng = np.random.default_rng(5)
    a, b = (rng.integers(0, high, (count, 16, 16, 3), dtype=np.uint8)
            for high, count in ((256, 40), (200, 30)))
    np.savez_compressed(folder / "a.npz", a, protocol=np.array(json.dumps(PROTOCOL)))
    np.save(folder / "b.npy", b)
    (folder / "folder" / "deeper").mkdir(parents=True)
    with zipfile.ZipFile(folder / "b.zip", "w") as archive, tarfile.open(folder / "b.tar", "w") as tar:
        for i, image in enumerate(b):
            file = folder / "folder" / "deeper" / f"{i:03d}.png"
            Image.fromarray(image).save(file)
            archive.write(file, f"x/{i:03d}.png")
            tar.add(file, f"x/{i:03d}.png")
    np.savez(folder / "float.npz", b.astype(np.float32) / 127.5 - 1)
    np.save(folder / "planes.npy", b.transpose(0, 3, 1, 2))
    x, y = (fid.pixel_features(z).numpy() for z in (a, b))
    np.savez(folder / "stats.npz", mu=y.mean(0), sigma=np.cov(y.T))
    return nuclear(x, y)


@pytest.fixture
def sets(tmp_path):
    return tmp_path, write_sets(tmp_path)


def noise_by_hand(images):
    """Immerkaer's estimate of images [N, H, W, 3] in [-1, 1] units, by its mask,
    averaged over images and channels."""
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])[None, :, :, None]
    response = scipy.signal.convolve(images / 127.5, mask, mode="valid", method="direct")
    return np.sqrt(np.pi / 2) / 6 * np.abs(response).mean()


def test_every_form_gives_the_same(sets, capsys):
    """A form read in another order, scale or layout; float images truncated; the protocol lost; called FID;
    the noise estimate in the units of bytes, of one channel or of the last batch."""
    folder, truth = sets
    noise = noise_by_hand(np.load(folder / "a.npz")["arr_0"])
    for ref in ("b.npy", "b.zip", "b.tar", "folder", "float.npz", "planes.npy", "stats.npz"):
        result = score(folder / "a.npz", "--ref", folder / ref, "--features", "pixels", "--batch", 7)
        assert result["value"] == pytest.approx(truth, rel=1e-9) and result["metric"] == "FD-pixels"
        assert result["noise_mean"] == pytest.approx(noise, rel=1e-6)
        assert (result["samples"], result["n"], result["protocol"]) == ("a.npz", 40, PROTOCOL)
        line = capsys.readouterr().out
        assert ("N 40 of a.npz | method adv | training step 7 | trained on mine | p 0.9 | sigma 0.2 | "
                "EMA True | sampler ddim | steps 250 | attack pgd | steps attacked 30 | reference") in line
        assert "FID" not in line and line.count("\n") == 1
    assert abs(score(folder / "a.npz", "--ref", folder / "a.npz", "--features", "pixels")["value"]) <= 1e-12


def test_what_is_not_taken_is_told(sets, capsys):
    """Files of a folder that are left out without a word; a result that can only fail to be written after
    the work."""
    folder, _ = sets
    (folder / "folder" / "x.heic").write_bytes(b"x")
    command = folder / "folder", "--ref", folder / "b.npy", "--features", "pixels"
    assert "folder: 30 images used, 1 files not (1 .heic)" in score(*command)["warnings"]
    assert "warning: folder: 30 images used, 1 files not (1 .heic)" in capsys.readouterr().err
    (folder / "folder.fd-pixels.json").mkdir()
    with pytest.raises(UserError, match="--out is not given, and the default .*pixels.json: is a folder"):
        fid.main([str(part) for part in command])


def test_palettes_and_splits(tmp_path):
    """Opaque images with a palette refused or changed; train and test images taken together, or one folder
    of them refused."""
    colours = np.random.default_rng(1).integers(0, 256, (4, 1, 8, 3), dtype=np.uint8)
    images = colours.repeat(8, axis=1)                      # of eight colours: no palette loses any
    names = "Train/a.png", "Train/b.gif", "x/Test/c.png", "x/d.png"
    for name, image in zip(names, images):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).quantize(8).save(tmp_path / "s" / name)
    np.testing.assert_array_equal(next(fid.open_source(tmp_path / "s" / "Train").read(0, 2, 2)), images[:2])
    for folder, told in (("s", r"1 .folder x., 2 .folder Train.|2 .folder Train., 2 .folder x."),
                         ("s/x", r"1 .in no folder., 1 .folder Test.")):
        with pytest.raises(UserError, match=f"holds images of several splits.*: ({told}). Give one folder"):
            fid.open_source(tmp_path / folder)


def test_several_samples_are_judged_one_by_one(sets, capsys):
    """A result of one set written beside another; sets after a bad one not judged; one --out for several."""
    folder, truth = sets
    names = [str(folder / name) for name in ("a.npz", "missing.npz", "b.npy")]
    flags = ["--ref", str(folder / "b.npy"), "--features", "pixels"]
    with pytest.raises(UserError, match="1 of the 3 SAMPLES could not be judged"):
        fid.main([*names, *flags])
    assert "missing.npz: no such file or folder" in capsys.readouterr().err
    results = [Path(f"{name}.fd-pixels.json") for name in (names[0], names[2])]
    values = [json.loads(result.read_text())["value"] for result in results]
    assert values == [pytest.approx(truth, rel=1e-9), pytest.approx(0, abs=1e-9)]
    with pytest.raises(UserError, match="--out .*out.json: is the result of one SAMPLES; 3 are given"):
        fid.main([*names, *flags, "--out", str(folder / "out.json")])


def test_cache_of_the_reference(sets):
    """A cache that is not used, or used though the reference has changed; one that is damaged, believed."""
    folder, truth = sets
    command = (folder / "a.npz", "--ref", folder / "b.npy", "--features", "pixels")
    score(*command)
    cache, = folder.glob("b.npy.pixels-*.npz")
    with np.load(cache) as file:
        np.savez(cache, mu=file["mu"] + 1, sigma=file["sigma"], n=file["n"])
    assert score(*command)["value"] > truth + 100               # 192 features one off: the cache was used
    cache.write_bytes(cache.read_bytes()[:-100])
    with pytest.raises(UserError, match="b.npy.pixels-.*npz, which can be deleted: damaged"):
        score(*command)
    np.save(folder / "b.npy", np.load(folder / "b.npy")[::-1])
    assert score(*command)["value"] == pytest.approx(truth, rel=1e-9)
    assert len(list(folder.glob("b.npy.pixels-*.npz"))) == 2


def test_other_weights_are_not_called_fid(sets, capsys, outputs, monkeypatch):
    """A distance on other weights that is called FID; the published ones not recognised; warnings lost;
    statistics of one network's features taken for another's."""
    folder, _ = sets
    np.savez(folder / "two.npz", images_by_rule(2, 32, 32))

    def network(images):
        return [torch.from_numpy(output[:len(images)]) for output in outputs]
    for weights, name in (("0" * 64, "FD-inception"), (fid.WEIGHTS["sha256"], "FID")):
        monkeypatch.setattr(fid, "load_inception", lambda *args: (network, weights))
        result = score(folder / "two.npz", "--ref", folder / "two.npz", "--splits", 2)
        text = capsys.readouterr()
        assert result["metric"] == name and abs(result["value"]) <= 1e-6
        assert result["is_mean"] == pytest.approx(1)
        assert text.out.startswith(f"{name} ") and ("not to be called FID" in text.out) == (name != "FID")
        assert weights in text.out and "TF1" in text.out
        assert "fewer than 2,048" in text.err and "fewer than 10,000" in text.err
    assert len(list(folder.glob("two.npz.inception-*.npz"))) == 2


def test_memory_does_not_grow_with_the_images(tmp_path):
    """An .npz that is read whole: 24 MB here."""
    np.savez_compressed(tmp_path / "many.npz", np.zeros((8000, 32, 32, 3), np.uint8))
    tracemalloc.start()
    source = fid.open_source(tmp_path / "many.npz")
    assert sum(len(images) for images in source.read(0, source.count, 64)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


RNG, GOOD = np.random.default_rng(6), np.zeros((5, 16, 16, 3), np.uint8)
BLACK, NOISE = Image.fromarray(GOOD[0]), Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8))
NAN = np.where(np.arange(GOOD.size).reshape(GOOD.shape) == GOOD.size - 1, np.nan, -0.5)
WHOLE, NPY = io.BytesIO(), io.BytesIO()
np.savez(WHOLE, GOOD), np.save(NPY, GOOD)
WHOLE, NPY, HUGE = WHOLE.getvalue(), NPY.getvalue(), io.BytesIO()
np.lib.format.write_array_header_1_0(HUGE, dict(descr="|u1", fortran_order=False, shape=(10**9, 16, 16, 3)))
# SAMPLES (arrays of an .npz, bytes of a file, or PNGs of a folder), flags and the words of the line that
# refuses them.
REFUSED = [
    ("one.npz", dict(arr_0=GOOD[:1]), "", "one.npz holds 1 image: a covariance takes at least 2"),
    ("grey.npz", dict(arr_0=GOOD[..., 0]), "",
     r"uint8 \(5, 16, 16\); colour images \[N, H, W, 3\] or \[N, 3, H, W\] are expected"),
    ("grey1.npz", dict(arr_0=GOOD[..., :1]), "", r"\(5, 16, 16, 1\); colour images"),
    ("fortran.npz", dict(arr_0=np.asfortranarray(GOOD)), "", r"\(5, 16, 16, 3\) in Fortran order"),
    ("none.npz", dict(arr_0=GOOD[:0]), "", r"\(0, 16, 16, 3\); colour images"),
    ("int.npz", dict(arr_0=GOOD.astype(np.int64)), "", "holds int64; uint8"),
    ("object.npz", dict(arr_0=np.full(GOOD.shape, None)), "", "holds Python objects, that is code"),
    ("range.npz", dict(arr_0=RNG.uniform(0, 255, GOOD.shape)), "",
     r"float images from .* to 25.*: \[-1, 1\]"),
    ("unit.npz", dict(arr_0=RNG.uniform(0, 1, GOOD.shape)), "", "float images, none negative"),
    ("nan.npz", dict(arr_0=NAN), "", "nan.npz holds values that are not finite"),
    ("large.npz", dict(arr_0=np.zeros((5, 24, 24, 3), np.uint8)), "",
     r"of \(24, 24\), ref.npz of \(16, 16\)"),
    ("keys.npz", dict(images=GOOD), "", "holds images.npy; images are expected under arr_0"),
    ("dims.npz", dict(mu=np.zeros(2048), sigma=np.eye(2048)), "",
     "2048 features, which do not go with --features pixels"),
    ("three.npz", dict(mu=np.zeros(3), sigma=np.eye(3)), "", r"three.npz: mu is float64 \(3,\)"),
    ("sigma.npz", dict(mu=np.zeros(192), sigma=np.eye(191)), "",
     r"mu is float64 \(192,\) and sigma float64 \(191, 191\); .*: 2048 of inception, 192 of pixels"),
    ("integers.npz", dict(mu=np.zeros(192, int), sigma=np.eye(192)), "", "mu is int64"),
    ("counts.npz", dict(mu=np.zeros(192), sigma=np.eye(192), n=np.zeros(5)), "", "mu is float64"),
    ("nansigma.npz", dict(mu=np.zeros(192), sigma=np.full((192, 192), np.nan)), "", "no mean and covariance"),
    ("vast.npz", dict(mu=np.zeros(192), sigma=np.full((192, 192), 1e308)), "", "no mean and .* too large"),
    ("negative.npz", dict(mu=np.zeros(192), sigma=-np.eye(192)), "", "no mean and covariance"),
    ("protocol.npz", dict(arr_0=GOOD, protocol=np.array("[1]")), "", "its protocol is not a JSON object"),
    ("nanprotocol.npz", dict(arr_0=GOOD, protocol=np.array('{"p": NaN}')), "",
     "nanprotocol.npz: damaged .*JSON"),
    ("cut.npy", NPY[:-1000], "", "cut.npy is truncated: it ends in image 3 of 5"),
    ("huge.npy", HUGE.getvalue(), "", "huge.npy is truncated: it ends in image 0 of 1,000,000,000"),
    ("long.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff", "", r"long.npy: damaged .*version \(2, 0\)"),
    ("pickle.npy", b"\x80\4]\x94.", "", "pickle.npy is a pickle of Python objects, that is code"),
    ("x.parquet", b"PAR1", "", "x.parquet is a parquet table: write their images into a folder"),
    ("/dev/zero", None, "", "/dev/zero is neither a regular file nor a folder"),
    ("cut.npz", WHOLE[:2000], "", "cut.npz: damaged or unreadable"),
    ("flipped.npz", WHOLE[:2000] + bytes([WHOLE[2000] ^ 1]) + WHOLE[2001:], "", "flipped.npz: damaged .*CRC"),
    ("cut.zip", WHOLE[:2000], "", "cut.zip"),
    ("cut.tar", NPY[:1000], "", "cut.tar"),
    ("empty", [], "", "no images"),
    ("mixed", [png(BLACK), png(BLACK.resize((8, 8)))], "",
     r"mixed sizes .*0.png is \(16, 16\), 1.png \(8, 8\)"),
    ("greys", [png(BLACK), png(BLACK.convert("L"))], "", "greys/1.png is of mode L; opaque colour images"),
    ("alpha", [png(BLACK), png(BLACK.convert("RGBA"))], "", "1.png is of mode RGBA"),
    ("clear", [png(BLACK), png(BLACK.convert("P"), transparency=0)], "", "1.png is of mode P; opaque colour"),
    ("hole", [png(BLACK), png(BLACK, transparency=(0, 0, 0))], "",
     "1.png is of mode RGB; opaque colour images"),
    ("broken", [png(BLACK), b"not an image"], "", "broken/1.png: damaged or unreadable"),
    ("half", [png(BLACK), png(NOISE)[:500]], "", "half/1.png: damaged or unreadable"),
    ("seven", [png(BLACK.resize((7, 7)))] * 2, "--ref {0}", "are not multiples of 8"),
    ("two", [png(BLACK.resize((2, 2)))] * 2, "--ref {0}", r"holds images of \(2, 2\): at least \(3, 3\)"),
    ("missing.npz", None, "", "missing.npz: no such file or folder"),
    ("a.txt", b"x", "", "a.txt is not a folder, a whole zip or a whole uncompressed tar"),
    ("ref.npz", None, "--batch 0", "--batch 0: must be from 1 to 10000"),
    ("ref.npz", None, "--splits 0", "--splits 0: must be at least 1"),
    ("ref.npz", None, "--size 0", "--size 0: must be at least 1"),
    ("ref.npz", None, "--size 16", "--size 16: is of a data set given by name"),
    ("ref.npz", None, "--splits 3", "--splits 3: is of the Inception network"),
    ("ref.npz", None, "--weights x", "--weights x: is of the Inception network"),
    ("ref.npz", None, "--out {0}/x.json", "--out .*ref.npz/x.json: .*ref.npz is a file, not a folder"),
    ("ref.npz", None, "--ref /dev/zero", "/dev/zero is neither a regular file nor a folder"),
    ("ref.npz", None, "--features inception", "--splits 10: ref.npz has only 9 images"),
    ("ref.npz", None, "--ref shapes",
     "shapes: no such file or folder, and no prepared data set: .*data.py shapes"),
    ("ref.npz", None, "--ref v1.5", "v1.5: no such file or folder, and no prepared data set: .*v1.5-16.npy"),
]


@pytest.mark.parametrize("name, content, flags, words", REFUSED,
                         ids=[f"{case[0]}{case[2]}" for case in REFUSED])
def test_what_is_refused(tmp_path, name, content, flags, words):
    """A traceback, a wrong number instead of a refusal, a line that does not say what was wrong;
    files left behind."""
    np.savez(tmp_path / "ref.npz", np.random.default_rng(7).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8))
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, list):
        path.mkdir()
        for i, file in enumerate(content):
            (path / f"{i}.png").write_bytes(file)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words) as error:
        fid.main([str(path), "--ref", f"{tmp_path}/ref.npz", "--features", "pixels",
                  "--data-dir", str(tmp_path), *flags.format(path).split()])
    assert "\n" not in str(error.value)
    left = [file for file in sorted(tmp_path.rglob("*")) if file not in before]
    assert all(file.name.startswith("ref.npz.pixels-") for file in left)        # the reference's statistics


@pytest.mark.parametrize("protocol", [
    {}, {"config": 3, "attack": [1]}, {"config": {"data": None}, "step": 0}])
def test_any_protocol_is_described(protocol):
    """A traceback on a protocol that is not ours; a 0 taken for nothing; None shown."""
    assert fid.told(protocol) == (["training step 0"] if "step" in protocol else [])


# --------------------------------------------------------------------------------------------------- subspace

def write_subspace(folder):
    """A prepared subspace data set of 8 x 8 images with 5 components, and samples s.npz not quite from it.

    -> its distribution, the samples [40, 192]."""
    rng, width = np.random.default_rng(8), 3 * 8 * 8
    basis, _ = np.linalg.qr(rng.standard_normal((width, 5)))
    truth = dict(mean=rng.standard_normal(width), components=basis.T, scale=np.array([3, 2, 1, 0.5, 0.1]))
    x = truth["mean"] + rng.standard_normal((40, 5)) * truth["scale"] @ truth["components"]
    np.save(folder / "subspace-8.npy", x.reshape(40, 3, 8, 8).astype(np.float32))
    sha256 = hashlib.sha256(x.astype(np.float32).tobytes()).hexdigest()
    np.savez(folder / "subspace-8-truth.npz", **truth)
    facts = dict(name="subspace", size=8, count=40, dtype="float32", sha256=sha256, low=float(x.min()),
                 high=float(x.max()))
    (folder / "subspace-8.json").write_text(json.dumps(facts))
    x = x * 0.9 + 0.05 * rng.standard_normal(x.shape) + 0.02
    np.savez(folder / "s.npz", x.reshape(40, 3, 8, 8).transpose(0, 2, 3, 1).astype(np.float32))
    return truth, x.astype(np.float32).astype(np.float64)


def exact_by_hand(truth, x):
    """FD-exact in all D dimensions, from covariances; rho, PSNR and variance from their definitions."""
    u, mean = truth["components"], truth["mean"]
    y = mean + (x - mean) @ u.T @ u                                                         # the projection
    root = (x - x.mean(0)) / np.sqrt(len(x) - 1)                                # root^T root = covariance
    true = (u.T * truth["scale"]).T                                                         # [k, D], the same
    value = ((x.mean(0) - mean) ** 2).sum() + (root ** 2).sum() + (true ** 2).sum()
    value -= 2 * np.linalg.norm(root @ true.T, "nuc")
    rho = np.sqrt(((x - y) ** 2).sum(1))
    kept = ((root @ u.T) ** 2).sum() / (truth["scale"] ** 2).sum()
    psnr = 10 * np.log10(2 ** 2 / ((x - y) ** 2).mean())
    return dict(value=value, rho_mean=rho.mean(), psnr=psnr, variance_kept=kept,
                rho_percentiles={str(q): np.percentile(rho, q) for q in (5, 25, 50, 75, 95)})


def test_subspace_measures(tmp_path, capsys):
    """A wrong decomposition, axes of images and components mixed, ddof, a wrong peak; called FID;
    bytes accepted."""
    truth, x = write_subspace(tmp_path)
    result = score(tmp_path / "s.npz", "--ref", "subspace", "--data-dir", tmp_path, "--batch", 7)
    for key, value in exact_by_hand(truth, x).items():
        assert result[key] == pytest.approx(value, rel=1e-9), key
    assert result["metric"] == "FD-exact" and "FID" not in capsys.readouterr().out
    assert result["value"] == result["fd_inside"] + result["fd_outside"]
    own = score("subspace", "--ref", "subspace", "--data-dir", tmp_path, "--size", 8,
                out=tmp_path / "own.json")
    # The very set, in float32.
    assert own["rho_mean"] < 1e-5 and own["fd_outside"] < 1e-10 and own["psnr"] > 120
    np.savez(tmp_path / "bytes.npz", np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "inf.npz", np.full((4, 8, 8, 3), np.inf))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(192), sigma=np.eye(192))
    for name, more, words in (("bytes.npz", [], "holds uint8: floats in the units of subspace-8"),
                              ("inf.npz", [], "inf.npz holds values that are not finite"),
                              ("stats.npz", ["--size", "8"],
                               "192 features, which do not go with the exact distance"),
                              ("s.npz", ["--features", "pixels"], "not with subspace-8, a known Gaussian")):
        with pytest.raises(UserError, match=words):
            fid.main([str(tmp_path / name), "--ref", "subspace", "--data-dir", str(tmp_path), *more])


# ---------------------------------------------------------------------------------------------- two processes

def two_process_jobs(folder, shapes):
    """FD-pixels, FD-exact, the Inception network; a file that the second process lacks,
    and one broken in its part."""
    folder = folder / "fid"
    (folder / "late").mkdir(parents=True)
    write_sets(folder)
    write_subspace(folder)
    np.savez(folder / "0.npz", images_by_rule(2, 16, 16))
    np.savez(folder / "five.npz", images_by_rule(5, 32, 32))
    np.savez(folder / "two.npz", images_by_rule(2, 40, 48)[:, 4:36, 8:40])
    torch.save(inception_by_rule(), folder / "rule.pth")
    for i in range(70):                                     # more than the head that every process looks at
        (folder / "late" / f"{i:02d}.png").write_bytes(png(NOISE)[:-60 if i == 69 else None])
    pixels = ["--ref", folder / "b.npy", "--features", "pixels"]
    return [("fid-pixels", "fid", [folder / "a.npz", *pixels]),
            ("fid-exact", "fid", [folder / "s.npz", "--ref", "subspace", "--data-dir", folder]),
            ("fid-inception", "fid", [folder / "five.npz", "--ref", folder / "two.npz", "--weights",
                                      folder / "rule.pth", "--splits", 4]),
            ("fid-alone", "fid", [folder / "{rank}.npz", *pixels]),
            ("fid-late", "fid", [folder / "late", *pixels])]


def test_two_processes_give_the_result_of_one(two_processes, sets, inception):
    """Parts that overlap or miss images, sums of one process only, splits of one process; a process that
    waits for ever, or a line that nobody prints, when a file is missing or broken for the second process
    alone."""
    folder, results = two_processes
    folder, truth = folder / "fid", sets[1]
    assert results["fid-alone"] == [f"{folder / '1.npz'}: no such file or folder"] * 2
    for error in results["fid-late"]:
        assert error.startswith(f"{folder / 'late'}/69.png: damaged or unreadable")
    assert all(results[name] == ["ok", "ok"] for name in ("fid-pixels", "fid-exact", "fid-inception"))
    pixels, exact, network = (json.loads((folder / name).read_text()) for name in (
        "a.npz.fd-pixels.json", "s.npz.fd-exact.json", "five.npz.fd-inception.json"))
    assert pixels["value"] == pytest.approx(truth, rel=1e-9) and pixels["processes"] == 2
    assert pixels["noise_mean"] == pytest.approx(noise_by_hand(np.load(folder / "a.npz")["arr_0"]), rel=1e-6)
    x = np.load(folder / "s.npz")["arr_0"].transpose(0, 3, 1, 2).reshape(40, 192).astype(np.float64)
    for key, value in exact_by_hand(np.load(folder / "subspace-8-truth.npz"), x).items():
        assert exact[key] == pytest.approx(value, rel=1e-9), key
    (features, logits), (other, _) = (inception(np.load(folder / name)["arr_0"])
                                      for name in ("five.npz", "two.npz"))
    whole = fid.Score(5, 4)
    whole.add(logits, 0)
    assert (network["is_mean"], network["is_std"]) == pytest.approx(whole.total(), rel=1e-3)
    expected = nuclear(features.double().numpy(), other.double().numpy())
    assert network["value"] == pytest.approx(expected, rel=1e-5)
    assert network["weights"].endswith("(not the published ones: not to be called FID)")
    assert [(folder.parent / f"fid-pixels-{rank}.out").read_text().count("\n") for rank in (0, 1)] == [1, 0]
