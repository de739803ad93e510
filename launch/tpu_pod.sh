#!/usr/bin/env bash
# Runs a config on every worker of a TPU VM or pod slice: creates the slice, copies and
# installs the committed tree, starts one process per worker, and resumes after a preemption.
#
#   launch/tpu_pod.sh [options] TPU ZONE CONFIG gs://BUCKET/WORKDIR [--config.key=value ...]
#
#   --dry_run         print the commands instead
#   --create=TYPE     create the TPU if it does not exist, e.g. v5litepod-64; without this
#                     option the TPU must exist
#   --queued          create it as a queued resource of that name, and wait for it
#   --spot            use spare capacity, which may be preempted
#   --runtime=NAME    software version of the new VMs; by default Google's for TYPE
#   --retries=10      restarts: after a preemption (the TPU is created again), after a lost
#                     connection, and of a run that saved and ended with 75
#   --delete          delete the TPU when the run has ended
#   --poll=60         seconds between two checks of a TPU that is not ready, and before a
#                     restart
#   REMOTE_PYTHON=... interpreter on the workers, python3.11 by default (installed if the
#                     workers have none)
#
# Exit code: 0 if every worker succeeded; 75 if the run can be resumed but no retry is left;
# else that of a worker that failed. A run or an installation that fails while its TPU is
# ready is not retried. The script waits for capacity; after ten other errors of the cloud in
# a row it gives up. SIGTERM and Ctrl-C are forwarded: the run saves, and the script ends with
# 75. The output of the workers is appended to runs/TPU.log.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
create='' queued='' spot='' runtime='' retries=10 delete='' poll=60
options 'create= queued spot runtime= retries= delete poll=' "$@"
arguments 4
count retries
count poll
tpu=${rest[0]} zone=${rest[1]} config=${rest[2]} workdir=${rest[3]}
bucket "$workdir" workers
if [[ -n $create && -z $runtime ]]; then
  case $create in
    v4-*) runtime="tpu-ubuntu2204-base" ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) refuse "name the software for '$create' with --runtime=NAME" ;;
  esac
fi
[[ -z $queued || -n $create ]] || refuse "--queued makes a TPU: say which with --create=TYPE"

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
copied=("${vm[@]}" scp "$archive" launch/common.sh launch/tpu_worker.sh "$tpu:"
  "--zone=$zone" --worker=all)
there=("${vm[@]}" ssh "$tpu" "--zone=$zone" --worker=all --ssh-flag=-oServerAliveInterval=30)
printf -v work '%q ' bash tpu_worker.sh "${archive##*/}" "${REMOTE_PYTHON:-python3.11}" \
  --config "$config" --workdir "$workdir" --distributed "${rest[@]:4}"
started=("${there[@]}" "--command=${work% }")

cd "$root"
pack
if [[ -n $dry_run ]]; then
  if [[ -n $create ]]; then
    run "${made[@]}"
    run "${asked[@]}"
  fi
  run "${copied[@]}"
  run "${started[@]}"
  if [[ -n $delete ]]; then
    run "${removed[@]}"
  fi
  exit
fi

say() { echo "$script: $*" >&2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=runs/$tpu.log
running='' now='' blind=0 refused=0 copies=0

stop() {  # gcloud forwards no signal (in a trap a bare `return` has the signal's code)
  if [[ -z $running ]]; then
    tell
    return 0
  fi
  for _ in 1 2 3; do  # the connection may not be up yet
    if "${there[@]}" "--command=pkill -TERM -f '^bash tpu_worker[.]sh '"; then return 0; fi
    sleep 5
  done
  say "not every worker could be stopped; send the signal again if the run goes on"
}
pause() {
  follow sleep "$poll" || true
}
look() {  # sets now: the TPU's state, NONE if it does not exist, UNKNOWN after an error
  if now=$("${asked[@]}" 2> "$scratch/error"); then
    blind=0
  elif grep -q 'NOT_FOUND' "$scratch/error"; then
    now=NONE blind=0
  else
    now=UNKNOWN blind=$((blind + 1))
    say "the state of TPU $tpu is not known: $(head -n 1 "$scratch/error")"
  fi
}
change() {  # creates or deletes the TPU
  if "$@" 2> "$scratch/error"; then
    refused=0
    return
  fi
  cat "$scratch/error" >&2
  # "There is no more capacity in the zone": there may be later, so it does not count.
  grep -qi capacity "$scratch/error" || refused=$((refused + 1))
  return 1
}
obtain() {  # waits until the TPU is ready
  local broken=0
  blind=0 refused=0
  while [[ -z $stopped ]]; do
    look
    case $now in
      READY | ACTIVE) return ;;
      NONE)
        [[ -n $create ]] || { say "there is no TPU $tpu in $zone (--create=TYPE makes one)"; return 1; }
        change "${made[@]}" || say "not made yet; once more in $poll s" ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED)
        [[ -n $create ]] || { say "TPU $tpu is $now (--create=TYPE makes another)"; return 1; }
        say "TPU $tpu is $now"
        [[ $now != FAILED ]] || broken=$((broken + 1))
        change "${removed[@]}" || say "not deleted yet; once more in $poll s" ;;
      UNKNOWN) ;;
      *) say "TPU $tpu is $now" ;;
    esac
    if ((blind == 10 || refused == 10 || broken == 10)); then
      say "gave up on TPU $tpu in $zone: ten errors in a row"
      return 1
    fi
    pause
  done
  return 75
}
# shellcheck disable=SC2329
talk() {
  "${started[@]}" 2>&1 | tee -a "$log" "$scratch/output"
}
attempt() {  # copies and starts; sets code to that of the run, '' if the connection was lost
  local codes failed ended=0
  code=''
  if ! follow "${copied[@]}"; then
    copies=$((copies + 1))
    return
  fi
  copies=0
  [[ -z $stopped ]] || return 0
  echo "== $(date -u +%FT%TZ), commit $(< runs/COMMIT)" >> "$log"
  : > "$scratch/output"
  running=1
  follow talk || ended=$?
  running=''
  # gcloud's own exit code is not that of each worker.
  codes=$(sed -n 's/.*alignax: a worker ended with \([0-9]*\).*/\1/p' "$scratch/output" | sort -nu)
  # A worker that dies by a signal does so because another one is gone: the error is there.
  failed=$(awk '$1 > 0 && $1 != 75 && $1 < 128 { print; exit }' <<< "$codes")
  if [[ -n $failed ]]; then
    code=$failed
  elif [[ $codes == 0 && $ended == 0 ]]; then
    code=0
  elif [[ $codes == 75 || $codes == $'0\n75' ]]; then
    code=75
  fi
}

heed
for ((start = 1; ; start++)); do
  obtain || { code=$?; break; }
  attempt
  if [[ $code == 0 || -n $stopped ]]; then
    code=${code:-75}
    break
  fi
  look
  case $now in
    READY | ACTIVE | UNKNOWN)
      [[ -z $code || $code == 75 ]] || break
      ((copies < 3)) || { say "TPU $tpu took no copy, three times"; code=1; break; } ;;
    *) say "TPU $tpu was lost" ;;
  esac
  if ((start > retries)); then
    say "no retry is left of $retries; the same command goes on"
    code=75
    break
  fi
  say "start $((start + 1)) of $((retries + 1)) in $poll s"
  pause
done

if [[ -n $delete ]]; then
  look
  for _ in 1 2 3; do
    [[ $now != NONE ]] || break
    if change "${removed[@]}"; then now=NONE; else pause; fi
  done
  [[ $now == NONE ]] || say "TPU $tpu is NOT deleted: ${removed[*]}"
fi
exit "$code"
