"""The text tools of the model and of its adapters: tokenizer, chat template and generation config.

An adapter's directory may hold its own tokenizer.json, tokenizer_config.json, chat template and
generation_config.json; for each file that is missing, the base's is used. Adapters with equal files share one TextTools
object, which lives as long as one of them uses it:

    sha256 of tokenizer.json --> known   --> shared
                             --> unknown --> the base's model --> the base, or new small parts around its model
                                         --> another model --> parsed in a process of its own
                                                       --> equal but for formatting --> shared
                                                       --> different --> parsed here too, and kept, within bounds

These files cannot run code in this process: a regular expression that neither the base's tokenizer nor a published one
has is refused, because matching it might never end, and a chat template is rendered in a separate process.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.config.process_configs import AdapterSource
from engine.directory import Directory
from engine.errors import AdapterError, ConfigError, EngineError, StorageFailed
from engine.ipc import DECODE_ERRORS
from engine.journal.work_notes import WorkNotes, digest
from tokenizer_proc.text import files
from tokenizer_proc.text.checking.check import checked
from tokenizer_proc.text.checking.check_worker import CheckedTokenizer
from tokenizer_proc.text.generation_config import GenerationConfig
from tokenizer_proc.text.pretokenizers import KNOWN
from tokenizer_proc.text.templates.chat_template import ChatRenderer, ChatTemplate
from tokenizer_proc.text.templates.sandbox import Sandbox, SandboxedTemplate
from tokenizer_proc.text.templates.template_files import template_of
from tokenizer_proc.text.tokenizer import Tokenizer, is_from_library, special_tokens
from tokenizer_proc.text.tokenizer_json import TokenizerSections

log = logging.getLogger(__name__)

MOST_TOKENIZERS = 64
MOST_BYTES = 256 << 20
"""The bound on the total size of all different tokenizer.json files; in memory they take several times as much."""
MOST_FILES = 4096
"""The number of tokenizer.json files whose hashes are remembered, with the hash of the content that they parse to."""

LEAST_BOUND = 16 << 20
BASE_FACTOR = 4
"""An adapter's tokenizer.json may be this many times as large as the base's, and LEAST_BOUND in any case."""
MOST_SMALL = 2 << 20
"""The bound on a tokenizer.json without its model, where the model is the base's byte for byte."""
MOST_ADDED = 8192
"""How many tokens more than the base's an adapter's tokenizer.json may add."""
MOST_OWN_MODEL = 1 << 20
"""The bound on another model than the base's, where requests are served: parsing it holds the GIL for 40 ms."""

NAME = "tokenizer.json"
BASE = b"base"
"""The key that stands for the base tokenizer's content, in place of a hash."""
CHANGED = "its tokenizer, chat template or generation config has changed: load it again, with load_inplace"
NOT_READ = ("tokenizer.model", "vocab.json", "added_tokens.json")
"""Tokenizer files in other formats, which are not read.

If one of them is there without a tokenizer.json, the base's tokenizer is used and a warning logged.
"""


@dataclass(frozen=True, eq=False)
class TextTools:
    """The tokenizer, chat template and generation config of one adapter or of the base.

    `brings` lists which of the three differ from the base's: tokenizer, chat_template, generation. `revision` is a hash
    of what they are, empty for the base's.
    """

    tokenizer: Tokenizer
    chat: ChatRenderer
    generation_config: GenerationConfig
    brings: tuple[str, ...] = ()
    revision: str = ""


