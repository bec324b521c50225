"""Dense linears: oneDNN with prepacked weights on a CPU (measured about twice F.linear's speed), F.linear elsewhere.

The choice is made once, by device and dtype, when the runner is built.
"""

import platform

import torch
from torch.nn import functional

from isthmus.execution.inference.linear.base import Linear, LinearBackend

PACK_ROWS = 32
"""The number of rows that the packed layout is made for; any number works."""
_X86 = ("x86_64", "amd64")


class TorchLinear:
    """F.linear on the weight as it is."""

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """See `LinearBackend`."""
        return lambda rows: functional.linear(rows, weight, bias)

    def prepare_swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> Linear | None:
        """See `LinearBackend`."""
        del gate, up
        return None


class PackedLinear:
    """oneDNN with the weight reordered once into its blocked layout. CPU, float32 and bfloat16."""

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """See `LinearBackend`."""
        # Internal operators: what torch.compile lowers linears to. The exact pin of torch keeps their signatures.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)  # noqa: SLF001
        multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001

        def linear(rows: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = multiply(rows, packed, bias, "none", [], "")
            return result

        return linear

    def prepare_swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> Linear | None:
        """See `LinearBackend`. The activation and the product are applied as each tile of the result is written."""
        gate, up = (torch.ops.mkldnn._reorder_linear_weight(one.contiguous(), PACK_ROWS) for one in (gate, up))  # noqa: SLF001
        activate = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
        multiply = torch.ops.mkldnn._linear_pointwise.binary  # noqa: SLF001

        def swiglu(rows: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = multiply(rows, activate(rows, gate, None, "swish", [], ""), up, None, "mul")
            return result

        return swiglu


def computes_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 at speed: AVX-512's or AMX's BF16 instructions, or Arm's BF16 extension.

    With AVX-512 alone oneDNN takes bfloat16 too, but converts it: products took 2.8 to 4.7 times as long as in float32.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if platform.machine().lower() in _X86:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def dense_linear(device: torch.device, dtype: torch.dtype) -> LinearBackend:
    """The faster of the two where it exists."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return TorchLinear()
    return PackedLinear() if dtype is torch.float32 or (dtype is torch.bfloat16 and computes_bf16()) else TorchLinear()
