#!/usr/bin/env bash
# Runs a config on every worker of a TPU VM or pod slice: gets the slice, copies the
# committed tree, installs it there, starts one process a worker, and goes on after a
# preemption.
#
#   launch/tpu_pod.sh [options] TPU ZONE CONFIG gs://BUCKET/WORKDIR [--config.key=value ...]
#
#   --dry_run         print the commands instead
#   --create=TYPE     make the TPU if it is not there, e.g. v5litepod-64; without it the
#                     TPU has to be there
#   --queued          make it as a queued resource of that name, and wait for it
#   --spot            of spare capacity, which may be preempted
#   --runtime=NAME    software of the new VMs; by default what Google names for TYPE
#   --retries=10      starts after the first: of a preempted TPU, which is made anew, of a
#                     lost connection, and of a run that saved and ended with 75
#   --delete          delete the TPU when the run has ended
#   --poll=60         seconds between two looks at a TPU that is not ready
#   REMOTE_PYTHON=... interpreter on the workers, python3.11 by default (installed if the
#                     workers have none)
#
# Exit code: 0 if every worker ended well, 75 if the run wants to go on but no retry is
# left, else that of a worker that failed. A run that fails without losing its TPU is not
# tried again.
set -euo pipefail
dry_run='' create='' queued='' spot='' runtime='' retries=10 delete='' poll=60
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    --create=*) create=${1#*=} ;;
    --queued) queued=1 ;;
    --spot) spot=1 ;;
    --runtime=*) runtime=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --delete) delete=1 ;;
    --poll=*) poll=${1#*=} ;;
    *) echo "tpu_pod.sh has no option '$1'" >&2; exit 2 ;;
  esac
  shift
done
[[ $# -ge 4 ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
tpu=$1 zone=$2 config=$3 workdir=$4
shift 4
if [[ $workdir != gs://* ]]; then
  echo "tpu_pod.sh: workdir '$workdir' is not shared by the workers; give gs://BUCKET/PATH" >&2
  exit 2
fi
if [[ -n $create && -z $runtime ]]; then
  case $create in
    v4-*) runtime="tpu-ubuntu2204-base" ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) echo "tpu_pod.sh: name the software for '$create' with --runtime=NAME" >&2; exit 2 ;;
  esac
fi
if [[ -n $queued && -z $create ]]; then
  echo "tpu_pod.sh: --queued makes a TPU: say which with --create=TYPE" >&2
  exit 2
fi

vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
if [[ -n $queued ]]; then
  made=("${queue[@]}" create "$tpu" "--node-id=$tpu" "--zone=$zone"
    "--accelerator-type=$create" "--runtime-version=$runtime")
  asked=("${queue[@]}" describe "$tpu" "--zone=$zone" "--format=value(state.state)")
  removed=("${queue[@]}" delete "$tpu" "--zone=$zone" --force --quiet)
else
  made=("${vm[@]}" create "$tpu" "--zone=$zone"
    "--accelerator-type=$create" "--version=$runtime")
  asked=("${vm[@]}" describe "$tpu" "--zone=$zone" "--format=value(state)")
  removed=("${vm[@]}" delete "$tpu" "--zone=$zone" --quiet)
fi
if [[ -n $spot ]]; then
  made+=(--spot)
fi

archive=runs/alignax.tar.gz
main=(.venv/bin/python -m alignax.main --config "$config" --workdir "$workdir" --distributed "$@")
python=${REMOTE_PYTHON:-python3.11}
# What a lost connection left running holds the TPU: it is asked to save, then killed.
old="'^[.]venv/bin/python -m alignax[.]main'"
remote="set -e; for i in \$(seq 12); do pkill -TERM -f $old || break; sleep 5; done"
remote+="; pkill -KILL -f $old || true"
remote+="; mkdir -p alignax; find alignax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
remote+="; tar -xzf ${archive##*/} -C alignax; cd alignax"
remote+="; command -v $python > /dev/null || { sudo apt-get -qq update; sudo apt-get -qq install -y $python-venv; }"
remote+="; $python -m venv .venv; .venv/bin/pip install --quiet --editable '.[tpu]'"
remote+="; code=0; PYTHONUNBUFFERED=1 $(printf '%q ' "${main[@]}")|| code=\$?"
remote+="; echo \"alignax: a worker ended with \$code\"; exit \$code"

if [[ -n $dry_run ]]; then
  run() { printf '%q ' "$@"; echo; }
else
  run() { "$@"; }
fi

state() {  # READY or ACTIVE, '' of none
  "${asked[@]}" 2> /dev/null || true
}
obtain() {  # until the TPU is there
  local now
  while :; do
    now=$(state)
    case $now in
      READY | ACTIVE) return ;;
      '')
        [[ -n $create ]] || { echo "tpu_pod.sh: there is no TPU $tpu in $zone (--create=TYPE makes one)" >&2; exit 1; }
        run "${made[@]}" || echo "tpu_pod.sh: not made yet; once more in $poll s" >&2 ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED)
        [[ -n $create ]] || { echo "tpu_pod.sh: TPU $tpu is $now (--create=TYPE makes another)" >&2; exit 1; }
        run "${removed[@]}" || true
        continue ;;
      *) echo "tpu_pod.sh: TPU $tpu is $now" >&2 ;;
    esac
    [[ $(state) =~ ^(READY|ACTIVE)$ ]] || sleep "$poll"
  done
}
sync() {
  run "${vm[@]}" scp "$archive" "$tpu:" "--zone=$zone" --worker=all
}
start=("${vm[@]}" ssh "$tpu" "--zone=$zone" --worker=all
  --ssh-flag=-oServerAliveInterval=30 "--command=$remote")

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n $(git status --porcelain 2> /dev/null) ]]; then
  echo "tpu_pod.sh: what is not committed is not copied" >&2
