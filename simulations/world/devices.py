"""Device classes: how fast a computer trains, what it holds, what it draws.

`flops` is what a training step gets out of the device (floating-point operations a second, forward and backward), not
its peak: a share of the peak that training reaches, the model FLOP utilisation. Within a class it is log-normal.
"""

from dataclasses import dataclass

# Bytes that training takes a parameter: float32 weights, gradients, error feedback, and two moments of AdamW.
TRAINING_BYTES_PER_PARAMETER = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """Medians of a class; `flops_spread` is the standard deviation of log(flops)."""

    flops: float
    flops_spread: float
    memory_bytes: float
    watts: float  # above idle, while training
    codec_bps: float  # bytes of float32 a second that it encodes, or decodes into a sum
    jitter: float  # standard deviation of log(speed) from lease to lease: what else the machine does


DEVICES = {
    # Phone CPUs and GPUs peak at 0.1 to 4 TFLOP/s in float32 (Qualcomm's and Apple's data sheets; Anderson 2020,
    # "BOINC: A Platform for Volunteer Computing", names 4 for the fastest); on-device training gets a few per cent of
    # that, and heat halves it within minutes (MLPerf Mobile, Reddi et al. 2022, section on sustained performance).
    "phone": DeviceClass(flops=2.5e10, flops_spread=0.6, memory_bytes=3e9, watts=4.0, codec_bps=1.5e8, jitter=0.20),
    # Four to eight AVX2 cores, 0.2 to 0.6 TFLOP/s in float32 (Intel's and AMD's data sheets), about a third of it in
    # PyTorch. BOINC's hosts average 16.5 CPU GFLOP/s by Whetstone, which is scalar code (Anderson 2020).
    "laptop": DeviceClass(flops=1.0e11, flops_spread=0.5, memory_bytes=8e9, watts=25.0, codec_bps=3e8, jitter=0.20),
    "desktop": DeviceClass(flops=2.0e11, flops_spread=0.5, memory_bytes=1.6e10, watts=65.0, codec_bps=4e8, jitter=0.12),
    # The commonest cards of Steam's hardware survey are of the xx60 class: 9 to 15 TFLOP/s in float32, twice that in
    # bfloat16 (TechPowerUp's GPU database); 35 % of 20.
    "gaming-gpu": DeviceClass(flops=7e12, flops_spread=0.6, memory_bytes=8e9, watts=170.0, codec_bps=6e8, jitter=0.10),
    # NVIDIA's A100: 312 TFLOP/s in bfloat16, 40 GB; 40 % of it (PaLM, Chowdhery et al. 2022, reports 46 %).
    "server-gpu": DeviceClass(
        flops=1.25e14, flops_spread=0.2, memory_bytes=4e10, watts=330.0, codec_bps=2e9, jitter=0.03
    ),
}
