#!/usr/bin/env bash
# Runs a config on GPUs: on this machine, on several machines by ssh, or as a task of a Slurm
# job.
#
#   launch/gpu.sh [--dry_run] CONFIG WORKDIR [--config.key=value ...]
#   HOSTS="node1 node2" launch/gpu.sh CONFIG WORKDIR [...]   from anywhere, by ssh
#   srun launch/gpu.sh CONFIG WORKDIR [...]                  inside sbatch, one task per GPU
#
# With ssh every host starts one process that uses all its GPUs, in the path of this
# repository, which all hosts must share. The first host is the coordinator. SIGTERM and
# Ctrl-C reach every process: the run saves and ends with 75. Under Slurm, more than one task
# turns on --distributed, and jax reads the rest from Slurm. A run that Slurm stops
# (`#SBATCH --signal=TERM@120`) saves, exits with 75 and is queued again. The same command
# resumes a run.
#
#   --dry_run                   print the commands instead
#   PER_HOST=8                  with ssh: processes per host, with one GPU each
#   JAX_COORDINATOR_PORT=8482   with ssh: a port of the first host, open to the others
#   REQUEUE_CODE=75             under Slurm: the exit code after which a run is queued again
#   PYTHON=...                  interpreter, .venv/bin/python by default
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options '' "$@"
arguments 2
config=${rest[0]} workdir=${rest[1]} flags=("${rest[@]:2}")
cd "$root"

python=${PYTHON:-.venv/bin/python}
main=("$python" -m alignax.main --config "$config" --workdir "$workdir")

if [[ -z ${HOSTS:-} ]]; then
  command=(env PYTHONUNBUFFERED=1 "${main[@]}")
  if [[ ${SLURM_NTASKS:-1} -gt 1 ]]; then
    command+=(--distributed)
  fi
  command+=("${flags[@]}")
  if [[ -n $dry_run ]]; then
    run "${command[@]}"
    exit
  fi
  heed
  code=0
  follow "${command[@]}" || code=$?
  if [[ $code == "${REQUEUE_CODE:-75}" && -n ${SLURM_JOB_ID:-} && ${SLURM_PROCID:-0} == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi

read -r -a hosts <<<"$HOSTS"
per_host=${PER_HOST:-1}
address=${hosts[0]##*@}:${JAX_COORDINATOR_PORT:-8482}
count=$((${#hosts[@]} * per_host))
commands=()  # one process each: a command line for the shell of its host
for i in $(seq 0 $((count - 1))); do
  settings=(PYTHONUNBUFFERED=1 "JAX_COORDINATOR_ADDRESS=$address"
    "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$i")
  if [[ $per_host -gt 1 ]]; then
    settings+=("JAX_LOCAL_DEVICE_IDS=$((i % per_host))")
  fi
  line=$(printf '%q ' cd "$PWD")
  line+="&& exec $(printf '%q ' env "${settings[@]}" "${main[@]}" --distributed "${flags[@]}")"
  commands+=("${line% }")
done
ssh=(ssh -o BatchMode=yes -o ServerAliveInterval=30)
if [[ -n $dry_run ]]; then
  for i in "${!commands[@]}"; do
    run "${ssh[@]}" "${hosts[i / per_host]}" "${commands[i]}"
  done
  exit
fi

# ssh does not forward signals. One process of a run is enough: jax notifies the others.
# The pattern is the command itself, as an extended regular expression.
# shellcheck disable=SC2001
pattern="^$(sed 's/[][(){}.*+?^$|\\]/\\&/g' <<< "${main[*]} --distributed")"
stop() {
  "${ssh[@]}" "${hosts[0]}" "pkill -TERM -f $(printf '%q' "$pattern")" || true
}
heed
for i in "${!commands[@]}"; do
  "${ssh[@]}" "${hosts[i / per_host]}" "${commands[i]}" \
    < /dev/null > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  children+=($!)
done
[[ -z $stopped ]] || stop
code=0
for child in "${children[@]}"; do
  ended=0
  await "$child" || ended=$?
  # The code of a process that failed counts more than 75, that of one that saved.
  if [[ $ended != 0 && ($code == 0 || $code == 75) ]]; then
    code=$ended
  fi
done
exit "$code"
