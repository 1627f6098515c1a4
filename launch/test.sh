#!/usr/bin/env bash
# Installs what the tests need and runs them. Works from any directory; a second start installs nothing.

set -u
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [--torch-index URL] [--fast] [--coverage] [pytest options, paths in the repository]

Makes .venv with the tested set of packages (constraints.txt), then runs the whole test suite, or what the pytest
arguments choose, for example: bash launch/test.sh tests/unit -k lora

Three kinds of test run only when they are asked for: -m long (combinations of what other tests hold one by one),
-m cluster_long (three hosts of namespaces), and -m torture (kills, stops, cuts, full disks and second starts at random
moments; --torture-events N, --torture-minutes M, --torture-seed S).

  --fast              the tests of single functions and classes, without the slow ones: under two minutes
  --coverage          tells which lines of the library these tests reach; alone, the tests in tests/unit
  --torch-index URL   where torch comes from, for a machine without an accelerator: an index, or a directory of wheels
  --help              this text

The variable DISTLORA_VENV chooses another place for the virtual environment.
TEXT
}

pytest_arguments=()
coverage=()
in_two_processes=(-n 2 --no-loadscope-reorder)  # many tests wait for ranks that wait for each other
while (($#)); do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --torch-index) (($# > 1)) || refuse "--torch-index needs a value"; TORCH_INDEX=$2; shift ;;
        --torch-index=*) TORCH_INDEX=${1#*=} ;;
        --fast)
            pytest_arguments+=("${in_two_processes[@]}" -m "not slow and not long and not cluster_long and not torture" tests/unit)
            ;;
        --coverage) coverage=(--cov=distlora --cov-report=term-missing:skip-covered) ;;
        *) pytest_arguments+=("$1") ;;
    esac
    shift
done

prepare_environment quickstart,test
(($(accelerator_count) > 0)) || build_operator

cd "$REPOSITORY" || exit 1
((${#pytest_arguments[@]})) || pytest_arguments=("${in_two_processes[@]}" ${coverage[@]+tests/unit})
exec python -m pytest "${pytest_arguments[@]}" ${coverage[@]+"${coverage[@]}"}
