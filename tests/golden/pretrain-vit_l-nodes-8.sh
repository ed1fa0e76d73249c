#!/bin/bash

# Parameters
#SBATCH --chdir=/scratch/runs/pretrain-vit_l
#SBATCH --gpus-per-node=8
#SBATCH --job-name=pretrain-vit_l
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/scratch/runs/pretrain-vit_l/logs/job-%j.txt
#SBATCH --requeue
#SBATCH --signal=USR2@180

# setup
run=/scratch/runs/pretrain-vit_l
log=$run/logs/job-$SLURM_JOB_ID.txt
job=$run/job
max_stalled=4
silence=stopped
export PYTHONPATH=/scratch/runs/pretrain-vit_l/code/555555555555
export PYTHONUNBUFFERED=1
export NEPA_BATCH=1
export OMP_NUM_THREADS=1
export OMP_WAIT_POLICY=PASSIVE
. /scratch/runs/pretrain-vit_l/code/555555555555/jobs/attempt.sh
begin

# command
export SUBMITIT_EXECUTOR=slurm
srun --kill-on-bad-exit=1 --open-mode=append --output="$run/logs/rank-%t.txt" \
  /opt/venv/bin/python -P -m jobs.runner "$run"


# teardown
end $?

# each of the 64 ranks also has, from srun through jobs.runner:
#   RANK=$SLURM_PROCID  WORLD_SIZE=$SLURM_NTASKS  LOCAL_RANK=$SLURM_LOCALID  LOCAL_WORLD_SIZE=tasks of its node
#   MASTER_ADDR=first node of the job  MASTER_PORT=20000 + (16 x job + step) mod 12000, the same for all
# and of the shell that submits: PATH, HOME, USER, LOGNAME, SHELL, LANG, LC_ALL, TZ, SLURM_CONF; nothing else

