#!/usr/bin/env bash
# tpu_pod.sh starts this script on every worker of a TPU, in its home folder. It ends the
# processes of an earlier start, unpacks the copied tree into alignax/, installs it and runs it.
#
#   bash tpu_worker.sh ARCHIVE PYTHON --config CONFIG --workdir WORKDIR [...]
#
# The last line is "alignax: a worker ended with CODE", also after a failed installation,
# since gcloud does not report the exit code of each worker. SIGTERM ends an installation; a
# run saves.
set -euo pipefail
{  # bash reads the whole block before it runs: the next start overwrites this file
  trap 'echo "alignax: a worker ended with $?"' EXIT
  # shellcheck source-path=SCRIPTDIR source=common.sh
  . "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  archive=$1 python=$2
  shift 2

  # Processes that a lost connection left running hold the TPU: they may save, then are killed.
  trap '' TERM
  pkill -TERM -f '^bash tpu_worker[.]sh ' || true
  heed
  old='^[.]venv/bin/python -m alignax[.]main '
  for _ in {1..12}; do
    pkill -TERM -f "$old" || break
    follow sleep 5
  done
  pkill -KILL -f "$old" || true

  # Only files of an earlier archive are replaced in alignax/: weights/, models/, runs/ stay.
  mkdir -p alignax
  brought=.brought
  if [[ -f alignax/$brought ]]; then
    (cd alignax && xargs -r -d '\n' rm -f -- < "$brought")
  fi
  tar -tzf "$archive" --quoting-style=literal | sed '/\/$/d' > "alignax/$brought"
  tar -xzf "$archive" -C alignax
  cd alignax

  if ! command -v "$python" > /dev/null; then
    locked=-oDPkg::Lock::Timeout=600  # a new VM updates itself
    follow sudo apt-get -qq "$locked" update
    follow sudo apt-get -qq "$locked" install -y "$python-venv"
  fi
  follow "$python" -m venv .venv
  follow .venv/bin/pip install --quiet --editable '.[tpu]'
  follow env PYTHONUNBUFFERED=1 .venv/bin/python -m alignax.main "$@"
  exit
}
