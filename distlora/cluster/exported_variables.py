"""Which variables go along to other hosts: for ranks that launchers start there, and for the doctor, which
looks as they will.
"""

from collections.abc import Mapping, Sequence

from distlora.cluster.confidential import holds_secret
from distlora.errors import UserError

#: What the same Python and the same caches need, and how transports and libraries were told to behave.
#: Nothing that belongs to one machine or one process, such as CUDA_VISIBLE_DEVICES or RANK.
EXPORTED = (
    *("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CC", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"),
    *("XDG_CACHE_HOME", "TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "DISTLORA_CACHE"),
    *("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", "TP_SOCKET_IFNAME"),
)
#: Beginnings of names. Those of the second line DeepSpeed takes along by itself, without quoting: they are
#: here so that ours count.
BEGINNINGS = (
    *("HF_", "TRANSFORMERS_", "TORCH_NCCL_", "GLOO_", "FI_", "RDMAV_", "MKL_"),
    *("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL"),
)


def exported_names(environment: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """The names of the variables that go along. more: what the user adds. Errors: UserError for one that is
    not there.

    No secret is among them unless the user adds it: they stand in command lines, which all users see.
    """
    absent = [name for name in more if name not in environment]
    if absent:
        raise UserError(f"--export {absent[0]}: there is no such variable; export it first")
    secret = set(withheld(environment, more))
    return [name for name in dict.fromkeys((*_candidates(environment), *more)) if name not in secret]


def withheld(environment: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """The names of those that would travel, did they not hold a secret. more: what the user adds, who must
    know.
    """
    return [
        name
        for name in _candidates(environment)
        if name not in more and holds_secret(name, environment[name])
    ]


def _candidates(environment: Mapping[str, str]) -> list[str]:
    begin = [name for name in environment if name.startswith(BEGINNINGS)]
    return [name for name in dict.fromkeys((*EXPORTED, *begin)) if name in environment]
