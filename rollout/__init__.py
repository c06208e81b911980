"""Trajectories, prompts and the sampler's protocol; vLLM lives behind `rollout.vllm` alone."""
