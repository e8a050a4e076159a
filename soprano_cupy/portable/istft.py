"""The inverse short-time Fourier transform: windowed frames, overlapped, added and normalised.

Allen and Rabiner (1977), with the squared-window envelope of Griffin and Lim (1984); equals
`torch.istft(center=True)` with a periodic Hann window.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def hann(n_fft: int) -> np.ndarray:
    """The periodic Hann window, (n_fft,) float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


class InverseSTFT:
    """The transform's constants for one window (n_fft,) float64."""

    def __init__(self, window: np.ndarray, hop_length: int, xp: Any, dtype: str) -> None:
        self.n_fft, self.hop_length, self.xp, self.dtype = len(window), hop_length, xp, dtype
        self.window = xp.asarray(window.astype(dtype))
        self._matrix: Array | None = None
        # (n_fft / hop, hop): the squared window's part under each of a hop's overlapping frames.
        self.squares = (window * window).reshape(-1, hop_length)

    def frames(self, spectrum: Array) -> Array:
        """(B, F, n_fft / 2 + 1) complex bins to (B, F, n_fft) windowed samples."""
        if self.xp is np:
            samples = np.fft.irfft(spectrum, self.n_fft, axis=-1).astype(self.dtype, copy=False)
        else:
            samples = self.xp.concatenate((spectrum.real, spectrum.imag), axis=-1) @ self._basis()
        samples *= self.window
        return samples

    def _basis(self) -> Array:
        """(2 bins, n_fft): the inverse transform of real signals as a matrix.

        On a GPU this costs little beside the decoder's other products, and saves the installation of cuFFT.
        """
        if self._matrix is None:
            bins = self.n_fft // 2 + 1
            share = np.full(bins, 2.0 / self.n_fft)
            share[[0, -1]] = 1.0 / self.n_fft  # the two bins that have no mirror image
            turns = np.outer(np.arange(bins), np.arange(self.n_fft)) % self.n_fft
            angles = 2 * np.pi / self.n_fft * turns
            matrix = np.concatenate((np.cos(angles), -np.sin(angles))) * np.tile(share, 2)[:, None]
            self._matrix = self.xp.asarray(matrix.astype(self.dtype))
        return self._matrix

    def envelope(self, hops: np.ndarray, frames: int) -> np.ndarray:
        """Sum of the squared windows over each hop of samples, (len(hops), hop_length).

        Hop h counts from the start of the first frame; `frames` frames exist in all, and hop h lies under
        frames h - n_fft/hop + 1 to h.
        """
        total = np.zeros((len(hops), self.hop_length))
        for part, square in enumerate(self.squares):
            total += np.where((hops >= part) & (hops - part < frames), 1.0, 0.0)[:, None] * square
        return total


class OverlapAdd:
    """The running sum of overlapping frames of `batch` signals, and which samples of it are final."""

    def __init__(self, istft: InverseSTFT, batch: int) -> None:
        self._istft, self._batch = istft, batch
        self._parts = istft.n_fft // istft.hop_length
        self._open = istft.xp.zeros((batch, self._parts - 1, istft.hop_length), istft.dtype)
        self._frames = 0

    def push(self, spectrum: Array) -> Array:
        """Add (B, F, bins) further frames; return (B, samples) that no later frame can change."""
        count = spectrum.shape[1]
        if count == 0:
            return self._istft.xp.empty((self._batch, 0), self._istft.dtype)
        sums = self._add(spectrum)
        self._open = sums[:, count:]
        self._frames += count
        return self._normalise(sums[:, :count], self._frames - count)

    def finish(self) -> Array:
        """The samples that still waited for later frames, up to the middle of the last frame."""
        return self._normalise(self._open, self._frames)

    def _add(self, spectrum: Array) -> Array:
        """Lay the frames over what is open, hop by hop: (B, F + n_fft/hop - 1, hop_length)."""
        istft, count = self._istft, spectrum.shape[1]
        frames = istft.frames(spectrum).reshape(self._batch, count, self._parts, istft.hop_length)
        sums = istft.xp.zeros((self._batch, count + self._parts - 1, istft.hop_length), istft.dtype)
        sums[:, : self._parts - 1] = self._open
        for part in range(self._parts):
            sums[:, part : part + count] += frames[:, :, part]
        return sums

    def _normalise(self, sums: Array, first_hop: int) -> Array:
        """Divide hops by their envelope and drop the half frame before the signal's start and after its end."""
        hops = np.arange(first_hop, first_hop + sums.shape[1])
        margin = self._parts // 2
        kept = (hops >= margin) & (hops < self._frames + margin - 1)
        envelope = self._istft.envelope(hops[kept], self._frames).astype(self._istft.dtype)
        result = sums[:, self._istft.xp.asarray(np.flatnonzero(kept))] / self._istft.xp.asarray(envelope)
        return result.reshape(self._batch, -1)
