#!/usr/bin/env bash
# Install OpenSSH's server (and nftables) for the tests, from this machine's own package sources (debian.sh).
#
#     tests/tools/install_sshd.sh [FOLDER]      FOLDER: .parts/sshd of this checkout
#
# Needs a Debian machine (apt-get, dpkg-deb). A machine that has sshd already, in PATH or /usr/sbin, needs none of this.
# Run twice, it does nothing.
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

WANTED=(openssh-server openssh-sftp-server)
WELCOME=(nftables) # the network test drops packets with it

libraries() { find "$1/lib" "$1/usr/lib" -name '*.so*' -printf '%h\n' 2>/dev/null | sort -u | paste -sd :; }
check() { LD_LIBRARY_PATH=$(libraries "$1") "$1/usr/sbin/sshd" -V 2>&1 | grep -i openssh; } # old ones answer with usage

begin "${1:-$CHECKOUT/.parts/sshd}" "OpenSSH's server"
fetch "${WANTED[@]}" || fail "cannot fetch ${WANTED[*]}"
fetch "${WELCOME[@]}" || say "no ${WELCOME[*]}: the network test will be skipped"
unpack "$work/new"
rm -rf "$work/new/usr/share" "$work/new/etc" "$work/new/var"
finish sshd
