"""Which variables are sent to other hosts, for the ranks that launchers start there. The doctor uses the same
ones, so that it sees what the ranks will see.
"""

from collections.abc import Mapping, Sequence

from distlora.errors import UserError
from distlora.files.confidential import holds_secret

#: Variables that lead to the same Python and the same caches, and settings of transports and libraries. None
#: that belongs to one machine or one process, such as CUDA_VISIBLE_DEVICES or RANK.
EXPORTED = (
    *("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CC", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"),
    *("XDG_CACHE_HOME", "TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "DISTLORA_CACHE"),
    *("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", "TP_SOCKET_IFNAME"),
)
#: Beginnings of names. DeepSpeed itself sends variables that begin as in the second line, without quoting
#: their values. They stand here so that our quoted values replace those.
BEGINNINGS = (
    *("HF_", "TRANSFORMERS_", "TORCH_NCCL_", "GLOO_", "FI_", "RDMAV_", "MKL_"),
    *("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL"),
)


def exported_names(environment: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """The names of the variables that are sent. more: names that the user adds.

    Secrets are left out unless the user adds them, because all users of a host can read command lines. Raises
    UserError for an added variable that does not exist.
    """
    absent = [name for name in more if name not in environment]
    if absent:
        raise UserError(f"--export {absent[0]}: there is no such variable; export it first")
    secret = set(withheld(environment, more))
    return [name for name in dict.fromkeys((*_candidates(environment), *more)) if name not in secret]


def withheld(environment: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """The names of the variables that are not sent only because they hold a secret. more: names that the user
    adds.
    """
    return [
        name
        for name in _candidates(environment)
        if name not in more and holds_secret(name, environment[name])
    ]


def _candidates(environment: Mapping[str, str]) -> list[str]:
    begin = [name for name in environment if name.startswith(BEGINNINGS)]
    return [name for name in dict.fromkeys((*EXPORTED, *begin)) if name in environment]
