"""`t5x-lite doctor`: is this machine ready?"""

import argparse
import json
import os
import platform
import shutil
from importlib import metadata
from typing import Any

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
    "tensorflow-datasets",
    "pydantic",
    "pyyaml",
    "rich",
    "tokenizers",
    "tensorboardX",
    "pyarrow",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what is there; exit status 1 if something that is needed is not."""
    report, problems = examine()
    if args.json:
        print(json.dumps({**report, "problems": problems}))
    else:
        for title, values in report.items():
            print(title)
            for name, value in values.items():
                print(f"  {name:<22} {value}")
        print("\n".join(f"problem: {problem}" for problem in problems) or "everything is there")
    return 1 if problems else 0


def examine() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns versions, devices and memory by section, and a list of what is wrong."""
    from t5x_lite import __version__

    problems = []
    versions: dict[str, Any] = {"t5x_lite": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
            problems.append(f"package {name} is not installed: pip install {name}")
    report: dict[str, dict[str, Any]] = {"versions": versions, "memory": _memory()}
    try:
        import jax

        devices = jax.devices()
        report["devices"] = {"backend": jax.default_backend(), "processes": jax.process_count()}
        for device in devices:
            stats = device.memory_stats() or {}
            limit = f", {stats['bytes_limit'] / 1e9:.1f} GB" if "bytes_limit" in stats else ""
            report["devices"][f"device {device.id}"] = f"{device.device_kind}{limit}"
    except Exception as error:
        problems.append(f"JAX finds no device: {' '.join(str(error).split())}")
    forced = os.environ.get("JAX_PLATFORMS") == "cpu"
    if not forced and shutil.which("nvidia-smi") and report.get("devices", {}).get("backend") == "cpu":
        problems.append("there is an NVIDIA driver, but JAX runs on the CPU: pip install 'jax[cuda13]'")
    return report, problems


def _memory() -> dict[str, str]:
    memory = {"cpu cores": str(os.cpu_count())}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory["host"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    memory["disk free here"] = f"{shutil.disk_usage('.').free / 1e9:.1f} GB"
    return memory
