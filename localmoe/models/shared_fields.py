"""Fields of config.json that mean the same in every family. Everything here raises ConfigError naming the field."""

from __future__ import annotations

from localmoe.config import Reader

_MAX_DIM = 1 << 24
_ROPE_FIELDS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "truncate",
}


def size(reader: Reader, name: str, high: int = _MAX_DIM) -> int:
    """A dimension: at least 1, and no more than anything that could be allocated."""
    return reader.required(name, int, low=1, high=high)


def eos_token_ids(reader: Reader, vocab_size: int) -> tuple[int, ...]:
    """One id or a list of them; transformers allows both."""
    if not isinstance(reader.value("eos_token_id"), list):
        return (reader.required("eos_token_id", int, low=0, high=vocab_size - 1),)
    ids = reader.items("eos_token_id", int, low=0, high=vocab_size - 1)
    if not ids:
        raise reader.error("eos_token_id", "is an empty list, expected at least one token id")
    return tuple(ids)


def check_quantization(reader: Reader) -> None:
    """Refuse what the loader could not read; what a tensor is packed in is told by its own dtype and shape."""
    if not reader.has("quantization_config"):
        return
    quantization = reader.section("quantization_config")
    quantization.must_be("quant_method", "fp8", "compressed-tensors", "bitsandbytes", "localmoe")
    quantization.must_be("fmt", "e4m3", default="e4m3")
    if quantization.has("weight_block_size") and quantization.items("weight_block_size", int) != [128, 128]:
        raise quantization.error("weight_block_size", "is not [128, 128], the only block size localmoe implements")


def refuse_unknown_rope(section: Reader, *more: str, note: str = "") -> None:
    """Refuse a field of a rotation that is not one of those all families have, or of `more`."""
    known = _ROPE_FIELDS.union(more)
    unknown = next((key for key in section.names() if key not in known and section.has(key)), None)
    if unknown is not None:
        raise section.error(unknown, f"is not a field localmoe implements{note}")


def is_yarn(section: Reader) -> bool:
    """Whether a rotation is scaled by YaRN; False for none, and anything else is refused."""
    kind = section.optional("rope_type", str, section.optional("type", str, "default"))
    if kind == "default":
        return False
    for name in ("type", "rope_type"):
        section.must_be(name, "yarn", default="yarn")
    section.must_be("truncate", True, default=True)
    return True
