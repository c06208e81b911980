"""Ray actors that hold one policy in two layouts: training (FSDP2) and rollout (vLLM)."""
