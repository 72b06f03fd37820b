"""data.py: what is read from a prepared data set, how one is prepared, and what is refused."""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import common
import data
from common import UserError, noise_estimate
from conftest import HERE
from data import Images


def store(folder, array, name="toy"):
    """A prepared data set written without data.py: what its two files are, said a second time."""
    folder.mkdir(exist_ok=True)
    size = array.shape[2]
    np.save(folder / f"{name}-{size}.npy", array)
    facts = dict(name=name, size=size, count=len(array), dtype=str(array.dtype), low=-1.0, high=1.0,
                 sha256=hashlib.sha256(array.tobytes()).hexdigest())
    (folder / f"{name}-{size}.json").write_text(json.dumps(facts))
    return folder


def toy(folder, count=2000, size=8):
    return store(folder, np.random.default_rng(5).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def png(colour, size=(40, 40), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    return path


def write_tar(path, files, mode="w", **options):
    with tarfile.open(path, mode, **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def prepare(*argv):
    """data.py in this process, with one worker if none are given."""
    data.main([*map(str, argv), *([] if "--workers" in argv else ["--workers", "1"])])


# ---------------------------------------------------------------------------------------- reading, corruption

def test_read_scale(tmp_path):
    """Catches a wrong scale: /128, /255, an offset, or float64."""
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 64, 3).transpose(0, 2, 1).reshape(4, 3, 8, 8)
    x = Images("toy", 8, store(tmp_path, array)).read([3, 0])
    assert x.dtype == np.float32 and x.shape == (2, 3, 8, 8)
    assert x.min() == -1 and x.max() == 1 and x[0, 0, 7, 7] == 1 and x[1, 0, 0, 0] == -1
    np.testing.assert_allclose(x, array[[3, 0]].astype(np.float64) * 2 / 255 - 1, atol=1e-7)


def test_corruption_belongs_to_the_image(tmp_path):
    """Catches noise keyed by position in the batch, call or epoch, and state left in the object by a read."""
    images = Images("toy", 8, toy(tmp_path, 50), p=0.9, sigma=0.2, data_seed=3)
    whole = images.read(np.arange(50))
    assert len({row.tobytes() for row in whole}) == 50
    for indices in ([7, 3, 41], [3], list(range(49, -1, -1)), [3, 3]):
        np.testing.assert_array_equal(images.read(indices), whole[indices])
    np.testing.assert_array_equal(images.read(np.arange(50)), whole)


def test_corruption_of_nothing_is_exact(tmp_path):
    """Catches noise of size zero that still rounds, and a coin with p = 0 that ever falls."""
    folder, every = toy(tmp_path), np.arange(2000)
    clean = Images("toy", 8, folder).read(every)
    for p, sigma in ((0, 0.2), (0.9, 0)):
        np.testing.assert_array_equal(Images("toy", 8, folder, p, sigma).read(every), clean)
    assert not Images("toy", 8, folder, 0, 0.2).corrupted(every).any()
    assert Images("toy", 8, folder, 1, 0.2).corrupted(every).all()


def test_coin_and_noise_do_not_depend_on_p_and_sigma(tmp_path):
    """Catches a coin or z drawn from the same stream as p or sigma decide, a wrong share,
    and seeds that do nothing."""
    folder, every = toy(tmp_path), np.arange(2000)
    clean = Images("toy", 8, folder).read(every)
    half, most = Images("toy", 8, folder, 0.5, 0.1), Images("toy", 8, folder, 0.9, 0.2)
    a, b = half.corrupted(every), most.corrupted(every)
    assert not (a & ~b).any()
    assert abs(a.mean() - 0.5) < 5 * (0.25 / 2000) ** 0.5 and abs(b.mean() - 0.9) < 5 * (0.09 / 2000) ** 0.5
    z1, z2 = (half.read(every) - clean) / 0.1, (most.read(every) - clean) / 0.2
    np.testing.assert_array_equal((z1 != 0).any(axis=(1, 2, 3)), a)
    np.testing.assert_array_equal((z2 != 0).any(axis=(1, 2, 3)), b)
    np.testing.assert_allclose(z1[a], z2[a], atol=1e-5)
    other = Images("toy", 8, folder, 0.5, 0.1, data_seed=1)
    assert 0.4 < (other.corrupted(every) == a).mean() < 0.6
    both = a & other.corrupted(every)
    assert abs(np.corrcoef((other.read(every) - clean)[both].ravel(), z1[both].ravel())[0, 1]) < 0.03


def test_noise_is_white_and_normal(tmp_path):
    """Catches streams of neighbouring images that overlap or are correlated, clipping, quantising, a bad
    start of a stream (the first values over all images), and a coin tied to the noise. Limits are 5 standard
    deviations."""
    folder, every = toy(tmp_path, 4000), np.arange(4000)
    y = Images("toy", 8, folder, 1, 1).read(every)
    z = (y.astype(np.float64) - Images("toy", 8, folder).read(every)).reshape(4000, 192)
    assert np.abs(y).max() > 4 and len(np.unique(y)) > 0.9 * y.size
    n = z.size
    assert abs(z.mean()) < 5 / n ** 0.5 and abs((z ** 2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z ** 3).mean()) < 5 * (15 / n) ** 0.5 and abs((z ** 4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 1e-5
    for shift in (1, 2, 4, 64):                             # of the pixels inside an image, and of the images
        assert abs((z[:, shift:] * z[:, :-shift]).mean()) < 5 / z[:, shift:].size ** 0.5
        assert np.abs((z[shift:] * z[:-shift]).mean(axis=1)).max() < 5.5 / 192 ** 0.5
    for shift in (1, 2, 3):                                # an image that is its neighbour a few values later
        assert np.abs((z[1:, :-shift] * z[:-1, shift:]).mean(axis=1)).max() < 5.5 / (192 - shift) ** 0.5
    first = z[:, :16]
    assert np.abs(np.corrcoef(first.T) - np.eye(16)).max() < 5.5 / 4000 ** 0.5
    assert min(scipy.stats.kstest(column, "norm").pvalue for column in first.T) > 1e-6
    for p in (0.25, 0.5, 0.75):
        coin = Images("toy", 8, folder, p, 1).corrupted(every) - p
        for value in (first, (first ** 2 - 1) / 2 ** 0.5):
            assert np.abs(coin @ value).max() < 5 * (4000 * p * (1 - p)) ** 0.5


def test_noise_golden(tmp_path):
    """Catches any change of the corruption, and one that depends on the process: values once printed."""
    folder = store(tmp_path, np.full((4, 3, 8, 8), 255, np.uint8))
    x = Images("toy", 8, folder, p=1, sigma=0.5, data_seed=7).read([2])[0, :, 0, 0]
    np.testing.assert_allclose((x - 1) / 0.5, [0.347347, 0.154186, -0.521118], atol=2e-6)
    coins = Images("toy", 8, folder, p=0.5, data_seed=7).corrupted(np.arange(4))
    assert coins.tolist() == [True, False, False, True]


def test_other_corruptions_against_their_definitions(tmp_path):
    """Catches a wrong share, colours that are drawn one by one, a blur of other width or across channels, and
    one that is keyed by the call instead of the image. Limits are 5 standard deviations."""
    folder, every = toy(tmp_path, 400), np.arange(400)
    clean = Images("toy", 8, folder).read(every)
    read = lambda corruption, sigma, p=1.0: Images("toy", 8, folder, p, sigma, 3, corruption).read(every)
    impulse = read("impulse", 0.2)
    changed = (impulse != clean).all(axis=1)                                             # [N, H, W]
    assert (changed == (impulse != clean).any(axis=1)).mean() > 0.99 and changed.shape == (400, 8, 8)
    hit = impulse.transpose(0, 2, 3, 1)[changed]                                         # [pixels, 3]
    assert set(np.unique(hit)) == {-1, 1} and (hit == hit[:, :1]).all()
    assert abs(changed.mean() - 0.2) < 5 * (0.16 / changed.size) ** 0.5
    assert abs(hit.mean()) < 5 / len(hit) ** 0.5
    outliers = read("outliers", 0.0)
    assert scipy.stats.kstest(outliers.ravel(), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-5
    flat = outliers.reshape(400, -1)
    assert abs(np.corrcoef(flat.ravel(), clean.ravel())[0, 1]) < 5 / flat.size ** 0.5
    blur = read("blur", 0.1)                                # of deviation 1
    k = np.exp(-np.arange(-4, 5.0) ** 2 / 2)
    padded = np.pad(clean[5, 1].astype(np.float64), 4, "symmetric")
    rows = np.apply_along_axis(np.convolve, 0, padded, k / k.sum(), "valid")
    np.testing.assert_allclose(blur[5, 1], np.apply_along_axis(np.convolve, 1, rows, k / k.sum(), "valid"),
                               atol=1e-5)
    for corruption, whole, sigma in (("impulse", impulse, 0.2), ("outliers", outliers, 0),
                                     ("blur", blur, 0.1)):
        images = Images("toy", 8, folder, 0.5, sigma, 3, corruption)
        for indices in ([7, 3, 41], [3, 3]):
            x, coin = images.read(indices), images.corrupted(indices)
            np.testing.assert_array_equal(x[coin], whole[indices][coin])
            np.testing.assert_array_equal(x[~coin], clean[indices][~coin])


def test_float_data_is_read_as_it_is(tmp_path):
    """Catches scaling of float data to [-1, 1], and corruption written into the file."""
    array = np.random.default_rng(0).normal(0, 3, (20, 3, 8, 8)).astype(np.float32)
    folder = store(tmp_path, array)
    np.testing.assert_array_equal(Images("toy", 8, folder).read([4, 2]), array[[4, 2]])
    z = Images("toy", 8, folder, 1, 0.1).read(np.arange(20)) - array
    assert abs(z.std() - 0.1) < 0.005
    np.testing.assert_array_equal(np.load(folder / "toy-8.npy"), array)


@pytest.mark.parametrize("given, expected", [
    (dict(name="cifar10-test"), "python data.py cifar10 --size 32 --split test --out"),
    (dict(name="celeba"), r"python data.py celeba --src \S+ --size 64"),
    (dict(name="mine"), "--size is needed"), (dict(name="a\nb", size=8), "is not prepared"),
    *[(dict(name="toy", size=8) | bad, "--p .* --sigma .* --data-seed") for bad in (
        dict(p=-0.1), dict(p=1.1), dict(p=np.nan), dict(sigma=-1), dict(sigma=np.inf), dict(data_seed=-1))],
    (dict(name="toy", size=8, corruption="fog"), "--corruption fog --sigma 0.0: gaussian, impulse"),
    (dict(name="toy", size=8, corruption="impulse", sigma=1.1),
     "--corruption impulse --sigma 1.1: .* share")])
def test_images_refuse(given, expected, tmp_path):
    """A message that says what to run, or which flag is wrong."""
    with pytest.raises(UserError, match=expected):
        Images(data_dir=toy(tmp_path, 2), **given)


WHOLE = io.BytesIO()
np.save(WHOLE, np.zeros((5, 3, 8, 8), np.uint8))
WHOLE = WHOLE.getvalue()
PICKLED = io.BytesIO()
np.save(PICKLED, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("array", [b"", WHOLE[:100], WHOLE[:-1], b"PK\x03\x04" + WHOLE, PICKLED.getvalue(),
                                   WHOLE.replace(b"(5, 3, 8, 8)", b"(4, 3, 8, 8)"), WHOLE + b"x",
                                   WHOLE[:-1] + b"x"])
def test_damaged_data_sets_are_named(array, tmp_path):
    """Catches a traceback, or wrong images, for a file that is empty, cut, of another kind, a pickle, too
    short or long, or altered; and for a .json without what others read of it."""
    facts = json.loads((store(tmp_path, np.load(io.BytesIO(WHOLE))) / "toy-8.json").read_text())
    (tmp_path / "toy-8.npy").write_bytes(array)
    with pytest.raises(UserError, match="toy-8.npy or toy-8.json is damaged .*delete both"):
        Images("toy", 8, tmp_path)
    (tmp_path / "toy-8.npy").write_bytes(WHOLE)
    assert len(Images("toy", 8, tmp_path)) == 5
    facts = [{key: value for key, value in facts.items() if key != "sha256"}, facts | dict(low=np.nan),
             facts | dict(high=np.inf), facts | dict(low=2.0)]
    for text in ("[]", "[" * 100_000, *map(json.dumps, facts)):
        (tmp_path / "toy-8.json").write_text(text)
        with pytest.raises(UserError, match="toy-8.json is damaged"):
            Images("toy", 8, tmp_path)


# ---------------------------------------------------------------------------------------------------- sources

def test_sources_agree(tmp_path):
    """Catches an order that depends on the archive, the folder or the workers; hidden files, folders and the
    __MACOSX copies read as images; a link in an archive that is followed."""
    files = {f"{'ab'[i % 2]}/{i * 7 % 150:03}.png": png((i, 2 * i % 256, 255 - i)) for i in range(150)}
    expected = np.stack([np.asarray(Image.open(io.BytesIO(files[name])))[:16, :16].transpose(2, 0, 1)
                         for name in sorted(files)])
    every = files | {"__MACOSX/a/001.png": b"x", ".hidden.png": b"x", "a/.b.png": b"x", ".git/c.png": b"x",
                     "a/readme.txt": b"x"}
    for name, content in every.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    write_zip(tmp_path / "z.zip", {"a/": "", **dict(reversed(every.items()))})
    write_tar(tmp_path / "t.tar", {f"./{name}": content for name, content in every.items()})
    with tarfile.open(tmp_path / "t.tar", "a") as archive:
        link = tarfile.TarInfo("./a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    shas = set()
    for src, workers in (("folder", 1), ("folder", 3), ("z.zip", 2), ("t.tar", 2)):
        out = tmp_path / f"out-{src}-{workers}"
        prepare("mine", "--src", tmp_path / src, "--size", 16, "--workers", workers, "--out", out)
        images = Images("mine", 16, out)
        np.testing.assert_array_equal(images.array, expected)
        assert images.info["count"] == len(images) == 150 and (images.low, images.high) == (-1, 1)
        shas.add(images.info["sha256"])
        exact = (images.array / 127.5 - 1).std()            # float64
        assert images.info["sigma_data"] == pytest.approx(exact, rel=1e-12)
    assert shas == {hashlib.sha256(expected.tobytes()).hexdigest()}
    names, read, left = data.image_members(tmp_path / "folder")
    assert left == {"hidden": 4, ".txt": 1}
    assert names == sorted(files) and read(names[0]) == tmp_path / "folder" / names[0]
    names, read, _ = data.image_members(tmp_path / "t.tar")
    assert names == [f"./{name}" for name in sorted(files)] and read("./a/000.png") == files["a/000.png"]


def test_what_is_taken_and_what_not(tmp_path, capsys):
    """Catches formats that Pillow reads and data.py does not, files without a suffix or in linked folders
    left out, names that differ in case only or are no ASCII mixed up, special files opened, and anything that
    is not taken and not counted."""
    formats = dict(jpg="JPEG", JPG="JPEG", jfif="JPEG", png="PNG", tif="TIFF", tiff="TIFF", gif="GIF",
                   bmp="BMP", webp="WEBP", jp2="JPEG2000", ppm="PPM")
    files = {"no suffix": png("blue"), "\u00e9.png": png("blue"), "e\u0301.png": png("blue")}
    for suffix, kind in formats.items():
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (0, 0, 255)).save(file, kind)
        files[f"deep/x.{suffix}"] = file.getvalue()
    others = {"README": b"some text", "a.heic": b"x", "b.HEIC": b"x", ".c.png": png("red"), "d.txt": b""}
    write_zip(tmp_path / "z.zip", files | others)
    write_tar(tmp_path / "t.tar", files | others)
    for name, content in (files | others).items():
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real" / name).write_bytes(content)
    links = tmp_path / "links"
    links.mkdir()
    os.mkfifo(links / "pipe.png")
    for name, target in dict(linked="../real", circle=".", dead="nothing").items():
        (links / name).symlink_to(target)
    more = {"folder linked twice": 1, "special file or dead link": 2}
    for src, beside in (("real", {}), ("z.zip", {}), ("t.tar", {}), ("links", more)):
        names, _, left = data.image_members(tmp_path / src)
        assert names == sorted(f"linked/{name}" if beside else name for name in files)
        assert left == {"without suffix": 1, ".heic": 2, "hidden": 1, ".txt": 1} | beside
    prepare("mine", "--src", links, "--size", 4, "--out", tmp_path)
    images = Images("mine", 4, tmp_path)
    told, = images.info["notes"]
    assert told.startswith("14 images used, 8 files not (2 ") and told in capsys.readouterr().out
    assert set(told[told.index("(") + 1:-1].split(", ")) == {
        "2 special file or dead link", "2 .heic", "1 folder linked twice", "1 hidden", "1 without suffix",
        "1 .txt"}
    assert (images.array[:, :2] < 4).all() and (images.array[:, 2] > 250).all()
    with zipfile.ZipFile(tmp_path / "z.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("e\u0301.png", png("red"))
    _, read, left = data.image_members(tmp_path / "z.zip")
    assert left["name given twice"] == 1 and read("e\u0301.png") == png("red")


def test_memory_of_large_and_lying_members(tmp_path, monkeypatch):
    """Catches members unpacked beyond what their header says, or though they are no picture; more bytes on
    their way to the workers than FLYING_BYTES; a large member sent to one; blocks out of order."""
    content = png("red") + bytes(20_000_000)
    src = write_zip(tmp_path / "z.zip", {"a.png": content, "b.png": content[100:]})
    lying = bytearray(src.read_bytes())
    for start in (22, lying.index(b"PK\1\2") + 24):         # a.png's size, in both of its headers
        lying[start:start + 4] = (10_000).to_bytes(4, "little")
    src.write_bytes(lying)
    _, read, _ = data.image_members(src)
    tracemalloc.start()
    for name, expected in (("a.png", "CRC"), ("b.png", "no image that Pillow reads")):
        with pytest.raises(Exception, match=expected):
            read(name)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    monkeypatch.setattr(data, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(data, "FLYING_BYTES", 3000)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor",
                        lambda workers, initializer: ThreadPoolExecutor(workers))
    sizes, here, begun, done, most = [300, 50, 900, 1500, 10, *[990] * 8, 1, 1], [], 0, 0, 0

    def items():
        nonlocal begun, most
        for i, size in enumerate(sizes):
            begun += size
            most = max(most, begun - done)
            yield i, bytes(size)

    def work(item):
        if threading.current_thread() is threading.main_thread():
            here.append(item[0])
        return item[0], -1
    found = []
    for block, *_ in data._image_blocks(work, items(), 1, 8):
        found += block.tolist()
        done = sum(sizes[:len(found)])
    assert found == list(range(len(sizes))) and here == [3]
    assert 2000 <= most <= 5000                             # with a block that is being cut, and an item


def fall(item, size):
    """Work that ends its process, as the system does where memory is short."""
    os._exit(1)


def test_killed_worker(tmp_path, monkeypatch):
    """Catches a traceback when a worker is killed, and what it leaves."""
    monkeypatch.setattr(data, "_draw_shapes", fall)
    with pytest.raises(UserError, match="a worker process .* was killed.*try fewer than --workers 1"):
        prepare("shapes", "--num-samples", 3, "--out", tmp_path)
    assert os.listdir(tmp_path) == []


def test_arrays_are_sources(tmp_path):
    """Catches an array read in another order, scale or layout than the same images in a folder."""
    pixels = np.random.default_rng(4).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "bytes.npz", pixels)
    np.savez(tmp_path / "floats.npz", pixels / 127.5 - 1)
    np.save(tmp_path / "planes.NPY.npy", pixels.transpose(0, 3, 1, 2))
    os.rename(tmp_path / "planes.NPY.npy", tmp_path / "planes.NPY")
    for src in ("bytes.npz", "floats.npz", "planes.NPY"):
        prepare("mine", "--src", tmp_path / src, "--size", 8, "--out", tmp_path / src[:5])
        images = Images("mine", 8, tmp_path / src[:5])
        np.testing.assert_array_equal(images.array, pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_members_larger_than_an_image_are_not_read(write, tmp_path, monkeypatch):
    """Catches memory taken before the size in the header is looked at: a bomb among the members."""
    src = write(tmp_path / "archive", {"a.png": bytes(100), "b.png": bytes(101)})
    monkeypatch.setattr(data, "MAX_BYTES", 100)
    for kind, member in ((zipfile.ZipExtFile, "read"), (tarfile.TarFile, "extractfile")):
        monkeypatch.setattr(kind, member, lambda *_: pytest.fail("it was read"))
    names, read, _ = data.image_members(src)
    assert names == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="101 bytes are more than 100"):
        read("b.png")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_in_an_archive_are_not_paths(write, tmp_path):
    """Catches a member called ../../x that is written to, or read from, outside the archive."""
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    names = "../../evil.png", f"{tmp_path}/evil.png", "../deep/x.png"
    src = write(tmp_path / "deep" / "deeper" / "archive", {name: png("red") for name in names})
    prepare("mine", "--src", src, "--size", 8, "--out", src.parent)
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == [
        "archive", "mine-8.json", "mine-8.npy"]
    assert (np.load(src.parent / "mine-8.npy")[:, 0] == 255).all()


def test_splits(tmp_path, capsys):
    """Catches test images in the training set, a class folder called train or test taken for a split, a split
    in another case or another word not seen, and one that silently falls back to everything."""
    def split_of(names, *flags):
        src = write_zip(tmp_path / "z.zip", {name: png((i, 0, 0)) for i, name in enumerate(names)})
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        prepare("mine", "--src", src, "--size", 8, "--out", out, *flags)
        array, = out.glob("*.npy")
        info = json.loads(array.with_suffix(".json").read_text())
        return array.name, np.load(array)[:, 0, 0, 0].tolist(), info
    parts = "x/Train/b/1.png", "x/test/a/1.png", "x/Train/a/1.png", "x/Validation/1.png"
    taken = {None: ("mine-8.npy", [2, 0], "train"), "train": ("mine-8.npy", [2, 0], "train"),
             "test": ("mine-test-8.npy", [1], "test"), "val": ("mine-val-8.npy", [3], "val"),
             "all": ("mine-8.npy", [2, 0, 3, 1], "all")}
    for split, expected in taken.items():
        name, values, info = split_of(parts, *(["--split", split] if split else []))
        assert (name, values, info["split"]) == expected
        told = [] if split == "all" else [f"{len(values)} of 4 images: folder "]
        assert [note[:len(told[0])] for note in info["notes"][1:]] == told
    assert ("2 of 4 images: folder Train; not: 1 (folder Validation), 1 (folder test)\n"
            in capsys.readouterr().out)
    for names in (["train/1.png", "bus/1.png"], ["train/1.png", "2.png"], ["test/1.png", "val/1.png"],
                  ["a/train/c/1.png", "b/Test/c/1.png"], ["ILSVRC/Data/test/c/1.png", "cover.png"]):
        assert sorted(split_of(names, "--split", "all")[1]) == [0, 1]
        named = next(part for part in names[0].split("/") if part in ("train", "test"))
        assert split_of(names, "--split", named)[1] == [0]
        with pytest.raises(UserError, match=f"{named}' can be a split or a class: --split all takes all, "
                                            f"--split {named} that folder"):
            split_of(names)
    with pytest.raises(UserError, match=r"no folder 'val' of images, only 1 .folder bus., 1 .folder train"):
        split_of(["train/1.png", "bus/1.png"], "--split", "val")
    src = write_zip(tmp_path / "z.zip", {"bus/1.png": png("red")})
    flags = "mine", "--src", src, "--size", 8, "--out", tmp_path / "again"
    prepare(*flags)
    info = tmp_path / "again" / "mine-8.json"
    info.write_text(info.read_text().replace('"all"', '"train"'))       # as it was written before --split all
    prepare(*flags)
    told = capsys.readouterr().out
    assert "is there: 1 images (source: z.zip, " in told
    assert f"; --src {src} was not read: to prepare it anew delete {flags[-1]}/mine-8.npy and " in told
    with pytest.raises(UserError, match="was made with split 'train', now 'all'"):
        prepare(*flags, "--split", "all")


MODES = [
    ("1-grey.png", Image.new("L", (8, 8), 77), (77, 77, 77)),
    ("2-rgba.png", Image.new("RGBA", (8, 8), (0, 100, 200, 0)), (255, 255, 255)),
    ("3-rgba.png", Image.new("RGBA", (8, 8), (0, 100, 200, 255)), (0, 100, 200)),
    ("4-half.png", Image.new("LA", (8, 8), (0, 128)), (127, 127, 127)),
    ("5-palette.png", Image.new("RGB", (8, 8), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
     (10, 20, 30)),
    ("6-cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    ("7-deep.png", Image.fromarray(np.full((8, 8), 0x4080, np.uint16)), (0x40, 0x40, 0x40)),
    ("8-one.PNG", Image.new("1", (8, 8), 1), (255, 255, 255))]


def deep(values, kind, **more):
    """An image of 16 or 32 bits a pixel, or of floating-point numbers."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **more)
    return file.getvalue()


def test_decode_modes(tmp_path):
    """Catches grey, palette, alpha, CMYK and 16-bit images that come out wrong (16-bit clips to white in
    Pillow)."""
    (tmp_path / "in").mkdir()
    for name, image, _ in MODES:
        image.save(tmp_path / "in" / name)
    prepare("mine", "--src", tmp_path / "in", "--size", 4, "--out", tmp_path)
    images = Images("mine", 4, tmp_path)
    assert len(images) == len(MODES)
    for row, (name, _, colour) in zip(images.array, MODES):
        assert np.abs(row.reshape(3, 16).T.astype(int) - colour).max() <= 2 * name.endswith("jpg"), name


def test_one_dark_frame(tmp_path):
    """Catches a set of 16 bits that one dark image stops, read wrongly."""
    for k, value in enumerate((0x0100, 0x1000)):
        (tmp_path / f"{k}.png").write_bytes(deep(np.full((8, 8), value, np.uint16), "PNG"))
    prepare("mine", "--src", tmp_path, "--size", 8, "--out", tmp_path / "out")
    assert Images("mine", 8, tmp_path / "out").array[:, 0, 0, 0].tolist() == [1, 16]


def test_resize_and_crop(tmp_path):
    """Catches another filter than the box (overshoot, blur), a crop off the centre, CelebA without a crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    face = np.zeros((218, 178, 3), np.uint8)
    face[39:179, 19:159] = 255                              # the crop of 140
    face[39:179, 19:29, 0] = 0                              # ten pixels at its left: one column at size 14
    for name, image, size in (("mine", pixels, 8), ("celeba", face, 14)):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "x.png")
        prepare(name, "--src", tmp_path / name, "--size", size, "--out", tmp_path)
    expected = pixels[8:40].reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(Images("mine", 8, tmp_path).array[0] - expected).max() <= 0.501
    x = Images("celeba", 14, tmp_path).array[0]
    assert (x[0, :, 0] == 0).all() and (x[0, :, 1:] == 255).all() and (x[1:] == 255).all()


def enormous():
    """A PNG of 70 bytes whose header says 8200 x 8200 pixels."""
    image = bytearray(png(0, (1, 1), "L"))
    image[16:24] = (8200).to_bytes(4, "big") * 2
    image[29:33] = zlib.crc32(bytes(image[12:29])).to_bytes(4, "big")
    return bytes(image)


def test_broken_images(tmp_path):
    """Catches a broken, cut, tiny or enormous image that is silently skipped, shifts its neighbours, ends in
    a traceback, or is decoded into gigabytes; a format that is none of FORMATS; and files left by the refused
    run."""
    good = {f"{i}.png": png((i, 0, 0), (16, 16)) for i in range(10)}
    noisy, icon = io.BytesIO(), io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(noisy, "JPEG")
    Image.new("RGB", (16, 16)).save(icon, "ICO")
    bad = {"3b.png": b"not an image", "5b.jpg": noisy.getvalue()[:2000], "7b.png": png("red", (7, 20)),
           "8b.png": enormous(), "9b.png": b"", "9c.png": icon.getvalue()}
    src = write_zip(tmp_path / "z.zip", good | bad)
    blob = bytearray(src.read_bytes())
    blob[blob.index(b"2.png") + 20] ^= 255                  # 2.png no longer agrees with its CRC
    src.write_bytes(blob)
    flags = "mine", "--size", 8, "--workers", 2
    with pytest.raises(UserError, match="7 of 16 images .*'2.png' .*'3b.png'.*'5b.jpg'.*'7b.png' .*7 x 20"
                                        ".*8200 x 8200.*--skip-broken"):
        prepare(*flags, "--src", src, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare(*flags, "--src", src, "--out", tmp_path / "out", "--skip-broken")
    images = Images("mine", 8, tmp_path / "out")
    assert images.array[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9] and images.info["left_out"] == 7
    with pytest.raises(UserError, match="6 of 6 images.*'3b.png' .no image that Pillow reads.*Repair or "
                                        "remove them$"):
        prepare(*flags, "--src", write_zip(tmp_path / "none.zip", bad), "--out", tmp_path / "out2",
                "--skip-broken")


def test_cifar10_binary(tmp_path, monkeypatch):
    """Catches a download that does not arrive, the label byte read as a pixel, channels or rows exchanged,
    and batches in the order of the archive."""
    records = np.random.default_rng(2).integers(0, 256, (10_000, 3073), dtype=np.uint8)
    src = write_tar(tmp_path / "there.tar.gz", mode="w:gz", compresslevel=0, files={
        f"cifar-10-batches-bin/{name}": content for name, content in (
            ("readme.html", b"x"), ("data_batch_1.bin", b"x"), ("test_batch.bin", records.tobytes()))})
    content = src.read_bytes()
    monkeypatch.setattr(data, "CIFAR10", dict(urls=[src.as_uri()], size=len(content),
                                              sha256=hashlib.sha256(content).hexdigest()))
    prepare("cifar10", "--split", "test", "--workers", 2, "--out", tmp_path / "out")
    images = Images("cifar10-test", data_dir=tmp_path / "out")
    np.testing.assert_array_equal(images.array, records[:, 1:].reshape(-1, 3, 32, 32))
    assert images.info["source"] == f"cifar-10-binary.tar.gz, {len(content):,} bytes"
    prepare("cifar10", "--split", "test", "--out", tmp_path / "out")    # is there, whatever it was made of
    with pytest.raises(UserError, match="data_batch_1.bin has 1 bytes"):
        prepare("cifar10", "--src", src, "--out", tmp_path / "out")
    monkeypatch.setattr(data, "MAX_BYTES", 30_000_000)
    with pytest.raises(UserError, match="there.tar.gz unpacks to more than 30,000,000 bytes: not CIFAR-10"):
        prepare("cifar10", "--src", src, "--split", "test", "--out", tmp_path / "bomb")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "test_batch.bin").write_bytes(records.tobytes())
    count, items, *_ = data._source("cifar10", tmp_path / "bin", "test")         # of a folder: the same
    assert count == 10_000 and (np.stack([x for _, x in items]) == images.array.transpose(0, 2, 3, 1)).all()
    assert sorted(os.listdir(tmp_path / "out")) == ["cifar-10-binary.tar.gz", "cifar10-test-32.json",
                                                    "cifar10-test-32.npy"]


def test_imagenet_npz(tmp_path):
    """Catches rows read with the channels last, batch 10 before batch 2, pickles, and a cut file."""
    rows = np.random.default_rng(3).integers(0, 256, (3, 4, 12288), dtype=np.uint8)
    for k, number in enumerate((1, 2, 10)):
        np.savez_compressed(tmp_path / f"train_data_batch_{number}.npz", data=rows[k], labels=np.arange(4))
    prepare("imagenet64", "--src", tmp_path, "--out", tmp_path / "out")
    images = Images("imagenet64", data_dir=tmp_path / "out")
    np.testing.assert_array_equal(images.array, rows.reshape(12, 3, 64, 64))
    missing = ", ".join(f"train_data_batch_{i}.npz" for i in range(3, 10))
    assert images.info["notes"][0].endswith(f"batch_2.npz used; missing: {missing}")
    last = tmp_path / "train_data_batch_10.npz"
    whole, bad = last.read_bytes(), []
    for array, expected in ((np.array([{}], dtype=object), "10.npz holds Python objects"),
                            (rows[0].astype(np.float32), "10.npz: .*float32"),
                            (rows[0][:, :3072], r"10.npz: .*\(4, 3072\)")):
        np.savez(last, data=array)
        bad.append((last.read_bytes(), expected))
    bad += [(whole[:-200], "batch_10.npz: damaged"),
            (whole[:20000] + bytes(100) + whole[20100:], "[1-4] of 12 .*batch_10.npz row")]
    for content, expected in bad:
        last.write_bytes(content)
        with pytest.raises(UserError, match=expected):
            prepare("imagenet64", "--src", tmp_path, "--out", tmp_path / "out2")


def test_shapes(tmp_path):
    """Catches an image that depends on more than (seed, i), images that are all alike, and texture or hard
    edges that would hide the noise a model leaves."""
    for name, count, seed, workers in (("a", 300, 0, 2), ("b", 70, 0, 1), ("c", 70, 1, 1)):
        prepare("shapes", "--num-samples", count, "--seed", seed, "--workers", workers,
                "--out", tmp_path / name)
    a, b, c = (Images("shapes", data_dir=tmp_path / name) for name in "abc")
    np.testing.assert_array_equal(a.array[:70], b.array)
    assert len({image.tobytes() for image in [*a.array, *c.array]}) == 370
    estimate = noise_estimate(a.read(np.arange(300)))
    assert estimate.mean() < 0.008 and estimate.max() < 0.03
    assert (a.array.std(axis=(2, 3)).max(axis=1) > 10).all()            # there is something to see in each


def test_subspace(tmp_path, capsys, monkeypatch):
    """Catches a PCA without the mean, with variances for deviations or components out of order, data that are
    not on the subspace or not Gaussian, a truth that is not theirs, and a wrong range. Independent: numpy's
    SVD."""
    monkeypatch.setitem(data.DRAWN, "shapes", 400)          # it draws its own shapes
    prepare("subspace", "--size", 8, "--components", 6, "--num-samples", 2500, "--out", tmp_path)
    images = Images("subspace", 8, tmp_path)
    truth, x = images.truth(), images.read(np.arange(2500)).reshape(2500, 192).astype(np.float64)
    source = np.load(tmp_path / "shapes-8.npy").reshape(400, 192) / 127.5 - 1
    _, s, v = np.linalg.svd(source - source.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(truth["mean"], source.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(truth["scale"], s[:6] / 20, rtol=1e-4)   # 20 = sqrt(400 images)
    assert np.abs(np.abs((truth["components"] * v[:6]).sum(axis=1)) - 1).max() < 1e-4
    assert f"{(s[:6] ** 2).sum() / (s ** 2).sum():.1%}" in capsys.readouterr().out
    a = (x - truth["mean"]) @ truth["components"].T / truth["scale"]                     # [2500, 6]
    assert np.abs(x - truth["mean"] - (a * truth["scale"]) @ truth["components"]).max() < 1e-6
    assert np.abs(a.mean(axis=0)).max() < 5 / 50
    assert np.abs(np.cov(a.T) - np.eye(6)).max() < 5 * (2 / 2500) ** 0.5
    assert scipy.stats.kstest(a.ravel(), "norm").pvalue > 1e-4
    assert images.low == x.min() < -1 and images.high == x.max() and images.array.dtype == np.float32
    assert images.info["sigma_data"] == pytest.approx(x.std(), rel=1e-6)
    with pytest.raises(UserError, match="subspace alone is known"):
        Images("shapes", 8, tmp_path).truth()
    lost, before = tmp_path / "subspace-8-truth.npz", images.array.tobytes()
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost} is missing or damaged .*data.py subspace --size 8"):
        images.truth()
    prepare("subspace", "--size", 8, "--components", 6, "--num-samples", 2500, "--out", tmp_path)
    images = Images("subspace", 8, tmp_path)
    assert images.array.tobytes() == before and np.array_equal(images.truth()["scale"], truth["scale"])
    (tmp_path / "subspace-8.json").unlink()
    with pytest.raises(UserError, match="--components 192: must be fewer than the 400 images of shapes "
                                        "and .* 192"):
        prepare("subspace", "--size", 8, "--components", 192, "--out", tmp_path)


# -------------------------------------------------------------------------------------------- what is refused

@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A good zip, and others that are none."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "empty").mkdir()
    good = write_zip(folder / "good.zip", {f"{i}.png": png("red") for i in range(20)}).read_bytes()
    (folder / "cut.zip").write_bytes(good[:-300])
    later = bytearray(good)
    later[good.index(b"PK\1\2") + 6] = 99                   # "version 9.9 is needed to read this"
    (folder / "later.zip").write_bytes(later)
    (folder / "text.zip").write_text("hello")
    cut = write_tar(folder / "t.tar.gz", {"1.png": good}, "w:gz").read_bytes()[:100]
    (folder / "cut.tar.gz").write_bytes(cut)
    write_tar(folder / "cut.tar", {"1.png": good, "2.png": good})
    os.truncate(folder / "cut.tar", 2000)
    os.mkfifo(folder / "pipe")
    (folder / "endless").mkdir()
    (folder / "endless" / "train_data_batch_1.npz").symlink_to("/dev/zero")
    np.save(folder / "grey.npy", np.zeros((5, 8, 8), np.uint8))
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    colours = b"".join(b"\0" + (np.arange(24) * 170).astype(">u2").tobytes() for _ in range(8))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(colours)),
              (b"IEND", b""))
    rgb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks)
    for name, content in {
            "lmdb/data.mdb": b"x", "pq/0.parquet": b"PAR1", "tf/a.tfrecord-00000-of-00001": b"x",
            "python/data_batch_1": b"\x80\4", "rar/a.rar": b"Rar!", "small/1.png": png("red", (64, 64)),
            "npz/x/train_data_batch_1.npz": WHOLE, "objects.npy": PICKLED.getvalue(), "torch.pt": b"\x80\2",
            "clear/1.png": deep(grey, "PNG", transparency=0),
            "12bit/1.png": deep(grey, "PNG"), "12bit/2.tif": deep(grey, "TIFF"), "12bit/3.png": rgb,
            "float/1.tif": deep(grey.astype(np.float32), "TIFF"),
            "32bit/1.tif": deep(grey.astype(np.int32) * 100, "TIFF")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_zip(folder / "npz.zip", {"x/train_data_batch_1.npz": WHOLE})
    write_tar(folder / "python.tar.gz", {"x/data_batch_1": b"\x80\4"}, "w:gz")
    np.save(folder / "unit.npy", np.random.default_rng(0).uniform(size=(5, 8, 8, 3)))
    with open(folder / "huge.npy", "wb") as file:
        header = dict(descr="|u1", fortran_order=False, shape=(10**9, 8, 8, 3))
        np.lib.format.write_array_header_1_0(file, header)
    return folder


@pytest.mark.parametrize("argv, expected", [
    ("mine --src missing --size 8", "--src missing does not exist"),
    ("mine --src empty --size 8", "empty holds no images"),
    *[(f"mine --src {name} --size 8", f"{name} is not a folder, a whole zip or a whole uncompressed tar")
      for name in ("cut.zip", "later.zip", "text.zip", "cut.tar")],
    *[(f"mine --src {name} --size 8", f"{name} is neither a regular file nor a folder")
      for name in ("/dev/zero", "pipe")],
    ("mine --src t.tar.gz --size 8", "t.tar.gz is compressed as a whole"),
    ("mine --src rar/a.rar --size 8", "a .rar or .7z archive: unpack it"),
    ("lsun_bedroom --src lmdb", "lmdb holds an LSUN lmdb: export its images"),
    ("mine --src pq --size 8", "pq holds a parquet table: "),
    ("mine --src tf --size 8", "tf holds a file of TensorFlow records: "),
    ("cifar10 --src python", "python holds the python version of CIFAR-10, .*: the binary version is needed"),
    ("cifar10 --src python.tar.gz", "python.tar.gz holds the python version of CIFAR-10"),
    ("imagenet64 --src npz.zip", "npz.zip holds ImageNet's .npz files: .* that lie in FOLDER, unpacked"),
    ("celeba --src small", "1.png' .64 x 64 pixels.*178 x 218.*python data.py mine --src small --size 64"),
    ("mine --src objects.npy --size 8", "objects.npy holds Python objects, that is code, which was not run"),
    ("mine --src torch.pt --size 8", "torch.pt is a pickle of Python objects, that is code"),
    ("mine --src unit.npy --size 8", "unit.npy holds float images, none negative: .* expected .2 x - 1, if"),
    ("mine --src huge.npy --size 8", "huge.npy is truncated: it ends in image 0 of 1,000,000,000"),
    ("mine --src objects.npy --size 8 --split test", "--split test: objects.npy is one array of images"),
    ("mine --src 12bit --size 8", "no image of 16 bits has a value above 4095: .* scale them"),
    ("imagenet64 --src endless", "endless/train_data_batch_1.npz is neither a regular file nor a folder"),
    ("mine --src grey.npy --size 8", "grey.npy holds uint8 .5, 8, 8.; .*of grey ones three equal channels"),
    ("mine --src float --size 8", "floating-point"),
    ("mine --src clear --size 8", "16 bits and a transparent colour: 8 bits or an alpha channel"),
    ("mine --src 32bit --size 8", "pixels from 0 to 409500: not of 8 or 16 bits"),
    ("cifar10 --src cut.tar.gz", "whole zip or tar"),
    ("cifar10 --src t.tar.gz", "data_batch_1.bin is missing; needed is cifar-10-binary.tar.gz"),
    ("cifar10 --split val", "train and test only"), ("mine --src good.zip", "--src and --size"),
    ("cifra10", "none of cifar10"), ("../x --src good.zip --size 8", "file name"),
    ("shapes --num-samples 0", "--num-samples 0: must be from 1 to"), ("shapes --seed -1", "--seed -1"),
    ("shapes --num-samples " + "9" * 400, "--num-samples 9*: must be from 1"),
    ("cifar10 --num-samples 5", "--num-samples is not for cifar10"),
    ("shapes --src good.zip", "--src is not for shapes"),
    ("shapes --components 3", "--components is not for shapes"), ("shapes --workers 0", "--workers 0"),
    ("shapes --workers 1000000", "--workers 1000000: must be from 1 to 256"),
    ("shapes --size 0", "--size 0: must be from 1 to 100000"),
    ("subspace --size 64", "--size 64: must be from 1 to 32"),
    ("subspace --components 0", "--components 0"),
    ("subspace --images butterflies", "python data.py butterflies --src"),
    ("mine --src good.zip --size 64", "20 of 20 .*too few for --size 64"),
    ("mine --src good.zip --size 8 --out /dev/null/x", "--out /dev/null/x/mine-8.npy: /dev/null is a file"),
    ("celeba", "img_align_celeba.zip"), ("lsun_bedroom", "--src"), ("imagenet64", "image-net.org"),
    ("butterflies", "huggan/")])
def test_data_refuses(argv, expected, sources, tmp_path, monkeypatch):
    """A wrong flag or source by its name, without a traceback and without a trace."""
    monkeypatch.chdir(sources)
    with pytest.raises(UserError, match=expected):
        prepare("--out", tmp_path, *argv.split())
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path, monkeypatch):
    """Catches a traceback or a partial file when the disk fills up (here: a limit on the size of a file), and
    a run that is begun although the disk is too small."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*shapes-32.npy"):
            prepare("shapes", "--num-samples", 200, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000, total=20_000))
    with pytest.raises(UserError, match="--out .*shapes-32.npy: 0 MiB are needed there"):
        prepare("shapes", "--num-samples", 4, "--out", tmp_path)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- several runs, one after another

def test_same_command_again(tmp_path, capsys, monkeypatch):
    """Catches work done twice, a lock where nothing is to be written (the folder may be read-only), or one
    that a killed run has left and that stays, other settings silently answered with the old data, a run
    without its .json (killed between the two files) taken as finished."""
    flags = "shapes", "--size", 8, "--out", tmp_path
    prepare(*flags, "--num-samples", 30)
    before = (tmp_path / "shapes-8.npy").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(common.fcntl, "flock", pytest.fail)
        prepare(*flags, "--num-samples", 30)
    (tmp_path / ".shapes-8.npy.lock").touch()
    prepare(*flags, "--num-samples", 30)
    assert (tmp_path / "shapes-8.npy").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("is there") == 2 and len(os.listdir(tmp_path)) == 2
    with pytest.raises(UserError, match="count 30, now 31; seed 0, now 2: delete"):
        prepare(*flags, "--num-samples", 31, "--seed", 2)
    (tmp_path / "shapes-8.json").unlink()
    with pytest.raises(UserError, match="not prepared"):
        Images("shapes", 8, tmp_path)
    prepare(*flags, "--num-samples", 31)
    assert len(Images("shapes", 8, tmp_path)) == 31


def test_several_processes_prepare_it_once(tmp_path, capsys):
    """Catches a second run of the same set that does its work again, gives up, or leaves its lock behind."""
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(prepare, "shapes", "--num-samples", 500, "--size", 8, "--out", tmp_path)
                for _ in range(3)]
    assert [each.result() for each in runs] == [None] * 3
    out, error = capsys.readouterr()
    assert out.count("opened with") == 1 and out.count("is there") == 2
    assert error.count(f"waiting for another process, which prepares {tmp_path / 'shapes-8.npy'}\n") == 2
    assert sorted(os.listdir(tmp_path)) == ["shapes-8.json", "shapes-8.npy"]


def test_without_locks(tmp_path, monkeypatch):
    """Catches a file system without locks that cannot be written."""
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")
    monkeypatch.setattr(common.fcntl, "flock", unsupported)
    prepare("shapes", "--num-samples", 5, "--size", 8, "--out", tmp_path)
    assert len(Images("shapes", 8, tmp_path)) == 5


@contextlib.contextmanager
def long_run(folder):
    """A run of minutes with two workers, in a process group of its own, once it has written something."""
    argv = "shapes", "--num-samples", "1000000", "--size", "8", "--workers", "2", "--out", str(folder)
    with subprocess.Popen([sys.executable, str(HERE / "data.py"), *argv], stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            deadline = time.time() + 60
            while (not any(file.stat().st_size > 10_000 for file in folder.glob(".*"))
                   and time.time() < deadline):
                time.sleep(0.02)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_killed_run(tmp_path):
    """Catches a killed run that leaves what looks like a result, workers that live on, and a run that waits
    for it and does not go on, or finds its partial files in the way."""
    with ThreadPoolExecutor() as pool, long_run(tmp_path) as killed:
        second = pool.submit(prepare, "shapes", "--num-samples", 10, "--size", 8, "--out", tmp_path)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        assert all(name.startswith(".") for name in os.listdir(tmp_path))
        killed.kill()
        assert killed.communicate(timeout=10)[1] == ""    # which its workers could write to, if they lived on
        assert second.result(20) is None
    assert len(Images("shapes", 8, tmp_path)) == 10
    assert sorted(os.listdir(tmp_path)) == ["shapes-8.json", "shapes-8.npy"]


def test_terminated_run(tmp_path, monkeypatch, capfd):
    """Catches SIGTERM, to the run and to its workers, that leaves a lock or a partial file, waits for a
    worker that lives on, or is taken for a worker's death."""
    def terminate():
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)                                     # their end may be seen before the signal comes
        os.kill(os.getpid(), signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(sys, "argv", ["data.py"])
    timer = threading.Timer(0.5, terminate)
    timer.start()
    with pytest.raises(SystemExit) as leaving:
        common.command_line(lambda: prepare("shapes", "--num-samples", 10**6, "--size", 8, "--workers", 2,
                                            "--out", tmp_path))
    for number, answer in before.items():
        signal.signal(number, answer)
    assert leaving.value.code == 143 and os.listdir(tmp_path) == []
    assert capfd.readouterr().err == "data.py: ended by SIGTERM\n"


def test_interrupted_run(tmp_path):
    """Catches Ctrl-C that leaves partial files, ends in a traceback, or has another exit status than 130."""
    with long_run(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "" and process.returncode == 130
    assert os.listdir(tmp_path) == []
