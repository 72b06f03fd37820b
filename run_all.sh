#!/usr/bin/env bash
# Every table and figure of the paper, from nothing but Python 3.10 or newer.
#
#   bash run_all.sh                        quick where there is no GPU, paper where there is one
#   bash run_all.sh quick                  all tables at a small scale whose truth is known, on CPU cores
#   bash run_all.sh paper table1 fig8      some of them, at the paper's scale, on all GPUs of this machine
#   bash run_all.sh dry                    every command of `paper` for two steps on shrunken data and networks
#   bash run_all.sh test                   the tests
#
# Tables: toy fig3 table1 table2 fig6 fig7 fig8 table4 table5 (fig. 4, 5, 12 to 24 come with them); price, the cost of the
# regulariser beyond the paper, only where it is asked for. Every stage is a plain command, printed before it runs. Finished
# stages are skipped, so that a run that was stopped goes on; a stage that fails is reported at the end and the others go on.
# Models are shared by the tables.
#
# PYTHON=python3            this environment as it is, instead of a .venv made here
# LANES=4                   commands at a time (default: quick and dry the cores, at most 8; paper one)
# TRAIN_FLAGS="--amp"       more flags for the tables' trainings
# CELEBA=img_align_celeba.zip LSUN_BEDROOM=... IMAGENET64=... BUTTERFLIES=...      what data.py takes as --src; CIFAR10=...
#                           in place of its download
# NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500     the same command on every machine, on one shared folder, with
#                           the same PYTHON; what is not distributed runs on NODE_RANK 0, and the others wait for it
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "run_all.sh: error: $*" >&2
    exit 2
}

set_up() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    PYTHON=.venv/bin/python
    if cmp -s requirements.txt .venv/installed.txt; then return; fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        fail "python3 is $(python3 --version 2>&1 || echo missing); 3.10 or newer is needed"
    fi
    echo "run_all.sh: making .venv with the packages of requirements.txt"
    if ! python3 -m venv .venv; then
        fail "python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv"
    fi
    "$PYTHON" -m pip install --quiet --requirement requirements.txt
    "$PYTHON" -m pip install --quiet matplotlib || echo "run_all.sh: no matplotlib: tables without figures"
    cp requirements.txt .venv/installed.txt
}

# ---------------------------------------------------------------------------------------------------------- stages

# job PHASE TARGET COMMAND...: to be run in its phase unless TARGET is there or is asked for already.
SEEN="|"
job() {
    local phase=$1 target=$2
    shift 2
    case "$SEEN" in *"|$target|"*) return ;; esac
    SEEN="$SEEN$target|"
    if [ -e "$target" ]; then return; fi
    printf '%s\t%s\n' "$target" "$*" >> "$QUEUE.$phase"
}

