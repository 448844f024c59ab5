#!/bin/bash
# Packs a data set on a cluster: one shard per array task. One more job then merges the shards.
#
#   job=$(sbatch --parsable --array=1-16 tools/slurm_pack.sh 16 imagenet --root /data/imagenet --out in1k.beton)
#   sbatch --dependency=afterok:$job tools/slurm_pack.sh 16 merge --out in1k.beton
#
# The first argument is the number of all shards, even if only some of them are submitted. A task
# that was killed or preempted resumes when it runs again. If tasks failed for good, submit them
# again (--array=7,9 with the same arguments), then the second command: it names missing shards.
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
    die "expected SHARDS SOURCE --root DIR --out FILE, or SHARDS merge --out FILE; see --help"
count=$1 source=$2
shift 2

out='' previous='' force=''
for word in "$@"; do
    [[ $previous == --out ]] && out=$word
    [[ $word == --out=* ]] && out=${word#--out=}
    [[ $word == --force ]] && force=1
    previous=$word
done
[[ -n $out ]] || die "--out FILE is missing"
shard() { echo "${out%.beton}.shard-$1-of-$count.beton"; }
pack=("${PYTHON:-python}" -m tools.build_dataset "$source" --workers "${SLURM_CPUS_PER_TASK:-1}")

if [[ $source == merge ]]; then
    shards=() missing=''
    for ((i = 1; i <= count; i++)); do
        shards+=("$(shard "$i")")
        [[ -e ${shards[-1]} ]] || missing+=,$i
    done
    [[ -z $missing ]] || die "missing shards of $count: submit them again with --array=${missing#,}"
    exec "${pack[@]}" "$@" -- "${shards[@]}"
fi

number=${SLURM_ARRAY_TASK_ID:-}
[[ -n $number ]] || die "no array task: submit with sbatch --array=1-$count"
made=$(shard "$number")
if [[ -e $made && -e $made.json && ! -e $made.partial.journal && -z $force ]]; then
    echo "shard $number of $count is complete" # a task that was requeued after its end
    exit
fi
exec "${pack[@]}" "$@" --shard "$number/$count"
