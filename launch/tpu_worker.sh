#!/usr/bin/env bash
# What tpu_pod.sh starts on every worker of a TPU, in its home folder: ends what an earlier
# start left there, lays the copied tree over alignax/, installs it and runs it.
#
#   bash tpu_worker.sh ARCHIVE PYTHON --config CONFIG --workdir WORKDIR [...]
#
# The last line is "alignax: a worker ended with CODE", of a failed installation too: gcloud
# does not say which worker ended how. SIGTERM ends an installation, and a run saves.
set -euo pipefail
{  # read to its end before anything runs: the next start overwrites this file
  trap 'echo "alignax: a worker ended with $?"' EXIT
  # shellcheck source-path=SCRIPTDIR source=common.sh
  . "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  archive=$1 python=$2
  shift 2

  # What a lost connection left running holds the TPU: it is asked to save, then killed.
  trap '' TERM
  pkill -TERM -f '^bash tpu_worker[.]sh ' || true
  heed
  old='^[.]venv/bin/python -m alignax[.]main '
  for _ in {1..12}; do
    pkill -TERM -f "$old" || break
    follow sleep 5
  done
  pkill -KILL -f "$old" || true

  # Of alignax/ only what an archive brought is replaced: weights/, models/ and runs/ stay.
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
