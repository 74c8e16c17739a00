#!/usr/bin/env bash
# Training on the nodes of a SLURM job, one process a node; after preemption or the time limit the job queues up again.
#
#   sbatch --nodes=4 configs/launch/slurm.sh
#   sbatch --nodes=4 configs/launch/slurm.sh train.steps=50000 out=/shared/runs/longer     # settings are added
#
# SLURM tells each process its place. Two minutes before the time limit, and on preemption, the steps of the job get
# SIGTERM: the processes finish a step, save it, and end with status 75, at which this script puts the job back into the
# queue. The next start goes on from there. `out` has to be on a file system that all nodes share.
#
# With one process for each GPU instead (--ntasks-per-node=8) nothing else changes: each takes the GPU of its number.
#SBATCH --job-name=t5x-lite
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

status=0
srun --kill-on-bad-exit=0 \
  t5x-lite train configs/pretrain_10m.yaml data.path='/shared/books/*.txt' out=/shared/runs/pretrained \
  --unfinished-status 75 "$@" || status=$?

if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  status=0
fi
exit "$status"
