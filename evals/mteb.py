"""Lets mteb evaluate both towers: the text tower on text, the image tower on images, both on what has both.

    import mteb
    from textlock.evaluate import mteb_encoder
    mteb.evaluate(mteb_encoder("runs/mine"), mteb.get_tasks(tasks=["CIFAR10ZeroShot", "STSBenchmark"]))

mteb's own model of Nomic Embed Vision puts no prefix in front of texts; here they have the prefix that captions have in
training, unless ``prompts`` says otherwise.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from torch import Tensor

from ..data.images import eval_picture
from ..models.text import TextTower

logger = logging.getLogger(__name__)


class MtebEncoder(AbsEncoder):
    """Both towers as an encoder of mteb 2.

    Args:
        encode_images: uint8 [b, S, S, 3] -> rows [b, d], unit or not.
        text_tower: the frozen text tower.
        image_size: side S of the images the tower takes.
        name: what mteb calls it, such as textlock/mine.
        revision: what tells these weights from others: mteb keeps results by it.
        prompted: text towers with another prefix, by the names that mteb gives prompts: query, document, a type of task
            such as STS, the name of a task, or TYPE-query. What has no entry is encoded by ``text_tower``.

    Raises:
        ValueError: ``prompted`` names no type of prompt or task.
    """

    def __init__(
        self,
        encode_images: Callable[[Tensor], Tensor],
        text_tower: TextTower,
        image_size: int,
        *,
        name: str,
        revision: str,
        prompted: Mapping[str, TextTower] | None = None,
    ) -> None:
        self._encode_images = encode_images
        self._text_tower = text_tower
        self._image_size = image_size
        self._prompted = dict(prompted or {})
        self._told: set[str] = set()
        self.model_prompts = {prompt: tower.recipe.prefix for prompt, tower in self._prompted.items()}
        try:
            self.validate_task_to_prompt_name(self.model_prompts)
        except KeyError as error:
            raise ValueError(f"no prompt of mteb has such a name: {error.args[0]}") from error
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name,
                "revision": revision,
                "modalities": ["image", "text"],
                "embed_dim": text_tower.embed_dim,
                "max_tokens": text_tower.recipe.max_length,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
            }
        )

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> Tensor:
        """Return unit embeddings, float32 [n, d] on the CPU; of an image with a text the sum of both, as mteb has it.

        Args:
            inputs: a DataLoader whose batches are dicts of lists: ``text``, ``image`` (of Pillow), or both.
            task_metadata: mteb's, of the task.
            prompt_type: mteb's query or document, or None.

        Raises:
            ValueError: a batch has neither, or an image is missing.
        """
        tower = self._tower_for(task_metadata, prompt_type)
        parts = []
        with torch.no_grad():
            for batch in inputs:
                kinds = [self._rows(kind, batch[kind], tower) for kind in ("text", "image") if kind in batch]
                if not kinds:
                    has = ", ".join(batch)
                    raise ValueError(f"{task_metadata.name} has inputs of {has}: only text and image are encoded")
                parts.append(F.normalize(torch.stack(kinds).sum(dim=0), dim=-1))
        return torch.cat(parts) if parts else torch.empty(0, self._text_tower.embed_dim)

    def _rows(self, kind: str, batch: Sequence[Any], tower: TextTower) -> Tensor:
        if kind == "text":
            return tower.encode(list(batch)).cpu()
        if any(image is None for image in batch):
            raise ValueError("an image of the task is missing")
        images = torch.stack([eval_picture(image, self._image_size) for image in batch])
        return F.normalize(self._encode_images(images).float(), dim=-1).cpu()

    def _tower_for(self, task_metadata: Any, prompt_type: Any) -> TextTower:
        prompt = get_prompt_name(self.model_prompts, task_metadata, prompt_type)
        tower = self._prompted[prompt] if prompt else self._text_tower
        # A figure on texts alone depends on what its authors encode each kind of text with.
        said = f"{task_metadata.name}, {prompt_type.value if prompt_type else 'all texts'}"
        if said not in self._told and "image" not in task_metadata.modalities:
            self._told.add(said)
            recipe = tower.recipe
            logger.warning("%s: prefix %r, at most %d tokens are read", said, recipe.prefix, recipe.max_length)
        return tower
