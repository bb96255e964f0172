#!/bin/sh
# Tests and measures the native engine on a GPU, in at most eight minutes.
#
#   bench/gpu.sh [--device DEVICE] [--shapes NAMES] [--limit SECONDS] [FOLDER] [-- ARGUMENTS]
#
#   bench/gpu.sh                                                  on one GPU of 139 GiB, into bench/results/gpu
#   bench/gpu.sh --device cpu --shapes tiny /tmp/gpu -- --context 64 --drafts 40    tries the script without a GPU
#
# The parts run one after another, the most important first:
#
#   environment   the versions of the libraries and the GPU, and which libraries are missing
#   tests         the tests that need a GPU (`pytest -m cuda`)
#   SHAPE         python -m bench.gpu --shape SHAPE, for each shape (default: qwen3-8b,qwen3-32b), with the ARGUMENTS
#
# Each part is a process of its own and has a time limit. A part that fails or takes too long does not affect the
# others. FOLDER gets `summary.json` (exit code and seconds of each part; 124 or 137: the time limit), the output of each
# part (PART.log), and the figures of each shape (SHAPE.json, written after each measurement). The exit code is 1 if a
# part failed.
#
# It runs in any Python environment that has the libraries which the part `environment` lists. Nothing has to be
# installed or downloaded. The variable PYTHON names the interpreter (default: python3).
set -u

python=${PYTHON:-python3}
device=cuda
shapes=qwen3-8b,qwen3-32b
limit=480      # seconds for all parts together
end_time=5     # seconds until a part that was asked to end is killed; they count towards the limit
folder=bench/results/gpu

fail_usage() {
    echo "gpu.sh: $1; see the top of bench/gpu.sh" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --device | --shapes | --limit)
        [ $# -ge 2 ] || fail_usage "$1 needs a value"
        case $1 in
        --device) device=$2 ;;
        --shapes) shapes=$2 ;;
        --limit) limit=$2 ;;
        esac
        shift 2
        ;;
    --)
        shift
        break
        ;;
    -*) fail_usage "unknown option $1" ;;
    *)
        folder=$1
        shift
        [ $# -eq 0 ] || [ "$1" = -- ] || fail_usage "unexpected argument $1"
        ;;
    esac
done
case $limit in '' | *[!0-9]*) fail_usage "--limit must be a whole number of seconds, got $limit" ;; esac
case $shapes in '' | *[!a-z0-9.,_-]*) fail_usage "--shapes must be names with commas between them, got $shapes" ;; esac

mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd) || exit 2
case $python in
/*) ;;
*/*) python=$PWD/$python ;;
esac
cd "$(dirname "$0")/.." || exit 2
folder=${folder#"$PWD"/}       # the figures contain the command, which is shorter without the path of the repository
export PYTHONUNBUFFERED=1      # the log of a part that is killed is complete
export HF_HUB_OFFLINE=1        # there may be no network, and nothing is downloaded
export TOKENIZERS_PARALLELISM=false

started=$(date +%s)
num_failed=0
rows=

# Writes the summary after each part, so that it exists if this script is stopped.
write_summary() {
    printf '{\n  "limit_s": %d,\n  "seconds": %d,\n  "parts": [\n%s\n  ]\n}\n' \
        "$limit" "$(($(date +%s) - started))" "$rows" >"$folder/summary.json"
}

# run_part NAME SECONDS COMMAND...: the part gets at most so many seconds, and at most what is left.
run_part() {
    part=$1
    part_limit=$((limit - ($(date +%s) - started) - end_time))
    [ "$2" -ge "$part_limit" ] || part_limit=$2
    shift 2
    began=$(date +%s)
    rm -f "$folder/$part.json" # of an earlier run
    if [ "$part_limit" -gt 0 ]; then
        timeout --kill-after=$end_time "$part_limit" "$@" >"$folder/$part.log" 2>&1 </dev/null
        code=$?
    else
        echo "no time is left" >"$folder/$part.log"
        code=124
    fi
    seconds=$(($(date +%s) - began))
    [ "$code" -eq 0 ] || num_failed=$((num_failed + 1))
    rows="$rows${rows:+,
}    {\"part\": \"$part\", \"exit_code\": $code, \"seconds\": $seconds}"
    write_summary
    echo "gpu.sh: $part: exit code $code after $seconds s"
    [ "$code" -eq 0 ] || tail -n 5 "$folder/$part.log"
}

# The estimates of bench/gpu_plan.py and of the tests leave about two minutes of the limit unused. A shape gets its share
# of the time that is left, so that the last one keeps its share whatever the others do.
run_part environment $((limit / 8)) "$python" -m bench.gpu_environment --device "$device"
run_part tests $((limit / 4)) "$python" -m pytest -vv --tb=short -p no:cacheprovider -o timeout=60 \
    --continue-on-collection-errors -m cuda tests/parse/engines/native

num_shapes=$(echo "$shapes" | tr ',' '\n' | wc -l)
for shape in $(echo "$shapes" | tr ',' ' '); do
    left=$((limit - ($(date +%s) - started)))
    run_part "$shape" $((left / num_shapes)) "$python" -m bench.gpu --shape "$shape" --device "$device" --profile \
        --json "$folder/$shape.json" "$@"
    num_shapes=$((num_shapes - 1))
done

for shape in $(echo "$shapes" | tr ',' ' '); do
    echo
    grep -A 60 '^[^ ]* with random weights' "$folder/$shape.log" || echo "gpu.sh: $shape printed no table"
done
[ "$num_failed" -eq 0 ]
