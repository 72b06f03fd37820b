#!/usr/bin/env bash
# Every table and figure of the paper, from nothing but Python 3.10 or newer.
#
#   bash run_all.sh                        quick where there is no GPU, paper where there is one
#   bash run_all.sh quick                  all tables at a small scale whose truth is known, on CPU cores
#   bash run_all.sh day                    CIFAR-10's tables in a day of one GPU: short trainings, Heun's samples
#   bash run_all.sh paper table1 fig8      some of them, at the paper's scale, on all GPUs of this machine
#   bash run_all.sh plan paper table1      what is left to do, and how many hours of this machine it takes
#   bash run_all.sh list paper table1      the same, one model a line, for a cluster or GNU parallel
#   bash run_all.sh dry                    every command of paper and day for two steps on shrunken data and networks
#   bash run_all.sh test                   the tests
#
# Tables: pictures cost toy fig3 table1 table2 fig6 fig7 fig8 table4 table5 (fig. 4, 5, 12 to 24 come with them). They
# are made one after another, the cheapest first, each followed by report.py. Beyond the paper, only where asked for:
#   evaluations               quality against what a sampler costs
#   theory                    (of quick alone, as all below) trained networks beside their closed form
#   speed                     seconds of training to a quality
#   real                      CIFAR-10 at 16x16
#   question1 ... question8   what the paper's readers asked (questions: all eight)
#
# The commands of one model are a chain; chains run side by side. What is there already is skipped: a run that was
# stopped goes on. A command that fails ends its chain alone.
#
# PYTHON=python3            this environment as it is, instead of a .venv made here
# LANES=4                   chains at a time (default: paper and day one a GPU; quick and dry the cores, at most 8)
# GPUS_PER_MODEL=8          GPUs for one chain, by torchrun (default 1)
# TRAIN_FLAGS="--amp"       more flags for every training
# CELEBA=img_align_celeba.zip LSUN_BEDROOM=... IMAGENET64=... BUTTERFLIES=... CIFAR10=...      data.py's --src

# shellcheck disable=SC2046,SC2086,SC2329                   # words of flags; functions called by name
set -euo pipefail
cd "$(dirname "$0")"

# ------------------------------------------------------------------------------------------------- the scales

quick() {
    TABLES="pictures fig6 cost toy fig3 table1 table2 fig7 table5 table4 fig8"
    QUESTIONS="question8 question6 question4 question5 question7 question3 question2 question1"
    BEYOND="evaluations theory speed real $QUESTIONS" ROOT=runs/quick DATA=data
    MAIN=subspace DATASETS=subspace FIG7=subspace FIG7_NOISES="0.9:0.2" TABLE4=subspace
    SUBSPACE_IMAGES=shapes SIZE=8 FEW=256 SHAPES=""
    SEEDS="0 1 2" STEPS=250 TUNE=80 FULL="ddpm 50" DDIM=25 N=400 N_FEWER=100 N_ATTACK=64 ATTACK_STEPS=24
    # The paper's loss and samplers; not its network and weighting, which need 50 times as many steps (beyond.py).
    TRAIN="--preset small --mult 1,1 --batch 64 --lr 2e-3 --ema 0.98 --precondition --weighting edm"
    REGULARISED="--reg-share 0.25"
    SAMPLE="--batch 200" ATTACK="--iters 3 --eot 2" FEATURES="--features pixels" METRIC=fd-pixels
    TOY="" TOY_SWEEP="--seeds 1" LARGE_TRAIN="" LARGE_SAMPLE=""
    ABOUT="Small images, $STEPS steps a model: under an hour on two slow cores, the first picture in five minutes"
}

paper() {
    TABLES="cost toy fig3 fig6 table1 table5 table4 table2 fig7 fig8" BEYOND=evaluations ROOT=runs/paper DATA=data
    MAIN=cifar10 DATASETS="cifar10 celeba lsun_bedroom imagenet64" FIG7=lsun_bedroom
    FIG7_NOISES="0:0 0.9:0.1 0.9:0.2" TABLE4=celeba SUBSPACE_IMAGES=butterflies SIZE="" FEW="" SHAPES=""
    SEEDS=0 STEPS=500000 TUNE=158300 FULL="ddpm 1000" DDIM=250 N=50000 N_FEWER=50000 N_ATTACK=50000
    ATTACK_STEPS=1000
    TRAIN="--sample-every 50000" REGULARISED="" SAMPLE="--batch 500" ATTACK="" FEATURES="" METRIC=fid
    TOY="" TOY_SWEEP=""
    LARGE_TRAIN="--microbatch 4" LARGE_SAMPLE="--batch 64"  # 256x256 images do not fit a GPU of 80 GB otherwise
    ABOUT="$STEPS steps a model: every training shows the time that it needs"
}

