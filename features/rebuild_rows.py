"""Make rows of pandas, and arrays of texts, from the records of a pickle: lists and dicts, from parts whose sizes are checked."""

import numpy as np

from features.inert import Record, build_as, check, is_class, is_kind, whole_numbers


def _arrow_buffer(builder, value):
    if value is None:
        return b""
    check(is_kind(value, "py_buffer") and len(value.args) == 1, "an arrow buffer of an unknown form")
    return bytes(build_as(builder, value.args[0], bytes, bytearray))


def _arrow_texts(builder, record):
    """An arrow array of texts: offsets and bytes. Returns a list of str and None."""
    if is_kind(record, "chunked_array"):
        check(record.args and type(record.args[0]) is list, "an arrow array of an unknown form")
        return [text for part in record.args[0] for text in build_as(builder, part, list)]
    state = record.args[0] if len(record.args) == 1 else None
    check(type(state) in (tuple, list) and len(state) == 7, "an arrow array of an unknown form")
    kind, length, _, start, buffers, children, dictionary = state
    widths = {"string": 4, "utf8": 4, "large_string": 8, "large_utf8": 8}
    named = is_kind(kind, "type_for_alias") and len(kind.args) == 1 and type(kind.args[0]) is str
    check(named and kind.args[0] in widths and not children and dictionary is None, "an arrow array of something else than texts")
    check(type(buffers) is list and len(buffers) == 3, "an arrow array of an unknown form")
    length, start = whole_numbers((length, start))
    validity, offsets, data = (_arrow_buffer(builder, buffer) for buffer in buffers)
    width = widths[kind.args[0]]
    end = start + length
    check((end + 1) * width <= len(offsets) or not length, f"an arrow array of {length} texts over {len(offsets)} bytes")
    check(not validity or (end + 7) // 8 <= len(validity), "an arrow array whose marks of missing texts are too few")
    places = np.frombuffer(offsets, f"<i{width}", length + 1, start * width).tolist() if length else [0]
    check(0 <= places[0] and places[-1] <= len(data) and places == sorted(places), "an arrow array with texts outside its bytes")
    texts = [data[a:b].decode("utf-8", "replace") for a, b in zip(places, places[1:])]
    if validity:
        texts = [text if validity[(start + i) // 8] >> (start + i) % 8 & 1 else None for i, text in enumerate(texts)]
    return texts


def _arrow_string_array(builder, record):
    check(type(record.state) is dict, f"{record.origin} of an unknown form")
    array = record.state.get("_pa_array", record.state.get("_data"))
    check(is_kind(array, "chunked_array", "_restore_array"), f"{record.origin} of an unknown form")
    return build_as(builder, array, list)


def _string_array(builder, record):
    """pandas' array of Python texts: its state holds an array of objects."""
    parts = record.state.values() if type(record.state) is dict else record.state if type(record.state) is tuple else ()
    arrays = [part for part in parts if is_kind(part, "_reconstruct", "_frombuffer")]
    check(len(arrays) == 1, f"{record.origin} of an unknown form")
    return build_as(builder, arrays[0], list)


def _values(builder, value):
    """Make the values or labels of a row: a list of texts, numbers and None."""
    check(isinstance(value, Record), "a row of an unknown form")
    value = builder.build(value)
    value = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    check(type(value) is list and builder.are_atoms(value), "a row with other values than texts and numbers")
    return value


def _index(builder, record):
    """The labels of a row, from _new_Index(class, {"data": labels, "name": name})."""
    check(len(record.args) == 2 and type(record.args[1]) is dict, f"{record.origin} of an unknown form")
    kind, parts = record.args
    if is_class(kind, "RangeIndex"):
        numbers = [parts.get(name) for name in ("start", "stop", "step")]
        check(all(type(number) is int for number in numbers) and numbers[2] != 0, "an index of an unknown form")
        labels = range(*numbers)
        builder.spend(len(labels))
        return list(labels)
    return _values(builder, parts.get("data"))


def _series(builder, record):
    """A row of pandas, as a dict."""
    check(type(record.state) is dict, f"{record.origin} of an unknown form")
    manager = record.state.get("_mgr", record.state.get("_data"))
    check(is_kind(manager, "SingleBlockManager"), f"{record.origin} of an unknown form")
    if type(manager.state) is tuple:  # (axes, values of blocks, labels of blocks, the same by name)
        parts = manager.state[:2]
    else:  # pandas 1.3 and later also write SingleBlockManager(block, axis)
        parts = manager.args
    check(len(parts) == 2, f"{manager.origin} of an unknown form")
    axes, blocks = parts if type(manager.state) is tuple else parts[::-1]
    axes, blocks = ([part] if isinstance(part, Record) else part for part in (axes, blocks))
    check(all(type(part) in (list, tuple) and len(part) == 1 for part in (axes, blocks)), f"{manager.origin} of an unknown form")
    (axis,), (block,) = axes, blocks
    if is_kind(block, "_unpickle_block", "new_block"):
        check(block.args, f"{block.origin} of an unknown form")
        block = block.args[0]
    labels, values = _values(builder, axis), _values(builder, block)
    check(len(labels) == len(values), f"a row of {len(labels)} labels and {len(values)} values")
    return dict(zip(labels, values))


ROWS = {"Series": _series, "_new_Index": _index, "_restore_array": _arrow_texts, "chunked_array": _arrow_texts}
ROWS |= {"ArrowStringArray": _arrow_string_array, "ArrowStringArrayNumpySemantics": _arrow_string_array}
ROWS |= {"StringArray": _string_array, "__pyx_unpickle_NDArrayBacked": _string_array}
