"""One check for every structure that comes from a stranger: what was found, what was expected, and where."""

from common import UserError


def check_structure(adapter, content, path, expected):
    """Check a structure against its schema.

    Args:
        adapter: pydantic.TypeAdapter of the schema.
        content: what was read from the file.
        path: the file, for the message.
        expected: what should have been in it, in words.

    Returns:
        The content with the fields of the schema only.

    Raises:
        UserError: it does not fit. The message names the first field that is wrong, what was found and what was expected.
    """
    from pydantic import ValidationError

    try:
        return adapter.validate_python(content)
    except (ValidationError, RecursionError) as error:
        raise UserError(f"{path} {_first_fault(error)}; expected {expected}. Give another file, or correct this one.") from error


def _first_fault(error):
    """Describe the first fault of a validation: where, what was found, what is wrong."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    fault = error.errors(include_url=False)[0]
    # Members of a union are named after the data's own path, in words such as "constrained-str".
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"] if _is_step(step)).lstrip(".")
    if fault["type"] == "missing":
        return f"has no {place}"
    found = repr(fault["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    return f"has {place or 'its content'} = {found}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _is_step(step):
    return isinstance(step, int) or not any(sign in step for sign in "-[(")
