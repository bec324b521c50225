"""What config.json says of the recurrent layers of a hybrid model. Defaults are those of transformers 5.23."""

from dataclasses import dataclass

from isthmus.execution.inference.config_fields import Fields

FULL, LINEAR = "full_attention", "linear_attention"
MAX_KERNEL = 17


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """Gated delta nets. `recurrent[layer]` says which layers are; the others have attention.

    `heads` are those of values and states; each of `key_heads` serves heads / key_heads of them in a row. `history` is
    how many earlier inputs the convolution looks at.
    """

    recurrent: tuple[bool, ...]
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    history: int

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries and keys of all key heads, then values."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


def delta_net(fields: Fields, layers: int) -> DeltaConfig:
    """The recurrent layers, by layer_types or full_attention_interval. Raises `ModelInvalid`."""
    kinds = fields.raw.get("layer_types")
    if not kinds:
        interval = fields.integer("full_attention_interval", 1024, default=4)
        kinds = [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (FULL, LINEAR) for kind in kinds):
        raise fields.refuse(f"layer_types is not served but as a list of {layers} of {FULL}, {LINEAR}")
    if FULL not in kinds or LINEAR not in kinds:
        raise fields.refuse(f"layer_types is not served without both {FULL} and {LINEAR}")
    for name in ("sliding_window", "use_sliding_window"):
        if fields.raw.get(name):
            raise fields.refuse(f"{name} is not served for this model_type")
    key_heads = fields.integer("linear_num_key_heads", 1024, default=16)
    heads = fields.integer("linear_num_value_heads", 1024, default=32)
    if heads % key_heads:
        raise fields.refuse(f"linear_num_value_heads {heads} is not a multiple of linear_num_key_heads {key_heads}")
    return DeltaConfig(
        recurrent=tuple(kind == LINEAR for kind in kinds),
        key_heads=key_heads,
        heads=heads,
        key_dim=fields.integer("linear_key_head_dim", 1024, default=128),
        value_dim=fields.integer("linear_value_head_dim", 1024, default=128),
        history=fields.integer("linear_conv_kernel_dim", MAX_KERNEL, default=4, low=2) - 1,
    )
