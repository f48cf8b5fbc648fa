"""Each flag and alias sets its field; each mistake is a one-line error that names the flag."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from engine.config.flags.parser import parse
from engine.config.flags.refused import NOT_YET_AVAILABLE, REFUSED
from engine.config.server_args import ServerArgs
from engine.errors import ConfigError

ACCEPTED = [
    (["demo"], {"model_path": "demo"}),
    (["--model-path", "m"], {"model_path": "m"}),
    (["--model", "m"], {"model_path": "m"}),
    (["m", "--model", "m"], {"model_path": "m"}),
    (["--tokenizer-path", "t"], {"tokenizer_path": "t"}),
    (["--tokenizer", "org/name@v1"], {"tokenizer_path": "org/name@v1"}),
    (["--host", "0.0.0.0", "--port", "0"], {"host": "0.0.0.0", "port": 0}),
    (["--device", "cpu"], {"device": "cpu"}),
    (["--dtype", "half"], {"dtype": "float16"}),
    (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    (["--attention-backend", "triton"], {"attention_backend": "triton"}),
    (["--cpu-kernels", "on"], {"cpu_kernels": "on"}),
    (["--cpu-kernels", "off"], {"cpu_kernels": "off"}),
    (["--enable-torch-compile"], {"cpu_kernels": "on"}),
    (["--cpu-threads", "3"], {"cpu_threads": 3}),
    (["--enable-lora"], {"enable_lora": True}),
    (["--no-enable-lora"], {"enable_lora": False}),
    (["--lora-paths", "a=x", "b=y"], {"lora_paths": ["a=x", "b=y"]}),
    (["--lora-modules", "a=x", "--lora-paths", "b=y"], {"lora_paths": ["a=x", "b=y"]}),
    (["--max-loras-per-batch", "3"], {"max_loras_per_batch": 3}),
    (["--max-loras", "3"], {"max_loras_per_batch": 3}),
    (["--max-lora-rank", "512"], {"max_lora_rank": 512}),
    (["--lora-target-modules", "q_proj", "v_proj"], {"lora_target_modules": ["q_proj", "v_proj"]}),
    (["--lora-backend", "torch"], {"lora_backend": "torch"}),
    (["--lora-backend", "triton"], {"lora_backend": "triton"}),
    (["--lora-backend", "csgmv"], {"lora_backend": "csgmv"}),
    (["--max-lora-chunk-size", "128"], {"max_lora_chunk_size": 128}),
    (["--lora-dtype", "fp32"], {"lora_dtype": "float32"}),
    (["--no-enable-lora-bias"], {"enable_lora_bias": False}),
    (["--lora-extra-vocab-size", "0"], {"lora_extra_vocab_size": 0}),
    (["--lora-target-modules", "all", "lm_head"], {"lora_target_modules": ["all", "lm_head"]}),
    (["--max-num-batched-tokens", "64"], {"max_num_batched_tokens": 64}),
    (["--chunked-prefill-size", "64"], {"max_num_batched_tokens": 64}),
    (["--max-prefill-tokens", "128"], {"max_prefill_tokens": 128}),
    (["--lora-max-wait", "0.5"], {"lora_max_wait": 0.5}),
    (["--schedule-policy", "fair"], {"schedule_policy": "fair"}),
    (["--scheduling-policy", "priority"], {"schedule_policy": "priority"}),
    (
        ["--schedule-policy", "fair", "--tenant-weights", "a=2", "b=1"],
        {"schedule_policy": "fair", "tenant_weights": ["a=2", "b=1"]},
    ),
    (["--max-running-requests", "7"], {"max_running_requests": 7}),
    (["--max-num-seqs", "7"], {"max_running_requests": 7}),
    (["--mem-fraction-static", "0.5"], {"mem_fraction_static": 0.5}),
    (["--gpu-memory-utilization", "0.5"], {"mem_fraction_static": 0.5}),
    (["--context-length", "99"], {"context_length": 99}),
    (["--max-model-len", "99"], {"context_length": 99}),
    (["--page-size", "1"], {"page_size": 1}),
    (["--block-size", "32"], {"page_size": 32}),
    (["--max-total-tokens", "4096"], {"max_total_tokens": 4096}),
    (["--disable-radix-cache"], {"disable_radix_cache": True}),
    (["--no-enable-prefix-caching"], {"disable_radix_cache": True}),
    (["--enable-prefix-caching"], {}),
    (["--served-model-name", "a", "b"], {"served_model_name": ["a", "b"]}),
    (["--chat-template", "t.jinja"], {"chat_template": "t.jinja"}),
    (["--seed", "5"], {"seed": 5}),
    (["--random-seed", "5"], {"seed": 5}),
    (["--log-level", "debug"], {"log_level": "debug"}),
    (["--tp-size", "1"], {}),
    (["--lora-pool-size", "2GiB"], {"lora_pool_size": "2GiB"}),
    (["--lora-eviction-policy", "fifo"], {"lora_eviction_policy": "fifo"}),
    (["--max-loaded-loras", "20"], {"max_loaded_loras": 20}),
    (["--max-cpu-loras", "20"], {"max_loaded_loras": 20}),
    (["--lora-host-memory", "1GB"], {"lora_host_memory": "1GB"}),
    (["--lora-root", "a", "b"], {"lora_root": ["a", "b"]}),
    (["--lora-resolve-root", "a"], {"lora_resolve_root": "a"}),
    (["--allow-runtime-lora-updating"], {"allow_runtime_lora_updating": True}),
    (["--admin-api-key", "k"], {"admin_api_key": "k"}),
    (["--tensor-parallel-size", "1"], {}),
    (["--cuda-graph-max-bs", "32"], {"cuda_graph_max_bs": 32}),
    (["--disable-cuda-graph"], {"disable_cuda_graph": True}),
    (["--enforce-eager"], {"disable_cuda_graph": True}),
    (["--disable-overlap-schedule"], {"disable_overlap_schedule": True}),
    (["--no-async-scheduling"], {"disable_overlap_schedule": True}),
]

BAD_COMMAND_LINES = [
    (["--port", "70000"], "--port 70000"),
    (["--port", "http"], "--port"),
    (["--max-loras-per-batch", "0"], "--max-loras-per-batch 0"),
    (["--max-lora-rank", "513"], "--max-lora-rank 513"),
    (["--lora-max-wait", "0"], "--lora-max-wait 0"),
    (["--schedule-policy", "lpm"], "lpm: prefixes are shared whatever the order"),
    (["--schedule-policy", "dfs-weight"], "dfs-weight"),
    (["--schedule-policy", "lof"], "lof"),
    (["--schedule-policy", "random"], "random: the order is never left to chance"),
    (["--schedule-policy", "best"], "--schedule-policy"),
    (["--tenant-weights", "a=2"], "--tenant-weights"),
    (["--max-prefill-tokens", "0"], "--max-prefill-tokens 0"),
    (["--mem-fraction-static", "0"], "--mem-fraction-static 0"),
    (["--mem-fraction-static", "nan"], "--mem-fraction-static nan"),
    (["--tp-size", "2"], "--tp-size 2"),
    (["--seed", "-1"], "--seed -1"),
    (["--attention-backend", "flashinfer"], "flashinfer: its kernels are not served"),
    (["--attention-backend", "magic"], "--attention-backend"),
    (["--cpu-kernels", "yes"], "--cpu-kernels"),
    (["--cpu-threads", "0"], "--cpu-threads 0"),
    (["--context-length", "1"], "--context-length 1"),
    (["--page-size", "0"], "--page-size 0"),
    (["--max-total-tokens", "0"], "--max-total-tokens 0"),
    (["--enable-prefix-caching", "--disable-radix-cache"], "--disable-radix-cache"),
    (["--served-model-name", "a", "a"], "--served-model-name: a"),
    (["--max-loaded-loras", "4"], "--max-loaded-loras 4"),
    (["--lora-eviction-policy", "random"], "--lora-eviction-policy"),
    (["--no-enable-lora", "--lora-pool-size", "4"], "--no-enable-lora contradicts --lora-pool-size"),
    (["--no-enable-lora", "--lora-paths", "a=b"], "--no-enable-lora contradicts --lora-paths"),
    (["--no-enable-lora", "--max-lora-rank", "8"], "--no-enable-lora contradicts"),
    (["--lora-backend", "magic"], "--lora-backend"),
    (["--max-lora-chunk-size", "48"], "--max-lora-chunk-size 48"),
    (["--max-lora-chunk-size", "256"], "--max-lora-chunk-size 256"),
    (["--served-model-name", ""], "--served-model-name"),
    (["--cuda-graph-max-bs", "0"], "--cuda-graph-max-bs 0"),
    (["--enforce-eager", "--cuda-graph-max-bs", "8"], "--disable-cuda-graph contradicts --cuda-graph-max-bs"),
    (["one", "two"], "two"),
    (["one", "--model", "two"], "given twice"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--max-lora", "3"], "--max-lora"),  # a prefix of a flag is not accepted
]


@pytest.mark.parametrize(("argv", "fields"), ACCEPTED, ids=lambda value: " ".join(value) if value else "")
def test_flag_sets_its_field(argv: list[str], fields: dict[str, object]) -> None:
    assert parse(argv) == ServerArgs(**fields)


@pytest.mark.parametrize(
    ("argv", "words"), BAD_COMMAND_LINES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_bad_flag_is_a_one_line_error_that_names_it(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("flag", [*NOT_YET_AVAILABLE, *REFUSED])
@pytest.mark.parametrize("value", [[], ["3"]], ids=["alone", "with value"])
def test_unavailable_flag_says_so(flag: str, value: list[str]) -> None:
    with pytest.raises(ConfigError, match=flag):
        parse([flag, *value])


def test_environment_variables_set_admin_key_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_ADMIN_API_KEY", "secret")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    assert parse([]) == ServerArgs(admin_api_key="secret", allow_runtime_lora_updating=True)
    assert parse(["--admin-api-key", "other"]).admin_api_key == "other"


def test_help_imports_no_torch() -> None:
    probe = (
        "import sys, runpy\n"
        "sys.argv = ['engine.launch', '--help']\n"
        "try: runpy.run_module('engine.launch', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'triton', 'aiohttp', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "--max-loras-per-batch" in done.stdout
    assert time.monotonic() - started < 30  # detects a hang; this is no benchmark


def test_bad_flag_ends_the_launch_with_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine.launch", "--quantization", "awq"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == ["chorus: --quantization is refused: quantized bases are not served yet"]
