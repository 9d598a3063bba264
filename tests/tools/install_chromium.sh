#!/usr/bin/env bash
# Install Debian's Chromium for the tests of the report, from this machine's own package sources (debian.sh).
#
#     tests/tools/install_chromium.sh [FOLDER]      FOLDER: .parts/chromium of this checkout
#
# Needs a Debian machine (apt-get, dpkg-deb). FOLDER/chromium then starts it. A machine that has chromium in PATH needs
# none of this. Run twice, it does nothing.
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

WANTED=(chromium chromium-common fonts-dejavu-core)

check() { "$1/chromium" --version 2>/dev/null; }

begin "${1:-$CHECKOUT/.parts/chromium}" Chromium
fetch "${WANTED[@]}" || fail "cannot fetch ${WANTED[*]}"
unpack "$work/new/root"
rm -rf "$work/new/root/usr/share/doc" "$work/new/root/usr/share/man" "$work/new/root/var"

# The program itself: Debian's wrapper around it looks for its parts under /usr and /etc.
cat >"$work/new/chromium" <<'WRAPPER'
#!/bin/sh
# Chromium without installation; written by tests/tools/install_chromium.sh.
root=$(cd "$(dirname "$0")" && pwd)/root
libraries=$(find "$root/usr/lib" "$root/lib" -name '*.so*' -printf '%h\n' 2>/dev/null | sort -u | paste -sd :)
LD_LIBRARY_PATH="$libraries" exec "$root/usr/lib/chromium/chromium" "$@"
WRAPPER
chmod 755 "$work/new/chromium"
finish Chromium