# one_job "TARGET<tab>COMMAND": runs it; with several lanes its output goes to a file, and its end is said.
one_job() {
    local target=${1%%$'\t'*} command=${1#*$'\t'} began=$SECONDS log status=0
    echo "\$ $command"
    if [ "${NODE_RANK:-0}" != 0 ] && [[ "$command" != *--nnodes* ]]; then
        until [ -e "$target" ] || [ -e "$target.failed" ]; do sleep 5; done
        return 0
    fi
    if [ "$LANES" = 1 ]; then
        $command &
    else
        log=$(mktemp "$ROOT/logs/XXXXXXXX")
        $command > "$log" 2>&1 &
    fi
    echo $! >> "$QUEUE.running"
    wait $! || status=$?
    if [ "$status" -ge 130 ]; then return 255; fi           # stopped: xargs starts no more
    if [ "$status" != 0 ]; then
        echo "  FAILED, status $status: $command: $(if [ "$LANES" != 1 ]; then tail -n 1 "$log"; fi)"
        echo "$command" >> "$QUEUE.failed"
        if [ -d "$(dirname "$target")" ] && [ "${NNODES:-1}" -gt 1 ]; then touch "$target.failed"; fi
    elif [ "$LANES" != 1 ]; then
        echo "  $((SECONDS - began)) s: $command"
    fi
}
export -f one_job

# What was started is ended, and has saved, before this ends.
stop() {
    trap '' INT TERM
    kill "$XARGS" 2> /dev/null || true
    local pid
    while read -r pid; do
        kill "$pid" 2> /dev/null || true
        while kill -0 "$pid" 2> /dev/null; do sleep 0.2; done
    done < "$QUEUE.running"
    echo "run_all.sh: stopped; the same command goes on" >&2
    exit 130
}

run_phases() {
    local phase data target file found
    for phase in images data train tune sample score; do
        for data in $DATASETS subspace cifar10; do          # one fid.py for all samples of a data set
            if [ $phase = score ] && [ -s "$QUEUE.fid-$data" ]; then
                found=""
                while IFS=$'\t' read -r target file; do
                    if [ -e "$file" ]; then found="$found $file"; fi
                done < "$QUEUE.fid-$data"
                if [ -n "$found" ]; then
                    # shellcheck disable=SC2086
                    printf '%s\t%s\n' "$target" "$HERE_LAUNCH -- fid.py$found --ref $data --data-dir $DATA $(
                        if [ "$data" != subspace ]; then echo "$SCORE"; fi)" >> "$QUEUE.score"
                fi
                rm "$QUEUE.fid-$data"
            fi
        done
        if [ -s "$QUEUE.$phase" ]; then
            tr '\n' '\0' < "$QUEUE.$phase" > "$QUEUE.now"
            : > "$QUEUE.running"
            xargs -0 -n 1 -P "$LANES" "$BASH" -c 'one_job "$1"' _ < "$QUEUE.now" &
            XARGS=$!
            trap stop INT TERM
            wait $XARGS || true
            trap - INT TERM
            rm "$QUEUE.$phase"
        fi
    done
    if [ "${NODE_RANK:-0}" = 0 ]; then
        "$PYTHON" report.py --runs "$ROOT" --out "$RESULTS" || echo "report.py --runs $ROOT" >> "$QUEUE.failed"
    fi
}

# ----------------------------------------------------------------------------------------- what the tables are made of

# run_of DATA METHOD P SIGMA [more]: the folder of a training
run_of() { echo "$ROOT/$1/$2-p$3-s$4${5:+-$5}"; }

# model DATA METHOD P SIGMA NAME [flags]: trains it; NAME tells apart what the flags change ("" for nothing).
model() {
    local data=$1 method=$2 p=$3 sigma=$4 name=$5 out
    out=$(run_of "$data" "$method" "$p" "$sigma" "$name")
    shift 5
    prepare "$data"
    # shellcheck disable=SC2086
    job train "$out/samples-$(printf %08d "$STEPS").png" $LAUNCH train.py --data "$data" $(size "$data") --data-dir "$DATA" \
        --method "$method" --p "$p" --sigma "$sigma" --steps "$STEPS" $TRAIN ${TRAIN_FLAGS:-} "$@" --out "$out"
}

# samples RUN SAMPLER STEPS: samples and their score
samples() {
    # shellcheck disable=SC2086
    job sample "$1/$2-$3.npz" $LAUNCH -- sample.py "$1" --n "$N" --sampler "$2" --steps "$3" $SAMPLE --out "$1/$2-$3.npz"
    score "$(basename "$(dirname "$1")")" "$1/$2-$3.npz"
}

# score DATA SAMPLES: by fid.py, together with all others of the same data set
score() {
    local metric=$METRIC
    if [ "$1" = subspace ]; then metric=fd-exact; fi
    job "fid-$1" "$2.$metric.json" "$2"
}

# pair DATA P SIGMA: ddpm and adv, sampled with all steps of DDPM and with DDIM, for every seed
pair() {
    local seed method
    for seed in $SEEDS; do
        for method in ddpm adv; do
            model "$1" $method "$2" "$3" "seed$seed" --seed "$seed"
            samples "$(run_of "$1" $method "$2" "$3" "seed$seed")" ddpm "$FULL"
            samples "$(run_of "$1" $method "$2" "$3" "seed$seed")" ddim "$DDIM"
        done
    done
}

