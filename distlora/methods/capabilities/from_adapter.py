"""Methods whose factors may begin as those of a LoRA in PEFT's files."""

from typing import ClassVar

from pydantic import Field, create_model

from distlora.methods.contract import Method

#: `from` is a keyword of Python, so that the field cannot be written into the body of a class.
_WithFrom = create_model(
    "_WithFrom",
    __base__=Method,
    __module__=__name__,
    **{
        "from": (
            str | None,
            Field(
                None,
                min_length=1,
                description="directory of a LoRA in PEFT's files that training starts from; rank, alpha and "
                "targets are then the adapter's",
            ),
        )
    },
)


class StartsFromAdapter(_WithFrom):
    """`from` names a directory. A and B, and the magnitude where there is one, begin as in its files, with
    the rank and the alpha of the adapter: `W + s·B·A` is then what PEFT computes.
    """

    #: What PEFT calls the method: the values of `use_rslora` and `use_dora` in an adapter's config.
    peft_form: ClassVar[tuple[bool, bool]]

    @property
    def start(self) -> str | None:
        """The directory of the adapter that training starts from."""
        return getattr(self, "from")
