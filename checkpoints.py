"""Checkpoint files: written whole, and read with suspicion, as anybody may have made them.

    model, schedule, config, step = load_model("runs/cifar10-adv")      # or a public state dict
    checkpoint = load_checkpoint("runs/cifar10-adv")                    # a run's: all that it goes on from

No code in a file is run, and all that one says is checked here, in one place, before anything is made of it.
"""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch

from common import UserError, atomic_write, is_first_process
from unet import Schedule, UNet, built

FIRST = "input_blocks.0.0.weight"                           # a state dict of the network is known by it


# ------------------------------------------------------------------------------------------- files and models

def previous_of(path):
    """Where `save_checkpoint` keeps the file before the last one."""
    return Path(path).with_name(f"{Path(path).stem}-previous.pt")


def save_checkpoint(path, checkpoint):
    """Writes one dict of tensors and plain values, atomically; the file that was there stays as
    *-previous.pt. UserError where the disk is full."""
    path = Path(path)
    with atomic_write(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:                       # what it makes of a full disk
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"cannot write {path}: is the disk full? ({reason})") from error
        if path.exists():               # a second name for the old file, so that neither name is ever missing
            with atomic_write(previous_of(path)) as link:
                link.unlink(missing_ok=True)
                try:
                    os.link(path, link)
                except OSError:                             # a file system without hard links
                    shutil.copyfile(path, link)


