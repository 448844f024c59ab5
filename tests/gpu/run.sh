#!/usr/bin/env bash
# Measures slotstream on a machine with one GPU, in at most BUDGET seconds, in parts that cannot lose
# each other: each has a time limit of its own and writes its results by itself. See README.md.
#   bash tests/gpu/run.sh                 all parts, in the order below
#   bash tests/gpu/run.sh step largest    only these; installation and data come first in any case
# DEVICE=cpu runs the same script without a GPU, on small sizes, to try the script itself.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

export OUT=${OUT:-/tmp/gpu/out} WORK=${WORK:-/tmp/gpu/work} DEVICE=${DEVICE:-cuda}
DATA=${DATA:-.gpu} WHEELS=${WHEELS:-.whl} PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-590}      # seconds for everything
PATIENCE=${PATIENCE:-1}    # multiplies the limit of every part
SITE=$WORK/site BETON=$DATA/coco.beton RUNS=$WORK/runs
PARTS=("$@")
BEGAN=$(date +%s)
export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR="$WORK/triton" TORCHINDUCTOR_CACHE_DIR="$WORK/inductor" NUMBA_CACHE_DIR="$WORK/numba"
[ -f "$BETON" ] || { echo "error: $BETON: no such file (tests/gpu/README.md says how to make it)" >&2; exit 2; }
mkdir -p "$OUT" "$WORK/logs"
: >"$WORK/parts"

if [ "$DEVICE" = cpu ]; then
    recipe=configs/scenes_cpu.yaml deep=configs/fast/camvid_cpu.yaml batch=4 threads=1 repeats=1 seconds=0.05 steps=4 images=8
    sides=(64) few=8 epochs=2 half=4
    backends=(kornia) count=8 side=64 workers=() fp16=no
    unset NUMBA_CACHE_DIR  # what the checkout has compiled is at hand
    small=(--model.arch resnet18 --model.dim_hidden 64 --model.dim_out 32 --model.num_prototypes 16 --views.size 64)
else
    recipe=configs/coco_r50_800ep.yaml deep=configs/fast/coco_1gpu.yaml batch=512 threads=$(nproc) repeats=3 seconds=0.3 steps=90 images=51200
    sides=(96 128 160) few=4096 epochs=20 half=256
    backends=(kornia triton) count=64 side=224 workers=(-n 8) fp16=fp16
    small=()
fi

# Seconds that the parts after this one need at least.
declare -A LATER=([checks]=245 [pytest]=225 [fidelity]=200 [fp16]=135 [all]=75 [bf16]=30 [side96]=20 [side128]=10)

# part NAME LIMIT COMMAND…: run the command for at most LIMIT seconds, if the part is wanted.
part() {
    local name=$1 limit=$(($2 * PATIENCE)) left began status
    shift 2
    [ ${#PARTS[@]} = 0 ] || [[ " ${PARTS[*]} " == *" $name "* ]] || return 0
    began=$(date +%s)
    left=$((BUDGET - (began - BEGAN) - ${LATER[$name]:-0}))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        echo "$name skipped: no time left" | tee -a "$WORK/parts"
        return
    fi
    timeout -k 8 "$limit" "$@" >"$WORK/logs/$name.log" 2>&1
    status=$?
    echo "$name rc=$status $(($(date +%s) - began)) s (limit $limit)" | tee -a "$WORK/parts"
    [ $status = 0 ] || tail -n 4 "$WORK/logs/$name.log" | cut -c1-300
}

# pretrain NAME LIMIT PRECISION: some steps of the recipe; its curve is a result.
pretrain() {
    part "$1" "$2" "$PYTHON" -m tests.gpu.pretrain "$images" --config "$recipe" --data.path "$BETON" --name "$1" \
        --train.batch_size "$batch" --train.max_steps "$steps" --train.epochs 800 --data.threads "$threads" \
        --log.every $((steps > 10 ? 10 : 1)) --log.checkpoint_every 0 --log.trackers '[]' --log.dir "$RUNS" \
        --efficiency.precision "$3" "${small[@]}"
    cp "$RUNS/$1/metrics.jsonl" "$OUT/$1.jsonl" 2>/dev/null
}

# curve NAME LIMIT CONFIG BATCH: a whole short run of a recipe on few images, each seen `epochs` times; its curve is a result.
curve() {
    part "$1" "$2" "$PYTHON" -m tests.gpu.pretrain "$few" --config "$3" --data.path "$BETON" --name "$1" --train.batch_size "$4" \
        --train.epochs "$epochs" --train.warmup_epochs 1 --data.threads "$threads" --log.every 2 --log.checkpoint_every 0 \
        --log.trackers '[]' --log.dir "$RUNS" --efficiency.precision bf16 "${small[@]}"
    cp "$RUNS/$1/metrics.jsonl" "$OUT/$1.jsonl" 2>/dev/null
}

# benchmark NAME LIMIT ARGUMENTS…: tools.benchmark with the sizes of this machine; a later --config adds to the recipe.
benchmark() {
    local name=$1 limit=$2 stages=$3
    shift 3
    part "$name" "$limit" "$PYTHON" -m tools.benchmark "$stages" --config "$recipe" --batch "$batch" --device "$DEVICE" \
        --repeats "$repeats" --seconds "$seconds" --json "$OUT/$name.json" "$@"
}

# Wheels that the machine lacks, into a folder of their own.
if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
    timeout 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
        "$WHEELS"/*.whl >"$WORK/logs/install.log" 2>&1
    echo "install rc=$?" | tee -a "$WORK/parts"
fi
timeout $((60 * PATIENCE)) "$PYTHON" -m tests.gpu.machine 2>&1 | tail -n 3
timeout $((60 * PATIENCE)) "$PYTHON" -m tests.gpu.extract "$BETON" "$WORK/images" 128 2>&1 | tail -n 2

mapfile -t cuda_tests < <(grep -rlE 'mark\.cuda' tests --include='test_*.py') # collecting all would take a minute
part checks 60 "$PYTHON" -m tests.gpu.checks "$BETON"
part pytest 120 "$PYTHON" -m pytest -m cuda -q "${workers[@]}" --continue-on-collection-errors -p no:cacheprovider \
    --timeout 100 "${cuda_tests[@]}"
part fidelity 45 "$PYTHON" -m tests.fidelity --images "$WORK/images" --device "$DEVICE" --ways "${backends[@]}" host \
    --count "$count" --size "$side" --cases geometry contrast hue "all colour" recipe --json "$OUT/fidelity.json"
pretrain fp16 75 "$fp16"
benchmark all 150 all --data "$BETON" --threads "$threads" --backends "${backends[@]}"
pretrain bf16 75 bf16
for side in "${sides[@]}"; do # of the fast recipe: more supervised stages, smaller views; the step at 224 pixels is in "all"
    echo "views: {size: $side}" >"$WORK/side$side.yaml"
    benchmark "side$side" 30 step --synthetic --config "$deep" --config "$WORK/side$side.yaml"
done
curve curve_fast 80 "$deep" "$half"
curve curve_plain 80 "$recipe" "$batch"
benchmark step 110 step --synthetic --also checkpointing
[ "$DEVICE" = cpu ] || part largest 110 "$PYTHON" -m tests.gpu.checks largest "$batch"
benchmark compile 150 step --synthetic --also compile

tar -czf "$OUT/logs.tar.gz" -C "$WORK" logs parts
"$PYTHON" -m tests.gpu.table
