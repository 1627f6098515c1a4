#!/usr/bin/env bash
# Three hosts on one machine, out of namespaces: head, node1 and node2, each with an address, a host name, process numbers, /dev/shm
# and an ssh server of its own; files are shared, as on a cluster. With SLURM on request. Needs root; leaves nothing behind.

set -eu

usage() {
    cat <<'TEXT'
usage: cluster.sh COMMAND

  up [slurm]         makes the hosts; with slurm also its controller on head, and node1 and node2 with two fake GPUs each
  exec HOST WORD…    runs a command there, in the current directory and environment
  pid HOST           prints the host's first process, as this machine counts
  cut HOST           takes its link away: packets to and from it are lost without a word
  part               node1 and node2 lose all packets to each other; head still reaches both
  slow HOST RATE     what is sent to it passes at this rate, such as 4mbit
  heal HOST          gives the link back, as it was
  crash HOST         cuts the link and ends all its processes, as a power failure would
  boot HOST          starts it again after a crash, with its link
  down               ends everything and removes every trace

TESTBED_DIR     where keys, logs and SLURM's state lie (required; made by up, removed by down)
TESTBED_NAME    prefix of the network namespaces (default: dl), so that several clusters can stand side by side
TESTBED_OWNER   a process: when it ends, the cluster goes down by itself
TEXT
}

refuse() {
    echo "cluster.sh: $1" >&2
    exit 2
}

case ${1-} in
    "") usage >&2; exit 2 ;;
    --help | -h) usage; exit 0 ;;
esac

HOSTS=(head node1 node2)
SELF=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/cluster.sh
NAME=${TESTBED_NAME:-dl}
DIR=${TESTBED_DIR:?"set it to a directory of the cluster's own"}
MARK=$DIR/.testbed  # DIR is ours, and may be removed
SLURM=$DIR/slurm

address_of() {
    case $1 in
        head) echo 10.231.77.1 ;;
        node1) echo 10.231.77.11 ;;
        node2) echo 10.231.77.12 ;;
        *) refuse "there is no host '$1', only ${HOSTS[*]}" ;;
    esac
}

namespace() { echo "$NAME-$1"; }

in_network() {  # in_network HOST WORD…: `ip` within the host's network
    local host=$1
    shift
    ip -n "$(namespace "$host")" "$@"
}

first_process() {
    address_of "$1" >/dev/null
    [[ -f $DIR/$1.pid ]] || refuse "$1 is not up (in $DIR)"
    cat "$DIR/$1.pid"
}

# ------------------------------------------------------------------------------------------------------------- a host

run_on() {  # run_on HOST WORD…
    local process
    process=$(first_process "$1")
    shift
    if [[ -d $SLURM ]]; then export SLURM_CONF=$SLURM/slurm.conf; fi
    exec nsenter --target "$process" --mount --uts --ipc --net --pid --wd="$PWD" -- "$@"
}

become_host() {  # the first process of a host: sets it up from within, then is its ssh server. Its end is the host's end.
    local host=$1
    hostname "$host"
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir /run/sshd /run/munge
    # A host's name must mean its own address, or gloo falls back to 127.0.0.1.
    mount --bind "$DIR/hosts" /etc/hosts
    mount --bind "$DIR/ssh" /etc/ssh
    if [[ -d $SLURM ]]; then
        munged --key-file="$SLURM/munge.key" --seed-file=/run/munge/seed --log-file="$SLURM/log/munged-$host.log"
    fi
    exec "$(command -v sshd)" -D -E "$DIR/sshd-$host.log"
}

boot() {
    local host=$1 outer inner="" tenths
    : >"$DIR/sshd-$host.log"
    setsid ip netns exec "$(namespace "$host")" \
        unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc bash "$SELF" become "$host" \
        </dev/null >>"$DIR/boot-$host.log" 2>&1 &
    outer=$!
    for ((tenths = 0; tenths < 100; tenths++)); do
        kill -0 "$outer" 2>/dev/null || break
        read -r inner _ <"/proc/$outer/task/$outer/children" || true
        if [[ -n $inner ]] && grep -q listening "$DIR/sshd-$host.log"; then
            echo "$inner" >"$DIR/$host.pid"
            boot_slurm "$host"
            return
        fi
        sleep 0.1
    done
    kill -KILL "$outer" 2>/dev/null || true
    cat "$DIR/boot-$host.log" "$DIR/sshd-$host.log" >&2
    refuse "$host does not start"
}

link() {  # link HOST up|down
    [[ $1 != head ]] || refuse "the head is the switch: cut node1 or node2"
    in_network head link set "to-$1" "$2"
}

slow() {  # slow HOST RATE
    link "$1" up
    tc -n "$(namespace head)" qdisc replace dev "to-$1" root tbf rate "$2" burst 16kb latency 1s
}

part() {  # isolated ports of a bridge reach only those that are not
    local host
    for host in node1 node2; do in_network head link set "to-$host" type bridge_slave isolated on; done
}

heal() {
    link "$1" up
    in_network head link set "to-$1" type bridge_slave isolated off
    tc -n "$(namespace head)" qdisc delete dev "to-$1" root 2>/dev/null || true  # there is none unless it was slow
}

crash() {
    link "$1" down
    kill -KILL "$(first_process "$1")"
    rm "$DIR/$1.pid"
}

# ------------------------------------------------------------------------------------------------------------- network

