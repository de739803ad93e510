#!/usr/bin/env bash
# What the scripts of this folder share: they source it. Options, --dry_run, the committed
# tree as an archive, and children that are told when the script is told to stop.
# shellcheck disable=SC2034
set -euo pipefail
script=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=''

usage() {  # the comment at the head of the script
  sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
}
refuse() {  # one line, before anything was done
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
arguments() {  # ends with the usage where there are fewer than so many
  [[ ${#rest[@]} -ge $1 ]] || { usage >&2; exit 2; }
}
count() {  # count NAME: refuses an option that is not a whole number
  [[ ${!1} =~ ^(0|[1-9][0-9]*)$ ]] || refuse "--$1=${!1} is not a whole number"
}
bucket() {  # bucket WORKDIR WHO: refuses a workdir that they do not share
  [[ $1 == gs://* ]] || refuse "workdir '$1' is not shared by the $2; give gs://BUCKET/PATH"
}

run() {  # a command; with --dry_run what to type for it
  local line
  if [[ -n $dry_run ]]; then
    printf -v line '%q ' "$@"
    echo "${line% }"
  else
    "$@"
  fi
}

archive=runs/alignax.tar.gz
pack() {  # the committed tree, with its commit's name as the file COMMIT; in the root
  [[ -z $(git status --porcelain 2> /dev/null) ]] || echo "$script: what is not committed is not copied" >&2
  run mkdir -p runs
  if [[ -n $dry_run ]]; then
    echo "git rev-parse HEAD > runs/COMMIT"
  else
    git rev-parse HEAD > runs/COMMIT
  fi
  run git archive --format=tar.gz --add-file=runs/COMMIT "--output=$archive" HEAD
}

# A script with children calls `heed` and starts them in the background; TERM and Ctrl-C
# then call its `stop`, and `await` still says how they ended.
stopped=''  # 1 once the script was told to stop
told=''
children=()
# A child has this script's handler for a moment after the fork: TERM would be lost on it.
tell() {
  [[ ${#children[@]} != 0 ]] || return 0
  sleep 0.5 || true  # a signal to the whole group ends it
  kill -TERM "${children[@]}" 2> /dev/null || true
}
stop() { tell; }
heed() {
  trap 'stopped=1 told=1; stop' TERM INT
}
await() {  # await PID: its exit code
  local code=0
  wait "$1" || code=$?
  while [[ -n $told ]]; do  # a signal may have ended only the waiting
    told='' code=0
    wait "$1" || code=$?
  done
  return "$code"
}
follow() {  # a command that is told to stop when the script is; its exit code
  local code=0
  "$@" <&0 &
  children=($!)
  [[ -z $stopped ]] || stop
  await "${children[0]}" || code=$?
  children=()
  return "$code"
}
