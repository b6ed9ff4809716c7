"""What a GPU can do: the kernels that run on it, its multiprocessors, and the peak rate of its data sheet."""

import torch

AMPERE, HOPPER = (8, 0), (9, 0)  # compute capability that the kernels of rows, and those of tiles, need

# Dense bfloat16 operations a second with float32 sums, by the name that CUDA gives. Where a data sheet tells only the
# rate with sparsity, half of that. Not only the chip decides: H100 has three rates.
PEAK_RATES = {
    "NVIDIA A100-SXM4-40GB": 312e12,  # A100 data sheet, 2022: 312, as the next three
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,  # Ada architecture white paper, appendix A: 165.2 with float32 sums
    "NVIDIA L40S": 362.05e12,  # L40S data sheet: 362.05
    "NVIDIA H100 PCIe": 756e12,  # H100 architecture white paper, table 2: 756
    "NVIDIA H100 NVL": 835.5e12,  # H100 data sheet: 1,671 with sparsity
    "NVIDIA H100 80GB HBM3": 989.4e12,  # H100 architecture white paper, table 2: 989.4 (SXM5)
    "NVIDIA H200": 989.4e12,  # H200 data sheet: 1,979 with sparsity (SXM)
    "NVIDIA GH200 480GB": 989.4e12,  # GH200 data sheet: 1,979 with sparsity
    "NVIDIA B200": 2250e12,  # HGX B200 data sheet: 36,000 with sparsity for eight
}


def peak_rate(device: torch.device) -> float | None:
    """Return the peak rate of a device, or None where it is not known: a guess would be read as a figure."""
    return PEAK_RATES.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, (0, 0) for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def multiprocessors_of(device: torch.device) -> int:
    """Return the number of multiprocessors; the interpreter has few programs, so that each visits several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
