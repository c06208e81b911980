"""The algorithms: losses, advantages, one step of each stage. Torch only: no Ray, no vLLM."""
