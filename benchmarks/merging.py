"""How long merging LoRAs takes, and how much memory, beside PEFT's ``add_weighted_adapter``.

Both merge the same files in the same run, each in a process of its own. The model is a UNet of
Stable Diffusion 1.5's size whose own weights are never touched.

    python benchmarks/merging.py                           # writes benchmarks/merging.md
    python benchmarks/merging.py --methods svd             # the quickest part of it
    python benchmarks/merging.py --scale 8 --rank 4        # a small one, to see that it runs
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
SETS: Mapping[str, Sequence[str]] = {
    "attention and feed-forward": LINEAR,
    "with convolutions": (*LINEAR, "proj_in", "proj_out", "conv1", "conv2"),
}
OURS: Mapping[str, Mapping[str, Any]] = {
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "magnitude": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "knots_ties": {"density": 0.5},
    "lego": {},
}
THEIRS: Mapping[str, Mapping[str, Any]] = {
    "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd"},
    "ties": {"combination_type": "ties_svd", "density": 0.5},
    "magnitude": {"combination_type": "magnitude_prune_svd", "density": 0.5},
    "dare_linear": {"combination_type": "dare_linear_svd", "density": 0.5},
}
"""PEFT's name and options for the same method."""


def build(scale: int) -> Any:
    """A UNet of Stable Diffusion 1.5's shape, its widths divided, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=tuple(width // scale for width in (320, 640, 1280, 1280)),
            cross_attention_dim=768 // scale,
            attention_head_dim=8,
            norm_num_groups=32 // min(scale, 8),
        )


def make(folder: Path, targets: Sequence[str], scale: int, count: int, rank: int) -> list[Path]:
    """Random LoRA files for all layers whose names end so."""
    from cmlora.files import write
    from cmlora.lora import LoRA, Update

    layers = [
        (name, tuple(layer.weight.shape))
        for name, layer in build(scale).named_modules()
        if name.endswith(tuple(targets)) and hasattr(layer, "weight")
    ]
    paths = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        updates = {
            f"unet.{name}": Update(
                0.1 * torch.randn((rank, *shape[1:]), generator=generator),
                0.1 * torch.randn((shape[0], rank), generator=generator),
            )
            for name, shape in layers
        }
        paths.append(folder / f"l{index}.safetensors")
        write(LoRA(f"l{index}", updates), paths[-1])
    return paths


def resident() -> int:
    """Bytes of memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def warm() -> None:
    """Load every library that a measurement needs, on something tiny."""
    import peft
    from torch import nn

    import cmlora.files
    from cmlora.adapters.merging import merge
    from cmlora.lora import LoRA, Update

    tiny = LoRA("tiny", {"unet.mid_block.x": Update(torch.ones(1, 4), torch.ones(4, 1))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        cmlora.files.write(tiny, path)
        for method in OURS:
            merge([cmlora.files.read(path)], [1.0], method)
    config = peft.LoraConfig(r=1, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, "a")
    model.add_weighted_adapter(["a"], [1.0], "b", combination_type="svd", svd_rank=1)


def measured(load: Callable[[], Callable[[], Any]], error: Callable[[Any], float]) -> None:
    """Print seconds, peak memory above what the libraries take, and distance from the sum."""
    warm()
    before = resident()
    work = load()
    started, busy = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak, "error": error(result)}))


def ours(method: str, paths: Sequence[Path], rank: int) -> None:
    """Our merge of the files, measured."""
    import cmlora.files
    from cmlora.adapters.merging import merge

    def load() -> Callable[[], Any]:
        loras = [cmlora.files.read(path) for path in paths]
        weights = [1 / len(loras)] * len(loras)
        target = None if method == "cat" else rank
        return lambda: merge(loras, weights, method, rank=target, **OURS[method])

    measured(load, lambda result: float(result.report.error))


