"""vLLM in the caller's own process, driven request by request."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from vllm import EngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from rollout.config import RolloutConfig, routed_experts
from rollout.sampler import Request, Sample, TokenScores
from rollout.types import Trajectory, VersionSpan
from rollout.vllm import faults, transfer
from rollout.vllm.environment import environment, installed
from rollout.vllm.sleep import Sleep
from rollout.weights import Parcel

ALIKE = {"flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}  # of all requests


class VllmEngine:
    """One vLLM engine, or a rank of one. model_dir: a Transformers directory; with `dummy`, its weights are not read.
    seed: of requests without a seed of their own. routes: the experts of every token are needed, not only welcome.
    sleeps: `give_up` and `hold` will be called.

    Where `config.world` is above 1, every rank makes the same calls at the same time: the ranks of a tensor-parallel
    group with the same requests, `config.data` such groups with requests of their own (or none).
    Raises ValueError for a configuration that this vLLM cannot run, RuntimeError where the process was not
    started with `environment(config)`."""

    def __init__(
        self, model_dir: Path, config: RolloutConfig, *, seed: int = 0, dummy: bool = False, routes: bool = False,
        sleeps: bool = False,
    ) -> None:  # fmt: skip
        needed = environment(config, int(os.environ.get("RANK", "0")))
        if unset := {name for name, value in needed.items() if os.environ.get(name) != value}:
            raise RuntimeError(f"start this process with rollout.vllm.environment.environment(config): {sorted(unset)}")
        text_config = AutoConfig.from_pretrained(model_dir).get_text_config()
        if hasattr(text_config, "max_position_embeddings") and config.max_length > text_config.max_position_embeddings:
            raise ValueError(
                f"rollout.max_length is {config.max_length}; the model in {model_dir} takes at most"
                f" {text_config.max_position_embeddings} tokens (max_position_embeddings)"
            )
        self.max_length = config.max_length
        options = faults.engine_options(config, installed())
        if config.world > 1 and installed().device == "cpu":
            faults.mend_parallel()
        told = self._tells_routes(text_config, config.eager, routes)
        if installed().device == "cuda":
            options |= {"enable_return_routed_experts": told and routes, "enable_sleep_mode": sleeps}
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model_dir),
                dtype=config.dtype,
                seed=seed,
                load_format="dummy" if dummy else "auto",
                # One more than the longest sequence: `score` has vLLM generate a token that nobody reads.
                max_model_len=config.max_length + 1,
                max_num_seqs=config.max_num_seqs,
                tensor_parallel_size=config.tensor,
                data_parallel_size=config.data,
                enable_expert_parallel=config.expert,
                distributed_executor_backend="external_launcher" if config.world > 1 else None,
                enforce_eager=config.eager,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=transfer.BACKEND),
                disable_log_stats=True,
                **options,
            ),
            usage_context=UsageContext.LLM_CLASS,
        )
        self._recorder = None
        if told and installed().device == "cpu":
            from rollout.vllm.routes import RouteRecorder

            (runner,) = self._llm.collective_rpc(lambda worker: worker.model_runner)
            self._recorder = RouteRecorder(runner, options["block_size"])
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        # Of the weights inside: 0 for those of the model's directory, None when there are none to trust.
        self._version = None if dummy else 0
        self._sleep = Sleep(self._llm, installed().device)

    def _tells_routes(self, text_config: PreTrainedConfig, eager: bool, needed: bool) -> bool:
        """Whether this vLLM can say which experts it chose. Raises ValueError where it cannot and they are needed."""
        found, cannot = installed(), ""
        if routed_experts(text_config.to_dict()) < 2:
            cannot = "the model has no routed experts"
        elif found.device == "cpu" and not eager:
            cannot = "compiled layers do not tell them on the CPU (rollout.eager is false)"
        elif found.device == "cpu" and found.version < (0, 32):
            cannot = "vLLM's CPU build tells them from 0.32 on"
        if needed and cannot:
            raise ValueError(f"train.routing_replay needs the experts that vLLM chose: {cannot}")
        return not cannot

    def give_up(self) -> dict[str, int]:
        """Give the memory of weights and KV cache up; bytes of "weights" and "KV cache"."""
        self._version = None
        return self._sleep.give_up()

    def hold(self, names: Iterable[str]) -> None:
        """Have memory for these of "weights" and "KV cache", and for no other. Where any was given up, the next
        generation needs a hand-over first, and all of the memory when it runs."""
        if self._sleep.hold(names):
            self._version = None

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Sample]]:
        """Yield the samples that finished at each engine step; closing the iterator aborts the others. A completion is
        cut where prompt and completion fill `max_length`. Raises, at its first step, ValueError for a prompt without
        room, RuntimeError while an earlier iterator is still open."""
        params = [self._sampling_params(index, request) for index, request in enumerate(requests)]
        version, record = self._version, any(request.routes for request in requests)
        for finished in self._run([request.prompt for request in requests], params, record=record):
            token_ids = [output.outputs[0].token_ids for _, output in finished]
            texts = self._tokenizer.decode(token_ids, skip_special_tokens=True)
            samples = []
            for (index, output), text in zip(finished, texts, strict=True):
                text = faults.cut_at_stop(index, output, text, requests[index].stop)
                samples.append(Sample(index, text, self._trajectory(index, output, version, record)))
            yield samples

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        """Log-probabilities at temperature 1 of given token sequences, in their order. Raises ValueError for an empty
        or too long one."""
        for index, sequence in enumerate(sequences):
            if not 0 < len(sequence) <= self.max_length:
                raise ValueError(
                    f"sequence {index} has {len(sequence)} tokens; it must have at least one, and at most"
                    f" {self.max_length} (rollout.max_length)"
                )
        scores = {}
        for index, output in self._read(sequences, prompt_logprobs=0):
            flat = output.prompt_logprobs
            logprobs = np.array([np.nan, *flat.logprobs], np.float32)
            scores[index] = TokenScores(logprobs, np.array([False, *(rank == 1 for rank in flat.ranks)]))
        return [scores[index] for index in range(len(sequences))]

    def canary(self, prompts: Sequence[np.ndarray], top: int) -> list[dict[int, float]]:
        """For each prompt, token id -> log-probability at temperature 1 of its `top` likeliest next tokens. One greedy
        step over the batch, and it reads the prefix cache, so that stale prefixes show too."""
        flat = {index: output.outputs[0].logprobs for index, output in self._read(prompts, logprobs=top)}
        return [dict(zip(flat[i].token_ids, flat[i].logprobs, strict=True)) for i in range(len(prompts))]

    def _read(self, sequences: Sequence[np.ndarray], **asked: int) -> Iterator[tuple[int, RequestOutput]]:
        """Have each sequence read, and one greedy token generated; what was `asked` of it, with its index."""
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **asked, **ALIKE)
        return chain.from_iterable(self._run(sequences, [params] * len(sequences)))

    def update_weights(self, parcels: Sequence[Parcel], *, first: bool = True, last: bool = True) -> None:
        """Take over the checkpoint-named tensors of one bucket, in place; several make a hand-over, from the `first` to
        the `last`. Raises HandoverError with the name of the check that failed (version, shards, digest, duplicate,
        delivery, coverage, prefix cache); the engine then refuses to generate until a hand-over succeeds."""
        if first and self._llm.has_unfinished_requests():
            raise RuntimeError("weights cannot change while requests run: exhaust or close the iterator first")
        self._version = None
        if parcels:
            self._arriving = parcels[0].manifest.version
        if first:
            self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", kwargs={"update_info": {"parcels": parcels, "last": last}})
        if not last:
            return
        self._llm.collective_rpc("finish_weight_update")
        faults.forget_prefixes(self._llm)
        if self._recorder is not None:
            self._recorder.forget()
        self._version = self._arriving

    def _run(
        self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams], *, record: bool = False
    ) -> Iterator[list[tuple[int, RequestOutput]]]:
        """Add every request, then step; yield what finished at each step, with its index. Closing aborts the rest.
        record: the experts of these requests' tokens will be asked for."""
        if self._version is None:
            raise RuntimeError("this engine holds no weights: it was started without, or its last hand-over failed")
        if self._llm.has_unfinished_requests():
            raise RuntimeError("this engine is still generating: exhaust or close the earlier iterator first")
        if self._recorder is not None and record:
            self._recorder.begin(prompts, [param.max_tokens for param in params])
        waiting: set[str] = set()
        now = time.time()
        try:
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                self._llm.add_request(str(index), tokens_input(prompt.tolist()), param, arrival_time=now)
                waiting.add(str(index))
            # A rank of a data-parallel engine goes on, without requests of its own, until the others have none.
            while self._llm.has_unfinished_requests():
                finished = [(int(output.request_id), output) for output in self._llm.step()]
                waiting.difference_update(str(index) for index, _ in finished)
                if finished:
                    yield finished
        finally:
            if waiting:
                self._llm.abort_request(list(waiting))
            if self._recorder is not None:
                self._recorder.end()

    def _sampling_params(self, index: int, request: Request) -> SamplingParams:
        room = self.max_length - len(request.prompt)
        if not 0 < len(request.prompt) < self.max_length:
            raise ValueError(
                f"request {index}: its prompt has {len(request.prompt)} tokens; it must have at least one, and at most"
                f" {self.max_length - 1}, which leaves room for one more in rollout.max_length ({self.max_length})"
            )
        if request.max_tokens < 1:
            raise ValueError(f"request {index}: max_tokens is {request.max_tokens}, it must be at least 1")
        return SamplingParams(
            max_tokens=min(request.max_tokens, room),
            temperature=request.temperature,
            seed=request.seed,
            stop=list(request.stop) or None,
            ignore_eos=request.ignore_eos,
            logprobs=0 if request.logprobs else None,
            detokenize=bool(request.stop),
            skip_clone=True,
            **ALIKE,
        )

    def _trajectory(self, index: int, output: RequestOutput, version: int, record: bool) -> Trajectory:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {output.request_id} with {completion.finish_reason!r}")
        start, end = len(output.prompt_token_ids), len(output.prompt_token_ids) + len(completion.token_ids)
        logprobs = np.full(end, np.nan, np.float32)
        if completion.logprobs is not None:
            logprobs[start:] = completion.logprobs.logprobs
        routes = None
        if record:
            routes = completion.routed_experts if self._recorder is None else self._recorder.take(index, end)
        return Trajectory(
            token_ids=np.array([*output.prompt_token_ids, *completion.token_ids], np.int32),
            loss_mask=np.arange(end) >= start,
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            version_spans=(VersionSpan(version, start, end),),
            routes=None if routes is None else np.asarray(routes[: end - 1], np.int16),
        )
