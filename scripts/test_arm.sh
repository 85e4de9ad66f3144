#!/usr/bin/env bash
# Compiles for 64-bit ARM and runs the kernels' tests there, under emulation, on a machine of another kind.
#
#   scripts/test_arm.sh                 all of kernel::, a quarter of an hour the first time
#   scripts/test_arm.sh kernel::gemm    only these tests
#
# Makes a small Debian in target/arm with Rust, its standard library for ARM, a cross compiler and an emulator, about 4 GB with what is built:
# the Rust that is installed here has no standard library for another machine. Needs root, mmdebstrap and the crates that
# `cargo fetch` brings. The emulated processor has every extension, so the kernels with dot products of bytes run too.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;; esac

root=$PWD/target/arm
target=aarch64-unknown-linux-gnu
[[ $(id -u) -eq 0 ]] || { echo "test_arm: run it as root: it makes a root file system" >&2; exit 2; }
command -v mmdebstrap >/dev/null || { echo "test_arm: install the package mmdebstrap" >&2; exit 2; }

if [[ ! -x $root/usr/bin/cargo ]]; then
    rm -rf "$root"
    packages=rustc,cargo,libstd-rust-dev:arm64,gcc,gcc-aarch64-linux-gnu,libc6-dev-arm64-cross,qemu-user
    # Valid for longer than it says: a mirror may lag behind.
    mmdebstrap --aptopt='Acquire::Check-Valid-Until "false"' --variant=apt --architectures=amd64,arm64 \
        --include="$packages" sid "$root"
fi

cargo fetch --locked
mkdir -p "$root/root/.cargo" "$root/src"
cp -ru "${CARGO_HOME:-$HOME/.cargo}/registry" "$root/root/.cargo/"
cat > "$root/root/.cargo/config.toml" <<EOF
[target.$target]
linker = "aarch64-linux-gnu-gcc"
runner = "qemu-aarch64 -L /usr/aarch64-linux-gnu"
EOF
git ls-files -z | xargs -0 cp -u --parents --target-directory="$root/src"

# Little optimisation: the emulator is slow, but the compiler is slower.
exec chroot "$root" env HOME=/root CARGO_PROFILE_TEST_OPT_LEVEL=1 \
    sh -c 'cd /src && exec cargo test --offline --locked --lib --target "$1" "$2"' sh "$target" "${1:-kernel::}"
