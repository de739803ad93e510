#!/usr/bin/env bash
# Runs a config on this machine.
#
#   launch/local.sh [--dry_run] CONFIG WORKDIR [--config.key=value ...]
#
# Relative paths start at the root of the repository.
#
#   --dry_run        print the command instead
#   FAKE_DEVICES=8   split the CPU into 8 devices, to try a mesh
#   PYTHON=...       interpreter, .venv/bin/python by default
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options '' "$@"
arguments 2
config=${rest[0]} workdir=${rest[1]}

settings=(PYTHONUNBUFFERED=1)
if [[ -n ${FAKE_DEVICES:-} ]]; then
  settings+=(JAX_PLATFORMS=cpu)
  settings+=("XLA_FLAGS=--xla_force_host_platform_device_count=$FAKE_DEVICES ${XLA_FLAGS:-}")
fi
command=(env "${settings[@]}" "${PYTHON:-.venv/bin/python}"
  -m alignax.main --config "$config" --workdir "$workdir" "${rest[@]:2}")

cd "$root"
[[ -n $dry_run ]] || exec "${command[@]}"
run "${command[@]}"
