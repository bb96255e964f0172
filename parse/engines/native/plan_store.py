"""Keeps what was measured about a model on a kind of processor, so that it is measured only once.

The choices in a plan can change the text of an answer, so all replicas of a deployment have to make the same ones. On
one machine they share a file. Services share plans between machines with a store of their own.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PLAN_VERSION = 3  # changes when an old plan must not be used any more


@dataclass(frozen=True)
class PlanKey:
    """What a plan depends on."""

    model: str
    """A digest of the architecture. Models that differ only in the values of their weights share a plan."""
    dtype: str
    quantization: str | None
    device: str
    processor: str
    num_threads: int
    versions: str

    @classmethod
    def of(cls, network: PreTrainedModel, quantization: str | None = None) -> "PlanKey":
        device = next(network.parameters()).device
        config = network.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        text = json.dumps(config, sort_keys=True, default=str)
        return cls(
            model=hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
            dtype=str(network.dtype).removeprefix("torch."),
            quantization=quantization,
            device=device.type,
            processor=processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
            num_threads=torch.get_num_threads(),
            versions=f"torch {torch.__version__}, transformers {transformers.__version__}, plan {PLAN_VERSION}",
        )

    @property
    def digest(self) -> str:
        """A name for everything but the versions, so that a plan of an older version is replaced."""
        fields = asdict(self) | {"versions": None}
        return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


class PlanStore(Protocol):
    """Where plans are kept."""

    def get_or_create(self, key: PlanKey, section: str, create: Callable[[], Any]) -> Any:
        """Returns a section of a plan, as JSON. If there is none yet, `create` measures it.

        If several processes create it at the same time, all of them get the same one.
        """
        ...


@dataclass(frozen=True)
class ModelPlan:
    """The plan of one loaded model."""

    key: PlanKey
    store: PlanStore

    @classmethod
    def of(
        cls, network: PreTrainedModel, *, quantization: str | None = None, store: PlanStore | None = None
    ) -> "ModelPlan":
        """Returns the plan of a network. Without a store, it is kept in a file."""
        return cls(PlanKey.of(network, quantization), store or FilePlanStore())

    def get_or_create(self, section: str, create: Callable[[], Any]) -> Any:
        return self.store.get_or_create(self.key, section, create)


class FilePlanStore:
    """Keeps plans in files, one for each key."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def path(self, key: PlanKey) -> Path:
        return self.folder / f"{key.digest}.json"

    def get_or_create(self, key: PlanKey, section: str, create: Callable[[], Any]) -> Any:
        path = self.path(key)
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(path.with_suffix(".lock")))
            except OSError as error:
                _warn_not_kept(path, error)
                return create()
            sections = _read(path, key)
            if section not in sections:
                sections[section] = create()
                try:
                    _write(path, {"key": asdict(key), "sections": sections})
                except OSError as error:
                    _warn_not_kept(path, error)
            return sections[section]


def default_folder() -> Path:
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "parse-serve" / "plans"


@cache
def processor() -> str:
    """Returns the processor's name and a digest of its instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    instruction_sets = " ".join(sorted(flags[1].split())) if flags else ""
    digest = hashlib.blake2b(instruction_sets.encode(), digest_size=4).hexdigest()
    return f"{name[1] if name else platform.machine()}, instruction sets {digest}"


def _warn_not_kept(path: Path, error: OSError) -> None:
    logger.warning("%s: the plan cannot be kept (%s), so each start measures it again", path, error)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path, key: PlanKey) -> dict[str, Any]:
    """Returns the sections of a file, or none if it is damaged or belongs to another key."""
    try:
        data = json.loads(path.read_text())
        key_in_file, sections = data["key"], data["sections"]
        if not isinstance(key_in_file, dict) or not isinstance(sections, dict):
            raise TypeError("it has no key and no sections")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s: %s), so the plan is measured again", path, type(error).__name__, error)
        return {}
    if key_in_file != asdict(key):
        differences = ", ".join(
            f"{name} {key_in_file.get(name)!r} instead of {value!r}"
            for name, value in asdict(key).items()
            if key_in_file.get(name) != value
        )
        logger.warning("%s was measured with %s, so the plan is measured again", path, differences)
        return {}
    return sections


def _write(path: Path, data: Any) -> None:
    """Writes a file at once, so that no process reads half of it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(data, file, indent=1)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
