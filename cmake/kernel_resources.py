"""What ptxas says about every kernel: registers, spills, stack and static shared memory.

`compile COMMAND...` is nvcc's launcher: it adds -Xptxas -v and keeps ptxas's notes beside the object, as
<object>.ptxas; everything else that nvcc says goes through.
`collect OUTPUT LOGS...` gathers those notes, after linking, in one JSON file beside the library: kernel -> arch ->
resources. No tool beyond nvcc itself is needed, and nothing is compiled twice.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def compile_object(command: list[str]) -> int:
    """Runs nvcc; its notes about kernels go to a file, the rest to standard error."""
    done = subprocess.run([*command, "-Xptxas", "-v"], stderr=subprocess.PIPE, text=True)
    notes, rest = [], []
    for line in done.stderr.splitlines():
        (notes if line.startswith("ptxas info") or FRAME.search(line) else rest).append(line)
    if rest:
        print("\n".join(rest), file=sys.stderr)
    if done.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("\n".join(notes) + "\n")
    return done.returncode


def parse(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(mangled kernel, arch) -> its resources, out of what `ptxas -v` prints."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for block in re.split(r"(?=ptxas info +: Compiling entry function)", text):
        entry, frame, used = ENTRY.search(block), FRAME.search(block), USED.search(block)
        if not entry or not frame or not used:
            continue
        shared = SHARED.search(block)
        found[entry[1], entry[2]] = {
            "registers": int(used[1]),
            "spill_stores": int(frame[2]),
            "spill_loads": int(frame[3]),
            "stack": int(frame[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def short_names(mangled: list[str]) -> list[str]:
    """`select_kernel<float, 2>` for its mangled name; the name itself where c++filt is missing."""
    if shutil.which("c++filt") is None:
        return mangled
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for line in done.stdout.splitlines():
        name = line.removeprefix("void ").replace("(anonymous namespace)::", "").replace("lightvlm::", "")
        depth = 0
        for at, letter in enumerate(name):  # the parameters begin at the first bracket outside < >
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                name = name[:at]
                break
        names.append(re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name))
    return names


def collect(output: Path, logs: list[Path]) -> None:
    """One JSON file out of the notes of all objects."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for log in logs:
        found |= parse(log.read_text())
    names = short_names([kernel for kernel, _ in found])
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for name, ((_, arch), resources) in zip(names, found.items(), strict=True):
        before = kernels.setdefault(name, {}).get(arch, resources)  # two of one short name: the larger
        kernels[name][arch] = {what: max(before[what], value) for what, value in resources.items()}
    output.write_text(json.dumps(kernels, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["compile"]:
        return compile_object(arguments[1:])
    if arguments[:1] == ["collect"] and len(arguments) >= 2:
        collect(Path(arguments[1]), [Path(log) for log in arguments[2:]])
        return 0
    print("usage: kernel_resources.py compile COMMAND... | collect OUTPUT LOGS...", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