# One GPU, one day. The training is beyond.py's, which needs far fewer steps; the learning rate that of Ho et al.
# (2020), the average over the last 1000 steps. The samples are Heun's, but for Table 1's fewer steps and for the
# attacks, which need DDPM's noise: on 20 of its steps, by 3 iterations, a quarter of the day's work all the same.
# STEPS: by plan.py's count all is 4.9e18 operations, 21.9 hours at 62 TFLOP/s, 20 % of an A100's bf16 peak or 6 % of
# an H100's; the rest is for the scores. That rate is assumed, not measured: `plan day` measures it.
day() {
    paper
    TABLES="fig6 table1 table5 table2 fig8" BEYOND="" ROOT=runs/day DATASETS=cifar10
    STEPS=24000 FULL="heun 18" DDIM=50 N=10000 N_FEWER=10000 N_ATTACK=10000 ATTACK_STEPS=20
    TRAIN="--sample-every 4000 --lr 2e-4 --ema 0.999 --precondition --weighting edm --amp"
    REGULARISED="--reg-share 0.25" SAMPLE="--batch 500 --amp" ATTACK="--iters 3 --eot 2"
    ABOUT="CIFAR-10, $STEPS steps a model: a day of one GPU"
}

dry() {
    paper
    TABLES="$TABLES dry_day"
    shorten
}

# What makes commands short is appended to theirs: the last of two equal flags counts.
shorten() {
    ROOT=runs/dry DATA=runs/dry/data SIZE=16 STEPS=2 TUNE=1 N=2 N_FEWER=2 N_ATTACK=2
    TRAIN="$TRAIN --channels 32 --res-blocks 1 --mult 1,1 --attn 8 --heads 2 --timesteps 25"
    TRAIN="$TRAIN --batch $((4 * GPUS_PER_MODEL))" SAMPLE="$SAMPLE --steps 2" LARGE_SAMPLE="$LARGE_SAMPLE --steps 2"
    ATTACK="$ATTACK --iters 2 --eot 2"
    FEATURES="--features pixels" METRIC=fd-pixels TOY="--steps 2 --seeds 1 --num-samples 64" TOY_SWEEP=$TOY
    ABOUT="two steps a model"
    export CIFAR10=$ROOT/images CELEBA=$ROOT/images LSUN_BEDROOM=$ROOT/images IMAGENET64=$ROOT/images
    export BUTTERFLIES=$ROOT/images
}

# ------------------------------------------------------------------------------------------------- the tables

# What the method does, to be seen, the first thing that quick makes: noisy images, and those of two models.
pictures() {
    local method
    SIZE=16 STEPS=400 FULL="ddpm 100" N=200
    TRAIN="--preset small --batch 32 --lr 2e-3 --ema 0.99 --precondition --weighting edm --sample-every 100"
    for method in ddpm adv; do one shapes $method 0.9 0.2 seed0 --seed 0; done
}

# A step of ddpm, ran and adv: a table of its own, so that nothing else runs meanwhile.
cost() { REGULARISED="" training "$MAIN" adv 0 0 cost; benchmark; }

toy() {
    toy3d toy3d $TOY
    toy3d toy3d-lam --sweep lam $TOY_SWEEP
    toy3d toy3d-omega --sweep omega $TOY_SWEEP
}

fig3() {
    for noise in "0 0" "0.9 0.1"; do
        for method in ddpm ran adv; do seeds subspace $method $noise; done
        for lam in 0.3 0.03; do one subspace inv $noise lam$lam --lam $lam; done
    done
}

table1() {
    for sigma in 0.1 0.2; do
        for method in ran adv; do seeds "$MAIN" $method 0.9 $sigma; done
    done
    for method in ddpm adv; do
        model "$MAIN" $method 0 0 seed0 --seed 0
        for steps in 300 500 1000; do N=$N_FEWER samples ddpm $steps; done
        judge
    done
}

table2() {
    for data in $DATASETS; do
        for noise in "0 0" "0.9 0.1" "0.9 0.2"; do
            if [ "$data $noise" != "imagenet64 0 0" ]; then pair "$data" $noise; fi
        done
    done
    one "$MAIN" inv 0 0 lam0.3 --lam 0.3
}

# In quick of so few images, and trained so long, that DDPM repeats them.
fig6() {
    local method
    if [ "$FEW" ]; then MAIN=shapes SHAPES=$FEW DATA=$ROOT/$FEW-images STEPS=1200; fi
    for method in ddpm adv; do
        one "$MAIN" $method 0 0 seed0 --seed 0
        stage "$RUN/${FULL/ /-}.npz.memorize.json" "$PYTHON" memorize.py "$RUN/${FULL/ /-}.npz" \
            --data "$MAIN" --data-dir "$DATA" $FEATURES
    done
}

