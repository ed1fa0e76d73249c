"""Source ``folder``: image files below ``train/`` and ``val/``, or below the folder itself."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources import SourceError, Split, one_line
from nepa_dist.data.containers import DataError
from nepa_dist.data.folder import FolderContainer
from nepa_dist.data.open import open_container


class FolderSource:
    """Images of a folder, with the ids, names and labels that training on the folder has.

    Args:
        root: see :func:`nepa_dist.data.open.open_container`.
        split: which part.

    Raises:
        SourceError: the folder has another layout, cannot be read or holds no images; or the validation images have no class
            while the training images have.
    """

    kind = "folder"
    has_masks = False

    def __init__(self, root: Path, split: Split) -> None:
        self.split = split
        try:
            # An absolute path, for the word "digits" alone would be a data set.
            container = open_container(str(root.absolute()), split, image_size=0)
        except DataError as error:
            raise SourceError(str(error)) from None
        assert isinstance(container, FolderContainer)
        self._container = container
        self.class_names = container.class_names
        self.class_titles: list[str] = []
        self.fingerprint = container.fingerprint
        self.num_ignored = container.num_ignored
        if split == "val" and not container.class_names and _has_folders(root / "train"):
            raise SourceError(
                f"{root / 'val'} holds its images without class folders, so their labels are unknown, but train/ has classes; "
                "sort them into class folders, or prepare from the archive with its labels"
            )

    def __len__(self) -> int:
        return len(self._container)

    def name(self, index: int) -> str:
        """Path of an image relative to the folder of its split."""
        return one_line(self._container.name(index))

    def label(self, index: int) -> int:
        """Class of an image; -1 outside class folders."""
        return self._container.label(index)

    def read(self, index: int) -> bytes:
        """The image file. Raises OSError if it cannot be read."""
        image = self._container.read(index).image
        assert isinstance(image, bytes)
        return image

    def read_mask(self, index: int) -> None:
        """None: folders have no masks."""


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())
