"""Arguments of decode_attention, checked and flattened, shared by the op and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import _checks
from ._kv import PACKED_HEAD_DIMS, PAGE_SIZES, KVSegment, PackedKV, check_packed

MAX_SEGMENTS = 12  # kDecodeMaxSegments


@dataclass
class DecodeArgs:
    """Checked arguments; a list has an entry for each segment, or none where all of them would be None.

    key, value: (B, N, Hkv, D) of a dense segment, pages (P, page_size, Hkv, D) of a dense one with a block table, codes
    (B, Hkv, N, row_bytes) of a packed one.
    bits: 0 of a dense segment.   mass: buffers, and mass_segment the segments they belong to.
    """

    query: torch.Tensor
    scale: float
    key: list[torch.Tensor] = field(default_factory=list)
    value: list[torch.Tensor] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    lens: list[torch.Tensor | None] = field(default_factory=list)
    leftpad: list[torch.Tensor | None] = field(default_factory=list)
    block_table: list[torch.Tensor | None] = field(default_factory=list)
    key_scale: list[torch.Tensor | None] = field(default_factory=list)
    key_zero: list[torch.Tensor | None] = field(default_factory=list)
    value_channel: list[torch.Tensor | None] = field(default_factory=list)
    value_token: list[torch.Tensor | None] = field(default_factory=list)
    mass: list[torch.Tensor] = field(default_factory=list)
    mass_segment: list[int] = field(default_factory=list)

    def tokens(self, segment: int) -> int:
        """Tokens of a batch row that the segment has room for."""
        table = self.block_table[segment] if self.block_table else None
        blocks = 1 if table is None else table.shape[1]
        return blocks * self.key[segment].shape[2 if self.bits[segment] else 1]

    def key_heads(self) -> int:
        """Key heads; without segments, the query's."""
        if not self.key:
            return self.query.shape[2]
        return self.key[0].shape[1 if self.bits[0] else 2]


