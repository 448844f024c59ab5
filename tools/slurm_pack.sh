#!/bin/bash
# Packs a data set on a cluster: one part per array task; then one more job joins the parts.
#
#   job=$(sbatch --parsable --array=1-16 tools/slurm_pack.sh 16 imagenet --root /data/imagenet --out in1k.beton)
#   sbatch --dependency=afterok:$job tools/slurm_pack.sh 16 merge --out in1k.beton
#
# The first argument is the number of parts, whichever of them are submitted. A task that was killed
# or preempted goes on where it was when it runs again. Where some failed for good, submit them
# again (--array=7,9 with the same arguments), then the second command: it names what is missing.
# Submit from the project's folder with its environment active, or set PYTHON.
#SBATCH --job-name=pack
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A_%a.out
set -euo pipefail

die() {
    echo "error: $1" >&2
    exit 2
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '/^#SBATCH/q; 2,$s/^# \{0,1\}//p' "$0"
    exit
fi
[[ ${1:-} =~ ^[1-9][0-9]*$ && -n ${2:-} ]] ||
    die "expected PARTS SOURCE --root DIR --out FILE, or PARTS merge --out FILE; --help shows both"
parts=$1 source=$2
shift 2

out='' previous='' force=''
for word in "$@"; do
    [[ $previous == --out ]] && out=$word
    [[ $word == --out=* ]] && out=${word#--out=}
    [[ $word == --force ]] && force=1
    previous=$word
done
[[ -n $out ]] || die "--out FILE is missing"
shard() { echo "${out%.beton}.shard-$1-of-$parts.beton"; }
pack=("${PYTHON:-python}" -m tools.build_dataset "$source" --workers "${SLURM_CPUS_PER_TASK:-1}")

if [[ $source == merge ]]; then
    shards=() missing=''
    for ((i = 1; i <= parts; i++)); do
        shards+=("$(shard "$i")")
        [[ -e ${shards[-1]} ]] || missing+=,$i
    done
    [[ -z $missing ]] || die "missing parts of $parts: submit them again with --array=${missing#,}"
    exec "${pack[@]}" "$@" -- "${shards[@]}"
fi

part=${SLURM_ARRAY_TASK_ID:-}
[[ -n $part ]] || die "no array task: submit with sbatch --array=1-$parts"
made=$(shard "$part")
if [[ -e $made && -e $made.json && ! -e $made.partial.journal && -z $force ]]; then
    echo "part $part of $parts is complete" # a task that was requeued after its end
    exit
fi
exec "${pack[@]}" "$@" --shard "$part/$parts"
