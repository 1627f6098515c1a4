#!/usr/bin/env bash
# What a container does:
#     node         waits for the launchers of other nodes (sshd on port 2222, keys in /keys)
#     keys         makes those keys, once
#     COMMAND …    anything else is run as it is
set -eu

refuse() {
    echo "distlora-container: $1" >&2
    exit 2
}

make_keys() {  # one pair for all logins, one for all hosts; known_hosts comes last and says that all is there
    [[ -w /keys ]] || refuse "cannot write to /keys; mount a volume there that user $(id -u) owns"
    cd /keys
    [[ -e known_hosts ]] && return
    umask 077
    rm -f id_ed25519* host_ed25519*
    ssh-keygen -q -t ed25519 -N '' -C distlora -f id_ed25519
    ssh-keygen -q -t ed25519 -N '' -C distlora-node -f host_ed25519
    cp id_ed25519.pub authorized_keys
    echo "distlora-node $(cut -d' ' -f1,2 host_ed25519.pub)" >known_hosts
}

write_environment() {  # the container's variables, for what is started through ssh; values of one line only
    local name
    umask 077
    compgen -e | while read -r name; do
        case $name in HOME | USER | LOGNAME | SHELL | PWD | OLDPWD | SHLVL | TERM | HOSTNAME | _) continue ;; esac
        [[ ${!name} == *$'\n'* ]] || echo "$name=${!name}"
    done >~/.ssh/environment
}

ranks() {  # the process ids of distlora's ranks; launchers do not have RANK themselves
    local process
    for process in /proc/[0-9]*; do
        grep -qzsE '^(RANK|OMPI_COMM_WORLD_RANK)=' "$process/environ" || continue
        { tr '\0' ' ' <"$process/cmdline"; } 2>/dev/null | grep -qE -- '(-m distlora([.]cli[.]as_rank)?|/distlora) ' || continue
        echo "${process#/proc/}"
    done
}

stop_node() {  # ranks save a checkpoint when they are told to stop; they would be killed if sshd simply ended
    trap '' TERM INT
    local process
    for process in $(ranks); do kill -TERM "$process" 2>/dev/null || true; done
    while [[ -n $(ranks) ]]; do sleep 0.5; done
    kill -TERM "$SSHD"
    wait "$SSHD" || true
    exit 0
}

wait_for_launchers() {
    local file
    for file in id_ed25519 host_ed25519 authorized_keys known_hosts; do
        [[ -r /keys/$file ]] || refuse "/keys/$file cannot be read; mount what the command \`keys\` has made at /keys, for user $(id -u)"
    done
    write_environment
    touch /tmp/distlora-node  # for the health check
    /usr/sbin/sshd -D -e -f /etc/distlora/sshd_config &
    SSHD=$!
    trap stop_node TERM INT
    wait "$SSHD"
}

case ${1:-} in
    node) wait_for_launchers ;;
    keys) make_keys ;;
    *) exec "$@" ;;
esac
