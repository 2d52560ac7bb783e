"""How long loading a checkpoint takes, and how much memory: one JSON line for each case.

    python benchmarks/load.py                       # random weights in the shape of mamba-130m
    python benchmarks/load.py --d-model 256 --n-layer 4

Each case is a new process. The files have just been written, so they come from the page cache.
seconds: `from_pretrained` alone, and with every weight read once (memory-mapped files are read
only then). From before `from_pretrained` until every weight has been read, over the size of the
weight files, of /proc/self/status: peak_over_file is the growth of private memory (RssAnon, looked
at every millisecond), which must fit into the machine; with_pages_over_file that of the highest
resident set (VmHWM), which counts the pages of mapped files as well: the system takes these back
when it needs memory. Linux only.

Four more cases are those of a Hub that refuses connections and of one that accepts them and
never answers: seconds until the model is there from the cache, or until its absence is said.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mamba import Mamba, MambaConfig

LAYOUTS = ("pytorch_model.bin", "model.safetensors", "three shards")
DTYPES = ("float32", "bfloat16")


def memory(name: str) -> int:
    """An entry of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def write(folder: Path, layout: str, d_model: int, n_layer: int) -> None:
    """A random model as the layout has it: the .bin names the tied matrix twice."""
    from safetensors.torch import save_file

    model = Mamba(MambaConfig(d_model=d_model, n_layer=n_layer))
    model.save_pretrained(folder)  # for config.json
    weights = dict(model.state_dict())
    if layout == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / layout)
    elif layout == "three shards":
        (folder / "model.safetensors").unlink()
        del weights["lm_head.weight"]
        names, where = list(weights), {}
        for i in range(3):
            shard = f"model-{i + 1:05}-of-00003.safetensors"
            save_file({name: weights[name] for name in names[i::3]}, folder / shard)
            where |= dict.fromkeys(names[i::3], shard)
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(folder: Path, dtype: str) -> dict[str, float]:
    import safetensors.torch  # noqa: F401  (its own memory is not that of the weights)

    files = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    before, before_private = memory("VmRSS"), memory("RssAnon")
    private, over = [before_private], threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            private.append(memory("RssAnon"))

    threading.Thread(target=look).start()
    start = time.perf_counter()
    model = Mamba.from_pretrained(folder, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    read = time.perf_counter()
    over.set()
    return {
        "file_mb": round(size / 1e6, 1),
        "seconds": round(loaded - start, 3),
        "seconds_until_all_read": round(read - start, 3),
        "peak_over_file": round((max(private) - before_private) / size, 3),
        "with_pages_over_file": round((memory("VmHWM") - before) / size, 3),
        "resident_after_over_file": round((memory("VmRSS") - before) / size, 3),
    }


REPOSITORY, COMMIT = "state-spaces/random", "0" * 40


def measure_without_network() -> dict[str, float | str]:
    start, said = time.perf_counter(), "loaded"
    try:
        Mamba.from_pretrained(REPOSITORY)
    except FileNotFoundError as error:
        said = str(error)
    return {"seconds": round(time.perf_counter() - start, 3), "said": said}


def without_network(folder: Path) -> None:
    """The folder as the Hub's client caches it, and a Hub that cannot be reached."""
    with (
        tempfile.TemporaryDirectory() as caches,
        socket.socket() as silent,
        socket.socket() as shut,
    ):
        cache = Path(caches) / "filled" / f"models--{REPOSITORY.replace('/', '--')}"
        (cache / "snapshots").mkdir(parents=True)
        (cache / "snapshots" / COMMIT).symlink_to(folder)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(COMMIT)
        for server in (silent, shut):
            server.bind(("127.0.0.1", 0))
        silent.listen()  # and never accept: the kernel shakes hands, nobody answers
        for name, server in (("refuses connections", shut), ("never answers", silent)):
            for state in ("filled", "empty"):
                endpoint = "http://{}:{}".format(*server.getsockname())
                hub = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(Path(caches) / state)}
                command = [sys.executable, __file__, "--measure-without-network"]
                environment = {**os.environ, **hub}
                result = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=environment
                )
                measured = json.loads(result.stdout.replace(endpoint, "(endpoint)"))
                print(json.dumps({"hub": name, "cache": state, **measured}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--n-layer", type=int, default=24)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--measure-without-network", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure_without_network:
        print(json.dumps(measure_without_network()))
        return
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), layout, options.d_model, options.n_layer)
            for dtype in DTYPES:
                command = [sys.executable, __file__, "--measure", folder, dtype]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                case = {"layout": layout, "dtype": dtype, "torch": torch.__version__}
                print(json.dumps({**case, **json.loads(result.stdout)}), flush=True)
            if layout == "model.safetensors":
                without_network(Path(folder))


if __name__ == "__main__":
    main()
