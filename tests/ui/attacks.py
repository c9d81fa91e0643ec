"""Names that try to lead out of a folder."""

from pathlib import Path

FORMS = (
    "../secret",
    "../secret.safetensors",
    "..\\secret",
    "../../secret",
    "loras/../../secret",
    "./../secret",
    "cat/../../secret",
    "....//secret",
    "..;/secret",
    "%2e%2e/secret",
    "%2e%2e%2fsecret",
    "..%2fsecret",
    "..%5csecret",
    "%252e%252e%252fsecret",
    "..%c0%afsecret",
    "%c0%ae%c0%ae/secret",
    "..%u2215secret",
    "\uff0e\uff0e/secret",
    "..\uff0fsecret",
    "..\u2215secret",
    "..\u2044secret",
    "\u2025/secret",
    "..\u200b/secret",
    "..\u202e/secret",
    "cat\x00.safetensors",
    "../secret\x00cat",
    "~/secret",
    "~root/secret",
    "$HOME/secret",
    "${PWD}/../secret",
    "C:\\secret",
    "C:/secret",
    "C:secret",
    "\\\\server\\share\\secret",
    "//server/share/secret",
    "\\\\?\\C:\\secret",
    "file:///etc/passwd",
    "http://127.0.0.1/secret",
    "/etc/passwd",
    "/proc/self/environ",
    "/proc/self/cwd/secret",
    "/dev/stdin",
    "/dev/fd/0",
    "cat/",
    "cat/.",
    "./cat",
    ".",
    "..",
    "/",
    "",
    " ",
    "cat.safetensors",
    "CAT",
    "link",
    "linked/secret",
    "hidden/.secret",
    ".hidden",
)
"""Each of them must be refused wherever a LoRA, a model or a comparison is named."""


def make(place: Path) -> tuple[Path, Path]:
    """A folder with one good file and every kind of link that leads out of it.

    Args:
        place: an empty folder.

    Returns:
        the folder, and the file outside that nobody may reach.
    """
    secret = place / "secret.safetensors"
    secret.write_bytes(b"nobody may read this")
    (place / "outside").mkdir()
    (place / "outside" / "secret.safetensors").write_bytes(b"nobody may read this either")
    folder = place / "loras"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(secret)
    (folder / "relative.safetensors").symlink_to("../secret.safetensors")
    (folder / "linked").symlink_to(place / "outside")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.safetensors").symlink_to(place / "nothing.safetensors")
    (folder / ".hidden.safetensors").write_bytes(b"hidden")
    (folder / "notes.txt").write_text("not a LoRA")
    return folder, secret
