"""The GPUs that a run is planned for: as a user names them, or those of this machine. Imports no torch."""

import re
import shutil
import subprocess
from dataclasses import dataclass

SPEC = re.compile(r"(?P<count>[1-9]\d*)x(?P<name>[A-Za-z][\w .-]*?)-(?P<gigabytes>\d+(\.\d+)?)GB?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """GPUs of one kind.

    Attributes:
        gigabytes: memory of each, 10^9 bytes.
    """

    count: int
    name: str
    gigabytes: float

    def __str__(self) -> str:
        return f"{self.count} x {self.name} with {self.gigabytes:g} GB"


def parse_gpus(text: str) -> Gpus:
    """Parses COUNTxNAME-MEMORY, such as 8xA100-80G.

    Raises:
        ValueError: the text has another form, or no memory.
    """
    match = SPEC.fullmatch(text)
    if match is None or float(match["gigabytes"]) == 0:
        raise ValueError(f"{text!r} names no GPUs: give COUNTxNAME-MEMORY, such as 8xA100-80G")
    return Gpus(count=int(match["count"]), name=match["name"], gigabytes=float(match["gigabytes"]))


def find_gpus() -> Gpus | None:
    """NVIDIA's GPUs of this machine, with the memory of the smallest; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        cards = [line.rpartition(",") for line in listed.splitlines() if line.strip()]
        gigabytes = min((float(mebibytes) * 2**20 / 1e9 for _, _, mebibytes in cards), default=0.0)
    except (OSError, ValueError, subprocess.SubprocessError):  # a driver that does not answer, or answers otherwise
        return None
    return Gpus(count=len(cards), name=cards[0][0], gigabytes=round(gigabytes, 1)) if gigabytes else None
