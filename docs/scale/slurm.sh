#!/bin/bash
# A merge in eight shares on a Slurm cluster, each a task of a job array:
#
#     BASE=/shared/base ADAPTER=/shared/adapter OUTPUT=/shared/merged sbatch slurm.sh
#
# The paths are on a file system that all nodes share. Tasks may run at any time and in any order;
# the last one completes OUTPUT. If some were lost, submit the same again: shares that are finished
# end at once.
#
#SBATCH --job-name=loratool
#SBATCH --array=1-8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=04:00:00
# A preempted task, or one whose node was lost, goes back into the queue and makes the rest of its
# share; its log goes on in the same file (%A is the array's number, %a the task's).
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=loratool-%A_%a.log

set -euo pipefail

base=${BASE:-/shared/base}
adapter=${ADAPTER:-/shared/adapter}
output=${OUTPUT:-/shared/merged}
threads=${SLURM_CPUS_PER_TASK:-8}

# Into how many shares the output is split. It has to be said only where a part of the array is
# submitted:  SHARES=8 sbatch --array=3,5 slurm.sh
shares=${SHARES:-$SLURM_ARRAY_TASK_COUNT}

# As a job step, so that the SIGTERM of a preemption reaches loratool itself and not only this shell.
exec srun --cpus-per-task="$threads" \
    loratool merge "$base" "$adapter" -o "$output" \
    --threads "$threads" --worker "$SLURM_ARRAY_TASK_ID/$shares"
