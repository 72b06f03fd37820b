"""memorize.py against brute force in float64, planted copies, a stand-in for DINOv2, and what it refuses."""

import hashlib
import json
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import memorize
from common import UserError


def unit(rows, columns, seed):
    """Random rows of length 1, float32, and the same numbers in float64 numpy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(rows, columns, generator=generator), dim=1)
    return x, x.double().numpy()


def prepare(folder, name, images):
    """A prepared data set of the images [N, H, W, 3], as data.py leaves it."""
    array = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    np.save(folder / f"{name}-{images.shape[1]}.npy", array)
    info = dict(name=name, count=len(array), dtype=str(array.dtype), low=-1, high=1,
                sha256=hashlib.sha256(array.tobytes()).hexdigest())
    (folder / f"{name}-{images.shape[1]}.json").write_text(json.dumps(info))


def pictures(count, seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def protocol(data, **training):
    """The protocol of samples of a model that was trained on `data`, as an array for an .npz."""
    return np.array(json.dumps(dict(steps=250, config=dict(data=dict(name=data), training=training))))


def memorise(folder, samples, *more, features="pixels", data="mine"):
    """memorize.main on the arguments: the JSON that it writes, which must be strict."""
    flags = ("--data", data, "--features", features, "--data-dir", folder)
    memorize.main([str(a) for a in (folder / samples, *flags, *more)])

    def refuse(text):
        raise ValueError(text)
    return json.loads((folder / f"{samples}.memorize.json").read_text(), parse_constant=refuse)


def cosines(a, b, mean):
    """All cosines between images [N, H, W, 3] and [M, H, W, 3] less the mean, float64 [N, M]."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) - mean.reshape(-1) for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@pytest.fixture
def planted(tmp_path):
    """30 training images and 20 samples: sample 4 is training image 17, sample 11 is 29;
    3 and 25 of training agree."""
    train, generated = pictures(30, 1), pictures(20, 2)
    train[25] = train[3]
    generated[4], generated[11] = train[17], train[29]
    prepare(tmp_path, "mine", train)
    np.savez(tmp_path / "s.npz", generated, protocol=protocol("mine", method="adv"))
    return tmp_path, train, generated


# ------------------------------------------------------------------------------------------- the similarities

@pytest.mark.parametrize("block", [1, 7, 16, 57, 1000])
def test_nearest_by_brute_force(block):
    """A last block left out; an index counted within its block; the maximum of the last block,
    or over the queries."""
    (x, x64), (y, y64) = unit(57, 16, 1), unit(83, 16, 2)
    truth = x64 @ y64.T
    similarity, index = memorize.nearest(x, y, block=block)
    assert np.array_equal(index.numpy(), truth.argmax(1))
    assert np.abs(similarity.numpy() - truth.max(1)).max() < 1e-6


@pytest.mark.parametrize("block", [1, 8, 50, 1000])
def test_nearest_leaves_out_the_image_itself_only(block):
    """An image taken for its own neighbour; a copy under another index taken for the image itself."""
    x, x64 = unit(50, 16, 3)
    x[31], x64[31] = x[7], x64[7]
    truth = x64 @ x64.T
    truth[np.arange(50), np.arange(50)] = -np.inf
    similarity, index = memorize.nearest(x, x, itself=True, block=block)
    assert np.array_equal(index.numpy(), truth.argmax(1))
    assert np.abs(similarity.numpy() - truth.max(1)).max() < 1e-6
    assert (index[7], index[31]) == (31, 7) and similarity[[7, 31]].min() > 1 - 1e-6 and similarity.max() <= 1


def test_summary_of_known_vectors():
    """Another percentile rule or percentile; 0.9 itself not counted; the share as a count."""
    found = memorize.summary(np.arange(101)[::-1] / 100)
    assert found == pytest.approx(dict(mean=0.5, p75=0.75, p90=0.9, p95=0.95, share=11 / 101), abs=1e-12)
    found = memorize.summary(torch.tensor([0.1, 0.4, 0.95, 0.2], dtype=torch.float64))
    # Linear between the sorted values 0.1 0.2 0.4 0.95, whose ranks are 0, 1/3, 2/3, 1.
    assert found == pytest.approx(dict(mean=0.4125, p75=0.5375, p90=0.785, p95=0.8675, share=0.25), abs=1e-12)


