#!/bin/sh
# Checks for the system libraries that the simulator's software renderer needs and installs them through apt
# when it may; otherwise stops with the exact command. A compiler is wished for (fast CPU paths), not needed.
set -eu

has_library() {
    for dir in /lib /usr/lib /usr/local/lib; do
        find "$dir" -maxdepth 2 -name "$1*" 2>/dev/null | grep -q . && return 0
    done
    return 1
}

needed=""
has_library libOSMesa.so || needed="$needed libosmesa6"
has_library libGL.so.1 || needed="$needed libgl1"
has_library libEGL.so.1 || needed="$needed libegl1"
wished=""
command -v g++ >/dev/null 2>&1 || wished="g++"
[ -n "$needed$wished" ] || exit 0

if [ "$(id -u)" = 0 ]; then
    sudo=""
else
    sudo="sudo"
fi
command="$sudo apt-get update && $sudo apt-get install -y$needed${wished:+ $wished}"

if command -v apt-get >/dev/null 2>&1 && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
    echo "installing system packages:$needed $wished"
    $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq $needed $wished >/dev/null && exit 0
    echo "apt-get failed" >&2
fi
if [ -n "$needed" ]; then
    echo "system libraries are missing:$needed" >&2
    echo "install them, then run make again:" >&2
    echo "    $command" >&2
    exit 1
fi
echo "no C++ compiler found: vilma works without one, only its CPU paths are slower. To add it: $command" >&2
