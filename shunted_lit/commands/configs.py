"""`shunted-lit configs`: the configs that are installed with this package, and how commands find them by name."""

import difflib
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import shunted_lit

log = logging.getLogger(__name__)


def configs(*, copy: str | None = None, out: Path | None = None) -> None:
    """List the configs that are installed with this package, or copy one.

    `--config NAME` and `study` take their names wherever no file of this name lies in the current folder.

    Args:
        copy: Name of the config to copy, such as neck.yaml; nothing is overwritten.
        out: Folder of the copy; by default the current one.

    Raises:
        ValueError: There is no such config, the copy exists, or there is a folder but nothing to copy.
    """
    if copy is None:
        if out is not None:
            raise ValueError(f"`out` must come with the config to copy, got {out} alone; name the config with --copy.")
        files = shipped_files()
        width = max(map(len, files))
        for name, path in files.items():
            print(f"{name:{width}}  {describe_config(path)}")
        return
    source, out = find_config(copy), out or Path()
    target = out / Path(copy).name
    if target.exists():
        raise ValueError(f"{target} already exists; choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(f"copied {copy} to {target}")


def shipped_folder() -> Path:
    """Return the folder of the shipped configs: in the package if it was installed, next to it in a checkout."""
    package = Path(shunted_lit.__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def shipped_files() -> dict[str, Path]:
    """Return the shipped files by name, such as coco/schedule_1x.yaml."""
    folder = shipped_folder()
    files = [*sorted(folder.glob("*.*")), *sorted(folder.glob("*/*.yaml"))]
    return {file.relative_to(folder).as_posix(): file for file in files}


def describe_config(path: Path) -> str:
    """Return the first line of a config's comment."""
    return re.search(r"^# (.+)", path.read_text(encoding="utf-8"), re.MULTILINE)[1]  # type: ignore[index]


def find_config(name: str, folders: bool = False) -> Path:
    """Return the path of a shipped config.

    Args:
        name: Its name, also with the folder configs/ in front, as in a checkout.
        folders: Whether the name may be of a folder of configs.

    Raises:
        ValueError: There is none; names similar ones.
    """
    known = shipped_files()
    if folders:
        known |= {path.parent.name: path.parent for entry, path in known.items() if "/" in entry}
    key = Path(name).as_posix().removeprefix("configs/")
    if key not in known:
        stems = {Path(entry).stem: entry for entry in known}
        close = difflib.get_close_matches(key, known, n=2)
        close = close or [stems[stem] for stem in difflib.get_close_matches(Path(key).stem, stems, n=2)]
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"{name} does not exist, and no shipped config has this name; {hint}`shunted-lit configs` lists them."
        )
    return known[key]


def resolve_path(path: Path, folders: bool = False) -> Path:
    """Return a path that exists unchanged; otherwise that of the shipped config with this name, and log it.

    Args:
        path: Path or name of a config.
        folders: Whether it may be a folder of configs.

    Raises:
        ValueError: There is none.
    """
    if path.exists():
        return path
    found = find_config(str(path), folders)
    log.info("%s: using the shipped %s", path, found)
    return found


def resolve_config_options(args: Sequence[str]) -> list[str]:
    """Return the words of a command line, with the paths of shipped configs for the names after --config.

    Raises:
        ValueError: A YAML file does not exist, and no shipped config has its name.
    """
    return [_resolve_option(word, args[i - 1] if i else "") for i, word in enumerate(args)]


def _resolve_option(word: str, before: str) -> str:
    option, _, value = word.rpartition("=") if word.startswith(("--config=", "-c=")) else ("", "", word)
    is_config = bool(option) or before in ("--config", "-c")
    if not is_config or not re.fullmatch(r"[^\s:{}]+", value):  # others are for the parser, such as {key: value}
        return word
    path = str(resolve_path(Path(value)))
    return f"{option}={path}" if option else path
