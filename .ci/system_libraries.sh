#!/bin/sh
# usage: system_libraries.sh PYTHON
# Checks for the system libraries that the simulator's software renderer needs (and Debian's venv package) and
# installs them through apt when it may; otherwise stops with the exact command. A compiler is wished for (it makes
# the CPU paths fast), not needed.
set -eu
python=${1:-python3}

has_library() {
    for dir in /lib /usr/lib /lib64 /usr/lib64 /usr/local/lib; do
        find "$dir" -maxdepth 2 -name "$1*" 2>/dev/null | grep -q . && return 0
    done
    return 1
}

needed=""
has_library libOSMesa.so || needed="$needed libosmesa6"
has_library libGL.so.1 || needed="$needed libgl1"
has_library libEGL.so.1 || needed="$needed libegl1"
"$python" -c 'import ensurepip' 2>/dev/null || needed="$needed python3-venv"
wished=""
# Asked for once: an environment that stands already has had its chance.
[ -e .venv/.ready ] || command -v g++ >/dev/null 2>&1 || wished=" g++"
[ -n "$needed$wished" ] || exit 0

sudo=""
[ "$(id -u)" = 0 ] || sudo="sudo "
may_install=no
if command -v apt-get >/dev/null 2>&1 && { [ -z "$sudo" ] || sudo -n true 2>/dev/null; }; then
    may_install=yes
fi

install() {
    echo "installing system packages:$*"
    # shellcheck disable=SC2086
    ${sudo}apt-get update -qq && ${sudo}env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $* >/dev/null
}

if [ -n "$needed" ]; then
    if [ $may_install = no ] || ! install "$needed"; then
        echo "system packages are missing (Debian's names):$needed" >&2
        echo "install them, then run make again, for example:" >&2
        echo "    ${sudo}apt-get update && ${sudo}apt-get install -y$needed" >&2
        exit 1
    fi
fi
if [ -n "$wished" ] && { [ $may_install = no ] || ! install "$wished"; }; then
    echo "no C++ compiler found: everything works without one, the CPU paths are slower (${sudo}apt-get install g++)" >&2
fi
