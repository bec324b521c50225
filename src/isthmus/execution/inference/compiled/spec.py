"""What is compiled for a model, and the name under which it is kept.

Promise: two servers have the same key if and only if one can use what the other built: the same shapes and dtypes, the
same torch, and a processor with the same instructions (the code is made for the machine that it is built on).
"""

import platform
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from blake3 import blake3

from isthmus.contracts.framing import frame
from isthmus.execution.inference.models.decoder import Decoder
from isthmus.execution.inference.models.self_attention import SelfAttention

PIECES_VERSION = 1
"""To be raised with every change to what is compiled (pieces.py) or how (build.py)."""
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PieceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The constants of the compiled pieces. Dtypes are keys of `DTYPES`.

    `hidden`: width of the hidden rows; `columns`: of an attention layer's projection; `rotary_dim`: dimensions of a
    head that are rotated; `norm_dtype`: of the weights of the layers' norms; `head_norm`: of the norms by head, empty
    for none.
    """

    dtype: str
    hidden: int
    norm_dtype: str
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    columns: int
    head_norm: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the code is made for: torch's version, its choice of kernels, the processor and its instructions."""

    torch: str
    capability: str
    architecture: str
    flags: str


def describe(decoder: Decoder) -> PieceSpec | None:
    """What is to be compiled for a model; None for one whose layers differ in it or whose dtype is not compiled."""
    config = decoder.config
    found: set[PieceSpec] = set()
    norms = {norm.dtype for layer in decoder.layers for norm in (layer.input_norm, layer.feed_norm)}
    for layer in decoder.layers:
        if not isinstance(layer.mixer, SelfAttention):
            continue
        heads = layer.mixer.heads
        head_norms = set() if heads.norms is None else {norm.dtype for norm in heads.norms}
        dtypes = {decoder.cos.dtype} | norms | head_norms
        if len(norms) != 1 or len(head_norms) > 1 or heads.eps != config.norm_eps or not dtypes <= _NAMES.keys():
            return None
        found.add(
            PieceSpec(
                dtype=_NAMES[decoder.cos.dtype],
                hidden=config.hidden_size,
                norm_dtype=_NAMES[norms.copy().pop()],
                eps=config.norm_eps,
                heads=heads.query,
                kv_heads=heads.key,
                head_dim=heads.dim,
                rotary_dim=decoder.cos.shape[-1],
                columns=(heads.query * (2 if layer.mixer.gated else 1) + 2 * heads.key) * heads.dim,
                head_norm=_NAMES[head_norms.pop()] if head_norms else "",
            )
        )
    return found.pop() if len(found) == 1 else None


def this_machine(root: Path = Path("/")) -> Machine:
    """The machine that this runs on. `root` is where the kernel's files are."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # `flags` on x86, `Features` on Arm; every core has its line, the first one's counts.
    flags = [line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in ("flags", "Features")]
    capability = torch.backends.cpu.get_cpu_capability()
    return Machine(
        str(torch.__version__), capability, platform.machine(), " ".join(sorted(" ".join(flags[:1]).split()))
    )


def cache_key(spec: PieceSpec, machine: Machine) -> str:
    """The name of a cache entry: 64 hexadecimal digits."""
    parts = (machine.torch, machine.capability, machine.architecture, machine.flags)
    hashed = blake3(frame(b"isthmus/compiled", PIECES_VERSION.to_bytes(4, "little"), msgspec.json.encode(spec)))
    hashed.update(frame(*(part.encode() for part in parts)))
    return hashed.hexdigest()
