"""DeepSeek-V4: the config fields that exist in two spellings: which layers are compressed, which hash, how they rotate.

Published files say `compress_ratios`, `num_hash_layers`, `qk_rope_head_dim`, `rope_scaling`; transformers says
`layer_types` with `compress_rates`, `mlp_layer_types`, `partial_rotary_factor`, `rope_parameters`. Either will do;
when both are there they must agree. Everything here raises ConfigError naming the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from localmoe.config import Reader
from localmoe.files import shown
from localmoe.models.shared_fields import is_yarn, refuse_unknown_rope

LayerKind = Literal["sliding", "csa", "hca"]

_LAYER_TYPES: dict[str, LayerKind] = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}


@dataclass(frozen=True)
class YarnConfig:
    """YaRN frequency scaling of the compressed layers. original_max_position in tokens."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float


def read_rates(reader: Reader) -> tuple[int, int]:
    """Tokens per compressed entry of CSA and HCA layers; the published form implies 4 and 128."""
    if not reader.has("compress_rates"):
        return 4, 128
    rates = reader.section("compress_rates")
    csa = rates.required("compressed_sparse_attention", int, low=1)
    hca = rates.required("heavily_compressed_attention", int, low=1)
    if csa == hca:
        raise reader.error("compress_rates", f"gives CSA and HCA the same rate {csa}; expected two different rates")
    return csa, hca


def read_compress_ratios(reader: Reader, num_layers: int, csa: int, hca: int) -> tuple[int, ...]:
    """Tokens per compressed entry of each layer, 0 for a sliding one. Length num_layers."""
    if not reader.has("layer_types") and not reader.has("compress_ratios"):
        raise reader.error("compress_ratios", "is missing, expected it or layer_types to say what each layer attends")
    published = _published_ratios(reader, num_layers, (0, csa, hca)) if reader.has("compress_ratios") else None
    if not reader.has("layer_types"):
        assert published is not None, "one of the two fields was found above"
        return published
    types = reader.items("layer_types", str)
    if len(types) != num_layers:
        raise reader.error("layer_types", f"has {len(types)} entries, expected num_hidden_layers = {num_layers}")
    unknown = next((kind for kind in types if kind not in _LAYER_TYPES), None)
    if unknown is not None:
        allowed = ", ".join(_LAYER_TYPES)
        raise reader.error("layer_types", f"contains {shown(unknown, 60)}, localmoe implements only {allowed}")
    ratio_of = {"sliding": 0, "csa": csa, "hca": hca}
    ratios = tuple(ratio_of[_LAYER_TYPES[kind]] for kind in types)
    if published is not None and published != ratios:
        layer = next(i for i in range(num_layers) if published[i] != ratios[i])
        reader.agree(f"compress_ratios[{layer}]", published[layer], "layer_types with compress_rates", ratios[layer])
    return ratios


def _published_ratios(reader: Reader, num_layers: int, known: tuple[int, int, int]) -> tuple[int, ...]:
    """The first num_layers entries; the rest belong to MTP or DSpark stages, which are sliding."""
    ratios = reader.items("compress_ratios", int)
    stages = reader.optional("num_nextn_predict_layers", int, 0, low=0)
    if reader.has("dspark_target_layer_ids"):
        # V4-Flash-0731 has three stages although num_nextn_predict_layers still says 1.
        stages = max(stages, len(reader.items("dspark_target_layer_ids", int)))
    if not num_layers <= len(ratios) <= num_layers + stages or any(ratios[num_layers:]):
        raise reader.error(
            "compress_ratios",
            f"has {len(ratios)} entries, expected num_hidden_layers = {num_layers} and then a 0 for each MTP stage "
            f"(at most {stages})",
        )
    unknown = next((ratio for ratio in ratios if ratio not in known), None)
    if unknown is not None:
        raise reader.error("compress_ratios", f"contains {unknown}, expected only {_list(known)} (see compress_rates)")
    return tuple(ratios[:num_layers])


def read_num_hash_layers(reader: Reader, num_layers: int) -> int:
    """How many layers, the first ones, route by token id."""
    if not reader.has("mlp_layer_types"):
        return reader.required("num_hash_layers", int, low=0, high=num_layers)
    types = reader.items("mlp_layer_types", str)
    count = sum(kind == "hash_moe" for kind in types)
    if types != ["hash_moe"] * count + ["moe"] * (num_layers - count):
        raise reader.error(
            "mlp_layer_types", f"is not some hash_moe then moe, {num_layers} in all, the only plan localmoe implements"
        )
    if reader.has("num_hash_layers"):
        reader.agree("num_hash_layers", reader.required("num_hash_layers", int), "mlp_layer_types", count)
    return count


def read_rope_head_dim(reader: Reader) -> int:
    """Rotated dimensions of a head, from qk_rope_head_dim or partial_rotary_factor * head_dim."""
    if not reader.has("partial_rotary_factor"):
        dim = reader.required("qk_rope_head_dim", int, low=2)
    else:
        factor = reader.required("partial_rotary_factor", float, low=0, high=1)
        dim = round(reader.required("head_dim", int, low=1) * factor)
        if reader.has("qk_rope_head_dim"):
            reader.agree("qk_rope_head_dim", reader.required("qk_rope_head_dim", int), "partial_rotary_factor", dim)
    if dim < 2 or dim % 2:
        raise reader.error("qk_rope_head_dim", f"is {dim}, expected an even number of at least 2")
    return dim


def read_rope(reader: Reader) -> tuple[float, float, YarnConfig | None]:
    """Base frequency of sliding layers, base of compressed layers, and the YaRN scaling of the latter (None = none)."""
    theta = reader.required("rope_theta", float, low=1.001)
    compress_theta = reader.required("compress_rope_theta", float, low=1.001)
    found = [name for name in ("rope_scaling", "rope_parameters") if name in reader.names()]
    if not found:
        # Without this check a converter that lost the field would give fluent text that decays with length.
        raise reader.error("rope_scaling", "is missing, expected it or rope_parameters (null if there is no scaling)")
    scalings = [_scaling(reader, name, theta, compress_theta) for name in found]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise reader.error("rope_scaling", "and rope_parameters describe different scalings; expected them to agree")
    return theta, compress_theta, scalings[0]


def _scaling(reader: Reader, name: str, theta: float, compress_theta: float) -> YarnConfig | None:
    if not reader.has(name):
        return None
    share = read_rope_head_dim(reader) / reader.required("head_dim", int, low=1)
    section = reader.section(name)
    if not section.has("main") and not section.has("compress"):
        return _yarn(section, theta, share)
    main, compress = section.section("main"), section.section("compress")
    main.must_be("rope_type", "default")
    main.agree("rope_theta", main.required("rope_theta", float), "the top-level rope_theta", theta)
    return _yarn(compress, compress_theta, share)


def _yarn(section: Reader, theta: float, share: float) -> YarnConfig | None:
    refuse_unknown_rope(section, note=" for V4 (it uses no mscale)")
    if section.has("partial_rotary_factor"):
        section.agree(
            "partial_rotary_factor", section.required("partial_rotary_factor", float), "the rotated share", share
        )
    if section.has("rope_theta"):
        section.agree("rope_theta", section.required("rope_theta", float), "the top-level field", theta)
    if not is_yarn(section):
        return None
    section.must_be("attention_factor", 1, default=1)
    return YarnConfig(
        factor=section.required("factor", float, low=1),
        original_max_position=section.required("original_max_position_embeddings", int, low=1),
        beta_fast=section.required("beta_fast", float, low=1e-3, high=1e6),
        beta_slow=section.required("beta_slow", float, low=1e-3, high=1e6),
    )


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