def check_decode(
    query: object,
    segments: object,
    *,
    scale: object,
    mass: object,
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> DecodeArgs:
    """The arguments of decode_attention, with the default scale; see ops.decode_attention for them."""
    args = _of_query(query, scale, dtypes)
    if not isinstance(segments, Sequence):
        raise TypeError(f"segments: got {type(segments).__name__}, must be a list of KVSegment and PackedKV")
    if len(segments) > MAX_SEGMENTS:
        raise ValueError(f"segments: got {len(segments)}, must be at most {MAX_SEGMENTS}")
    for number, segment in enumerate(segments):
        name = f"segments[{number}]"
        if isinstance(segment, PackedKV):
            _add_packed(args, check_packed(segment, name), name)
        elif isinstance(segment, KVSegment):
            _add_dense(args, segment, f"{name}.")
        else:
            raise TypeError(f"{name}: got {type(segment).__name__}, must be a KVSegment or PackedKV")
    _check_heads(args)
    if mass is not None:
        _add_mass(args, mass)
    return args


def unchecked(
    query: torch.Tensor,
    segments: Sequence[KVSegment | PackedKV],
    scale: float,
    mass: Sequence[torch.Tensor | None] | None,
) -> DecodeArgs:
    """As check_decode, for who made the segments itself, and reads them at every layer and token."""
    args = DecodeArgs(query, scale)
    for segment in segments:
        if isinstance(segment, PackedKV):
            _list_packed(args, segment, segment.lens)
        else:
            _list_dense(args, segment, segment.lens, segment.leftpad)
    for number, buffer in enumerate(mass or ()):
        if buffer is not None:
            args.mass.append(buffer)
            args.mass_segment.append(number)
    return args


def check_append(
    query: object,
    key: object,
    value: object,
    new_key: object,
    new_value: object,
    lens: object,
    leftpad: object,
    block_table: object,
    scale: object,
    mass: object,
    *,
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> DecodeArgs:
    """The arguments of append_attend_, but for the new tokens; see ops.append_attend_ for them."""
    args = _of_query(query, scale, dtypes)
    _add_dense(args, KVSegment(key, value, lens, leftpad, block_table), "")  # type: ignore[arg-type]
    _check_heads(args)
    if mass is not None:
        _add_buffer(args, 0, mass, "mass")
    if (new_key is None) != (new_value is None):
        missing = "new_key" if new_key is None else "new_value"
        raise ValueError(f"{missing}: is None, must be given where the other of new_key and new_value is")
    if new_key is None:
        return args
    batch, _, _, width = args.query.shape
    first = _checks.tensor(new_key, "new_key")
    added = first.shape[1] if first.dim() == 4 else "T"
    for given, name in ((new_key, "new_key"), (new_value, "new_value")):
        tensor = _checks.tensor(given, name)
        _checks.dtype(tensor, name, args.query.dtype)
        _checks.shape(tensor, name, (batch, added, args.key_heads(), width))
        _checks.same_device(tensor, name, args.query, "query")
        _checks.last_contiguous(tensor, name)
    if first.shape[1]:
        _checks.writable(args.key[0], "key")
        _checks.writable(args.value[0], "value")
    if args.lens[0] is None and first.shape[1] > args.tokens(0):
        raise ValueError(
            f"new_key: has {added} tokens, without lens at most {args.tokens(0)}, all that there is room for"
        )
    return args


def _of_query(query: object, scale: object, dtypes: tuple[torch.dtype, ...]) -> DecodeArgs:
    query = _checks.tensor(query, "query")
    _checks.dtype(query, "query", *dtypes)
    _checks.shape(query, "query", ("B", 1, "Hq", "D"))
    width = query.shape[3]
    if width not in PACKED_HEAD_DIMS:
        supported = ", ".join(str(d) for d in PACKED_HEAD_DIMS)
        raise ValueError(f"query: has head width {width}, must be one of {supported}")
    _checks.last_contiguous(query, "query")
    return DecodeArgs(query, width**-0.5 if scale is None else _checks.real(scale, "scale"))


def _check_heads(args: DecodeArgs) -> None:
    heads, key_heads = args.query.shape[2], args.key_heads()
    if heads < 1 or key_heads < 1 or heads % key_heads:
        raise ValueError(
            f"query: has {heads} heads, must be a positive multiple of the key heads, {key_heads}"
        )


def _add_dense(args: DecodeArgs, segment: KVSegment, prefix: str) -> None:
    """prefix: of the names of the segment's fields."""
    if not (segment.block_table is None and _fits(args, segment.key, segment.value)):
        _check_dense(args, segment, prefix)
    lens = _positions(segment.lens, f"{prefix}lens", args.query)
    _list_dense(args, segment, lens, _positions(segment.leftpad, f"{prefix}leftpad", args.query))


def _list_dense(
    args: DecodeArgs, segment: KVSegment, lens: torch.Tensor | None, leftpad: torch.Tensor | None
) -> None:
    args.key.append(segment.key)
    args.value.append(segment.value)
    args.bits.append(0)
    args.block.append(0)
    args.lens.append(lens)
    args.leftpad.append(leftpad)
    args.block_table.append(segment.block_table)
    for of_channel in (args.key_scale, args.key_zero, args.value_channel, args.value_token):
        of_channel.append(None)


def _fits(args: DecodeArgs, key: object, value: object) -> bool:
    """What _check_dense goes through one by one, as quickly as it can be asked: decoding asks at every token."""
    if not isinstance(key, torch.Tensor) or not isinstance(value, torch.Tensor):
        return False
    shape, of_query = key.shape, args.query.shape
    if len(shape) != 4 or value.shape != shape or shape[0] != of_query[0] or shape[3] != of_query[3]:
        return False
    heads = shape[2] if not args.key else args.key_heads()
    alike = key.dtype == value.dtype == args.query.dtype and key.device == value.device == args.query.device
    rows = key.stride(3) == 1 and value.stride(3) == 1
    return alike and rows and shape[1] <= _checks.INT32_MAX and shape[2] == heads


def _check_dense(args: DecodeArgs, segment: KVSegment, prefix: str) -> None:
    query = args.query
    key = _checks.tensor(segment.key, f"{prefix}key")
    value = _checks.tensor(segment.value, f"{prefix}value")
    table = segment.block_table
    if table is None:
        _checks.shape(key, f"{prefix}key", (query.shape[0], "N", "Hkv", query.shape[3]))
    else:
        table = _block_table(table, f"{prefix}block_table", query)
        _checks.shape(key, f"{prefix}key", ("P", "page_size", "Hkv", query.shape[3]))
        _check_pages(key, f"{prefix}key")
    tokens = key.shape[1] * (1 if table is None else table.shape[1])
    _check_segment(args, key, f"{prefix}key", tokens=tokens, heads=key.shape[2])
    _checks.shape(value, f"{prefix}value", tuple(key.shape))
    for tensor, field_name in ((key, f"{prefix}key"), (value, f"{prefix}value")):
        _checks.dtype(tensor, field_name, query.dtype)
        _checks.same_device(tensor, field_name, query, "query")
        _checks.last_contiguous(tensor, field_name)


def _add_packed(args: DecodeArgs, packed: PackedKV, name: str) -> None:
    query, codes = args.query, packed.key_codes
    batch, heads, tokens, _ = codes.shape
    if (batch, packed.head_dim) != (query.shape[0], query.shape[3]):
        raise ValueError(
            f"{name}: has {batch} batch rows of head width {packed.head_dim}, must have {query.shape[0]} of "
            f"{query.shape[3]} as query"
        )
    _check_segment(args, codes, f"{name}.key_codes", tokens=tokens, heads=heads)
    _checks.same_device(codes, f"{name}.key_codes", query, "query")
    _list_packed(args, packed, _positions(packed.lens, f"{name}.lens", query))


def _list_packed(args: DecodeArgs, packed: PackedKV, lens: torch.Tensor | None) -> None:
    args.key.append(packed.key_codes)
    args.value.append(packed.value_codes)
    args.bits.append(packed.bits)
    args.block.append(packed.block)
    args.lens.append(lens)
    args.leftpad.append(None)
    args.block_table.append(None)
    # A few numbers for each head and block: worth a copy where they are strided.
    args.key_scale.append(packed.key_scale.contiguous())
    args.key_zero.append(packed.key_zero.contiguous())
    args.value_channel.append(packed.value_channel.contiguous())
    args.value_token.append(packed.value_token)


def _check_segment(args: DecodeArgs, tensor: torch.Tensor, name: str, *, tokens: int, heads: int) -> None:
    if tokens > _checks.INT32_MAX:
        raise ValueError(f"{name}: has {tokens} tokens, must have at most {_checks.INT32_MAX}")
    if args.key and heads != args.key_heads():
        raise ValueError(f"{name}: has {heads} heads, must have {args.key_heads()} as segments[0]")


def _block_table(value: object, name: str, query: torch.Tensor) -> torch.Tensor:
    tensor = _checks.tensor(value, name)
    _checks.dtype(tensor, name, torch.int32)
    _checks.shape(tensor, name, (query.shape[0], "max_blocks"))
    _checks.same_device(tensor, name, query, "query")
    _checks.last_contiguous(tensor, name)
    return tensor


def _check_pages(pages: torch.Tensor, name: str) -> None:
    count, size = pages.shape[:2]
    if size not in PAGE_SIZES:
        raise ValueError(
            f"{name}: has page_size {size}, must be a multiple of {PAGE_SIZES.step} from {PAGE_SIZES[0]} to "
            f"{PAGE_SIZES[-1]}"
        )
    if count > _checks.INT32_MAX:
        raise ValueError(f"{name}: has {count} pages, must have at most {_checks.INT32_MAX}")


def _positions(value: object, name: str, query: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    tensor = _checks.tensor(value, name)
    _checks.dtype(tensor, name, torch.int32)
    _checks.shape(tensor, name, query.shape[:1])
    _checks.same_device(tensor, name, query, "query")
    return tensor.contiguous()


def _add_mass(args: DecodeArgs, mass: object) -> None:
    if not isinstance(mass, Sequence):
        raise TypeError(f"mass: got {type(mass).__name__}, must be a list of tensors, one per segment")
    if len(mass) != len(args.key):
        raise ValueError(f"mass: has {len(mass)} entries, must have one for each of {len(args.key)} segments")
    for segment, buffer in enumerate(mass):
        if buffer is not None:
            _add_buffer(args, segment, buffer, f"mass[{segment}]")


def _add_buffer(args: DecodeArgs, segment: int, buffer: object, name: str) -> None:
    allowed = [torch.float32] + [torch.float64] * (args.query.dtype == torch.float64)
    tensor = _checks.tensor(buffer, name)
    _checks.dtype(tensor, name, *allowed)
    _checks.shape(tensor, name, (args.query.shape[0], args.key_heads(), args.tokens(segment)))
    _checks.same_device(tensor, name, args.query, "query")
    _checks.last_contiguous(tensor, name)
    _checks.writable(tensor, name)
    if any(tensor is other for other in args.mass):
        raise ValueError(f"{name}: shares memory with another buffer, must be disjoint to be written")
    args.mass.append(tensor)
    args.mass_segment.append(segment)
