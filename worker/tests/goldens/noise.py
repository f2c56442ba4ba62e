"""The initial noise of an image from its seed, as `worker/src/noise.rs` documents it. Needs numpy and the `openssl` program."""

import math
import struct
import subprocess

import numpy as np


def normal(seed, count):
    """`noise::normal`: ChaCha20 words, 53 bits each, through Box-Muller."""
    pairs = (count + 1) // 2
    stream = subprocess.run(
        ["openssl", "enc", "-chacha20", "-K", struct.pack("<Q24x", seed).hex(), "-iv", "0" * 32],
        input=bytes(16 * pairs), capture_output=True, check=True,
    ).stdout
    unit = (np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) / 2.0**53
    radius, angle = np.sqrt(-2.0 * np.log(1.0 - unit[0::2])), 2.0 * math.pi * unit[1::2]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    return values[:count].astype(np.float32)
