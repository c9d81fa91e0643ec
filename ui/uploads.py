"""Files that visitors send: believed in nothing, kept in one place, bounded in size."""

import re
import shutil
from pathlib import Path

from cmlora import container, keys
from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.ui.studio import Studio, without_path


def keep_lora(studio: Studio, path: Path) -> str:
    """Put a LoRA file that was sent among the server's LoRAs.

    Args:
        studio: the server's.
        path: where the upload lies.

    Returns:
        its name in the list.

    Raises:
        CmloraError: if it is too large or no LoRA; nothing is kept then.
    """
    limit = studio.settings.limits.upload
    try:
        size = path.stat().st_size
    except OSError:
        raise CmloraError("the file did not arrive; send it again") from None
    if size > limit:
        raise CmloraError(f"{path.name} has more than {limit // 2**20} MB")
    if path.suffix != ".safetensors":
        raise CmloraError(f"{path.name}: LoRAs are read from .safetensors files and nothing else")
    try:
        head = container.header(path)
    except CmloraError as error:
        raise CmloraError(without_path(str(error), path)) from None
    layout = keys.layout(head.shapes)
    if not layout.modules and not layout.forms:
        raise CmloraError(f"{path.name} holds no LoRA")
    studio.uploads.mkdir(parents=True, exist_ok=True)
    name = plain_name(path.stem)
    target, number = studio.uploads / f"{name}.safetensors", 1
    while target.exists():
        number += 1
        target = studio.uploads / f"{name}-{number}.safetensors"
    with path.open("rb") as source, replacing(target) as copy:
        shutil.copyfileobj(source, copy)
    return target.stem


def plain_name(text: str, fallback: str = "lora") -> str:
    """A file's stem in letters, digits, ``_``, ``-`` and inner dots.

    >>> plain_name("../../etc/passwd"), plain_name("..."), plain_name("ink v1.5")
    ('etc_passwd', 'lora', 'ink_v1.5')
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:80]
    return re.sub(r"\.{2,}", ".", name).strip("._-") or fallback
