"""What `--help` teaches: which commands belong together, and examples of each."""

from __future__ import annotations

PANELS = {
    "On the machine that builds": ("transform", "train", "calibrate", "compile", "export"),
    "To see what it does": ("inspect", "bench", "measure"),
    "On the device": ("run", "adapt", "doctor", "targets"),
    "More": ("board", "state"),
}
"""The commands by what they are for, in the order in which they are used."""

FIRST_STEPS = (
    "From a trained model to answers:",
    "$ exitify transform torchvision:resnet18 --weights resnet18.safetensors -o net.exitify",
    "$ exitify train net.exitify --data train/",
    "$ exitify calibrate net.exitify --data held_out/ --max-drop 0.005",
    "$ exitify run net.exitify picture.jpg",
    "`exitify COMMAND --help` has examples of each.",
)

EXAMPLES: dict[str, tuple[str, ...]] = {
    "transform": (
        "exitify transform torchvision:resnet18 --weights resnet18.safetensors -o net.exitify",
        "exitify transform model.pt2 --trust --exits layer2.0:conv,layer3.0:own --why -o net.exitify",
        "exitify transform torchvision:resnet18 --weights resnet18.safetensors --data train/ --held-out unseen/ -o net.exitify",
    ),
    "train": (
        "exitify train net.exitify --data train/",
        "exitify train net.exitify --data train/ --method jei",
        "exitify train net.exitify --data train/ --model model.pt2 --trust --method joint",
    ),
    "calibrate": (
        "exitify calibrate net.exitify --data held_out/ --max-drop 0.005",
        "exitify calibrate net.exitify --data held_out/ --risk 0.02@0.95 --profile careful",
        "exitify calibrate net.exitify --data held_out/ --budget-ms 12",
    ),
    "compile": (
        "exitify compile net.exitify --target host",
        "exitify compile net.exitify --target orin-nano-8gb --precision fp16",
        "exitify compile net.exitify --target orin-nano-8gb --trials 500 --rpc HOST:9190/orin-nano",
    ),
    "export": (
        "exitify export net.exitify -o whole.onnx",
        "exitify export net.exitify --exit 1 -o small.onnx",
    ),
    "inspect": (
        "exitify inspect net.exitify",
        "exitify inspect net.exitify --html report.html --data unseen/",
        "exitify inspect net.exitify --plots figures/",
    ),
    "bench": (
        "exitify bench net.exitify --data unseen/",
        "exitify bench net.exitify --data unseen/ --against onnxruntime,torch,inductor --model torchvision:resnet18",
        "exitify bench net.exitify --data unseen/ --smaller small.onnx --markdown table.md",
    ),
    "measure": ("exitify measure net.exitify --engine tvm",),
    "run": (
        "exitify run net.exitify picture.jpg",
        "exitify run net.exitify frames.npy --stream --hold 0.95",
        "exitify run net.exitify picture.jpg --engine tvm --json",
    ),
    "adapt": ("exitify adapt net.exitify --stream camera/ --state device.state",),
    "doctor": ("exitify doctor net.exitify",),
    "targets": ("exitify targets --json",),
    "board serve": ("exitify board serve HOST:9190/orin-nano",),
    "board tracker": ("exitify board tracker",),
    "board sidecar": ("exitify board sidecar --source apache-tvm-src-v0.27.0.tar.gz",),
    "state log": ("exitify state log net.exitify device.state",),
    "state diff": ("exitify state diff net.exitify device.state",),
    "state reset": ("exitify state reset net.exitify device.state --to 2",),
    "state merge": ("exitify state merge net.exitify a.state b.state -o fleet.state",),
}
"""By command: what users most often want of it."""


def panel_of(command: str) -> str:
    """The heading under which a command stands in the list of all."""
    return next(panel for panel, commands in PANELS.items() if command in commands)


def epilog(command: str) -> str:
    """A command's examples, as they stand below its options."""
    return "\n\n".join(("Examples:", *(f"$ {example}" for example in EXAMPLES[command])))