make_network() {  # a switch on head, and a cable from it to each node
    local host
    for host in "${HOSTS[@]}"; do
        ip netns add "$(namespace "$host")"
        in_network "$host" link set lo up
    done
    in_network head link add eth0 type bridge
    in_network head address add "$(address_of head)/24" dev eth0
    in_network head link set eth0 up
    for host in node1 node2; do
        in_network head link add "to-$host" type veth peer name eth0 netns "$(namespace "$host")"
        in_network head link set "to-$host" master eth0 up
        in_network "$host" address add "$(address_of "$host")/24" dev eth0
        in_network "$host" link set eth0 up
    done
}

write_hosts_and_ssh() {
    local host
    echo "127.0.0.1 localhost" >"$DIR/hosts"
    for host in "${HOSTS[@]}"; do echo "$(address_of "$host") $host" >>"$DIR/hosts"; done
    mkdir "$DIR/ssh"
    ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/id"
    ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/hostkey"
    cat >"$DIR/ssh/ssh_config" <<TEXT
Host *
  IdentityFile /etc/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
  ServerAliveInterval 3
  ServerAliveCountMax 3
TEXT
    cat >"$DIR/ssh/sshd_config" <<TEXT
HostKey /etc/ssh/hostkey
AuthorizedKeysFile /etc/ssh/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
MaxStartups 100:30:200
PidFile none
SetEnv SLURM_CONF=$SLURM/slurm.conf
TEXT
}

# ---------------------------------------------------------------------------------------------------------------- SLURM

prepare_slurm() {  # its files; hosts that find them start SLURM's daemons
    local host number
    mkdir -p "$SLURM/state" "$SLURM/log" "$SLURM/dev"
    for host in node1 node2; do mkdir "$SLURM/spool-$host" "$SLURM/tmp-$host"; done
    for number in 0 1; do mknod "$SLURM/dev/nvidia$number" c 1 3; done  # null devices: nothing but SLURM looks at them
    (umask 077 && head -c 128 /dev/urandom >"$SLURM/munge.key")
    cat >"$SLURM/slurm.conf" <<TEXT
ClusterName=testbed
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation=$SLURM/state
SlurmdSpoolDir=$SLURM/spool-%n
SlurmctldPidFile=$SLURM/slurmctld.pid
SlurmdPidFile=$SLURM/slurmd-%n.pid
SlurmctldLogFile=$SLURM/log/slurmctld.log
SlurmdLogFile=$SLURM/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
TmpFS=$SLURM/tmp-%n
JobRequeue=1
KillWait=5
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc=$SLURM/log/jobcomp.txt
MailProg=/bin/true
GresTypes=gpu
NodeName=node[1-2] CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=hi Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10
TEXT
    echo "CgroupPlugin=cgroup/v1" >"$SLURM/cgroup.conf"  # it is read though nothing here uses cgroups
    echo "NodeName=node[1-2] Name=gpu File=$SLURM/dev/nvidia[0-1]" >"$SLURM/gres.conf"
}

boot_slurm() {
    [[ -d $SLURM ]] || return 0
    local daemon=slurmd
    [[ $1 != head ]] || daemon=slurmctld
    (run_on "$1" setsid "$daemon")
}

await_slurm() {
    local tenths
    for ((tenths = 0; tenths < 300; tenths++)); do
        [[ $(run_on head sinfo --noheader --format='%T %D' --partition=debug 2>/dev/null) == "idle 2" ]] && return
        sleep 0.1
    done
    tail -n 20 "$SLURM/log/"* >&2
    refuse "SLURM's nodes do not become idle"
}

# -------------------------------------------------------------------------------------------------------- up and down

up() {
    [[ ! -e $DIR ]] || [[ -d $DIR && -z $(ls -A "$DIR") ]] || refuse "$DIR holds something: take it down, or set TESTBED_DIR to another place"
    [[ ! -e /run/netns/$(namespace head) ]] || refuse "a cluster named $NAME is up: take it down, or set TESTBED_NAME to another word"
    mkdir -p "$DIR"
    touch "$MARK"
    trap 'down' EXIT  # half a cluster is none
    write_hosts_and_ssh
    make_network
    [[ ${1-} != slurm ]] || prepare_slurm
    local host
    for host in "${HOSTS[@]}"; do boot "$host"; done
    [[ ${1-} != slurm ]] || await_slurm
    if [[ -n ${TESTBED_OWNER-} ]]; then setsid bash "$SELF" guard </dev/null >/dev/null 2>&1 & fi
    trap - EXIT
}

guard() {  # takes the cluster down when its owner has ended without doing it
    while [[ -e $MARK ]] && kill -0 "$TESTBED_OWNER" 2>/dev/null; do sleep 1; done
    down
}

down() {
    local host process
    [[ -e $MARK ]] || return 0
    for host in "${HOSTS[@]}"; do
        [[ -f $DIR/$host.pid ]] || continue
        process=$(first_process "$host")
        # A number that is another process's by now must not be killed.
        while [[ $(ip netns identify "$process" 2>/dev/null) == "$(namespace "$host")" ]]; do
            kill -KILL "$process" 2>/dev/null || true
            sleep 0.05
        done
    done
    for host in "${HOSTS[@]}"; do ip netns delete "$(namespace "$host")" 2>/dev/null || true; done
    rm -rf "$DIR"
}

command=$1
shift
case $command in
    up | down) "$command" "$@" ;;
    boot) boot "$1"; [[ $1 == head ]] || link "$1" up ;;
    crash) crash "$1" ;;
    cut) link "$1" down ;;
    part) part ;;
    slow) slow "$1" "$2" ;;
    heal) heal "$1" ;;
    exec) run_on "$@" ;;
    pid) first_process "$1" ;;
    become) become_host "$1" ;;  # these two are for this script's own use
    guard) guard ;;
    *) refuse "unknown command '$command'; --help lists them" ;;
esac
