"""A decoder's weights as its kernels read them: matrices rounded to float16, everything else in float32.

float16 has the mantissa of TF32 at twice the speed; what it lacks is range, which ends at 65,504. The largest values of
everything that is rounded to it, measured:

                                                     bundled voice    random 80M
    states, into the embedding                           52.2             8.6
    norms of the blocks, into the expanding product      10.9            13.6
    GELU, into the contracting product                   35.6             5.7
    final norm, into the head's product                   8.0             5.3
    weights (embedding, expand, contract, head)           1.12            0.25

(24 sentences, 1,155 states of the voice's own language model; 512 states of the random 80M's.) So nothing is scaled. Of
the samples 68 to 71 dB and 62 to 63 dB are left, of which the rounding of the weights alone allows 75 and 65.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..checkpoint import TensorFile
from ..config import DecoderConfig
from ..errors import DeviceError
from ..portable.vocos import stored_window

HOPS = 4  # of a window


class HostWeights:
    """All weights on the host by name, in `arrays`: matrices are (features, depth) float16, the rest float32.

    Folded in before anything is rounded: each block's gamma, into its second matrix and bias. The head has n_fft rows
    in place of n_fft + 2: for every bin below n_fft / 2 log2 of its magnitude, then its phase in turns, so that the
    exponential is one instruction and phases of any size lose their whole turns exactly. The bins 0 and n_fft / 2 are
    zero in this model whatever the head says.
    """

    def __init__(self, file: TensorFile, config: DecoderConfig) -> None:
        self._file, self._config = file, config
        self.arrays: dict[str, np.ndarray] = {}
        c, dim = config, config.dim
        # (dim, input, taps) to (dim, taps * input): the frames of a window side by side
        embed = file.pop("decoder.embed.weight", (dim, c.input_size, c.embed_kernel)).transpose(0, 2, 1)
        self._matrix("embed", embed.reshape(dim, -1), file.pop("decoder.embed.bias", (dim,)))
        self._norm("embed", "decoder.norm")
        for index in range(c.num_blocks):
            self._block(index, f"decoder.convnext.{index}.")
        self._norm("head", "decoder.final_layer_norm")
        self._matrix("head", *self._head())
        self._transform(stored_window(file, c.n_fft))
        file.finish()

    def matrices(self) -> Iterator[str]:
        """The names of the matrices."""
        return (name for name in self.arrays if name.endswith(".weight"))

    def _matrix(self, name: str, weight: np.ndarray, bias: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            rounded = np.ascontiguousarray(weight, np.float16)
        if not np.isfinite(rounded).all():
            raise DeviceError(
                f"{self._file.path}: the matrix {name} holds values up to {np.abs(weight).max():.3g}, beyond float16; "
                "choose dtype float32"
            )
        self.arrays[f"{name}.weight"] = rounded
        self.arrays[f"{name}.bias"] = np.ascontiguousarray(bias, np.float32)

    def _norm(self, name: str, prefix: str) -> None:
        for part, kept in (("weight", "gain"), ("bias", "shift")):
            self.arrays[f"{name}.{kept}"] = self._file.pop(f"{prefix}.{part}", (self._config.dim,))

    def _block(self, index: int, prefix: str) -> None:
        c, pop, name = self._config, self._file.pop, f"block{index}"
        taps = pop(prefix + "dwconv.weight", (c.dim, 1, c.block_kernel))
        self.arrays[f"{name}.taps"] = np.ascontiguousarray(taps[:, 0].T)
        self.arrays[f"{name}.bias"] = pop(prefix + "dwconv.bias", (c.dim,))
        self._norm(name, prefix + "norm")
        self._matrix(
            f"{name}.expand",
            pop(prefix + "pwconv1.weight", (c.intermediate_size, c.dim)),
            pop(prefix + "pwconv1.bias", (c.intermediate_size,)),
        )
        gamma = pop(prefix + "gamma", (c.dim,))
        contract = pop(prefix + "pwconv2.weight", (c.dim, c.intermediate_size))
        self._matrix(f"{name}.contract", contract * gamma[:, None], pop(prefix + "pwconv2.bias", (c.dim,)) * gamma)

    def _head(self) -> tuple[np.ndarray, np.ndarray]:
        c, bins = self._config, self._config.num_bins
        weight = self._file.pop("head.out.weight", (c.n_fft + 2, c.dim))
        bias = self._file.pop("head.out.bias", (c.n_fft + 2,))[:, None]
        units = np.array([1 / math.log(2), 0.5 / math.pi], np.float32)  # log2 and turns from e and radians
        both = [np.stack((x[: bins - 1], x[bins:-1]), 1) * units[None, :, None] for x in (weight, bias)]
        for x in both:
            x[0] = 0  # bin 0
        return both[0].reshape(c.n_fft, c.dim), both[1].reshape(c.n_fft)

    def _transform(self, window: np.ndarray) -> None:
        """The inverse transform's constants; `kernels/vocos_params.cuh` says what each is."""
        n_fft = self._config.n_fft
        self.arrays["window"] = (window / n_fft).astype(np.float32)
        self.arrays["inverse"] = inverse_envelopes(window).astype(np.float32)
        angles = 2 * np.pi * np.arange(n_fft // 2) / n_fft
        self.arrays["roots"] = np.stack((np.cos(angles), np.sin(angles)), 1).astype(np.float32)


def inverse_envelopes(window: np.ndarray) -> np.ndarray:
    """(16, hop): 1 / sum of the squared windows over a hop, for each set of the frames that exist there.

    Bit p of the first index is the frame whose part p lies over the hop. 0 where there is nothing to divide by.
    """
    squares = (window * window).reshape(HOPS, -1)
    sets = (np.arange(1 << HOPS)[:, None] >> np.arange(HOPS)) & 1
    sums = sets @ squares
    inverse: np.ndarray = np.zeros(sums.shape)
    np.divide(1.0, sums, out=inverse, where=sums > 0)
    return inverse