def theirs(method: str, paths: Sequence[Path], rank: int, scale: int, full: bool) -> None:
    """PEFT's merge of the same files, measured."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    import cmlora.files
    from cmlora.adapters.merging.factors import Pair, stack

    names = [path.stem for path in paths]
    weights = [1 / len(paths)] * len(paths)

    def load() -> Callable[[], Any]:
        found: Any = None
        for name, path in zip(names, paths, strict=True):
            updates = cmlora.files.read(path).parts["unet"]
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(updates))
            if found is None:
                # The model's own weights are never touched, so that they take no memory.
                found = get_peft_model(build(scale).to_empty(device="cpu"), config, name)
            else:
                found.add_adapter(name, config)
            state = {}
            for module, update in updates.items():
                ones = [1] * (update.down.ndim - 2)
                key = f"base_model.model.{module}"
                state[f"{key}.lora_A.weight"] = update.down
                state[f"{key}.lora_B.weight"] = update.up.reshape(*update.up.shape, *ones)
            set_peft_model_state_dict(found, state, name)
        options = {} if method == "cat" else {"svd_rank": rank, "svd_full_matrices": full}

        def work() -> Any:
            found.add_weighted_adapter(names, weights, "merged", **THEIRS[method], **options)
            return found

        return work

    def error(found: Any) -> float:
        lost = size = 0.0
        loras = [cmlora.files.read(path).parts["unet"] for path in paths]
        for module in loras[0]:
            layer = found.base_model.model.get_submodule(module)
            a, b = layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()
            own = Pair(b.double().flatten(1) * layer.scaling["merged"], a.double().flatten(1))
            exact = stack([Pair(*lora[module].factors()) for lora in loras], weights)
            lost += stack([own, exact], [1.0, -1.0]).norm() ** 2
            size += exact.norm() ** 2
        return float((lost / size) ** 0.5)

    measured(load, error)


def once(
    arguments: Sequence[str], files: Sequence[str], limit: float, store: Path | None
) -> dict[str, float] | None:
    """A measurement that is kept, so that a run that was stopped goes on where it was."""
    known = json.loads(store.read_text()) if store and store.exists() else {}
    about = " ".join([*arguments, str(len(files)), Path(files[0]).parent.name])
    if about not in known:
        known[about] = run([*arguments, *files], limit)
        if store:
            store.write_text(json.dumps(known, indent=0))
    found: dict[str, float] | None = known[about]
    return found


def run(arguments: Sequence[str], limit: float) -> dict[str, float] | None:
    """One measurement in a process of its own, on one thread.

    Returns:
        the numbers; none of them if the decomposition did not converge; ``None`` if it took too
        long.
    """
    command, one = [sys.executable, __file__, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=one)
    except subprocess.TimeoutExpired:
        return None
    if "failed to converge" in done.stderr:
        return {}
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def cells(found: Mapping[str, float] | None, size: int, limit: float) -> tuple[str, str, str]:
    """Seconds of the processor, peak memory in units of the files, distance from the exact sum."""
    if found is None:
        return f"not in {limit:.0f} s", "", ""
    if not found:
        return "does not converge", "", ""
    return f"{found['cpu']:.2f}", f"{found['peak'] / size:.2f}", f"{found['error']:.4f}"


def table(title: str, paths: Sequence[Path], options: argparse.Namespace) -> list[str]:
    """The lines of one set of files."""
    size = sum(path.stat().st_size for path in paths)
    lines = [
        f"## {title}",
        "",
        f"{len(paths)} files of rank {options.rank} in single precision, {size / 2**20:.0f} MB "
        "together. Memory is the peak above what the libraries take before any file is read, in "
        "multiples of that; the distance is from the exact weighted sum, relative to it.",
        "",
        "| method | seconds | PEFT | PEFT, small SVD | times faster | memory | PEFT | PEFT, small "
        "SVD | distance | PEFT |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    files = list(map(str, paths))
    common = ["--rank", str(options.rank), "--scale", str(options.scale)]
    store = options.out.with_suffix(".json") if options.out else None
    for method in options.methods:
        own = once(["--measure", f"ours:{method}", *common], files, options.limit, store)
        both: list[dict[str, float] | None] = []
        if method in THEIRS:
            for kind in ("full", "small"):
                arguments = ["--measure", f"{kind}:{method}", *common]
                both.append(once(arguments, files, options.limit, store))
        mine = cells(own, size, options.limit)
        full, small = (cells(b, size, options.limit) for b in both) if both else (("", "", ""),) * 2
        faster = ""
        if own and any(both):
            faster = " / ".join(f"{b['cpu'] / own['cpu']:.1f}" if b else "-" for b in both)
        row = [f"`{method}`", mine[0], full[0], small[0], faster, mine[1], full[1], small[1]]
        lines.append("| " + " | ".join([*row, mine[2], full[2] or small[2]]) + " |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description="merging beside PEFT")
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    parser.add_argument("--loras", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths: 1, 2, 4 or 8")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one measurement")
    parser.add_argument("--methods", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--out", type=Path, help="merging.md beside this file at scale 1")
    options = parser.parse_args()
    if options.out is None and options.scale == 1:
        options.out = Path(__file__).with_suffix(".md")
    if options.measure:
        warnings.simplefilter("ignore")
        side, _, method = options.measure.partition(":")
        if side == "ours":
            ours(method, options.files, options.rank)
        else:
            theirs(method, options.files, options.rank, options.scale, side == "full")
        return
    lines = [
        "# Merging LoRAs beside PEFT",
        "",
        f"`python benchmarks/merging.py --loras {options.loras} --rank {options.rank} --scale "
        f"{options.scale}` on {platform.machine()}, torch {torch.__version__.partition('+')[0]}. "
        "Every measurement is a process of its own on one thread, and seconds are those that the "
        "processor worked for it, which other programs on the machine lengthen least.",
        "",
        "PEFT is `add_weighted_adapter` with its defaults, and with `svd_full_matrices=False`, "
        "which it does not use unless asked. It has no `knots_ties` and no `lego`.",
        "",
    ]
    for title, targets in SETS.items():
        print(title, flush=True)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / title.replace(" ", "_")
            folder.mkdir()
            paths = make(folder, targets, options.scale, options.loras, options.rank)
            lines += table(title, paths, options)
    target = options.out
    if target is not None:
        target.write_text("\n".join(lines))
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
