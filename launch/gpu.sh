#!/usr/bin/env bash
# Runs a config on the GPUs of this machine, or as one task of a Slurm job.
#
#   launch/gpu.sh CONFIG WORKDIR [--config.key=value ...]
#   srun launch/gpu.sh CONFIG WORKDIR [...]      inside sbatch, one task a GPU
#
# More than one Slurm task turns on --distributed; jax reads the rest from Slurm. A run
# that Slurm stops (`#SBATCH --signal=TERM@120`) saves, exits with REQUEUE_CODE and is
# queued again; the same command resumes it.
#
#   REQUEUE_CODE=75  exit code of a run that saved and wants to go on
#   PYTHON=...       interpreter, .venv/bin/python by default
#   DRY_RUN=1        print the command instead
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
config=$1 workdir=$2
shift 2

command=(env PYTHONUNBUFFERED=1 "${PYTHON:-.venv/bin/python}"
  -m alignax.main --config "$config" --workdir "$workdir")
if [[ ${SLURM_NTASKS:-1} -gt 1 ]]; then
  command+=(--distributed)
fi
command+=("$@")

if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap : TERM  # Slurm signals every process: outlive the run, to see how it ended
code=0
"${command[@]}" || code=$?
if [[ $code == "${REQUEUE_CODE:-75}" && -n ${SLURM_JOB_ID:-} && ${SLURM_PROCID:-0} == 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
