"""Make values from the records of a pickle: arrays, tensors and rows of pandas, from bytes whose size was checked.

Every function takes the builder, which makes plain values of a record's parts, and the record. It raises RefusedPickle for anything that
the library of that name does not write for plain numbers and texts.
"""

import io
import math
import re
import zipfile

import numpy as np

from features.inert import DTYPES, STORAGES, Record, is_class, read_records
from features.opcodes import RefusedPickle, check_opcodes

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's former file format


def _is(value, *names):
    return isinstance(value, Record) and value.name in names


def _check(holds, what):
    if not holds:
        raise RefusedPickle(what)


def _of(builder, value, *kinds):
    """Make a plain value that must be of one of these types."""
    value = builder.build(value)
    _check(type(value) in kinds, f"a {type(value).__name__} where a {kinds[0].__name__} belongs")
    return value


def _whole_numbers(value):
    """Check a shape: a tuple of whole numbers from 0."""
    if _is(value, "Size") and len(value.args) == 1:
        value = value.args[0]
    fits = type(value) in (tuple, list) and len(value) <= 32 and all(type(number) is int and number >= 0 for number in value)
    _check(fits, "a shape that is not made of whole numbers")
    return tuple(value)


def _no_value(builder, record):
    raise RefusedPickle(f"{record.origin} where a value belongs")


def _ordered_dict(builder, record):
    pairs = _of(builder, record.args[0], list) if record.args else []
    _check(all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs), f"{record.origin} of something else than pairs")
    pairs = [*map(tuple, pairs), *record.items]
    _check(builder.are_atoms([key for key, _ in pairs]), f"{record.origin} with keys of other types")
    return _of(builder, dict(pairs), dict)


def _set(builder, record):
    items = _of(builder, record.args[0], list) if len(record.args) == 1 else []
    _check(builder.are_atoms(items), f"{record.origin} of other things")
    return set(items)


def _encoded(builder, record):
    _check(len(record.args) == 2 and record.args[1] in ("latin1", "latin-1"), f"{record.origin} of another encoding than latin1")
    return _of(builder, record.args[0], str).encode("latin-1")


def _byte_array(builder, record):
    if len(record.args) == 2:
        return _encoded(builder, record)
    return bytes(_of(builder, record.args[0], bytes, bytearray)) if record.args else b""


# numpy


def _dtype(record):
    """Read a plain dtype. Returns (kind, bytes per item, byte order); the kind of Python objects is "O"."""
    _check(_is(record, "dtype") and record.args and isinstance(record.args[0], str), "an array without a dtype")
    match = re.fullmatch(r"([<>|=]?)([biufUSO])(\d{1,9})", record.args[0])
    _check(match and type(record.state) in (tuple, type(None)), f"the dtype {record.args[0][:20]!r}")
    order, kind, size = match[1] or "=", match[2], int(match[3])
    if record.state is not None:
        _check(5 <= len(record.state) <= 9, "a dtype of an unknown form")
        _check(all(part is None for part in record.state[2:5]), "a dtype with fields")
        order = record.state[1]
    plain = kind + str(size) in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "O8", "O4")
    _check(plain or kind in "US", f"the dtype {record.args[0][:20]!r}")
    _check(order in ("<", ">", "|", "="), "a dtype of an unknown byte order")
    return kind, size * 4 if kind == "U" else size, "<" if order in "|=" else order


def _array_of(builder, dtype, shape, data, order="C"):
    """Make an array from its bytes; of texts or objects a list, which is nested where the shape is."""
    kind, size, byte_order = _dtype(dtype)
    shape = _whole_numbers(shape)
    count = math.prod(shape)
    if kind == "O":
        values = _of(builder, data, list)
        _check(len(values) == count and len(shape) == 1, f"an array of shape {shape} over {len(values)} objects")
        return values
    data = bytes(_of(builder, data, bytes, bytearray))
    _check(len(data) == count * size and max(shape, default=0) < 2**40, f"an array of shape {shape} over {len(data)} bytes")
    if kind in "US":
        _check(len(shape) < 2, "an array of texts in rows")
        encoding = "latin-1" if kind == "S" else "utf-32-le" if byte_order == "<" else "utf-32-be"
        texts = [data[at : at + size].decode(encoding, "surrogatepass").rstrip("\0") for at in range(0, len(data), size or 1)]
        texts = texts if size else [""] * min(count, len(data))
        return texts if shape else texts[0] if texts else ""
    array = np.frombuffer(data, "u1" if kind == "b" else f"{byte_order}{kind}{size}")
    array = array != 0 if kind == "b" else array.astype(f"={kind}{size}")  # a copy: its own, aligned, of this machine's byte order
    return array.reshape(shape, order=order)


