"""transformers + PEFT under the loads of `scripts/bench_cpu.py`: offline batches with an adapter for each row.

python scripts/bench_peft.py --batch 1 8 --rounds 1                 added to the same JSON file, under its own name
python scripts/bench_peft.py --parts base mixed --batch 8

No server and no arrivals: every batch starts and ends together, so its rates flatter it. A row's adapter is chosen as
PEFT does, by `adapter_names` in `generate`. Needs the packages of the tests.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench.launched import scratch
from bench.shapes import SHAPES, make_model
from bench.workload import Ask
from cpu.book import Book, Entry, table
from cpu.loads import LOADS, OUTPUT, TITLES, adapters, floor
from peft import PeftModel
from transformers import AutoModelForCausalLM

LABEL = "transformers + PEFT"


def load_model(shape_name: str, parts: Sequence[str]) -> torch.nn.Module:
    """The base with the adapters that the parts name; without any, the bare base."""
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
def generate(model: torch.nn.Module, asks: Sequence[Ask], tokens: int) -> float:
    """Seconds for one batch of `tokens` each."""
    ids = torch.tensor([ask.prompt for ask in asks])
    rows = {"adapter_names": [ask.adapter or "__base__" for ask in asks]} if isinstance(model, PeftModel) else {}
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    began = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **rows)
    seconds = time.perf_counter() - began
    assert out.shape[1] == ids.shape[1] + tokens
    return seconds


def measure(args: argparse.Namespace, book: Book) -> None:
    """Every part and batch in turns; a short batch first, which nobody counts."""
    model, session, shape = load_model(args.shape, args.parts), int(time.time()), SHAPES[args.shape]
    for turn in range(args.rounds):
        for batch in args.batch:
            for part in args.parts:
                asks = LOADS[part].asks(batch, random.Random(f"{session} {part} {batch} {turn}").randrange(2**32))
                starts = range(0, len(asks) - batch + 1, batch)
                generate(model, asks[:batch], 2)
                seconds = [generate(model, asks[at : at + batch], OUTPUT) for at in starts]
                rate = len(seconds) * batch * OUTPUT / sum(seconds)
                where = session, turn, args.shape, LABEL, part, batch
                book.entries.append(Entry(*where, rate, floor(shape, asks, batch)))
                book.write(args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, add to the file, print all it holds."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    top.add_argument("--parts", nargs="+", choices=list(LOADS), default=["base", "one", "mixed", "sixteen"])
    top.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    top.add_argument("--rounds", type=int, default=1)
    top.add_argument("--json", type=Path, metavar="FILE", default=scratch() / "bench-cpu.json", help="added to")
    args = top.parse_args(argv)
    book = Book.read(args.json)
    measure(args, book)
    print(table(book, TITLES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
