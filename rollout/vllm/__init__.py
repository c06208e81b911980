"""The one door to vLLM. Nothing here imports vLLM until `rollout.vllm.engine` is imported."""
