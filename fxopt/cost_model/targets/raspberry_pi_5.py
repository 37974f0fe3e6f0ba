"""Raspberry Pi 5: BCM2712, four Arm Cortex-A76 at 2.4 GHz, LPDDR4X-4267 on 32 bits."""

import dataclasses

from fxopt.cost_model.targets.cortex_a76 import TARGET as CORTEX_A76

TARGET = dataclasses.replace(
    CORTEX_A76,
    name="raspberry-pi-5",
    source=(
        "cores, clock, caches and memory of the BCM2712 as Raspberry Pi Ltd. states them, peak of the Cortex-A76 "
        "(Arm Cortex-A76 Software Optimization Guide); bandwidths (17 GB/s in theory) and factors are assumptions"
    ),
    bandwidth=9e9,
    cache_bytes=2 * 2**20,
    cores=4,
)
