"""LoRARequest: its field names, and invalid fields."""

from __future__ import annotations

import pytest

from engine import InvalidRequest, LoRARequest


@pytest.mark.parametrize("fields", [("", 1, "p"), ("n", 0, "p"), ("n", 1, "")])
def test_lora_request_with_invalid_fields_is_refused(fields: tuple[str, int, str]) -> None:
    with pytest.raises(InvalidRequest):
        LoRARequest(*fields)


def test_lora_request_has_vllm_and_short_field_names() -> None:
    request = LoRARequest("n", 3, "p")
    assert (request.name, request.adapter_id, request.path) == ("n", 3, "p")