fig7() {
    for noise in $FIG7_NOISES; do
        for lam in 0.1 0.2; do one "$FIG7" adv ${noise/:/ } lam$lam --lam $lam; done
        one "$FIG7" adv ${noise/:/ } seed0 --seed 0         # lambda 0.3
    done
}

fig8() {
    for method in ddpm adv; do
        model "$MAIN" $method 0 0 seed0 --seed 0
        samples $FULL
        attacked fgsm 0
        for attack in fgsm pgd "pgd --as-printed" eot "eot --as-printed" noise drift; do
            for percent in 25 50 75 100; do attacked "$attack" $percent; done
        done
        judge
    done
}

table4() {
    for sigma in 0.1 0.2; do
        pair "$TABLE4" 0.9 $sigma
        STEPS=$((STEPS - TUNE)) model "$TABLE4" ddpm 0.9 $sigma before-tuning
        STEPS=$TUNE AFTER=$RUN one "$TABLE4" adv 0.9 $sigma fine-tuned --init "$RUN"
    done
}

table5() {
    for noise in "0 0" "0.9 0.1" "0.9 0.2"; do
        for flags in oracle conf1 conf2; do one "$MAIN" ambient $noise $flags --flags $flags; done
        pair "$MAIN" $noise
    done
}

# In dry: the commands of `day`, as short, in a folder of their own.
dry_day() {
    local table
    day
    shorten
    ROOT=$ROOT/day
    for table in $TABLES; do "$table"; done
}

# Beyond the paper: quality against the evaluations that a sampler takes.
evaluations() {
    local method steps
    for method in ddpm adv; do
        model "$MAIN" $method 0.9 0.2 seed0 --seed 0
        for steps in 25 50 100 250; do samples ddpm $steps; done
        for steps in 10 25 50 100 250; do samples ddim $steps; done
        for steps in 5 9 18 36; do samples heun $steps; done
        judge
    done
}

# Beyond the paper: what gaussian.py predicts, measured on networks that are trained towards it.
theory() {
    local seed noise
    ROOT=runs/theory REPORT="--tables optimum" STEPS=600 N=1000 TRAIN="$TRAIN --ema 0.99"
    for seed in $SEEDS; do
        for noise in "0.9 0.2" "1 0.2" "0 0"; do predictable "$noise" "seed$seed" --seed "$seed"; done
    done
    STEPS=2400                                              # nearer to the optimum, of one seed
    for noise in "0.9 0.2" "0 0"; do predictable "$noise" seed0-long --seed 0; done
}

predictable() {                                             # NOISE NAME [flags]
    theoretical ddpm "$1" "ddpm-$2" "${@:3}"
    theoretical adv "$1" "omega2-$2" "${@:3}"
    theoretical adv "$1" "omega8-$2" "${@:3}" --omega 8
    theoretical ran "$1" "lam0.762-$2" "${@:3}" --lam 0.762                 # of random delta, 2.54 times as much
}

theoretical() {                                             # METHOD NOISE NAME [flags]
    model subspace "$1" $2 "${@:3}"
    samples ddpm 100
    samples heun 18
    judge
}

# Beyond the paper: real images become clean, and what omega does to them. CIFAR10=..., or a download.
real() {
    local noise omega
    ROOT=runs/real REPORT="--tables real" SIZE=16 STEPS=800 FULL="heun 18" N=1000
    TRAIN="--preset small --batch 64 --lr 1e-3 --ema 0.995 --precondition --weighting edm"
    for noise in "0.9 0.2" "0 0"; do
        one cifar10 ddpm $noise seed0 --seed 0
        for omega in 2 8; do one cifar10 adv $noise "omega$omega-seed0" --seed 0 --omega $omega; done
    done
}

# Beyond the paper: seconds of training against the distance, as the training is made quicker step by step.
speed() {
    local seed all="--preset small --mult 1,1 --batch 64 --lr 2e-3 --ema 0.99"
    ROOT=runs/speed REPORT="--tables speed" N=500 REGULARISED=""
    for seed in $SEEDS; do
        for method in ddpm adv; do
            TRAIN=$all; along "$method" "$seed" paper
            TRAIN="$TRAIN --precondition"; along "$method" "$seed" preconditioned
            TRAIN="$TRAIN --weighting edm"; along "$method" "$seed" edm
        done
        along adv "$seed" edm-share0.25 --reg-share 0.25
    done
}

