# Shared by deepspeed.sh and mpi.sh (sourced after _environment.sh): one job of training or evaluation, its signals, its end; and
# sweeps of such jobs.

VERB=train     # what the program does: train, eval; or sweep, which starts this script again for each of its runs
GRACE=25       # seconds from a signal to the end of whatever still runs
PYTHON=        # what the ranks run
MARK=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')  # stands in the command line of every process of this job, and of no other
PRIVATE=       # a directory of this job's own
ASKED=         # the first signal that came
ALARMED=       # once the ranks were told that a host or a rank is gone
WATCHDOG=
HOSTS=()       # that are reached through ssh; none for this machine alone
STARTED=$(date +%s)
NAME=$(basename "$0")

require_value() {  # require_value OPTION NUMBER_OF_WORDS_LEFT
    (($2 > 0)) || refuse "$1 needs a value"
}

require_whole() {  # require_whole OPTION VALUE SMALLEST LARGEST
    { [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] && (($2 >= $3 && $2 <= $4)); } || refuse "$1 must be a whole number from $3 to $4, not '$2'"
}

choose_python() {  # the one on PATH if it has what is needed; else the environment that quickstart.sh makes
    local candidate
    export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
    for candidate in "$(command -v python)" "$(command -v python3)" "$VENV/bin/python"; do
        if [[ -x $candidate ]] &&
            "$candidate" -c 'import sys, importlib.util as u; sys.exit(not (u.find_spec("deepspeed") and u.find_spec("pydantic")))'; then
            PYTHON=$candidate
            [[ $candidate != "$VENV/"* ]] || export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV
            return
        fi
    done
    refuse "no Python here has deepspeed: activate the environment that has it, or run launch/quickstart.sh once"
}

# Before anything runs: another start is as good.
trap 'stop_child 75' TERM USR1

prepare_job() {  # prepare_job OPTION… -- WORD…: checks hostfile, hosts and recipe; distlora/cluster/launching.py says what it leaves in PRIVATE
    start_child "$PYTHON" -m distlora.cli.prepare_launch --script "$NAME" "$@"
    wait_for_child || exit
}

make_private_directory() {
    PRIVATE=$(umask 077 && mktemp -d) || refuse "cannot make a directory in ${TMPDIR:-/tmp}"
    trap 'rm -rf "$PRIVATE"' EXIT
}

choose_verb() {  # choose_verb NAME: sets VERB
    [[ $1 =~ ^(train|eval|sweep)$ ]] || refuse "--verb must be train, eval or sweep, not '$1'"
    VERB=$1
}

