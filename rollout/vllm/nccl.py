"""NCCL between processes that share no process group of torch's, by vLLM's communicator."""

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup


class NcclGroup:
    """`size` processes, each with a CUDA device of its own, made by all at the same time; rank 0 runs on `host`."""

    def __init__(self, host: str, port: int, size: int, rank: int) -> None:
        self.rank = rank
        with torch.cuda.stream(torch.cuda.current_stream()):  # vLLM would leave another one behind
            group = StatelessProcessGroup.create(host, port, rank, size)
            self._communicator = PyNcclCommunicator(group, torch.cuda.current_device())
        if self._communicator.disabled:  # it would do nothing, and say nothing
            raise RuntimeError("`rollout.placement: split` needs NCCL, which vLLM did not load (VLLM_DISABLE_PYNCCL?)")

    def send(self, buffer: torch.Tensor, rank: int) -> None:
        """Send a buffer (uint8 [bytes]), and wait until it is gone."""
        self._communicator.send(buffer, rank, torch.cuda.current_stream())
        torch.cuda.current_stream().synchronize()

    def receive(self, nbytes: int, rank: int) -> torch.Tensor:
        """What `rank` sends next (uint8 [nbytes]), for this device's current stream."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._communicator.device)
        self._communicator.recv(buffer, rank, torch.cuda.current_stream())
        return buffer
