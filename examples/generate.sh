#!/usr/bin/env bash
# Asks an endpoint for a picture and saves it. Needs bash, curl and python3.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: generate.sh PROMPT [options]

  -o FILE             where the picture goes (default: picture.png; several: picture-1.png, ...)
  -n TEXT             negative prompt: what to keep out of the picture
  --seed N            the seed of the first picture
  --steps N           denoising steps
  --size WxH          width and height in pixels
  --guidance N        guidance scale: how closely to follow the prompt
  --images N          how many pictures
  --scheduler NAME    the sampler
  --format NAME       png, jpeg or webp (default: by FILE's ending)
  --quality N         quality of jpeg and webp, 1 to 100

The endpoint is that of ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
TEXT
}

die() {
    printf 'generate.sh: %s\n' "$1" >&2
    exit 1
}

output=
format=
fields=()
while (($#)); do
    case $1 in
    -h | --help)
        usage
        exit
        ;;
    -o | -n | --seed | --steps | --size | --guidance | --images | --scheduler | --format | --quality)
        (($# > 1)) || die "$1 wants a value"
        case $1 in
        -o) output=$2 ;;
        -n) fields+=(negative_prompt "$2") ;;
        --size)
            [[ $2 =~ ^([0-9]+)x([0-9]+)$ ]] || die "--size wants WxH, such as 512x512, got $2"
            fields+=(width "${BASH_REMATCH[1]}" height "${BASH_REMATCH[2]}")
            ;;
        --steps) fields+=(num_inference_steps "$2") ;;
        --guidance) fields+=(guidance_scale "$2") ;;
        --images) fields+=(num_images "$2") ;;
        --format) format=$2 ;;
        --quality) fields+=(output_quality "$2") ;;
        *) fields+=("${1#--}" "$2") ;;
        esac
        shift 2
        ;;
    -?*) die "unknown option $1, see --help" ;;
    *)
        [[ -z ${prompt+set} ]] || die "one prompt only: put it in quotes"
        prompt=$1
        shift
        ;;
    esac
done
[[ -n ${prompt+set} ]] || {
    usage >&2
    exit 2
}
case $output in
*.[pP][nN][gG]) ending=png ;;
*.[jJ][pP][gG] | *.[jJ][pP][eE][gG]) ending=jpeg ;;
*.[wW][eE][bB][pP]) ending=webp ;;
*) ending= ;;
esac
[[ -z $format || ${ending:-$format} == "$format" ]] || die "$output is the name of a $ending, --format says $format"
format=${format:-${ending:-png}}
output=${output:-picture.$format}
[[ $format == png ]] || fields+=(output_format "$format")
folder=$(dirname -- "$output")
[[ -d $folder ]] || die "no such directory: $folder"
[[ ! -d $output ]] || die "$output is a directory: -o wants the name of a file"
[[ -w $folder ]] || die "cannot write into $folder"

if [[ -n ${ENDPOINT_URL:-} ]]; then
    endpoint=${ENDPOINT_URL%/}
    named=ENDPOINT_URL
else
    [[ -n ${ENDPOINT_ID:-} && -n ${RUNPOD_API_KEY:-} ]] || die 'set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL'
    endpoint=${RUNPOD_ENDPOINT_BASE_URL:-https://api.runpod.ai/v2}/$ENDPOINT_ID
    named=ENDPOINT_ID
fi

work=$(mktemp -d)
job=
cleanup() {
    rm -rf -- "$work"
}
interrupted() {
    trap - INT TERM
    if [[ -z $job && -s $work/answer ]]; then
        job=$(read_answer 2>/dev/null) || true
        job=${job%% *}
    fi
    if [[ -n $job ]]; then
        request POST "/cancel/$job" || true
        printf '\ngenerate.sh: cancelled job %s\n' "$job" >&2
    fi
    exit 130
}
trap cleanup EXIT
trap interrupted INT TERM

# uninterrupted COMMAND...: Ctrl-C reaches every process of the script, but not this one
uninterrupted() {
    (
        trap '' INT
        exec "$@"
    )
}
# python3 would answer Ctrl-C with a traceback
python() {
    uninterrupted python3 "$@"
}

# request METHOD PATH [BODY FILE]: leaves the HTTP status in $status and the answer in $work/answer
request() {
    local arguments=(-sS -X "$1" -o "$work/answer" -w '%{http_code}' -H 'Content-Type: application/json')
    # from a file, where no list of processes shows it
    arguments+=(-H "@$work/headers" --max-time 120)
    [[ $1 == GET ]] || arguments+=(--data-binary "@${3:-/dev/null}")
    local curl=(curl)
    # a job that is being sent can be cancelled only once its id has come back
    [[ $2 != /run ]] || curl=(uninterrupted curl)
    : >"$work/answer"
    status=$("${curl[@]}" "${arguments[@]}" "$endpoint$2" 2>"$work/error") || status=000
}
printf 'Authorization: Bearer %s\n' "${RUNPOD_API_KEY:-}" >"$work/headers"

# checked METHOD PATH [BODY FILE]: request, retried while the endpoint is busy, and while it is broken once the job is
# sent; a refusal ends the script, but 405, the wrong method, is left to the caller
checked() {
    local pause=1
    request "$@"
    while [[ $status == 429 || -n $job && $status == [05]?? ]] && ((pause <= 16)); do
        printf 'the endpoint is busy or broken (%s), trying again in %s s\n' "$status" "$pause" >&2
        sleep "$pause"
        pause=$((2 * pause))
        request "$@"
    done
    case $status in
    2?? | 405) ;;
    000) die "no answer from $endpoint: $(head -n 1 "$work/error")" ;;
    401 | 403) die "the API key was refused ($status): check RUNPOD_API_KEY" ;;
    404) die "not found (404): check $named; results are kept for half an hour" ;;
    429) die 'the endpoint stays busy (429): try again later' ;;
    *) die "the endpoint answered $status: $(head -c 300 "$work/answer")" ;;
    esac
}

