"""What a step costs a stage of the synthetic 70B: a roofline of one consumer GPU. Pure.

The default is one card of the RTX 4090 class that holds layers of a Llama-3-70B in 4-bit. Per layer, from the
model's published shape (hidden 8192, 8 key/value heads of 128, intermediate 28672):

    parameters       8192·8192·2 (query, output) + 8192·1024·2 (key, value) + 8192·28672·3 (MLP) = 856 million
    weights          856 million × half a byte = 428 MB, 437 MB with scales: half a byte and 2 %
    reading them     437 MB ÷ 1 TB/s (NVIDIA's Ada architecture paper: 1,008 GB/s) = 0.437 ms; 17.5 ms for 40 layers
    computing        2 × 856 million = 1.71 GFLOP a token ÷ 100 TFLOP/s = 17 µs; 0.68 ms for 40 layers. The same paper
                     gives 165 TFLOP/s (fp16 tensor cores, fp32 sums, dense); 100 is six tenths of that
    keys and values  2 × 8 × 128 × 2 bytes = 4 KiB a token of context ÷ 1 TB/s = 4.1 ns
    a step           1 ms for launching kernels and for the host, whatever the number of layers

Reading and computing overlap (Williams et al., Roofline, 2009), so the longer of the two counts; up to 25 tokens a
step cost as much as one, which is where 4-bit kernels such as Marlin (Frantar et al., 2024) cease to be bound by
memory. The figures are round on purpose: they describe a kind of machine, not a card that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.bounds import StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """Seconds of a step, per layer but for the overhead."""

    layer_read_s: float = 0.4375e-3
    """Reading a layer's weights once."""
    layer_token_s: float = 17e-6
    """Computing a token."""
    layer_context_s: float = 4.1e-9
    """Reading the keys and values of a token of context."""
    overhead_s: float = 1e-3
    """Of a step."""

    def __post_init__(self) -> None:
        if min(self.layer_read_s, self.layer_token_s, self.layer_context_s, self.overhead_s) < 0:
            raise ValueError(f"no part of a cost is below 0: {self}")

    def stage(self, layers: int) -> StepCost:
        """What `layers` cost, as `bounds` asks for it."""

        def cost_s(tokens: float, _sequences: float, context_tokens: float) -> float:
            return self.step_s(layers=layers, tokens=tokens, context_tokens=context_tokens)

        return cost_s

    def step_s(self, *, layers: int, tokens: float, context_tokens: float) -> float:
        """How long `layers` take for a step of `tokens`, whose sequences have `context_tokens` in all behind them.

        Nothing for a step without tokens.
        """
        if tokens <= 0:
            return 0.0
        weights_s = max(self.layer_read_s, tokens * self.layer_token_s)
        return layers * (weights_s + context_tokens * self.layer_context_s) + self.overhead_s
