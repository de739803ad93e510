#!/usr/bin/env bash
# Runs a config on every worker of a TPU VM or pod slice: copies the committed tree,
# installs it there and starts one process a worker.
#
#   launch/tpu_pod.sh TPU ZONE CONFIG gs://BUCKET/WORKDIR [--config.key=value ...]
#
# Start it again after a preemption: the run resumes from its workdir.
#
#   REMOTE_PYTHON=... interpreter on the workers, python3 by default (3.11 or newer)
#   DRY_RUN=1         print the commands instead
set -euo pipefail
[[ $# -ge 4 ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
tpu=$1 zone=$2 config=$3 workdir=$4
shift 4
if [[ $workdir != gs://* ]]; then
  echo "tpu_pod.sh: workdir '$workdir' is not shared by the workers; give gs://BUCKET/PATH" >&2
  exit 2
fi

archive=runs/alignax.tar.gz
main=(.venv/bin/python -m alignax.main --config "$config" --workdir "$workdir" --distributed "$@")
remote="set -e; mkdir -p alignax; tar -xzf ${archive##*/} -C alignax; cd alignax"
remote+="; ${REMOTE_PYTHON:-python3} -m venv .venv; .venv/bin/pip install --quiet --editable '.[tpu]'"
remote+="; $(printf '%q ' "${main[@]}")"
remote=${remote% }

do_or_print() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
do_or_print mkdir -p runs
do_or_print git archive --format=tar.gz --output="$archive" HEAD
do_or_print gcloud compute tpus tpu-vm scp "$archive" "$tpu:" --zone="$zone" --worker=all
do_or_print gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$remote"
