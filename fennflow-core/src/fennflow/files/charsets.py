"""The charsets of text, by the names that media types give them."""

from __future__ import annotations

from collections.abc import Mapping
from encodings.aliases import aliases

from fennflow.exceptions import FileException

_ALIASES: Mapping[str, str] = aliases

# The charsets that browsers know, by Python's names: stateless and fast. Others are not even looked
# up, since a look-up imports a module by that name, and some codecs take quadratic time.
_CODECS = frozenset(
    {
        *(
            "utf_8",
            "utf_8_sig",
            "utf_16",
            "utf_16_be",
            "utf_16_le",
            "utf_32",
            "utf_32_be",
            "utf_32_le",
        ),
        *("ascii", "latin_1", "cp437", "cp850", "cp866", "cp874", "koi8_r", "koi8_u"),
        *("mac_roman", "mac_cyrillic"),
        *(f"iso8859_{part}" for part in range(2, 17) if part != 12),  # noqa: PLR2004 - there is no part 12
        *(f"cp{page}" for page in range(1250, 1259)),
        *("gb2312", "gbk", "gb18030", "big5", "big5hkscs", "shift_jis", "cp932", "euc_jp"),
        *("iso2022_jp", "euc_kr", "cp949"),
    }
)
_CHARSETS = {name: name for name in _CODECS} | {
    alias: codec for alias, codec in _ALIASES.items() if codec in _CODECS
}


def codec_of(media_type: str) -> str:
    """Return Python's name of the charset that a media type names; UTF-8 if it names none."""
    for parameter in media_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip('"')
            codec = _CHARSETS.get(charset.lower().replace("-", "_").replace(":", "_"))
            if codec is None:
                message = f"The charset {charset[:40]!a} is not known; the bytes are in `data`."
                raise FileException(message)
            return codec
    return "utf_8"
