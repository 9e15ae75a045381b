"""Where files are: a path of this machine, or the URL of an object in a store.

Location = Path | Url        # a config's field; file:///data/clips is the path /data/clips
StoreUrl = Url               # a field that is no path
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import BeforeValidator, GetCoreSchemaHandler, WrapValidator
from pydantic_core import core_schema

# memory: of this process alone (fsspec), for tests.
SCHEMES = ("s3", "gs", "memory")


class Url(str):
    """The URL of an object or a folder of objects, s3://BUCKET/KEY. Joined and taken apart like a path: url /
    "index.json"."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Url:
        """ValueError: another scheme, no bucket, credentials or a query in it, a `..`."""
        scheme, _, rest = text.partition("://")
        scheme = scheme.lower()
        if scheme not in SCHEMES:
            accepted = ", ".join(f"{one}://" for one in ("file", *SCHEMES))
            raise ValueError(f"a URL begins with {accepted}; found {scheme[:20]!r}")
        bucket, _, key = rest.partition("/")
        if "@" in bucket or ":" in bucket:
            raise ValueError(
                f"{scheme}://…: names more than a bucket; credentials and endpoints are given to the store's client "
                "(AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, …), never in a URL, which is logged"
            )
        if found := re.search(r"[?#\x00-\x1f]", rest):
            raise ValueError(
                f"{scheme}://{rest[: found.start()]}…: a '?', '#' or control character in a URL; signed URLs are not read"
            )
        parts = [part for part in key.split("/") if part]
        if not bucket or ".." in parts or "." in parts:
            raise ValueError(f"{text!r}: expected {scheme}://BUCKET/KEY")
        return cls(f"{scheme}://{'/'.join((bucket, *parts))}")

    @property
    def scheme(self) -> str:
        return self.partition("://")[0]

    @property
    def key(self) -> str:
        """BUCKET/KEY."""
        return self.partition("://")[2]

    @property
    def bucket(self) -> str:
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> Url:
        return Url(f"{self.scheme}://{PurePosixPath(self.key).parent}")

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self}/{name}")

    def is_relative_to(self, folder: Path | Url) -> bool:
        """Whether it lies below `folder`."""
        return isinstance(folder, Url) and f"{self}/".startswith(f"{folder}/")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema()),
            python_schema=core_schema.is_instance_schema(cls),
            serialization=core_schema.to_string_ser_schema(),
        )


# Of Linux and its file systems, in bytes.
MAX_NAME, MAX_PATH = 255, 4095


def _path(text: str) -> Path:
    """ValueError: longer than any file's name or path is; merely to look for it would be an OSError."""
    content = text.encode(errors="surrogatepass")
    if len(content) > MAX_PATH:
        raise ValueError(f"a path of {len(content):,} bytes; at most {MAX_PATH:,}")
    if (longest := max(map(len, content.split(b"/")))) > MAX_NAME:
        raise ValueError(f"a path with a name of {longest} bytes in it; at most {MAX_NAME}")
    return Path(text)


def parse_location(text: str) -> Path | Url:
    """A path, or a URL where there is a `://`. ValueError: as Url.parse; a file:// URL of another machine; a path too
    long."""
    if "://" not in text:
        return _path(text)
    scheme, _, rest = text.partition("://")
    if scheme.lower() != "file":
        return Url.parse(text)
    if not rest.startswith("/"):
        raise ValueError(f"{text!r}: expected file:///PATH")
    return _path(unquote(rest))


def hide_credentials(text: str) -> str:
    """`text`, a message, without what URLs in it have before an @ or after a ?: keys, secrets and signatures."""
    text = re.sub(r"""(?<=://)(?:[^\s'"/@]*:[^\s'"]*|[^\s'"/@]*)@""", "***@", text)
    return re.sub(r"""(://[^\s'"?]*)\?[^\s'"]*""", r"\1?***", text)


def validate_location(value: Any, handler: Any) -> Any:
    """A pydantic WrapValidator of Path | Url: what looks like a URL is one, or an error."""
    _check_text(value)
    if isinstance(value, str) and not isinstance(value, Url):
        return parse_location(value)
    if not isinstance(value, Path | Url):
        raise ValueError(f"expected a path or a URL, found {value!r}")
    return handler(value)


Location = Annotated[Path | Url, WrapValidator(validate_location)]


def _remote(value: Any) -> Any:
    found = parse_location(value) if isinstance(value, str) and not isinstance(value, Url) else value
    if isinstance(found, Path):
        raise ValueError(
            f"expected the URL of an object store ({', '.join(f'{one}://' for one in SCHEMES)}), found {value}"
        )
    return found


StoreUrl = Annotated[Url, BeforeValidator(_remote, json_schema_input_type=str)]


def _check_text(value: Any) -> None:
    """ValueError: no path: nothing, or characters that no file's name has."""
    if isinstance(value, str) and (not value or any(ord(character) < 32 for character in value)):
        raise ValueError(f"expected a path, found {value!r:.80}")


def _local(value: Any, handler: Any) -> Any:
    _check_text(value)
    if isinstance(value, str):
        found = parse_location(value)
        if isinstance(found, Url):
            raise ValueError(
                f"{found} is in an object store; this is a folder of this machine, or of a disk that it mounts"
            )
        return found
    return handler(value)


LocalPath = Annotated[Path, WrapValidator(_local)]
