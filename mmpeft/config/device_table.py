"""Devices by name: their memory and speed, and where each figure comes from."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a plan needs to know of a device.

    Attributes:
        title: for people.
        memory: bytes.
        flops: of dense 16-bit matrix products with 32-bit sums, FLOP/s; None where it is to be measured.
        flops32: of float32 tensors with what training uses by default, FLOP/s.
        overhead: bytes that driver, kernels and libraries take beside tensors.
        source: of memory and speed.
    """

    title: str
    memory: int
    flops: float | None
    flops32: float | None
    overhead: int
    source: str


CONTEXT = 700 * 2**20
"""Bytes of a CUDA context with the kernels and workspaces of cuBLAS and cuDNN: assumed, 0.5 to 0.8 GiB are usual."""

DEVICES: dict[str, DeviceFacts] = {
    "ascend-910b": DeviceFacts(
        title="Ascend 910B 64 GB",
        memory=64 * GIB,
        flops=313e12,
        flops32=75e12,
        overhead=CONTEXT,
        source="as resellers list the slowest 910B: 64 GB HBM, 313 TFLOPS FP16; no data sheet was at hand",
    ),
    "a100-80": DeviceFacts(
        title="NVIDIA A100 80 GB",
        memory=80 * GIB,
        flops=312e12,
        flops32=19.5e12,
        overhead=CONTEXT,
        source="NVIDIA A100 datasheet: 80 GB HBM2e, 312 TFLOPS BF16 dense, 19.5 TFLOPS FP32",
    ),
    "h100-80": DeviceFacts(
        title="NVIDIA H100 SXM 80 GB",
        memory=80 * GIB,
        flops=989e12,
        flops32=67e12,
        overhead=CONTEXT,
        source="NVIDIA H100 datasheet: 80 GB HBM3, 989 TFLOPS BF16 dense (half of that with sparsity), 67 TFLOPS FP32",
    ),
    "rtx-4090": DeviceFacts(
        title="NVIDIA GeForce RTX 4090",
        memory=24 * GIB,
        flops=165e12,
        flops32=82.6e12,
        overhead=CONTEXT,
        source="NVIDIA Ada GPU architecture paper: 24 GB GDDR6X, 165.2 TFLOPS BF16 with FP32 sums dense, 82.6 FP32",
    ),
}

THIS = "this"
"""The name of the device that a run would take here."""
