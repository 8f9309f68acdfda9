#!/usr/bin/env bash
# Collects in build/gpu_day what a GPU machine without a network lacks: the wheels below, for Python
# 3.12 on x86-64. Run it in a checkout on a machine with a network; git ignores the folder.
#   bash benchmarks/gpu_day/make_carry.sh
# The GPU machine has torch (2.11 or later, CUDA), numpy, scipy, safetensors, typer, rich and what
# they need. CARRIED names other packages, PYTHON the interpreter with pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3} carry=build/gpu_day
CARRIED=${CARRIED:-megatron-core hydra-core omegaconf pydantic pydantic_core annotated-types \
  typing-inspection typing_extensions webdataset braceexpand hjson}
from_source="deepspeed antlr4-python3-runtime" # pure Python here: no operation is compiled

mkdir -p "$carry"
rm -f "$carry"/*.whl

pinned() { # the version that this release is tested with
  local found
  found=$(grep -m 1 "^$1==" constraints.txt) || { echo "$1 is not in constraints.txt" >&2; exit 1; }
  echo "$found"
}
quietly() { "$@" 2> >(grep -v "^WARNING: Location" >&2); } # pip on configured folders that are empty
download() { # arguments of pip download, for the GPU machine
  local tag platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  quietly "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" -d "$carry" "$@"
}
pins=()
for name in $CARRIED; do pins+=("$(pinned "$name")"); done
download "${pins[@]}"

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
"$python" -m venv "$build/venv"
quietly "$build/venv/bin/pip" install -q --disable-pip-version-check 'setuptools<81' wheel packaging
pins=()
for name in $from_source; do pins+=("$(pinned "$name")"); done
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu
quietly "$build/venv/bin/pip" wheel -q --disable-pip-version-check \
  --no-deps --no-build-isolation --no-binary=:all: -w "$carry" "${pins[@]}"

git describe --always --dirty --abbrev=10 >"$carry/commit"
expected=$(wc -w <<<"$CARRIED $from_source")
count=$(find "$carry" -name '*.whl' | wc -l)
[ "$count" -eq "$expected" ] || { echo "expected $expected wheels, found $count" >&2; exit 1; }
bytes=$( (git ls-files -z --cached --others --exclude-standard; find "$carry" -type f -print0) |
  xargs -0 stat -c %s 2>/dev/null | awk '{s += $1} END {print s}')
echo "$count wheels in $carry; with the checkout $((bytes / 1048576)) MiB"
