#!/bin/bash
# Train on several nodes with SLURM: sbatch scripts/slurm.sh task=panoptic dataset=cityscapes recipe.micro_batch_size=4
# Give nodes and GPUs to sbatch (sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm.sh ...); the images of
# a step are shared out between whatever there is. Partition and account as your cluster wants them.
#SBATCH --job-name=pem
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm_%j.log
#SBATCH --open-mode=append
# 90 seconds before its end the job saves, stops, and is queued again; so it is after a pre-emption. It goes on where it was.
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue

set -euo pipefail
# A task per GPU. The folder is named by the job, which keeps its number, so that all tasks and all starts share it.
exec srun "${PYTHON:-.venv/bin/python}" train.py \
	trainer=ddp trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE" \
	hydra.run.dir="outputs/slurm/$SLURM_JOB_ID" resume=auto "$@"
