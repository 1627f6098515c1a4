#!/usr/bin/env bash
# Fine-tunes or evaluates on the hosts of a hostfile through DeepSpeed's launcher, or on this machine alone.

set -u
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
. "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

usage() {
    cat <<'TEXT'
usage: bash launch/deepspeed.sh [options] HOSTFILE RECIPE [dotted.key=value …]
       bash launch/deepspeed.sh --verb eval [options] HOSTFILE RUN [options of distlora eval]
       bash launch/deepspeed.sh --verb sweep [options] HOSTFILE SWEEP.yaml [options of distlora sweep]

HOSTFILE has lines of `host slots=N`; the first host is rank 0's. `-` means all GPUs of this machine. Every host must be reached
by ssh without a password and find the same Python, recipe and run directory at the same paths: `distlora doctor HOSTFILE`
looks. What follows RECIPE is handed to `distlora train` as it is, whatever signs it has, and so on. A sweep is conducted on this
machine, and its runs are started by this script, one after the other.

  --verb train|eval|sweep  what is run (default: train)
  --launcher pdsh|openmpi  how DeepSpeed reaches the hosts (default: pdsh)
  --launcher-args WORDS    for pdsh or mpirun, e.g. --launcher-args='--mca btl_tcp_if_include ib0'
  --master-addr A          rank 0's address (default: the first host's)
  --master-port P          where rank 0 listens (default: a port of this job's own; with --no-ssh 29500)
  --ranks N                of this machine alone: ranks (default: one a GPU)
  --export NAME            another variable that the ranks get; may be repeated
  --grace SECONDS          from a signal to the end of whatever still runs (default: 25)
  --no-ssh                 this host's part only: start the same command on every host, each with its own
  --node-rank N              place in HOSTFILE, from 0, and the same --master-addr and --master-port
  --help                   this text

Variables that the ranks get: PATH, PYTHON*, LD_LIBRARY_PATH, those that place caches (TORCH_EXTENSIONS_DIR, DISTLORA_CACHE, …), HF_*,
TRANSFORMERS_*, OMP_NUM_THREADS, MKL_*, DS_ACCELERATOR, those of transports (NCCL_*, TORCH_NCCL_*, GLOO_*, UCX_*, FI_*) and those of
--export; CUDA_VISIBLE_DEVICES stays behind (slots=N says how many GPUs), and a .deepspeed_env is not read.
They stand in command lines that other users can see, so what looks like a secret is left out unless --export names it: log in to the
hub (`hf auth login`) rather than export a token.

TERM, USR1 and INT (Ctrl-C) ask every rank to stop: the run saves a checkpoint and ends; a second Ctrl-C kills it. Exit code: the
program's: 0 done, 75 to be started again (it goes on from its checkpoint), 2 a mistake in the command or the recipe, else 1.
TEXT
}

# ----------------------------------------------------------------------------------------------------------- arguments

launcher=pdsh
launcher_args=
master_addr=
master_port=
ranks=
no_ssh=
node_rank=
exports=()
words=()  # all options but --verb

while (($#)); do
    option=$1
    case $option in
        --help | -h) usage; exit 0 ;;
        --no-ssh | --no_ssh) no_ssh=yes; words+=("$option"); shift; continue ;;
        --) shift; break ;;
        --*=*) value=${option#*=}; option=${option%%=*}; shift ;;
        -?*) require_value "$option" $(($# - 1)); value=$2; shift 2 ;;
        *) break ;;
    esac
    [[ $option == --verb ]] || words+=("$option" "$value")
    case $option in
        --verb) choose_verb "$value" ;;
        --launcher)
            [[ $value == pdsh || $value == openmpi ]] ||
                refuse "--launcher must be pdsh or openmpi, not '$value' (with SLURM: launch/slurm.sbatch)"
            launcher=$value
            ;;
        --launcher-args | --launcher_args) launcher_args=$value ;;
        --master-addr | --master_addr) master_addr=$value ;;
        --master-port | --master_port) require_whole "$option" "$value" 1 65535; master_port=$value ;;
        --node-rank | --node_rank) require_whole "$option" "$value" 0 999999; node_rank=$value ;;
        --ranks) require_whole "$option" "$value" 1 999999; ranks=$value ;;
        --grace) require_whole "$option" "$value" 1 86400; GRACE=$value ;;
        --export) exports+=(--export "$value") ;;
        *) refuse "unknown option $option; --help lists them" ;;
    esac
