"""run_all.sh: its commands, their order, and what it does when one fails or when it is stopped.

Nothing is trained: a stand-in for Python writes down what it is asked to run and makes the files that would
come of it.
"""

import argparse
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import plan
import unet
from common import UserError
from conftest import HERE

STAND_IN = r"""#!/bin/sh
# A command that holds $FAIL dies as if it were out of memory; one that holds $SLOW waits until it is told to
# end.
if [ "$1" = -c ]; then PYTHONPATH=$STUBS exec "$REAL_PYTHON" -S "$@"; fi
echo "GPUs ${CUDA_VISIBLE_DEVICES-}: $*" >> "$COMMANDS"
if [ "$2" = torch.distributed.run ]; then shift 5; fi
case "$*" in *"${FAIL:-no such words}"*) echo "out of memory" >&2; kill -9 $$ ;; esac
case "$*" in *"${SLOW:-no such words}"*)
    trap 'trap - TERM; sleep 0.3; echo saved >> "$COMMANDS"; exit 143' TERM
    echo "lane: $PPID" >> "$COMMANDS"
    echo "waits: $$" >> "$COMMANDS"
    for k in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 0.1; done ;;
esac
name=toy3d last= kind=fid
for word in "$@"; do
    case "$last" in
        --out) out=$word ;; --steps) steps=$word ;; --size) size=$word ;;
        --sweep | --data | --weighting) name=$name-$word ;;
    esac
    case "$word" in subspace) kind=fd-exact ;; pixels) kind=fd-pixels ;; esac
    last=$word
done
case "$1" in
    data.py) mkdir -p "$out"; : > "$out/$2-$size.json" ;;
    toy3d.py) mkdir -p "$out"; : > "$out/$name.json" ;;
    train.py)
        mkdir -p "$out"
        if [ "$last" = --benchmark ]; then : > "$out/benchmark.json"; exit; fi
        : > "$out/samples-$(printf %08d "$steps").png" ;;
    sample.py) : > "$out" ;;
    attack.py) : > "$out"; : > "$out.attack.json" ;;
    memorize.py) : > "$2.memorize.json" ;;
    plan.py) cat > plan.txt ;;
    fid.py) for word in "$@"; do case "$word" in *.npz) : > "$word.$kind.json" ;; esac; done ;;
esac
"""


class Kit:
    """A folder with run_all.sh and the stand-in."""

    def __init__(self, folder):
        self.folder, self.commands, stubs = folder, folder / "commands.txt", folder / "stubs"
        (folder / "run_all.sh").write_bytes((HERE / "run_all.sh").read_bytes())
        (folder / "python").write_text(STAND_IN)
        (folder / "python").chmod(0o755)
        (stubs / "PIL").mkdir(parents=True)
        for name, text in (("PIL/Image", ""), ("scipy", ""), ("numpy", "load = lambda file: []"), (
                "torch", "import os\nclass cuda:\n    device_count = lambda: int(os.environ['GPUS'])\n")):
            (stubs / f"{name}.py").write_text(text)

    def start(self, *argv, **environment):
        """bash run_all.sh ARGV as a process, in a process group of its own as a terminal gives it."""
        self.commands.write_text("")
        environment = dict(PYTHON=str(self.folder / "python"), STUBS=str(self.folder / "stubs"), LANES="2",
                           GPUS="0", REAL_PYTHON=sys.executable, COMMANDS=str(self.commands)) | environment
        return subprocess.Popen(
            ["bash", "run_all.sh", *argv], cwd=self.folder, env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, *argv, **environment):
        """-> the commands given, what was printed, the exit status."""
        process = self.start(*argv, **environment)
        printed, _ = process.communicate(timeout=60)
        return self.given(), printed, process.returncode

    def wait_for(self, count):
        """Waits until so many commands that hold $SLOW run at once. -> their process ids"""
        deadline, found = time.monotonic() + 20, []
        while len(found) < count:
            assert time.monotonic() < deadline, self.commands.read_text()
            time.sleep(0.02)
            found = re.findall(r"waits: (\d+)\n", self.commands.read_text())
        return found

    def given(self):
        """The commands until now, without what precedes the script."""
        lines = self.commands.read_text().splitlines()
        return [re.sub(r"^GPUs .*?: (.* )?(?=\w+\.py)", "", line) for line in lines]

    def listed(self, *argv, **environment):
        """-> the chains that `list` prints, each a list of commands without what precedes the script."""
        _, printed, status = self.run("list", *argv, **environment)
        assert status == 0, printed
        return [[re.sub(r"^.*?python (.* )?(?=\w+\.py)", "", command) for command in line.split(" && ")]
                for line in printed.splitlines()]


