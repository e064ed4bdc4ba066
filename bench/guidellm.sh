#!/bin/sh
# guidellm, a load tool for OpenAI-compatible servers, against a running system, at rising rates:
#
#     bench/guidellm.sh http://127.0.0.1:8000 1,2,4,8
#
# The rates are requests a second (Poisson arrivals), each for SECONDS_EACH (20); prompts of PROMPT_TOKENS (100), answers of
# OUTPUT_TOKENS (32). The report goes to OUTPUT (a folder). guidellm gets an environment of its own below .clients,
# which borrows torch and transformers from the project's, so that nothing large is fetched again.
set -eu
target=$1
rates=$2
root=$(cd "$(dirname "$0")/.." && pwd)
own=$root/.clients/guidellm
borrowed=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
if [ ! -x "$own/bin/guidellm" ]; then
    "$root/.venv/bin/python" -m venv "$own"
    echo "$borrowed" > "$("$own/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
    "$own/bin/python" -m pip install --quiet "guidellm==0.8.1"
fi
model=$("$root/.venv/bin/python" -m molink_stage_worker.models demo | tail -1 |
    "$root/.venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["folder"])')
set -- --backend "kind=openai_http,target=$target,model=demo,request_format=/v1/completions" \
    --data "kind=synthetic_text,prompt_tokens=${PROMPT_TOKENS:-100},output_tokens=${OUTPUT_TOKENS:-32}" \
    --tokenizer "kind=huggingface_auto,model=$model" \
    --constraint "kind=max_duration,seconds=${SECONDS_EACH:-20}" \
    --profile "kind=poisson,rate=1" --override profile.rate "$rates" \
    --output "kind=json,path=${OUTPUT:-$root/.clients/guidellm/report}.json" \
    --disable-console-interactive
HF_HUB_OFFLINE=1 exec "$own/bin/guidellm" run "$@"
