#!/usr/bin/env bash
# infra/setup-environment.sh main|serve|litellm: makes .venv, .venv-serve or .venv-litellm (for a benchmark) from its
# lock, with packages taken as pip is configured.
#
# torch comes first and through pip itself, because pip knows its own settings (find-links, extra indexes). On a machine
# without a GPU the locked CPU build is taken; where pip finds none, from PyTorch's own CPU index. The rest is installed
# by uv without resolving: the lock is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
python=${PYTHON:-python3.11}

say() { printf '%s\n' "$*" >&2; }
stop() { say "setup: $*"; exit 1; }

command -v "$python" >/dev/null || python=python3
command -v "$python" >/dev/null || stop "no Python found; install Python 3.11 (or say: make PYTHON=/path/to/python3.11)"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$version" = 3.11 ] || stop "Python 3.11 is needed (the lock covers no other), $python is $version; say: make PYTHON=/path/to/python3.11"

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi
[ -z "${MANSARD_GPU:-}" ] || gpu=$MANSARD_GPU
case $name in
  main) folder=.venv; lock=infra/constraints/main.txt ;;
  serve) folder=.venv-serve; lock=infra/constraints/serve-cpu.txt; [ $gpu = no ] || lock=infra/constraints/serve-cuda.txt ;;
  litellm) folder=.venv-litellm; lock=infra/constraints/litellm.txt ;;
  *) stop "unknown environment $name: main, serve or litellm" ;;
esac

say "setup: $folder from $lock"
"$python" -m venv "$folder" || stop "cannot make $folder; on Debian: apt-get install python3.11-venv"
pip="$folder/bin/python -m pip --disable-pip-version-check"

torch=$(grep -E '^torch==' "$lock" || true)
if [ -z "$torch" ]; then
  :
elif [ $gpu = yes ]; then
  wanted=${torch%%+*}
  $pip install --quiet "$wanted" || stop "pip found no $wanted; set pip's index (PIP_INDEX_URL) to one that has it"
elif ! $pip install --quiet --no-deps "$torch" 2>/dev/null; then
  $pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" \
    || stop "no CPU build of torch found ($torch): set PIP_FIND_LINKS to a folder that holds its wheel, or PIP_EXTRA_INDEX_URL to an index that has it"
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
grep -vE '^torch==' "$lock" > "$rest"
"$uv" pip install --quiet --python "$folder/bin/python" --no-deps -r "$rest" || stop "uv could not install $lock; see the lines above"
if [ "$name" = main ]; then
  "$uv" pip install --quiet --python "$folder/bin/python" --no-deps --no-build-isolation -e . || stop "the editable install of mansard failed"
elif [ "$name" = serve ]; then # what serves carry-ons: a plugin of vLLM's, without anything of the trainer
  "$uv" pip install --quiet --python "$folder/bin/python" --no-deps --no-build-isolation -e infra/vllm-plugin || stop "the editable install of infra/vllm-plugin failed"
fi
date -u > "$folder/.ready"
say "setup: $folder is ready"
