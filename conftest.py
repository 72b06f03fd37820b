"""What all tests share: the kit on the path, one thread, tiny data, two processes started once a session."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TINY = "--channels 32 --res-blocks 1 --mult 1,2 --attn 4 --heads 2 --size 8 --batch 8".split()

os.environ["OMP_NUM_THREADS"] = "1"                         # of the processes that tests start
torch.set_num_threads(1)                                    # small tensors: a second thread only waits
signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored behind & and nohup; some tests send it


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with a prepared data set: 64 shapes of 8x8 pixels."""
    import data
    folder = tmp_path_factory.mktemp("data")
    data.main(["shapes", "--num-samples", "64", "--size", "8", "--workers", "1", "--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def two_processes(request, tmp_path_factory):
    """Runs what the test files ask of two processes, all of it under one torchrun.

    A test file that needs it has a function two_process_jobs(folder, shapes) -> [(name, script, argv), ...],
    which may put files into folder. -> folder; results {name: [of rank 0, of rank 1]}, each "ok" or the
    error's line.
    """
    folder, jobs = tmp_path_factory.mktemp("two"), []
    for module in dict.fromkeys(item.module for item in request.session.items):
        if hasattr(module, "two_process_jobs"):
            jobs += module.two_process_jobs(folder, request.getfixturevalue("shapes"))
    jobs = [(name, script, [*map(str, argv)]) for name, script, argv in jobs]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(HERE / "tests" / "two_processes.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ranks = [json.loads((folder / f"results-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, {name: [each[name] for each in ranks] for name, _, _ in jobs}