done

(($# >= 1)) || refuse "no HOSTFILE: usage is in --help"
hostfile=$1
shift
require_subject "$@"
[[ $VERB != sweep || -z $no_ssh ]] || refuse "--verb sweep starts its runs from one machine: without --no-ssh"
if [[ -n $no_ssh ]]; then
    [[ -n $node_rank ]] || refuse "--no-ssh needs --node-rank, this host's place in HOSTFILE, from 0"
    [[ $hostfile != - && $hostfile != localhost ]] || refuse "--no-ssh needs a HOSTFILE, the same on every host"
elif [[ -n $node_rank ]]; then
    refuse "--node-rank is for --no-ssh only"
fi

# ------------------------------------------------------------------------------------------------------------- the job

prepare() {
    prepare_job --hostfile "$hostfile" --launcher "$launcher" ${no_ssh:+--no-ssh} ${exports[@]+"${exports[@]}"} \
        -- "$PRIVATE" "$VERB" "$@"
    if [[ -f $PRIVATE/hosts ]]; then
        [[ -z $ranks ]] || refuse "--ranks is for this machine alone; write slots=$ranks into $hostfile"
        [[ -n $no_ssh ]] || mapfile -t HOSTS <"$PRIVATE/hosts"
        [[ -n $master_addr || ! -f $PRIVATE/master ]] || master_addr=$(<"$PRIVATE/master")
    elif [[ -f $PRIVATE/slots ]]; then
        ranks=${ranks:-$(<"$PRIVATE/slots")}
    fi
}

launcher_options() {  # sets `options`: where DeepSpeed's launcher starts what
    local count
    options=(--no_local_rank --master_port "${master_port:-$((10000 + RANDOM % 20000))}")
    if [[ ! -f $PRIVATE/hosts ]]; then
        options+=(--hostfile /dev/null)
        [[ -z $ranks ]] || options+=(--num_gpus "$ranks")
        return
    fi
    count=$(wc -l <"$PRIVATE/hosts")
    [[ -z $master_addr ]] || options+=(--master_addr "$master_addr")
    options+=(--hostfile "$PRIVATE/hostfile")
    if [[ -n $no_ssh ]]; then
        [[ -n $master_addr ]] || refuse "the first host of $hostfile has no address here that others reach; give --master-addr"
        ((node_rank < count)) || refuse "--node-rank $node_rank: $hostfile has $count hosts, counted from 0"
        options+=(--no_ssh --node_rank "$node_rank" --master_port "${master_port:-29500}")
    else
        options+=(--force_multi --no_ssh_check --launcher "$launcher")
        [[ -z $launcher_args ]] || options+=("--launcher_args=$launcher_args")
        export DS_ENV_FILE=$PRIVATE/environment
        withhold_secrets
        # A host that dies must not hold up pdsh for ever.
        export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND-} -o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    fi
}

main() {  # a function, so that bash has read this file to its end before anything runs: it may be edited meanwhile
    local here=$PWD options=() program status=0
    [[ $VERB != sweep ]] || run_sweep $((${#words[@]} + 3)) ${words[@]+"${words[@]}"} --verb '{verb}' "$hostfile" "$@"
    choose_python
    make_private_directory
    prepare "$@"
    launcher_options
    program=$(<"$PRIVATE/program")
    cd / || exit 1  # DeepSpeed hands its directory to shells unquoted; the ranks find theirs in `program`
    run_job "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" --module distlora.cli.as_rank "$MARK" "$program" || status=$?
    cd "$here" || exit 1
    end_as_the_run "$status"
}
main "$@"