python - "$prompt" ${fields[@]+"${fields[@]}"} >"$work/body" <<'PYTHON' || exit 1
import json
import sys

prompt, *pairs = sys.argv[1:]
job_input = {"prompt": prompt}
for name, value in zip(pairs[::2], pairs[1::2]):
    if name not in ("negative_prompt", "scheduler", "output_format"):
        try:
            value = json.loads(value)
        except ValueError:
            sys.exit(f"generate.sh: {name} wants a number, got {value}")
    job_input[name] = value
print(json.dumps({"input": job_input}))
PYTHON

# read_answer: the job's id, state, and one line of progress or error
read_answer() {
    python - "$work/answer" <<'PYTHON'
import json
import sys

try:
    answer = json.load(open(sys.argv[1]))
    output = answer.get("output") or {}
    detail = answer.get("error") or (f"{output['progress']} %" if "progress" in output else "")
    print(answer["id"], answer["status"], " ".join(str(detail).split()))
except (ValueError, KeyError, AttributeError):
    sys.exit("generate.sh: the endpoint's answer is not one of a RunPod endpoint: check ENDPOINT_URL")
PYTHON
}

checked POST /run "$work/body"
[[ $status != 405 ]] || die "the endpoint answered 405: check ENDPOINT_URL"
answer=$(read_answer) || exit 1
read -r job state detail <<<"$answer"

method=GET
pause=500
while [[ $state == IN_QUEUE || $state == IN_PROGRESS ]]; do
    printf -v seconds '%d.%03d' $((pause / 1000)) $((pause % 1000))
    sleep "$seconds"
    pause=$((pause < 4000 ? pause * 13 / 10 : 5000))
    checked "$method" "/status/$job"
    if [[ $status == 405 ]]; then
        # the SDK's local server wants POST
        method=POST
        continue
    fi
    answer=$(read_answer) || exit 1
    read -r _ state detail <<<"$answer"
    printf '\r\033[K%s %s' "$state" "$detail" >&2
done
printf '\r\033[K' >&2
trap - INT TERM

case $state in
COMPLETED) ;;
FAILED) die "job $job failed: $detail" ;;
*) die "job $job ended as $state${detail:+: $detail}" ;;
esac

python - "$work/answer" "$output" "$job" <<'PYTHON'
import base64
import json
import os
import signal
import sys
import urllib.request

signal.signal(signal.SIGINT, signal.SIG_DFL)
answer, path, job = sys.argv[1:]
output = json.load(open(answer)).get("output")
if not output:
    sys.exit("generate.sh: the job is completed but has no output: its result was over the platform's limit")
images = output.get("images", [output])
stem, extension = os.path.splitext(path)
for i, image in enumerate(images, start=1):
    name = f"{stem}-{i}{extension}" if len(images) > 1 else path
    if "image" in image:
        file = base64.b64decode(image["image"])
    else:
        try:
            with urllib.request.urlopen(image["image_url"], timeout=120) as link:
                file = link.read()
        except OSError as error:
            sys.exit(f"generate.sh: cannot fetch {image['image_url']}: {error}")
    # a picture is there as a whole or not at all
    try:
        with open(name + ".part", "wb") as part:
            part.write(file)
        os.replace(name + ".part", name)
    except OSError as error:
        if os.path.exists(name + ".part"):
            os.remove(name + ".part")
        sys.exit(f"generate.sh: cannot write {name}: {error.strerror}; /status/{job} has it for half an hour")
    print(f"{name} seed {image['seed']}")
for warning in output.get("warnings", []):
    print(f"warning: {warning}", file=sys.stderr)
PYTHON
