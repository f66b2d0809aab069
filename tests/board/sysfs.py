"""The files by which a Jetson says what it is, as its kernel and Jetson Linux write them; from public dumps, none seen on a board."""

from __future__ import annotations

import re
from pathlib import Path

MODELS = {
    "agx-orin-64gb": ("NVIDIA Jetson AGX Orin Developer Kit", ("p3737-0000+p3701-0005", "p3701-0005"), "MAXN"),
    "agx-orin-32gb": ("NVIDIA Jetson AGX Orin Developer Kit", ("p3737-0000+p3701-0004", "p3701-0004"), "30W"),
    "orin-nx-16gb": ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", ("p3768-0000+p3767-0000", "p3767-0000"), "25W"),
    "orin-nx-8gb": ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", ("p3768-0000+p3767-0001", "p3767-0001"), "15W"),
    "orin-nano-8gb": ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", ("p3768-0000+p3767-0005-super", "p3767-0005"), "25W"),
    "orin-nano-4gb": ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit", ("p3768-0000+p3767-0004", "p3767-0004"), "10W"),
}
"""By target: the device tree's name, what it is compatible with, and a power mode."""

NANO_RAILS = {"1-0040": ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]}
AGX_RAILS = {"1-0040": ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"], "1-0041": ["NC", "VDDQ_VDD2_1V8AO", "NC"]}
RELEASES = {"6": ("36", "4.3"), "7.2": ("39", "2.0")}
MODES = ("MAXN", "7W", "10W", "15W", "25W", "30W")


def board(root: Path, target: str = "orin-nano-8gb", *, jetpack: str = "6", milliamps: int = 1000, fixed: bool = True) -> Path:
    """A whole board's tree; each rail at 5 V and this current."""
    model, compatible, mode = MODELS[target]
    write(root, "proc/device-tree/model", model + "\0")
    write(root, "proc/device-tree/compatible", "".join(f"nvidia,{name}\0" for name in (*compatible, "tegra234")))
    major, revision = RELEASES[jetpack]
    write(
        root,
        "etc/nv_tegra_release",
        f"# R{major} (release), REVISION: {revision}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n",
    )
    write(root, "etc/nvpmodel.conf", "".join(f"< POWER_MODEL ID={i} NAME={name} >\nCPU_ONLINE CORE_0 1\n" for i, name in enumerate(MODES)))
    write(root, "var/lib/nvpmodel/status", f"pmode:{MODES.index(mode):04d}")
    for core in (0, 4):
        policy = f"sys/devices/system/cpu/cpufreq/policy{core}"
        write(root, f"{policy}/affected_cpus", f"{core} {core + 1}\n")
        write(root, f"{policy}/scaling_max_freq", "1510400\n")
        write(root, f"{policy}/scaling_min_freq", "1510400\n" if fixed else "115200\n")
    # A cluster that the power mode has switched off: its folder stays, with old values.
    write(root, "sys/devices/system/cpu/cpufreq/policy8/affected_cpus", "\n")
    write(root, "sys/devices/system/cpu/cpufreq/policy8/scaling_max_freq", "2201600\n")
    write(root, "sys/devices/system/cpu/cpufreq/policy8/scaling_min_freq", "115200\n")
    write(root, "sys/class/devfreq/17000000.gpu/max_freq", "624750000\n")
    write(root, "sys/class/devfreq/17000000.gpu/min_freq", "624750000\n" if fixed else "306000000\n")
    for device, labels in (AGX_RAILS if target.startswith("agx") else NANO_RAILS).items():
        folder = f"sys/bus/i2c/drivers/ina3221/{device}/hwmon/hwmon{int(device[-2:]) - 39}"
        for channel, label in enumerate(labels, 1):
            write(root, f"{folder}/in{channel}_label", label + "\n")
            write(root, f"{folder}/in{channel}_input", "5000\n")
            write(root, f"{folder}/curr{channel}_input", f"{milliamps}\n")
        write(root, f"{folder}/in7_label", "sum of shunt voltages\n")
        write(root, f"{folder}/in7_input", "7\n")
    return root


def write(root: Path, path: str, text: str) -> None:
    """A file of the tree."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def currents(root: Path, label: str) -> Path:
    """The file with a rail's current, in mA."""
    (found,) = [path for path in root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/*/in*_label") if path.read_text().strip() == label]
    return found.with_name(re.sub(r"in(\d)_label", r"curr\1_input", found.name))
