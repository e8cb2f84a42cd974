"""Peaks of devices, for the share of one that a training reaches."""

PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
}
"""Dense bf16 products in TFLOP/s, from the data sheets, by the name that torch reports."""
