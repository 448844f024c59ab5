#!/bin/bash
# Pre-trains on a cluster: one process for each GPU, requeued until the run is done.
#
#   sbatch --ntasks-per-node=1 --gpus-per-node=1 tools/slurm_pretrain.sh --config configs/coco_r50_800ep.yaml
#   sbatch tools/slurm_pretrain.sh --config configs/coco_r50_800ep.yaml --data.path coco.beton
#   sbatch --nodes=2 tools/slurm_pretrain.sh --config configs/imagenet_r50_200ep.yaml
#
# on 1, 8 and 2 x 8 GPUs. All arguments go to train.pretrain, which here always resumes from the run's newest
# checkpoint. Five minutes before the time limit each process gets SIGUSR1. The run then writes a checkpoint
# and ends with code 75, and the job queues again. Any other failure ends the job.
# Submit from the project's folder with its environment active, or set PYTHON.
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '/^#SBATCH/q; 2,$s/^# \{0,1\}//p' "$0"
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || {
    echo "error: no job: submit with sbatch $0 (see --help)" >&2
    exit 2
}

nodes=${SLURM_JOB_NODELIST:-localhost}
export MASTER_ADDR MASTER_PORT WORLD_SIZE PYTHON
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer copies it by itself
MASTER_ADDR=$(scontrol show hostnames "$nodes" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a machine need different ports
WORLD_SIZE=$SLURM_NTASKS
PYTHON=${PYTHON:-python}

# srun must not kill the other tasks when one ends: after a signal all of them end with 75, and if a task is
# lost, the others end by themselves (log.timeout_minutes).
code=0
# shellcheck disable=SC2016  # each task expands these, not this shell
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec "$PYTHON" -m train.pretrain --resume auto --data.threads "${SLURM_CPUS_PER_TASK:-0}" "$@"
' pretrain "$@" || code=$?
((code == 75)) && exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
