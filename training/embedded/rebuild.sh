#!/bin/sh
# Rebuilds the embedded model from nothing: fetch, tokenise, train, export, evaluate.
# Run it from the root of the repository, on Debian 12, with torch, numpy, tokenizers,
# safetensors and jinja2 installed. It may be stopped and started again at any time:
# steps that are done are not repeated, and training goes on where it stopped.
#
#   PYTHON  the interpreter       (python3)
#   WORK    the work folder       (build/embedded)
#   STEPS   the length of the run (2131, as for the shipped weights; more is better)
set -eu
PYTHON=${PYTHON:-python3}
WORK=${WORK:-build/embedded}
STEPS=${STEPS:-2131}

[ -f "$WORK/glosses.jsonl" ] || "$PYTHON" -m training.embedded.fetch --work "$WORK"
[ -f "$WORK/tokenizer/tokenizer.json" ] || "$PYTHON" -m training.embedded.tokenizer --work "$WORK"
[ -f "$WORK/pools/drill-far.starts.npy" ] || "$PYTHON" -m training.embedded.mixture --work "$WORK"
"$PYTHON" -m training.embedded.train --work "$WORK" --steps "$STEPS"
"$PYTHON" -m training.embedded.export --work "$WORK"
"$PYTHON" -m training.embedded.evaluate --work "$WORK"