along() {                                                   # METHOD SEED NAME [flags]
    local steps
    for steps in 100 200 400 800; do
        STEPS=$steps model subspace "$1" 0.9 0.2 "$3-seed$2" --seed "$2" "${@:4}"
        sampled "heun-18-step$steps" "heun-18-step$steps.npz" sample.py --sampler heun --steps 18 --num-samples "$N"
        judge
    done
    benchmark
}

# ------------------------------------------------------------ what the paper's readers asked, beyond the paper

# asking: the scale of all eight; their models of equal flags are the same ones.
asking() {
    ROOT=runs/questions REPORT="--tables questions" STEPS=250 FULL="heun 18" N=500 N_ATTACK=64
    TRAIN="$TRAIN --ema 0.99" RAN="ran --omega 2 --lam 0.762" ADV="adv --omega 2 --lam 0.3"     # alike at the optimum
}

# asked DATA "P SIGMA" SEED METHOD [flags]: a model, named by its flags, its samples and their score
asked() {
    local name="${*:5} --steps $STEPS --seed $3"
    name=${name//--/}
    name=${name# }
    one "$1" "$4" $2 "${name// /-}" --seed "$3" "${@:5}"
}

# Compute-matched against noise-aware training. Of p 1, conf1 (all called clean) is ddpm, conf2 the truth.
question1() {
    local seed noise p method flags
    asking
    for seed in $SEEDS; do
        for noise in {0.3,0.6,0.9,1}" "{0.05,0.1,0.2}; do
            p=${noise% *}
            for method in ddpm "$RAN" "$ADV"; do asked subspace "$noise" $seed $method; done
            STEPS=$(equal_compute) asked subspace "$noise" $seed $ADV
            for flags in oracle $(if [ $p != 1 ]; then echo conf1 conf2; fi); do
                asked subspace "$noise" $seed ambient --flags $flags
            done
        done
    done
}

# The steps of adv, with the regulariser on a quarter of the batch, that cost what STEPS of ddpm do: a step costs 1.8.
equal_compute() { echo $((STEPS * 5 / 9)); }

# The penalty on clean data: lambda and omega.
question2() {
    local noise seed method lam omega
    asking
    for noise in "0 0" "1 0.2"; do
        for seed in $SEEDS; do
            for method in ddpm "$RAN" "$ADV" "adv --omega 8 --lam 0.3"; do asked subspace "$noise" $seed $method; done
        done
        for lam in 0.08 0.16 0.3 0.6; do asked subspace "$noise" 0 adv --omega 1 --lam $lam; done
        for lam in 0.15 0.6 1.2; do asked subspace "$noise" 0 adv --omega 2 --lam $lam; done
        for lam in 0.381 1.524 3.048; do asked subspace "$noise" 0 ran --omega 2 --lam $lam; done
        for omega in 4 8; do
            for lam in 0.15 0.3 0.6 1.2; do asked subspace "$noise" 0 adv --omega $omega --lam $lam; done
        done
    done
}

# What gaussian.py advises for noise of 0.1 and of 0.2, rounded: it differs by 15 % between the sets. CIFAR10=...: too.
question3() {
    local seed data
    asking
    for seed in $SEEDS; do
        for data in subspace shapes; do advised $data $seed; done
    done
    if [ "${CIFAR10:-}" ]; then SIZE=16 advised cifar10 0; fi
}

advised() {                                                 # DATA SEED
    asked "$1" "0 0" "$2" ddpm
    asked "$1" "1 0.1" "$2" ddpm
    asked "$1" "1 0.1" "$2" adv --omega 8 --lam 0.1
    asked "$1" "1 0.2" "$2" ddpm
    asked "$1" "1 0.2" "$2" adv --omega 8 --lam 0.3
}

# Random against adversarial perturbations, by what they cost.
question4() {
    local steps seed method lam
    asking
    cost_of subspace 8 64 "small --mult 1,1" 0.25
    for steps in $((STEPS / 4)) $(equal_compute) $STEPS; do
        for seed in $SEEDS; do
            for method in "$RAN" "$ADV"; do STEPS=$steps asked subspace "1 0.2" $seed $method; done
        done
        for lam in 0.15 0.6; do STEPS=$steps asked subspace "1 0.2" 0 adv --omega 2 --lam $lam; done
        for lam in 0.381 1.524; do STEPS=$steps asked subspace "1 0.2" 0 ran --omega 2 --lam $lam; done
    done
}

# Other corruptions, of about the same mean square.
question5() {
    local seed method
    asking
    for seed in $SEEDS; do
        for method in ddpm "$ADV"; do
            asked subspace "0 0" $seed $method
            asked subspace "0.9 0.2" $seed $method
            asked subspace "0.9 0.03" $seed $method --corruption impulse
            asked subspace "0.1 0" $seed $method --corruption outliers
            asked subspace "0.9 0.1" $seed $method --corruption blur
        done
    done
}

# The method on EDM: its weighting or the paper's, its sampler or the paper's, at as many evaluations.
question6() {
    local seed method weighting
    asking
    for seed in $SEEDS; do
        for method in ddpm "$RAN" "$ADV"; do
            for weighting in "" "--weighting paper"; do
                asked subspace "0.6 0.1" $seed $method $weighting
                samples ddpm 35
                judge
            done
        done
    done
}

# Stronger attacks, their budget swept.
question7() {
    local seed noise method scale
    asking
    for seed in $SEEDS; do
        for noise in "0 0" "0.9 0.2"; do
            for method in ddpm "$RAN" "$ADV"; do
                asked subspace "$noise" $seed $method
                attacked_by drift-0 --attack drift --steps-attacked 0% --steps 24
                attacked_by trajectory-0 --attack trajectory --sampler heun --steps 18 --steps-attacked 0%
                for scale in 0.1 0.25 0.5 1; do
                    attacked_by drift-$scale --attack drift --steps-attacked 100% --steps 24 --eps-scale $scale
                done
                for scale in 0.25 1; do
                    attacked_by trajectory-$scale --attack trajectory --iters 5 --eps-scale $scale \
                        --sampler heun --steps 18 --steps-attacked 1 --where first
                done
                judge
            done
        done
    done
}

# Overhead in time and memory, of the networks that fit.
question8() {
    local share
    asking
    for share in 0.25 1; do
        cost_of subspace 8 64 "small --mult 1,1" $share
        cost_of shapes 16 32 small $share
        cost_of shapes 32 8 cifar10 $share
    done
}

# cost_of DATA SIZE BATCH PRESET SHARE: all in one chain, so that none disturbs another
cost_of() {
    local TRAIN="--batch $3 --preset $4 --precondition --weighting edm" REGULARISED="--reg-share $5"
    SIZE=$2 AFTER=$ROOT/costs training "$1" adv 0 0 "cost-$2-$5"
    benchmark
}

# -------------------------------------------------------------------------------- what the tables are made of

# training DATA METHOD P SIGMA NAME [flags]: begins a chain, or goes on with that of the run AFTER. RUN is its
# folder, where NAME tells apart what the flags change, TRAINING its command, SAMPLES what is sampled from it.
training() {
    RUN=$ROOT/$1/$2-p$3-s$4-$5 OF=$1 SAMPLES=""
    CHAIN=${AFTER:-$RUN}
    prepare "$1"
    TRAINING="$LAUNCH train.py --data $1 --size $PIXELS --data-dir $DATA --method $2 --p $3 --sigma $4"
    case "$2" in ddpm | ambient) ;; *) TRAINING="$TRAINING $REGULARISED" ;; esac
    TRAINING="$TRAINING --steps $STEPS $TRAIN"
    if [ "$1" = lsun_bedroom ]; then TRAINING="$TRAINING $LARGE_TRAIN"; fi
    TRAINING="$TRAINING ${TRAIN_FLAGS:-} ${*:6} --out $RUN"
}