require_subject() {  # require_subject WORD…: the first one is what VERB needs
    case $VERB in
        train)
            (($# > 0)) || refuse "no recipe: usage is in --help"
            [[ -f $1 ]] || refuse "$1: no such recipe; relative paths start at $PWD"
            ;;
        eval)
            (($# > 0)) || refuse "no run directory: usage is in --help"
            [[ -f $1/recipe.yaml ]] || refuse "$1 holds no run: it has no recipe.yaml; relative paths start at $PWD"
            ;;
        sweep)
            (($# > 0)) || refuse "no sweep: usage is in --help"
            [[ -f $1 && $1 == *.y*ml ]] || refuse "$1: no such sweep, a .yaml file; relative paths start at $PWD"
            ;;
    esac
}

run_sweep() {  # run_sweep COUNT WORD…: the first COUNT words are those of this script before a run's own; the rest is the sweep's
    local count=$1 launcher
    shift
    choose_python
    # Quoted by Python, which splits it again: no shell sees it.
    launcher=$("$PYTHON" -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' bash "$REPOSITORY/launch/$NAME" "${@:1:count}") || exit
    exec "$PYTHON" -m distlora sweep "${@:count + 1}" --launcher "$launcher"
}

# ------------------------------------------------------------------------------------------------------------- signals

withhold_secrets() {  # from launchers, which look at their own variables, too
    local name
    while read -r name; do unset "$name"; done <"$PRIVATE/withheld"
}

signal_job() {  # signal_job SIGNAL all|ranks: to the job's processes on all hosts; soon done, also where one does not answer
    # The brackets keep the pattern from matching the command that looks for it.
    # Before the first option of a rank stands its Python, with spaces or not; shells, ssh and launchers have other options before.
    local pattern="[${MARK:0:1}]${MARK:1}" host sent=()
    [[ $2 == all ]] || pattern="^([^ ]| [^ -])+ -u -m distlora[.]cli[.]as_rank $pattern"
    ((${#HOSTS[@]})) || pkill "-$1" -f -- "$pattern"
    for host in ${HOSTS[@]+"${HOSTS[@]}"}; do
        ssh -n -o BatchMode=yes -o ConnectTimeout=4 -o ServerAliveInterval=2 -o ServerAliveCountMax=2 "$host" \
            "pkill -$1 -f -- '$pattern'" 2>/dev/null &
        sent+=($!)
    done
    ((${#sent[@]} == 0)) || wait "${sent[@]}"
}

pass_on() {  # pass_on SIGNAL: every rank is asked to stop, in one of the two ways that the program understands
    local signal=$1
    [[ $signal != INT ]] || signal=TERM
    if [[ -z $ASKED ]]; then
        ASKED=$1
        echo "$NAME: $1: the ranks are asked to stop; what still runs after $GRACE s is killed" >&2
        kill_later "$signal"
    elif [[ $1 == INT ]]; then
        echo "$NAME: INT again: the ranks are killed" >&2
        signal_job KILL all &
        return
    fi
    signal_job "$signal" ranks &
}

lose_a_host() {  # a launcher that reaches several hosts goes on waiting for the others
    if [[ -e $PRIVATE/silent && -z $ALARMED$ASKED ]]; then
        # Told to stop, ranks that wait for one that is gone look who it is, and end with its name in the run's status.
        ALARMED=yes
        echo "$NAME: a host is lost or a rank was killed: the others are asked to end; what still runs after $GRACE s is killed" >&2
        signal_job TERM ranks &
    elif [[ -z $WATCHDOG ]]; then
        echo "$NAME: a host has ended with an error; what still runs on the others after $GRACE s is killed" >&2
    fi
    kill_later
}

kill_later() {  # kill_later [SIGNAL]: all, after GRACE seconds. SIGNAL is sent again meanwhile: a rank may have been just about to start
    [[ -z $WATCHDOG ]] || return
    set -m  # a process group of its own, so that it can be ended with what it has started
    (
        trap '' INT TERM HUP USR1 USR2
        [[ -z ${1-} ]] || while pause 5; do signal_job "$1" ranks; done &
        again=$!
        pause "$GRACE"
        kill -KILL "$again"
        signal_job KILL all
        kill -KILL -- "-$CHILD"
    ) >/dev/null 2>&1 &
    WATCHDOG=$!
    set +m
}

pause() {  # pause SECONDS: as `sleep`, but without a process that would stay behind
    read -r -t "$1" <> <(:)
    true
}

show_errors() {  # copies standard input to standard error at once; tells this script when pdsh says that a host has failed
    tee >(grep --line-buffered -E '^pdsh@.* exited with exit code [0-9]+$' | note_failures >/dev/null 2>&1) >&2
}

note_failures() {  # note_failures <LINES OF PDSH: what a rank says itself needs no more; 255 is ssh's own, above 127 is a signal
    local line
    while read -r line; do
        ((${line##* } < 128)) || : >"$PRIVATE/silent"
        ((${line##* } < 255)) || : >"$PRIVATE/lost"
        kill -USR2 $$
    done
}

run_job() {  # run_job COMMAND…: until it has ended, whatever signals come; returns its exit status
    local status again signal
    start_child "$@" 2> >(show_errors)
    for signal in TERM USR1 INT; do
        # shellcheck disable=SC2064  # the name is meant as it is now
        trap "pass_on $signal" "$signal"
    done
    trap 'pass_on TERM' HUP
    trap lose_a_host USR2
    while true; do
        wait "$CHILD" 2>/dev/null  # without the shell's own words about a killed child
        status=$?
        ((status > 128)) || break
        kill -0 "$CHILD" 2>/dev/null && continue  # it was only a signal that ended the waiting
        wait "$CHILD" 2>/dev/null
        again=$?
        ((again == 127)) || status=$again
        break
    done
    trap '' TERM USR1 USR2 INT HUP
    [[ -z $WATCHDOG ]] || { kill -KILL -- "-$WATCHDOG"; wait "$WATCHDOG"; } 2>/dev/null
    ((status == 0)) || signal_job KILL all  # a launcher that was killed leaves its ranks
    return "$status"
}

# ------------------------------------------------------------------------------------------------------------- outcome

end_as_the_run() {  # end_as_the_run STATUS: launchers swallow the program's exit code, but the run has written it down
    local status=$1 run said="" told=1
    ((status != 0)) || exit 0
    run=$(<"$PRIVATE/run")
    if [[ -d $run ]]; then  # else it has not begun
        told=0
        said=$("$PYTHON" -m distlora status "$run" --since "$STARTED" 2>/dev/null) || told=$?
    fi
    if ((told == 0 || told == 75)); then
        status=$told
    elif [[ -n $ASKED || -e $PRIVATE/lost ]] && [[ $said != *": failed at step "* ]]; then
        status=75  # it ended before it had begun, was killed while it saved, or rank 0's host is lost: another start goes on
    elif ((status != 2 && status != 75)); then
        status=1
    fi
    [[ -z $said ]] || echo "$NAME: $said" >&2
    exit "$status"
}
