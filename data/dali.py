"""The DALI decoder: JPEG bytes and crop windows to resized images, on the GPU where there is one.

Only decoding, cropping and resizing are DALI's. The order of samples, the check of every payload and the windows come
from the loader, because a DALI reader loses the whole batch to one bad image and cannot resume on another world size.
The graph is the same without a GPU, where the tests run it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from .images import CropWindow, check_image, crop_and_resize, decode_image


class DaliDecoder:
    """Decodes, crops and resizes (bicubic, antialiased) up to ``batch`` images at a time.

    ``device_id`` is the CUDA device, or None for the CPU operators. ``hw_decoder_load`` is the part of the baseline
    JPEGs of a batch that a GPU's JPEG engine gets; the best value has not been measured yet. Not thread-safe.
    """

    # Bounds the memory of the decoded images: 128 of 512 x 384 pixels are 75 MB.
    batch = 128

    def __init__(self, image_size: int, *, threads: int, device_id: int | None, hw_decoder_load: float) -> None:
        self._pipeline = Pipeline(self.batch, threads, device_id, prefetch_queue_depth=1)
        with self._pipeline:
            images = fn.decoders.image_slice(
                fn.external_source(name="payloads", dtype=types.UINT8, ndim=1),
                start=fn.external_source(name="starts", dtype=types.INT32, ndim=1),
                shape=fn.external_source(name="shapes", dtype=types.INT32, ndim=1),
                axis_names="HW",
                device="cpu" if device_id is None else "mixed",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg does by default
                hw_decoder_load=hw_decoder_load,
            )
            size = [image_size, image_size]
            images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            self._pipeline.set_outputs(images)
        self._pipeline.build()

    def decode(
        self,
        payloads: Sequence[bytes],
        windows: Sequence[CropWindow],
        images: torch.Tensor,
        rows: Sequence[int],
        *,
        are_plain: bool = False,
    ) -> None:
        """Write images into ``rows`` of ``images`` uint8 [N, S, S, 3], on the decoder's device; at most ``batch``.

        ``are_plain`` says that all are known to be JPEGs that DALI reads as it should (``ImageHeader.is_plain_jpeg``).
        Otherwise they are checked, and the cpu decoder takes the others, one after the other. On a GPU the images are
        complete when this returns: the host waits for the current stream.

        Raises:
            RuntimeError: at least one image does not decode; DALI does not always say which. The decoder stays usable.
            BadImage: the check refuses an image, or the cpu decoder does.
        """
        if not are_plain:
            plain = []
            for payload, window, row in zip(payloads, windows, rows, strict=True):
                if check_image(payload).is_plain_jpeg:
                    plain.append((payload, window, row))
                else:
                    image = torch.empty(images.shape[1:], dtype=torch.uint8)
                    crop_and_resize(decode_image(payload), window, image)
                    images[row] = image
            if not plain:
                return
            payloads, windows, rows = zip(*plain, strict=True)
        self._pipeline.feed_input("payloads", [np.frombuffer(payload, np.uint8) for payload in payloads])
        self._pipeline.feed_input("starts", [np.array([w.top, w.left], np.int32) for w in windows])
        self._pipeline.feed_input("shapes", [np.array([w.height, w.width], np.int32) for w in windows])
        (decoded,) = self._pipeline.run()
        images.index_copy_(0, torch.tensor(rows, device=images.device), from_dlpack(decoded.as_tensor()))
        if images.is_cuda:
            # DALI does not know of this copy and may write its next batch into the same memory.
            torch.cuda.current_stream(images.device).synchronize()
