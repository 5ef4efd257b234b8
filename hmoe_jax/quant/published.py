"""How a checkpoint announces its formats: `quantization_config` of `config.json`, read strictly.

Two spellings are known: DeepSeek's `fp8`, and `compressed-tensors` with weights alone or with activations quantised
on the fly. What they say of activations is skipped: ours stay in BF16, which is more exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hmoe_jax.config_fields import Fields
from hmoe_jax.core import ConfigError
from hmoe_jax.quant.formats import FORMATS, FP8_BLOCK, PER_CHANNEL, PER_TENSOR, ScaleBlock


@dataclass(frozen=True)
class Stored:
    """How a module's matrix is stored: format, which weights share a scale, and what the module's tensors are called.

    `shape_name` is a tensor that repeats the matrix's shape, where the files have one.
    """

    codec: str
    block: ScaleBlock
    weight_name: str = "weight"
    scale_name: str = "weight_scale"
    shape_name: str | None = None


@dataclass(frozen=True)
class Target:
    """A pattern of modules. The lower `rank` decides: a module's name (0), then a regular expression, then a class."""

    rank: int
    pattern: str

    def matches(self, module: str) -> bool:
        return re.match(self.pattern, module) is not None


@dataclass(frozen=True)
class Group:
    """Modules that are stored alike."""

    targets: tuple[Target, ...]
    stored: Stored


@dataclass(frozen=True)
class Quantization:
    """Which linear modules are stored in which format. Those that match no group, or `kept`, are not quantised.

    `has_input_scales`: modules have `input_scale` tensors, which belong to quantised activations.
    """

    groups: tuple[Group, ...]
    kept: tuple[Target, ...] = ()
    has_input_scales: bool = False

    def stored(self, module: str) -> Stored | None:
        """How the module of that name is stored; None: as plain numbers. Raises `ConfigError` if groups differ."""
        if any(target.matches(module) for target in self.kept):
            return None
        found = {
            (target.rank, group.stored) for group in self.groups for target in group.targets if target.matches(module)
        }
        best = [stored for rank, stored in found if rank == min(found_rank for found_rank, _ in found)]
        if len(best) > 1:
            raise ConfigError(f"quantization_config.config_groups: two groups with different weights match {module}")
        return best[0] if best else None

    @property
    def smallest_bits(self) -> int:
        """Of a weight in any group."""
        return min(FORMATS[group.stored.codec].encoding.bits for group in self.groups)


def read_quantization(fields: Fields | None) -> Quantization | None:
    """The record of a `quantization_config`; None stays None."""
    if fields is None:
        return None
    methods = {"fp8": _read_fp8, "compressed-tensors": _read_compressed_tensors}
    fields.fixed("quant_method", tuple(methods))
    quantization = methods[fields.value("quant_method")](fields)
    fields.finish()
    return quantization


def _read_fp8(fields: Fields) -> Quantization:
    fields.fixed("fmt", ("e4m3",))
    fields.ignore("activation_scheme", "scale_fmt")
    fields.fixed("dequantize", (False,))
    block = _fp8_block(fields, "weight_block_size")
    stored = Stored("fp8_block", block, scale_name="weight_scale_inv")
    # A name stands for the module and all below it. The head is never quantised, and never listed.
    names = [*fields.names("modules_to_not_convert"), "lm_head"]
    kept = tuple(Target(0, rf"{re.escape(name)}(\.|\Z)") for name in names)
    return Quantization((Group((_EVERY_LINEAR,), stored),), kept)


def _read_compressed_tensors(fields: Fields) -> Quantization:
    fields.fixed("quantization_status", ("compressed",))
    fields.fixed("kv_cache_scheme", (None,))
    fields.fixed("transform_config", (None, {}))
    fields.fixed("moe_sparsity_config", (None,))
    fields.ignore("global_compression_ratio", "version")
    _check_dense(fields)
    named = fields.nested("config_groups")
    if named is None:
        raise ConfigError("quantization_config.config_groups is missing")
    file_format = fields.value("format")
    read = [_read_group(named, name, file_format) for name in named.unread()]
    if not read:
        raise ConfigError("quantization_config.config_groups has no groups")
    return Quantization(
        groups=tuple(group for group, _ in read),
        kept=_targets(fields.names("ignore")),
        has_input_scales=any(has_input_scales for _, has_input_scales in read),
    )