@pytest.fixture
def kit(tmp_path):
    """A Kit in a new folder."""
    return Kit(tmp_path)


class Parsed(Exception):
    """What a script makes of its flags."""


def parsed(command, monkeypatch):
    """The flags of a command as its script takes them, and checked where it has a function for that."""
    script, *argv = command.split()
    module, parse = importlib.import_module(script.removesuffix(".py")), argparse.ArgumentParser.parse_args

    def only_parse(self, argv=None, namespace=None):
        raise Parsed(parse(self, argv, namespace))
    if hasattr(module, "arguments"):
        return module.arguments(argv)
    with monkeypatch.context() as patch, pytest.raises(Parsed) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        module.main(argv)
    return found.value.args[0]


@pytest.mark.parametrize("asked, chains", [
    ("quick", 40), ("day", 18), ("paper", 50), ("quick theory speed evaluations real", 65), ("dry", 68),
    ("quick questions", 250)])
def test_commands_are_what_the_scripts_take(kit, monkeypatch, asked, chains):
    """Catches a flag that a script does not know or refuses, a command or a score twice in a chain, a chain
    without its data, a stage before the model or the samples that it needs, and an attack whose percentage is
    not exact."""
    listed = kit.listed(*asked.split(), TRAIN_FLAGS="--amp")
    scripts = {command.split()[0] for chain in listed for command in chain}
    every = {"data.py", "train.py", "sample.py", "attack.py", "fid.py", "memorize.py", "toy3d.py"}
    every -= {"attack.py"} if "speed" in asked else set()
    every -= {"memorize.py", "toy3d.py"} if asked.count(" ") else {"toy3d.py"} if asked == "day" else set()
    assert len(listed) >= chains and scripts == every
    for chain in listed:
        assert len(set(chain)) == len(chain)
        trained, sampled, judged = set(), set(), []
        for command in chain:
            script, args = command.split()[0], parsed(command, monkeypatch)
            if script == "train.py":
                assert chain[0].startswith("data.py") and args.amp
                assert args.init is None or str(args.init) in trained
                trained.add(str(args.out))
            elif script in ("sample.py", "attack.py"):
                assert args.run in trained
                sampled.add(str(args.out))
                if script == "attack.py":
                    if args.where != "first":               # of x_T alone
                        assert args.steps_attacked.endswith("%")
                        assert asked == "dry" or int(args.steps_attacked[:-1]) * args.steps % 100 == 0
            elif script == "fid.py":
                judged += args.samples
                assert sampled >= set(judged) and len(set(judged)) == len(judged)
            elif script == "memorize.py":
                assert args.samples in sampled


def test_dry_runs_the_commands_of_day(kit):
    """Catches a command, a sampler or a flag of the day that dry does not try, and its runs among dry's."""
    def flags(command):
        return set(re.findall(r"--(\S+)(?: (?!--)(\S+))?", command))

    day, dry = kit.listed("day"), kit.listed("dry", "dry_day")
    commands = [pair for chains in zip(day, dry, strict=True) for pair in zip(*chains, strict=True)]
    shortened = {"size", "steps", "num-samples", "data-dir", "out"}
    for long, short in commands:
        own = {flag for flag, _ in flags(long) - flags(short)}
        assert long.split()[0] == short.split()[0] and own <= shortened, (long, short)
        assert short.startswith("data.py") or "runs/dry/day/cifar10/" in short
    assert len(commands) > 150 and any("--sampler heun" in long for long, _ in commands)
    assert all("--sampler ddpm" not in long or re.search("/(ddpm|adv)-p0-s0-", long) for long, _ in commands)


def test_torchrun_takes_the_commands(kit):
    """Catches flags that torchrun claims for itself, as --n was, a launch on other GPUs than asked for."""
    from torch.distributed.run import parse_args
    _, printed, _ = kit.run("list", "paper", "table1", "fig8", GPUS_PER_MODEL="8")
    commands = re.findall(r"-m torch.distributed.run (.*?)(?: && |\n)", printed)
    assert len(commands) > 70
    for command in commands:
        args = parse_args(command.split())
        assert args.nproc_per_node == "8"
        assert args.training_script in ("train.py", "sample.py", "attack.py", "fid.py")
        assert args.training_script_args == command.split(".py ")[1].split()


