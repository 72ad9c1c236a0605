#!/usr/bin/env bash
# usage: generate.sh PROMPT [-o FILE] [FIELD=VALUE ...]
#
# Generates a picture and saves it as FILE (default: picture.png); several become picture-1.png, ...
# FIELD=VALUE is any field of the request, such as seed=7 or num_images=2. FILE's ending sets output_format.
#
# The endpoint is that of ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
# Needs bash, curl and python3.
set -euo pipefail

[[ -t 2 ]] && clear=$'\r\033[K' || clear='' # removes a terminal's line of progress
say() { printf '%sgenerate.sh: %s\n' "$clear" "$1" >&2; }
die() { say "$1"; exit 1; }

output='' arguments=()
while (($#)); do
    case $1 in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit ;;
    -o) [[ -n ${2:-} ]] || die '-o needs the name of a file'; output=$2; shift ;;
    -*) die "unknown option $1, see --help" ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
((${#arguments[@]})) || die 'a prompt is needed, see --help'
[[ -w $(dirname -- "$output") && ! -d $output ]] || die "cannot write $output"
[[ -n ${ENDPOINT_URL:-} || -n ${ENDPOINT_ID:-} && -n ${RUNPOD_API_KEY:-} ]] ||
    die 'set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL'
endpoint=${ENDPOINT_URL:-${RUNPOD_ENDPOINT_BASE_URL:-https://api.runpod.ai/v2}/${ENDPOINT_ID:-}}

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
printf 'Authorization: Bearer %s\n' "${RUNPOD_API_KEY:-}" >"$work/headers" # as an argument, ps would show it
python3 - "$output" "${arguments[@]}" >"$work/body" <<'PYTHON'
import json, os, re, sys
path, prompt, *fields = sys.argv[1:]
job_input = {"prompt": prompt}
ending = os.path.splitext(path)[1][1:].lower()
if ending.isalpha():
    job_input["output_format"] = {"jpg": "jpeg"}.get(ending, ending)
for field in fields:
    name, equals, value = field.partition("=")
    if not equals:
        sys.exit(f"generate.sh: {field} is not FIELD=VALUE; a prompt of several words needs quotes")
    is_number = re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", value)
    job_input[name] = json.loads(value) if is_number else value
json.dump({"input": job_input}, sys.stdout)
PYTHON

# Ctrl-C reaches every process of a script; a shielded one goes on, so that no answer with a job's id is lost
shielded() { (trap '' INT && exec "$@"); }
# request METHOD PATH [CURL'S OPTION ...]: sets $http to the answer's status, and leaves the answer in $work/answer
request() {
    http=$(shielded curl -sS -m 120 -X "$1" -H "@$work/headers" -H 'Content-Type: application/json' \
        -o "$work/answer" -w '%{http_code}' "${@:3}" "${endpoint%/}$2" 2>"$work/error") || http=000
}
# sets $job, $state, and $detail to the job's progress or error
read_answer() {
    case $http in
    2??) ;;
    000) die "no answer from $endpoint: $(head -n 1 "$work/error")" ;;
    401 | 404) die "the endpoint answered $http: check RUNPOD_API_KEY, and ENDPOINT_ID or ENDPOINT_URL" ;;
    *) die "the endpoint answered $http: $(head -c 300 "$work/answer")" ;;
    esac
    answer=$(shielded python3 -c 'import json, sys
answer = json.load(sys.stdin)
progress = (answer.get("output") or {}).get("progress")
print(answer["id"], answer["status"], answer.get("error") or (f"{progress} %" if progress else ""))
' <"$work/answer" 2>"$work/error") || die 'this is not an answer of RunPod: check ENDPOINT_URL'
    read -r job state detail <<<"$answer"
}

interrupted='' method=GET failures=0
trap 'interrupted=yes' INT TERM
request POST /run --data-binary "@$work/body"
read_answer
while [[ $state == IN_QUEUE || $state == IN_PROGRESS ]]; do
    if [[ -n $interrupted ]]; then
        request POST "/cancel/$job"
        [[ $http != 2?? ]] || say "cancelled job $job"
        exit 130
    fi
    [[ -z $clear ]] || printf '%s%s %s' "$clear" "$state" "$detail" >&2
    sleep 0.5 || true
    request "$method" "/status/$job"
    case $http in
    405) method=POST ;; # the SDK's local server
    000 | 429 | 5??)
        ((++failures < 60)) || die "the endpoint is still busy or broken ($http); ask for job $job later"
        say "the endpoint is busy or broken ($http), asking again in 5 s"
        sleep 5 || true
        ;;
    *) failures=0; read_answer ;;
    esac
done
printf %s "$clear" >&2
[[ $state == COMPLETED ]] || die "job $job ended as $state${detail:+: $detail}"

python3 - "$output" "$work/answer" <<'PYTHON'
import json, os, signal, sys, urllib.request
signal.signal(signal.SIGINT, signal.SIG_DFL)
path, answer = sys.argv[1:]
output = json.load(open(answer)).get("output")
if not output:
    sys.exit("generate.sh: the job has no output: its result was over the platform's limit")
path = path or f"picture.{output.get('output_format', 'png')}"
images = output.get("images", [output])
for i, image in enumerate(images, start=1):
    name = path if len(images) == 1 else f"-{i}".join(os.path.splitext(path))
    url = image.get("image_url") or f"data:;base64,{image['image']}"
    try:
        with urllib.request.urlopen(url, timeout=120) as source, open(name, "wb") as file:
            file.write(source.read())
    except OSError as error:
        sys.exit(f"generate.sh: cannot save {name}: {error}")
    print(f"{name} seed {image['seed']}")
for warning in output.get("warnings", []):
    print(f"warning: {warning}", file=sys.stderr)
PYTHON
