"""`python -m model_runner.inspect PATH --model-path BASE`: shows what an adapter contains, and why it is refused.

Reads the adapter like a loader process, without starting one. Of the base model it reads config.json, and the weights
that DoRA or a trained bias depends on. Exit status 0: the adapter can be served; 1: it cannot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
import torch

from engine.directory import Directory
from engine.errors import AdapterError, EngineError
from engine.hub import local_directory
from model_runner.build.lora_targets import expand
from model_runner.config import read_model_config
from model_runner.lora.catalogue import Catalogue, leaf
from model_runner.lora.loading.adapter_reader import AdapterReader
from model_runner.lora.loading.limits import Limits
from model_runner.lora.loading.shm_adapter import arrange
from model_runner.lora.normal_form import MAX_RANK
from model_runner.lora.peft.survey import AdapterSurvey
from model_runner.lora.pool.site_pools import page_bytes
from model_runner.lora.site import Site
from model_runner.model.layers.weights import Weights
from model_runner.model.load import build_decoder
from model_runner.platform.device import DTYPES, resolve_device, resolve_dtype
from model_runner.platform.shard import Shard

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files in an adapter's directory that replace the model's tokenizer or chat template."""


class Group(msgspec.Struct, frozen=True):
    """The rank pages of one group of sites: their number, and their bytes on the device."""

    pages: int
    bytes: int


class Report(msgspec.Struct, kw_only=True):
    """The report on an adapter. `refused` is why the adapter cannot be served, or None if it can."""

    path: str
    format: str = ""
    keys: str = ""
    ranks: dict[str, list[int]] = {}
    lora_rank: int = 0
    invocation: list[int] = []
    vocab_size: int = 0
    brings: list[str] = []
    tensors: int = 0
    file_bytes: int = 0
    host_bytes: int = 0
    groups: dict[str, Group] = {}
    dtype: str = ""
    cast_from: list[str] = []
    notes: list[str] = []
    revision: str = ""
    refused: str | None = None


def sites_of(model: Path, dtype: str) -> tuple[list[Site], torch.dtype]:
    """Returns the sites of a model directory, without weights, and the dtype that `dtype` (--dtype) resolves to.

    Raises ConfigError.
    """
    model_config = read_model_config(model)
    resolved = resolve_dtype(dtype, model_config.dtype, resolve_device("auto"))
    return build_decoder(model_config, Weights(torch.device("meta"), resolved, Shard())).sites, resolved


def examine(root: Path, sites: list[Site], dtype: torch.dtype, limits: Limits, model: Path | None = None) -> Report:
    """Returns the report on the adapter in `root`. Tensor values are checked too; `model` has the weights they need."""
    report = Report(path=str(root), dtype=str(dtype).removeprefix("torch."))
    reader = AdapterReader(Catalogue(sites), dtype, Limits(), model)
    try:
        with Directory(root) as directory:
            survey = reader.survey(directory)
            report.brings = [name for name in TEXT_FILES if directory.has(name)]
            report.notes = reader.notes(survey)
            _describe(report, survey, page_bytes(sites, dtype, max(0, survey.added_tokens)), dtype)
            limits.check(survey, root)
            manifest, _ = reader.read(survey).open(reader.catalogue, dtype)
            report.revision = manifest.revision
    except AdapterError as error:
        report.refused = error.message
    except OSError as error:
        report.refused = str(error)
    return report


def _describe(report: Report, survey: AdapterSurvey, page: dict[str, int], dtype: torch.dtype) -> None:
    ranks: dict[str, set[int]] = {}
    for mapping in survey.mappings:
        ranks.setdefault(leaf(mapping.name), set()).add(mapping.rank)
    report.format = survey.format
    report.keys = survey.dialect
    report.ranks = {module: sorted(found) for module, found in sorted(ranks.items())}
    report.lora_rank = survey.rank
    report.invocation = survey.invocation
    report.vocab_size = survey.vocab_size
    report.tensors = survey.tensors
    report.file_bytes = survey.data_bytes
    report.host_bytes = arrange(survey.mappings, dtype)[1]
    pages = survey.footprint.pages
    report.groups = {group: Group(count, count * page[group]) for group, count in pages.items()}
    report.cast_from = survey.cast_from(dtype)


def show(report: Report) -> str:
    """Formats the report as text for people."""
    lines = [("adapter", report.path)]
    if report.format:
        ranks = [f"{module} {', '.join(map(str, found))}" for module, found in report.ranks.items()]
        groups = [f"{group} {held.pages} ({held.bytes / 1e6:.1f} MB)" for group, held in report.groups.items()]
        lines += [
            ("format", f"{report.format}, keys {report.keys}"),
            ("tensors", f"{report.tensors}, {report.file_bytes / 1e6:.1f} MB in the files"),
            ("rank", f"{report.lora_rank} ({'; '.join(ranks)})"),
            ("on the host", f"{report.host_bytes / 1e6:.1f} MB in {report.dtype}"),
            ("rank pages", f"{'; '.join(groups)}"),
            ("acts", f"from tokens {report.invocation} on" if report.invocation else "from the first token on"),
            ("vocabulary", f"{report.vocab_size} tokens of its own" if report.vocab_size else "the model's"),
            ("text", ", ".join(report.brings) or "as the model's"),
            ("cast from", ", ".join(report.cast_from) or "nothing is cast"),
            *(("note", note) for note in report.notes),
            ("revision", report.revision or "unknown"),
        ]
    lines.append(("refused", report.refused) if report.refused else ("served", "yes"))
    return "\n".join(f"{title:<12} {text}" for title, text in lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report. Returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    try:
        root = local_directory(options.path, "adapter")
        model = local_directory(options.model_path, "model")
        sites, dtype = sites_of(model, options.dtype)
    except EngineError as error:
        print(error.message, file=sys.stderr)
        return 1
    targets = expand(options.lora_target_modules, sites)
    limits = Limits(options.max_lora_rank, targets, extra_vocab=options.lora_extra_vocab_size)
    report = examine(root, sites, dtype, limits, model)
    print(msgspec.json.encode(report).decode() if options.json else show(report))
    return 0 if report.refused is None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model_runner.inspect", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("path", help="the adapter: a directory, or a hub id")
    parser.add_argument("--model-path", "--model", required=True, help="the base model: a directory, or a hub id")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="what it would be served in")
    parser.add_argument("--max-lora-rank", type=int, choices=range(1, MAX_RANK + 1), metavar="RANK")
    parser.add_argument("--lora-target-modules", nargs="+", metavar="MODULE")
    parser.add_argument("--lora-extra-vocab-size", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