def test_tables_one_after_another_and_what_is_there_is_skipped(kit):
    """Catches a first report that comes after the last table, a stage that `list` does not name or a run does
    not do, files beside runs/ and data/, a second run that begins again, and one that does not see what is
    missing."""
    there = set(kit.folder.iterdir())
    listed = [chain for table in ("fig6", "table4") for chain in kit.listed("quick", table)]
    given, printed, status = kit.run("quick", "fig6", "table4")
    assert status == 0, printed
    report = "report.py --runs runs/quick"
    assert given.count(report) == 2 and given[-1] == report
    first = given.index(report)
    assert sorted(set(given[:first])) == sorted({command for chain in listed[:2] for command in chain})
    done = set(given[first:]) - {report}                    # the data are there by then
    assert done == {command for chain in listed[2:] for command in chain} - set(listed[0][:1])
    for chain in listed[2:]:
        assert [command for command in given if command in chain[1:]] == chain[1:]
    made = {kit.folder / "runs", kit.folder / "data", kit.commands}
    assert set(kit.folder.iterdir()) - there == made - there
    assert kit.listed("quick", "fig6", "table4") == []
    assert kit.run("quick", "fig6", "table4")[0] == [report]
    for file in (kit.folder / "runs/quick/subspace/adv-p0.9-s0.1-fine-tuned").glob("ddpm-*"):
        file.unlink()
    again = [command for chain in listed for command in chain if "s0.1-fine-tuned/ddpm-50.npz" in command]
    assert kit.run("quick", "fig6", "table4")[0] == [*again, report] and len(again) == 2


def test_what_is_beyond_the_paper_has_a_folder_of_its_own(kit):
    """Catches its numbers among the paper's tables, a table after it that goes into its folder, samples of a
    longer training under a shorter one's name, and scores of the last samples alone."""
    given, printed, status = kit.run("quick", "speed", "cost", LANES="8")
    assert status == 0, printed
    cost = given[given.index("report.py --runs runs/speed --tables speed"):]
    assert [command.split()[0] for command in cost] == ["report.py", "train.py", "report.py"]
    assert cost[1].endswith("--out runs/quick/subspace/adv-p0-s0-cost --benchmark")
    runs = list((kit.folder / "runs/speed/subspace").iterdir())
    assert len(runs) == 21 and all((run / "benchmark.json").exists() for run in runs)
    own = [command for command in given if " runs/speed/subspace/adv-p0.9-s0.2-edm-seed1" in command]
    steps = ["100", "200", "400", "800"]
    assert [command.split()[0] for command in own] == 4 * ["train.py", "sample.py", "fid.py"] + ["train.py"]
    assert [re.search(r"--steps (\d+)", command)[1] for command in own[::3]] == [*steps, "800"]
    assert [re.search(r"step(\d+).npz", command)[1] for command in own[1::3]] == steps


def test_questions_share_models_and_mix_none(kit):
    """Catches a folder that two questions train differently, or that one of them trains on and another
    samples, the same training under two names, a seed that is not trained, `questions` that leaves one out,
    and a compute-matched model of other steps than 5 for 9."""
    numbers, commands = "86457321", {}
    for number in numbers:
        listed = kit.listed("quick", f"question{number}", CIFAR10="images")
        commands[number] = [command for chain in listed for command in chain
                            if command.startswith("train.py") and not command.endswith("--benchmark")]
    every = [command for number in numbers for command in commands[number]]
    ways = [re.sub(r" --out (\S+)", "", command) for command in every]
    folders = [re.search(r" --out (\S+)", command)[1] for command in every]
    assert len(set(every)) == len(set(ways)) == len(set(folders)) > 250
    assert all(folder.startswith("runs/questions/") for folder in folders)
    assert set(commands["7"]) & set(commands["5"]) and set(commands["4"]) & set(commands["2"])
    listed = kit.listed("quick", "questions", CIFAR10="images")
    assert {command for chain in listed for command in chain if command in every} == set(every)
    cell = [command for command in commands["1"] if "--p 0.3 --sigma 0.1 " in command]
    seeds = [re.search(r"--seed (\d)", command)[1] for command in cell]
    assert [seeds.count(seed) for seed in "012"] == [7, 7, 7]
    adv = [command for command in cell if "--method adv" in command]
    few, most = sorted({int(re.search(r"--steps (\d+)", command)[1]) for command in adv})
    assert few == most * 5 // 9


