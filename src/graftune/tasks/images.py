"""Classification of images: one label for each.

columns   image (a path) and label; or a folder of a folder for each label, below train, test or not
head      the model class's own, newly initialised, trained with the adapter
batches   opened, turned and converted as each is made; by the base's own image processor
metrics   accuracy, macro F1, Matthews' correlation
answer    {"image", "label", "score", "probabilities": {label: p}}

Where a text task has a tokenizer, `Ready.tokenizer` is the image processor.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from graftune.errors import DataError, SettingsError
from graftune.tasks.class_weights import ClassificationOptions
from graftune.tasks.classification import LABELS, Classification
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example
from graftune.tasks.label_notes import label_of
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, register_task

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = ("image", "image_path", "path", "file", "filename", "file_name", "img")


class ImageOptions(ClassificationOptions):
    """How images are read."""

    flip: bool = False
    """Whether each image is mirrored in half of the training passes."""


@register_task
class Images(Classification):
    """One of a fixed set of labels for an image."""

    name: ClassVar[str] = "images"
    summary: ClassVar[str] = "one label for an image"
    model_task: ClassVar[str] = "image-classification"
    roles: ClassVar[tuple[str, ...]] = ("image", "label")
    reads_images: ClassVar[bool] = True
    options_type: ClassVar[type[TaskOptions]] = ImageOptions

    def __init__(self, options: ImageOptions | None = None) -> None:
        self._images = options or ImageOptions()
        super().__init__(self._images)

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of the image's path and of the label."""
        return {
            "image": str(find_column(table, "image", named.image, IMAGES)),
            "label": str(find_column(table, "label", named.label, LABELS)),
        }

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's image, opened once to see that it is whole, and its label.

        Raises:
            DataError: A file is missing or no whole image; a label is missing.
        """
        found: list[Example] = []
        for index, row in enumerate(table.rows):
            where = table.where(index)
            path = _path(row.get(columns["image"]), columns["image"], table.source, where)
            label = label_of(row.get(columns["label"]))
            if not label:
                raise DataError(f'{where}: the label ("{columns["label"]}") is missing.')
            found.append(Example({"image": str(path)}, _checked(path, where), label, where))
        return found

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns an image by its path, or a row with it."""
        row = {"image": row} if isinstance(row, str) else row
        column = str(find_column(Table([dict(row)], where), "image", None, IMAGES))
        path = _path(row.get(column), column, ".", where)
        return Example({"image": str(path)}, _checked(path, where), "", where)

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns the path of each image and its label's number; nothing is opened yet."""
        number = {label: index for index, label in enumerate(ready.labels)}
        rows: list[dict[str, Any]] = [{"image": one.fields["image"]} for one in examples]
        for row, example in zip(rows, examples, strict=True):
            if example.stratum:
                row["labels"] = number[example.stratum]
        return Encoded(rows, [_patches(ready.model)] * len(rows), cut=0)

    def collate(self, ready: Ready) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Returns what opens the images of a batch: `pixel_values` `(rows, 3, height, width)`."""
        processor: Any = ready.tokenizer

        def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            images = [opened(Path(row["image"])) for row in rows]
            if self._images.flip and ready.model.training:
                images = [_mirrored(one) if float(torch.rand(())) < 0.5 else one for one in images]
            found = processor(images=images, return_tensors="pt")
            batch: dict[str, Any] = {"pixel_values": found["pixel_values"]}
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return together

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each image with its likeliest label, how likely it is, and all the others."""
        rows = [{"image": example.fields["image"]} for example in examples]
        collate, dtype = self.collate(ready), ready.model.dtype
        answers: list[dict[str, Any]] = []
        for first in range(0, len(rows), batch_size):
            pixels = collate(rows[first : first + batch_size])["pixel_values"]
            with torch.inference_mode():
                logits = ready.model(pixel_values=pixels.to(ready.model.device, dtype)).logits
            for row, chances in zip(
                rows[first:], torch.softmax(logits.float(), -1).tolist(), strict=False
            ):
                best = max(range(len(chances)), key=chances.__getitem__)
                named = dict(zip(ready.labels, chances, strict=True))
                found = {"label": ready.labels[best], "score": chances[best]}
                answers.append({**row, **found, "probabilities": named})
        return answers


def opened(path: Path) -> Image:
    """Returns an image as its camera was held, in red, green and blue."""
    pillow = _pillow()
    with pillow.open(path) as image:
        return _turned(image).convert("RGB")


def _pillow() -> Any:
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise SettingsError(
            'Images need Pillow, which isn\'t installed: pip install "graftune[images]".'
        ) from error
    return pillow


def _turned(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _mirrored(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def _path(value: Any, column: str, source: str, where: str) -> Path:
    """Returns an image's path: beside the table that names it, or from here."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{column}" is {value!r}, expected the path of an image.')
    given = Path(value).expanduser()
    near = Path(source) if Path(source).is_dir() else Path(source).parent
    for path in (near / given, given):
        if path.is_file():
            return path
    raise DataError(f'{where}: there is no file "{value}", neither in {near} nor from here.')


def _checked(path: Path, where: str) -> str:
    """Returns the SHA-256 of an image's bytes, which tells the same image again.

    Raises:
        DataError: It isn't a whole image.
    """
    pillow = _pillow()
    data = path.read_bytes()
    if not data:
        raise DataError(f'{where}: "{path}" is empty.')
    try:
        with pillow.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        why = str(error).replace(str(path), "").split("<")[0].strip(" :'") or "unreadable"
        raise DataError(f'{where}: "{path}" is no whole image: {why}.') from None
    return hashlib.sha256(data).hexdigest()


def _patches(model: Any) -> int:
    """Returns how many tokens a model makes of an image; 1 where it doesn't say."""
    size, patch = (getattr(model.config, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(size, int) or not isinstance(patch, int):
        return 1
    return (size // patch) ** 2 + 1
