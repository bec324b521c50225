"""What the families of models read from config.json in their own ways: defaults, biases, windows and experts.

Defaults and meaning are those of the configuration classes of transformers 5.23. What a family does not read but
another implementation might (a sliding window for Llama, biases for Mistral) is refused by name where it is set.
"""

from dataclasses import dataclass
from typing import Literal

from isthmus.execution.inference.config_fields import Fields, shown

MAX_EXPERTS = 1024
MAX_ALL_EXPERTS = 1 << 16
"""Experts of all layers together: a bound on the tables that a config.json alone can ask for."""
MAX_LAYERS = 1024
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Sparse experts. `sparse[layer]` says which layers have them; `normalise`: a row's weights sum to 1.

    `shared_intermediate_size` is that of the expert that every row meets, 0 where there is none.
    """

    experts: int
    per_token: int
    intermediate_size: int
    normalise: bool
    sparse: tuple[bool, ...]
    shared_intermediate_size: int = 0


@dataclass(frozen=True, slots=True)
class MoeDefaults:
    """What a family with experts assumes where config.json is silent. `shared` 0: it has no shared expert."""

    experts: int
    per_token: int
    intermediate_size: int
    normalise: bool
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Family:
    """The traits of a model_type.

    `head_dim` and `kv_heads` are defaults, 0 for hidden_size / heads and for as many as heads. `attention_bias`: by
    the entry of that name, or always or never. `windows`: no layer slides, every one does, or those from
    max_window_layers on (and what layer_types says). `window_switch`: only with use_sliding_window. `rotary` is the
    default of partial_rotary_factor, None where only 1 is served. `recurrent`: a hybrid (config_hybrid.py).
    """

    positions: int
    head_dim: int = 0
    kv_heads: int = 0
    attention_bias: Literal["entry", "always", "never"] = "entry"
    mlp_bias: bool = False
    windows: Literal["none", "every", "upper"] = "none"
    window_switch: bool = True
    moe: MoeDefaults | None = None
    rotary: float | None = None
    recurrent: bool = False


FAMILIES = {
    "llama": Family(positions=2048, mlp_bias=True),
    "mistral": Family(positions=131_072, kv_heads=8, attention_bias="never", windows="every", window_switch=False),
    "qwen2": Family(positions=32_768, kv_heads=32, attention_bias="always", windows="upper"),
    "qwen3": Family(positions=32_768, head_dim=128, kv_heads=32, windows="upper"),
    "qwen3_moe": Family(positions=32_768, kv_heads=4, windows="every", moe=MoeDefaults(128, 8, 768, normalise=False)),
    "qwen3_next": Family(
        positions=32_768,
        head_dim=256,
        kv_heads=2,
        moe=MoeDefaults(512, 10, 512, normalise=True, shared=512),
        rotary=0.25,
        recurrent=True,
    ),
}


def attention_bias(fields: Fields, family: Family) -> bool:
    """Whether q, k and v have biases. Raises `ModelInvalid`."""
    given = fields.flag("attention_bias", False)
    if given and family.attention_bias == "never":
        raise fields.refuse("attention_bias true is not served for this model_type")
    return given if family.attention_bias == "entry" else family.attention_bias == "always"


def mlp_bias(fields: Fields, family: Family) -> bool:
    """Whether the MLP has biases. Raises `ModelInvalid`."""
    given = fields.flag("mlp_bias", False)
    if given and not family.mlp_bias:
        raise fields.refuse("mlp_bias true is not served for this model_type")
    return given


def windows(fields: Fields, family: Family, layers: int, positions: int) -> tuple[int, ...]:
    """Each layer's sliding window: a query at p sees keys in (p - window, p]; 0 for all of them.

    A window that no position reaches counts as none. Raises `ModelInvalid`.
    """
    window = _window(fields, family)
    kinds = [SLIDING if window and family.windows == "every" else FULL] * layers
    if window and family.windows == "upper":
        first = fields.integer("max_window_layers", 1 << 20, default=28, low=0)
        kinds = [SLIDING if layer >= first else FULL for layer in range(layers)]
    given = fields.raw.get("layer_types")
    if given:
        if not isinstance(given, list) or len(given) != layers or any(kind not in (FULL, SLIDING) for kind in given):
            raise fields.refuse(f"layer_types is not served but as a list of {layers} of {FULL}, {SLIDING}")
        if SLIDING in given and not window:
            raise fields.refuse(f"layer_types has {SLIDING}, but this model has no window")
        if family.windows != "upper" and given != kinds:
            raise fields.refuse(f"layer_types is not served for this model_type but with {kinds[0]} alone")
        kinds = given
    reached = window < positions
    return tuple(window if kind == SLIDING and reached else 0 for kind in kinds)


def _window(fields: Fields, family: Family) -> int:
    """The window of the layers that slide, 0 for none."""
    switched = fields.flag("use_sliding_window", False)
    if family.windows == "none":
        if switched:
            raise fields.refuse("use_sliding_window true is not served for this model_type")
        if fields.raw.get("sliding_window") is not None and "use_sliding_window" not in fields.raw:
            raise fields.refuse("sliding_window is not served for this model_type")
        return 0
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return 0
    window = fields.integer("sliding_window", 1 << 24, default=4096)
    return window if switched or not family.window_switch else 0


def experts(fields: Fields, family: Family, layers: int) -> MoeConfig | None:
    """The experts of a family that has them. Raises `ModelInvalid`."""
    base = family.moe
    if base is None:
        return None
    # Published folders say num_experts; transformers 5 writes num_local_experts for some families.
    name = "num_experts" if fields.raw.get("num_experts") is not None else "num_local_experts"
    count = fields.integer(name, MAX_EXPERTS, default=base.experts)
    if fields.raw.get("num_local_experts") not in (None, count):
        raise fields.refuse(f"num_experts is {count}, num_local_experts another number")
    if count * layers > MAX_ALL_EXPERTS:
        raise fields.refuse(f"{name} {count} in {layers} layers are over {MAX_ALL_EXPERTS} experts")
    per_token = fields.integer("num_experts_per_tok", count, default=min(base.per_token, count))
    every = fields.integer("decoder_sparse_step", MAX_LAYERS, default=1)
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int or not 0 <= layer < layers for layer in dense):
        raise fields.refuse(f"mlp_only_layers is {shown(dense)}, accepted: a list of layers from 0 to {layers - 1}")
    shared = 0
    if base.shared:
        shared = fields.integer("shared_expert_intermediate_size", 1 << 20, default=base.shared)
    elif fields.raw.get("shared_expert_intermediate_size"):
        raise fields.refuse("shared_expert_intermediate_size is not served for this model_type")
    return MoeConfig(
        experts=count,
        per_token=per_token,
        intermediate_size=fields.integer("moe_intermediate_size", 1 << 20, default=base.intermediate_size),
        normalise=fields.flag("norm_topk_prob", base.normalise),
        sparse=tuple((layer + 1) % every == 0 and layer not in dense for layer in range(layers)),
        shared_intermediate_size=shared,
    )