# one DATA METHOD P SIGMA NAME [flags]: a model and its samples, once
one() {
    model "$@"
    samples "$(run_of "$1" "$2" "$3" "$4" "$5")" ddpm "$FULL"
}

# prepare DATA ["--size N"]: CELEBA=img_align_celeba.zip and so on say where data.py finds what it cannot download.
prepare() {
    local name=$1 phase=data source size
    size=${2:-$(size "$name")}
    case "$name" in
        subspace)
            source="--images $SUBSPACE_IMAGES"
            if [ "$SUBSPACE_IMAGES" != shapes ]; then prepare "$SUBSPACE_IMAGES"; fi ;;
        *)
            phase=images
            source=$(echo "$name" | tr '[:lower:]' '[:upper:]')
            source=${!source:+--src ${!source}} ;;
    esac
    # shellcheck disable=SC2086
    job $phase "$DATA/$name-${size#--size }.npy" "$PYTHON" data.py "$name" $size --out "$DATA" $source
}

size() {
    case "$SCALE-$1" in
        dry-*) echo --size 16 ;;
        *-cifar10) echo --size 32 ;; *-celeba | *-imagenet64) echo --size 64 ;; *-lsun_bedroom) echo --size 256 ;;
        *) echo "--size $SUBSPACE" ;;
    esac
}

# ---------------------------------------------------------------------------------------------------------- the tables

toy() {
    # shellcheck disable=SC2086
    job train "$ROOT/toy3d/toy3d.json" "$PYTHON" toy3d.py $TOY --out "$ROOT/toy3d"
    local sweep
    for sweep in lam omega; do
        # shellcheck disable=SC2086
        job train "$ROOT/toy3d/toy3d-$sweep.json" "$PYTHON" toy3d.py --sweep $sweep $TOY_SWEEP --out "$ROOT/toy3d"
    done
}

fig3() {
    local noise seed
    for noise in "0 0" "0.9 0.1"; do
        for seed in $SEEDS; do
            for method in ddpm ran adv; do
                # shellcheck disable=SC2086
                one subspace $method $noise "seed$seed" --seed "$seed"
            done
        done
        # shellcheck disable=SC2086
        one subspace inv $noise lam0.3 --lam 0.3
        # shellcheck disable=SC2086
        one subspace inv $noise lam0.03 --lam 0.03
    done
}

table1_top() {
    local sigma method seed
    for sigma in 0.1 0.2; do
        for method in ran adv; do
            for seed in $SEEDS; do one "$MAIN" $method 0.9 $sigma "seed$seed" --seed "$seed"; done
        done
    done
}

table1() {
    local method steps
    table1_top
    for method in ddpm adv; do
        model "$MAIN" $method 0 0 seed0 --seed 0
        for steps in 300 500 1000; do samples "$(run_of "$MAIN" $method 0 0 seed0)" ddpm $steps; done
    done
}

table2() {
    local data noise
    for data in $DATASETS; do
        for noise in "0 0" "0.9 0.1" "0.9 0.2"; do
            # shellcheck disable=SC2086
            if [ "$data $noise" != "imagenet64 0 0" ]; then pair "$data" $noise; fi
        done
    done
    one "$MAIN" inv 0 0 lam0.3 --lam 0.3
}

fig6() {
    local method run
    for method in ddpm adv; do
        one "$MAIN" $method 0 0 seed0 --seed 0
        run=$(run_of "$MAIN" $method 0 0 seed0)
        # shellcheck disable=SC2046,SC2086
        job score "$run/ddpm-$FULL.npz.memorize.json" "$PYTHON" memorize.py "$run/ddpm-$FULL.npz" --data "$MAIN" \
            $(size "$MAIN") --data-dir "$DATA" $MEMORIZE
    done
}

fig7() {
    local lam sigma p
    for sigma in $FIG7_SIGMAS; do
        p=$(if [ "$sigma" = 0 ]; then echo 0; else echo 0.9; fi)
        for lam in 0.1 0.2; do one "$FIG7" adv "$p" "$sigma" lam$lam --lam $lam; done
        one "$FIG7" adv "$p" "$sigma" seed0 --seed 0
    done
}

