"""The small files of one model folder, read when they are asked for."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from model_checks import special_ids
from model_config import read_config
from model_errors import ModelCompatibilityError
from model_files import has_file, read_file, read_text
from model_token_files import DECODER, content_of
from model_tokenizer import CONFIG, SPECIAL
from model_utils import ModelFolder

GENERATION = "generation_config.json"
TEMPLATE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
OLD_TEMPLATE = "chat_template.json"

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files that come from the first model, if they are texts."""

TEXT_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf")

DEFAULT = "default"


class Companions:
    """The small files of one model folder, read when they are asked for.

    Attributes:
        index: of the model among all, 0 for the first one.
        model: the open folder.
        path: has the generation config and the licence.
        tokenizer_path: has tokenizer and chat template.
    """

    def __init__(self, index: int, model: ModelFolder) -> None:
        self.index = index
        self.model = model
        self.label = model.label
        self.path = model.path
        self.tokenizer_path = model.tokenizer_path

    @cached_property
    def generation(self) -> dict[str, Any] | None:
        """generation_config.json; None where there is none."""
        return self._object(GENERATION)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json; empty where there is none."""
        return self._object(CONFIG) or {}

    @cached_property
    def special_map(self) -> dict[str, Any]:
        """special_tokens_map.json; empty where there is none."""
        return self._object(SPECIAL) or {}

    @cached_property
    def special_settings(self) -> dict[str, Any]:
        """tokenizer_config.json, with special_tokens_map.json where that counts.

        As in transformers, it counts where tokenizer_config.json lists no added tokens.
        """
        own = self.tokenizer_config
        return own if DECODER in own else own | self.special_map

    @cached_property
    def template_files(self) -> dict[str, Path]:
        """Files that hold a chat template, by its name."""
        place = self.tokenizer_path
        more = sorted((place / TEMPLATE_FOLDER).glob("*.jinja"))
        main = {DEFAULT: place / TEMPLATE} if has_file(place, TEMPLATE) else {}
        return main | {file.stem: file for file in more}

    @cached_property
    def templates(self) -> dict[str, str]:
        """Chat templates by name; there is seldom another than the default one.

        Files of their own come before tokenizer_config.json, as in transformers.
        """
        texts = _filled({name: self._text(file) for name, file in self.template_files.items()})
        for name in (CONFIG, OLD_TEMPLATE):
            try:
                texts = texts or _named_templates((self._object(name) or {}).get("chat_template"))
            except (LookupError, TypeError) as error:
                raise ModelCompatibilityError(
                    f"{self.label}: chat_template in {name} is neither a text nor a list of "
                    "named texts. Download the model again"
                ) from error
        return texts

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids at which the model stops generating."""
        for config in (self.generation or {}, self.model.config):
            if ids := special_ids(config).get("eos_token_id"):
                return ids
        return []

    @cached_property
    def licences(self) -> dict[str, bytes]:
        """Licence files by name."""
        files = licence_files(self.path)
        return {file.name: read_file(self.path, file.name, self.label) for file in files}

    def problems(self) -> list[str]:
        """What is wrong with the files that are read here."""
        found: dict[str, None] = {}
        for name in ("generation", "special_settings", "templates", "licences"):
            try:
                getattr(self, name)
            except ModelCompatibilityError as error:
                found |= dict.fromkeys(error.problems)
        return list(found)

    def _object(self, name: str) -> dict[str, Any] | None:
        place = self.path if name == GENERATION else self.tokenizer_path
        if not has_file(place, name):
            return None
        try:
            return read_config(read_text(place, name, self.label))
        except ValueError as error:
            raise ModelCompatibilityError(
                f"{self.label}: {name} is not a valid JSON object ({error}). "
                "Download the model again"
            ) from error

    def _text(self, file: Path) -> str:
        name = str(file.relative_to(self.tokenizer_path))
        try:
            return read_text(self.tokenizer_path, name, self.label)
        except ValueError as error:
            raise ModelCompatibilityError(
                f"{self.label}: {file.name} is not UTF-8 text ({error}). Download the model again"
            ) from error


def _named_templates(value: Any) -> dict[str, str]:
    """Chat templates by name, from the forms in which a JSON file holds them."""
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    named = value if isinstance(value, dict) else {DEFAULT: "" if value is None else value}
    if not all(isinstance(text, str) for text in named.values()):
        raise TypeError
    return _filled(named)


def _filled(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if text.strip()}


def roles_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Strings of special tokens by role, such as "eos_token"; only of roles that are filled."""
    tokens = {
        role: content_of(token) for role, token in settings.items() if role.endswith("_token")
    }
    return {role: token for role, token in tokens.items() if token}


def files_in(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """What matches a pattern in a folder, but for folders."""
    for file in sorted(folder.iterdir()):
        if not file.is_dir() and any(file.match(pattern) for pattern in patterns):
            yield file


def licence_files(folder: Path) -> list[Path]:
    """The licence texts of a model."""
    found = files_in(folder, LICENCES)
    return [file for file in found if not file.suffix or file.suffix.lower() in TEXT_SUFFIXES]
