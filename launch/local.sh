#!/usr/bin/env bash
# Runs a config on this machine.
#
#   launch/local.sh [--dry_run] CONFIG WORKDIR [--config.key=value ...]
#
# Relative paths start at the root of the repository.
#
#   --dry_run        print the command instead
#   FAKE_DEVICES=8   pretend that the CPU is 8 devices, to try a mesh
#   PYTHON=...       interpreter, .venv/bin/python by default
set -euo pipefail
dry_run=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    *) echo "local.sh has no option '$1'" >&2; exit 2 ;;
  esac
  shift
done
[[ $# -ge 2 ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
config=$1 workdir=$2
shift 2

settings=(PYTHONUNBUFFERED=1)
if [[ -n ${FAKE_DEVICES:-} ]]; then
  settings+=(JAX_PLATFORMS=cpu)
  settings+=("XLA_FLAGS=--xla_force_host_platform_device_count=$FAKE_DEVICES ${XLA_FLAGS:-}")
fi
command=(env "${settings[@]}" "${PYTHON:-.venv/bin/python}"
  -m alignax.main --config "$config" --workdir "$workdir" "$@")

if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${command[@]}"
