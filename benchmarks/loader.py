"""Compare ways of reading images: ``python -m benchmarks.loader [--data IMAGENET_FOLDER]``.

One corpus is prepared as ``keep`` (the files as they are), ``short256`` and ``raw256``; every arm of a policy reads the same
stored pixels. Arms run one after the other, in a new process each, round by round, so that a change of the machine's load meets
all of them. The result is the median and the range, per second of processor time (of the process and its children) and of the
clock; arms are compared round by round. Without --data, seeded pictures are generated that resemble ImageNet's: 500x375, 4:2:0,
about 110 kB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "webdataset", "mosaicml-streaming", "ffcv")
METRICS = ("images_per_cpu_second", "images_per_second", "first_batch_seconds", "batch_seconds_p99", "memory_bytes")
_GENERATED = 96
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class Arm(NamedTuple):
    """One way of reading one form of the corpus."""

    arm: str
    """Key of ``loader_arms.ARMS``."""
    store: str
    """``folder``, ``tar``, ``mds`` or ``beton``."""
    policy: str

    @property
    def name(self) -> str:
        """For the tables."""
        return f"{self.arm} {self.store} {self.policy}"


PLAN = [
    *(Arm(arm, store, policy)
      for policy in ("keep", "short256")
      for arm, store in (("folder+pillow", "folder"), ("webdataset+pillow", "tar"), ("webdataset+turbo", "tar"),
                         ("streaming+turbo", "mds"), ("ffcv", "beton"),
                         ("ours", "folder"), ("ours", "tar"), ("ours", "mds"), ("ours", "beton"))),
    Arm("ffcv", "beton", "raw256"),
    Arm("ours", "beton", "raw256"),
]  # fmt: skip


def make_corpus(folder: Path, data: Path | None, num_images: int) -> str:
    """Lay out ``folder/train/<class>/*`` with num_images images, each real one as often as it takes, as links.

    Args:
        folder: to make; kept if it is there.
        data: folder with images in it, at any depth; None generates them.
        num_images: in the corpus.

    Returns:
        What the corpus is, for the report.
    """
    if data is None:
        originals = _generate(folder.parent / "generated")
        what = f"{len(originals)} generated pictures (seeded; 500x375, 4:2:0)"
    else:
        originals = sorted(path for path in data.rglob("*") if path.suffix.lower() in _ENDINGS)
        what = f"{len(originals)} images of {data.name}"
    if not originals:
        raise SystemExit(f"error: {data} holds no images")
    for k in range(num_images):
        original = originals[k % len(originals)]
        link = folder / "train" / f"class{k % 10}" / f"{k:06d}{original.suffix.lower()}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(original.resolve())
    sizes = [path.stat().st_size for path in originals]
    return f"{what}, mean {sum(sizes) / len(sizes) / 1e3:.1f} kB; {num_images} samples"


def _generate(folder: Path) -> list[Path]:
    """Pictures with the spectrum of photographs: noise of all sizes, the coarse stronger."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{k:03d}.jpg" for k in range(_GENERATED)]
    for k, path in enumerate(paths):
        if path.exists():
            continue
        rng = np.random.RandomState(k)
        width, height = (500, 375) if k % 4 else (375, 500)
        pixels = np.full((height, width, 3), 128.0)
        for cells in (3, 6, 12, 24, 48, 96, 192, 400):
            noise = rng.randint(0, 256, (cells, cells, 3)).astype(np.uint8)
            layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(layer) - 127.5) * cells**-0.3
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=93, subsampling=2)
    return paths


def stored(scratch: Path, corpus: Path, arm: Arm) -> Path:
    """The train folder that an arm reads; prepared if it is not there yet."""
    container = "tar" if arm.store == "folder" else arm.store
    if arm.store == "folder" and arm.policy == "keep":
        return corpus / "train"
    out = scratch / f"{container}-{arm.policy}"
    command = ["-m", "data_prep", "prepare", str(corpus), str(out), "--container", container, "--policy", arm.policy]
    # One shard: ffcv reads one file.
    _python([*command, "--split", "train", "--shards", "1", "--quiet"])
    if arm.store != "folder":
        return out / "train"
    return _unpack(out, scratch / f"folder-{arm.policy}" / "train")


def _unpack(prepared: Path, folder: Path) -> Path:
    """The stored images of a prepared data set as files, class by class."""
    from nepa_dist.data.open import open_container

    container = open_container(str(prepared), "train", image_size=224)
    for i in range(len(container)):
        sample = container.read(i)
        path = folder / container.class_names[sample.label] / f"{i:06d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(sample.image))
    return folder


def run(arm: Arm, data: Path, args: argparse.Namespace) -> dict[str, float] | str:
    """Measure an arm once in a new process: the numbers, or why there are none."""
    setting = {
        "arm": arm.arm, "data": str(data), "batch_size": args.batch_size, "image_size": args.image_size,
        "workers": args.workers, "seconds": args.seconds,
    }  # fmt: skip
    try:
        out = _python(["-m", "benchmarks.loader_arms", json.dumps(setting)])
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    except subprocess.TimeoutExpired:
        return "did not finish in time"
    result: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return result


def _python(arguments: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=1800)
    return done.stdout


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each number over the rounds."""
    columns = {key: [values[key] for values in rounds] for key in rounds[0]}
    return {key: {"median": median(column), "low": min(column), "high": max(column)} for key, column in columns.items()}


def ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How many times as many images per CPU-second this project reads as each other arm gets from the same stored pixels.

    Args:
        rounds: name of the arm -> the numbers of each round.

    Returns:
        Arm -> median, lowest and highest of the rounds' ratios. In each round the slowest of this project's packed containers
        counts. An arm whose policy was not read by this project too is left out.
    """
    found = {}
    for arm in PLAN:
        ours = [f"ours {store} {arm.policy}" for store in ("tar", "mds", "beton")]
        ours = [name for name in ours if name in rounds]
        if arm.arm == "ours" or arm.name not in rounds or not ours:
            continue
        rates = [[values["images_per_cpu_second"] for values in rounds[name]] for name in (arm.name, *ours)]
        column = [{"ratio": min(mine) / theirs} for theirs, *mine in zip(*rates, strict=False)]
        found[arm.name] = summary(column)["ratio"]
    return found


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        return ""


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    try:
        about = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"}).stdout
    except (OSError, subprocess.CalledProcessError):
        about = ""
    lines = [line for line in about.splitlines() if not line.startswith(("Flags", "Vulnerability"))]
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("Model name")), platform.machine())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "lscpu": lines,
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": (_git("rev-parse", "HEAD") or "unknown") + (" with changes" if _git("status", "--porcelain") else ""),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    place, setting = report["machine"], report["setting"]
    packages = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
    lines = [
        f"# Loaders, {place['processor']}, {report['date']}",
        "",
        f"    {report['command']}",
        "",
        f"Corpus: {report['corpus']}. {place['cores']} cores, {place['memory_bytes'] / 1e9:.0f} GB, load "
        f"{place['load_at_start']} at the start and {place['load_at_end']} at the end. Batches of "
        f"{setting['batch_size']} x {setting['image_size']}x{setting['image_size']} uint8, {setting['workers']} workers, "
        f"{setting['repeats']} rounds of {setting['seconds']} s, arms interleaved; median (lowest - highest).",
        "",
        f"Commit {place['commit']}; Python {place['python']}, {packages}.",
        "",
        "Memory is that of the process and its workers above what it had before, shared pages counted once.",
        "",
        "| arm | images per CPU-second | images/s | first batch, s | p99 batch, s | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in report["arms"].items():
        rate = values["images_per_cpu_second"]
        others = [values[key]["median"] for key in METRICS[1:]]
        lines.append(
            f"| {name} | **{rate['median']:.0f}** ({rate['low']:.0f} - {rate['high']:.0f}) | {others[0]:.0f} | {others[1]:.2f} "
            f"| {others[2]:.3f} | {others[3] / 1e6:.0f} |"
        )
    if report["ratios"]:
        lines += [
            "",
            "How many times as many images per CPU-second: the slowest of this project's packed containers over another arm, "
            "compared within each round.",
            "",
            "| over | ratio |",
            "|---|---|",
        ]
    for name, ratio in report["ratios"].items():
        lines.append(f"| {name} | **{ratio['median']:.2f}** ({ratio['low']:.2f} - {ratio['high']:.2f}) |")
    lines += [
        "",
        "Stages of this project's path, images per CPU-second in one process:",
        "",
        "| data | stage | rate |",
        "|---|---|---|",
    ]
    for name, rates in report["stages"].items():
        lines += [f"| {name} | {stage} | {rate['median']:.0f} |" for stage, rate in rates.items()]
    if report["failed"]:
        lines += ["", "Not measured:", "", *(f"- {name}: {reason}" for name, reason in report["failed"].items())]
    if place["lscpu"]:
        lines += ["", "The machine, as lscpu tells:", "", *(f"    {line}".rstrip() for line in place["lscpu"])]
    return "\n".join(lines) + "\n"


def benchmark(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Prepare the corpus and run all rounds."""
    place = machine()
    corpus = scratch / "corpus"
    what = make_corpus(corpus, args.data, args.images)
    plan = [arm for arm in PLAN if not args.only or any(word in arm.name for word in args.only)]
    stages = [arm._replace(arm="stages") for arm in plan if arm.arm == "ours"]
    folders: dict[str, Path] = {}
    results: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    for repeat in range(args.repeats):
        for arm in [*plan, *stages]:
            if arm.name in failed:
                continue
            print(f"round {repeat + 1} of {args.repeats}: {arm.name}", file=sys.stderr, flush=True)
            key = f"{arm.store} {arm.policy}"
            try:
                if key not in folders:
                    folders[key] = stored(scratch, corpus, arm)
            except subprocess.CalledProcessError as error:
                failed[arm.name] = f"cannot be prepared: {error.stderr.strip().splitlines()[-1:]}"
                continue
            result = run(arm, folders[key], args)
            if isinstance(result, str):
                failed[arm.name] = result
            else:
                results.setdefault(arm.name, []).append(result)
    done = {arm.name: summary(results[arm.name]) for arm in [*plan, *stages] if arm.name in results}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": place | {"load_at_end": round(os.getloadavg()[0], 1)},
        "corpus": what,
        "setting": {key: getattr(args, key) for key in ("batch_size", "image_size", "workers", "repeats", "seconds")},
        "arms": {name: values for name, values in done.items() if not name.startswith("stages ")},
        "stages": {name.removeprefix("stages "): values for name, values in done.items() if name.startswith("stages ")},
        "ratios": ratios(results),
        "failed": {name: reason for name, reason in failed.items() if not name.startswith("stages ")},
        "rounds": results,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images, at any depth; default: generated ones")
    parser.add_argument("--images", type=int, default=2400, metavar="N", help="samples in the corpus (default: 2400)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B")
    parser.add_argument("--image-size", type=int, default=224, metavar="S")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes of each arm (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: 8)")
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="arms whose name holds one of these")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="keep the prepared data here; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the report goes")
    args = parser.parse_args(argv)
    if args.scratch is None:
        with tempfile.TemporaryDirectory() as scratch:
            report = benchmark(args, Path(scratch))
    else:
        report = benchmark(args, args.scratch.resolve())
    words = sys.argv[1:] if argv is None else argv
    report["command"] = shlex.join(["python", "-m", "benchmarks.loader", *words])
    text = to_markdown(report)
    args.out.mkdir(parents=True, exist_ok=True)
    place = "".join(c if c.isalnum() else "-" for c in report["machine"]["processor"].lower())[:40].strip("-")
    kind = args.data.resolve().name if args.data else "generated"
    path = args.out / f"loader_{kind}_{place}-{report['machine']['cores']}core_{report['date']}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
