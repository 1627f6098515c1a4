#!/usr/bin/env bash
# Fine-tunes or evaluates under Open MPI: on this machine, or on the hosts of a hostfile.

set -u
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
. "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

usage() {
    cat <<'TEXT'
usage: bash launch/mpi.sh [options] RECIPE [dotted.key=value …]
       bash launch/mpi.sh --verb eval [options] RUN [options of distlora eval]
       bash launch/mpi.sh --verb sweep [options] SWEEP.yaml [options of distlora sweep]

Runs `distlora train RECIPE …`, or each run of a sweep, under Open MPI's mpirun. On several hosts rank 0 tells the others through MPI where they meet, which
needs mpi4py: pip install 'distlora[mpi]'. (Or export MASTER_ADDR, the host of rank 0, and MASTER_PORT.)

  --verb train|eval|sweep    what is run (default: train)
  -np N, --np N          ranks (default: all slots of the hostfile; without one, one a GPU)
  --hostfile FILE        lines of `host slots=N`; the first host is rank 0's
  --mpirun-args WORDS    more for mpirun, e.g. --mpirun-args='--mca btl_tcp_if_include ib0 --oversubscribe'
  --export NAME          another variable that the ranks get; may be repeated
  --grace SECONDS        from a signal to the end of whatever still runs (default: 25)
  --help                 this text

TERM, USR1 and INT (Ctrl-C) ask every rank to stop: the run saves a checkpoint and ends; a second Ctrl-C kills it. Exit code: the
program's: 0 done, 75 to be started again (it goes on from its checkpoint), 2 a mistake in the command or the recipe, else 1.
TEXT
}

# ----------------------------------------------------------------------------------------------------------- arguments

ranks=
hostfile=-
mpirun_args=()
exports=()
words=()  # all options but --verb

while (($#)); do
    option=$1
    case $option in
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        --*=*) value=${option#*=}; option=${option%%=*}; shift ;;
        -?*) require_value "$option" $(($# - 1)); value=$2; shift 2 ;;
        *) break ;;
    esac
    [[ $option == --verb ]] || words+=("$option" "$value")
    case $option in
        --verb) choose_verb "$value" ;;
        -n | -np | --np) require_whole "$option" "$value" 1 999999; ranks=$value ;;
        --hostfile) hostfile=$value ;;
        --mpirun-args) read -r -a mpirun_args <<<"$value" ;;
        --grace) require_whole "$option" "$value" 1 86400; GRACE=$value ;;
        --export) exports+=(--export "$value") ;;
        *) refuse "unknown option $option; --help lists them" ;;
    esac
done
require_subject "$@"

# ------------------------------------------------------------------------------------------------------------- the job

require_open_mpi() {
    [[ $(mpirun --version 2>/dev/null) == *"Open MPI"* ]] ||
        refuse "mpirun of Open MPI is needed (Debian and Ubuntu: the package openmpi-bin; on clusters: module load openmpi)"
}

mpirun_options() {  # sets `options`
    local name
    # No rank is bound to one core: its threads feed the GPU. When one ends with 75, mpirun kills the others; it must leave them the
    # time to write what became of the run. (mpirun waits so long in any case.)
    options=(--bind-to none --mca odls_base_sigkill_timeout 5)
    if [[ -f $PRIVATE/hosts ]]; then
        mapfile -t HOSTS <"$PRIVATE/hosts"
        options+=(--hostfile "$PRIVATE/hostfile")
        withhold_secrets  # or this host's ranks would have what the others do not
        while read -r name; do options+=(-x "$name"); done <"$PRIVATE/names"
        for name in MASTER_ADDR MASTER_PORT; do [[ -z ${!name-} ]] || options+=(-x "$name"); done
    fi
    if [[ -z $ranks && -f $PRIVATE/slots ]]; then ranks=$(<"$PRIVATE/slots"); fi
    if [[ -z $ranks ]]; then
        ranks=$(accelerator_count) || exit 1
        ((ranks > 0)) || refuse "no accelerator here: -np says how many ranks there are to be"
    fi
    options+=(-np "$ranks" ${mpirun_args[@]+"${mpirun_args[@]}"})
}

main() {  # a function, so that bash has read this file to its end before anything runs: it may be edited meanwhile
    local here=$PWD options=() program status=0
    require_open_mpi
    [[ $VERB != sweep ]] || run_sweep $((${#words[@]} + 2)) ${words[@]+"${words[@]}"} --verb '{verb}' "$@"
    choose_python
    make_private_directory
    prepare_job --hostfile "$hostfile" --launcher mpirun ${exports[@]+"${exports[@]}"} -- "$PRIVATE" "$VERB" "$@"
    mpirun_options
    program=$(<"$PRIVATE/program")
    cd / || exit 1  # it need not be there on other hosts; the ranks find their directory in `program`
    run_job mpirun "${options[@]}" "$PYTHON" -u -m distlora.cli.as_rank "$MARK" "$program" || status=$?
    cd "$here" || exit 1
    end_as_the_run "$status"
}
main "$@"
