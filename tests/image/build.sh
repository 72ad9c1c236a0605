#!/usr/bin/env bash
# Builds the committed Dockerfile, unchanged, with PyTorch from a stand-in for its index and a small model from a stand-in
# for the hub; searches every layer, prints what the image holds, and generates a picture with the worker from the image,
# without a network. Then the same without a model in the image, from RunPod's cache and with a LoRA. Run it as root before
# a release:
#
#   tests/image/build.sh [options of buildah build]
#
# It needs buildah, iproute2, util-linux, 10 GB of disk (80 with the storage driver vfs, which copies each layer whole), and
# the tests' environment: .venv, or PYTHON. Where pip finds PyTorch for CUDA, give it the one for the CPU:
# PIP_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
base=$(sed -n 's/^FROM //p' Dockerfile)
token=hf_for_this_build_alone
export BUILDAH_ISOLATION=chroot TRANSFORMERS_VERBOSITY=error

work=$(mktemp -d)
container=
tidy() {
    # one that did not start is no longer there
    jobs -p | xargs -r kill || true
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
"$python" -m pip download --quiet --no-deps --dest "$work" "$(grep ^torch== requirements.txt)"
"$python" -m tests.image.torch_index "$work"/torch-*.whl "$work/index"
"$python" -u -m http.server --bind 127.0.0.1 --directory "$work/index" 0 >"$work/index-address" 2>"$work/index-log" &
"$python" -m tests.support.hub someone/tiny --token "$token" >"$work/hub-address" &
for _ in $(seq 60); do [ -s "$work/hub-address" ] && [ -s "$work/index-address" ] || sleep 1; done
[ -s "$work/hub-address" ] && [ -s "$work/index-address" ] || fail "the stand-ins did not start: $(cat "$work/index-log")"
index=$(sed -E 's/.*\((.*)\/\).*/\1/' "$work/index-address")
build() {
    buildah build --layers --secret "id=hf_token,src=$work/token" --build-arg "TORCH_INDEX=$index" \
        --build-arg "HF_ENDPOINT=$(cat "$work/hub-address")" "$@" "$work/context"
}
build --tag worker-test --build-arg MODEL_ID=someone/tiny "$@"

say "our layers: no token, no cache, no test or example of ours, no compiler"
buildah push --quiet --disable-compression worker-test "dir:$work/image"
ours=$("$python" - "$work/image/manifest.json" "$(buildah inspect --type image "$base")" <<'END'
import json
import sys

below = len(json.loads(sys.argv[2])["OCIv1"]["rootfs"]["diff_ids"])
layers = json.load(open(sys.argv[1]))["layers"][below:]
print(*(layer["digest"].removeprefix("sha256:") for layer in layers))
END
)
grep -q --binary-files=text app/handler.py "$work"/image/* || fail "the layers cannot be searched"
for layer in $ours; do
    if grep -q --binary-files=text "$token" "$work/image/$layer"; then fail "the token is in layer $layer"; fi
    tar -tf "$work/image/$layer" >"$work/names"
    if grep -E '(^|/)(\.cache|huggingface|\.git)/|^app/(tests|examples)/|/(ptxas|gcc|cc1)$|^model/.*\.bin$' \
        "$work/names"; then
        fail "these are in layer $layer"
    fi
done
echo "$(wc -w <<<"$ours") layers"

say "where the packages came from"
container=$(buildah from --pull=never worker-test)
run() { buildah run "$container" -- "$@"; }
asked=$(grep -oE 'GET /[^/ ]+' "$work/index-log" | sort -u | cut -d/ -f2 | xargs)
[ "$asked" = "cuda-standin nvidia-standin torch" ] || fail "PyTorch's index was asked for: $asked"
grep -q "GET /torch/torch-.*whl" "$work/index-log" || fail "torch is not from its index"
run pip check || fail "the packages do not fit together"

say "what the image holds, in MB: CUDA libraries, PyTorch, other packages, the model, the worker, Python and Debian"
# a file counts for the first place that holds it
buildah run --user root "$container" -- sh -c \
    'cd /usr/local/lib/python3.11/*-packages && du -xcs --apparent-size --block-size=MB nvidia torch . /model /app /'

say "the image's settings"
id=$(run id -u)
[ "$id" != 0 ] || fail "it runs as root"
run env >"$work/env"
for setting in HF_HUB_OFFLINE=1 MODEL_ID=/model NVIDIA_VISIBLE_DEVICES=all; do
    grep -Fx "$setting" "$work/env" || fail "its environment lacks $setting"
done
echo "user $id"

say "a start with the baked model, without a network"
unshare --net buildah run "$container" -- python handler.py --check | tee "$work/log"
grep -q "model: someone/tiny at 0123456789ab, directory /model" "$work/log" || fail "the log does not name the model and its directory"
grep -q "ready: " "$work/log" || fail "the log has no ready line"

say "a picture through the platform, without a network"
unshare --net sh -c 'ip link set lo up && exec "$@"' sh "$python" -m tests.image.generate "$container"

say "a picture without a model in the image, from RunPod's cache, with a LoRA"
build --tag worker-test-bare --build-arg MODEL_ID= "$@"
buildah rm "$container" >/dev/null
snapshot=$work/cache/models--someone--tiny/snapshots/0123456789abcdef0123456789abcdef01234567
mkdir -p "$snapshot"
"$python" - "$snapshot" "$work/cache/style.safetensors" <<'END'
import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from tests.support.single_files import kohya, layers_of
from tests.support.v1_4 import make_repository

snapshot, lora = map(Path, sys.argv[1:])
pipe = StableDiffusionPipeline.from_pretrained(make_repository(snapshot))
save_file(kohya(*layers_of(pipe, lambda layer: "attentions" in layer[0])), lora)
END
# the library lets only their owner read the weights
chmod -R a+rX "$work/cache"
hub=/runpod-volume/huggingface-cache/hub
container=$(buildah from --pull=never --volume "$work/cache:$hub:ro" worker-test-bare)
run test ! -e /model || fail "it has a model"
start() { unshare --net buildah run --env "$1" --env "$2" "$container" -- sh -c 'python handler.py && test -s picture.png'; }
start MODEL_ID=someone/tiny "LORA=$hub/style.safetensors:0.7" >"$work/log" || fail "no picture: $(cat "$work/log")"
grep "model: someone/tiny + style:0.7 at 0123456789ab, RunPod's cached models" "$work/log" || fail "the log does not name RunPod's cache: $(cat "$work/log")"
grep "LoRA style:0.7: 96 of 96 tensors merged" "$work/log" || fail "the LoRA is not merged: $(cat "$work/log")"
if start MODEL_ID=someone/other LORA= >"$work/log"; then fail "it starts without a model"; fi
grep "choose it as the endpoint's Model" "$work/log" || fail "the log does not suggest the endpoint's Model: $(cat "$work/log")"
