"""What the operator's flags allow an adapter to have. A refusal names the flags that would allow it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from engine.errors import AdapterError
from model_runner.lora.peft.survey import AdapterSurvey
from model_runner.lora.site import EMBED, HEAD, full_weights_of


class Limits(msgspec.Struct, frozen=True):
    """What the operator's flags allow an adapter to have; None: no limit.

    `targets` are module names, or "all". `biases`: whether biases are allowed. `extra_vocab`: the most tokens that a
    vocabulary may have beyond the base's. `empty_groups`: the groups for which no rank pages were made. `flag`: the
    value of --lora-target-modules, as given or as inferred.
    """

    max_rank: int | None = None
    targets: list[str] | None = None
    biases: bool = True
    extra_vocab: int | None = None
    empty_groups: list[str] = []
    flag: list[str] = []

    def check(self, survey: AdapterSurvey, path: Path) -> None:
        """Raises AdapterError, naming all flags that would allow it, if the adapter in `path` exceeds a limit."""
        reasons, flags = [], []
        if self.max_rank is not None and survey.rank > self.max_rank:
            served = max(survey.mappings, key=lambda mapping: mapping.rank)
            given = served.module.target.rank
            meant = "" if given == survey.rank else f" ({survey.format} of rank {given} is served as such)"
            reasons.append(f"rank {survey.rank} is above --max-lora-rank {self.max_rank}{meant}")
            flags.append(f"--max-lora-rank {survey.rank}")
        if survey.biased_module is not None and not self.biases:
            reasons.append(f"it gives {survey.biased_module} a bias, which --no-enable-lora-bias does not allow")
            flags.append("--enable-lora-bias")
        refused = self._refused(survey)
        if refused:
            allowed = " ".join(self.targets or [])
            reasons.append(f"it targets {', '.join(refused)}, which --lora-target-modules {allowed} does not allow")
        flags += self._vocabulary(survey, path, reasons)
        if refused or (reasons and self._without_pages(survey)):
            words = self.flag or self.targets or []
            flags.append(targets_flag(dict.fromkeys([*words, *refused, *self._without_pages(survey)])))
        if refused and not any(flag.startswith("--lora-paths") for flag in flags) and _is_whole(survey):
            flags.append(paths_flag(path))
        if reasons:
            raise AdapterError(f"{'; '.join(reasons)}: launch with {' '.join(flags)}")

    def _refused(self, survey: AdapterSurvey) -> list[str]:
        if self.targets is None or "all" in self.targets:
            return []
        return [target for target in survey.targets if target not in self.targets]

    def _without_pages(self, survey: AdapterSurvey) -> list[str]:
        """Returns the modules of the adapter in groups for which no rank pages were made."""
        refs = [ref for mapping in survey.mappings if mapping.rank for ref in mapping.refs]
        return sorted({ref.slice.module for ref in refs if ref.site.group in self.empty_groups})

    def _vocabulary(self, survey: AdapterSurvey, path: Path, reasons: list[str]) -> list[str]:
        """Returns the flags that an adapter with a vocabulary of its own needs; adds why to `reasons`."""
        if self.extra_vocab is None or survey.added_tokens <= self.extra_vocab:
            return []
        reasons.append(
            f"its vocabulary has {survey.vocab_size} tokens, {survey.added_tokens} more than the model's, and"
            f" --lora-extra-vocab-size (the most of an adapter in --lora-paths) is {self.extra_vocab}"
        )
        return [paths_flag(path), f"--lora-extra-vocab-size {survey.added_tokens}"]


def targets_flag(modules: Iterable[str]) -> str:
    """Returns the flag that makes room for these modules."""
    return f"--lora-target-modules {' '.join(modules)}"


def paths_flag(path: str | Path) -> str:
    """Returns the flag that makes room for whole matrices of the adapter in `path`."""
    return f"--lora-paths {path}"


def _is_whole(survey: AdapterSurvey) -> bool:
    return any(full_weights_of(group) in survey.footprint.pages for group in (EMBED, HEAD))
