#!/usr/bin/env bash
# Checks one GPU: the kernel against float64, DPO steps in bfloat16 at 135M to 1B, decoding.
#
#   launch/gpu_check.sh [--dry_run] [TABLE]
#
# Writes one Markdown table, to launch/results/gpu_DATE.md by default: commit it. Each size
# is a process of its own, so that its peak memory is its own. What does not fit or fails
# is a row that says so, and the exit code is 1.
#
#   --dry_run             print the commands instead
#   SIZES="135M 360M 1B"  tiny is for a CPU
#   PAIRS=8 LENGTH=1024   of a DPO step
#   PYTHON=...            interpreter, .venv/bin/python by default
set -euo pipefail
dry_run=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    *) echo "gpu_check.sh has no option '$1'" >&2; exit 2 ;;
  esac
  shift
done
table=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/results/gpu_$(date +%F).md}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -r -a sizes <<<"${SIZES:-135M 360M 1B}"

check=(env "PYTHONPATH=$PWD" "${PYTHON:-.venv/bin/python}" tests/benchmarks/accelerator.py)
failed=0
run() {  # a part of the table, or a row that says that it failed
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  elif ! "$@" 2> >(tail -n 20 >&2); then
    echo "| ${*:$#-1} | **failed** |"
    failed=1
  fi
}
all() {
  if [[ -z $dry_run ]]; then
    echo "$(date +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -n 1 || echo 'no nvidia-smi'),"
    echo "commit $(git rev-parse --short HEAD 2> /dev/null || cat COMMIT 2> /dev/null || echo unknown), \`launch/gpu_check.sh\`:"
  fi
  run "${check[@]}" parity
  for size in "${sizes[@]}"; do
    run "${check[@]}" --rows_only --pairs="${PAIRS:-8}" --length="${LENGTH:-1024}" --remat=block dpo "$size"
  done
  for size in "${sizes[@]}"; do
    run "${check[@]}" --rows_only --new=128 decode "$size"
  done
}
if [[ -n $dry_run ]]; then
  all
  exit
fi
mkdir -p "$(dirname "$table")"
all > "$table.part"
mv "$table.part" "$table"
cat "$table"
exit "$failed"
