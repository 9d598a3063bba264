#!/usr/bin/env bash
# Execute the Dockerfile without a container engine, and start what it makes.
#
#     tests/tools/image.sh [--reduced] [--base bare|machine] [--folder FOLDER] [--build-arg NAME=VALUE]...
#
# --base bare     (default) a fresh Debian bookworm with its own Python 3.11, by mmdebstrap or debootstrap
# --base machine  this machine's own root, seen through an overlay: needs neither of them, and shows less
# --reduced       the packages of .venv count as installed, and the run is a tiny one; otherwise everything is installed
#                 (several GB) and the image's own command is run
# --folder        where to build (default: in memory if reduced, else a folder of /var/tmp); removed at the end
#
# Needs root, Linux name spaces and overlay mounts. Exit code 77: this machine cannot do that (the reason is said).
set -euo pipefail

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3}
base=bare folder='' reduced='' passed=()

say() { echo "image: $*"; }
cannot() { echo "image: skipped: $*" >&2 && exit 77; }

if [ "${1:-}" = --inside ]; then # in the name spaces, as process 1 of its own
    shift
    base=$1 folder=$2 reduced=$3
    shift 3
    if [ -n "$reduced" ]; then mount -t tmpfs tmpfs "$folder"; fi
    mkdir -p "$folder/work" "$folder/base"
    if [ "$base" = bare ]; then
        suite=bookworm include=python3-minimal,python3-venv,ca-certificates,passwd
        mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $suite" 'Component: main' 'Created-By: Packages' | head -n 1)
        [ -n "$mirror" ] || cannot "no package source for $suite is set up on this machine"
        SECONDS=0
        if command -v mmdebstrap >/dev/null; then
            mmdebstrap --quiet --mode=root --variant=minbase --include=$include \
                --aptopt='APT::Install-Recommends "false"' $suite "$folder/base" "deb $mirror $suite main" >"$folder/log" 2>&1 \
                || { tail -n 20 "$folder/log" >&2 && exit 1; }
        else
            debootstrap --variant=minbase --include=$include $suite "$folder/base" "$mirror" >"$folder/log" 2>&1 \
                || { tail -n 20 "$folder/log" >&2 && exit 1; }
        fi
        say "bare Debian $suite ($(du -sm "$folder/base" | cut -f1) MB) after $SECONDS s"
        lower=$folder/base
    else
        lower=/
        /usr/bin/python3 -c 'import ensurepip, tomllib' 2>/dev/null || cannot "/usr/bin/python3 is older than 3.11, or has no venv"
    fi
    options=(--whole)
    if [ -n "$reduced" ]; then options=(--packages "$reduced"); fi
    exec "$PYTHON" "$CHECKOUT/tests/tools/image.py" --base "$lower" --work "$folder/work" "${options[@]}" "$@"
fi

while [ $# -gt 0 ]; do
    case $1 in
        --reduced) reduced=yes && shift ;;
        --base) base=$2 && shift 2 ;;
        --folder) folder=$2 && shift 2 ;;
        --build-arg) passed+=("$1" "$2") && shift 2 ;;
        *) echo "image: unknown option $1; see the head of ${BASH_SOURCE[0]}" >&2 && exit 2 ;;
    esac
done
[ "$(id -u)" = 0 ] || cannot "needs root"
for tool in unshare setpriv chroot mount; do command -v $tool >/dev/null || cannot "$tool is missing"; done
unshare --mount --pid --net --fork true 2>/dev/null || cannot "name spaces are not allowed here"
if [ "$base" = bare ]; then
    command -v mmdebstrap debootstrap >/dev/null || cannot "neither mmdebstrap nor debootstrap is installed (apt-get install mmdebstrap)"
fi
if [ -n "$reduced" ]; then
    reduced=$("$CHECKOUT/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
fi
folder=${folder:-$(mktemp -d /var/tmp/secateur-image.XXXXXX)}
mkdir -p "$folder"
trap 'rm -rf --one-file-system "$folder"' EXIT
status=0
unshare --mount --pid --fork --kill-child bash "${BASH_SOURCE[0]}" \
    --inside "$base" "$folder" "$reduced" "${passed[@]}" || status=$?
exit $status
