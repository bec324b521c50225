#!/bin/sh
# Rebuilds the three embedded models from nothing: fetch, tokenise, train, export, evaluate.
# Run it from the root of the repository, on Debian 12, with torch, numpy, tokenizers,
# safetensors and jinja2 installed. It may be stopped and started again at any time:
# steps that are done are not repeated, and training goes on where it stopped. A GPU is
# used where torch finds one.
#
#   PYTHON   the interpreter                                        (python3)
#   WORK     the work folder                                        (build/embedded)
#   DATA     where the models' folders go                           (src/isthmus/data)
#   OUT      where the evaluation goes                              (benchmarks/results/embedded_model.json)
#   THREADS  threads of computation                                 (2)
#   MEGABYTES  text of exercises per kind and size                   (6)
#   COUNT    probes of each kind in the evaluation                   (100)
#   FIRST, MAIN, HYBRID, DRAFT   steps of the four long runs; the shipped weights had about those below, more is better
#   LAST     steps of the last run of each model, at a low rate that falls to nothing
set -eu
PYTHON=${PYTHON:-python3}
WORK=${WORK:-build/embedded}
DATA=${DATA:-src/isthmus/data}
OUT=${OUT:-benchmarks/results/embedded_model.json}
THREADS=${THREADS:-2}
MEGABYTES=${MEGABYTES:-6}
COUNT=${COUNT:-100}
FIRST=${FIRST:-2131}
MAIN=${MAIN:-5712}
HYBRID=${HYBRID:-1615}
DRAFT=${DRAFT:-2782}
LAST=${LAST:-2300}
HERE=training/embedded

# Memory kept in the heap and in huge pages: a quarter faster on a CPU, since large tensors fault no pages.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184}"

run() {
    module=$1
    shift
    "$PYTHON" -m "training.embedded.$module" --work "$WORK" "$@"
}

[ -f "$WORK/glosses.jsonl" ] || run fetch
[ -f "$WORK/tokenizer/tokenizer.json" ] || run tokenizer
[ -f "$WORK/pools/drill-far.starts.npy" ] || run mixture --megabytes "$MEGABYTES"

# The main model: the first edition from nothing, the second from the first's weights with a fresh optimiser.
run train --model main --run run-first --recipe "$HERE/recipe-first.toml" --steps "$FIRST" --threads "$THREADS"
[ -f "$WORK/first/embedded/config.json" ] || run export --model main --run run-first --data "$WORK/first"
run train --model main --init "$WORK/first/embedded" --run run-long --steps "$MAIN" --threads "$THREADS"
[ -f "$WORK/long/embedded/config.json" ] || run export --model main --run run-long --data "$WORK/long"

# The hybrid takes the first edition's embedding and feed-forward parts, the draft the main model's embedding's main directions.
run train --model hybrid --init "$WORK/first/embedded" --run run-hybrid-long --steps "$HYBRID" --threads "$THREADS"
[ -f "$WORK/long/embedded-hybrid/config.json" ] || run export --model hybrid --run run-hybrid-long --data "$WORK/long"
run train --model draft --init "$WORK/long/embedded" --run run-draft-long --steps "$DRAFT" --threads "$THREADS"
[ -f "$WORK/long/embedded-draft/config.json" ] || run export --model draft --run run-draft-long --data "$WORK/long"

# The last run of each, from what it has learned: `--fall` above 1 begins at a part of the rate and only falls.
last() {
    run train --model "$1" --init "$WORK/long/$2" --recipe "$HERE/$3" --steps "$4" --fall "$5" --threads "$THREADS"
    run export --model "$1" --data "$DATA"
}
last main embedded recipe-last.toml "$LAST" 2.7
last hybrid embedded-hybrid recipe-last.toml "$LAST" 2.7
last draft embedded-draft recipe-draft.toml "$LAST" 2.7

for model in main hybrid draft; do
    folder=$([ "$model" = main ] && echo embedded || echo "embedded-$model")
    run evaluate --model "$model" --folder "$DATA/$folder" --threads "$THREADS" --count "$COUNT" --out "$OUT"
done
run acceptance --data "$DATA" --out "$OUT"