class TokenizerLibrary:
    """The text tools of the base and of every adapter, shared where their content is equal.

    `directory` holds the base's tokenizer. With `fixed_template`, the base's chat template, which the operator gave, is
    used for every adapter. `notes` are those of the work in progress.
    """

    def __init__(
        self, base: TextTools, directory: str | Path, fixed_template: bool = False, notes: WorkNotes | None = None
    ) -> None:
        self.base = base
        self.sandbox = Sandbox()
        self._directory = Path(directory)
        self._fixed_template = fixed_template
        self._notes = notes or WorkNotes()
        self._lock = threading.Lock()
        self._is_starting = False
        self._describing = threading.Lock()
        self._described: CheckedTokenizer | None = None
        self._contents: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept: weakref.WeakValueDictionary[bytes, Tokenizer] = weakref.WeakValueDictionary()
        self._sizes: dict[bytes, int] = {}
        self._text_tools: weakref.WeakValueDictionary[tuple[object, ...], TextTools] = weakref.WeakValueDictionary()
        self._base_sections: TokenizerSections | None = None

    def load_all(self, sources: Sequence[AdapterSource], failed: dict[int, str] | None = None) -> dict[int, TextTools]:
        """Returns the text tools of the start-up adapters, by adapter id.

        Raises AdapterError for files that cannot be used. With `failed`, puts the reason there instead; there is one
        too for an adapter that was served with other text tools by a former process.
        """
        found, self._is_starting = {}, True
        try:
            for source in sources:
                try:
                    found[source.adapter_id] = tools = self.load(source.name, source.root, source.roots)
                    if source.revision and source.text_revision != tools.revision:
                        raise AdapterError(f"adapter `{source.name}`: {CHANGED}")
                except (AdapterError, StorageFailed) as error:
                    if failed is None:
                        self.close()
                        raise
                    failed[source.adapter_id] = error.message
        finally:
            self._is_starting = False
        return found

    def load(self, name: str, root: str | Path, roots: Sequence[str] = ()) -> TextTools:
        """Returns the text tools of the adapter `name`, read from its directory `root`.

        If `roots` are given, the files must lie under one of them. Slow: call it in a thread. Raises AdapterError if
        the files cannot be used.
        """
        try:
            with files.open_directory(root, roots) as directory:
                return self.base if directory is None else self._read(name, directory)
        except EngineError as error:
            if isinstance(error, AdapterError | StorageFailed):
                raise
            text = f"adapter `{name}`: {error.message}"
            raise AdapterError(text, param="lora_path", code="adapter_refused") from error

    def close(self) -> None:
        """Ends the process that renders adapters' chat templates."""
        self.sandbox.close()

    @property
    def _most_bytes(self) -> int:
        """The bound on an adapter's tokenizer.json. A file with the base's content may have another formatting."""
        try:
            size = (self._directory / NAME).stat().st_size
        except OSError:
            size = 0
        return min(files.MAX_TOKENIZER, max(LEAST_BOUND, BASE_FACTOR * size))

    def _read(self, name: str, directory: Directory) -> TextTools:
        base, tokens = self.base, special_tokens(directory)
        raw = files.read(directory, NAME, self._most_bytes)
        if raw is not None:
            content, shared = self._shared(raw, directory.path / NAME)
            tokenizer = shared.named(tokens or base.tokenizer.special_tokens)
        else:
            content, tokenizer = BASE, base.tokenizer.named(base.tokenizer.special_tokens | tokens)
            unread = [other for other in NOT_READ if directory.has(other)]
            if unread:
                log.warning("adapter `%s`: %s is not read, only %s: the model's own is used", name, unread[0], NAME)
        kept = [token for token in base.generation_config.end_ids if _same(token, tokenizer, base.tokenizer)]
        generation_config = base.generation_config.over(directory, kept, tokenizer.eos_id, tokenizer.vocab_size)
        source = (None if self._fixed_template else template_of(directory)) or base.chat.source
        if (tokenizer, source, generation_config) == (base.tokenizer, base.chat.source, base.generation_config):
            return base
        return self._tools(content, tokenizer, source, generation_config)

    def _tools(
        self, content: bytes, tokenizer: Tokenizer, source: str | None, generation_config: GenerationConfig
    ) -> TextTools:
        """Returns the shared TextTools object of these three parts.

        `content` is the hash of the tokenizer's content, `source` the chat template's text.
        """
        named = tuple(sorted(tokenizer.special_tokens.items()))
        key = tokenizer.origin, named, source, msgspec.json.encode(generation_config)
        known = self._text_tools.get(key)
        if known is None:
            chat, brings = self._chat(source, tokenizer), self._brings(tokenizer, source, generation_config)
            parts = content.hex(), named, source, generation_config
            revision = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
            known = self._text_tools[key] = TextTools(tokenizer, chat, generation_config, brings, revision)
        return known

    def _brings(self, tokenizer: Tokenizer, source: str | None, generation_config: GenerationConfig) -> tuple[str, ...]:
        base = self.base
        own = {
            "tokenizer": tokenizer is not base.tokenizer,
            "chat_template": source != base.chat.source,
            "generation": generation_config != base.generation_config,
        }
        return tuple(name for name, is_own in own.items() if is_own)

    def _chat(self, source: str | None, tokenizer: Tokenizer) -> ChatRenderer:
        base, tokens = self.base, tokenizer.special_tokens
        if source is not None and source != base.chat.source:
            return SandboxedTemplate(self.sandbox, source, tokens)
        return base.chat if tokens == base.tokenizer.special_tokens else ChatTemplate(source, tokens)

    def _shared(self, raw: bytes, path: Path) -> tuple[bytes, Tokenizer]:
        """Returns the hash of the content of the tokenizer.json `raw`, and the tokenizer of all files that have it."""
        found = hashlib.sha256(raw).digest()
        with self._lock:
            self._learn_base()
            content = self._contents.get(found, b"")
            known = self._kept.get(content)
            if known is not None:
                self._contents.move_to_end(found)
                return content, known
        with self._notes.working(digest([b"tokenizer", found])):
            content, made, size = self._made(raw, path)
        with self._lock:
            self._remember(found, content)
            known = self._kept.get(content)
            if known is None:
                self._check_room(size)
                self._kept[content], self._sizes[content] = made, size
            return content, known or made

    def _made(self, raw: bytes, path: Path) -> tuple[bytes, Tokenizer, int]:
        """Returns (hash of the content, the tokenizer, the number of bytes that it does not share with the base)."""
        base = self._base_sections
        assert base is not None
        try:
            sections = TokenizerSections.around(raw, bytes(base.model), MOST_SMALL)
        except DECODE_ERRORS as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if sections is not None:
            if sections.small == base.small:
                return BASE, self.base.tokenizer, 0
            if (made := self._over_base(sections)) is not None:
                return hashlib.sha256(msgspec.json.encode(sections.small)).digest(), made, len(raw) - len(base.model)
        return self._parsed(raw, path)

    def _parsed(self, raw: bytes, path: Path) -> tuple[bytes, Tokenizer, int]:
        """Does the same as `_made`, for a file that has to be parsed as a whole: a process of its own does so first."""
        found, own = checked(raw, path), self._described_base()
        if found.content == own.content:
            return BASE, self.base.tokenizer, 0
        sections = TokenizerSections.read(found.small)
        self._check_patterns(sections)
        if found.model == own.model and (made := self._over_base(sections)) is not None:
            return found.content, made, len(found.small)
        if found.model_bytes > MOST_OWN_MODEL and not self._is_starting:
            raise ConfigError(
                f"{NAME} has another model than the model's own tokenizer, of {found.model_bytes >> 10} KiB; parsing"
                f" more than {MOST_OWN_MODEL >> 10} KiB would stop the running server: give this adapter with"
                f" --lora-paths, or take {NAME} out of its directory"
            )
        return found.content, Tokenizer.parse(raw, path, {}), len(raw)

    def _over_base(self, sections: TokenizerSections) -> Tokenizer | None:
        """Returns a tokenizer of these small parts around the base's model, or None if they cannot be put together."""
        self._check_patterns(sections)
        assert self._base_sections is not None
        if len(sections.added_tokens) > len(self._base_sections.added_tokens) + MOST_ADDED:
            raise ConfigError(f"{NAME} adds {len(sections.added_tokens)} tokens; an adapter adds at most {MOST_ADDED}")
        try:
            return sections.over(self.base.tokenizer)
        except BaseException as error:
            if not is_from_library(error):
                raise
            return None  # parsing the whole file raises the error to show

    def _described_base(self) -> CheckedTokenizer:
        with self._describing:
            if self._described is None:
                self._described = checked(self._base_raw(), self._directory / NAME)
            return self._described

    def _base_raw(self) -> bytes:
        with files.open_directory(self._directory) as directory:
            raw = None if directory is None else files.read(directory, NAME, files.MAX_TOKENIZER)
        return self.base.tokenizer.backend.to_str().encode() if raw is None else raw

    def _learn_base(self) -> None:
        """Reads the base's tokenizer.json on the first call, to compare adapters' files with it.

        The file is read because the library may write the same content with another formatting.
        """
        if self._base_sections is not None:
            return
        base, raw = self.base.tokenizer, self._base_raw()
        try:
            self._base_sections = TokenizerSections.read(raw)
        except DECODE_ERRORS:  # it has fields that only the library can read
            self._base_sections = TokenizerSections.read(base.backend.to_str().encode())
        self._kept[BASE], self._sizes[BASE] = base, 0
        self._remember(hashlib.sha256(raw).digest(), BASE)

    def _remember(self, found: bytes, content: bytes) -> None:
        self._contents[found] = content
        while len(self._contents) > MOST_FILES:
            self._contents.popitem(last=False)

    def _check_patterns(self, sections: TokenizerSections) -> None:
        assert self._base_sections is not None
        strange = sorted(sections.patterns - self._base_sections.patterns - KNOWN)
        if strange:
            raise ConfigError(
                f"{NAME} has a regular expression that neither the model's tokenizer nor a published one has, and which"
                f" might run for ever: {strange[0][:80]!r}. If the adapter adds no tokens, take {NAME} out of its"
                " directory: the model's own is used"
            )

    def _check_room(self, size: int) -> None:
        self._sizes = {content: held for content, held in self._sizes.items() if content in self._kept}
        own, held = len(self._sizes) - 1, sum(self._sizes.values())
        if own >= MOST_TOKENIZERS or held + size > MOST_BYTES:
            raise ConfigError(
                f"{own} different tokenizers of adapters are loaded ({held >> 20} MiB of {NAME}); at most"
                f" {MOST_TOKENIZERS} and {MOST_BYTES >> 20} MiB fit: unload one, or take {NAME} out of its directory"
            )


def _same(token: int, one: Tokenizer, other: Tokenizer) -> bool:
    """Returns whether an id is the same token in both tokenizers."""
    return one.backend is other.backend or one.backend.id_to_token(token) == other.backend.id_to_token(token)
