#!/bin/bash
# Packs a data set on a cluster, one part per array task; a second job joins the parts:
#
#   job=$(sbatch --parsable --array=1-16 tools/slurm_pack.sh imagenet --root /data/imagenet --out in1k.beton)
#   sbatch --dependency=afterok:$job tools/slurm_pack.sh merge in1k.shard-*-of-16.beton --out in1k.beton
#
# (Quote the star in the second line if the parts are not there yet: '…-*-of-16.beton'.)
# Run it from the project's folder with its environment active, or set PYTHON.
# A task that was killed or preempted goes on where it was when it runs again.
#SBATCH --job-name=pack
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A_%a.out
set -euo pipefail

pack=("${PYTHON:-python}" -m tools.build_dataset)
if [[ $1 == merge ]]; then
    shift
    # shellcheck disable=SC2068  # the star is expanded here, when the parts are there
    exec "${pack[@]}" merge $@ --workers "${SLURM_CPUS_PER_TASK:-1}"
fi

part=${SLURM_ARRAY_TASK_ID:?submit with sbatch --array=1-N}
parts=$SLURM_ARRAY_TASK_COUNT
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --out ]]; then
        next=$((i + 1))
        out=${!next}
    fi
done
if [[ -e ${out%.beton}.shard-$part-of-$parts.beton ]]; then
    echo "part $part of $parts is complete" # a task that was requeued after its end
    exit 0
fi
exec "${pack[@]}" "$@" --shard "$part/$parts" --workers "${SLURM_CPUS_PER_TASK:-1}"
