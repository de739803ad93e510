#!/usr/bin/env bash
# Checks one GPU: the kernel against float64, DPO steps in bfloat16 at 135M to 1B, decoding.
#
#   launch/gpu_check.sh [--dry_run] [TABLE]
#
# Writes one Markdown table, to launch/results/gpu_DATE.md by default: commit it. Each size
# runs in its own process, so that its peak memory is measured alone. A size that does not fit
# or fails has a row that reports it, and the exit code is 1; so it is if a difference exceeds
# the kernel's bounds. If jax finds no GPU, nothing is measured and the exit code is 1.
#
#   --dry_run             print the commands instead
#   SIZES="135M 360M 1B"  SIZES=tiny is for a CPU, its table runs/gpu_tiny.md
#   PAIRS=8 LENGTH=1024   of a DPO step
#   PYTHON=...            interpreter, .venv/bin/python by default
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options '' "$@"
read -r -a sizes <<< "${SIZES:-135M 360M 1B}"
results=$root/launch/results/gpu_$(date +%F).md
[[ ${sizes[*]} != tiny ]] || results=$root/runs/gpu_tiny.md
table=$(realpath -m "${rest[0]:-$results}")
cd "$root"

python=${PYTHON:-.venv/bin/python}
backend=("$python" -c 'import jax; print(jax.default_backend())')
check=(env "PYTHONPATH=$PWD" "$python" tests/benchmarks/accelerator.py)
failed=0
part() {  # prints a part of the table, or a row that reports the failure
  if [[ -n $dry_run ]]; then
    run "$@"
  elif ! "$@" 2> >(tail -n 20 >&2); then
    echo "| ${*:$#-1} | **failed** |"
    failed=1
  fi
}
all() {
  part "${check[@]}" parity
  for size in "${sizes[@]}"; do
    part "${check[@]}" --rows_only --pairs="${PAIRS:-8}" --length="${LENGTH:-1024}" --remat=block dpo "$size"
  done
  for size in "${sizes[@]}"; do
    part "${check[@]}" --rows_only --new=128 decode "$size"
  done
}
if [[ -n $dry_run ]]; then
  [[ ${sizes[*]} == tiny ]] || run "${backend[@]}"
  all
  exit
fi
if [[ ${sizes[*]} != tiny ]]; then
  found=$("${backend[@]}")
  if [[ $found != gpu ]]; then
    echo "gpu_check.sh: jax runs on '$found' here, not on a GPU (SIZES=tiny needs none)" >&2
    exit 1
  fi
fi
mkdir -p "$(dirname "$table")"
{
  echo "$(date +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -n 1 || echo 'no nvidia-smi'),"
  echo "commit $(git rev-parse --short HEAD 2> /dev/null || cat COMMIT 2> /dev/null || echo unknown), \`launch/gpu_check.sh\`:"
  all
} > "$table.part"
mv "$table.part" "$table"
cat "$table"
exit "$failed"