fig8() {
    local method attack percent run name
    for method in ddpm adv; do
        one "$MAIN" $method 0 0 seed0 --seed 0
        run=$(run_of "$MAIN" $method 0 0 seed0)
        # shellcheck disable=SC2086
        job sample "$run/none.attack.json" $LAUNCH -- attack.py "$run" --steps-attacked 0 --n "$N_ATTACK" --steps "$ATTACK_STEPS" \
            $SAMPLE --out "$run/none.npz"
        score "$MAIN" "$run/none.npz"
        for attack in fgsm pgd eot noise drift; do
            for percent in 25 50 75 100; do
                name=$attack-$percent
                # shellcheck disable=SC2086
                job sample "$run/$name.attack.json" $LAUNCH -- attack.py "$run" --attack $attack --steps-attacked $percent% \
                    --n "$N_ATTACK" --steps "$ATTACK_STEPS" $SAMPLE $ATTACK --out "$run/$name.npz"
                score "$MAIN" "$run/$name.npz"
            done
        done
    done
}

table4() {
    local sigma from out
    for sigma in 0.1 0.2; do
        pair "$TABLE4" 0.9 $sigma
        from=$(run_of "$TABLE4" ddpm 0.9 $sigma before-tuning)
        STEPS=$((STEPS - TUNE)) model "$TABLE4" ddpm 0.9 $sigma before-tuning
        out=$(run_of "$TABLE4" adv 0.9 $sigma fine-tuned)
        # shellcheck disable=SC2046,SC2086
        job tune "$out/samples-$(printf %08d "$TUNE").png" $LAUNCH train.py --data "$TABLE4" $(size "$TABLE4") --data-dir "$DATA" \
            --method adv --p 0.9 --sigma $sigma --init "$from" --steps "$TUNE" $TRAIN ${TRAIN_FLAGS:-} --out "$out"
        samples "$out" ddpm "$FULL"
    done
}

table5() {
    local noise flags
    for noise in "0 0" "0.9 0.1" "0.9 0.2"; do
        for flags in oracle conf1 conf2; do
            # shellcheck disable=SC2086
            one "$MAIN" ambient $noise $flags --flags $flags
        done
        # shellcheck disable=SC2086
        pair "$MAIN" $noise
    done
}

# Beyond the paper: the regulariser on a share of the batch, with and without --balance, on 3-D data, on 8x8 subspace data
# and on real images, where a step is arithmetic and not overhead. CIFAR-10 is downloaded, or CIFAR10=... says where it is.
price() {
    local data balance seed share
    for data in "" "--data 3-gaussians"; do
        for balance in "" --balance; do
            # shellcheck disable=SC2086
            job train "$ROOT/toy3d/toy3d-reg-share${data:+-3-gaussians}${balance:+-balance}.json" "$PYTHON" toy3d.py \
                --sweep reg-share $data $balance --out "$ROOT/toy3d"
        done
    done
    for seed in 0 1 2; do
        price_of subspace $seed ddpm --method ddpm
        for share in 1 0.25 0.125; do price_of subspace $seed share$share-balance --method adv --reg-share $share --balance; done
    done
    for seed in 0 1; do
        price_of cifar10 $seed ddpm --method ddpm
        for share in 1 0.25 0.125; do price_of cifar10 $seed share$share-balance --method adv --reg-share $share --balance; done
    done
    for data in subspace cifar10; do
        for share in 0.5 0.0625; do price_of $data 0 share$share-balance --method adv --reg-share $share --balance; done
        price_of $data 0 share1 --method adv
    done
    price_of subspace 0 share0.25 --method adv --reg-share 0.25
}

