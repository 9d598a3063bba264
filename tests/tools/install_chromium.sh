#!/usr/bin/env bash
# Install Debian's Chromium for the tests of the report, from this machine's own package sources. Needs no root, starts
# nothing and changes nothing outside its folder.
#
#     tests/tools/install_chromium.sh [FOLDER]      FOLDER: .parts/chromium of this checkout
#
# Needs a Debian machine (apt-get, dpkg-deb). FOLDER/chromium then starts it. A machine that has chromium in PATH needs
# none of this. Run twice, it does nothing.
set -euo pipefail

WANTED=(chromium chromium-common fonts-dejavu-core) # and whatever of their libraries the machine lacks

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
FOLDER=$(realpath -m "${1:-$CHECKOUT/.parts/chromium}")

say() { echo "install_chromium: $*"; }
fail() { echo "install_chromium: $*" >&2 && exit 1; }
check() { "$1/chromium" --version 2>/dev/null; }

for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing: this script needs a Debian machine; install Chromium"
done
wanted=$(cksum <"${BASH_SOURCE[0]}")
if [ "$(cat "$FOLDER/installed" 2>/dev/null)" = "$wanted" ] && check "$FOLDER" >/dev/null; then
    say "already in $FOLDER"
    exit
fi
[ ! -e "$FOLDER" ] || [ -e "$FOLDER/installed" ] || fail "$FOLDER holds something else; remove it first"
mkdir -p "$(dirname "$FOLDER")"
work=$(mktemp -d "$FOLDER.XXXXXX") # beside the destination: the last step is a rename
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/new/root" "$work/lists/partial" "$work/cache/archives/partial"

# Lists and cache of its own; sources, proxies, certificates and the list of installed packages are the machine's.
cat >"$work/apt.conf" <<CONF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Keep-Downloaded-Packages "true";
Acquire::Languages "none";
Acquire::Retries "3";
Debug::NoLocking "true";
Dir::State::lists "$work/lists";
Dir::Cache "$work/cache";
CONF
apt() { apt-get -c "$work/apt.conf" -q -q -y "$@"; }
apt update || fail "cannot read the package lists of this machine's sources"
apt install --reinstall --download-only "${WANTED[@]}" || fail "cannot fetch ${WANTED[*]}"
for package in "$work"/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$work/new/root"
done
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
version=$(check "$work/new") || fail "the fetched Chromium does not start here"
say "fetched $version"
echo "$wanted" >"$work/new/installed"
rm -rf "$FOLDER"
mv "$work/new" "$FOLDER"
say "installed in $FOLDER ($(du -sm "$FOLDER" | cut -f1) MB)"
