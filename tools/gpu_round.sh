#!/usr/bin/env bash
# One round on a GPU machine: tests, sanitizers, benchmarks and the demo, from a checkout with a built library.
#
#   OUT=DIR tools/gpu_round.sh [--quick] [STAGE...]        stages: tests sanitize bench demo (default: all four)
#
# Builds nothing, fetches nothing, changes nothing on the card. Each stage has its own time limit and log under $OUT (at
# most eight files in all); a stage that fails or runs out of time does not stop the next. The last thing printed is a
# short table. Exit code 0 when every stage is fine, 1 otherwise, 2 for bad arguments, 75 where TESTS_KEPT is set and the
# time was too short for all test modules: call again.
#
# Environment (default):
#   OUT            folder of the logs and JSON files (a folder under $TMPDIR)
#   PYTHON         interpreter with torch (python3)
#   DFLASH_COMMIT  commit named in the rows (the checkout's own; set it where .git is missing or stale)
#   TESTS_LIMIT SANITIZE_LIMIT BENCH_LIMIT DEMO_LIMIT   seconds of a stage (240 120 170 120)
#   TEST_MODULES   test modules to run (every one that has GPU tests)
#   MODULE_LIMIT   seconds of one test module (90)
#   TEST_WORKERS   processes of one module, where pytest-xdist is installed (a quarter of the cores, at most 6)
#   TEST_JOBS      modules at a time (4; 2 of several processes)
#   TESTS_KEPT     folder of the modules' logs; modules that ended in an earlier call with it are not run again (none)
#   SANITIZE_ARGS  further arguments of tools/sanitize.py (none)
#   BENCH_SUITES   suites of the bench stage (verify alloc gemm head inject draft dflash2)
#   DFLASH_DEMO_GGUF   the demo target's GGUF file where its package is not installed
#   ACCEPT_PROMPTS     JSON file of prompts (`python -m bench.acceptance --write-prompts`); without it the installed sets
#   ACCEPT_LIMIT       prompts a set (32)
set -u -o pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

quick=""
stages=()
for argument in "$@"; do
  case "$argument" in
    --quick) quick="--quick" ;;
    -h | --help) usage && exit 0 ;;
    tests | sanitize | bench | demo) stages+=("$argument") ;;
    *) echo "gpu_round: unknown argument $argument; stages: tests sanitize bench demo" >&2 && exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(tests sanitize bench demo)
cd "$(dirname "$0")/.." || exit 2
if [ ! -f dflash_kernels/_C.abi3.so ]; then
  echo "gpu_round: dflash_kernels/_C.abi3.so is not there: build it first (make dev)" >&2
  exit 2
fi

OUT=${OUT:-${TMPDIR:-/tmp}/gpu_round}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
table="$work/table"
failed=0
unfinished=0

# row STAGE VERDICT SECONDS TEXT...: one line of the final table.
row() {
  printf '%-9s %-8s %5ss  %s\n' "$1" "$2" "$3" "${*:4}" >>"$table"
  [ "$2" = ok ] || [ "$2" = skipped ] || failed=1
}

detail() { sed 's/^/            /' >>"$table"; }

# verdict CODE: what an exit code of `timeout` says.
verdict() {
  case "$1" in
    0) echo ok ;;
    75 | 124 | 137) echo TIMEOUT ;;
    *) echo FAILED ;;
  esac
}

# One module in its own processes: a kernel that faults or hangs takes no other module with it.
test_module() {
  local name started=$SECONDS code limit left=$((TESTS_END - $(date +%s)))
  name=$(basename "$1" .py)
  ! grep -q "^$name " "$2/summary" && [ "$left" -ge 10 ] || return 0
  limit=$((left < MODULE_LIMIT ? left : MODULE_LIMIT))
  # shellcheck disable=SC2086  # WORKERS is a list
  timeout -k 5 "$limit" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --tb=short --maxfail=25 --durations=3 \
    $WORKERS "$1" >"$2/$name.log" 2>&1
  code=$?
  case "$code" in
    124 | 137) [ "$limit" -eq "$MODULE_LIMIT" ] || return 0 ;; # the stage's limit, not the module's
    143) return 0 ;;                                           # ended from outside
  esac
  echo "$name $code $((SECONDS - started)) $(grep -E '[0-9]+ (passed|failed|error|skipped)' "$2/$name.log" |
    tail -1 | tr -d '=')" >>"$2/summary"
}

