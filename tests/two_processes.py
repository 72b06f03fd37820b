"""One of two processes, started by conftest.py under torchrun: runs the jobs of FOLDER/jobs.json in order.

In a job's arguments {rank} stands for 0 or 1, for what differs between two machines.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch                                                # noqa: E402

import train                                                # noqa: E402
from common import UserError, start_processes               # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    train.GRID = 4                                          # images: seconds saved
    folder, results = Path(sys.argv[1]), {}
    process = start_processes()
    for name, script, argv in json.loads((folder / "jobs.json").read_text()):
        argv = [part.replace("{rank}", os.environ["RANK"]) for part in argv]
        results[name] = "ok"
        with open(folder / f"{name}-{process.rank}.out", "w") as out, contextlib.redirect_stdout(out):
            try:
                importlib.import_module(script).main(argv)
            except UserError as error:
                results[name] = str(error)
            except SystemExit as leaving:
                results[name] = f"exit {leaving.code}"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        torch.distributed.barrier()                 # the next job may read what this one's rank 0 writes last
    (folder / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Once in some 100 runs the interpreter's end aborts otherwise, after all results are written: "terminate
    # called without an active exception", from a thread of the process group's.
    os._exit(0)
