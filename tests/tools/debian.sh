# Sourced by install_*.sh: programs of Debian packages in a folder of their own, from this machine's own package sources.
# Needs no root, starts nothing and changes nothing outside that folder.
#
# The script that sources it has a function `check FOLDER`, which prints a version if what lies there works, and calls
# begin, fetch, unpack and finish, in this order.
set -euo pipefail

SCRIPT=$(realpath "$0")
NAME=$(basename "$SCRIPT" .sh)
CHECKOUT=$(cd "$(dirname "$SCRIPT")/../.." && pwd)

say() { echo "$NAME: $*"; }
fail() { echo "$NAME: $*" >&2 && exit 1; }

begin() { # FOLDER, what to install by other means: the script ends here if that is in FOLDER already
    FOLDER=$(realpath -m "$1")
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || fail "$tool is missing: this script needs a Debian machine; install $2"
    done
    wanted=$(cat "$SCRIPT" "${BASH_SOURCE[0]}" | cksum)
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
    apt update || fail "cannot read the package lists of this machine's sources"
}

apt() { apt-get -c "$work/apt.conf" -q -q -y "$@"; }

fetch() { # packages..., with whatever of their libraries the machine lacks
    apt install --reinstall --download-only "$@"
}

unpack() { # FOLDER: what was fetched, into it
    mkdir -p "$1"
    for package in "$work"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$1"
    done
}

finish() { # what it is: $work/new becomes FOLDER, if it works
    version=$(check "$work/new") || fail "the fetched $1 does not start here"
    say "fetched $version"
    echo "$wanted" >"$work/new/installed"
    rm -rf "$FOLDER"
    mv "$work/new" "$FOLDER"
    say "installed in $FOLDER ($(du -sm "$FOLDER" | cut -f1) MB)"
}
