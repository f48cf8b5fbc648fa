"""Triton kernels: tensors in, tensors out. No types of the project, no device but the tensors' own."""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as every version did so far; 3.9 warns where it is not said
