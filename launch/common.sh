#!/usr/bin/env bash
# Functions that the scripts of this folder source: options, --dry_run, the committed tree as
# an archive, and child processes that get the script's signals.
# shellcheck disable=SC2034
set -euo pipefail
script=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=''

usage() {  # prints the comment at the head of the script
  sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
}
refuse() {  # ends with one line on stderr, before anything is done
  echo "$script: $*" >&2
  exit 2
}
options() {  # options 'spot retries=' "$@": sets $spot and $retries, and $rest to what is left
  local known=" dry_run $1 " name
  shift
  while [[ ${1:-} == -* ]]; do
    case $1 in
      -h | --help) usage; exit ;;
      --*=*) name=${1%%=*}= ;;
      *) name=$1 ;;
    esac
    [[ $name == --* && $known == *" ${name#--} "* ]] || { echo "$script has no option '$1'" >&2; exit 2; }
    name=${name#--}
    if [[ $name == *= ]]; then
      printf -v "${name%=}" %s "${1#*=}"
    else
      printf -v "$name" 1
    fi
    shift
  done
  rest=("$@")
}
arguments() {  # arguments N: ends with the usage if there are fewer than N
  [[ ${#rest[@]} -ge $1 ]] || { usage >&2; exit 2; }
}
count() {  # count NAME: refuses an option that is not a whole number
  [[ ${!1} =~ ^(0|[1-9][0-9]*)$ ]] || refuse "--$1=${!1} is not a whole number"
}
bucket() {  # bucket WORKDIR PROCESSES: refuses a workdir that these do not share
  [[ $1 == gs://* ]] || refuse "workdir '$1' is not shared by the $2; give gs://BUCKET/PATH"
}

run() {  # runs a command; with --dry_run prints it
  local line
  if [[ -n $dry_run ]]; then
    printf -v line '%q ' "$@"
    echo "${line% }"
  else
    "$@"
  fi
}

archive=runs/alignax.tar.gz
pack() {  # archives the committed tree, with the commit in the file COMMIT; in the root
  [[ -z $(git status --porcelain 2> /dev/null) ]] || echo "$script: what is not committed is not copied" >&2
  run mkdir -p runs
  if [[ -n $dry_run ]]; then
    echo "git rev-parse HEAD > runs/COMMIT"
  else
    git rev-parse HEAD > runs/COMMIT
  fi
  run git archive --format=tar.gz --add-file=runs/COMMIT "--output=$archive" HEAD
}

# A script with children calls `heed` and starts them in the background. TERM and Ctrl-C
# then call `stop`, and `await` still returns their exit codes.
stopped=''  # 1 after the first signal
signalled=''  # 1 after a signal, until `await` has seen it
children=()
# sends TERM to the children; right after a fork a child still has this script's handler and
# would ignore it
tell() {
  [[ ${#children[@]} != 0 ]] || return 0
  sleep 0.5 || true  # a signal to the whole process group ends this sleep
  kill -TERM "${children[@]}" 2> /dev/null || true
}
stop() { tell; }
heed() {
  trap 'stopped=1 signalled=1; stop' TERM INT
}
await() {  # await PID: returns its exit code
  local code=0
  wait "$1" || code=$?
  while [[ -n $signalled ]]; do  # the signal may have interrupted `wait`, not the child
    signalled='' code=0
    wait "$1" || code=$?
  done
  return "$code"
}
follow() {  # runs a command that gets the script's TERM; returns its exit code
  local code=0
  "$@" <&0 &
  children=($!)
  [[ -z $stopped ]] || stop
  await "${children[0]}" || code=$?
  children=()
  return "$code"
}
