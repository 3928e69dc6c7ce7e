"""The facts that a feature file states about itself, checked: both forms of the file have the same ones."""

import functools

from features.schema import check_structure

EXPECTED = "the meta of a feature file, as docs/data-formats.md describes it"


def check_meta(meta, path):
    """Check the fields of `meta` that programs use; others may hold anything. Raises UserError naming the first that is wrong."""
    check_structure(_schema(), meta, path, EXPECTED)


@functools.cache
def _schema():
    from typing import Annotated

    from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, with_config
    from typing_extensions import NotRequired, TypedDict

    name = Annotated[StrictStr, Field(max_length=4096, pattern=r"^[^\x00]*$")]  # and no half of a surrogate pair
    text, count = NotRequired[name | None], NotRequired[Annotated[StrictInt, Field(ge=0, lt=2**63)]]
    plain = StrictStr | StrictInt | StrictFloat | StrictBool | None
    sound = dict[StrictStr, plain | dict[StrictStr, plain]]
    fields = dict.fromkeys(("encoder", "split", "source", "pooling", "dtype", "modality"), text)
    fields |= dict.fromkeys(("format_version", "images", "captions", "width", "embeddings_per_image", "picture_width"), count)
    fields |= {"normalized": NotRequired[StrictBool | None], "audio": NotRequired[sound | None]}
    return TypeAdapter(with_config(ConfigDict(extra="allow"))(TypedDict("meta", fields)))