stage_tests() {
  local started=$SECONDS logs="${TESTS_KEPT:-$work/tests}" cores at_once modules bad passed left name code=0
  cores=$(nproc)
  TEST_WORKERS=${TEST_WORKERS:-$((cores < 24 ? cores / 4 : 6))}
  export WORKERS=""
  [ "$TEST_WORKERS" -lt 2 ] || ! "$PYTHON" -c 'import xdist' 2>/dev/null || WORKERS="-n $TEST_WORKERS"
  export MODULE_LIMIT=${MODULE_LIMIT:-90} TESTS_END=$(($(date +%s) + ${TESTS_LIMIT:-240})) PYTHON
  [ -n "$WORKERS" ] && at_once=2 || at_once=4 # modules, and threads of a process
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$at_once}
  export -f test_module
  mkdir -p "$logs" && touch "$logs/summary"
  # GPU tests have the marker gpu or the fixture device; the large modules first, which take longest.
  modules=${TEST_MODULES:-$(grep -lE 'mark\.gpu|device: str' python_tests/test_*.py | xargs ls -S)}
  # shellcheck disable=SC2086  # a list
  printf '%s\n' $modules |
    xargs -P "${TEST_JOBS:-$at_once}" -I {} bash -c 'test_module "$1" "$2"' - {} "$logs"
  left=$(for name in $modules; do
    name=$(basename "$name" .py)
    grep -q "^$name " "$logs/summary" || echo "$name did not run or did not end"
  done)
  for log in "$logs"/*.log; do
    printf '\n######## %s\n' "$(basename "$log" .log)" && cat "$log"
  done >"$OUT/tests.log"
  # 5: pytest found no GPU test in the module.
  bad=$(awk '$2 != 0 && $2 != 5' "$logs/summary" | wc -l)
  passed=$(grep -oE '[0-9]+ passed' "$logs/summary" | awk '{n += $1} END {print n + 0}')
  [ "$bad" -eq 0 ] && [ "$passed" -gt 0 ] || code=1 # none passed: no GPU was seen
  [ -z "$left" ] || code=124
  [ -z "$left" ] || [ -z "${TESTS_KEPT:-}" ] || unfinished=1
  row tests "$(verdict $code)" $((SECONDS - started)) \
    "$passed passed in $(awk '$2 != 5' "$logs/summary" | wc -l) modules with GPU tests," \
    "$bad modules not clean${left:+, $(wc -l <<<"$left") not run to their end} (tests.log)"
  awk '$2 != 5' "$logs/summary" | sort | while read -r name code seconds text; do
    printf '%-24s %-7s %4ss %s\n' "$name" "$(verdict "$code")" "$seconds" "$text"
  done | detail
  [ -z "$left" ] || detail <<<"$left"
  grep -hE '^(FAILED|ERROR) ' "$logs"/*.log | cut -c 1-200 | head -40 | detail
}

stage_sanitize() {
  local started=$SECONDS limit=${SANITIZE_LIMIT:-120} logs="$work/sanitize" code
  mkdir -p "$logs"
  # Its own limit ends first: the sanitizers are in sessions of their own, which this one's would not reach.
  # shellcheck disable=SC2086  # SANITIZE_ARGS is a list
  timeout -k 5 "$limit" "$PYTHON" tools/sanitize.py --out "$logs" --time-limit $((limit - 20)) ${SANITIZE_ARGS:-} \
    >"$OUT/sanitize.log" 2>&1
  code=$?
  tail -40 "$OUT/sanitize.log" | cut -c 1-200 >"$logs/short"
  for log in "$logs"/*.log; do
    [ -f "$log" ] && printf '\n######## %s\n' "$(basename "$log" .log)" && cat "$log"
  done >>"$OUT/sanitize.log"
  row sanitize "$(verdict $code)" $((SECONDS - started)) "sanitize.log:"
  detail <"$logs/short"
}

# A run that lost its device (exit code 3) goes on with the suites not started, in a fresh process.
stage_bench() {
  local started=$SECONDS limit=${BENCH_LIMIT:-170} code suites left file="$OUT/bench.json"
  suites=${BENCH_SUITES:-verify alloc gemm head inject draft dflash2}
  # shellcheck disable=SC2086  # lists
  timeout -k 5 "$limit" "$PYTHON" -m bench $suites $quick --time-limit $((limit - 15)) --json "$file" 2>&1 |
    tee "$OUT/bench.log"
  code=$?
  left=$("$PYTHON" -m bench.results --remaining "$file" 2>>"$OUT/bench.log")
  if [ $code -ne 0 ] && [ -n "$left" ] && [ $((limit - (SECONDS - started))) -gt 30 ]; then
    limit=$((limit - (SECONDS - started)))
    # shellcheck disable=SC2086
    timeout -k 5 "$limit" "$PYTHON" -m bench $left $quick --time-limit $((limit - 15)) --json "$OUT/bench_2.json" 2>&1 |
      tee -a "$OUT/bench.log"
  fi
  row bench "$(verdict $code)" $((SECONDS - started)) "$suites"
  grep -E '^# .*(geomean|ceilings|rows,|device lost)|^  (ERROR|SKIPPED)' "$OUT/bench.log" | cut -c 1-200 | head -60 | detail
}

stage_demo() {
  local started=$SECONDS limit=${DEMO_LIMIT:-120} code more
  timeout -k 5 "$limit" "$PYTHON" -m bench engine $quick --time-limit $((limit - 30)) --json "$OUT/engine.json" 2>&1 |
    tee "$OUT/demo.log"
  code=$?
  limit=$((limit - (SECONDS - started)))
  if [ "$limit" -gt 15 ]; then
    timeout -k 5 "$limit" "$PYTHON" -m bench.acceptance --limit "${ACCEPT_LIMIT:-32}" --time-limit $((limit - 15)) \
      ${ACCEPT_PROMPTS:+--prompts "$ACCEPT_PROMPTS"} --json "$OUT/acceptance.json" 2>&1 | tee -a "$OUT/demo.log"
    more=$?
    [ $code -ne 0 ] || code=$more
  else
    echo "gpu_round: no time left for bench.acceptance" | tee -a "$OUT/demo.log"
  fi
  row demo "$(verdict $code)" $((SECONDS - started)) "demo.log ends with:"
  tail -12 "$OUT/demo.log" | cut -c 1-200 | detail
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "gpu_round: no nvidia-smi" >&2
for stage in "${stages[@]}"; do
  echo "== $stage" && "stage_$stage"
done
printf '\n== gpu_round, commit %s\n' "${DFLASH_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}"
cat "$table"
[ $unfinished -eq 0 ] || exit 75
exit $failed