# prepare DATA: every chain begins with it; the first one at it does the work. PIXELS: its images' height.
prepare() {
    local flags source
    if [ "$1" = subspace ]; then
        flags="--images $SUBSPACE_IMAGES"
        if [ "$SUBSPACE_IMAGES" != shapes ]; then prepare "$SUBSPACE_IMAGES"; fi
    elif [ "$1" = shapes ]; then
        flags=${SHAPES:+--num-samples $SHAPES}
    else
        source=$(echo "$1" | tr '[:lower:]' '[:upper:]')    # CELEBA=img_align_celeba.zip
        flags=${!source:+--src ${!source}}
    fi
    case "${SIZE:-$1}" in
        celeba | imagenet64) PIXELS=64 ;;
        lsun_bedroom) PIXELS=256 ;;
        *) PIXELS=${SIZE:-32} ;;
    esac
    stage "$DATA/$1-$PIXELS.json" "$PYTHON" data.py "$1" --size "$PIXELS" --out "$DATA" $flags
}

# model, as training: trains it.
model() {
    local step
    training "$@"
    printf -v step %08d "$STEPS"
    stage "$RUN/samples-$step.png" $TRAINING
}

# What a step of this training costs here.
benchmark() { stage "$RUN/benchmark.json" $TRAINING --benchmark; }

