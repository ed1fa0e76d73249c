"""How long a scrape takes, and whether scrapes slow the loop down: 20 scrapers at a time against the endpoint of a run.

    python benchmarks/scrape.py [--ranks 512] [--scrapers 20] [--seconds 10]

The endpoint serves every metric of the registry and five series for each rank. Ten times a second it hears that a step is
over, and every tenth time it is written to, as by a loop that logs every ten steps. The scrapers are processes of their own
and read without a pause, unless --pause gives one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
import urllib.request
from pathlib import Path

if not __package__:  # started as a file: the folder above holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nepa_dist.metrics.exporter import PrometheusExporter
from nepa_dist.metrics.registry import METRICS


def scrape(port: int, seconds: float, pause: float) -> list[float]:
    """Seconds of each scrape of one scraper."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            answer.read()
        times.append(time.perf_counter() - start)
        time.sleep(pause)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The cost of being scraped.")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--scrapers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    values = {key: 1.0 for metric in METRICS.values() if metric.kind != "histogram" for key in metric.keys}
    for metric in METRICS.values():
        if metric.label == "rank":
            values |= {f"{metric.name}.{rank}": 1.0 for rank in range(args.ranks)}
    exporter = PrometheusExporter("127.0.0.1", 0, {"git": "abc"}, run="bench")
    exporter.write(0, values)
    with multiprocessing.get_context("spawn").Pool(args.scrapers) as pool:
        pool.starmap(scrape, [(exporter.port, 0.2, 0.0)] * args.scrapers)  # the interpreters have started
        running = pool.starmap_async(scrape, [(exporter.port, args.seconds, args.pause)] * args.scrapers)
        writes, step = [], 0
        while not running.ready():
            step += 1
            start = time.perf_counter()
            exporter.beat(step, step_duration_seconds=0.1)
            if step % 10 == 0:
                exporter.write(step, values)
            writes.append(time.perf_counter() - start)
            time.sleep(0.1)
        times = sorted(seconds for part in running.get() for seconds in part)
    exporter.close()
    print(f"{len(values)} series, {args.scrapers} scrapers, pause {args.pause:g} s, {len(times)} scrapes in {args.seconds:g} s")
    print(f"scrape: median {1000 * statistics.median(times):.1f} ms, p99 {1000 * times[int(0.99 * len(times))]:.1f} ms")
    print(f"step:   median {1000 * statistics.median(writes):.2f} ms, longest {1000 * max(writes):.1f} ms")


if __name__ == "__main__":
    main()