def _check_dense(fields: Fields) -> None:
    sparsity = fields.nested("sparsity_config")
    if sparsity is not None and sparsity.unread():
        sparsity.fixed("format", ("dense",))


def _read_group(named: Fields, name: str, file_format: Any) -> tuple[Group, bool]:
    """The group, and whether its modules have tensors that scale activations."""
    group = named.nested(name)
    if group is None:
        raise ConfigError(f"{named.path(name)} must be an object, got None")
    targets = _targets(group.names("targets"))
    group.fixed("output_activations", (None,))
    if group.value("format", None) is not None:
        file_format = group.value("format")
    inputs, weights = group.nested("input_activations"), group.nested("weights")
    if weights is None:
        raise ConfigError(f"{group.path('weights')} is missing")
    has_input_scales = inputs is not None and not inputs.boolean("dynamic", False)
    stored = _read_weights(weights, file_format)
    group.finish()
    return Group(targets, stored), has_input_scales


def _read_weights(weights: Fields, file_format: Any) -> Stored:
    # "weight" and "static" order the columns while quantising; the file has them in their own order again.
    weights.fixed("actorder", (None, "weight", "static", False))
    weights.fixed("dynamic", (False,))
    weights.fixed("symmetric", (True,))
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    stored = _read_strategy(weights, file_format)
    weights.ignore("group_size", "block_structure")  # of other strategies: null
    weights.finish()
    return stored


def _read_strategy(weights: Fields, file_format: Any) -> Stored:
    kind, bits, strategy = weights.value("type", "int"), weights.integer("num_bits"), weights.value("strategy")
    match file_format, kind, bits, strategy:
        case "pack-quantized", "int", 4, "group":
            return _int4_group(weights)
        case "float-quantized" | "naive-quantized", "float", 8, "block":
            return Stored("fp8_block", _fp8_block(weights, "block_structure"))
        case "float-quantized" | "naive-quantized", "float", 8, "channel" | "tensor":
            return Stored("fp8_channel", _WHOLE_ROWS[strategy])
        case "int-quantized" | "naive-quantized", "int", 8, "channel" | "tensor":
            return Stored("int8_channel", _WHOLE_ROWS[strategy])
    raise ConfigError(
        f"{weights.path('type')}={kind!r} with num_bits={bits!r} and strategy={strategy!r} in format {file_format!r} "
        "is not implemented (only 'pack-quantized': int, 4 bits, group; 'float-quantized': float, 8 bits, block, "
        "channel or tensor; 'int-quantized': int, 8 bits, channel or tensor)"
    )


def _int4_group(weights: Fields) -> Stored:
    weights.fixed("group_size", _INT4_GROUPS)
    codec = f"int4_group{weights.integer('group_size')}"
    return Stored(codec, FORMATS[codec].scale_blocks[0], weight_name="weight_packed", shape_name="weight_shape")


def _fp8_block(fields: Fields, name: str) -> ScaleBlock:
    fields.fixed(name, ([FP8_BLOCK, FP8_BLOCK], [1, FP8_BLOCK]))
    rows, cols = fields.value(name)
    return ScaleBlock(rows, cols)


_INT4_GROUPS = (32, 64, 128)
_WHOLE_ROWS = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}
_EVERY_LINEAR = Target(2, "")


def _targets(names: Iterable[str]) -> tuple[Target, ...]:
    return tuple(_target(name) for name in names)


def _target(name: str) -> Target:
    """`re:` begins a regular expression that must match from the start; `Linear` is the class of all our modules."""
    if name == "Linear":
        return _EVERY_LINEAR
    if not name.startswith("re:"):
        return Target(0, rf"{re.escape(name)}\Z")
    pattern = name.removeprefix("re:")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"quantization_config: {name!r} is not a regular expression: {error}") from None
    return Target(1, pattern)
