#!/usr/bin/env bash
# Install an emulated ARM device for the tests: qemu, an aarch64 Debian userland with Python 3.11, and the aarch64
# wheels of onnxruntime and numpy in the versions of this project. Needs no root and changes nothing outside its folder.
#
#     tests/tools/install_arm.sh [FOLDER]      FOLDER: $SECATEUR_ARM, or .parts/arm64 of this checkout
#
# Needs a Debian machine (apt-get, dpkg-deb; its own package sources are read for where to download from) and Python
# with pip: $PYTHON, or the checkout's .venv. FOLDER/python then starts Python on the emulated device:
#
#     .parts/arm64/python -c 'import platform; print(platform.machine())'
#
# SECATEUR_ARM_CPU chooses another core than cortex-a76 (qemu-aarch64 -cpu help lists them). Run twice, it does nothing.
set -euo pipefail

USERLAND=bookworm # has Python 3.11
QEMU_SUITE=trixie # has qemu 10; qemu 7.2 shows the guest the host's /proc/cpuinfo, which kills onnxruntime
QEMU_AT_LEAST=10
PACKAGES=(
    python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3
    libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1
)

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
FOLDER=$(realpath -m "${1:-${SECATEUR_ARM:-$CHECKOUT/.parts/arm64}}")
PYTHON=${PYTHON:-$CHECKOUT/.venv/bin/python}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "install_arm: $*"; }
fail() { echo "install_arm: $*" >&2 && exit 1; }
mebibytes() { du -sm "$1" | cut -f1; }

check() { # the wrapper imports the runtime on the emulated device, and leaves its bytecode for later starts
    "$1/python" -c '
import platform
import ncnn, numpy, onnxruntime
print("install_arm: it works:", platform.machine(), "Python", platform.python_version(),
      "onnxruntime", onnxruntime.__version__, "ncnn", ncnn.__version__, "numpy", numpy.__version__)
assert platform.machine() == "aarch64"'
}

for tool in apt-get dpkg-deb tar; do
    command -v "$tool" >/dev/null || fail "$tool is missing: this script needs a Debian machine"
done
"$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip; build the environment with make, or set PYTHON"
versions=$("$PYTHON" -c '
from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in ("onnxruntime", "ncnn", "numpy")))') ||
    fail "onnxruntime, ncnn and numpy are not installed for $PYTHON; build the environment with make, or set PYTHON"
read -r -a wheels <<<"$versions"

wanted="$(cksum <"${BASH_SOURCE[0]}") ${wheels[*]}"
if [ "$(cat "$FOLDER/installed" 2>/dev/null)" = "$wanted" ] && check "$FOLDER"; then
    say "already in $FOLDER"
    exit
fi

[ ! -e "$FOLDER" ] || grep -qs install_arm "$FOLDER/python" || fail "$FOLDER holds something else; remove it first"
mkdir -p "$(dirname "$FOLDER")"
work=$(mktemp -d "$FOLDER.XXXXXX") # beside the destination: the last step is a rename
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir "$work/new" "$work/new/bin" "$work/new/root"

# Where this machine gets Debian from, whatever form its sources are written in.
mirror=$(apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk '$3 == "main" && $2 !~ /-/ { print ($1 !~ /debian\/?$/), NR, $1 }' | sort -n | awk 'NR == 1 { print $3 }')
[ -n "$mirror" ] || fail "this machine's apt sources name no Debian archive (component main)"
[ -r "$KEYRING" ] || fail "$KEYRING is missing; install the package debian-archive-keyring"

# Sources, lists, cache and installed packages of its own; the machine's proxies and certificates stay in force.
fetch() { # suite, architecture, packages...: their .deb files appear in $work/SUITE
    local apt="$work/$1" suite=$1 architecture=$2
    shift 2
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/debs"
    : >"$apt/status"
    echo "deb [arch=$architecture signed-by=$KEYRING] $mirror $suite main" >"$apt/sources.list"
    cat >"$apt/apt.conf" <<CONF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architecture "$architecture";
APT::Architectures { "$architecture"; };
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
CONF
    apt-get -c "$apt/apt.conf" -q -q update || fail "cannot read the package list of Debian $suite"
    (cd "$apt/debs" && apt-get -c "$apt/apt.conf" -q -q download "$@") || fail "cannot fetch from Debian $suite: $*"
    say "fetched $(mebibytes "$apt/debs") MB of packages from Debian $suite ($architecture), and its list"
}

qemu_version() { "$1" --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\).*/\1/p'; }
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
if [ -n "$qemu" ] && [ "$(qemu_version "$qemu")" -ge $QEMU_AT_LEAST ]; then
    say "using $qemu"
    ln -s "$qemu" "$work/new/bin/qemu-aarch64"
else
    say "fetching qemu-user of Debian $QEMU_SUITE (${qemu:-none} on PATH is not version $QEMU_AT_LEAST or later)..."
    fetch $QEMU_SUITE "$(dpkg --print-architecture)" qemu-user
    dpkg-deb --fsys-tarfile "$work/$QEMU_SUITE"/debs/qemu-user_*.deb |
        tar -x -C "$work/new/bin" --strip-components=3 ./usr/bin/qemu-aarch64
    [ "$(qemu_version "$work/new/bin/qemu-aarch64")" -ge $QEMU_AT_LEAST ] ||
        fail "qemu-user of Debian $QEMU_SUITE does not start here"
fi

say "fetching an aarch64 userland of Debian $USERLAND..."
fetch $USERLAND arm64 "${PACKAGES[@]}"
for package in "$work/$USERLAND"/debs/*.deb; do
    dpkg-deb -x "$package" "$work/new/root"
done
rm -rf "$work/new/root/usr/share"

say "fetching ${wheels[*]} for aarch64..."
"$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --no-compile --target "$work/new/site" \
    --python-version 3.11 --implementation cp --only-binary=:all: --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    "${wheels[@]}" || fail "cannot fetch the aarch64 wheels of ${wheels[*]} for Python 3.11"

# Told its own name by -0, Python knows the wrapper as sys.executable, so what it starts runs on the device too.
cat >"$work/new/python" <<'WRAPPER'
#!/bin/sh
# Python on an emulated ARM device; written by tests/tools/install_arm.sh.
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONHOME="$here/root/usr" PYTHONPATH="$here/site"
unset PYTHONDONTWRITEBYTECODE # kept bytecode halves the time of a start
exec "$here/bin/qemu-aarch64" -cpu "${SECATEUR_ARM_CPU:-cortex-a76}" -L "$here/root" -0 "$here/python" \
    "$here/root/usr/bin/python3.11" "$@"
WRAPPER
chmod 755 "$work/new/python"

say "starting Python on the emulated device..."
check "$work/new" || fail "onnxruntime or ncnn cannot be imported on the emulated device"
echo "$wanted" >"$work/new/installed"
rm -rf "$FOLDER"
mv "$work/new" "$FOLDER"
say "installed in $FOLDER ($(mebibytes "$FOLDER") MB)"
