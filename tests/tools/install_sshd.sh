#!/usr/bin/env bash
# Install OpenSSH's server (and nftables) for the tests, from this machine's own package sources. Needs no root, starts
# nothing and changes nothing outside its folder.
#
#     tests/tools/install_sshd.sh [FOLDER]      FOLDER: .parts/sshd of this checkout
#
# Needs a Debian machine (apt-get, dpkg-deb). A machine that has sshd already, in PATH or /usr/sbin, needs none of this.
# Run twice, it does nothing.
set -euo pipefail

WANTED=(openssh-server openssh-sftp-server) # and whatever of their libraries the machine lacks
WELCOME=(nftables)                          # the network test drops packets with it

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
FOLDER=$(realpath -m "${1:-$CHECKOUT/.parts/sshd}")

say() { echo "install_sshd: $*"; }
fail() { echo "install_sshd: $*" >&2 && exit 1; }
libraries() { find "$1/lib" "$1/usr/lib" -name '*.so*' -printf '%h\n' 2>/dev/null | sort -u | paste -sd :; }
check() { LD_LIBRARY_PATH=$(libraries "$1") "$1/usr/sbin/sshd" -V 2>&1 | grep -i openssh; } # old ones answer with usage

for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing: this script needs a Debian machine; install OpenSSH's server"
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
mkdir -p "$work/new" "$work/lists/partial" "$work/cache/archives/partial"

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
apt install --reinstall --download-only "${WELCOME[@]}" || say "no ${WELCOME[*]}: the network test will be skipped"
for package in "$work"/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$work/new"
done
rm -rf "$work/new/usr/share" "$work/new/etc" "$work/new/var"
version=$(check "$work/new") || fail "the fetched sshd does not start here"
say "fetched $version"
echo "$wanted" >"$work/new/installed"
rm -rf "$FOLDER"
mv "$work/new" "$FOLDER"
say "installed in $FOLDER ($(du -sm "$FOLDER" | cut -f1) MB)"
