"""The tensor index of a PyTorch file, read from its pickle without running it.

A pickle is a program for a small stack machine that can call any Python function. This is another
machine for the same programs: it knows strings, numbers, containers and a handful of names, which it
only ever compares. Nothing is imported and nothing is called; whatever asks for more is refused by name.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsafePickleError

MAX_PICKLE_BYTES = 2 << 20  # the 80M model's index has 10 thousand
MAX_INTEGER_BYTES = 8
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}

STORAGE_DTYPES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
}
ORDERED_DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
ALLOWED_GLOBALS = frozenset({ORDERED_DICT, TENSOR, PARAMETER, *STORAGE_DTYPES})


@dataclass(frozen=True)
class StorageReference:
    """A storage named by the pickle: `count` elements of `dtype` in the archive's member data/`key`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class TensorReference:
    """A view of a storage; offset and strides count elements."""

    storage: StorageReference
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensor_pickle(data: bytes) -> dict[str, TensorReference]:
    """The state dict in `data.pkl`: name to tensor, in the file's order.

    A state dict may also lie under the key "state_dict". `UnsafePickleError` names what is not allowed;
    `CheckpointError` says what is damaged.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"its tensor index has {len(data)} bytes, more than {MAX_PICKLE_BYTES}")
    value = _Machine(data).run()
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not value:
        raise CheckpointError("its pickle does not hold named tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorReference):
            raise CheckpointError(f"its entry {_show(name)} is {_show(tensor)} where a tensor is expected")
    return value


@dataclass(frozen=True)
class _Global:
    name: str


class _Machine:
    """One run over the opcodes, whose layout `pickletools` describes; each has a method of its own below.

    The values are plain strings, numbers, tuples, lists and dicts, and the references above.
    """

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Interpret up to STOP and return the one value left."""
        while True:
            name, argument = self.next_opcode()
            if name == "STOP":
                break
            try:
                _HANDLERS[name](self, argument)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                position = self.stream.tell()
                raise CheckpointError(f"its pickle is damaged: {name} before byte {position} makes no sense") from error
        if len(self.stack) != 1 or self.marks:
            raise CheckpointError("its pickle is damaged: it does not end with one value")
        return self.stack.pop()

    def next_opcode(self) -> tuple[str, Any]:
        code = self.stream.read(1)
        if not code:
            raise CheckpointError("its pickle is cut off")
        opcode = OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise CheckpointError(f"its pickle is damaged: {code!r} is no opcode")
        if opcode.name not in _HANDLERS:
            raise UnsafePickleError(f"its pickle uses {opcode.name}, which tensors do not need; nothing was run")
        try:
            if opcode.name in ("GLOBAL", "INST"):
                return opcode.name, self.read_name()
            return opcode.name, None if opcode.arg is None else opcode.arg.reader(self.stream)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"its pickle is cut off or damaged in {opcode.name}") from error

    def read_name(self) -> str:
        """Module and attribute, a line each. (`pickletools` would undo escapes here, which no unpickler does.)"""
        module, attribute = self.stream.readline(), self.stream.readline()
        if not attribute.endswith(b"\n"):
            raise ValueError
        return f"{module[:-1].decode()}.{attribute[:-1].decode()}"

    # Constants and containers

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def integer(self, value: int) -> None:
        if value.bit_length() > 8 * MAX_INTEGER_BYTES:
            raise ValueError
        self.stack.append(value)

    def marked_tuple(self, _: None) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def short_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise IndexError
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update(self.stack[-1], [key, value])

    def set_items(self, _: None) -> None:
        items = self.pop_mark()
        self.update(self.stack[-1], items)

    def update(self, target: Any, items: list[Any]) -> None:
        keys = items[::2]
        if type(target) is not dict or not all(isinstance(key, (str, int)) for key in keys):
            raise TypeError
        target.update(zip(keys, items[1::2], strict=True))

    def append(self, _: None) -> None:
        item = self.stack.pop()
        self.extend(self.stack[-1], [item])

    def appends(self, _: None) -> None:
        items = self.pop_mark()
        self.extend(self.stack[-1], items)

    def extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    # The machine itself

    def protocol(self, version: int) -> None:
        if not 2 <= version <= 5:
            raise ValueError

    def nothing(self, _: Any) -> None:
        """FRAME only helps buffering; STOP ends `run`."""

    def mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    # Names, and what would be calls

    def stack_global(self, _: None) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise UnsafePickleError("its pickle computes the name of a function; nothing was run")
        self.push_global(f"{module}.{attribute}")

    def push_global(self, name: str) -> None:
        if name not in ALLOWED_GLOBALS:
            raise UnsafePickleError(f"its pickle asks for {_show(name)}, which tensors do not need; nothing was run")
        self.stack.append(_Global(name))

    def class_by_name(self, name: str) -> None:
        """INST, the oldest way to make an object; no tensor is written with it."""
        raise UnsafePickleError(f"its pickle creates {_show(name)}, which tensors do not need; nothing was run")

    def persistent_id(self, _: None) -> None:
        """("storage", storage class, key, device, number of elements)"""
        kind, storage_class, key, _device, count = self.stack.pop()
        if kind != "storage" or not isinstance(storage_class, _Global) or not isinstance(key, str):
            raise TypeError
        self.stack.append(StorageReference(key, STORAGE_DTYPES[storage_class.name], _size(count)))

    def reduce(self, _: None) -> None:
        """A call in a real pickle; here one of three forms is recognised and described."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnsafePickleError(f"its pickle calls {_show(function)}; nothing was run")
        if function.name == ORDERED_DICT and not arguments:
            self.stack.append({})
        elif function.name == PARAMETER and arguments and isinstance(arguments[0], TensorReference):
            self.stack.append(arguments[0])
        elif function.name == TENSOR:
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, StorageReference) or len(shape) != len(strides):
                raise TypeError
            self.stack.append(TensorReference(storage, _size(offset), _sizes(shape), _sizes(strides)))
        else:
            raise UnsafePickleError(f"its pickle calls {_show(function)} in an unknown way; nothing was run")

    def build(self, _: None) -> None:
        """Attributes of a state dict (its `_metadata`) are dropped; nothing else may have any."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not dict or type(state) is not dict:
            raise UnsafePickleError(f"its pickle sets the state of {_show(target)}; nothing was run")


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _tuple_of(length: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.short_tuple(length)


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "FRAME": _Machine.nothing,
    "STOP": _Machine.nothing,
    "MARK": _Machine.mark,
    "NONE": _Machine.push,  # opcodes without an argument carry None
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "BININT": _Machine.integer,
    "BININT1": _Machine.integer,
    "BININT2": _Machine.integer,
    "LONG1": _Machine.integer,
    "LONG4": _Machine.integer,
    "BINFLOAT": _Machine.push,
    "SHORT_BINUNICODE": _Machine.push,
    "BINUNICODE": _Machine.push,
    "BINUNICODE8": _Machine.push,
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "EMPTY_LIST": _constant(list),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "EMPTY_DICT": _constant(dict),
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.class_by_name,
    "BINPERSID": _Machine.persistent_id,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise TypeError
    return tuple(_size(value) for value in values)


def _show(value: Any) -> str:
    """A value for an error message: one short line, whatever it holds."""
    if isinstance(value, _Global):
        return value.name
    if isinstance(value, str):
        return ascii(value)[1:-1][:100]
    return f"a {type(value).__name__}"
