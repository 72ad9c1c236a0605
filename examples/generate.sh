#!/usr/bin/env bash
# usage: generate.sh PROMPT [-o FILE] [FIELD=VALUE ...]
#
# Asks an endpoint for a picture and saves it as FILE (default: picture.png); several become picture-1.png, ...
# FIELD=VALUE is any field of the request, such as seed=7 or num_images=2. FILE's ending sets output_format.
#
# The endpoint is that of ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
# Needs bash, curl and python3.
set -euo pipefail

[[ -t 2 ]] && clear=$'\r\033[K' || clear='' # removes a terminal's line of progress
say() { printf '%sgenerate.sh: %s\n' "$clear" "$1" >&2; }
die() { say "$1"; exit 1; }
# shielded COMMAND...: Ctrl-C reaches every process of the script, but only the script acts on it
shielded() { (trap '' INT && exec "$@"); }

output='' format=png arguments=()
while (($#)); do
    case $1 in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit ;;
    -o)
        output=${2:-} && [[ -n $output ]] || die '-o needs the name of a file'
        shift
        ;;
    -*) die "unknown option $1, see --help" ;;
    output_format=*) format=${1#*=} && arguments+=("$1") ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
[[ -n ${arguments[*]:-} ]] || die 'a prompt is needed, see --help'
output=${output:-picture.$format}
folder=$(dirname -- "$output")
[[ -d $folder && -w $folder && ! -d $output ]] || die "cannot write $output"

[[ -n ${ENDPOINT_URL:-} || -n ${ENDPOINT_ID:-} && -n ${RUNPOD_API_KEY:-} ]] ||
    die 'set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL'
endpoint=${ENDPOINT_URL:-${RUNPOD_ENDPOINT_BASE_URL:-https://api.runpod.ai/v2}/${ENDPOINT_ID:-}}
endpoint=${endpoint%/}

job='' method=GET
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
printf 'Authorization: Bearer %s\n' "${RUNPOD_API_KEY:-}" >"$work/headers" # as an argument, ps would show it

# request PATH [CURL'S OPTION ...]: leaves the answer in $work/answer. Tries again while the endpoint is busy, and while
# it is broken if the job is already sent
request() {
    for pause in 1 2 4 8 16 ''; do
        : >"$work/answer"
        status=$(shielded curl -sS --max-time 120 -H "@$work/headers" -H 'Content-Type: application/json' \
            -o "$work/answer" -w '%{http_code}' "${@:2}" "$endpoint$1" 2>"$work/error") || status=000
        [[ -n $pause && ($status == 429 || -n $job && $status == [05]??) ]] || break
        say "the endpoint is busy or broken ($status), trying again in $pause s"
        sleep "$pause"
    done
    case $method$status in
    *2??) ;;
    GET405) method=POST && request "$1" -X POST ;; # the SDK's local server
    *000) die "no answer from $endpoint: $(head -n 1 "$work/error")" ;;
    *401 | *403) die "the API key was refused ($status): check RUNPOD_API_KEY" ;;
    *404) die 'not found (404): check ENDPOINT_ID or ENDPOINT_URL; results are kept for half an hour' ;;
    *) die "the endpoint answered $status: $(head -c 300 "$work/answer")" ;;
    esac
}
# read_answer: prints the job's id, its state, and its progress or error
read_answer() {
    shielded python3 -c '
import json, sys
try:
    answer = json.load(sys.stdin)
    progress = (answer.get("output") or {}).get("progress")
    detail = answer.get("error") or (f"{progress} %" if progress else "")
    print(answer["id"], answer["status"], *detail.split())
except (ValueError, KeyError, AttributeError):
    sys.exit("generate.sh: this is not an answer of RunPod: check ENDPOINT_URL")' <"$work/answer"
}
interrupted() {
    trap - INT TERM
    # the id of a job that was just sent is in the answer alone
    [[ -n $job ]] || read -r job _ <<<"$(read_answer 2>/dev/null)"
    [[ -n $job ]] || exit 130
    shielded curl -sSf -m 20 -o /dev/null -X POST -H "@$work/headers" "$endpoint/cancel/$job" && say "cancelled job $job"
    exit 130
}

shielded python3 -c '
import json, os, re, sys
output, prompt, *fields = sys.argv[1:]
body = {"prompt": json.dumps(prompt)}
ending = os.path.splitext(output)[1][1:].lower()
if ending.isalpha():
    body["output_format"] = json.dumps({"jpg": "jpeg"}.get(ending, ending))
for field in fields:
    name, equals, value = field.partition("=")
    if not equals:
        sys.exit(f"generate.sh: {field} is not FIELD=VALUE; a prompt of several words needs quotes")
    is_number = re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", value)
    body[name] = value if is_number else json.dumps(value)
print("{\"input\": {%s}}" % ", ".join(f"{json.dumps(name)}: {value}" for name, value in body.items()))
' "$output" "${arguments[@]}" >"$work/body"

trap interrupted INT TERM
request /run --data-binary "@$work/body"
while
    answer=$(read_answer) || exit
    read -r job state detail <<<"$answer"
    [[ $state == IN_QUEUE || $state == IN_PROGRESS ]]
do
    [[ -z $clear ]] || printf '%s%s %s' "$clear" "$state" "$detail" >&2
    sleep 0.5
    request "/status/$job" -X "$method"
done
trap - INT TERM
printf %s "$clear" >&2
[[ $state == COMPLETED ]] || die "job $job ended as $state${detail:+: $detail}"

python3 - "$output" "$work/answer" <<'PYTHON'
import base64, json, os, signal, sys, urllib.request
signal.signal(signal.SIGINT, signal.SIG_DFL)
path, answer = sys.argv[1:]
output = json.load(open(answer)).get("output")
if not output:
    sys.exit("generate.sh: the job has no output: its result was over the platform's limit")
images = output.get("images", [output])
for i, image in enumerate(images, start=1):
    name = path if len(images) == 1 else f"-{i}".join(os.path.splitext(path))
    try:
        url = image.get("image_url") or f"data:;base64,{image['image']}"
        with urllib.request.urlopen(url, timeout=120) as picture, open(name, "wb") as file:
            file.write(picture.read())
    except OSError as error:
        sys.exit(f"generate.sh: cannot save {name}: {error}")
    print(f"{name} seed {image['seed']}")
for warning in output.get("warnings", []):
    print(f"warning: {warning}", file=sys.stderr)
PYTHON