# sampled NAME TARGET SCRIPT [flags]: samples of the model as NAME.npz
sampled() {
    local flags=$SAMPLE
    if [ "$OF" = lsun_bedroom ]; then flags=$LARGE_SAMPLE; fi
    SAMPLES="$SAMPLES $RUN/$1.npz"
    stage "$RUN/$2" $LAUNCH "$3" "$RUN" "${@:4}" $flags --out "$RUN/$1.npz"
}

# samples SAMPLER STEPS
samples() { sampled "$1-$2" "$1-$2.npz" sample.py --sampler "$1" --num-samples "$N" --steps "$2"; }

# attacked "ATTACK [flags]" PERCENT: so many of the sampling steps
attacked() {
    attacked_by "${1// --/-}-$2" --attack $1 --steps-attacked "$2%" --steps "$ATTACK_STEPS" $ATTACK
}

# attacked_by NAME [flags]
attacked_by() { sampled "$1" "$1.npz.attack.json" attack.py --num-samples "$N_ATTACK" "${@:2}"; }

# The scores of the model's samples, in one call. Those of subspace data are exact.
judge() {
    local metric=$METRIC features=$FEATURES file left=""
    if [ "$OF" = subspace ]; then metric=fd-exact features=""; fi
    for file in $SAMPLES; do
        if wanted "$file.$metric.json"; then left="$left $file"; fi
    done
    if [ -n "$left" ]; then
        add "${left##* }.$metric.json" $LAUNCH fid.py $left --ref "$OF" --data-dir "$DATA" $features
    fi
}

# one, as model: a model, its samples, their score
one() { model "$@"; samples $FULL; judge; }

# seeds DATA METHOD P SIGMA: one for every seed
seeds() {
    local seed
    for seed in $SEEDS; do one "$@" "seed$seed" --seed "$seed"; done
}

# pair DATA P SIGMA: ddpm and adv, for every seed, by DDIM too
pair() {
    local seed method
    for seed in $SEEDS; do
        for method in ddpm adv; do
            model "$1" $method "$2" "$3" "seed$seed" --seed "$seed"
            samples $FULL
            samples ddim "$DDIM"
            judge
        done
    done
}

# toy3d NAME [flags]: a chain of its own, which writes NAME.json
toy3d() {
    CHAIN=$ROOT/toy3d/$1
    stage "$CHAIN.json" "$PYTHON" toy3d.py "${@:2}" --out "$ROOT/toy3d"
}

# ------------------------------------------------------------------------------------------- chains and lanes

# stage TARGET COMMAND...: adds it to the chain if its target is wanted.
stage() { if wanted "$1"; then add "$@"; fi; }

# wanted TARGET: whether it is missing, and the chain does not make it already
wanted() {
    local asked=ASKED_${CHAIN//[!a-zA-Z0-9]/_}              # of each chain its own: one for all grows slow
    case "${!asked:-}" in *"|$1|"*) return 1 ;; esac
    printf -v "$asked" '%s|%s|' "${!asked:-}" "$1"
    [ $ACTION = plan ] || [ ! -e "$1" ]                     # plan.py says what is there
}