# ------------------------------------------------------------------------------------------- the command line

def test_planted_copies_are_found(planted, capsys):
    """A copy not found, or paired with another image; the mean of the samples subtracted, or none; the two
    sets mixed up; a histogram that loses images; pixels passed off as DINOv2; the protocol lost."""
    folder, train, generated = planted
    result = memorise(folder, "s.npz", "--batch", 7)
    mean = train.astype(np.float64).mean(0)
    truth, among = cosines(generated, train, mean), cosines(train, train, mean)
    np.fill_diagonal(among, -np.inf)
    for name, best in (("generated", truth.max(1)), ("train", among.max(1))):
        expected = dict(mean=best.mean(), share=np.mean(best > 0.9),
                        **{f"p{q}": np.quantile(best, q / 100) for q in (75, 90, 95)})
        assert result[name] == pytest.approx(expected, abs=1e-6)
        counts = result["histogram"][name]
        assert sum(counts) == len(best) and sum(counts[95:]) == 2 == round(expected["share"] * len(best))
    assert result["histogram"]["edges"][95] == 0.9 and len(result["histogram"]["edges"]) == 101
    assert {tuple(pair[:2]) for pair in result["closest"][:2]} == {(4, 17), (11, 29)}
    assert result["closest"][2][0] == np.argsort(truth.max(1))[-3] and result["closest"][1][2] > 1 - 1e-6
    assert (result["metric"], result["n"], result["n_train"], result["weights"]) == (
        "memorisation", 20, 30, None)
    assert result["protocol"] == json.loads(str(protocol("mine", method="adv"))) and result["warnings"] == []
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "pixels (not DINOv2)" in line
    assert result["features"] == "pixels (not DINOv2)"
    assert "generated: share >= 0.9 0.1," in line and "train: share >= 0.9 0.06667," in line
    assert "N 20 of s.npz | method adv | trained on mine | steps 250 | reference mine-8 N 30" in line
    grid = np.asarray(Image.open(folder / "s.npz.memorize.png"))
    for row, column, image in ((0, 0, generated), (0, 1, train), (0, 4, generated), (0, 5, train),
                               (1, 1, train)):
        pair = result["closest"][row * 4 + column // 2]
        tile = grid[row * 10:row * 10 + 8, column * 10:column * 10 + 8]
        assert np.array_equal(tile, image[pair[column % 2]])


def test_float_samples_and_other_data(planted, capsys):
    """Float samples read in another scale than the training images' bytes;
    samples of another data set not noticed."""
    folder, _, generated = planted
    expected = memorise(folder, "s.npz")["generated"]
    np.savez(folder / "f.npz", generated.astype(np.float32) / 127.5 - 1, protocol=protocol("celeba"))
    result = memorise(folder, "f.npz")
    assert result["generated"] == expected and "trained on celeba" in result["warnings"][0]
    assert "warning: f.npz: the model was trained on celeba" in capsys.readouterr().err
    np.savez(folder / "p.npz", generated, protocol=protocol("?"))
    assert memorise(folder, "p.npz")["warnings"] == []


def test_subspace_data_in_their_own_units(tmp_path):
    """Data units clipped or rounded to bytes, which a Gaussian's exceed."""
    rng = np.random.default_rng(3)
    train, generated = (rng.normal(0, 3, (count, 4, 4, 3)).astype(np.float32) for count in (12, 9))
    prepare(tmp_path, "subspace", train)
    truth = dict(mean=np.zeros(48), components=np.eye(48)[:2], scale=np.ones(2))
    np.savez(tmp_path / "subspace-4-truth.npz", **truth)
    np.savez(tmp_path / "s.npz", generated)
    result = memorise(tmp_path, "s.npz", data="subspace")
    truth = cosines(generated, train, train.astype(np.float64).mean(0))
    assert result["generated"]["mean"] == pytest.approx(truth.max(1).mean(), abs=1e-6)
    assert result["closest"][0][:2] == list(np.unravel_index(truth.argmax(), truth.shape))
    np.savez(tmp_path / "b.npz", pictures(9, 1, 4))
    with pytest.raises(UserError, match="b.npz holds uint8: floats in the units of subspace-4"):
        memorise(tmp_path, "b.npz", data="subspace")
    with pytest.raises(UserError, match="--features dinov2_vitb14 is for images; "
                                        "the floats of subspace-4 take pixels"):
        memorise(tmp_path, "s.npz", data="subspace", features="dinov2_vitb14")


def test_what_is_kept_of_the_training_set(planted):
    """A file that is not used, or used though the training images have changed; a damaged one, believed."""
    folder, train, _ = planted
    first = memorise(folder, "s.npz")
    kept, = folder.glob("mine-8.memorize-pixels-*.npz")
    with np.load(kept) as file:
        np.savez(kept, similarity=file["similarity"] * 0 + 0.5, features=file["features"])
    again = memorise(folder, "s.npz")
    assert again["train"]["mean"] == 0.5 and again["generated"] == first["generated"]
    assert again["train_from_cache"] and not first["train_from_cache"]
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(UserError, match="memorize-pixels-.*npz, which can be deleted: damaged"):
        memorise(folder, "s.npz")
    prepare(folder, "mine", train[::-1])
    assert memorise(folder, "s.npz")["train"] == pytest.approx(first["train"], abs=1e-6)
    assert len(list(folder.glob("mine-8.memorize-*.npz"))) == 2


NAN = np.where(np.arange(9 * 192).reshape(9, 8, 8, 3) == 9 * 192 - 1, np.nan, 0.0)
# What an .npz of samples holds, flags and the words of the line that refuses them.
REFUSED = [
    ("missing.npz", None, "", "missing.npz: no such file"),
    ("stats.npz", dict(mu=np.zeros(192), sigma=np.eye(192)), "", "holds statistics; images are expected"),
    ("large.npz", dict(arr_0=pictures(3, 1, 16)), "--size 8",
     r"large.npz holds images of \(16, 16\), mine-8 of \(8, 8\)"),
    ("large.npz", dict(arr_0=pictures(3, 1, 16)), "",
     "mine-16.npy is not prepared: run python data.py mine --src"),
    ("unit.npz", dict(arr_0=np.full((3, 8, 8, 3), 0.5)), "", "unit.npz holds float images, none negative"),
    ("range.npz", dict(arr_0=pictures(3, 1) * 1.0), "", "range.npz holds float images from"),
    ("nan.npz", dict(arr_0=NAN), "", "nan.npz holds values that are not finite"),
    ("odd.npz", dict(arr_0=pictures(3, 1), protocol=np.array('{"sigma": NaN}')), "",
     "odd.npz: damaged .*JSON"),
    ("s.npz", None, "--data other", "other-8.npy is not prepared"),
    ("s.npz", None, "--data one", "one-8 holds 1 image: the nearest other one takes at least 2"),
    ("s.npz", None, "--batch 0", "--batch 0: must be from 1 to 10000"),
    ("s.npz", None, "--size 0", "--size 0: must be at least 1"),
    ("s.npz", None, "--out /dev/null/x.json", "--out /dev/null/x.json: /dev/null is a file, not a folder"),
    ("/dev/zero", None, "", "/dev/zero is neither a regular file nor a folder"),
    ("s.npz", None, "--out x.png", "--out x.png: the name must end in .json"),
    ("s.npz", None, "--out {0}/s.json", "--out .*s.json: its picture would take the place of .*s.png, SAMP"),
    ("s.npz", None, "--hub-dir .", "--features pixels takes neither --weights nor --hub-dir"),
]


@pytest.mark.parametrize("name, content, flags, words", REFUSED,
                         ids=[f"{case[0]} {case[2]}" for case in REFUSED])
def test_what_is_refused(planted, name, content, flags, words):
    """A traceback, a number in place of a refusal, work begun before the refusal; files left behind."""
    folder, train, _ = planted
    prepare(folder, "one", train[:1])
    if content:
        np.savez(folder / name, **content)
    with pytest.raises(UserError, match=words) as error:
        memorise(folder, name, *flags.format(folder).split())
    assert "\n" not in str(error.value) and not list(folder.glob("*memorize*"))


def test_the_result_is_written_beside_the_samples(planted):
    """Work done before it shows that its result cannot be written where no --out says."""
    folder, _, _ = planted
    (folder / "s.npz.memorize.png").mkdir()
    with pytest.raises(UserError, match="--out is not given, and the default .*memorize.png: is a folder"):
        memorise(folder, "s.npz")
    assert not list(folder.glob("mine-8.memorize*"))


def test_refuses_what_does_not_fit(planted, monkeypatch):
    """Features of more bytes than are kept, of one set only or off by one; several processes."""
    folder, _, _ = planted
    monkeypatch.setattr(memorize, "MAX_BYTES", 50 * 4 * 192 - 1)
    with pytest.raises(UserError, match="--features pixels: .* GB of them, more than"):
        memorise(folder, "s.npz")
    monkeypatch.setattr(memorize, "MAX_BYTES", 50 * 4 * 192)
    memorise(folder, "s.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process: start it with python"):
        memorise(folder, "s.npz")


# ----------------------------------------------------------------------------------------------------- DINOv2

@pytest.mark.parametrize("size", [8, 32, 256])
def test_input_of_dino_against_pillow(size):
    """Another interpolation, no antialiasing, values that no image can hold, channels or scale wrong."""
    image = pictures(1, 4, size)[0]
    pale = image // 4 + 96                              # does not overshoot: Pillow clips between passes, too
    large = np.asarray(Image.fromarray(pale).resize((224, 224), Image.Resampling.BICUBIC))
    truth = (large.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = memorize.dino_input(pale[None])
    assert found.shape == (1, 3, 224, 224) and found.dtype == torch.float32
    # Pillow rounds twice.
    assert np.abs(found[0].permute(1, 2, 0).numpy() - truth).max() < 1.5 / 255 / 0.224
    channels = (0.485, 0.229), (0.456, 0.224), (0.406, 0.225)
    for value, (mean, deviation) in zip(memorize.dino_input(image[None])[0], channels):
        ends = [(x - mean) / deviation for x in (0, 1)]
        assert (value.min(), value.max()) == pytest.approx(ends, abs=1e-5)


HUBCONF = """
import torch

class Standin(torch.nn.Module):                 # what it computes can be computed by hand
    def __init__(self, width):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(6, width), torch.nn.Dropout(0.5)
    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224) and x.dtype == torch.float32
        return self.dropout(self.linear(x.unflatten(3, (2, 112)).mean((2, 4)).flatten(1)))

def dinov2_vitb14(*, pretrained=True):
    print("noise on stdout")
    assert not pretrained, "it would fetch weights that nobody checks"
    return Standin(5)

def dinov2_vits14(*, pretrained=True):
    return Standin(4)
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub folder with stand-ins for DINOv2, and a way to make a file's sha256 the published one."""
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(HUBCONF)
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(5))
    for name, state in (("weights", dict(weight=weight, bias=torch.zeros(5))), ("short", dict(weight=weight)),
                        ("small", dict(weight=weight[:4], bias=torch.zeros(4)))):
        torch.save({f"linear.{k}": v.clone() for k, v in state.items()}, tmp_path / f"{name}.pth")

    def publish(file, name="dinov2_vitb14"):
        digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        monkeypatch.setitem(memorize.WEIGHTS, name, dict(sha256=digest, size=1000))
        return digest
    return tmp_path, weight.double().numpy(), publish


def test_dino_from_a_local_hub(planted, hub, capsys):
    """Random weights left in the network; training mode; features not of length 1; a cache shared by two
    networks; the repository's chatter in the result; the weights' hash or the code's not reported."""
    folder, train, generated = planted
    _, weight, publish = hub
    digest = publish("weights.pth")
    flags = ("--weights", folder / "weights.pth", "--hub-dir", folder / "hub")
    result = memorise(folder, "s.npz", *flags, "--batch", 7, features="dinov2_vitb14")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("memorisation on dinov2_vitb14 |") and "DINOv2)" not in out
    assert result["weights"] == digest and result["code"].startswith("local copy, sha256 ")

    def by_hand(images):
        large = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
        x = np.stack([np.asarray(image) for image in large])
        x = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        halves = np.stack([x[:, :, :112].mean((1, 2)), x[:, :, 112:].mean((1, 2))], -1)
        return halves.reshape(-1, 6) @ weight.T
    truth = cosines(by_hand(generated), by_hand(train), np.zeros(5))
    among = cosines(by_hand(train), by_hand(train), np.zeros(5))
    np.fill_diagonal(among, -np.inf)
    for name, best in (("generated", truth.max(1)), ("train", among.max(1))):
        assert result[name]["mean"] == pytest.approx(best.mean(), abs=1e-3)             # Pillow rounds
        assert result[name]["p75"] == pytest.approx(np.quantile(best, 0.75), abs=1e-3)
    assert {(4, 17), (11, 29)} <= {tuple(pair[:2]) for pair in result["closest"] if pair[2] > 1 - 1e-6}
    kept, = folder.glob("mine-8.memorize-dinov2_vitb14-*.npz")
    with np.load(kept) as file:
        assert file["features"].shape == (30, 5) and np.allclose(np.linalg.norm(file["features"], axis=1), 1)
        np.savez(kept, similarity=file["similarity"], features=-file["features"])
    turned = memorise(folder, "s.npz", *flags, features="dinov2_vitb14")["generated"]
    assert turned["mean"] < result["generated"]["mean"]                         # what was kept was used
    publish("small.pth", "dinov2_vits14")
    small = memorise(folder, "s.npz", "--weights", folder / "small.pth", *flags[2:], features="dinov2_vits14")
    assert small["features"] == "dinov2_vits14" and not small["train_from_cache"]
    (folder / "hub" / "more.py").write_text("x = 1")
    assert not memorise(folder, "s.npz", *flags, features="dinov2_vitb14")["train_from_cache"]  # other code


def test_refuses_other_weights_and_code(planted, hub):
    """Weights that are not the published ones, or that leave part of the network random, taken; code run
    before its weights are checked; a traceback of foreign code."""
    folder, publish = planted[0], hub[2]
    digest = publish("weights.pth")

    def refused(words, weights="weights.pth", hub_dir="hub"):
        with pytest.raises(UserError, match=words) as error:
            flags = ("--weights", folder / weights, "--hub-dir", folder / hub_dir)
            memorise(folder, "s.npz", *flags, features="dinov2_vitb14")
        assert "\n" not in str(error.value) and not list(folder.glob("*.memorize*"))
    (folder / "hub" / "hubconf.py").write_text("raise SystemError('code was run')")
    refused(rf"--weights .*short.pth: its sha256 is \w+, not {digest}, that of https://.*_vitb14_pretrain",
            "short.pth")
    refused("--weights .*none.pth: no such file; https://.*/dinov2_vitb14/dinov2_vitb14_pretrain.pth is it",
            "none.pth")
    refused("--hub-dir .*empty: no hubconf.py in it; "
            "a clone of https://github.com/facebookresearch/dinov2 has one", hub_dir="empty")
    refused("no dinov2_vitb14 that takes the published weights .SystemError: code was run.*--hub-dir")
    (folder / "hub" / "hubconf.py").write_text("import torch")
    refused("no dinov2_vitb14 that takes the published weights .RuntimeError: Cannot find callable")
    (folder / "hub" / "hubconf.py").write_text(HUBCONF)
    publish("short.pth")
    refused("RuntimeError: Error.* in loading state_dict .*linear.bias", "short.pth")
    (folder / "code.pth").write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "owned").encode() + b"'\ntR.")
    publish("code.pth")
    refused("no dinov2_vitb14 that takes the published weights", "code.pth")
    assert not (folder / "owned").exists()


def test_without_a_network(planted, hub, monkeypatch):
    """A traceback, no way out named, half a file left behind; a revision that is no full hash;
    a branch that moves."""
    folder, publish = planted[0], hub[2]

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network here")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as error:
        memorise(folder, "s.npz", features="dinov2_vitb14")
    for words in ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
                  "--weights takes", str(folder / "dinov2_vitb14_pretrain.pth"), "0b8b82f85de91b42",
                  "--hub-dir a clone of https://github.com/facebookresearch/dinov2"):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and sorted(folder.iterdir()) == before
    asked = []

    def load(where, *args, **flags):
        asked.append((where, flags))
        offline()
    monkeypatch.setattr(torch.hub, "load", load)
    publish("weights.pth")
    with pytest.raises(UserError, match="facebookresearch/dinov2:.* .URLError: .*no network here.*"
                                        "--hub-dir a clone"):
        memorise(folder, "s.npz", "--weights", folder / "weights.pth", features="dinov2_vitb14")
    (where, flags), = asked
    assert len(where.split(":")[1]) == 40 and int(where.split(":")[1], 16) and flags["pretrained"] is False