def test_questions_have_a_report_of_their_own(kit):
    """Catches answers among quick's tables, costs that are measured side by side, and real images that nobody
    asked for."""
    chain, = kit.listed("quick", "question8")
    given, printed, status = kit.run("quick", "question8", "question3", LANES="3")
    assert status == 0, printed
    first, last = (k for k, command in enumerate(given) if command.startswith("report.py"))
    assert given[first] == given[last] == "report.py --runs runs/questions --tables questions"
    assert given[:first] == chain and sum(command.endswith("--benchmark") for command in chain) == 6
    assert last == len(given) - 1 and not any("cifar10 " in command for command in given[first:])


def test_a_list_deletes_nothing(kit):
    """Catches `list dry` that begins as a run of dry does, by deleting what another one has made."""
    made = kit.folder / "runs/dry/made"
    made.parent.mkdir(parents=True)
    made.touch()
    _, printed, status = kit.run("list", "dry", "fig3")
    assert status == 0 and "train.py" in printed and made.exists()


@pytest.mark.parametrize("lanes", ["1", "2"])
def test_a_stage_that_dies_ends_its_chain_alone(kit, lanes):
    """Catches a stage killed for memory that is taken for Ctrl-C and stops all, one that is not named with
    its status and the end of its output, one whose chain goes on without it, and exit status 0."""
    given, printed, status = kit.run("quick", "fig6", "fig7", LANES=lanes, FAIL="--method ddpm")
    assert status == 1 and "out of memory" in printed
    assert re.search(r"FAILED with status 137: \S+ train.py .*--method ddpm", printed)
    named = printed.split("These failed")[1]
    assert named.count("status 137") == 1 and "--method ddpm" in named
    assert ["train.py"] == [command.split()[0] for command in given if "/ddpm-p0" in command]
    for finished in ("shapes/adv-p0-s0-seed0/ddpm-50.npz.memorize",
                     "subspace/adv-p0.9-s0.2-lam0.2/ddpm-50.npz.fd-exact"):
        assert (kit.folder / f"runs/quick/{finished}.json").exists()


@pytest.mark.parametrize("how", ["TERM", "TERM to all", "Ctrl-C"])
def test_stopping_ends_what_was_started(kit, how):
    """Catches commands that go on alone, ones that are not given the time to save, ones that are told twice,
    which kills train.py before it has saved, lanes that begin another command, and a stop that looks like an
    end."""
    process = kit.start("quick", "table1", SLOW="--method")
    running = kit.wait_for(2)
    # What goes to all does not reach them too.
    assert all(os.getpgid(int(pid)) != process.pid for pid in running)
    if how == "TERM":
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "FAILED" not in printed
    assert printed.endswith("run_all.sh: stopped; the same command goes on\n"), printed
    lines = kit.given()
    assert lines.count("saved") == 2 and sum(line.startswith("train.py") for line in lines) == 2
    assert not any(line.startswith(("sample.py", "report.py")) for line in lines)
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_output_that_nobody_reads(kit):
    """Catches a run that ends, its work not done, because its reader has left: `| head -1`."""
    process = kit.start("quick", "fig6")
    assert process.stdout.readline().startswith("run_all.sh quick")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (kit.folder / "runs/quick/shapes/ddpm-p0-s0-seed0/ddpm-50.npz.memorize.json").exists()
    assert kit.given()[-1] == "report.py --runs runs/quick"


