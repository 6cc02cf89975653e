"""What trials are judged by: size, speed and quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.hookspecs import hookimpl
from workbench_metrics import predicted, quality, recall, speed, static

if TYPE_CHECKING:
    from workbench.hookspecs import Register
    from workbench.metric import Metric


@hookimpl
def register_metrics(register: Register[type[Metric]]) -> None:
    register("parameters", static.Parameters)
    register("active_parameters", static.ActiveParameters)
    register("weight_bytes", static.WeightBytes)
    register("state_bytes", static.StateBytes)
    register("memory_bytes", static.MemoryBytes)
    register("forward_flops", static.ForwardFlops)
    register("decode_flops", static.DecodeFlops)
    register("decode_ms", speed.DecodeMilliseconds)
    register("prefill_ms", speed.PrefillMilliseconds)
    register("tokens_per_second", speed.TokensPerSecond)
    register("ttft_ms", speed.TimeToFirstToken)
    register("tpot_ms", speed.TimePerOutputToken)
    register("generation_tokens_per_second", speed.GenerationTokensPerSecond)
    register("peak_memory_bytes", speed.PeakMemoryBytes)
    register("predicted_decode_ms", predicted.PredictedDecodeMilliseconds)
    register("predicted_prefill_ms", predicted.PredictedPrefillMilliseconds)
    register("mqar_recall", recall.MultiQueryRecallShare)
    register("bits_per_byte_unquantized", quality.BitsPerByteUnquantized)
    register("bits_per_byte", quality.BitsPerByte)
    register("perplexity", quality.Perplexity)
    register("accuracy", quality.Accuracy)