# add TARGET COMMAND...: a line of the chain's file. $WORK/chains names these files, the first one begun first.
add() {
    local chain=$WORK/${CHAIN//\//-}
    if [ $ACTION = plan ]; then printf '%s\t%s\t%s\n' "$each" "$1" "${*:2}"; return; fi
    if [ ! -e "$chain" ]; then echo "$chain" >> "$WORK/chains"; fi
    printf '%s\t%s\n' "$1" "${*:2}" >> "$chain"
}

# chains TABLES: their chains. A scale is set anew for each table, which may change it.
chains() {
    local each
    rm -rf "$WORK"
    mkdir "$WORK"
    : > "$WORK/chains"
    unset ${!ASKED_@}
    for each in "$@"; do
        REPORT=""
        "$SCALE"
        "$each"
    done
}

plan() { chains "$@" | "$PYTHON" plan.py --devices $((LANES * (GPUS ? GPUS_PER_MODEL : 1))); }

list() {
    chains "$@"
    awk -F '\t' '{ printf "%s%s", (FNR > 1 ? " && " : NR > 1 ? "\n" : ""), $2 } END { if (NR) print "" }' \
        $(cat "$WORK/chains") /dev/null
}

# lane K: runs chain after chain that no other lane has taken, on its own GPUs.
lane() {
    trap 'end_children; exit' INT TERM HUP
    if [ "$GPUS" -ge "$GPUS_PER_MODEL" ]; then
        first=$(($1 % (GPUS / GPUS_PER_MODEL) * GPUS_PER_MODEL + 1))
        last=$((first + GPUS_PER_MODEL - 1))
        CUDA_VISIBLE_DEVICES=$(echo $DEVICES | cut -d ' ' -f "$first-$last" | tr ' ' ',')
        export CUDA_VISIBLE_DEVICES
    fi
    while read -r chain; do
        if ! mkdir "$chain.taken" 2> /dev/null; then continue; fi
        while IFS=$'\t' read -r target command; do
            if [ ! -e "$target" ] && ! run_stage "$target" "$command"; then break; fi
        done < "$chain"
    done < "$WORK/chains"
}

# run_stage TARGET COMMAND: with several lanes its output goes to a log, and its end is said.
run_stage() {
    local began=$SECONDS status=0 log=/dev/null
    say "\$ $2"
    set -m                                                  # no Ctrl-C of the terminal: TERM comes once, from here
    if [ "$LANES" = 1 ]; then
        $2 < /dev/null &
    else
        log=$ROOT/logs/$(echo "${1#"$ROOT"/}" | tr / -).log
        $2 < /dev/null >> "$log" 2>&1 &
    fi
    set +m
    wait $! || status=$?
    if [ "$status" != 0 ]; then
        echo "status $status: $2" >> "$FAILED"
        say "  FAILED with status $status: $2"
        say "$(tail -n 5 "$log" | sed 's/^/  | /')"
    elif [ "$LANES" != 1 ]; then
        say "  $((SECONDS - began)) s: $1"
    fi
    return $status
}

# Nothing ends because its output cannot be written: `| head -1`, a closed terminal, a full disk.
say() { echo "$*" 2> /dev/null || true; }

# Tells the commands that this shell has started to end, and waits: they save.
end_children() {
    trap '' INT TERM HUP
    kill $(jobs -pr) 2> /dev/null || true
    while [ -n "$(jobs -pr)" ]; do wait || true; done       # a signal meanwhile ends a wait
}

# The tables one after another, each followed by the report.
reproduce() {
    trap 'end_children; say "run_all.sh: stopped; the same command goes on" >&2; exit 130' INT TERM HUP
    trap '' PIPE
    case " $BEYOND " in *" $1 "*) ABOUT="Beyond the paper" ;; esac
    say "run_all.sh $SCALE: $*. $ABOUT. $LANES at a time${DEVICES:+ on $GPUS GPU(s)}"
    if [ "$GPUS" != 0 ]; then (ACTION=plan; plan "$@") || say "no plan: plan.py failed"; fi
    for table in "$@"; do
        chains "$table"
        made=$(mkdir -p "$ROOT/logs" 2>&1) || fail "$made"
        say "$table: in $ROOT"
        lanes=""
        for ((k = 0; k < LANES; k++)); do lane $k & lanes="$lanes $!"; done
        for k in $lanes; do
            wait "$k" || echo "status $?: a lane of $table was killed, and its chains with it" >> "$FAILED"
        done
        if [ -s "$WORK/chains" ] || [ "$table" = "${*: -1}" ]; then
            "$PYTHON" report.py --runs "$ROOT" $REPORT || echo "report.py --runs $ROOT" >> "$FAILED"
        fi
    done
    say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $ROOT/README.md"
    if [ -s "$FAILED" ]; then
        say "These failed; what they would have made is a dash in the tables:"
        say "$(sort -u "$FAILED")"
        exit 1
    fi
}

# ------------------------------------------------------------------------------------------- before it starts

fail() { echo "run_all.sh: error: $*" >&2; exit 2; }

set_up() {
    PYTHON=.venv/bin/python
    if cmp -s requirements.txt .venv/installed.txt; then return; fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
        fail "python3 is $(python3 --version 2>&1 || echo missing); 3.10 or newer is needed"
    fi
    echo "run_all.sh: making .venv with the packages of requirements.txt" >&2
    python3 -m venv .venv || fail "python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv"
    "$PYTHON" -m pip install --quiet --requirement requirements.txt
    "$PYTHON" -m pip install --quiet matplotlib || echo "run_all.sh: no matplotlib: tables without figures" >&2
    cp requirements.txt .venv/installed.txt
}

# The tests in two halves side by side, each about a minute: what needs two processes shares one torchrun.
run_tests() {
    local half=0 rest=0 pair
    pair=$(grep -l '^def two_process_jobs' tests/test_*.py)
    TEMPORARY=$(mktemp)
    "$PYTHON" -m pytest -q $pair > "$TEMPORARY" 2>&1 &
    trap 'kill $! 2> /dev/null || true; rm -f "$TEMPORARY"' EXIT
    "$PYTHON" -m pytest -q test_core.py $(printf '%s\n' tests/test_*.py | grep -vxF "$pair") || rest=$?
    wait $! || half=$?
    cat "$TEMPORARY"
    exit $((half > rest ? half : rest))
}

