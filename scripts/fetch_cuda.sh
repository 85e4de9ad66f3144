#!/usr/bin/env bash
# Puts NVIDIA's compiler for GPU code into .cuda/, for machines without a GPU or CUDA: what `cargo build --features cuda` needs.
#
#   scripts/fetch_cuda.sh             105 MB to fetch, 260 MB on disk; does nothing when it is there
#   scripts/fetch_cuda.sh --home      prints where it is, for CUDA_HOME
#
# Five Python packages of CUDA 13.0, pinned: a newer compiler writes code that drivers of the 580 series refuse. They are unpacked, not
# installed. Needs Python 3 with pip, and a C++ compiler, which nvcc calls. Their licence is NVIDIA's, so nothing of them is
# part of neurond: its binary opens CUDA's libraries at run time, and starts without them.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85)
folder=.cuda
home=$folder/nvidia/cu13

case ${1:-} in
-h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
--home) echo "$PWD/$home"; exit ;;
"") ;;
*) echo "fetch_cuda: unknown argument $1; see --help" >&2; exit 2 ;;
esac

mark=$folder/fetched
if [[ -f $mark && $(<"$mark") == "${packages[*]}" ]] && "$home/bin/nvcc" --version >/dev/null 2>&1; then
    echo "CUDA's compiler is in $home" >&2
    exit
fi
command -v c++ >/dev/null || { echo "fetch_cuda: nvcc needs a C++ compiler; install g++" >&2; exit 1; }
echo "fetching CUDA's compiler into $folder (105 MB)" >&2
rm -rf "$folder"
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "${packages[@]}"
"$home/bin/nvcc" --version | tail -n 2 >&2
echo "${packages[*]}" >"$mark"
