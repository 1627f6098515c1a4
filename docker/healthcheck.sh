#!/usr/bin/env bash
# Whether the container can go on: 0, or 1 and a sentence. Looks at what is lost while a container lives; what a machine lacks from
# the start is the doctor's business, which takes longer and asks more.
set -u

unhealthy() {
    echo "$1"
    exit 1
}

RUNS=${DISTLORA_RUNS:-/workspace/runs}

# A full disk, or a shared one that has gone.
probe=$(timeout 5 mktemp "$RUNS/.health-XXXXXX" 2>&1) || unhealthy "cannot write to $RUNS: $probe"
echo "written" 2>/dev/null >"$probe" || { rm -f "$probe"; unhealthy "no room in $RUNS"; }
rm -f "$probe"

# A driver that was reloaded, or a GPU that fell off the bus. The program is there where the container was given GPUs.
if command -v nvidia-smi >/dev/null; then
    said=$(timeout 10 nvidia-smi --list-gpus 2>&1) || unhealthy "the GPUs are gone: $said"
fi

# A node that waits: whether a launcher could log in.
if [[ -e /tmp/distlora-node ]]; then
    said=$(timeout 8 ssh localhost true 2>&1) || unhealthy "nobody can log in: ${said:-no answer within 8 seconds}"
fi