# Shapes of the size of CelebA's images stand in for the data sets that no script can download.
dry_images() {
    rm -rf "$ROOT"
    "$PYTHON" data.py shapes --num-samples 64 --size 218 --out "$ROOT/shapes"
    mkdir "$ROOT/images"
    "$PYTHON" -c "import numpy, PIL.Image
for k, image in enumerate(numpy.load('$ROOT/shapes/shapes-218.npy')):
    PIL.Image.fromarray(image.transpose(1, 2, 0)[:, 20:198]).save(f'$ROOT/images/{k}.png')"
}

ACTION=reproduce
case "${1:-}" in list | plan) ACTION=$1; shift ;; esac
for name in LANES GPUS_PER_MODEL; do
    case "${!name:-1}" in *[!0-9]* | 0*) fail "$name=${!name}: must be a positive number" ;; esac
done
for name in PYTHON CIFAR10 CELEBA LSUN_BEDROOM IMAGENET64 BUTTERFLIES; do
    case "${!name:-}" in *[[:space:]]*) fail "$name='${!name}': a path without spaces is needed" ;; esac
done
GPUS_PER_MODEL=${GPUS_PER_MODEL:-1}
SCALE=${1:-}
case "$SCALE" in
    "" | test) ;;
    quick | day | paper | dry) "$SCALE" ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh; exit ;;
    *) fail "'$SCALE' is not known; it is: bash run_all.sh [list|plan] [quick|day|paper|dry|test] [TABLES]" ;;
esac
set -- ${@/questions/${QUESTIONS:-questions}}
for table in "${@:2}"; do
    case " ${TABLES:-} ${BEYOND:-} " in
        *" $table "*) ;;
        *) fail "'$table' is not a table of $SCALE; they are: ${TABLES:-} ${BEYOND:-}" ;;
    esac
done

if [ -z "${PYTHON:-}" ]; then set_up; fi
needed="import numpy, os, PIL, scipy, sys, torch"
if [ "$SCALE" = test ]; then needed="$needed, pytest"; fi
needed="$needed; assert sys.version_info >= (3, 10), 'Python 3.10 or newer is needed'"
# The GPUs that may be used, by the names that CUDA_VISIBLE_DEVICES gives them.
DEVICES=$("$PYTHON" -c "$needed
count = torch.cuda.device_count()
names = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(count)))
print('GPUs:', *names.split(',')[:count])" 2> /dev/null) || true
if [ "${DEVICES%%:*}" != GPUs ]; then
    reason=$("$PYTHON" -c "$needed" 2>&1 | tail -n 1) || true
    reason=${reason#*: line *: "$PYTHON": }                 # bash's own begins so
    fail "$PYTHON: ${reason:-this is no Python}; requirements.txt says what is needed"
fi
DEVICES=${DEVICES#GPUs:}
if [ "$SCALE" = test ]; then run_tests; fi

GPUS=$(($(echo $DEVICES | wc -w)))
LAUNCH=$PYTHON
if [ "$GPUS_PER_MODEL" -gt 1 ]; then
    LAUNCH="$PYTHON -m torch.distributed.run --standalone --nproc_per_node $GPUS_PER_MODEL"
fi
if [ $ACTION = reproduce ] && [ "$GPUS" != 0 ] && [ "$GPUS" -lt "$GPUS_PER_MODEL" ]; then
    fail "GPUS_PER_MODEL=$GPUS_PER_MODEL: there are $GPUS"
fi
if [ -z "$SCALE" ]; then SCALE=$(if [ "$GPUS" = 0 ]; then echo quick; else echo paper; fi); fi
if [ -z "${LANES:-}" ]; then
    cores=$(getconf _NPROCESSORS_ONLN)
    LANES=$((cores < 8 ? cores : 8))
    if [ "$SCALE" = paper ] || [ "$SCALE" = day ]; then LANES=$((GPUS < GPUS_PER_MODEL ? 1 : GPUS / GPUS_PER_MODEL)); fi
fi
if [ "$LANES" -gt 1 ]; then export OMP_NUM_THREADS=1; fi
"$SCALE"
if [ "$SCALE" = dry ] && [ $ACTION = reproduce ]; then dry_images; fi
TEMPORARY=$(mktemp -d)
trap 'rm -rf "$TEMPORARY"' EXIT
WORK=$TEMPORARY/chains FAILED=$TEMPORARY/failed
if [ $# -lt 2 ]; then set -- "$SCALE" $TABLES; fi
$ACTION "${@:2}"; exit                                      # reads no further: this file may change meanwhile
