"""All checks on a GPU in one command, which takes a few minutes and needs no network. See scripts/gpu_check.

scripts/gpu_check                    tests marked gpu, kernels, end to end; tables; JSON under scripts/results
scripts/gpu_check --parts kernels    one part; an interrupted run is resumed
scripts/gpu_check --fetch-peers      downloads the peers' kernel files with pip, to be copied to the machine
scripts/gpu_check --list             prints what would be measured
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpu.columns.fetch import fetch  # noqa: E402
from gpu.columns.registry import columns  # noqa: E402
from gpu.grid import SITES, points  # noqa: E402
from gpu.report import kernel_table, step_table, troubles  # noqa: E402
from gpu.results import Results, about, file_name  # noqa: E402

PARTS = ("tests", "kernels", "end-to-end")


def run_tests(results: Results, seconds: float) -> bool:
    """Runs the tests marked gpu in a child process and records pytest's last line. Returns whether all tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", "tests"]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        status, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        status, text = 1, (late.stdout or b"").decode() + "\nnot done in time"
    print(text[-4000:])
    last = text.strip().splitlines()[-1] if text.strip() else "no output"
    results.section("tests").update(ok=status == 0, says=last, seconds=round(time.monotonic() - began))
    results.save()
    return status == 0


def run_kernels(results: Results, peers: Path, seconds: float) -> bool:
    """Measures the grid and prints its table. Returns whether all of our columns could be measured."""
    from gpu import kernels

    chosen = columns(peers)
    kernels.run(results, chosen, seconds)
    print(kernel_table(results.section("kernels"), chosen))
    found = troubles(results.section("kernels"))
    print("\n".join(found))
    return not any(name in line for line in found for name in (f"x {c.name}:" for c in chosen if not c.peer))


def run_end_to_end(results: Results) -> None:
    """Measures the 8B shape with random weights and prints its table."""
    from gpu.runner import end_to_end
    from gpu.runner.shape8b import load
    from gpu.timing import bytes_per_us
    from model_runner.warmup import warm_up

    bandwidth = results.section("bandwidth")
    if "bytes_per_us" not in bandwidth:
        bandwidth["bytes_per_us"] = bytes_per_us()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        runner = load(
            Path(directory),
            device="cuda",
            enable_lora=True,
            max_loras=end_to_end.ADAPTERS,
            max_lora_rank=end_to_end.RANK,
            lora_pool_adapters=end_to_end.ADAPTERS,
            max_running_requests=max(end_to_end.BATCHES),
            context_length=2048,
        )
        loaded = time.monotonic()
        warm_up(runner)
        results.section("steps").update(load_s=loaded - began, warm_up_s=time.monotonic() - loaded)
        end_to_end.run(results, runner)
        runner.close()
    print(step_table(results.section("steps"), bandwidth["bytes_per_us"]))


def listing(peers: Path) -> str:
    """Returns the list of what would be measured."""
    lines = [f"{len(points())} points, each at {', '.join(site.name for site in SITES)}:"]
    lines += [f"  {point.key}" for point in points()]
    lines += [f"column {c.name}" + (f": left out, {c.absent}" if c.absent else "") for c in columns(peers)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts. Exit status 0 if everything could be measured and every test passed."""
    top = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    top.add_argument("--seconds", type=float, default=300.0, help="time for the kernels; the next run continues")
    top.add_argument("--test-seconds", type=float, default=150.0, help="time for the tests")
    top.add_argument("--peers", type=Path, default=ROOT / ".peers", help="directory of the peers' files")
    top.add_argument("--results", type=Path, default=ROOT / "scripts" / "results")
    top.add_argument("--fetch-peers", action="store_true", help="download the peers' files there and exit")
    top.add_argument("--list", action="store_true", help="print what would be measured and exit")
    args = top.parse_args(argv)
    if args.fetch_peers:
        fetch(args.peers)
        return 0
    if args.list:
        print(listing(args.peers))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device is usable here: nothing was measured", file=sys.stderr)
        return 1
    facts = about(torch.cuda.get_device_name())
    results = Results(args.results / file_name(facts), facts)
    fine = True
    if "tests" in args.parts:
        fine = run_tests(results, args.test_seconds)
    if "kernels" in args.parts:
        fine &= run_kernels(results, args.peers, args.seconds)
    if "end-to-end" in args.parts:
        run_end_to_end(results)
    print(f"results: {results.path}")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
