#!/usr/bin/env bash
# Everything that is to be measured on a machine with an NVIDIA GPU, in one command:
#   bash benchmarks/gpu_day/run.sh
# Steps in order of value, each with its own limit, all within BUDGET seconds; one that fails costs
# only itself. Settings are variables of the environment:
#   OUT      folder for results (runs/gpu_day): summary.txt facts.json smoke.json rows.json
#            kernels.txt science.json tests.txt log.txt
#   BUDGET   seconds (530)
#   MODE     rows, or science: autoregressive against masked on the texts of POOL
#   PLAN     rows to measure: a name in plans/ or a YAML file (full)
#   CPU=1    the same way without a GPU, on a tiny model: proves the scripts, figures mean nothing
#   CARRY    folder of make_carry.sh (build/gpu_day), where the machine has no network
#   SITE     folder for the packages in it, used again by the next run (default: a temporary one)
#   PYTHON   interpreter (python3)
# Ends with 0, with 1 where a step failed, with 3 where there is no GPU.
set -u
CPU=${CPU:-} MODE=${MODE:-rows} BUDGET=${BUDGET:-530}
whole() { echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; } # a path from the root
OUT=${OUT:-runs/gpu_day}
mkdir -p "$OUT" || exit 1
OUT=$(whole "$OUT") POOL=${POOL:+$(whole "$POOL")}
case ${PLAN:=${CPU:+cpu}} in *.yaml) PLAN=$(whole "$PLAN") ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
carry=${CARRY:-$PWD/build/gpu_day} python=${PYTHON:-python3} kit=benchmarks/gpu_day failed=0
if [ -z "$CPU" ] && ! nvidia-smi -L >/dev/null 2>&1 && [ ! -e /dev/nvidia0 ]; then
  echo "this machine has no NVIDIA GPU; CPU=1 proves the scripts" >&2
  exit 3
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=${SITE:-$work/site}
COMMIT=${COMMIT:-$(cat "$carry/commit" 2>/dev/null || echo unknown)} # where git does not know it
export COMMIT PYTHONUNBUFFERED=1 HYDRA_FULL_ERROR=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

step() { # step NAME LIMIT COMMAND...: run it, note how it ended
  local name=$1 limit=$2 begin=$SECONDS left=$((BUDGET - SECONDS)) code
  shift 2
  if [ "$left" -lt 15 ]; then
    echo "$name: skipped, $left s left" | tee -a "$OUT/summary.txt"
    failed=1
    return 2
  fi
  [ -z "$CPU" ] && [ "$limit" -lt "$left" ] || limit=$left
  echo "===== $name: $*" >>"$OUT/log.txt"
  # A killed compiler leaves files on which later runs fail: each step has a cache of its own.
  TORCHINDUCTOR_CACHE_DIR=$work/inductor/$name-$begin timeout -k 5 "$limit" "$@" >>"$OUT/log.txt" 2>&1
  code=$?
  echo "$name: exit $code after $((SECONDS - begin)) s (limit $limit)" | tee -a "$OUT/summary.txt"
  [ "$code" -eq 0 ] || failed=1
  return "$code"
}

rows() { # rows NAME LIMIT PLAN: measure; go on in a new process where one was lost in a row
  local name=$1 limit=$2 plan=$3 end=$((SECONDS + $2)) try code left
  for try in 1 2 3; do
    left=$((end - SECONDS))
    [ "$left" -gt 20 ] || break
    step "$name" "$left" "$python" benchmarks/gpu_step.py --plan "$plan" ${CPU:+--dry-run} \
      --seconds $((left - limit / 8)) --row-seconds $((limit * 2 / 3)) --go-on \
      --json "$OUT/$name.json" --kernels "$OUT/kernels.txt"
    code=$?
    case $code in 0 | 2 | 3 | 5) break ;; esac # its own words: nothing is left to measure
    echo "$name: try $try was lost" >>"$OUT/log.txt"
  done
  "$python" "$kit/table.py" "$OUT/$name.json" 2>>"$OUT/log.txt" | tee -a "$OUT/summary.txt"
}

gpu_tests() { # gpu_tests NAME LIMIT FOLDER: those that need an NVIDIA GPU
  local files
  mapfile -t files < <(grep -rlE "mark\.gpu" "$3" --include='test_*.py' | sort)
  step "$1" "$2" "$python" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}"
}

: >"$OUT/summary.txt"
: >"$OUT/log.txt"
rm -f "$OUT"/{facts,smoke,rows,science}.json "$OUT"/{kernels,tests}.txt
[ -n "$CPU" ] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit \
  --format=csv,noheader >>"$OUT/summary.txt" 2>&1
if compgen -G "$carry/*.whl" >/dev/null && [ ! -e "$site/complete" ]; then
  step install 90 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$site" "$carry"/*.whl && touch "$site/complete" || exit 1
fi
export PYTHONPATH="$site:$PWD:$PWD/benchmarks:${PYTHONPATH:-}"
step facts 60 "$python" "$kit/facts.py" --json "$OUT/facts.json" ${CPU:+--device cpu}
if [ "$MODE" = science ]; then
  limit=$((BUDGET - SECONDS - 10))
  step science "$limit" "$python" "$kit/science.py" --json "$OUT/science.json" \
    --pool "${POOL:-$carry/pool}" --seconds $((limit - 30)) \
    ${CPU:+--device cpu --model tiny --unique-tokens 2048 --epochs 2 4}
else
  [ -n "$CPU" ] || rows smoke 120 smoke
  rows rows 300 "${PLAN:-full}"
  if [ -z "$CPU" ] && "$python" -c "import pytest" 2>/dev/null; then
    gpu_tests tests 150 tests/unit
    gpu_tests memory 90 tests/distributed
    grep -aE "passed|skipped|failed|FAILED|ERROR|^E  " "$OUT/log.txt" | tail -60 >"$OUT/tests.txt"
  fi
fi
tail -c 8000000 "$OUT/log.txt" >"$work/log.txt" && mv "$work/log.txt" "$OUT/log.txt"
exit "$failed"
