#!/usr/bin/env bash
# Makes the environment in which the real megatron-core runs on a CPU.  usage: setup_megatron.sh VERSION
#   MTP_CONVERT_REFERENCE_HOME   where environments are kept (default ~/.cache/mtp-convert/reference)
#   PYTHON                       interpreter to start from (default python3); its packages are reused
# Exit code 75: the package index cannot be reached.
set -euo pipefail

version=${1:?usage: setup_megatron.sh VERSION}
home=${MTP_CONVERT_REFERENCE_HOME:-$HOME/.cache/mtp-convert/reference}
target=$home/megatron-core-$version
base=$("${PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
recipe="recipe 1, megatron-core $version"

# An environment made from another checkout serves as well, as long as the packages it borrows are still there.
borrowed='from importlib.util import find_spec; exit(not (find_spec("torch") and find_spec("safetensors")))'
if [ "$(cat "$target/ready" 2>/dev/null)" = "$recipe" ] && "$target/bin/python" -c "$borrowed"; then
  echo "megatron-core $version: ready in $target"
  exit 0
fi

mkdir -p "$home"
work=$(mktemp -d "$home/.new-XXXXXX")
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
"${PYTHON:-python3}" -m venv "$work"
py=$work/bin/python
site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# A venv does not see the packages of the venv that made it; this line does that, and saves a second torch.
echo "$base" >"$site/base_environment.pth"

install() {
  "$py" -m pip install "$@" && return
  "$py" -m pip index versions megatron-core >/dev/null 2>&1 || exit 75
  exit 1
}

install torch==2.13.0 numpy einops packaging psutil pyyaml safetensors
# --no-deps: the dependency list pulls GPU packages. The code runs on Python 3.11 although it asks for 3.12, and
# the compiled part of the wheel (data set helpers) is never imported, so the wheel for 3.12 serves every Python;
# where there is no wheel for the platform, build from source.
"$py" -m pip install --no-deps --target "$site" --python-version 3.12 --only-binary :all: \
  "megatron-core==$version" 2>/dev/null ||
  install --no-deps --ignore-requires-python "megatron-core==$version"
"$py" -c 'import torch, einops, psutil, yaml, packaging, safetensors, importlib.metadata as m; m.version("megatron-core")'

echo "$recipe" >"$work/ready"
rm -rf "$target"
mv "$work" "$target"
echo "megatron-core $version: installed in $target"
