#!/usr/bin/env bash
# Builds the committed Dockerfile, unchanged, with a small model from a stand-in of the hub; looks into every layer; runs
# the worker from the image, without a network, to a picture. Run it as root before a release:
#
#   tests/image/build.sh [options of buildah build]
#
# It needs buildah, iproute2, util-linux, 30 GB of disk, and the tests' environment: .venv, or PYTHON.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
base=$(sed -n 's/^FROM //p' Dockerfile)
token=hf_for_this_build_alone
export BUILDAH_ISOLATION=chroot TRANSFORMERS_VERBOSITY=error

work=$(mktemp -d)
container=
hub=
tidy() {
    if [ -n "$hub" ]; then kill "$hub"; fi
    if [ -n "$container" ]; then buildah rm "$container" >/dev/null; fi
    rm -rf "$work"
}
trap tidy EXIT

say() { printf '\n== %s\n' "$*"; }
fail() {
    echo "failed: $*" >&2
    exit 1
}

say "build"
mkdir "$work/context"
git archive HEAD | tar -x -C "$work/context"
printf %s "$token" >"$work/token"
"$python" -m tests.hub someone/tiny --token "$token" >"$work/address" &
hub=$!
for _ in $(seq 60); do [ -s "$work/address" ] || sleep 1; done
buildah build --layers --tag worker-test --secret "id=hf_token,src=$work/token" \
    --build-arg MODEL_ID=someone/tiny --build-arg "HF_ENDPOINT=$(cat "$work/address")" "$@" "$work/context"

say "our layers: no token, no cache, no test, no example, no compiler"
buildah push --quiet --disable-compression worker-test "dir:$work/image"
ours=$("$python" - "$work/image/manifest.json" "$(buildah inspect --type image "$base")" <<'END'
import json
import sys

below = len(json.loads(sys.argv[2])["OCIv1"]["rootfs"]["diff_ids"])
layers = json.load(open(sys.argv[1]))["layers"][below:]
print(*(layer["digest"].removeprefix("sha256:") for layer in layers))
END
)
for layer in $ours; do
    if grep -q --binary-files=text "$token" "$work/image/$layer"; then fail "the token is in layer $layer"; fi
    tar -tf "$work/image/$layer" >"$work/names"
    if grep -E '(^|/)(\.cache|huggingface|\.git)/|^app/(tests|examples)/|/tests/|/(ptxas|gcc|cc1)$|^model/.*\.bin$' \
        "$work/names"; then
        fail "these are in layer $layer"
    fi
done
echo "$(wc -w <<<"$ours") layers"

say "the image's settings"
container=$(buildah from --pull=never worker-test)
run() { buildah run "$container" -- "$@"; }
id=$(run id -u)
[ "$id" != 0 ] || fail "it runs as root"
run env | grep -Fx -e HF_HUB_OFFLINE=1 -e MODEL_ID=/model || fail "its environment"
echo "user $id"

say "a start with the baked model, without a network"
unshare --net buildah run "$container" -- python handler.py --check | tee "$work/log"
grep -q "model: someone/tiny at 0123456789ab, directory /model" "$work/log" || fail "the log"
grep -q "ready: " "$work/log" || fail "the log"

say "a picture through the platform, without a network"
unshare --net sh -c 'ip link set lo up && exec "$@"' sh "$python" -m tests.image.paint "$container"
