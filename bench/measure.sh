#!/bin/sh
# Runs the measurements of bench/results/ and of the model cards, in order, and then updates the pages.
#
#   bench/measure.sh                  every measurement whose file is missing, or does not say how it was measured
#   bench/measure.sh load pair        these ones again
#   bench/measure.sh --list           names, files, minutes, and which of them need a quiet machine
#
# An interrupted measurement writes no file, so the next call starts it again. Run it in the root of the repository. The
# minutes are estimates for two cores. "quiet" means that nothing else may use the machine, because the figures contain
# times. "any" means that the load of the machine affects only the times in the figures, which are ratios of
# measurements in turns.
set -eu
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1
results=bench/results
url=http://127.0.0.1:8000
contenders=off+none,full+none,auto+none,off,full,rounds,progressive,auto

plan="
pair         models/demo-target/figures.json    12 any
eagle3       models/demo-eagle3/figures.json     4 any
parallel     models/demo-parallel/figures.json   3 any
space        models/demo-space/figures.json      3 any
draft_parallel models/demo-draft-parallel/figures.json 2 any
offline      $results/offline.json              25 quiet
drafting     $results/drafting.json              8 quiet
speculation  $results/speculation.json          15 quiet
adversary    $results/adversary.json             5 quiet
engine       $results/engine.json                8 quiet
load         $results/load.json                 13 quiet
metering     $results/metering.json              5 quiet
overlap      $results/overlap.json               3 quiet
fused_call   $results/fused_call.json            3 quiet
engines      $results/engines.json              15 quiet
engines_head $results/engines_head.json          8 quiet
throughput   $results/throughput.json           15 quiet
throughput_int8 $results/throughput_int8.json    6 quiet
throughput_bfloat16 $results/throughput_bfloat16.json 6 quiet
precision    $results/precision.json             2 any
long_drafts  $results/long_drafts.json          12 quiet
"

head_card() {
    name=$1
    shift
    "$python" -m training.acceptance --head "models/demo-$name" "$@" --problems 200 --seed 0 --threads 1 --card
}

# `make serve` without make: the shipped serve_config.yaml. The server is stopped when the measurement ends.
load() {
    "$python" -m deployments &
    server=$!
    trap 'kill -INT $server 2>/dev/null || true' EXIT INT TERM
    until "$python" -c "import httpx; httpx.get('$url/v1/models', trust_env=False).raise_for_status()" 2>/dev/null; do
        kill -0 $server || { echo "measure.sh: the server stopped" >&2; exit 1; }
        sleep 2
    done
    "$python" -m bench.load --url $url --requests 200 --concurrency 1,8 --compare $contenders --rounds 4 \
        --json $results/load.json
    kill -INT $server
    wait $server || true
    trap - EXIT INT TERM
}

measure() {
    case $1 in
    pair) "$python" -m training.evaluate --problems 3000 --seed 7 --threads 1 --card ;;
    eagle3 | parallel | space) head_card "$1" ;;
    draft_parallel) head_card draft-parallel --target models/demo-draft ;;
    offline) "$python" -m bench.offline --problems 250 --seed 5 --json $results/offline.json ;;
    drafting) "$python" -m bench.drafting --problems 60 --seed 5 --json $results/drafting.json --plot bench/drafting.svg ;;
    speculation) "$python" -m bench.offline --speculation --problems 60 --seed 5 --rounds 5 --json $results/speculation.json ;;
    adversary) "$python" -m bench.offline --adversary --problems 200 --seed 5 --json $results/adversary.json ;;
    engine) "$python" -m bench.offline --engine --rounds 7 --json $results/engine.json ;;
    load) load ;;
    metering) "$python" -m bench.metering --requests 100 --mode full,off --rounds 6 --json $results/metering.json ;;
    overlap) "$python" -m bench.overlap --problems 100 --rounds 5 --json $results/overlap.json ;;
    fused_call) "$python" -m bench.fused_call --problems 200 --json $results/fused_call.json ;;
    engines) "$python" -m bench.engines --start-vllm --problems 40 --seed 5 --concurrency 1,8 --json $results/engines.json ;;
    engines_head) "$python" -m bench.engines --start-vllm --problems 160 --rounds 10 --seed 5 --concurrency 1,8 \
        --contenders vllm,parse-full,parse-rounds --json $results/engines_head.json ;;
    throughput) "$python" -m bench.throughput --model smollm2 --start-vllm --batches 1,8,16 --json $results/throughput.json ;;
    throughput_int8) "$python" -m bench.throughput --model smollm2 --quantization int8 --batches 1,8 --json $results/throughput_int8.json ;;
    throughput_bfloat16) "$python" -m bench.throughput --model smollm2 --dtype bfloat16 --batches 1,8 --json $results/throughput_bfloat16.json ;;
    precision) "$python" -m bench.precision --model smollm2 --json $results/precision.json ;;
    long_drafts) "$python" -m bench.long_drafts --model smollm2 --json $results/long_drafts.json --plot bench/long_drafts.svg ;;
    gpu) PYTHON="$python" bench/gpu.sh $results/gpu ;;
    *) echo "measure.sh: there is no measurement $1; see --list" >&2; exit 2 ;;
    esac
}

if [ "${1:-}" = --list ]; then
    echo "$plan"
    echo "gpu          $results/gpu/qwen3-8b.json, $results/gpu/qwen3-32b.json  8 quiet, needs a GPU"
    exit
fi
mkdir -p $results
if [ $# -gt 0 ]; then
    for name; do measure "$name"; done
else
    echo "$plan" | while read -r name file minutes _; do
        if [ -z "$name" ]; then continue; fi
        if [ -e "$file" ] && ! grep -q '"run": null' "$file"; then continue; fi
        echo "measure.sh: $name, about $minutes minutes" >&2
        measure "$name" </dev/null
    done
fi
"$python" -m bench.report
