"""Inert records: what a stranger's pickle gets in place of the classes and functions that it names."""

import gc
import pickle

from features.opcodes import RefusedPickle

STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "DoubleStorage": "float64", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}  # fmt: skip
DTYPES = sorted(set(STORAGES.values()))
# Everything that a feature file may name. numpy and pandas moved their modules over the years; files name either place.
ADMITTED = {
    "collections": ["OrderedDict"],
    "builtins": ["slice", "set", "frozenset", "bytes", "bytearray"],
    "__builtin__": ["slice", "set", "frozenset", "bytes", "bytearray"],
    "_codecs": ["encode"],
    "numpy": ["ndarray", "dtype"],
    "numpy.core.multiarray": ["_reconstruct", "scalar"],
    "numpy._core.multiarray": ["_reconstruct", "scalar"],
    "numpy.core.numeric": ["_frombuffer"],
    "numpy._core.numeric": ["_frombuffer"],
    "pandas": ["Series", "Index", "RangeIndex", "StringDtype", "NA"],
    "pandas._libs.missing": ["NA"],
    "pandas.arrays": ["ArrowStringArray", "StringArray"],
    "pandas.core.series": ["Series"],
    "pandas.core.indexes.base": ["Index", "_new_Index"],
    "pandas.core.indexes.range": ["RangeIndex"],
    "pandas.core.indexes.numeric": ["Int64Index"],
    "pandas.core.internals.managers": ["SingleBlockManager"],
    "pandas.core.internals.blocks": ["new_block"],
    "pandas._libs.internals": ["_unpickle_block"],
    "pandas._libs.arrays": ["__pyx_unpickle_NDArrayBacked"],
    "pandas.core.arrays.string_": ["StringArray", "StringDtype"],
    "pandas.core.arrays.string_arrow": ["ArrowStringArray", "ArrowStringArrayNumpySemantics"],
    "pyarrow.lib": ["type_for_alias", "py_buffer", "chunked_array", "_restore_array"],
    "torch": ["Size", *STORAGES, *DTYPES],
    "torch.cuda": [*STORAGES],
    "torch._utils": ["_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"],
    "torch.storage": ["UntypedStorage", "_load_from_bytes"],
}


class Record:
    """Stands for a call, a class or an object in a pickle. It keeps its arguments and its state, and does nothing."""

    __slots__ = ("args", "state", "items")
    module = origin = name = ""

    def __new__(cls, *args, **kwargs):
        record = object.__new__(cls)
        record.args, record.state, record.items = args, None, []
        return record

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.items.append((key, value))


def _record_class(module, name):
    fields = {"__slots__": (), "module": module, "name": name, "origin": f"{module}.{name}"}
    return type(name, (Record,), fields)


_RECORDS = {(module, name): _record_class(module, name) for module, names in ADMITTED.items() for name in names}
_Reference = _record_class("torch", "a storage")


def is_class(value, name):
    """Say whether a value is the stand-in for a class of this name."""
    return isinstance(value, type) and issubclass(value, Record) and value.name == name


class _RecordUnpickler(pickle.Unpickler):
    """Python's fast reader, with a class of records for every admitted name."""

    def find_class(self, module, name):
        try:
            return _RECORDS[module, name]
        except (KeyError, TypeError):
            raise RefusedPickle(f"{module}.{name}"[:200]) from None

    def persistent_load(self, key):
        """Refuse a reference to something outside the pickle; only files of torch have such references."""
        raise RefusedPickle("something outside the pickle")


class _StorageUnpickler(_RecordUnpickler):
    """Reads the pickle inside a file of torch, whose references name storages."""

    def persistent_load(self, key):
        return _Reference(key)


def read_records(file, references=False):
    """Read a pickle that check_opcodes has passed.

    Args:
        file: open binary file.
        references: admit the references to storages that a file of torch holds; they become records with the reference as argument.

    Returns:
        The object, with a Record for everything that is not a plain value.
    """
    enabled = gc.isenabled()
    gc.disable()  # it would go through millions of rows again and again, and find nothing
    try:
        return (_StorageUnpickler if references else _RecordUnpickler)(file).load()
    finally:
        if enabled:
            gc.enable()


def is_kind(value, *names):
    return isinstance(value, Record) and value.name in names


def check(holds, what):
    if not holds:
        raise RefusedPickle(what)


def build_as(builder, value, *kinds):
    """Make a plain value that must be of one of these types."""
    value = builder.build(value)
    check(type(value) in kinds, f"a {type(value).__name__} where a {kinds[0].__name__} belongs")
    return value


def whole_numbers(value):
    """Check a shape: a tuple of whole numbers from 0."""
    if is_kind(value, "Size") and len(value.args) == 1:
        value = value.args[0]
    fits = type(value) in (tuple, list) and len(value) <= 32 and all(type(number) is int and number >= 0 for number in value)
    check(fits, "a shape that is not made of whole numbers")
    return tuple(value)