# price_of DATA SEED NAME [flags]: a model, its samples, and how far FGSM throws them
price_of() {
    local data=$1 seed=$2 run="$ROOT/limits/$1/$3-seed$2" size=8 steps=1000 some=64 n=100 train
    shift 3
    train="--mult 1,1 --batch 64 --lr 1e-3 --ema 0.99"
    if [ "$data" = cifar10 ]; then
        size=16 steps=400 some=32 n=50 train="--mult 1,2 --attn 8 --batch 32 --lr 2e-3 --ema 0.98"
    fi
    prepare "$data" "--size $size"
    # shellcheck disable=SC2086
    job train "$run/samples-$(printf %08d $steps).png" "$PYTHON" train.py --data "$data" --size $size --data-dir "$DATA" --p 0.9 \
        --sigma 0.2 --steps $steps --preset small $train --seed "$seed" "$@" --out "$run"
    job sample "$run/ddpm-$n.npz" "$PYTHON" sample.py "$run" --n 256 --steps $n --batch 256 --out "$run/ddpm-$n.npz"
    job sample "$run/fgsm-$n.attack.json" "$PYTHON" attack.py "$run" --steps-attacked 100% --n $some --steps $n --out "$run/fgsm-$n.npz"
    score "$data" "$run/ddpm-$n.npz"
    score "$data" "$run/fgsm-$n.npz"                        # report.py learns from it what was attacked
}

# ----------------------------------------------------------------------------------------------------------- the scales

quick() {
    ROOT=runs/quick RESULTS=results DATA=data
    LANES=${LANES:-$(cores)}
    LAUNCH=$PYTHON HERE_LAUNCH=$PYTHON
    MAIN=subspace DATASETS=subspace FIG7=subspace FIG7_SIGMAS=0.2 TABLE4=subspace SUBSPACE=4 SUBSPACE_IMAGES=shapes
    SEEDS="0 1 2" TOY="" TOY_SWEEP="--seeds 1" STEPS=600 TUNE=150 FULL=100 DDIM=50 N=256 N_ATTACK=128 ATTACK_STEPS=48 METRIC=fd-pixels
    # So short a training needs --balance: without it high noise levels are not learnt yet, and FD-exact is ten times as large.
    TRAIN="--preset small --mult 1 --batch 32 --lr 2e-3 --ema 0.99 --balance --sample-every 150"
    SAMPLE="--batch 256" SCORE="--features pixels" ATTACK="--iters 5 --eot 2" MEMORIZE="--features pixels"
    ABOUT="4x4 subspace data, $STEPS steps a model: about 30 minutes on two slow cores, price two hours more"
}

paper() {
    ROOT=runs/paper RESULTS=results-paper DATA=data
    LANES=${LANES:-1}
    MAIN=cifar10 DATASETS="cifar10 celeba lsun_bedroom imagenet64" FIG7=lsun_bedroom FIG7_SIGMAS="0 0.1 0.2" TABLE4=celeba
    SUBSPACE=32 SUBSPACE_IMAGES=butterflies
    SEEDS=0 TOY="" TOY_SWEEP="" STEPS=500000 TUNE=158300 FULL=1000 DDIM=250 N=50000 N_ATTACK=50000 ATTACK_STEPS=1000 METRIC=fid
    TRAIN="--sample-every 50000" SAMPLE="--batch 500" SCORE="" ATTACK="" MEMORIZE=""
    local gpus launch
    gpus=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    PROCESSES=$((gpus * ${NNODES:-1}))
    launch="$PYTHON -m torch.distributed.run --nproc_per_node $gpus"
    HERE_LAUNCH=$PYTHON
    if [ "$gpus" -gt 1 ]; then HERE_LAUNCH="$launch --standalone"; fi
    LAUNCH=$HERE_LAUNCH
    if [ "${NNODES:-1}" -gt 1 ]; then
        LAUNCH="$launch --nnodes $NNODES --node_rank ${NODE_RANK:?is needed with NNODES: 0, 1, ...} \
            --master_addr ${MASTER_ADDR:?is needed with NNODES: the machine of NODE_RANK 0} --master_port ${MASTER_PORT:-29500}"
    fi
    ABOUT="$STEPS steps a model on $PROCESSES process(es): every training prints its own estimate in its first minute"
    if [ "$SCALE" = paper ] && [ $((128 % PROCESSES)) != 0 ]; then
        fail "$PROCESSES GPUs do not divide the batch of 128; choose some with CUDA_VISIBLE_DEVICES"
    fi
}

