#!/usr/bin/env bash
# Builds llama.cpp's llama-server, llama-bench and libllama: the peer that neurond is measured against.
#
# The source comes out of the llama-cpp-python source package, pinned by version and SHA-256, because a package index is
# reachable in more places than a code host. Everything goes to target/peers/llama.cpp; a second run does nothing.
# Needs a C++ compiler and Python 3 with pip; cmake and ninja are installed into a virtual environment beside the build.
# Ten minutes on two cores.
#
#   scripts/peer_llama.sh                     download, verify, build
#   scripts/peer_llama.sh --source DIR|FILE   use this unpacked tree or .tar.gz instead of downloading
#   scripts/peer_llama.sh --paths             print where things are (shell assignments), build nothing
set -euo pipefail
SELF=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$SELF")/.."

VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
HOME_DIR=$PWD/target/peers/llama.cpp
TREE=$HOME_DIR/llama_cpp_python-$VERSION
BIN=$HOME_DIR/build/bin

paths() {
    echo "LLAMA_SERVER=$BIN/llama-server"
    echo "LLAMA_LIB=$BIN"
    echo "LLAMA_PYTHON=$TREE"
}

source_at=
while (($#)); do
    case $1 in
        --source) source_at=$2; shift 2 ;;
        --paths) paths; exit 0 ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$SELF"; exit 0 ;;
        *) echo "unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done

if [[ -x $BIN/llama-server && -e $BIN/libllama.so && -e $HOME_DIR/built-$VERSION ]]; then
    echo "llama.cpp is built already" >&2
    paths
    exit 0
fi
mkdir -p "$HOME_DIR"

if [[ ! -d $TREE ]]; then
    if [[ -n $source_at && -d $source_at ]]; then
        cp -a "$source_at" "$TREE"
    else
        archive=${source_at:-$HOME_DIR/llama_cpp_python-$VERSION.tar.gz}
        if [[ ! -f $archive ]]; then
            echo "downloading the source package, version $VERSION" >&2
            python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python \
                --dest "$HOME_DIR" "llama-cpp-python==$VERSION" >&2
        fi
        echo "$SHA256  $archive" | sha256sum --check --quiet - || {
            echo "$archive is not the file this script was written for; delete it and try again" >&2
            exit 1
        }
        tar -xzf "$archive" -C "$HOME_DIR"
    fi
fi

# cmake and ninja: what is installed already, else our own.
if ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
    [[ -x $HOME_DIR/venv/bin/ninja ]] || {
        python3 -m venv "$HOME_DIR/venv"
        "$HOME_DIR/venv/bin/pip" install --quiet cmake ninja >&2
    }
    PATH=$HOME_DIR/venv/bin:$PATH
fi

# Its AMX kernels (tilezero of tiles that nobody configured) end the process on machines that have AMX, so it gets everything but.
native=(-DGGML_NATIVE=ON)
if grep -qw amx_tile /proc/cpuinfo; then
    native=(-DGGML_NATIVE=OFF)
    for option in SSE42 AVX AVX2 BMI2 F16C FMA AVX_VNNI AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16; do native+=("-DGGML_$option=ON"); done
fi
echo "building llama.cpp for this machine's CPU" >&2
cmake -S "$TREE/vendor/llama.cpp" -B "$HOME_DIR/build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${native[@]}" \
    -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_CURL=OFF \
    -DLLAMA_OPENSSL=OFF >"$HOME_DIR/cmake.log"
nice -n 10 cmake --build "$HOME_DIR/build" --target llama-server llama-bench llama >"$HOME_DIR/build.log" 2>&1 || {
    tail -30 "$HOME_DIR/build.log" >&2
    exit 1
}
touch "$HOME_DIR/built-$VERSION"
paths