def load_checkpoint(path):
    """Reads a checkpoint of ours or a bare public state dict onto the CPU, and checks all that is in it.

    `path` is a file or train.py's --out folder. -> a dict: config, step, model and ema (state dicts), and, of
    a run that can go on, ema_updates and optimizer; or the public state dict, taken out of what it is wrapped
    in, which is said. UserError names the file and what is wrong: missing, damaged, of another kind, of
    another network, values that are not finite.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / "checkpoint.pt"
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise UserError(f"{path}: is neither a regular file nor a folder")
        if os.path.islink(path):
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there")
        raise UserError(f"{path}: no such checkpoint; pass train.py's --out folder or a .pt file")
    hint = f"; the one before it is {previous_of(path)}" if previous_of(path).is_file() else ""
    try:
        checkpoint = _unwrapped(_read(path), path)
        _check(checkpoint, path.stat().st_size)
    except (UserError, ValueError) as error:
        said = "".join(c if c.isprintable() else " " for c in str(error).removeprefix("--"))
        raise UserError(f"{path}: {said}{hint}") from error
    return checkpoint


def load_model(path, raw=False, size=None, heads=None, schedule=None, timesteps=None):
    """-> UNet in eval mode on the CPU, Schedule, config, step of a checkpoint: the EMA weights, or the raw
    ones.

    size, heads (default 4), schedule (linear) and timesteps (1000) describe a bare public state dict, which
    says nothing of them; a checkpoint of ours knows its own. config has the groups network, process, data and
    training (empty for a public file). UserError where these do not fit the file.
    """
    checkpoint = load_checkpoint(path)
    given = dict(size=size, heads=heads, schedule=schedule, timesteps=timesteps)
    given = {name: value for name, value in given.items() if value is not None}
    if wrong := misfit(given):
        raise UserError(f"--{wrong}")
    if "config" in checkpoint:
        config, state_dict = checkpoint["config"], checkpoint["model" if raw else "ema"]
        own = config["network"] | config["process"]
        for name, value in given.items():
            if own[name] != value:
                raise UserError(f"--{name} {value}: {path} is a checkpoint of train.py, its {name} is "
                                f"{own[name]}; leave the flag out")
    elif size is None:
        raise UserError(f"{path}: a bare state dict does not say its image size; pass --size "
                        "(and --heads, --schedule, --timesteps)")
    elif raw:
        raise UserError(f"--raw: {path} is a bare state dict, which has one set of weights; leave it out")
    else:
        state_dict, data = checkpoint, dict(name="?", low=-1.0, high=1.0, p=0.0, sigma=0.0, float_data=False)
        config = dict(network=network_of(checkpoint, size, heads or 4), data=data, training={},
                      process=dict(schedule=schedule or "linear", timesteps=timesteps or 1000))
    model, schedule = built(config, "meta")                 # its weights are the file's: none are drawn
    model.load_state_dict(state_dict, assign=True)
    model = model.float().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, schedule, config, checkpoint.get("step", 0)


def network_of(state_dict, size, heads):
    """The arguments of `UNet` read off a bare state dict; the image size and the heads leave no trace in the
    tensors. UserError where it is of another kind of network."""
    width = lambda key: state_dict[key].shape[0]
    blocks = {key.split(".")[1] for key in state_dict if key.startswith("input_blocks.")}
    levels, attn = [[]], set()
    try:
        channels, in_channels = state_dict[FIRST].shape[:2]
        for block in range(1, len(blocks)):
            if f"input_blocks.{block}.0.op.weight" in state_dict:
                levels.append([])
            else:
                levels[-1].append(width(f"input_blocks.{block}.0.in_layers.2.weight"))
                if f"input_blocks.{block}.1.qkv.weight" in state_dict:
                    attn.add(size >> (len(levels) - 1))
        if any(len(set(widths)) > 1 for widths in levels):  # guided-diffusion's halve and double the size
            raise UserError("not an improved-diffusion U-Net: its widths change inside a level, as with "
                            "residual blocks that change the size (resblock_updown); this U-Net has none")
        return dict(size=size, channels=channels, res_blocks=len(levels[0]),
                    mult=tuple(widths[0] // channels for widths in levels),
                    attn=tuple(sorted(attn, reverse=True)), heads=heads, in_channels=in_channels,
                    sigma_data=None,
                    learn_sigma=width("out.2.weight") == 2 * in_channels,
                    scale_shift=width("input_blocks.1.0.emb_layers.1.weight") == 2 * levels[0][0])
    except KeyError as error:
        raise UserError(f"not an improved-diffusion U-Net: it has no {error.args[0]}") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError("not an improved-diffusion U-Net: a tensor without axes, or a level without residual "
                        "blocks") from error


# ------------------------------------------------------------------------------------ what kind of file it is

# How files of other kinds begin, and what is to be done with them.
PICKLE = "is a pickle, which could run code and was not loaded; write its state dict with torch.save"
FOREIGN = {b"version https://git-lfs": "is a pointer of Git LFS; git lfs pull fetches the file itself",
           b"<": "is a page of HTML or XML, as a download that failed leaves it",
           b"\x89HDF": "is an HDF5 file; a state dict that torch.save wrote is needed",
           b"\x93NUMPY": "is an array of NumPy, not a checkpoint",
           b"\x1f\x8b": "is compressed by gzip; unpack it first",
           b"\x80\x03": PICKLE, b"\x80\x04": PICKLE, b"\x80\x05": PICKLE}


def _foreign(path):
    """What a file is that torch.save did not write, in words; else None. An exception where it is damaged."""
    with open(path, "rb") as file:
        start = file.read(32)
    for beginning, kind in FOREIGN.items():
        if start.startswith(beginning):
            return kind
    if start[8:10] == b'{"':
        return "is a .safetensors file; read it with safetensors.torch.load_file, write that with torch.save"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.rpartition("/")[2] for info in archive.infolist()}
        if "constants.pkl" in names:
            return "is a TorchScript archive; write its state_dict() with torch.save"
        if "data.pkl" not in names:
            return "is a zip archive that torch.save did not write; a checkpoint or a state dict is needed"
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:            # a bomb?
            return "is a zip archive with compressed members, which torch.save does not write"
        if damaged := archive.testzip():                    # torch.load does not compare the checksums
            raise ValueError(f"checksum of {damaged}")
    return None


def _read(path):
    """What torch.save wrote into a file. ValueError says what else the file is; no code in it is run."""
    try:
        kind = _foreign(path)
        found = None if kind else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except Exception as error:                              # whatever the unpickler makes of foreign bytes
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        if objects := re.search(r"GLOBAL (\S+)", reason):
            raise ValueError(f"it holds Python objects ({objects[1]}), which could run code and were not "
                             "loaded; save its state_dict() with torch.save") from error
        raise ValueError("damaged, truncated or not a PyTorch checkpoint "
                         f"({reason.splitlines()[0][:100]})") from error
    if kind:
        raise ValueError(kind)
    return found


# What others wrap a state dict in, the average of the weights first.
WRAPPERS = ("ema", "ema_state_dict", "model_ema", "ema_model", "shadow", "state_dict", "model_state_dict",
            "model", "net", "module")                       # the first of them that has weights is taken


def _unwrapped(found, path):
    """A checkpoint of ours as it is. A state dict out of what others wrap it in, and without what
    torch.compile or DataParallel set before its names, which is said. ValueError where there is none."""
    taken = []
    for _ in range(5):                                      # a dict may hold itself
        if not isinstance(found, dict):
            break
        if {"config", "model", "ema"} <= found.keys() or FIRST in found:
            if taken and is_first_process():
                print(f"{path}: takes the state dict {', '.join(taken)}", flush=True)
            return found
        keys = [key for key in found if isinstance(key, str)]
        prefixes = [key.removesuffix(FIRST) for key in keys if key.endswith("." + FIRST)]
        if len(prefixes) > 1:
            raise ValueError(f"holds several networks ({', '.join(prefixes)[:80]}); save one of them alone")
        if prefixes:
            keys = [key for key in keys if key.startswith(prefixes[0])]
            taken.append(f"of {len(keys)} of {len(found)} names, those with {prefixes[0]!r} before them")
            found = {key.removeprefix(prefixes[0]): found[key] for key in keys}
            continue
        inside = [key for key in WRAPPERS if isinstance(found.get(key), dict)]
        inside.sort(key=lambda key: not any(str(name).endswith(FIRST) for name in found[key]))
        if not inside:
            break
        taken.append(f"under {inside[0]!r}")
        found = found[inside[0]]
    begins = f" (it begins with {str(next(iter(found)))[:60]!r})" if isinstance(found, dict) and found else ""
    raise ValueError(f"neither a checkpoint of train.py nor an improved-diffusion state dict, which has "
                     f"{FIRST}{begins}")


# --------------------------------------------------------------------------------------- what has to be in it

def _whole(low, high):
    """An entry of SCHEMA: what a value must be, in words and as a test."""
    return f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def _number(low, high):
    """As `_whole`, of a number that may have a fraction."""
    return f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high


def _wholes(value, high):
    """Whether a value is a tuple of at most 12 positive integers."""
    return type(value) is tuple and len(value) <= 12 and all(map(_whole(1, high)[1], value))


_YES_OR_NO = "True or False", lambda v: type(v) is bool
_NAME = "a name", lambda v: type(v) is str and len(v) <= 200 and v.isprintable()

# What the config of a checkpoint has to say, each in words and as a test: no sensible network lies outside.
SCHEMA = dict(
    network=dict(size=_whole(1, 4096), in_channels=("3, for colours", lambda v: type(v) is int and v == 3),
                 channels=_whole(1, 4096), res_blocks=_whole(1, 32), heads=_whole(1, 4096),
                 dropout=_number(0, 0.99),
                 mult=("1 to 12 integers from 1 to 64, as in 1,2,2,2", lambda v: _wholes(v, 64) and bool(v)),
                 attn=("different positive integers, as in 16,8",
                       lambda v: _wholes(v, 4096) and len(set(v)) == len(v)),
                 learn_sigma=_YES_OR_NO, scale_shift=_YES_OR_NO,
                 sigma_data=("None, or a number from 1e-06 to 1e+06",
                             lambda v: v is None or _number(1e-6, 1e6)[1](v))),
    process=dict(schedule=("linear or cosine", lambda v: type(v) is str and v in ("linear", "cosine")),
                 timesteps=_whole(2, 10**6)),
    data=dict(name=_NAME, corruption=_NAME, p=_number(0, 1), sigma=_number(0, 1000), low=_number(-1e6, 1e6),
              high=_number(-1e6, 1e6), float_data=_YES_OR_NO),
    training={})


def misfit(settings):
    """Of {name: value} the first setting that SCHEMA does not allow, in words; else None."""
    for name, (says, fits) in (SCHEMA["network"] | SCHEMA["process"] | SCHEMA["data"]).items():
        if name in settings and not fits(settings[name]):
            value = settings[name]
            shown = ",".join(map(str, value)) if type(value) is tuple else str(value)
            return f"{name.replace('_', '-')} {shown[:60]}: must be {says}"
    return None


def _check(checkpoint, file_size):
    """ValueError or UserError where a checkpoint of ours, or a state dict, is not what it has to be."""
    if FIRST in checkpoint:
        networks = {"its state dict": checkpoint}
        _check_tensors(networks, file_size)
        network = network_of(checkpoint, size=4096, heads=1)        # no tensor depends on size and heads
        if wrong := misfit(network):
            raise ValueError(f"its {wrong}")
    else:
        networks = {f"its {name}": checkpoint[name] for name in ("model", "ema")}
        _check_tensors(networks, file_size)
        network = _network_of_config(checkpoint)
    with torch.device("meta"):                              # takes no memory, however large
        unet = UNet(**network | dict(sigma_data=None))      # which adds no tensor
    expected = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    for name, state_dict in networks.items():
        for key in [*state_dict, *expected]:                # first what is too much
            found = tuple(state_dict[key].shape) if key in state_dict else "missing"
            if key not in expected:
                classes = " and only a class-conditional one has" if key == "label_emb.weight" else ""
                raise ValueError(f"the weights do not fit the network: {name} has {key[:80]}, which this "
                                 f"U-Net has not{classes}")
            if found != expected[key]:
                raise ValueError(f"the weights do not fit the network: {key} of {name} is {found} and has to "
                                 f"be {expected[key]}")
        for key, tensor in state_dict.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} of {name} holds values that are not finite (NaN or infinity)")
    if "optimizer" in checkpoint:
        _check_optimizer(checkpoint["optimizer"], list(expected.values()))


def _is_tensor(value, *dtypes):
    """Whether a value is a tensor of one of these types with its numbers in memory: not sparse, not meta."""
    return (isinstance(value, torch.Tensor) and value.dtype in dtypes and value.layout == torch.strided
            and value.device.type == "cpu")


def _check_tensors(networks, file_size):
    """ValueError unless every state dict is floating-point numbers by their names, and no more of them than
    the file can hold. networks: {what it is called: state dict}."""
    for name, state_dict in networks.items():
        if not isinstance(state_dict, dict):
            raise ValueError(f"{name} is no dict of tensors")
        for key, tensor in state_dict.items():
            if not (isinstance(key, str) and _is_tensor(tensor, torch.float64, torch.float32, torch.float16,
                                                        torch.bfloat16)):
                raise ValueError(f"{str(key)[:80]} of {name} is no tensor of floating-point numbers")
        if sum(tensor.nbytes for tensor in state_dict.values()) > file_size:
            raise ValueError(f"{name} is larger than the file: tensors that share their memory")


def _network_of_config(checkpoint):
    """The arguments of `UNet` that a checkpoint of ours names. ValueError unless all that it says of itself
    is as SCHEMA has it; UserError where schedule and timesteps do not fit."""
    config = checkpoint["config"]
    for group, settings in SCHEMA.items():
        values = config.get(group) if isinstance(config, dict) else None
        if not isinstance(values, dict):
            raise ValueError(f"its config has no group {group!r}")
        if group == "network":                              # the kit had no --precondition once
            values.setdefault("sigma_data", None)
        if group == "data":                                 # nor --corruption
            values.setdefault("corruption", "gaussian")
        exact = group in ("network", "process")
        for name in [*settings, *(values if exact else ())]:
            if name not in values or name not in settings:
                raise ValueError(f"its config's group {group!r} has {'no' if name in settings else 'a'} "
                                 f"{str(name)[:60]!r}")
        if wrong := misfit({name: values[name] for name in settings}):
            raise ValueError(f"its {wrong}")
    if config["data"]["low"] >= config["data"]["high"]:
        raise ValueError(f"its low {config['data']['low']} is not below its high {config['data']['high']}")
    for name in ("step", "ema_updates") if "optimizer" in checkpoint else ("step",):
        says, fits = _whole(0, 2**53)
        if not fits(checkpoint.get(name)):
            raise ValueError(f"its {name} {str(checkpoint.get(name))[:60]}: must be {says}")
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its config is more than plain values ({error})") from error
    Schedule.named(**config["process"])
    return config["network"]


def _check_optimizer(optimizer, shapes):
    """ValueError unless it has AdamW's moments of every parameter, in the order of the network's `shapes`."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    for k, shape in enumerate(shapes):
        moments = state.get(k) if isinstance(state, dict) else None
        for name, wanted in dict(step=(), exp_avg=shape, exp_avg_sq=shape).items():
            found = moments.get(name) if isinstance(moments, dict) else None
            if not (_is_tensor(found, torch.float32) and found.shape == wanted and found.isfinite().all()):
                raise ValueError(f"its optimizer lacks AdamW's {name} of parameter {k}, finite and of the "
                                 f"shape {wanted}")
