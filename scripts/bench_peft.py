"""transformers + PEFT under the loads of `scripts/bench_cpu.py`: offline batches with an adapter for each row.

python scripts/bench_peft.py --batch 1 8 --rounds 1                 appended to the same JSON file
python scripts/bench_peft.py --parts base mixed --batch 8

There is no server and there are no arrivals: all rows of a batch start and end together, which favours its rates. A
row's adapter is chosen by PEFT's `adapter_names` in `generate`. Needs the packages of the tests.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench.launched_server import scratch
from bench.shapes import SHAPES, make_model
from bench.workload import Request
from cpu.loads import LOADS, OUTPUT, TITLES, adapters, floor
from cpu.results import Entry, Results, table
from peft import PeftModel
from transformers import AutoModelForCausalLM

LABEL = "transformers + PEFT"


def load_model(shape_name: str, parts: Sequence[str]) -> torch.nn.Module:
    """Returns the base with the adapters of `parts`."""
    shape, directory = SHAPES[shape_name], scratch() / f"bench-{shape_name}"
    model = AutoModelForCausalLM.from_pretrained(make_model(shape, directory / "model"), dtype=torch.bfloat16)
    paths = adapters(shape, directory)
    names = list(dict.fromkeys(name for part in parts for name in LOADS[part].adapters))
    if names:
        model = PeftModel.from_pretrained(model, paths[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(paths[name], adapter_name=name)
    return model.eval()


@torch.inference_mode()
def generate(model: torch.nn.Module, requests: Sequence[Request], tokens: int) -> float:
    """Returns the seconds to generate `tokens` tokens for each request of a batch."""
    ids = torch.tensor([request.prompt for request in requests])
    rows = (
        {"adapter_names": [request.adapter or "__base__" for request in requests]}
        if isinstance(model, PeftModel)
        else {}
    )
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    began = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **rows)
    seconds = time.perf_counter() - began
    assert out.shape[1] == ids.shape[1] + tokens
    return seconds


def measure(args: argparse.Namespace, results: Results) -> None:
    """Measures all parts and batch sizes in turn, each after a short warm-up batch."""
    model, session, shape = load_model(args.shape, args.parts), int(time.time()), SHAPES[args.shape]
    for turn in range(args.rounds):
        for batch in args.batch:
            for part in args.parts:
                requests = LOADS[part].requests(
                    batch, random.Random(f"{session} {part} {batch} {turn}").randrange(2**32)
                )
                starts = range(0, len(requests) - batch + 1, batch)
                generate(model, requests[:batch], 2)
                seconds = [generate(model, requests[at : at + batch], OUTPUT) for at in starts]
                rate = len(seconds) * batch * OUTPUT / sum(seconds)
                where = session, turn, args.shape, LABEL, part, batch
                results.entries.append(Entry(*where, rate, floor(shape, requests, batch)))
                results.write(args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends to the file, and prints all results."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    top.add_argument("--parts", nargs="+", choices=list(LOADS), default=["base", "one", "mixed", "sixteen"])
    top.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    top.add_argument("--rounds", type=int, default=1)
    top.add_argument(
        "--json", type=Path, metavar="FILE", default=scratch() / "bench-cpu.json", help="results are appended to it"
    )
    args = top.parse_args(argv)
    results = Results.read(args.json)
    measure(args, results)
    print(table(results, TITLES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
