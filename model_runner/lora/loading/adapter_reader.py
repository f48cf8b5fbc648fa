"""Reads an adapter's directory into shared memory: survey, limits, values, revision.

The survey opens the files once, and the values are read from these open files. Does not depend on names and ids.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.directory import Directory
from engine.errors import AdapterError
from model_runner.lora.base_weights import BaseWeights
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.files.base_name import is_same_model
from model_runner.lora.files.quoted import quoted_name
from model_runner.lora.loading import shm_adapter
from model_runner.lora.loading.cpu_limit import bounded
from model_runner.lora.loading.limits import Limits
from model_runner.lora.loading.shm_adapter import Manifest, ShmAdapter
from model_runner.lora.peft.survey import AdapterSurvey, read_survey
from model_runner.platform.device import host_memory


def files_changed(found: str, expected: str) -> AdapterError:
    """Returns the error for an adapter whose files have another hash than when it was loaded."""
    return AdapterError(
        f"its files have changed since it was loaded (revision {found[:12]}, not {expected[:12]}):"
        " load it again, with load_inplace"
    )


def _silent(size: int) -> None:
    """Does nothing: the default of `announce`."""


class AdapterReader:
    """Reads adapters for one model in one dtype, within limits.

    `model` is the model's directory, `served_names` are the names under which the model is served.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        dtype: torch.dtype,
        limits: Limits,
        model: Path | None = None,
        served_names: Sequence[str] = (),
    ) -> None:
        self.base = BaseWeights(model)
        self.catalogue = catalogue
        self.dtype = dtype
        self.limits = limits
        self.served_names = served_names

    def survey(self, directory: Directory) -> AdapterSurvey:
        """Reads and checks the config and headers in `directory`. Raises AdapterError or OSError."""
        with bounded("matching the names in its config"):
            survey = read_survey(directory, self.catalogue)
        self.limits.check(survey, directory.path)
        return survey

    def notes(self, survey: AdapterSurvey) -> list[str]:
        """Returns the survey's notes, and one more if the adapter names another base model than this one."""
        named, model = survey.config.base_model_name_or_path, self.base.directory
        if not named or model is None or is_same_model(named, model, self.served_names):
            return survey.notes
        return [
            *survey.notes,
            f"it was trained on {quoted_name(named)}, and the model served is {quoted_name(str(model))}",
        ]

    def read(self, survey: AdapterSurvey, revision: str = "", announce: Callable[[int], None] = _silent) -> ShmAdapter:
        """Reads the surveyed adapter, whose directory must still be open, into shared memory.

        `revision`, when not empty, must be the hash of its files. `announce` is called with the number of bytes
        to be read, once everything but the values is checked. Raises AdapterError or OSError. Peak memory is the
        adapter and a few copies of one tensor.
        """
        parts, size = shm_adapter.arrange(survey.mappings, self.dtype)
        _, free = host_memory()
        if size > free:
            raise AdapterError(f"it needs {size >> 20} MiB of host memory, and {free >> 20} MiB are free")
        announce(survey.data_bytes)
        descriptor = shm_adapter.allocate(size)
        try:
            memory = shm_adapter.map_memory(descriptor, size)
            found = survey.read(shm_adapter.views(memory, parts, self.catalogue, self.dtype), self.base)
            if revision and found != revision:
                raise files_changed(found, revision)
            manifest = Manifest(found, survey.cast_from(self.dtype), parts, survey.invocation, self.notes(survey))
            return shm_adapter.seal(descriptor, size, manifest)
        except BaseException:
            os.close(descriptor)
            raise