def test_a_lane_that_is_killed_is_named(kit):
    """Catches exit status 0 where a lane, killed for memory say, has left chains undone."""
    process = kit.start("quick", "fig6", SLOW="--method ddpm")
    kit.wait_for(1)
    os.kill(int(re.search(r"lane: (\d+)", kit.commands.read_text())[1]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "\nstatus 137: a lane of fig6 was killed" in printed, printed
    assert kit.given()[-1] == "report.py --runs runs/quick"


def test_a_folder_that_cannot_be_made(kit):
    """Catches more than a line, and work begun, where runs/ is a file."""
    (kit.folder / "runs").write_text("")
    given, printed, status = kit.run("quick", "fig6")
    assert status == 2 and not given
    assert re.fullmatch("run_all.sh quick.*\nrun_all.sh: error: mkdir: .*\n", printed), printed


@pytest.mark.parametrize("scale, environment, expected", [
    ("day", dict(GPUS="3"), {"0", "1", "2"}), ("paper", dict(GPUS="4", GPUS_PER_MODEL="2"), {"0,1", "2,3"}),
    ("paper", dict(GPUS="2", CUDA_VISIBLE_DEVICES="5,7"), {"5", "7"}), ("paper", dict(GPUS="1"), {"0"}),
    ("paper", dict(GPUS="0"), {""})])
def test_every_chain_has_its_gpus(kit, scale, environment, expected):
    """Catches lanes that share a GPU while another idles, ones beyond what CUDA_VISIBLE_DEVICES allows."""
    environment = dict(CUDA_VISIBLE_DEVICES="", LANES="", SLOW="train.py") | environment
    if environment["CUDA_VISIBLE_DEVICES"] == "":
        del environment["CUDA_VISIBLE_DEVICES"]
    process = kit.start(scale, "table1", **environment)
    kit.wait_for(len(expected))
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    started = re.findall(r"GPUs (.*?): .*train\.py", kit.commands.read_text())
    assert sorted(started) == sorted(expected), printed


def test_the_tests_run_in_two_halves(kit):
    """Catches a test file that no half runs, or both, and a failure of either half that is not the status."""
    (kit.folder / "tests").mkdir()
    for name, text in (("test_a", "def two_process_jobs"), ("test_b", ""), ("test_ab", ""), ("other", "")):
        (kit.folder / "tests" / f"{name}.py").write_text(text)
    (kit.folder / "stubs" / "pytest.py").write_text("")
    for fail, status in (("none", 0), ("-q tests/test_a.py", 137), ("-q test_core.py", 137)):
        assert kit.run("test", FAIL=fail)[2] == status
        words = kit.commands.read_text().split()
        assert sorted(word for word in words if word.endswith(".py")) == [
            "test_core.py", "tests/test_a.py", "tests/test_ab.py", "tests/test_b.py"]


REFUSALS = [
    ("fast", {}, "'fast' is not known; it is: bash run_all.sh"),
    ("quick table9", {}, "'table9' is not a table of quick; they are: pictures fig6"),
    ("list paper theory", {}, "'theory' is not a table of paper"),
    ("paper questions", {}, "'questions' is not a table of paper"),
    ("quick", dict(LANES="x"), "LANES=x: must be a positive number"),
    ("quick", dict(LANES="0"), "LANES=0: must be a positive number"),
    ("quick", dict(LANES="-1"), "LANES=-1: must be a positive number"),
    ("paper", dict(GPUS_PER_MODEL="2.5"), "GPUS_PER_MODEL=2.5: must be a positive number"),
    ("paper", dict(GPUS_PER_MODEL="8", GPUS="2"), "GPUS_PER_MODEL=8: there are 2"),
    ("quick", dict(PYTHON="/my files/python"), "PYTHON='/my files/python': a path without spaces is needed"),
    ("paper", dict(CELEBA="a b.zip"), "CELEBA='a b.zip': a path without spaces is needed"),
    ("quick", dict(PYTHON="/nowhere/python"), "error: /nowhere/python: No such file or directory; req"),
    ("quick", dict(PYTHON="/usr/bin/true"), "/usr/bin/true: this is no Python; requirements.txt"),
    ("quick", dict(STUBS="/nowhere"), "No module named 'numpy'; requirements.txt says what is needed"),
    ("test", {}, "No module named 'pytest'; requirements.txt says what is needed"),
]


@pytest.mark.parametrize("argv, environment, line", REFUSALS)
def test_refusals(kit, argv, environment, line):
    """Catches what would be found only when hours are spent: each is one line, status 2, before any start."""
    given, printed, status = kit.run(*argv.split(), **environment)
    assert status == 2 and not given and not (kit.folder / "runs").exists()
    assert printed.startswith("run_all.sh: error: ") and line in printed and printed.count("\n") == 1


def test_plan_is_every_command_once(kit):
    """Catches a model that two tables count, one that is left out, and one that is missing because it is
    there, which plan.py has to count as done."""
    listed = [command for chain in kit.listed("quick") for command in chain]
    kit.run("quick", "table2")
    _, printed, status = kit.run("plan", "quick", LANES="3")
    assert status == 0 and kit.given() == ["plan.py --devices 3"], printed
    rows = [line.split("\t") for line in (kit.folder / "plan.txt").read_text().splitlines()]
    planned = [re.sub(r"^.*?python (.* )?(?=\w+\.py)", "", command) for _, _, command in rows]
    planned = [command for command in planned if not command.startswith("data.py")]       # begins every chain
    assert len(set(planned)) == len(planned)
    assert set(planned) == {command for command in listed if not command.startswith("data.py")}
    models = {target: table for table, target, command in rows if "train.py" in command}
    assert len(models) > 40 and all("table2" != table or "inv" in target or "0.9-s0.2" in target
                                    for target, table in models.items())


def test_plan_comes_first_on_gpus(kit):
    """Months of work that begin without a word."""
    commands, _, status = kit.run("paper", "table4", GPUS="2")
    assert status == 0 and commands[0] == "plan.py --devices 2" and len(commands) > 8


PLANNED = [                                                 # counted by hand: passes, of which network
    ("train.py --size 8 --method adv --steps 10 --batch 8 --reg-share 0.25 --out r", 10 * 8 * (3 + 5 / 4)),
    ("train.py --size 8 --method ran --steps 10 --batch 8 --out ran", 10 * 8 * 6),
    ("sample.py r --num-samples 10 --steps 100 --out a.npz", 10 * 100),
    ("sample.py r --num-samples 10 --amp --out a.npz", 10 * 1000),
    ("sample.py r --num-samples 10 --sampler heun --out a.npz", 10 * 35),
    # Undisturbed and control run beside; an attacked step costs 2 passes and a gradient of 1 besides.
    ("attack.py r --attack fgsm --steps-attacked 50% --steps 10 --num-samples 3 --out a.npz",
     3 * (30 + 5 * 3)),
    ("attack.py r --attack eot --iters 7 --steps-attacked 1 --steps 10 --num-samples 3 --out a.npz",
     3 * (30 + 8 + 7)),
    ("attack.py r --steps-attacked 0 --steps 10 --num-samples 3 --out a.npz", 30),
    ("train.py --size 8 --method adv --steps 15 --batch 8 --reg-share 0.25 --out r", 5 * 8 * (3 + 5 / 4))]


def test_plan_counts_passes(tmp_path, monkeypatch, capsys):
    """Catches a wrong cost of a method, sampler or attack, a network that is not the command's, work that is
    done counted as left, and a run that two commands train counted as two, or from its beginning."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    lines = [f"one\t{'there' if k == 1 else k}\tpython {command}\n"
             for k, (command, _) in enumerate(PLANNED)]
    work = plan.work_of(["one\tx\tpython fid.py a.npz\n", *lines], torch.device("cpu"))
    assert [each["passes"] for each in work] == [passes for _, passes in PLANNED]
    assert [each["done"] for each in work] == [k == 1 for k in range(len(PLANNED))]
    assert [each["key"][1] for each in work] == ["--amp" in command for command, _ in PLANNED]
    network = unet.UNet(size=8, in_channels=3, learn_sigma=False, scale_shift=True, **unet.PRESETS["small"])
    assert work[0]["bytes"] == 2 * 4 * 4 * sum(p.numel() for p in network.parameters())
    monkeypatch.setattr(plan, "speeds", lambda *_: (1e9, 2e9))      # of arithmetic a second
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    plan.main(["--devices", "2"])
    printed = capsys.readouterr().out
    flops = work[0]["flops"]
    trained, sampled = (sum(own) for own in ([PLANNED[0][1], PLANNED[-1][1]],
                                             [passes for _, passes in PLANNED[2:-1]]))
    hours = (trained * flops / 1e9 + sampled * flops / 2e9) / 3600 / 2
    row = next(line.split() for line in printed.splitlines() if line.startswith("one "))
    assert (row[1], row[2], float(row[5])) == ("1", "1", pytest.approx(hours, abs=0.006))
    with pytest.raises(UserError, match="--no-such-flag"):
        plan.work_of(["one\tx\tpython train.py --no-such-flag 1\n"], torch.device("cpu"))


@pytest.mark.parametrize("seconds, images, amp", [(0.6, 1, True), (0.1, 8, False)])
def test_plan_speed_is_of_all_images(seconds, images, amp, monkeypatch):
    """Catches a speed that forgets the images or the backward pass, batches larger than the command's, and
    another precision than asked for."""
    args = plan.train.arguments("--size 8 --batch 11 --method adv --reg-share 1".split())
    seen, forward = [], unet.UNet.forward

    def counted(self, x, t):
        seen.append(len(x))
        assert torch.is_autocast_enabled("cpu") == amp
        return forward(self, x, t)
    monkeypatch.setattr(unet.UNet, "forward", counted)
    monkeypatch.setattr(plan, "seconds_of", lambda work, device: [work(), seconds][1])
    found = plan.speeds(plan.configured(args), 1e9, 11, amp, common.start_processes(join=False))
    assert found == pytest.approx((3e9 * images / seconds, 1e9 * images / seconds))
    assert max(seen) == seen[-1] == images
