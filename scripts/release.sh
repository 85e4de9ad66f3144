#!/usr/bin/env bash
# Builds the daemon as it is released: arranged by a profile of itself at work, which takes up to a quarter off the CPU time of a call passed
# through the gateway, and a quarter or more off one answered from its cache (docs/PERFORMANCE.md). About 20 minutes on two cores; `cargo build --release` makes the same program in half of that, without.
#
#   scripts/release.sh                    target/release/neurond
#   scripts/release.sh --features cuda    the same with arguments for cargo
#
#     build that counts where it goes --> scripts/release_load.py --> profile --> build that keeps together what runs together
#
# What that load does not reach, such as the kernels, has no part in the profile and is built as ever: "never" would have the compiler save
# on it. Needs Rust by rustup, which brings the compiler's own llvm-profdata (or name one in LLVM_PROFDATA), a C compiler, and Python 3.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit ;; esac

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

# Whole, since the daemon that counts runs in another folder.
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
host=$(rustc -vV | sed -n 's/^host: //p')
profdata=${LLVM_PROFDATA:-$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata}
if [[ ! -x $profdata ]]; then
    say "fetching llvm-profdata"
    rustup component add llvm-tools || { echo "release: no llvm-profdata: install Rust by rustup, or set LLVM_PROFDATA" >&2; exit 1; }
fi
counts=$target/profile/counts
profile=$target/profile/neurond.profdata

# A target by name keeps these flags from build scripts and macros.
build() { # KIND FLAGS CARGO-ARGUMENTS
    local kind=$1 flags=$2
    shift 2
    RUSTFLAGS="${RUSTFLAGS:-} $flags" cargo build --release --locked --bin neurond --target "$host" --target-dir "$target/$kind" "$@"
}

say "1 of 3: a build that counts"
build profile "-Cprofile-generate=$counts" "$@"
say "2 of 3: calls, less than a minute"
rm -rf "$counts"
python3 scripts/release_load.py --neurond "$target/profile/$host/release/neurond"
"$profdata" merge --sparse -o "$profile" "$counts"/*.profraw
say "3 of 3: the build by that profile"
# Cargo does not see that a profile has changed.
rm -rf "$target/profiled"
build profiled "-Cprofile-use=$profile" "$@"
mkdir -p "$target/release"
install -m 755 "$target/profiled/$host/release/neurond" "$target/release/neurond"
say "target/release/neurond"
