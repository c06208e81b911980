"""Weights into the live engine through vLLM's own weight-transfer interface, from flat buffers, checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollout.vllm import faults
from rollout.weights import HandoverError, Parcel, whole_tensors

BACKEND = "parcels"


@dataclass
class ParcelUpdate(WeightTransferUpdateInfo):
    """A bucket of a hand-over. parcels: what every training rank sends of its tensors. last: the hand-over is whole."""

    parcels: Sequence[Parcel]
    last: bool


class ParcelEngine(WeightTransferEngine[WeightTransferInitInfo, ParcelUpdate]):
    """Receives the model's tensors bucket by bucket, under their checkpoint names, and reloads layer by layer."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = ParcelUpdate

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing to connect: parcels come from the process itself."""

    def start_weight_update(self) -> None:
        """Make every layer ready to be filled anew."""
        self._loaded, self._arrived, self._versions = set[str](), set[str](), set[int]()
        if self.device.type == "cpu":
            faults.repack_experts(self.model)
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive; wait for the device only where there is one (vLLM 0.25 waits for any, and fails on the CPU)."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ParcelUpdate) -> None:
        """Load a bucket's tensors. Raises HandoverError with the name of the check that failed. After an error the
        engine's layers are whole again, but hold a mixture: only a complete hand-over mends them."""
        try:
            with set_current_vllm_config(self.vllm_config):
                self._load(update_info.parcels, update_info.last)
        except BaseException:
            self.finish_weight_update()
            raise

    def finish_weight_update(self) -> None:
        """Rebuild what is derived from the weights (MLA's absorbed matrices, a tied output layer)."""
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                faults.repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """vLLM before 0.32 asks for it; the trainer hands over a buffer and sends nothing."""
        raise TypeError("a parcel is handed over by VllmEngine.update_weights; nothing is sent")

    def _load(self, parcels: Sequence[Parcel], last: bool) -> None:
        self._versions |= {parcel.manifest.version for parcel in parcels}
        if len(self._versions) > 1:
            raise HandoverError(f"version: buffers of hand-overs {sorted(self._versions)} arrived as one")
        waiting = {piece.name for parcel in parcels for piece in parcel.manifest.pieces}
        if twice := waiting & self._arrived:
            raise HandoverError(f"duplicate: tensor {min(twice)} had arrived in an earlier bucket")
        self._arrived |= waiting

        def arrivals() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in whole_tensors(parcels):
                waiting.remove(name)
                yield name, tensor

        self._loaded |= self.model.load_weights(arrivals()) or set()
        if waiting:
            raise HandoverError(f"delivery: the engine never took tensor {min(waiting)} ({len(waiting)} in all)")
        if missing := faults.uncovered(self.model, self._loaded) if last else ():
            raise HandoverError(f"coverage: parameter {missing[0]} got no weights, or not all ({len(missing)} in all)")


WeightTransferEngineFactory.register_engine(BACKEND, ParcelEngine)
