#!/usr/bin/env bash
# Install a wheel beside the locked packages in a fresh environment, and run the shipped digits in a folder of their own.
#   dist.sh FOLDER_WITH_THE_WHEEL
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
wheels=("$1"/secateur-*.whl)
uv=$root/.venv/bin/uv
[[ -x $uv ]] || { echo "uv is not installed here: not checked"; exit 0; }
folder=$(mktemp -d "$root/build/dist-XXXXXX") # beside .venv, so that files can be linked and not copied
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH

"$uv" venv -q --python "$root/.venv/bin/python" "$folder/venv"
export VIRTUAL_ENV=$folder/venv
"$uv" pip install -q --link-mode hardlink --only-binary :all: -r "$root/requirements.lock"
"$uv" pip install -q --no-deps "${wheels[0]}"
cd "$folder"
mkdir work && cd work
python=$folder/venv/bin/python
"$python" - "$folder/venv" <<'CODE'
import sys
from importlib.metadata import files
from pathlib import Path

import secateur

assert Path(secateur.__file__).is_relative_to(sys.argv[1]), secateur.__file__
names = [str(file) for file in files("secateur")]
assert any(name.endswith(".dist-info/sboms/secateur.cdx.json") for name in names), "the bill of materials is missing"
assert "secateur/py.typed" in names
CODE
digits=$("$python" -c 'from importlib.resources import files; print(files("secateur.pipeline.runs") / "digits.yaml")')
"$folder/venv/bin/secateur" run "$digits" --quiet --set baseline.epochs=1 --set finetune.epochs=1 --set finetune.top=1 \
  --set workload.model.name=cifar/resnet8 --set workload.data.image_size=8 --set search.method=global \
  --set search.images=64 --set device.probe=false --set gate.max_drop=1 --set gate.min_speedup=null
ls .secateur/runs/*/report.html