def _reconstructed(builder, record):
    """An array as pickle protocols below 5 write it: an empty one, and a state."""
    _check(record.args and is_class(record.args[0], "ndarray"), f"{record.origin} of another class than numpy.ndarray")
    _check(type(record.state) is tuple and len(record.state) in (4, 5), "an array without its numbers")
    shape, dtype, fortran, data = record.state[-4:]
    return _array_of(builder, dtype, shape, data, "F" if fortran is True else "C")


def _from_buffer(builder, record):
    """An array as pickle protocol 5 writes it."""
    _check(len(record.args) == 4, f"{record.origin} of {len(record.args)} arguments")
    data, dtype, shape, order = record.args
    return _array_of(builder, dtype, shape, data, "F" if order == "F" else "C")


def _scalar(builder, record):
    """A single number of numpy, as a Python number."""
    _check(len(record.args) == 2, f"{record.origin} of {len(record.args)} arguments")
    dtype, data = record.args
    _check(_dtype(dtype)[0] != "O", "an object in place of a number")
    value = _array_of(builder, dtype, (), data)
    return value.item() if isinstance(value, (np.ndarray, np.generic)) else value


# torch


def _tensor(builder, record):
    """A tensor over its storage, as torch._utils._rebuild_tensor_v2 makes it: none of its numbers counts twice."""
    import torch

    _check(len(record.args) >= 4, f"{record.origin} of {len(record.args)} arguments")
    storage, offset, size, stride = record.args[:4]
    _check(_is(storage, "_load_from_bytes"), "a tensor without a storage")
    flat = builder.build(storage)
    size, stride = _whole_numbers(size), _whole_numbers(stride)
    _check(len(size) == len(stride) and type(offset) is int and offset >= 0, "a tensor whose shape is not made of whole numbers")
    count = math.prod(size)
    if not count:
        _check(max(size) < 2**31, f"a tensor of shape {size} over {len(flat)} numbers")
        return torch.empty(size, dtype=flat.dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    _check(last < len(flat) and count <= len(flat), f"a tensor of shape {size} over {len(flat)} numbers")
    builder.spend(count * flat.element_size() >> 6)
    return flat.as_strided(size, stride, offset)


def _parameter(builder, record):
    import torch

    _check(record.args, f"{record.origin} without a tensor")
    return _of(builder, record.args[0], torch.Tensor)


def _storage(builder, record):
    """The numbers inside a plainly pickled tensor: a file of torch of its own. Returns them as a flat tensor."""
    _check(len(record.args) == 1, f"{record.origin} of {len(record.args)} arguments")
    content = bytes(_of(builder, record.args[0], bytes, bytearray))
    try:
        name, count, data = _zip_storage(content) if content.startswith(b"PK") else _legacy_storage(content)
    except RefusedPickle as error:
        raise RefusedPickle(f"more than numbers in the bytes of a tensor ({error})") from error
    except (zipfile.BadZipFile, KeyError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        raise RefusedPickle("something damaged in the bytes of a tensor") from error
    import torch

    dtype = STORAGES[name]
    numbers = torch.from_numpy(np.frombuffer(data, np.uint8).copy()) if len(data) else torch.empty(0, dtype=torch.uint8)
    numbers = numbers != 0 if dtype == "bool" else numbers.view(getattr(torch, dtype))
    _check(len(numbers) == count, f"a storage of {count} numbers in {len(data)} bytes of a tensor")
    return numbers


def _inner_pickle(content, position):
    """Read one of the pickles inside a file of torch. Returns (the object, the position behind it)."""
    end, _ = check_opcodes(content, position)
    return read_records(io.BytesIO(content[position:end]), references=True), end


def _reference(record):
    """Read a reference to a storage: ("storage", its class, key, location, count). Returns (class name, key, count)."""
    _check(_is(record, "a storage") and type(record.args[0]) is tuple and len(record.args[0]) in (5, 6), "no storage")
    word, kind, key, _, count, *view = record.args[0]
    known = isinstance(kind, type) and issubclass(kind, Record) and kind.name in STORAGES and word == "storage"
    _check(known and type(key) is str and type(count) is int and not any(view), "a storage of an unknown form")
    return kind.name, key, count


def _legacy_storage(content):
    """Read torch's former file format: five pickles, then each storage as a count and its bytes."""
    magic, position = _inner_pickle(content, 0)
    protocol, position = _inner_pickle(content, position) if magic == _MAGIC else (None, 0)
    _check(protocol == _PROTOCOL, "no file of torch")
    system, position = _inner_pickle(content, position)
    _check(type(system) is dict and system.get("little_endian") is True, "numbers in big-endian order")
    record, position = _inner_pickle(content, position)
    name, key, count = _reference(record)
    keys, position = _inner_pickle(content, position)
    _check(keys == [key], "several storages")
    _check(int.from_bytes(content[position : position + 8], "little") == count, "a storage of another size")
    return name, count, memoryview(content)[position + 8 :]


def _zip_storage(content):
    """Read torch's present file format: an uncompressed zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        _check(all(member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1 for member in members), "a compressed archive")
        (description,) = (member for member in members if member.filename.endswith("/data.pkl"))
        top = description.filename.removesuffix("data.pkl")
        name, key, count = _reference(_inner_pickle(bytes(_member(content, description)), 0)[0])
        orders = [bytes(_member(content, member)[:10]) for member in members if member.filename == f"{top}byteorder"]
        _check(b"big" not in orders, "numbers in big-endian order")
        return name, count, _member(content, archive.getinfo(f"{top}data/{key}"))


def _member(content, member):
    """Find the bytes of an uncompressed member inside the archive, without a copy."""
    header = content[member.header_offset : member.header_offset + 30]
    _check(header[:4] == b"PK\3\4", "a damaged archive")
    start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    _check(0 <= start and start + member.file_size <= len(content), "an archive that is cut off")
    return memoryview(content)[start : start + member.file_size]


# pandas


def _arrow_buffer(builder, value):
    if value is None:
        return b""
    _check(_is(value, "py_buffer") and len(value.args) == 1, "an arrow buffer of an unknown form")
    return bytes(_of(builder, value.args[0], bytes, bytearray))


def _arrow_texts(builder, record):
    """An arrow array of texts: offsets and bytes. Returns a list of str and None."""
    if _is(record, "chunked_array"):
        _check(record.args and type(record.args[0]) is list, "an arrow array of an unknown form")
        return [text for part in record.args[0] for text in _of(builder, part, list)]
    state = record.args[0] if len(record.args) == 1 else None
    _check(type(state) in (tuple, list) and len(state) == 7, "an arrow array of an unknown form")
    kind, length, _, start, buffers, children, dictionary = state
    widths = {"string": 4, "utf8": 4, "large_string": 8, "large_utf8": 8}
    named = _is(kind, "type_for_alias") and len(kind.args) == 1 and type(kind.args[0]) is str
    _check(named and kind.args[0] in widths and not children and dictionary is None, "an arrow array of something else than texts")
    _check(type(buffers) is list and len(buffers) == 3, "an arrow array of an unknown form")
    length, start = _whole_numbers((length, start))
    validity, offsets, data = (_arrow_buffer(builder, buffer) for buffer in buffers)
    width = widths[kind.args[0]]
    end = start + length
    _check((end + 1) * width <= len(offsets) or not length, f"an arrow array of {length} texts over {len(offsets)} bytes")
    _check(not validity or (end + 7) // 8 <= len(validity), "an arrow array whose marks of missing texts are too few")
    places = np.frombuffer(offsets, f"<i{width}", length + 1, start * width).tolist() if length else [0]
    _check(0 <= places[0] and places[-1] <= len(data) and places == sorted(places), "an arrow array with texts outside its bytes")
    texts = [data[a:b].decode("utf-8", "replace") for a, b in zip(places, places[1:])]
    if validity:
        texts = [text if validity[(start + i) // 8] >> (start + i) % 8 & 1 else None for i, text in enumerate(texts)]
    return texts


def _arrow_string_array(builder, record):
    _check(type(record.state) is dict, f"{record.origin} of an unknown form")
    array = record.state.get("_pa_array", record.state.get("_data"))
    _check(_is(array, "chunked_array", "_restore_array"), f"{record.origin} of an unknown form")
    return _of(builder, array, list)


def _string_array(builder, record):
    """pandas' array of Python texts: its state holds an array of objects."""
    parts = record.state.values() if type(record.state) is dict else record.state if type(record.state) is tuple else ()
    arrays = [part for part in parts if _is(part, "_reconstruct", "_frombuffer")]
    _check(len(arrays) == 1, f"{record.origin} of an unknown form")
    return _of(builder, arrays[0], list)


def _values(builder, value):
    """Make the values or labels of a row: a list of texts, numbers and None."""
    _check(isinstance(value, Record), "a row of an unknown form")
    value = builder.build(value)
    value = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    _check(type(value) is list and builder.are_atoms(value), "a row with other values than texts and numbers")
    return value


def _index(builder, record):
    """The labels of a row, from _new_Index(class, {"data": labels, "name": name})."""
    _check(len(record.args) == 2 and type(record.args[1]) is dict, f"{record.origin} of an unknown form")
    kind, parts = record.args
    if is_class(kind, "RangeIndex"):
        numbers = [parts.get(name) for name in ("start", "stop", "step")]
        _check(all(type(number) is int for number in numbers) and numbers[2] != 0, "an index of an unknown form")
        labels = range(*numbers)
        builder.spend(len(labels))
        return list(labels)
    return _values(builder, parts.get("data"))


def _series(builder, record):
    """A row of pandas, as a dict."""
    _check(type(record.state) is dict, f"{record.origin} of an unknown form")
    manager = record.state.get("_mgr", record.state.get("_data"))
    _check(_is(manager, "SingleBlockManager"), f"{record.origin} of an unknown form")
    if type(manager.state) is tuple:  # (axes, values of blocks, labels of blocks, the same by name)
        parts = manager.state[:2]
    else:  # pandas 1.3 and later also write SingleBlockManager(block, axis)
        parts = manager.args
    _check(len(parts) == 2, f"{manager.origin} of an unknown form")
    axes, blocks = parts if type(manager.state) is tuple else parts[::-1]
    axes, blocks = ([part] if isinstance(part, Record) else part for part in (axes, blocks))
    _check(all(type(part) in (list, tuple) and len(part) == 1 for part in (axes, blocks)), f"{manager.origin} of an unknown form")
    (axis,), (block,) = axes, blocks
    if _is(block, "_unpickle_block", "new_block"):
        _check(block.args, f"{block.origin} of an unknown form")
        block = block.args[0]
    labels, values = _values(builder, axis), _values(builder, block)
    _check(len(labels) == len(values), f"a row of {len(labels)} labels and {len(values)} values")
    return dict(zip(labels, values))


REBUILD = dict.fromkeys(["slice", "ndarray", "dtype", "Index", "RangeIndex", "Int64Index", "StringDtype", "SingleBlockManager", "new_block",
                         "_unpickle_block", "type_for_alias", "py_buffer", "a storage", *STORAGES, *DTYPES], _no_value)  # fmt: skip
REBUILD |= {"OrderedDict": _ordered_dict, "set": _set, "frozenset": _set, "bytearray": _byte_array, "encode": _encoded}
REBUILD |= {"_reconstruct": _reconstructed, "_frombuffer": _from_buffer, "scalar": _scalar, "Series": _series, "_new_Index": _index}
REBUILD |= {"_rebuild_tensor_v2": _tensor, "_rebuild_tensor": _tensor, "_rebuild_parameter": _parameter, "_load_from_bytes": _storage}
REBUILD |= {"Size": lambda builder, record: _whole_numbers(record), "_restore_array": _arrow_texts, "chunked_array": _arrow_texts}
REBUILD |= {"ArrowStringArray": _arrow_string_array, "ArrowStringArrayNumpySemantics": _arrow_string_array}
REBUILD |= {"StringArray": _string_array, "__pyx_unpickle_NDArrayBacked": _string_array}
