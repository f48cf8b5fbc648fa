"""Triton kernels: functions of tensors and numbers, on the tensors' device. They do not use the project's types."""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of all triton versions; 3.9 warns if it is unset