fi
run mkdir -p runs
if [[ -n $dry_run ]]; then
  echo "git rev-parse HEAD > runs/COMMIT"
else
  git rev-parse HEAD > runs/COMMIT
fi
run git archive --format=tar.gz --add-file=runs/COMMIT "--output=$archive" HEAD
if [[ -n $dry_run ]]; then
  if [[ -n $create ]]; then
    run "${made[@]}"
    run "${asked[@]}"
  fi
  sync
  run "${start[@]}"
  if [[ -n $delete ]]; then
    run "${removed[@]}"
  fi
  exit
fi

log=runs/$tpu.log
for ((attempt = 0; ; attempt++)); do
  obtain
  lost='' code=0
  if sync; then
    "${start[@]}" 2>&1 | tee "$log" || lost=1
    # gcloud's own exit code does not say which worker ended how.
    codes=$(sed -n 's/.*alignax: a worker ended with \([0-9]*\).*/\1/p' "$log" | sort -nu)
    # What dies by a signal dies because another worker is gone: the failure is elsewhere.
    failed=$(awk '$1 > 0 && $1 != 75 && $1 < 128' <<<"$codes" | head -n 1)
    if [[ -n $failed ]]; then
      code=$failed
    elif [[ $codes == 0 && -z $lost ]]; then
      break
    elif [[ $codes == 75 || $codes == $'0\n75' ]]; then
      code=75
    else
      lost=1  # a worker said nothing
    fi
  else
    lost=1
  fi
  case $(state) in
    READY | ACTIVE) [[ $code == 75 || (-n $lost && $code == 0) ]] || break ;;
    *) echo "tpu_pod.sh: TPU $tpu was lost" >&2 ;;
  esac
  if ((attempt >= retries)); then
    echo "tpu_pod.sh: no retry is left of $retries; the same command goes on" >&2
    [[ $code != 0 ]] || code=75
    break
  fi
  echo "tpu_pod.sh: start $((attempt + 2)) of $((retries + 1))" >&2
done
if [[ -n $delete ]]; then
  run "${removed[@]}"
fi
exit "$code"
