#!/usr/bin/env bash
# Runs a config on GPUs: of this machine, of several machines by ssh, or as one task of a
# Slurm job.
#
#   launch/gpu.sh [--dry_run] CONFIG WORKDIR [--config.key=value ...]
#   HOSTS="node1 node2" launch/gpu.sh CONFIG WORKDIR [...]   from anywhere, by ssh
#   srun launch/gpu.sh CONFIG WORKDIR [...]                  inside sbatch, one task a GPU
#
# By ssh each host starts one process that has all of its GPUs, in this folder's path, which
# the hosts share; the first host is the coordinator. SIGTERM and Ctrl-C reach every
# process: the run saves and ends with 75. Under Slurm, more than one task turns on
# --distributed, and jax reads the rest from Slurm; a run that Slurm stops
# (`#SBATCH --signal=TERM@120`) saves, exits with 75 and is queued again. The same command
# resumes a run.
#
#   --dry_run                   print the commands instead
#   PER_HOST=8                  by ssh: so many processes a host, with one GPU each
#   JAX_COORDINATOR_PORT=8482   by ssh: a port of the first host that the others reach
#   REQUEUE_CODE=75             under Slurm: exit code of a run that wants to go on
#   PYTHON=...                  interpreter, .venv/bin/python by default
set -euo pipefail
dry_run=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    *) echo "gpu.sh has no option '$1'" >&2; exit 2 ;;
  esac
  shift
done
[[ $# -ge 2 ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
config=$1 workdir=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
main=("$python" -m alignax.main --config "$config" --workdir "$workdir")

if [[ -z ${HOSTS:-} ]]; then
  command=(env PYTHONUNBUFFERED=1 "${main[@]}")
  if [[ ${SLURM_NTASKS:-1} -gt 1 ]]; then
    command+=(--distributed)
  fi
  command+=("$@")
  if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
  fi
  trap : TERM  # Slurm signals every process: outlive the run, to see how it ended
  code=0
  "${command[@]}" || code=$?
  if [[ $code == "${REQUEUE_CODE:-75}" && -n ${SLURM_JOB_ID:-} && ${SLURM_PROCID:-0} == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi

read -r -a hosts <<<"$HOSTS"
per_host=${PER_HOST:-1}
address=${hosts[0]}:${JAX_COORDINATOR_PORT:-8482}
count=$((${#hosts[@]} * per_host))
commands=()  # one process each: a command line for the shell of its host
for i in $(seq 0 $((count - 1))); do
  settings=(PYTHONUNBUFFERED=1 "JAX_COORDINATOR_ADDRESS=$address"
    "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$i")
  if [[ $per_host -gt 1 ]]; then
    settings+=("JAX_LOCAL_DEVICE_IDS=$((i % per_host))")
  fi
  line=$(printf '%q ' cd "$PWD")
  line+="&& exec $(printf '%q ' env "${settings[@]}" "${main[@]}" --distributed "$@")"
  commands+=("${line% }")
done
ssh=(ssh -o BatchMode=yes -o ServerAliveInterval=30)
if [[ -n $dry_run ]]; then
  for i in "${!commands[@]}"; do
    printf '%q ' "${ssh[@]}" "${hosts[i / per_host]}" "${commands[i]}"
    echo
  done
  exit
fi

# ssh passes no signals on, and one process of a run is enough: the others are told by jax.
pattern="^$python -m alignax[.]main .*--workdir $workdir"
# shellcheck disable=SC2329
stop() {
  told=1
  "${ssh[@]}" "${hosts[0]}" "pkill -TERM -f $(printf '%q' "$pattern")" || true
}
told=''
trap stop TERM INT
pids=()
for i in "${!commands[@]}"; do
  "${ssh[@]}" "${hosts[i / per_host]}" "${commands[i]}" \
    < /dev/null > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  ended=0
  wait "$pid" || ended=$?
  while [[ -n $told ]]; do  # a signal may have ended only the waiting
    told='' ended=0
    wait "$pid" || ended=$?
  done
  # Who saved is one of the news, who failed the other: that one counts.
  if [[ $ended != 0 && ($code == 0 || $code == 75) ]]; then
    code=$ended
  fi
done
exit "$code"
