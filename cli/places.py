"""Where this user's models are, and which one a name means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.cli import settings
from localmoe.errors import ModelError

if TYPE_CHECKING:
    from localmoe.library import Library


def library() -> Library:
    """The user's model library; its folder need not exist."""
    from localmoe.library import Library

    return Library(models_folder())


def models_folder() -> Path:
    """What LOCALMOE_MODELS or localmoe config says, or the system's place for a user's data."""
    chosen = settings.find("models").value
    if chosen is not None:
        return Path(str(chosen)).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("localmoe", appauthor=False) / "models"


def find_model(given: Path | None) -> Path | None:
    """The directory that --model means: one of that path, else the model of that name in the library.

    Without one, what localmoe config says; None is the embedded model. Raises ModelError for what is neither, with the
    names that are nearest to it."""
    if given is None:
        chosen = settings.find("model")
        return None if chosen.value is None else _named(Path(str(chosen.value)), f"{chosen.origin}: model: ")
    return _named(given, "")


def model_folder(given: Path) -> Path:
    """The directory of find_model(), that of the embedded model too."""
    from localmoe.library import EMBEDDED

    return find_model(given) or EMBEDDED


def _named(given: Path, origin: str) -> Path | None:
    if given.is_dir():
        return given
    from localmoe.files import shown
    from localmoe.library import EMBEDDED_NAME

    name, models = str(given), library()
    if name == EMBEDDED_NAME:
        return None
    found = models.find(name)
    if found is not None:
        return found
    near = models.nearest(name)
    hint = f"did you mean {' or '.join(map(shown, near))}?" if near else "localmoe list shows what there is"
    raise ModelError(f"{origin}{shown(name)} is neither a directory nor a model in {shown(models.folder)}; {hint}")