# The paper's commands with what makes them short appended: the last of two equal flags counts.
dry() {
    LANES=${LANES:-$(cores)}
    paper
    ROOT=runs/dry RESULTS=results-dry DATA=runs/dry/data
    rm -rf $ROOT
    STEPS=2 TUNE=1 N=2 N_ATTACK=2 METRIC=fd-pixels SUBSPACE=16 TOY="--steps 2 --seeds 1 --n 64" TOY_SWEEP="--steps 2 --seeds 1 --n 64"
    TRAIN="--sample-every 50000 --channels 32 --res-blocks 1 --mult 1,1 --attn 8 --heads 2 --batch $((4 * PROCESSES)) --timesteps 25"
    SAMPLE="--batch 500 --steps 2" SCORE="--features pixels" MEMORIZE="--features pixels" ATTACK="--iters 2 --eot 2"
    ABOUT="two steps a model"
    # Shapes stand in for the data sets, which no script can download.
    "$PYTHON" data.py shapes --n 64 --size 160 --out $ROOT/shapes
    "$PYTHON" - $ROOT/shapes/shapes-160.npy $ROOT/images <<'PYTHON'
import pathlib, sys, numpy, PIL.Image
folder = pathlib.Path(sys.argv[2])
folder.mkdir()
for k, image in enumerate(numpy.load(sys.argv[1])):
    PIL.Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{k:02d}.png")
PYTHON
    export CIFAR10=$ROOT/images CELEBA=$ROOT/images LSUN_BEDROOM=$ROOT/images IMAGENET64=$ROOT/images BUTTERFLIES=$ROOT/images
}

cores() {
    local count
    count=$(getconf _NPROCESSORS_ONLN)
    echo $((count < 8 ? count : 8))
}

reproduce() {
    local began=$SECONDS table
    if [ "$LANES" -gt 1 ]; then export OMP_NUM_THREADS=1; fi
    export ROOT LANES
    mkdir -p "$ROOT/logs"
    QUEUE=$(mktemp -d)/queue
    export QUEUE
    trap 'rm -rf "$(dirname "$QUEUE")"' EXIT
    echo "run_all.sh $SCALE: ${*}; $ABOUT. $LANES at a time, runs in $ROOT, tables in $RESULTS/README.md"
    if [ "$SCALE $*" = "quick $ALL" ]; then                 # a first table soon
        SEEDS=0 table1_top
        run_phases
    fi
    for table in "$@"; do "$table"; done
    run_phases
    echo
    echo "done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s: $RESULTS/README.md"
    if [ -s "$QUEUE.failed" ]; then
        echo "These stages failed; what they would have made is a dash in the tables:"
        sed 's/^/  /' "$QUEUE.failed"
        exit 1
    fi
}

SCALE=${1:-}
ALL="table1 toy table2 fig3 fig6 fig7 fig8 table4 table5"
case "$SCALE" in
    "" | quick | paper | dry | test) ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' run_all.sh; exit ;;
    *) fail "'$SCALE' is not known; it is: bash run_all.sh [quick|paper|dry|test] [$ALL price]" ;;
esac
for table in "${@:2}"; do
    case " $ALL $(if [ "$SCALE" = quick ]; then echo price; fi) " in
        *" $table "*) ;;
        *) fail "'$table' is not a table of $SCALE; they are: $ALL, and quick's price" ;;
    esac
done
for path in "${PYTHON:-}" "${CIFAR10:-}" "${CELEBA:-}" "${LSUN_BEDROOM:-}" "${IMAGENET64:-}" "${BUTTERFLIES:-}"; do
    case "$path" in *[[:space:]]*) fail "'$path': a path without spaces is needed" ;; esac
done
set_up
if [ -z "$SCALE" ]; then
    SCALE=$("$PYTHON" -c 'import torch; print("paper" if torch.cuda.is_available() else "quick")')
fi
if [ "$SCALE" = test ]; then exec "$PYTHON" -m pytest -q test_core.py; fi
"$SCALE"
if [ $# -gt 1 ]; then
    reproduce "${@:2}"
else
    # shellcheck disable=SC2086
    reproduce $ALL
fi
