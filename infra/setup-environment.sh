#!/usr/bin/env bash
# infra/setup-environment.sh main|serve|litellm|python312: makes .venv, .venv-serve, .venv-litellm (for a benchmark) or
# .venv-python312 (main without torch, for .ci/run) from its lock, with packages taken as pip is configured.
#
# torch comes first and through pip itself, because pip knows its own settings (find-links, extra indexes). On a machine
# without a GPU the locked CPU build is taken; where pip finds none, from PyTorch's own CPU index. The rest is installed
# by uv without resolving: the lock is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1

say() { printf '%s\n' "$*" >&2; }
stop() { say "setup: $*"; exit 1; }

# The first interpreter that starts (a pyenv shim may not) and has a version that the lock is for.
case $name in main) versions="3.11 3.12" ;; python312) versions=3.12 ;; *) versions=3.11 ;; esac
python="" present=""
for candidate in "${PYTHON:-python3.11}" python3.11 python3.12 python3; do
  version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  present+=" $candidate ($version)"
  case " $versions " in *" $version "*) python=$candidate; break ;; esac
done
[ -n "$python" ] || stop "environment $name: no Python ${versions// / or } is here (${present# }); install one, or say: make PYTHON=/path/to/python3.11"

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi
[ -z "${MANSARD_GPU:-}" ] || gpu=$MANSARD_GPU
case $name in
  main) folder=.venv; lock=infra/constraints/main.txt ;;
  serve) folder=.venv-serve; lock=infra/constraints/serve-cpu.txt; [ $gpu = no ] || lock=infra/constraints/serve-cuda.txt ;;
  litellm) folder=.venv-litellm; lock=infra/constraints/litellm.txt ;;
  python312) folder=.venv-python312; lock=infra/constraints/main.txt ;;
  *) stop "unknown environment $name: main, serve, litellm or python312" ;;
esac

say "setup: $folder from $lock, Python $version ($python)"
"$python" -m venv "$folder" || stop "cannot make $folder; on Debian: apt-get install python$version-venv"
pip="$folder/bin/python -m pip --disable-pip-version-check"

without=torch
torch=$(grep -E '^torch==' "$lock" || true)
if [ "$name" = python312 ]; then # neither torch nor what is built on it, nor what only those use
  torch=""
  without="torch|torchao|accelerate|auto-round|compressed-tensors|datasets|deepspeed|evaluate|llmcompressor|lm-eval|matplotlib"
  without+="|mypy|nltk|nvidia-ml-py|peft|rouge-score|ruff|sacrebleu|scikit-learn|transformers"
fi
if [ -z "$torch" ]; then
  :
elif [ $gpu = yes ]; then
  wanted=${torch%%+*}
  $pip install --quiet "$wanted" || stop "pip found no $wanted; set pip's index (PIP_INDEX_URL) to one that has it"
elif ! $pip install --quiet --no-deps "$torch" 2>/dev/null; then
  $pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" \
    || stop "no CPU build of torch found ($torch): set PIP_FIND_LINKS to a folder that holds its wheel, or PIP_EXTRA_INDEX_URL to an index that has it; MANSARD_GPU=yes bash infra/setup-environment.sh main takes the CUDA build of some 3 GB, which computes on a CPU, too"
fi

# uv reads none of pip's settings, so they are passed on.
$pip install -qq "$(grep -E '^uv==' infra/constraints/main.txt)" || stop "pip cannot install uv; check pip's index settings"
uv="$folder/bin/uv"
setting() { $pip config get "global.$1" 2>/dev/null || true; }
export UV_FIND_LINKS=$(printf '%s' "${PIP_FIND_LINKS:-$(setting find-links)}" | tr -s ' \n' ',')
index=${PIP_INDEX_URL:-$(setting index-url)}
extra=${PIP_EXTRA_INDEX_URL:-$(setting extra-index-url)}
certificates=${PIP_CERT:-$(setting cert)}
[ -z "$index" ] || export UV_DEFAULT_INDEX=$index
[ -z "$extra" ] || export UV_INDEX=$extra UV_INDEX_STRATEGY=unsafe-best-match
[ -z "$certificates" ] || export SSL_CERT_FILE=$certificates
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS

rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
grep -vE "^($without)==" "$lock" > "$rest"
"$uv" pip install --quiet --python "$folder/bin/python" --no-deps -r "$rest" || stop "uv could not install $lock; see the lines above"
if [ "$name" = main ] || [ "$name" = python312 ]; then
  "$uv" pip install --quiet --python "$folder/bin/python" --no-deps --no-build-isolation -e . || stop "the editable install of mansard failed"
elif [ "$name" = serve ]; then # what serves carry-ons: a plugin of vLLM's, without anything of the trainer
  "$uv" pip install --quiet --python "$folder/bin/python" --no-deps --no-build-isolation -e infra/vllm-plugin || stop "the editable install of infra/vllm-plugin failed"
fi
date -u > "$folder/.ready"
say "setup: $folder is ready"
