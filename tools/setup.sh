#!/usr/bin/env bash
# Makes a virtual environment that runs slotstream: system packages, Python, pinned Python packages.
# usage: tools/setup.sh VENV        (called by `make setup`, from the project's root)
#   PYTHON3      the interpreter to build on; default: the first python3* on PATH that is new enough
#   CONSTRAINTS  pins for pip; default: constraints.txt; empty: the newest versions pyproject.toml allows
set -euo pipefail

venv=${1:?usage: tools/setup.sh VENV}
constraints=${CONSTRAINTS-constraints.txt}
pythons=(python3 python3.11 python3.12 python3.13 python3.14)
extras=dali,dev,ffcv,onnx,parquet,power,remote,timm

die() { echo "error: $*" >&2; exit 2; }
say() { echo "setup: $*"; }

# The first interpreter of at least 3.11; prints nothing if none is found.
find_python() {
    local candidate
    for candidate in ${PYTHON3:-"${pythons[@]}"}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

# The first of the given packages that apt can install; the last one when it knows none of them.
available() {
    local package
    for package in "$@"; do
        [[ $(apt-cache policy "$package" 2>/dev/null) == *"Candidate: "[0-9]* ]] && break
    done
    echo "$package"
}

# One Debian package name a line for all that is still missing: to run Python, and to build ffcv.
missing_packages() { missing_python; missing_for_ffcv; }

missing_python() {
    local version
    if [ -n "$(find_python)" ]; then
        "$(find_python)" -c 'import ensurepip, venv' 2>/dev/null || echo "$(python_version)-venv"
    else
        version=$(available python3.13 python3.12 python3.11)
        printf '%s\n' "$version" "$version-venv" "$version-dev"
    fi
}

missing_for_ffcv() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || available libturbojpeg-dev libturbojpeg0-dev
    [ -z "$(find_python)" ] || "$(find_python)" -c 'import sys, sysconfig, os
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        echo "$(python_version)-dev"
}

python_version() {
    "$(find_python)" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'
}

install_system_packages() {
    local sudo=() missing
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} != 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        sudo=(sudo -n)
    fi
    if ! command -v apt-get >/dev/null || ! "${sudo[@]}" true 2>/dev/null; then
        if [ -z "$(missing_python)" ]; then
            say "without ffcv, which only tests need: no root to 'apt-get install ${missing[*]}'"
            extras=${extras/,ffcv/}
            return 0
        fi
        die "system packages are missing, and there is no apt-get with root or password-less sudo:" \
            "ask for 'apt-get install ${missing[*]}'," \
            "or use environment.yml or the Dockerfile (docs/install.md)"
    fi
    say "apt-get update"
    "${sudo[@]}" apt-get update -qq
    mapfile -t missing < <(missing_packages) # the names depend on the release's packages
    say "apt-get install ${missing[*]}"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} = 0 ] || die "still missing after apt-get install: ${missing[*]}"
}

make_venv() {
    if [ -x "$venv/bin/pip" ] && "$venv/bin/python" -c '' 2>/dev/null; then
        return 0
    fi
    say "virtual environment in $venv, from $(find_python)"
    "$(find_python)" -m venv --clear "$venv"
}

install_python_packages() {
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install)
    [ -t 1 ] || pip+=(--quiet --quiet) # progress is for people, a log gets errors only
    [ -z "$constraints" ] || pip+=(--constraint "$constraints")
    say "Python packages (PyTorch and its CUDA libraries: about 3 GB to download, 6 GB on disk)"
    "${pip[@]}" --upgrade pip setuptools wheel
    # Without isolation the build of ffcv uses the pinned setuptools, not whatever is newest that day.
    "${pip[@]}" --no-build-isolation --editable ".[$extras]"
    # The extra [crf]. In isolation, since it builds with a Cython of its own.
    "${pip[@]}" pydensecrf2 || say "pydensecrf2 was not built: --crf will be refused"
}

# ffcv and cv2 load system libraries: check now that they are installed.
check_imports() {
    local output
    [[ $extras == *ffcv* ]] || return 0
    output=$("$venv/bin/python" -c 'import cv2, ffcv.libffcv' 2>&1) ||
        die "the installed packages do not load: $(tail -n 1 <<<"$output")"
}

# Compiles what the first batch would wait for. The Dockerfile runs this script before the code is there.
warm_up() {
    [ ! -e tools/warm_up.py ] || "$venv/bin/python" -m tools.warm_up
}

if [ -n "${PYTHON3:-}" ] && [ -z "$(find_python)" ]; then
    die "PYTHON3=$PYTHON3 is not Python 3.11 or newer"
fi
install_system_packages
make_venv
install_python_packages
check_imports
warm_up
say "done"
