#!/usr/bin/env bash
# Submits a config to a GKE cluster through xpk: one or several TPU slices, or GPU nodes.
#
#   launch/xpk.sh [options] CLUSTER WORKLOAD TYPE CONFIG gs://BUCKET/WORKDIR [--config.key=value ...]
#
# TYPE is a TPU slice (v5litepod-64) or a GPU machine (h100-mega-80gb-8). The committed tree
# is added to the base image. GKE restarts a run that was preempted, or that saved and ended
# with 75; it resumes from its workdir.
#
#   --dry_run           print the commands instead
#   --slices=1          TPU slices, or GPU nodes
#   --max_restarts=50   restarts after the first start
#   --priority=medium   very-low, low, medium, high or very-high
#   --image=NAME        base image, python:3.11 by default
#   --project=... --zone=...   where the cluster is; gcloud's own settings by default
#   --delete            delete the workload of that name instead
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
slices=1 max_restarts=50 priority=medium image=python:3.11 project='' zone='' delete=''
options 'slices= max_restarts= priority= image= project= zone= delete' "$@"
arguments $((${#delete} ? 2 : 5))
count slices
count max_restarts
cluster=${rest[0]} workload=${rest[1]}

target=(--cluster "$cluster" --workload "$workload")
[[ -z $project ]] || target+=("--project=$project")
[[ -z $zone ]] || target+=("--zone=$zone")
cd "$root"
if [[ -n $delete ]]; then
  run xpk workload delete "${target[@]}"
  exit
fi

type=${rest[2]} config=${rest[3]} workdir=${rest[4]}
bucket "$workdir" pods
case $type in
  v[0-9]* | tpu*) machine=("--tpu-type=$type" "--num-slices=$slices") packages="'.[tpu]'" ;;
  *) machine=("--device-type=$type" "--num-nodes=$slices") packages="'.[cuda]' 'jax[k8s]'" ;;
esac
inside="pip install --quiet --editable $packages && PYTHONUNBUFFERED=1 exec "
inside+=$(printf '%q ' python -m alignax.main --config "$config" --workdir "$workdir" --distributed "${rest[@]:5}")

tree=runs/xpk
pack
run rm -rf "$tree"
run mkdir -p "$tree"
run tar -xzf "$archive" -C "$tree"
run xpk workload create "${target[@]}" "${machine[@]}" \
  "--priority=$priority" "--max-restarts=$max_restarts" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  "--base-docker-image=$image" "--script-dir=$tree" "--command=${inside% }"
