"""A pre-norm decoder over packed rows: norm, mixer, norm, feed, layer after layer.

One step is one flat [rows, hidden] tensor, whatever requests the rows belong to; only mixers know spans. A family's
layout says which mixer and which feed a layer has. How linears, attention and the pointwise parts are computed comes
from `Kernels`, so the default and the exact mode are the same model code.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layers import Layer, LayerWeights
from isthmus.execution.inference.models.layout import TensorLayout
from isthmus.execution.inference.models.step import Kernels, StepTensors
from isthmus.execution.inference.rope import rope_tables


class Decoder:
    """The model. Rows in, hidden states out; logits on demand for chosen rows."""

    def __init__(
        self,
        config: ModelConfig,
        layout: TensorLayout,
        weights: Mapping[str, torch.Tensor],
        kernels: Kernels,
        *,
        positions: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.kernels = kernels
        placed = {name: tensor.to(device) for name, tensor in weights.items()}
        self._embedding = placed["model.embed_tokens.weight"]
        self._final_norm = LayerWeights(placed, "model", kernels, layout.norm_offset).norm("norm")
        head = self._embedding if config.tied else placed["lm_head.weight"]
        self.head = kernels.linear.prepare(head, None)
        self.layers = [self._layer(index, layout, placed) for index in range(config.layers)]
        # After a layer's feed comes the norm of the next layer, after the last one's none.
        self._following = [*(layer.input_norm for layer in self.layers[1:]), None]
        cos, sin = rope_tables(config.rope, config.rotary_dim, positions)
        self.cos = cos.to(device, self._embedding.dtype)[:, None]
        self.sin = sin.to(device, self._embedding.dtype)[:, None]

    def _layer(self, index: int, layout: TensorLayout, tensors: Mapping[str, torch.Tensor]) -> Layer:
        weights = LayerWeights(tensors, f"model.layers.{index}", self.kernels, layout.norm_offset)
        return Layer(
            input_norm=weights.norm("input_layernorm"),
            mixer=layout.mixer(self.config, index, weights),
            feed_norm=weights.norm("post_attention_layernorm"),
            feed=layout.feed(self.config, index, weights),
        )

    def forward(self, step: StepTensors, memory: KvMemory) -> torch.Tensor:
        """Hidden states [rows, hidden] before the final norm; K and V of the real rows are in the memory after it."""
        eps, add_norm = self.config.norm_eps, self.kernels.pieces.add_norm
        hidden = functional.embedding(step.tokens, self._embedding)
        normed = self.kernels.norm(hidden, self.layers[0].input_norm, eps)
        for index, (layer, following) in enumerate(zip(self.layers, self._following, strict=True)):
            if step.arrivals:
                step.await_layer(index)
            normed = add_norm(hidden, layer.mixer(normed, step, memory), layer.feed_norm, eps)
            delta = layer.feed(normed)
            if following is None:
                hidden += delta
            else:
                normed = add_norm(hidden, delta, following, eps)
        return hidden

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm of chosen rows."""
        return self.kernels.norm(hidden, self._final_norm, self.config.norm_eps)
