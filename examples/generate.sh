#!/usr/bin/env bash
# usage: generate.sh PROMPT [-o FILE] [FIELD=VALUE ...]
#
# Generates a picture and saves it as FILE (default: picture.png); several become picture-1.png, ...
# FIELD=VALUE is any field of the request, such as seed=7 or num_images=2; image=@photo.jpg sends a file. The extension
# of FILE sets output_format.
#
# The endpoint is that of ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
# Needs bash, curl 7.71 or newer, and python3.
set -euo pipefail

[[ -t 2 ]] && clear=$'\r\033[K' || clear='' # removes a terminal's line of progress
die() { printf '%sgenerate.sh: %s\n' "$clear" "$1" >&2; exit "${2:-1}"; }

[[ ${1:-} != -h && ${1:-} != --help ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit; }
[[ -n ${1:-} && $1 != -* ]] || die 'the prompt comes first, see --help'
arguments=("$1") output=''
while shift && (($#)); do
    case $1 in
    -o) [[ -n ${2:-} ]] || die '-o needs a file name'; output=$2; shift ;;
    *=*) arguments+=("$1") ;;
    *) die "$1 is not FIELD=VALUE; a prompt of several words needs quotes" ;;
    esac
done
[[ -w $(dirname -- "$output") && (! -e $output || -f $output) ]] || die "cannot write $output"
[[ -n ${ENDPOINT_URL:-${ENDPOINT_ID:+${RUNPOD_API_KEY:-}}} ]] || die 'set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL'
endpoint=${ENDPOINT_URL:-${RUNPOD_ENDPOINT_BASE_URL:-https://api.runpod.ai/v2}/${ENDPOINT_ID:-}}

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
printf 'Authorization: Bearer %s\n' "${RUNPOD_API_KEY:-}" >"$work/headers" # as an argument, ps would show it
python3 - "$output" "${arguments[@]}" >"$work/body" <<'PYTHON'
import base64, json, math, os, re, sys
limit = 10_000_000 # of RunPod for /run
def read_value(name, value):
    """Returns what FIELD=VALUE sends: a file in base64, a number or text."""
    if name in ("image", "mask") and value.startswith("@"):
        with open(value[1:], "rb") as file:
            return base64.b64encode(file.read(limit)).decode()
    is_text = name in ("prompt", "negative_prompt", "output_format", "scheduler", "image", "mask")
    is_number = re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", value) and math.isfinite(float(value))
    return json.loads(value) if is_number and not is_text else value
path, prompt, *fields = sys.argv[1:]
ending = os.path.splitext(path)[1][1:].lower().replace("jpg", "jpeg")
job_input = {"prompt": prompt} | ({"output_format": ending} if ending.isalpha() else {})
try:
    job_input |= {name: read_value(name, value) for name, _, value in (field.partition("=") for field in fields)}
except OSError as error:
    sys.exit(f"generate.sh: {error}")
body = json.dumps({"input": job_input})
if len(body) > limit:
    sys.exit("generate.sh: the request is over RunPod's limit of 10 MB: send a smaller picture, or its address")
print(body)
PYTHON

# request METHOD PATH [OPTION OF CURL ...]: leaves the answer in $work/answer and sets $http to its status
request() {
    # Ctrl-C reaches every process of a script, and must not cost the answer with a job's id
    http=$([[ $1 == GET ]] || trap '' INT
        curl -sS -m 120 -X "$1" -H "@$work/headers" -H 'Content-Type: application/json' \
            -o "$work/answer" -w '%{http_code}' "${@:3}" "${endpoint%/}$2" 2>"$work/error") || http=000
}
# sets $job, $state, and $detail, which is the job's error or how many percent of it are done
read_answer() {
    [[ $http != 000 ]] || die "no answer from $endpoint${job:+ about job $job}: $(head -n 1 "$work/error")"
    [[ $http != 40[14] ]] || die "the endpoint answered $http: check RUNPOD_API_KEY, and ENDPOINT_ID or ENDPOINT_URL"
    [[ $http == 2?? ]] || die "the endpoint answered $http${job:+ about job $job}: $(head -c 300 "$work/answer")"
    answer=$(trap '' INT && python3 -c 'import json, sys
job = json.load(sys.stdin)
output = job.get("output")
progress = output.get("progress", "") if isinstance(output, dict) else ""
print(job["id"] or exit(1), job["status"] or exit(1), job.get("error") or progress)
' <"$work/answer" 2>"$work/error") || die 'this is not an answer from RunPod: check ENDPOINT_URL'
    read -r job state detail <<<"$answer"
}

interrupted='' method=GET job='' answered=0
trap 'interrupted=yes' INT TERM
request POST /run --data-binary "@$work/body"
read_answer
while [[ $state == IN_QUEUE || $state == IN_PROGRESS ]]; do
    [[ -z $clear ]] || printf '%s%s %s' "$clear" "$state" "${detail:+$detail %}" >&2
    sleep 0.5 || true
    [[ -n $interrupted ]] || request "$method" "/status/$job"
    if [[ -n $interrupted ]]; then
        request POST "/cancel/$job"
        [[ $http == 2?? ]] || die "cannot cancel job $job: the endpoint answered $http" 130
        die "cancelled job $job" 130
    fi
    if [[ $http == 405 ]]; then
        method=POST # the SDK's local server takes nothing else
    elif [[ $http =~ ^(000|408|429|5..)$ ]] && ((SECONDS - answered < 300)); then
        detail=''
    else
        read_answer
        answered=$SECONDS
    fi
done
printf %s "$clear" >&2
[[ $state == COMPLETED ]] || die "job $job ended as $state${detail:+: $detail}"

python3 - "$output" "$work/answer" <<'PYTHON'
import http.client, json, os, pathlib, signal, sys, urllib.request
signal.signal(signal.SIGINT, signal.SIG_DFL)
path, answer = sys.argv[1:]
output = json.load(open(answer)).get("output")
if not (isinstance(output, dict) and output.keys() & {"image", "image_url", "images"}):
    sys.exit("generate.sh: the job has no picture: its result may have been over the platform's limit")
path = path or f"picture.{output.get('output_format', 'png')}"
images = output.get("images", [output])
for i, image in enumerate(images, start=1):
    name = path if len(images) == 1 else f"-{i}".join(os.path.splitext(path))
    url = image.get("image_url") or f"data:;base64,{image['image']}"
    try:
        # a download that breaks leaves an older file as it was
        with urllib.request.urlopen(url, timeout=120) as file:
            part = pathlib.Path(f"{name}.part")
            part.write_bytes(file.read())
        part.replace(name)
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(f"generate.sh: cannot save {name}: {error}")
    print(f"{name} seed {image.get('seed')}")
for warning in output.get("warnings", []):
    print(f"warning: {warning}", file=sys.stderr)
PYTHON
