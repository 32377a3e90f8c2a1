#!/bin/bash
# Curvature on several nodes of a Slurm cluster: sbatch examples/slurm.sh [script or "-m curvops ..." instead of examples/processes.py]
# Nodes without GPUs, two processes on each: PROCESSES=2 sbatch --gpus-per-node=0 --cpus-per-task=2 examples/slurm.sh
#SBATCH --job-name=curvature
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
# one torchrun on each node starts a process for each GPU; the first node is where they meet
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCESSES:-4}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" "${@:-examples/processes.py}"
