#!/usr/bin/env bash
# Submits a config to a GKE cluster through xpk: one or several TPU slices, or GPU nodes.
#
#   launch/xpk.sh [options] CLUSTER WORKLOAD TYPE CONFIG gs://BUCKET/WORKDIR [--config.key=value ...]
#
# TYPE is a TPU slice (v5litepod-64) or a GPU machine (h100-mega-80gb-8). The committed tree
# is laid over the base image. GKE starts a run again that was preempted or that saved and
# ended with 75: it resumes from its workdir.
#
#   --dry_run           print the commands instead
#   --slices=1          TPU slices, or GPU nodes
#   --max_restarts=50   starts after the first
#   --priority=medium   very-low, low, medium, high or very-high
#   --image=NAME        base image, python:3.11 by default
#   --project=... --zone=...   where the cluster is; gcloud's own settings by default
#   --delete            delete the workload of that name instead
set -euo pipefail
dry_run='' slices=1 restarts=50 priority=medium image=python:3.11 delete='' where=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    --slices=*) slices=${1#*=} ;;
    --max_restarts=*) restarts=${1#*=} ;;
    --priority=*) priority=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --project=* | --zone=*) where+=("$1") ;;
    --delete) delete=1 ;;
    *) echo "xpk.sh has no option '$1'" >&2; exit 2 ;;
  esac
  shift
done
[[ $# -ge 5 || (-n $delete && $# -ge 2) ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
cluster=$1 workload=$2

if [[ -n $dry_run ]]; then
  run() { printf '%q ' "$@"; echo; }
else
  run() { "$@"; }
fi
target=(--cluster "$cluster" --workload "$workload" ${where[@]+"${where[@]}"})
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n $delete ]]; then
  run xpk workload delete "${target[@]}"
  exit
fi

type=$3 config=$4 workdir=$5
shift 5
if [[ $workdir != gs://* ]]; then
  echo "xpk.sh: workdir '$workdir' is not shared by the pods; give gs://BUCKET/PATH" >&2
  exit 2
fi
case $type in
  v[0-9]* | tpu*) machine=("--tpu-type=$type" "--num-slices=$slices") extra=tpu ;;
  *) machine=("--device-type=$type" "--num-nodes=$slices") extra=cuda ;;
esac
inside="pip install --quiet --editable '.[$extra]' && PYTHONUNBUFFERED=1 exec "
inside+=$(printf '%q ' python -m alignax.main --config "$config" --workdir "$workdir" --distributed "$@")

tree=runs/xpk
if [[ -n $(git status --porcelain 2> /dev/null) ]]; then
  echo "xpk.sh: what is not committed is not copied" >&2
fi
run rm -rf "$tree"
run mkdir -p "$tree"
if [[ -n $dry_run ]]; then
  echo "git archive HEAD | tar -x -C $tree"
  echo "git rev-parse HEAD > $tree/COMMIT"
else
  git archive HEAD | tar -x -C "$tree"
  git rev-parse HEAD > "$tree/COMMIT"
fi
run xpk workload create "${target[@]}" "${machine[@]}" \
  "--priority=$priority" "--max-restarts=$restarts" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  "--base-docker-image=$image" "--script-dir=$tree" "--command=${inside% }"
